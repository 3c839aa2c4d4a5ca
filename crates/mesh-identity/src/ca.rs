//! The mesh's certificate authority: a root that signs intermediates, and an intermediate that signs workloads.
//!
//! Rotation never leaves a moment without common trust. A new intermediate is simply used: peers get it with the
//! leaf. A new root goes through three steps, each given time to reach every agent:
//!
//! ```text
//! begin_root_rotation: bundle {old, new}, old signs ─► activate_root: bundle {old, new}, new signs
//!     ─► (all leaves under old have expired) retire: bundle {new}
//! ```

mod authority;
mod mounted;
mod state;

use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use mesh_model::SpiffeId;
use rcgen::{
    CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, KeyUsagePurpose,
    SanType, SerialNumber, SubjectPublicKeyInfo, string::Ia5String,
};
use rustls::sign::CertifiedKey;
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, CertificateSigningRequestDer};
use x509_parser::prelude::{FromDer, X509CertificationRequest};

use self::authority::{Authority, Revocation};
use self::mounted::Above;
pub use self::mounted::MountedFiles;
pub use self::state::{AuthorityState, CaState, RevocationState};
use crate::CsrKey;

/// How a [`CaCore`] issues.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CaConfig {
    /// Lifetime of a leaf whose request names none; default 24 h.
    pub default_ttl: Duration,
    /// Longest lifetime of a leaf, whatever its request asks for; default 24 h.
    pub max_ttl: Duration,
    /// Lifetime of an intermediate; default one year.
    pub intermediate_ttl: Duration,
    /// Lifetime of a root; default ten years.
    pub root_ttl: Duration,
}

/// The authority. Pure but for the random bytes of keys and serials; persist [`state`](Self::state) after each change.
#[derive(Debug)]
pub struct CaCore {
    trust_domain: Arc<str>,
    config: CaConfig,
    /// The signing one first, then a coming one, then retired ones.
    roots: Vec<Authority>,
    /// True while `roots[1]` waits to be activated.
    root_is_coming: bool,
    /// The signing one first, then those whose leaves still live.
    intermediates: Vec<Authority>,
    /// What is above the signing one when somebody else made it; then there are no roots here.
    above: Option<Above>,
}

