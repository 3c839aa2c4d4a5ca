//! Agents that prove themselves by a bound service-account token.
//!
//! The API server judges the token; what is decided here is whose it must be: of the agents' service account, made for
//! this audience, and bound to a pod on the node it speaks for. A waypoint's token is its Gateway's: of the account of the
//! Gateway's name, bound to a pod that is labelled as the Gateway's. Source: Kubernetes `TokenReview`, and the claims that
//! bound tokens carry (KEP-4193, on by default since 1.30); older API servers name the pod only, which is then looked up.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use k8s_openapi::api::authentication::v1::{TokenReview, TokenReviewSpec, TokenReviewStatus};
use k8s_openapi::api::core::v1::Pod;
use kube::api::PostParams;
use kube::core::ObjectMeta;
use kube::{Api, Client};
use mesh_wire::waypoint_node;
use tokio::sync::Semaphore;
use tracing::warn;

use super::review_gate::{Gate, Origin, TokenDigest, digest};
use super::waypoints::GATEWAY_NAME;
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
/// Of these, questions about tokens that were never found good: agents that are in the mesh do not wait for a flood.
const MAX_STRANGERS: usize = 12;
/// Longest token that is passed on, bytes. Real ones have about 1,200.
const MAX_TOKEN_BYTES: usize = 16 * 1024;
/// How the controller's own tokens begin; those are judged by whoever made them.
const OWN_TOKENS: &str = "culvert1.";

const NODE_NAME: &str = "authentication.kubernetes.io/node-name";
const POD_NAME: &str = "authentication.kubernetes.io/pod-name";
const POD_UID: &str = "authentication.kubernetes.io/pod-uid";

/// Judges service-account tokens by the API server's word, and the controller's own ones by another judge.
pub struct TokenReviews {
    client: Client,
    reviews: Api<TokenReview>,
    pods: Api<Pod>,
    account: ObjectName,
    audience: String,
    own: Arc<dyn Authenticate>,
    proven: Mutex<BTreeMap<TokenDigest, Proven>>,
    gate: Mutex<Gate>,
    questions: Semaphore,
    strangers: Semaphore,
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
    /// Of another account, and bound to this pod: a waypoint's, if the pod is one.
    Other { namespace: String, account: String, name: String, uid: String },
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
            client: client.clone(),
            reviews: Api::all(client.clone()),
            pods: Api::namespaced(client.clone(), &account.namespace),
            account,
            audience,
            own,
            proven: Mutex::default(),
            gate: Mutex::default(),
            questions: Semaphore::new(MAX_QUESTIONS),
            strangers: Semaphore::new(MAX_STRANGERS),
        }
    }

    /// The node of a token that is not remembered: of a known one at once, of others in their address's turn.
    async fn review(
        &self,
        bearer: &str,
        token: TokenDigest,
        source: Option<IpAddr>,
        now: SystemTime,
    ) -> Result<Arc<str>, Unauthenticated> {
        let origin = Origin::of(source);
        if self.gate().knows(&token, Instant::now()) {
            return self.ask_and_remember(bearer, token, None, now).await;
        }
        let turns = self.gate().queue(origin, Instant::now())?;
        let _waiting = Waiting { gate: &self.gate, origin };
        // The semaphores are never closed.
        let _turn = turns.acquire().await;
        // Whoever was before may have asked the same.
        if let Some(node) = self.remembered(&token, now) {
            return Ok(node);
        }
        if let Some(refusal) = self.gate().refused(&token, Instant::now()) {
            return Err(refusal);
        }
        self.gate().spend(origin, Instant::now())?;
        let _slot = self.strangers.acquire().await;
        self.ask_and_remember(bearer, token, Some(origin), now).await.inspect_err(|error| {
            warn!(reason = error.word(), %error, ?source, "an agent's token is refused");
        })
    }

    async fn ask_and_remember(
        &self,
        bearer: &str,
        token: TokenDigest,
        payer: Option<Origin>,
        now: SystemTime,
    ) -> Result<Arc<str>, Unauthenticated> {
        let outcome = self.ask(bearer).await;
        self.gate().answered(payer, token, outcome.as_ref().err(), Instant::now());
        let node = outcome?;
        self.remember(token, &node, now);
        Ok(node)
    }

    fn gate(&self) -> MutexGuard<'_, Gate> {
        // It is changed in single steps.
        self.gate.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn ask(&self, token: &str) -> Result<Arc<str>, Unauthenticated> {
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
            Holder::Other { namespace, account, name, uid } => {
                self.waypoint_of(&namespace, &account, &name, &uid).await
            }
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

    /// The waypoint whose pod that is. The account must bear the Gateway's name: a label alone, which whoever makes pods may
    /// write, would lend an account the waypoint's standing.
    async fn waypoint_of(
        &self,
        namespace: &str,
        account: &str,
        name: &str,
        uid: &str,
    ) -> Result<Arc<str>, Unauthenticated> {
        let pods: Api<Pod> = Api::namespaced(self.client.clone(), namespace);
        let found = pods.get_opt(name).await.map_err(|error| unavailable(&error))?;
        let is_one = found.is_some_and(|pod| {
            let labels = pod.metadata.labels.unwrap_or_default();
            pod.metadata.uid.as_deref() == Some(uid)
                && pod.spec.and_then(|spec| spec.service_account_name).as_deref() == Some(account)
                && labels.get(GATEWAY_NAME).is_some_and(|gateway| gateway == account)
        });
        if is_one {
            return Ok(waypoint_node(namespace, account).into());
        }
        let (of, agents) = (&self.account.namespace, &self.account.name);
        let detail = format!(
            "it is {namespace}/{account}'s, not an agent's ({of}/{agents}), and pod {name} is no waypoint {account}"
        );
        Err(refused("wrong_account", &detail))
    }

    fn remembered(&self, token: &TokenDigest, now: SystemTime) -> Option<Arc<str>> {
        let proven = self.proven.lock().unwrap_or_else(PoisonError::into_inner);
        proven.get(token).filter(|proof| now < proof.until).map(|proof| Arc::clone(&proof.node))
    }

    fn remember(&self, token: TokenDigest, node: &Arc<str>, now: SystemTime) {
        let mut proven = self.proven.lock().unwrap_or_else(PoisonError::into_inner);
        proven.retain(|_, proof| now < proof.until);
        if proven.len() >= MAX_REMEMBERED {
            proven.clear();
        }
        let proof = Proven { node: Arc::clone(node), until: now + REMEMBERED_FOR };
        proven.insert(token, proof);
    }
}

