//! Switching protocols: WebSocket and its like.

use std::sync::Arc;

use http::header::{CONNECTION, UPGRADE};
use http::{HeaderMap, HeaderValue, Method, Version};
use hyper::body::Incoming;
use hyper::upgrade::OnUpgrade;
use hyper_util::rt::TokioIo;
use mesh_authorize::Request;
use mesh_model::{RequestPath, error_chain};
use mesh_route::ServiceRef;
use tokio::io::copy_bidirectional_with_sizes;

use super::authenticate::Authenticated;
use super::judge;
use super::outline::Outline;
use crate::picture::Snapshot;
use crate::refusal::Refusal;
use crate::stream::Dialled;

/// Bytes held in each direction.
const COPY_BUFFER: usize = 16 * 1024;

/// A client that wants to speak something else.
pub(super) struct Switch {
    wanted: HeaderValue,
    client: OnUpgrade,
    asked: Asked,
}

/// The request by which it asked, as [`Switch::authenticated`] left it, which policies judge again for as long as the connection
/// lasts.
struct Asked {
    method: Method,
    authority: String,
    target: String,
    headers: HeaderMap,
    authenticated: Authenticated,
}

impl Switch {
    /// Of a request of HTTP/1.1 that asks for it. HTTP/2 in the clear is not switched to (RFC 9113 §3.1).
    pub(super) fn of(request: &mut http::Request<Incoming>, authority: &str) -> Option<Self> {
        if request.version() != Version::HTTP_11 {
            return None;
        }
        let headers = request.headers();
        let asks = headers.get_all(CONNECTION).iter().any(|value| {
            value.to_str().is_ok_and(|text| {
                text.split(',').any(|word| word.trim().eq_ignore_ascii_case("upgrade"))
            })
        });
        // One protocol, and none in which requests would go by unseen (RFC 9110 §7.8 allows a list).
        let mut all = headers.get_all(UPGRADE).iter();
        let (Some(wanted), None, true) = (all.next().cloned(), all.next(), asks) else {
            return None;
        };
        let name = wanted.as_bytes().to_ascii_lowercase();
        let is_unseen = [&b"h2c"[..], b"http", b"tls"].iter().any(|known| name.starts_with(known));
        if is_unseen || name.contains(&b',') {
            return None;
        }
        let asked = Asked {
            method: request.method().clone(),
            authority: authority.to_owned(),
            target: String::new(),
            headers: HeaderMap::new(),
            authenticated: Authenticated::default(),
        };
        Some(Self { wanted, client: hyper::upgrade::on(request), asked })
    }

    /// The request as it is once its tokens are judged.
    pub(super) fn authenticated(
        &mut self,
        target: &str,
        headers: &HeaderMap,
        authenticated: &Authenticated,
    ) {
        target.clone_into(&mut self.asked.target);
        self.asked.headers.clone_from(headers);
        self.asked.authenticated = authenticated.clone();
    }

    /// Asks the server for it.
    pub(super) fn request(&self, headers: &mut HeaderMap) {
        headers.insert(CONNECTION, HeaderValue::from_static("upgrade"));
        headers.insert(UPGRADE, self.wanted.clone());
    }

    /// Tells the client that it is done.
    pub(super) fn answer(&self, headers: &mut HeaderMap, upgrade: Option<HeaderValue>) {
        headers.insert(CONNECTION, HeaderValue::from_static("upgrade"));
        headers.insert(UPGRADE, upgrade.unwrap_or_else(|| self.wanted.clone()));
    }

    /// Passes bytes on from here on, for as long as the policies on connections let it.
    ///
    /// `onward` is where a route sent the request, and in which form.
    pub(super) fn join(
        self,
        dialled: Arc<Dialled>,
        server: OnUpgrade,
        onward: Option<(ServiceRef, Outline)>,
    ) {
        tokio::spawn(async move {
            let (client, server) = match tokio::try_join!(self.client, server) {
                Ok(both) => both,
                Err(error) => {
                    tracing::debug!(error = %error_chain(&error), "a switched connection ended at once");
                    return;
                }
            };
            let (mut client, mut server) = (TokioIo::new(client), TokioIo::new(server));
            let common = &dialled.worker.common;
            // What changed since it was judged counts as well.
            let mut changes = common.picture.changes();
            changes.mark_changed();
            let carried =
                copy_bidirectional_with_sizes(&mut client, &mut server, COPY_BUFFER, COPY_BUFFER);
            tokio::pin!(carried);
            loop {
                tokio::select! {
                    ended = &mut carried => {
                        if let Err(error) = ended {
                            tracing::debug!(%error, "a switched connection ended");
                        }
                        return;
                    }
                    changed = changes.changed() => {
                        if changed.is_err() {
                            return;
                        }
                        let now = self.asked.judge(&dialled, &common.picture.snapshot(), onward.as_ref());
                        if let Err(refusal) = now {
                            tracing::info!(reason = refusal.reason, detail = %refusal.detail, "a switched connection is cut");
                            return;
                        }
                    }
                }
            }
        });
    }
}

impl Asked {
    fn judge(
        &self,
        dialled: &Dialled,
        snapshot: &Snapshot,
        onward: Option<&(ServiceRef, Outline)>,
    ) -> Result<(), Refusal> {
        let path = RequestPath::parse(&self.target, dialled.worker.common.settings.paths())
            .map_err(|error| Refusal::bad_request("bad_path", error.to_string()))?;
        let (served, policies) = dialled.attached(snapshot)?;
        let names = dialled.authentications(snapshot, served.as_deref());
        let request = Request::new(&self.authority, &self.method, &path, &self.headers)
            .with_claims(self.authenticated.at(&names));
        judge::dialled(dialled, snapshot, &policies, &request)?;
        if let Some((backend, outline)) = onward {
            judge::backend(dialled, snapshot, backend, outline)?;
        }
        Ok(())
    }
}
