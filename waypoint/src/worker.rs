//! One thread's share of the work: tunnels accepted, and everything that comes in them, without sharing with other threads.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, SystemTime};

use http::{Method, Request, Response, StatusCode};
use http_body_util::Empty;
use hyper::body::Incoming;
use hyper::server::conn::http2;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use mesh_identity::{PeerCertificate, Side, TrustBundle};
use mesh_model::{SpiffeId, Workload, error_chain};
use mesh_resolve::{Addressed, Authority, resolve_fronted};
use mesh_runtime::{AccessLog, Drain};
use mesh_telemetry::{Forwarded, metric};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

use crate::config::Settings;
use crate::picture::{Picture, Snapshot};
use crate::refusal::{REASON, Refusal};
use crate::stream::{Dialled, serve};
use crate::upstream::{CONNECTION_WINDOW, Pool, STREAM_WINDOW};

/// Longest handshake.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// Tunnels of one worker; beyond, they wait to be accepted.
const MAX_TUNNELS: usize = 8_192;
/// Streams of one tunnel.
const MAX_STREAMS: u32 = 1_024;
/// Bytes of a CONNECT's headers.
const MAX_HEADERS: u32 = 16 * 1024;
/// How far a peer's clock may be behind; as at the agents.
const CLOCK_TOLERANCE: Duration = Duration::from_secs(5);
/// How often kept connections are looked through.
const SWEEP_INTERVAL: Duration = Duration::from_secs(15);

/// What all workers have in common.
pub(crate) struct Common {
    pub(crate) settings: Settings,
    pub(crate) picture: Arc<Picture>,
    pub(crate) access: AccessLog,
    pub(crate) drain: Drain,
    /// Streams that are open.
    pub(crate) streams: AtomicUsize,
}

/// One thread's part.
pub(crate) struct Worker {
    pub(crate) common: Arc<Common>,
    pub(crate) pool: Arc<Pool>,
    /// Copies of requests that are under way to mirrors.
    pub(crate) mirrors: Arc<Semaphore>,
}

/// Who is at the other end of a tunnel.
pub(crate) struct Peer {
    /// What it proved to be.
    pub(crate) identity: SpiffeId,
    /// Its address, which is the client pod's.
    pub(crate) address: SocketAddr,
    certificate: PeerCertificate,
}

/// Counts a stream for as long as it lives.
pub(crate) struct OpenStream(Arc<Common>);

impl OpenStream {
    fn new(common: &Arc<Common>) -> Self {
        common.streams.fetch_add(1, Ordering::Relaxed);
        Self(Arc::clone(common))
    }
}

