//! Connections opened: TCP, tunnels with their handshake, and the beginning of HTTP in either.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderValue, Method, Request};
use http_body_util::Empty;
use hyper::client::conn::{http1, http2};
use hyper::rt::{Read, ReadBufCursor, Write};
use hyper::upgrade::Upgraded;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use mesh_identity::{PeerCertificate, Side, TrustBundle, tls};
use mesh_model::{SpiffeId, WorkloadUid, error_chain};
use mesh_telemetry::Forwarded;
use rustls_pki_types::ServerName;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

use super::bundle::{Opened, Place};
use super::{CONNECTION_WINDOW, STREAM_WINDOW, Wire, broken};
use crate::body::{BodyError, RequestBody};
use crate::picture::Identity;
use crate::refusal::Refusal;

/// What CONNECT is sent by.
pub(super) type TunnelSender = http2::SendRequest<Empty<Bytes>>;
/// What tells tunnels apart: where, who may answer, and the workload at the far end.
pub(super) type TunnelKey = (SocketAddr, Vec<SpiffeId>, WorkloadUid);

/// A stream of a tunnel, in its place there.
pub(crate) struct TunnelStream {
    io: Upgraded,
    _place: Place,
}

impl TunnelStream {
    pub(super) const fn new(io: Upgraded, place: Place) -> Self {
        Self { io, _place: place }
    }
}

impl Read for TunnelStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        into: ReadBufCursor<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_read(context, into)
    }
}

impl Write for TunnelStream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(context)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write_vectored(context, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }
}

pub(super) async fn connect(address: SocketAddr) -> Result<TcpStream, Refusal> {
    let socket = TcpStream::connect(address).await.map_err(|error| {
        let refused = error.kind() == io::ErrorKind::ConnectionRefused;
        let reason = if refused { "connect_refused" } else { "connect_failed" };
        Refusal { flags: "UF", ..Refusal::unavailable(reason, format!("{address}: {error}")) }
    })?;
    if let Err(error) = socket.set_nodelay(true) {
        tracing::debug!(%address, %error, "cannot set TCP_NODELAY");
    }
    Ok(socket)
}

/// A tunnel to whom `key` names.
pub(super) async fn dial(
    identity: &Identity,
    trust: Arc<TrustBundle>,
    key: &TunnelKey,
) -> Result<Opened<TunnelSender>, Refusal> {
    let (next_hop, expected, _) = key;
    let socket = connect(*next_hop).await?;
    let config = tls::client(&identity.svid, trust, expected.clone());
    let connector = TlsConnector::from(Arc::new(config));
    // Any name does: it is neither sent nor compared.
    let name = ServerName::IpAddress(next_hop.ip().into());
    let failed = |detail: String| Refusal {
        flags: "UF",
        ..Refusal::unavailable("tls_failure", format!("{next_hop}: {detail}"))
    };
    let stream =
        connector.connect(name, socket).await.map_err(|error| failed(error.to_string()))?;
    let presented = stream.get_ref().1.peer_certificates().unwrap_or_default();
    let certificate =
        PeerCertificate::new(presented, Side::Server).map_err(|error| failed(error.to_string()))?;
    let sender = handshake(TokioIo::new(stream)).await.map_err(|error| broken(&error))?;
    Ok(Opened { sender, until: Some(certificate.not_after()) })
}

pub(super) fn connect_request(
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

pub(super) async fn start_http1(wire: Wire) -> hyper::Result<http1::SendRequest<RequestBody>> {
    async fn handshake<I>(io: I) -> hyper::Result<http1::SendRequest<RequestBody>>
    where
        I: Read + Write + Unpin + Send + 'static,
    {
        let (sender, connection) =
            http1::Builder::new().max_buf_size(128 * 1024).handshake(io).await?;
        tokio::spawn(async move { tell_end(connection.with_upgrades().await) });
        Ok(sender)
    }
    match wire {
        Wire::Tunnel(io) => handshake(io.into_inner()).await,
        Wire::Plain(socket) => handshake(TokioIo::new(socket)).await,
    }
}

pub(super) async fn start_http2(wire: Wire) -> hyper::Result<http2::SendRequest<RequestBody>> {
    match wire {
        Wire::Tunnel(io) => handshake(io.into_inner()).await,
        Wire::Plain(socket) => handshake(TokioIo::new(socket)).await,
    }
}

async fn handshake<I, B>(io: I) -> hyper::Result<http2::SendRequest<B>>
where
    I: Read + Write + Unpin + Send + 'static,
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
    tokio::spawn(async move { tell_end(connection.await) });
    Ok(sender)
}

fn tell_end(ended: hyper::Result<()>) {
    if let Err(error) = ended {
        tracing::debug!(error = %error_chain(&error), "a connection to a server ended");
    }
}
