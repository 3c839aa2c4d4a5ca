//! The decisions that operators count on, one by one.

#![expect(clippy::unwrap_used, reason = "a test's own values are valid")]

use std::sync::Arc;
use std::time::Instant;

use http::{HeaderMap, HeaderValue, Method};
use mesh_authorize::{
    Action, Clause, Connection, Decision, DenialDetail, HeaderMatch, Match, MissingPolicy,
    NoteKind, PathMatch, Policy, PolicyKind, PolicyName, PolicyOrigin, PolicyScope, PolicySet,
    Request, RequestMatch, Rule, StringMatch, UnknownEgress, UnreadablePolicy, Verdict, authorize,
    authorize_egress, authorize_request, explain,
};
use mesh_model::{
    ClientAddr, CloseReason, Direction, Flow, FlowId, OrigDst, PathNormalization, PodUid,
    RequestPath, SpiffeId, Workload,
};
use mesh_resolve::{
    RequiredWaypoint, ResolveSettings, ResolvedFlow, Route, WorkloadIndex, resolve, resolve_inbound,
};

const CART: &str = "spiffe://cluster.local/ns/shop/sa/cart";

fn flow(direction: Direction, destination: &str) -> Flow {
    Flow {
        id: FlowId(1),
        direction,
        client: ClientAddr::new("10.0.0.9:4000".parse().unwrap()),
        orig_dst: OrigDst::new(destination.parse().unwrap()),
        pod: PodUid::new("p"),
        #[expect(clippy::disallowed_methods, reason = "a stamp nothing looks at")]
        accepted_at: Instant::now(),
    }
}

fn inbound(destination: &str, listed: &[&str]) -> ResolvedFlow {
    let mut local = Workload::named("u", "shop", "p");
    local.authorization_policies = listed.iter().map(|name| (*name).into()).collect();
    let flow = flow(Direction::InboundPlaintext, destination);
    let index = WorkloadIndex::default();
    let mut resolved =
        resolve_inbound(&index, &ResolveSettings::default(), &flow, &Arc::new(local), None)
            .unwrap();
    resolved.flow.direction = Direction::InboundTunnel;
    resolved
}

fn outbound() -> ResolvedFlow {
    let flow = flow(Direction::Outbound, "1.1.1.1:443");
    let source = Arc::new(Workload::named("u", "shop", "p"));
    resolve(&WorkloadIndex::default(), &ResolveSettings::default(), &flow, &source, 0).unwrap()
}

fn policy(name: &str, scope: PolicyScope, action: Action, matches: Vec<Match>) -> Policy {
    let name: PolicyName = name.parse().unwrap();
    Policy {
        origin: PolicyOrigin {
            kind: PolicyKind::AuthorizationPolicy,
            namespace: name.namespace.clone(),
            name: name.name.clone(),
            unreadable: None,
        },
        name,
        scope,
        action,
        dry_run: false,
        rules: matches
            .into_iter()
            .map(|one| Rule { clauses: vec![Clause { matches: vec![one] }] })
            .collect(),
    }
}

fn from(principal: StringMatch) -> Match {
    Match { principals: vec![principal], ..Match::default() }
}

fn without_identity() -> Match {
    Match { not_principals: vec![StringMatch::Presence], ..Match::default() }
}

fn set(policies: impl IntoIterator<Item = Policy>) -> PolicySet {
    let mut set = PolicySet::default();
    for policy in policies {
        set.upsert(policy);
    }
    set
}

/// "allow", or the reason and the rule of the denial.
fn check(set: &PolicySet, resolved: &ResolvedFlow, peer: Option<&str>) -> String {
    let peer: Option<SpiffeId> = peer.map(|text| text.parse().unwrap());
    words(authorize(set, resolved, peer.as_ref()))
}

fn words(verdict: Verdict) -> String {
    match verdict.decision {
        Decision::Allow(_) => "allow".into(),
        Decision::Deny(denial) => {
            let rule = denial.rule.map_or_else(|| "-".to_owned(), |rule| rule.to_string());
            format!("{}: {rule}", denial.reason)
        }
    }
}

