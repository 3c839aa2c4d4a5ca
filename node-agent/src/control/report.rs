//! Tells the controller which pods are captured, so that their peers use the tunnel, and which cannot be, for an operator.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use mesh_enroll::{PodName, PodPhase};
use mesh_wire::pb::mesh::{EnrolledPod, ReportPodsRequest, UncapturedPod};
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
    mut blocked: watch::Receiver<Arc<BTreeMap<PodName, String>>>,
    stop: CancellationToken,
) {
    let mut backoff = Backoff::default();
    let mut reported: Option<ReportPodsRequest> = None;
    loop {
        let connected = channel.borrow_and_update().clone();
        changes.borrow_and_update();
        let mut retry = None;
        if let Some(connected) = connected {
            let report = report(&enroller, &blocked.borrow_and_update());
            if reported.as_ref() != Some(&report) {
                match session.report(&connected, report.clone()).await {
                    Ok(()) => {
                        backoff.reset();
                        reported = Some(report);
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
            changed = blocked.changed() => if changed.is_err() { return },
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

fn report(enroller: &Enroller, blocked: &BTreeMap<PodName, String>) -> ReportPodsRequest {
    let (mut pods, mut uncaptured) = (Vec::new(), Vec::new());
    for (name, reason) in blocked {
        uncaptured.push(not_captured(name, reason));
    }
    for pod in enroller.list() {
        let name = &pod.pod.name;
        match pod.phase {
            PodPhase::Enrolled => pods.push(EnrolledPod {
                uid: pod.pod.uid.as_str().to_owned(),
                namespace: name.namespace().to_owned(),
                name: name.name().to_owned(),
                service_account: pod.pod.service_account.clone(),
                ips: pod.ips.iter().map(ToString::to_string).collect(),
            }),
            PodPhase::Pending => uncaptured.push(not_captured(name, &pod.detail)),
            PodPhase::Excluded | PodPhase::Draining | PodPhase::Closed => {}
        }
    }
    ReportPodsRequest { pods, uncaptured }
}

fn not_captured(name: &PodName, reason: &str) -> UncapturedPod {
    UncapturedPod {
        namespace: name.namespace().to_owned(),
        name: name.name().to_owned(),
        reason: reason.to_owned(),
    }
}
