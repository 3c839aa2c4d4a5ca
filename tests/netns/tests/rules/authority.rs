//! What the authority changes while traffic runs: a new root costs nothing, a revocation cuts at once.

use std::io::{BufRead as _, BufReader};
use std::net::SocketAddr;
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use mesh_model::ports;
use mesh_netns::peer::ports as peer;
use mesh_netns::wait::{PATIENCE, until};
use mesh_netns::{PodSpec, Traffic, servers};
use serde_json::Value;

use crate::identity::{CLIENT, SERVER, tunnel_port};
use crate::mesh::{LogFromNow, Mesh, field, sum_of};
use crate::tls::{Wanted, client, knock};

/// Connections of pods, and handshakes of a client with a certificate of the old root, go on through a rotation.
pub(crate) fn root_rotates_under_traffic(mesh: &mut Mesh) -> anyhow::Result<()> {
    let url = format!("http://{}/", mesh.server());
    let traffic = Traffic::start(mesh, "client", "rotation", &url)?;
    let old = Wanted::of(CLIENT).signed_by_the_mesh(mesh)?;
    let knocks = |mesh: &Mesh| -> anyhow::Result<()> {
        let config = client(mesh, Some(old.clone()), SERVER)?;
        let knocked = knock(mesh, tunnel_port(mesh), &config)?;
        ensure!(knocked.answer.is_ok(), "the old root's client is refused: {knocked:?}");
        Ok(())
    };
    let signing = |mesh: &Mesh| -> anyhow::Result<String> {
        let roots = mesh.lab.controller_command(&["ca", "root"])?;
        Ok(roots.split_inclusive("-----END CERTIFICATE-----").next().unwrap_or_default().to_owned())
    };
    let before = signing(mesh)?;
    mesh.lab.controller_command(&["ca", "rotate-root", "--overlap", "2s"])?;
    until("the new root signing", PATIENCE, || {
        knocks(mesh)?;
        Ok((signing(mesh)? != before).then_some(()))
    })?;
    // A pod that is certified under the new root and those of the old one talk, both ways of trust.
    mesh.lab.run_pod("a", PodSpec::new("mesh", "newcomer"))?;
    mesh.wait_for("newcomer", mesh.server())?;
    for _ in 0..10 {
        ensure!(mesh.reaches("newcomer", mesh.server())?, "old and new root do not meet");
        knocks(mesh)?;
    }
    let held = certificate(mesh, "a", "newcomer")?;
    let roots = held["rootCerts"].as_array().map_or(0, Vec::len);
    ensure!(roots == 2, "{roots} roots are believed during the overlap");
    let made = traffic.finish_whole()?;
    ensure!(made > 20, "only {made} connections were made meanwhile");
    // The controller proves itself under the new root by now, which the file that the agents were given does not have.
    let logs = [LogFromNow::of(mesh, "a")?, LogFromNow::of(mesh, "b")?];
    mesh.lab.kill_controller();
    mesh.lab.start_controller()?;
    for log in &logs {
        log.line(&["the controller is connected"])?;
    }
    // Neither does an agent that starts anew have it, but for what it has saved.
    let log = LogFromNow::of(mesh, "a")?;
    let index = mesh.lab.node_index("a");
    mesh.lab.node_mut("a").stop_agent()?;
    mesh.lab.start_agent(index)?;
    mesh.lab.node_mut("a").wait_ready()?;
    log.line(&["the controller is connected"])?;
    mesh.wait_for("client", mesh.server())?;
    mesh.lab.delete_pod("newcomer")
}

/// The certificate that a node's agent holds for a service account of `mesh`.
fn certificate(mesh: &Mesh, node: &str, account: &str) -> anyhow::Result<Value> {
    let certs = mesh.lab.node(node).culvert(&["certs", "-o", "json"])?.output()?;
    let certs: Vec<Value> = serde_json::from_str(&certs)?;
    let identity = format!("spiffe://cluster.local/ns/mesh/sa/{account}");
    let held = certs.into_iter().find(|held| held["identity"] == *identity);
    held.with_context(|| format!("no certificate of {identity}"))
}

