//! Requests to a CA.

use std::collections::BTreeMap;
use std::time::Duration;

use mesh_model::{InvalidSpiffeId, SpiffeId};
use prost_types::Struct;

use crate::node::{as_str, string};
use crate::pb::auth::IstioCertificateRequest;

/// Metadata key of the identity that a node's agent asks for on behalf of a pod. Source: Istio's CA.
const IMPERSONATED_IDENTITY: &str = "ImpersonatedIdentity";

/// A request of a node's agent to certify the key of `csr_pem` for `id`.
#[must_use]
pub fn certificate_request(
    csr_pem: String,
    id: &SpiffeId,
    validity: Duration,
) -> IstioCertificateRequest {
    let fields =
        BTreeMap::from([(IMPERSONATED_IDENTITY.to_owned(), string(id.as_str().to_owned()))]);
    IstioCertificateRequest {
        csr: csr_pem,
        validity_duration: i64::try_from(validity.as_secs()).unwrap_or(i64::MAX),
        metadata: Some(Struct { fields }),
    }
}

/// The identity that `request` asks for on behalf of a pod; none when it asks for the caller's own.
///
/// # Errors
/// When what it asks for is no identity.
pub fn impersonated_identity(
    request: &IstioCertificateRequest,
) -> Result<Option<SpiffeId>, InvalidSpiffeId> {
    let Some(value) = request.metadata.as_ref().and_then(|m| m.fields.get(IMPERSONATED_IDENTITY))
    else {
        return Ok(None);
    };
    as_str(value).unwrap_or_default().parse().map(Some)
}
