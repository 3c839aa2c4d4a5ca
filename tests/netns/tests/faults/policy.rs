//! What a changed policy does to connections that are open.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use mesh_netns::lab::{OUTSIDE_IP, OUTSIDE_IP6};
use mesh_netns::peer::ports as peer;
use mesh_netns::process::in_namespace;
use mesh_netns::wait::{PATIENCE, until};
use mesh_netns::{Process, manifest};
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

/// How often a cut may take longer than [`LIMIT`] on a machine that is busy for a moment.
const TRIES: usize = 3;

/// Connections that no tunnel carries are cut within a second as well: plaintext into a captured pod, by a DENY, and a
/// captured pod's to the outside, by its namespace's word on unknown destinations.
pub(crate) fn denying_cuts_connections_without_a_tunnel(mesh: &mut Mesh) -> anyhow::Result<()> {
    let program = mesh.lab.bin_dir().join("culvert-lab-peer");
    let mut serve = in_namespace(Some(mesh.lab.outside()), &program);
    let mut outside = Process::start("outside-peer", serve.arg("serve"), mesh.lab.folder())?;
    until("the peer outside the mesh", PATIENCE, || {
        Ok(outside.log().contains("serving").then_some(()))
    })?;
    let deny = manifest::authorization_policy(
        "mesh",
        "no-plaintext",
        &json!({
            "selector": { "matchLabels": { "app": "mate" } },
            "action": "DENY",
            "rules": [{ "from": [{ "source": { "notPrincipals": ["*"] } }] }],
        }),
    );
    let [mate, mate6] = mesh.targets("mate", peer::IDLE);
    let at = |ip: &str| Ok::<_, anyhow::Error>(SocketAddr::new(ip.parse()?, peer::IDLE));
    let namespace = manifest::namespace("mesh", &[("culvert.dev/dataplane-mode", "ambient")]);
    let mut closed = namespace.clone();
    closed["metadata"]["annotations"] = json!({ "culvert.dev/unknown-egress": "deny" });
    let cuts = [
        Cut {
            client: "stranger",
            targets: [mate, mate6],
            apply: &deny,
            undo: None,
            policy: "AuthorizationPolicy mesh/no-plaintext",
            reporter: "destination",
        },
        Cut {
            client: "client",
            targets: [at(OUTSIDE_IP)?, at(OUTSIDE_IP6)?],
            apply: &closed,
            undo: Some(&namespace),
            policy: "Synthetic mesh/unknown-egress",
            reporter: "source",
        },
    ];
    for cut in &cuts {
        let mut took = Vec::new();
        while took.last().is_none_or(|took| *took >= LIMIT) {
            ensure!(took.len() < TRIES, "{} are cut after {took:?}", cut.client);
            let one = cut.once(mesh).with_context(|| format!("those of {}", cut.client))?;
            ensure!(one < WORST, "{} are cut only after {one:?}", cut.client);
            took.push(one);
        }
    }
    outside.kill();
    Ok(())
}

/// Connections that a change of policy ends, decided at node a.
struct Cut<'c> {
    client: &'c str,
    targets: [SocketAddr; 2],
    apply: &'c Value,
    /// Written afterwards; `None`: what was applied is removed.
    undo: Option<&'c Value>,
    policy: &'c str,
    reporter: &'c str,
}

impl Cut<'_> {
    /// Opens connections by both families, forbids them, and gives how long they lived after that.
    fn once(&self, mesh: &Mesh) -> anyhow::Result<Duration> {
        let held = until("connections being open", PATIENCE, || {
            let [four, six] = self.targets;
            Ok(Some([mesh.hold(self.client, four, 3)?, mesh.hold(self.client, six, 3)?]))
        })?;
        let open = || -> anyhow::Result<usize> {
            // In a captured pod the client's sockets lead to the agent's listener; the agent's own lead on.
            let port = if self.reporter == "source" { 15001 } else { self.targets[0].port() };
            let line = format!("ss -Htn state established dport = :{port}");
            Ok(mesh.pod(self.client).shell(&line)?.output()?.lines().count())
        };
        let before = open()?;
        ensure!(before == 6, "{before} connections are open before the policy");
        let log_before = mesh.lab.node("a").agent_log(usize::MAX).len();
        let applied = Instant::now();
        mesh.lab.apply(self.apply)?;
        let cut = until("the live connections being cut", PATIENCE, || {
            Ok((open()? == 0).then(|| applied.elapsed()))
        });
        let named = cut.as_ref().map_or(Ok(()), |_cut| self.named(mesh, log_before));
        match self.undo {
            None => mesh.lab.delete(self.apply)?,
            Some(before) => mesh.lab.apply(before)?,
        }
        let took = cut?;
        named?;
        for held in held {
            let told = held.use_all()?.err().context("a denied connection goes on")?;
            ensure!(told.contains("reset by peer"), "not reset: {told}");
        }
        Ok(took)
    }

    /// Log and metric name the policy, for each of the six.
    fn named(&self, mesh: &Mesh, log_before: usize) -> anyhow::Result<()> {
        let policy = format!("policy=\"{}\"", self.policy);
        let reporter = format!("reporter=\"{}\"", self.reporter);
        until("log and metric naming the policy", PATIENCE, || {
            let log = mesh.lab.node("a").agent_log(usize::MAX);
            let new = log.get(log_before..).unwrap_or_default().lines();
            let lines = new.filter(|line| line.contains(&policy)).count();
            let metrics = mesh.lab.node("a").metrics()?;
            let counted: f64 = metrics
                .lines()
                .filter(|line| line.starts_with("culvert_denials_total{"))
                .filter(|line| line.contains(&policy) && line.contains(&reporter))
                .filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok())
                .sum();
            Ok((lines >= 6 && counted >= 6.0).then_some(()))
        })
        .with_context(|| mesh.lab.node("a").agent_log(8))
    }
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
