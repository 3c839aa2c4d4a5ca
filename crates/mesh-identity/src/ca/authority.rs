//! One certificate with the key that signs under it.

use std::fmt;
use std::time::{Duration, SystemTime};

use aws_lc_rs::hmac;
use rcgen::{
    BasicConstraints, Certificate, CertificateParams, CertificateRevocationListParams, IsCa,
    Issuer, KeyIdMethod, KeyPair, KeyUsagePurpose, PKCS_ECDSA_P256_SHA256, PublicKeyData,
    RevocationReason, RevokedCertParams, SerialNumber,
};
use rustls_pki_types::CertificateDer;
use zeroize::{Zeroize, Zeroizing};

use super::{AuthorityState, BACKDATE, CaError, RevocationState, authority_name, certificate};
use crate::certificate::{parse, validity};

/// Bytes of a serial number; 20 is the most allowed. Source: RFC 5280 §4.1.2.2.
const SERIAL_BYTES: usize = 20;
/// How much of a leaf's serial is a tag: to hit it by accident is one chance in 2^64.
const SERIAL_TAG_BYTES: usize = 8;

pub(super) struct Authority {
    cert_pem: String,
    der: CertificateDer<'static>,
    serial: Vec<u8>,
    not_after: SystemTime,
    key_pem: Zeroizing<String>,
    issuer: Issuer<'static, WipedKey>,
    over_at: Option<SystemTime>,
    revoked: Vec<Revocation>,
}

#[derive(Clone, Debug)]
pub(super) struct Revocation(RevocationState);

/// A key pair that is wiped when dropped; rcgen's own is not.
struct WipedKey(KeyPair);

impl Drop for WipedKey {
    fn drop(&mut self) {
        self.0.zeroize();
    }
}

impl PublicKeyData for WipedKey {
    fn der_bytes(&self) -> &[u8] {
        self.0.der_bytes()
    }

    fn algorithm(&self) -> &'static rcgen::SignatureAlgorithm {
        PublicKeyData::algorithm(&self.0)
    }
}

impl rcgen::SigningKey for WipedKey {
    fn sign(&self, message: &[u8]) -> Result<Vec<u8>, rcgen::Error> {
        rcgen::SigningKey::sign(&self.0, message)
    }
}

impl Revocation {
    pub(super) fn new(serial: &[u8], at: SystemTime) -> Self {
        Self(RevocationState { serial: serial.to_vec(), at })
    }
}

impl Authority {
    pub(super) fn root(
        trust_domain: &str,
        ttl: Duration,
        now: SystemTime,
    ) -> Result<Self, CaError> {
        let key = WipedKey(KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?);
        let params = authority_params(trust_domain, "root", now, now + ttl)?;
        let certificate = params.self_signed(&key)?;
        Self::assemble(certificate.pem(), key)
    }

    pub(super) fn intermediate(
        trust_domain: &str,
        root: &Self,
        ttl: Duration,
        now: SystemTime,
    ) -> Result<Self, CaError> {
        let key = WipedKey(KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?);
        let end = (now + ttl).min(root.not_after);
        let mut params = authority_params(trust_domain, "intermediate", now, end)?;
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        let certificate = root.sign(&params, &key)?;
        Self::assemble(certificate.pem(), key)
    }

    pub(super) fn load(state: &AuthorityState) -> Result<Self, CaError> {
        let key = WipedKey(KeyPair::from_pem(&state.key_pem).map_err(CaError::State)?);
        let mut authority = Self::assemble(state.cert_pem.clone(), key)?;
        authority.over_at = state.over_at;
        authority.revoked = state.revoked.iter().cloned().map(Revocation).collect();
        Ok(authority)
    }

    fn assemble(cert_pem: String, key: WipedKey) -> Result<Self, CaError> {
        let unusable = || CaError::State(rcgen::Error::CouldNotParseCertificate);
        let der = certificate(&cert_pem).ok_or_else(unusable)?;
        let parsed = parse(&der).map_err(|_malformed| unusable())?;
        if !parsed.is_ca() || parsed.public_key().raw != key.0.subject_public_key_info() {
            return Err(unusable());
        }
        let (_, not_after) = validity(&parsed);
        let serial = parsed.raw_serial().to_vec();
        let key_pem = Zeroizing::new(key.0.serialize_pem());
        let issuer = Issuer::from_ca_cert_der(&der, key).map_err(CaError::State)?;
        Ok(Self {
            cert_pem,
            serial,
            not_after,
            key_pem,
            issuer,
            over_at: None,
            revoked: Vec::new(),
            der: der.clone(),
        })
    }

    pub(super) fn state(&self) -> AuthorityState {
        AuthorityState {
            cert_pem: self.cert_pem.clone(),
            key_pem: self.key_pem.clone(),
            over_at: self.over_at,
            revoked: self.revoked.iter().map(|revocation| revocation.0.clone()).collect(),
        }
    }

