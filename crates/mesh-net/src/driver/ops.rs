//! What a handler may do with its worker: sockets, handshakes, listeners, and the engine.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::task::Poll;
use std::time::{Duration, Instant};

use mesh_identity::PeerCertificate;
use mesh_model::PodUid;
use mesh_tunnel::{DialId, Engine, EngineConfig, Readiness, RelayId, SockId, TunnelId};
use mio::net::{TcpListener, TcpStream};
use mio::{Interest, Registry, Token};
use rustls::{ClientConfig, ServerConfig};

use crate::driver::WorkerConfig;
use crate::driver::budget::DescriptorBudget;
use crate::driver::seats::{Admission, Holder, Seats};
use crate::driver::sockets::{Owner, Sockets, connect_result};
use crate::handshake::{Handshake, HandshakeError};

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
        /// What the handler gave with it.
        stamp: u64,
    },
}

/// A tunnel that came in, with its proved peer.
#[derive(Debug)]
pub struct Incoming {
    /// Its name in the engine.
    pub tunnel: TunnelId,
    /// The listener the connection came in by.
    pub tag: ListenerTag,
    /// What the handler gave to [`Ops::accept_tunnel`].
    pub stamp: u64,
    /// What the peer proved itself by.
    pub peer: PeerCertificate,
    /// The addresses.
    pub ends: Ends,
}

/// As whom an accepted connection is answered.
#[derive(Clone, Debug)]
pub struct Answering {
    /// The listener the connection came in by.
    pub tag: ListenerTag,
    /// The pod that was dialled.
    pub pod: PodUid,
    /// Given back with the outcome: the handler's name for what `config` was made of.
    pub stamp: u64,
    /// The pod's certificate, and whom to trust.
    pub config: Arc<ServerConfig>,
}

/// What became of a handshake; waits for the handler to be told.
#[derive(Debug)]
pub(super) enum Outcome {
    Dialled { dial: DialId, tunnel: Option<TunnelId>, peer: PeerCertificate },
    Accepted(Incoming),
    Failed { attempt: Attempt, relays: Vec<RelayId>, error: HandshakeError },
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
    /// True once the peer has sent something.
    heard: bool,
    deadline: Instant,
}

