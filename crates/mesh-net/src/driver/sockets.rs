//! The sockets of one worker: a slab with generations, and the engine's only door to the world.

use std::collections::VecDeque;
use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::net::{Shutdown, SocketAddr};
use std::sync::Arc;
use std::task::Poll;

use mesh_tunnel::{Io, Readiness, SockId};
use mio::net::TcpStream;
use mio::{Interest, Registry, Token};

use crate::driver::budget::DescriptorBudget;
use crate::driver::handover::{WrittenSocket, duplicate};
use crate::socket;

/// Who is told when a socket becomes ready.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Owner {
    /// Nobody: accepted, and waiting for a decision.
    Parked,
    /// A handshake in flight.
    Handshake,
    /// The engine.
    Engine,
}

#[derive(Debug)]
struct Entry {
    stream: TcpStream,
    owner: Owner,
    /// What happened while the engine did not listen. Readability it assumes; an end or a failure it must be told.
    missed: Readiness,
    /// Written once the socket has connected; empty for most.
    prefix: Vec<u8>,
}

impl Entry {
    /// A prefix fits into the send buffer of a new connection as a whole.
    fn send_prefix(&mut self) -> io::Result<()> {
        let prefix = std::mem::take(&mut self.prefix);
        if prefix.is_empty() { Ok(()) } else { self.stream.write_all(&prefix) }
    }
}

#[derive(Debug)]
struct Slot {
    /// Changes with each use of the slot, so that a late event of its former socket is recognised.
    generation: u32,
    entry: Option<Entry>,
}

/// The slab. Ids are `generation << 32 | slot`; the top bit stays clear for listeners.
#[derive(Debug)]
pub(super) struct Sockets {
    slots: Vec<Slot>,
    /// Oldest first, so that a slot rests as long as possible.
    free: VecDeque<u32>,
    registry: Registry,
    budget: Arc<DescriptorBudget>,
}

/// What a socket is watched for.
const EVERYTHING: Interest = Interest::READABLE.add(Interest::WRITABLE).add(Interest::PRIORITY);
/// Generations live in 31 bits.
const GENERATION_MASK: u32 = 0x7fff_ffff;
/// Most sockets of one worker; far above any descriptor limit.
const MAX_SLOTS: usize = 1 << 24;

impl Sockets {
    pub(super) const fn new(registry: Registry, budget: Arc<DescriptorBudget>) -> Self {
        Self { slots: Vec::new(), free: VecDeque::new(), registry, budget }
    }

