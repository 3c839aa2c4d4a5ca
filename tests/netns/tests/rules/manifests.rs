//! An object that cannot be used is refused by name, and what was good before it stays in force; a policy that never was
//! good refuses what it selects.

use std::net::SocketAddr;

use anyhow::{Context as _, ensure};
use mesh_netns::wait::{PATIENCE, until};
use mesh_netns::{Finished, manifest, servers};
use serde_json::{Value, json};

use crate::mesh::{LogFromNow, Mesh, field, sum_of};

pub(crate) fn refused_object(mesh: &mut Mesh) -> anyhow::Result<()> {
    let policy = |ports: &Value| {
        let rules = json!([{ "to": [{ "operation": { "ports": ports } }] }]);
        let selector = json!({ "matchLabels": { "app": "server" } });
        let spec = json!({ "selector": selector, "action": "DENY", "rules": rules });
        manifest::authorization_policy("mesh", "edited", &spec)
    };
    let good = policy(&json!(["8080"]));
    mesh.lab.apply(&good)?;
    let outcome = until("the good policy being in force", PATIENCE, || {
        Ok((!mesh.reaches("client", mesh.server())?).then_some(()))
    })
    .and_then(|()| while_bad(mesh, &policy(&json!(["eighty"]))));
    mesh.lab.delete(&good)?;
    mesh.wait_for("client", mesh.server())?;
    outcome?;
    clean(mesh)
}

fn status(mesh: &Mesh) -> anyhow::Result<Finished> {
    mesh.lab.culvert(&["status", "controller"])
}

/// Waits until the status has nothing to say against any object.
fn clean(mesh: &Mesh) -> anyhow::Result<()> {
    until("the status being clean", PATIENCE, || {
        let none = refused(mesh)?.as_array().is_some_and(Vec::is_empty);
        Ok((none && status(mesh)?.status.code() == Some(0)).then_some(()))
    })
}

/// The status names `object` with `effect`, and ends with 1.
fn told(mesh: &Mesh, object: &str, effect: &str) -> anyhow::Result<()> {
    until(&format!("the status telling of {object}: {effect}"), PATIENCE, || {
        let told = status(mesh)?;
        let named = told.stdout.contains(&format!("refused: {object} at "));
        Ok((named && told.stdout.contains(effect) && told.status.code() == Some(1)).then_some(()))
    })
    .with_context(|| status(mesh).map_or_else(|error| error.to_string(), |told| told.stdout))
}

fn refused(mesh: &Mesh) -> anyhow::Result<Value> {
    let status = mesh.lab.culvert(&["status", "controller", "-o", "json"])?;
    let mut status: Value = serde_json::from_str(&status.stdout)?;
    Ok(status["source"]["refused"].take())
}

fn while_bad(mesh: &Mesh, bad: &Value) -> anyhow::Result<()> {
    mesh.lab.apply(bad)?;
    let entry = until("the bad object being refused", PATIENCE, || {
        Ok(refused(mesh)?.as_array_mut().and_then(Vec::pop))
    })?;
    let file = mesh.lab.manifests().join("AuthorizationPolicy.mesh.edited.json");
    let text = std::fs::read_to_string(&file)?;
    let line = text.lines().position(|line| line.contains("\"operation\"")).map(|at| at + 1);
    ensure!(entry["file"].as_str() == file.to_str(), "file: {entry:#}");
    ensure!(entry["line"].as_u64() == line.and_then(|n| u64::try_from(n).ok()), "line: {entry:#}");
    ensure!(entry["object"] == "AuthorizationPolicy mesh/edited", "object: {entry:#}");
    ensure!(entry["field"] == "spec.rules[0].to[0].operation", "field: {entry:#}");
    let problem = entry["problem"].as_str().unwrap_or_default();
    ensure!(problem.contains("eighty"), "problem: {entry:#}");
    ensure!(entry["remedy"].as_str().is_some_and(|text| !text.is_empty()), "remedy: {entry:#}");
    ensure!(entry["last_good_in_use"] == true, "last good: {entry:#}");
    let table = status(mesh)?.stdout;
    ensure!(table.contains("spec.rules[0].to[0].operation"), "status: {table}");
    told(mesh, "AuthorizationPolicy mesh/edited", "its last good version is still in use")?;
    // New connections are still judged by the last good one, also after the next thing that changes.
    mesh.lab.apply(&manifest::namespace("unrelated", &[]))?;
    for _ in 0..5 {
        ensure!(!mesh.reaches("client", mesh.server())?, "the last good policy was dropped");
    }
    mesh.lab.delete(&manifest::namespace("unrelated", &[]))
}

const SEALED: &str = "AuthorizationPolicy mesh/sealed";

/// A policy for the server.
fn sealed(action: &str, principal: &str) -> Value {
    let rules = json!([{ "from": [{ "source": { "principals": [principal] } }] }]);
    let selector = json!({ "matchLabels": { "app": "server" } });
    let spec = json!({ "selector": selector, "action": action, "rules": rules });
    manifest::authorization_policy("mesh", "sealed", &spec)
}

