//! The tunnel engine with a far end that says anything: frames, records, raw bytes, ends and resets, in any order.
//!
//! Whatever is said, the engine's own words stay well-formed, every relay and tunnel ends exactly once, it never spins, and
//! nothing is left behind.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use mesh_authorize::{Decision, Permit, PolicySet, authorize_egress};
use mesh_model::{
    ClientAddr, CloseReason, Direction, Flow, FlowId, OrigDst, PodUid, SpiffeId, Workload,
    WorkloadUid,
};
use mesh_resolve::{Authority, ResolveSettings, WorkloadIndex, resolve};
use mesh_telemetry::{Baggage, Forwarded, TraceParent};
use mesh_tunnel::wire::{
    ContentType, Decoder, Encoder, FrameEvent, FrameReader, HEADER, MAX_PLAINTEXT, PostHandshake,
    PostHandshakeMessage, RecordKey, StaticName, TAIL, record_len,
};
use mesh_tunnel::{
    ConnectHead, Engine, EngineConfig, EngineEvent, Io as _, RelayId, RequestId, ResponseHead,
    Retire, SockId, Suite, TlsSession, TrafficSecret, TunnelId, TunnelKey,
};

use crate::http2::{PREFACE, connect_block, frame_bytes};
use crate::input::{Input, long, short};
use crate::net::Net;

const SUITE: Suite = Suite::Aes128Gcm;
/// Steps after which an engine that has nothing to do must have come to rest.
const MAX_TURNS: usize = 10_000;
/// Unread bytes one application socket may hold.
const APP_ROOM: usize = 4096;

fn config() -> EngineConfig {
    EngineConfig {
        stream_window: 65_535,
        connection_window: 65_535,
        max_frame_size: 16_384,
        max_concurrent_streams: 8,
        quantum: 4096,
        send_buffer: 32 << 10,
        receive_buffer: 16 << 10,
        early_data: 64,
        max_relays: 64,
        max_tunnels: 4,
        max_waiting: 8,
        queue_budget: 64 << 10,
        key_update_after: 64,
        ..EngineConfig::default()
    }
}

thread_local! {
    static START: Instant = start();
}

/// Virtual time needs some instant to start from; an input's fate does not depend on which.
fn start() -> Instant {
    Instant::now()
}

fn flow(direction: Direction) -> Flow {
    Flow {
        id: FlowId(1),
        direction,
        client: ClientAddr::new(([10, 0, 0, 1], 40_000).into()),
        orig_dst: OrigDst::new(([192, 0, 2, 1], 80).into()),
        pod: PodUid::new("client-pod"),
        accepted_at: START.with(|start| *start),
    }
}

/// By the one way there is: a flow to an unknown destination, judged by no policies.
pub(crate) fn permit() -> Permit {
    let source = Arc::new(Workload::named("uid", "shop", "client"));
    let settings = ResolveSettings::default();
    let resolved =
        resolve(&WorkloadIndex::default(), &settings, &flow(Direction::Outbound), &source, 0)
            .expect("an unknown destination passes through");
    match authorize_egress(&PolicySet::default(), &resolved).decision {
        Decision::Allow(permit) => permit,
        Decision::Deny(denial) => panic!("{denial:?}"),
    }
}

fn secret(byte: u8) -> TrafficSecret {
    TrafficSecret::new(SUITE, &[byte; 32]).expect("the length is the suite's")
}

fn session() -> TlsSession {
    TlsSession {
        suite: SUITE,
        tx: secret(1),
        rx: secret(2),
        tx_seq: 0,
        rx_seq: 0,
        leftover: Vec::new(),
    }
}

pub(crate) fn key() -> TunnelKey {
    let id = |name| SpiffeId::new("cluster.local", "shop", name).expect("an identity");
    TunnelKey {
        pod: PodUid::new("client-pod"),
        source: id("client"),
        source_ip: [10, 0, 0, 1].into(),
        next_hop: ([10, 0, 0, 2], 15008).into(),
        target_uid: WorkloadUid::new("target"),
        expected: vec![id("server")],
    }
}

