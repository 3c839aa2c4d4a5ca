//! Simulated agents: each proves a node, subscribes and acknowledges, and tells what it was told.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use mesh_control::session::{ControllerConfig, ControllerSession, Credential};
use mesh_wire::pb::discovery::aggregated_discovery_service_client::AggregatedDiscoveryServiceClient;
use mesh_wire::pb::discovery::{DeltaDiscoveryRequest, Node};
use mesh_wire::{MAX_MESSAGE_BYTES, NodeIdentity, ResourceKind};
use tokio::sync::{Semaphore, mpsc};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Request;

use super::LISTEN;
use super::api::node_name;

/// How many join at once: the controller lets 64 of one address wait.
const AT_ONCE: usize = 32;
/// Responses with more are of the beginning, not a change.
const FEW: usize = 16;

/// What one agent was told at once.
struct Told {
    agent: usize,
    workloads: usize,
    /// The names, when they are few.
    names: Vec<String>,
    at: Instant,
}

/// All of them.
pub(super) struct Agents {
    count: usize,
    told: mpsc::Receiver<anyhow::Result<Told>>,
    known: Vec<usize>,
}

impl Agents {
    /// Has `count` agents join.
    pub(super) fn connect(count: usize, program: &Path, folder: &Path) -> anyhow::Result<Self> {
        let state = folder.join("state");
        let root = folder.join("root.pem");
        std::fs::write(&root, ask(program, &state, &["ca", "root"])?)?;
        let (tell, told) = mpsc::channel(65_536);
        let doors = Arc::new(Semaphore::new(AT_ONCE));
        for agent in 0..count {
            let name = node_name(agent);
            let token = folder.join(format!("{name}.token"));
            std::fs::write(&token, ask(program, &state, &["token", "create", "--node", &name])?)?;
            let config = ControllerConfig {
                address: format!("https://localhost:{}", port()).parse()?,
                root: root.clone(),
                node: name.clone(),
                credential: Credential::Join { file: Some(token), kept: kept(folder, &name) },
            };
            let (tell, doors) = (tell.clone(), Arc::clone(&doors));
            tokio::spawn(async move {
                let ended = follow(agent, config, &doors, &tell).await;
                let error = ended.err().unwrap_or_else(|| anyhow::anyhow!("the stream ended"));
                // Nobody listens any more once the measurement is over.
                let _unheard = tell.send(Err(error.context(format!("agent {agent}")))).await;
            });
        }
        Ok(Self { count, told, known: vec![0; count] })
    }

    /// Waits until every agent was told of so many workloads.
    pub(super) async fn have(
        &mut self,
        workloads: usize,
        patience: Duration,
    ) -> anyhow::Result<()> {
        let deadline = Instant::now() + patience;
        while self.known.iter().any(|known| *known < workloads) {
            let told = self.next(deadline).await.with_context(|| {
                let least = self.known.iter().min().copied().unwrap_or(0);
                format!("{least} of {workloads} workloads at the slowest agent")
            })?;
            self.known[told.agent] += told.workloads;
        }
        Ok(())
    }

    /// Waits until every agent was told of a workload whose name ends so: when each was.
    pub(super) async fn saw(
        &mut self,
        name: &str,
        patience: Duration,
    ) -> anyhow::Result<Vec<Instant>> {
        let deadline = Instant::now() + patience;
        let mut seen: Vec<Option<Instant>> = vec![None; self.count];
        while seen.iter().any(Option::is_none) {
            let told = self.next(deadline).await.with_context(|| {
                let missing = seen.iter().filter(|one| one.is_none()).count();
                format!("{missing} agents were not told of {name}")
            })?;
            if told.names.iter().any(|one| one.ends_with(name)) {
                seen[told.agent].get_or_insert(told.at);
            }
        }
        Ok(seen.into_iter().flatten().collect())
    }

    async fn next(&mut self, deadline: Instant) -> anyhow::Result<Told> {
        match tokio::time::timeout_at(deadline.into(), self.told.recv()).await {
            Ok(Some(told)) => told,
            Ok(None) => bail!("all agents have ended"),
            Err(_elapsed) => bail!("it takes too long"),
        }
    }
}

async fn follow(
    agent: usize,
    config: ControllerConfig,
    doors: &Semaphore,
    tell: &mpsc::Sender<anyhow::Result<Told>>,
) -> anyhow::Result<()> {
    let node: Node = (&NodeIdentity {
        ip: [127, 0, 0, 1].into(),
        pod_name: config.node.clone(),
        pod_namespace: "culvert-system".to_owned(),
        node_name: config.node.clone(),
        cluster_id: "Kubernetes".to_owned(),
        cluster_domain: "cluster.local".to_owned(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
    })
        .into();
    let session = ControllerSession::new(config);
    let door = doors.acquire().await?;
    let channel = session.connect(None).await?;
    let bearer = session.bearer(&channel).await?;
    drop(door);
    let (requests, outgoing) = mpsc::channel(64);
    for kind in ResourceKind::AGENT {
        let type_url = kind.type_url().to_owned();
        let request =
            DeltaDiscoveryRequest { node: Some(node.clone()), type_url, ..Default::default() };
        requests.send(request).await?;
    }
    let mut request = Request::new(ReceiverStream::new(outgoing));
    request.metadata_mut().insert("authorization", bearer);
    let mut responses = AggregatedDiscoveryServiceClient::new(channel)
        .max_decoding_message_size(MAX_MESSAGE_BYTES)
        .delta_aggregated_resources(request)
        .await?
        .into_inner();
    while let Some(response) = responses.message().await? {
        let at = Instant::now();
        let is_of_workloads = response.type_url == ResourceKind::Address.type_url();
        let acknowledgement = DeltaDiscoveryRequest {
            type_url: response.type_url,
            response_nonce: response.nonce,
            ..Default::default()
        };
        requests.send(acknowledgement).await?;
        if is_of_workloads {
            let workloads = response.resources.len();
            let names = if workloads <= FEW { response.resources } else { Vec::new() };
            let names = names.into_iter().map(|resource| resource.name).collect();
            tell.send(Ok(Told { agent, workloads, names, at })).await?;
        }
    }
    Ok(())
}

fn kept(folder: &Path, node: &str) -> PathBuf {
    folder.join(format!("{node}.kept"))
}

fn port() -> &'static str {
    LISTEN.rsplit_once(':').map_or(LISTEN, |(_, port)| port)
}

fn ask(program: &Path, state: &Path, what: &[&str]) -> anyhow::Result<String> {
    let output = Command::new(program).args(what).arg("--state-dir").arg(state).output()?;
    if !output.status.success() {
        bail!("{what:?}: {}", String::from_utf8_lossy(&output.stderr));
    }
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}
