//! One agent process hands over to another while connections of every kind go on: none is lost, none is refused, no byte
//! is wrong, nothing leaves in the clear, counters never go back.
//!
//! One lab; the trials run in order, each leaves the lab as it found it.
#![allow(clippy::print_stdout, reason = "what was measured is shown")]

use std::io::{BufRead as _, BufReader};
use std::os::unix::fs::PermissionsExt;
use std::process::Stdio;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use libtest_mimic::{Arguments, Trial};
use mesh_netns::process::run;
use mesh_netns::servers::{self, ports};
use mesh_netns::wait::{PATIENCE, until};
use mesh_netns::{Lab, LabConfig, Live, PodSpec, Process, Sniffer, manifest};

/// What the mesh promises never to show of its pods, as a pcap filter: TCP that is not the tunnel.
const LEAK: &str = "tcp and not port 15008 and \
    ( net 10.77.0.0/16 or net fd77:1::/64 or net fd77:2::/64 )";

struct Mesh {
    lab: Lab,
    _servers: Vec<Process>,
}

impl Mesh {
    fn start() -> anyhow::Result<Self> {
        let mut lab = Lab::start(LabConfig::two_nodes("hov"))?;
        lab.apply(&manifest::namespace("mesh", &[("culvert.dev/dataplane-mode", "ambient")]))?;
        let bin_dir = lab.bin_dir().to_owned();
        let server = lab.run_pod("b", PodSpec::new("mesh", "server"))?;
        let servers = vec![servers::nginx(server)?, servers::peer(server, &bin_dir)?];
        lab.run_pod("a", PodSpec::new("mesh", "client"))?;
        let mesh = Self { lab, _servers: servers };
        mesh.works()?;
        Ok(mesh)
    }

    /// Waits until a new connection of the client is served.
    fn works(&self) -> anyhow::Result<()> {
        let url = format!("http://{}:{}/", self.lab.pod("server").ipv4, ports::HTTP);
        until("the client reaching the server", PATIENCE, || {
            let mut curl = self.lab.pod("client").command("curl");
            let done = run(curl.args(["-sS", "-m", "5", &url]), Duration::from_secs(10))?;
            Ok(done.success().then_some(()))
        })
    }

    fn sniff(&self, name: &str) -> anyhow::Result<Sniffer> {
        Sniffer::start_for(self.lab.wire(), "br0", self.lab.folder(), name, LEAK)
    }

    /// Connections of every kind from the client to the server, by both families; they begin before this returns.
    fn live(&self) -> anyhow::Result<Live> {
        let server = self.lab.pod("server");
        Live::start(&self.lab, self.lab.pod("client"), ports::HTTP, [server.ipv4, server.ipv6])
    }

    /// Starts a second agent on `node` and waits until the first has ended well and the second is ready.
    fn hand_over(&mut self, node: &str, extra: &[&str]) -> anyhow::Result<()> {
        let index = self.lab.node_index(node);
        let predecessor = self.lab.start_successor(index, extra)?;
        ended_well(predecessor)?;
        self.lab.node_mut(node).wait_ready()
    }
}

fn ended_well(mut predecessor: Process) -> anyhow::Result<()> {
    until("the predecessor's end", PATIENCE, || Ok((!predecessor.running()).then_some(())))?;
    let status = predecessor.stop(PATIENCE)?;
    ensure!(status.success(), "the predecessor ended with {status}");
    Ok(())
}

/// The pauses that predecessors of `node` have logged, all of them.
fn pauses(mesh: &Mesh, node: &str) -> Vec<String> {
    let log = mesh.lab.node(node).agent_log(usize::MAX);
    let pause = |line: &str| Some(line.split("stood_still=").nth(1)?.split(' ').next()?.to_owned());
    log.lines().filter_map(pause).collect()
}

/// A, B, both at once, again and again, under connections of every kind.
fn nobody_notices_many_hand_overs(mesh: &mut Mesh) -> anyhow::Result<()> {
    const ROUNDS: usize = 4;
    let sniffer = mesh.sniff("handovers")?;
    let live = mesh.live()?;
    for _ in 0..ROUNDS {
        mesh.hand_over("a", &[])?;
        mesh.hand_over("b", &[])?;
        let (a, b) = (mesh.lab.node_index("a"), mesh.lab.node_index("b"));
        let first = mesh.lab.start_successor(a, &[])?;
        let second = mesh.lab.start_successor(b, &[])?;
        ended_well(first)?;
        ended_well(second)?;
        mesh.lab.node_mut("a").wait_ready()?;
        mesh.lab.node_mut("b").wait_ready()?;
    }
    let seen = live.finish()?;
    println!("pings transfers connections requests longest-ping-us: {seen}");
    for node in ["a", "b"] {
        let pauses = pauses(mesh, node);
        ensure!(pauses.len() >= 2 * ROUNDS, "{} hand-overs of {node}", pauses.len());
        println!("node {node} stood still for {}", pauses.join(" "));
    }
    let capture = sniffer.finish()?;
    let leaked = capture.packets(LEAK)?;
    ensure!(leaked.is_empty(), "outside the tunnel: {leaked:?}");
    Ok(())
}

