//! One CONNECT stream and its application socket.
//!
//! ```text
//!  client:  Waiting ──placed──► Asked ──200──► Open          server:  Requested ──accept──► Connecting ──200──► Open
//!              ▲                  │                                       │                     │
//!              └── not processed ─┘ (GOAWAY, REFUSED_STREAM)              └── refuse, reset ────┴──► gone
//! ```
//! Open ends when both directions have ended, or at once by a reset of either side.

use std::sync::Arc;
use std::time::Instant;

use crate::event::{RelayBytes, TunnelKey};
use crate::head::{ConnectHead, ResponseHead};
use crate::io::SockId;
use crate::queue::ByteQueue;
use crate::window::{ReceiveWindow, SendWindow};

/// Which end of the tunnel's stream we are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Side {
    /// We sent the CONNECT; the application is the client.
    Client,
    /// We answer it; the application is the server.
    Server,
}

/// Where a stream is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Phase {
    /// Client: no tunnel yet.
    Waiting,
    /// Client: CONNECT sent.
    Asked,
    /// Server: the shell has not answered yet; no application socket.
    Requested,
    /// Server: the application socket is connecting.
    Connecting,
    /// Bytes flow.
    Open,
}

/// What a client stream needs until its first flight can no longer have to be repeated.
#[derive(Debug)]
pub(crate) struct Opening {
    pub(crate) key: Arc<TunnelKey>,
    pub(crate) head: ConnectHead,
    /// CONNECTs sent.
    pub(crate) attempts: u8,
    /// Bytes taken from the application before the peer's answer.
    pub(crate) early: Vec<u8>,
    /// How many of them went out on the present tunnel.
    pub(crate) early_sent: usize,
    /// The peer has answered 200: once all of `early` is out, this is dropped.
    pub(crate) answered: bool,
}

/// What is kept only while a stream is being set up.
#[derive(Debug)]
pub(crate) enum Setup {
    /// Of a client.
    Opening(Box<Opening>),
    /// Of a server: what goes with the 200.
    Response(Box<ResponseHead>),
    /// Nothing.
    Done,
}

/// A stream. Small: an idle one is this and its entries in two maps.
#[derive(Debug)]
pub(crate) struct Stream {
    pub(crate) side: Side,
    pub(crate) phase: Phase,
    /// The application's socket; `None` only while `Requested`.
    pub(crate) app: Option<SockId>,
    pub(crate) tunnel: u64,
    pub(crate) id: u32,
    pub(crate) send_window: SendWindow,
    pub(crate) receive_window: ReceiveWindow,
    /// Bytes from the tunnel that the application has not taken.
    pub(crate) queue: ByteQueue,
    /// How many of them the tunnel's window still counts.
    pub(crate) withheld: usize,
    pub(crate) bytes: RelayBytes,
    pub(crate) setup: Setup,
    /// When a connect, or the peer's answer, has taken too long.
    pub(crate) deadline: Option<Instant>,
    pub(crate) flags: Flags,
}

/// The small facts of a stream.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Flags {
    /// The application socket may have bytes.
    pub(crate) readable: bool,
    /// It may take bytes.
    pub(crate) writable: bool,
    /// Its peer has sent FIN: a short read is no proof that all was read.
    pub(crate) read_closed: bool,
    /// Its peer has sent urgent data, at which reads stop short: neither is it then.
    pub(crate) urgent: bool,
    /// It has failed and takes nothing more; what it had said before is still read.
    pub(crate) failed: bool,
    /// The last read filled all it was offered: offer more.
    pub(crate) bulk: bool,
    /// In its tunnel's round of ready streams.
    pub(crate) in_round: bool,
    /// In the engine's list of sockets to look at.
    pub(crate) in_attention: bool,
    /// The application has ended its direction.
    pub(crate) app_ended: bool,
    /// END_STREAM has been sent.
    pub(crate) end_sent: bool,
    /// A DATA frame with END_STREAM has been read; what is before it may still be on its way to the application.
    pub(crate) end_seen: bool,
    /// END_STREAM has been received.
    pub(crate) end_received: bool,
    /// The application has been told of it.
    pub(crate) shut: bool,
    /// No longer a stream of its tunnel: both ends have ended, only the queue is to be delivered.
    pub(crate) detached: bool,
    /// The peer reads no more, but all it sent is still to be delivered.
    pub(crate) peer_gone: bool,
}

impl Stream {
    pub(crate) fn opening(&self) -> Option<&Opening> {
        match &self.setup {
            Setup::Opening(opening) => Some(opening),
            Setup::Response(_) | Setup::Done => None,
        }
    }

    pub(crate) fn opening_mut(&mut self) -> Option<&mut Opening> {
        match &mut self.setup {
            Setup::Opening(opening) => Some(opening),
            Setup::Response(_) | Setup::Done => None,
        }
    }

    /// Early bytes that have yet to be sent (again) on the present tunnel.
    pub(crate) fn early_left(&self) -> usize {
        self.opening().map_or(0, |opening| opening.early.len() - opening.early_sent)
    }

    /// Bytes that may be read from the application now, apart from the windows.
    pub(crate) fn appetite(&self, early_limit: usize, quantum: usize) -> usize {
        if self.flags.end_sent || self.flags.peer_gone || self.flags.app_ended {
            return 0;
        }
        match self.phase {
            Phase::Open => quantum,
            Phase::Asked => {
                let taken = self.opening().map_or(0, |opening| opening.early.len());
                early_limit.saturating_sub(taken).min(quantum)
            }
            Phase::Waiting | Phase::Requested | Phase::Connecting => 0,
        }
    }

    /// True when there is something to do for it in its tunnel's round.
    pub(crate) fn wants_turn(&self, early_limit: usize) -> bool {
        if self.flags.peer_gone || !matches!(self.phase, Phase::Open | Phase::Asked) {
            return false;
        }
        if self.early_left() > 0 {
            return self.send_window.available() > 0;
        }
        if self.flags.app_ended {
            return !self.flags.end_sent;
        }
        self.flags.readable && self.send_window.available() > 0 && self.appetite(early_limit, 1) > 0
    }
}

impl Flags {
    /// Whether a read that came back short has read all there was.
    pub(crate) const fn short_is_all(self) -> bool {
        !(self.read_closed || self.urgent || self.failed)
    }
}

/// An idle stream's share of the engine's memory. Source: the goal of 300 bytes in DESIGN §11.
const _: () = assert!(size_of::<Stream>() <= 208);
