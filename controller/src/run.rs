//! A running controller: wiring, the listener, the authority's clockwork, and the end.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::unix::fs::DirBuilderExt as _;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result};
use arc_swap::ArcSwap;
use kube::Client;
use mesh_authorize::UnknownEgress;
use mesh_identity::tls::control_server;
use mesh_runtime::{AdminLimits, AdminListener, AdminServer, Drain, LogHandle, Metrics, Readiness};
use mesh_telemetry::metric;
use mesh_wire::pb::auth::istio_certificate_service_server::IstioCertificateServiceServer;
use mesh_wire::pb::mesh::enrolment_server::EnrolmentServer;
use rustls::ServerConfig;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, oneshot};
use tokio::task::{JoinError, JoinHandle, JoinSet};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Server;
use tracing::{debug, error, info, warn};

use crate::admin;
use crate::ca::Certificates;
use crate::ca::authenticate::Authenticate;
use crate::ca::authority::Authority;
use crate::ca::enrolment::Enrolments;
use crate::ca::revocations::Revocations;
use crate::ca::tokens::Tokens;
use crate::cli::{Egress, RunArgs, Source};
use crate::cluster::ca_secret::CaSecret;
use crate::cluster::expiry;
use crate::cluster::lease::Election;
use crate::cluster::roots::RootConfigMap;
use crate::cluster::status::StatusWriter;
use crate::cluster::token_review::TokenReviews;
use crate::cluster::uncaptured::{self, Uncaptured};
use crate::cluster::waypoints::{WaypointSettings, Waypoints};
use crate::door::{Door, DoorLimits, Watched};
use crate::index::{Index, IndexSettings};
use crate::mesh::{Mesh, SharedMesh, Trust};
use crate::publish::Discovery;
use crate::source::directory::{self, DirectorySettings};
use crate::source::kubernetes::{self, KubernetesSettings};
use crate::state_dir::{Occupancy, StateDir};

/// Lifetime of the listener's certificate; it is replaced at half of it and whenever the authority changes.
const SERVER_TTL: Duration = Duration::from_secs(30 * 24 * 3600);
/// How often the authority's file is looked at.
const CA_TICK: Duration = Duration::from_secs(1);
/// How often what the cluster holds of the authority is looked at; a root's overlap is much longer.
const CLUSTER_TICK: Duration = Duration::from_secs(5);
/// Calls at once on one connection; an agent has a stream and a certificate request for each of its pods' accounts.
const MAX_CALLS: u32 = 256;
/// Largest headers of a call, bytes; a service account's token is about one KiB.
const MAX_HEADER_BYTES: u32 = 64 << 10;
/// How long streams may take to end.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(5);
/// How long giving back the Lease may take.
const RESIGN_TIMEOUT: Duration = Duration::from_secs(3);

/// A controller that is listening.
pub struct Controller {
    mesh: SharedMesh,
    authority: Arc<Authority>,
    revocations: Arc<Revocations>,
    listener: TcpListener,
    tls: Arc<ArcSwap<ServerConfig>>,
    discovery: Discovery,
    certificates: Certificates,
    enrolments: Enrolments,
    secret: Option<CaSecret>,
    roots: Option<RootConfigMap>,
    source: SourceEnd,
    client: Option<Client>,
    uncaptured: Uncaptured,
    args: RunArgs,
    /// Until the process ends: nobody else runs on the state directory.
    _occupancy: Occupancy,
}

/// Closed when nothing reads the source any more.
type SourceEnd = oneshot::Receiver<()>;

impl std::fmt::Debug for Controller {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Controller").field("args", &self.args).finish_non_exhaustive()
    }
}

