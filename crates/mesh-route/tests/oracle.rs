//! The compiled table against a slow, obvious reading of the specification, over generated routes and requests.

#![expect(clippy::unwrap_used, reason = "a test's own values are valid")]

use std::collections::BTreeMap;
use std::sync::Arc;

use http::{HeaderMap, HeaderName, HeaderValue, Method};
use mesh_model::{PathNormalization, RequestPath, splitmix};
use mesh_route::{
    Frontend, FrontendKind, FrontendName, FrontendPort, GrpcMatch, HeaderMatch, Hostname,
    HttpMatch, Parent, PathMatch, QueryMatch, RequestHead, Route, RouteChange, RouteKind,
    RouteMatch, RouteName, RouteTable, Rule, Selection, TextMatch,
};

/// (routes, request) pairs: tables times requests per table.
const TABLES: u64 = 3_000;
const REQUESTS_PER_TABLE: u64 = 50;

/// SplitMix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        splitmix::next(&mut self.0)
    }

    fn below(&mut self, bound: usize) -> usize {
        usize::try_from(self.next() >> 33).unwrap() % bound
    }

    fn chance(&mut self, percent: usize) -> bool {
        self.below(100) < percent
    }

    fn one<T: Clone>(&mut self, of: &[T]) -> T {
        of[self.below(of.len())].clone()
    }

    fn up_to<T>(&mut self, most: usize, mut make: impl FnMut(&mut Self) -> T) -> Vec<T> {
        let count = self.below(most + 1);
        (0..count).map(|_| make(self)).collect()
    }
}

const NAMESPACES: [&str; 3] = ["a", "a-b", "b"];
const PORTS: [(u16, Option<&str>); 3] = [(80, Some("http")), (81, Some("admin")), (82, None)];
const SEGMENTS: [&str; 4] = ["x", "xy", "y", "p.S"];
const VALUES: [&str; 4] = ["1", "2", "12", ""];
const HOSTS: [&str; 5] = ["e.org", "s.e.org", "t.s.e.org", "other.org", "S.E.org:80"];

fn frontends() -> [FrontendName; 3] {
    [
        FrontendName::service("a", "s"),
        FrontendName::gateway("a", "g"),
        FrontendName { kind: FrontendKind::ServiceEntry, ..FrontendName::service("b", "s") },
    ]
}

fn path(random: &mut Random) -> String {
    let depth = random.one(&[0, 1, 1, 2, 2, 3]);
    let mut path: String = (0..depth).map(|_| format!("/{}", random.one(&SEGMENTS))).collect();
    if depth == 0 || random.chance(15) {
        path.push('/');
    }
    path
}

fn path_match(random: &mut Random) -> PathMatch {
    let regexes =
        ["/x/.*", "/x(y)?", "(?i)/X/y", "/x|/y", "/xy?/[a-z]+", ".*", "/p[.]S/.*", "^/y$", "[*]"];
    match random.below(5) {
        0 => PathMatch::Exact(path(random).into()),
        1 | 2 => PathMatch::Regex(random.one(&regexes).into()),
        _ => PathMatch::Prefix(path(random).into()),
    }
}

fn text_match(random: &mut Random, texts: &[&str]) -> TextMatch {
    if random.chance(75) {
        TextMatch::Exact(random.one(texts).into())
    } else {
        TextMatch::Regex(random.one(&["1.*", "1|2", "[A-Z]", "x?y?", ".*S", ""]).into())
    }
}

fn header_name(random: &mut Random) -> HeaderName {
    HeaderName::from_static(random.one(&["h-a", "h-b", "h-c"]))
}

fn header_match(random: &mut Random) -> HeaderMatch {
    HeaderMatch { name: header_name(random), value: text_match(random, &VALUES) }
}

fn rule(random: &mut Random, kind: RouteKind) -> Rule {
    let most = random.one(&[0, 1, 1, 3]);
    let matches = (0..most).map(|_| match kind {
        RouteKind::Http => RouteMatch::Http(HttpMatch {
            path: random.chance(80).then(|| path_match(random)),
            method: random.chance(20).then(|| random.one(&[Method::GET, Method::PUT])),
            headers: random
                .up_to(1, header_match)
                .into_iter()
                .chain(random.up_to(1, header_match))
                .collect(),
            query: random.up_to(1, |random| QueryMatch {
                name: random.one(&["q", "r"]).into(),
                value: text_match(random, &VALUES),
            }),
        }),
        RouteKind::Grpc => RouteMatch::Grpc(GrpcMatch {
            service: random.chance(60).then(|| text_match(random, &SEGMENTS)),
            method: random.chance(60).then(|| text_match(random, &SEGMENTS)),
            headers: random.up_to(1, header_match),
        }),
    });
    Rule { matches: matches.collect(), ..Rule::default() }
}

