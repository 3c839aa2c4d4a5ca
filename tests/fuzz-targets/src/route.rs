//! Paths of requests, and the route table over routes and requests of any content.

use arbitrary::{Result, Unstructured};
use http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode};
use mesh_model::{
    EmptySegments, EncodedSlashes, PathNormalization, PathParameters, RequestPath, path_text,
};
use mesh_route::{
    Backend, BackendTarget, Filters, Frontend, FrontendName, FrontendPort, GrpcMatch, HeaderMatch,
    HttpMatch, Parent, PathMatch, PathModifier, Plan, QueryMatch, Redirect, RedirectScheme,
    RequestHead, Rewrite, Route, RouteChange, RouteKind, RouteMatch, RouteName, RouteTable, Rule,
    Selection, ServiceRef, TextMatch,
};

use crate::input::texts;
use crate::policy::noise;

/// Every combination of settings.
fn every_rule() -> impl Iterator<Item = PathNormalization> {
    (0..8_u8).map(|bits| PathNormalization {
        empty_segments: [EmptySegments::Merge, EmptySegments::Keep][usize::from(bits & 1)],
        encoded_slashes: [EncodedSlashes::Refuse, EncodedSlashes::Keep][usize::from(bits >> 1 & 1)],
        parameters: [PathParameters::Refuse, PathParameters::Keep][usize::from(bits >> 2)],
    })
}

/// The normal form is its own normal form, and has nothing in it that servers read in several ways.
pub fn request_path(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    for rules in every_rule() {
        let Ok(parsed) = RequestPath::parse(text, rules) else { continue };
        let target = parsed.target();
        let again = RequestPath::parse(&target, rules).expect("what was normalised");
        assert_eq!((again.path(), again.query()), (parsed.path(), parsed.query()));
        let path = parsed.path();
        assert!(path == "*" || path.starts_with('/'), "{path}");
        assert!(!path.split('/').any(|segment| matches!(segment, "." | "..")), "{path}");
        assert!(
            !path.contains(['\\', '#', '?']) && path.bytes().all(|byte| byte.is_ascii_graphic())
        );
        assert!(rules.empty_segments == EmptySegments::Keep || !path.contains("//"), "{path}");
        let encoded = path.contains("%2F") || path.contains("%5C");
        assert!(rules.encoded_slashes == EncodedSlashes::Keep || !encoded, "{path}");
        assert!(rules.parameters == PathParameters::Keep || !path.contains(';'), "{path}");
        // One spelling of each byte, and it is the one that texts in policies are brought to.
        assert!(!path.contains("%3B") && path_text(path) == path, "{path}");
    }
}

pub(crate) fn request_path_seeds() -> Vec<Vec<u8>> {
    texts(&["/a/../b?x=/..", "/%61%2e/%2E%2e/\\c//d", "/a%2F%5Cb;c/..;/", "*", "/a//./%25%7e"])
}

/// A route with something of everything that travels to waypoints.
pub(crate) fn sample() -> Route {
    let header = |name, value| (HeaderName::from_static(name), HeaderValue::from_static(value));
    let target = BackendTarget::Service(ServiceRef {
        namespace: "shop".into(),
        name: "v2".into(),
        port: 80,
    });
    let mut filters = Filters::default();
    filters.request_headers.set = vec![header("x-a", "1")];
    filters.response_headers.remove = vec![HeaderName::from_static("x-b")];
    filters.rewrite = Some(Rewrite { host: None, path: Some(PathModifier::Full("/new".into())) });
    Route {
        name: RouteName::new(RouteKind::Http, "shop", "cart"),
        created_at_s: Some(1),
        parents: vec![Parent {
            frontend: FrontendName::service("shop", "cart"),
            port: Some(80),
            section: None,
        }],
        hostnames: vec!["*.example.org".parse().expect("a hostname")],
        rules: vec![Rule {
            matches: vec![RouteMatch::Http(HttpMatch {
                path: Some(PathMatch::Prefix("/a".into())),
                method: Some(Method::GET),
                headers: vec![HeaderMatch {
                    name: HeaderName::from_static("x-c"),
                    value: TextMatch::Exact("1".into()),
                }],
                query: Vec::new(),
            })],
            filters,
            backends: vec![Backend { target, weight: 1, filters: Filters::default() }],
            ..Rule::default()
        }],
    }
}

