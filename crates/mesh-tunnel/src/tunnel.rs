//! One tunnel: TLS keys, HTTP/2 session and the round of its streams.
//!
//! ```text
//!  Up ──retire, GOAWAY, ids used up──► Draining ──last stream ended──► Lingering ──peer took it all, or time──► gone
//!   └───────────── peer's error, our refusal, silence ──────────────────►┘
//! ```
//! A lingering tunnel has no streams and no keys in use: its last bytes are on their way, and what comes in is thrown away.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use mesh_model::PodUid;

use crate::config::EngineConfig;
use crate::event::TunnelKey;
use crate::flood::FloodMeter;
use crate::frame::{
    DEFAULT_FRAME_SIZE, DEFAULT_WINDOW, ErrorCode, FrameKind, MAX_WINDOW, PREFACE, SmallFrame,
    setting, settings,
};
use crate::frame_reader::FrameReader;
use crate::hpack::Decoder;
use crate::io::SockId;
use crate::outbox::{BufferPool, Outbox, OutboxFull};
use crate::post_handshake::PostHandshake;
use crate::record::RecordKey;
use crate::session::TlsSession;
use crate::window::{ReceiveWindow, SendWindow};

/// Who opens streams on a tunnel.
#[derive(Clone, Debug)]
pub(crate) enum Role {
    /// We do. The key it was dialled for.
    Client(Arc<TunnelKey>),
    /// The peer does.
    Server,
}

/// Where a tunnel is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum TunnelPhase {
    /// Takes new streams.
    Up,
    /// Takes none; those it has go on.
    Draining,
    /// Only its last bytes are left. `finished`: the peer has ended too, so nothing is waited for.
    Lingering { finished: bool },
}

/// What our side has said by GOAWAY.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum GoawaySent {
    None,
    /// A warning: streams are still taken until the peer has seen it.
    Warning,
    /// Streams above this id are not processed.
    Final(u32),
}

/// PING payload of the keepalive and of the drain's round trip; any eight bytes would do.
pub(crate) const PING_KEEPALIVE: [u8; 8] = *b"culvert0";
/// See [`PING_KEEPALIVE`].
pub(crate) const PING_DRAIN: [u8; 8] = *b"culvert1";

/// Ids of closed streams that are remembered, so that frames that crossed our reset are told from violations.
pub(crate) const REMEMBERED: usize = 64;

/// One TLS connection with its HTTP/2 session.
#[derive(Debug)]
pub(crate) struct Tunnel {
    pub(crate) sock: SockId,
    pub(crate) pod: PodUid,
    pub(crate) role: Role,
    pub(crate) phase: TunnelPhase,
    /// In the engine's list of tunnels with work.
    pub(crate) scheduled: bool,
    pub(crate) readable: bool,
    pub(crate) read_closed: bool,
    pub(crate) writable: bool,
    /// The socket has failed.
    pub(crate) failed: bool,
    /// The peer reads so little that our answers have no room.
    pub(crate) overflowed: bool,
    /// The peer has us refuse more than it may.
    pub(crate) overburdened: bool,
    pub(crate) fin_sent: bool,

    pub(crate) opener: RecordKey,
    /// We have asked the peer to renew its key and wait for it.
    pub(crate) renewal_asked: bool,
    pub(crate) renewal_owed: bool,
    pub(crate) post_handshake: PostHandshake,
    /// An incomplete record.
    pub(crate) leftover: Vec<u8>,
    pub(crate) out: Outbox,

    pub(crate) reader: FrameReader,
    pub(crate) decoder: Decoder,
    /// The stream that the current DATA frame is for; `None` when its payload is dropped.
    pub(crate) data_target: Option<u64>,
    pub(crate) send_window: SendWindow,
    pub(crate) receive_window: ReceiveWindow,
    pub(crate) peer_initial_window: u32,
    pub(crate) peer_frame_size: u32,
    pub(crate) peer_settings_seen: bool,
    pub(crate) settings_acked: bool,
    pub(crate) goaway_sent: GoawaySent,
    pub(crate) goaway_received: bool,

    /// Streams by id.
    pub(crate) streams: BTreeMap<u32, u64>,
    /// Client: the id of the next stream.
    pub(crate) next_stream: u32,
    /// Server: the highest id the peer has used.
    pub(crate) highest_stream: u32,
    /// Recently closed ids; true for those we reset.
    pub(crate) recent: VecDeque<(u32, bool)>,
    /// Streams with something to send, in turn.
    pub(crate) round: VecDeque<u64>,

    pub(crate) floods: FloodMeter,
    /// Resets of requests that were not established yet. Source: CVE-2023-44487.
    pub(crate) rapid_resets: FloodMeter,
    pub(crate) opened_at: Instant,
    pub(crate) heard_at: Instant,
    pub(crate) ping_sent: Option<Instant>,
    pub(crate) idle_since: Option<Instant>,
    pub(crate) drain_since: Option<Instant>,
    pub(crate) linger_since: Option<Instant>,
    /// The entry in the engine's timers.
    pub(crate) timer: Option<Instant>,
}

