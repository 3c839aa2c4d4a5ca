//! `cargo xtask cluster`: what it starts is a real Kubernetes, and what it ends is gone.
//!
//! One test, because clusters cost time: two clusters side by side, one of them with two nodes and
//! both address families.

#![allow(clippy::print_stdout, reason = "a test shows how long a cluster took")]

mod admission;
mod chart;
mod faults;
mod many;
mod programs;
mod source;
mod support;
mod waypoint;

use std::collections::BTreeMap;
use std::fs;

use support::{Cluster, eventually, traces};

/// One web server per node, and a service over both.
const WEB: &str = "tests/cluster/web.yaml";

/// Sysctls of the whole machine that a kubelet would set; a test must not.
const MACHINE_SYSCTLS: &[&str] = &[
    "vm/overcommit_memory",
    "vm/panic_on_oom",
    "kernel/panic",
    "kernel/panic_on_oops",
    "kernel/keys/root_maxkeys",
];

fn sysctls() -> BTreeMap<&'static str, String> {
    let value = |key: &&'static str| {
        (*key, fs::read_to_string(format!("/proc/sys/{key}")).expect("a sysctl can be read"))
    };
    MACHINE_SYSCTLS.iter().map(value).collect()
}

#[test]
fn clusters_are_real_stand_side_by_side_and_leave_nothing() {
    let before = sysctls();
    let first = Cluster::up("a", &["--nodes", "2", "--dual-stack"]);
    let second = Cluster::up("b", &["--nodes", "1"]);

    first.kubectl(&["apply", "-f", WEB]);
    first.kubectl(&["rollout", "status", "deployment/web", "--timeout=60s"]);
    let nodes = first.kubectl(&["get", "pods", "-l", "app=web", "-o", "jsonpath={..nodeName}"]);
    let mut nodes: Vec<&str> = nodes.split(' ').collect();
    nodes.sort_unstable();
    assert_eq!(nodes, ["node1", "node2"], "one pod on each node");

    services_and_names(&first);
    streams(&first);
    power_cycle(&first);

    assert!(!second.kubectl(&["get", "deployments"]).contains("web"), "clusters see each other");
    assert_eq!(second.kubectl(&["get", "nodes", "-o", "name"]), "node/node1");
    let name = second.name.clone();
    drop(second);
    assert_eq!(traces(&name), Vec::<String>::new());

    assert_eq!(first.kubectl(&["get", "--raw", "/readyz"]), "ok", "the other one goes on");
    let name = first.name.clone();
    drop(first);
    assert_eq!(traces(&name), Vec::<String>::new());
    assert_eq!(sysctls(), before, "the machine's own settings are untouched");
}

/// kube-proxy and CoreDNS: both endpoints answer behind the service's addresses and names.
fn services_and_names(cluster: &Cluster) {
    let addresses =
        cluster.kubectl(&["get", "service", "web", "-o", "jsonpath={.spec.clusterIPs}"]);
    let addresses: Vec<String> = serde_json::from_str(&addresses).expect("a list of addresses");
    assert_eq!(addresses.len(), 2, "{addresses:?}");
    let mut urls: Vec<String> = addresses
        .iter()
        .map(|address| match address.contains(':') {
            true => format!("http://[{address}]/"),
            false => format!("http://{address}/"),
        })
        .collect();
    urls.extend(["http://web/".into(), "http://web.default.svc.cluster.local/".into()]);
    for url in urls {
        let mut seen = BTreeMap::new();
        eventually(&format!("both endpoints behind {url}"), || {
            let answer = cluster.try_kubectl(&["exec", "client", "--", "wget", "-qO-", &url])?;
            *seen.entry(answer.trim().to_owned()).or_insert(0) += 1;
            if seen.len() == 2 { Ok(()) } else { Err(format!("{seen:?}")) }
        });
        assert!(seen.keys().all(|name| name.starts_with("web-")), "{seen:?}");
    }
}

/// What kubectl streams through the API server and a kubelet.
fn streams(cluster: &Cluster) {
    let told = cluster.kubectl(&["exec", "client", "--", "sh", "-c", "echo told; hostname"]);
    assert_eq!(told, "told\nclient");
    eventually("a request in the log", || {
        let logs = cluster.try_kubectl(&["logs", "-l", "app=web", "--tail=-1"])?;
        if logs.contains("response:200") { Ok(()) } else { Err(logs) }
    });
    let pod = cluster.kubectl(&[
        "get",
        "pods",
        "-l",
        "app=web",
        "-o",
        "jsonpath={.items[0].metadata.name}",
    ]);
    let forward = cluster.forward(&pod, "18080:80");
    eventually("the forwarded port", || {
        let answer = cluster.try_exec(&["curl", "-sfm", "5", "http://127.0.0.1:18080/"])?;
        if answer == pod { Ok(()) } else { Err(answer) }
    });
    drop(forward);
}

/// A node that loses its power is noticed, comes back and runs its pods again.
fn power_cycle(cluster: &Cluster) {
    let ready = |wanted: &str| {
        let path = "jsonpath={.status.conditions[?(@.type=='Ready')].status}";
        let status = cluster.try_kubectl(&["get", "node", "node2", "-o", path])?;
        if status == wanted { Ok(()) } else { Err(status) }
    };
    cluster.xtask(&["power-off"], &["2"]);
    eventually("node2 to be missed", || ready("Unknown"));
    assert_eq!(cluster.kubectl(&["get", "--raw", "/readyz"]), "ok");
    cluster.xtask(&["power-on"], &["2"]);
    eventually("node2 to be back", || ready("True"));
    eventually("its pod to be back", || {
        let path = "jsonpath={.status.readyReplicas}";
        let count = cluster.try_kubectl(&["get", "deployment", "web", "-o", path])?;
        if count == "2" { Ok(()) } else { Err(count) }
    });
}
