//! kubectl and helm, as the caller has them set up.

use std::io::{self, BufReader};
use std::process::{Child, ChildStdout, Command, Stdio};

use serde_json::Value;

use crate::arguments::ClusterReach;
use crate::failure::Failure;
use crate::pod::pod_name;

/// Selects the agents' pods.
const AGENTS: &str = "app.kubernetes.io/name=culvert,app.kubernetes.io/component=agent";

/// kubectl with the caller's context.
pub(super) struct Kubectl {
    context: Option<String>,
    pub(super) system_namespace: String,
}

impl Kubectl {
    pub(super) fn new(reach: &ClusterReach) -> Self {
        let ClusterReach { context, system_namespace, .. } = reach;
        Self { context: context.clone(), system_namespace: system_namespace.clone() }
    }

    /// kubectl in Culvert's own namespace.
    pub(super) fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new("kubectl");
        if let Some(context) = &self.context {
            command.arg(format!("--context={context}"));
        }
        command.arg(format!("--namespace={}", self.system_namespace)).args(arguments);
        command
    }

    pub(super) fn helm(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new("helm");
        if let Some(context) = &self.context {
            command.arg(format!("--kube-context={context}"));
        }
        command.arg(format!("--namespace={}", self.system_namespace)).args(arguments);
        command
    }

    /// What kubectl prints.
    pub(super) fn ask(&self, arguments: &[&str]) -> Result<String, Failure> {
        let output = self.command(arguments).stdin(Stdio::null()).output().map_err(not_started)?;
        if output.status.success() {
            return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
        }
        Err(Failure::Answered {
            who: "cluster",
            problem: String::from_utf8_lossy(&output.stderr).trim().to_owned(),
            remedy: String::new(),
        })
    }

    /// The objects of a list, of all namespaces; none of a kind that is not installed.
    pub(super) fn list(&self, kind: &str, more: &[&str]) -> Result<Vec<Value>, Failure> {
        let arguments = [&["get", kind, "--all-namespaces", "-o", "json"][..], more].concat();
        let text = self.ask(&arguments)?;
        let list: Value = serde_json::from_str(&text)
            .map_err(|source| Failure::Unreadable { who: "cluster", source })?;
        Ok(list["items"].as_array().cloned().unwrap_or_default())
    }

    /// Agents: node and pod, by node.
    pub(super) fn agents(&self) -> Result<Vec<(String, String)>, Failure> {
        let pods = self.list("pods", &["-l", AGENTS])?;
        let mut agents: Vec<(String, String)> = pods
            .iter()
            .filter(|pod| pod["metadata"]["namespace"] == self.system_namespace.as_str())
            .filter(|pod| pod["metadata"]["deletionTimestamp"].is_null())
            .map(|pod| (text(&pod["spec"]["nodeName"]), text(&pod["metadata"]["name"])))
            .collect();
        agents.sort();
        Ok(agents)
    }

    /// The container of a node's agent, as `kubectl exec` takes it.
    pub(super) fn agent_on(&self, node: &str) -> Result<Vec<String>, Failure> {
        let found = self.agents()?.into_iter().find(|(here, _)| here == node);
        let (_, pod) = found.ok_or_else(|| Failure::Usage {
            problem: format!("node {node} has no agent in namespace {}", self.system_namespace),
            remedy: "kubectl get nodes shows the names; --system-namespace says where Culvert is"
                .to_owned(),
        })?;
        Ok(agent_container(&pod))
    }

    /// The same for the node that a pod runs on.
    pub(super) fn agent_of(&self, pod: &str) -> Result<Vec<String>, Failure> {
        let name = pod_name(pod)?;
        let path = "jsonpath={.spec.nodeName}";
        let namespace = format!("--namespace={}", name.namespace());
        let node = self.ask(&["get", "pod", name.name(), &namespace, "-o", path])?;
        self.agent_on(node.trim())
    }

    /// The container of a controller.
    #[expect(clippy::unused_self, reason = "beside the agents'")]
    pub(super) fn controller(&self) -> Vec<String> {
        ["deployment/culvert-controller", "-c", "controller"].map(str::to_owned).to_vec()
    }
}

pub(super) fn agent_container(pod: &str) -> Vec<String> {
    [pod, "-c", "agent"].map(str::to_owned).to_vec()
}

/// A text of an object; empty when it has none.
pub(super) fn text(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}

/// Runs a program on the caller's terminal; its exit code.
pub(super) fn pass_on(command: &mut Command) -> Result<u8, Failure> {
    let status = command.status().map_err(not_started)?;
    Ok(status.code().and_then(|code| u8::try_from(code).ok()).unwrap_or(4))
}

/// Starts a program to read what it prints.
pub(super) fn read_from(mut command: Command) -> Result<(Child, BufReader<ChildStdout>), Failure> {
    let mut child =
        command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().map_err(not_started)?;
    let stdout = child.stdout.take();
    let stdout = stdout.ok_or_else(|| not_started(io::ErrorKind::BrokenPipe.into()))?;
    Ok((child, BufReader::new(stdout)))
}

/// Ends a program that nobody reads any more.
pub(super) fn end(child: &mut Child) {
    // It may have ended by itself.
    drop(child.kill());
    drop(child.wait());
}

fn not_started(source: io::Error) -> Failure {
    Failure::Local {
        what: "cannot start kubectl or helm".to_owned(),
        remedy: "install it, and let it reach the cluster: kubectl cluster-info".to_owned(),
        source,
    }
}
