//! What a worker knows of its flows and tunnels, in a form that another process reads.
//!
//! JSON, so that a field that is new in a version is skipped by an older reader and has a default in a newer one. What many
//! flows have in common (workloads, services, labels) is written once.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use mesh_authorize::RuleRef;
use mesh_identity::{PeerCertificate, Side};
use mesh_model::{
    ClientAddr, Direction, Flow, FlowId, OrigDst, PodUid, Service, SpiffeId, Workload,
};
use mesh_resolve::{Authority, ResolvedFlow, Route};
use mesh_telemetry::{FlowBytes, FlowFacts, FlowPath};
use rustls_pki_types::CertificateDer;
use serde::{Deserialize, Serialize};

use super::HandOverRefused;
use crate::dataplane::telemetry::Story;

/// One worker.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(in crate::dataplane) struct WorkerState {
    /// Sockets, in the order of their descriptors.
    pub(super) sockets: Vec<SocketState>,
    /// Listeners, whose descriptors follow.
    pub(super) listeners: Vec<ListenerState>,
    pub(super) shared: SharedParts,
    pub(super) flows: Vec<FlowState>,
    pub(super) tunnels: Vec<TunnelState>,
    /// Accepted connections on which nothing has been decided.
    pub(super) waiting: Vec<WaitingState>,
    pub(super) certificates: Vec<CertificateState>,
    pub(super) next_stamp: u64,
}

#[derive(Debug, Serialize, Deserialize)]
pub(super) struct SocketState {
    pub(super) name: u64,
    pub(super) of_engine: bool,
    pub(super) prefix: Vec<u8>,
}

#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(super) struct ListenerState {
    /// The pod's number and which of its ports.
    pub(super) tag: u64,
    /// Its place in the kernel's table.
    pub(super) slot: u16,
}

/// What many flows have in common.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(super) struct SharedParts {
    workloads: Vec<Arc<Workload>>,
    services: Vec<Arc<Service>>,
    facts: Vec<Arc<FlowFacts>>,
}

#[derive(Debug, Serialize, Deserialize)]
pub(in crate::dataplane) struct FlowState {
    pub(in crate::dataplane) relay: u64,
    pub(in crate::dataplane) pod: u64,
    pub(in crate::dataplane) story: StoryState,
    pub(in crate::dataplane) peer: Option<SpiffeId>,
    pub(in crate::dataplane) asked: Option<Authority>,
    pub(in crate::dataplane) rule: Option<RuleRef>,
    pub(in crate::dataplane) cut_by: Option<RuleRef>,
    pub(in crate::dataplane) established: bool,
    /// A predecessor that does not say so had announced all that were established, as far as it knew.
    #[serde(default = "announced")]
    pub(in crate::dataplane) announced: bool,
    pub(in crate::dataplane) reported: FlowBytes,
}

const fn announced() -> bool {
    true
}

#[derive(Debug, Serialize, Deserialize)]
pub(in crate::dataplane) struct StoryState {
    flow: BareFlow,
    resolved: Option<ResolvedState>,
    facts: usize,
    path: FlowPath,
    authority: Option<Arc<str>>,
    trace: Option<String>,
}

/// A [`Flow`].
#[derive(Debug, Serialize, Deserialize)]
pub(in crate::dataplane) struct BareFlow {
    id: FlowId,
    direction: Direction,
    client: SocketAddr,
    orig_dst: SocketAddr,
    pod: PodUid,
    age: Duration,
}

#[derive(Debug, Serialize, Deserialize)]
struct ResolvedState {
    local: usize,
    peer: Option<usize>,
    service: Option<usize>,
    route: Route,
}

#[derive(Debug, Serialize, Deserialize)]
pub(in crate::dataplane) struct TunnelState {
    pub(in crate::dataplane) id: u64,
    pub(in crate::dataplane) peer: PeerState,
    /// The certificate that was shown to the peer.
    pub(in crate::dataplane) own: u64,
    pub(in crate::dataplane) distrusted: bool,
    /// Its certificates' ends were acted upon.
    pub(in crate::dataplane) ended: bool,
    pub(in crate::dataplane) role: RoleState,
}

#[derive(Debug, Serialize, Deserialize)]
pub(in crate::dataplane) enum RoleState {
    Dialled {
        pod: PodUid,
        source: SpiffeId,
        source_ip: IpAddr,
        next_hop: SocketAddr,
        target_uid: mesh_model::WorkloadUid,
        expected: Vec<SpiffeId>,
        own_not_after: SystemTime,
    },
    Accepted {
        pod: u64,
        from: SocketAddr,
        to: SocketAddr,
    },
}

/// A [`PeerCertificate`]: its chain, DER in base64.
#[derive(Debug, Serialize, Deserialize)]
pub(in crate::dataplane) struct PeerState {
    chain: Vec<String>,
    is_server: bool,
}

#[derive(Debug, Serialize, Deserialize)]
pub(super) struct WaitingState {
    pub(super) sock: u64,
    pub(super) pod: u64,
    /// None for a connection to the tunnel port.
    pub(super) flow: Option<BareFlow>,
}

