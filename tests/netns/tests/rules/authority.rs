//! What the authority changes while traffic runs: a new root costs nothing, a revocation cuts at once and is made good.

use std::io::{BufRead as _, BufReader, Read as _};
use std::net::{IpAddr, SocketAddr};
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

/// How soon a revoked certificate is replaced: the controller looks every second and the agent every two, and retries after one.
const RENEWED: Duration = Duration::from_secs(20);

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
    certificate_of(mesh, node, "mesh", account)
}

fn certificate_of(
    mesh: &Mesh,
    node: &str,
    namespace: &str,
    account: &str,
) -> anyhow::Result<Value> {
    let certs = mesh.lab.node(node).culvert(&["certs", "-o", "json"])?.output()?;
    let certs: Vec<Value> = serde_json::from_str(&certs)?;
    let identity = format!("spiffe://cluster.local/ns/{namespace}/sa/{account}");
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

/// Serial number of the leaf (0) or of what is above it, in hexadecimal.
fn serial(certificate: &Value, depth: usize) -> anyhow::Result<String> {
    let serial = certificate["certChain"][depth]["serialNumber"].as_str();
    Ok(serial.with_context(|| format!("no serial at {depth}"))?.to_owned())
}

/// A server whose certificate is revoked loses its connections: the client's agent cuts them, and says why. With its next
/// certificate, which it has within seconds, it is dialled again.
pub(crate) fn revoked_server(mesh: &mut Mesh) -> anyhow::Result<()> {
    let bin_dir = mesh.lab.bin_dir().to_owned();
    let pod = mesh.lab.run_pod("b", PodSpec::new("mesh", "convict"))?;
    let _nginx = servers::nginx(pod)?;
    let _peer = servers::peer(pod, &bin_dir)?;
    let target = SocketAddr::new(pod.ipv4, servers::ports::HTTP);
    mesh.wait_for("client", target)?;
    let mut held = hold_open(mesh, "client", SocketAddr::new(target.ip(), peer::IDLE), 3)?;
    let mut others =
        hold_open(mesh, "visitor", SocketAddr::new(mesh.server().ip(), peer::IDLE), 3)?;
    let revoked = serial(&certificate(mesh, "b", "convict")?, 0)?;
    let log = LogFromNow::of(mesh, "a")?;
    let rejected = || -> anyhow::Result<f64> {
        let labels = [("reporter", "source")];
        Ok(sum_of(&mesh.lab.node("a").metrics()?, "istio_crl_policy_rejections_total", &labels))
    };
    let rejected_before = rejected()?;
    mesh.lab.controller_command(&["ca", "revoke", "--serial", &revoked])?;
    until("the revoked server's connections being cut", PATIENCE, || {
        Ok((open_connections(mesh, "client")? == 0).then_some(()))
    })?;
    let address = format!("dst.addr={}:", target.ip());
    let parts = ["direction=\"outbound\"", "reason=cert_revoked", &address];
    log.line(&parts).with_context(|| mesh.lab.node("a").agent_log(5))?;
    until("each connection that was cut being counted", PATIENCE, || {
        Ok((rejected()? >= rejected_before + 3.0).then_some(()))
    })?;
    let metrics = mesh.lab.node("a").metrics()?;
    let labels =
        [("reporter", "source"), ("response_flags", "CERT_REVOKED"), ("source_workload", "client")];
    let failed = sum_of(&metrics, "istio_tcp_connections_failed_total", &labels);
    ensure!(failed > 0.0, "no connection failed for a revoked certificate");
    // It is this server, not all of them.
    let left = open_connections(mesh, "visitor")?;
    ensure!(left == 3, "the revocation left {left} of another server's 3 connections");
    until("the server being certified anew", RENEWED, || {
        Ok((serial(&certificate(mesh, "b", "convict")?, 0)? != revoked).then_some(()))
    })?;
    mesh.wait_for("client", target)?;
    for child in [&mut held, &mut others] {
        child.kill()?;
        child.wait()?;
    }
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
    let leaf = serial(&certificate(mesh, "a", "suspect")?, 0)?;
    let log = LogFromNow::of(mesh, "b")?;
    let rejected = || -> anyhow::Result<f64> {
        let labels = [("reporter", "destination")];
        Ok(sum_of(&mesh.lab.node("b").metrics()?, "istio_crl_policy_rejections_total", &labels))
    };
    let rejected_before = rejected()?;
    mesh.lab.controller_command(&["ca", "revoke", "--serial", &leaf])?;
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
    // It is the certificate that was revoked, not the pod.
    until("the suspect being certified anew", RENEWED, || {
        Ok((serial(&certificate(mesh, "a", "suspect")?, 0)? != leaf).then_some(()))
    })?;
    mesh.wait_for("suspect", mesh.server())?;
    for child in [&mut suspects, &mut others] {
        child.kill()?;
        child.wait()?;
    }
    mesh.lab.delete_pod("suspect")
}

/// The issuer of every certificate is revoked under traffic: what it vouched for is cut, every pod is certified anew at once,
/// and from then on no connection fails. Each that failed meanwhile did so for that reason.
pub(crate) fn revoked_intermediate(mesh: &mut Mesh) -> anyhow::Result<()> {
    let urls = format!("http://{}/ http://{}/", mesh.server(), server6(mesh));
    let mut held = hold_open(mesh, "visitor", SocketAddr::new(mesh.server().ip(), peer::IDLE), 3)?;
    let traffic = Traffic::start(mesh, "client", "intermediate", &urls)?;
    traffic.more(10, "hello from server")?;
    let pods = [("a", "client", "mesh"), ("a", "visitor", "far"), ("b", "server", "mesh")];
    let issuer = |(node, account, namespace): (&str, &str, &str)| {
        serial(&certificate_of(mesh, node, namespace, account)?, 1)
    };
    let revoked = issuer(pods[0])?;
    let logs = [LogFromNow::of(mesh, "a")?, LogFromNow::of(mesh, "b")?];
    let begun = Instant::now();
    mesh.lab.controller_command(&["ca", "revoke", "--serial", &revoked])?;
    until("what the issuer vouched for being cut", PATIENCE, || {
        Ok((open_connections(mesh, "visitor")? == 0).then_some(()))
    })?;
    for pod in pods {
        until(&format!("{pod:?} being certified by another issuer"), RENEWED, || {
            Ok((issuer(pod)? != revoked).then_some(()))
        })?;
    }
    for target in [mesh.server(), server6(mesh)] {
        mesh.wait_for("client", target)?;
    }
    let took = begun.elapsed();
    ensure!(took < RENEWED, "connections work again only after {took:?}");
    let during = traffic.finish()?;
    let after = Traffic::start(mesh, "client", "successor", &urls)?;
    after.more(100, "hello from server")?;
    after.finish_whole()?;
    let refused: Vec<String> = logs[0]
        .lines(&["direction=\"outbound\"", "src.workload=\"client\""])?
        .into_iter()
        .filter(|line| field(line, "reason") != Some("complete"))
        .collect();
    // Where the far end refused the client's certificate, the near one saw a tunnel close; the far end's log says why.
    let refused_there = !logs[1].lines(&["certificate of an issuer is revoked"])?.is_empty();
    let explained = |line: &&String| match field(line, "reason") {
        Some("cert_revoked") => true,
        Some("tunnel_closed") => refused_there,
        _ => false,
    };
    let strange: Vec<_> = refused.iter().filter(|line| !explained(line)).collect();
    ensure!(strange.is_empty(), "failed for another reason: {strange:#?}");
    let failed = u64::try_from(refused.len())?;
    ensure!(
        during.failed > 0 && failed >= during.failed,
        "{} of {} connections failed, the log has {failed}",
        during.failed,
        during.made + during.failed
    );
    held.kill()?;
    held.wait()?;
    Ok(())
}

fn server6(mesh: &Mesh) -> SocketAddr {
    SocketAddr::new(mesh.lab.pod("server").ipv6, servers::ports::HTTP)
}

/// Connections of every kind, by both families, from before a root rotation to after its old root's end, while leaves live
/// for 40 s and are renewed after 30: none is disturbed.
pub(crate) fn to_the_old_roots_end(mesh: &mut Mesh) -> anyhow::Result<()> {
    mesh.lab.kill_controller();
    mesh.lab.start_controller_with(&["--max-certificate-ttl", "40s"])?;
    mesh.run_server("mesh", "brief-server")?;
    for (node, name) in [("a", "brief-client"), ("a", "brief-mate"), ("b", "brief-guest")] {
        mesh.lab.run_pod(node, PodSpec::new("mesh", name))?;
    }
    let server = mesh.lab.pod("brief-server");
    let targets = [server.ipv4, server.ipv6].map(|ip| SocketAddr::new(ip, servers::ports::HTTP));
    let clients = ["brief-client", "brief-mate", "brief-guest"];
    for client in clients {
        for target in targets {
            mesh.wait_for(client, target)?;
        }
    }
    let pods =
        [("a", "brief-client"), ("a", "brief-mate"), ("b", "brief-guest"), ("b", "brief-server")];
    let leaves = |mesh: &Mesh| -> anyhow::Result<Vec<String>> {
        pods.iter().map(|(node, pod)| serial(&certificate(mesh, node, pod)?, 0)).collect()
    };
    let roots = |mesh: &Mesh| -> anyhow::Result<Vec<String>> {
        let all = mesh.lab.controller_command(&["ca", "root"])?;
        Ok(all.split_inclusive("-----END CERTIFICATE-----").map(|one| one.trim().into()).collect())
    };
    let (first_leaves, first_roots) = (leaves(mesh)?, roots(mesh)?);
    let signing = &first_roots[0];
    let live = [
        Live::start(mesh, "brief-client", targets[0].ip())?,
        Live::start(mesh, "brief-client", targets[1].ip())?,
    ];
    let urls = targets.map(|target| format!("http://{target}/")).join(" ");
    let traffic = [
        Traffic::start(mesh, "brief-mate", "renewal", &urls)?,
        Traffic::start(mesh, "brief-guest", "renewal", &urls)?,
    ];
    mesh.lab.controller_command(&["ca", "rotate-root", "--overlap", "2s"])?;
    // Its last leaf has ended 40 s after the new root has begun to sign.
    let ended = until("the old root's end", PATIENCE * 2, || {
        Ok((!roots(mesh)?.contains(signing)).then_some(()))
    });
    let forgotten = until("every agent having given the old root up", PATIENCE, || {
        let left = roots(mesh)?.iter().filter(|root| !root.is_empty()).count();
        for (node, pod) in pods {
            let held = certificate(mesh, node, pod)?;
            if held["rootCerts"].as_array().map_or(0, Vec::len) != left {
                return Ok(None);
            }
        }
        Ok(Some(()))
    });
    for one in &traffic {
        one.more(40, "hello from brief-server")?;
    }
    for one in live {
        let seen = one.finish()?;
        ensure!(seen.iter().all(|count| *count > 0), "nothing was done: {seen:?}");
    }
    for one in traffic {
        one.finish_whole()?;
    }
    ended.and(forgotten)?;
    let renewed = leaves(mesh)?;
    let same = first_leaves.iter().zip(&renewed).find(|(first, last)| first == last);
    ensure!(same.is_none(), "a leaf was never renewed: {same:?}");
    for pod in ["brief-client", "brief-mate", "brief-guest", "brief-server"] {
        mesh.lab.delete_pod(pod)?;
    }
    mesh.lab.kill_controller();
    mesh.lab.start_controller()?;
    // Those with leaves of a day, under a root that ended before them, were certified anew.
    mesh.wait_for("client", mesh.server())
}

/// Connections of every kind that a pod keeps, see [`mesh_netns::peer::live`]; they end with the value.
struct Live {
    child: std::process::Child,
    said: BufReader<std::process::ChildStdout>,
}

impl Live {
    fn start(mesh: &Mesh, pod: &str, server: IpAddr) -> anyhow::Result<Self> {
        let mut command = mesh.lab.pod(pod).command(&mesh.peer_program());
        let http = servers::ports::HTTP.to_string();
        let mut child = command
            .args(["live", &server.to_string(), &http, "--rest-ms", "50"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()?;
        let said = BufReader::new(child.stdout.take().context("no output")?);
        let mut live = Self { child, said };
        let mut line = String::new();
        live.said.read_line(&mut line)?;
        ensure!(line.trim() == "live", "the client said {line:?}");
        Ok(live)
    }

    /// Ends the connections, and gives how much each kind did; an error when one of them was not whole.
    fn finish(mut self) -> anyhow::Result<Vec<u64>> {
        drop(self.child.stdin.take());
        let mut line = String::new();
        self.said.read_line(&mut line)?;
        let mut complaint = String::new();
        self.child.stderr.take().context("no errors")?.read_to_string(&mut complaint)?;
        ensure!(self.child.wait()?.success(), "a connection was disturbed: {complaint}");
        line.split_whitespace().map(|count| Ok(count.parse()?)).collect()
    }
}

impl Drop for Live {
    fn drop(&mut self) {
        // One that has ended already is only waited for.
        if let Err(error) = self.child.kill().and_then(|()| self.child.wait()) {
            eprintln!("ending live connections: {error}");
        }
    }
}
