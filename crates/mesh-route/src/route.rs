//! Routes as the controller describes them. Source: Gateway API v1 HTTPRoute and GRPCRoute.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use http::{HeaderName, Method};
use serde::{Deserialize, Serialize};

use crate::filter::Filters;

/// What kind of object a route is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum RouteKind {
    /// An HTTPRoute.
    Http,
    /// A GRPCRoute.
    Grpc,
}

/// A route's key; written as logs name it: `HTTPRoute shop/cart`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct RouteName {
    /// Its kind.
    pub kind: RouteKind,
    /// Its namespace.
    pub namespace: Arc<str>,
    /// Its name.
    pub name: Arc<str>,
}

impl RouteName {
    /// A name from its parts.
    #[must_use]
    pub fn new(kind: RouteKind, namespace: &str, name: &str) -> Self {
        Self { kind, namespace: namespace.into(), name: name.into() }
    }
}

impl fmt::Display for RouteName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = match self.kind {
            RouteKind::Http => "HTTPRoute",
            RouteKind::Grpc => "GRPCRoute",
        };
        write!(f, "{kind} {}/{}", self.namespace, self.name)
    }
}

/// An HTTPRoute or GRPCRoute.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Route {
    /// Its key.
    pub name: RouteName,
    /// When the object was created, seconds since 1970: of two rules that are equal otherwise, the older route's wins.
    /// None counts as the youngest.
    pub created_at_s: Option<u64>,
    /// What it attaches to.
    pub parents: Vec<Parent>,
    /// Hosts it is about; empty for any. Looked at under a Gateway only: a service is known by its address.
    pub hostnames: Vec<Hostname>,
    /// Its rules.
    pub rules: Vec<Rule>,
}

/// What kind of object routes attach to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum FrontendKind {
    /// A Service.
    Service,
    /// A ServiceEntry.
    ServiceEntry,
    /// A Gateway.
    Gateway,
}

/// An object that routes attach to.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct FrontendName {
    /// Its kind.
    pub kind: FrontendKind,
    /// Its namespace.
    pub namespace: Arc<str>,
    /// Its name.
    pub name: Arc<str>,
}

impl FrontendName {
    /// A service.
    #[must_use]
    pub fn service(namespace: &str, name: &str) -> Self {
        Self { kind: FrontendKind::Service, namespace: namespace.into(), name: name.into() }
    }

    /// A gateway.
    #[must_use]
    pub fn gateway(namespace: &str, name: &str) -> Self {
        Self { kind: FrontendKind::Gateway, namespace: namespace.into(), name: name.into() }
    }
}

/// A `parentRef`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Parent {
    /// The object.
    pub frontend: FrontendName,
    /// Only this port of it.
    pub port: Option<u16>,
    /// Only this section of it: the name of a service's port or of a gateway's listener.
    pub section: Option<Arc<str>>,
}

/// A host that a route is about, in lower case: `shop.example.org`, or `*.example.org` for every name below it.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Hostname {
    /// This one.
    Exact(Arc<str>),
    /// One or more labels and then this, which begins with a dot.
    Below(Arc<str>),
}

/// Text that is no hostname of a route.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not a hostname: {text:?}")]
pub struct InvalidHostname {
    /// What was given, cut to 256 characters.
    pub text: String,
}

impl FromStr for Hostname {
    type Err = InvalidHostname;

    fn from_str(text: &str) -> Result<Self, InvalidHostname> {
        let name = text.strip_prefix("*.").unwrap_or(text);
        let is_label = |label: &str| {
            !label.is_empty()
                && label.len() <= 63
                && label.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
                && !label.starts_with('-')
                && !label.ends_with('-')
        };
        if name.len() > 253 || !name.split('.').all(is_label) {
            return Err(InvalidHostname { text: text.chars().take(256).collect() });
        }
        let name = name.to_ascii_lowercase();
        Ok(match text.starts_with('*') {
            true => Self::Below(format!(".{name}").into()),
            false => Self::Exact(name.into()),
        })
    }
}

