//! PeerAuthentication to [`Policy`]: one per object, so that a refusal names the object that asked for it.
//!
//! STRICT is a DENY of what proves no identity. A workload lists the one policy that is effective for it: of the selecting
//! object if that says anything, else of the namespace's, else of the mesh's; the oldest of several on one level.

use std::sync::Arc;

use mesh_authorize::{
    Action, Clause, Match, Policy, PolicyKind, PolicyName, PolicyOrigin, PolicyScope, Rule,
    StringMatch,
};

use super::objects::{Objects, in_namespace};
use crate::manifest::PeerAuthentication;
use crate::manifest::policy::MtlsMode;

/// The object that is effective for a namespace, and whether it says STRICT.
pub(super) struct NamespaceLevel<'o> {
    pub(super) strict: bool,
    pub(super) object: Option<&'o Arc<PeerAuthentication>>,
}

/// The oldest object of a namespace without a selector.
pub(super) fn oldest_of<'o>(
    objects: &'o Objects,
    namespace: &'o str,
) -> Option<&'o Arc<PeerAuthentication>> {
    in_namespace(&objects.peers, namespace)
        .map(|(_, peer)| peer)
        .filter(|peer| peer.selector.is_none())
        .min_by_key(|peer| peer.meta.age())
}

/// What holds for a namespace's workloads that no object selects.
pub(super) fn namespace_level<'o>(
    objects: &'o Objects,
    namespace: &'o str,
    root: &'o str,
) -> NamespaceLevel<'o> {
    let object = [namespace, root]
        .into_iter()
        .filter_map(|level| oldest_of(objects, level))
        .find(|peer| peer.mode != MtlsMode::Unset);
    NamespaceLevel { strict: object.is_some_and(|peer| peer.mode == MtlsMode::Strict), object }
}

/// The oldest object that selects a workload. One in the root namespace selects nothing.
pub(super) fn selecting<'o>(
    objects: &'o Objects,
    namespace: &'o str,
    labels: &std::collections::BTreeMap<String, String>,
    root: &str,
) -> Option<&'o Arc<PeerAuthentication>> {
    if namespace == root {
        return None;
    }
    in_namespace(&objects.peers, namespace)
        .map(|(_, peer)| peer)
        .filter(|peer| peer.selector.as_ref().is_some_and(|selector| selector.matches(labels)))
        .min_by_key(|peer| peer.meta.age())
}

/// The policy a workload lists, if any.
pub(super) fn effective(
    objects: &Objects,
    namespace: &str,
    labels: &std::collections::BTreeMap<String, String>,
    root: &str,
) -> Option<Arc<str>> {
    let level = namespace_level(objects, namespace, root);
    let inherited = || level.object.filter(|_| level.strict).map(|peer| listed_name(peer));
    match selecting(objects, namespace, labels, root) {
        None => inherited(),
        Some(peer) if policy(peer, level.strict, root).is_some() => Some(listed_name(peer)),
        // It asks for nothing of its own: UNSET inherits, anything else lifts what is inherited.
        Some(peer) if peer.mode == MtlsMode::Unset => inherited(),
        Some(_) => None,
    }
}

fn listed_name(peer: &PeerAuthentication) -> Arc<str> {
    name(peer).to_string().into()
}

/// Name of an object's policy. The underscore keeps it apart from every object's name.
pub(super) fn name(peer: &PeerAuthentication) -> PolicyName {
    PolicyName {
        namespace: peer.meta.namespace.clone(),
        name: format!("converted_peer_authentication_{}", peer.meta.name).into(),
    }
}

/// The policy of an object; `None` when it denies nothing. `parent_strict` is what UNSET inherits.
pub(super) fn policy(peer: &PeerAuthentication, parent_strict: bool, root: &str) -> Option<Policy> {
    let own = match peer.mode {
        MtlsMode::Strict => true,
        MtlsMode::Permissive => false,
        MtlsMode::Unset => peer.selector.is_some() && parent_strict,
    };
    if peer.selector.is_some() && *peer.meta.namespace == *root {
        return None;
    }
    let of_mode = |wanted: MtlsMode| {
        peer.ports.iter().filter(move |(_, mode)| **mode == wanted).map(|(port, _)| *port)
    };
    let rules = if own {
        let exempt: Vec<u16> = of_mode(MtlsMode::Permissive).collect();
        if peer.mode == MtlsMode::Unset && exempt.is_empty() {
            return None;
        }
        let exemptions = exempt
            .into_iter()
            .map(|port| Match { not_destination_ports: vec![port], ..Match::default() });
        vec![Rule {
            clauses: [without_identity()]
                .into_iter()
                .chain(exemptions)
                .map(|only| Clause { matches: vec![only] })
                .collect(),
        }]
    } else {
        of_mode(MtlsMode::Strict)
            .map(|port| Match { destination_ports: vec![port], ..without_identity() })
            .map(|only| Rule { clauses: vec![Clause { matches: vec![only] }] })
            .collect()
    };
    (!rules.is_empty()).then(|| Policy {
        name: name(peer),
        origin: PolicyOrigin {
            kind: PolicyKind::PeerAuthentication,
            namespace: peer.meta.namespace.clone(),
            name: peer.meta.name.clone(),
            unreadable: None,
        },
        scope: PolicyScope::Workload,
        action: Action::Deny,
        dry_run: false,
        rules,
    })
}

/// What holds for a peer that proves no identity.
pub(super) fn without_identity() -> Match {
    Match { not_principals: vec![StringMatch::Presence], ..Match::default() }
}
