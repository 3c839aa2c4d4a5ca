//! A state across versions, and states that no engine wrote. That nothing is lost is for the simulation.

mod support;

use mesh_tunnel::{Engine, EngineConfig, EngineEvent, HandOverError, SockId, Suite};
use support::net::Net;
use support::permit::permit;
use support::{Rng, epoch, head, key, sessions};

/// A client with a stream on a tunnel, one that waits for a dial, and a plain relay.
fn busy() -> (Engine, Net) {
    let (now, mut net) = (epoch(), Net::new(1, false));
    let mut engine = Engine::new(EngineConfig::default(), now);
    let mut sock = || net.pair(100_000).0;
    let (first, second, plain, upstream, tunnel) = (sock(), sock(), sock(), sock(), sock());
    engine.open(permit(), key("a"), head("f:0"), first, now);
    let Some(EngineEvent::Dial { dial, .. }) = engine.poll_event() else { panic!("no dial") };
    let (client, _) = sessions(Suite::Aes128Gcm, &mut Rng(1));
    engine.dial_succeeded(dial, client, tunnel, now);
    engine.open(permit(), key("b"), head("f:1"), second, now);
    engine.splice(permit(), plain, upstream, now);
    engine.turn(&mut net, now);
    while engine.poll_event().is_some() {}
    (engine, net)
}

#[test]
fn waiting_opens_ask_for_their_dial_again() {
    let (mut engine, mut net) = busy();
    let now = epoch();
    let state = engine.hand_over(&mut net, now);
    let mut successor = Engine::take_over(EngineConfig::default(), &state, now, Some).unwrap();
    assert_eq!(successor.stats(), engine.stats());
    let Some(EngineEvent::Dial { key, dial }) = successor.poll_event() else { panic!("no dial") };
    assert_eq!(key.target_uid.as_str(), "b");
    assert!(dial.get() > 2, "an answer to the predecessor's dials must not be taken for ours");
    assert!(successor.poll_event().is_none());
}

#[test]
fn a_field_of_a_newer_version_is_skipped() {
    let (mut engine, mut net) = busy();
    let now = epoch();
    // Field 500, a varint.
    let state = [&engine.hand_over(&mut net, now)[..], &[0xa0, 0x1f, 7]].concat();
    let successor = Engine::take_over(EngineConfig::default(), &state, now, Some).unwrap();
    assert_eq!(successor.stats(), engine.stats());
}

#[test]
fn a_state_that_needs_a_newer_version_is_refused_by_name() {
    let (mut engine, mut net) = busy();
    let now = epoch();
    // The last value of field 2 counts.
    let state = [&engine.hand_over(&mut net, now)[..], &[0x10, 2]].concat();
    let error = Engine::take_over(EngineConfig::default(), &state, now, Some).unwrap_err();
    assert_eq!(error, HandOverError::Format { needs: 2 });
    assert!(error.to_string().contains("format 2"), "{error}");
}

#[test]
fn a_socket_that_did_not_come_is_named() {
    let (mut engine, mut net) = busy();
    let now = epoch();
    let state = engine.hand_over(&mut net, now);
    for missing in engine.sockets() {
        let error = Engine::take_over(EngineConfig::default(), &state, now, |sock| {
            (sock != missing).then_some(sock)
        });
        assert_eq!(error.unwrap_err(), HandOverError::MissingSocket(missing));
    }
    // Two sockets under one name.
    let error = Engine::take_over(EngineConfig::default(), &state, now, |_| Some(SockId(1)));
    assert!(matches!(error.unwrap_err(), HandOverError::Inconsistent(_)));
}

#[test]
fn a_damaged_state_is_refused_or_works_but_does_not_panic() {
    let (mut engine, mut net) = busy();
    let now = epoch();
    let state = engine.hand_over(&mut net, now);
    let mut rng = Rng(7);
    let mut refused = 0;
    for _ in 0..5_000 {
        let mut damaged = state.to_vec();
        for _ in 0..1 + rng.below(3) {
            let at = rng.below(damaged.len());
            damaged[at] = rng.next().to_be_bytes()[0];
        }
        damaged.truncate(rng.below(2 * state.len()).max(1));
        refused +=
            u32::from(Engine::take_over(EngineConfig::default(), &damaged, now, Some).is_err());
    }
    assert!(refused > 1_000, "{refused}");
}
