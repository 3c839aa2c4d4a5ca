//! What happens when things go wrong: nothing leaks, nothing established is lost, everything comes back.
//!
//! One lab; the trials run in order, each leaves the lab as it found it.

use std::io::Write as _;
use std::process::Stdio;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use libtest_mimic::{Arguments, Trial};
use mesh_netns::peer::ports as peer;
use mesh_netns::process::{Finished, run};
use mesh_netns::servers::{self, ports};
use mesh_netns::wait::{PATIENCE, until};
use mesh_netns::{Lab, LabConfig, Pod, PodSpec, Process, Sniffer, manifest};
use serde_json::json;

/// What the mesh promises of pods on node a, as a pcap filter: TCP that is not the tunnel.
const LEAK: &str = "net 10.77.0.0/16 and tcp and not port 15008";
const LEAK6: &str = "ip6 and net fd77:1::/64 and tcp and not port 15008";

struct Mesh {
    lab: Lab,
    _servers: Vec<Process>,
}

impl Mesh {
    fn start() -> anyhow::Result<Self> {
        let mut lab = Lab::start(LabConfig::two_nodes("flt"))?;
        lab.apply(&manifest::namespace("mesh", &[("culvert.dev/dataplane-mode", "ambient")]))?;
        let bin_dir = lab.bin_dir().to_owned();
        let mut servers = Vec::new();
        let server = lab.run_pod("b", PodSpec::new("mesh", "server"))?;
        servers.push(servers::nginx(server)?);
        servers.push(servers::peer(server, &bin_dir)?);
        lab.run_pod("a", PodSpec::new("mesh", "client"))?;
        let mesh = Self { lab, _servers: servers };
        until("the client reaching the server", PATIENCE, || {
            Ok(mesh.curl("client")?.success().then_some(()))
        })?;
        Ok(mesh)
    }

    fn client(&self) -> &Pod {
        self.lab.pod("client")
    }

    fn curl(&self, pod: &str) -> anyhow::Result<Finished> {
        let url = format!("http://{}:{}/", self.lab.pod("server").ipv4, ports::HTTP);
        let mut curl = self.lab.pod(pod).command("curl");
        run(curl.args(["-sS", "-m", "5", &url]), Duration::from_secs(10))
    }

    fn peer_program(&self) -> String {
        self.lab.bin_dir().join("culvert-lab-peer").to_string_lossy().into_owned()
    }

    fn sniff(&self, name: &str) -> anyhow::Result<Sniffer> {
        Sniffer::start(self.lab.wire(), "br0", self.lab.folder(), name)
    }

    fn restart_agent(&mut self, node: &str) -> anyhow::Result<()> {
        let index = self.lab.node_index(node);
        self.lab.start_agent(index)?;
        self.lab.node_mut(node).wait_ready()
    }
}

fn no_leak(sniffer: Sniffer) -> anyhow::Result<()> {
    let capture = sniffer.finish()?;
    for filter in [LEAK, LEAK6] {
        let leaked = capture.packets(filter)?;
        ensure!(leaked.is_empty(), "outside the tunnel: {leaked:?}");
    }
    ensure!(!capture.contains(b"hello from server")?, "plaintext on the wire");
    Ok(())
}

/// With the agent dead a new connection is refused within 100 ms and nothing leaves in the clear.
fn dead_agent_refuses_and_nothing_leaks(mesh: &mut Mesh) -> anyhow::Result<()> {
    let sniffer = mesh.sniff("dead")?;
    mesh.lab.node_mut("a").kill_agent();
    let target = format!("{}:{}", mesh.lab.pod("server").ipv4, ports::HTTP);
    for _ in 0..20 {
        let mut closed = mesh.client().command(&mesh.peer_program());
        let how = run(closed.args(["closed", &target, "100"]), PATIENCE)?.output()?;
        ensure!(how.trim() == "refused", "the connection was {how}");
    }
    no_leak(sniffer)?;
    mesh.restart_agent("a")?;
    until("traffic after the restart", PATIENCE, || {
        Ok(mesh.curl("client")?.success().then_some(()))
    })
}