/// A policy that cannot be read, and never could, refuses whom it selects: when it is written, and when the controller
/// finds it at its start. As soon as it can be read it counts.
pub(crate) fn unreadable_policy(mesh: &mut Mesh) -> anyhow::Result<()> {
    mesh.run_server("mesh", "bystander")?;
    let bystander = SocketAddr::new(mesh.lab.pod("bystander").ipv4, servers::ports::HTTP);
    mesh.wait_for("client", bystander)?;
    clean(mesh)?;
    let nobody = "cluster.local/ns/mesh/sa/nobody";
    let unreadable = sealed("MAYBE", nobody);
    mesh.lab.apply(&unreadable)?;
    sealed_off(mesh, bystander).context("while the controller runs")?;
    mesh.lab.apply(&sealed("DENY", nobody))?;
    mesh.wait_for("client", mesh.server())?;
    clean(mesh)?;
    // Without the version that was good meanwhile.
    mesh.lab.delete(&unreadable)?;
    until("the controller having forgotten the policy", PATIENCE, || {
        Ok((!status(mesh)?.stdout.contains(SEALED)).then_some(()))
    })?;
    mesh.lab.kill_controller();
    mesh.lab.apply(&unreadable)?;
    mesh.lab.start_controller()?;
    sealed_off(mesh, bystander).context("from the controller's start on")?;
    mesh.lab.delete(&unreadable)?;
    mesh.wait_for("client", mesh.server())?;
    clean(mesh)?;
    mesh.lab.delete_pod("bystander")
}

/// The server refuses everybody, because of the policy, by name; others do not.
fn sealed_off(mesh: &Mesh, bystander: SocketAddr) -> anyhow::Result<()> {
    let log = LogFromNow::of(mesh, "b")?;
    until("the server being sealed off", PATIENCE, || {
        Ok((!mesh.reaches("client", mesh.server())?).then_some(()))
    })?;
    for client in ["client", "visitor", "stranger"] {
        ensure!(!mesh.reaches(client, mesh.server())?, "{client} reaches what nobody may");
        ensure!(mesh.reaches(client, bystander)?, "{client} is kept from a pod not selected");
    }
    told(mesh, SEALED, "DENYING")?;
    let source = format!("src.addr={}:", mesh.lab.pod("visitor").ipv4);
    let line = log.line(&[&source, SEALED])?;
    let named = field(&line, "policy").context("a line without policy")?;
    ensure!(named.starts_with(&format!("{SEALED} (unreadable: ")), "blamed in the log: {line}");
    ensure!(field(&line, "reason") == Some("policy_missing"), "the reason in the log: {line}");
    let counted = sum_of(
        &mesh.lab.node("b").metrics()?,
        "culvert_denials_total",
        &[("reporter", "destination"), ("reason", "policy_missing")],
    );
    ensure!(counted > 0.0, "refusals are not counted");
    let metrics = mesh.lab.node("b").metrics()?;
    let named = format!("policy=\"{SEALED}");
    let mut series = metrics.lines().filter(|line| line.starts_with("culvert_denials_total{"));
    ensure!(
        series.any(|line| line.contains("reason=\"policy_missing\"") && line.contains(&named)),
        "no refusal is counted under {SEALED}"
    );
    let answer = mesh.explain("client", mesh.server())?;
    ensure!(answer["allowed"] == false, "explain allows it: {answer:#}");
    ensure!(answer["reason"] == "policy_missing", "explain's reason: {answer:#}");
    ensure!(answer.to_string().contains("MAYBE"), "explain does not say why: {answer:#}");
    Ok(())
}

/// A policy that was good stays in force when its text breaks, also over a restart of the controller.
pub(crate) fn last_good_policy_over_a_restart(mesh: &mut Mesh) -> anyhow::Result<()> {
    let client = "cluster.local/ns/mesh/sa/client";
    mesh.lab.apply(&sealed("DENY", client))?;
    until("the good policy being in force", PATIENCE, || {
        Ok((!mesh.reaches("client", mesh.server())?).then_some(()))
    })?;
    mesh.lab.kill_controller();
    let broken = sealed("MAYBE", client);
    mesh.lab.apply(&broken)?;
    mesh.lab.start_controller()?;
    told(mesh, SEALED, "its last good version is still in use")?;
    ensure!(status(mesh)?.stdout.contains("KEPT:"), "the status does not say that it is kept");
    // Something that does change has reached the agents, so that the policy would have gone with it.
    mesh.run_server("mesh", "newcomer")?;
    let newcomer = SocketAddr::new(mesh.lab.pod("newcomer").ipv4, servers::ports::HTTP);
    mesh.wait_for("client", newcomer)?;
    let log = LogFromNow::of(mesh, "b")?;
    ensure!(!mesh.reaches("client", mesh.server())?, "the last good policy was dropped");
    ensure!(
        mesh.reaches("visitor", mesh.server())?,
        "more is refused than the last good policy did"
    );
    let line = log.line(&["src.workload=\"client\"", SEALED])?;
    ensure!(field(&line, "policy") == Some(SEALED), "blamed in the log: {line}");
    mesh.lab.delete(&broken)?;
    mesh.wait_for("client", mesh.server())?;
    clean(mesh)?;
    mesh.lab.delete_pod("newcomer")
}