/// What a tunnel's clock says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Due {
    Nothing,
    /// Ask for a sign of life.
    Ping,
    /// The peer is silent.
    PeerSilent,
    /// The peer has not begun, or has not acknowledged our settings.
    SettingsLate,
    /// No stream for too long.
    Idle,
    /// The peer has not answered the PING behind our warning.
    WarningUnanswered,
    /// The drain took too long.
    DrainOver,
    /// The last bytes took too long.
    LingerOver,
}

impl Tunnel {
    pub(crate) fn new(
        session: TlsSession,
        sock: SockId,
        pod: PodUid,
        role: Role,
        config: &EngineConfig,
        now: Instant,
    ) -> Self {
        let TlsSession { suite, tx, rx, tx_seq, rx_seq, leftover } = session;
        let server = matches!(role, Role::Server);
        let header_limit =
            if server { config.request_header_limit } else { config.response_header_limit };
        let sealer = RecordKey::new(suite, tx, tx_seq);
        Self {
            sock,
            pod,
            role,
            phase: TunnelPhase::Up,
            scheduled: false,
            readable: true,
            read_closed: false,
            writable: true,
            failed: false,
            overflowed: false,
            overburdened: false,
            fin_sent: false,
            opener: RecordKey::new(suite, rx, rx_seq),
            renewal_asked: false,
            renewal_owed: false,
            post_handshake: PostHandshake::default(),
            leftover,
            out: Outbox::new(sealer, config.key_update_after, config.send_buffer),
            reader: FrameReader::new(server, config.max_frame_size, header_limit as usize),
            decoder: Decoder::default(),
            data_target: None,
            send_window: SendWindow::new(DEFAULT_WINDOW),
            receive_window: ReceiveWindow::new(config.connection_window),
            peer_initial_window: DEFAULT_WINDOW,
            peer_frame_size: DEFAULT_FRAME_SIZE,
            peer_settings_seen: false,
            settings_acked: false,
            goaway_sent: GoawaySent::None,
            goaway_received: false,
            streams: BTreeMap::new(),
            next_stream: 1,
            highest_stream: 0,
            recent: VecDeque::new(),
            round: VecDeque::new(),
            floods: Self::flood_meter(now),
            rapid_resets: Self::reset_meter(now),
            opened_at: now,
            heard_at: now,
            ping_sent: None,
            idle_since: Some(now),
            drain_since: None,
            linger_since: None,
            timer: None,
        }
    }

    pub(crate) const fn flood_meter(now: Instant) -> FloodMeter {
        FloodMeter::new(10_000, 2_000, now)
    }

    pub(crate) const fn reset_meter(now: Instant) -> FloodMeter {
        FloodMeter::new(2_000, 1_000, now)
    }

    /// Our preface and settings.
    pub(crate) fn greet(
        &mut self,
        config: &EngineConfig,
        pool: &mut BufferPool,
    ) -> Result<(), OutboxFull> {
        let mut values = vec![
            (setting::INITIAL_WINDOW_SIZE, config.stream_window),
            (setting::MAX_FRAME_SIZE, config.max_frame_size),
        ];
        match self.role {
            Role::Client(_) => {
                self.out.control(PREFACE, pool)?;
                values.push((setting::ENABLE_PUSH, 0));
                values.push((setting::MAX_HEADER_LIST_SIZE, config.response_header_limit));
            }
            Role::Server => {
                values.push((setting::MAX_CONCURRENT_STREAMS, config.max_concurrent_streams));
                values.push((setting::MAX_HEADER_LIST_SIZE, config.request_header_limit));
            }
        }
        self.out.control(&settings(&values), pool)?;
        let credit = config.connection_window.saturating_sub(DEFAULT_WINDOW);
        if credit > 0 {
            self.send(&SmallFrame::window_update(0, credit), pool)?;
        }
        Ok(())
    }

    pub(crate) fn send(
        &mut self,
        frame: &SmallFrame,
        pool: &mut BufferPool,
    ) -> Result<(), OutboxFull> {
        self.out.control(frame.bytes(), pool)
    }

    pub(crate) fn is_server(&self) -> bool {
        matches!(self.role, Role::Server)
    }

    pub(crate) fn is_lingering(&self) -> bool {
        matches!(self.phase, TunnelPhase::Lingering { .. })
    }

    /// True when a stream of this id has never been opened.
    pub(crate) fn is_idle_id(&self, id: u32) -> bool {
        match self.role {
            Role::Client(_) => id.is_multiple_of(2) || id >= self.next_stream,
            Role::Server => id.is_multiple_of(2) || id > self.highest_stream,
        }
    }

    /// Remembers a closed stream.
    pub(crate) fn remember(&mut self, id: u32, reset_by_us: bool) {
        if self.recent.len() == REMEMBERED {
            self.recent.pop_front();
        }
        self.recent.push_back((id, reset_by_us));
    }

    /// What is remembered of a closed stream: whether we reset it.
    pub(crate) fn recall(&self, id: u32) -> Option<bool> {
        self.recent.iter().rev().find(|(known, _)| *known == id).map(|(_, by_us)| *by_us)
    }

