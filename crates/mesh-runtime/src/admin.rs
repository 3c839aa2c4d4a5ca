//! A small HTTP/1.1 server for admin, readiness and metrics.
//!
//! Over TCP it only reads (`GET`); what changes something is asked over the Unix socket, whose peers must be root or
//! this process's own user. On loopback the `Host` header must name loopback as well, so that a web page cannot reach
//! it through a name of its own (DNS rebinding).

mod gzip;
mod listener;
mod routes;

use std::convert::Infallible;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, Method, StatusCode, header};
use http_body_util::{BodyExt as _, Full, LengthLimitError, Limited};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use crate::drain::Drain;

pub use listener::{AdminListener, BindError};
pub use routes::{Reply, Request, Routes};

use listener::Peer;

/// What one server bears.
#[derive(Clone, Copy, Debug)]
pub struct AdminLimits {
    /// Connections at once; further ones wait in the kernel's queue. Default 32.
    pub connections: usize,
    /// Body of a request, bytes. Default 64 KiB.
    pub body_bytes: usize,
    /// From a request's first byte to its answer, and for the head of the next one. Default 10 s; a route can ask for
    /// more, see [`Routes::get_slow`].
    pub request: Duration,
}

impl Default for AdminLimits {
    fn default() -> Self {
        Self { connections: 32, body_bytes: 64 * 1024, request: Duration::from_secs(10) }
    }
}

/// The time a slow route has.
const SLOW: Duration = Duration::from_secs(120);
/// Head of a request, bytes.
const MAX_HEAD_BYTES: usize = 16 * 1024;
/// Pause after an accept that failed, for example without a free descriptor.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Serves routes.
#[derive(Clone, Debug)]
pub struct AdminServer {
    routes: Arc<Routes>,
    limits: AdminLimits,
}

impl AdminServer {
    /// A server of `routes`.
    #[must_use]
    pub fn new(routes: Routes, limits: AdminLimits) -> Self {
        Self { routes: Arc::new(routes), limits }
    }

    /// Serves connections of `listener` until `drain` begins. Requests under way are finished first, within their time.
    pub async fn serve(self, listener: AdminListener, drain: Drain) {
        let slots = Arc::new(Semaphore::new(self.limits.connections.max(1)));
        let mut connections = JoinSet::new();
        loop {
            let accepted = tokio::select! {
                () = drain.begun() => break,
                accepted = accept(&listener, &slots) => accepted,
                Some(ended) = connections.join_next() => {
                    if let Err(error) = ended {
                        tracing::error!(%error, "an admin connection failed");
                    }
                    continue;
                }
            };
            match accepted {
                Ok((peer, stream, slot)) => {
                    connections.spawn(self.clone().connection(peer, stream, slot, drain.clone()));
                }
                Err(error) => {
                    tracing::warn!(%error, "cannot accept an admin connection");
                    sleep(ACCEPT_PAUSE).await;
                }
            }
        }
        while connections.join_next().await.is_some() {}
    }

    async fn connection(
        self,
        peer: Peer,
        stream: Box<dyn Stream>,
        _slot: OwnedSemaphorePermit,
        drain: Drain,
    ) {
        let service = service_fn(|request| {
            let server = self.clone();
            async move { Ok::<_, Infallible>(server.answer(peer, request).await) }
        });
        let mut http = hyper::server::conn::http1::Builder::new();
        http.timer(TokioTimer::new())
            .header_read_timeout(self.limits.request)
            .max_buf_size(MAX_HEAD_BYTES);
        let connection = http.serve_connection(TokioIo::new(stream), service);
        tokio::pin!(connection);
        let ended = tokio::select! {
            ended = &mut connection => ended,
            () = drain.begun() => {
                connection.as_mut().graceful_shutdown();
                connection.await
            }
        };
        if let Err(error) = ended {
            tracing::debug!(%error, "an admin connection ended early");
        }
    }

    async fn answer(
        self,
        peer: Peer,
        request: http::Request<Incoming>,
    ) -> http::Response<Full<Bytes>> {
        let (head, body) = request.into_parts();
        let only_head = head.method == Method::HEAD;
        let gzip = !only_head && gzip::is_accepted(&head.headers);
        let mut reply = self.respond(peer, head, body).await;
        if gzip {
            reply = gzip::compressed(reply).await;
        }
        let mut response = reply.into_response();
        if only_head {
            *response.body_mut() = Full::default();
        }
        response
    }

    async fn respond(&self, peer: Peer, head: http::request::Parts, body: Incoming) -> Reply {
        if let Err(refusal) = admit(peer, &head.method, &head.headers) {
            return refusal;
        }
        let method = if head.method == Method::HEAD { Method::GET } else { head.method };
        let route = match self.routes.find(&method, head.uri.path()) {
            Ok(route) => route,
            Err(refusal) => return refusal,
        };
        let limit = if route.slow { SLOW } else { self.limits.request };
        let body_bytes = self.limits.body_bytes;
        let answering = async {
            let body = match Limited::new(body, body_bytes).collect().await {
                Ok(body) => body.to_bytes(),
                Err(error) if error.is::<LengthLimitError>() => {
                    let text = format!("at most {body_bytes} bytes are read");
                    return Reply::error(StatusCode::PAYLOAD_TOO_LARGE, &text);
                }
                Err(error) => {
                    return Reply::error(StatusCode::BAD_REQUEST, &format!("body: {error}"));
                }
            };
            let query = head.uri.query().unwrap_or_default();
            (route.handler)(Request::new(method, head.uri.path(), query, body)).await
        };
        match timeout(limit, answering).await {
            Ok(reply) => reply,
            Err(_elapsed) => Reply::error(StatusCode::GATEWAY_TIMEOUT, "no answer in time"),
        }
    }
}

/// Whether this peer may ask this at all.
fn admit(peer: Peer, method: &Method, headers: &HeaderMap) -> Result<(), Reply> {
    let reads = *method == Method::GET || *method == Method::HEAD;
    let refuse = |text| Err(Reply::error(StatusCode::FORBIDDEN, text));
    match peer {
        Peer::Trusted => Ok(()),
        Peer::Untrusted => refuse("only root and the owner of this process may ask here"),
        Peer::Loopback | Peer::Network if !reads => {
            refuse("changes are made over the Unix socket, TCP only reads")
        }
        Peer::Network => Ok(()),
        Peer::Loopback => {
            let host = headers.get(header::HOST).and_then(|host| host.to_str().ok());
            if host.is_none_or(names_loopback) {
                Ok(())
            } else {
                refuse("the Host header does not name loopback")
            }
        }
    }
}

fn names_loopback(host: &str) -> bool {
    let name = match host.strip_prefix('[') {
        Some(rest) => rest.split(']').next().unwrap_or_default(),
        None => host.split(':').next().unwrap_or_default(),
    };
    name.eq_ignore_ascii_case("localhost")
        || name.parse::<std::net::IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<S: AsyncRead + AsyncWrite + Send + Unpin> Stream for S {}

async fn accept(
    listener: &AdminListener,
    slots: &Arc<Semaphore>,
) -> io::Result<(Peer, Box<dyn Stream>, OwnedSemaphorePermit)> {
    let slot = Arc::clone(slots).acquire_owned().await.map_err(io::Error::other)?;
    let (peer, stream) = listener.accept().await?;
    Ok((peer, stream, slot))
}

#[cfg(test)]
mod tests;
