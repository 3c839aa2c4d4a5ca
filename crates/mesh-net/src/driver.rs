//! The thin epoll driver of the tunnel engine: one thread per core, each with its own engine and sockets.
//!
//! A [`Handler`] decides, the engine moves bytes, the worker carries readiness and time between them. A stream and its
//! tunnel never change threads. Other threads reach a worker through its bounded command queue ([`WorkerHandle`]).

mod accept;
pub mod budget;
pub mod handover;
pub mod ops;
mod seats;
mod sockets;

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, TryRecvError, TrySendError, sync_channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use mesh_identity::PeerCertificate;
use mesh_model::CloseReason;
use mesh_tunnel::{
    ConnectHead, DialId, EngineConfig, EngineEvent, Readiness, RelayBytes, RelayId, RequestId,
    SockId, TunnelId, TunnelKey,
};
use mio::event::Event;
use mio::{Events, Poll, Token, Waker};

use crate::handshake::{FIRST_WORD_TIMEOUT, HANDSHAKE_TIMEOUT, HandshakeError};
use accept::Spares;
use budget::DescriptorBudget;
use handover::WrittenWorker;
use ops::{Attempt, Ends, Incoming, LISTENER_BIT, ListenerId, ListenerTag, Ops, Outcome};
use sockets::Owner;

/// Decides what a worker does. All calls come from the worker's own thread; none may wait.
pub trait Handler: 'static {
    /// What other threads may ask of it.
    type Command: Send + 'static;

    /// A connection came in. The handler owns `sock` until it gives it to the engine, to a handshake, or aborts it.
    fn accepted(&mut self, ops: &mut Ops, tag: ListenerTag, sock: SockId, ends: Ends);
    /// A connection was accepted and reset, because there are no descriptors left.
    fn shed(&mut self, ops: &mut Ops, tag: ListenerTag, peer: SocketAddr);
    /// A listener listens no more and is removed: somebody in its namespace ended it (`SOCK_DESTROY`, with `CAP_NET_ADMIN`).
    fn listener_ended(&mut self, ops: &mut Ops, id: ListenerId, tag: ListenerTag);
    /// The pool wants a tunnel: answer with [`Ops::dial`] or [`Ops::dial_failed`], now or later.
    fn dial(&mut self, ops: &mut Ops, dial: DialId, key: &Arc<TunnelKey>);
    /// A dialled tunnel is up; without a `tunnel` nobody wanted it any more.
    fn dialled(
        &mut self,
        ops: &mut Ops,
        dial: DialId,
        tunnel: Option<TunnelId>,
        peer: PeerCertificate,
    );
    /// A tunnel came in and its peer is proved.
    fn tunnel_up(&mut self, ops: &mut Ops, incoming: Incoming);
    /// A handshake came to nothing. For a dial the engine has been told already, and `relays` end with it: each of them is
    /// told as [`closed`](Self::closed) later.
    fn handshake_failed(
        &mut self,
        ops: &mut Ops,
        attempt: Attempt,
        relays: &[RelayId],
        error: &HandshakeError,
    );
    /// A CONNECT came in: answer with `engine.accept` or `engine.refuse`, now or later.
    fn request(&mut self, ops: &mut Ops, request: RequestId, tunnel: TunnelId, head: &ConnectHead);
    /// A CONNECT that has not been answered ended.
    fn request_gone(&mut self, ops: &mut Ops, request: RequestId);
    /// Both ends of a relay are connected; `baggage` is the far end's description of itself, if it sent one.
    fn established(&mut self, ops: &mut Ops, relay: RelayId, baggage: Option<String>);
    /// A relay ended; its sockets are closed. `connect_error` is why a socket of it did not connect, if that is the reason.
    fn closed(
        &mut self,
        ops: &mut Ops,
        relay: RelayId,
        reason: CloseReason,
        connect_error: Option<io::Error>,
        bytes: RelayBytes,
    );
    /// A tunnel ended.
    fn tunnel_closed(&mut self, ops: &mut Ops, tunnel: TunnelId, reason: CloseReason);
    /// Another thread asks for something.
    fn command(&mut self, ops: &mut Ops, command: Self::Command);
    /// [`WorkerHandle::poke`] was called since the last turn, once or often.
    fn poked(&mut self, ops: &mut Ops);
    /// The time of [`poll_timeout`](Self::poll_timeout) has come.
    fn tick(&mut self, ops: &mut Ops);
    /// The worker was written down, as [`Ops::write_down_soon`] asked; nothing has a turn before this returns.
    ///
    /// The one callback that may wait: for what the successor says. It ends by [`Ops::abandon`] or [`Ops::reset_all`], or,
    /// if it is certain that the successor never will go on, by leaving everything as it is.
    fn written(&mut self, ops: &mut Ops, written: io::Result<WrittenWorker>);
    /// When [`tick`](Self::tick) is due. A time that has passed means: as soon as the sockets had their turn.
    fn poll_timeout(&self) -> Option<Instant>;
}

