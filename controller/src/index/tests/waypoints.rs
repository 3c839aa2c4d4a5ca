//! What waypoints are told.

use mesh_authorize::PathMatch;
use mesh_route::BackendTarget;

use super::*;

const BOUND: &str = "---\napiVersion: v1\nkind: Service\nmetadata: {name: cart, namespace: shop, labels: {culvert.dev/use-waypoint: wp}}\nspec: {clusterIP: 10.96.0.1, ports: [{name: http-web, port: 80, targetPort: 8080}]}\n";

fn route(metadata: &str, backend: &str) -> String {
    format!(
        "---\napiVersion: gateway.networking.k8s.io/v1\nkind: HTTPRoute\nmetadata: {{{metadata}}}\nspec: {{parentRefs: [{{group: '', kind: Service, name: cart, namespace: shop}}], rules: [{{backendRefs: [{{{backend}}}]}}]}}\n"
    )
}

fn policy_text(name: &str, target: &str, action: &str, rule: &str) -> String {
    format!(
        "---\napiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {{name: {name}, namespace: shop}}\nspec: {{targetRefs: [{target}], action: {action}, rules: [{rule}]}}\n"
    )
}

#[test]
fn a_bound_service_is_a_frontend_with_its_policies() {
    let deny = "to: [{operation: {methods: [GET], paths: [/admin*, '/u/{*}']}}]";
    let mut text = BOUND.to_owned();
    text.push_str(&policy_text(
        "deny",
        "{kind: Service, name: cart}",
        "DENY",
        &format!("{{{deny}}}"),
    ));
    let gateway = "{group: gateway.networking.k8s.io, kind: Gateway, name: wp}";
    text.push_str(&policy_text(
        "all",
        gateway,
        "DENY",
        "{when: [{key: 'request.headers[X-Bad]', values: ['*']}]}",
    ));
    let index = index_of(&text);
    let frontends: Vec<_> = index.frontends().collect();
    assert_eq!(frontends.len(), 2, "the service, and the Gateway though it does not exist");
    let cart = &frontends[0].config;
    assert_eq!(cart.frontend, FrontendName::service("shop", "cart"));
    assert_eq!(cart.policies, ["shop/deny".into()]);
    assert_eq!(cart.ports[0].port, 80);
    assert_eq!(cart.ports[0].protocol, mesh_wire::AppProtocol::Http1);
    assert!(frontends[0].waypoints.contains("waypoint/shop/wp"));
    assert_eq!(frontends[1].config.policies, ["shop/all".into()]);
    let deny = policy(&index, "shop/deny");
    let request = &deny.rules[0].clauses[0].matches[0].request;
    assert_eq!(request.methods.len(), 1);
    assert!(matches!(request.paths[..], [PathMatch::Text(_), PathMatch::Template(_)]));
    let header = &policy(&index, "shop/all").rules[0].clauses[0].matches[0].request.headers[0];
    assert_eq!(&*header.name, "x-bad");
    let status = index.policy_status();
    let told: Vec<_> = status.values().map(|one| (one.enforced_as_written, &*one.place)).collect();
    assert_eq!(told[1], (true, "the waypoint of service shop/cart"));
}

#[test]
fn what_a_waypoint_cannot_judge_fails_closed() {
    let rule =
        "{from: [{source: {remoteIpBlocks: [10.0.0.0/8]}}], to: [{operation: {paths: [/x]}}]}";
    let target = "{kind: Service, name: cart}";
    let allow = policy_text("allow", target, "ALLOW", rule);
    let deny = policy_text("deny", target, "DENY", rule);
    let index = index_of(&format!("{BOUND}{allow}{deny}"));
    assert!(policy(&index, "shop/allow").rules.is_empty(), "it allows nothing");
    let denied = &policy(&index, "shop/deny").rules[0];
    assert_eq!(denied.clauses.len(), 1, "it denies the path, whoever asks");
    let status = index.policy_status();
    assert!(status.values().all(|one| one.notes[0].contains("remoteIpBlocks")), "{status:?}");
}

