//! Two networks with a gateway between them: a stock one (tokio-rustls and h2), on the host outside the mesh, that ends the
//! outer tunnel and hands the bytes of the inner one on, as Istio's east-west gateway does.

use std::future::poll_fn;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, ensure};
use bytes::{Bytes, BytesMut};
use mesh_model::ports as mesh_ports;
use mesh_netns::lab::OUTSIDE_IP;
use mesh_netns::peer::ports as peer;
use mesh_netns::process::run;
use mesh_netns::servers::{self, ports};
use mesh_netns::wait::{PATIENCE, until};
use mesh_netns::{PodSpec, manifest};
use serde_json::json;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};

use crate::mesh::{LogFromNow, Mesh, field, inside};
use crate::tls::{self, Wanted};

const NETWORK: (&str, &str) = ("topology.istio.io/network", "west");
const VIP: &str = "10.96.0.77";

/// What the gateway was asked for, and where it leads.
struct Seen {
    asked: Vec<String>,
    target: SocketAddr,
}

/// A pod reaches a service on another network under its own identity, the far end is who it should be, and every way of not
/// getting there has its name.
pub(crate) fn through_a_gateway(mesh: &mut Mesh) -> anyhow::Result<()> {
    let bin_dir = mesh.lab.bin_dir().to_owned();
    let pod = mesh.lab.run_pod("b", PodSpec::new("mesh", "distant").label(NETWORK.0, NETWORK.1))?;
    let _nginx = servers::nginx(pod)?;
    let _peer = servers::peer(pod, &bin_dir)?;
    let tunnel_of =
        |mesh: &Mesh, pod: &str| SocketAddr::new(mesh.lab.pod(pod).ipv4, mesh_ports::HBONE);
    let target = tunnel_of(mesh, "distant");
    let web = manifest::service(
        "mesh",
        "distant",
        "distant",
        &[VIP.parse()?],
        &[
            ("http", 80, ports::HTTP),
            ("bulk", peer::BULK, peer::BULK),
            ("echo", peer::ECHO, peer::ECHO),
            ("reset", peer::RESET, peer::RESET),
            ("watch", peer::WATCH, peer::WATCH),
            ("endings", peer::ENDINGS, peer::ENDINGS),
            ("half", peer::SERVER_HALF_CLOSE, peer::SERVER_HALF_CLOSE),
        ],
    );
    mesh.lab.apply(&web)?;
    let target_url = format!("{VIP}:80").parse()?;

    // Nothing leads there yet.
    until("a refusal for want of a gateway", PATIENCE, || {
        let log = LogFromNow::of(mesh, "a")?;
        ensure!(!mesh.reaches("client", target_url)?, "reached without a gateway");
        Ok(reason(&log, "outbound")?.filter(|reason| reason == "gateway_unavailable"))
    })?;

    let seen = Arc::new(Mutex::new(Seen { asked: Vec::new(), target }));
    start_gateway(mesh, &seen)?;
    let mut gateway = manifest::service(
        "mesh",
        "west-gateway",
        "west-gateway",
        &[],
        &[("hbone", mesh_ports::HBONE, mesh_ports::HBONE)],
    );
    gateway["metadata"]["labels"] = json!({ NETWORK.0: NETWORK.1 });
    gateway["spec"]["clusterIP"] = json!("None");
    let entry = json!({
        "apiVersion": "networking.istio.io/v1", "kind": "WorkloadEntry",
        "metadata": { "name": "west-gateway", "namespace": "mesh" },
        "spec": {
            "address": OUTSIDE_IP, "network": NETWORK.1, "serviceAccount": "west-gateway",
            "labels": { "app": "west-gateway" },
        },
    });
    mesh.lab.apply(&gateway)?;
    mesh.lab.apply(&entry)?;
    mesh.wait_for("client", target_url)?;
    let log = LogFromNow::of(mesh, "b")?;
    ensure!(mesh.reaches("client", target_url)?, "the second connection fails");
    let line = log.line(&["direction=\"inbound\"", "src.workload=\"client\""])?;
    ensure!(
        line.contains("spiffe://cluster.local/ns/mesh/sa/client"),
        "the far end does not see the client's identity: {line}"
    );
    let asked = seen.lock().unwrap_or_else(PoisonError::into_inner).asked.clone();
    ensure!(
        asked.iter().all(|name| name == "distant.mesh.svc.cluster.local:80") && asked.len() >= 2,
        "the gateway was asked for {asked:?}: connections share an inner tunnel, or name addresses"
    );

    // Bytes, ends and resets are what they are without a gateway; the bulk is more than all buffers on the way.
    let at = |port: u16| format!("{VIP}:{port}");
    for arguments in [
        vec!["bulk", &at(peer::BULK), "67108864"],
        vec!["client-half-close", &at(peer::ECHO)],
        vec!["server-half-close", &at(peer::SERVER_HALF_CLOSE), &at(peer::ENDINGS)],
        vec!["server-reset", &at(peer::RESET)],
        vec!["client-reset", &at(peer::WATCH), &at(peer::ENDINGS)],
    ] {
        let mut command = mesh.lab.pod("client").command(&mesh.peer_program());
        run(command.args(&arguments), Duration::from_secs(60))?
            .output()
            .with_context(|| format!("{arguments:?} through the gateway"))?;
    }

    // Policy at the far end knows the client by its identity, not by the gateway's.
    let spec = json!({
        "selector": { "matchLabels": { "app": "distant" } }, "action": "DENY",
        "rules": [{ "from": [{ "source": { "principals": ["cluster.local/ns/mesh/sa/client"] } }] }],
    });
    let denial = manifest::authorization_policy("mesh", "not-client", &spec);
    mesh.lab.apply(&denial)?;
    until("the client being denied", PATIENCE, || {
        let log = LogFromNow::of(mesh, "b")?;
        let reached = mesh.reaches("client", target_url)?;
        let reason = if reached { None } else { reason(&log, "inbound")? };
        Ok(reason.filter(|reason| reason == "policy_denied"))
    })?;
    mesh.wait_for("visitor", target_url)?;
    mesh.lab.delete(&denial)?;
    mesh.wait_for("client", target_url)?;

    // A gateway that leads to somebody else is found out by the inner tunnel.
    let other = tunnel_of(mesh, "server");
    seen.lock().unwrap_or_else(PoisonError::into_inner).target = other;
    let log = LogFromNow::of(mesh, "a")?;
    ensure!(!mesh.reaches("client", target_url)?, "another identity was taken for the service's");
    let line = log.line(&["direction=\"outbound\"", "reason=wrong_identity"])?;
    ensure!(line.contains("client"), "{line}");

    // Gone again.
    mesh.lab.delete(&gateway)?;
    mesh.lab.delete(&entry)?;
    until("a refusal after the gateway has gone", PATIENCE, || {
        let log = LogFromNow::of(mesh, "a")?;
        ensure!(!mesh.reaches("client", target_url)?, "reached without a gateway");
        Ok(reason(&log, "outbound")?.filter(|reason| reason == "gateway_unavailable"))
    })?;
    mesh.lab.delete(&web)?;
    mesh.lab.delete_pod("distant")
}

