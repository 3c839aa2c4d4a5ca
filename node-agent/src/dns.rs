//! The pods' resolver: answers names of the mesh, and hands everything else to the resolver the pod asked.

mod exchange;
pub(crate) mod lookup;
mod meter;
mod tcp;
mod udp;

use std::collections::BTreeMap;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use mesh_dns::{Cache, CacheConfig, DnsClient, DnsDecision, Transport};
use mesh_ebpf::NetnsCookie;
use mesh_model::{PodUid, Workload, ports};
use mesh_net::Netns;
use mesh_telemetry::metric;
use socket2::{Domain, Protocol, Socket, Type};
use tokio::net::{TcpListener, UdpSocket};
use tokio::runtime::Handle;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

use self::meter::{CountedQuery, DnsMeter};
use crate::capture::KernelGate;
use crate::dataplane::Shared;
use crate::enrolment::attachment::AttachedPod;

/// Resolvers of this node's pods.
pub(crate) struct DnsDesk {
    runtime: Handle,
    gate: Arc<KernelGate>,
    /// What names are answered from; set once the data plane's picture exists.
    shared: OnceLock<Arc<Shared>>,
    /// The node's own nameservers, for pods whose own are not known.
    node_nameservers: Vec<IpAddr>,
    cluster_domain: Arc<str>,
    pods: Mutex<BTreeMap<PodUid, Arc<PodDns>>>,
    /// Sockets of a predecessor, until their pods are added.
    handed: Mutex<BTreeMap<PodUid, Vec<OwnedFd>>>,
    meter: DnsMeter,
}

/// One pod's resolver.
struct PodDns {
    namespace: Arc<str>,
    name: Arc<str>,
    netns: Arc<Netns>,
    cookie: u64,
    addresses: Vec<IpAddr>,
    nameservers: Vec<IpAddr>,
    /// Search domains as a kubelet writes them.
    search: Vec<Arc<str>>,
    /// Queries under way; further ones over UDP are dropped, as a busy resolver would.
    queries: Arc<Semaphore>,
    /// TCP connections; further ones are closed.
    connections: Arc<Semaphore>,
    /// Answers of resolvers. The pod's own: whoever rules a pod's network could forge what others would be told.
    cache: Mutex<Cache>,
    stop: CancellationToken,
    /// No more queries are taken; those under way are answered.
    taking: CancellationToken,
    /// Second descriptors of its sockets, for a successor; the listener first.
    sockets: OnceLock<Vec<OwnedFd>>,
}

/// Queries of one pod under way at once.
const MAX_QUERIES: usize = 256;
/// TCP connections of one pod to its resolver.
const MAX_CONNECTIONS: usize = 128;
/// Answers kept of one pod, and their bytes: a few hundred pods' caches stay within the agent's budget of memory.
const MAX_CACHED_ANSWERS: usize = 256;
const MAX_CACHED_BYTES: usize = 64 * 1024;
/// Port of resolvers.
const DNS_PORT: u16 = 53;

impl std::fmt::Debug for DnsDesk {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("DnsDesk").finish_non_exhaustive()
    }
}

impl Drop for PodDns {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

impl DnsDesk {
    /// Resolvers that run on `runtime`.
    pub(crate) fn new(
        runtime: Handle,
        gate: Arc<KernelGate>,
        nameservers: Vec<IpAddr>,
        cluster_domain: &str,
    ) -> Self {
        Self {
            runtime,
            gate,
            shared: OnceLock::new(),
            node_nameservers: nameservers,
            cluster_domain: cluster_domain.into(),
            pods: Mutex::default(),
            handed: Mutex::default(),
            meter: DnsMeter::default(),
        }
    }

    /// Says what names are answered from. Before that every query is handed on.
    pub(crate) fn answer_from(&self, shared: Arc<Shared>) {
        if self.shared.set(shared).is_err() {
            tracing::debug!("the resolver's picture was set before");
        }
    }

