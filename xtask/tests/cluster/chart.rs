//! The chart on a real cluster: one install, one label, and out again without a trace.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use crate::support::{Cluster, Running, eventually};
use crate::{admission, waypoint};

const XTASK: &str = env!("CARGO_BIN_EXE_xtask");
/// What nginx answers with.
const SECRET: &str = "hello from web";

/// A cluster with the chart's images, and what is asked of it.
pub(crate) struct Mesh {
    pub(crate) cluster: Cluster,
    pub(crate) scratch: tempfile::TempDir,
}

#[test]
fn one_install_and_one_label_bring_pods_in_and_leave_nothing() {
    let mesh = Mesh::up("m");
    mesh.cluster.kubectl(&["apply", "-f", "tests/cluster/mesh.yaml"]);
    mesh.cluster.kubectl(&["apply", "-f", "tests/cluster/istio-crds.yaml"]);
    mesh.cluster.kubectl(&["apply", "-f", "tests/cluster/monitoring-crds.yaml"]);
    waypoint::define(&mesh);
    let ready = ["wait", "--for=condition=Ready", "pod", "--all", "-n", "mesh", "--timeout=60s"];
    mesh.cluster.kubectl(&ready);
    let before = [mesh.traces(1), mesh.traces(2)];
    assert!(mesh.wire("client", 0).contains(SECRET), "the sniffer sees what is sent in the clear");

    let set = ["--set", "mesh.istioLabels=true,admissionPolicies.enabled=true"];
    let install = ["install", "culvert", "charts/culvert", "--create-namespace", "--wait"];
    mesh.helm(&[&install[..], &set].concat());
    mesh.helm(&["test", "culvert"]);
    mesh.cluster.kubectl(&["label", "namespace", "mesh", "culvert.dev/dataplane-mode=ambient"]);
    for (node, pod) in [(1, "client"), (1, "intruder"), (2, "web")] {
        mesh.await_phase(node, pod, "enrolled");
    }
    let wire = mesh.wire("client", 1);
    assert!(!wire.contains(SECRET), "nothing is in the clear");
    waypoint::requests_are_judged(&mesh);
    admission::what_cannot_be_is_refused_at_once(&mesh);
    policy(&mesh);
    a_rewritten_network(&mesh);
    the_secure_profile(&mesh);
    an_agent_that_is_away(&mesh);
    let restarts = "jsonpath={.items[*].status.containerStatuses[*].restartCount}";
    let restarts = mesh.cluster.kubectl(&["get", "pods", "-n", "mesh", "-o", restarts]);
    assert!(restarts.split(' ').all(|count| count == "0"), "probes go on: {restarts}");
    mesh.cluster.kubectl(&ready);

    mesh.cluster.kubectl(&["delete", "-f", "tests/cluster/only-client.yaml"]);
    mesh.cluster.kubectl(&["delete", "-f", "tests/cluster/late.yaml"]);
    mesh.cluster.kubectl(&["label", "namespace", "mesh", "culvert.dev/dataplane-mode-"]);
    for (node, pod) in [(1, "client"), (2, "web")] {
        mesh.await_phase(node, pod, "excluded");
    }
    assert!(mesh.wire("client", 0).contains(SECRET), "without the label all is as before");
    mesh.cluster.kubectl(&["label", "namespace", "mesh", "culvert.dev/dataplane-mode=ambient"]);
    mesh.await_phase(2, "web", "enrolled");

    mesh.helm(&["uninstall", "culvert", "--wait"]);
    eventually("the chart's pods to be gone", || {
        let pods =
            mesh.cluster.try_kubectl(&["get", "pods", "-n", "culvert-system", "-o", "name"])?;
        if pods.is_empty() { Ok(()) } else { Err(pods) }
    });
    for (node, before) in [1, 2].into_iter().zip(&before) {
        let after = mesh.traces(node);
        let only = |one: &str, other: &str| -> Vec<String> {
            one.lines()
                .filter(|line| !other.lines().any(|it| it == *line))
                .map(str::to_owned)
                .collect()
        };
        let (new, gone) = (only(&after, before), only(before, &after));
        assert!(&after == before, "node {node} is not as it was: new {new:#?}, gone {gone:#?}");
    }
    assert!(mesh.wire("client", 0).contains(SECRET), "pods that were captured go on without");
}

