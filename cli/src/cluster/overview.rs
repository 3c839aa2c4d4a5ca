//! `culvert status` of a cluster: the controller, the agents, and each pod of the mesh with the reason why it is not captured.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use mesh_enroll::{EnrolledPod, PodPhase};
use serde::Serialize;
use serde_json::Value;

use super::kubectl::{Kubectl, text};
use super::{IN_IMAGE, print};
use crate::arguments::Output;
use crate::failure::{Ending, Failure};
use crate::show::Columns;

/// One pod of a namespace of the mesh.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Standing {
    pub(super) namespace: String,
    pub(super) name: String,
    node: String,
    /// It runs, and is no pod of the host's network.
    pub(super) running: bool,
    /// Its label, or its namespace's, selects it.
    pub(super) wanted: bool,
    /// As its agent says; `unknown` when that knows nothing of it.
    phase: String,
    /// Why it is not captured.
    pub(super) detail: String,
}

impl Standing {
    pub(super) fn is_captured(&self) -> bool {
        self.phase == PodPhase::Enrolled.as_str()
    }
}

#[derive(Debug, Serialize)]
struct Overview {
    controllers_ready: u64,
    controllers: u64,
    agents: Vec<Agent>,
    pods: Vec<Standing>,
}

#[derive(Debug, Serialize)]
struct Agent {
    node: String,
    pod: String,
    ready: bool,
    detail: String,
}

/// Shows how everything stands. Ends with no when a daemon is not ready, or a pod of the mesh is not captured.
pub(super) fn run(kubectl: &Kubectl, output: Output) -> Result<Ending, Failure> {
    let deployment = kubectl.ask(&["get", "deployment", "culvert-controller", "-o", "json"])?;
    let deployment: Value = serde_json::from_str(&deployment)
        .map_err(|source| Failure::Unreadable { who: "cluster", source })?;
    let overview = Overview {
        controllers_ready: deployment["status"]["readyReplicas"].as_u64().unwrap_or(0),
        controllers: deployment["spec"]["replicas"].as_u64().unwrap_or(1),
        agents: agents(kubectl)?,
        pods: pods(kubectl)?.into_iter().filter(|pod| pod.running && pod.wanted).collect(),
    };
    print(&overview, &render(&overview), output)?;
    let ready = overview.controllers_ready >= overview.controllers
        && overview.agents.iter().all(|agent| agent.ready)
        && overview.pods.iter().all(Standing::is_captured);
    Ok(if ready { Ending::Yes } else { Ending::No })
}

fn agents(kubectl: &Kubectl) -> Result<Vec<Agent>, Failure> {
    let ask = |(node, pod): (String, String)| {
        let command = ["exec", &pod, "-c", "agent", "--", "/usr/local/bin/culvert-agent", "ready"];
        let (ready, detail) = match kubectl.ask(&command) {
            Ok(_silent) => (true, String::new()),
            Err(Failure::Answered { problem, .. }) => (false, problem),
            Err(other) => return Err(other),
        };
        Ok(Agent { node, pod, ready, detail })
    };
    kubectl.agents()?.into_iter().map(ask).collect()
}

/// Every pod of namespaces and nodes, with what its agent says of it.
pub(super) fn pods(kubectl: &Kubectl) -> Result<Vec<Standing>, Failure> {
    let mut told = BTreeMap::new();
    for (_, agent) in kubectl.agents()? {
        let command = ["exec", &agent, "-c", "agent", "--", IN_IMAGE, "pod", "list", "-o", "json"];
        // An agent that is just starting says nothing; its pods are shown as unknown then.
        let Ok(text) = kubectl.ask(&command) else { continue };
        let list: Vec<EnrolledPod> = serde_json::from_str(&text)
            .map_err(|source| Failure::Unreadable { who: "agent", source })?;
        told.extend(list.into_iter().map(|pod| (pod.pod.name.to_string(), pod)));
    }
    let reasons = reasons(kubectl)?;
    let namespaces: BTreeMap<String, bool> = kubectl
        .list("namespaces", &[])?
        .iter()
        .map(|one| (text(&one["metadata"]["name"]), mode(one) == Some(true)))
        .collect();
    let standing = |pod: &Value| {
        let (namespace, name) =
            (text(&pod["metadata"]["namespace"]), text(&pod["metadata"]["name"]));
        let full = format!("{namespace}/{name}");
        let known = told.get(&full);
        let phase = known.map_or("unknown", |known| known.phase.as_str());
        let detail = known.map(|known| known.detail.clone()).filter(|detail| !detail.is_empty());
        Standing {
            node: text(&pod["spec"]["nodeName"]),
            running: pod["status"]["phase"] == "Running" && pod["spec"]["hostNetwork"] != true,
            wanted: mode(pod).unwrap_or_else(|| namespaces.get(&namespace) == Some(&true)),
            phase: phase.to_owned(),
            detail: detail.or_else(|| reasons.get(&full).cloned()).unwrap_or_default(),
            namespace,
            name,
        }
    };
    Ok(kubectl.list("pods", &[])?.iter().map(standing).collect())
}

/// The newest Event about each pod that could not be captured.
fn reasons(kubectl: &Kubectl) -> Result<BTreeMap<String, String>, Failure> {
    let about = |event: &Value| {
        let object = &event["involvedObject"];
        format!("{}/{}", text(&object["namespace"]), text(&object["name"]))
    };
    let mut events = kubectl.list("events", &["--field-selector", "reason=NotCaptured"])?;
    events.sort_by_key(|event| text(&event["metadata"]["creationTimestamp"]));
    Ok(events.iter().map(|event| (about(event), text(&event["message"]))).collect())
}

/// What an object's label says: in the mesh, outside, or nothing.
fn mode(object: &Value) -> Option<bool> {
    match object["metadata"]["labels"]["culvert.dev/dataplane-mode"].as_str() {
        Some("ambient") => Some(true),
        Some(_) => Some(false),
        None => None,
    }
}

fn render(overview: &Overview) -> String {
    let mut text = String::new();
    let Overview { controllers_ready, controllers, .. } = overview;
    writeln!(text, "controller: {controllers_ready} of {controllers} ready\n")
        .expect("a String takes everything");
    let mut agents = Columns::new(&["NODE", "AGENT", "READY", "DETAIL"]);
    for agent in &overview.agents {
        let ready = if agent.ready { "yes" } else { "NO" };
        agents.row([agent.node.clone(), agent.pod.clone(), ready.to_owned(), agent.detail.clone()]);
    }
    text.push_str(&agents.render());
    text.push('\n');
    if overview.pods.is_empty() {
        text.push_str("no pod is in the mesh: culvert ns add NAMESPACE\n");
        return text;
    }
    let mut pods = Columns::new(&["POD", "NODE", "PHASE", "DETAIL"]);
    for pod in &overview.pods {
        let name = format!("{}/{}", pod.namespace, pod.name);
        pods.row([name, pod.node.clone(), pod.phase.clone(), pod.detail.clone()]);
    }
    text.push_str(&pods.render());
    text
}
