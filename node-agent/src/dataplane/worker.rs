//! One worker's decisions: what arrives is handed to its direction, what waits is woken, what ends is accounted for.
//!
//! The five stages of a connection are in [`outbound`](super::outbound) and [`inbound`](super::inbound); here is what they
//! share, and the driver's callbacks.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use mesh_authorize::{Denial, RuleRef};
use mesh_identity::PeerCertificate;
use mesh_model::{ClientAddr, CloseReason, Direction, Flow, FlowId, OrigDst, PodUid, splitmix};
use mesh_net::driver::Handler;
use mesh_net::driver::handover::WrittenWorker;
use mesh_net::driver::ops::{Attempt, Ends, Incoming, ListenerId, ListenerTag, Ops};
use mesh_net::handshake::HandshakeError;
use mesh_net::socket::SocketLabel;
use mesh_resolve::{PendingDns, ResolvedFlow, Unroutable};
use mesh_tunnel::{
    ConnectHead, DialId, RelayBytes, RelayId, RequestId, Retire, SockId, TunnelId, TunnelKey,
};
use tokio::sync::oneshot;

use crate::dataplane::crossing::Crossings;
use crate::dataplane::direct::DirectPath;
use crate::dataplane::flows::{ConnectionView, FlowTable, Held};
use crate::dataplane::handover::worker::{Taking, Writing};
use crate::dataplane::inbound::Request;
use crate::dataplane::listeners::ServedListener;
use crate::dataplane::pods::{Pod, PodKey, Port};
use crate::dataplane::rejudge::Rejudge;
use crate::dataplane::shared::{Changed, DataPlaneConfig, Drain, KernelCapture, Shared, Snapshot};
use crate::dataplane::stats::{Stats, TunnelRole};
use crate::dataplane::telemetry::Story;
use crate::dataplane::tls::TlsCache;
use crate::dataplane::tunnels::Tunnels;
use crate::dataplane::waiting::{WaitFor, WaitId, WaitingRoom};
use crate::error::{detail, error_chain};

/// What other threads ask of a worker.
#[derive(Debug)]
pub(super) enum Command {
    /// Know the pod and, if `open`, open its ports.
    AddPod { pod: Arc<Pod>, open: bool, reply: oneshot::Sender<io::Result<()>> },
    /// Close the pod's ports and end its flows; the reply comes when none is left.
    RemovePod { key: PodKey, drain: Drain, reply: oneshot::Sender<()> },
    /// Name the open flows.
    List { reply: oneshot::Sender<Vec<ConnectionView>> },
    /// A host name that a waiting flow needs was resolved.
    Resolved { wait: WaitId, answer: io::Result<Vec<IpAddr>> },
    /// Stop, or begin again, to accept on the tunnel ports.
    HoldTunnelPorts { held: bool },
    /// How many handshakes are under way that peers began.
    Accepting { reply: oneshot::Sender<usize> },
    /// How many sockets there are.
    Sockets { reply: oneshot::Sender<usize> },
    /// Write everything down and stand still.
    WriteDown(Writing),
    /// End the handshakes that peers have begun.
    EndHandshakes,
    /// Take a predecessor over and stand still.
    Take(Box<Taking>),
    /// End the thread.
    Stop,
}

/// Reaches the worker from a resolver's answer.
pub(super) type CommandSender = Arc<dyn Fn(Command) + Send + Sync>;

/// A captured connection: the facts, its socket, and its place among its pod's flows.
#[derive(Debug)]
pub(super) struct CapturedConn {
    pub(super) flow: Flow,
    pub(super) sock: SockId,
    pub(super) pod: Arc<Pod>,
    pub(super) held: Held,
    /// What it has waited for last, and until when it may.
    pub(super) patience: Option<(WaitFor, Instant)>,
}

