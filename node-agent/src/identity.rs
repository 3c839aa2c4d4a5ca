//! Certificates of this node's pods: the CA is asked in time, keys stay in memory, what is issued goes into the picture.
//!
//! A process that starts begins with what its predecessor hands over, or with what an earlier one kept in the kernel.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use mesh_enroll::PodPhase;
use mesh_identity::{
    IssuedAnswer, Now, PeerRejection, RotationCommand, RotationCore, RotationInput, Svid,
    TrustBundle, Urgency, csr,
};
use mesh_model::SpiffeId;
use mesh_telemetry::metric;
use mesh_wire::certificate_request;
use mesh_wire::pb::auth::istio_certificate_service_client::IstioCertificateServiceClient;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tonic::Request;
use tonic::transport::Channel;

use crate::config::KeepKeys;
use crate::control::session::ControllerSession;
use crate::dataplane::{IdentityDesk, Snapshot};
use crate::enrolment::enroller::Enroller;
use crate::error::error_chain;
use crate::kept_keys::KeptKeys;
use crate::picture::Picture;

/// Requests from workers waiting at most; a flow that waits asks again.
const QUEUE: usize = 1024;
/// How long an answer of the CA may take.
const CALL_TIMEOUT: Duration = Duration::from_secs(10);
/// Life of a leaf that is asked for. Source: DESIGN §6.
const LEAF_LIFE: Duration = Duration::from_secs(24 * 3600);
/// Between looks at which identities this node's pods have.
const LOOK_INTERVAL: Duration = Duration::from_secs(2);

/// Takes requests from the workers.
#[derive(Debug)]
pub(crate) struct IdentityRequests {
    queue: mpsc::Sender<SpiffeId>,
}

impl IdentityRequests {
    /// A desk and what it hands on.
    pub(crate) fn new() -> (Self, mpsc::Receiver<SpiffeId>) {
        let (queue, inbox) = mpsc::channel(QUEUE);
        (Self { queue }, inbox)
    }
}

impl IdentityDesk for IdentityRequests {
    fn want(&self, id: &SpiffeId) {
        if self.queue.try_send(id.clone()).is_err() {
            metrics::counter!(metric::EVENTS_DROPPED.name, "queue" => "identities").increment(1);
        }
    }
}

/// Drives [`RotationCore`].
pub(crate) struct Rotation {
    session: ControllerSession,
    picture: Arc<Picture>,
    enroller: Arc<Enroller>,
    core: RotationCore,
    /// What outlives this process. Opened when rotation begins to run.
    keys: Option<KeptKeys>,
    keep: (KeepKeys, PathBuf),
    /// Identities whose certificates are from an earlier process: the first request for each is answered by what is there.
    inherited: BTreeSet<SpiffeId>,
    /// Answers that the core has not decided upon.
    issued: BTreeMap<SpiffeId, IssuedAnswer>,
    prefetched: BTreeSet<SpiffeId>,
    trusted: Arc<TrustBundle>,
}

impl std::fmt::Debug for Rotation {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Rotation").field("prefetched", &self.prefetched).finish_non_exhaustive()
    }
}

/// What became of a request.
type Outcome = (SpiffeId, Result<IssuedAnswer, String>);

impl Rotation {
    /// Rotation for the pods of `enroller`. `keep` says whether keys outlive this process, and on which bpffs.
    pub(crate) fn new(
        session: ControllerSession,
        picture: Arc<Picture>,
        enroller: Arc<Enroller>,
        keep: (KeepKeys, PathBuf),
    ) -> Self {
        let seed = u64::from(crate::entropy::number()) << 32 | u64::from(crate::entropy::number());
        let trusted = Arc::clone(&picture.snapshot().trust);
        Self {
            keys: None,
            keep,
            inherited: BTreeSet::new(),
            session,
            picture,
            enroller,
            core: RotationCore::new(seed),
            issued: BTreeMap::new(),
            prefetched: BTreeSet::new(),
            trusted,
        }
    }

