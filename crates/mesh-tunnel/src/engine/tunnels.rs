//! Tunnels: their turn, their clock, their end.

use std::io::{self, IoSliceMut};

use mesh_model::{CloseReason, PodUid};

use super::{Doom, Ending, Engine, Owner};
use crate::event::{EngineEvent, Retire, TunnelId};
use crate::frame::{ErrorCode, MAX_STREAM_ID, SmallFrame};
use crate::io::{Io, SockId};
use crate::record::Alert;
use crate::session::TlsSession;
use crate::timer::TimerKey;
use crate::tunnel::{Due, GoawaySent, PING_DRAIN, PING_KEEPALIVE, Role, Tunnel, TunnelPhase};

/// Bytes thrown away in one turn of a lingering tunnel.
const DISCARD: usize = 64 << 10;

impl Engine {
    pub(super) fn insert_server_tunnel(
        &mut self,
        pod: PodUid,
        session: TlsSession,
        sock: SockId,
    ) -> TunnelId {
        let full = self.tunnels.len() >= self.config.max_tunnels;
        let tunnel = Tunnel::new(session, sock, pod, Role::Server, &self.config, self.now);
        let id = self.insert_tunnel(tunnel);
        if full {
            let code = ErrorCode::ENHANCE_YOUR_CALM;
            self.close_tunnel(id, Ending::http(code, CloseReason::Overloaded));
        }
        TunnelId(id)
    }

    pub(super) fn insert_tunnel(&mut self, mut tunnel: Tunnel) -> u64 {
        if tunnel.greet(&self.config, &mut self.buffers).is_err() {
            tunnel.overflowed = true;
        }
        let sock = tunnel.sock;
        let id = self.tunnels.insert(tunnel);
        self.socks.insert(sock, Owner::Tunnel(id));
        self.set_tunnel_timer(id);
        self.schedule_tunnel(id);
        id
    }

    /// Reads, works, writes.
    pub(super) fn tunnel_turn(&mut self, id: u64, io: &mut impl Io) {
        let Some(tunnel) = self.tunnels.get_mut(id) else { return };
        tunnel.scheduled = false;
        if !tunnel.is_lingering()
            && let Err(ending) = self.work_on(id, io)
        {
            self.close_tunnel(id, ending);
        }
        let Some(tunnel) = self.tunnels.get_mut(id) else { return };
        if tunnel.is_lingering() {
            self.linger(id, io);
        } else {
            self.flush(id, io);
            let Some(tunnel) = self.tunnels.get_mut(id) else { return };
            if tunnel.has_work() {
                self.schedule_tunnel(id);
            } else if tunnel.streams.is_empty() {
                tunnel.shrink();
            }
        }
    }

    fn work_on(&mut self, id: u64, io: &mut impl Io) -> Result<(), Ending> {
        if self.tunnels.get(id).is_some_and(|tunnel| tunnel.readable) {
            self.receive(id, io)?;
        }
        self.transmit(id, io)?;
        let Some(tunnel) = self.tunnels.get(id) else { return Ok(()) };
        // What the peer said before is read to its end first.
        if tunnel.failed && !tunnel.readable {
            return Err(Ending::dead(CloseReason::TunnelClosed));
        }
        if tunnel.overflowed {
            return Err(Self::overflow_ending());
        }
        if tunnel.overburdened {
            return Err(ErrorCode::ENHANCE_YOUR_CALM.into());
        }
        let drained = tunnel.phase == TunnelPhase::Draining
            && tunnel.streams.is_empty()
            && matches!(tunnel.goaway_sent, GoawaySent::Final(_));
        if drained {
            return Err(Ending {
                goaway: None,
                alert: Some(Alert::CloseNotify),
                reason: CloseReason::Complete,
                socket_dead: false,
                finished: false,
            });
        }
        Ok(())
    }

