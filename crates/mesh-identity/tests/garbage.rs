//! Damaged certificates, lists, requests, answers and tokens: refused, never a panic, and never taken for what they
//! were before.

#![expect(clippy::unwrap_used, reason = "a test's own values are valid")]

use std::collections::BTreeMap;
use std::sync::{Arc, LazyLock};
use std::time::{Duration, SystemTime};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use mesh_identity::{
    CaConfig, CaCore, CsrKey, IssuedAnswer, JoinTokens, NodeName, PeerVerifier, SessionTokens,
    Side, TokenKey, TrustBundle, csr,
};
use mesh_model::SpiffeId;
use proptest::prelude::*;
use proptest::sample::Index;
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{
    CertificateDer, CertificateRevocationListDer, CertificateSigningRequestDer,
};
use zeroize::Zeroizing;

const DOMAIN: &str = "cluster.local";
const HOUR: Duration = Duration::from_secs(3600);
/// The end of a certificate without an end. Source: RFC 5280 §4.1.2.5.
const END_OF_TIME: Duration = Duration::from_secs(253_402_300_799);

/// One of everything that is parsed, in order.
struct Good {
    ca: CaCore,
    id: SpiffeId,
    key: Vec<u8>,
    request: Vec<u8>,
    answer: Vec<String>,
    list: Vec<u8>,
    bundle: Arc<TrustBundle>,
}

static GOOD: LazyLock<Good> = LazyLock::new(|| {
    let id: SpiffeId = "spiffe://cluster.local/ns/shop/sa/cart".parse().unwrap();
    let mut ca = CaCore::create(DOMAIN, CaConfig::default(), now()).unwrap();
    ca.revoke_leaf(&[1, 2, 3], now());
    let (key, request) = csr(&id).unwrap();
    let answer = ca.sign(&request, &id, HOUR, now()).unwrap();
    let svid = IssuedAnswer::check(&answer, &id, key, now()).unwrap().svid;
    let crl_pem = ca.crl_pem(now()).unwrap();
    let bundle = TrustBundle::from_pem(DOMAIN, &ca.root_bundle_pem(), &crl_pem).unwrap();
    Good {
        key: svid.key().to_pkcs8().to_vec(),
        request: CertificateSigningRequestDer::from_pem_slice(request.as_bytes()).unwrap().to_vec(),
        list: CertificateRevocationListDer::from_pem_slice(crl_pem.as_bytes()).unwrap().to_vec(),
        bundle: Arc::new(bundle),
        ca,
        id,
        answer,
    }
});

fn now() -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000)
}

fn node() -> NodeName {
    "node-a".parse().unwrap()
}

fn pem(label: &str, der: &[u8]) -> String {
    format!("-----BEGIN {label}-----\n{}\n-----END {label}-----\n", STANDARD.encode(der))
}

fn der(pem: &str) -> Vec<u8> {
    CertificateDer::from_pem_slice(pem.as_bytes()).unwrap().to_vec()
}

/// Changes a byte, flips a bit, cuts one out, puts one in, or cuts the rest off.
type Damage = Vec<(Index, u8, u8)>;

fn any_damage() -> impl Strategy<Value = Damage> {
    prop::collection::vec((any::<Index>(), 0u8..5, any::<u8>()), 1..4)
}

fn damage(good: &[u8], damage: &Damage) -> Vec<u8> {
    let mut bytes = good.to_vec();
    for (at, kind, value) in damage {
        if bytes.is_empty() {
            break;
        }
        let at = at.index(bytes.len());
        match kind {
            0 => bytes[at] = *value,
            1 => bytes[at] ^= 1 << (value % 8),
            2 => drop(bytes.remove(at)),
            3 => bytes.insert(at, *value),
            _ => bytes.truncate(at),
        }
    }
    bytes
}

/// The signed part of a signing request: the first element of the outer sequence (RFC 2986 §4).
fn requested(request: &[u8]) -> &[u8] {
    let header = |der: &[u8]| 2 + if der[1] & 0x80 == 0 { 0 } else { usize::from(der[1] & 0x7f) };
    let inner = &request[header(request)..];
    let digits = &inner[2..header(inner)];
    let length = digits.iter().fold(0, |length, digit| length << 8 | usize::from(*digit));
    let length = if digits.is_empty() { usize::from(inner[1]) } else { length };
    &inner[..header(inner) + length]
}

/// Everything that takes PEM.
fn take_pem(text: &str) {
    let good = &*GOOD;
    drop(TrustBundle::from_pem(DOMAIN, text, ""));
    drop(TrustBundle::default().with_revocations(text));
    drop(good.ca.sign(text, &good.id, HOUR, now()));
    for position in 0..good.answer.len() {
        let mut answer = good.answer.clone();
        answer[position] = text.to_owned();
        drop(IssuedAnswer::check(&answer, &good.id, key(), now()));
    }
}

fn key() -> CsrKey {
    CsrKey::from_pkcs8(Zeroizing::new(GOOD.key.clone()))
}

