//! Connections to servers: tunnels to their nodes, and HTTP connections inside of those, kept for the next request.

use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::{HeaderValue, Method, Request, StatusCode};
use http_body_util::Empty;
use hyper::body::Incoming;
use hyper::client::conn::{http1, http2};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use mesh_identity::tls;
use mesh_model::{SpiffeId, WorkloadUid};
use mesh_resolve::{Route, TunnelRoute};
use mesh_telemetry::Forwarded;
use rustls_pki_types::ServerName;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

use crate::body::{BodyError, RequestBody};
use crate::picture::Snapshot;
use crate::refusal::Refusal;

/// Longest wait for a TCP connection and its handshake, and for the answer to a CONNECT.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// HTTP/1.1 connections kept per endpoint; beyond, the oldest is closed.
const MAX_IDLE: usize = 128;
/// How long a connection is kept without use.
const IDLE_TIMEOUT: Duration = Duration::from_secs(60);
/// Endpoints of which something is kept; beyond, what is not in use is forgotten.
const MAX_ENDPOINTS: usize = 4_096;
/// Bytes of one stream that may be under way.
pub(crate) const STREAM_WINDOW: u32 = 1 << 20;
/// Bytes of one connection that may be under way.
pub(crate) const CONNECTION_WINDOW: u32 = 16 << 20;

/// How a server is reached.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Way {
    /// Through a tunnel to its node.
    Tunnel {
        /// The far end.
        next_hop: SocketAddr,
        /// What CONNECT asks for.
        authority: String,
        /// Who may answer.
        expected: Vec<SpiffeId>,
        /// The workload at the far end, so that a reused address is another way.
        target: WorkloadUid,
    },
    /// In plaintext: it is no part of the mesh.
    Plain(SocketAddr),
}

impl Way {
    /// The way of a resolved route.
    pub(crate) fn of(route: &Route) -> Result<Self, Refusal> {
        match route {
            Route::Tunnel(TunnelRoute { gateway: Some(_), .. }) => Err(Refusal::unavailable(
                "gateway_unavailable",
                "waypoints do not reach other networks yet",
            )),
            Route::Tunnel(tunnel) | Route::ViaWaypoint { tunnel, .. } => Ok(Self::Tunnel {
                next_hop: tunnel.next_hop,
                authority: tunnel.authority.to_string(),
                expected: tunnel.expected.clone(),
                target: tunnel.target_uid.clone(),
            }),
            Route::Passthrough { target, .. } => Ok(Self::Plain(*target)),
            Route::Deliver { .. } => {
                Err(Refusal::unavailable("internal", "an inbound route for a request"))
            }
        }
    }

    /// The address for logs.
    pub(crate) fn address(&self) -> SocketAddr {
        match self {
            Self::Tunnel { next_hop, authority, .. } => authority.parse().unwrap_or(*next_hop),
            Self::Plain(address) => *address,
        }
    }
}

/// What is spoken to a server.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Version {
    /// HTTP/1.1.
    Http1,
    /// HTTP/2.
    Http2,
}

/// A two-way stream of bytes to a server.
pub(crate) enum Wire {
    /// A stream of a tunnel.
    Tunnel(TokioIo<hyper::upgrade::Upgraded>),
    /// A connection of its own.
    Plain(TcpStream),
}

/// An HTTP connection that is lent to one request; HTTP/2 connections are shared and only counted.
pub(crate) struct Lease {
    pool: Arc<Pool>,
    way: Way,
    sender: http1::SendRequest<RequestBody>,
    stamp: u64,
}

impl Lease {
    /// Keeps the connection for the next request, if it can take one.
    pub(crate) fn give_back(self) {
        let Self { pool, way, sender, stamp } = self;
        if sender.is_closed() {
            return;
        }
        let mut kept = pool.lock();
        let idle = kept.http1.entry(way).or_default();
        if idle.len() >= MAX_IDLE {
            idle.remove(0);
        }
        idle.push(Idle { sender, stamp, since: Instant::now() });
    }
}

