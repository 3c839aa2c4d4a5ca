use mesh_route::{PathMatch, RouteMatch};
use serde_json::json;

use super::*;
use crate::manifest::{Object, Parsed, object};

fn route(kind: &str, spec: serde_json::Value) -> Result<Arc<RouteObject>, InvalidField> {
    let manifest = json!({
        "apiVersion": "gateway.networking.k8s.io/v1", "kind": kind,
        "metadata": { "name": "r", "namespace": "shop" }, "spec": spec,
    });
    match object(&manifest) {
        Parsed::Object(object) => {
            let (Object::HttpRoute(route) | Object::GrpcRoute(route)) = &*object else {
                panic!("{object:?}")
            };
            Ok(Arc::clone(route))
        }
        Parsed::Refused { reason, .. } => Err(reason),
        Parsed::Ignored { kind } => panic!("{kind} ignored"),
    }
}

#[test]
fn a_route_is_read_whole() {
    let read = route(
        "HTTPRoute",
        json!({
            "parentRefs": [{ "group": "", "kind": "Service", "name": "cart", "port": 80 }],
            "rules": [{
                "name": "new",
                "matches": [{
                    "path": { "type": "Exact", "value": "/a" },
                    "headers": [{ "name": "X-Version", "value": "2" }],
                }],
                "filters": [
                    { "type": "RequestHeaderModifier", "requestHeaderModifier": { "set": [{ "name": "x-a", "value": "b" }] } },
                    { "type": "RequestMirror", "requestMirror": { "backendRef": { "name": "copy", "port": 80 }, "percent": 5 } },
                ],
                "backendRefs": [{ "name": "v2", "port": 80, "weight": 3 }],
                "timeouts": { "request": "10s" },
                "retry": { "codes": [503], "attempts": 2 },
            }],
        }),
    )
    .unwrap();
    let rule = &read.rules[0];
    let RouteMatch::Http(matched) = &rule.matches[0] else { panic!("not HTTP") };
    assert_eq!(matched.path, Some(PathMatch::Exact("/a".into())));
    assert_eq!(matched.headers[0].name, "x-version");
    assert_eq!(rule.backends[0].weight, 3);
    assert_eq!(rule.filters.mirrors[0].share.numerator, 5);
    let named: Vec<_> = read.services().map(|service| &*service.name).collect();
    assert_eq!(named, ["copy", "v2"]);
    // What travels to waypoints is the same.
    let sent = serde_json::to_string(&read.with(Vec::new(), read.rules.clone())).unwrap();
    let heard: Route = serde_json::from_str(&sent).unwrap();
    assert_eq!(heard.rules, read.rules);
}

#[test]
fn what_cannot_be_meant_is_refused_with_its_field() {
    let rule = |rule: serde_json::Value| json!({ "rules": [rule] });
    for (spec, field) in [
        (
            rule(json!({ "matches": [{ "path": { "type": "Glob", "value": "/" } }] })),
            "spec.rules[0].matches[0].path.type",
        ),
        (rule(json!({ "matches": [{ "host": "x" }] })), "spec.rules[0].matches[0].host"),
        (
            rule(json!({ "matches": [{ "path": { "type": "RegularExpression", "value": "(" } }] })),
            "spec.rules[0]",
        ),
        (
            rule(json!({ "backendRefs": [{ "name": "a", "port": 0 }] })),
            "spec.rules[0].backendRefs[0].port",
        ),
        (
            rule(json!({ "backendRefs": [{ "name": "a", "port": 1, "weight": -1 }] })),
            "spec.rules[0].backendRefs[0].weight",
        ),
        (rule(json!({ "timeouts": { "request": "soon" } })), "spec.rules[0].timeouts.request"),
        (
            rule(
                json!({ "filters": [{ "type": "RequestHeaderModifier", "requestHeaderModifier": { "set": [{ "name": "Content-Length", "value": "1" }] } }] }),
            ),
            "spec.rules[0].filters[0].requestHeaderModifier.set",
        ),
        (
            rule(
                json!({ "filters": [{ "type": "RequestRedirect", "requestRedirect": { "statusCode": 200 } }] }),
            ),
            "spec.rules[0].filters[0].requestRedirect.statusCode",
        ),
        (json!({ "hostnames": ["a_b"] }), "spec.hostnames[0]"),
    ] {
        let refused = route("HTTPRoute", spec.clone()).unwrap_err();
        assert_eq!(refused.field(), field, "{spec} {refused:?}");
        assert!(!refused.remedy.is_empty());
    }
}

#[test]
fn filters_and_backends_that_are_not_known_answer_500() {
    let read = route(
        "GRPCRoute",
        json!({ "rules": [
            { "filters": [{ "type": "ExtensionRef", "extensionRef": { "group": "x", "kind": "Wasm", "name": "w" } }] },
            { "backendRefs": [{ "group": "x", "kind": "Bucket", "name": "b" }] },
        ] }),
    )
    .unwrap();
    assert!(read.rules[0].filters.unresolved.as_deref().unwrap().contains("Wasm w"));
    assert!(
        matches!(&read.rules[1].backends[0].target, BackendTarget::Invalid { reason } if reason.contains("Bucket"))
    );
}
