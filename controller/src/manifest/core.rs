//! Namespace, Node and ServiceAccount.

use mesh_authorize::UnknownEgress;
use mesh_model::Locality;

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
        Ok(Self { meta, unknown_egress })
    }
}

/// A node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Node {
    /// Metadata.
    pub meta: Metadata,
    /// From the topology labels.
    pub locality: Locality,
}

impl Node {
    pub(super) fn parse(meta: Metadata) -> Self {
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
        Self { meta, locality }
    }
}

/// A service account. Only its existence is of use, to name a missing one in `status`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServiceAccount {
    /// Metadata.
    pub meta: Metadata,
}
