//! The direct path: pods of one node talk without the agent where policy allows it, and only then.
//!
//! The lab's agents are set to tunnels, since all other trials look for plaintext on node a. Each trial here hands node a over
//! to an agent with the direct path, and back.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use mesh_netns::manifest;
use mesh_netns::peer::ports as peer;
use mesh_netns::servers::{self, ports};
use mesh_netns::wait::{PATIENCE, until};
use mesh_netns::{Lab, PodSpec, Process};
use serde_json::{Value, json};

use crate::enrolment::{AMBIENT, enroll};
use crate::mesh::{Held, Mesh};
use crate::watch::{End, Scope, Watch};

/// What the mesh promises of a change that denies.
pub(crate) const LIMIT: Duration = Duration::from_secs(1);
/// How long verdicts are in force after their agent's last word.
const LEASE: Duration = Duration::from_secs(2);
/// What is said between two pods of the node; a sniffer may see it there, and nowhere else.
const ASIDE: &str = "said-between-two-pods";

/// Runs `work` with the direct path on node a, and goes back to tunnels.
pub(crate) fn with_direct(
    mesh: &mut Mesh,
    work: fn(&mut Mesh) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    switch(mesh, "direct")?;
    let outcome = work(mesh);
    // A trial that failed may have left no agent.
    let back = if mesh.lab.node("a").agent().is_some() {
        switch(mesh, "tunnel")
    } else {
        mesh.restart_agent("a")
    };
    outcome.and(back)
}

/// Hands node a over to an agent with another setting.
pub(crate) fn switch(mesh: &mut Mesh, setting: &str) -> anyhow::Result<()> {
    let index = mesh.lab.node_index("a");
    let predecessor = mesh.lab.start_successor(index, &["--same-node", setting])?;
    ended_well(predecessor)?;
    mesh.lab.node_mut("a").wait_ready()
}

fn ended_well(mut predecessor: Process) -> anyhow::Result<()> {
    until("the predecessor's end", PATIENCE, || Ok((!predecessor.running()).then_some(())))?;
    let status = predecessor.stop(PATIENCE)?;
    ensure!(status.success(), "the predecessor ended with {status}");
    Ok(())
}

/// A pod by IPv4, IPv6, and IPv4 in an IPv6 socket.
pub(crate) fn three_ways(mesh: &Mesh, pod: &str, port: u16) -> [SocketAddr; 3] {
    let [v4, v6] = mesh.targets(pod, port);
    let IpAddr::V4(ip) = v4.ip() else { return [v4, v6, v4] };
    [v4, v6, SocketAddr::new(Ipv4Addr::to_ipv6_mapped(&ip).into(), port)]
}

/// The pod's open connections that lead straight to `target`, as its own socket table has them.
pub(crate) fn straight(mesh: &Mesh, pod: &str, target: SocketAddr) -> anyhow::Result<usize> {
    let line = format!("ss -Htn state established dport = :{}", target.port());
    let sockets = mesh.pod(pod).shell(&line)?.output()?;
    let address = target.ip().to_canonical().to_string();
    Ok(sockets
        .lines()
        .filter(|line| {
            line.contains(&format!("{address}]:")) || line.contains(&format!("{address}:"))
        })
        .count())
}

/// Waits until a new connection of the pair goes directly.
pub(crate) fn wait_for_direct(mesh: &Mesh, pod: &str, target: SocketAddr) -> anyhow::Result<()> {
    until(&format!("{pod} reaching {target} directly"), PATIENCE, || {
        let before = straight(mesh, pod, target)?;
        let Ok(held) = mesh.hold(pod, target, 1) else { return Ok(None) };
        let after = straight(mesh, pod, target)?;
        drop(held);
        Ok((after == before + 1).then_some(()))
    })
}

/// What became of one connection of a pod on which a byte is echoed.
pub(crate) fn try_once(mesh: &Mesh, pod: &str, target: SocketAddr) -> Result<(), String> {
    let tried = mesh.peer(pod, &["idle", &target.to_string(), "1"]);
    tried.map(drop).map_err(|error| format!("{error:#}"))
}

/// Quiet direct connections of a pod.
fn hold_direct(mesh: &Mesh, pod: &str, target: SocketAddr, count: u32) -> anyhow::Result<Held> {
    let before = straight(mesh, pod, target)?;
    wait_for_direct(mesh, pod, target)?;
    let held = mesh.hold(pod, target, count)?;
    // Once the connection that was only looked at is gone.
    until(&format!("{count} direct connections to {target}"), PATIENCE, || {
        Ok((straight(mesh, pod, target)? == before + count as usize).then_some(()))
    })?;
    Ok(held)
}

