//! TLS settings of the pods' identities, parsed once per certificate and trust bundle.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::SystemTime;

use mesh_identity::{Svid, TrustBundle, tls};
use mesh_model::SpiffeId;
use mesh_net::handshake;
use rustls::{ClientConfig, ServerConfig};

use crate::dataplane::handover::state::CertificateState;
use crate::dataplane::shared::Snapshot;

/// Why there is nothing to shake hands with.
#[derive(Debug, thiserror::Error)]
pub(super) enum NoIdentity {
    /// No certificate has come yet.
    #[error("no certificate for the pod")]
    Missing,
    /// The certificate has expired, and no new one has come.
    #[error("the pod's certificate has expired")]
    Expired,
}

/// Names one certificate of one identity within a worker; never given twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct CertificateStamp(pub(super) u64);

/// What a dial here proves itself by.
#[derive(Clone, Copy, Debug)]
pub(super) struct OwnCertificate {
    pub(super) stamp: CertificateStamp,
    pub(super) not_after: SystemTime,
}

/// The certificate last used for an identity.
struct Entry {
    svid: Arc<Svid>,
    stamp: CertificateStamp,
    /// The server settings, and the bundle they were made with.
    server: Option<(Arc<TrustBundle>, Arc<ServerConfig>)>,
}

/// TLS settings by identity. Holds no more entries than the snapshot has certificates.
#[derive(Default)]
pub(super) struct TlsCache {
    entries: BTreeMap<SpiffeId, Entry>,
    next_stamp: u64,
}

impl TlsCache {
    /// Whether there is a certificate of `identity` to use.
    pub(super) fn check(
        &mut self,
        snapshot: &Snapshot,
        identity: &SpiffeId,
    ) -> Result<(), NoIdentity> {
        self.entry(snapshot, identity).map(|_entry| ())
    }

    /// Settings to dial as `source` and to accept only one of `expected`.
    pub(super) fn client(
        &mut self,
        snapshot: &Snapshot,
        source: &SpiffeId,
        expected: &[SpiffeId],
    ) -> Result<(Arc<ClientConfig>, OwnCertificate), NoIdentity> {
        let entry = self.entry(snapshot, source)?;
        let trust = Arc::clone(&snapshot.trust);
        let config = tls::client(&entry.svid, trust, expected.to_vec());
        Ok((handshake::client_config(config), entry.own()))
    }

    /// Settings to answer as `identity`, to any peer of its trust domain.
    pub(super) fn server(
        &mut self,
        snapshot: &Snapshot,
        identity: &SpiffeId,
    ) -> Result<(Arc<ServerConfig>, CertificateStamp), NoIdentity> {
        let entry = self.entry(snapshot, identity)?;
        if let Some((trust, config)) = &entry.server
            && Arc::ptr_eq(trust, &snapshot.trust)
        {
            return Ok((Arc::clone(config), entry.stamp));
        }
        let trust = Arc::clone(&snapshot.trust);
        let config = handshake::server_config(tls::server(&entry.svid, Arc::clone(&trust)));
        entry.server = Some((trust, Arc::clone(&config)));
        Ok((config, entry.stamp))
    }

    fn entry(
        &mut self,
        snapshot: &Snapshot,
        identity: &SpiffeId,
    ) -> Result<&mut Entry, NoIdentity> {
        let svid = snapshot.svids.get(identity).ok_or(NoIdentity::Missing)?;
        if !svid.is_usable(SystemTime::now()) {
            return Err(NoIdentity::Expired);
        }
        let is_known =
            self.entries.get(identity).is_some_and(|entry| Arc::ptr_eq(&entry.svid, svid));
        if !is_known {
            let stamp = CertificateStamp(self.next_stamp);
            self.next_stamp += 1;
            let fresh = Entry { svid: Arc::clone(svid), stamp, server: None };
            self.entries.insert(identity.clone(), fresh);
        }
        self.entries.get_mut(identity).ok_or(NoIdentity::Missing)
    }

    /// The certificates in use, for another process.
    pub(super) fn written(&self) -> Vec<CertificateState> {
        let write = |(identity, entry): (&SpiffeId, &Entry)| CertificateState {
            identity: identity.clone(),
            stamp: entry.stamp.0,
            serial: entry.svid.serial().to_vec(),
        };
        self.entries.iter().map(write).collect()
    }

    pub(super) const fn next_stamp(&self) -> u64 {
        self.next_stamp
    }

    /// Takes over a predecessor's names of the certificates that are here as well. Tunnels of others are made with one that
    /// was replaced.
    pub(super) fn take_over(
        &mut self,
        snapshot: &Snapshot,
        certificates: Vec<CertificateState>,
        next_stamp: u64,
    ) {
        self.next_stamp = self.next_stamp.max(next_stamp);
        for CertificateState { identity, stamp, serial } in certificates {
            let Some(svid) = snapshot.svids.get(&identity) else { continue };
            if svid.serial() == serial {
                let svid = Arc::clone(svid);
                let entry = Entry { svid, stamp: CertificateStamp(stamp), server: None };
                self.entries.insert(identity, entry);
            }
        }
    }

    /// Forgets certificates that were replaced, or that nobody needs any more.
    pub(super) fn forget_replaced(&mut self, snapshot: &Snapshot) {
        self.entries.retain(|identity, entry| entry.is_in_force(identity, snapshot));
    }

    /// True while the certificate of `stamp` is its identity's.
    pub(super) fn is_in_force(&self, snapshot: &Snapshot, stamp: CertificateStamp) -> bool {
        self.entries
            .iter()
            .any(|(identity, entry)| entry.stamp == stamp && entry.is_in_force(identity, snapshot))
    }

    /// The certificates last used, all of them in force after [`forget_replaced`](Self::forget_replaced).
    pub(super) fn stamps(&self) -> BTreeSet<CertificateStamp> {
        self.entries.values().map(|entry| entry.stamp).collect()
    }
}

impl Entry {
    fn own(&self) -> OwnCertificate {
        OwnCertificate { stamp: self.stamp, not_after: self.svid.not_after() }
    }

    fn is_in_force(&self, identity: &SpiffeId, snapshot: &Snapshot) -> bool {
        snapshot.svids.get(identity).is_some_and(|svid| Arc::ptr_eq(svid, &self.svid))
    }
}
