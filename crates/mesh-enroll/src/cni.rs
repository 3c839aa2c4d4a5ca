//! The CNI plugin's decisions, as plain functions: what the runtime said goes in, what to ask the agent or to print comes out.
//!
//! Source: CNI specification 1.1.0. The plugin is always chained: it changes nothing in the result it is handed, and lets a
//! pod start only when the agent has captured it or has said that the pod is none of the mesh's.

pub mod config;
pub mod conflist;
pub mod environment;
pub mod error;
pub mod plan;
pub mod previous;

pub use config::Config;
pub use environment::{Environment, Verb};
pub use error::{CniError, Code};
pub use plan::{AskError, Ending, Plan, Question, conclude, plan};

/// The specification versions this plugin speaks, oldest first.
pub const SUPPORTED_VERSIONS: [&str; 3] = ["0.4.0", "1.0.0", "1.1.0"];