    /// Keeps certificates valid until `stop`.
    pub(crate) async fn run(
        mut self,
        mut inbox: mpsc::Receiver<SpiffeId>,
        channel: watch::Receiver<Option<Channel>>,
        mut pods: watch::Receiver<u64>,
        stop: CancellationToken,
    ) {
        let mut requests: JoinSet<Outcome> = JoinSet::new();
        let mut look = tokio::time::interval(LOOK_INTERVAL);
        look.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        self.restore().await;
        loop {
            for id in self.commands() {
                requests.spawn(request(self.session.clone(), channel.clone(), id));
            }
            let due = self.core.poll_timeout().map(tokio::time::Instant::from_std);
            tokio::select! {
                Some(id) = inbox.recv() => {
                    self.feed(RotationInput::Want { id, urgency: Urgency::Waiting });
                }
                Some(done) = requests.join_next() => match done {
                    Ok(outcome) => self.answered(outcome),
                    Err(error) => tracing::error!(%error, "a request for a certificate ended early"),
                },
                changed = pods.changed() => {
                    if changed.is_err() { return }
                    self.look().await;
                }
                _ = look.tick() => self.look().await,
                () = async {
                    match due {
                        Some(due) => tokio::time::sleep_until(due).await,
                        None => std::future::pending().await,
                    }
                } => self.feed(RotationInput::Tick),
                () = stop.cancelled() => return,
            }
        }
    }

    /// Takes up the certificates of earlier processes, and sees to it that all there are outlive this one.
    async fn restore(&mut self) {
        let snapshot = self.picture.snapshot();
        let (keep, bpffs) = &self.keep;
        let mut keys = match keep {
            KeepKeys::None => KeptKeys::none(bpffs),
            KeepKeys::Kernel => {
                let here = self.identities_here(&snapshot).await.unwrap_or_default();
                let (keys, good) = KeptKeys::open(bpffs, &here, &snapshot.trust, SystemTime::now());
                if !good.is_empty() {
                    let number = u64::try_from(good.len()).unwrap_or(u64::MAX);
                    metrics::counter!(metric::KEPT_KEYS_RESTORED.name).increment(number);
                    tracing::info!(number, "certificates that an earlier process kept are used");
                    self.picture.restored(good);
                }
                keys
            }
        };
        let snapshot = self.picture.snapshot();
        for svid in snapshot.svids.values() {
            keys.keep(svid);
        }
        self.inherited = snapshot.svids.keys().cloned().collect();
        self.keys = Some(keys);
    }

    /// Feeds the core and carries out what needs no request.
    fn feed(&mut self, input: RotationInput) {
        self.core.handle(input, Now { wall: SystemTime::now(), monotonic: Instant::now() });
    }

    /// Carries out what the core decided; gives the identities to ask for.
    fn commands(&mut self) -> Vec<SpiffeId> {
        let mut requests = Vec::new();
        while let Some(command) = self.core.poll_command() {
            match command {
                RotationCommand::Request { id } if self.inherited.remove(&id) => {
                    let snapshot = self.picture.snapshot();
                    let good =
                        |svid: &&Arc<Svid>| !svid.is_revoked(&snapshot.trust, SystemTime::now());
                    match snapshot.svids.get(&id).filter(good) {
                        Some(svid) => {
                            let (not_before, not_after) = (svid.not_before(), svid.not_after());
                            self.feed(RotationInput::Issued { id, not_before, not_after });
                        }
                        None => requests.push(id),
                    }
                }
                RotationCommand::Request { id } => requests.push(id),
                RotationCommand::Install { id } => {
                    if let Some(answer) = self.issued.remove(&id) {
                        if let Some(keys) = &mut self.keys {
                            keys.keep(&answer.svid);
                        }
                        self.picture.certified(answer.svid, &answer.root_pem);
                    }
                }
                RotationCommand::Discard { id } => {
                    self.issued.remove(&id);
                    self.forget_key(&id);
                    self.picture.uncertified(&id);
                }
            }
        }
        requests
    }

    fn answered(&mut self, (id, outcome): Outcome) {
        let trust = Arc::clone(&self.picture.snapshot().trust);
        let outcome = outcome.and_then(|answer| {
            // Signed just before its issuer was revoked.
            match answer.svid.is_revoked(&trust, SystemTime::now()) {
                true => Err("the CA's answer is revoked already".to_owned()),
                false => Ok(answer),
            }
        });
        match outcome {
            Ok(answer) => {
                metrics::counter!(metric::CERTIFICATE_REQUESTS.name, "result" => "ok").increment(1);
                let (not_before, not_after) = (answer.svid.not_before(), answer.svid.not_after());
                tracing::debug!(%id, "a certificate was issued");
                self.issued.insert(id.clone(), answer);
                self.feed(RotationInput::Issued { id, not_before, not_after });
            }
            Err(error) => {
                metrics::counter!(metric::CERTIFICATE_REQUESTS.name, "result" => "failed")
                    .increment(1);
                let valid = self.core.is_valid(&id, SystemTime::now());
                tracing::warn!(%id, error, still_valid = valid, "no certificate; trying again");
                self.feed(RotationInput::Failed { id });
            }
        }
    }

