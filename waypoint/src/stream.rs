//! A stream of a tunnel: what is spoken in it, and the connections of HTTP.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use http::StatusCode;
use hyper::server::conn::{http1, http2};
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use mesh_authorize::{Connection, Decision, authorize_connection};
use mesh_model::{
    ClientAddr, Direction, Flow, FlowId, HealthStatus, OrigDst, PodUid, Service, Workload,
    error_chain,
};
use mesh_resolve::{Addressed, Authority, ResolvedFlow, Unroutable, resolve, resolve_fronted};
use mesh_runtime::Drain;
use mesh_telemetry::{Forwarded, metric};
use mesh_wire::AppProtocol;
use tokio::io::{AsyncRead, AsyncWrite, copy_bidirectional_with_sizes};

use crate::control::random;
use crate::detect::{Rewound, Spoken, detect};
use crate::picture::{Served, Snapshot};
use crate::refusal::Refusal;
use crate::request::handle;
use crate::strict::Followed;
use crate::upstream::{CONNECTION_WINDOW, STREAM_WINDOW, Way, Wire};
use crate::worker::{Peer, Worker};

/// Longest wait for the head of a request, also on a connection that is kept.
const HEAD_TIMEOUT: Duration = Duration::from_secs(300);
/// Bytes of a head, and of what is read ahead.
const MAX_HEAD: usize = 64 * 1024;
/// Requests at once on one connection.
const MAX_REQUESTS: u32 = 1_024;
/// Bytes of a passed-on stream that are held in each direction.
const COPY_BUFFER: usize = 32 * 1024;

/// For a service without address.
const UNSPECIFIED: IpAddr = IpAddr::V4(Ipv4Addr::UNSPECIFIED);

/// What may come in a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Expected {
    /// Bytes, of which no requests are read.
    Anything,
    /// HTTP: it is declared.
    Http,
    /// Nothing is declared, and routes or policies on requests wait there: what is no HTTP would get around them.
    HttpOrNothing,
    /// Nothing is declared: whatever comes is found out.
    Detected,
}

/// The frontend that was dialled, if it is a service, and the names of the policies that hold there.
pub(crate) type Attached = (Option<Arc<Served>>, Arc<[Arc<str>]>);

/// A stream that was asked for, and by whom.
pub(crate) struct Dialled {
    pub(crate) worker: Arc<Worker>,
    pub(crate) peer: Arc<Peer>,
    /// This waypoint's workload at which it came.
    pub(crate) own: Arc<Workload>,
    /// What is dialled.
    pub(crate) addressed: Addressed,
    /// As it was asked for.
    pub(crate) authority: Authority,
    /// The client's address, for logs.
    pub(crate) client: SocketAddr,
}

impl Dialled {
    /// The service that was dialled.
    pub(crate) const fn service(&self) -> Option<&Arc<Service>> {
        match &self.addressed {
            Addressed::Service(service) => Some(service),
            Addressed::Workload(_) => None,
        }
    }

    /// The frontend that was dialled, and the policies that hold there.
    ///
    /// # Errors
    /// When this waypoint has not been told of it: then nobody knows which policies hold. When the address has become
    /// somebody else's since the tunnel's stream was opened.
    pub(crate) fn attached(&self, snapshot: &Snapshot) -> Result<Attached, Refusal> {
        let still =
            match (resolve_fronted(&snapshot.index, &self.own, &self.authority), &self.addressed) {
                (Ok(Addressed::Service(now)), Addressed::Service(then)) => now.key == then.key,
                (Ok(Addressed::Workload(now)), Addressed::Workload(then)) => now.uid == then.uid,
                (Ok(Addressed::Service(_) | Addressed::Workload(_)) | Err(_), _) => false,
            };
        if !still {
            let detail = format!(
                "{} is no longer what was dialled, or not behind this waypoint",
                self.authority
            );
            return Err(Refusal::unavailable("wrong_destination", detail));
        }
        let Some(of_gateway) = snapshot.gateway_policies() else {
            let detail = "nothing is known of this waypoint's Gateway, nor of the policies there";
            return Err(Refusal::unavailable("unknown_gateway", detail));
        };
        match &self.addressed {
            Addressed::Workload(_) => Ok((None, Arc::clone(of_gateway))),
            Addressed::Service(service) => {
                let served = snapshot.served(&service.key).ok_or_else(|| {
                    let detail = format!("{} is not served by this waypoint", service.key);
                    Refusal::unavailable("unknown_frontend", detail)
                })?;
                Ok((Some(Arc::clone(served)), Arc::clone(&served.policies)))
            }
        }
    }

