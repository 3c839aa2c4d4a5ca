//! Pods with every capability over their own network, and the will to get past the agent.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::net::IpAddr;
use std::path::PathBuf;
use std::process::Command;
use std::time::SystemTime;

use anyhow::{Context as _, ensure};
use mesh_netns::process::run;
use mesh_netns::servers::ports;
use mesh_netns::wait::{PATIENCE, until};
use mesh_netns::{PodSpec, Process, Traffic, manifest};

use crate::enrolment::{AMBIENT, enroll};
use crate::mesh::Mesh;
use crate::watch::{End, Place, Scope, Seen, Watch};

const GATEWAY: &str = "10.77.1.1";
/// A pod's capabilities over its network, and no others.
const CAPABILITIES: [&str; 4] =
    ["setpriv", "--bounding-set=-all,+net_admin,+net_raw", "--inh-caps=-all", "--"];

/// What makes packets by hand in the pod `from`, addressed to `to`, by the link address that `next_hop` has.
fn sender(mesh: &Mesh, label: &str, from: &str, to: &str, next_hop: IpAddr) -> Command {
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/faults/raw_packets.py");
    let (source, target) = (mesh.pod(from), mesh.pod(to));
    let mut sender = source.command(CAPABILITIES[0]);
    sender.args(&CAPABILITIES[1..]).args(["python3", script, label]);
    for ip in [source.ipv4, target.ipv4, source.ipv6, target.ipv6, next_hop] {
        sender.arg(ip.to_string());
    }
    sender
}

/// Sends them once; their names.
fn send_raw(
    mesh: &Mesh,
    label: &str,
    from: &str,
    to: &str,
    next_hop: IpAddr,
) -> anyhow::Result<Vec<String>> {
    let names = run(&mut sender(mesh, label, from, to, next_hop), PATIENCE)?.output()?;
    Ok(names.lines().map(str::to_owned).collect())
}

/// Each of the packets was tried, and seen nowhere but there.
fn none_left(seen: &Seen, label: &str, names: &[String], end: &End) -> anyhow::Result<()> {
    let marked = seen.marked(&format!("LEAKED-BY-{label}-"))?;
    ensure!(
        !names.is_empty() && marked.len() == names.len(),
        "{names:?} were sent, seen {marked:?}"
    );
    for name in names {
        only_tried(&marked, name, end).with_context(|| label.to_owned())?;
    }
    Ok(())
}

fn only_tried(
    marked: &BTreeMap<String, BTreeSet<Place>>,
    name: &str,
    end: &End,
) -> anyhow::Result<()> {
    let places = marked.get(name).with_context(|| format!("{name} was not sent"))?;
    ensure!(*places == BTreeSet::from([end.tries()]), "{name} left the pod: {places:?}");
    Ok(())
}

/// A pod that goes on and on: it undoes its own network as far as it can, dials, and sends everything by hand, over the
/// node's bridge and by its routes.
pub(crate) struct Attack {
    senders: Vec<(String, Process)>,
    stop: PathBuf,
    end: End,
}

/// Rounds of each of an attack's senders.
type Rounds = Vec<std::ops::RangeInclusive<usize>>;

impl Attack {
    /// Begins, from `pod`: over the bridge to a pod outside the mesh, and by the routes to a server, which it dials too.
    pub(crate) fn start(mesh: &Mesh, pod: &str) -> anyhow::Result<Self> {
        let source = mesh.pod(pod);
        let stop = source.folder().join("attack.stop");
        let neighbour = mesh.pod("neighbour").ipv4;
        let mut senders = Vec::new();
        for (way, to, next_hop, dialled) in [
            ("bridged", "neighbour", neighbour, 0),
            ("routed", "server", GATEWAY.parse()?, ports::HTTP),
        ] {
            let label = format!("{pod}-{way}");
            let mut sender = sender(mesh, &label, pod, to, next_hop);
            sender.arg(&stop).arg(dialled.to_string());
            senders.push((label.clone(), source.start(&label, &mut sender)?));
        }
        Ok(Self { senders, stop, end: End::of(source)? })
    }

    /// The last round that each sender has begun, and ended.
    fn reached(&self, what: &str) -> Vec<usize> {
        let last = |(_, process): &(String, Process)| {
            let log = process.log();
            let numbers = log.lines().rev().find_map(|line| line.strip_prefix(what)?.parse().ok());
            numbers.unwrap_or(0)
        };
        self.senders.iter().map(last).collect()
    }

