//! A certificate with its key as one record of fixed size, for memory that outlives the process.
//!
//! The layout is frozen: a process of another version may have written it. Numbers are little-endian.
//!
//! | at | what |
//! |---|---|
//! | 0 | length of the content, `u32`; 0 in a record that holds nothing |
//! | 4 | SHA-256 of the content |
//! | 36 | the content: length of the key, `u16`; the key, PKCS#8; then, leaf first, each certificate: length, `u16`; DER |
//!
//! Whoever changes it calls the place where records are kept by another name.

use std::fmt;
use std::time::{Duration, SystemTime};

use aws_lc_rs::digest::{SHA256, digest};
use rustls_pki_types::CertificateDer;
use zeroize::{Zeroize as _, Zeroizing};

use crate::certificate::{MAX_CHAIN, unix_time};
use crate::peer::{Side, verify_chain};
use crate::{CsrKey, InvalidAnswer, PeerRejection, Svid, TrustBundle};

/// Size of a record, bytes. A leaf of the mesh's own authority and its intermediate take about 1,300.
pub const KEPT_BYTES: usize = 4096;
/// Where the content begins.
const CONTENT: usize = 36;
/// Longest key; one of P-256 takes 138 bytes.
const MAX_KEY_BYTES: usize = 1024;

/// Room for one record; wiped when dropped.
pub struct KeptRecord(Zeroizing<[u8; KEPT_BYTES]>);

/// A certificate that does not fit a record; its authority's chain is too long.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("certificate and key take {bytes} bytes, more than the {} there are", KEPT_BYTES - CONTENT)]
pub struct TooLargeToKeep {
    /// What they take.
    pub bytes: usize,
}

/// A record that cannot be used: damaged, or somebody else's.
#[derive(Debug, thiserror::Error)]
pub enum InvalidRecord {
    /// Not what was written.
    #[error("its checksum does not match")]
    Damaged,
    /// The checksum fits, the fields do not.
    #[error("its fields do not fit its length")]
    Malformed,
    /// Key and chain do not belong together, or name nobody.
    #[error("its certificate cannot be used")]
    Certificate(#[source] InvalidAnswer),
}

impl KeptRecord {
    /// A record that holds nothing.
    #[must_use]
    pub fn empty() -> Self {
        Self(Zeroizing::new([0; KEPT_BYTES]))
    }

    /// Its bytes.
    #[must_use]
    pub fn bytes(&self) -> &[u8; KEPT_BYTES] {
        &self.0
    }

    /// Its bytes, to be read into.
    #[must_use]
    pub fn bytes_mut(&mut self) -> &mut [u8; KEPT_BYTES] {
        &mut self.0
    }

    /// Writes a certificate down in place of what was here.
    ///
    /// # Errors
    /// When it does not fit; nothing is here then.
    pub fn write(&mut self, svid: &Svid) -> Result<(), TooLargeToKeep> {
        self.0.zeroize();
        let key = svid.key().to_pkcs8();
        let parts =
            || std::iter::once(key.as_slice()).chain(svid.chain().iter().map(AsRef::as_ref));
        let bytes: usize = parts().map(|part| 2 + part.len()).sum();
        if bytes > KEPT_BYTES - CONTENT || key.len() > MAX_KEY_BYTES {
            return Err(TooLargeToKeep { bytes });
        }
        let mut at = CONTENT;
        for part in parts() {
            let length = u16::try_from(part.len()).map_err(|_longer| TooLargeToKeep { bytes })?;
            self.0[at..at + 2].copy_from_slice(&length.to_le_bytes());
            self.0[at + 2..at + 2 + part.len()].copy_from_slice(part);
            at += 2 + part.len();
        }
        let length = u32::try_from(bytes).map_err(|_longer| TooLargeToKeep { bytes })?;
        let sum = digest(&SHA256, &self.0[CONTENT..at]);
        self.0[..4].copy_from_slice(&length.to_le_bytes());
        self.0[4..CONTENT].copy_from_slice(sum.as_ref());
        Ok(())
    }

    /// The certificate that is written here; `None` when nothing is. Whether it is still to be believed is another
    /// question: [`Svid::is_accepted`].
    ///
    /// # Errors
    /// When the record cannot be used.
    pub fn read(&self) -> Result<Option<Svid>, InvalidRecord> {
        let (length, rest) = self.0.split_first_chunk().ok_or(InvalidRecord::Malformed)?;
        let (sum, room) = rest.split_at(CONTENT - 4);
        let length = usize::try_from(u32::from_le_bytes(*length));
        let content = length.ok().and_then(|length| room.get(..length));
        let content = content.ok_or(InvalidRecord::Damaged)?;
        if content.is_empty() {
            return Ok(None);
        }
        if digest(&SHA256, content).as_ref() != sum {
            return Err(InvalidRecord::Damaged);
        }
        let (key, mut rest) = part(content).ok_or(InvalidRecord::Malformed)?;
        let mut chain = Vec::new();
        while !rest.is_empty() {
            let (der, after) = part(rest).ok_or(InvalidRecord::Malformed)?;
            chain.push(CertificateDer::from(der.to_vec()));
            rest = after;
        }
        if key.len() > MAX_KEY_BYTES || chain.len() > MAX_CHAIN {
            return Err(InvalidRecord::Malformed);
        }
        let key = CsrKey::from_pkcs8(Zeroizing::new(key.to_vec()));
        Svid::handed_over(chain, key).map(Some).map_err(InvalidRecord::Certificate)
    }
}

/// The first part, and what comes after it.
fn part(content: &[u8]) -> Option<(&[u8], &[u8])> {
    let (length, rest) = content.split_first_chunk()?;
    rest.split_at_checked(usize::from(u16::from_le_bytes(*length)))
}

impl fmt::Debug for KeptRecord {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("KeptRecord(..)")
    }
}

