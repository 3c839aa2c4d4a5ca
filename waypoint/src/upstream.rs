//! Connections to servers: tunnels to their nodes, and HTTP connections inside of those, kept for the next request.

mod bundle;
mod dial;

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use http::{Request, StatusCode};
use hyper::body::Incoming;
use hyper::client::conn::{TrySendError, http1, http2};
use hyper_util::rt::TokioIo;
use mesh_model::{SpiffeId, WorkloadUid, error_chain};
use mesh_resolve::{Route, TunnelRoute};
use mesh_telemetry::Forwarded;
use tokio::net::TcpStream;

use self::bundle::{Bundle, Lent, Opened, Place, Sender};
use self::dial::{
    TunnelKey, TunnelSender, TunnelStream, connect, connect_request, dial, start_http1, start_http2,
};
use crate::body::RequestBody;
use crate::picture::Snapshot;
use crate::refusal::Refusal;

/// Longest wait for a connection with all its handshakes.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// HTTP/1.1 connections kept per endpoint; beyond, the oldest is closed.
const MAX_IDLE: usize = 128;
/// How long a connection or tunnel is kept without use.
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
    Tunnel(TokioIo<TunnelStream>),
    /// A connection of its own.
    Plain(TcpStream),
}

/// What a request holds of a connection until the end of its answer.
pub(crate) enum Lease {
    /// A connection of HTTP/1.1, its own for so long.
    Http1(Box<Http1Lease>),
    /// A place on a connection that is shared.
    Http2 {
        /// Given back by being dropped.
        _place: Place,
    },
}

/// An HTTP/1.1 connection that is lent to one request.
pub(crate) struct Http1Lease {
    pool: Arc<Pool>,
    way: Way,
    sender: http1::SendRequest<RequestBody>,
    stamp: u64,
}

impl Lease {
    /// Keeps the connection for the next request, if it can take one.
    pub(crate) fn give_back(self) {
        let Self::Http1(lease) = self else { return };
        let Http1Lease { pool, way, sender, stamp } = *lease;
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

type Http2Sender = http2::SendRequest<RequestBody>;

impl<B: http_body::Body + Send + 'static> Sender for http2::SendRequest<B> {
    fn is_closed(&self) -> bool {
        Self::is_closed(self)
    }
}

#[derive(Default)]
struct Kept {
    tunnels: HashMap<TunnelKey, Arc<Bundle<TunnelSender>>>,
    http1: HashMap<Way, Vec<Idle>>,
    http2: HashMap<Way, Arc<Bundle<Http2Sender>>>,
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
    /// The server did not begin with it.
    pub(crate) unprocessed: bool,
}

impl Failed {
    fn before_sending(refusal: Refusal, request: Request<RequestBody>) -> Self {
        Self { refusal, unsent: Some(request), stale: false, unprocessed: true }
    }

