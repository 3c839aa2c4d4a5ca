//! Tokens by which a node joins the mesh and stays in it.
//!
//! `culvert1.<claims>.<tag>`: claims are audience, node, expiry and id; the tag is HMAC-SHA256 over everything before
//! it. Both parts are base64url. A join token is good for one use, a session token until it expires.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use aws_lc_rs::{hmac, rand};
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

/// A node's name: a DNS subdomain of at most 253 bytes. Source: Kubernetes object names.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct NodeName(Arc<str>);

/// Text that names no node.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "not the name of a node (lower case letters, digits, `-` and `.`) or waypoint/NAMESPACE/NAME: {text:?}"
)]
pub struct InvalidNodeName {
    /// What was given.
    pub text: String,
}

/// Names one token.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct TokenId([u8; ID_BYTES]);

/// The secret that signs tokens, shared by all replicas of a controller; wiped when dropped.
#[derive(Clone)]
pub struct TokenKey(Zeroizing<[u8; KEY_BYTES]>);

/// Why a token was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TokenRejection {
    /// Not of the form of a token.
    #[error("token is malformed")]
    Malformed,
    /// Not signed by this mesh, or altered.
    #[error("token has a bad signature")]
    BadSignature,
    /// A token for something else: a session token to join with, or the other way round.
    #[error("token is for another use")]
    WrongAudience,
    /// Past its time.
    #[error("token has expired")]
    Expired,
    /// Issued for another node than the one that shows it.
    #[error("token is for another node")]
    WrongNode,
    /// Used before.
    #[error("token was used already")]
    Replayed,
}

/// A token that could not be made: the random generator failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("no random bytes for a token")]
pub struct TokenError;

/// Issues join tokens and spends each at most once.
///
/// What was spent is remembered until the token would have expired, so the list stays as small as the number of
/// tokens issued within one lifetime.
#[derive(Debug)]
pub struct JoinTokens {
    key: TokenKey,
    spent: BTreeMap<TokenId, SystemTime>,
}

/// Issues and verifies the tokens that nodes authenticate with after joining.
#[derive(Debug)]
pub struct SessionTokens {
    key: TokenKey,
}

const PREFIX: &str = "culvert1";
const ID_BYTES: usize = 16;
const KEY_BYTES: usize = 32;
/// Longest token looked at, bytes: a node name of full length and all else fit twice.
const MAX_TOKEN_BYTES: usize = 1024;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Audience {
    Join,
    Session,
}

impl Audience {
    const fn as_str(self) -> &'static str {
        match self {
            Self::Join => "join",
            Self::Session => "session",
        }
    }
}

struct Claims {
    node: NodeName,
    expires_at: SystemTime,
    id: TokenId,
}

impl JoinTokens {
    /// Tokens under `key`; `spent` is what [`spent`](Self::spent) last was.
    #[must_use]
    pub const fn new(key: TokenKey, spent: BTreeMap<TokenId, SystemTime>) -> Self {
        Self { key, spent }
    }

    /// A token by which `node` may join once within `ttl`.
    ///
    /// # Errors
    /// When the random generator fails.
    pub fn issue(
        &self,
        node: &NodeName,
        ttl: Duration,
        now: SystemTime,
    ) -> Result<Zeroizing<String>, TokenError> {
        self.key.issue(Audience::Join, node, ttl, now).map(|(token, _)| token)
    }

    /// Spends `token` for `node`. Persist [`spent`](Self::spent) before acting on the answer.
    ///
    /// # Errors
    /// Why the token is refused; a refused one is not spent.
    pub fn spend(
        &mut self,
        token: &str,
        node: &NodeName,
        now: SystemTime,
    ) -> Result<(), TokenRejection> {
        let claims = self.key.verify(Audience::Join, token, now)?;
        if claims.node != *node {
            return Err(TokenRejection::WrongNode);
        }
        self.spent.retain(|_, expires_at| *expires_at > now);
        if self.spent.contains_key(&claims.id) {
            return Err(TokenRejection::Replayed);
        }
        self.spent.insert(claims.id, claims.expires_at);
        Ok(())
    }

    /// Tokens spent and when each would have expired; state to keep across restarts.
    #[must_use]
    pub const fn spent(&self) -> &BTreeMap<TokenId, SystemTime> {
        &self.spent
    }
}

impl SessionTokens {
    /// Tokens under `key`.
    #[must_use]
    pub const fn new(key: TokenKey) -> Self {
        Self { key }
    }

