//! Coverage-guided fuzzing: libFuzzer over the targets of `tests/fuzz-targets`, with the pinned stable compiler.
//!
//! The coverage instrumentation is LLVM's own pass, which stable rustc runs on request; a nightly compiler or cargo-fuzz is
//! not needed. Memory is not watched by a sanitizer: the parsers are `forbid(unsafe_code)`.

use std::collections::VecDeque;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Mutex;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};

use crate::command::{command, root, run};
use crate::setup;

/// What makes every branch and comparison visible to libFuzzer.
const RUSTFLAGS: &str = "--cfg fuzzing -Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
    -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
    -Cllvm-args=-sanitizer-coverage-trace-compares";

/// Longest input, bytes. What parsers do with more they do with this much.
const MAX_INPUT_BYTES: usize = 4096;

/// What to do.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Only this target; the folders of tests/fuzz/corpus name them.
    #[arg(long)]
    target: Option<String>,
    /// Executions of each target.
    #[arg(long, default_value_t = 1_000_000)]
    executions: u64,
    /// Targets run at once; default: one per processor.
    #[arg(long)]
    jobs: Option<usize>,
    /// Where to build, and where grown corpora and logs stay; default: target/fuzz.
    #[arg(long)]
    build_dir: Option<PathBuf>,
}

/// How one target went.
struct Outcome {
    target: String,
    executions: Option<u64>,
    edges: Option<u64>,
    /// The inputs it failed on, where they were saved.
    crashes: Vec<PathBuf>,
    /// It ended well, as libFuzzer says.
    passed: bool,
    log: PathBuf,
    took: Duration,
}

pub(crate) fn fuzz(options: &Options) -> anyhow::Result<()> {
    ensure_compiler()?;
    let targets = targets(options.target.as_deref())?;
    let folder = options.build_dir.clone().unwrap_or_else(|| root().join("target/fuzz"));
    let program = build(&folder)?;
    println!("→ {} targets, {} executions each", targets.len(), options.executions);
    let processors = || thread::available_parallelism().map_or(1, usize::from);
    let jobs = options.jobs.unwrap_or_else(processors);
    let queue = Mutex::new(targets.into_iter().collect::<VecDeque<_>>());
    let next = || queue.lock().map_or(None, |mut queue| queue.pop_front());
    let outcomes = thread::scope(|scope| {
        let work = || -> anyhow::Result<Vec<Outcome>> {
            let mut outcomes = Vec::new();
            while let Some(target) = next() {
                let outcome = run_target(&program, &folder, target, options.executions)?;
                print(&outcome);
                outcomes.push(outcome);
            }
            Ok(outcomes)
        };
        let workers: Vec<_> = (0..jobs.max(1)).map(|_| scope.spawn(work)).collect();
        let mut outcomes = Vec::new();
        for worker in workers {
            match worker.join() {
                Ok(done) => outcomes.extend(done?),
                Err(_panic) => bail!("a worker panicked"),
            }
        }
        Ok(outcomes)
    })?;
    let executions: u64 = outcomes.iter().filter_map(|outcome| outcome.executions).sum();
    let crashes: usize = outcomes.iter().map(|outcome| outcome.crashes.len()).sum();
    println!("{} targets, {executions} executions, {crashes} crashes", outcomes.len());
    let failed: Vec<_> = outcomes.iter().filter(|outcome| !outcome.passed).collect();
    for outcome in &failed {
        println!("{}: see {}", outcome.target, outcome.log.display());
        for crash in &outcome.crashes {
            println!("  saved as {}; repair it and commit the input", crash.display());
        }
    }
    if !failed.is_empty() {
        bail!("{} targets failed", failed.len());
    }
    Ok(())
}

fn print(outcome: &Outcome) {
    let number = |number: Option<u64>| number.map_or_else(|| "?".to_owned(), |n| n.to_string());
    println!(
        "{:<20} {:>9} executions {:>6} edges {:>2} crashes {:>5} s{}",
        outcome.target,
        number(outcome.executions),
        number(outcome.edges),
        outcome.crashes.len(),
        outcome.took.as_secs(),
        if outcome.passed { "" } else { "  FAILED" }
    );
}