/// What waits in the waiting room.
#[derive(Debug)]
#[expect(clippy::large_enum_variant, reason = "the large ones are the common ones")]
pub(super) enum Waiting {
    /// A connection of a pod, or a plaintext one to it.
    Conn(CapturedConn),
    /// A connection of a pod that is resolved but for a host name.
    Name { conn: CapturedConn, pending: Box<PendingDns> },
    /// A connection to the tunnel port, before its handshake.
    Handshake { pod: Arc<Pod>, sock: SockId, ends: Ends, deadline: Instant },
    /// A CONNECT.
    Request(Request),
}

/// A pod, as this worker serves it.
#[derive(Debug)]
pub(super) struct ServedPod {
    pub(super) pod: Arc<Pod>,
    pub(super) listeners: Vec<ServedListener>,
}

/// A pod that is served no more but has flows left.
#[derive(Debug)]
struct Leaving {
    /// When its flows are cut; none for one that lives on outside the mesh.
    deadline: Option<Instant>,
    replies: Vec<oneshot::Sender<()>>,
}

/// The handler of one worker.
pub(super) struct NodeWorker {
    pub(super) config: DataPlaneConfig,
    pub(super) shared: Arc<Shared>,
    pub(super) capture: Arc<dyn KernelCapture>,
    pub(super) label: AgentLabel,
    pub(super) stats: Arc<Stats>,
    pub(super) flows: FlowTable,
    pub(super) tunnels: Tunnels,
    pub(super) crossings: Crossings,
    pub(super) tls: TlsCache,
    pub(super) rejudge: Rejudge,
    pub(super) to_self: CommandSender,
    pub(super) slot: u16,
    pub(super) pods: BTreeMap<PodKey, ServedPod>,
    pods_by_uid: BTreeMap<PodUid, PodKey>,
    /// Addresses of the pods served here, and how many pods have each: one may leave while its successor is there.
    pod_addresses: BTreeMap<IpAddr, usize>,
    leaving: BTreeMap<PodKey, Leaving>,
    waiting: WaitingRoom<Waiting>,
    /// Who waits for this worker to be written down.
    pub(super) writing: Option<Writing>,
    /// What has waited at a predecessor, until this worker goes on.
    pub(super) handed_waiting: Vec<Waiting>,
    /// No handshake is begun: this worker is about to be written down.
    pub(super) holds_handshakes: bool,
    changed: Arc<AtomicU8>,
    next_flow: Arc<AtomicU64>,
    pub(super) direct: DirectPath,
    entropy: u64,
    next_report: Instant,
    /// When the ends of the tunnels' certificates are looked at.
    pub(super) look_at_ends: Option<Instant>,
    /// Listeners that were ended from inside their pods, with their places in the kernel's table.
    pub(super) ended_listeners: BTreeSet<(PodKey, Port, u16)>,
    /// When they are opened again.
    pub(super) reopen_at: Option<Instant>,
}

/// How often the byte counts of open flows are reported.
const REPORT_INTERVAL: Duration = Duration::from_secs(5);

/// Why a connection is refused that descriptors were left for.
pub(super) const MEMORY_IS_SHORT: &str = "the agent's memory is short";

/// How long flows of a pod that lives on may go on after a hand-over, unless the successor says better.
const HANDED_PATIENCE: Duration = Duration::from_secs(24 * 3600);

/// What a worker is made of.
pub(super) struct WorkerParts {
    pub(super) config: DataPlaneConfig,
    pub(super) shared: Arc<Shared>,
    pub(super) capture: Arc<dyn KernelCapture>,
    pub(super) stats: Arc<Stats>,
    pub(super) changed: Arc<AtomicU8>,
    pub(super) next_flow: Arc<AtomicU64>,
    pub(super) direct: DirectPath,
    pub(super) to_self: CommandSender,
    /// Its number.
    pub(super) slot: u16,
    pub(super) seed: u64,
}

