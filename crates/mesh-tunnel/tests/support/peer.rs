//! A peer that says what it is told to, frame by frame, and one engine behind a wire in memory.

use std::time::{Duration, Instant};

use mesh_model::PodUid;
use mesh_tunnel::wire::{
    ContentType, Encoder, ErrorCode, HEADER, RecordKey, StaticName, TAIL, record_len,
};
use mesh_tunnel::{Engine, EngineConfig, EngineEvent, RelayId, SockId, Suite, TunnelId};

use super::net::Net;
use super::permit::permit;
use super::{Rng, epoch, head, key, sessions};

pub const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
pub const SETTINGS: [u8; 9] = [0, 0, 0, 4, 0, 0, 0, 0, 0];
pub const SETTINGS_ACK: [u8; 9] = [0, 0, 0, 4, 1, 0, 0, 0, 0];

pub struct Peer {
    pub net: Net,
    pub engine: Engine,
    pub now: Instant,
    pub wire: SockId,
    sealer: RecordKey,
    opener: RecordKey,
    received: Vec<u8>,
    /// What the engine said, without TLS.
    pub plaintext: Vec<u8>,
    pub tunnel: TunnelId,
    pub events: Vec<EngineEvent>,
    pub turns: u64,
    /// It reads what the engine writes.
    pub reads: bool,
}

impl Peer {
    /// A client of an engine that serves.
    pub fn client(config: EngineConfig) -> Self {
        Self::new(config, |engine, net, now| {
            let (wire, near) = net.pair(64 << 20);
            let (client, server) = sessions(Suite::Aes128Gcm, &mut Rng(1));
            let tunnel = engine.add_server_tunnel(PodUid::new("pod"), server, near, now);
            (wire, client, tunnel)
        })
    }

    /// A server that an engine dials for the first of its applications, whose relay and far socket are given back.
    pub fn server(config: EngineConfig) -> (Self, RelayId, SockId) {
        let mut opened = None;
        let peer = Self::new(config, |engine, net, now| {
            let (app, near) = net.pair(1 << 20);
            opened = Some((engine.open(permit(), key("w"), head("a:1"), near, now), app));
            let Some(EngineEvent::Dial { dial, .. }) = engine.poll_event() else {
                panic!("an open without a tunnel dials")
            };
            let (wire, near) = net.pair(64 << 20);
            let (client, server) = sessions(Suite::Aes128Gcm, &mut Rng(1));
            let tunnel = engine.dial_succeeded(dial, client, near, now).unwrap();
            (wire, server, tunnel)
        });
        let (relay, app) = opened.unwrap();
        (peer, relay, app)
    }

    fn new(
        config: EngineConfig,
        start: impl FnOnce(
            &mut Engine,
            &mut Net,
            Instant,
        ) -> (SockId, mesh_tunnel::TlsSession, TunnelId),
    ) -> Self {
        let mut net = Net::new(1, false);
        let now = epoch();
        let mut engine = Engine::new(config, now);
        let (wire, session, tunnel) = start(&mut engine, &mut net, now);
        Self {
            net,
            engine,
            now,
            wire,
            sealer: RecordKey::new(session.suite, session.tx.clone(), 0),
            opener: RecordKey::new(session.suite, session.rx.clone(), 0),
            received: Vec::new(),
            plaintext: Vec::new(),
            tunnel,
            events: Vec::new(),
            turns: 0,
            reads: true,
        }
    }

    /// From here on it speaks through another tunnel's wire.
    pub fn become_wire(&mut self, wire: SockId, session: &mesh_tunnel::TlsSession) {
        self.wire = wire;
        self.sealer = RecordKey::new(session.suite, session.tx.clone(), 0);
        self.opener = RecordKey::new(session.suite, session.rx.clone(), 0);
        self.received.clear();
        self.plaintext.clear();
    }

    /// It has said that it renews its key, and does.
    pub fn renewed(&mut self) {
        self.sealer.renew();
    }

    /// Sends one record.
    pub fn record(&mut self, content_type: ContentType, bytes: &[u8]) {
        let mut record = vec![0; HEADER + bytes.len() + TAIL];
        record[HEADER..HEADER + bytes.len()].copy_from_slice(bytes);
        self.sealer.seal(&mut record, content_type);
        // The engine may have hung up already.
        drop(self.net.write(self.wire, &record));
    }

    /// Sends bytes of HTTP/2 and lets the engine work.
    pub fn say(&mut self, bytes: &[u8]) {
        for chunk in bytes.chunks(16_384) {
            self.record(ContentType::ApplicationData, chunk);
            self.turn();
        }
    }

    /// The same in as few records and one turn.
    pub fn say_at_once(&mut self, bytes: &[u8]) {
        for chunk in bytes.chunks(16_384) {
            self.record(ContentType::ApplicationData, chunk);
        }
        self.turn();
    }