/// Waits until the agent knows of exactly `count` direct connections of the client: earlier ones are told by then.
fn wait_for_open(mesh: &Mesh, count: usize) -> anyhow::Result<()> {
    until(&format!("{count} direct connections being shown"), PATIENCE, || {
        let shown = mesh.lab.node("a").culvert(&["connections", "--pod", "mesh/client"])?;
        let open = shown.output()?.lines().filter(|line| line.contains("direct")).count();
        Ok((open == count).then_some(()))
    })
}

/// A counter of the agent of node a, summed over the series with all of `labels`.
pub(crate) fn counted(mesh: &Mesh, name: &str, labels: &[(&str, &str)]) -> anyhow::Result<u64> {
    let metrics = mesh.lab.node("a").metrics()?;
    let is_it = |line: &&str| {
        line.strip_prefix(name).is_some_and(|rest| rest.starts_with(['{', ' ']))
            && labels.iter().all(|(key, value)| line.contains(&format!("{key}=\"{value}\"")))
    };
    let value = |line: &str| line.rsplit(' ').next()?.parse::<f64>().ok();
    let sum: f64 = metrics.lines().filter(is_it).filter_map(value).sum();
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a counter")]
    Ok(sum as u64)
}

pub(crate) fn dialled(mesh: &Mesh) -> anyhow::Result<u64> {
    counted(mesh, "culvert_capture_total", &[("event", "direct_dialled")])
}

/// The access log of node a from now on.
pub(crate) struct Log(usize);

impl Log {
    /// Lines about what is over may wait to be written: from when the log rests.
    pub(crate) fn from_now(mesh: &Mesh) -> anyhow::Result<Self> {
        let length = || mesh.lab.node("a").agent_log(usize::MAX).len();
        let seen = std::cell::Cell::new(length());
        until("the log resting", PATIENCE, || {
            std::thread::sleep(Duration::from_millis(100));
            let now = length();
            Ok((seen.replace(now) == now).then_some(()))
        })?;
        Ok(Self(seen.get()))
    }

    pub(crate) fn lines(&self, mesh: &Mesh, parts: &[&str]) -> Vec<String> {
        let log = mesh.lab.node("a").agent_log(usize::MAX);
        let new = log.get(self.0..).unwrap_or_default().lines();
        new.filter(|line| parts.iter().all(|part| line.contains(part))).map(str::to_owned).collect()
    }

    /// Waits until there are `count` lines with all of `parts`; more of them is an error.
    pub(crate) fn exactly(
        &self,
        mesh: &Mesh,
        count: usize,
        parts: &[&str],
    ) -> anyhow::Result<Vec<String>> {
        let what = format!("{count} lines with {parts:?}");
        until(&what, PATIENCE, || Ok((self.lines(mesh, parts).len() >= count).then_some(())))?;
        let lines = self.lines(mesh, parts);
        ensure!(lines.len() == count, "{} instead of {what}: {lines:?}", lines.len());
        Ok(lines)
    }
}

fn field<'l>(line: &'l str, key: &str) -> Option<&'l str> {
    let start = line.find(&format!(" {key}=")).or_else(|| line.find(&format!("\t{key}=")))?;
    let value = &line[start + key.len() + 2..];
    value.trim_start_matches('"').split(['"', ' ', '\n']).next()
}

pub(crate) fn deny_client(name: &str, labels: &Value) -> Value {
    let client = json!({ "source": { "principals": ["cluster.local/ns/mesh/sa/client"] } });
    manifest::authorization_policy(
        "mesh",
        name,
        &json!({
            "selector": { "matchLabels": labels },
            "action": "DENY", "rules": [{ "from": [client] }],
        }),
    )
}

// ---- the trials -------------------------------------------------------------------------------------------------------

