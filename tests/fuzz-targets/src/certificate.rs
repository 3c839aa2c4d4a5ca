//! Certificates, revocation lists, signing requests and the CA's answers.

use std::sync::{Arc, LazyLock};
use std::time::Duration;

use aws_lc_rs::digest::{SHA256, digest};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use mesh_identity::{
    CaConfig, CaCore, IssuedAnswer, KEPT_BYTES, KeptRecord, PeerCertificate, PeerVerifier, Side,
    Svid, TrustBundle,
};
use rustls_pki_types::CertificateDer;

use crate::fixture::{self, CRL, CSR, INTERMEDIATE, LEAF, ROOTS, der};
use crate::input::{Input, long};

static BUNDLE: LazyLock<Arc<TrustBundle>> = LazyLock::new(|| {
    Arc::new(TrustBundle::from_pem("cluster.local", ROOTS, "").expect("good roots"))
});
static REVOKING: LazyLock<TrustBundle> =
    LazyLock::new(|| TrustBundle::from_pem("cluster.local", ROOTS, CRL).expect("good roots"));
static AUTHORITY: LazyLock<CaCore> = LazyLock::new(|| {
    CaCore::create("cluster.local", CaConfig::default(), fixture::now()).expect("an authority")
});

/// A chain as a peer presents it, leaf first: accepted is only the one that the root's keys signed.
pub fn chain(data: &[u8]) {
    let mut input = Input::new(data);
    let options = input.byte();
    let mut presented = Vec::new();
    while !input.is_empty() && presented.len() < 12 {
        presented.push(CertificateDer::from(input.long().to_vec()));
    }
    if options & 1 == 1 {
        presented.push(der(INTERMEDIATE));
    }
    let side = if options & 2 == 0 { Side::Client } else { Side::Server };
    let verifier = PeerVerifier::of_clients(Arc::clone(&BUNDLE), "cluster.local");
    let accepted = verifier.judge(&presented, side, fixture::now());
    let is_ours = presented.first().is_some_and(|leaf| *leaf == der(LEAF));
    match &accepted {
        Ok(id) => {
            assert!(is_ours, "a leaf nobody signed");
            assert_eq!(*id, fixture::id());
        }
        Err(rejection) => assert!(!rejection.to_string().is_empty()),
    }
    if let Ok(certificate) = PeerCertificate::new(&presented, side) {
        let trusted = certificate.is_trusted(&REVOKING, fixture::now());
        assert!(trusted.is_err(), "revoked or never signed");
        assert!(accepted.is_err() || certificate.is_revoked(&REVOKING));
        assert_eq!(certificate.fingerprints().count(), presented.len());
    }
}

pub(crate) fn chain_seeds() -> Vec<Vec<u8>> {
    vec![
        [vec![1], long(&der(LEAF))].concat(),
        [vec![2], long(&der(LEAF)), long(&der(INTERMEDIATE))].concat(),
        [vec![0], long(&der(ROOTS))].concat(),
    ]
}

/// Roots and revocation lists as text of the controller.
pub fn trust_bundle(data: &[u8]) {
    let mut input = Input::new(data);
    let roots = String::from_utf8_lossy(input.long()).into_owned();
    let lists = String::from_utf8_lossy(input.rest()).into_owned();
    let Ok(bundle) = TrustBundle::from_pem("cluster.local", &roots, &lists) else { return };
    assert!(bundle.knows("cluster.local"));
    let count = bundle.roots("cluster.local").count();
    assert!((1..=64).contains(&count));
    let again = bundle.clone().with_domain("cluster.local", &roots).expect("as before");
    assert_eq!(again, bundle, "roots were repeated");
    let bundle = Arc::new(bundle);
    let verifier = PeerVerifier::of_server(bundle, vec![fixture::id()]);
    drop(verifier.judge(&[der(LEAF), der(INTERMEDIATE)], Side::Server, fixture::now()));
}

pub(crate) fn trust_bundle_seeds() -> Vec<Vec<u8>> {
    vec![
        [long(ROOTS.as_bytes()), CRL.as_bytes().to_vec()].concat(),
        [long([ROOTS, ROOTS].concat().as_bytes()), Vec::new()].concat(),
        long(LEAF.as_bytes()),
    ]
}

/// A revocation list's own bytes.
pub fn revocation_list(data: &[u8]) {
    let lists = pem("X509 CRL", data);
    let Ok(bundle) = TrustBundle::from_pem("cluster.local", ROOTS, &lists) else { return };
    let chain = [der(LEAF), der(INTERMEDIATE)];
    let certificate =
        PeerCertificate::new(&chain, Side::Client).expect("the leaf names an identity");
    if certificate.is_revoked(&bundle) {
        assert_eq!(lists.lines().count(), CRL.lines().count(), "revoked by a list nobody signed");
    }
}

pub(crate) fn revocation_list_seeds() -> Vec<Vec<u8>> {
    vec![unpem(CRL)]
}

