//! What the tunnel port does under attack, and when a peer's certificate ends under its tunnel.

use std::net::SocketAddr;
use std::process::Stdio;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use anyhow::{Context as _, ensure};
use mesh_netns::servers;
use mesh_netns::wait::{PATIENCE, until};
use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use tokio_rustls::TlsConnector;

use crate::identity::{CLIENT, SERVER, ask, in_runtime_outside, tunnel_port};
use crate::mesh::{Mesh, sum_of};
use crate::tls::{Wanted, client};

/// Connects and says nothing, on and on; holds the latest 6,000.
const FLOOD: &str = "import collections,resource,socket,sys\n\
    resource.setrlimit(resource.RLIMIT_NOFILE, (8192, 8192))\n\
    held = collections.deque(maxlen=6000)\n\
    while True:\n\
    \x20s = socket.socket()\n\
    \x20try: s.connect((sys.argv[1], 15008)); held.append(s)\n\
    \x20except OSError: pass\n";

/// A flood of silent connections to a pod's tunnel port keeps nobody out, neither there nor elsewhere on its node.
pub(crate) fn silent_flood(mesh: &mut Mesh) -> anyhow::Result<()> {
    let config = client(mesh, Some(Wanted::of(CLIENT).signed_by_the_mesh(mesh)?), SERVER)?;
    let port = tunnel_port(mesh);
    let node = mesh.lab.node("b");
    let overloaded = || {
        let labels = [("role", "server"), ("result", "overloaded")];
        Ok::<_, anyhow::Error>(sum_of(&node.metrics()?, "culvert_tls_handshakes_total", &labels))
    };
    let before = overloaded()?;
    let mut flood = mesh.lab.pod("stranger").command("python3");
    let mut flood =
        flood.args(["-c", FLOOD, &port.ip().to_string()]).stdin(Stdio::null()).spawn()?;
    let under_flood = || -> anyhow::Result<()> {
        until("the flood reaching the bound", PATIENCE, || {
            Ok((overloaded()? > before + 100.0).then_some(()))
        })?;
        let target = SocketAddr::new(port.ip(), servers::ports::HTTP).to_string();
        for number in 0..5 {
            let (_, answer) = ask(mesh, &config, "CONNECT", &target)?;
            ensure!(answer == "200", "new peer {number} during the flood: {answer}");
        }
        ensure!(mesh.reaches("client", mesh.server())?, "the mesh's own client is kept out");
        Ok(())
    };
    let outcome = under_flood();
    flood.kill()?;
    flood.wait()?;
    outcome
}

/// A tunnel whose peer's certificate has ended takes no new stream; the one it carries goes on.
pub(crate) fn ended_certificate(mesh: &mut Mesh) -> anyhow::Result<()> {
    let end = SystemTime::now() + Duration::from_secs(3);
    let wanted = Wanted { end: Some(end), ..Wanted::of(CLIENT) };
    let config = client(mesh, Some(wanted.signed_by_the_mesh(mesh)?), SERVER)?;
    let refused_at = ask_until_refused(mesh, &config)?;
    ensure!(refused_at > end, "refused before the certificate's end");
    let late = refused_at.duration_since(end)?;
    // Five, by the agent's own measure; and what a busy machine takes to notice.
    ensure!(late < Duration::from_secs(15), "streams were taken {late:?} after the end");
    Ok(())
}

/// Asks for streams on one tunnel until one is refused, while the first lives on.
fn ask_until_refused(mesh: &Mesh, config: &Arc<ClientConfig>) -> anyhow::Result<SystemTime> {
    let server = tunnel_port(mesh);
    let target = SocketAddr::new(server.ip(), servers::ports::HTTP).to_string();
    let connect = || http::Request::builder().method("CONNECT").uri(&target).body(());
    in_runtime_outside(mesh, async move {
        let tcp = tokio::net::TcpStream::connect(server).await?;
        let name = ServerName::IpAddress(server.ip().into());
        let tls = TlsConnector::from(Arc::clone(config)).connect(name, tcp).await?;
        let (mut sender, connection) = h2::client::handshake(tls).await?;
        let driven = tokio::spawn(connection);
        sender = sender.ready().await?;
        let (response, mut body) = sender.send_request(connect()?, false)?;
        let response = response.await?;
        ensure!(response.status() == 200, "the first stream: {}", response.status());
        let refused_at = loop {
            sender = match sender.ready().await {
                Ok(ready) => ready,
                Err(error) => break told_to_go(&error)?,
            };
            match sender.send_request(connect()?, false)?.0.await {
                Ok(response) if response.status() == 200 => {
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
                Ok(response) => {
                    ensure!(response.status() == 503, "refused with {}", response.status());
                    break SystemTime::now();
                }
                Err(error) => break told_to_go(&error)?,
            }
        };
        // The first stream still leads to the web server.
        body.send_data("GET / HTTP/1.0\r\n\r\n".into(), false)?;
        let answer = response.into_body().data().await.context("no answer on the old stream")??;
        ensure!(answer.starts_with(b"HTTP/1."), "{answer:?}");
        driven.abort();
        Ok(refused_at)
    })
}

/// The peer takes no more streams, in good order.
fn told_to_go(error: &h2::Error) -> anyhow::Result<SystemTime> {
    let in_good_order = error.reason() == Some(h2::Reason::NO_ERROR);
    ensure!(error.is_go_away() && in_good_order, "the tunnel ended: {error}");
    Ok(SystemTime::now())
}
