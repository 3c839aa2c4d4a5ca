//! Revocation lists, and which certificates of a chain they hit.
//!
//! A list counts against a certificate when its issuer's name and the serial match *and* one key signed both: names
//! alone collide (two authorities may bear the same one). Signatures are checked only on such a hit, so a handshake
//! pays for a lookup. Lists past their next update still count, and a certificate on no list is not revoked.

use std::collections::BTreeSet;
use std::sync::Arc;

use rustls_pki_types::CertificateRevocationListDer;
use x509_parser::certificate::X509Certificate;
use x509_parser::oid_registry::{Oid, asn1_rs::oid};
use x509_parser::prelude::{CertificateRevocationList, FromDer};
use x509_parser::x509::SubjectPublicKeyInfo;

use crate::certificate::parse;
use crate::trust::Root;

/// One list, indexed by serial.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct RevocationList {
    der: Arc<CertificateRevocationListDer<'static>>,
    /// The issuer's name, DER.
    issuer: Arc<[u8]>,
    serials: Arc<BTreeSet<Vec<u8>>>,
}

/// Why a revocation list cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidRevocationList {
    /// Not a revocation list.
    #[error("not a revocation list")]
    Malformed,
    /// A delta list: it means nothing without its base.
    #[error("a delta revocation list")]
    Delta,
}

/// Extension that marks a delta list. Source: RFC 5280 §5.2.4.
const DELTA_INDICATOR: Oid<'static> = oid!(2.5.29.27);

impl RevocationList {
    pub(crate) fn new(
        der: CertificateRevocationListDer<'static>,
    ) -> Result<Self, InvalidRevocationList> {
        let Ok(([], list)) = CertificateRevocationList::from_der(&der) else {
            return Err(InvalidRevocationList::Malformed);
        };
        if list.extensions().iter().any(|extension| extension.oid == DELTA_INDICATOR) {
            return Err(InvalidRevocationList::Delta);
        }
        let issuer = list.issuer().as_raw().into();
        let serials = list
            .iter_revoked_certificates()
            .map(|entry| significant(entry.raw_serial()).to_vec())
            .collect();
        Ok(Self { der: Arc::new(der), issuer, serials: Arc::new(serials) })
    }

    fn lists(&self, certificate: &X509Certificate<'_>) -> bool {
        *self.issuer == *certificate.issuer().as_raw()
            && self.serials.contains(significant(certificate.raw_serial()))
    }

    fn signed_by(&self, key: &SubjectPublicKeyInfo<'_>) -> bool {
        CertificateRevocationList::from_der(&self.der)
            .is_ok_and(|(_, list)| list.verify_signature(key).is_ok())
    }
}

/// A serial without the zero bytes in front that DER needs for its sign.
fn significant(serial: &[u8]) -> &[u8] {
    let zeros = serial.iter().take_while(|byte| **byte == 0).count();
    &serial[zeros..]
}

/// How far above the leaf the first revoked certificate of `chain` (leaf first) is, if one is revoked.
///
/// Certificates that issued nothing in the chain are ignored.
pub(crate) fn revoked(
    chain: &[X509Certificate<'_>],
    roots: &[Root],
    lists: &[RevocationList],
) -> Option<usize> {
    if lists.is_empty() || chain.is_empty() {
        return None;
    }
    let roots: Vec<_> = roots.iter().filter_map(|root| parse(&root.der).ok()).collect();
    let mut seen = vec![false; chain.len()];
    seen[0] = true;
    let mut level = vec![0];
    for depth in 0..chain.len() {
        let mut above = Vec::new();
        for &index in &level {
            let certificate = &chain[index];
            let issuers: Vec<usize> = (0..chain.len())
                .filter(|&other| other != index && issued(&chain[other], certificate))
                .collect();
            let hit = lists.iter().filter(|list| list.lists(certificate)).any(|list| {
                let presented = issuers.iter().map(|&issuer| &chain[issuer]);
                let rooted = roots.iter().filter(|root| issued(root, certificate));
                presented.chain(rooted).any(|issuer| list.signed_by(issuer.public_key()))
            });
            if hit {
                return Some(depth);
            }
            for issuer in issuers {
                if !std::mem::replace(&mut seen[issuer], true) {
                    above.push(issuer);
                }
            }
        }
        level = above;
    }
    None
}

/// True when `issuer` signed `certificate`.
fn issued(issuer: &X509Certificate<'_>, certificate: &X509Certificate<'_>) -> bool {
    issuer.subject().as_raw() == certificate.issuer().as_raw()
        && certificate.verify_signature(Some(issuer.public_key())).is_ok()
}
