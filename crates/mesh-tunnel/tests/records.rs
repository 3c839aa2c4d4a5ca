//! The record layer against RFC 8448's vectors, and against the keys that rustls extracts, in every suite.
#![expect(clippy::unwrap_used, reason = "a test's own values are valid")]

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use mesh_tunnel::wire::{ContentType, HEADER, RecordError, RecordKey, TAIL, record_len};
use mesh_tunnel::{Suite, TrafficSecret};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ConnectionTrafficSecrets, crypto::cipher::AeadKey};

fn hex(text: &str) -> Vec<u8> {
    let digits: Vec<u8> = text.bytes().filter(|b| !b.is_ascii_whitespace()).collect();
    digits
        .chunks(2)
        .map(|pair| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap())
        .collect()
}

fn seal(key: &mut RecordKey, content_type: ContentType, text: &[u8]) -> Vec<u8> {
    let mut record = vec![0; HEADER + text.len() + TAIL];
    record[HEADER..HEADER + text.len()].copy_from_slice(text);
    key.seal(&mut record, content_type);
    record
}

/// Source: RFC 8448 §3, application data and close_notify of both sides.
#[test]
fn the_rfc_records_are_sealed_and_opened() {
    let client = hex("9e40646ce79a7f9dc05af8889bce6552875afa0b06df0087f792ebb7c17504a5");
    let server = hex("a11af9f05531f856ad47116b45a950328204b4f44bfb6b3a4b4f1f3fcb631643");
    let data: Vec<u8> = (0..50).collect();
    let cases = [
        (
            &client,
            0,
            ContentType::ApplicationData,
            &data[..],
            "17030300 43a23f70 54b62c94 d0affafe 8228ba55 cbefacea 42f914aa 66bcab3f 2b9819a8 a5b46b39 5bd54a9a \
             20441e2b 62974e1f 5a6292a2 977014bd 1e3deae6 3aeebb21 694915e4",
        ),
        (
            &client,
            1,
            ContentType::Alert,
            &[1, 0],
            "17030300 13c98727 60655666 b74d7ff1 153efd6d b6d0b0e3",
        ),
        (
            &server,
            1,
            ContentType::ApplicationData,
            &data[..],
            "17030300 432e937e 11ef4ac7 40e538ad 36005fc4 a46932fc 3225d05f 82aa1b36 e30efaf9 7d90e6df fc602dcb \
             501a59a8 fcc49c4b f2e5f0a2 1c0047c2 abf33254 0dd032e1 67c2955d",
        ),
        (
            &server,
            2,
            ContentType::Alert,
            &[1, 0],
            "17030300 13b58fd6 7166ebf5 99d24720 cfbe7efa 7a8864a9",
        ),
    ];
    for (secret, seq, content_type, text, expected) in cases {
        let secret = TrafficSecret::new(Suite::Aes128Gcm, secret).unwrap();
        let mut sealer = RecordKey::new(Suite::Aes128Gcm, secret.clone(), seq);
        let mut record = seal(&mut sealer, content_type, text);
        assert_eq!(record, hex(expected));
        assert_eq!(record_len(&record), Ok(Some(record.len())));
        let mut opener = RecordKey::new(Suite::Aes128Gcm, secret, seq);
        assert_eq!(opener.open(&mut record), Ok((content_type, text.len())));
        assert_eq!(&record[HEADER..HEADER + text.len()], text);
    }
}

#[test]
fn no_byte_of_a_record_may_be_changed_and_no_record_replayed() {
    let secret = TrafficSecret::new(Suite::Aes128Gcm, &[7; 32]).unwrap();
    let key = || RecordKey::new(Suite::Aes128Gcm, secret.clone(), 0);
    let record = seal(&mut key(), ContentType::ApplicationData, b"hello");
    for at in 0..record.len() {
        let mut broken = record.clone();
        broken[at] ^= 1;
        assert_eq!(key().open(&mut broken), Err(RecordError::BadMac), "byte {at}");
    }
    let mut opener = key();
    assert!(opener.open(&mut record.clone()).is_ok());
    assert_eq!(opener.open(&mut record.clone()), Err(RecordError::BadMac));
}

#[test]
fn a_renewed_key_opens_only_what_the_renewed_sealed() {
    for suite in [Suite::Aes128Gcm, Suite::Aes256Gcm, Suite::Chacha20Poly1305] {
        let secret = TrafficSecret::new(suite, &vec![3; suite.secret_len()]).unwrap();
        let mut sealer = RecordKey::new(suite, secret.clone(), 5);
        let mut opener = RecordKey::new(suite, secret, 5);
        sealer.renew();
        assert_eq!((sealer.seq(), sealer.generation()), (0, 1));
        let record = seal(&mut sealer, ContentType::ApplicationData, b"next");
        assert!(opener.open(&mut record.clone()).is_err());
        opener.renew();
        assert!(opener.open(&mut record.clone()).is_ok());
    }
}

