//! The whole measurement: one lab, every way in turn, round after round.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use serde_json::json;

use crate::measure::{MEASUREMENTS, rounds};
use crate::rest::{self, Extent};
use crate::topology::Topology;
use crate::{chart, cpu, report};

/// What to measure and how long.
#[derive(Debug)]
pub(crate) struct Settings {
    pub(crate) rounds: usize,
    pub(crate) duration_ms: u64,
    pub(crate) output: PathBuf,
    pub(crate) only: Vec<String>,
    pub(crate) quick: bool,
    pub(crate) streams: usize,
    pub(crate) pods: usize,
    pub(crate) churn: u16,
    pub(crate) watch: Duration,
}

/// Of a look: rounds and milliseconds.
const QUICK: (usize, u64) = (2, 600);
const QUICK_EXTENT: Extent =
    Extent { streams: 500, pods: 40, churn: 500, watch: Duration::from_secs(10) };

/// Measures and reports.
pub(crate) fn run(settings: &Settings) -> anyhow::Result<()> {
    let began = Instant::now();
    let (count, duration_ms, extent) = if settings.quick {
        (QUICK.0, QUICK.1, QUICK_EXTENT)
    } else {
        let &Settings { streams, pods, churn, watch, .. } = settings;
        (settings.rounds, settings.duration_ms, Extent { streams, pods, churn, watch })
    };
    let wanted = |name: &str| {
        settings.only.is_empty() || settings.only.iter().any(|only| name.contains(only.as_str()))
    };
    let machine = cpu::machine();
    let mut topology = Topology::start()?;
    let mut rows = Vec::new();
    let mut rest = vec![rest::memory_after(&topology, "RSS with 20 pods, idle")?];
    for measurement in MEASUREMENTS.iter().filter(|measurement| wanted(measurement.name)) {
        rows.extend(rounds(&topology, measurement, count, duration_ms)?);
    }
    rest.push(rest::memory_after(&topology, "RSS with 20 pods, after the load")?);
    if wanted("streams") {
        rest.extend(rest::quiet_streams(&topology, extent)?);
        rest.push(rest::memory_after(&topology, "RSS after the quiet streams")?);
    }
    if wanted("churn") {
        rest.extend(rest::churn(&topology, extent.churn)?);
    }
    if wanted("pods") {
        rest.extend(rest::pods_at_rest(&mut topology, extent)?);
    }
    rows.extend(rest);
    drop(topology);
    report::print(&rows);
    println!(
        "\n{} on {} cores, kernel {}; {count} rounds of {duration_ms} ms; load average {} before, {} s in all",
        machine["cpu"].as_str().unwrap_or_default(),
        machine["cores"],
        machine["kernel"].as_str().unwrap_or_default(),
        machine["load_average"].as_str().unwrap_or_default(),
        began.elapsed().as_secs(),
    );
    let notes = json!({ "rounds": count, "duration_ms": duration_ms, "machine": machine });
    report::write(&settings.output, &rows, &notes)?;
    std::fs::write(settings.output.join("results.svg"), chart::draw(&rows))?;
    println!("written: {0}/results.json, {0}/results.svg", settings.output.display());
    Ok(())
}