fn route(random: &mut Random) -> Route {
    let kind = if random.chance(12) { RouteKind::Grpc } else { RouteKind::Http };
    let number = random.below(30);
    let parents = (0..random.one(&[1, 1, 2])).map(|_| Parent {
        frontend: random.one(&frontends()),
        port: random.chance(20).then(|| random.one(&PORTS).0),
        section: random.chance(10).then(|| random.one(&["http", "admin", "none"]).into()),
    });
    let parents = parents.collect();
    let hosts = ["e.org", "s.e.org", "*.e.org", "*.s.e.org", "*.org", "S.e.org"];
    Route {
        name: RouteName::new(kind, random.one(&NAMESPACES), &format!("r{number}")),
        created_at_s: random.one(&[None, Some(1), Some(1), Some(2)]),
        parents,
        hostnames: random.up_to(2, |random| random.one(&hosts).parse::<Hostname>().unwrap()),
        rules: random.up_to(3, |random| rule(random, kind)),
    }
}

/// A request in the interpreter's words.
struct Facts {
    frontend: FrontendName,
    port: u16,
    section: Option<&'static str>,
    client: Option<&'static str>,
    host: String,
    method: Method,
    path: String,
    headers: Vec<(HeaderName, String)>,
    query: Vec<(&'static str, String)>,
}

fn facts(random: &mut Random) -> Facts {
    let (port, section) = random.one(&PORTS);
    Facts {
        frontend: random.one(&frontends()),
        port,
        section,
        client: random.chance(80).then(|| random.one(&NAMESPACES)),
        host: random.one(&HOSTS).to_owned(),
        method: random.one(&[Method::GET, Method::PUT]),
        path: if random.chance(2) { "*".to_owned() } else { path(random) },
        headers: random.up_to(3, |random| (header_name(random), random.one(&VALUES).to_owned())),
        query: random.up_to(2, |random| (random.one(&["q", "r"]), random.one(&VALUES).to_owned())),
    }
}

fn text_holds(one: &TextMatch, text: &str) -> bool {
    match one {
        TextMatch::Exact(wanted) => **wanted == *text,
        TextMatch::Regex(pattern) => whole(pattern, text),
    }
}

/// Expressions without `^`, `$` and flags that would need more than this.
fn whole(pattern: &str, text: &str) -> bool {
    thread_local! {
        static SEEN: std::cell::RefCell<BTreeMap<String, regex::Regex>> = const { std::cell::RefCell::new(BTreeMap::new()) };
    }
    SEEN.with_borrow_mut(|seen| {
        let compiled = seen
            .entry(pattern.to_owned())
            .or_insert_with(|| regex::Regex::new(&format!("^(?:{pattern})$")).unwrap());
        compiled.is_match(text)
    })
}

fn path_holds(one: &PathMatch, path: &str) -> bool {
    match one {
        PathMatch::Exact(wanted) => **wanted == *path,
        PathMatch::Regex(pattern) => whole(pattern, path),
        PathMatch::Prefix(prefix) => {
            let prefix = prefix.trim_end_matches('/');
            path.strip_prefix(prefix).is_some_and(|rest| rest.starts_with('/')) || path == prefix
        }
    }
}

fn first_of_each<T, N: PartialEq>(list: &[T], name: impl Fn(&T) -> N) -> Vec<&T> {
    let mut kept: Vec<&T> = Vec::new();
    for one in list {
        if kept.iter().all(|other| name(other) != name(one)) {
            kept.push(one);
        }
    }
    kept
}

impl Facts {
    fn header(&self, name: &HeaderName) -> Option<String> {
        let values: Vec<&str> =
            self.headers.iter().filter(|(one, _)| one == name).map(|(_, value)| &**value).collect();
        (!values.is_empty()).then(|| values.join(","))
    }

    fn headers_hold(&self, headers: &[HeaderMatch]) -> bool {
        first_of_each(headers, |one| one.name.clone())
            .iter()
            .all(|one| self.header(&one.name).is_some_and(|value| text_holds(&one.value, &value)))
    }