/// The first connection of a pair goes through the agent, the next ones do not: addresses are right, plaintext is seen
/// between the two pods alone, nothing is tunnelled, and both reporters tell all of it.
pub(crate) fn second_connection_goes_directly(mesh: &mut Mesh) -> anyhow::Result<()> {
    with_direct(mesh, |mesh| {
        for target in three_ways(mesh, "mate", peer::WHO) {
            let log = Log::from_now(mesh)?;
            let parts = [
                "path=direct",
                &format!("dst.addr={}", SocketAddr::new(target.ip().to_canonical(), target.port())),
            ];
            until("a direct connection", PATIENCE, || {
                let said = mesh.peer("client", &["who", &target.to_string()])?;
                let seen: Vec<SocketAddr> =
                    said.split_whitespace().map(str::parse).collect::<Result<_, _>>()?;
                let [named, client, own] = seen[..] else { anyhow::bail!("peer said {said:?}") };
                ensure!(
                    named == target || named == canonical(target),
                    "getpeername is {named}, dialled {target}"
                );
                ensure!(
                    canonical(own) == canonical(target),
                    "the server is {own}, dialled {target}"
                );
                let v4 = target.ip().to_canonical().is_ipv4();
                let pod = mesh.pod("client");
                let ip = if v4 { pod.ipv4 } else { pod.ipv6 };
                ensure!(client.ip().to_canonical() == ip, "the server sees {client}, not {ip}");
                Ok((!log.lines(mesh, &parts).is_empty()).then_some(()))
            })?;
        }
        only_between_two_pods(mesh)?;
        everything_is_told(mesh)
    })
}

pub(crate) fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

fn only_between_two_pods(mesh: &Mesh) -> anyhow::Result<()> {
    let targets = mesh.targets("mate", ports::HTTP);
    for target in targets {
        wait_for_direct(mesh, "client", target)?;
    }
    let watch = Watch::start(&mesh.lab, "aside")?;
    let before = dialled(mesh)?;
    for target in targets {
        for _ in 0..3 {
            let line = format!("curl -sS -g -m 10 http://{target}/{ASIDE}");
            mesh.pod("client").shell(&line)?.output()?;
        }
    }
    let to_other_node = mesh.targets("server", ports::HTTP)[0];
    let secret = format!("curl -sS -m 10 http://{to_other_node}/{}", crate::watch::SECRET);
    mesh.pod("client").shell(&secret)?.output()?;
    let direct = dialled(mesh)? - before;
    ensure!(direct == 6, "{direct} of 6 connections were direct");
    let seen = watch.finish()?;
    let (client, mate) = (End::of(mesh.pod("client"))?, End::of(mesh.pod("mate"))?);
    let allowed =
        BTreeSet::from([client.tries(), client.deliveries(), mate.tries(), mate.deliveries()]);
    let found = seen.sightings(ASIDE, &Scope::All)?;
    ensure!(found.contains(&mate.deliveries()), "what is said directly was not seen: {found:?}");
    ensure!(found.is_subset(&allowed), "seen at {found:?}, which are not all of {allowed:?}");
    let secret = seen.sightings(crate::watch::SECRET, &Scope::All)?;
    ensure!(secret.is_empty(), "what is said to another node was seen at {secret:?}");
    let (between, inside) = seen.tunnelled(mesh)?;
    ensure!(
        between > 0 && inside == 0,
        "{between} packets of tunnels between the nodes, {inside} inside"
    );
    Ok(())
}

