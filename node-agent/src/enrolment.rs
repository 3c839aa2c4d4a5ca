//! Enrolment: how a pod enters the mesh and leaves it.

pub(crate) mod attachment;
pub(crate) mod closed;
pub(crate) mod desk;
pub(crate) mod discover;
pub(crate) mod enroller;
pub(crate) mod error;
pub(crate) mod namespace;
pub(crate) mod netlink;
pub(crate) mod phases;
pub(crate) mod reconcile;
pub(crate) mod record;
pub(crate) mod search;
pub(crate) mod server;
pub(crate) mod squatter;
pub(crate) mod sysctl;

#[cfg(test)]
pub(crate) mod tests;
