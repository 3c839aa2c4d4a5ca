//! The public face: one loaded set of programs and maps.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::fs::File;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use mesh_ebpf_abi::{Address, ClientKey, Counter, LAYOUT, Port, maps as shapes, port};

use crate::direct::{self, DirectEnd, DirectEvent, DirectFlow, DirectPair, DirectVip};
use crate::foreign::ForeignLayouts;
use crate::guard::{self, Guards};
use crate::maps::{self, Maps};
use crate::object::{self, CGROUP_HOOKS, CgroupHook, Programs};
use crate::pins::Pins;
use crate::pods::{self, Parts, Pods};
use crate::sys::{self, LinkOrder, LinkTarget};
use crate::{
    CaptureConfig, CaptureError, CgroupOrder, FeatureReport, PodCapture, cgroup, destroy, netns,
};

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

impl Enrolled {
    /// Nothing of its capture has been taken away.
    #[must_use]
    pub const fn is_whole(&self) -> bool {
        self.steered && !self.guarded.is_empty()
    }
}

/// What was found of interfaces that pods got after their enrolment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Interfaces {
    /// Host-side ends that are under guard from now on.
    pub guarded: usize,
    /// Interfaces that lead out of a pod past every guard, by name.
    pub unguardable: Vec<(NetnsCookie, String)>,
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
///
/// [`label`](Self::label), [`orig_dst`](Self::orig_dst) and [`orig_resolver`](Self::orig_resolver)
/// take no lock that is held for long, and may be called from any thread, also from one that is in a pod's namespace. The
/// others take one lock and work for up to some milliseconds.
#[derive(Debug)]
pub struct Capture {
    maps: Maps,
    pins: Pins,
    guards: Guards,
    features: FeatureReport,
    node: NetnsCookie,
    pods: Mutex<Pods>,
    foreign: ForeignLayouts,
}

impl Capture {
    /// Loads and pins everything, or takes over what an earlier process pinned and replaces its
    /// programs without a gap. Call it in the node's own network namespace.
    ///
    /// Fails when the kernel lacks what every supported one has, when there is no bpffs or cgroup2
    /// root, or when the pinned maps have another shape. What was attached then stays attached.
    pub fn load_or_adopt(config: &CaptureConfig) -> Result<Self, CaptureError> {
        Self::load_layout(config, LAYOUT)
    }

    /// As [`load_or_adopt`](Self::load_or_adopt), by a build whose layout has another number: for tests of what an
    /// upgrade finds.
    #[doc(hidden)]
    pub fn load_layout(config: &CaptureConfig, layout: u32) -> Result<Self, CaptureError> {
        let cgroup_root = cgroup::find_root(config.cgroup_root.as_deref())?;
        let pins = Pins::prepare(&config.bpffs, layout)?;
        let adopted = check_pinned_maps(&pins)?;
        let programs = object::load(&pins.maps())?;
        let maps = Maps::open(&pins.maps())?;
        let node = guard::node_namespace()?;
        let cookie = netns::cookie(&node, &config.bpffs)?;
        let guards = Guards::new(node, config.guard, &programs, pins.programs())?;
        let cgroup_order = attach_cgroup_hooks(&pins, &cgroup_root, &programs)?;
        let parts = Parts { maps: &maps, pins: &pins, guards: &guards, node: cookie };
        let pods = Pods::adopt(parts, programs.steer_inbound)?;
        let features =
            FeatureReport { cgroup_order, guard: guards.attachment(), cgroup_root, adopted };
        let foreign = ForeignLayouts::open(&pins)?;
        Ok(Self { maps, pins, guards, features, node: cookie, pods: Mutex::new(pods), foreign })
    }

    /// What the kernel was found to have.
    pub fn features(&self) -> &FeatureReport {
        &self.features
    }

