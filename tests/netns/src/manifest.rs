//! Manifests as a cluster would hold them, for the controller's directory source.

use std::net::IpAddr;

use serde_json::{Value, json};

/// A Namespace with labels.
#[must_use]
pub fn namespace(name: &str, labels: &[(&str, &str)]) -> Value {
    let labels: serde_json::Map<String, Value> =
        labels.iter().map(|(key, value)| ((*key).to_owned(), json!(value))).collect();
    json!({ "apiVersion": "v1", "kind": "Namespace", "metadata": { "name": name, "labels": labels } })
}

/// A Node with its addresses and the networks of its pods.
#[must_use]
pub fn node(name: &str, addresses: &[IpAddr], pod_networks: &[&str]) -> Value {
    let addresses: Vec<Value> = addresses
        .iter()
        .map(|address| json!({ "type": "InternalIP", "address": address.to_string() }))
        .collect();
    json!({
        "apiVersion": "v1", "kind": "Node",
        "metadata": { "name": name, "labels": { "topology.kubernetes.io/region": "lab", "topology.kubernetes.io/zone": name } },
        "spec": { "podCIDR": pod_networks.first(), "podCIDRs": pod_networks },
        "status": { "addresses": addresses },
    })
}

/// The `number`th pod of a node `c` on which nothing runs: for an index with many pods.
#[must_use]
pub fn distant_pod(namespace: &str, number: u16) -> Value {
    distant(namespace, ("distant", 0x9000), number)
}

/// The pod, of another service account, that is given the address of the `number`th [`distant_pod`].
#[must_use]
pub fn distant_heir(namespace: &str, number: u16) -> Value {
    distant(namespace, ("heir", 0xa000), number)
}

fn distant(namespace: &str, (name, kind): (&str, u16), number: u16) -> Value {
    let [high, low] = number.to_be_bytes();
    let ip = IpAddr::from([10, 99, high, low]).to_string();
    json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {
            "name": format!("{name}-{number}"), "namespace": namespace,
            "uid": format!("00000000-0000-4000-{kind:x}-{number:012}"), "labels": { "app": name },
        },
        "spec": { "nodeName": "c", "serviceAccountName": name, "containers": [{ "name": "main" }] },
        "status": {
            "phase": "Running", "podIP": ip, "podIPs": [{ "ip": ip }],
            "conditions": [{ "type": "Ready", "status": "True" }],
        },
    })
}

/// A ServiceAccount.
#[must_use]
pub fn service_account(namespace: &str, name: &str) -> Value {
    json!({ "apiVersion": "v1", "kind": "ServiceAccount", "metadata": { "name": name, "namespace": namespace } })
}

/// A ClusterIP Service that selects `app: <app>`.
#[must_use]
pub fn service(
    namespace: &str,
    name: &str,
    app: &str,
    cluster_ips: &[IpAddr],
    ports: &[(&str, u16, u16)],
) -> Value {
    let ips: Vec<String> = cluster_ips.iter().map(ToString::to_string).collect();
    let ports: Vec<Value> = ports
        .iter()
        .map(|(name, port, target)| {
            json!({ "name": name, "port": port, "targetPort": target, "protocol": "TCP" })
        })
        .collect();
    json!({
        "apiVersion": "v1", "kind": "Service",
        "metadata": { "name": name, "namespace": namespace },
        "spec": {
            "selector": { "app": app }, "ports": ports,
            "clusterIP": ips.first(), "clusterIPs": ips,
            "ipFamilyPolicy": "PreferDualStack",
        },
    })
}

/// The Gateway of a waypoint.
#[must_use]
pub fn waypoint(namespace: &str, name: &str) -> Value {
    json!({
        "apiVersion": "gateway.networking.k8s.io/v1", "kind": "Gateway",
        "metadata": { "name": name, "namespace": namespace },
        "spec": {
            "gatewayClassName": "culvert-waypoint",
            "listeners": [{ "name": "mesh", "port": 15008, "protocol": "HBONE" }],
        },
    })
}

/// An HTTPRoute from its `spec`.
#[must_use]
pub fn http_route(namespace: &str, name: &str, spec: &Value) -> Value {
    json!({
        "apiVersion": "gateway.networking.k8s.io/v1", "kind": "HTTPRoute",
        "metadata": { "name": name, "namespace": namespace }, "spec": spec,
    })
}

/// A `parentRef` to a Service.
#[must_use]
pub fn of_service(name: &str) -> Value {
    json!({ "group": "", "kind": "Service", "name": name })
}

/// An AuthorizationPolicy from its `spec`.
#[must_use]
pub fn authorization_policy(namespace: &str, name: &str, spec: &Value) -> Value {
    json!({
        "apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy",
        "metadata": { "name": name, "namespace": namespace }, "spec": spec,
    })
}

/// A PeerAuthentication from its `spec`.
#[must_use]
pub fn peer_authentication(namespace: &str, name: &str, spec: &Value) -> Value {
    json!({
        "apiVersion": "security.istio.io/v1", "kind": "PeerAuthentication",
        "metadata": { "name": name, "namespace": namespace }, "spec": spec,
    })
}

/// A RequestAuthentication from its `spec`.
#[must_use]
pub fn request_authentication(namespace: &str, name: &str, spec: &Value) -> Value {
    json!({
        "apiVersion": "security.istio.io/v1", "kind": "RequestAuthentication",
        "metadata": { "name": name, "namespace": namespace }, "spec": spec,
    })
}