    /// Opens a pod's resolver; for a pod that has one for the same namespace and addresses nothing changes.
    ///
    /// # Errors
    /// When its port is taken in the pod.
    pub(crate) fn add(self: &Arc<Self>, pod: &AttachedPod) -> io::Result<()> {
        let uid = &pod.pod.uid;
        let addresses: Vec<IpAddr> = pod.addresses.iter().copied().collect();
        let serves_already = self.lock().get(uid).is_some_and(|served| {
            served.cookie == pod.netns.cookie() && served.addresses == addresses
        });
        if serves_already {
            return Ok(());
        }
        self.remove(uid);
        let nameservers = if pod.nameservers.is_empty() {
            self.node_nameservers.clone()
        } else {
            pod.nameservers.iter().copied().collect()
        };
        let served = Arc::new(PodDns {
            namespace: pod.pod.name.namespace().into(),
            name: pod.pod.name.name().into(),
            netns: Arc::clone(&pod.netns),
            cookie: pod.netns.cookie(),
            addresses,
            nameservers,
            search: self.search_domains(pod.pod.name.namespace()),
            queries: Arc::new(Semaphore::new(MAX_QUERIES)),
            connections: Arc::new(Semaphore::new(MAX_CONNECTIONS)),
            cache: Mutex::new(Cache::new(CacheConfig {
                max_entries: MAX_CACHED_ANSWERS,
                max_bytes: MAX_CACHED_BYTES,
                ..CacheConfig::default()
            })),
            stop: CancellationToken::new(),
            taking: CancellationToken::new(),
            sockets: OnceLock::new(),
        });
        let _runtime = self.runtime.enter();
        let handed = self.handed.lock().unwrap_or_else(PoisonError::into_inner).remove(uid);
        let mut handed = handed.into_iter().flatten();
        let listener = match handed.next() {
            Some(fd) => TcpListener::from_std(fd.into())?,
            None => self.listener(&served)?,
        };
        let mut sockets =
            handed.map(|fd| UdpSocket::from_std(fd.into())).collect::<io::Result<Vec<_>>>()?;
        // Bound to each address, so that an answer comes from where the question went.
        for address in served.first_of_each_family() {
            let address = SocketAddr::new(address, ports::DNS);
            if !sockets.iter().any(|socket| socket.local_addr().is_ok_and(|its| its == address)) {
                sockets.push(self.udp_socket(&served, address)?);
            }
        }
        let mut duplicates = vec![listener.as_fd().try_clone_to_owned()?];
        for socket in &sockets {
            duplicates.push(socket.as_fd().try_clone_to_owned()?);
        }
        if served.sockets.set(duplicates).is_err() {
            tracing::debug!("a pod's resolver sockets were noted before");
        }
        self.runtime.spawn(tcp::serve(Arc::clone(self), Arc::downgrade(&served), listener));
        for socket in sockets {
            let socket = Arc::new(socket);
            self.runtime.spawn(udp::serve(Arc::clone(self), Arc::downgrade(&served), socket));
        }
        self.lock().insert(uid.clone(), served);
        Ok(())
    }

    /// Closes a pod's resolver.
    pub(crate) fn remove(&self, uid: &PodUid) {
        if let Some(served) = self.lock().remove(uid) {
            served.stop.cancel();
        }
    }

    /// Duplicates of all pods' sockets, for a successor.
    pub(crate) fn written(&self) -> io::Result<Vec<(PodUid, Vec<OwnedFd>)>> {
        let duplicate = |(uid, pod): (&PodUid, &Arc<PodDns>)| {
            let sockets = pod.sockets.get().into_iter().flatten();
            let fds = sockets.map(OwnedFd::try_clone).collect::<io::Result<_>>()?;
            Ok((uid.clone(), fds))
        };
        self.lock().iter().map(duplicate).collect()
    }

