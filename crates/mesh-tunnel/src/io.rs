//! The engine's only window on the world: sockets named by [`SockId`], used through [`Io`].

use std::io::{self, IoSlice, IoSliceMut};
use std::task::Poll;

/// A socket as the driver names it. Opaque to the engine.
///
/// The driver never gives the same value to two sockets that the engine could mix up: a slot number must carry a
/// generation. The engine owns a socket from the call that passes it in until it calls [`Io::close`] or [`Io::abort`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SockId(pub u64);

/// What an edge-triggered readiness notification said about one socket.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Readiness {
    /// Bytes or an end can be read.
    pub readable: bool,
    /// Bytes can be written, or a connect has come to an end.
    pub writable: bool,
    /// The peer has ended its direction (`EPOLLRDHUP`, `EPOLLHUP`).
    pub read_closed: bool,
    /// The socket has failed (`EPOLLERR`): reset, timed out, or its connect failed. What came before that can still be read.
    pub error: bool,
    /// Urgent data has come (`EPOLLPRI`): reads stop short in front of it.
    pub urgent: bool,
}

impl Readiness {
    /// Everything that is no failure; what a new socket is taken for until a call says otherwise.
    pub const ALL: Self =
        Self { readable: true, writable: true, read_closed: false, error: false, urgent: false };
}

/// Non-blocking socket calls, as the driver offers them.
///
/// `WouldBlock` means: ask again after the next readiness. `Interrupted` must be handled by the driver. A read or write that
/// moved fewer bytes than were offered is taken as "drained" or "full" until the next edge, as epoll(7) permits for streams; a
/// read not after `read_closed`, `error` or `urgent`.
pub trait Io {
    /// Reads into `bufs`, in order. `Ok(0)` is the end of the stream.
    ///
    /// # Errors
    /// As `readv(2)`; `ConnectionReset` when the peer reset, once: whoever was told by a write reads `Ok(0)`.
    fn readv(&mut self, sock: SockId, bufs: &mut [IoSliceMut<'_>]) -> io::Result<usize>;

    /// Writes from `bufs`, in order. Must not raise `SIGPIPE`.
    ///
    /// # Errors
    /// As `sendmsg(2)`.
    fn writev(&mut self, sock: SockId, bufs: &[IoSlice<'_>]) -> io::Result<usize>;

    /// How a connect that was under way has come out. Called at once when the engine gets the socket, and at each
    /// `writable` or `error` until it is ready. A socket that was connected from the start answers `Ready(Ok(()))`.
    fn connect_result(&mut self, sock: SockId) -> Poll<io::Result<()>>;

    /// Sends FIN; reading goes on.
    ///
    /// # Errors
    /// As `shutdown(2)`; `NotConnected` is a peer's reset.
    fn shutdown_write(&mut self, sock: SockId) -> io::Result<()>;

    /// Closes in good order. The engine does not name the socket again.
    fn close(&mut self, sock: SockId);

    /// Closes with RST (`SO_LINGER` 0). The engine does not name the socket again.
    fn abort(&mut self, sock: SockId);
}