    /// The RequestAuthentications that hold for requests to what was dialled.
    pub(crate) fn authentications(
        &self,
        snapshot: &Snapshot,
        served: Option<&Served>,
    ) -> Arc<[Arc<str>]> {
        match (&self.addressed, served) {
            (Addressed::Workload(workload), _) => Arc::clone(snapshot.of_workload(workload)),
            (Addressed::Service(_), Some(served)) => Arc::clone(&served.authentications),
            (Addressed::Service(_), None) => Arc::default(),
        }
    }

    /// What is spoken at the port that was dialled.
    fn protocol(
        &self,
        snapshot: &Snapshot,
        served: Option<&Served>,
        policies: &[Arc<str>],
    ) -> Expected {
        let port = self.authority.port();
        match served.map_or(AppProtocol::Detect, |served| served.protocol(port)) {
            AppProtocol::Tcp => Expected::Anything,
            AppProtocol::Http1 | AppProtocol::Http2 => Expected::Http,
            AppProtocol::Detect => {
                let is_routed = served
                    .is_some_and(|served| snapshot.routes.is_routed(&served.config.frontend, port));
                if is_routed || snapshot.policies.asks_for_requests(policies) {
                    Expected::HttpOrNothing
                } else {
                    Expected::Detected
                }
            }
        }
    }

    /// A connection to a port of a service as policies see it: the port is the endpoints'.
    pub(crate) fn connection(
        &self,
        snapshot: &Snapshot,
        service: &Service,
        port: u16,
    ) -> Connection<'_> {
        let is_dialled = self.service().is_some_and(|dialled| dialled.key == service.key);
        let ip = match (&self.authority, service.vips.first()) {
            (Authority::Address(address), _) if is_dialled => address.ip(),
            (Authority::Address(_) | Authority::Hostname { .. }, Some(vip)) => vip.ip,
            (Authority::Address(_) | Authority::Hostname { .. }, None) => UNSPECIFIED,
        };
        self.connection_to(SocketAddr::new(
            ip,
            snapshot.index.target_port(service, port).unwrap_or(port),
        ))
    }

    /// The connection to the workload that was dialled, as policies see it.
    pub(crate) fn to_workload(&self) -> Connection<'_> {
        self.connection_to(match &self.authority {
            Authority::Address(address) => *address,
            Authority::Hostname { port, .. } => SocketAddr::new(UNSPECIFIED, *port),
        })
    }

    fn connection_to(&self, destination: SocketAddr) -> Connection<'_> {
        Connection {
            identity: Some(&self.peer.identity),
            source_ip: self.peer.address.ip(),
            destination,
        }
    }

    /// What the far end is told of who dialled.
    pub(crate) fn forwarded(&self) -> Forwarded {
        Forwarded {
            client: Some(self.client),
            host: self.service().map(|service| Arc::clone(&service.key.hostname)),
        }
    }

    /// An endpoint of what was dialled, by the same rules as an agent finds one.
    pub(crate) async fn endpoint(&self, snapshot: &Snapshot) -> Result<ResolvedFlow, Refusal> {
        match &self.addressed {
            Addressed::Service(service) => {
                self.endpoint_of(snapshot, service, self.authority.port()).await
            }
            Addressed::Workload(workload) => {
                let ip = match &self.authority {
                    Authority::Address(address) => Some(address.ip()),
                    Authority::Hostname { .. } => workload.addresses.first().copied(),
                };
                let ip = ip.ok_or_else(|| {
                    Refusal::unavailable("no_healthy_upstream", "the workload has no address")
                })?;
                self.resolve(snapshot, SocketAddr::new(ip, self.authority.port())).await
            }
        }
    }

    /// An endpoint of a service.
    pub(crate) async fn endpoint_of(
        &self,
        snapshot: &Snapshot,
        service: &Arc<Service>,
        port: u16,
    ) -> Result<ResolvedFlow, Refusal> {
        // Its addresses may have changed since it was dialled.
        let service = snapshot.index.service(&service.key).unwrap_or(service);
        if let Some(vip) = service.vips.first() {
            return self.resolve(snapshot, SocketAddr::new(vip.ip, port)).await;
        }
        // Headless: its endpoints are dialled themselves.
        let candidates: Vec<SocketAddr> = snapshot
            .index
            .endpoints(&service.key)
            .filter(|workload| workload.status == HealthStatus::Healthy)
            .filter_map(|workload| {
                let own = workload.services.get(&service.key)?;
                let mut ports = own.iter().chain(&service.ports);
                let found = ports.find(|one| one.service_port == port && one.target_port != 0)?;
                Some(SocketAddr::new(*workload.addresses.first()?, found.target_port))
            })
            .collect();
        let count = candidates.len().max(1) as u64;
        let chosen = usize::try_from(random() % count).ok().and_then(|at| candidates.get(at));
        match chosen {
            Some(address) => self.resolve(snapshot, *address).await,
            None => {
                let detail = format!("service {} has no endpoint to send to", service.key);
                Err(Refusal::unavailable("no_healthy_upstream", detail))
            }
        }
    }

    async fn resolve(
        &self,
        snapshot: &Snapshot,
        destination: SocketAddr,
    ) -> Result<ResolvedFlow, Refusal> {
        let own = self.own.addresses.first().copied();
        let flow = Flow {
            id: FlowId(0),
            direction: Direction::Outbound,
            client: ClientAddr::new(SocketAddr::new(own.unwrap_or(UNSPECIFIED), 0)),
            orig_dst: OrigDst::new(destination),
            pod: PodUid::new(self.own.uid.as_str()),
            accepted_at: Instant::now(),
        };
        let settings = &self.worker.common.picture.resolving;
        let refused = |unroutable: Unroutable| {
            Refusal::unavailable(unroutable.close_reason().as_str(), unroutable.to_string())
        };
        match resolve(&snapshot.index, settings, &flow, &self.own, random()) {
            Ok(resolved) => Ok(resolved),
            Err(Unroutable::NeedsDns(pending)) => {
                let host = pending.hostname().to_string();
                let found = tokio::net::lookup_host((host.as_str(), 0)).await;
                let addresses: Vec<IpAddr> = found
                    .map_err(|error| {
                        Refusal::unavailable("connect_failed", format!("{host}: {error}"))
                    })?
                    .map(|address| address.ip())
                    .collect();
                pending.complete(&addresses).map_err(refused)
            }
            Err(unroutable) => Err(refused(unroutable)),
        }
    }
}

