//! What the full policy says of two pods of this node: the same functions that carry and deliver their connections through
//! the agent, asked for both sides, and what the direct path needs beyond that.

#[cfg(test)]
pub(super) mod tests;

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Instant, SystemTime};

use mesh_authorize::{Decision, RuleRef, Verdict, authorize, authorize_egress};
use mesh_direct::{Judgement, Pair, Pod};
use mesh_ebpf::{PodSettings, port};
use mesh_identity::{PeerCertificate, PeerRejection, Side, Svid, TrustBundle};
use mesh_model::{
    ClientAddr, CloseReason, Direction, Flow, FlowId, HealthStatus, NetworkMode, OrigDst, PodUid,
    SpiffeId, Workload, ports,
};
use mesh_resolve::{
    Authority, ResolvedFlow, Route, TunnelRoute, Unroutable, resolve, resolve_inbound,
};
use mesh_telemetry::FlowFacts;
use serde::{Deserialize, Serialize};

use crate::dataplane::shared::{PodSockets, Snapshot};
use crate::dataplane::telemetry::direct_facts;

/// Whether pods of this node talk without the agent where policy allows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum SameNode {
    /// They do.
    Direct,
    /// Never: every connection is encrypted, also on one node.
    Tunnel,
}

/// A pod of this node.
#[derive(Debug)]
pub(super) struct LocalPod {
    pub(super) sockets: PodSockets,
    /// What is captured of it; none when a predecessor captured it and it is not enrolled here yet.
    pub(super) settings: Option<PodSettings>,
    /// Until when its connections may go on, once it is captured no more.
    pub(super) leaves_at: Option<Instant>,
}

/// The pods of this node, by the cookies of their namespaces.
#[derive(Debug, Default)]
pub(super) struct LocalPods {
    by_cookie: BTreeMap<u64, LocalPod>,
    by_address: BTreeMap<IpAddr, u64>,
}

impl LocalPods {
    pub(super) fn insert(&mut self, pod: LocalPod) {
        let cookie = pod.sockets.cookie;
        self.remove(cookie);
        self.by_address.extend(pod.sockets.addresses.iter().map(|address| (*address, cookie)));
        self.by_cookie.insert(cookie, pod);
    }

    /// The pod is captured no more; its connections may go on until then.
    pub(super) fn leaves(&mut self, cookie: u64, at: Instant) {
        if let Some(pod) = self.by_cookie.get_mut(&cookie) {
            pod.leaves_at = Some(at);
        }
    }

    pub(super) fn remove(&mut self, cookie: u64) -> Option<LocalPod> {
        self.by_address.retain(|_, owner| *owner != cookie);
        self.by_cookie.remove(&cookie)
    }

    /// The pods whose time is over.
    pub(super) fn left(&self, now: Instant) -> Vec<u64> {
        let over = |pod: &LocalPod| pod.leaves_at.is_some_and(|at| at <= now);
        self.by_cookie.iter().filter(|(_, pod)| over(pod)).map(|(cookie, _)| *cookie).collect()
    }

    pub(super) fn next_leave(&self) -> Option<Instant> {
        self.by_cookie.values().filter_map(|pod| pod.leaves_at).min()
    }

    /// The pods that are captured no more and whose connections go on.
    pub(super) fn leaving(&self) -> impl Iterator<Item = (Pod, &LocalPod)> {
        let leaving = self.by_cookie.iter().filter(|(_, pod)| pod.leaves_at.is_some());
        leaving.map(|(cookie, pod)| (Pod(*cookie), pod))
    }

    /// Whether one of the pair's pods is captured no more.
    pub(super) fn has_left(&self, pair: &Pair) -> bool {
        [pair.client, pair.server]
            .into_iter()
            .any(|pod| self.get(pod).is_none_or(|pod| pod.leaves_at.is_some()))
    }

    pub(super) fn get(&self, pod: Pod) -> Option<&LocalPod> {
        self.by_cookie.get(&pod.0)
    }

    /// Who has the address.
    pub(super) fn owner(&self, address: IpAddr) -> Option<Pod> {
        self.by_address.get(&address).copied().map(Pod)
    }

    /// The pod of that name or uid.
    pub(super) fn named(&self, name: &str) -> Option<Pod> {
        let is_it = |pod: &LocalPod| {
            let PodSockets { uid, namespace, name: own, .. } = &pod.sockets;
            uid.as_str() == name || name.split_once('/') == Some((namespace, own))
        };
        self.by_cookie.iter().find(|(_, pod)| is_it(pod)).map(|(cookie, _)| Pod(*cookie))
    }
}

