//! The agent's standing with the controller: a join token spent once, then a node token that is renewed.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use mesh_wire::pb::mesh::enrolment_client::EnrolmentClient;
use mesh_wire::pb::mesh::{JoinRequest, RenewRequest, ReportPodsRequest, Session};
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject as _;
use serde::{Deserialize, Serialize};
use tokio::sync::Mutex;
use tonic::metadata::{Ascii, MetadataValue};
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint};
use tonic::{Request, Status};
use zeroize::Zeroizing;

use crate::state_file;

/// Where the controller is and how to prove who we are.
#[derive(Clone, Debug)]
pub struct ControllerConfig {
    /// `https://host:port`.
    pub address: http::Uri,
    /// File with the roots its certificate is judged by; read anew for each connection.
    pub root: PathBuf,
    /// This node's name.
    pub node: String,
    /// What we prove ourselves by.
    pub credential: Credential,
}

/// What the agent proves itself by.
#[derive(Clone, Debug)]
pub enum Credential {
    /// A join token in a file, exchanged for a node token that is kept in `kept`.
    Join {
        /// File with the join token; it may be gone once it was spent.
        file: Option<PathBuf>,
        /// File of the node token.
        kept: PathBuf,
    },
    /// A token in a file that somebody else renews, as Kubernetes does; read anew for each use.
    File(PathBuf),
}

/// No connection, or no standing.
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    /// A file cannot be read.
    #[error("cannot read {}", path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The file with the roots holds none.
    #[error("no certificate in {}", path.display())]
    NoCertificate {
        /// Which file.
        path: PathBuf,
    },
    /// The address, or the roots.
    #[error("the controller cannot be reached at {address}")]
    Connect {
        /// Where.
        address: http::Uri,
        /// Why.
        #[source]
        source: tonic::transport::Error,
    },
    /// There is neither a node token nor a join token.
    #[error(
        "this node has not joined and has no join token: culvert-controller token create --node NAME"
    )]
    NoToken,
    /// A token that cannot be sent.
    #[error("the token in {} is not one", path.display())]
    BadToken {
        /// Which file.
        path: PathBuf,
    },
    /// The controller said no.
    #[error("the controller refused: {}", .0.message())]
    Refused(Status),
}

/// Connections to the controller, with the token they carry.
#[derive(Clone, Debug)]
pub struct ControllerSession {
    config: Arc<ControllerConfig>,
    token: Arc<Mutex<Option<NodeToken>>>,
}

/// A node token as it is kept.
#[derive(Clone, Serialize, Deserialize)]
struct NodeToken {
    token: Zeroizing<String>,
    /// Unix seconds.
    expires_at: u64,
    /// Unix seconds.
    obtained_at: u64,
}

impl std::fmt::Debug for NodeToken {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("NodeToken").field("expires_at", &self.expires_at).finish_non_exhaustive()
    }
}

/// Source: ztunnel's control-plane client.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(30);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(10);
/// An answer to anything but a stream.
const CALL_TIMEOUT: Duration = Duration::from_secs(10);
/// Largest token or root file read, bytes.
const MAX_FILE_BYTES: u64 = 1024 * 1024;

impl ControllerSession {
    /// A session that has not connected yet.
    pub fn new(config: ControllerConfig) -> Self {
        Self { config: Arc::new(config), token: Arc::new(Mutex::new(None)) }
    }

    /// A new connection. The controller is judged by the roots in the file as they are now, and by `told`, those that it named
    /// last: after a rotation its certificate chains to one that the file does not have.
    pub async fn connect(&self, told: Option<&str>) -> Result<Channel, SessionError> {
        let address = &self.config.address;
        let failed = |source| SessionError::Connect { address: address.clone(), source };
        let mut endpoint = Endpoint::from(address.clone())
            .connect_timeout(CONNECT_TIMEOUT)
            .http2_keep_alive_interval(KEEPALIVE_INTERVAL)
            .keep_alive_timeout(KEEPALIVE_TIMEOUT)
            .keep_alive_while_idle(true)
            .tcp_nodelay(true);
        if address.scheme_str() == Some("https") {
            let roots = roots(&self.config.root, read(&self.config.root)?)?;
            let told = told.map(Certificate::from_pem);
            let roots = std::iter::once(Certificate::from_pem(roots)).chain(told);
            let tls = ClientTlsConfig::new().ca_certificates(roots);
            endpoint = endpoint.tls_config(tls).map_err(failed)?;
        }
        endpoint.connect().await.map_err(failed)
    }

    /// The `authorization` to send, joining or renewing where that is due.
    pub async fn bearer(&self, channel: &Channel) -> Result<MetadataValue<Ascii>, SessionError> {
        let (file, kept) = match &self.config.credential {
            Credential::File(path) => {
                let token = read_text(path)?;
                return bearer(&token).ok_or_else(|| SessionError::BadToken { path: path.clone() });
            }
            Credential::Join { file, kept } => (file.as_deref(), kept),
        };
        let mut held = self.token.lock().await;
        if held.is_none() {
            *held = load(kept);
        }
        let now = unix_seconds(SystemTime::now());
        let token = match held.take() {
            Some(token) if now < token.expires_at && !token.is_half_over(now) => token,
            Some(token) if now < token.expires_at => {
                self.renew(channel, &token, kept).await.unwrap_or_else(|error| {
                    tracing::warn!(%error, "the node token cannot be renewed yet");
                    token
                })
            }
            Some(_expired) => self.join(channel, file, kept).await?,
            None => self.join(channel, file, kept).await?,
        };
        let value =
            bearer(&token.token).ok_or_else(|| SessionError::BadToken { path: kept.to_owned() })?;
        *held = Some(token);
        Ok(value)
    }

