//! Services on the direct path: dialled by their virtual addresses, their connections go straight to endpoints as long as all
//! that count are on the node and allowed, and through the agent otherwise.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::process::Command;
use std::time::Instant;

use anyhow::ensure;
use mesh_netns::peer::ports as peer;
use mesh_netns::process::run;
use mesh_netns::servers;
use mesh_netns::wait::{PATIENCE, until};
use mesh_netns::{Held, PodSpec, Process, manifest};
use serde_json::{Value, json};

use crate::direct::{
    LIMIT, Log, canonical, counted, deny_client, dialled, same_node, straight, switch, three_ways,
    try_once, with_direct,
};
use crate::mesh::Mesh;

const VIPS: [&str; 2] = ["10.96.77.6", "fd96::77:6"];
const HOST: &str = "mates.mesh.svc.cluster.local";
/// Of two endpoints each gets more than a sixth of so many, but once in a million runs.
const MANY: u32 = 60;

/// A service with `mate` and a second pod of node a as endpoints.
struct Service {
    manifest: Value,
    _serving: Process,
}

impl Service {
    fn start(mesh: &mut Mesh) -> anyhow::Result<Self> {
        let second = serving_pod(mesh, "a", "second")?;
        let ips: Vec<IpAddr> = VIPS.iter().map(|ip| ip.parse()).collect::<Result<_, _>>()?;
        let ports = [("idle", peer::IDLE, peer::IDLE), ("who", 80, peer::WHO)];
        let manifest = manifest::service("mesh", "mates", "mate", &ips, &ports);
        mesh.lab.apply(&manifest)?;
        Ok(Self { manifest, _serving: second })
    }

    fn stop(self, mesh: &mut Mesh) -> anyhow::Result<()> {
        mesh.lab.delete(&self.manifest)?;
        mesh.lab.delete_pod("second")
    }
}

/// An endpoint of the service.
fn serving_pod(mesh: &mut Mesh, node: &str, name: &str) -> anyhow::Result<Process> {
    let bin_dir = mesh.lab.bin_dir().to_owned();
    let labels = vec![("role".to_owned(), name.to_owned())];
    let spec = PodSpec { app: "mate".to_owned(), labels, ..PodSpec::new("mesh", name) };
    servers::peer(mesh.lab.run_pod(node, spec)?, &bin_dir)
}

fn vips(port: u16) -> anyhow::Result<[SocketAddr; 2]> {
    Ok([SocketAddr::new(VIPS[0].parse()?, port), SocketAddr::new(VIPS[1].parse()?, port)])
}

/// How many connections of the client are open straight to each of the pods, in the address family of `vip`.
fn open(mesh: &Mesh, vip: SocketAddr) -> anyhow::Result<[usize; 2]> {
    let to = |pod| -> anyhow::Result<usize> {
        let [v4, v6] = mesh.targets(pod, peer::IDLE);
        straight(mesh, "client", if vip.ip().to_canonical().is_ipv4() { v4 } else { v6 })
    };
    Ok([to("mate")?, to("second")?])
}

/// Connects until one goes directly.
fn wait_for_direct(mesh: &Mesh, vip: SocketAddr) -> anyhow::Result<()> {
    until(&format!("{vip} being reached directly"), PATIENCE, || {
        let before = dialled(mesh)?;
        Ok((try_once(mesh, "client", vip).is_ok() && dialled(mesh)? == before + 1).then_some(()))
    })?;
    until("that connection being over", PATIENCE, || {
        Ok((open(mesh, vip)?.iter().sum::<usize>() == 0).then_some(()))
    })
}

/// Connects until one goes through the agent again; how long that took.
fn wait_for_agent(mesh: &Mesh, vip: SocketAddr) -> anyhow::Result<std::time::Duration> {
    let since = Instant::now();
    until(&format!("{vip} being reached through the agent"), PATIENCE, || {
        let before = dialled(mesh)?;
        // Whether it is served is the policy's business.
        let _served = try_once(mesh, "client", vip);
        Ok((dialled(mesh)? == before).then_some(()))
    })?;
    Ok(since.elapsed())
}

/// Opens connections to the service, all of which have to be direct, and well spread.
fn hold_spread(mesh: &Mesh, vip: SocketAddr) -> anyhow::Result<(Held, [usize; 2])> {
    wait_for_direct(mesh, vip)?;
    let before = dialled(mesh)?;
    let held = mesh.hold("client", vip, MANY)?;
    let direct = dialled(mesh)? - before;
    ensure!(direct == u64::from(MANY), "{direct} of {MANY} connections to {vip} were direct");
    let open = open(mesh, vip)?;
    ensure!(open.iter().sum::<usize>() == MANY as usize, "{open:?} are open to {vip}");
    ensure!(open.iter().all(|one| *one > MANY as usize / 6), "badly spread: {open:?}");
    Ok((held, open))
}