impl Controller {
    /// Opens the state, starts the source and binds the listener. What goes wrong here is a mistake in the settings.
    ///
    /// # Errors
    /// When the state directory, the source or the address cannot be used.
    pub async fn start(args: RunArgs, drain: &Drain) -> Result<Self> {
        raise_descriptor_limit().context("raising the limit of descriptors")?;
        let files = StateDir::open(&args.state_dir)
            .with_context(|| format!("state directory {}", args.state_dir.display()))?;
        let occupancy = files.occupy().context("--state-dir")?;
        let client = client(&args).await?;
        let mut secret = match (&args.ca_secret, &client) {
            (Some(name), Some(client)) => Some(CaSecret::new(client, name, files.clone())),
            (Some(_), None) | (None, _) => None,
        };
        agree(&mut secret).await;
        let now = SystemTime::now();
        let opened = match &args.ca_dir {
            Some(folder) => Authority::open_mounted(folder, &args.trust_domain, now),
            None => Authority::open(files.clone(), &args.trust_domain, now),
        };
        let authority = Arc::new(
            opened
                .and_then(|authority| authority.with_longest_life(args.max_certificate_ttl, now))
                .context("certificate authority")?,
        );
        // A new authority may have been made twice at once: only one is in the Secret.
        agree(&mut secret).await;
        authority.tick(now).context("certificate authority")?;
        let tokens = Arc::new(Tokens::open(files.clone()).context("join tokens")?);
        let mesh = Arc::new(Mesh::new(index_settings(&args)));
        let revocations = Revocations::open(args.crl_file.clone(), files.clone());
        let revocations = Arc::new(revocations.context("--crl-file")?);
        set_trust(&mesh, &authority, &revocations);
        let tls = Arc::new(ArcSwap::from_pointee(server_config(&authority, &args)?));
        let listener = TcpListener::bind(args.listen)
            .await
            .with_context(|| format!("listen on {}", args.listen))?;
        let source = start_source(&args, client.as_ref(), files, &mesh)?;
        let own: Arc<dyn Authenticate> = Arc::clone(&tokens) as Arc<dyn Authenticate>;
        let authenticate: Arc<dyn Authenticate> = match (&args.agent_account, &client) {
            (Some(account), Some(client)) => {
                let audience = args.token_audience.clone();
                Arc::new(TokenReviews::new(client, account.clone(), audience, own))
            }
            (Some(_), None) | (None, _) => own,
        };
        let roots = match (&args.root_config_map, &client) {
            (Some(name), Some(client)) => Some(RootConfigMap::new(client, name)),
            (Some(_), None) | (None, _) => None,
        };
        let uncaptured = Uncaptured::default();
        Ok(Self {
            discovery: Discovery::new(
                Arc::clone(&mesh),
                Arc::clone(&authenticate),
                args.debounce,
                drain.clone(),
            ),
            certificates: Certificates::new(
                Arc::clone(&mesh),
                Arc::clone(&authority),
                Arc::clone(&authenticate),
            ),
            enrolments: Enrolments::new(
                Arc::clone(&mesh),
                tokens,
                authenticate,
                uncaptured.clone(),
            ),
            secret,
            roots,
            source,
            client,
            uncaptured,
            mesh,
            authority,
            revocations,
            listener,
            tls,
            args,
            _occupancy: occupancy,
        })
    }

    /// The mesh it controls.
    #[must_use]
    pub const fn mesh(&self) -> &SharedMesh {
        &self.mesh
    }

    /// Where agents reach it.
    ///
    /// # Errors
    /// When the socket is gone.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// Serves the admin pages. Ready once everything that existed at the start has been read.
    ///
    /// # Errors
    /// When an address cannot be used.
    pub async fn serve_admin(&self, metrics: Metrics, log: LogHandle, drain: &Drain) -> Result<()> {
        let readiness = Readiness::new();
        let pending = readiness.pending("source");
        let mesh = Arc::clone(&self.mesh);
        tokio::spawn(async move {
            mesh.synced().await;
            pending.done();
        });
        if let Some(address) = self.args.status_address {
            let routes = admin::status_routes(readiness.clone(), metrics.clone());
            let tcp = AdminListener::tcp(address).await.context("status address")?;
            let server = AdminServer::new(routes, AdminLimits::default());
            tokio::spawn(server.serve(tcp, drain.clone()));
        }
        let server = AdminServer::new(
            admin::routes(&self.mesh, readiness, metrics, log),
            AdminLimits::default(),
        );
        let tcp = AdminListener::tcp(self.args.admin).await.context("admin address")?;
        tokio::spawn(server.clone().serve(tcp, drain.clone()));
        if let Some(path) = &self.args.admin_socket {
            make_folder_of(path).with_context(|| format!("folder of {}", path.display()))?;
            let unix = AdminListener::unix(path).context("admin socket")?;
            tokio::spawn(server.serve(unix, drain.clone()));
        }
        Ok(())
    }

