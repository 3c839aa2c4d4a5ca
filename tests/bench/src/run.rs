//! The whole measurement: one lab, every variant in turn, round after round.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context as _;
use mesh_netns::process::run as run_program;
use mesh_netns::wait::{PATIENCE, until};
use mesh_netns::{Lab, LabConfig, Pod, PodSpec, Process, manifest};
use serde_json::{Value, json};

use crate::report::Row;
use crate::{cpu, floor, report, stock};

const LOAD_PORT: u16 = 9000;
const STOCK_CLIENT_PORT: u16 = 9001;
const STOCK_SERVER_PORT: u16 = 9002;
/// Pods per node for the row on memory, besides those that carry load.
const QUIET_PODS: usize = 9;

/// What to measure and how long.
#[derive(Debug)]
pub(crate) struct Settings {
    pub(crate) rounds: usize,
    pub(crate) duration_ms: u64,
    pub(crate) output: PathBuf,
    pub(crate) only: Option<String>,
}

/// One measurement: arguments of `load`, and what of its result and of the CPU time becomes which row.
struct Measurement {
    name: &'static str,
    arguments: &'static [&'static str],
    rows: &'static [(&'static str, &'static str, bool, Quantity)],
}

/// How a row's value comes from a load's result and the relays' CPU seconds.
#[derive(Clone, Copy)]
enum Quantity {
    GigabitsPerSecond,
    CpuSecondsPerGigabyte,
    OperationsPerSecond,
    CpuMicrosecondsPerOperation,
    Field(&'static str),
}

const MEASUREMENTS: &[Measurement] = &[
    Measurement {
        name: "bulk1",
        arguments: &["bulk", "--concurrency", "1"],
        rows: &[
            ("one stream across nodes", "Gbit/s", true, Quantity::GigabitsPerSecond),
            ("one stream, relays' CPU per GB", "s", false, Quantity::CpuSecondsPerGigabyte),
        ],
    },
    Measurement {
        name: "bulk8",
        arguments: &["bulk", "--concurrency", "8"],
        rows: &[
            ("eight streams across nodes", "Gbit/s", true, Quantity::GigabitsPerSecond),
            ("eight streams, relays' CPU per GB", "s", false, Quantity::CpuSecondsPerGigabyte),
        ],
    },
    Measurement {
        name: "ping",
        arguments: &["ping", "--concurrency", "1"],
        rows: &[
            ("64 B there and back, p50", "us", false, Quantity::Field("p50_us")),
            ("64 B there and back, p99", "us", false, Quantity::Field("p99_us")),
            ("64 B there and back, p99.9", "us", false, Quantity::Field("p999_us")),
        ],
    },
    Measurement {
        name: "connect",
        arguments: &["connect", "--concurrency", "16"],
        rows: &[
            ("new connections per second, c=16", "1/s", true, Quantity::OperationsPerSecond),
            ("relays' CPU per new connection", "us", false, Quantity::CpuMicrosecondsPerOperation),
        ],
    },
    Measurement {
        name: "request",
        arguments: &["request", "--concurrency", "64"],
        rows: &[("requests on kept connections, c=64", "1/s", true, Quantity::OperationsPerSecond)],
    },
];

impl Quantity {
    fn of(self, result: &Value, cpu_seconds: f64) -> f64 {
        let number = |field: &str| result[field].as_f64().unwrap_or(f64::NAN);
        match self {
            Self::GigabitsPerSecond => number("bytes") * 8.0 / 1e9 / number("seconds"),
            Self::CpuSecondsPerGigabyte => cpu_seconds / (number("bytes") / 1e9),
            Self::OperationsPerSecond => number("operations") / number("seconds"),
            Self::CpuMicrosecondsPerOperation => cpu_seconds * 1e6 / number("operations"),
            Self::Field(name) => number(name),
        }
    }
}

/// A way from the client to the server.
struct Variant<'a> {
    name: &'static str,
    client: &'a Pod,
    target: SocketAddr,
    /// The processes whose CPU time counts.
    relays: Vec<u32>,
}