/// Why the authority could not do something.
#[derive(Debug, thiserror::Error)]
pub enum CaError {
    /// The cryptographic library failed, or its input was unusable.
    #[error("cannot make a key, certificate or list")]
    Crypto(#[from] rcgen::Error),
    /// The random generator failed.
    #[error("no random bytes")]
    Random,
    /// The key and certificate that were read back do not belong together or cannot be used.
    #[error("stored authority cannot be used")]
    State(#[source] rcgen::Error),
    /// There is nothing to sign with.
    #[error("no root or no intermediate")]
    Empty,
    /// A rotation of the root is under way already.
    #[error("a root rotation is under way already")]
    RotationUnderWay,
    /// No rotation of the root was begun.
    #[error("no root rotation was begun")]
    NoRotation,
    /// No authority of ours issued that serial.
    #[error("no such certificate authority")]
    UnknownAuthority,
    /// Somebody else made the authority, and renews it.
    #[error("the authority is somebody else's: it is changed and renewed there")]
    NotOurs,
    /// What signs does not come from a root.
    #[error("what signs was not signed by a root that is believed, nor what is in between")]
    Unrooted,
    /// The certificate of a server cannot be used by rustls.
    #[error("issued certificate cannot be used")]
    Unusable(#[source] rustls::Error),
    /// A server name that no certificate can bear.
    #[error("unusable server name {name:?}")]
    ServerName {
        /// The name.
        name: String,
    },
}

/// Why a request was not signed.
#[derive(Debug, thiserror::Error)]
pub enum SignError {
    /// Not a signing request; the agent's fault.
    #[error("not a certificate signing request")]
    Malformed,
    /// The request is not signed by the key it names; the agent's fault.
    #[error("signing request does not prove possession of its key")]
    NoPossession,
    /// A key of an algorithm or size that is not certified here; the agent's fault.
    #[error("key of the signing request is not supported")]
    UnsupportedKey(#[source] rcgen::Error),
    /// An identity of another trust domain; the agent's fault.
    #[error("identity {id} is of another trust domain")]
    WrongTrustDomain {
        /// The identity.
        id: SpiffeId,
    },
    /// The signing certificate itself has expired; the operator's, who did not rotate.
    #[error("the signing certificate has expired")]
    IssuerExpired,
    /// Our own fault.
    #[error("cannot sign")]
    Failed(#[source] CaError),
}

/// How long before its issue a certificate is valid: clocks differ. Source: Istio's CA.
const BACKDATE: Duration = Duration::from_secs(120);
/// How long a revocation list is fresh. Peers use older ones as well.
const LIST_LIFETIME: Duration = Duration::from_secs(24 * 3600);
/// Longest signing request looked at, bytes of PEM.
const MAX_CSR_BYTES: usize = 16 * 1024;

const DAY: Duration = Duration::from_secs(24 * 3600);

impl Default for CaConfig {
    fn default() -> Self {
        Self { default_ttl: DAY, max_ttl: DAY, intermediate_ttl: 365 * DAY, root_ttl: 3650 * DAY }
    }
}

impl CaCore {
    /// Makes a root and an intermediate for `trust_domain`.
    ///
    /// # Errors
    /// When the cryptographic library fails.
    pub fn create(trust_domain: &str, config: CaConfig, now: SystemTime) -> Result<Self, CaError> {
        let root = Authority::root(trust_domain, config.root_ttl, now)?;
        let intermediate =
            Authority::intermediate(trust_domain, &root, config.intermediate_ttl, now)?;
        Ok(Self {
            trust_domain: trust_domain.into(),
            config,
            roots: vec![root],
            root_is_coming: false,
            intermediates: vec![intermediate],
            above: None,
        })
    }

    /// Reads an authority back from [`state`](Self::state), or from a root and an intermediate made elsewhere.
    ///
    /// # Errors
    /// When a key or certificate cannot be used.
    pub fn load(state: &CaState, config: CaConfig) -> Result<Self, CaError> {
        let roots = state.roots.iter().map(Authority::load).collect::<Result<Vec<_>, _>>()?;
        let intermediates =
            state.intermediates.iter().map(Authority::load).collect::<Result<Vec<_>, _>>()?;
        if roots.is_empty() || intermediates.is_empty() {
            return Err(CaError::Empty);
        }
        if state.root_is_coming && roots.len() < 2 {
            return Err(CaError::NoRotation);
        }
        Ok(Self {
            trust_domain: state.trust_domain.as_str().into(),
            config,
            roots,
            root_is_coming: state.root_is_coming,
            intermediates,
            above: None,
        })
    }

    /// Everything to be kept, private keys included.
    #[must_use]
    pub fn state(&self) -> CaState {
        CaState {
            trust_domain: self.trust_domain.as_ref().to_owned(),
            roots: self.roots.iter().map(Authority::state).collect(),
            root_is_coming: self.root_is_coming,
            intermediates: self.intermediates.iter().map(Authority::state).collect(),
        }
    }

    /// The trust domain it issues for.
    #[must_use]
    pub fn trust_domain(&self) -> &str {
        &self.trust_domain
    }

    /// The roots that peers should believe, PEM: the signing one, a coming one, and retired ones with living leaves.
    #[must_use]
    pub fn root_bundle_pem(&self) -> String {
        match &self.above {
            Some(above) => above.roots_pem.clone(),
            None => self.roots.iter().map(Authority::cert_pem).collect(),
        }
    }

    /// Certifies the key of `csr_pem` for `id`: leaf, intermediate, and the root bundle as the last element.
    ///
    /// Names and extensions in the request are ignored; `id` is what the caller found the requester entitled to.
    /// A `ttl` of zero means the default; [`CaConfig::max_ttl`] and the issuer's end cap it.
    ///
    /// # Errors
    /// Why it is not signed.
    pub fn sign(
        &self,
        csr_pem: &str,
        id: &SpiffeId,
        ttl: Duration,
        now: SystemTime,
    ) -> Result<Vec<String>, SignError> {
        if id.trust_domain() != &*self.trust_domain {
            return Err(SignError::WrongTrustDomain { id: id.clone() });
        }
        let key = requested_key(csr_pem)?;
        let issuer = self.issuer();
        if now >= issuer.not_after() {
            return Err(SignError::IssuerExpired);
        }
        let name =
            Ia5String::try_from(id.as_str()).map_err(|error| SignError::Failed(error.into()))?;
        let ttl = if ttl.is_zero() { self.config.default_ttl } else { ttl };
        let ttl = ttl.min(self.config.max_ttl);
        let leaf = leaf_params(vec![SanType::URI(name)], ttl, issuer, now)
            .and_then(|params| issuer.sign(&params, &key))
            .map_err(SignError::Failed)?;
        let between = self.between().iter().map(|(pem, _)| pem.clone());
        let mut chain = vec![leaf.pem(), issuer.cert_pem().to_owned()];
        chain.extend(between);
        chain.push(self.root_bundle_pem());
        Ok(chain)
    }

    /// Issues a certificate for the control plane's own server, valid for DNS names and addresses.
    ///
    /// # Errors
    /// When a name cannot be certified or the cryptographic library fails.
    pub fn issue_server(
        &self,
        names: &[String],
        ttl: Duration,
        now: SystemTime,
    ) -> Result<CertifiedKey, CaError> {
        let issuer = self.issuer();
        let names = names
            .iter()
            .map(|name| match name.parse::<IpAddr>() {
                Ok(ip) => Ok(SanType::IpAddress(ip)),
                Err(_) => Ia5String::try_from(name.as_str())
                    .map(SanType::DnsName)
                    .map_err(|_invalid| CaError::ServerName { name: name.clone() }),
            })
            .collect::<Result<Vec<_>, _>>()?;
        let mut params = leaf_params(names, ttl, issuer, now)?;
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        let pair = rcgen::KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256)?;
        let leaf = issuer.sign(&params, &pair)?;
        let key = CsrKey::from_pkcs8(pair.serialize_der().into());
        let mut chain = vec![leaf.der().clone(), issuer.der().clone()];
        chain.extend(self.between().iter().map(|(_, der)| der.clone()));
        key.certify(chain).map_err(CaError::Unusable)
    }

    /// Replaces the intermediate; the old one is kept until its leaves have expired, to revoke them if need be.
    ///
    /// # Errors
    /// When the cryptographic library fails; nothing changes then.
    pub fn rotate_intermediate(&mut self, now: SystemTime) -> Result<(), CaError> {
        self.be_ours()?;
        let fresh = Authority::intermediate(
            &self.trust_domain,
            &self.roots[0],
            self.config.intermediate_ttl,
            now,
        )?;
        self.intermediates[0].retire(now + self.config.max_ttl);
        self.intermediates.insert(0, fresh);
        Ok(())
    }

    /// First step of a root rotation: makes the new root and adds it to the bundle. Activate it once every agent has
    /// the new bundle.
    ///
    /// # Errors
    /// When one is under way already or the cryptographic library fails; nothing changes then.
    pub fn begin_root_rotation(&mut self, now: SystemTime) -> Result<(), CaError> {
        self.be_ours()?;
        if self.root_is_coming {
            return Err(CaError::RotationUnderWay);
        }
        let fresh = Authority::root(&self.trust_domain, self.config.root_ttl, now)?;
        self.roots.insert(1, fresh);
        self.root_is_coming = true;
        Ok(())
    }

    /// Second step: the new root signs from now on, by a new intermediate. The old one stays believed until
    /// [`retire`](Self::retire) finds its leaves expired.
    ///
    /// # Errors
    /// When none was begun or the cryptographic library fails; nothing changes then.
    pub fn activate_root(&mut self, now: SystemTime) -> Result<(), CaError> {
        if !self.root_is_coming {
            return Err(CaError::NoRotation);
        }
        let fresh = Authority::intermediate(
            &self.trust_domain,
            &self.roots[1],
            self.config.intermediate_ttl,
            now,
        )?;
        let until = now + self.config.max_ttl;
        self.roots.swap(0, 1);
        self.roots[1].retire(until);
        self.root_is_coming = false;
        self.intermediates[0].retire(until);
        self.intermediates.insert(0, fresh);
        Ok(())
    }

    /// Forgets roots and intermediates that were replaced and whose leaves have all expired. True if any.
    pub fn retire(&mut self, now: SystemTime) -> bool {
        let before = self.roots.len() + self.intermediates.len();
        self.roots.retain(|authority| !authority.is_over(now));
        self.intermediates.retain(|authority| !authority.is_over(now));
        self.roots.len() + self.intermediates.len() != before
    }

    /// Replaces what expires within a third of its life: the intermediate. True if it did; a root is never replaced
    /// without being asked.
    ///
    /// # Errors
    /// When the cryptographic library fails; the present intermediate stays in use.
    pub fn maintain(&mut self, now: SystemTime) -> Result<bool, CaError> {
        if self.above.is_some() {
            return Ok(false);
        }
        let due = now + self.config.intermediate_ttl / 3 >= self.issuer().not_after();
        // An intermediate cannot outlive its root, so a new one would be no better then.
        let better = self.roots[0].not_after() > self.issuer().not_after();
        if due && better {
            self.rotate_intermediate(now)?;
        }
        let retired = self.retire(now);
        Ok((due && better) || retired)
    }

    /// Revokes a leaf by serial. The serial goes on the lists of all intermediates: who issued it need not be known,
    /// serials are random. Whether one of them issued it; another's serial goes on the lists as well.
    pub fn revoke_leaf(&mut self, serial: &[u8], now: SystemTime) -> bool {
        for intermediate in &mut self.intermediates {
            intermediate.revoke(Revocation::new(serial, now));
        }
        self.intermediates.iter().any(|known| known.has_given(serial))
    }

    /// Revokes an intermediate by serial, and with it all its leaves; a new one takes over if it was the signing one.
    ///
    /// # Errors
    /// When no such intermediate is known, or its successor cannot be made.
    pub fn revoke_intermediate(&mut self, serial: &[u8], now: SystemTime) -> Result<(), CaError> {
        self.be_ours()?;
        let Some(index) = self.intermediates.iter().position(|known| known.has_serial(serial))
        else {
            return Err(CaError::UnknownAuthority);
        };
        if index == 0 {
            self.rotate_intermediate(now)?;
        }
        for root in &mut self.roots {
            root.revoke(Revocation::new(serial, now));
        }
        Ok(())
    }

    /// Serial of the signing intermediate, big-endian.
    #[must_use]
    pub fn intermediate_serial(&self) -> &[u8] {
        self.issuer().serial()
    }

    /// Last moment of the signing intermediate.
    #[must_use]
    pub fn intermediate_not_after(&self) -> SystemTime {
        self.issuer().not_after()
    }

    /// The revocation lists of every authority that has revoked something, PEM; empty when none has.
    ///
    /// # Errors
    /// When the cryptographic library fails.
    pub fn crl_pem(&self, now: SystemTime) -> Result<String, CaError> {
        let authorities = self.roots.iter().chain(&self.intermediates);
        let mut lists = String::new();
        for authority in authorities.filter(|authority| authority.has_revoked()) {
            lists.push_str(&authority.list_pem(now, LIST_LIFETIME)?);
        }
        Ok(lists)
    }

    fn between(&self) -> &[(String, CertificateDer<'static>)] {
        self.above.as_ref().map_or(&[], |above| &above.between)
    }

    const fn be_ours(&self) -> Result<(), CaError> {
        if self.above.is_some() { Err(CaError::NotOurs) } else { Ok(()) }
    }

    fn issuer(&self) -> &Authority {
        &self.intermediates[0]
    }
}

/// The public key of a request that proves to hold the private one.
fn requested_key(csr_pem: &str) -> Result<SubjectPublicKeyInfo, SignError> {
    if csr_pem.len() > MAX_CSR_BYTES {
        return Err(SignError::Malformed);
    }
    let der = CertificateSigningRequestDer::from_pem_slice(csr_pem.as_bytes())
        .map_err(|_malformed| SignError::Malformed)?;
    let Ok(([], request)) = X509CertificationRequest::from_der(&der) else {
        return Err(SignError::Malformed);
    };
    request.verify_signature().map_err(|_invalid| SignError::NoPossession)?;
    let key = request.certification_request_info.subject_pki.raw;
    SubjectPublicKeyInfo::from_der(key).map_err(SignError::UnsupportedKey)
}

/// A leaf with `names` only. Source: wire facts of Istio's CA for usages and dates; the subject stays empty.
fn leaf_params(
    names: Vec<SanType>,
    ttl: Duration,
    issuer: &Authority,
    now: SystemTime,
) -> Result<CertificateParams, CaError> {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.subject_alt_names = names;
    params.not_before = now.checked_sub(BACKDATE).unwrap_or(SystemTime::UNIX_EPOCH).into();
    params.not_after = (now + ttl).min(issuer.not_after()).into();
    params.serial_number = Some(issuer.leaf_serial()?);
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature, KeyUsagePurpose::KeyEncipherment];
    params.extended_key_usages =
        vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    params.use_authority_key_identifier_extension = true;
    Ok(params)
}

/// The subject of an authority; part of the serial makes it unlike its predecessor's.
fn authority_name(trust_domain: &str, role: &str, serial: &SerialNumber) -> DistinguishedName {
    let tail: String = serial.as_ref().iter().take(4).map(|byte| format!("{byte:02x}")).collect();
    let mut name = DistinguishedName::new();
    name.push(DnType::OrganizationName, trust_domain);
    name.push(DnType::CommonName, format!("Culvert {role} {tail}"));
    name
}

/// The first certificate of `pem`.
fn certificate(pem: &str) -> Option<CertificateDer<'static>> {
    CertificateDer::from_pem_slice(pem.as_bytes()).ok()
}