#[test]
fn an_empty_set_allows_and_an_empty_allow_policy_denies() {
    let resolved = inbound("10.0.0.1:80", &[]);
    assert_eq!(check(&PolicySet::default(), &resolved, None), "allow");
    let nothing = policy("shop/nothing", PolicyScope::Namespace, Action::Allow, vec![]);
    let denied = "policy_denied: AuthorizationPolicy shop/nothing";
    assert_eq!(check(&set([nothing.clone()]), &resolved, Some(CART)), denied);
    let everything = Policy { rules: vec![Rule::default()], ..nothing.clone() };
    assert_eq!(check(&set([everything]), &resolved, Some(CART)), "allow");
    let no_op = Policy { action: Action::Deny, ..nothing };
    assert_eq!(check(&set([no_op]), &resolved, Some(CART)), "allow");
}

#[test]
fn deny_wins_over_allow_and_names_its_rule() {
    let exact = || from(StringMatch::Exact("cluster.local/ns/shop/sa/cart".into()));
    let allow = policy("shop/allow-cart", PolicyScope::Namespace, Action::Allow, vec![exact()]);
    let other = from(StringMatch::Exact("cluster.local/ns/shop/sa/other".into()));
    let deny = policy("root/no-cart", PolicyScope::Global, Action::Deny, vec![other, exact()]);
    let resolved = inbound("10.0.0.1:80", &[]);
    assert_eq!(check(&set([allow.clone()]), &resolved, Some(CART)), "allow");
    let not_allowed = "policy_denied: AuthorizationPolicy shop/allow-cart";
    assert_eq!(check(&set([allow.clone()]), &resolved, None), not_allowed);
    let denied = "policy_denied: AuthorizationPolicy root/no-cart rule 1";
    assert_eq!(check(&set([allow, deny]), &resolved, Some(CART)), denied);
}

#[test]
fn plaintext_proves_nothing_whatever_is_given() {
    let allow =
        policy("shop/a", PolicyScope::Namespace, Action::Allow, vec![from(StringMatch::Presence)]);
    let mut resolved = inbound("10.0.0.1:80", &[]);
    assert_eq!(check(&set([allow.clone()]), &resolved, Some(CART)), "allow");
    resolved.flow.direction = Direction::InboundPlaintext;
    assert!(check(&set([allow]), &resolved, Some(CART)).starts_with("policy_denied"));
}

#[test]
fn strict_denies_plaintext_except_on_exempted_ports() {
    let strict =
        policy("root/strict", PolicyScope::Workload, Action::Deny, vec![without_identity()]);
    let exempt = Match { not_destination_ports: vec![9090], ..Match::default() };
    let mut with_exemption =
        policy("shop/strict-but", PolicyScope::Workload, Action::Deny, vec![without_identity()]);
    with_exemption.rules[0].clauses.push(Clause { matches: vec![exempt] });
    let port = |port| Match { destination_ports: vec![port], ..without_identity() };
    let only_ports =
        policy("shop/ports", PolicyScope::Workload, Action::Deny, vec![port(80), port(81)]);
    let set = set([strict, with_exemption, only_ports]);
    for (listed, destination, peer, allowed) in [
        ("root/strict", "10.0.0.1:80", None, false),
        ("root/strict", "10.0.0.1:80", Some(CART), true),
        ("shop/strict-but", "10.0.0.1:80", None, false),
        ("shop/strict-but", "10.0.0.1:9090", None, true),
        ("shop/ports", "10.0.0.1:80", None, false),
        ("shop/ports", "10.0.0.1:81", None, false),
        ("shop/ports", "10.0.0.1:82", None, true),
        ("shop/ports", "10.0.0.1:81", Some(CART), true),
    ] {
        let outcome = check(&set, &inbound(destination, &[listed]), peer);
        assert_eq!(outcome == "allow", allowed, "{listed} {destination} {peer:?}: {outcome}");
    }
}

