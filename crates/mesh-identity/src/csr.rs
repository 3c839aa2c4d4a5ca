//! Certificate signing requests.

use std::fmt;

use mesh_model::SpiffeId;
use rcgen::{
    CertificateParams, DistinguishedName, KeyPair, PKCS_ECDSA_P256_SHA256, SanType,
    string::Ia5String,
};
use rustls::crypto::aws_lc_rs::sign::any_ecdsa_type;
use rustls::sign::CertifiedKey;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use zeroize::{Zeroize, Zeroizing};

/// The private key behind a signing request, ECDSA P-256; wiped when dropped, and never printed.
pub struct CsrKey {
    pkcs8: Zeroizing<Vec<u8>>,
}

/// A key or request that could not be made; the cryptographic library's fault, worth a retry.
#[derive(Debug, thiserror::Error)]
#[error("cannot make a key and a signing request")]
pub struct CsrError(#[from] rcgen::Error);

/// Makes a key and a request (PEM) to certify it for `id`: empty subject, `id` as the only name.
///
/// # Errors
/// When the random generator or the signature fails.
pub fn csr(id: &SpiffeId) -> Result<(CsrKey, String), CsrError> {
    let mut pair = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.subject_alt_names = vec![SanType::URI(Ia5String::try_from(id.as_str())?)];
    let request = params.serialize_request(&pair)?.pem()?;
    let key = CsrKey { pkcs8: Zeroizing::new(pair.serialize_der()) };
    pair.zeroize();
    Ok((key, request))
}

impl CsrKey {
    /// A key read back from PKCS#8, for tests and tools that carry one.
    #[must_use]
    pub fn from_pkcs8(pkcs8: Zeroizing<Vec<u8>>) -> Self {
        Self { pkcs8 }
    }

    /// The key as PKCS#8, for a successor process: from memory to memory.
    #[must_use]
    pub fn to_pkcs8(&self) -> Zeroizing<Vec<u8>> {
        self.pkcs8.clone()
    }

    /// Chain and key as rustls takes them. The key is read where it lies: rustls wipes no copy that it is given.
    pub(crate) fn certify(
        &self,
        chain: Vec<CertificateDer<'static>>,
    ) -> Result<CertifiedKey, rustls::Error> {
        let der = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(self.pkcs8.as_slice()));
        let certified = CertifiedKey::new(chain, any_ecdsa_type(&der)?);
        certified.keys_match()?;
        Ok(certified)
    }
}

impl fmt::Debug for CsrKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("CsrKey(..)")
    }
}
