//! The guest's initramfs: busybox, iproute2, the modules that its job needs and the very programs that
//! were built for this machine, with the libraries they are linked to.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, bail};

use super::Kernel;
use super::package::{Files, cache};
use crate::command::run;

/// What the jobs need beyond what is built in: pods and their bridge, the end of sockets by force, the
/// clsact guard, what a hostile pod redirects and rewrites with, a disk. The guest loads the same.
const MODULES: &[&str] = &[
    "veth",
    "tcp_diag",
    "bridge",
    "sch_ingress",
    "cls_bpf",
    "act_mirred",
    "nft_chain_nat",
    "nft_nat",
    "virtio_pci",
    "virtio_blk",
];

/// Programs of the host that the jobs run. Busybox's own `ip` knows no namespaces, and its shell
/// prefers that one whatever the path says.
const HOST_PROGRAMS: &[&str] = &["dash", "ip", "tc", "nft", "curl"];

/// The plugins that give pods their network before ours has its turn.
const CNI_PLUGINS: &[&str] = &["bridge", "host-local"];
const CNI_FOLDER: &str = "/usr/lib/cni";

const FOLDERS: &[&str] =
    &["bin", "sbin", "usr/bin", "dev", "proc", "sys", "run", "tmp", "etc", "root", "suites", "cni"];

/// The guest's first process, and what it runs.
const SCRIPTS: &[(&str, &str)] = &[
    ("init", include_str!("init.sh")),
    ("suite.sh", include_str!("suite.sh")),
    ("reboot.sh", include_str!("reboot.sh")),
];

/// What was built for the guests.
pub(super) struct Built {
    /// Test programs.
    pub(super) suites: Vec<PathBuf>,
    /// Agent, controller and command line.
    pub(super) programs: Vec<PathBuf>,
    /// Our CNI plugin.
    pub(super) plugin: PathBuf,
}

/// Packs the initramfs.
pub(super) fn make(kernel: &Kernel, files: &Files, built: &Built) -> anyhow::Result<PathBuf> {
    let folder = cache(kernel);
    let tree = folder.join("tree");
    if tree.exists() {
        std::fs::remove_dir_all(&tree)?;
    }
    for name in FOLDERS {
        std::fs::create_dir_all(tree.join(name))?;
    }
    std::os::unix::fs::symlink("run", tree.join("var")).context("linking /var")?;
    busybox(&tree)?;
    for program in HOST_PROGRAMS {
        copy_program(&tree, &which(program)?, &tree.join("usr/bin").join(program))?;
    }
    std::os::unix::fs::symlink("/usr/bin/dash", tree.join("bin/sh"))?;
    copy_modules(&tree, files)?;
    let plugins = CNI_PLUGINS.iter().map(|name| Path::new(CNI_FOLDER).join(name)).collect();
    for (folder, programs) in [
        ("suites", &built.suites),
        ("usr/bin", &built.programs),
        ("cni", &vec![built.plugin.clone()]),
        ("cni", &plugins),
    ] {
        for program in programs {
            let name = program.file_name().context("a program without a name")?;
            let to = tree.join(folder).join(name);
            copy_program(&tree, program, &to)?;
            succeed(Command::new("strip").arg("--strip-debug").arg(&to))?;
        }
    }
    for (name, script) in SCRIPTS {
        std::fs::write(tree.join(name), script)?;
    }
    succeed(Command::new("chmod").arg("+x").arg(tree.join("init")))?;
    let image = folder.join("image.gz");
    let pack = format!(
        "cd '{}' && find . | cpio --quiet -o -H newc -R 0:0 | gzip -1 > '{}'",
        tree.display(),
        image.display()
    );
    succeed(Command::new("sh").args(["-c", &pack]))?;
    Ok(image)
}

/// Makes the disk of a node that was never booted.
pub(super) fn make_disk(kernel: &Kernel) -> anyhow::Result<PathBuf> {
    let folder = cache(kernel);
    let seed = folder.join("seed");
    std::fs::create_dir_all(&seed)?;
    std::fs::write(seed.join("boots"), "0\n")?;
    let disk = folder.join("disk.raw");
    if disk.exists() {
        std::fs::remove_file(&disk)?;
    }
    let options = ["-q", "-F", "-d"];
    succeed(Command::new("mkfs.ext4").args(options).arg(&seed).arg(&disk).arg("64M"))?;
    Ok(disk)
}

