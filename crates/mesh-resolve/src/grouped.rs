//! Ordered sets of (group, member) pairs: multimaps whose clone is O(1) and whose order is that of the pairs.

use std::cmp::Ordering;

use equivalent::{Comparable, Equivalent};
use imbl::{OrdMap, OrdSet};
use mesh_model::NamespacedHostname;

/// Searches a map keyed by (group, member) for where a group begins.
pub(crate) struct Start<'q, Q: ?Sized>(pub(crate) &'q Q);

impl<G, M, Q: Comparable<G> + ?Sized> Equivalent<(G, M)> for Start<'_, Q> {
    fn equivalent(&self, _pair: &(G, M)) -> bool {
        false
    }
}

impl<G, M, Q: Comparable<G> + ?Sized> Comparable<(G, M)> for Start<'_, Q> {
    fn compare(&self, pair: &(G, M)) -> Ordering {
        self.0.compare(&pair.0).then(Ordering::Less)
    }
}

/// Two texts that name something within a namespace, without owning them.
pub(crate) struct Named<'q>(pub(crate) &'q str, pub(crate) &'q str);

impl Equivalent<NamespacedHostname> for Named<'_> {
    fn equivalent(&self, key: &NamespacedHostname) -> bool {
        self.compare(key) == Ordering::Equal
    }
}

impl Comparable<NamespacedHostname> for Named<'_> {
    fn compare(&self, key: &NamespacedHostname) -> Ordering {
        (self.0, self.1).cmp(&(&*key.namespace, &*key.hostname))
    }
}

/// The members of `group`, in order.
pub(crate) fn members<'m, G, M, Q>(
    set: &'m OrdSet<(G, M)>,
    group: &Q,
) -> impl Iterator<Item = &'m M>
where
    G: Ord,
    M: Ord,
    Q: Comparable<G> + ?Sized,
{
    set.range(Start(group)..)
        .take_while(move |(found, _)| group.compare(found) == Ordering::Equal)
        .map(|(_, member)| member)
}

/// The members of `group` and their values, in order.
pub(crate) fn entries<'m, G, M, V, Q>(
    map: &'m OrdMap<(G, M), V>,
    group: &Q,
) -> impl Iterator<Item = &'m V>
where
    G: Ord,
    M: Ord,
    Q: Comparable<G> + ?Sized,
{
    map.range(Start(group)..)
        .take_while(move |((found, _), _)| group.compare(found) == Ordering::Equal)
        .map(|(_, value)| value)
}
