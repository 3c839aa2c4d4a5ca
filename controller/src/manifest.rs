//! Manifests as a cluster holds them: text or JSON in, validated objects out.
//!
//! Each kind is trimmed to the fields that the mesh reads. Fields it does not know are ignored, except in policies, where
//! an overlooked restriction would widen the policy: there they are refused.

pub mod authentication;
pub mod capture;
pub mod core;
pub mod document;
pub mod gateway;
pub mod metadata;
pub mod pod;
pub mod policy;
pub mod route;
pub mod service;
pub mod service_entry;
pub mod unreadable;

use std::fmt;
use std::sync::Arc;

use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

pub use self::authentication::RequestAuthentication;
pub use self::capture::{CaptureSettings, SameNode};
pub use self::core::{Namespace, Node, ServiceAccount};
pub use self::document::{Document, Format, InvalidDocument, Segment, documents, line_of};
pub use self::gateway::{Gateway, ReferenceGrant};
pub use self::metadata::{InvalidField, Metadata, Owner, Selector, display_path};
pub use self::pod::Pod;
pub use self::policy::{AuthorizationPolicy, PeerAuthentication};
pub use self::route::RouteObject;
pub use self::service::{EndpointSlice, Service};
pub use self::service_entry::{ServiceEntry, WorkloadEntry};
pub use self::unreadable::{Reach, UnreadablePolicy};

/// The kinds the mesh reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    /// core/v1
    Namespace,
    /// core/v1
    Node,
    /// core/v1
    Pod,
    /// core/v1
    ServiceAccount,
    /// core/v1
    Service,
    /// discovery.k8s.io/v1
    EndpointSlice,
    /// networking.istio.io
    WorkloadEntry,
    /// networking.istio.io
    ServiceEntry,
    /// security.istio.io
    AuthorizationPolicy,
    /// security.istio.io
    PeerAuthentication,
    /// security.istio.io
    RequestAuthentication,
    /// gateway.networking.k8s.io
    Gateway,
    /// gateway.networking.k8s.io
    HttpRoute,
    /// gateway.networking.k8s.io
    GrpcRoute,
    /// gateway.networking.k8s.io
    ReferenceGrant,
}

impl Kind {
    /// The kind of an `apiVersion` and `kind`; `None` for one the mesh does not read.
    #[must_use]
    pub fn of(api_version: &str, kind: &str) -> Option<Self> {
        let group = api_version.split_once('/').map_or("", |(group, _)| group);
        Some(match (group, kind) {
            ("", "Namespace") => Self::Namespace,
            ("", "Node") => Self::Node,
            ("", "Pod") => Self::Pod,
            ("", "ServiceAccount") => Self::ServiceAccount,
            ("", "Service") => Self::Service,
            ("discovery.k8s.io", "EndpointSlice") => Self::EndpointSlice,
            ("networking.istio.io", "WorkloadEntry") => Self::WorkloadEntry,
            ("networking.istio.io", "ServiceEntry") => Self::ServiceEntry,
            ("security.istio.io", "AuthorizationPolicy") => Self::AuthorizationPolicy,
            ("security.istio.io", "PeerAuthentication") => Self::PeerAuthentication,
            ("security.istio.io", "RequestAuthentication") => Self::RequestAuthentication,
            ("gateway.networking.k8s.io", "Gateway") => Self::Gateway,
            ("gateway.networking.k8s.io", "HTTPRoute") => Self::HttpRoute,
            ("gateway.networking.k8s.io", "GRPCRoute") => Self::GrpcRoute,
            ("gateway.networking.k8s.io", "ReferenceGrant") => Self::ReferenceGrant,
            _ => return None,
        })
    }

