//! What goes wrong around the mesh: no API server, a token that is over. A sniffer looks on meanwhile; programs say whether
//! they still reach each other.

use std::process::Command;
use std::thread;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::chart::Mesh;
use crate::programs::{SECRET, a_job, set_secret};
use crate::support::eventually;

/// How long the API server is away. Nothing depends on more: of what an agent and a controller need it for, streams end
/// after ten minutes and certificates are renewed after half a day, and both are forced here by killing the agent and
/// the controller.
const AWAY: Duration = Duration::from_secs(65);
/// From the beginning of that to the killing.
const KILLED_AFTER: Duration = Duration::from_secs(15);
/// How long kubelet and the agent may take to have the node served again: the container's second restart waits 10 s.
const RECOVERED_AFTER: Duration = Duration::from_secs(35);
/// A node's file, while which is there the expired token is written.
const WRITING: &str = "/run/expired-token";

/// What does not touch the workloads themselves.
pub(crate) fn around_the_workloads(mesh: &Mesh) {
    an_api_server_that_is_away(mesh);
    an_expired_token(mesh);
}

/// Frozen, so that whoever asks it waits. The client's node loses its agent meanwhile, and the mesh its controller.
fn an_api_server_that_is_away(mesh: &Mesh) {
    let ask = format!("timeout 3 redis-cli -h redis-0.redis set away {SECRET} | grep -q OK");
    let script = format!(
        "(for i in $(seq 400); do if {ask}; then echo ok $(date +%s); else echo no $(date +%s); fi; \
         sleep 0.3; done) >/tmp/away 2>/dev/null &"
    );
    mesh.run("apps", "redis", &["sh", "-c", &script]).expect("the client begins");
    mesh.cluster.signal("kube-apiserver", "STOP");
    let began = now();
    thread::sleep(KILLED_AFTER);
    let killed = now();
    kill(mesh, 1, "culvert-agent run");
    let controllers = [1, 2].map(|node| try_kill(mesh, node, "culvert-controller run"));
    thread::sleep(AWAY - KILLED_AFTER);
    let back = now();
    mesh.cluster.signal("kube-apiserver", "CONT");
    assert!(controllers.contains(&true), "the controller was killed");
    eventually("the API server to be back", || {
        mesh.cluster.try_kubectl(&["get", "--raw", "/readyz"]).map(drop)
    });
    let told = mesh.run("apps", "redis", &["cat", "/tmp/away"]).expect("the client can be read");
    let between = |from: u64, to: u64| -> Vec<&str> {
        let line = |line: &&str| {
            let at = line.split(' ').nth(1).and_then(|at| at.parse().ok()).unwrap_or(0);
            from <= at && at < to
        };
        told.lines().filter(line).collect()
    };
    for (from, to, what) in [
        (began, killed, "while the API server is away"),
        (killed + RECOVERED_AFTER.as_secs(), back, "with an agent that began meanwhile"),
    ] {
        let lines = between(from, to);
        assert!(lines.len() >= 8, "too little was asked {what}: {told}");
        assert!(lines.iter().all(|line| line.starts_with("ok")), "refused {what}: {told}");
    }
    eventually("the controller to be ready", || mesh.await_controller());
    eventually("the agents to be ready", || mesh.await_agents());
    a_job(mesh);
}

/// The agent's token is over, and a new controller asks for it.
fn an_expired_token(mesh: &Mesh) {
    let pod = mesh.agent_of("node1");
    let uid = ["get", "pod", &pod, "-n", "culvert-system", "-o", "jsonpath={.metadata.uid}"];
    let uid = mesh.cluster.kubectl(&uid);
    let file =
        format!("/var/lib/kubelet/pods/{uid}/volumes/kubernetes.io~projected/token/..data/token");
    let good = mesh.cluster.try_exec(&["--node", "1", "cat", &file]).expect("a token");
    let kubeconfig = mesh.cluster.try_exec(&["sh", "-c", "echo $KUBECONFIG"]).expect("a path");
    let folder = kubeconfig.rsplit_once('/').map_or(".", |(folder, _)| folder);
    let key = format!("{folder}/service-accounts.key");
    let made = Command::new("python3")
        .args(["tests/cluster/expired_token.py", &good, &key])
        .current_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/.."))
        .output()
        .expect("python3 runs");
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    let expired = String::from_utf8_lossy(&made.stdout).trim().to_owned();
    // Again and again, for kubelet puts a good one there when it looks.
    let on_node = |script: &str| mesh.cluster.try_exec(&["--node", "1", "sh", "-c", script]);
    let write = format!(
        "touch {WRITING}; while [ -e {WRITING} ]; do printf %s {expired} > {file}; sleep 0.1; done"
    );
    let writing = mesh.cluster.spawn(&["--node", "1", "sh", "-c", &write]);
    let component = "app.kubernetes.io/component=controller";
    mesh.cluster.kubectl(&["delete", "pod", "-n", "culvert-system", "-l", component]);
    eventually("the refusal of a token that is over", || {
        let logs = ["logs", "-n", "culvert-system", "-l", component, "--tail=-1"];
        let logs = mesh.cluster.try_kubectl(&logs)?;
        if logs.contains("token has expired") { Ok(()) } else { Err(logs) }
    });
    set_secret(mesh).expect("what was said before stays in force");
    // What runs on a node does not end with whoever started it.
    let restore = format!("rm {WRITING}; sleep 1; printf %s {good} > {file}");
    on_node(&restore).expect("a good token again");
    drop(writing);
    // A pod that nobody knew before: its agent has to be told of it, and to get its certificate.
    a_job(mesh);
}

fn kill(mesh: &Mesh, node: u8, program: &str) {
    assert!(try_kill(mesh, node, program), "{program} runs on node {node}");
}

/// Kills a program of a node, if it runs there.
fn try_kill(mesh: &Mesh, node: u8, program: &str) -> bool {
    let kill = format!("kill -KILL $(pgrep -f '^/usr/local/bin/{program}')");
    mesh.cluster.try_exec(&["--node", &node.to_string(), "sh", "-c", &kill]).is_ok()
}

/// Seconds since the epoch.
fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970").as_secs()
}
