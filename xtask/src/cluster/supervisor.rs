//! The first process of a machine: starts programs, starts them again when they end, reaps orphans.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use nix::errno::Errno;
use nix::sys::wait::{WaitStatus, wait};

/// Pause before a program that has ended is started again.
const RESTART_PAUSE: Duration = Duration::from_millis(300);

/// The programs of this machine.
#[derive(Debug)]
pub(super) struct Supervisor {
    logs: PathBuf,
    machine: String,
    running: BTreeMap<i32, Service>,
}

#[derive(Debug)]
struct Service {
    name: &'static str,
    command: Command,
}

impl Supervisor {
    /// Logs go to `<logs>/<machine>-<program>.log`.
    pub(super) const fn new(logs: PathBuf, machine: String) -> Self {
        Self { logs, machine, running: BTreeMap::new() }
    }

    /// Starts a program, to be kept running from [`run`](Self::run) on.
    pub(super) fn start(&mut self, name: &'static str, mut command: Command) -> anyhow::Result<()> {
        let path = self.logs.join(format!("{}-{name}.log", self.machine));
        let log = File::options()
            .create(true)
            .append(true)
            .open(&path)
            .with_context(|| format!("cannot open {}", path.display()))?;
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log).current_dir("/");
        self.launch(Service { name, command })
    }

    fn launch(&mut self, mut service: Service) -> anyhow::Result<()> {
        let child =
            service.command.spawn().with_context(|| format!("cannot start {}", service.name))?;
        self.running.insert(i32::try_from(child.id())?, service);
        Ok(())
    }

    /// Keeps everything running until the machine is ended from outside.
    pub(super) fn run(mut self) -> anyhow::Result<()> {
        loop {
            let ended = match wait() {
                Ok(WaitStatus::Exited(process, _) | WaitStatus::Signaled(process, _, _)) => process,
                Ok(_) | Err(Errno::EINTR) => continue,
                Err(fault) => return Err(fault).context("nothing is left to wait for"),
            };
            // Everything else is an orphan of some program, reaped by having been waited for.
            if let Some(service) = self.running.remove(&ended.as_raw()) {
                thread::sleep(RESTART_PAUSE);
                self.launch(service)?;
            }
        }
    }
}

/// Asks `ready` again and again; fails after `patience` and names `what` was waited for.
pub(super) fn wait_until(
    what: &str,
    patience: Duration,
    mut ready: impl FnMut() -> anyhow::Result<bool>,
) -> anyhow::Result<()> {
    let deadline = Instant::now() + patience;
    while !ready()? {
        if Instant::now() > deadline {
            bail!("waited {} s in vain for {what}", patience.as_secs());
        }
        thread::sleep(Duration::from_millis(50));
    }
    Ok(())
}