/// What the engine says, checked.
struct Listener {
    opener: RecordKey,
    received: Vec<u8>,
    frames: FrameReader,
    headers: Decoder,
    messages: PostHandshake,
    engine_is_server: bool,
}

impl Listener {
    fn new(engine_is_server: bool) -> Self {
        Self {
            opener: RecordKey::new(SUITE, secret(1), 0),
            received: Vec::new(),
            frames: FrameReader::new(!engine_is_server, (1 << 24) - 1, 1 << 20),
            headers: Decoder::default(),
            messages: PostHandshake::default(),
            engine_is_server,
        }
    }

    fn hear(&mut self, bytes: &[u8]) {
        self.received.extend(bytes);
        while let Some(length) = record_len(&self.received).expect("the engine writes records")
            && length <= self.received.len()
        {
            let mut record: Vec<u8> = self.received.drain(..length).collect();
            let (content_type, size) = self.opener.open(&mut record).expect("sealed for us");
            let content = &record[HEADER..HEADER + size];
            match content_type {
                ContentType::ApplicationData => self.read(content),
                ContentType::Handshake => {
                    let message = self.messages.receive(content, self.engine_is_server);
                    if let Some(PostHandshakeMessage::KeyUpdate { .. }) =
                        message.expect("the engine's own messages are right")
                    {
                        self.opener.renew();
                    }
                }
                ContentType::Alert => assert_eq!(size, 2),
            }
        }
    }

    fn read(&mut self, mut content: &[u8]) {
        while !content.is_empty() {
            let (taken, event) =
                self.frames.advance(content).expect("the engine's own frames are right");
            if let Some(FrameEvent::Headers { .. }) = event {
                let block = self.frames.body();
                self.headers.decode(block, |_, _| {}).expect("the engine's own headers are right");
            }
            content = &content[taken..];
        }
    }
}

/// One engine, its sockets, and the books that must balance.
struct Bench {
    net: Net,
    engine: Engine,
    now: Instant,
    wire: SockId,
    sealer: RecordKey,
    listener: Listener,
    apps: Vec<SockId>,
    relays: BTreeSet<RelayId>,
    closed: BTreeSet<RelayId>,
    established: BTreeSet<RelayId>,
    tunnels: BTreeSet<TunnelId>,
    requests: Vec<RequestId>,
    heads: Vec<ConnectHead>,
    said_to: BTreeMap<RelayId, u64>,
    dialled: bool,
}

impl Bench {
    fn new(engine_is_server: bool) -> Self {
        let now = START.with(|start| *start);
        let mut net = Net::default();
        let wire = net.open(256 << 10, false);
        let mut bench = Self {
            net,
            engine: Engine::new(config(), now),
            now,
            wire,
            sealer: RecordKey::new(SUITE, secret(2), 0),
            listener: Listener::new(engine_is_server),
            apps: Vec::new(),
            relays: BTreeSet::new(),
            closed: BTreeSet::new(),
            established: BTreeSet::new(),
            tunnels: BTreeSet::new(),
            requests: Vec::new(),
            heads: Vec::new(),
            said_to: BTreeMap::new(),
            dialled: false,
        };
        if engine_is_server {
            let pod = PodUid::new("server-pod");
            let tunnel = bench.engine.add_server_tunnel(pod, session(), wire, now);
            bench.tunnels.insert(tunnel);
        }
        bench
    }

    fn record(&mut self, content_type: ContentType, bytes: &[u8]) {
        let bytes = &bytes[..bytes.len().min(MAX_PLAINTEXT)];
        let mut record = vec![0; HEADER + bytes.len() + TAIL];
        record[HEADER..HEADER + bytes.len()].copy_from_slice(bytes);
        self.sealer.seal(&mut record, content_type);
        self.net.say(self.wire, &record);
    }

