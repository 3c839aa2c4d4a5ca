//! The keeper: a thread that feeds the ledger, carries out its commands in the kernel, and tells what the kernel tells.

mod explain;
mod tables;

use std::collections::VecDeque;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::AsFd as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender};
use std::time::{Duration, Instant};

use mesh_direct::{Bounds, Command, Flow, Input, Judgement, Ledger, Pair, Pod, Refused, Vip};
use mesh_ebpf::{
    Capture, CaptureError, DirectClose, DirectEnd, DirectEvent, DirectFlow, DirectOutcome,
    DirectPair, DirectVip, NetnsCookie, PodSettings, monotonic_now,
};
use mesh_model::{CloseReason, FlowId};
use mesh_net::Netns;
use tokio::sync::oneshot;

use super::answers::{Answers, Bench};
use super::connections::{Connection, Connections, pair, refused};
use super::judge::{Judged, LocalPod, LocalPods};
use super::{DirectExplanation, State, Written};
use crate::dataplane::Drain;
use crate::dataplane::flows::{ConnectionView, ToPod};
use crate::dataplane::rejudge::live_reason;
use crate::dataplane::shared::{PodSockets, Shared};
use crate::error::error_chain;

/// What the keeper is told.
pub(super) enum Message {
    Offer(ToPod),
    Wake,
    Adopt,
    Succeed(Written),
    Settle,
    Captured(Box<(PodSockets, Option<PodSettings>)>),
    Leaves {
        cookie: u64,
        drain: Drain,
        done: Sender<()>,
    },
    /// How many direct connections of the pod are open.
    Count {
        cookie: u64,
        reply: Sender<usize>,
    },
    Freeze(Sender<Written>),
    GoOn,
    End(Sender<()>),
    List(oneshot::Sender<Vec<ConnectionView>>),
    Explain {
        from: String,
        to: String,
        port: u16,
        reply: oneshot::Sender<Option<DirectExplanation>>,
    },
}

/// How far the keeper has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// Nothing was said of predecessors yet, or not all pods are known: nothing is touched.
    Waiting,
    /// It turns.
    Running,
    /// It stands still for a successor.
    Frozen,
}

/// Between two renewals of the lease, a quarter of it.
const RENEW: Duration = Duration::from_millis(500);
/// Between two looks at the queue of events, after one came and otherwise.
const LOOK: Duration = Duration::from_millis(20);
const IDLE_LOOK: Duration = Duration::from_millis(100);
/// So long after the last verdict or connection the queue is still looked at.
const LINGER: Duration = Duration::from_secs(5);
/// How long a pod that has left the mesh is remembered for the sake of connections that go on.
const LONGEST_STAY: Duration = Duration::from_secs(24 * 3600);
/// Events per turn.
const EVENTS: usize = 4096;
/// Between two rounds of judging without a change: clocks go on.
const ROUND: Duration = Duration::from_secs(10);
/// Between two comparisons of connections with the kernel's table.
const COMPARE: Duration = Duration::from_secs(30);
/// Between two looks at the sockets of pods that are captured no more.
const LOOK_AT_LEAVING: Duration = Duration::from_secs(1);
/// How long the last word of a connection may take, once it is cut or closed at its only end that is told of.
const LAST_WORD_PATIENCE: Duration = Duration::from_millis(500);

pub(super) struct Keeper {
    capture: Arc<Capture>,
    shared: Arc<Shared>,
    next_flow: Arc<AtomicU64>,
    state: Arc<State>,
    phase: Phase,
    /// A predecessor's connections, until all pods are known.
    inherited: Option<Written>,
    pods: LocalPods,
    ledger: Ledger,
    connections: Connections,
    answers: Answers,
    /// A pod that is being let go, in whose namespace connections are cut.
    leaving: Option<(u64, Arc<Netns>)>,
    /// Connections that are cut, or closed at one end while the other end's pod is not told of any more: their last word is
    /// waited for.
    ending: VecDeque<(Instant, DirectFlow)>,
    /// What an earlier agent left in the kernel could not be read: nothing is put into force, since that would be, too.
    is_blind: bool,
    renew_at: Instant,
    round_at: Instant,
    compare_at: Instant,
    look_at_leaving: Instant,
    watch_until: Instant,
    event_at: Instant,
    /// Events that the kernel had no room for, when it was asked last.
    lost: u64,
}

