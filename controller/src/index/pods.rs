//! Which pods are in the mesh, and how each is captured.

use std::collections::BTreeSet;
use std::sync::Arc;

use mesh_model::WorkloadUid;
use serde::Serialize;

use super::objects::Key;
use super::workloads::{View, entry_uid, pod_uid};
use crate::manifest::metadata::Metadata;
use crate::manifest::{CaptureSettings, Pod, SameNode, WorkloadEntry};

/// Whether a pod is to be captured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum PodMode {
    /// It is not.
    None,
    /// It is.
    Ambient,
}

/// What a node's agent is told about one of its pods. Exists from the moment the pod is bound to the node, with or
/// without addresses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PodSettings {
    /// Key of its workload.
    pub uid: WorkloadUid,
    /// The orchestrator's uid of the pod; empty when there is none.
    pub pod_uid: Arc<str>,
    /// Namespace and name.
    pub key: Key,
    /// Node it is bound to.
    pub node: Arc<str>,
    /// Service account.
    pub service_account: Arc<str>,
    /// Whether it is captured.
    pub mode: PodMode,
    /// Ports its probes dial.
    pub probe_ports: BTreeSet<u16>,
    /// What is captured of it.
    pub capture: CaptureSettings,
    /// Whether its connections with pods of its node are never direct.
    pub tunnel_same_node: bool,
}

/// True when a pod is selected: by its own label, else by its namespace's. `none` on the pod wins.
pub(super) fn is_ambient_pod(view: View<'_>, pod: &Pod) -> bool {
    !pod.host_network
        && !pod.terminal
        // A sidecar would take the same ports and speak its own mTLS.
        && pod.meta.annotation("sidecar.istio.io/status").is_none()
        && is_selected(view, &pod.meta, pod.meta.label("culvert.dev/dataplane-mode"), pod.meta.label("istio.io/dataplane-mode"))
}

/// True when a WorkloadEntry is selected and some node's agent captures it.
pub(super) fn is_ambient_entry(view: View<'_>, entry: &WorkloadEntry) -> bool {
    let label = |key: &str| entry.endpoint.labels.get(key).map(String::as_str);
    !entry.node.is_empty()
        && is_selected(
            view,
            &entry.meta,
            label("culvert.dev/dataplane-mode"),
            label("istio.io/dataplane-mode"),
        )
}

fn is_selected(view: View<'_>, meta: &Metadata, ours: Option<&str>, twin: Option<&str>) -> bool {
    let settings = view.settings;
    if settings.excluded_namespaces.contains(&meta.namespace) {
        return false;
    }
    let own = ours.or_else(|| twin.filter(|_| settings.istio_labels));
    let namespace = view.objects.namespaces.get(&meta.namespace);
    let inherited =
        || namespace.and_then(|namespace| settings.mesh_label(&namespace.meta, "dataplane-mode"));
    // A value that is neither says nothing about the pod, and its namespace decides.
    match own.filter(|mode| matches!(*mode, "ambient" | "none")).or_else(inherited) {
        Some(mode) => mode == "ambient",
        None => false,
    }
}

/// The settings of a pod that is bound to a node.
pub(super) fn of_pod(view: View<'_>, key: &Key, pod: &Pod, ambient: bool) -> Option<PodSettings> {
    (!pod.host_network && !pod.node.is_empty()).then(|| PodSettings {
        uid: pod_uid(key, view.settings),
        pod_uid: node_uid(&pod.meta),
        key: key.clone(),
        node: pod.node.clone(),
        service_account: pod.service_account.clone(),
        mode: mode(ambient),
        probe_ports: pod.probe_ports.clone(),
        tunnel_same_node: tunnels_same_node(view, &pod.meta, &pod.capture),
        capture: pod.capture.clone(),
    })
}

/// The uid that the pod has on its node, in cgroups and in `CNI_ARGS`. A static pod's is its kubelet's hash of its file; the
/// mirror of it in the API has another. Source: Kubernetes' annotation `kubernetes.io/config.mirror`.
fn node_uid(meta: &Metadata) -> Arc<str> {
    meta.annotation("kubernetes.io/config.mirror").map_or_else(|| meta.uid.clone(), Arc::from)
}

/// The settings of a WorkloadEntry that is bound to a node.
pub(super) fn of_entry(
    view: View<'_>,
    key: &Key,
    entry: &WorkloadEntry,
    ambient: bool,
) -> Option<PodSettings> {
    (!entry.node.is_empty()).then(|| PodSettings {
        uid: entry_uid(key, view.settings),
        pod_uid: entry.meta.uid.clone(),
        key: key.clone(),
        node: entry.node.clone(),
        service_account: entry.endpoint.service_account.clone(),
        mode: mode(ambient),
        probe_ports: BTreeSet::new(),
        tunnel_same_node: tunnels_same_node(view, &entry.meta, &entry.capture),
        capture: entry.capture.clone(),
    })
}

/// By the object's own word, else by its namespace's.
fn tunnels_same_node(view: View<'_>, meta: &Metadata, own: &CaptureSettings) -> bool {
    let of_namespace = || view.objects.namespaces.get(&meta.namespace)?.same_node;
    own.same_node.or_else(of_namespace) == Some(SameNode::Tunnel)
}

const fn mode(ambient: bool) -> PodMode {
    if ambient { PodMode::Ambient } else { PodMode::None }
}
