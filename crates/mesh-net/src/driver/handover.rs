//! A worker's sockets and engine, written down for a worker of another process, and taken over by it.

use std::collections::BTreeMap;
use std::io;
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd as _, OwnedFd};

use mesh_tunnel::{Engine, HandOverError, Io as _, SockId};
use zeroize::Zeroizing;

use crate::driver::ops::{ListenerId, ListenerTag, Ops};
use crate::driver::sockets::Owner;

/// One worker, written down. Its descriptors are duplicates: what becomes of them changes nothing for the writer.
#[derive(Debug)]
pub struct WrittenWorker {
    /// The engine; holds the secrets of live tunnels.
    pub engine: Zeroizing<Vec<u8>>,
    /// Sockets of the engine, and those that wait for the handler's decision. Not those of handshakes under way.
    pub sockets: Vec<WrittenSocket>,
    /// Listeners.
    pub listeners: Vec<(ListenerId, ListenerTag, OwnedFd)>,
}

/// One socket of a [`WrittenWorker`].
#[derive(Debug)]
pub struct WrittenSocket {
    /// What its worker calls it.
    pub name: SockId,
    /// The engine owns it; else the handler.
    pub of_engine: bool,
    /// What is to be written once it has connected.
    pub prefix: Vec<u8>,
    /// The socket.
    pub fd: OwnedFd,
}

/// Why a worker was not taken over. No byte has been read or written then.
#[derive(Debug, thiserror::Error)]
pub enum TakeOverError {
    /// The kernel refused a socket.
    #[error("a socket cannot be watched")]
    Socket(#[source] io::Error),
    /// The engine's state is of no use.
    #[error("the engine's state cannot be used")]
    Engine(#[source] HandOverError),
}

impl Ops {
    /// Has [`Handler::written`](super::Handler::written) called with the whole worker at the end of this turn.
    pub const fn write_down_soon(&mut self) {
        self.write_down = true;
    }

    /// Stops, or begins again, to accept from a listener; connections wait in its queue.
    pub fn hold_listener(&mut self, id: ListenerId, held: bool) {
        let Some(listener) = self.listeners.get_mut(&id.0) else { return };
        listener.held = held;
        if !held && !std::mem::replace(&mut listener.queued, true) {
            self.acceptable.push_back(id.0);
        }
    }

    /// Writes everything down. Afterwards the engine must have no turn, unless it is certain that the successor's never
    /// will.
    ///
    /// # Errors
    /// For want of descriptors; [`WouldBlock`](io::ErrorKind::WouldBlock) while peers' handshakes are in flight, which
    /// cannot be written.
    pub(super) fn write_worker(&mut self) -> io::Result<WrittenWorker> {
        if self.accepting() > 0 {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        let engine = self.engine.hand_over(&mut self.sockets, self.now);
        let sockets = self.sockets.written()?;
        let listeners = self
            .listeners
            .iter()
            .map(|(id, listener)| {
                use std::os::fd::{AsRawFd, BorrowedFd};
                #[expect(unsafe_code, reason = "mio's listener does not implement AsFd")]
                // SAFETY: the listener is borrowed for as long as the descriptor is used.
                let fd = unsafe { BorrowedFd::borrow_raw(listener.listener.as_raw_fd()) };
                Ok((ListenerId(*id), listener.tag, fd.try_clone_to_owned()?))
            })
            .collect::<io::Result<_>>()?;
        Ok(WrittenWorker { engine, sockets, listeners })
    }

    /// Takes over a predecessor's engine and sockets in place of this worker's engine, which must be empty. Gives the new
    /// names of the sockets. Listeners are for the handler to add.
    ///
    /// # Errors
    /// See [`TakeOverError`].
    ///
    /// # Panics
    /// When the engine is not empty.
    pub fn take_over(
        &mut self,
        engine: &[u8],
        sockets: Vec<WrittenSocket>,
    ) -> Result<BTreeMap<SockId, SockId>, TakeOverError> {
        assert_eq!(self.engine.stats().sockets, 0, "only an empty engine is replaced");
        let mut names = BTreeMap::new();
        for WrittenSocket { name, of_engine, prefix, fd } in sockets {
            let stream = mio::net::TcpStream::from_std(TcpStream::from(fd));
            let owner = if of_engine { Owner::Engine } else { Owner::Parked };
            let sock = self.sockets.insert(stream, owner).map_err(TakeOverError::Socket)?;
            self.sockets.set_prefix(sock, prefix);
            names.insert(name, sock);
        }
        let rename = |name: SockId| names.get(&name).copied();
        self.engine = Engine::take_over(self.engine_config.clone(), engine, self.now, rename)
            .map_err(TakeOverError::Engine)?;
        Ok(names)
    }

    /// Adds a listener that came with a hand-over.
    ///
    /// # Errors
    /// When epoll refuses it.
    pub fn add_handed_listener(&mut self, tag: ListenerTag, fd: OwnedFd) -> io::Result<ListenerId> {
        self.add_listener(tag, mio::net::TcpListener::from_std(TcpListener::from(fd)))
    }

    /// Lets go of everything without touching it: another process goes on with it.
    pub fn abandon(&mut self) {
        self.engine = Engine::new(self.engine_config.clone(), self.now);
        self.sockets.let_go();
        self.stopping = true;
    }

    /// Resets every socket: nobody goes on with them, and an orderly end would be a lie to whoever reads.
    pub fn reset_all(&mut self) {
        self.engine = Engine::new(self.engine_config.clone(), self.now);
        for sock in self.sockets.names() {
            self.sockets.abort(sock);
        }
        self.stopping = true;
    }
}

/// Duplicates the descriptor of a socket.
pub(super) fn duplicate(stream: &mio::net::TcpStream) -> io::Result<OwnedFd> {
    stream.as_fd().try_clone_to_owned()
}