#[test]
fn scope_changes_take_effect_both_ways() {
    let deny = policy("shop/d", PolicyScope::Workload, Action::Deny, vec![without_identity()]);
    let resolved = inbound("10.0.0.1:80", &[]);
    let mut set = set([deny.clone()]);
    assert_eq!(check(&set, &resolved, None), "allow");
    let mut last = set.revision();
    for (scope, allowed) in [
        (PolicyScope::Namespace, false),
        (PolicyScope::Workload, true),
        (PolicyScope::Global, false),
        (PolicyScope::Namespace, false),
    ] {
        let revision = set.upsert(Policy { scope, ..deny.clone() });
        assert!(revision > last);
        last = revision;
        assert_eq!(check(&set, &resolved, None) == "allow", allowed, "{scope:?}");
    }
    set.remove(&deny.name);
    assert_eq!(check(&set, &resolved, None), "allow");
    assert_eq!(set.policies().len(), 0);
    assert_eq!(set.remove(&deny.name), set.revision());
}

#[test]
fn other_namespaces_policies_do_not_apply() {
    let deny = policy("bank/d", PolicyScope::Namespace, Action::Deny, vec![without_identity()]);
    assert_eq!(check(&set([deny]), &inbound("10.0.0.1:80", &[]), None), "allow");
}

#[test]
fn a_listed_policy_that_is_missing_denies() {
    let resolved = inbound("10.0.0.1:80", &["shop/lost", "not a name"]);
    let mut set = PolicySet::default();
    let verdict = authorize(&set, &resolved, None);
    let Decision::Deny(denial) = verdict.decision else { panic!("allowed") };
    assert_eq!(denial.reason, CloseReason::PolicyMissing);
    assert_eq!(denial.to_string(), "policies not received: shop/lost, not a name");
    set.set_missing(MissingPolicy::Ignore);
    assert_eq!(check(&set, &resolved, None), "allow");
}

#[test]
fn dry_run_and_audit_only_leave_notes() {
    let dry = |name, action, matches| Policy {
        dry_run: true,
        ..policy(name, PolicyScope::Namespace, action, matches)
    };
    let other = || from(StringMatch::Prefix("other/".into()));
    let policies = set([
        policy("shop/audit", PolicyScope::Namespace, Action::Audit, vec![without_identity()]),
        policy("shop/quiet", PolicyScope::Namespace, Action::Audit, vec![other()]),
        dry("shop/dry-deny", Action::Deny, vec![without_identity()]),
        dry("shop/dry-allow", Action::Allow, vec![other()]),
    ]);
    let verdict = authorize(&policies, &inbound("10.0.0.1:80", &[]), None);
    assert!(matches!(verdict.decision, Decision::Allow(_)));
    let notes: Vec<_> =
        verdict.notes.iter().map(|note| (note.kind, note.rule.to_string())).collect();
    let expected = [
        (NoteKind::Audit, "AuthorizationPolicy shop/audit rule 0"),
        (NoteKind::WouldDeny, "AuthorizationPolicy shop/dry-deny rule 0"),
        (NoteKind::WouldNotAllow, "AuthorizationPolicy shop/dry-allow"),
    ];
    assert_eq!(notes, expected.map(|(kind, rule)| (kind, rule.to_owned())));
}

#[test]
fn denial_names_the_allow_policies_considered() {
    let policies = (0..10).map(|number| {
        let name = format!("shop/allow-{number}");
        policy(&name, PolicyScope::Namespace, Action::Allow, vec![without_identity()])
    });
    let peer = CART.parse().unwrap();
    let verdict = authorize(&set(policies), &inbound("10.0.0.1:80", &[]), Some(&peer));
    let Decision::Deny(denial) = verdict.decision else { panic!("allowed") };
    let DenialDetail::NoAllowMatched { considered, more } = &denial.detail else {
        panic!("{denial:?}")
    };
    assert_eq!((considered.len(), *more), (8, 2));
    assert_eq!(considered[0].to_string(), "AuthorizationPolicy shop/allow-0");
}

