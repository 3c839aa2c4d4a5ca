//! One stream's trouble stays its own.

mod support;

use mesh_model::CloseReason;
use mesh_tunnel::{EngineConfig, EngineEvent, RelayId, ResponseHead, SockId};
use support::net::Net;
use support::peer::{PREFACE, Peer, SETTINGS, SETTINGS_ACK, frame, open};
use support::permit::permit;

const FRAME: usize = 1 << 20;

fn client(config: EngineConfig) -> Peer {
    let mut peer = Peer::client(config);
    peer.say(&[PREFACE, &SETTINGS, &SETTINGS_ACK].concat());
    peer
}

/// Opens a stream to an application, and gives its far socket.
fn connect(peer: &mut Peer, stream: u32, capacity: usize) -> (RelayId, SockId) {
    peer.say(&open(stream));
    let Some(EngineEvent::Request { request, .. }) = peer.events.pop() else { panic!("a request") };
    let (far, near) = peer.net.pair(capacity);
    let relay = peer.engine.accept(permit(), request, near, ResponseHead::default(), peer.now);
    peer.turn();
    (relay, far)
}

#[test]
fn applications_that_do_not_read_leave_the_others_of_their_tunnel_alone() {
    let mut peer = client(EngineConfig::default());
    let data = vec![5; FRAME];
    // Ten that never read: 40 MiB, more than twice the window of the whole tunnel.
    for stream in (1..20).step_by(2) {
        connect(&mut peer, stream, 1_000);
        for _ in 0..4 {
            peer.say_at_once(&frame(0, 0, stream, &data[..FRAME - 1_000]));
        }
    }
    assert_eq!((peer.tunnel_closed(), peer.refusal()), (None, None));
    assert!(peer.engine.stats().queued_bytes > 36 << 20);
    let (_, far) = connect(&mut peer, 21, 4 << 20);
    let mut arrived = 0;
    for _ in 0..40 {
        peer.say_at_once(&frame(0, 0, 21, &data));
        arrived += peer.net.read(far, 8 << 20).map_or(0, |bytes| bytes.len());
    }
    assert_eq!((peer.tunnel_closed(), peer.refusal()), (None, None));
    assert_eq!(arrived, 40 * FRAME);
}

#[test]
fn where_memory_is_short_a_tunnel_is_held_back_before_anyone_is_reset() {
    let config = EngineConfig { queue_budget: 24 << 20, ..EngineConfig::default() };
    let mut peer = client(config);
    let data = vec![5; FRAME - 1];
    let mut relays = Vec::new();
    for stream in (1..14).step_by(2) {
        relays.push(connect(&mut peer, stream, 1_000));
    }
    // 12 MiB are held as the streams' own, and 11 of the tunnel's 16 more.
    let mut sent = 0;
    for (at, _) in relays.iter().enumerate() {
        for _ in 0..if at == 6 { 0 } else { 4 } {
            if sent < 23 {
                let stream = 2 * u32::try_from(at).unwrap_or_default() + 1;
                peer.say_at_once(&frame(0, 0, stream, &data));
                sent += 1;
            }
        }
    }
    assert_eq!((peer.tunnel_closed(), peer.refusal()), (None, None));
    let held = peer.engine.stats().queued_bytes;
    assert!(held <= 24 << 20, "{held}");
    // What they held comes back to the tunnel when they go: it can move its whole window again, many times.
    for (relay, _) in relays {
        peer.engine.cut(relay, CloseReason::PolicyChanged, peer.now);
    }
    peer.turn();
    assert_eq!(peer.engine.stats().queued_bytes, 0);
    let (_, far) = connect(&mut peer, 101, 4 << 20);
    for _ in 0..40 {
        peer.say_at_once(&frame(0, 0, 101, &data));
        assert!(peer.net.read(far, 8 << 20).is_ok());
    }
    assert_eq!(peer.tunnel_closed(), None);
    assert_eq!(peer.net.waiting(far), 0);
    assert_eq!(Net::index(far) % 2, 0);
}

#[test]
fn what_is_held_for_a_stream_never_passes_its_window() {
    let mut peer = client(EngineConfig::default());
    peer.say(&open(1));
    // Not accepted yet: it is held, and bounded.
    for _ in 0..4 {
        peer.say(&frame(0, 0, 1, &vec![0; FRAME]));
    }
    assert_eq!(peer.refusal(), None);
    assert_eq!(peer.engine.stats().queued_bytes, 4 * FRAME);
    peer.say(&frame(0, 0, 1, b"x"));
    assert_eq!(peer.refusal().map(|(stream, _)| stream), Some(1));
    assert_eq!(peer.engine.stats().queued_bytes, 0);
}
