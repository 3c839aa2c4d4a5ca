//! A container runtime's side of CNI: runs a plugin chain as containerd does.

use std::io::Write as _;
use std::path::PathBuf;
use std::process::Stdio;

use anyhow::{Context as _, bail};
use serde_json::{Value, json};

use crate::process::in_namespace;

/// A network configuration list and where its plugins are.
#[derive(Clone, Debug)]
pub struct Chain {
    /// Namespace the plugins run in: the node's.
    pub node_namespace: String,
    /// Folders searched for plugins, in order.
    pub plugin_path: Vec<PathBuf>,
    /// The list: `{cniVersion, name, plugins: [...]}`.
    pub conflist: Value,
}

/// What the runtime tells plugins about one container.
#[derive(Clone, Debug)]
pub struct Attachment {
    /// Container (sandbox) id.
    pub container_id: String,
    /// Path of the network namespace.
    pub netns: String,
    /// `CNI_ARGS`, e.g. `K8S_POD_NAMESPACE=a;K8S_POD_NAME=b`.
    pub args: String,
}

impl Chain {
    /// Runs `ADD` through the chain and gives the last plugin's result.
    ///
    /// # Errors
    /// When a plugin fails; the error carries its JSON. What earlier plugins did is undone by `DEL`.
    pub fn add(&self, attachment: &Attachment) -> anyhow::Result<Value> {
        let mut result = Value::Null;
        for plugin in self.plugins()? {
            match self.call("ADD", plugin, &result, attachment) {
                Ok(value) => result = value,
                Err(error) => {
                    if let Err(undo) = self.delete(attachment) {
                        return Err(error.context(format!("and undoing it failed: {undo:#}")));
                    }
                    return Err(error);
                }
            }
        }
        Ok(result)
    }

    /// Runs `DEL` through the chain, in reverse.
    ///
    /// # Errors
    /// When a plugin fails.
    pub fn delete(&self, attachment: &Attachment) -> anyhow::Result<()> {
        for plugin in self.plugins()?.iter().rev() {
            self.call("DEL", plugin, &Value::Null, attachment)?;
        }
        Ok(())
    }

    /// Runs one plugin with one command and gives what it printed.
    ///
    /// # Errors
    /// When it cannot be run, ends with an error or prints no JSON where it must.
    pub fn call(
        &self,
        verb: &str,
        plugin: &Value,
        previous: &Value,
        attachment: &Attachment,
    ) -> anyhow::Result<Value> {
        let kind = plugin["type"].as_str().context("plugin without type")?;
        let program = self
            .plugin_path
            .iter()
            .map(|folder| folder.join(kind))
            .find(|path| path.is_file())
            .with_context(|| format!("no CNI plugin {kind} in {:?}", self.plugin_path))?;
        let mut config = plugin.clone();
        config["cniVersion"] = self.conflist["cniVersion"].clone();
        config["name"] = self.conflist["name"].clone();
        if !previous.is_null() {
            config["prevResult"] = previous.clone();
        }
        let path: Vec<String> = self.plugin_path.iter().map(|p| p.display().to_string()).collect();
        let mut child = in_namespace(Some(&self.node_namespace), &program)
            .env("CNI_COMMAND", verb)
            .env("CNI_CONTAINERID", &attachment.container_id)
            .env("CNI_NETNS", &attachment.netns)
            .env("CNI_IFNAME", "eth0")
            .env("CNI_ARGS", &attachment.args)
            .env("CNI_PATH", path.join(":"))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| format!("starting {}", program.display()))?;
        let mut stdin = child.stdin.take().context("no standard input")?;
        stdin.write_all(config.to_string().as_bytes())?;
        drop(stdin);
        let output = child.wait_with_output()?;
        if !output.status.success() {
            bail!(
                "CNI {verb} {kind}: {}{}",
                String::from_utf8_lossy(&output.stdout),
                String::from_utf8_lossy(&output.stderr)
            );
        }
        if output.stdout.trim_ascii().is_empty() {
            return Ok(Value::Null);
        }
        serde_json::from_slice(&output.stdout)
            .with_context(|| format!("CNI {verb} {kind} printed no JSON"))
    }

    fn plugins(&self) -> anyhow::Result<&Vec<Value>> {
        self.conflist["plugins"].as_array().context("conflist without plugins")
    }
}

/// The list a node of the lab uses: bridge with host-local addresses of both families, then `chained`.
#[must_use]
pub fn bridge_conflist(state: &str, subnet4: &str, subnet6: &str, chained: Option<Value>) -> Value {
    let bridge = json!({
        "type": "bridge",
        "bridge": "cni0",
        "isGateway": true,
        "hairpinMode": true,
        "dns": { "nameservers": [crate::lab::OUTSIDE_IP] },
        "ipam": {
            "type": "host-local",
            "dataDir": state,
            "ranges": [[{ "subnet": subnet4 }], [{ "subnet": subnet6 }]],
            "routes": [{ "dst": "0.0.0.0/0" }, { "dst": "::/0" }],
        },
    });
    let mut plugins = vec![bridge];
    plugins.extend(chained);
    json!({ "cniVersion": "1.0.0", "name": "lab", "plugins": plugins })
}
