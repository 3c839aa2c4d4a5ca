//! One stream, one plain relay, written down.

use std::sync::Arc;
use std::time::Instant;

use super::{FieldState, HandOverError, KeyState, WindowState, ahead, check, later};
use crate::event::{RelayBytes, TunnelKey};
use crate::frame::MAX_STREAM_ID;
use crate::head::{ConnectHead, ResponseHead};
use crate::io::SockId;
use crate::queue::ByteQueue;
use crate::stream::{Flags, Opening, Phase, Setup, Side, Stream};
use crate::window::{ReceiveWindow, SendWindow};

/// A [`Stream`] that has an application's socket.
#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct StreamState {
    #[prost(uint64, tag = "1")]
    pub(crate) name: u64,
    #[prost(uint64, tag = "2")]
    pub(crate) app: u64,
    /// We sent the CONNECT.
    #[prost(bool, tag = "3")]
    client: bool,
    /// 1 waiting, 2 asked, 3 connecting, 4 open.
    #[prost(uint32, tag = "4")]
    phase: u32,
    #[prost(uint64, tag = "5")]
    tunnel: u64,
    #[prost(uint32, tag = "6")]
    id: u32,
    #[prost(sint64, tag = "7")]
    send_window: i64,
    #[prost(message, optional, tag = "8")]
    receive_window: Option<WindowState>,
    #[prost(bytes = "vec", tag = "9")]
    queue: Vec<u8>,
    #[prost(uint64, tag = "10")]
    withheld: u64,
    #[prost(uint64, tag = "11")]
    to_app: u64,
    #[prost(uint64, tag = "12")]
    from_app: u64,
    #[prost(message, optional, tag = "13")]
    opening: Option<OpeningState>,
    #[prost(message, optional, tag = "14")]
    response: Option<ResponseState>,
    #[prost(uint64, optional, tag = "15")]
    deadline_in: Option<u64>,
    /// [`flag`]s.
    #[prost(uint32, tag = "16")]
    flags: u32,
}

/// An [`Opening`].
#[derive(Clone, PartialEq, prost::Message)]
struct OpeningState {
    #[prost(message, optional, tag = "1")]
    key: Option<KeyState>,
    #[prost(string, tag = "2")]
    authority: String,
    #[prost(string, optional, tag = "3")]
    baggage: Option<String>,
    #[prost(string, optional, tag = "4")]
    forwarded: Option<String>,
    #[prost(string, optional, tag = "5")]
    traceparent: Option<String>,
    #[prost(string, optional, tag = "6")]
    forwarded_network: Option<String>,
    #[prost(string, optional, tag = "7")]
    istio_source: Option<String>,
    #[prost(message, repeated, tag = "8")]
    extensions: Vec<FieldState>,
    #[prost(uint32, tag = "9")]
    attempts: u32,
    #[prost(bytes = "vec", tag = "10")]
    early: Vec<u8>,
    #[prost(uint64, tag = "11")]
    early_sent: u64,
    #[prost(bool, tag = "12")]
    answered: bool,
}

/// A [`ResponseHead`].
#[derive(Clone, PartialEq, prost::Message)]
struct ResponseState {
    #[prost(string, optional, tag = "1")]
    baggage: Option<String>,
    #[prost(message, repeated, tag = "2")]
    extensions: Vec<FieldState>,
}

/// Bits of [`StreamState::flags`] and [`LaneState::flags`].
mod flag {
    pub(super) const READ_CLOSED: u32 = 1;
    pub(super) const FAILED: u32 = 1 << 1;
    pub(super) const APP_ENDED: u32 = 1 << 2;
    pub(super) const END_SENT: u32 = 1 << 3;
    pub(super) const END_SEEN: u32 = 1 << 4;
    pub(super) const END_RECEIVED: u32 = 1 << 5;
    pub(super) const SHUT: u32 = 1 << 6;
    pub(super) const DETACHED: u32 = 1 << 7;
    pub(super) const PEER_GONE: u32 = 1 << 8;
}

