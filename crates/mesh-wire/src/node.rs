//! Who asks: the xDS node.

use std::collections::BTreeMap;
use std::net::IpAddr;

use prost_types::value::Kind;
use prost_types::{Struct, Value};

use crate::pb::discovery::Node;

/// An agent, as it introduces itself to a control plane.
///
/// Source: the node id and metadata that Istio's control plane demands of an ambient node agent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeIdentity {
    /// An address of the node.
    pub ip: IpAddr,
    /// The agent's own pod, or another name for it.
    pub pod_name: String,
    /// The agent's own namespace.
    pub pod_namespace: String,
    /// The node's name.
    pub node_name: String,
    /// The cluster's id.
    pub cluster_id: String,
    /// The cluster's DNS domain.
    pub cluster_domain: String,
    /// The agent's version.
    pub version: String,
}

const NODE_NAME: &str = "NODE_NAME";

impl From<&NodeIdentity> for Node {
    fn from(identity: &NodeIdentity) -> Self {
        let NodeIdentity { ip, pod_name, pod_namespace, cluster_domain, .. } = identity;
        let fields = [
            ("NAME", pod_name),
            ("NAMESPACE", pod_namespace),
            (NODE_NAME, &identity.node_name),
            ("CLUSTER_ID", &identity.cluster_id),
        ];
        let mut metadata: BTreeMap<String, Value> = fields
            .into_iter()
            .map(|(key, value)| (key.to_owned(), string(value.clone())))
            .collect();
        metadata.insert("INSTANCE_IPS".to_owned(), string(ip.to_string()));
        Self {
            id: format!(
                "ztunnel~{ip}~{pod_name}.{pod_namespace}~{pod_namespace}.svc.{cluster_domain}"
            ),
            cluster: String::new(),
            metadata: Some(Struct { fields: metadata }),
            build_version: identity.version.clone(),
        }
    }
}

pub(crate) const fn string(text: String) -> Value {
    Value { kind: Some(Kind::StringValue(text)) }
}

pub(crate) fn as_str(value: &Value) -> Option<&str> {
    match &value.kind {
        Some(Kind::StringValue(text)) => Some(text),
        Some(
            Kind::NullValue(_)
            | Kind::NumberValue(_)
            | Kind::BoolValue(_)
            | Kind::StructValue(_)
            | Kind::ListValue(_),
        )
        | None => None,
    }
}

/// The name of the node that `node` says it is; only as true as the credentials that came with it.
#[must_use]
pub fn node_name(node: &Node) -> Option<&str> {
    node.metadata.as_ref()?.fields.get(NODE_NAME).and_then(as_str).filter(|name| !name.is_empty())
}