/// A pod, as records name it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Name {
    pub(super) uid: PodUid,
    pub(super) namespace: Arc<str>,
    pub(super) name: Arc<str>,
}

impl Name {
    fn of(pod: Option<&LocalPod>) -> Self {
        pod.map_or_else(
            || Self { uid: PodUid::new("unknown"), namespace: "".into(), name: "".into() },
            |LocalPod { sockets, .. }| Self {
                uid: sockets.uid.clone(),
                namespace: Arc::clone(&sockets.namespace),
                name: Arc::clone(&sockets.name),
            },
        )
    }
}

/// What both reporters say of a pair's connections.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Sides {
    pub(super) client: Name,
    pub(super) server: Name,
    pub(super) source: Arc<FlowFacts>,
    pub(super) destination: Arc<FlowFacts>,
}

/// The answer about a pair.
#[derive(Clone, Debug)]
pub(super) struct Judged {
    pub(super) judgement: Judgement,
    /// Why, in words.
    pub(super) because: Cow<'static, str>,
    /// The rule that decided.
    pub(super) rule: Option<RuleRef>,
    /// Why a connection ends that is cut for it.
    pub(super) reason: CloseReason,
    pub(super) sides: Arc<Sides>,
}

/// What is looked at.
pub(super) struct Ground<'g> {
    pub(super) same_node: SameNode,
    pub(super) snapshot: &'g Snapshot,
    pub(super) pods: &'g LocalPods,
    pub(super) certificates: &'g mut Certificates,
    pub(super) wall: SystemTime,
}

/// Why there is no verdict.
struct No {
    judgement: Judgement,
    because: Cow<'static, str>,
    rule: Option<RuleRef>,
    reason: CloseReason,
}

fn hold(because: impl Into<Cow<'static, str>>) -> No {
    let reason = CloseReason::Complete;
    No { judgement: Judgement::Hold, because: because.into(), rule: None, reason }
}

fn deny(reason: CloseReason, because: impl Into<Cow<'static, str>>) -> No {
    No { judgement: Judgement::Deny, because: because.into(), rule: None, reason }
}

/// Judges a pair on the picture of now.
pub(super) fn judge(ground: &mut Ground<'_>, pair: &Pair) -> Judged {
    let (client, server) = (ground.pods.get(pair.client), ground.pods.get(pair.server));
    let mut sides = Sides {
        client: Name::of(client),
        server: Name::of(server),
        source: Arc::new(FlowFacts::unknown(mesh_model::Reporter::Source)),
        destination: Arc::new(FlowFacts::unknown(mesh_model::Reporter::Destination)),
    };
    let outcome = look(ground, pair, &mut sides);
    let sides = Arc::new(sides);
    match outcome {
        Ok(rule) => Judged {
            judgement: Judgement::Grant,
            because: "both are captured here and policy allows it".into(),
            rule,
            reason: CloseReason::Complete,
            sides,
        },
        Err(No { judgement, because, rule, reason }) => {
            Judged { judgement, because, rule, reason, sides }
        }
    }
}

/// The rule that grants, or why not. What denies is looked for first, since a denial ends open connections and anything else
/// only keeps new ones with the agent.
fn look(ground: &mut Ground<'_>, pair: &Pair, sides: &mut Sides) -> Result<Option<RuleRef>, No> {
    if ground.same_node == SameNode::Tunnel {
        return Err(deny(CloseReason::PolicyChanged, "this node's setting is --same-node tunnel"));
    }
    let (Some(client), Some(server)) = (ground.pods.get(pair.client), ground.pods.get(pair.server))
    else {
        return Err(deny(CloseReason::Drained, "a pod is not captured here"));
    };
    let tunnels =
        |pod: &LocalPod| pod.settings.as_ref().is_some_and(|settings| settings.tunnel_same_node);
    if tunnels(client) || tunnels(server) {
        return Err(deny(
            CloseReason::PolicyChanged,
            "a pod or its namespace is set to culvert.dev/same-node: tunnel",
        ));
    }
    let snapshot = ground.snapshot;
    if !snapshot.synced {
        return Err(hold("the controller has not said everything yet"));
    }
    let own_first = |address: &&IpAddr| address.is_ipv4() == pair.client_address.is_ipv4();
    if client.sockets.addresses.iter().find(own_first) != Some(&pair.client_address)
        || !server.sockets.addresses.contains(&pair.target.ip())
    {
        return Err(deny(CloseReason::WrongDestination, "the addresses are not the pods' own"));
    }
    if ports::is_agent_port(pair.target.port()) {
        return Err(deny(CloseReason::LoopRefused, "the port is the agent's"));
    }
    let (Some(source), Some(target)) =
        (client.sockets.workload(snapshot), server.sockets.workload(snapshot))
    else {
        return Err(hold("a pod's workload is not known"));
    };
    let outbound = resolve_outbound(snapshot, pair, client, &source)?;
    let (source_id, target_id) = (identity(&source)?, identity(&target)?);
    let inbound = resolve_delivery(snapshot, pair, server, &target)?;
    sides.source = Arc::new(direct_facts(&outbound, &source_id, &target_id));
    sides.destination = Arc::new(direct_facts(&inbound, &source_id, &target_id));

    let (_no_rule, egress_noted) = allowed(authorize_egress(&snapshot.policies, &outbound))?;
    let (rule, noted) = allowed(authorize(&snapshot.policies, &inbound, Some(&source_id)))?;
    for id in [&source_id, &target_id] {
        ground.certificates.check(snapshot, id, ground.wall)?;
    }
    captured(pair, client, server)?;
    goes_to_pod(snapshot, pair, &source, &target, &outbound, &target_id)?;
    is_delivered_as_dialled(pair, &inbound)?;
    if egress_noted || noted {
        return Err(hold("a policy in audit mode or dry run wants to see each connection"));
    }
    Ok(rule)
}

