//! Real programs in the mesh: redis, PostgreSQL and gRPC across nodes, every kind of probe and service, and agents that are
//! upgraded, deleted and killed under traffic.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use crate::chart::Mesh;
use crate::faults;
use crate::support::eventually;

const XTASK: &str = env!("CARGO_BIN_EXE_xtask");
/// What must never be seen between the nodes once both ends are captured.
pub(crate) const SECRET: &str = "plaintext-marker-of-the-programs";
/// Label of the nodes on which agents run.
pub(crate) const SELECTED: &str = "culvert.test/agent";
const AGENTS: &str = "app.kubernetes.io/component=agent";

#[test]
fn real_programs_talk_through_the_mesh_and_survive_its_agents() {
    let mesh = Mesh::up("p");
    mesh.add_programs();
    mesh.cluster.kubectl(&["apply", "-f", "tests/cluster/programs.yaml"]);
    await_workloads(&mesh);
    everything_works(&mesh, "apps", "without a mesh");

    mesh.cluster.kubectl(&["label", "node", "--all", &format!("{SELECTED}=yes")]);
    let install = ["install", "culvert", "charts/culvert", "--create-namespace", "--wait"];
    mesh.helm(&[&install[..], &["--set-string", &on_selected()]].concat());
    mesh.cluster.kubectl(&["label", "namespace", "apps", "culvert.dev/dataplane-mode=ambient"]);
    for (node, pod) in
        [(1, "client"), (1, "listener"), (2, "redis-0"), (2, "redis-1"), (2, "restless")]
    {
        mesh.await_phase(node, pod, "enrolled");
    }
    await_enrolled(&mesh);
    everything_works(&mesh, "apps", "captured");
    everything_works(&mesh, "plain", "from outside the mesh");
    a_job(&mesh);
    the_command_line(&mesh);
    an_order_to_the_authority(&mesh);

    let (file, sniffer) = mesh.sniff();
    set_secret(&mesh).expect("redis answers");
    an_upgrade(&mesh);
    an_agent_that_is_deleted(&mesh);
    an_agent_that_is_killed(&mesh);
    faults::around_the_workloads(&mesh);
    everything_works(&mesh, "apps", "after faults");
    await_workloads(&mesh);
    let restarts = "jsonpath={.items[*].status.containerStatuses[*].restartCount}";
    let restarts = mesh.cluster.kubectl(&["get", "pods", "-n", "apps", "-o", restarts]);
    assert!(restarts.split(' ').all(|count| count == "0"), "probes go on: {restarts}");
    drop(sniffer);
    let wire = String::from_utf8_lossy(&fs::read(&file).expect("the sniffer's file")).into_owned();
    assert!(!wire.contains(SECRET), "something was in the clear");
    let path = file.display().to_string();
    let tunnels = mesh.cluster.try_exec(&["tcpdump", "-nr", &path, "-c", "1", "tcp port 15008"]);
    assert!(tunnels.is_ok_and(|packets| !packets.is_empty()), "there are tunnels on the wire");

    everything_works(&mesh, "apps", "at the end");
    await_workloads(&mesh);
}

/// Agents run where the label is.
fn on_selected() -> String {
    format!("agent.nodeSelector.{}=yes", SELECTED.replace('.', "\\."))
}

