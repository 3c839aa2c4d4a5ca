//! Judging peers: at the handshake, and again for live tunnels when trust changes.

use std::sync::Arc;
use std::time::SystemTime;

use aws_lc_rs::digest;
use mesh_model::SpiffeId;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{WebPkiSupportedAlgorithms, verify_tls13_signature};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{DigitallySignedStruct, DistinguishedName, Error, SignatureScheme};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};
use webpki::{EndEntityCert, KeyUsage};

use crate::certificate::{MAX_CHAIN, parse, spiffe_id, system_time, unix_time, validity};
use crate::revocation::revoked;
use crate::{PeerRejection, TrustBundle, tls};

/// Which side of TLS a certificate is shown by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// The accepting side.
    Server,
    /// The dialling side.
    Client,
}

/// Who may be at the other end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Expected {
    /// One of these; what a dialling side demands. An empty list accepts nobody.
    Identities(Vec<SpiffeId>),
    /// Anybody of this trust domain; what an accepting side demands, since policy decides afterwards.
    TrustDomain(Arc<str>),
}

/// Judges the certificates of TLS peers by a [`TrustBundle`]; either side of rustls.
///
/// Names, addresses and SNI mean nothing: a peer is its SPIFFE identity.
/// Source: the algorithm of Istio's ztunnel, with exactly one URI name and revocation of whole chains.
#[derive(Debug)]
pub struct PeerVerifier {
    bundle: Arc<TrustBundle>,
    expected: Expected,
    algorithms: WebPkiSupportedAlgorithms,
}

/// The certificate a live peer proved itself by; kept so that it can be judged again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PeerCertificate {
    id: SpiffeId,
    serial: Vec<u8>,
    not_after: SystemTime,
    side: Side,
    chain: Arc<[CertificateDer<'static>]>,
}

impl PeerVerifier {
    /// For dialling: the server must be one of `expected`.
    #[must_use]
    pub fn of_server(bundle: Arc<TrustBundle>, expected: Vec<SpiffeId>) -> Arc<Self> {
        Self::new(bundle, Expected::Identities(expected))
    }

    /// For accepting: the client must be of `trust_domain`.
    #[must_use]
    pub fn of_clients(bundle: Arc<TrustBundle>, trust_domain: &str) -> Arc<Self> {
        Self::new(bundle, Expected::TrustDomain(trust_domain.into()))
    }

    fn new(bundle: Arc<TrustBundle>, expected: Expected) -> Arc<Self> {
        let algorithms = tls::provider().signature_verification_algorithms;
        Arc::new(Self { bundle, expected, algorithms })
    }

