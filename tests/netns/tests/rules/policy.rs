//! Every denial's log line, metrics and `culvert explain` name the same policy and rule.

use std::net::SocketAddr;

use anyhow::{Context as _, ensure};
use mesh_netns::wait::{PATIENCE, until};
use mesh_netns::{manifest, servers};
use serde_json::{Value, json};

use crate::mesh::{AMBIENT, LogFromNow, Mesh, annotated, field, outside_target, sum_of};

/// Who refuses whom, and what is to blame.
struct Denied<'d> {
    /// Written while the denial is looked at.
    object: &'d Value,
    /// Written afterwards; `None`: the object is removed.
    undo: Option<&'d Value>,
    client: &'d str,
    target: SocketAddr,
    /// Node whose agent decides, and how it counts itself.
    decider: (&'d str, &'d str),
    policy: &'d str,
    rule: Option<u64>,
}

impl Denied<'_> {
    fn check(&self, mesh: &Mesh) -> anyhow::Result<()> {
        let outcome = self.look(mesh);
        match self.undo {
            None => mesh.lab.delete(self.object)?,
            Some(before) => mesh.lab.apply(before)?,
        }
        let undone =
            mesh.wait_for(self.client, self.target).context("after the policy was removed");
        outcome.and(undone)
    }

    fn look(&self, mesh: &Mesh) -> anyhow::Result<()> {
        let (node, reporter) = self.decider;
        let log = LogFromNow::of(mesh, node)?;
        let node = mesh.lab.node(node);
        let failed = |metrics: &str| {
            let labels = [("reporter", reporter), ("source_workload", self.client)];
            sum_of(metrics, "istio_tcp_connections_failed_total", &labels)
        };
        let failed_before = failed(&node.metrics()?);
        mesh.lab.apply(self.object)?;
        until(&format!("{} refusing {}", self.policy, self.client), PATIENCE, || {
            Ok((!mesh.reaches(self.client, self.target)?).then_some(()))
        })?;
        // The first one may have been open when the policy came, and have been cut; this one is refused.
        ensure!(!mesh.reaches(self.client, self.target)?, "refused once only");
        let source = format!("src.addr={}:", mesh.lab.pod(self.client).ipv4);
        let line = log.line(&[&source, "_denied"])?;
        let rule = self.rule.map(|rule| rule.to_string());
        ensure!(field(&line, "policy") == Some(self.policy), "blamed in the log: {line}");
        ensure!(field(&line, "rule") == rule.as_deref(), "rule in the log: {line}");
        let reason = field(&line, "reason").context("a line without reason")?;
        let counted = [
            ("reporter", reporter),
            ("reason", reason),
            ("policy", self.policy),
            ("rule", rule.as_deref().unwrap_or_default()),
        ];
        until("the denial being counted", PATIENCE, || {
            let metrics = node.metrics()?;
            let denials = sum_of(&metrics, "culvert_denials_total", &counted);
            Ok((denials > 0.0 && failed(&metrics) > failed_before).then_some(()))
        })?;
        let answer = mesh.explain(self.client, self.target)?;
        ensure!(answer["allowed"] == false, "explain allows it: {answer:#}");
        ensure!(answer["reason"] == reason, "explain: {}, log: {reason}", answer["reason"]);
        let stage = answer["stages"].as_array().and_then(|all| all.last()).context("no stage")?;
        let blamed = &stage["authorize"]["outcome"]["denied"]["rule"];
        let origin = &blamed["origin"];
        let name = [&origin["kind"], &origin["namespace"], &origin["name"]]
            .map(|part| part.as_str().unwrap_or_default());
        let name = format!("{} {}/{}", name[0], name[1], name[2]);
        ensure!(name == self.policy, "explain blames {name}: {stage:#}");
        ensure!(blamed["rule_index"].as_u64() == self.rule, "explain's rule: {blamed:#}");
        Ok(())
    }
}

/// An AuthorizationPolicy for the server.
fn policy(name: &str, spec: &Value) -> Value {
    let mut spec = spec.clone();
    spec["selector"] = json!({ "matchLabels": { "app": "server" } });
    manifest::authorization_policy("mesh", name, &spec)
}

fn denied_at_server(
    mesh: &Mesh,
    object: &Value,
    client: &str,
    rule: Option<u64>,
) -> anyhow::Result<()> {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let meta = &object["metadata"];
    let policy =
        format!("{} {}/{}", text(&object["kind"]), text(&meta["namespace"]), text(&meta["name"]));
    let denied = Denied {
        object,
        undo: None,
        client,
        target: mesh.server(),
        decider: ("b", "destination"),
        policy: &policy,
        rule,
    };
    denied.check(mesh)
}

