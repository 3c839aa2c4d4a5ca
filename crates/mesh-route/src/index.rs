//! Finds the first match for a request without looking at those that cannot be it.
//!
//! All matches of a frontend are sorted once by precedence; a match is known by its rank. A request's path then leads to
//! lists of ranks: one for the whole path, one for each node on the way down a trie of segments, where prefixes end and
//! expressions leave the literal. Long lists are split once more by the value of one header or query parameter. The answer is the
//! lowest rank whose match holds; so no step depends on the order in which lists are visited.
//!
//! What one request costs grows with the length of its path, with the names of headers that long lists are split by, and
//! with the expressions and equal conditions it meets; not with the number of routes.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use http::HeaderName;

use crate::compile::{CompiledMatch, CompiledRoute, PathTest};
use crate::precedence::Position;
use crate::request::RequestHead;
use crate::route::Hostname;

/// The longest host that is looked up; there are no longer names (RFC 1035 §2.3.4).
const MAX_HOST_BYTES: usize = 253;
/// A list of at most this many is gone through.
const SHORT: usize = 8;

type Rank = u32;
/// Lists by the value of a header or parameter.
type ByValue<L> = HashMap<Box<[u8]>, L>;
/// A header or parameter, with its lists.
type Keyed = (Key, ByValue<Box<[Rank]>>);

/// The matches of the routes that count at one frontend's port for one kind of client.
#[derive(Debug)]
pub(crate) struct Index {
    entries: Box<[Entry]>,
    exact_hosts: HashMap<Box<str>, Paths>,
    /// By what follows the `*`.
    below_hosts: HashMap<Box<str>, Paths>,
    any_host: Paths,
}

/// One match of one rule.
#[derive(Clone, Debug)]
pub(crate) struct Entry {
    pub(crate) route: Arc<CompiledRoute>,
    pub(crate) rule: usize,
    pub(crate) one: usize,
}

impl Entry {
    pub(crate) fn compiled(&self) -> &CompiledMatch {
        &self.route.matches[self.rule][self.one]
    }

    fn position(&self) -> Position<'_> {
        Position {
            created_at_s: self.route.source.created_at_s,
            route: &self.route.source.name,
            rule: self.rule,
            one: self.one,
        }
    }
}

impl Index {
    /// `by_host`: whether the routes' hostnames count.
    pub(crate) fn new<'r>(
        routes: impl Iterator<Item = &'r Arc<CompiledRoute>>,
        by_host: bool,
    ) -> Self {
        let mut entries = Vec::new();
        for route in routes {
            for (rule, matches) in route.matches.iter().enumerate() {
                entries.extend((0..matches.len()).map(|one| Entry {
                    route: Arc::clone(route),
                    rule,
                    one,
                }));
            }
        }
        entries.sort_by(|a, b| {
            let precedence = a.compiled().precedence.cmp(&b.compiled().precedence);
            precedence.then_with(|| a.position().order(&b.position()))
        });
        let mut exact_hosts: BTreeMap<&str, Vec<Rank>> = BTreeMap::new();
        let mut below_hosts: BTreeMap<&str, Vec<Rank>> = BTreeMap::new();
        let mut any_host = Vec::new();
        for (rank, entry) in (0..).zip(&entries) {
            let hostnames = &entry.route.source.hostnames;
            if !by_host || hostnames.is_empty() {
                any_host.push(rank);
                continue;
            }
            for hostname in hostnames {
                let list = match hostname {
                    Hostname::Exact(host) => exact_hosts.entry(host),
                    Hostname::Below(suffix) => below_hosts.entry(suffix),
                }
                .or_default();
                if list.last() != Some(&rank) {
                    list.push(rank);
                }
            }
        }
        let paths = |ranks: &[Rank]| Paths::new(ranks, &entries);
        let hosts = |hosts: BTreeMap<&str, Vec<Rank>>| {
            hosts.into_iter().map(|(host, ranks)| (host.into(), paths(&ranks))).collect()
        };
        Self {
            exact_hosts: hosts(exact_hosts),
            below_hosts: hosts(below_hosts),
            any_host: paths(&any_host),
            entries: entries.into(),
        }
    }

    /// The match that wins.
    pub(crate) fn find(&self, request: &RequestHead<'_>) -> Option<&Entry> {
        let rank = self.by_host(request).or_else(|| self.any_host.find(request, &self.entries))?;
        self.entries.get(rank as usize)
    }

    /// The most specific hostname that has a match for the request.
    fn by_host(&self, request: &RequestHead<'_>) -> Option<Rank> {
        if self.exact_hosts.is_empty() && self.below_hosts.is_empty() {
            return None;
        }
        let host = request.host();
        let host = host.strip_suffix('.').unwrap_or(host);
        if host.len() > MAX_HOST_BYTES {
            return None;
        }
        let host = match host.bytes().any(|byte| byte.is_ascii_uppercase()) {
            true => Cow::Owned(host.to_ascii_lowercase()),
            false => Cow::Borrowed(host),
        };
        let exact =
            self.exact_hosts.get(&*host).and_then(|paths| paths.find(request, &self.entries));
        exact.or_else(|| {
            let dots = host.match_indices('.').filter(|(at, _)| *at > 0);
            dots.filter_map(|(at, _)| self.below_hosts.get(&host[at..]))
                .find_map(|paths| paths.find(request, &self.entries))
        })
    }

    /// Length of the longest list that a request may have to go through.
    #[cfg(test)]
    #[expect(clippy::disallowed_methods, reason = "a maximum does not show the order")]
    pub(crate) fn longest_list(&self) -> usize {
        let hosts = self.exact_hosts.values().chain(self.below_hosts.values());
        let lists = hosts.chain([&self.any_host]).flat_map(|paths| {
            let nodes = paths.nodes.iter().flat_map(|node| [&node.prefixes, &node.expressions]);
            paths.exact.values().chain(nodes)
        });
        lists.map(Candidates::longest).max().unwrap_or(0)
    }
}

