//! Enrolment of pods: everything that is needed first, the switch last.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use mesh_ebpf_abi::{
    Address, FlowKey, FlowOrigin, FlowState, ListenerKey, Pod, PodFlags, Port, Remains,
    maps as shapes, protocol,
};

use crate::capture::{Enrolled, Interfaces, NetnsCookie, Swept};
use crate::established::{self, Connection};
use crate::guard::Guards;
use crate::interface::{self, Interface, Uplinks, WaysOut};
use crate::maps::Maps;
use crate::object::SK_LOOKUP;
use crate::pins::{self, Pins};
use crate::rules::{self, Rules};
use crate::sys::{LinkOrder, LinkTarget};
use crate::{CaptureError, PodCapture, netns, sys};

/// How long a datagram flow stays permitted after its socket was connected or last sent.
const DATAGRAM_LIFETIME: Duration = Duration::from_secs(300);
/// A flow younger than this may not be in `/proc/net/tcp` yet.
const SETTLING_TIME: Duration = Duration::from_secs(10);
/// Above this share of the flow table (one half), flows whose close nobody reported are looked for
/// in every pod.
const CROWDED: usize = shapes::FLOWS.max_entries as usize / 2;

/// The pods of this node. All methods that change something are called under one lock.
#[derive(Debug)]
pub(crate) struct Pods {
    steer_inbound: OwnedFd,
    /// Where the namespaces of pods were, for sweeps. A pod that was adopted and not enrolled again
    /// is missing here.
    namespaces: BTreeMap<NetnsCookie, PathBuf>,
    next_rule_set: u32,
}

/// What the methods of [`Pods`] work on.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Parts<'a> {
    pub(crate) maps: &'a Maps,
    pub(crate) pins: &'a Pins,
    pub(crate) guards: &'a Guards,
    pub(crate) node: NetnsCookie,
}

/// Steps to take back, newest first, unless the work is completed.
struct Undo<'a>(Vec<Box<dyn FnOnce() -> Result<(), CaptureError> + 'a>>);

impl<'a> Undo<'a> {
    fn push(&mut self, step: impl FnOnce() -> Result<(), CaptureError> + 'a) {
        self.0.push(Box::new(step));
    }

    fn complete(mut self) {
        self.0.clear();
    }
}

impl Drop for Undo<'_> {
    fn drop(&mut self) {
        while let Some(step) = self.0.pop() {
            if let Err(error) = step() {
                tracing::warn!(error = &error as &dyn std::error::Error, "roll-back is incomplete");
            }
        }
    }
}

impl Pods {
    /// Takes over what is in the maps: clears away enrolments that were never completed, entries of
    /// settings that nobody uses, and gives every link this build's program.
    pub(crate) fn adopt(parts: Parts<'_>, steer_inbound: OwnedFd) -> Result<Self, CaptureError> {
        let mut pods = Self { steer_inbound, namespaces: BTreeMap::new(), next_rule_set: 1 };
        let mut rule_sets = Vec::new();
        for (cookie, pod) in parts.maps.pods.elements()? {
            if PodFlags(pod.flags).has(PodFlags::OBSERVE) {
                pods.unenroll(parts, NetnsCookie(cookie))?;
            } else {
                rule_sets.push(pod.rule_set);
            }
        }
        let listed =
            parts.pins.listed_pods().map_err(CaptureError::kernel("listing pinned pods"))?;
        for cookie in listed {
            if parts.maps.pods.get(&cookie.0)?.is_none() {
                pods.unenroll(parts, cookie)?;
            } else {
                pods.update_links(parts, cookie)?;
            }
        }
        for key in parts.maps.port_rules.keys()? {
            if !rule_sets.contains(&key.rule_set()) {
                parts.maps.port_rules.remove(&key)?;
            }
        }
        for key in parts.maps.network_rules.keys()? {
            if !rule_sets.contains(&key.rule_set()) {
                parts.maps.network_rules.remove(&key)?;
            }
        }
        pods.next_rule_set = rule_sets.into_iter().max().unwrap_or(0).wrapping_add(1);
        Ok(pods)
    }

    fn update_links(&self, parts: Parts<'_>, pod: NetnsCookie) -> Result<(), CaptureError> {
        let replace = CaptureError::kernel("replacing a pod's program");
        let path = parts.pins.pod(pod).join("steer_inbound");
        if let Some(link) = sys::open_pin(&path).map_err(replace)?
            && sys::link_is_attached(link.as_fd()).unwrap_or(false)
        {
            sys::link_update(link.as_fd(), self.steer_inbound.as_fd())
                .map_err(CaptureError::kernel("replacing a pod's program"))?;
        }
        for interface in guarded_interfaces(parts, pod)? {
            if parts.guards.exists(interface)? {
                parts.guards.ensure(&parts.pins.pod(pod), interface)?;
            }
        }
        Ok(())
    }

