//! RequestAuthentication as the controller describes it, and in the form in which requests are looked at.

use std::sync::Arc;
use std::time::Duration;

use http::HeaderName;
use serde::{Deserialize, Serialize};

use crate::key::KeySet;

/// A RequestAuthentication: whose tokens count, and where they are.
///
/// Source: `security.istio.io/v1` RequestAuthentication, whose semantics it keeps.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RequestAuthentication {
    /// Its namespace.
    pub namespace: Arc<str>,
    /// Its name.
    pub name: Arc<str>,
    /// Its rules: an issuer each.
    pub rules: Vec<JwtRule>,
}

/// One issuer's tokens.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct JwtRule {
    /// What `iss` has to be.
    pub issuer: Arc<str>,
    /// One of which has to be in `aud`; empty for any.
    pub audiences: Vec<Arc<str>>,
    /// Where its keys are.
    pub keys: KeySource,
    /// Headers that may hold a token. When these, the parameters and the cookies are all empty: `authorization: Bearer`, and
    /// the parameter `access_token`.
    pub from_headers: Vec<HeaderLocation>,
    /// Parameters of the query that may.
    pub from_params: Vec<Arc<str>>,
    /// Cookies that may.
    pub from_cookies: Vec<Arc<str>>,
    /// Whether the server sees the token.
    pub forward_original_token: bool,
    /// The header that the server finds the payload in, base64url as in the token.
    pub output_payload_header: Option<Arc<str>>,
    /// Headers that the server finds claims in.
    pub output_claims: Vec<OutputClaim>,
    /// Claims that are lists of words with spaces between.
    pub space_delimited_claims: Vec<Arc<str>>,
    /// How long reading its keys may take, milliseconds.
    pub timeout_ms: u64,
}

/// Where an issuer's keys are.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum KeySource {
    /// Here: a JSON Web Key Set.
    Inline(Arc<str>),
    /// At this address.
    Uri(Arc<str>),
    /// Where the issuer says (OpenID Connect Discovery 1.0).
    Discovery,
}

/// Where keys are read from, and how long that may take.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum KeyPlace {
    /// A JSON Web Key Set.
    Keys {
        /// Its address.
        uri: Arc<str>,
        /// Longest wait.
        timeout: Duration,
    },
    /// An issuer, which says where its key set is.
    Issuer {
        /// The issuer.
        issuer: Arc<str>,
        /// Longest wait.
        timeout: Duration,
    },
}

impl KeyPlace {
    /// Longest wait for an answer.
    #[must_use]
    pub const fn timeout(&self) -> Duration {
        match self {
            Self::Keys { timeout, .. } | Self::Issuer { timeout, .. } => *timeout,
        }
    }

    /// The address that is asked first.
    #[must_use]
    pub fn uri(&self) -> String {
        match self {
            Self::Keys { uri, .. } => uri.as_ref().to_owned(),
            Self::Issuer { issuer, .. } => {
                format!("{}/.well-known/openid-configuration", issuer.trim_end_matches('/'))
            }
        }
    }
}

/// A header that may hold a token.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HeaderLocation {
    /// The header, in lower case.
    pub name: Arc<str>,
    /// What stands before the token; may be empty.
    pub prefix: Arc<str>,
}

/// A header that a claim goes into.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OutputClaim {
    /// The header, in lower case.
    pub header: Arc<str>,
    /// The claim: its name, and the names inside it.
    pub claim: Vec<Arc<str>>,
}

/// A rule that cannot be used, which its author or the controller should not have let through.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidRule {
    /// The name of a header is none.
    #[error("{name:?} is no header")]
    Header {
        /// The name.
        name: Arc<str>,
    },
    /// The keys cannot be read.
    #[error("its keys cannot be used")]
    Keys(#[from] crate::key::InvalidKeySet),
}

/// The rules of one RequestAuthentication, ready for requests.
#[derive(Debug)]
pub struct Rules {
    /// `namespace/name`.
    pub name: Arc<str>,
    /// As the object lists them.
    pub rules: Vec<Rule>,
}

/// One rule, ready for requests.
#[derive(Debug)]
pub struct Rule {
    /// As it is written.
    pub source: JwtRule,
    /// Its keys, when they are written in it.
    pub keys: Option<Arc<KeySet>>,
    /// Headers that may hold a token, with what stands before it there.
    pub(crate) headers: Vec<(HeaderName, Arc<str>)>,
    pub(crate) params: Vec<Arc<str>>,
    pub(crate) cookies: Vec<Arc<str>>,
    /// The headers that it writes: nobody else may.
    pub(crate) payload_header: Option<HeaderName>,
    pub(crate) claim_headers: Vec<(HeaderName, Vec<Arc<str>>)>,
}

impl Rules {
    /// Makes the rules of an object ready.
    ///
    /// # Errors
    /// When a header's name or inline keys cannot be used.
    pub fn new(of: &RequestAuthentication) -> Result<Self, InvalidRule> {
        let rules = of.rules.iter().map(Rule::new).collect::<Result<_, _>>()?;
        Ok(Self { name: format!("{}/{}", of.namespace, of.name).into(), rules })
    }
}

impl Rule {
    fn new(source: &JwtRule) -> Result<Self, InvalidRule> {
        let keys = match &source.keys {
            KeySource::Inline(text) => Some(Arc::new(KeySet::parse(text.as_bytes())?)),
            KeySource::Uri(_) | KeySource::Discovery => None,
        };
        let mut headers = Vec::new();
        for location in &source.from_headers {
            headers.push((header(&location.name)?, Arc::clone(&location.prefix)));
        }
        let mut params = source.from_params.clone();
        if headers.is_empty() && params.is_empty() && source.from_cookies.is_empty() {
            headers.push((http::header::AUTHORIZATION, "Bearer ".into()));
            params.push("access_token".into());
        }
        let mut claim_headers = Vec::new();
        for output in &source.output_claims {
            claim_headers.push((header(&output.header)?, output.claim.clone()));
        }
        Ok(Self {
            keys,
            headers,
            params,
            cookies: source.from_cookies.clone(),
            payload_header: source.output_payload_header.as_ref().map(header).transpose()?,
            claim_headers,
            source: source.clone(),
        })
    }

    /// Where its keys are read from; none when they are written in it.
    #[must_use]
    pub fn place(&self) -> Option<KeyPlace> {
        let timeout = Duration::from_millis(self.source.timeout_ms);
        match &self.source.keys {
            KeySource::Inline(_) => None,
            KeySource::Uri(uri) => Some(KeyPlace::Keys { uri: Arc::clone(uri), timeout }),
            KeySource::Discovery => {
                Some(KeyPlace::Issuer { issuer: Arc::clone(&self.source.issuer), timeout })
            }
        }
    }
}

fn header(name: &Arc<str>) -> Result<HeaderName, InvalidRule> {
    name.parse().map_err(|_invalid| InvalidRule::Header { name: Arc::clone(name) })
}