/// Through every kind of service, by the programs' own clients.
fn everything_works(mesh: &Mesh, namespace: &str, when: &str) {
    let checks: &[(&str, &[&str], &str)] = &[
        ("redis", &["redis-cli", "-h", "redis-0.redis.apps", "set", "key", "value"], "OK"),
        ("redis", &["redis-cli", "-h", "redis-1.redis.apps", "ping"], "PONG"),
        (
            "postgres",
            &["psql", "-h", "postgres.apps", "-U", "postgres", "-Atc", "select 6*7"],
            "42",
        ),
        ("grpc", &["grpc", "call", "grpc.apps:50051", "20"], "calls: 20"),
        ("curl", &["curl", "-sSfm", "5", "http://web.apps/"], "hello from web-"),
        // The node of the pods, and the other one.
        ("curl", &["curl", "-sSfm", "5", "http://10.0.0.11:30080/"], "hello from web-"),
        ("curl", &["curl", "-sSfm", "5", "http://10.0.0.12:30080/"], "hello from web-"),
        ("curl", &["curl", "-sSfm", "5", "http://[fd00:10::12]:30080/"], "hello from web-"),
    ];
    for (container, command, expected) in checks {
        // A service was made or a pod was enrolled a moment ago: the first answer may take its time.
        eventually(&format!("{command:?} {when} in {namespace}"), || {
            let answer = mesh.run(namespace, container, command)?;
            if answer.contains(expected) { Ok(()) } else { Err(answer) }
        });
    }
    eventually(&format!("a node port {when}, from outside the cluster"), || {
        let curl = ["curl", "-sSfm", "5", "http://10.0.0.12:30080/"];
        let answer = mesh.cluster.try_exec(&curl)?;
        if answer.contains("hello from web-") { Ok(()) } else { Err(answer) }
    });
    let forward = mesh.cluster.forward_in("apps", "redis-0", "16379:6379");
    eventually(&format!("a forwarded port {when}"), || {
        let ping = ["redis-cli", "-h", "127.0.0.1", "-p", "16379", "ping"];
        let answer = mesh.cluster.try_exec(&ping)?;
        if answer.contains("PONG") { Ok(()) } else { Err(answer) }
    });
    drop(forward);
}

pub(crate) fn a_job(mesh: &Mesh) {
    mesh.cluster.kubectl(&["apply", "-f", "tests/cluster/job.yaml"]);
    let done = ["wait", "--for=condition=Complete", "job/count", "-n", "apps", "--timeout=120s"];
    if let Err(complaint) = mesh.cluster.try_kubectl(&done) {
        let pods = ["describe", "pods", "-n", "apps", "-l", "job-name=count"];
        let system = ["get", "pods,events", "-n", "culvert-system"];
        let logs = ["logs", "-n", "culvert-system", "-l", "app.kubernetes.io/name=culvert"];
        let asked = [&pods[..], &system[..], &logs[..]].map(|what| mesh.cluster.try_kubectl(what));
        panic!(
            "{complaint}\n{}",
            asked.map(|answer| answer.unwrap_or_else(|error| error)).join("\n")
        );
    }
    mesh.cluster.kubectl(&["delete", "-f", "tests/cluster/job.yaml"]);
}

/// `culvert` asks the cluster through kubectl.
fn the_command_line(mesh: &Mesh) {
    let culvert = |arguments: &[&str]| {
        let program = Path::new(XTASK).with_file_name("culvert").display().to_string();
        mesh.cluster.try_exec(&[&[program.as_str(), "--cluster"], arguments].concat())
    };
    eventually("everything to be well", || {
        let status = culvert(&["status"])?;
        if status.contains("apps/client") { Ok(()) } else { Err(status) }
    });
    let answer = culvert(&["explain", "apps/client", "web.apps:80"]).expect("it is explained");
    assert!(answer.contains("15008"), "{answer}");
    culvert(&["connections", "--pod", "apps/client"]).expect("connections are listed");
    let pods = culvert(&["pod", "list", "--node", "node2"]).expect("the agent answers");
    assert!(pods.contains("apps/redis-0"), "{pods}");
    assert!(culvert(&["check"]).expect("nothing is wrong").contains("No NetworkPolicy"));
    mesh.cluster.kubectl(&["apply", "-f", "tests/cluster/network-policy.yaml"]);
    let found = culvert(&["check"]).expect_err("a policy stops the mesh");
    assert!(found.contains("apps/web-only") && found.contains("15008"), "{found}");
    mesh.cluster.kubectl(&["delete", "-f", "tests/cluster/network-policy.yaml"]);
    let left = culvert(&["ns", "remove", "apps"]).expect("the namespace leaves");
    assert!(left.contains("pods let go"), "{left}");
    let joined = culvert(&["ns", "add", "apps"]).expect("the namespace joins");
    assert!(joined.contains("pods captured"), "{joined}");
    await_enrolled(mesh);
}

