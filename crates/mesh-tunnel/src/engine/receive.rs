//! From the tunnel's socket to the applications: records, frames, deliveries.

use std::io::{self, IoSlice, IoSliceMut};
use std::ops::Range;

use mesh_model::CloseReason;

use super::{Ending, Engine, Piece};
use crate::frame::{END_STREAM, ErrorCode, FrameHeader, SmallFrame};
use crate::frame_reader::FrameEvent;
use crate::io::Io;
use crate::post_handshake::PostHandshakeMessage;
use crate::record::{Alert, ContentType, HEADER, MAX_RECORD, record_len};
use crate::stream::{Phase, Side};

/// Slices of one writev.
const MAX_SLICES: usize = 64;
/// A stream that holds less than this is never reset for want of memory.
const MODEST_QUEUE: usize = 64 << 10;
/// Source: RFC 8446 §6.1; nothing follows from it.
const USER_CANCELED: u8 = 90;

impl Engine {
    /// The shared receive buffer, at least `length` long. It must be put back.
    pub(super) fn take_scratch(&mut self, length: usize) -> Vec<u8> {
        let mut scratch = std::mem::take(&mut self.scratch);
        if scratch.len() < length {
            let usual = self.config.receive_buffer.max(self.config.quantum) + MAX_RECORD;
            scratch.resize(length.max(usual), 0);
        }
        scratch
    }

    /// Reads a tunnel once and works through what came.
    pub(super) fn receive(&mut self, id: u64, io: &mut impl Io) -> Result<(), Ending> {
        let Some(tunnel) = self.tunnels.get(id) else { return Ok(()) };
        let mut scratch = self.take_scratch(tunnel.leftover.len() + self.config.receive_buffer);
        let result = self.receive_into(id, &mut scratch, io);
        self.scratch = scratch;
        self.pieces.clear();
        result
    }

