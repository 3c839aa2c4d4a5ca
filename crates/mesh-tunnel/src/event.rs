//! Names the engine gives to things, and what it tells the shell.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use mesh_model::{CloseReason, PodUid, SpiffeId, WorkloadUid};

use crate::head::ConnectHead;

/// One application connection in the engine: a tunnel's stream or a plain relay.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RelayId(pub(crate) u64);

impl RelayId {
    /// The number of it, for logs and maps; never given twice by one engine.
    #[must_use]
    pub const fn get(self) -> u64 {
        self.0
    }

    /// The relay that a predecessor's engine called so; for [`Engine::take_over`](crate::Engine::take_over).
    #[must_use]
    pub const fn handed_over(number: u64) -> Self {
        Self(number)
    }
}

/// One TLS connection with its HTTP/2 session.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TunnelId(pub(crate) u64);

impl TunnelId {
    /// The number of it, for logs and maps; never given twice by one engine.
    #[must_use]
    pub const fn get(self) -> u64 {
        self.0
    }

    /// The tunnel that a predecessor's engine called so; for [`Engine::take_over`](crate::Engine::take_over).
    #[must_use]
    pub const fn handed_over(number: u64) -> Self {
        Self(number)
    }
}

/// One attempt of the shell to connect and shake hands for a [`TunnelKey`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct DialId(pub(crate) u64);

impl DialId {
    /// The number of it, for logs and maps; never given twice by one engine.
    #[must_use]
    pub const fn get(self) -> u64 {
        self.0
    }
}

/// One CONNECT of a peer, until it is accepted or refused. The relay it becomes has the same number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RequestId(pub(crate) u64);

impl RequestId {
    /// The relay that [`accept`](crate::Engine::accept) makes of this request.
    #[must_use]
    pub const fn relay(self) -> RelayId {
        RelayId(self.0)
    }
}

/// What makes two flows share a tunnel: all of it must be equal.
///
/// The workload's uid is part of it, so that a reused pod IP never receives a stream meant for its predecessor.
/// Source: wire.md §1.8 has source, identities, address; pod and uid are Culvert's.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TunnelKey {
    /// The pod whose network namespace the tunnel starts in.
    pub pod: PodUid,
    /// The identity shown to the peer.
    pub source: SpiffeId,
    /// The address the tunnel is dialled from.
    pub source_ip: IpAddr,
    /// Where the tunnel goes.
    pub next_hop: SocketAddr,
    /// The workload that is meant.
    pub target_uid: WorkloadUid,
    /// The identities of which the peer must prove one.
    pub expected: Vec<SpiffeId>,
}

/// Bytes of the application carried by one relay so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RelayBytes {
    /// Taken by the `app` socket.
    pub to_app: u64,
    /// Read from the `app` socket.
    pub from_app: u64,
}

/// Which tunnels [`retire`](crate::Engine::retire) means.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Retire {
    /// One.
    Tunnel(TunnelId),
    /// Those of one enrolled pod, both as client and as server; opens that wait for a dial still get one.
    Pod(PodUid),
    /// Those dialled to one workload; opens that wait for a dial to it fail.
    Target(WorkloadUid),
    /// All; opens that wait for a dial fail as drained.
    All,
}

/// What the shell must do or know. Drain with [`poll_event`](crate::Engine::poll_event) after each
/// [`turn`](crate::Engine::turn) and each command.
#[derive(Debug)]
#[non_exhaustive]
pub enum EngineEvent {
    /// Connect and shake hands for `key`, then call `dial_succeeded` or `dial_failed`.
    Dial {
        /// To be named in the answer.
        dial: DialId,
        /// Where to and as whom.
        key: Arc<TunnelKey>,
    },
    /// A peer asks for a connection: answer by `accept` or `refuse`.
    Request {
        /// To be named in the answer.
        request: RequestId,
        /// The tunnel it came through.
        tunnel: TunnelId,
        /// What was asked.
        head: Box<ConnectHead>,
    },
    /// The peer took an unanswered request back, or its tunnel ended. `accept` for it now closes at once.
    RequestGone {
        /// Which.
        request: RequestId,
    },
    /// Both ends are connected: the peer has answered 200, the application socket has connected.
    Established {
        /// Which.
        relay: RelayId,
        /// The destination's description of itself, if the peer sent one (outbound only).
        baggage: Option<String>,
    },
    /// The relay has ended; said exactly once for each relay.
    Closed {
        /// Which.
        relay: RelayId,
        /// Why.
        reason: CloseReason,
        /// The system's number of the error for which the application socket did not connect, where it gave one.
        connect_error: Option<i32>,
        /// The final counts.
        bytes: RelayBytes,
    },
    /// The tunnel has ended and none of its streams is left; said exactly once for each tunnel.
    TunnelClosed {
        /// Which.
        tunnel: TunnelId,
        /// Why; [`CloseReason::Complete`] after a drain or an idle time.
        reason: CloseReason,
    },
}
