//! The agent's Unix socket: one request per connection, from root only.

use std::collections::BTreeMap;
use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use mesh_enroll::{
    Enroll, EnrollReply, EnrollRequest, FrameError, MAX_FRAME_BYTES, PodName, Refusal,
    decode_request, encode,
};
use mesh_telemetry::metric;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Semaphore, watch};
use tokio_util::sync::CancellationToken;

use super::enroller::{Enroller, SaidAddresses, WantedPod};
use crate::control::pods::WantedPods;
use crate::error::error_chain;
use crate::picture::Picture;

/// Enrolment as the rest of the agent sees it.
#[derive(Clone, Debug)]
pub(crate) struct Enrolment {
    enroller: Arc<Enroller>,
    wanted: watch::Receiver<Arc<WantedPods>>,
    changed: watch::Sender<u64>,
    word_patience: Duration,
    /// Where the controller's word on addresses is; none in tests.
    picture: Option<Arc<Picture>>,
    blocked: watch::Sender<Arc<BTreeMap<PodName, String>>>,
}

/// Requests served at once; further ones wait in the socket's queue.
const MAX_REQUESTS: usize = 64;
/// A request is small and comes at once.
const READ_PATIENCE: Duration = Duration::from_secs(5);
/// How long `ADD` waits for the controller's word on a pod: a pod is announced when it is bound to the node, which is
/// before its sandbox is made, so that the word is usually there.
const WORD_PATIENCE: Duration = Duration::from_secs(8);
/// How much of an asker's patience may go by in waiting for the controller's word.
const SHARE_OF_PATIENCE: f32 = 0.6;
/// Between looks at what vanished, what is to be tried again and what has drained.
const TICK_INTERVAL: Duration = Duration::from_secs(1);
/// Between looks at settings that a pod with privileges may have changed.
const REPAIR_INTERVAL: Duration = Duration::from_secs(30);

impl Enrolment {
    /// Enrolment over an enroller and what the controller wants.
    pub(crate) fn new(enroller: Arc<Enroller>, wanted: watch::Receiver<Arc<WantedPods>>) -> Self {
        Self {
            enroller,
            wanted,
            changed: watch::Sender::new(0),
            blocked: watch::Sender::new(Arc::default()),
            word_patience: WORD_PATIENCE,
            picture: None,
        }
    }

    /// The same, comparing addresses with what the controller says of them.
    pub(crate) fn with_picture(mut self, picture: Arc<Picture>) -> Self {
        self.picture = Some(picture);
        self
    }

    /// Running pods that cannot be taken in, each with the reason.
    pub(crate) fn blocked(&self) -> watch::Receiver<Arc<BTreeMap<PodName, String>>> {
        self.blocked.subscribe()
    }

    /// Replaces [`blocked`](Self::blocked).
    pub(super) fn set_blocked(&self, pods: BTreeMap<PodName, String>) {
        self.blocked.send_if_modified(|blocked| {
            let is_new = **blocked != pods;
            *blocked = Arc::new(pods);
            is_new
        });
    }

    /// Pods that are to be captured and that nobody has told of.
    pub(crate) fn missing(&self, wanted: &WantedPods) -> BTreeMap<PodName, WantedPod> {
        self.enroller.missing(&wanted.pods)
    }

    /// Takes in a pod that was found running. Blocks.
    pub(crate) fn enroll_found(&self, request: &Enroll, wanted: &WantedPod) -> EnrollReply {
        let reply = self.enroller.enroll(request, wanted);
        self.announce();
        reply
    }

