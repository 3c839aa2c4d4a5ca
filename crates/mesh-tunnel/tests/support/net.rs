//! A network in memory that behaves as epoll and TCP do, and is as unhelpful as they may be.
//!
//! Reads and writes move any part of what they could; readiness is edge-triggered, and a short read or write is followed by
//! another edge when it was not the end of what there was.

use std::collections::VecDeque;
use std::io::{self, IoSlice, IoSliceMut};
use std::task::Poll;

use mesh_tunnel::{Io, Readiness, SockId};

use super::Rng;
use super::tap::Tap;

/// How a socket's connect comes out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Connect {
    Done,
    /// After this many looks.
    Later(u32),
    Refused,
    /// With this error of the system.
    Failed(i32),
    Never,
}

pub struct Sock {
    peer: usize,
    /// What the peer wrote.
    inbox: VecDeque<u8>,
    /// Bytes `inbox` may hold.
    pub capacity: usize,
    fin: bool,
    reset: bool,
    /// The reset was told to a call: none after it is told, reads end.
    told: bool,
    /// How many bytes of `inbox` stand in front of an urgent one: reads stop there once.
    mark: Option<usize>,
    pub closed: bool,
    pub aborted: bool,
    shut: bool,
    peer_blocked: bool,
    pub connect: Connect,
    /// Judges what is written to this socket.
    pub tap: Option<Box<Tap>>,
}

pub struct Net {
    pub rng: Rng,
    pub socks: Vec<Sock>,
    pub edges: Vec<(SockId, Readiness)>,
    /// Partial reads and writes.
    pub fickle: bool,
}

impl Net {
    pub fn new(seed: u64, fickle: bool) -> Self {
        Self { rng: Rng(seed), socks: Vec::new(), edges: Vec::new(), fickle }
    }

    pub fn pair(&mut self, capacity: usize) -> (SockId, SockId) {
        let first = self.socks.len();
        for peer in [first + 1, first] {
            self.socks.push(Sock {
                peer,
                inbox: VecDeque::new(),
                capacity,
                fin: false,
                reset: false,
                told: false,
                mark: None,
                closed: false,
                aborted: false,
                shut: false,
                peer_blocked: false,
                connect: Connect::Done,
                tap: None,
            });
        }
        (SockId(first as u64), SockId(first as u64 + 1))
    }

    fn edge(&mut self, sock: usize, ready: Readiness) {
        if !self.socks[sock].closed {
            self.edges.push((SockId(sock as u64), ready));
        }
    }

    pub fn reset(&self, sock: SockId) -> bool {
        self.socks[Self::index(sock)].reset
    }

    /// Its index in `socks`.
    pub fn index(sock: SockId) -> usize {
        usize::try_from(sock.0).expect("names are indexes here")
    }

    /// Bytes that can be read.
    pub fn waiting(&self, sock: SockId) -> usize {
        self.socks[Self::index(sock)].inbox.len()
    }

    /// An end or a reset can be read, or will be behind the bytes.
    pub fn ends(&self, sock: SockId) -> bool {
        let sock = &self.socks[Self::index(sock)];
        sock.fin || sock.reset
    }

    pub fn take_edges(&mut self) -> Vec<(SockId, Readiness)> {
        std::mem::take(&mut self.edges)
    }

    pub fn read(&mut self, sock: SockId, limit: usize) -> io::Result<Vec<u8>> {
        let mut buffer = vec![0; limit.min(self.waiting(sock)).max(1)];
        let count = self.readv(sock, &mut [IoSliceMut::new(&mut buffer)])?;
        buffer.truncate(count);
        Ok(buffer)
    }

    pub fn write(&mut self, sock: SockId, bytes: &[u8]) -> io::Result<usize> {
        self.writev(sock, &[IoSlice::new(bytes)])
    }

    /// Writes an urgent byte, which the reader keeps among the others (`SO_OOBINLINE`).
    pub fn urge(&mut self, sock: SockId, byte: u8) {
        let peer = self.socks[Self::index(sock)].peer;
        self.socks[peer].mark = Some(self.socks[peer].inbox.len());
        self.socks[peer].inbox.push_back(byte);
        self.edge(peer, Readiness { readable: true, urgent: true, ..Readiness::default() });
    }

    fn part(&mut self, whole: usize) -> usize {
        if !self.fickle || whole == 0 {
            return whole;
        }
        match self.rng.below(4) {
            0 => 1,
            1 => 1 + self.rng.below(whole),
            _ => whole,
        }
    }

    fn leave(&mut self, sock: usize, abort: bool) {
        let state = &mut self.socks[sock];
        assert!(!state.closed, "socket {sock} closed twice");
        state.closed = true;
        state.aborted = abort;
        let unread = !state.inbox.is_empty();
        state.inbox.clear();
        let peer = state.peer;
        let edge = if abort || unread {
            self.socks[peer].reset = true;
            Readiness { readable: true, error: true, ..Readiness::default() }
        } else {
            self.socks[peer].fin = true;
            Readiness { readable: true, read_closed: true, ..Readiness::default() }
        };
        self.edge(peer, edge);
    }
}

