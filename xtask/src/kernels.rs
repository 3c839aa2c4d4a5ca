//! Other kernels: Debian's stock 6.1 and 6.12 in QEMU, without KVM, with the suites of this machine inside.
//!
//! The guest is an initramfs made of busybox, iproute2, the kernel's modules that the suites need and the very
//! binaries that were built for this machine, with the libraries they are linked to.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, bail};

use crate::command::{command, root, run};

/// A kernel to test on: its name, where Debian keeps it, and the package's pattern.
struct Kernel {
    name: &'static str,
    suite: &'static str,
    pattern: &'static str,
}

const KERNELS: &[Kernel] = &[
    Kernel { name: "6.1", suite: "bookworm", pattern: r"^linux-image-6\.1\.[0-9.-]*-cloud-amd64$" },
    Kernel {
        name: "6.12",
        suite: "bookworm-backports",
        pattern: r"^linux-image-6\.12\.[0-9.+a-z]*-cloud-amd64$",
    },
];

/// Modules the suites need beyond what is built in. What a kernel has built in is not found and not missed.
const MODULES: &str = "virtio_pci virtio_blk veth bridge dummy sch_ingress cls_bpf act_bpf tcp_diag \
    inet_diag mptcp_diag udp_diag 8021q ipip ip_gre aesni_intel nf_tables";

/// Programs of the host that the guest's suites run.
const HOST_PROGRAMS: &[&str] = &["dash", "ip", "tc", "ss", "nsenter"];

/// How long a guest may run. Emulation is 20 to 80 times slower than this machine.
const LIMIT_SECONDS: &str = "900";

/// Runs the capture suite in every kernel, or in those whose name contains `filter`.
pub(crate) fn run_suites(filter: Option<&str>) -> anyhow::Result<()> {
    let suites = test_programs("mesh-ebpf")?;
    if suites.is_empty() {
        bail!("mesh-ebpf has no test programs");
    }
    let mut failed = Vec::new();
    for kernel in
        KERNELS.iter().filter(|kernel| filter.is_none_or(|text| kernel.name.contains(text)))
    {
        let files = fetch(kernel)?;
        let image = make_image(kernel, &files, &suites)?;
        println!("→ the capture suite on Linux {} ({})", kernel.name, files.version);
        if !boot(&files.vmlinuz, &image)? {
            failed.push(kernel.name);
        }
    }
    if !failed.is_empty() {
        bail!("the capture suite failed on Linux {}", failed.join(", "));
    }
    Ok(())
}

/// Kernel, modules and version of an unpacked package.
struct Files {
    vmlinuz: PathBuf,
    modules: PathBuf,
    version: String,
}

fn cache() -> PathBuf {
    let base = std::env::var_os("XDG_CACHE_HOME").map_or_else(
        || PathBuf::from(std::env::var_os("HOME").unwrap_or_else(|| "/root".into())).join(".cache"),
        PathBuf::from,
    );
    base.join("culvert/kernels")
}

