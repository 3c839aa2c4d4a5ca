//! Frames without payload for an application.

use super::{Ending, Engine};
use crate::event::TunnelId;
use crate::frame::{ACK, ErrorCode, FrameHeader, FrameKind, SmallFrame};
use crate::io::Io;
use crate::stream::{Phase, Side};
use crate::tunnel::{GoawaySent, PING_DRAIN, Role, Tunnel};
use mesh_model::CloseReason;

impl Engine {
    /// A whole frame; its payload is in the tunnel's reader.
    pub(super) fn control(
        &mut self,
        id: u64,
        header: FrameHeader,
        io: &mut impl Io,
    ) -> Result<(), Ending> {
        let Some(tunnel) = self.tunnels.get_mut(id) else { return Ok(()) };
        if Tunnel::is_cheap(header.kind) && !(header.kind == FrameKind::Ping && header.has(ACK)) {
            tunnel.floods.take(self.now).map_err(|_flood| ErrorCode::ENHANCE_YOUR_CALM)?;
        }
        // The reader has checked the lengths.
        let mut small = [0; 8];
        let body = tunnel.reader.body();
        let take = body.len().min(8);
        small[..take].copy_from_slice(&body[..take]);
        let word = |at: usize| {
            u32::from_be_bytes([small[at], small[at + 1], small[at + 2], small[at + 3]])
        };
        match header.kind {
            FrameKind::Settings if header.has(ACK) => {
                tunnel.settings_acked = true;
                Ok(())
            }
            FrameKind::Settings => self.peer_settings(id),
            FrameKind::Ping if header.has(ACK) => {
                self.ping_answered(id, small);
                Ok(())
            }
            FrameKind::Ping => {
                self.send_frame(id, &SmallFrame::ping(ACK, small));
                Ok(())
            }
            FrameKind::WindowUpdate => self.window_update(id, header.stream, word(0) << 1 >> 1),
            FrameKind::RstStream => self.rst_stream(id, header.stream, ErrorCode(word(0)), io),
            FrameKind::Goaway => {
                self.goaway(id, word(0) << 1 >> 1, ErrorCode(word(4)));
                Ok(())
            }
            FrameKind::Priority
            | FrameKind::Unknown
            | FrameKind::PushPromise
            | FrameKind::Data
            | FrameKind::Headers
            | FrameKind::Continuation => Ok(()),
        }
    }

    fn peer_settings(&mut self, id: u64) -> Result<(), Ending> {
        let Some(tunnel) = self.tunnels.get_mut(id) else { return Ok(()) };
        let payload = tunnel.reader.body().to_vec();
        let (change, limit) = tunnel.apply_settings(&payload)?;
        tunnel.send(&SmallFrame::settings_ack(), &mut self.buffers)?;
        let streams: Vec<u64> =
            if change == 0 { Vec::new() } else { tunnel.streams.values().copied().collect() };
        let role = tunnel.role.clone();
        self.schedule_tunnel(id);
        for key in streams {
            if let Some(stream) = self.streams.get_mut(key) {
                stream
                    .send_window
                    .add(change)
                    .map_err(|_overflow| ErrorCode::FLOW_CONTROL_ERROR)?;
                self.enter_round(key);
            }
        }
        if let (Role::Client(key), Some(limit)) = (role, limit) {
            let limit = limit.min(self.config.streams_per_tunnel);
            let granted = self.pool.set_limit(&key, TunnelId(id), limit);
            self.granted(granted);
        }
        Ok(())
    }

    fn ping_answered(&mut self, id: u64, payload: [u8; 8]) {
        let Some(tunnel) = self.tunnels.get(id) else { return };
        // The peer has seen our warning: what it opens from here on was opened knowing it.
        if payload == PING_DRAIN && tunnel.goaway_sent == GoawaySent::Warning {
            self.final_goaway(id);
        }
    }

    /// Streams above those there are by now are not processed.
    pub(super) fn final_goaway(&mut self, id: u64) {
        let Some(tunnel) = self.tunnels.get_mut(id) else { return };
        let last = tunnel.highest_stream;
        tunnel.goaway_sent = GoawaySent::Final(last);
        self.send_frame(id, &SmallFrame::goaway(last, ErrorCode::NO_ERROR));
    }

    fn window_update(&mut self, id: u64, stream: u32, credit: u32) -> Result<(), Ending> {
        let Some(tunnel) = self.tunnels.get_mut(id) else { return Ok(()) };
        if stream == 0 {
            if credit == 0 {
                return Err(ErrorCode::PROTOCOL_ERROR.into());
            }
            tunnel
                .send_window
                .add(i64::from(credit))
                .map_err(|_overflow| ErrorCode::FLOW_CONTROL_ERROR)?;
            self.schedule_tunnel(id);
            return Ok(());
        }
        if tunnel.is_idle_id(stream) {
            return Err(ErrorCode::PROTOCOL_ERROR.into());
        }
        let Some(key) = tunnel.streams.get(&stream).copied() else { return Ok(()) };
        let Some(stream) = self.streams.get_mut(key) else { return Ok(()) };
        // Source: RFC 9113 §6.9, §6.9.1: on a stream both are stream errors.
        let code = if credit == 0 {
            ErrorCode::PROTOCOL_ERROR
        } else if stream.send_window.add(i64::from(credit)).is_err() {
            ErrorCode::FLOW_CONTROL_ERROR
        } else {
            self.enter_round(key);
            return Ok(());
        };
        self.reset_stream(key, code, CloseReason::ProtocolError);
        Ok(())
    }

    fn rst_stream(
        &mut self,
        id: u64,
        stream: u32,
        code: ErrorCode,
        io: &mut impl Io,
    ) -> Result<(), Ending> {
        let Some(tunnel) = self.tunnels.get_mut(id) else { return Ok(()) };
        if tunnel.is_idle_id(stream) {
            return Err(ErrorCode::PROTOCOL_ERROR.into());
        }
        let Some(key) = tunnel.streams.get(&stream).copied() else { return Ok(()) };
        let Some(found) = self.streams.get(key) else { return Ok(()) };
        if found.side == Side::Server && found.phase != Phase::Open {
            tunnel.rapid_resets.take(self.now).map_err(|_flood| ErrorCode::ENHANCE_YOUR_CALM)?;
        }
        self.peer_reset(key, code, io);
        Ok(())
    }

    /// The peer takes no more streams; those above `last` it has not processed (RFC 9113 §6.8).
    fn goaway(&mut self, id: u64, last: u32, code: ErrorCode) {
        let Some(tunnel) = self.tunnels.get_mut(id) else { return };
        tunnel.goaway_received = true;
        if tunnel.is_server() {
            return;
        }
        let unprocessed: Vec<u64> =
            tunnel.streams.range(last.saturating_add(1)..).map(|(_, key)| *key).collect();
        self.drain_tunnel(id);
        for key in unprocessed {
            match self.streams.get(key).map(|stream| stream.phase) {
                Some(Phase::Asked) => self.retry(key, CloseReason::TunnelClosed),
                Some(_) | None => self.tunnel_lost(key, CloseReason::TunnelClosed),
            }
        }
        if code != ErrorCode::NO_ERROR {
            // The peer is about to close. What it still sends for other streams is taken until then.
            self.schedule_tunnel(id);
        }
    }
}