    /// Ends a tunnel: its streams are lost, its last words are sent, its socket lingers for them.
    pub(super) fn close_tunnel(&mut self, id: u64, ending: Ending) {
        let Some(tunnel) = self.tunnels.get_mut(id) else { return };
        if tunnel.is_lingering() {
            return;
        }
        tunnel.phase = TunnelPhase::Lingering { finished: ending.finished };
        tunnel.linger_since = Some(self.now);
        tunnel.leftover = Vec::new();
        tunnel.shrink();
        let streams: Vec<u64> = tunnel.streams.values().copied().collect();
        let role = tunnel.role.clone();
        let last = tunnel.highest_stream;
        if let Role::Client(key) = &role {
            self.pool.remove(key, TunnelId(id));
        }
        for stream in streams {
            self.tunnel_lost(stream, stream_reason(ending.reason));
        }
        if let Role::Client(key) = &role {
            let granted = self.pool.kick(key);
            self.granted(granted);
        }
        self.events
            .push_back(EngineEvent::TunnelClosed { tunnel: TunnelId(id), reason: ending.reason });
        if ending.socket_dead {
            return self.forget_tunnel(id);
        }
        let Some(tunnel) = self.tunnels.get_mut(id) else { return };
        let mut room = Ok(());
        if let Some(code) = ending.goaway {
            room = tunnel.send(&SmallFrame::goaway(last, code), &mut self.buffers);
        }
        if let Some(alert) = ending.alert {
            room = room.and_then(|()| tunnel.out.alert(alert, &mut self.buffers));
        }
        if room.is_err() {
            // No room for last words: the peer does not listen anyway.
            return self.forget_tunnel(id);
        }
        self.set_tunnel_timer(id);
        self.schedule_tunnel(id);
    }

    /// Sends the last bytes, then FIN, then waits for the peer's so that nothing of ours is lost to a reset.
    fn linger(&mut self, id: u64, io: &mut impl Io) {
        self.flush(id, io);
        let Some(tunnel) = self.tunnels.get_mut(id) else { return };
        let TunnelPhase::Lingering { mut finished } = tunnel.phase else { return };
        if tunnel.failed {
            return self.forget_tunnel(id);
        }
        if tunnel.readable && !finished {
            let mut scratch = self.take_scratch(DISCARD);
            let Some(tunnel) = self.tunnels.get_mut(id) else { return };
            match io.readv(tunnel.sock, &mut [IoSliceMut::new(&mut scratch[..DISCARD])]) {
                Ok(0) => finished = true,
                Ok(read) => tunnel.readable = read == DISCARD || tunnel.read_closed,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => tunnel.readable = false,
                Err(_) => tunnel.failed = true,
            }
            tunnel.phase = TunnelPhase::Lingering { finished };
            self.scratch = scratch;
        }
        let Some(tunnel) = self.tunnels.get_mut(id) else { return };
        if tunnel.failed || (finished && tunnel.out.is_empty()) {
            return self.forget_tunnel(id);
        }
        if tunnel.out.is_empty() && !tunnel.fin_sent {
            tunnel.fin_sent = true;
            if io.shutdown_write(tunnel.sock).is_err() {
                return self.forget_tunnel(id);
            }
        }
        if tunnel.readable && !finished {
            self.schedule_tunnel(id);
        }
    }

    fn forget_tunnel(&mut self, id: u64) {
        let Some(tunnel) = self.tunnels.remove(id) else { return };
        if let Some(at) = tunnel.timer {
            self.timers.remove(at, TimerKey::Tunnel(id));
        }
        self.socks.remove(&tunnel.sock);
        self.doomed.push((tunnel.sock, Doom::Close));
    }

