//! Malformed frames and what they are answered with, as h2spec asks for it.

mod support;

use std::time::Instant;

use mesh_model::PodUid;
use mesh_tunnel::wire::{
    ContentType, Encoder, ErrorCode, HEADER, RecordKey, StaticName, TAIL, record_len,
};
use mesh_tunnel::{Engine, EngineConfig, EngineEvent, SockId, Suite};
use support::net::Net;
use support::{Rng, epoch, sessions};

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
const SETTINGS: [u8; 9] = [0, 0, 0, 4, 0, 0, 0, 0, 0];

/// A client that says what it is told to.
struct Client {
    net: Net,
    engine: Engine,
    now: Instant,
    wire: SockId,
    sealer: RecordKey,
    opener: RecordKey,
    received: Vec<u8>,
    plaintext: Vec<u8>,
    closed: bool,
}

impl Client {
    fn new() -> Self {
        let mut net = Net::new(1, false);
        let now = epoch();
        let mut engine = Engine::new(EngineConfig::default(), now);
        let (wire, near) = net.pair(64 << 20);
        let (client, server) = sessions(Suite::Aes128Gcm, &mut Rng(1));
        engine.add_server_tunnel(PodUid::new("pod"), server, near, now);
        Self {
            net,
            engine,
            now,
            wire,
            sealer: RecordKey::new(client.suite, client.tx.clone(), 0),
            opener: RecordKey::new(client.suite, client.rx.clone(), 0),
            received: Vec::new(),
            plaintext: Vec::new(),
            closed: false,
        }
    }

    fn record(&mut self, content_type: ContentType, bytes: &[u8]) {
        let mut record = vec![0; HEADER + bytes.len() + TAIL];
        record[HEADER..HEADER + bytes.len()].copy_from_slice(bytes);
        self.sealer.seal(&mut record, content_type);
        // The engine may have hung up already.
        drop(self.net.write(self.wire, &record));
        self.turn();
    }

    fn say(&mut self, bytes: &[u8]) {
        for chunk in bytes.chunks(16_384) {
            self.record(ContentType::ApplicationData, chunk);
        }
    }

    fn turn(&mut self) {
        loop {
            let mut more = false;
            for (sock, ready) in self.net.take_edges() {
                self.engine.on_event(sock, ready);
                more = true;
            }
            more |= self.engine.turn(&mut self.net, self.now);
            if !more {
                break;
            }
        }
        while let Some(event) = self.engine.poll_event() {
            self.closed |= matches!(event, EngineEvent::TunnelClosed { .. });
        }
        if let Ok(bytes) = self.net.read(self.wire, 1 << 20) {
            self.received.extend(bytes);
        }
        while let Ok(Some(length)) = record_len(&self.received)
            && length <= self.received.len()
        {
            let mut record: Vec<u8> = self.received.drain(..length).collect();
            let (content_type, size) = self.opener.open(&mut record).unwrap();
            if content_type == ContentType::ApplicationData {
                self.plaintext.extend(&record[HEADER..HEADER + size]);
            }
        }
    }

    /// The first GOAWAY or RST_STREAM: `(stream, code)`, with stream 0 for GOAWAY.
    fn refusal(&self) -> Option<(u32, ErrorCode)> {
        let mut rest = &self.plaintext[..];
        while rest.len() >= 9 {
            let length = u32::from_be_bytes([0, rest[0], rest[1], rest[2]]) as usize;
            let word = |at: usize| u32::from_be_bytes(rest[at..at + 4].try_into().unwrap());
            match rest[3] {
                3 => return Some((word(5), ErrorCode(word(9)))),
                7 => return Some((0, ErrorCode(word(13)))),
                _ => rest = &rest[9 + length..],
            }
        }
        None
    }
}

fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let mut frame = vec![0, (payload.len() >> 8) as u8, payload.len() as u8, kind, flags];
    frame[0] = (payload.len() >> 16) as u8;
    frame.extend(stream.to_be_bytes());
    frame.extend(payload);
    frame
}

fn block() -> Vec<u8> {
    let mut encoder = Encoder::default();
    encoder.static_name(StaticName::Method, b"CONNECT").static_name(StaticName::Authority, b"a:1");
    encoder.into_block()
}

fn open(stream: u32) -> Vec<u8> {
    frame(1, 4, stream, &block())
}

fn setting(id: u16, value: u32) -> Vec<u8> {
    frame(4, 0, 0, &[&id.to_be_bytes()[..], &value.to_be_bytes()].concat())
}

