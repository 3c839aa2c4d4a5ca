//! Pods as the kernel and the data plane hold them: the real [`PodAttachments`].

use std::collections::{BTreeMap, BTreeSet};
use std::error::Error;
use std::io;
use std::net::SocketAddr;
use std::os::fd::BorrowedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use mesh_ebpf::{Capture, CaptureError, NetnsCookie, PodCapture, port};
use mesh_model::{PodUid, ports};
use mesh_net::socket::SocketLabel;
use mesh_telemetry::metric;

use tokio::runtime::Handle;

use crate::dataplane::{DataPlane, Drain, HandedPod, KernelCapture, PodSockets};
use crate::dns::DnsDesk;
use crate::enrolment::attachment::{AttachError, AttachedPod, PodAttachments, Remains};
use crate::enrolment::squatter;

// The kernel's side and the crates that do not know it have one word for the same thing.
const _: () = assert!(mesh_ebpf::DELIVERY_MARK == mesh_net::socket::ORIGINAL_SOURCE_MARK);
const _: () = assert!(
    port::OUTBOUND == ports::OUTBOUND
        && port::INBOUND == ports::INBOUND_PLAINTEXT
        && port::TUNNEL == ports::HBONE
        && port::RESOLVER == ports::DNS
);

/// The kernel's side of capture, as the data plane asks for it.
pub(crate) struct KernelGate {
    capture: Arc<Capture>,
    pods: Mutex<BTreeMap<PodUid, StagedPod>>,
}

/// What is captured of a pod, and how.
struct StagedPod {
    /// None for a pod that was handed over, until it is attached here.
    capture: Option<PodCapture>,
    sockets: PodSockets,
    /// How many workers listen; none before capture was switched on.
    slots: Option<u16>,
}

impl std::fmt::Debug for KernelGate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("KernelGate").finish_non_exhaustive()
    }
}

impl KernelGate {
    /// A gate over loaded capture.
    pub(crate) fn new(capture: Arc<Capture>) -> Self {
        Self { capture, pods: Mutex::default() }
    }

    /// The loaded capture.
    pub(crate) fn capture(&self) -> &Arc<Capture> {
        &self.capture
    }

    /// Knows a pod that a predecessor captured and whose sockets are here by now. One that leaves is captured no more.
    pub(crate) fn handed_over(&self, pod: HandedPod) {
        let HandedPod { sockets, slots } = pod;
        if slots.is_some() {
            let uid = sockets.uid.clone();
            self.lock().insert(uid, StagedPod { capture: None, sockets, slots });
        }
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<PodUid, StagedPod>> {
        self.pods.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl SocketLabel for KernelGate {
    fn label(&self, fd: BorrowedFd<'_>) -> io::Result<()> {
        self.capture.label(fd)
    }
}

impl KernelCapture for KernelGate {
    fn orig_dst(&self, cookie: u64, client: SocketAddr) -> io::Result<Option<SocketAddr>> {
        self.capture.orig_dst(NetnsCookie(cookie), port::OUTBOUND, client)
    }

    fn label(&self, fd: BorrowedFd<'_>) -> io::Result<()> {
        self.capture.label(fd)
    }

    fn add_listener(
        &self,
        pod: &PodSockets,
        port: u16,
        slot: u16,
        listener: BorrowedFd<'_>,
    ) -> io::Result<()> {
        self.capture
            .set_listener(NetnsCookie(pod.cookie), port, slot, listener)
            .map_err(io::Error::other)
    }

    fn switch_on(&self, pod: &PodSockets, slots: u16) -> io::Result<()> {
        let mut pods = self.lock();
        let staged = pods
            .get_mut(&pod.uid)
            .ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, "the pod was not staged"))?;
        let capture = staged.capture.as_ref().ok_or(io::ErrorKind::NotFound)?;
        self.capture.enroll(capture, slots).map_err(io::Error::other)?;
        staged.slots = Some(slots);
        Ok(())
    }
}

/// Sockets, programs and resolver of this node's pods.
pub(crate) struct Attachments {
    gate: Arc<KernelGate>,
    data_plane: Arc<DataPlane>,
    dns: Arc<DnsDesk>,
    runtime: Handle,
}

impl std::fmt::Debug for Attachments {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Attachments").finish_non_exhaustive()
    }
}

