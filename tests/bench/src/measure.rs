//! The rows that a load makes: what each asks of the client, and which number of its result it is.

use std::time::Duration;

use anyhow::Context as _;
use mesh_netns::process::run as run_program;
use serde_json::Value;

use crate::report::Row;
use crate::topology::{Distance, RELAY, Topology, Way};
use crate::{cpu, floor};

/// One measurement: arguments of `load`, and what of its result and of the CPU time becomes which row.
pub(crate) struct Measurement {
    /// For `--only`.
    pub(crate) name: &'static str,
    distance: Distance,
    arguments: &'static [&'static str],
    rows: &'static [(&'static str, &'static str, bool, Quantity)],
}

/// How a row's value comes from a load's result and the relays' CPU seconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Quantity {
    GigabitsPerSecond,
    /// For the plain relay one seal and one open are added: the floor.
    CpuSecondsPerGigabyte,
    OperationsPerSecond,
    CpuMicrosecondsPerOperation,
    Field(&'static str),
}

const BULK1: &[&str] = &["bulk", "--concurrency", "1"];
const BULK8: &[&str] = &["bulk", "--concurrency", "8"];
const PING: &[&str] = &["ping", "--concurrency", "1"];
const CONNECT1: &[&str] = &["connect", "--concurrency", "1"];
const CONNECT16: &[&str] = &["connect", "--concurrency", "16"];
const REQUEST: &[&str] = &["request", "--concurrency", "64"];

const STREAMS1: &[(&str, &str, bool, Quantity)] = &[
    ("one stream", "Gbit/s", true, Quantity::GigabitsPerSecond),
    ("one stream, CPU per GB", "s", false, Quantity::CpuSecondsPerGigabyte),
];
const STREAMS8: &[(&str, &str, bool, Quantity)] = &[
    ("eight streams", "Gbit/s", true, Quantity::GigabitsPerSecond),
    ("eight streams, CPU per GB", "s", false, Quantity::CpuSecondsPerGigabyte),
];
const LATENCY: &[(&str, &str, bool, Quantity)] = &[
    ("64 B one way, p50", "µs", false, Quantity::Field("one_way_p50_us")),
    ("64 B one way, p99", "µs", false, Quantity::Field("one_way_p99_us")),
    ("64 B one way, p99.9", "µs", false, Quantity::Field("one_way_p999_us")),
    ("64 B there and back, p50", "µs", false, Quantity::Field("p50_us")),
    ("64 B there and back, p99", "µs", false, Quantity::Field("p99_us")),
    ("64 B there and back, p99.9", "µs", false, Quantity::Field("p999_us")),
];
const CONNECTIONS: &[(&str, &str, bool, Quantity)] = &[
    ("new connections, c=16", "1/s", true, Quantity::OperationsPerSecond),
    ("CPU per new connection, c=16", "µs", false, Quantity::CpuMicrosecondsPerOperation),
];
const REQUESTS: &[(&str, &str, bool, Quantity)] = &[
    ("HTTP requests, keep-alive, c=64", "1/s", true, Quantity::OperationsPerSecond),
    ("CPU per HTTP request", "µs", false, Quantity::CpuMicrosecondsPerOperation),
];

