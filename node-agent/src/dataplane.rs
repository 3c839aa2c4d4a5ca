//! The data plane: captured connections of enrolled pods, from accept to the last byte.
//!
//! [`DataPlane`] owns one worker per core, each with a tunnel engine on a thread of its own. A pod's ports are opened by
//! every worker, so that the kernel spreads its connections; a connection and its tunnel never change threads. What a
//! connection may do is decided by pure functions on a [`Snapshot`]; here is only their order:
//!
//! - `outbound`: capture → resolve → authorize → tunnel or passthrough → telemetry,
//! - `inbound`: accept → resolve → authorize → deliver → telemetry,
//! - `rejudge`: the same verdicts again, on live flows, when what they rest on changes,
//! - `direct`: pods of this node talk without the workers where the same verdicts allow it.
//!
//! **Invariants.** No byte leaves a pod without a spent permit. Whatever is unknown waits for a bounded time, then its
//! client is reset. Each accepted flow is reported exactly once. Nothing here waits, but in the async methods of
//! [`DataPlane`], which are called from the agent's runtime and talk to the workers by bounded queues.

mod crossing;
pub(crate) mod direct;
mod flows;
mod handover;
mod inbound;
mod listeners;
mod outbound;
mod pods;
mod proxy_header;
mod rejudge;
mod shared;
mod stats;
mod telemetry;
mod tls;
mod tunnels;
mod waiting;
mod watchdog;
mod worker;

use std::collections::BTreeMap;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use mesh_model::PodUid;
use mesh_net::driver::budget::DescriptorBudget;
use mesh_net::driver::{SendError, WorkerConfig, WorkerHandle, spawn};
use mesh_net::socket;
use tokio::sync::oneshot;

pub use direct::{DirectExplanation, DirectPath, DirectStatus, SameNode};
pub use flows::{ConnectionView, FlowEvent};
pub(crate) use handover::{HandOverRefused, HandedPod, Part, WrittenPlane};
pub use shared::{
    Changed, DataPlaneConfig, Drain, FlowSink, HostResolver, IdentityDesk, KernelCapture, Limits,
    OriginalSource, PodSockets, ResolveAnswer, Shared, Snapshot,
};
pub use stats::{DataPlaneStats, TunnelRole, TunnelStats};
pub(crate) use telemetry::policy_ref;
pub use watchdog::WatchdogConfig;

use pods::{Pod, PodKey};
use stats::Stats;
use watchdog::Watchdog;
use worker::{Command, NodeWorker, WorkerParts};

/// The running data plane. Cheap to share in an `Arc`; dropping it stops the workers and closes their sockets.
pub struct DataPlane {
    workers: Vec<Worker>,
    /// So many of them serve pods; the others only end what a predecessor with more engines began.
    serving: usize,
    capture: Arc<dyn KernelCapture>,
    pods: Mutex<BTreeMap<PodUid, Arc<Pod>>>,
    next_pod: AtomicU64,
    next_flow: Arc<AtomicU64>,
    draining: AtomicBool,
    stats: Arc<Stats>,
    budget: Arc<DescriptorBudget>,
    watchdog: Watchdog,
    direct: DirectPath,
}

#[derive(Debug)]
struct Worker {
    handle: Arc<WorkerHandle<Command>>,
    changed: Arc<AtomicU8>,
}

