//! The engine: what it is told, one turn of its work, what it says.

mod control;
mod ending;
mod handover;
mod headers;
mod opening;
mod receive;
mod relays;
mod transmit;
mod tunnels;

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::hash::{BuildHasherDefault, Hasher};
use std::time::Instant;

use mesh_authorize::Permit;
use mesh_model::{CloseReason, PodUid};

use crate::config::EngineConfig;
use crate::event::{
    DialId, EngineEvent, RelayBytes, RelayId, RequestId, Retire, TunnelId, TunnelKey,
};
use crate::frame::ErrorCode;
use crate::head::{ConnectHead, ResponseHead};
use crate::io::{Io, Readiness, SockId};
use crate::outbox::{BufferPool, OutboxFull};
use crate::pool::PoolCore;
use crate::record::Alert;
use crate::session::TlsSession;
use crate::slab::Slab;
use crate::splice::{End, Splice};
use crate::stream::{Phase, Stream};
use crate::timer::{TimerKey, Timers};
use crate::tunnel::Tunnel;

/// One engine: tunnels, streams, plain relays and the pool of one thread.
///
/// The rhythm of its driver: tell it of readiness ([`on_event`](Self::on_event)) and give it commands; call
/// [`turn`](Self::turn) until it returns false, draining [`poll_event`](Self::poll_event) each time; sleep until readiness or
/// [`poll_timeout`](Self::poll_timeout). Commands take effect on sockets at the next turn.
///
/// A socket given to it is taken to be readable and writable until a call says otherwise, so no edge is lost that came before.
#[derive(Debug)]
pub struct Engine {
    config: EngineConfig,
    now: Instant,
    tunnels: Slab<Tunnel>,
    streams: Slab<Stream>,
    splices: Slab<Splice>,
    socks: HashMap<SockId, Owner, BuildHasherDefault<SockHasher>>,
    pool: PoolCore,
    buffers: BufferPool,
    /// Where tunnels and plain relays are read into; nothing stays in it between two of them.
    scratch: Vec<u8>,
    /// Payloads opened in `scratch` and not yet delivered.
    pieces: Vec<Piece>,
    /// Tunnels and plain relays with work, each at most once.
    work: VecDeque<Work>,
    /// Streams whose application socket is to be looked at, each at most once.
    attention: Vec<u64>,
    /// Sockets to be closed at the end of the turn.
    doomed: Vec<(SockId, Doom)>,
    events: VecDeque<EngineEvent>,
    timers: Timers,
    /// The deadlines of dials under way.
    dial_deadlines: BTreeMap<DialId, Instant>,
    /// Bytes in the streams' queues.
    queued: usize,
}

/// Sizes of an engine, for metrics and tests. All but the byte counts are zero when nothing is open.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct EngineStats {
    /// Tunnels, those that only linger included.
    pub tunnels: usize,
    /// Streams of tunnels, unanswered requests included.
    pub streams: usize,
    /// Plain relays.
    pub splices: usize,
    /// Sockets the engine owns.
    pub sockets: usize,
    /// Keys the pool knows.
    pub pool_keys: usize,
    /// Dials under way.
    pub dials: usize,
    /// Opens that wait for a dial.
    pub waiting: usize,
    /// Bytes held for applications that do not read.
    pub queued_bytes: usize,
    /// Deadlines set.
    pub timers: usize,
}

#[derive(Clone, Copy, Debug)]
enum Owner {
    Tunnel(u64),
    Stream(u64),
    Splice(u64, End),
}

#[derive(Clone, Copy, Debug)]
enum Work {
    Tunnel(u64),
    Splice(u64),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Doom {
    Close,
    Abort,
}

/// A payload in the scratch buffer; without length it is the stream's end.
#[derive(Clone, Copy, Debug)]
struct Piece {
    stream: u64,
    start: usize,
    len: usize,
}

/// How a tunnel ends.
#[derive(Clone, Copy, Debug)]
struct Ending {
    goaway: Option<ErrorCode>,
    alert: Option<Alert>,
    reason: CloseReason,
    /// The socket is of no use any more.
    socket_dead: bool,
    /// The peer has ended its side.
    finished: bool,
}

impl Ending {
    /// The peer broke HTTP/2, or we must stop: GOAWAY, then close.
    const fn http(code: ErrorCode, reason: CloseReason) -> Self {
        Self {
            goaway: Some(code),
            alert: Some(Alert::CloseNotify),
            reason,
            socket_dead: false,
            finished: false,
        }
    }