/// Settings of one worker.
#[derive(Clone, Debug)]
pub struct WorkerConfig {
    /// Settings of its engine.
    pub engine: EngineConfig,
    /// Most TLS handshakes in flight of those that peers began; at the bound the pod and the address with most of them
    /// make room. Default 1024.
    pub max_accepting: usize,
    /// Most TLS handshakes in flight of those that pods here need, shared out in the same way. Default 1024.
    pub max_dialling: usize,
    /// How long a handshake may take, dialled or accepted. Default [`HANDSHAKE_TIMEOUT`].
    pub handshake_timeout: Duration,
    /// How long an accepted peer may keep silent before its handshake ends. Default [`FIRST_WORD_TIMEOUT`].
    pub first_word_timeout: Duration,
    /// Descriptors, shared by all workers.
    pub budget: Arc<DescriptorBudget>,
    /// Most commands waiting; further ones are handed back. Default 1024.
    pub max_commands: usize,
}

impl WorkerConfig {
    /// The defaults, with an engine's settings and a shared budget.
    #[must_use]
    pub const fn new(engine: EngineConfig, budget: Arc<DescriptorBudget>) -> Self {
        Self {
            engine,
            max_accepting: 1024,
            max_dialling: 1024,
            handshake_timeout: HANDSHAKE_TIMEOUT,
            first_word_timeout: FIRST_WORD_TIMEOUT,
            budget,
            max_commands: 1024,
        }
    }
}

/// A running worker. Dropping it does not stop the worker; its handler does, by [`Ops::stop`].
#[derive(Debug)]
pub struct WorkerHandle<C> {
    commands: SyncSender<C>,
    waker: Arc<Waker>,
    poked: Arc<AtomicBool>,
    turns: Arc<AtomicU64>,
    thread: JoinHandle<()>,
}

/// A command that did not get through.
#[derive(Debug, thiserror::Error)]
pub enum SendError<C> {
    /// The queue is full; try again in a moment.
    #[error("the worker's command queue is full")]
    Full(C),
    /// The worker has ended.
    #[error("the worker has ended")]
    Ended(C),
}

impl<C: Send + 'static> WorkerHandle<C> {
    /// Queues `command` and wakes the worker. Never waits.
    ///
    /// # Errors
    /// [`SendError`], with the command given back.
    pub fn send(&self, command: C) -> Result<(), SendError<C>> {
        self.commands.try_send(command).map_err(|error| match error {
            TrySendError::Full(command) => SendError::Full(command),
            TrySendError::Disconnected(command) => SendError::Ended(command),
        })?;
        self.wake();
        Ok(())
    }

    /// Makes the worker call [`Handler::poked`]. Never waits, never fails; several pokes may become one.
    pub fn poke(&self) {
        self.poked.store(true, Ordering::Release);
        self.wake();
    }

    /// Turns the worker has begun. A worker that was [nudged](Self::nudge) and does not turn is stuck.
    #[must_use]
    pub fn turns(&self) -> u64 {
        self.turns.load(Ordering::Relaxed)
    }

    /// Makes the worker turn, and nothing else.
    pub fn nudge(&self) {
        self.wake();
    }

    /// True when the worker's thread has ended.
    #[must_use]
    pub fn has_ended(&self) -> bool {
        self.thread.is_finished()
    }

    /// Waits for the worker's thread.
    pub fn join(self) {
        if self.thread.join().is_err() {
            tracing::error!("a worker ended by a panic");
        }
    }

    fn wake(&self) {
        if let Err(error) = self.waker.wake() {
            tracing::error!(%error, "cannot wake a worker");
        }
    }
}