/// Quiet connections of a pod, open until the value is dropped.
pub(crate) fn hold_open(
    mesh: &Mesh,
    pod: &str,
    target: SocketAddr,
    count: u32,
) -> anyhow::Result<std::process::Child> {
    let mut idle = mesh.lab.pod(pod).command(&mesh.peer_program());
    let mut idle = idle
        .args(["idle", &target.to_string(), &count.to_string(), "--hold"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()?;
    let mut line = String::new();
    BufReader::new(idle.stdout.as_mut().context("no output")?).read_line(&mut line)?;
    ensure!(line.trim() == format!("open {count}"), "the client said {line:?}");
    Ok(idle)
}

/// How many connections of a captured pod's programs are open: each is one to the agent's port.
fn open_connections(mesh: &Mesh, pod: &str) -> anyhow::Result<usize> {
    let line = format!("ss -Htn state established dport = :{} | wc -l", ports::OUTBOUND);
    Ok(mesh.lab.pod(pod).shell(&line)?.output()?.trim().parse()?)
}

/// A server whose certificate is revoked is not dialled: the client's agent refuses it, and says why.
pub(crate) fn revoked_server(mesh: &mut Mesh) -> anyhow::Result<()> {
    let pod = mesh.lab.run_pod("b", PodSpec::new("mesh", "convict"))?;
    let _nginx = servers::nginx(pod)?;
    let target = SocketAddr::new(pod.ipv4, servers::ports::HTTP);
    mesh.wait_for("client", target)?;
    let leaf = certificate(mesh, "b", "convict")?;
    let serial = leaf["certChain"][0]["serialNumber"].as_str().context("no serial")?.to_owned();
    let log = LogFromNow::of(mesh, "a")?;
    mesh.lab.controller_command(&["ca", "revoke", "--serial", &serial])?;
    until("the revoked server being refused", PATIENCE, || {
        Ok((!mesh.reaches("client", target)?).then_some(()))
    })?;
    ensure!(!mesh.reaches("client", target)?, "refused once only");
    let address = format!("dst.addr={}:", target.ip());
    let parts = ["direction=\"outbound\"", "reason=cert_revoked", &address];
    let line = log.line(&parts).with_context(|| mesh.lab.node("a").agent_log(5))?;
    ensure!(line.contains("certificate is revoked"), "the log's words: {line}");
    let metrics = mesh.lab.node("a").metrics()?;
    let labels =
        [("reporter", "source"), ("response_flags", "CERT_REVOKED"), ("source_workload", "client")];
    let failed = sum_of(&metrics, "istio_tcp_connections_failed_total", &labels);
    ensure!(failed > 0.0, "no connection failed for a revoked certificate");
    // It is this server, not all of them.
    ensure!(mesh.reaches("client", mesh.server())?, "another server is refused as well");
    mesh.lab.delete_pod("convict")
}

/// A revoked certificate's live connections end at once, for that reason; others' go on.
pub(crate) fn revocation_cuts(mesh: &mut Mesh) -> anyhow::Result<()> {
    mesh.lab.run_pod("a", PodSpec::new("mesh", "suspect"))?;
    mesh.wait_for("suspect", mesh.server())?;
    let target = SocketAddr::new(mesh.server().ip(), peer::IDLE);
    let mut suspects = hold_open(mesh, "suspect", target, 3)?;
    let mut others = hold_open(mesh, "client", target, 3)?;
    for pod in ["suspect", "client"] {
        let open = open_connections(mesh, pod)?;
        ensure!(open == 3, "{pod} has {open} connections, not 3");
    }
    let leaf = certificate(mesh, "a", "suspect")?;
    let serial = leaf["certChain"][0]["serialNumber"].as_str().context("no serial")?.to_owned();
    let log = LogFromNow::of(mesh, "b")?;
    let rejected = || -> anyhow::Result<f64> {
        let labels = [("reporter", "destination")];
        Ok(sum_of(&mesh.lab.node("b").metrics()?, "istio_crl_policy_rejections_total", &labels))
    };
    let rejected_before = rejected()?;
    mesh.lab.controller_command(&["ca", "revoke", "--serial", &serial])?;
    let revoked = Instant::now();
    until("the suspect's live connections being cut", PATIENCE, || {
        Ok((open_connections(mesh, "suspect")? == 0).then_some(()))
    })?;
    // The controller looks at its authority every second, then agents are told.
    let took = revoked.elapsed();
    ensure!(took < Duration::from_secs(10), "cut only after {took:?}");
    let line = log.line(&["src.workload=\"suspect\"", "direction=\"inbound\""])?;
    ensure!(field(&line, "reason") == Some("cert_revoked"), "the reason in the log: {line}");
    until("each connection that was cut being counted", PATIENCE, || {
        Ok((rejected()? >= rejected_before + 3.0).then_some(()))
    })?;
    let left = open_connections(mesh, "client")?;
    ensure!(left == 3, "the revocation left {left} of another's 3 connections");
    for child in [&mut suspects, &mut others] {
        child.kill()?;
        child.wait()?;
    }
    mesh.lab.delete_pod("suspect")
}