    const fn protocol(code: ErrorCode) -> Self {
        Self::http(code, CloseReason::ProtocolError)
    }

    /// The peer broke TLS.
    const fn tls(alert: Alert) -> Self {
        Self {
            goaway: None,
            alert: Some(alert),
            reason: CloseReason::ProtocolError,
            socket_dead: false,
            finished: false,
        }
    }

    /// The connection is gone.
    const fn dead(reason: CloseReason) -> Self {
        Self { goaway: None, alert: None, reason, socket_dead: true, finished: true }
    }

    /// The peer has said goodbye.
    const fn peer_closed(reason: CloseReason) -> Self {
        Self {
            goaway: None,
            alert: Some(Alert::CloseNotify),
            reason,
            socket_dead: false,
            finished: true,
        }
    }
}

impl From<ErrorCode> for Ending {
    fn from(code: ErrorCode) -> Self {
        Self::protocol(code)
    }
}

impl From<OutboxFull> for Ending {
    fn from(OutboxFull: OutboxFull) -> Self {
        Self::http(ErrorCode::ENHANCE_YOUR_CALM, CloseReason::TimedOut)
    }
}

/// Spreads socket names over the map. They are the driver's, not an attacker's.
#[derive(Debug, Default)]
struct SockHasher(u64);

impl Hasher for SockHasher {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.write_u64(u64::from(*byte));
        }
    }

    fn write_u64(&mut self, value: u64) {
        // Fibonacci hashing; the map uses the high bits as well as the low ones.
        self.0 = (self.0 ^ value).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29);
    }
}

/// Marks the relay ids of plain relays.
const SPLICE_BIT: u64 = 1 << 63;

impl Engine {
    /// An engine with nothing in it.
    #[must_use]
    pub fn new(config: EngineConfig, now: Instant) -> Self {
        let buffers = BufferPool::new(config.send_buffer);
        let pool = PoolCore::new(config.max_waiting, config.max_tunnels_per_key);
        Self {
            config,
            now,
            tunnels: Slab::default(),
            streams: Slab::default(),
            splices: Slab::default(),
            socks: HashMap::default(),
            pool,
            buffers,
            scratch: Vec::new(),
            pieces: Vec::new(),
            work: VecDeque::new(),
            attention: Vec::new(),
            doomed: Vec::new(),
            events: VecDeque::new(),
            timers: Timers::default(),
            dial_deadlines: BTreeMap::new(),
            queued: 0,
        }
    }

    /// Carries `app`, an accepted connection, through a tunnel of `key`: an existing one with room, or one that is dialled.
    ///
    /// Bytes are sent right behind the CONNECT; a refusal resets `app`. The relay ends with one [`EngineEvent::Closed`], also
    /// when it could not begin.
    pub fn open(
        &mut self,
        permit: Permit,
        key: TunnelKey,
        head: ConnectHead,
        app: SockId,
        now: Instant,
    ) -> RelayId {
        self.now = now;
        spend(permit);
        self.open_stream(key, head, app)
    }

    /// Carries `app` to `upstream` in the clear. `upstream` may still be connecting; nothing is read from `app` before it has.
    ///
    /// `app` is the side that dialled: its reset is the client's, that of `upstream` the server's.
    pub fn splice(
        &mut self,
        permit: Permit,
        app: SockId,
        upstream: SockId,
        now: Instant,
    ) -> RelayId {
        self.now = now;
        spend(permit);
        self.open_splice(app, upstream)
    }

    /// A dial came to an end well: `sock` is connected and `session` shaken hands on. If nobody wants it any more it is closed.
    pub fn dial_succeeded(
        &mut self,
        dial: DialId,
        session: TlsSession,
        sock: SockId,
        now: Instant,
    ) -> Option<TunnelId> {
        self.now = now;
        self.add_client_tunnel(dial, session, sock)
    }