    /// Every kind.
    pub const ALL: &'static [Self] = &[
        Self::Namespace,
        Self::Node,
        Self::Pod,
        Self::ServiceAccount,
        Self::Service,
        Self::EndpointSlice,
        Self::WorkloadEntry,
        Self::ServiceEntry,
        Self::AuthorizationPolicy,
        Self::PeerAuthentication,
        Self::RequestAuthentication,
        Self::Gateway,
        Self::HttpRoute,
        Self::GrpcRoute,
        Self::ReferenceGrant,
    ];

    /// Those that refuse something, and fail closed when they cannot be read.
    pub const POLICIES: [Self; 3] =
        [Self::AuthorizationPolicy, Self::PeerAuthentication, Self::RequestAuthentication];

    /// The API group; empty for the core one.
    #[must_use]
    pub const fn group(self) -> &'static str {
        match self {
            Self::Namespace | Self::Node | Self::Pod | Self::ServiceAccount | Self::Service => "",
            Self::EndpointSlice => "discovery.k8s.io",
            Self::WorkloadEntry | Self::ServiceEntry => "networking.istio.io",
            Self::AuthorizationPolicy | Self::PeerAuthentication | Self::RequestAuthentication => {
                "security.istio.io"
            }
            Self::Gateway | Self::HttpRoute | Self::GrpcRoute | Self::ReferenceGrant => {
                gateway::GATEWAY_GROUP
            }
        }
    }

    /// The versions that are read, newest first.
    pub(crate) const fn versions(self) -> &'static [&'static str] {
        match self {
            Self::Namespace | Self::Node | Self::Pod | Self::ServiceAccount | Self::Service => {
                &["v1"]
            }
            Self::EndpointSlice => &["v1", "v1beta1"],
            Self::WorkloadEntry | Self::ServiceEntry => &["v1", "v1beta1", "v1alpha3"],
            Self::AuthorizationPolicy | Self::PeerAuthentication | Self::RequestAuthentication => {
                &["v1", "v1beta1"]
            }
            Self::Gateway | Self::HttpRoute | Self::ReferenceGrant => &["v1", "v1beta1"],
            Self::GrpcRoute => &["v1", "v1alpha2"],
        }
    }

    /// True for kinds that live in a namespace.
    #[must_use]
    pub const fn namespaced(self) -> bool {
        !matches!(self, Self::Namespace | Self::Node)
    }

    /// The kind's name in manifests.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Namespace => "Namespace",
            Self::Node => "Node",
            Self::Pod => "Pod",
            Self::ServiceAccount => "ServiceAccount",
            Self::Service => "Service",
            Self::EndpointSlice => "EndpointSlice",
            Self::WorkloadEntry => "WorkloadEntry",
            Self::ServiceEntry => "ServiceEntry",
            Self::AuthorizationPolicy => "AuthorizationPolicy",
            Self::PeerAuthentication => "PeerAuthentication",
            Self::RequestAuthentication => "RequestAuthentication",
            Self::Gateway => "Gateway",
            Self::HttpRoute => "HTTPRoute",
            Self::GrpcRoute => "GRPCRoute",
            Self::ReferenceGrant => "ReferenceGrant",
        }
    }
}

/// An object's key.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ObjectKey {
    /// Kind.
    pub kind: Kind,
    /// Namespace; empty for kinds that have none.
    pub namespace: Arc<str>,
    /// Name.
    pub name: Arc<str>,
}

impl fmt::Display for ObjectKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.kind.as_str())?;
        f.write_str(" ")?;
        if !self.namespace.is_empty() {
            write!(f, "{}/", self.namespace)?;
        }
        f.write_str(&self.name)
    }
}

/// A validated object.
#[derive(Clone, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "each variant is its kind")]
pub enum Object {
    Namespace(Arc<Namespace>),
    Node(Arc<Node>),
    Pod(Arc<Pod>),
    ServiceAccount(Arc<ServiceAccount>),
    Service(Arc<Service>),
    EndpointSlice(Arc<EndpointSlice>),
    WorkloadEntry(Arc<WorkloadEntry>),
    ServiceEntry(Arc<ServiceEntry>),
    AuthorizationPolicy(Arc<AuthorizationPolicy>),
    PeerAuthentication(Arc<PeerAuthentication>),
    RequestAuthentication(Arc<RequestAuthentication>),
    Gateway(Arc<Gateway>),
    HttpRoute(Arc<RouteObject>),
    GrpcRoute(Arc<RouteObject>),
    ReferenceGrant(Arc<ReferenceGrant>),
    /// Stands in the place of a security policy that cannot be read.
    Unreadable(Arc<UnreadablePolicy>),
}

