//! A machine of the cluster: a process that is the first of its own namespaces.
//!
//! It is started in three steps by this same program: `launch` makes the control groups, `enter`
//! moves itself into them and becomes `unshare`, whose child is `boot`, process 1 of the machine.

use std::fs::{self, File};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, bail};

use super::cgroup::Groups;
use super::layout::Layout;
use super::{control_plane, node};

/// Which machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Machine {
    /// etcd, API server, controller manager, scheduler, and the bridge between the nodes.
    ControlPlane,
    /// kubelet, containerd and kube-proxy.
    Node(u8),
}

impl Machine {
    /// `control-plane`, `node1`, …
    pub(super) fn name(self) -> String {
        match self {
            Self::ControlPlane => "control-plane".to_owned(),
            Self::Node(number) => format!("node{number}"),
        }
    }

    fn parse(name: &str) -> anyhow::Result<Self> {
        let number = || name.strip_prefix("node")?.parse().ok();
        match name {
            "control-plane" => Ok(Self::ControlPlane),
            _ => Ok(Self::Node(number().with_context(|| format!("no machine {name}"))?)),
        }
    }

    /// Starts the machine; its first words go to `log/<machine>.log`.
    pub(super) fn launch(self, layout: &Layout, path: &str) -> anyhow::Result<()> {
        let name = self.name();
        Groups::of(&layout.name)?.create(&name)?;
        let record = self.record(layout);
        if record.exists() {
            fs::remove_file(&record)?;
        }
        let log = File::options().create(true).append(true).open(self.log(layout))?;
        let mut enter = Command::new("setsid");
        enter.arg(own_program()?).args(["cluster", "machine", "enter", &name]);
        enter.arg(&layout.folder).env("PATH", path).stdin(Stdio::null());
        enter.stdout(log.try_clone()?).stderr(log).current_dir("/");
        enter.spawn().with_context(|| format!("cannot start {name}"))?;
        Ok(())
    }

    /// The machine's process 1, as this namespace sees it; `None` before it runs and after it ended.
    pub(super) fn init(self, layout: &Layout) -> anyhow::Result<Option<u32>> {
        let Ok(record) = fs::read_to_string(self.record(layout)) else { return Ok(None) };
        let Some((process, born)) = record.trim().split_once(' ') else { return Ok(None) };
        let process: u32 = process.parse().context("a damaged record of a machine's process")?;
        Ok((birth(&format!("/proc/{process}/stat")).as_deref() == Some(born)).then_some(process))
    }

    /// Fails, with the machine's last words, when it has ended.
    pub(super) fn check(self, layout: &Layout) -> anyhow::Result<()> {
        let log = fs::read_to_string(self.log(layout)).unwrap_or_default();
        if self.record(layout).exists() && self.init(layout)?.is_none() {
            bail!("{} ended: {}", self.name(), tail(&log));
        }
        // It fails before it has a record when it cannot even enter its groups or namespaces.
        if !self.record(layout).exists() && !log.trim().is_empty() {
            bail!("{} did not start: {}", self.name(), tail(&log));
        }
        Ok(())
    }

    fn log(self, layout: &Layout) -> PathBuf {
        layout.logs().join(format!("{}.log", self.name()))
    }

    fn record(self, layout: &Layout) -> PathBuf {
        layout.folder.join(format!("{}.init", self.name()))
    }
}

/// Second step: into the control groups, then become the parent of the machine's namespaces.
pub(super) fn enter(machine: &str, folder: &Path) -> anyhow::Result<()> {
    let layout = Layout::load(folder)?;
    Groups::of(&layout.name)?.enter(machine, std::process::id())?;
    let mut unshare = Command::new("unshare");
    // The namespace of control groups comes from where the process sits when it is made.
    unshare.args(["--net", "--mount", "--pid", "--uts", "--ipc", "--cgroup"]);
    unshare.args(["--fork", "--kill-child"]).arg(own_program()?);
    unshare.args(["cluster", "machine", "boot", machine]).arg(folder);
    Err(unshare.exec()).context("cannot start unshare (package util-linux)")
}

/// Last step: process 1 of the machine. Comes back only with an error.
pub(super) fn boot(name: &str, folder: &Path) -> anyhow::Result<()> {
    let layout = Layout::load(folder)?;
    let machine = Machine::parse(name)?;
    // The old /proc still shows the process as those see it who started the machine.
    let process = fs::read_link("/proc/self").context("cannot find the own process")?;
    let born = birth("/proc/self/stat").context("cannot read the own process")?;
    let record = machine.record(&layout);
    let fresh = record.with_extension("new");
    fs::write(&fresh, format!("{} {born}\n", process.display()))?;
    fs::rename(&fresh, &record)?;
    nix::unistd::sethostname(name).context("cannot set the machine's name")?;
    match machine {
        Machine::ControlPlane => control_plane::boot(&layout),
        Machine::Node(number) => node::boot(&layout, number),
    }
}

fn own_program() -> anyhow::Result<PathBuf> {
    std::env::current_exe().context("cannot find the own program")
}

/// When a process was started, in the kernel's own units: with it a process id is never mistaken.
fn birth(stat: &str) -> Option<String> {
    let stat = fs::read_to_string(stat).ok()?;
    // The second field is the name in brackets, which may hold anything; this is the twenty-second.
    let (_, after) = stat.rsplit_once(')')?;
    after.split_whitespace().nth(19).map(str::to_owned)
}

/// The end of a log, in one line.
pub(super) fn tail(log: &str) -> String {
    let lines: Vec<&str> = log.lines().filter(|line| !line.trim().is_empty()).collect();
    lines[lines.len().saturating_sub(5)..].join(" | ")
}
