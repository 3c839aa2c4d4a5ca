//! Pods with every capability over their own network, and the will to get past the agent.

use std::collections::BTreeSet;
use std::net::IpAddr;

use anyhow::{Context as _, ensure};
use mesh_netns::PodSpec;
use mesh_netns::process::run;
use mesh_netns::wait::PATIENCE;

use crate::mesh::Mesh;
use crate::watch::{End, Scope, Seen, Watch};

const GATEWAY: &str = "10.77.1.1";
/// A pod's capabilities over its network, and no others.
const CAPABILITIES: [&str; 4] =
    ["setpriv", "--bounding-set=-all,+net_admin,+net_raw", "--inh-caps=-all", "--"];

/// Packets made by hand in the pod `from`, addressed to `to`, by the link address that `next_hop` has; their names.
fn send_raw(
    mesh: &Mesh,
    label: &str,
    from: &str,
    to: &str,
    next_hop: IpAddr,
) -> anyhow::Result<Vec<String>> {
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/faults/raw_packets.py");
    let (source, target) = (mesh.pod(from), mesh.pod(to));
    let mut senders = source.command(CAPABILITIES[0]);
    senders.args(&CAPABILITIES[1..]).args(["python3", script, label]);
    for ip in [source.ipv4, target.ipv4, source.ipv6, target.ipv6, next_hop] {
        senders.arg(ip.to_string());
    }
    let names = run(&mut senders, PATIENCE)?.output()?;
    Ok(names.lines().map(str::to_owned).collect())
}

/// Each of the packets was tried, and seen nowhere but there.
fn none_left(seen: &Seen, label: &str, names: &[String], end: &End) -> anyhow::Result<()> {
    let marked = seen.marked(&format!("LEAKED-BY-{label}-"))?;
    ensure!(
        !names.is_empty() && marked.len() == names.len(),
        "{names:?} were sent, seen {marked:?}"
    );
    let tried = BTreeSet::from([end.tries()]);
    for name in names {
        let places = marked.get(name).with_context(|| format!("{label} {name} was not sent"))?;
        ensure!(*places == tried, "{label} {name} left the pod: {places:?}");
    }
    Ok(())
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
