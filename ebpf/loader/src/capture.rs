//! The public face: one loaded set of programs and maps.

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::BorrowedFd;
use std::time::Duration;

use crate::{CaptureConfig, CaptureError, FeatureReport, PodCapture};

/// The kernel's name for a network namespace: unique on a machine until its next boot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NetnsCookie(pub u64);

impl fmt::Display for NetnsCookie {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A pod that is enrolled, as the pins and maps say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Enrolled {
    /// Its namespace.
    pub cookie: NetnsCookie,
    /// Its addresses, in order.
    pub addresses: Vec<IpAddr>,
    /// Host-side interfaces under guard (indices in the node's namespace).
    pub guarded: Vec<u32>,
    /// Inbound connections are steered (the link in the pod's namespace is alive). `false`, or no
    /// guarded interface: enrol it again, or unenrol it because it is gone.
    pub steered: bool,
}

/// What a sweep of the flow table did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Swept {
    /// Entries kept.
    pub live: usize,
    /// Entries removed.
    pub removed: usize,
}

/// Loaded capture. Cheap to share in an `Arc`; dropping it detaches nothing.
#[derive(Debug)]
pub struct Capture {}

impl Capture {
    /// Loads and pins everything, or takes over what an earlier process pinned and replaces its
    /// programs without a gap. Call it in the node's own network namespace.
    pub fn load_or_adopt(config: &CaptureConfig) -> Result<Self, CaptureError> {
        _ = config.clone();
        Err(CaptureError::Missing { name: "connect4" })
    }
    /// What the kernel was found to have.
    pub fn features(&self) -> FeatureReport { unreachable!() }
    /// Enrols a pod: everything that is needed first, then the one map entry that switches capture
    /// on, atomically for both directions. Connections that exist keep working. Idempotent: on an
    /// enrolled pod it changes settings, addresses and listener, and repairs what is missing. On an
    /// error nothing is left behind (an already enrolled pod stays as it was).
    ///
    /// `inbound` is the dual-stack listener on `:15006`, made in the pod's namespace.
    pub fn enroll(&self, pod: &PodCapture, inbound: BorrowedFd<'_>) -> Result<NetnsCookie, CaptureError> {
        _ = (pod.clone(), inbound);
        Err(CaptureError::Missing { name: "connect4" })
    }
    /// Switches capture off and removes all that `enroll` made. Ok also when it is not enrolled.
    pub fn unenroll(&self, pod: NetnsCookie) -> Result<(), CaptureError> {
        Err(CaptureError::NotEnrolled(pod))
    }
    /// Replaces the pod's `:15006` listener. Call it before the old one closes: an entry vanishes
    /// with its socket, and without an entry inbound connections are refused.
    pub fn set_listener(&self, pod: NetnsCookie, inbound: BorrowedFd<'_>) -> Result<(), CaptureError> {
        _ = inbound;
        Err(CaptureError::NotEnrolled(pod))
    }
    /// Labels a socket as the agent's own: never captured, and let through by the guard. Before
    /// `connect`. One system call, no lock. UDP sockets of a pod with `deny_udp` have to be bound
    /// to a pod address first, since the guard knows their flow only then.
    pub fn label(&self, socket: BorrowedFd<'_>) -> io::Result<()> {
        _ = socket;
        Err(io::ErrorKind::Unsupported.into())
    }
    /// Where a captured TCP connection was going, by its source address as accept says it. One
    /// system call, no lock. The entry is removed by the kernel side when the client's socket
    /// closes (getpeername of an MPTCP socket needs it until then).
    pub fn orig_dst(&self, pod: NetnsCookie, client: SocketAddr) -> io::Result<Option<SocketAddr>> {
        _ = (pod, client);
        Ok(None)
    }
    /// Which resolver a captured UDP query was sent to, by its source address.
    pub fn orig_resolver(&self, pod: NetnsCookie, client: SocketAddr) -> io::Result<Option<SocketAddr>> {
        _ = (pod, client);
        Ok(None)
    }
    /// What is enrolled, from the pins and maps.
    pub fn enrolled(&self) -> Result<Vec<Enrolled>, CaptureError> { Ok(Vec::new()) }
    /// The cookie of a namespace.
    pub fn netns_cookie(path: &std::path::Path) -> Result<NetnsCookie, CaptureError> {
        Err(CaptureError::HostNetwork { path: path.to_owned() })
    }
    /// The node's own addresses, from which probes come. Replaces the set; at most 1,024.
    pub fn set_node_addresses(&self, addresses: &[IpAddr]) -> Result<(), CaptureError> {
        _ = addresses.to_vec();
        Ok(())
    }
    /// Counters of the kernel side since boot or `detach_all`, by name, for metrics.
    pub fn counters(&self) -> Result<BTreeMap<&'static str, u64>, CaptureError> { Ok(BTreeMap::new()) }
    /// Removes flows that ended. Call it every 30 s or so with [`monotonic_now`](crate::monotonic_now).
    pub fn sweep_flows(&self, now: Duration) -> Result<Swept, CaptureError> {
        _ = now;
        Ok(Swept::default())
    }
    /// Checks every guard and attaches again what another tool removed; says how many were gone.
    pub fn verify_guards(&self) -> Result<usize, CaptureError> { Ok(0) }
    /// Layouts of other builds that are still pinned and capturing beside this one.
    pub fn foreign_layouts(&self) -> Result<Vec<u32>, CaptureError> { Ok(Vec::new()) }
    /// Detaches those. Call it after every pod of [`enrolled`](Self::enrolled) and of the agent's own
    /// list is enrolled here, so that there is never a moment without capture.
    pub fn remove_foreign_layouts(&self) -> Result<(), CaptureError> { Ok(()) }
    /// Detaches and unpins everything, of every layout: traffic goes direct afterwards.
    pub fn detach_all(&self) -> Result<(), CaptureError> { Ok(()) }
}