/// The matches of one host, by path.
#[derive(Debug)]
struct Paths {
    exact: HashMap<Box<str>, Candidates>,
    /// The trie; the first is the root.
    nodes: Box<[Node]>,
}

#[derive(Debug, Default)]
struct Node {
    /// By segment.
    children: HashMap<Box<str>, usize>,
    /// Prefixes that end here.
    prefixes: Candidates,
    /// Expressions whose literal start leads here.
    expressions: Candidates,
}

impl Paths {
    fn new(ranks: &[Rank], entries: &[Entry]) -> Self {
        let mut exact: BTreeMap<&str, Vec<Rank>> = BTreeMap::new();
        let mut grpc: BTreeMap<String, Vec<Rank>> = BTreeMap::new();
        let mut nodes = vec![Node::default()];
        let mut prefixes: Vec<Vec<Rank>> = vec![Vec::new()];
        let mut expressions: Vec<Vec<Rank>> = vec![Vec::new()];
        for rank in ranks {
            let (node, is_prefix) = match &entries[*rank as usize].compiled().path {
                PathTest::Exact(path) => {
                    exact.entry(path).or_default().push(*rank);
                    continue;
                }
                PathTest::Prefix(prefix) => (descend(&mut nodes, prefix), true),
                PathTest::Regex(pattern) => {
                    // The last segment of the literal may go on in the expression.
                    let start = pattern.literal_start();
                    let whole = &start[..start.rfind('/').unwrap_or(0)];
                    (descend(&mut nodes, whole), false)
                }
                PathTest::Grpc { service, method } => {
                    let service = service.as_ref().and_then(|test| test.exact());
                    let method = method.as_ref().and_then(|test| test.exact());
                    match (service, method) {
                        (Some(service), Some(method)) => {
                            grpc.entry(format!("/{service}/{method}")).or_default().push(*rank);
                            continue;
                        }
                        (Some(service), None) => {
                            (descend(&mut nodes, &format!("/{service}")), false)
                        }
                        (None, _) => (0, false),
                    }
                }
            };
            prefixes.resize(nodes.len(), Vec::new());
            expressions.resize(nodes.len(), Vec::new());
            let lists = if is_prefix { &mut prefixes } else { &mut expressions };
            lists[node].push(*rank);
        }
        for (path, ranks) in &grpc {
            exact.entry(path).or_default().extend(ranks);
        }
        for (node, (prefixes, expressions)) in
            nodes.iter_mut().zip(prefixes.iter().zip(&expressions))
        {
            node.prefixes = Candidates::new(prefixes, entries);
            node.expressions = Candidates::new(expressions, entries);
        }
        let exact = exact
            .into_iter()
            .map(|(path, mut ranks)| {
                ranks.sort_unstable();
                (path.into(), Candidates::new(&ranks, entries))
            })
            .collect();
        Self { exact, nodes: nodes.into() }
    }

