//! The policy engine over policies of any structure, against the slow reading of the same rules.

use std::sync::Arc;
use std::time::Instant;

use arbitrary::{Result, Unstructured};
use mesh_authorize::{
    Action, Clause, Decision, Match, MissingPolicy, Outcome, Policy, PolicyKind, PolicyName,
    PolicyOrigin, PolicyScope, PolicySet, Rule, ServiceAccountMatch, StringMatch, authorize,
    explain,
};
use mesh_model::{
    ClientAddr, Direction, Flow, FlowId, IpPrefix, OrigDst, PodUid, SpiffeId, Workload,
};
use mesh_resolve::{ResolveSettings, ResolvedFlow, Route, WorkloadIndex, resolve_inbound};

const NAMES: [&str; 4] = ["a", "ab", "b", ""];
const PORTS: [u16; 4] = [80, 81, 15008, 0];

fn name(u: &mut Unstructured<'_>) -> Result<&'static str> {
    u.choose(&NAMES).copied()
}

fn list<T>(
    u: &mut Unstructured<'_>,
    most: usize,
    mut one: impl FnMut(&mut Unstructured<'_>) -> Result<T>,
) -> Result<Vec<T>> {
    let count = u.int_in_range(0..=most)?;
    (0..count).map(|_| one(u)).collect()
}

fn text_match(u: &mut Unstructured<'_>) -> Result<StringMatch> {
    let texts = ["a", "ab", "b", "td", "td/ns/a/sa/x", "td/ns/ab", "/sa/x", "td2/ns/b/sa/y", ""];
    let text: Arc<str> = (*u.choose(&texts)?).into();
    Ok(match u.int_in_range(0..=3)? {
        0 => StringMatch::Exact(text),
        1 => StringMatch::Prefix(text),
        2 => StringMatch::Suffix(text),
        _ => StringMatch::Presence,
    })
}

fn prefix(u: &mut Unstructured<'_>) -> Result<IpPrefix> {
    let texts = ["10.0.0.0/30", "10.0.0.2", "0.0.0.0/0", "fd00::/126", "::/0", "fd00::2"];
    let text = *u.choose(&texts)?;
    Ok(text.parse().expect("a prefix"))
}

fn account(u: &mut Unstructured<'_>) -> Result<ServiceAccountMatch> {
    Ok(ServiceAccountMatch {
        namespace: name(u)?.into(),
        service_account: (*u.choose(&["x", "y"])?).into(),
    })
}

fn one_match(u: &mut Unstructured<'_>) -> Result<Match> {
    let mut one = Match::default();
    for _ in 0..u.int_in_range(0..=3)? {
        match u.int_in_range(0..=14)? {
            0 => one.namespaces = list(u, 3, text_match)?,
            1 => one.not_namespaces = list(u, 3, text_match)?,
            2 => one.principals = list(u, 3, text_match)?,
            3 => one.not_principals = list(u, 3, text_match)?,
            4 => one.service_accounts = list(u, 3, account)?,
            5 => one.not_service_accounts = list(u, 3, account)?,
            6 => one.trust_domains = list(u, 3, text_match)?,
            7 => one.not_trust_domains = list(u, 3, text_match)?,
            8 => one.source_ips = list(u, 3, prefix)?,
            9 => one.not_source_ips = list(u, 3, prefix)?,
            10 => one.destination_ips = list(u, 3, prefix)?,
            11 => one.not_destination_ips = list(u, 3, prefix)?,
            12 => one.destination_ports = list(u, 3, |u| u.choose(&PORTS).copied())?,
            13 => one.not_destination_ports = list(u, 3, |u| u.choose(&PORTS).copied())?,
            _ => one.request.methods = list(u, 2, text_match)?,
        }
    }
    Ok(one)
}

fn one_policy(u: &mut Unstructured<'_>) -> Result<Policy> {
    let name = PolicyName::new(u.choose(&["a", "ab", "b"])?, u.choose(&["p", "q", "r"])?);
    let rules = list(u, 3, |u| {
        let clauses = list(u, 3, |u| Ok(Clause { matches: list(u, 3, one_match)? }))?;
        Ok(Rule { clauses })
    })?;
    Ok(Policy {
        origin: PolicyOrigin {
            kind: *u.choose(&[PolicyKind::AuthorizationPolicy, PolicyKind::PeerAuthentication])?,
            namespace: name.namespace.clone(),
            name: name.name.clone(),
            unreadable: None,
        },
        name,
        scope: *u.choose(&[PolicyScope::Workload, PolicyScope::Namespace, PolicyScope::Global])?,
        action: *u.choose(&[Action::Allow, Action::Deny, Action::Audit])?,
        dry_run: u.ratio(1, 8)?,
        rules,
    })
}

/// Policies of one input; used by other targets as well.
pub(crate) fn samples() -> Vec<Policy> {
    let noise: Vec<u8> =
        (0..2000_u32).map(|at| (at.wrapping_mul(2_654_435_761) >> 13).to_le_bytes()[0]).collect();
    let mut u = Unstructured::new(&noise);
    (0..3).map(|_| one_policy(&mut u).expect("policies need no particular bytes")).collect()
}

struct Facts<'a> {
    peer: Option<&'a SpiffeId>,
    flow: &'a ResolvedFlow,
}

impl Facts<'_> {
    fn policy(&self, policy: &Policy) -> bool {
        policy.rules.iter().any(|rule| {
            rule.clauses.iter().all(|clause| {
                clause.matches.is_empty()
                    || clause.matches.iter().any(|one| self.one(one, policy.action))
            })
        })
    }

    fn one(&self, one: &Match, action: Action) -> bool {
        let Route::Deliver { target, .. } = self.flow.route else {
            panic!("inbound flows are delivered")
        };
        let source = self.flow.flow.client.ip();
        let text = |texts: &[StringMatch], text: &str| {
            texts.iter().any(|one| match one {
                StringMatch::Exact(wanted) => **wanted == *text,
                StringMatch::Prefix(start) => text.starts_with(&**start),
                StringMatch::Suffix(end) => text.ends_with(&**end),
                StringMatch::Presence => !text.is_empty(),
            })
        };
        let accounts = |wanted: &[ServiceAccountMatch]| {
            self.peer.is_some_and(|peer| {
                wanted.iter().any(|one| {
                    *one.namespace == *peer.namespace()
                        && *one.service_account == *peer.service_account()
                })
            })
        };
        let ips = |prefixes: &[IpPrefix], ip| prefixes.iter().any(|prefix| prefix.contains(ip));
        let namespace = self.peer.map_or("", SpiffeId::namespace);
        let of_peer = |texts: &[StringMatch], part: fn(&SpiffeId) -> &str| {
            self.peer.is_some_and(|peer| text(texts, part(peer)))
        };
        if *one == Match::default() {
            return false;
        }
        (one.namespaces.is_empty() || text(&one.namespaces, namespace))
            && !text(&one.not_namespaces, namespace)
            && (one.principals.is_empty() || of_peer(&one.principals, SpiffeId::principal))
            && !of_peer(&one.not_principals, SpiffeId::principal)
            && (one.service_accounts.is_empty() || accounts(&one.service_accounts))
            && !accounts(&one.not_service_accounts)
            && (one.trust_domains.is_empty() || of_peer(&one.trust_domains, SpiffeId::trust_domain))
            && !of_peer(&one.not_trust_domains, SpiffeId::trust_domain)
            && (one.source_ips.is_empty() || ips(&one.source_ips, source))
            && !ips(&one.not_source_ips, source)
            && (one.destination_ips.is_empty() || ips(&one.destination_ips, target.ip()))
            && !ips(&one.not_destination_ips, target.ip())
            && (one.destination_ports.is_empty() || one.destination_ports.contains(&target.port()))
            && !one.not_destination_ports.contains(&target.port())
            // No request is seen here.
            && (one.request.is_empty() || action == Action::Deny)
    }

    /// True when the flow may happen.
    fn verdict(&self, policies: &PolicySet, ignore_missing: bool) -> bool {
        let local = &self.flow.local;
        let listed = |name: &PolicyName| {
            local.authorization_policies.iter().any(|listed| **listed == *name.to_string())
        };
        let missing = local
            .authorization_policies
            .iter()
            .any(|listed| listed.parse().map_or(true, |name| policies.policy(&name).is_none()));
        if missing && !ignore_missing {
            return false;
        }
        let applies = |policy: &&Policy| match policy.scope {
            PolicyScope::Global => true,
            PolicyScope::Namespace => {
                policy.name.namespace == local.namespace || listed(&policy.name)
            }
            PolicyScope::Workload => listed(&policy.name),
        };
        let enforced: Vec<_> =
            policies.policies().filter(applies).filter(|one| !one.dry_run).collect();
        let of = |action| enforced.iter().filter(move |policy| policy.action == action);
        if of(Action::Deny).any(|policy| self.policy(policy)) {
            return false;
        }
        of(Action::Allow).next().is_none() || of(Action::Allow).any(|policy| self.policy(policy))
    }
}