/// Leaves the queue of an address, also when its caller goes away meanwhile.
struct Waiting<'r> {
    gate: &'r Mutex<Gate>,
    origin: Origin,
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        let mut gate = self.gate.lock().unwrap_or_else(PoisonError::into_inner);
        gate.leave(self.origin, Instant::now());
    }
}

#[tonic::async_trait]
impl Authenticate for TokenReviews {
    async fn authenticate(
        &self,
        bearer: &str,
        source: Option<IpAddr>,
        now: SystemTime,
    ) -> Result<NodeCaller, Unauthenticated> {
        if bearer.starts_with(OWN_TOKENS) {
            return self.own.authenticate(bearer, source, now).await;
        }
        if bearer.len() > MAX_TOKEN_BYTES || bearer.split('.').count() != 3 {
            return Err(refused("malformed", "it is no service-account token"));
        }
        let token = digest(bearer);
        let node = match self.remembered(&token, now) {
            Some(node) => node,
            None => {
                // A guard must not be held while the API server is asked.
                let refusal = self.gate().refused(&token, Instant::now());
                match refusal {
                    Some(refusal) => return Err(refusal),
                    None => self.review(bearer, token, source, now).await?,
                }
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
    let extra = user.extra.unwrap_or_default();
    let claim = |key: &str| match extra.get(key).map(Vec::as_slice) {
        Some([one]) if !one.is_empty() => Some(one.clone()),
        Some(_) | None => None,
    };
    if username != wanted {
        let parts = username.strip_prefix("system:serviceaccount:");
        let parts = parts.and_then(|name| name.split_once(':'));
        let (Some((namespace, name)), Some(pod), Some(uid)) =
            (parts, claim(POD_NAME), claim(POD_UID))
        else {
            return Err(refused("wrong_account", &format!("it is {username}'s, not {wanted}'s")));
        };
        let (namespace, account) = (namespace.to_owned(), name.to_owned());
        return Ok(Holder::Other { namespace, account, name: pod, uid });
    }
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
    use std::sync::atomic::{AtomicUsize, Ordering};

    use k8s_openapi::api::authentication::v1::UserInfo;
    use serde_json::json;

    use super::super::fake_api::FakeApi;
    use super::*;
    use crate::ca::tokens::Tokens;
    use crate::state_dir::StateDir;

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
        check(status("culvert", "default", &[]), Err("wrong_account"));
        let other = Holder::Other {
            namespace: "culvert-system".into(),
            account: "default".into(),
            name: "agent-1".into(),
            uid: "u1".into(),
        };
        check(status("culvert", "default", &bound), Ok(other));
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

    /// Judges by an API server that takes its time and knows good tokens by their beginning.
    fn reviews(asked: &Arc<AtomicUsize>) -> (tempfile::TempDir, TokenReviews) {
        let asked = Arc::clone(asked);
        let api = FakeApi::answering(
            "/apis/authentication.k8s.io/v1/tokenreviews",
            move |review| {
                asked.fetch_add(1, Ordering::Relaxed);
                let good = review["spec"]["token"].as_str().unwrap_or_default().starts_with("good");
                let bound = [(NODE_NAME, "node1"), (POD_NAME, "agent-1"), (POD_UID, "u1")];
                let status = status("culvert", "culvert-agent", &bound);
                let mut answer = json!({"apiVersion": "authentication.k8s.io/v1", "kind": "TokenReview", "spec": {}});
                answer["status"] =
                    if good { json!(status) } else { json!({"authenticated": false}) };
                answer
            },
        );
        let directory = tempfile::tempdir().unwrap();
        let files = StateDir::open(&directory.path().join("state")).unwrap();
        let own = Arc::new(Tokens::open(files).unwrap());
        let account = "culvert-system/culvert-agent".parse().unwrap();
        (directory, TokenReviews::new(&api.client(), account, "culvert".into(), own))
    }

    /// Tokens of the account `wp`, bound to a pod of that name and uid.
    async fn caller_of(
        labels: &serde_json::Value,
        account: &str,
        uid: &str,
    ) -> Result<String, &'static str> {
        let api = FakeApi::answering("/apis/authentication.k8s.io/v1/tokenreviews", |_review| {
            let bound = [(NODE_NAME, "node1"), (POD_NAME, "wp-1"), (POD_UID, "u1")];
            let status = status("culvert", "wp", &bound);
            json!({"apiVersion": "authentication.k8s.io/v1", "kind": "TokenReview", "spec": {}, "status": status})
        });
        let pod = json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": {"name": "wp-1", "namespace": "culvert-system", "uid": uid, "labels": labels},
            "spec": {"serviceAccountName": account, "containers": []},
        });
        api.put("/api/v1/namespaces/culvert-system/pods/wp-1", Some(pod));
        let directory = tempfile::tempdir().unwrap();
        let files = StateDir::open(&directory.path().join("state")).unwrap();
        let own = Arc::new(Tokens::open(files).unwrap());
        let agents = "culvert-system/culvert-agent".parse().unwrap();
        let reviews = TokenReviews::new(&api.client(), agents, "culvert".into(), own);
        let caller = reviews.authenticate("a.b.c", None, SystemTime::now()).await;
        caller.map(|caller| caller.node.to_string()).map_err(|error| error.word())
    }

