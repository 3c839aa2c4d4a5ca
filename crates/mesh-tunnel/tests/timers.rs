//! Every clock of the engine, in virtual time: that it strikes when it should, and that nothing is called for ever.

mod support;

use std::time::Duration;

use mesh_model::CloseReason as R;
use mesh_tunnel::wire::ErrorCode as E;
use mesh_tunnel::{EngineConfig, EngineEvent, EngineStats, Retire};
use support::net::Connect;
use support::net::Net;
use support::peer::{PREFACE, Peer, SETTINGS, SETTINGS_ACK, answer, frame, open};
use support::permit::permit;

const SECOND: Duration = Duration::from_secs(1);
const PING_ACK: u8 = 1;

fn client(config: EngineConfig) -> Peer {
    let mut peer = Peer::client(config);
    peer.say(&[PREFACE, &SETTINGS, &SETTINGS_ACK].concat());
    peer
}

/// Answers the PINGs that were not answered yet.
fn answer_pings(peer: &mut Peer, answered: &mut usize) {
    let pings: Vec<_> = peer.frames().into_iter().filter(|f| f.0 == 6 && f.1 == 0).collect();
    for (.., payload) in &pings[*answered..] {
        peer.say(&frame(6, PING_ACK, 0, payload));
    }
    *answered = pings.len();
}

#[test]
fn a_peer_that_does_not_begin_is_refused_in_time() {
    for said in [&b""[..], &PREFACE[..10], PREFACE, &[PREFACE, &SETTINGS].concat()] {
        let mut peer = Peer::client(EngineConfig { ping_timeout: 60 * SECOND, ..<_>::default() });
        peer.say(said);
        peer.wait(9 * SECOND);
        assert_eq!(peer.tunnel_closed(), None);
        peer.wait(SECOND);
        assert_eq!(peer.refusal(), Some((0, E::SETTINGS_TIMEOUT)), "{said:?}");
        assert_eq!(peer.tunnel_closed(), Some(R::ProtocolError));
        // The peer does not close: its socket is waited for as long as set, and no longer.
        peer.wait(SECOND);
        assert_eq!(peer.engine.stats().sockets, 1);
        peer.wait(SECOND);
        assert_eq!(peer.engine.stats(), EngineStats::default());
    }
}

#[test]
fn a_silent_peer_is_asked_and_then_given_up() {
    let mut peer = client(EngineConfig::default());
    let mut answered = 0;
    for _ in 0..10 {
        peer.wait(11 * SECOND);
        answer_pings(&mut peer, &mut answered);
    }
    assert!((9..=11).contains(&answered), "{answered} PINGs in 110 s");
    assert_eq!(peer.tunnel_closed(), None);
    peer.wait(29 * SECOND);
    assert_eq!(peer.tunnel_closed(), None);
    peer.wait(2 * SECOND);
    assert_eq!(peer.tunnel_closed(), Some(R::TimedOut));
}

#[test]
fn an_idle_client_tunnel_goes_and_one_in_use_stays() {
    let (mut peer, relay, app) = Peer::server(EngineConfig::default());
    let mut answered = 0;
    peer.say(&[&SETTINGS[..], &SETTINGS_ACK, &answer(1, "200", false)].concat());
    for _ in 0..40 {
        peer.wait(10 * SECOND);
        answer_pings(&mut peer, &mut answered);
    }
    assert_eq!((peer.tunnel_closed(), peer.closed(relay)), (None, None));
    use mesh_tunnel::Io;
    peer.net.abort(app);
    peer.turn();
    assert_eq!(peer.closed(relay), Some(R::ClientReset));
    for _ in 0..29 {
        peer.wait(10 * SECOND);
        answer_pings(&mut peer, &mut answered);
    }
    assert_eq!(peer.tunnel_closed(), None);
    peer.wait(10 * SECOND);
    assert_eq!(peer.tunnel_closed(), Some(R::Complete));
    peer.wait(3 * SECOND);
    assert_eq!(peer.engine.stats(), EngineStats::default());
}

#[test]
fn a_drain_lets_streams_go_on_until_its_deadline() {
    for (deadline, survives) in [(None, true), (Some(30 * SECOND), false)] {
        let mut peer = client(EngineConfig { drain_timeout: deadline, ..EngineConfig::default() });
        let mut answered = 0;
        peer.say(&open(1));
        peer.engine.retire(Retire::All, peer.now);
        peer.turn();
        // The PING behind the warning is answered: streams that were on their way are taken, later ones are not.
        peer.say(&open(3));
        answer_pings(&mut peer, &mut answered);
        peer.say(&open(5));
        let asked = peer.events.iter().filter(|e| matches!(e, EngineEvent::Request { .. })).count();
        assert_eq!(asked, 2);
        for _ in 0..6 {
            peer.wait(6 * SECOND);
            answer_pings(&mut peer, &mut answered);
        }
        let expected = if survives { None } else { Some(R::Drained) };
        assert_eq!(peer.tunnel_closed(), expected);
    }
}

