//! An issuer's public keys. Source: RFC 7517, RFC 7518 §6, RFC 8037 §2.

use std::fmt;
use std::sync::Arc;

use aws_lc_rs::signature::{
    ECDSA_P256_SHA256_FIXED, ECDSA_P384_SHA384_FIXED, ED25519, ParsedPublicKey,
    RSA_PKCS1_2048_8192_SHA256, RSA_PKCS1_2048_8192_SHA384, RSA_PKCS1_2048_8192_SHA512,
    RSA_PSS_2048_8192_SHA256, RSA_PSS_2048_8192_SHA384, RSA_PSS_2048_8192_SHA512, RsaParameters,
    RsaPublicKeyComponents,
};
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde::Deserialize;
use serde_json::Value;

use crate::rejection::Rejection;
use crate::token::Token;

/// Longest key set, bytes.
pub const MAX_KEY_SET_BYTES: usize = 256 * 1024;
/// Most keys of a set that are looked at.
const MAX_KEYS: usize = 64;
/// An RSA modulus, bytes.
const RSA_BYTES: std::ops::RangeInclusive<usize> = 256..=1024;

/// A signature algorithm. Source: RFC 7518 §3.1, RFC 8037 §3.1.
///
/// Those that need no key (`none`) or a shared one (`HS256` …) are none here.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[expect(missing_docs, reason = "each variant is its name")]
pub enum Algorithm {
    Rs256,
    Rs384,
    Rs512,
    Ps256,
    Ps384,
    Ps512,
    Es256,
    Es384,
    EdDsa,
}

const OF_RSA: [Algorithm; 6] = [
    Algorithm::Rs256,
    Algorithm::Rs384,
    Algorithm::Rs512,
    Algorithm::Ps256,
    Algorithm::Ps384,
    Algorithm::Ps512,
];

impl Algorithm {
    /// Every algorithm.
    pub const ALL: [Self; 9] = [
        Self::Rs256,
        Self::Rs384,
        Self::Rs512,
        Self::Ps256,
        Self::Ps384,
        Self::Ps512,
        Self::Es256,
        Self::Es384,
        Self::EdDsa,
    ];

    /// Its name in tokens and keys.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Rs256 => "RS256",
            Self::Rs384 => "RS384",
            Self::Rs512 => "RS512",
            Self::Ps256 => "PS256",
            Self::Ps384 => "PS384",
            Self::Ps512 => "PS512",
            Self::Es256 => "ES256",
            Self::Es384 => "ES384",
            Self::EdDsa => "EdDSA",
        }
    }

    /// The algorithm of a name; case counts.
    #[must_use]
    pub fn of(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|one| one.as_str() == name)
    }

    const fn rsa(self) -> Option<&'static RsaParameters> {
        match self {
            Self::Rs256 => Some(&RSA_PKCS1_2048_8192_SHA256),
            Self::Rs384 => Some(&RSA_PKCS1_2048_8192_SHA384),
            Self::Rs512 => Some(&RSA_PKCS1_2048_8192_SHA512),
            Self::Ps256 => Some(&RSA_PSS_2048_8192_SHA256),
            Self::Ps384 => Some(&RSA_PSS_2048_8192_SHA384),
            Self::Ps512 => Some(&RSA_PSS_2048_8192_SHA512),
            Self::Es256 | Self::Es384 | Self::EdDsa => None,
        }
    }
}

/// Text that is no key set; the issuer's fault.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidKeySet {
    /// It is longer than a key set may be.
    #[error("a key set of more than {MAX_KEY_SET_BYTES} bytes")]
    TooLong,
    /// It is no JSON object with a list `keys`.
    #[error("no JSON Web Key Set: {problem}")]
    Malformed {
        /// What is wrong.
        problem: String,
    },
}

/// The keys of an issuer that verify something.
pub struct KeySet {
    keys: Vec<Key>,
    skipped: usize,
}

struct Key {
    id: Option<Arc<str>>,
    /// By each algorithm that it verifies by.
    by: Vec<(Algorithm, ParsedPublicKey)>,
}

impl fmt::Debug for KeySet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.keys.iter().map(|key| &key.id)).finish()
    }
}

#[derive(Deserialize)]
struct Set {
    keys: Vec<Value>,
}

#[derive(Deserialize)]
struct Jwk {
    kty: String,
    kid: Option<String>,
    alg: Option<String>,
    #[serde(rename = "use")]
    purpose: Option<String>,
    key_ops: Option<Vec<String>>,
    crv: Option<String>,
    n: Option<String>,
    e: Option<String>,
    x: Option<String>,
    y: Option<String>,
}