#[test]
fn references_are_resolved_and_told() {
    let far = "{apiVersion: v1, kind: Service, metadata: {name: far, namespace: other}, spec: {clusterIP: 10.96.0.9, ports: [{port: 80}]}}";
    let text = format!(
        "{BOUND}{}---\n{far}\n",
        route("name: r, namespace: shop", "name: far, namespace: other, port: 80")
    );
    let mut index = index_of(&text);
    let reason = |index: &Index| {
        let route = index.routes().next().expect("accepted");
        match &route.route.rules[0].backends[0].target {
            BackendTarget::Service(_) => None,
            BackendTarget::Invalid { reason } => Some(reason.to_string()),
        }
    };
    assert!(reason(&index).expect("not granted").contains("RefNotPermitted"));
    let grant = "apiVersion: gateway.networking.k8s.io/v1\nkind: ReferenceGrant\nmetadata: {name: g, namespace: other}\nspec: {from: [{group: gateway.networking.k8s.io, kind: HTTPRoute, namespace: shop}], to: [{group: '', kind: Service}]}";
    let delta = index.apply(upserts(grant));
    assert_eq!((delta.routes.len(), delta.frontends.len()), (1, 0), "one small delta");
    assert_eq!(reason(&index), None);
    index.apply(upserts(&far.replace("port: 80", "port: 81")));
    assert!(reason(&index).expect("no such port").contains("has no port 80"));
    let (_, status) = index.route_status().next().unwrap();
    assert!(status.accepted && !status.resolved_refs, "{status:?}");
    // Unbound, nobody serves it.
    let delta = index.apply(upserts(&BOUND.replace("culvert.dev/use-waypoint: wp", "a: b")));
    assert_eq!((delta.removed_routes.len(), delta.removed_frontends.len()), (1, 1));
    let (_, status) = index.route_status().next().unwrap();
    assert!(status.parents[0].contains("no waypoint is bound"), "{status:?}");
}

#[test]
fn a_waypoint_gets_the_identity_of_its_pods_alone() {
    let pod = "{apiVersion: v1, kind: Pod, metadata: {name: p, namespace: shop, labels: {gateway.networking.k8s.io/gateway-name: wp}}, spec: {nodeName: n, serviceAccountName: wp}, status: {phase: Running, podIP: 10.0.0.1}}";
    let index = index_of(&format!("---\n{pod}\n"));
    let id = |account: &str| SpiffeId::new("cluster.local", "shop", account).unwrap();
    assert!(index.runs_on("waypoint/shop/wp", &id("wp")));
    assert!(!index.runs_on("waypoint/shop/wp", &id("cart")));
    assert!(!index.runs_on("waypoint/shop/other", &id("wp")));
    assert!(!index.runs_on("waypoint/else/wp", &id("wp")));
    assert!(index.runs_on("n", &id("wp")));
}

const KEYS: &str = r#"{"keys":[{"kty":"OKP","crv":"Ed25519","kid":"k","x":"BaWrmCbyHYDKaFC34kAeX6LAzvVa7WVB1G-R1PmVoPw"}]}"#;

fn tokens(metadata: &str, spec: &str) -> String {
    format!(
        "---\napiVersion: security.istio.io/v1\nkind: RequestAuthentication\nmetadata: {{{metadata}}}\nspec: {{{spec}jwtRules: [{{issuer: i, jwks: '{KEYS}'}}]}}\n"
    )
}

fn listed(index: &Index, name: &str) -> (Vec<String>, Vec<String>) {
    let frontend = index.frontends().find(|one| *one.config.frontend.name == *name);
    let config = &frontend.expect("a frontend").config;
    let names = |list: &[Arc<str>]| list.iter().map(ToString::to_string).collect();
    (names(&config.authentications), names(&config.workload_authentications))
}

const SELECTING: &str = "---\napiVersion: v1\nkind: Service\nmetadata: {name: web, namespace: shop, labels: {culvert.dev/use-waypoint: wp}}\nspec: {clusterIP: 10.96.0.2, selector: {app: web, tier: front}, ports: [{port: 80}]}\n---\napiVersion: gateway.networking.k8s.io/v1\nkind: Gateway\nmetadata: {name: wp, namespace: shop}\nspec: {gatewayClassName: culvert-waypoint}\n";