impl NodeWorker {
    pub(super) fn new(parts: WorkerParts) -> Self {
        let WorkerParts {
            config,
            shared,
            capture,
            stats,
            changed,
            next_flow,
            direct,
            to_self,
            slot,
            seed,
        } = parts;
        Self {
            label: AgentLabel(Arc::clone(&capture)),
            flows: FlowTable::new(Arc::clone(&shared.flows)),
            tunnels: Tunnels::default(),
            crossings: Crossings::default(),
            tls: TlsCache::default(),
            rejudge: Rejudge::default(),
            pods: BTreeMap::new(),
            pods_by_uid: BTreeMap::new(),
            pod_addresses: BTreeMap::new(),
            leaving: BTreeMap::new(),
            waiting: WaitingRoom::new(config.limits.waiting),
            writing: None,
            handed_waiting: Vec::new(),
            holds_handshakes: false,
            entropy: seed | 1,
            next_report: Instant::now() + REPORT_INTERVAL,
            look_at_ends: None,
            ended_listeners: BTreeSet::new(),
            reopen_at: None,
            config,
            shared,
            capture,
            stats,
            changed,
            next_flow,
            direct,
            to_self,
            slot,
        }
    }

    pub(super) fn snapshot(&self) -> Arc<Snapshot> {
        self.shared.snapshot.load_full()
    }

    /// Random bits for load balancing and trace ids; nothing secret hangs on them.
    pub(super) const fn entropy(&mut self) -> u64 {
        splitmix::next(&mut self.entropy)
    }

    pub(super) fn flow(
        &self,
        ops: &Ops,
        pod: &Pod,
        direction: Direction,
        client: SocketAddr,
        orig_dst: SocketAddr,
    ) -> Flow {
        Flow {
            id: FlowId(self.next_flow.fetch_add(1, Ordering::Relaxed)),
            direction,
            client: ClientAddr::new(client),
            orig_dst: OrigDst::new(orig_dst),
            pod: pod.sockets.uid.clone(),
            accepted_at: ops.now(),
        }
    }

    pub(super) fn pod(&self, key: PodKey) -> Option<&Arc<Pod>> {
        self.pods.get(&key).map(|served| &served.pod)
    }

    /// The pod of a tunnel's key.
    pub(super) fn pod_by_uid(&self, uid: &PodUid) -> Option<&Arc<Pod>> {
        self.pod(*self.pods_by_uid.get(uid)?)
    }

    /// Refuses a captured connection: its client is reset, the refusal is recorded.
    pub(super) fn refuse(
        &self,
        ops: &mut Ops,
        conn: CapturedConn,
        resolved: Option<ResolvedFlow>,
        refusal: Refusal,
    ) {
        ops.abort(conn.sock);
        let story = match conn.flow.direction {
            Direction::Outbound => Story::outbound(conn.flow, resolved, None),
            Direction::InboundPlaintext | Direction::InboundTunnel => {
                Story::plaintext(conn.flow, resolved)
            }
        };
        self.flows.refused(story, refusal, ops.now());
    }

    /// Fails a dial, and says why to the flows that wait for it.
    pub(super) fn fail_dial(&mut self, ops: &mut Ops, dial: DialId, refusal: Refusal) {
        let relays = ops.engine.dial_failed(dial, refusal.reason, ops.now());
        if let Some(detail) = refusal.detail {
            self.explain(&relays, &detail);
        }
    }

    /// Says in words why relays are about to end.
    pub(super) fn explain(&mut self, relays: &[RelayId], detail: &Arc<str>) {
        for relay in relays {
            if !self.crossings.explain(*relay, detail) {
                self.flows.explain(*relay, detail);
            }
        }
    }

    /// Lets something wait; what finds no room, or has waited long enough, is refused.
    pub(super) fn park(&mut self, ops: &mut Ops, conn: CapturedConn, wait_for: WaitFor) {
        let mut conn = conn;
        let deadline = match conn.patience {
            Some((cause, deadline)) if cause == wait_for => deadline,
            _ => ops.now() + self.patience(wait_for),
        };
        conn.patience = Some((wait_for, deadline));
        let pod = conn.pod.key;
        let parked = self.waiting.park(Waiting::Conn(conn), pod, wait_for, deadline);
        if let Err(Waiting::Conn(conn)) = parked {
            self.refuse(ops, conn, None, CloseReason::Overloaded.into());
        }
    }