impl Attachments {
    /// Attachments made by these. `runtime` carries the data plane's commands; the methods are called on threads of its own
    /// for blocking work.
    pub(crate) fn new(
        gate: Arc<KernelGate>,
        data_plane: Arc<DataPlane>,
        dns: Arc<DnsDesk>,
        runtime: Handle,
    ) -> Self {
        Self { gate, data_plane, dns, runtime }
    }

    /// Applies changed settings of a pod whose sockets are as they should be.
    fn reconfigure(&self, uid: &PodUid, capture: PodCapture) -> Result<bool, AttachError> {
        let mut pods = self.gate.lock();
        let Some(staged) = pods.get_mut(uid) else { return Ok(false) };
        let Some(slots) = staged.slots else { return Ok(false) };
        self.gate.capture.enroll(&capture, slots).map_err(kernel_refused)?;
        staged.capture = Some(capture);
        Ok(true)
    }

    fn unstage(&self, uid: &PodUid) {
        self.gate.lock().remove(uid);
    }

    fn sockets(&self, uid: &PodUid) -> Option<PodSockets> {
        self.gate.lock().get(uid).map(|staged| staged.sockets.clone())
    }
}

impl PodAttachments for Attachments {
    fn attach(&self, pod: &AttachedPod) -> Result<(), AttachError> {
        let uid = &pod.pod.uid;
        let capture = PodCapture {
            netns: pod.path.clone(),
            addresses: ordered(pod),
            settings: pod.settings.clone(),
        };
        let sockets = pod_sockets(pod);
        if self.sockets(uid).is_none() {
            refuse_squatters(pod)?;
        }
        self.dns.add(pod).map_err(|error| AttachError {
            what: "the pod's resolver cannot be opened",
            remedy: "see that nothing in the pod listens on port 15053",
            retryable: true,
            source: error.into(),
        })?;
        let settings = capture.settings.clone();
        match self.sockets(uid) {
            Some(before) if !same_sockets(&before, &sockets) => {
                self.data_plane.direct().pod_leaves(before.cookie, Drain::Now);
                self.unstage(uid);
            }
            Some(_same) if self.reconfigure(uid, capture.clone())? => {
                self.data_plane.direct().pod_captured(sockets, Some(settings));
                return Ok(());
            }
            Some(_) | None => {}
        }
        // Other sockets, or the same pod that was being let go: its name is free only when they are closed.
        self.runtime.block_on(self.data_plane.remove_pod(uid, Drain::Now));
        let staged = StagedPod { capture: Some(capture), sockets: sockets.clone(), slots: None };
        self.gate.lock().insert(uid.clone(), staged);
        let added = self.runtime.block_on(self.data_plane.add_pod(sockets.clone())).map_err(|error| AttachError {
            what: "the pod's sockets cannot be opened or its capture switched on",
            remedy: "see that nothing in the pod listens on ports 15001, 15006 or 15008, and `culvert check`",
            retryable: true,
            source: error.into(),
        });
        if added.is_err() {
            self.unstage(uid);
            self.dns.remove(uid);
        } else {
            self.data_plane.direct().pod_captured(sockets, Some(settings));
        }
        added
    }

    fn detach(&self, uid: &PodUid, cookie: u64, drain: Drain) -> Result<(), AttachError> {
        // First, while the kernel still tells of the pod's connections.
        self.data_plane.direct().pod_leaves(cookie, drain);
        self.gate.capture.unenroll(NetnsCookie(cookie)).map_err(kernel_refused)?;
        self.dns.remove(uid);
        match drain {
            Drain::Now => self.runtime.block_on(self.data_plane.remove_pod(uid, drain)),
            Drain::Graceful(_) | Drain::WhenOver => {
                let (data_plane, uid) = (Arc::clone(&self.data_plane), uid.clone());
                self.runtime.spawn(async move { data_plane.remove_pod(&uid, drain).await });
            }
        }
        self.unstage(uid);
        Ok(())
    }

    fn close(&self, uid: &PodUid, cookie: u64) -> Result<(), AttachError> {
        self.data_plane.direct().pod_leaves(cookie, Drain::Now);
        self.dns.remove(uid);
        self.runtime.block_on(self.data_plane.remove_pod(uid, Drain::Now));
        self.unstage(uid);
        Ok(())
    }