    /// See [`Capture::enroll`](crate::Capture::enroll).
    pub(crate) fn enroll(
        &mut self,
        parts: Parts<'_>,
        pod: &PodCapture,
        slots: u16,
    ) -> Result<NetnsCookie, CaptureError> {
        let addresses = rules::addresses(pod)?;
        let rules = Rules::new(&pod.settings)?;
        let namespace = netns::open(&pod.netns)?;
        let cookie = netns::cookie(&namespace, &pod.netns)?;
        if cookie == parts.node {
            return Err(CaptureError::HostNetwork { path: pod.netns.clone() });
        }
        let interfaces = uplinks(parts, pod, &namespace)?;
        let earlier = parts.maps.pods.get(&cookie.0)?;
        let rule_set = self.next_rule_set;
        self.next_rule_set = rule_set.wrapping_add(1);
        let entry = Pod::new(
            first(&addresses, Address::is_v4),
            first(&addresses, |address| !address.is_v4()),
            rules.flags(),
            rule_set,
            slots.into(),
        );

        let mut undo = Undo(Vec::new());
        let maps = parts.maps;
        if earlier.is_none() {
            undo.push(move || remove_listeners(maps, cookie));
        }
        write_rules(parts, &rules, rule_set, &mut undo)?;
        write_addresses(parts, cookie, &addresses, &mut undo)?;
        self.attach(parts, cookie, &namespace, &interfaces, earlier.is_none(), &mut undo)?;
        if earlier.is_none() {
            let mut observing = entry;
            observing.flags = PodFlags::OBSERVE;
            undo.push(move || maps.pods.remove(&cookie.0).map(drop));
            maps.pods.insert(&cookie.0, &observing)?;
            undo.push(move || remove_flows(maps, cookie));
            seed(parts, cookie, &namespace, &addresses)?;
        }
        maps.pods.insert(&cookie.0, &entry)?;
        undo.complete();

        if let Some(earlier) = earlier {
            remove_rules(parts, earlier.rule_set)?;
            remove_addresses(parts, cookie, &addresses)?;
        }
        self.namespaces.insert(cookie, pod.netns.clone());
        Ok(cookie)
    }