impl Svid {
    /// Whether peers that trust `bundle` accept this certificate at `now`, in both directions. One that is not valid *yet*
    /// counts as valid, as it does when it is issued.
    ///
    /// # Errors
    /// Why they would not.
    pub fn is_accepted(&self, bundle: &TrustBundle, now: SystemTime) -> Result<(), PeerRejection> {
        let domain = self.id().trust_domain();
        if !bundle.knows(domain) {
            return Err(PeerRejection::WrongTrustDomain { presented: self.id().clone() });
        }
        let at = unix_time(now.max(self.not_before() + Duration::from_secs(1)));
        [Side::Server, Side::Client]
            .into_iter()
            .try_for_each(|side| verify_chain(self.chain(), bundle, domain, side, at))
    }

    /// True when peers that trust `bundle` refuse this certificate because it, or one above it, was revoked.
    #[must_use]
    pub fn is_revoked(&self, bundle: &TrustBundle, now: SystemTime) -> bool {
        matches!(self.is_accepted(bundle, now), Err(PeerRejection::Revoked { .. }))
    }
}

#[cfg(test)]
mod tests {
    use mesh_model::SpiffeId;

    use super::*;
    use crate::{CaConfig, CaCore, IssuedAnswer, csr};

    const DOMAIN: &str = "cluster.local";
    const HOUR: Duration = Duration::from_secs(3600);

    fn now() -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000)
    }

    fn issued(ca: &CaCore) -> Svid {
        let id: SpiffeId = "spiffe://cluster.local/ns/shop/sa/cart".parse().unwrap();
        let (key, request) = csr(&id).unwrap();
        let answer = ca.sign(&request, &id, HOUR, now()).unwrap();
        IssuedAnswer::check(&answer, &id, key, now()).unwrap().svid
    }

    fn authority() -> CaCore {
        CaCore::create(DOMAIN, CaConfig::default(), now()).unwrap()
    }

    fn bundle(ca: &CaCore) -> TrustBundle {
        let crl = ca.crl_pem(now()).unwrap();
        TrustBundle::from_pem(DOMAIN, &ca.root_bundle_pem(), &crl).unwrap()
    }

    #[test]
    fn what_is_written_is_read_and_every_damaged_byte_is_noticed() {
        let svid = issued(&authority());
        let mut record = KeptRecord::empty();
        assert!(record.read().unwrap().is_none());
        record.write(&svid).unwrap();
        let read = record.read().unwrap().unwrap();
        assert_eq!(read.id(), svid.id());
        assert_eq!(read.chain(), svid.chain());
        assert_eq!(*read.key().to_pkcs8(), *svid.key().to_pkcs8());
        let length = u32::from_le_bytes(*record.bytes().first_chunk().unwrap());
        for at in 0..CONTENT + usize::try_from(length).unwrap() {
            record.bytes_mut()[at] ^= 1;
            assert!(record.read().is_err(), "byte {at}");
            record.bytes_mut()[at] ^= 1;
        }
        assert!(record.read().unwrap().is_some());
    }

    #[test]
    fn a_record_is_wiped_before_it_is_written_again() {
        let svid = issued(&authority());
        let mut record = KeptRecord::empty();
        record.bytes_mut().fill(7);
        record.write(&svid).unwrap();
        assert_eq!(record.bytes()[KEPT_BYTES - 1], 0);
        let long = vec![svid.chain()[0].clone(); 16];
        let key = CsrKey::from_pkcs8(svid.key().to_pkcs8());
        let long = Svid::handed_over(long, key).unwrap();
        assert!(record.write(&long).is_err());
        assert!(record.bytes().iter().all(|byte| *byte == 0));
    }

    #[test]
    fn only_what_peers_would_accept_is_accepted() {
        let mut ca = authority();
        let svid = issued(&ca);
        assert_eq!(svid.is_accepted(&bundle(&ca), now()), Ok(()));
        assert_eq!(
            svid.is_accepted(&bundle(&ca), now() - 2 * HOUR),
            Ok(()),
            "this clock is behind"
        );
        assert_eq!(svid.is_accepted(&bundle(&ca), now() + 2 * HOUR), Err(PeerRejection::Expired));
        assert_eq!(
            svid.is_accepted(&bundle(&authority()), now()),
            Err(PeerRejection::UnknownIssuer)
        );
        assert!(matches!(
            svid.is_accepted(&TrustBundle::default(), now()),
            Err(PeerRejection::WrongTrustDomain { .. })
        ));
        ca.revoke_leaf(svid.serial(), now());
        let revoked = Err(PeerRejection::Revoked { depth: 0 });
        assert_eq!(svid.is_accepted(&bundle(&ca), now()), revoked);
    }
}