impl Drop for OpenStream {
    fn drop(&mut self) {
        self.0.streams.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Worker {
    pub(crate) fn new(common: Arc<Common>) -> Self {
        Self { common, pool: Arc::default(), mirrors: Arc::new(Semaphore::new(256)) }
    }

    /// Accepts tunnels for ever. While the waypoint ends, tunnels are taken as well, so that nobody finds the door shut
    /// before everybody knows another one.
    pub(crate) async fn accept(self: Arc<Self>, listener: TcpListener) {
        let places = Arc::new(Semaphore::new(MAX_TUNNELS));
        let pool = Arc::clone(&self.pool);
        tokio::spawn(async move {
            let mut ticks = tokio::time::interval(SWEEP_INTERVAL);
            loop {
                ticks.tick().await;
                pool.sweep();
            }
        });
        loop {
            // The semaphore is never closed.
            let Ok(place) = Arc::clone(&places).acquire_owned().await else { return };
            let (socket, address) = match listener.accept().await {
                Ok(accepted) => accepted,
                Err(error) => {
                    tracing::warn!(%error, "cannot accept");
                    tokio::time::sleep(Duration::from_millis(50)).await;
                    continue;
                }
            };
            let worker = Arc::clone(&self);
            tokio::spawn(async move {
                let _place = place;
                worker.tunnel(socket, address).await;
            });
        }
    }

    async fn tunnel(self: Arc<Self>, socket: TcpStream, address: SocketAddr) {
        let refused = |reason: &'static str, detail: &str| {
            metrics::counter!(metric::WAYPOINT_TUNNELS_REFUSED.name, "reason" => reason)
                .increment(1);
            tracing::debug!(%address, reason, detail, "tunnel refused");
        };
        if let Err(error) = socket.set_nodelay(true) {
            tracing::debug!(%address, %error, "cannot set TCP_NODELAY");
        }
        // What changes during the handshake counts as well, so the picture is followed from before it is looked at.
        let mut changes = self.common.picture.changes();
        let snapshot = self.common.picture.snapshot();
        let Some(identity) = &snapshot.identity else {
            return refused("no_certificate", "this waypoint has no certificate yet");
        };
        let Ok(local) = socket.local_addr() else { return };
        let acceptor = TlsAcceptor::from(Arc::clone(&identity.server));
        let stream = match tokio::time::timeout(HANDSHAKE_TIMEOUT, acceptor.accept(socket)).await {
            Ok(Ok(stream)) => stream,
            Ok(Err(error)) => return refused("tls_failure", &error.to_string()),
            Err(_elapsed) => return refused("tls_failure", "the handshake took too long"),
        };
        let Some(peer) = peer_of(&stream, address) else {
            return refused("wrong_identity", "the peer names no identity");
        };
        let peer = Arc::new(peer);
        let local_ip = local.ip().to_canonical();
        let (worker, of_stream) = (Arc::clone(&self), Arc::clone(&peer));
        let service = service_fn(move |request| {
            let (worker, peer) = (Arc::clone(&worker), Arc::clone(&of_stream));
            async move { Ok::<_, std::convert::Infallible>(worker.connect(&peer, local_ip, request)) }
        });
        let connection = http2::Builder::new(TokioExecutor::new())
            .timer(TokioTimer::new())
            .max_concurrent_streams(MAX_STREAMS)
            .max_header_list_size(MAX_HEADERS)
            .initial_stream_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .keep_alive_interval(Duration::from_secs(10))
            .keep_alive_timeout(Duration::from_secs(20))
            .serve_connection(TokioIo::new(stream), service);
        tokio::pin!(connection);
        let mut draining = std::pin::pin!(self.common.drain.begun());
        let mut expired = std::pin::pin!(tokio::time::sleep(peer.left()));
        let mut is_ending = false;
        let mut trust = Arc::clone(&snapshot.trust);
        loop {
            tokio::select! {
                ended = &mut connection => {
                    if let Err(error) = ended {
                        tracing::debug!(%address, error = %error_chain(&error), "tunnel ended");
                    }
                    return;
                }
                () = &mut draining, if !is_ending => {
                    is_ending = true;
                    connection.as_mut().graceful_shutdown();
                }
                // Streams that are open go on; the peer comes back with the certificate that it has now.
                () = &mut expired, if !is_ending => {
                    is_ending = true;
                    connection.as_mut().graceful_shutdown();
                }
                changed = changes.changed() => {
                    if changed.is_err() {
                        return;
                    }
                    let now = Arc::clone(&self.common.picture.snapshot().trust);
                    if !Arc::ptr_eq(&now, &trust) {
                        if !peer.is_trusted(&now) {
                            return refused("cert_revoked", "the peer is no longer trusted");
                        }
                        trust = now;
                    }
                }
            }
        }
    }

    /// Answers a CONNECT; what comes in the stream is served by a task of its own.
    fn connect(
        self: Arc<Self>,
        peer: &Arc<Peer>,
        local: std::net::IpAddr,
        mut request: Request<Incoming>,
    ) -> Response<Empty<bytes::Bytes>> {
        let snapshot = self.common.picture.snapshot();
        let asked =
            if peer.left().is_zero() { Err(expired()) } else { asked(&snapshot, local, &request) };
        let (own, addressed, authority) = match asked {
            Ok(asked) => asked,
            Err(refusal) => {
                tracing::debug!(peer = %peer.identity, reason = refusal.reason, detail = %refusal.detail, "stream refused");
                metrics::counter!(metric::WAYPOINT_STREAMS_REFUSED.name, "reason" => refusal.reason)
                    .increment(1);
                let mut response = Response::new(Empty::new());
                *response.status_mut() = refusal.status;
                response
                    .headers_mut()
                    .insert(REASON, http::HeaderValue::from_static(refusal.reason));
                return response;
            }
        };
        let forwarded = request
            .headers()
            .get("forwarded")
            .map(|value| Forwarded::parse(value.as_bytes()))
            .unwrap_or_default();
        let upgrade = hyper::upgrade::on(&mut request);
        let open = OpenStream::new(&self.common);
        let dialled = Dialled {
            peer: Arc::clone(peer),
            own,
            addressed,
            authority,
            client: forwarded.client.unwrap_or(peer.address),
            worker: self,
        };
        tokio::spawn(async move {
            let _open = open;
            match upgrade.await {
                Ok(io) => serve(Arc::new(dialled), TokioIo::new(io)).await,
                Err(error) => tracing::debug!(error = %error_chain(&error), "stream ended at once"),
            }
        });
        Response::new(Empty::new())
    }
}

/// No new streams under a certificate that has ended.
fn expired() -> Refusal {
    let detail = "the peer's certificate has ended; a new tunnel is needed";
    Refusal::new("tls_failure", StatusCode::UNAUTHORIZED, "-", detail)
}

impl Peer {
    /// How long it may still open streams: until its certificate ends, and a little longer, since clocks differ.
    fn left(&self) -> Duration {
        let end = self.certificate.not_after() + CLOCK_TOLERANCE;
        end.duration_since(SystemTime::now()).unwrap_or_default()
    }

