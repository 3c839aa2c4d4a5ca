//! Who is let in, who is certified, and why everybody else is not.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use anyhow::{Context as _, ensure};
use mesh_identity::csr;
use mesh_model::{SpiffeId, ports};
use mesh_netns::lab::CONTROLLER_IP;
use mesh_netns::servers;
use mesh_netns::wait::{PATIENCE, until};
use mesh_wire::certificate_request;
use mesh_wire::pb::auth::istio_certificate_service_client::IstioCertificateServiceClient;
use mesh_wire::pb::mesh::JoinRequest;
use mesh_wire::pb::mesh::enrolment_client::EnrolmentClient;
use rcgen::ExtendedKeyUsagePurpose;
use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use tokio_rustls::TlsConnector;
use tonic::Code;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint};

use crate::mesh::{LogFromNow, Mesh, field, inside, sum_of};
use crate::tls::{Credentials, Wanted, client, knock};

pub(crate) const CLIENT: &str = "spiffe://cluster.local/ns/mesh/sa/client";
pub(crate) const SERVER: &str = "spiffe://cluster.local/ns/mesh/sa/server";

/// What is said of a revoked certificate.
const REVOKED: &str = "certificate is revoked";

/// The server pod's tunnel port.
pub(crate) fn tunnel_port(mesh: &Mesh) -> SocketAddr {
    SocketAddr::new(mesh.lab.pod("server").ipv4, ports::HBONE)
}

/// Each wrong certificate is refused, and the agent's log tells which wrong it is.
pub(crate) fn certificates(mesh: &mut Mesh) -> anyhow::Result<()> {
    let elsewhere = Wanted::of("spiffe://elsewhere.example/ns/mesh/sa/client");
    let unnamed = Wanted { uris: Vec::new(), names: vec!["client.mesh".into()], ..Wanted::of("") };
    let twice = Wanted { uris: vec![CLIENT.into(), SERVER.into()], ..Wanted::of("") };
    let past = Wanted { years: (2020, 2021), ..Wanted::of(CLIENT) };
    let future = Wanted { years: (2090, 2100), ..Wanted::of(CLIENT) };
    let servers_only =
        Wanted { usages: vec![ExtendedKeyUsagePurpose::ServerAuth], ..Wanted::of(CLIENT) };
    let by_mesh = |wanted: &Wanted| wanted.signed_by_the_mesh(mesh).map(Some);
    let wrong: [(Option<Credentials>, &str); 10] = [
        (None, "peer showed no certificate"),
        (Some(Wanted::of(CLIENT).self_signed()?), "certificate is self-signed"),
        (Some(Wanted::of(CLIENT).signed_elsewhere()?), "certificate chains to no trusted root"),
        (by_mesh(&elsewhere)?, "peer is of another trust domain"),
        (by_mesh(&unnamed)?, "certificate names no workload identity"),
        (by_mesh(&twice)?, "certificate has several URI names"),
        (by_mesh(&past)?, "certificate has expired"),
        (by_mesh(&future)?, "certificate is not valid yet"),
        (by_mesh(&servers_only)?, "certificate is not meant for this use"),
        (Some(Wanted::revoked(CLIENT, mesh)?), REVOKED),
    ];
    let node = mesh.lab.node("b");
    let log = LogFromNow::of(mesh, "b")?;
    let counted = |metrics: &str| sum_of(metrics, "culvert_early_denials_total", &[]);
    let before = counted(&node.metrics()?);
    let number = wrong.len();
    for (credentials, reason) in wrong {
        let config = client(mesh, credentials, SERVER)?;
        let knocked = if reason == REVOKED {
            until("the revoked one being refused", PATIENCE, || {
                let knocked = knock(mesh, tunnel_port(mesh), &config)?;
                Ok(knocked.answer.is_err().then_some(knocked))
            })?
        } else {
            knock(mesh, tunnel_port(mesh), &config)?
        };
        ensure!(knocked.answer.is_err(), "let in, though {reason}");
        let from = format!("src.addr={} ", knocked.from);
        let line = log.line(&[&from])?;
        ensure!(line.contains(reason), "the reason is not {reason:?}: {line}");
    }
    until("the refusals being counted", PATIENCE, || {
        let now = counted(&node.metrics()?);
        Ok((now - before >= f64::from(u32::try_from(number)?)).then_some(()))
    })?;
    // The same hand, with a certificate in order, is let in: it was the certificates.
    let config = client(mesh, by_mesh(&Wanted::of(CLIENT))?, SERVER)?;
    let knocked = knock(mesh, tunnel_port(mesh), &config)?;
    ensure!(knocked.answer.is_ok(), "a certificate in order is refused: {knocked:?}");
    Ok(())
}