    fn receive_into(
        &mut self,
        id: u64,
        scratch: &mut [u8],
        io: &mut impl Io,
    ) -> Result<(), Ending> {
        let Some(tunnel) = self.tunnels.get_mut(id) else { return Ok(()) };
        let held = tunnel.leftover.len();
        scratch[..held].copy_from_slice(&tunnel.leftover);
        let place = &mut scratch[held..held + self.config.receive_buffer];
        let offered = place.len();
        let mut end = None;
        let mut read = 0;
        match io.readv(tunnel.sock, &mut [IoSliceMut::new(place)]) {
            // An end without close_notify is a truncation (RFC 8446 §6.1): nothing is taken for complete.
            Ok(0) => end = Some(Ending::dead(CloseReason::TunnelClosed)),
            Ok(count) => {
                read = count;
                tunnel.readable = count == offered || tunnel.read_closed;
                tunnel.heard_at = self.now;
                if tunnel.ping_sent.take().is_some() {
                    // The clock was set to the PING's end; the next PING is due before that.
                    self.set_tunnel_timer(id);
                }
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => tunnel.readable = false,
            Err(_) => end = Some(Ending::dead(CloseReason::TunnelClosed)),
        }
        let have = held + read;
        let done = self.records(id, &mut scratch[..have], io)?;
        self.deliver(id, scratch, io);
        if let Some(tunnel) = self.tunnels.get_mut(id)
            && (done > 0 || read > 0)
        {
            let rest = &scratch[done..have];
            if rest.is_empty() {
                tunnel.leftover = Vec::new();
            } else {
                tunnel.leftover.clear();
                tunnel.leftover.extend_from_slice(rest);
            }
        }
        end.map_or(Ok(()), Err)
    }

    /// Opens every whole record; returns how many bytes they had.
    fn records(&mut self, id: u64, bytes: &mut [u8], io: &mut impl Io) -> Result<usize, Ending> {
        let mut at = 0;
        loop {
            let length = record_len(&bytes[at..]).map_err(|error| Ending::tls(error.alert()))?;
            let Some(length) = length.filter(|length| at + length <= bytes.len()) else {
                return Ok(at);
            };
            let Some(tunnel) = self.tunnels.get_mut(id) else { return Ok(bytes.len()) };
            if tunnel.is_lingering() {
                return Ok(bytes.len());
            }
            let (content_type, size) = tunnel
                .opener
                .open(&mut bytes[at..at + length])
                .map_err(|error| Ending::tls(error.alert()))?;
            let text = at + HEADER..at + HEADER + size;
            match content_type {
                ContentType::ApplicationData => self.frames(id, bytes, text, io)?,
                ContentType::Handshake => self.handshake_message(id, &bytes[text])?,
                ContentType::Alert => {
                    self.deliver(id, bytes, io);
                    self.alert(id, &bytes[text])?;
                }
            }
            at += length;
        }
    }

    fn handshake_message(&mut self, id: u64, content: &[u8]) -> Result<(), Ending> {
        let Some(tunnel) = self.tunnels.get_mut(id) else { return Ok(()) };
        tunnel.floods.take(self.now).map_err(|_flood| ErrorCode::ENHANCE_YOUR_CALM)?;
        let from_server = !tunnel.is_server();
        let message = tunnel.post_handshake.receive(content, from_server).map_err(Ending::tls)?;
        if let Some(PostHandshakeMessage::KeyUpdate { requested }) = message {
            tunnel.opener.renew();
            tunnel.renewal_asked = false;
            // Requests that come faster than our answers leave are answered together (RFC 8446 §4.6.3).
            if requested && !tunnel.renewal_owed {
                tunnel.renewal_owed = true;
                tunnel.out.renew(false, &mut self.buffers)?;
            }
        }
        Ok(())
    }

    fn alert(&self, id: u64, content: &[u8]) -> Result<(), Ending> {
        let Some(tunnel) = self.tunnels.get(id) else { return Ok(()) };
        let &[_level, description] = content else {
            return Err(Ending::tls(Alert::DecodeError));
        };
        match description {
            USER_CANCELED => Ok(()),
            0 if tunnel.streams.is_empty() => Err(Ending::peer_closed(CloseReason::Complete)),
            0 => Err(Ending::peer_closed(CloseReason::TunnelClosed)),
            _ => Err(Ending::dead(CloseReason::TunnelClosed)),
        }
    }

    fn frames(
        &mut self,
        id: u64,
        bytes: &[u8],
        text: Range<usize>,
        io: &mut impl Io,
    ) -> Result<(), Ending> {
        let Some(tunnel) = self.tunnels.get_mut(id) else { return Ok(()) };
        if tunnel.post_handshake.is_partial() {
            return Err(Ending::tls(Alert::UnexpectedMessage));
        }
        if text.is_empty() {
            tunnel.floods.take(self.now).map_err(|_flood| ErrorCode::ENHANCE_YOUR_CALM)?;
        }
        let mut at = text.start;
        loop {
            let Some(tunnel) = self.tunnels.get_mut(id) else { return Ok(()) };
            if tunnel.is_lingering() {
                return Ok(());
            }
            let (taken, event) = tunnel.reader.advance(&bytes[at..text.end])?;
            let base = at;
            at += taken;
            match event {
                None => return Ok(()),
                Some(FrameEvent::DataStart(header)) => self.data_start(id, header)?,
                Some(FrameEvent::Data { range, .. }) => {
                    self.data(id, base + range.start, range.len());
                }
                Some(FrameEvent::DataEnd { header, padding }) => {
                    self.data_end(id, header, padding)?;
                }
                Some(FrameEvent::Headers { stream, end_stream }) => {
                    self.deliver(id, bytes, io);
                    self.headers(id, stream, end_stream, io)?;
                }
                Some(FrameEvent::Control(header)) => {
                    self.deliver(id, bytes, io);
                    self.control(id, header, io)?;
                }
            }
        }
    }

    /// Checks a DATA frame against state and windows, and settles whose its payload is.
    fn data_start(&mut self, id: u64, header: FrameHeader) -> Result<(), Ending> {
        let Some(tunnel) = self.tunnels.get_mut(id) else { return Ok(()) };
        tunnel.data_target = None;
        if tunnel.is_idle_id(header.stream) {
            return Err(ErrorCode::PROTOCOL_ERROR.into());
        }
        let exceeded = tunnel.receive_window.receive(header.length).is_err();
        if exceeded {
            return Err(ErrorCode::FLOW_CONTROL_ERROR.into());
        }
        let Some(key) = tunnel.streams.get(&header.stream).copied() else {
            return self.frame_on_closed(id, header.stream);
        };
        let Some(stream) = self.streams.get_mut(key) else { return Ok(()) };
        let violation = if stream.flags.end_seen || stream.flags.end_received {
            Some(ErrorCode::STREAM_CLOSED)
        } else if stream.side == Side::Client && stream.phase != Phase::Open {
            Some(ErrorCode::PROTOCOL_ERROR)
        } else if stream.receive_window.receive(header.length).is_err() {
            Some(ErrorCode::FLOW_CONTROL_ERROR)
        } else {
            None
        };
        match violation {
            Some(code) => self.reset_stream(key, code, CloseReason::ProtocolError),
            None => {
                if let Some(tunnel) = self.tunnels.get_mut(id) {
                    tunnel.data_target = Some(key);
                }
            }
        }
        Ok(())
    }

    /// DATA or HEADERS for a stream that has ended.
    pub(super) fn frame_on_closed(&mut self, id: u64, stream: u32) -> Result<(), Ending> {
        let Some(tunnel) = self.tunnels.get_mut(id) else { return Ok(()) };
        // It may have crossed our reset (RFC 9113 §5.1).
        if tunnel.recall(stream) != Some(true) {
            tunnel.floods.take(self.now).map_err(|_flood| ErrorCode::ENHANCE_YOUR_CALM)?;
            self.send_reset(id, stream, ErrorCode::STREAM_CLOSED);
        }
        Ok(())
    }

    fn data(&mut self, id: u64, start: usize, len: usize) {
        let target = self.tunnels.get(id).and_then(|tunnel| tunnel.data_target);
        match target {
            Some(stream) => self.pieces.push(Piece { stream, start, len }),
            None => self.release_credit(id, len),
        }
    }

    fn data_end(&mut self, id: u64, header: FrameHeader, padding: u32) -> Result<(), Ending> {
        let Some(tunnel) = self.tunnels.get_mut(id) else { return Ok(()) };
        let payload = header.length - padding;
        let ends = header.has(END_STREAM);
        if payload == 0 && !ends {
            tunnel.floods.take(self.now).map_err(|_flood| ErrorCode::ENHANCE_YOUR_CALM)?;
        } else {
            tunnel.floods.give();
        }
        let target = tunnel.data_target.take();
        if padding > 0 {
            // The stream may have gone meanwhile; the tunnel's share comes back in any case.
            if let Some(stream) = target {
                self.credit(stream, padding as usize);
            }
            self.release_credit(id, padding as usize);
        }
        if ends && let Some(key) = target {
            if let Some(stream) = self.streams.get_mut(key) {
                stream.flags.end_seen = true;
            }
            self.pieces.push(Piece { stream: key, start: 0, len: 0 });
        }
        Ok(())
    }

    /// Hands the opened payloads to the application sockets, one writev for each run of one stream.
    pub(super) fn deliver(&mut self, id: u64, bytes: &[u8], io: &mut impl Io) {
        if self.pieces.is_empty() {
            return;
        }
        let mut pieces = std::mem::take(&mut self.pieces);
        let mut at = 0;
        while let Some(&Piece { stream, .. }) = pieces.get(at) {
            let mut slices = [IoSlice::new(&[]); MAX_SLICES];
            let (mut count, mut total) = (0, 0);
            while let Some(piece) = pieces.get(at)
                && piece.stream == stream
                && piece.len > 0
                && count < MAX_SLICES
            {
                slices[count] = IoSlice::new(&bytes[piece.start..piece.start + piece.len]);
                count += 1;
                total += piece.len;
                at += 1;
            }
            if total > 0 {
                self.deliver_run(id, stream, &slices[..count], total, io);
            }
            if let Some(piece) = pieces.get(at)
                && piece.stream == stream
                && piece.len == 0
            {
                at += 1;
                self.end_received(stream, io);
            }
        }
        pieces.clear();
        self.pieces = pieces;
    }

    fn deliver_run(
        &mut self,
        id: u64,
        key: u64,
        slices: &[IoSlice<'_>],
        total: usize,
        io: &mut impl Io,
    ) {
        let Some(stream) = self.streams.get_mut(key) else {
            return self.release_credit(id, total);
        };
        if stream.flags.failed && stream.phase == Phase::Open {
            return self.release_credit(id, total);
        }
        let mut written = 0;
        let direct = stream.phase == Phase::Open && stream.queue.is_empty();
        if direct
            && stream.flags.writable
            && let Some(app) = stream.app
        {
            match io.writev(app, slices) {
                Ok(count) => written = count,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(_) => {
                    self.app_refuses(key);
                    return self.release_credit(id, total);
                }
            }
            stream.flags.writable = written == total;
            stream.bytes.to_app += written as u64;
        }
        if written < total {
            let rest = total - written;
            if self.queued + rest > self.config.queue_budget && stream.queue.len() >= MODEST_QUEUE {
                let code = ErrorCode::ENHANCE_YOUR_CALM;
                self.reset_stream(key, code, CloseReason::Overloaded);
                return self.release_credit(id, total);
            }
            // A slow application takes from its own stream's window only, not from the window that all streams of the tunnel
            // share; unless it has not even connected, or memory runs short.
            let shared = stream.phase != Phase::Open || self.queued > self.config.queue_budget / 2;
            if shared {
                stream.withheld += rest;
            }
            let mut skip = written;
            for slice in slices {
                let part = slice.get(skip..).unwrap_or_default();
                skip = skip.saturating_sub(slice.len());
                stream.queue.push(part);
            }
            self.queued += rest;
            if !shared {
                self.release_credit(id, rest);
            }
        }
        self.credit(key, written);
        self.release_credit(id, written);
    }

    pub(super) fn end_received(&mut self, key: u64, io: &mut impl Io) {
        if let Some(stream) = self.streams.get_mut(key) {
            stream.flags.end_received = true;
            self.finish(key, io);
        }
    }

    /// The application took bytes of a stream: its own window's share comes back.
    pub(super) fn credit(&mut self, key: u64, count: usize) {
        let Some(stream) = self.streams.get_mut(key) else { return };
        let (tunnel, id) = (stream.tunnel, stream.id);
        let ended = stream.flags.end_received || stream.flags.detached;
        if let Some(credit) = stream.receive_window.release(count)
            && !ended
        {
            self.send_frame(tunnel, &SmallFrame::window_update(id, credit));
        }
    }

    /// Gives the connection its share back.
    pub(super) fn release_credit(&mut self, id: u64, count: usize) {
        if let Some(tunnel) = self.tunnels.get_mut(id)
            && let Some(credit) = tunnel.receive_window.release(count)
        {
            self.send_frame(id, &SmallFrame::window_update(0, credit));
        }
    }

    /// Adds a frame to what a tunnel sends.
    pub(super) fn send_frame(&mut self, id: u64, frame: &SmallFrame) {
        if let Some(tunnel) = self.tunnels.get_mut(id) {
            if tunnel.send(frame, &mut self.buffers).is_err() {
                tunnel.overflowed = true;
            }
            self.schedule_tunnel(id);
        }
    }
}