    fn find(&self, request: &RequestHead<'_>, entries: &[Entry]) -> Option<Rank> {
        let path = request.path.path();
        let mut best = None;
        if let Some(list) = self.exact.get(path) {
            list.improve(&mut best, request, entries);
        }
        let mut node = self.nodes.first()?;
        node.expressions.improve(&mut best, request, entries);
        // `*` has no segments, and is below no prefix.
        let Some(segments) = path.strip_prefix('/') else { return best };
        node.prefixes.improve(&mut best, request, entries);
        for segment in segments.split('/') {
            let Some(child) = node.children.get(segment) else { break };
            node = &self.nodes[*child];
            node.expressions.improve(&mut best, request, entries);
            node.prefixes.improve(&mut best, request, entries);
        }
        best
    }
}

/// The node of a prefix, which is made when it is not there.
fn descend(nodes: &mut Vec<Node>, prefix: &str) -> usize {
    let mut node = 0;
    for segment in prefix.strip_prefix('/').into_iter().flat_map(|segments| segments.split('/')) {
        node = if let Some(child) = nodes[node].children.get(segment) {
            *child
        } else {
            let child = nodes.len();
            nodes.push(Node::default());
            nodes[node].children.insert(segment.into(), child);
            child
        };
    }
    node
}

/// Matches that the path alone does not tell apart.
#[derive(Debug, Default)]
struct Candidates {
    /// Gone through one by one.
    rest: Box<[Rank]>,
    /// Those that ask for one value of a header or parameter.
    keyed: Box<[Keyed]>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Key {
    Header(HeaderName),
    Query(Box<str>),
}

impl Candidates {
    /// `ranks` are sorted.
    fn new(ranks: &[Rank], entries: &[Entry]) -> Self {
        if ranks.len() <= SHORT {
            return Self { rest: ranks.into(), keyed: Box::default() };
        }
        let mut rest = Vec::new();
        let mut keyed: Vec<(Key, ByValue<Vec<Rank>>)> = Vec::new();
        let mut places: HashMap<Key, usize> = HashMap::new();
        for rank in ranks {
            let Some((key, value)) = key(entries[*rank as usize].compiled()) else {
                rest.push(*rank);
                continue;
            };
            let place = *places.entry(key.clone()).or_insert_with(|| {
                keyed.push((key, ByValue::new()));
                keyed.len() - 1
            });
            keyed[place].1.entry(value.as_bytes().into()).or_default().push(*rank);
        }
        let boxed = |(key, lists): (Key, ByValue<Vec<Rank>>)| {
            (key, lists.into_iter().map(|(value, ranks)| (value, ranks.into())).collect())
        };
        Self { rest: rest.into(), keyed: keyed.into_iter().map(boxed).collect() }
    }

    /// Lowers `best` to the lowest rank here that holds.
    fn improve(&self, best: &mut Option<Rank>, request: &RequestHead<'_>, entries: &[Entry]) {
        let mut through = |list: &[Rank]| {
            let better = |rank: &&Rank| best.is_none_or(|best| **rank < best);
            let holds = |rank: &&Rank| entries[**rank as usize].compiled().holds(request);
            if let Some(rank) = list.iter().take_while(better).find(holds) {
                *best = Some(*rank);
            }
        };
        through(&self.rest);
        for (key, lists) in &self.keyed {
            let value = match key {
                Key::Header(name) => request.header(name),
                Key::Query(name) => request.query(name),
            };
            if let Some(list) = value.and_then(|value| lists.get(&*value)) {
                through(list);
            }
        }
    }

    #[cfg(test)]
    #[expect(clippy::disallowed_methods, reason = "a maximum does not show the order")]
    fn longest(&self) -> usize {
        let keyed = self.keyed.iter().flat_map(|(_, lists)| lists.values());
        keyed.map(|list| list.len()).max().unwrap_or(0) + self.rest.len() + self.keyed.len()
    }
}

/// A header or parameter of which a match asks one value.
fn key(of: &CompiledMatch) -> Option<(Key, &str)> {
    let header = of
        .headers
        .iter()
        .find_map(|(name, test)| test.exact().map(|value| (Key::Header(name.clone()), value)));
    header.or_else(|| {
        of.query
            .iter()
            .find_map(|(name, test)| test.exact().map(|value| (Key::Query(name.clone()), value)))
    })
}
