//! What a waypoint makes of the tokens in a request. Keys that are elsewhere are not read here: their signatures are assumed.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::SystemTime;

use http::HeaderMap;
use mesh_authorize::RequestClaims;
use mesh_jwt::{Changes, Found, Rejection, Rules, Verified, assume_signed, find, verify};
use mesh_model::CloseReason;

use crate::mesh::Picture;

/// A request once its tokens are judged.
#[derive(Debug, Default)]
pub(super) struct Authenticated {
    token: Option<(Arc<RequestClaims>, Arc<str>)>,
    /// Its path and query then.
    pub(super) target: String,
    /// What was found, for people; empty without a token.
    pub(super) said: String,
}

impl Authenticated {
    /// The claims, where the RequestAuthentications `names` hold.
    pub(super) fn at(&self, names: &BTreeSet<Arc<str>>) -> Option<&RequestClaims> {
        let (claims, by) = self.token.as_ref()?;
        names.contains(by).then_some(&**claims)
    }
}

/// Judges the tokens of a request by the RequestAuthentications `names`, and changes its headers as the waypoint does.
pub(super) fn authenticate(
    picture: &Picture,
    names: &BTreeSet<Arc<str>>,
    headers: &mut HeaderMap,
    target: &str,
    now: SystemTime,
) -> Result<Authenticated, (CloseReason, String)> {
    let mut all: Vec<&Rules> = Vec::new();
    for name in names {
        all.push(picture.authentications.get(name).ok_or_else(|| {
            let text =
                format!("refused with 403: RequestAuthentication {name} is attached and not known");
            (CloseReason::PolicyMissing, text)
        })?);
    }
    let refused = |rejection: Rejection, by: &str| {
        (CloseReason::PolicyDenied, format!("refused with 401: {rejection}{by}"))
    };
    let query = target.split_once('?').map(|(_, query)| query);
    let found = find(&all, headers, query).map_err(|rejection| refused(rejection, ""))?;
    let mut changes = Changes::new(&all);
    let mut authenticated = Authenticated::default();
    for one in &found {
        let (rules, index, verified) =
            judge(one, now).map_err(|(rejection, by)| refused(rejection, &by))?;
        let rule = &rules.rules[index];
        changes.add(one, rule, &verified);
        if authenticated.token.is_none() {
            let principal = verified.claims.principal().unwrap_or("nobody").to_owned();
            let assumed = match &rule.keys {
                Some(_) => "",
                None => ", if its signature is good: its keys are elsewhere",
            };
            authenticated.said = format!(
                "token of {principal} (RequestAuthentication {} rule {index}{assumed}), ",
                rules.name
            );
            authenticated.token = Some((verified.claims, Arc::clone(&rules.name)));
        }
    }
    authenticated.target = changes.apply(headers, target).unwrap_or_else(|| target.to_owned());
    Ok(authenticated)
}

fn judge<'f>(
    found: &Found<'f>,
    now: SystemTime,
) -> Result<(&'f Rules, usize, Verified), (Rejection, String)> {
    let mut worst = (Rejection::UnknownIssuer, String::new());
    for (rules, index, rule) in &found.rules {
        let outcome = match &rule.keys {
            Some(keys) => verify(&found.token, rule, keys, now),
            None => assume_signed(&found.token, rule, now),
        };
        match outcome {
            Ok(verified) => return Ok((rules, *index, verified)),
            Err(rejection) => {
                let by = format!(" (RequestAuthentication {} rule {index})", rules.name);
                worst = (rejection, by);
            }
        }
    }
    Err(worst)
}
