//! The engine against a slow, obvious interpreter, over generated policies and flows.

#![expect(clippy::unwrap_used, reason = "a test's own values are valid")]

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Instant;

use http::{HeaderMap, HeaderName, HeaderValue, Method};
use mesh_authorize::{
    Action, ClaimMatch, Clause, Connection, Decision, HeaderMatch, Match, NoteKind, Outcome,
    PathMatch, Policy, PolicyKind, PolicyName, PolicyOrigin, PolicyScope, PolicySet, Request,
    RequestClaims, RequestMatch, Rule, RuleRef, ServiceAccountMatch, StringMatch, UnknownEgress,
    Verdict, authorize, authorize_egress, authorize_request, explain, explain_request,
};
use mesh_model::{
    ClientAddr, CloseReason, Direction, Flow, FlowId, IpPrefix, OrigDst, PathNormalization, PodUid,
    RequestPath, SpiffeId, Workload, WorkloadUid, splitmix,
};
use mesh_resolve::{
    Authority, RequiredWaypoint, ResolveSettings, ResolvedFlow, Route, TunnelRoute, WorkloadIndex,
    resolve_inbound,
};

/// (policy set, flow) pairs: sets times flows per set.
const SETS: u64 = 6_000;
const FLOWS_PER_SET: u64 = 40;

/// SplitMix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        splitmix::next(&mut self.0)
    }

    fn below(&mut self, bound: usize) -> usize {
        usize::try_from(self.next() >> 33).unwrap() % bound
    }

    fn chance(&mut self, percent: usize) -> bool {
        self.below(100) < percent
    }

    fn one<T: Clone>(&mut self, of: &[T]) -> T {
        of[self.below(of.len())].clone()
    }

    fn up_to<T>(&mut self, most: usize, mut make: impl FnMut(&mut Self) -> T) -> Vec<T> {
        let count = self.below(most + 1);
        (0..count).map(|_| make(self)).collect()
    }
}

const NAMESPACES: [&str; 3] = ["a", "ab", "b"];
const ACCOUNTS: [&str; 3] = ["x", "xy", "y"];
const TRUST_DOMAINS: [&str; 2] = ["td", "td2"];
const PORTS: [u16; 3] = [80, 81, 443];

fn text_match(random: &mut Random, texts: &[String]) -> StringMatch {
    let text = random.one(texts);
    let cut = random.below(text.len() + 1);
    match random.below(8) {
        0..=3 => StringMatch::Exact(text.into()),
        4 | 5 => StringMatch::Prefix(text[..cut].into()),
        6 => StringMatch::Suffix(text[cut..].into()),
        _ => StringMatch::Presence,
    }
}

fn ip(random: &mut Random) -> IpAddr {
    if random.chance(75) {
        Ipv4Addr::new(10, 0, 0, u8::try_from(random.below(8)).unwrap()).into()
    } else {
        Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, u16::try_from(random.below(8)).unwrap()).into()
    }
}

fn prefix(random: &mut Random) -> IpPrefix {
    let ip = ip(random);
    let full = if ip.is_ipv4() { 32 } else { 128 };
    let host_bits = random.one(&[0u8, 1, 2, 3, 3, full]);
    IpPrefix::new(ip, full - host_bits).unwrap()
}

fn account(random: &mut Random) -> ServiceAccountMatch {
    ServiceAccountMatch {
        namespace: random.one(&NAMESPACES).into(),
        service_account: random.one(&ACCOUNTS).into(),
    }
}

fn one_match(random: &mut Random, texts: &Texts) -> Match {
    let mut one = Match::default();
    for _ in 0..random.one(&[0, 1, 1, 1, 1, 1, 1, 2, 3]) {
        match random.below(20) {
            0 => one.namespaces = random.up_to(3, |r| text_match(r, &texts.namespaces)),
            1 => one.not_namespaces = random.up_to(2, |r| text_match(r, &texts.namespaces)),
            2 => one.principals = random.up_to(4, |r| text_match(r, &texts.principals)),
            3 => one.not_principals = random.up_to(2, |r| text_match(r, &texts.principals)),
            4 => one.service_accounts = random.up_to(4, account),
            5 => one.not_service_accounts = random.up_to(3, account),
            6 => one.trust_domains = random.up_to(2, |r| text_match(r, &texts.trust_domains)),
            7 => one.not_trust_domains = random.up_to(2, |r| text_match(r, &texts.trust_domains)),
            8 => one.source_ips = random.up_to(4, prefix),
            9 => one.not_source_ips = random.up_to(3, prefix),
            10 => one.destination_ips = random.up_to(3, prefix),
            11 => one.not_destination_ips = random.up_to(3, prefix),
            12 => one.destination_ports = random.up_to(3, |r| r.one(&PORTS)),
            13 => one.not_destination_ports = random.up_to(2, |r| r.one(&PORTS)),
            _ => request_match(random, &mut one.request),
        }
    }
    one
}