impl Object {
    /// Its metadata.
    #[must_use]
    pub fn meta(&self) -> &Metadata {
        match self {
            Self::Namespace(object) => &object.meta,
            Self::Node(object) => &object.meta,
            Self::Pod(object) => &object.meta,
            Self::ServiceAccount(object) => &object.meta,
            Self::Service(object) => &object.meta,
            Self::EndpointSlice(object) => &object.meta,
            Self::WorkloadEntry(object) => &object.meta,
            Self::ServiceEntry(object) => &object.meta,
            Self::AuthorizationPolicy(object) => &object.meta,
            Self::PeerAuthentication(object) => &object.meta,
            Self::RequestAuthentication(object) => &object.meta,
            Self::Gateway(object) => &object.meta,
            Self::HttpRoute(object) | Self::GrpcRoute(object) => &object.meta,
            Self::ReferenceGrant(object) => &object.meta,
            Self::Unreadable(object) => &object.meta,
        }
    }

    /// Its kind.
    #[must_use]
    pub fn kind(&self) -> Kind {
        match self {
            Self::Namespace(_) => Kind::Namespace,
            Self::Node(_) => Kind::Node,
            Self::Pod(_) => Kind::Pod,
            Self::ServiceAccount(_) => Kind::ServiceAccount,
            Self::Service(_) => Kind::Service,
            Self::EndpointSlice(_) => Kind::EndpointSlice,
            Self::WorkloadEntry(_) => Kind::WorkloadEntry,
            Self::ServiceEntry(_) => Kind::ServiceEntry,
            Self::AuthorizationPolicy(_) => Kind::AuthorizationPolicy,
            Self::PeerAuthentication(_) => Kind::PeerAuthentication,
            Self::RequestAuthentication(_) => Kind::RequestAuthentication,
            Self::Gateway(_) => Kind::Gateway,
            Self::HttpRoute(_) => Kind::HttpRoute,
            Self::GrpcRoute(_) => Kind::GrpcRoute,
            Self::ReferenceGrant(_) => Kind::ReferenceGrant,
            Self::Unreadable(object) => object.kind,
        }
    }

    /// Its key.
    #[must_use]
    pub fn key(&self) -> ObjectKey {
        let meta = self.meta();
        ObjectKey { kind: self.kind(), namespace: meta.namespace.clone(), name: meta.name.clone() }
    }
}

/// What became of one object of a document.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Parsed {
    /// It is valid.
    Object(Arc<Object>),
    /// It is of a kind the mesh does not read.
    Ignored {
        /// `apiVersion` and `kind`.
        kind: String,
    },
    /// It is refused.
    Refused {
        /// Its key, as far as it can be read.
        key: Option<ObjectKey>,
        /// Why.
        reason: InvalidField,
        /// What can be read of it, when it is a security policy.
        unreadable: Option<Box<UnreadablePolicy>>,
    },
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawHeader {
    api_version: Option<String>,
    kind: Option<String>,
    #[serde(default)]
    metadata: metadata::RawMetadata,
}

/// Reads the objects of a document: one, or the items of a `List`. With each, the path to it inside the document.
#[must_use]
pub fn objects(value: &Value) -> Vec<(Vec<Segment>, Parsed)> {
    let is_list = value
        .get("kind")
        .and_then(Value::as_str)
        .is_some_and(|kind| kind.ends_with("List") && value.get("items").is_some());
    if !is_list {
        return vec![(Vec::new(), object(value))];
    }
    let Some(items) = value.get("items").and_then(Value::as_array) else {
        let reason = InvalidField::new("items", "not a list", "write a list of objects");
        return vec![(Vec::new(), Parsed::Refused { key: None, reason, unreadable: None })];
    };
    items
        .iter()
        .enumerate()
        .map(|(index, item)| {
            (vec![Segment::Key("items".into()), Segment::Index(index)], object(item))
        })
        .collect()
}