/// Runs a step that is not worth a line unless it fails.
fn succeed(command: &mut Command) -> anyhow::Result<()> {
    let program = command.get_program().to_string_lossy().into_owned();
    let status = command.status().with_context(|| format!("cannot start {program}"))?;
    if !status.success() {
        bail!("{program} failed ({status})");
    }
    Ok(())
}

fn busybox(tree: &Path) -> anyhow::Result<()> {
    let busybox = tree.join("bin/busybox");
    std::fs::copy("/bin/busybox", &busybox).context("busybox-static is not installed")?;
    let list = Command::new(&busybox).arg("--list").output()?;
    for applet in String::from_utf8(list.stdout)?.lines() {
        if !["ip", "tc", "sh", "busybox"].contains(&applet) {
            std::os::unix::fs::symlink("busybox", tree.join("bin").join(applet))?;
        }
    }
    Ok(())
}

fn which(program: &str) -> anyhow::Result<PathBuf> {
    ["/usr/sbin", "/usr/bin", "/sbin", "/bin"]
        .iter()
        .map(|folder| Path::new(folder).join(program))
        .find(|path| path.is_file())
        .with_context(|| format!("{program} is not installed"))
}

/// Copies a program and the libraries it is linked to.
fn copy_program(tree: &Path, from: &Path, to: &Path) -> anyhow::Result<()> {
    std::fs::copy(from, to).with_context(|| format!("copying {}", from.display()))?;
    let libraries = Command::new("ldd").arg(from).output()?;
    for word in String::from_utf8(libraries.stdout)?.split_whitespace() {
        if word.starts_with('/') {
            let target = tree.join(word.trim_start_matches('/'));
            if !target.exists() {
                std::fs::create_dir_all(target.parent().context("a library at the root")?)?;
                std::fs::copy(word, &target).with_context(|| format!("copying {word}"))?;
            }
        }
    }
    Ok(())
}

fn copy_modules(tree: &Path, files: &Files) -> anyhow::Result<()> {
    let version = &files.version;
    let modules = format!("lib/modules/{version}");
    let source = files.modules.join(&modules);
    let target = tree.join(&modules);
    std::fs::create_dir_all(&target)?;
    if !source.join("modules.dep").exists() {
        run(Command::new("depmod").arg("-b").arg(&files.modules).arg(version))?;
    }
    for name in ["modules.order", "modules.builtin", "modules.builtin.modinfo"] {
        std::fs::copy(source.join(name), target.join(name)).with_context(|| name.to_owned())?;
    }
    for path in closure(files)? {
        let relative = path.strip_prefix(&files.modules).context("a module elsewhere")?;
        let mut to = tree.join(relative);
        std::fs::create_dir_all(to.parent().context("a module at the root")?)?;
        if path.extension().is_some_and(|extension| extension == "xz") {
            // The guest's modprobe cannot unpack; the signature stays valid.
            to.set_extension("");
            let output = std::fs::File::create(&to)?;
            succeed(Command::new("xz").arg("-dc").arg(&path).stdout(output))?;
        } else {
            std::fs::copy(&path, &to)?;
        }
    }
    succeed(Command::new("depmod").arg("-b").arg(tree).arg(version))
}

/// The wanted modules and what they need. What a kernel has built in is no file and not missed.
fn closure(files: &Files) -> anyhow::Result<BTreeSet<PathBuf>> {
    let mut wanted = BTreeSet::new();
    for module in MODULES {
        let output = Command::new("modprobe")
            .arg("-d")
            .arg(&files.modules)
            .args(["-S", &files.version, "--show-depends", module])
            .output()?;
        if !output.status.success() {
            bail!("Linux {} has no module {module}", files.version);
        }
        for line in String::from_utf8(output.stdout)?.lines() {
            if let Some(path) = line.strip_prefix("insmod ") {
                wanted.insert(PathBuf::from(path.split_whitespace().next().unwrap_or_default()));
            }
        }
    }
    Ok(wanted)
}
