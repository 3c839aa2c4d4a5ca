//! Capture in the running kernel: real namespaces, real sockets. Needs root.
#![expect(clippy::unwrap_used, reason = "a failing call of the lab is a failed test")]

mod adoption;
mod direct;
mod dns;
mod enrolment;
mod guard;
mod hostile;
mod inbound;
mod kept;
mod lab;
mod outbound;
mod probes;
mod services;
mod sniffer;
