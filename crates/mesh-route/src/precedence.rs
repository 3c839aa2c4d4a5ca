//! Which of several rules that match a request wins.
//!
//! HTTPRoutes: exact paths; then expressions; then prefixes, the longest first; then with a method before without; then by
//! most headers; then by most query parameters. GRPCRoutes: the longest service; then the longest method; then by most headers.
//! What is equal then: the older route; the first by `namespace/name`; the first rule; the first match.
//! Source: Gateway API `HTTPRouteRule.matches` and `GRPCRouteRule.matches`. The place of expressions is left to the
//! implementation; the longer expression goes first.

use std::cmp::{Ordering, Reverse};

use crate::route::RouteName;

/// Sorts earlier when it wins.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Precedence {
    pub(crate) path: PathClass,
    /// Of the path or gRPC service. Characters.
    pub(crate) path_length: Reverse<usize>,
    /// Of the gRPC method, in characters; of an HTTP method, 1.
    pub(crate) method_length: Reverse<usize>,
    pub(crate) headers: Reverse<usize>,
    pub(crate) query: Reverse<usize>,
}

/// How a path is matched. A gateway may have both kinds of routes; those of gRPC go first there, as they do at a service.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum PathClass {
    Grpc,
    Exact,
    Regex,
    Prefix,
}

/// Where a match stands in its route, and that among the others.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Position<'r> {
    pub(crate) created_at_s: Option<u64>,
    pub(crate) route: &'r RouteName,
    pub(crate) rule: usize,
    pub(crate) one: usize,
}

impl Position<'_> {
    pub(crate) fn order(&self, other: &Self) -> Ordering {
        let age = |position: &Self| (position.created_at_s.is_none(), position.created_at_s);
        let place = |position: &Self| (position.rule, position.one);
        age(self)
            .cmp(&age(other))
            .then_with(|| by_name(self.route, other.route))
            .then_with(|| place(self).cmp(&place(other)))
    }
}

/// As the joined texts sort: `a-b/x` before `a/x`.
fn by_name(one: &RouteName, other: &RouteName) -> Ordering {
    let joined = |name: &RouteName| format!("{}/{}", name.namespace, name.name);
    if one.namespace == other.namespace {
        one.name.cmp(&other.name)
    } else {
        joined(one).cmp(&joined(other))
    }
}
