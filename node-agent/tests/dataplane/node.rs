//! Two agents' data planes with real sockets and certificates; only capture is a table.

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::os::fd::BorrowedFd;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant, SystemTime};

use arc_swap::ArcSwap;
use culvert_agent::dataplane::{
    Changed, DataPlane, DataPlaneConfig, FlowEvent, FlowSink, HostResolver, IdentityDesk,
    KernelCapture, PodSockets, ResolveAnswer, Shared, Snapshot,
};
use mesh_authorize::PolicySet;
use mesh_identity::{CaConfig, CaCore, IssuedAnswer, Svid, TrustBundle, csr};
use mesh_model::{NetworkId, PodUid, SpiffeId, TunnelProtocol, Workload};
use mesh_resolve::{IndexDelta, ResolveSettings, WorkloadIndex};
use mesh_telemetry::FlowRecord;
use socket2::{SockRef, Socket};
use tokio::runtime::Runtime;

use crate::netlab::PodNet;

/// Capture as a table of what was dialled from where.
#[derive(Default)]
pub(crate) struct Table(Mutex<HashMap<SocketAddr, SocketAddr>>);

impl Table {
    fn note(&self, client: SocketAddr, dialled: SocketAddr) {
        self.0.lock().unwrap().insert(client, dialled);
    }
}

impl KernelCapture for Table {
    fn orig_dst(&self, _cookie: u64, client: SocketAddr) -> io::Result<Option<SocketAddr>> {
        Ok(self.0.lock().unwrap().get(&client).copied())
    }

    fn label(&self, _fd: BorrowedFd<'_>) -> io::Result<()> {
        Ok(())
    }

    fn add_listener(
        &self,
        _pod: &PodSockets,
        port: u16,
        _slot: u16,
        listener: BorrowedFd<'_>,
    ) -> io::Result<()> {
        if port == mesh_model::ports::INBOUND_PLAINTEXT {
            // For `PodNet::steer_plaintext`.
            SockRef::from(&listener).set_ip_transparent_v6(true)?;
        }
        Ok(())
    }

    fn switch_on(&self, _pod: &PodSockets, _slots: u16) -> io::Result<()> {
        Ok(())
    }
}

/// Keeps what is reported.
#[derive(Default)]
pub(crate) struct Ledger {
    events: Mutex<Vec<FlowEvent>>,
    news: Condvar,
}

impl FlowSink for Ledger {
    fn report(&self, event: FlowEvent) -> bool {
        self.events.lock().unwrap().push(event);
        self.news.notify_all();
        true
    }
}

impl Ledger {
    /// Waits until `count` flows have ended, and returns their records in the order of accept.
    pub(crate) fn ended(&self, count: usize) -> Vec<FlowRecord> {
        let deadline = Instant::now() + Duration::from_secs(20);
        let mut events = self.events.lock().unwrap();
        loop {
            let mut records: Vec<FlowRecord> = events
                .iter()
                .filter_map(|event| match event {
                    FlowEvent::Closed { record, .. } => Some((**record).clone()),
                    FlowEvent::Opened { .. }
                    | FlowEvent::Moved { .. }
                    | FlowEvent::TakenOver { .. }
                    | FlowEvent::Noted { .. }
                    | FlowEvent::Denied(_) => None,
                })
                .collect();
            if records.len() >= count {
                records.sort_by_key(|record| record.id);
                return records;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            assert!(!left.is_zero(), "{} of {count} flows ended: {records:#?}", records.len());
            events = self.news.wait_timeout(events, left).unwrap().0;
        }
    }
}

struct Nobody;

impl IdentityDesk for Nobody {
    fn want(&self, _id: &SpiffeId) {}
}

impl HostResolver for Nobody {
    fn resolve(&self, _pod: &PodUid, _hostname: &str, answer: ResolveAnswer) {
        answer(Ok(Vec::new()));
    }
}

/// One node: a data plane with one pod.
pub(crate) struct Node {
    pub(crate) plane: DataPlane,
    pub(crate) shared: Arc<Shared>,
    pub(crate) ledger: Arc<Ledger>,
    pub(crate) pod: PodNet,
    pub(crate) uid: PodUid,
    table: Arc<Table>,
}

impl Node {
    /// Dials `target` from the pod, captured.
    pub(crate) fn dial(&self, target: SocketAddr) -> io::Result<TcpStream> {
        self.dial_by(self.pod.client_socket(target), target)
    }

    /// Dials `target` by a socket made before.
    pub(crate) fn dial_by(&self, socket: Socket, target: SocketAddr) -> io::Result<TcpStream> {
        self.note(&socket, target);
        Self::dial_noted(socket)
    }

    /// Has capture know what `socket` dials.
    pub(crate) fn note(&self, socket: &Socket, target: SocketAddr) {
        self.table.note(socket.local_addr().unwrap().as_socket().unwrap(), target);
    }

    /// Dials by a socket of which capture knows where to.
    pub(crate) fn dial_noted(socket: Socket) -> io::Result<TcpStream> {
        connect_to_capture(&socket, socket.local_addr()?.as_socket().unwrap().ip())?;
        let stream: TcpStream = socket.into();
        stream.set_read_timeout(Some(Duration::from_secs(15)))?;
        stream.set_nodelay(true)?;
        Ok(stream)
    }

