//! Routes at the waypoint.

use anyhow::ensure;
use mesh_netns::manifest::{http_route, of_service};
use mesh_netns::traffic::Traffic;
use mesh_netns::wait::{PATIENCE, until};
use serde_json::{Value, json};

use crate::shop::{CART, Shop, equal, header};

fn to(name: &str) -> Value {
    json!({ "name": name, "port": 83 })
}

fn route(rules: &Value) -> Value {
    http_route("shop", "cart", &json!({ "parentRefs": [of_service("cart")], "rules": rules }))
}

fn server(shop: &Shop, path: &str, extra: &[&str]) -> anyhow::Result<String> {
    Ok(shop.seen(path, extra)?["server"].as_str().unwrap_or_default().to_owned())
}

/// A header leads to another version; weights are met; a request that no rule matches is not found.
pub(crate) fn by_header(shop: &mut Shop) -> anyhow::Result<()> {
    let rules = json!([
        { "matches": [{ "headers": [{ "name": "x-version", "value": "2" }] }], "backendRefs": [to("v2")] },
        { "matches": [{ "path": { "value": "/both" } }], "backendRefs": [
            { "name": "v1", "port": 83, "weight": 1 }, { "name": "v2", "port": 83, "weight": 1 },
        ] },
        { "matches": [{ "path": { "value": "/one" } }], "backendRefs": [to("v1")] },
    ]);
    let two = ["-H", "x-version: 2"];
    shop.with(
        &route(&rules),
        "the route being in force",
        |shop| Ok(shop.status("client", &format!("http://{CART}:83/x"), &[])? == 404),
        |shop| {
            equal("with the header", server(shop, "/x", &two)?, "v2".to_owned())?;
            equal("without", server(shop, "/one", &[])?, "v1".to_owned())?;
            // A longer path goes before a header, as the API orders.
            equal("a longer path", server(shop, "/one", &two)?, "v1".to_owned())?;
            equal("no rule", shop.status("client", &format!("http://{CART}:83/x"), &[])?, 404)?;
            let mut counts = [0, 0];
            for _ in 0..60 {
                counts[usize::from(server(shop, "/both", &[])? == "v2")] += 1;
            }
            ensure!(counts.iter().all(|count| *count >= 12), "1 to 1 gave {counts:?}");
            let status = shop.lab.culvert(&["status", "controller", "-o", "json"])?;
            let status: Value = serde_json::from_str(&status.stdout)?;
            let told = &status["routes"]["HTTPRoute shop/cart"];
            equal("accepted", told["accepted"].as_bool(), Some(true))?;
            equal("resolved", told["resolved_refs"].as_bool(), Some(true))
        },
    )
}

/// Headers are changed, paths rewritten, redirects given, copies sent.
pub(crate) fn filters(shop: &mut Shop) -> anyhow::Result<()> {
    let rules = json!([
        {
            "matches": [{ "path": { "value": "/old" } }],
            "filters": [
                { "type": "RequestHeaderModifier", "requestHeaderModifier": {
                    "set": [{ "name": "x-set", "value": "1" }], "remove": ["x-gone"] } },
                { "type": "ResponseHeaderModifier", "responseHeaderModifier": {
                    "add": [{ "name": "x-answer", "value": "yes" }], "remove": ["x-server"] } },
                { "type": "URLRewrite", "urlRewrite": {
                    "hostname": "new.example", "path": { "type": "ReplacePrefixMatch", "replacePrefixMatch": "/new" } } },
            ],
            "backendRefs": [to("v1")],
        },
        {
            "matches": [{ "path": { "value": "/moved" } }],
            "filters": [{ "type": "RequestRedirect", "requestRedirect": { "scheme": "https", "hostname": "x.example", "statusCode": 301 } }],
        },
        {
            "matches": [{ "path": { "value": "/copied" } }],
            "filters": [{ "type": "RequestMirror", "requestMirror": { "backendRef": to("v2") } }],
            "backendRefs": [to("v1")],
        },
    ]);
    let moved = format!("http://{CART}:83/moved/a?b=c");
    shop.with(
        &route(&rules),
        "the route being in force",
        |shop| Ok(shop.status("client", &moved, &[])? == 301),
        |shop| {
            let got = shop.get(
                "client",
                &format!("http://{CART}:83/old/a?q=1"),
                &["-i", "-H", "x-gone: 1", "-H", "x-kept: 1"],
            )?;
            let lower = got.stdout.to_lowercase();
            ensure!(lower.contains("x-answer: yes") && !lower.contains("x-server:"), "{lower}");
            let seen: Value =
                serde_json::from_str(got.stdout.split("\r\n\r\n").last().unwrap_or_default())?;
            equal("path", seen["path"].as_str(), Some("/new/a?q=1"))?;
            equal("host", header(&seen, "host"), Some("new.example"))?;
            equal("set", header(&seen, "x-set"), Some("1"))?;
            equal("removed", header(&seen, "x-gone"), None)?;
            equal("kept", header(&seen, "x-kept"), Some("1"))?;
            let got = shop.get("client", &moved, &["-i"])?.stdout.to_lowercase();
            ensure!(got.contains("location: https://x.example/moved/a?b=c"), "{got}");
            let copied = format!("/copied/{}", std::process::id());
            equal("the answer's server", server(shop, &copied, &[])?, "v1".to_owned())?;
            until("the copy at v2", PATIENCE, || {
                let log = shop.lab.pod("v2").folder().join("v2-seen.log");
                Ok(std::fs::read_to_string(log)?.contains(&copied).then_some(()))
            })
        },
    )
}

