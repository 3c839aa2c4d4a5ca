//! The certificate authority and enrolment, over gRPC.

pub mod authenticate;
pub mod authority;
pub mod enrolment;
pub mod revocations;
pub mod tokens;

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use mesh_identity::SignError;
use mesh_model::SpiffeId;
use mesh_telemetry::metric;
use mesh_wire::impersonated_identity;
use mesh_wire::pb::auth::istio_certificate_service_server::IstioCertificateService;
use mesh_wire::pb::auth::{IstioCertificateRequest, IstioCertificateResponse};
use tonic::{Request, Response, Status};
use tracing::{debug, warn};

use self::authenticate::{Authenticate, NodeCaller, caller};
use self::authority::Authority;
use crate::door;
use crate::mesh::SharedMesh;

/// Why a certificate is refused. Each has a word of its own in metrics and in the answer.
#[derive(Debug, thiserror::Error)]
pub enum Refused {
    /// The request names no identity; a node has none of its own.
    #[error("the request names no identity: set ImpersonatedIdentity to the pod's SPIFFE URI")]
    NoIdentity,
    /// What is asked for is no identity.
    #[error("not an identity of this mesh")]
    InvalidIdentity(#[source] mesh_model::InvalidSpiffeId),
    /// The identity is of another trust domain.
    #[error("{identity} is not of the trust domain {trust_domain}")]
    ForeignTrustDomain {
        /// The identity.
        identity: SpiffeId,
        /// This mesh's.
        trust_domain: Arc<str>,
    },
    /// No pod of that identity is bound to the asking node.
    #[error("no pod of {identity} is bound to node {node}")]
    NotOnNode {
        /// The identity.
        identity: SpiffeId,
        /// The asking node.
        node: Arc<str>,
    },
    /// The lifetime is negative.
    #[error(
        "a lifetime of {seconds} s cannot be given; ask for a positive one, or 0 for the default"
    )]
    Lifetime {
        /// What was asked for.
        seconds: i64,
    },
    /// The CSR is not acceptable, or the CA cannot sign.
    #[error("{0}")]
    Sign(#[source] SignError),
}

impl Refused {
    /// One word for metrics.
    #[must_use]
    pub const fn word(&self) -> &'static str {
        match self {
            Self::NoIdentity => "no_identity",
            Self::InvalidIdentity(_) => "invalid_identity",
            Self::ForeignTrustDomain { .. } => "foreign_trust_domain",
            Self::NotOnNode { .. } => "not_on_node",
            Self::Lifetime { .. } => "lifetime",
            Self::Sign(error) => match error {
                SignError::Malformed => "malformed_csr",
                SignError::NoPossession => "no_possession",
                SignError::UnsupportedKey(_) => "unsupported_key",
                SignError::WrongTrustDomain { .. } => "foreign_trust_domain",
                SignError::IssuerExpired => "issuer_expired",
                SignError::Failed(_) => "failed",
            },
        }
    }

    fn status(&self) -> Status {
        let text = self.to_string();
        match self {
            Self::NoIdentity | Self::InvalidIdentity(_) | Self::Lifetime { .. } => {
                Status::invalid_argument(text)
            }
            Self::ForeignTrustDomain { .. } | Self::NotOnNode { .. } => {
                Status::permission_denied(text)
            }
            Self::Sign(error) => match error {
                SignError::Malformed
                | SignError::NoPossession
                | SignError::UnsupportedKey(_)
                | SignError::WrongTrustDomain { .. } => Status::invalid_argument(text),
                SignError::IssuerExpired | SignError::Failed(_) => Status::unavailable(text),
            },
        }
    }
}

/// Signs certificates for pods of the asking node.
#[derive(Clone)]
pub struct Certificates {
    mesh: SharedMesh,
    authority: Arc<Authority>,
    authenticate: Arc<dyn Authenticate>,
}

impl std::fmt::Debug for Certificates {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Certificates").finish_non_exhaustive()
    }
}

impl Certificates {
    /// A service that signs with `authority`.
    #[must_use]
    pub fn new(
        mesh: SharedMesh,
        authority: Arc<Authority>,
        authenticate: Arc<dyn Authenticate>,
    ) -> Self {
        Self { mesh, authority, authenticate }
    }

    fn sign(
        &self,
        caller: &NodeCaller,
        request: &IstioCertificateRequest,
    ) -> Result<Vec<String>, Refused> {
        let identity = impersonated_identity(request)
            .map_err(Refused::InvalidIdentity)?
            .ok_or(Refused::NoIdentity)?;
        let trust_domain = self.mesh.with_index(|index| index.settings().trust_domain.clone());
        if *identity.trust_domain() != *trust_domain {
            return Err(Refused::ForeignTrustDomain { identity, trust_domain });
        }
        if !self.mesh.runs_on(&caller.node, &identity) {
            return Err(Refused::NotOnNode { identity, node: Arc::clone(&caller.node) });
        }
        let ttl = u64::try_from(request.validity_duration)
            .map(Duration::from_secs)
            .map_err(|_source| Refused::Lifetime { seconds: request.validity_duration })?;
        let chain = self
            .authority
            .sign(&request.csr, &identity, ttl, SystemTime::now())
            .map_err(Refused::Sign)?;
        debug!(node = %caller.node, %identity, "certificate signed");
        Ok(chain)
    }
}

#[tonic::async_trait]
impl IstioCertificateService for Certificates {
    async fn create_certificate(
        &self,
        request: Request<IstioCertificateRequest>,
    ) -> Result<Response<IstioCertificateResponse>, Status> {
        let caller = caller(&*self.authenticate, &request).await?;
        door::admit(request.extensions());
        self.mesh.synced().await;
        let (service, body) = (self.clone(), request.into_inner());
        let node = Arc::clone(&caller.node);
        // Signing takes a fraction of a millisecond, but several hundred agents may ask at once.
        let outcome = tokio::task::spawn_blocking(move || service.sign(&caller, &body))
            .await
            .map_err(|error| Status::internal(error.to_string()))?;
        match outcome {
            Ok(cert_chain) => {
                metrics::counter!(metric::CONTROLLER_CERTIFICATES.name).increment(1);
                Ok(Response::new(IstioCertificateResponse { cert_chain }))
            }
            Err(refused) => {
                metrics::counter!(metric::CONTROLLER_CERTIFICATES_REFUSED.name, "reason" => refused.word())
                    .increment(1);
                warn!(%node, reason = refused.word(), %refused, "certificate refused");
                Err(refused.status())
            }
        }
    }
}
