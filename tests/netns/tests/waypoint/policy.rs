//! Policy on requests.

use anyhow::ensure;
use mesh_netns::manifest::{authorization_policy, http_route, of_service};
use mesh_netns::process::run;
use mesh_netns::wait::PATIENCE;
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

/// A path has one spelling, whatever a client writes and whatever the policy: that is judged, and that arrives.
pub(crate) fn one_form_of_a_path(shop: &mut Shop) -> anyhow::Result<()> {
    let rules = json!([{ "to": [{ "operation": {
        "paths": ["/user@home*", "/caf\u{e9}", "/a%3ab", "/{*}/b%7cc"],
    } }] }]);
    let object = authorization_policy("shop", "no-user", &at_service("cart", "DENY", &rules));
    let url = |path: &str| format!("http://{CART}:83{path}");
    let raw = ["--path-as-is", "--globoff"];
    shop.with(
        &object,
        "the policy being in force",
        |shop| Ok(shop.status("client", &url("/user@home"), &[])? == 403),
        |shop| {
            for path in [
                "/user%40home/x",
                "/%75ser%40%68ome",
                "/caf%c3%a9",
                "/caf%C3%A9",
                "/a:b",
                "/a%3Ab",
                "/x/b|c",
                "/x/b%7Cc",
            ] {
                equal(path, shop.status("client", &url(path), &raw)?, 403)?;
            }
            for path in ["/user@home;x", "/user@home%3bx", "/x;/../user@home", "/a%2Fb", "/%e9"] {
                let head = shop.get("client", &url(path), &["-i", "--path-as-is"])?.stdout;
                let head = head.to_lowercase();
                ensure!(
                    head.starts_with("http/1.1 400") && head.contains("culvert-reason: bad_path"),
                    "{path}: {head}"
                );
            }
            let seen = shop.seen("/%24%26(%2B)%2c%3D%20%25|", &raw)?;
            equal("what arrives", seen["path"].as_str(), Some("/$&(+),=%20%25%7C"))
        },
    )
}

/// A route to another service behind the same waypoint is judged by that service's policies too, in the form that is sent.
pub(crate) fn of_what_a_route_leads_to(shop: &mut Shop) -> anyhow::Result<()> {
    let rules = json!([{ "to": [{ "operation": { "paths": ["/secret*"] } }] }]);
    let policy = authorization_policy("shop", "no-secret", &at_service("v2", "DENY", &rules));
    let to_v2 = json!([{ "name": "v2", "port": 83 }]);
    let route = http_route(
        "shop",
        "cart",
        &json!({ "parentRefs": [of_service("cart")], "rules": [
            { "matches": [{ "path": { "value": "/open" } }], "backendRefs": to_v2, "filters": [
                { "type": "URLRewrite", "urlRewrite": {
                    "path": { "type": "ReplacePrefixMatch", "replacePrefixMatch": "/secret" } } },
            ] },
            { "matches": [{ "path": { "value": "/mine" } }], "backendRefs": [{ "name": "cart", "port": 83 }] },
            { "backendRefs": to_v2 },
        ] }),
    );
    let url = |path: &str| format!("http://{CART}:83{path}");
    shop.with(
        &route,
        "the route being in force",
        |shop| Ok(shop.get("client", &url("/x"), &[])?.stdout.contains("\"v2\"")),
        |shop| {
            shop.with(
                &policy,
                "the policy being in force",
                |shop| Ok(shop.status("client", "http://10.96.1.3:83/secret", &[])? == 403),
                |shop| {
                    let secret = shop.get("client", &url("/secret/x"), &["-i"])?.stdout;
                    let secret = secret.to_lowercase();
                    ensure!(
                        secret.starts_with("http/1.1 403")
                            && secret.contains("authorizationpolicy shop/no-secret rule 0"),
                        "{secret}"
                    );
                    equal("rewritten", shop.status("client", &url("/open/x"), &[])?, 403)?;
                    equal("another path", shop.status("client", &url("/x"), &[])?, 200)?;
                    equal("its own", shop.status("client", &url("/mine"), &[])?, 200)?;
                    let ask = |path| {
                        shop.lab.culvert(&["explain", "shop/client", "cart.shop:83", "GET", path])
                    };
                    let told = ask("/open/x")?;
                    ensure!(
                        !told.success() && told.stdout.contains("no-secret"),
                        "{}{}",
                        told.stdout,
                        told.stderr
                    );
                    ensure!(ask("/x")?.success(), "explain refuses what passes");
                    Ok(())
                },
            )
        },
    )
}

/// Waits longer than detection does before it asks.
const SLOW: &str = "import socket, sys, time\n\
    s = socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=10)\n\
    time.sleep(2.5)\n\
    s.sendall(b'GET /admin HTTP/1.1\\r\\nHost: cart\\r\\nConnection: close\\r\\n\\r\\n')\n\
    print(s.recv(65536).decode('latin-1'))\n";

/// Where a port does not say what it speaks and routes or policies on requests wait, nothing gets past them by being no HTTP or by
/// taking its time.
pub(crate) fn undeclared_ports(shop: &mut Shop) -> anyhow::Result<()> {
    let first = format!("{CART}:93");
    shop.ask("client", &["server-first", &first])?.output()?;
    let closed = |shop: &Shop| -> anyhow::Result<()> {
        let skip = shop.log().len();
        let tcp = shop.ask("client", &["client-half-close", &first])?;
        ensure!(!tcp.success(), "bytes went through");
        shop.line(skip, &["connection refused", "reason=\"not_http\""]).map(drop)
    };
    let slow = |shop: &Shop| -> anyhow::Result<String> {
        let mut python = shop.lab.pod("client").command("python3");
        run(python.args(["-c", SLOW, CART, "81"]), PATIENCE)?.output()
    };
    let rules = json!([{ "to": [{ "operation": { "paths": ["/admin"] } }] }]);
    let policy = authorization_policy("shop", "no-admin", &at_service("cart", "DENY", &rules));
    shop.with(
        &policy,
        "the policy being in force",
        |shop| Ok(shop.status("client", &format!("http://{CART}/admin"), &[])? == 403),
        |shop| {
            closed(shop)?;
            let answer = slow(shop)?;
            ensure!(answer.starts_with("HTTP/1.1 403"), "{answer}");
            Ok(())
        },
    )?;
    let rules = json!([{ "backendRefs": [{ "name": "v2", "port": 81 }] }]);
    let spec = json!({ "parentRefs": [of_service("cart")], "rules": rules });
    shop.with(
        &http_route("shop", "cart", &spec),
        "the route being in force",
        |shop| {
            Ok(shop.get("client", &format!("http://{CART}:81/"), &[])?.stdout.contains("from v2"))
        },
        |shop| {
            closed(shop)?;
            let answer = slow(shop)?;
            ensure!(answer.contains("hello from v2"), "not by the route: {answer}");
            shop.line(0, &["path=\"/admin\"", "HTTPRoute shop/cart rule 0"]).map(drop)
        },
    )?;
    shop.ask("client", &["server-first", &first])?.output().map(drop)
}
