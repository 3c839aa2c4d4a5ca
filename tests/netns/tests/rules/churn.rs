//! Workloads come and go by the thousand, and addresses change hands: nothing goes wrong, nothing stays.

use std::collections::BTreeMap;
use std::io::Write as _;
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use mesh_netns::peer::ports as peer;
use mesh_netns::process::Process;
use mesh_netns::servers;
use mesh_netns::wait::{PATIENCE, until};
use mesh_netns::{PodSpec, Traffic, manifest};

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
    give_both_next(mesh, ipv4, ipv6)?;
    mesh.lab.run_pod("b", PodSpec::new("mesh", "second"))?;
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
    ensure!(nobody_elses(&log_a, &log_b, "second")? > 0, "nothing reached the second pod");
    mesh.lab.delete_pod("second")
}

/// Each stream that the pod `name` accepted was meant for it, and was dialled as one to it; how many.
fn nobody_elses(log_a: &LogFromNow, log_b: &LogFromNow, name: &str) -> anyhow::Result<usize> {
    let to = format!("dst.workload=\"{name}\"");
    let account = format!("spiffe://cluster.local/ns/mesh/sa/{name}");
    let accepted = log_b.lines(&[&to, "direction=\"inbound\"", "trace.id="])?;
    let dialled = log_a.lines(&["direction=\"outbound\"", "trace.id="])?;
    let dialled: BTreeMap<_, _> =
        dialled.iter().map(|line| (field(line, "trace.id"), line)).collect();
    for line in &accepted {
        ensure!(field(line, "dst.identity") == Some(&account), "under another identity: {line}");
        // Of the last ones the other end may not have been written yet.
        if let Some(source) = dialled.get(&field(line, "trace.id")) {
            ensure!(
                field(source, "dst.identity") == Some(&account),
                "dialled as another: {source}"
            );
            ensure!(field(source, "dst.workload") == Some(name), "dialled as another: {source}");
        }
    }
    Ok(accepted.len())
}

