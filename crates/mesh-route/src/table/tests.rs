use std::time::Duration;

use http::{HeaderMap, HeaderName, HeaderValue, Method};
use mesh_model::{PathNormalization, RequestPath};

use super::*;
use crate::route::{GrpcMatch, HeaderMatch, HttpMatch, PathMatch, QueryMatch, TextMatch};

const SERVICE_PORT: u16 = 80;

pub(crate) fn service() -> FrontendName {
    FrontendName::service("shop", "cart")
}

fn parent(port: Option<u16>, section: Option<&str>) -> Parent {
    Parent { frontend: service(), port, section: section.map(Into::into) }
}

pub(crate) fn http_route(namespace: &str, name: &str, rules: Vec<Rule>) -> Route {
    Route {
        name: RouteName::new(RouteKind::Http, namespace, name),
        created_at_s: Some(1),
        parents: vec![parent(None, None)],
        hostnames: Vec::new(),
        rules,
    }
}

pub(crate) fn rule(name: &str, matches: Vec<HttpMatch>) -> Rule {
    Rule {
        name: Some(name.into()),
        matches: matches.into_iter().map(RouteMatch::Http).collect(),
        ..Rule::default()
    }
}

pub(crate) fn prefix(path: &str) -> HttpMatch {
    HttpMatch { path: Some(PathMatch::Prefix(path.into())), ..HttpMatch::default() }
}

fn exact(path: &str) -> HttpMatch {
    HttpMatch { path: Some(PathMatch::Exact(path.into())), ..HttpMatch::default() }
}

fn regex(path: &str) -> HttpMatch {
    HttpMatch { path: Some(PathMatch::Regex(path.into())), ..HttpMatch::default() }
}

fn header(mut of: HttpMatch, name: &'static str, value: &str) -> HttpMatch {
    let name = HeaderName::from_static(name);
    of.headers.push(HeaderMatch { name, value: TextMatch::Exact(value.into()) });
    of
}

fn query(mut of: HttpMatch, name: &str, value: &str) -> HttpMatch {
    of.query.push(QueryMatch { name: name.into(), value: TextMatch::Exact(value.into()) });
    of
}

fn frontend(ports: &[(u16, &str)]) -> RouteChange {
    let ports = ports
        .iter()
        .map(|(port, name)| FrontendPort { port: *port, section: Some((*name).into()) })
        .collect();
    RouteChange::Frontend(Frontend { name: service(), ports })
}

pub(crate) fn table(routes: impl IntoIterator<Item = Route>) -> RouteTable {
    let mut table = RouteTable::default();
    let changes = routes.into_iter().map(RouteChange::Upsert);
    let changes = [frontend(&[(80, "http"), (8080, "admin")])].into_iter().chain(changes);
    assert_eq!(table.apply(changes), []);
    table
}

/// The rule's name, "unrouted" or "not found", of `METHOD authority/path header=value ...`.
fn ask(table: &RouteTable, port: u16, client: Option<&str>, request: &str) -> String {
    let mut words = request.split(' ');
    let method: Method = words.next().unwrap().parse().unwrap();
    let url = words.next().unwrap();
    let (authority, _) = url.split_once('/').unwrap_or((url, ""));
    let path = if url.len() == authority.len() { "*" } else { &url[authority.len()..] };
    let path = RequestPath::parse(path, PathNormalization::default()).unwrap();
    let mut headers = HeaderMap::new();
    for header in words {
        let (name, value) = header.split_once('=').unwrap();
        let name: HeaderName = name.parse().unwrap();
        headers.append(name, HeaderValue::from_str(value).unwrap());
    }
    let head = RequestHead { method: &method, authority, path: &path, headers: &headers };
    let frontend = match head.host().to_ascii_lowercase().ends_with("example.org") {
        true => FrontendName::gateway("edge", "front"),
        false => service(),
    };
    match table.select(&frontend, port, client, &head) {
        Selection::Unrouted => "unrouted".to_owned(),
        Selection::NotFound => "not found".to_owned(),
        Selection::Selected(selected) => selected.rule().name.as_deref().unwrap().to_owned(),
    }
}

fn check(table: &RouteTable, cases: &[(&str, &str)]) {
    for (request, rule) in cases {
        assert_eq!(ask(table, SERVICE_PORT, None, request), *rule, "{request}");
    }
}

