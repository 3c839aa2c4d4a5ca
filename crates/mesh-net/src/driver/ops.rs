//! What a handler may do with its worker: sockets, handshakes, listeners, and the engine.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::task::Poll;
use std::time::Instant;

use mesh_identity::PeerCertificate;
use mesh_model::PodUid;
use mesh_tunnel::{DialId, Engine, Readiness, SockId, TunnelId};
use mio::net::{TcpListener, TcpStream};
use mio::{Interest, Registry, Token};
use rustls::{ClientConfig, ServerConfig};

use crate::driver::WorkerConfig;
use crate::driver::budget::DescriptorBudget;
use crate::driver::sockets::{Owner, Sockets, connect_result};
use crate::handshake::{HANDSHAKE_TIMEOUT, Handshake, HandshakeError};

/// Names a listener to its handler, which chooses it; several listeners may share one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ListenerTag(pub u64);

/// Names a listener to [`Ops::remove_listener`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ListenerId(pub(super) u32);

/// A handshake, as the handler knows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Attempt {
    /// One that [`Ops::dial`] began.
    Dial(DialId),
    /// One that [`Ops::accept_tunnel`] began.
    Accept {
        /// The listener the connection came in by.
        tag: ListenerTag,
        /// The TCP peer.
        peer: SocketAddr,
    },
}

/// What became of a handshake; waits for the handler to be told.
#[derive(Debug)]
pub(super) enum Outcome {
    Dialled { dial: DialId, tunnel: Option<TunnelId>, peer: PeerCertificate },
    Accepted { tunnel: TunnelId, tag: ListenerTag, peer: PeerCertificate, ends: Ends },
    Failed { attempt: Attempt, error: HandshakeError },
}

/// The two addresses of a connection, canonical.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ends {
    /// The far end's.
    pub peer: SocketAddr,
    /// This end's.
    pub local: SocketAddr,
}

#[derive(Debug)]
struct InFlight {
    handshake: Handshake,
    attempt: Attempt,
    /// The pod that is dialled; none for a dial.
    pod: Option<PodUid>,
    connecting: bool,
    deadline: Instant,
}

#[derive(Debug)]
pub(super) struct Listener {
    pub(super) tag: ListenerTag,
    pub(super) listener: TcpListener,
    /// Already in the queue of listeners to accept from.
    pub(super) queued: bool,
}

/// A worker without its handler. Handed to each callback.
#[derive(Debug)]
pub struct Ops {
    /// The engine. After handing it a socket, call [`Ops::engage`].
    pub engine: Engine,
    pub(super) sockets: Sockets,
    pub(super) listeners: BTreeMap<u32, Listener>,
    pub(super) acceptable: VecDeque<u32>,
    pub(super) outcomes: VecDeque<Outcome>,
    pub(super) stopping: bool,
    pub(super) now: Instant,
    next_listener: u32,
    in_flight: BTreeMap<SockId, InFlight>,
    deadlines: BTreeSet<(Instant, SockId)>,
    registry: Registry,
    budget: Arc<DescriptorBudget>,
    max_handshakes: usize,
}

/// Set in the tokens of listeners, clear in those of sockets.
pub(super) const LISTENER_BIT: usize = 1 << 63;

impl Ops {
    pub(super) fn new(
        config: &WorkerConfig,
        registry: &Registry,
        now: Instant,
    ) -> io::Result<Self> {
        Ok(Self {
            engine: Engine::new(config.engine.clone(), now),
            sockets: Sockets::new(registry.try_clone()?, Arc::clone(&config.budget)),
            listeners: BTreeMap::new(),
            acceptable: VecDeque::new(),
            outcomes: VecDeque::new(),
            stopping: false,
            now,
            next_listener: 0,
            in_flight: BTreeMap::new(),
            deadlines: BTreeSet::new(),
            registry: registry.try_clone()?,
            budget: Arc::clone(&config.budget),
            max_handshakes: config.max_handshakes,
        })
    }

    /// The time of this turn.
    #[must_use]
    pub const fn now(&self) -> Instant {
        self.now
    }

    /// Sockets of this worker, listeners aside.
    #[must_use]
    pub fn sockets(&self) -> usize {
        self.sockets.len()
    }

    /// Handshakes in flight.
    #[must_use]
    pub fn handshakes(&self) -> usize {
        self.in_flight.len()
    }

    /// True when `more` sockets fit under the descriptor limit.
    #[must_use]
    pub fn has_room(&self, more: u64) -> bool {
        self.budget.has_room(more)
    }

    /// Adds a socket that the handler made, for the engine. It may still be connecting.
    ///
    /// # Errors
    /// When epoll refuses it.
    pub fn add(&mut self, stream: TcpStream) -> io::Result<SockId> {
        self.sockets.insert(stream, Owner::Parked)
    }

