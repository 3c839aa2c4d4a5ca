//! Policies in the form in which they are matched: only the conditions that are there, cheapest first, lists searched by halving.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use mesh_model::{IpPrefix, SpiffeId, path_text};
use serde::{Deserialize, Serialize};

use crate::claims::RequestClaims;
use crate::policy::{
    Action, ClaimMatch, HeaderMatch, Match, PathMatch, PathTemplate, Policy, PolicyScope,
    RequestMatch, ServiceAccountMatch, StringMatch,
};
use crate::request::Request;
use crate::set::Judged;
use crate::verdict::RuleRef;

/// What policies look at.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Subject<'a> {
    pub(crate) identity: Option<&'a SpiffeId>,
    pub(crate) source_ip: IpAddr,
    pub(crate) destination: SocketAddr,
    /// None at an agent, which sees connections.
    pub(crate) request: Option<&'a Request<'a>>,
}

impl Subject<'_> {
    fn claims(&self) -> Option<&RequestClaims> {
        self.request.and_then(Request::claims)
    }
}

/// A policy and its compiled rules.
#[derive(Debug)]
pub(crate) struct CompiledPolicy {
    source: Policy,
    rules: Box<[CompiledRule]>,
}

impl CompiledPolicy {
    pub(crate) fn new(source: Policy) -> Self {
        let unseen_holds = source.action == Action::Deny;
        let rules = source
            .rules
            .iter()
            .map(|rule| CompiledRule {
                clauses: rule
                    .clauses
                    .iter()
                    .map(|clause| CompiledClause {
                        matches: clause
                            .matches
                            .iter()
                            .map(|one| CompiledMatch::new(one, unseen_holds))
                            .collect(),
                    })
                    .collect(),
            })
            .collect();
        Self { source, rules }
    }

    pub(crate) const fn source(&self) -> &Policy {
        &self.source
    }

    pub(crate) const fn rules(&self) -> &[CompiledRule] {
        &self.rules
    }

    /// True when the policy applies without being listed.
    pub(crate) fn applies_by_scope(&self, judged: Judged<'_>) -> bool {
        match (self.source.scope, judged.namespace) {
            (PolicyScope::Global, Some(_)) => true,
            (PolicyScope::Namespace, Some(namespace)) => self.source.name.namespace == *namespace,
            (PolicyScope::Workload, _) | (_, None) => false,
        }
    }

    /// The first rule that matches.
    pub(crate) fn matching_rule(&self, subject: &Subject<'_>) -> Option<usize> {
        self.rules.iter().position(|rule| rule.failed_clause(subject).is_none())
    }

    pub(crate) fn rule_ref(&self, rule_index: Option<usize>) -> RuleRef {
        RuleRef { origin: self.source.origin.clone(), rule_index }
    }
}

#[derive(Debug)]
pub(crate) struct CompiledRule {
    clauses: Box<[CompiledClause]>,
}

impl CompiledRule {
    /// The first clause that does not match; none when the rule does.
    pub(crate) fn failed_clause(&self, subject: &Subject<'_>) -> Option<usize> {
        self.clauses.iter().position(|clause| !clause.holds(subject))
    }

    /// What about a clause does not hold.
    pub(crate) fn failed_conditions(
        &self,
        clause: usize,
        subject: &Subject<'_>,
    ) -> Vec<FailedCondition> {
        let clause = self.clauses.get(clause);
        let matches = clause.into_iter().flat_map(|clause| &clause.matches);
        matches.filter_map(|one| one.failed(subject)).collect()
    }
}

#[derive(Debug)]
struct CompiledClause {
    matches: Box<[CompiledMatch]>,
}

impl CompiledClause {
    fn holds(&self, subject: &Subject<'_>) -> bool {
        self.matches.is_empty() || self.matches.iter().any(|one| one.failed(subject).is_none())
    }
}

/// All of its conditions must hold; without any it never does.
#[derive(Debug)]
struct CompiledMatch {
    conditions: Box<[Condition]>,
    /// Those on the request.
    of_request: Box<[Condition]>,
    /// Whether the latter hold where no request is seen.
    unseen_holds: bool,
}

#[derive(Debug)]
struct Condition {
    test: Test,
    /// One of the listed values must be met (true), or none may be (false).
    expected: bool,
}