impl Keeper {
    pub(super) fn new(
        capture: Arc<Capture>,
        shared: Arc<Shared>,
        next_flow: Arc<AtomicU64>,
        state: Arc<State>,
    ) -> Self {
        let now = Instant::now();
        Self {
            capture,
            shared,
            next_flow,
            state,
            phase: Phase::Waiting,
            inherited: None,
            pods: LocalPods::default(),
            ledger: Ledger::new(Bounds::default()),
            connections: Connections::default(),
            answers: Answers::default(),
            leaving: None,
            ending: VecDeque::new(),
            is_blind: false,
            renew_at: now,
            round_at: now,
            compare_at: now,
            look_at_leaving: now,
            watch_until: now,
            event_at: now,
            lost: 0,
        }
    }

    /// Turns until it is told to end, or nobody is left to tell.
    pub(super) fn keep(mut self, messages: &Receiver<Message>) {
        loop {
            match messages.recv_timeout(self.pause()) {
                Ok(message) => {
                    let mut next = Some(message);
                    while let Some(message) = next {
                        if self.take(message).is_break() {
                            return;
                        }
                        next = messages.try_recv().ok();
                    }
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return,
            }
            if self.phase == Phase::Running {
                self.turn();
            }
        }
    }

    /// How long nothing has to be done.
    fn pause(&self) -> Duration {
        const NOTHING: Duration = Duration::from_secs(3600);
        if self.phase != Phase::Running {
            return NOTHING;
        }
        let now = Instant::now();
        let mut pause = NOTHING;
        if self.is_watching(now) {
            let fresh = now.saturating_duration_since(self.event_at) < Duration::from_secs(1);
            pause = if fresh { LOOK } else { IDLE_LOOK };
        }
        if let Some(due) = self.ledger.next_try() {
            pause = pause.min(due.saturating_sub(monotonic_now()));
        }
        if !self.connections.is_empty() && self.pods.leaving().next().is_some() {
            pause = pause.min(self.look_at_leaving.saturating_duration_since(now));
        }
        if let Some(at) = self.pods.next_leave() {
            pause = pause.min(at.saturating_duration_since(now));
        }
        pause
    }

    fn is_watching(&self, now: Instant) -> bool {
        self.ledger.verdicts() > 0 || !self.connections.is_empty() || now < self.watch_until
    }

    fn take(&mut self, message: Message) -> std::ops::ControlFlow<()> {
        match message {
            Message::Offer(carried) => {
                self.state.offers.fetch_sub(1, Ordering::Relaxed);
                self.offered(&carried);
            }
            Message::Wake => {}
            Message::Adopt => {
                // What nobody could take back meanwhile is not to be trusted.
                if let Err(error) = self.capture.keep_direct_until(Duration::ZERO) {
                    tracing::error!(error = %error_chain(&error), "verdicts of an earlier agent stay in force for a moment");
                }
                self.inherited = None;
            }
            Message::Succeed(written) => self.inherited = Some(written),
            Message::Settle => self.settle(),
            Message::Captured(pod) => {
                let (sockets, settings) = *pod;
                self.pods.insert(LocalPod { sockets, settings, leaves_at: None });
                self.pods_changed();
            }
            Message::Leaves { cookie, drain, done } => {
                match drain {
                    Drain::Now => self.leave(cookie),
                    Drain::Graceful(_) | Drain::WhenOver => {
                        let patience = match drain {
                            Drain::Graceful(patience) => patience,
                            // However long they last; what the kernel has forgotten is dropped when it is compared.
                            Drain::Now | Drain::WhenOver => LONGEST_STAY,
                        };
                        self.pods.leaves(cookie, Instant::now() + patience);
                        self.pods_changed();
                    }
                }
                answer(&done, ());
            }
            Message::Count { cookie, reply } => {
                if self.phase == Phase::Running {
                    self.read_events();
                    answer(&reply, self.connections.count_of(Pod(cookie)));
                }
                // Before all is known, and while a successor decides, nobody can say: no answer.
            }
            Message::Freeze(reply) => {
                if self.phase == Phase::Running {
                    self.read_events();
                    self.phase = Phase::Frozen;
                }
                answer(&reply, Written { connections: self.connections.written() });
            }
            Message::GoOn => {
                if self.phase == Phase::Frozen {
                    self.phase = Phase::Running;
                    self.changed();
                }
            }
            Message::End(done) => {
                if self.phase == Phase::Running {
                    self.read_events();
                    if let Err(error) = self.capture.keep_direct_until(Duration::ZERO) {
                        tracing::warn!(error = %error_chain(&error), "verdicts stay in force for a moment");
                    }
                }
                answer(&done, ());
                return std::ops::ControlFlow::Break(());
            }
            Message::List(reply) => {
                if self.phase == Phase::Running {
                    self.read_events();
                }
                if reply.send(self.connections.views(monotonic_now())).is_err() {
                    tracing::trace!("nobody waits for the direct connections any more");
                }
            }
            Message::Explain { from, to, port, reply } => {
                if reply.send(self.explain(&from, &to, port)).is_err() {
                    tracing::trace!("nobody waits for the explanation any more");
                }
            }
        }
        std::ops::ControlFlow::Continue(())
    }

    fn turn(&mut self) {
        let now = Instant::now();
        if self.ledger.verdicts() > 0 || !self.connections.is_empty() {
            self.watch_until = now + LINGER;
        }
        for cookie in self.pods.left(now) {
            self.leave(cookie);
        }
        let is_due = now >= self.round_at && self.is_watching(now);
        if is_due {
            // Certificates and clocks.
            self.answers.forget();
        }
        if self.state.changed.swap(false, Ordering::AcqRel) || is_due {
            self.changed();
        }
        if self.is_watching(now) {
            self.read_events();
        }
        self.tell(Input::Tick);
        self.end_overdue(now);
        if now >= self.compare_at && !self.connections.is_empty() {
            self.compare(now);
        }
        if now >= self.look_at_leaving && !self.connections.is_empty() {
            self.look_at_leaving(now);
        }
        self.renew(now);
        self.state.verdicts.store(self.ledger.verdicts(), Ordering::Relaxed);
        self.state.vips.store(self.ledger.vips().len(), Ordering::Relaxed);
        self.state.open.store(self.connections.len(), Ordering::Relaxed);
    }

    /// Judges every pair again.
    fn changed(&mut self) {
        self.round_at = Instant::now() + ROUND;
        self.find_untold();
        self.tell(Input::Changed);
    }

    fn pods_changed(&mut self) {
        self.answers.forget_pods();
        if self.phase == Phase::Running {
            self.changed();
        }
    }

    /// Feeds the ledger and carries out what it commands.
    fn tell(&mut self, input: Input) {
        let Self { ledger, answers, shared, state, pods, .. } = self;
        ledger.handle(input, monotonic_now(), Bench { answers, shared, state, pods });
        while let Some(command) = self.ledger.poll_command() {
            let done = match &command {
                Command::Permit(pair) => {
                    let revision = self.shared.snapshot.load().index.revision().0;
                    self.capture.permit_direct(&in_kernel(pair), revision)
                }
                Command::Revoke(pair) => self.capture.revoke_direct(&in_kernel(pair)).map(drop),
                Command::Cut(pair, flow) => self.cut(pair, *flow),
                Command::Spread(vip, pairs) => {
                    let endpoints: Vec<_> = pairs.iter().map(|pair| pair.target).collect();
                    self.capture.spread_direct(&vip_in_kernel(vip), &endpoints)
                }
                Command::Gather(vip) => self.capture.gather_direct(&vip_in_kernel(vip)).map(drop),
            };
            if let Err(error) = done {
                let error = error_chain(&error);
                tracing::warn!(?command, %error, "the kernel refused a command of the direct path");
                self.ledger.refused(Refused(command), monotonic_now());
            }
        }
    }

    fn bench(&mut self) -> Bench<'_> {
        let Self { answers, shared, state, pods, .. } = self;
        Bench { answers, shared, state, pods }
    }

