//! What the agent does as a client: servers with wrong certificates, each in the place of one of the mesh's pods.

use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context as _, ensure};
use bytes::Bytes;
use mesh_model::ports as mesh_ports;
use mesh_netns::net::ip;
use mesh_netns::servers::ports;
use mesh_netns::wait::{PATIENCE, until};
use rcgen::ExtendedKeyUsagePurpose;
use rustls::ServerConfig;
use serde_json::json;
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsAcceptor;

use crate::identity::SERVER;
use crate::mesh::{LogFromNow, Mesh, inside, sum_of};
use crate::tls::{self, Credentials, Wanted};

/// Who the stand-in should be.
const STANDIN: &str = "spiffe://cluster.local/ns/mesh/sa/standin";
/// Its addresses, on the host outside the mesh.
const ADDRESSES: [&str; 2] = ["192.168.77.210", "fd77::210"];

/// The stand-in's TLS settings, which change while it runs.
type Shown = Arc<Mutex<Arc<ServerConfig>>>;

/// A server that proves to be anything but the pod that was dialled gets no connection, and the client's agent says by
/// its reason what kind of wrong it is, and in words which; once it proves to be the pod it gets them.
pub(crate) fn wrong_servers_are_refused(mesh: &mut Mesh) -> anyhow::Result<()> {
    let elsewhere = Wanted::of("spiffe://elsewhere.example/ns/mesh/sa/standin");
    let unnamed = Wanted { uris: Vec::new(), names: vec!["standin.mesh".into()], ..Wanted::of("") };
    let twice = Wanted { uris: vec![STANDIN.into(), SERVER.into()], ..Wanted::of("") };
    let past = Wanted { years: (2020, 2021), ..Wanted::of(STANDIN) };
    let future = Wanted { years: (2090, 2100), ..Wanted::of(STANDIN) };
    let clients_only =
        Wanted { usages: vec![ExtendedKeyUsagePurpose::ClientAuth], ..Wanted::of(STANDIN) };
    let not_expected = format!("peer is {SERVER}, which was not expected");
    let by_mesh = |wanted: &Wanted| wanted.signed_by_the_mesh(mesh);
    let good = by_mesh(&Wanted::of(STANDIN))?;
    let wrong: [(Credentials, &str, &str); 11] = [
        (Credentials::none()?, "tls_failure", "peer showed no certificate"),
        (Wanted::of(STANDIN).self_signed()?, "tls_failure", "certificate is self-signed"),
        (
            Wanted::of(STANDIN).signed_elsewhere()?,
            "tls_failure",
            "certificate chains to no trusted root",
        ),
        (
            by_mesh(&elsewhere)?,
            "wrong_identity",
            "peer is of another trust domain: spiffe://elsewhere.example/ns/mesh/sa/standin",
        ),
        (by_mesh(&unnamed)?, "wrong_identity", "certificate names no workload identity"),
        (by_mesh(&twice)?, "wrong_identity", "certificate has several URI names"),
        (by_mesh(&Wanted::of(SERVER))?, "wrong_identity", &not_expected),
        (by_mesh(&past)?, "tls_failure", "certificate has expired"),
        (by_mesh(&future)?, "tls_failure", "certificate is not valid yet"),
        (by_mesh(&clients_only)?, "tls_failure", "certificate is not meant for this use"),
        (Wanted::revoked(STANDIN, mesh)?, "cert_revoked", "certificate is revoked"),
    ];
    let pod = json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {
            "name": "standin", "namespace": "mesh", "labels": { "app": "standin" },
            "uid": "00000000-0000-4000-9000-00000000d00d",
        },
        "spec": {
            "nodeName": "elsewhere", "serviceAccountName": "standin",
            "containers": [{ "name": "main" }],
        },
        "status": {
            "phase": "Running", "podIP": ADDRESSES[0],
            "podIPs": ADDRESSES.map(|ip| json!({ "ip": ip })),
            "conditions": [{ "type": "Ready", "status": "True" }],
        },
    });
    let outside = mesh.lab.outside();
    ip(Some(outside), &format!("addr add {}/24 dev eth0", ADDRESSES[0]))?;
    ip(Some(outside), &format!("addr add {}/64 dev eth0 nodad", ADDRESSES[1]))?;
    let shown: Shown = Arc::new(Mutex::new(tls::server(mesh, good.clone())?));
    start(mesh, &shown)?;
    mesh.lab.apply(&pod)?;
    let targets = [
        SocketAddr::new(ADDRESSES[0].parse()?, ports::HTTP),
        SocketAddr::new(ADDRESSES[1].parse()?, ports::HTTP),
    ];
    let show = |credentials: &Credentials| -> anyhow::Result<()> {
        let config = tls::server(mesh, credentials.clone())?;
        *shown.lock().unwrap_or_else(PoisonError::into_inner) = config;
        Ok(())
    };
    let rejections = || -> anyhow::Result<f64> {
        let labels = [("reporter", "source")];
        Ok(sum_of(&mesh.lab.node("a").metrics()?, "istio_crl_policy_rejections_total", &labels))
    };
    // The stand-in serves when it is who it should be: it is the certificates.
    for target in targets {
        mesh.wait_for("client", target)?;
    }
    let rejected = rejections()?;
    for (index, (credentials, word, reason)) in wrong.iter().enumerate() {
        show(credentials)?;
        // Both families in turn.
        let target = targets[index % 2];
        let prefix = SocketAddr::new(target.ip(), 0).to_string();
        let address = format!("dst.addr={}", prefix.trim_end_matches('0'));
        let log = LogFromNow::of(mesh, "a")?;
        // A connection may be served by a tunnel of before, which ends with its connection's end.
        let line = until(&format!("a server refused since {reason:?}"), PATIENCE, || {
            if mesh.reaches("client", target)? {
                return Ok(None);
            }
            Ok(log.lines(&["direction=\"outbound\"", &address, "reason="])?.pop())
        })?;
        // A tunnel of before may have closed under the connection that was refused first.
        ensure!(!mesh.reaches("client", target)?, "let in, though {reason}");
        let word = format!("reason={word}");
        let told = format!(": {reason}\"");
        let line = log
            .line(&["direction=\"outbound\"", &address, &told])
            .with_context(|| format!("{reason}: {line}"))?;
        ensure!(line.contains(&word), "not {word}: {line}");
    }
    until("refusals of the revoked server being counted", PATIENCE, || {
        Ok((rejections()? > rejected).then_some(()))
    })?;
    show(&good)?;
    for target in targets {
        mesh.wait_for("client", target)?;
    }
    mesh.lab.delete(&pod)?;
    for (address, length) in [(ADDRESSES[0], 24), (ADDRESSES[1], 64)] {
        ip(Some(outside), &format!("addr del {address}/{length} dev eth0"))?;
    }
    Ok(())
}