    fn plain(&mut self, bytes: &[u8]) {
        self.record(ContentType::ApplicationData, bytes);
    }

    fn app(&self, number: u8) -> Option<SockId> {
        (!self.apps.is_empty()).then(|| self.apps[usize::from(number) % self.apps.len()])
    }

    fn new_app(&mut self, connecting: bool) -> SockId {
        let app = self.net.open(APP_ROOM, connecting);
        self.apps.push(app);
        app
    }

    fn open(&mut self, authority: &str) {
        let app = self.new_app(false);
        let head = ConnectHead { authority: authority.to_owned(), ..ConnectHead::default() };
        let relay = self.engine.open(permit(), key(), head, app, self.now);
        assert!(self.relays.insert(relay), "a relay's id was given twice");
    }

    fn turn(&mut self) {
        for turns in 0.. {
            assert!(turns < MAX_TURNS, "the engine does not come to rest");
            let mut more = false;
            for (sock, ready) in self.net.take_edges() {
                self.engine.on_event(sock, ready);
                more = true;
            }
            more |= self.engine.turn(&mut self.net, self.now);
            more |= self.take_events();
            let heard = self.net.hear(self.wire);
            more |= !heard.is_empty();
            self.listener.hear(&heard);
            if !more {
                break;
            }
        }
        if let Some(timeout) = self.engine.poll_timeout() {
            assert!(timeout > self.now, "a driver would spin on a deadline in the past");
        }
        assert!(self.engine.stats().queued_bytes <= config().queue_budget + 65_535);
    }

    fn take_events(&mut self) -> bool {
        let mut any = false;
        while let Some(event) = self.engine.poll_event() {
            any = true;
            match event {
                EngineEvent::Dial { dial, .. } if self.dialled => {
                    self.engine.dial_failed(dial, CloseReason::PeerRefused, self.now);
                }
                EngineEvent::Dial { dial, .. } => {
                    self.dialled = true;
                    let tunnel = self.engine.dial_succeeded(dial, session(), self.wire, self.now);
                    self.tunnels.extend(tunnel);
                }
                EngineEvent::Request { request, tunnel, head } => {
                    assert!(self.tunnels.contains(&tunnel));
                    assert!(!head.authority.is_empty());
                    self.requests.push(request);
                    self.heads.push(*head);
                }
                EngineEvent::RequestGone { request } => {
                    self.requests.retain(|open| *open != request);
                }
                EngineEvent::Established { relay, .. } => {
                    assert!(self.established.insert(relay), "established twice");
                    assert!(self.relays.contains(&relay) && !self.closed.contains(&relay));
                }
                EngineEvent::Closed { relay, bytes, .. } => {
                    assert!(self.relays.contains(&relay), "{relay:?} was never begun");
                    assert!(self.closed.insert(relay), "{relay:?} closed twice");
                    self.said_to.insert(relay, bytes.to_app);
                }
                EngineEvent::TunnelClosed { tunnel, .. } => {
                    assert!(self.tunnels.remove(&tunnel), "{tunnel:?} closed twice");
                }
                other => panic!("an event the shell does not know: {other:?}"),
            }
        }
        any
    }