    /// Whether its tunnel may go on.
    fn is_trusted(&self, trust: &TrustBundle) -> bool {
        self.certificate.may_go_on(trust, SystemTime::now()).is_ok()
    }
}

fn peer_of(stream: &TlsStream<TcpStream>, address: SocketAddr) -> Option<Peer> {
    let chain = stream.get_ref().1.peer_certificates()?;
    let certificate = PeerCertificate::new(chain, Side::Client).ok()?;
    let address = SocketAddr::new(address.ip().to_canonical(), address.port());
    Some(Peer { identity: certificate.id().clone(), address, certificate })
}

type Asked = (Arc<Workload>, Addressed, Authority);

/// What a CONNECT asks for, found to be behind this waypoint.
fn asked(
    snapshot: &Snapshot,
    local: std::net::IpAddr,
    request: &Request<Incoming>,
) -> Result<Asked, Refusal> {
    if request.method() != Method::CONNECT {
        let detail = "a tunnel carries CONNECT only";
        return Err(Refusal::new("protocol_error", StatusCode::METHOD_NOT_ALLOWED, "DPE", detail));
    }
    if !snapshot.synced {
        return Err(Refusal::unavailable("not_synced", "not everything is known yet"));
    }
    let Some(own) = snapshot.own(local) else {
        let detail = format!("no workload of this waypoint has the address {local}");
        return Err(Refusal::unavailable("unknown_workload", detail));
    };
    let authority = request.uri().authority().map_or("", http::uri::Authority::as_str);
    let authority: Authority =
        authority.parse().map_err(|error: mesh_resolve::InvalidAuthority| {
            Refusal::bad_request("wrong_destination", error.to_string())
        })?;
    let addressed = resolve_fronted(&snapshot.index, &own, &authority).map_err(|unroutable| {
        let reason = unroutable.close_reason().as_str();
        Refusal::new(reason, StatusCode::NOT_FOUND, "NR", unroutable.to_string())
    })?;
    Ok((own, addressed, authority))
}

#[cfg(test)]
mod tests;