    /// Attaches the guards and the link in the pod's namespace, as far as they are missing.
    fn attach<'a>(
        &self,
        parts: Parts<'a>,
        pod: NetnsCookie,
        namespace: &OwnedFd,
        interfaces: &[u32],
        is_new: bool,
        undo: &mut Undo<'a>,
    ) -> Result<(), CaptureError> {
        let directory = parts.pins.pod(pod);
        if is_new {
            let directory = directory.clone();
            undo.push(move || remove_pins(&directory));
        }
        std::fs::create_dir_all(&directory)
            .map_err(CaptureError::kernel("making a pod's pin directory"))?;
        for &interface in interfaces {
            if is_new {
                let directory = directory.clone();
                undo.push(move || {
                    parts.guards.detach(&directory, interface)?;
                    parts.maps.guards.remove(&interface).map(drop)
                });
            }
            parts.maps.guards.insert(&interface, &pod.0)?;
            parts.guards.ensure(&directory, interface)?;
        }
        let path = directory.join("steer_inbound");
        let failed = CaptureError::kernel("steering inbound connections");
        steer(&path, namespace, &self.steer_inbound).map_err(failed)
    }

    /// See [`Capture::unenroll`](crate::Capture::unenroll).
    pub(crate) fn unenroll(
        &mut self,
        parts: Parts<'_>,
        pod: NetnsCookie,
    ) -> Result<(), CaptureError> {
        let maps = parts.maps;
        let earlier = maps.pods.get(&pod.0)?;
        maps.pods.remove(&pod.0)?;
        let directory = parts.pins.pod(pod);
        for interface in guarded_interfaces(parts, pod)? {
            parts.guards.detach(&directory, interface)?;
            maps.guards.remove(&interface)?;
        }
        remove_pins(&directory)?;
        remove_addresses(parts, pod, &[])?;
        remove_listeners(maps, pod)?;
        if let Some(earlier) = earlier {
            remove_rules(parts, earlier.rule_set)?;
        }
        remove_flows(maps, pod)?;
        self.namespaces.remove(&pod);
        Ok(())
    }

    /// See [`Capture::sweep_flows`](crate::Capture::sweep_flows).
    pub(crate) fn sweep(&self, parts: Parts<'_>, now: Duration) -> Result<Swept, CaptureError> {
        let flows = parts.maps.flows.elements()?;
        let crowded = flows.len() > CROWDED;
        let mut open: BTreeMap<u64, Option<Vec<FlowKey>>> = BTreeMap::new();
        let mut swept = Swept::default();
        for (key, state) in flows {
            let age = now.saturating_sub(Duration::from_nanos(state.registered_ns));
            let ended = if key.protocol == u32::from(protocol::UDP) {
                age > DATAGRAM_LIFETIME
            } else if age > SETTLING_TIME && (crowded || state.origin == FlowOrigin::Seeded as u32)
            {
                let cookie = NetnsCookie(state.netns_cookie);
                let open = open.entry(cookie.0).or_insert_with(|| self.open_flows(cookie));
                open.as_ref().is_some_and(|open| open.binary_search(&key).is_err())
            } else {
                false
            };
            if ended {
                parts.maps.flows.remove(&key)?;
                swept.removed += 1;
            } else {
                swept.live += 1;
            }
        }
        Ok(swept)
    }

    /// See [`Capture::guard_new_interfaces`](crate::Capture::guard_new_interfaces).
    pub(crate) fn guard_new_interfaces(
        &self,
        parts: Parts<'_>,
    ) -> Result<Interfaces, CaptureError> {
        let on_node = parts
            .guards
            .on_node(interface::list)
            .map_err(CaptureError::kernel("listing the node's interfaces"))?;
        let guards: BTreeMap<u32, u64> = parts.maps.guards.elements()?.into_iter().collect();
        let mut found = Interfaces::default();
        for &pod in self.namespaces.keys() {
            let Some(inside) = self.interfaces(pod) else { continue };
            let WaysOut { guardable, unguardable } = interface::ways_out(&inside, &on_node);
            for interface in guardable {
                if guards.get(&interface) != Some(&pod.0) {
                    parts.maps.guards.insert(&interface, &pod.0)?;
                    parts.guards.ensure(&parts.pins.pod(pod), interface)?;
                    found.guarded += 1;
                }
            }
            let names = unguardable.into_iter().map(|interface| (pod, interface.name));
            found.unguardable.extend(names);
        }
        Ok(found)
    }

    /// The interfaces of a pod; none when its namespace is gone.
    fn interfaces(&self, pod: NetnsCookie) -> Option<Vec<Interface>> {
        let namespace = netns::open(self.namespaces.get(&pod)?).ok()?;
        let listed = netns::inside(namespace.as_fd(), || {
            // Another pod's namespace may have been mounted at the same path.
            (sys::network_namespace_cookie().ok() == Some(pod.0)).then(interface::list)
        });
        listed.ok()??.ok()
    }

    /// The flows of open sockets in a pod, sorted; none when that cannot be told.
    fn open_flows(&self, pod: NetnsCookie) -> Option<Vec<FlowKey>> {
        let path = self.namespaces.get(&pod)?;
        let namespace = netns::open(path).ok()?;
        let connections = netns::inside(namespace.as_fd(), || {
            // Another pod's namespace may have been mounted at the same path.
            (sys::network_namespace_cookie().ok() == Some(pod.0)).then(established::list)
        });
        let connections = connections.ok()??.ok()?;
        let mut flows: Vec<_> = connections
            .into_iter()
            .filter(|connection| !connection.in_time_wait)
            .map(|connection| connection.flow)
            .collect();
        flows.sort_unstable();
        Some(flows)
    }
}

/// See [`Capture::enrolled`](crate::Capture::enrolled). Walks each map once.
pub(crate) fn enrolled(parts: Parts<'_>) -> Result<Vec<Enrolled>, CaptureError> {
    let mut guards: BTreeMap<u64, Vec<u32>> = BTreeMap::new();
    for (interface, owner) in parts.maps.guards.elements()? {
        guards.entry(owner).or_default().push(interface);
    }
    let mut addresses: BTreeMap<u64, Vec<Address>> = BTreeMap::new();
    for (address, owner) in parts.maps.addresses.elements()? {
        addresses.entry(owner).or_default().push(address);
    }
    let mut pods = Vec::new();
    for (cookie, pod) in parts.maps.pods.elements()? {
        let guards = guards.remove(&cookie).unwrap_or_default();
        let addresses = addresses.remove(&cookie).unwrap_or_default();
        pods.push(describe(parts, NetnsCookie(cookie), &pod, &guards, addresses)?);
    }
    pods.sort_by_key(|pod| pod.cookie);
    Ok(pods)
}

