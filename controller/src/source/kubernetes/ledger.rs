//! The Kubernetes source's core: what followers tell in, object changes out. No I/O.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;

use crate::manifest::{InvalidField, Kind, Object, ObjectKey, Parsed};
use crate::source::{Change, Refusal, SourceStatus};

/// Most refusals that are shown.
const MAX_REFUSALS: usize = 1_000;
/// Most objects that are named as kept.
const MAX_NAMED: usize = 100;

/// What a follower tells about its kind.
#[derive(Debug)]
pub(super) enum Told {
    /// All objects of the kind come next.
    Listing(Kind),
    /// One of them.
    Listed(ObjectKey, Parsed),
    /// That was all: what was known and has not come is gone.
    ListDone(Kind),
    /// An object is new or different.
    Applied(ObjectKey, Parsed),
    /// An object is gone.
    Deleted(ObjectKey),
    /// The kind is not installed: it has no objects.
    Absent(Kind),
}

/// Which objects are in force, and which were refused.
///
/// A refused object leaves its last good version in force. A security policy that has none is replaced by one that
/// refuses whatever it may have been about, as a [`Scan`](crate::source::Scan) of files does.
#[derive(Debug, Default)]
pub(super) struct Ledger {
    kinds: BTreeMap<Kind, Entries>,
    refused: BTreeMap<ObjectKey, Refusal>,
}

#[derive(Debug, Default)]
struct Entries {
    in_force: BTreeMap<ObjectKey, Standing>,
    /// What the list that is under way has named so far.
    listing: Option<BTreeSet<ObjectKey>>,
    /// Its objects have all been told once.
    complete: bool,
}

/// What is in force of an object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Standing {
    /// A version of it that was good.
    Good,
    /// A refusal in its place.
    Denied,
}

impl Ledger {
    /// Takes in what a follower tells; returns what changed.
    pub(super) fn take(&mut self, told: Told) -> Vec<Change> {
        match told {
            Told::Listing(kind) => {
                self.entries(kind).listing = Some(BTreeSet::new());
                Vec::new()
            }
            Told::Listed(key, parsed) => {
                if let Some(listing) = &mut self.entries(key.kind).listing {
                    listing.insert(key.clone());
                }
                self.upsert(key, parsed).into_iter().collect()
            }
            Told::Applied(key, parsed) => self.upsert(key, parsed).into_iter().collect(),
            Told::ListDone(kind) => {
                // A list that was broken off begins again, so that this is never half of one.
                let Some(listed) = self.entries(kind).listing.take() else { return Vec::new() };
                self.keep_only(kind, &listed)
            }
            Told::Absent(kind) => self.keep_only(kind, &BTreeSet::new()),
            Told::Deleted(key) => self.delete(&key).into_iter().collect(),
        }
    }

    /// True once every kind has been told completely.
    pub(super) fn is_synced(&self) -> bool {
        Kind::ALL.iter().all(|kind| self.kinds.get(kind).is_some_and(|entries| entries.complete))
    }

    /// How many objects are in force.
    pub(super) fn objects(&self) -> usize {
        let standing = self.kinds.values().flat_map(|entries| entries.in_force.values());
        standing.filter(|standing| **standing == Standing::Good).count()
    }

    /// What was refused, as of now.
    pub(super) fn status(&self) -> SourceStatus {
        let kept = || self.refused.iter().filter(|(_, refusal)| refusal.last_good_in_use);
        SourceStatus {
            objects: self.objects(),
            refused: self.refused.values().take(MAX_REFUSALS).cloned().collect(),
            more_refused: self.refused.len().saturating_sub(MAX_REFUSALS),
            kept: kept().count(),
            kept_objects: kept().take(MAX_NAMED).map(|(key, _)| key.to_string()).collect(),
            ..SourceStatus::default()
        }
    }

    fn entries(&mut self, kind: Kind) -> &mut Entries {
        self.kinds.entry(kind).or_default()
    }

