//! What only waypoints are told.

use std::sync::Arc;

use mesh_route::{FrontendKind, FrontendName, RouteKind, RouteName};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::address::two_parts;
use crate::error::{InvalidResource, Problem};

/// What a waypoint serves: a Service or ServiceEntry bound to it, or its own Gateway.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FrontendConfig {
    /// The object.
    pub frontend: FrontendName,
    /// The host names under which the index knows it; none for a Gateway.
    pub hosts: Vec<Arc<str>>,
    /// Its ports.
    pub ports: Vec<FrontendPortConfig>,
    /// The policies attached to it, as `namespace/name`. One that is not known refuses every request.
    pub policies: Vec<Arc<str>>,
    /// The RequestAuthentications that hold there, as `namespace/name`. One that is not known refuses every request.
    #[serde(default)]
    pub authentications: Vec<Arc<str>>,
    /// Of a Gateway: those that hold for workloads of its namespace that are dialled themselves, besides.
    #[serde(default)]
    pub workload_authentications: Vec<Arc<str>>,
}

/// A port of what a waypoint serves.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FrontendPortConfig {
    /// Its number.
    pub port: u16,
    /// Its name; empty when it has none.
    pub name: Arc<str>,
    /// What is spoken there.
    pub protocol: AppProtocol,
}

/// What is spoken at a port, by `appProtocol` or the port's name.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AppProtocol {
    /// Found out by the first bytes.
    #[default]
    Detect,
    /// HTTP/1.1, or HTTP/2 if the client begins so; servers are spoken to in HTTP/1.1.
    Http1,
    /// HTTP/2 without TLS, gRPC among it.
    Http2,
    /// Anything: bytes are passed on.
    Tcp,
}

impl AppProtocol {
    /// By `appProtocol`, else by the port's name up to its first dash. Source: KEP-3726, Istio's port names.
    #[must_use]
    pub fn of(app_protocol: Option<&str>, port_name: &str) -> Self {
        let word = match app_protocol {
            Some(word) => word.to_ascii_lowercase(),
            None => port_name.split('-').next().unwrap_or_default().to_ascii_lowercase(),
        };
        match word.as_str() {
            "http" | "kubernetes.io/ws" => Self::Http1,
            "http2" | "h2c" | "grpc" | "kubernetes.io/h2c" => Self::Http2,
            "tcp" | "tls" | "https" | "kubernetes.io/wss" | "mongo" | "mysql" | "redis" => {
                Self::Tcp
            }
            _ => Self::Detect,
        }
    }
}

const fn kind_word(kind: FrontendKind) -> &'static str {
    match kind {
        FrontendKind::Service => "Service",
        FrontendKind::ServiceEntry => "ServiceEntry",
        FrontendKind::Gateway => "Gateway",
    }
}

/// `Kind namespace/name`.
pub(crate) fn frontend_name(name: &FrontendName) -> String {
    format!("{} {}/{}", kind_word(name.kind), name.namespace, name.name)
}

pub(crate) fn parse_frontend(text: &str) -> Option<FrontendName> {
    let (kind, rest) = text.split_once(' ')?;
    let (namespace, name) = two_parts(rest)?;
    let kinds = [FrontendKind::Service, FrontendKind::ServiceEntry, FrontendKind::Gateway];
    let kind = kinds.into_iter().find(|one| kind_word(*one) == kind)?;
    Some(FrontendName { kind, namespace: namespace.into(), name: name.into() })
}

pub(crate) fn parse_route(text: &str) -> Option<RouteName> {
    let (kind, rest) = text.split_once(' ')?;
    let (namespace, name) = two_parts(rest)?;
    let kind = match kind {
        "HTTPRoute" => RouteKind::Http,
        "GRPCRoute" => RouteKind::Grpc,
        _ => return None,
    };
    Some(RouteName::new(kind, namespace, name))
}

/// The name by which a waypoint proves itself where agents give their node's. A slash is in no node's name.
#[must_use]
pub fn waypoint_node(namespace: &str, name: &str) -> String {
    format!("waypoint/{namespace}/{name}")
}

/// Namespace and name of the Gateway, when a caller is a waypoint.
#[must_use]
pub fn waypoint_of_node(node: &str) -> Option<(&str, &str)> {
    node.strip_prefix("waypoint/").and_then(two_parts)
}

pub(crate) fn from_json<T: DeserializeOwned>(json: &str) -> Result<T, InvalidResource> {
    serde_json::from_str(json)
        .map_err(|error| InvalidResource::new("json", Problem::Json { text: error.to_string() }))
}

/// Text of types that all can be written as JSON: no map of theirs has keys that are no text.
pub(crate) fn to_json<T: Serialize>(value: &T) -> String {
    serde_json::to_string(value).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn protocols_are_told_by_name() {
        for (given, name, protocol) in [
            (None, "http", AppProtocol::Http1),
            (None, "http-web", AppProtocol::Http1),
            (None, "grpc-web", AppProtocol::Http2),
            (None, "web", AppProtocol::Detect),
            (None, "", AppProtocol::Detect),
            (Some("kubernetes.io/h2c"), "http", AppProtocol::Http2),
            (Some("TCP"), "http", AppProtocol::Tcp),
            (Some("example.org/x"), "http", AppProtocol::Detect),
        ] {
            assert_eq!(AppProtocol::of(given, name), protocol, "{given:?} {name}");
        }
    }

    #[test]
    fn names_are_read_and_written_alike() {
        let name = FrontendName::service("shop", "cart");
        assert_eq!(parse_frontend(&frontend_name(&name)), Some(name));
        let name = RouteName::new(RouteKind::Grpc, "shop", "cart");
        assert_eq!(parse_route(&name.to_string()), Some(name));
        for text in ["", "Pod shop/cart", "Service shop", "Service shop/a/b", "Service /a"] {
            assert_eq!(parse_frontend(text), None, "{text:?}");
            assert_eq!(parse_route(text), None, "{text:?}");
        }
        assert_eq!(waypoint_of_node(&waypoint_node("shop", "w")), Some(("shop", "w")));
        for text in ["n1", "waypoint", "waypoint/shop", "waypoint/shop/a/b", "waypoint//a"] {
            assert_eq!(waypoint_of_node(text), None, "{text:?}");
        }
    }
}
