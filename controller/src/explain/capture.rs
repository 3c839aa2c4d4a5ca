//! Whether a connection is the mesh's at one of its ends: as the node's agent says of the pod, and as the pod's settings
//! make the programs in the kernel decide it (`ebpf/programs`: `connect`, `sk_lookup`, `rules`).

use std::net::{IpAddr, SocketAddr};

use mesh_model::{NetworkMode, TunnelProtocol, Workload};

use crate::mesh::Picture;

const DNS: u16 = 53;

/// Whether a connection is the mesh's.
pub(super) enum Capture {
    /// It is: the node's agent says so.
    Captured,
    /// The mesh holds it to be; the node's agent has not said.
    Unconfirmed(String),
    /// It is not.
    Not(String),
    /// It never leaves the pod.
    Inside(String),
}

impl Capture {
    /// Of a workload as a whole.
    pub(super) fn of(picture: &Picture, workload: &Workload) -> Self {
        let Workload { namespace, name, node, .. } = workload;
        if workload.network_mode != NetworkMode::Standard {
            return Self::Not(format!("{namespace}/{name} is in its node's network"));
        }
        if workload.tunnel_protocol != TunnelProtocol::Hbone {
            return Self::Not(format!(
                "{namespace}/{name} is not in the mesh, or its node's agent has yet to capture it"
            ));
        }
        match picture.captured.reported(node, namespace, name) {
            Some(true) => Self::Captured,
            Some(false) => Self::Not(format!(
                "{namespace}/{name} is in the mesh, but the agent of node {node} does not capture it"
            )),
            // Nobody's pod: a gateway of another network.
            None if node.is_empty() => Self::Captured,
            None => Self::Unconfirmed(format!(
                "the agent of node {node} has not reported here; {namespace}/{name} is taken as captured"
            )),
        }
    }

    /// Of a connection that a workload opens.
    pub(super) fn outbound(picture: &Picture, source: &Workload, target: SocketAddr) -> Self {
        let whole = Self::of(picture, source);
        let (Self::Captured | Self::Unconfirmed(_)) = whole else { return whole };
        let Workload { namespace, name, .. } = source;
        let ip = target.ip();
        if ip.is_loopback() || ip.is_unspecified() || source.addresses.contains(&ip) {
            let why = format!("{namespace}/{name} dials itself: that never leaves the pod");
            return Self::Inside(why);
        }
        let Some(pod) = picture.pods.get(&source.uid) else { return whole };
        if target.port() == DNS && pod.capture.dns_capture {
            let why = format!("the agent's DNS proxy answers {namespace}/{name} at port {DNS}");
            return Self::Inside(why);
        }
        match pod.capture.leaves_outbound(ip, target.port()) {
            Some(setting) => Self::Not(format!(
                "{namespace}/{name} leaves {target} out of its capture ({setting})"
            )),
            None => whole,
        }
    }

    /// Of a plaintext connection from `client` to a workload.
    pub(super) fn inbound(
        picture: &Picture,
        local: &Workload,
        client: &Workload,
        from: IpAddr,
        port: u16,
    ) -> Self {
        let whole = Self::of(picture, local);
        let (Self::Captured | Self::Unconfirmed(_)) = whole else { return whole };
        let Some(pod) = picture.pods.get(&local.uid) else { return whole };
        let Workload { namespace, name, node, .. } = local;
        let is_node = client.network_mode == NetworkMode::HostNetwork && client.node == *node;
        if is_node && !node.is_empty() && pod.probe_ports.contains(&port) {
            let why = format!("{port} is a probe's port of {namespace}/{name}, open to its node");
            return Self::Not(why);
        }
        match pod.capture.leaves_inbound(from, port) {
            Some(setting) => Self::Not(format!(
                "{namespace}/{name} leaves {from} to port {port} out of its capture ({setting})"
            )),
            None => whole,
        }
    }
}
