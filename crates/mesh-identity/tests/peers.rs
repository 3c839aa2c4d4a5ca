//! Real certificates of a real authority, judged and shaken hands with.

#![expect(clippy::unwrap_used, reason = "a test's own values are valid")]

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use mesh_identity::{
    CaConfig, CaCore, InvalidAnswer, IssuedAnswer, PeerCertificate, PeerRejection, PeerVerifier,
    Side, SignError, Svid, TrustBundle, csr, tls,
};
use mesh_model::{CloseReason, SpiffeId};
use rcgen::{
    CertificateParams, ExtendedKeyUsagePurpose, Issuer, KeyPair, SanType, string::Ia5String,
};
use rustls::{ClientConnection, Connection, ServerConnection};
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;

const TTL: Duration = Duration::from_secs(3600);

/// Handshakes judge by the system's clock, so certificates are made by it too.
#[expect(clippy::disallowed_methods, reason = "rustls asks the system's clock in a handshake")]
fn now() -> SystemTime {
    SystemTime::now()
}

fn id(text: &str) -> SpiffeId {
    format!("spiffe://{text}").parse().unwrap()
}

fn cart() -> SpiffeId {
    id("cluster.local/ns/shop/sa/cart")
}

fn web() -> SpiffeId {
    id("cluster.local/ns/shop/sa/web")
}

fn ca() -> CaCore {
    CaCore::create("cluster.local", CaConfig::default(), now()).unwrap()
}

fn svid(ca: &CaCore, id: &SpiffeId) -> Svid {
    let (key, request) = csr(id).unwrap();
    let answer = ca.sign(&request, id, TTL, now()).unwrap();
    IssuedAnswer::check(&answer, id, key, now()).unwrap().svid
}

fn bundle(ca: &CaCore) -> Arc<TrustBundle> {
    let crl = ca.crl_pem(now()).unwrap();
    Arc::new(TrustBundle::from_pem("cluster.local", &ca.root_bundle_pem(), &crl).unwrap())
}

fn judge(
    svid: &Svid,
    bundle: &Arc<TrustBundle>,
    when: SystemTime,
) -> Result<SpiffeId, PeerRejection> {
    PeerVerifier::of_clients(Arc::clone(bundle), "cluster.local").judge(
        svid.chain(),
        Side::Client,
        when,
    )
}

/// A leaf as the authority's intermediate would sign it, with `change` applied.
fn odd_leaf(
    ca: &CaCore,
    change: impl FnOnce(&mut CertificateParams),
) -> Vec<CertificateDer<'static>> {
    let state = ca.state();
    let intermediate = &state.intermediates[0];
    let key = KeyPair::from_pem(&intermediate.key_pem).unwrap();
    let issuer = Issuer::from_ca_cert_pem(&intermediate.cert_pem, key).unwrap();
    let mut params = CertificateParams::default();
    params.subject_alt_names = vec![uri("spiffe://cluster.local/ns/shop/sa/cart")];
    params.not_before = (now() - TTL).into();
    params.not_after = (now() + TTL).into();
    change(&mut params);
    let leaf = params.signed_by(&KeyPair::generate().unwrap(), &issuer).unwrap();
    let above = CertificateDer::from_pem_slice(intermediate.cert_pem.as_bytes()).unwrap();
    vec![leaf.der().clone(), above]
}

fn uri(text: &str) -> SanType {
    SanType::URI(Ia5String::try_from(text).unwrap())
}