#[test]
fn required_waypoint_is_the_only_way_in() {
    let mut resolved = inbound("10.0.0.1:80", &[]);
    let with = |resolved: &mut ResolvedFlow, identities: Vec<SpiffeId>| {
        let Route::Deliver { waypoint, .. } = &mut resolved.route else { panic!("not inbound") };
        *waypoint = Some(Arc::new(RequiredWaypoint { names: vec!["shop/wp".into()], identities }));
    };
    with(&mut resolved, vec!["spiffe://cluster.local/ns/shop/sa/wp".parse().unwrap()]);
    let empty = PolicySet::default();
    assert_eq!(check(&empty, &resolved, Some("spiffe://cluster.local/ns/shop/sa/wp")), "allow");
    let bypassed = "policy_denied: Synthetic shop/waypoint-required";
    assert_eq!(check(&empty, &resolved, Some(CART)), bypassed);
    assert_eq!(check(&empty, &resolved, None), bypassed);
    with(&mut resolved, Vec::new());
    let unknown = "waypoint_unavailable: Synthetic shop/waypoint-required";
    assert_eq!(check(&empty, &resolved, Some(CART)), unknown);
}

#[test]
fn unknown_egress_is_denied_where_the_namespace_says_so() {
    let mut resolved = outbound();
    let mut set = PolicySet::default();
    assert!(matches!(authorize_egress(&set, &resolved).decision, Decision::Allow(_)));
    set.set_egress("shop", UnknownEgress::Deny);
    let Decision::Deny(denial) = authorize_egress(&set, &resolved).decision else {
        panic!("allowed")
    };
    assert_eq!(denial.reason, CloseReason::EgressDenied);
    set.set_egress("bank", UnknownEgress::Deny);
    set.set_egress("shop", UnknownEgress::Allow);
    assert!(matches!(authorize_egress(&set, &resolved).decision, Decision::Allow(_)));
    set.set_egress("shop", UnknownEgress::Deny);
    if let Route::Passthrough { known, .. } = &mut resolved.route {
        *known = true;
    }
    assert!(matches!(authorize_egress(&set, &resolved).decision, Decision::Allow(_)));
}

#[test]
fn an_address_of_the_clusters_own_pods_is_not_outside_the_mesh() {
    let mut resolved = outbound();
    let mut set = PolicySet::default();
    set.set_pod_networks(&["10.0.0.0/8".parse().unwrap(), "1.1.0.0/16".parse().unwrap()]);
    let Decision::Deny(denial) = authorize_egress(&set, &resolved).decision else {
        panic!("allowed")
    };
    assert_eq!(denial.reason, CloseReason::UnknownDestination);
    assert!(denial.to_string().contains("1.1.1.1"), "{denial}");
    let stamp = set.revision();
    set.set_pod_networks(&["10.0.0.0/8".parse().unwrap()]);
    assert_ne!(set.revision(), stamp);
    assert!(matches!(authorize_egress(&set, &resolved).decision, Decision::Allow(_)));
    set.set_pod_networks(&["1.1.1.1".parse().unwrap()]);
    if let Route::Passthrough { known, .. } = &mut resolved.route {
        *known = true;
    }
    assert!(matches!(authorize_egress(&set, &resolved).decision, Decision::Allow(_)));
}

#[test]
fn flows_judged_at_the_wrong_end_are_denied() {
    let set = PolicySet::default();
    assert_eq!(check(&set, &outbound(), Some(CART)), "internal: -");
    let verdict = authorize_egress(&set, &inbound("10.0.0.1:80", &[]));
    assert!(matches!(verdict.decision, Decision::Deny(_)));
}

