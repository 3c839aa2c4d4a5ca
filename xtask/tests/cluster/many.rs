//! A thousand pods through a real API server: what the controller holds is what somebody else who asks is told.

use std::collections::BTreeSet;
use std::fs;
use std::time::Instant;

use serde_json::{Value, json};

use crate::source::Controller;
use crate::support::eventually;

const PODS: usize = 1_000;
/// Machines that exist as objects only: their pods are bound and never start.
const NODES: usize = 10;

/// A pod as both sides name it: namespace, name, node and account.
type Named = (String, String, String, String);

/// Pods come in two namespaces, one of them of the mesh, and go: first every third, then all.
pub(crate) fn pods_come_and_go(controller: &Controller<'_>) {
    let scratch = tempfile::tempdir().expect("a temporary folder");
    let apply = |name: &str, items: Vec<Value>| {
        let path = scratch.path().join(name).display().to_string();
        let list = json!({"apiVersion": "v1", "kind": "List", "items": items});
        fs::write(&path, list.to_string()).expect("our own file");
        controller.cluster.kubectl(&["create", "-f", &path]);
    };
    let mut first: Vec<Value> = (0..NODES).map(|number| node(&format!("sim{number}"))).collect();
    let label = json!({"culvert.dev/dataplane-mode": "ambient"});
    for (name, labels) in [("crowd", label), ("bystanders", json!({}))] {
        let meta = json!({"name": name, "labels": labels});
        first.push(json!({"apiVersion": "v1", "kind": "Namespace", "metadata": meta}));
        let meta = json!({"name": "runner", "namespace": name});
        first.push(json!({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": meta}));
    }
    apply("first.json", first);
    let began = Instant::now();
    apply("pods.json", (0..PODS).map(pod).collect());
    println!("{PODS} pods made in {:.1} s", began.elapsed().as_secs_f64());
    same(controller, PODS);
    let delete = |selector: &str| {
        let pods =
            ["delete", "pods", "-l", selector, "--force", "--grace-period=0", "--wait=false"];
        for namespace in ["crowd", "bystanders"] {
            controller.cluster.kubectl(&[&pods[..], &["-n", namespace]].concat());
        }
    };
    delete("third=0");
    same(controller, PODS - PODS.div_ceil(3));
    delete("crowd=yes");
    same(controller, 0);
    let dump = controller.page("/config_dump").expect("the controller answers");
    assert!(!dump.contains("\"crowd\""), "something is left of the pods");
}

fn node(name: &str) -> Value {
    json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": name}})
}

fn pod(number: usize) -> Value {
    let namespace = if number.is_multiple_of(2) { "crowd" } else { "bystanders" };
    json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": format!("pod-{number}"),
            "namespace": namespace,
            "labels": {"crowd": "yes", "third": (number % 3).to_string()},
        },
        "spec": {
            "nodeName": format!("sim{}", number % NODES),
            "serviceAccountName": "runner",
            "tolerations": [{"operator": "Exists"}],
            "containers": [{"name": "none", "image": "culvert.test/shell:1"}],
        },
    })
}

/// Both sides name the same `count` pods.
fn same(controller: &Controller<'_>, count: usize) {
    let changed = Instant::now();
    eventually(&format!("{count} pods in the index"), || {
        let listed = ["get", "pods", "-A", "-l", "crowd=yes", "-o", "json"];
        let listed = controller.cluster.try_kubectl(&listed)?;
        let listed: Value = serde_json::from_str(&listed).map_err(|error| error.to_string())?;
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let wanted: BTreeSet<Named> = items(&listed["items"])
            .map(|pod| {
                let (meta, spec) = (&pod["metadata"], &pod["spec"]);
                let (node, account) = (&spec["nodeName"], &spec["serviceAccountName"]);
                (text(&meta["namespace"]), text(&meta["name"]), text(node), text(account))
            })
            .collect();
        let dump = controller.json("/config_dump")?;
        let known: BTreeSet<Named> = items(&dump["pods"])
            .filter(|pod| ["crowd", "bystanders"].contains(&text(&pod["namespace"]).as_str()))
            .map(|pod| {
                let (node, account) = (&pod["node"], &pod["serviceAccount"]);
                (text(&pod["namespace"]), text(&pod["name"]), text(node), text(account))
            })
            .collect();
        let differ = known.symmetric_difference(&wanted).count();
        if differ > 0 || known.len() != count {
            return Err(format!("{} known, {} listed, {differ} differ", known.len(), wanted.len()));
        }
        let ambient = items(&dump["pods"]).filter(|pod| {
            pod["namespace"] == "bystanders" && pod["mode"] == "ambient"
                || pod["namespace"] == "crowd" && pod["mode"] != "ambient"
        });
        match ambient.count() {
            0 => Ok(()),
            wrong => Err(format!("{wrong} in the wrong mode")),
        }
    });
    println!("{count} pods are the same {:.1} s later", changed.elapsed().as_secs_f64());
}

fn items(list: &Value) -> impl Iterator<Item = &Value> {
    list.as_array().into_iter().flatten()
}