    /// Lets the engine work until it waits.
    pub fn turn(&mut self) {
        loop {
            let mut more = false;
            for (sock, ready) in self.net.take_edges() {
                self.engine.on_event(sock, ready);
                more = true;
            }
            more |= self.engine.turn(&mut self.net, self.now);
            self.turns += 1;
            while let Some(event) = self.engine.poll_event() {
                self.events.push(event);
            }
            if !more {
                break;
            }
        }
        if self.reads && !self.net.socks[Net::index(self.wire)].closed {
            self.read();
        }
    }

    fn read(&mut self) {
        if let Ok(bytes) = self.net.read(self.wire, 1 << 20) {
            self.received.extend(bytes);
        }
        let mut at = 0;
        while let Ok(Some(length)) = record_len(&self.received[at..])
            && at + length <= self.received.len()
        {
            let record = &mut self.received[at..at + length];
            let (content_type, size) = self.opener.open(record).unwrap();
            match content_type {
                ContentType::ApplicationData => {
                    self.plaintext.extend(&record[HEADER..HEADER + size]);
                }
                ContentType::Handshake => self.opener.renew(),
                ContentType::Alert => {}
            }
            at += length;
        }
        self.received.drain(..at);
    }

    /// Lets time pass, stopping wherever the engine wants to be called.
    pub fn wait(&mut self, time: Duration) {
        let end = self.now + time;
        self.turn();
        while let Some(next) = self.engine.poll_timeout().filter(|next| *next <= end) {
            assert!(next > self.now, "the engine wants to be called at once, for ever");
            self.now = next;
            self.turn();
        }
        self.now = end;
        self.turn();
    }

    /// The frames the engine sent: `(kind, flags, stream, payload)`.
    pub fn frames(&self) -> Vec<(u8, u8, u32, Vec<u8>)> {
        let mut rest = self.plaintext.strip_prefix(PREFACE).unwrap_or(&self.plaintext);
        let mut frames = Vec::new();
        while rest.len() >= 9 {
            let length = u32::from_be_bytes([0, rest[0], rest[1], rest[2]]) as usize;
            let stream = u32::from_be_bytes(rest[5..9].try_into().unwrap());
            frames.push((rest[3], rest[4], stream, rest[9..9 + length].to_vec()));
            rest = &rest[9 + length..];
        }
        frames
    }

    /// The first GOAWAY with an error, or RST_STREAM: `(stream, code)`, with stream 0 for GOAWAY.
    pub fn refusal(&self) -> Option<(u32, ErrorCode)> {
        let code = |bytes: &[u8]| ErrorCode(u32::from_be_bytes(bytes.try_into().unwrap()));
        self.frames().into_iter().find_map(|(kind, _, stream, payload)| match kind {
            3 => Some((stream, code(&payload))),
            7 => Some((0, code(&payload[4..8]))).filter(|(_, code)| *code != ErrorCode::NO_ERROR),
            _ => None,
        })
    }

    /// Why the tunnel has closed, if it has.
    pub fn tunnel_closed(&self) -> Option<mesh_model::CloseReason> {
        self.events.iter().find_map(|event| {
            let EngineEvent::TunnelClosed { reason, .. } = event else { return None };
            Some(*reason)
        })
    }

    /// Why a relay has closed, if it has.
    pub fn closed(&self, wanted: RelayId) -> Option<mesh_model::CloseReason> {
        self.events.iter().find_map(|event| {
            let EngineEvent::Closed { relay, reason, .. } = event else { return None };
            (*relay == wanted).then_some(*reason)
        })
    }
}

/// A frame.
pub fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let [_, high, middle, low] = u32::try_from(payload.len()).unwrap().to_be_bytes();
    let [a, b, c, d] = stream.to_be_bytes();
    [&[high, middle, low, kind, flags, a, b, c, d], payload].concat()
}

/// The block of a CONNECT.
pub fn block() -> Vec<u8> {
    let mut encoder = Encoder::default();
    encoder.static_name(StaticName::Method, b"CONNECT").static_name(StaticName::Authority, b"a:1");
    encoder.into_block()
}

/// A CONNECT.
pub fn open(stream: u32) -> Vec<u8> {
    frame(1, 4, stream, &block())
}

/// An answer.
pub fn answer(stream: u32, status: &str, end: bool) -> Vec<u8> {
    let mut encoder = Encoder::default();
    encoder.static_name(StaticName::Status, status.as_bytes());
    frame(1, 4 | u8::from(end), stream, &encoder.into_block())
}

/// SETTINGS with one setting.
pub fn setting(id: u16, value: u32) -> Vec<u8> {
    frame(4, 0, 0, &[&id.to_be_bytes()[..], &value.to_be_bytes()].concat())
}

/// GOAWAY.
pub fn goaway(last: u32, code: u32) -> Vec<u8> {
    frame(7, 0, 0, &[last.to_be_bytes(), code.to_be_bytes()].concat())
}
