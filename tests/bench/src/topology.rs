//! Who runs where: two nodes, the pods that carry load, the relays between them.

use std::net::SocketAddr;
use std::path::Path;

use anyhow::Context as _;
use mesh_netns::process::run as run_program;
use mesh_netns::wait::{PATIENCE, until};
use mesh_netns::{Lab, LabConfig, Pod, PodSpec, Process, manifest};

use crate::{stock, ztunnel};

const LOAD_PORT: u16 = 9000;
const RELAY_SERVER_PORT: u16 = 9002;
const STOCK_SERVER_PORT: u16 = 9003;
/// Connections in TIME_WAIT that each pod keeps. The rows on new connections would otherwise measure, on every way, how a
/// kernel searches for the last free port of 28,000 after the first seconds.
const TIME_WAITS: u32 = 1024;
/// Pods on each node when the rows on memory are taken, those that carry load included.
pub(crate) const PODS: usize = 20;

/// Where the client and the server of a measurement are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Distance {
    /// On two nodes.
    AcrossNodes,
    /// On one node, in a tunnel: node a.
    SameNode,
    /// On one node, on the direct path: node b.
    SameNodeDirect,
}

impl Distance {
    /// In a row's name.
    pub(crate) const fn words(self) -> &'static str {
        match self {
            Self::AcrossNodes => "across nodes",
            Self::SameNode => "same node, tunnel",
            Self::SameNodeDirect => "same node, direct",
        }
    }

    /// The name of the pod with the server, in the mesh and out of it.
    const fn servers(self) -> (&'static str, &'static str) {
        match self {
            Self::AcrossNodes | Self::SameNodeDirect => ("ms", "ps"),
            Self::SameNode => ("ml", "pl"),
        }
    }

    /// The ports on which the relays' client ends listen.
    const fn client_ports(self) -> (u16, u16) {
        match self {
            Self::AcrossNodes | Self::SameNodeDirect => (9011, 9012),
            Self::SameNode => (9021, 9022),
        }
    }
}

/// A way from the client to the server.
#[derive(Debug)]
pub(crate) struct Way {
    pub(crate) name: &'static str,
    /// The pod of the client.
    pub(crate) client: &'static str,
    pub(crate) target: SocketAddr,
    /// The processes whose CPU time counts.
    pub(crate) relays: Vec<u32>,
}

/// Names of the ways, as columns.
pub(crate) const PLAIN: &str = "plain";
pub(crate) const RELAY: &str = "relay";
pub(crate) const STOCK: &str = "stock";
pub(crate) const ZTUNNEL: &str = "ztunnel";
pub(crate) const CULVERT: &str = "culvert";

/// The running lab. Its parts end with it.
pub(crate) struct Topology {
    pub(crate) lab: Lab,
    program: String,
    /// Processes of both distances; dropped before the lab.
    parts: Vec<Process>,
    ways: Vec<(Distance, Vec<Way>)>,
}