    /// Changes when the list of pods may have.
    pub(crate) fn changes(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    /// Listens at `socket` until `stop`. What is being answered then is finished.
    pub(crate) async fn serve(self, listener: UnixListener, stop: CancellationToken) {
        let slots = Arc::new(Semaphore::new(MAX_REQUESTS));
        loop {
            let Ok(slot) = Arc::clone(&slots).acquire_owned().await else { return };
            let accepted = tokio::select! {
                accepted = listener.accept() => accepted,
                () = stop.cancelled() => break,
            };
            match accepted {
                Ok((stream, _from)) => {
                    let enrolment = self.clone();
                    tokio::spawn(async move {
                        enrolment.converse(stream).await;
                        drop(slot);
                    });
                }
                Err(error) => {
                    tracing::warn!(%error, "an enrolment connection was not accepted");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            }
        }
        // All slots free: every answer has been given.
        if let Ok(all) = u32::try_from(MAX_REQUESTS)
            && slots.acquire_many(all).await.is_err()
        {
            tracing::debug!("enrolment ended");
        }
    }

    /// Follows the controller's wishes and looks after the pods until `stop`.
    pub(crate) async fn maintain(self, stop: CancellationToken) {
        let mut wanted = self.wanted.clone();
        let mut tick = tokio::time::interval(TICK_INTERVAL);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut repair = tokio::time::interval(REPAIR_INTERVAL);
        repair.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            let enroller = Arc::clone(&self.enroller);
            let before = enroller.revision();
            tokio::select! {
                changed = wanted.changed() => {
                    if changed.is_err() {
                        return;
                    }
                    let list = Arc::clone(&wanted.borrow_and_update());
                    blocking(move || enroller.configure(&list.pods, Instant::now())).await;
                }
                _ = tick.tick() => {
                    blocking(move || enroller.tick(Instant::now())).await;
                }
                _ = repair.tick() => {
                    if let Some(repaired) = blocking(move || enroller.repair()).await {
                        metrics::counter!(metric::PODS_REPAIRED.name).increment(
                            u64::try_from(repaired).unwrap_or(u64::MAX));
                    }
                }
                () = stop.cancelled() => return,
            }
            if self.enroller.revision() != before {
                self.announce();
            }
        }
    }

    async fn converse(&self, mut stream: UnixStream) {
        let (word, reply) = match self.receive(&mut stream).await {
            Ok(request) => (request_word(&request), self.handle(request).await),
            Err(refusal) => ("unreadable", refusal.into()),
        };
        let result = result_word(&reply);
        metrics::counter!(metric::ENROLMENTS.name, "request" => word, "result" => result)
            .increment(1);
        if let EnrollReply::Refused(refusal) = &reply {
            tracing::warn!(reason = refusal.reason, "enrolment request refused");
        }
        let sent = match encode(&reply) {
            Ok(frame) => stream.write_all(&frame).await,
            Err(error) => Err(io::Error::other(error)),
        };
        if let Err(error) = sent {
            tracing::debug!(%error, "the asker did not wait for the answer");
        }
    }

    async fn receive(&self, stream: &mut UnixStream) -> Result<EnrollRequest, Refusal> {
        let peer = stream.peer_cred().map_err(|error| refused(&error.to_string(), ""))?;
        if peer.uid() != 0 {
            let reason = format!("uid {} may not enrol pods", peer.uid());
            return Err(refused(&reason, "ask as root"));
        }
        let frame = tokio::time::timeout(READ_PATIENCE, read_frame(stream))
            .await
            .map_err(|_late| refused("the request did not come in time", ""))?;
        frame
            .and_then(|json| decode_request(&json))
            .map_err(|error| refused(&error_chain(&error), "use plugin and agent of one version"))
    }

    async fn handle(&self, request: EnrollRequest) -> EnrollReply {
        let enroller = Arc::clone(&self.enroller);
        let reply = match request {
            EnrollRequest::Enroll(enroll) => Some(self.enroll(enroll).await),
            EnrollRequest::Unenroll { pod, gone } => {
                blocking(move || enroller.unenroll(&pod, gone, Instant::now())).await
            }
            EnrollRequest::Check { pod } => blocking(move || enroller.check(&pod)).await,
            EnrollRequest::Gc { valid } => blocking(move || enroller.collect(&valid)).await,
            EnrollRequest::List => {
                blocking(move || EnrollReply::Pods { pods: enroller.list_all() }).await
            }
            EnrollRequest::Status => Some(self.status()),
        };
        self.announce();
        reply.unwrap_or_else(|| retry("the agent is shutting down", "ask again in a moment"))
    }

    fn status(&self) -> EnrollReply {
        if self.wanted.borrow().known {
            EnrollReply::Ok
        } else {
            retry(
                "the agent knows nothing of its pods yet",
                "see that the controller runs and that the agent can reach it",
            )
        }
    }

    async fn enroll(&self, request: Enroll) -> EnrollReply {
        let mut wanted = match self.word_on(&request).await {
            Ok(wanted) => wanted,
            Err(unknown) => return unknown.into(),
        };
        wanted.said = self.said_of(&request);
        let enroller = Arc::clone(&self.enroller);
        let live = request.live;
        let reply = blocking(move || {
            if wanted.captured {
                enroller.enroll(&request, &wanted)
            } else {
                enroller.exclude(&request, "neither the pod nor its namespace is in the mesh")
            }
        })
        .await;
        match reply {
            Some(EnrollReply::Excluded { reason }) if live => {
                refused(&reason, "label it culvert.dev/dataplane-mode=ambient").into()
            }
            Some(reply) => reply,
            None => retry("the agent is shutting down", "ask again in a moment"),
        }
    }

    /// Waits until the controller has said something about a pod, and not about another of the same name before it.
    ///
    /// A word about another is not taken, unless it says that the pod is captured and a runtime asks: in doubt it is. An
    /// operator is told whom the controller means.
    async fn word_on(&self, request: &Enroll) -> Result<WantedPod, Refusal> {
        let (name, uid) = (&request.pod.name, &request.pod.uid);
        let about = |wanted: &WantedPod| wanted.is_about(uid, &request.container_id);
        let mut wanted = self.wanted.clone();
        let known = wanted.wait_for(|list| list.pods.get(name).is_some_and(about));
        let patience = self.word_patience.min(answer_before(request));
        if let Ok(Ok(list)) = tokio::time::timeout(patience, known).await
            && let Some(wanted) = list.pods.get(name)
        {
            return Ok(wanted.clone());
        }
        let list = Arc::clone(&self.wanted.borrow());
        match list.pods.get(name) {
            Some(wanted) if about(wanted) || (wanted.captured && !request.live) => {
                Ok(wanted.clone())
            }
            Some(other) if request.live => Err(refused(
                &format!(
                    "the controller does not know uid {uid}: its {name} has uid {}",
                    other.uid
                ),
                &format!("enrol it with --uid {}, or mend what the controller reads", other.uid),
            )),
            Some(other) => Err(later(
                &format!(
                    "the controller has not said whether {name} with uid {uid} is in the mesh, only of uid {}",
                    other.uid
                ),
                "see that the controller runs and knows the pod: culvert status",
            )),
            None if list.known => Err(later(
                &format!(
                    "the controller knows no pod {name} with uid {uid} on this node, and has not said that it is in the mesh"
                ),
                "see that the controller runs and that what it reads has the pod, with this node's name: culvert status",
            )),
            None => Err(later(
                &format!("the controller has not said whether {name} is in the mesh"),
                "see that the controller runs and that the agent can reach it: culvert status",
            )),
        }
    }

    /// What the controller says of the addresses that matter to a request.
    fn said_of(&self, request: &Enroll) -> SaidAddresses {
        let Some(picture) = &self.picture else { return SaidAddresses::default() };
        let snapshot = picture.snapshot();
        let name = &request.pod.name;
        let workload = snapshot.index.workload_by_name(name.namespace(), name.name());
        let Some(workload) = workload else { return SaidAddresses::default() };
        let others = request.ips.iter().filter_map(|ip| {
            let owner = snapshot.index.workload_by_ip(&workload.network, *ip)?;
            let owner = PodName::new(&owner.namespace, &owner.name).ok()?;
            (owner != *name).then_some((*ip, owner))
        });
        SaidAddresses {
            own: workload.addresses.iter().copied().collect(),
            of_others: others.collect(),
        }
    }

    fn announce(&self) {
        self.changed.send_modify(|revision| *revision = revision.wrapping_add(1));
    }
}

/// How long the asker may be kept waiting for the controller's word: capturing the pod takes its time after that.
fn answer_before(request: &Enroll) -> Duration {
    match request.patience_ms {
        Some(patience) => Duration::from_millis(patience).mul_f32(SHARE_OF_PATIENCE),
        None => Duration::MAX,
    }
}

/// What is asked, as a label.
const fn request_word(request: &EnrollRequest) -> &'static str {
    match request {
        EnrollRequest::Enroll(_) => "enroll",
        EnrollRequest::Unenroll { .. } => "unenroll",
        EnrollRequest::Check { .. } => "check",
        EnrollRequest::Gc { .. } => "gc",
        EnrollRequest::List => "list",
        EnrollRequest::Status => "status",
    }
}

