//! The other end of a tunnel from stock parts: rustls' handshake, of which the engine gets the secrets.

use std::collections::BTreeMap;
use std::io::Read as _;
use std::sync::{Arc, Mutex};

use mesh_tunnel::{Suite, TlsSession, TrafficSecret};
use rustls::SupportedCipherSuite;
use rustls::crypto::CryptoProvider;
use rustls::crypto::aws_lc_rs::cipher_suite;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream};

/// rustls' hook for key logs is how traffic secrets are had.
#[derive(Debug, Default)]
pub struct Secrets(Mutex<BTreeMap<String, Vec<u8>>>);

impl rustls::KeyLog for Secrets {
    fn log(&self, label: &str, _random: &[u8], secret: &[u8]) {
        self.0.lock().unwrap().insert(label.to_owned(), secret.to_vec());
    }
}

/// The suites of the mesh, as rustls names them.
pub const SUITES: &[SupportedCipherSuite] = &[
    cipher_suite::TLS13_AES_128_GCM_SHA256,
    cipher_suite::TLS13_AES_256_GCM_SHA384,
    cipher_suite::TLS13_CHACHA20_POLY1305_SHA256,
];

/// Both ends' settings, with one of `suites`.
pub fn configs(
    secrets: &Arc<Secrets>,
    suites: &[SupportedCipherSuite],
) -> (rustls::ClientConfig, rustls::ServerConfig) {
    let rcgen::CertifiedKey { cert, signing_key } =
        rcgen::generate_simple_self_signed(vec!["mesh".into()]).unwrap();
    let chain = vec![CertificateDer::from(cert.der().to_vec())];
    let mut roots = rustls::RootCertStore::empty();
    roots.add(chain[0].clone()).unwrap();
    let provider = Arc::new(CryptoProvider {
        cipher_suites: suites.to_vec(),
        ..rustls::crypto::aws_lc_rs::default_provider()
    });
    let tls13 = &[&rustls::version::TLS13];
    let mut client = rustls::ClientConfig::builder_with_provider(provider.clone())
        .with_protocol_versions(tls13)
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let key = PrivateKeyDer::Pkcs8(signing_key.serialize_der().into());
    let mut server = rustls::ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(tls13)
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(chain, key)
        .unwrap();
    for alpn in [&mut client.alpn_protocols, &mut server.alpn_protocols] {
        *alpn = vec![b"h2".to_vec()];
    }
    client.key_log = secrets.clone();
    server.key_log = secrets.clone();
    (client, server)
}

fn session(secrets: &Secrets, suite: rustls::CipherSuite, client: bool, rx_seq: u64) -> TlsSession {
    use rustls::CipherSuite as Theirs;
    let (_, suite) = [
        (Theirs::TLS13_AES_128_GCM_SHA256, Suite::Aes128Gcm),
        (Theirs::TLS13_AES_256_GCM_SHA384, Suite::Aes256Gcm),
        (Theirs::TLS13_CHACHA20_POLY1305_SHA256, Suite::Chacha20Poly1305),
    ]
    .into_iter()
    .find(|(theirs, _)| *theirs == suite)
    .unwrap();
    let secrets = secrets.0.lock().unwrap();
    let secret = |name: &str| TrafficSecret::new(suite, &secrets[name]).unwrap();
    let (up, down) = (secret("CLIENT_TRAFFIC_SECRET_0"), secret("SERVER_TRAFFIC_SECRET_0"));
    let (tx, rx) = if client { (up, down) } else { (down, up) };
    TlsSession { suite, tx, rx, tx_seq: 0, rx_seq, leftover: Vec::new() }
}

/// The engine's side of the handshake, with a buffered connection fed record by record.
pub async fn shake_hands(
    mut tls: rustls::Connection,
    pipe: &mut DuplexStream,
    secrets: &Secrets,
    client: bool,
) -> TlsSession {
    while tls.is_handshaking() || tls.wants_write() {
        while tls.wants_write() {
            let mut out = Vec::new();
            tls.write_tls(&mut out).unwrap();
            pipe.write_all(&out).await.unwrap();
        }
        if tls.is_handshaking() {
            let mut record = vec![0; 5];
            pipe.read_exact(&mut record).await.unwrap();
            let length = usize::from(u16::from_be_bytes([record[3], record[4]]));
            record.resize(5 + length, 0);
            pipe.read_exact(&mut record[5..]).await.unwrap();
            tls.read_tls(&mut &record[..]).unwrap();
            tls.process_new_packets().unwrap();
        }
    }
    let suite = tls.negotiated_cipher_suite().unwrap().suite();
    assert!(tls.reader().read(&mut [0; 1]).is_err(), "no application data yet");
    session(secrets, suite, client, 0)
}
