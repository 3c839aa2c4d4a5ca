//! Every kind of connection between captured and plain pods, on one node and across, IPv4 and IPv6.
//!
//! One lab for all; each cell of the matrix is a test of its own.

use std::net::{IpAddr, SocketAddr};
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::{Context as _, anyhow, ensure};
use libtest_mimic::{Arguments, Trial};
use mesh_netns::peer::ports as peer;
use mesh_netns::process::run;
use mesh_netns::servers::{self, ports};
use mesh_netns::wait::{PATIENCE, until};
use mesh_netns::{Held, Lab, LabConfig, Pod, PodSpec, Process, Sniffer, manifest};

/// Bytes of one direction of the bulk cell.
const BULK_BYTES: u64 = 1 << 30;
const IDLE_CONNECTIONS: u32 = 5000;
/// How long they lie idle at least.
const IDLE_FOR: Duration = Duration::from_secs(30);
/// Descriptors that idle connections may take of an agent at a time: less than a machine gives that is not generous.
const IDLE_DESCRIPTORS: u32 = 15_000;

struct Mesh {
    lab: Lab,
    idle: Mutex<Vec<Idle>>,
    outside: Mutex<Vec<Outside>>,
    _servers: Vec<Process>,
}

/// One cell's surroundings.
struct Cell {
    mesh: Arc<Mesh>,
    client: &'static str,
    server: &'static str,
    ipv6: bool,
    /// The pair talks without the agent, once it has carried a connection.
    direct: bool,
}

/// Client, server, and whether they talk by IPv6.
type Pair = (&'static str, &'static str, bool);

impl Cell {
    fn client(&self) -> &Pod {
        self.mesh.lab.pod(self.client)
    }

    fn server(&self) -> &Pod {
        self.mesh.lab.pod(self.server)
    }

    fn pair(&self) -> Pair {
        (self.client, self.server, self.ipv6)
    }

    fn target(&self, port: u16) -> SocketAddr {
        SocketAddr::new(address(self.server(), self.ipv6), port)
    }

    fn command(&self, program: &str, arguments: &[&str]) -> Command {
        let mut command = self.client().command(program);
        command.args(arguments);
        command
    }

    /// Runs a verb of the lab's peer in the client pod.
    fn peer(&self, arguments: &[&str]) -> anyhow::Result<String> {
        let program = self.mesh.lab.bin_dir().join("culvert-lab-peer");
        let mut command = self.command(&program.to_string_lossy(), arguments);
        run(&mut command, Duration::from_secs(400))?.output()
    }

    /// Connections of node a's pods that went directly, so far.
    fn dialled_directly(&self) -> anyhow::Result<u64> {
        let metrics = self.mesh.lab.node("a").metrics()?;
        let line = metrics.lines().find(|line| line.contains("event=\"direct_dialled\""));
        let count = line.and_then(|line| line.rsplit(' ').next()?.parse().ok());
        count.context("no counter of direct connections")
    }

    /// Connections that the agents have counted between the pair: through a tunnel as the client's agent and as the server's
    /// says, and otherwise.
    fn counted(&self) -> anyhow::Result<[u64; 4]> {
        let mut counted = [0; 4];
        for (end, reporter) in [(self.client(), "source"), (self.server(), "destination")] {
            let metrics = self.mesh.lab.node(&end.node).metrics()?;
            let at = usize::from(reporter == "destination");
            for (at, policy) in [(at, "mutual_tls"), (at + 2, "unknown")] {
                let labels = [
                    format!("reporter=\"{reporter}\""),
                    format!("source_workload=\"{}\"", self.client),
                    format!("destination_workload=\"{}\"", self.server),
                    format!("connection_security_policy=\"{policy}\""),
                ];
                counted[at] += metrics
                    .lines()
                    .filter(|line| line.starts_with("istio_tcp_connections_opened_total{"))
                    .filter(|line| labels.iter().all(|label| line.contains(label)))
                    .filter_map(|line| line.rsplit(' ').next()?.parse::<u64>().ok())
                    .sum::<u64>();
            }
        }
        Ok(counted)
    }

    /// Which of [`counted`](Self::counted) each connection of the pair adds to; none to the others.
    fn counts(&self) -> [bool; 4] {
        let captured = |pod: &Pod| pod.spec.namespace == "mesh";
        match (captured(self.client()), captured(self.server())) {
            (true, true) => [true, true, false, false],
            (true, false) => [false, false, true, false],
            (false, true) => [false, false, false, true],
            (false, false) => [false; 4],
        }
    }

