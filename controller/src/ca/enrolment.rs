//! Joining the mesh: a join token once, then sessions that are prolonged.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Instant, SystemTime};

use mesh_telemetry::metric;
use mesh_wire::pb::mesh::enrolment_server::Enrolment;
use mesh_wire::pb::mesh::{JoinRequest, RenewRequest, ReportPodsReply, ReportPodsRequest, Session};
use tonic::{Request, Response, Status};
use tracing::{info, warn};

use super::authenticate::{Authenticate, caller};
use super::tokens::{Issued, Tokens};
use crate::cluster::uncaptured::Uncaptured;
use crate::door;
use crate::index::{Key, NodeReport};
use crate::mesh::SharedMesh;

/// Most pods in a report; a node of Kubernetes has 110 by default.
const MAX_PODS: usize = 10_000;
/// Most characters that are kept of a reason.
const MAX_REASON: usize = 1_000;

/// The enrolment service.
#[derive(Clone)]
pub struct Enrolments {
    mesh: SharedMesh,
    tokens: Arc<Tokens>,
    authenticate: Arc<dyn Authenticate>,
    uncaptured: Uncaptured,
}

impl std::fmt::Debug for Enrolments {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Enrolments").finish_non_exhaustive()
    }
}

impl Enrolments {
    /// A service that exchanges and prolongs `tokens`, and hears the reports of whoever `authenticate` knows; what cannot be
    /// captured goes to `uncaptured`.
    #[must_use]
    pub const fn new(
        mesh: SharedMesh,
        tokens: Arc<Tokens>,
        authenticate: Arc<dyn Authenticate>,
        uncaptured: Uncaptured,
    ) -> Self {
        Self { mesh, tokens, authenticate, uncaptured }
    }
}

fn session(issued: Issued) -> Response<Session> {
    Response::new(Session {
        token: issued.token,
        expires_at: issued
            .expires_at
            .duration_since(SystemTime::UNIX_EPOCH)
            .map_or(0, |since| since.as_secs()),
        node: issued.node.to_string(),
    })
}

#[tonic::async_trait]
impl Enrolment for Enrolments {
    async fn join(&self, request: Request<JoinRequest>) -> Result<Response<Session>, Status> {
        let (_, extensions, JoinRequest { join_token, node }) = request.into_parts();
        let tokens = Arc::clone(&self.tokens);
        let asked = node.clone();
        // Writing down that the token is spent waits for the disk.
        let outcome = tokio::task::spawn_blocking(move || {
            tokens.join(&join_token, &asked, SystemTime::now())
        })
        .await
        .map_err(|error| Status::internal(error.to_string()))?;
        match outcome {
            Ok(issued) => {
                door::admit(&extensions);
                info!(node, "node joined");
                metrics::counter!(metric::CONTROLLER_JOINS.name).increment(1);
                Ok(session(issued))
            }
            Err(refused) => {
                warn!(node, reason = refused.word(), "join refused");
                metrics::counter!(metric::CONTROLLER_UNAUTHENTICATED.name, "reason" => refused.word()).increment(1);
                Err(Status::unauthenticated(refused.with_remedy(&node)))
            }
        }
    }

    async fn renew(&self, request: Request<RenewRequest>) -> Result<Response<Session>, Status> {
        // Only what this controller issued can be prolonged by it.
        let caller = caller(&*self.tokens as &dyn Authenticate, &request).await?;
        door::admit(request.extensions());
        let issued = self
            .tokens
            .renew(&caller.node, SystemTime::now())
            .map_err(|error| Status::internal(error.to_string()))?;
        Ok(session(issued))
    }

    async fn report_pods(
        &self,
        request: Request<ReportPodsRequest>,
    ) -> Result<Response<ReportPodsReply>, Status> {
        let caller = caller(&*self.authenticate, &request).await?;
        door::admit(request.extensions());
        let ReportPodsRequest { pods, uncaptured } = request.into_inner();
        if pods.len() > MAX_PODS || uncaptured.len() > MAX_PODS {
            return Err(Status::invalid_argument(format!("more than {MAX_PODS} pods")));
        }
        let keys: BTreeSet<Key> =
            pods.iter().map(|pod| Key::new(&pod.namespace, &pod.name)).collect();
        let uncaptured = uncaptured.into_iter().map(|pod| {
            let reason = pod.reason.chars().take(MAX_REASON).collect();
            (Key::new(&pod.namespace, &pod.name), reason)
        });
        self.uncaptured.report(&caller.node, uncaptured.collect(), Instant::now());
        self.mesh.report(&caller.node, NodeReport::Enrolled(keys));
        Ok(Response::new(ReportPodsReply {}))
    }
}
