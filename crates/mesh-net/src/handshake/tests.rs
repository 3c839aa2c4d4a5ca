//! Handshakes against stock tokio-rustls, and against peers that misbehave.

use std::io::Write as _;
use std::net::{TcpListener, TcpStream};
use std::time::SystemTime;

use mesh_identity::{CaConfig, CaCore, IssuedAnswer, Svid, TrustBundle, csr, tls};
use mesh_model::SpiffeId;
use tokio_rustls::{TlsAcceptor, TlsConnector};

use super::*;

struct World {
    ca: CaCore,
    trust: Arc<TrustBundle>,
}

impl World {
    fn new(trust_domain: &str) -> Self {
        let ca = CaCore::create(trust_domain, CaConfig::default(), SystemTime::now()).unwrap();
        let trust = TrustBundle::from_pem(trust_domain, &ca.root_bundle_pem(), "").unwrap();
        Self { ca, trust: Arc::new(trust) }
    }

    fn svid(&self, account: &str) -> Svid {
        let (now, id) = (SystemTime::now(), self.id(account));
        let (key, request) = csr(&id).unwrap();
        let chain = self.ca.sign(&request, &id, Duration::ZERO, now).unwrap();
        IssuedAnswer::check(&chain, &id, key, now).unwrap().svid
    }

    fn id(&self, account: &str) -> SpiffeId {
        SpiffeId::new(self.ca.trust_domain(), "shop", account).unwrap()
    }

    fn client(&self, expected: &str) -> ClientConfig {
        tls::client(&self.svid("client"), Arc::clone(&self.trust), vec![self.id(expected)])
    }

    fn server(&self) -> ServerConfig {
        tls::server(&self.svid("server"), Arc::clone(&self.trust))
    }
}

fn pair() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let one = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (other, _) = listener.accept().unwrap();
    (one, other)
}

/// Drives our side over a blocking socket with a time limit.
fn run(mut handshake: Handshake, mut stream: TcpStream) -> Result<Established, HandshakeError> {
    stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    match handshake.advance(&mut stream)? {
        Poll::Ready(finished) => handshake.establish(finished),
        Poll::Pending => Err(HandshakeError::TimedOut { connecting: false }),
    }
}

fn in_background<T: Send + 'static>(
    work: impl AsyncFnOnce(tokio::net::TcpStream) -> T + Send + 'static,
    stream: TcpStream,
) -> std::thread::JoinHandle<T> {
    std::thread::spawn(move || {
        stream.set_nonblocking(true).unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async { work(tokio::net::TcpStream::from_std(stream).unwrap()).await })
    })
}

fn name() -> ServerName<'static> {
    ServerName::try_from("any.invalid").unwrap()
}

#[test]
fn our_client_and_a_stock_server_agree() {
    let world = World::new("cluster.local");
    let (ours, theirs) = pair();
    let acceptor = TlsAcceptor::from(Arc::new(world.server()));
    let server = in_background(
        async move |stream| {
            let stream = acceptor.accept(stream).await.unwrap();
            let (_, connection) = stream.get_ref();
            connection.negotiated_key_exchange_group().map(|group| group.name())
        },
        theirs,
    );
    let handshake = Handshake::client(client_config(world.client("server"))).unwrap();
    let established = run(handshake, ours).unwrap();
    assert_eq!(*established.peer.id(), world.id("server"));
    assert_eq!(established.session.suite, Suite::Aes128Gcm);
    assert_eq!((established.session.tx_seq, established.session.rx_seq), (0, 0));
    assert_ne!(established.session.tx.as_bytes(), established.session.rx.as_bytes());
    assert_eq!(server.join().unwrap(), Some(rustls::NamedGroup::X25519MLKEM768));
}

#[test]
fn a_stock_client_and_our_server_agree_and_early_data_stays_sealed() {
    let world = World::new("cluster.local");
    let (ours, theirs) = pair();
    let connector = TlsConnector::from(Arc::new(world.client("server")));
    let client = in_background(
        async move |stream| {
            use tokio::io::AsyncWriteExt;
            let mut stream = connector.connect(name(), stream).await.unwrap();
            stream.write_all(b"right behind the handshake").await.unwrap();
            stream.flush().await.unwrap();
            stream
        },
        theirs,
    );
    let handshake = Handshake::server(server_config(world.server())).unwrap();
    let established = run(handshake, ours).unwrap();
    assert_eq!(*established.peer.id(), world.id("client"));
    // What came behind was not opened: it is left over as ciphertext, or still in the socket.
    assert_eq!(established.session.rx_seq, 0);
    assert!(established.session.leftover.first().is_none_or(|kind| *kind == 23));
    drop(client.join().unwrap());
}