fn everything_is_told(mesh: &Mesh) -> anyhow::Result<()> {
    const BYTES: u64 = 3 << 20;
    let target = mesh.targets("mate", peer::BULK)[0];
    wait_for_direct(mesh, "client", target)?;
    let opened = |reporter| {
        let labels = [
            ("reporter", reporter),
            ("source_workload", "client"),
            ("destination_workload", "mate"),
        ];
        counted(mesh, "istio_tcp_connections_opened_total", &labels)
    };
    // Until what came before is counted.
    let settled = |reporter| {
        let mut last = opened(reporter)?;
        until("counters standing still", PATIENCE, || {
            std::thread::sleep(Duration::from_millis(300));
            let now = opened(reporter)?;
            Ok((std::mem::replace(&mut last, now) == now).then_some(now))
        })
    };
    let before = [settled("source")?, settled("destination")?];
    let (log, direct) = (Log::from_now(mesh)?, dialled(mesh)?);
    mesh.peer("client", &["bulk", &target.to_string(), &BYTES.to_string()])?;
    let direct = usize::try_from(dialled(mesh)? - direct)?;
    ensure!(direct > 0, "the transfer was not direct");
    let to = format!("dst.addr={target}");
    let sent = log.exactly(mesh, direct, &["path=direct", "direction=\"outbound\"", &to])?;
    let received = log.exactly(mesh, direct, &["path=direct", "direction=\"inbound\"", &to])?;
    let number = |line: &str, key: &str| -> anyhow::Result<u64> {
        Ok(field(line, key).with_context(|| format!("no {key} in {line}"))?.parse()?)
    };
    let mut moved = 0;
    for line in &sent {
        let source = field(line, "src.addr").context("a line without source")?;
        let other = received.iter().find(|line| field(line, "src.addr") == Some(source));
        let other = other.with_context(|| format!("the destination says nothing of {line}"))?;
        let (up, down) = (number(line, "bytes_sent")?, number(line, "bytes_recv")?);
        ensure!(
            up == number(other, "bytes_recv")? && down == number(other, "bytes_sent")?,
            "{line}\n{other}"
        );
        for line in [line, other] {
            for (key, account) in [("src.identity", "client"), ("dst.identity", "mate")] {
                let identity = format!("spiffe://cluster.local/ns/mesh/sa/{account}");
                ensure!(field(line, key) == Some(&identity), "{key}: {line}");
            }
            ensure!(field(line, "reason") == Some("complete"), "{line}");
        }
        moved += up + down;
    }
    ensure!(moved >= 2 * BYTES, "{moved} bytes of twice {BYTES} are told");
    for (reporter, before) in [("source", before[0]), ("destination", before[1])] {
        until("the connections being counted", PATIENCE, || {
            Ok((opened(reporter)? == before + direct as u64).then_some(()))
        })?;
    }
    let held = hold_direct(mesh, "client", mesh.targets("mate", peer::IDLE)[0], 2)?;
    wait_for_open(mesh, 2)?;
    let address = mesh.pod("mate").ipv4.to_string();
    let asked = format!("http://agent/same-node?from=mesh/client&to={address}&port={}", peer::IDLE);
    let answer = same_node(&mesh.lab, &asked)?;
    ensure!(answer["direct"] == true && answer["in_force"] == true, "explained: {answer}");
    let status = mesh.lab.node("a").culvert(&["status", "-o", "json"])?.output()?;
    let status: Value = serde_json::from_str(&status)?;
    ensure!(status["sameNode"]["setting"] == "direct", "status: {status:#}");
    ensure!(status["sameNode"]["open"].as_u64() >= Some(2), "status: {status:#}");
    let used = held.use_all()?;
    ensure!(used.is_ok(), "{used:?}");
    Ok(())
}

pub(crate) fn same_node(lab: &Lab, url: &str) -> anyhow::Result<Value> {
    let mut curl = std::process::Command::new("curl");
    curl.args(["-sS", "-m", "10", "--unix-socket"]).arg(lab.node("a").run_dir().join("admin.sock"));
    let said = mesh_netns::process::run(curl.arg(url), PATIENCE)?.output()?;
    serde_json::from_str(&said).with_context(|| format!("the agent said {said}"))
}

/// Connections that the agent delivers under the client's address and direct ones of that client never meet in one
/// four-tuple, however many of both are open.
pub(crate) fn delivered_and_direct_ones_never_meet(mesh: &mut Mesh) -> anyhow::Result<()> {
    const VIP: &str = "10.96.77.5";
    const DELIVERED: u32 = 1500;
    const DIRECT: u32 = 4000;
    with_direct(mesh, |mesh| {
        let port = peer::IDLE;
        // A second endpoint on another node, so that the agent has to choose.
        let bin_dir = mesh.lab.bin_dir().to_owned();
        let far = PodSpec { app: "mate".to_owned(), ..PodSpec::new("mesh", "far") };
        let _serving = servers::peer(mesh.lab.run_pod("b", far)?, &bin_dir)?;
        let service =
            manifest::service("mesh", "mates", "mate", &[VIP.parse()?], &[("idle", port, port)]);
        mesh.lab.apply(&service)?;
        let target = mesh.targets("mate", port)[0];
        let vip = SocketAddr::new(VIP.parse()?, port);
        let look = || -> anyhow::Result<()> {
            until("the service answering", PATIENCE, || Ok(try_once(mesh, "client", vip).ok()))?;
            let before = dialled(mesh)?;
            let delivered = mesh.hold("client", vip, 2 * DELIVERED)?;
            ensure!(dialled(mesh)? == before, "a service was reached directly");
            let direct = hold_direct(mesh, "client", target, DIRECT)?;
            let used = direct.use_all()?;
            ensure!(used.is_ok(), "a direct connection was disturbed: {used:?}");
            let used = delivered.use_all()?;
            ensure!(used.is_ok(), "a delivered connection was disturbed: {used:?}");
            Ok(())
        };
        let outcome = look();
        mesh.lab.delete(&service)?;
        mesh.lab.delete_pod("far")?;
        outcome
    })
}