/// Which endpoints answer, as they see themselves, in so many connections to the service.
fn answering(mesh: &Mesh, vip: SocketAddr, count: u32) -> anyhow::Result<BTreeMap<IpAddr, u32>> {
    let mut answers = BTreeMap::new();
    for _ in 0..count {
        let said = mesh.peer("client", &["who", &vip.to_string()])?;
        let seen: Vec<SocketAddr> =
            said.split_whitespace().map(str::parse).collect::<Result<_, _>>()?;
        let [named, _client, own] = seen[..] else { anyhow::bail!("peer said {said:?}") };
        ensure!(canonical(named) == canonical(vip), "getpeername is {named}, dialled {vip}");
        *answers.entry(own.ip().to_canonical()).or_default() += 1;
    }
    Ok(answers)
}

// ---- the trials -------------------------------------------------------------------------------------------------------

/// By IPv4, IPv6 and IPv4 in an IPv6 socket: spread over both endpoints, under the name that was dialled, told of as the
/// service's, and so on after a change of agents and after one that was killed.
pub(crate) fn services_go_directly(mesh: &mut Mesh) -> anyhow::Result<()> {
    with_direct(mesh, |mesh| {
        let service = Service::start(mesh)?;
        for vip in vips(peer::IDLE)? {
            let opened = |reporter| {
                let labels = [("reporter", reporter), ("destination_service", HOST)];
                counted(mesh, "istio_tcp_connections_opened_total", &labels)
            };
            wait_for_direct(mesh, vip)?;
            let log = Log::from_now(mesh)?;
            let before = [opened("source")?, opened("destination")?];
            let (held, _) = hold_spread(mesh, vip)?;
            shown(mesh, vip)?;
            let used = held.use_all()?;
            ensure!(used.is_ok(), "a direct connection was disturbed: {used:?}");
            told(mesh, &log)?;
            for (reporter, before) in [("source", before[0]), ("destination", before[1])] {
                // With the one that was waited for.
                let all = before + u64::from(MANY) + 1;
                until("the connections being counted", PATIENCE, || {
                    Ok((opened(reporter)? == all).then_some(()))
                })?;
            }
        }
        names_whom_was_dialled(mesh)?;
        handed_over(mesh)?;
        after_a_crash(mesh)?;
        service.stop(mesh)
    })
}

/// What people are shown of open connections, and of the next one.
fn shown(mesh: &Mesh, vip: SocketAddr) -> anyhow::Result<()> {
    until("the connections being shown", PATIENCE, || {
        let shown =
            mesh.lab.node("a").culvert(&["connections", "--pod", "mesh/client", "-o", "json"])?;
        let shown: Vec<Value> = serde_json::from_str(&shown.output()?)?;
        let is_it = |one: &&Value| {
            one["service"] == HOST
                && one["destination"] == vip.to_string()
                && one["path"].to_string().to_lowercase().contains("direct")
        };
        Ok((shown.iter().filter(is_it).count() == MANY as usize).then_some(()))
    })?;
    let address = vip.ip().to_string().replace(':', "%3A");
    let asked = format!("http://agent/same-node?from=mesh/client&to={address}&port={}", vip.port());
    let answer = same_node(&mesh.lab, &asked)?;
    ensure!(answer["direct"] == true && answer["in_force"] == true, "explained: {answer}");
    // What is elsewhere is no matter of this node.
    let there = mesh.pod("server").ipv4;
    let asked = format!("http://agent/same-node?from=mesh/client&to={there}&port=80");
    let answer = same_node(&mesh.lab, &asked)?;
    ensure!(answer.get("direct").is_none(), "explained: {answer}");
    let mut explain = Command::new(mesh.lab.bin_dir().join("culvert"));
    explain.args(["explain", "mesh/client", &format!("mates.mesh:{}", vip.port())]);
    explain.env("CULVERT_CONTROLLER_SOCKET", mesh.lab.controller_socket());
    explain.env("CULVERT_RUN_DIR", mesh.lab.node("a").run_dir());
    let explained = run(&mut explain, PATIENCE)?.output()?;
    ensure!(explained.contains("on this node: direct"), "explained: {explained}");
    Ok(())
}

/// Both reporters have told of all connections, and of the one before them, under the service's name.
fn told(mesh: &Mesh, log: &Log) -> anyhow::Result<()> {
    let name = format!("dst.service=\"{HOST}\"");
    for direction in ["direction=\"outbound\"", "direction=\"inbound\""] {
        let parts = ["path=direct", direction, &name, "reason=complete"];
        log.exactly(mesh, MANY as usize + 1, &parts)?;
        let all = log.lines(mesh, &["path=direct", direction]);
        ensure!(all.len() == MANY as usize + 1, "lines without the service's name: {all:?}");
    }
    Ok(())
}

