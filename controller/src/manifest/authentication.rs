//! RequestAuthentication. As in policies, fields that are not known are refused: an overlooked one might narrow whose tokens
//! count.

use std::sync::Arc;

use http::{HeaderName, Uri};
use mesh_jwt::{HeaderLocation, JwtRule, KeySet, KeySource, OutputClaim};
use mesh_route::parse_duration;
use serde::Deserialize;

use super::metadata::{InvalidField, Metadata, Selector};
use super::policy::{PolicyTarget, RawSelector, RawTargetRef, targets};

/// How long reading an issuer's keys may take, unless a rule says. Source: Istio.
const DEFAULT_TIMEOUT_MS: u64 = 5_000;
/// Most rules of one object.
const MAX_RULES: usize = 64;
/// Most places, audiences, headers or claims of one rule, each.
const MAX_LISTED: usize = 64;
/// Deepest claim.
const MAX_CLAIM_DEPTH: usize = 16;
/// Headers that rules may not write, beside those of one connection: they frame or address a request.
const NOT_WRITTEN: [&str; 9] = [
    "host",
    "content-length",
    "transfer-encoding",
    "connection",
    "te",
    "trailer",
    "upgrade",
    "cookie",
    "x-forwarded-client-cert",
];

/// A RequestAuthentication, validated.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RequestAuthentication {
    /// Metadata.
    pub meta: Metadata,
    /// Workloads it selects; `None` for all of its scope.
    pub selector: Option<Selector>,
    /// Objects it is attached to instead of workloads.
    pub targets: Vec<PolicyTarget>,
    /// Its rules: an issuer each.
    pub rules: Vec<JwtRule>,
}

