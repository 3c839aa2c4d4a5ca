//! One token, one rule, one set of keys: good or not.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use mesh_authorize::RequestClaims;
use serde_json::Value;

use crate::authentication::Rule;
use crate::key::{Algorithm, KeySet};
use crate::rejection::Rejection;
use crate::token::Token;

/// How far the issuer's clock may be from ours. Source: Envoy's `clock_skew_seconds`, 60 by default.
pub const LEEWAY: Duration = Duration::from_secs(60);

/// Claims that are words with spaces between, whatever a rule says. Source: Istio's settings of Envoy.
const SPACED: [&str; 2] = ["scope", "permission"];

/// A token that is good.
#[derive(Clone, Debug)]
pub struct Verified {
    /// What it says.
    pub claims: Arc<RequestClaims>,
    /// Its payload as it stood in it.
    pub(crate) payload: String,
}

/// Judges a token by a rule, whose issuer is the token's, and the issuer's keys.
///
/// A token without `exp` does not expire; `iat` is not looked at.
///
/// # Errors
/// [`Rejection`]: what about it is not good. What it says is only looked at once its signature is good.
pub fn verify(
    token: &Token,
    rule: &Rule,
    keys: &KeySet,
    now: SystemTime,
) -> Result<Verified, Rejection> {
    keys.check(token)?;
    claims(token, rule, now)
}

/// As [`verify`], without a look at the signature: what would be said if that were good. For explanations only.
///
/// # Errors
/// As [`verify`].
pub fn assume_signed(token: &Token, rule: &Rule, now: SystemTime) -> Result<Verified, Rejection> {
    Algorithm::of(&token.algorithm).ok_or(Rejection::Algorithm)?;
    claims(token, rule, now)
}

fn claims(token: &Token, rule: &Rule, now: SystemTime) -> Result<Verified, Rejection> {
    if token.issuer() != Some(&*rule.source.issuer) {
        return Err(Rejection::UnknownIssuer);
    }
    let now = now.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs_f64();
    let leeway = LEEWAY.as_secs_f64();
    if date(token, "exp")?.is_some_and(|at| at + leeway <= now) {
        return Err(Rejection::Expired);
    }
    if date(token, "nbf")?.is_some_and(|at| at - leeway > now) {
        return Err(Rejection::NotYetValid);
    }
    let audiences = &rule.source.audiences;
    let is_meant = |one: &Value| {
        one.as_str().is_some_and(|text| audiences.iter().any(|audience| **audience == *text))
    };
    let meant = match token.claims.get("aud") {
        Some(Value::Array(list)) => list.iter().any(is_meant),
        Some(one) => is_meant(one),
        None => false,
    };
    if !audiences.is_empty() && !meant {
        return Err(Rejection::Audience);
    }
    let spaced: Vec<Arc<str>> = SPACED
        .into_iter()
        .map(Arc::from)
        .chain(rule.source.space_delimited_claims.iter().cloned())
        .collect();
    let claims = Arc::new(RequestClaims::new(token.claims.clone(), &spaced));
    Ok(Verified { claims, payload: token.payload().to_owned() })
}

/// A `NumericDate`, seconds. Source: RFC 7519 §2.
fn date(token: &Token, name: &str) -> Result<Option<f64>, Rejection> {
    match token.claims.get(name) {
        None => Ok(None),
        Some(value) => match value.as_f64() {
            Some(seconds) => Ok(Some(seconds)),
            None => Err(Rejection::Malformed("a time in the token is no number")),
        },
    }
}
