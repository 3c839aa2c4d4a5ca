//! Agents that prove themselves by a bound service-account token.
//!
//! The API server judges the token; what is decided here is whose it must be: of the agents' service account, made for
//! this audience, and bound to a pod on the node it speaks for. Source: Kubernetes `TokenReview`, and the claims that
//! bound tokens carry (KEP-4193, on by default since 1.30); older API servers name the pod only, which is then looked up.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use k8s_openapi::api::authentication::v1::{TokenReview, TokenReviewSpec, TokenReviewStatus};
use k8s_openapi::api::core::v1::Pod;
use kube::api::PostParams;
use kube::core::ObjectMeta;
use kube::{Api, Client};
use tokio::sync::Semaphore;
use tracing::warn;

use super::{ObjectName, refusal};
use crate::ca::authenticate::{Authenticate, NodeCaller, Unauthenticated};

/// Streams are let go after this long, so that their callers prove themselves again.
const PROOF_LASTS: Duration = Duration::from_secs(10 * 60);
/// A token that was found good is not asked about again for this long: a node's pods want their certificates at once.
const REMEMBERED_FOR: Duration = Duration::from_secs(60);
/// Tokens remembered at most; beyond it all are forgotten and asked about again.
const MAX_REMEMBERED: usize = 4_096;
/// Questions to the API server at once; further ones wait.
const MAX_QUESTIONS: usize = 16;
/// Longest token that is passed on, bytes. Real ones have about 1,200.
const MAX_TOKEN_BYTES: usize = 16 * 1024;
/// How the controller's own tokens begin; those are judged by whoever made them.
const OWN_TOKENS: &str = "culvert1.";

const NODE_NAME: &str = "authentication.kubernetes.io/node-name";
const POD_NAME: &str = "authentication.kubernetes.io/pod-name";
const POD_UID: &str = "authentication.kubernetes.io/pod-uid";

/// Judges service-account tokens by the API server's word, and the controller's own ones by another judge.
pub struct TokenReviews {
    reviews: Api<TokenReview>,
    pods: Api<Pod>,
    account: ObjectName,
    audience: String,
    own: Arc<dyn Authenticate>,
    proven: Mutex<BTreeMap<Box<str>, Proven>>,
    questions: Semaphore,
}

struct Proven {
    node: Arc<str>,
    until: SystemTime,
}

impl std::fmt::Debug for TokenReviews {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TokenReviews")
            .field("account", &self.account)
            .field("audience", &self.audience)
            .finish_non_exhaustive()
    }
}

/// What a good token says of its holder.
#[derive(Debug, PartialEq, Eq)]
enum Holder {
    /// Bound to a pod on this node.
    OnNode(String),
    /// Bound to this pod; its node is not named.
    Pod { name: String, uid: String },
}

impl TokenReviews {
    /// Tokens of `account` made for `audience`; `own` judges those that the controller made itself.
    #[must_use]
    pub fn new(
        client: &Client,
        account: ObjectName,
        audience: String,
        own: Arc<dyn Authenticate>,
    ) -> Self {
        Self {
            reviews: Api::all(client.clone()),
            pods: Api::namespaced(client.clone(), &account.namespace),
            account,
            audience,
            own,
            proven: Mutex::default(),
            questions: Semaphore::new(MAX_QUESTIONS),
        }
    }

    async fn ask(&self, token: &str) -> Result<Arc<str>, Unauthenticated> {
        if token.len() > MAX_TOKEN_BYTES || token.split('.').count() != 3 {
            return Err(refused("malformed", "it is no service-account token"));
        }
        // The semaphore is never closed.
        let _slot = self.questions.acquire().await;
        let review = TokenReview {
            metadata: ObjectMeta::default(),
            spec: TokenReviewSpec {
                audiences: Some(vec![self.audience.clone()]),
                token: token.to_owned(),
            },
            status: None,
        };
        let answer = self.reviews.create(&PostParams::default(), &review).await;
        let status = answer.map_err(|error| unavailable(&error))?.status.unwrap_or_default();
        match judge(&status, &self.account, &self.audience)? {
            Holder::OnNode(node) => Ok(node.into()),
            Holder::Pod { name, uid } => self.node_of(&name, &uid).await,
        }
    }

    async fn node_of(&self, name: &str, uid: &str) -> Result<Arc<str>, Unauthenticated> {
        let found = self.pods.get_opt(name).await.map_err(|error| unavailable(&error))?;
        found
            .filter(|pod| pod.metadata.uid.as_deref() == Some(uid))
            .and_then(|pod| pod.spec?.node_name)
            .map(Into::into)
            .ok_or_else(|| refused("not_bound", "the pod it is bound to runs on no node"))
    }

    fn remembered(&self, token: &str, now: SystemTime) -> Option<Arc<str>> {
        let proven = self.proven.lock().unwrap_or_else(PoisonError::into_inner);
        proven.get(token).filter(|proof| now < proof.until).map(|proof| Arc::clone(&proof.node))
    }

