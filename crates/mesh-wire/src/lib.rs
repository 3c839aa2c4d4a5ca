//! The protobufs between controllers and agents, and their conversion to and from the domain types.
//!
//! Wire types stop here: whoever receives one asks for a [`Resource`], which is valid or not there. One resource that
//! does not convert is refused by itself, with its field and a remedy; the others of the response are applied.
//!
//! The delta xDS conversation is two cores without I/O: [`DeltaClientState`] and [`DeltaServerState`].

#![forbid(unsafe_code)]

mod address;
mod certificate;
mod client;
mod config;
mod error;
mod kind;
mod node;
pub mod pb;
mod policy;
mod resource;
mod server;
mod service;
mod version;
mod waypoint;
mod workload;

pub use certificate::{certificate_request, impersonated_identity};
pub use client::{DeltaClientState, RejectedResource, RemovedResource, UnexpectedResponse, Update};
pub use config::{MESH_CONFIG_NAME, MeshConfig, PodConfig, PodMode, TrafficFilter};
pub use error::{InvalidResource, Problem};
pub use kind::ResourceKind;
pub use node::{NodeIdentity, node_name};
pub use resource::{Published, Resource};
pub use server::{DeltaServerState, InvalidRequest, NodeView, Received};
pub use waypoint::{
    AppProtocol, FrontendConfig, FrontendPortConfig, waypoint_node, waypoint_of_node,
};

/// Largest gRPC message either side accepts, bytes. A response holds everything that changed at once, so that it is
/// applied at once; 200 MiB is what ztunnel accepts as well.
pub const MAX_MESSAGE_BYTES: usize = 200 * 1024 * 1024;
