//! Against stock peers: rustls for the handshake, tokio-rustls and h2 at the other end, in both roles.
#![expect(clippy::unwrap_used, reason = "a test's own values are valid")]

mod support;

use std::sync::Arc;

use bytes::Bytes;
use mesh_model::PodUid;
use mesh_tunnel::{Engine, EngineConfig, EngineEvent, Io as _, ResponseHead, Retire, SockId};
use rustls::pki_types::ServerName;
use support::net::Net;
use support::permit::permit;
use support::stock::{SUITES, Secrets, configs, shake_hands};
use support::{epoch, head, key, pattern};
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};

/// Runs an engine whose tunnel is `pipe` until `done`; `near` is the engine's socket, `wire` the other end of it.
async fn drive(
    engine: &mut Engine,
    net: &mut Net,
    pipe: &mut DuplexStream,
    wire: SockId,
    mut step: impl FnMut(&mut Engine, &mut Net) -> bool,
) {
    let mut buffer = vec![0; 64 << 10];
    let mut pending: Vec<u8> = Vec::new();
    loop {
        for (sock, ready) in net.take_edges() {
            engine.on_event(sock, ready);
        }
        let mut busy = engine.turn(net, epoch());
        if step(engine, net) {
            return;
        }
        if let Ok(bytes) = net.read(wire, 256 << 10)
            && !bytes.is_empty()
        {
            busy = true;
            let mut rest = &bytes[..];
            let (mut reader, mut writer) = tokio::io::split(&mut *pipe);
            while !rest.is_empty() {
                tokio::select! {
                    written = writer.write(rest) => rest = &rest[written.unwrap()..],
                    read = reader.read(&mut buffer) => pending.extend(&buffer[..read.unwrap()]),
                }
            }
        }
        let wait = if busy { 0 } else { 1 };
        let timeout = std::time::Duration::from_millis(wait);
        if pending.len() < 1 << 20
            && let Ok(Ok(read)) = tokio::time::timeout(timeout, pipe.read(&mut buffer)).await
        {
            pending.extend(&buffer[..read]);
        }
        if !pending.is_empty()
            && let Ok(count) = net.write(wire, &pending)
        {
            pending.drain(..count);
        }
    }
}

const BULK: u64 = 3 << 20;

fn body(stream: u64) -> Bytes {
    (0..BULK).map(|at| pattern(stream, at)).collect::<Vec<u8>>().into()
}

/// An application that sends `body(stream)` and FIN, and collects what it gets until the end.
struct App {
    sock: SockId,
    outgoing: Bytes,
    sent: usize,
    incoming: Vec<u8>,
    ended: bool,
}

impl App {
    fn new(sock: SockId, stream: u64) -> Self {
        Self { sock, outgoing: body(stream), sent: 0, incoming: Vec::new(), ended: false }
    }

    fn step(&mut self, net: &mut Net) -> bool {
        if self.sent < self.outgoing.len()
            && let Ok(count) = net.write(self.sock, &self.outgoing[self.sent..])
        {
            self.sent += count;
            if self.sent == self.outgoing.len() {
                net.shutdown_write(self.sock).unwrap();
            }
        }
        if self.ended && self.sent == self.outgoing.len() {
            return true;
        }
        match net.read(self.sock, 100_000) {
            Ok(bytes) if bytes.is_empty() => self.ended = true,
            Ok(bytes) => self.incoming.extend(bytes),
            Err(_) => {}
        }
        self.ended && self.sent == self.outgoing.len()
    }
}

fn config() -> EngineConfig {
    EngineConfig { key_update_after: 40, ..EngineConfig::default() }
}

async fn send_all(mut stream: h2::SendStream<Bytes>, mut data: Bytes) {
    while !data.is_empty() {
        stream.reserve_capacity(data.len());
        let room = std::future::poll_fn(|cx| stream.poll_capacity(cx)).await.unwrap().unwrap();
        stream.send_data(data.split_to(room.min(data.len())), false).unwrap();
    }
    stream.send_data(Bytes::new(), true).unwrap();
}

async fn receive_all(mut stream: h2::RecvStream) -> Vec<u8> {
    let mut all = Vec::new();
    while let Some(data) = stream.data().await {
        let data = data.unwrap();
        all.extend_from_slice(&data);
        stream.flow_control().release_capacity(data.len()).unwrap();
    }
    all
}

