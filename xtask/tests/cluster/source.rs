//! The controller's Kubernetes source, against a real API server.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use serde_json::Value;

use crate::many;
use crate::support::{Cluster, Running, eventually};

/// A controller beside the control plane.
pub(crate) struct Controller<'c> {
    pub(crate) cluster: &'c Cluster,
    running: Running,
    _state: tempfile::TempDir,
}

/// Where the programs under test are.
fn programs() -> PathBuf {
    if let Some(folder) = std::env::var_os("CULVERT_BIN_DIR") {
        return folder.into();
    }
    let xtask = PathBuf::from(env!("CARGO_BIN_EXE_xtask"));
    xtask.parent().expect("a program lies in a folder").to_owned()
}

impl<'c> Controller<'c> {
    fn start(cluster: &'c Cluster) -> Self {
        let program = programs().join("culvert-controller");
        assert!(
            program.exists(),
            "no {}: cargo build --bins -p mesh-controller",
            program.display()
        );
        let state = tempfile::tempdir().expect("a temporary folder");
        let folder = state.path().join("state").display().to_string();
        let authority = state.path().join("authority").display().to_string();
        an_authority_that_ends(&authority);
        let mut arguments = vec!["run", "--source", "kubernetes", "--state-dir", &folder];
        arguments.extend(["--ca-dir", &authority, "--ca-dir-secret", "default/authority"]);
        arguments.extend(["--lease", "default/controller"]);
        let program = program.display().to_string();
        let mut command = vec![program.as_str()];
        command.extend(arguments);
        let running = cluster.spawn(&command);
        Self { cluster, running, _state: state }
    }

    pub(crate) fn page(&self, path: &str) -> Result<String, String> {
        let url = format!("http://127.0.0.1:15014{path}");
        self.cluster.try_exec(&["curl", "-sfm", "5", &url])
    }

    pub(crate) fn json(&self, path: &str) -> Result<Value, String> {
        serde_json::from_str(&self.page(path)?).map_err(|error| error.to_string())
    }

    /// The host names of all services.
    fn services(&self) -> Result<Vec<String>, String> {
        let dump = self.json("/config_dump")?;
        let all = dump["services"].as_array().ok_or("no services")?;
        let name = |one: &Value| one["key"]["hostname"].as_str().unwrap_or_default().to_owned();
        Ok(all.iter().map(name).collect())
    }
}

/// An authority as somebody else would mount it, with twenty days to live.
fn an_authority_that_ends(folder: &str) {
    let script = format!(
        "set -e; mkdir {folder}; cd {folder}; \
         openssl ecparam -name prime256v1 -genkey -noout | openssl pkcs8 -topk8 -nocrypt -out tls.key; \
         openssl req -x509 -new -key tls.key -subj /CN=theirs -days 20 -out tls.crt \
             -addext keyUsage=critical,keyCertSign,cRLSign; cp tls.crt ca.crt"
    );
    let made = Command::new("sh").args(["-c", &script]).output().expect("a shell");
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
}

/// Its end is told where whoever renews it will look.
fn the_end_of_a_mounted_authority(controller: &Controller<'_>) {
    eventually("an Event at the Secret of the authority", || {
        let about = "involvedObject.kind=Secret,involvedObject.name=authority,reason=AuthorityEnds";
        let get = ["get", "events", "-n", "default", "--field-selector", about, "-o"];
        let events =
            controller.cluster.try_kubectl(&[&get[..], &["jsonpath={..message}"]].concat())?;
        let told = events.contains("renew what is mounted");
        if told { Ok(()) } else { Err(events) }
    });
}

fn same<T: PartialEq + std::fmt::Debug>(found: T, wanted: &T) -> Result<(), String> {
    if found == *wanted { Ok(()) } else { Err(format!("{found:?}, not {wanted:?}")) }
}

#[test]
fn the_controller_follows_a_cluster() {
    let cluster = Cluster::up("c", &["--nodes", "1"]);
    cluster.kubectl(&["apply", "-f", "tests/cluster/shop.yaml"]);
    let controller = Controller::start(&cluster);
    eventually("the controller to have read a cluster without Istio's kinds", || {
        controller.page("/ready").map(drop)
    });
    pods_and_services(&controller);
    the_end_of_a_mounted_authority(&controller);
    many::pods_come_and_go(&controller);
    kinds_installed_later(&controller);
    refused_objects(&controller);
    a_gap_in_the_watch(&controller);
    a_kind_that_is_removed(&controller);
}