    /// Serves agents until `drain` begins, or one of its parts ends: a controller that hears of nothing any more, or
    /// whose authority stands still, must not look well.
    ///
    /// # Errors
    /// When the gRPC server, the source or another part ends.
    pub async fn serve(self, drain: Drain) -> Result<()> {
        let mut parts = JoinSet::new();
        let clockwork = keep_authority(
            Arc::clone(&self.authority),
            self.revocations,
            Arc::clone(&self.mesh),
            Arc::clone(&self.tls),
            self.args.clone(),
        );
        parts.spawn(async move {
            clockwork.await;
            "the authority's clockwork"
        });
        let in_cluster = keep_cluster(Arc::clone(&self.authority), self.secret, self.roots);
        parts.spawn(async move {
            in_cluster.await;
            "what keeps the cluster's copies of the authority"
        });
        let mut writing = JoinSet::new();
        let election = write_cluster(
            &mut writing,
            self.client.as_ref(),
            (&self.mesh, &self.authority),
            self.uncaptured,
            &self.args,
            &drain,
        )?;
        let (accepted, incoming) = mpsc::channel(64);
        let accepting = accept(self.listener, self.tls, accepted);
        parts.spawn(async move {
            accepting.await;
            "the listener"
        });
        let server = Server::builder()
            .http2_keepalive_interval(Some(Duration::from_secs(30)))
            .http2_keepalive_timeout(Some(Duration::from_secs(10)))
            .max_concurrent_streams(MAX_CALLS)
            .http2_max_header_list_size(MAX_HEADER_BYTES)
            .add_service(self.discovery)
            .add_service(IstioCertificateServiceServer::new(self.certificates))
            .add_service(EnrolmentServer::new(self.enrolments));
        let ending = drain.clone();
        let serving =
            server.serve_with_incoming_shutdown(ReceiverStream::new(incoming), async move {
                ending.begun().await;
            });
        let outcome = tokio::select! {
            outcome = serving => outcome.context("gRPC server"),
            ended = first_end(&mut parts, self.source) => Err(ended),
            () = async { drain.begun().await; tokio::time::sleep(DRAIN_TIMEOUT).await } => Ok(()),
        };
        // Whatever the outcome: another replica need not wait for the Lease to run out.
        if let Some(election) = election
            && tokio::time::timeout(RESIGN_TIMEOUT, election).await.is_err()
        {
            warn!("the Lease is not given back in time");
        }
        outcome
    }
}

/// Which part ended first, and how; none of them should.
async fn first_end(parts: &mut JoinSet<&'static str>, source: SourceEnd) -> anyhow::Error {
    let of_part = |ended: Result<&'static str, JoinError>| match ended {
        Ok(part) => anyhow::anyhow!("{part} has ended"),
        Err(error) => anyhow::Error::from(error).context("a part of the controller failed"),
    };
    tokio::select! {
        Some(ended) = parts.join_next() => of_part(ended),
        _closed = source => anyhow::anyhow!("the source has ended: nothing would change any more"),
    }
}

/// Raises the process's limit of open descriptors to the highest that is allowed: a connection for each agent, and what
/// strangers open.
fn raise_descriptor_limit() -> nix::Result<()> {
    let resource = nix::sys::resource::Resource::RLIMIT_NOFILE;
    let (_soft, hard) = nix::sys::resource::getrlimit(resource)?;
    nix::sys::resource::setrlimit(resource, hard, hard)
}

/// Makes the folder of the admin socket, for its owner only, where there is none.
fn make_folder_of(socket: &Path) -> io::Result<()> {
    match socket.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => {
            std::fs::DirBuilder::new().recursive(true).mode(0o700).create(folder)
        }
        Some(_) | None => Ok(()),
    }
}

fn index_settings(args: &RunArgs) -> IndexSettings {
    IndexSettings {
        trust_domain: args.trust_domain.as_str().into(),
        cluster_id: args.cluster_id.as_str().into(),
        network: args.network.as_str().into(),
        cluster_domain: args.cluster_domain.as_str().into(),
        root_namespace: args.root_namespace.as_str().into(),
        istio_labels: args.istio_labels,
        unknown_egress: match args.unknown_egress {
            Egress::Allow => UnknownEgress::Allow,
            Egress::Deny => UnknownEgress::Deny,
        },
        excluded_namespaces: args
            .exclude_namespaces
            .iter()
            .map(|name| name.as_str().into())
            .collect(),
        pod_networks: args.pod_cidrs.clone(),
    }
}