#[test]
fn a_client_without_certificate_is_refused() {
    let world = World::new("cluster.local");
    let (ours, theirs) = pair();
    let mut roots = rustls::RootCertStore::empty();
    for root in world.trust.roots("cluster.local") {
        roots.add(root.clone()).unwrap();
    }
    let mut config = ClientConfig::builder_with_provider(tls::provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.dangerous().set_certificate_verifier(mesh_identity::PeerVerifier::of_server(
        Arc::clone(&world.trust),
        vec![world.id("server")],
    ));
    config.alpn_protocols = vec![ALPN.to_vec()];
    let connector = TlsConnector::from(Arc::new(config));
    let client =
        in_background(async move |stream| drop(connector.connect(name(), stream).await), theirs);
    let handshake = Handshake::server(server_config(world.server())).unwrap();
    let error = run(handshake, ours).unwrap_err();
    assert!(matches!(error, HandshakeError::Rejected(PeerRejection::NoCertificate)), "{error:?}");
    client.join().unwrap();
}

#[test]
fn a_server_of_another_identity_or_trust_domain_is_refused() {
    let world = World::new("cluster.local");
    let stranger = World::new("elsewhere.local");
    for (server, wrong_domain) in [(world.server(), false), (stranger.server(), true)] {
        let (ours, theirs) = pair();
        let acceptor = TlsAcceptor::from(Arc::new(server));
        let server =
            in_background(async move |stream| acceptor.accept(stream).await.is_ok(), theirs);
        let handshake = Handshake::client(client_config(world.client("other"))).unwrap();
        let error = run(handshake, ours).unwrap_err();
        assert_eq!(error.close_reason(), CloseReason::WrongIdentity, "{error:?}");
        let is_domain =
            matches!(error, HandshakeError::Rejected(PeerRejection::WrongTrustDomain { .. }));
        assert_eq!(is_domain, wrong_domain, "{error:?}");
        assert!(!server.join().unwrap());
    }
}

#[test]
fn bytes_that_are_no_tls_are_refused_at_once() {
    let world = World::new("cluster.local");
    let config = server_config(world.server());
    let refused = |bytes: &[u8]| {
        let (ours, mut theirs) = pair();
        theirs.write_all(bytes).unwrap();
        let error = run(Handshake::server(Arc::clone(&config)).unwrap(), ours).unwrap_err();
        assert_eq!(error.close_reason(), CloseReason::TlsFailure);
        error
    };
    assert!(matches!(refused(b"GET / HTTP/1.1\r\n\r\n"), HandshakeError::Tls(_)));
    assert!(matches!(refused(&[22, 3, 1, 0xff, 0xff]), HandshakeError::Tls(_)));
    assert!(matches!(refused(&[23, 3, 3, 0, 1, 0]), HandshakeError::Tls(_)));
    assert!(matches!(refused(&[22, 3, 1, 0, 4, 99, 0, 0, 0]), HandshakeError::Tls(_)));
}

#[test]
fn a_peer_that_leaves_ends_the_handshake() {
    let world = World::new("cluster.local");
    let (ours, theirs) = pair();
    drop(theirs);
    let handshake = Handshake::server(server_config(world.server())).unwrap();
    assert!(matches!(run(handshake, ours).unwrap_err(), HandshakeError::Closed));
}

#[test]
fn a_peer_that_refuses_is_told_from_one_that_breaks_tls() {
    let world = World::new("cluster.local");
    let dial = |answer: &[u8]| {
        let (ours, mut theirs) = pair();
        theirs.write_all(answer).unwrap();
        if answer.is_empty() {
            socket2::SockRef::from(&theirs).set_linger(Some(Duration::ZERO)).unwrap();
            drop(theirs);
            return run(Handshake::client(client_config(world.client("server"))).unwrap(), ours)
                .unwrap_err();
        }
        run(Handshake::client(client_config(world.client("server"))).unwrap(), ours).unwrap_err()
    };
    // A reset before any answer; internal_error, as an overloaded peer says it; handshake_failure.
    let refused = dial(&[]);
    assert!(matches!(refused, HandshakeError::Refused(_)), "{refused:?}");
    assert_eq!(refused.close_reason(), CloseReason::PeerRefused);
    assert_eq!(dial(&[21, 3, 3, 0, 2, 2, 80]).close_reason(), CloseReason::PeerRefused);
    assert_eq!(dial(&[21, 3, 3, 0, 2, 2, 40]).close_reason(), CloseReason::TlsFailure);
}