#[test]
fn each_bad_certificate_is_refused_for_its_own_reason() {
    let ca = ca();
    let trust = bundle(&ca);
    let clients = PeerVerifier::of_clients(Arc::clone(&trust), "cluster.local");
    let servers = PeerVerifier::of_server(Arc::clone(&trust), vec![web()]);
    let judge = |chain: &[CertificateDer<'_>]| clients.judge(chain, Side::Client, now());

    let good = odd_leaf(&ca, |_| {});
    assert_eq!(judge(&good), Ok(cart()));
    assert_eq!(
        servers.judge(&good, Side::Server, now()),
        Err(PeerRejection::WrongIdentity { presented: cart() })
    );
    assert_eq!(judge(&[]), Err(PeerRejection::NoCertificate));
    assert_eq!(judge(&[CertificateDer::from(vec![1, 2, 3])]), Err(PeerRejection::Malformed));
    assert_eq!(judge(&vec![good[0].clone(); 9]), Err(PeerRejection::ChainTooLong));
    assert_eq!(judge(&good[..1]), Err(PeerRejection::UnknownIssuer));

    let foreign = id("other.org/ns/shop/sa/cart");
    let other = CaCore::create("other.org", CaConfig::default(), now()).unwrap();
    assert_eq!(
        judge(svid(&other, &foreign).chain()),
        Err(PeerRejection::WrongTrustDomain { presented: foreign })
    );
    let impostor = CaCore::create("cluster.local", CaConfig::default(), now()).unwrap();
    assert_eq!(judge(svid(&impostor, &cart()).chain()), Err(PeerRejection::UnknownIssuer));

    let mut alone = CertificateParams::default();
    alone.subject_alt_names = vec![uri(cart().as_str())];
    let alone = alone.self_signed(&KeyPair::generate().unwrap()).unwrap();
    assert_eq!(judge(&[alone.der().clone()]), Err(PeerRejection::SelfSigned));

    let mut altered = good.clone();
    let mut bytes = altered[0].to_vec();
    *bytes.last_mut().unwrap() ^= 1;
    altered[0] = bytes.into();
    assert!(matches!(judge(&altered), Err(PeerRejection::BadSignature | PeerRejection::Malformed)));

    type Change = fn(&mut CertificateParams);
    let odd: [(Change, PeerRejection); 7] = [
        (|p| p.subject_alt_names.clear(), PeerRejection::NoSpiffeId),
        (|p| p.subject_alt_names = vec![uri("https://cart.shop")], PeerRejection::NoSpiffeId),
        (
            |p| p.subject_alt_names.push(uri("spiffe://cluster.local/ns/shop/sa/web")),
            PeerRejection::SeveralUriNames,
        ),
        (
            |p| {
                p.not_before = (now() - 2 * TTL).into();
                p.not_after = (now() - TTL).into();
            },
            PeerRejection::Expired,
        ),
        (
            |p| {
                p.not_before = (now() + TTL).into();
                p.not_after = (now() + 2 * TTL).into();
            },
            PeerRejection::NotYetValid,
        ),
        (
            |p| p.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth],
            PeerRejection::WrongUsage,
        ),
        (
            |p| p.extended_key_usages = vec![ExtendedKeyUsagePurpose::CodeSigning],
            PeerRejection::WrongUsage,
        ),
    ];
    for (change, reason) in odd {
        assert_eq!(judge(&odd_leaf(&ca, change)), Err(reason));
    }
}

#[test]
fn revocation_reaches_leaves_subtrees_and_live_tunnels() {
    let mut ca = ca();
    let (first, second) = (svid(&ca, &cart()), svid(&ca, &web()));
    let live = PeerCertificate::new(first.chain(), Side::Client).unwrap();
    assert_eq!(live.is_trusted(&bundle(&ca), now()), Ok(()));

    ca.revoke_leaf(first.serial(), now());
    let trust = bundle(&ca);
    assert_eq!(judge(&first, &trust, now()), Err(PeerRejection::Revoked { depth: 0 }));
    assert_eq!(judge(&second, &trust, now()), Ok(web()));
    assert!(live.is_revoked(&trust));
    assert_eq!(PeerRejection::Revoked { depth: 0 }.close_reason(), CloseReason::CertRevoked);

    let serial = ca.intermediate_serial().to_vec();
    ca.revoke_intermediate(&serial, now()).unwrap();
    let trust = bundle(&ca);
    assert_eq!(judge(&second, &trust, now()), Err(PeerRejection::Revoked { depth: 1 }));
    assert!(second.is_revoked(&trust, now()) && !second.is_revoked(&bundle(&self::ca()), now()));
    let live = PeerCertificate::new(second.chain(), Side::Client).unwrap();
    assert_eq!(
        live.may_go_on(&trust, live.not_after()),
        Err(PeerRejection::Revoked { depth: 1 }),
        "a leaf's end does not lift a revocation"
    );
    // The successor issues as if nothing had happened, also after a restart.
    let ca = CaCore::load(&ca.state(), CaConfig::default()).unwrap();
    assert_eq!(judge(&svid(&ca, &web()), &bundle(&ca), now()), Ok(web()));

    // A list of another authority revokes nothing here, even for the same serial.
    let mut other = CaCore::create("cluster.local", CaConfig::default(), now()).unwrap();
    let mine = svid(&ca, &cart());
    other.revoke_leaf(mine.serial(), now());
    let mixed = format!("{}{}", ca.crl_pem(now()).unwrap(), other.crl_pem(now()).unwrap());
    let trust =
        Arc::new(TrustBundle::from_pem("cluster.local", &ca.root_bundle_pem(), &mixed).unwrap());
    assert_eq!(judge(&mine, &trust, now()), Ok(cart()));
}