    #[tokio::test]
    async fn a_waypoints_pod_proves_its_gateway_and_no_other_pod_does() {
        let label = json!({GATEWAY_NAME: "wp"});
        let good = caller_of(&label, "wp", "u1").await;
        assert_eq!(good.as_deref(), Ok("waypoint/culvert-system/wp"));
        let refused = Err("wrong_account");
        assert_eq!(caller_of(&json!({}), "wp", "u1").await, refused, "no label");
        assert_eq!(caller_of(&json!({GATEWAY_NAME: "other"}), "wp", "u1").await, refused);
        assert_eq!(caller_of(&label, "wp", "u2").await, refused, "another pod of that name");
        assert_eq!(caller_of(&label, "other", "u1").await, refused, "another account");
    }

    #[tokio::test]
    async fn a_flood_costs_the_api_server_little_and_keeps_no_agent_out() {
        let asked = Arc::new(AtomicUsize::new(0));
        let (_directory, reviews) = reviews(&asked);
        let reviews = Arc::new(reviews);
        let start = SystemTime::now();
        let agent = Some("10.0.0.1".parse().unwrap());
        reviews.authenticate("good.a.b", agent, start).await.unwrap();
        // From elsewhere, and from the agent's own node.
        let flood: Vec<_> = (0..2_000)
            .map(|number: u32| {
                let reviews = Arc::clone(&reviews);
                let last = if number.is_multiple_of(2) { 1 } else { 2 };
                let source = Some(IpAddr::from([10, 0, 0, last]));
                tokio::spawn(async move {
                    reviews.authenticate(&format!("false.{number}.x"), source, start).await
                })
            })
            .collect();
        // The proof is remembered no longer, so the API server is asked again.
        let later = start + REMEMBERED_FOR;
        reviews.authenticate("good.a.b", agent, later).await.expect("the agent is let in");
        let other = Some("10.0.0.3".parse().unwrap());
        reviews.authenticate("good.c.d", other, later).await.expect("so is a new one");
        for one in flood {
            let word = one.await.unwrap().unwrap_err().word();
            assert!(["not_accepted", "throttled"].contains(&word), "{word}");
        }
        let count = asked.load(Ordering::Relaxed);
        assert!((5..=40).contains(&count), "{count} questions for 2,002 tokens");
        // What was refused is refused again without a question.
        let refused = reviews.authenticate("false.again.x", other, later).await.unwrap_err();
        let count = asked.load(Ordering::Relaxed);
        assert_eq!(reviews.authenticate("false.again.x", other, later).await.unwrap_err(), refused);
        assert_eq!(asked.load(Ordering::Relaxed), count);
    }

    #[tokio::test]
    async fn what_a_node_asks_at_once_is_one_question() {
        let asked = Arc::new(AtomicUsize::new(0));
        let (_directory, reviews) = reviews(&asked);
        let now = SystemTime::now();
        let source = Some("10.0.0.1".parse().unwrap());
        let calls = (0..50).map(|_| reviews.authenticate("good.a.b", source, now));
        for judged in futures_util::future::join_all(calls).await {
            judged.expect("an agent is let in");
        }
        let count = asked.load(Ordering::Relaxed);
        assert!(count <= 2, "{count}");
    }
}