/// Connections made again and again while the agent is killed and started: each is tunnelled or refused.
fn restarts_under_traffic_never_leak(mesh: &mut Mesh) -> anyhow::Result<()> {
    let sniffer = mesh.sniff("restarts")?;
    let url = format!("http://{}:{}/", mesh.lab.pod("server").ipv4, ports::HTTP);
    let line = format!("while :; do curl -s -o /dev/null -m 2 {url} || sleep 0.01; done");
    let mut traffic = mesh.client().command("sh");
    let mut traffic = mesh.client().start("traffic", traffic.args(["-c", &line]))?;
    for _ in 0..3 {
        mesh.lab.node_mut("a").kill_agent();
        mesh.restart_agent("a")?;
        until("traffic after a restart", PATIENCE, || {
            Ok(mesh.curl("client")?.success().then_some(()))
        })?;
    }
    traffic.kill();
    no_leak(sniffer)
}

/// A pod that starts while its node's agent is away fails to start, retryably.
fn pod_does_not_start_without_an_agent(mesh: &mut Mesh) -> anyhow::Result<()> {
    mesh.lab.node_mut("a").kill_agent();
    let refused = mesh.lab.run_pod("a", PodSpec::new("mesh", "early"));
    let message = match refused {
        Ok(_) => anyhow::bail!("the pod started in the clear"),
        Err(error) => format!("{error:#}"),
    };
    ensure!(message.contains("\"code\": 11") || message.contains("\"code\":11"), "{message}");
    mesh.restart_agent("a")?;
    mesh.lab.run_pod("a", PodSpec::new("mesh", "early"))?;
    until("the late pod's traffic", PATIENCE, || Ok(mesh.curl("early")?.success().then_some(())))?;
    mesh.lab.delete_pod("early")
}

/// The controller is away: traffic goes on, also new connections.
fn controller_away_changes_nothing(mesh: &mut Mesh) -> anyhow::Result<()> {
    mesh.lab.kill_controller();
    for _ in 0..5 {
        mesh.curl("client")?.output().context("without a controller")?;
    }
    mesh.lab.start_controller()?;
    mesh.curl("client")?.output().context("after the controller came back").map(drop)
}

/// Raw packets of a pod with every network capability: none leaves the node.
fn raw_packets_of_a_pod_do_not_leave(mesh: &mut Mesh) -> anyhow::Result<()> {
    let sniffer = mesh.sniff("raw")?;
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/raw_packets.py");
    let target = mesh.lab.pod("server");
    let gateway = "10.77.1.1";
    let mut senders = mesh.client().command("python3");
    senders.args([script, &mesh.client().ipv4.to_string(), &target.ipv4.to_string()]);
    senders.args([&mesh.client().ipv6.to_string(), &target.ipv6.to_string(), gateway]);
    let sent = run(&mut senders, Duration::from_secs(30))?.output()?;
    ensure!(sent.contains("sent all"), "the senders said {sent}");
    let capture = sniffer.finish()?;
    ensure!(!capture.contains(b"LEAKED-BY-RAW")?, "a raw packet left the node: {sent}");
    Ok(())
}

/// A pod that removes its own routes, rules and listeners' paths stays captured.
fn pod_that_undoes_its_own_network_does_not_leak(mesh: &mut Mesh) -> anyhow::Result<()> {
    mesh.lab.run_pod("a", PodSpec::new("mesh", "vandal"))?;
    let sniffer = mesh.sniff("vandal")?;
    let vandal = mesh.lab.pod("vandal");
    vandal.shell("ip rule del pref 50; ip -6 rule del pref 50; ip route flush table 133; sysctl -qw net.ipv4.tcp_fwmark_accept=0; tc qdisc del dev eth0 clsact; true")?;
    let url = format!("http://{}:{}/", mesh.lab.pod("server").ipv4, ports::HTTP);
    for _ in 0..5 {
        vandal.shell(&format!("curl -s -m 2 -o /dev/null {url}; true"))?;
    }
    no_leak(sniffer)?;
    mesh.lab.delete_pod("vandal")
}