const HOSTS: [&str; 4] = ["s", "S.org", "s.org:80", "other.org"];
const METHODS: [&str; 3] = ["GET", "PUT", "get"];
const PATHS: [&str; 6] = ["/", "/a", "/a/b", "/a/b/c", "/ab", "/a/"];
const TEMPLATES: [&str; 5] = ["/a/{*}", "/{*}/b/{**}", "/{**}", "/a/{**}/c", "/{*}"];
const TOKEN_PRINCIPALS: [&str; 4] = ["i/s", "i/t", "j/s", "i"];
const CLAIM_PATHS: [&[&str]; 5] = [&["aud"], &["azp"], &["scope"], &["r", "g"], &["r"]];
const CLAIM_VALUES: [&str; 7] = ["a", "ab", "b", "true", "7", "a b", ""];
const VALUES: [&str; 4] = ["1", "12", "1,2", ""];

fn texts(of: &[&str]) -> Vec<String> {
    of.iter().copied().map(String::from).collect()
}

fn request_match(random: &mut Random, one: &mut RequestMatch) {
    let path = |random: &mut Random| {
        if random.chance(40) {
            PathMatch::Template(random.one(&TEMPLATES).parse().unwrap())
        } else {
            PathMatch::Text(text_match(random, &texts(&PATHS)))
        }
    };
    match random.below(10) {
        0 => one.hosts = random.up_to(2, |r| text_match(r, &texts(&HOSTS))),
        1 => one.not_hosts = random.up_to(2, |r| text_match(r, &texts(&HOSTS))),
        2 => one.methods = random.up_to(2, |r| text_match(r, &texts(&METHODS))),
        3 => one.not_methods = random.up_to(2, |r| text_match(r, &texts(&METHODS))),
        4 => one.paths = random.up_to(3, path),
        5 => one.not_paths = random.up_to(2, path),
        6 => one.principals = random.up_to(2, |r| text_match(r, &texts(&TOKEN_PRINCIPALS))),
        7 => one.not_principals = random.up_to(2, |r| text_match(r, &texts(&TOKEN_PRINCIPALS))),
        8 => {
            one.claims = random.up_to(2, |r| ClaimMatch {
                path: r.one(&CLAIM_PATHS).iter().copied().map(Arc::from).collect(),
                values: r.up_to(2, |r| text_match(r, &texts(&CLAIM_VALUES))),
                not_values: r.up_to(1, |r| text_match(r, &texts(&CLAIM_VALUES))),
            });
        }
        _ => {
            one.headers = random.up_to(2, |r| HeaderMatch {
                name: r.one(&["x-a", "x-b"]).into(),
                values: r.up_to(2, |r| text_match(r, &texts(&VALUES))),
                not_values: r.up_to(1, |r| text_match(r, &texts(&VALUES))),
            });
        }
    }
}

struct Texts {
    namespaces: Vec<String>,
    principals: Vec<String>,
    trust_domains: Vec<String>,
}

impl Texts {
    fn new() -> Self {
        let mut principals = Vec::new();
        for trust_domain in TRUST_DOMAINS {
            for namespace in NAMESPACES {
                for account in ACCOUNTS {
                    principals.push(format!("{trust_domain}/ns/{namespace}/sa/{account}"));
                }
            }
        }
        Self {
            namespaces: NAMESPACES.map(String::from).to_vec(),
            principals,
            trust_domains: TRUST_DOMAINS.map(String::from).to_vec(),
        }
    }
}