fn bits(flags: &[(bool, u32)]) -> u32 {
    flags.iter().filter(|(set, _)| *set).map(|(_, bit)| bit).sum()
}

impl StreamState {
    /// `None` for a request that nobody has answered: it has no application.
    pub(crate) fn of(name: u64, stream: &Stream, now: Instant) -> Option<Self> {
        let phase = match stream.phase {
            Phase::Requested => return None,
            Phase::Waiting => 1,
            Phase::Asked => 2,
            Phase::Connecting => 3,
            Phase::Open => 4,
        };
        let Flags {
            read_closed,
            failed,
            app_ended,
            end_sent,
            end_seen,
            end_received,
            shut,
            detached,
            peer_gone,
            // What the successor finds out by itself.
            readable: _,
            writable: _,
            urgent: _,
            bulk: _,
            in_round: _,
            in_attention: _,
        } = stream.flags;
        let (mut opening, mut response) = (None, None);
        match &stream.setup {
            Setup::Opening(setup) => opening = Some(OpeningState::from(&**setup)),
            Setup::Response(head) => {
                response = Some(ResponseState {
                    baggage: head.baggage.clone(),
                    extensions: FieldState::all(&head.extensions),
                });
            }
            Setup::Done => {}
        }
        Some(Self {
            name,
            app: stream.app?.0,
            client: stream.side == Side::Client,
            phase,
            tunnel: stream.tunnel,
            id: stream.id,
            send_window: stream.send_window.state(),
            receive_window: Some(stream.receive_window.state()),
            queue: stream.queue.as_slice().to_vec(),
            withheld: stream.withheld as u64,
            to_app: stream.bytes.to_app,
            from_app: stream.bytes.from_app,
            opening,
            response,
            deadline_in: stream.deadline.map(|at| ahead(at, now)),
            flags: bits(&[
                (read_closed, flag::READ_CLOSED),
                (failed, flag::FAILED),
                (app_ended, flag::APP_ENDED),
                (end_sent, flag::END_SENT),
                (end_seen, flag::END_SEEN),
                (end_received, flag::END_RECEIVED),
                (shut, flag::SHUT),
                (detached, flag::DETACHED),
                (peer_gone, flag::PEER_GONE),
            ]),
        })
    }

    /// The stream again; a socket is taken to be ready for everything, as a new one is.
    pub(crate) fn stream(self, app: SockId, now: Instant) -> Result<Stream, HandOverError> {
        let has = |bit: u32| self.flags & bit != 0;
        let flags = Flags {
            readable: !has(flag::END_SENT),
            writable: true,
            read_closed: has(flag::READ_CLOSED),
            failed: has(flag::FAILED),
            urgent: false,
            bulk: false,
            in_round: false,
            in_attention: false,
            app_ended: has(flag::APP_ENDED),
            end_sent: has(flag::END_SENT),
            end_seen: has(flag::END_SEEN),
            end_received: has(flag::END_RECEIVED),
            shut: has(flag::SHUT),
            detached: has(flag::DETACHED),
            peer_gone: has(flag::PEER_GONE),
        };
        let side = if self.client { Side::Client } else { Side::Server };
        let phase = match (self.phase, side) {
            (1, Side::Client) => Phase::Waiting,
            (2, Side::Client) => Phase::Asked,
            (3, Side::Server) => Phase::Connecting,
            (4, _) => Phase::Open,
            _ => return Err(HandOverError::Inconsistent("a stream's phase")),
        };
        let setup = match (self.opening, self.response) {
            (Some(opening), None) if self.client => Setup::Opening(Box::new(opening.opening()?)),
            (None, Some(head)) if phase == Phase::Connecting => {
                Setup::Response(Box::new(ResponseHead {
                    baggage: head.baggage,
                    extensions: FieldState::pairs(head.extensions),
                }))
            }
            (None, None) if phase == Phase::Open => Setup::Done,
            _ => return Err(HandOverError::Inconsistent("a stream's setup")),
        };
        check(self.id <= MAX_STREAM_ID, "a stream id")?;
        check(self.withheld <= self.queue.len() as u64, "a stream's withheld credit")?;
        let mut queue = ByteQueue::default();
        queue.push(&self.queue);
        Ok(Stream {
            side,
            phase,
            app: Some(app),
            tunnel: self.tunnel,
            id: self.id,
            send_window: SendWindow::from_state(self.send_window)?,
            receive_window: ReceiveWindow::from_state(
                self.receive_window.ok_or(HandOverError::Inconsistent("a stream's window"))?,
            )?,
            queue,
            withheld: usize::try_from(self.withheld).unwrap_or(0),
            bytes: RelayBytes { to_app: self.to_app, from_app: self.from_app },
            setup,
            deadline: self.deadline_in.and_then(|ahead| later(ahead, now)),
            flags,
        })
    }
}