/// What `ca revoke` was told is in the Secret when it returns.
fn an_order_to_the_authority(mesh: &Mesh) {
    let secret = || {
        let secret =
            ["get", "secret", "culvert-ca", "-n", "culvert-system", "-o", "jsonpath={.data}"];
        mesh.cluster.kubectl(&secret)
    };
    let before = secret();
    let exec = ["exec", "-n", "culvert-system", "deployment/culvert-controller", "--"];
    let revoke = ["culvert-controller", "ca", "revoke", "--serial", "0a1b2c"];
    let told = mesh.cluster.try_kubectl(&[&exec[..], &revoke].concat());
    assert!(told.as_ref().is_err_and(|told| told.contains("never issued it")), "{told:?}");
    // Not shown when it fails: it holds keys.
    assert!(secret() != before, "the Secret does not hold the revocation");
}

pub(crate) fn set_secret(mesh: &Mesh) -> Result<String, String> {
    mesh.run("apps", "redis", &["redis-cli", "-h", "redis-0.redis", "set", "secret", SECRET])
}

/// The chart is upgraded while transactions and a gRPC stream run, each over connections that began before: none of them notices.
fn an_upgrade(mesh: &Mesh) {
    let before = mesh.agents();
    assert_eq!(before.len(), 2, "{before:?}");
    let init = ["pgbench", "-h", "postgres", "-U", "postgres", "-i", "-q", "postgres"];
    mesh.run("apps", "postgres", &init).expect("tables are made");
    let pgbench = [
        "pgbench", "-h", "postgres", "-U", "postgres", "-c", "4", "-R", "50", "-T", "45",
        "postgres",
    ];
    let transactions = mesh.start("postgres", &pgbench);
    let stream = mesh.start("grpc", &["grpc", "hold", "grpc:50051", "45"]);
    let began = Instant::now();
    let upgrade = ["upgrade", "culvert", "charts/culvert", "--wait"];
    let set = ["--set", "agent.drainSeconds=6", "--set-string", &on_selected()];
    mesh.helm(&[&upgrade[..], &set].concat());
    assert!(began.elapsed() < Duration::from_secs(45), "the upgrade took longer than the traffic");
    // One that has handed over may take a moment to be gone.
    eventually("every agent to be another pod", || {
        let after = mesh.agents();
        if before.is_disjoint(&after) { Ok(()) } else { Err(format!("{before:?} {after:?}")) }
    });
    let transactions = output(transactions);
    assert!(transactions.contains("number of failed transactions: 0"), "{transactions}");
    let stream = output(stream);
    assert!(stream.contains("held through calls"), "{stream}");
    let restarts = "jsonpath={.items[*].status.containerStatuses[*].restartCount}";
    let restarts = ["get", "pods", "-n", "culvert-system", "-l", AGENTS, "-o", restarts];
    let restarts = mesh.cluster.kubectl(&restarts);
    assert!(
        restarts.split(' ').all(|count| count == "0"),
        "no agent had to be restarted: {restarts}"
    );
    set_secret(mesh).expect("redis answers right after the upgrade");
}

fn an_agent_that_is_deleted(mesh: &Mesh) {
    let pod = mesh.agent_of("node1");
    mesh.cluster.kubectl(&["delete", "pod", "-n", "culvert-system", &pod]);
    eventually("the client to reach the server again", || set_secret(mesh).map(drop));
    eventually("another agent to be ready", || mesh.await_agents());
}