/// A policy that stops allowing a pair cuts its direct connections within a second, by name; none opens after it.
pub(crate) fn denying_cuts_direct_connections(mesh: &mut Mesh) -> anyhow::Result<()> {
    with_direct(mesh, |mesh| {
        let mut took = Vec::new();
        for round in 0..5 {
            took.push(deny_once(mesh).with_context(|| format!("round {round}"))?);
            // A machine that is busy for a moment proves nothing.
            if took.last().is_some_and(|took| *took < LIMIT) {
                return Ok(());
            }
        }
        anyhow::bail!("cut only after {took:?}")
    })
}

fn deny_once(mesh: &Mesh) -> anyhow::Result<Duration> {
    let targets = mesh.targets("mate", peer::IDLE);
    let denied =
        [hold_direct(mesh, "client", targets[0], 3)?, hold_direct(mesh, "client", targets[1], 3)?];
    wait_for_open(mesh, 6)?;
    let (log, deny) =
        (Log::from_now(mesh)?, deny_client("not-the-client", &json!({ "app": "mate" })));
    let applied = Instant::now();
    mesh.lab.apply(&deny)?;
    let look = || {
        until("the direct connections being cut", PATIENCE, || {
            let open =
                straight(mesh, "client", targets[0])? + straight(mesh, "client", targets[1])?;
            Ok((open == 0).then_some(()))
        })?;
        let took = applied.elapsed();
        let before = dialled(mesh)?;
        for held in denied {
            let told = held.use_all()?.err().context("a denied connection goes on")?;
            ensure!(told.contains("abort"), "not aborted: {told}");
        }
        for target in [targets; 5].as_flattened() {
            ensure!(try_once(mesh, "client", *target).is_err(), "a denied connection is served");
        }
        ensure!(dialled(mesh)? == before, "a denied connection was direct");
        let parts =
            ["path=direct", "reason=policy_changed", "AuthorizationPolicy mesh/not-the-client"];
        let lines = log.exactly(mesh, 12, &parts)?;
        for way in ["direction=\"outbound\"", "direction=\"inbound\""] {
            let count = lines.iter().filter(|line| line.contains(way)).count();
            ensure!(count == 6, "{count} lines of 6 with {way}: {lines:?}");
        }
        Ok(took)
    };
    let outcome = look();
    mesh.lab.delete(&deny)?;
    mesh.wait_for("client")?;
    outcome
}

/// The agent is killed: direct connections go on, also over the next agent's start; new ones are refused once the lease is
/// over, and nothing is told twice.
pub(crate) fn killed_agent_leaves_direct_connections(mesh: &mut Mesh) -> anyhow::Result<()> {
    with_direct(mesh, |mesh| {
        let targets = mesh.targets("mate", peer::IDLE);
        let held = [
            hold_direct(mesh, "client", targets[0], 3)?,
            hold_direct(mesh, "client", targets[1], 3)?,
        ];
        let others = hold_direct(mesh, "client", targets[0], 2)?;
        wait_for_open(mesh, 8)?;
        let log = Log::from_now(mesh)?;
        mesh.lab.node_mut("a").kill_agent();
        let killed = Instant::now();
        let used = others.use_all()?;
        ensure!(used.is_ok(), "a direct connection was lost with the agent: {used:?}");
        // By the lease, new ones open for a moment; each is told of later.
        let mut opened = 0;
        until("new connections being refused", PATIENCE, || {
            let tried = try_once(mesh, "client", targets[0]);
            opened += usize::from(tried.is_ok());
            Ok(tried.err())
        })?;
        // The lease, and what asking takes.
        let took = killed.elapsed();
        ensure!(took < LEASE * 2, "refused only after {took:?}");
        for target in [targets; 3].as_flattened() {
            let tried = try_once(mesh, "client", *target).err();
            let told = tried.context("a connection opened after the lease")?;
            ensure!(told.contains("refused"), "{told}");
        }
        let index = mesh.lab.node_index("a");
        mesh.lab.start_agent_with(index, &["--same-node", "direct"])?;
        mesh.lab.node_mut("a").wait_ready()?;
        wait_for_open(mesh, 6).context("by the next agent")?;
        for held in held {
            let used = held.use_all()?;
            ensure!(used.is_ok(), "a direct connection was lost: {used:?}");
        }
        let all = 8 + opened;
        log.exactly(mesh, all, &["path=direct", "direction=\"outbound\"", "reason=complete"])?;
        log.exactly(mesh, all, &["path=direct", "direction=\"inbound\"", "reason=complete"])?;
        wait_for_direct(mesh, "client", targets[0])
    })
}