    fn in_sending(mut error: TrySendError<Request<RequestBody>>, stale: bool) -> Self {
        let unsent = error.take_message();
        let error = error.into_error();
        let unprocessed = unsent.is_some() || was_refused(&error);
        Self { refusal: broken(&error), unsent, stale, unprocessed }
    }
}

/// A stream that HTTP/2 refuses was not looked at by whoever refuses it. Source: RFC 9113 §8.7.
fn was_refused(error: &hyper::Error) -> bool {
    let mut source = std::error::Error::source(error);
    while let Some(one) = source {
        if let Some(error) = one.downcast_ref::<h2::Error>() {
            return error.reason() == Some(h2::Reason::REFUSED_STREAM);
        }
        source = one.source();
    }
    false
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
                Err(error) => match Failed::in_sending(error, true) {
                    Failed { unsent: Some(unsent), .. } => request = unsent,
                    failed => return Err(failed),
                },
            }
        }
        let opened = async {
            let sender = start_http1(self.open(snapshot, way, forwarded).await?).await;
            sender.map_err(|error| broken(&error))
        };
        let mut sender = match in_time(way.address(), opened).await {
            Ok(sender) => sender,
            Err(refusal) => return Err(Failed::before_sending(refusal, request)),
        };
        match sender.try_send_request(request).await {
            Ok(response) => Ok(self.answered(response, way, sender, stamp)),
            Err(error) => Err(Failed::in_sending(error, false)),
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
        let (pool, way) = (Arc::clone(self), way.clone());
        let lease =
            (!switches).then(|| Lease::Http1(Box::new(Http1Lease { pool, way, sender, stamp })));
        Answered { response, lease }
    }

    async fn send_http2(
        self: &Arc<Self>,
        snapshot: &Snapshot,
        way: &Way,
        forwarded: &Forwarded,
        mut request: Request<RequestBody>,
    ) -> Result<Answered, Failed> {
        let bundle = {
            let mut kept = self.lock();
            kept.make_room();
            Arc::clone(kept.http2.entry(way.clone()).or_default())
        };
        let open = || {
            let (pool, snapshot) = (Arc::clone(self), snapshot.clone());
            let (way, forwarded) = (way.clone(), forwarded.clone());
            async move {
                let opened = async {
                    let wire = pool.open(&snapshot, &way, &forwarded).await?;
                    let sender = start_http2(wire).await.map_err(|error| broken(&error))?;
                    Ok(Opened { sender, until: None })
                };
                in_time(way.address(), opened).await
            }
        };
        for last in [false, true] {
            let Lent { mut sender, place, fresh } = match bundle.lend(stamp(snapshot), &open).await
            {
                Ok(lent) => lent,
                Err(refusal) => return Err(Failed::before_sending(refusal, request)),
            };
            match sender.try_send_request(request).await {
                Ok(response) => {
                    let lease = Some(Lease::Http2 { _place: place });
                    return Ok(Answered { response, lease });
                }
                Err(error) => match Failed::in_sending(error, !fresh) {
                    // It was closed or going away; the next one is new.
                    Failed { unsent: Some(unsent), .. } if !fresh && !last => {
                        bundle.retire(&place);
                        request = unsent;
                    }
                    failed => return Err(failed),
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
        let opened = async {
            match way {
                Way::Plain(address) => connect(*address).await.map(Wire::Plain),
                Way::Tunnel { next_hop, authority, expected, target } => {
                    let key = (*next_hop, expected.clone(), target.clone());
                    self.open_stream(snapshot, key, authority, forwarded).await.map(Wire::Tunnel)
                }
            }
        };
        in_time(way.address(), opened).await
    }

    async fn open_stream(
        &self,
        snapshot: &Snapshot,
        key: TunnelKey,
        authority: &str,
        forwarded: &Forwarded,
    ) -> Result<TokioIo<TunnelStream>, Refusal> {
        let bundle = {
            let mut kept = self.lock();
            kept.make_room();
            Arc::clone(kept.tunnels.entry(key.clone()).or_default())
        };
        let Some(identity) = &snapshot.identity else {
            let detail = "this waypoint has no certificate yet";
            return Err(Refusal::unavailable("no_certificate", detail));
        };
        let dial = || {
            let (identity, trust) = (identity.clone(), Arc::clone(&snapshot.trust));
            let key = key.clone();
            async move { in_time(key.0, dial(&identity, trust, &key)).await }
        };
        for last in [false, true] {
            let Lent { mut sender, place, fresh } = bundle.lend(identity.stamp, &dial).await?;
            let request = connect_request(authority, forwarded)?;
            let response = match sender.send_request(request).await {
                Ok(response) => response,
                // The far end may have said goodbye in this moment: once more on a new tunnel.
                Err(_) if !fresh && !last => {
                    bundle.retire(&place);
                    continue;
                }
                Err(error) => return Err(broken(&error)),
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
            return Ok(TokioIo::new(TunnelStream::new(upgraded, place)));
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
        kept.forget_unused(IDLE_TIMEOUT);
    }

    /// Numbers of kept connections: tunnels, HTTP/1.1, HTTP/2.
    pub(crate) fn counts(&self) -> [usize; 3] {
        let kept = self.lock();
        [
            kept.tunnels.values().map(|bundle| bundle.len()).sum(),
            kept.http1.values().map(Vec::len).sum(),
            kept.http2.values().map(|bundle| bundle.len()).sum(),
        ]
    }

    fn lock(&self) -> MutexGuard<'_, Kept> {
        // Each change leaves the maps whole.
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Kept {
    fn make_room(&mut self) {
        if self.tunnels.len() + self.http2.len() >= MAX_ENDPOINTS {
            self.forget_unused(Duration::ZERO);
        }
    }

    fn forget_unused(&mut self, idle: Duration) {
        // One that somebody opens at this moment is held by more than the map.
        self.tunnels.retain(|_, bundle| bundle.sweep(idle) || Arc::strong_count(bundle) > 1);
        self.http2.retain(|_, bundle| bundle.sweep(idle) || Arc::strong_count(bundle) > 1);
    }
}

fn stamp(snapshot: &Snapshot) -> u64 {
    snapshot.identity.as_ref().map_or(0, |identity| identity.stamp)
}

/// A connection with its handshakes, and what is asked for through it, in the time of one.
async fn in_time<T>(
    address: SocketAddr,
    opened: impl Future<Output = Result<T, Refusal>>,
) -> Result<T, Refusal> {
    match tokio::time::timeout(CONNECT_TIMEOUT, opened).await {
        Ok(outcome) => outcome,
        Err(_elapsed) => {
            let detail = format!("{address} did not answer in time");
            Err(Refusal::new("connect_timeout", StatusCode::GATEWAY_TIMEOUT, "UF", detail))
        }
    }
}

fn broken(error: &hyper::Error) -> Refusal {
    Refusal { flags: "UC", ..Refusal::unavailable("upstream_reset", error_chain(error)) }
}