    fn upsert(&mut self, key: ObjectKey, parsed: Parsed) -> Option<Change> {
        match parsed {
            Parsed::Object(object) => {
                self.refused.remove(&key);
                self.entries(key.kind).in_force.insert(key, Standing::Good);
                Some(Change::Upsert(object))
            }
            Parsed::Refused { reason, unreadable, .. } => {
                let in_force = &mut self.entries(key.kind).in_force;
                let last_good_in_use = in_force.get(&key) == Some(&Standing::Good);
                let denial = unreadable.filter(|_| !last_good_in_use);
                if denial.is_some() {
                    in_force.insert(key.clone(), Standing::Denied);
                }
                let refusal = refusal(&key, reason, last_good_in_use, denial.is_some());
                self.refused.insert(key, refusal);
                denial.map(|policy| Change::Upsert(Arc::new(Object::Unreadable(Arc::new(*policy)))))
            }
            // A follower asks for kinds that are read, and for nothing else.
            Parsed::Ignored { .. } => None,
        }
    }

    fn delete(&mut self, key: &ObjectKey) -> Option<Change> {
        self.refused.remove(key);
        self.entries(key.kind).in_force.remove(key).map(|_| Change::Delete(key.clone()))
    }

    fn keep_only(&mut self, kind: Kind, kept: &BTreeSet<ObjectKey>) -> Vec<Change> {
        self.refused.retain(|key, _| key.kind != kind || kept.contains(key));
        let entries = self.entries(kind);
        entries.listing = None;
        entries.complete = true;
        let mut gone = Vec::new();
        entries.in_force.retain(|key, _| {
            let stays = kept.contains(key);
            if !stays {
                gone.push(Change::Delete(key.clone()));
            }
            stays
        });
        gone
    }
}

