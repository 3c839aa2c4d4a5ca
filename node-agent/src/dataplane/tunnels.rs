//! The tunnels of one worker: who is at the other end, and under which name it was dialled.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Bound;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use mesh_identity::PeerCertificate;
use mesh_model::{SpiffeId, WorkloadUid};
use mesh_net::driver::ops::Ends;
use mesh_tunnel::{DialId, TunnelId, TunnelKey};

use crate::dataplane::handover::state::{RoleState, TunnelState};
use crate::dataplane::pods::Pod;
use crate::dataplane::stats::TunnelRole;
use crate::dataplane::tls::{CertificateStamp, OwnCertificate};

/// How much longer an accepting side takes new streams under its peer's certificate than the certificate says.
///
/// The dialling side stops at the end itself, by its own clock; clocks of nodes that are set from one source differ by
/// far less. Source: NTP keeps them within 100 ms over the Internet (RFC 5905 §1); the rest is for streams on their way.
pub(super) const CLOCK_SKEW: Duration = Duration::from_secs(5);

/// A tunnel that a peer dialled, with its proved peer.
#[derive(Clone, Debug)]
pub(super) struct ServerTunnel {
    pub(super) pod: Arc<Pod>,
    /// The certificate that was shown to the peer.
    pub(super) own: CertificateStamp,
    pub(super) peer: PeerCertificate,
    pub(super) ends: Ends,
}

impl ServerTunnel {
    /// Until when the peer may ask for connections.
    pub(super) fn end(&self) -> SystemTime {
        self.peer.not_after() + CLOCK_SKEW
    }
}

/// A dial under way.
#[derive(Debug)]
struct Dial {
    key: Arc<TunnelKey>,
    own: OwnCertificate,
}

#[derive(Debug)]
enum Tunnel {
    Dialled { key: Arc<TunnelKey>, own: OwnCertificate, peer: PeerCertificate },
    Accepted(ServerTunnel),
}

impl Tunnel {
    const fn role(&self) -> TunnelRole {
        match self {
            Self::Dialled { .. } => TunnelRole::Client,
            Self::Accepted(_) => TunnelRole::Server,
        }
    }

    /// From when on it takes no new streams, because a certificate has ended.
    fn end(&self) -> SystemTime {
        match self {
            Self::Dialled { own, peer, .. } => own.not_after.min(peer.not_after()),
            Self::Accepted(tunnel) => tunnel.end(),
        }
    }
}

/// Tunnels up, and dials under way.
#[derive(Debug, Default)]
pub(super) struct Tunnels {
    up: BTreeMap<TunnelId, Tunnel>,
    dials: BTreeMap<DialId, Dial>,
    /// Those that still take streams, by when a certificate of theirs ends.
    ends: BTreeSet<(SystemTime, TunnelId)>,
    /// Accepted tunnels whose peer is trusted no more: its requests are refused while the tunnel ends.
    distrusted: BTreeSet<TunnelId>,
}

impl Tunnels {
    pub(super) fn dialling(&mut self, dial: DialId, key: &Arc<TunnelKey>, own: OwnCertificate) {
        self.dials.insert(dial, Dial { key: Arc::clone(key), own });
    }

    /// The dial came to nothing.
    pub(super) fn dial_failed(&mut self, dial: DialId) -> Option<Arc<TunnelKey>> {
        self.dials.remove(&dial).map(|dial| dial.key)
    }

    /// The dial has brought `tunnel`, or one that nobody wants any more; gives what we proved ourselves by.
    pub(super) fn dialled(
        &mut self,
        dial: DialId,
        tunnel: Option<TunnelId>,
        peer: PeerCertificate,
    ) -> Option<OwnCertificate> {
        let Dial { key, own } = self.dials.remove(&dial)?;
        self.add(tunnel?, Tunnel::Dialled { key, own, peer });
        Some(own)
    }

    pub(super) fn accepted(&mut self, id: TunnelId, tunnel: ServerTunnel) {
        self.add(id, Tunnel::Accepted(tunnel));
    }

    fn add(&mut self, id: TunnelId, tunnel: Tunnel) {
        self.ends.insert((tunnel.end(), id));
        self.up.insert(id, tunnel);
    }