    fn step(&mut self, input: &mut Input<'_>) {
        match input.byte() % 20 {
            0..=3 => {
                let (kind, flags, stream) = (input.byte() % 12, input.byte(), input.byte());
                let payload = input.short().to_vec();
                self.plain(&frame_bytes(kind, flags, u32::from(stream), &payload));
            }
            4 => {
                let (flags, stream) = (input.byte(), input.byte());
                let mut encoder = Encoder::default();
                for _ in 0..input.byte() % 8 {
                    match input.byte() % 4 {
                        0 => encoder.static_name(StaticName::Method, input.short()),
                        1 => encoder.static_name(StaticName::Authority, input.short()),
                        2 => encoder.static_name(StaticName::Status, input.short()),
                        _ => encoder.literal(input.short(), input.short()),
                    };
                }
                self.plain(&frame_bytes(1, flags, u32::from(stream), &encoder.into_block()));
            }
            5 => {
                let stream = input.byte() | 1;
                self.plain(&frame_bytes(1, 4, u32::from(stream), &connect_block()));
            }
            6 => {
                let (stream, length) = (input.byte(), usize::from(input.u16()) % 16_384);
                let payload = vec![b'x'; length];
                let frame = frame_bytes(0, input.byte() & 1, u32::from(stream), &payload);
                for part in frame.chunks(MAX_PLAINTEXT) {
                    self.plain(part);
                }
            }
            7 => {
                let bytes = input.long();
                self.plain(bytes);
            }
            8 => {
                let content_type =
                    [ContentType::Handshake, ContentType::Alert][usize::from(input.byte() & 1)];
                let bytes = input.short();
                self.record(content_type, bytes);
            }
            9 => {
                let requested = input.byte() & 1;
                self.record(ContentType::Handshake, &[24, 0, 0, 1, requested]);
                self.sealer.renew();
            }
            10 => {
                let bytes = input.short();
                self.net.say(self.wire, bytes);
            }
            11 => {
                // A TLS record is cut by TCP anywhere: the rest comes with the next step.
                self.turn();
                self.now += Duration::from_millis(u64::from(input.u16()));
            }
            12 => {
                let number = input.byte();
                let count = usize::from(input.u16());
                if let Some(app) = self.app(number) {
                    self.net.say(app, &vec![b'y'; count]);
                }
            }
            13 => {
                let number = input.byte();
                if let Some(app) = self.app(number) {
                    match input.byte() % 4 {
                        0 => self.net.end(app),
                        1 => self.net.reset(app),
                        2 => self.net.connected(app),
                        _ => drop(self.net.hear(app)),
                    }
                }
            }
            14 | 15 => self.answer(input),
            16 => match input.byte() % 4 {
                0 => self.net.end(self.wire),
                1 => self.net.reset(self.wire),
                2 => self.engine.retire(Retire::All, self.now),
                _ => self.engine.retire(Retire::Pod(PodUid::new("server-pod")), self.now),
            },
            17 => {
                let number = usize::from(input.byte());
                if let Some(relay) =
                    self.relays.iter().nth(number % self.relays.len().max(1)).copied()
                {
                    self.engine.cut(relay, CloseReason::PolicyDenied, self.now);
                }
            }
            18 if !self.listener.engine_is_server => self.open("10.0.0.2:80"),
            18 => self.plain(&frame_bytes(4, 1, 0, &[])),
            _ => {
                let increment = u32::from(input.u16()) << (input.byte() % 16);
                let stream = u32::from(input.byte());
                self.plain(&frame_bytes(8, 0, stream, &increment.to_be_bytes()));
            }
        }
        if input.byte() & 1 == 0 {
            self.turn();
        }
    }

    fn answer(&mut self, input: &mut Input<'_>) {
        let how = input.byte();
        let Some(request) = self.requests.pop() else { return };
        if how.is_multiple_of(4) {
            self.engine.refuse(
                request,
                400 + u16::from(how / 4),
                CloseReason::PolicyDenied,
                self.now,
            );
            return;
        }
        let app = self.new_app(how % 4 == 1);
        let response =
            ResponseHead { baggage: Some("service.name=a".into()), extensions: Vec::new() };
        let relay = self.engine.accept(permit(), request, app, response, self.now);
        self.relays.insert(relay);
    }