    /// The check, and that its connections were captured as they had to be, as both agents say.
    fn check_captured(&self, name: &str, check: Check) -> anyhow::Result<()> {
        let before = self.counted()?;
        check(self)?;
        if self.direct {
            return Ok(());
        }
        let least = match name {
            "idle_5000" => u64::from(IDLE_CONNECTIONS),
            _ => 1,
        };
        let counts = self.counts();
        let seen = std::cell::Cell::new(before);
        until("the agents counting the connections", PATIENCE, || {
            seen.set(self.counted()?);
            let enough = (0..4).all(|at| !counts[at] || seen.get()[at] >= before[at] + least);
            Ok(enough.then_some(()))
        })
        .with_context(|| format!("counted {before:?}, then {:?}", seen.get()))?;
        let others = (0..4).all(|at| counts[at] || seen.get()[at] == before[at]);
        ensure!(others, "carried in another way: counted {before:?}, then {:?}", seen.get());
        Ok(())
    }

    /// The check; where the pair talks directly once more, since the first connection of each port goes through the agent.
    fn run(&self, name: &str, check: Check) -> anyhow::Result<()> {
        self.check_captured(name, check)?;
        if !self.direct || name == "closed_port" {
            return Ok(());
        }
        let settled = || Ok(Some(self.dialled_directly()?));
        let before = until("the counters", PATIENCE, settled)?;
        until("a direct connection", PATIENCE, || {
            check(self).context("directly")?;
            Ok((self.dialled_directly()? > before).then_some(()))
        })
    }

    fn captured(&self) -> bool {
        self.client().spec.namespace == "mesh" || self.server().spec.namespace == "mesh"
    }
}

fn address(pod: &Pod, ipv6: bool) -> IpAddr {
    if ipv6 { pod.ipv6 } else { pod.ipv4 }
}

type Check = fn(&Cell) -> anyhow::Result<()>;
type Run = fn(&Cell, &str, Check) -> anyhow::Result<()>;

const CHECKS: &[(&str, Check)] = &[
    ("addresses", addresses),
    ("http1", http1),
    ("http2", http2),
    ("redis", redis),
    ("postgres", postgres),
    ("grpc_bidirectional", |cell| {
        cell.peer(&["grpc", &cell.target(peer::GRPC).to_string(), "200"]).map(drop)
    }),
    ("websocket", |cell| {
        cell.peer(&["websocket", &cell.target(peer::WEBSOCKET).to_string(), "50"]).map(drop)
    }),
    ("server_first", |cell| {
        cell.peer(&["server-first", &cell.target(peer::SERVER_FIRST).to_string()]).map(drop)
    }),
    ("client_half_close", |cell| {
        cell.peer(&["client-half-close", &cell.target(peer::ECHO).to_string()]).map(drop)
    }),
    ("server_half_close", |cell| {
        let (target, endings) = (cell.target(peer::SERVER_HALF_CLOSE), cell.target(peer::ENDINGS));
        cell.peer(&["server-half-close", &target.to_string(), &endings.to_string()]).map(drop)
    }),
    ("server_reset", |cell| {
        cell.peer(&["server-reset", &cell.target(peer::RESET).to_string()]).map(drop)
    }),
    ("client_reset", |cell| {
        let (watch, endings) = (cell.target(peer::WATCH), cell.target(peer::ENDINGS));
        cell.peer(&["client-reset", &watch.to_string(), &endings.to_string()]).map(drop)
    }),
    ("closed_port", closed_port),
    ("iperf", iperf),
    ("bulk_1_gib_each_way", |cell| {
        let target = cell.target(peer::BULK).to_string();
        cell.peer(&["bulk", &target, &BULK_BYTES.to_string()]).map(drop)
    }),
];

/// Opens quiet connections, which [`Idle::used`] uses later.
fn idle_opened(cell: &Cell) -> anyhow::Result<()> {
    let held =
        Held::open(&cell.mesh.lab, cell.client(), cell.target(peer::IDLE), IDLE_CONNECTIONS)?;
    let mut all = cell.mesh.idle.lock().map_err(|_poisoned| anyhow!("another cell panicked"))?;
    all.push(Idle { pair: cell.pair(), held, since: Instant::now() });
    Ok(())
}

