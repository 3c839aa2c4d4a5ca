//! How streams end: in order, by a reset of either side, or with their tunnel.

use mesh_model::CloseReason;

use super::{Doom, Engine, Owner};
use crate::event::{EngineEvent, RelayId, RequestId, TunnelId};
use crate::frame::{ErrorCode, SmallFrame};
use crate::io::Io;
use crate::stream::{Phase, Setup, Side, Stream};
use crate::timer::TimerKey;
use crate::tunnel::Role;

impl Engine {
    /// Forgets a stream, whatever it is doing, and says so. What the peer must hear has been sent.
    pub(super) fn end_stream(&mut self, key: u64, reason: CloseReason, doom: Doom) {
        self.end_stream_for(key, reason, None, doom);
    }

    /// As [`end_stream`](Self::end_stream), with the error of its application socket's connect.
    pub(super) fn end_stream_for(
        &mut self,
        key: u64,
        reason: CloseReason,
        connect_error: Option<i32>,
        doom: Doom,
    ) {
        self.leave_tunnel(key, false);
        self.clear_deadline(key);
        let Some(mut stream) = self.streams.remove(key) else { return };
        self.queued -= stream.queue.clear();
        if stream.phase == Phase::Waiting
            && let Some(opening) = stream.opening()
        {
            self.pool.forget(&opening.key, key);
        }
        let Some(app) = stream.app else {
            self.events.push_back(EngineEvent::RequestGone { request: RequestId(key) });
            return;
        };
        self.socks.remove(&app);
        self.doomed.push((app, doom));
        let (relay, bytes) = (RelayId(key), stream.bytes);
        self.events.push_back(EngineEvent::Closed { relay, reason, connect_error, bytes });
    }

    /// What a stream waited for has come about, or is not waited for any more.
    pub(super) fn clear_deadline(&mut self, key: u64) {
        if let Some(at) = self.streams.get_mut(key).and_then(|stream| stream.deadline.take()) {
            self.timers.remove(at, TimerKey::Stream(key));
        }
    }

    /// Takes a stream off its tunnel. Bytes it still holds count as taken, or the tunnel would starve.
    pub(super) fn leave_tunnel(&mut self, key: u64, reset_by_us: bool) {
        let Some(stream) = self.streams.get_mut(key) else { return };
        let (tunnel_id, id, held) = (stream.tunnel, stream.id, stream.withheld);
        stream.withheld = 0;
        let attached = !stream.flags.detached;
        stream.flags.detached = false;
        self.release_credit(tunnel_id, held);
        if !attached {
            return;
        }
        let Some(tunnel) = self.tunnels.get_mut(tunnel_id) else { return };
        if tunnel.streams.get(&id) != Some(&key) {
            return;
        }
        tunnel.streams.remove(&id);
        // A reset may have been remembered already.
        if tunnel.recall(id).is_none() {
            tunnel.remember(id, reset_by_us);
        }
        self.left_tunnel(tunnel_id);
    }

    /// A tunnel has a stream less.
    fn left_tunnel(&mut self, tunnel_id: u64) {
        let Some(tunnel) = self.tunnels.get_mut(tunnel_id) else { return };
        if tunnel.streams.is_empty() {
            tunnel.idle_since = Some(self.now);
            self.set_tunnel_timer(tunnel_id);
            // A drain may be over.
            self.schedule_tunnel(tunnel_id);
        }
        if let Some(tunnel) = self.tunnels.get(tunnel_id)
            && let Role::Client(key) = &tunnel.role
        {
            let granted = self.pool.release(&key.clone(), TunnelId(tunnel_id));
            self.granted(granted);
        }
    }

    /// Sends RST_STREAM and remembers that we did.
    pub(super) fn send_reset(&mut self, tunnel_id: u64, id: u32, code: ErrorCode) {
        self.send_frame(tunnel_id, &SmallFrame::rst_stream(id, code));
        if let Some(tunnel) = self.tunnels.get_mut(tunnel_id) {
            tunnel.remember(id, true);
        }
    }

    /// Resets a stream towards the peer, if the peer knows it, and towards the application.
    pub(super) fn reset_stream(&mut self, key: u64, code: ErrorCode, reason: CloseReason) {
        if let Some(stream) = self.streams.get(key)
            && stream.phase != Phase::Waiting
            && !stream.flags.detached
        {
            self.send_reset(stream.tunnel, stream.id, code);
        }
        self.end_stream(key, reason, Doom::Abort);
    }