/// Engine, explanation and slow reading agree.
pub fn policy(data: &[u8]) {
    let outcome = run(&mut Unstructured::new(data));
    assert!(
        outcome.is_ok() || data.len() < 1 << 16,
        "only an input that ends early is not used up"
    );
}

fn run(u: &mut Unstructured<'_>) -> Result<()> {
    let mut set = PolicySet::default();
    let ignore_missing = u.ratio(1, 8)?;
    if ignore_missing {
        set.set_missing(MissingPolicy::Ignore);
    }
    for _ in 0..u.int_in_range(0..=6)? {
        let before = set.revision();
        if u.ratio(1, 8)? {
            let gone = PolicyName::new(u.choose(&["a", "ab", "b"])?, u.choose(&["p", "q", "r"])?);
            set.remove(&gone);
            assert!(set.policy(&gone).is_none());
        } else {
            let policy = one_policy(u)?;
            let changed = set.upsert(policy.clone());
            assert_eq!(set.upsert(policy.clone()), changed, "the same again is no change");
            assert_eq!(set.policy(&policy.name), Some(&policy));
        }
        assert!(set.revision() >= before, "the revision went back");
    }
    let mut local = Workload::named("u", u.choose(&["a", "ab", "b"])?, "p");
    let listed = ["a/p", "ab/q", "b/r", "a/q", "a/p", "absent/p", "odd"];
    local.authorization_policies = list(u, 4, |u| Ok((*u.choose(&listed)?).into()))?;
    let local = Arc::new(local);
    for _ in 0..=u.int_in_range(0..=4)? {
        let peer = if u.ratio(3, 4)? {
            let (domain, namespace) = (*u.choose(&["td", "td2"])?, *u.choose(&["a", "ab", "b"])?);
            SpiffeId::new(domain, namespace, u.choose(&["x", "y"])?).ok()
        } else {
            None
        };
        let flow = resolved(u, &local, peer.is_some())?;
        let facts = Facts { peer: peer.as_ref(), flow: &flow };
        let verdict = authorize(&set, &flow, peer.as_ref());
        let allowed = matches!(verdict.decision, Decision::Allow(_));
        assert_eq!(allowed, facts.verdict(&set, ignore_missing), "{set:?} {flow:?} {peer:?}");
        let explained = explain(&set, &flow, peer.as_ref());
        match (&verdict.decision, &explained.outcome) {
            (Decision::Allow(permit), Outcome::Allowed { rule }) => {
                assert_eq!(permit.rule(), rule.as_ref());
                assert_eq!(permit.revision(), set.revision());
            }
            (Decision::Deny(denial), Outcome::Denied(explained)) => assert_eq!(denial, explained),
            (decision, outcome) => panic!("decided {decision:?}, explained {outcome:?}"),
        }
        assert_eq!(verdict.notes, explained.notes);
    }
    Ok(())
}

