//! The demo itself: it comes to its end in time, and whenever it is interrupted nothing of it is left.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use libtest_mimic::{Arguments, Trial};
use mesh_netns::process::{Process, run};
use mesh_netns::wait::until;
use nix::sys::signal::Signal;

/// A prefix of its own: a demo that somebody keeps stays.
const PREFIX: &str = "t";
const LAB: &str = "tdemo";
/// What the demo promises. A machine that was busy with something else gets a second chance.
const PROMISED: Duration = Duration::from_secs(60);
/// Twenty times what it takes on an idle machine.
const WHOLE: Duration = Duration::from_secs(300);
/// From a signal to the end: one step of the demo, and taking everything down.
const ENDING: Duration = Duration::from_secs(30);

fn main() {
    let mut arguments = Arguments::from_args();
    arguments.test_threads = Some(1);
    let trial = |name: &str, trial: fn() -> anyhow::Result<()>| {
        Trial::test(name, move || trial().map_err(|error| format!("{error:#}").into()))
    };
    let trials = vec![
        trial("comes_to_its_end", comes_to_its_end),
        trial("kept_until_it_is_stopped", kept_until_it_is_stopped),
        trial("interrupted_in_a_step", || interrupted("3. curl asks", false, 1)),
        trial("interrupted_while_it_waits", || interrupted("1. Two nodes", false, 1)),
        trial("interrupted_at_last_with_keep", || interrupted("6. The agent starts", true, 1)),
        trial("interrupted_twice", || interrupted("2. Namespace shop", false, 2)),
    ];
    libtest_mimic::run(&arguments, trials).exit();
}

fn demo() -> anyhow::Result<Command> {
    let mut program = PathBuf::from(env!("CARGO_BIN_EXE_culvert-demo"));
    if let Some(folder) = std::env::var_os("CULVERT_BIN_DIR") {
        program = Path::new(&folder).join("culvert-demo");
    }
    ensure!(program.is_file(), "no demo at {}", program.display());
    let mut command = Command::new(program);
    command.env("CULVERT_LAB_PREFIX", PREFIX);
    Ok(command)
}

fn comes_to_its_end() -> anyhow::Result<()> {
    let mut took = Vec::new();
    while took.len() < 2 && took.iter().all(|took| *took > PROMISED) {
        let started = Instant::now();
        let finished = run(&mut demo()?, WHOLE)?;
        took.push(started.elapsed());
        ensure!(finished.success(), "{}{}", finished.stdout, finished.stderr);
        for step in 1..=6 {
            ensure!(finished.stdout.contains(&format!("\n{step}. ")), "no step {step}");
        }
        nothing_is_left()?;
    }
    ensure!(took.iter().any(|took| *took <= PROMISED), "not within {PROMISED:?}: {took:?}");
    Ok(())
}

/// Left running, it does what it says may be tried, until it is stopped.
fn kept_until_it_is_stopped() -> anyhow::Result<()> {
    let outcome = in_a_folder(kept_in);
    // Also after a failure: nobody else takes it down.
    let stopped = run(demo()?.arg("--stop"), ENDING)?;
    outcome?;
    ensure!(stopped.stdout.contains("the demo is gone"), "{}{}", stopped.stdout, stopped.stderr);
    nothing_is_left()
}

fn kept_in(folder: &Path) -> anyhow::Result<()> {
    let mut demo = Process::start("demo", demo()?.arg("--keep"), folder)?;
    until("the demo being left running", WHOLE, || Ok((!demo.running()).then_some(())))?;
    let (log, status) = (demo.log(), demo.stop(ENDING)?);
    ensure!(status.success(), "it ended with {status}: {log}");
    let (_steps, hints) = log.split_once("Everything keeps running. Try:\n").context("no hints")?;
    let commands: Vec<&str> = hints.lines().filter_map(|line| line.strip_prefix("  ")).collect();
    // What each of them has to say.
    let expected = [
        ("curl", "hello from web"),
        ("culvert status", "ready"),
        ("culvert connections", ""),
        ("culvert explain", "web-allow"),
        ("ls ", "AuthorizationPolicy.shop.web-allow.json"),
    ];
    ensure!(commands.len() == expected.len(), "{hints}");
    for (command, (part, answer)) in commands.into_iter().zip(expected) {
        ensure!(command.contains(part), "{command} instead of {part}");
        let done = run(Command::new("sh").args(["-c", command]), ENDING)?;
        // The intruder is refused, which `explain` ends with as well.
        let is_well = done.success() || part == "culvert explain" && done.status.code() == Some(1);
        ensure!(is_well, "{command}: {}{}{}", done.status, done.stdout, done.stderr);
        ensure!(done.stdout.contains(answer), "{command}: {}", done.stdout);
    }
    Ok(())
}

fn in_a_folder(work: impl FnOnce(&Path) -> anyhow::Result<()>) -> anyhow::Result<()> {
    let folder = std::env::temp_dir().join(format!("culvert-demo-trial-{}", std::process::id()));
    std::fs::create_dir_all(&folder)?;
    let outcome = work(&folder);
    std::fs::remove_dir_all(&folder)?;
    outcome
}

/// Interrupts the demo `times` times once it has said `at`.
fn interrupted(at: &str, keep: bool, times: usize) -> anyhow::Result<()> {
    in_a_folder(|folder| interrupted_in(folder, at, keep, times))
}

fn interrupted_in(folder: &Path, at: &str, keep: bool, times: usize) -> anyhow::Result<()> {
    let mut command = demo()?;
    if keep {
        command.arg("--keep");
    }
    let mut demo = Process::start("demo", &mut command, folder)?;
    until(at, WHOLE, || {
        ensure!(demo.log().contains(at) || demo.running(), "it ended: {}", demo.log());
        Ok(demo.log().contains(at).then_some(()))
    })?;
    for _ in 0..times {
        demo.signal(Signal::SIGINT)?;
        std::thread::sleep(Duration::from_millis(100));
    }
    until("the demo's end", ENDING, || Ok((!demo.running()).then_some(())))
        .with_context(|| demo.log_tail(20))?;
    let status = demo.stop(ENDING)?;
    ensure!(status.code() == Some(130), "it ended with {status}: {}", demo.log_tail(20));
    ensure!(!demo.log().contains("Everything keeps running"), "it was kept: {}", demo.log());
    nothing_is_left()
}

/// No namespace, no program, no pin, no file.
fn nothing_is_left() -> anyhow::Result<()> {
    for folder in ["/run/netns", "/etc/netns"] {
        for entry in std::fs::read_dir(folder).into_iter().flatten() {
            let name = entry?.file_name().to_string_lossy().into_owned();
            ensure!(!name.starts_with(&format!("{LAB}-")), "{folder}/{name} is left");
        }
    }
    let lab = std::env::temp_dir().join(format!("culvert-lab-{LAB}"));
    ensure!(!lab.exists(), "{} is left", lab.display());
    let mounts = std::fs::read_to_string("/proc/self/mounts")?;
    ensure!(!mounts.contains(&format!("culvert-lab-{LAB}/")), "pins are left: {mounts}");
    for entry in std::fs::read_dir("/proc")? {
        let folder = entry?.path();
        // One that has ended meanwhile has no command line.
        let line = std::fs::read(folder.join("cmdline")).unwrap_or_default();
        let line = String::from_utf8_lossy(&line).replace('\0', " ");
        let is_ours = line.contains(&format!("culvert-lab-{LAB}/"))
            || line.contains(&format!("/netns/{LAB}-"));
        ensure!(!is_ours, "a program is left: {line}");
    }
    Ok(())
}