    fn ask(&mut self, pair: &Pair) -> Arc<Judged> {
        self.bench().ask(pair)
    }

    fn renew(&mut self, now: Instant) {
        if self.is_blind || self.ledger.verdicts() == 0 || now < self.renew_at {
            return;
        }
        let Some(until) = self.ledger.lease(monotonic_now()) else { return };
        match self.capture.keep_direct_until(until) {
            Ok(()) => self.renew_at = now + RENEW,
            Err(error) => {
                tracing::warn!(error = %error_chain(&error), "verdicts lapse: the lease cannot be renewed");
            }
        }
    }

    // ---- what others say --------------------------------------------------------------------------------------------

    fn offered(&mut self, carried: &ToPod) {
        if self.phase != Phase::Running {
            return;
        }
        let ToPod { cookie, client: client_address, dialled: target, by_service, .. } = *carried;
        let client = Pod(cookie);
        let before = self.ledger.verdicts();
        if by_service {
            let vip = Vip { client, address: target };
            if let Err(because) = &*self.bench().ask_vip(&vip) {
                tracing::trace!(?vip, %because, "stays with the agent");
            }
            self.tell(Input::OfferedVip(vip));
        } else {
            let Some(server) = self.pods.owner(target.ip()) else { return };
            let pair = Pair { client, client_address, server, target };
            let judged = self.ask(&pair);
            if judged.judgement != Judgement::Grant {
                tracing::trace!(?pair, because = %judged.because, "stays with the agent");
            }
            self.tell(Input::Offered(pair));
        }
        if before == 0 {
            // The lease has lapsed since the last one.
            self.renew_at = Instant::now();
            self.renew(Instant::now());
        }
    }

