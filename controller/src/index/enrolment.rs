//! When peers may start to tunnel to a workload.
//!
//! A workload that is in the mesh from its first sight is announced as tunnelled at once: it does not start before it is
//! captured, so a tunnel to it can only be refused, never a plaintext connection made in its place. One that joins while
//! it runs is announced when its node's agent reports that it is captured, because until then nobody would answer the
//! tunnel. Once announced it stays so for as long as it is in the mesh: a report that is missing takes nothing back.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::NodeReport;
use super::objects::Key;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Not in the mesh.
    Plain,
    /// Joining while it runs.
    Joining,
    /// Announced.
    Tunnelled,
}

#[derive(Clone, Debug)]
struct Tracked {
    uid: Arc<str>,
    state: State,
    node: Arc<str>,
}

/// What is known of captured workloads.
#[derive(Debug, Default)]
pub(super) struct Enrolment {
    connected: BTreeSet<Arc<str>>,
    enrolled: BTreeMap<Arc<str>, BTreeSet<Key>>,
    pods: BTreeMap<Key, Tracked>,
    entries: BTreeMap<Key, Tracked>,
}

impl Enrolment {
    /// Takes in a report; returns the workloads whose announcement it may change.
    pub(super) fn report(&mut self, node: &str, report: NodeReport) -> Vec<Key> {
        let node: Arc<str> = node.into();
        match report {
            NodeReport::Connected => {
                self.connected.insert(node);
                Vec::new()
            }
            NodeReport::Disconnected => {
                self.connected.remove(&node);
                self.enrolled.remove(&node);
                Vec::new()
            }
            NodeReport::Enrolled(keys) => {
                let joining = self
                    .pods
                    .iter()
                    .chain(&self.entries)
                    .filter(|(key, one)| {
                        one.state == State::Joining && one.node == node && keys.contains(*key)
                    })
                    .map(|(key, _)| key.clone())
                    .collect();
                self.enrolled.insert(node, keys);
                joining
            }
        }
    }

    /// Decides about a pod as it is now. `ambient`: it is selected.
    pub(super) fn is_hbone(
        &mut self,
        key: &Key,
        uid: &Arc<str>,
        node: &Arc<str>,
        ambient: bool,
    ) -> bool {
        let state = self.next(self.pods.get(key), key, uid, node, ambient);
        self.pods.insert(key.clone(), Tracked { uid: uid.clone(), state, node: node.clone() });
        state == State::Tunnelled
    }

    /// Decides about a WorkloadEntry as it is now.
    pub(super) fn is_hbone_entry(
        &mut self,
        key: &Key,
        uid: &Arc<str>,
        node: &Arc<str>,
        ambient: bool,
    ) -> bool {
        let state = self.next(self.entries.get(key), key, uid, node, ambient);
        self.entries.insert(key.clone(), Tracked { uid: uid.clone(), state, node: node.clone() });
        state == State::Tunnelled
    }

    /// A pod is gone.
    pub(super) fn forget(&mut self, key: &Key) {
        self.pods.remove(key);
    }

    /// A WorkloadEntry is gone.
    pub(super) fn forget_entry(&mut self, key: &Key) {
        self.entries.remove(key);
    }

    fn next(
        &self,
        known: Option<&Tracked>,
        key: &Key,
        uid: &Arc<str>,
        node: &Arc<str>,
        ambient: bool,
    ) -> State {
        if !ambient {
            return State::Plain;
        }
        let captured = self.enrolled.get(node).is_some_and(|keys| keys.contains(key));
        match known.filter(|known| known.uid == *uid).map(|known| known.state) {
            None | Some(State::Tunnelled) => State::Tunnelled,
            Some(State::Plain | State::Joining) if captured => State::Tunnelled,
            Some(State::Plain) if !self.connected.contains(node) => State::Tunnelled,
            Some(State::Plain | State::Joining) => State::Joining,
        }
    }
}
