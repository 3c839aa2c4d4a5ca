//! The data path's I/O: pod network namespaces, sockets in them, TLS handshakes, and the driver of the tunnel engine.
//!
//! Deliberately boring. What a connection means is decided elsewhere: a [`driver::Handler`] decides, `mesh-tunnel`'s
//! engine moves the bytes, and this crate carries both to the kernel and back. No async runtime is involved.

pub mod driver;
pub mod handshake;
pub mod netns;
pub mod parcel;
pub mod socket;

pub use netns::Netns;

#[cfg(test)]
mod testing;
