//! Watches a Kubernetes API server.
//!
//! A follower per kind lists and watches it and trims what comes to what the mesh reads; one collector feeds the
//! `Ledger` and hands changes on in batches. While the API server is away, or refuses, everything it told before stays
//! in force; kinds of the Istio API whose definitions are not installed are waited for.

mod follow;
mod kinds;
mod ledger;
mod trimmed;

use std::path::PathBuf;
use std::time::Duration;

use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Client, Config};
use tokio::sync::mpsc::{self, Sender};
use tokio::task::JoinSet;
use tracing::{error, info, warn};

use super::{SourceEvent, SourceStatus};
use crate::manifest::Kind;
use follow::Follower;
pub(crate) use kinds::resource;
use ledger::Ledger;

/// What may wait between followers and collector. A full queue holds the followers back, and so the API server.
const QUEUE: usize = 1_024;
/// Most things that are handed to the index at once.
const BATCH: usize = 4_096;

/// How a cluster is watched.
#[derive(Clone, Debug)]
pub struct KubernetesSettings {
    /// How to reach it; `None` for `KUBECONFIG`, the user's own file or, inside a pod, its service account.
    pub kubeconfig: Option<PathBuf>,
    /// Time between two looks for a kind that is not installed; default 5 s.
    pub recheck_interval: Duration,
}

impl KubernetesSettings {
    /// Defaults for `kubeconfig`.
    #[must_use]
    pub const fn new(kubeconfig: Option<PathBuf>) -> Self {
        Self { kubeconfig, recheck_interval: Duration::from_secs(5) }
    }

    /// A client of the cluster. It is not spoken to yet.
    ///
    /// # Errors
    /// When there is no configuration, or it cannot be used.
    pub async fn client(&self) -> Result<Client, InvalidCluster> {
        let config = match &self.kubeconfig {
            None => Config::infer().await?,
            Some(path) => {
                let file = Kubeconfig::read_from(path)?;
                Config::from_custom_kubeconfig(file, &KubeConfigOptions::default()).await?
            }
        };
        Ok(Client::try_from(config)?)
    }
}

/// Why a cluster cannot be watched at all. Being unreachable is no reason: it is tried again.
#[derive(Debug, thiserror::Error)]
pub enum InvalidCluster {
    /// Neither a file nor a service account.
    #[error("no way to a cluster: give kubernetes:KUBECONFIG, set KUBECONFIG, or run in a pod")]
    NotFound(#[from] kube::config::InferConfigError),
    /// The file cannot be used.
    #[error("the kubeconfig cannot be used")]
    Kubeconfig(#[from] kube::config::KubeconfigError),
    /// The client cannot be made of it.
    #[error("the cluster's configuration cannot be used")]
    Client(#[from] kube::Error),
}

/// Starts watching; everything ends when `events` is closed.
pub fn watch(client: &Client, settings: &KubernetesSettings, events: Sender<SourceEvent>) {
    let (tell, told) = mpsc::channel(QUEUE);
    let mut followers = JoinSet::new();
    for kind in Kind::ALL {
        let follower = Follower::new(client.clone(), *kind, settings.recheck_interval);
        followers.spawn(follower.run(tell.clone()));
    }
    tokio::spawn(async move {
        // A kind that nobody follows any more would stand still unseen: the source ends as a whole instead.
        tokio::select! {
            () = collect(told, events) => {}
            Some(ended) = followers.join_next() => {
                if let Err(error) = ended {
                    error!(%error, "a kind is not followed any more");
                }
            }
        }
    });
}

async fn collect(mut told: mpsc::Receiver<ledger::Told>, events: Sender<SourceEvent>) {
    let mut ledger = Ledger::default();
    let mut last_status = None;
    let mut synced = false;
    let mut batch = Vec::new();
    while told.recv_many(&mut batch, BATCH).await > 0 {
        let changes: Vec<_> = batch.drain(..).flat_map(|told| ledger.take(told)).collect();
        let mut news = Vec::new();
        if !changes.is_empty() {
            news.push(SourceEvent::Changes(changes));
        }
        let status = ledger.status();
        if last_status.as_ref() != Some(&status) {
            let known = |refusal| {
                last_status
                    .as_ref()
                    .is_some_and(|last: &SourceStatus| last.refused.contains(refusal))
            };
            for refusal in status.refused.iter().filter(|refusal| !known(refusal)) {
                warn!(
                    object = refusal.object,
                    field = refusal.field,
                    problem = refusal.problem,
                    remedy = refusal.remedy,
                    "object refused"
                );
            }
            last_status = Some(status.clone());
            news.push(SourceEvent::Status(status));
        }
        if !synced && ledger.is_synced() {
            synced = true;
            info!(objects = ledger.objects(), "everything in the cluster has been read");
            news.push(SourceEvent::Synced);
        }
        for event in news {
            if events.send(event).await.is_err() {
                return;
            }
        }
    }
}
