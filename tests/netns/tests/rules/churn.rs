//! Workloads come and go by the thousand, and addresses change hands: nothing goes wrong, nothing stays.

use std::io::Write as _;
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use mesh_netns::peer::ports as peer;
use mesh_netns::process::Process;
use mesh_netns::servers;
use mesh_netns::wait::{PATIENCE, until};
use mesh_netns::{Traffic, manifest};

use crate::authority::hold_open;
use crate::mesh::{AMBIENT, LogFromNow, Mesh, field};

const PODS: u16 = 2000;

/// A pod's address is given to another within a second: no stream of the first one's reaches the second.
pub(crate) fn address_given_again(mesh: &mut Mesh) -> anyhow::Result<()> {
    let begun = Instant::now();
    mesh.run_server("mesh", "first")?;
    let making = begun.elapsed();
    let (ipv4, ipv6) = (mesh.lab.pod("first").ipv4, mesh.lab.pod("first").ipv6);
    let target = SocketAddr::new(ipv4, servers::ports::HTTP);
    mesh.wait_for("client", target)?;
    let traffic = Traffic::start(mesh, "client", "reuse", &format!("http://{target}/"))?;
    until("traffic", PATIENCE, || Ok(traffic.log().contains("hello from first").then_some(())))?;
    let mut held = hold_open(mesh, "client", SocketAddr::new(ipv4, peer::IDLE), 2)?;
    let (log_a, log_b) = (LogFromNow::of(mesh, "a")?, LogFromNow::of(mesh, "b")?);
    let deleted = Instant::now();
    mesh.lab.delete_pod("first")?;
    // The node's kernel would look for the first pod's link address for some ten seconds.
    mesh_netns::net::ip(Some(mesh.lab.node("b").netns()), "neigh flush dev cni0")?;
    // host-local goes on behind the last address it gave.
    give_next(mesh, ipv4, 0)?;
    give_next(mesh, ipv6, 1)?;
    mesh.lab.run_pod("b", mesh_netns::PodSpec::new("mesh", "second"))?;
    let took = deleted.elapsed();
    let second = mesh.lab.pod("second");
    ensure!(second.ipv4 == ipv4 && second.ipv6 == ipv6, "the addresses were not given again");
    // Within a second, where making a pod and its servers does not take a third of that.
    let limit = Duration::from_secs(1).max(making * 3);
    ensure!(took < limit, "given again only after {took:?}, not {limit:?}");
    let bin_dir = mesh.lab.bin_dir().to_owned();
    let _nginx = servers::nginx(second)?;
    let _peer = servers::peer(second, &bin_dir)?;
    // Before the mesh knows whose the address is, it is an unknown destination: what is meant here goes by the tunnel.
    let to_second = ["dst.workload=\"second\"", "direction=\"inbound\"", "trace.id="];
    until("the second pod answering", PATIENCE, || {
        Ok((!log_b.lines(&to_second)?.is_empty()).then_some(()))
    })?;
    let counted = traffic.finish()?;
    // A held connection was the first pod's: its byte must not come back.
    held.stdin.take().context("no input")?.write_all(b"\n")?;
    ensure!(!held.wait()?.success(), "a connection to the first pod is answered by the second");
    let order: Vec<&str> = counted.log.lines().filter(|l| l.starts_with("hello from")).collect();
    let change = order.iter().position(|line| line.contains("second")).unwrap_or(order.len());
    ensure!(order[change..].iter().all(|line| line.contains("second")), "the first one answers");
    // Each stream that the second pod accepted was dialled as one to the second pod.
    let accepted = log_b.lines(&to_second)?;
    let dialled = log_a.lines(&["direction=\"outbound\"", "trace.id="])?;
    for line in &accepted {
        let identity = Some("spiffe://cluster.local/ns/mesh/sa/second");
        ensure!(field(line, "dst.identity") == identity, "under another identity: {line}");
        let trace = field(line, "trace.id");
        if let Some(source) = dialled.iter().find(|source| field(source, "trace.id") == trace) {
            ensure!(field(source, "dst.identity") == identity, "dialled as another: {source}");
        }
    }
    mesh.lab.delete_pod("second")
}

/// Makes `ip` the next address that node b's `range`th range gives.
fn give_next(mesh: &Mesh, ip: IpAddr, range: u8) -> anyhow::Result<()> {
    let before = match ip {
        IpAddr::V4(ip) => IpAddr::from((u32::from(ip) - 1).to_be_bytes()),
        IpAddr::V6(ip) => IpAddr::from((u128::from(ip) - 1).to_be_bytes()),
    };
    let file = format!("node-b/ipam/lab/last_reserved_ip.{range}");
    Ok(std::fs::write(mesh.lab.folder().join(file), before.to_string())?)
}

