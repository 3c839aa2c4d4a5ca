//! The delta xDS stream: kept open, its responses applied at once, its end met with patience.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use mesh_telemetry::metric;
use mesh_wire::pb::discovery::aggregated_discovery_service_client::AggregatedDiscoveryServiceClient;
use mesh_wire::pb::discovery::{DeltaDiscoveryRequest, DeltaDiscoveryResponse, Node};
use mesh_wire::{DeltaClientState, MAX_MESSAGE_BYTES, ResourceKind, UnexpectedResponse};
use prost::Message as _;
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep, sleep_until};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::transport::Channel;
use tonic::{Code, Request, Status, Streaming};

use super::backoff::Backoff;
use super::pods::WantedPods;
use super::saved::{GATHER, SavedWorld};
use super::session::{ControllerSession, SessionError};
use super::world::{Touched, World};
use crate::dataplane::Changed;
use crate::error::error_chain;
use crate::picture::Picture;

/// Hears the controller and makes what it says effective.
pub(crate) struct Control {
    session: ControllerSession,
    node: Node,
    held: DeltaClientState,
    world: World,
    saved: SavedWorld,
    picture: Arc<Picture>,
    pods: watch::Sender<Arc<WantedPods>>,
    channel: watch::Sender<Option<Channel>>,
    standing: watch::Sender<Standing>,
    /// Kinds that were answered on this stream.
    answered: BTreeSet<ResourceKind>,
    /// When changes have to be on disk, if there are any.
    save_at: Option<Instant>,
}

/// How the agent stands with the controller.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Standing {
    /// A stream is open.
    pub(crate) connected: bool,
    /// Every kind of resource was answered on the stream that is open.
    pub(crate) heard: bool,
    /// Every kind of resource was heard of: on this stream, an earlier one, or in an earlier life of the agent.
    pub(crate) synced: bool,
    /// What the last failure was.
    pub(crate) last_error: Option<String>,
}

/// What a [`Control`] acts on and tells.
pub(crate) struct Outlets {
    /// The data plane's picture.
    pub(crate) picture: Arc<Picture>,
    /// The pods' settings.
    pub(crate) pods: watch::Sender<Arc<WantedPods>>,
    /// The connection to the controller, for others who have something to ask it.
    pub(crate) channel: watch::Sender<Option<Channel>>,
    /// How it goes.
    pub(crate) standing: watch::Sender<Standing>,
}

/// Why a stream ended.
#[derive(Debug, thiserror::Error)]
enum StreamEnd {
    /// It was not opened.
    #[error(transparent)]
    Session(#[from] SessionError),
    /// The controller ended it with an error.
    #[error("the controller ended the stream: {}", .0.message())]
    Status(Status),
    /// The controller ended it.
    #[error("the controller ended the stream")]
    Complete,
    /// The controller sent what was not asked for.
    #[error(transparent)]
    Unexpected(#[from] UnexpectedResponse),
}

/// Requests waiting to be sent; each answers a response, so that one would do.
const REQUESTS: usize = 16;

impl std::fmt::Debug for Control {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Control").field("node", &self.node).finish_non_exhaustive()
    }
}

impl Control {
    /// A control task that has heard nothing.
    pub(crate) fn new(
        session: ControllerSession,
        node: Node,
        world: World,
        saved: SavedWorld,
        outlets: Outlets,
    ) -> Self {
        let Outlets { picture, pods, channel, standing } = outlets;
        let held = DeltaClientState::new(&ResourceKind::AGENT);
        Self {
            session,
            node,
            held,
            world,
            saved,
            picture,
            pods,
            channel,
            standing,
            answered: BTreeSet::new(),
            save_at: None,
        }
    }

