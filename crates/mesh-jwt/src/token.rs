//! A token taken apart: JWS in its compact form. Source: RFC 7515 §3.1, §4.1; RFC 7519 §7.2.

use std::fmt;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde::Deserialize;
use serde::de::IgnoredAny;
use serde_json::{Map, Value};

use crate::rejection::Rejection;

/// Longest token, bytes.
pub const MAX_TOKEN_BYTES: usize = 16 * 1024;

/// A token that nobody has verified yet.
#[derive(Clone, PartialEq)]
pub struct Token {
    pub(crate) algorithm: String,
    pub(crate) key_id: Option<String>,
    pub(crate) claims: Map<String, Value>,
    /// Header and payload as they were signed.
    pub(crate) signed: String,
    pub(crate) signature: Vec<u8>,
}

impl fmt::Debug for Token {
    /// Without what would let somebody use it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Token")
            .field("algorithm", &self.algorithm)
            .field("key_id", &self.key_id)
            .finish_non_exhaustive()
    }
}

#[derive(Deserialize)]
struct Header {
    alg: String,
    kid: Option<String>,
    crit: Option<IgnoredAny>,
    b64: Option<IgnoredAny>,
}

impl Token {
    /// Takes a token apart.
    ///
    /// # Errors
    /// [`Rejection::Malformed`], with what is wrong.
    pub fn parse(text: &str) -> Result<Self, Rejection> {
        if text.len() > MAX_TOKEN_BYTES {
            return Err(Rejection::Malformed("the token is too long"));
        }
        let mut parts = text.split('.');
        let (Some(header), Some(payload), Some(signature), None) =
            (parts.next(), parts.next(), parts.next(), parts.next())
        else {
            return Err(Rejection::Malformed("the token has not three parts"));
        };
        let signed = text.get(..header.len() + 1 + payload.len()).unwrap_or_default().to_owned();
        let decode = |part: &str, problem| {
            URL_SAFE_NO_PAD.decode(part).map_err(|_invalid| Rejection::Malformed(problem))
        };
        let header = decode(header, "the token's header is not base64url")?;
        let payload = decode(payload, "the token's payload is not base64url")?;
        let signature = decode(signature, "the token's signature is not base64url")?;
        let header: Header = serde_json::from_slice(&header)
            .map_err(|_invalid| Rejection::Malformed("the token's header is none"))?;
        // What a critical extension means is not known here (RFC 7515 §4.1.11), and `b64` changes what is signed (RFC 7797).
        if header.crit.is_some() || header.b64.is_some() {
            return Err(Rejection::Malformed("the token needs an extension"));
        }
        let claims = serde_json::from_slice(&payload)
            .map_err(|_invalid| Rejection::Malformed("the token's payload is no JSON object"))?;
        Ok(Self { algorithm: header.alg, key_id: header.kid, claims, signed, signature })
    }

    /// Who says that it was issued by them; nothing is proven.
    #[must_use]
    pub fn issuer(&self) -> Option<&str> {
        self.claims.get("iss").and_then(Value::as_str)
    }

    /// The payload as it stands in the token.
    pub(crate) fn payload(&self) -> &str {
        self.signed.split('.').nth(1).unwrap_or_default()
    }
}
