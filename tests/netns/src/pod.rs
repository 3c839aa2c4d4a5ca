//! Pods: a namespace made by CNI, and programs in it.

use std::net::IpAddr;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use crate::cni::Attachment;
use crate::net::Namespace;
use crate::process::{Finished, Process, run};

/// What a pod is to be.
#[derive(Clone, Debug)]
pub struct PodSpec {
    /// Kubernetes namespace.
    pub namespace: String,
    /// Pod name; also the value of its `app` label unless `app` is set.
    pub name: String,
    /// `app` label.
    pub app: String,
    /// Service account.
    pub service_account: String,
    /// Further labels.
    pub labels: Vec<(String, String)>,
    /// Annotations.
    pub annotations: Vec<(String, String)>,
    /// `hostname` and `subdomain`.
    pub host: Option<(String, String)>,
    /// Container ports and probes, as `spec.containers` of the Pod.
    pub containers: serde_json::Value,
}

impl PodSpec {
    /// A pod of the service account that has its name.
    #[must_use]
    pub fn new(namespace: &str, name: &str) -> Self {
        Self {
            namespace: namespace.to_owned(),
            name: name.to_owned(),
            app: name.to_owned(),
            service_account: name.to_owned(),
            labels: Vec::new(),
            annotations: Vec::new(),
            host: None,
            containers: serde_json::json!([{ "name": "main" }]),
        }
    }

    /// The same pod with another `app` label.
    #[must_use]
    pub fn app(mut self, app: &str) -> Self {
        app.clone_into(&mut self.app);
        self
    }

    /// The same pod with another service account.
    #[must_use]
    pub fn service_account(mut self, name: &str) -> Self {
        name.clone_into(&mut self.service_account);
        self
    }

    /// The same pod with one more annotation.
    #[must_use]
    pub fn annotation(mut self, key: &str, value: &str) -> Self {
        self.annotations.push((key.to_owned(), value.to_owned()));
        self
    }

    /// The same pod with one more label.
    #[must_use]
    pub fn label(mut self, key: &str, value: &str) -> Self {
        self.labels.push((key.to_owned(), value.to_owned()));
        self
    }
}

/// A running pod.
#[derive(Debug)]
pub struct Pod {
    /// What it was made from.
    pub spec: PodSpec,
    /// Node it runs on.
    pub node: String,
    /// Its Kubernetes uid.
    pub uid: String,
    /// Its IPv4 address.
    pub ipv4: IpAddr,
    /// Its IPv6 address.
    pub ipv6: IpAddr,
    /// What its node's CNI chain was told of it.
    pub attachment: Attachment,
    pub(crate) namespace: Namespace,
    pub(crate) folder: PathBuf,
}

impl Pod {
    /// The name of its network namespace.
    #[must_use]
    pub fn netns(&self) -> &str {
        self.namespace.name()
    }

    /// A command that runs in the pod, with the pod's own `/etc/resolv.conf`.
    #[must_use]
    pub fn command(&self, program: &str) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", self.netns(), program]);
        command
    }

    /// Runs a shell line in the pod to its end.
    ///
    /// # Errors
    /// When it cannot start or takes longer than a minute.
    pub fn shell(&self, line: &str) -> anyhow::Result<Finished> {
        let mut command = self.command("sh");
        command.args(["-c", line]);
        run(&mut command, Duration::from_secs(60))
    }

    /// Starts a program in the pod that runs until it is told to end.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start(&self, name: &str, command: &mut Command) -> anyhow::Result<Process> {
        Process::start(&format!("{}-{name}", self.spec.name), command, &self.folder)
    }

    /// A folder for the pod's programs' files.
    #[must_use]
    pub fn folder(&self) -> &PathBuf {
        &self.folder
    }
}