    /// All tunnels, for another process.
    pub(super) fn written(&self) -> Vec<TunnelState> {
        let write = |(id, tunnel): (&TunnelId, &Tunnel)| {
            let (peer, own, role) = match tunnel {
                Tunnel::Dialled { key, own, peer } => {
                    let TunnelKey { pod, source, source_ip, next_hop, target_uid, expected } =
                        TunnelKey::clone(key);
                    let own_not_after = own.not_after;
                    let role = RoleState::Dialled {
                        pod,
                        source,
                        source_ip,
                        next_hop,
                        target_uid,
                        expected,
                        own_not_after,
                    };
                    (peer, own.stamp, role)
                }
                Tunnel::Accepted(ServerTunnel { pod, own, peer, ends }) => {
                    let (pod, from, to) = (pod.key.0, ends.peer, ends.local);
                    (peer, *own, RoleState::Accepted { pod, from, to })
                }
            };
            TunnelState {
                id: id.get(),
                peer: peer.into(),
                own: own.0,
                distrusted: self.distrusted.contains(id),
                ended: !self.ends.contains(&(tunnel.end(), *id)),
                role,
            }
        };
        self.up.iter().map(write).collect()
    }

    /// A tunnel of a predecessor; `pod` is whose it is, if it was accepted. One of a pod that is gone is left out: its requests
    /// are refused.
    pub(super) fn take_over(
        &mut self,
        state: &TunnelState,
        peer: PeerCertificate,
        pod: Option<Arc<Pod>>,
    ) -> Option<TunnelRole> {
        let (id, stamp) = (TunnelId::handed_over(state.id), CertificateStamp(state.own));
        let tunnel = match &state.role {
            RoleState::Dialled {
                pod,
                source,
                source_ip,
                next_hop,
                target_uid,
                expected,
                own_not_after,
            } => {
                let key = Arc::new(TunnelKey {
                    pod: pod.clone(),
                    source: source.clone(),
                    source_ip: *source_ip,
                    next_hop: *next_hop,
                    target_uid: target_uid.clone(),
                    expected: expected.clone(),
                });
                let own = OwnCertificate { stamp, not_after: *own_not_after };
                Tunnel::Dialled { key, own, peer }
            }
            RoleState::Accepted { pod: _, from, to } => {
                let pod = pod?;
                let ends = Ends { peer: *from, local: *to };
                Tunnel::Accepted(ServerTunnel { pod, own: stamp, peer, ends })
            }
        };
        if state.distrusted {
            self.distrusted.insert(id);
        }
        let (end, role) = (tunnel.end(), tunnel.role());
        self.add(id, tunnel);
        if state.ended {
            self.ends.remove(&(end, id));
        }
        Some(role)
    }

    /// Forgets a tunnel; gives the role in which it was known.
    pub(super) fn closed(&mut self, id: TunnelId) -> Option<TunnelRole> {
        self.distrusted.remove(&id);
        let tunnel = self.up.remove(&id)?;
        self.ends.remove(&(tunnel.end(), id));
        Some(tunnel.role())
    }

    /// When the next certificate of a tunnel ends.
    pub(super) fn next_end(&self) -> Option<SystemTime> {
        self.ends.first().map(|(end, _)| *end)
    }

    /// A tunnel with a certificate that has ended by `now`; each is named once.
    pub(super) fn pop_ended(&mut self, now: SystemTime) -> Option<TunnelId> {
        let &(end, id) = self.ends.first()?;
        if end > now {
            return None;
        }
        self.ends.pop_first();
        Some(id)
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

    /// The certificate that the far end of a tunnel has shown.
    pub(super) fn certificate(&self, id: TunnelId) -> Option<&PeerCertificate> {
        match self.up.get(&id)? {
            Tunnel::Dialled { peer, .. } | Tunnel::Accepted(ServerTunnel { peer, .. }) => {
                Some(peer)
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

    /// Tunnels of either direction for whose own certificate `condition` holds.
    pub(super) fn proved_by(&self, condition: impl Fn(CertificateStamp) -> bool) -> Vec<TunnelId> {
        self.select(|tunnel| match tunnel {
            Tunnel::Dialled { own, .. } => condition(own.stamp),
            Tunnel::Accepted(ServerTunnel { own, .. }) => condition(*own),
        })
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
        up.chain(self.dials.values().map(|dial| &dial.key.target_uid)).cloned().collect()
    }
}