    /// Takes up what an earlier life of the agent heard. Blocks on the disk.
    pub(crate) fn restore(&mut self) {
        let Some(state) = self.saved.load() else { return };
        let mut touched = Touched::default();
        for update in self.held.restore(&state) {
            touched = merge(touched, self.world.apply(update));
        }
        // Only a complete state is ever saved.
        let heard_all = self.world.mesh.is_some();
        self.standing.send_modify(|standing| standing.synced = heard_all);
        if heard_all {
            touched.add(Changed::POLICIES);
        }
        self.publish(touched);
        tracing::info!(
            workloads = self.world.index.workloads().len(),
            services = self.world.index.services().len(),
            "the saved state of the mesh is in force until the controller speaks"
        );
    }

    /// Keeps a stream open until `stop`.
    pub(crate) async fn run(mut self, stop: CancellationToken) {
        let mut backoff = Backoff::default();
        while !stop.is_cancelled() {
            let heard = &mut false;
            let end = tokio::select! {
                end = self.stream(heard) => end,
                () = stop.cancelled() => break,
            };
            if *heard {
                backoff.reset();
            }
            self.ended(&end).await;
            let pause = backoff.next(crate::entropy::number());
            tracing::debug!(?pause, "reconnecting to the controller after a pause");
            tokio::select! {
                () = self.wait(pause) => {}
                () = stop.cancelled() => break,
            }
        }
        self.channel.send_replace(None);
        self.save().await;
    }

    async fn ended(&self, end: &StreamEnd) {
        let reason = match end {
            StreamEnd::Session(_) => "ConnectionError",
            StreamEnd::Status(_) | StreamEnd::Unexpected(_) => "Error",
            StreamEnd::Complete => "Complete",
        };
        metrics::counter!(metric::XDS_TERMINATIONS.name, "reason" => reason).increment(1);
        let is_news = self.standing.borrow().last_error.as_deref() != Some(&error_chain(end));
        if is_news {
            tracing::warn!(error = %error_chain(end), "no stream to the controller; what it said last stays in force");
        }
        let status = match end {
            StreamEnd::Status(status) | StreamEnd::Session(SessionError::Refused(status)) => {
                Some(status)
            }
            StreamEnd::Session(_) | StreamEnd::Complete | StreamEnd::Unexpected(_) => None,
        };
        if status.is_some_and(|status| status.code() == Code::Unauthenticated) {
            self.session.forget().await;
        }
        self.channel.send_replace(None);
        self.standing.send_modify(|standing| {
            standing.connected = false;
            standing.heard = false;
            standing.last_error = Some(error_chain(end));
        });
    }

    /// One stream, until it ends.
    async fn stream(&mut self, heard: &mut bool) -> StreamEnd {
        match self.converse(heard).await {
            Ok(end) | Err(end) => end,
        }
    }

    async fn converse(&mut self, heard: &mut bool) -> Result<StreamEnd, StreamEnd> {
        let channel = self.session.connect(self.world.roots.as_deref()).await?;
        let bearer = self.session.bearer(&channel).await?;
        let (requests, outgoing) = mpsc::channel(REQUESTS);
        for request in self.held.start(&self.node) {
            if requests.send(request).await.is_err() {
                return Ok(StreamEnd::Complete);
            }
        }
        let mut request = Request::new(ReceiverStream::new(outgoing));
        request.metadata_mut().insert("authorization", bearer);
        let mut responses = AggregatedDiscoveryServiceClient::new(channel.clone())
            .max_decoding_message_size(MAX_MESSAGE_BYTES)
            .delta_aggregated_resources(request)
            .await
            .map_err(StreamEnd::Status)?
            .into_inner();
        self.channel.send_replace(Some(channel));
        self.answered.clear();
        self.standing.send_modify(|standing| {
            standing.connected = true;
            standing.heard = false;
            standing.last_error = None;
        });
        tracing::info!("the controller is connected");
        loop {
            match self.next(&mut responses).await {
                Ok(Some(response)) => {
                    *heard = true;
                    self.handle(response, &requests).await?;
                }
                Ok(None) => return Ok(StreamEnd::Complete),
                Err(status) => return Ok(StreamEnd::Status(status)),
            }
        }
    }

