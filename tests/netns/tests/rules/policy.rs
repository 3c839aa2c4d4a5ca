//! Every denial's log line, metrics and `culvert explain` name the same policy and rule.

use std::net::SocketAddr;

use anyhow::{Context as _, ensure};
use mesh_netns::peer::ports as peer;
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
        let pod = mesh.lab.pod(self.client);
        let source = if self.target.is_ipv4() { pod.ipv4 } else { pod.ipv6 };
        let source = SocketAddr::new(source, 0).to_string();
        let source = format!("src.addr={}", source.trim_end_matches('0'));
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
    denied_at(mesh, mesh.server(), object, client, rule)
}

fn denied_at(
    mesh: &Mesh,
    target: SocketAddr,
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
        target,
        decider: ("b", "destination"),
        policy: &policy,
        rule,
    };
    denied.check(mesh).with_context(|| format!("{policy}: {}", object["spec"]))
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

/// Where the server's nginx is, by IPv6.
fn server6(mesh: &Mesh) -> SocketAddr {
    SocketAddr::new(mesh.lab.pod("server").ipv6, servers::ports::HTTP)
}

/// Each `not` twin denies those it does not name; the first rule of each policy matches nobody, for its own `not` twin.
pub(crate) fn deny_by_what_is_not(mesh: &mut Mesh) -> anyhow::Result<()> {
    let block = |pod: &str| {
        let pod = mesh.lab.pod(pod);
        [format!("{}/32", pod.ipv4), format!("{}/128", pod.ipv6)]
    };
    let ports = |ports: &[u16]| {
        let ports: Vec<String> = ports.iter().map(u16::to_string).collect();
        json!({ "to": [{ "operation": { "notPorts": ports } }] })
    };
    let (any_ip, visitor) = (["0.0.0.0/0", "::/0"], block("visitor"));
    let rows = [
        (
            "not-principals",
            from(&json!({ "principals": ["*"], "notPrincipals": ["*"] })),
            from(&json!({ "notPrincipals": ["cluster.local/ns/far/sa/visitor"] })),
        ),
        (
            "not-namespaces",
            from(&json!({ "notNamespaces": ["mesh"], "namespaces": ["mesh"] })),
            from(&json!({ "notNamespaces": ["far"] })),
        ),
        (
            "not-blocks",
            from(&json!({ "notIpBlocks": any_ip })),
            from(&json!({ "notIpBlocks": visitor })),
        ),
        ("not-ports", ports(&[servers::ports::HTTP]), ports(&[servers::ports::REDIS])),
    ];
    for (index, (name, nobody, client)) in rows.iter().enumerate() {
        let object = policy(name, &json!({ "action": "DENY", "rules": [nobody, client] }));
        let target = if index % 2 == 0 { server6(mesh) } else { mesh.server() };
        denied_at(mesh, target, &object, "client", Some(1))?;
    }
    Ok(())
}

/// Conditions on the connection, and their `notValues`.
pub(crate) fn deny_by_condition(mesh: &mut Mesh) -> anyhow::Result<()> {
    let port = servers::ports::HTTP.to_string();
    let visitor = format!("{}/128", mesh.lab.pod("visitor").ipv6);
    let when = |condition: Value| json!({ "when": [condition] });
    let nobody = when(json!({ "key": "destination.port", "values": ["1"] }));
    let rows = [
        ("when-namespace", json!({ "key": "source.namespace", "values": ["mesh"] })),
        ("when-port", json!({ "key": "destination.port", "values": [port] })),
        ("when-not-ip", json!({ "key": "source.ip", "notValues": [visitor] })),
        (
            "when-not-principal",
            json!({ "key": "source.principal", "notValues": ["cluster.local/ns/far/sa/visitor"] }),
        ),
    ];
    for (index, (name, condition)) in rows.into_iter().enumerate() {
        let rules = [&nobody, &when(condition)];
        let object = policy(name, &json!({ "action": "DENY", "rules": rules }));
        let target = if index % 2 == 0 { server6(mesh) } else { mesh.server() };
        denied_at(mesh, target, &object, "client", Some(1))?;
    }
    Ok(())
}