/// A waypoint is bound to the server: its direct connections end, and no further one is made.
pub(crate) fn waypoint_ends_direct_connections(mesh: &mut Mesh) -> anyhow::Result<()> {
    with_direct(mesh, |mesh| {
        let target = mesh.targets("mate", peer::IDLE)[0];
        let held = hold_direct(mesh, "client", target, 3)?;
        let path = mesh.lab.manifests().join("Pod.mesh.mate.json");
        let before: Value = serde_json::from_slice(&std::fs::read(path)?)?;
        let mut bound = before.clone();
        bound["metadata"]["labels"]["culvert.dev/use-waypoint"] = json!("nobody");
        mesh.lab.apply(&bound)?;
        let applied = Instant::now();
        let look = || -> anyhow::Result<()> {
            until("the direct connections being cut", PATIENCE, || {
                Ok((straight(mesh, "client", target)? == 0).then_some(()))
            })?;
            let took = applied.elapsed();
            ensure!(took < LIMIT * 2, "cut only after {took:?}");
            ensure!(held.use_all()?.is_err(), "a connection past the waypoint goes on");
            let count = dialled(mesh)?;
            for _ in 0..5 {
                let tried = try_once(mesh, "client", target);
                ensure!(tried.is_err(), "a connection past the waypoint is served");
            }
            ensure!(dialled(mesh)? == count, "a connection past the waypoint was direct");
            let address = target.ip();
            let asked = format!(
                "http://agent/same-node?from=mesh/client&to={address}&port={}",
                target.port()
            );
            let answer = same_node(&mesh.lab, &asked)?;
            ensure!(answer["direct"] == false, "explained: {answer}");
            ensure!(answer["because"].to_string().contains("waypoint"), "explained: {answer}");
            Ok(())
        };
        let outcome = look();
        mesh.lab.apply(&before)?;
        outcome?;
        mesh.wait_for("client")
    })
}

/// The address of a pod that was reached directly is given to another one: nothing of the first one's reaches it.
pub(crate) fn address_given_again(mesh: &mut Mesh) -> anyhow::Result<()> {
    with_direct(mesh, |mesh| {
        let bin_dir = mesh.lab.bin_dir().to_owned();
        let first = mesh.lab.run_pod("a", PodSpec::new("mesh", "first"))?;
        let (ipv4, ipv6) = (first.ipv4, first.ipv6);
        let serving = servers::peer(first, &bin_dir)?;
        let target = SocketAddr::new(ipv4, peer::IDLE);
        let held = hold_direct(mesh, "client", target, 3)?;
        drop(serving);
        mesh.lab.delete_pod("first")?;
        mesh_netns::net::ip(Some(mesh.lab.node("a").netns()), "neigh flush dev cni0")?;
        give_next(mesh, ipv4, 0)?;
        give_next(mesh, ipv6, 1)?;
        let (log, count) = (Log::from_now(mesh)?, dialled(mesh)?);
        let second = mesh.lab.run_pod("a", PodSpec::new("mesh", "second"))?;
        ensure!(second.ipv4 == ipv4, "the address was not given again");
        let _serving = servers::peer(second, &bin_dir)?;
        ensure!(
            held.use_all()?.is_err(),
            "a connection to the first pod is answered by the second"
        );
        // Its first connection goes through the agent, under its own name.
        until("the second pod answering", PATIENCE, || Ok(try_once(mesh, "client", target).ok()))?;
        let lines = log.lines(mesh, &["dst.workload=\"second\"", "path=tunnel"]);
        ensure!(!lines.is_empty() || dialled(mesh)? == count, "direct by the first pod's verdict");
        wait_for_direct(mesh, "client", target)?;
        let lines = log.lines(mesh, &["path=direct", "dst.workload=\"first\"", "reason=complete"]);
        ensure!(lines.is_empty(), "told as the first pod's: {lines:?}");
        let own = "dst.identity=\"spiffe://cluster.local/ns/mesh/sa/second\"";
        until("a line under the second pod's name", PATIENCE, || {
            Ok((!log.lines(mesh, &["path=direct", own]).is_empty()).then_some(()))
        })?;
        mesh.lab.delete_pod("second")
    })
}

/// Makes `ip` the next address that node a's `range`th range gives.
fn give_next(mesh: &Mesh, ip: IpAddr, range: u8) -> anyhow::Result<()> {
    let before = match ip {
        IpAddr::V4(ip) => IpAddr::from((u32::from(ip) - 1).to_be_bytes()),
        IpAddr::V6(ip) => IpAddr::from((u128::from(ip) - 1).to_be_bytes()),
    };
    let file = format!("node-a/ipam/lab/last_reserved_ip.{range}");
    Ok(std::fs::write(mesh.lab.folder().join(file), before.to_string())?)
}