#[test]
fn a_service_without_routes_is_unrouted_and_one_with_them_answers_not_found() {
    check(&table([]), &[("GET cart/", "unrouted")]);
    let table = table([http_route("shop", "r", vec![rule("a", vec![prefix("/a")])])]);
    check(&table, &[("GET cart/a", "a"), ("GET cart/b", "not found")]);
    assert_eq!(ask(&table, 81, None, "GET cart/a"), "unrouted");
}

#[test]
fn prefixes_are_whole_segments() {
    let rules = vec![
        rule("a", vec![prefix("/a")]),
        rule("a/b", vec![prefix("/a/b/")]),
        rule("exact", vec![exact("/a/b")]),
        rule("slash", vec![exact("/s/")]),
    ];
    let table = table([http_route("shop", "r", rules)]);
    check(
        &table,
        &[
            ("GET cart/a", "a"),
            ("GET cart/a/", "a"),
            ("GET cart/a/c/d", "a"),
            ("GET cart/ab", "not found"),
            ("GET cart/a/b", "exact"),
            ("GET cart/a/b/", "a/b"),
            ("GET cart/a/b/c", "a/b"),
            ("GET cart/a/bc", "a"),
            ("GET cart/x/../a/%62", "exact"),
            ("GET cart/A", "not found"),
            ("GET cart/s", "not found"),
            ("GET cart/s/", "slash"),
            ("OPTIONS cart", "not found"),
        ],
    );
}

#[test]
fn the_specifications_order_decides() {
    let get = |of: HttpMatch| HttpMatch { method: Some(Method::GET), ..of };
    let rules = vec![
        rule("all", vec![]),
        rule("prefix", vec![prefix("/a")]),
        rule("query", vec![query(prefix("/a"), "q", "1")]),
        rule("two-queries", vec![query(query(prefix("/a"), "q", "1"), "p", "1")]),
        rule("header", vec![header(prefix("/a"), "x-h", "1")]),
        rule("method", vec![get(prefix("/a"))]),
        rule("longer", vec![prefix("/a/b")]),
        rule("regex", vec![regex("/a/b/[0-9]+")]),
        rule("longer-regex", vec![regex("/a/b/[0-9][0-9]+")]),
        rule("exact", vec![exact("/a/b/12")]),
        rule("late", vec![exact("/a/b/12")]),
        rule("or", vec![exact("/x"), exact("/y")]),
    ];
    let table = table([http_route("shop", "r", rules)]);
    check(
        &table,
        &[
            ("PUT cart/", "all"),
            ("PUT cart/a", "prefix"),
            ("PUT cart/a?q=1", "query"),
            ("PUT cart/a?q=2&q=1", "prefix"),
            ("PUT cart/a?p=1&q=1", "two-queries"),
            ("PUT cart/a?p=1&q=1 x-h=1", "header"),
            ("PUT cart/a x-h=1 x-h=1", "prefix"),
            ("GET cart/a x-h=1", "method"),
            ("GET cart/a/b x-h=1", "longer"),
            ("GET cart/a/b/1", "regex"),
            ("GET cart/a/b/13", "longer-regex"),
            ("GET cart/a/b/12", "exact"),
            ("GET cart/a/b/12/", "longer"),
            ("GET cart/x", "or"),
            ("GET cart/y", "or"),
        ],
    );
}

#[test]
fn ties_go_to_the_older_route_and_then_by_name() {
    let route = |namespace: &str, name: &str, created_at_s| Route {
        created_at_s,
        ..http_route(namespace, name, vec![rule(name, vec![prefix("/")])])
    };
    let first = |routes: Vec<Route>| ask(&table(routes), SERVICE_PORT, None, "GET cart/");
    assert_eq!(first(vec![route("shop", "a", Some(2)), route("shop", "b", Some(1))]), "b");
    assert_eq!(first(vec![route("shop", "a", None), route("shop", "b", Some(9))]), "b");
    assert_eq!(first(vec![route("shop", "b", Some(1)), route("shop", "a", Some(1))]), "a");
}

#[test]
fn consumer_routes_replace_the_producers_for_clients_of_their_namespace_only() {
    let table = table([
        http_route("shop", "p", vec![rule("producer", vec![prefix("/")])]),
        http_route("web", "c", vec![rule("consumer", vec![prefix("/a")])]),
    ]);
    for (client, path, rule) in [
        (Some("web"), "GET cart/a", "consumer"),
        (Some("web"), "GET cart/b", "not found"),
        (Some("shop"), "GET cart/a", "producer"),
        (Some("other"), "GET cart/a", "producer"),
        (None, "GET cart/a", "producer"),
    ] {
        assert_eq!(ask(&table, SERVICE_PORT, client, path), rule, "{client:?} {path}");
    }
}