/// A connection opened before live enrolment never notices it; new ones are captured.
fn live_enrolment_leaves_old_connections_alone(mesh: &mut Mesh) -> anyhow::Result<()> {
    mesh.lab.apply(&manifest::namespace("later", &[]))?;
    mesh.lab.run_pod("a", PodSpec::new("later", "late"))?;
    let target = format!("{}:{}", mesh.lab.pod("server").ipv4, peer::IDLE);
    let mut idle = mesh.lab.pod("late").command(&mesh.peer_program());
    let mut idle = idle
        .args(["idle", &target, "20", "--hold"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()?;
    let mut line = String::new();
    let stdout = idle.stdout.as_mut().context("no output")?;
    std::io::BufRead::read_line(&mut std::io::BufReader::new(stdout), &mut line)?;
    ensure!(line.trim() == "open 20", "the client said {line:?}");
    mesh.lab.apply(&manifest::namespace("later", &[("culvert.dev/dataplane-mode", "ambient")]))?;
    let late = mesh.lab.pod("late");
    let netns = format!("/run/netns/{}", late.netns());
    let arguments = [
        "pod",
        "enroll",
        "--netns",
        &netns,
        "--namespace",
        "later",
        "--name",
        "late",
        "--service-account",
        "late",
        "--uid",
        &late.uid,
        "--live",
    ];
    // The label travels from the folder over the controller to the agent.
    until("the pod being enrolled", PATIENCE, || {
        let enrolled = mesh.lab.node("a").culvert(&arguments)?;
        ensure!(enrolled.success(), "enroll: {}{}", enrolled.stdout, enrolled.stderr);
        Ok(Some(()))
    })?;
    let sniffer = mesh.sniff("late")?;
    until("a new connection through the tunnel", PATIENCE, || {
        Ok(mesh.curl("late")?.success().then_some(()))
    })?;
    idle.stdin.take().context("no input")?.write_all(b"\n")?;
    let ended = idle.wait()?;
    ensure!(ended.success(), "a connection opened before the enrolment was lost");
    let capture = sniffer.finish()?;
    ensure!(!capture.contains(b"hello from server")?, "the new connection was in the clear");
    mesh.lab.delete_pod("late")
}

/// The client's connections that the agent has; in the socket table they lead to its listener.
fn captured_connections(mesh: &Mesh) -> anyhow::Result<usize> {
    let agent = format!("{}:15001", mesh.client().ipv4);
    let sockets = mesh.client().shell(&format!("ss -Htn state established dst {agent}"))?;
    Ok(sockets.stdout.lines().count())
}

/// A process of a pod cannot bind the agent's ports, neither beside the agent nor while it is away.
fn pod_cannot_take_the_agents_ports(mesh: &mut Mesh) -> anyhow::Result<()> {
    const TAKE: &str = "import socket,sys\n\
        for family, address in ((socket.AF_INET, '0.0.0.0'), (socket.AF_INET6, '::'), (socket.AF_INET, sys.argv[1])):\n\
        \x20for port in (15001, 15006, 15008, 15053):\n\
        \x20\x20for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):\n\
        \x20\x20\x20thief = socket.socket(family, kind)\n\
        \x20\x20\x20thief.setsockopt(socket.SOL_SOCKET, 15, 1)\n\
        \x20\x20\x20try: thief.bind((address, port))\n\
        \x20\x20\x20except PermissionError: continue\n\
        \x20\x20\x20print('took', address, port, kind)\n\
        print('tried all')";
    let steal = |mesh: &Mesh| -> anyhow::Result<()> {
        let client = mesh.client();
        let mut thief = client.command("python3");
        let said = run(thief.args(["-c", TAKE, &client.ipv4.to_string()]), PATIENCE)?.output()?;
        ensure!(said.trim() == "tried all", "{said}");
        Ok(())
    };
    steal(mesh).context("beside the agent")?;
    mesh.lab.node_mut("a").kill_agent();
    steal(mesh).context("while the agent is away")?;
    mesh.restart_agent("a")?;
    until("traffic after the restart", PATIENCE, || {
        Ok(mesh.curl("client")?.success().then_some(()))
    })
}

/// A policy that stops allowing a pair cuts its live connection within a second.
fn denying_policy_cuts_live_connections(mesh: &mut Mesh) -> anyhow::Result<()> {
    let program = mesh.peer_program();
    let mut idle = mesh.client().command(&program);
    let mut idle = idle
        .args(["idle", &format!("{}:{}", mesh.lab.pod("server").ipv4, peer::IDLE), "3", "--hold"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()?;
    let mut line = String::new();
    let stdout = idle.stdout.as_mut().context("no output")?;
    std::io::BufRead::read_line(&mut std::io::BufReader::new(stdout), &mut line)?;
    ensure!(line.trim() == "open 3", "the client said {line:?}");
    let open = captured_connections(mesh)?;
    ensure!(open == 3, "{open} connections are open before the policy");
    let deny = manifest::authorization_policy(
        "mesh",
        "no-client",
        &json!({
            "action": "DENY",
            "rules": [{ "from": [{ "source": { "principals": ["cluster.local/ns/mesh/sa/client"] } }] }],
        }),
    );
    mesh.lab.apply(&deny)?;
    let applied = Instant::now();
    until("the live connections being cut", Duration::from_secs(5), || {
        Ok((captured_connections(mesh)? == 0).then_some(()))
    })?;
    let took = applied.elapsed();
    idle.kill()?;
    idle.wait()?;
    mesh.lab.delete(&deny)?;
    until("the client being let in again", PATIENCE, || {
        Ok(mesh.curl("client")?.success().then_some(()))
    })?;
    ensure!(took < Duration::from_secs(1), "cut only after {took:?}");
    Ok(())
}

type Fault = fn(&mut Mesh) -> anyhow::Result<()>;

const FAULTS: &[(&str, Fault)] = &[
    ("dead_agent_refuses_and_nothing_leaks", dead_agent_refuses_and_nothing_leaks),
    ("restarts_under_traffic_never_leak", restarts_under_traffic_never_leak),
    ("pod_does_not_start_without_an_agent", pod_does_not_start_without_an_agent),
    ("controller_away_changes_nothing", controller_away_changes_nothing),
    ("raw_packets_of_a_pod_do_not_leave", raw_packets_of_a_pod_do_not_leave),
    (
        "pod_that_undoes_its_own_network_does_not_leak",
        pod_that_undoes_its_own_network_does_not_leak,
    ),
    ("live_enrolment_leaves_old_connections_alone", live_enrolment_leaves_old_connections_alone),
    ("pod_cannot_take_the_agents_ports", pod_cannot_take_the_agents_ports),
    ("denying_policy_cuts_live_connections", denying_policy_cuts_live_connections),
];

fn main() -> anyhow::Result<()> {
    let mut arguments = Arguments::from_args();
    arguments.test_threads = Some(1);
    let mesh = if arguments.list { None } else { Some(Arc::new(Mutex::new(Mesh::start()?))) };
    let trials = FAULTS
        .iter()
        .map(|(name, fault)| {
            let mesh = mesh.clone();
            Trial::test(*name, move || {
                let mesh = mesh.ok_or("only listing")?;
                let mut mesh = mesh.lock().map_err(|_poisoned| "an earlier trial panicked")?;
                fault(&mut mesh).map_err(|error| {
                    format!("{error:#}\n{}", mesh.lab.node("a").agent_log(25)).into()
                })
            })
        })
        .collect();
    let conclusion = libtest_mimic::run(&arguments, trials);
    drop(mesh);
    conclusion.exit();
}