/// A policy of Istio's API decides, and the refusal names it.
fn policy(mesh: &Mesh) {
    mesh.cluster.kubectl(&["apply", "-f", "tests/cluster/only-client.yaml"]);
    for condition in ["culvert.dev/Accepted", "culvert.dev/Enforced"] {
        let condition = format!("--for=condition={condition}");
        let policy = ["wait", "-n", "mesh", "authorizationpolicy/only-client", "--timeout=30s"];
        mesh.cluster.kubectl(&[&policy[..], &[&condition]].concat());
    }
    a_policy_that_cannot_be_read(mesh);
    eventually("the intruder to be refused", || match mesh.curl("intruder") {
        Ok(answer) => Err(answer),
        Err(_refused) => Ok(()),
    });
    assert!(
        mesh.curl("client").expect("client is answered").contains(SECRET),
        "the client is let in"
    );
    eventually("the refusal in an agent's log, with its policy", || {
        let agents = "app.kubernetes.io/component=agent";
        let logs = ["logs", "-n", "culvert-system", "-l", agents, "--tail=-1"];
        let logs = mesh.cluster.try_kubectl(&logs)?;
        let named = "not allowed by AuthorizationPolicy mesh/only-client";
        if logs.contains(named) { Ok(()) } else { Err(logs) }
    });
}

/// Its status and an Event say so; nobody it could be about is let in or out by it, for it selects nothing that is there.
fn a_policy_that_cannot_be_read(mesh: &Mesh) {
    mesh.cluster.kubectl(&["apply", "-f", "tests/cluster/broken-policy.yaml"]);
    eventually("the broken policy's status", || {
        let status = "jsonpath={.status.conditions[?(@.type=='culvert.dev/Accepted')]}";
        let get = ["get", "authorizationpolicy", "broken", "-n", "mesh", "-o", status];
        let condition = mesh.cluster.try_kubectl(&get)?;
        let told = condition.contains("Invalid") && condition.contains("spec.action");
        if told { Ok(()) } else { Err(condition) }
    });
    eventually("an Event at the broken policy", || {
        let about = "involvedObject.name=broken,reason=Invalid";
        let get = ["get", "events", "-n", "mesh", "--field-selector", about, "-o", "name"];
        let events = mesh.cluster.try_kubectl(&get)?;
        if events.is_empty() { Err("none".to_owned()) } else { Ok(()) }
    });
    mesh.cluster.kubectl(&["delete", "-f", "tests/cluster/broken-policy.yaml"]);
}

/// Another tool writes its configuration anew: the plugin is back behind it.
fn a_rewritten_network(mesh: &Mesh) {
    let list = "/etc/cni/net.d/10-cluster.conflist";
    let on_node = |script: &str| {
        mesh.cluster.try_exec(&["--node", "1", "sh", "-c", &script.replace("LIST", list)])
    };
    assert!(on_node("cat LIST").expect("the list can be read").contains("culvert-cni"));
    on_node("cat /var/lib/culvert/cni/10-cluster.conflist > LIST.new && mv LIST.new LIST")
        .expect("the list can be written");
    eventually("the plugin to be back", || {
        let text = on_node("cat LIST")?;
        if text.contains("culvert-cni") { Ok(()) } else { Err(text) }
    });
}

