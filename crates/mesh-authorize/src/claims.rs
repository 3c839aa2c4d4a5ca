//! What a verified token says of whoever sent a request.

use std::sync::Arc;

use serde_json::{Map, Value};

/// The claims of a token whose signature, time and audience were found good. Whoever makes one vouches for that.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RequestClaims {
    principal: Option<String>,
    claims: Map<String, Value>,
    spaced: Vec<Arc<str>>,
}

impl RequestClaims {
    /// Claims of a verified token. Texts of those called as in `spaced` are lists of words with spaces between.
    #[must_use]
    pub fn new(claims: Map<String, Value>, spaced: &[Arc<str>]) -> Self {
        let text =
            |name: &str| claims.get(name).and_then(Value::as_str).filter(|text| !text.is_empty());
        let principal = text("iss").zip(text("sub"));
        let principal = principal.map(|(issuer, subject)| format!("{issuer}/{subject}"));
        Self { principal, claims, spaced: spaced.to_vec() }
    }

    /// `issuer/subject`; none of a token that lacks either.
    #[must_use]
    pub fn principal(&self) -> Option<&str> {
        self.principal.as_deref()
    }

    /// The claim at a path of names, one inside the other.
    #[must_use]
    pub fn get(&self, path: &[Arc<str>]) -> Option<&Value> {
        let (first, rest) = path.split_first()?;
        rest.iter().try_fold(self.claims.get(&**first)?, |value, name| value.get(&**name))
    }

    /// True when `holds` does for the claim at a path: for its text, its number or truth value as JSON writes them, or one of
    /// its list. An object, and null, are no values.
    pub(crate) fn any(&self, path: &[Arc<str>], holds: &dyn Fn(&str) -> bool) -> bool {
        let is_spaced = matches!(path, [name] if self.spaced.contains(name));
        match self.get(path) {
            Some(Value::String(text)) if is_spaced => {
                holds(text) || text.split_ascii_whitespace().any(holds)
            }
            Some(Value::Array(list)) => list.iter().any(|one| value_holds(one, holds)),
            Some(value) => value_holds(value, holds),
            None => false,
        }
    }
}

fn value_holds(value: &Value, holds: &dyn Fn(&str) -> bool) -> bool {
    match value {
        Value::String(text) => holds(text),
        Value::Bool(truth) => holds(if *truth { "true" } else { "false" }),
        Value::Number(number) => holds(&number.to_string()),
        Value::Null | Value::Array(_) | Value::Object(_) => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn claims(value: Value) -> RequestClaims {
        let Value::Object(claims) = value else { panic!("no object") };
        RequestClaims::new(claims, &["scope".into()])
    }

    #[test]
    fn a_principal_needs_both_of_its_parts() {
        for (value, principal) in [
            (serde_json::json!({"iss": "i", "sub": "s"}), Some("i/s")),
            (serde_json::json!({"iss": "i"}), None),
            (serde_json::json!({"iss": "i", "sub": ""}), None),
            (serde_json::json!({"iss": "i", "sub": 7}), None),
        ] {
            assert_eq!(claims(value).principal(), principal);
        }
    }

    #[test]
    fn claims_are_found_nested_in_lists_and_in_words() {
        let claims = claims(serde_json::json!({
            "scope": "read write", "roles": "read write", "realm": {"roles": ["a", "b", ["c"]], "no": null},
            "admin": true, "level": 3,
        }));
        let has = |path: &[&str], wanted: &str| {
            let path: Vec<Arc<str>> = path.iter().copied().map(Arc::from).collect();
            claims.any(&path, &|text| text == wanted)
        };
        for (path, wanted) in [
            (&["scope"][..], "write"),
            (&["scope"], "read write"),
            (&["roles"], "read write"),
            (&["realm", "roles"], "b"),
            (&["admin"], "true"),
            (&["level"], "3"),
        ] {
            assert!(has(path, wanted), "{path:?} {wanted}");
        }
        for (path, wanted) in [
            (&["roles"][..], "write"),
            (&["realm", "roles"], "c"),
            (&["realm"], "roles"),
            (&["realm", "no"], "null"),
            (&["realm", "roles", "a"], "a"),
            (&[], "x"),
        ] {
            assert!(!has(path, wanted), "{path:?} {wanted}");
        }
    }
}
