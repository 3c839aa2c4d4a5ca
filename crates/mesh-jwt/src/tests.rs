//! Tokens by real keys of every kind, good and bad; where they are found, and what goes on.

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use http::{HeaderMap, HeaderName, HeaderValue};
use serde_json::{Value, json};

use crate::mint::{Signer, key_set, unsigned};
use crate::{
    Algorithm, Changes, HeaderLocation, InvalidKeySet, JwtRule, KeyPlace, KeySet, KeySource,
    OutputClaim, Place, Refresh, Rejection, RequestAuthentication, Rules, Token, Wanted, find,
    verify,
};

const NOW: u64 = 1_900_000_000;

fn now() -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(NOW)
}

fn rule(issuer: &str) -> JwtRule {
    JwtRule {
        issuer: issuer.into(),
        audiences: Vec::new(),
        keys: KeySource::Inline(r#"{"keys":[]}"#.into()),
        from_headers: Vec::new(),
        from_params: Vec::new(),
        from_cookies: Vec::new(),
        forward_original_token: false,
        output_payload_header: None,
        output_claims: Vec::new(),
        space_delimited_claims: Vec::new(),
        timeout_ms: 5_000,
    }
}

fn rules(name: &str, rules: Vec<JwtRule>) -> Rules {
    Rules::new(&RequestAuthentication { namespace: "shop".into(), name: name.into(), rules })
        .unwrap()
}

fn judged(text: &str, rules: &Rules, keys: &str) -> Result<(), Rejection> {
    let keys = KeySet::parse(keys.as_bytes()).unwrap();
    verify(&Token::parse(text)?, &rules.rules[0], &keys, now()).map(drop)
}

#[test]
fn every_algorithm_verifies_by_its_own_key_and_no_other() {
    let signers: Vec<Signer> =
        Algorithm::ALL.into_iter().map(|one| Signer::new(one, one.as_str())).collect();
    let all = key_set(&signers.iter().collect::<Vec<_>>());
    let of = rules("a", vec![rule("i")]);
    let claims = json!({"iss": "i", "sub": "s", "exp": NOW + 10});
    for (signer, algorithm) in signers.iter().zip(Algorithm::ALL) {
        let token = signer.token(&claims);
        assert_eq!(judged(&token, &of, &all), Ok(()), "{algorithm:?}");
        // Another key of the same kind under the same name.
        let other = Signer::new(algorithm, algorithm.as_str());
        assert_eq!(judged(&other.token(&claims), &of, &all), Err(Rejection::Signature));
        // Any other bit.
        for part in 0..3 {
            let mut parts: Vec<String> = token.split('.').map(str::to_owned).collect();
            let mut bytes = URL_SAFE_NO_PAD.decode(&parts[part]).unwrap();
            let middle = bytes.len() / 2;
            bytes[middle] ^= 1;
            parts[part] = URL_SAFE_NO_PAD.encode(&bytes);
            assert!(judged(&parts.join("."), &of, &all).is_err(), "{algorithm:?} part {part}");
        }
        // Named as somebody else's.
        for other in Algorithm::ALL.into_iter().filter(|one| *one != algorithm) {
            let header = json!({"alg": algorithm.as_str(), "kid": other.as_str()});
            let token = signer.signed(&header, &claims, algorithm);
            let found = judged(&token, &of, &all);
            assert!(matches!(found, Err(Rejection::Algorithm | Rejection::Signature)), "{found:?}");
        }
    }
}

#[test]
fn a_token_cannot_choose_an_algorithm_that_its_key_has_not() {
    let signer = Signer::new(Algorithm::Rs256, "k");
    let keys = key_set(&[&signer]);
    let of = rules("a", vec![rule("i")]);
    let claims = json!({"iss": "i", "sub": "s"});
    for name in ["none", "None", "", "HS256", "HS384", "HS512", "ES256", "EdDSA", "rs256"] {
        let header = json!({"alg": name, "kid": "k"});
        let bare = format!("{}.", unsigned(&header, &claims));
        assert_eq!(judged(&bare, &of, &keys), Err(Rejection::Algorithm), "{name:?}");
        // The public key as a shared secret.
        let signed = unsigned(&header, &claims);
        let secret = aws_lc_rs::hmac::Key::new(aws_lc_rs::hmac::HMAC_SHA256, &signer.public());
        let tag = aws_lc_rs::hmac::sign(&secret, signed.as_bytes());
        let confused = format!("{signed}.{}", URL_SAFE_NO_PAD.encode(tag));
        assert_eq!(judged(&confused, &of, &keys), Err(Rejection::Algorithm), "{name:?}");
    }
    // A key that says by what it verifies does by nothing else.
    let mut jwk = signer.jwk();
    jwk["alg"] = "RS256".into();
    let only = json!({"keys": [jwk]}).to_string();
    let header = json!({"alg": "PS256", "kid": "k"});
    let other = signer.signed(&header, &claims, Algorithm::Ps256);
    assert_eq!(judged(&other, &of, &keys), Ok(()));
    assert_eq!(judged(&other, &of, &only), Err(Rejection::Algorithm));
    // Keys in the token are not looked at.
    let own = Signer::new(Algorithm::Rs256, "k");
    let header = json!({"alg": "RS256", "kid": "k", "jwk": own.jwk(), "jku": "http://evil/"});
    let forged = own.signed(&header, &claims, Algorithm::Rs256);
    assert_eq!(judged(&forged, &of, &keys), Err(Rejection::Signature));
}

#[test]
fn keys_are_chosen_by_id() {
    let (a, b) = (Signer::new(Algorithm::Es256, "a"), Signer::new(Algorithm::Es256, "b"));
    let of = rules("a", vec![rule("i")]);
    let claims = json!({"iss": "i", "sub": "s"});
    assert_eq!(judged(&b.token(&claims), &of, &key_set(&[&a])), Err(Rejection::UnknownKey));
    assert_eq!(judged(&b.token(&claims), &of, &key_set(&[&a, &b])), Ok(()));
    assert_eq!(judged(&b.token(&claims), &of, r#"{"keys":[]}"#), Err(Rejection::UnknownKey));
    // A token without id is tried by each, and may be by one that is not here yet.
    let nameless = b.signed(&json!({"alg": "ES256"}), &claims, Algorithm::Es256);
    assert_eq!(judged(&nameless, &of, &key_set(&[&a, &b])), Ok(()));
    assert_eq!(judged(&nameless, &of, &key_set(&[&a])), Err(Rejection::UnknownKey));
    // A key without id is anybody's.
    let mut jwk = b.jwk();
    jwk.as_object_mut().unwrap().remove("kid");
    let set = json!({"keys": [a.jwk(), jwk]}).to_string();
    assert_eq!(judged(&b.token(&claims), &of, &set), Ok(()));
}

#[test]
fn time_issuer_and_audience_are_judged() {
    let signer = Signer::new(Algorithm::EdDsa, "k");
    let keys = key_set(&[&signer]);
    let any = rules("a", vec![rule("i")]);
    let audiences = vec!["shop".into(), "cart".into()];
    let meant = rules("a", vec![JwtRule { audiences, ..rule("i") }]);
    for (claims, of, expected) in [
        (json!({"iss": "i"}), &any, Ok(())),
        (json!({"iss": "i", "exp": NOW - 59}), &any, Ok(())),
        (json!({"iss": "i", "exp": NOW - 60}), &any, Err(Rejection::Expired)),
        (json!({"iss": "i", "exp": f64::MAX}), &any, Ok(())),
        (json!({"iss": "i", "exp": -1}), &any, Err(Rejection::Expired)),
        (json!({"iss": "i", "nbf": NOW + 60}), &any, Ok(())),
        (json!({"iss": "i", "nbf": NOW + 61}), &any, Err(Rejection::NotYetValid)),
        (json!({"iss": "j"}), &any, Err(Rejection::UnknownIssuer)),
        (json!({"iss": ["i"]}), &any, Err(Rejection::UnknownIssuer)),
        (json!({"iss": "i", "aud": "cart"}), &meant, Ok(())),
        (json!({"iss": "i", "aud": ["x", "shop"]}), &meant, Ok(())),
        (json!({"iss": "i", "aud": ["x"]}), &meant, Err(Rejection::Audience)),
        (json!({"iss": "i", "aud": "cart,shop"}), &meant, Err(Rejection::Audience)),
        (json!({"iss": "i"}), &meant, Err(Rejection::Audience)),
        (json!({"iss": "i", "aud": "anything"}), &any, Ok(())),
    ] {
        assert_eq!(judged(&signer.token(&claims), of, &keys), expected, "{claims}");
    }
    for claims in [json!({"iss": "i", "exp": "1"}), json!({"iss": "i", "nbf": null})] {
        let found = judged(&signer.token(&claims), &any, &keys);
        assert!(matches!(found, Err(Rejection::Malformed(_))), "{claims}");
    }
}

#[test]
fn what_is_no_token_is_refused() {
    let part = |text: &str| URL_SAFE_NO_PAD.encode(text);
    let good = part(r#"{"alg":"EdDSA"}"#);
    let claims = part("{}");
    for text in [
        String::new(),
        "..".into(),
        "a.b".into(),
        "a.b.c".into(),
        format!("{good}.{claims}"),
        format!("{good}.{claims}.AA.AA"),
        format!("{good}.{claims}.AA=="),
        format!("{good}.{claims}.A"),
        format!("{good}.{}.AA", part("[]")),
        format!("{}.{claims}.AA", part("{}")),
        format!("{}.{claims}.AA", part(r#"{"alg":"EdDSA","crit":["x"]}"#)),
        format!("{}.{claims}.AA", part(r#"{"alg":"EdDSA","b64":false}"#)),
        format!("{good}.{}.AA", part(&"[".repeat(5_000))),
        format!("{good}.{claims}.{}", "A".repeat(20_000)),
    ] {
        assert!(matches!(Token::parse(&text), Err(Rejection::Malformed(_))), "{text:.60}");
    }
    assert!(Token::parse(&format!("{good}.{claims}.AA")).is_ok());
}

#[test]
fn keys_that_are_weak_or_for_something_else_are_passed_over() {
    let signer = Signer::new(Algorithm::Rs256, "k");
    let with = |name: &str, value: Value| {
        let mut jwk = signer.jwk();
        jwk[name] = value;
        jwk
    };
    for jwk in [
        with("use", "enc".into()),
        with("key_ops", json!(["encrypt"])),
        with("alg", "HS256".into()),
        with("alg", "RSA-OAEP".into()),
        with("n", URL_SAFE_NO_PAD.encode([0xff; 128]).into()),
        with("n", "!".into()),
        with("e", Value::Null),
        with("kty", "oct".into()),
        json!({"kty": "oct", "k": "c2VjcmV0"}),
        json!({"kty": "EC", "crv": "P-256", "x": "AA", "y": "AA"}),
        json!({"kty": "EC", "crv": "P-521", "x": "AA", "y": "AA"}),
        json!({"kty": "OKP", "crv": "Ed25519", "x": "AA"}),
        json!(7),
    ] {
        let set = json!({"keys": [jwk, signer.jwk()]}).to_string();
        let set = KeySet::parse(set.as_bytes()).unwrap();
        assert_eq!((set.len(), set.skipped()), (1, 1), "{jwk}");
    }
    let leading = [&[0][..], &URL_SAFE_NO_PAD.decode(signer.jwk()["n"].as_str().unwrap()).unwrap()];
    let set = json!({"keys": [with("n", URL_SAFE_NO_PAD.encode(leading.concat()).into())]});
    assert_eq!(KeySet::parse(set.to_string().as_bytes()).unwrap().len(), 1);
    for text in ["", "{}", "[]", r#"{"keys":{}}"#, "<html>"] {
        let found = KeySet::parse(text.as_bytes()).map(drop);
        assert!(matches!(found, Err(InvalidKeySet::Malformed { .. })), "{text}");
    }
    let long = vec![b' '; crate::MAX_KEY_SET_BYTES + 1];
    assert_eq!(KeySet::parse(&long).map(drop), Err(InvalidKeySet::TooLong));
}

fn headers(of: &[(&str, &str)]) -> HeaderMap {
    let pair = |(name, value): &(&str, &str)| {
        (name.parse::<HeaderName>().unwrap(), HeaderValue::from_str(value).unwrap())
    };
    let mut map = HeaderMap::new();
    for (name, value) in of.iter().map(pair) {
        map.append(name, value);
    }
    map
}

/// The claims' `sub` of every token that is found, and the places.
fn subjects(
    all: &[&Rules],
    of: &[(&str, &str)],
    query: Option<&str>,
) -> Result<Vec<(String, usize)>, Rejection> {
    let found = find(all, &headers(of), query)?;
    let of = |one: crate::Found<'_>| {
        let subject = one.token.claims["sub"].as_str().unwrap().to_owned();
        (subject, one.places.len())
    };
    Ok(found.into_iter().map(of).collect())
}

#[test]
fn tokens_are_found_where_rules_say_and_nowhere_else() {
    let signer = Signer::ed25519(&[7; 32], "k");
    let token = |issuer: &str, subject: &str| signer.token(&json!({"iss": issuer, "sub": subject}));
    let (a, b, foreign) = (token("i", "a"), token("j", "b"), token("x", "x"));
    let default = rules("default", vec![rule("i")]);
    let custom = rules(
        "custom",
        vec![JwtRule {
            from_headers: vec![
                HeaderLocation { name: "x-token".into(), prefix: "".into() },
                HeaderLocation { name: "x-other".into(), prefix: "jwt ".into() },
            ],
            from_params: vec!["t".into()],
            from_cookies: vec!["session".into()],
            ..rule("j")
        }],
    );
    let bearer = format!("Bearer {a}");
    let one = |subject: &str| Ok(vec![(subject.to_owned(), 1)]);
    let none = Ok(Vec::new());
    let all = [&default, &custom];
    assert_eq!(subjects(&all, &[], None), none);
    assert_eq!(subjects(&all, &[("authorization", &bearer)], None), one("a"));
    assert_eq!(subjects(&all, &[("authorization", &format!("bEARER  {a}"))], None), one("a"));
    assert_eq!(subjects(&all, &[("authorization", "Basic dTpw")], None), none);
    assert_eq!(subjects(&all, &[("authorization", "Bearer")], None), none);
    assert_eq!(subjects(&all, &[], Some(&format!("x=1&access_token={a}"))), one("a"));
    assert_eq!(subjects(&all, &[], Some(&format!("acces%73_token={a}"))), one("a"));
    assert_eq!(subjects(&all, &[("x-token", &b)], None), one("b"));
    assert_eq!(subjects(&all, &[("x-other", &format!("jwt {b}"))], None), one("b"));
    assert_eq!(subjects(&all, &[("x-other", &b)], None), none);
    assert_eq!(subjects(&all, &[("cookie", &format!("a=1; session={b}"))], None), one("b"));
    assert_eq!(subjects(&all, &[("cookie", &format!("session=\"{b}\""))], Some("t=")), one("b"));
    let both = Ok(vec![("a".to_owned(), 1), ("b".to_owned(), 2)]);
    let two = [("authorization", &*bearer), ("x-token", &b)];
    assert_eq!(subjects(&all, &two, Some(&format!("t={b}"))), both);
    // Somebody else's token, in a place of somebody's.
    assert_eq!(subjects(&all, &[("x-token", &a)], None), Err(Rejection::UnknownIssuer));
    let unknown = format!("Bearer {foreign}");
    assert_eq!(subjects(&all, &[("authorization", &unknown)], None), Err(Rejection::UnknownIssuer));
    // One that is good does not excuse another.
    let second = [("authorization", &*bearer), ("authorization", "Bearer x")];
    assert!(matches!(subjects(&all, &second, None), Err(Rejection::Malformed(_))));
    let many: Vec<String> = (0..9).map(|n| format!("t={}", token("j", &n.to_string()))).collect();
    assert_eq!(subjects(&all, &[], Some(&many.join("&"))), Err(Rejection::TooMany));
}

#[test]
fn the_server_sees_what_rules_say_and_nothing_that_a_client_says_in_their_place() {
    let signer = Signer::ed25519(&[7; 32], "k");
    let keys = KeySet::parse(key_set(&[&signer]).as_bytes()).unwrap();
    let claims =
        json!({"iss": "i", "sub": "s", "n": 5, "org": {"ok": true}, "list": ["a"], "line": "a\nb"});
    let token = signer.token(&claims);
    let output = |header: &str, path: &[&str]| OutputClaim {
        header: header.into(),
        claim: path.iter().copied().map(Arc::from).collect(),
    };
    let all = rules(
        "a",
        vec![JwtRule {
            output_payload_header: Some("x-payload".into()),
            output_claims: vec![
                output("x-sub", &["sub"]),
                output("x-n", &["n"]),
                output("x-ok", &["org", "ok"]),
                output("x-list", &["list"]),
                output("x-line", &["line"]),
                output("x-none", &["none"]),
            ],
            ..rule("i")
        }],
    );
    let forged = [
        ("x-sub", "root"),
        ("x_sub", "root"),
        ("x-none", "root"),
        ("X-Payload", "root"),
        ("x-line", "root"),
        ("x-mine", "1"),
    ];
    let mut map = headers(&forged);
    assert_eq!(Changes::new(&[&all]).apply(&mut map, "/a?b=1"), None);
    assert_eq!(map, headers(&[("x-mine", "1")]));

    let mut map = headers(&forged);
    map.append("authorization", format!("Bearer {token}").parse().unwrap());
    map.append("authorization", "Basic dTpw".parse().unwrap());
    let target = format!("/a?access_token={token}&b=1");
    let found = find(&[&all], &map, Some(&target[3..])).unwrap();
    assert_eq!(found.len(), 1);
    assert!(found[0].places.contains(&Place::Param("access_token".into())));
    let verified = verify(&found[0].token, &all.rules[0], &keys, now()).unwrap();
    assert_eq!(verified.claims.principal(), Some("i/s"));
    let mut changes = Changes::new(&[&all]);
    changes.add(&found[0], &all.rules[0], &verified);
    assert_eq!(changes.apply(&mut map, &target).as_deref(), Some("/a?b=1"));
    let payload = token.split('.').nth(1).unwrap();
    let expected = [
        ("x-mine", "1"),
        ("authorization", "Basic dTpw"),
        ("x-payload", payload),
        ("x-sub", "s"),
        ("x-n", "5"),
        ("x-ok", "true"),
        ("x-list", "WyJhIl0="),
    ];
    assert_eq!(map, headers(&expected));

    let forward = rules("a", vec![JwtRule { forward_original_token: true, ..rule("i") }]);
    let mut map = headers(&[("authorization", &format!("Bearer {token}"))]);
    let before = map.clone();
    let found = find(&[&forward], &map, None).unwrap();
    let verified = verify(&found[0].token, &forward.rules[0], &keys, now()).unwrap();
    let mut changes = Changes::new(&[&forward]);
    changes.add(&found[0], &forward.rules[0], &verified);
    assert_eq!(changes.apply(&mut map, "/"), None);
    assert_eq!(map, before);

    let cookie = rules("a", vec![JwtRule { from_cookies: vec!["s".into()], ..rule("i") }]);
    let mut map = headers(&[("cookie", &format!("a=1; s={token}; b=2"))]);
    let found = find(&[&cookie], &map, None).unwrap();
    let verified = verify(&found[0].token, &cookie.rules[0], &keys, now()).unwrap();
    let mut changes = Changes::new(&[&cookie]);
    changes.add(&found[0], &cookie.rules[0], &verified);
    changes.apply(&mut map, "/");
    assert_eq!(map, headers(&[("cookie", "a=1; b=2")]));
}

#[test]
fn keys_are_read_on_time_and_not_more_often_than_tokens_may_ask() {
    #[expect(clippy::disallowed_methods, reason = "any moment will do")]
    let start = Instant::now();
    let at = |seconds: u64| start + Duration::from_secs(seconds);
    let mut refresh = Refresh::new(start);
    assert!(refresh.begin(start) && !refresh.begin(start));
    assert_eq!((refresh.want(start), refresh.poll_timeout()), (Wanted::Underway, None));
    // Failures are tried again, ever more slowly, and never more slowly than once in 66 s.
    let mut due = start;
    for failure in 0..12_u32 {
        refresh.finished(false, due, u32::MAX);
        let next = refresh.poll_timeout().unwrap();
        let wait = (next - due).as_secs_f64();
        let expected = (2_f64.powi(failure.try_into().unwrap())).min(60.0) * 1.1;
        assert!((wait - expected).abs() < 0.01, "{failure}: {wait}");
        assert!(!refresh.begin(next - Duration::from_millis(1)) && refresh.begin(next));
        due = next;
    }
    refresh.finished(true, due, 0);
    assert_eq!(refresh.poll_timeout(), Some(due + Duration::from_secs(270)));
    // Tokens with unknown keys: not again within five seconds.
    assert_eq!(refresh.want(due + Duration::from_millis(4_999)), Wanted::TooSoon);
    let asked = due + Duration::from_secs(5);
    assert_eq!(refresh.want(asked), Wanted::Now);
    assert!(refresh.begin(asked));
    refresh.finished(true, asked, 0);
    assert_eq!(refresh.want(asked + Duration::from_secs(1)), Wanted::TooSoon);
    assert!(!refresh.begin(at(1)));
}

#[test]
fn where_keys_are_is_known() {
    let timeout = Duration::from_secs(5);
    let of =
        |keys, issuer: &str| rules("a", vec![JwtRule { keys, ..rule(issuer) }]).rules[0].place();
    assert_eq!(of(KeySource::Inline(r#"{"keys":[]}"#.into()), "i"), None);
    let uri: Arc<str> = "https://i/keys".into();
    let found = of(KeySource::Uri(Arc::clone(&uri)), "i");
    assert_eq!(found, Some(KeyPlace::Keys { uri, timeout }));
    let found = of(KeySource::Discovery, "https://i/realm/").unwrap();
    assert_eq!(found.uri(), "https://i/realm/.well-known/openid-configuration");
}
