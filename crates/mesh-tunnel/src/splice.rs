//! A plain relay: two sockets, two lanes, no tunnel.
//!
//! A lane reads into the engine's buffer and writes from there; only what the other socket does not take is kept, and nothing
//! more is read until it has gone. So a lane holds at most one quantum.

use std::io::{self, IoSlice, IoSliceMut};
use std::time::Instant;

use crate::event::RelayBytes;
use crate::handover::{HandOverError, LaneState, SpliceState, ahead, later};
use crate::io::{Io, Readiness, SockId};
use crate::queue::ByteQueue;

/// One direction.
#[derive(Debug, Default)]
struct Lane {
    queue: ByteQueue,
    readable: bool,
    read_closed: bool,
    writable: bool,
    ended: bool,
    shut: bool,
    bytes: u64,
}

/// Which socket of a splice is meant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    /// The captured connection.
    App,
    /// The one dialled for it.
    Upstream,
}

/// What a turn of a splice came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Progress {
    /// It waits for readiness.
    Blocked,
    /// It has used up its quantum.
    More,
    /// Both directions have ended in order.
    Complete,
    /// A socket has failed.
    Failed(End),
}

/// Two sockets and what lies between them.
#[derive(Debug)]
pub(crate) struct Splice {
    pub(crate) app: SockId,
    pub(crate) upstream: SockId,
    pub(crate) connecting: bool,
    pub(crate) deadline: Option<Instant>,
    pub(crate) scheduled: bool,
    app_failed: bool,
    upstream_failed: bool,
    /// app -> upstream
    out: Lane,
    /// upstream -> app
    back: Lane,
}

impl Splice {
    pub(crate) fn new(app: SockId, upstream: SockId) -> Self {
        let lane = || Lane { readable: true, writable: true, ..Lane::default() };
        Self {
            app,
            upstream,
            connecting: true,
            deadline: None,
            scheduled: false,
            app_failed: false,
            upstream_failed: false,
            out: lane(),
            back: lane(),
        }
    }

    pub(crate) fn bytes(&self) -> RelayBytes {
        RelayBytes { to_app: self.back.bytes, from_app: self.out.bytes }
    }

    pub(crate) fn state(&self, name: u64, now: Instant) -> SpliceState {
        SpliceState {
            name,
            app: self.app.0,
            upstream: self.upstream.0,
            connecting: self.connecting,
            deadline_in: self.deadline.map(|at| ahead(at, now)),
            app_failed: self.app_failed,
            upstream_failed: self.upstream_failed,
            out: Some(self.out.state()),
            back: Some(self.back.state()),
        }
    }

    pub(crate) fn from_state(
        state: SpliceState,
        app: SockId,
        upstream: SockId,
        now: Instant,
    ) -> Result<Self, HandOverError> {
        const NO_LANE: HandOverError = HandOverError::Inconsistent("a relay without a lane");
        Ok(Self {
            connecting: state.connecting,
            deadline: state.deadline_in.and_then(|ahead| later(ahead, now)),
            app_failed: state.app_failed,
            upstream_failed: state.upstream_failed,
            out: Lane::from_state(&state.out.ok_or(NO_LANE)?),
            back: Lane::from_state(&state.back.ok_or(NO_LANE)?),
            ..Self::new(app, upstream)
        })
    }

    /// Bytes kept for sockets that do not take them.
    pub(crate) fn queued(&self) -> usize {
        self.out.queue.len() + self.back.queue.len()
    }

    pub(crate) fn on_event(&mut self, end: End, ready: Readiness) {
        let (reads, writes, failed) = match end {
            End::App => (&mut self.out, &mut self.back, &mut self.app_failed),
            End::Upstream => (&mut self.back, &mut self.out, &mut self.upstream_failed),
        };
        reads.readable |= ready.readable || ready.read_closed;
        reads.read_closed |= ready.read_closed;
        writes.writable |= ready.writable;
        *failed |= ready.error;
    }

