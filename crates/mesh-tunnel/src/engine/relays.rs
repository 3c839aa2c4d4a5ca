//! The application's side: accepted requests, connects, deliveries from the queue, plain relays.

use std::io::{self, IoSlice};
use std::task::Poll;

use mesh_model::{CloseReason, Fault};

use super::{Doom, Engine, Owner, SPLICE_BIT};
use crate::event::{EngineEvent, RelayBytes, RelayId, RequestId};
use crate::frame::{ErrorCode, headers};
use crate::head::{ResponseHead, encode_status};
use crate::io::{Io, SockId};
use crate::splice::{End, Progress, Splice};
use crate::stream::{Phase, Setup};
use crate::timer::TimerKey;

/// What a plain relay moves at once when the queues hold all they may. Bytes.
const SCARCE_QUANTUM: usize = 4 << 10;

impl Engine {
    pub(super) fn accept_stream(
        &mut self,
        request: RequestId,
        app: SockId,
        response: ResponseHead,
    ) -> RelayId {
        let key = request.0;
        let deadline = self.now.checked_add(self.config.connect_timeout);
        match self.streams.get_mut(key) {
            Some(stream) if stream.phase == Phase::Requested => {
                stream.phase = Phase::Connecting;
                stream.app = Some(app);
                stream.setup = Setup::Response(Box::new(response));
                stream.deadline = deadline;
                stream.flags.readable = true;
                stream.flags.writable = true;
                self.own_app(key, app);
                if let Some(at) = deadline {
                    self.timers.insert(at, TimerKey::Stream(key));
                }
                self.look_at(key);
            }
            Some(_) | None => {
                self.doomed.push((app, Doom::Abort));
                self.events.push_back(EngineEvent::Closed {
                    relay: request.relay(),
                    reason: CloseReason::ClientReset,
                    connect_error: None,
                    bytes: RelayBytes::default(),
                });
            }
        }
        request.relay()
    }

    pub(super) fn refuse_request(&mut self, request: RequestId, status: u16, reason: CloseReason) {
        let key = request.0;
        let Some(stream) = self.streams.get(key) else { return };
        if stream.phase != Phase::Requested {
            return;
        }
        let tunnel_id = stream.tunnel;
        self.respond(tunnel_id, stream.id, status, stream.flags.end_received);
        // Judging a request costs more than making one (CVE-2025-8671 is of this kind).
        if matches!(reason.fault(), Fault::Client | Fault::Policy)
            && let Some(tunnel) = self.tunnels.get_mut(tunnel_id)
        {
            tunnel.overburdened |= tunnel.floods.take(self.now).is_err();
        }
        self.leave_tunnel(key, false);
        if let Some(mut stream) = self.streams.remove(key) {
            self.queued -= stream.queue.clear();
        }
    }

    /// Ends a request by a status, and stops the peer from sending more.
    pub(super) fn respond(&mut self, tunnel_id: u64, id: u32, status: u16, end_received: bool) {
        let status = if (100..=999).contains(&status) { status } else { 500 };
        self.send_headers(tunnel_id, id, true, &encode_status(status));
        if !end_received {
            self.send_reset(tunnel_id, id, ErrorCode::NO_ERROR);
        }
    }

    pub(super) fn send_headers(&mut self, tunnel_id: u64, id: u32, end: bool, block: &[u8]) {
        let Some(tunnel) = self.tunnels.get_mut(tunnel_id) else { return };
        let frames = headers(id, end, block, tunnel.peer_frame_size);
        if tunnel.out.control(&frames, &mut self.buffers).is_err() {
            tunnel.overflowed = true;
        }
        self.schedule_tunnel(tunnel_id);
    }

    pub(super) fn cut_relay(&mut self, relay: RelayId, reason: CloseReason) {
        if relay.0 & SPLICE_BIT != 0 {
            return self.end_splice(relay.0 & !SPLICE_BIT, reason, Doom::Abort);
        }
        if self.streams.get(relay.0).is_some_and(|stream| stream.app.is_some()) {
            self.reset_stream(relay.0, ErrorCode::CANCEL, reason);
        }
    }

