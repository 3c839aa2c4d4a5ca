//! The policies of the mesh, compiled.

use std::cmp::Ordering;
use std::net::IpAddr;
use std::sync::Arc;

use equivalent::{Comparable, Equivalent};
use imbl::OrdMap;
use mesh_model::{IpPrefix, Revision, Workload};

use crate::compile::CompiledPolicy;
use crate::policy::{Action, Policy, PolicyName, PolicyScope};

/// What happens to a pod's connections to destinations unknown to the mesh.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize,
)]
pub enum UnknownEgress {
    /// They are passed through.
    #[default]
    Allow,
    /// They are refused.
    Deny,
}

/// What happens to flows under a policy that cannot be consulted: one that the workload lists and which has not been
/// received, or an [`UnreadablePolicy`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum MissingPolicy {
    /// They are refused.
    #[default]
    Deny,
    /// `compat`: the policy is skipped, as ztunnel does.
    Ignore,
}

/// A policy that was received and could not be read. Nobody knows whom it would have refused, so all are.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct UnreadablePolicy {
    /// Its key.
    pub name: PolicyName,
    /// Which workloads it would have applied to; Global when that could not be read either.
    pub scope: PolicyScope,
    /// Why it could not be read, for people.
    pub reason: Arc<str>,
}

/// The policies of the mesh, compiled and found by scope. A clone is a snapshot and costs O(1); a change costs O(log n).
///
/// Memory is bounded by the policies that are there. The default is empty: it allows everything.
#[derive(Clone, Debug, Default)]
pub struct PolicySet {
    revision: Revision,
    policies: OrdMap<PolicyName, Arc<CompiledPolicy>>,
    /// Those of scope Global.
    global: Policies,
    /// Those of scope Namespace, by that.
    by_namespace: OrdMap<Arc<str>, Policies>,
    /// Of scope Global and Namespace.
    unreadable: OrdMap<PolicyName, Arc<UnreadablePolicy>>,
    /// Namespaces that deny unknown destinations.
    egress_denied: OrdMap<Arc<str>, ()>,
    /// Where the cluster's own pods are; shared by all clones.
    pod_networks: Arc<[IpPrefix]>,
    missing: MissingPolicy,
}

/// What policies are looked up for.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Judged<'j> {
    /// Whose policies apply by scope, with the global ones; none when policies apply only by being listed.
    pub(crate) namespace: Option<&'j Arc<str>>,
    /// Policies by name.
    listed: &'j [Arc<str>],
}

impl<'j> Judged<'j> {
    /// A workload: global policies, its namespace's, those it lists.
    pub(crate) fn workload(workload: &'j Workload) -> Self {
        Self { namespace: Some(&workload.namespace), listed: &workload.authorization_policies }
    }

    /// What a waypoint stands for: the policies attached to it.
    pub(crate) const fn attached(listed: &'j [Arc<str>]) -> Self {
        Self { namespace: None, listed }
    }
}

type Policies = OrdMap<PolicyName, Arc<CompiledPolicy>>;

impl PolicySet {
    /// The stamp of the last change.
    #[must_use]
    pub const fn revision(&self) -> Revision {
        self.revision
    }

    /// Adds a policy or replaces the one of its name, in whatever scope that was. Returns the new stamp.
    pub fn upsert(&mut self, policy: Policy) -> Revision {
        let was_unreadable = self.unreadable.remove(&policy.name).is_some();
        if self.policies.get(&policy.name).is_some_and(|old| *old.source() == policy) {
            return if was_unreadable { self.stamp() } else { self.revision };
        }
        self.unlink(&policy.name);
        let name = policy.name.clone();
        let scope = policy.scope;
        let compiled = Arc::new(CompiledPolicy::new(policy));
        match scope {
            PolicyScope::Global => {
                self.global.insert(name.clone(), Arc::clone(&compiled));
            }
            PolicyScope::Namespace => {
                let of_namespace = self.by_namespace.entry(name.namespace.clone()).or_default();
                of_namespace.insert(name.clone(), Arc::clone(&compiled));
            }
            PolicyScope::Workload => {}
        }
        self.policies.insert(name, compiled);
        self.stamp()
    }