#[derive(Debug)]
pub(super) struct Listener {
    pub(super) tag: ListenerTag,
    pub(super) listener: TcpListener,
    /// Already in the queue of listeners to accept from.
    pub(super) queued: bool,
    /// Not accepted from at present.
    pub(super) held: bool,
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
    /// The worker is to be written down at the end of the turn.
    pub(super) write_down: bool,
    pub(super) engine_config: EngineConfig,
    pub(super) now: Instant,
    next_listener: u32,
    in_flight: BTreeMap<SockId, InFlight>,
    deadlines: BTreeSet<(Instant, SockId)>,
    registry: Registry,
    budget: Arc<DescriptorBudget>,
    accepting: Seats,
    dialling: Seats,
    handshake_timeout: Duration,
    first_word_timeout: Duration,
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
            write_down: false,
            engine_config: config.engine.clone(),
            now,
            next_listener: 0,
            in_flight: BTreeMap::new(),
            deadlines: BTreeSet::new(),
            registry: registry.try_clone()?,
            budget: Arc::clone(&config.budget),
            accepting: Seats::new(config.max_accepting),
            dialling: Seats::new(config.max_dialling),
            handshake_timeout: config.handshake_timeout,
            first_word_timeout: config.first_word_timeout,
        })
    }

    /// One turn of the engine. Not generic, so that the engine's code for these sockets is made in this crate, at the
    /// level of optimisation that the workspace has for it, and not in that of whoever writes the handler.
    pub(super) fn engine_turn(&mut self) -> bool {
        self.engine.turn(&mut self.sockets, self.now)
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

    /// Handshakes in flight of those that peers began.
    #[must_use]
    pub fn accepting(&self) -> usize {
        self.accepting.len()
    }

    /// True when `more` sockets fit under the descriptor limit, and memory is not short.
    #[must_use]
    pub fn has_room(&self, more: u64) -> bool {
        self.budget.has_room(more)
    }

    /// Flows that one pod may have open before it is refused more, for the sake of the others.
    #[must_use]
    pub fn pod_share(&self) -> usize {
        self.budget.pod_share()
    }

    /// Whether nothing is admitted for want of memory.
    #[must_use]
    pub fn memory_is_short(&self) -> bool {
        self.budget.memory_is_short()
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
        self.budget.take();
        self.listeners.insert(id, Listener { tag, listener, queued: false, held: false });
        Ok(ListenerId(id))
    }

    /// Closes a listener; connections in its queue are reset by the kernel.
    pub fn remove_listener(&mut self, id: ListenerId) {
        if self.listeners.remove(&id.0).is_some() {
            self.budget.give_back();
        }
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

    /// Begins the TLS handshake of a dial of `pod` to `target` over `stream`, which may still be connecting.
    ///
    /// The engine learns the outcome; the handler hears `dialled` or `handshake_failed`.
    pub fn dial(
        &mut self,
        dial: DialId,
        (pod, target): (PodUid, SocketAddr),
        stream: io::Result<TcpStream>,
        config: Arc<ClientConfig>,
    ) {
        let attempt = Attempt::Dial(dial);
        let holder = Holder { pod, address: target.ip() };
        let begun = stream
            .map_err(HandshakeError::Connect)
            .and_then(|stream| Ok((stream, Handshake::client(config)?)))
            .and_then(|(stream, handshake)| {
                if !self.budget.has_room(1) {
                    return Err(HandshakeError::Overloaded);
                }
                let admission = self.dialling.admit(&holder);
                self.make_room(admission)?;
                let sock = self
                    .sockets
                    .insert(stream, Owner::Handshake)
                    .map_err(HandshakeError::Connect)?;
                Ok((sock, handshake))
            });
        match begun {
            Ok((sock, handshake)) => {
                self.dialling.take(sock, holder);
                self.begin(sock, handshake, attempt, None);
            }
            Err(error) => self.fail(attempt, error),
        }
    }

    /// Ends a dial before it begins.
    pub fn dial_failed(&mut self, dial: DialId, error: HandshakeError) {
        self.fail(Attempt::Dial(dial), error);
    }

    /// Begins the TLS handshake of an accepted connection, which will be a tunnel to a pod.
    ///
    /// The handler hears `tunnel_up` or `handshake_failed`.
    pub fn accept_tunnel(
        &mut self,
        sock: SockId,
        peer: SocketAddr,
        Answering { tag, pod, stamp, config }: Answering,
    ) {
        let attempt = Attempt::Accept { tag, peer, stamp };
        let holder = Holder { pod: pod.clone(), address: peer.ip() };
        let admission = self.accepting.admit(&holder);
        match self.make_room(admission).and_then(|()| Handshake::server(config)) {
            Ok(handshake) => {
                self.sockets.set_owner(sock, Owner::Handshake);
                self.accepting.take(sock, holder);
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

    /// Does what an admission asks for.
    fn make_room(&mut self, admission: Admission) -> Result<(), HandshakeError> {
        match admission {
            Admission::Free => Ok(()),
            Admission::Instead(other) => {
                self.reset_attempt(other, HandshakeError::Evicted);
                Ok(())
            }
            Admission::Refused => Err(HandshakeError::Overloaded),
        }
    }

    fn begin(&mut self, sock: SockId, handshake: Handshake, attempt: Attempt, pod: Option<PodUid>) {
        let connecting = pod.is_none();
        // A dial waits for TCP first, and for a peer that may be busy.
        let patience = if connecting { self.handshake_timeout } else { self.first_word_timeout };
        let deadline = self.now + patience;
        self.deadlines.insert((deadline, sock));
        let heard = false;
        let in_flight = InFlight { handshake, attempt, pod, connecting, heard, deadline };
        self.in_flight.insert(sock, in_flight);
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
            Ok(Poll::Pending) => self.note_progress(sock),
            Ok(Poll::Ready(finished)) => self.finish(sock, finished),
            Err(error) => self.drop_attempt(sock, error),
        }
    }

    /// The first word of an accepted peer earns it the time that a whole handshake may take.
    fn note_progress(&mut self, sock: SockId) {
        let Some(in_flight) = self.in_flight.get_mut(&sock) else { return };
        if in_flight.heard || !in_flight.handshake.has_heard() {
            return;
        }
        in_flight.heard = true;
        match in_flight.attempt {
            Attempt::Dial(_) => self.dialling.heard(sock),
            Attempt::Accept { .. } => {
                let more = self.handshake_timeout.saturating_sub(self.first_word_timeout);
                self.deadlines.remove(&(in_flight.deadline, sock));
                in_flight.deadline += more;
                self.deadlines.insert((in_flight.deadline, sock));
                self.accepting.heard(sock);
            }
        }
    }

    fn finish(&mut self, sock: SockId, finished: crate::handshake::Finished) {
        let Some(in_flight) = self.forget(sock) else { return };
        let InFlight { handshake, attempt, pod, .. } = in_flight;
        let established = match handshake.establish(finished) {
            Ok(established) => established,
            Err(error) => {
                self.abort(sock);
                return self.fail(attempt, error);
            }
        };
        let peer = established.peer;
        match (attempt, pod) {
            (Attempt::Accept { tag, stamp, .. }, Some(pod)) => {
                let Some(ends) = self.ends(sock) else {
                    self.abort(sock);
                    return self.fail(attempt, HandshakeError::Closed);
                };
                let session = established.session;
                let tunnel = self.engine.add_server_tunnel(pod, session, sock, self.now);
                let incoming = Incoming { tunnel, tag, stamp, peer, ends };
                self.outcomes.push_back(Outcome::Accepted(incoming));
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
        match in_flight.attempt {
            Attempt::Dial(_) => self.dialling.leave(sock),
            Attempt::Accept { .. } => self.accepting.leave(sock),
        }
        Some(in_flight)
    }

    fn drop_attempt(&mut self, sock: SockId, error: HandshakeError) {
        if let Some(in_flight) = self.forget(sock) {
            // An orderly close, so that an alert on its way still reaches the peer.
            mesh_tunnel::Io::close(&mut self.sockets, sock);
            self.fail(in_flight.attempt, error);
        }
    }

    /// As [`drop_attempt`](Self::drop_attempt), for peers that have nothing to hear: the kernel keeps nothing of them.
    fn reset_attempt(&mut self, sock: SockId, error: HandshakeError) {
        if let Some(in_flight) = self.forget(sock) {
            self.abort(sock);
            self.fail(in_flight.attempt, error);
        }
    }

    fn fail(&mut self, attempt: Attempt, error: HandshakeError) {
        let relays = match attempt {
            Attempt::Dial(dial) => self.engine.dial_failed(dial, error.close_reason(), self.now),
            Attempt::Accept { .. } => Vec::new(),
        };
        self.outcomes.push_back(Outcome::Failed { attempt, relays, error });
    }

    /// Ends the handshakes that took too long.
    pub(super) fn expire_handshakes(&mut self) {
        while let Some(&(deadline, sock)) = self.deadlines.first()
            && deadline <= self.now
        {
            self.deadlines.pop_first();
            let Some(in_flight) = self.in_flight.get(&sock) else { continue };
            let error = match in_flight.attempt {
                Attempt::Accept { .. } if !in_flight.heard => HandshakeError::Silent,
                Attempt::Accept { .. } | Attempt::Dial(_) => {
                    HandshakeError::TimedOut { connecting: in_flight.connecting }
                }
            };
            self.reset_attempt(sock, error);
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

    /// Ends every handshake that a peer has begun.
    pub fn end_accepting(&mut self) {
        for sock in self.accepted_handshakes(|_| true) {
            self.drop_attempt(sock, HandshakeError::TimedOut { connecting: false });
        }
    }

    /// Takes back the sockets of handshakes that peers are to begin, of which no byte was read: they can be begun anew.
    pub fn take_untouched(&mut self) -> Vec<(SockId, ListenerTag, Ends)> {
        let mut taken = Vec::new();
        for sock in self.accepted_handshakes(Handshake::is_untouched) {
            let Some(InFlight { attempt, .. }) = self.forget(sock) else { continue };
            self.sockets.set_owner(sock, Owner::Parked);
            match (attempt, self.ends(sock)) {
                (Attempt::Accept { tag, .. }, Some(ends)) => taken.push((sock, tag, ends)),
                // Its peer has gone.
                (attempt, _) => {
                    self.abort(sock);
                    self.fail(attempt, HandshakeError::Closed);
                }
            }
        }
        taken
    }

    fn accepted_handshakes(&self, which: impl Fn(&Handshake) -> bool) -> Vec<SockId> {
        let accepted = |in_flight: &InFlight| matches!(in_flight.attempt, Attempt::Accept { .. });
        self.in_flight
            .iter()
            .filter(|(_, in_flight)| accepted(in_flight) && which(&in_flight.handshake))
            .map(|(sock, _)| *sock)
            .collect()
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