struct Idle {
    sender: http1::SendRequest<RequestBody>,
    stamp: u64,
    since: Instant,
}

type TunnelSender = http2::SendRequest<Empty<Bytes>>;
type TunnelKey = (SocketAddr, Vec<SpiffeId>, WorkloadUid);

struct Shared<S> {
    sender: S,
    stamp: u64,
}

/// A place for one connection, filled by the first who needs it while the others wait.
type Slot<S> = Arc<tokio::sync::Mutex<Option<Shared<S>>>>;

#[derive(Default)]
struct Kept {
    tunnels: HashMap<TunnelKey, Slot<TunnelSender>>,
    http1: HashMap<Way, Vec<Idle>>,
    http2: HashMap<Way, Slot<http2::SendRequest<RequestBody>>>,
}

/// The connections of one worker.
#[derive(Default)]
pub(crate) struct Pool {
    kept: Mutex<Kept>,
}

/// An answer's head, and what to let go of at the end of its body.
pub(crate) struct Answered {
    pub(crate) response: http::Response<Incoming>,
    pub(crate) lease: Option<Lease>,
}

/// An attempt that failed.
pub(crate) struct Failed {
    pub(crate) refusal: Refusal,
    /// The request, if nothing of it was sent.
    pub(crate) unsent: Option<Request<RequestBody>>,
    /// True when the connection had been used before: the server may have closed it in that moment.
    pub(crate) stale: bool,
}

impl Failed {
    const fn before_sending(refusal: Refusal, request: Request<RequestBody>) -> Self {
        Self { refusal, unsent: Some(request), stale: false }
    }
}

impl Pool {
    /// Sends a request and waits for the answer's head.
    pub(crate) async fn send(
        self: &Arc<Self>,
        snapshot: &Snapshot,
        way: &Way,
        version: Version,
        forwarded: &Forwarded,
        request: Request<RequestBody>,
    ) -> Result<Answered, Failed> {
        match version {
            Version::Http1 => self.send_http1(snapshot, way, forwarded, request).await,
            Version::Http2 => self.send_http2(snapshot, way, forwarded, request).await,
        }
    }

    async fn send_http1(
        self: &Arc<Self>,
        snapshot: &Snapshot,
        way: &Way,
        forwarded: &Forwarded,
        mut request: Request<RequestBody>,
    ) -> Result<Answered, Failed> {
        let stamp = stamp(snapshot);
        while let Some(mut idle) = self.take_idle(way, stamp) {
            // A connection that has just ended a body needs a moment of its task.
            if tokio::time::timeout(Duration::from_millis(5), idle.ready()).await.is_err() {
                continue;
            }
            match idle.try_send_request(request).await {
                Ok(response) => return Ok(self.answered(response, way, idle, stamp)),
                Err(mut error) => match error.take_message() {
                    Some(unsent) => request = unsent,
                    None => {
                        let refusal = broken(&error.into_error());
                        return Err(Failed { refusal, unsent: None, stale: true });
                    }
                },
            }
        }
        let wire = match self.open(snapshot, way, forwarded).await {
            Ok(wire) => wire,
            Err(refusal) => return Err(Failed::before_sending(refusal, request)),
        };
        let shaken = match wire {
            Wire::Tunnel(io) => start_http1(io.into_inner()).await,
            Wire::Plain(socket) => start_http1(TokioIo::new(socket)).await,
        };
        let mut sender = match shaken {
            Ok(sender) => sender,
            Err(error) => return Err(Failed::before_sending(broken(&error), request)),
        };
        match sender.try_send_request(request).await {
            Ok(response) => Ok(self.answered(response, way, sender, stamp)),
            Err(mut error) => {
                let unsent = error.take_message();
                Err(Failed { refusal: broken(&error.into_error()), unsent, stale: false })
            }
        }
    }