#[derive(Debug)]
enum Test {
    DestinationPort(Box<[u16]>),
    SourceIp(IpSet),
    DestinationIp(IpSet),
    Namespace(TextSet),
    Principal(TextSet),
    ServiceAccount(Box<[ServiceAccountMatch]>),
    TrustDomain(TextSet),
    Host(TextSet),
    Method(TextSet),
    Path(TextSet, Box<[PathTemplate]>),
    Header(Arc<str>, TextSet),
    RequestPrincipal(TextSet),
    Claim(Arc<[Arc<str>]>, TextSet),
}

/// A condition of a match that does not hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FailedCondition {
    /// What it is about.
    pub attribute: Attribute,
    /// True for a `not_` list.
    pub negated: bool,
}

/// What a condition is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Attribute {
    /// The application's port.
    DestinationPort,
    /// The address the connection comes from.
    SourceIp,
    /// The pod's address.
    DestinationIp,
    /// The peer's namespace.
    Namespace,
    /// The peer's identity.
    Principal,
    /// The peer's service account.
    ServiceAccount,
    /// The peer's trust domain.
    TrustDomain,
    /// The request's host.
    Host,
    /// The request's method.
    Method,
    /// The request's path.
    Path,
    /// A header of the request.
    Header,
    /// The principal of the request's token.
    RequestPrincipal,
    /// A claim of the request's token.
    Claim,
    /// The request, of which nothing is known.
    Request,
    /// Nothing: an empty match never holds.
    Nothing,
}

impl Attribute {
    /// The word in explanations.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::DestinationPort => "destination port",
            Self::SourceIp => "source address",
            Self::DestinationIp => "destination address",
            Self::Namespace => "source namespace",
            Self::Principal => "source principal",
            Self::ServiceAccount => "source service account",
            Self::TrustDomain => "source trust domain",
            Self::Host => "host",
            Self::Method => "method",
            Self::Path => "path",
            Self::Header => "request header",
            Self::RequestPrincipal => "request principal",
            Self::Claim => "claim of the request's token",
            Self::Request => "request (only a waypoint sees it)",
            Self::Nothing => "nothing (an empty match never holds)",
        }
    }
}

impl CompiledMatch {
    fn new(of: &Match, unseen_holds: bool) -> Self {
        let ports = |list: &[u16]| Test::DestinationPort(sorted(list));
        let source_ips = |list: &[IpPrefix]| Test::SourceIp(IpSet::new(list));
        let destination_ips = |list: &[IpPrefix]| Test::DestinationIp(IpSet::new(list));
        let namespaces = |list: &[StringMatch]| Test::Namespace(TextSet::new(list));
        let principals = |list: &[StringMatch]| Test::Principal(TextSet::new(list));
        let accounts = |list: &[ServiceAccountMatch]| Test::ServiceAccount(sorted(list));
        let trust_domains = |list: &[StringMatch]| Test::TrustDomain(TextSet::new(list));
        let conditions = [
            twins(&of.destination_ports, &of.not_destination_ports, ports),
            twins(&of.source_ips, &of.not_source_ips, source_ips),
            twins(&of.destination_ips, &of.not_destination_ips, destination_ips),
            twins(&of.namespaces, &of.not_namespaces, namespaces),
            twins(&of.principals, &of.not_principals, principals),
            twins(&of.service_accounts, &of.not_service_accounts, accounts),
            twins(&of.trust_domains, &of.not_trust_domains, trust_domains),
        ];
        Self {
            conditions: conditions.into_iter().flatten().flatten().collect(),
            of_request: request_conditions(&of.request),
            unseen_holds,
        }
    }

    /// A condition that does not hold; none when the match does.
    fn failed(&self, subject: &Subject<'_>) -> Option<FailedCondition> {
        let plainly = |attribute| Some(FailedCondition { attribute, negated: false });
        if self.conditions.is_empty() && self.of_request.is_empty() {
            return plainly(Attribute::Nothing);
        }
        let fails = |one: &&Condition| one.test.met(subject) != one.expected;
        let failed = match (self.conditions.iter().find(fails), subject.request) {
            (Some(failed), _) => failed,
            (None, Some(_)) => self.of_request.iter().find(fails)?,
            (None, None) if self.of_request.is_empty() || self.unseen_holds => return None,
            (None, None) => return plainly(Attribute::Request),
        };
        Some(FailedCondition { attribute: failed.test.attribute(), negated: !failed.expected })
    }
}

