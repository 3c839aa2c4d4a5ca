//! A ztunnel binary as one more way across the nodes, when the environment variable `ZTUNNEL` names one.
//!
//! One process in dedicated mode in each of two pods of their own, without a control plane. How it is started, what it needs
//! and what was tried is in `docs/performance.md`.

use std::path::PathBuf;

use anyhow::{Context as _, bail};
use mesh_netns::Pod;
use serde_json::json;

/// Where captured connections go, and where the tunnel comes in. Source: wire facts of ztunnel; they are fixed.
const OUTBOUND: u16 = 15001;
const HBONE: u16 = 15008;
/// The mark of ztunnel's own sockets: `PACKET_MARK`.
const MARK: u32 = 1337;

/// The binary that `ZTUNNEL` names, if it does; one that cannot be run is an error.
pub(crate) fn binary() -> anyhow::Result<Option<PathBuf>> {
    let Some(path) = std::env::var_os("ZTUNNEL") else { return Ok(None) };
    let path = std::fs::canonicalize(&path)
        .with_context(|| format!("ZTUNNEL names {}", path.display()))?;
    let said = std::process::Command::new(&path)
        .arg("version")
        .output()
        .with_context(|| format!("ZTUNNEL names {}, which cannot be run", path.display()))?;
    if !said.status.success() {
        let words = String::from_utf8_lossy(&said.stderr);
        bail!("ZTUNNEL: `{} version` ended with {}: {words}", path.display(), said.status);
    }
    eprintln!("ztunnel: {}", String::from_utf8_lossy(&said.stdout).trim());
    Ok(Some(path))
}

/// The two workloads, as ztunnel reads them from a file.
pub(crate) fn workloads(pods: [&Pod; 2]) -> serde_json::Value {
    let workload = |pod: &Pod| {
        json!({
            "uid": pod.uid,
            "name": pod.spec.name,
            "namespace": "plain",
            "serviceAccount": "default",
            "workloadIps": [pod.ipv4],
            "protocol": "HBONE",
            "services": {},
        })
    };
    // JSON is YAML.
    json!({ "workloads": pods.map(workload), "services": [], "policies": [] })
}

/// Its environment in `pod`.
pub(crate) fn environment(pod: &Pod, workloads: &str) -> Vec<(&'static str, String)> {
    [
        ("PROXY_MODE", "dedicated".to_owned()),
        ("PROXY_WORKLOAD_INFO", format!("plain/{}/default", pod.spec.name)),
        ("FAKE_CA", "true".to_owned()),
        ("XDS_ADDRESS", String::new()),
        ("CA_ADDRESS", String::new()),
        ("LOCAL_XDS_PATH", workloads.to_owned()),
        ("PACKET_MARK", MARK.to_string()),
        ("ENABLE_ORIG_SRC", "false".to_owned()),
        ("RUST_LOG", "warn".to_owned()),
    ]
    .into()
}

/// Sends the pod's connections to `target` into ztunnel, but not ztunnel's own.
pub(crate) fn redirect(pod: &Pod, target: std::net::SocketAddr) -> anyhow::Result<()> {
    let (ip, port) = (target.ip(), target.port());
    pod.shell(&format!(
        "iptables -t nat -A OUTPUT -p tcp -d {ip} --dport {port} -m mark ! --mark {MARK} \
         -j REDIRECT --to-ports {OUTBOUND}"
    ))?
    .output()
    .context("redirecting to ztunnel; is iptables installed?")
    .map(drop)
}

/// True once the process's namespace listens on both ports.
pub(crate) fn listens(pid: u32) -> bool {
    let sockets: String = ["tcp", "tcp6"]
        .iter()
        .filter_map(|file| std::fs::read_to_string(format!("/proc/{pid}/net/{file}")).ok())
        .collect();
    [OUTBOUND, HBONE].iter().all(|port| is_listening(&sockets, *port))
}

/// Whether a table of `/proc/net/tcp` has a listener on `port`.
fn is_listening(table: &str, port: u16) -> bool {
    let suffix = format!(":{port:04X}");
    table.lines().any(|line| {
        let mut words = line.split_whitespace();
        words.nth(1).is_some_and(|local| local.ends_with(&suffix)) && words.nth(1) == Some("0A")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn listeners_are_told_from_connections() {
        let table = "  sl  local_address rem_address   st\n   0: 00000000:3A99 00000000:0000 0A 0 0\n   \
                     1: 0100007F:3AA0 0100007F:9999 01 0 0\n";
        assert!(is_listening(table, OUTBOUND));
        assert!(!is_listening(table, HBONE));
    }
}
