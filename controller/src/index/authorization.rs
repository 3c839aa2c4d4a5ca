//! AuthorizationPolicy to [`Policy`].
//!
//! Content that only a waypoint can judge is never dropped silently. It fails closed, and the notes say how:
//! an ALLOW rule with such content allows nothing; a DENY (or CUSTOM) rule is widened to what is left of it; an AUDIT
//! rule is not evaluated.
//!
//! A policy with targetRefs is enforced at the endpoints of its target, on the target's ports. Because ALLOW would also
//! refuse every other port of those workloads, the ALLOW policies of one target become one DENY policy that matches what
//! none of them allows (see [`negate`]).

use std::collections::BTreeSet;
use std::sync::Arc;

use mesh_authorize::{
    Action, ClaimMatch, Clause, HeaderMatch, Match, PathMatch, Policy, PolicyKind, PolicyName,
    PolicyOrigin, PolicyScope, RequestMatch, Rule, ServiceAccountMatch, StringMatch,
};

use super::objects::Key;
use crate::manifest::AuthorizationPolicy;
use crate::manifest::policy::{Condition, Operation, PolicyAction, PolicyRule, Source, Twin};

/// Most rules that the negation of a target's ALLOW policies may need; beyond, the target's ports are closed.
const MAX_NEGATED_RULES: usize = 256;

/// What a policy became.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Converted {
    /// Its rules.
    pub(super) rules: Vec<Rule>,
    /// What could not be enforced as written, one sentence each.
    pub(super) notes: Vec<String>,
}

/// The scope of a policy without targetRefs.
pub(super) fn scope(policy: &AuthorizationPolicy, root_namespace: &str) -> PolicyScope {
    match &policy.selector {
        Some(_) => PolicyScope::Workload,
        None if *policy.meta.namespace == *root_namespace => PolicyScope::Global,
        None => PolicyScope::Namespace,
    }
}

/// The action by which it is enforced; CUSTOM, which needs a waypoint, refuses.
pub(super) const fn action(policy: &AuthorizationPolicy) -> Action {
    match policy.action {
        PolicyAction::Allow => Action::Allow,
        PolicyAction::Deny | PolicyAction::Custom => Action::Deny,
        PolicyAction::Audit => Action::Audit,
    }
}

/// Where a verdict of it is said to come from.
pub(super) fn origin(policy: &AuthorizationPolicy) -> PolicyOrigin {
    PolicyOrigin {
        kind: PolicyKind::AuthorizationPolicy,
        namespace: policy.meta.namespace.clone(),
        name: policy.meta.name.clone(),
        unreadable: None,
    }
}

/// Builds the policy of an object without targetRefs.
pub(super) fn policy(policy: &AuthorizationPolicy, root_namespace: &str) -> (Policy, Vec<String>) {
    let Converted { rules, notes } = convert(policy);
    let built = Policy {
        name: PolicyName {
            namespace: policy.meta.namespace.clone(),
            name: policy.meta.name.clone(),
        },
        origin: origin(policy),
        scope: scope(policy, root_namespace),
        action: action(policy),
        dry_run: policy.dry_run,
        rules,
    };
    (built, notes)
}

/// Builds the policy of an object with targetRefs as waypoints judge it: whole, under the object's own name.
pub(super) fn at_waypoint(policy: &AuthorizationPolicy) -> (Policy, Vec<String>) {
    let Converted { rules, notes } = convert_for(policy, Judge::Waypoint);
    let built = Policy {
        name: PolicyName::new(&policy.meta.namespace, &policy.meta.name),
        origin: origin(policy),
        scope: PolicyScope::Workload,
        action: action(policy),
        dry_run: policy.dry_run,
        rules,
    };
    (built, notes)
}

/// Who judges.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Judge {
    /// An agent: connections.
    Agent,
    /// A waypoint: requests too.
    Waypoint,
}

impl Judge {
    /// Why it cannot judge something.
    const fn excuse(self) -> &'static str {
        match self {
            Self::Agent => "can only be judged by a waypoint, and none is bound",
            Self::Waypoint => "is not supported by waypoints yet",
        }
    }
}

/// The rules that remain at L4.
pub(super) fn convert(policy: &AuthorizationPolicy) -> Converted {
    convert_for(policy, Judge::Agent)
}

