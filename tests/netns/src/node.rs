//! A node: a namespace on the wire, an agent, and the CNI chain its pods are made with.

use std::net::IpAddr;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::signal::Signal;
use serde_json::json;

use crate::cni::{Chain, bridge_conflist};
use crate::net::{Namespace, ip, sysctl};
use crate::process::{Finished, Process, in_namespace, run};
use crate::wait::{PATIENCE, until};

/// Where a node's agent finds its controller and how it proves itself.
#[derive(Clone, Debug)]
pub struct AgentConfig {
    /// `https://…` of the controller.
    pub controller: String,
    /// PEM file of the root the controller's certificate chains to.
    pub controller_root: PathBuf,
    /// Further arguments.
    pub extra: Vec<String>,
    /// Value of `CULVERT_LOG`.
    pub log: String,
    /// Value of `CULVERT_SAME_NODE`.
    pub same_node: &'static str,
}

/// One node of the lab.
#[derive(Debug)]
pub struct Node {
    /// Kubernetes node name.
    pub name: String,
    /// Its address on the wire, IPv4.
    pub ipv4: IpAddr,
    /// Its address on the wire, IPv6.
    pub ipv6: IpAddr,
    /// Its pods' IPv4 subnet.
    pub subnet4: String,
    /// Its pods' IPv6 subnet.
    pub subnet6: String,
    /// The chain pods are made with.
    pub chain: Chain,
    folder: PathBuf,
    bin_dir: PathBuf,
    namespace: Namespace,
    agent: Option<Process>,
    bpffs_mounted: bool,
}

impl Node {
    /// Makes the `number`th node (from 1) of `lab` on the bridge of the namespace `wire`.
    ///
    /// # Errors
    /// When namespaces, links or addresses cannot be made.
    pub(crate) fn create(
        lab: &str,
        number: u8,
        name: &str,
        wire: &str,
        folder: &Path,
        bin_dir: &Path,
    ) -> anyhow::Result<Self> {
        let folder = folder.join(format!("node-{name}"));
        std::fs::create_dir_all(folder.join("run"))?;
        std::fs::create_dir_all(folder.join("state"))?;
        std::fs::create_dir_all(folder.join("bpf"))?;
        let namespace = Namespace::create(&format!("{lab}-node-{name}"))?;
        let (ipv4, ipv6) = (format!("192.168.77.{number}"), format!("fd77::{number}"));
        attach(&namespace, wire, &format!("{lab}-{name}"), &ipv4, &ipv6)?;
        for setting in [
            "net.ipv4.ip_forward=1",
            "net.ipv6.conf.all.forwarding=1",
            "net.ipv6.conf.default.accept_dad=0",
            "net.ipv6.conf.all.accept_dad=0",
        ] {
            sysctl(namespace.name(), setting)?;
        }
        let (subnet4, subnet6) = (format!("10.77.{number}.0/24"), format!("fd77:{number}::/64"));
        let chained = json!({
            "type": "culvert-cni",
            "agentSocket": folder.join("run/agent.sock"),
            "timeoutSeconds": 15,
        });
        let state = folder.join("ipam");
        let chain = Chain {
            node_namespace: namespace.name().to_owned(),
            plugin_path: vec![bin_dir.to_owned(), PathBuf::from("/usr/lib/cni")],
            conflist: bridge_conflist(&state.to_string_lossy(), &subnet4, &subnet6, Some(chained)),
        };
        Ok(Self {
            name: name.to_owned(),
            ipv4: ipv4.parse()?,
            ipv6: ipv6.parse()?,
            subnet4,
            subnet6,
            chain,
            folder,
            bin_dir: bin_dir.to_owned(),
            namespace,
            agent: None,
            bpffs_mounted: false,
        })
    }

    /// The name of its network namespace.
    #[must_use]
    pub fn netns(&self) -> &str {
        self.namespace.name()
    }

    /// The agent's run folder, with its sockets.
    #[must_use]
    pub fn run_dir(&self) -> PathBuf {
        self.folder.join("run")
    }

    /// The agent's state folder.
    #[must_use]
    pub fn state_dir(&self) -> PathBuf {
        self.folder.join("state")
    }

    /// The bpf file system with the agent's pins.
    #[must_use]
    pub fn bpffs(&self) -> PathBuf {
        self.folder.join("bpf")
    }

    /// Routes another node's pods through that node.
    ///
    /// # Errors
    /// When iproute2 refuses.
    pub(crate) fn route_to(&self, other: &Self) -> anyhow::Result<()> {
        ip(Some(self.netns()), &format!("route add {} via {}", other.subnet4, other.ipv4))?;
        ip(Some(self.netns()), &format!("-6 route add {} via {}", other.subnet6, other.ipv6))?;
        Ok(())
    }