/// A pod leaves the mesh: no further connection of it is direct, and those that are go on until they are over.
pub(crate) fn unenrolled_pod_takes_no_part(mesh: &mut Mesh) -> anyhow::Result<()> {
    with_direct(mesh, |mesh| {
        mesh.lab.apply(&manifest::namespace("later", &[AMBIENT]))?;
        mesh.lab.run_pod("a", PodSpec::new("later", "late"))?;
        let target = mesh.targets("mate", peer::IDLE)[0];
        let (held, others) =
            (hold_direct(mesh, "late", target, 3)?, hold_direct(mesh, "late", target, 3)?);
        let unenrolled = mesh.lab.node("a").culvert(&["pod", "unenroll", "later/late"])?;
        ensure!(unenrolled.success(), "unenroll: {}{}", unenrolled.stdout, unenrolled.stderr);
        let count = dialled(mesh)?;
        let used = held.use_all()?;
        ensure!(used.is_ok(), "a connection was lost at once: {used:?}");
        for _ in 0..5 {
            // In plaintext, which no policy forbids here.
            let tried = try_once(mesh, "late", target);
            ensure!(tried.is_ok(), "a plain connection was refused: {tried:?}");
        }
        ensure!(dialled(mesh)? == count, "a pod outside the mesh was let through");
        let used = others.use_all()?;
        ensure!(used.is_ok(), "a connection did not outlive its pod's membership: {used:?}");
        until("the last direct connections being over", PATIENCE, || {
            let shown = mesh.lab.node("a").culvert(&["connections"])?.output()?;
            let left = shown.lines().any(|line| line.contains("later/late"));
            Ok((!left).then_some(()))
        })?;
        enroll(mesh)?;
        wait_for_direct(mesh, "late", target)?;
        mesh.lab.delete_pod("late")?;
        mesh.lab.delete(&manifest::namespace("later", &[AMBIENT]))
    })
}

/// Pods leave the mesh by their label: what they have open directly goes on for as long as it lasts, also over a change of
/// agents, and is over for the agent when it is over.
pub(crate) fn pods_that_leave_keep_direct_connections(mesh: &mut Mesh) -> anyhow::Result<()> {
    with_direct(mesh, |mesh| {
        let bin_dir = mesh.lab.bin_dir().to_owned();
        mesh.lab.apply(&manifest::namespace("later", &[AMBIENT]))?;
        mesh.lab.run_pod("a", PodSpec::new("later", "late"))?;
        let server = mesh.lab.run_pod("a", PodSpec::new("later", "latest"))?;
        let _serving = servers::peer(server, &bin_dir)?;
        // One end stays in the mesh, and none does.
        let one = mesh.targets("mate", peer::IDLE)[0];
        let both = mesh.targets("latest", peer::IDLE)[0];
        let mut held = Vec::new();
        for target in [one, both, one, both, one, both] {
            held.push(hold_direct(mesh, "late", target, 3)?);
        }
        mesh.lab.apply(&manifest::namespace("later", &[]))?;
        let count = || dialled(mesh);
        until("the pods having left", PATIENCE, || {
            let before = count()?;
            let tried = try_once(mesh, "late", both).is_ok() && try_once(mesh, "late", one).is_ok();
            Ok((tried && count()? == before).then_some(()))
        })?;
        still_open(mesh, one, both, 9)?;
        switch(mesh, "direct")?;
        still_open(mesh, one, both, 9).context("after the hand-over")?;
        let shown = || mesh.lab.node("a").culvert(&["connections"])?.output();
        let listed = |shown: &str| shown.lines().filter(|line| line.contains("later/")).count();
        ensure!(listed(&shown()?) > 0, "the next agent does not know of them");
        for held in held {
            let used = held.use_all()?;
            ensure!(used.is_ok(), "a connection was lost: {used:?}");
        }
        until("nothing being open", PATIENCE, || Ok((listed(&shown()?) == 0).then_some(())))?;
        for pod in ["late", "latest"] {
            mesh.lab.delete_pod(pod)?;
        }
        mesh.lab.delete(&manifest::namespace("later", &[]))
    })
}

/// For longer than an agent takes to let a pod go of which it knows nothing, each target has `count` connections.
fn still_open(mesh: &Mesh, one: SocketAddr, both: SocketAddr, count: usize) -> anyhow::Result<()> {
    let began = Instant::now();
    until("five seconds", PATIENCE, || {
        for target in [one, both] {
            let open = straight(mesh, "late", target)?;
            ensure!(open == count, "{open} of {count} connections to {target} are open");
        }
        Ok((began.elapsed() > Duration::from_secs(5)).then_some(()))
    })
}