    /// Forgets a node token that the controller does not accept; the next connection joins anew.
    pub async fn forget(&self) {
        if let Credential::Join { kept, .. } = &self.config.credential {
            *self.token.lock().await = None;
            match std::fs::remove_file(kept) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                    tracing::warn!(%error, "a refused node token is still there");
                }
                _removed_or_absent => {}
            }
        }
    }

    /// Tells the controller which pods are enrolled, all of them.
    pub async fn report(
        &self,
        channel: &Channel,
        report: ReportPodsRequest,
    ) -> Result<(), SessionError> {
        let mut request = Request::new(report);
        request.set_timeout(CALL_TIMEOUT);
        request.metadata_mut().insert("authorization", self.bearer(channel).await?);
        EnrolmentClient::new(channel.clone())
            .report_pods(request)
            .await
            .map_err(SessionError::Refused)?;
        Ok(())
    }

    async fn join(
        &self,
        channel: &Channel,
        file: Option<&Path>,
        kept: &Path,
    ) -> Result<NodeToken, SessionError> {
        let Some(file) = file.filter(|file| file.exists()) else {
            return Err(SessionError::NoToken);
        };
        let join_token = read_text(file)?.to_string();
        let mut request = Request::new(JoinRequest { join_token, node: self.config.node.clone() });
        request.set_timeout(CALL_TIMEOUT);
        let answer = EnrolmentClient::new(channel.clone()).join(request).await;
        let token = NodeToken::keep(answer.map_err(SessionError::Refused)?.into_inner(), kept);
        tracing::info!(node = self.config.node, "this node has joined the mesh");
        Ok(token)
    }

    async fn renew(
        &self,
        channel: &Channel,
        token: &NodeToken,
        kept: &Path,
    ) -> Result<NodeToken, SessionError> {
        let mut request = Request::new(RenewRequest {});
        request.set_timeout(CALL_TIMEOUT);
        let value =
            bearer(&token.token).ok_or_else(|| SessionError::BadToken { path: kept.to_owned() })?;
        request.metadata_mut().insert("authorization", value);
        let answer = EnrolmentClient::new(channel.clone()).renew(request).await;
        Ok(NodeToken::keep(answer.map_err(SessionError::Refused)?.into_inner(), kept))
    }
}

impl NodeToken {
    /// Writes a new token down. A token that cannot be written is used all the same, until the agent restarts.
    fn keep(session: Session, kept: &Path) -> Self {
        let token = Self {
            token: Zeroizing::new(session.token),
            expires_at: session.expires_at,
            obtained_at: unix_seconds(SystemTime::now()),
        };
        let written = serde_json::to_vec(&token)
            .map_err(std::io::Error::from)
            .map(Zeroizing::new)
            .and_then(|bytes| state_file::replace(kept, &bytes));
        if let Err(error) = written {
            tracing::error!(
                %error, path = %kept.display(),
                "the node token is not written; after a restart this node needs a new join token"
            );
        }
        token
    }

    fn is_half_over(&self, now: u64) -> bool {
        let lifetime = self.expires_at.saturating_sub(self.obtained_at);
        now.saturating_sub(self.obtained_at) > lifetime / 2
    }
}

fn load(kept: &Path) -> Option<NodeToken> {
    let bytes = match state_file::read(kept, MAX_FILE_BYTES) {
        Ok(bytes) => Zeroizing::new(bytes?),
        Err(error) => {
            tracing::warn!(%error, path = %kept.display(), "the node token cannot be read");
            return None;
        }
    };
    match serde_json::from_slice(&bytes) {
        Ok(token) => Some(token),
        Err(error) => {
            tracing::warn!(%error, path = %kept.display(), "the node token is damaged");
            None
        }
    }
}

fn bearer(token: &str) -> Option<MetadataValue<Ascii>> {
    let mut value: MetadataValue<Ascii> = format!("Bearer {}", token.trim()).parse().ok()?;
    value.set_sensitive(true);
    Some(value)
}

fn read(path: &Path) -> Result<Vec<u8>, SessionError> {
    let failed = |source| SessionError::File { path: path.to_owned(), source };
    state_file::read(path, MAX_FILE_BYTES)
        .and_then(|content| content.ok_or_else(|| std::io::ErrorKind::NotFound.into()))
        .map_err(failed)
}

/// The content of a file with roots. One without any certificate would only fail the handshake, without a word of the file.
fn roots(path: &Path, pem: Vec<u8>) -> Result<Vec<u8>, SessionError> {
    if CertificateDer::pem_slice_iter(&pem).any(|certificate| certificate.is_ok()) {
        Ok(pem)
    } else {
        Err(SessionError::NoCertificate { path: path.to_owned() })
    }
}

fn read_text(path: &Path) -> Result<Zeroizing<String>, SessionError> {
    let bytes = read(path)?;
    String::from_utf8(bytes)
        .map(|text| Zeroizing::new(text.trim().to_owned()))
        .map_err(|_not_text| SessionError::BadToken { path: path.to_owned() })
}

fn unix_seconds(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_of_roots_without_a_certificate_is_named() {
        let of = |text: &str| roots(Path::new("/etc/culvert/root.pem"), text.into());
        let certificate = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n";
        assert_eq!(of(certificate).unwrap(), certificate.as_bytes());
        let key = "-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n";
        for without in ["", "no PEM at all", key, "-----BEGIN CERTIFICATE-----\nAAAA\n"] {
            let refused = of(without).unwrap_err().to_string();
            assert_eq!(refused, "no certificate in /etc/culvert/root.pem", "{without:?}");
        }
    }
}
