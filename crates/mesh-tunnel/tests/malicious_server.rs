//! What a server may try on our client role, and what comes of it for the tunnel and for the application.
#![expect(clippy::unwrap_used, reason = "a test's own values are valid")]

mod support;

use std::time::Duration;

use mesh_model::CloseReason as R;
use mesh_tunnel::wire::{ContentType, ErrorCode as E};
use mesh_tunnel::{EngineConfig, EngineEvent};
use support::net::Net;
use support::peer::{Peer, SETTINGS, SETTINGS_ACK, answer, frame, goaway, open, setting};
use support::{Rng, head, key};

fn server() -> (Peer, mesh_tunnel::RelayId, mesh_tunnel::SockId) {
    let (mut peer, relay, app) = Peer::server(EngineConfig::default());
    peer.say(&[SETTINGS, SETTINGS_ACK].concat());
    (peer, relay, app)
}

/// What is said; the refusal the engine sends, if any (stream 0: GOAWAY); how the relay ends, if it does.
type Case = (&'static str, Vec<u8>, Option<(u32, E)>, Option<R>);

#[test]
fn wrong_answers_reset_the_application_and_break_nothing_else() {
    let ok = || answer(1, "200", false);
    let cases: Vec<Case> = vec![
        ("401", answer(1, "401", true), Some((1, E::CANCEL)), Some(R::PeerDenied)),
        ("503", answer(1, "503", true), Some((1, E::CANCEL)), Some(R::PeerRefused)),
        ("302", answer(1, "302", true), Some((1, E::CANCEL)), Some(R::PeerRefused)),
        ("99", answer(1, "099", false), Some((1, E::PROTOCOL_ERROR)), Some(R::ProtocolError)),
        (
            "no number",
            answer(1, "2xx", false),
            Some((1, E::PROTOCOL_ERROR)),
            Some(R::ProtocolError),
        ),
        (
            "100 with an end",
            answer(1, "100", true),
            Some((1, E::PROTOCOL_ERROR)),
            Some(R::ProtocolError),
        ),
        ("a request", open(1), Some((1, E::PROTOCOL_ERROR)), Some(R::ProtocolError)),
        (
            "an empty head",
            frame(1, 4, 1, &[]),
            Some((1, E::PROTOCOL_ERROR)),
            Some(R::ProtocolError),
        ),
        ("200 twice", [ok(), ok()].concat(), Some((1, E::PROTOCOL_ERROR)), Some(R::ProtocolError)),
        (
            "DATA before 200",
            frame(0, 0, 1, b"x"),
            Some((1, E::PROTOCOL_ERROR)),
            Some(R::ProtocolError),
        ),
        (
            "DATA behind the end",
            [ok(), frame(0, 1, 1, b"x"), frame(0, 0, 1, b"y")].concat(),
            Some((1, E::STREAM_CLOSED)),
            Some(R::ProtocolError),
        ),
        (
            "an answer to nothing",
            answer(3, "200", false),
            Some((0, E::PROTOCOL_ERROR)),
            Some(R::ProtocolError),
        ),
        (
            "an answer on an even stream",
            answer(2, "200", false),
            Some((0, E::PROTOCOL_ERROR)),
            Some(R::ProtocolError),
        ),
        (
            "DATA on nothing",
            frame(0, 0, 3, b"x"),
            Some((0, E::PROTOCOL_ERROR)),
            Some(R::ProtocolError),
        ),
        (
            "RST_STREAM on nothing",
            frame(3, 0, 3, &[0; 4]),
            Some((0, E::PROTOCOL_ERROR)),
            Some(R::ProtocolError),
        ),
        (
            "PUSH_PROMISE",
            frame(5, 4, 1, &[0, 0, 0, 2]),
            Some((0, E::PROTOCOL_ERROR)),
            Some(R::ProtocolError),
        ),
        ("SETTINGS with push", setting(2, 1), Some((0, E::PROTOCOL_ERROR)), Some(R::ProtocolError)),
        ("RST_STREAM", frame(3, 0, 1, &[0, 0, 0, 2]), None, Some(R::PeerRefused)),
        (
            "200 and RST_STREAM",
            [ok(), frame(3, 0, 1, &[0, 0, 0, 10])].concat(),
            None,
            Some(R::ServerReset),
        ),
        (
            "200 and RST_STREAM NO_ERROR",
            [ok(), frame(3, 0, 1, &[0; 4])].concat(),
            None,
            Some(R::ServerReset),
        ),
        ("GOAWAY below an open stream", [ok(), goaway(0, 0)].concat(), None, Some(R::TunnelClosed)),
        ("GOAWAY above it", [ok(), goaway(1, 0)].concat(), None, None),
        (
            "many 1xx",
            answer(1, "103", false).repeat(11_000),
            Some((0, E::ENHANCE_YOUR_CALM)),
            Some(R::ProtocolError),
        ),
        (
            "more DATA than the window",
            [ok(), frame(0, 0, 1, &vec![0; 1 << 20]).repeat(6)].concat(),
            Some((1, E::FLOW_CONTROL_ERROR)),
            Some(R::ProtocolError),
        ),
    ];
    for (name, bytes, refusal, closed) in cases {
        let (mut peer, relay, app) = server();
        peer.say(&bytes);
        assert_eq!(peer.refusal(), refusal, "{name}");
        assert_eq!(peer.closed(relay), closed, "{name}");
        let whole_tunnel = refusal.is_some_and(|(stream, _)| stream == 0);
        let idle_and_drained = name == "GOAWAY below an open stream";
        assert_eq!(peer.tunnel_closed().is_some(), whole_tunnel || idle_and_drained, "{name}");
        if closed.is_some() {
            let error = peer.net.read(app, 8 << 20).map(|bytes| bytes.len());
            assert!(error.is_err() || error.is_ok_and(|count| count > 0), "{name}: no clean end");
        }
        peer.engine.retire(mesh_tunnel::Retire::All, peer.now);
        peer.engine.cut(relay, R::PolicyChanged, peer.now);
        peer.wait(Duration::from_secs(60));
        assert_eq!(peer.engine.stats(), mesh_tunnel::EngineStats::default(), "{name}");
    }
}

/// Answers each dial with a tunnel whose server does what `say` says to each CONNECT's stream; returns how many were dialled.
fn dials_until_given_up(say: impl Fn(u32) -> Vec<u8>) -> (usize, Option<R>) {
    let (mut peer, relay, _) = server();
    let mut dials = 1;
    let mut answered = 0;
    for _ in 0..100 {
        let asked: Vec<u32> =
            peer.frames().iter().filter(|frame| frame.0 == 1).map(|frame| frame.2).collect();
        for stream in &asked[answered..] {
            peer.say(&say(*stream));
        }
        answered = asked.len();
        let wanted = peer.events.iter().find_map(|event| {
            let EngineEvent::Dial { dial, .. } = event else { return None };
            Some(*dial)
        });
        if let Some(dial) = wanted {
            peer.events.retain(|event| !matches!(event, EngineEvent::Dial { .. }));
            dials += 1;
            peer = redial(peer, dial);
            peer.say(&[SETTINGS, SETTINGS_ACK].concat());
            answered = 0;
        }
        if peer.closed(relay).is_some() {
            break;
        }
    }
    (dials, peer.closed(relay))
}

fn redial(mut peer: Peer, dial: mesh_tunnel::DialId) -> Peer {
    let (wire, near) = peer.net.pair(64 << 20);
    let (client, server) = support::sessions(mesh_tunnel::Suite::Aes128Gcm, &mut Rng(peer.turns));
    peer.tunnel = peer.engine.dial_succeeded(dial, client, near, peer.now).unwrap();
    peer.become_wire(wire, &server);
    peer
}

#[test]
fn a_server_that_never_processes_anything_is_given_up() {
    let (dials, closed) = dials_until_given_up(|_| goaway(0, 0));
    assert_eq!((dials, closed), (5, Some(R::TunnelClosed)));
    let refused = |stream| frame(3, 0, stream, &[0, 0, 0, 7]);
    let (dials, closed) = dials_until_given_up(refused);
    assert!(dials <= 5, "{dials}");
    assert_eq!(closed, Some(R::PeerRefused));
}

#[test]
fn a_server_without_room_for_streams_does_not_make_us_dial_for_ever() {
    let (mut peer, _, _) = server();
    peer.say(&setting(3, 0));
    for _ in 0..5 {
        let (_app, near) = peer.net.pair(1_000);
        peer.engine.open(support::permit::permit(), key("w"), head("a:1"), near, peer.now);
    }
    let mut dials = 0;
    for _ in 0..50 {
        peer.turn();
        let Some(at) =
            peer.events.iter().position(|event| matches!(event, EngineEvent::Dial { .. }))
        else {
            break;
        };
        let EngineEvent::Dial { dial, .. } = peer.events.remove(at) else { unreachable!() };
        dials += 1;
        peer = redial(peer, dial);
        peer.say(&setting(3, 0));
    }
    assert_eq!(dials, 5, "one for each open, and no more");
}

#[test]
fn a_server_that_never_answers_is_not_waited_for_longer_than_set() {
    let (mut peer, relay, app) = server();
    for _ in 0..4 {
        peer.wait(Duration::from_secs(4));
        peer.say(&frame(6, 0, 0, &[0; 8]));
    }
    assert_eq!(peer.closed(relay), None);
    peer.wait(Duration::from_secs(5));
    assert_eq!(peer.closed(relay), Some(R::ConnectTimeout));
    assert_eq!(peer.refusal(), Some((1, E::CANCEL)));
    assert!(peer.net.reset(app));
    assert_eq!(peer.tunnel_closed(), None, "others may go on");
}

#[test]
fn a_server_that_does_not_read_holds_no_more_than_the_bound() {
    let (mut peer, relay, app) = server();
    peer.say(&answer(1, "200", false));
    peer.say(&[setting(4, (1 << 31) - 1), frame(8, 0, 0, &[0x7f, 0xfe, 0, 0])].concat());
    peer.net.socks[Net::index(peer.wire)].capacity = 0;
    peer.reads = false;
    let mut taken = 0;
    for _ in 0..100 {
        taken += peer.net.write(app, &vec![7; 1 << 20]).unwrap_or(0);
        peer.turn();
    }
    let bound = 2 * EngineConfig::default().send_buffer + (1 << 20);
    assert!(taken <= bound, "{taken} bytes were taken for a peer that reads nothing");
    // Asking for answers that are not taken ends it.
    for _ in 0..9_000 {
        peer.say(&frame(6, 0, 0, &[0; 8]));
        peer.say_at_once(&setting(4, 70_000).repeat(2));
        peer.now += Duration::from_millis(2);
    }
    assert!(peer.tunnel_closed().is_some());
    assert!(peer.closed(relay).is_some());
}

#[test]
fn any_bytes_are_survived() {
    for seed in support::seeds(300) {
        let mut rng = Rng(seed);
        let (mut peer, _, _) = server();
        for _ in 0..30 {
            let payload: Vec<u8> =
                (0..rng.below(40)).map(|_| rng.next().to_be_bytes()[0]).collect();
            let [kind, flags, stream, how, ..] = rng.next().to_be_bytes();
            match how % 10 {
                0 => peer.say(&payload),
                1 => peer.say(&answer(1, "200", false)),
                2 => {
                    peer.record(ContentType::Handshake, &[24, 0, 0, 1, how % 2]);
                    peer.turn();
                    peer.renewed();
                }
                _ => peer.say(&frame(kind % 11, flags, u32::from(stream % 5), &payload)),
            }
        }
        peer.engine.retire(mesh_tunnel::Retire::All, peer.now);
        peer.wait(Duration::from_secs(120));
        assert_eq!(peer.engine.stats().tunnels, 0, "seed {seed}");
    }
}
