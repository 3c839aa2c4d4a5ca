//! What a cluster is, and where its files lie: everything below one folder.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use serde_json::{Value, json};

use super::addresses::{Families, MAX_NODES, Plan};
use super::credentials::Credentials;
use crate::command::cache;

/// A cluster's folder and shape.
#[derive(Debug, Clone)]
pub(super) struct Layout {
    /// What tells clusters of one machine apart.
    pub(super) name: String,
    /// The folder that holds everything of the cluster.
    pub(super) folder: PathBuf,
    /// How many nodes, beside the control plane.
    pub(super) nodes: u8,
    /// The address families.
    pub(super) families: Families,
}

/// Folders of the machine that nodes see their own version of: a cluster cannot lie in one.
const REPLACED: &[&str] = &["/etc", "/opt", "/proc", "/run", "/sys", "/var"];

impl Layout {
    /// The folder of the cluster `name`, below `CULVERT_CLUSTERS` or the user's cache.
    pub(super) fn place(name: &str) -> anyhow::Result<PathBuf> {
        let short = !name.is_empty() && name.len() <= 20;
        let plain = name.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit());
        if !short || !plain {
            bail!("a cluster's name is 1 to 20 lower-case letters and digits, not {name:?}");
        }
        let base = std::env::var_os("CULVERT_CLUSTERS")
            .map_or_else(|| cache().join("cluster/running"), PathBuf::from);
        if let Some(replaced) = REPLACED.iter().find(|folder| base.starts_with(folder)) {
            bail!(
                "clusters cannot lie in {}, because nodes have a {replaced} of their own: \
                 set CULVERT_CLUSTERS to a folder elsewhere",
                base.display()
            );
        }
        Ok(base.join(name))
    }

    /// Checks a shape and makes the cluster's folder. Fails when it is there already.
    pub(super) fn create(name: &str, nodes: u8, families: Families) -> anyhow::Result<Self> {
        let folder = Self::place(name)?;
        if nodes == 0 || nodes > MAX_NODES {
            bail!("a cluster has 1 to {MAX_NODES} nodes, not {nodes}");
        }
        if let Some(above) = folder.parent() {
            fs::create_dir_all(above)
                .with_context(|| format!("cannot make {}", above.display()))?;
        }
        if folder.exists() {
            bail!(
                "cluster {name} is there already, in {}: use it, end it with \
                 `cargo xtask cluster down --name {name}`, or choose another --name",
                folder.display()
            );
        }
        fs::create_dir(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
        let layout = Self { name: name.to_owned(), folder, nodes, families };
        fs::create_dir(layout.logs())?;
        let shape = json!({
            "name": layout.name,
            "nodes": nodes,
            "dualStack": families == Families::Dual,
        });
        fs::write(layout.folder.join("cluster.json"), shape.to_string())?;
        Ok(layout)
    }

    /// Reads what [`create`](Self::create) wrote.
    pub(super) fn load(folder: &Path) -> anyhow::Result<Self> {
        let file = folder.join("cluster.json");
        let text = fs::read_to_string(&file).with_context(|| {
            format!("no cluster in {}: `cargo xtask cluster up` makes one", folder.display())
        })?;
        let shape: Value = serde_json::from_str(&text)
            .with_context(|| format!("{} is damaged", file.display()))?;
        let nodes = shape["nodes"].as_u64().and_then(|nodes| u8::try_from(nodes).ok());
        let (Some(name), Some(nodes)) = (shape["name"].as_str(), nodes) else {
            bail!("{} is damaged: it has no name or no nodes", file.display());
        };
        let dual = shape["dualStack"].as_bool().unwrap_or(false);
        let families = if dual { Families::Dual } else { Families::V4 };
        Ok(Self { name: name.to_owned(), folder: folder.to_owned(), nodes, families })
    }

    pub(super) fn logs(&self) -> PathBuf {
        self.folder.join("log")
    }

    /// The folder of one machine.
    pub(super) fn machine(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    /// The archive with the images every node starts with.
    pub(super) fn images(&self) -> PathBuf {
        self.folder.join("images.tar")
    }

    pub(super) fn credentials(&self) -> Credentials {
        Credentials::new(self.folder.join("credentials"))
    }

    /// The kubeconfig of the cluster's administrator.
    pub(super) fn kubeconfig(&self) -> PathBuf {
        self.credentials().kubeconfig("admin")
    }

    pub(super) const fn plan(&self) -> Plan {
        Plan::new(self.families)
    }
}