/// See [`Capture::find`](crate::Capture::find).
pub(crate) fn find(
    parts: Parts<'_>,
    cookie: NetnsCookie,
) -> Result<Option<Enrolled>, CaptureError> {
    let Some(pod) = parts.maps.pods.get(&cookie.0)? else { return Ok(None) };
    let guards = guarded_interfaces(parts, cookie)?;
    let owned =
        parts.maps.addresses.elements()?.into_iter().filter(|(_, owner)| *owner == cookie.0);
    let addresses = owned.map(|(address, _)| address).collect();
    describe(parts, cookie, &pod, &guards, addresses).map(Some)
}

fn describe(
    parts: Parts<'_>,
    cookie: NetnsCookie,
    pod: &Pod,
    guards: &[u32],
    mut addresses: Vec<Address>,
) -> Result<Enrolled, CaptureError> {
    let directory = parts.pins.pod(cookie);
    let mut guarded = Vec::new();
    for &interface in guards {
        if parts.guards.is_attached(&directory, interface)? {
            guarded.push(interface);
        }
    }
    let steered = match sys::open_pin(&directory.join("steer_inbound")) {
        Ok(Some(link)) => sys::link_is_attached(link.as_fd())
            .map_err(CaptureError::kernel("looking at a pod's link"))?,
        Ok(None) => false,
        Err(source) => {
            return Err(CaptureError::Kernel { what: "opening a pod's link", source });
        }
    };
    // The pod's first addresses of each family first.
    addresses.sort_by_key(|address| (*address != pod.ipv4, *address != pod.ipv6, address.octets()));
    let addresses = addresses.iter().map(Address::ip).collect();
    Ok(Enrolled { cookie, addresses, guarded, steered })
}

/// Checks all guards; how many were attached again.
pub(crate) fn verify_guards(parts: Parts<'_>) -> Result<usize, CaptureError> {
    let mut repaired = 0;
    for (interface, cookie) in parts.maps.guards.elements()? {
        if parts.maps.pods.get(&cookie)?.is_some() && parts.guards.exists(interface)? {
            let directory = parts.pins.pod(NetnsCookie(cookie));
            repaired += usize::from(parts.guards.ensure(&directory, interface)?);
        }
    }
    Ok(repaired)
}

fn uplinks(
    parts: Parts<'_>,
    pod: &PodCapture,
    namespace: &OwnedFd,
) -> Result<Vec<u32>, CaptureError> {
    let list = CaptureError::kernel("listing interfaces");
    let inside = netns::inside(namespace.as_fd(), interface::list)
        .and_then(|interfaces| interfaces)
        .map_err(list)?;
    let on_node = parts
        .guards
        .on_node(interface::list)
        .map_err(CaptureError::kernel("listing the node's interfaces"))?;
    match interface::uplinks(&inside, &on_node) {
        Uplinks::Guardable(interfaces) => Ok(interfaces),
        Uplinks::None => Err(CaptureError::NoHostInterface { netns: pod.netns.clone() }),
        Uplinks::Unguardable(interface) => Err(CaptureError::Unguardable {
            interface: interface.name,
            kind: interface.kind.unwrap_or_else(|| "device".to_owned()),
        }),
    }
}

fn first(addresses: &[Address], of_family: impl Fn(&Address) -> bool) -> Address {
    addresses.iter().copied().find(|address| of_family(address)).unwrap_or(Address::NONE)
}

/// Notes a listener of the agent. An entry vanishes with its socket.
pub(crate) fn write_listener(
    maps: &Maps,
    pod: NetnsCookie,
    port: u16,
    slot: u16,
    listener: BorrowedFd<'_>,
) -> Result<(), CaptureError> {
    let key = ListenerKey::new(pod.0, Port::new(port), slot);
    maps.listeners.insert(&key, &sys::fd_number(listener))
}

fn remove_listeners(maps: &Maps, pod: NetnsCookie) -> Result<(), CaptureError> {
    for key in maps.listeners.keys()? {
        if key.netns_cookie == pod.0 {
            maps.listeners.remove(&key)?;
        }
    }
    Ok(())
}

