//! What the data plane shares with the rest of the agent: the picture it decides by, and the ports it reports to.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use imbl::OrdMap;
use mesh_authorize::PolicySet;
use mesh_identity::{Svid, TrustBundle};
use mesh_model::{PodUid, SpiffeId};
use mesh_net::Netns;
use mesh_net::handshake::{FIRST_WORD_TIMEOUT, HANDSHAKE_TIMEOUT};
use mesh_net::socket::Keepalive;
use mesh_resolve::{ResolveSettings, WorkloadIndex};
use mesh_tunnel::EngineConfig;

use crate::dataplane::flows::FlowEvent;
use crate::dataplane::watchdog::WatchdogConfig;

/// Everything a decision looks at, swapped whole; cheap to clone.
#[derive(Clone, Debug)]
pub struct Snapshot {
    /// Workloads and services.
    pub index: WorkloadIndex,
    /// Compiled policies.
    pub policies: PolicySet,
    /// True once everything was heard that the controller had to say, now or in an earlier life of the agent. Until then
    /// nothing is judged: an empty set of policies would allow everything.
    pub synced: bool,
    /// Settings of routing.
    pub settings: ResolveSettings,
    /// Whom to trust.
    pub trust: Arc<TrustBundle>,
    /// Valid certificates of the node's pods, by identity.
    pub svids: OrdMap<SpiffeId, Arc<Svid>>,
}

/// The agent's side of the data plane. One writer swaps the snapshot, every worker reads it.
#[expect(missing_debug_implementations, reason = "ports of other parts of the agent")]
pub struct Shared {
    /// The picture. After swapping it call [`DataPlane::snapshot_changed`](super::DataPlane::snapshot_changed).
    pub snapshot: ArcSwap<Snapshot>,
    /// Where flows are reported.
    pub flows: Arc<dyn FlowSink>,
    /// Who fetches certificates.
    pub identities: Arc<dyn IdentityDesk>,
    /// Who resolves host names of workloads without addresses.
    pub resolver: Arc<dyn HostResolver>,
}

/// Takes what happened to flows. Called by workers: it must not wait.
pub trait FlowSink: Send + Sync {
    /// Takes `event`, or drops and counts it when its queue is full; false then. The end of a flow whose beginning was
    /// taken is always taken.
    fn report(&self, event: FlowEvent) -> bool;
}

/// Fetches certificates on demand. Called by workers: it must not wait.
pub trait IdentityDesk: Send + Sync {
    /// A flow waits for a certificate of `id`. When it has come, swap it into the snapshot and announce
    /// [`Changed::IDENTITIES`]. May be called again and again for the same identity.
    fn want(&self, id: &SpiffeId);
}

/// Resolves host names. Called by workers: it must not wait.
pub trait HostResolver: Send + Sync {
    /// Looks `hostname` up as `pod` would, and calls `answer` once, on any thread, with addresses in order of
    /// preference. Not calling it means failure after the flow's patience has ended.
    fn resolve(&self, pod: &PodUid, hostname: &str, answer: ResolveAnswer);
}

/// Takes the outcome of [`HostResolver::resolve`].
pub type ResolveAnswer = Box<dyn FnOnce(io::Result<Vec<IpAddr>>) + Send>;

/// What the data plane needs of the kernel's side of capture. Implemented over `mesh-ebpf`.
pub trait KernelCapture: Send + Sync {
    /// Where a captured connection was going, by the address it came from as accept says it.
    ///
    /// # Errors
    /// What the kernel says; the connection is refused then.
    fn orig_dst(&self, cookie: u64, client: SocketAddr) -> io::Result<Option<SocketAddr>>;

    /// Labels a socket as the agent's own. Before `connect`, inside the pod's namespace.
    ///
    /// # Errors
    /// What the kernel says; the socket is not used then.
    fn label(&self, fd: BorrowedFd<'_>) -> io::Result<()>;

    /// Notes the listener of worker `slot` on one of the agent's ports in the pod: connections to the port go to the
    /// noted sockets alone, whoever else in the pod shares it. It is forgotten when it closes.
    ///
    /// # Errors
    /// What the kernel says; the pod is taken out of the data plane again.
    fn add_listener(
        &self,
        pod: &PodSockets,
        port: u16,
        slot: u16,
        listener: BorrowedFd<'_>,
    ) -> io::Result<()>;

    /// Switches capture of the pod on, with the listeners of as many workers as `slots` says.
    ///
    /// The last step of enrolment: everything else is in place when it is called.
    ///
    /// # Errors
    /// What the kernel says; the pod is taken out of the data plane again.
    fn switch_on(&self, pod: &PodSockets, slots: u16) -> io::Result<()>;
}

/// One enrolled pod, as the data plane sees it.
#[derive(Clone, Debug)]
pub struct PodSockets {
    /// Its key.
    pub uid: PodUid,
    /// Namespace; with `name` it finds the pod's workload.
    pub namespace: Arc<str>,
    /// Pod name.
    pub name: Arc<str>,
    /// Service account; the workload must have the same.
    pub service_account: Arc<str>,
    /// Its network namespace.
    pub netns: Arc<Netns>,
    /// The cookie of that namespace, the key of the kernel's maps.
    pub cookie: u64,
    /// Its addresses; nothing else is ever delivered to.
    pub addresses: Vec<IpAddr>,
    /// False when inbound connections bypass capture; the tunnel port is served all the same.
    pub capture_inbound: bool,
}

/// Which parts of the snapshot have changed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Changed(pub(super) u8);

impl Changed {
    /// Workloads, services or routing settings.
    pub const INDEX: Self = Self(1);
    /// Policies.
    pub const POLICIES: Self = Self(2);
    /// Roots or revocation lists.
    pub const TRUST: Self = Self(4);
    /// The pods' own certificates.
    pub const IDENTITIES: Self = Self(8);