/// A namespace is set to tunnels while connections are direct: they end, and none is made until a pod says otherwise for
/// itself; one end's word is not enough.
pub(crate) fn labels_keep_pods_in_tunnels(mesh: &mut Mesh) -> anyhow::Result<()> {
    with_direct(mesh, |mesh| {
        mesh.lab.apply(&manifest::namespace("later", &[AMBIENT]))?;
        mesh.lab.run_pod("a", PodSpec::new("later", "late"))?;
        let target = mesh.targets("mate", peer::IDLE)[0];
        let held = hold_direct(mesh, "late", target, 3)?;
        let tunnel = ("culvert.dev/same-node", "tunnel");
        mesh.lab.apply(&manifest::namespace("later", &[AMBIENT, tunnel]))?;
        until("the direct connections being cut", PATIENCE, || {
            Ok((straight(mesh, "late", target)? == 0).then_some(()))
        })?;
        ensure!(held.use_all()?.is_err(), "a direct connection goes on");
        let before = dialled(mesh)?;
        for _ in 0..5 {
            try_once(mesh, "late", target).map_err(anyhow::Error::msg)?;
        }
        ensure!(
            dialled(mesh)? == before,
            "a connection of a pod that is set to tunnels was direct"
        );
        let path = mesh.lab.manifests().join("Pod.later.late.json");
        let mut pod: Value = serde_json::from_slice(&std::fs::read(path)?)?;
        pod["metadata"]["labels"]["culvert.dev/same-node"] = json!("direct");
        mesh.lab.apply(&pod)?;
        wait_for_direct(mesh, "late", target)?;
        mesh.lab.delete_pod("late")?;
        mesh.lab.delete(&manifest::namespace("later", &[]))
    })
}

/// Agents change places under direct connections: none is lost, each is told once, counters never go back.
pub(crate) fn hand_over_keeps_direct_connections(mesh: &mut Mesh) -> anyhow::Result<()> {
    with_direct(mesh, |mesh| {
        let targets = mesh.targets("mate", peer::IDLE);
        let held = [
            hold_direct(mesh, "client", targets[0], 4)?,
            hold_direct(mesh, "client", targets[1], 4)?,
        ];
        wait_for_open(mesh, 8)?;
        let log = Log::from_now(mesh)?;
        let totals = |mesh: &Mesh| -> anyhow::Result<[u64; 3]> {
            let count = |name: &str| counted(mesh, name, &[]);
            Ok([
                count("istio_tcp_connections_opened_total")?,
                count("istio_tcp_connections_closed_total")?,
                count("istio_tcp_received_bytes_total")?,
            ])
        };
        for _ in 0..3 {
            let before = totals(mesh)?;
            switch(mesh, "direct")?;
            let after = totals(mesh)?;
            let went_back = before.iter().zip(after).any(|(before, after)| after < *before);
            ensure!(!went_back, "counters went from {before:?} to {after:?}");
            let open =
                straight(mesh, "client", targets[0])? + straight(mesh, "client", targets[1])?;
            ensure!(open == 8, "{open} of 8 connections are open");
        }
        for held in held {
            let used = held.use_all()?;
            ensure!(used.is_ok(), "a direct connection was disturbed: {used:?}");
        }
        log.exactly(mesh, 8, &["path=direct", "direction=\"outbound\"", "reason=complete"])?;
        log.exactly(mesh, 8, &["path=direct", "direction=\"inbound\"", "reason=complete"])?;
        wait_for_direct(mesh, "client", targets[0])
    })
}

/// The setting is changed to tunnels: what is direct ends, and everything is encrypted from then on.
pub(crate) fn setting_ends_direct_connections(mesh: &mut Mesh) -> anyhow::Result<()> {
    switch(mesh, "direct")?;
    let target = mesh.targets("mate", peer::IDLE)[0];
    let held = hold_direct(mesh, "client", target, 3)?;
    switch(mesh, "tunnel")?;
    until("the direct connections being cut", PATIENCE, || {
        Ok((straight(mesh, "client", target)? == 0).then_some(()))
    })?;
    ensure!(held.use_all()?.is_err(), "a direct connection goes on");
    let count = dialled(mesh)?;
    let watch = Watch::start(&mesh.lab, "tunnels")?;
    mesh.curl("client")?.output()?;
    watch.finish()?.nothing_in_the_clear(&Scope::All)?;
    ensure!(dialled(mesh)? == count, "a connection was direct");
    Ok(())
}