    /// Looks at a stream's application socket: its connect, its failure, its room.
    pub(super) fn attend(&mut self, key: u64, io: &mut impl Io) {
        let Some(stream) = self.streams.get_mut(key) else { return };
        stream.flags.in_attention = false;
        let Some(app) = stream.app else { return };
        if stream.phase == Phase::Connecting {
            match io.connect_result(app) {
                Poll::Pending => return,
                Poll::Ready(Ok(())) => self.connected(key),
                Poll::Ready(Err(error)) if is_later_reset(&error) => {
                    self.connected(key);
                    return self.app_refuses(key);
                }
                Poll::Ready(Err(error)) => {
                    let reason = connect_reason(error.kind());
                    return self.connect_failed(key, reason, error.raw_os_error());
                }
            }
        }
        if self.streams.get(key).is_some_and(|stream| stream.flags.failed) {
            return self.app_refuses(key);
        }
        self.deliver_queue(key, io);
    }

    fn connected(&mut self, key: u64) {
        let Some(stream) = self.streams.get_mut(key) else { return };
        stream.phase = Phase::Open;
        let block = match std::mem::replace(&mut stream.setup, Setup::Done) {
            Setup::Response(head) => head.encode(),
            Setup::Opening(_) | Setup::Done => ResponseHead::default().encode(),
        };
        let (tunnel, id) = (stream.tunnel, stream.id);
        self.clear_deadline(key);
        self.send_headers(tunnel, id, false, &block);
        self.events.push_back(EngineEvent::Established { relay: RelayId(key), baggage: None });
        self.enter_round(key);
    }

    fn connect_failed(&mut self, key: u64, reason: CloseReason, error: Option<i32>) {
        let Some(stream) = self.streams.get(key) else { return };
        self.respond(stream.tunnel, stream.id, 503, stream.flags.end_received);
        self.end_stream_for(key, reason, error, Doom::Abort);
    }

    /// An application has not connected in time, or a peer has not answered in time.
    pub(super) fn stream_timed_out(&mut self, key: u64) {
        let Some(stream) = self.streams.get_mut(key) else { return };
        stream.deadline = None;
        match stream.phase {
            Phase::Connecting => self.connect_failed(key, CloseReason::ConnectTimeout, None),
            Phase::Asked => {
                self.reset_stream(key, ErrorCode::CANCEL, CloseReason::ConnectTimeout);
            }
            Phase::Waiting | Phase::Requested | Phase::Open => {}
        }
    }

    /// Writes what waits for the application.
    fn deliver_queue(&mut self, key: u64, io: &mut impl Io) {
        let Some(stream) = self.streams.get_mut(key) else { return };
        let Some(app) = stream.app else { return };
        if stream.phase == Phase::Open && stream.flags.writable && !stream.queue.is_empty() {
            let held = stream.queue.len();
            match io.writev(app, &[IoSlice::new(stream.queue.as_slice())]) {
                Ok(written) => {
                    stream.flags.writable = written == held;
                    stream.queue.consume(written);
                    stream.bytes.to_app += written as u64;
                    self.queued -= written;
                    let left = stream.withheld.min(stream.queue.len());
                    let freed = std::mem::replace(&mut stream.withheld, left) - left;
                    let tunnel = stream.tunnel;
                    self.credit(key, written);
                    self.release_credit(tunnel, freed);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    stream.flags.writable = false;
                }
                Err(_) => return self.app_refuses(key),
            }
        }
        self.finish(key, io);
    }

    pub(super) fn open_splice(&mut self, app: SockId, upstream: SockId) -> RelayId {
        let full = self.relays() >= self.config.max_relays;
        let mut splice = Splice::new(app, upstream);
        splice.deadline = self.now.checked_add(self.config.connect_timeout);
        let deadline = splice.deadline;
        let key = self.splices.insert(splice);
        self.socks.insert(app, Owner::Splice(key, End::App));
        self.socks.insert(upstream, Owner::Splice(key, End::Upstream));
        if let Some(at) = deadline {
            self.timers.insert(at, TimerKey::Splice(key));
        }
        if full {
            self.end_splice(key, CloseReason::Overloaded, Doom::Abort);
        } else {
            self.schedule_splice(key);
        }
        RelayId(key | SPLICE_BIT)
    }

