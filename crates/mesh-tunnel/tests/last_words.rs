//! What an application says before it resets, and around urgent data, reaches the other side, as it would without a mesh.

mod support;

use mesh_model::CloseReason;
use mesh_tunnel::wire::ErrorCode;
use mesh_tunnel::{EngineConfig, EngineEvent, Io as _, RelayId, ResponseHead, SockId};
use support::net::{Connect, Net};
use support::peer::{PREFACE, Peer, SETTINGS, SETTINGS_ACK, frame, open};
use support::permit::permit;

const DATA: u8 = 0;
const RST_STREAM: u8 = 3;

fn client() -> Peer {
    let mut peer = Peer::client(EngineConfig::default());
    peer.say(&[PREFACE, &SETTINGS, &SETTINGS_ACK].concat());
    peer
}

/// Opens stream 1 to an application, and gives its far socket.
fn connect(peer: &mut Peer, how: Connect) -> (RelayId, SockId) {
    peer.say(&open(1));
    let Some(EngineEvent::Request { request, .. }) = peer.events.pop() else { panic!("a request") };
    let (far, near) = peer.net.pair(1 << 20);
    peer.net.socks[Net::index(near)].connect = how;
    (peer.engine.accept(permit(), request, near, ResponseHead::default(), peer.now), far)
}

/// The payload of the stream's DATA, and whether it ended by a reset behind that.
fn heard(peer: &Peer) -> (Vec<u8>, Option<ErrorCode>) {
    let frames = peer.frames();
    let of_kind = |wanted: u8| {
        let matches =
            move |(kind, _, stream, _): &&(u8, u8, u32, Vec<u8>)| (*kind, *stream) == (wanted, 1);
        frames.iter().filter(matches)
    };
    let data: Vec<u8> = of_kind(DATA).flat_map(|(.., payload)| payload.clone()).collect();
    assert!(of_kind(DATA).all(|(_, flags, ..)| flags & 1 == 0), "an orderly end");
    (data, peer.refusal().map(|(_, code)| code).filter(|_| of_kind(RST_STREAM).count() == 1))
}

#[test]
fn bytes_in_front_of_a_reset_are_carried_in_front_of_it() {
    for length in [200, 60_000, 300_000] {
        let mut peer = client();
        let (relay, far) = connect(&mut peer, Connect::Done);
        peer.turn();
        let said: Vec<u8> = (0..length).map(|at: usize| at.to_le_bytes()[0]).collect();
        assert_eq!(peer.net.write(far, &said).unwrap(), length);
        peer.net.abort(far);
        peer.turn();
        peer.turn();
        let (data, code) = heard(&peer);
        assert!(data == said[..data.len()], "wrong bytes");
        // The peer of this test gives no credit: of the longest, what its window has no room for is lost.
        assert_eq!(data.len(), length.min(65_535));
        assert_eq!(code, Some(ErrorCode::CONNECT_ERROR));
        assert_eq!(peer.closed(relay), Some(CloseReason::ServerReset));
        assert_eq!(peer.engine.stats().streams, 0);
    }
}

/// A server that answers and closes with the request half read: the engine is told of the reset by its own write.
#[test]
fn an_answer_is_carried_though_the_rest_of_the_request_is_refused() {
    let mut peer = client();
    let (relay, far) = connect(&mut peer, Connect::Done);
    peer.turn();
    peer.net.write(far, b"413").unwrap();
    peer.net.abort(far);
    // The edges of both are still to come when the write fails.
    let late = peer.net.take_edges();
    peer.say(&frame(DATA, 0, 1, b"more of the request"));
    for (sock, ready) in late {
        peer.engine.on_event(sock, ready);
    }
    peer.turn();
    assert_eq!(heard(&peer), (b"413".to_vec(), Some(ErrorCode::CONNECT_ERROR)));
    assert_eq!(peer.closed(relay), Some(CloseReason::ServerReset));
    assert_eq!(peer.engine.stats().queued_bytes, 0);
}

#[test]
fn a_server_that_greets_and_resets_before_anyone_looks_is_heard() {
    let mut peer = client();
    let (relay, far) = connect(&mut peer, Connect::Failed(libc_econnreset()));
    peer.net.write(far, b"too many connections").unwrap();
    peer.net.abort(far);
    peer.turn();
    assert_eq!(heard(&peer).0, b"too many connections");
    assert_eq!(peer.closed(relay), Some(CloseReason::ServerReset));
}

/// Source: errno(3), Linux on every architecture that has its own numbers in asm-generic.
const fn libc_econnreset() -> i32 {
    104
}

#[test]
fn a_plain_relay_carries_last_words_both_ways() {
    for app_resets in [true, false] {
        let mut peer = client();
        let (app, near_app) = peer.net.pair(1 << 20);
        let (upstream, near_upstream) = peer.net.pair(1 << 20);
        let relay = peer.engine.splice(permit(), near_app, near_upstream, peer.now);
        peer.turn();
        let (resets, hears) = if app_resets { (app, upstream) } else { (upstream, app) };
        let said = vec![7; 200_000];
        peer.net.write(resets, &said).unwrap();
        peer.net.abort(resets);
        let late = peer.net.take_edges();
        peer.net.write(hears, b"refused").unwrap();
        peer.turn();
        for (sock, ready) in late {
            peer.engine.on_event(sock, ready);
        }
        peer.turn();
        assert_eq!(peer.net.read(hears, 1 << 20).unwrap(), said);
        assert!(peer.net.reset(hears), "an orderly end");
        let reason = if app_resets { CloseReason::ClientReset } else { CloseReason::ServerReset };
        assert_eq!(peer.closed(relay), Some(reason));
    }
}

#[test]
fn what_stands_behind_an_urgent_byte_is_not_left_lying() {
    let mut peer = client();
    let (_, far) = connect(&mut peer, Connect::Done);
    peer.turn();
    let (app, near_app) = peer.net.pair(1 << 20);
    let (upstream, near_upstream) = peer.net.pair(1 << 20);
    peer.engine.splice(permit(), near_app, near_upstream, peer.now);
    peer.turn();
    for sock in [far, app] {
        peer.net.write(sock, b"abc").unwrap();
        peer.net.urge(sock, b'X');
        peer.net.write(sock, b"defghi").unwrap();
    }
    peer.turn();
    peer.turn();
    assert_eq!(heard(&peer).0, b"abcXdefghi");
    assert_eq!(peer.net.read(upstream, 100).unwrap(), b"abcXdefghi");
}