/// The quiet connections of a cell.
struct Idle {
    pair: Pair,
    held: Held,
    since: Instant,
}

impl Idle {
    /// Each of the cell's connections still works, after it has lain idle for long enough.
    fn used(cell: &Cell) -> anyhow::Result<()> {
        let opened: Vec<Self> = {
            let mut all =
                cell.mesh.idle.lock().map_err(|_poisoned| anyhow!("another cell panicked"))?;
            all.extract_if(.., |idle| idle.pair == cell.pair()).collect()
        };
        ensure!(!opened.is_empty(), "they were not opened");
        // Those of a pair that talks directly were opened twice.
        for opened in opened {
            std::thread::sleep(IDLE_FOR.saturating_sub(opened.since.elapsed()));
            let used = opened.held.use_all()?;
            used.map_err(|said| anyhow!("after {:?}: {said}", opened.since.elapsed()))?;
        }
        Ok(())
    }
}

/// Nobody listens: the client is refused. Behind an agent its connection was accepted, and is reset (docs/limits.md).
fn closed_port(cell: &Cell) -> anyhow::Result<()> {
    let said = cell.peer(&["closed", &cell.target(4444).to_string(), "10000"])?;
    let wanted = if cell.captured() { "reset" } else { "refused" };
    let how = said.split(' ').next().unwrap_or_default();
    ensure!(how == wanted, "the connection was {how}, not {wanted}");
    Ok(())
}

/// Headers of what captured pods say to each other outside of tunnels; there may be none.
struct Outside(Sniffer);

/// TCP of this pair that is no tunnel, as a pcap filter.
fn outside_tunnels(one: &Pod, other: &Pod) -> String {
    format!(
        "tcp and not port 15008 and ( ( host {} and host {} ) or ( host {} and host {} ) )",
        one.ipv4, other.ipv4, one.ipv6, other.ipv6
    )
}

impl Outside {
    /// On the wire for the pair of two nodes, on every interface of node b (each veth's end among them) for the pair there.
    fn start(lab: &Lab) -> anyhow::Result<Vec<Self>> {
        [("mc", lab.wire(), "br0"), ("mcb", lab.node("b").netns(), "any")]
            .map(|(client, namespace, interface)| {
                let filter = outside_tunnels(lab.pod(client), lab.pod("msb"));
                let name = format!("outside-{client}");
                Sniffer::start_for(namespace, interface, lab.folder(), &name, &filter).map(Self)
            })
            .into_iter()
            .collect()
    }

    fn finish(self) -> anyhow::Result<usize> {
        Ok(self.0.finish()?.packets("tcp")?.len())
    }
}

/// In all cells before this nothing was seen between captured pods but tunnels; between others such a sniffer sees.
fn nothing_outside_tunnels(mesh: &Arc<Mesh>) -> anyhow::Result<()> {
    let lab = &mesh.lab;
    let sniffers = std::mem::take(
        &mut *mesh.outside.lock().map_err(|_poisoned| anyhow!("another cell panicked"))?,
    );
    for sniffer in sniffers {
        let packets = sniffer.finish()?;
        ensure!(packets == 0, "{packets} packets of captured pods outside tunnels");
    }
    let filter = outside_tunnels(lab.pod("pc"), lab.pod("psb"));
    for (place, namespace, interface) in
        [("wire", lab.wire(), "br0"), ("b", lab.node("b").netns(), "any")]
    {
        let name = format!("outside-control-{place}");
        let control = Sniffer::start_for(namespace, interface, lab.folder(), &name, &filter)?;
        for ipv6 in [false, true] {
            let mesh = Arc::clone(mesh);
            http1(&Cell { mesh, client: "pc", server: "psb", ipv6, direct: false })?;
        }
        let packets = Outside(control).finish()?;
        ensure!(packets >= 20, "{place}: only {packets} packets of two plain requests");
    }
    Ok(())
}

/// The client's getpeername is what it dialled, the server sees the client's own address and its own.
fn addresses(cell: &Cell) -> anyhow::Result<()> {
    let target = cell.target(peer::WHO);
    let line = cell.peer(&["who", &target.to_string()])?;
    let seen: Vec<SocketAddr> = line
        .split_whitespace()
        .map(|word| word.parse::<SocketAddr>().map(canonical))
        .collect::<Result<_, _>>()
        .with_context(|| format!("peer said {line:?}"))?;
    let [peer, client, server] = seen[..] else { anyhow::bail!("peer said {line:?}") };
    ensure!(peer == target, "getpeername is {peer}, dialled {target}");
    ensure!(server == target, "the server's own address is {server}, dialled {target}");
    let own = address(cell.client(), cell.ipv6);
    ensure!(client.ip() == own, "the server sees {client}, the client is {own}");
    Ok(())
}

fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

fn http1(cell: &Cell) -> anyhow::Result<()> {
    http(cell, ports::HTTP, "--http1.1")
}

fn http2(cell: &Cell) -> anyhow::Result<()> {
    http(cell, ports::HTTP2, "--http2-prior-knowledge")
}

fn http(cell: &Cell, port: u16, version: &str) -> anyhow::Result<()> {
    let url = format!("http://{}/", cell.target(port));
    let mut curl = cell.command("curl", &["-sS", "-g", "-m", "60", version, &url]);
    let body = run(&mut curl, Duration::from_secs(70))?.output()?;
    let own = address(cell.client(), cell.ipv6);
    let wanted = format!("hello from {} to {own}\n", cell.server);
    ensure!(body == wanted, "nginx said {body:?}, wanted {wanted:?}");
    Ok(())
}

fn redis(cell: &Cell) -> anyhow::Result<()> {
    let target = cell.target(ports::REDIS);
    let key = format!("{}-{}-{}", cell.client, cell.server, cell.ipv6);
    let host = target.ip().to_string();
    let base = ["-h", &host, "-p", "6379"];
    let mut set = cell.command("redis-cli", &base);
    run(set.args(["set", &key, "42"]), PATIENCE)?.output()?;
    let mut get = cell.command("redis-cli", &base);
    let value = run(get.args(["get", &key]), PATIENCE)?.output()?;
    ensure!(value.trim() == "42", "redis said {value:?}");
    Ok(())
}

fn postgres(cell: &Cell) -> anyhow::Result<()> {
    let host = cell.target(ports::POSTGRES).ip().to_string();
    let query = "select sum(n) from generate_series(1, 100000) as n";
    let mut psql = cell.command("psql", &["-h", &host, "-U", "postgres", "-tAc", query]);
    let sum = run(psql.env("PGCONNECT_TIMEOUT", "40"), PATIENCE)?.output()?;
    ensure!(sum.trim() == "5000050000", "psql said {sum:?}");
    Ok(())
}

fn iperf(cell: &Cell) -> anyhow::Result<()> {
    let host = cell.target(ports::IPERF).ip().to_string();
    let mut iperf = cell.command("iperf3", &["-c", &host, "-t", "1", "-J", "--bidir"]);
    let output = run(&mut iperf, Duration::from_secs(90))?.output()?;
    ensure!(!output.contains("\"error\""), "iperf3 said {output}");
    Ok(())
}

fn start() -> anyhow::Result<Mesh> {
    // Pods of node a talk directly, those of node b through tunnels.
    let same_node = ("direct", vec![("b", "tunnel")]);
    let mut lab = Lab::start(LabConfig { same_node, ..LabConfig::two_nodes("mtx") })?;
    lab.apply(&manifest::namespace("mesh", &[("culvert.dev/dataplane-mode", "ambient")]))?;
    lab.apply(&manifest::namespace("plain", &[]))?;
    let mut servers = Vec::new();
    for (node, suffix) in [("a", "a"), ("b", "b")] {
        for (namespace, role) in [("mesh", "ms"), ("plain", "ps")] {
            let name = format!("{role}{suffix}");
            let bin_dir = lab.bin_dir().to_owned();
            let pod = lab.run_pod(node, PodSpec::new(namespace, &name))?;
            servers.push(servers::nginx(pod)?);
            servers.push(servers::redis(pod)?);
            servers.push(servers::iperf(pod)?);
            servers.push(servers::postgres(pod)?);
            servers.push(servers::peer(pod, &bin_dir)?);
        }
    }
    lab.run_pod("a", PodSpec::new("mesh", "mc"))?;
    lab.run_pod("a", PodSpec::new("plain", "pc"))?;
    lab.run_pod("b", PodSpec::new("mesh", "mcb"))?;
    let outside = Mutex::new(Outside::start(&lab)?);
    Ok(Mesh { lab, idle: Mutex::default(), outside, _servers: servers })
}