    /// Waits for two whole rounds that begin from now on; gives all such.
    pub(crate) fn whole_rounds(&self) -> anyhow::Result<Rounds> {
        self.rounds_during(|| Ok(())).map(|((), rounds)| rounds)
    }

    /// The whole rounds of the time from the beginning of `work` until at least two; of each sender.
    pub(crate) fn rounds_during<T>(
        &self,
        work: impl FnOnce() -> anyhow::Result<T>,
    ) -> anyhow::Result<(T, Rounds)> {
        let begun = self.reached("round ");
        let value = work()?;
        until("the attack going on", PATIENCE, || {
            let ended = self.reached("done ");
            let enough = ended.iter().zip(&begun).all(|(ended, begun)| *ended >= begun + 2);
            Ok(enough.then_some(()))
        })
        .with_context(|| self.senders.iter().map(|(_, p)| p.log_tail(5)).collect::<String>())?;
        let ended = self.reached("done ");
        Ok((value, begun.iter().zip(ended).map(|(begun, ended)| begun + 1..=ended).collect()))
    }

    /// Ends it; gives what each sender said.
    pub(crate) fn finish(mut self) -> anyhow::Result<Ended> {
        File::create(&self.stop)?;
        let mut said = Vec::new();
        for (label, process) in &mut self.senders {
            until("the attack's end", PATIENCE, || Ok((!process.running()).then_some(())))?;
            let log = process.log();
            ensure!(process.stop(PATIENCE)?.success(), "{label}: {log}");
            ensure!(!log.lines().any(|line| line == "detached"), "{label} detached a program");
            said.push((label.clone(), log));
        }
        Ok(Ended { said, end: self.end })
    }
}

/// Packets by name, and where those that left were seen.
type Sent<'e> = (Vec<&'e str>, BTreeMap<String, BTreeSet<Place>>);

/// An attack that is over.
pub(crate) struct Ended {
    said: Vec<(String, String)>,
    end: End,
}

impl Ended {
    /// What became of the packets of these rounds, by name; of each sender.
    fn sent<'e>(&'e self, seen: &Seen, rounds: &'e Rounds) -> anyhow::Result<Vec<Sent<'e>>> {
        let of = |((label, log), rounds): (&'e (String, String), &'e _)| {
            let rounds: &std::ops::RangeInclusive<usize> = rounds;
            let is_of = |line: &&str| {
                line.split_once('-').is_some_and(|(number, _)| {
                    number.parse().is_ok_and(|number| rounds.contains(&number))
                })
            };
            let names: Vec<&str> = log.lines().filter(is_of).collect();
            // Whatever else is refused, frames are sent: 21 of each kind in a round.
            let least = rounds.clone().count() * 42;
            ensure!(names.len() >= least.max(84), "{label}: {} packets in {rounds:?}", names.len());
            Ok((names, seen.marked(&format!("LEAKED-BY-{label}-"))?))
        };
        self.said.iter().zip(rounds).map(of).collect()
    }

    /// None of these rounds' packets left.
    pub(crate) fn none_left(&self, seen: &Seen, rounds: &Rounds) -> anyhow::Result<()> {
        for (names, marked) in self.sent(seen, rounds)? {
            for name in names {
                only_tried(&marked, name, &self.end)?;
            }
        }
        Ok(())
    }

    /// What shows that the attack is one: of these rounds' packets both senders' plain ones left.
    pub(crate) fn all_left(&self, seen: &Seen, rounds: &Rounds) -> anyhow::Result<()> {
        for (names, marked) in self.sent(seen, rounds)? {
            for name in names.iter().filter(|name| name.ends_with("-frame-plain")) {
                let left = only_tried(&marked, name, &self.end).is_err();
                ensure!(left, "{name} of a plain pod did not leave");
            }
        }
        Ok(())
    }
}

