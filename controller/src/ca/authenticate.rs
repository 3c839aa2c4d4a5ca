//! Who calls.
//!
//! One trait, so that join tokens and a cluster's token review stand side by side. Whatever proves it, a caller is a
//! node: it gets what concerns that node and identities that run there.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use mesh_telemetry::metric;
use tonic::metadata::MetadataMap;
use tonic::{Request, Status};

use crate::door;

/// A node that proved itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeCaller {
    /// Its name.
    pub node: Arc<str>,
    /// How long its proof lasts; streams end with it.
    pub valid_for: Duration,
}

/// Why a caller is not let in. Each has a word of its own in metrics and answers.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unauthenticated {
    /// No `authorization: Bearer` in the request.
    #[error("no bearer token: join with a join token first, then send the session token")]
    Missing,
    /// The header is not text, or not a bearer token.
    #[error("the authorization header is no bearer token")]
    NotBearer,
    /// The token is refused.
    #[error("the token is refused ({word}): {detail}")]
    Refused {
        /// One word for metrics.
        word: &'static str,
        /// The same for people.
        detail: String,
    },
    /// Too many tokens from the caller's address were refused, or wait to be judged.
    #[error("too many tokens from this address are refused or wait; try again in a few seconds")]
    Throttled,
    /// Whoever judges the token cannot be asked; the same token may be good a little later.
    #[error("the token cannot be judged now: {detail}")]
    Unavailable {
        /// Why.
        detail: String,
    },
}

impl Unauthenticated {
    /// One word for metrics.
    #[must_use]
    pub const fn word(&self) -> &'static str {
        match self {
            Self::Missing => "missing",
            Self::NotBearer => "not_bearer",
            Self::Refused { word, .. } => word,
            Self::Throttled => "throttled",
            Self::Unavailable { .. } => "unavailable",
        }
    }

    fn status(&self) -> Status {
        let text = self.to_string();
        match self {
            Self::Missing | Self::NotBearer | Self::Refused { .. } => Status::unauthenticated(text),
            Self::Throttled => Status::resource_exhausted(text),
            Self::Unavailable { .. } => Status::unavailable(text),
        }
    }
}

/// Judges bearer tokens.
#[tonic::async_trait]
pub trait Authenticate: Send + Sync + 'static {
    /// The node that `bearer`, sent from `source`, proves.
    ///
    /// # Errors
    /// Why it proves none.
    async fn authenticate(
        &self,
        bearer: &str,
        source: Option<IpAddr>,
        now: SystemTime,
    ) -> Result<NodeCaller, Unauthenticated>;
}

/// The node that calls.
///
/// # Errors
/// `UNAUTHENTICATED`, or `UNAVAILABLE` or `RESOURCE_EXHAUSTED` where the token cannot be judged, with the reason; it is
/// counted.
pub fn caller<'a, T>(
    authenticate: &'a dyn Authenticate,
    request: &Request<T>,
) -> impl Future<Output = Result<NodeCaller, Status>> + Send + use<'a, T> {
    let source = door::source(request.extensions());
    let bearer = bearer(request.metadata()).map(str::to_owned);
    async move {
        let judged = match bearer {
            Ok(bearer) => authenticate.authenticate(&bearer, source, SystemTime::now()).await,
            Err(error) => Err(error),
        };
        judged.map_err(|error| {
            metrics::counter!(metric::CONTROLLER_UNAUTHENTICATED.name, "reason" => error.word())
                .increment(1);
            error.status()
        })
    }
}

fn bearer(metadata: &MetadataMap) -> Result<&str, Unauthenticated> {
    let header = metadata.get("authorization").ok_or(Unauthenticated::Missing)?;
    header
        .to_str()
        .ok()
        .and_then(|text| text.split_once(' '))
        .filter(|(scheme, token)| scheme.eq_ignore_ascii_case("bearer") && !token.trim().is_empty())
        .map(|(_, token)| token.trim())
        .ok_or(Unauthenticated::NotBearer)
}
