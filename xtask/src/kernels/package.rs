//! Fetches Debian's kernel packages and unpacks them, once.

use std::path::PathBuf;
use std::process::Command;

use anyhow::Context as _;

use super::Kernel;
use crate::command::{cache as cache_folder, run};

/// Kernel, modules and version of an unpacked package.
pub(super) struct Files {
    /// The kernel.
    pub(super) vmlinuz: PathBuf,
    /// The folder with `lib/modules`.
    pub(super) modules: PathBuf,
    /// What `uname -r` says on it.
    pub(super) version: String,
}

/// The folder in which everything of a kernel is kept between runs.
pub(super) fn cache(kernel: &Kernel) -> PathBuf {
    cache_folder().join("kernels").join(kernel.name)
}

/// Fetches and unpacks the newest package of a kernel, if none is there yet.
pub(super) fn fetch(kernel: &Kernel) -> anyhow::Result<Files> {
    let unpacked = cache(kernel).join("unpacked");
    if !unpacked.join("boot").is_dir() {
        download(kernel)?;
    }
    let boot = unpacked.join("boot");
    let vmlinuz = std::fs::read_dir(&boot)?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .find(|path| {
            path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("vmlinuz-"))
        })
        .with_context(|| format!("no kernel in {}", boot.display()))?;
    let name =
        vmlinuz.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    let version = name.trim_start_matches("vmlinuz-").to_owned();
    Ok(Files { vmlinuz, modules: unpacked, version })
}

/// With lists of packages of its own, so that the machine's sources do not matter.
fn download(kernel: &Kernel) -> anyhow::Result<()> {
    let folder = cache(kernel);
    std::fs::create_dir_all(folder.join("lists/partial"))?;
    let list = folder.join("sources.list");
    let debian = "[signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] http://deb.debian.org";
    let mut sources = format!("deb {debian}/debian {} main\n", kernel.suite);
    if kernel.suite == "bookworm" {
        sources.push_str(&format!("deb {debian}/debian-security bookworm-security main\n"));
    }
    std::fs::write(&list, sources)?;
    let options = [
        format!("Dir::Etc::sourcelist={}", list.display()),
        "Dir::Etc::sourceparts=-".to_owned(),
        format!("Dir::State::lists={}", folder.join("lists").display()),
    ];
    let apt = |program: &str| {
        let mut command = Command::new(program);
        command.current_dir(&folder);
        for option in &options {
            command.args(["-o", option]);
        }
        command
    };
    run(apt("apt-get").args(["-q", "update"]))?;
    let found = apt("apt-cache").args(["search", "--names-only", kernel.pattern]).output()?;
    let package = String::from_utf8(found.stdout)?
        .lines()
        .filter_map(|line| Some(line.split_once(' ')?.0.to_owned()))
        .max_by_key(|name| numbers(name))
        .with_context(|| format!("Debian {} has no {}", kernel.suite, kernel.pattern))?;
    run(apt("apt-get").args(["-q", "download", &package]))?;
    let archive = std::fs::read_dir(&folder)?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .find(|path| path.extension().is_some_and(|extension| extension == "deb"))
        .context("apt-get download left no package")?;
    // Unpacked beside its place and moved there, so that an interrupted run leaves no half kernel.
    let partial = folder.join("partial");
    if partial.exists() {
        std::fs::remove_dir_all(&partial)?;
    }
    run(Command::new("dpkg-deb").arg("-x").arg(&archive).arg(&partial))?;
    std::fs::remove_file(&archive)?;
    std::fs::rename(&partial, folder.join("unpacked")).context("keeping the unpacked kernel")
}

fn numbers(text: &str) -> Vec<u64> {
    text.split(|character: char| !character.is_ascii_digit())
        .filter_map(|digits| digits.parse().ok())
        .collect()
}
