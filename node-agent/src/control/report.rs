//! Tells the controller which pods are captured, so that their peers use the tunnel.

use std::sync::Arc;
use std::time::Duration;

use mesh_enroll::PodPhase;
use mesh_wire::pb::mesh::EnrolledPod;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tonic::transport::Channel;

use super::backoff::Backoff;
use super::session::ControllerSession;
use crate::enrolment::enroller::Enroller;
use crate::error::error_chain;

/// Changes are gathered for so long: a node that starts enrols many pods at once.
const GATHER: Duration = Duration::from_millis(50);

/// Reports after each change and on each new connection, until `stop`.
pub(crate) async fn report_pods(
    session: ControllerSession,
    enroller: Arc<Enroller>,
    mut channel: watch::Receiver<Option<Channel>>,
    mut changes: watch::Receiver<u64>,
    stop: CancellationToken,
) {
    let mut backoff = Backoff::default();
    let mut reported: Option<Vec<EnrolledPod>> = None;
    loop {
        let connected = channel.borrow_and_update().clone();
        changes.borrow_and_update();
        let mut retry = None;
        if let Some(connected) = connected {
            let pods = enrolled(&enroller);
            if reported.as_ref() != Some(&pods) {
                match session.report(&connected, pods.clone()).await {
                    Ok(()) => {
                        backoff.reset();
                        reported = Some(pods);
                    }
                    Err(error) => {
                        tracing::warn!(error = %error_chain(&error), "enrolled pods are not reported");
                        retry = Some(backoff.next(crate::entropy::number()));
                    }
                }
            }
        } else {
            reported = None;
        }
        tokio::select! {
            changed = channel.changed() => {
                if changed.is_err() { return }
                reported = None;
            }
            changed = changes.changed() => {
                if changed.is_err() { return }
                tokio::time::sleep(GATHER).await;
            }
            () = async {
                match retry {
                    Some(pause) => tokio::time::sleep(pause).await,
                    None => std::future::pending().await,
                }
            } => {}
            () = stop.cancelled() => return,
        }
    }
}

fn enrolled(enroller: &Enroller) -> Vec<EnrolledPod> {
    enroller
        .list()
        .into_iter()
        .filter(|pod| pod.phase == PodPhase::Enrolled)
        .map(|pod| EnrolledPod {
            uid: pod.pod.uid.as_str().to_owned(),
            namespace: pod.pod.name.namespace().to_owned(),
            name: pod.pod.name.name().to_owned(),
            service_account: pod.pod.service_account.clone(),
            ips: pod.ips.iter().map(ToString::to_string).collect(),
        })
        .collect()
}