/// Serves a stream to its end.
pub(crate) async fn serve<S>(dialled: Arc<Dialled>, io: S)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let common = &dialled.worker.common;
    let snapshot = common.picture.snapshot();
    let expected = match dialled.attached(&snapshot) {
        Ok((served, policies)) => dialled.protocol(&snapshot, served.as_deref(), &policies),
        // The requests will be told.
        Err(_unknown) => Expected::Detected,
    };
    drop(snapshot);
    // Where nothing else than HTTP gets on a client may take its time to begin.
    let patience = match expected {
        Expected::Anything => return pass_on(&dialled, io).await,
        Expected::Detected => Duration::from_millis(common.settings.detect_ms),
        Expected::Http | Expected::HttpOrNothing => HEAD_TIMEOUT,
    };
    match (detect(io, patience).await, expected) {
        (Ok((Spoken::Http1, io)), _) => serve_http1(dialled, io).await,
        (Ok((Spoken::Http2, io)), _) => serve_http2(dialled, io).await,
        // What is declared as HTTP and is none gets HTTP's answer to that.
        (Ok((Spoken::Other, io)), Expected::Http) => serve_http1(dialled, io).await,
        (
            Ok((Spoken::Other, io)),
            Expected::Anything | Expected::Detected | Expected::HttpOrNothing,
        ) => pass_on(&dialled, io).await,
        (Err(error), _) => tracing::debug!(%error, "stream ended before it began"),
    }
}

async fn serve_http1<S>(dialled: Arc<Dialled>, io: Rewound<S>)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let drain = dialled.worker.common.drain.clone();
    let switched = Arc::new(AtomicBool::new(false));
    let io = Followed::new(io, Arc::clone(&switched));
    let service = service_fn(move |request| {
        let (dialled, switched) = (Arc::clone(&dialled), Arc::clone(&switched));
        async move {
            let response = handle(&dialled, request).await;
            // What comes next is no HTTP; the client waits for this answer before it sends that.
            let is_switch = response.status() == StatusCode::SWITCHING_PROTOCOLS;
            switched.fetch_or(is_switch, Ordering::Relaxed);
            Ok::<_, std::convert::Infallible>(response)
        }
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIMEOUT)
        .max_buf_size(MAX_HEAD)
        .half_close(true)
        .serve_connection(TokioIo::new(io), service)
        .with_upgrades();
    tokio::pin!(connection);
    until_over(connection, |connection| connection.graceful_shutdown(), &drain).await;
}

