//! Join and session tokens.

use std::collections::BTreeMap;
use std::time::{Duration, SystemTime};

use aws_lc_rs::hmac;
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use mesh_identity::{JoinTokens, NodeName, SessionTokens, TokenKey, TokenRejection};

use crate::input::texts;

const KEY: [u8; 32] = [9; 32];
/// 2030.
const NOW: Duration = Duration::from_secs(1_900_000_000);

fn tokens() -> (JoinTokens, SessionTokens, NodeName) {
    let node = "node-a".parse().expect("a node's name");
    let join = JoinTokens::new(TokenKey::new(KEY), BTreeMap::new());
    (join, SessionTokens::new(TokenKey::new(KEY)), node)
}

/// No text that the mesh did not sign is a token.
pub fn token(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let (mut join, session, node) = tokens();
    let now = SystemTime::UNIX_EPOCH + NOW;
    let forged =
        |rejection| matches!(rejection, TokenRejection::Malformed | TokenRejection::BadSignature);
    assert!(join.spend(text, &node, now).is_err_and(forged), "{text}");
    assert!(session.verify(text, now).is_err_and(forged), "{text}");
}

pub(crate) fn token_seeds() -> Vec<Vec<u8>> {
    let mut altered = signed(b"join node-a 1900000100 AAAAAAAAAAAAAAAAAAAAAA").into_bytes();
    if let Some(last) = altered.last_mut() {
        *last = if *last == b'A' { b'E' } else { b'A' };
    }
    let mut seeds = texts(&["culvert1..", "culvert1.am9pbg.AAAA"]);
    seeds.push(altered);
    seeds
}

fn signed(claims: &[u8]) -> String {
    let signed = format!("culvert1.{}", URL_SAFE_NO_PAD.encode(claims));
    let tag = hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, &KEY), signed.as_bytes());
    format!("{signed}.{}", URL_SAFE_NO_PAD.encode(tag))
}

/// Claims under a good signature, as a controller of another version may have written them: each use by its own token,
/// once, for its own node, and not past its time.
pub fn claims(data: &[u8]) {
    let token = signed(data);
    let (mut join, session, node) = tokens();
    let now = SystemTime::UNIX_EPOCH + NOW;
    if join.spend(&token, &node, now).is_ok() {
        assert!(data.starts_with(b"join node-a "));
        assert_eq!(join.spend(&token, &node, now), Err(TokenRejection::Replayed));
        assert_eq!(session.verify(&token, now), Err(TokenRejection::WrongAudience));
        assert!(join.spent().values().all(|expires_at| *expires_at > now));
    }
    if let Ok(shown) = session.verify(&token, now) {
        assert!(data.starts_with(format!("session {shown} ").as_bytes()));
        assert_eq!(join.spend(&token, &node, now), Err(TokenRejection::WrongAudience));
    }
}

pub(crate) fn claims_seeds() -> Vec<Vec<u8>> {
    texts(&[
        "join node-a 1900000100 AAAAAAAAAAAAAAAAAAAAAA",
        "session node-b.example 1900000100 AQIDBAUGBwgJCgsMDQ4PEA",
        "join node-a 18446744073709551615 AAAAAAAAAAAAAAAAAAAAAA",
        "join node-a 1 AAAAAAAAAAAAAAAAAAAAAA",
    ])
}