/// A signing request: what the CA signs, the requester can use under the identity it is entitled to and no other.
pub fn csr(data: &[u8]) {
    let mut input = Input::new(data);
    let text = if input.byte() & 1 == 0 {
        pem("CERTIFICATE REQUEST", input.rest())
    } else {
        String::from_utf8_lossy(input.rest()).into_owned()
    };
    let ttl = Duration::from_secs(600);
    let Ok(answer) = AUTHORITY.sign(&text, &fixture::id(), ttl, fixture::now()) else { return };
    let chain: Vec<_> = answer[..answer.len() - 1].iter().map(|pem| der(pem)).collect();
    let bundle = TrustBundle::from_pem("cluster.local", &AUTHORITY.root_bundle_pem(), "");
    let bundle = Arc::new(bundle.expect("the authority's own roots"));
    let verifier = PeerVerifier::of_clients(bundle, "cluster.local");
    assert_eq!(verifier.judge(&chain, Side::Client, fixture::now()), Ok(fixture::id()));
}

pub(crate) fn csr_seeds() -> Vec<Vec<u8>> {
    vec![[vec![0], unpem(CSR)].concat(), [vec![1], CSR.as_bytes().to_vec()].concat()]
}

/// A CA's answer to an agent: taken is only a chain for the key and identity that were asked for.
pub fn answer(data: &[u8]) {
    let mut input = Input::new(data);
    let options = input.byte();
    let mut elements = Vec::new();
    while !input.is_empty() && elements.len() < 12 {
        elements.push(String::from_utf8_lossy(input.long()).into_owned());
    }
    if options & 1 == 1 {
        elements.push(ROOTS.to_owned());
    }
    let Ok(issued) = IssuedAnswer::check(&elements, &fixture::id(), fixture::key(), fixture::now())
    else {
        return;
    };
    assert_eq!(*issued.svid.id(), fixture::id());
    assert_eq!(issued.svid.chain()[0], der(LEAF), "a leaf that was not asked for");
    assert!(issued.svid.is_usable(fixture::now()));
}

pub(crate) fn answer_seeds() -> Vec<Vec<u8>> {
    let whole =
        [vec![0], long(LEAF.as_bytes()), long(INTERMEDIATE.as_bytes()), long(ROOTS.as_bytes())];
    vec![
        whole.concat(),
        [vec![1], long(LEAF.as_bytes()), long(INTERMEDIATE.as_bytes())].concat(),
        [vec![1], long(INTERMEDIATE.as_bytes())].concat(),
    ]
}

/// A certificate with its key as an earlier process kept it: what is read is written back the same, and one that was damaged
/// is refused.
pub fn kept(data: &[u8]) {
    let mut input = Input::new(data);
    let sealed = input.byte() & 1 == 1;
    let content = input.rest();
    let mut record = KeptRecord::empty();
    let bytes = record.bytes_mut();
    let used = if sealed {
        // With a checksum that fits, so that the fields are looked at.
        let content = &content[..content.len().min(KEPT_BYTES - 36)];
        let length = u32::try_from(content.len()).expect("shorter than a record");
        bytes[..4].copy_from_slice(&length.to_le_bytes());
        bytes[4..36].copy_from_slice(digest(&SHA256, content).as_ref());
        bytes[36..36 + content.len()].copy_from_slice(content);
        36 + content.len()
    } else {
        let length = content.len().min(KEPT_BYTES);
        bytes[..length].copy_from_slice(&content[..length]);
        length
    };
    let Ok(Some(svid)) = record.read() else { return };
    let mut again = KeptRecord::empty();
    again.write(&svid).expect("it was in a record before");
    if sealed {
        assert_eq!(again.bytes()[..used], record.bytes()[..used]);
    }
    if svid.is_accepted(&BUNDLE, fixture::now()).is_ok() {
        assert_eq!(*svid.id(), fixture::id());
        assert_eq!(svid.chain()[0], der(LEAF), "a leaf nobody signed");
    }
}

pub(crate) fn kept_seeds() -> Vec<Vec<u8>> {
    let chain = vec![der(LEAF), der(INTERMEDIATE)];
    let svid = Svid::handed_over(chain, fixture::key()).expect("the fixture's own");
    let mut record = KeptRecord::empty();
    record.write(&svid).expect("it fits");
    let length = record.bytes().iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1);
    let whole = &record.bytes()[..length];
    vec![[&[0], whole].concat(), [&[1], &whole[36..]].concat(), vec![1]]
}

fn pem(label: &str, der: &[u8]) -> String {
    let text = STANDARD.encode(der);
    let mut lines = vec![format!("-----BEGIN {label}-----")];
    lines.extend(text.as_bytes().chunks(64).map(|line| String::from_utf8_lossy(line).into_owned()));
    lines.push(format!("-----END {label}-----\n"));
    lines.join("\n")
}

fn unpem(pem: &str) -> Vec<u8> {
    let text: String = pem.lines().filter(|line| !line.starts_with('-')).collect();
    STANDARD.decode(text).expect("PEM")
}