    /// Enrols a pod: everything that is needed first, then the one map entry that switches capture
    /// on, for both directions at once. Connections that exist keep working. Idempotent: on an
    /// enrolled pod it changes settings, addresses and listener, and repairs what is missing. On an
    /// error a new pod leaves nothing behind, and an enrolled one stays captured.
    ///
    /// The agent's listeners are given before, with [`set_listener`](Self::set_listener): `slots` of
    /// them on each of its ports, over which new connections are spread. What has none is refused.
    pub fn enroll(&self, pod: &PodCapture, slots: u16) -> Result<NetnsCookie, CaptureError> {
        let mut pods = self.pods();
        let cookie = pods.enroll(self.parts(), pod, slots)?;
        self.foreign.release(cookie)?;
        Ok(cookie)
    }

    /// Switches capture off and removes all that `enroll` made. Ok also when it is not enrolled.
    /// Connections through the agent go on as long as the agent relays them.
    pub fn unenroll(&self, pod: NetnsCookie) -> Result<(), CaptureError> {
        let mut pods = self.pods();
        pods.unenroll(self.parts(), pod)?;
        self.foreign.release(pod)
    }

    /// Gives or replaces a listener of the agent in a pod: its port, and its number among those of
    /// this port, from 0. Connections go to these sockets alone, whoever else shares their port. Call
    /// it before an old one closes: an entry vanishes with its socket, and without one connections
    /// are refused. A failed enrolment of a new pod takes them back, as unenrolment does.
    pub fn set_listener(
        &self,
        pod: NetnsCookie,
        port: u16,
        slot: u16,
        listener: BorrowedFd<'_>,
    ) -> Result<(), CaptureError> {
        let _pods = self.pods();
        pods::write_listener(&self.maps, pod, port, slot, listener)
    }

    /// Labels a socket as the agent's own: never captured, and let through by the guard. Call it
    /// before `connect`. UDP sockets of a pod with `deny_udp` have to be bound to a pod address
    /// first, since the guard knows their flow only then.
    pub fn label(&self, socket: BorrowedFd<'_>) -> io::Result<()> {
        self.foreign.label(socket)?;
        sys::map_update(self.maps.labels.fd(), &sys::fd_number(socket), &1_u32)
    }

    /// Where a captured TCP connection was going, by the agent's port that accepted it
    /// ([`port`](crate::port)) and its source address as accept says it; `None` for a connection that
    /// was made to the listener itself. The entry is removed by the kernel side when the client's
    /// socket closes: getpeername of an MPTCP socket needs it until then.
    pub fn orig_dst(
        &self,
        pod: NetnsCookie,
        listener: u16,
        client: SocketAddr,
    ) -> io::Result<Option<SocketAddr>> {
        let target = self.maps.originals.find(&client_key(pod, listener, client))?;
        Ok(target.map(|target| target.socket_addr()))
    }

    /// Which resolver a captured UDP query was sent to, by its source address.
    pub fn orig_resolver(
        &self,
        pod: NetnsCookie,
        client: SocketAddr,
    ) -> io::Result<Option<SocketAddr>> {
        let target = self.maps.resolvers.find(&client_key(pod, port::RESOLVER, client))?;
        Ok(target.map(|target| target.socket_addr()))
    }

    /// What is enrolled, from the pins and maps, by cookie.
    pub fn enrolled(&self) -> Result<Vec<Enrolled>, CaptureError> {
        let _pods = self.pods();
        pods::enrolled(self.parts())
    }

    /// One pod of them; none when it is not enrolled.
    pub fn find(&self, pod: NetnsCookie) -> Result<Option<Enrolled>, CaptureError> {
        let _pods = self.pods();
        pods::find(self.parts(), pod)
    }

    /// Puts interfaces under guard that pods got after they were enrolled, and names those for which that is impossible.
    /// Call it every 30 s or so. Pods that were not enrolled by this process are left out.
    pub fn guard_new_interfaces(&self) -> Result<Interfaces, CaptureError> {
        self.pods().guard_new_interfaces(self.parts())
    }

    /// The cookie of the namespace at `path`.
    pub fn netns_cookie(path: &Path) -> Result<NetnsCookie, CaptureError> {
        netns::cookie(&netns::open(path)?, path)
    }