/// A policy of the root namespace is one for every namespace, and is named as what it is.
pub(crate) fn deny_in_the_root_namespace(mesh: &mut Mesh) -> anyhow::Result<()> {
    let rules = [from(&json!({ "principals": ["cluster.local/ns/far/sa/visitor"] }))];
    let spec = json!({ "action": "DENY", "rules": rules });
    let object = manifest::authorization_policy("istio-system", "no-visitor", &spec);
    denied_at(mesh, server6(mesh), &object, "visitor", Some(0))
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

/// True when the stranger's plaintext is answered at a port of the server: nginx with HTTP/1.1 or 2, or the lab's peer.
fn open_to_the_stranger(mesh: &Mesh, port: u16) -> anyhow::Result<bool> {
    let target = SocketAddr::new(mesh.server().ip(), port).to_string();
    let stranger = mesh.lab.pod("stranger");
    let mut command = if port == peer::WHO {
        let mut who = stranger.command(&mesh.peer_program());
        who.args(["who", &target]);
        who
    } else {
        let version =
            if port == servers::ports::HTTP2 { "--http2-prior-knowledge" } else { "--http1.1" };
        let mut curl = stranger.command("curl");
        curl.args(["-sS", "-m", "20", version, &format!("http://{target}/")]);
        curl
    };
    Ok(mesh_netns::process::run(&mut command, PATIENCE)?.success())
}

/// What is said of a port goes before what is said of the workload, and that before what is said of the mesh.
pub(crate) fn modes_of_ports(mesh: &mut Mesh) -> anyhow::Result<()> {
    const PORTS: [u16; 3] = [servers::ports::HTTP, servers::ports::HTTP2, peer::WHO];
    let strict = json!({ "mtls": { "mode": "STRICT" } });
    let of_server = |mode: &str, ports: Value| {
        let selector = json!({ "matchLabels": { "app": "server" } });
        let spec =
            json!({ "selector": selector, "mtls": { "mode": mode }, "portLevelMtls": ports });
        manifest::peer_authentication("mesh", "of-ports", &spec)
    };
    let mode = |mode: &str| json!({ "mode": mode });
    let (http, http2) = (PORTS[0].to_string(), PORTS[1].to_string());
    let rows = [
        // STRICT mesh, the workload says nothing of its own, one of its ports is PERMISSIVE.
        (
            vec![
                manifest::peer_authentication("istio-system", "everybody", &strict),
                of_server("UNSET", json!({ &*http: mode("PERMISSIVE") })),
            ],
            [true, false, false],
        ),
        // STRICT workload, one port DISABLEd.
        (vec![of_server("STRICT", json!({ &*http: mode("DISABLE") }))], [true, false, false]),
        // PERMISSIVE workload, two STRICT ports.
        (
            vec![of_server(
                "PERMISSIVE",
                json!({ &*http: mode("STRICT"), &*http2: mode("STRICT") }),
            )],
            [false, false, true],
        ),
    ];
    for (objects, expected) in rows {
        for object in &objects {
            mesh.lab.apply(object)?;
        }
        let look = || -> anyhow::Result<()> {
            let open = || -> anyhow::Result<Vec<bool>> {
                PORTS.into_iter().map(|port| open_to_the_stranger(mesh, port)).collect()
            };
            until(&format!("ports {PORTS:?} being open {expected:?}"), PATIENCE, || {
                Ok((open()? == expected).then_some(()))
            })
            .with_context(|| format!("{objects:#?}, but {:?}", open()))?;
            ensure!(open()? == expected, "so for a moment only: {objects:#?}");
            ensure!(mesh.reaches("client", mesh.server())?, "one that proves itself is refused");
            Ok(())
        };
        let outcome = look();
        for object in &objects {
            mesh.lab.delete(object)?;
        }
        until("all ports being open again", PATIENCE, || {
            let open = PORTS.into_iter().map(|port| open_to_the_stranger(mesh, port));
            Ok(open.collect::<Result<Vec<_>, _>>()?.into_iter().all(|open| open).then_some(()))
        })?;
        outcome?;
    }
    Ok(())
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