/// A client of the cluster that is the source; none with another source, which what needs a cluster is refused with.
async fn client(args: &RunArgs) -> Result<Option<Client>> {
    match &args.source {
        Source::Kubernetes(kubeconfig) => {
            let settings = KubernetesSettings::new(kubeconfig.clone());
            settings.client().await.context("source kubernetes").map(Some)
        }
        Source::Directory(_) => {
            for (flag, given) in [
                ("--agent-account", args.agent_account.is_some()),
                ("--ca-secret", args.ca_secret.is_some()),
                ("--root-config-map", args.root_config_map.is_some()),
                ("--lease", args.lease.is_some()),
                ("--ca-dir-secret", args.ca_dir_secret.is_some()),
            ] {
                anyhow::ensure!(!given, "{flag} needs --source kubernetes");
            }
            Ok(None)
        }
    }
}

/// Brings the authority's file and its Secret together, however long the API server is away: without the Secret nobody
/// knows whether there is an authority already.
async fn agree(secret: &mut Option<CaSecret>) {
    let Some(secret) = secret else { return };
    while let Err(error) = secret.sync().await {
        warn!(error = %format!("{:#}", anyhow::Error::from(error)), "waiting for the authority's Secret");
        tokio::time::sleep(CA_TICK).await;
    }
}

/// Starts what is written about the mesh: Events about pods by every replica, the status of policies by the leader.
fn write_cluster(
    writing: &mut JoinSet<()>,
    client: Option<&Client>,
    (mesh, authority): (&SharedMesh, &Arc<Authority>),
    uncaptured: Uncaptured,
    args: &RunArgs,
    drain: &Drain,
) -> Result<Option<JoinHandle<()>>> {
    let (Some(client), Some(lease)) = (client, &args.lease) else { return Ok(None) };
    let identity = match &args.identity {
        Some(identity) => identity.clone(),
        None => nix::unistd::gethostname()
            .ok()
            .and_then(|name| name.into_string().ok())
            .context("the machine has no name; give --identity")?,
    };
    let (election, leadership) = Election::new(client, lease, identity.clone());
    let telling = uncaptured::tell(client.clone(), Arc::clone(mesh), identity.clone(), uncaptured);
    writing.spawn(telling);
    if let Some(secret) = args.ca_secret.as_ref().or(args.ca_dir_secret.as_ref()) {
        let (warning, authority) = ((secret.clone(), args.ca_warn_before), Arc::clone(authority));
        let (identity, leadership) = (identity.clone(), leadership.clone());
        writing.spawn(expiry::tell(client.clone(), identity, authority, warning, leadership));
    }
    if let Some(settings) = waypoint_settings(args) {
        let (mesh, authority) = (Arc::clone(mesh), Arc::clone(authority));
        let waypoints = Waypoints::new(client, mesh, authority, settings);
        writing.spawn(waypoints.run(leadership.clone()));
    }
    writing.spawn(StatusWriter::new(client, Arc::clone(mesh), identity).run(leadership));
    Ok(Some(tokio::spawn(election.run(drain.clone()))))
}

fn waypoint_settings(args: &RunArgs) -> Option<WaypointSettings> {
    let waypoints = args.waypoints.clone();
    let image = waypoints.image?;
    let own_name = args.sans.first().map_or("localhost", String::as_str);
    let controller = waypoints.controller.unwrap_or_else(|| format!("https://{own_name}:15012"));
    Some(WaypointSettings {
        image,
        pull_policy: waypoints.pull_policy,
        pull_secrets: waypoints.pull_secrets,
        replicas: waypoints.replicas,
        resources: waypoints.resources,
        controller,
        audience: args.token_audience.clone(),
        cluster_domain: args.cluster_domain.clone(),
        prefer_waypoints: waypoints.prefer_waypoints,
        log: waypoints.waypoint_log,
    })
}

/// Keeps what the cluster holds of the authority up to date.
async fn keep_cluster(
    authority: Arc<Authority>,
    mut secret: Option<CaSecret>,
    roots: Option<RootConfigMap>,
) {
    let mut ticks = tokio::time::interval(CLUSTER_TICK);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        if let Some(secret) = &mut secret
            && let Err(error) = secret.sync().await
        {
            metrics::counter!(metric::CONTROLLER_CA_ERRORS.name).increment(1);
            warn!(error = %format!("{:#}", anyhow::Error::from(error)), "the authority's Secret is not current");
        }
        if let Some(roots) = &roots
            && let Err(error) = roots.write(&authority.root_bundle_pem()).await
        {
            warn!(error = %format!("{:#}", anyhow::Error::from(error)), "the ConfigMap of the roots is not current");
        }
    }
}

