//! Tokens in requests, and the keys that judge them.

use std::sync::{Arc, OnceLock};
use std::time::{Duration, SystemTime};

use http::{HeaderMap, HeaderName, HeaderValue};
use mesh_jwt::mint::{Signer, key_set};
use mesh_jwt::{
    Algorithm, Changes, HeaderLocation, JwtRule, KeySet, KeySource, MAX_TOKEN_BYTES, OutputClaim,
    RequestAuthentication, Rules, Token, assume_signed, find, verify,
};
use serde_json::json;

use crate::input::texts;

/// 2030.
const NOW: Duration = Duration::from_secs(1_900_000_000);

fn signer() -> &'static Signer {
    static SIGNER: OnceLock<Signer> = OnceLock::new();
    SIGNER.get_or_init(|| Signer::ed25519(&[7; 32], "k"))
}

/// The one token that the signer ever signed.
fn good() -> String {
    signer().token(&json!({"iss": "https://issuer", "sub": "s", "aud": ["shop"], "realm": {"roles": ["a", "b"]}}))
}

pub(crate) fn sample() -> RequestAuthentication {
    let rule = JwtRule {
        issuer: "https://issuer".into(),
        audiences: vec!["shop".into()],
        keys: KeySource::Inline(key_set(&[signer()]).into()),
        from_headers: vec![
            HeaderLocation { name: "authorization".into(), prefix: "Bearer ".into() },
            HeaderLocation { name: "x-token".into(), prefix: "".into() },
        ],
        from_params: vec!["t".into()],
        from_cookies: vec!["c".into()],
        forward_original_token: false,
        output_payload_header: Some("x-payload".into()),
        output_claims: vec![OutputClaim {
            header: "x-roles".into(),
            claim: vec!["realm".into(), "roles".into()],
        }],
        space_delimited_claims: vec!["roles".into()],
        timeout_ms: 5_000,
    };
    RequestAuthentication { namespace: "shop".into(), name: "jwt".into(), rules: vec![rule] }
}

fn rules() -> &'static (Rules, Arc<KeySet>) {
    static RULES: OnceLock<(Rules, Arc<KeySet>)> = OnceLock::new();
    RULES.get_or_init(|| {
        let rules = Rules::new(&sample()).expect("a good rule");
        let keys = rules.rules[0].keys.clone().expect("inline keys");
        (rules, keys)
    })
}

/// No text but what the signer signed is a good token, whatever is judged of it besides.
pub fn token(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let Ok(token) = Token::parse(text) else { return };
    assert!(text.len() <= MAX_TOKEN_BYTES);
    let (rules, keys) = rules();
    let now = SystemTime::UNIX_EPOCH + NOW;
    if let Ok(verified) = verify(&token, &rules.rules[0], keys, now) {
        let signed = |text: &str| text.rsplit_once('.').map(|(signed, _)| signed.to_owned());
        assert_eq!(signed(text), signed(&good()), "forged");
        assert_eq!(verified.claims.principal(), Some("https://issuer/s"));
    }
    if let Ok(verified) = assume_signed(&token, &rules.rules[0], now) {
        assert_eq!(token.issuer(), Some("https://issuer"));
        let principal = verified.claims.principal();
        assert!(principal.is_none_or(|text| text.starts_with("https://issuer/")));
    }
}

pub(crate) fn token_seeds() -> Vec<Vec<u8>> {
    let claims = json!({"iss": "https://issuer", "sub": "s", "aud": "shop", "exp": 1, "nbf": 2.5});
    let none = mesh_jwt::mint::unsigned(&json!({"alg": "none"}), &claims);
    let other = Signer::ed25519(&[8; 32], "k").token(&claims);
    texts(&[&good(), &format!("{none}."), &other, "..", "e30.e30.AA"])
}

/// Lines: a target, then headers. Of what is found nothing is left that rules take away, and nobody else writes their headers.
pub fn request(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    let mut lines = text.lines();
    let target = lines.next().unwrap_or_default().to_owned();
    let mut headers = HeaderMap::new();
    for line in lines.take(64) {
        let Some((name, value)) = line.split_once(':') else { continue };
        if let (Ok(name), Ok(value)) =
            (name.parse::<HeaderName>(), HeaderValue::from_str(value.trim()))
        {
            headers.append(name, value);
        }
    }
    let (rules, keys) = rules();
    let query = target.split_once('?').map(|(_, query)| query);
    let Ok(found) = find(&[rules], &headers, query) else { return };
    let now = SystemTime::UNIX_EPOCH + NOW;
    let mut changes = Changes::new(&[rules]);
    let mut is_all_good = true;
    for one in &found {
        assert!(!one.places.is_empty() && !one.rules.is_empty());
        match verify(&one.token, &rules.rules[0], keys, now) {
            Ok(verified) => changes.add(one, &rules.rules[0], &verified),
            Err(_rejection) => is_all_good = false,
        }
    }
    if !is_all_good {
        return;
    }
    let changed = changes.apply(&mut headers, &target);
    let target = changed.unwrap_or(target);
    let query = target.split_once('?').map(|(_, query)| query);
    let left = find(&[rules], &headers, query).expect("what was good is no worse without it");
    assert!(left.is_empty(), "a token is left: {left:?}");
    let written = ["x-payload", "x_payload", "x-roles", "x_roles"];
    assert!(!found.is_empty() || written.iter().all(|name| !headers.contains_key(*name)));
}

pub(crate) fn request_seeds() -> Vec<Vec<u8>> {
    let good = good();
    texts(&[
        &format!("/a?t={good}&b=1\nx-token: {good}\nx-roles: root\nx_payload: 1"),
        &format!("/\nauthorization: bearer {good}\ncookie: a=1; c={good}; d=\"2\""),
        "/?access_token=x&t=\nauthorization: Basic dTpw\ncookie: c=",
        "/?%74=a.b.c\nx-token: ..",
    ])
}

/// A key set says what its keys verify, and nothing panics on the rest.
pub fn keys(data: &[u8]) {
    let Ok(set) = KeySet::parse(data) else { return };
    let (rules, _) = rules();
    let good = Token::parse(&good()).expect("a token");
    let now = SystemTime::UNIX_EPOCH + NOW;
    if verify(&good, &rules.rules[0], &set, now).is_ok() {
        let x = signer().jwk()["x"].as_str().expect("a public key").to_owned();
        // JSON may spell it in other ways, but not without saying it.
        let said: serde_json::Value = serde_json::from_slice(data).expect("it was read");
        assert!(said["keys"].as_array().is_some_and(|all| all.iter().any(|one| one["x"] == x)));
    }
}

pub(crate) fn keys_seeds() -> Vec<Vec<u8>> {
    let rsa = r#"{"keys":[{"kty":"RSA","alg":"RS256","use":"sig","n":"AQAB","e":"AQAB"},{"kty":"oct","k":"AA"}]}"#;
    let ec =
        r#"{"keys":[{"kty":"EC","crv":"P-256","kid":"e","x":"AA","y":"AA","key_ops":["verify"]}]}"#;
    let known: Vec<&str> = Algorithm::ALL.iter().map(|one| one.as_str()).collect();
    let named = json!({"keys": known.iter().map(|alg| json!({"kty": "RSA", "alg": alg})).collect::<Vec<_>>()});
    texts(&[&key_set(&[signer()]), rsa, ec, &named.to_string()])
}