#[test]
fn a_drain_does_not_wait_for_the_answer_to_its_warning_for_ever() {
    let mut peer = client(EngineConfig::default());
    peer.engine.retire(Retire::Tunnel(peer.tunnel), peer.now);
    for _ in 0..10 {
        // It lives, but it does not answer that one.
        peer.wait(2 * SECOND);
        peer.say(&frame(6, 0, 0, &[1; 8]));
    }
    peer.wait(SECOND);
    assert_eq!(peer.tunnel_closed(), Some(R::Complete));
}

#[test]
fn an_application_that_does_not_connect_is_given_up() {
    let mut peer = client(EngineConfig { ping_interval: 100 * SECOND, ..EngineConfig::default() });
    peer.say(&open(1));
    let Some(EngineEvent::Request { request, .. }) = peer.events.pop() else { panic!("a request") };
    let (_server, app) = peer.net.pair(100);
    peer.net.socks[Net::index(app)].connect = Connect::Never;
    let relay =
        peer.engine.accept(permit(), request, app, mesh_tunnel::ResponseHead::default(), peer.now);
    peer.wait(9 * SECOND);
    assert_eq!(peer.closed(relay), None);
    peer.wait(SECOND);
    assert_eq!(peer.closed(relay), Some(R::ConnectTimeout));
    assert!(peer.frames().iter().any(|frame| frame.0 == 1 && frame.2 == 1), "503");
    assert_eq!(peer.tunnel_closed(), None);
}

#[test]
fn an_application_that_cannot_be_connected_to_is_refused_with_the_systems_error() {
    const ENETUNREACH: i32 = 101;
    let mut peer = client(EngineConfig::default());
    peer.say(&open(1));
    let Some(EngineEvent::Request { request, .. }) = peer.events.pop() else { panic!("a request") };
    let (_server, app) = peer.net.pair(100);
    peer.net.socks[Net::index(app)].connect = Connect::Failed(ENETUNREACH);
    let relay =
        peer.engine.accept(permit(), request, app, mesh_tunnel::ResponseHead::default(), peer.now);
    peer.wait(SECOND);
    let ended = peer.events.iter().find_map(|event| {
        let EngineEvent::Closed { relay, reason, connect_error, .. } = event else { return None };
        Some((*relay, *reason, *connect_error))
    });
    assert_eq!(ended, Some((relay, R::ConnectFailed, Some(ENETUNREACH))));
}

#[test]
fn a_failed_dial_names_those_that_waited_for_it() {
    let mut engine = mesh_tunnel::Engine::new(EngineConfig::default(), support::epoch());
    let mut net = Net::new(1, false);
    let now = support::epoch();
    let mut open = |engine: &mut mesh_tunnel::Engine, key| {
        let (_far, app) = net.pair(100);
        engine.open(permit(), support::key(key), support::head("a:1"), app, now)
    };
    let (first, second) = (open(&mut engine, "w"), open(&mut engine, "w"));
    let Some(EngineEvent::Dial { dial, .. }) = engine.poll_event() else { panic!("a dial") };
    let elsewhere = open(&mut engine, "x");
    assert_eq!(engine.dial_failed(dial, R::WrongIdentity, now), [first, second]);
    assert_eq!(engine.dial_failed(dial, R::WrongIdentity, now), []);
    let mut closed = Vec::new();
    while let Some(event) = engine.poll_event() {
        if let EngineEvent::Closed { relay, reason, connect_error, .. } = event {
            closed.push((relay, reason, connect_error));
        }
    }
    assert_eq!(closed, [first, second].map(|relay| (relay, R::WrongIdentity, None)));
    assert!(!closed.iter().any(|(relay, ..)| *relay == elsewhere));
}

#[test]
fn a_dial_that_nobody_answers_is_given_up() {
    let mut engine = mesh_tunnel::Engine::new(EngineConfig::default(), support::epoch());
    let mut net = Net::new(1, false);
    let now = support::epoch();
    let (_far, app) = net.pair(100);
    let relay = engine.open(permit(), support::key("w"), support::head("a:1"), app, now);
    assert!(matches!(engine.poll_event(), Some(EngineEvent::Dial { .. })));
    engine.turn(&mut net, now + 19 * SECOND);
    assert!(engine.poll_event().is_none());
    engine.turn(&mut net, now + 21 * SECOND);
    match engine.poll_event() {
        Some(EngineEvent::Closed { relay: closed, reason, .. }) => {
            assert_eq!((closed, reason), (relay, R::TunnelConnectFailed));
        }
        other => panic!("{other:?}"),
    }
    assert_eq!(engine.stats(), EngineStats::default());
}
