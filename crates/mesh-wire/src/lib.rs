//! The protobufs between controllers and agents, and their conversion to and from the domain types.
#![forbid(unsafe_code)]

pub mod pb;
