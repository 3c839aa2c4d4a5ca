//! Programs of the lab: started in a namespace, logged to a file, ended with their lab.

use std::ffi::OsStr;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use nix::sys::signal::{Signal, kill, killpg};
use nix::unistd::Pid;

/// A command that runs `program` in the named network namespace, or where we are when it is `None`.
///
/// Unlike `ip netns exec` the mounts stay, so cgroup and bpf file systems are seen.
#[must_use]
pub fn in_namespace(namespace: Option<&str>, program: impl AsRef<OsStr>) -> Command {
    namespace.map_or_else(
        || Command::new(program.as_ref()),
        |name| {
            let mut command = Command::new("nsenter");
            command.arg(format!("--net=/run/netns/{name}")).arg("--").arg(program.as_ref());
            command
        },
    )
}

/// What a program that ended left behind.
#[derive(Clone, Debug)]
pub struct Finished {
    /// How it ended.
    pub status: ExitStatus,
    /// What it wrote to standard output.
    pub stdout: String,
    /// What it wrote to standard error.
    pub stderr: String,
}

impl Finished {
    /// True when it ended with 0.
    #[must_use]
    pub fn success(&self) -> bool {
        self.status.success()
    }

    /// Standard output of a program that must have succeeded.
    ///
    /// # Errors
    /// When it did not; the error carries what it wrote.
    pub fn output(self) -> anyhow::Result<String> {
        if !self.status.success() {
            bail!("{}: {}{}", self.status, self.stdout, self.stderr);
        }
        Ok(self.stdout)
    }
}

/// Runs `command` to its end, at most `limit` long.
///
/// # Errors
/// When it cannot start or does not end in time (it is killed then).
pub fn run(command: &mut Command, limit: Duration) -> anyhow::Result<Finished> {
    use std::os::unix::process::CommandExt as _;
    let shown = format!("{command:?}");
    let child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        // A terminal's Ctrl-C is for us: half-made links are worse than a step more.
        .process_group(0)
        .spawn()
        .with_context(|| format!("cannot start {shown}"))?;
    let pid = Pid::from_raw(i32::try_from(child.id())?);
    let (sender, receiver) = std::sync::mpsc::channel();
    std::thread::spawn(move || sender.send(child.wait_with_output()));
    match receiver.recv_timeout(limit) {
        Ok(output) => {
            let output = output.with_context(|| format!("waiting for {shown}"))?;
            Ok(Finished {
                status: output.status,
                stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
                stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
            })
        }
        Err(_timeout) => {
            kill(pid, Signal::SIGKILL).with_context(|| format!("killing {shown}"))?;
            bail!("not done after {limit:?}: {shown}");
        }
    }
}

/// A program that runs until it is told to end.
#[derive(Debug)]
pub struct Process {
    name: String,
    child: Child,
    log: PathBuf,
}

impl Process {
    /// Starts `command` in a process group of its own, its output appended to `<folder>/<name>.log`.
    ///
    /// # Errors
    /// When the log cannot be opened or the program not be started.
    pub fn start(name: &str, command: &mut Command, folder: &Path) -> anyhow::Result<Self> {
        use std::os::unix::process::CommandExt as _;
        let log = folder.join(format!("{name}.log"));
        let open = || -> anyhow::Result<File> {
            File::options()
                .create(true)
                .append(true)
                .open(&log)
                .with_context(|| format!("opening {}", log.display()))
        };
        let child = command
            .stdin(Stdio::null())
            .stdout(open()?)
            .stderr(open()?)
            .process_group(0)
            .spawn()
            .with_context(|| format!("cannot start {command:?}"))?;
        Ok(Self { name: name.to_owned(), child, log })
    }

    /// Its process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Its resident memory. KiB.
    ///
    /// # Errors
    /// When it has ended.
    pub fn rss_kib(&self) -> anyhow::Result<u64> {
        rss_kib(self.pid())
    }

    /// Everything it has written so far.
    #[must_use]
    pub fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_else(|error| format!("(no log: {error})"))
    }

    /// The last `lines` lines it has written.
    #[must_use]
    pub fn log_tail(&self, lines: usize) -> String {
        let log = self.log();
        let all: Vec<&str> = log.lines().collect();
        all[all.len().saturating_sub(lines)..].join("\n")
    }

    /// True while it runs.
    pub fn running(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// Sends `signal` to the process itself.
    ///
    /// # Errors
    /// When there is no such process.
    pub fn signal(&self, signal: Signal) -> anyhow::Result<()> {
        kill(Pid::from_raw(i32::try_from(self.child.id())?), signal)
            .with_context(|| format!("sending {signal} to {}", self.name))
    }

    /// Asks it to end and waits at most `limit`; after that it is killed and the call fails.
    ///
    /// # Errors
    /// When it had to be killed.
    pub fn stop(&mut self, limit: Duration) -> anyhow::Result<ExitStatus> {
        if self.running() {
            self.signal(Signal::SIGTERM)?;
        }
        let started = Instant::now();
        while started.elapsed() < limit {
            if let Some(status) = self.child.try_wait()? {
                return Ok(status);
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        self.kill();
        bail!("{} did not end within {limit:?} of SIGTERM:\n{}", self.name, self.log_tail(20));
    }

    /// Kills it and all of its process group, as `kill -9` does, and waits until it is gone.
    pub fn kill(&mut self) {
        if let Ok(pid) = i32::try_from(self.child.id())
            && let Err(error) = killpg(Pid::from_raw(pid), Signal::SIGKILL)
            && error != nix::errno::Errno::ESRCH
        {
            eprintln!("killing {}: {error}", self.name);
        }
        if let Err(error) = self.child.wait() {
            eprintln!("waiting for {}: {error}", self.name);
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Resident memory of a process. KiB.
///
/// # Errors
/// When there is no such process.
pub fn rss_kib(pid: u32) -> anyhow::Result<u64> {
    let path = format!("/proc/{pid}/status");
    let status = std::fs::read_to_string(&path).with_context(|| format!("reading {path}"))?;
    let line = status.lines().find(|line| line.starts_with("VmRSS:"));
    line.and_then(|line| line.split_whitespace().nth(1)?.parse().ok())
        .with_context(|| format!("{path} has no VmRSS"))
}
