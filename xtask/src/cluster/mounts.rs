//! Mounts of a machine's own mount namespace.

use std::fs;
use std::path::Path;

use anyhow::Context as _;
use nix::mount::{MsFlags, mount};

/// Mounts a file system of the given kind; the folder is made if needed.
pub(super) fn filesystem(kind: &str, target: &Path, options: &str) -> anyhow::Result<()> {
    if !target.is_dir() {
        fs::create_dir_all(target).with_context(|| format!("cannot make {}", target.display()))?;
    }
    let options = (!options.is_empty()).then_some(options);
    mount(Some(kind), target, Some(kind), MsFlags::empty(), options)
        .with_context(|| format!("cannot mount {kind} ({options:?}) at {}", target.display()))
}

/// Shows `source`, a file or folder, at `target`, of the same kind.
pub(super) fn bind(source: &Path, target: &Path) -> anyhow::Result<()> {
    let none = None::<&str>;
    mount(Some(source), target, none, MsFlags::MS_BIND, none)
        .with_context(|| format!("cannot bind {} to {}", source.display(), target.display()))
}

/// Lets everything below `/` be changed without the machine outside seeing it: changes go to
/// `<changes>.upper`.
pub(super) fn overlay(target: &Path, changes: &Path) -> anyhow::Result<()> {
    let [upper, work] = ["upper", "work"].map(|name| changes.join(name));
    for folder in [&upper, &work] {
        fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
    }
    let options = format!(
        "lowerdir={},upperdir={},workdir={}",
        target.display(),
        upper.display(),
        work.display()
    );
    filesystem("overlay", target, &options)
}

/// Lets pods see what is mounted later, and the node what they mount.
pub(super) fn share_all() -> anyhow::Result<()> {
    let none = None::<&str>;
    mount(none, "/", none, MsFlags::MS_SHARED | MsFlags::MS_REC, none)
        .context("cannot share the mounts with pods")
}
