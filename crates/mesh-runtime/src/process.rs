//! What this process uses.

use std::fmt::Write as _;
use std::fs;

use mesh_telemetry::metric::{self, Metric, MetricKind};
use nix::sys::resource::{Resource, getrlimit};
use nix::unistd::{SysconfVar, sysconf};

/// Memory, descriptors, threads and processor time of this process as Prometheus text; what `/proc` does not say is
/// left out.
#[must_use]
pub fn render() -> String {
    let mut text = String::new();
    for (metric, value) in observe() {
        let kind = match metric.kind {
            MetricKind::Counter => "counter",
            MetricKind::Gauge | MetricKind::Histogram => "gauge",
        };
        let name = metric.name;
        writeln!(text, "# HELP {name} {}\n# TYPE {name} {kind}\n{name} {value}\n", metric.help)
            .expect("a String takes everything");
    }
    text
}

fn observe() -> Vec<(Metric, f64)> {
    let mut values = Vec::with_capacity(6);
    if let Some(resident) = resident_bytes() {
        values.push((metric::PROCESS_RESIDENT_BYTES, to_f64(resident)));
    }
    if let Ok(entries) = fs::read_dir("/proc/self/fd") {
        values.push((metric::PROCESS_OPEN_FDS, to_f64(entries.count() as u64)));
    }
    if let Ok((soft, _hard)) = getrlimit(Resource::RLIMIT_NOFILE) {
        values.push((metric::PROCESS_MAX_FDS, to_f64(soft)));
    }
    let stat = fs::read_to_string("/proc/self/stat").ok();
    if let Some(usage) = stat.as_deref().and_then(parse_stat) {
        let ticks = clock_ticks();
        values.push((metric::PROCESS_THREADS, to_f64(usage.threads)));
        values.push((metric::PROCESS_CPU_SECONDS, to_f64(usage.cpu_ticks) / ticks));
        if let Some(boot) = boot_time() {
            let started = to_f64(usage.start_ticks) / ticks;
            values.push((metric::PROCESS_START, to_f64(boot) + started));
        }
    }
    values
}

/// Resident memory of this process, bytes; `None` without `/proc`.
#[must_use]
pub fn resident_bytes() -> Option<u64> {
    let statm = fs::read_to_string("/proc/self/statm").ok()?;
    let pages: u64 = statm.split_whitespace().nth(1)?.parse().ok()?;
    let page = sysconf(SysconfVar::PAGE_SIZE).ok()??;
    Some(pages * u64::try_from(page).ok()?)
}

fn clock_ticks() -> f64 {
    let ticks = sysconf(SysconfVar::CLK_TCK).ok().flatten().and_then(|t| u64::try_from(t).ok());
    to_f64(ticks.unwrap_or(100))
}

fn boot_time() -> Option<u64> {
    let stat = fs::read_to_string("/proc/stat").ok()?;
    stat.lines().find_map(|line| line.strip_prefix("btime "))?.trim().parse().ok()
}

struct Usage {
    cpu_ticks: u64,
    threads: u64,
    start_ticks: u64,
}

/// Source: proc_pid_stat(5): utime 14, stime 15, num_threads 20, starttime 22. The name before may hold anything.
fn parse_stat(stat: &str) -> Option<Usage> {
    let fields: Vec<&str> = stat.get(stat.rfind(')')? + 1..)?.split_whitespace().collect();
    let field = |number: usize| fields.get(number - 3)?.parse::<u64>().ok();
    Some(Usage { cpu_ticks: field(14)? + field(15)?, threads: field(20)?, start_ticks: field(22)? })
}

/// Exact below 2^53, which bytes and ticks of one process stay below.
#[expect(clippy::cast_precision_loss, reason = "Prometheus values are floating point")]
const fn to_f64(value: u64) -> f64 {
    value as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_name_of_a_process_does_not_confuse() {
        let usage = parse_stat(
            "7 (a) b (c) S 1 7 7 0 -1 4194560 1 0 0 0 25 75 0 0 20 0 9 0 1234 0 0 1844674407",
        )
        .unwrap();
        assert_eq!((usage.cpu_ticks, usage.threads, usage.start_ticks), (100, 9, 1234));
        assert!(parse_stat("").is_none() && parse_stat("7 (x) S 1").is_none());
    }

    #[test]
    fn this_process_is_resident() {
        assert!(resident_bytes().unwrap() > 100_000);
    }
}
