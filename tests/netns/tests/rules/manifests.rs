//! An object that cannot be used is refused by name, and what was good before it stays in force.

use anyhow::ensure;
use mesh_netns::manifest;
use mesh_netns::wait::{PATIENCE, until};
use serde_json::{Value, json};

use crate::mesh::Mesh;

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
    until("the status being clean again", PATIENCE, || {
        Ok(refused(mesh)?.as_array().is_some_and(Vec::is_empty).then_some(()))
    })
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
    let table = mesh.lab.culvert(&["status", "controller"])?.stdout;
    ensure!(table.contains("spec.rules[0].to[0].operation"), "status: {table}");
    // New connections are still judged by the last good one, also after the next thing that changes.
    mesh.lab.apply(&manifest::namespace("unrelated", &[]))?;
    for _ in 0..5 {
        ensure!(!mesh.reaches("client", mesh.server())?, "the last good policy was dropped");
    }
    mesh.lab.delete(&manifest::namespace("unrelated", &[]))
}