fn policy(random: &mut Random, texts: &Texts) -> Policy {
    let name = PolicyName::new(random.one(&NAMESPACES), random.one(&["p", "q", "r", "s"]));
    let action = random.one(&[
        Action::Allow,
        Action::Allow,
        Action::Allow,
        Action::Deny,
        Action::Deny,
        Action::Audit,
    ]);
    let narrow = action == Action::Deny;
    let rules = (0..random.one(&[0, 1, 1, 1, 2])).map(|_| {
        let clauses = 0..random.one(if narrow { &[1, 1, 2, 2] } else { &[0, 1, 1, 2] });
        let clauses =
            clauses.map(|_| Clause { matches: random.up_to(2, |r| one_match(r, texts)) }).collect();
        Rule { clauses }
    });
    let rules = rules.collect();
    Policy {
        origin: PolicyOrigin {
            kind: PolicyKind::AuthorizationPolicy,
            namespace: name.namespace.clone(),
            name: name.name.clone(),
            unreadable: None,
        },
        name,
        scope: random.one(&[PolicyScope::Global, PolicyScope::Namespace, PolicyScope::Workload]),
        action,
        dry_run: random.chance(15),
        rules,
    }
}

/// The engine's subject, in the oracle's words.
struct Facts<'f> {
    id: Option<&'f SpiffeId>,
    source: IpAddr,
    destination: SocketAddr,
    request: Option<&'f RequestFacts>,
}