    /// As [`park`](Self::park), for what is no captured connection. Gives back what finds no room.
    pub(super) fn park_other(
        &mut self,
        waiting: Waiting,
        wait_for: WaitFor,
        deadline: Instant,
    ) -> Option<Waiting> {
        let pod = waiting.pod_key();
        self.waiting.park(waiting, pod, wait_for, deadline).err()
    }

    /// Takes out all that wait for `wait_for`.
    pub(super) fn take_all_waiting(&mut self, wait_for: WaitFor) -> Vec<Waiting> {
        self.waiting.take_all(wait_for)
    }

    /// Takes something out of the waiting room.
    pub(super) fn take_waiting(&mut self, wait: WaitId) -> Option<Waiting> {
        self.waiting.take(wait)
    }

    /// Takes out the CONNECTs of a tunnel that wait.
    pub(super) fn take_requests(&mut self, tunnel: TunnelId) -> Vec<Request> {
        let of_tunnel =
            |waiting: &Waiting| matches!(waiting, Waiting::Request(r) if r.tunnel == tunnel);
        let taken = self.waiting.take_where(of_tunnel).into_iter();
        taken
            .filter_map(|waiting| match waiting {
                Waiting::Request(request) => Some(request),
                Waiting::Conn(_) | Waiting::Name { .. } | Waiting::Handshake { .. } => None,
            })
            .collect()
    }

    /// The id that the next thing parked will have.
    pub(super) const fn next_wait(&self) -> WaitId {
        self.waiting.next_id()
    }

    pub(super) const fn patience(&self, wait_for: WaitFor) -> Duration {
        match wait_for {
            WaitFor::Policies => self.config.limits.policy_patience,
            WaitFor::Workload => self.config.limits.workload_patience,
            WaitFor::Destination => self.config.limits.destination_patience,
            WaitFor::Certificate => self.config.limits.certificate_patience,
            WaitFor::Name => self.config.limits.resolve_patience,
            // Of handshakes, which have a deadline of their own.
            WaitFor::HandOver => self.config.limits.certificate_patience,
        }
    }

    /// How long a CONNECT waits, for whatever: its deadline is set once.
    pub(super) fn request_patience(&self) -> Duration {
        self.config.limits.workload_patience.max(self.config.limits.policy_patience)
    }

    /// Tries again what waited.
    pub(super) fn resume(&mut self, ops: &mut Ops, waiting: Waiting) {
        match waiting {
            // Its answer is still to come; what it was resolved by may be old, so it begins anew.
            Waiting::Name { conn, .. } => self.outbound(ops, conn),
            Waiting::Conn(conn) => match conn.flow.direction {
                Direction::Outbound => self.outbound(ops, conn),
                Direction::InboundPlaintext | Direction::InboundTunnel => {
                    self.inbound_plaintext(ops, conn);
                }
            },
            Waiting::Handshake { pod, sock, ends, deadline } => {
                self.answer_handshake(ops, &pod, sock, ends, deadline);
            }
            Waiting::Request(request) => self.inbound_request(ops, request),
        }
    }

    /// Refuses what waited in vain, or whose pod leaves.
    pub(super) fn give_up(&self, ops: &mut Ops, waiting: Waiting, reason: CloseReason) {
        match waiting {
            Waiting::Conn(conn) | Waiting::Name { conn, .. } => {
                self.refuse(ops, conn, None, reason.into());
            }
            Waiting::Handshake { sock, .. } => {
                ops.abort(sock);
                self.stats.handshake_failed(TunnelRole::Server, reason);
            }
            Waiting::Request(request) => {
                self.refuse_request(ops, request, None, reason.into());
            }
        }
    }