    /// The node's own addresses, from which probes come. Replaces the set; at most 1,024, beyond
    /// which it fails with [`CaptureError::Full`].
    pub fn set_node_addresses(&self, addresses: &[IpAddr]) -> Result<(), CaptureError> {
        let _pods = self.pods();
        let wanted: BTreeSet<_> = addresses.iter().map(|ip| Address::from(*ip)).collect();
        for address in self.maps.node_addresses.keys()? {
            if !wanted.contains(&address) {
                self.maps.node_addresses.remove(&address)?;
            }
        }
        wanted.iter().try_for_each(|address| self.maps.node_addresses.insert(address, &1))
    }

    /// Counters of the kernel side, by name, for metrics. They start at 0 when the maps are made
    /// and go on over restarts of the agent.
    pub fn counters(&self) -> Result<BTreeMap<&'static str, u64>, CaptureError> {
        let cpus = aya::util::nr_cpus().map_err(|(_, source)| CaptureError::Kernel {
            what: "reading the number of CPUs",
            source,
        })?;
        let mut values = vec![0; cpus];
        Counter::ALL
            .iter()
            .map(|counter| Ok((counter.name(), self.maps.counter(*counter, &mut values)?)))
            .collect()
    }

    /// Removes flows that ended without the kernel side seeing it: connections that are older than
    /// their pod's enrolment, and datagrams. Call it every 30 s or so with
    /// [`monotonic_now`](crate::monotonic_now).
    pub fn sweep_flows(&self, now: Duration) -> Result<Swept, CaptureError> {
        self.pods().sweep(self.parts(), now)
    }

    /// Checks every guard and attaches again what another tool removed; how many interfaces were
    /// without. Call it every 10 s or so where [`features`](Self::features) says clsact.
    pub fn verify_guards(&self) -> Result<usize, CaptureError> {
        let _pods = self.pods();
        pods::verify_guards(self.parts())
    }

    /// Lets a pair of enrolled pods talk without the agent, while verdicts are
    /// [in force](Self::keep_direct_until). Call it only after the full policy allowed the pair;
    /// `revision` is that of the picture it was taken on. Fails with [`CaptureError::Full`] at 65,536.
    pub fn permit_direct(&self, pair: &DirectPair, revision: u64) -> Result<(), CaptureError> {
        direct::permit(&self.maps, pair, revision)
    }

    /// Takes a verdict back: no further connection of the pair opens. Those that are open go on, see
    /// [`cut_direct`](Self::cut_direct). Whether there was one.
    pub fn revoke_direct(&self, pair: &DirectPair) -> Result<bool, CaptureError> {
        direct::revoke(&self.maps, pair)
    }

    /// The verdicts that are there, an earlier process's too, with their revisions.
    pub fn direct_pairs(&self) -> Result<Vec<(DirectPair, u64)>, CaptureError> {
        direct::pairs(&self.maps)
    }

    /// Lets connections of a pod to a virtual address of a service go straight to one of `endpoints`, picked at
    /// random for each, while verdicts are [in force](Self::keep_direct_until). They have to be all that the
    /// agent would choose among, each as likely as the others. Where the pair of the one that is picked has no
    /// verdict, the connection goes through the agent. Replaces what was said of the address before.
    ///
    /// # Errors
    /// [`CaptureError::Full`] at 16,384; [`CaptureError::TooMany`] with more than eight, or none.
    pub fn spread_direct(
        &self,
        vip: &DirectVip,
        endpoints: &[SocketAddr],
    ) -> Result<(), CaptureError> {
        direct::spread(&self.maps, vip, endpoints)
    }

    /// Takes that back: the agent chooses again. Whether there was something.
    pub fn gather_direct(&self, vip: &DirectVip) -> Result<bool, CaptureError> {
        direct::gather(&self.maps, vip)
    }

    /// The virtual addresses that are there with their endpoints, an earlier process's too.
    pub fn direct_vips(&self) -> Result<Vec<(DirectVip, Vec<SocketAddr>)>, CaptureError> {
        direct::vips(&self.maps)
    }

    /// By which virtual address a direct connection was dialled, if by one. Kept until
    /// [`forget_dialled`](Self::forget_dialled), also beyond the connection's end.
    pub fn dialled(&self, flow: &DirectFlow) -> Result<Option<SocketAddr>, CaptureError> {
        Ok(direct::dialled(&self.maps, flow)?.map(|(vip, _since)| vip))
    }

    /// Forgets it of a connection that was over at `until`, not of a later one by the same ports.
    pub fn forget_dialled(&self, flow: &DirectFlow, until: Duration) -> Result<(), CaptureError> {
        direct::forget_dialled(&self.maps, flow, until)
    }

    /// The connections of which a virtual address is kept. Walks the table.
    pub fn all_dialled(&self) -> Result<Vec<DirectFlow>, CaptureError> {
        direct::all_dialled(&self.maps)
    }

    /// Until when verdicts are in force, by [`monotonic_now`](crate::monotonic_now). To be renewed
    /// all the time, so that they end with the agent that would take them back.
    pub fn keep_direct_until(&self, until: Duration) -> Result<(), CaptureError> {
        direct::keep_until(&self.maps, until)
    }

    /// What happened to direct connections, oldest first, at most `limit` events. What finds no room
    /// in the queue of 32,768 is counted by the kernel side (`direct_events_lost`).
    pub fn direct_events(&self, limit: usize) -> Result<Vec<DirectEvent>, CaptureError> {
        direct::events(&self.maps, limit)
    }

    /// The direct connections that are open, with their clients' namespaces. Walks the flow table.
    pub fn direct_flows(&self) -> Result<Vec<(DirectFlow, NetnsCookie)>, CaptureError> {
        direct::flows(&self.maps)
    }

    /// The ends of direct connections that are open; one whose pod is gone has none. Walks the flow table.
    pub fn direct_ends(&self) -> Result<Vec<(DirectFlow, DirectEnd)>, CaptureError> {
        direct::ends(&self.maps)
    }

    /// The open sockets of a pod that have a peer, as (own address, peer's): of a pod that is captured no more the
    /// programs tell nothing.
    ///
    /// # Errors
    /// When the kernel does not list them.
    pub fn sockets_of(
        namespace: BorrowedFd<'_>,
    ) -> Result<Vec<(SocketAddr, SocketAddr)>, CaptureError> {
        direct::sockets(namespace)
    }

    /// Ends a direct connection: the guards let nothing of it pass any more, and its sockets in
    /// these namespaces are destroyed; their owners see `ECONNABORTED`.
    pub fn cut_direct(
        &self,
        flow: &DirectFlow,
        client: Option<BorrowedFd<'_>>,
        server: Option<BorrowedFd<'_>>,
    ) -> Result<(), CaptureError> {
        direct::cut(&self.maps, flow, client, server)
    }

    /// Whether the kernel can destroy sockets, without which the direct path must not be used. The
    /// error names what it lacks.
    pub fn check_direct() -> Result<(), CaptureError> {
        netns::inside_new(destroy::probe).and_then(|probed| probed).map_err(CaptureError::kernel(
            "ending sockets by sock_diag (tcp_diag, CONFIG_INET_DIAG_DESTROY)",
        ))
    }

    /// Layouts of other builds that are still pinned and capturing beside this one.
    pub fn foreign_layouts(&self) -> Result<Vec<u32>, CaptureError> {
        self.pins.foreign_layouts().map_err(CaptureError::kernel("listing pinned layouts"))
    }

    /// The namespaces that those capture. Each is released when it is enrolled here, or unenrolled.
    pub fn foreign_pods(&self) -> Result<Vec<NetnsCookie>, CaptureError> {
        self.foreign.captured()
    }

    /// Detaches those of them that capture no pod any more; the layouts that stay. Call it when pods have been enrolled
    /// here, and again until none stays: where an old layout captures a pod, its connections are refused.
    pub fn retire_foreign_layouts(&self) -> Result<Vec<u32>, CaptureError> {
        let _pods = self.pods();
        self.foreign.retire()
    }

    /// Detaches all of them, whatever they capture. Call it when the agent has enrolled all its pods here, so that there
    /// is never a moment without capture.
    pub fn remove_foreign_layouts(&self) -> Result<(), CaptureError> {
        let _pods = self.pods();
        for layout in self.foreign_layouts()? {
            self.pins
                .of_layout(layout)
                .remove_layout()
                .map_err(CaptureError::kernel("removing a pinned layout"))?;
        }
        self.foreign.clear();
        Ok(())
    }

    /// Detaches and unpins everything, of every layout: traffic goes direct afterwards. For
    /// uninstallation; `self` is of no use then.
    pub fn detach_all(&self) -> Result<(), CaptureError> {
        let mut pods = self.pods();
        for (cookie, _) in self.maps.pods.elements()? {
            pods.unenroll(self.parts(), NetnsCookie(cookie))?;
        }
        drop(pods);
        self.remove_foreign_layouts()?;
        self.pins.remove_layout().map_err(CaptureError::kernel("removing the pins"))
    }

    fn parts(&self) -> Parts<'_> {
        Parts { maps: &self.maps, pins: &self.pins, guards: &self.guards, node: self.node }
    }

    /// A panic of another thread inside a change leaves the maps at worst with a pod half enrolled,
    /// which the next enrolment of that pod completes.
    fn pods(&self) -> MutexGuard<'_, Pods> {
        self.pods.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn client_key(pod: NetnsCookie, listener: u16, client: SocketAddr) -> ClientKey {
    let source = (client.ip().into(), Port::new(client.port()));
    ClientKey::new(pod.0, source, Port::new(listener))
}