/// Reads one object, as a cluster's API or a manifest holds it.
#[must_use]
pub fn object(value: &Value) -> Parsed {
    let refused = |key, reason| Parsed::Refused {
        unreadable: UnreadablePolicy::of(value, &reason).map(Box::new),
        key,
        reason,
    };
    let header: RawHeader = match decode(value) {
        Ok(header) => header,
        Err(reason) => return refused(None, reason),
    };
    let (Some(api_version), Some(kind_name)) = (header.api_version, header.kind) else {
        let reason = InvalidField::new(
            "",
            "no apiVersion or kind",
            "this is no manifest; add both or move it away",
        );
        return refused(None, reason);
    };
    let Some(kind) = Kind::of(&api_version, &kind_name) else {
        return Parsed::Ignored { kind: format!("{api_version} {kind_name}") };
    };
    let meta = header.metadata;
    let key = meta.name().map(|name| ObjectKey {
        kind,
        namespace: if kind.namespaced() {
            meta.namespace().unwrap_or("default").into()
        } else {
            "".into()
        },
        name: name.into(),
    });
    let version = api_version.rsplit('/').next().unwrap_or_default();
    if !kind.versions().contains(&version) {
        let reason = InvalidField::new(
            "apiVersion",
            format!("version {version:?} of {kind_name} is not read"),
            format!("use one of {}", kind.versions().join(", ")),
        );
        return refused(key, reason);
    }
    match meta.parse(kind.namespaced()).and_then(|meta| body(kind, meta, value)) {
        Ok(object) => Parsed::Object(Arc::new(object)),
        Err(reason) => refused(key, reason),
    }
}

fn body(kind: Kind, meta: Metadata, value: &Value) -> Result<Object, InvalidField> {
    Ok(match kind {
        Kind::Namespace => Object::Namespace(Arc::new(Namespace::parse(meta)?)),
        Kind::Node => Object::Node(Arc::new(decode::<core::RawNode>(value)?.parse(meta)?)),
        Kind::ServiceAccount => Object::ServiceAccount(Arc::new(ServiceAccount { meta })),
        Kind::Pod => Object::Pod(Arc::new(decode::<pod::RawPod>(value)?.parse(meta)?)),
        Kind::Service => {
            Object::Service(Arc::new(decode::<service::RawService>(value)?.parse(meta)?))
        }
        Kind::EndpointSlice => Object::EndpointSlice(Arc::new(
            decode::<service::RawEndpointSlice>(value)?.parse(meta)?,
        )),
        Kind::WorkloadEntry => Object::WorkloadEntry(Arc::new(
            decode::<service_entry::RawWorkloadEntry>(value)?.parse(meta)?,
        )),
        Kind::ServiceEntry => Object::ServiceEntry(Arc::new(
            decode::<service_entry::RawServiceEntry>(value)?.parse(meta)?,
        )),
        Kind::AuthorizationPolicy => Object::AuthorizationPolicy(Arc::new(
            decode::<policy::RawAuthorizationPolicy>(value)?.parse(meta)?,
        )),
        Kind::PeerAuthentication => Object::PeerAuthentication(Arc::new(
            decode::<policy::RawPeerAuthentication>(value)?.parse(meta)?,
        )),
        Kind::RequestAuthentication => Object::RequestAuthentication(Arc::new(
            decode::<authentication::RawRequestAuthentication>(value)?.parse(meta)?,
        )),
        Kind::Gateway => {
            Object::Gateway(Arc::new(decode::<gateway::RawGateway>(value)?.parse(meta)?))
        }
        Kind::HttpRoute => {
            Object::HttpRoute(Arc::new(decode::<route::RawHttpRoute>(value)?.parse(meta)?))
        }
        Kind::GrpcRoute => {
            Object::GrpcRoute(Arc::new(decode::<route::RawGrpcRoute>(value)?.parse(meta)?))
        }
        Kind::ReferenceGrant => Object::ReferenceGrant(Arc::new(
            decode::<gateway::RawReferenceGrant>(value)?.parse(meta),
        )),
    })
}

fn decode<T: DeserializeOwned>(value: &Value) -> Result<T, InvalidField> {
    serde_path_to_error::deserialize(value).map_err(|error| {
        let path = error
            .path()
            .iter()
            .filter_map(|segment| match segment {
                serde_path_to_error::Segment::Seq { index } => Some(Segment::Index(*index)),
                serde_path_to_error::Segment::Map { key } => Some(Segment::Key(key.clone())),
                serde_path_to_error::Segment::Enum { variant } => Some(Segment::Key(variant.clone())),
                serde_path_to_error::Segment::Unknown => None,
            })
            .collect();
        let problem = error.inner().to_string();
        let remedy = if problem.starts_with("unknown field") {
            "remove the field or correct its name: what is not understood would make the policy mean something else"
        } else {
            "correct the field's type; text that looks like a number or a boolean needs quotes"
        };
        InvalidField { path, problem, remedy: remedy.to_owned() }
    })
}