/// A cell's place in the matrix.
#[derive(Clone, Copy)]
struct Place {
    pair: Pair,
    title: &'static str,
    family: &'static str,
}

impl Place {
    fn is_direct(&self) -> bool {
        self.title.ends_with("direct")
    }

    /// How many descriptors of the agents of nodes a and b its idle connections take: two where one end is plain.
    fn descriptors(&self) -> [u32; 2] {
        let (client, server, _) = self.pair;
        let is_captured = |pod: &str| pod.starts_with('m');
        let mut taken = [0; 2];
        for (pod, other) in [(client, server), (server, client)] {
            let each = u32::from(is_captured(pod)) + u32::from(!is_captured(other));
            taken[usize::from(pod.ends_with('b'))] +=
                if is_captured(pod) { each * IDLE_CONNECTIONS } else { 0 };
        }
        taken
    }
}

fn places() -> Vec<Place> {
    let mut places = Vec::new();
    for (client, server, title) in [
        ("mc", "msa", "captured_to_captured_same_node_direct"),
        ("mc", "psa", "captured_to_plain_same_node"),
        ("mc", "msb", "captured_to_captured_other_node"),
        ("mc", "psb", "captured_to_plain_other_node"),
        ("mcb", "msb", "captured_to_captured_same_node"),
        ("pc", "msa", "plain_to_captured_same_node"),
        ("pc", "psa", "plain_to_plain_same_node"),
        ("pc", "msb", "plain_to_captured_other_node"),
        ("pc", "psb", "plain_to_plain_other_node"),
    ] {
        for (ipv6, family) in [(false, "ipv4"), (true, "ipv6")] {
            places.push(Place { pair: (client, server, ipv6), title, family });
        }
    }
    places
}

/// The cells whose idle connections are open at the same time: as many as the agents have descriptors for.
fn side_by_side(places: &[Place]) -> Vec<Vec<Place>> {
    let mut groups: Vec<([u32; 2], Vec<Place>)> = Vec::new();
    for place in places {
        let [a, b] = place.descriptors();
        let room = groups.iter_mut().find(|(taken, _)| {
            taken[0] + a <= IDLE_DESCRIPTORS && taken[1] + b <= IDLE_DESCRIPTORS
        });
        match room {
            Some((taken, group)) => {
                *taken = [taken[0] + a, taken[1] + b];
                group.push(*place);
            }
            None => groups.push(([a, b], vec![*place])),
        }
    }
    groups.into_iter().map(|(_, group)| group).collect()
}

fn main() -> anyhow::Result<()> {
    let mut arguments = Arguments::from_args();
    // The lab is shared and the machine small: one cell at a time, so that times mean something.
    arguments.test_threads = Some(1);
    let mesh = if arguments.list { None } else { Some(Arc::new(start()?)) };
    let trial = |place: &Place, name: &'static str, check: Check, run: Run| {
        let (mesh, place) = (mesh.clone(), *place);
        Trial::test(format!("{}_{}_{name}", place.title, place.family), move || {
            let mesh = mesh.ok_or("only listing")?;
            let (client, server, ipv6) = place.pair;
            let cell = Cell { mesh, client, server, ipv6, direct: place.is_direct() };
            run(&cell, name, check).map_err(|error| {
                let node = cell.mesh.lab.node("a");
                let log = if cell.captured() { node.agent_log(15) } else { String::new() };
                format!("{error:#}\n{log}").into()
            })
        })
    };
    let places = places();
    let idle = side_by_side(&places);
    let mut trials = Vec::new();
    let mut others = places.chunks(places.len().div_ceil(idle.len()));
    for group in &idle {
        trials.extend(group.iter().map(|place| trial(place, "idle_5000", idle_opened, Cell::run)));
        for place in others.next().unwrap_or_default() {
            trials.extend(CHECKS.iter().map(|(name, check)| trial(place, name, *check, Cell::run)));
        }
        let used: Run = |cell, _, used| used(cell);
        trials.extend(group.iter().map(|place| trial(place, "idle_5000_used", Idle::used, used)));
    }
    let shared = mesh.clone();
    trials.push(Trial::test("nothing_outside_tunnels", move || {
        let mesh = shared.ok_or("only listing")?;
        nothing_outside_tunnels(&mesh).map_err(|error| format!("{error:#}").into())
    }));
    let conclusion = libtest_mimic::run(&arguments, trials);
    drop(mesh);
    conclusion.exit();
}