fn names_whom_was_dialled(mesh: &Mesh) -> anyhow::Result<()> {
    let [v4, v6] = vips(80)?;
    let IpAddr::V4(ip) = v4.ip() else { anyhow::bail!("{v4} is no IPv4 address") };
    let mapped = SocketAddr::new(ip.to_ipv6_mapped().into(), 80);
    for vip in [v4, v6, mapped] {
        // The first one brings the verdicts.
        until(&format!("{vip} being reached directly"), PATIENCE, || {
            let before = dialled(mesh)?;
            answering(mesh, vip, 1)?;
            Ok((dialled(mesh)? > before).then_some(()))
        })?;
        let before = dialled(mesh)?;
        let answers = answering(mesh, vip, 40)?;
        ensure!(dialled(mesh)? == before + 40, "not all of 40 connections to {vip} were direct");
        let endpoints: BTreeSet<IpAddr> = ["mate", "second"]
            .iter()
            .flat_map(|pod| three_ways(mesh, pod, peer::WHO))
            .map(|target| target.ip().to_canonical())
            .collect();
        ensure!(answers.len() == 2, "{vip} was answered by {answers:?}");
        ensure!(answers.keys().all(|ip| endpoints.contains(ip)), "{vip}: {answers:?}");
    }
    Ok(())
}

/// A successor keeps spreading, and tells what its predecessor saw begin.
fn handed_over(mesh: &mut Mesh) -> anyhow::Result<()> {
    let [vip, _] = vips(peer::IDLE)?;
    let (held, before) = hold_spread(mesh, vip)?;
    let log = Log::from_now(mesh)?;
    switch(mesh, "direct")?;
    let count = dialled(mesh)?;
    try_once(mesh, "client", vip).map_err(anyhow::Error::msg)?;
    ensure!(dialled(mesh)? == count + 1, "the service went back to the agent");
    until("that connection being over", PATIENCE, || {
        Ok((open(mesh, vip)? == before).then_some(()))
    })?;
    let used = held.use_all()?;
    ensure!(used.is_ok(), "a direct connection was disturbed: {used:?}");
    told(mesh, &log)
}

/// An agent that finds no predecessor takes up what is in the kernel, and knows by which address it was dialled.
fn after_a_crash(mesh: &mut Mesh) -> anyhow::Result<()> {
    let [_, vip] = vips(peer::IDLE)?;
    let (held, before) = hold_spread(mesh, vip)?;
    let log = Log::from_now(mesh)?;
    mesh.lab.node_mut("a").kill_agent();
    let index = mesh.lab.node_index("a");
    mesh.lab.start_agent_with(index, &["--same-node", "direct"])?;
    mesh.lab.node_mut("a").wait_ready()?;
    wait_for_agents_end(mesh, vip, before)?;
    let used = held.use_all()?;
    ensure!(used.is_ok(), "a direct connection was disturbed: {used:?}");
    told(mesh, &log)
}

/// An endpoint elsewhere, an endpoint that is denied, a waypoint: connections go through the agent, which chooses among all.
/// An endpoint that left the service keeps what it has.
pub(crate) fn the_agent_takes_services_back(mesh: &mut Mesh) -> anyhow::Result<()> {
    with_direct(mesh, |mesh| {
        let service = Service::start(mesh)?;
        an_endpoint_elsewhere(mesh)?;
        a_denied_endpoint(mesh)?;
        an_endpoint_that_left(mesh)?;
        a_waypoint_for_the_service(mesh, &service)?;
        service.stop(mesh)
    })
}

fn an_endpoint_elsewhere(mesh: &mut Mesh) -> anyhow::Result<()> {
    let [vip, _] = vips(peer::IDLE)?;
    let (held, before) = hold_spread(mesh, vip)?;
    let far = serving_pod(mesh, "b", "far")?;
    let took = wait_for_agent(mesh, vip)?;
    ensure!(took < LIMIT * 2, "direct for {took:?} after there was an endpoint elsewhere");
    ensure!(open(mesh, vip)? == before, "a direct connection ended");
    let count = dialled(mesh)?;
    let [who, _] = vips(80)?;
    let answers = answering(mesh, who, MANY)?;
    ensure!(dialled(mesh)? == count, "a connection was direct");
    ensure!(answers.len() == 3, "not all endpoints answer: {answers:?}");
    drop(far);
    mesh.lab.delete_pod("far")?;
    wait_for_agents_end(mesh, vip, before)?;
    let used = held.use_all()?;
    ensure!(used.is_ok(), "a direct connection was disturbed: {used:?}");
    Ok(())
}

