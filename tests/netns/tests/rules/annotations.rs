//! What annotations of a pod and flags of an agent leave out of capture, each told apart from its neighbours.
//!
//! Whatever is not captured is plaintext, and plaintext is what the pods here refuse: who gets an answer all the same came
//! past the agent.

use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::time::Duration;

use anyhow::Context as _;
use mesh_netns::lab::OUTSIDE_IP;
use mesh_netns::process::{Process, in_namespace, run};
use mesh_netns::servers::{self, ports};
use mesh_netns::wait::{PATIENCE, until};
use mesh_netns::{PodSpec, manifest};
use serde_json::{Value, json};

use crate::mesh::{Mesh, inside};

const APP: &str = "listed";
const HTTP: u16 = ports::HTTP;
/// Served as well, and named by the lists.
const OTHER: u16 = ports::HTTP2;

/// Plaintext is refused by the pods of this trial.
fn strict() -> Value {
    manifest::peer_authentication(
        "mesh",
        "listed-strict",
        &json!({ "selector": { "matchLabels": { "app": APP } }, "mtls": { "mode": "STRICT" } }),
    )
}

fn url(pod: IpAddr, port: u16) -> [String; 2] {
    // The second port speaks HTTP/2 alone.
    let version = if port == OTHER { "--http2-prior-knowledge" } else { "--http1.1" };
    [version.to_owned(), format!("http://{}/", SocketAddr::new(pod, port))]
}

/// Whether a namespace gets an answer from a pod.
fn answered(netns: &str, pod: IpAddr, port: u16) -> anyhow::Result<bool> {
    let mut curl = in_namespace(Some(netns), "curl");
    let curl = curl.args(["-sS", "-m", "10"]).args(url(pod, port));
    Ok(run(curl, PATIENCE)?.success())
}

/// A pod on b with a web server and one annotation.
fn run_listed(mesh: &mut Mesh, name: &str, list: (&str, &str)) -> anyhow::Result<Process> {
    let spec = PodSpec::new("mesh", name).app(APP);
    let spec = spec.annotation(&format!("culvert.dev/{}", list.0), list.1);
    servers::nginx(mesh.lab.run_pod("b", spec)?)
}

/// Lists of ports and of clients for what comes in, and the same words for what goes out, which open nothing.
pub(crate) fn inbound_lists(mesh: &mut Mesh) -> anyhow::Result<()> {
    let stranger = mesh.lab.pod("stranger").ipv4.to_string();
    let (http, other) = (HTTP.to_string(), OTHER.to_string());
    // Name, annotation; whether the stranger is answered on the first and on the second port, and the host outside.
    let pods: [(&str, (&str, &str), [bool; 3]); 6] = [
        ("in-ports", ("exclude-inbound-ports", &other), [false, true, false]),
        ("out-ports", ("exclude-outbound-ports", &other), [false, false, false]),
        ("in-cidrs", ("exclude-inbound-cidrs", &stranger), [true, true, false]),
        ("out-cidrs", ("exclude-outbound-cidrs", &stranger), [false, false, false]),
        ("in-only", ("include-inbound-ports", &http), [false, true, false]),
        ("in-from", ("include-inbound-cidrs", &stranger), [false, false, true]),
    ];
    let strict = strict();
    mesh.lab.apply(&strict)?;
    let mut serving = Vec::new();
    for (name, list, _) in &pods {
        serving.push(run_listed(mesh, name, *list)?);
    }
    let (from_pod, from_outside) =
        (mesh.lab.pod("stranger").netns().to_owned(), mesh.lab.outside().to_owned());
    for (name, (annotation, value), expected) in &pods {
        let ip = mesh.lab.pod(name).ipv4;
        // What is captured goes on in the tunnel.
        mesh.wait_for("client", SocketAddr::new(ip, HTTP))?;
        let look = || -> anyhow::Result<[bool; 3]> {
            Ok([
                answered(&from_pod, ip, HTTP)?,
                answered(&from_pod, ip, OTHER)?,
                answered(&from_outside, ip, HTTP)?,
            ])
        };
        let mut seen = [true; 3];
        until(&format!("{name} answering whom it is to answer"), PATIENCE, || {
            seen = look()?;
            Ok((seen == *expected).then_some(()))
        })
        .with_context(|| format!("{annotation}={value}: answered {seen:?}, not {expected:?}"))?;
    }
    drop(serving);
    for (name, ..) in &pods {
        mesh.lab.delete_pod(name)?;
    }
    mesh.lab.delete(&strict)
}

