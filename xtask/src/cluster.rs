//! `cargo xtask cluster`: a real Kubernetes on this machine, for tests.
//!
//! Nothing is simulated: etcd, API server, scheduler, controller manager, and on each node kubelet,
//! containerd, runc, kube-proxy and CNI plugins. A node is a set of namespaces and control groups
//! instead of a machine. Everything is below one folder, and `down` leaves nothing.

mod addresses;
mod cgroup;
mod control_plane;
mod credentials;
mod go;
mod images;
mod layout;
mod machine;
mod mounts;
mod network;
mod node;
mod options;
mod supervisor;
mod tools;

use std::ffi::OsString;
use std::fs::{self, File};
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, anyhow, bail};

use crate::command::{command, output_of, quietly, root, run as run_command};
use crate::setup;
use addresses::Families;
use cgroup::Groups;
use layout::Layout;
use machine::Machine;
pub(crate) use options::Verb;
use supervisor::wait_until;
use tools::Tools;

/// The cluster's DNS.
const COREDNS: &str = "tests/cluster/coredns.yaml";

pub(crate) fn run(verb: Verb) -> anyhow::Result<()> {
    match verb {
        Verb::Up { cluster, nodes, dual_stack } => {
            let families = if dual_stack { Families::Dual } else { Families::V4 };
            up(&cluster.name, nodes, families)
        }
        Verb::Down { cluster } => down(&cluster.name),
        Verb::List => list(),
        Verb::Load { cluster, archive } => load(&open(&cluster.name)?, &archive),
        Verb::Kubectl { cluster, arguments } => {
            let mut kubectl = vec![OsString::from("kubectl")];
            kubectl.extend(arguments);
            pass_on(inside(&open(&cluster.name)?, None)?.args(kubectl))
        }
        Verb::Exec { cluster, node, arguments } => {
            pass_on(inside(&open(&cluster.name)?, node)?.args(arguments))
        }
        Verb::PowerOff { cluster, node } => power_off(&open(&cluster.name)?, node),
        Verb::PowerOn { cluster, node } => power_on(&open(&cluster.name)?, node),
        Verb::Programs { output } => {
            setup::ensure_cluster()?;
            images::write_programs(&output)
        }
        Verb::Definitions => {
            println!("{}", tools::definitions()?.display());
            Ok(())
        }
        Verb::Build => prepare(),
        Verb::Machine { step, machine, folder } => match step.as_str() {
            "enter" => machine::enter(&machine, &folder),
            "boot" => machine::boot(&machine, &folder),
            _ => bail!("no step {step}"),
        },
    }
}

/// Installs and builds what clusters are made of, so that no test has to.
pub(crate) fn prepare() -> anyhow::Result<()> {
    setup::ensure_cluster()?;
    tools::GRPC.build()?;
    tools::definitions()?;
    Tools::build().map(drop)
}

/// Runs the bench of the controller beside the control plane of a cluster of its own.
pub(crate) fn bench_controller(
    program: &Path,
    programs: &Path,
    arguments: &[String],
) -> anyhow::Result<()> {
    const NAME: &str = "bench";
    up(NAME, 1, Families::V4)?;
    let outcome = inside(&open(NAME)?, None).and_then(|mut command| {
        command.arg(program).arg("controller").args(arguments);
        run_command(command.env("CULVERT_BIN_DIR", programs))
    });
    down(NAME)?;
    outcome
}

fn open(name: &str) -> anyhow::Result<Layout> {
    Layout::load(&Layout::place(name)?)
}

fn up(name: &str, nodes: u8, families: Families) -> anyhow::Result<()> {
    setup::ensure_cluster()?;
    let tools = Tools::build()?;
    let started = Instant::now();
    if Groups::of(name)?.exist() {
        bail!("a cluster {name} runs: end it with `cargo xtask cluster down --name {name}`");
    }
    let layout = Layout::create(name, nodes, families)?;
    let folder = layout.folder.display().to_string();
    start(&layout, &tools, started).with_context(|| {
        format!(
            "cluster {name} did not come up; its logs are in {folder}/log, \
             `cargo xtask cluster down --name {name}` removes it"
        )
    })?;
    println!("cluster {name} is up in {:.1} s", started.elapsed().as_secs_f64());
    println!("   cargo xtask cluster kubectl --name {name} get pods --all-namespaces");
    println!("   cargo xtask cluster down --name {name}");
    Ok(())
}

fn start(layout: &Layout, tools: &Tools, started: Instant) -> anyhow::Result<()> {
    let step = |what: &str| println!("{:6.1} s  {what}", started.elapsed().as_secs_f64());
    layout.credentials().create(layout.nodes)?;
    images::write(layout, tools)?;
    fs::write(layout.folder.join("path"), tools.path())?;
    Machine::ControlPlane.launch(layout, &tools.path())?;
    for number in 1..=layout.nodes {
        start_node(layout, number)?;
    }
    step("machines started");
    await_ready(layout, "the API server", &["get", "--raw", "/readyz"], |answer| answer == "ok")?;
    step("API server ready");
    let manifest = root().join(COREDNS);
    quietly(inside(layout, None)?.args(["kubectl", "apply", "-f"]).arg(manifest))?;
    let ready = "jsonpath={.items[*].status.conditions[?(@.type=='Ready')].status}";
    await_ready(layout, "all nodes", &["get", "nodes", "-o", ready], |answer| {
        answer.split(' ').filter(|status| *status == "True").count() == usize::from(layout.nodes)
    })?;
    step("nodes ready");
    let dns = ["-n", "kube-system", "get", "deployment", "coredns", "-o"];
    let dns = [dns.as_slice(), &["jsonpath={.status.readyReplicas}"]].concat();
    await_ready(layout, "the cluster's DNS", &dns, |answer| answer == "1")?;
    step("DNS ready");
    Ok(())
}