    /// As [`add`](Self::add); `prefix` is written as soon as the socket has connected, before anything else.
    ///
    /// # Errors
    /// As [`add`](Self::add).
    pub fn add_with_prefix(&mut self, stream: TcpStream, prefix: Vec<u8>) -> io::Result<SockId> {
        let sock = self.add(stream)?;
        self.sockets.set_prefix(sock, prefix);
        Ok(sock)
    }

    /// From here on readiness of `sock` goes to the engine, beginning with what it missed.
    ///
    /// Call it once per socket, after giving the socket to the engine.
    pub fn engage(&mut self, sock: SockId) {
        let missed = self.sockets.engage(sock);
        if missed != Readiness::default() {
            self.engine.on_event(sock, missed);
        }
    }

    /// The addresses of `sock`; none when it is gone.
    #[must_use]
    pub fn ends(&self, sock: SockId) -> Option<Ends> {
        Some(Ends { peer: self.sockets.peer_addr(sock)?, local: self.sockets.local_addr(sock)? })
    }

    /// Resets a parked socket. Its client sees a refusal, never a silent end.
    pub fn abort(&mut self, sock: SockId) {
        mesh_tunnel::Io::abort(&mut self.sockets, sock);
    }

    /// Adds a listener. Its connections are announced with `tag`.
    ///
    /// # Errors
    /// When epoll refuses it.
    pub fn add_listener(
        &mut self,
        tag: ListenerTag,
        mut listener: TcpListener,
    ) -> io::Result<ListenerId> {
        let id = self.next_listener;
        let token = Token(LISTENER_BIT | id as usize);
        self.registry.register(&mut listener, token, Interest::READABLE)?;
        self.next_listener = id.wrapping_add(1);
        self.listeners.insert(id, Listener { tag, listener, queued: false });
        Ok(ListenerId(id))
    }

    /// Closes a listener; connections in its queue are reset by the kernel.
    pub fn remove_listener(&mut self, id: ListenerId) {
        self.listeners.remove(&id.0);
    }