/// A backend that is not there answers 500 for its rule alone, and status says why and what to do.
pub(crate) fn invalid_references(shop: &mut Shop) -> anyhow::Result<()> {
    let rules = json!([
        { "matches": [{ "path": { "value": "/gone" } }], "backendRefs": [to("nobody")] },
        { "matches": [{ "path": { "value": "/far" } }], "backendRefs": [{ "name": "x", "namespace": "other", "port": 80 }] },
        { "matches": [{ "path": { "value": "/" } }], "backendRefs": [to("v1")] },
    ]);
    let gone = format!("http://{CART}:83/gone");
    shop.with(
        &route(&rules),
        "the route being in force",
        |shop| Ok(shop.status("client", &gone, &[])? == 500),
        |shop| {
            let far = shop.status("client", &format!("http://{CART}:83/far"), &[])?;
            equal("another namespace's service", far, 500)?;
            equal("the other rule", server(shop, "/x", &[])?, "v1".to_owned())?;
            let status = shop.lab.culvert(&["status", "controller"])?.stdout;
            ensure!(
                status.contains("there is no Service shop/nobody")
                    && status.contains("ReferenceGrant"),
                "{status}"
            );
            Ok(())
        },
    )
}

/// Statuses are tried again as the route says, and an answer that takes too long is not waited for.
pub(crate) fn retries_and_timeouts(shop: &mut Shop) -> anyhow::Result<()> {
    let rules = json!([
        { "matches": [{ "path": { "value": "/flaky" } }], "backendRefs": [to("v1")],
          "retry": { "codes": [503], "attempts": 2, "backoff": "10ms" } },
        { "matches": [{ "path": { "value": "/slow" } }], "backendRefs": [to("v1")], "timeouts": { "request": "300ms" } },
        { "matches": [{ "path": { "value": "/v2" } }], "backendRefs": [to("v2")] },
    ]);
    shop.with(
        &route(&rules),
        "the route being in force",
        |shop| {
            Ok(shop.status("client", &format!("http://{CART}:83/v2"), &[])? == 200
                && server(shop, "/v2", &[])? == "v2")
        },
        |shop| {
            let flaky = format!("http://{CART}:83/flaky");
            equal("the third attempt", shop.status("client", &flaky, &[])?, 200)?;
            let posted = ["-d", "again"];
            equal("with a body", shop.status("client", &flaky, &posted)?, 200)?;
            shop.line(0, &["path=\"/flaky\"", "retries=2", "status=200"])?;
            let slow = format!("http://{CART}:83/slow");
            equal("slow", shop.status("client", &slow, &[])?, 504)?;
            shop.line(0, &["path=\"/slow\"", "reason=request_timeout"]).map(drop)
        },
    )
}

/// Routes come, change and go under traffic: no request fails.
pub(crate) fn change_under_traffic(shop: &mut Shop) -> anyhow::Result<()> {
    let traffic = Traffic::start(shop, "client", "route-change", &format!("http://{CART}:83/x"))?;
    traffic.more(20, "\"server\": \"v1\"")?;
    let object = |name: &str| route(&json!([{ "backendRefs": [to(name)] }]));
    for name in ["v2", "v1", "v2"] {
        shop.lab.apply(&object(name))?;
        traffic.more(20, &format!("\"server\": \"{name}\""))?;
    }
    shop.lab.delete(&object("v1"))?;
    traffic.more(20, "\"server\": \"v1\"")?;
    let counted = traffic.finish()?;
    ensure!(
        counted.failed == 0 && counted.made >= 100,
        "{} of {} failed:\n{}",
        counted.failed,
        counted.made,
        counted.log
    );
    Ok(())
}