struct RequestFacts {
    authority: String,
    method: String,
    path: String,
    headers: Vec<(&'static str, String)>,
    /// The claims of its token.
    claims: Option<serde_json::Value>,
}

/// A claim's value: a text, a list, a number, a truth value, something nested, or null.
fn claim_value(random: &mut Random, deep: bool) -> serde_json::Value {
    match random.below(if deep { 8 } else { 5 }) {
        0..=2 => random.one(&CLAIM_VALUES).into(),
        3 => 7.into(),
        4 => true.into(),
        5 => serde_json::Value::Null,
        6 => random.up_to(3, |r| claim_value(r, false)).into(),
        _ => serde_json::json!({"g": claim_value(random, false), "a": "a"}),
    }
}

fn claims(random: &mut Random) -> serde_json::Value {
    let mut claims = serde_json::Map::new();
    for name in ["aud", "azp", "scope", "r"] {
        if random.chance(70) {
            claims.insert(name.into(), claim_value(random, true));
        }
    }
    if random.chance(80) {
        claims.insert("iss".into(), random.one(&["i", "j"]).into());
        claims.insert("sub".into(), random.one(&["s", "t", ""]).into());
    }
    claims.into()
}

/// Everything that a claim says, as texts: the whole, and each of a list.
fn claim_texts(claims: &serde_json::Value, path: &[Arc<str>]) -> Vec<String> {
    let text = |value: &serde_json::Value| match value {
        serde_json::Value::String(text) => Some(text.clone()),
        serde_json::Value::Bool(_) | serde_json::Value::Number(_) => Some(value.to_string()),
        serde_json::Value::Null | serde_json::Value::Array(_) | serde_json::Value::Object(_) => {
            None
        }
    };
    let pointer: String = path.iter().map(|name| format!("/{name}")).collect();
    let Some(value) = claims.pointer(&pointer) else { return Vec::new() };
    let mut found: Vec<String> = text(value).into_iter().collect();
    if path.len() == 1 && *path[0] == *"scope" {
        let words: Vec<_> = value.as_str().unwrap_or("").split(' ').map(String::from).collect();
        found.extend(words.into_iter().filter(|word| !word.is_empty()));
    }
    found.extend(value.as_array().into_iter().flatten().filter_map(text));
    found
}

fn request_facts(random: &mut Random) -> RequestFacts {
    RequestFacts {
        authority: random.one(&HOSTS).to_owned(),
        method: random.one(&METHODS).to_owned(),
        path: random.one(&PATHS).to_owned(),
        headers: random.up_to(3, |r| (r.one(&["x-a", "x-b"]), r.one(&VALUES).to_owned())),
        claims: random.chance(60).then(|| claims(random)),
    }
}

/// Segments against segments; `{**}` tries every length of the rest.
fn template_holds(template: &[&str], path: &[&str]) -> bool {
    match (template, path) {
        ([], []) => true,
        (["{**}", end @ ..], [_, ..]) => (1..=path.len()).any(|n| template_holds(end, &path[n..])),
        (["{*}", template @ ..], [segment, path @ ..]) => {
            !segment.is_empty() && template_holds(template, path)
        }
        ([one, template @ ..], [segment, path @ ..]) => {
            one == segment && template_holds(template, path)
        }
        ([], [_, ..]) | ([_, ..], []) => false,
    }
}

fn lower(one: &StringMatch) -> StringMatch {
    match one {
        StringMatch::Exact(text) => StringMatch::Exact(text.to_lowercase().into()),
        StringMatch::Prefix(text) => StringMatch::Prefix(text.to_lowercase().into()),
        StringMatch::Suffix(text) => StringMatch::Suffix(text.to_lowercase().into()),
        StringMatch::Presence => StringMatch::Presence,
    }
}

fn request_holds(one: &RequestMatch, action: Action, request: Option<&RequestFacts>) -> bool {
    let asks = one.headers.iter().any(|h| !h.values.is_empty() || !h.not_values.is_empty())
        || one.claims.iter().any(|c| !c.values.is_empty() || !c.not_values.is_empty())
        || *one
            != RequestMatch {
                headers: one.headers.clone(),
                claims: one.claims.clone(),
                ..RequestMatch::default()
            };
    let Some(request) = request else { return !asks || action == Action::Deny };
    let authority = request.authority.to_lowercase();
    let host = authority.split(':').next().unwrap();
    let path = |m: &PathMatch| match m {
        PathMatch::Text(text) => text_holds(text, &request.path),
        PathMatch::Template(template) => {
            let template = template.to_string();
            let parts: Vec<&str> = template.split('/').collect();
            template_holds(&parts, &request.path.split('/').collect::<Vec<_>>())
        }
    };
    lists(&one.hosts, &one.not_hosts, |m| {
        text_holds(&lower(m), &authority) || text_holds(&lower(m), host)
    }) && lists(&one.methods, &one.not_methods, |m| text_holds(m, &request.method))
        && lists(&one.paths, &one.not_paths, path)
        && lists(&one.principals, &one.not_principals, |m| {
            let text =
                |name: &str| request.claims.as_ref()?[name].as_str().filter(|t| !t.is_empty());
            let both = text("iss").zip(text("sub"));
            both.is_some_and(|(issuer, subject)| text_holds(m, &format!("{issuer}/{subject}")))
        })
        && one.claims.iter().all(|wanted| {
            let said = request.claims.as_ref().map(|all| claim_texts(all, &wanted.path));
            let said = said.unwrap_or_default();
            lists(&wanted.values, &wanted.not_values, |m| said.iter().any(|one| text_holds(m, one)))
        })
        && one.headers.iter().all(|wanted| {
            let values = request.headers.iter().filter(|(name, _)| *name == &*wanted.name);
            let values: Vec<&str> = values.map(|(_, value)| &**value).collect();
            let value = (!values.is_empty()).then(|| values.join(","));
            lists(&wanted.values, &wanted.not_values, |m| {
                value.as_ref().is_some_and(|value| text_holds(m, value))
            })
        })
}

fn text_holds(one: &StringMatch, text: &str) -> bool {
    match one {
        StringMatch::Exact(wanted) => **wanted == *text,
        StringMatch::Prefix(wanted) => text.starts_with(&**wanted),
        StringMatch::Suffix(wanted) => text.ends_with(&**wanted),
        StringMatch::Presence => !text.is_empty(),
    }
}

fn lists<T>(positive: &[T], negative: &[T], holds: impl Fn(&T) -> bool) -> bool {
    (positive.is_empty() || positive.iter().any(&holds)) && !negative.iter().any(&holds)
}

fn match_holds(one: &Match, action: Action, facts: &Facts<'_>) -> bool {
    let mut plain = one.clone();
    plain.request.headers.retain(|h| !h.values.is_empty() || !h.not_values.is_empty());
    plain.request.claims.retain(|c| !c.values.is_empty() || !c.not_values.is_empty());
    if plain == Match::default() {
        return false;
    }
    let namespace = facts.id.map_or("", |id| id.namespace());
    lists(&one.namespaces, &one.not_namespaces, |m| text_holds(m, namespace))
        && lists(&one.principals, &one.not_principals, |m| {
            facts.id.is_some_and(|id| text_holds(m, id.principal()))
        })
        && lists(&one.trust_domains, &one.not_trust_domains, |m| {
            facts.id.is_some_and(|id| text_holds(m, id.trust_domain()))
        })
        && lists(&one.service_accounts, &one.not_service_accounts, |m| {
            facts.id.is_some_and(|id| {
                *m.namespace == *id.namespace() && *m.service_account == *id.service_account()
            })
        })
        && lists(&one.source_ips, &one.not_source_ips, |p| p.contains(facts.source))
        && lists(&one.destination_ips, &one.not_destination_ips, |p| {
            p.contains(facts.destination.ip())
        })
        && lists(&one.destination_ports, &one.not_destination_ports, |p| {
            *p == facts.destination.port()
        })
        && request_holds(&one.request, action, facts.request)
}

fn matching_rule(policy: &Policy, facts: &Facts<'_>) -> Option<usize> {
    policy.rules.iter().position(|rule| {
        rule.clauses.iter().all(|clause| {
            clause.matches.is_empty()
                || clause.matches.iter().any(|one| match_holds(one, policy.action, facts))
        })
    })
}

#[derive(Debug, PartialEq, Eq, PartialOrd, Ord, Clone, Copy)]
enum Kind {
    AllowedByRule,
    AllowedByDefault,
    DenyMatched,
    NoAllowMatched,
    Missing,
    Bypassed,
    WaypointUnknown,
}

/// What no policy of anybody's says, but the mesh itself.
fn synthetic(namespace: &str, name: &str) -> RuleRef {
    let origin = PolicyOrigin::new(PolicyKind::Synthetic, namespace, name);
    RuleRef { origin, rule_index: None }
}

/// Whoever must come through a waypoint must be one of its identities; nobody is while it is unknown.
fn held_up(
    required: Option<&RequiredWaypoint>,
    namespace: &str,
    id: Option<&SpiffeId>,
) -> Option<(Kind, RuleRef)> {
    let required = required?;
    let rule = synthetic(namespace, "waypoint-required");
    match (required.identities.as_slice(), id) {
        ([], _) => Some((Kind::WaypointUnknown, rule)),
        (identities, Some(id)) if identities.iter().any(|one| one == id) => None,
        (_, _) => Some((Kind::Bypassed, rule)),
    }
}

fn identity(random: &mut Random) -> SpiffeId {
    let (domain, namespace) = (random.one(&TRUST_DOMAINS), random.one(&NAMESPACES));
    SpiffeId::new(domain, namespace, random.one(&ACCOUNTS)).unwrap()
}

fn interpret(
    policies: &BTreeMap<PolicyName, Policy>,
    workload: Option<&Workload>,
    listed: &[Arc<str>],
    facts: &Facts<'_>,
) -> (Kind, Option<RuleRef>, Vec<(NoteKind, PolicyName)>) {
    let mut applicable: Vec<&Policy> = Vec::new();
    if let Some(workload) = workload {
        applicable.extend(policies.values().filter(|p| p.scope == PolicyScope::Global));
        applicable.extend(policies.values().filter(|p| {
            p.scope == PolicyScope::Namespace && p.name.namespace == workload.namespace
        }));
    }
    let mut missing = false;
    for listed in listed {
        match policies.values().find(|p| p.name.to_string() == **listed) {
            None => missing = true,
            Some(policy) if applicable.contains(&policy) => {}
            Some(policy) => applicable.push(policy),
        }
    }
    let rule = |policy: &Policy, rule_index| RuleRef { origin: policy.origin.clone(), rule_index };
    let mut notes = Vec::new();
    for policy in &applicable {
        if matching_rule(policy, facts).is_some() {
            match (policy.action, policy.dry_run) {
                (Action::Audit, _) => notes.push((NoteKind::Audit, policy.name.clone())),
                (Action::Deny, true) => notes.push((NoteKind::WouldDeny, policy.name.clone())),
                (Action::Allow, true) => notes.push((NoteKind::WouldAllow, policy.name.clone())),
                (_, false) => {}
            }
        }
    }
    let enforced =
        |action| applicable.iter().copied().filter(move |p| p.action == action && !p.dry_run);
    for policy in enforced(Action::Deny) {
        if let Some(index) = matching_rule(policy, facts) {
            return (Kind::DenyMatched, Some(rule(policy, Some(index))), notes);
        }
    }
    if missing {
        return (Kind::Missing, None, notes);
    }
    for policy in enforced(Action::Allow) {
        if let Some(index) = matching_rule(policy, facts) {
            return (Kind::AllowedByRule, Some(rule(policy, Some(index))), notes);
        }
    }
    match enforced(Action::Allow).next() {
        None => (Kind::AllowedByDefault, None, notes),
        Some(first) => (Kind::NoAllowMatched, Some(rule(first, None)), notes),
    }
}

fn template() -> ResolvedFlow {
    let flow = Flow {
        id: FlowId(1),
        direction: Direction::InboundPlaintext,
        client: ClientAddr::new("10.0.0.9:1".parse().unwrap()),
        orig_dst: OrigDst::new("10.0.0.1:80".parse().unwrap()),
        pod: PodUid::new("p"),
        #[expect(clippy::disallowed_methods, reason = "a stamp nothing looks at")]
        accepted_at: Instant::now(),
    };
    let local = Arc::new(Workload::named("u", "a", "p"));
    resolve_inbound(&WorkloadIndex::default(), &ResolveSettings::default(), &flow, &local, None)
        .unwrap()
}

/// A verdict in the interpreter's words.
fn found(verdict: &Verdict) -> (Kind, Option<RuleRef>) {
    match &verdict.decision {
        Decision::Allow(permit) => {
            let kind = match permit.rule() {
                Some(_) => Kind::AllowedByRule,
                None => Kind::AllowedByDefault,
            };
            (kind, permit.rule().cloned())
        }
        Decision::Deny(denial) => {
            let by_rule = denial.rule.as_ref().is_some_and(|rule| rule.rule_index.is_some());
            let by_mesh =
                denial.rule.as_ref().is_some_and(|rule| rule.origin.kind == PolicyKind::Synthetic);
            let kind = if by_mesh && denial.reason == CloseReason::WaypointUnavailable {
                Kind::WaypointUnknown
            } else if by_mesh {
                assert_eq!(denial.reason, CloseReason::PolicyDenied);
                Kind::Bypassed
            } else if denial.reason == CloseReason::PolicyMissing {
                Kind::Missing
            } else if by_rule {
                Kind::DenyMatched
            } else {
                Kind::NoAllowMatched
            };
            (kind, denial.rule.clone())
        }
    }
}

#[test]
fn engine_and_interpreter_agree_on_generated_policies_and_flows() {
    let texts = Texts::new();
    let mut resolved = template();
    let mut seen: BTreeMap<Kind, u64> = BTreeMap::new();
    let mut noted = 0_u64;
    let mut policies = BTreeMap::new();
    let mut set = PolicySet::default();
    for seed in 0..SETS {
        let mut random = Random(seed);
        // Half of the sets go on from the one before, so that replacing and removing are exercised as well.
        if seed % 2 == 0 {
            policies.clear();
            set = PolicySet::default();
        }
        for _ in 0..random.below(7) {
            let policy = policy(&mut random, &texts);
            set.upsert(policy.clone());
            policies.insert(policy.name.clone(), policy);
        }
        if let Some(name) = policies.keys().next().cloned().filter(|_| random.chance(30)) {
            set.remove(&name);
            policies.remove(&name);
        }
        for number in 0..FLOWS_PER_SET {
            let context = (seed, number);
            let mut workload = Workload::named("u", random.one(&NAMESPACES), "p");
            for policy in policies.values() {
                if policy.scope == PolicyScope::Workload && random.chance(60) || random.chance(10) {
                    workload.authorization_policies.push(policy.name.to_string().into());
                }
            }
            if random.chance(10) {
                workload.authorization_policies.push("b/absent".into());
            }
            let source = ip(&mut random);
            let destination = SocketAddr::new(ip(&mut random), random.one(&PORTS));
            let peer = random.chance(75).then(|| identity(&mut random));
            let required = random.chance(15).then(|| {
                let mut identities = random.up_to(4, identity);
                identities.sort();
                identities.dedup();
                Arc::new(RequiredWaypoint { names: vec!["a/waypoint".into()], identities })
            });
            resolved.flow.direction =
                if peer.is_some() { Direction::InboundTunnel } else { Direction::InboundPlaintext };
            resolved.flow.client = ClientAddr::new(SocketAddr::new(source, 4000));
            resolved.local = Arc::new(workload);
            resolved.route = Route::Deliver {
                target: destination,
                dial: destination,
                proxy_header: None,
                waypoint: required.clone(),
            };

            let facts = Facts { id: peer.as_ref(), source, destination, request: None };
            let local = &resolved.local;
            let (kind, rule, notes) =
                match held_up(required.as_deref(), &local.namespace, peer.as_ref()) {
                    Some((kind, rule)) => (kind, Some(rule), Vec::new()),
                    None => {
                        interpret(&policies, Some(local), &local.authorization_policies, &facts)
                    }
                };
            let verdict = authorize(&set, &resolved, peer.as_ref());
            let found = found(&verdict);
            assert_eq!(found, (kind, rule), "{context:?}");
            let found: Vec<_> = verdict
                .notes
                .iter()
                .filter(|note| note.kind != NoteKind::WouldNotAllow)
                .map(|note| (note.kind, note.policy.clone()))
                .collect();
            assert_eq!(found, notes, "{context:?}");
            noted += u64::try_from(notes.len()).unwrap();
            *seen.entry(kind).or_default() += 1;

            if number % 8 == 0 {
                let explained = explain(&set, &resolved, peer.as_ref());
                let same = match (explained.outcome, verdict.decision) {
                    (Outcome::Allowed { rule }, Decision::Allow(permit)) => {
                        rule.as_ref() == permit.rule()
                    }
                    (Outcome::Denied(one), Decision::Deny(other)) => one == other,
                    (Outcome::Allowed { .. }, Decision::Deny(_))
                    | (Outcome::Denied(_), Decision::Allow(_)) => false,
                };
                assert!(same, "{context:?}");
            }
        }
    }
    let pairs: u64 = seen.values().sum();
    assert!(pairs >= 200_000, "{pairs}");
    println!("{seen:?}, notes {noted}");
    for (kind, percent) in [
        (Kind::AllowedByRule, 8),
        (Kind::AllowedByDefault, 8),
        (Kind::DenyMatched, 8),
        (Kind::NoAllowMatched, 8),
        (Kind::Missing, 3),
        (Kind::Bypassed, 3),
        (Kind::WaypointUnknown, 1),
    ] {
        let share = seen.get(&kind).copied().unwrap_or(0) * 100 / pairs;
        assert!(share >= percent, "{kind:?}: {share} % of {seen:?}");
    }
    assert!(noted > pairs / 20, "{noted}");
}

/// Ways out: whoever is known or tunnelled to may be reached, everybody else as networks and namespaces say.
#[test]
fn engine_and_interpreter_agree_on_generated_ways_out() {
    let mut resolved = template();
    resolved.flow.direction = Direction::Outbound;
    let mut seen: BTreeMap<Option<CloseReason>, u64> = BTreeMap::new();
    for seed in 0..1_000 {
        let mut random = Random(seed ^ 0xe6e5 << 32);
        let mut set = PolicySet::default();
        let networks = random.up_to(2, prefix);
        set.set_pod_networks(&networks);
        let denying: Vec<&str> = NAMESPACES.into_iter().filter(|_| random.chance(50)).collect();
        for namespace in NAMESPACES {
            // What was said before counts no more.
            set.set_egress(namespace, random.one(&[UnknownEgress::Allow, UnknownEgress::Deny]));
            let denies = denying.contains(&namespace);
            let says = if denies { UnknownEgress::Deny } else { UnknownEgress::Allow };
            set.set_egress(namespace, says);
        }
        for number in 0..20 {
            let namespace = random.one(&NAMESPACES);
            let target = SocketAddr::new(ip(&mut random), random.one(&PORTS));
            let known = random.chance(30);
            resolved.local = Arc::new(Workload::named("u", namespace, "p"));
            let tunnel = || TunnelRoute {
                next_hop: target,
                authority: Authority::Address(target),
                expected: Vec::new(),
                target_uid: WorkloadUid::new("t"),
                gateway: None,
            };
            let expected = match random.below(8) {
                0 => {
                    resolved.route = Route::Tunnel(tunnel());
                    None
                }
                1 => {
                    resolved.route =
                        Route::ViaWaypoint { tunnel: tunnel(), waypoint: "a/waypoint".into() };
                    None
                }
                2 => {
                    let (dial, proxy_header, waypoint) = (target, None, None);
                    resolved.route = Route::Deliver { target, dial, proxy_header, waypoint };
                    Some((CloseReason::Internal, None))
                }
                _ => {
                    resolved.route = Route::Passthrough { target, known };
                    let inside = networks.iter().any(|network| network.contains(target.ip()));
                    let rule = |name| Some(synthetic(namespace, name));
                    match (known, inside, denying.contains(&namespace)) {
                        (true, _, _) | (false, false, false) => None,
                        (false, true, _) => {
                            Some((CloseReason::UnknownDestination, rule("unknown-destination")))
                        }
                        (false, false, true) => {
                            Some((CloseReason::EgressDenied, rule("unknown-egress")))
                        }
                    }
                }
            };
            let found = match authorize_egress(&set, &resolved).decision {
                Decision::Allow(_) => None,
                Decision::Deny(denial) => Some((denial.reason, denial.rule)),
            };
            assert_eq!(found, expected, "{:?}", (seed, number));
            *seen.entry(expected.map(|(reason, _)| reason)).or_default() += 1;
        }
    }
    for (outcome, count) in &seen {
        assert!(*count > 1_000, "{outcome:?} of {seen:?}");
    }
    assert_eq!(seen.len(), 4, "{seen:?}");
}

/// The same policies at a waypoint: attached to what was dialled, and with their conditions on requests judged.
#[test]
fn engine_and_interpreter_agree_on_generated_policies_and_requests() {
    let texts = Texts::new();
    let mut seen: BTreeMap<Kind, u64> = BTreeMap::new();
    for seed in 0..SETS {
        let mut random = Random(seed ^ 0x5eed << 32);
        let mut policies = BTreeMap::new();
        let mut set = PolicySet::default();
        for _ in 0..random.below(6) {
            let policy = policy(&mut random, &texts);
            set.upsert(policy.clone());
            policies.insert(policy.name.clone(), policy);
        }
        for number in 0..FLOWS_PER_SET {
            let mut attached: Vec<Arc<str>> = Vec::new();
            for policy in policies.values().filter(|_| random.chance(60)) {
                attached.push(policy.name.to_string().into());
            }
            if random.chance(8) {
                attached.push("b/absent".into());
            }
            let peer = random.chance(75).then(|| identity(&mut random));
            let one = request_facts(&mut random);
            let facts = Facts {
                id: peer.as_ref(),
                source: ip(&mut random),
                destination: SocketAddr::new(ip(&mut random), random.one(&PORTS)),
                request: Some(&one),
            };
            let (kind, rule, _) = interpret(&policies, None, &attached, &facts);

            let connection = Connection {
                identity: facts.id,
                source_ip: facts.source,
                destination: facts.destination,
            };
            let method: Method = one.method.parse().unwrap();
            let path = RequestPath::parse(&one.path, PathNormalization::default()).unwrap();
            let headers: Vec<_> = one.headers.iter().collect();
            let mut map = HeaderMap::new();
            for (name, value) in headers {
                let value = HeaderValue::from_str(value).unwrap();
                map.append(HeaderName::from_static(name), value);
            }
            let claims = one.claims.as_ref().map(|claims| {
                RequestClaims::new(claims.as_object().unwrap().clone(), &["scope".into()])
            });
            let request =
                Request::new(&one.authority, &method, &path, &map).with_claims(claims.as_ref());
            let verdict = authorize_request(&set, &attached, &connection, &request);
            assert_eq!(found(&verdict), (kind, rule), "{:?}", (seed, number));
            *seen.entry(kind).or_default() += 1;

            if number % 8 == 0 {
                let explained = explain_request(&set, &attached, &connection, &request);
                let allowed = matches!(verdict.decision, Decision::Allow(_));
                assert_eq!(matches!(explained.outcome, Outcome::Allowed { .. }), allowed);
            }
        }
    }
    let pairs: u64 = seen.values().sum();
    assert!(pairs >= 200_000, "{pairs}");
    println!("{seen:?}");
    for kind in [
        Kind::AllowedByRule,
        Kind::AllowedByDefault,
        Kind::DenyMatched,
        Kind::NoAllowMatched,
        Kind::Missing,
    ] {
        let share = seen.get(&kind).copied().unwrap_or(0) * 100 / pairs;
        assert!(share >= 3, "{kind:?}: {share} % of {seen:?}");
    }
}
