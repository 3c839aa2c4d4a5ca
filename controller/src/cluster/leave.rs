//! Takes agents off the nodes: every agent is told to undo what it did to its node, and waited for.
//!
//! The DaemonSet's containers are restarted with `uninstall --stay`, all at once. One that has undone everything is ready;
//! then nothing of the mesh is left on its node, and the DaemonSet may be deleted.

use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use k8s_openapi::api::apps::v1::DaemonSet;
use k8s_openapi::api::core::v1::Pod;
use kube::api::{ListParams, Patch, PatchParams};
use kube::{Api, Client};
use serde_json::json;
use tokio::time::Instant;

use super::ObjectName;

/// Between looks at how far the agents are.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);
/// The agent's container in the DaemonSet, as the chart names it.
const CONTAINER: &str = "agent";

/// Tells the agents of `daemonset` to undo what they did, and waits until all have.
///
/// # Errors
/// When some have not within `patience`: they are named, with their nodes.
pub async fn leave(client: &Client, daemonset: &ObjectName, patience: Duration) -> Result<()> {
    let sets: Api<DaemonSet> = Api::namespaced(client.clone(), &daemonset.namespace);
    if sets.get_opt(&daemonset.name).await.context("cannot look for the DaemonSet")?.is_none() {
        return Ok(());
    }
    let patch = json!({"spec": {
        "updateStrategy": {"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": "100%", "maxSurge": 0}},
        "template": {"spec": {"containers": [{"name": CONTAINER, "args": ["uninstall", "--stay"]}]}},
    }});
    sets.patch(&daemonset.name, &PatchParams::default(), &Patch::Strategic(&patch))
        .await
        .context("cannot tell the agents to leave")?;
    let deadline = Instant::now() + patience;
    loop {
        let set = sets.get(&daemonset.name).await.context("cannot look at the DaemonSet")?;
        if is_done(&set) {
            return Ok(());
        }
        if Instant::now() > deadline {
            let pods: Api<Pod> = Api::namespaced(client.clone(), &daemonset.namespace);
            bail!("agents that have not left their nodes: {}", unfinished(&pods, &set).await?);
        }
        tokio::time::sleep(LOOK_INTERVAL).await;
    }
}

/// Every agent runs the new command and is ready.
fn is_done(set: &DaemonSet) -> bool {
    let Some(status) = &set.status else { return false };
    let wanted = status.desired_number_scheduled;
    status.observed_generation >= set.metadata.generation
        && status.updated_number_scheduled.unwrap_or(0) == wanted
        && status.number_ready == wanted
}

async fn unfinished(pods: &Api<Pod>, set: &DaemonSet) -> Result<String> {
    let labels = set.spec.selector.match_labels.clone();
    let labels: Vec<String> =
        labels.unwrap_or_default().iter().map(|(key, value)| format!("{key}={value}")).collect();
    let listed = pods.list(&ListParams::default().labels(&labels.join(","))).await;
    let names: Vec<String> = listed
        .context("cannot list the agents")?
        .items
        .into_iter()
        .filter(|pod| !left(pod))
        .map(|pod| {
            let node = pod.spec.and_then(|spec| spec.node_name).unwrap_or_default();
            format!("{} on {node}", pod.metadata.name.unwrap_or_default())
        })
        .collect();
    Ok(names.join(", "))
}

fn left(pod: &Pod) -> bool {
    let args = pod.spec.as_ref().and_then(|spec| spec.containers.first()?.args.clone());
    let told = args.is_some_and(|args| args.iter().any(|arg| arg == "uninstall"));
    let conditions = pod.status.as_ref().and_then(|status| status.conditions.as_deref());
    let ready = |conditions: &[k8s_openapi::api::core::v1::PodCondition]| {
        conditions.iter().any(|one| one.type_ == "Ready" && one.status == "True")
    };
    told && conditions.is_some_and(ready)
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::apps::v1::DaemonSetStatus;

    use super::*;

    #[test]
    fn agents_have_left_when_all_run_the_new_command_and_are_ready() {
        let set = |observed, updated, ready| {
            let mut set = DaemonSet::default();
            set.metadata.generation = Some(2);
            set.status = Some(DaemonSetStatus {
                observed_generation: Some(observed),
                desired_number_scheduled: 3,
                updated_number_scheduled: Some(updated),
                number_ready: ready,
                ..DaemonSetStatus::default()
            });
            set
        };
        assert!(is_done(&set(2, 3, 3)));
        assert!(!is_done(&set(1, 3, 3)), "the status is of before");
        assert!(!is_done(&set(2, 2, 3)), "one is of before");
        assert!(!is_done(&set(2, 3, 2)));
        assert!(!is_done(&DaemonSet::default()));
    }
}
