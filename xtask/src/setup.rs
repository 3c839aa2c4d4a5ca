//! Installs what building and testing need, and says what it does.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};

use crate::command::{command, run, succeeds};

/// A Debian package, why it is needed, and a file that shows it is there.
struct Package {
    name: &'static str,
    why: &'static str,
    proof: &'static str,
}

const fn package(name: &'static str, why: &'static str, proof: &'static str) -> Package {
    Package { name, why, proof }
}

/// LLVM that bpf-linker is built against; the same major version as the bpf compiler's own.
const LLVM_PREFIX: &str = "/usr/lib/llvm-22";

/// The cargo-deny that `deny.toml` is written for.
const DENY_VERSION: &str = "0.20.2";

const PACKAGES: &[Package] = &[
    package("rustc-web", "compiles the eBPF programs", "/usr/bin/rustc"),
    package(
        "libstd-rust-web-dev-bpf",
        "core library for the bpf target",
        "/usr/lib/rustlib/bpfel-unknown-none/lib",
    ),
    package("llvm-22-dev", "bpf-linker is built against it", "/usr/lib/llvm-22/bin/llvm-config"),
    package("lld-22", "bpf-linker is built against it", "/usr/lib/llvm-22/bin/lld"),
    package("libpolly-22-dev", "bpf-linker is built against it", "/usr/lib/llvm-22/lib/libPolly.a"),
    package("cmake", "aws-lc is built with it", "/usr/bin/cmake"),
    package("gcc", "aws-lc is built with it", "/usr/bin/gcc"),
    package("iproute2", "network namespaces of the lab", "/usr/sbin/ip|/sbin/ip|/bin/ip"),
    package("nftables", "what a hostile pod rewrites with", "/usr/sbin/nft|/sbin/nft"),
    package("util-linux", "nsenter", "/usr/bin/nsenter"),
    package("procps", "sysctl", "/usr/sbin/sysctl|/sbin/sysctl"),
    package(
        "containernetworking-plugins",
        "the CNI plugins pods are made with",
        "/usr/lib/cni/bridge",
    ),
    package("tcpdump", "the sniffer between the nodes", "/usr/bin/tcpdump|/usr/sbin/tcpdump"),
    package("curl", "a real client", "/usr/bin/curl"),
    package("nginx-light", "a real server", "/usr/sbin/nginx"),
    package("redis-server", "a real server", "/usr/bin/redis-server"),
    package(
        "postgresql",
        "a real server",
        "/usr/lib/postgresql/15/bin/postgres|/usr/lib/postgresql/17/bin/postgres",
    ),
    package("iperf3", "a real load", "/usr/bin/iperf3"),
    package("python3", "the raw packet senders", "/usr/bin/python3"),
    package("qemu-system-x86", "runs other kernels", "/usr/bin/qemu-system-x86_64"),
    package("busybox-static", "the guests' user space", "/bin/busybox"),
    package("dash", "the guests' shell", "/usr/bin/dash|/bin/dash"),
    package("cpio", "packs the guests", "/usr/bin/cpio|/bin/cpio"),
    package("kmod", "the guests' modules", "/sbin/depmod|/usr/sbin/depmod"),
    package("e2fsprogs", "makes the guests' disk", "/usr/sbin/mkfs.ext4|/sbin/mkfs.ext4"),
    package("binutils", "strips what goes into the guests", "/usr/bin/strip"),
    package("xz-utils", "unpacks the guests' modules", "/usr/bin/xz"),
];

