//! A workload's certificate with its key, and the check of what a CA answers.

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use mesh_model::SpiffeId;
use rustls::sign::CertifiedKey;
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;

use crate::certificate::{parse, spiffe_id, unix_time, validity};
use crate::peer::{Side, verify_chain};
use crate::{CsrKey, InvalidBundle, PeerRejection, TrustBundle};

/// A workload's certificate chain with its key: what it proves itself by.
///
/// The key lives in memory only and is wiped when the last user of the certificate is gone.
pub struct Svid {
    id: SpiffeId,
    key: CsrKey,
    certified: Arc<CertifiedKey>,
    serial: Vec<u8>,
    not_before: SystemTime,
    not_after: SystemTime,
}

/// A CA's answer that was found in order.
#[derive(Debug)]
pub struct IssuedAnswer {
    /// The certificate, ready for use.
    pub svid: Svid,
    /// The roots that came with it, PEM; the last element of the answer.
    pub root_pem: String,
}

/// Why a CA's answer was refused; the control plane's fault. The request may be repeated.
#[derive(Debug, thiserror::Error)]
pub enum InvalidAnswer {
    /// A chain needs a leaf and, last, the roots.
    #[error("answer holds {elements} of at least 2 elements: a leaf and the roots")]
    TooShort {
        /// Elements in the answer.
        elements: usize,
    },
    /// More certificates than a chain may hold.
    #[error("answer holds {elements} elements")]
    TooLong {
        /// Elements in the answer.
        elements: usize,
    },
    /// An element that is not one PEM certificate.
    #[error("element {index} is not a PEM certificate")]
    NotACertificate {
        /// Which element.
        index: usize,
    },
    /// The roots cannot be used.
    #[error("the roots cannot be used")]
    Roots(#[source] InvalidBundle),
    /// The leaf is for somebody else.
    #[error("certificate is for {presented}")]
    WrongIdentity {
        /// Whom it is for.
        presented: SpiffeId,
    },
    /// The leaf is no certificate of a workload, or does not chain to the roots that came with it.
    #[error("certificate is unusable")]
    Unusable(#[source] PeerRejection),
    /// The leaf certifies another key than the one of the request.
    #[error("certificate is for another key")]
    WrongKey(#[source] rustls::Error),
    /// The certificate is over already.
    #[error("certificate has expired already")]
    Expired,
}

/// Most elements of an answer: a chain and the roots.
const MAX_ELEMENTS: usize = crate::certificate::MAX_CHAIN + 1;

impl IssuedAnswer {
    /// Checks the answer `cert_chain` (PEM elements: leaf, intermediates, roots) to the request for `id` made with `key`.
    ///
    /// A leaf that is not valid *yet* is taken: this node's clock may be behind the CA's.
    ///
    /// # Errors
    /// When anything of it is not as requested.
    pub fn check(
        cert_chain: &[String],
        id: &SpiffeId,
        key: CsrKey,
        now: SystemTime,
    ) -> Result<Self, InvalidAnswer> {
        let elements = cert_chain.len();
        let Some((root_pem, chain_pem)) =
            cert_chain.split_last().filter(|(_, rest)| !rest.is_empty())
        else {
            return Err(InvalidAnswer::TooShort { elements });
        };
        if elements > MAX_ELEMENTS {
            return Err(InvalidAnswer::TooLong { elements });
        }
        let chain = chain_pem
            .iter()
            .enumerate()
            .map(|(index, pem)| {
                CertificateDer::from_pem_slice(pem.as_bytes())
                    .map_err(|_malformed| InvalidAnswer::NotACertificate { index })
            })
            .collect::<Result<Vec<_>, _>>()?;
        let bundle =
            TrustBundle::from_pem(id.trust_domain(), root_pem, "").map_err(InvalidAnswer::Roots)?;
        let svid = Svid::new(id, key, chain)?;
        if svid.not_after <= now {
            return Err(InvalidAnswer::Expired);
        }
        let at = unix_time(now.max(svid.not_before + Duration::from_secs(1)));
        for side in [Side::Server, Side::Client] {
            verify_chain(svid.chain(), &bundle, id.trust_domain(), side, at)
                .map_err(InvalidAnswer::Unusable)?;
        }
        Ok(Self { svid, root_pem: root_pem.clone() })
    }
}

impl Svid {
    /// A certificate that this process's predecessor had checked when it was issued: `chain`, leaf first, and its key.
    ///
    /// # Errors
    /// When the leaf is no workload's, or certifies another key.
    pub fn handed_over(
        chain: Vec<CertificateDer<'static>>,
        key: CsrKey,
    ) -> Result<Self, InvalidAnswer> {
        let leaf = chain.first().ok_or(InvalidAnswer::TooShort { elements: 0 })?;
        let id = spiffe_id(&parse(leaf).map_err(InvalidAnswer::Unusable)?)
            .map_err(InvalidAnswer::Unusable)?;
        Self::new(&id, key, chain)
    }

    /// The key, for a successor process.
    #[must_use]
    pub const fn key(&self) -> &CsrKey {
        &self.key
    }

    fn new(
        id: &SpiffeId,
        key: CsrKey,
        chain: Vec<CertificateDer<'static>>,
    ) -> Result<Self, InvalidAnswer> {
        let leaf = parse(&chain[0]).map_err(InvalidAnswer::Unusable)?;
        let presented = spiffe_id(&leaf).map_err(InvalidAnswer::Unusable)?;
        if presented != *id {
            return Err(InvalidAnswer::WrongIdentity { presented });
        }
        let (not_before, not_after) = validity(&leaf);
        let serial = leaf.raw_serial().to_vec();
        let certified = key.certify(chain).map_err(InvalidAnswer::WrongKey)?;
        Ok(Self {
            id: presented,
            key,
            certified: Arc::new(certified),
            serial,
            not_before,
            not_after,
        })
    }

    /// Whose it is.
    #[must_use]
    pub const fn id(&self) -> &SpiffeId {
        &self.id
    }

    /// Leaf first, then intermediates, without the root; never empty.
    #[must_use]
    pub fn chain(&self) -> &[CertificateDer<'static>] {
        &self.certified.cert
    }

    /// Chain and key as rustls takes them, parsed once.
    #[must_use]
    pub fn certified_key(&self) -> Arc<CertifiedKey> {
        Arc::clone(&self.certified)
    }

    /// Serial number of the leaf, big-endian.
    #[must_use]
    pub fn serial(&self) -> &[u8] {
        &self.serial
    }

    /// Serial numbers of the whole chain, leaf first, big-endian.
    pub fn serials(&self) -> impl Iterator<Item = Vec<u8>> {
        self.chain().iter().filter_map(|der| Some(parse(der).ok()?.raw_serial().to_vec()))
    }

    /// First moment of validity.
    #[must_use]
    pub const fn not_before(&self) -> SystemTime {
        self.not_before
    }

    /// Last moment of validity.
    #[must_use]
    pub const fn not_after(&self) -> SystemTime {
        self.not_after
    }

    /// True until [`not_after`](Self::not_after); a certificate that is not valid yet counts as usable, since then it
    /// is more likely this node's clock that is behind.
    #[must_use]
    pub fn is_usable(&self, now: SystemTime) -> bool {
        now < self.not_after
    }
}

impl fmt::Debug for Svid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Svid")
            .field("id", &self.id.as_str())
            .field("not_before", &self.not_before)
            .field("not_after", &self.not_after)
            .finish_non_exhaustive()
    }
}