    /// Connects to the pod's outbound port, and does not note where to.
    pub(crate) fn dial_unnoted(&self, target: SocketAddr) -> TcpStream {
        let socket = self.pod.client_socket(target);
        let own = socket.local_addr().unwrap().as_socket().unwrap();
        connect_to_capture(&socket, own.ip()).unwrap();
        socket.into()
    }

    /// Keeps capture from answering until the guard is dropped.
    pub(crate) fn hold_capture(&self) -> MutexGuard<'_, HashMap<SocketAddr, SocketAddr>> {
        self.table.0.lock().unwrap()
    }

    /// Changes the snapshot and announces it.
    pub(crate) fn change(&self, what: Changed, change: impl Fn(&mut Snapshot)) {
        self.shared.snapshot.rcu(|snapshot| {
            let mut next = Snapshot::clone(snapshot);
            change(&mut next);
            next
        });
        self.plane.snapshot_changed(what);
    }
}

fn connect_to_capture(socket: &Socket, own: IpAddr) -> io::Result<()> {
    socket.connect(&SocketAddr::new(own, 15001).into())
}

/// Two nodes and their authority.
pub(crate) struct Mesh {
    pub(crate) runtime: Runtime,
    pub(crate) ca: CaCore,
    pub(crate) client: Node,
    pub(crate) server: Node,
}

pub(crate) fn identity(account: &str) -> SpiffeId {
    SpiffeId::new("cluster.local", "shop", account).unwrap()
}

/// A certificate for `id`.
pub(crate) fn issue(ca: &CaCore, id: &SpiffeId) -> Arc<Svid> {
    issue_until(ca, id, SystemTime::now() + DAY)
}

/// A certificate for `id` that ends at `end`.
pub(crate) fn issue_until(ca: &CaCore, id: &SpiffeId, end: SystemTime) -> Arc<Svid> {
    let (key, request) = csr(id).unwrap();
    let chain = ca.sign(&request, id, DAY, end - DAY).unwrap();
    Arc::new(IssuedAnswer::check(&chain, id, key, SystemTime::now()).unwrap().svid)
}

const DAY: Duration = Duration::from_secs(86_400);

pub(crate) fn workload(name: &str, addresses: &[IpAddr]) -> Workload {
    let mut workload = Workload::named(&format!("Kubernetes//Pod/shop/{name}"), "shop", name);
    workload.service_account = name.into();
    workload.workload_name = name.into();
    workload.canonical_name = name.into();
    workload.addresses = addresses.to_vec();
    workload.network = NetworkId::default();
    workload.tunnel_protocol = TunnelProtocol::Hbone;
    workload
}

impl Mesh {
    pub(crate) fn new() -> Self {
        Self::with(DataPlaneConfig { workers: 2, ..DataPlaneConfig::default() })
    }

    pub(crate) fn with(config: DataPlaneConfig) -> Self {
        let runtime = Runtime::new().unwrap();
        let ca = CaCore::create("cluster.local", CaConfig::default(), SystemTime::now()).unwrap();
        let (client_net, server_net) = PodNet::pair();
        let mut index = WorkloadIndex::default();
        index.apply(IndexDelta {
            workloads: vec![
                workload("client", &client_net.addresses),
                workload("server", &server_net.addresses),
            ],
            ..IndexDelta::default()
        });
        let trust = TrustBundle::from_pem("cluster.local", &ca.root_bundle_pem(), "").unwrap();
        let node = |name: &str, pod: PodNet| {
            let id = identity(name);
            let snapshot = Snapshot {
                index: index.clone(),
                policies: PolicySet::default(),
                synced: true,
                settings: ResolveSettings::default(),
                trust: Arc::new(trust.clone()),
                svids: std::iter::once((id.clone(), issue(&ca, &id))).collect(),
            };
            let ledger = Arc::new(Ledger::default());
            let table = Arc::new(Table::default());
            let shared = Arc::new(Shared {
                snapshot: ArcSwap::from_pointee(snapshot),
                flows: Arc::clone(&ledger) as Arc<dyn FlowSink>,
                identities: Arc::new(Nobody),
                resolver: Arc::new(Nobody),
            });
            let capture = Arc::clone(&table) as Arc<dyn KernelCapture>;
            let plane = DataPlane::start(config.clone(), Arc::clone(&shared), capture).unwrap();
            let uid = PodUid::new(&format!("uid-of-{name}"));
            let sockets = PodSockets {
                uid: uid.clone(),
                namespace: "shop".into(),
                name: name.into(),
                service_account: name.into(),
                netns: Arc::clone(&pod.netns),
                cookie: pod.netns.cookie(),
                addresses: pod.addresses.clone(),
                capture_inbound: true,
            };
            runtime.block_on(plane.add_pod(sockets)).unwrap();
            Node { plane, shared, ledger, pod, uid, table }
        };
        let client = node("client", client_net);
        let server = node("server", server_net);
        Self { runtime, ca, client, server }
    }
}
