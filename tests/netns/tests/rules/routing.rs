//! Where connections lead, and which addresses their ends see.

use std::net::{IpAddr, SocketAddr};
use std::process::Stdio;

use anyhow::{Context as _, ensure};
use mesh_netns::manifest;
use mesh_netns::peer::ports as peer;
use mesh_netns::process::run;
use mesh_netns::wait::{PATIENCE, until};

use crate::identity::SERVER;
use crate::mesh::{LogFromNow, Mesh, field, outside_target};

/// Runs a verb of the lab's peer in a pod.
fn ask(mesh: &Mesh, pod: &str, arguments: &[&str]) -> anyhow::Result<String> {
    let mut command = mesh.lab.pod(pod).command(&mesh.peer_program());
    run(command.args(arguments), PATIENCE)?.output()
}

/// Refused or reset: never answered, and never in silence.
fn closed(mesh: &Mesh, target: SocketAddr) -> anyhow::Result<()> {
    ask(mesh, "client", &["closed", &target.to_string(), "10000"])
        .map(drop)
        .with_context(|| format!("{target} is not closed"))
}

/// Through a service's address the client keeps the peer it dialled, and the server sees the client and its own address.
/// A port that the service does not have, and a service without endpoints, refuse.
pub(crate) fn service_addresses(mesh: &mut Mesh) -> anyhow::Result<()> {
    let vips: [IpAddr; 2] = ["10.96.0.77".parse()?, "fd96::77".parse()?];
    let empty_vips: [IpAddr; 2] = ["10.96.0.78".parse()?, "fd96::78".parse()?];
    let ports = [("who", 80, peer::WHO)];
    let service = manifest::service("mesh", "who", "server", &vips, &ports);
    let empty = manifest::service("mesh", "nobody", "nobody", &empty_vips, &ports);
    mesh.lab.apply(&service)?;
    mesh.lab.apply(&empty)?;
    let (client, server) = (mesh.lab.pod("client"), mesh.lab.pod("server"));
    for (vip, own, target) in
        [(vips[0], client.ipv4, server.ipv4), (vips[1], client.ipv6, server.ipv6)]
    {
        let dialled = SocketAddr::new(vip, 80);
        let line = until("the service being known", PATIENCE, || {
            ask(mesh, "client", &["who", &dialled.to_string()]).map(Some)
        })?;
        let ends: Vec<SocketAddr> = line
            .split_whitespace()
            .map(|end| end.parse::<SocketAddr>())
            .collect::<Result<_, _>>()
            .with_context(|| format!("peer said {line:?}"))?;
        let [seen_peer, seen_client, seen_server] = ends[..] else {
            anyhow::bail!("peer said {line:?}");
        };
        let seen_server = SocketAddr::new(seen_server.ip().to_canonical(), seen_server.port());
        ensure!(seen_peer == dialled, "getpeername is {seen_peer}, dialled {dialled}");
        ensure!(seen_client.ip().to_canonical() == own, "the server sees {seen_client}, not {own}");
        let wanted = SocketAddr::new(target, peer::WHO);
        ensure!(seen_server == wanted, "the server's own address is {seen_server}, not {wanted}");
        closed(mesh, SocketAddr::new(vip, 81))?;
    }
    for vip in empty_vips {
        closed(mesh, SocketAddr::new(vip, 80))?;
    }
    mesh.lab.delete(&empty)?;
    mesh.lab.delete(&service)
}

/// What a pod offers on its loopback alone is not reached from other pods, neither by a tunnel nor in plaintext.
pub(crate) fn loopback_only(mesh: &mut Mesh) -> anyhow::Result<()> {
    const SERVE: &str = "import socket\n\
        s = socket.create_server(('127.0.0.1', 7999))\n\
        while True: s.accept()[0].sendall(b'inside')\n";
    let server = mesh.lab.pod("server");
    let mut python = server.command("python3");
    let mut serving = python.args(["-c", SERVE]).stdin(Stdio::null()).spawn()?;
    let look = || -> anyhow::Result<()> {
        let inside = "python3 -c \"import socket; print(socket.create_connection(('127.0.0.1', 7999)).recv(9))\"";
        until("the pod reaching itself", PATIENCE, || {
            Ok(server.shell(inside)?.stdout.contains("inside").then_some(()))
        })?;
        let target = SocketAddr::new(server.ipv4, 7999);
        for pod in ["client", "stranger"] {
            ask(mesh, pod, &["closed", &target.to_string(), "10000"])
                .with_context(|| format!("{pod} reaches the server's loopback"))?;
        }
        Ok(())
    };
    let outcome = look();
    serving.kill()?;
    serving.wait()?;
    outcome
}

/// An IPv6 socket that dials an IPv4-mapped address goes by the tunnel as an IPv4 one does, and sees the peer it dialled.
pub(crate) fn mapped_addresses(mesh: &mut Mesh) -> anyhow::Result<()> {
    const DIAL: &str = "import socket, sys\n\
        s = socket.socket(socket.AF_INET6)\n\
        s.settimeout(20)\n\
        s.connect((sys.argv[1], int(sys.argv[2])))\n\
        s.sendall(b'GET / HTTP/1.0\\r\\n\\r\\n')\n\
        print(s.getpeername()[0], s.makefile().read())\n";
    let log = LogFromNow::of(mesh, "a")?;
    let server = mesh.server();
    let mapped = format!("::ffff:{}", server.ip());
    let mut python = mesh.lab.pod("client").command("python3");
    let python = python.args(["-c", DIAL, &mapped, &server.port().to_string()]);
    let said = run(python, PATIENCE)?.output()?;
    ensure!(said.starts_with(&mapped), "the client sees another peer: {said}");
    ensure!(said.contains("hello from"), "no answer: {said}");
    let line = log.line(&["direction=\"outbound\"", "src.workload=\"client\"", "dst.identity="])?;
    ensure!(field(&line, "dst.identity") == Some(SERVER), "not by the tunnel: {line}");
    let outside = outside_target()?;
    let mapped = format!("::ffff:{}", outside.ip());
    let mut python = mesh.lab.pod("client").command("python3");
    let python = python.args(["-c", DIAL, &mapped, &outside.port().to_string()]);
    let said = run(python, PATIENCE)?.output()?;
    ensure!(said.contains("hello from outside"), "outside the mesh: {said}");
    Ok(())
}