/// Networks that a pod's own connections leave out or are limited to; the same word for what comes in changes none.
pub(crate) fn outbound_networks(mesh: &mut Mesh) -> anyhow::Result<()> {
    let strict = strict();
    mesh.lab.apply(&strict)?;
    let serving = [
        run_listed(mesh, "first", ("dns-capture", "true"))?,
        run_listed(mesh, "second", ("dns-capture", "true"))?,
    ];
    let [first, second] = ["first", "second"].map(|name| mesh.lab.pod(name).ipv4);
    let network = format!("{first}/32");
    // Name, annotation; whether the pod comes in the tunnel, and so is answered, by the first and by the second.
    let pods = [
        ("leaves-out", "exclude-outbound-cidrs", [false, true]),
        ("is-limited", "include-outbound-cidrs", [true, false]),
        ("comes-in", "exclude-inbound-cidrs", [true, true]),
    ];
    for (name, annotation, expected) in pods {
        let spec = PodSpec::new("mesh", name);
        mesh.lab.run_pod("a", spec.annotation(&format!("culvert.dev/{annotation}"), &network))?;
        let netns = mesh.lab.pod(name).netns().to_owned();
        let mut seen = [false; 2];
        until(&format!("{name} being answered by whom it is to be"), PATIENCE, || {
            seen = [answered(&netns, first, HTTP)?, answered(&netns, second, HTTP)?];
            Ok((seen == expected).then_some(()))
        })
        .with_context(|| format!("{annotation}={network}: answered {seen:?}, not {expected:?}"))?;
        mesh.lab.delete_pod(name)?;
    }
    drop(serving);
    for name in ["first", "second"] {
        mesh.lab.delete_pod(name)?;
    }
    mesh.lab.delete(&strict)
}

/// Sends an echo request as root and waits for its reply. Source: RFC 792; the checksum is of these very bytes.
const PING: &str = "import socket,sys\n\
    s = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)\n\
    s.settimeout(2)\n\
    s.sendto(bytes.fromhex('0800f7f700070001'), (sys.argv[1], 0))\n\
    while s.recv(2048)[20] != 0: pass\n";
/// An agent's flags, and whether UDP, ICMP and DNS pass with them.
const FLAGS: [(&[&str], [bool; 3]); 3] = [
    (&["--deny-udp"], [false, true, true]),
    (&["--deny-icmp"], [true, false, true]),
    (&[], [true, true, true]),
];
/// Where datagrams are echoed outside the mesh.
const ECHO: u16 = 9002;

/// What an agent's flags forbid its pods, and nothing else: UDP that is no DNS, or ICMP.
pub(crate) fn denied_protocols(mesh: &mut Mesh) -> anyhow::Result<()> {
    let echo = inside(mesh.lab.outside(), || Ok(UdpSocket::bind(("0.0.0.0", ECHO))?))?;
    std::thread::spawn(move || {
        let mut datagram = [0; 64];
        while let Ok((length, client)) = echo.recv_from(&mut datagram) {
            if let Err(error) = echo.send_to(&datagram[..length], client) {
                eprintln!("echo: {error}");
            }
        }
    });
    let target = SocketAddr::new(OUTSIDE_IP.parse()?, ECHO);
    let look = |mesh: &Mesh| -> anyhow::Result<[bool; 3]> {
        let pod = mesh.lab.pod("client");
        let udp = inside(pod.netns(), || {
            let socket = UdpSocket::bind(("0.0.0.0", 0))?;
            socket.set_read_timeout(Some(Duration::from_secs(2)))?;
            socket.connect(target)?;
            let sent = socket.send(b"are you there");
            Ok(sent.is_ok() && socket.recv(&mut [0; 64]).is_ok())
        })?;
        let mut ping = pod.command("python3");
        let icmp = run(ping.args(["-c", PING, OUTSIDE_IP]), PATIENCE)?.success();
        let names = pod.shell("getent ahostsv4 somebody.unknown.example")?.success();
        Ok([udp, icmp, names])
    };
    for (flags, expected) in FLAGS {
        let index = mesh.lab.node_index("a");
        mesh.lab.node_mut("a").kill_agent();
        mesh.lab.start_agent_with(index, flags)?;
        mesh.lab.node_mut("a").wait_ready()?;
        mesh.wait_for("client", mesh.server())?;
        let mut seen = [false; 3];
        until(&format!("{flags:?} being in force"), PATIENCE, || {
            seen = look(mesh)?;
            Ok((seen == expected).then_some(()))
        })
        .with_context(|| format!("{flags:?}: UDP, ICMP, DNS are {seen:?}, not {expected:?}"))?;
    }
    Ok(())
}
