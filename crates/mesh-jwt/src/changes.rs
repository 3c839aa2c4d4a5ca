//! What of tokens and their claims goes on to the server.

use std::fmt;

use base64::Engine as _;
use http::header::COOKIE;
use http::{HeaderMap, HeaderName, HeaderValue};
use serde_json::Value;

use crate::authentication::{Rule, Rules};
use crate::find::{Found, Place, cookies, pairs};
use crate::verify::Verified;

/// Longest header that a claim is written into, bytes.
const MAX_CLAIM_BYTES: usize = 8 * 1024;

/// Changes of a request, once its tokens are judged.
#[derive(Default)]
pub struct Changes {
    /// Headers that only the rules write.
    owned: Vec<HeaderName>,
    written: Vec<(HeaderName, HeaderValue)>,
    taken: Vec<(Place, String)>,
}

impl fmt::Debug for Changes {
    /// Without tokens and what they say.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Changes").field("owned", &self.owned).finish_non_exhaustive()
    }
}

impl Changes {
    /// What a client sends in the headers that `authentications` write is dropped, whether it has a token or not: nobody else
    /// speaks for an issuer.
    #[must_use]
    pub fn new(authentications: &[&Rules]) -> Self {
        let mut changes = Self::default();
        for rule in authentications.iter().flat_map(|rules| &rules.rules) {
            changes.owned.extend(rule.payload_header.clone());
            changes.owned.extend(rule.claim_headers.iter().map(|(name, _)| name.clone()));
        }
        changes
    }

    /// Takes over what a rule says of a token that it found good.
    pub fn add(&mut self, found: &Found<'_>, rule: &Rule, verified: &Verified) {
        if !rule.source.forward_original_token {
            let places = found.places.iter().cloned();
            self.taken.extend(places.map(|place| (place, found.text.clone())));
        }
        let mut write = |name: &HeaderName, text: &str| {
            let is_first = !self.written.iter().any(|(written, _)| written == name);
            if let Ok(value) = HeaderValue::from_str(text)
                && is_first
                && text.len() <= MAX_CLAIM_BYTES
            {
                self.written.push((name.clone(), value));
            }
        };
        if let Some(name) = &rule.payload_header {
            write(name, &verified.payload);
        }
        for (name, path) in &rule.claim_headers {
            match verified.claims.get(path) {
                Some(Value::String(text)) => write(name, text),
                Some(value @ (Value::Number(_) | Value::Bool(_))) => {
                    write(name, &value.to_string())
                }
                // A list in the form in which Envoy writes it.
                Some(value @ (Value::Array(_) | Value::Object(_))) => {
                    let text = value.to_string();
                    write(name, &base64::engine::general_purpose::STANDARD.encode(text));
                }
                Some(Value::Null) | None => {}
            }
        }
    }

    /// Carries them out; returns the path and query, where they are other ones now.
    pub fn apply(&self, headers: &mut HeaderMap, target: &str) -> Option<String> {
        for owned in &self.owned {
            // Servers of the CGI kind read - and _ as the same.
            let alike = |name: &&HeaderName| {
                let (name, owned) = (name.as_str().bytes(), owned.as_str().bytes());
                let plain = |byte: u8| if byte == b'_' { b'-' } else { byte };
                name.map(plain).eq(owned.map(plain))
            };
            let found: Vec<HeaderName> = headers.keys().filter(alike).cloned().collect();
            for name in found {
                headers.remove(&name);
            }
        }
        let mut changed = None;
        for (place, text) in &self.taken {
            match place {
                Place::Header(name) => take_header(headers, name, text),
                Place::Cookie(name) => take_cookie(headers, name),
                Place::Param(name) => {
                    let now = changed.as_deref().unwrap_or(target);
                    changed = Some(without_param(now, name));
                }
            }
        }
        for (name, value) in &self.written {
            headers.insert(name.clone(), value.clone());
        }
        changed
    }
}

/// Drops those values of a header that hold the token, whatever stands before it.
fn take_header(headers: &mut HeaderMap, name: &HeaderName, text: &str) {
    let holds = |value: &HeaderValue| {
        let value = String::from_utf8_lossy(value.as_bytes());
        value.trim_end().ends_with(text)
    };
    let kept: Vec<HeaderValue> =
        headers.get_all(name).iter().filter(|value| !holds(value)).cloned().collect();
    headers.remove(name);
    for value in kept {
        headers.append(name.clone(), value);
    }
}

fn take_cookie(headers: &mut HeaderMap, name: &str) {
    let all: Vec<HeaderValue> = headers.get_all(COOKIE).iter().cloned().collect();
    headers.remove(COOKIE);
    for value in all {
        let value = String::from_utf8_lossy(value.as_bytes()).into_owned();
        let kept: Vec<&str> = value
            .split(';')
            .map(str::trim)
            .filter(|one| cookies(one).next().is_none_or(|(other, _)| other != name))
            .collect();
        let kept = kept.join("; ");
        if let Ok(kept) = HeaderValue::from_str(&kept)
            && !kept.is_empty()
        {
            headers.append(COOKIE, kept);
        }
    }
}

fn without_param(target: &str, name: &str) -> String {
    let Some((path, query)) = target.split_once('?') else { return target.to_owned() };
    let is_kept = |pair: &&str| pairs(pair).next().is_none_or(|(other, _)| *other != *name);
    let kept: Vec<&str> = query.split('&').filter(is_kept).collect();
    match kept.is_empty() {
        true => path.to_owned(),
        false => format!("{path}?{}", kept.join("&")),
    }
}