    /// The descriptor of a listener.
    #[must_use]
    pub fn listener_fd(&self, id: ListenerId) -> Option<BorrowedFd<'_>> {
        use std::os::fd::AsRawFd;
        let fd = self.listeners.get(&id.0)?.listener.as_raw_fd();
        #[expect(unsafe_code, reason = "mio's listener does not implement AsFd for its std form")]
        // SAFETY: the listener is borrowed from `self` for as long as the result lives.
        Some(unsafe { BorrowedFd::borrow_raw(fd) })
    }

    /// Begins the TLS handshake of a dial over `stream`, which may still be connecting.
    ///
    /// The engine learns the outcome; the handler hears `dialled` or `handshake_failed`.
    pub fn dial(&mut self, dial: DialId, stream: io::Result<TcpStream>, config: Arc<ClientConfig>) {
        let attempt = Attempt::Dial(dial);
        let begun = stream
            .map_err(HandshakeError::Connect)
            .and_then(|stream| Ok((stream, Handshake::client(config)?)))
            .and_then(|(stream, handshake)| {
                self.admit_handshake()?;
                let sock = self
                    .sockets
                    .insert(stream, Owner::Handshake)
                    .map_err(HandshakeError::Connect)?;
                Ok((sock, handshake))
            });
        match begun {
            Ok((sock, handshake)) => self.begin(sock, handshake, attempt, None),
            Err(error) => self.fail(attempt, error),
        }
    }

    /// Ends a dial before it begins.
    pub fn dial_failed(&mut self, dial: DialId, error: HandshakeError) {
        self.fail(Attempt::Dial(dial), error);
    }

    /// Begins the TLS handshake of an accepted connection, which will be a tunnel to `pod`.
    ///
    /// The handler hears `tunnel_up` or `handshake_failed`.
    pub fn accept_tunnel(
        &mut self,
        sock: SockId,
        peer: SocketAddr,
        (tag, pod): (ListenerTag, PodUid),
        config: Arc<ServerConfig>,
    ) {
        let attempt = Attempt::Accept { tag, peer };
        match self.admit_handshake().and_then(|()| Handshake::server(config)) {
            Ok(handshake) => {
                self.sockets.set_owner(sock, Owner::Handshake);
                self.begin(sock, handshake, attempt, Some(pod));
            }
            Err(error) => {
                self.abort(sock);
                self.fail(attempt, error);
            }
        }
    }

    /// Ends the worker after this turn; its sockets are closed.
    pub const fn stop(&mut self) {
        self.stopping = true;
    }

    fn admit_handshake(&self) -> Result<(), HandshakeError> {
        if self.in_flight.len() < self.max_handshakes && self.budget.has_room(1) {
            Ok(())
        } else {
            Err(HandshakeError::Overloaded)
        }
    }

    fn begin(&mut self, sock: SockId, handshake: Handshake, attempt: Attempt, pod: Option<PodUid>) {
        let deadline = self.now + HANDSHAKE_TIMEOUT;
        let connecting = pod.is_none();
        self.deadlines.insert((deadline, sock));
        self.in_flight.insert(sock, InFlight { handshake, attempt, pod, connecting, deadline });
        self.advance(sock);
    }

    /// Drives one handshake as far as its socket allows.
    pub(super) fn advance(&mut self, sock: SockId) {
        let (Some(in_flight), Some(stream)) =
            (self.in_flight.get_mut(&sock), self.sockets.stream(sock))
        else {
            return;
        };
        if in_flight.connecting {
            match connect_result(stream) {
                Poll::Pending => return,
                Poll::Ready(Ok(())) => in_flight.connecting = false,
                Poll::Ready(Err(error)) => {
                    return self.drop_attempt(sock, HandshakeError::Connect(error));
                }
            }
        }
        match in_flight.handshake.advance(stream) {
            Ok(Poll::Pending) => {}
            Ok(Poll::Ready(finished)) => self.finish(sock, finished),
            Err(error) => self.drop_attempt(sock, error),
        }
    }

    fn finish(&mut self, sock: SockId, finished: crate::handshake::Finished) {
        let Some(in_flight) = self.forget(sock) else { return };
        let InFlight { handshake, attempt, pod, .. } = in_flight;
        let (established, ends) = match (handshake.establish(finished), self.ends(sock)) {
            (Ok(established), Some(ends)) => (established, ends),
            (Ok(_), None) => {
                self.abort(sock);
                return self.fail(attempt, HandshakeError::Closed);
            }
            (Err(error), _) => {
                self.abort(sock);
                return self.fail(attempt, error);
            }
        };
        let peer = established.peer;
        match (attempt, pod) {
            (Attempt::Accept { tag, .. }, Some(pod)) => {
                let session = established.session;
                let tunnel = self.engine.add_server_tunnel(pod, session, sock, self.now);
                self.outcomes.push_back(Outcome::Accepted { tunnel, tag, peer, ends });
            }
            (Attempt::Dial(dial), _) => {
                let session = established.session;
                let tunnel = self.engine.dial_succeeded(dial, session, sock, self.now);
                self.outcomes.push_back(Outcome::Dialled { dial, tunnel, peer });
            }
            (Attempt::Accept { .. }, None) => unreachable!("accept_tunnel names the pod"),
        }
        self.engage(sock);
    }

    fn forget(&mut self, sock: SockId) -> Option<InFlight> {
        let in_flight = self.in_flight.remove(&sock)?;
        self.deadlines.remove(&(in_flight.deadline, sock));
        Some(in_flight)
    }

    fn drop_attempt(&mut self, sock: SockId, error: HandshakeError) {
        if let Some(in_flight) = self.forget(sock) {
            // An orderly close, so that an alert on its way still reaches the peer.
            mesh_tunnel::Io::close(&mut self.sockets, sock);
            self.fail(in_flight.attempt, error);
        }
    }

    fn fail(&mut self, attempt: Attempt, error: HandshakeError) {
        if let Attempt::Dial(dial) = attempt {
            self.engine.dial_failed(dial, error.close_reason(), self.now);
        }
        self.outcomes.push_back(Outcome::Failed { attempt, error });
    }

    /// Ends the handshakes that took too long.
    pub(super) fn expire_handshakes(&mut self) {
        while let Some(&(deadline, sock)) = self.deadlines.first()
            && deadline <= self.now
        {
            let connecting =
                self.in_flight.get(&sock).is_some_and(|in_flight| in_flight.connecting);
            self.deadlines.pop_first();
            self.drop_attempt(sock, HandshakeError::TimedOut { connecting });
        }
    }

    /// Ends every handshake that was accepted by a listener with `tag`.
    pub fn abort_handshakes(&mut self, tag: ListenerTag) {
        let doomed: Vec<SockId> = self
            .in_flight
            .iter()
            .filter(|(_, in_flight)| {
                matches!(in_flight.attempt, Attempt::Accept { tag: its, .. } if its == tag)
            })
            .map(|(sock, _)| *sock)
            .collect();
        for sock in doomed {
            self.drop_attempt(sock, HandshakeError::Closed);
        }
    }

    pub(super) fn next_deadline(&self) -> Option<Instant> {
        let handshake = self.deadlines.first().map(|(deadline, _)| *deadline);
        [handshake, self.engine.poll_timeout()].into_iter().flatten().min()
    }

    /// The descriptor of `sock`, for options that only the handler knows about.
    #[must_use]
    pub fn with_socket<R>(
        &mut self,
        sock: SockId,
        f: impl FnOnce(BorrowedFd<'_>) -> R,
    ) -> Option<R> {
        self.sockets.stream(sock).map(|stream| f(stream.as_fd()))
    }
}