    /// Both together.
    #[must_use]
    pub const fn and(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// True when `part` is in it.
    #[must_use]
    pub const fn has(self, part: Self) -> bool {
        self.0 & part.0 != 0
    }
}

/// Whose address the application sees as its client's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OriginalSource {
    /// The client's; a connection for which that is impossible is refused.
    #[default]
    Required,
    /// The client's where possible, else the pod's own; each fallback is counted and logged.
    Preferred,
    /// The pod's own.
    Off,
}

/// What happens to a pod's connections when it leaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Drain {
    /// They are cut: the pod is gone.
    Now,
    /// No new ones; those open may end by themselves for this long.
    Graceful(Duration),
    /// No new ones; those open end by themselves: the pod lives on.
    WhenOver,
}

/// Bounds of the data plane. What goes beyond is refused as overloaded.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Flows of one pod at once, in both directions; default 32,768.
    pub flows_per_pod: usize,
    /// Flows that wait for a workload, a certificate or a name, per worker; default 8,192. One pod's at most a quarter.
    pub waiting: usize,
    /// TLS handshakes in flight, per worker: so many dialled and so many accepted ones; default 1,024. With few
    /// descriptors it is less: together they never take more than half of them.
    pub handshakes: usize,
    /// How long a handshake may take; default 10 s.
    pub handshake_timeout: Duration,
    /// How long a peer that dialled a pod's tunnel port may keep silent; default 3 s.
    pub first_word_timeout: Duration,
    /// Descriptors of the process; default: its soft `RLIMIT_NOFILE`.
    pub descriptors: Option<u64>,
    /// How long a flow waits for the pod's own workload; default 5 s. Source: ztunnel.
    pub workload_patience: Duration,
    /// How long a flow waits for the policies after the agent has started; default 5 s.
    pub policy_patience: Duration,
    /// How long a flow waits for somebody to be known at an address of the cluster's own pods; default 2 s. A change takes
    /// a tenth of that from the controller to here.
    pub destination_patience: Duration,
    /// How long a flow waits for the pod's certificate; default 5 s.
    pub certificate_patience: Duration,
    /// How long a flow waits for a name; default 5 s.
    pub resolve_patience: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            flows_per_pod: 32_768,
            waiting: 8_192,
            handshakes: 1_024,
            handshake_timeout: HANDSHAKE_TIMEOUT,
            first_word_timeout: FIRST_WORD_TIMEOUT,
            descriptors: None,
            workload_patience: Duration::from_secs(5),
            policy_patience: Duration::from_secs(5),
            destination_patience: Duration::from_secs(2),
            certificate_patience: Duration::from_secs(5),
            resolve_patience: Duration::from_secs(5),
        }
    }
}

/// Settings of the data plane.
#[derive(Clone, Debug)]
pub struct DataPlaneConfig {
    /// Engines, each on a thread of its own; default: usable cores.
    pub workers: usize,
    /// Engines of a predecessor that hands over; there are at least as many here. Default 0.
    pub inherited_workers: usize,
    /// Settings of each engine.
    pub engine: EngineConfig,
    /// Bounds.
    pub limits: Limits,
    /// Whose address applications see.
    pub original_source: OriginalSource,
    /// When a silent peer is given up.
    pub keepalive: Keepalive,
    /// When an engine counts as stuck.
    pub watchdog: WatchdogConfig,
}

impl Default for DataPlaneConfig {
    fn default() -> Self {
        Self {
            workers: mesh_runtime::usable_cores(),
            inherited_workers: 0,
            engine: EngineConfig::default(),
            limits: Limits::default(),
            original_source: OriginalSource::default(),
            keepalive: Keepalive::default(),
            watchdog: WatchdogConfig::default(),
        }
    }
}
