//! Other kernels: Debian's stock 6.1 and 6.12 in QEMU, without KVM, with the capture suite inside,
//! and with a node whose power fails.

mod guest;
mod image;
mod package;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::Stdio;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{anyhow, bail};

use crate::command::command;
use crate::run::{build_all, target_dir};
use guest::{Job, Outcome, Report};
use image::Built;

/// A kernel to test on.
pub(crate) struct Kernel {
    /// Its series.
    name: &'static str,
    /// Where Debian keeps it.
    suite: &'static str,
    /// What its package is called; a regular expression of apt's.
    pattern: &'static str,
    /// How the guard is attached on it. The suite fails where it finds another way.
    guard: &'static str,
}

const KERNELS: &[Kernel] = &[
    Kernel {
        name: "6.1",
        suite: "bookworm",
        pattern: r"^linux-image-6\.1\.[0-9.-]*-cloud-amd64$",
        guard: "clsact",
    },
    Kernel {
        name: "6.12",
        suite: "bookworm-backports",
        pattern: r"^linux-image-6\.12\.[0-9.+a-z]*-cloud-amd64$",
        guard: "tcx",
    },
];

/// Runs the capture suite in every kernel at once, or in the one called `filter`, and prints a table.
pub(crate) fn run_suites(filter: Option<&str>) -> anyhow::Result<()> {
    let kernels: Vec<&Kernel> =
        KERNELS.iter().filter(|kernel| filter.is_none_or(|name| kernel.name == name)).collect();
    if kernels.is_empty() {
        let known: Vec<_> = KERNELS.iter().map(|kernel| kernel.name).collect();
        bail!("no kernel {}: there are {}", filter.unwrap_or_default(), known.join(" and "));
    }
    let (programs, plugin) = programs()?;
    let built = Built { suites: test_programs("mesh-ebpf")?, programs, plugin };
    let mut guests = Vec::new();
    for kernel in kernels {
        let files = package::fetch(kernel)?;
        let image = image::make(kernel, &files, &built)?;
        println!(
            "→ the capture suite, and a reboot with enrolled pods, on Linux {}",
            files.version
        );
        guests.push((kernel, files, image));
    }
    // One guest per kernel at a time: each keeps a core busy.
    let reports = thread::scope(|scope| {
        let running: Vec<_> = guests
            .iter()
            .map(|(kernel, files, image)| {
                scope.spawn(|| {
                    [Job::Suite, Job::Reboot]
                        .into_iter()
                        .map(|job| guest::run(kernel, files, image, job))
                        .collect::<anyhow::Result<Vec<Report>>>()
                })
            })
            .collect();
        running
            .into_iter()
            .map(|guest| {
                guest.join().unwrap_or_else(|_| Err(anyhow!("reading a guest's console panicked")))
            })
            .collect::<anyhow::Result<Vec<Vec<Report>>>>()
    })?;
    let reports: Vec<Report> = reports.into_iter().flatten().collect();
    for report in &reports {
        report.print_failures();
    }
    print_table(&reports);
    let failed: Vec<_> =
        reports.iter().filter(|report| !report.passed()).map(Report::title).collect();
    if !failed.is_empty() {
        bail!("failed: {}", failed.join(", "));
    }
    Ok(())
}

/// Builds agent, controller and command line, and the agent's CNI plugin beside them.
fn programs() -> anyhow::Result<(Vec<PathBuf>, PathBuf)> {
    build_all()?;
    let folder = target_dir()?.join("debug");
    let programs = ["culvert-agent", "culvert-controller", "culvert"].map(|name| folder.join(name));
    Ok((programs.into(), folder.join("culvert-cni")))
}

/// The test programs cargo builds for a package.
fn test_programs(package: &str) -> anyhow::Result<Vec<PathBuf>> {
    let started = Instant::now();
    // All of the workspace, for the reason that `build_all` gives.
    let arguments = ["test", "--workspace", "--tests", "--no-run", "--message-format=json"];
    println!("→ cargo {}", arguments.join(" "));
    let output = command("cargo", &arguments).stderr(Stdio::inherit()).output()?;
    if !output.status.success() {
        bail!("building the tests of {package} failed");
    }
    let mut programs = Vec::new();
    for line in String::from_utf8(output.stdout)?.lines() {
        let message: serde_json::Value = serde_json::from_str(line)?;
        let id = message["package_id"].as_str().unwrap_or_default();
        // Cargo leaves the name out where the folder has it.
        let ours = id.contains(&format!("#{package}@")) || id.contains(&format!("/{package}#"));
        let integration = message["target"]["kind"][0].as_str() == Some("test");
        if let (true, Some(path)) = (ours && integration, message["executable"].as_str()) {
            programs.push(PathBuf::from(path));
        }
    }
    if programs.is_empty() {
        bail!("{package} has no test programs");
    }
    println!("   built in {} s", started.elapsed().as_secs());
    Ok(programs)
}

/// One row per test, one column per kernel.
fn print_table(reports: &[Report]) {
    let mut columns: Vec<&str> = reports.iter().map(|report| report.kernel).collect();
    columns.dedup();
    let mut rows: BTreeMap<&str, BTreeMap<&str, (Outcome, Duration)>> = BTreeMap::new();
    for report in reports {
        for test in &report.tests {
            let row = rows.entry(&test.name).or_default();
            row.insert(report.kernel, (test.outcome, test.took));
        }
    }
    let width = rows.keys().map(|name| name.len()).max().unwrap_or(0);
    print!("\n{:width$}", "");
    for column in &columns {
        print!("  {:>14}", format!("Linux {column}"));
    }
    println!();
    for (name, cells) in &rows {
        print!("{name:width$}");
        for column in &columns {
            let text = cells.get(column).map_or_else(
                || "not run".to_owned(),
                |(outcome, took)| format!("{outcome} {:5.1} s", took.as_secs_f32()),
            );
            print!("  {text:>14}");
        }
        println!();
    }
    for report in reports {
        println!("{}", report.summary());
    }
}