    pub(super) fn retire_tunnels(&mut self, which: &Retire) {
        let meant: Vec<u64> = self
            .tunnels
            .keys()
            .filter(|id| {
                self.tunnels.get(*id).is_some_and(|tunnel| match (which, &tunnel.role) {
                    (Retire::Tunnel(wanted), _) => wanted.0 == *id,
                    (Retire::Pod(pod), _) => tunnel.pod == *pod,
                    (Retire::Target(uid), Role::Client(key)) => key.target_uid == *uid,
                    (Retire::Target(_), Role::Server) => false,
                    (Retire::All, _) => true,
                })
            })
            .collect();
        for id in meant {
            self.drain_tunnel(id);
        }
        let reason = match which {
            Retire::Target(_) => CloseReason::NoHealthyUpstream,
            Retire::Tunnel(_) | Retire::Pod(_) | Retire::All => CloseReason::Drained,
        };
        self.give_up_waiting(which, reason);
    }

    /// No new streams; GOAWAY; those there are go on.
    pub(super) fn drain_tunnel(&mut self, id: u64) {
        let Some(tunnel) = self.tunnels.get_mut(id) else { return };
        if tunnel.phase != TunnelPhase::Up {
            return;
        }
        tunnel.phase = TunnelPhase::Draining;
        tunnel.drain_since = Some(self.now);
        match tunnel.role.clone() {
            Role::Client(key) => {
                tunnel.goaway_sent = GoawaySent::Final(0);
                self.send_frame(id, &SmallFrame::goaway(0, ErrorCode::NO_ERROR));
                self.pool.remove(&key, TunnelId(id));
                let granted = self.pool.kick(&key);
                self.granted(granted);
            }
            Role::Server => {
                // Source: RFC 9113 §6.8: a warning first, so that no stream is lost that is on its way.
                tunnel.goaway_sent = GoawaySent::Warning;
                self.send_frame(id, &SmallFrame::goaway(MAX_STREAM_ID, ErrorCode::NO_ERROR));
                self.send_frame(id, &SmallFrame::ping(0, PING_DRAIN));
            }
        }
        self.set_tunnel_timer(id);
        self.schedule_tunnel(id);
    }

    pub(super) fn tunnel_due(&mut self, id: u64) {
        let Some(tunnel) = self.tunnels.get_mut(id) else { return };
        tunnel.timer = None;
        match tunnel.due(&self.config, self.now) {
            Due::Nothing => {}
            Due::Ping => {
                tunnel.ping_sent = Some(self.now);
                self.send_frame(id, &SmallFrame::ping(0, PING_KEEPALIVE));
            }
            Due::PeerSilent => {
                self.close_tunnel(id, Ending::http(ErrorCode::NO_ERROR, CloseReason::TimedOut));
            }
            Due::SettingsLate => {
                let code = ErrorCode::SETTINGS_TIMEOUT;
                self.close_tunnel(id, Ending::http(code, CloseReason::ProtocolError));
            }
            Due::Idle => self.drain_tunnel(id),
            Due::WarningUnanswered => self.final_goaway(id),
            Due::DrainOver => {
                self.close_tunnel(id, Ending::http(ErrorCode::NO_ERROR, CloseReason::Drained));
            }
            Due::LingerOver => return self.forget_tunnel(id),
        }
        self.set_tunnel_timer(id);
    }

    /// Has the tunnel's clock looked at no later than its next deadline.
    pub(super) fn set_tunnel_timer(&mut self, id: u64) {
        let Some(tunnel) = self.tunnels.get_mut(id) else { return };
        let Some(next) = tunnel.next_deadline(&self.config) else { return };
        if let Some(set) = tunnel.timer {
            if set <= next {
                return;
            }
            self.timers.remove(set, TimerKey::Tunnel(id));
        }
        tunnel.timer = Some(next);
        self.timers.insert(next, TimerKey::Tunnel(id));
    }
}

/// What the end of a tunnel means to a stream on it.
const fn stream_reason(reason: CloseReason) -> CloseReason {
    // A tunnel that ended well under a stream did not end well for the stream.
    if matches!(reason, CloseReason::Complete) { CloseReason::TunnelClosed } else { reason }
}
