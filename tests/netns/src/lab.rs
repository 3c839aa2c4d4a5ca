//! The whole: wire, nodes, controller, pods.

use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, bail};
use serde_json::{Value, json};

use crate::cni::Attachment;
use crate::manifest;
use crate::net::{self, Namespace, ip};
use crate::node::{AgentConfig, Node, attach};
use crate::pod::{Pod, PodSpec};
use crate::process::{Finished, Process, in_namespace, run};
use crate::wait::{PATIENCE, until};

/// The controller's address on the wire.
pub const CONTROLLER_IP: &str = "192.168.77.100";
/// A host on the wire that belongs to no mesh.
pub const OUTSIDE_IP: &str = "192.168.77.200";
/// The same, IPv6.
pub const OUTSIDE_IP6: &str = "fd77::200";

/// What a lab is to be.
#[derive(Clone, Debug)]
pub struct LabConfig {
    /// Name, at most six characters: part of every name the lab makes.
    pub name: String,
    /// Node names.
    pub nodes: Vec<String>,
    /// `CULVERT_LOG` of agents and controller.
    pub log: String,
    /// Further arguments of every agent.
    pub agent_arguments: Vec<String>,
    /// `CULVERT_SAME_NODE` of the agents: that of every node, and that of nodes that differ. An argument goes before it.
    pub same_node: (&'static str, Vec<(&'static str, &'static str)>),
}

impl LabConfig {
    /// Two nodes, `a` and `b`.
    ///
    /// `CULVERT_LAB_PREFIX`, at most three characters, goes before the name: tests of two checkouts then run side by side.
    #[must_use]
    pub fn two_nodes(name: &str) -> Self {
        let prefix = std::env::var("CULVERT_LAB_PREFIX").unwrap_or_default();
        Self {
            name: prefix + name,
            nodes: vec!["a".to_owned(), "b".to_owned()],
            log: std::env::var("CULVERT_LOG").unwrap_or_else(|_unset| "info".to_owned()),
            agent_arguments: Vec::new(),
            same_node: ("tunnel", Vec::new()),
        }
    }
}

/// A running lab. Dropping it ends every program and removes every namespace.
#[derive(Debug)]
pub struct Lab {
    config: LabConfig,
    folder: PathBuf,
    bin_dir: PathBuf,
    // Dropped in this order: pods, then nodes, then what they hang on.
    pods: Vec<Pod>,
    nodes: Vec<Node>,
    controller: Option<Process>,
    controller_namespace: Namespace,
    outside: Namespace,
    wire: Namespace,
    serial: u32,
}

impl Lab {
    /// Builds wire, nodes and controller, starts the controller and every agent, and waits until all are ready.
    ///
    /// # Errors
    /// When anything is missing or does not come up; the error says what, with the end of its log.
    pub fn start(config: LabConfig) -> anyhow::Result<Self> {
        let mut lab = Self::build(config)?;
        lab.start_controller()?;
        for index in 0..lab.nodes.len() {
            lab.join(index)?;
            lab.start_agent(index)?;
        }
        for node in &mut lab.nodes {
            node.wait_ready()?;
        }
        Ok(lab)
    }

