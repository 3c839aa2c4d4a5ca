//! Accepting: connections out of listeners' queues, a batch at a time, and what is done when there is no room for them.

use std::fs::File;
use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use mesh_tunnel::SockId;
use mio::net::TcpStream;

use crate::driver::ops::{Ends, ListenerId, ListenerTag, Ops};
use crate::driver::sockets::Owner;
use crate::driver::{Handler, Worker};
use crate::socket;

/// Connections accepted per listener and turn. Source: reference measurements, batches up to 32.
const ACCEPTS_PER_TURN: usize = 32;
/// Descriptors kept for bad times.
const SPARES: usize = 4;
/// What a spare descriptor is of.
const NOTHING: &str = "/dev/null";
/// How long accepting rests when the kernel is out of memory or descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// What came of taking a connection out of a listener's queue.
enum Taken {
    /// It is there.
    Conn(SockId, Ends),
    /// There is no room for it, or it cannot be watched: it was reset.
    Shed(SocketAddr),
    /// It ended in the queue; the next one may be well.
    Ended,
    /// There is none.
    Empty,
}

/// What came of shedding a connection.
enum Shed {
    /// One is gone.
    One,
    /// There was none.
    QueueEmpty,
    /// There is not even one descriptor: they wait until there is.
    Helpless,
}

/// Descriptors given up to be able to accept, and reset, when there are none left. Several: another thread may be faster to
/// take one that is given up.
pub(super) struct Spares(Vec<File>);

impl Spares {
    /// # Errors
    /// When there is not even one descriptor.
    pub(super) fn new() -> io::Result<Self> {
        let mut spares = Vec::with_capacity(SPARES);
        spares.push(File::open(NOTHING)?);
        Ok(Self(spares))
    }

    /// False when there is none left.
    fn give_up(&mut self) -> bool {
        self.0.pop().is_some()
    }

    /// Takes descriptors back, as far as there are any.
    fn fill(&mut self) {
        while self.0.len() < SPARES
            && let Ok(spare) = File::open(NOTHING)
        {
            self.0.push(spare);
        }
    }
}

impl Ops {
    /// Takes the connections out of a listener's queue that [`remove_listener`](Self::remove_listener) would reset; what there
    /// is no room for is left to that. At most as many as the queue holds.
    pub fn take_queued(&mut self, id: ListenerId) -> Vec<(SockId, Ends)> {
        let mut taken = Vec::new();
        for _ in 0..socket::BACKLOG {
            if !self.has_room(2) {
                break;
            }
            match self.take_one(id.0) {
                Ok(Taken::Conn(sock, ends)) => taken.push((sock, ends)),
                Ok(Taken::Shed(_) | Taken::Ended) => {}
                Ok(Taken::Empty) | Err(_) => break,
            }
        }
        taken
    }

    /// Takes one connection out of a listener's queue.
    ///
    /// # Errors
    /// For want of descriptors or memory; `EINVAL` from a listener that was ended. Source: accept(2), `inet_csk_accept` of Linux
    /// 6.1.
    fn take_one(&mut self, id: u32) -> io::Result<Taken> {
        let Some(listener) = self.listeners.get(&id) else { return Ok(Taken::Empty) };
        let (stream, peer) = match listener.listener.accept() {
            Ok((stream, peer)) => (stream, socket::canonical(peer)),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(Taken::Empty),
            Err(error) if is_out_of_descriptors(&error) || is_out_of_memory(&error) => {
                return Err(error);
            }
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => return Err(error),
            Err(_) => return Ok(Taken::Ended),
        };
        // One that has ended meanwhile has no address.
        let Ok(local) = socket::local_addr(&stream) else { return Ok(Taken::Ended) };
        // An accepted connection needs a second socket to lead anywhere.
        if !self.has_room(2) {
            reset(&stream);
            return Ok(Taken::Shed(peer));
        }
        match self.sockets.insert(stream, Owner::Parked) {
            Ok(sock) => Ok(Taken::Conn(sock, Ends { peer, local })),
            Err(error) => {
                tracing::debug!(%error, "accepted socket cannot be watched");
                Ok(Taken::Shed(peer))
            }
        }
    }
}

impl<H: Handler> Worker<H> {
    /// Accepts a batch from each listener that has connections; true when some may be left.
    pub(super) fn accept(&mut self) -> bool {
        if self.accept_paused.is_some_and(|until| until > self.ops.now) {
            return false;
        }
        self.accept_paused = None;
        for _ in 0..self.ops.acceptable.len() {
            let Some(id) = self.ops.acceptable.pop_front() else { break };
            if let Some(listener) = self.ops.listeners.get_mut(&id)
                && listener.held
            {
                listener.queued = false;
                continue;
            }
            let drained = self.accept_batch(id);
            if let Some(listener) = self.ops.listeners.get_mut(&id) {
                listener.queued = !drained;
                if !drained {
                    self.ops.acceptable.push_back(id);
                }
            }
            if self.accept_paused.is_some() {
                return false;
            }
        }
        !self.ops.acceptable.is_empty()
    }

    /// True when the listener has no connection left, or is gone.
    fn accept_batch(&mut self, id: u32) -> bool {
        for _ in 0..ACCEPTS_PER_TURN {
            let Some(tag) = self.ops.listeners.get(&id).map(|listener| listener.tag) else {
                return true;
            };
            let error = match self.ops.take_one(id) {
                Ok(Taken::Conn(sock, ends)) => {
                    self.handler.accepted(&mut self.ops, tag, sock, ends);
                    continue;
                }
                Ok(Taken::Shed(peer)) => {
                    self.handler.shed(&mut self.ops, tag, peer);
                    continue;
                }
                Ok(Taken::Ended) => continue,
                Ok(Taken::Empty) => return true,
                Err(error) => error,
            };
            if is_out_of_descriptors(&error) {
                match self.shed_one(id, tag) {
                    Shed::One => continue,
                    Shed::QueueEmpty => return true,
                    Shed::Helpless => {}
                }
            } else if !is_out_of_memory(&error) {
                // It listens no more.
                self.ops.remove_listener(ListenerId(id));
                self.handler.listener_ended(&mut self.ops, ListenerId(id), tag);
                return true;
            }
            tracing::debug!(%error, "accepting rests");
            self.accept_paused = Some(self.ops.now + ACCEPT_PAUSE);
            return false;
        }
        false
    }

    /// Gives spare descriptors up for a moment to accept and reset one connection, so that its client knows.
    fn shed_one(&mut self, id: u32, tag: ListenerTag) -> Shed {
        self.spares.fill();
        let mut shed = Shed::Helpless;
        while self.spares.give_up() {
            let Some(listener) = self.ops.listeners.get(&id) else { break };
            match listener.listener.accept() {
                Ok((stream, peer)) => {
                    reset(&stream);
                    drop(stream);
                    self.handler.shed(&mut self.ops, tag, socket::canonical(peer));
                    shed = Shed::One;
                    break;
                }
                // Another thread was faster: the next spare.
                Err(error) if is_out_of_descriptors(&error) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    shed = Shed::QueueEmpty;
                    break;
                }
                // The connection has ended in the queue.
                Err(_) => {
                    shed = Shed::One;
                    break;
                }
            }
        }
        self.spares.fill();
        shed
    }
}

fn is_out_of_descriptors(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EMFILE | libc::ENFILE))
}

fn is_out_of_memory(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOBUFS | libc::ENOMEM))
}

fn reset(stream: &TcpStream) {
    if let Err(error) = socket::reset_on_close(stream) {
        tracing::debug!(%error, "connection closed without a reset");
    }
}