    /// Removes a policy, readable or not, if it is there. Returns the new stamp.
    pub fn remove(&mut self, name: &PolicyName) -> Revision {
        let was_unreadable = self.unreadable.remove(name).is_some();
        if self.unlink(name) || was_unreadable { self.stamp() } else { self.revision }
    }

    /// Refuses every inbound flow that `policy` could be about, until a policy of that name is added or removed. A
    /// readable one of that name stays in force beside it. Returns the new stamp.
    ///
    /// One of scope Workload changes nothing: workloads that list it refuse their flows for its absence.
    pub fn set_unreadable(&mut self, policy: UnreadablePolicy) -> Revision {
        let changed = match policy.scope {
            PolicyScope::Workload => self.unreadable.remove(&policy.name).is_some(),
            PolicyScope::Global | PolicyScope::Namespace => {
                let (name, policy) = (policy.name.clone(), Arc::new(policy));
                self.unreadable.insert(name, Arc::clone(&policy)) != Some(policy)
            }
        };
        if changed { self.stamp() } else { self.revision }
    }

    /// Says what a namespace's pods may reach beyond the mesh. Returns the new stamp.
    pub fn set_egress(&mut self, namespace: &str, egress: UnknownEgress) -> Revision {
        let changed = match egress {
            UnknownEgress::Allow => self.egress_denied.remove(namespace).is_some(),
            UnknownEgress::Deny => self.egress_denied.insert(namespace.into(), ()).is_none(),
        };
        if changed { self.stamp() } else { self.revision }
    }

    /// Says where the cluster's own pods are: an address there that no workload has is refused, whatever a namespace may
    /// reach beyond the mesh. Returns the new stamp.
    pub fn set_pod_networks(&mut self, networks: &[IpPrefix]) -> Revision {
        if *self.pod_networks == *networks {
            return self.revision;
        }
        self.pod_networks = networks.into();
        self.stamp()
    }

    /// True for an address of the cluster's own pods.
    #[must_use]
    pub fn is_pod_address(&self, ip: IpAddr) -> bool {
        self.pod_networks.iter().any(|network| network.contains(ip))
    }

    /// Says what a policy that is listed and not known means. Returns the new stamp.
    pub fn set_missing(&mut self, missing: MissingPolicy) -> Revision {
        if self.missing == missing {
            return self.revision;
        }
        self.missing = missing;
        self.stamp()
    }

    /// What a namespace's pods may reach beyond the mesh.
    #[must_use]
    pub fn egress(&self, namespace: &str) -> UnknownEgress {
        if self.egress_denied.contains_key(namespace) {
            UnknownEgress::Deny
        } else {
            UnknownEgress::Allow
        }
    }

    /// A policy by its name.
    #[must_use]
    pub fn policy(&self, name: &PolicyName) -> Option<&Policy> {
        self.policies.get(name).map(|compiled| compiled.source())
    }

    /// True when one of the policies named in `attached`, as `namespace/name`, decides by what a request holds: then bytes in
    /// which no requests are seen are not what it was written for. Those that only note what they match do not count.
    #[must_use]
    pub fn asks_for_requests(&self, attached: &[Arc<str>]) -> bool {
        attached.iter().filter_map(|name| self.listed(name)).map(CompiledPolicy::source).any(
            |policy| {
                let decides = match policy.action {
                    Action::Allow | Action::Deny => !policy.dry_run,
                    Action::Audit => false,
                };
                let clauses = policy.rules.iter().flat_map(|rule| &rule.clauses);
                decides
                    && clauses.flat_map(|clause| &clause.matches).any(|one| !one.request.is_empty())
            },
        )
    }