/// Every measurement, in the order of the report.
pub(crate) const MEASUREMENTS: &[Measurement] = &[
    Measurement {
        name: "bulk1",
        distance: Distance::AcrossNodes,
        arguments: BULK1,
        rows: STREAMS1,
    },
    Measurement {
        name: "bulk8",
        distance: Distance::AcrossNodes,
        arguments: BULK8,
        rows: STREAMS8,
    },
    Measurement { name: "ping", distance: Distance::AcrossNodes, arguments: PING, rows: LATENCY },
    Measurement {
        name: "connect1",
        distance: Distance::AcrossNodes,
        arguments: CONNECT1,
        rows: &[("connect, 64 B there and back, p50", "µs", false, Quantity::Field("p50_us"))],
    },
    Measurement {
        name: "connect16",
        distance: Distance::AcrossNodes,
        arguments: CONNECT16,
        rows: CONNECTIONS,
    },
    Measurement {
        name: "request",
        distance: Distance::AcrossNodes,
        arguments: REQUEST,
        rows: REQUESTS,
    },
    Measurement {
        name: "near-bulk1",
        distance: Distance::SameNode,
        arguments: BULK1,
        rows: STREAMS1,
    },
    Measurement {
        name: "near-ping",
        distance: Distance::SameNode,
        arguments: PING,
        rows: &[
            ("64 B there and back, p50", "µs", false, Quantity::Field("p50_us")),
            ("64 B there and back, p99", "µs", false, Quantity::Field("p99_us")),
        ],
    },
    Measurement {
        name: "near-connect16",
        distance: Distance::SameNode,
        arguments: CONNECT16,
        rows: CONNECTIONS,
    },
    Measurement {
        name: "direct-bulk1",
        distance: Distance::SameNodeDirect,
        arguments: BULK1,
        rows: STREAMS1,
    },
    Measurement {
        name: "direct-ping",
        distance: Distance::SameNodeDirect,
        arguments: PING,
        rows: &[
            ("64 B there and back, p50", "µs", false, Quantity::Field("p50_us")),
            ("64 B there and back, p99", "µs", false, Quantity::Field("p99_us")),
        ],
    },
    Measurement {
        name: "direct-connect16",
        distance: Distance::SameNodeDirect,
        arguments: CONNECT16,
        rows: CONNECTIONS,
    },
    Measurement {
        name: "direct-request",
        distance: Distance::SameNodeDirect,
        arguments: REQUEST,
        rows: REQUESTS,
    },
];

impl Quantity {
    fn of(self, result: &Value, cpu_seconds: Option<f64>) -> Option<f64> {
        let number = |field: &str| result[field].as_f64();
        match self {
            Self::GigabitsPerSecond => Some(number("bytes")? * 8.0 / 1e9 / number("seconds")?),
            Self::CpuSecondsPerGigabyte => Some(cpu_seconds? / (number("bytes")? / 1e9)),
            Self::OperationsPerSecond => Some(number("operations")? / number("seconds")?),
            Self::CpuMicrosecondsPerOperation => Some(cpu_seconds? * 1e6 / number("operations")?),
            Self::Field(name) => number(name),
        }
    }
}

/// Measures every way once per round, each round beginning with another one.
pub(crate) fn rounds(
    topology: &Topology,
    measurement: &Measurement,
    rounds: usize,
    duration_ms: u64,
) -> anyhow::Result<Vec<Row>> {
    let ways = topology.ways(measurement.distance);
    let mut rows: Vec<Row> = measurement
        .rows
        .iter()
        .map(|(name, unit, more_is_better, _value)| {
            Row::new(measurement.distance.words(), name, unit, *more_is_better)
        })
        .collect();
    for round in 0..rounds {
        eprintln!("{} round {}/{rounds}", measurement.name, round + 1);
        // The machine's quiet and busy moments hit each way alike.
        let aead = floor::aead_seconds_per_gb();
        for turn in 0..ways.len() {
            let way = &ways[(round + turn) % ways.len()];
            let before = total_cpu(&way.relays)?;
            let result = load(topology, way, measurement.arguments, duration_ms)
                .with_context(|| format!("{} through {}", measurement.name, way.name))?;
            let spent = total_cpu(&way.relays)? - before;
            let spent = (!way.relays.is_empty()).then_some(spent);
            for (row, (_, _, _, quantity)) in rows.iter_mut().zip(measurement.rows) {
                let mut value = quantity.of(&result, spent);
                if *quantity == Quantity::CpuSecondsPerGigabyte && way.name == RELAY {
                    value = value.map(|relay| relay + aead);
                }
                row.push(way.name, value);
            }
        }
    }
    Ok(rows)
}

fn load(
    topology: &Topology,
    way: &Way,
    arguments: &[&str],
    duration_ms: u64,
) -> anyhow::Result<Value> {
    let mut command = topology.pod(way.client).command(topology.program());
    command.args(["load", arguments[0], &way.target.to_string()]).args(&arguments[1..]);
    command.args(["--duration-ms", &duration_ms.to_string()]);
    let output = run_program(&mut command, Duration::from_secs(60))?.output()?;
    serde_json::from_str(&output).with_context(|| format!("the load printed {output:?}"))
}

pub(crate) fn total_cpu(pids: &[u32]) -> anyhow::Result<f64> {
    pids.iter().map(|pid| cpu::seconds(*pid)).sum()
}