#[test]
fn root_rotation_keeps_old_and_new_peers_trusted() {
    let mut ca = ca();
    let old = svid(&ca, &cart());
    let before = bundle(&ca);
    ca.begin_root_rotation(now()).unwrap();
    let both = bundle(&ca);
    // Until activation the old root signs, so that agents with either bundle agree.
    assert_eq!(judge(&svid(&ca, &web()), &before, now()), Ok(web()));
    ca.activate_root(now()).unwrap();
    let new = svid(&ca, &web());
    assert_eq!(judge(&new, &before, now()), Err(PeerRejection::UnknownIssuer));
    for peer in [&old, &new] {
        assert_eq!(judge(peer, &both, now()).as_ref(), Ok(peer.id()));
        assert_eq!(judge(peer, &bundle(&ca), now()).as_ref(), Ok(peer.id()));
    }
    assert!(!ca.retire(now()));
    assert!(ca.retire(now() + CaConfig::default().max_ttl + TTL));
    assert_eq!(judge(&old, &bundle(&ca), now()), Err(PeerRejection::UnknownIssuer));
    assert_eq!(judge(&new, &bundle(&ca), now()), Ok(web()));
    let live = PeerCertificate::new(old.chain(), Side::Server).unwrap();
    assert_eq!(live.is_trusted(&bundle(&ca), now()), Err(PeerRejection::UnknownIssuer));
    // A tunnel that outlived its peer's leaf outlives the root as well; one whose peer's leaf is good does not.
    assert_eq!(live.may_go_on(&bundle(&ca), now()), Err(PeerRejection::UnknownIssuer));
    assert_eq!(live.may_go_on(&bundle(&ca), live.not_after()), Ok(()));
    let elsewhere = CaCore::create("other.org", CaConfig::default(), now()).unwrap();
    let foreign =
        PeerCertificate::new(svid(&elsewhere, &id("other.org/ns/a/sa/b")).chain(), Side::Server);
    let foreign = foreign.unwrap();
    assert!(matches!(
        foreign.may_go_on(&bundle(&ca), foreign.not_after()),
        Err(PeerRejection::WrongTrustDomain { .. })
    ));
}

#[test]
fn the_authority_refuses_what_it_should_and_answers_are_checked() {
    let ca = ca();
    let (key, request) = csr(&cart()).unwrap();
    let foreign = id("other.org/ns/shop/sa/cart");
    assert!(matches!(
        ca.sign(&request, &foreign, TTL, now()),
        Err(SignError::WrongTrustDomain { .. })
    ));
    // A longer life than allowed is cut to what is.
    let answer = ca.sign(&request, &cart(), Duration::MAX, now()).unwrap();
    let leaf = PeerCertificate::new(
        &[PemObject::from_pem_slice(answer[0].as_bytes()).unwrap()],
        Side::Server,
    );
    let end = leaf.unwrap().not_after();
    let longest = now() + CaConfig::default().max_ttl;
    assert!(end <= longest && end > longest - Duration::from_secs(60), "{end:?}");
    assert!(matches!(ca.sign("", &cart(), TTL, now()), Err(SignError::Malformed)));
    let mut forged = request.clone().into_bytes();
    let at = forged.len() - 60;
    forged[at] = if forged[at] == b'A' { b'B' } else { b'A' };
    assert!(ca.sign(&String::from_utf8(forged).unwrap(), &cart(), TTL, now()).is_err());

    let answer = ca.sign(&request, &cart(), TTL, now()).unwrap();
    let check = |answer: &[String], id: &SpiffeId, when| {
        let (other, _) = csr(&cart()).unwrap();
        IssuedAnswer::check(answer, id, other, when).unwrap_err()
    };
    assert!(matches!(check(&[], &cart(), now()), InvalidAnswer::TooShort { elements: 0 }));
    assert!(matches!(check(&answer[..1], &cart(), now()), InvalidAnswer::TooShort { elements: 1 }));
    assert!(matches!(check(&answer, &web(), now()), InvalidAnswer::WrongIdentity { .. }));
    assert!(matches!(check(&answer, &cart(), now()), InvalidAnswer::WrongKey(_)));
    let late = IssuedAnswer::check(&answer, &cart(), key, now() + 2 * TTL).unwrap_err();
    assert!(matches!(late, InvalidAnswer::Expired));
}