fn request_conditions(of: &RequestMatch) -> Box<[Condition]> {
    let hosts = |list: &[StringMatch]| {
        let list: Vec<_> = list.iter().map(StringMatch::to_ascii_lowercase).collect();
        Test::Host(TextSet::new(&list))
    };
    let methods = |list: &[StringMatch]| Test::Method(TextSet::new(list));
    let paths = |list: &[PathMatch]| {
        let mut texts = Vec::new();
        let mut templates = Vec::new();
        for one in list {
            match one {
                PathMatch::Text(text) => texts.push(text.map(path_text)),
                PathMatch::Template(template) => templates.push(template.clone()),
            }
        }
        Test::Path(TextSet::new(&texts), templates.into())
    };
    let headers = of.headers.iter().flat_map(|HeaderMatch { name, values, not_values }| {
        twins(values, not_values, |list| Test::Header(Arc::clone(name), TextSet::new(list)))
    });
    let claims = of.claims.iter().flat_map(|ClaimMatch { path, values, not_values }| {
        twins(values, not_values, |list| Test::Claim(Arc::clone(path), TextSet::new(list)))
    });
    let principals = |list: &[StringMatch]| Test::RequestPrincipal(TextSet::new(list));
    let conditions = [
        twins(&of.methods, &of.not_methods, methods),
        twins(&of.hosts, &of.not_hosts, hosts),
        twins(&of.paths, &of.not_paths, paths),
        twins(&of.principals, &of.not_principals, principals),
    ];
    conditions.into_iter().flatten().chain(headers).chain(claims).flatten().collect()
}

fn twins<T>(any_of: &[T], none_of: &[T], test: impl Fn(&[T]) -> Test) -> [Option<Condition>; 2] {
    [(any_of, true), (none_of, false)].map(|(list, expected)| {
        (!list.is_empty()).then(|| Condition { test: test(list), expected })
    })
}

impl Test {
    /// True when one of the listed values is met. Without identity none is, but for the namespace, which is empty then.
    fn met(&self, subject: &Subject<'_>) -> bool {
        let identity = subject.identity;
        match self {
            Self::DestinationPort(ports) => {
                ports.binary_search(&subject.destination.port()).is_ok()
            }
            Self::SourceIp(ips) => ips.contains(subject.source_ip),
            Self::DestinationIp(ips) => ips.contains(subject.destination.ip()),
            Self::Namespace(texts) => texts.contains(identity.map_or("", SpiffeId::namespace)),
            Self::Principal(texts) => identity.is_some_and(|id| texts.contains(id.principal())),
            Self::ServiceAccount(accounts) => identity.is_some_and(|id| {
                let wanted = (id.namespace(), id.service_account());
                let found = accounts
                    .binary_search_by(|one| (&*one.namespace, &*one.service_account).cmp(&wanted));
                found.is_ok()
            }),
            Self::TrustDomain(texts) => {
                identity.is_some_and(|id| texts.contains(id.trust_domain()))
            }
            Self::Host(texts) => subject.request.is_some_and(|request| {
                texts.contains(request.host()) || texts.contains(request.authority())
            }),
            Self::Method(texts) => {
                subject.request.is_some_and(|request| texts.contains(request.method()))
            }
            Self::Path(texts, templates) => subject.request.is_some_and(|request| {
                texts.contains(request.path())
                    || templates.iter().any(|template| template.matches(request.path()))
            }),
            Self::Header(name, texts) => subject
                .request
                .and_then(|request| request.header(name))
                .is_some_and(|value| texts.contains(&value)),
            Self::RequestPrincipal(texts) => subject
                .claims()
                .and_then(RequestClaims::principal)
                .is_some_and(|principal| texts.contains(principal)),
            Self::Claim(path, texts) => subject
                .claims()
                .is_some_and(|claims| claims.any(path, &|text| texts.contains(text))),
        }
    }

    const fn attribute(&self) -> Attribute {
        match self {
            Self::DestinationPort(_) => Attribute::DestinationPort,
            Self::SourceIp(_) => Attribute::SourceIp,
            Self::DestinationIp(_) => Attribute::DestinationIp,
            Self::Namespace(_) => Attribute::Namespace,
            Self::Principal(_) => Attribute::Principal,
            Self::ServiceAccount(_) => Attribute::ServiceAccount,
            Self::TrustDomain(_) => Attribute::TrustDomain,
            Self::Host(_) => Attribute::Host,
            Self::Method(_) => Attribute::Method,
            Self::Path(..) => Attribute::Path,
            Self::Header(..) => Attribute::Header,
            Self::RequestPrincipal(_) => Attribute::RequestPrincipal,
            Self::Claim(..) => Attribute::Claim,
        }
    }
}