#[derive(Debug, Default, Deserialize)]
pub(super) struct RawRequestAuthentication {
    #[serde(default)]
    spec: RawSpec,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct RawSpec {
    selector: Option<RawSelector>,
    target_ref: Option<RawTargetRef>,
    target_refs: Option<Vec<RawTargetRef>>,
    jwt_rules: Option<Vec<RawRule>>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct RawRule {
    issuer: String,
    audiences: Option<Vec<String>>,
    #[serde(alias = "jwks_uri")]
    jwks_uri: Option<String>,
    jwks: Option<String>,
    from_headers: Option<Vec<RawHeader>>,
    from_params: Option<Vec<String>>,
    from_cookies: Option<Vec<String>>,
    output_payload_to_header: Option<String>,
    forward_original_token: Option<bool>,
    output_claim_to_headers: Option<Vec<RawOutput>>,
    timeout: Option<String>,
    space_delimited_claims: Option<Vec<String>>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawHeader {
    name: String,
    prefix: Option<String>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawOutput {
    header: String,
    claim: String,
}

impl RawRequestAuthentication {
    pub(super) fn parse(self, meta: Metadata) -> Result<RequestAuthentication, InvalidField> {
        let spec = self.spec;
        let targets = targets(spec.target_ref, spec.target_refs, &meta)?;
        if spec.selector.is_some() && !targets.is_empty() {
            let problem = "given together with targetRefs";
            return Err(InvalidField::new("spec.selector", problem, "use one of the two"));
        }
        let raw = spec.jwt_rules.unwrap_or_default();
        bounded("spec.jwtRules", raw.len(), MAX_RULES)?;
        let rules = raw
            .into_iter()
            .enumerate()
            .map(|(index, rule)| rule.parse(&format!("spec.jwtRules[{index}]")))
            .collect::<Result<_, _>>()?;
        let selector = spec
            .selector
            .map(|selector| Selector(selector.match_labels.unwrap_or_default()))
            .filter(|selector| !selector.0.is_empty());
        Ok(RequestAuthentication { selector, targets, rules, meta })
    }
}

impl RawRule {
    fn parse(self, path: &str) -> Result<JwtRule, InvalidField> {
        let at = |field: &str| format!("{path}.{field}");
        if self.issuer.is_empty() {
            return Err(InvalidField::new(
                &at("issuer"),
                "it is empty",
                "write what the tokens' claim `iss` says",
            ));
        }
        let keys = keys(self.jwks, self.jwks_uri, &self.issuer, path)?;
        let mut from_headers = Vec::new();
        for (index, raw) in self.from_headers.unwrap_or_default().into_iter().enumerate() {
            let name = header(&raw.name, &at(&format!("fromHeaders[{index}].name")))?;
            from_headers
                .push(HeaderLocation { name, prefix: raw.prefix.unwrap_or_default().into() });
        }
        let mut output_claims = Vec::new();
        for (index, raw) in self.output_claim_to_headers.unwrap_or_default().into_iter().enumerate()
        {
            let header =
                written(&raw.header, &at(&format!("outputClaimToHeaders[{index}].header")))?;
            let claim: Vec<Arc<str>> = raw.claim.split('.').map(Arc::from).collect();
            if claim.iter().any(|name| name.is_empty()) || claim.len() > MAX_CLAIM_DEPTH {
                return Err(InvalidField::new(
                    &at(&format!("outputClaimToHeaders[{index}].claim")),
                    format!("{:?} is no claim", raw.claim),
                    "write its name, with dots before the names inside it: realm.role",
                ));
            }
            output_claims.push(OutputClaim { header, claim });
        }
        let output_payload_header = self
            .output_payload_to_header
            .filter(|name| !name.is_empty())
            .map(|name| written(&name, &at("outputPayloadToHeader")))
            .transpose()?;
        let rule = JwtRule {
            issuer: self.issuer.into(),
            audiences: texts(self.audiences, &at("audiences"))?,
            keys,
            from_headers,
            from_params: texts(self.from_params, &at("fromParams"))?,
            from_cookies: texts(self.from_cookies, &at("fromCookies"))?,
            forward_original_token: self.forward_original_token.unwrap_or(false),
            output_payload_header,
            output_claims,
            space_delimited_claims: texts(
                self.space_delimited_claims,
                &at("spaceDelimitedClaims"),
            )?,
            timeout_ms: timeout(self.timeout.as_deref(), &at("timeout"))?,
        };
        bounded(&at("fromHeaders"), rule.from_headers.len(), MAX_LISTED)?;
        bounded(&at("outputClaimToHeaders"), rule.output_claims.len(), MAX_LISTED)?;
        Ok(rule)
    }
}

fn keys(
    jwks: Option<String>,
    uri: Option<String>,
    issuer: &str,
    path: &str,
) -> Result<KeySource, InvalidField> {
    let given = |text: Option<String>| text.filter(|text| !text.is_empty());
    match (given(jwks), given(uri)) {
        (Some(_), Some(_)) => Err(InvalidField::new(
            &format!("{path}.jwks"),
            "given together with jwksUri",
            "use one of the two",
        )),
        (Some(text), None) => {
            let path = format!("{path}.jwks");
            let remedy = "write a JSON Web Key Set with an RSA key of 2048 bits or more, an EC key (P-256, P-384) or an Ed25519 key";
            let set = KeySet::parse(text.as_bytes())
                .map_err(|error| InvalidField::new(&path, error.to_string(), remedy))?;
            if set.is_empty() {
                return Err(InvalidField::new(&path, "no key in it verifies signatures", remedy));
            }
            Ok(KeySource::Inline(text.into()))
        }
        (None, Some(uri)) => {
            address(&uri, &format!("{path}.jwksUri"))?;
            Ok(KeySource::Uri(uri.into()))
        }
        (None, None) => {
            address(issuer, &format!("{path}.issuer")).map_err(|invalid| InvalidField {
                remedy: "give jwks or jwksUri: an issuer that is no address does not say where its keys are".into(),
                ..invalid
            })?;
            Ok(KeySource::Discovery)
        }
    }
}

fn address(text: &str, path: &str) -> Result<(), InvalidField> {
    let uri = text.parse::<Uri>().ok().filter(|uri| {
        matches!(uri.scheme_str(), Some("http" | "https"))
            && uri.host().is_some_and(|host| !host.is_empty())
            && uri.authority().is_some_and(|authority| !authority.as_str().contains('@'))
    });
    match uri {
        Some(_) => Ok(()),
        None => Err(InvalidField::new(
            path,
            format!("{text:?} is no address of http or https"),
            "write https://HOST/PATH",
        )),
    }
}

fn header(name: &str, path: &str) -> Result<Arc<str>, InvalidField> {
    name.parse::<HeaderName>().map(|name| name.as_str().into()).map_err(|_source| {
        InvalidField::new(path, format!("{name:?} is no header"), "write a header's name")
    })
}

fn written(name: &str, path: &str) -> Result<Arc<str>, InvalidField> {
    let name = header(name, path)?;
    if NOT_WRITTEN.contains(&&*name) || name.starts_with("culvert-") {
        let problem = format!("{name:?} is not for tokens to say");
        return Err(InvalidField::new(
            path,
            problem,
            "use a header of your own, such as x-jwt-sub",
        ));
    }
    Ok(name)
}

fn texts(list: Option<Vec<String>>, path: &str) -> Result<Vec<Arc<str>>, InvalidField> {
    let list = list.unwrap_or_default();
    bounded(path, list.len(), MAX_LISTED)?;
    if list.iter().any(String::is_empty) {
        return Err(InvalidField::new(path, "an empty value", "remove it"));
    }
    Ok(list.into_iter().map(Arc::from).collect())
}

fn bounded(path: &str, number: usize, most: usize) -> Result<(), InvalidField> {
    if number > most {
        return Err(InvalidField::new(path, format!("more than {most}"), "split the object"));
    }
    Ok(())
}

fn timeout(text: Option<&str>, path: &str) -> Result<u64, InvalidField> {
    let Some(text) = text else { return Ok(DEFAULT_TIMEOUT_MS) };
    let found = parse_duration(text).ok().and_then(|one| u64::try_from(one.as_millis()).ok());
    found.filter(|ms| (1..=60_000).contains(ms)).ok_or_else(|| {
        InvalidField::new(
            path,
            format!("{text:?} is no time between 1ms and 1m"),
            "write 5s or 500ms",
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::manifest::{Object, Parsed, object};
    use serde_json::{Value, json};

    fn read(rule: Value) -> Result<JwtRule, (String, String)> {
        let value = json!({
            "apiVersion": "security.istio.io/v1", "kind": "RequestAuthentication",
            "metadata": {"name": "jwt", "namespace": "shop"}, "spec": {"jwtRules": [rule]},
        });
        match object(&value) {
            Parsed::Object(object) => {
                let Object::RequestAuthentication(read) = &*object else { panic!("{object:?}") };
                Ok(read.rules[0].clone())
            }
            Parsed::Refused { reason, .. } => Err((reason.field(), reason.remedy)),
            Parsed::Ignored { kind } => panic!("{kind}"),
        }
    }

    #[test]
    fn a_rule_is_read_whole() {
        let rule = read(json!({
            "issuer": "https://i", "audiences": ["a"], "jwksUri": "https://i:8443/keys", "fromHeaders": [
                {"name": "X-Token", "prefix": "jwt "}, {"name": "y"},
            ], "fromParams": ["t"], "fromCookies": ["c"], "outputPayloadToHeader": "X-Payload",
            "forwardOriginalToken": true, "outputClaimToHeaders": [{"header": "x-role", "claim": "realm.role"}],
            "timeout": "250ms", "spaceDelimitedClaims": ["roles"],
        }));
        let rule = rule.unwrap();
        assert_eq!(rule.from_headers[0].name, "x-token".into());
        assert_eq!((&*rule.from_headers[0].prefix, &*rule.from_headers[1].prefix), ("jwt ", ""));
        assert_eq!(rule.output_payload_header.as_deref(), Some("x-payload"));
        assert_eq!(rule.output_claims[0].claim, ["realm".into(), "role".into()]);
        assert_eq!((rule.timeout_ms, rule.forward_original_token), (250, true));
        assert_eq!(rule.keys, KeySource::Uri("https://i:8443/keys".into()));
        let least = read(json!({"issuer": "https://i/realm"})).unwrap();
        assert_eq!((least.keys, least.timeout_ms), (KeySource::Discovery, 5_000));
    }

    #[test]
    fn what_would_not_work_is_refused_with_its_field() {
        let secret = r#"{"keys":[{"kty":"oct","k":"c2VjcmV0"}]}"#;
        for (rule, field) in [
            (json!({"issuer": ""}), "spec.jwtRules[0].issuer"),
            (json!({"issuer": "testing"}), "spec.jwtRules[0].issuer"),
            (json!({"issuer": "i", "jwksUri": "ftp://i/"}), "spec.jwtRules[0].jwksUri"),
            (json!({"issuer": "i", "jwksUri": "https://u:p@i/"}), "spec.jwtRules[0].jwksUri"),
            (
                json!({"issuer": "i", "jwks": "{}", "jwksUri": "https://i/"}),
                "spec.jwtRules[0].jwks",
            ),
            (json!({"issuer": "i", "jwks": "nothing"}), "spec.jwtRules[0].jwks"),
            (json!({"issuer": "i", "jwks": secret}), "spec.jwtRules[0].jwks"),
            (
                json!({"issuer": "https://i", "fromHeaders": [{"name": "a b"}]}),
                "spec.jwtRules[0].fromHeaders[0].name",
            ),
            (json!({"issuer": "https://i", "fromParams": [""]}), "spec.jwtRules[0].fromParams"),
            (
                json!({"issuer": "https://i", "outputPayloadToHeader": "Host"}),
                "spec.jwtRules[0].outputPayloadToHeader",
            ),
            (
                json!({"issuer": "https://i", "outputClaimToHeaders": [{"header": "x", "claim": "a..b"}]}),
                "spec.jwtRules[0].outputClaimToHeaders[0].claim",
            ),
            (json!({"issuer": "https://i", "timeout": "2h"}), "spec.jwtRules[0].timeout"),
            (json!({"issuer": "https://i", "audience": "a"}), "spec.jwtRules[0].audience"),
        ] {
            let (found, remedy) = read(rule.clone()).unwrap_err();
            assert_eq!(found, field, "{rule}");
            assert!(!remedy.is_empty());
        }
    }
}