    fn add_pod(&mut self, ops: &mut Ops, pod: Arc<Pod>, open: bool) -> io::Result<()> {
        let mut served = ServedPod { pod: Arc::clone(&pod), listeners: Vec::new() };
        let opened = if open { self.open_ports(ops, &mut served) } else { Ok(()) };
        if opened.is_ok() {
            self.serve(pod);
            for ServedListener { id, port, slot } in served.listeners {
                self.serve_listener(served.pod.key, id, slot, port);
            }
        } else {
            for listener in served.listeners {
                ops.remove_listener(listener.id);
            }
        }
        opened
    }

    /// Knows a pod from here on.
    pub(super) fn serve(&mut self, pod: Arc<Pod>) {
        self.pods_by_uid.insert(pod.sockets.uid.clone(), pod.key);
        for ip in &pod.sockets.addresses {
            *self.pod_addresses.entry(*ip).or_default() += 1;
        }
        self.pods.insert(pod.key, ServedPod { pod, listeners: Vec::new() });
    }

    /// What waits here.
    pub(super) fn waiting(&self) -> impl Iterator<Item = &Waiting> {
        self.waiting.iter()
    }

    /// Forgets what another process reports, and who waits for pods to leave.
    pub(super) fn forget_flows(&mut self) {
        self.flows.forget();
        self.leaving.clear();
    }

    /// How many flows a pod may have open for one more to be admitted.
    pub(super) fn most_flows(&self, ops: &Ops) -> usize {
        self.config.limits.flows_per_pod.min(ops.pod_share())
    }

    fn remove_pod(&mut self, ops: &mut Ops, key: PodKey, drain: Drain, reply: oneshot::Sender<()>) {
        if !matches!(drain, Drain::Now) {
            self.accept_the_last(ops, key);
        }
        let Some(served) = self.pods.get_mut(&key) else {
            // Never added here, or gone: nothing is left, which is what the caller waits for.
            return answer(reply, ());
        };
        for listener in served.listeners.drain(..) {
            ops.remove_listener(listener.id);
        }
        // A second removal replaces the deadline of the first; both callers are told at the end.
        let deadline = match drain {
            Drain::Now => Some(ops.now()),
            Drain::Graceful(grace) => Some(ops.now() + grace),
            Drain::WhenOver => None,
        };
        served.pod.leaves(deadline.unwrap_or_else(|| ops.now() + HANDED_PATIENCE));
        let leaving =
            self.leaving.entry(key).or_insert_with(|| Leaving { deadline, replies: Vec::new() });
        leaving.deadline = deadline;
        leaving.replies.push(reply);
        let uid = served.pod.sockets.uid.clone();
        ops.abort_handshakes(key.tag(Port::Hbone));
        ops.engine.retire(Retire::Pod(uid), ops.now());
        self.finish_leaving(ops);
    }

    /// Cuts what outstayed its pod, and tells who waits for a pod to be gone.
    fn finish_leaving(&mut self, ops: &mut Ops) {
        if self.leaving.is_empty() {
            return;
        }
        let now = ops.now();
        let gone: Vec<PodKey> = self
            .leaving
            .iter()
            .filter(|(key, leaving)| {
                leaving.deadline.is_some_and(|deadline| deadline <= now)
                    || self.flows.count_of(**key) + self.waiting.count_of(**key) == 0
            })
            .map(|(key, _)| *key)
            .collect();
        for key in gone {
            for waiting in self.waiting.take_where(|waiting| waiting.pod_key() == key) {
                self.give_up(ops, waiting, CloseReason::Drained);
            }
            for relay in self.flows.of_pod(key) {
                ops.engine.cut(relay, CloseReason::Drained, now);
            }
            if let Some(served) = self.pods.remove(&key) {
                for tunnel in self.tunnels.accepted_for(&served.pod) {
                    ops.engine.retire(Retire::Tunnel(tunnel), now);
                }
                self.forget_addresses(&served.pod);
                let uid = &served.pod.sockets.uid;
                // The uid may have been enrolled anew meanwhile, under another key.
                if self.pods_by_uid.get(uid) == Some(&key) {
                    self.pods_by_uid.remove(uid);
                    // What was dialled for its last connections.
                    ops.engine.retire(Retire::Pod(uid.clone()), now);
                }
            }
            for reply in self.leaving.remove(&key).into_iter().flat_map(|leaving| leaving.replies) {
                answer(reply, ());
            }
        }
    }

