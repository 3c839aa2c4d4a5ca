//! Real tunnels to a worker, by certificates of a real authority.

use std::sync::OnceLock;

use bytes::Bytes;
use clap::Parser as _;
use hyper::client::conn::http2 as client;
use mesh_identity::{CaConfig, CaCore, IssuedAnswer, Svid, csr, tls};
use mesh_runtime::{DrainTrigger, LogConfig, Logging};
use mesh_wire::{MeshConfig, Resource, ResourceKind, Update};
use rustls_pki_types::ServerName;
use tokio_rustls::TlsConnector;

use super::*;
use crate::keys::KeyStore;
use crate::picture::World;

struct Mesh {
    ca: CaCore,
    world: World,
    picture: Arc<Picture>,
    worker: Arc<Worker>,
    /// While it is there nothing ends.
    _trigger: DrainTrigger,
}

fn id(account: &str) -> SpiffeId {
    SpiffeId::new("cluster.local", "shop", account).unwrap()
}

impl Mesh {
    fn start() -> Self {
        static LOG: OnceLock<Logging> = OnceLock::new();
        let log = LOG.get_or_init(|| {
            Logging::start(&LogConfig::default(), std::io::sink()).expect("the only log")
        });
        let settings = Settings::parse_from(["culvert-waypoint", "--gateway", "shop/waypoint"]);
        let picture = Arc::new(Picture::new(settings.resolving()));
        let world = World::new(settings.gateway.clone(), Arc::new(KeyStore::new(None).unwrap()));
        let (trigger, drain) = Drain::new();
        let common = Arc::new(Common {
            picture: Arc::clone(&picture),
            access: log.access(),
            drain,
            streams: AtomicUsize::new(0),
            settings,
        });
        let ca = CaCore::create("cluster.local", CaConfig::default(), SystemTime::now()).unwrap();
        let worker = Arc::new(Worker::new(common));
        let mut mesh = Self { ca, world, picture, worker, _trigger: trigger };
        mesh.publish();
        let svid = mesh.svid("waypoint", Duration::from_secs(3600));
        mesh.world.certified(svid);
        mesh.publish();
        mesh
    }

    /// Tells the waypoint whom to trust, as things stand at the authority.
    fn publish(&mut self) {
        let config = MeshConfig {
            trust_domain: "cluster.local".into(),
            root_pem: self.ca.root_bundle_pem().into(),
            crl_pem: self.ca.crl_pem(SystemTime::now()).unwrap().into(),
            unknown_egress: Default::default(),
            default_unknown_egress: Default::default(),
            cluster_domain: "cluster.local".into(),
            pod_networks: Vec::new(),
        };
        self.world.apply(Update {
            kind: ResourceKind::Mesh,
            removed: Vec::new(),
            resources: vec![Resource::Mesh(config)],
            rejected: Vec::new(),
            unreadable: Vec::new(),
        });
        self.world.publish(&self.picture);
    }

    fn svid(&self, account: &str, life: Duration) -> Svid {
        let (key, request) = csr(&id(account)).unwrap();
        let answer = self.ca.sign(&request, &id(account), life, SystemTime::now()).unwrap();
        IssuedAnswer::check(&answer, &id(account), key, SystemTime::now()).unwrap().svid
    }

    /// A TCP connection that the worker has taken and in which it waits for a handshake.
    async fn connection(&self) -> TcpStream {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let socket = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let (accepted, address) = listener.accept().await.unwrap();
        tokio::spawn(Arc::clone(&self.worker).tunnel(accepted, address));
        tokio::time::sleep(Duration::from_millis(50)).await;
        socket
    }

    /// Makes a tunnel of it.
    async fn tunnel(&self, socket: TcpStream, svid: &Svid) -> client::SendRequest<Empty<Bytes>> {
        let trust = Arc::clone(&self.picture.snapshot().trust);
        let config = tls::client(svid, trust, vec![id("waypoint")]);
        let name = ServerName::try_from("localhost").unwrap();
        let stream = TlsConnector::from(Arc::new(config)).connect(name, socket).await.unwrap();
        let (sender, connection) =
            client::handshake(TokioExecutor::new(), TokioIo::new(stream)).await.unwrap();
        tokio::spawn(connection);
        sender
    }
}

/// The status of a CONNECT; none when the tunnel is closed.
async fn ask(sender: &mut client::SendRequest<Empty<Bytes>>) -> Option<u16> {
    let mut request = Request::new(Empty::new());
    *request.method_mut() = Method::CONNECT;
    *request.uri_mut() = "10.96.0.1:80".parse().unwrap();
    Some(sender.send_request(request).await.ok()?.status().as_u16())
}

#[tokio::test]
async fn a_peer_revoked_during_its_handshake_is_cut() {
    let mut mesh = Mesh::start();
    let (good, bad) =
        (mesh.svid("good", Duration::from_secs(3600)), mesh.svid("bad", Duration::from_secs(3600)));
    let (first, second) = (mesh.connection().await, mesh.connection().await);
    mesh.ca.revoke_leaf(bad.serial(), SystemTime::now());
    mesh.publish();
    let mut good = mesh.tunnel(first, &good).await;
    assert_eq!(ask(&mut good).await, Some(503), "nothing is known yet");
    let bad = mesh.tunnel(second, &bad).await;
    let cut = async {
        while !bad.is_closed() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    assert!(tokio::time::timeout(Duration::from_secs(5), cut).await.is_ok(), "it is not cut");
    assert_eq!(ask(&mut good).await, Some(503));
}

#[tokio::test]
async fn a_certificate_that_has_ended_opens_no_streams() {
    let mesh = Mesh::start();
    let brief = mesh.svid("brief", Duration::from_secs(4));
    let socket = mesh.connection().await;
    let mut sender = mesh.tunnel(socket, &brief).await;
    assert_eq!(ask(&mut sender).await, Some(503), "nothing is known yet");
    let end = brief.not_after() + CLOCK_TOLERANCE + Duration::from_millis(300);
    tokio::time::sleep(end.duration_since(SystemTime::now()).unwrap()).await;
    // Told so, or already sent away.
    assert!(matches!(ask(&mut sender).await, None | Some(401)));
    assert!(ask(&mut sender).await.is_none());
}