    /// A dial failed: the opens that wait for it are closed with `reason`. Says which, before their
    /// [`EngineEvent::Closed`] does.
    pub fn dial_failed(&mut self, dial: DialId, reason: CloseReason, now: Instant) -> Vec<RelayId> {
        self.now = now;
        self.fail_dial(dial, reason)
    }

    /// A peer's tunnel to `pod` has shaken hands. Its CONNECTs come as [`EngineEvent::Request`].
    pub fn add_server_tunnel(
        &mut self,
        pod: PodUid,
        session: TlsSession,
        sock: SockId,
        now: Instant,
    ) -> TunnelId {
        self.now = now;
        self.insert_server_tunnel(pod, session, sock)
    }

    /// Connects a request to `app`, which may still be connecting: 200 is sent once it has, 503 if it fails.
    ///
    /// If the request has gone meanwhile, `app` is reset and the relay closes as [`CloseReason::ClientReset`].
    pub fn accept(
        &mut self,
        permit: Permit,
        request: RequestId,
        app: SockId,
        response: ResponseHead,
        now: Instant,
    ) -> RelayId {
        self.now = now;
        spend(permit);
        self.accept_stream(request, app, response)
    }

    /// Answers a request by `status` and forgets it. A request that has gone is no matter.
    ///
    /// The peer sees the status only. A `reason` that is the asking side's fault or an operator's decision counts against the
    /// peer: a tunnel whose requests are refused faster than 2,000 a second, beyond a burst of 10,000, is closed.
    pub fn refuse(&mut self, request: RequestId, status: u16, reason: CloseReason, now: Instant) {
        self.now = now;
        self.refuse_request(request, status, reason);
    }

    /// Resets both ends of a relay at once. A relay that has ended is no matter.
    pub fn cut(&mut self, relay: RelayId, reason: CloseReason, now: Instant) {
        self.now = now;
        self.cut_relay(relay, reason);
    }

    /// Lets tunnels end in good order: no new streams, GOAWAY, and closed after the last stream.
    pub fn retire(&mut self, which: Retire, now: Instant) {
        self.now = now;
        self.retire_tunnels(&which);
    }

    /// The bytes a live relay has carried; `None` once it is closed.
    #[must_use]
    pub fn relay_bytes(&self, relay: RelayId) -> Option<RelayBytes> {
        if relay.0 & SPLICE_BIT != 0 {
            return self.splices.get(relay.0 & !SPLICE_BIT).map(Splice::bytes);
        }
        self.streams
            .get(relay.0)
            .filter(|stream| stream.phase != Phase::Requested)
            .map(|stream| stream.bytes)
    }

    /// The tunnel that carries a relay now, if one does.
    #[must_use]
    pub fn relay_tunnel(&self, relay: RelayId) -> Option<TunnelId> {
        let stream = self.streams.get(relay.0)?;
        self.tunnels.get(stream.tunnel).map(|_| TunnelId(stream.tunnel))
    }

    /// Sizes, for metrics and tests.
    #[must_use]
    pub fn stats(&self) -> EngineStats {
        let (pool_keys, dials, waiting) = self.pool.sizes();
        EngineStats {
            tunnels: self.tunnels.len(),
            streams: self.streams.len(),
            splices: self.splices.len(),
            sockets: self.socks.len(),
            pool_keys,
            dials,
            waiting,
            queued_bytes: self.queued,
            timers: self.timers.len(),
        }
    }