fn from(source: &Value) -> Value {
    json!({ "from": [{ "source": source }] })
}

pub(crate) fn deny_by_principal(mesh: &mut Mesh) -> anyhow::Result<()> {
    let rules = [
        from(&json!({ "principals": ["cluster.local/ns/mesh/sa/somebody"] })),
        from(&json!({ "principals": ["cluster.local/ns/mesh/sa/client"] })),
    ];
    let object = policy("by-principal", &json!({ "action": "DENY", "rules": rules }));
    denied_at_server(mesh, &object, "client", Some(1))
}

pub(crate) fn allow_that_does_not_match(mesh: &mut Mesh) -> anyhow::Result<()> {
    let rules = [from(&json!({ "principals": ["cluster.local/ns/far/sa/visitor"] }))];
    let object = policy("only-visitor", &json!({ "action": "ALLOW", "rules": rules }));
    denied_at_server(mesh, &object, "client", None)
}

pub(crate) fn deny_by_namespace(mesh: &mut Mesh) -> anyhow::Result<()> {
    let rules = [from(&json!({ "namespaces": ["far"] }))];
    let object = policy("not-far", &json!({ "action": "DENY", "rules": rules }));
    denied_at_server(mesh, &object, "visitor", Some(0))
}

pub(crate) fn deny_by_ip_block(mesh: &mut Mesh) -> anyhow::Result<()> {
    let block = format!("{}/32", mesh.lab.pod("client").ipv4);
    let rules = [from(&json!({ "ipBlocks": [block] }))];
    let object = policy("not-this-block", &json!({ "action": "DENY", "rules": rules }));
    denied_at_server(mesh, &object, "client", Some(0))
}

pub(crate) fn deny_by_port(mesh: &mut Mesh) -> anyhow::Result<()> {
    let to = |port: u16| json!({ "to": [{ "operation": { "ports": [port.to_string()] } }] });
    let rules = [to(servers::ports::REDIS), to(servers::ports::HTTP)];
    let object = policy("not-this-port", &json!({ "action": "DENY", "rules": rules }));
    denied_at_server(mesh, &object, "client", Some(1))
}

/// Only HTTP is allowed, which nobody here can judge: nothing is allowed, and the status says so.
pub(crate) fn l7_only_allow(mesh: &mut Mesh) -> anyhow::Result<()> {
    let rules = [json!({ "to": [{ "operation": { "methods": ["GET"] } }] })];
    let object = policy("only-get", &json!({ "action": "ALLOW", "rules": rules }));
    mesh.lab.apply(&object)?;
    let noted = until("the status naming the part that is not judged", PATIENCE, || {
        let status = mesh.lab.culvert(&["status", "controller", "-o", "json"])?;
        let status: Value = serde_json::from_str(&status.stdout)?;
        let of_policy = &status["policies"]["AuthorizationPolicy mesh/only-get"];
        let told = of_policy["enforced_as_written"] == false
            && of_policy["notes"].to_string().contains("methods");
        Ok(told.then_some(()))
    });
    let denied = denied_at_server(mesh, &object, "client", None);
    noted.and(denied)
}

/// The stranger is refused, the client is not.
fn strict(mesh: &Mesh, namespace: &str, name: &str, spec: &Value) -> anyhow::Result<()> {
    let object = manifest::peer_authentication(namespace, name, spec);
    denied_at_server(mesh, &object, "stranger", Some(0))?;
    // Once more, for those who prove an identity.
    mesh.lab.apply(&object)?;
    let refused = until("the stranger being refused again", PATIENCE, || {
        Ok((!mesh.reaches("stranger", mesh.server())?).then_some(()))
    });
    let client = mesh.reaches("client", mesh.server());
    mesh.lab.delete(&object)?;
    refused?;
    ensure!(client?, "STRICT refuses a client that proves its identity");
    mesh.wait_for("stranger", mesh.server())
}

pub(crate) fn strict_for_the_mesh(mesh: &mut Mesh) -> anyhow::Result<()> {
    strict(mesh, "istio-system", "everybody", &json!({ "mtls": { "mode": "STRICT" } }))
}

pub(crate) fn strict_for_a_namespace(mesh: &mut Mesh) -> anyhow::Result<()> {
    strict(mesh, "mesh", "whole-namespace", &json!({ "mtls": { "mode": "STRICT" } }))
}

pub(crate) fn strict_for_a_workload(mesh: &mut Mesh) -> anyhow::Result<()> {
    let selector = json!({ "matchLabels": { "app": "server" } });
    let spec = json!({ "selector": selector, "mtls": { "mode": "STRICT" } });
    strict(mesh, "mesh", "one-workload", &spec)
}