impl Topology {
    /// Builds everything and starts every server and relay.
    pub(crate) fn start() -> anyhow::Result<Self> {
        let peer = ztunnel::binary()?;
        let mut lab = Lab::start(LabConfig {
            log: "warn".to_owned(),
            same_node: ("tunnel", vec![("b", "direct")]),
            ..LabConfig::two_nodes("bch")
        })?;
        lab.apply(&manifest::namespace("mesh", &[("culvert.dev/dataplane-mode", "ambient")]))?;
        lab.apply(&manifest::namespace("plain", &[]))?;
        for (node, pod) in [("a", "c"), ("a", "l"), ("b", "s"), ("b", "d")] {
            lab.run_pod(node, PodSpec::new("mesh", &format!("m{pod}")))?;
            lab.run_pod(node, PodSpec::new("plain", &format!("p{pod}")))?;
        }
        if peer.is_some() {
            lab.run_pod("a", PodSpec::new("plain", "zc"))?;
            lab.run_pod("b", PodSpec::new("plain", "zs"))?;
        }
        for (node, running) in [("a", 2), ("b", 2)] {
            for number in running..PODS {
                lab.run_pod(node, PodSpec::new("mesh", &format!("q{node}{number}")))?;
            }
        }
        for pod in ["mc", "pc", "ms", "ps", "ml", "pl", "md", "pd"] {
            let pod = lab.pod(pod);
            run_program(
                pod.command("sysctl")
                    .args(["-qw", &format!("net.ipv4.tcp_max_tw_buckets={TIME_WAITS}")]),
                PATIENCE,
            )?
            .output()
            .with_context(|| format!("bounding TIME_WAIT in {}", pod.spec.name))?;
        }
        let program = std::env::current_exe()?.to_string_lossy().into_owned();
        let mut topology = Self { lab, program, parts: Vec::new(), ways: Vec::new() };
        for pod in ["ms", "ps", "ml", "pl"] {
            topology.part(pod, "load", &["serve".to_owned(), LOAD_PORT.to_string()])?;
        }
        let certificates = topology.lab.folder().join("stock");
        stock::make_certificates(&certificates)?;
        for distance in [Distance::AcrossNodes, Distance::SameNode] {
            let ways = topology.connect(distance)?;
            topology.ways.push((distance, ways));
        }
        let direct = topology.direct()?;
        topology.ways.push((Distance::SameNodeDirect, direct));
        if let Some(binary) = peer {
            let way = topology.start_ztunnel(&binary)?;
            if let Some((_, ways)) = topology.ways.first_mut() {
                ways.push(way);
            }
        }
        Ok(topology)
    }

    /// The ways between client and server, in the order of the report's columns.
    pub(crate) fn ways(&self, distance: Distance) -> &[Way] {
        self.ways
            .iter()
            .find(|(which, _)| *which == distance)
            .map_or(&[], |(_, ways)| ways.as_slice())
    }

    pub(crate) fn pod(&self, name: &str) -> &Pod {
        self.lab.pod(name)
    }

    pub(crate) fn program(&self) -> &str {
        &self.program
    }

    /// The agents' process ids, node a first.
    pub(crate) fn agents(&self) -> Vec<u32> {
        ["a", "b"].iter().filter_map(|node| Some(self.lab.node(node).agent()?.pid())).collect()
    }

    /// Starts the plain and the stock relay of one distance.
    fn connect(&mut self, distance: Distance) -> anyhow::Result<Vec<Way>> {
        let (mesh_server, plain_server) = distance.servers();
        let (relay_port, stock_port) = distance.client_ports();
        let plain_ip = self.pod(plain_server).ipv4;
        let certificates = self.lab.folder().join("stock").to_string_lossy().into_owned();
        let words = |words: &[&str], more: &[String]| -> Vec<String> {
            words.iter().map(|word| (*word).to_owned()).chain(more.iter().cloned()).collect()
        };
        let load = format!("127.0.0.1:{LOAD_PORT}");
        let mut relay =
            |pod: &str, name: &str, arguments: &[String]| self.part(pod, name, arguments);
        let relays = vec![
            relay(
                plain_server,
                "relay",
                &words(&["plain"], &[format!("0.0.0.0:{RELAY_SERVER_PORT}"), load.clone()]),
            )?,
            relay(
                "pc",
                &format!("relay{relay_port}"),
                &words(
                    &["plain"],
                    &[format!("127.0.0.1:{relay_port}"), format!("{plain_ip}:{RELAY_SERVER_PORT}")],
                ),
            )?,
        ];
        let stocks = vec![
            relay(
                plain_server,
                "stock",
                &words(
                    &["stock", "server"],
                    &[format!("0.0.0.0:{STOCK_SERVER_PORT}"), load, certificates.clone()],
                ),
            )?,
            relay(
                "pc",
                &format!("stock{stock_port}"),
                &words(
                    &["stock", "client"],
                    &[
                        format!("127.0.0.1:{stock_port}"),
                        format!("{plain_ip}:{STOCK_SERVER_PORT}"),
                        certificates,
                    ],
                ),
            )?,
        ];
        let local = |port: u16| SocketAddr::from(([127, 0, 0, 1], port));
        let agents = match distance {
            Distance::AcrossNodes => self.agents(),
            Distance::SameNode | Distance::SameNodeDirect => {
                self.agents().into_iter().take(1).collect()
            }
        };
        Ok(vec![
            Way {
                name: PLAIN,
                client: "pc",
                target: SocketAddr::new(plain_ip, LOAD_PORT),
                relays: Vec::new(),
            },
            Way { name: RELAY, client: "pc", target: local(relay_port), relays },
            Way { name: STOCK, client: "pc", target: local(stock_port), relays: stocks },
            Way {
                name: CULVERT,
                client: "mc",
                target: SocketAddr::new(self.pod(mesh_server).ipv4, LOAD_PORT),
                relays: agents,
            },
        ])
    }