    /// Sockets of a predecessor; they are used when their pods are added, and closed when the desk is.
    pub(crate) fn take_over(&self, sockets: impl IntoIterator<Item = (PodUid, Vec<OwnedFd>)>) {
        self.handed.lock().unwrap_or_else(PoisonError::into_inner).extend(sockets);
    }

    /// Takes no more queries: a successor has the sockets.
    pub(crate) fn stop_taking(&self) {
        for pod in self.lock().values() {
            pod.taking.cancel();
        }
    }

    /// Waits until what was asked is answered, for `patience` at most.
    pub(crate) async fn last_answers(&self, patience: Duration) {
        let pods: Vec<Arc<PodDns>> = self.lock().values().cloned().collect();
        let all = async {
            for pod in &pods {
                let queries = u32::try_from(MAX_QUERIES).unwrap_or(u32::MAX);
                let connections = u32::try_from(MAX_CONNECTIONS).unwrap_or(u32::MAX);
                drop(pod.queries.acquire_many(queries).await);
                drop(pod.connections.acquire_many(connections).await);
            }
        };
        if tokio::time::timeout(patience, all).await.is_err() {
            tracing::debug!("questions to resolvers were left unanswered");
        }
    }

    /// What to do with a pod's query, which is counted.
    fn decide(
        &self,
        pod: &PodDns,
        query: &[u8],
        transport: Transport,
    ) -> (DnsDecision, CountedQuery) {
        let snapshot = self.shared.get().map(|shared| shared.snapshot.load());
        let known = snapshot.as_ref().and_then(|snapshot| {
            let workload = snapshot.index.workload_by_name(&pod.namespace, &pod.name)?;
            Some((snapshot, workload))
        });
        let counted = self.meter.asked(known.map(|(_, workload)| &**workload), query, transport);
        // Without its workload the pod's network is not known, and so not which addresses it can reach.
        let Some((snapshot, workload)) = known else { return (DnsDecision::Forward, counted) };
        let client = DnsClient {
            namespace: Arc::clone(&pod.namespace),
            network: workload.network.clone(),
            search: pod.search.clone(),
            cluster_domain: Arc::clone(&self.cluster_domain),
        };
        (mesh_dns::answer(query, &client, &snapshot.index, transport), counted)
    }

    /// A pod's workload, where the controller has told about it.
    fn workload_of(&self, pod: &PodDns) -> Option<Arc<Workload>> {
        let snapshot = self.shared.get()?.snapshot.load();
        snapshot.index.workload_by_name(&pod.namespace, &pod.name).cloned()
    }

    /// Where a captured UDP query was going.
    fn resolver_of(&self, pod: &PodDns, client: SocketAddr) -> Option<SocketAddr> {
        let asked = self.gate.capture().orig_resolver(NetnsCookie(pod.cookie), client);
        match asked {
            Ok(Some(resolver)) => usable(pod, resolver),
            Ok(None) => pod.fallback(client),
            Err(error) => {
                tracing::debug!(%error, "the resolver of a query is not known");
                pod.fallback(client)
            }
        }
    }

    /// Where a captured TCP connection to a resolver was going.
    fn tcp_resolver_of(&self, pod: &PodDns, client: SocketAddr) -> Option<SocketAddr> {
        let asked = self.gate.capture().orig_dst(NetnsCookie(pod.cookie), ports::DNS, client);
        match asked {
            Ok(Some(resolver)) => usable(pod, resolver),
            Ok(None) | Err(_) => pod.fallback(client),
        }
    }

    /// Source: the kubelet's `ClusterFirst` policy.
    fn search_domains(&self, namespace: &str) -> Vec<Arc<str>> {
        let domain = &self.cluster_domain;
        let namespaced = format!("{namespace}.svc.{domain}");
        vec![namespaced.into(), format!("svc.{domain}").into(), Arc::clone(domain)]
    }