fn convert_for(policy: &AuthorizationPolicy, judge: Judge) -> Converted {
    let excuse = judge.excuse();
    let mut converted = Converted { rules: Vec::new(), notes: Vec::new() };
    if policy.action == PolicyAction::Custom {
        converted.notes.push(
            match judge {
                Judge::Agent => "action CUSTOM needs a waypoint; what it matches is denied",
                Judge::Waypoint => "action CUSTOM is not supported yet; what it matches is denied",
            }
            .into(),
        );
    }
    for (index, rule) in policy.rules.iter().enumerate() {
        let l7 = l7_fields(rule, judge);
        if l7.is_empty() {
            converted.rules.push(strict_rule(rule, judge));
            continue;
        }
        let l7: Vec<&str> = l7.into_iter().collect();
        let l7 = l7.join(", ");
        match policy.action {
            PolicyAction::Allow => {
                converted.notes.push(format!("rule {index} allows nothing: {l7} {excuse}"));
            }
            PolicyAction::Audit => {
                converted.notes.push(format!("rule {index} is not evaluated: {l7} {excuse}"));
            }
            PolicyAction::Deny | PolicyAction::Custom => {
                let rule = widened_rule(rule, judge);
                let effect = if rule.clauses.is_empty() {
                    "denies everything it selects"
                } else {
                    "denies more than written"
                };
                converted.notes.push(format!("rule {index} {effect}: {l7} {excuse}"));
                converted.rules.push(rule);
            }
        }
    }
    converted
}

/// What of a rule `judge` cannot judge.
fn l7_fields(rule: &PolicyRule, judge: Judge) -> BTreeSet<&str> {
    let is_agent = judge == Judge::Agent;
    let unjudged = rule.from.iter().flat_map(|source| source.unjudged.iter().copied());
    let sources = rule.from.iter().filter(|_| is_agent);
    let sources = sources.flat_map(|source| source.l7_fields.iter().copied());
    let operations = rule.to.iter().filter(|_| is_agent);
    let operations = operations.flat_map(|operation| operation.l7_fields.iter().copied());
    let conditions = rule.when.iter().filter_map(|condition| match condition {
        Condition::L7(key) => Some(key.as_str()),
        Condition::Header { key, .. } | Condition::Claim { key, .. } if is_agent => {
            Some(key.as_str())
        }
        Condition::RequestPrincipal(_) if is_agent => Some("request.auth.principal"),
        Condition::Header { .. }
        | Condition::Claim { .. }
        | Condition::RequestPrincipal(_)
        | Condition::SourceIp(_)
        | Condition::DestinationIp(_)
        | Condition::DestinationPort(_)
        | Condition::Namespace(_)
        | Condition::Principal(_)
        | Condition::ServiceAccount(_)
        | Condition::TrustDomain(_) => None,
    });
    unjudged.chain(sources).chain(operations).chain(conditions).collect()
}

/// Clauses in the order that peers use: `to`, `from`, then each of `when`.
fn strict_rule(rule: &PolicyRule, judge: Judge) -> Rule {
    let mut clauses = Vec::new();
    if !rule.to.is_empty() {
        clauses.push(Clause {
            matches: rule.to.iter().map(|to| operation_match(to, judge)).collect(),
        });
    }
    if !rule.from.is_empty() {
        clauses.push(Clause {
            matches: rule.from.iter().map(|from| source_match(from, judge)).collect(),
        });
    }
    clauses.extend(
        rule.when
            .iter()
            .filter_map(|when| condition_match(when, judge))
            .map(|only| Clause { matches: vec![only] }),
    );
    Rule { clauses }
}

/// The rule without its L7 part. An alternative of which nothing is left matches everything, and so does its clause.
fn widened_rule(rule: &PolicyRule, judge: Judge) -> Rule {
    let strict = strict_rule(rule, judge);
    let is_open = |clause: &Clause| clause.matches.iter().any(|one| *one == Match::default());
    Rule { clauses: strict.clauses.into_iter().filter(|clause| !is_open(clause)).collect() }
}

fn operation_match(operation: &Operation, judge: Judge) -> Match {
    let request = match judge {
        Judge::Agent => RequestMatch::default(),
        Judge::Waypoint => {
            let (hosts, not_hosts) = strings(&operation.hosts);
            let (methods, not_methods) = strings(&operation.methods);
            RequestMatch {
                hosts,
                not_hosts,
                methods,
                not_methods,
                paths: operation.paths.any_of.iter().map(|text| path_match(text)).collect(),
                not_paths: operation.paths.none_of.iter().map(|text| path_match(text)).collect(),
                ..RequestMatch::default()
            }
        }
    };
    Match {
        destination_ports: operation.ports.any_of.clone(),
        not_destination_ports: operation.ports.none_of.clone(),
        request,
        ..Match::default()
    }
}

/// A template where it is one; reading the manifest refused braces that are none.
fn path_match(text: &str) -> PathMatch {
    match text.parse() {
        Ok(template) if text.contains('{') => PathMatch::Template(template),
        Ok(_) | Err(_) => PathMatch::Text(string_match(text)),
    }
}