/// What the nodes of a test cluster run, beside what is built from Go modules.
const CLUSTER_PACKAGES: &[Package] = &[
    package("containerd", "runs the pods of the test cluster", "/usr/bin/containerd"),
    package("runc", "runs the containers of the test cluster", "/usr/sbin/runc|/usr/bin/runc"),
    package(
        "containernetworking-plugins",
        "the CNI plugins pods are made with",
        "/usr/lib/cni/bridge",
    ),
    package("nftables", "kube-proxy makes services with it", "/usr/sbin/nft"),
    package("iptables", "kubelet marks packets with it", "/usr/sbin/iptables"),
    package("conntrack", "kube-proxy ends stale connections with it", "/usr/sbin/conntrack"),
    package("openssl", "certificates of the test cluster", "/usr/bin/openssl"),
    package("python3", "unpacks a fetched Go", "/usr/bin/python3"),
    package("busybox-static", "what tests run in pods", "/bin/busybox|/usr/bin/busybox"),
    package("iproute2", "network of the test cluster", "/usr/sbin/ip|/sbin/ip|/bin/ip"),
    package("util-linux", "unshare and nsenter", "/usr/bin/nsenter"),
    package("curl", "asks whether the API server is ready, and is a real client", "/usr/bin/curl"),
    package("nginx-light", "a real server in pods", "/usr/sbin/nginx"),
    package("redis-server", "a real server in pods", "/usr/bin/redis-server"),
    package(
        "postgresql",
        "a real server in pods",
        "/usr/lib/postgresql/15/bin/postgres|/usr/lib/postgresql/17/bin/postgres",
    ),
    package("tcpdump", "the sniffer between the nodes", "/usr/bin/tcpdump|/usr/sbin/tcpdump"),
];

/// Installs what is missing. Needs root only when something is.
pub(crate) fn ensure() -> anyhow::Result<()> {
    ensure_packages(PACKAGES)?;
    let linker = linker_path();
    if !linker.is_file() {
        println!("installing bpf-linker (links the eBPF programs; about two minutes)");
        run_linker_install()?;
    }
    Ok(())
}

/// Installs what a test cluster needs of Debian.
pub(crate) fn ensure_cluster() -> anyhow::Result<()> {
    ensure_packages(CLUSTER_PACKAGES)
}

fn ensure_packages(packages: &[Package]) -> anyhow::Result<()> {
    let missing: Vec<&Package> =
        packages.iter().filter(|package| !present(package.proof)).collect();
    if missing.is_empty() { Ok(()) } else { install(&missing) }
}

fn present(proof: &str) -> bool {
    proof.split('|').any(|path| Path::new(path).exists())
}

fn install(missing: &[&Package]) -> anyhow::Result<()> {
    for package in missing {
        println!("installing {} ({})", package.name, package.why);
    }
    if !succeeds(&mut command("apt-get", &["--version"])) {
        let names: Vec<&str> = missing.iter().map(|package| package.name).collect();
        bail!("this is no Debian: install the equivalents of {} and run again", names.join(", "));
    }
    let mut names: Vec<&str> = missing.iter().map(|package| package.name).collect();
    let mut arguments = vec!["install", "-y", "--no-install-recommends"];
    arguments.append(&mut names);
    run(command("apt-get", &["update", "-q"]).env("DEBIAN_FRONTEND", "noninteractive"))?;
    run(command("apt-get", &arguments).env("DEBIAN_FRONTEND", "noninteractive"))
        .context("installing Debian packages needs root")?;
    let left: Vec<&str> = missing
        .iter()
        .filter(|package| !present(package.proof))
        .map(|package| package.name)
        .collect();
    if !left.is_empty() {
        bail!("installed, but not found where expected: {}", left.join(", "));
    }
    Ok(())
}

fn linker_path() -> PathBuf {
    cargo_program("bpf-linker")
}

/// Installs cargo-deny, which reads `deny.toml`. Only `cargo xtask ci` needs it.
pub(crate) fn ensure_deny() -> anyhow::Result<()> {
    if cargo_program("cargo-deny").is_file() {
        return Ok(());
    }
    println!("installing cargo-deny (licences, sources and duplicates; some minutes)");
    let version = format!("cargo-deny@{DENY_VERSION}");
    run(&mut command("cargo", &["install", &version, "--locked"]))
}

fn cargo_program(name: &str) -> PathBuf {
    let cargo_home = std::env::var_os("CARGO_HOME").map_or_else(
        || PathBuf::from(std::env::var_os("HOME").unwrap_or_else(|| "/root".into())).join(".cargo"),
        PathBuf::from,
    );
    cargo_home.join("bin").join(name)
}

fn run_linker_install() -> anyhow::Result<()> {
    let mut install = command(
        "cargo",
        &["install", "bpf-linker", "--locked", "--no-default-features", "--features", "llvm-22"],
    );
    run(install.env("LLVM_PREFIX", LLVM_PREFIX))
}