    fn holds(&self, one: &RouteMatch) -> bool {
        match one {
            RouteMatch::Http(one) => {
                // Absent is the prefix `/`.
                one.path.as_ref().map_or(self.path != "*", |path| path_holds(path, &self.path))
                    && one.method.as_ref().is_none_or(|method| *method == self.method)
                    && self.headers_hold(&one.headers)
                    && first_of_each(&one.query, |one| Arc::clone(&one.name)).iter().all(|one| {
                        let found = self.query.iter().find(|(name, _)| *name == &*one.name);
                        found.is_some_and(|(_, value)| text_holds(&one.value, value))
                    })
            }
            RouteMatch::Grpc(one) => {
                let parts: Vec<&str> = self.path.split('/').collect();
                let named = one.service.is_some() || one.method.is_some();
                let part = |test: &Option<TextMatch>, part: usize| {
                    test.as_ref().is_none_or(|test| text_holds(test, parts[part]))
                };
                (!named || parts.len() == 3 && part(&one.service, 1) && part(&one.method, 2))
                    && self.headers_hold(&one.headers)
            }
        }
    }

    /// How specifically a route's hostnames match; none when they do not. Exact ones go before wildcards, longer before shorter.
    fn host(&self, route: &Route) -> Option<(bool, usize)> {
        if self.frontend.kind != FrontendKind::Gateway || route.hostnames.is_empty() {
            return Some((false, 0));
        }
        let host = self.host.split(':').next().unwrap().to_lowercase();
        let matching = route.hostnames.iter().filter_map(|hostname| match hostname {
            Hostname::Exact(one) => (**one == *host).then_some((true, one.len())),
            Hostname::Below(suffix) => (host.len() > suffix.len() && host.ends_with(&**suffix))
                .then_some((false, suffix.len())),
        });
        matching.max()
    }