/// libFuzzer is C++; it is built with the fuzzing program.
fn ensure_compiler() -> anyhow::Result<()> {
    setup::ensure()?;
    if Path::new("/usr/bin/c++").exists() {
        return Ok(());
    }
    println!("installing g++ (libFuzzer is built with it)");
    let arguments = ["install", "-y", "--no-install-recommends", "g++"];
    run(command("apt-get", &arguments).env("DEBIAN_FRONTEND", "noninteractive"))
}

fn corpus() -> PathBuf {
    root().join("tests/fuzz/corpus")
}

/// The targets, which are the folders of the corpus: a test of `mesh-fuzz` holds both equal.
fn targets(only: Option<&str>) -> anyhow::Result<Vec<String>> {
    let mut targets = Vec::new();
    for folder in fs::read_dir(corpus()).context("cannot read the corpus")? {
        targets.push(folder?.file_name().to_string_lossy().into_owned());
    }
    targets.sort();
    let Some(only) = only else { return Ok(targets) };
    if !targets.iter().any(|target| target == only) {
        bail!("no target {only}: there are {}", targets.join(", "));
    }
    Ok(vec![only.to_owned()])
}

fn build(folder: &Path) -> anyhow::Result<PathBuf> {
    let host = host()?;
    let manifest = root().join("tests/fuzz/Cargo.toml");
    let mut build = command("cargo", &["build", "--release", "--target", &host]);
    build.arg("--manifest-path").arg(&manifest);
    // Named for a target, so that build scripts and macros are not instrumented.
    build.env("RUSTFLAGS", RUSTFLAGS).env("CARGO_TARGET_DIR", folder);
    run(&mut build)?;
    Ok(folder.join(host).join("release/culvert-fuzz"))
}

fn host() -> anyhow::Result<String> {
    let output = command("rustc", &["-vV"]).output().context("cannot run rustc")?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let host = text.lines().find_map(|line| line.strip_prefix("host: "));
    host.map(str::to_owned).context("rustc names no host")
}

fn run_target(
    program: &Path,
    folder: &Path,
    target: String,
    executions: u64,
) -> anyhow::Result<Outcome> {
    let started = Instant::now();
    let grown = folder.join("corpus").join(&target);
    let artifacts = folder.join("artifacts").join(&target);
    let log = folder.join("logs").join(format!("{target}.log"));
    for needed in [grown.as_path(), artifacts.as_path(), &folder.join("logs")] {
        fs::create_dir_all(needed)
            .with_context(|| format!("cannot create {}", needed.display()))?;
    }
    let mut fuzzer = command(&program.to_string_lossy(), &["-print_final_stats=1", "-timeout=20"]);
    fuzzer
        .arg(format!("-runs={executions}"))
        .arg(format!("-max_len={MAX_INPUT_BYTES}"))
        .arg(format!("-artifact_prefix={}/", artifacts.display()))
        .args([&grown, &corpus().join(&target)])
        .env("CULVERT_FUZZ_TARGET", &target)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(fs::File::create(&log)?);
    let status = fuzzer.status().with_context(|| format!("cannot start {}", program.display()))?;
    let said = fs::read_to_string(&log).unwrap_or_default();
    if !said.contains("inline 8-bit counters") {
        bail!("{target} was built without coverage, see {}", log.display());
    }
    Ok(Outcome {
        crashes: save_crashes(&artifacts, &target)?,
        executions: number_behind(&said, "stat::number_of_executed_units:"),
        edges: number_behind(&said, " cov:"),
        passed: status.success(),
        target,
        log,
        took: started.elapsed(),
    })
}

/// Moves what libFuzzer failed on into the corpus, where the smoke test replays it for ever.
fn save_crashes(artifacts: &Path, target: &str) -> anyhow::Result<Vec<PathBuf>> {
    let mut saved = Vec::new();
    for artifact in fs::read_dir(artifacts)? {
        let artifact = artifact?;
        let place = corpus().join(target).join(artifact.file_name());
        fs::copy(artifact.path(), &place)?;
        fs::remove_file(artifact.path())?;
        saved.push(place);
    }
    saved.sort();
    Ok(saved)
}

/// The number behind the last `label`.
fn number_behind(text: &str, label: &str) -> Option<u64> {
    let (_, behind) = text.rsplit_once(label)?;
    behind.split_whitespace().next()?.parse().ok()
}