#[test]
fn a_parent_may_name_a_port_or_a_section() {
    let on = |name: &str, parents| Route {
        parents,
        ..http_route("shop", name, vec![rule(name, vec![prefix(&format!("/{name}"))])])
    };
    let table = table([
        on("port", vec![parent(Some(80), None)]),
        on("section", vec![parent(None, Some("admin"))]),
        on("both", vec![parent(Some(80), Some("admin"))]),
        on("any", vec![parent(None, None), parent(Some(80), None)]),
    ]);
    for (port, path, rule) in [
        (80, "GET cart/port", "port"),
        (8080, "GET cart/port", "not found"),
        (80, "GET cart/section", "not found"),
        (8080, "GET cart/section", "section"),
        (80, "GET cart/both", "not found"),
        (8080, "GET cart/both", "not found"),
        (80, "GET cart/any", "any"),
        (8080, "GET cart/any", "any"),
    ] {
        assert_eq!(ask(&table, port, None, path), rule, "{port} {path}");
    }
}

#[test]
fn hostnames_count_under_a_gateway_and_not_under_a_service() {
    let gateway = FrontendName::gateway("edge", "front");
    let on = |name: &str, hostnames: &[&str]| Route {
        parents: vec![
            Parent { frontend: gateway.clone(), port: None, section: None },
            parent(None, None),
        ],
        hostnames: hostnames.iter().map(|host| host.parse().unwrap()).collect(),
        ..http_route("edge", name, vec![rule(name, vec![prefix(&format!("/{name}")), exact("/")])])
    };
    let mut table = table([
        on("any", &[]),
        on("below", &["*.example.org"]),
        on("deeper", &["*.b.example.org"]),
        on("exact", &["a.b.example.org", "A.example.org"]),
    ]);
    let ports = vec![FrontendPort { port: 80, section: None }];
    table.apply([RouteChange::Frontend(Frontend { name: gateway.clone(), ports })]);
    check(
        &table,
        &[
            ("GET a.b.example.org/", "exact"),
            ("GET A.B.Example.org:80/", "exact"),
            ("GET a.b.example.org/deeper", "deeper"),
            ("GET a.b.example.org/below", "below"),
            ("GET a.b.example.org/any", "any"),
            ("GET c.b.example.org/", "deeper"),
            ("GET c.b.example.org/exact", "not found"),
            ("GET c.example.org/", "below"),
            ("GET example.org/", "any"),
            ("GET a.example.org/exact", "exact"),
        ],
    );
    // By its address the service is meant, whatever the Host header says; the namespace of these routes is a consumer's.
    assert_eq!(ask(&table, SERVICE_PORT, Some("edge"), "GET wrong/exact"), "exact");
    for text in ["", "*", "*.", "a..b", "a.*.b", "-a", "a_b", "1.2.3.4:80"] {
        assert!(text.parse::<crate::Hostname>().is_err(), "{text}");
    }
}

#[test]
fn grpc_routes_match_service_method_and_headers_and_go_before_http_routes() {
    let exact = |text: &str| Some(TextMatch::Exact(text.into()));
    let regex = |text: &str| Some(TextMatch::Regex(text.into()));
    let grpc = |name: &str, service, method| Rule {
        name: Some(name.into()),
        matches: vec![RouteMatch::Grpc(GrpcMatch { service, method, headers: Vec::new() })],
        ..Rule::default()
    };
    let route = Route {
        name: RouteName::new(RouteKind::Grpc, "shop", "g"),
        rules: vec![
            grpc("service", exact("p.Cart"), None),
            grpc("both", exact("p.Cart"), exact("Add")),
            grpc("method", None, exact("Ping")),
            grpc("regex", regex("p.*"), exact("Ping")),
        ],
        ..http_route("shop", "g", Vec::new())
    };
    let table = table([route, http_route("shop", "h", vec![rule("http", vec![prefix("/")])])]);
    check(
        &table,
        &[
            ("POST cart/p.Cart/Add", "both"),
            ("POST cart/p.Cart/Other", "service"),
            ("POST cart/p.Cart/Ping", "service"),
            ("POST cart/q.Cart/Ping", "method"),
            ("POST cart/p.Car/Ping", "regex"),
            ("POST cart/p.Cart/Add/x", "not found"),
            ("POST cart/p.Cart", "not found"),
            ("GET cart/index.html", "not found"),
        ],
    );
}

