//! The node's agent, as a library: `culvert-agent` and the tests are built on it.

pub mod dataplane;