    fn forget_addresses(&mut self, pod: &Pod) {
        for ip in &pod.sockets.addresses {
            if let Some(count) = self.pod_addresses.get_mut(ip) {
                *count -= 1;
                if *count == 0 {
                    self.pod_addresses.remove(ip);
                }
            }
        }
    }

    /// True for an address of a pod served here, whether or not the index has it.
    pub(super) fn serves(&self, ip: IpAddr) -> bool {
        self.pod_addresses.contains_key(&ip)
    }

    /// Serves the announcements of a changed snapshot.
    fn take_changes(&mut self, ops: &mut Ops) {
        let changed = Changed(self.changed.swap(0, Ordering::AcqRel));
        if changed.has(Changed::POLICIES) {
            for waiting in self.waiting.take_all(WaitFor::Policies) {
                self.resume(ops, waiting);
            }
        }
        if changed.has(Changed::INDEX) {
            for wait_for in [WaitFor::Workload, WaitFor::Destination] {
                for waiting in self.waiting.take_all(wait_for) {
                    self.resume(ops, waiting);
                }
            }
        }
        if changed.has(Changed::IDENTITIES) || changed.has(Changed::TRUST) {
            for waiting in self.waiting.take_all(WaitFor::Certificate) {
                self.resume(ops, waiting);
            }
        }
        if changed != Changed::default() {
            self.begin_rejudging(ops, changed);
        }
    }

    fn report_progress(&mut self, ops: &Ops) {
        self.next_report = ops.now() + REPORT_INTERVAL;
        self.flows.report_progress(|relay| ops.engine.relay_bytes(relay));
    }
}

impl Waiting {
    fn pod_key(&self) -> PodKey {
        match self {
            Self::Conn(conn) | Self::Name { conn, .. } => conn.pod.key,
            Self::Handshake { pod, .. } => pod.key,
            Self::Request(request) => request.pod.key,
        }
    }
}

/// Why a flow is refused, and by which rule.
#[derive(Debug)]
pub(super) struct Refusal {
    pub(super) reason: CloseReason,
    pub(super) rule: Option<RuleRef>,
    /// In words, where the reason does not say it all.
    pub(super) detail: Option<Arc<str>>,
}

impl Refusal {
    /// A refusal that `error` caused.
    pub(super) fn new(reason: CloseReason, error: &dyn std::error::Error) -> Self {
        Self { reason, rule: None, detail: Some(detail(error)) }
    }
}

impl From<CloseReason> for Refusal {
    fn from(reason: CloseReason) -> Self {
        Self { reason, rule: None, detail: None }
    }
}

impl From<&Unroutable> for Refusal {
    fn from(unroutable: &Unroutable) -> Self {
        Self::new(unroutable.close_reason(), unroutable)
    }
}

impl From<Denial> for Refusal {
    fn from(denial: Denial) -> Self {
        let detail = Some(denial.to_string().into());
        Self { reason: denial.reason, rule: denial.rule, detail }
    }
}

/// Answers a caller who may have stopped waiting.
pub(super) fn answer<T>(reply: oneshot::Sender<T>, value: T) {
    if reply.send(value).is_err() {
        tracing::debug!("the caller of a data plane command is gone");
    }
}

/// The kernel capture as a label for sockets.
#[derive(Clone)]
pub(super) struct AgentLabel(Arc<dyn KernelCapture>);

impl SocketLabel for AgentLabel {
    fn label(&self, fd: BorrowedFd<'_>) -> io::Result<()> {
        self.0.label(fd)
    }
}