fn pods_and_services(controller: &Controller<'_>) {
    let pods = ["get", "pods", "-n", "shop", "-o", "jsonpath={.items[*].metadata.name}"];
    eventually("both pods in the index, with their addresses", || {
        let listed = controller.cluster.try_kubectl(&pods)?;
        let mut listed: Vec<String> = listed.split(' ').map(str::to_owned).collect();
        listed.sort();
        if listed.len() != 2 {
            return Err(format!("{listed:?}"));
        }
        let dump = controller.json("/config_dump")?;
        let mut known: Vec<String> = dump["workloads"]
            .as_array()
            .into_iter()
            .flatten()
            .filter(|workload| workload["namespace"] == "shop")
            .filter(|workload| workload.to_string().contains("10.244.1."))
            .map(|workload| workload["name"].as_str().unwrap_or_default().to_owned())
            .collect();
        known.sort();
        same(known, &listed)
    });
    eventually("services, those of the system included", || {
        let names = controller.services()?;
        for wanted in ["web.shop.svc.cluster.local", "kube-dns.kube-system.svc.cluster.local"] {
            if !names.iter().any(|name| name == wanted) {
                return Err(format!("{names:?}"));
            }
        }
        Ok(())
    });
}

/// Definitions that come while the controller runs are found, in whatever version they serve.
fn kinds_installed_later(controller: &Controller<'_>) {
    let cluster = controller.cluster;
    cluster.kubectl(&["apply", "-f", "tests/cluster/istio-crds.yaml"]);
    cluster.kubectl(&["wait", "--for=condition=Established", "--all", "crd", "--timeout=60s"]);
    eventually("the objects of new kinds to be accepted", || {
        cluster.try_kubectl(&["apply", "-f", "tests/cluster/shop-policies.yaml"]).map(drop)
    });
    eventually("the policy in the index", || {
        let status = controller.json("/status")?;
        if status["policies"]["AuthorizationPolicy shop/web"].is_null() {
            Err(status.to_string())
        } else {
            Ok(())
        }
    });
    eventually("the ServiceEntry, in an older version, and the WorkloadEntry", || {
        let dump = controller.json("/config_dump")?.to_string();
        for wanted in ["outside.example", "192.0.2.8", "192.0.2.9"] {
            if !dump.contains(wanted) {
                return Err(format!("no {wanted}"));
            }
        }
        Ok(())
    });
}

/// What cannot be read is named, with the field, and leaves everything else alone.
fn refused_objects(controller: &Controller<'_>) {
    let path = std::env::temp_dir().join(format!("{}-refused.yaml", controller.cluster.name));
    let policy = "apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: odd, namespace: shop}
spec: {rules: [{from: [{source: {planets: [mars]}}]}]}
";
    fs::write(&path, policy).expect("a temporary file");
    let file = path.display().to_string();
    controller.cluster.kubectl(&["apply", "-f", &file]);
    eventually("the refusal in the status", || {
        let status = controller.json("/status")?;
        let refused = &status["source"]["refused"][0];
        same(refused["field"].as_str(), &Some("spec.rules[0].from[0].source.planets"))?;
        same(refused["object"].as_str(), &Some("AuthorizationPolicy shop/odd"))
    });
    controller.cluster.kubectl(&["delete", "-f", &file]);
    eventually("the refusal to go", || {
        let status = controller.json("/status")?;
        same(status["source"]["refused"].as_array().map(Vec::len), &Some(0))
    });
    fs::remove_file(path).expect("our own file");
}

/// The API server is killed while the controller stands still: what was deleted meanwhile is gone, all
/// else stays, and later changes are seen.
fn a_gap_in_the_watch(controller: &Controller<'_>) {
    let cluster = controller.cluster;
    let known = |name: &str| {
        let names = controller.services()?;
        Ok::<_, String>(names.iter().any(|known| known.starts_with(name)))
    };
    eventually("the service", || same(known("brief.shop.")?, &true));
    controller.running.signal("STOP");
    cluster.kubectl(&["delete", "service", "brief", "-n", "shop"]);
    cluster.restart("kube-apiserver");
    eventually("the API server to be back", || {
        cluster.try_kubectl(&["get", "--raw", "/readyz"]).map(drop)
    });
    controller.running.signal("CONT");
    eventually("the service to be gone", || same(known("brief.shop.")?, &false));
    assert_eq!(known("web.shop."), Ok(true), "nothing else is gone");
    cluster.kubectl(&["create", "service", "clusterip", "late", "-n", "shop", "--tcp=82"]);
    eventually("a change after the gap", || same(known("late.shop.")?, &true));
}

fn a_kind_that_is_removed(controller: &Controller<'_>) {
    let name = "authorizationpolicies.security.istio.io";
    controller.cluster.kubectl(&["delete", "crd", name, "--timeout=60s"]);
    eventually("its policies to be gone", || {
        let status = controller.json("/status")?;
        if status["policies"]["AuthorizationPolicy shop/web"].is_null() {
            Ok(())
        } else {
            Err(status.to_string())
        }
    });
    assert!(controller.page("/ready").is_ok(), "still in service");
}
