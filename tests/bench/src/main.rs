//! `culvert-bench`: the numbers of this project, side by side in one run.
//!
//! `run` builds a lab, and measures every row plain, through two plain relays, through the stock relay and through
//! Culvert, in interleaved rounds; the other verbs are its parts, each a process of its own.
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "a command-line tool")]

mod chart;
mod controller;
mod cpu;
mod floor;
mod load;
mod measure;
mod report;
mod rest;
mod run;
mod serve;
mod stock;
mod topology;
mod ztunnel;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Parser, Subcommand};

#[derive(Debug, Parser)]
struct Arguments {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Measure everything; needs root.
    Run {
        /// Rounds; each measures every variant once, medians are reported.
        #[arg(long, default_value_t = 5)]
        rounds: usize,
        /// Milliseconds of one measurement.
        #[arg(long, default_value_t = 1500)]
        duration_ms: u64,
        /// Folder for results.json and results.svg.
        #[arg(long, default_value = "target/bench")]
        output: PathBuf,
        /// Only rows whose name contains one of these texts, separated by commas.
        #[arg(long, value_delimiter = ',')]
        only: Vec<String>,
        /// A look: fewer and shorter rounds, fewer streams and pods.
        #[arg(long)]
        quick: bool,
        /// Quiet streams held open at once.
        #[arg(long, default_value_t = 5000)]
        streams: usize,
        /// Pods on one node for the rows about many pods.
        #[arg(long, default_value_t = 200)]
        pods: usize,
        /// Pods of another node that come and go.
        #[arg(long, default_value_t = 2000)]
        churn: u16,
        /// Seconds for which rest is watched.
        #[arg(long, default_value_t = 60)]
        watch_s: u64,
    },
    /// Measure one controller with many pods and agents; inside `cargo xtask cluster exec`.
    Controller {
        /// Simulated pods.
        #[arg(long, default_value_t = 10_000)]
        pods: usize,
        /// Simulated agents, each of a node of its own.
        #[arg(long, default_value_t = 200)]
        agents: usize,
        /// Changes of a pod's address, one after the other.
        #[arg(long, default_value_t = 200)]
        changes: usize,
        /// Folder for controller.json.
        #[arg(long, default_value = "target/bench")]
        output: PathBuf,
    },
    /// Serve the load.
    Serve { port: u16 },
    /// Make the load and print its result as JSON.
    Load {
        kind: load::Kind,
        target: SocketAddr,
        /// Concurrent connections.
        #[arg(long, default_value_t = 1)]
        concurrency: usize,
        #[arg(long, default_value_t = 1500)]
        duration_ms: u64,
    },
    /// Open quiet connections and hold them.
    Hold { target: SocketAddr, count: usize },
    /// One end of the stock relay (tokio, tokio-rustls, h2): `client` takes TCP, `server` takes the tunnel.
    Stock { side: stock::Side, listen: SocketAddr, next: SocketAddr, certificates: PathBuf },
    /// A plain TCP relay on the same runtime, the floor's first part.
    Plain { listen: SocketAddr, next: SocketAddr },
    /// CPU seconds per GB of one seal and one open, the floor's second part.
    Aead,
}

fn main() -> anyhow::Result<()> {
    cpu::raise_descriptor_limit()?;
    match Arguments::parse().verb {
        Verb::Run { rounds, duration_ms, output, only, quick, streams, pods, churn, watch_s } => {
            run::run(&run::Settings {
                rounds,
                duration_ms,
                output,
                only,
                quick,
                streams,
                pods,
                churn,
                watch: Duration::from_secs(watch_s),
            })
        }
        Verb::Controller { pods, agents, changes, output } => {
            anyhow::ensure!(
                pods > 0 && pods <= 32_640 && agents > 0,
                "between 1 and 32,640 pods, and at least one agent"
            );
            controller::run(&controller::Settings { pods, agents, changes, output })
        }
        Verb::Serve { port } => serve::serve(port),
        Verb::Hold { target, count } => load::hold(target, count),
        Verb::Load { kind, target, concurrency, duration_ms } => {
            println!("{}", load::measure(kind, target, concurrency, duration_ms)?);
            Ok(())
        }
        Verb::Stock { side, listen, next, certificates } => {
            stock::relay(side, listen, next, &certificates)
        }
        Verb::Plain { listen, next } => floor::plain_relay(listen, next),
        Verb::Aead => {
            println!("{}", floor::aead_seconds_per_gb());
            Ok(())
        }
    }
}
