//! What a rule does with a request and its answer. Source: Gateway API `HTTPRouteFilter`.

use std::sync::Arc;

use http::{HeaderMap, HeaderName, HeaderValue, StatusCode};
use serde::{Deserialize, Serialize};

use crate::cors::Cors;
use crate::route::BackendTarget;

/// The filters of a rule or of a backend. Each kind is there at most once, but for mirrors, as the API demands.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Filters {
    /// Changes the request's headers.
    pub request_headers: HeaderModifier,
    /// Changes the answer's headers.
    pub response_headers: HeaderModifier,
    /// Answers with a redirect; not together with `rewrite`, and not on a backend.
    pub redirect: Option<Redirect>,
    /// Changes host and path.
    pub rewrite: Option<Rewrite>,
    /// Sends copies elsewhere, whose answers nobody sees.
    pub mirrors: Vec<Mirror>,
    /// Answers browsers' questions about other origins; not on a backend.
    pub cors: Option<Cors>,
    /// A filter that is not known or refers to something that is not there: what it was to do must not be skipped, so the
    /// request is answered with 500. Says why, for people.
    pub unresolved: Option<Arc<str>>,
}

/// Changes headers: sets, then adds, then removes. The API does not let one header be in two of the lists.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HeaderModifier {
    /// Replaces all values.
    #[serde(with = "crate::text::headers")]
    pub set: Vec<(HeaderName, HeaderValue)>,
    /// Adds a value.
    #[serde(with = "crate::text::headers")]
    pub add: Vec<(HeaderName, HeaderValue)>,
    /// Removes all values.
    #[serde(with = "crate::text::header_names")]
    pub remove: Vec<HeaderName>,
}

impl HeaderModifier {
    /// Applies it.
    pub fn apply(&self, headers: &mut HeaderMap) {
        for (name, value) in &self.set {
            headers.insert(name.clone(), value.clone());
        }
        for (name, value) in &self.add {
            headers.append(name.clone(), value.clone());
        }
        for name in &self.remove {
            headers.remove(name);
        }
    }

    /// True when it changes nothing.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.set.is_empty() && self.add.is_empty() && self.remove.is_empty()
    }
}

/// A redirect. What it leaves out is as in the request.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Redirect {
    /// The scheme.
    pub scheme: Option<RedirectScheme>,
    /// The host.
    pub host: Option<Arc<str>>,
    /// The port. Absent: the well-known one of `scheme` if that is given, else the one that was dialled.
    pub port: Option<u16>,
    /// The path.
    pub path: Option<PathModifier>,
    /// 301, 302, 303, 307 or 308. The API's default is 302.
    #[serde(with = "crate::text::status")]
    pub status: StatusCode,
}

/// Schemes of redirects.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum RedirectScheme {
    /// `http`.
    Http,
    /// `https`.
    Https,
}

impl RedirectScheme {
    /// As in a URL.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Http => "http",
            Self::Https => "https",
        }
    }

    pub(crate) const fn default_port(self) -> u16 {
        match self {
            Self::Http => 80,
            Self::Https => 443,
        }
    }
}

/// Changes host and path on the way to the server. What it leaves out is as in the request.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rewrite {
    /// The host.
    pub host: Option<Arc<str>>,
    /// The path.
    pub path: Option<PathModifier>,
}

/// A change of a path; the query stays.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum PathModifier {
    /// In place of the whole path.
    Full(Arc<str>),
    /// In place of the prefix that matched.
    Prefix(Arc<str>),
}

impl PathModifier {
    /// The path after the change. `matched` is the prefix that matched, without a slash at its end.
    #[must_use]
    pub fn apply(&self, path: &str, matched: &str) -> String {
        let changed = match self {
            Self::Full(path) => path.to_string(),
            Self::Prefix(replacement) => {
                let rest = path.strip_prefix(matched).unwrap_or(path);
                format!("{}{rest}", replacement.trim_end_matches('/'))
            }
        };
        if changed.starts_with('/') { changed } else { format!("/{changed}") }
    }
}

/// Sends a copy of requests elsewhere.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mirror {
    /// Where; to an invalid one nothing is sent, as the API says.
    pub target: BackendTarget,
    /// Of which share of the requests.
    pub share: Fraction,
}

/// A share.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fraction {
    /// At most `denominator`; beyond means all.
    pub numerator: u32,
    /// Zero means all.
    pub denominator: u32,
}

impl Fraction {
    /// All.
    pub const ALL: Self = Self { numerator: 1, denominator: 1 };

    /// Whether a request belongs to the share, by evenly distributed `entropy`.
    #[must_use]
    pub const fn holds(self, entropy: u64) -> bool {
        self.denominator == 0 || scaled(entropy, self.denominator as u64) < self.numerator as u64
    }
}

/// A number below `bound`, evenly distributed when `entropy` is.
pub(crate) const fn scaled(entropy: u64, bound: u64) -> u64 {
    ((entropy as u128 * bound as u128) >> 64) as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prefixes_are_replaced_as_the_specification_tabulates() {
        for (path, prefix, replacement, changed) in [
            ("/foo/bar", "/foo", "/xyz", "/xyz/bar"),
            ("/foo/bar", "/foo", "/xyz/", "/xyz/bar"),
            ("/foo", "/foo", "/xyz", "/xyz"),
            ("/foo/", "/foo", "/xyz", "/xyz/"),
            ("/foo/bar", "/foo", "", "/bar"),
            ("/foo/", "/foo", "", "/"),
            ("/foo", "/foo", "", "/"),
            ("/foo/", "/foo", "/", "/"),
            ("/foo", "/foo", "/", "/"),
            ("/foo", "", "/xyz", "/xyz/foo"),
        ] {
            let found = PathModifier::Prefix(replacement.into()).apply(path, prefix);
            assert_eq!(found, changed, "{path} {prefix} {replacement}");
        }
        assert_eq!(PathModifier::Full("/x".into()).apply("/a/b", "/a"), "/x");
    }

    #[test]
    fn shares_are_met() {
        let third = Fraction { numerator: 1, denominator: 3 };
        let count = (0..3000_u64).filter(|n| third.holds(n * (u64::MAX / 3000))).count();
        assert!((999..=1001).contains(&count), "{count}");
        assert!(Fraction::ALL.holds(u64::MAX) && Fraction::ALL.holds(0));
        assert!(!Fraction { numerator: 0, denominator: 100 }.holds(0));
    }

    #[test]
    fn headers_are_set_added_and_removed() {
        let header = |name, value| (HeaderName::from_static(name), HeaderValue::from_static(value));
        let mut headers: HeaderMap =
            [header("a", "1"), header("b", "1"), header("c", "1")].into_iter().collect();
        headers.append("a", HeaderValue::from_static("2"));
        headers.append("c", HeaderValue::from_static("2"));
        HeaderModifier {
            set: vec![header("a", "3")],
            add: vec![header("b", "2"), header("d", "1")],
            remove: vec![HeaderName::from_static("c")],
        }
        .apply(&mut headers);
        let values = |name: &str| {
            headers.get_all(name).iter().map(|value| value.to_str().unwrap()).collect::<Vec<_>>()
        };
        assert_eq!(values("a"), ["3"]);
        assert_eq!(values("b"), ["1", "2"]);
        assert!(values("c").is_empty());
        assert_eq!(values("d"), ["1"]);
    }
}
