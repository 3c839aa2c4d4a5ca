//! The agent's parts, put together: what starts when, who knows whom, and how it ends.

use std::collections::BTreeSet;
use std::io;
use std::net::IpAddr;
use std::os::unix::fs::{DirBuilderExt as _, PermissionsExt as _};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use arc_swap::ArcSwap;
use mesh_authorize::PolicySet;
use mesh_ebpf::{Capture, FeatureReport};
use mesh_identity::{Svid, TrustBundle};
use mesh_model::{CloseReason, PodUid};
use mesh_resolve::{ResolveSettings, WorkloadIndex};
use mesh_runtime::supervisor::{Notice, notify};
use mesh_runtime::{AdminLimits, AdminListener, AdminServer, Drain as DrainSignal};
use mesh_runtime::{DrainTrigger, Logging, Metrics, Readiness, Reply, Routes};
use mesh_telemetry::metric;
use mesh_wire::NodeIdentity;
use tokio::runtime::Handle;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::admin::Desk;
use crate::capture::{Attachments, KernelGate};
use crate::cni::CniPlugin;
use crate::config::{ListenAddress, Settings};
use crate::control::ads::{Control, Outlets, Standing};
use crate::control::pods::WantedPods;
use crate::control::report::report_pods;
use crate::control::saved::SavedWorld;
use crate::control::session::ControllerSession;
use crate::control::world::World;
use crate::dataplane::{DataPlane, DataPlaneConfig, Drain, FlowSink, Shared, Snapshot};
use crate::dns::DnsDesk;
use crate::dns::lookup::PodResolver;
use crate::enrolment::attachment::{AttachError, AttachedPod, PodAttachments, Remains};
use crate::enrolment::desk::EnrolmentDesk;
use crate::enrolment::enroller::{Enroller, EnrollerConfig};
use crate::enrolment::namespace;
use crate::enrolment::server::Enrolment;
use crate::error::error_chain;
use crate::handover::Place;
use crate::handover::doors::{Door, Doors};
use crate::handover::predecessor::{Ended, Predecessor};
use crate::handover::successor::Successor;
use crate::health;
use crate::identity::{IdentityRequests, Rotation};
use crate::kept_keys;
use crate::picture::Picture;
use crate::retired;
use crate::telemetry::FlowReports;
use crate::tend::{node_addresses, retire_foreign_layouts, tend_kernel};
use crate::upgrade::Upgrade;
use crate::vital::Vital;

/// How an agent ended that did its work to the end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// It was asked to.
    Asked,
    /// A successor has everything.
    HandedOver,
}

