//! A node: containerd, kubelet and kube-proxy in namespaces of their own.

mod config;

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::Context as _;

use super::addresses::Plan;
use super::cgroup::{self, Groups};
use super::control_plane::serves;
use super::layout::Layout;
use super::machine::Machine;
use super::mounts;
use super::network::{self, BRIDGE, ip, sysctl};
use super::supervisor::{Supervisor, wait_until};
use crate::command::{quietly, succeeds};

/// The socket of containerd, of which the node's own `/run` holds one.
pub(super) const CONTAINERD: &str = "/run/containerd/containerd.sock";

/// Sysctls of the whole machine that kubelet insists on. It only compares when they are right, so
/// that each is shown as a file with the value it wants; the machine's own stay as they are.
const MACHINE_SYSCTLS: &[(&str, &str)] = &[
    ("vm/overcommit_memory", "1"),
    ("vm/panic_on_oom", "0"),
    ("kernel/panic", "10"),
    ("kernel/panic_on_oops", "1"),
    ("kernel/keys/root_maxkeys", "1000000"),
    ("kernel/keys/root_maxbytes", "25000000"),
];

/// Plugs a node that has been launched into the control plane's bridge.
pub(super) fn plug(layout: &Layout, number: u8) -> anyhow::Result<()> {
    let (control_plane, node) = (Machine::ControlPlane, Machine::Node(number));
    let mut inits = (None, None);
    wait_until("a machine's first process", Duration::from_secs(20), || {
        control_plane.check(layout)?;
        node.check(layout)?;
        inits = (control_plane.init(layout)?, node.init(layout)?);
        Ok(inits.0.is_some() && inits.1.is_some())
    })?;
    let (Some(control_plane), Some(node)) = inits else { return Ok(()) };
    if let Some(parent) = parent(node)? {
        Groups::of(&layout.name)?.stand_aside(parent)?;
    }
    let inside = |words: &str| {
        let mut command = Command::new("nsenter");
        command.args(["-t", &control_plane.to_string(), "-n", "ip"]).args(words.split(' '));
        command
    };
    wait_until("the bridge between the nodes", Duration::from_secs(20), || {
        Ok(succeeds(&mut inside(&format!("link show {BRIDGE} up"))))
    })?;
    let port = format!("node{number}");
    quietly(&mut inside(&format!("link add {port} type veth peer name eth0 netns {node}")))?;
    quietly(&mut inside(&format!("link set {port} master {BRIDGE} up")))
}

