use std::collections::BTreeMap;
use std::time::Duration;

use http::header::{ACCESS_CONTROL_REQUEST_METHOD, ORIGIN};
use http::{HeaderName, Method};
use mesh_model::{PathNormalization, RequestPath};

use super::*;
use crate::filter::{Filters, Fraction, Rewrite};
use crate::route::Rule;
use crate::table::tests::{http_route, prefix, rule, service, table};
use crate::table::{RouteTable, Selection};

fn backend(name: &str, weight: u32) -> Backend {
    let target = BackendTarget::Service(ServiceRef {
        namespace: "shop".into(),
        name: name.into(),
        port: 80,
    });
    Backend { target, weight, filters: Filters::default() }
}

fn with(rule: Rule) -> RouteTable {
    table([http_route("shop", "r", vec![rule])])
}

/// What the only rule of a table does with a GET or, with CORS headers, an OPTIONS request.
fn plan<T>(
    table: &RouteTable,
    port: u16,
    authority: &str,
    path: &str,
    read: impl FnOnce(Plan<'_>) -> T,
) -> T {
    let path = RequestPath::parse(path, PathNormalization::default()).unwrap();
    let (method, headers) = (Method::GET, HeaderMap::new());
    let head = RequestHead { method: &method, authority, path: &path, headers: &headers };
    let Selection::Selected(selected) = table.select(&service(), port, None, &head) else {
        panic!("nothing selected")
    };
    read(selected.plan(&head, RedirectScheme::Http, &mut || 0))
}

fn location(redirect: Redirect, port: u16, authority: &str, path: &str) -> String {
    let mut rule = rule("r", vec![prefix("/foo")]);
    rule.filters.redirect = Some(redirect.clone());
    plan(&with(rule), port, authority, path, |plan| {
        let Plan::Answer(answer) = plan else { panic!("{plan:?}") };
        assert_eq!(answer.status, redirect.status);
        assert_eq!(answer.cause, AnswerCause::Redirect);
        answer.headers[LOCATION].to_str().unwrap().to_owned()
    })
}

#[test]
fn redirects_keep_what_they_leave_out() {
    let same =
        Redirect { scheme: None, host: None, port: None, path: None, status: StatusCode::FOUND };
    let https = Some(RedirectScheme::Https);
    let prefix = Some(PathModifier::Prefix("/bar".into()));
    let full = Some(PathModifier::Full("/full".into()));
    for (redirect, port, wanted) in [
        (same.clone(), 80, "http://cart/foo/a?q=1"),
        (same.clone(), 8080, "http://cart:8080/foo/a?q=1"),
        (
            Redirect { host: Some("example.org".into()), ..same.clone() },
            80,
            "http://example.org/foo/a?q=1",
        ),
        (Redirect { scheme: https, ..same.clone() }, 8080, "https://cart/foo/a?q=1"),
        (Redirect { port: Some(8443), ..same.clone() }, 80, "http://cart:8443/foo/a?q=1"),
        (Redirect { scheme: https, port: Some(443), ..same.clone() }, 80, "https://cart/foo/a?q=1"),
        (
            Redirect { scheme: https, port: Some(80), ..same.clone() },
            80,
            "https://cart:80/foo/a?q=1",
        ),
        (Redirect { path: prefix, ..same.clone() }, 80, "http://cart/bar/a?q=1"),
        (
            Redirect { path: full, status: StatusCode::PERMANENT_REDIRECT, ..same.clone() },
            80,
            "http://cart/full?q=1",
        ),
    ] {
        assert_eq!(location(redirect, port, "cart:8080", "/foo/a?q=1"), wanted);
    }
}

#[test]
fn weights_are_met_and_invalid_backends_answer_500_for_their_share() {
    let mut rule = rule("r", vec![]);
    let mut broken = backend("", 1);
    broken.target = BackendTarget::Invalid { reason: "no such service".into() };
    rule.backends = vec![backend("a", 6), backend("never", 0), broken, backend("b", 3)];
    let table = with(rule);
    let path = RequestPath::parse("/", PathNormalization::default()).unwrap();
    let (method, headers) = (Method::GET, HeaderMap::new());
    let head = RequestHead { method: &method, authority: "cart", path: &path, headers: &headers };
    let Selection::Selected(selected) = table.select(&service(), 80, None, &head) else { panic!() };
    let mut counts = BTreeMap::new();
    for step in 0..1000_u64 {
        let plan = selected.plan(&head, RedirectScheme::Http, &mut || step * (u64::MAX / 1000));
        let name = match plan {
            Plan::Forward(forward) => forward.backend.name.to_string(),
            Plan::Answer(answer) => {
                assert_eq!(answer.status, StatusCode::INTERNAL_SERVER_ERROR);
                answer.cause.as_str().to_owned()
            }
        };
        *counts.entry(name).or_insert(0) += 1;
    }
    let near = |name: &str, wanted: i32| (counts[name] - wanted).abs() <= 1;
    assert!(near("a", 600) && near("invalid_reference", 100) && near("b", 300), "{counts:?}");
    assert_eq!(counts.len(), 3);
}

#[test]
fn without_a_backend_the_answer_is_500() {
    let mut weightless = rule("r", vec![]);
    weightless.backends = vec![backend("a", 0)];
    for rule in [rule("r", vec![]), weightless] {
        plan(&with(rule), 80, "cart", "/", |plan| {
            let Plan::Answer(answer) = plan else { panic!("{plan:?}") };
            assert_eq!((answer.status.as_u16(), answer.cause), (500, AnswerCause::NoBackend));
        });
    }
}

#[test]
fn a_filter_that_cannot_be_applied_answers_500() {
    let mut of_rule = rule("r", vec![]);
    of_rule.backends = vec![backend("a", 1)];
    let mut of_backend = of_rule.clone();
    of_rule.filters.unresolved = Some("no such filter".into());
    of_backend.backends[0].filters.unresolved = Some("no such filter".into());
    for rule in [of_rule, of_backend] {
        plan(&with(rule), 80, "cart", "/", |plan| {
            let Plan::Answer(answer) = plan else { panic!("{plan:?}") };
            let cause = AnswerCause::InvalidReference { reason: "no such filter".into() };
            assert_eq!((answer.status.as_u16(), answer.cause), (500, cause));
        });
    }
}

#[test]
fn requests_are_rewritten_and_mirrored() {
    let mut rule = rule("r", vec![prefix("/foo")]);
    let header = |value| (HeaderName::from_static("x-a"), HeaderValue::from_static(value));
    let modifier = |value| HeaderModifier { set: vec![header(value)], ..HeaderModifier::default() };
    rule.backends = vec![backend("a", 1)];
    rule.backends[0].filters.request_headers = modifier("backend");
    rule.filters = Filters {
        request_headers: modifier("rule"),
        response_headers: modifier("rule"),
        rewrite: Some(Rewrite {
            host: Some("other".into()),
            path: Some(PathModifier::Prefix("/".into())),
        }),
        mirrors: [(Fraction::ALL, "m"), (Fraction { numerator: 0, denominator: 2 }, "never")]
            .map(|(share, name)| Mirror { target: backend(name, 1).target, share })
            .to_vec(),
        ..Filters::default()
    };
    rule.timeouts.request = Some(Duration::from_secs(2));
    plan(&with(rule), 80, "cart", "/foo/a?q", |plan| {
        let Plan::Forward(forward) = plan else { panic!("{plan:?}") };
        assert_eq!((forward.path.as_deref(), forward.host), (Some("/a"), Some("other")));
        let mirrors: Vec<&str> = forward.mirrors.iter().map(|service| &*service.name).collect();
        assert_eq!(mirrors, ["m"]);
        assert_eq!(forward.timeouts.request, Some(Duration::from_secs(2)));
        let mut headers = HeaderMap::new();
        forward.request_headers.iter().for_each(|modifier| modifier.apply(&mut headers));
        assert_eq!(headers["x-a"], "backend");
        forward.response_headers.iter().for_each(|modifier| modifier.apply(&mut headers));
        assert_eq!(headers["x-a"], "rule");
    });
}

#[test]
fn a_preflight_is_answered_here() {
    let mut rule = rule("r", vec![]);
    rule.backends = vec![backend("a", 1)];
    rule.filters.cors = Some(Cors {
        origins: vec![crate::CorsOrigin::Any],
        credentials: false,
        methods: crate::WordList { any: true, words: None },
        headers: crate::WordList::default(),
        expose: crate::WordList::default(),
        max_age_s: 5,
    });
    let table = with(rule);
    let path = RequestPath::parse("/", PathNormalization::default()).unwrap();
    let mut headers = HeaderMap::new();
    headers.insert(ORIGIN, HeaderValue::from_static("https://a"));
    for (asks, method) in [(true, Method::OPTIONS), (true, Method::GET), (false, Method::OPTIONS)] {
        headers.remove(ACCESS_CONTROL_REQUEST_METHOD);
        if asks {
            headers.insert(ACCESS_CONTROL_REQUEST_METHOD, HeaderValue::from_static("PUT"));
        }
        let head =
            RequestHead { method: &method, authority: "cart", path: &path, headers: &headers };
        let Selection::Selected(selected) = table.select(&service(), 80, None, &head) else {
            panic!()
        };
        match selected.plan(&head, RedirectScheme::Http, &mut || 0) {
            Plan::Answer(answer) => {
                assert!(asks && method == Method::OPTIONS);
                assert_eq!(answer.cause, AnswerCause::Preflight);
                assert_eq!(answer.headers["access-control-allow-origin"], "*");
            }
            Plan::Forward(forward) => {
                assert!(!(asks && method == Method::OPTIONS));
                assert_eq!(forward.cors_headers["access-control-allow-origin"], "*");
            }
        }
    }
}