    /// Everybody leaves: nothing may stay.
    fn finish(mut self) {
        self.turn();
        self.net.reset(self.wire);
        for app in self.apps.clone() {
            self.net.reset(app);
        }
        self.turn();
        for request in std::mem::take(&mut self.requests) {
            self.engine.refuse(request, 503, CloseReason::PeerRefused, self.now);
        }
        self.engine.retire(Retire::All, self.now);
        for _ in 0..64 {
            self.turn();
            let Some(timeout) = self.engine.poll_timeout() else { break };
            self.now = timeout;
        }
        self.turn();
        assert_eq!(
            self.engine.stats(),
            mesh_tunnel::EngineStats::default(),
            "something is left behind"
        );
        if !self.listener.engine_is_server && !self.dialled {
            self.net.close(self.wire);
        }
        assert_eq!(self.net.left_open(), [], "sockets nobody closed");
        assert!(self.tunnels.is_empty(), "tunnels that never closed: {:?}", self.tunnels);
        let opened = self.relays.iter().filter(|relay| !self.closed.contains(relay)).count();
        assert_eq!(opened, 0, "relays that never closed");
    }
}

/// A peer that dialled and says anything.
pub fn server(data: &[u8]) {
    let mut bench = Bench::new(true);
    let mut input = Input::new(data);
    if input.byte() & 1 == 0 {
        bench.plain(PREFACE);
        bench.plain(&frame_bytes(4, 0, 0, &[]));
    }
    while !input.is_empty() {
        bench.step(&mut input);
    }
    bench.finish();
}

/// A peer that was dialled and says anything.
pub fn client(data: &[u8]) {
    let mut bench = Bench::new(false);
    let mut input = Input::new(data);
    let options = input.byte();
    for _ in 0..=options % 3 {
        bench.open("10.0.0.2:80");
    }
    bench.turn();
    if options & 0x80 == 0 {
        bench.plain(&frame_bytes(4, 0, 0, &[]));
        bench.plain(&frame_bytes(4, 1, 0, &[]));
    }
    while !input.is_empty() {
        bench.step(&mut input);
    }
    bench.finish();
}

/// A CONNECT with any header block: what comes through is what the agent then reads.
pub fn request_head(data: &[u8]) {
    let mut bench = Bench::new(true);
    bench.plain(PREFACE);
    bench.plain(&frame_bytes(4, 0, 0, &[]));
    let mut input = Input::new(data);
    let mut encoder = Encoder::default();
    let raw = input.byte() & 1 == 1;
    let block = if raw {
        input.rest().to_vec()
    } else {
        while !input.is_empty() {
            encoder.literal(input.short(), input.short());
        }
        encoder.into_block()
    };
    let mut parts = block.chunks(16_000).peekable();
    let mut kind = 1;
    while let Some(part) = parts.next() {
        let end = if parts.peek().is_none() { 4 } else { 0 };
        for piece in frame_bytes(kind, end, 1, part).chunks(MAX_PLAINTEXT) {
            bench.plain(piece);
        }
        kind = 9;
    }
    bench.turn();
    for head in &bench.heads {
        let parsed: Result<Authority, _> = head.authority.parse();
        drop(parsed);
        let bytes = |text: &Option<String>| text.clone().unwrap_or_default().into_bytes();
        assert!(Baggage::parse([bytes(&head.baggage).as_slice()]).service.len() <= 253);
        drop(Forwarded::parse(&bytes(&head.forwarded)));
        if let Some(Ok(parent)) = head.traceparent.as_deref().map(str::parse::<TraceParent>) {
            assert_ne!(parent.trace_id(), 0);
        }
        for (name, value) in &head.extensions {
            assert!(name.starts_with("culvert-") && !value.contains(['\r', '\n', '\0']));
        }
    }
    bench.finish();
}