    fn answered(
        self: &Arc<Self>,
        response: http::Response<Incoming>,
        way: &Way,
        sender: http1::SendRequest<RequestBody>,
        stamp: u64,
    ) -> Answered {
        let switches = response.status() == StatusCode::SWITCHING_PROTOCOLS;
        let lease =
            (!switches).then(|| Lease { pool: Arc::clone(self), way: way.clone(), sender, stamp });
        Answered { response, lease }
    }

    async fn send_http2(
        self: &Arc<Self>,
        snapshot: &Snapshot,
        way: &Way,
        forwarded: &Forwarded,
        mut request: Request<RequestBody>,
    ) -> Result<Answered, Failed> {
        let stamp = stamp(snapshot);
        let slot = {
            let mut kept = self.lock();
            kept.make_room();
            Arc::clone(kept.http2.entry(way.clone()).or_default())
        };
        for last in [false, true] {
            let (mut sender, stale) = {
                let mut place = slot.lock().await;
                match place.as_ref() {
                    Some(shared) if shared.stamp == stamp && !shared.sender.is_closed() => {
                        (shared.sender.clone(), true)
                    }
                    Some(_) | None => {
                        let opened = match self.open(snapshot, way, forwarded).await {
                            Ok(Wire::Tunnel(io)) => start_http2(io.into_inner()).await,
                            Ok(Wire::Plain(socket)) => start_http2(TokioIo::new(socket)).await,
                            Err(refusal) => return Err(Failed::before_sending(refusal, request)),
                        };
                        let sender = match opened {
                            Ok(sender) => sender,
                            Err(error) => {
                                return Err(Failed::before_sending(broken(&error), request));
                            }
                        };
                        *place = Some(Shared { sender: sender.clone(), stamp });
                        (sender, false)
                    }
                }
            };
            match sender.try_send_request(request).await {
                Ok(response) => return Ok(Answered { response, lease: None }),
                Err(mut error) => match error.take_message() {
                    // It was closed or going away; the next one is new.
                    Some(unsent) if stale && !last => {
                        *slot.lock().await = None;
                        request = unsent;
                    }
                    unsent => {
                        let refusal = broken(&error.into_error());
                        return Err(Failed { refusal, unsent, stale });
                    }
                },
            }
        }
        let refusal =
            Refusal::unavailable("upstream_reset", "the connection is closed again and again");
        Err(Failed::before_sending(refusal, request))
    }

    /// A stream of bytes to a server.
    pub(crate) async fn open(
        &self,
        snapshot: &Snapshot,
        way: &Way,
        forwarded: &Forwarded,
    ) -> Result<Wire, Refusal> {
        match way {
            Way::Plain(address) => connect(*address).await.map(Wire::Plain),
            Way::Tunnel { next_hop, authority, expected, target } => {
                let key = (*next_hop, expected.clone(), target.clone());
                self.open_stream(snapshot, key, authority, forwarded).await.map(Wire::Tunnel)
            }
        }
    }

