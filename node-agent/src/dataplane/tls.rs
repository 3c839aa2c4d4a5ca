//! TLS settings of the pods' identities, parsed once per certificate and trust bundle.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::SystemTime;

use mesh_identity::{Svid, TrustBundle, tls};
use mesh_model::SpiffeId;
use mesh_net::handshake;
use rustls::{ClientConfig, ServerConfig};

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

/// The certificate last used for an identity.
struct Entry {
    svid: Arc<Svid>,
    /// The server settings, and the bundle they were made with.
    server: Option<(Arc<TrustBundle>, Arc<ServerConfig>)>,
}

/// TLS settings by identity. Holds no more entries than the snapshot has certificates.
#[derive(Default)]
pub(super) struct TlsCache {
    entries: BTreeMap<SpiffeId, Entry>,
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
    ) -> Result<Arc<ClientConfig>, NoIdentity> {
        let entry = self.entry(snapshot, source)?;
        let trust = Arc::clone(&snapshot.trust);
        Ok(handshake::client_config(tls::client(&entry.svid, trust, expected.to_vec())))
    }

    /// Settings to answer as `identity`, to any peer of its trust domain.
    pub(super) fn server(
        &mut self,
        snapshot: &Snapshot,
        identity: &SpiffeId,
    ) -> Result<Arc<ServerConfig>, NoIdentity> {
        let entry = self.entry(snapshot, identity)?;
        if let Some((trust, config)) = &entry.server
            && Arc::ptr_eq(trust, &snapshot.trust)
        {
            return Ok(Arc::clone(config));
        }
        let trust = Arc::clone(&snapshot.trust);
        let config = handshake::server_config(tls::server(&entry.svid, Arc::clone(&trust)));
        entry.server = Some((trust, Arc::clone(&config)));
        Ok(config)
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
        let fresh = || Entry { svid: Arc::clone(svid), server: None };
        let entry = self.entries.entry(identity.clone()).or_insert_with(fresh);
        if !Arc::ptr_eq(&entry.svid, svid) {
            *entry = fresh();
        }
        Ok(entry)
    }

    /// Forgets certificates that are no longer used, and names the identities whose certificate was replaced.
    pub(super) fn renew(&mut self, snapshot: &Snapshot) -> Vec<SpiffeId> {
        self.entries.retain(|identity, _| snapshot.svids.contains_key(identity));
        let replaced: Vec<SpiffeId> = self
            .entries
            .iter()
            .filter(|(identity, entry)| {
                snapshot.svids.get(*identity).is_some_and(|svid| !Arc::ptr_eq(svid, &entry.svid))
            })
            .map(|(identity, _)| identity.clone())
            .collect();
        for identity in &replaced {
            self.entries.remove(identity);
        }
        replaced
    }
}