/// Runs the agent until it is told to end. Capture stays: what is pinned refuses new connections until a successor
/// serves them.
///
/// # Errors
/// When the agent cannot do its whole work; the error names the remedy.
pub async fn run(settings: Settings, logging: Logging, metrics: Metrics) -> anyhow::Result<Ending> {
    settings.check()?;
    let node = settings.node_name()?;
    let (trigger, drain) = DrainSignal::new();
    prepare_folders(&settings)?;
    make_settings_writable().context("making kernel settings writable")?;
    let host_cookie = namespace::host_cookie().context("reading the node's network namespace")?;
    let boot_id = boot_id()?;
    mesh_net::socket::raise_descriptor_limit().context("raising the limit of descriptors")?;

    let readiness = Readiness::new();
    let (pods_pending, control_pending) =
        (readiness.pending("enrolled pods"), readiness.pending("controller"));

    let place = Place {
        node: node.clone(),
        state_dir: settings.state_dir.clone(),
        bpffs: settings.bpffs.clone(),
    };
    let mut tasks = JoinSet::new();
    // From here on an agent that is told to end leaves in order: it may own connections of others.
    let (vital, mut first_end) = Vital::new();
    tasks.spawn(vital.once("signals", await_signals(trigger.clone())));
    let mut running = find_running(&settings, &place).await?;
    let succeeds = running.is_some();
    let mut doors = Doors::default();
    if !succeeds {
        doors.open_to_successors(&settings)?;
    }
    let capture = Arc::new(load_capture(&settings)?);
    let gate = Arc::new(KernelGate::new(Arc::clone(&capture)));
    let runtime = Handle::current();
    let dns = Arc::new(DnsDesk::new(
        runtime.clone(),
        Arc::clone(&gate),
        nameservers(),
        &settings.cluster_domain,
    ));
    let (requests, identity_inbox) = IdentityRequests::new();
    let (reports, telemetry) = FlowReports::start(Arc::clone(metrics.flows()), logging.access())
        .context("starting telemetry")?;
    let reports = Arc::new(reports);
    let certificates = running.as_mut().map(Successor::certificates).unwrap_or_default();
    let shared = Arc::new(Shared {
        snapshot: ArcSwap::from_pointee(first_picture(certificates, settings.resolving())),
        flows: Arc::clone(&reports) as Arc<dyn FlowSink>,
        identities: Arc::new(requests),
        resolver: Arc::new(PodResolver::new(Arc::clone(&dns), runtime.clone())),
    });
    dns.answer_from(Arc::clone(&shared));
    let config = DataPlaneConfig {
        workers: settings.workers.unwrap_or_else(mesh_runtime::usable_cores).max(1),
        inherited_workers: running.as_ref().map_or(0, Successor::engines),
        ..DataPlaneConfig::default()
    };
    let gate_for_workers: Arc<KernelGate> = Arc::clone(&gate);
    let data_plane = Arc::new(
        DataPlane::start(config, Arc::clone(&shared), gate_for_workers)
            .context("starting the data plane")?,
    );
    data_plane
        .direct()
        .start(
            settings.same_node,
            Arc::clone(&capture),
            Arc::clone(&shared),
            data_plane.next_flow(),
        )
        .context("starting the direct path")?;
    if running.is_none() {
        data_plane.direct().adopt();
    }
    let picture = Arc::new(Picture::new(Arc::clone(&shared), Arc::clone(&data_plane)));

    let wanted = watch::Sender::new(Arc::new(WantedPods::default()));
    let channel = watch::Sender::new(None);
    let standing = watch::Sender::new(Standing::default());
    let session = ControllerSession::new(settings.controller(&node));
    let mut control = Control::new(
        session.clone(),
        (&node_identity(&settings, &node)).into(),
        World::new(settings.denied(), settings.missing_policies()),
        SavedWorld::new(&settings.state_dir),
        Outlets {
            picture: Arc::clone(&picture),
            pods: wanted.clone(),
            channel: channel.clone(),
            standing: standing.clone(),
        },
    );
    control.restore();
    // Before the controller speaks, so that nothing it says is missed.
    let wanted_pods = wanted.subscribe();
    let stop = CancellationToken::new();
    tasks.spawn(vital.until(&stop, "control", control.run(stop.clone())));
    if running.is_some() {
        hear_controller(standing.subscribe()).await;
    }

    let attachments: Arc<dyn PodAttachments> = Arc::new(Attachments::new(
        Arc::clone(&gate),
        Arc::clone(&data_plane),
        Arc::clone(&dns),
        runtime.clone(),
    ));
    let enroller = Arc::new(
        Enroller::open(
            EnrollerConfig {
                file: settings.state_dir.join("enrolled.json"),
                boot_id,
                host_cookie,
                excluded: settings.cni_exclude_namespaces.iter().cloned().collect(),
            },
            attachments,
        )
        .context("reading the list of enrolled pods")?,
    );
    let enrolment =
        Enrolment::new(Arc::clone(&enroller), wanted_pods).with_picture(Arc::clone(&picture));
    if let Some(running) = &mut running {
        let known = picture.snapshot();
        // Everything that is taken over is judged again at once: against no roots or no policies all of it would be cut.
        anyhow::ensure!(
            known.synced && known.trust.trust_domains().next().is_some(),
            "the controller has named no roots and no state is saved: the agent that runs goes on; start this one again when the controller answers"
        );
        anyhow::ensure!(
            !drain.has_begun(),
            "told to end before it took over: the agent that runs goes on"
        );
        take_over(running, &data_plane, &dns, &gate, &runtime)?;
        // Before the predecessor ends, which would be the end of the service.
        tell_supervisor(Notice::Succeeded);
    }
    adopt(&enroller, &wanted.borrow().clone(), &capture).await?;
    data_plane.direct().settle();
    pods_pending.done();

    let desk = Desk {
        instance: settings.instance.clone(),
        node: node.clone(),
        picture: Arc::clone(&picture),
        data_plane: Arc::clone(&data_plane),
        enroller: Arc::clone(&enroller),
        gate: Arc::clone(&gate),
        standing: standing.subscribe(),
        readiness: readiness.clone(),
        metrics,
        log: logging.handle(),
        upgrade: Upgrade::new(!settings.stay_after_hand_over),
    };
    let plugin_pending = readiness.pending("cni plugin");
    if let Some(running) = running {
        doors = succeed(running, &desk.metrics);
    }
    doors.complete(&settings, succeeds).await?;
    let (close_doors, doors_closed) = DrainSignal::new();
    let mut served = JoinSet::new();
    serve_admin(&mut served, &doors, &desk, &doors_closed)?;
    let enrolment_desk = EnrolmentDesk::new(
        enrolment.clone(),
        Arc::clone(&enroller),
        (Arc::clone(&picture), wanted.subscribe()),
        doors.unix(Door::Enrolment)?,
        (runtime.clone(), vital.clone()),
    )
    .context("serving enrolment")?;
    let enrolment_desk = Arc::new(enrolment_desk);
    enrolment_desk.resume();
    let successors = doors.unix(Door::HandOver)?;
    let predecessor = Arc::new(Predecessor {
        place,
        data_plane: Arc::clone(&data_plane),
        picture: Arc::clone(&picture),
        enrolment: Arc::clone(&enrolment_desk),
        dns: Arc::clone(&dns),
        doors,
        metrics: desk.metrics.clone(),
        close_doors: close_doors.clone(),
        reports,
        runtime: runtime.clone(),
    });
    match settings.cni_folders() {
        Some(folders) => {
            let plugin = CniPlugin::new(
                folders,
                settings.cni_plugin.clone(),
                &settings.enrolment_socket(),
                &settings.cni_exclude_namespaces,
            );
            let keeping = plugin.keep(plugin_pending, stop.clone());
            tasks.spawn(vital.until(&stop, "cni plugin", keeping));
        }
        None => plugin_pending.done(),
    }
    let reporting = report_pods(
        session.clone(),
        Arc::clone(&enroller),
        channel.subscribe(),
        enrolment.changes(),
        enrolment.blocked(),
        stop.clone(),
    );
    tasks.spawn(vital.until(&stop, "pod reports", reporting));
    let rotation = Rotation::new(
        session,
        Arc::clone(&picture),
        Arc::clone(&enroller),
        (settings.keep_keys, settings.bpffs.clone()),
    );
    let rotating =
        rotation.run(identity_inbox, channel.subscribe(), enrolment.changes(), stop.clone());
    tasks.spawn(vital.until(&stop, "certificates", rotating));
    let watching = health::watch(Arc::clone(&data_plane), readiness.clone(), stop.clone());
    tasks.spawn(vital.until(&stop, "health", watching));
    tasks.spawn(vital.until(&stop, "kernel", tend_kernel(Arc::clone(&capture), stop.clone())));
    let syncing = until_synced(standing.subscribe(), control_pending, stop.clone());
    tasks.spawn(vital.once("first word of the controller", syncing));
    tasks.spawn(crate::program_pages::let_go_after_start(stop.clone()));
    tell_supervisor(Notice::Ready);
    tracing::info!(node, "the agent runs");

    let mut succession = std::pin::pin!(Arc::clone(&predecessor).wait(successors, &drain));
    let (handed_over, ended_early) = tokio::select! {
        handed_over = &mut succession => (handed_over, None),
        ended = first_end.told() => {
            tracing::error!(error = %ended, "the agent cannot do its work");
            // As if it were told to end: a hand-over under way is finished, what is open drains.
            trigger.begin();
            (succession.await, Some(ended))
        }
    };
    let handed_over = handed_over.context("waiting for a successor")?;
    if let Some(ended) = handed_over {
        stop.cancel();
        close_doors.begin();
        last_requests(served).await;
        tracing::info!(?ended, "the agent ends");
        // The successor took the connections with it into its grave: a supervisor starts another agent.
        anyhow::ensure!(ended == Ended::HandedOver, "the successor is gone");
        return Ok(Ending::HandedOver);
    }
    tell_supervisor(Notice::Stopping);
    close_doors.begin();
    tracing::info!(grace = ?settings.drain(), "the agent ends; capture stays and refuses new connections");
    stop.cancel();
    if let Err(error) = enrolment_desk.pause().await {
        tracing::warn!(%error, "the list of enrolled pods is not written");
    }
    tokio::task::block_in_place(|| data_plane.direct().end());
    data_plane.drain(settings.drain()).await;
    last_requests(served).await;
    tasks.shutdown().await;
    drop((predecessor, enrolment_desk));
    drop((desk, picture, shared, dns, gate, data_plane, enroller, enrolment));
    // Ends once the workers, which hold its queue, have.
    drop(telemetry);
    drop(logging);
    ended_early.map_or(Ok(Ending::Asked), |ended| Err(ended.into()))
}