    fn pod(&self, uid: &PodUid) -> Option<Arc<PodDns>> {
        self.lock().get(uid).cloned()
    }

    fn listener(&self, pod: &PodDns) -> io::Result<TcpListener> {
        let open = |address: SocketAddr| {
            let socket = self.socket(pod, address, Type::STREAM, Protocol::TCP)?;
            socket.listen(128)?;
            self.gate
                .capture()
                .set_listener(NetnsCookie(pod.cookie), ports::DNS, 0, socket.as_fd())
                .map_err(io::Error::other)?;
            TcpListener::from_std(socket.into())
        };
        match open((Ipv6Addr::UNSPECIFIED, ports::DNS).into()) {
            Err(error) if no_ipv6(&error) => open((Ipv4Addr::UNSPECIFIED, ports::DNS).into()),
            opened => opened,
        }
    }

    /// A UDP socket of the agent in the pod, bound to `address`.
    fn udp_socket(&self, pod: &PodDns, address: SocketAddr) -> io::Result<UdpSocket> {
        UdpSocket::from_std(self.socket(pod, address, Type::DGRAM, Protocol::UDP)?.into())
    }

    fn socket(
        &self,
        pod: &PodDns,
        address: SocketAddr,
        kind: Type,
        protocol: Protocol,
    ) -> io::Result<Socket> {
        pod.netns.enter(|| {
            let socket =
                Socket::new(Domain::for_address(address), kind.nonblocking(), Some(protocol))?;
            // In an enrolled pod only labelled sockets may bind the agent's ports.
            self.gate.capture().label(socket.as_fd())?;
            if address.is_ipv6() {
                socket.set_only_v6(!address.ip().is_unspecified())?;
            }
            if address.port() != 0 {
                socket.set_reuse_address(true)?;
                socket.set_reuse_port(true)?;
            }
            socket.bind(&address.into())?;
            Ok(socket)
        })?
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<PodUid, Arc<PodDns>>> {
        self.pods.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl PodDns {
    fn cache(&self) -> MutexGuard<'_, Cache> {
        self.cache.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn first_of_each_family(&self) -> impl Iterator<Item = IpAddr> {
        let v4 = self.addresses.iter().find(|ip| ip.is_ipv4());
        let v6 = self.addresses.iter().find(|ip| ip.is_ipv6());
        [v4, v6].into_iter().flatten().copied()
    }

    /// The address the agent asks a resolver from.
    fn source_for(&self, resolver: SocketAddr) -> Option<IpAddr> {
        self.first_of_each_family().find(|ip| ip.is_ipv4() == resolver.is_ipv4())
    }

    /// A nameserver of the pod, in the family the client used if there is one.
    fn fallback(&self, client: SocketAddr) -> Option<SocketAddr> {
        let reachable = |ip: &&IpAddr| {
            self.source_for(SocketAddr::new(**ip, DNS_PORT)).is_some() && !ip.is_loopback()
        };
        let mut nameservers = self.nameservers.iter().filter(reachable);
        let first = nameservers.clone().next();
        nameservers
            .find(|ip| ip.is_ipv4() == client.ip().to_canonical().is_ipv4())
            .or(first)
            .map(|ip| SocketAddr::new(*ip, DNS_PORT))
    }
}

/// A resolver that is the agent itself would be asked for ever.
fn usable(pod: &PodDns, resolver: SocketAddr) -> Option<SocketAddr> {
    let resolver = SocketAddr::new(resolver.ip().to_canonical(), resolver.port());
    let own = pod.addresses.contains(&resolver.ip()) && ports::is_agent_port(resolver.port());
    (!own).then_some(resolver)
}

fn no_ipv6(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EAFNOSUPPORT | libc::EADDRNOTAVAIL))
}

fn count(outcome: &'static str) {
    metrics::counter!(metric::DNS_QUERIES.name, "outcome" => outcome).increment(1);
}