#[tokio::test(flavor = "current_thread")]
async fn a_stock_server_understands_our_client() {
    let secrets = Arc::new(Secrets::default());
    let (client, server) = configs(&secrets, SUITES);
    let (mut pipe, far) = tokio::io::duplex(256 << 10);
    let peer = tokio::spawn(async move {
        let tls = tokio_rustls::TlsAcceptor::from(Arc::new(server)).accept(far).await.unwrap();
        let mut builder = h2::server::Builder::new();
        builder.max_frame_size(1 << 20).initial_window_size(1 << 20);
        let mut connection = builder.handshake::<_, Bytes>(tls).await.unwrap();
        let (request, mut respond) = connection.accept().await.unwrap().unwrap();
        assert_eq!(request.method(), "CONNECT");
        assert_eq!(request.uri().authority().unwrap(), "10.0.0.2:80");
        assert_eq!(request.headers()["baggage"], "k8s.namespace.name=shop");
        let stream = respond.send_response(http::Response::new(()), false).unwrap();
        let work = tokio::spawn(async move {
            let (received, ()) =
                tokio::join!(receive_all(request.into_body()), send_all(stream, body(2)));
            received
        });
        while connection.accept().await.is_some() {}
        work.await.unwrap()
    });
    let tls =
        rustls::ClientConnection::new(Arc::new(client), ServerName::try_from("mesh").unwrap());
    let session = shake_hands(tls.unwrap().into(), &mut pipe, &secrets, true).await;
    let mut net = Net::new(1, false);
    let mut engine = Engine::new(config(), epoch());
    let (near, wire) = net.pair(1 << 20);
    let (app, outside) = net.pair(100_000);
    engine.open(permit(), key("w"), head("10.0.0.2:80"), app, epoch());
    let Some(EngineEvent::Dial { dial, .. }) = engine.poll_event() else { panic!("no dial") };
    engine.dial_succeeded(dial, session, near, epoch());
    let mut user = App::new(outside, 1);
    drive(&mut engine, &mut net, &mut pipe, wire, |engine, net| {
        if user.step(net) {
            // GOAWAY and close_notify, so that the peer ends in good order.
            engine.retire(Retire::All, epoch());
        }
        peer.is_finished()
    })
    .await;
    assert!(user.incoming == body(2), "bytes from the server");
    assert!(peer.await.unwrap() == body(1), "bytes to the server");
}

#[tokio::test(flavor = "current_thread")]
async fn a_stock_client_is_understood() {
    let secrets = Arc::new(Secrets::default());
    let (client, mut server) = configs(&secrets, SUITES);
    server.send_tls13_tickets = 0;
    let (mut pipe, far) = tokio::io::duplex(256 << 10);
    let peer = tokio::spawn(async move {
        let name = ServerName::try_from("mesh").unwrap();
        let connector = tokio_rustls::TlsConnector::from(Arc::new(client));
        let tls = connector.connect(name, far).await.unwrap();
        let mut builder = h2::client::Builder::new();
        builder.max_frame_size(1 << 20).initial_window_size(1 << 20);
        let (sender, connection) = builder.handshake::<_, Bytes>(tls).await.unwrap();
        let connection = tokio::spawn(connection);
        let mut sender = sender.ready().await.unwrap();
        let request = http::Request::builder()
            .method("CONNECT")
            .uri("10.0.0.2:80")
            .header("baggage", "k8s.namespace.name=shop");
        let (response, stream) = sender.send_request(request.body(()).unwrap(), false).unwrap();
        let (received, ()) = tokio::join!(
            async {
                let response = response.await.unwrap();
                assert_eq!(response.status(), 200);
                assert_eq!(response.headers()["baggage"], "us");
                receive_all(response.into_body()).await
            },
            send_all(stream, body(1))
        );
        drop(sender);
        connection.abort();
        received
    });
    let tls = rustls::ServerConnection::new(Arc::new(server));
    let session = shake_hands(tls.unwrap().into(), &mut pipe, &secrets, false).await;
    let mut net = Net::new(1, false);
    let mut engine = Engine::new(config(), epoch());
    let (near, wire) = net.pair(1 << 20);
    let (app, outside) = net.pair(100_000);
    engine.add_server_tunnel(PodUid::new("pod"), session, near, epoch());
    let mut user = App::new(outside, 2);
    drive(&mut engine, &mut net, &mut pipe, wire, |engine, net| {
        while let Some(event) = engine.poll_event() {
            if let EngineEvent::Request { request, head, .. } = event {
                assert_eq!(head.authority, "10.0.0.2:80");
                assert_eq!(head.baggage.as_deref(), Some("k8s.namespace.name=shop"));
                let response =
                    ResponseHead { baggage: Some("us".into()), ..ResponseHead::default() };
                engine.accept(permit(), request, app, response, epoch());
            }
        }
        user.step(net) && peer.is_finished()
    })
    .await;
    assert!(user.incoming == body(1), "bytes from the client");
    assert!(peer.await.unwrap() == body(2), "bytes to the client");
}
