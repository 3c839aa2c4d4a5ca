//! The agent's side of the controller: what it says becomes the data plane's picture and the pods' settings.

pub(crate) mod ads;
pub(crate) mod pods;
pub(crate) mod report;
pub(crate) mod saved;
pub(crate) mod world;

pub(crate) use mesh_control::{backoff, session};