/// Takes every pod out of the mesh and everything out of the kernel.
///
/// # Errors
/// When something could not be undone; the rest was.
pub fn uninstall(settings: &Settings) -> anyhow::Result<()> {
    let socket = settings.enrolment_socket();
    if std::os::unix::net::UnixStream::connect(&socket).is_ok() {
        anyhow::bail!("an agent runs at {}: stop it first", socket.display());
    }
    make_settings_writable().context("making kernel settings writable")?;
    // First, so that no pod that starts meanwhile waits for an agent.
    if let Some(folders) = settings.cni_folders() {
        crate::cni::remove(&folders).context("removing the CNI plugin")?;
    }
    let capture = Capture::load_or_adopt(&settings.capture()).context("opening what is pinned")?;
    let config = EnrollerConfig {
        file: settings.state_dir.join("enrolled.json"),
        boot_id: boot_id()?,
        host_cookie: namespace::host_cookie()?,
        excluded: BTreeSet::new(),
    };
    let left = Enroller::open(config, Arc::new(KernelOnly))
        .context("reading the list of enrolled pods")?
        .remove_all();
    capture.detach_all().context("detaching from the kernel")?;
    kept_keys::remove(&settings.bpffs).context("wiping kept keys")?;
    if left.is_empty() {
        return forget(settings);
    }
    anyhow::bail!("detached, but not everything could be restored: {}", left.join("; "))
}

