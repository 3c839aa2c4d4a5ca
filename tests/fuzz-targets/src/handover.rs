//! An engine's state as a predecessor writes it down: whatever it says, it is refused or works.

use std::io::{self, IoSlice, IoSliceMut};
use std::task::Poll;
use std::time::{Duration, Instant};

use mesh_tunnel::{
    ConnectHead, Engine, EngineConfig, EngineEvent, Io, Readiness, Retire, SockId, Suite,
    TlsSession, TrafficSecret,
};

use crate::engine::{key, permit};

/// Turns within which a retired engine must be empty: each is followed by its next deadline.
const MAX_TURNS: usize = 10_000;

/// Sockets that take everything, and by their number say nothing or fail.
struct Wall;

impl Io for Wall {
    fn readv(&mut self, sock: SockId, _bufs: &mut [IoSliceMut<'_>]) -> io::Result<usize> {
        match sock.0 % 3 {
            0 => Ok(0),
            1 => Err(io::ErrorKind::WouldBlock.into()),
            _ => Err(io::ErrorKind::ConnectionReset.into()),
        }
    }

    fn writev(&mut self, _sock: SockId, bufs: &[IoSlice<'_>]) -> io::Result<usize> {
        Ok(bufs.iter().map(|buf| buf.len()).sum())
    }

    fn connect_result(&mut self, sock: SockId) -> Poll<io::Result<()>> {
        if sock.0.is_multiple_of(2) { Poll::Ready(Ok(())) } else { Poll::Pending }
    }

    fn shutdown_write(&mut self, _sock: SockId) -> io::Result<()> {
        Ok(())
    }

    fn close(&mut self, _sock: SockId) {}

    fn abort(&mut self, _sock: SockId) {}
}

fn config() -> EngineConfig {
    EngineConfig {
        send_buffer: 32 << 10,
        receive_buffer: 4096,
        drain_timeout: Some(Duration::from_secs(1)),
        ..EngineConfig::default()
    }
}

/// `engine_state`: a state that is taken over ends like any other, and writes itself down again.
///
/// # Panics
/// When it does not.
pub fn state(data: &[u8]) {
    let mut now = Instant::now();
    let Ok(mut engine) = Engine::take_over(config(), data, now, Some) else { return };
    let again = engine.hand_over(&mut Wall, now);
    let taken = Engine::take_over(config(), &again, now, Some);
    assert!(taken.is_ok(), "what is written down is read again: {:?}", taken.err());
    engine.retire(Retire::All, now);
    for _ in 0..MAX_TURNS {
        let busy = engine.turn(&mut Wall, now);
        while let Some(event) = engine.poll_event() {
            if let EngineEvent::Dial { dial, .. } = event {
                engine.dial_failed(dial, mesh_model::CloseReason::TunnelConnectFailed, now);
            }
        }
        let socks: Vec<SockId> = engine.sockets().collect();
        for sock in socks {
            engine.on_event(sock, Readiness { error: true, ..Readiness::ALL });
        }
        match engine.poll_timeout() {
            _ if busy => {}
            Some(next) => now = now.max(next),
            None => break,
        }
    }
    let stats = engine.stats();
    assert_eq!((stats.sockets, stats.queued_bytes, stats.timers), (0, 0, 0), "{stats:?}");
}

fn session(byte: u8) -> TlsSession {
    let secret = |byte: u8| {
        TrafficSecret::new(Suite::Aes128Gcm, &[byte; 32]).expect("the length is the suite's")
    };
    TlsSession {
        suite: Suite::Aes128Gcm,
        tx: secret(byte),
        rx: secret(byte + 1),
        tx_seq: 0,
        rx_seq: 0,
        leftover: Vec::new(),
    }
}

pub(crate) fn state_seeds() -> Vec<Vec<u8>> {
    let now = Instant::now();
    let head = || ConnectHead { authority: "10.0.0.2:80".into(), ..ConnectHead::default() };
    let empty = Engine::new(config(), now).hand_over(&mut Wall, now).to_vec();
    let mut waiting = Engine::new(config(), now);
    waiting.open(permit(), key(), head(), SockId(4), now);
    let mut client = Engine::new(config(), now);
    client.open(permit(), key(), head(), SockId(4), now);
    client.splice(permit(), SockId(7), SockId(13), now);
    while let Some(event) = client.poll_event() {
        if let EngineEvent::Dial { dial, .. } = event {
            client.dial_succeeded(dial, session(1), SockId(10), now);
        }
    }
    client.turn(&mut Wall, now);
    let mut server = Engine::new(config(), now);
    let pod = mesh_model::PodUid::new("server-pod");
    server.add_server_tunnel(pod, session(3), SockId(16), now);
    server.turn(&mut Wall, now);
    let mut seeds = vec![empty];
    for mut engine in [waiting, client, server] {
        seeds.push(engine.hand_over(&mut Wall, now).to_vec());
    }
    seeds
}