/// A GRPCRoute sends a service's calls elsewhere.
pub(crate) fn of_grpc(shop: &mut Shop) -> anyhow::Result<()> {
    let object = json!({
        "apiVersion": "gateway.networking.k8s.io/v1", "kind": "GRPCRoute",
        "metadata": { "name": "echo", "namespace": "shop" },
        "spec": { "parentRefs": [of_service("cart")], "rules": [{
            "matches": [{ "method": { "service": "lab.echo.v1.Echo" } }],
            "backendRefs": [{ "name": "v2", "port": 90 }],
        }] },
    });
    let echo = format!("{CART}:90");
    let skip = shop.log().len();
    shop.with(
        &object,
        "the route being in force",
        // What is no call of that service is found by no rule then.
        |shop| Ok(shop.status("client", &format!("http://{CART}/"), &[])? == 404),
        |shop| {
            shop.ask("client", &["grpc", &echo, "20"])?.output()?;
            let parts =
                ["path=\"/lab.echo.v1.Echo/Chat\"", "GRPCRoute shop/echo rule 0", "grpc_status=0"];
            let line = shop.line(skip, &parts)?;
            ensure!(line.contains("upstream.workload=\"v2\""), "{line}");
            Ok(())
        },
    )
}

/// A route of a client's namespace counts for that namespace alone, and needs leave for what it refers to.
pub(crate) fn of_a_consumer(shop: &mut Shop) -> anyhow::Result<()> {
    let spec = json!({
        "parentRefs": [{ "group": "", "kind": "Service", "name": "cart", "namespace": "shop" }],
        "rules": [{ "backendRefs": [{ "name": "v2", "namespace": "shop", "port": 83 }] }],
    });
    let grant = json!({
        "apiVersion": "gateway.networking.k8s.io/v1", "kind": "ReferenceGrant",
        "metadata": { "name": "other", "namespace": "shop" },
        "spec": {
            "from": [{ "group": "gateway.networking.k8s.io", "kind": "HTTPRoute", "namespace": "other" }],
            "to": [{ "group": "", "kind": "Service" }],
        },
    });
    let url = format!("http://{CART}:83/consumer");
    let status = |shop: &Shop| shop.status("visitor", &url, &[]);
    shop.with(
        &http_route("other", "mine", &spec),
        "the route being in force",
        |shop| Ok(status(shop)? != 200),
        |shop| {
            equal("without a grant", status(shop)?, 500)?;
            equal("another client", server(shop, "/consumer", &[])?, "v1".to_owned())?;
            shop.lab.apply(&grant)?;
            let granted = until("the grant being in force", PATIENCE, || {
                let got = shop.get("visitor", &url, &[])?.stdout;
                Ok(got.contains("\"server\": \"v2\"").then_some(()))
            });
            shop.lab.delete(&grant)?;
            granted?;
            until("the grant being gone", PATIENCE, || Ok((status(shop)? == 500).then_some(())))?;
            equal("another client", server(shop, "/consumer", &[])?, "v1".to_owned())
        },
    )
}

/// A server that takes a request and says nothing: who may be asked again is, and what is not idempotent arrives once.
pub(crate) fn nothing_is_done_twice(shop: &mut Shop) -> anyhow::Result<()> {
    let rules = json!([
        { "matches": [{ "path": { "value": "/drop" } }], "backendRefs": [to("v1")],
          "retry": { "codes": [503], "attempts": 2, "backoff": "10ms" } },
        { "matches": [{ "path": { "value": "/v2" } }], "backendRefs": [to("v2")] },
    ]);
    let log = shop.lab.pod("v1").folder().join("v1-seen.log");
    let arrived = |line: &str| -> anyhow::Result<usize> {
        Ok(std::fs::read_to_string(&log)?.lines().filter(|one| *one == line).count())
    };
    let url = format!("http://{CART}:83/drop");
    shop.with(
        &route(&rules),
        "the route being in force",
        |shop| {
            Ok(shop.status("client", &format!("http://{CART}:83/v2"), &[])? == 200
                && server(shop, "/v2", &[])? == "v2")
        },
        |shop| {
            equal("POST", shop.status("client", &url, &["-d", "once"])?, 503)?;
            equal("POSTs that arrived", arrived("POST /drop")?, 1)?;
            equal("GET", shop.status("client", &url, &[])?, 503)?;
            let count = arrived("GET /drop")?;
            ensure!(count >= 3, "{count} GETs arrived");
            Ok(())
        },
    )
}

/// A request that has gone through too many waypoints goes nowhere, and servers do not see the count.
pub(crate) fn round_in_circles(shop: &mut Shop) -> anyhow::Result<()> {
    let url = format!("http://{CART}:83/circle");
    let head = shop.get("client", &url, &["-i", "-H", "culvert-hops: 8"])?.stdout.to_lowercase();
    ensure!(
        head.starts_with("http/1.1 508") && head.contains("culvert-reason: loop_detected"),
        "{head}"
    );
    let seen = shop.seen("/circle", &["-H", "culvert-hops: 3"])?;
    equal("the count", header(&seen, "culvert-hops"), None)
}
