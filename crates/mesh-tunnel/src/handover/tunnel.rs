//! One tunnel, written down.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Instant;

use mesh_model::PodUid;

use super::{
    DecoderState, FrameReaderState, HandOverError, KeyState, OutboxState, RecordKeyState,
    WindowState, age, ago, check,
};
use crate::config::EngineConfig;
use crate::event::TunnelKey;
use crate::frame::{MAX_STREAM_ID, MAX_WINDOW};
use crate::frame_reader::FrameReader;
use crate::hpack::Decoder;
use crate::io::SockId;
use crate::outbox::Outbox;
use crate::post_handshake::PostHandshake;
use crate::record::{MAX_RECORD, RecordKey};
use crate::tunnel::{GoawaySent, REMEMBERED, Role, Tunnel, TunnelPhase};
use crate::window::{ReceiveWindow, SendWindow};

/// A [`Tunnel`]. Its streams name it, not the other way round.
#[derive(Clone, PartialEq, prost::Message)]
#[prost(skip_debug)]
pub(crate) struct TunnelState {
    /// The name the engine has for it.
    #[prost(uint64, tag = "1")]
    pub(crate) name: u64,
    #[prost(uint64, tag = "2")]
    pub(crate) sock: u64,
    #[prost(string, tag = "3")]
    pod: String,
    /// Of a tunnel that we dialled.
    #[prost(message, optional, tag = "4")]
    client: Option<KeyState>,
    /// 0 up, 1 draining, 2 lingering, 3 lingering and the peer has ended too.
    #[prost(uint32, tag = "5")]
    phase: u32,
    #[prost(bool, tag = "6")]
    fin_sent: bool,
    #[prost(message, optional, tag = "7")]
    opener: Option<RecordKeyState>,
    #[prost(bool, tag = "8")]
    renewal_asked: bool,
    #[prost(bool, tag = "9")]
    renewal_owed: bool,
    #[prost(bytes = "vec", tag = "10")]
    post_handshake: Vec<u8>,
    #[prost(bytes = "vec", tag = "11")]
    leftover: Vec<u8>,
    #[prost(message, optional, tag = "12")]
    out: Option<OutboxState>,
    #[prost(message, optional, tag = "13")]
    reader: Option<FrameReaderState>,
    #[prost(message, optional, tag = "14")]
    decoder: Option<DecoderState>,
    /// The stream that the current DATA frame is for.
    #[prost(uint64, optional, tag = "15")]
    data_target: Option<u64>,
    #[prost(sint64, tag = "16")]
    send_window: i64,
    #[prost(message, optional, tag = "17")]
    receive_window: Option<WindowState>,
    #[prost(uint32, tag = "18")]
    peer_initial_window: u32,
    #[prost(uint32, tag = "19")]
    peer_frame_size: u32,
    #[prost(bool, tag = "20")]
    peer_settings_seen: bool,
    #[prost(bool, tag = "21")]
    settings_acked: bool,
    /// Absent: none; 2^31: a warning; otherwise the last stream.
    #[prost(uint32, optional, tag = "22")]
    goaway_sent: Option<u32>,
    #[prost(bool, tag = "23")]
    goaway_received: bool,
    #[prost(uint32, tag = "24")]
    next_stream: u32,
    #[prost(uint32, tag = "25")]
    highest_stream: u32,
    #[prost(message, repeated, tag = "26")]
    recent: Vec<ClosedState>,
    #[prost(uint64, tag = "27")]
    opened_ago: u64,
    #[prost(uint64, tag = "28")]
    heard_ago: u64,
    #[prost(uint64, optional, tag = "29")]
    ping_sent_ago: Option<u64>,
    #[prost(uint64, optional, tag = "30")]
    idle_since_ago: Option<u64>,
    #[prost(uint64, optional, tag = "31")]
    drain_since_ago: Option<u64>,
    #[prost(uint64, optional, tag = "32")]
    linger_since_ago: Option<u64>,
    /// Streams the pool may put on it.
    #[prost(uint32, optional, tag = "33")]
    pub(crate) stream_limit: Option<u32>,
    #[prost(bool, tag = "34")]
    overflowed: bool,
    #[prost(bool, tag = "35")]
    overburdened: bool,
    #[prost(bool, tag = "36")]
    failed: bool,
}

/// A stream id that was closed not long ago.
#[derive(Clone, Copy, PartialEq, prost::Message)]
struct ClosedState {
    #[prost(uint32, tag = "1")]
    id: u32,
    #[prost(bool, tag = "2")]
    reset_by_us: bool,
}

const WARNING: u32 = 1 << 31;

