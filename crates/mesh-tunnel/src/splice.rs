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
    /// Reads stop short at urgent data.
    urgent: bool,
    /// The source has failed: what it said before is still carried, as far as the target takes it now.
    source_failed: bool,
    /// The target has failed: nothing is carried any more.
    target_failed: bool,
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
            app_failed: self.out.source_failed,
            upstream_failed: self.back.source_failed,
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
        let mut splice = Self {
            connecting: state.connecting,
            deadline: state.deadline_in.and_then(|ahead| later(ahead, now)),
            out: Lane::from_state(&state.out.ok_or(NO_LANE)?),
            back: Lane::from_state(&state.back.ok_or(NO_LANE)?),
            ..Self::new(app, upstream)
        };
        for (failed, end) in [(state.app_failed, End::App), (state.upstream_failed, End::Upstream)]
        {
            if failed {
                splice.fail(end);
            }
        }
        Ok(splice)
    }

    /// Bytes kept for sockets that do not take them.
    pub(crate) fn queued(&self) -> usize {
        self.out.queue.len() + self.back.queue.len()
    }

    pub(crate) fn on_event(&mut self, end: End, ready: Readiness) {
        let (reads, writes) = self.lanes(end);
        reads.readable |= ready.readable || ready.read_closed;
        reads.read_closed |= ready.read_closed;
        reads.urgent |= ready.urgent;
        writes.writable |= ready.writable;
        if ready.error {
            self.fail(end);
        }
    }

    /// The lane that reads from a socket, and the one that writes to it.
    const fn lanes(&mut self, end: End) -> (&mut Lane, &mut Lane) {
        match end {
            End::App => (&mut self.out, &mut self.back),
            End::Upstream => (&mut self.back, &mut self.out),
        }
    }

    /// A socket has failed. What it had said before may still be read.
    pub(crate) fn fail(&mut self, end: End) {
        let (reads, writes) = self.lanes(end);
        reads.source_failed = true;
        reads.readable = true;
        writes.target_failed = true;
    }

    /// Moves up to `scratch.len()` bytes each way. Not to be called while connecting.
    pub(crate) fn turn(&mut self, io: &mut impl Io, scratch: &mut [u8]) -> Progress {
        let out = self.out.turn(io, self.app, self.upstream, scratch);
        let back = self.back.turn(io, self.upstream, self.app, scratch);
        let mut more = out == LaneProgress::More || back == LaneProgress::More;
        for (lane, reads, writes) in
            [(out, End::App, End::Upstream), (back, End::Upstream, End::App)]
        {
            match lane {
                LaneProgress::ReadFailed => return Progress::Failed(reads),
                LaneProgress::WriteFailed => {
                    self.fail(writes);
                    more = true;
                }
                LaneProgress::Blocked | LaneProgress::More => {}
            }
        }
        if self.out.shut && self.back.shut {
            return Progress::Complete;
        }
        if more { Progress::More } else { Progress::Blocked }
    }

    /// True when the app socket itself has failed while the upstream is still connecting.
    pub(crate) fn app_failed(&self) -> bool {
        self.out.source_failed
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
            ..Self::default()
        }
    }

    fn turn(
        &mut self,
        io: &mut impl Io,
        source: SockId,
        target: SockId,
        scratch: &mut [u8],
    ) -> LaneProgress {
        let progress = self.carry(io, source, target, scratch);
        // The target's room is not waited for: without a mesh, what its kernel has no room for is lost as well.
        if progress == LaneProgress::Blocked && self.source_failed {
            return LaneProgress::ReadFailed;
        }
        progress
    }

    fn carry(
        &mut self,
        io: &mut impl Io,
        source: SockId,
        target: SockId,
        scratch: &mut [u8],
    ) -> LaneProgress {
        if self.target_failed {
            self.queue.clear();
            return LaneProgress::Blocked;
        }
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
                // A write was told why.
                Ok(0) if self.source_failed => return LaneProgress::ReadFailed,
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
        let short_is_all = !(self.read_closed || self.urgent || self.source_failed);
        let drained = bytes.len() < offered && short_is_all;
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
