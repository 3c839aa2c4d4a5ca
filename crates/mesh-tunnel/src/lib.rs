//! The tunnel engine: TLS 1.3 records, CONNECT-only HTTP/2, streams and pool; no I/O of its own.
//!
//! One [`Engine`] runs on one thread. It is told what happened ([`Engine::on_event`], the commands), does its work in
//! [`Engine::turn`] through the caller's [`Io`], says what the shell must do ([`Engine::poll_event`]) and when it wants to be
//! called again ([`Engine::poll_timeout`]). It reads no clock, opens no socket and keeps no closure: all of its state is data.
//!
//! What it carries:
//! - *tunnel relays*: an application socket and one CONNECT stream of a tunnel ([`Engine::open`], [`Engine::accept`]);
//! - *plain relays*: two sockets ([`Engine::splice`]).
//!
//! Either begins by spending a [`Permit`](mesh_authorize::Permit). An end of one direction is passed on as an end of that
//! direction, a reset as a reset, and what cannot be delivered is a reset, never an early end.
//!
//! The byte path makes no copy but those of the kernel: bytes are read from the application into their places in the records
//! to be, sealed there and written; a tunnel is read in large pieces, opened in place, and the payloads go to the application
//! from there. Only an application that does not read costs a copy, into its stream's queue, bounded by the stream's window.
//! Buffers belong to the engine and are lent to tunnels that have bytes under way: idle tunnels and streams own none.

#![forbid(unsafe_code)]

mod config;
mod engine;
mod event;
mod flood;
mod frame;
mod frame_reader;
mod handover;
mod head;
mod hpack;
mod huffman;
mod io;
mod outbox;
mod pool;
mod post_handshake;
mod queue;
mod record;
mod session;
mod slab;
mod splice;
mod stream;
mod timer;
mod tunnel;
mod window;

pub use config::EngineConfig;
pub use engine::{Engine, EngineStats};
pub use event::{DialId, EngineEvent, RelayBytes, RelayId, RequestId, Retire, TunnelId, TunnelKey};
pub use handover::{FORMAT as HAND_OVER_FORMAT, HandOverError};
pub use head::{ConnectHead, ResponseHead};
pub use io::{Io, Readiness, SockId};
pub use session::{InvalidSecret, Suite, TlsSession, TrafficSecret};

/// The protocol layers below the engine, for tests, fuzzing and tools.
pub mod wire {
    pub use crate::frame::{ErrorCode, FrameHeader, FrameKind};
    pub use crate::frame_reader::{FrameEvent, FrameReader};
    pub use crate::hpack::{Decoder, Encoder, HpackError, StaticName};
    pub use crate::post_handshake::{PostHandshake, PostHandshakeMessage};
    pub use crate::record::{
        Alert, ContentType, HEADER, MAX_CIPHERTEXT, MAX_PLAINTEXT, MAX_RECORD, RecordError,
        RecordKey, TAIL, record_len,
    };
}