    fn remember(&self, token: &str, node: &Arc<str>, now: SystemTime) {
        let mut proven = self.proven.lock().unwrap_or_else(PoisonError::into_inner);
        proven.retain(|_, proof| now < proof.until);
        if proven.len() >= MAX_REMEMBERED {
            proven.clear();
        }
        let proof = Proven { node: Arc::clone(node), until: now + REMEMBERED_FOR };
        proven.insert(token.into(), proof);
    }
}

#[tonic::async_trait]
impl Authenticate for TokenReviews {
    async fn authenticate(
        &self,
        bearer: &str,
        now: SystemTime,
    ) -> Result<NodeCaller, Unauthenticated> {
        if bearer.starts_with(OWN_TOKENS) {
            return self.own.authenticate(bearer, now).await;
        }
        let node = match self.remembered(bearer, now) {
            Some(node) => node,
            None => {
                let node = self.ask(bearer).await.inspect_err(|error| {
                    warn!(reason = error.word(), %error, "an agent's token is refused");
                })?;
                self.remember(bearer, &node, now);
                node
            }
        };
        Ok(NodeCaller { node, valid_for: PROOF_LASTS })
    }
}

/// Whose token it is, when it is an agent's.
fn judge(
    status: &TokenReviewStatus,
    account: &ObjectName,
    audience: &str,
) -> Result<Holder, Unauthenticated> {
    if status.authenticated != Some(true) {
        let why = status.error.as_deref().unwrap_or("the API server does not accept it");
        return Err(refused("not_accepted", why));
    }
    // An API server that knows no audiences leaves the list empty, and would accept a token made for others.
    let audiences = status.audiences.as_deref().unwrap_or_default();
    if !audiences.iter().any(|one| one == audience) {
        return Err(refused("wrong_audience", &format!("it is not made for {audience}")));
    }
    let user = status.user.clone().unwrap_or_default();
    let wanted = format!("system:serviceaccount:{}:{}", account.namespace, account.name);
    let username = user.username.unwrap_or_default();
    if username != wanted {
        return Err(refused("wrong_account", &format!("it is {username}'s, not {wanted}'s")));
    }
    let extra = user.extra.unwrap_or_default();
    let claim = |key: &str| match extra.get(key).map(Vec::as_slice) {
        Some([one]) if !one.is_empty() => Some(one.clone()),
        Some(_) | None => None,
    };
    match (claim(NODE_NAME), claim(POD_NAME), claim(POD_UID)) {
        // The node alone would be a token bound to a Node object, which whoever may make tokens can ask for.
        (Some(node), Some(_), Some(_)) => Ok(Holder::OnNode(node)),
        (None, Some(name), Some(uid)) => Ok(Holder::Pod { name, uid }),
        (_, None, _) | (_, _, None) => Err(refused("not_bound", "it is bound to no pod")),
    }
}

fn refused(word: &'static str, detail: &str) -> Unauthenticated {
    Unauthenticated::Refused { word, detail: detail.to_owned() }
}

fn unavailable(error: &kube::Error) -> Unauthenticated {
    let detail = match refusal(error) {
        Some(403) => "the controller's account may not create tokenreviews or get pods".to_owned(),
        Some(_) | None => format!("the API server cannot be asked: {error}"),
    };
    Unauthenticated::Unavailable { detail }
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::authentication::v1::UserInfo;

    use super::*;

    fn status(audience: &str, account: &str, extra: &[(&str, &str)]) -> TokenReviewStatus {
        let extra = extra.iter().map(|(key, value)| ((*key).into(), vec![(*value).into()]));
        TokenReviewStatus {
            authenticated: Some(true),
            audiences: Some(vec![audience.into()]),
            user: Some(UserInfo {
                username: Some(format!("system:serviceaccount:culvert-system:{account}")),
                extra: Some(extra.collect()),
                ..UserInfo::default()
            }),
            error: None,
        }
    }

    #[test]
    fn only_an_agents_bound_token_for_this_audience_proves_a_node() {
        let account: ObjectName = "culvert-system/culvert-agent".parse().unwrap();
        let pod = [(POD_NAME, "agent-1"), (POD_UID, "u1")];
        let bound = [(NODE_NAME, "node1"), (POD_NAME, "agent-1"), (POD_UID, "u1")];
        let check = |status: TokenReviewStatus, expected: Result<Holder, &str>| {
            let judged = judge(&status, &account, "culvert").map_err(|error| error.word());
            assert_eq!(judged, expected);
        };
        check(status("culvert", "culvert-agent", &bound), Ok(Holder::OnNode("node1".into())));
        let looked_up = Holder::Pod { name: "agent-1".into(), uid: "u1".into() };
        check(status("culvert", "culvert-agent", &pod), Ok(looked_up));
        check(status("api", "culvert-agent", &bound), Err("wrong_audience"));
        check(status("culvert", "default", &bound), Err("wrong_account"));
        check(status("culvert", "culvert-agent", &[]), Err("not_bound"));
        check(status("culvert", "culvert-agent", &bound[..1]), Err("not_bound"));
        let mut unknown = status("culvert", "culvert-agent", &bound);
        unknown.audiences = None;
        check(unknown, Err("wrong_audience"));
        let mut bad = status("culvert", "culvert-agent", &bound);
        bad.authenticated = Some(false);
        check(bad, Err("not_accepted"));
        check(TokenReviewStatus::default(), Err("not_accepted"));
    }
}