/// Fetches and unpacks the newest package of a kernel, once.
fn fetch(kernel: &Kernel) -> anyhow::Result<Files> {
    let folder = cache().join(kernel.name);
    let unpacked = folder.join("unpacked");
    if !unpacked.join("boot").is_dir() {
        std::fs::create_dir_all(folder.join("lists/partial"))?;
        let list = folder.join("sources.list");
        let debian =
            "[signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] http://deb.debian.org";
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
        run(Command::new("dpkg-deb").arg("-x").arg(&archive).arg(&unpacked))?;
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

fn numbers(text: &str) -> Vec<u64> {
    text.split(|character: char| !character.is_ascii_digit())
        .filter_map(|digits| digits.parse().ok())
        .collect()
}

/// The test programs cargo builds for a package.
fn test_programs(package: &str) -> anyhow::Result<Vec<PathBuf>> {
    let arguments = ["test", "--package", package, "--tests", "--no-run", "--message-format=json"];
    let output = command("cargo", &arguments).stderr(Stdio::inherit()).output()?;
    if !output.status.success() {
        bail!("building the tests of {package} failed");
    }
    let mut programs = Vec::new();
    for line in String::from_utf8(output.stdout)?.lines() {
        let message: serde_json::Value = serde_json::from_str(line)?;
        let integration = message["target"]["kind"][0].as_str() == Some("test");
        if let (true, Some(path)) = (integration, message["executable"].as_str()) {
            programs.push(PathBuf::from(path));
        }
    }
    Ok(programs)
}

/// Packs the initramfs.
fn make_image(kernel: &Kernel, files: &Files, suites: &[PathBuf]) -> anyhow::Result<PathBuf> {
    let folder = cache().join(kernel.name);
    let tree = folder.join("tree");
    if tree.exists() {
        std::fs::remove_dir_all(&tree)?;
    }
    for name in
        ["bin", "sbin", "dev", "proc", "sys", "run", "tmp", "etc", "root", "suites", "usr/bin"]
    {
        std::fs::create_dir_all(tree.join(name))?;
    }
    std::os::unix::fs::symlink("../run", tree.join("var")).context("linking /var")?;
    busybox(&tree)?;
    for program in HOST_PROGRAMS {
        let path = which(program)?;
        copy_program(&tree, &path, &tree.join("usr/bin").join(program))?;
    }
    std::os::unix::fs::symlink("/usr/bin/dash", tree.join("bin/sh"))?;
    copy_modules(&tree, files)?;
    for (index, suite) in suites.iter().enumerate() {
        copy_program(&tree, suite, &tree.join(format!("suites/{index}")))?;
    }
    std::fs::write(tree.join("init"), INIT)?;
    run(Command::new("chmod").arg("+x").arg(tree.join("init")))?;
    let image = folder.join("image.gz");
    let pack = format!(
        "cd '{}' && find . | cpio --quiet -o -H newc -R 0:0 | gzip -1 > '{}'",
        tree.display(),
        image.display()
    );
    run(Command::new("sh").args(["-c", &pack]))?;
    Ok(image)
}

fn busybox(tree: &Path) -> anyhow::Result<()> {
    let busybox = tree.join("bin/busybox");
    std::fs::copy("/bin/busybox", &busybox).context("busybox-static is not installed")?;
    let list = Command::new(&busybox).arg("--list").output()?;
    for applet in String::from_utf8(list.stdout)?.lines() {
        // Busybox's own ip knows no namespaces, and its shell would prefer it.
        if !["ip", "tc", "sh", "busybox", "nsenter"].contains(&applet) {
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
    let mut wanted = BTreeSet::new();
    for module in MODULES.split_whitespace() {
        let output = Command::new("modprobe")
            .arg("-d")
            .arg(&files.modules)
            .args(["-S", version, "--show-depends", module])
            .output()?;
        for line in String::from_utf8(output.stdout)?.lines() {
            if let Some(path) = line.strip_prefix("insmod ") {
                wanted.insert(PathBuf::from(path.split_whitespace().next().unwrap_or_default()));
            }
        }
    }
    for path in wanted {
        let relative = path.strip_prefix(&files.modules).context("a module elsewhere")?;
        let mut to = tree.join(relative);
        std::fs::create_dir_all(to.parent().context("a module at the root")?)?;
        if path.extension().is_some_and(|extension| extension == "xz") {
            // The guest's modprobe cannot unpack; the signature stays valid.
            to.set_extension("");
            let output = std::fs::File::create(&to)?;
            let status = Command::new("xz").arg("-dc").arg(&path).stdout(output).status()?;
            if !status.success() {
                bail!("cannot unpack {}", path.display());
            }
        } else {
            std::fs::copy(&path, &to)?;
        }
    }
    run(Command::new("depmod").arg("-b").arg(tree).arg(version))
}

/// Boots the image; true when every suite passed.
fn boot(vmlinuz: &Path, image: &Path) -> anyhow::Result<bool> {
    let mut qemu = Command::new("timeout");
    qemu.args([LIMIT_SECONDS, "qemu-system-x86_64", "-accel", "tcg,thread=multi", "-smp", "2"]);
    qemu.args(["-m", "1536", "-cpu", "max", "-nographic", "-no-reboot", "-nodefaults"]);
    qemu.args(["-serial", "stdio", "-append", "console=ttyS0 panic=-1 quiet loglevel=3"]);
    qemu.arg("-kernel").arg(vmlinuz).arg("-initrd").arg(image).current_dir(root());
    let output = qemu.stdin(Stdio::null()).output().context("starting QEMU")?;
    let console = String::from_utf8_lossy(&output.stdout);
    for line in console.lines() {
        println!("   {}", line.trim_end());
    }
    Ok(console.lines().any(|line| line.trim_end() == "SUITES PASSED"))
}

/// The guest's first process: mounts, runs every suite, says how it went, ends the machine.
const INIT: &str = r#"#!/bin/sh
export PATH=/usr/bin:/sbin:/bin HOME=/root
mount -t proc proc /proc; mount -t sysfs sys /sys; mount -t devtmpfs dev /dev
mount -t tmpfs run /run; mount -t tmpfs tmp /tmp; mkdir -p /run/netns /etc/netns
ln -sf /bin/modprobe /sbin/modprobe; echo /sbin/modprobe > /proc/sys/kernel/modprobe
mount -t cgroup2 cgroup /sys/fs/cgroup; mount -t bpf bpf /sys/fs/bpf; ip link set lo up
for module in veth bridge sch_ingress cls_bpf tcp_diag aesni_intel; do modprobe $module 2>/dev/null; done
echo "Linux $(uname -r), up $(cut -d' ' -f1 /proc/uptime) s"
verdict=PASSED
for suite in /suites/*; do
  CULVERT_SLOW_MACHINE=20 RUST_BACKTRACE=1 $suite --test-threads=1 || verdict=FAILED
done
echo "SUITES $verdict"
poweroff -f
"#;