async fn serve_http2<S>(dialled: Arc<Dialled>, io: Rewound<S>)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let drain = dialled.worker.common.drain.clone();
    let service = service_fn(move |request| {
        let dialled = Arc::clone(&dialled);
        async move { Ok::<_, std::convert::Infallible>(handle(&dialled, request).await) }
    });
    let connection = http2::Builder::new(TokioExecutor::new())
        .timer(TokioTimer::new())
        .max_concurrent_streams(MAX_REQUESTS)
        .max_header_list_size(u32::try_from(MAX_HEAD).unwrap_or(u32::MAX))
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .serve_connection(TokioIo::new(io), service);
    tokio::pin!(connection);
    until_over(connection, |connection| connection.graceful_shutdown(), &drain).await;
}

/// Serves a connection to its end; when the waypoint is to end, `finish` has it take no more requests.
async fn until_over<C>(mut connection: Pin<&mut C>, finish: impl Fn(Pin<&mut C>), drain: &Drain)
where
    C: Future<Output = hyper::Result<()>>,
{
    let mut is_draining = false;
    loop {
        tokio::select! {
            ended = &mut connection => {
                if let Err(error) = ended {
                    tracing::debug!(error = %error_chain(&error), "a client's connection ended");
                }
                return;
            }
            () = drain.begun(), if !is_draining => {
                is_draining = true;
                finish(connection.as_mut());
            }
        }
    }
}

/// Passes bytes on, under the policies on connections. They are asked again whenever something changes.
async fn pass_on<S>(dialled: &Dialled, mut io: S)
where
    S: AsyncRead + AsyncWrite + Unpin + Send,
{
    let refused = |refusal: &Refusal| {
        let rule = refusal.policy.as_ref().map(ToString::to_string).unwrap_or_default();
        metrics::counter!(metric::WAYPOINT_REFUSED.name, "reason" => refusal.reason, "rule" => rule.clone())
            .increment(1);
        let (client, identity) = (dialled.client, &dialled.peer.identity);
        tracing::info!(
            target: "access",
            %client,
            %identity,
            dialled = %dialled.authority,
            reason = refusal.reason,
            rule,
            error = %refusal.detail,
            "connection refused"
        );
    };
    let common = &dialled.worker.common;
    let mut changes = common.picture.changes();
    let snapshot = common.picture.snapshot();
    let opened = async {
        allowed(dialled, &snapshot)?;
        let resolved = dialled.endpoint(&snapshot).await?;
        let way = Way::of(&resolved.route)?;
        dialled.worker.pool.open(&snapshot, &way, &dialled.forwarded()).await
    };
    let wire = match opened.await {
        Ok(wire) => wire,
        Err(refusal) => return refused(&refusal),
    };
    let carried = async {
        match wire {
            Wire::Plain(mut socket) => {
                copy_bidirectional_with_sizes(&mut io, &mut socket, COPY_BUFFER, COPY_BUFFER).await
            }
            Wire::Tunnel(mut stream) => {
                copy_bidirectional_with_sizes(&mut io, &mut stream, COPY_BUFFER, COPY_BUFFER).await
            }
        }
    };
    tokio::pin!(carried);
    loop {
        tokio::select! {
            ended = &mut carried => {
                if let Err(error) = ended {
                    tracing::debug!(%error, "a passed-on connection ended");
                }
                return;
            }
            changed = changes.changed() => {
                if changed.is_err() {
                    return;
                }
                if let Err(refusal) = allowed(dialled, &common.picture.snapshot()) {
                    return refused(&refusal);
                }
            }
        }
    }
}

/// Whether the connection may go on.
fn allowed(dialled: &Dialled, snapshot: &Snapshot) -> Result<(), Refusal> {
    let (served, policies) = dialled.attached(snapshot)?;
    match dialled.protocol(snapshot, served.as_deref(), &policies) {
        Expected::Anything | Expected::Detected => {}
        Expected::Http | Expected::HttpOrNothing => {
            let detail = "what is no HTTP does not get past routes and policies on requests; \
                          declare what the port speaks (appProtocol, or the port's name)";
            return Err(Refusal::bad_request("not_http", detail));
        }
    }
    let connection = match dialled.service() {
        Some(service) => dialled.connection(snapshot, service, dialled.authority.port()),
        None => dialled.to_workload(),
    };
    match authorize_connection(&snapshot.policies, &policies, &connection).decision {
        Decision::Allow(_permit) => Ok(()),
        Decision::Deny(denial) => Err(Refusal::denied(&denial)),
    }
}