/// Runs both ends in memory until neither has anything to say.
fn shake(client: &mut Connection, server: &mut Connection) -> Result<(), rustls::Error> {
    loop {
        let mut moved = false;
        for forward in [true, false] {
            let (from, to) =
                if forward { (&mut *client, &mut *server) } else { (&mut *server, &mut *client) };
            let mut bytes = Vec::new();
            while from.wants_write() {
                from.write_tls(&mut bytes).unwrap();
            }
            let mut rest = bytes.as_slice();
            while !rest.is_empty() {
                moved = true;
                to.read_tls(&mut rest).unwrap();
                to.process_new_packets()?;
            }
        }
        if !moved {
            return Ok(());
        }
    }
}

fn connect(
    client: rustls::ClientConfig,
    server: rustls::ServerConfig,
) -> (Result<(), rustls::Error>, Connection, Connection) {
    let name = rustls_pki_types::ServerName::try_from("culvert.invalid").unwrap();
    let mut client: Connection = ClientConnection::new(Arc::new(client), name).unwrap().into();
    let mut server: Connection = ServerConnection::new(Arc::new(server)).unwrap().into();
    let outcome = shake(&mut client, &mut server);
    (outcome, client, server)
}

#[test]
fn workloads_shake_hands_under_their_identities() {
    let ca = ca();
    let trust = bundle(&ca);
    let (cart_svid, web_svid) = (svid(&ca, &cart()), svid(&ca, &web()));
    let (outcome, client, server) = connect(
        tls::client(&web_svid, Arc::clone(&trust), vec![cart()]),
        tls::server(&cart_svid, Arc::clone(&trust)),
    );
    outcome.unwrap();
    for end in [&client, &server] {
        assert!(!end.is_handshaking());
        assert_eq!(end.alpn_protocol(), Some(tls::ALPN));
        assert_eq!(
            end.negotiated_cipher_suite().unwrap().suite(),
            rustls::CipherSuite::TLS13_AES_128_GCM_SHA256
        );
        assert_eq!(
            end.negotiated_key_exchange_group().unwrap().name(),
            rustls::NamedGroup::X25519MLKEM768
        );
    }
    let peer = PeerCertificate::new(server.peer_certificates().unwrap(), Side::Client).unwrap();
    assert_eq!((peer.id(), peer.serial()), (&web(), web_svid.serial()));
    assert_eq!(peer.fingerprints().count(), 2);
}

#[test]
fn a_refused_handshake_tells_its_reason() {
    let mut ca = ca();
    let trust = bundle(&ca);
    let (cart_svid, web_svid) = (svid(&ca, &cart()), svid(&ca, &web()));
    let rejection = |client, server| {
        let (outcome, ..) = connect(client, server);
        PeerRejection::from_rustls(&outcome.unwrap_err()).unwrap()
    };
    assert_eq!(
        rejection(
            tls::client(&web_svid, Arc::clone(&trust), vec![web()]),
            tls::server(&cart_svid, Arc::clone(&trust)),
        ),
        PeerRejection::WrongIdentity { presented: cart() }
    );
    ca.revoke_leaf(web_svid.serial(), now());
    assert_eq!(
        rejection(
            tls::client(&web_svid, Arc::clone(&trust), vec![cart()]),
            tls::server(&cart_svid, bundle(&ca)),
        ),
        PeerRejection::Revoked { depth: 0 }
    );
    let mut anonymous = tls::control_client(&ca.root_bundle_pem()).unwrap();
    anonymous
        .dangerous()
        .set_certificate_verifier(PeerVerifier::of_server(Arc::clone(&trust), vec![cart()]));
    assert_eq!(rejection(anonymous, tls::server(&cart_svid, trust)), PeerRejection::NoCertificate);
}

#[test]
fn the_control_plane_is_known_by_its_name() {
    let ca = ca();
    let names = ["controller.example".to_owned(), "127.0.0.1".to_owned()];
    let identity = Arc::new(ca.issue_server(&names, TTL, now()).unwrap());
    for (name, accepted) in [("controller.example", true), ("127.0.0.1", true), ("other", false)] {
        let config = Arc::new(tls::control_client(&ca.root_bundle_pem()).unwrap());
        let name = rustls_pki_types::ServerName::try_from(name).unwrap();
        let mut client: Connection = ClientConnection::new(config, name).unwrap().into();
        let server = Arc::new(tls::control_server(Arc::clone(&identity)));
        let mut server: Connection = ServerConnection::new(server).unwrap().into();
        assert_eq!(shake(&mut client, &mut server).is_ok(), accepted);
    }
    assert!(tls::control_client("").is_err());
}