impl Handler for NodeWorker {
    type Command = Command;

    fn accepted(&mut self, ops: &mut Ops, tag: ListenerTag, sock: SockId, ends: Ends) {
        let (key, port) = PodKey::of(tag);
        let Some(pod) = self.pod(key).map(Arc::clone) else {
            return ops.abort(sock);
        };
        match port {
            Port::Outbound => self.outbound_accepted(ops, pod, sock, ends),
            Port::Plaintext => self.plaintext_accepted(ops, pod, sock, ends),
            Port::Hbone => self.tunnel_accepted(ops, &pod, sock, ends),
        }
    }

    fn shed(&mut self, ops: &mut Ops, tag: ListenerTag, peer: SocketAddr) {
        let (key, port) = PodKey::of(tag);
        let Some(pod) = self.pod(key).map(Arc::clone) else { return };
        self.stats.shed();
        let direction = match port {
            Port::Outbound => Direction::Outbound,
            Port::Plaintext => Direction::InboundPlaintext,
            // Not a flow yet.
            Port::Hbone => {
                return self.stats.handshake_failed(TunnelRole::Server, CloseReason::Overloaded);
            }
        };
        let flow = self.flow(ops, &pod, direction, peer, SocketAddr::new(peer.ip(), 0));
        let story = match direction {
            Direction::Outbound => Story::outbound(flow, None, None),
            Direction::InboundPlaintext | Direction::InboundTunnel => Story::plaintext(flow, None),
        };
        let mut refusal = Refusal::from(CloseReason::Overloaded);
        if ops.memory_is_short() {
            refusal.detail = Some(MEMORY_IS_SHORT.into());
        }
        self.flows.refused(story, refusal, ops.now());
    }

    fn listener_ended(&mut self, ops: &mut Ops, id: ListenerId, tag: ListenerTag) {
        self.note_ended_listener(ops, id, tag);
    }

    fn dial(&mut self, ops: &mut Ops, dial: DialId, key: &Arc<TunnelKey>) {
        self.dial_tunnel(ops, dial, key);
    }

    fn dialled(
        &mut self,
        ops: &mut Ops,
        dial: DialId,
        tunnel: Option<TunnelId>,
        peer: PeerCertificate,
    ) {
        self.tunnel_dialled(ops, dial, tunnel, peer);
    }

    fn tunnel_up(&mut self, ops: &mut Ops, incoming: Incoming) {
        self.tunnel_proved(ops, incoming);
    }

    fn handshake_failed(
        &mut self,
        _ops: &mut Ops,
        attempt: Attempt,
        relays: &[RelayId],
        error: &HandshakeError,
    ) {
        let reason = error.close_reason();
        match attempt {
            Attempt::Dial(dial) => {
                self.stats.handshake_failed(TunnelRole::Client, reason);
                self.explain(relays, &detail(error));
                let key = self.tunnels.dial_failed(dial);
                let next_hop = key.map(|key| key.next_hop);
                tracing::debug!(%reason, ?next_hop, error = %error_chain(error), "tunnel not dialled");
            }
            Attempt::Accept { tag, peer, stamp: _ } => {
                self.stats.handshake_failed(TunnelRole::Server, reason);
                self.tunnel_refused(tag, peer, reason, error)
            }
        }
    }

    fn request(&mut self, ops: &mut Ops, request: RequestId, tunnel: TunnelId, head: &ConnectHead) {
        self.request_came(ops, request, tunnel, head);
    }

    fn request_gone(&mut self, ops: &mut Ops, request: RequestId) {
        let gone = |waiting: &Waiting| matches!(waiting, Waiting::Request(r) if r.id == request);
        for waiting in self.waiting.take_where(gone) {
            // While this worker is written down its requests are refused as not processed: their peers ask again, and whoever
            // answers then writes the line.
            if let Waiting::Request(request) = waiting
                && self.writing.is_none()
            {
                self.record_request(ops, request, None, CloseReason::ClientReset.into());
            }
        }
    }

