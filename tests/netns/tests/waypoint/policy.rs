//! Policy on requests.

use anyhow::ensure;
use mesh_netns::manifest::authorization_policy;
use serde_json::json;

use crate::shop::{CART, Shop, at_service, equal};

/// DENY by method and path: 403, and its rule in the answer, the log and the metrics. No spelling of the path gets around it.
pub(crate) fn deny_by_path(shop: &mut Shop) -> anyhow::Result<()> {
    let rules = json!([{ "to": [{ "operation": { "methods": ["GET"], "paths": ["/admin*"] } }] }]);
    let object = authorization_policy("shop", "no-admin", &at_service("cart", "DENY", &rules));
    let admin = format!("http://{CART}/admin");
    let skip = shop.log().len();
    shop.with(
        &object,
        "the policy being in force",
        |shop| Ok(shop.status("client", &admin, &[])? == 403),
        |shop| {
            for path in [
                "/admin",
                "/admin/x",
                "/%61dmin",
                "//admin",
                "/x/../admin",
                "/./admin",
                "/x\\..\\admin",
            ] {
                let got =
                    shop.status("client", &format!("http://{CART}{path}"), &["--path-as-is"])?;
                equal(path, got, 403)?;
            }
            equal("another path", shop.status("client", &format!("http://{CART}/x"), &[])?, 200)?;
            equal("another method", shop.status("client", &admin, &["-X", "POST"])?, 200)?;
            let head = shop.get("client", &admin, &["-i"])?.stdout.to_lowercase();
            ensure!(
                head.contains("culvert-denied-by: authorizationpolicy shop/no-admin rule 0"),
                "{head}"
            );
            ensure!(head.contains("culvert-reason: policy_denied"), "{head}");
            let http2 = shop.status("client", &admin, &["--http2-prior-knowledge"])?;
            equal("HTTP/2", http2, 403)?;
            let line = shop.line(skip, &["path=\"/%61dmin\"", "status=403"])?;
            ensure!(
                line.contains("path.normal=\"/admin\"")
                    && line.contains("policy=\"AuthorizationPolicy shop/no-admin\" rule=0"),
                "{line}"
            );
            let counted = shop.sum(
                "culvert_waypoint_refused_total",
                &[
                    ("reason", "policy_denied"),
                    ("rule", "AuthorizationPolicy shop/no-admin rule 0"),
                ],
            )?;
            ensure!(counted >= 9.0, "{counted} refusals are counted");
            let counted = shop.sum("istio_requests_total", &[("response_code", "403")])?;
            ensure!(counted >= 9.0, "{counted} answers 403 are counted");
            Ok(())
        },
    )
}

/// A policy attached to the Gateway holds for everything behind it.
pub(crate) fn of_the_gateway(shop: &mut Shop) -> anyhow::Result<()> {
    let spec = json!({
        "targetRefs": [{ "group": "gateway.networking.k8s.io", "kind": "Gateway", "name": "waypoint" }],
        "action": "DENY",
        "rules": [{ "when": [{ "key": "request.headers[x-bad]", "values": ["*"] }] }],
    });
    let object = authorization_policy("shop", "no-bad", &spec);
    let bad = ["-H", "x-bad: 1"];
    shop.with(
        &object,
        "the policy being in force",
        |shop| Ok(shop.status("client", &format!("http://{CART}/"), &bad)? == 403),
        |shop| {
            equal("another service", shop.status("client", "http://10.96.1.3/", &bad)?, 403)?;
            equal("without", shop.status("client", "http://10.96.1.3/", &[])?, 200)
        },
    )
}

/// ALLOW: this identity, that method, and nothing else. gRPC gets its own form of a refusal.
pub(crate) fn allow_by_identity_and_method(shop: &mut Shop) -> anyhow::Result<()> {
    let rules = json!([{
        "from": [{ "source": { "principals": ["cluster.local/ns/shop/sa/client"] } }],
        "to": [{ "operation": { "methods": ["GET"] } }],
    }]);
    let object = authorization_policy("shop", "only-get", &at_service("cart", "ALLOW", &rules));
    let cart = format!("http://{CART}/");
    shop.with(
        &object,
        "the policy being in force",
        |shop| Ok(shop.status("client", &cart, &["-X", "PUT"])? == 403),
        |shop| {
            equal("GET of the client", shop.status("client", &cart, &[])?, 200)?;
            equal("GET of another", shop.status("visitor", &cart, &[])?, 403)?;
            equal("another service", shop.status("visitor", "http://10.96.1.3/", &[])?, 200)?;
            let grpc = shop.ask("client", &["grpc", &format!("{CART}:90"), "1"])?;
            ensure!(!grpc.success() && grpc.stderr.contains("policy_denied"), "{}", grpc.stderr);
            // What is no HTTP meets no condition on requests.
            let tcp = shop.ask("client", &["client-half-close", &format!("{CART}:92")])?;
            ensure!(!tcp.success(), "a connection went through");
            Ok(())
        },
    )
}

/// `culvert explain` runs the same tables.
pub(crate) fn explained(shop: &mut Shop) -> anyhow::Result<()> {
    let rules = json!([{ "to": [{ "operation": { "paths": ["/admin"] } }] }]);
    let object = authorization_policy("shop", "no-admin", &at_service("cart", "DENY", &rules));
    let ask = |shop: &Shop, path: &str| {
        shop.lab.culvert(&["explain", "shop/client", "cart.shop:80", "GET", path])
    };
    shop.with(
        &object,
        "the policy being in force",
        |shop| Ok(shop.status("client", &format!("http://{CART}/admin"), &[])? == 403),
        |shop| {
            let denied = ask(shop, "/%61dmin")?;
            ensure!(
                !denied.success()
                    && denied.stdout.contains("AuthorizationPolicy shop/no-admin rule 0"),
                "{}{}",
                denied.stdout,
                denied.stderr
            );
            let allowed = ask(shop, "/x")?;
            ensure!(allowed.success(), "{}{}", allowed.stdout, allowed.stderr);
            Ok(())
        },
    )
}
