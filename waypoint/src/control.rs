//! The controller: the delta xDS stream kept open, the certificate kept fresh, what is said put into the picture.

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use anyhow::Context as _;
use mesh_control::backoff::Backoff;
use mesh_control::session::ControllerSession;
use mesh_identity::{
    IssuedAnswer, Now, RotationCommand, RotationCore, RotationInput, Urgency, csr,
};
use mesh_model::SpiffeId;
use mesh_runtime::Pending;
use mesh_wire::pb::auth::istio_certificate_service_client::IstioCertificateServiceClient;
use mesh_wire::pb::discovery::aggregated_discovery_service_client::AggregatedDiscoveryServiceClient;
use mesh_wire::pb::discovery::{DeltaDiscoveryRequest, Node};
use mesh_wire::{
    DeltaClientState, MAX_MESSAGE_BYTES, NodeIdentity, ResourceKind, certificate_request,
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;
use tonic::{Code, Request, Status};

use crate::config::Settings;
use crate::keys::KeyStore;
use crate::picture::{Picture, World};

/// What a certificate is asked for; the controller may give less.
const LEAF_LIFE: Duration = Duration::from_secs(24 * 3600);
const CALL_TIMEOUT: Duration = Duration::from_secs(10);

/// The waypoint's side of the controller.
pub(crate) struct Control {
    session: ControllerSession,
    node: Node,
    service_account: String,
    held: DeltaClientState,
    world: World,
    rotation: RotationCore,
    issued: Option<IssuedAnswer>,
    wanted: Option<SpiffeId>,
    /// Stamp of the identity that was last looked at for being revoked.
    looked_at: u64,
    picture: Arc<Picture>,
    pending: Option<Pending>,
}

impl Control {
    /// A side that fills `picture`; `pending` is done once it is whole.
    pub(crate) fn new(
        settings: &Settings,
        picture: Arc<Picture>,
        keys: Arc<KeyStore>,
        pending: Pending,
    ) -> Self {
        let config = settings.controller();
        let identity = NodeIdentity {
            ip: [127, 0, 0, 1].into(),
            pod_name: settings.gateway.name.to_string(),
            pod_namespace: settings.gateway.namespace.to_string(),
            node_name: config.node.clone(),
            cluster_id: "Kubernetes".to_owned(),
            cluster_domain: "cluster.local".to_owned(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
        };
        Self {
            session: ControllerSession::new(config),
            node: (&identity).into(),
            service_account: settings.service_account().to_owned(),
            held: DeltaClientState::new(&ResourceKind::WAYPOINT),
            world: World::new(settings.gateway.clone(), keys),
            rotation: RotationCore::new(random()),
            issued: None,
            wanted: None,
            looked_at: 0,
            picture,
            pending: Some(pending),
        }
    }

    /// Follows the controller for ever.
    pub(crate) async fn run(mut self) {
        let mut backoff = Backoff::default();
        let mut last = String::new();
        loop {
            let mut heard = false;
            if let Err(error) = self.converse(&mut heard).await {
                let text = format!("{error:#}");
                if heard || text != last {
                    tracing::warn!(
                        error = text,
                        "no stream to the controller; what it said last stays in force"
                    );
                }
                last = text;
                let refused = error.downcast_ref::<Status>().map(Status::code);
                if refused == Some(Code::Unauthenticated) {
                    self.session.forget().await;
                }
            }
            if heard {
                backoff.reset();
            }
            #[expect(clippy::cast_possible_truncation, reason = "any part of a random number")]
            tokio::time::sleep(backoff.next(random() as u32)).await;
        }
    }

    async fn converse(&mut self, heard: &mut bool) -> anyhow::Result<()> {
        let channel = self.session.connect(self.world.roots()).await?;
        let bearer = self.session.bearer(&channel).await?;
        let (requests, outgoing) = mpsc::channel(16);
        for request in self.held.start(&self.node) {
            requests.send(request).await.context("the stream ended")?;
        }
        let mut request = Request::new(ReceiverStream::new(outgoing));
        request.metadata_mut().insert("authorization", bearer);
        let mut responses = AggregatedDiscoveryServiceClient::new(channel.clone())
            .max_decoding_message_size(MAX_MESSAGE_BYTES)
            .delta_aggregated_resources(request)
            .await?
            .into_inner();
        tracing::info!("the controller is connected");
        loop {
            self.certify(&channel).await;
            let due = self.rotation.poll_timeout().map(tokio::time::Instant::from_std);
            tokio::select! {
                response = responses.message() => {
                    let response = response?.context("the controller ended the stream")?;
                    *heard = true;
                    let (update, acknowledgement) = self.held.handle(response)?;
                    self.world.apply(update);
                    self.settle();
                    acknowledge(&requests, acknowledgement).await?;
                }
                () = async {
                    match due {
                        Some(due) => tokio::time::sleep_until(due).await,
                        None => std::future::pending().await,
                    }
                } => self.feed(RotationInput::Tick),
            }
        }
    }

    /// Shows requests what was said, once all of it was.
    fn settle(&mut self) {
        if self.held.is_synced() {
            self.world.set_synced();
        }
        let wanted = self.world.wanted(&self.service_account);
        if wanted != self.wanted {
            if let Some(id) = &wanted {
                self.feed(RotationInput::Want { id: id.clone(), urgency: Urgency::Waiting });
            }
            self.wanted = wanted;
        }
        self.world.publish(&self.picture);
        let snapshot = self.picture.snapshot();
        if let Some(identity) = &snapshot.identity
            && identity.stamp != self.looked_at
        {
            self.looked_at = identity.stamp;
            if identity.svid.is_revoked(&snapshot.trust, SystemTime::now()) {
                tracing::warn!(id = %identity.svid.id(), "the certificate was revoked; asking for another");
                self.feed(RotationInput::Rejected { id: identity.svid.id().clone() });
            }
        }
        if snapshot.synced
            && snapshot.identity.is_some()
            && let Some(pending) = self.pending.take()
        {
            pending.done();
        }
    }

    fn feed(&mut self, input: RotationInput) {
        self.rotation.handle(input, Now { wall: SystemTime::now(), monotonic: Instant::now() });
    }

    /// Does what the rotation asks for. One identity: one request at a time is enough.
    async fn certify(&mut self, channel: &Channel) {
        while let Some(command) = self.rotation.poll_command() {
            match command {
                RotationCommand::Request { id } => match self.ask(channel, &id).await {
                    Ok(answer) => {
                        let (not_before, not_after) =
                            (answer.svid.not_before(), answer.svid.not_after());
                        self.issued = Some(answer);
                        self.feed(RotationInput::Issued { id, not_before, not_after });
                    }
                    Err(error) => {
                        tracing::warn!(%id, error = %format!("{error:#}"), "no certificate; trying again");
                        self.feed(RotationInput::Failed { id });
                    }
                },
                RotationCommand::Install { id } => {
                    if let Some(answer) = self.issued.take() {
                        tracing::info!(%id, "certified");
                        self.world.certified(answer.svid);
                        self.settle();
                    }
                }
                RotationCommand::Discard { .. } => self.issued = None,
            }
        }
    }

    async fn ask(&self, channel: &Channel, id: &SpiffeId) -> anyhow::Result<IssuedAnswer> {
        let (key, pem) = csr(id)?;
        let mut request = Request::new(certificate_request(pem, id, LEAF_LIFE));
        request.set_timeout(CALL_TIMEOUT);
        let bearer = self.session.bearer(channel).await?;
        request.metadata_mut().insert("authorization", bearer);
        let answer = IstioCertificateServiceClient::new(channel.clone())
            .create_certificate(request)
            .await
            .map_err(|status| anyhow::anyhow!("the CA refused: {}", status.message()))?
            .into_inner();
        let answer = IssuedAnswer::check(&answer.cert_chain, id, key, SystemTime::now())?;
        let trust = Arc::clone(&self.picture.snapshot().trust);
        anyhow::ensure!(
            !answer.svid.is_revoked(&trust, SystemTime::now()),
            "the CA's answer is revoked already"
        );
        Ok(answer)
    }
}

async fn acknowledge(
    requests: &mpsc::Sender<DeltaDiscoveryRequest>,
    acknowledgement: DeltaDiscoveryRequest,
) -> anyhow::Result<()> {
    requests.send(acknowledgement).await.context("the stream ended")
}

/// Randomness for jitter and for choices between equals; nothing secret comes from here.
pub(crate) fn random() -> u64 {
    let mut bytes = [0; 8];
    match aws_lc_rs::rand::fill(&mut bytes) {
        Ok(()) | Err(_) => u64::from_ne_bytes(bytes),
    }
}