#[test]
fn explanation_says_what_did_not_hold_and_survives_json() {
    let other = Match { destination_ports: vec![81], ..from(StringMatch::Presence) };
    let allow = policy("shop/a", PolicyScope::Namespace, Action::Allow, vec![other]);
    let peer = CART.parse().unwrap();
    let explained = explain(&set([allow]), &inbound("10.0.0.1:80", &[]), Some(&peer));
    let step = &explained.policies[0];
    assert_eq!(step.to_string(), "ALLOW AuthorizationPolicy shop/a: no rule matches");
    let text = step.rules[0].to_string();
    assert_eq!(text, "rule 0: clause 0 does not hold for its destination port");
    let json = serde_json::to_string(&explained).unwrap();
    assert_eq!(serde_json::from_str::<mesh_authorize::Explanation>(&json).unwrap(), explained);
}

#[test]
fn an_unreadable_policy_denies_what_it_could_be_about() {
    let resolved = inbound("10.0.0.1:80", &[]);
    let unreadable = |name: &str, scope| UnreadablePolicy {
        name: name.parse().unwrap(),
        scope,
        reason: "action: unknown value 9".into(),
    };
    let denied = |name: &str| {
        format!("policy_missing: AuthorizationPolicy {name} (unreadable: action: unknown value 9)")
    };
    for (name, scope, expected) in [
        ("root/x", PolicyScope::Global, denied("root/x")),
        ("shop/x", PolicyScope::Namespace, denied("shop/x")),
        ("bank/x", PolicyScope::Namespace, "allow".to_owned()),
        // Whoever lists it is refused for its absence, as before.
        ("shop/x", PolicyScope::Workload, "allow".to_owned()),
    ] {
        let mut set = PolicySet::default();
        set.set_unreadable(unreadable(name, scope));
        assert_eq!(check(&set, &resolved, Some(CART)), expected, "{name} {scope:?}");
        set.set_missing(MissingPolicy::Ignore);
        assert_eq!(check(&set, &resolved, Some(CART)), "allow", "compat, {name} {scope:?}");
    }

    // Neither an ALLOW that matches nor a DENY that does not makes up for it; a DENY that matches is named first.
    let everyone = policy("shop/all", PolicyScope::Namespace, Action::Allow, vec![]);
    let mut set = set([Policy { rules: vec![Rule::default()], ..everyone.clone() }]);
    let before = set.revision();
    set.set_unreadable(unreadable("root/x", PolicyScope::Global));
    assert_ne!(set.revision(), before);
    assert_eq!(check(&set, &resolved, Some(CART)), denied("root/x"));
    let same = set.revision();
    assert_eq!(set.set_unreadable(unreadable("root/x", PolicyScope::Global)), same);
    let Decision::Deny(denial) = authorize(&set, &resolved, None).decision else {
        panic!("allowed");
    };
    let text = "denied by AuthorizationPolicy root/x (unreadable: action: unknown value 9)";
    assert_eq!(denial.to_string(), text);

    // It ends with a readable one of its name, or with its removal.
    let readable = policy("root/x", PolicyScope::Global, Action::Deny, vec![]);
    let mut replaced = set.clone();
    replaced.upsert(readable.clone());
    assert_eq!(check(&replaced, &resolved, Some(CART)), "allow");
    replaced.set_unreadable(unreadable("root/x", PolicyScope::Global));
    let before = replaced.revision();
    assert_ne!(replaced.upsert(readable), before, "the same policy again lifts the mark");
    assert_eq!(check(&replaced, &resolved, Some(CART)), "allow");
    set.remove(&"root/x".parse().unwrap());
    assert_eq!((check(&set, &resolved, Some(CART)), set.unreadable().len()), ("allow".into(), 0));
}