#[test]
fn malformed_frames_are_refused_with_the_right_code() {
    use ErrorCode as E;
    let long = frame(0, 0, 1, &vec![0; (1 << 20) + 1]);
    let upper = {
        let mut encoder = Encoder::default();
        encoder
            .static_name(StaticName::Method, b"CONNECT")
            .static_name(StaticName::Authority, b"a:1")
            .literal(b"Upper", b"x");
        frame(1, 4, 1, &encoder.into_block())
    };
    let continuations = [frame(1, 0, 1, &block()), frame(9, 0, 1, &[]).repeat(40)].concat();
    let cases: Vec<(&str, Vec<u8>, (u32, ErrorCode))> = vec![
        ("DATA on stream 0", frame(0, 0, 0, b"x"), (0, E::PROTOCOL_ERROR)),
        ("DATA on an idle stream", frame(0, 0, 1, b"x"), (0, E::PROTOCOL_ERROR)),
        (
            "DATA behind END_STREAM",
            [frame(1, 5, 1, &block()), frame(0, 0, 1, b"x")].concat(),
            (1, E::STREAM_CLOSED),
        ),
        ("DATA longer than allowed", [open(1), long].concat(), (0, E::FRAME_SIZE_ERROR)),
        (
            "DATA padded beyond its end",
            [open(1), frame(0, 8, 1, &[5, 1, 2])].concat(),
            (0, E::PROTOCOL_ERROR),
        ),
        ("DATA padded, empty", [open(1), frame(0, 8, 1, &[])].concat(), (0, E::FRAME_SIZE_ERROR)),
        ("HEADERS on stream 0", frame(1, 4, 0, &block()), (0, E::PROTOCOL_ERROR)),
        ("HEADERS on an even stream", open(2), (0, E::PROTOCOL_ERROR)),
        ("HEADERS on a lower stream", [open(5), open(3)].concat(), (0, E::PROTOCOL_ERROR)),
        ("HEADERS twice", [open(1), open(1)].concat(), (1, E::PROTOCOL_ERROR)),
        (
            "HEADERS behind END_STREAM",
            [frame(1, 5, 1, &block()), open(1)].concat(),
            (1, E::STREAM_CLOSED),
        ),
        ("HEADERS with an upper case name", upper, (1, E::PROTOCOL_ERROR)),
        ("HEADERS with a broken block", frame(1, 4, 1, &[0x80]), (0, E::COMPRESSION_ERROR)),
        ("HEADERS without a method", frame(1, 4, 1, &[]), (1, E::PROTOCOL_ERROR)),
        ("PRIORITY on stream 0", frame(2, 0, 0, &[0; 5]), (0, E::PROTOCOL_ERROR)),
        ("PRIORITY too short", frame(2, 0, 1, &[0; 4]), (0, E::FRAME_SIZE_ERROR)),
        ("RST_STREAM on stream 0", frame(3, 0, 0, &[0; 4]), (0, E::PROTOCOL_ERROR)),
        ("RST_STREAM on an idle stream", frame(3, 0, 1, &[0; 4]), (0, E::PROTOCOL_ERROR)),
        (
            "RST_STREAM too long",
            [open(1), frame(3, 0, 1, &[0; 5])].concat(),
            (0, E::FRAME_SIZE_ERROR),
        ),
        ("SETTINGS on a stream", frame(4, 0, 1, &[]), (0, E::PROTOCOL_ERROR)),
        ("SETTINGS of 5 bytes", frame(4, 0, 0, &[0; 5]), (0, E::FRAME_SIZE_ERROR)),
        ("SETTINGS ACK with payload", frame(4, 1, 0, &[0; 6]), (0, E::FRAME_SIZE_ERROR)),
        ("SETTINGS push 2", setting(2, 2), (0, E::PROTOCOL_ERROR)),
        ("SETTINGS window 2^31", setting(4, 1 << 31), (0, E::FLOW_CONTROL_ERROR)),
        ("SETTINGS frame size 16383", setting(5, 16_383), (0, E::PROTOCOL_ERROR)),
        ("SETTINGS frame size 2^24", setting(5, 1 << 24), (0, E::PROTOCOL_ERROR)),
        ("PUSH_PROMISE", frame(5, 4, 1, &[0; 4]), (0, E::PROTOCOL_ERROR)),
        ("PING on a stream", frame(6, 0, 1, &[0; 8]), (0, E::PROTOCOL_ERROR)),
        ("PING of 7 bytes", frame(6, 0, 0, &[0; 7]), (0, E::FRAME_SIZE_ERROR)),
        ("GOAWAY on a stream", frame(7, 0, 1, &[0; 8]), (0, E::PROTOCOL_ERROR)),
        ("GOAWAY of 7 bytes", frame(7, 0, 0, &[0; 7]), (0, E::FRAME_SIZE_ERROR)),
        ("WINDOW_UPDATE of 3 bytes", frame(8, 0, 0, &[0; 3]), (0, E::FRAME_SIZE_ERROR)),
        ("WINDOW_UPDATE 0", frame(8, 0, 0, &[0; 4]), (0, E::PROTOCOL_ERROR)),
        (
            "WINDOW_UPDATE 0 on a stream",
            [open(1), frame(8, 0, 1, &[0; 4])].concat(),
            (1, E::PROTOCOL_ERROR),
        ),
        ("WINDOW_UPDATE on an idle stream", frame(8, 0, 1, &[0, 0, 0, 1]), (0, E::PROTOCOL_ERROR)),
        (
            "WINDOW_UPDATE overflow",
            frame(8, 0, 0, &[0x7f, 255, 255, 255]),
            (0, E::FLOW_CONTROL_ERROR),
        ),
        (
            "WINDOW_UPDATE overflow on a stream",
            [open(1), frame(8, 0, 1, &[0x7f, 255, 255, 255])].concat(),
            (1, E::FLOW_CONTROL_ERROR),
        ),
        ("CONTINUATION alone", frame(9, 4, 1, &[]), (0, E::PROTOCOL_ERROR)),
        (
            "a frame inside a block",
            [frame(1, 0, 1, &block()), frame(6, 0, 0, &[0; 8])].concat(),
            (0, E::PROTOCOL_ERROR),
        ),
        (
            "CONTINUATION of another stream",
            [frame(1, 0, 1, &block()), frame(9, 4, 3, &[])].concat(),
            (0, E::PROTOCOL_ERROR),
        ),
        ("too many CONTINUATIONs", continuations, (0, E::ENHANCE_YOUR_CALM)),
        ("a block without end", frame(1, 0, 1, &vec![0; 70_000]), (0, E::ENHANCE_YOUR_CALM)),
        ("a flood of PINGs", frame(6, 0, 0, &[0; 8]).repeat(20_000), (0, E::ENHANCE_YOUR_CALM)),
        ("a flood of SETTINGS", frame(4, 0, 0, &[]).repeat(20_000), (0, E::ENHANCE_YOUR_CALM)),
        (
            "a flood of empty DATA",
            [open(1), frame(0, 0, 1, &[]).repeat(20_000)].concat(),
            (0, E::ENHANCE_YOUR_CALM),
        ),
        (
            "more DATA than the stream's window",
            [open(1), frame(0, 0, 1, &vec![0; 1 << 20]).repeat(5)].concat(),
            (1, E::FLOW_CONTROL_ERROR),
        ),
    ];
    for (name, bytes, expected) in cases {
        let mut client = Client::new();
        client.say(PREFACE);
        client.say(&SETTINGS);
        client.say(&bytes);
        assert_eq!(client.refusal(), Some(expected), "{name}");
        assert_eq!(client.closed, expected.0 == 0, "{name}");
    }
}

