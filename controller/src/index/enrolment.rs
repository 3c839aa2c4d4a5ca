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
use super::workloads::WorkloadSource;

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

/// What the agents that are connected say they capture. A clone costs a step per node.
#[derive(Clone, Debug, Default)]
pub struct Captured(BTreeMap<Arc<str>, Arc<BTreeSet<Key>>>);

impl Captured {
    /// Whether the agent of `node` captures a pod or WorkloadEntry; none when it has not said.
    #[must_use]
    pub fn reported(&self, node: &str, namespace: &str, name: &str) -> Option<bool> {
        self.0.get(node).map(|keys| keys.contains(&Key::new(namespace, name)))
    }

    fn holds(&self, node: &str, key: &Key) -> bool {
        self.0.get(node).is_some_and(|keys| keys.contains(key))
    }
}

/// What is known of captured workloads.
#[derive(Debug, Default)]
pub(super) struct Enrolment {
    connected: BTreeSet<Arc<str>>,
    enrolled: Captured,
    tracked: BTreeMap<WorkloadSource, Tracked>,
}

impl Enrolment {
    /// Takes in a report; returns the workloads whose announcement it may change.
    pub(super) fn report(&mut self, node: &str, report: NodeReport) -> Vec<WorkloadSource> {
        let node: Arc<str> = node.into();
        match report {
            NodeReport::Connected => {
                self.connected.insert(node);
                Vec::new()
            }
            NodeReport::Disconnected => {
                self.connected.remove(&node);
                self.enrolled.0.remove(&node);
                Vec::new()
            }
            NodeReport::Enrolled(keys) => {
                let joining = self
                    .tracked
                    .iter()
                    .filter(|(source, one)| {
                        let captured = source.key().is_some_and(|key| keys.contains(key));
                        one.state == State::Joining && one.node == node && captured
                    })
                    .map(|(source, _)| source.clone())
                    .collect();
                self.enrolled.0.insert(node, Arc::new(keys));
                joining
            }
        }
    }

    /// What agents say they capture.
    pub(super) fn captured(&self) -> Captured {
        self.enrolled.clone()
    }

    /// Decides about a pod or WorkloadEntry as it is now. `ambient`: it is selected.
    pub(super) fn is_hbone(
        &mut self,
        source: &WorkloadSource,
        uid: &Arc<str>,
        node: &Arc<str>,
        ambient: bool,
    ) -> bool {
        let state = self.next(source, uid, node, ambient);
        let tracked = Tracked { uid: uid.clone(), state, node: node.clone() };
        self.tracked.insert(source.clone(), tracked);
        state == State::Tunnelled
    }

    /// A pod or WorkloadEntry is gone.
    pub(super) fn forget(&mut self, source: &WorkloadSource) {
        self.tracked.remove(source);
    }

    fn next(
        &self,
        source: &WorkloadSource,
        uid: &Arc<str>,
        node: &Arc<str>,
        ambient: bool,
    ) -> State {
        if !ambient {
            return State::Plain;
        }
        let captured = source.key().is_some_and(|key| self.enrolled.holds(node, key));
        let known = self.tracked.get(source);
        match known.filter(|known| known.uid == *uid).map(|known| known.state) {
            None | Some(State::Tunnelled) => State::Tunnelled,
            Some(State::Plain | State::Joining) if captured => State::Tunnelled,
            Some(State::Plain) if !self.connected.contains(node) => State::Tunnelled,
            Some(State::Plain | State::Joining) => State::Joining,
        }
    }
}
