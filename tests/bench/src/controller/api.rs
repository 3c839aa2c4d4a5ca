//! The API server, asked with curl: thousands of objects in one process.

use std::fmt::Write as _;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use serde_json::{Value, json};

/// Requests at once.
const PARALLEL: &str = "40";
/// Where simulated pods are.
const NAMESPACE: &str = "crowd";
/// The networks of their addresses, before and after a change.
const NETWORK: u8 = 1;
const CHANGED: u8 = 129;

/// An API server and the right to change everything.
pub(super) struct Api {
    server: String,
    token: String,
}

impl Api {
    /// The one of `KUBECONFIG`, as `cargo xtask cluster exec` sets it.
    pub(super) fn of_environment() -> anyhow::Result<Self> {
        let view = ["config", "view", "--raw", "--minify", "-o"];
        let asked = |path: &str| -> anyhow::Result<String> {
            let output = Command::new("kubectl").args(view).arg(path).output()?;
            if !output.status.success() {
                bail!("kubectl: {}", String::from_utf8_lossy(&output.stderr));
            }
            Ok(String::from_utf8_lossy(&output.stdout).into_owned())
        };
        let server = asked("jsonpath={.clusters[0].cluster.server}")?;
        let token = asked("jsonpath={.users[0].user.token}")?;
        if server.is_empty() || token.is_empty() {
            bail!(
                "KUBECONFIG names no server and token: run this with cargo xtask bench controller"
            );
        }
        Ok(Self { server, token })
    }

    /// Makes the namespace, nodes and pods, and gives the pods their addresses.
    pub(super) fn populate(&self, pods: usize, nodes: usize, folder: &Path) -> anyhow::Result<()> {
        std::fs::create_dir_all(folder)?;
        let namespace = json!({
            "apiVersion": "v1", "kind": "Namespace",
            "metadata": {"name": NAMESPACE, "labels": {"culvert.dev/dataplane-mode": "ambient"}},
        });
        let account = json!({
            "apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "runner"},
        });
        let within = format!("/api/v1/namespaces/{NAMESPACE}");
        self.all(folder, [("POST", "/api/v1/namespaces".to_owned(), namespace)])?;
        let node = |number| {
            let object = json!({
                "apiVersion": "v1", "kind": "Node", "metadata": {"name": node_name(number)},
            });
            ("POST", "/api/v1/nodes".to_owned(), object)
        };
        let account = ("POST", format!("{within}/serviceaccounts"), account);
        self.all(folder, std::iter::once(account).chain((0..nodes).map(node)))?;
        let pod = |number| ("POST", format!("{within}/pods"), pod(number, nodes));
        self.all(folder, (0..pods).map(pod))?;
        let status = |number| {
            let path = format!("{within}/pods/{}/status", pod_name(number));
            ("PATCH", path, status(&address(NETWORK, number)))
        };
        self.all(folder, (0..pods).map(status))
    }

    /// Gives a pod another address: its name, and when the API server answered.
    pub(super) fn change(&self, change: usize, pods: usize) -> anyhow::Result<(String, Instant)> {
        // Spread over the nodes; a second round over the same pod goes back.
        let number = change * 7919 % pods;
        let network = if (change / pods).is_multiple_of(2) { CHANGED } else { NETWORK };
        let path = format!("/api/v1/namespaces/{NAMESPACE}/pods/{}/status", pod_name(number));
        let url = format!("{}{path}", self.server);
        let authorization = format!("Authorization: Bearer {}", self.token);
        let body = status(&address(network, number)).to_string();
        let kind = "Content-Type: application/merge-patch+json";
        let arguments = ["-k", "-X", "PATCH", "-H", &authorization, "-H", kind, "-d", &body, &url];
        let began = Instant::now();
        let (status, seconds) = curl(&arguments)?;
        if status != 200 {
            bail!("the API server answers {status} to a change");
        }
        // curl's own start and end are not the API server's.
        let answered = began + seconds.min(began.elapsed());
        Ok((format!("/{NAMESPACE}/{}", pod_name(number)), answered))
    }

    fn all(
        &self,
        folder: &Path,
        requests: impl IntoIterator<Item = (&'static str, String, Value)>,
    ) -> anyhow::Result<()> {
        let mut text = String::new();
        for (method, path, body) in requests {
            let kind =
                if method == "POST" { "application/json" } else { "application/merge-patch+json" };
            let body = body.to_string().replace('\\', "\\\\").replace('"', "\\\"");
            if !text.is_empty() {
                text.push_str("next\n");
            }
            write!(
                text,
                "url = \"{}{path}\"\nrequest = \"{method}\"\nheader = \"Authorization: Bearer {}\"\n\
                 header = \"Content-Type: {kind}\"\ndata = \"{body}\"\noutput = \"/dev/null\"\n\
                 insecure\nsilent\nfail\n",
                self.server, self.token
            )?;
        }
        let file = folder.join("requests");
        std::fs::write(&file, text)?;
        let curl = Command::new("curl")
            .args(["--no-progress-meter", "--parallel", "--parallel-max", PARALLEL, "-K"])
            .arg(&file)
            .status()
            .context("cannot start curl")?;
        if !curl.success() {
            bail!("the API server refuses something ({curl})");
        }
        Ok(())
    }
}

/// The status and, from curl's start until the answer was there, the time of one request.
pub(super) fn curl(arguments: &[&str]) -> anyhow::Result<(u16, Duration)> {
    let format = ["-s", "-o", "/dev/null", "-m", "20", "-w", "%{http_code} %{time_total}"];
    let output = Command::new("curl").args(format).args(arguments).output()?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let (status, seconds) = text.split_once(' ').context("curl says nothing")?;
    Ok((status.parse()?, Duration::from_secs_f64(seconds.parse()?)))
}

/// The name of a simulated node.
pub(super) fn node_name(number: usize) -> String {
    format!("sim{number}")
}

fn pod_name(number: usize) -> String {
    format!("pod-{number}")
}

/// Unique for 32,640 pods in each of the two networks.
fn address(network: u8, number: usize) -> String {
    format!(
        "10.{}.{}.{}",
        usize::from(network) + number / 16_320,
        number / 255 % 64,
        number % 255 + 1
    )
}

fn pod(number: usize, nodes: usize) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": pod_name(number), "labels": {"app": format!("app-{}", number % 500)}},
        "spec": {
            "nodeName": node_name(number % nodes),
            "serviceAccountName": "runner",
            "automountServiceAccountToken": false,
            "tolerations": [{"operator": "Exists"}],
            "containers": [{"name": "none", "image": "culvert.test/none:1"}],
        },
    })
}

fn status(address: &str) -> Value {
    json!({"status": {
        "phase": "Running",
        "podIP": address,
        "podIPs": [{"ip": address}],
        "conditions": [{"type": "Ready", "status": "True"}],
    }})
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn no_two_pods_share_an_address() {
        let of = |network| (0..20_000).map(move |number| address(network, number));
        assert_eq!(of(NETWORK).chain(of(CHANGED)).collect::<BTreeSet<_>>().len(), 40_000);
    }
}