fn refusal(key: &ObjectKey, reason: InvalidField, last_good_in_use: bool, denied: bool) -> Refusal {
    Refusal {
        kind: Some(key.kind.as_str()),
        object: Some(key.to_string()),
        field: reason.field(),
        problem: reason.problem,
        remedy: reason.remedy,
        last_good_in_use,
        denied,
        ..Refusal::of_file(Path::new("kubernetes"))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::manifest::object;

    fn key(kind: Kind, name: &str) -> ObjectKey {
        ObjectKey { kind, namespace: "shop".into(), name: name.into() }
    }

    fn service(name: &str, port: u32) -> (ObjectKey, Parsed) {
        let parsed = object(&json!({
            "apiVersion": "v1", "kind": "Service",
            "metadata": {"namespace": "shop", "name": name},
            "spec": {"ports": [{"port": port}]},
        }));
        (key(Kind::Service, name), parsed)
    }

    fn applied((key, parsed): (ObjectKey, Parsed)) -> Told {
        Told::Applied(key, parsed)
    }

    fn policy(action: &str) -> (ObjectKey, Parsed) {
        let parsed = object(&json!({
            "apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy",
            "metadata": {"namespace": "shop", "name": "p"},
            "spec": {"action": action, "rules": [{}]},
        }));
        (key(Kind::AuthorizationPolicy, "p"), parsed)
    }

    fn names(changes: Vec<Change>) -> Vec<String> {
        changes
            .into_iter()
            .map(|change| match change {
                Change::Upsert(object) => format!("+{}", object.key()),
                Change::Delete(key) => format!("-{key}"),
            })
            .collect()
    }

    fn listed(ledger: &mut Ledger, services: Vec<(ObjectKey, Parsed)>) -> Vec<String> {
        let mut changes = ledger.take(Told::Listing(Kind::Service));
        for (key, parsed) in services {
            changes.extend(ledger.take(Told::Listed(key, parsed)));
        }
        changes.extend(ledger.take(Told::ListDone(Kind::Service)));
        names(changes)
    }

    #[test]
    fn a_list_after_a_gap_deletes_what_is_gone_and_nothing_else() {
        let mut ledger = Ledger::default();
        let first = listed(&mut ledger, vec![service("a", 1), service("b", 1)]);
        assert_eq!(first, ["+Service shop/a", "+Service shop/b"]);
        let again = listed(&mut ledger, vec![service("b", 2), service("c", 1)]);
        assert_eq!(again, ["+Service shop/b", "+Service shop/c", "-Service shop/a"]);
        assert_eq!(ledger.objects(), 2);
    }

    #[test]
    fn a_list_that_is_broken_off_deletes_nothing() {
        let mut ledger = Ledger::default();
        listed(&mut ledger, vec![service("a", 1), service("b", 1)]);
        let mut changes = ledger.take(Told::Listing(Kind::Service));
        let (key, parsed) = service("a", 1);
        changes.extend(ledger.take(Told::Listed(key, parsed)));
        // The connection breaks; the follower begins anew.
        changes.extend(ledger.take(Told::Listing(Kind::Service)));
        assert_eq!(names(changes), ["+Service shop/a"]);
        assert_eq!(ledger.objects(), 2, "b is still in force");
        let rest = listed(&mut ledger, vec![service("a", 1), service("b", 1)]);
        assert!(rest.iter().all(|change| change.starts_with('+')), "{rest:?}");
    }

    #[test]
    fn a_refused_version_leaves_the_last_good_one_in_force() {
        let mut ledger = Ledger::default();
        listed(&mut ledger, vec![service("a", 80)]);
        assert!(ledger.take(applied(service("a", 70_000))).is_empty());
        let status = ledger.status();
        assert_eq!(status.refused.len(), 1);
        assert_eq!(status.refused[0].object.as_deref(), Some("Service shop/a"));
        assert_eq!(status.refused[0].field, "spec.ports[0].port");
        assert!(status.refused[0].last_good_in_use);
        assert!(listed(&mut ledger, vec![service("a", 70_000)]).is_empty(), "it still exists");
        assert_eq!(names(ledger.take(applied(service("a", 81)))).len(), 1);
        assert!(ledger.status().refused.is_empty());
    }

    #[test]
    fn a_refused_object_that_is_deleted_is_no_longer_shown() {
        let mut ledger = Ledger::default();
        listed(&mut ledger, vec![service("a", 70_000)]);
        let key = ledger.refused.keys().next().cloned().unwrap();
        assert!(ledger.take(Told::Deleted(key)).is_empty(), "it never was in force");
        assert!(ledger.status().refused.is_empty());
    }

    #[test]
    fn a_policy_that_never_was_good_refuses_until_it_is_mended_or_deleted() {
        let mut ledger = Ledger::default();
        let denial = ledger.take(applied(policy("MAYBE")));
        assert!(
            matches!(denial.as_slice(), [Change::Upsert(object)] if matches!(**object, Object::Unreadable(_))),
            "{denial:?}"
        );
        assert!(ledger.status().refused[0].denied);
        assert_eq!(ledger.objects(), 0, "a refusal is no object in use");
        let deleted = ledger.take(Told::Deleted(key(Kind::AuthorizationPolicy, "p")));
        assert_eq!(names(deleted), ["-AuthorizationPolicy shop/p"]);
        ledger.take(applied(policy("MAYBE")));
        let mended = ledger.take(applied(policy("DENY")));
        assert!(
            matches!(mended.as_slice(), [Change::Upsert(object)] if matches!(**object, Object::AuthorizationPolicy(_)))
        );
        assert!(ledger.take(applied(policy("MAYBE"))).is_empty(), "the good one stays");
        let refusal = &ledger.status().refused[0];
        assert!(refusal.last_good_in_use && !refusal.denied);
    }

    #[test]
    fn synced_means_that_every_kind_was_told_or_is_absent() {
        let mut ledger = Ledger::default();
        let (last, others) = Kind::ALL.split_last().unwrap();
        for kind in others {
            assert!(!ledger.is_synced());
            ledger.take(Told::Listing(*kind));
            ledger.take(Told::ListDone(*kind));
        }
        assert!(!ledger.is_synced());
        ledger.take(Told::Absent(*last));
        assert!(ledger.is_synced());
        ledger.take(Told::Listing(*last));
        assert!(ledger.is_synced(), "a later list takes nothing back");
    }

    #[test]
    fn a_kind_whose_definition_is_removed_has_no_objects() {
        let mut ledger = Ledger::default();
        listed(&mut ledger, vec![service("a", 1), service("b", 2)]);
        let gone = names(ledger.take(Told::Absent(Kind::Service)));
        assert_eq!(gone, ["-Service shop/a", "-Service shop/b"]);
        assert_eq!(ledger.objects(), 0);
    }
}
