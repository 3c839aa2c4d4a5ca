//! The verbs that build and run something.

use std::time::Instant;

use anyhow::{Context as _, bail};

use crate::command::{command, root, run};
use crate::{cluster, kernels, setup, tidy};

/// Programs that the lab starts; built before anything that uses it.
const PROGRAMS: &[&str] = &[
    "culvert-agent",
    "culvert-cni",
    "mesh-controller",
    "culvert-waypoint",
    "culvert",
    "mesh-netns",
];

pub(crate) fn ebpf() -> anyhow::Result<()> {
    setup::ensure()?;
    run(&mut command("cargo", &["build", "--package", "mesh-ebpf"]))
}

pub(crate) fn demo(keep: bool, stop: bool) -> anyhow::Result<()> {
    require_root("the demo makes network namespaces and loads eBPF programs")?;
    if !stop {
        setup::ensure()?;
        build_programs()?;
    }
    let program = target_dir()?.join("debug/culvert-demo");
    let mut demo = command(&program.to_string_lossy(), &[]);
    if keep {
        demo.arg("--keep");
    }
    if stop {
        demo.arg("--stop");
    }
    let status = demo.status().with_context(|| format!("cannot start {}", program.display()))?;
    if !status.success() {
        bail!("the demo failed ({status})");
    }
    Ok(())
}

pub(crate) fn test(filter: Option<&str>) -> anyhow::Result<()> {
    require_root("capture is tested with real eBPF programs in real namespaces")?;
    let started = Instant::now();
    setup::ensure()?;
    tidy::run()?;
    build_all()?;
    if filter.is_none() {
        cluster::prepare()?;
    }
    let mut tests = command("cargo", &["test", "--workspace", "--no-fail-fast"]);
    if let Some(filter) = filter {
        tests.arg(filter);
    }
    run(&mut tests)?;
    if filter.is_none() {
        kernels::run_suites(None)?;
    }
    println!("all tests passed in {} s", started.elapsed().as_secs());
    Ok(())
}

pub(crate) fn bench(arguments: &[String]) -> anyhow::Result<()> {
    require_root("the bench makes network namespaces and loads eBPF programs")?;
    setup::ensure()?;
    let mut build = command("cargo", &["build", "--release", "--bins"]);
    for program in PROGRAMS {
        build.args(["--package", program]);
    }
    run(&mut build)?;
    // The relay that is compared with must not be built for size, as half of the agent is.
    run(&mut command(
        "cargo",
        &["build", "--profile", "stock", "--bins", "--package", "mesh-bench"],
    ))?;
    let target = target_dir()?;
    let program = target.join("stock/culvert-bench");
    if let Some(("controller", more)) =
        arguments.split_first().map(|(first, more)| (first.as_str(), more))
    {
        return cluster::bench_controller(&program, &target.join("release"), more);
    }
    run(command(&program.to_string_lossy(), &["run"])
        .args(arguments)
        .env("CULVERT_BIN_DIR", target.join("release")))
}

pub(crate) fn ci() -> anyhow::Result<()> {
    setup::ensure()?;
    setup::ensure_deny()?;
    run(&mut command("cargo", &["fmt", "--all", "--check"]))?;
    run(&mut command("cargo", &["deny", "check", "bans", "licenses", "sources"]))?;
    run(&mut command(
        "cargo",
        &["clippy", "--workspace", "--all-targets", "--", "-D", "warnings"],
    ))?;
    run(command("cargo", &["doc", "--workspace", "--no-deps"]).env("RUSTDOCFLAGS", "-D warnings"))?;
    test(None)
}

/// Programs and tests of the whole workspace at once: fewer packages, or no tests, ask dependencies for other features, and
/// what is built for those is built again for the others.
pub(crate) fn build_all() -> anyhow::Result<()> {
    run(&mut command("cargo", &["build", "--workspace", "--bins", "--tests"]))
}

fn build_programs() -> anyhow::Result<()> {
    let mut build = command("cargo", &["build", "--bins"]);
    for program in PROGRAMS {
        build.args(["--package", program]);
    }
    run(&mut build)
}

pub(crate) fn target_dir() -> anyhow::Result<std::path::PathBuf> {
    let output = command("cargo", &["metadata", "--format-version", "1", "--no-deps"]).output()?;
    let metadata: serde_json::Value =
        serde_json::from_slice(&output.stdout).context("cargo metadata printed no JSON")?;
    Ok(metadata["target_directory"].as_str().map_or_else(|| root().join("target"), Into::into))
}

fn require_root(why: &str) -> anyhow::Result<()> {
    let output = command("id", &["-u"]).output().context("cannot run id")?;
    if output.stdout.trim_ascii() != b"0" {
        bail!("this needs root, because {why}: run it as root or through sudo -E");
    }
    Ok(())
}