    /// The next response; writes the state to disk when that is due meanwhile.
    async fn next(
        &mut self,
        responses: &mut Streaming<DeltaDiscoveryResponse>,
    ) -> Result<Option<DeltaDiscoveryResponse>, Status> {
        loop {
            let due = self.save_at;
            tokio::select! {
                response = responses.message() => return response,
                () = until(due) => self.save().await,
            }
        }
    }

    async fn handle(
        &mut self,
        response: DeltaDiscoveryResponse,
        requests: &mpsc::Sender<DeltaDiscoveryRequest>,
    ) -> Result<(), StreamEnd> {
        let url =
            ResourceKind::from_type_url(&response.type_url).map_or("other", ResourceKind::type_url);
        let bytes = u64::try_from(response.encoded_len()).unwrap_or(u64::MAX);
        metrics::counter!(metric::XDS_MESSAGES.name, "url" => url).increment(1);
        metrics::counter!(metric::XDS_MESSAGE_BYTES.name, "url" => url).increment(bytes);
        self.answered.extend(ResourceKind::from_type_url(&response.type_url));
        let (update, acknowledgement) = self.held.handle(response)?;
        let mut touched = self.world.apply(update);
        let is_news = self.held.is_synced()
            && self
                .standing
                .send_if_modified(|standing| !std::mem::replace(&mut standing.synced, true));
        if is_news {
            // Whatever waited for the policies is judged from here on, be there any or none.
            touched.add(Changed::POLICIES);
        }
        self.publish(touched);
        if self.answered.len() == ResourceKind::AGENT.len() {
            self.standing
                .send_if_modified(|standing| !std::mem::replace(&mut standing.heard, true));
        }
        if !touched.is_nothing() && self.save_at.is_none() {
            self.save_at = Some(Instant::now() + GATHER);
        }
        if requests.send(acknowledgement).await.is_err() {
            tracing::debug!("the stream ended before an answer was sent");
        }
        Ok(())
    }

    fn publish(&self, touched: Touched) {
        let synced = self.standing.borrow().synced;
        if let Some(changed) = touched.picture {
            self.picture.controller_spoke(&self.world, changed, synced);
        }
        if touched.pods || synced != self.pods.borrow().known {
            let wanted = Arc::new(self.world.wanted_pods(synced));
            self.pods.send_if_modified(|current| {
                let differs = **current != *wanted;
                if differs {
                    *current = wanted;
                }
                differs
            });
        }
    }

    async fn wait(&mut self, pause: Duration) {
        let over = Instant::now() + pause;
        while let Some(due) = self.save_at.filter(|due| *due < over) {
            sleep_until(due).await;
            self.save().await;
        }
        sleep_until(over).await;
    }

    async fn save(&mut self) {
        if self.save_at.take().is_none() {
            return;
        }
        // Half of a first answer on disk would count as all of it after a restart.
        if !self.standing.borrow().synced {
            return;
        }
        let state = self.held.save(|kind, name| self.world.find(kind, name));
        let saved = self.saved.clone();
        let written = tokio::task::spawn_blocking(move || saved.store(&state)).await;
        if let Err(error) = written.map_err(std::io::Error::other).and_then(|done| done) {
            tracing::warn!(%error, "the state of the mesh is not saved; trying again");
            self.save_at = Some(Instant::now() + Duration::from_secs(30));
        }
    }
}

async fn until(due: Option<Instant>) {
    match due {
        Some(due) => sleep_until(due).await,
        None => sleep(Duration::from_secs(86_400)).await,
    }
}

fn merge(first: Touched, second: Touched) -> Touched {
    let picture = match (first.picture, second.picture) {
        (Some(first), Some(second)) => Some(first.and(second)),
        (first, second) => first.or(second),
    };
    Touched { picture, pods: first.pods || second.pods }
}