/// What is answered, as a label.
const fn result_word(reply: &EnrollReply) -> &'static str {
    match reply {
        EnrollReply::Refused(Refusal { retryable: true, .. }) => "retry",
        EnrollReply::Refused(Refusal { retryable: false, .. }) => "refused",
        EnrollReply::Excluded { .. } => "excluded",
        EnrollReply::Ok | EnrollReply::Pods { .. } => "ok",
    }
}

/// Opens the socket, in place of one that a dead agent left.
///
/// # Errors
/// When the folder cannot be written, or another agent listens there.
pub(crate) fn listen(socket: &Path) -> io::Result<UnixListener> {
    if std::os::unix::net::UnixStream::connect(socket).is_ok() {
        let what = format!("another agent listens at {}", socket.display());
        return Err(io::Error::new(io::ErrorKind::AddrInUse, what));
    }
    match std::fs::remove_file(socket) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _removed_or_absent => {}
    }
    let listener = UnixListener::bind(socket)?;
    std::fs::set_permissions(socket, std::fs::Permissions::from_mode(0o600))?;
    Ok(listener)
}

async fn read_frame(stream: &mut UnixStream) -> Result<Vec<u8>, FrameError> {
    let length = stream.read_u32().await.map_err(FrameError::Io)?;
    let bytes = usize::try_from(length).unwrap_or(usize::MAX);
    if bytes > MAX_FRAME_BYTES {
        return Err(FrameError::TooLong { bytes });
    }
    let mut json = vec![0; bytes];
    stream.read_exact(&mut json).await.map_err(FrameError::Io)?;
    Ok(json)
}

/// Runs `work` where it may block; `None` when it panicked or the runtime is going down.
async fn blocking<R: Send + 'static>(work: impl FnOnce() -> R + Send + 'static) -> Option<R> {
    match tokio::task::spawn_blocking(work).await {
        Ok(done) => Some(done),
        Err(error) => {
            tracing::error!(%error, "enrolment work ended early");
            None
        }
    }
}

fn refused(reason: &str, remedy: &str) -> Refusal {
    Refusal { reason: reason.to_owned(), remedy: remedy.to_owned(), retryable: false }
}

fn later(reason: &str, remedy: &str) -> Refusal {
    Refusal { reason: reason.to_owned(), remedy: remedy.to_owned(), retryable: true }
}

fn retry(reason: &str, remedy: &str) -> EnrollReply {
    later(reason, remedy).into()
}

#[cfg(test)]
mod tests;
