//! The generated messages, clients and servers, under short names.

#[allow(
    missing_docs,
    unused_qualifications,
    unreachable_pub,
    unnameable_types,
    missing_debug_implementations,
    elided_lifetimes_in_paths,
    rustdoc::all,
    clippy::all,
    clippy::pedantic,
    clippy::nursery,
    clippy::restriction,
    reason = "generated"
)]
mod generated {
    include!(concat!(env!("OUT_DIR"), "/mesh_wire.rs"));
}

pub use generated::culvert::mesh::v1 as mesh;
pub use generated::envoy::service::discovery::v3 as discovery;
pub use generated::google::rpc;
pub use generated::istio::security;
pub use generated::istio::v1::auth;
pub use generated::istio::workload;
