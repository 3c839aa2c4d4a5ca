//! What a process costs: CPU time, memory, wakeups.

use anyhow::Context as _;
use mesh_netns::process::rss_kib;
use nix::time::{ClockId, clock_getcpuclockid};
use nix::unistd::Pid;

/// CPU seconds a process has used so far, user and system, of all its threads, those that ended included.
pub(crate) fn seconds(pid: u32) -> anyhow::Result<f64> {
    let clock = clock_getcpuclockid(Pid::from_raw(i32::try_from(pid)?))
        .with_context(|| format!("process {pid} is gone"))?;
    let time = clock.now()?;
    #[expect(clippy::cast_precision_loss, reason = "seconds of one run are far below 2^53")]
    Ok(time.tv_sec() as f64 + time.tv_nsec() as f64 / 1e9)
}

/// Nanoseconds of the clock that all processes of this machine share.
pub(crate) fn monotonic_ns() -> u64 {
    let now =
        ClockId::CLOCK_MONOTONIC.now().unwrap_or_else(|_never| nix::sys::time::TimeSpec::new(0, 0));
    u64::try_from(now.tv_sec()).unwrap_or(0) * 1_000_000_000
        + u64::try_from(now.tv_nsec()).unwrap_or(0)
}

/// Resident memory of a process, MiB.
pub(crate) fn rss_mib(pid: u32) -> anyhow::Result<f64> {
    Ok(rss_kib(pid)? as f64 / 1024.0)
}

/// How often the threads of a process have gone to sleep by themselves so far: once per wakeup.
pub(crate) fn wakeups(pid: u32) -> anyhow::Result<f64> {
    let mut total = 0.0;
    for task in std::fs::read_dir(format!("/proc/{pid}/task"))? {
        // A thread that ended between the listing and the reading had its last wakeup before.
        if let Ok(status) = std::fs::read_to_string(task?.path().join("status")) {
            total += field(&status, "voluntary_ctxt_switches:").context("no switches")?;
        }
    }
    Ok(total)
}

fn field(status: &str, name: &str) -> Option<f64> {
    let line = status.lines().find(|line| line.starts_with(name))?;
    line.split_whitespace().nth(1)?.parse().ok()
}

/// In a few words, what the numbers were measured on.
pub(crate) fn machine() -> serde_json::Value {
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let model = read("/proc/cpuinfo")
        .lines()
        .find_map(|line| {
            line.strip_prefix("model name")?.split(':').nth(1).map(str::trim).map(str::to_owned)
        })
        .unwrap_or_default();
    serde_json::json!({
        "cpu": model,
        "cores": std::thread::available_parallelism().map_or(0, std::num::NonZero::get),
        "kernel": read("/proc/sys/kernel/osrelease").trim(),
        "load_average": read("/proc/loadavg").split(' ').next().unwrap_or_default(),
    })
}

/// Lets this process, and what it starts, open as many descriptors as it may.
pub(crate) fn raise_descriptor_limit() -> anyhow::Result<()> {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    let (_soft, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    Ok(setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?)
}