/// Removes what the agent kept on disk, and the folder of the pins. The other folders stay: they may be mounts.
fn forget(settings: &Settings) -> anyhow::Result<()> {
    match std::fs::remove_dir(&settings.bpffs) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            return Err(error).context(format!("removing {}", settings.bpffs.display()));
        }
        _removed_or_absent => {}
    }
    for folder in [&settings.state_dir, &settings.run_dir] {
        let entries = match std::fs::read_dir(folder) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(error).context(format!("reading {}", folder.display())),
        };
        for entry in entries {
            let path = entry?.path();
            let removed = if path.is_dir() {
                std::fs::remove_dir_all(&path)
            } else {
                std::fs::remove_file(&path)
            };
            removed.with_context(|| format!("removing {}", path.display()))?;
        }
    }
    Ok(())
}

/// Tells that it is ready, and nothing else, until told to end.
///
/// # Errors
/// When the address of readiness cannot be used.
pub async fn stay(settings: &Settings) -> anyhow::Result<()> {
    let (trigger, drain) = DrainSignal::new();
    tokio::spawn(await_signals(trigger));
    let closed = if let ListenAddress(Some(address)) = settings.ready_address {
        let (close, closed) = DrainSignal::new();
        let left = |_request| async { Reply::text("the node has left the mesh\n") };
        let routes = Routes::new().get("/healthz/ready", left);
        let listener = AdminListener::tcp(address).await?;
        tokio::spawn(AdminServer::new(routes, AdminLimits::default()).serve(listener, closed));
        Some(close)
    } else {
        None
    };
    // An agent that starts here, because the removal was taken back, gets the port.
    retired::until_succeeded(&settings.handover_socket(), &drain).await;
    drop(closed);
    drain.begun().await;
    Ok(())
}

/// In a container `/proc/sys` is read-only; settings of pods have to be written. Only this mount namespace is changed.
fn make_settings_writable() -> io::Result<()> {
    use nix::mount::{MsFlags, mount};
    use nix::sys::statvfs::{FsFlags, statvfs};
    const SETTINGS: &str = "/proc/sys";
    if !statvfs(SETTINGS)?.flags().contains(FsFlags::ST_RDONLY) {
        return Ok(());
    }
    let none = None::<&str>;
    let flags = MsFlags::MS_BIND
        | MsFlags::MS_REMOUNT
        | MsFlags::MS_NOSUID
        | MsFlags::MS_NODEV
        | MsFlags::MS_NOEXEC;
    Ok(mount(none, SETTINGS, none, flags, none)?)
}

/// Attachments of a program that serves nothing: detaching is done for all pods at once afterwards.
struct KernelOnly;

impl PodAttachments for KernelOnly {
    fn attach(&self, _pod: &AttachedPod) -> Result<(), AttachError> {
        Ok(())
    }

