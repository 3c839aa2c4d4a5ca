//! The images every node starts with: there is no registry, and nothing is ever pulled.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};

use super::layout::Layout;
use super::tools::Tools;
use crate::command::{command, output_of};
use crate::oci::{self, Image};

/// What containerd starts each pod with.
pub(super) const PAUSE_IMAGE: &str = "registry.k8s.io/pause:3.10";
/// As `tests/cluster/coredns.yaml` names it.
const COREDNS_IMAGE: &str = "registry.k8s.io/coredns/coredns:v1.14.3";
/// A shell and the usual tools: what tests run in pods.
const SHELL_IMAGE: &str = "culvert.test/shell:1";

/// Writes the archive that nodes import while the API server starts.
pub(super) fn write(layout: &Layout, tools: &Tools) -> anyhow::Result<()> {
    let program = |name: &str, path: &str, source: PathBuf| Image {
        name: name.to_owned(),
        entrypoint: vec![path.to_owned()],
        files: BTreeMap::from([(path.to_owned(), source)]),
        ..Image::default()
    };
    let images = [
        program(PAUSE_IMAGE, "/pause", tools.pause()),
        program(COREDNS_IMAGE, "/coredns", tools.coredns()),
        shell()?,
    ];
    oci::write(&layout.images(), &images)
}

/// Debian's static busybox, a link per tool.
fn shell() -> anyhow::Result<Image> {
    let known = ["/bin/busybox", "/usr/bin/busybox"];
    let Some(busybox) = known.iter().map(Path::new).find(|path| path.exists()) else {
        bail!("no busybox: install the package busybox-static");
    };
    let tools = output_of(&mut command(&busybox.to_string_lossy(), &["--list"]))
        .context("cannot list the tools of busybox")?;
    let links = tools
        .lines()
        .filter(|tool| *tool != "busybox")
        .map(|tool| (format!("/bin/{tool}"), "busybox".to_owned()))
        .collect();
    Ok(Image {
        name: SHELL_IMAGE.to_owned(),
        entrypoint: vec!["/bin/sh".to_owned()],
        files: BTreeMap::from([("/bin/busybox".to_owned(), busybox.to_owned())]),
        links,
        folders: BTreeSet::from(["/tmp".to_owned(), "/etc".to_owned()]),
        ..Image::default()
    })
}