/// From two engines to one, to three, and back.
fn the_number_of_engines_may_change(mesh: &mut Mesh) -> anyhow::Result<()> {
    let live = mesh.live()?;
    for engines in ["1", "3", "2"] {
        mesh.hand_over("a", &["--workers", engines])?;
        mesh.hand_over("b", &["--workers", engines])?;
    }
    live.finish().map(drop)
}

/// The sum of a counter's series.
fn total(metrics: &str, name: &str) -> u64 {
    let lines = metrics.lines().filter(|line| line.starts_with(&format!("{name}{{")));
    lines.filter_map(|line| line.rsplit(' ').next()?.parse::<u64>().ok()).sum()
}

/// Counters never go back, open connections are counted once, each has one line in the access log.
fn counters_go_on(mesh: &mut Mesh) -> anyhow::Result<()> {
    const OPENED: &str = "istio_tcp_connections_opened_total";
    const CLOSED: &str = "istio_tcp_connections_closed_total";
    const SENT: &str = "istio_tcp_received_bytes_total";
    let live = mesh.live()?;
    for _ in 0..2 {
        let before = mesh.lab.node("a").metrics()?;
        mesh.hand_over("a", &[])?;
        let after = mesh.lab.node("a").metrics()?;
        for name in [OPENED, CLOSED, SENT, "istio_xds_message_total"] {
            let (before, after) = (total(&before, name), total(&after, name));
            ensure!(after >= before && before > 0, "{name} went from {before} to {after}");
        }
    }
    live.finish()?;
    until("every opened connection being closed", PATIENCE, || {
        let metrics = mesh.lab.node("a").metrics()?;
        Ok((total(&metrics, OPENED) == total(&metrics, CLOSED)).then_some(()))
    })
}

/// A pod that starts while the agents change places starts.
fn pods_come_and_go_meanwhile(mesh: &mut Mesh) -> anyhow::Result<()> {
    let index = mesh.lab.node_index("a");
    for number in 0..3 {
        let predecessor = mesh.lab.start_successor(index, &[])?;
        let name = format!("late{number}");
        mesh.lab.run_pod("a", PodSpec::new("mesh", &name))?;
        ended_well(predecessor)?;
        mesh.lab.node_mut("a").wait_ready()?;
        mesh.lab.delete_pod(&name)?;
    }
    mesh.works()
}

/// A successor that is killed, whenever: the predecessor goes on, or, if it was too late for that, ends, and the next agent
/// serves new connections. No byte is wrong and nothing is in the clear.
fn a_killed_successor_does_no_harm(mesh: &mut Mesh) -> anyhow::Result<()> {
    let index = mesh.lab.node_index("a");
    let sniffer = mesh.sniff("killed")?;
    let (mut went_on, mut too_late) = (0, 0);
    for step in 0..12_u32 {
        let live = mesh.live()?;
        let mut predecessor = mesh.lab.start_successor(index, &[])?;
        let kill_at = Instant::now() + Duration::from_millis(60) * step;
        until("the moment", PATIENCE, || Ok((Instant::now() >= kill_at).then_some(())))?;
        mesh.lab.node_mut("a").kill_agent();
        // It notices within milliseconds, or has ended already.
        let gone = until("the predecessor's end", Duration::from_millis(700), || {
            Ok((!predecessor.running()).then_some(()))
        });
        if gone.is_err() {
            went_on += 1;
            mesh.lab.node_mut("a").set_agent(predecessor);
            live.finish().with_context(|| format!("killed after {} ms", 60 * step))?;
        } else {
            too_late += 1;
            if let Err(error) = live.finish() {
                let text = format!("{error:#}");
                ensure!(!text.contains("wrong byte"), "{text}");
            }
            mesh.lab.start_agent(index)?;
            mesh.lab.node_mut("a").wait_ready()?;
        }
        mesh.works()?;
    }
    println!(
        "killed successors: the predecessor went on {went_on} times, {too_late} times it was too late"
    );
    let capture = sniffer.finish()?;
    ensure!(capture.packets(LEAK)?.is_empty(), "outside the tunnel");
    Ok(())
}

/// An agent with another state folder is not let in, and says why; the one that runs is not disturbed.
fn a_stranger_is_refused_by_name(mesh: &mut Mesh) -> anyhow::Result<()> {
    let index = mesh.lab.node_index("a");
    let live = mesh.live()?;
    let stranger = mesh.lab.folder().join("stranger").to_string_lossy().into_owned();
    let running = mesh.lab.start_successor(index, &["--state-dir", &stranger])?;
    let refused = mesh.lab.node_mut("a").set_agent(running);
    let mut refused = refused.context("the stranger was started")?;
    until("the stranger's end", PATIENCE, || Ok((!refused.running()).then_some(())))?;
    ensure!(!refused.stop(PATIENCE)?.success(), "the stranger was let in");
    let log = mesh.lab.node("a").agent_log(60);
    ensure!(log.contains("the running agent refuses: the agent that runs here is"), "{log}");
    live.finish().map(drop)
}

