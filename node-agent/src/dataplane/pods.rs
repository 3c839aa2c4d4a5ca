//! Enrolled pods, as all workers share them.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use mesh_model::Workload;
use mesh_net::driver::ops::ListenerTag;

use crate::dataplane::shared::{PodSockets, Snapshot};

/// Which of a pod's three ports a listener serves.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Port {
    /// 15001: captured connections of the pod.
    Outbound,
    /// 15006: captured plaintext connections to the pod.
    Plaintext,
    /// 15008: tunnels to the pod.
    Hbone,
}

/// A pod's number within the data plane; never given twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct PodKey(pub(super) u64);

impl PodKey {
    /// The tag of the pod's listener on `port`.
    pub(super) const fn tag(self, port: Port) -> ListenerTag {
        let port = match port {
            Port::Outbound => 0,
            Port::Plaintext => 1,
            Port::Hbone => 2,
        };
        ListenerTag(self.0 << 2 | port)
    }

    /// The pod and port behind a tag of [`tag`](Self::tag).
    pub(super) const fn of(tag: ListenerTag) -> (Self, Port) {
        let port = match tag.0 & 3 {
            0 => Port::Outbound,
            1 => Port::Plaintext,
            _ => Port::Hbone,
        };
        (Self(tag.0 >> 2), port)
    }
}

/// One enrolled pod.
#[derive(Debug)]
pub(super) struct Pod {
    pub(super) key: PodKey,
    pub(super) sockets: PodSockets,
    /// Flows open, over all workers.
    open: AtomicUsize,
    /// Until when its last flows may go on, once it leaves.
    leaves_at: Mutex<Option<Instant>>,
    /// Clients of captured plaintext connections that live in the pod's namespace: their ports must not be used
    /// again for a connection to the application.
    plaintext_clients: Mutex<BTreeSet<SocketAddr>>,
}

impl Pod {
    pub(super) const fn new(key: PodKey, sockets: PodSockets) -> Self {
        Self {
            key,
            sockets,
            open: AtomicUsize::new(0),
            leaves_at: Mutex::new(None),
            plaintext_clients: Mutex::new(BTreeSet::new()),
        }
    }

    /// Takes one of the pod's flow slots; none when all are taken.
    pub(super) fn admit(self: &Arc<Self>, limit: usize) -> Option<FlowSlot> {
        let before = self.open.fetch_add(1, Ordering::Relaxed);
        let slot = FlowSlot(Arc::clone(self));
        (before < limit).then_some(slot)
    }

    /// Takes a slot for a flow that a predecessor admitted.
    pub(super) fn admit_handed(self: &Arc<Self>) -> FlowSlot {
        self.open.fetch_add(1, Ordering::Relaxed);
        FlowSlot(Arc::clone(self))
    }

    /// Notes that the pod leaves.
    pub(super) fn leaves(&self, at: Instant) {
        *self.leaves_at.lock().unwrap_or_else(PoisonError::into_inner) = Some(at);
    }

