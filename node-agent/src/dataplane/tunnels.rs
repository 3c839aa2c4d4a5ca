//! The tunnels of one worker: who is at the other end, and under which name it was dialled.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Bound;
use std::sync::Arc;

use mesh_identity::PeerCertificate;
use mesh_model::{SpiffeId, WorkloadUid};
use mesh_net::driver::ops::Ends;
use mesh_tunnel::{DialId, TunnelId, TunnelKey};

use crate::dataplane::pods::Pod;

/// A tunnel that a peer dialled, with its proved peer.
#[derive(Clone, Debug)]
pub(super) struct ServerTunnel {
    pub(super) pod: Arc<Pod>,
    pub(super) peer: PeerCertificate,
    pub(super) ends: Ends,
}

#[derive(Debug)]
enum Tunnel {
    Dialled { key: Arc<TunnelKey>, peer: PeerCertificate },
    Accepted(ServerTunnel),
}

/// Tunnels up, and dials under way.
#[derive(Debug, Default)]
pub(super) struct Tunnels {
    up: BTreeMap<TunnelId, Tunnel>,
    dials: BTreeMap<DialId, Arc<TunnelKey>>,
    /// Accepted tunnels whose peer is trusted no more: its requests are refused while the tunnel ends.
    distrusted: BTreeSet<TunnelId>,
}

impl Tunnels {
    pub(super) fn dialling(&mut self, dial: DialId, key: &Arc<TunnelKey>) {
        self.dials.insert(dial, Arc::clone(key));
    }

    /// The dial has ended; with a tunnel, if one is up.
    pub(super) fn dial_ended(
        &mut self,
        dial: DialId,
        tunnel: Option<(TunnelId, PeerCertificate)>,
    ) -> Option<Arc<TunnelKey>> {
        let key = self.dials.remove(&dial)?;
        if let Some((tunnel, peer)) = tunnel {
            self.up.insert(tunnel, Tunnel::Dialled { key: Arc::clone(&key), peer });
        }
        Some(key)
    }

    pub(super) fn accepted(&mut self, id: TunnelId, tunnel: ServerTunnel) {
        self.up.insert(id, Tunnel::Accepted(tunnel));
    }

    pub(super) fn closed(&mut self, id: TunnelId) {
        self.up.remove(&id);
        self.distrusted.remove(&id);
    }

    /// The accepted tunnel `id`, if its peer may ask for connections.
    pub(super) fn server(&self, id: TunnelId) -> Option<&ServerTunnel> {
        match self.up.get(&id)? {
            Tunnel::Accepted(tunnel) if !self.distrusted.contains(&id) => Some(tunnel),
            Tunnel::Accepted(_) | Tunnel::Dialled { .. } => None,
        }
    }

    /// Who the far end of a tunnel proved to be.
    pub(super) fn peer(&self, id: TunnelId) -> Option<&SpiffeId> {
        match self.up.get(&id)? {
            Tunnel::Dialled { peer, .. } | Tunnel::Accepted(ServerTunnel { peer, .. }) => {
                Some(peer.id())
            }
        }
    }

    pub(super) fn distrust(&mut self, id: TunnelId) {
        self.distrusted.insert(id);
    }

    /// At most `limit` tunnels behind `cursor`, with the peer's certificate.
    pub(super) fn behind(
        &self,
        cursor: Option<TunnelId>,
        limit: usize,
    ) -> impl Iterator<Item = (TunnelId, &PeerCertificate)> {
        let from = cursor.map_or(Bound::Unbounded, Bound::Excluded);
        self.up.range((from, Bound::Unbounded)).take(limit).map(|(id, tunnel)| match tunnel {
            Tunnel::Dialled { peer, .. } | Tunnel::Accepted(ServerTunnel { peer, .. }) => {
                (*id, peer)
            }
        })
    }

    /// Tunnels dialled under `identity`.
    pub(super) fn dialled_as(&self, identity: &SpiffeId) -> Vec<TunnelId> {
        self.select(
            |tunnel| matches!(tunnel, Tunnel::Dialled { key, .. } if key.source == *identity),
        )
    }

    /// Tunnels accepted for `pod`.
    pub(super) fn accepted_for(&self, pod: &Pod) -> Vec<TunnelId> {
        self.select(|tunnel| matches!(tunnel, Tunnel::Accepted(t) if t.pod.key == pod.key))
    }

    fn select(&self, condition: impl Fn(&Tunnel) -> bool) -> Vec<TunnelId> {
        self.up.iter().filter(|(_, tunnel)| condition(tunnel)).map(|(id, _)| *id).collect()
    }

    /// The workloads that tunnels were dialled to, or are being dialled to.
    pub(super) fn targets(&self) -> BTreeSet<WorkloadUid> {
        let up = self.up.values().filter_map(|tunnel| match tunnel {
            Tunnel::Dialled { key, .. } => Some(&key.target_uid),
            Tunnel::Accepted(_) => None,
        });
        up.chain(self.dials.values().map(|key| &key.target_uid)).cloned().collect()
    }
}