fn identity(workload: &Workload) -> Result<SpiffeId, No> {
    workload.identity().map_err(|_invalid| hold("a workload has no valid identity"))
}

/// A connection that was captured in `pod`.
pub(super) fn flow(
    client: IpAddr,
    target: SocketAddr,
    direction: Direction,
    pod: &LocalPod,
) -> Flow {
    Flow {
        id: FlowId(0),
        direction,
        client: ClientAddr::new(SocketAddr::new(client, 0)),
        orig_dst: OrigDst::new(target),
        pod: pod.sockets.uid.clone(),
        accepted_at: Instant::now(),
    }
}

/// Where the client's agent would send it.
fn resolve_outbound(
    snapshot: &Snapshot,
    pair: &Pair,
    client: &LocalPod,
    source: &Arc<Workload>,
) -> Result<ResolvedFlow, No> {
    let flow = flow(pair.client_address, pair.target, Direction::Outbound, client);
    match resolve(&snapshot.index, &snapshot.settings, &flow, source, 0) {
        Ok(ResolvedFlow { route: Route::ViaWaypoint { waypoint, .. }, .. }) => {
            Err(deny(CloseReason::PolicyChanged, format!("the waypoint {waypoint} is on the way")))
        }
        Ok(resolved) => Ok(resolved),
        Err(unroutable @ Unroutable::WaypointUnavailable { .. }) => {
            Err(deny(CloseReason::WaypointUnavailable, unroutable.to_string()))
        }
        Err(unroutable) => Err(hold(unroutable.to_string())),
    }
}

/// What the server's agent would do with it.
fn resolve_delivery(
    snapshot: &Snapshot,
    pair: &Pair,
    server: &LocalPod,
    target: &Arc<Workload>,
) -> Result<ResolvedFlow, No> {
    // As through the tunnel: the client's identity is known.
    let flow = flow(pair.client_address, pair.target, Direction::InboundTunnel, server);
    let authority = Authority::Address(pair.target);
    resolve_inbound(&snapshot.index, &snapshot.settings, &flow, target, Some(&authority))
        .map_err(|unroutable| hold(unroutable.to_string()))
}

/// The rule that allows, and whether anything is noted of it.
fn allowed(verdict: Verdict) -> Result<(Option<RuleRef>, bool), No> {
    match verdict.decision {
        Decision::Allow(permit) => Ok((permit.rule().cloned(), !verdict.notes.is_empty())),
        // As on the agent's own path: a destination that is not known any more ends no open connection.
        Decision::Deny(denial) if denial.reason == CloseReason::UnknownDestination => {
            Err(hold(denial.to_string()))
        }
        Decision::Deny(denial) => Err(No {
            judgement: Judgement::Deny,
            because: denial.to_string().into(),
            rule: denial.rule,
            reason: denial.reason,
        }),
    }
}

/// Both ends are captured for this connection, so that the kernel's side looks at the verdict and tells of it.
fn captured(pair: &Pair, client: &LocalPod, server: &LocalPod) -> Result<(), No> {
    if client.leaves_at.is_some() || server.leaves_at.is_some() {
        return Err(hold("a pod is leaving the mesh"));
    }
    let (Some(client), Some(server)) = (&client.settings, &server.settings) else {
        return Err(hold("a pod is being taken over"));
    };
    let (ip, number) = (pair.target.ip(), pair.target.port());
    if !client.capture_outbound || !client.outbound.selects(ip, number) {
        return Err(hold("the client's settings exclude it from capture"));
    }
    if client.dns_capture && number == DNS {
        return Err(hold("the agent's resolver answers it"));
    }
    if !server.capture_inbound || !server.inbound.selects(pair.client_address, number) {
        return Err(hold("the server's settings exclude it from capture"));
    }
    Ok(())
}