    /// Builds wire and nodes, without a controller or agents running.
    ///
    /// # Errors
    /// When not root, when programs are missing or namespaces cannot be made.
    pub fn build(config: LabConfig) -> anyhow::Result<Self> {
        if !nix::unistd::geteuid().is_root() {
            bail!("the lab makes network namespaces: run it as root");
        }
        if config.name.len() > 6 || config.name.is_empty() {
            bail!("a lab's name has 1 to 6 characters, not {:?}", config.name);
        }
        let bin_dir = bin_dir()?;
        Self::remove_leftovers(&config.name)?;
        let folder = folder_of(&config.name);
        std::fs::create_dir_all(folder.join("manifests"))?;
        std::fs::create_dir_all(folder.join("controller"))?;
        let name = &config.name;
        let wire = Namespace::create(&format!("{name}-wire"))?;
        ip(Some(wire.name()), "link add br0 type bridge")?;
        ip(Some(wire.name()), "link set br0 up")?;
        let controller_namespace = Namespace::create(&format!("{name}-ctl"))?;
        attach(
            &controller_namespace,
            wire.name(),
            &format!("{name}-ctl"),
            CONTROLLER_IP,
            "fd77::100",
        )?;
        let outside = Namespace::create(&format!("{name}-out"))?;
        attach(&outside, wire.name(), &format!("{name}-out"), OUTSIDE_IP, OUTSIDE_IP6)?;
        let mut nodes = Vec::new();
        for (number, node) in (1..).zip(&config.nodes) {
            nodes.push(Node::create(name, number, node, wire.name(), &folder, &bin_dir)?);
        }
        for node in &nodes {
            for other in nodes.iter().filter(|other| other.name != node.name) {
                node.route_to(other)?;
            }
            ip(Some(outside.name()), &format!("route add {} via {}", node.subnet4, node.ipv4))?;
            ip(Some(outside.name()), &format!("-6 route add {} via {}", node.subnet6, node.ipv6))?;
            // Waypoints are pods that talk to the controller themselves.
            let controller = controller_namespace.name();
            ip(Some(controller), &format!("route add {} via {}", node.subnet4, node.ipv4))?;
            ip(Some(controller), &format!("-6 route add {} via {}", node.subnet6, node.ipv6))?;
        }
        let lab = Self {
            config,
            folder,
            bin_dir,
            pods: Vec::new(),
            nodes,
            controller: None,
            controller_namespace,
            outside,
            wire,
            serial: 0,
        };
        for node in &lab.nodes {
            lab.apply(&manifest::node(
                &node.name,
                &[node.ipv4, node.ipv6],
                &[&node.subnet4, &node.subnet6],
            ))?;
        }
        Ok(lab)
    }

    /// Starts the controller and waits until it is ready.
    ///
    /// # Errors
    /// When it ends or is not ready in time.
    pub fn start_controller(&mut self) -> anyhow::Result<()> {
        self.start_controller_with(&[])
    }

    /// As [`start_controller`](Self::start_controller), with `extra` arguments.
    ///
    /// # Errors
    /// When it ends or is not ready in time.
    pub fn start_controller_with(&mut self, extra: &[&str]) -> anyhow::Result<()> {
        let state = self.folder.join("controller");
        let mut command = in_namespace(
            Some(self.controller_namespace.name()),
            self.bin_dir.join("culvert-controller"),
        );
        command
            .arg("run")
            .arg("--source")
            .arg(format!("directory:{}", self.manifests().display()))
            .arg("--state-dir")
            .arg(&state)
            .args(["--listen", &format!("{CONTROLLER_IP}:15012")])
            .args(["--san", CONTROLLER_IP])
            .args(["--admin", "127.0.0.1:15014"])
            .arg("--admin-socket")
            .arg(self.controller_socket())
            .args(extra)
            .env("CULVERT_LOG", &self.config.log)
            .env("RUST_BACKTRACE", "1");
        let mut process = Process::start("controller", &mut command, &self.folder)?;
        let socket = self.controller_socket();
        let ready = until("the controller being ready", PATIENCE, || {
            if !process.running() {
                return Ok(None);
            }
            let mut curl = Command::new("curl");
            curl.args(["-sf", "-m", "2", "--unix-socket"])
                .arg(&socket)
                .arg("http://controller/ready");
            Ok(run(&mut curl, PATIENCE)?.success().then_some(()))
        });
        ready.with_context(|| format!("controller:\n{}", process.log_tail(30)))?;
        self.controller = Some(process);
        // As an operator gives it to the nodes: once.
        if !self.controller_root().exists() {
            std::fs::write(self.controller_root(), self.controller_command(&["ca", "root"])?)?;
        }
        Ok(())
    }

    /// Kills the controller.
    pub fn kill_controller(&mut self) {
        if let Some(mut controller) = self.controller.take() {
            controller.kill();
        }
    }

    /// Gives the `index`th node a fresh join token.
    ///
    /// # Errors
    /// When the controller's command fails.
    pub fn join(&self, index: usize) -> anyhow::Result<()> {
        let node = &self.nodes[index];
        let token =
            self.controller_command(&["token", "create", "--node", &node.name, "--ttl", "1h"])?;
        node.set_join_token(&token)
    }

    /// Runs `culvert-controller <arguments> --state-dir …` and gives what it printed.
    ///
    /// # Errors
    /// When it fails.
    pub fn controller_command(&self, arguments: &[&str]) -> anyhow::Result<String> {
        let mut command = Command::new(self.bin_dir.join("culvert-controller"));
        command.args(arguments).arg("--state-dir").arg(self.folder.join("controller"));
        run(&mut command, PATIENCE)?.output()
    }

    /// Starts the agent of the `index`th node, without waiting for it.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start_agent(&mut self, index: usize) -> anyhow::Result<()> {
        self.start_agent_with(index, &[])
    }

