//! `cargo xtask`: everything a developer or CI does, in one place.
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "a command-line tool")]

mod cluster;
mod command;
mod fuzz;
mod image;
mod kernels;
mod oci;
mod run;
mod setup;
mod tidy;

use clap::{Parser, Subcommand};

/// Sets up, builds, tests and shows Culvert.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Arguments {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Installs what building and testing need: Debian packages and bpf-linker.
    Setup,
    /// Shows two nodes, pods and real programs talking through the mesh, step by step with proofs.
    Demo {
        /// Leave the demo running and print commands to try; end it with `cargo xtask demo --stop`.
        #[arg(long)]
        keep: bool,
        /// Take down a demo that was left running.
        #[arg(long, conflicts_with = "keep")]
        stop: bool,
    },
    /// Runs every test; needs root, because capture is tested with real eBPF in real namespaces.
    Test {
        /// Only test targets whose name contains this text.
        filter: Option<String>,
    },
    /// Measures Culvert side by side with plain connections and a stock relay; needs root.
    Bench {
        /// Passed on: `--quick` for a look, `--only bulk` for some rows; `culvert-bench run --help` lists all. `controller`
        /// measures a controller with 10,000 simulated pods and 200 agents instead.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<String>,
    },
    /// Runs the capture suite inside Debian's stock kernels under QEMU.
    Kernels {
        /// Only this kernel: 6.1 or 6.12.
        filter: Option<String>,
    },
    /// Fuzzes every parser of outside bytes, guided by coverage; fails on a crash and keeps its input.
    Fuzz(fuzz::Options),
    /// Starts and ends real Kubernetes clusters on this machine; needs root.
    #[command(subcommand)]
    Cluster(cluster::Verb),
    /// Writes the programs as OCI images, in one archive.
    Image(image::Options),
    /// Builds the eBPF object alone.
    Ebpf,
    /// Checks what the compiler cannot: crate edges, file sizes, stray paths.
    Tidy,
    /// What is to pass before a merge: format, licences and duplicates, lints, tidy, documentation, every test.
    Ci,
}

fn main() -> anyhow::Result<()> {
    match Arguments::parse().verb {
        Verb::Setup => setup::ensure(),
        Verb::Demo { keep, stop } => run::demo(keep, stop),
        Verb::Test { filter } => run::test(filter.as_deref()),
        Verb::Bench { arguments } => run::bench(&arguments),
        Verb::Kernels { filter } => {
            setup::ensure()?;
            kernels::run_suites(filter.as_deref())
        }
        Verb::Fuzz(options) => fuzz::fuzz(&options),
        Verb::Cluster(verb) => cluster::run(verb),
        Verb::Image(options) => image::image(&options),
        Verb::Ebpf => run::ebpf(),
        Verb::Tidy => tidy::run(),
        Verb::Ci => run::ci(),
    }
}
