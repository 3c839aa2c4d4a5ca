//! What a changed policy does to connections that are open.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use mesh_netns::manifest;
use mesh_netns::peer::ports as peer;
use mesh_netns::wait::{PATIENCE, until};
use serde_json::{Value, json};

use crate::mesh::Mesh;

/// How soon a DENY closes what it denies, as a rule.
const LIMIT: Duration = Duration::from_secs(1);
/// And at the latest, on a machine that is busy for a moment.
const WORST: Duration = Duration::from_secs(5);
const ROUNDS: usize = 5;

/// The client's connections to the server that the agent has; in the socket table they lead to its listener.
fn captured_connections(mesh: &Mesh) -> anyhow::Result<usize> {
    let client = mesh.pod("client");
    let sockets = client.shell("ss -Htn state established dport = :15001")?.output()?;
    Ok(sockets.lines().count())
}

/// A policy that stops allowing a pair cuts its live connections within a second, with a reset and by name; others go on.
pub(crate) fn denying_cuts_live_connections(mesh: &mut Mesh) -> anyhow::Result<()> {
    let mut took = Vec::new();
    for round in 0..ROUNDS {
        took.push(cut_once(mesh).with_context(|| format!("round {round}"))?);
    }
    took.sort();
    let (median, worst) = (took[ROUNDS / 2], took[ROUNDS - 1]);
    ensure!(median < LIMIT && worst < WORST, "cut after {took:?}");
    Ok(())
}

fn cut_once(mesh: &Mesh) -> anyhow::Result<Duration> {
    let [target, target6] = mesh.targets("server", peer::IDLE);
    let denied = [mesh.hold("client", target, 3)?, mesh.hold("client", target6, 3)?];
    let others = mesh.hold("client", mesh.targets("mate", peer::IDLE)[0], 3)?;
    let open = captured_connections(mesh)?;
    ensure!(open == 9, "{open} connections are open before the policy");
    let deny = manifest::authorization_policy(
        "mesh",
        "no-client",
        &json!({
            "selector": { "matchLabels": { "app": "server" } },
            "action": "DENY",
            "rules": [{ "from": [{ "source": { "principals": ["cluster.local/ns/mesh/sa/client"] } }] }],
        }),
    );
    let log_before = mesh.lab.node("b").agent_log(usize::MAX).len();
    let applied = Instant::now();
    mesh.lab.apply(&deny)?;
    until("the live connections being cut", PATIENCE, || {
        Ok((captured_connections(mesh)? == 3).then_some(()))
    })?;
    let took = applied.elapsed();
    for held in denied {
        let told = held.use_all()?.err().context("a denied connection goes on")?;
        ensure!(told.contains("reset by peer"), "not reset: {told}");
    }
    let used = others.use_all()?;
    ensure!(used.is_ok(), "another's connections were cut: {used:?}");
    until("the log naming the policy, for each connection", PATIENCE, || {
        let log = mesh.lab.node("b").agent_log(usize::MAX);
        let mut named = log.get(log_before..).unwrap_or_default().lines();
        let parts = ["reason=policy_changed", "AuthorizationPolicy mesh/no-client"];
        let count =
            named.by_ref().filter(|line| parts.iter().all(|part| line.contains(part))).count();
        Ok((count >= 6).then_some(()))
    })
    .with_context(|| mesh.lab.node("b").agent_log(8))?;
    same_everywhere(mesh, &mesh.lab.node("b").agent_log(usize::MAX)[log_before..], target)?;
    mesh.lab.delete(&deny)?;
    mesh.wait_for("client")?;
    Ok(took)
}

/// The log's lines of what was cut, the metrics and `explain` name one policy and one rule.
fn same_everywhere(mesh: &Mesh, log: &str, target: SocketAddr) -> anyhow::Result<()> {
    const POLICY: &str = "policy=\"AuthorizationPolicy mesh/no-client\"";
    let cut = log.lines().filter(|line| line.contains("reason=policy_changed"));
    for line in cut {
        ensure!(line.contains(POLICY) && line.contains("rule=0"), "the log's words: {line}");
    }
    let labels = [
        "reporter=\"destination\"",
        "reason=\"policy_changed\"",
        "policy=\"AuthorizationPolicy mesh/no-client\"",
        "rule=\"0\"",
    ];
    let metrics = mesh.lab.node("b").metrics()?;
    let counted: f64 = metrics
        .lines()
        .filter(|line| line.starts_with("culvert_denials_total{"))
        .filter(|line| labels.iter().all(|label| line.contains(label)))
        .filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok())
        .sum();
    ensure!(counted >= 6.0, "{counted} of six cut connections are counted by policy and rule");
    let answer =
        mesh.lab.culvert(&["explain", "mesh/client", &target.to_string(), "-o", "json"])?;
    let answer: Value = serde_json::from_str(&answer.stdout)?;
    ensure!(answer["allowed"] == false, "explain allows it: {answer:#}");
    let stage = answer["stages"].as_array().and_then(|all| all.last()).context("no stage")?;
    let blamed = &stage["authorize"]["outcome"]["denied"]["rule"];
    let origin = &blamed["origin"];
    let same = origin["kind"] == "AuthorizationPolicy"
        && origin["namespace"] == "mesh"
        && origin["name"] == "no-client"
        && blamed["rule_index"] == 0;
    ensure!(same, "explain blames {blamed:#}");
    Ok(())
}