fn resolved(u: &mut Unstructured<'_>, local: &Arc<Workload>, tunnel: bool) -> Result<ResolvedFlow> {
    thread_local! {
        static START: Instant = Instant::now();
    }
    let ip = |u: &mut Unstructured<'_>| -> Result<std::net::IpAddr> {
        let last = u.int_in_range(0..=5)?;
        Ok(if u.ratio(2, 3)? {
            [10, 0, 0, last].into()
        } else {
            [0xfd00, 0, 0, 0, 0, 0, 0, u16::from(last)].into()
        })
    };
    let flow = Flow {
        id: FlowId(1),
        direction: if tunnel { Direction::InboundTunnel } else { Direction::InboundPlaintext },
        client: ClientAddr::new((ip(u)?, 4000).into()),
        orig_dst: OrigDst::new((ip(u)?, *u.choose(&[80, 81, 443])?).into()),
        pod: PodUid::new("p"),
        accepted_at: START.with(|start| *start),
    };
    let index = WorkloadIndex::default();
    Ok(resolve_inbound(&index, &ResolveSettings::default(), &flow, local, None)
        .expect("the pod's own address and port"))
}

/// Bytes without meaning: for [`Unstructured`] every input has one.
pub(crate) fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut random = crate::Random(seed);
    (0..length).map(|_| random.byte()).collect()
}

pub(crate) fn policy_seeds() -> Vec<Vec<u8>> {
    (1..=6).map(|seed| noise(seed, 400)).collect()
}