    /// Sockets held.
    pub(super) fn len(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// Takes `stream` over and watches it, edge-triggered in both directions.
    pub(super) fn insert(&mut self, mut stream: TcpStream, owner: Owner) -> io::Result<SockId> {
        let slot = match self.free.pop_front() {
            Some(slot) => slot,
            None if self.slots.len() < MAX_SLOTS => {
                self.slots.push(Slot { generation: 0, entry: None });
                u32::try_from(self.slots.len() - 1).map_err(io::Error::other)?
            }
            None => return Err(io::ErrorKind::OutOfMemory.into()),
        };
        let index = slot as usize;
        let id = u64::from(self.slots[index].generation) << 32 | u64::from(slot);
        let token = Token(usize::try_from(id).map_err(io::Error::other)?);
        if let Err(error) = self.registry.register(&mut stream, token, EVERYTHING) {
            self.free.push_back(slot);
            return Err(error);
        }
        self.budget.take();
        self.slots[index].entry =
            Some(Entry { stream, owner, missed: Readiness::default(), prefix: Vec::new() });
        Ok(SockId(id))
    }

    fn slot(&self, sock: SockId) -> Option<usize> {
        let index = usize::try_from(sock.0 & u64::from(u32::MAX)).ok()?;
        let slot = self.slots.get(index)?;
        (u64::from(slot.generation) == sock.0 >> 32 && slot.entry.is_some()).then_some(index)
    }

    fn entry(&self, sock: SockId) -> Option<&Entry> {
        self.slots[self.slot(sock)?].entry.as_ref()
    }

    fn entry_mut(&mut self, sock: SockId) -> Option<&mut Entry> {
        let index = self.slot(sock)?;
        self.slots[index].entry.as_mut()
    }

    pub(super) fn stream(&mut self, sock: SockId) -> Option<&mut TcpStream> {
        self.entry_mut(sock).map(|entry| &mut entry.stream)
    }

    pub(super) fn owner(&self, sock: SockId) -> Option<Owner> {
        self.entry(sock).map(|entry| entry.owner)
    }

    pub(super) fn set_owner(&mut self, sock: SockId, owner: Owner) {
        if let Some(entry) = self.entry_mut(sock) {
            entry.owner = owner;
        }
    }

    pub(super) fn set_prefix(&mut self, sock: SockId, prefix: Vec<u8>) {
        if let Some(entry) = self.entry_mut(sock) {
            entry.prefix = prefix;
        }
    }

    /// Remembers an event for the engine, which does not listen yet.
    pub(super) fn note(&mut self, sock: SockId, readiness: Readiness) {
        if let Some(Entry { missed, .. }) = self.entry_mut(sock) {
            missed.readable |= readiness.readable;
            missed.writable |= readiness.writable;
            missed.read_closed |= readiness.read_closed;
            missed.error |= readiness.error;
            missed.urgent |= readiness.urgent;
        }
    }

    /// Hands `sock` to the engine and returns what it missed.
    pub(super) fn engage(&mut self, sock: SockId) -> Readiness {
        self.entry_mut(sock).map_or_else(Readiness::default, |entry| {
            entry.owner = Owner::Engine;
            std::mem::take(&mut entry.missed)
        })
    }

    /// The address at the far end, canonical; none when the socket is gone or not connected.
    pub(super) fn peer_addr(&self, sock: SockId) -> Option<SocketAddr> {
        self.entry(sock)?.stream.peer_addr().ok().map(socket::canonical)
    }

    /// The address at this end, canonical.
    pub(super) fn local_addr(&self, sock: SockId) -> Option<SocketAddr> {
        self.entry(sock)?.stream.local_addr().ok().map(socket::canonical)
    }

    /// The names of all sockets.
    pub(super) fn names(&self) -> Vec<SockId> {
        (0_u64..)
            .zip(&self.slots)
            .filter(|(_, slot)| slot.entry.is_some())
            .map(|(index, slot)| SockId(u64::from(slot.generation) << 32 | index))
            .collect()
    }

    /// Duplicates of all sockets but those of handshakes.
    pub(super) fn written(&self) -> io::Result<Vec<WrittenSocket>> {
        let mut written = Vec::with_capacity(self.len());
        for name in self.names() {
            let Some(entry) = self.entry(name) else { continue };
            let of_engine = match entry.owner {
                Owner::Handshake => continue,
                Owner::Engine => true,
                Owner::Parked => false,
            };
            let (prefix, fd) = (entry.prefix.clone(), duplicate(&entry.stream)?);
            written.push(WrittenSocket { name, of_engine, prefix, fd });
        }
        Ok(written)
    }

    /// Closes this process's descriptors; the sockets live on with whoever has others.
    pub(super) fn let_go(&mut self) {
        for name in self.names() {
            drop(self.remove(name));
        }
    }

    fn remove(&mut self, sock: SockId) -> Option<TcpStream> {
        let index = self.slot(sock)?;
        let slot = &mut self.slots[index];
        let entry = slot.entry.take()?;
        slot.generation = slot.generation.wrapping_add(1) & GENERATION_MASK;
        self.free.push_back(u32::try_from(index).ok()?);
        self.budget.give_back();
        Some(entry.stream)
    }
}

impl Drop for Sockets {
    fn drop(&mut self) {
        for slot in &self.slots {
            if slot.entry.is_some() {
                self.budget.give_back();
            }
        }
    }
}

fn gone() -> io::Error {
    io::ErrorKind::NotConnected.into()
}

/// Repeats a call that a signal interrupted.
fn retry(mut call: impl FnMut() -> io::Result<usize>) -> io::Result<usize> {
    loop {
        match call() {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            done => return done,
        }
    }
}

impl Io for Sockets {
    fn readv(&mut self, sock: SockId, bufs: &mut [IoSliceMut<'_>]) -> io::Result<usize> {
        let stream = self.stream(sock).ok_or_else(gone)?;
        retry(|| stream.read_vectored(bufs))
    }

    fn writev(&mut self, sock: SockId, bufs: &[IoSlice<'_>]) -> io::Result<usize> {
        let stream = self.stream(sock).ok_or_else(gone)?;
        retry(|| stream.write_vectored(bufs))
    }

    fn connect_result(&mut self, sock: SockId) -> Poll<io::Result<()>> {
        let Some(entry) = self.entry_mut(sock) else { return Poll::Ready(Err(gone())) };
        match connect_result(&entry.stream) {
            Poll::Ready(Ok(())) => Poll::Ready(entry.send_prefix()),
            Poll::Ready(Err(error)) => Poll::Ready(Err(error)),
            Poll::Pending => Poll::Pending,
        }
    }

    fn shutdown_write(&mut self, sock: SockId) -> io::Result<()> {
        self.stream(sock).ok_or_else(gone)?.shutdown(Shutdown::Write)
    }

    fn close(&mut self, sock: SockId) {
        // Closing the descriptor takes it out of epoll as well.
        if let Some(stream) = self.remove(sock)
            && let Err(error) = socket::end_on_close(&stream)
        {
            tracing::debug!(%error, "socket may be reset instead of closed");
        }
    }

    fn abort(&mut self, sock: SockId) {
        if let Some(stream) = self.remove(sock)
            && let Err(error) = socket::reset_on_close(&stream)
        {
            tracing::debug!(%error, "socket closed without a reset");
        }
    }
}

/// How the connect of `stream` went, so far.
///
/// A connected socket has a peer: one call for those that went well. What fails later is told by the calls to come.
pub(super) fn connect_result(stream: &TcpStream) -> Poll<io::Result<()>> {
    // Of whatever family: one end of a pair is connected too.
    match socket2::SockRef::from(stream).peer_addr() {
        Ok(_) => Poll::Ready(Ok(())),
        Err(error) if error.kind() == io::ErrorKind::NotConnected => match stream.take_error() {
            Ok(None) => Poll::Pending,
            Ok(Some(error)) | Err(error) => Poll::Ready(Err(error)),
        },
        Err(error) => Poll::Ready(Err(error)),
    }
}