    pub(super) fn sign(
        &self,
        params: &CertificateParams,
        key: &impl PublicKeyData,
    ) -> Result<Certificate, CaError> {
        Ok(params.clone().signed_by(key, &self.issuer)?)
    }

    /// A serial for a leaf: random bytes and a tag over them, by which [`has_given`](Self::has_given) knows it again.
    pub(super) fn leaf_serial(&self) -> Result<SerialNumber, CaError> {
        let mut bytes = random_bytes()?;
        let (random, tag) = bytes.split_at_mut(SERIAL_BYTES - SERIAL_TAG_BYTES);
        tag.copy_from_slice(&self.serial_tag(random).as_ref()[..SERIAL_TAG_BYTES]);
        Ok(SerialNumber::from_slice(&bytes))
    }

    /// Whether it gave that serial to a leaf. There is no list: the serial itself tells whoever has the key.
    pub(super) fn has_given(&self, serial: &[u8]) -> bool {
        serial.len() == SERIAL_BYTES && {
            let (random, tag) = serial.split_at(SERIAL_BYTES - SERIAL_TAG_BYTES);
            self.serial_tag(random).as_ref()[..SERIAL_TAG_BYTES] == *tag
        }
    }

    fn serial_tag(&self, random: &[u8]) -> hmac::Tag {
        let mut context =
            hmac::Context::with_key(&hmac::Key::new(hmac::HMAC_SHA256, self.key_pem.as_bytes()));
        context.update(b"culvert serial of a leaf\0");
        context.update(random);
        context.sign()
    }

    pub(super) fn cert_pem(&self) -> &str {
        &self.cert_pem
    }

    pub(super) const fn der(&self) -> &CertificateDer<'static> {
        &self.der
    }

    pub(super) fn serial(&self) -> &[u8] {
        &self.serial
    }

    pub(super) const fn not_after(&self) -> SystemTime {
        self.not_after
    }

    pub(super) fn has_serial(&self, serial: &[u8]) -> bool {
        self.serial == serial
    }

    /// Notes that it signs no more; what it signed lives until `until` at the latest.
    pub(super) fn retire(&mut self, until: SystemTime) {
        self.over_at = Some(until.min(self.not_after));
    }

    pub(super) fn is_over(&self, now: SystemTime) -> bool {
        self.over_at.is_some_and(|over_at| over_at <= now)
    }

    pub(super) fn revoke(&mut self, revocation: Revocation) {
        if !self.revoked.iter().any(|known| known.0.serial == revocation.0.serial) {
            self.revoked.push(revocation);
        }
    }

    pub(super) fn has_revoked(&self) -> bool {
        !self.revoked.is_empty()
    }

    pub(super) fn list_pem(&self, now: SystemTime, lifetime: Duration) -> Result<String, CaError> {
        // Lists of one authority must have rising numbers; seconds rise.
        let number = now.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs();
        let params = CertificateRevocationListParams {
            this_update: now.into(),
            next_update: (now + lifetime).into(),
            crl_number: SerialNumber::from(number),
            issuing_distribution_point: None,
            revoked_certs: self
                .revoked
                .iter()
                .map(|Revocation(revoked)| RevokedCertParams {
                    serial_number: SerialNumber::from_slice(&revoked.serial),
                    revocation_time: revoked.at.into(),
                    reason_code: Some(RevocationReason::Unspecified),
                    invalidity_date: None,
                })
                .collect(),
            key_identifier_method: KeyIdMethod::Sha256,
        };
        Ok(params.signed_by(&self.issuer)?.pem()?)
    }
}

impl fmt::Debug for Authority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Authority")
            .field("serial", &self.serial)
            .field("not_after", &self.not_after)
            .field("over_at", &self.over_at)
            .finish_non_exhaustive()
    }
}

fn authority_params(
    trust_domain: &str,
    role: &str,
    now: SystemTime,
    not_after: SystemTime,
) -> Result<CertificateParams, CaError> {
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![
        KeyUsagePurpose::KeyCertSign,
        KeyUsagePurpose::CrlSign,
        KeyUsagePurpose::DigitalSignature,
    ];
    params.not_before = now.checked_sub(BACKDATE).unwrap_or(SystemTime::UNIX_EPOCH).into();
    params.not_after = not_after.into();
    let serial = SerialNumber::from_slice(&random_bytes()?);
    params.distinguished_name = authority_name(trust_domain, role, &serial);
    params.serial_number = Some(serial);
    params.use_authority_key_identifier_extension = true;
    Ok(params)
}

/// Random bytes of a serial: positive, and of full length.
fn random_bytes() -> Result<[u8; SERIAL_BYTES], CaError> {
    let mut bytes = [0; SERIAL_BYTES];
    aws_lc_rs::rand::fill(&mut bytes).map_err(|_unspecified| CaError::Random)?;
    bytes[0] = bytes[0] & 0x7f | 0x40;
    Ok(bytes)
}
