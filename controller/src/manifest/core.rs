//! Namespace, Node and ServiceAccount.

use mesh_authorize::UnknownEgress;
use mesh_model::{IpPrefix, Locality};
use serde::Deserialize;

use super::capture::SameNode;
use super::metadata::{InvalidField, Metadata};

/// Label or annotation of a namespace: what becomes of destinations the mesh does not know.
pub const UNKNOWN_EGRESS: &str = "culvert.dev/unknown-egress";

/// A namespace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Namespace {
    /// Metadata.
    pub meta: Metadata,
    /// `culvert.dev/unknown-egress`, where it is set.
    pub unknown_egress: Option<UnknownEgress>,
    /// `culvert.dev/same-node`, where it is set.
    pub same_node: Option<SameNode>,
}

impl Namespace {
    pub(super) fn parse(meta: Metadata) -> Result<Self, InvalidField> {
        let unknown_egress = match meta.setting(UNKNOWN_EGRESS) {
            None => None,
            Some("allow") => Some(UnknownEgress::Allow),
            Some("deny") => Some(UnknownEgress::Deny),
            Some(other) => {
                let place = if meta.annotation(UNKNOWN_EGRESS).is_some() {
                    "annotations"
                } else {
                    "labels"
                };
                return Err(InvalidField::new(
                    &format!("metadata.{place}"),
                    format!("{UNKNOWN_EGRESS} is {other:?}"),
                    "use allow or deny",
                ));
            }
        };
        let same_node = SameNode::parse(&meta)?;
        Ok(Self { meta, unknown_egress, same_node })
    }
}

/// A node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Node {
    /// Metadata.
    pub meta: Metadata,
    /// From the topology labels.
    pub locality: Locality,
    /// `spec.podCIDRs`: where its pods' addresses are from, if the cluster hands them out by node.
    pub pod_networks: Vec<IpPrefix>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct RawNode {
    #[serde(default)]
    spec: RawNodeSpec,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawNodeSpec {
    #[serde(rename = "podCIDR")]
    pod_cidr: Option<String>,
    #[serde(rename = "podCIDRs")]
    pod_cidrs: Option<Vec<String>>,
}

impl RawNode {
    pub(super) fn parse(self, meta: Metadata) -> Result<Node, InvalidField> {
        let cidrs = match (self.spec.pod_cidrs, self.spec.pod_cidr) {
            (Some(cidrs), _) if !cidrs.is_empty() => cidrs,
            (_, one) => one.filter(|cidr| !cidr.is_empty()).into_iter().collect(),
        };
        let pod_networks = cidrs
            .iter()
            .enumerate()
            .map(|(index, text)| {
                text.parse().map_err(|error: mesh_model::InvalidPrefix| {
                    let field = format!("spec.podCIDRs[{index}]");
                    InvalidField::new(&field, error.to_string(), "use a CIDR such as 10.244.1.0/24")
                })
            })
            .collect::<Result<_, _>>()?;
        Ok(Node::new(meta, pod_networks))
    }
}

impl Node {
    fn new(meta: Metadata, pod_networks: Vec<IpPrefix>) -> Self {
        let part = |keys: [&str; 2]| {
            keys.iter().find_map(|key| meta.label(key)).unwrap_or_default().into()
        };
        let locality = Locality {
            region: part([
                "topology.kubernetes.io/region",
                "failure-domain.beta.kubernetes.io/region",
            ]),
            zone: part(["topology.kubernetes.io/zone", "failure-domain.beta.kubernetes.io/zone"]),
            subzone: part(["culvert.dev/subzone", "topology.istio.io/subzone"]),
        };
        Self { meta, locality, pod_networks }
    }
}

/// A service account. Only its existence is of use, to name a missing one in `status`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServiceAccount {
    /// Metadata.
    pub meta: Metadata,
}