    fn attached(&self, route: &Route) -> bool {
        route.parents.iter().any(|parent| {
            parent.frontend == self.frontend
                && parent.port.is_none_or(|port| port == self.port)
                && (parent.section.is_none() || parent.section.as_deref() == self.section)
        })
    }
}

fn text_length(text: &TextMatch) -> usize {
    let (TextMatch::Exact(text) | TextMatch::Regex(text)) = text;
    text.chars().count()
}

/// Larger wins.
fn rank(one: &RouteMatch) -> [usize; 5] {
    let headers = |headers: &[HeaderMatch]| first_of_each(headers, |one| one.name.clone()).len();
    match one {
        RouteMatch::Http(one) => {
            let (class, length) = match &one.path {
                None => (0, 0),
                Some(PathMatch::Prefix(path)) => (0, path.trim_end_matches('/').chars().count()),
                Some(PathMatch::Regex(pattern)) => (1, pattern.chars().count()),
                Some(PathMatch::Exact(path)) => (2, path.chars().count()),
            };
            let query = first_of_each(&one.query, |one| Arc::clone(&one.name)).len();
            [class, length, usize::from(one.method.is_some()), headers(&one.headers), query]
        }
        RouteMatch::Grpc(one) => {
            let length = |text: &Option<TextMatch>| text.as_ref().map_or(0, text_length);
            [3, length(&one.service), length(&one.method), headers(&one.headers), 0]
        }
    }
}

#[derive(Debug, PartialEq, Eq)]
enum Found {
    Unrouted,
    Nothing,
    Rule(RouteName, usize, usize),
}

fn interpret(routes: &BTreeMap<RouteName, Route>, facts: &Facts) -> Found {
    let mut counted: Vec<&Route> = routes.values().filter(|route| facts.attached(route)).collect();
    if facts.frontend.kind != FrontendKind::Gateway {
        let own = |route: &&Route| route.name.namespace == facts.frontend.namespace;
        let client = facts.client.filter(|client| **client != *facts.frontend.namespace);
        let of_client =
            |route: &&Route| client.is_some_and(|client| *route.name.namespace == *client);
        if counted.iter().any(of_client) {
            counted.retain(of_client);
        } else {
            counted.retain(own);
        }
        if counted.iter().any(|route| route.name.kind == RouteKind::Grpc) {
            counted.retain(|route| route.name.kind == RouteKind::Grpc);
        }
    }
    if counted.is_empty() {
        return Found::Unrouted;
    }
    let mut candidates = Vec::new();
    for route in counted {
        let Some(host) = facts.host(route) else { continue };
        for (index, rule) in route.rules.iter().enumerate() {
            let always = match route.name.kind {
                RouteKind::Http => RouteMatch::Http(HttpMatch::default()),
                RouteKind::Grpc => RouteMatch::Grpc(GrpcMatch::default()),
            };
            let matches = if rule.matches.is_empty() { vec![always] } else { rule.matches.clone() };
            for (one, of) in matches.iter().enumerate().filter(|(_, of)| facts.holds(of)) {
                candidates.push((host, rank(of), route, index, one));
            }
        }
    }
    candidates.sort_by(|a, b| {
        let age = |route: &Route| route.created_at_s.unwrap_or(u64::MAX);
        let name = |route: &Route| format!("{}/{}", route.name.namespace, route.name.name);
        (b.0, b.1)
            .cmp(&(a.0, a.1))
            .then_with(|| age(a.2).cmp(&age(b.2)))
            .then_with(|| name(a.2).cmp(&name(b.2)))
            .then_with(|| (a.3, a.4).cmp(&(b.3, b.4)))
    });
    candidates.first().map_or(Found::Nothing, |(_, _, route, rule, one)| {
        Found::Rule(route.name.clone(), *rule, *one)
    })
}

fn ask(table: &RouteTable, facts: &Facts) -> Found {
    let mut target = facts.path.clone();
    for (index, (name, value)) in facts.query.iter().enumerate() {
        target.push(if index == 0 { '?' } else { '&' });
        target.push_str(&format!("{name}={value}"));
    }
    let path = RequestPath::parse(&target, PathNormalization::default()).unwrap();
    let mut headers = HeaderMap::new();
    for (name, value) in &facts.headers {
        headers.append(name.clone(), HeaderValue::from_str(value).unwrap());
    }
    let head = RequestHead {
        method: &facts.method,
        authority: &facts.host,
        path: &path,
        headers: &headers,
    };
    match table.select(&facts.frontend, facts.port, facts.client, &head) {
        Selection::Unrouted => Found::Unrouted,
        Selection::NotFound => Found::Nothing,
        Selection::Selected(selected) => Found::Rule(
            selected.route().name.clone(),
            selected.rule_index(),
            selected.match_index(),
        ),
    }
}

#[test]
fn table_and_interpreter_agree_on_generated_routes_and_requests() {
    let mut seen = [0_u64; 3];
    let mut routes: BTreeMap<RouteName, Route> = BTreeMap::new();
    let mut table = RouteTable::default();
    for seed in 0..TABLES {
        let mut random = Random(seed);
        // Two of three tables go on from the one before, so that replacing and removing are exercised as well.
        if seed % 3 == 0 {
            routes.clear();
            table = RouteTable::default();
            let ports: Vec<_> = PORTS
                .iter()
                .map(|(port, section)| FrontendPort {
                    port: *port,
                    section: section.map(Into::into),
                })
                .collect();
            let changes = frontends()
                .map(|name| RouteChange::Frontend(Frontend { name, ports: ports.clone() }));
            assert_eq!(table.apply(changes), []);
        }
        let most = random.one(&[2, 8, 40]);
        let mut changes = Vec::new();
        for _ in 0..random.below(most) {
            if let Some(name) = routes.keys().next().cloned().filter(|_| random.chance(10)) {
                routes.remove(&name);
                changes.push(RouteChange::Remove(name));
            } else {
                let route = route(&mut random);
                routes.insert(route.name.clone(), route.clone());
                changes.push(RouteChange::Upsert(route));
            }
        }
        assert_eq!(table.apply(changes), [], "{seed}");
        for number in 0..REQUESTS_PER_TABLE {
            let facts = facts(&mut random);
            let wanted = interpret(&routes, &facts);
            assert_eq!(ask(&table, &facts), wanted, "seed {seed}, request {number}");
            seen[match wanted {
                Found::Unrouted => 0,
                Found::Nothing => 1,
                Found::Rule(..) => 2,
            }] += 1;
        }
    }
    let pairs = TABLES * REQUESTS_PER_TABLE;
    assert_eq!(seen.iter().sum::<u64>(), pairs);
    assert!(seen.iter().all(|count| *count > pairs / 20), "one-sided inputs: {seen:?}");
}
