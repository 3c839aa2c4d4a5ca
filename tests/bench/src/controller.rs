//! One controller with many pods and many agents: `cargo xtask bench controller`.
//!
//! The API server is real, and so is the controller; nodes, pods and agents are simulated. Nodes are objects, pods are bound to
//! them and given an address as a kubelet would, an agent is a connection that proves its node, subscribes to what agents
//! subscribe to and acknowledges everything. A change is a pod's new address; its latency is from the API server's answer
//! until an agent has the workload with that address in its hands.

mod agents;
mod api;

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use serde_json::json;

use crate::cpu;
use agents::Agents;
use api::Api;

/// How long everything may take that is waited for.
const PATIENCE: Duration = Duration::from_secs(300);
/// How long a controller at rest is watched.
const REST: Duration = Duration::from_secs(20);
/// Where the controller listens, and where it tells how it is.
const LISTEN: &str = "127.0.0.1:15012";
const ADMIN: &str = "http://127.0.0.1:15014";

/// What is measured.
#[derive(Clone, Debug)]
pub(crate) struct Settings {
    pub(crate) pods: usize,
    pub(crate) agents: usize,
    pub(crate) changes: usize,
    pub(crate) output: PathBuf,
}

/// A controller that ends with the value.
struct Controller(Child);

impl Drop for Controller {
    fn drop(&mut self) {
        // It may have ended by itself, which the measurement has noticed.
        if self.0.kill().is_ok() && self.0.wait().is_err() {
            eprintln!("the controller cannot be waited for");
        }
    }
}

pub(crate) fn run(settings: &Settings) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let state = std::env::temp_dir().join(format!("culvert-bench-{}", std::process::id()));
    let outcome = runtime.block_on(measure(settings, &state));
    if state.exists() {
        std::fs::remove_dir_all(&state)?;
    }
    outcome
}

async fn measure(settings: &Settings, state: &Path) -> anyhow::Result<()> {
    let api = Api::of_environment()?;
    let program = std::env::var_os("CULVERT_BIN_DIR").map(PathBuf::from);
    let program = program.unwrap_or_default().join("culvert-controller");
    let began = Instant::now();
    api.populate(settings.pods, settings.agents, state)?;
    let populated = began.elapsed();
    println!("{} pods in {:.0} s", settings.pods, populated.as_secs_f64());

    let began = Instant::now();
    let child = Command::new(&program)
        .args(["run", "--source", "kubernetes", "--listen", LISTEN, "--state-dir"])
        .arg(state.join("state"))
        .stdin(Stdio::null())
        .spawn()
        .with_context(|| format!("cannot start {}", program.display()))?;
    let pid = child.id();
    let _controller = Controller(child);
    await_ready()?;
    let read = (began.elapsed(), cpu::seconds(pid)?, cpu::rss_mib(pid)?);
    println!("read in {:.1} s, {:.1} core·s, {:.0} MiB", read.0.as_secs_f64(), read.1, read.2);

    let began = Instant::now();
    let before = cpu::seconds(pid)?;
    let mut agents = Agents::connect(settings.agents, &program, state)?;
    agents.have(settings.pods, PATIENCE).await?;
    let told = (began.elapsed(), cpu::seconds(pid)? - before, cpu::rss_mib(pid)?);
    println!(
        "{} agents know everything after {:.1} s, {:.1} core·s, {:.0} MiB",
        settings.agents,
        told.0.as_secs_f64(),
        told.1,
        told.2
    );

    let before = cpu::seconds(pid)?;
    tokio::time::sleep(REST).await;
    let rest = (cpu::seconds(pid)? - before) / REST.as_secs_f64();
    let rest_mib = cpu::rss_mib(pid)?;
    println!("at rest {:.2} % of a core, {rest_mib:.0} MiB", rest * 100.0);

    let mut latencies = Vec::new();
    let before = cpu::seconds(pid)?;
    for change in 0..settings.changes {
        let (pod, answered) = api.change(change, settings.pods)?;
        let seen = agents.saw(&pod, PATIENCE).await?;
        latencies.extend(seen.into_iter().map(|at| at.saturating_duration_since(answered)));
    }
    let per_change = (cpu::seconds(pid)? - before) / settings.changes.max(1) as f64;
    latencies.sort_unstable();
    let at = |part: f64| percentile_ms(&latencies, part);
    let (p50, p99, most) = (at(0.5), at(0.99), at(1.0));
    println!("change to agent: p50 {p50:.1} ms, p99 {p99:.1} ms, most {most:.1} ms");
    println!("{:.1} core·ms per change", per_change * 1e3);

    let results = json!({
        "pods": settings.pods,
        "agents": settings.agents,
        "changes": settings.changes,
        "machine": cpu::machine(),
        "populate_s": populated.as_secs_f64(),
        "read": {"seconds": read.0.as_secs_f64(), "cpu_s": read.1, "rss_mib": read.2},
        "tell_all": {"seconds": told.0.as_secs_f64(), "cpu_s": told.1, "rss_mib": told.2},
        "rest": {"cores": rest, "rss_mib": rest_mib},
        "change": {
            "p50_ms": p50, "p99_ms": p99, "max_ms": most,
            "samples": latencies.len(), "cpu_ms": per_change * 1e3, "rss_mib": cpu::rss_mib(pid)?,
        },
        "notes": "agents, API server and controller share the machine",
    });
    std::fs::create_dir_all(&settings.output)?;
    let file = settings.output.join("controller.json");
    std::fs::write(&file, serde_json::to_vec_pretty(&results)?)?;
    println!("{}", file.display());
    Ok(())
}

fn await_ready() -> anyhow::Result<()> {
    let deadline = Instant::now() + PATIENCE;
    while !api::curl(&[&format!("{ADMIN}/ready")]).is_ok_and(|(status, _)| status == 200) {
        if Instant::now() > deadline {
            bail!("the controller does not get ready");
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    Ok(())
}

/// Of sorted values.
fn percentile_ms(sorted: &[Duration], part: f64) -> f64 {
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        clippy::cast_precision_loss,
        reason = "an index into a list that is in memory"
    )]
    let at = ((sorted.len() as f64 * part).ceil() as usize).clamp(1, sorted.len().max(1)) - 1;
    sorted.get(at).map_or(0.0, |value| value.as_secs_f64() * 1e3)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_of_the_values() {
        let values: Vec<Duration> = (1..=100).map(Duration::from_millis).collect();
        let at = |part| percentile_ms(&values, part);
        assert!((at(0.5) - 50.0).abs() < 1e-9 && (at(0.99) - 99.0).abs() < 1e-9);
        assert!((at(1.0) - 100.0).abs() < 1e-9);
        assert!(percentile_ms(&[], 0.5).abs() < 1e-9);
    }
}