/// Judged by a bundle with a revocation list, at several times.
fn judge(chain: &[CertificateDer<'_>]) -> bool {
    let clients = PeerVerifier::of_clients(Arc::clone(&GOOD.bundle), DOMAIN);
    let times = [SystemTime::UNIX_EPOCH, SystemTime::UNIX_EPOCH + END_OF_TIME];
    for time in times {
        assert!(clients.judge(chain, Side::Client, time).is_err());
    }
    clients.judge(chain, Side::Client, now()).is_ok()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]

    #[test]
    fn certificates(of: Index, how in any_damage()) {
        let good: Vec<_> = GOOD.answer[..2].iter().map(|pem| der(pem)).collect();
        let mut bad = good.clone();
        let of = of.index(2);
        bad[of] = damage(&good[of], &how);
        let chain: Vec<_> = bad.iter().cloned().map(CertificateDer::from).collect();
        prop_assert_eq!(judge(&chain), bad == good);
        // As a root nothing but its signature is unprotected; it must not crash.
        take_pem(&pem("CERTIFICATE", &bad[of]));
    }

    #[test]
    fn revocation_lists(how in any_damage()) {
        let bad = damage(&GOOD.list, &how);
        if let Ok(bundle) = GOOD.bundle.as_ref().clone().with_revocations(&pem("X509 CRL", &bad)) {
            let chain: Vec<_> = GOOD.answer[..2].iter().map(|pem| der(pem).into()).collect();
            let clients = PeerVerifier::of_clients(Arc::new(bundle), DOMAIN);
            // A list that is not its issuer's any more revokes nobody.
            prop_assert!(clients.judge(&chain, Side::Client, now()).is_ok());
        }
    }

    #[test]
    fn signing_requests(how in any_damage()) {
        let bad = damage(&GOOD.request, &how);
        let text = pem("CERTIFICATE REQUEST", &bad);
        let signed = GOOD.ca.sign(&text, &GOOD.id, HOUR, now()).is_ok();
        // The signature covers what is requested, not the wrapper around it: there a parser may be lenient.
        let requested = requested(&GOOD.request);
        let intact = bad.windows(requested.len()).any(|window| window == requested);
        prop_assert!(signed || bad != GOOD.request, "a good request is refused");
        prop_assert!(intact || !signed, "a forged request is signed");
    }

    #[test]
    fn answers(of: Index, how in any_damage()) {
        let of = of.index(2);
        let mut answer = GOOD.answer.clone();
        let good = der(&answer[of]);
        let bad = damage(&good, &how);
        answer[of] = pem("CERTIFICATE", &bad);
        let taken = IssuedAnswer::check(&answer, &GOOD.id, key(), now()).is_ok();
        prop_assert_eq!(taken, bad == good);
    }

    #[test]
    fn roots_of_answers(how in any_damage()) {
        let mut answer = GOOD.answer.clone();
        let root = damage(&der(&answer[2]), &how);
        answer[2] = pem("CERTIFICATE", &root);
        drop(IssuedAnswer::check(&answer, &GOOD.id, key(), now()));
    }

    #[test]
    fn damaged_text(of in 0usize..3, how in any_damage()) {
        let bad = damage(GOOD.answer[of].as_bytes(), &how);
        take_pem(&String::from_utf8_lossy(&bad));
    }

    #[test]
    fn random_bytes(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        judge(&[CertificateDer::from(bytes.as_slice())]);
        for label in ["CERTIFICATE", "X509 CRL", "CERTIFICATE REQUEST"] {
            take_pem(&pem(label, &bytes));
        }
        take_pem(&String::from_utf8_lossy(&bytes));
    }

    #[test]
    fn stored_authorities(how in any_damage(), which in 0usize..4) {
        let mut state = GOOD.ca.state();
        let text = match which {
            0 => &mut state.roots[0].cert_pem,
            1 => &mut state.intermediates[0].cert_pem,
            2 => &mut *state.roots[0].key_pem,
            _ => &mut *state.intermediates[0].key_pem,
        };
        *text = String::from_utf8_lossy(&damage(text.as_bytes(), &how)).into_owned();
        if let Ok(ca) = CaCore::load(&state, CaConfig::default()) {
            drop(ca.state());
        }
    }

    #[test]
    fn tokens(how in any_damage(), noise in ".{0,100}") {
        let mut joins = JoinTokens::new(TokenKey::new([7; 32]), BTreeMap::new());
        let sessions = SessionTokens::new(TokenKey::new([7; 32]));
        let join = joins.issue(&node(), HOUR, now()).unwrap();
        let (session, _) = sessions.issue(&node(), HOUR, now()).unwrap();
        let bad = |good: &str| {
            String::from_utf8_lossy(&damage(good.as_bytes(), &how)).into_owned()
        };
        let (bad_join, bad_session) = (bad(&join), bad(&session));
        prop_assert_eq!(joins.spend(&bad_join, &node(), now()).is_ok(), bad_join == *join);
        prop_assert_eq!(sessions.verify(&bad_session, now()).is_ok(), bad_session == *session);
        for text in [noise.clone(), format!("culvert1.{noise}"), format!("culvert1.{noise}.YQ")] {
            prop_assert!(joins.spend(&text, &node(), now()).is_err());
            prop_assert!(sessions.verify(&text, now()).is_err());
        }
        if let Ok(name) = noise.parse::<NodeName>() {
            prop_assert_eq!(name.as_str(), noise);
        }
    }
}
