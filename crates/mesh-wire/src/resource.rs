//! A resource of any kind, and its published form.

use std::sync::Arc;

use mesh_authorize::Policy;
use mesh_jwt::RequestAuthentication;
use mesh_model::{Service, Workload};
use mesh_route::Route;
use prost::Message as _;
use prost_types::Any;

use crate::config::{MESH_CONFIG_NAME, MeshConfig, PodConfig};
use crate::error::{InvalidResource, Problem};
use crate::kind::ResourceKind;
use crate::pb::{discovery, mesh, security, workload};
use crate::version::version_of;
use crate::waypoint::{self, FrontendConfig};

/// A valid resource of any kind.
#[derive(Clone, Debug, PartialEq)]
pub enum Resource {
    /// Settings of the mesh.
    Mesh(MeshConfig),
    /// Settings of a pod of this node.
    Pod(PodConfig),
    /// A policy.
    Policy(Policy),
    /// A workload.
    Workload(Workload),
    /// A service.
    Service(Service),
    /// What the asking waypoint serves.
    Frontend(FrontendConfig),
    /// A route of the asking waypoint.
    Route(Box<Route>),
    /// What tokens count at the asking waypoint.
    Authentication(Box<RequestAuthentication>),
}

impl Resource {
    /// Its kind.
    #[must_use]
    pub const fn kind(&self) -> ResourceKind {
        match self {
            Self::Mesh(_) => ResourceKind::Mesh,
            Self::Pod(_) => ResourceKind::Pod,
            Self::Policy(_) => ResourceKind::Authorization,
            Self::Workload(_) | Self::Service(_) => ResourceKind::Address,
            Self::Frontend(_) => ResourceKind::Frontend,
            Self::Route(_) => ResourceKind::Route,
            Self::Authentication(_) => ResourceKind::Authentication,
        }
    }

    /// Its name on the wire: a workload's uid, `namespace/hostname`, `namespace/name`, `Kind namespace/name`, or `mesh`.
    #[must_use]
    pub fn name(&self) -> String {
        match self {
            Self::Mesh(_) => MESH_CONFIG_NAME.to_owned(),
            Self::Pod(config) => config.uid.as_str().to_owned(),
            Self::Policy(policy) => policy.name.to_string(),
            Self::Workload(workload) => workload.uid.as_str().to_owned(),
            Self::Service(service) => service.key.to_string(),
            Self::Frontend(config) => waypoint::frontend_name(&config.frontend),
            Self::Route(route) => route.name.to_string(),
            Self::Authentication(one) => format!("{}/{}", one.namespace, one.name),
        }
    }

    /// Converts one resource of a response of `kind`.
    ///
    /// # Errors
    /// When it has no content, content of another type, content that does not convert, or bears a name that is not
    /// its content's.
    pub fn decode(kind: ResourceKind, wire: &discovery::Resource) -> Result<Self, InvalidResource> {
        let any = wire
            .resource
            .as_ref()
            .ok_or_else(|| InvalidResource::new("resource", Problem::Missing))?;
        if any.type_url != kind.type_url() {
            let type_url = any.type_url.clone();
            return Err(InvalidResource::new("resource", Problem::OtherType { type_url }));
        }
        let resource = Self::decode_content(kind, &any.value)?;
        let content = resource.name();
        if content != wire.name {
            return Err(InvalidResource::new("name", Problem::OtherName { content }));
        }
        Ok(resource)
    }