    fn remains(&self, cookie: u64) -> Result<Remains, AttachError> {
        if let Some(found) = self.gate.capture.find(NetnsCookie(cookie)).map_err(kernel_refused)? {
            let attached = found.steered || !found.guarded.is_empty();
            return Ok(if attached { Remains::OfLiving } else { Remains::OfUnknown });
        }
        let foreign = self.gate.capture.foreign_pods().map_err(kernel_refused)?;
        let captured = foreign.contains(&NetnsCookie(cookie));
        Ok(if captured { Remains::OfUnknown } else { Remains::Nothing })
    }

    fn left(&self, pod: &AttachedPod) {
        // With no settings it takes no part, and its connections have somebody to belong to.
        self.data_plane.direct().pod_captured(pod_sockets(pod), None);
    }

    fn lingers(&self, uid: &PodUid, cookie: u64) -> bool {
        self.data_plane.open_flows(uid) > 0 || self.data_plane.direct().lingers(cookie)
    }

    fn captured(&self) -> Result<BTreeSet<u64>, AttachError> {
        let enrolled = self.gate.capture.enrolled().map_err(kernel_refused)?;
        let foreign = self.gate.capture.foreign_pods().map_err(kernel_refused)?;
        let ours = enrolled.into_iter().map(|pod| pod.cookie);
        Ok(ours.chain(foreign).map(|cookie| cookie.0).collect())
    }

    fn whole(&self) -> Result<BTreeSet<u64>, AttachError> {
        let enrolled = self.gate.capture.enrolled().map_err(kernel_refused)?;
        Ok(enrolled.iter().filter(|pod| pod.is_whole()).map(|pod| pod.cookie.0).collect())
    }

    fn is_whole(&self, cookie: u64) -> Result<bool, AttachError> {
        let found = self.gate.capture.find(NetnsCookie(cookie)).map_err(kernel_refused)?;
        Ok(found.is_some_and(|pod| pod.is_whole()))
    }
}

/// The agent's ports have to be its alone before capture is switched on; afterwards nobody else can bind them.
fn refuse_squatters(pod: &AttachedPod) -> Result<(), AttachError> {
    match squatter::find(&pod.netns) {
        Ok(None) => Ok(()),
        Ok(Some(squatter)) => {
            metrics::counter!(metric::AGENT_PORTS_TAKEN.name).increment(1);
            Err(AttachError {
                what: "a port that the agent needs in the pod is taken",
                remedy: "end that process or have it listen on another port; ports 15001, 15006, 15008 and 15053 are the agent's",
                retryable: true,
                source: Box::new(squatter),
            })
        }
        Err(error) => Err(AttachError {
            what: "the sockets of the pod cannot be listed",
            remedy: "see that /proc is mounted where the agent runs",
            retryable: true,
            source: error.into(),
        }),
    }
}

fn pod_sockets(pod: &AttachedPod) -> PodSockets {
    PodSockets {
        uid: pod.pod.uid.clone(),
        namespace: pod.pod.name.namespace().into(),
        name: pod.pod.name.name().into(),
        service_account: pod.pod.service_account.as_str().into(),
        netns: Arc::clone(&pod.netns),
        cookie: pod.netns.cookie(),
        addresses: ordered(pod),
        capture_inbound: pod.settings.capture_inbound,
    }
}

/// The pod's addresses, IPv4 first: the first of each family is where captured connections go.
fn ordered(pod: &AttachedPod) -> Vec<std::net::IpAddr> {
    pod.addresses.iter().copied().collect()
}

/// Whether the pod's sockets can stay. What is captured of it is no matter: that is changed in the kernel's tables alone,
/// and its connections go on.
fn same_sockets(before: &PodSockets, now: &PodSockets) -> bool {
    before.cookie == now.cookie
        && before.addresses == now.addresses
        && before.service_account == now.service_account
}

fn kernel_refused(error: CaptureError) -> AttachError {
    AttachError {
        what: "the kernel's side of capture refused",
        remedy: "see the agent's log and `culvert check`",
        retryable: true,
        source: Box::<dyn Error + Send + Sync>::from(error),
    }
}