/// Starts a worker on a thread named `name`, at most 15 bytes of which the kernel shows.
///
/// A handler that panics takes the process down: its sockets would hang, and the pins refuse new ones until the agent
/// is back, which is what a crash must look like.
///
/// # Errors
/// For want of descriptors or threads.
pub fn spawn<H: Handler>(
    name: &str,
    config: WorkerConfig,
    make_handler: impl FnOnce() -> H + Send + 'static,
) -> io::Result<WorkerHandle<H::Command>> {
    let poll = Poll::new()?;
    let waker = Arc::new(Waker::new(poll.registry(), WAKER)?);
    let poked = Arc::new(AtomicBool::new(false));
    let turns = Arc::new(AtomicU64::new(0));
    let (commands, inbox) = sync_channel(config.max_commands);
    let ops = Ops::new(&config, poll.registry(), Instant::now())?;
    let spares = Spares::new()?;
    let (flag, count) = (Arc::clone(&poked), Arc::clone(&turns));
    let thread = std::thread::Builder::new().name(name.to_owned()).spawn(move || {
        let _abort = AbortOnPanic;
        let handler = make_handler();
        let (poked, turns, accept_paused) = (flag, count, None);
        Worker { poll, ops, handler, inbox, poked, turns, spares, accept_paused }.run();
    })?;
    Ok(WorkerHandle { commands, waker, poked, turns, thread })
}

struct AbortOnPanic;

impl Drop for AbortOnPanic {
    fn drop(&mut self) {
        if std::thread::panicking() {
            tracing::error!("a worker panicked; the process ends, capture keeps refusing");
            std::process::abort();
        }
    }
}

const WAKER: Token = Token(usize::MAX);
/// Readiness events taken per turn.
const EVENTS_PER_TURN: usize = 1024;
/// Commands taken per turn.
const COMMANDS_PER_TURN: usize = 64;
/// Times the engine and the handler may answer each other before sockets are looked at again.
const ROUNDS_PER_TURN: usize = 8;

struct Worker<H: Handler> {
    poll: Poll,
    ops: Ops,
    handler: H,
    inbox: Receiver<H::Command>,
    poked: Arc<AtomicBool>,
    turns: Arc<AtomicU64>,
    spares: Spares,
    accept_paused: Option<Instant>,
}

impl<H: Handler> Worker<H> {
    fn run(mut self) {
        let mut events = Events::with_capacity(EVENTS_PER_TURN);
        let mut busy = false;
        while !self.ops.stopping {
            let timeout = self.sleep_time(busy);
            if let Err(error) = self.poll.poll(&mut events, timeout)
                && error.kind() != io::ErrorKind::Interrupted
            {
                // Only a bug makes epoll fail: a bad descriptor or a bad pointer.
                panic!("epoll failed: {error}");
            }
            self.ops.now = Instant::now();
            self.turns.fetch_add(1, Ordering::Relaxed);
            for event in &events {
                self.dispatch(event);
            }
            let mut more = self.take_commands();
            if self.poked.swap(false, Ordering::AcqRel) {
                self.handler.poked(&mut self.ops);
            }
            more |= self.accept();
            self.ops.expire_handshakes();
            if self.handler.poll_timeout().is_some_and(|due| due <= self.ops.now) {
                self.handler.tick(&mut self.ops);
            }
            more |= self.turn();
            busy = more;
            if std::mem::take(&mut self.ops.write_down) {
                self.write_down();
                busy = true;
            }
        }
    }

    fn sleep_time(&self, busy: bool) -> Option<Duration> {
        if busy {
            return Some(Duration::ZERO);
        }
        [self.ops.next_deadline(), self.handler.poll_timeout(), self.accept_paused]
            .into_iter()
            .flatten()
            .min()
            .map(|due| round_up(due.saturating_duration_since(Instant::now())))
    }

    fn dispatch(&mut self, event: &Event) {
        let Token(token) = event.token();
        if event.token() == WAKER {
            return;
        }
        if token & LISTENER_BIT != 0 {
            self.queue_listener(token & !LISTENER_BIT);
            return;
        }
        let sock = SockId(token as u64);
        match self.ops.sockets.owner(sock) {
            Some(Owner::Engine) => self.ops.engine.on_event(sock, readiness(event)),
            Some(Owner::Handshake) => {
                self.ops.sockets.note(sock, readiness(event));
                self.ops.advance(sock);
            }
            Some(Owner::Parked) => self.ops.sockets.note(sock, readiness(event)),
            None => {}
        }
    }