    /// As [`start_agent`](Self::start_agent), with `extra` arguments.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start_agent_with(&mut self, index: usize, extra: &[&str]) -> anyhow::Result<()> {
        let config = self.agent_config(index, extra);
        self.nodes[index].start_agent(&config)
    }

    /// Starts a second agent beside the running one of the `index`th node, with `extra` arguments; gives the first.
    ///
    /// # Errors
    /// When none runs, or the second cannot be started.
    pub fn start_successor(&mut self, index: usize, extra: &[&str]) -> anyhow::Result<Process> {
        let config = self.agent_config(index, extra);
        self.nodes[index].start_successor(&config)
    }

    fn agent_config(&self, index: usize, extra: &[&str]) -> AgentConfig {
        let (of_all, of_some) = &self.config.same_node;
        let name = &self.nodes[index].name;
        let own = of_some.iter().find(|(node, _)| node == name);
        let mut arguments = self.config.agent_arguments.clone();
        arguments.extend(extra.iter().map(|argument| (*argument).to_owned()));
        AgentConfig {
            controller: format!("https://{CONTROLLER_IP}:15012"),
            controller_root: self.controller_root(),
            extra: arguments,
            log: self.config.log.clone(),
            same_node: own.map_or(*of_all, |(_, own)| *own),
        }
    }

    /// The node called `name`.
    ///
    /// # Panics
    /// When there is none: a mistake in the test.
    #[must_use]
    pub fn node(&self, name: &str) -> &Node {
        self.nodes.iter().find(|node| node.name == name).expect("a node of the lab")
    }

    /// The number of the node called `name`.
    ///
    /// # Panics
    /// When there is none: a mistake in the test.
    #[must_use]
    pub fn node_index(&self, name: &str) -> usize {
        self.nodes.iter().position(|node| node.name == name).expect("a node of the lab")
    }

    /// The node called `name`, to change it.
    ///
    /// # Panics
    /// When there is none: a mistake in the test.
    pub fn node_mut(&mut self, name: &str) -> &mut Node {
        self.nodes.iter_mut().find(|node| node.name == name).expect("a node of the lab")
    }

    /// The pod called `name`.
    ///
    /// # Panics
    /// When there is none: a mistake in the test.
    #[must_use]
    pub fn pod(&self, name: &str) -> &Pod {
        self.pods.iter().find(|pod| pod.spec.name == name).expect("a pod of the lab")
    }

    /// Name of the namespace of the host outside the mesh.
    #[must_use]
    pub fn outside(&self) -> &str {
        self.outside.name()
    }

    /// Name of the namespace with the bridge all nodes hang on.
    #[must_use]
    pub fn wire(&self) -> &str {
        self.wire.name()
    }

    /// The lab's folder: manifests, logs, captures.
    #[must_use]
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// The folder the controller reads.
    #[must_use]
    pub fn manifests(&self) -> PathBuf {
        self.folder.join("manifests")
    }

    /// The controller's admin socket.
    #[must_use]
    pub fn controller_socket(&self) -> PathBuf {
        self.folder.join("controller/admin.sock")
    }

    /// The controller's process, while it runs.
    #[must_use]
    pub const fn controller(&self) -> Option<&Process> {
        self.controller.as_ref()
    }

    /// The roots by which the controller's certificate is judged.
    #[must_use]
    pub fn controller_root(&self) -> PathBuf {
        self.folder.join("root.pem")
    }

    /// The folder with the programs under test.
    #[must_use]
    pub fn bin_dir(&self) -> &Path {
        &self.bin_dir
    }

    /// Runs `culvert <arguments>` against the controller.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn culvert(&self, arguments: &[&str]) -> anyhow::Result<Finished> {
        let mut command = Command::new(self.bin_dir.join("culvert"));
        command.args(arguments).env("CULVERT_CONTROLLER_SOCKET", self.controller_socket());
        run(&mut command, PATIENCE)
    }

    /// Writes an object into the controller's directory, atomically.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn apply(&self, object: &Value) -> anyhow::Result<()> {
        let path = self.manifest_path(object)?;
        let temporary = path.with_extension("tmp");
        std::fs::write(&temporary, serde_json::to_vec_pretty(object)?)?;
        Ok(std::fs::rename(temporary, path)?)
    }

    /// Removes an object from the controller's directory.
    ///
    /// # Errors
    /// When it is not there.
    pub fn delete(&self, object: &Value) -> anyhow::Result<()> {
        Ok(std::fs::remove_file(self.manifest_path(object)?)?)
    }

    fn manifest_path(&self, object: &Value) -> anyhow::Result<PathBuf> {
        let kind = object["kind"].as_str().context("an object without kind")?;
        let name = object["metadata"]["name"].as_str().context("an object without name")?;
        let namespace = object["metadata"]["namespace"].as_str().unwrap_or("-");
        Ok(self.manifests().join(format!("{kind}.{namespace}.{name}.json")))
    }

    /// Runs a pod: its object first (as a scheduler leaves it), then its network by CNI, then its status.
    ///
    /// # Errors
    /// When CNI refuses it; the pod is gone again then.
    pub fn run_pod(&mut self, node: &str, spec: PodSpec) -> anyhow::Result<&Pod> {
        self.serial += 1;
        let uid = format!("00000000-0000-4000-8000-{:012}", self.serial);
        let object = pod_object(&spec, &uid, node, &[]);
        self.apply(&object)?;
        match self.attach_pod(node, &spec, &uid) {
            Ok(pod) => {
                self.apply(&pod_object(&pod.spec, &uid, node, &[pod.ipv4, pod.ipv6]))?;
                self.pods.push(pod);
                self.pods.last().context("just pushed")
            }
            Err(error) => {
                self.delete(&object)?;
                Err(error.context(format!("running pod {}/{}", spec.namespace, spec.name)))
            }
        }
    }

    fn attach_pod(&self, node: &str, spec: &PodSpec, uid: &str) -> anyhow::Result<Pod> {
        let node = self.node(node);
        let name = format!("{}-{}-{}", self.config.name, spec.namespace, spec.name);
        write_resolv_conf(&name, &spec.namespace)?;
        let namespace = Namespace::create(&name)?;
        net::sysctl(&name, "net.ipv6.conf.all.accept_dad=0")?;
        net::sysctl(&name, "net.ipv6.conf.default.accept_dad=0")?;
        let container_id = format!("{}{}", self.config.name, uid.replace('-', ""));
        let attachment = Attachment {
            netns: format!("/run/netns/{name}"),
            args: format!(
                "IgnoreUnknown=1;K8S_POD_NAMESPACE={};K8S_POD_NAME={};K8S_POD_UID={uid};K8S_POD_INFRA_CONTAINER_ID={container_id}",
                spec.namespace, spec.name
            ),
            container_id,
        };
        let result = node.chain.add(&attachment)?;
        let addresses: Vec<IpAddr> = result["ips"]
            .as_array()
            .context("CNI gave no addresses")?
            .iter()
            .filter_map(|entry| entry["address"].as_str()?.split('/').next()?.parse().ok())
            .collect();
        let ipv4 = addresses.iter().find(|ip| ip.is_ipv4()).copied().context("no IPv4 address")?;
        let ipv6 = addresses.iter().find(|ip| ip.is_ipv6()).copied().context("no IPv6 address")?;
        let folder = self.folder.join(format!("pod-{}-{}", spec.namespace, spec.name));
        std::fs::create_dir_all(&folder)?;
        Ok(Pod {
            spec: spec.clone(),
            node: node.name.clone(),
            uid: uid.to_owned(),
            ipv4,
            ipv6,
            attachment,
            namespace,
            folder,
        })
    }

    /// Deletes a pod: its network by CNI, then its object.
    ///
    /// # Errors
    /// When CNI fails.
    pub fn delete_pod(&mut self, name: &str) -> anyhow::Result<()> {
        let index = self
            .pods
            .iter()
            .position(|pod| pod.spec.name == name)
            .with_context(|| format!("no pod {name}"))?;
        let pod = self.pods.remove(index);
        self.node(&pod.node).chain.delete(&pod.attachment)?;
        self.delete(&pod_object(&pod.spec, &pod.uid, &pod.node, &[]))
    }

    /// Whether a lab of this name runs, or has left something behind.
    #[must_use]
    pub fn exists(name: &str) -> bool {
        folder_of(name).exists()
    }

    /// Removes what a lab of this name left behind: programs, namespaces, mounts, files.
    ///
    /// # Errors
    /// When something cannot be removed.
    pub fn remove_leftovers(name: &str) -> anyhow::Result<()> {
        let prefix = format!("{name}-");
        for entry in std::fs::read_dir("/run/netns").into_iter().flatten() {
            let entry = entry?.file_name().to_string_lossy().into_owned();
            if entry.starts_with(&prefix) {
                net::remove(&entry)?;
            }
        }
        for entry in std::fs::read_dir("/etc/netns").into_iter().flatten() {
            let entry = entry?;
            if entry.file_name().to_string_lossy().starts_with(&prefix) {
                std::fs::remove_dir_all(entry.path())?;
            }
        }
        let folder = folder_of(name);
        let mounts = std::fs::read_to_string("/proc/self/mounts")?;
        for mount in mounts.lines().filter_map(|line| line.split(' ').nth(1)) {
            if Path::new(mount).starts_with(&folder) {
                nix::mount::umount2(mount, nix::mount::MntFlags::MNT_DETACH)
                    .with_context(|| format!("unmounting {mount}"))?;
            }
        }
        if folder.exists() {
            std::fs::remove_dir_all(&folder)
                .with_context(|| format!("removing {}", folder.display()))?;
        }
        Ok(())
    }

    /// Leaves everything running when the value goes away; [`Lab::remove_leftovers`] ends it.
    pub fn leave_running(self) {
        std::mem::forget(self);
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if std::thread::panicking() || std::env::var_os("CULVERT_LAB_LOGS").is_some() {
            eprintln!(
                "--- controller\n{}",
                self.controller.as_ref().map_or_else(String::new, |p| p.log_tail(20))
            );
            for node in &self.nodes {
                eprintln!("--- agent of node {}\n{}", node.name, node.agent_log(30));
            }
        }
        self.pods.clear();
        self.nodes.clear();
        self.controller = None;
        if let Err(error) = Self::remove_leftovers(&self.config.name) {
            eprintln!("removing the lab: {error:#}");
        }
    }
}