/// A pod whose label is taken away keeps its connections for as long as they last, far beyond what an agent that ends would
/// give them; new ones go past the mesh at once. When the last has ended nothing of the mesh is left in the pod.
pub(crate) fn label_taken_away(mesh: &mut Mesh) -> anyhow::Result<()> {
    /// `--drain-seconds` is 5 unless it is given.
    const DRAIN: Duration = Duration::from_secs(5);
    let labelled = manifest::namespace("leaving", &[AMBIENT]);
    mesh.lab.apply(&labelled)?;
    mesh.lab.run_pod("a", mesh_netns::PodSpec::new("leaving", "leaver"))?;
    let server = mesh.server();
    mesh.wait_for("leaver", server)?;
    let mut held = hold_open(mesh, "leaver", SocketAddr::new(server.ip(), peer::IDLE), 3)?;
    mesh.lab.apply(&manifest::namespace("leaving", &[]))?;
    let phase = |mesh: &Mesh, phase: &str| {
        until(&format!("the pod being {phase}"), PATIENCE, || {
            let pods = mesh.lab.node("a").culvert(&["pod", "list", "-o", "json"])?.output()?;
            let pods: Vec<serde_json::Value> = serde_json::from_str(&pods)?;
            let is_it = |pod: &serde_json::Value| {
                let text = pod.to_string().to_lowercase();
                text.contains("leaver") && text.contains(phase)
            };
            Ok(pods.iter().any(is_it).then_some(()))
        })
    };
    phase(mesh, "draining")?;
    let left = Instant::now();
    let log = LogFromNow::of(mesh, "a")?;
    while left.elapsed() < DRAIN + Duration::from_secs(3) {
        ensure!(mesh.reaches("leaver", server)?, "new connections fail while old ones go on");
        std::thread::sleep(Duration::from_millis(200));
    }
    let through = log.lines(&["src.workload=\"leaver\""])?;
    ensure!(through.is_empty(), "still by the agent: {through:?}");
    held.stdin.take().context("no input")?.write_all(b"\n")?;
    ensure!(held.wait()?.success(), "connections were lost when the label was taken away");
    phase(mesh, "excluded")?;
    let rules = mesh.lab.pod("leaver").shell("ip rule show; ip -6 rule show")?.output()?;
    ensure!(!rules.contains("lookup 133"), "left behind: {rules}");
    mesh.lab.delete_pod("leaver")?;
    mesh.lab.delete(&labelled)
}

/// Puts 2,000 pods in, waits until both agents know them, takes them out, and waits until both have forgotten them.
fn come_and_go(mesh: &Mesh) -> anyhow::Result<()> {
    let known = |node: &str| -> anyhow::Result<usize> {
        let workloads = mesh.lab.node(node).culvert(&["config", "workloads", "-o", "json"])?;
        Ok(workloads.output()?.matches("\"name\": \"distant-").count())
    };
    for number in 0..PODS {
        mesh.lab.apply(&manifest::distant_pod("mesh", number))?;
    }
    for node in ["a", "b"] {
        until("the agent knowing all pods", Duration::from_secs(30), || {
            Ok((known(node)? == usize::from(PODS)).then_some(()))
        })?;
    }
    for number in 0..PODS {
        mesh.lab.delete(&manifest::distant_pod("mesh", number))?;
    }
    for node in ["a", "b"] {
        until("the agent having forgotten all pods", Duration::from_secs(30), || {
            Ok((known(node)? == 0).then_some(()))
        })?;
    }
    Ok(())
}

/// The resident memory of the agents and the controller. KiB.
fn memory(mesh: &Mesh) -> anyhow::Result<Vec<(&'static str, u64)>> {
    let programs = [
        ("agent a", mesh.lab.node("a").agent()),
        ("agent b", mesh.lab.node("b").agent()),
        ("controller", mesh.lab.controller()),
    ];
    let size = |(name, program): (&'static str, Option<&Process>)| -> anyhow::Result<_> {
        Ok((name, program.with_context(|| format!("{name} does not run"))?.rss_kib()?))
    };
    programs.into_iter().map(size).collect()
}

/// Waits until the agents and the controller hold no more than `most` allows, given what each held before; returns what they hold.
fn settled(
    mesh: &Mesh,
    before: &[(&'static str, u64)],
    what: &str,
    most: impl Fn(u64) -> u64,
) -> anyhow::Result<Vec<(&'static str, u64)>> {
    let back = until(what, Duration::from_secs(60), || {
        let now = memory(mesh)?;
        let whole = before.iter().zip(&now).all(|((_, was), (_, is))| *is <= most(*was));
        Ok(whole.then_some(now))
    });
    back.with_context(|| format!("KiB before {before:?}, after {:?}", memory(mesh).ok()))
}

/// 2,000 pods come and go while a pod makes connections: none fails, and the memory they took comes back.
///
/// What a program touches for the first time when it meets many pods (code, thread stacks, one slab per size) stays, and is a fifth of
/// a controller that holds a dozen objects. So the first round has an allowance in bytes, and the rounds after it must not add.
pub(crate) fn two_thousand_pods(mesh: &mut Mesh) -> anyhow::Result<()> {
    let url = format!("http://{}/", mesh.server());
    let node = manifest::node("c", &["192.168.77.3".parse()?], &[]);
    mesh.lab.apply(&node)?;
    let fresh = memory(mesh)?;
    let traffic = Traffic::start(mesh, "client", "churn", &url)?;
    come_and_go(mesh)?;
    let warm = settled(mesh, &fresh, "memory within 10 MiB of before", |was| was + 10 * 1024)?;
    come_and_go(mesh)?;
    come_and_go(mesh)?;
    let made = traffic.finish_whole()?;
    ensure!(made > 50, "only {made} connections were made meanwhile");
    settled(mesh, &warm, "memory within 20 % of before", |was| was * 6 / 5)?;
    mesh.lab.delete(&node)
}