impl KeySet {
    /// Reads a key set. Keys that are not known, too weak or not meant for signatures are passed over, and counted.
    ///
    /// # Errors
    /// When the text is no key set.
    pub fn parse(text: &[u8]) -> Result<Self, InvalidKeySet> {
        if text.len() > MAX_KEY_SET_BYTES {
            return Err(InvalidKeySet::TooLong);
        }
        let set: Set = serde_json::from_slice(text)
            .map_err(|error| InvalidKeySet::Malformed { problem: error.to_string() })?;
        let all = set.keys.len();
        let keys: Vec<Key> = set.keys.into_iter().take(MAX_KEYS).filter_map(key).collect();
        Ok(Self { skipped: all - keys.len(), keys })
    }

    /// Keys that verify something.
    #[must_use]
    pub const fn len(&self) -> usize {
        self.keys.len()
    }

    /// True when no key verifies anything.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.keys.is_empty()
    }

    /// Keys of the set that were passed over.
    #[must_use]
    pub const fn skipped(&self) -> usize {
        self.skipped
    }

    /// Whether a key of the set signed a token: the one of its key id, else each one that has none.
    pub(crate) fn check(&self, token: &Token) -> Result<(), Rejection> {
        let algorithm = Algorithm::of(&token.algorithm).ok_or(Rejection::Algorithm)?;
        let named = token.key_id.as_deref();
        let mut candidates = self
            .keys
            .iter()
            .filter(|key| match (named, key.id.as_deref()) {
                (Some(wanted), Some(id)) => wanted == id,
                (None, _) | (_, None) => true,
            })
            .peekable();
        if candidates.peek().is_none() {
            return Err(Rejection::UnknownKey);
        }
        let mut tried = 0;
        let mut of_name = false;
        for key in candidates {
            let by = key.by.iter().find(|(one, _)| *one == algorithm);
            let Some((_, public)) = by else { continue };
            tried += 1;
            of_name |= named.is_some() && key.id.is_some();
            if public.verify_sig(token.signed.as_bytes(), &token.signature).is_ok() {
                return Ok(());
            }
        }
        Err(match (tried, of_name) {
            (0, _) => Rejection::Algorithm,
            (_, true) => Rejection::Signature,
            // Nothing says which key it was: it may be one that is not here yet.
            (_, false) => Rejection::UnknownKey,
        })
    }
}

fn key(value: Value) -> Option<Key> {
    let jwk: Jwk = serde_json::from_value(value).ok()?;
    let verifies = jwk.purpose.as_deref().is_none_or(|purpose| purpose == "sig")
        && jwk.key_ops.as_ref().is_none_or(|ops| ops.iter().any(|one| one == "verify"));
    // An algorithm that is given is the only one; one that is not known leaves none.
    let wanted =
        |algorithm: &Algorithm| jwk.alg.as_deref().is_none_or(|name| name == algorithm.as_str());
    let bytes = |text: &Option<String>| URL_SAFE_NO_PAD.decode(text.as_deref()?).ok();
    let curve = jwk.crv.as_deref();
    let point = |size: usize| {
        let (x, y) = (bytes(&jwk.x)?, bytes(&jwk.y)?);
        (x.len() == size && y.len() == size).then(|| [&[4], x.as_slice(), &y].concat())
    };
    let by: Vec<(Algorithm, ParsedPublicKey)> = match (jwk.kty.as_str(), curve) {
        ("RSA", _) => {
            let (n, e) = (bytes(&jwk.n)?, bytes(&jwk.e)?);
            let (n, e) = (without_zeros(&n), without_zeros(&e));
            if !RSA_BYTES.contains(&n.len()) {
                return None;
            }
            let components = RsaPublicKeyComponents { n, e };
            let algorithms = OF_RSA.into_iter().filter(wanted);
            algorithms
                .filter_map(|one| Some((one, components.to_parsed_public_key(one.rsa()?).ok()?)))
                .collect()
        }
        ("EC", Some("P-256")) if wanted(&Algorithm::Es256) => {
            let key = ParsedPublicKey::new(&ECDSA_P256_SHA256_FIXED, point(32)?).ok()?;
            vec![(Algorithm::Es256, key)]
        }
        ("EC", Some("P-384")) if wanted(&Algorithm::Es384) => {
            let key = ParsedPublicKey::new(&ECDSA_P384_SHA384_FIXED, point(48)?).ok()?;
            vec![(Algorithm::Es384, key)]
        }
        ("OKP", Some("Ed25519")) if wanted(&Algorithm::EdDsa) => {
            let key = ParsedPublicKey::new(&ED25519, bytes(&jwk.x)?).ok()?;
            vec![(Algorithm::EdDsa, key)]
        }
        _ => Vec::new(),
    };
    let id = jwk.kid.as_deref().map(Arc::from);
    (verifies && !by.is_empty()).then_some(Key { id, by })
}

fn without_zeros(number: &[u8]) -> &[u8] {
    let zeros = number.iter().take_while(|byte| **byte == 0).count();
    number.get(zeros..).unwrap_or_default()
}