fn an_agent_that_is_killed(mesh: &Mesh) {
    let kill = "kill -KILL $(pgrep -f '^/usr/local/bin/culvert-agent run')";
    let pod = mesh.agent_of("node1");
    mesh.cluster.try_exec(&["--node", "1", "sh", "-c", kill]).expect("the agent is killed");
    eventually("the agent's container to be started again", || {
        let count = "jsonpath={.status.containerStatuses[0].restartCount}";
        let count = ["get", "pod", &pod, "-n", "culvert-system", "-o", count];
        let count = mesh.cluster.try_kubectl(&count)?;
        if count == "1" { Ok(()) } else { Err(count) }
    });
    eventually("the client to reach the server again", || set_secret(mesh).map(drop));
    eventually("the agent to be ready", || mesh.await_agents());
}

/// Every workload is ready, as its probes say.
fn await_workloads(mesh: &Mesh) {
    let ready = ["wait", "--for=condition=Ready", "pod", "--all", "--timeout=90s"];
    for namespace in ["apps", "plain"] {
        mesh.cluster.kubectl(&[&ready[..], &["-n", namespace]].concat());
    }
}

/// The pods of Deployments, whose names nobody chose.
fn await_enrolled(mesh: &Mesh) {
    let names = "jsonpath={.items[*].metadata.name}";
    let select = ["get", "pods", "-n", "apps", "-l", "app in (postgres,grpc,web)", "-o", names];
    for pod in mesh.cluster.kubectl(&select).split(' ') {
        mesh.await_phase(2, pod, "enrolled");
    }
}

fn output(child: Child) -> String {
    let output = child.wait_with_output().expect("kubectl ends");
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let said = format!("{}{}", text(&output.stdout), text(&output.stderr));
    assert!(output.status.success(), "{said}");
    said
}

impl Mesh {
    fn add_programs(&self) {
        let archive = self.scratch.path().join("programs.tar").display().to_string();
        let written = Command::new(XTASK).args(["cluster", "programs", &archive]).status();
        assert!(written.expect("xtask starts").success(), "images are made");
        self.cluster.xtask(&["load"], &[&archive]);
    }

    pub(crate) fn run(
        &self,
        namespace: &str,
        container: &str,
        command: &[&str],
    ) -> Result<String, String> {
        let exec = ["exec", "-n", namespace, "client", "-c", container, "--"];
        self.cluster.try_kubectl(&[&exec[..], command].concat())
    }

    fn start(&self, container: &str, command: &[&str]) -> Child {
        let exec = ["exec", "-n", "apps", "client", "-c", container, "--"];
        self.cluster.start_kubectl(&[&exec[..], command].concat())
    }

    /// The uids of the agents' pods.
    fn agents(&self) -> BTreeSet<String> {
        let uids = "jsonpath={.items[*].metadata.uid}";
        let listed = ["get", "pods", "-n", "culvert-system", "-l", AGENTS, "-o", uids];
        self.cluster.kubectl(&listed).split(' ').map(str::to_owned).collect()
    }

    pub(crate) fn agent_of(&self, node: &str) -> String {
        let node = format!("spec.nodeName={node}");
        let name = "jsonpath={.items[0].metadata.name}";
        let select = ["-l", AGENTS, "--field-selector", &node, "-o", name];
        self.cluster.kubectl(&[&["get", "pods", "-n", "culvert-system"][..], &select].concat())
    }

    pub(crate) fn await_controller(&self) -> Result<(), String> {
        let ready = "jsonpath={.status.readyReplicas}";
        let set = ["get", "deployment", "culvert-controller", "-n", "culvert-system", "-o", ready];
        let ready = self.cluster.try_kubectl(&set)?;
        if ready == "1" { Ok(()) } else { Err(ready) }
    }

    pub(crate) fn await_agents(&self) -> Result<(), String> {
        let ready = "jsonpath={.status.numberReady}";
        let set = ["get", "daemonset", "culvert-agent", "-n", "culvert-system", "-o", ready];
        let ready = self.cluster.try_kubectl(&set)?;
        if ready == "2" { Ok(()) } else { Err(ready) }
    }
}