#[test]
fn a_connection_that_does_not_begin_right_is_refused() {
    for bytes in [&b"GET / HTTP/1.1\r\n\r\n"[..], &[PREFACE, &frame(6, 0, 0, &[0; 8])].concat()] {
        let mut client = Client::new();
        client.say(bytes);
        assert_eq!(client.refusal(), Some((0, ErrorCode::PROTOCOL_ERROR)));
    }
}

#[test]
fn unknown_frames_settings_and_flags_are_ignored() {
    let mut client = Client::new();
    client.say(PREFACE);
    client.say(&SETTINGS);
    client.say(&frame(0x77, 0xff, 9, &[1; 500]));
    client.say(&setting(0x99, 7));
    client.say(&frame(6, 0xfe, 0, &[3; 8]));
    client.say(&open(1));
    assert_eq!(client.refusal(), None);
    assert!(!client.closed);
}

#[test]
fn any_bytes_are_survived() {
    for seed in support::seeds(300) {
        let mut rng = Rng(seed);
        let mut client = Client::new();
        client.say(PREFACE);
        client.say(&SETTINGS);
        for _ in 0..30 {
            let length = rng.below(40);
            let payload: Vec<u8> = (0..length).map(|_| rng.next() as u8).collect();
            let (kind, flags) = (rng.below(11) as u8, rng.next() as u8);
            let bytes = frame(kind, flags, rng.below(8) as u32, &payload);
            client.say(if rng.chance(10) { &payload } else { &bytes });
        }
    }
}