    /// The application takes no more. What it said before may still be read, and goes to the peer in front of the reset.
    pub(super) fn app_refuses(&mut self, key: u64) {
        let Some(stream) = self.streams.get_mut(key) else { return };
        stream.flags.failed = true;
        stream.flags.readable = true;
        stream.flags.writable = false;
        self.queued -= stream.queue.clear();
        let (tunnel, withheld) = (stream.tunnel, std::mem::take(&mut stream.withheld));
        self.release_credit(tunnel, withheld);
        self.enter_round(key);
        self.end_failed(key);
    }

    /// Ends a stream whose application has failed, unless what it said before can still be taken now. The peer's window is not
    /// waited for: without a mesh, what the peer's kernel has no room for is lost as well.
    pub(super) fn end_failed(&mut self, key: u64) {
        let early = self.config.early_data;
        if self
            .streams
            .get(key)
            .is_some_and(|stream| stream.flags.failed && !stream.wants_turn(early))
        {
            self.app_reset(key);
        }
    }

    /// The application's socket has failed, and all it said has been read.
    pub(super) fn app_reset(&mut self, key: u64) {
        let Some(stream) = self.streams.get(key) else { return };
        let reason = match stream.side {
            Side::Client => CloseReason::ClientReset,
            Side::Server => CloseReason::ServerReset,
        };
        // Source: RFC 9113 §8.5: an error of the TCP connection is CONNECT_ERROR.
        self.reset_stream(key, ErrorCode::CONNECT_ERROR, reason);
    }

    /// The peer has reset the stream.
    pub(super) fn peer_reset(&mut self, key: u64, code: ErrorCode, io: &mut impl Io) {
        let Some(stream) = self.streams.get_mut(key) else { return };
        let reason = match (stream.side, stream.phase) {
            (Side::Client, Phase::Asked) if code == ErrorCode::REFUSED_STREAM => {
                if let (Some(opening), tunnel) = (stream.opening(), TunnelId(stream.tunnel)) {
                    let key = opening.key.clone();
                    self.pool.refused(&key, tunnel);
                }
                return self.retry(key, CloseReason::PeerRefused);
            }
            (Side::Client, Phase::Asked | Phase::Waiting) => CloseReason::PeerRefused,
            // It has sent all it had and reads no more: what it sent is still delivered (RFC 9113 §8.1).
            (_, Phase::Open) if code == ErrorCode::NO_ERROR && stream.flags.end_received => {
                stream.flags.peer_gone = true;
                return self.finish(key, io);
            }
            (Side::Client, Phase::Requested | Phase::Connecting | Phase::Open) => {
                CloseReason::ServerReset
            }
            (Side::Server, _) => CloseReason::ClientReset,
        };
        self.end_stream(key, reason, Doom::Abort);
    }

    /// Passes the peer's end on once all before it was delivered, and closes when both directions have ended.
    pub(super) fn finish(&mut self, key: u64, io: &mut impl Io) {
        let Some(stream) = self.streams.get_mut(key) else { return };
        if stream.phase != Phase::Open || !stream.flags.end_received {
            return;
        }
        let done_sending = stream.flags.end_sent || stream.flags.peer_gone;
        if !stream.queue.is_empty() {
            // The peer may close the tunnel from here on without harm to what is queued.
            if done_sending && !stream.flags.detached {
                self.detach(key);
            }
            return;
        }
        if done_sending {
            return self.end_stream(key, CloseReason::Complete, Doom::Close);
        }
        if !stream.flags.shut {
            stream.flags.shut = true;
            if let Some(app) = stream.app
                && io.shutdown_write(app).is_err()
            {
                self.app_refuses(key);
            }
        }
    }

    fn detach(&mut self, key: u64) {
        let Some(stream) = self.streams.get_mut(key) else { return };
        stream.flags.detached = true;
        let (tunnel_id, id) = (stream.tunnel, stream.id);
        if let Some(tunnel) = self.tunnels.get_mut(tunnel_id) {
            tunnel.streams.remove(&id);
            tunnel.remember(id, false);
            self.left_tunnel(tunnel_id);
        }
    }

    /// The tunnel under a stream has gone.
    pub(super) fn tunnel_lost(&mut self, key: u64, reason: CloseReason) {
        self.end_stream(key, reason, Doom::Abort);
    }

    /// Makes `app` a stream's application socket.
    pub(super) fn own_app(&mut self, key: u64, stream_app: crate::io::SockId) {
        self.socks.insert(stream_app, Owner::Stream(key));
    }

    /// Drops what is only needed while a stream is set up.
    pub(super) fn settle(stream: &mut Stream) {
        if stream
            .opening()
            .is_some_and(|opening| opening.answered && opening.early_sent == opening.early.len())
        {
            stream.setup = Setup::Done;
        }
    }
}