pub(super) const DNS: u16 = 53;
const _: () = assert!(DNS != port::RESOLVER);

/// The agent would reach exactly this pod, by a tunnel to it.
fn goes_to_pod(
    snapshot: &Snapshot,
    pair: &Pair,
    source: &Workload,
    target: &Workload,
    outbound: &ResolvedFlow,
    target_id: &SpiffeId,
) -> Result<(), No> {
    if source.network != target.network {
        return Err(hold("the pods are on two networks"));
    }
    let of_host = |workload: &Workload| workload.network_mode == NetworkMode::HostNetwork;
    if of_host(source) || of_host(target) {
        return Err(hold("a pod shares the node's network"));
    }
    if target.status == HealthStatus::Unhealthy {
        return Err(hold("the server is not ready, or going away"));
    }
    if target.waypoint.is_some() {
        return Err(hold("a waypoint is bound to the server"));
    }
    let namespace = &source.namespace;
    if snapshot.index.find_service_by_vip(&source.network, pair.target.ip(), namespace).is_some() {
        return Err(hold(
            "the address is a service's too, whose endpoint is chosen for each connection",
        ));
    }
    let Route::Tunnel(TunnelRoute { next_hop, authority, expected, target_uid, gateway }) =
        &outbound.route
    else {
        return Err(hold("the agent reaches the server without a tunnel"));
    };
    let there = next_hop.ip() == pair.target.ip()
        && *authority == Authority::Address(pair.target)
        && expected.contains(target_id)
        && *target_uid == target.uid
        && gateway.is_none();
    if there { Ok(()) } else { Err(hold("the agent sends it elsewhere")) }
}

/// The agent would hand it to the very port that was dialled, with nothing in front.
fn is_delivered_as_dialled(pair: &Pair, inbound: &ResolvedFlow) -> Result<(), No> {
    match &inbound.route {
        Route::Deliver { target, dial, proxy_header: None, waypoint: None }
            if *target == pair.target && *dial == pair.target =>
        {
            Ok(())
        }
        Route::Deliver { .. }
        | Route::Tunnel(_)
        | Route::ViaWaypoint { .. }
        | Route::Passthrough { .. } => Err(hold("the server takes it in another form")),
    }
}

/// Whether the pods could prove their identities, remembered: to check a chain takes some hundred microseconds.
#[derive(Default)]
pub(super) struct Certificates {
    checked: HashMap<SpiffeId, Checked>,
}

struct Checked {
    svid: Arc<Svid>,
    trust: Arc<TrustBundle>,
    outcome: Result<(), (CloseReason, Arc<str>)>,
}

impl Certificates {
    pub(super) fn forget(&mut self) {
        self.checked.clear();
    }

    /// A certificate that is missing or over keeps new connections with the agent; one that is trusted no more ends the
    /// open ones, as in a tunnel.
    fn check(&mut self, snapshot: &Snapshot, id: &SpiffeId, wall: SystemTime) -> Result<(), No> {
        let Some(svid) = snapshot.svids.get(id).filter(|svid| svid.is_usable(wall)) else {
            return Err(hold(format!("there is no valid certificate of {id}")));
        };
        let known = self.checked.get(id).filter(|known| {
            Arc::ptr_eq(&known.svid, svid) && Arc::ptr_eq(&known.trust, &snapshot.trust)
        });
        let outcome = match known {
            Some(known) => known.outcome.clone(),
            None => {
                let outcome = trusted(svid, &snapshot.trust, wall).map_err(|rejection| {
                    (rejection.close_reason(), Arc::from(rejection.to_string()))
                });
                let checked = Checked {
                    svid: Arc::clone(svid),
                    trust: Arc::clone(&snapshot.trust),
                    outcome: outcome.clone(),
                };
                self.checked.insert(id.clone(), checked);
                outcome
            }
        };
        outcome.map_err(|(reason, why)| deny(reason, format!("the certificate of {id}: {why}")))
    }
}

fn trusted(svid: &Svid, trust: &TrustBundle, wall: SystemTime) -> Result<(), PeerRejection> {
    PeerCertificate::new(svid.chain(), Side::Client)?.is_trusted(trust, wall)
}
