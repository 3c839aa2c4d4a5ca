//! Delta xDS for agents.

mod frames;
mod store;

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use http::header::CONTENT_TYPE;
use mesh_runtime::Drain;
use mesh_telemetry::metric;
use mesh_wire::pb::discovery::aggregated_discovery_service_server::SERVICE_NAME;
use mesh_wire::pb::discovery::{DeltaDiscoveryRequest, DeltaDiscoveryResponse};
use mesh_wire::{DeltaServerState, Received, ResourceKind, node_name};
use tokio::sync::mpsc;
use tonic::body::Body;
use tonic::codegen::{BoxFuture, Service};
use tonic::metadata::{GRPC_CONTENT_TYPE, MetadataMap};
use tonic::server::NamedService;
use tonic::{Request, Status};
use tracing::{debug, info, warn};

use crate::ca::authenticate::{Authenticate, NodeCaller, caller};
use crate::door;
use crate::index::NodeReport;
use crate::mesh::SharedMesh;
use frames::{Requests, Responses};

pub use self::frames::take_request;
pub use self::store::{Name, Position, Since, Store};

/// An agent that takes no response for this long is cut off; it comes back and resumes.
const SEND_TIMEOUT: Duration = Duration::from_secs(60);

/// The xDS service.
#[derive(Clone)]
pub struct Discovery {
    mesh: SharedMesh,
    authenticate: Arc<dyn Authenticate>,
    debounce: Duration,
    streams: Arc<Streams>,
    draining: Drain,
}

impl std::fmt::Debug for Discovery {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Discovery").field("debounce", &self.debounce).finish_non_exhaustive()
    }
}

/// Streams that are open, by node.
#[derive(Debug, Default)]
struct Streams {
    next: AtomicU64,
    open: Mutex<BTreeMap<Arc<str>, usize>>,
}

impl Discovery {
    /// A service over `mesh`. Changes are collected for `debounce` before agents are told; streams end when `draining`.
    #[must_use]
    pub fn new(
        mesh: SharedMesh,
        authenticate: Arc<dyn Authenticate>,
        debounce: Duration,
        draining: Drain,
    ) -> Self {
        Self { mesh, authenticate, debounce, streams: Arc::default(), draining }
    }
}

/// The one call that is served. Source: envoy/discovery.proto.
const DELTA_PATH: &str =
    "/envoy.service.discovery.v3.AggregatedDiscoveryService/DeltaAggregatedResources";

impl NamedService for Discovery {
    const NAME: &'static str = SERVICE_NAME;
}

impl Service<http::Request<Body>> for Discovery {
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<Self::Response, Infallible>;

    fn poll_ready(&mut self, _context: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let service = self.clone();
        Box::pin(async move {
            if request.uri().path() != DELTA_PATH {
                return Ok(Status::unimplemented("only delta streams are served").into_http());
            }
            let (parts, body) = request.into_parts();
            let metadata = MetadataMap::from_headers(parts.headers);
            let request = Request::from_parts(metadata, parts.extensions, Requests::new(body));
            Ok(match service.open(request).await {
                Ok(responses) => {
                    let mut response = http::Response::new(Body::new(responses));
                    response.headers_mut().insert(CONTENT_TYPE, GRPC_CONTENT_TYPE);
                    response
                }
                Err(status) => status.into_http(),
            })
        })
    }
}

impl Discovery {
    /// Starts a stream for a caller that proves its node.
    async fn open(&self, request: Request<Requests>) -> Result<Responses, Status> {
        let caller = caller(&*self.authenticate, &request).await?;
        door::admit(request.extensions());
        let (send, receive) = mpsc::channel(1);
        let session = Session {
            mesh: Arc::clone(&self.mesh),
            caller,
            debounce: self.debounce,
            send,
            draining: self.draining.clone(),
            state: DeltaServerState::new(self.streams.next.fetch_add(1, Ordering::Relaxed)),
        };
        let streams = Arc::clone(&self.streams);
        tokio::spawn(async move {
            let mesh = Arc::clone(&session.mesh);
            let node = Arc::clone(&session.caller.node);
            let _open = OpenStream::new(streams, mesh, node);
            session.run(request.into_inner()).await;
        });
        Ok(Responses::new(receive))
    }
}

/// Counts a stream for as long as it lives, and tells the index about a node's first and last.
struct OpenStream {
    streams: Arc<Streams>,
    mesh: SharedMesh,
    node: Arc<str>,
}

impl OpenStream {
    fn new(streams: Arc<Streams>, mesh: SharedMesh, node: Arc<str>) -> Self {
        metrics::gauge!(metric::CONTROLLER_STREAMS.name).increment(1);
        {
            let mut open = streams.open.lock().unwrap_or_else(PoisonError::into_inner);
            let count = open.entry(Arc::clone(&node)).or_default();
            *count += 1;
            if *count == 1 {
                info!(%node, "agent connected");
                mesh.report(&node, NodeReport::Connected);
            }
        }
        Self { streams, mesh, node }
    }
}