/// An upgrade to the secure profile: the controller is replaced and keeps its authority; unknown destinations are closed.
fn the_secure_profile(mesh: &Mesh) {
    let root = || {
        let map = ["get", "configmap", "culvert-root", "-n", "culvert-system"];
        mesh.cluster.kubectl(&[&map[..], &["-o", "jsonpath={.data}"]].concat())
    };
    // The API server, at an address of which the cluster does not tell.
    let outside = || {
        let curl = ["curl", "-skm", "5", "https://[fd00:10::1]:6443/version"];
        let exec = ["exec", "-n", "mesh", "client", "--"];
        mesh.cluster.try_kubectl(&[&exec[..], &curl].concat())
    };
    let before = root();
    assert!(before.contains("BEGIN CERTIFICATE"), "{before}");
    outside().expect("an unknown destination is reached");
    mesh.helm(&["upgrade", "culvert", "charts/culvert", "--wait", "--set", "profile=secure"]);
    eventually("unknown destinations to be closed", || match outside() {
        Ok(answer) => Err(answer),
        Err(_refused) => Ok(()),
    });
    eventually("the client to reach the server", || mesh.curl("client").map(drop));
    assert_eq!(root(), before, "the authority is the same");
}

/// A pod that is made meanwhile does not start; it does once the agent is back, and is captured then.
fn an_agent_that_is_away(mesh: &Mesh) {
    let select = |value: &str| {
        let patch = format!(
            r#"{{"spec":{{"template":{{"spec":{{"nodeSelector":{{"away":{value}}}}}}}}}}}"#
        );
        let patch = ["patch", "daemonset", "culvert-agent", "-n", "culvert-system", "-p", &patch];
        mesh.cluster.kubectl(&patch);
    };
    select("\"yes\"");
    let agents = "app.kubernetes.io/component=agent";
    let agents = ["get", "pods", "-n", "culvert-system", "-l", agents, "-o", "name"];
    eventually("the agents to be gone", || {
        let pods = mesh.cluster.try_kubectl(&agents)?;
        if pods.is_empty() { Ok(()) } else { Err(pods) }
    });
    mesh.cluster.kubectl(&["apply", "-f", "tests/cluster/late.yaml"]);
    eventually("the new pod to be refused", || {
        let events = ["get", "events", "-n", "mesh", "-o", "jsonpath={.items[*].message}"];
        let events = mesh.cluster.try_kubectl(&events)?;
        if events.contains("the culvert agent of this node") { Ok(()) } else { Err(events) }
    });
    let phase = ["get", "pod", "late", "-n", "mesh", "-o", "jsonpath={.status.phase}"];
    assert_eq!(mesh.cluster.kubectl(&phase), "Pending");
    assert!(mesh.curl("client").is_err(), "a captured pod is refused, not let out in the clear");
    select("null");
    mesh.await_phase(1, "late", "enrolled");
    eventually("the late pod to reach the server", || mesh.curl("late").map(drop));
}

impl Mesh {
    pub(crate) fn up(name: &str) -> Self {
        let cluster = Cluster::up(name, &["--nodes", "2", "--dual-stack"]);
        let scratch = tempfile::tempdir().expect("a temporary folder");
        let archive = scratch.path().join("images.tar").display().to_string();
        let mut image = Command::new(XTASK);
        image.args(["image", "--no-build", "--output", &archive]);
        assert!(image.status().expect("xtask starts").success(), "images are made");
        cluster.xtask(&["load"], &[&archive]);
        Self { cluster, scratch }
    }

    pub(crate) fn helm(&self, arguments: &[&str]) {
        let mut command = vec!["helm", "-n", "culvert-system"];
        command.extend(arguments);
        if matches!(arguments.first(), Some(&("install" | "upgrade"))) {
            command.extend(["--timeout", "90s", "--set", "image.pullPolicy=Never"]);
        }
        if let Err(complaint) = self.cluster.try_exec(&command) {
            let pods = self.cluster.try_kubectl(&["describe", "pods", "-n", "culvert-system"]);
            let logs = self.cluster.try_kubectl(&[
                "logs",
                "-n",
                "culvert-system",
                "-l",
                "app.kubernetes.io/name=culvert",
                "--tail=30",
            ]);
            panic!("{complaint}\n{pods:?}\n{logs:?}");
        }
    }