/// The pod proves to be who it is, and nobody else.
pub(crate) fn server_of_another_name(mesh: &mut Mesh) -> anyhow::Result<()> {
    let credentials = Wanted::of(CLIENT).signed_by_the_mesh(mesh)?;
    let config = client(mesh, Some(credentials), "spiffe://cluster.local/ns/mesh/sa/other")?;
    let knocked = knock(mesh, tunnel_port(mesh), &config)?;
    let refusal = knocked.answer.err().context("the server passed for somebody else")?;
    ensure!(refusal.contains("WrongIdentity"), "{refusal}");
    Ok(())
}

/// What a proved peer may ask for: the pod itself, by CONNECT, and none of the agent's ports.
pub(crate) fn requests(mesh: &mut Mesh) -> anyhow::Result<()> {
    let config = client(mesh, Some(Wanted::of(CLIENT).signed_by_the_mesh(mesh)?), SERVER)?;
    let log = LogFromNow::of(mesh, "b")?;
    let own = mesh.lab.pod("server").ipv4;
    let ask = |method: &str, target: SocketAddr| ask(mesh, &config, method, &target.to_string());
    let (_, answer) = ask("CONNECT", SocketAddr::new(own, servers::ports::HTTP))?;
    ensure!(answer == "200", "the pod's own port: {answer}");
    let refused = [
        (SocketAddr::new(mesh.lab.pod("client").ipv4, servers::ports::HTTP), "wrong_destination"),
        (SocketAddr::new("127.0.0.1".parse()?, servers::ports::HTTP), "wrong_destination"),
        (SocketAddr::new(own, ports::OUTBOUND), "loop_refused"),
        (SocketAddr::new(own, ports::INBOUND_PLAINTEXT), "loop_refused"),
        (SocketAddr::new(own, ports::HBONE), "loop_refused"),
    ];
    for (target, reason) in refused {
        let (from, answer) = ask("CONNECT", target)?;
        ensure!(answer == "400" || answer == "503", "CONNECT {target}: {answer}");
        let line = log.line(&[&format!("src.addr={from} "), "reason="])?;
        ensure!(field(&line, "reason") == Some(reason), "CONNECT {target}: {line}");
    }
    let (_, answer) = ask("GET", SocketAddr::new(own, servers::ports::HTTP))?;
    ensure!(answer != "200", "a GET was answered");
    ensure!(answer.starts_with('4') || answer.contains("reset"), "GET: {answer}");
    Ok(())
}

/// One request over a tunnel of its own: our address, and the status or the error.
pub(crate) fn ask(
    mesh: &Mesh,
    config: &Arc<ClientConfig>,
    method: &str,
    target: &str,
) -> anyhow::Result<(SocketAddr, String)> {
    let server = tunnel_port(mesh);
    let uri = if method == "CONNECT" { target.to_owned() } else { format!("http://{target}/") };
    let request = http::Request::builder().method(method).uri(uri).body(())?;
    in_runtime_outside(mesh, async move {
        let tcp = tokio::net::TcpStream::connect(server).await?;
        let from = tcp.local_addr()?;
        let name = ServerName::IpAddress(server.ip().into());
        let tls = TlsConnector::from(Arc::clone(config)).connect(name, tcp).await?;
        let (sender, connection) = h2::client::handshake(tls).await?;
        let driven = tokio::spawn(connection);
        let answered = async {
            let (response, _body) = sender.ready().await?.send_request(request, false)?;
            response.await
        };
        let answer = match answered.await {
            Ok(response) => response.status().as_u16().to_string(),
            Err(error) => error.to_string(),
        };
        driven.abort();
        Ok((from, answer))
    })
}

pub(crate) fn in_runtime_outside<T: Send>(
    mesh: &Mesh,
    work: impl Future<Output = anyhow::Result<T>> + Send,
) -> anyhow::Result<T> {
    inside(mesh.lab.outside(), || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(async { tokio::time::timeout(PATIENCE, work).await? })
    })
}