fn text<'a>(u: &mut Unstructured<'a>, common: &[&'static str]) -> Result<&'a str> {
    if u.ratio(3, 4)? {
        return Ok(u.choose(common)?);
    }
    let length = u.int_in_range(0..=12)?;
    Ok(std::str::from_utf8(u.bytes(length)?).unwrap_or("/"))
}

fn list<T>(
    u: &mut Unstructured<'_>,
    most: usize,
    mut one: impl FnMut(&mut Unstructured<'_>) -> Result<T>,
) -> Result<Vec<T>> {
    let count = u.int_in_range(0..=most)?;
    (0..count).map(|_| one(u)).collect()
}

const VALUES: [&str; 5] = ["1", "2", "", "[0-9]+", "a|b"];
const PATHS: [&str; 7] = ["/", "/a", "/a/", "/a/b", "/a/[a-z]*", "/.*", "/p.S/M"];

fn text_match(u: &mut Unstructured<'_>) -> Result<TextMatch> {
    let value = text(u, &VALUES)?.into();
    Ok(if u.ratio(1, 3)? { TextMatch::Regex(value) } else { TextMatch::Exact(value) })
}

fn header_match(u: &mut Unstructured<'_>) -> Result<HeaderMatch> {
    let name = HeaderName::from_static(u.choose(&["x-a", "x-b"])?);
    Ok(HeaderMatch { name, value: text_match(u)? })
}

fn route_match(u: &mut Unstructured<'_>, kind: RouteKind) -> Result<RouteMatch> {
    Ok(match kind {
        RouteKind::Http => RouteMatch::Http(HttpMatch {
            path: match u.int_in_range(0..=3)? {
                0 => None,
                1 => Some(PathMatch::Exact(text(u, &PATHS)?.into())),
                2 => Some(PathMatch::Prefix(text(u, &PATHS)?.into())),
                _ => Some(PathMatch::Regex(text(u, &PATHS)?.into())),
            },
            method: u.ratio(1, 4)?.then_some(Method::GET),
            headers: list(u, 2, header_match)?,
            query: list(u, 1, |u| {
                Ok(QueryMatch { name: text(u, &["q", "r"])?.into(), value: text_match(u)? })
            })?,
        }),
        RouteKind::Grpc => RouteMatch::Grpc(GrpcMatch {
            service: u.ratio(1, 2)?.then(|| text_match(u)).transpose()?,
            method: u.ratio(1, 2)?.then(|| text_match(u)).transpose()?,
            headers: list(u, 1, header_match)?,
        }),
    })
}

fn path_modifier(u: &mut Unstructured<'_>) -> Result<PathModifier> {
    let path = text(u, &PATHS)?.into();
    Ok(if u.ratio(1, 2)? { PathModifier::Full(path) } else { PathModifier::Prefix(path) })
}

fn rule(u: &mut Unstructured<'_>, kind: RouteKind) -> Result<Rule> {
    let mut filters = Filters::default();
    if u.ratio(1, 6)? {
        filters.redirect = Some(Redirect {
            scheme: u.ratio(1, 2)?.then_some(RedirectScheme::Https),
            host: u.ratio(1, 2)?.then(|| text(u, &["b"])).transpose()?.map(Into::into),
            port: u.arbitrary()?,
            path: u.ratio(1, 2)?.then(|| path_modifier(u)).transpose()?,
            status: StatusCode::FOUND,
        });
    }
    if u.ratio(1, 6)? {
        filters.rewrite = Some(Rewrite { host: None, path: Some(path_modifier(u)?) });
    }
    let backends = list(u, 2, |u| {
        let service = ServiceRef { namespace: "a".into(), name: "b".into(), port: 80 };
        let weight = u.int_in_range(0..=1_000_000)?;
        Ok(Backend { target: BackendTarget::Service(service), weight, filters: Filters::default() })
    })?;
    Ok(Rule {
        matches: list(u, 2, |u| route_match(u, kind))?,
        filters,
        backends,
        ..Rule::default()
    })
}

fn route(u: &mut Unstructured<'_>, number: usize) -> Result<Route> {
    let kind = if u.ratio(1, 6)? { RouteKind::Grpc } else { RouteKind::Http };
    let frontend = match u.ratio(1, 2)? {
        true => FrontendName::service("a", "s"),
        false => FrontendName::gateway("a", "g"),
    };
    let hostnames = list(u, 2, |u| {
        let text = text(u, &["e.org", "*.e.org", "s.e.org"])?;
        Ok(text.parse().ok())
    })?;
    Ok(Route {
        name: RouteName::new(kind, u.choose(&["a", "b"])?, &format!("r{number}")),
        created_at_s: u.ratio(1, 2)?.then_some(1),
        parents: vec![Parent { frontend, port: None, section: None }],
        hostnames: hostnames.into_iter().flatten().collect(),
        rules: list(u, 3, |u| rule(u, kind))?,
    })
}

/// Nothing panics, the order in which routes arrive does not matter, and what is planned can be sent.
pub fn route_table(data: &[u8]) {
    // An input that ends early has been used as far as it goes.
    run(&mut Unstructured::new(data)).unwrap_or_default();
}

fn run(u: &mut Unstructured<'_>) -> Result<()> {
    let count = u.int_in_range(0..=24)?;
    let routes: Vec<Route> = (0..count).map(|number| route(u, number)).collect::<Result<_>>()?;
    let frontends = [FrontendName::service("a", "s"), FrontendName::gateway("a", "g")];
    let ports = vec![FrontendPort { port: 80, section: None }];
    let declared = frontends
        .clone()
        .map(|name| RouteChange::Frontend(Frontend { name, ports: ports.clone() }));
    let (mut table, mut reversed) = (RouteTable::default(), RouteTable::default());
    table
        .apply(declared.clone().into_iter().chain(routes.iter().cloned().map(RouteChange::Upsert)));
    for route in routes.iter().rev() {
        reversed.apply([RouteChange::Upsert(route.clone())]);
    }
    reversed.apply(declared);
    for _ in 0..=u.int_in_range(0..=4)? {
        let target = text(u, &["/", "/a/b?q=1", "/a/x", "/p.S/M", "/a?r=%32"])?;
        let Ok(path) = RequestPath::parse(target, PathNormalization::default()) else { continue };
        let mut headers = HeaderMap::new();
        for value in list(u, 2, |u| text(u, &["1", "2"]).map(str::to_owned))? {
            if let Ok(value) = HeaderValue::from_str(&value) {
                headers.append("x-a", value);
            }
        }
        let head = RequestHead {
            method: &Method::GET,
            authority: text(u, &["e.org", "s.e.org:80", "t.S.e.org", "[::1]:80"])?,
            path: &path,
            headers: &headers,
        };
        let client = u.ratio(1, 2)?.then_some("b");
        for frontend in &frontends {
            let found = table.select(frontend, 80, client, &head);
            let again = reversed.select(frontend, 80, client, &head);
            assert_eq!(place(found), place(again), "the order of arrival counted");
            let Selection::Selected(selected) = found else { continue };
            match selected.plan(&head, RedirectScheme::Http, &mut || u64::MAX) {
                Plan::Forward(forward) => {
                    assert!(forward.path.is_none_or(|path| path.starts_with('/')));
                }
                Plan::Answer(answer) => assert!(answer.status.as_u16() >= 300),
            }
        }
    }
    Ok(())
}

fn place(selection: Selection<'_>) -> Option<Option<(RouteName, usize, usize)>> {
    match selection {
        Selection::Unrouted => None,
        Selection::NotFound => Some(None),
        Selection::Selected(selected) => Some(Some((
            selected.route().name.clone(),
            selected.rule_index(),
            selected.match_index(),
        ))),
    }
}

pub(crate) fn route_table_seeds() -> Vec<Vec<u8>> {
    (1..=6).map(|seed| noise(seed, 700)).collect()
}
