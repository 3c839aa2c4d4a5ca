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
    let rule = "{from: [{source: {requestPrincipals: ['*']}}], to: [{operation: {paths: [/x]}}]}";
    let target = "{kind: Service, name: cart}";
    let allow = policy_text("allow", target, "ALLOW", rule);
    let deny = policy_text("deny", target, "DENY", rule);
    let index = index_of(&format!("{BOUND}{allow}{deny}"));
    assert!(policy(&index, "shop/allow").rules.is_empty(), "it allows nothing");
    let denied = &policy(&index, "shop/deny").rules[0];
    assert_eq!(denied.clauses.len(), 1, "it denies the path, whoever asks");
    let status = index.policy_status();
    assert!(status.values().all(|one| one.notes[0].contains("requestPrincipals")), "{status:?}");
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