    /// Moves up to `scratch.len()` bytes each way. Not to be called while connecting.
    pub(crate) fn turn(&mut self, io: &mut impl Io, scratch: &mut [u8]) -> Progress {
        if self.upstream_failed {
            return Progress::Failed(End::Upstream);
        }
        if self.app_failed {
            return Progress::Failed(End::App);
        }
        let out = self.out.turn(io, self.app, self.upstream, scratch);
        let back = self.back.turn(io, self.upstream, self.app, scratch);
        for (lane, reads, writes) in
            [(out, End::App, End::Upstream), (back, End::Upstream, End::App)]
        {
            match lane {
                LaneProgress::ReadFailed => return Progress::Failed(reads),
                LaneProgress::WriteFailed => return Progress::Failed(writes),
                LaneProgress::Blocked | LaneProgress::More => {}
            }
        }
        if self.out.shut && self.back.shut {
            return Progress::Complete;
        }
        if out == LaneProgress::More || back == LaneProgress::More {
            return Progress::More;
        }
        Progress::Blocked
    }

    /// True when the app socket itself has failed while the upstream is still connecting.
    pub(crate) fn app_failed(&self) -> bool {
        self.app_failed
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum LaneProgress {
    Blocked,
    More,
    ReadFailed,
    WriteFailed,
}

impl Lane {
    fn state(&self) -> LaneState {
        LaneState {
            queue: self.queue.as_slice().to_vec(),
            read_closed: self.read_closed,
            ended: self.ended,
            shut: self.shut,
            bytes: self.bytes,
        }
    }

    /// The lane again; its sockets are taken to be ready, as new ones are.
    fn from_state(state: &LaneState) -> Self {
        let mut queue = ByteQueue::default();
        queue.push(&state.queue);
        Self {
            queue,
            readable: true,
            read_closed: state.read_closed,
            writable: true,
            ended: state.ended,
            shut: state.shut,
            bytes: state.bytes,
        }
    }

    fn turn(
        &mut self,
        io: &mut impl Io,
        source: SockId,
        target: SockId,
        scratch: &mut [u8],
    ) -> LaneProgress {
        if !self.queue.is_empty() {
            if !self.writable {
                return LaneProgress::Blocked;
            }
            match io.writev(target, &[IoSlice::new(self.queue.as_slice())]) {
                Ok(written) => {
                    self.bytes += written as u64;
                    self.queue.consume(written);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(_) => return LaneProgress::WriteFailed,
            }
            if !self.queue.is_empty() {
                self.writable = false;
                return LaneProgress::Blocked;
            }
        }
        if !self.ended {
            if !self.readable {
                return LaneProgress::Blocked;
            }
            match io.readv(source, &mut [IoSliceMut::new(scratch)]) {
                Ok(0) => self.ended = true,
                Ok(read) => return self.forward(io, target, &scratch[..read], scratch.len()),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.readable = false;
                    return LaneProgress::Blocked;
                }
                Err(_) => return LaneProgress::ReadFailed,
            }
        }
        if !self.shut {
            self.shut = true;
            if io.shutdown_write(target).is_err() {
                return LaneProgress::WriteFailed;
            }
        }
        LaneProgress::Blocked
    }

    fn forward(
        &mut self,
        io: &mut impl Io,
        target: SockId,
        bytes: &[u8],
        offered: usize,
    ) -> LaneProgress {
        let drained = bytes.len() < offered && !self.read_closed;
        self.readable = !drained;
        let mut written = 0;
        if self.writable {
            match io.writev(target, &[IoSlice::new(bytes)]) {
                Ok(count) => written = count,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(_) => return LaneProgress::WriteFailed,
            }
        }
        self.bytes += written as u64;
        if written < bytes.len() {
            self.writable = false;
            self.queue.push(&bytes[written..]);
            return LaneProgress::Blocked;
        }
        if drained { LaneProgress::Blocked } else { LaneProgress::More }
    }
}