    /// Compares the identities of the pods that are here with those that are kept.
    async fn look(&mut self) {
        let snapshot = self.picture.snapshot();
        if !Arc::ptr_eq(&snapshot.trust, &self.trusted) {
            if lost_a_root(&self.trusted, &snapshot.trust) {
                tracing::info!("a root is no longer trusted; certificates are renewed");
                self.feed(RotationInput::RenewAll);
            }
            self.trusted = Arc::clone(&snapshot.trust);
            for svid in snapshot.svids.values() {
                if let Err(rejection) = svid.is_accepted(&snapshot.trust, SystemTime::now()) {
                    tracing::warn!(id = %svid.id(), %rejection, "peers refuse this certificate; its key is not kept");
                    self.forget_key(svid.id());
                    if matches!(rejection, PeerRejection::Revoked { .. }) {
                        self.feed(RotationInput::Rejected { id: svid.id().clone() });
                    }
                }
            }
        }
        let Some(here) = self.identities_here(&snapshot).await else { return };
        let gone: Vec<SpiffeId> =
            self.core.wanted().filter(|id| !here.contains(*id)).cloned().collect();
        for id in gone {
            self.feed(RotationInput::Forget { id });
        }
        for id in here.difference(&self.prefetched.clone()) {
            self.feed(RotationInput::Want { id: id.clone(), urgency: Urgency::Prefetch });
        }
        self.prefetched = here;
    }

    fn forget_key(&mut self, id: &SpiffeId) {
        if let Some(keys) = &mut self.keys {
            keys.forget(id);
        }
    }

    /// The identities of the pods that are here; none when they cannot be listed.
    async fn identities_here(&self, snapshot: &Snapshot) -> Option<BTreeSet<SpiffeId>> {
        let enroller = Arc::clone(&self.enroller);
        let pods = tokio::task::spawn_blocking(move || enroller.list()).await.ok()?;
        let of_mesh = pods.iter().filter(|pod| pod.phase != PodPhase::Excluded);
        Some(of_mesh.filter_map(|pod| identity_of(snapshot, pod)).collect())
    }
}

/// The identity of a pod: of its workload, or, while that is not known, what its service account makes it.
fn identity_of(snapshot: &Snapshot, pod: &mesh_enroll::EnrolledPod) -> Option<SpiffeId> {
    let (namespace, name) = (pod.pod.name.namespace(), pod.pod.name.name());
    if let Some(workload) = snapshot.index.workload_by_name(namespace, name) {
        return workload.identity().ok();
    }
    let trust_domain = snapshot.trust.trust_domains().next()?;
    SpiffeId::new(trust_domain, namespace, &pod.pod.service_account).ok()
}

fn lost_a_root(before: &TrustBundle, now: &TrustBundle) -> bool {
    before.trust_domains().any(|domain| {
        before.roots(domain).any(|root| !now.roots(domain).any(|other| other == root))
    })
}

/// Asks the CA, once the controller is connected.
async fn request(
    session: ControllerSession,
    mut channel: watch::Receiver<Option<Channel>>,
    id: SpiffeId,
) -> Outcome {
    let connected = match channel.wait_for(Option::is_some).await {
        Ok(connected) => connected.clone(),
        Err(_ended) => None,
    };
    let Some(connected) = connected else {
        return (id, Err("the agent ends".to_owned()));
    };
    let answer = ask(&session, &connected, &id).await;
    (id, answer)
}

async fn ask(
    session: &ControllerSession,
    channel: &Channel,
    id: &SpiffeId,
) -> Result<IssuedAnswer, String> {
    let (key, pem) = csr(id).map_err(|error| error_chain(&error))?;
    let mut request = Request::new(certificate_request(pem, id, LEAF_LIFE));
    request.set_timeout(CALL_TIMEOUT);
    let bearer = session.bearer(channel).await.map_err(|error| error_chain(&error))?;
    request.metadata_mut().insert("authorization", bearer);
    let answer = IstioCertificateServiceClient::new(channel.clone())
        .create_certificate(request)
        .await
        .map_err(|status| format!("the CA refused: {}", status.message()))?
        .into_inner();
    IssuedAnswer::check(&answer.cert_chain, id, key, SystemTime::now())
        .map_err(|error| error_chain(&error))
}

#[cfg(test)]
mod tests;
