//! What the runtime passes in environment variables.

use std::collections::BTreeMap;

use super::error::{CniError, Code};
use crate::names::{ContainerId, NetnsPath, pod_uid};
use crate::request::PodRef;

/// What the plugin is asked to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Verb {
    /// A container joins the network.
    Add,
    /// A container leaves.
    Del,
    /// Is a container as it should be?
    Check,
    /// Can containers be served?
    Status,
    /// Forget containers that are gone.
    Gc,
    /// Which versions are spoken?
    Version,
}

/// The variables as they are set; unset ones are `None`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Environment {
    /// `CNI_COMMAND`.
    pub command: Option<String>,
    /// `CNI_CONTAINERID`.
    pub container_id: Option<String>,
    /// `CNI_NETNS`.
    pub netns: Option<String>,
    /// `CNI_IFNAME`.
    pub interface: Option<String>,
    /// `CNI_ARGS`.
    pub args: Option<String>,
}

impl Environment {
    /// Reads the variables through `lookup`.
    pub fn read(lookup: impl Fn(&str) -> Option<String>) -> Self {
        Self {
            command: lookup("CNI_COMMAND"),
            container_id: lookup("CNI_CONTAINERID"),
            netns: lookup("CNI_NETNS"),
            interface: lookup("CNI_IFNAME"),
            args: lookup("CNI_ARGS"),
        }
    }

    /// What is asked.
    ///
    /// # Errors
    /// When `CNI_COMMAND` is unset or unknown.
    pub fn verb(&self) -> Result<Verb, CniError> {
        match required(self.command.as_deref(), "CNI_COMMAND")? {
            "ADD" => Ok(Verb::Add),
            "DEL" => Ok(Verb::Del),
            "CHECK" => Ok(Verb::Check),
            "STATUS" => Ok(Verb::Status),
            "GC" => Ok(Verb::Gc),
            "VERSION" => Ok(Verb::Version),
            other => Err(invalid("CNI_COMMAND", &format!("unknown command {other:?}"))),
        }
    }

    /// The sandbox.
    pub(super) fn container(&self) -> Result<ContainerId, CniError> {
        let text = required(self.container_id.as_deref(), "CNI_CONTAINERID")?;
        ContainerId::new(text).map_err(|error| invalid("CNI_CONTAINERID", &error.to_string()))
    }

    /// The network namespace.
    pub(super) fn namespace(&self) -> Result<NetnsPath, CniError> {
        let text = required(self.netns.as_deref(), "CNI_NETNS")?;
        NetnsPath::new(text).map_err(|error| invalid("CNI_NETNS", &error.to_string()))
    }

    /// Checks `CNI_IFNAME`. Source: Linux `dev_valid_name`, 15 bytes, and the specification's further exclusions.
    pub(super) fn check_interface(&self) -> Result<(), CniError> {
        let name = required(self.interface.as_deref(), "CNI_IFNAME")?;
        let odd = |c: char| c == '/' || c == ':' || c.is_whitespace() || c.is_control();
        if name.len() > 15 || name == "." || name == ".." || name.contains(odd) {
            return Err(invalid("CNI_IFNAME", &format!("no interface name: {name:?}")));
        }
        Ok(())
    }

    /// The pod that Kubernetes' runtimes name in `CNI_ARGS`. Without `K8S_POD_UID` (old runtimes) the sandbox's id stands
    /// in: the uid is only a key, a pod is matched to its workload by name.
    pub(super) fn pod(&self, container: &ContainerId) -> Result<PodRef, CniError> {
        let args = pairs(self.args.as_deref().unwrap_or_default())?;
        let wanted = |key: &str| {
            args.get(key).filter(|value| !value.is_empty()).copied().ok_or_else(|| {
                invalid(
                    "CNI_ARGS",
                    &format!("{key} is missing: only pods of Kubernetes are served"),
                )
            })
        };
        let uid = match args.get("K8S_POD_UID").filter(|uid| !uid.is_empty()) {
            Some(uid) => pod_uid(uid).map_err(|error| invalid("CNI_ARGS", &error.to_string()))?,
            None => mesh_model::PodUid::new(container.as_str()),
        };
        let infra = args.get("K8S_POD_INFRA_CONTAINER_ID").filter(|id| !id.is_empty());
        if infra.is_some_and(|id| *id != container.as_str()) {
            return Err(invalid("CNI_ARGS", "K8S_POD_INFRA_CONTAINER_ID is not CNI_CONTAINERID"));
        }
        let (namespace, name) = (wanted("K8S_POD_NAMESPACE")?, wanted("K8S_POD_NAME")?);
        PodRef::new(uid.as_str(), namespace, name, "")
            .map_err(|error| invalid("CNI_ARGS", &error.to_string()))
    }
}

/// `A=1;B=2` as a table; keys of other plugins are none of ours. Source: CNI specification, "Parameters".
fn pairs(args: &str) -> Result<BTreeMap<&str, &str>, CniError> {
    let mut table = BTreeMap::new();
    for pair in args.split(';').filter(|pair| !pair.is_empty()) {
        let (key, value) = pair
            .split_once('=')
            .ok_or_else(|| invalid("CNI_ARGS", &format!("not of the form key=value: {pair:?}")))?;
        if table.insert(key, value).is_some_and(|other| other != value) {
            return Err(invalid("CNI_ARGS", &format!("{key} is given twice")));
        }
    }
    Ok(table)
}

fn required<'a>(value: Option<&'a str>, name: &str) -> Result<&'a str, CniError> {
    value.filter(|value| !value.is_empty()).ok_or_else(|| invalid(name, "not set"))
}

fn invalid(name: &str, what: &str) -> CniError {
    CniError::new(Code::InvalidEnvironment, format!("invalid environment variable {name}"), what)
}
