//! An authority as data, for the controller's disk.

use std::time::SystemTime;

use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

/// Everything a [`CaCore`](super::CaCore) consists of. Holds private keys: keep it readable by its owner only.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct CaState {
    /// The trust domain.
    pub trust_domain: String,
    /// The signing root first, then a coming one, then retired ones.
    pub roots: Vec<AuthorityState>,
    /// True while the second root waits to be activated.
    pub root_is_coming: bool,
    /// The signing intermediate first, then retired ones.
    pub intermediates: Vec<AuthorityState>,
}

/// One authority.
#[derive(Clone, Serialize, Deserialize)]
pub struct AuthorityState {
    /// Its certificate, PEM.
    pub cert_pem: String,
    /// Its private key, PKCS#8 in PEM.
    #[serde(with = "secret")]
    pub key_pem: Zeroizing<String>,
    /// When the last certificate it may have signed expires, once it was replaced.
    pub over_at: Option<SystemTime>,
    /// What it has revoked.
    pub revoked: Vec<RevocationState>,
}

/// One revoked certificate.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RevocationState {
    /// Its serial, big-endian.
    pub serial: Vec<u8>,
    /// When it was revoked.
    pub at: SystemTime,
}

impl std::fmt::Debug for AuthorityState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("AuthorityState")
            .field("cert_pem", &self.cert_pem)
            .field("over_at", &self.over_at)
            .field("revoked", &self.revoked)
            .finish_non_exhaustive()
    }
}

mod secret {
    use serde::{Deserialize, Deserializer, Serializer};
    use zeroize::Zeroizing;

    pub(super) fn serialize<S: Serializer>(
        secret: &Zeroizing<String>,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(secret)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Zeroizing<String>, D::Error> {
        String::deserialize(deserializer).map(Zeroizing::new)
    }
}
