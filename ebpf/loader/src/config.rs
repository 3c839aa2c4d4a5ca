//! What the caller says: where capture lives on this machine, and what is captured of a pod.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::path::PathBuf;

use ipnet::IpNet;

/// Where capture lives on this machine.
///
/// Two agents on one machine work side by side when their `bpffs` directories differ: a network
/// namespace is captured by whoever enrolled it.
#[derive(Clone, Debug)]
pub struct CaptureConfig {
    /// Directory for the pins, on a bpffs mount (for instance `/sys/fs/bpf/culvert`). Made when
    /// missing, one level of subdirectory per map layout.
    pub bpffs: PathBuf,
    /// Root of the cgroup2 hierarchy; `None` looks at the usual mount points. It has to be the
    /// root of the machine (inode 1), not of a cgroup namespace.
    pub cgroup_root: Option<PathBuf>,
    /// How the guard is attached to a pod's host-side interface.
    pub guard: GuardPreference,
}

/// How the guard is attached to a pod's host-side interface.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum GuardPreference {
    /// tcx where the kernel has it (Linux 6.6), otherwise clsact.
    #[default]
    Auto,
    /// clsact everywhere, for a node whose other tools do not know tcx.
    Clsact,
}

/// A pod to capture.
#[derive(Clone, Debug)]
pub struct PodCapture {
    /// Path of the pod's network namespace (`/run/netns/…` or `/proc/PID/ns/net`). Kept as a path:
    /// an open descriptor would keep the namespace of a deleted pod alive.
    pub netns: PathBuf,
    /// The pod's own addresses. The first of each family is where its captured connections are
    /// sent; all of them count as its own for the guard and for calls to itself. 1..=8.
    pub addresses: Vec<IpAddr>,
    /// What is captured.
    pub settings: PodSettings,
}

/// What is captured of a pod. [`PodSettings::default`] captures all TCP in both directions and DNS,
/// and lets other UDP and ICMP pass.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PodSettings {
    /// Outbound TCP goes to the agent (`:15001`). Off: it passes, and the guard lets it.
    pub capture_outbound: bool,
    /// Inbound TCP goes to the agent (`:15006`). Off: it reaches the application.
    pub capture_inbound: bool,
    /// Port 53, UDP and TCP, goes to the agent's resolver (`:15053`). Off: UDP/53 passes and TCP/53
    /// is captured like any TCP.
    pub dns_capture: bool,
    /// UDP is dropped in both directions, except what stays inside the pod and what the agent sends.
    pub deny_udp: bool,
    /// ICMP and ICMPv6 are dropped, except neighbour discovery, MLD and packet-too-big.
    pub deny_icmp: bool,
    /// Which outbound connections are captured, by destination.
    pub outbound: Selection,
    /// Which inbound connections are captured, by local port and by client address.
    pub inbound: Selection,
    /// Ports that the node's own addresses may reach without capture (kubelet probes). At most
    /// [`MAX_PORTS`].
    pub probe_ports: BTreeSet<u16>,
    /// No verdict for the direct path is to be taken for the pod. Not the programs' matter: they have only
    /// the verdicts that were taken.
    pub tunnel_same_node: bool,
}

/// Most ports in one list of a pod. More is refused as [`CaptureError::TooMany`](crate::CaptureError).
pub const MAX_PORTS: usize = 256;
/// Most networks in one list of a pod. More is refused as [`CaptureError::TooMany`](crate::CaptureError).
pub const MAX_NETWORKS: usize = 256;
/// Most addresses of a pod.
pub const MAX_ADDRESSES: usize = 8;

/// Which connections are captured. An exclusion always wins. With no inclusion everything else is
/// captured; with any, only what is included by port or by network.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Selection {
    /// Captured although no network includes them.
    pub include_ports: BTreeSet<u16>,
    /// Never captured.
    pub exclude_ports: BTreeSet<u16>,
    /// Captured although no port includes them.
    pub include_networks: Vec<IpNet>,
    /// Never captured.
    pub exclude_networks: Vec<IpNet>,
}

impl Selection {
    /// Whether a connection is captured, as the kernel's side decides it: `address` is the other end, `port` the server's.
    #[must_use]
    pub fn selects(&self, address: IpAddr, port: u16) -> bool {
        let within = |networks: &[IpNet]| networks.iter().any(|net| net.contains(&address));
        if self.exclude_ports.contains(&port) || within(&self.exclude_networks) {
            return false;
        }
        (self.include_ports.is_empty() && self.include_networks.is_empty())
            || self.include_ports.contains(&port)
            || within(&self.include_networks)
    }
}

impl Default for PodSettings {
    fn default() -> Self {
        Self {
            capture_outbound: true,
            capture_inbound: true,
            dns_capture: true,
            deny_udp: false,
            deny_icmp: false,
            outbound: Selection::default(),
            inbound: Selection::default(),
            probe_ports: BTreeSet::new(),
            tunnel_same_node: false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exclusion_wins_over_inclusion() {
        let ports = |ports: &[u16]| ports.iter().copied().collect::<BTreeSet<u16>>();
        let nets = |nets: &[&str]| nets.iter().map(|net| net.parse().unwrap()).collect::<Vec<_>>();
        let at: IpAddr = "10.1.2.3".parse().unwrap();
        let check = |selection: Selection, port: u16, expected: bool| {
            assert_eq!(selection.selects(at, port), expected, "{selection:?} {port}");
        };
        let none = Selection::default;
        check(none(), 80, true);
        check(Selection { exclude_ports: ports(&[80]), ..none() }, 80, false);
        check(Selection { exclude_networks: nets(&["10.0.0.0/8"]), ..none() }, 80, false);
        check(Selection { include_ports: ports(&[80]), ..none() }, 80, true);
        check(Selection { include_ports: ports(&[80]), ..none() }, 81, false);
        check(Selection { include_networks: nets(&["10.1.0.0/16"]), ..none() }, 81, true);
        check(Selection { include_networks: nets(&["fd00::/8"]), ..none() }, 81, false);
        let both = Selection {
            include_ports: ports(&[80]),
            exclude_networks: nets(&["10.1.2.3/32"]),
            ..none()
        };
        check(both, 80, false);
    }
}
