//! A guest: one QEMU process, and what its console says.

use std::fmt;
use std::fs::File;
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::Context as _;

use super::package::{Files, cache};
use super::{Kernel, image};

/// How long a guest may run. On two cores both take about a third of it.
const LIMIT_SECONDS: u16 = 900;

/// Lines of the console that are shown when a guest ends early.
const LAST_LINES: usize = 40;

/// What a guest does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Job {
    /// The capture suite.
    Suite,
    /// A node with enrolled pods loses its power and comes back.
    Reboot,
}

impl Job {
    /// Its script, without extension.
    fn name(self) -> &'static str {
        match self {
            Self::Suite => "suite",
            Self::Reboot => "reboot",
        }
    }

    /// How often the machine is switched on. It ends itself each time.
    fn boots(self) -> usize {
        match self {
            Self::Suite => 1,
            Self::Reboot => 2,
        }
    }
}

/// How a test went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    /// It passed.
    Passed,
    /// It failed, took too long, or the kernel complained while it ran.
    Failed,
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Passed => "ok",
            Self::Failed => "FAILED",
        })
    }
}

/// One test in one guest.
#[derive(Debug)]
pub(super) struct Test {
    /// Its path.
    pub(super) name: String,
    /// How it went.
    pub(super) outcome: Outcome,
    /// How long it took by the guest's clock.
    pub(super) took: Duration,
    /// What it and the kernel said, if it failed.
    output: Vec<String>,
}

/// What came of a guest.
#[derive(Debug)]
pub(super) struct Report {
    /// The kernel's series.
    pub(super) kernel: &'static str,
    /// Tests in the order they ran.
    pub(super) tests: Vec<Test>,
    version: String,
    job: Job,
    /// Boots that reached their end.
    finished: usize,
    /// What the console said since the last test.
    rest: Vec<String>,
    console: PathBuf,
    took: Duration,
}

impl Report {
    /// Every boot reached its end.
    fn finished(&self) -> bool {
        self.finished == self.job.boots()
    }

    /// Every test ran and passed.
    pub(super) fn passed(&self) -> bool {
        self.finished()
            && !self.tests.is_empty()
            && self.tests.iter().all(|test| test.outcome == Outcome::Passed)
    }

    /// What it was.
    pub(super) fn title(&self) -> String {
        format!("{} on Linux {}", self.job.name(), self.version)
    }

    /// One line on how it went.
    pub(super) fn summary(&self) -> String {
        let passed = self.tests.iter().filter(|test| test.outcome == Outcome::Passed).count();
        let end = if self.finished() { "" } else { ", ended before its end" };
        format!(
            "{}: {passed} of {} passed{end}, {} s; console: {}",
            self.title(),
            self.tests.len(),
            self.took.as_secs(),
            self.console.display()
        )
    }

    /// Prints what failed tests said, and the console's end where the guest did not reach its own.
    pub(super) fn print_failures(&self) {
        for test in self.tests.iter().filter(|test| test.outcome == Outcome::Failed) {
            println!("\n── {} on Linux {}", test.name, self.kernel);
            for line in &test.output {
                println!("   {line}");
            }
        }
        if !self.finished() {
            println!("\n── Linux {} ended early; its console at the end", self.kernel);
            for line in self.rest.iter().rev().take(LAST_LINES).rev() {
                println!("   {line}");
            }
        }
    }

    /// Takes in one line of the console; a finished test is returned.
    fn read(&mut self, line: &str) -> Option<&Test> {
        if line == "@done" {
            self.finished += 1;
        } else if let Some(mut test) = line.strip_prefix("@test ").and_then(parse_test) {
            let said = std::mem::take(&mut self.rest);
            if test.outcome == Outcome::Failed {
                test.output = said;
            }
            self.tests.push(test);
            return self.tests.last();
        } else {
            self.rest.push(line.to_owned());
        }
        None
    }
}

/// `OUTCOME STARTED ENDED NAME`
fn parse_test(line: &str) -> Option<Test> {
    let mut words = line.split_whitespace();
    let outcome = if words.next()? == "ok" { Outcome::Passed } else { Outcome::Failed };
    let (started, ended): (f32, f32) = (words.next()?.parse().ok()?, words.next()?.parse().ok()?);
    let took = Duration::try_from_secs_f32(ended - started).ok()?;
    Some(Test { name: words.next()?.to_owned(), outcome, took, output: Vec::new() })
}

/// Boots a kernel for a job, as often as the job wants, and reads its console to the end.
pub(super) fn run(
    kernel: &Kernel,
    files: &Files,
    image: &Path,
    job: Job,
) -> anyhow::Result<Report> {
    let started = Instant::now();
    let console = cache(kernel).join(format!("{}.log", job.name()));
    let mut kept = File::create(&console).context("keeping the console")?;
    let disk = match job {
        Job::Suite => None,
        Job::Reboot => Some(image::make_disk(kernel)?),
    };
    let mut report = Report {
        kernel: kernel.name,
        tests: Vec::new(),
        version: files.version.clone(),
        job,
        finished: 0,
        rest: Vec::new(),
        console,
        took: Duration::ZERO,
    };
    for _ in 0..job.boots() {
        let mut qemu = machine(kernel, files, image, job);
        if let Some(disk) = &disk {
            qemu.arg("-drive").arg(format!("file={},format=raw,if=virtio", disk.display()));
        }
        boot(&mut qemu, &mut report, &mut kept)?;
    }
    report.took = started.elapsed();
    Ok(report)
}

/// The machine, without disks.
fn machine(kernel: &Kernel, files: &Files, image: &Path, job: Job) -> Command {
    let mut qemu = Command::new("timeout");
    qemu.arg(LIMIT_SECONDS.to_string())
        // Without cmpxchg16b: QEMU 7.2 takes the flags that it leaves alone from a stale register,
        // and the kernel's allocator (which has a way round it) then double-faults.
        .args(["qemu-system-x86_64", "-accel", "tcg", "-smp", "1", "-m", "1536"])
        .args(["-cpu", "max,-cx16", "-no-reboot"])
        .args(["-nographic", "-nodefaults", "-serial", "stdio", "-append"])
        .arg(format!(
            "console=ttyS0 panic=-1 quiet loglevel=3 culvert.job={} culvert.guard={}",
            job.name(),
            kernel.guard
        ))
        .arg("-kernel")
        .arg(&files.vmlinuz)
        .arg("-initrd")
        .arg(image);
    qemu
}

/// Runs the machine until it ends, and reads its console, which goes to a file too.
fn boot(qemu: &mut Command, report: &mut Report, kept: &mut File) -> anyhow::Result<()> {
    let qemu = qemu.stdin(Stdio::null()).stdout(Stdio::piped());
    let mut qemu = qemu.spawn().context("starting QEMU")?;
    let mut output = BufReader::new(qemu.stdout.take().context("QEMU has no console")?);
    let mut line = Vec::new();
    while output.read_until(b'\n', &mut line).context("reading the console")? > 0 {
        kept.write_all(&line).context("keeping the console")?;
        let kernel = report.kernel;
        if let Some(test) = report.read(String::from_utf8_lossy(&line).trim_end()) {
            println!(
                "   {kernel:5} {:7} {:5.1} s  {}",
                test.outcome.to_string(),
                test.took.as_secs_f32(),
                test.name
            );
        }
        line.clear();
    }
    qemu.wait().context("waiting for QEMU")?;
    Ok(())
}
