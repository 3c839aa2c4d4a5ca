//! From the applications to the tunnel's socket: the round of ready streams, and the write.

use std::io::{self, IoSlice, IoSliceMut};

use super::{Ending, Engine};
use crate::frame::{FRAME_HEADER, SmallFrame};
use crate::io::Io;
use crate::outbox::MAX_PLACES;
use crate::record::MAX_PLAINTEXT;
use crate::stream::Phase;

impl Engine {
    /// Puts a stream into its tunnel's round, if it has something to do there.
    pub(super) fn enter_round(&mut self, key: u64) {
        let early = self.config.early_data;
        if let Some(stream) = self.streams.get_mut(key)
            && !stream.flags.in_round
            && !stream.flags.detached
            && stream.wants_turn(early)
            && let Some(tunnel) = self.tunnels.get_mut(stream.tunnel)
        {
            stream.flags.in_round = true;
            tunnel.round.push_back(key);
            let id = stream.tunnel;
            self.schedule_tunnel(id);
        }
    }

    /// One round of a tunnel's streams, each by a quantum at most, while windows and buffer allow.
    pub(super) fn transmit(&mut self, id: u64, io: &mut impl Io) -> Result<(), Ending> {
        let Some(tunnel) = self.tunnels.get_mut(id) else { return Ok(()) };
        // The peer's key gets old as well; not every peer looks after that.
        if tunnel.opener.seq() >= self.config.key_update_after && !tunnel.renewal_asked {
            tunnel.renewal_asked = true;
            tunnel.out.renew(true, &mut self.buffers)?;
        }
        let mut budget = self.config.send_buffer;
        for _ in 0..tunnel.round.len() {
            let Some(tunnel) = self.tunnels.get_mut(id) else { return Ok(()) };
            if budget == 0 || !tunnel.can_send_data() {
                break;
            }
            let Some(key) = tunnel.round.pop_front() else { break };
            let Some(stream) = self.streams.get_mut(key) else { continue };
            if stream.tunnel != id || !stream.flags.in_round {
                continue;
            }
            stream.flags.in_round = false;
            if stream.flags.detached || !stream.wants_turn(self.config.early_data) {
                continue;
            }
            let moved = if stream.early_left() > 0 || stream.flags.app_ended {
                self.repeat_early(id, key, io)?
            } else {
                self.take_from_app(id, key, io)?
            };
            budget = budget.saturating_sub(moved);
            self.enter_round(key);
            self.end_failed(key);
            if let Some(tunnel) = self.tunnels.get(id)
                && tunnel.out.sealed().len() >= self.config.quantum
            {
                self.flush(id, io);
            }
        }
        Ok(())
    }

    /// Reads from an application into the records to be. Returns how many bytes it gave.
    fn take_from_app(&mut self, id: u64, key: u64, io: &mut impl Io) -> Result<usize, Ending> {
        let Some(tunnel) = self.tunnels.get_mut(id) else { return Ok(0) };
        let Some(stream) = self.streams.get_mut(key) else { return Ok(0) };
        let Some(app) = stream.app else { return Ok(0) };
        let mut max = stream
            .appetite(self.config.early_data, self.config.quantum)
            .min(stream.send_window.available())
            .min(tunnel.send_window.available());
        if !stream.flags.bulk {
            // One place is enough for those that say little, and cheaper.
            max = max.min(MAX_PLAINTEXT - FRAME_HEADER);
        }
        let mut places: [IoSliceMut<'_>; MAX_PLACES] =
            std::array::from_fn(|_| IoSliceMut::new(&mut []));
        let (count, offered) = tunnel.out.places(max, &mut places, &mut self.buffers)?;
        let taken = match io.readv(app, &mut places[..count]) {
            // A write was told why.
            Ok(0) if stream.flags.failed => {
                self.app_reset(key);
                return Ok(0);
            }
            Ok(0) => {
                stream.flags.app_ended = true;
                self.send_end(id, key, io);
                return Ok(0);
            }
            Ok(taken) => taken.min(offered),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                stream.flags.readable = false;
                return Ok(0);
            }
            Err(_) => {
                self.app_reset(key);
                return Ok(0);
            }
        };
        stream.flags.bulk = taken == offered;
        stream.flags.readable = taken == offered || !stream.flags.short_is_all();
        if stream.phase == Phase::Asked
            && let Some(opening) = stream.opening_mut()
        {
            let mut left = taken;
            for place in &places[..count] {
                let part = left.min(place.len());
                opening.early.extend_from_slice(&place[..part]);
                left -= part;
            }
            opening.early_sent += taken;
        }
        stream.bytes.from_app += taken as u64;
        stream.send_window.take(taken);
        tunnel.send_window.take(taken);
        tunnel.out.commit(stream.id, taken);
        Ok(taken)
    }

    /// Sends (again) what an application said before the peer's answer, and its end.
    fn repeat_early(&mut self, id: u64, key: u64, io: &mut impl Io) -> Result<usize, Ending> {
        let Some(tunnel) = self.tunnels.get_mut(id) else { return Ok(0) };
        let Some(stream) = self.streams.get_mut(key) else { return Ok(0) };
        let max = stream
            .early_left()
            .min(self.config.quantum)
            .min(stream.send_window.available())
            .min(tunnel.send_window.available());
        let mut sent = 0;
        if max > 0
            && let Some(opening) = stream.opening_mut()
        {
            let mut places: [IoSliceMut<'_>; MAX_PLACES] =
                std::array::from_fn(|_| IoSliceMut::new(&mut []));
            let (count, _) = tunnel.out.places(max, &mut places, &mut self.buffers)?;
            for place in &mut places[..count] {
                let from = opening.early_sent + sent;
                let length = place.len();
                place.copy_from_slice(&opening.early[from..from + length]);
                sent += length;
            }
            opening.early_sent += sent;
            tunnel.out.commit(stream.id, sent);
            stream.send_window.take(sent);
            tunnel.send_window.take(sent);
        }
        if stream.early_left() == 0 && stream.flags.app_ended && !stream.flags.end_sent {
            self.send_end(id, key, io);
        }
        if let Some(stream) = self.streams.get_mut(key) {
            Self::settle(stream);
        }
        Ok(sent)
    }

    /// The application has said all: END_STREAM.
    fn send_end(&mut self, id: u64, key: u64, io: &mut impl Io) {
        let Some(stream) = self.streams.get_mut(key) else { return };
        stream.flags.end_sent = true;
        stream.flags.readable = false;
        let stream_id = stream.id;
        self.send_frame(id, &SmallFrame::end_stream(stream_id));
        self.finish(key, io);
    }

    /// Seals what is open and writes once.
    pub(super) fn flush(&mut self, id: u64, io: &mut impl Io) {
        let Some(tunnel) = self.tunnels.get_mut(id) else { return };
        tunnel.out.close_record();
        let waiting = tunnel.out.sealed().len();
        if waiting > 0 && tunnel.writable && !tunnel.failed {
            match io.writev(tunnel.sock, &[IoSlice::new(tunnel.out.sealed())]) {
                Ok(written) => {
                    tunnel.writable = written == waiting;
                    tunnel.renewal_owed &= written == 0;
                    tunnel.out.sent(written, &mut self.buffers);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => tunnel.writable = false,
                Err(_) => {
                    tunnel.fail();
                    self.schedule_tunnel(id);
                    return;
                }
            }
            if !tunnel.writable {
                tunnel.out.blocked(&mut self.buffers);
            }
        } else if waiting == 0 {
            tunnel.out.sent(0, &mut self.buffers);
        }
    }
}