    /// A token that proves to be `node` for `ttl`, and when it expires.
    ///
    /// # Errors
    /// When the random generator fails.
    pub fn issue(
        &self,
        node: &NodeName,
        ttl: Duration,
        now: SystemTime,
    ) -> Result<(Zeroizing<String>, SystemTime), TokenError> {
        self.key.issue(Audience::Session, node, ttl, now)
    }

    /// The node that shows `token`.
    ///
    /// # Errors
    /// Why the token is refused.
    pub fn verify(&self, token: &str, now: SystemTime) -> Result<NodeName, TokenRejection> {
        self.key.verify(Audience::Session, token, now).map(|claims| claims.node)
    }
}

impl TokenKey {
    /// A key from its bytes.
    #[must_use]
    pub fn new(bytes: [u8; KEY_BYTES]) -> Self {
        Self(Zeroizing::new(bytes))
    }

    /// A new random key.
    ///
    /// # Errors
    /// When the random generator fails.
    pub fn generate() -> Result<Self, TokenError> {
        let mut bytes = Zeroizing::new([0; KEY_BYTES]);
        rand::fill(bytes.as_mut()).map_err(|_unspecified| TokenError)?;
        Ok(Self(bytes))
    }

    /// The bytes, to be kept as secretly as the CA's key.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8; KEY_BYTES] {
        &self.0
    }

    fn mac(&self) -> hmac::Key {
        hmac::Key::new(hmac::HMAC_SHA256, self.0.as_ref())
    }

    fn issue(
        &self,
        audience: Audience,
        node: &NodeName,
        ttl: Duration,
        now: SystemTime,
    ) -> Result<(Zeroizing<String>, SystemTime), TokenError> {
        let mut id = [0; ID_BYTES];
        rand::fill(&mut id).map_err(|_unspecified| TokenError)?;
        let seconds = unix_seconds(now).saturating_add(ttl.as_secs());
        let claims =
            format!("{} {node} {seconds} {}", audience.as_str(), URL_SAFE_NO_PAD.encode(id));
        let signed = format!("{PREFIX}.{}", URL_SAFE_NO_PAD.encode(claims));
        let tag = hmac::sign(&self.mac(), signed.as_bytes());
        let token = Zeroizing::new(format!("{signed}.{}", URL_SAFE_NO_PAD.encode(tag)));
        Ok((token, SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)))
    }

    fn verify(
        &self,
        audience: Audience,
        token: &str,
        now: SystemTime,
    ) -> Result<Claims, TokenRejection> {
        let malformed = TokenRejection::Malformed;
        if token.len() > MAX_TOKEN_BYTES {
            return Err(malformed);
        }
        let (signed, tag) = token.rsplit_once('.').ok_or(malformed)?;
        let encoded =
            signed.strip_prefix(PREFIX).and_then(|rest| rest.strip_prefix('.')).ok_or(malformed)?;
        let tag = URL_SAFE_NO_PAD.decode(tag).map_err(|_invalid| malformed)?;
        let claims = URL_SAFE_NO_PAD.decode(encoded).map_err(|_invalid| malformed)?;
        hmac::verify(&self.mac(), signed.as_bytes(), &tag)
            .map_err(|_unspecified| TokenRejection::BadSignature)?;
        let claims = String::from_utf8(claims).map_err(|_invalid| malformed)?;
        let mut parts = claims.split(' ');
        let (Some(spoken), Some(node), Some(seconds), Some(id), None) =
            (parts.next(), parts.next(), parts.next(), parts.next(), parts.next())
        else {
            return Err(malformed);
        };
        if spoken != audience.as_str() {
            return Err(TokenRejection::WrongAudience);
        }
        let seconds: u64 = seconds.parse().map_err(|_invalid| malformed)?;
        if seconds <= unix_seconds(now) {
            return Err(TokenRejection::Expired);
        }
        let id = URL_SAFE_NO_PAD.decode(id).map_err(|_invalid| malformed)?;
        Ok(Claims {
            node: node.parse().map_err(|_invalid| malformed)?,
            expires_at: SystemTime::UNIX_EPOCH
                .checked_add(Duration::from_secs(seconds))
                .ok_or(malformed)?,
            id: TokenId(id.try_into().map_err(|_length| malformed)?),
        })
    }
}

impl fmt::Debug for TokenKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("TokenKey(..)")
    }
}

fn unix_seconds(time: SystemTime) -> u64 {
    time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs()
}

impl NodeName {
    /// The text of it.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl std::str::FromStr for NodeName {
    type Err = InvalidNodeName;