#[test]
fn an_invalid_route_leaves_the_one_before_in_force() {
    let mut table = table([http_route("shop", "r", vec![rule("good", vec![prefix("/")])])]);
    let redirect = crate::Redirect {
        scheme: None,
        host: None,
        port: None,
        path: None,
        status: http::StatusCode::FOUND,
    };
    let mut both = rule("bad", vec![]);
    both.filters.redirect = Some(redirect.clone());
    both.filters.rewrite = Some(crate::Rewrite::default());
    let mut backend = rule("bad", vec![]);
    backend.backends.push(crate::Backend {
        target: crate::BackendTarget::Invalid { reason: "".into() },
        weight: 1,
        filters: crate::Filters { redirect: Some(redirect), ..crate::Filters::default() },
    });
    let grpc = Rule { matches: vec![RouteMatch::Grpc(GrpcMatch::default())], ..Rule::default() };
    for bad in [
        rule("bad", vec![regex("(")]),
        rule("bad", vec![prefix("a")]),
        rule("bad", vec![exact("/a?b")]),
        rule("bad", vec![exact("/../a")]),
        both,
        backend,
        grpc,
    ] {
        let invalid = table.apply([RouteChange::Upsert(http_route("shop", "r", vec![bad]))]);
        assert_eq!(invalid.len(), 1);
        check(&table, &[("GET cart/", "good")]);
    }
}

#[test]
fn changes_reach_what_they_touch_and_snapshots_stay() {
    let route =
        |name: &str, path: &str| http_route("shop", name, vec![rule(name, vec![prefix(path)])]);
    let mut table = table([route("a", "/a"), route("b", "/b")]);
    let before = table.clone();
    let moved = Route { parents: vec![parent(Some(8080), None)], ..route("b", "/b") };
    let gone = RouteName::new(RouteKind::Http, "shop", "a");
    assert_eq!(table.apply([RouteChange::Upsert(moved), RouteChange::Remove(gone)]), []);
    check(&table, &[("GET cart/a", "unrouted"), ("GET cart/b", "unrouted")]);
    assert_eq!(ask(&table, 8080, None, "GET cart/b"), "b");
    check(&before, &[("GET cart/a", "a"), ("GET cart/b", "b")]);
    assert!(before.is_routed(&service(), 80) && !table.is_routed(&service(), 80));
    assert!(table.is_routed(&service(), 8080) && !table.is_routed(&service(), 1));
    assert_eq!(table.routes().len(), 1);
    table.apply([frontend(&[(8080, "admin"), (81, "new")])]);
    assert_eq!(ask(&table, 81, None, "GET cart/b"), "unrouted");
    assert_eq!(ask(&table, 8080, None, "GET cart/b"), "b");
    table.apply([RouteChange::RemoveFrontend(service())]);
    assert_eq!(ask(&table, 8080, None, "GET cart/b"), "unrouted");
}

/// What a request costs is bounded by the longest list it can meet, not by the number of routes.
#[test]
fn lists_stay_short_at_ten_thousand_routes() {
    let shapes: [fn(usize) -> HttpMatch; 5] = [
        |n| exact(&format!("/items/{n}")),
        |n| prefix(&format!("/items/{}/{}", n / 100, n % 100)),
        |n| regex(&format!("/items/{n}/[a-z]+")),
        |n| header(prefix("/"), "x-tenant", &n.to_string()),
        |n| query(prefix("/"), "tenant", &n.to_string()),
    ];
    for (shape, one) in shapes.into_iter().enumerate() {
        let routes = (0..10_000).map(|n| {
            let mut route = http_route("shop", &format!("r{n}"), vec![rule("r", vec![one(n)])]);
            route.rules[0].timeouts.request = Some(Duration::from_secs(1));
            route
        });
        let table = table(routes);
        let frontend = table.frontends.get(&service()).unwrap();
        let index = frontend.ports[&80].producer.as_ref().unwrap();
        assert!(index.longest_list() <= 9, "shape {shape}: {}", index.longest_list());
    }
}