    fn detach(&self, _uid: &PodUid, _cookie: u64, _drain: Drain) -> Result<(), AttachError> {
        Ok(())
    }

    fn close(&self, _uid: &PodUid, _cookie: u64) -> Result<(), AttachError> {
        Ok(())
    }

    fn remains(&self, _cookie: u64) -> Result<Remains, AttachError> {
        Ok(Remains::Nothing)
    }

    fn left(&self, _pod: &AttachedPod) {}

    fn lingers(&self, _uid: &PodUid, _cookie: u64) -> bool {
        false
    }

    fn captured(&self) -> Result<BTreeSet<u64>, AttachError> {
        Ok(BTreeSet::new())
    }

    fn whole(&self) -> Result<BTreeSet<u64>, AttachError> {
        Ok(BTreeSet::new())
    }

    fn is_whole(&self, _cookie: u64) -> Result<bool, AttachError> {
        Ok(false)
    }
}

fn load_capture(settings: &Settings) -> anyhow::Result<Capture> {
    let capture = Capture::load_or_adopt(&settings.capture())
        .context("loading capture into the kernel; `culvert check` says what is missing")?;
    let FeatureReport { cgroup_order, guard, cgroup_root, adopted } = capture.features();
    tracing::info!(
        %cgroup_order, %guard, cgroup_root = %cgroup_root.display(), adopted, "capture is loaded"
    );
    let addresses = node_addresses().context("reading the node's addresses")?;
    capture.set_node_addresses(&addresses).context("telling capture the node's addresses")?;
    Ok(capture)
}

async fn adopt(
    enroller: &Arc<Enroller>,
    wanted: &Arc<WantedPods>,
    capture: &Arc<Capture>,
) -> anyhow::Result<()> {
    let (enroller, wanted, capture) =
        (Arc::clone(enroller), Arc::clone(wanted), Arc::clone(capture));
    tokio::task::spawn_blocking(move || {
        let adopted = enroller.adopt(&wanted.pods, Instant::now());
        tracing::info!(?adopted, "pods of an earlier life are taken up");
        if adopted.pending == 0 && adopted.orphans == 0 {
            capture.remove_foreign_layouts().context("removing capture of another version")?;
        } else {
            retire_foreign_layouts(&capture);
        }
        anyhow::Ok(())
    })
    .await
    .context("taking up pods")?
}

fn serve_admin(
    tasks: &mut JoinSet<()>,
    doors: &Doors,
    desk: &Desk,
    drain: &DrainSignal,
) -> anyhow::Result<()> {
    let limits = AdminLimits::default();
    for (door, routes) in [
        (Door::AdminSocket, desk.admin_routes()),
        (Door::Admin, desk.admin_routes()),
        (Door::Ready, desk.ready_routes()),
        (Door::Metrics, desk.metrics_routes()),
    ] {
        let Some(listener) = doors.admin(door).context("serving the admin interface")? else {
            continue;
        };
        tasks.spawn(AdminServer::new(routes, limits).serve(listener, drain.clone()));
    }
    Ok(())
}

/// Requests to the admin interface that are under way are answered, within their time.
async fn last_requests(mut served: JoinSet<()>) {
    let all = async { while served.join_next().await.is_some() {} };
    if tokio::time::timeout(AdminLimits::default().request, all).await.is_err() {
        tracing::debug!("requests to the admin interface were left unanswered");
    }
}

/// An agent that runs here already, and lets this one succeed it.
async fn find_running(settings: &Settings, place: &Place) -> anyhow::Result<Option<Successor>> {
    let (socket, place) = (settings.handover_socket(), place.clone());
    let found = tokio::task::spawn_blocking(move || Successor::find(&socket, &place)).await?;
    found.context("another agent runs here and does not hand over")
}

/// Lets the controller speak before connections are taken over. One that is away is not waited for: what it said last, which
/// the predecessor has saved, is in force.
async fn hear_controller(mut standing: watch::Receiver<Standing>) {
    let heard = standing.wait_for(|standing| standing.heard);
    if tokio::time::timeout(CONTROLLER_PATIENCE, heard).await.is_err() {
        tracing::warn!("the controller is not heard; what it said last is in force");
    }
}

/// How long a successor waits for the controller.
const CONTROLLER_PATIENCE: Duration = Duration::from_secs(3);