/// Runs the stand-in for as long as this program runs.
fn start(mesh: &Mesh, shown: &Shown) -> anyhow::Result<()> {
    for address in ADDRESSES {
        let listener = inside(mesh.lab.outside(), || {
            let at = SocketAddr::new(address.parse::<IpAddr>()?, mesh_ports::HBONE);
            let listener = std::net::TcpListener::bind(at)?;
            listener.set_nonblocking(true)?;
            Ok(listener)
        })?;
        let shown = Arc::clone(shown);
        std::thread::spawn(move || {
            let served = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .map_err(anyhow::Error::from)
                .and_then(|runtime| runtime.block_on(serve(listener, shown)));
            if let Err(error) = served {
                eprintln!("stand-in: {error:#}");
            }
        });
    }
    Ok(())
}

async fn serve(listener: std::net::TcpListener, shown: Shown) -> anyhow::Result<()> {
    let listener = TcpListener::from_std(listener)?;
    loop {
        let (socket, _peer) = listener.accept().await?;
        let config = Arc::clone(&shown.lock().unwrap_or_else(PoisonError::into_inner));
        tokio::spawn(async move {
            if let Err(error) = tunnel(socket, TlsAcceptor::from(config)).await {
                eprintln!("stand-in's tunnel: {error:#}");
            }
        });
    }
}

/// Answers each connection that the tunnel brings, then lets the tunnel end.
async fn tunnel(socket: TcpStream, acceptor: TlsAcceptor) -> anyhow::Result<()> {
    let mut connection = h2::server::handshake(acceptor.accept(socket).await?).await?;
    while let Some(request) = connection.accept().await {
        let (request, mut respond) = request?;
        tokio::spawn(async move {
            let answered = async {
                let mut stream = respond.send_response(http::Response::new(()), false)?;
                stream.send_data(Bytes::from_static(b"HTTP/1.0 200 OK\r\n\r\nhello\n"), true)?;
                let mut body = request.into_body();
                while let Some(bytes) = body.data().await {
                    body.flow_control().release_capacity(bytes?.len())?;
                }
                Ok::<_, h2::Error>(())
            };
            if let Err(error) = answered.await {
                eprintln!("stand-in's stream: {error}");
            }
        });
        // No second one: the next certificate is shown to a new tunnel.
        connection.graceful_shutdown();
    }
    Ok(())
}