    /// Until when its last flows may go on; none for a pod that stays.
    pub(super) fn leaves_at(&self) -> Option<Instant> {
        *self.leaves_at.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Flows open.
    pub(super) fn open(&self) -> usize {
        self.open.load(Ordering::Relaxed)
    }

    /// True for an address of the pod.
    pub(super) fn owns(&self, ip: IpAddr) -> bool {
        self.sockets.addresses.contains(&ip)
    }

    /// The pod's address of the family of `other`.
    pub(super) fn address_like(&self, other: SocketAddr) -> Option<IpAddr> {
        self.sockets.addresses.iter().copied().find(|ip| ip.is_ipv4() == other.is_ipv4())
    }

    /// The pod's workload, when the index has it. One of the same name that is somebody else's is not it.
    pub(super) fn workload(&self, snapshot: &Snapshot) -> Option<Arc<Workload>> {
        self.sockets.workload(snapshot)
    }

    /// Remembers that `client` has a captured plaintext connection here, until the result is dropped.
    pub(super) fn plaintext_client(self: &Arc<Self>, client: SocketAddr) -> PlaintextClient {
        self.clients().insert(client);
        PlaintextClient { pod: Arc::clone(self), client }
    }

    /// True when `client` has any captured plaintext connection here.
    pub(super) fn has_plaintext_client(&self, client: IpAddr) -> bool {
        let clients = self.clients();
        clients.range(SocketAddr::new(client, 0)..).next().is_some_and(|first| first.ip() == client)
    }

    /// True when `client` has a captured plaintext connection from `port` here.
    pub(super) fn is_port_taken(&self, client: IpAddr, port: u16) -> bool {
        self.clients().contains(&SocketAddr::new(client, port))
    }

    fn clients(&self) -> std::sync::MutexGuard<'_, BTreeSet<SocketAddr>> {
        // The set is whole at every moment, whatever panicked.
        self.plaintext_clients.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Plaintext clients at present, for tests of the accounting.
    #[cfg(test)]
    fn plaintext_client_count(&self) -> usize {
        self.clients().len()
    }
}

impl PodSockets {
    /// The pod's workload, when the index has it. One of the same name that is somebody else's is not it.
    pub(super) fn workload(&self, snapshot: &Snapshot) -> Option<Arc<Workload>> {
        let workload = snapshot.index.workload_by_name(&self.namespace, &self.name)?;
        let same_account = workload.service_account == self.service_account;
        let same_address = workload.addresses.is_empty()
            || workload.addresses.iter().any(|ip| self.addresses.contains(ip));
        (same_account && same_address).then(|| Arc::clone(workload))
    }
}

/// One flow counted against its pod.
#[derive(Debug)]
pub(super) struct FlowSlot(Arc<Pod>);

impl Drop for FlowSlot {
    fn drop(&mut self) {
        self.0.open.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Keeps a plaintext client's port from being used again.
#[derive(Debug)]
pub(super) struct PlaintextClient {
    pod: Arc<Pod>,
    client: SocketAddr,
}

impl Drop for PlaintextClient {
    fn drop(&mut self) {
        self.pod.clients().remove(&self.client);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use mesh_model::PodUid;
    use mesh_net::Netns;

    fn pod() -> Arc<Pod> {
        let netns = Arc::new(Netns::current().unwrap());
        let sockets = PodSockets {
            uid: PodUid::new("u"),
            namespace: "shop".into(),
            name: "cart".into(),
            service_account: "default".into(),
            cookie: netns.cookie(),
            netns,
            addresses: vec!["10.0.0.1".parse().unwrap()],
            capture_inbound: true,
        };
        Arc::new(Pod::new(PodKey(7), sockets))
    }

    #[test]
    fn tags_name_pod_and_port() {
        for port in [Port::Outbound, Port::Plaintext, Port::Hbone] {
            assert_eq!(PodKey::of(PodKey(12_345).tag(port)), (PodKey(12_345), port));
        }
    }

    #[test]
    fn slots_end_at_the_limit_and_come_back() {
        let pod = pod();
        let first = pod.admit(2).unwrap();
        let second = pod.admit(2).unwrap();
        assert!(pod.admit(2).is_none());
        assert_eq!(pod.open(), 2);
        drop(first);
        assert!(pod.admit(2).is_some());
        drop(second);
        assert_eq!(pod.open(), 0);
    }

    #[test]
    fn ports_of_plaintext_clients_are_taken_while_they_last() {
        let pod = pod();
        let client: SocketAddr = "10.0.0.9:4000".parse().unwrap();
        let guard = pod.plaintext_client(client);
        assert!(pod.is_port_taken(client.ip(), 4000));
        assert!(!pod.is_port_taken(client.ip(), 4001));
        assert!(pod.has_plaintext_client(client.ip()));
        for other in ["10.0.0.8", "10.0.0.10"] {
            assert!(!pod.has_plaintext_client(other.parse().unwrap()));
        }
        drop(guard);
        assert!(!pod.is_port_taken(client.ip(), 4000));
        assert_eq!(pod.plaintext_client_count(), 0);
    }
}