    fn from_str(text: &str) -> Result<Self, InvalidNodeName> {
        let label_ok = |label: &str| {
            !label.is_empty()
                && !label.starts_with('-')
                && !label.ends_with('-')
                && label.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
        };
        let name_ok = |name: &str| name.split('.').all(label_ok);
        // `waypoint/NAMESPACE/NAME`: what stands where a node stands; no node's name has a slash.
        let parts_ok = match text.strip_prefix("waypoint/") {
            Some(rest) => rest
                .split_once('/')
                .is_some_and(|(namespace, name)| label_ok(namespace) && name_ok(name)),
            None => name_ok(text),
        };
        if text.len() <= 253 && parts_ok {
            Ok(Self(text.into()))
        } else {
            Err(InvalidNodeName { text: text.chars().take(256).collect() })
        }
    }
}

impl fmt::Display for NodeName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl From<NodeName> for String {
    fn from(name: NodeName) -> Self {
        name.0.as_ref().to_owned()
    }
}

impl TryFrom<String> for NodeName {
    type Error = InvalidNodeName;

    fn try_from(text: String) -> Result<Self, InvalidNodeName> {
        text.parse()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOUR: Duration = Duration::from_secs(3600);

    fn now() -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000)
    }

    fn node(name: &str) -> NodeName {
        name.parse().unwrap()
    }

    fn key() -> TokenKey {
        TokenKey::new([7; KEY_BYTES])
    }

    #[test]
    fn a_join_token_is_good_for_one_use() {
        let mut tokens = JoinTokens::new(key(), BTreeMap::new());
        let token = tokens.issue(&node("node-a"), HOUR, now()).unwrap();
        assert_eq!(tokens.spend(&token, &node("node-a"), now()), Ok(()));
        assert_eq!(tokens.spend(&token, &node("node-a"), now()), Err(TokenRejection::Replayed));
        // Neither does a restart make it good again.
        let mut restarted = JoinTokens::new(key(), tokens.spent().clone());
        assert_eq!(restarted.spend(&token, &node("node-a"), now()), Err(TokenRejection::Replayed));
        // What has expired is forgotten, and refused for that.
        let later = now() + 2 * HOUR;
        assert_eq!(tokens.spend(&token, &node("node-a"), later), Err(TokenRejection::Expired));
        let other = tokens.issue(&node("node-a"), HOUR, later).unwrap();
        tokens.spend(&other, &node("node-a"), later).unwrap();
        assert_eq!(tokens.spent().len(), 1);
    }

    #[test]
    fn every_bad_token_has_its_own_reason() {
        let mut joins = JoinTokens::new(key(), BTreeMap::new());
        let sessions = SessionTokens::new(key());
        let a = node("node-a");
        let join = joins.issue(&a, HOUR, now()).unwrap();
        let (session, _) = sessions.issue(&a, HOUR, now()).unwrap();
        let foreign = JoinTokens::new(TokenKey::generate().unwrap(), BTreeMap::new())
            .issue(&a, HOUR, now())
            .unwrap();
        let tampered = join.replacen("culvert1.", "culvert1.A", 1);
        let at = now() + HOUR;
        for (token, by, when, reason) in [
            ("", &a, now(), TokenRejection::Malformed),
            ("culvert1..", &a, now(), TokenRejection::BadSignature),
            ("culvert2.YQ.YQ", &a, now(), TokenRejection::Malformed),
            ("culvert1.?.?", &a, now(), TokenRejection::Malformed),
            (&"x".repeat(5000), &a, now(), TokenRejection::Malformed),
            (&tampered, &a, now(), TokenRejection::Malformed),
            (&foreign, &a, now(), TokenRejection::BadSignature),
            (&session, &a, now(), TokenRejection::WrongAudience),
            (&join, &node("node-b"), now(), TokenRejection::WrongNode),
            (&join, &a, at, TokenRejection::Expired),
        ] {
            assert_eq!(joins.spend(token, by, when), Err(reason), "{token}");
        }
        assert!(joins.spent().is_empty());
        assert_eq!(sessions.verify(&join, now()), Err(TokenRejection::WrongAudience));
        assert_eq!(sessions.verify(&session, at), Err(TokenRejection::Expired));
        assert_eq!(sessions.verify(&session, now()), Ok(a));
    }

    #[test]
    fn node_names_are_dns_subdomains() {
        for good in ["a", "node-1", "ip-10-0-0-1.ec2.internal"] {
            assert!(good.parse::<NodeName>().is_ok(), "{good}");
        }
        for bad in ["", "Node", "a b", "-a", "a-", "a..b", "a/b", &"a".repeat(254)] {
            assert!(bad.parse::<NodeName>().is_err(), "{bad}");
        }
    }
}