fn start_source(
    args: &RunArgs,
    client: Option<&Client>,
    state: StateDir,
    mesh: &SharedMesh,
) -> Result<SourceEnd> {
    let (send, mut events) = mpsc::channel(16);
    let mut addresses = match &args.source {
        Source::Directory(root) => {
            let addresses = AssignedAddresses::read(&state, mesh)?;
            let settings = DirectorySettings {
                rescan_interval: args.rescan,
                ..DirectorySettings::new(root.clone())
            };
            directory::watch(settings, state.clone(), send)
                .with_context(|| format!("source directory {}", root.display()))?;
            Some(addresses)
        }
        // Objects have ages there, and replicas must come to the same without talking.
        Source::Kubernetes(kubeconfig) => {
            let settings = KubernetesSettings::new(kubeconfig.clone());
            let client = client.context("source kubernetes has no client")?;
            kubernetes::watch(client, &settings, send);
            None
        }
    };
    let mesh = Arc::clone(mesh);
    let (lives, ended) = oneshot::channel::<()>();
    // A first batch may take a second to map; that must not stop the streams' threads.
    std::thread::Builder::new()
        .name("index".into())
        .spawn(move || {
            // Goes with the thread, also when that panics.
            let _lives = lives;
            while let Some(event) = events.blocking_recv() {
                mesh.source_event(event);
                if let Some(addresses) = &mut addresses {
                    addresses.write(&mesh);
                }
            }
            error!("the source has ended; nothing changes any more");
        })
        .context("index thread")?;
    Ok(ended)
}

/// The file that remembers the addresses of ServiceEntries' hosts over a restart.
struct AssignedAddresses {
    state: StateDir,
    written: String,
}

impl AssignedAddresses {
    const FILE: &str = "service-entry-addresses";

    fn read(state: &StateDir, mesh: &Mesh) -> Result<Self> {
        let written = state.read(Self::FILE).context(Self::FILE)?.unwrap_or_default();
        mesh.keep_addresses(&written);
        Ok(Self { state: state.clone(), written })
    }

    fn write(&mut self, mesh: &Mesh) {
        let Some(now) = mesh.with_index(Index::kept_addresses) else { return };
        if now == self.written {
            return;
        }
        match self.state.write(Self::FILE, &now) {
            Ok(()) => self.written = now,
            Err(error) => {
                warn!(%error, file = Self::FILE, "the addresses of ServiceEntries are not kept for a restart");
            }
        }
    }
}

fn set_trust(mesh: &Mesh, authority: &Authority, revocations: &Revocations) {
    let mut crl_pem = authority.crl_pem().to_string();
    crl_pem.push_str(&revocations.look());
    mesh.set_trust(Trust {
        root_pem: authority.root_bundle_pem(),
        crl_pem,
        revocations: revocations.status(),
    });
}

fn server_config(authority: &Authority, args: &RunArgs) -> Result<ServerConfig> {
    let identity = authority
        .issue_server(&args.sans, SERVER_TTL, SystemTime::now())
        .context("certificate of the listener; check --san")?;
    Ok(control_server(Arc::new(identity)))
}

/// Keeps the authority, what agents believe and the listener's certificate up to date.
async fn keep_authority(
    authority: Arc<Authority>,
    revocations: Arc<Revocations>,
    mesh: SharedMesh,
    tls: Arc<ArcSwap<ServerConfig>>,
    args: RunArgs,
) {
    let mut ticks = tokio::time::interval(CA_TICK);
    let mut issued = SystemTime::now();
    loop {
        ticks.tick().await;
        let now = SystemTime::now();
        let changed = match authority.tick(now) {
            Ok(changed) => changed,
            Err(error) => {
                metrics::counter!(metric::CONTROLLER_CA_ERRORS.name).increment(1);
                warn!(error = %anyhow::Error::from(error), "the authority's file cannot be used; the last state stays in use");
                false
            }
        };
        if changed {
            info!("the certificate authority changed");
        }
        set_trust(&mesh, &authority, &revocations);
        // A clock that was set back must not keep an old certificate.
        let stale = now.duration_since(issued).map_or(true, |age| age > SERVER_TTL / 2);
        if changed || stale {
            match server_config(&authority, &args) {
                Ok(config) => {
                    tls.store(Arc::new(config));
                    issued = now;
                }
                Err(error) => warn!(%error, "the listener keeps its certificate"),
            }
        }
    }
}