#[test]
fn what_stands_in_for_an_unreadable_object_is_named_as_that() {
    let resolved = inbound("10.0.0.1:80", &[]);
    let mut stand_in = policy("shop/unreadable_p", PolicyScope::Namespace, Action::Deny, vec![]);
    stand_in.rules = vec![Rule::default()];
    stand_in.origin = PolicyOrigin {
        unreadable: Some("spec.action: \"MAYBE\" is not known".into()),
        ..PolicyOrigin::new(PolicyKind::AuthorizationPolicy, "shop", "p")
    };
    let expected = "policy_missing: AuthorizationPolicy shop/p (unreadable: spec.action: \"MAYBE\" is not known)";
    assert_eq!(check(&set([stand_in.clone()]), &resolved, Some(CART)), expected);
    // One that refuses what proves no identity only, as for a PeerAuthentication.
    let strict = Clause { matches: vec![without_identity()] };
    stand_in.rules = vec![Rule { clauses: vec![strict] }];
    assert_eq!(check(&set([stand_in.clone()]), &resolved, Some(CART)), "allow");
    assert_eq!(check(&set([stand_in]), &resolved, None), expected);
}

/// What a waypoint with these policies attached says of `METHOD authority/path`, with one header `x-tenant` if given.
fn ask(set: &PolicySet, attached: &[&str], request: &str, tenant: Option<&'static str>) -> String {
    let (method, url) = request.split_once(' ').unwrap();
    let (authority, _) = url.split_once('/').unwrap();
    let method: Method = method.parse().unwrap();
    let path = RequestPath::parse(&url[authority.len()..], PathNormalization::default()).unwrap();
    let mut headers = HeaderMap::new();
    if let Some(tenant) = tenant {
        headers.insert("x-tenant", HeaderValue::from_static(tenant));
    }
    let peer: SpiffeId = CART.parse().unwrap();
    let connection = Connection {
        identity: Some(&peer),
        source_ip: "10.0.0.9".parse().unwrap(),
        destination: "10.0.0.1:80".parse().unwrap(),
    };
    let attached: Vec<Arc<str>> = attached.iter().map(|name| (*name).into()).collect();
    let request = Request::new(authority, &method, &path, &headers);
    words(authorize_request(set, &attached, &connection, &request))
}

fn on_request(request: RequestMatch) -> Match {
    Match { request, ..Match::default() }
}

#[test]
fn a_waypoint_judges_what_is_attached_to_it_by_the_request() {
    let exact = |text: &str| StringMatch::Exact(text.into());
    let admin = RequestMatch {
        paths: vec![PathMatch::Text(StringMatch::Prefix("/admin".into()))],
        ..RequestMatch::default()
    };
    let users = RequestMatch {
        hosts: vec![exact("Cart.shop")],
        methods: vec![exact("GET")],
        paths: vec![PathMatch::Template("/users/{*}".parse().unwrap())],
        headers: vec![HeaderMatch {
            name: "x-tenant".into(),
            values: vec![StringMatch::Presence],
            not_values: vec![exact("evil")],
        }],
        ..RequestMatch::default()
    };
    let set = set([
        policy("shop/no-admin", PolicyScope::Workload, Action::Deny, vec![on_request(admin)]),
        policy("shop/users", PolicyScope::Workload, Action::Allow, vec![on_request(users)]),
        policy("shop/nothing", PolicyScope::Namespace, Action::Allow, vec![]),
    ]);
    let (deny, allow) = (&["shop/no-admin"][..], &["shop/users"][..]);
    let denied = "policy_denied: AuthorizationPolicy shop/no-admin rule 0";
    for path in ["/admin", "/%61dmin", "/x/../admin/y", "//admin"] {
        assert_eq!(ask(&set, deny, &format!("GET cart{path}"), None), denied, "{path}");
    }
    assert_eq!(ask(&set, deny, "GET cart/x", None), "allow", "policies by scope are the agents'");
    assert_eq!(ask(&set, &[], "GET cart/admin", None), "allow");
    let not_allowed = "policy_denied: AuthorizationPolicy shop/users";
    for (request, tenant, verdict) in [
        ("GET cart.shop/users/1", Some("a"), "allow"),
        ("GET CART.shop.:80/users/1", Some("a"), "allow"),
        ("GET cart.shop/users/1", Some("evil"), not_allowed),
        ("GET cart.shop/users/1", Some(""), not_allowed),
        ("GET cart.shop/users/1", None, not_allowed),
        ("PUT cart.shop/users/1", Some("a"), not_allowed),
        ("GET cart.shop/users/1/2", Some("a"), not_allowed),
        ("GET other/users/1", Some("a"), not_allowed),
    ] {
        assert_eq!(ask(&set, allow, request, tenant), verdict, "{request} {tenant:?}");
    }
    assert_eq!(ask(&set, &["shop/gone"], "GET cart/x", None), "policy_missing: -");
}