#[test]
fn what_tokens_count_is_told_where_it_holds() {
    let gateway = "targetRefs: [{group: gateway.networking.k8s.io, kind: Gateway, name: wp}], ";
    let text = [
        BOUND,
        SELECTING,
        &tokens("name: cart, namespace: shop", "targetRefs: [{kind: Service, name: cart}], "),
        &tokens("name: gateway, namespace: shop", gateway),
        &tokens("name: wide, namespace: shop", ""),
        &tokens("name: web, namespace: shop", "selector: {matchLabels: {app: web}}, "),
        &tokens("name: some, namespace: shop", "selector: {matchLabels: {app: web, zone: a}}, "),
        &tokens("name: root, namespace: istio-system", ""),
        &tokens("name: other, namespace: other", ""),
    ]
    .concat();
    let mut index = index_of(&text);
    let strings = |list: &[&str]| list.iter().map(ToString::to_string).collect::<Vec<_>>();
    assert_eq!(listed(&index, "cart").0, strings(&["istio-system/root", "shop/cart", "shop/wide"]));
    assert_eq!(listed(&index, "web").0, strings(&["istio-system/root", "shop/web", "shop/wide"]));
    assert_eq!(
        listed(&index, "wp"),
        (strings(&["istio-system/root", "shop/gateway"]), strings(&["shop/wide"]))
    );
    assert_eq!(index.authentications().count(), 7);
    let status = index.policy_status();
    let of = |name: &str| {
        let found = status.iter().find(|(key, _)| *key.name == *name);
        found.map(|(_, one)| (one.enforced_as_written, one.notes.join("; "))).expect("a status")
    };
    for name in ["cart", "gateway", "wide", "web", "root"] {
        assert_eq!(of(name), (true, String::new()), "{name}");
    }
    assert!(of("some").1.contains("selects only such workloads"), "{:?}", of("some"));
    assert!(of("other").1.contains("no service is behind a waypoint"), "{:?}", of("other"));

    // It goes everywhere at once, and what cannot be read is named although nobody has it.
    let gone = ObjectKey {
        kind: Kind::RequestAuthentication,
        namespace: "shop".into(),
        name: "wide".into(),
    };
    let delta = index.apply([Change::Delete(gone)]);
    assert_eq!(delta.removed_authentications, ["shop/wide".into()]);
    assert_eq!(delta.frontends.len(), 3);
    let value = serde_json::json!({
        "apiVersion": "security.istio.io/v1", "kind": "RequestAuthentication",
        "metadata": {"name": "bad", "namespace": "shop"},
        "spec": {"targetRefs": [{"kind": "Service", "name": "web"}], "jwtRules": [{"issuer": ""}]},
    });
    let Parsed::Refused { unreadable: Some(unreadable), .. } = crate::manifest::object(&value)
    else {
        panic!("it is refused");
    };
    let delta = index.apply([Change::Upsert(Arc::new(Object::Unreadable(Arc::new(*unreadable))))]);
    let unknown = "shop/unreadable_RequestAuthentication_bad".to_owned();
    assert!(listed(&index, "web").0.contains(&unknown));
    assert!(!listed(&index, "cart").0.contains(&unknown));
    assert!(delta.policies.is_empty() && delta.authentications.is_empty());
    assert!(index.policy_status().values().any(|one| one.denying));
}

#[test]
fn conditions_on_tokens_are_the_waypoints() {
    let rule = "{from: [{source: {requestPrincipals: ['i/*'], notRequestPrincipals: ['i/x']}}], when: [\
        {key: 'request.auth.claims[realm][roles]', values: [a]}, {key: request.auth.audiences, values: [shop]}, \
        {key: request.auth.presenter, notValues: [p]}, {key: request.auth.principal, values: ['*']}]}";
    let allow = policy_text("allow", "{kind: Service, name: cart}", "ALLOW", rule);
    let index = index_of(&format!("{BOUND}{allow}"));
    let clauses = &policy(&index, "shop/allow").rules[0].clauses;
    assert_eq!(clauses.len(), 5);
    let request = |at: usize| &clauses[at].matches[0].request;
    assert_eq!((request(0).principals.len(), request(0).not_principals.len()), (1, 1));
    assert_eq!(*request(1).claims[0].path, ["realm".into(), "roles".into()]);
    assert_eq!(*request(2).claims[0].path, ["aud".into()]);
    assert_eq!(*request(3).claims[0].path, ["azp".into()]);
    assert_eq!(request(4).principals.len(), 1);
    // Without a waypoint nobody is allowed by it.
    let unbound =
        index_of(&format!("{}{allow}", BOUND.replace("culvert.dev/use-waypoint: wp", "a: b")));
    let status = unbound.policy_status();
    let notes = &status.values().next().expect("a status").notes;
    assert!(
        notes[0].contains("requestPrincipals")
            && notes[0].contains("request.auth.claims[realm][roles]")
    );
}
