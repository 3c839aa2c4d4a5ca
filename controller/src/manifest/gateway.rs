//! Gateway and ReferenceGrant of the Gateway API.

use std::sync::Arc;

use serde::Deserialize;

use super::metadata::{InvalidField, Metadata, port};

/// The class of Gateways that are waypoints.
pub const WAYPOINT_CLASS: &str = "culvert-waypoint";
/// Its twin, under the switch for Istio's labels.
pub const ISTIO_WAYPOINT_CLASS: &str = "istio-waypoint";

/// A Gateway.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Gateway {
    /// Metadata.
    pub meta: Metadata,
    /// `spec.gatewayClassName`.
    pub class: Arc<str>,
    /// Its listeners.
    pub listeners: Vec<Listener>,
}

/// A listener of a Gateway.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listener {
    /// Its name.
    pub name: Arc<str>,
    /// Its port.
    pub port: u16,
    /// Its protocol, as written.
    pub protocol: Arc<str>,
}

/// A ReferenceGrant: objects of other namespaces that may refer to objects of this one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReferenceGrant {
    /// Metadata.
    pub meta: Metadata,
    /// Who may refer.
    pub from: Vec<GrantFrom>,
    /// To what.
    pub to: Vec<GrantTo>,
}

/// Objects that a [`ReferenceGrant`] lets refer.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GrantFrom {
    group: String,
    kind: String,
    namespace: String,
}

/// What a [`ReferenceGrant`] lets be referred to: all of the kind, unless there is a name.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GrantTo {
    group: String,
    kind: String,
    name: Option<String>,
}

impl ReferenceGrant {
    /// Whether routes of `kind` in `namespace` may refer to the service `name` of this grant's namespace.
    #[must_use]
    pub fn allows_service(&self, kind: &str, namespace: &str, name: &str) -> bool {
        let from = self.from.iter().any(|from| {
            from.group == GATEWAY_GROUP && from.kind == kind && from.namespace == namespace
        });
        let to = self.to.iter().any(|to| {
            to.group.is_empty()
                && to.kind == "Service"
                && to.name.as_deref().is_none_or(|one| one == name)
        });
        from && to
    }
}

/// The Gateway API's group.
pub const GATEWAY_GROUP: &str = "gateway.networking.k8s.io";

#[derive(Debug, Deserialize)]
pub(super) struct RawGateway {
    spec: RawGatewaySpec,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawGatewaySpec {
    gateway_class_name: String,
    listeners: Option<Vec<RawListener>>,
}

#[derive(Debug, Deserialize)]
struct RawListener {
    name: String,
    port: i64,
    protocol: String,
}

impl RawGateway {
    pub(super) fn parse(self, meta: Metadata) -> Result<Gateway, InvalidField> {
        let listeners = self.spec.listeners.unwrap_or_default();
        let listeners = listeners
            .into_iter()
            .enumerate()
            .map(|(index, raw)| {
                let port = port(&format!("spec.listeners[{index}].port"), raw.port)?;
                Ok(Listener { name: raw.name.into(), port, protocol: raw.protocol.into() })
            })
            .collect::<Result<Vec<_>, InvalidField>>()?;
        Ok(Gateway { meta, class: self.spec.gateway_class_name.into(), listeners })
    }
}

#[derive(Debug, Deserialize)]
pub(super) struct RawReferenceGrant {
    spec: RawGrantSpec,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawGrantSpec {
    from: Vec<GrantFrom>,
    to: Vec<GrantTo>,
}

impl RawReferenceGrant {
    pub(super) fn parse(self, meta: Metadata) -> ReferenceGrant {
        ReferenceGrant { meta, from: self.spec.from, to: self.spec.to }
    }
}