    pub(crate) fn curl(&self, pod: &str) -> Result<String, String> {
        let curl = ["exec", "-n", "mesh", pod, "--", "curl", "-sSfm", "5", "http://web/"];
        self.cluster.try_kubectl(&curl)
    }

    /// Writes what is on the wire between the nodes into a file, while the value lives.
    pub(crate) fn sniff(&self) -> (PathBuf, Running) {
        let file = self.scratch.path().join("wire.pcap");
        if file.exists() {
            fs::remove_file(&file).expect("our own file");
        }
        let path = file.display().to_string();
        let sniffer =
            self.cluster.spawn(&["tcpdump", "-i", "br0", "-U", "-s0", "-Z", "root", "-w", &path]);
        eventually("the sniffer to listen", || {
            let there = fs::metadata(&file).is_ok_and(|found| found.len() > 0);
            if there { Ok(()) } else { Err("no file".to_owned()) }
        });
        (file, sniffer)
    }

    /// What is on the wire between the nodes while a pod asks the server; on port 15008 alone when `tunnels`.
    fn wire(&self, pod: &str, tunnels: usize) -> String {
        let (file, sniffer) = self.sniff();
        let path = file.display().to_string();
        let held = |filter: &str| {
            let listed = self.cluster.try_exec(&["tcpdump", "-nr", &path, filter])?;
            Ok::<_, String>(listed.lines().count())
        };
        let wanted = if tunnels > 0 { "tcp port 15008" } else { "tcp port 8080" };
        eventually("packets of the request", || {
            assert!(self.curl(pod)?.contains(SECRET));
            if held(wanted)? > 0 { Ok(()) } else { Err("none".to_owned()) }
        });
        drop(sniffer);
        String::from_utf8_lossy(&fs::read(&file).expect("the sniffer's file")).into_owned()
    }

    /// Waits until the agent of `node` says that a pod is in this phase.
    pub(crate) fn await_phase(&self, node: u8, pod: &str, phase: &str) {
        let url = "http://localhost/pods";
        let node = node.to_string();
        let socket = "/run/culvert/admin.sock";
        eventually(&format!("{pod} to be {phase}"), || {
            let asked = ["--node", &node, "curl", "-sS", "--unix-socket", socket, url];
            let pods = self.cluster.try_exec(&asked)?;
            let list: serde_json::Value =
                serde_json::from_str(&pods).map_err(|error| format!("{error}: {pods}"))?;
            let list =
                list.as_array().or_else(|| list["pods"].as_array()).ok_or_else(|| pods.clone())?;
            let found = list.iter().any(|one| {
                let text = one.to_string();
                text.contains(&format!("\"{pod}\"")) && text.contains(&format!("\"{phase}\""))
            });
            if found { Ok(()) } else { Err(pods) }
        });
    }

    /// Whatever the mesh might leave on a node.
    fn traces(&self, node: u8) -> String {
        let script = r#"
            cd /etc/cni/net.d && sha256sum -- * .[!.]* 2>/dev/null; stat -c '%n %a' *
            ls -A /opt/cni/bin
            find /sys/fs/bpf -mindepth 1
            find /run/culvert /var/lib/culvert -mindepth 1 2>/dev/null
            ip -o link | cut -d: -f2 | sed 's/@.*//' | sort
            ip rule; ip -6 rule; ip route; ip -6 route | sort
            for name in /run/netns/*; do
                echo "$name"
                nsenter --net="$name" sh -c '
                    ip rule; ip -6 rule; ip route show table all; ip -6 route show table all | sort
                    cd /proc/sys/net && grep . ipv4/tcp_fwmark_accept ipv4/fwmark_reflect \
                        ipv6/fwmark_reflect ipv4/tcp_tw_reuse ipv4/tcp_migrate_req'
            done; true"#;
        let node = node.to_string();
        self.cluster.try_exec(&["--node", &node, "sh", "-c", script]).expect("a node can be read")
    }
}
