//! SPIFFE identities of workloads.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

/// A workload's identity: `spiffe://<trust domain>/ns/<namespace>/sa/<service account>`.
///
/// Exactly this shape; any other SPIFFE URI is not an identity of this mesh. Equality is bytewise.
/// Source: SPIFFE ID specification §2; the path is Istio's.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct SpiffeId {
    uri: Arc<str>,
    trust_domain_end: u16,
    namespace_end: u16,
}

/// Text that is no identity of the expected shape.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not of the form spiffe://<trust domain>/ns/<namespace>/sa/<service account>: {text:?}")]
pub struct InvalidSpiffeId {
    /// What was given.
    pub text: String,
}

const SCHEME: &str = "spiffe://";
/// Longest URI accepted, bytes. Source: SPIFFE ID specification §2.3.
const MAX_URI_BYTES: usize = 2048;

impl SpiffeId {
    /// Builds the identity of a service account.
    ///
    /// # Errors
    /// When a part is empty, holds a character a SPIFFE path segment or trust domain may not, or the whole is too long.
    pub fn new(
        trust_domain: &str,
        namespace: &str,
        service_account: &str,
    ) -> Result<Self, InvalidSpiffeId> {
        format!("{SCHEME}{trust_domain}/ns/{namespace}/sa/{service_account}").parse()
    }

    /// The URI, with its scheme.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.uri
    }

    /// The URI without `spiffe://`: the form `AuthorizationPolicy` principals are written in.
    #[must_use]
    pub fn principal(&self) -> &str {
        &self.uri[SCHEME.len()..]
    }

    /// The trust domain.
    #[must_use]
    pub fn trust_domain(&self) -> &str {
        &self.uri[SCHEME.len()..usize::from(self.trust_domain_end)]
    }

    /// The namespace.
    #[must_use]
    pub fn namespace(&self) -> &str {
        &self.uri
            [usize::from(self.trust_domain_end) + "/ns/".len()..usize::from(self.namespace_end)]
    }

    /// The service account.
    #[must_use]
    pub fn service_account(&self) -> &str {
        &self.uri[usize::from(self.namespace_end) + "/sa/".len()..]
    }
}

fn is_segment(text: &str) -> bool {
    !text.is_empty()
        && text != "."
        && text != ".."
        && text.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'))
}

impl FromStr for SpiffeId {
    type Err = InvalidSpiffeId;

    fn from_str(text: &str) -> Result<Self, InvalidSpiffeId> {
        let invalid = || InvalidSpiffeId { text: text.chars().take(256).collect() };
        if text.len() > MAX_URI_BYTES {
            return Err(invalid());
        }
        let mut parts = text.strip_prefix(SCHEME).ok_or_else(invalid)?.split('/');
        let shape =
            [parts.next(), parts.next(), parts.next(), parts.next(), parts.next(), parts.next()];
        let [Some(trust_domain), Some("ns"), Some(namespace), Some("sa"), Some(account), None] =
            shape
        else {
            return Err(invalid());
        };
        let domain_ok =
            is_segment(trust_domain) && !trust_domain.bytes().any(|b| b.is_ascii_uppercase());
        if !domain_ok || !is_segment(namespace) || !is_segment(account) {
            return Err(invalid());
        }
        let trust_domain_end = SCHEME.len() + trust_domain.len();
        let namespace_end = trust_domain_end + "/ns/".len() + namespace.len();
        let (Ok(trust_domain_end), Ok(namespace_end)) =
            (u16::try_from(trust_domain_end), u16::try_from(namespace_end))
        else {
            return Err(invalid());
        };
        Ok(Self { uri: text.into(), trust_domain_end, namespace_end })
    }
}

impl fmt::Display for SpiffeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.uri)
    }
}

impl From<SpiffeId> for String {
    fn from(id: SpiffeId) -> Self {
        id.uri.as_ref().to_owned()
    }
}

impl TryFrom<String> for SpiffeId {
    type Error = InvalidSpiffeId;

    fn try_from(text: String) -> Result<Self, InvalidSpiffeId> {
        text.parse()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_read_back() {
        let id = SpiffeId::new("cluster.local", "shop", "cart").unwrap();
        assert_eq!(id.as_str(), "spiffe://cluster.local/ns/shop/sa/cart");
        assert_eq!(id.principal(), "cluster.local/ns/shop/sa/cart");
        assert_eq!(
            (id.trust_domain(), id.namespace(), id.service_account()),
            ("cluster.local", "shop", "cart")
        );
    }

    #[test]
    fn other_shapes_are_refused() {
        for text in [
            "",
            "spiffe://",
            "spiffe://td",
            "spiffe://td/ns/a/sa",
            "spiffe://td/ns/a/sa/",
            "spiffe://td/ns/a/sa/b/",
            "spiffe://td/ns/a/sa/b/c",
            "spiffe://td/sa/a/ns/b",
            "spiffe:///ns/a/sa/b",
            "spiffe://TD/ns/a/sa/b",
            "spiffe://td/ns/../sa/b",
            "spiffe://td/ns/a%2f/sa/b",
            "SPIFFE://td/ns/a/sa/b",
            "https://td/ns/a/sa/b",
            "spiffe://td:80/ns/a/sa/b",
        ] {
            assert!(text.parse::<SpiffeId>().is_err(), "{text}");
        }
    }
}
