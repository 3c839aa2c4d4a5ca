//! Whom to believe: roots by trust domain, and what they have revoked.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::SystemTime;

use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, CertificateRevocationListDer, TrustAnchor};

use crate::certificate::{parse, validity};
use crate::revocation::{InvalidRevocationList, RevocationList};

/// Most roots of one trust domain; rotation needs two or three.
const MAX_ROOTS: usize = 64;
/// Most revocation lists.
const MAX_LISTS: usize = 256;

/// Roots by trust domain, and revocation lists; immutable, swapped whole.
///
/// Several roots of a domain are believed alike, which is what carries the mesh through a rotation of the root.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TrustBundle {
    roots: BTreeMap<Arc<str>, Vec<Root>>,
    lists: Vec<RevocationList>,
}

/// Roots or revocation lists that cannot be used; the control plane's fault.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidBundle {
    /// Not PEM, at the entry counted from 0.
    #[error("entry {index} is not PEM")]
    NotPem {
        /// Which entry.
        index: usize,
    },
    /// An entry that is no certificate.
    #[error("entry {index} is not a certificate")]
    NotACertificate {
        /// Which entry.
        index: usize,
    },
    /// A certificate that may not sign others.
    #[error("entry {index} is not a certificate authority")]
    NotAnAuthority {
        /// Which entry.
        index: usize,
    },
    /// No root at all: nobody could be believed.
    #[error("no root certificate for trust domain {trust_domain:?}")]
    NoRoots {
        /// The domain.
        trust_domain: Arc<str>,
    },
    /// More than any mesh needs.
    #[error("more than {limit} entries")]
    TooMany {
        /// The limit.
        limit: usize,
    },
    /// A revocation list that cannot be used.
    #[error("revocation list {index} cannot be used")]
    RevocationList {
        /// Which entry.
        index: usize,
        /// Why.
        #[source]
        source: InvalidRevocationList,
    },
}

/// One believed root.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Root {
    pub(crate) der: CertificateDer<'static>,
    anchor: TrustAnchor<'static>,
    not_before: SystemTime,
    not_after: SystemTime,
}

impl TrustBundle {
    /// The bundle of one trust domain. `crl_pem` may be empty.
    ///
    /// # Errors
    /// When an entry is unusable or there is no root; keep the previous bundle then.
    pub fn from_pem(
        trust_domain: &str,
        root_pem: &str,
        crl_pem: &str,
    ) -> Result<Self, InvalidBundle> {
        Self::default().with_domain(trust_domain, root_pem)?.with_revocations(crl_pem)
    }

    /// This bundle with further roots for `trust_domain`; roots that it has are not repeated.
    ///
    /// # Errors
    /// As [`from_pem`](Self::from_pem).
    pub fn with_domain(
        mut self,
        trust_domain: &str,
        root_pem: &str,
    ) -> Result<Self, InvalidBundle> {
        let domain: Arc<str> = trust_domain.into();
        let roots = self.roots.entry(Arc::clone(&domain)).or_default();
        for (index, entry) in CertificateDer::pem_slice_iter(root_pem.as_bytes()).enumerate() {
            let der = entry.map_err(|_malformed| InvalidBundle::NotPem { index })?;
            let root = Root::new(der, index)?;
            if !roots.contains(&root) {
                roots.push(root);
            }
            if roots.len() > MAX_ROOTS {
                return Err(InvalidBundle::TooMany { limit: MAX_ROOTS });
            }
        }
        if roots.is_empty() {
            return Err(InvalidBundle::NoRoots { trust_domain: domain });
        }
        Ok(self)
    }

    /// This bundle with the revocation lists of `crl_pem` instead of its own; empty text means none.
    ///
    /// # Errors
    /// When an entry is unusable.
    pub fn with_revocations(mut self, crl_pem: &str) -> Result<Self, InvalidBundle> {
        self.lists.clear();
        for (index, entry) in
            CertificateRevocationListDer::pem_slice_iter(crl_pem.as_bytes()).enumerate()
        {
            let der = entry.map_err(|_malformed| InvalidBundle::NotPem { index })?;
            if self.lists.len() == MAX_LISTS {
                return Err(InvalidBundle::TooMany { limit: MAX_LISTS });
            }
            self.lists.push(
                RevocationList::new(der)
                    .map_err(|source| InvalidBundle::RevocationList { index, source })?,
            );
        }
        Ok(self)
    }

    /// The trust domains with roots, in order.
    pub fn trust_domains(&self) -> impl Iterator<Item = &str> {
        self.roots.keys().map(AsRef::as_ref)
    }

    /// True when identities of `trust_domain` can be judged.
    #[must_use]
    pub fn knows(&self, trust_domain: &str) -> bool {
        self.roots.contains_key(trust_domain)
    }

    /// The roots of `trust_domain`, DER.
    pub fn roots(&self, trust_domain: &str) -> impl Iterator<Item = &CertificateDer<'static>> {
        self.of_domain(trust_domain).iter().map(|root| &root.der)
    }

    pub(crate) fn of_domain(&self, trust_domain: &str) -> &[Root] {
        self.roots.get(trust_domain).map_or(&[], Vec::as_slice)
    }

    /// Trust anchors of `trust_domain` that are valid at `now`; webpki itself does not look at an anchor's dates.
    pub(crate) fn anchors(&self, trust_domain: &str, now: SystemTime) -> Vec<TrustAnchor<'static>> {
        self.of_domain(trust_domain)
            .iter()
            .filter(|root| root.not_before <= now && now <= root.not_after)
            .map(|root| root.anchor.clone())
            .collect()
    }

    pub(crate) fn lists(&self) -> &[RevocationList] {
        &self.lists
    }
}

impl Root {
    fn new(der: CertificateDer<'static>, index: usize) -> Result<Self, InvalidBundle> {
        let certificate =
            parse(&der).map_err(|_malformed| InvalidBundle::NotACertificate { index })?;
        if !certificate.is_ca() {
            return Err(InvalidBundle::NotAnAuthority { index });
        }
        let (not_before, not_after) = validity(&certificate);
        let anchor = webpki::anchor_from_trusted_cert(&der)
            .map_err(|_malformed| InvalidBundle::NotACertificate { index })?
            .to_owned();
        Ok(Self { der, anchor, not_before, not_after })
    }
}
