//! Events about pods of the mesh that their node's agent cannot capture. Agents report them with the reason; one that
//! lasts is told at the pod, by the controller to which the agent is connected.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use k8s_openapi::api::core::v1::ObjectReference;
use kube::Client;
use tracing::warn;

use super::events::{Events, Warning};
use crate::index::Key;
use crate::mesh::SharedMesh;

/// How long it must last: what passes by itself concerns nobody.
const GRACE: Duration = Duration::from_secs(10);
/// It is told again this long after the last time.
const REPEATED_AFTER: Duration = Duration::from_secs(3600);
/// Between looks.
const INTERVAL: Duration = Duration::from_secs(2);
/// Most Events made in one look.
const MAX_EVENTS: usize = 50;

/// What agents cannot capture at present.
#[derive(Clone, Debug, Default)]
pub struct Uncaptured(Arc<Mutex<Nodes>>);

/// The pods of each node.
type Nodes = BTreeMap<Arc<str>, BTreeMap<Key, Entry>>;

#[derive(Clone, Debug)]
struct Entry {
    reason: String,
    since: Instant,
    told: Option<Instant>,
}

impl Uncaptured {
    /// Takes in what a node's agent says; it names all of them each time.
    pub fn report(&self, node: &Arc<str>, pods: BTreeMap<Key, String>, now: Instant) {
        let mut nodes = self.lock();
        let before = nodes.remove(node).unwrap_or_default();
        let entry = |(key, reason): (Key, String)| {
            let known = before.get(&key);
            let since = known.map_or(now, |known| known.since);
            // The reason may name what changes all the time, such as a process.
            let told = known.and_then(|known| known.told);
            (key, Entry { reason, since, told })
        };
        let pods: BTreeMap<_, _> = pods.into_iter().map(entry).collect();
        if !pods.is_empty() {
            nodes.insert(Arc::clone(node), pods);
        }
    }

    /// What is to be told now; it counts as told.
    fn due(&self, now: Instant) -> Vec<(Arc<str>, Key, String)> {
        let mut due = Vec::new();
        for (node, pods) in self.lock().iter_mut() {
            for (key, entry) in pods {
                let again = entry.told.is_none_or(|told| now >= told + REPEATED_AFTER);
                if again && now >= entry.since + GRACE && due.len() < MAX_EVENTS {
                    entry.told = Some(now);
                    due.push((Arc::clone(node), key.clone(), entry.reason.clone()));
                }
            }
        }
        due
    }

    fn lock(&self) -> MutexGuard<'_, Nodes> {
        // It is changed in single steps.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Tells of them, for as long as it is run.
pub(crate) async fn tell(
    client: Client,
    mesh: SharedMesh,
    identity: String,
    uncaptured: Uncaptured,
) {
    let events = Events::new(client, identity);
    let mut ticks = tokio::time::interval(INTERVAL);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        for (node, key, reason) in uncaptured.due(Instant::now()) {
            // An agent speaks for its own node only.
            let uid = mesh.with_index(|index| {
                let found = index.pods().find(|pod| pod.key == key && pod.node == node);
                found.map(|pod| pod.pod_uid.to_string())
            });
            let Some(uid) = uid else { continue };
            let regarding = ObjectReference {
                api_version: Some("v1".to_owned()),
                kind: Some("Pod".to_owned()),
                namespace: Some(key.namespace.to_string()),
                name: Some(key.name.to_string()),
                uid: Some(uid).filter(|uid| !uid.is_empty()),
                ..ObjectReference::default()
            };
            let note = format!("it is in the mesh and not captured on node {node}: {reason}");
            let warning = Warning { regarding, reason: "NotCaptured", action: "Capture", note };
            if let Err(error) = events.tell(warning).await {
                warn!(pod = %key, %error, "a pod that is not captured: the Event is not made");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_lasts_is_told_and_what_passes_is_not() {
        let uncaptured = Uncaptured::default();
        let (start, node): (_, Arc<str>) = (Instant::now(), "node1".into());
        let second = Duration::from_secs(1);
        let report = |names: &[&str], reason: &str, now| {
            let pods = names.iter().map(|name| (Key::new("shop", name), reason.to_owned()));
            uncaptured.report(&node, pods.collect(), now);
        };
        let due = |now| -> Vec<_> {
            let due = uncaptured.due(now).into_iter();
            due.map(|(_, key, reason)| format!("{key} {reason}")).collect()
        };
        report(&["web", "db"], "first", start);
        assert_eq!(due(start + second), Vec::<String>::new());
        report(&["web"], "second", start + second * 5);
        report(&["web", "db"], "third", start + second * 6);
        assert_eq!(due(start + GRACE), ["shop/web third"], "db was captured in between");
        assert_eq!(due(start + GRACE + second * 6), ["shop/db third"]);
        report(&["web", "db"], "fourth", start + second * 60);
        assert_eq!(due(start + second * 61), Vec::<String>::new(), "once an hour");
        assert_eq!(due(start + GRACE + REPEATED_AFTER), ["shop/web fourth"]);
        report(&[], "", start + second * 62);
        assert_eq!(due(start + REPEATED_AFTER * 9), Vec::<String>::new());
    }
}