    /// Starts the agent without waiting for it.
    ///
    /// # Errors
    /// When the bpf file system cannot be mounted or the program not be started.
    pub fn start_agent(&mut self, config: &AgentConfig) -> anyhow::Result<()> {
        if !self.bpffs_mounted {
            mount(Some("bpf"), &self.bpffs(), Some("bpf"), MsFlags::empty(), None::<&str>)
                .with_context(|| format!("mounting bpffs at {}", self.bpffs().display()))?;
            self.bpffs_mounted = true;
        }
        let mut command = in_namespace(Some(self.netns()), self.bin_dir.join("culvert-agent"));
        command
            .args(["--node-name", &self.name])
            .arg("--run-dir")
            .arg(self.run_dir())
            .env("CULVERT_STATE_DIR", self.state_dir())
            .arg("--bpffs")
            .arg(self.bpffs())
            .args(["--controller", &config.controller])
            .arg("--controller-root")
            .arg(&config.controller_root)
            .arg("--join-token-file")
            .arg(self.folder.join("join-token"))
            .args(&config.extra)
            .env("CULVERT_LOG", &config.log)
            .env("CULVERT_SAME_NODE", config.same_node)
            .env("RUST_BACKTRACE", "1");
        self.agent = Some(Process::start("agent", &mut command, &self.folder)?);
        Ok(())
    }

    /// Starts a second agent beside the running one and gives the first: the second takes over by itself.
    ///
    /// # Errors
    /// When none runs, or the second cannot be started.
    pub fn start_successor(&mut self, config: &AgentConfig) -> anyhow::Result<Process> {
        let predecessor = self.agent.take().context("no agent runs")?;
        self.start_agent(config)?;
        Ok(predecessor)
    }

    /// Takes the process of an agent in place of the one known so far.
    pub fn set_agent(&mut self, agent: Process) -> Option<Process> {
        self.agent.replace(agent)
    }

    /// Writes the token the agent joins with.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn set_join_token(&self, token: &str) -> anyhow::Result<()> {
        Ok(std::fs::write(self.folder.join("join-token"), token.trim())?)
    }

    /// Waits until the agent says that it is ready.
    ///
    /// # Errors
    /// When it ends or is not ready in time; the error carries the end of its log.
    pub fn wait_ready(&mut self) -> anyhow::Result<()> {
        let netns = self.netns().to_owned();
        let agent = self.agent.as_mut().context("the agent was not started")?;
        until("the agent being ready", PATIENCE, || {
            if !agent.running() {
                return Ok(None);
            }
            let mut command = in_namespace(Some(&netns), "curl");
            command.args(["-sf", "-m", "2", "http://127.0.0.1:15021/healthz/ready"]);
            Ok(run(&mut command, PATIENCE)?.success().then_some(()))
        })
        .with_context(|| format!("agent of {}:\n{}", netns, self.agent_log(30)))
    }

    /// The last lines of the agent's log.
    #[must_use]
    pub fn agent_log(&self, lines: usize) -> String {
        let path = self.folder.join("agent.log");
        let log = std::fs::read_to_string(path).unwrap_or_default();
        let all: Vec<&str> = log.lines().collect();
        all[all.len().saturating_sub(lines)..].join("\n")
    }

    /// Kills the agent as `kill -9` does.
    pub fn kill_agent(&mut self) {
        if let Some(mut agent) = self.agent.take() {
            agent.kill();
        }
    }

    /// Ends the agent with SIGTERM.
    ///
    /// # Errors
    /// When it does not end in time.
    pub fn stop_agent(&mut self) -> anyhow::Result<()> {
        if let Some(mut agent) = self.agent.take() {
            agent.stop(PATIENCE)?;
        }
        Ok(())
    }

    /// Sends a signal to the agent.
    ///
    /// # Errors
    /// When it does not run.
    pub fn signal_agent(&self, signal: Signal) -> anyhow::Result<()> {
        self.agent.as_ref().context("the agent does not run")?.signal(signal)
    }

    /// The agent's process, while it runs.
    #[must_use]
    pub const fn agent(&self) -> Option<&Process> {
        self.agent.as_ref()
    }

    /// Runs `culvert <arguments>` against this node's agent.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn culvert(&self, arguments: &[&str]) -> anyhow::Result<Finished> {
        let mut command = in_namespace(Some(self.netns()), self.bin_dir.join("culvert"));
        command.args(arguments).env("CULVERT_RUN_DIR", self.run_dir());
        run(&mut command, PATIENCE)
    }

    /// The agent's metrics.
    ///
    /// # Errors
    /// When it does not answer.
    pub fn metrics(&self) -> anyhow::Result<String> {
        let mut command = in_namespace(Some(self.netns()), "curl");
        command.args(["-sf", "-m", "20", "http://127.0.0.1:15020/metrics"]);
        run(&mut command, PATIENCE)?.output()
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        self.kill_agent();
        if self.bpffs_mounted
            && let Err(error) = umount2(&self.bpffs(), MntFlags::MNT_DETACH)
        {
            eprintln!("unmounting {}: {error}", self.bpffs().display());
        }
    }
}

/// Puts a namespace on the wire: a veth to the bridge `br0` of `wire`, with both addresses.
pub(crate) fn attach(
    namespace: &Namespace,
    wire: &str,
    link: &str,
    ipv4: &str,
    ipv6: &str,
) -> anyhow::Result<()> {
    let name = namespace.name();
    ip(Some(wire), &format!("link add {link} type veth peer name eth0 netns {name}"))?;
    ip(Some(wire), &format!("link set {link} master br0 up"))?;
    ip(Some(name), &format!("addr add {ipv4}/24 dev eth0"))?;
    ip(Some(name), &format!("addr add {ipv6}/64 dev eth0 nodad"))?;
    ip(Some(name), "link set eth0 up")?;
    Ok(())
}