/// Asks kubectl until the answer is right; fails when a machine ends meanwhile.
fn await_ready(
    layout: &Layout,
    what: &str,
    question: &[&str],
    right: impl Fn(&str) -> bool,
) -> anyhow::Result<()> {
    wait_until(what, Duration::from_secs(180), || {
        Machine::ControlPlane.check(layout)?;
        for number in 1..=layout.nodes {
            Machine::Node(number).check(layout)?;
        }
        let answer = output_of(inside(layout, None)?.arg("kubectl").args(question));
        Ok(answer.is_ok_and(|answer| right(answer.trim())))
    })
}

fn start_node(layout: &Layout, number: u8) -> anyhow::Result<()> {
    let path = fs::read_to_string(layout.folder.join("path"))
        .context("the cluster's folder is damaged")?;
    let machine = Machine::Node(number);
    machine.launch(layout, &path)?;
    node::plug(layout, number)
}

fn checked(layout: &Layout, number: u8) -> anyhow::Result<Machine> {
    if number == 0 || number > layout.nodes {
        bail!("cluster {} has nodes 1 to {}, not {number}", layout.name, layout.nodes);
    }
    Ok(Machine::Node(number))
}

fn power_off(layout: &Layout, number: u8) -> anyhow::Result<()> {
    let machine = checked(layout, number)?;
    Groups::of(&layout.name)?.end(Some(&machine.name()))?;
    println!("{} is off", machine.name());
    Ok(())
}

fn power_on(layout: &Layout, number: u8) -> anyhow::Result<()> {
    let machine = checked(layout, number)?;
    if machine.init(layout)?.is_some() {
        bail!("{} is on already", machine.name());
    }
    start_node(layout, number)?;
    println!("{} is on", machine.name());
    Ok(())
}

fn down(name: &str) -> anyhow::Result<()> {
    let started = Instant::now();
    let folder = Layout::place(name)?;
    let groups = Groups::of(name)?;
    if !folder.exists() && !groups.exist() {
        bail!("no cluster {name}: `cargo xtask cluster list` shows those of this machine");
    }
    groups.end(None)?;
    if folder.exists() {
        // The cluster's mounts ended with its namespaces; anything still here is not the cluster's,
        // and removing what lies in it could be a loss.
        let mounts = fs::read_to_string("/proc/self/mountinfo")?;
        let below = format!("{}/", folder.display());
        if let Some(mount) = mounts.lines().find(|line| line.contains(&below)) {
            bail!("something is mounted below {}: unmount it: {mount}", folder.display());
        }
        fs::remove_dir_all(&folder)
            .with_context(|| format!("cannot remove {}", folder.display()))?;
    }
    println!("cluster {name} is gone after {:.1} s", started.elapsed().as_secs_f64());
    Ok(())
}

fn list() -> anyhow::Result<()> {
    let place = Layout::place("any")?;
    let Some(base) = place.parent().filter(|base| base.is_dir()) else { return Ok(()) };
    for entry in fs::read_dir(base)? {
        let folder = entry?.path();
        let layout = Layout::load(&folder)?;
        let runs = Machine::ControlPlane.init(&layout)?.is_some();
        let state = if runs { "up" } else { "not running" };
        println!("{}  {} nodes  {state}  {}", layout.name, layout.nodes, folder.display());
    }
    Ok(())
}

fn load(layout: &Layout, archive: &Path) -> anyhow::Result<()> {
    let import = |number: u8| -> anyhow::Result<()> {
        let file =
            File::open(archive).with_context(|| format!("cannot open {}", archive.display()))?;
        let mut ctr = inside(layout, Some(number))?;
        ctr.args(["ctr", "-a", node::CONTAINERD, "-n", "k8s.io", "images", "import", "-"]);
        let output = ctr.stdin(file).stdout(Stdio::null()).output().context("cannot start ctr")?;
        if !output.status.success() {
            let complaint = String::from_utf8_lossy(&output.stderr).trim().to_owned();
            bail!("node{number} refuses {}: {complaint}", archive.display());
        }
        Ok(())
    };
    thread::scope(|scope| {
        let imports: Vec<_> =
            (1..=layout.nodes).map(|number| scope.spawn(move || import(number))).collect();
        for import in imports {
            import.join().unwrap_or_else(|_| Err(anyhow!("loading an image panicked")))?;
        }
        Ok(())
    })
}

/// The start of a command in the namespaces of a node, or in the control plane's network.
fn inside(layout: &Layout, node: Option<u8>) -> anyhow::Result<Command> {
    let machine = match node {
        None => Machine::ControlPlane,
        Some(number) => checked(layout, number)?,
    };
    let Some(init) = machine.init(layout)? else {
        bail!("{} of cluster {} does not run", machine.name(), layout.name);
    };
    let mut nsenter = command("nsenter", &["-t", &init.to_string(), "-n"]);
    if node.is_some() {
        nsenter.args(["-m", "-p", "-u", "-i"]);
    }
    // kubectl takes relative paths: stay where the caller is.
    nsenter.current_dir(std::env::current_dir().unwrap_or_else(|_| root()));
    nsenter.env("KUBECONFIG", layout.kubeconfig());
    if let Ok(path) = fs::read_to_string(layout.folder.join("path")) {
        nsenter.env("PATH", path);
    }
    nsenter.arg("--");
    Ok(nsenter)
}

/// Becomes the command: its input, output, signals and exit code are the caller's.
fn pass_on(command: &mut Command) -> anyhow::Result<()> {
    use std::os::unix::process::CommandExt as _;
    Err(command.exec()).context("cannot start nsenter (package util-linux)")
}