    /// Everything that an earlier process left in the kernel is judged.
    fn settle(&mut self) {
        if self.phase != Phase::Waiting {
            return;
        }
        self.phase = Phase::Running;
        let inherited = self.inherited.take().unwrap_or_default();
        for (flow, connection) in
            inherited.connections.into_iter().map(super::WrittenConnection::read)
        {
            let pair = connection.pair;
            if connection.cut.is_some() {
                self.ending.push_back((Instant::now() + LAST_WORD_PATIENCE, flow));
            }
            self.connections.opened(flow, connection, true, &*self.shared.flows);
            self.tell(Input::Opened(pair, Flow(flow.client)));
        }
        self.watch_until = Instant::now() + LINGER;
        match self.capture.direct_flows() {
            Ok(flows) => {
                for (flow, NetnsCookie(client)) in flows {
                    if !self.connections.contains(&flow) {
                        let server = self.pods.owner(flow.target.ip()).unwrap_or(NOBODY);
                        self.found(flow, pair(&flow, Pod(client), server), monotonic_now(), true);
                    }
                }
            }
            Err(error) => {
                tracing::error!(error = %error_chain(&error), "direct connections of an earlier agent are not known")
            }
        }
        // Those whose client's pod is captured no more are known at their server alone.
        match self.capture.direct_ends() {
            Ok(ends) => self.find(ends),
            Err(error) => {
                tracing::error!(error = %error_chain(&error), "direct connections of an earlier agent are not known")
            }
        }
        match self.capture.direct_pairs() {
            Ok(pairs) => {
                for (pair, _revision) in pairs {
                    self.tell(Input::Adopted(in_ledger(&pair)));
                }
                self.adopt_vips();
            }
            Err(error) => {
                self.is_blind = true;
                tracing::error!(error = %error_chain(&error), "no direct path: verdicts of an earlier agent are not known")
            }
        }
        tracing::info!(
            verdicts = self.ledger.verdicts(), virtual_addresses = self.ledger.vips().len(),
            connections = self.connections.len(),
            same_node = ?self.state.in_effect(), "the direct path is kept"
        );
    }

    /// Virtual addresses that an earlier process left are judged, once its verdicts have been.
    fn adopt_vips(&mut self) {
        let vips = match self.capture.direct_vips() {
            Ok(vips) => vips,
            Err(error) => {
                self.is_blind = true;
                tracing::error!(error = %error_chain(&error), "no direct path: services on that of an earlier agent are not known");
                return;
            }
        };
        for (DirectVip { client: NetnsCookie(client), vip: address }, endpoints) in vips {
            let client = Pod(client);
            let own = self.address_towards(client, address.ip());
            // Of a client that is not here it only has to differ from what is judged.
            let client_address = own.unwrap_or_else(|| address.ip());
            let pair = |target: SocketAddr| {
                let server = self.pods.owner(target.ip()).unwrap_or(NOBODY);
                Pair { client, client_address, server, target }
            };
            let pairs = endpoints.into_iter().map(pair).collect();
            self.tell(Input::AdoptedVip(Vip { client, address }, pairs));
        }
    }