fn folder_of(name: &str) -> PathBuf {
    std::env::temp_dir().join(format!("culvert-lab-{name}"))
}

/// The folder with the built programs: `CULVERT_BIN_DIR`, or where this program itself was built.
///
/// # Errors
/// When a program is missing, naming the remedy.
fn bin_dir() -> anyhow::Result<PathBuf> {
    let folder = match std::env::var_os("CULVERT_BIN_DIR") {
        Some(folder) => PathBuf::from(folder),
        None => {
            let mut folder = std::env::current_exe()?;
            folder.pop();
            if folder.ends_with("deps") {
                folder.pop();
            }
            folder
        }
    };
    for program in
        ["culvert-agent", "culvert-cni", "culvert-controller", "culvert-waypoint", "culvert"]
    {
        if !folder.join(program).is_file() {
            bail!(
                "no {program} in {}: build it with cargo xtask test or cargo build",
                folder.display()
            );
        }
    }
    Ok(folder)
}

fn write_resolv_conf(netns: &str, namespace: &str) -> anyhow::Result<()> {
    let folder = Path::new("/etc/netns").join(netns);
    std::fs::create_dir_all(&folder)?;
    let text = format!(
        "nameserver {OUTSIDE_IP}\nsearch {namespace}.svc.cluster.local svc.cluster.local cluster.local\noptions ndots:5 timeout:1 attempts:2\n"
    );
    Ok(std::fs::write(folder.join("resolv.conf"), text)?)
}