/// The attack goes on while its pod is taken in, let go and taken in again, while the agent is dead, while it starts, and while
/// the controller is away: of a pod that is in the mesh nothing leaves. Beside it `client` makes its connections.
pub(crate) fn attacks_find_no_gap(mesh: &mut Mesh) -> anyhow::Result<()> {
    mesh.lab.apply(&manifest::namespace("later", &[]))?;
    mesh.lab.run_pod("a", PodSpec::new("later", "late"))?;
    mesh.wait_for("late")?;
    let watch = Watch::start(&mesh.lab, "attack")?;
    let traffic = Traffic::start(mesh, "client", "attack", &mesh.urls().join(" "))?;
    let began = SystemTime::now();
    let attack = Attack::start(mesh, "late")?;
    let plain = attack.whole_rounds()?;
    let mut captured = Vec::new();

    mesh.lab.apply(&manifest::namespace("later", &[AMBIENT]))?;
    enroll(mesh)?;
    let enrolled = SystemTime::now();
    captured.push(("enrolled", attack.whole_rounds()?));
    let unenrolling = SystemTime::now();
    let unenrolled = mesh.lab.node("a").culvert(&["pod", "unenroll", "later/late"])?;
    ensure!(unenrolled.success(), "unenroll: {}{}", unenrolled.stdout, unenrolled.stderr);
    attack.whole_rounds()?;
    enroll(mesh)?;
    let outside = [began..enrolled, unenrolling..SystemTime::now()];
    captured.push(("enrolled again", attack.whole_rounds()?));

    mesh.lab.node_mut("a").kill_agent();
    captured.push(("agent dead", attack.whole_rounds()?));
    let ((), starting) = attack.rounds_during(|| mesh.restart_agent("a"))?;
    captured.push(("agent starting", starting));
    mesh.wait_for("client")?;
    traffic.more(4, "hello from")?;

    mesh.lab.kill_controller();
    captured.push(("controller away", attack.whole_rounds()?));
    mesh.lab.start_controller()?;
    captured.push(("controller back", attack.whole_rounds()?));

    let attack = attack.finish()?;
    traffic.finish()?;
    let seen = watch.finish()?;
    attack.all_left(&seen, &plain)?;
    for (situation, rounds) in &captured {
        attack.none_left(&seen, rounds).with_context(|| (*situation).to_owned())?;
    }
    // What `late` dials is in the clear while it is outside; of `client` nothing ever is.
    let dialled = format!("port {}", ports::HTTP);
    let late = Scope::Left(&attack.end);
    let opened = seen.opened_within(mesh.pod("late"), &late, &dialled, &outside)?;
    ensure!(opened > 0, "the attack dialled nothing while it could");
    seen.opened_within(mesh.pod("client"), &Scope::All, "tcp", &[])?;
    mesh.lab.delete_pod("late")?;
    mesh.lab.delete(&manifest::namespace("later", &[AMBIENT]))
}

/// Packets made by hand: none leaves a pod of the mesh, neither over the node's bridge nor routed by the node. Those of
/// a pod outside do, every one.
pub(crate) fn raw_packets_do_not_leave(mesh: &mut Mesh) -> anyhow::Result<()> {
    let gateway: IpAddr = GATEWAY.parse()?;
    let neighbour = mesh.pod("neighbour").ipv4;
    let watch = Watch::start(&mesh.lab, "raw")?;
    let control = send_raw(mesh, "control", "stranger", "neighbour", neighbour)?;
    let routed_control = send_raw(mesh, "outside", "stranger", "server", gateway)?;
    let bridged = send_raw(mesh, "bridged", "client", "neighbour", neighbour)?;
    let routed = send_raw(mesh, "routed", "client", "server", gateway)?;
    let seen = watch.finish()?;
    let arrived = seen.marked("LEAKED-BY-control-")?;
    let deliveries = End::of(mesh.pod("neighbour"))?.deliveries();
    for name in &control {
        let places = arrived.get(name).with_context(|| format!("{name} was not sent"))?;
        ensure!(places.contains(&deliveries), "{name} of a plain pod did not arrive: {places:?}");
    }
    // What a router takes at all reaches the wire.
    let passed = seen.marked("LEAKED-BY-outside-")?;
    for name in ["frame-plain", "past-queue-ip-in-ip", "frame-ipv6", "raw-ipv4"] {
        let on_the_wire = passed.get(name).is_some_and(|at| at.iter().any(|at| at.0 == "wire"));
        ensure!(
            on_the_wire && routed_control.iter().any(|sent| sent == name),
            "{name}: {passed:?}"
        );
    }
    let client = End::of(mesh.pod("client"))?;
    none_left(&seen, "bridged", &bridged, &client)?;
    none_left(&seen, "routed", &routed, &client)
}