/// Checks the maps that are pinned already; whether there are any.
fn check_pinned_maps(pins: &Pins) -> Result<bool, CaptureError> {
    let mut found = false;
    for spec in shapes::ALL {
        let pin = sys::open_pin(&pins.maps().join(spec.name))
            .map_err(CaptureError::kernel("opening a pinned map"))?;
        if let Some(map) = pin {
            maps::check_shape(map.as_fd(), spec)?;
            found = true;
        }
    }
    Ok(found)
}

/// Attaches the programs of the root cgroup, or replaces those of the pinned links.
fn attach_cgroup_hooks(
    pins: &Pins,
    root: &Path,
    programs: &Programs,
) -> Result<CgroupOrder, CaptureError> {
    let root = File::open(root).map_err(CaptureError::kernel("opening the cgroup root"))?;
    let mut order = CgroupOrder::Adopted;
    for (hook, program) in CGROUP_HOOKS.iter().zip(&programs.cgroup) {
        let path = pins.links().join(hook.name);
        let pinned = sys::open_pin(&path).map_err(CaptureError::kernel("opening a pinned link"))?;
        if let Some(link) = pinned {
            sys::link_update(link.as_fd(), program.as_fd())
                .map_err(CaptureError::kernel("replacing a pinned program"))?;
            continue;
        }
        let (link, found) = attach_first(program.as_fd(), root.as_fd(), hook)?;
        sys::pin(link.as_fd(), &path).map_err(CaptureError::kernel("pinning a link"))?;
        if hook.ordered {
            order = found;
        }
    }
    Ok(order)
}

/// Attaches to a cgroup as far in front as the kernel can: it says `EINVAL` to flags it does not
/// know.
pub(crate) fn attach_first(
    program: BorrowedFd<'_>,
    cgroup: BorrowedFd<'_>,
    hook: &CgroupHook,
) -> Result<(OwnedFd, CgroupOrder), CaptureError> {
    const ORDERS: [(LinkOrder, CgroupOrder); 3] = [
        (LinkOrder::PreOrder, CgroupOrder::PreOrder),
        (LinkOrder::Before, CgroupOrder::Before),
        (LinkOrder::Last, CgroupOrder::AttachOrder),
    ];
    let wanted = if hook.ordered { &ORDERS[..] } else { &ORDERS[2..] };
    let mut refusal = io::Error::from_raw_os_error(libc::EINVAL);
    for (order, found) in wanted {
        match sys::link_create(program, LinkTarget::Fd(cgroup), hook.attach_type, *order) {
            Ok(link) => return Ok((link, *found)),
            Err(error) => refusal = error,
        }
        if refusal.raw_os_error() != Some(libc::EINVAL) {
            break;
        }
    }
    Err(CaptureError::Kernel { what: "attaching to the cgroup root", source: refusal })
}