    /// The address of a pod by which it dials `target`.
    fn address_towards(&self, pod: Pod, target: IpAddr) -> Option<IpAddr> {
        let addresses = &self.pods.get(pod)?.sockets.addresses;
        addresses.iter().copied().find(|own| own.is_ipv4() == target.is_ipv4())
    }

    /// A pod is gone: its verdicts and connections go.
    fn leave(&mut self, cookie: u64) {
        // While its namespace is known: connections are cut in it.
        let Some(pod) = self.pods.remove(cookie) else { return };
        self.answers.forget_pods();
        let gone = Arc::clone(&pod.sockets.netns);
        self.leaving = Some((cookie, gone));
        self.pods_changed();
        if self.phase == Phase::Running {
            self.read_events();
        }
        self.leaving = None;
    }

    // ---- what the kernel says ---------------------------------------------------------------------------------------

    fn read_events(&mut self) {
        let mut was_crowded = false;
        loop {
            let events = match self.capture.direct_events(EVENTS) {
                Ok(events) => events,
                Err(error) => {
                    return tracing::warn!(error = %error_chain(&error), "direct connections are not told of");
                }
            };
            let was_full = events.len() >= EVENTS;
            if !events.is_empty() {
                self.event_at = Instant::now();
            }
            for event in events {
                self.happened(event);
            }
            was_crowded |= was_full;
            if !was_full {
                break;
            }
        }
        if was_crowded {
            self.find_untold();
        }
    }

    fn happened(&mut self, event: DirectEvent) {
        let DirectEvent { flow, client, server, at, outcome } = event;
        let pod = |cookie: Option<NetnsCookie>, address: IpAddr| match cookie {
            Some(NetnsCookie(cookie)) => Pod(cookie),
            None => self.pods.owner(address).unwrap_or(NOBODY),
        };
        let pair = pair(&flow, pod(client, flow.client.ip()), pod(server, flow.target.ip()));
        match outcome {
            DirectOutcome::Opened => {
                if let Some(known) = self.connections.get_mut(&flow) {
                    if at <= known.opened_at {
                        // Found in the kernel's table, before an earlier agent had heard of it.
                        known.opened_at = at;
                        return;
                    }
                    // The end of an earlier one by the same ports found no room in the queue. What it dialled is
                    // forgotten since this one left.
                    if let Some(earlier) = self.connections.ended(&flow, at, &*self.shared.flows) {
                        self.tell(Input::Closed(earlier.pair, Flow(flow.client)));
                    }
                }
                self.found(flow, pair, at, false);
            }
            DirectOutcome::ClientClosed(close) => {
                self.closed(&flow, pair, DirectEnd::Client, close, at)
            }
            DirectOutcome::ServerClosed(close) => {
                self.closed(&flow, pair, DirectEnd::Server, close, at)
            }
        }
    }

    /// A connection is open.
    fn found(&mut self, flow: DirectFlow, pair: Pair, at: Duration, taken_over: bool) {
        let connection = self.connection(&flow, pair, at);
        self.connections.opened(flow, connection, taken_over, &*self.shared.flows);
        self.tell(Input::Opened(pair, Flow(flow.client)));
    }

    fn connection(&mut self, flow: &DirectFlow, pair: Pair, opened_at: Duration) -> Connection {
        let judged = self.ask(&pair);
        let vip = self.capture.dialled(flow).unwrap_or_else(|error| {
            tracing::warn!(error = %error_chain(&error), ?flow, "which service a direct connection dialled is not known");
            None
        });
        let sides = match vip {
            Some(vip) => self.bench().sides(&pair, vip),
            None => Arc::clone(&judged.sides),
        };
        let first = self.next_flow.fetch_add(2, Ordering::Relaxed);
        Connection {
            pair,
            vip,
            ids: [FlowId(first), FlowId(first + 1)],
            opened_at,
            sides,
            rule: judged.rule.clone(),
            client: None,
            server: None,
            first: None,
            cut: None,
            missed: 0,
            announced: [false; 2],
        }
    }

