//! Certificates of a mesh that never was, all valid at [`now`]. `tests/corpus.rs` makes new ones.

use std::time::{Duration, SystemTime};

use mesh_identity::CsrKey;
use mesh_model::SpiffeId;
use rustls_pki_types::pem::PemObject as _;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use zeroize::Zeroizing;

pub(crate) const LEAF: &str = include_str!("../fixtures/leaf.pem");
pub(crate) const INTERMEDIATE: &str = include_str!("../fixtures/intermediate.pem");
pub(crate) const ROOTS: &str = include_str!("../fixtures/roots.pem");
/// Revokes the leaf.
pub(crate) const CRL: &str = include_str!("../fixtures/revoked.pem");
pub(crate) const CSR: &str = include_str!("../fixtures/request.pem");
const KEY: &str = include_str!("../fixtures/key.pem");

/// 2030.
pub(crate) fn now() -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(1_900_000_000)
}

pub(crate) fn id() -> SpiffeId {
    SpiffeId::new("cluster.local", "shop", "cart").expect("an identity")
}

/// The leaf's key.
pub(crate) fn key() -> CsrKey {
    let der = PrivatePkcs8KeyDer::from_pem_slice(KEY.as_bytes()).map(PrivateKeyDer::from);
    CsrKey::from_pkcs8(Zeroizing::new(der.expect("a key").secret_der().to_vec()))
}

pub(crate) fn der(pem: &str) -> CertificateDer<'static> {
    CertificateDer::from_pem_slice(pem.as_bytes()).expect("a certificate")
}
