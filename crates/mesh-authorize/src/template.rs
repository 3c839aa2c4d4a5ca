//! Path templates: `/users/{*}/files/{**}`.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use mesh_model::path_text;
use serde::{Deserialize, Serialize};

/// A pattern of path segments: literal ones, `{*}` for one that is not empty, and at most one `{**}` for any rest, which literal
/// ones may follow. Source: `AuthorizationPolicy` path templates, Envoy's `uri_template`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct PathTemplate {
    text: Arc<str>,
    /// Segments in front of `{**}`, or all.
    front: Vec<Segment>,
    /// What must be at the end behind `{**}`: empty, or from a slash on; none without one.
    end: Option<Arc<str>>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
enum Segment {
    Literal(Arc<str>),
    Any,
}

/// Text that is not a path template.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not a path template: {text:?}")]
pub struct InvalidTemplate {
    /// What was given, cut to 256 characters.
    pub text: String,
}

impl PathTemplate {
    /// Whether a path in normal form fits.
    #[must_use]
    pub fn matches(&self, path: &str) -> bool {
        let mut rest = path;
        for wanted in &self.front {
            let Some(after) = rest.strip_prefix('/') else { return false };
            let (segment, after) = after.split_at(after.find('/').unwrap_or(after.len()));
            let fits = match wanted {
                Segment::Literal(literal) => **literal == *segment,
                Segment::Any => !segment.is_empty(),
            };
            if !fits {
                return false;
            }
            rest = after;
        }
        match &self.end {
            None => rest.is_empty(),
            Some(end) => rest.strip_prefix('/').is_some_and(|rest| rest.ends_with(&**end)),
        }
    }
}

impl FromStr for PathTemplate {
    type Err = InvalidTemplate;

    fn from_str(text: &str) -> Result<Self, InvalidTemplate> {
        let invalid = || InvalidTemplate { text: text.chars().take(256).collect() };
        let segments = text.strip_prefix('/').ok_or_else(invalid)?;
        let mut front = Vec::new();
        let mut end: Option<String> = None;
        for segment in segments.split('/') {
            match (segment, &mut end) {
                ("{**}", None) => end = Some(String::new()),
                ("{*}", None) => front.push(Segment::Any),
                (literal, _) if literal.contains(['{', '}', '*']) => return Err(invalid()),
                (literal, None) => front.push(Segment::Literal(path_text(literal).into())),
                (literal, Some(end)) => {
                    end.push('/');
                    end.push_str(&path_text(literal));
                }
            }
        }
        Ok(Self { text: text.into(), front, end: end.map(Into::into) })
    }
}

impl fmt::Display for PathTemplate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl TryFrom<String> for PathTemplate {
    type Error = InvalidTemplate;

    fn try_from(text: String) -> Result<Self, InvalidTemplate> {
        text.parse()
    }
}

impl From<PathTemplate> for String {
    fn from(template: PathTemplate) -> Self {
        template.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn templates_match_by_segments() {
        for (template, path, matches) in [
            ("/a/{*}", "/a/b", true),
            ("/a/{*}", "/a/", false),
            ("/a/{*}", "/a/b/c", false),
            ("/a/{*}", "/a/b/", false),
            ("/a/{*}/c", "/a/b/c", true),
            ("/{*}/{*}", "/a/b", true),
            ("/a/{**}", "/a/", true),
            ("/a/{**}", "/a", false),
            ("/a/{**}", "/a/b/c", true),
            ("/a/{**}/z", "/a/b/c/z", true),
            ("/a/{**}/z", "/a/z", false),
            ("/a/{**}/z", "/a/b/zz", false),
            ("/{*}/x/{**}", "/a/x/b", true),
            ("/{**}", "/", true),
            ("/{**}", "*", false),
            ("/a", "/a", true),
            ("/%40/{*}/caf\u{e9}", "/@/x/caf%C3%A9", true),
            ("/{**}/%61", "/x/a", true),
        ] {
            let parsed: PathTemplate = template.parse().unwrap();
            assert_eq!(parsed.matches(path), matches, "{template} {path}");
            assert_eq!(parsed.to_string(), template);
        }
    }

    #[test]
    fn other_braces_are_refused() {
        for text in
            ["", "a", "{*}", "/{*}a", "/a{**}", "/{**}/{*}", "/{**}/{**}", "/{a}", "/*", "/{*"]
        {
            assert!(text.parse::<PathTemplate>().is_err(), "{text:?}");
        }
    }
}