    async fn open_stream(
        &self,
        snapshot: &Snapshot,
        key: TunnelKey,
        authority: &str,
        forwarded: &Forwarded,
    ) -> Result<TokioIo<hyper::upgrade::Upgraded>, Refusal> {
        let slot = {
            let mut kept = self.lock();
            kept.make_room();
            Arc::clone(kept.tunnels.entry(key.clone()).or_default())
        };
        let stamp = stamp(snapshot);
        for last in [false, true] {
            let (mut sender, fresh) = {
                let mut place = slot.lock().await;
                match place.as_ref() {
                    Some(shared) if shared.stamp == stamp && !shared.sender.is_closed() => {
                        (shared.sender.clone(), false)
                    }
                    Some(_) | None => {
                        let sender = dial(snapshot, &key).await?;
                        *place = Some(Shared { sender: sender.clone(), stamp });
                        (sender, true)
                    }
                }
            };
            let request = connect_request(authority, forwarded)?;
            let answer = tokio::time::timeout(CONNECT_TIMEOUT, sender.send_request(request)).await;
            let response = match answer {
                Ok(Ok(response)) => response,
                // The far end may have said goodbye in this moment: once more on a new tunnel.
                Ok(Err(_)) if !fresh && !last => {
                    *slot.lock().await = None;
                    continue;
                }
                Ok(Err(error)) => return Err(broken(&error)),
                Err(_elapsed) => {
                    return Err(Refusal::new(
                        "connect_timeout",
                        StatusCode::GATEWAY_TIMEOUT,
                        "UF",
                        format!("{authority} did not answer in time"),
                    ));
                }
            };
            let status = response.status();
            if status != StatusCode::OK {
                let reason = match status {
                    StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => "peer_denied",
                    _ => "peer_refused",
                };
                let detail = format!("the agent of {authority} answered {status}");
                return Err(Refusal::unavailable(reason, detail));
            }
            let upgraded = hyper::upgrade::on(response).await.map_err(|error| broken(&error))?;
            return Ok(TokioIo::new(upgraded));
        }
        Err(Refusal::unavailable("tunnel_closed", "the tunnel is closed again and again"))
    }

    fn take_idle(&self, way: &Way, stamp: u64) -> Option<http1::SendRequest<RequestBody>> {
        let mut kept = self.lock();
        let idle = kept.http1.get_mut(way)?;
        while let Some(one) = idle.pop() {
            let usable =
                one.stamp == stamp && !one.sender.is_closed() && one.since.elapsed() < IDLE_TIMEOUT;
            if usable {
                return Some(one.sender);
            }
        }
        kept.http1.remove(way);
        None
    }

    /// Closes what was not used for a while.
    pub(crate) fn sweep(&self) {
        let mut kept = self.lock();
        kept.http1.retain(|_, idle| {
            idle.retain(|one| !one.sender.is_closed() && one.since.elapsed() < IDLE_TIMEOUT);
            !idle.is_empty()
        });
        kept.forget_closed();
    }

    /// Numbers of kept connections: tunnels, HTTP/1.1, HTTP/2.
    pub(crate) fn counts(&self) -> [usize; 3] {
        let kept = self.lock();
        [kept.tunnels.len(), kept.http1.values().map(Vec::len).sum(), kept.http2.len()]
    }