/// Why a pod was not added; nothing of it is left behind.
#[derive(Debug, thiserror::Error)]
pub enum AddPodError {
    /// The uid is served already.
    #[error("pod {0} is served already")]
    Exists(PodUid),
    /// The data plane is going down.
    #[error("the data plane is draining")]
    Draining,
    /// A port of the pod could not be opened.
    #[error("cannot open the agent's ports in the pod")]
    Listen(#[source] io::Error),
    /// Capture could not be switched on.
    #[error("cannot switch the pod's capture on")]
    Steer(#[source] io::Error),
    /// A worker has ended; the agent must restart.
    #[error("a worker of the data plane has ended")]
    WorkerEnded,
}

/// How long a command waits for room in a worker's queue before the next try.
const QUEUE_PAUSE: Duration = Duration::from_millis(5);

impl DataPlane {
    /// Starts the workers. They serve no pod yet.
    ///
    /// # Errors
    /// For want of descriptors or threads.
    pub fn start(
        config: DataPlaneConfig,
        shared: Arc<Shared>,
        capture: Arc<dyn KernelCapture>,
    ) -> io::Result<Self> {
        let descriptors = match config.limits.descriptors {
            Some(limit) => limit,
            None => socket::descriptor_limit()?,
        };
        let budget = Arc::new(DescriptorBudget::under(descriptors));
        let stats = Arc::new(Stats::new());
        let next_flow = Arc::new(AtomicU64::new(1));
        let direct = DirectPath::default();
        let handshakes = handshakes_per_worker(&config, &budget);
        let serving = config.workers.max(1);
        let count = serving.max(config.inherited_workers);
        let mut workers = Vec::with_capacity(count);
        // More workers than a machine has cores.
        let count = u16::try_from(count).unwrap_or(u16::MAX);
        for index in 0..count {
            let mut worker_config = WorkerConfig::new(config.engine.clone(), Arc::clone(&budget));
            worker_config.max_accepting = handshakes;
            worker_config.max_dialling = handshakes;
            worker_config.handshake_timeout = config.limits.handshake_timeout;
            worker_config.first_word_timeout = config.limits.first_word_timeout;
            let changed = Arc::new(AtomicU8::new(0));
            let handle: Arc<OnceLock<Arc<WorkerHandle<Command>>>> = Arc::new(OnceLock::new());
            let parts = WorkerParts {
                config: config.clone(),
                shared: Arc::clone(&shared),
                capture: Arc::clone(&capture),
                stats: Arc::clone(&stats),
                changed: Arc::clone(&changed),
                next_flow: Arc::clone(&next_flow),
                direct: direct.clone(),
                to_self: self_sender(Arc::clone(&handle)),
                slot: index,
                seed: seed(index.into()),
            };
            let make = move || NodeWorker::new(parts);
            let started = Arc::new(spawn(&format!("culvert-data-{index}"), worker_config, make)?);
            let handle = handle.get_or_init(|| started);
            workers.push(Worker { handle: Arc::clone(handle), changed });
        }
        let watched = workers.iter().map(|worker| Arc::clone(&worker.handle)).collect();
        let watchdog = Watchdog::start(config.watchdog, watched)?;
        Ok(Self {
            watchdog,
            workers,
            serving,
            capture,
            pods: Mutex::new(BTreeMap::new()),
            next_pod: AtomicU64::new(1),
            next_flow,
            draining: AtomicBool::new(false),
            stats,
            budget,
            direct,
        })
    }

    /// Opens the pod's ports on every worker, then switches its capture on, which may block. Transactional.
    ///
    /// # Errors
    /// See [`AddPodError`]; the pod is not served then.
    pub async fn add_pod(&self, sockets: PodSockets) -> Result<(), AddPodError> {
        if self.draining.load(Ordering::Acquire) {
            return Err(AddPodError::Draining);
        }
        let uid = sockets.uid.clone();
        let key = PodKey(self.next_pod.fetch_add(1, Ordering::Relaxed));
        let pod = Arc::new(Pod::new(key, sockets));
        {
            let mut pods = self.pods();
            if pods.contains_key(&uid) {
                return Err(AddPodError::Exists(uid));
            }
            pods.insert(uid.clone(), Arc::clone(&pod));
        }
        let added = self.open_and_steer(&pod).await;
        if added.is_err() {
            self.close(key, Drain::Now).await;
            self.pods().remove(&uid);
        }
        added
    }

    async fn open_and_steer(&self, pod: &Arc<Pod>) -> Result<(), AddPodError> {
        for (index, worker) in self.workers.iter().enumerate() {
            let (pod, open) = (Arc::clone(pod), index < self.serving);
            ask(worker, |reply| Command::AddPod { pod, open, reply })
                .await
                .ok_or(AddPodError::WorkerEnded)?
                .map_err(AddPodError::Listen)?;
        }
        let slots = u16::try_from(self.serving).unwrap_or(u16::MAX);
        self.capture.switch_on(&pod.sockets, slots).map_err(AddPodError::Steer)
    }

    /// Stops serving a pod, and returns when none of its connections is left or the grace has passed.
    ///
    /// Capture of the pod must have been switched off or pointed elsewhere before: from here on its captured connections
    /// are refused. A pod that is not served is no matter.
    pub async fn remove_pod(&self, uid: &PodUid, drain: Drain) {
        let Some(pod) = self.pods().get(uid).map(Arc::clone) else { return };
        self.close(pod.key, drain).await;
        let mut pods = self.pods();
        if pods.get(uid).is_some_and(|current| current.key == pod.key) {
            pods.remove(uid);
        }
    }

    /// Flows of a pod that are open, also of one that leaves; none of a pod that is not served.
    #[must_use]
    pub fn open_flows(&self, uid: &PodUid) -> usize {
        self.pods().get(uid).map_or(0, |pod| pod.open())
    }

    /// Closes the pod on all workers at once and waits for all.
    async fn close(&self, key: PodKey, drain: Drain) {
        let mut replies = Vec::with_capacity(self.workers.len());
        for worker in &self.workers {
            let (reply, done) = oneshot::channel();
            if deliver(worker, Command::RemovePod { key, drain, reply }).await {
                replies.push(done);
            }
        }
        for done in replies {
            if done.await.is_err() {
                tracing::error!("a worker ended while a pod was removed");
            }
        }
    }

    /// Announces that parts of the snapshot have changed: waiting flows are tried again, live ones judged again.
    ///
    /// Never waits. Call it after the snapshot was swapped.
    pub fn snapshot_changed(&self, what: Changed) {
        for worker in &self.workers {
            worker.changed.fetch_or(what.0, Ordering::AcqRel);
            worker.handle.poke();
        }
        self.direct.changed();
    }

    /// The direct path. It is not there before it is started, and nothing needs it.
    #[must_use]
    pub const fn direct(&self) -> &DirectPath {
        &self.direct
    }

    /// The source of flows' names.
    pub(crate) fn next_flow(&self) -> Arc<AtomicU64> {
        Arc::clone(&self.next_flow)
    }

    /// The open flows of all pods, oldest first.
    pub async fn connections(&self) -> Vec<ConnectionView> {
        let mut all = Vec::new();
        for worker in &self.workers {
            all.extend(ask(worker, |reply| Command::List { reply }).await.unwrap_or_default());
        }
        all.extend(self.direct.connections().await);
        all.sort_by(|one, other| one.id.cmp(&other.id));
        all
    }

    /// Closes every pod's ports and lets flows end by themselves for at most `grace`; then they are cut.
    pub async fn drain(&self, grace: Duration) {
        self.draining.store(true, Ordering::Release);
        let keys: Vec<PodKey> = self.pods().values().map(|pod| pod.key).collect();
        let closing = keys.into_iter().map(|key| self.close(key, Drain::Graceful(grace)));
        futures_util::future::join_all(closing).await;
        self.pods().clear();
    }

    /// Ends or begins admission for want of memory: new connections and requests are refused as overloaded, open ones go on.
    pub fn set_memory_short(&self, short: bool) {
        self.budget.set_memory_short(short);
    }

    /// What the data plane has counted.
    #[must_use]
    pub fn stats(&self) -> DataPlaneStats {
        let pods = self.pods();
        DataPlaneStats {
            open_flows: pods.values().map(|pod| pod.open()).sum(),
            pods: pods.len(),
            workers: self.workers.len(),
            stuck_workers: self.watchdog.stuck(),
            sockets: self.budget.used(),
            socket_limit: self.budget.limit(),
            memory_is_short: self.budget.memory_is_short(),
            ..self.stats.read()
        }
    }

    fn pods(&self) -> MutexGuard<'_, BTreeMap<PodUid, Arc<Pod>>> {
        // The map is whole at every moment, whatever panicked.
        self.pods.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl std::fmt::Debug for DataPlane {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("DataPlane").field("workers", &self.workers.len()).finish_non_exhaustive()
    }
}

impl Drop for DataPlane {
    fn drop(&mut self) {
        for worker in &self.workers {
            let mut command = Command::Stop;
            // The queue is drained continuously; a full one has room in a moment.
            while let Err(SendError::Full(back)) = worker.handle.send(command) {
                command = back;
                std::thread::sleep(QUEUE_PAUSE);
            }
        }
    }
}

/// Sends a command with a reply and waits for it; none when the worker has ended.
async fn ask<T>(worker: &Worker, command: impl FnOnce(oneshot::Sender<T>) -> Command) -> Option<T> {
    let (reply, answer) = oneshot::channel();
    if !deliver(worker, command(reply)).await {
        return None;
    }
    answer.await.ok()
}

/// Queues a command, waiting for room; false when the worker has ended.
async fn deliver(worker: &Worker, command: Command) -> bool {
    let mut command = command;
    loop {
        match worker.handle.send(command) {
            Ok(()) => return true,
            Err(SendError::Ended(_)) => return false,
            Err(SendError::Full(back)) => {
                command = back;
                tokio::time::sleep(QUEUE_PAUSE).await;
            }
        }
    }
}

/// Handshakes of all workers, dialled and accepted, take at most half of the descriptors: whatever floods them leaves the
/// other half to flows.
fn handshakes_per_worker(config: &DataPlaneConfig, budget: &DescriptorBudget) -> usize {
    let quarter = usize::try_from(budget.limit() / 4).unwrap_or(usize::MAX);
    config.limits.handshakes.min(quarter / config.workers.max(1)).max(1)
}

/// Lets resolvers answer to the worker that asked. An answer that finds no room is dropped: the flow's patience ends it.
fn self_sender(handle: Arc<OnceLock<Arc<WorkerHandle<Command>>>>) -> worker::CommandSender {
    Arc::new(move |command| {
        let Some(handle) = handle.get() else { return };
        if let Err(error) = handle.send(command) {
            tracing::warn!(%error, "an answer did not reach its worker");
        }
    })
}

/// A seed for load balancing and trace ids, different for each worker and process.
fn seed(index: usize) -> u64 {
    use std::hash::{BuildHasher, RandomState};
    RandomState::new().hash_one(index)
}
