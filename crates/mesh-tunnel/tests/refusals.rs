//! Malformed frames and what they are answered with, as h2spec asks for it.

mod support;

use mesh_model::CloseReason;
use mesh_tunnel::wire::{ContentType, Encoder, ErrorCode, StaticName};
use mesh_tunnel::{EngineConfig, EngineEvent};
use support::Rng;
use support::peer::{PREFACE, Peer, SETTINGS, block, frame, open, setting};

fn client() -> Peer {
    Peer::client(EngineConfig::default())
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
            "DATA behind DATA with END_STREAM",
            [open(1), frame(0, 1, 1, b"x"), frame(0, 0, 1, b"y")].concat(),
            (1, E::STREAM_CLOSED),
        ),
        ("HEADERS of 1 MiB and more", frame(1, 4, 1, &bomb()), (0, E::COMPRESSION_ERROR)),
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
        let mut client = client();
        client.say(PREFACE);
        client.say(&SETTINGS);
        client.say(&bytes);
        assert_eq!(client.refusal(), Some(expected), "{name}");
        assert_eq!(client.tunnel_closed().is_some(), expected.0 == 0, "{name}");
    }
}

#[test]
fn a_connection_that_does_not_begin_right_is_refused() {
    for bytes in [&b"GET / HTTP/1.1\r\n\r\n"[..], &[PREFACE, &frame(6, 0, 0, &[0; 8])].concat()] {
        let mut client = client();
        client.say(bytes);
        assert_eq!(client.refusal(), Some((0, ErrorCode::PROTOCOL_ERROR)));
    }
}

#[test]
fn unknown_frames_settings_and_flags_are_ignored() {
    let mut client = client();
    client.say(PREFACE);
    client.say(&SETTINGS);
    client.say(&frame(0x77, 0xff, 9, &[1; 500]));
    client.say(&setting(0x99, 7));
    client.say(&frame(6, 0xfe, 0, &[3; 8]));
    client.say(&open(1));
    assert_eq!(client.refusal(), None);
    assert_eq!(client.tunnel_closed(), None);
}

#[test]
fn any_bytes_are_survived() {
    for seed in support::seeds(300) {
        let mut rng = Rng(seed);
        let mut client = client();
        client.say(PREFACE);
        client.say(&SETTINGS);
        for _ in 0..30 {
            let length = rng.below(40);
            let payload: Vec<u8> = (0..length).map(|_| rng.next().to_be_bytes()[0]).collect();
            let [kind, flags, stream, ..] = rng.next().to_be_bytes();
            let bytes = frame(kind % 11, flags, u32::from(stream % 8), &payload);
            client.say(if rng.chance(10) { &payload } else { &bytes });
        }
    }
}

/// A block of 5 KiB that names a long entry of the table a thousand times.
fn bomb() -> Vec<u8> {
    let mut block = vec![0x40, 1, b'a', 0x7f, 0x80, 0x1e];
    block.resize(block.len() + 0x7f + 0xf00, b'v');
    block.extend([0x80 | 62].repeat(1_000));
    block
}

#[test]
fn a_peer_may_not_have_us_refuse_without_end() {
    for (reason, closes) in [(CloseReason::PolicyDenied, true), (CloseReason::Overloaded, false)] {
        let mut client = client();
        client.say(PREFACE);
        client.say(&SETTINGS);
        for stream in (1..24_000).step_by(2) {
            client.say(&open(stream));
            for event in std::mem::take(&mut client.events) {
                if let EngineEvent::Request { request, .. } = event {
                    client.engine.refuse(request, 401, reason, client.now);
                } else {
                    client.events.push(event);
                }
            }
            if client.tunnel_closed().is_some() {
                break;
            }
        }
        assert_eq!(client.tunnel_closed().is_some(), closes, "{reason:?}");
        assert_eq!(client.engine.stats().streams, 0);
    }
}

#[test]
fn padding_for_a_stream_that_has_gone_costs_the_tunnel_no_credit() {
    let mut client = client();
    client.say(PREFACE);
    client.say(&SETTINGS);
    // The tunnel's window is 16 MiB: frames of nothing but padding, whose streams are refused while they are under way.
    let mut stream = 1;
    for _ in 0..70_000 {
        let padded = frame(0, 8, stream, &[&[255, 1][..], &[0; 255]].concat());
        client.say(&[&open(stream), &padded[..10]].concat());
        for event in std::mem::take(&mut client.events) {
            if let EngineEvent::Request { request, .. } = event {
                client.engine.refuse(request, 503, CloseReason::Drained, client.now);
            } else {
                client.events.push(event);
            }
        }
        client.say(&padded[10..]);
        client.plaintext.clear();
        stream += 2;
    }
    assert_eq!(client.tunnel_closed(), None);
    assert_eq!(client.refusal(), None);
}

#[test]
fn broken_tls_ends_the_tunnel() {
    for (content_type, bytes) in [
        (ContentType::Alert, &[2, 80][..]),
        (ContentType::Alert, &[1]),
        (ContentType::Handshake, &[1, 0, 0, 0]),
        (ContentType::Handshake, &[4, 0, 0, 0]),
        (ContentType::Handshake, &[24, 0, 0, 1, 7]),
    ] {
        let mut client = client();
        client.say(PREFACE);
        client.record(content_type, bytes);
        client.turn();
        assert!(client.tunnel_closed().is_some(), "{content_type:?} {bytes:?}");
        client.wait(std::time::Duration::from_secs(3));
        assert_eq!(client.engine.stats().sockets, 0);
    }
}