fn pod_object(spec: &PodSpec, uid: &str, node: &str, addresses: &[IpAddr]) -> Value {
    let mut labels: serde_json::Map<String, Value> =
        spec.labels.iter().map(|(key, value)| (key.clone(), json!(value))).collect();
    labels.insert("app".to_owned(), json!(spec.app));
    let annotations: serde_json::Map<String, Value> =
        spec.annotations.iter().map(|(key, value)| (key.clone(), json!(value))).collect();
    let ips: Vec<Value> = addresses.iter().map(|ip| json!({ "ip": ip.to_string() })).collect();
    let ready = if addresses.is_empty() { "False" } else { "True" };
    let mut status = json!({
        "phase": if addresses.is_empty() { "Pending" } else { "Running" },
        "conditions": [{ "type": "Ready", "status": ready }],
    });
    if let Some(first) = addresses.first() {
        status["podIP"] = json!(first.to_string());
        status["podIPs"] = Value::Array(ips);
    }
    let (hostname, subdomain) = spec.host.clone().unzip();
    json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {
            "name": spec.name, "namespace": spec.namespace, "uid": uid,
            "labels": labels, "annotations": annotations,
        },
        "spec": {
            "nodeName": node, "serviceAccountName": spec.service_account, "containers": spec.containers,
            "hostname": hostname, "subdomain": subdomain,
        },
        "status": status,
    })
}