impl From<&Opening> for OpeningState {
    fn from(opening: &Opening) -> Self {
        let head = &opening.head;
        Self {
            key: Some(KeyState::from(&*opening.key)),
            authority: head.authority.clone(),
            baggage: head.baggage.clone(),
            forwarded: head.forwarded.clone(),
            traceparent: head.traceparent.clone(),
            forwarded_network: head.forwarded_network.clone(),
            istio_source: head.istio_source.clone(),
            extensions: FieldState::all(&head.extensions),
            attempts: u32::from(opening.attempts),
            early: opening.early.clone(),
            early_sent: opening.early_sent as u64,
            answered: opening.answered,
        }
    }
}

impl OpeningState {
    fn opening(self) -> Result<Opening, HandOverError> {
        let key = self.key.as_ref().ok_or(HandOverError::Inconsistent("an open without a key"))?;
        check(self.early_sent <= self.early.len() as u64, "bytes sent before they were read")?;
        Ok(Opening {
            key: Arc::new(TunnelKey::try_from(key)?),
            head: ConnectHead {
                authority: self.authority,
                baggage: self.baggage,
                forwarded: self.forwarded,
                traceparent: self.traceparent,
                forwarded_network: self.forwarded_network,
                istio_source: self.istio_source,
                extensions: FieldState::pairs(self.extensions),
            },
            attempts: u8::try_from(self.attempts).unwrap_or(u8::MAX),
            early_sent: usize::try_from(self.early_sent).unwrap_or(0),
            early: self.early,
            answered: self.answered,
        })
    }
}

/// A [`Splice`](crate::splice::Splice).
#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct SpliceState {
    #[prost(uint64, tag = "1")]
    pub(crate) name: u64,
    #[prost(uint64, tag = "2")]
    pub(crate) app: u64,
    #[prost(uint64, tag = "3")]
    pub(crate) upstream: u64,
    #[prost(bool, tag = "4")]
    pub(crate) connecting: bool,
    #[prost(uint64, optional, tag = "5")]
    pub(crate) deadline_in: Option<u64>,
    #[prost(bool, tag = "6")]
    pub(crate) app_failed: bool,
    #[prost(bool, tag = "7")]
    pub(crate) upstream_failed: bool,
    #[prost(message, optional, tag = "8")]
    pub(crate) out: Option<LaneState>,
    #[prost(message, optional, tag = "9")]
    pub(crate) back: Option<LaneState>,
}

/// One direction of it.
#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct LaneState {
    #[prost(bytes = "vec", tag = "1")]
    pub(crate) queue: Vec<u8>,
    #[prost(bool, tag = "2")]
    pub(crate) read_closed: bool,
    #[prost(bool, tag = "3")]
    pub(crate) ended: bool,
    #[prost(bool, tag = "4")]
    pub(crate) shut: bool,
    #[prost(uint64, tag = "5")]
    pub(crate) bytes: u64,
}