    /// True when there is something to do without waiting for readiness.
    pub(crate) fn has_work(&self) -> bool {
        match self.phase {
            TunnelPhase::Lingering { .. } => self.readable,
            TunnelPhase::Up | TunnelPhase::Draining => self.readable || self.can_send_data(),
        }
    }

    /// Nothing can be sent any more. What has arrived can still be read, up to an end or an error: a peer that has said
    /// everything and closes while something of ours is on its way resets the connection behind its last words.
    pub(crate) const fn fail(&mut self) {
        self.failed = true;
        self.readable = true;
        self.read_closed = true;
    }

    pub(crate) fn can_send_data(&self) -> bool {
        !self.failed
            && !self.round.is_empty()
            && self.send_window.available() > 0
            && self.out.takes_data()
    }

    /// The peer's SETTINGS. Returns what its initial window changed by, and its stream limit.
    pub(crate) fn apply_settings(
        &mut self,
        payload: &[u8],
    ) -> Result<(i64, Option<u32>), ErrorCode> {
        let before = i64::from(self.peer_initial_window);
        let mut limit = None;
        for entry in payload.chunks_exact(6) {
            let id = u16::from_be_bytes([entry[0], entry[1]]);
            let value = u32::from_be_bytes([entry[2], entry[3], entry[4], entry[5]]);
            match id {
                setting::ENABLE_PUSH
                    // A server may only send 0 (RFC 9113 §6.5.2).
                    if (value > 1 || (value == 1 && !self.is_server())) => {
                        return Err(ErrorCode::PROTOCOL_ERROR);
                    }
                setting::MAX_CONCURRENT_STREAMS => limit = Some(value),
                setting::INITIAL_WINDOW_SIZE => {
                    if value > MAX_WINDOW {
                        return Err(ErrorCode::FLOW_CONTROL_ERROR);
                    }
                    self.peer_initial_window = value;
                }
                setting::MAX_FRAME_SIZE => {
                    if !(DEFAULT_FRAME_SIZE..1 << 24).contains(&value) {
                        return Err(ErrorCode::PROTOCOL_ERROR);
                    }
                    self.peer_frame_size = value;
                }
                // Our heads are far below any list limit; our encoder needs no table.
                _ => {}
            }
        }
        // Without a word about it there is no limit but our own.
        if !self.peer_settings_seen && limit.is_none() {
            limit = Some(u32::MAX);
        }
        self.peer_settings_seen = true;
        Ok((i64::from(self.peer_initial_window) - before, limit))
    }

    /// What is due, in the order of what ends the tunnel first.
    pub(crate) fn due(&self, config: &EngineConfig, now: Instant) -> Due {
        self.deadlines(config)
            .into_iter()
            .filter(|(at, _)| *at <= now)
            .min()
            .map_or(Due::Nothing, |(_, due)| due)
    }

    /// When to look again.
    pub(crate) fn next_deadline(&self, config: &EngineConfig) -> Option<Instant> {
        self.deadlines(config).into_iter().map(|(at, _)| at).min()
    }

    fn deadlines(&self, config: &EngineConfig) -> Vec<(Instant, Due)> {
        let mut all = Vec::with_capacity(4);
        let mut add = |since: Option<Instant>, after: Option<Duration>, due: Due| {
            if let Some(at) = since.zip(after).and_then(|(since, after)| since.checked_add(after)) {
                all.push((at, due));
            }
        };
        if self.is_lingering() {
            add(self.linger_since, Some(config.linger_timeout), Due::LingerOver);
            return all;
        }
        if !self.settings_acked || !self.peer_settings_seen {
            add(Some(self.opened_at), Some(config.settings_timeout), Due::SettingsLate);
        }
        match self.ping_sent {
            Some(sent) => add(Some(sent), Some(config.ping_timeout), Due::PeerSilent),
            None => add(Some(self.heard_at), Some(config.ping_interval), Due::Ping),
        }
        if matches!(self.role, Role::Client(_)) && self.phase == TunnelPhase::Up {
            add(self.idle_since, Some(config.idle_timeout), Due::Idle);
        }
        if self.goaway_sent == GoawaySent::Warning {
            add(self.drain_since, Some(config.ping_timeout), Due::WarningUnanswered);
        }
        add(self.drain_since, config.drain_timeout, Due::DrainOver);
        all
    }

    /// Gives back memory that an idle tunnel does not need.
    pub(crate) fn shrink(&mut self) {
        self.reader.shrink();
        self.decoder.shrink();
        self.round = VecDeque::new();
        if self.streams.is_empty() {
            self.recent.shrink_to_fit();
        }
    }

    /// True for a frame that costs us work and says nothing.
    pub(crate) const fn is_cheap(kind: FrameKind) -> bool {
        match kind {
            FrameKind::Settings
            | FrameKind::Ping
            | FrameKind::Priority
            | FrameKind::RstStream
            | FrameKind::Unknown
            | FrameKind::Goaway
            | FrameKind::PushPromise => true,
            FrameKind::Data
            | FrameKind::Headers
            | FrameKind::WindowUpdate
            | FrameKind::Continuation => false,
        }
    }
}