/// Takes the predecessor's connections and pods. After an error this process must end.
fn take_over(
    running: &mut Successor,
    data_plane: &Arc<DataPlane>,
    dns: &DnsDesk,
    gate: &KernelGate,
    runtime: &Handle,
) -> anyhow::Result<()> {
    let taken = tokio::task::block_in_place(|| running.take_over(data_plane, dns, runtime));
    for pod in taken.context("taking over from the running agent")? {
        if pod.slots.is_some() {
            data_plane.direct().pod_captured(pod.sockets.clone(), None);
        }
        gate.handed_over(pod);
    }
    Ok(())
}

/// The predecessor's doors and counters; counters begin anew when it is gone.
fn succeed(running: Successor, metrics: &Metrics) -> Doors {
    let (doors, counters) = tokio::task::block_in_place(|| running.succeed());
    match counters {
        Ok(written) => {
            let flags = |flags: &str| {
                let all = CloseReason::ALL.iter().map(|reason| reason.response_flags());
                all.into_iter().find(|known| *known == flags)
            };
            // The kernel counts over all processes' lives.
            metrics.take_over(written, flags, |name| name == metric::CAPTURE_EVENTS.name);
        }
        Err(error) => {
            tracing::warn!(error = %error_chain(&error), "the predecessor is gone; counters begin anew");
        }
    }
    doors
}

async fn until_synced(
    mut standing: watch::Receiver<Standing>,
    pending: mesh_runtime::Pending,
    stop: CancellationToken,
) {
    tokio::select! {
        heard = standing.wait_for(|standing| standing.synced) => {
            if heard.is_ok() {
                pending.done();
            }
        }
        () = stop.cancelled() => {}
    }
}

fn tell_supervisor(notice: Notice) {
    if let Err(error) = notify(notice) {
        tracing::warn!(%error, ?notice, "the service manager is not told");
    }
}

async fn await_signals(trigger: DrainTrigger) {
    match trigger.begin_on_signals().await {
        Ok(()) => {
            tracing::warn!("asked twice: ending at once");
            std::process::exit(1);
        }
        Err(error) => tracing::error!(%error, "signals cannot be received"),
    }
}

/// What is known at the beginning: nothing but a predecessor's certificates.
fn first_picture(certificates: Vec<Svid>, settings: ResolveSettings) -> Snapshot {
    let svids = certificates.into_iter().map(|svid| (svid.id().clone(), Arc::new(svid)));
    Snapshot {
        index: WorkloadIndex::default(),
        policies: PolicySet::default(),
        synced: false,
        settings,
        trust: Arc::new(TrustBundle::default()),
        svids: svids.collect(),
    }
}

fn node_identity(settings: &Settings, node: &str) -> NodeIdentity {
    let ip = node_addresses()
        .ok()
        .and_then(|addresses| addresses.first().copied())
        .unwrap_or_else(|| IpAddr::from([127, 0, 0, 1]));
    NodeIdentity {
        ip,
        pod_name: node.to_owned(),
        pod_namespace: "culvert-system".to_owned(),
        node_name: node.to_owned(),
        cluster_id: settings.cluster_id.clone(),
        cluster_domain: settings.cluster_domain.clone(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
    }
}

/// The node's nameservers, for pods whose own are not known. Source: resolv.conf(5).
fn nameservers() -> Vec<IpAddr> {
    let text = match std::fs::read_to_string("/etc/resolv.conf") {
        Ok(text) => text,
        Err(error) => {
            tracing::warn!(%error, "the node's nameservers are not known");
            return Vec::new();
        }
    };
    text.lines()
        .filter_map(|line| line.strip_prefix("nameserver"))
        .filter_map(|rest| rest.split_whitespace().next()?.parse().ok())
        .collect()
}

fn boot_id() -> anyhow::Result<String> {
    let text = std::fs::read_to_string("/proc/sys/kernel/random/boot_id")
        .context("reading the machine's boot id")?;
    Ok(text.trim().to_owned())
}

fn prepare_folders(settings: &Settings) -> anyhow::Result<()> {
    for (folder, mode) in [(&settings.run_dir, 0o755), (&settings.state_dir, 0o700)] {
        make_folder(folder, mode).with_context(|| format!("making {}", folder.display()))?;
    }
    Ok(())
}

fn make_folder(folder: &Path, mode: u32) -> io::Result<()> {
    std::fs::DirBuilder::new().recursive(true).mode(mode).create(folder)?;
    std::fs::set_permissions(folder, std::fs::Permissions::from_mode(mode))
}