fn sorted<T: Ord + Clone>(list: &[T]) -> Box<[T]> {
    let mut list = list.to_vec();
    list.sort();
    list.dedup();
    list.into()
}

/// Texts, beginnings and ends.
#[derive(Debug)]
struct TextSet {
    present: bool,
    exact: Box<[Arc<str>]>,
    prefixes: PrefixSet,
    /// The ends, reversed.
    suffixes: PrefixSet,
}

impl TextSet {
    fn new(list: &[StringMatch]) -> Self {
        let mut exact = Vec::new();
        let mut prefixes = Vec::new();
        let mut suffixes = Vec::new();
        let mut present = false;
        for one in list {
            match one {
                StringMatch::Exact(text) => exact.push(Arc::clone(text)),
                StringMatch::Prefix(text) => prefixes.push(text.bytes().collect()),
                StringMatch::Suffix(text) => suffixes.push(text.bytes().rev().collect()),
                StringMatch::Presence => present = true,
            }
        }
        Self {
            present,
            exact: sorted(&exact),
            prefixes: PrefixSet::new(prefixes),
            suffixes: PrefixSet::new(suffixes),
        }
    }

    fn contains(&self, text: &str) -> bool {
        (self.present && !text.is_empty())
            || self.exact.binary_search_by(|one| (**one).cmp(text)).is_ok()
            || self.prefixes.begins(text.bytes())
            || self.suffixes.begins(text.bytes().rev())
    }
}

/// Byte strings, sorted, none of which begins with another.
#[derive(Debug)]
struct PrefixSet(Box<[Box<[u8]>]>);

impl PrefixSet {
    fn new(mut prefixes: Vec<Box<[u8]>>) -> Self {
        prefixes.sort();
        prefixes.dedup_by(|later, kept| later.starts_with(kept));
        Self(prefixes.into())
    }

    /// True when one of them begins `text`. Only the last one that sorts before the text can: whatever sorts between a
    /// beginning of the text and the text begins with that beginning, and is not in the set.
    fn begins(&self, text: impl Iterator<Item = u8> + Clone) -> bool {
        let after = self.0.partition_point(|one| one.iter().copied().le(text.clone()));
        let last = after.checked_sub(1).and_then(|index| self.0.get(index));
        last.is_some_and(|one| {
            let mut text = text;
            one.iter().all(|byte| text.next() == Some(*byte))
        })
    }
}

/// Addresses, as sorted ranges that neither meet nor touch.
#[derive(Debug)]
struct IpSet {
    v4: Box<[(u32, u32)]>,
    v6: Box<[(u128, u128)]>,
}

impl IpSet {
    fn new(prefixes: &[IpPrefix]) -> Self {
        let mut v4 = Vec::new();
        let mut v6 = Vec::new();
        for prefix in prefixes {
            match prefix.network() {
                IpAddr::V4(lowest) => {
                    let lowest = lowest.to_bits();
                    let host = u32::MAX.checked_shr(prefix.length().into()).unwrap_or(0);
                    v4.push((lowest, lowest | host));
                }
                IpAddr::V6(lowest) => {
                    let lowest = lowest.to_bits();
                    let host = u128::MAX.checked_shr(prefix.length().into()).unwrap_or(0);
                    v6.push((lowest, lowest | host));
                }
            }
        }
        Self { v4: merged(v4), v6: merged(v6) }
    }

    fn contains(&self, ip: IpAddr) -> bool {
        match ip {
            IpAddr::V4(ip) => within(&self.v4, ip.to_bits()),
            IpAddr::V6(ip) => within(&self.v6, ip.to_bits()),
        }
    }
}

/// Prefixes either contain each other or are apart, so keeping the outer ones suffices.
fn merged<N: Ord + Copy>(mut ranges: Vec<(N, N)>) -> Box<[(N, N)]> {
    ranges.sort_by_key(|(first, last)| (*first, std::cmp::Reverse(*last)));
    ranges.dedup_by(|later, kept| later.1 <= kept.1);
    ranges.into()
}

fn within<N: Ord + Copy>(ranges: &[(N, N)], value: N) -> bool {
    let after = ranges.partition_point(|(first, _)| *first <= value);
    let last = after.checked_sub(1).and_then(|index| ranges.get(index));
    last.is_some_and(|(_, last)| value <= *last)
}