/// The process that a machine's namespaces end with.
fn parent(init: u32) -> anyhow::Result<Option<u32>> {
    let status = fs::read_to_string(format!("/proc/{init}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("PPid:"));
    Ok(line.and_then(|line| line.trim().parse().ok()))
}

/// Process 1 of a node.
pub(super) fn boot(layout: &Layout, number: u8) -> anyhow::Result<()> {
    let name = Machine::Node(number).name();
    let own = layout.machine(&name);
    let hierarchies = cgroup::hierarchies()?;
    own_view(&own, &hierarchies)?;
    connect(layout, number)?;
    config::write(layout, number)?;
    let mut supervisor = Supervisor::new(layout.logs(), name.clone());
    let mut containerd = Command::new("containerd");
    containerd.args(["--config", config::CONTAINERD_FILE, "-l", "warn"]);
    supervisor.start("containerd", containerd)?;
    wait_until("containerd", Duration::from_secs(60), || {
        Ok(succeeds(Command::new("ctr").args(["-a", CONTAINERD, "version"])))
    })?;
    let mut import = Command::new("ctr");
    import.args(["-a", CONTAINERD, "-n", "k8s.io", "images", "import"]).arg(layout.images());
    quietly(&mut import)?;
    wait_until("the API server", Duration::from_secs(120), || Ok(serves("readyz")))?;
    let addresses: Vec<String> =
        layout.plan().node(number).iter().map(ToString::to_string).collect();
    let mut kubelet = Command::new("kubelet");
    kubelet.arg(format!("--config={}", config::KUBELET_FILE));
    kubelet.arg(format!("--kubeconfig={}", layout.credentials().kubeconfig(&name).display()));
    kubelet.arg(format!("--node-ip={}", addresses.join(",")));
    kubelet.arg(format!("--hostname-override={name}"));
    supervisor.start("kubelet", kubelet)?;
    let mut proxy = Command::new("kube-proxy");
    proxy.arg(format!("--config={}", config::PROXY_FILE));
    proxy.arg(format!("--hostname-override={name}"));
    supervisor.start("kube-proxy", proxy)?;
    supervisor.run()
}

/// Replaces everything of which a node must see its own instead of the machine's.
fn own_view(own: &Path, hierarchies: &[cgroup::Hierarchy]) -> anyhow::Result<()> {
    mounts::filesystem("proc", Path::new("/proc"), "")?;
    let sysctls = own.join("sysctl");
    fs::create_dir_all(&sysctls)?;
    for (key, value) in MACHINE_SYSCTLS {
        let file = sysctls.join(key.replace('/', "."));
        fs::write(&file, format!("{value}\n"))?;
        mounts::bind(&file, &Path::new("/proc/sys").join(key))?;
    }
    mounts::filesystem("sysfs", Path::new("/sys"), "")?;
    let hybrid = hierarchies.iter().any(|hierarchy| hierarchy.v1.is_some());
    if hybrid {
        mounts::filesystem("tmpfs", Path::new("/sys/fs/cgroup"), "mode=755")?;
    }
    for hierarchy in hierarchies {
        match &hierarchy.v1 {
            Some(options) => mounts::filesystem("cgroup", &hierarchy.mount, options)?,
            None => mounts::filesystem("cgroup2", &hierarchy.mount, "")?,
        }
        if !hybrid {
            make_room(&hierarchy.mount)?;
        }
    }
    mounts::filesystem("bpf", Path::new("/sys/fs/bpf"), "")?;
    // The machine's programs need its /etc; nothing needs its /opt and /var, and pods that mount
    // folders of a node must not see each other's.
    mounts::overlay(Path::new("/etc"), &own.join("etc"))?;
    for name in ["opt", "var"] {
        let folder = own.join(name);
        fs::create_dir_all(&folder)?;
        mounts::bind(&folder, &Path::new("/").join(name))?;
    }
    mounts::filesystem("tmpfs", Path::new("/run"), "mode=755")?;
    for folder in ["/run/netns", "/run/lock", "/var/lib", "/var/log", "/var/tmp"] {
        fs::create_dir_all(folder)?;
    }
    if !Path::new("/var/run").exists() {
        std::os::unix::fs::symlink("/run", "/var/run")?;
    }
    mounts::share_all()
}

/// Version 2 hands controllers down only from groups without processes: kubelet makes its groups at
/// the node's root, so this process, with all that it will start, moves out of it.
fn make_room(root: &Path) -> anyhow::Result<()> {
    let system = root.join("system");
    fs::create_dir_all(&system)?;
    fs::write(system.join("cgroup.procs"), "1").context("cannot leave the node's root group")?;
    // The parent of the node's namespaces is moved away from outside, soon.
    wait_until("the node's root group to be empty", Duration::from_secs(10), || {
        Ok(cgroup::delegate(root).is_ok())
    })
}

/// Waits to be plugged in; then addresses and routes.
fn connect(layout: &Layout, number: u8) -> anyhow::Result<()> {
    let plan: Plan = layout.plan();
    ip("link set lo up")?;
    wait_until("the node's interface", Duration::from_secs(60), || {
        Ok(Path::new("/sys/class/net/eth0").exists())
    })?;
    network::forward(plan)?;
    sysctl("net/ipv4/conf/all/rp_filter", "0")?;
    if plan.dual() {
        sysctl("net/ipv6/conf/default/accept_dad", "0")?;
    }
    for address in plan.node(number) {
        network::add_address("eth0", address)?;
    }
    ip("link set eth0 up")?;
    for gateway in plan.gateways() {
        ip(&format!("route add default via {gateway}"))?;
    }
    network::pod_routes(plan, layout.nodes, number)
}
