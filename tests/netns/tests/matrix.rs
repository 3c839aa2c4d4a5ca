//! Every kind of connection between captured and plain pods, on one node and across, IPv4 and IPv6.
//!
//! One lab for all; each cell of the matrix is a test of its own.

use std::net::{IpAddr, SocketAddr};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use libtest_mimic::{Arguments, Trial};
use mesh_netns::peer::ports as peer;
use mesh_netns::process::run;
use mesh_netns::servers::{self, ports};
use mesh_netns::wait::{PATIENCE, until};
use mesh_netns::{Lab, LabConfig, Pod, PodSpec, Process, manifest};

/// Bytes of one direction of the bulk cell.
const BULK_BYTES: u64 = 1 << 30;
const IDLE_CONNECTIONS: usize = 5000;

struct Mesh {
    lab: Lab,
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

impl Cell {
    fn client(&self) -> &Pod {
        self.mesh.lab.pod(self.client)
    }

    fn server(&self) -> &Pod {
        self.mesh.lab.pod(self.server)
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

    /// The check; where the pair talks directly once more, since the first connection of each port goes through the agent.
    fn run(&self, name: &str, check: Check) -> anyhow::Result<()> {
        check(self)?;
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
    ("closed_port", |cell| {
        cell.peer(&["closed", &cell.target(4444).to_string(), "10000"]).map(drop)
    }),
    ("iperf", iperf),
    ("bulk_1_gib_each_way", |cell| {
        let target = cell.target(peer::BULK).to_string();
        cell.peer(&["bulk", &target, &BULK_BYTES.to_string()]).map(drop)
    }),
    ("idle_5000", |cell| {
        let target = cell.target(peer::IDLE).to_string();
        cell.peer(&["idle", &target, &IDLE_CONNECTIONS.to_string()]).map(drop)
    }),
];

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
    Ok(Mesh { lab, _servers: servers })
}

fn main() -> anyhow::Result<()> {
    let mut arguments = Arguments::from_args();
    // The lab is shared and the machine small: one cell at a time, so that times mean something.
    arguments.test_threads = Some(1);
    let listing = arguments.list;
    let mesh = if listing { None } else { Some(Arc::new(start()?)) };
    let mut trials = Vec::new();
    for (client, from, servers) in [
        (
            "mc",
            "captured",
            &[
                ("msa", "captured_same_node_direct"),
                ("psa", "plain_same_node"),
                ("msb", "captured_other_node"),
                ("psb", "plain_other_node"),
            ][..],
        ),
        ("mcb", "captured", &[("msb", "captured_same_node")]),
        (
            "pc",
            "plain",
            &[
                ("msa", "captured_same_node"),
                ("psa", "plain_same_node"),
                ("msb", "captured_other_node"),
                ("psb", "plain_other_node"),
            ],
        ),
    ] {
        for &(server, to) in servers {
            for (ipv6, family) in [(false, "ipv4"), (true, "ipv6")] {
                for (name, check) in CHECKS {
                    // Not reliable yet: docs/limits.md, "thousands of connections at once".
                    if to.ends_with("direct") && *name == "idle_5000" {
                        continue;
                    }
                    let mesh = mesh.clone();
                    trials.push(Trial::test(
                        format!("{from}_to_{to}_{family}_{name}"),
                        move || {
                            let mesh = mesh.ok_or("only listing")?;
                            let direct = to.ends_with("direct");
                            let cell = Cell { mesh, client, server, ipv6, direct };
                            cell.run(name, *check).map_err(|error| {
                                let node = cell.mesh.lab.node("a");
                                let log = if cell.captured() {
                                    node.agent_log(15)
                                } else {
                                    String::new()
                                };
                                format!("{error:#}\n{log}").into()
                            })
                        },
                    ));
                }
            }
        }
    }
    let conclusion = libtest_mimic::run(&arguments, trials);
    drop(mesh);
    conclusion.exit();
}
