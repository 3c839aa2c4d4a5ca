//! Links, addresses and routes, said in iproute2's words.

use std::fs;
use std::net::IpAddr;
use std::path::Path;

use anyhow::Context as _;

use super::addresses::{Plan, with_prefix};
use crate::command::{command, quietly};

/// The bridge between the nodes, in the control plane's namespace.
pub(super) const BRIDGE: &str = "br0";

/// Runs `ip` with the words of `line`.
pub(super) fn ip(line: &str) -> anyhow::Result<()> {
    let words: Vec<&str> = line.split_whitespace().collect();
    quietly(command("ip", &words).current_dir("/"))
}

/// Sets a sysctl of this network namespace.
pub(super) fn sysctl(key: &str, value: &str) -> anyhow::Result<()> {
    let path = Path::new("/proc/sys").join(key);
    fs::write(&path, value).with_context(|| format!("cannot write {}", path.display()))
}

/// Brings up the bridge that all nodes hang on.
pub(super) fn bridge(plan: Plan) -> anyhow::Result<()> {
    ip("link set lo up")?;
    // A bridge without an address of its own takes that of a port, and changes it when that node
    // goes: all others would lose the API server until their neighbour entries expire.
    ip(&format!("link add {BRIDGE} address 02:00:0a:00:00:01 type bridge"))?;
    for address in plan.gateways() {
        add_address(BRIDGE, address)?;
    }
    ip(&format!("link set {BRIDGE} up"))?;
    forward(plan)?;
    for family in ["iptables", "ip6tables"] {
        let key = format!("net/bridge/bridge-nf-call-{family}");
        if Path::new("/proc/sys").join(&key).exists() {
            sysctl(&key, "0")?;
        }
    }
    Ok(())
}

/// Makes this namespace a router.
pub(super) fn forward(plan: Plan) -> anyhow::Result<()> {
    sysctl("net/ipv4/ip_forward", "1")?;
    if plan.dual() {
        sysctl("net/ipv6/conf/all/forwarding", "1")?;
    }
    Ok(())
}

/// Gives a link an address that can be used at once.
pub(super) fn add_address(link: &str, address: IpAddr) -> anyhow::Result<()> {
    let nodad = if address.is_ipv6() { "nodad" } else { "" };
    ip(&format!("address add {} dev {link} {nodad}", with_prefix(address)))
}

/// Routes to the pods of all nodes but `resident`.
pub(super) fn pod_routes(plan: Plan, nodes: u8, resident: u8) -> anyhow::Result<()> {
    for (range, hop) in plan.pod_routes(nodes, resident) {
        ip(&format!("route add {range} via {hop}"))?;
    }
    Ok(())
}