/// Makes a pod's addresses the next ones that node b gives.
fn give_both_next(mesh: &Mesh, ipv4: IpAddr, ipv6: IpAddr) -> anyhow::Result<()> {
    // The node's kernel would look for the former pod's link address for some ten seconds.
    mesh_netns::net::ip(Some(mesh.lab.node("b").netns()), "neigh flush dev cni0")?;
    // host-local goes on behind the last address it gave.
    give_next(mesh, ipv4, 0)?;
    give_next(mesh, ipv6, 1)
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
    mesh.lab.run_pod("a", PodSpec::new("leaving", "leaver"))?;
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

/// An address of node b that goes from pod to pod, each of a service account of its own, while `client` dials it all the time.
struct Inherited {
    addresses: (IpAddr, IpAddr),
    traffic: Traffic,
    logs: (LogFromNow, LogFromNow),
    /// How many pods have had it; the last one has.
    holders: usize,
    server: Process,
}

impl Inherited {
    fn name(number: usize) -> String {
        format!("holder-{number}-of-it")
    }

    fn start(mesh: &mut Mesh) -> anyhow::Result<Self> {
        let name = Self::name(1);
        let pod = mesh.lab.run_pod("b", PodSpec::new("mesh", &name))?;
        let addresses = (pod.ipv4, pod.ipv6);
        let server = servers::nginx(pod)?;
        let target = SocketAddr::new(addresses.0, servers::ports::HTTP);
        mesh.wait_for("client", target)?;
        let logs = (LogFromNow::of(mesh, "a")?, LogFromNow::of(mesh, "b")?);
        let traffic = Traffic::start(mesh, "client", "inherited", &format!("http://{target}/"))?;
        traffic.more(1, &name)?;
        Ok(Self { addresses, traffic, logs, holders: 1, server })
    }

    /// The next pod takes over, and answers.
    fn hand_on(&mut self, mesh: &mut Mesh) -> anyhow::Result<()> {
        mesh.lab.delete_pod(&Self::name(self.holders))?;
        give_both_next(mesh, self.addresses.0, self.addresses.1)?;
        self.holders += 1;
        let name = Self::name(self.holders);
        let pod = mesh.lab.run_pod("b", PodSpec::new("mesh", &name))?;
        ensure!((pod.ipv4, pod.ipv6) == self.addresses, "the addresses were not given again");
        self.server = servers::nginx(pod)?;
        self.traffic.more(1, &name)
    }

    /// Ends it; every pod was reached, by what was meant for it alone, and by nothing once the next one had its address.
    fn finish(self, mesh: &mut Mesh) -> anyhow::Result<()> {
        let counted = self.traffic.finish()?;
        let answers: Vec<&str> =
            counted.log.lines().filter(|line| line.starts_with("hello from holder-")).collect();
        let mut rest = &answers[..];
        for number in 1..=self.holders {
            let name = Self::name(number);
            let own = rest.iter().take_while(|answer| answer.contains(&name)).count();
            ensure!(own > 0, "the next answer after {name}'s predecessor is {:?}", rest.first());
            rest = &rest[own..];
            let accepted = nobody_elses(&self.logs.0, &self.logs.1, &name)?;
            ensure!(accepted > 0, "{name} accepted nothing");
        }
        ensure!(rest.is_empty(), "after its address was given on: {:?}", rest.first());
        mesh.lab.delete_pod(&Self::name(self.holders))
    }
}

/// Puts 2,000 pods in, gives each one's address to a pod of another service account, and takes those out; waits each time until both
/// agents know. Twice meanwhile the address that is dialled changes hands too.
fn come_and_go(mesh: &mut Mesh, inherited: &mut Inherited) -> anyhow::Result<()> {
    let known = |mesh: &Mesh, what: &str, name: &str, count: usize| {
        until(what, PATIENCE, || {
            let mut all = true;
            for node in ["a", "b"] {
                let dump = mesh.lab.node(node).culvert(&["config", "workloads", "-o", "json"])?;
                let dump: serde_json::Value = serde_json::from_str(&dump.output()?)?;
                let workloads = dump.as_array().context("no workloads")?;
                let distant = workloads
                    .iter()
                    .filter(|one| one["workloadIps"].to_string().contains("\"10.99."));
                let accounts: Vec<_> = distant.map(|one| &one["serviceAccount"]).collect();
                all &= accounts.len() == count && accounts.iter().all(|account| *account == name);
            }
            Ok(all.then_some(()))
        })
    };
    for number in 0..PODS {
        mesh.lab.apply(&manifest::distant_pod("mesh", number))?;
    }
    known(mesh, "the agents knowing all pods", "distant", PODS.into())?;
    for number in 0..PODS {
        mesh.lab.delete(&manifest::distant_pod("mesh", number))?;
        mesh.lab.apply(&manifest::distant_heir("mesh", number))?;
        if number == PODS / 2 {
            inherited.hand_on(mesh)?;
        }
    }
    known(mesh, "the agents knowing all heirs, and nobody else", "heir", PODS.into())?;
    for number in 0..PODS {
        mesh.lab.delete(&manifest::distant_heir("mesh", number))?;
        if number == PODS / 2 {
            inherited.hand_on(mesh)?;
        }
    }
    known(mesh, "the agents having forgotten all pods", "heir", 0)
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

/// Waits until each program holds no more than a fifth above what it held `before` the rounds.
fn settled(mesh: &Mesh, before: &[(&'static str, u64)], round: &str) -> anyhow::Result<()> {
    let back = until(&format!("memory after the {round} round"), Duration::from_secs(60), || {
        let now = memory(mesh)?;
        let whole = before.iter().zip(&now).all(|((_, was), (_, is))| *is <= was * 6 / 5);
        Ok(whole.then_some(()))
    });
    back.with_context(|| format!("KiB before {before:?}, after {:?}", memory(mesh).ok()))
}

/// Thousands of pods come and go while a pod makes connections: none fails, nothing reaches the wrong identity, and the memory they
/// took comes back: nobody holds more than a fifth above what was held before.
pub(crate) fn two_thousand_pods(mesh: &mut Mesh) -> anyhow::Result<()> {
    let url = format!("http://{}/", mesh.server());
    let node = manifest::node("c", &["192.168.77.3".parse()?], &[]);
    mesh.lab.apply(&node)?;
    let mut inherited = Inherited::start(mesh)?;
    let traffic = Traffic::start(mesh, "client", "churn", &url)?;
    let before = memory(mesh)?;
    for round in ["first", "second"] {
        come_and_go(mesh, &mut inherited)?;
        settled(mesh, &before, round)?;
    }
    let made = traffic.finish_whole()?;
    ensure!(made > 50, "only {made} connections were made meanwhile");
    inherited.finish(mesh)?;
    mesh.lab.delete(&node)
}