impl Io for Net {
    fn readv(&mut self, sock: SockId, bufs: &mut [IoSliceMut<'_>]) -> io::Result<usize> {
        let sock = Self::index(sock);
        assert!(!self.socks[sock].closed, "read of closed socket {sock}");
        let room: usize = bufs.iter().map(|buf| buf.len()).sum();
        assert!(room > 0, "a read without room looks like an end");
        let have = self.socks[sock].inbox.len();
        if have == 0 {
            if self.socks[sock].reset && !std::mem::replace(&mut self.socks[sock].told, true) {
                return Err(io::ErrorKind::ConnectionReset.into());
            }
            return if self.socks[sock].fin || self.socks[sock].reset {
                Ok(0)
            } else {
                Err(io::ErrorKind::WouldBlock.into())
            };
        }
        let mut count = self.part(room.min(have));
        let mark = self.socks[sock].mark;
        let stopped = mark.is_some_and(|mark| 0 < mark && mark <= count);
        if stopped {
            count = count.min(mark.unwrap_or(count));
        }
        self.socks[sock].mark = mark.and_then(|mark| mark.checked_sub(count));
        let mut left = count;
        for buf in bufs {
            let take = left.min(buf.len());
            let inbox = &mut self.socks[sock].inbox;
            let (front, back) = inbox.as_slices();
            let first = take.min(front.len());
            buf[..first].copy_from_slice(&front[..first]);
            buf[first..take].copy_from_slice(&back[..take - first]);
            inbox.drain(..take);
            left -= take;
        }
        // At the mark nobody is woken: all of it has been announced.
        if !stopped && count < room && (count < have || self.socks[sock].fin) {
            let fin = self.socks[sock].fin;
            self.edge(sock, Readiness { readable: true, read_closed: fin, ..Readiness::default() });
        }
        let peer = self.socks[sock].peer;
        if std::mem::take(&mut self.socks[sock].peer_blocked) {
            self.edge(peer, Readiness { writable: true, ..Readiness::default() });
        }
        Ok(count)
    }

    fn writev(&mut self, sock: SockId, bufs: &[IoSlice<'_>]) -> io::Result<usize> {
        let sock = Self::index(sock);
        assert!(!self.socks[sock].closed, "write to closed socket {sock}");
        assert!(!self.socks[sock].shut, "write behind FIN on socket {sock}");
        let peer = self.socks[sock].peer;
        if self.socks[sock].reset {
            let told = std::mem::replace(&mut self.socks[sock].told, true);
            let kind =
                if told { io::ErrorKind::BrokenPipe } else { io::ErrorKind::ConnectionReset };
            return Err(kind.into());
        }
        if self.socks[peer].closed {
            self.socks[sock].reset = true;
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        let offered: usize = bufs.iter().map(|buf| buf.len()).sum();
        let room = self.socks[peer].capacity.saturating_sub(self.socks[peer].inbox.len());
        let can = room.min(offered);
        let count = self.part(can);
        if count < offered {
            if count < can {
                self.edge(sock, Readiness { writable: true, ..Readiness::default() });
            } else {
                self.socks[peer].peer_blocked = true;
            }
        }
        if count == 0 && offered > 0 {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        let mut left = count;
        for buf in bufs {
            let take = left.min(buf.len());
            self.socks[peer].inbox.extend(&buf[..take]);
            if let Some(tap) = &mut self.socks[sock].tap {
                tap.hear(&buf[..take]);
            }
            left -= take;
        }
        self.edge(peer, Readiness { readable: true, ..Readiness::default() });
        Ok(count)
    }

    fn connect_result(&mut self, sock: SockId) -> Poll<io::Result<()>> {
        let index = Self::index(sock);
        match self.socks[index].connect {
            Connect::Done => Poll::Ready(Ok(())),
            Connect::Later(0) => {
                self.socks[index].connect = Connect::Done;
                Poll::Ready(Ok(()))
            }
            Connect::Later(looks) => {
                self.socks[index].connect = Connect::Later(looks - 1);
                self.edge(index, Readiness { writable: true, ..Readiness::default() });
                Poll::Pending
            }
            Connect::Refused => Poll::Ready(Err(io::ErrorKind::ConnectionRefused.into())),
            Connect::Failed(error) => Poll::Ready(Err(io::Error::from_raw_os_error(error))),
            Connect::Never => Poll::Pending,
        }
    }

    fn shutdown_write(&mut self, sock: SockId) -> io::Result<()> {
        let sock = Self::index(sock);
        assert!(!self.socks[sock].closed && !self.socks[sock].shut, "FIN twice on {sock}");
        if self.socks[sock].reset {
            return Err(io::ErrorKind::NotConnected.into());
        }
        self.socks[sock].shut = true;
        let peer = self.socks[sock].peer;
        self.socks[peer].fin = true;
        self.edge(peer, Readiness { readable: true, read_closed: true, ..Readiness::default() });
        Ok(())
    }

    fn close(&mut self, sock: SockId) {
        self.leave(Self::index(sock), false);
    }

    fn abort(&mut self, sock: SockId) {
        self.leave(Self::index(sock), true);
    }
}