impl Drop for OpenStream {
    fn drop(&mut self) {
        metrics::gauge!(metric::CONTROLLER_STREAMS.name).decrement(1);
        let mut open = self.streams.open.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(count) = open.get_mut(&self.node) else { return };
        *count -= 1;
        if *count == 0 {
            open.remove(&self.node);
            info!(node = %self.node, "agent disconnected");
            self.mesh.report(&self.node, NodeReport::Disconnected);
        }
    }
}

/// One stream.
struct Session {
    mesh: SharedMesh,
    caller: NodeCaller,
    debounce: Duration,
    send: mpsc::Sender<Result<DeltaDiscoveryResponse, Status>>,
    draining: Drain,
    state: DeltaServerState,
}

impl Session {
    async fn run(mut self, requests: Requests) {
        let expiry = tokio::time::sleep(self.caller.valid_for);
        tokio::pin!(expiry);
        let draining = self.draining.clone();
        let status = tokio::select! {
            outcome = self.converse(requests) => match outcome {
                Ok(()) => return,
                Err(status) => status,
            },
            () = &mut expiry => Status::unauthenticated("the session has ended; renew it and connect again"),
            () = draining.begun() => Status::unavailable("the controller stops; connect again"),
        };
        debug!(node = %self.caller.node, %status, "stream ended");
        // The agent may be gone as well, and then nobody reads why.
        if self.send.try_send(Err(status)).is_err() {
            debug!(node = %self.caller.node, "the reason was not delivered");
        }
    }

    async fn converse(&mut self, mut requests: Requests) -> Result<(), Status> {
        self.mesh.synced().await;
        let mut end = self.mesh.store().watch();
        let mut position = *end.borrow_and_update();
        loop {
            tokio::select! {
                request = requests.next() => match request {
                    None => return Ok(()),
                    Some(Err(status)) => return Err(status),
                    Some(Ok(request)) => self.request(request)?,
                },
                changed = end.changed() => {
                    if changed.is_err() {
                        return Ok(());
                    }
                    // What else changes at the same time goes into the same response.
                    tokio::time::sleep(self.debounce).await;
                    end.borrow_and_update();
                    position = self.mesh.store().mark(position, &mut self.state);
                }
            }
            while let Some(response) = self.mesh.store().poll(&self.caller.node, &mut self.state) {
                let kind = kind_label(&response.type_url);
                metrics::counter!(metric::CONTROLLER_PUSHES.name, "kind" => kind).increment(1);
                metrics::counter!(metric::CONTROLLER_PUSHED.name, "kind" => kind).increment(
                    (response.resources.len() + response.removed_resources.len()) as u64,
                );
                match tokio::time::timeout(SEND_TIMEOUT, self.send.send(Ok(response))).await {
                    Ok(Ok(())) => {}
                    Ok(Err(_closed)) => return Ok(()),
                    Err(_elapsed) => {
                        metrics::counter!(metric::CONTROLLER_SLOW_AGENTS.name).increment(1);
                        return Err(Status::deadline_exceeded(
                            "responses are not read; connect again",
                        ));
                    }
                }
            }
        }
    }

    fn request(&mut self, request: DeltaDiscoveryRequest) -> Result<(), Status> {
        // Scope is decided by what was proved; a claim that differs is a mistake worth stopping at.
        if let Some(claimed) =
            request.node.as_ref().and_then(node_name).filter(|name| *name != &*self.caller.node)
        {
            return Err(Status::permission_denied(format!(
                "the token is of node {}, the request of node {claimed:?}",
                self.caller.node
            )));
        }
        match self.state.handle(request) {
            Ok(Received::Refused { kind, message }) => {
                let kind = kind_label(kind.type_url());
                metrics::counter!(metric::CONTROLLER_NACKS.name, "kind" => kind).increment(1);
                warn!(node = %self.caller.node, kind, message, "the agent refused resources");
                Ok(())
            }
            Ok(Received::Subscribed(_) | Received::Acknowledged(_) | Received::Stale(_)) => Ok(()),
            Err(error) => Err(Status::invalid_argument(error.to_string())),
        }
    }
}

fn kind_label(type_url: &str) -> &'static str {
    match ResourceKind::from_type_url(type_url) {
        Some(ResourceKind::Mesh) => "mesh",
        Some(ResourceKind::Pod) => "pod",
        Some(ResourceKind::Authorization) => "authorization",
        Some(ResourceKind::Address) => "address",
        Some(ResourceKind::Frontend) => "frontend",
        Some(ResourceKind::Route) => "route",
        Some(ResourceKind::Authentication) => "authentication",
        None => "unknown",
    }
}