#[test]
fn paths_of_policies_are_spelt_as_those_of_requests() {
    let paths = [
        PathMatch::Text(StringMatch::Exact("/caf\u{e9}".into())),
        PathMatch::Text(StringMatch::Prefix("/user%40home".into())),
        PathMatch::Text(StringMatch::Suffix(".b%7cc".into())),
        PathMatch::Template("/x y/{*}".parse().unwrap()),
    ];
    let request = RequestMatch { paths: paths.into(), ..RequestMatch::default() };
    let deny = policy("shop/p", PolicyScope::Workload, Action::Deny, vec![on_request(request)]);
    let set = set([deny]);
    let denied = "policy_denied: AuthorizationPolicy shop/p rule 0";
    for (path, verdict) in [
        ("/caf%c3%a9", denied),
        ("/cafe", "allow"),
        ("/user@home/x", denied),
        ("/%75ser%40home", denied),
        ("/a.b|c", denied),
        ("/a.b%7Cc", denied),
        ("/x%20y/z", denied),
        ("/x+y/z", "allow"),
    ] {
        assert_eq!(ask(&set, &["shop/p"], &format!("GET cart{path}"), None), verdict, "{path}");
    }
}

#[test]
fn policies_that_decide_by_requests_are_known() {
    let get =
        RequestMatch { methods: vec![StringMatch::Exact("GET".into())], ..RequestMatch::default() };
    let scope = PolicyScope::Workload;
    let of_requests = |name, action| policy(name, scope, action, vec![on_request(get.clone())]);
    let mut dry = of_requests("shop/dry", Action::Deny);
    dry.dry_run = true;
    let set = set([
        of_requests("shop/deny", Action::Deny),
        of_requests("shop/allow", Action::Allow),
        of_requests("shop/audit", Action::Audit),
        dry,
        policy("shop/l4", scope, Action::Deny, vec![without_identity()]),
    ]);
    for (attached, asks) in [
        (&["shop/deny"][..], true),
        (&["shop/l4", "shop/allow"], true),
        (&["shop/l4", "shop/audit", "shop/dry", "shop/gone"], false),
        (&[], false),
    ] {
        let attached: Vec<Arc<str>> = attached.iter().map(|name| (*name).into()).collect();
        assert_eq!(set.asks_for_requests(&attached), asks, "{attached:?}");
    }
}

#[test]
fn an_agent_lets_nothing_through_for_want_of_seeing_the_request() {
    let get = || RequestMatch {
        methods: vec![StringMatch::Exact("GET".into())],
        ..RequestMatch::default()
    };
    let not_get = RequestMatch { methods: vec![], not_methods: get().methods, ..get() };
    let other = Match {
        request: get(),
        ..from(StringMatch::Exact("cluster.local/ns/shop/sa/other".into()))
    };
    let resolved = inbound("10.0.0.1:80", &[]);
    for request in [get(), not_get] {
        let verdict = |action| {
            let matches = vec![on_request(request.clone())];
            let set = set([policy("shop/p", PolicyScope::Namespace, action, matches)]);
            check(&set, &resolved, Some(CART))
        };
        assert_eq!(verdict(Action::Deny), "policy_denied: AuthorizationPolicy shop/p rule 0");
        assert_eq!(verdict(Action::Allow), "policy_denied: AuthorizationPolicy shop/p");
    }
    let narrower = policy("shop/p", PolicyScope::Namespace, Action::Deny, vec![other]);
    assert_eq!(check(&set([narrower]), &resolved, Some(CART)), "allow");
}