    fn established(&mut self, ops: &mut Ops, relay: RelayId, baggage: Option<String>) {
        let proved = ops.engine.relay_tunnel(relay).and_then(|tunnel| self.tunnels.peer(tunnel));
        self.flows.established(relay, proved, baggage.as_deref());
        if let Some(carried) = self.flows.to_pod(relay)
            && self.serves(carried.pod_ip)
        {
            self.direct.offer(&carried);
        }
    }

    fn closed(
        &mut self,
        ops: &mut Ops,
        relay: RelayId,
        reason: CloseReason,
        connect_error: Option<io::Error>,
        bytes: RelayBytes,
    ) {
        // The other reasons of a connect say themselves what the system said.
        if reason == CloseReason::ConnectFailed
            && let Some(error) = connect_error
        {
            self.explain(&[relay], &detail(&error));
        }
        if self.carrier_closed(ops, relay, reason) {
            return;
        }
        self.crossing_closed(ops, relay);
        self.flows.closed(relay, reason, bytes, ops.now());
        self.finish_leaving(ops);
    }

    fn tunnel_closed(&mut self, _ops: &mut Ops, tunnel: TunnelId, reason: CloseReason) {
        if let Some(role) = self.tunnels.closed(tunnel) {
            self.stats.tunnel_closed(role, reason);
        }
        tracing::debug!(tunnel = tunnel.get(), %reason, "tunnel ended");
    }

    fn command(&mut self, ops: &mut Ops, command: Command) {
        match command {
            Command::AddPod { pod, open, reply } => {
                answer(reply, self.add_pod(ops, pod, open));
            }
            Command::RemovePod { key, drain, reply } => self.remove_pod(ops, key, drain, reply),
            Command::List { reply } => {
                answer(reply, self.flows.views(|relay| ops.engine.relay_bytes(relay), ops.now()));
            }
            Command::Resolved { wait, answer } => self.name_resolved(ops, wait, answer),
            Command::HoldTunnelPorts { held } => self.hold_tunnel_ports(ops, held),
            Command::Accepting { reply } => answer(reply, ops.accepting()),
            Command::EndHandshakes => ops.end_accepting(),
            Command::Sockets { reply } => answer(reply, ops.sockets()),
            Command::WriteDown(writing) => {
                self.writing = Some(writing);
                ops.write_down_soon();
            }
            Command::Take(taking) => self.take(ops, *taking),
            Command::Stop => ops.stop(),
        }
        self.finish_leaving(ops);
    }

    fn written(&mut self, ops: &mut Ops, written: io::Result<WrittenWorker>) {
        self.hand_on(ops, written);
    }

    fn poked(&mut self, ops: &mut Ops) {
        self.take_changes(ops);
        self.finish_leaving(ops);
    }

    fn tick(&mut self, ops: &mut Ops) {
        while let Some((waiting, wait_for)) = self.waiting.pop_expired(ops.now()) {
            self.give_up(ops, waiting, wait_for.in_vain());
        }
        if self.rejudge.is_pending() {
            self.rejudge_some(ops);
        }
        if self.look_at_ends.is_some_and(|due| due <= ops.now()) {
            self.retire_ended(ops);
        }
        if self.reopen_at.is_some_and(|due| due <= ops.now()) {
            self.reopen_listeners(ops);
        }
        if self.next_report <= ops.now() {
            self.report_progress(ops);
        }
        self.finish_leaving(ops);
    }

    fn poll_timeout(&self) -> Option<Instant> {
        let rejudge = self.rejudge.due();
        let report = (!self.flows.is_empty()).then_some(self.next_report);
        let leaving = self.leaving.values().filter_map(|leaving| leaving.deadline).min();
        let waiting = self.waiting.next_deadline();
        [waiting, rejudge, report, leaving, self.look_at_ends, self.reopen_at]
            .into_iter()
            .flatten()
            .min()
    }
}