fn source_match(source: &Source, judge: Judge) -> Match {
    let request = match judge {
        Judge::Agent => RequestMatch::default(),
        Judge::Waypoint => of_principals(&source.request_principals),
    };
    let (principals, not_principals) = strings(&source.principals);
    let (namespaces, not_namespaces) = strings(&source.namespaces);
    let (trust_domains, not_trust_domains) = strings(&source.trust_domains);
    let (service_accounts, not_service_accounts) = accounts(&source.service_accounts);
    Match {
        principals,
        not_principals,
        namespaces,
        not_namespaces,
        trust_domains,
        not_trust_domains,
        service_accounts,
        not_service_accounts,
        source_ips: source.ip_blocks.any_of.clone(),
        not_source_ips: source.ip_blocks.none_of.clone(),
        request,
        ..Match::default()
    }
}

fn of_principals(names: &Twin<String>) -> RequestMatch {
    let (principals, not_principals) = strings(names);
    RequestMatch { principals, not_principals, ..RequestMatch::default() }
}

fn condition_match(condition: &Condition, judge: Judge) -> Option<Match> {
    let blank = Match::default();
    Some(match condition {
        Condition::SourceIp(blocks) => Match {
            source_ips: blocks.any_of.clone(),
            not_source_ips: blocks.none_of.clone(),
            ..blank
        },
        Condition::DestinationIp(blocks) => Match {
            destination_ips: blocks.any_of.clone(),
            not_destination_ips: blocks.none_of.clone(),
            ..blank
        },
        Condition::DestinationPort(ports) => Match {
            destination_ports: ports.any_of.clone(),
            not_destination_ports: ports.none_of.clone(),
            ..blank
        },
        Condition::Namespace(names) => {
            let (namespaces, not_namespaces) = strings(names);
            Match { namespaces, not_namespaces, ..blank }
        }
        Condition::Principal(names) => {
            let (principals, not_principals) = strings(names);
            Match { principals, not_principals, ..blank }
        }
        Condition::ServiceAccount(names) => {
            let (service_accounts, not_service_accounts) = accounts(names);
            Match { service_accounts, not_service_accounts, ..blank }
        }
        Condition::TrustDomain(names) => {
            let (trust_domains, not_trust_domains) = strings(names);
            Match { trust_domains, not_trust_domains, ..blank }
        }
        Condition::Header { name, values, .. } if judge == Judge::Waypoint => {
            let (values, not_values) = strings(values);
            let header = HeaderMatch { name: Arc::clone(name), values, not_values };
            let request = RequestMatch { headers: vec![header], ..RequestMatch::default() };
            Match { request, ..blank }
        }
        Condition::RequestPrincipal(names) if judge == Judge::Waypoint => {
            Match { request: of_principals(names), ..blank }
        }
        Condition::Claim { path, values, .. } if judge == Judge::Waypoint => {
            let (values, not_values) = strings(values);
            let claim = ClaimMatch { path: Arc::clone(path), values, not_values };
            let request = RequestMatch { claims: vec![claim], ..RequestMatch::default() };
            Match { request, ..blank }
        }
        Condition::Header { .. }
        | Condition::RequestPrincipal(_)
        | Condition::Claim { .. }
        | Condition::L7(_) => return None,
    })
}

fn strings(twin: &Twin<String>) -> (Vec<StringMatch>, Vec<StringMatch>) {
    let convert = |list: &[String]| list.iter().map(|text| string_match(text)).collect();
    (convert(&twin.any_of), convert(&twin.none_of))
}

fn string_match(text: &str) -> StringMatch {
    if text == "*" {
        StringMatch::Presence
    } else if let Some(suffix) = text.strip_prefix('*') {
        StringMatch::Suffix(suffix.into())
    } else if let Some(prefix) = text.strip_suffix('*') {
        StringMatch::Prefix(prefix.into())
    } else {
        StringMatch::Exact(text.into())
    }
}

fn accounts(twin: &Twin<(String, String)>) -> (Vec<ServiceAccountMatch>, Vec<ServiceAccountMatch>) {
    let convert = |list: &[(String, String)]| {
        list.iter()
            .map(|(namespace, name)| ServiceAccountMatch {
                namespace: namespace.as_str().into(),
                service_account: name.as_str().into(),
            })
            .collect()
    };
    (convert(&twin.any_of), convert(&twin.none_of))
}

/// Adds "on one of these ports" to each rule.
pub(super) fn on_ports(rules: Vec<Rule>, ports: &[u16]) -> Vec<Rule> {
    let only =
        Clause { matches: vec![Match { destination_ports: ports.to_vec(), ..Match::default() }] };
    rules
        .into_iter()
        .map(|rule| Rule { clauses: [only.clone()].into_iter().chain(rule.clauses).collect() })
        .collect()
}