    fn closed(
        &mut self,
        flow: &DirectFlow,
        pair: Pair,
        end: DirectEnd,
        close: DirectClose,
        at: Duration,
    ) {
        if !self.connections.contains(flow) {
            let untouched = !close.orderly && close.sent_octets == 0;
            if end == DirectEnd::Client && untouched {
                let mut connection = self.connection(flow, pair, at);
                connection.cut = Some((CloseReason::ConnectRefused, None));
                refused(&connection, flow, at, &*self.shared.flows);
                return self.forget_dialled(&connection, flow, at);
            }
            // It was opened before an earlier agent died, which has told of it.
            self.found(*flow, pair, at, true);
        }
        let Some(connection) = self.connections.get_mut(flow) else { return };
        if connection.closed(end, close) {
            self.ended(flow, at);
        } else if self.pods.has_left(&connection.pair) {
            self.ending.push_back((Instant::now() + LAST_WORD_PATIENCE, *flow));
        }
    }

    fn ended(&mut self, flow: &DirectFlow, at: Duration) {
        if let Some(ended) = self.connections.ended(flow, at, &*self.shared.flows) {
            self.forget_dialled(&ended, flow, at);
            self.tell(Input::Closed(ended.pair, Flow(flow.client)));
        }
    }

    fn forget_dialled(&self, ended: &Connection, flow: &DirectFlow, at: Duration) {
        if ended.vip.is_some()
            && let Err(error) = self.capture.forget_dialled(flow, at)
        {
            // Until it is looked for among what is over.
            tracing::warn!(error = %error_chain(&error), ?flow, "which service was dialled stays noted");
        }
    }

    /// Ends a connection by force. The kernel tells of both sockets' ends, which brings the record.
    fn cut(&mut self, pair: &Pair, Flow(client): Flow) -> Result<(), CaptureError> {
        let flow = DirectFlow { client, target: pair.target };
        let judged = self.ask(pair);
        let leaving = self.leaving.clone();
        let netns = |pod: Pod| {
            let gone = leaving.as_ref().filter(|(cookie, _)| *cookie == pod.0);
            gone.map(|(_, netns)| Arc::clone(netns))
                .or_else(|| self.pods.get(pod).map(|pod| Arc::clone(&pod.sockets.netns)))
        };
        let (of_client, of_server) = (netns(pair.client), netns(pair.server));
        self.capture.cut_direct(
            &flow,
            of_client.as_ref().map(|netns| netns.as_fd()),
            of_server.as_ref().map(|netns| netns.as_fd()),
        )?;
        if let Some(connection) = self.connections.get_mut(&flow)
            && connection.cut.is_none()
        {
            let reason = live_reason(judged.reason);
            connection.cut = Some((reason, judged.rule.clone()));
            self.state.cut.fetch_add(1, Ordering::Relaxed);
            self.event_at = Instant::now();
            self.ending.push_back((Instant::now() + LAST_WORD_PATIENCE, flow));
            tracing::debug!(?flow, %reason, because = %judged.because, "a direct connection is cut");
        }
        Ok(())
    }

    /// Records connections whose last word does not come: a pod that is captured no more is not told of.
    fn end_overdue(&mut self, now: Instant) {
        while let Some((_, flow)) = self.ending.front().filter(|(due, _)| *due <= now).copied() {
            self.ending.pop_front();
            let is_over = |one: &mut Connection| one.cut.is_some() || one.has_closed();
            if self.connections.get_mut(&flow).is_some_and(is_over) {
                self.ended(&flow, monotonic_now());
            }
        }
    }
}

/// The pod of an address that is nobody's: never captured, so that all of its connections are cut.
const NOBODY: Pod = Pod(0);

fn answer<T>(to: &Sender<T>, with: T) {
    if to.send(with).is_err() {
        tracing::debug!("nobody waits for the direct path any more");
    }
}

const fn in_kernel(pair: &Pair) -> DirectPair {
    DirectPair {
        client: NetnsCookie(pair.client.0),
        server: NetnsCookie(pair.server.0),
        client_address: pair.client_address,
        target: pair.target,
    }
}

const fn vip_in_kernel(vip: &Vip) -> DirectVip {
    DirectVip { client: NetnsCookie(vip.client.0), vip: vip.address }
}

const fn in_ledger(pair: &DirectPair) -> Pair {
    Pair {
        client: Pod(pair.client.0),
        client_address: pair.client_address,
        server: Pod(pair.server.0),
        target: pair.target,
    }
}