/// Peers that dial the tunnel port and say nothing, or half a word, do not hold a hand-over up: everybody else's tunnels wait
/// while it goes on.
fn silent_and_slow_peers_hold_nobody_up(mesh: &mut Mesh) -> anyhow::Result<()> {
    let server = mesh.lab.pod("server").ipv4.to_string();
    let dial = format!(
        "import socket, sys\n\
         all = [socket.create_connection(('{server}', 15008)) for _ in range(40)]\n\
         for one in all[:20]: one.sendall(bytes.fromhex('16030100c8010000c4'))\n\
         print('dialled', flush=True)\n\
         sys.stdin.read()\n"
    );
    let mut command = mesh_netns::process::in_namespace(Some(mesh.lab.outside()), "python3");
    let mut attacker =
        command.args(["-c", &dial]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
    let mut line = String::new();
    BufReader::new(attacker.stdout.take().context("no output")?).read_line(&mut line)?;
    ensure!(line.trim() == "dialled", "the attacker said {line:?}");
    let live = mesh.live()?;
    let index = mesh.lab.node_index("b");
    let begun = Instant::now();
    let predecessor = mesh.lab.start_successor(index, &[])?;
    ended_well(predecessor)?;
    let took = begun.elapsed();
    mesh.lab.node_mut("b").wait_ready()?;
    live.finish()?;
    drop(attacker.stdin.take());
    attacker.kill()?;
    attacker.wait()?;
    // A handshake may take 10 s; the successor starts in about one.
    ensure!(took < Duration::from_secs(9), "the hand-over took {took:?}");
    mesh.works()
}

/// `culvert agent upgrade`: the agent starts its successor itself. A program that is none changes nothing.
fn an_upgrade_by_hand_is_noticed_by_nobody(mesh: &mut Mesh) -> anyhow::Result<()> {
    let live = mesh.live()?;
    let refused = mesh.lab.node("a").culvert(&["agent", "upgrade", "--binary", "/bin/true"])?;
    ensure!(!refused.success(), "/bin/true took over");
    let said = refused.stderr;
    ensure!(said.contains("before it took over"), "{said}");
    let foreign = mesh.lab.folder().join("foreign");
    std::fs::copy("/bin/true", &foreign)?;
    std::fs::set_permissions(&foreign, PermissionsExt::from_mode(0o777))?;
    let foreign = foreign.to_string_lossy().into_owned();
    let refused = mesh.lab.node("a").culvert(&["agent", "upgrade", "--binary", &foreign])?;
    ensure!(!refused.success(), "a program that others can write took over");
    let said = refused.stderr;
    ensure!(said.contains("written by others"), "{said}");
    for _ in 0..2 {
        let done = mesh.lab.node("a").culvert(&["agent", "upgrade"])?;
        let said = done.output()?;
        ensure!(said.contains("has taken over"), "{said}");
    }
    live.finish()?;
    // The last one is nobody's child: it hands over to one of this suite's own.
    mesh.hand_over("a", &[])?;
    mesh.works()
}

type Work = fn(&mut Mesh) -> anyhow::Result<()>;

const WORK: &[(&str, Work)] = &[
    ("nobody_notices_many_hand_overs", nobody_notices_many_hand_overs),
    ("counters_go_on", counters_go_on),
    ("pods_come_and_go_meanwhile", pods_come_and_go_meanwhile),
    ("the_number_of_engines_may_change", the_number_of_engines_may_change),
    ("a_killed_successor_does_no_harm", a_killed_successor_does_no_harm),
    ("a_stranger_is_refused_by_name", a_stranger_is_refused_by_name),
    ("silent_and_slow_peers_hold_nobody_up", silent_and_slow_peers_hold_nobody_up),
    ("an_upgrade_by_hand_is_noticed_by_nobody", an_upgrade_by_hand_is_noticed_by_nobody),
];

fn main() -> anyhow::Result<()> {
    let mut arguments = Arguments::from_args();
    arguments.test_threads = Some(1);
    let mesh = if arguments.list { None } else { Some(Arc::new(Mutex::new(Mesh::start()?))) };
    let trials = WORK
        .iter()
        .map(|(name, work)| {
            let mesh = mesh.clone();
            Trial::test(*name, move || {
                let mesh = mesh.ok_or("only listing")?;
                let mut mesh = mesh.lock().map_err(|_poisoned| "an earlier trial panicked")?;
                work(&mut mesh).map_err(|error| {
                    format!("{error:#}\n{}", mesh.lab.node("a").agent_log(40)).into()
                })
            })
        })
        .collect();
    let conclusion = libtest_mimic::run(&arguments, trials);
    drop(mesh);
    conclusion.exit();
}