fn write_rules<'a>(
    parts: Parts<'a>,
    rules: &Rules<'_>,
    rule_set: u32,
    undo: &mut Undo<'a>,
) -> Result<(), CaptureError> {
    undo.push(move || remove_rules(parts, rule_set));
    for key in rules.port_keys(rule_set) {
        parts.maps.port_rules.insert(&key, &1)?;
    }
    for key in rules.network_keys(rule_set) {
        parts.maps.network_rules.insert(&key, &1)?;
    }
    Ok(())
}

/// Claims the addresses. One that belongs to another pod is taken over: it was deleted, and its
/// address given away, before it was unenrolled.
fn write_addresses<'a>(
    parts: Parts<'a>,
    pod: NetnsCookie,
    addresses: &[Address],
    undo: &mut Undo<'a>,
) -> Result<(), CaptureError> {
    for &address in addresses {
        let owner = parts.maps.addresses.get(&address)?;
        parts.maps.addresses.insert(&address, &pod.0)?;
        undo.push(move || match owner {
            Some(owner) => parts.maps.addresses.insert(&address, &owner),
            None => parts.maps.addresses.remove(&address).map(drop),
        });
    }
    Ok(())
}

/// Gives up the pod's addresses other than `kept`.
fn remove_addresses(
    parts: Parts<'_>,
    pod: NetnsCookie,
    kept: &[Address],
) -> Result<(), CaptureError> {
    for (address, owner) in parts.maps.addresses.elements()? {
        if owner == pod.0 && !kept.contains(&address) {
            parts.maps.addresses.remove(&address)?;
        }
    }
    Ok(())
}

fn remove_rules(parts: Parts<'_>, rule_set: u32) -> Result<(), CaptureError> {
    for key in parts.maps.port_rules.keys()? {
        if key.rule_set() == rule_set {
            parts.maps.port_rules.remove(&key)?;
        }
    }
    for key in parts.maps.network_rules.keys()? {
        if key.rule_set() == rule_set {
            parts.maps.network_rules.remove(&key)?;
        }
    }
    Ok(())
}

fn remove_flows(maps: &Maps, pod: NetnsCookie) -> Result<(), CaptureError> {
    for (key, state) in maps.flows.elements()? {
        if state.netns_cookie == pod.0 {
            maps.flows.remove(&key)?;
        }
    }
    Ok(())
}

fn guarded_interfaces(parts: Parts<'_>, pod: NetnsCookie) -> Result<Vec<u32>, CaptureError> {
    let guards = parts.maps.guards.elements()?;
    Ok(guards
        .into_iter()
        .filter(|(_, owner)| *owner == pod.0)
        .map(|(interface, _)| interface)
        .collect())
}

/// Permits the connections that exist. Those made while this runs are registered by the programs,
/// which observe the pod since its entry was written.
fn seed(
    parts: Parts<'_>,
    pod: NetnsCookie,
    namespace: &OwnedFd,
    addresses: &[Address],
) -> Result<(), CaptureError> {
    let connections = netns::inside(namespace.as_fd(), established::list)
        .and_then(|connections| connections)
        .map_err(CaptureError::kernel("listing the pod's connections"))?;
    let now = u64::try_from(sys::monotonic().as_nanos()).unwrap_or(u64::MAX);
    for Connection { flow, in_time_wait } in connections {
        let leaves = addresses.contains(&flow.local) && !addresses.contains(&flow.remote);
        if !leaves {
            continue;
        }
        if in_time_wait {
            parts.maps.remains.insert(&flow, &(Remains::Closed as u8))?;
        } else if parts.maps.flows.get(&flow)?.is_none() {
            parts.maps.flows.insert(&flow, &FlowState::new(pod.0, now, FlowOrigin::Seeded))?;
        }
    }
    Ok(())
}

/// Stops steering and removes the pod's directory; the guards are detached already.
fn remove_pins(directory: &Path) -> Result<(), CaptureError> {
    pins::detach(&directory.join("steer_inbound"))
        .and_then(|()| pins::remove_tree(directory))
        .map_err(CaptureError::kernel("removing a pod's pins"))
}

/// Makes sure that the pod's namespace runs this build's program.
fn steer(path: &Path, namespace: &OwnedFd, program: &OwnedFd) -> std::io::Result<()> {
    if let Some(link) = sys::open_pin(path)? {
        if sys::link_is_attached(link.as_fd())? {
            return sys::link_update(link.as_fd(), program.as_fd());
        }
        pins::remove(path)?;
    }
    let target = LinkTarget::Fd(namespace.as_fd());
    let link = sys::link_create(program.as_fd(), target, SK_LOOKUP, LinkOrder::Last)?;
    sys::pin(link.as_fd(), path)
}