/// Measures and reports.
pub(crate) fn run(settings: &Settings) -> anyhow::Result<()> {
    let mut lab =
        Lab::start(LabConfig { log: "warn".to_owned(), ..LabConfig::two_nodes("bench") })?;
    lab.apply(&manifest::namespace("mesh", &[("culvert.dev/dataplane-mode", "ambient")]))?;
    lab.apply(&manifest::namespace("plain", &[]))?;
    for (namespace, node, name) in
        [("mesh", "a", "mc"), ("mesh", "b", "ms"), ("plain", "a", "pc"), ("plain", "b", "ps")]
    {
        lab.run_pod(node, PodSpec::new(namespace, name))?;
    }
    for number in 0..QUIET_PODS {
        lab.run_pod("a", PodSpec::new("mesh", &format!("qa{number}")))?;
        lab.run_pod("b", PodSpec::new("mesh", &format!("qb{number}")))?;
    }
    let program = std::env::current_exe()?.to_string_lossy().into_owned();
    let mut parts = Vec::new();
    for name in ["ms", "ps"] {
        let pod = lab.pod(name);
        let mut serve = pod.command(&program);
        let process = pod.start("load", serve.args(["serve", &LOAD_PORT.to_string()]))?;
        until("the load's server", PATIENCE, || {
            Ok(process.log().contains("serving").then_some(()))
        })?;
        parts.push(process);
    }
    let (stock_client, stock_server) = start_stock(&lab, &program)?;
    let agents: Vec<u32> =
        ["a", "b"].iter().filter_map(|node| lab.node(node).agent_pid()).collect();
    let idle_rss = rss(&agents)?;
    let variants = [
        Variant {
            name: "plain",
            client: lab.pod("pc"),
            target: SocketAddr::new(lab.pod("ps").ipv4, LOAD_PORT),
            relays: Vec::new(),
        },
        Variant {
            name: "stock",
            client: lab.pod("pc"),
            target: SocketAddr::new("127.0.0.1".parse()?, STOCK_CLIENT_PORT),
            relays: vec![stock_client.pid(), stock_server.pid()],
        },
        Variant {
            name: "culvert",
            client: lab.pod("mc"),
            target: SocketAddr::new(lab.pod("ms").ipv4, LOAD_PORT),
            relays: agents.clone(),
        },
    ];
    let mut rows = Vec::new();
    for measurement in MEASUREMENTS {
        if settings.only.as_ref().is_some_and(|only| !measurement.name.contains(only.as_str())) {
            continue;
        }
        rows.extend(rounds(settings, measurement, &variants, &program)?);
    }
    let loaded_rss = rss(&agents)?;
    let aead = floor::aead_seconds_per_gb();
    report::print(&rows);
    println!(
        "\nan agent's RSS with {} pods: {idle_rss:.1} MiB idle, {loaded_rss:.1} MiB after the load",
        QUIET_PODS + 1
    );
    println!("one seal and one open (AES-128-GCM, full records): {aead:.2} CPU s per GB");
    let notes = json!({
        "rounds": settings.rounds, "duration_ms": settings.duration_ms,
        "agent_rss_idle_mib": idle_rss, "agent_rss_loaded_mib": loaded_rss,
        "aead_seal_and_open_seconds_per_gb": aead,
    });
    report::write(&settings.output, &rows, &notes)
}

fn rounds(
    settings: &Settings,
    measurement: &Measurement,
    variants: &[Variant<'_>],
    program: &str,
) -> anyhow::Result<Vec<Row>> {
    let mut rows: Vec<Row> = measurement
        .rows
        .iter()
        .map(|(name, unit, more_is_better, _value)| Row {
            name,
            unit,
            more_is_better: *more_is_better,
            variants: variants.iter().map(|variant| (variant.name, Vec::new())).collect(),
        })
        .collect();
    for round in 0..settings.rounds {
        eprintln!("{} round {}/{}", measurement.name, round + 1, settings.rounds);
        for (index, variant) in variants.iter().enumerate() {
            let before = total_cpu(&variant.relays)?;
            let result = load(variant, measurement.arguments, settings.duration_ms, program)
                .with_context(|| format!("{} through {}", measurement.name, variant.name))?;
            let spent = total_cpu(&variant.relays)? - before;
            for (row, (_, _, _, value)) in rows.iter_mut().zip(measurement.rows) {
                row.variants[index].1.push(value.of(&result, spent));
            }
        }
    }
    Ok(rows)
}

fn load(
    variant: &Variant<'_>,
    arguments: &[&str],
    duration_ms: u64,
    program: &str,
) -> anyhow::Result<Value> {
    let mut command = variant.client.command(program);
    command.args(["load", arguments[0], &variant.target.to_string()]).args(&arguments[1..]);
    command.args(["--duration-ms", &duration_ms.to_string()]);
    let output = run_program(&mut command, Duration::from_secs(60))?.output()?;
    serde_json::from_str(&output).with_context(|| format!("the load printed {output:?}"))
}

fn start_stock(lab: &Lab, program: &str) -> anyhow::Result<(Process, Process)> {
    let certificates = lab.folder().join("stock");
    stock::make_certificates(&certificates)?;
    let certificates = certificates.to_string_lossy().into_owned();
    let (client, server) = (lab.pod("pc"), lab.pod("ps"));
    let mut command = server.command(program);
    command.args(["stock", "server", &format!("0.0.0.0:{STOCK_SERVER_PORT}")]);
    command.args([&format!("127.0.0.1:{LOAD_PORT}"), &certificates]);
    let far = server.start("stock", &mut command)?;
    until("the stock relay", PATIENCE, || Ok(far.log().contains("serving").then_some(())))?;
    let mut command = client.command(program);
    command.args(["stock", "client", &format!("127.0.0.1:{STOCK_CLIENT_PORT}")]);
    command.args([&format!("{}:{STOCK_SERVER_PORT}", server.ipv4), &certificates]);
    let near = client.start("stock", &mut command)?;
    until("the stock relay's client side", PATIENCE, || {
        let sockets = client.shell(&format!("ss -Hltn sport = :{STOCK_CLIENT_PORT}"))?;
        Ok((!sockets.stdout.trim().is_empty()).then_some(()))
    })?;
    Ok((near, far))
}

fn total_cpu(pids: &[u32]) -> anyhow::Result<f64> {
    pids.iter().map(|pid| cpu::seconds(*pid)).sum()
}

fn rss(pids: &[u32]) -> anyhow::Result<f64> {
    let each: Vec<f64> = pids.iter().map(|pid| cpu::rss_mib(*pid)).collect::<Result<_, _>>()?;
    Ok(each.iter().copied().fold(0.0, f64::max))
}