pub(crate) fn strict_for_a_port(mesh: &mut Mesh) -> anyhow::Result<()> {
    let spec = json!({
        "selector": { "matchLabels": { "app": "server" } },
        "mtls": { "mode": "PERMISSIVE" },
        "portLevelMtls": { servers::ports::HTTP.to_string(): { "mode": "STRICT" } },
    });
    let object = manifest::peer_authentication("mesh", "one-port", &spec);
    strict(mesh, "mesh", "one-port", &spec)?;
    // Its other ports stay open to everybody.
    mesh.lab.apply(&object)?;
    let other = SocketAddr::new(mesh.server().ip(), servers::ports::HTTP2);
    let stranger = mesh.lab.pod("stranger");
    let mut curl = stranger.command("curl");
    curl.args(["-sS", "-m", "20", "--http2-prior-knowledge", &format!("http://{other}/")]);
    let refused = until("the port being closed", PATIENCE, || {
        Ok((!mesh.reaches("stranger", mesh.server())?).then_some(()))
    });
    let open = mesh_netns::process::run(&mut curl, PATIENCE);
    mesh.lab.delete(&object)?;
    refused?;
    ensure!(open?.success(), "a port that is not STRICT refused a plain client");
    mesh.wait_for("stranger", mesh.server())
}

/// A namespace that forbids destinations the mesh does not know: its pods' own node decides.
pub(crate) fn unknown_egress(mesh: &mut Mesh) -> anyhow::Result<()> {
    let before = manifest::namespace("far", &[AMBIENT]);
    let after = annotated(before.clone(), &json!({ "culvert.dev/unknown-egress": "deny" }));
    mesh.wait_for("visitor", outside_target()?)?;
    let answer = |mesh: &Mesh| mesh.explain("visitor", outside_target()?);
    ensure!(answer(mesh)?["allowed"] == true, "refused before the namespace said so");
    let denied = Denied {
        object: &after,
        undo: Some(&before),
        client: "visitor",
        target: outside_target()?,
        decider: ("a", "source"),
        policy: "Synthetic far/unknown-egress",
        rule: None,
    };
    denied.check(mesh)
}

/// A policy that is not enforced: no connection fails, and log, metric and `explain` say that it matched.
fn noted(mesh: &Mesh, object: &Value, kind: &str) -> anyhow::Result<()> {
    let name = format!(
        "AuthorizationPolicy mesh/{}",
        object["metadata"]["name"].as_str().unwrap_or_default()
    );
    let node = mesh.lab.node("b");
    let log = LogFromNow::of(mesh, "b")?;
    mesh.lab.apply(object)?;
    let look = || {
        until(&format!("{name} being noted"), PATIENCE, || {
            ensure!(mesh.reaches("client", mesh.server())?, "a policy without effect had one");
            let labels = [("note", kind), ("policy", &*name), ("rule", "0")];
            let count = sum_of(&node.metrics()?, "culvert_policy_notes_total", &labels);
            Ok((count > 0.0).then_some(()))
        })?;
        log.line(&["a policy that is not enforced matched", kind, &name])?;
        let answer = mesh.explain("client", mesh.server())?;
        ensure!(answer["allowed"] == true, "explain refuses: {answer:#}");
        let stage = answer["stages"].as_array().and_then(|all| all.last()).context("no stage")?;
        let note = &stage["authorize"]["notes"][0];
        ensure!(note["kind"] == kind && note["rule"]["rule_index"] == 0, "explain notes {note:#}");
        let noted = &note["policy"]["name"];
        ensure!(name.ends_with(noted.as_str().unwrap_or("?")), "explain notes {note:#}");
        Ok(())
    };
    let outcome = look();
    mesh.lab.delete(object)?;
    outcome
}

pub(crate) fn dry_run_is_noted_only(mesh: &mut Mesh) -> anyhow::Result<()> {
    let rules = [from(&json!({ "principals": ["cluster.local/ns/mesh/sa/client"] }))];
    let object = policy("tried-out", &json!({ "action": "DENY", "rules": rules }));
    let object = annotated(object, &json!({ "istio.io/dry-run": "true" }));
    noted(mesh, &object, "would_deny")
}

pub(crate) fn audit_is_noted_only(mesh: &mut Mesh) -> anyhow::Result<()> {
    let rules = [from(&json!({ "principals": ["cluster.local/ns/mesh/sa/client"] }))];
    let object = policy("written-down", &json!({ "action": "AUDIT", "rules": rules }));
    noted(mesh, &object, "audit")
}
