//! What the programs of a node are told.

use std::fs;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::Path;

use anyhow::{Context as _, bail};
use serde_json::json;

use super::CONTAINERD;
use crate::cluster::addresses::{DNS_SERVICE, Plan};
use crate::cluster::images::PAUSE_IMAGE;
use crate::cluster::layout::Layout;

pub(super) const CONTAINERD_FILE: &str = "/etc/containerd/config.toml";
pub(super) const KUBELET_FILE: &str = "/etc/kubernetes/kubelet.json";
pub(super) const PROXY_FILE: &str = "/etc/kubernetes/kube-proxy.json";

/// An own, empty one: pods with `dnsPolicy: Default` would inherit the machine's resolver.
const RESOLV_CONF: &str = "/etc/kubernetes/resolv.conf";
/// Where Debian keeps the standard CNI plugins.
const CNI_SOURCE: &str = "/usr/lib/cni";
const CNI_PLUGINS: &[&str] = &["bridge", "host-local", "loopback", "portmap", "ptp"];

/// Writes every file. The node's `/etc` and `/opt` are its own by then.
pub(super) fn write(layout: &Layout, number: u8) -> anyhow::Result<()> {
    for folder in ["/etc/cni/net.d", "/etc/containerd", "/etc/kubernetes", "/opt/cni/bin"] {
        fs::create_dir_all(folder).with_context(|| format!("cannot make {folder}"))?;
    }
    put(CONTAINERD_FILE, &containerd())?;
    put(RESOLV_CONF, "")?;
    put(KUBELET_FILE, &kubelet(layout).to_string())?;
    put(PROXY_FILE, &proxy(layout).to_string())?;
    put("/etc/cni/net.d/10-cluster.conflist", &network(layout.plan(), number).to_string())?;
    plugins()
}

fn put(path: &str, text: &str) -> anyhow::Result<()> {
    fs::write(path, text).with_context(|| format!("cannot write {path}"))
}

fn plugins() -> anyhow::Result<()> {
    for name in CNI_PLUGINS {
        let source = Path::new(CNI_SOURCE).join(name);
        if !source.exists() {
            bail!("no {}: install the package containernetworking-plugins", source.display());
        }
        let link = Path::new("/opt/cni/bin").join(name);
        if !link.exists() {
            symlink(source, link)?;
        }
    }
    // ptp waits 1.9 s per pod for IPv6 duplicate address detection, on a link with two ends.
    let wrapper = "/opt/cni/bin/ptp-at-once";
    put(
        wrapper,
        "#!/bin/sh
if [ \"$CNI_COMMAND\" = ADD ]; then
    nsenter --net=\"$CNI_NETNS\" sh -c 'for link in default all; do
        echo 0 > /proc/sys/net/ipv6/conf/$link/accept_dad; done'
fi
exec \"${0%/*}/ptp\"
",
    )?;
    fs::set_permissions(wrapper, fs::Permissions::from_mode(0o755))?;
    Ok(())
}

/// containerd 1.6 and later. `restrict_oom_score_adj`, because without CAP_SYS_RESOURCE runc cannot
/// lower that score, and dies.
fn containerd() -> String {
    format!(
        r#"version = 2
root = "/var/lib/containerd"
state = "/run/containerd"
oom_score = 0
disabled_plugins = [
  "io.containerd.snapshotter.v1.aufs",
  "io.containerd.snapshotter.v1.btrfs",
  "io.containerd.snapshotter.v1.devmapper",
  "io.containerd.snapshotter.v1.zfs",
  "io.containerd.tracing.processor.v1.otlp",
  "io.containerd.internal.v1.tracing",
]
[grpc]
  address = "{CONTAINERD}"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{PAUSE_IMAGE}"
  restrict_oom_score_adj = true
  [plugins."io.containerd.grpc.v1.cri".containerd]
    snapshotter = "overlayfs"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
      runtime_type = "io.containerd.runc.v2"
      [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
        SystemdCgroup = false
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/opt/cni/bin"
    conf_dir = "/etc/cni/net.d"
"#
    )
}

fn kubelet(layout: &Layout) -> serde_json::Value {
    // Nothing is evicted and no image deleted for a disk that the whole machine shares.
    let never = "0%";
    json!({
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "failCgroupV1": false,
        "cgroupDriver": "cgroupfs",
        "containerRuntimeEndpoint": format!("unix://{CONTAINERD}"),
        "authentication": {
            "anonymous": {"enabled": false},
            "webhook": {"enabled": true},
            "x509": {"clientCAFile": layout.credentials().path("ca.crt")},
        },
        "authorization": {"mode": "Webhook"},
        "clusterDomain": "cluster.local",
        "clusterDNS": [DNS_SERVICE],
        "resolvConf": RESOLV_CONF,
        "failSwapOn": false,
        "protectKernelDefaults": true,
        "evictionHard": {
            "memory.available": never,
            "nodefs.available": never,
            "nodefs.inodesFree": never,
            "imagefs.available": never,
        },
        "imageGCHighThresholdPercent": 100,
        "serializeImagePulls": false,
        "maxOpenFiles": 20_000,
        // A node that is switched off is seen within ten seconds.
        "nodeLeaseDurationSeconds": 8,
        "nodeStatusUpdateFrequency": "2s",
        "kubeAPIQPS": 500,
        "kubeAPIBurst": 1000,
        "oomScoreAdj": 0,
    })
}

fn proxy(layout: &Layout) -> serde_json::Value {
    json!({
        "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
        "kind": "KubeProxyConfiguration",
        "mode": "nftables",
        "clientConnection": {"kubeconfig": layout.credentials().kubeconfig("proxy")},
        "clusterCIDR": layout.plan().pod_ranges(),
        // The connection table's limits belong to the machine and cannot be set from here.
        "conntrack": {
            "maxPerCore": 0,
            "min": 0,
            "tcpEstablishedTimeout": "0s",
            "tcpCloseWaitTimeout": "0s",
        },
        "oomScoreAdj": 0,
    })
}

/// A pair of interfaces per pod, routed: the simplest network on which every service works.
fn network(plan: Plan, node: u8) -> serde_json::Value {
    let ranges: Vec<_> =
        plan.node_pods(node).into_iter().map(|subnet| json!([{"subnet": subnet}])).collect();
    let mut routes = vec![json!({"dst": "0.0.0.0/0"})];
    if plan.dual() {
        routes.push(json!({"dst": "::/0"}));
    }
    json!({
        "cniVersion": "1.0.0",
        "name": "cluster",
        "plugins": [
            {
                "type": if plan.dual() { "ptp-at-once" } else { "ptp" },
                "ipMasq": false,
                "mtu": 1500,
                "ipam": {
                    "type": "host-local",
                    "dataDir": "/run/cni-ipam",
                    "ranges": ranges,
                    "routes": routes,
                },
            },
            {"type": "portmap", "capabilities": {"portMappings": true}},
        ],
    })
}