/// Accepts connections and makes their handshakes; [`Door`] bounds how many.
async fn accept(
    listener: TcpListener,
    tls: Arc<ArcSwap<ServerConfig>>,
    accepted: mpsc::Sender<io::Result<Watched<TlsStream<TcpStream>>>>,
) {
    let door = Door::new(DoorLimits::default());
    loop {
        let (stream, peer) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                warn!(%error, "cannot accept");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let acceptor = TlsAcceptor::from(tls.load_full());
        let (accepted, door) = (accepted.clone(), door.clone());
        tokio::spawn(async move {
            match welcome(stream, peer.ip(), &acceptor, &door).await {
                // The server may have ended.
                Ok(stream) => drop(accepted.send(Ok(stream)).await),
                Err(error) => debug!(%peer, %error, "handshake failed"),
            }
        });
    }
}

async fn welcome(
    stream: TcpStream,
    from: IpAddr,
    acceptor: &TlsAcceptor,
    door: &Door,
) -> io::Result<Watched<TlsStream<TcpStream>>> {
    let (place, mut verdict) = door.enter(from);
    stream.set_nodelay(true)?;
    let limits = door.limits();
    let first = verdict.unless_shown_out(limits.silence, stream.peek(&mut [0])).await?;
    if first == 0 {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    place.spoke();
    let stream = verdict.unless_shown_out(limits.handshake, acceptor.accept(stream)).await?;
    Ok(Watched::new(stream, verdict))
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;
    use crate::cli::{Cli, Command};

    fn args(directory: &Path) -> RunArgs {
        std::fs::create_dir(directory.join("manifests")).unwrap();
        let source = format!("directory:{}", directory.join("manifests").display());
        let state = directory.join("state").display().to_string();
        let run = ["c", "run", "--source", &source, "--listen", "127.0.0.1:0"];
        let cli = Cli::try_parse_from(run.into_iter().chain([
            "--san",
            "localhost",
            "--state-dir",
            &state,
        ]));
        let Command::Run(args) = cli.unwrap().command else { panic!("not run") };
        *args
    }

    #[tokio::test]
    async fn a_source_that_ends_ends_the_controller() {
        let directory = tempfile::tempdir().unwrap();
        let (_trigger, drain) = Drain::new();
        let mut controller = Controller::start(args(directory.path()), &drain).await.unwrap();
        let (lives, ended) = oneshot::channel();
        let healthy = std::mem::replace(&mut controller.source, ended);
        let index = std::thread::spawn(move || {
            let _lives: oneshot::Sender<()> = lives;
            panic!("as a mistake in the index would");
        });
        let served = tokio::time::timeout(Duration::from_secs(5), controller.serve(drain)).await;
        let error = served.expect("it does not go on").unwrap_err();
        assert!(error.to_string().contains("the source has ended"), "{error:#}");
        assert!(index.join().is_err());
        drop(healthy);
    }

    #[tokio::test]
    async fn a_part_that_panics_ends_the_controller() {
        let mut parts = JoinSet::new();
        parts.spawn(std::future::pending());
        parts.spawn(async { panic!("as a mistake would") });
        let (_lives, source) = oneshot::channel();
        let error = first_end(&mut parts, source).await;
        assert!(format!("{error:#}").contains("panicked"), "{error:#}");
        let (lives, source) = oneshot::channel();
        let index = std::thread::spawn(move || {
            let _lives: oneshot::Sender<()> = lives;
        });
        let mut parts = JoinSet::from_iter([std::future::pending()]);
        let error = first_end(&mut parts, source).await;
        assert!(error.to_string().contains("the source has ended"), "{error:#}");
        index.join().unwrap();
    }

    #[test]
    fn the_admin_sockets_folder_is_made_for_its_owner_only() {
        use std::os::unix::fs::PermissionsExt as _;
        let directory = tempfile::tempdir().unwrap();
        let folder = directory.path().join("run/culvert-controller");
        make_folder_of(&folder.join("admin.sock")).unwrap();
        let mode = std::fs::metadata(&folder).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o700);
        make_folder_of(&folder.join("admin.sock")).unwrap();
        make_folder_of(Path::new("admin.sock")).unwrap();
    }
}