/// `BPF_PROG_DETACH` of the program that steers inbound connections, from the pod's own namespace.
const DETACH: &str = "python3 -c 'import ctypes,os,struct\n\
    libc = ctypes.CDLL(None, use_errno=True)\n\
    fd = os.open(\"/proc/self/ns/net\", os.O_RDONLY)\n\
    attr = struct.pack(\"IIII\", fd, 0, 36, 0).ljust(128, b\"\\0\")\n\
    print(\"detached\" if libc.syscall(321, 9, attr, 128) == 0 else \"refused\")'";

/// A pod that removes its own routes, rules, addresses and programs, and then says what it has to say.
pub(crate) fn vandal_does_not_leak(mesh: &mut Mesh) -> anyhow::Result<()> {
    mesh.lab.run_pod("a", PodSpec::new("mesh", "vandal"))?;
    mesh.wait_for("vandal")?;
    let vandal = mesh.pod("vandal");
    let end = End::of(vandal)?;
    let (own4, own6) = (vandal.ipv4, vandal.ipv6);
    let in_pod = |line: &str| {
        let mut shell = vandal.command(CAPABILITIES[0]);
        run(shell.args(&CAPABILITIES[1..]).args(["sh", "-c", line]), PATIENCE)?.output()
    };
    let watch = Watch::start(&mesh.lab, "vandal")?;
    let back = format!(
        "ip route replace default via {GATEWAY} dev eth0; \
         ip -6 route replace default via fd77:1::1 dev eth0"
    );
    let gateway_mac = in_pod(&format!(
        "ping -c 1 -W 5 {GATEWAY} > /dev/null; ip neigh show {GATEWAY} | sed 's/.*lladdr //; s/ .*//'"
    ))?;
    let gateway_mac = gateway_mac.trim();
    ensure!(gateway_mac.len() == 17, "the gateway's link address is {gateway_mac:?}");
    let acts = [
        "ip rule del pref 50; ip -6 rule del pref 50; ip route flush table 133; ip -6 route flush table 133",
        "sysctl -qw net.ipv4.tcp_fwmark_accept=0 net.ipv4.fwmark_reflect=0 net.ipv6.fwmark_reflect=0",
        "tc qdisc del dev eth0 clsact; tc qdisc del dev eth0 root; nft flush ruleset; ip link set eth0 xdp off",
        // The agent's listener is then somewhere outside.
        &format!(
            "ip route del table local local {own4} dev eth0; ip -6 route del table local local {own6} dev eth0; \
             ip neigh replace {own4} lladdr {gateway_mac} dev eth0; ip -6 neigh replace {own6} lladdr {gateway_mac} dev eth0"
        ),
        // Loopback leads there too.
        "ip link set lo down",
        &format!(
            "ip addr add 10.77.1.200/24 dev eth0; ip route replace default via {GATEWAY} dev eth0 src 10.77.1.200"
        ),
        &format!(
            "ip link set eth0 down; ip link set eth0 address 02:00:00:00:00:77; ip link set eth0 up; {back}"
        ),
        &format!("ip addr flush dev eth0; ip addr add 10.77.1.201/24 dev eth0; {back}"),
        &format!(
            "ip addr flush dev eth0; ip addr add {own4}/24 dev eth0; ip addr add {own6}/64 dev eth0 nodad; {back}"
        ),
    ];
    for act in acts {
        // What is not there cannot be removed.
        in_pod(&format!("({act}) 2> /dev/null; true"))?;
        for url in mesh.urls() {
            in_pod(&format!("curl -s -g -m 1 -o /dev/null {url}; true"))?;
        }
    }
    let detached = in_pod(DETACH)?;
    ensure!(detached.trim() == "refused", "the pod's program: {detached}");
    let raw = send_raw(mesh, "vandal", "vandal", "server", GATEWAY.parse()?)?;
    let seen = watch.finish()?;
    seen.nothing_in_the_clear(&Scope::Left(&end))?;
    none_left(&seen, "vandal", &raw, &end)?;
    mesh.lab.delete_pod("vandal")
}