/// Rules that match exactly what none of `rules` matches; `None` when that takes too many.
///
/// Each rule fails when one of its clauses fails, a clause when all of its matches fail, and a match when one of its
/// attributes fails. So for every way to choose one clause of each rule there is one rule, with one clause per match of
/// the chosen clauses, which lists the opposites of that match's attributes.
pub(super) fn negate(rules: &[Rule]) -> Option<Vec<Rule>> {
    let mut negated = vec![Rule { clauses: Vec::new() }];
    for rule in rules {
        let mut next = Vec::new();
        for clause in &rule.clauses {
            // A clause without matches is true, so choosing it cannot make the rule fail.
            if clause.matches.is_empty() {
                continue;
            }
            for partial in &negated {
                if next.len() >= MAX_NEGATED_RULES {
                    return None;
                }
                let opposites =
                    clause.matches.iter().map(opposite).filter(|clause| !clause.matches.is_empty());
                next.push(Rule {
                    clauses: partial.clauses.iter().cloned().chain(opposites).collect(),
                });
            }
        }
        negated = next;
    }
    Some(negated)
}

/// The clause that is true when `one` is not. Empty for a match without attributes, which is never true.
fn opposite(one: &Match) -> Clause {
    let blank = Match::default;
    let Match {
        namespaces,
        not_namespaces,
        principals,
        not_principals,
        source_ips,
        not_source_ips,
        destination_ips,
        not_destination_ips,
        destination_ports,
        not_destination_ports,
        service_accounts,
        not_service_accounts,
        trust_domains,
        not_trust_domains,
        // The rules negated here are L4 rules.
        request: _,
    } = one.clone();
    let matches = [
        Match { not_namespaces: namespaces, ..blank() },
        Match { namespaces: not_namespaces, ..blank() },
        Match { not_principals: principals, ..blank() },
        Match { principals: not_principals, ..blank() },
        Match { not_source_ips: source_ips, ..blank() },
        Match { source_ips: not_source_ips, ..blank() },
        Match { not_destination_ips: destination_ips, ..blank() },
        Match { destination_ips: not_destination_ips, ..blank() },
        Match { not_destination_ports: destination_ports, ..blank() },
        Match { destination_ports: not_destination_ports, ..blank() },
        Match { not_service_accounts: service_accounts, ..blank() },
        Match { service_accounts: not_service_accounts, ..blank() },
        Match { not_trust_domains: trust_domains, ..blank() },
        Match { trust_domains: not_trust_domains, ..blank() },
    ];
    Clause { matches: matches.into_iter().filter(|one| *one != Match::default()).collect() }
}

/// One policy for all ALLOW policies of a target: it denies, on the target's ports, what none of them allows.
pub(super) fn target_allow(
    name: PolicyName,
    policies: &[&Arc<AuthorizationPolicy>],
    ports: &[u16],
    dry_run: bool,
) -> (Policy, Vec<String>) {
    let mut rules = Vec::new();
    let mut notes = Vec::new();
    for policy in policies {
        let converted = convert(policy);
        rules.extend(converted.rules);
        notes.extend(converted.notes);
    }
    let negated = negate(&rules).unwrap_or_else(|| {
        notes.push(format!(
            "its rules need more than {MAX_NEGATED_RULES} at L4: the target's ports are closed"
        ));
        vec![Rule { clauses: Vec::new() }]
    });
    let origin = match policies {
        [one] => origin(one),
        [..] => PolicyOrigin {
            kind: PolicyKind::AuthorizationPolicy,
            namespace: name.namespace.clone(),
            name: policies
                .iter()
                .map(|policy| &*policy.meta.name)
                .collect::<Vec<_>>()
                .join("+")
                .into(),
            unreadable: None,
        },
    };
    let policy = Policy {
        origin,
        scope: PolicyScope::Workload,
        action: Action::Deny,
        dry_run,
        rules: on_ports(negated, ports),
        name,
    };
    (policy, notes)
}

/// The DENY or AUDIT policy of one object at one target.
pub(super) fn target_policy(
    name: PolicyName,
    policy: &AuthorizationPolicy,
    ports: &[u16],
) -> (Policy, Vec<String>) {
    let Converted { rules, notes } = convert(policy);
    let built = Policy {
        name,
        origin: origin(policy),
        scope: PolicyScope::Workload,
        action: action(policy),
        dry_run: policy.dry_run,
        rules: on_ports(rules, ports),
    };
    (built, notes)
}

/// Name of the policy that [`target_allow`] makes. The underscore keeps it apart from every object's name.
pub(super) fn target_allow_name(target: &Key, kind: &str) -> PolicyName {
    PolicyName {
        namespace: target.namespace.clone(),
        name: format!("allow_{kind}_{}", target.name).into(),
    }
}

/// Name of the policy of one object at one target.
pub(super) fn target_policy_name(
    policy: &AuthorizationPolicy,
    target: &Key,
    kind: &str,
) -> PolicyName {
    PolicyName {
        namespace: target.namespace.clone(),
        name: format!("{}_{kind}_{}", policy.meta.name, target.name).into(),
    }
}