#[derive(Debug, Default)]
struct Secrets(Mutex<BTreeMap<String, Vec<u8>>>);

impl rustls::KeyLog for Secrets {
    fn log(&self, label: &str, _random: &[u8], secret: &[u8]) {
        self.0.lock().unwrap().insert(label.to_owned(), secret.to_vec());
    }
}

/// A handshake in memory; the client's logged secrets and what rustls extracts for its sending side.
fn handshake(
    suite: rustls::SupportedCipherSuite,
) -> (BTreeMap<String, Vec<u8>>, u64, ConnectionTrafficSecrets) {
    let rcgen::CertifiedKey { cert, signing_key } =
        rcgen::generate_simple_self_signed(vec!["mesh".into()]).unwrap();
    let chain = vec![CertificateDer::from(cert.der().to_vec())];
    let mut roots = rustls::RootCertStore::empty();
    roots.add(chain[0].clone()).unwrap();
    let mut provider = rustls::crypto::aws_lc_rs::default_provider();
    provider.cipher_suites = vec![suite];
    let provider = Arc::new(provider);
    let tls13 = &[&rustls::version::TLS13];
    let mut client = rustls::ClientConfig::builder_with_provider(provider.clone())
        .with_protocol_versions(tls13)
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let secrets = Arc::new(Secrets::default());
    client.key_log = secrets.clone();
    client.enable_secret_extraction = true;
    let server = rustls::ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(tls13)
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(chain, PrivateKeyDer::Pkcs8(signing_key.serialize_der().into()))
        .unwrap();
    let name = ServerName::try_from("mesh").unwrap();
    let mut client = rustls::ClientConnection::new(Arc::new(client), name).unwrap();
    let mut server = rustls::ServerConnection::new(Arc::new(server)).unwrap();
    while client.is_handshaking() || server.is_handshaking() {
        let mut wire = Vec::new();
        client.write_tls(&mut wire).unwrap();
        server.read_tls(&mut &wire[..]).unwrap();
        server.process_new_packets().unwrap();
        wire.clear();
        server.write_tls(&mut wire).unwrap();
        client.read_tls(&mut &wire[..]).unwrap();
        client.process_new_packets().unwrap();
    }
    let mut rest = Vec::new();
    while client.wants_write() {
        client.write_tls(&mut rest).unwrap();
    }
    let (seq, extracted) = client.dangerous_extract_secrets().unwrap().tx;
    let logged = secrets.0.lock().unwrap().clone();
    (logged, seq, extracted)
}

#[test]
fn keys_are_those_that_rustls_extracts() {
    use aws_lc_rs::aead;
    use rustls::crypto::aws_lc_rs::cipher_suite as suites;
    for (suite, theirs, algorithm) in [
        (Suite::Aes128Gcm, suites::TLS13_AES_128_GCM_SHA256, &aead::AES_128_GCM),
        (Suite::Aes256Gcm, suites::TLS13_AES_256_GCM_SHA384, &aead::AES_256_GCM),
        (Suite::Chacha20Poly1305, suites::TLS13_CHACHA20_POLY1305_SHA256, &aead::CHACHA20_POLY1305),
    ] {
        let (logged, seq, extracted) = handshake(theirs);
        let (key, iv): (AeadKey, _) = match extracted {
            ConnectionTrafficSecrets::Aes128Gcm { key, iv }
            | ConnectionTrafficSecrets::Aes256Gcm { key, iv }
            | ConnectionTrafficSecrets::Chacha20Poly1305 { key, iv } => (key, iv),
            _ => panic!("a suite that was not offered"),
        };
        let secret = TrafficSecret::new(suite, &logged["CLIENT_TRAFFIC_SECRET_0"]).unwrap();
        let mut ours = RecordKey::new(suite, secret, seq);
        let mut record = seal(&mut ours, ContentType::ApplicationData, b"under whose key?");
        let mut nonce: [u8; 12] = iv.as_ref().try_into().unwrap();
        for (byte, count) in nonce[4..].iter_mut().zip(seq.to_be_bytes()) {
            *byte ^= count;
        }
        let (header, body) = record.split_at_mut(HEADER);
        let key = aead::LessSafeKey::new(aead::UnboundKey::new(algorithm, key.as_ref()).unwrap());
        let nonce = aead::Nonce::assume_unique_for_key(nonce);
        let text = key.open_in_place(nonce, aead::Aad::from(&*header), body).unwrap();
        assert_eq!(text, b"under whose key?\x17");
    }
}
