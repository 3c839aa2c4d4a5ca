//! Capture in the running kernel: real namespaces, real sockets. Needs root.

mod adoption;
mod dns;
mod enrolment;
mod guard;
mod inbound;
mod lab;
mod outbound;
