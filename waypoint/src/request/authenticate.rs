//! Who sent a request, by the tokens in it.

use std::borrow::Cow;
use std::sync::Arc;
use std::time::SystemTime;

use http::{HeaderMap, StatusCode};
use mesh_authorize::RequestClaims;
use mesh_jwt::{Changes, Found, Rejection, Verified, find, redacted, verify};
use mesh_model::NamespacedHostname;
use mesh_telemetry::{PolicyRef, RequestRecord};

use super::outline::Outline;
use crate::picture::{Authentication, Snapshot};
use crate::refusal::Refusal;

/// Longest principal in a log line, characters.
const MAX_LOGGED: usize = 256;

/// What tokens proved of a request.
#[derive(Clone, Default)]
pub(super) struct Authenticated {
    /// The claims of the first good token, and the RequestAuthentication that found it good.
    token: Option<(Arc<RequestClaims>, Arc<str>)>,
    /// The RequestAuthentications that were asked.
    by: Arc<[Arc<str>]>,
}

impl Authenticated {
    /// The claims, where the RequestAuthentications `names` hold: what others found good proves nothing there.
    pub(super) fn at(&self, names: &[Arc<str>]) -> Option<&RequestClaims> {
        let (claims, by) = self.token.as_ref()?;
        names.contains(by).then_some(&**claims)
    }
}

/// Judges the tokens of a request by `names`, the RequestAuthentications that hold for it, and changes the request into what the
/// server is to see. Returns its path and query, where they are other ones then.
///
/// # Errors
/// When a token is there and not good, or a RequestAuthentication is not known.
pub(super) async fn authenticate(
    snapshot: &Snapshot,
    names: Arc<[Arc<str>]>,
    headers: &mut HeaderMap,
    target: &str,
    record: &mut RequestRecord,
) -> Result<(Authenticated, Option<String>), Refusal> {
    if names.is_empty() {
        return Ok((Authenticated::default(), None));
    }
    let mut all = Vec::with_capacity(names.len());
    for name in &*names {
        all.push(snapshot.authentications.get(name).ok_or_else(|| unknown(name))?);
    }
    let rules: Vec<_> = all.iter().map(|one| &one.rules).collect();
    // Tokens are not for logs.
    if let Some(path) = redacted(&rules, &record.raw_path) {
        record.raw_path = path;
    }
    let query = target.split_once('?').map(|(_, query)| query);
    let found = find(&rules, headers, query).map_err(|rejection| refused(rejection, None))?;
    let mut changes = Changes::new(&rules);
    let mut token = None;
    for one in &found {
        let (rule, by, verified) = judge(&all, one).await?;
        changes.add(one, rule, &verified);
        token.get_or_insert_with(|| (verified.claims, Arc::clone(by)));
    }
    let target = changes.apply(headers, target);
    if let Some((claims, _)) = &token {
        let principal = claims.principal().unwrap_or("-");
        record.request_principal = Some(principal.chars().take(MAX_LOGGED).collect());
    }
    Ok((Authenticated { token, by: names }, target))
}

type Good<'f> = (&'f mesh_jwt::Rule, &'f Arc<str>, Verified);

/// The first rule that finds a token good.
async fn judge<'f>(all: &[&Arc<Authentication>], found: &Found<'f>) -> Result<Good<'f>, Refusal> {
    let mut worst = refused(Rejection::UnknownIssuer, None);
    for (rules, index, rule) in &found.rules {
        let remote = all
            .iter()
            .find(|one| one.rules.name == rules.name)
            .and_then(|one| one.keys.get(*index)?.as_ref());
        let attempt = || {
            let keys = match remote {
                Some(remote) => remote.current(),
                None => rule.keys.clone(),
            };
            let keys = keys.ok_or(Rejection::NoKeys)?;
            verify(&found.token, rule, &keys, SystemTime::now())
        };
        let mut outcome = attempt();
        if let (Err(rejection), Some(remote)) = (&outcome, remote)
            && rejection.may_be_stale_keys()
            && remote.newer().await
        {
            outcome = attempt();
        }
        match outcome {
            Ok(verified) => return Ok((rule, &rules.name, verified)),
            Err(rejection) => worst = refused(rejection, Some((&rules.name, *index))),
        }
    }
    Err(worst)
}

fn unknown(name: &str) -> Refusal {
    let detail = format!("RequestAuthentication {name} is attached and not known");
    let policy = PolicyRef {
        policy: format!("RequestAuthentication {name}").into(),
        problem: None,
        rule: None,
    };
    Refusal {
        policy: Some(policy),
        ..Refusal::new("policy_missing", StatusCode::FORBIDDEN, "-", detail)
    }
}

fn refused(rejection: Rejection, by: Option<(&Arc<str>, usize)>) -> Refusal {
    let status = match rejection {
        Rejection::NoKeys => StatusCode::SERVICE_UNAVAILABLE,
        Rejection::Malformed(_)
        | Rejection::UnknownIssuer
        | Rejection::Algorithm
        | Rejection::UnknownKey
        | Rejection::Signature
        | Rejection::Expired
        | Rejection::NotYetValid
        | Rejection::Audience
        | Rejection::TooMany => StatusCode::UNAUTHORIZED,
    };
    let policy = by.map(|(name, rule)| PolicyRef {
        policy: format!("RequestAuthentication {name}").into(),
        problem: None,
        rule: Some(rule),
    });
    Refusal { policy, ..Refusal::new(rejection.reason(), status, "UAEX", rejection.to_string()) }
}

/// The headers as another service behind this waypoint may see them: what its own rules write, and nobody asked them, is not
/// there.
pub(super) fn headers_for<'o>(
    snapshot: &Snapshot,
    service: &NamespacedHostname,
    outline: &'o Outline,
) -> Cow<'o, HeaderMap> {
    let served = snapshot.served(service);
    let names = served.iter().flat_map(|served| served.authentications.iter());
    let foreign: Vec<_> = names
        .filter(|name| !outline.authenticated.by.contains(*name))
        .filter_map(|name| snapshot.authentications.get(name))
        .map(|one| &one.rules)
        .collect();
    if foreign.is_empty() {
        return Cow::Borrowed(&outline.headers);
    }
    let mut headers = outline.headers.clone();
    Changes::new(&foreign).apply(&mut headers, "");
    Cow::Owned(headers)
}
