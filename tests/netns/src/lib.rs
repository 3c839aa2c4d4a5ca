//! The lab: a small mesh on one machine, made of what real nodes are made of.
//!
//! A [`Lab`] is a wire (a bridge in a namespace of its own), nodes on it (a namespace each, with an agent), a
//! controller with a directory of manifests, and pods: network namespaces made by the standard CNI plugins,
//! chained with Culvert's own. Programs run in pods as they would in containers. Everything carries the lab's
//! name, so that several labs stand side by side, and goes away when the value is dropped.
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "a test tool that talks to people")]

pub mod clients;
pub mod cni;
pub mod lab;
pub mod manifest;
pub mod net;
pub mod node;
pub mod peer;
pub mod pod;
pub mod process;
pub mod servers;
pub mod sniff;
pub mod traffic;
pub mod trials;
pub mod wait;

pub use clients::{Held, Live};
pub use lab::{Lab, LabConfig};
pub use node::Node;
pub use pod::{Pod, PodSpec};
pub use process::{Finished, Process};
pub use sniff::Sniffer;
pub use traffic::Traffic;