    fn decode_content(kind: ResourceKind, bytes: &[u8]) -> Result<Self, InvalidResource> {
        fn message<M: prost::Message + Default>(bytes: &[u8]) -> Result<M, InvalidResource> {
            M::decode(bytes)
                .map_err(|_malformed| InvalidResource::new("resource", Problem::Undecodable))
        }
        Ok(match kind {
            ResourceKind::Mesh => {
                Self::Mesh(MeshConfig::try_from(&message::<mesh::MeshConfig>(bytes)?)?)
            }
            ResourceKind::Pod => {
                Self::Pod(PodConfig::try_from(&message::<mesh::PodConfig>(bytes)?)?)
            }
            ResourceKind::Authorization => {
                Self::Policy(Policy::try_from(&message::<security::Authorization>(bytes)?)?)
            }
            ResourceKind::Address => match message::<workload::Address>(bytes)?.r#type {
                Some(workload::address::Type::Workload(wire)) => {
                    Self::Workload(Workload::try_from(&wire)?)
                }
                Some(workload::address::Type::Service(wire)) => {
                    Self::Service(Service::try_from(&wire)?)
                }
                None => return Err(InvalidResource::new("type", Problem::Missing)),
            },
            ResourceKind::Frontend => {
                Self::Frontend(waypoint::from_json(&message::<mesh::Frontend>(bytes)?.json)?)
            }
            ResourceKind::Route => {
                Self::Route(waypoint::from_json(&message::<mesh::Route>(bytes)?.json)?)
            }
            ResourceKind::Authentication => Self::Authentication(waypoint::from_json(
                &message::<mesh::Authentication>(bytes)?.json,
            )?),
        })
    }

    fn encode_content(&self) -> Vec<u8> {
        match self {
            Self::Mesh(config) => mesh::MeshConfig::from(config).encode_to_vec(),
            Self::Pod(config) => mesh::PodConfig::from(config).encode_to_vec(),
            Self::Policy(policy) => security::Authorization::from(policy).encode_to_vec(),
            Self::Workload(workload) => {
                address(workload::address::Type::Workload(workload.into())).encode_to_vec()
            }
            Self::Service(service) => {
                address(workload::address::Type::Service(service.into())).encode_to_vec()
            }
            Self::Frontend(config) => {
                mesh::Frontend { json: waypoint::to_json(config) }.encode_to_vec()
            }
            Self::Route(route) => mesh::Route { json: waypoint::to_json(route) }.encode_to_vec(),
            Self::Authentication(one) => {
                mesh::Authentication { json: waypoint::to_json(one) }.encode_to_vec()
            }
        }
    }
}

const fn address(content: workload::address::Type) -> workload::Address {
    workload::Address { r#type: Some(content) }
}

/// What a resource is called, and which version of it this is: all that is remembered of it per agent, and so shared.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Label {
    pub(crate) name: Arc<str>,
    pub(crate) version: Arc<str>,
}

/// A resource encoded once, with its name and version, as it is sent to every agent that sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Published {
    kind: ResourceKind,
    label: Arc<Label>,
    content: Arc<[u8]>,
}

impl Published {
    /// Encodes `resource`; its version is a hash of its content.
    #[must_use]
    pub fn new(resource: &Resource) -> Self {
        let content = resource.encode_content();
        let version = version_of(&content);
        Self {
            kind: resource.kind(),
            label: Arc::new(Label { name: resource.name().into(), version }),
            content: content.into(),
        }
    }

    /// Its kind.
    #[must_use]
    pub const fn kind(&self) -> ResourceKind {
        self.kind
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &Arc<str> {
        &self.label.name
    }

    /// Its version.
    #[must_use]
    pub fn version(&self) -> &Arc<str> {
        &self.label.version
    }

    /// Both, to be kept.
    pub(crate) const fn label(&self) -> &Arc<Label> {
        &self.label
    }

    /// The message that carries it.
    #[must_use]
    pub fn to_wire(&self) -> discovery::Resource {
        self.to_wire_as(&self.label.version)
    }

    /// The message that carries it under the version that its sender gave it.
    pub(crate) fn to_wire_as(&self, version: &str) -> discovery::Resource {
        discovery::Resource {
            name: self.label.name.as_ref().to_owned(),
            version: version.to_owned(),
            resource: Some(Any {
                type_url: self.kind.type_url().to_owned(),
                value: self.content.to_vec(),
            }),
            ..Default::default()
        }
    }
}
