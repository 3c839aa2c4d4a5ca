//! A network in memory: the far ends of an engine's sockets are held by the fuzzer.

use std::collections::{BTreeMap, VecDeque};
use std::io::{self, IoSlice, IoSliceMut};
use std::task::Poll;

use mesh_tunnel::{Io, Readiness, SockId};

#[derive(Debug, Default)]
struct Sock {
    inbox: VecDeque<u8>,
    fin: bool,
    reset: bool,
    outbox: Vec<u8>,
    /// Bytes that may be written before the far end takes some.
    room: usize,
    connecting: bool,
    shut: bool,
    closed: bool,
}

#[derive(Debug, Default)]
pub(crate) struct Net {
    socks: BTreeMap<SockId, Sock>,
    edges: Vec<(SockId, Readiness)>,
}

impl Net {
    /// A socket that may hold `room` unread bytes; not yet connected if so told.
    pub(crate) fn open(&mut self, room: usize, connecting: bool) -> SockId {
        let id = SockId(self.socks.len() as u64);
        self.socks.insert(id, Sock { room, connecting, ..Sock::default() });
        id
    }

    fn sock(&mut self, id: SockId) -> &mut Sock {
        self.socks.get_mut(&id).expect("the engine names only sockets it was given")
    }

    pub(crate) fn take_edges(&mut self) -> Vec<(SockId, Readiness)> {
        std::mem::take(&mut self.edges)
    }

    fn edge(&mut self, id: SockId, ready: Readiness) {
        if !self.sock(id).closed {
            self.edges.push((id, ready));
        }
    }

    pub(crate) fn say(&mut self, id: SockId, bytes: &[u8]) {
        let sock = self.sock(id);
        if sock.closed || sock.fin || sock.reset || bytes.is_empty() {
            return;
        }
        sock.inbox.extend(bytes);
        self.edge(id, Readiness { readable: true, ..Readiness::default() });
    }

    pub(crate) fn end(&mut self, id: SockId) {
        self.sock(id).fin = true;
        self.edge(id, Readiness { readable: true, read_closed: true, ..Readiness::default() });
    }

    pub(crate) fn reset(&mut self, id: SockId) {
        let sock = self.sock(id);
        sock.reset = true;
        sock.inbox.clear();
        self.edge(id, Readiness { read_closed: true, error: true, ..Readiness::ALL });
    }

    pub(crate) fn connected(&mut self, id: SockId) {
        self.sock(id).connecting = false;
        self.edge(id, Readiness { writable: true, ..Readiness::default() });
    }

    /// What the engine wrote; there is room for as much again.
    pub(crate) fn hear(&mut self, id: SockId) -> Vec<u8> {
        let sock = self.sock(id);
        let heard = std::mem::take(&mut sock.outbox);
        sock.room += heard.len();
        if !heard.is_empty() {
            self.edge(id, Readiness { writable: true, ..Readiness::default() });
        }
        heard
    }

    /// The sockets that the engine has not let go of.
    pub(crate) fn left_open(&self) -> Vec<SockId> {
        self.socks.iter().filter(|(_, sock)| !sock.closed).map(|(id, _)| *id).collect()
    }

    fn leave(&mut self, id: SockId) {
        let sock = self.sock(id);
        assert!(!sock.closed, "{id:?} closed twice");
        sock.closed = true;
        sock.inbox.clear();
    }
}

impl Io for Net {
    fn readv(&mut self, id: SockId, bufs: &mut [IoSliceMut<'_>]) -> io::Result<usize> {
        let sock = self.sock(id);
        assert!(!sock.closed, "{id:?} read after its end");
        assert!(bufs.iter().any(|buf| !buf.is_empty()), "a read without room looks like an end");
        if sock.inbox.is_empty() {
            return match (sock.reset, sock.fin) {
                (true, _) => Err(io::ErrorKind::ConnectionReset.into()),
                (false, true) => Ok(0),
                (false, false) => Err(io::ErrorKind::WouldBlock.into()),
            };
        }
        let mut count = 0;
        for buf in bufs {
            let take = buf.len().min(sock.inbox.len());
            for (place, byte) in buf.iter_mut().zip(sock.inbox.drain(..take)) {
                *place = byte;
            }
            count += take;
        }
        Ok(count)
    }

    fn writev(&mut self, id: SockId, bufs: &[IoSlice<'_>]) -> io::Result<usize> {
        let sock = self.sock(id);
        assert!(!sock.closed && !sock.shut, "{id:?} written to after its end");
        assert!(!sock.connecting, "{id:?} written to before it was connected");
        if sock.reset {
            return Err(io::ErrorKind::ConnectionReset.into());
        }
        let before = sock.outbox.len();
        for buf in bufs {
            let take = buf.len().min(sock.room);
            sock.outbox.extend(&buf[..take]);
            sock.room -= take;
        }
        let count = sock.outbox.len() - before;
        if count == 0 && bufs.iter().any(|buf| !buf.is_empty()) {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        Ok(count)
    }

    fn connect_result(&mut self, id: SockId) -> Poll<io::Result<()>> {
        let sock = self.sock(id);
        if sock.reset {
            Poll::Ready(Err(io::ErrorKind::ConnectionRefused.into()))
        } else if sock.connecting {
            Poll::Pending
        } else {
            Poll::Ready(Ok(()))
        }
    }

    fn shutdown_write(&mut self, id: SockId) -> io::Result<()> {
        let sock = self.sock(id);
        assert!(!sock.closed && !sock.shut, "FIN twice on {id:?}");
        if sock.reset {
            return Err(io::ErrorKind::NotConnected.into());
        }
        sock.shut = true;
        Ok(())
    }

    fn close(&mut self, id: SockId) {
        self.leave(id);
    }

    fn abort(&mut self, id: SockId) {
        self.leave(id);
    }
}