/// The reason in the first line of a direction.
fn reason(log: &LogFromNow, direction: &str) -> anyhow::Result<Option<String>> {
    let line = log.line(&[&format!("direction=\"{direction}\"")])?;
    Ok(field(&line, "reason").map(str::to_owned))
}

/// Runs the gateway for as long as this program runs.
fn start_gateway(mesh: &Mesh, seen: &Arc<Mutex<Seen>>) -> anyhow::Result<()> {
    let wanted = Wanted::of("spiffe://cluster.local/ns/mesh/sa/west-gateway");
    let config = tls::server(mesh, wanted.signed_by_the_mesh(mesh)?)?;
    let listener = inside(mesh.lab.outside(), || {
        let listener = std::net::TcpListener::bind((OUTSIDE_IP, mesh_ports::HBONE))?;
        listener.set_nonblocking(true)?;
        Ok(listener)
    })?;
    let (namespace, seen) = (mesh.lab.outside().to_owned(), Arc::clone(seen));
    std::thread::spawn(move || {
        let served = inside(&namespace, || {
            tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(serve(
                listener,
                tokio_rustls::TlsAcceptor::from(config),
                seen,
            ))
        });
        if let Err(error) = served {
            eprintln!("gateway: {error:#}");
        }
    });
    Ok(())
}

async fn serve(
    listener: std::net::TcpListener,
    acceptor: tokio_rustls::TlsAcceptor,
    seen: Arc<Mutex<Seen>>,
) -> anyhow::Result<()> {
    let listener = TcpListener::from_std(listener)?;
    loop {
        let (socket, _peer) = listener.accept().await?;
        let (acceptor, seen) = (acceptor.clone(), Arc::clone(&seen));
        tokio::spawn(async move {
            if let Err(error) = tunnel(socket, acceptor, seen).await {
                eprintln!("gateway's tunnel: {error:#}");
            }
        });
    }
}

async fn tunnel(
    socket: TcpStream,
    acceptor: tokio_rustls::TlsAcceptor,
    seen: Arc<Mutex<Seen>>,
) -> anyhow::Result<()> {
    let mut connection = h2::server::handshake(acceptor.accept(socket).await?).await?;
    while let Some(request) = connection.accept().await {
        let (request, mut respond) = request?;
        let target = {
            let mut seen = seen.lock().unwrap_or_else(PoisonError::into_inner);
            seen.asked.push(request.uri().to_string());
            seen.target
        };
        tokio::spawn(async move {
            let carried = async {
                let (read, write) = TcpStream::connect(target).await?.into_split();
                let stream = respond.send_response(http::Response::new(()), false)?;
                let (there, back) =
                    tokio::join!(to_tunnel(read, stream), from_tunnel(request.into_body(), write));
                there.and(back)
            };
            if let Err(error) = carried.await {
                eprintln!("gateway's stream: {error:#}");
            }
        });
    }
    Ok(())
}

async fn to_tunnel(
    mut socket: tokio::net::tcp::OwnedReadHalf,
    mut stream: h2::SendStream<Bytes>,
) -> anyhow::Result<()> {
    let mut buffer = BytesMut::new();
    loop {
        buffer.reserve(64 * 1024);
        if socket.read_buf(&mut buffer).await? == 0 {
            stream.send_data(Bytes::new(), true)?;
            return Ok(());
        }
        let mut bytes = buffer.split().freeze();
        while !bytes.is_empty() {
            stream.reserve_capacity(bytes.len());
            let room = poll_fn(|context| stream.poll_capacity(context));
            let room = room.await.context("the tunnel ended")??;
            if room > 0 {
                stream.send_data(bytes.split_to(room.min(bytes.len())), false)?;
            }
        }
    }
}

async fn from_tunnel(
    mut body: h2::RecvStream,
    mut socket: tokio::net::tcp::OwnedWriteHalf,
) -> anyhow::Result<()> {
    while let Some(bytes) = body.data().await {
        let bytes = bytes?;
        socket.write_all(&bytes).await?;
        body.flow_control().release_capacity(bytes.len())?;
    }
    socket.shutdown().await?;
    Ok(())
}