/// Waits until the service is reached directly beside connections that are open.
fn wait_for_agents_end(mesh: &Mesh, vip: SocketAddr, held: [usize; 2]) -> anyhow::Result<()> {
    until(&format!("{vip} being reached directly again"), PATIENCE, || {
        let before = dialled(mesh)?;
        Ok((try_once(mesh, "client", vip).is_ok() && dialled(mesh)? == before + 1).then_some(()))
    })?;
    until("that connection being over", PATIENCE, || Ok((open(mesh, vip)? == held).then_some(())))
}

fn a_denied_endpoint(mesh: &Mesh) -> anyhow::Result<()> {
    let [vip, _] = vips(peer::IDLE)?;
    let (_held, before) = hold_spread(mesh, vip)?;
    let deny = deny_client("not-to-the-second", &json!({ "role": "second" }));
    mesh.lab.apply(&deny)?;
    let applied = Instant::now();
    let look = || -> anyhow::Result<()> {
        until("connections to the denied endpoint being cut", PATIENCE, || {
            Ok((open(mesh, vip)?[1] == 0).then_some(()))
        })?;
        let took = applied.elapsed();
        ensure!(took < LIMIT * 2, "cut only after {took:?}");
        ensure!(open(mesh, vip)?[0] == before[0], "connections to the other endpoint ended");
        let count = dialled(mesh)?;
        let (mut served, mut refused) = (0, 0);
        for _ in 0..40 {
            match try_once(mesh, "client", vip) {
                Ok(()) => served += 1,
                Err(_denied) => refused += 1,
            }
        }
        ensure!(dialled(mesh)? == count, "a connection was direct");
        ensure!(served > 0 && refused > 0, "{served} served, {refused} refused");
        Ok(())
    };
    let outcome = look();
    mesh.lab.delete(&deny)?;
    outcome?;
    wait_for_agents_end(mesh, vip, [before[0], 0])
}

fn an_endpoint_that_left(mesh: &Mesh) -> anyhow::Result<()> {
    let [vip, _] = vips(peer::IDLE)?;
    until("earlier connections being over", PATIENCE, || {
        Ok((open(mesh, vip)? == [0, 0]).then_some(()))
    })?;
    let (held, before) = hold_spread(mesh, vip)?;
    let path = mesh.lab.manifests().join("Pod.mesh.second.json");
    let second: Value = serde_json::from_slice(&std::fs::read(path)?)?;
    let mut left = second.clone();
    left["metadata"]["labels"]["app"] = json!("somebody");
    mesh.lab.apply(&left)?;
    let [who, _] = vips(80)?;
    until("the other endpoint answering alone", PATIENCE, || {
        let before = dialled(mesh)?;
        let answers = answering(mesh, who, 20)?;
        Ok((answers.len() == 1 && dialled(mesh)? == before + 20).then_some(()))
    })?;
    ensure!(open(mesh, vip)? == before, "a connection to the endpoint that left has ended");
    let used = held.use_all()?;
    ensure!(used.is_ok(), "a connection to the endpoint that left was disturbed: {used:?}");
    mesh.lab.apply(&second)?;
    until("both endpoints answering again", PATIENCE, || {
        Ok((answering(mesh, who, 20)?.len() == 2).then_some(()))
    })
}

/// A waypoint that nobody runs is bound to the service: it is required, so its connections end, and none is made without.
fn a_waypoint_for_the_service(mesh: &Mesh, service: &Service) -> anyhow::Result<()> {
    let [vip, _] = vips(peer::IDLE)?;
    let (held, _) = hold_spread(mesh, vip)?;
    let mut bound = service.manifest.clone();
    bound["metadata"]["labels"] = json!({ "culvert.dev/use-waypoint": "nobody" });
    mesh.lab.apply(&bound)?;
    let applied = Instant::now();
    until("the direct connections being cut", PATIENCE, || {
        Ok((open(mesh, vip)? == [0, 0]).then_some(()))
    })?;
    let took = applied.elapsed();
    ensure!(took < LIMIT * 2, "cut only after {took:?}");
    ensure!(held.use_all()?.is_err(), "connections past the waypoint go on");
    let count = dialled(mesh)?;
    for _ in 0..5 {
        let tried = try_once(mesh, "client", vip);
        ensure!(tried.is_err(), "a connection past the waypoint is served");
    }
    ensure!(dialled(mesh)? == count, "a connection past the waypoint was direct");
    mesh.lab.apply(&service.manifest)?;
    until("the service answering again", PATIENCE, || Ok(try_once(mesh, "client", vip).ok()))
}