    /// Readiness of a socket. Names the engine does not know are no matter.
    pub fn on_event(&mut self, sock: SockId, ready: Readiness) {
        match self.socks.get(&sock) {
            Some(Owner::Tunnel(tunnel)) => {
                let key = *tunnel;
                if let Some(tunnel) = self.tunnels.get_mut(key) {
                    tunnel.readable |= ready.readable || ready.read_closed;
                    tunnel.read_closed |= ready.read_closed;
                    tunnel.writable |= ready.writable;
                    if ready.error {
                        tunnel.fail();
                    }
                    self.schedule_tunnel(key);
                }
            }
            Some(Owner::Stream(stream)) => {
                let key = *stream;
                if let Some(stream) = self.streams.get_mut(key) {
                    let flags = &mut stream.flags;
                    flags.read_closed |= ready.read_closed;
                    flags.writable |= ready.writable;
                    flags.urgent |= ready.urgent;
                    flags.failed |= ready.error;
                    let connecting = stream.phase == Phase::Connecting;
                    if ready.readable || ready.read_closed || ready.error {
                        flags.readable = true;
                    }
                    if ready.error || (ready.writable && (connecting || !stream.queue.is_empty())) {
                        self.look_at(key);
                    }
                    self.enter_round(key);
                }
            }
            Some(Owner::Splice(splice, end)) => {
                let (key, end) = (*splice, *end);
                if let Some(splice) = self.splices.get_mut(key) {
                    splice.on_event(end, ready);
                    self.schedule_splice(key);
                }
            }
            None => {}
        }
    }

    /// One round of work. True: call again before sleeping, after looking for readiness.
    pub fn turn(&mut self, io: &mut impl Io, now: Instant) -> bool {
        self.now = now;
        while let Some(timer) = self.timers.pop_due(now) {
            self.timer_due(timer);
        }
        for stream in std::mem::take(&mut self.attention) {
            self.attend(stream, io);
        }
        // What is scheduled from here on has its turn in the next round.
        for _ in 0..self.work.len() {
            match self.work.pop_front() {
                Some(Work::Tunnel(tunnel)) => self.tunnel_turn(tunnel, io),
                Some(Work::Splice(splice)) => self.splice_turn(splice, io),
                None => break,
            }
        }
        for (sock, doom) in self.doomed.drain(..) {
            match doom {
                Doom::Close => io.close(sock),
                Doom::Abort => io.abort(sock),
            }
        }
        if self.socks.is_empty() {
            self.rest();
        }
        !self.work.is_empty() || !self.attention.is_empty()
    }

    /// The next thing the shell must do or know.
    pub fn poll_event(&mut self) -> Option<EngineEvent> {
        self.events.pop_front()
    }

    /// When to call [`turn`](Self::turn) if nothing else happens.
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Instant> {
        self.timers.next()
    }

    fn schedule_tunnel(&mut self, key: u64) {
        if let Some(tunnel) = self.tunnels.get_mut(key)
            && !tunnel.scheduled
        {
            tunnel.scheduled = true;
            self.work.push_back(Work::Tunnel(key));
        }
    }

    fn schedule_splice(&mut self, key: u64) {
        if let Some(splice) = self.splices.get_mut(key)
            && !splice.scheduled
        {
            splice.scheduled = true;
            self.work.push_back(Work::Splice(key));
        }
    }

    /// Has a stream's application socket looked at in the next turn.
    fn look_at(&mut self, key: u64) {
        if let Some(stream) = self.streams.get_mut(key)
            && !stream.flags.in_attention
        {
            stream.flags.in_attention = true;
            self.attention.push(key);
        }
    }

    fn timer_due(&mut self, timer: TimerKey) {
        match timer {
            TimerKey::Tunnel(tunnel) => self.tunnel_due(tunnel),
            TimerKey::Stream(stream) => self.stream_timed_out(stream),
            TimerKey::Splice(splice) => self.splice_timed_out(splice),
            TimerKey::Dial(dial) => {
                self.fail_dial(DialId(dial), CloseReason::TunnelConnectFailed);
            }
        }
    }

    /// Nothing is open: memory of busier times goes back.
    fn rest(&mut self) {
        if self.socks.capacity() > 1024 {
            self.socks.shrink_to(64);
            self.events.shrink_to(64);
            self.work.shrink_to(64);
            self.attention.shrink_to(64);
            self.doomed.shrink_to(64);
            self.pieces.shrink_to(64);
            self.buffers.shrink();
        }
    }
}

/// A permit is proof, and is used up by what it permits.
fn spend(permit: Permit) {
    drop(permit);
}