impl TunnelState {
    /// Writes a tunnel down; its open record is closed first, so that only sealed bytes are left.
    pub(crate) fn of(name: u64, tunnel: &mut Tunnel, limit: Option<u32>, now: Instant) -> Self {
        let since = |at: Option<Instant>| at.map(|at| age(at, now));
        Self {
            name,
            sock: tunnel.sock.0,
            pod: tunnel.pod.as_str().to_owned(),
            client: match &tunnel.role {
                Role::Client(key) => Some(KeyState::from(&**key)),
                Role::Server => None,
            },
            phase: match tunnel.phase {
                TunnelPhase::Up => 0,
                TunnelPhase::Draining => 1,
                TunnelPhase::Lingering { finished } => 2 + u32::from(finished),
            },
            fin_sent: tunnel.fin_sent,
            opener: Some(tunnel.opener.state()),
            renewal_asked: tunnel.renewal_asked,
            renewal_owed: tunnel.renewal_owed,
            post_handshake: tunnel.post_handshake.partial().to_vec(),
            leftover: tunnel.leftover.clone(),
            out: Some(tunnel.out.state()),
            reader: Some(tunnel.reader.state()),
            decoder: Some(tunnel.decoder.state()),
            data_target: tunnel.data_target,
            send_window: tunnel.send_window.state(),
            receive_window: Some(tunnel.receive_window.state()),
            peer_initial_window: tunnel.peer_initial_window,
            peer_frame_size: tunnel.peer_frame_size,
            peer_settings_seen: tunnel.peer_settings_seen,
            settings_acked: tunnel.settings_acked,
            goaway_sent: match tunnel.goaway_sent {
                GoawaySent::None => None,
                GoawaySent::Warning => Some(WARNING),
                GoawaySent::Final(last) => Some(last),
            },
            goaway_received: tunnel.goaway_received,
            next_stream: tunnel.next_stream,
            highest_stream: tunnel.highest_stream,
            recent: tunnel
                .recent
                .iter()
                .map(|&(id, reset_by_us)| ClosedState { id, reset_by_us })
                .collect(),
            opened_ago: age(tunnel.opened_at, now),
            heard_ago: age(tunnel.heard_at, now),
            ping_sent_ago: since(tunnel.ping_sent),
            idle_since_ago: since(tunnel.idle_since),
            drain_since_ago: since(tunnel.drain_since),
            linger_since_ago: since(tunnel.linger_since),
            stream_limit: limit,
            overflowed: tunnel.overflowed,
            overburdened: tunnel.overburdened,
            failed: tunnel.failed,
        }
    }

    /// The tunnel again; without streams, timers and a place in the pool.
    pub(crate) fn tunnel(
        &self,
        sock: SockId,
        config: &EngineConfig,
        now: Instant,
    ) -> Result<Tunnel, HandOverError> {
        const NO_PART: HandOverError = HandOverError::Inconsistent("a tunnel without a part");
        let client = self.client.as_ref().map(TunnelKey::try_from).transpose()?;
        let since = |age: Option<u64>| age.map(|age| ago(age, now));
        let header_limit = if client.is_some() {
            config.response_header_limit
        } else {
            config.request_header_limit
        };
        check(self.leftover.len() < MAX_RECORD, "a record longer than any")?;
        check(self.recent.len() <= REMEMBERED, "too many closed streams")?;
        check(self.highest_stream <= MAX_STREAM_ID, "a stream id")?;
        check(self.next_stream % 2 == 1 && self.next_stream <= MAX_STREAM_ID, "a stream id")?;
        check(self.peer_initial_window <= MAX_WINDOW, "the peer's window")?;
        check(self.peer_frame_size < 1 << 24, "the peer's frame size")?;
        check(self.peer_frame_size >= crate::frame::DEFAULT_FRAME_SIZE, "the peer's frame size")?;
        let opener = RecordKey::from_state(self.opener.as_ref().ok_or(NO_PART)?)?;
        let out = Outbox::from_state(
            self.out.as_ref().ok_or(NO_PART)?,
            config.key_update_after,
            config.send_buffer,
        )?;
        Ok(Tunnel {
            sock,
            pod: PodUid::new(&self.pod),
            role: client.map_or(Role::Server, |key| Role::Client(Arc::new(key))),
            phase: match self.phase {
                0 => TunnelPhase::Up,
                1 => TunnelPhase::Draining,
                2 => TunnelPhase::Lingering { finished: false },
                3 => TunnelPhase::Lingering { finished: true },
                _ => return Err(HandOverError::Inconsistent("a tunnel's phase")),
            },
            scheduled: false,
            // The successor's epoll reports what there is; until then everything is tried.
            readable: true,
            read_closed: false,
            writable: true,
            failed: self.failed,
            overflowed: self.overflowed,
            overburdened: self.overburdened,
            fin_sent: self.fin_sent,
            opener,
            renewal_asked: self.renewal_asked,
            renewal_owed: self.renewal_owed,
            post_handshake: PostHandshake::with_partial(&self.post_handshake)?,
            leftover: self.leftover.clone(),
            out,
            reader: FrameReader::from_state(
                self.reader.as_ref().ok_or(NO_PART)?,
                config.max_frame_size,
                header_limit as usize,
            )?,
            decoder: Decoder::from_state(self.decoder.as_ref().ok_or(NO_PART)?)?,
            data_target: self.data_target,
            send_window: SendWindow::from_state(self.send_window)?,
            receive_window: ReceiveWindow::from_state(self.receive_window.ok_or(NO_PART)?)?,
            peer_initial_window: self.peer_initial_window,
            peer_frame_size: self.peer_frame_size,
            peer_settings_seen: self.peer_settings_seen,
            settings_acked: self.settings_acked,
            goaway_sent: match self.goaway_sent {
                None => GoawaySent::None,
                Some(WARNING) => GoawaySent::Warning,
                Some(last) => GoawaySent::Final(last),
            },
            goaway_received: self.goaway_received,
            streams: std::collections::BTreeMap::new(),
            next_stream: self.next_stream,
            highest_stream: self.highest_stream,
            recent: self
                .recent
                .iter()
                .map(|closed| (closed.id, closed.reset_by_us))
                .collect::<VecDeque<_>>(),
            round: VecDeque::new(),
            floods: Tunnel::flood_meter(now),
            rapid_resets: Tunnel::reset_meter(now),
            opened_at: ago(self.opened_ago, now),
            heard_at: ago(self.heard_ago, now),
            ping_sent: since(self.ping_sent_ago),
            idle_since: since(self.idle_since_ago),
            drain_since: since(self.drain_since_ago),
            linger_since: since(self.linger_since_ago),
            timer: None,
        })
    }

    pub(crate) fn forget_secrets(&mut self) {
        let keys = [&mut self.opener, &mut self.out.get_or_insert_default().key];
        for key in keys.into_iter().flatten() {
            key.forget_secret();
        }
    }
}
