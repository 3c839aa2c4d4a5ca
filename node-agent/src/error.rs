//! Errors as one line of text.

pub(crate) use mesh_model::error_chain;