    pub(super) fn splice_turn(&mut self, key: u64, io: &mut impl Io) {
        let Some(splice) = self.splices.get_mut(key) else { return };
        splice.scheduled = false;
        if splice.connecting {
            match io.connect_result(splice.upstream) {
                Poll::Pending if splice.app_failed() => {
                    return self.end_splice(key, CloseReason::ClientReset, Doom::Abort);
                }
                Poll::Pending => return,
                Poll::Ready(Ok(())) => {}
                Poll::Ready(Err(error)) if is_later_reset(&error) => splice.fail(End::Upstream),
                Poll::Ready(Err(error)) => {
                    let reason = connect_reason(error.kind());
                    return self.end_splice_for(key, reason, error.raw_os_error(), Doom::Abort);
                }
            }
            splice.connecting = false;
            if let Some(at) = splice.deadline.take() {
                self.timers.remove(at, TimerKey::Splice(key));
            }
            let relay = RelayId(key | SPLICE_BIT);
            self.events.push_back(EngineEvent::Established { relay, baggage: None });
        }
        // A lane keeps what its target does not take: less, when there is little memory left for that.
        let scarce = self.queued > self.config.queue_budget;
        let quantum = self.config.quantum.min(if scarce { SCARCE_QUANTUM } else { usize::MAX });
        let mut scratch = self.take_scratch(quantum);
        let before = splice_queued(&self.splices, key);
        let progress = match self.splices.get_mut(key) {
            Some(splice) => splice.turn(io, &mut scratch[..quantum]),
            None => return,
        };
        self.scratch = scratch;
        self.queued = self.queued + splice_queued(&self.splices, key) - before;
        match progress {
            Progress::Blocked => {}
            Progress::More => self.schedule_splice(key),
            Progress::Complete => self.end_splice(key, CloseReason::Complete, Doom::Close),
            Progress::Failed(End::App) => {
                self.end_splice(key, CloseReason::ClientReset, Doom::Abort);
            }
            Progress::Failed(End::Upstream) => {
                self.end_splice(key, CloseReason::ServerReset, Doom::Abort);
            }
        }
    }

    pub(super) fn splice_timed_out(&mut self, key: u64) {
        if let Some(splice) = self.splices.get_mut(key)
            && splice.connecting
        {
            splice.deadline = None;
            self.end_splice(key, CloseReason::ConnectTimeout, Doom::Abort);
        }
    }

    fn end_splice(&mut self, key: u64, reason: CloseReason, doom: Doom) {
        self.end_splice_for(key, reason, None, doom);
    }

    /// Ends a splice, with the error of its upstream socket's connect.
    fn end_splice_for(
        &mut self,
        key: u64,
        reason: CloseReason,
        connect_error: Option<i32>,
        doom: Doom,
    ) {
        let Some(splice) = self.splices.remove(key) else { return };
        self.queued -= splice.queued();
        if let Some(at) = splice.deadline {
            self.timers.remove(at, TimerKey::Splice(key));
        }
        for sock in [splice.app, splice.upstream] {
            self.socks.remove(&sock);
            self.doomed.push((sock, doom));
        }
        let relay = RelayId(key | SPLICE_BIT);
        let bytes = splice.bytes();
        self.events.push_back(EngineEvent::Closed { relay, reason, connect_error, bytes });
    }
}

fn splice_queued(splices: &crate::slab::Slab<Splice>, key: u64) -> usize {
    splices.get(key).map_or(0, Splice::queued)
}

/// A reset of a connection that had been made: a connect itself is refused. Source: `tcp_reset`, Linux 6.1.
fn is_later_reset(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe)
}

/// What a failed connect means to the flow.
fn connect_reason(kind: io::ErrorKind) -> CloseReason {
    if kind == io::ErrorKind::ConnectionRefused || kind == io::ErrorKind::ConnectionReset {
        CloseReason::ConnectRefused
    } else if kind == io::ErrorKind::TimedOut {
        CloseReason::ConnectTimeout
    } else {
        CloseReason::ConnectFailed
    }
}
