//! Tokens in a request: where rules say that they may be.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use http::header::{AUTHORIZATION, COOKIE};
use http::{HeaderMap, HeaderName};

use crate::authentication::{Rule, Rules};
use crate::rejection::Rejection;
use crate::token::Token;

/// Most tokens of one request; beyond, it is refused.
const MAX_TOKENS: usize = 8;

/// A place of a request.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Place {
    /// A header.
    Header(HeaderName),
    /// A parameter of the query, decoded.
    Param(Arc<str>),
    /// A cookie.
    Cookie(Arc<str>),
}

/// A token, and whose it may be.
pub struct Found<'r> {
    /// As it stands in the request.
    pub text: String,
    /// The token.
    pub token: Token,
    /// Where it stands, over all of the rules below.
    pub places: Vec<Place>,
    /// The rules that look there and name its issuer: the RequestAuthentication, and which of its rules.
    pub rules: Vec<(&'r Rules, usize, &'r Rule)>,
}

impl fmt::Debug for Found<'_> {
    /// Without what would let somebody use it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Found")
            .field("token", &self.token)
            .field("places", &self.places)
            .finish_non_exhaustive()
    }
}

/// The tokens of a request, in the order of the rules that look for them.
///
/// # Errors
/// When one is malformed, there are too many, or no rule that looks where one stands names its issuer.
pub fn find<'r>(
    authentications: &[&'r Rules],
    headers: &HeaderMap,
    query: Option<&str>,
) -> Result<Vec<Found<'r>>, Rejection> {
    type At<'r> = (Vec<Place>, Vec<(&'r Rules, usize, &'r Rule)>);
    let mut order: Vec<String> = Vec::new();
    let mut at: BTreeMap<String, At<'r>> = BTreeMap::new();
    for rules in authentications {
        for (index, rule) in rules.rules.iter().enumerate() {
            for (place, text) in presented(rule, headers, query) {
                if !at.contains_key(&text) {
                    if order.len() >= MAX_TOKENS {
                        return Err(Rejection::TooMany);
                    }
                    order.push(text.clone());
                }
                let (places, of) = at.entry(text).or_default();
                if !places.contains(&place) {
                    places.push(place);
                }
                if !of.iter().any(|(name, at, _)| name.name == rules.name && *at == index) {
                    of.push((rules, index, rule));
                }
            }
        }
    }
    let mut found = Vec::new();
    for text in order {
        let token = Token::parse(&text)?;
        let Some((places, mut rules)) = at.remove(&text) else { continue };
        rules.retain(|(_, _, rule)| token.issuer() == Some(&*rule.source.issuer));
        if rules.is_empty() {
            return Err(Rejection::UnknownIssuer);
        }
        found.push(Found { text, token, places, rules });
    }
    Ok(found)
}

/// What stands where a rule looks.
fn presented(rule: &Rule, headers: &HeaderMap, query: Option<&str>) -> Vec<(Place, String)> {
    let mut found = Vec::new();
    for (name, prefix) in &rule.headers {
        for value in headers.get_all(name) {
            let value = String::from_utf8_lossy(value.as_bytes());
            if let Some(text) = after(name, &value, prefix) {
                found.push((Place::Header(name.clone()), text.to_owned()));
            }
        }
    }
    for (name, value) in query.into_iter().flat_map(pairs) {
        if let Some(wanted) = rule.params.iter().find(|one| ***one == *name) {
            found.push((Place::Param(Arc::clone(wanted)), value.into_owned()));
        }
    }
    if !rule.cookies.is_empty() {
        for value in headers.get_all(COOKIE) {
            let value = String::from_utf8_lossy(value.as_bytes()).into_owned();
            for (name, text) in cookies(&value) {
                if let Some(wanted) = rule.cookies.iter().find(|one| ***one == *name) {
                    found.push((Place::Cookie(Arc::clone(wanted)), text.to_owned()));
                }
            }
        }
    }
    found.retain(|(_, text)| !text.is_empty());
    found
}

/// What stands after `prefix`. A scheme's case does not count (RFC 9110 §11.1): a server might read the token all the same.
pub(crate) fn after<'v>(name: &HeaderName, value: &'v str, prefix: &str) -> Option<&'v str> {
    let start = value.get(..prefix.len())?;
    let is_there = match *name == AUTHORIZATION {
        true => start.eq_ignore_ascii_case(prefix),
        false => start == prefix,
    };
    is_there.then(|| value[prefix.len()..].trim())
}

/// Names and values of a query, decoded.
pub(crate) fn pairs(query: &str) -> impl Iterator<Item = (Cow<'_, str>, Cow<'_, str>)> {
    query.split('&').map(|pair| {
        let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
        (decoded(name), decoded(value))
    })
}

fn decoded(text: &str) -> Cow<'_, str> {
    if !text.contains(['%', '+']) {
        return Cow::Borrowed(text);
    }
    let digit = |byte: Option<&u8>| byte.and_then(|byte| char::from(*byte).to_digit(16));
    let bytes = text.as_bytes();
    let mut out = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while let Some(byte) = bytes.get(at) {
        let hex = (digit(bytes.get(at + 1)), digit(bytes.get(at + 2)));
        match (byte, hex) {
            (b'%', (Some(high), Some(low))) => {
                out.push(u8::try_from(high * 16 + low).unwrap_or(b'?'));
                at += 3;
            }
            (b'+', _) => {
                out.push(b' ');
                at += 1;
            }
            (byte, _) => {
                out.push(*byte);
                at += 1;
            }
        }
    }
    Cow::Owned(String::from_utf8_lossy(&out).into_owned())
}

/// Names and values of a Cookie header.
pub(crate) fn cookies(header: &str) -> impl Iterator<Item = (&str, &str)> {
    header.split(';').filter_map(|one| {
        let (name, value) = one.trim().split_once('=')?;
        let value =
            value.strip_prefix('"').and_then(|value| value.strip_suffix('"')).unwrap_or(value);
        Some((name.trim(), value))
    })
}

/// A path and query without the tokens in it, for logs; none where there are no parameters that may hold one.
#[must_use]
pub fn redacted(authentications: &[&Rules], target: &str) -> Option<String> {
    let (path, query) = target.split_once('?')?;
    let is_secret = |pair: &str| {
        let (name, _) = pairs(pair).next()?;
        let mut rules = authentications.iter().flat_map(|rules| &rules.rules);
        rules.any(|rule| rule.params.iter().any(|one| **one == *name)).then_some(())
    };
    let mut is_changed = false;
    let kept: Vec<Cow<'_, str>> = query
        .split('&')
        .map(|pair| match (is_secret(pair), pair.split_once('=')) {
            (Some(()), Some((name, _))) => {
                is_changed = true;
                Cow::Owned(format!("{name}=-"))
            }
            _ => Cow::Borrowed(pair),
        })
        .collect();
    is_changed.then(|| format!("{path}?{}", kept.join("&")))
}