    /// Judges a presented chain, leaf first.
    ///
    /// # Errors
    /// Why the peer is refused.
    pub fn judge(
        &self,
        chain: &[CertificateDer<'_>],
        presented_by: Side,
        now: SystemTime,
    ) -> Result<SpiffeId, PeerRejection> {
        judge(chain, &self.bundle, &self.expected, presented_by, unix_time(now))
    }

    fn judge_handshake(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        presented_by: Side,
        now: UnixTime,
    ) -> Result<(), Error> {
        let mut chain = Vec::with_capacity(intermediates.len() + 1);
        chain.push(leaf.clone());
        chain.extend_from_slice(intermediates);
        judge(&chain, &self.bundle, &self.expected, presented_by, now)?;
        Ok(())
    }
}

fn judge(
    chain: &[CertificateDer<'_>],
    bundle: &TrustBundle,
    expected: &Expected,
    presented_by: Side,
    now: UnixTime,
) -> Result<SpiffeId, PeerRejection> {
    let leaf = parse(chain.first().ok_or(PeerRejection::NoCertificate)?)?;
    let id = spiffe_id(&leaf)?;
    let domain_accepted = match expected {
        Expected::Identities(_) => bundle.knows(id.trust_domain()),
        Expected::TrustDomain(domain) => **domain == *id.trust_domain(),
    };
    if !domain_accepted {
        return Err(PeerRejection::WrongTrustDomain { presented: id });
    }
    verify_chain(chain, bundle, id.trust_domain(), presented_by, now)?;
    match expected {
        Expected::Identities(identities) if !identities.contains(&id) => {
            Err(PeerRejection::WrongIdentity { presented: id })
        }
        Expected::Identities(_) | Expected::TrustDomain(_) => Ok(id),
    }
}

/// Checks signatures, dates, use and revocation of `chain` (leaf first) up to a root of `trust_domain`.
pub(crate) fn verify_chain(
    chain: &[CertificateDer<'_>],
    bundle: &TrustBundle,
    trust_domain: &str,
    presented_by: Side,
    now: UnixTime,
) -> Result<(), PeerRejection> {
    let (leaf, intermediates) = chain.split_first().ok_or(PeerRejection::NoCertificate)?;
    if chain.len() > MAX_CHAIN {
        return Err(PeerRejection::ChainTooLong);
    }
    let anchors = bundle.anchors(trust_domain, system_time(now));
    let usage = match presented_by {
        Side::Server => KeyUsage::server_auth(),
        Side::Client => KeyUsage::client_auth(),
    };
    let path = EndEntityCert::try_from(leaf).and_then(|leaf| {
        let algorithms = tls::provider().signature_verification_algorithms.all;
        leaf.verify_for_usage(algorithms, &anchors, intermediates, now, usage, None, None)
            .map(|_path| ())
    });
    // Intermediates that cannot be parsed are junk that webpki passed over, or the reason why it found no path.
    let mut parsed = vec![parse(leaf)?];
    parsed.extend(intermediates.iter().filter_map(|der| parse(der).ok()));
    path.map_err(|error| {
        let rejection = PeerRejection::from_webpki(&error);
        let by_itself = parsed[0].subject() == parsed[0].issuer();
        if rejection == PeerRejection::UnknownIssuer && by_itself {
            PeerRejection::SelfSigned
        } else {
            rejection
        }
    })?;
    match revoked(&parsed, bundle.of_domain(trust_domain), bundle.lists()) {
        Some(depth) => Err(PeerRejection::Revoked { depth }),
        None => Ok(()),
    }
}

impl PeerCertificate {
    /// Notes the chain (leaf first) that a handshake accepted from the peer on `side`.
    ///
    /// # Errors
    /// When the leaf names no identity: then no [`PeerVerifier`] accepted it.
    pub fn new(chain: &[CertificateDer<'_>], side: Side) -> Result<Self, PeerRejection> {
        let leaf = parse(chain.first().ok_or(PeerRejection::NoCertificate)?)?;
        let id = spiffe_id(&leaf)?;
        let serial = leaf.raw_serial().to_vec();
        let (_, not_after) = validity(&leaf);
        let chain = chain.iter().map(|der| der.clone().into_owned()).collect();
        Ok(Self { id, serial, not_after, side, chain })
    }

    /// Who the peer is.
    #[must_use]
    pub const fn id(&self) -> &SpiffeId {
        &self.id
    }

    /// Serial number of the leaf, big-endian.
    #[must_use]
    pub fn serial(&self) -> &[u8] {
        &self.serial
    }

    /// When the leaf expires. A live tunnel outlives it; a new handshake does not.
    #[must_use]
    pub const fn not_after(&self) -> SystemTime {
        self.not_after
    }

    /// The chain, leaf first.
    #[must_use]
    pub fn chain(&self) -> &[CertificateDer<'static>] {
        &self.chain
    }

    /// The side of TLS that showed it.
    #[must_use]
    pub const fn side(&self) -> Side {
        self.side
    }

    /// SHA-256 of each certificate, leaf first.
    pub fn fingerprints(&self) -> impl Iterator<Item = [u8; 32]> {
        self.chain.iter().map(|der| {
            let mut fingerprint = [0; 32];
            fingerprint.copy_from_slice(digest::digest(&digest::SHA256, der).as_ref());
            fingerprint
        })
    }

    /// True when `bundle` revokes the leaf or a certificate above it.
    #[must_use]
    pub fn is_revoked(&self, bundle: &TrustBundle) -> bool {
        let parsed: Vec<_> = self.chain.iter().filter_map(|der| parse(der).ok()).collect();
        revoked(&parsed, bundle.of_domain(self.id.trust_domain()), bundle.lists()).is_some()
    }

    /// Whether the peer would still be accepted at `now` under `bundle`; expiry of the leaf aside, which ends no live
    /// tunnel, since the handshake proved possession while it was valid.
    ///
    /// # Errors
    /// Why it would not.
    pub fn is_trusted(&self, bundle: &TrustBundle, now: SystemTime) -> Result<(), PeerRejection> {
        let at = unix_time(now.min(self.not_after));
        let accepted = Expected::TrustDomain(self.id.trust_domain().into());
        if !bundle.knows(self.id.trust_domain()) {
            return Err(PeerRejection::WrongTrustDomain { presented: self.id.clone() });
        }
        judge(&self.chain, bundle, &accepted, self.side, at).map(|_id| ())
    }

    /// Whether a tunnel that is up may go on at `now` under `bundle`: as [`is_trusted`](Self::is_trusted), but for a root
    /// that was given up after the leaf's end. A root's rotation ends so, and it ends no connection; a root that is given
    /// up while the leaf is good ends those of its leaves.
    ///
    /// # Errors
    /// Why it may not.
    pub fn may_go_on(&self, bundle: &TrustBundle, now: SystemTime) -> Result<(), PeerRejection> {
        match self.is_trusted(bundle, now) {
            Err(PeerRejection::UnknownIssuer)
                if now >= self.not_after && !self.is_revoked(bundle) =>
            {
                Ok(())
            }
            outcome => outcome,
        }
    }
}

impl ServerCertVerifier for PeerVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        self.judge_handshake(end_entity, intermediates, Side::Server, now)?;
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _certificate: &CertificateDer<'_>,
        _signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(PeerRejection::Unsupported.into())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, certificate, signature, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

impl ClientCertVerifier for PeerVerifier {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        // A mesh client has one certificate to show; hints would only tell strangers our roots.
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        self.judge_handshake(end_entity, intermediates, Side::Client, now)?;
        Ok(ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _certificate: &CertificateDer<'_>,
        _signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(PeerRejection::Unsupported.into())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, certificate, signature, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}