pub(crate) fn request_head_seeds() -> Vec<Vec<u8>> {
    let fields = |fields: &[(&str, &str)]| {
        let mut seed = vec![0];
        for (name, value) in fields {
            seed.extend(short(name.as_bytes()));
            seed.extend(short(value.as_bytes()));
        }
        seed
    };
    vec![
        fields(&[
            (":method", "CONNECT"),
            (":authority", "10.0.0.2:80"),
            ("baggage", "k8s.namespace.name=shop"),
            ("forwarded", "for=\"10.0.0.1:4000\""),
            ("traceparent", "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"),
            ("culvert-x", "y"),
        ]),
        fields(&[(":method", "GET"), (":path", "/"), (":scheme", "https")]),
        fields(&[
            (":method", "CONNECT"),
            (":authority", "cart.shop.svc.cluster.local:80"),
            ("te", "trailers"),
        ]),
        [vec![1], connect_block()].concat(),
    ]
}

/// A step of [`Bench::step`] that is followed by a turn.
fn step(parts: &[&[u8]]) -> Vec<u8> {
    [parts.concat(), vec![0]].concat()
}

pub(crate) fn server_seeds() -> Vec<Vec<u8>> {
    let accept = step(&[&[14, 3]]);
    let connect = step(&[&[5, 1]]);
    let data = step(&[&[6, 1, 1, 0, 0]]);
    let end = step(&[&[6, 1, 0, 0, 1]]);
    vec![
        [
            vec![0],
            connect.clone(),
            accept.clone(),
            data.clone(),
            end,
            step(&[&[12, 0, 1, 0]]),
            step(&[&[13, 0, 0]]),
        ]
        .concat(),
        [
            vec![0],
            connect.clone(),
            step(&[&[14, 0]]),
            step(&[&[5, 3]]),
            step(&[&[14, 1]]),
            step(&[&[13, 0, 2]]),
        ]
        .concat(),
        [
            vec![0],
            step(&[&[0, 4, 0, 0], &short(&[0, 4, 0, 0, 0, 0])]),
            connect.clone(),
            accept.clone(),
            step(&[&[12, 0, 16, 0]]),
            step(&[&[19, 0, 100, 0, 1]]),
        ]
        .concat(),
        [
            vec![0],
            step(&[&[9, 1]]),
            connect.clone(),
            accept.clone(),
            step(&[&[8, 1], &short(&[1, 0])]),
        ]
        .concat(),
        [
            vec![0],
            step(&[&[0, 6, 0, 0], &short(&[1; 8])]),
            step(&[&[0, 3, 0, 1], &short(&[0, 0, 0, 8])]),
            connect,
            accept,
            step(&[&[11, 0xff, 0xff]]),
            step(&[&[16, 2]]),
            data,
        ]
        .concat(),
        [
            vec![1],
            step(&[&[7], &long(&[PREFACE, &frame_bytes(4, 0, 0, &[])].concat())]),
            step(&[&[10], &short(&[23, 3, 3, 0, 1, 0])]),
        ]
        .concat(),
    ]
}

pub(crate) fn client_seeds() -> Vec<Vec<u8>> {
    let ok = step(&[&[4, 4, 1, 1, 2], &short(b"200")]);
    let refused = step(&[&[4, 5, 1, 1, 2], &short(b"503")]);
    vec![
        [
            vec![0],
            ok.clone(),
            step(&[&[6, 1, 1, 0, 0]]),
            step(&[&[12, 0, 4, 0]]),
            step(&[&[13, 0, 0]]),
            step(&[&[6, 1, 0, 0, 1]]),
        ]
        .concat(),
        [vec![1], refused, step(&[&[0, 3, 0, 3], &short(&[0, 0, 0, 7])])].concat(),
        [
            vec![2],
            ok.clone(),
            step(&[&[0, 7, 0, 0], &short(&[0, 0, 0, 1, 0, 0, 0, 0])]),
            step(&[&[18]]),
        ]
        .concat(),
        [vec![0], ok, step(&[&[9, 0]]), step(&[&[11, 0xff, 0xff]]), step(&[&[16, 1]])].concat(),
        [vec![0x80], step(&[&[0, 4, 0, 0], &short(&[0, 3, 0, 0, 0, 0])])].concat(),
    ]
}