/// The controller certifies for the pods of the asking node only, and takes a join token once, in its time.
pub(crate) fn signing_and_tokens(mesh: &mut Mesh) -> anyhow::Result<()> {
    let token = |node: &str, ttl: &str| -> anyhow::Result<String> {
        let arguments = ["token", "create", "--node", node, "--ttl", ttl];
        Ok(mesh.lab.controller_command(&arguments)?.trim().to_owned())
    };
    let joining = token("a", "1h")?;
    let (short, for_b) = (token("a", "1s")?, token("b", "1h")?);
    let issued = unix_seconds()?;
    let mut forged = token("a", "1h")?;
    // Another tag that decodes: the last character stands for four bits.
    let last = if forged.ends_with('A') { 'E' } else { 'A' };
    forged.pop();
    forged.push(last);
    let root = mesh.lab.controller_command(&["ca", "root"])?;
    // The shortest lifetime there is, in whole seconds of the clock that both ends share.
    until("the short token's end", PATIENCE, || Ok((unix_seconds()? > issued + 1).then_some(())))?;
    let bad = [
        (joining.clone(), "replayed"),
        (short, "expired"),
        (for_b, "wrong_node"),
        ("no token".to_owned(), "malformed"),
        (forged, "bad_signature"),
    ];
    let words: Vec<&str> = bad.iter().map(|(_, word)| *word).collect();
    let skip = mesh.controller_log()?.len();
    in_runtime_outside(mesh, async move {
        let channel = controller(&root).await?;
        let mut enrolment = EnrolmentClient::new(channel.clone());
        let join = |join_token: String| JoinRequest { join_token, node: "a".into() };
        let session = enrolment.join(join(joining)).await?.into_inner().token;
        for (token, word) in bad {
            let refused = enrolment.join(join(token)).await.err();
            let refused = refused.with_context(|| format!("a token was taken, though {word}"))?;
            ensure!(refused.code() == Code::Unauthenticated, "{word}: {refused}");
            let remedy = "culvert-controller token create --node a";
            ensure!(refused.message().ends_with(remedy), "{word}: {refused}");
        }
        let mut authority = IstioCertificateServiceClient::new(channel);
        let hour = Duration::from_secs(3600);
        let mut sign = async |identity: &str, bearer: &str| -> anyhow::Result<_> {
            let identity: SpiffeId = identity.parse()?;
            let (_key, request) = csr(&identity)?;
            let mut request = tonic::Request::new(certificate_request(request, &identity, hour));
            request.metadata_mut().insert("authorization", format!("Bearer {bearer}").parse()?);
            Ok(authority.create_certificate(request).await)
        };
        ensure!(sign(CLIENT, &session).await?.is_ok(), "an own pod's identity is refused");
        let elsewhere = "spiffe://elsewhere.example/ns/mesh/sa/client";
        for (identity, bearer, code, part) in [
            (SERVER, &*session, Code::PermissionDenied, "is bound to node a"),
            (elsewhere, &*session, Code::PermissionDenied, "not of the trust domain"),
            (CLIENT, "made-up", Code::Unauthenticated, "malformed"),
        ] {
            let refused = sign(identity, bearer).await?.err();
            let refused = refused.with_context(|| format!("{identity} was certified"))?;
            ensure!(refused.code() == code, "{identity}: {refused}");
            ensure!(refused.message().contains(part), "{identity}: {refused}");
        }
        Ok(())
    })?;
    let told = |what: &str, word: &str| {
        until(&format!("{what} {word} in the controller's log"), PATIENCE, || {
            let log = mesh.controller_log()?;
            let reason = format!("reason=\"{word}\"");
            let mut new = log.get(skip..).unwrap_or_default().lines();
            Ok(new.any(|line| line.contains(what) && line.contains(&reason)).then_some(()))
        })
    };
    for word in words {
        told("join refused", word)?;
    }
    told("certificate refused", "not_on_node")?;
    told("certificate refused", "foreign_trust_domain")
}

fn unix_seconds() -> anyhow::Result<u64> {
    Ok(SystemTime::now().duration_since(SystemTime::UNIX_EPOCH)?.as_secs())
}

async fn controller(root: &str) -> anyhow::Result<Channel> {
    let tls = ClientTlsConfig::new()
        .ca_certificate(Certificate::from_pem(root))
        .domain_name(CONTROLLER_IP);
    let endpoint = Endpoint::new(format!("https://{CONTROLLER_IP}:15012"))?;
    Ok(endpoint.tls_config(tls)?.connect().await?)
}