    /// Without a mesh and on the direct path. The first connections, which go through the agent, are made here.
    fn direct(&self) -> anyhow::Result<Vec<Way>> {
        let (mesh_server, plain_server) = Distance::SameNodeDirect.servers();
        let target = |pod: &str| SocketAddr::new(self.pod(pod).ipv4, LOAD_PORT);
        let way = |name, client, server: &str, relays| Way {
            name,
            client,
            target: target(server),
            relays,
        };
        let agent = self.agents().into_iter().skip(1).collect();
        let ways = vec![
            way(PLAIN, "pd", plain_server, Vec::new()),
            way(CULVERT, "md", mesh_server, agent),
        ];
        until("direct connections", PATIENCE, || {
            let mut load = self.pod("md").command(&self.program);
            load.args(["load", "connect", &target(mesh_server).to_string()]);
            load.args(["--concurrency", "1", "--duration-ms", "200"]);
            run_program(&mut load, PATIENCE)?.output()?;
            let metrics = self.lab.node("b").metrics()?;
            let line = metrics.lines().find(|line| line.contains("event=\"direct_dialled\""));
            let count = line.and_then(|line| line.rsplit(' ').next()?.parse::<u64>().ok());
            Ok(count.filter(|count| *count > 0).map(drop))
        })?;
        Ok(ways)
    }

    /// Starts ztunnel in two pods of its own, on two nodes.
    fn start_ztunnel(&mut self, binary: &Path) -> anyhow::Result<Way> {
        self.part("zs", "load", &["serve".to_owned(), LOAD_PORT.to_string()])?;
        let (client, server) = (self.lab.pod("zc"), self.lab.pod("zs"));
        let workloads = self.lab.folder().join("ztunnel.yaml");
        std::fs::write(&workloads, ztunnel::workloads([client, server]).to_string())?;
        let target = SocketAddr::new(server.ipv4, LOAD_PORT);
        let mut relays = Vec::new();
        for pod in [client, server] {
            let mut command = pod.command(&binary.to_string_lossy());
            command.envs(ztunnel::environment(pod, &workloads.to_string_lossy()));
            let mut process = pod.start("ztunnel", command.arg("proxy"))?;
            until("ztunnel", PATIENCE, || {
                if !process.running() {
                    anyhow::bail!("ZTUNNEL ended at its start: {}", process.log_tail(20));
                }
                Ok(ztunnel::listens(process.pid()).then_some(()))
            })?;
            relays.push(process.pid());
            self.parts.push(process);
        }
        ztunnel::redirect(client, target)?;
        Ok(Way { name: ZTUNNEL, client: "zc", target, relays })
    }

    /// Starts one of this program's verbs in a pod and waits until it serves; gives its process id.
    fn part(&mut self, pod: &str, name: &str, arguments: &[String]) -> anyhow::Result<u32> {
        let pod = self.lab.pod(pod);
        let mut command = pod.command(&self.program);
        let mut process = pod.start(name, command.args(arguments))?;
        until(name, PATIENCE, || {
            if !process.running() {
                anyhow::bail!("{name} ended: {}", process.log_tail(5));
            }
            Ok(process.log().contains("serving").then_some(()))
        })
        .with_context(|| format!("{name} in {}", pod.spec.name))?;
        let pid = process.pid();
        self.parts.push(process);
        Ok(pid)
    }
}

impl std::fmt::Debug for Topology {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Topology").field("parts", &self.parts.len()).finish_non_exhaustive()
    }
}

impl Drop for Topology {
    fn drop(&mut self) {
        self.parts.clear();
    }
}
