//! The waypoint's parts, put together: what starts when, and how it ends.

use std::net::SocketAddr;
use std::os::unix::fs::DirBuilderExt as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use mesh_runtime::{
    AdminLimits, AdminListener, AdminServer, Drain, DrainTrigger, FlowMeterConfig, LogConfig,
    Logging, Metrics, Readiness, Routes,
};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use socket2::{Domain, Protocol, Socket, Type};
use tokio::net::TcpListener;
use tokio::runtime::{Builder, Runtime};

use crate::admin;
use crate::config::{ListenAddress, Settings};
use crate::control::Control;
use crate::keys::KeyStore;
use crate::picture::Picture;
use crate::worker::{Common, Worker};

/// Connections that wait to be accepted, per worker.
const BACKLOG: i32 = 4096;
/// Shortest time between being asked to end and ending: clients are told first.
const MIN_DRAIN: Duration = Duration::from_millis(500);

/// Runs a waypoint until it is told to end.
///
/// # Errors
/// When it cannot do its work; the error names the remedy.
pub fn run(settings: Settings) -> anyhow::Result<()> {
    settings.check()?;
    // A core dump would hold private keys.
    nix::sys::prctl::set_dumpable(false).context("forbidding core dumps")?;
    raise_descriptor_limit().context("raising the limit of descriptors")?;
    let config = LogConfig {
        filter: settings.log.clone(),
        format: settings.log_format,
        ..LogConfig::default()
    };
    let logging = Logging::start(&config, std::io::stderr())?;
    let metrics = Metrics::install(
        "culvert-waypoint",
        env!("CARGO_PKG_VERSION"),
        FlowMeterConfig::default(),
        Some(logging.handle()),
    )?;
    mesh_identity::tls::install()?;
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(&settings.state_dir)
        .with_context(|| format!("making {}", settings.state_dir.display()))?;
    let (trigger, drain) = Drain::new();
    let picture = Arc::new(Picture::new(settings.resolving()));
    let keys = Arc::new(key_store(&settings)?);
    let common = Arc::new(Common {
        picture: Arc::clone(&picture),
        access: logging.access(),
        drain: drain.clone(),
        streams: AtomicUsize::new(0),
        settings: settings.clone(),
    });
    let readiness = Readiness::new();
    let pending = readiness.pending("controller");
    let workers = settings.workers.unwrap_or_else(mesh_runtime::usable_cores).max(1);
    let own: Vec<Arc<Worker>> =
        (0..workers).map(|_| Arc::new(Worker::new(Arc::clone(&common)))).collect();
    for (number, worker) in own.iter().enumerate() {
        start_worker(number, worker, settings.hbone_address)?;
    }
    runtime()?.block_on(async {
        let control = Control::new(&settings, Arc::clone(&picture), Arc::clone(&keys), pending);
        tokio::spawn(Arc::clone(&keys).run());
        tokio::spawn(control.run());
        let parts = admin::Parts {
            picture,
            keys,
            common: Arc::clone(&common),
            workers: own,
            readiness: readiness.clone(),
            metrics,
            log: logging.handle(),
        };
        serve_pages(&settings, &parts).await?;
        tracing::info!(
            gateway = %format!("{}/{}", settings.gateway.namespace, settings.gateway.name),
            address = %settings.hbone_address, workers, "taking tunnels"
        );
        end(&settings, &trigger, drain, &readiness, &common).await
    })
}

fn key_store(settings: &Settings) -> anyhow::Result<KeyStore> {
    let Some(file) = &settings.jwks_ca else { return Ok(KeyStore::new(None)?) };
    let read = || Ok::<_, anyhow::Error>(KeyStore::new(Some(&std::fs::read_to_string(file)?))?);
    read().with_context(|| format!("authorities in {} (--jwks-ca)", file.display()))
}

fn runtime() -> anyhow::Result<Runtime> {
    Builder::new_current_thread().enable_all().build().context("starting a runtime")
}

/// Starts one thread that serves. It ends with the process.
fn start_worker(number: usize, worker: &Arc<Worker>, address: SocketAddr) -> anyhow::Result<()> {
    let listener = listen(address).with_context(|| format!("listening on {address}"))?;
    let runtime = runtime()?;
    let worker = Arc::clone(worker);
    std::thread::Builder::new()
        .name(format!("worker-{number}"))
        .spawn(move || {
            runtime.block_on(async {
                match TcpListener::from_std(listener) {
                    Ok(listener) => worker.accept(listener).await,
                    Err(error) => tracing::error!(%error, "a worker has no listener"),
                }
            });
        })
        .context("starting a worker")?;
    Ok(())
}

/// One of several listeners at an address: the kernel shares connections out.
fn listen(address: SocketAddr) -> std::io::Result<std::net::TcpListener> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    socket.set_reuse_address(true)?;
    socket.set_reuse_port(true)?;
    if address.is_ipv6() {
        socket.set_only_v6(false)?;
    }
    socket.set_nonblocking(true)?;
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    Ok(socket.into())
}

async fn serve_pages(settings: &Settings, parts: &admin::Parts) -> anyhow::Result<()> {
    let pages = [
        (settings.ready_address, parts.ready()),
        (settings.metrics_address, parts.metrics()),
        (settings.admin_address, parts.all()),
    ];
    for (ListenAddress(address), routes) in pages {
        if let Some(address) = address {
            serve_page(address, routes).await?;
        }
    }
    Ok(())
}

async fn serve_page(address: SocketAddr, routes: Routes) -> anyhow::Result<()> {
    let listener =
        AdminListener::tcp(address).await.with_context(|| format!("listening on {address}"))?;
    let server = AdminServer::new(routes, AdminLimits::default());
    // The pages are there until the end: readiness tells that it comes.
    tokio::spawn(async move {
        let (_never, drain) = Drain::new();
        server.serve(listener, drain).await;
    });
    Ok(())
}

/// Waits for the order to end, says goodbye, and lets streams finish.
async fn end(
    settings: &Settings,
    trigger: &DrainTrigger,
    drain: Drain,
    readiness: &Readiness,
    common: &Common,
) -> anyhow::Result<()> {
    let finished = async {
        drain.begun().await;
        let begun = Instant::now();
        let _never_ready = readiness.pending("draining");
        tracing::info!(streams = common.streams.load(Ordering::Relaxed), "draining");
        loop {
            tokio::time::sleep(Duration::from_millis(50)).await;
            let streams = common.streams.load(Ordering::Relaxed);
            let waited = begun.elapsed();
            if waited >= settings.drain() || (streams == 0 && waited >= MIN_DRAIN) {
                tracing::info!(streams, "ending");
                return;
            }
        }
    };
    tokio::select! {
        () = finished => Ok(()),
        signals = trigger.begin_on_signals() => signals.context("signals"),
    }
}

fn raise_descriptor_limit() -> nix::Result<()> {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard)
}