    fn queue_listener(&mut self, id: usize) {
        let Ok(id) = u32::try_from(id) else { return };
        if let Some(listener) = self.ops.listeners.get_mut(&id)
            && !std::mem::replace(&mut listener.queued, true)
        {
            self.ops.acceptable.push_back(id);
        }
    }

    /// True when commands may be left.
    fn take_commands(&mut self) -> bool {
        for _ in 0..COMMANDS_PER_TURN {
            match self.inbox.try_recv() {
                Ok(command) => self.handler.command(&mut self.ops, command),
                Err(TryRecvError::Empty | TryRecvError::Disconnected) => return false,
            }
        }
        true
    }

    /// Writes the worker down and hands it to the handler. What the engine has said is heard before and after: it refuses
    /// requests while it is written.
    fn write_down(&mut self) {
        self.answer();
        let written = self.ops.write_worker();
        self.answer();
        // What has waited for the thread is late, not at fault.
        self.handler.written(&mut self.ops, written);
        self.ops.now = Instant::now();
    }

    /// Tells the handler what the engine and handshakes say; true when there was something. What a handshake came to is told
    /// before what the engine makes of it.
    fn answer(&mut self) -> bool {
        let mut answered = false;
        loop {
            if let Some(outcome) = self.ops.outcomes.pop_front() {
                self.outcome(outcome);
            } else if let Some(event) = self.ops.engine.poll_event() {
                self.engine_event(event);
            } else {
                return answered;
            }
            answered = true;
        }
    }

    /// Lets the engine move bytes and the handler answer; true when there is more to do at once.
    fn turn(&mut self) -> bool {
        let mut more = false;
        for _ in 0..ROUNDS_PER_TURN {
            more = self.ops.engine_turn();
            if !self.answer() {
                return more;
            }
            more = true;
        }
        more
    }

    fn outcome(&mut self, outcome: Outcome) {
        let ops = &mut self.ops;
        match outcome {
            Outcome::Dialled { dial, tunnel, peer } => {
                self.handler.dialled(ops, dial, tunnel, peer);
            }
            Outcome::Accepted(incoming) => self.handler.tunnel_up(ops, incoming),
            Outcome::Failed { attempt, relays, error } => {
                self.handler.handshake_failed(ops, attempt, &relays, &error);
            }
        }
    }

    fn engine_event(&mut self, event: EngineEvent) {
        let ops = &mut self.ops;
        match event {
            EngineEvent::Dial { dial, key } => self.handler.dial(ops, dial, &key),
            EngineEvent::Request { request, tunnel, head } => {
                self.handler.request(ops, request, tunnel, &head);
            }
            EngineEvent::RequestGone { request } => self.handler.request_gone(ops, request),
            EngineEvent::Established { relay, baggage } => {
                self.handler.established(ops, relay, baggage);
            }
            EngineEvent::Closed { relay, reason, connect_error, bytes } => {
                let connect_error = connect_error.map(io::Error::from_raw_os_error);
                self.handler.closed(ops, relay, reason, connect_error, bytes);
            }
            EngineEvent::TunnelClosed { tunnel, reason } => {
                self.handler.tunnel_closed(ops, tunnel, reason);
            }
            // The enum may grow; an event without an answer would leave something hanging.
            unknown => tracing::error!(event = ?unknown, "engine event not understood"),
        }
    }
}

/// Up to the next millisecond: epoll counts in them, and a shorter sleep would spin.
fn round_up(sleep: Duration) -> Duration {
    let millis = sleep.as_millis();
    if Duration::from_millis(u64::try_from(millis).unwrap_or(u64::MAX)) == sleep {
        sleep
    } else {
        sleep + Duration::from_millis(1)
    }
}

fn readiness(event: &Event) -> Readiness {
    Readiness {
        readable: event.is_readable(),
        writable: event.is_writable(),
        read_closed: event.is_read_closed(),
        error: event.is_error(),
        urgent: event.is_priority(),
    }
}