    fn lock(&self) -> MutexGuard<'_, Kept> {
        // Each change leaves the maps whole.
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Kept {
    fn make_room(&mut self) {
        if self.tunnels.len() + self.http2.len() >= MAX_ENDPOINTS {
            self.forget_closed();
        }
    }

    fn forget_closed(&mut self) {
        // One that somebody waits for is locked, or held by more than the map.
        self.tunnels.retain(|_, slot| is_in_use(slot, TunnelSender::is_closed));
        self.http2.retain(|_, slot| is_in_use(slot, http2::SendRequest::is_closed));
    }
}

fn is_in_use<S>(slot: &Slot<S>, is_closed: impl Fn(&S) -> bool) -> bool {
    Arc::strong_count(slot) > 1
        || slot
            .try_lock()
            .is_ok_and(|place| place.as_ref().is_some_and(|shared| !is_closed(&shared.sender)))
}

fn stamp(snapshot: &Snapshot) -> u64 {
    snapshot.identity.as_ref().map_or(0, |identity| identity.stamp)
}

async fn connect(address: SocketAddr) -> Result<TcpStream, Refusal> {
    let connected = tokio::time::timeout(CONNECT_TIMEOUT, TcpStream::connect(address)).await;
    let failed =
        |reason, detail: String| Refusal { flags: "UF", ..Refusal::unavailable(reason, detail) };
    match connected {
        Ok(Ok(socket)) => {
            if let Err(error) = socket.set_nodelay(true) {
                tracing::debug!(%address, %error, "cannot set TCP_NODELAY");
            }
            Ok(socket)
        }
        Ok(Err(error)) => {
            let reason = match error.kind() {
                io::ErrorKind::ConnectionRefused => "connect_refused",
                _ => "connect_failed",
            };
            Err(failed(reason, format!("{address}: {error}")))
        }
        Err(_elapsed) => {
            Err(failed("connect_timeout", format!("{address} did not answer in time")))
        }
    }
}

async fn dial(snapshot: &Snapshot, key: &TunnelKey) -> Result<TunnelSender, Refusal> {
    let (next_hop, expected, _) = key;
    let Some(identity) = &snapshot.identity else {
        return Err(Refusal::unavailable("no_certificate", "this waypoint has no certificate yet"));
    };
    let socket = connect(*next_hop).await?;
    let config = tls::client(&identity.svid, Arc::clone(&snapshot.trust), expected.clone());
    let connector = TlsConnector::from(Arc::new(config));
    // Any name does: it is neither sent nor compared.
    let name = ServerName::IpAddress(next_hop.ip().into());
    let shaken = tokio::time::timeout(CONNECT_TIMEOUT, connector.connect(name, socket)).await;
    let failed = |detail: String| Refusal {
        flags: "UF",
        ..Refusal::unavailable("tls_failure", format!("{next_hop}: {detail}"))
    };
    let stream = match shaken {
        Ok(Ok(stream)) => stream,
        Ok(Err(error)) => return Err(failed(error.to_string())),
        Err(_elapsed) => return Err(failed("the handshake took too long".to_owned())),
    };
    start_http2(TokioIo::new(stream)).await.map_err(|error| broken(&error))
}

fn connect_request(
    authority: &str,
    forwarded: &Forwarded,
) -> Result<Request<Empty<Bytes>>, Refusal> {
    let mut request = Request::builder()
        .method(Method::CONNECT)
        .uri(authority)
        .header("x-istio-source", "waypoint")
        .body(Empty::new())
        .map_err(|error| Refusal::unavailable("internal", error.to_string()))?;
    if let Ok(value) = HeaderValue::from_str(&forwarded.to_string())
        && !value.is_empty()
    {
        request.headers_mut().insert("forwarded", value);
    }
    Ok(request)
}

async fn start_http1<I>(io: I) -> hyper::Result<http1::SendRequest<RequestBody>>
where
    I: hyper::rt::Read + hyper::rt::Write + Unpin + Send + 'static,
{
    let (sender, connection) = http1::Builder::new().max_buf_size(128 * 1024).handshake(io).await?;
    tokio::spawn(async move {
        if let Err(error) = connection.with_upgrades().await {
            tracing::debug!(error = %chain(&error), "a connection to a server ended");
        }
    });
    Ok(sender)
}

async fn start_http2<I, B>(io: I) -> hyper::Result<http2::SendRequest<B>>
where
    I: hyper::rt::Read + hyper::rt::Write + Unpin + Send + 'static,
    B: http_body::Body + Unpin + Send + 'static,
    B::Data: Send,
    B::Error: Into<BodyError>,
{
    let (sender, connection) = http2::Builder::new(TokioExecutor::new())
        .timer(TokioTimer::new())
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .keep_alive_interval(Duration::from_secs(10))
        .keep_alive_timeout(Duration::from_secs(20))
        .handshake(io)
        .await?;
    tokio::spawn(async move {
        if let Err(error) = connection.await {
            tracing::debug!(error = %chain(&error), "a connection to a server ended");
        }
    });
    Ok(sender)
}

fn broken(error: &hyper::Error) -> Refusal {
    Refusal { flags: "UC", ..Refusal::unavailable("upstream_reset", chain(error)) }
}

/// The text of an error and of everything behind it.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(behind) = source {
        text.push_str(": ");
        text.push_str(&behind.to_string());
        source = behind.source();
    }
    text
}
