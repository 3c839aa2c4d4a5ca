//! Join and session tokens with their files: `token.key` and `tokens-spent.json` in the state directory.

use std::collections::BTreeMap;
use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use mesh_identity::{
    InvalidNodeName, JoinTokens, NodeName, SessionTokens, TokenError, TokenId, TokenKey,
    TokenRejection,
};
use zeroize::Zeroizing;

use super::authenticate::{Authenticate, NodeCaller, Unauthenticated};
use crate::state_dir::StateDir;

const KEY_FILE: &str = "token.key";
const SPENT_FILE: &str = "tokens-spent.json";
/// Lifetime of a session. An agent renews at half of it, so the controller may be away for half a week.
const SESSION_TTL: Duration = Duration::from_secs(7 * 24 * 3600);
/// Streams are let go after this long, so that their callers prove themselves again.
const PROOF_LASTS: Duration = Duration::from_secs(30 * 60);

/// Tokens that cannot be judged or made.
#[derive(Debug, thiserror::Error)]
pub enum TokensError {
    /// The state directory cannot be used.
    #[error("the state directory cannot be used")]
    Files(#[from] io::Error),
    /// A file is not what this program wrote.
    #[error("{} cannot be read; {}", path.display(), remedy_of(path))]
    Format {
        /// The file.
        path: PathBuf,
    },
    /// No random bytes.
    #[error(transparent)]
    Token(#[from] TokenError),
    /// The name is no node's.
    #[error(transparent)]
    Node(#[from] InvalidNodeName),
    /// The token is refused.
    #[error(transparent)]
    Rejected(#[from] TokenRejection),
}

impl TokensError {
    /// One word for metrics.
    #[must_use]
    pub const fn word(&self) -> &'static str {
        match self {
            Self::Files(_) | Self::Format { .. } | Self::Token(_) => "unavailable",
            Self::Node(_) => "invalid_node",
            Self::Rejected(rejection) => word(*rejection),
        }
    }

    /// What `node`, which wants to join, is told: what is wrong, and what helps.
    #[must_use]
    pub fn with_remedy(&self, node: &str) -> String {
        let Self::Rejected(rejection) = self else { return self.to_string() };
        let create = match node.strip_prefix("waypoint/") {
            Some(gateway) => format!("culvert-controller token create --waypoint {gateway}"),
            None => format!("culvert-controller token create --node {node}"),
        };
        let remedy = match rejection {
            TokenRejection::Malformed => "the token's file must hold what is printed by",
            TokenRejection::Replayed => "a token is good for one join; make another by",
            TokenRejection::BadSignature
            | TokenRejection::WrongAudience
            | TokenRejection::Expired
            | TokenRejection::WrongNode => "make another by",
        };
        format!("{rejection}; {remedy} {create}")
    }
}

/// What helps against a damaged file. Without the list of what is spent, tokens would be good twice: those that are out have
/// to end with it.
fn remedy_of(path: &Path) -> String {
    if path.ends_with(SPENT_FILE) {
        format!(
            "restore it from a backup, or remove it together with {KEY_FILE}: join tokens and sessions that are out end \
             then, and machines outside a cluster join again with new tokens"
        )
    } else {
        "restore it from a backup, or remove it: join tokens and sessions that are out end then, and machines outside a \
         cluster join again with new tokens"
            .to_owned()
    }
}

const fn word(rejection: TokenRejection) -> &'static str {
    match rejection {
        TokenRejection::Malformed => "malformed",
        TokenRejection::BadSignature => "bad_signature",
        TokenRejection::WrongAudience => "wrong_audience",
        TokenRejection::Expired => "expired",
        TokenRejection::WrongNode => "wrong_node",
        TokenRejection::Replayed => "replayed",
    }
}

/// A token for a node.
#[derive(Debug)]
pub struct Issued {
    /// The token.
    pub token: String,
    /// Until when it is good.
    pub expires_at: SystemTime,
    /// The node.
    pub node: Arc<str>,
}

/// The tokens of a mesh.
#[derive(Debug)]
pub struct Tokens {
    files: StateDir,
    key: TokenKey,
    sessions: SessionTokens,
}

impl Tokens {
    /// Opens the tokens, making their key when there is none.
    ///
    /// # Errors
    /// When a file cannot be used.
    pub fn open(files: StateDir) -> Result<Self, TokensError> {
        let _lock = files.lock()?;
        let key = match read(&files, KEY_FILE)?.map(Zeroizing::new) {
            Some(text) => parse_key(&text)
                .ok_or_else(|| TokensError::Format { path: files.path(KEY_FILE) })?,
            None => {
                let key = TokenKey::generate()?;
                let text: String =
                    key.as_bytes().iter().map(|byte| format!("{byte:02x}")).collect();
                files.write(KEY_FILE, &Zeroizing::new(text))?;
                key
            }
        };
        // Looked at now, and not when the first node wants to join.
        read_spent(&files)?;
        let sessions = SessionTokens::new(key.clone());
        Ok(Self { files, key, sessions })
    }

    /// A token by which `node` may join once within `ttl`.
    ///
    /// # Errors
    /// When the name is no node's or there are no random bytes.
    pub fn create(
        &self,
        node: &str,
        ttl: Duration,
        now: SystemTime,
    ) -> Result<Zeroizing<String>, TokensError> {
        let node: NodeName = node.parse()?;
        Ok(JoinTokens::new(self.key.clone(), BTreeMap::new()).issue(&node, ttl, now)?)
    }

    /// Spends a join token for a session. It is written down as spent before the session is given.
    ///
    /// # Errors
    /// Why the token is refused.
    pub fn join(&self, token: &str, node: &str, now: SystemTime) -> Result<Issued, TokensError> {
        let name: NodeName = node.parse()?;
        {
            let _lock = self.files.lock()?;
            let spent = read_spent(&self.files)?;
            let mut tokens = JoinTokens::new(self.key.clone(), spent.into_iter().collect());
            tokens.spend(token, &name, now)?;
            let spent: Vec<_> = tokens.spent().iter().collect();
            self.files
                .write(SPENT_FILE, &serde_json::to_string(&spent).map_err(io::Error::from)?)?;
        }
        self.renew(node, now)
    }

    /// A session for a node that has proved itself.
    ///
    /// # Errors
    /// When there are no random bytes.
    pub fn renew(&self, node: &str, now: SystemTime) -> Result<Issued, TokensError> {
        let name: NodeName = node.parse()?;
        let (token, expires_at) = self.sessions.issue(&name, SESSION_TTL, now)?;
        Ok(Issued { token: token.to_string(), expires_at, node: node.into() })
    }
}

#[tonic::async_trait]
impl Authenticate for Tokens {
    async fn authenticate(
        &self,
        bearer: &str,
        _source: Option<IpAddr>,
        now: SystemTime,
    ) -> Result<NodeCaller, Unauthenticated> {
        self.node_of(bearer, now)
    }
}

impl Tokens {
    fn node_of(&self, bearer: &str, now: SystemTime) -> Result<NodeCaller, Unauthenticated> {
        self.sessions
            .verify(bearer, now)
            .map(|node| NodeCaller { node: node.as_str().into(), valid_for: PROOF_LASTS })
            .map_err(|rejection| Unauthenticated::Refused {
                word: word(rejection),
                detail: rejection.to_string(),
            })
    }
}

/// Reads a file; one that is no text is damaged, like one with other text than ours.
fn read(files: &StateDir, name: &str) -> Result<Option<String>, TokensError> {
    files.read(name).map_err(|error| {
        if error.kind() == io::ErrorKind::InvalidData {
            TokensError::Format { path: files.path(name) }
        } else {
            error.into()
        }
    })
}

fn read_spent(files: &StateDir) -> Result<Vec<(TokenId, SystemTime)>, TokensError> {
    match read(files, SPENT_FILE)? {
        Some(text) => serde_json::from_str(&text)
            .map_err(|_source| TokensError::Format { path: files.path(SPENT_FILE) }),
        None => Ok(Vec::new()),
    }
}

fn parse_key(text: &str) -> Option<TokenKey> {
    let text = text.trim();
    let mut bytes = [0; 32];
    if text.len() != 64 || !text.is_ascii() {
        return None;
    }
    for (at, byte) in bytes.iter_mut().enumerate() {
        *byte = u8::from_str_radix(&text[2 * at..2 * at + 2], 16).ok()?;
    }
    Some(TokenKey::new(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_spent_token_stays_spent_across_restarts() {
        let directory = tempfile::tempdir().unwrap();
        let files = StateDir::open(&directory.path().join("state")).unwrap();
        let now = SystemTime::now();
        let tokens = Tokens::open(files.clone()).unwrap();
        let join = tokens.create("n1", Duration::from_secs(60), now).unwrap();
        assert_eq!(tokens.join(&join, "n2", now).unwrap_err().word(), "wrong_node");
        let session = tokens.join(&join, "n1", now).unwrap();
        let restarted = Tokens::open(files).unwrap();
        assert_eq!(restarted.join(&join, "n1", now).unwrap_err().word(), "replayed");
        assert_eq!(&*restarted.node_of(&session.token, now).unwrap().node, "n1");
        assert!(restarted.node_of(&join, now).is_err(), "a join token is no session");
        let late = now + SESSION_TTL + Duration::from_secs(1);
        assert_eq!(restarted.node_of(&session.token, late).unwrap_err().word(), "expired");
    }

    /// A token that was spent must not be good again because nobody can read so: not from the start on.
    #[test]
    fn damaged_files_are_named_at_the_start() {
        let directory = tempfile::tempdir().unwrap();
        let files = StateDir::open(&directory.path().join("state")).unwrap();
        let now = SystemTime::now();
        let tokens = Tokens::open(files.clone()).unwrap();
        let join = tokens.create("n1", Duration::from_secs(60), now).unwrap();
        tokens.join(&join, "n1", now).unwrap();
        let good = files.read(SPENT_FILE).unwrap().unwrap();
        for damaged in [&b"["[..], b"", b"{}", b"\xff\xfe", &good.as_bytes()[..good.len() - 1]] {
            std::fs::write(files.path(SPENT_FILE), damaged).unwrap();
            let told = Tokens::open(files.clone()).unwrap_err().to_string();
            let path = files.path(SPENT_FILE).display().to_string();
            assert!(told.contains(&path) && told.contains("restore it"), "{told}");
            assert!(told.contains("remove it together with token.key"), "{told}");
            assert!(tokens.join(&join, "n1", now).is_err(), "it runs already");
        }
        // As the remedy says: what was out is good no more.
        std::fs::remove_file(files.path(SPENT_FILE)).unwrap();
        std::fs::write(files.path(KEY_FILE), b"\xff").unwrap();
        assert!(Tokens::open(files.clone()).unwrap_err().to_string().contains(KEY_FILE));
        std::fs::remove_file(files.path(KEY_FILE)).unwrap();
        let anew = Tokens::open(files).unwrap();
        assert_eq!(anew.join(&join, "n1", now).unwrap_err().word(), "bad_signature");
    }

    #[test]
    fn whoever_cannot_join_is_told_what_helps() {
        let told = |error: TokensError, node: &str| error.with_remedy(node);
        assert_eq!(
            told(TokenRejection::Replayed.into(), "n1"),
            "token was used already; a token is good for one join; make another by \
             culvert-controller token create --node n1"
        );
        assert_eq!(
            told(TokenRejection::Malformed.into(), "waypoint/shop/w"),
            "token is malformed; the token's file must hold what is printed by \
             culvert-controller token create --waypoint shop/w"
        );
        let broken = TokensError::Format { path: SPENT_FILE.into() };
        assert_eq!(broken.with_remedy("n1"), broken.to_string());
    }
}