    /// All policies, in the order of their names.
    pub fn policies(&self) -> impl ExactSizeIterator<Item = &Policy> {
        self.policies.values().map(|compiled| compiled.source())
    }

    /// Policies of scope Global and Namespace that could not be read, in the order of their names.
    pub fn unreadable(&self) -> impl ExactSizeIterator<Item = &UnreadablePolicy> {
        self.unreadable.values().map(|policy| &**policy)
    }

    /// The policies that apply, each once.
    pub(crate) fn applicable<'s>(
        &'s self,
        judged: Judged<'s>,
    ) -> impl Iterator<Item = &'s CompiledPolicy> {
        let global = judged.namespace.map(|_| &self.global);
        let of_namespace =
            judged.namespace.and_then(|namespace| self.by_namespace.get(&**namespace));
        let names = judged.listed;
        let listed = names
            .iter()
            .enumerate()
            .filter(|(index, name)| !names.iter().take(*index).any(|before| before == *name))
            .filter_map(|(_, name)| self.listed(name))
            .filter(move |policy| !policy.applies_by_scope(judged));
        global
            .into_iter()
            .chain(of_namespace)
            .flat_map(|policies| policies.values())
            .map(|policy| &**policy)
            .chain(listed)
    }

    /// The names listed of which there is no policy; none in compatibility with ztunnel.
    pub(crate) fn missing<'s>(&'s self, judged: Judged<'s>) -> impl Iterator<Item = &'s Arc<str>> {
        let counts = match self.missing {
            MissingPolicy::Deny => true,
            MissingPolicy::Ignore => false,
        };
        judged.listed.iter().filter(move |listed| counts && self.listed(listed).is_none())
    }

    /// The policies that could not be read and might apply; none in compatibility with ztunnel. Looks at each one there
    /// is: a control plane that sends more than a handful is broken. A global one may be any policy, and be attached too.
    pub(crate) fn unreadable_for<'s>(
        &'s self,
        judged: Judged<'s>,
    ) -> impl Iterator<Item = &'s UnreadablePolicy> {
        let counts = match self.missing {
            MissingPolicy::Deny => true,
            MissingPolicy::Ignore => false,
        };
        self.unreadable().filter(move |policy| {
            counts
                && match policy.scope {
                    PolicyScope::Global => true,
                    PolicyScope::Namespace => judged.namespace == Some(&policy.name.namespace),
                    PolicyScope::Workload => false,
                }
        })
    }

    fn listed(&self, listed: &str) -> Option<&CompiledPolicy> {
        let (namespace, name) = listed.split_once('/')?;
        self.policies.get(&Listed { namespace, name }).map(|policy| &**policy)
    }

    fn unlink(&mut self, name: &PolicyName) -> bool {
        let Some(old) = self.policies.remove(name) else { return false };
        match old.source().scope {
            PolicyScope::Global => {
                self.global.remove(name);
            }
            PolicyScope::Namespace => {
                if let Some(of_namespace) = self.by_namespace.get_mut(&name.namespace) {
                    of_namespace.remove(name);
                    if of_namespace.is_empty() {
                        self.by_namespace.remove(&name.namespace);
                    }
                }
            }
            PolicyScope::Workload => {}
        }
        true
    }

    const fn stamp(&mut self) -> Revision {
        self.revision = self.revision.next();
        self.revision
    }
}

/// A policy's name as a workload lists it, without owning it.
struct Listed<'l> {
    namespace: &'l str,
    name: &'l str,
}

impl Equivalent<PolicyName> for Listed<'_> {
    fn equivalent(&self, name: &PolicyName) -> bool {
        self.compare(name) == Ordering::Equal
    }
}

impl Comparable<PolicyName> for Listed<'_> {
    fn compare(&self, name: &PolicyName) -> Ordering {
        (self.namespace, self.name).cmp(&(&*name.namespace, &*name.name))
    }
}