/// The certificate that tunnels of an identity were made with.
#[derive(Debug, Serialize, Deserialize)]
pub(in crate::dataplane) struct CertificateState {
    pub(in crate::dataplane) identity: SpiffeId,
    pub(in crate::dataplane) stamp: u64,
    pub(in crate::dataplane) serial: Vec<u8>,
}

impl BareFlow {
    pub(super) fn of(flow: &Flow, now: Instant) -> Self {
        Self {
            id: flow.id,
            direction: flow.direction,
            client: flow.client.addr(),
            orig_dst: flow.orig_dst.addr(),
            pod: flow.pod.clone(),
            age: now.saturating_duration_since(flow.accepted_at),
        }
    }

    pub(super) fn flow(self, now: Instant) -> Flow {
        Flow {
            id: self.id,
            direction: self.direction,
            client: ClientAddr::new(self.client),
            orig_dst: OrigDst::new(self.orig_dst),
            pod: self.pod,
            accepted_at: now.checked_sub(self.age).unwrap_or(now),
        }
    }
}

/// Writes parts that flows have in common once.
#[derive(Default)]
pub(in crate::dataplane) struct Parts {
    parts: SharedParts,
    workloads: HashMap<*const Workload, usize>,
    services: HashMap<*const Service, usize>,
    facts: HashMap<FlowFacts, usize>,
}

impl Parts {
    pub(super) fn into_shared(self) -> SharedParts {
        self.parts
    }

    fn workload(&mut self, workload: &Arc<Workload>) -> usize {
        let all = &mut self.parts.workloads;
        *self.workloads.entry(Arc::as_ptr(workload)).or_insert_with(|| {
            all.push(Arc::clone(workload));
            all.len() - 1
        })
    }

    fn service(&mut self, service: &Arc<Service>) -> usize {
        let all = &mut self.parts.services;
        *self.services.entry(Arc::as_ptr(service)).or_insert_with(|| {
            all.push(Arc::clone(service));
            all.len() - 1
        })
    }

    pub(in crate::dataplane) fn story(&mut self, story: &Story, now: Instant) -> StoryState {
        let facts = match self.facts.get(&*story.facts) {
            Some(known) => *known,
            None => {
                let new = self.parts.facts.len();
                self.parts.facts.push(Arc::clone(&story.facts));
                self.facts.insert((*story.facts).clone(), new);
                new
            }
        };
        let resolved = story.resolved.as_ref().map(|resolved| ResolvedState {
            local: self.workload(&resolved.local),
            peer: resolved.peer.as_ref().map(|peer| self.workload(peer)),
            service: resolved.service.as_ref().map(|service| self.service(service)),
            route: resolved.route.clone(),
        });
        StoryState {
            flow: BareFlow::of(&story.flow, now),
            resolved,
            facts,
            path: story.path,
            authority: story.authority.clone(),
            trace: story.trace.map(|trace| trace.to_string()),
        }
    }
}

impl SharedParts {
    pub(super) fn story(&self, state: StoryState, now: Instant) -> Result<Story, HandOverRefused> {
        const PART: HandOverRefused = HandOverRefused::Inconsistent("a part that is not there");
        let flow = state.flow.flow(now);
        let resolved = match state.resolved {
            None => None,
            Some(resolved) => {
                let workload = |at: usize| self.workloads.get(at).cloned().ok_or(PART);
                let service = |at: usize| self.services.get(at).cloned().ok_or(PART);
                Some(ResolvedFlow::handed_over(
                    flow.clone(),
                    workload(resolved.local)?,
                    resolved.peer.map(workload).transpose()?,
                    resolved.service.map(service).transpose()?,
                    resolved.route,
                ))
            }
        };
        Ok(Story {
            flow,
            resolved,
            facts: self.facts.get(state.facts).cloned().ok_or(PART)?,
            path: state.path,
            authority: state.authority,
            trace: state.trace.and_then(|text| text.parse().ok()),
        })
    }
}

impl From<&PeerCertificate> for PeerState {
    fn from(peer: &PeerCertificate) -> Self {
        Self {
            chain: peer.chain().iter().map(|der| BASE64_STANDARD.encode(der)).collect(),
            is_server: peer.side() == Side::Server,
        }
    }
}

impl TryFrom<&PeerState> for PeerCertificate {
    type Error = HandOverRefused;

    fn try_from(state: &PeerState) -> Result<Self, HandOverRefused> {
        const CERTIFICATE: HandOverRefused = HandOverRefused::Inconsistent("a peer's certificate");
        let chain = state
            .chain
            .iter()
            .map(|text| BASE64_STANDARD.decode(text).map(CertificateDer::from))
            .collect::<Result<Vec<_>, _>>()
            .map_err(|_malformed| CERTIFICATE)?;
        let side = if state.is_server { Side::Server } else { Side::Client };
        Self::new(&chain, side).map_err(|_rejection| CERTIFICATE)
    }
}