/// A rule: when one of its matches holds, its filters are applied and one of its backends is chosen.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rule {
    /// Its name in logs.
    pub name: Option<Arc<str>>,
    /// One of these; empty for every request.
    pub matches: Vec<RouteMatch>,
    /// What is done with a request and its answer.
    pub filters: Filters,
    /// Where it goes. Empty: it is answered with 500, unless a filter answers it.
    pub backends: Vec<Backend>,
    /// How long it may take.
    pub timeouts: Timeouts,
    /// When it is tried again.
    pub retry: Option<Retry>,
}

/// Conditions on a request.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum RouteMatch {
    /// Of an HTTPRoute.
    Http(HttpMatch),
    /// Of a GRPCRoute.
    Grpc(GrpcMatch),
}

/// Conditions on an HTTP request, all of which must hold.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HttpMatch {
    /// Its path; any when absent.
    pub path: Option<PathMatch>,
    /// Its method; any when absent.
    #[serde(with = "crate::text::method")]
    pub method: Option<Method>,
    /// Its headers. Of two about the same header the first counts.
    pub headers: Vec<HeaderMatch>,
    /// Parameters of its query. Of two about the same parameter the first counts.
    pub query: Vec<QueryMatch>,
}

/// Conditions on a gRPC request, all of which must hold.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct GrpcMatch {
    /// The service, as `package.Service`.
    pub service: Option<TextMatch>,
    /// The method.
    pub method: Option<TextMatch>,
    /// Its headers. Of two about the same header the first counts.
    pub headers: Vec<HeaderMatch>,
}

/// A condition on a path. Case counts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum PathMatch {
    /// The whole path.
    Exact(Arc<str>),
    /// Whole segments at its beginning; a slash at the end says nothing.
    Prefix(Arc<str>),
    /// An expression for the whole path.
    Regex(Arc<str>),
}

/// A condition on a text. Case counts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum TextMatch {
    /// The whole text.
    Exact(Arc<str>),
    /// An expression for the whole text.
    Regex(Arc<str>),
}

/// A condition on a header's value; that of a repeated header is its values with commas between.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HeaderMatch {
    /// The header.
    #[serde(with = "crate::text::header_name")]
    pub name: HeaderName,
    /// Its value.
    pub value: TextMatch,
}

/// A condition on a parameter of the query; the first counts when it is repeated.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueryMatch {
    /// The parameter. Case counts.
    pub name: Arc<str>,
    /// Its value, decoded.
    pub value: TextMatch,
}

/// A `backendRef`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Backend {
    /// Where requests go.
    pub target: BackendTarget,
    /// Its share, in relation to the sum of the rule's. 0..=1,000,000; the API's default is 1.
    pub weight: u32,
    /// What is done with requests that go there; applied after the rule's.
    pub filters: Filters,
}

/// Where a backend's requests go.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum BackendTarget {
    /// To a port of a service.
    Service(ServiceRef),
    /// Nowhere: its share of requests is answered with 500.
    Invalid {
        /// Why, for people.
        reason: Arc<str>,
    },
}

/// A port of a service.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct ServiceRef {
    /// Its namespace.
    pub namespace: Arc<str>,
    /// Its name.
    pub name: Arc<str>,
    /// The service's port.
    pub port: u16,
}

/// How long a request may take. None and zero: as long as it likes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Timeouts {
    /// From the request's head to the end of its answer, retries included.
    pub request: Option<Duration>,
    /// The same for one attempt.
    pub backend_request: Option<Duration>,
}

/// When a request is tried again. Source: GEP-1731.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Retry {
    /// Statuses that are tried again. 400..=599.
    pub codes: Vec<u16>,
    /// How often, at most, beyond the first attempt.
    pub attempts: u32,
    /// Least time between two attempts.
    pub backoff: Option<Duration>,
}
