//! Would a connection happen, and what decides: the agents' own resolve and authorize, run on the whole mesh.
//!
//! The answer is JSON, shared with the command line: [`Question`] in, [`Answer`] out, of `GET /explain?from=…&to=…`.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Instant;

use mesh_authorize::{Denial, Explanation, Outcome, explain, explain_egress};
use mesh_model::{
    ClientAddr, CloseReason, Direction, Flow, FlowId, NetworkMode, OrigDst, PodUid, SpiffeId,
    TunnelProtocol, Workload,
};
use mesh_resolve::{
    Authority, ResolveSettings, ResolvedFlow, Route, Step, Trace, Unroutable, WorkloadIndex,
    resolve_inbound_traced, resolve_traced,
};
use serde::{Deserialize, Serialize};

use crate::mesh::Picture;

/// What is asked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Question {
    /// Who dials: `namespace/name` of a pod or WorkloadEntry, a workload uid, or an address.
    pub from: String,
    /// What is dialled: an address, a host name, `service.namespace`, a service's short name, or `namespace/pod`.
    pub to: String,
    /// The port that is dialled.
    pub port: u16,
}

/// What would happen.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Answer {
    /// True when the connection would be made.
    pub allowed: bool,
    /// Why it would not.
    pub reason: Option<CloseReason>,
    /// One sentence: what decides.
    pub summary: String,
    /// The stages in order, up to the one that decides.
    pub stages: Vec<Stage>,
    /// What the answer rests on and may not hold.
    #[serde(default)]
    pub warnings: Vec<String>,
}

/// One stage.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stage {
    /// `source` or `destination`: whose agent.
    pub side: Side,
    /// The workload there.
    pub workload: String,
    /// How its address was found and where it leads.
    pub resolve: Vec<Step>,
    /// What policies say; none when there was no way to judge.
    pub authorize: Option<Explanation>,
    /// The outcome in one sentence.
    pub outcome: String,
}

/// Whose agent decides.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Side {
    /// The client's.
    Source,
    /// The server's.
    Destination,
}

/// A question that cannot be asked.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidQuestion {
    /// Nothing is called so.
    #[error("no workload {from:?}; write namespace/name, a workload uid or an address")]
    UnknownSource {
        /// What was asked.
        from: String,
    },
    /// Nothing is called so, or it has no address.
    #[error("{to:?} is no address, and no service or workload with an address")]
    UnknownDestination {
        /// What was asked.
        to: String,
    },
}

/// Answers a question. `now` only stamps the flow.
///
/// # Errors
/// When source or destination cannot be found.
pub fn answer(
    picture: &Picture,
    settings: &ResolveSettings,
    question: &Question,
    now: Instant,
) -> Result<Answer, InvalidQuestion> {
    let index = &picture.index;
    let source = find_workload(index, &question.from)
        .ok_or_else(|| InvalidQuestion::UnknownSource { from: question.from.clone() })?;
    let ip = find_address(index, &source, &question.to)
        .ok_or_else(|| InvalidQuestion::UnknownDestination { to: question.to.clone() })?;
    let target = SocketAddr::new(ip, question.port);
    let client = source
        .addresses
        .iter()
        .find(|own| own.is_ipv4() == ip.is_ipv4())
        .or_else(|| source.addresses.first());
    let client = SocketAddr::new(client.copied().unwrap_or(ip), 0);
    let flow = |direction, client, target, pod: &Workload| Flow {
        id: FlowId(0),
        direction,
        client: ClientAddr::new(client),
        orig_dst: OrigDst::new(target),
        pod: PodUid::new(pod.uid.as_str()),
        accepted_at: now,
    };
    let mut stages = Vec::new();
    let mut warnings = Vec::new();
    match Capture::of(picture, &source) {
        Capture::Captured => {}
        Capture::Unconfirmed(why) => warnings.push(why),
        Capture::Not(why) => {
            return Ok(plain_source(picture, settings, &source, &why, flow, client, target));
        }
    }
    let outbound = flow(Direction::Outbound, client, target, &source);
    let route = match outbound_stage(picture, settings, &outbound, &source) {
        Ok((stage, resolved)) => {
            stages.push(stage);
            resolved
        }
        Err(decided) => return Ok(Answer { warnings, ..refused(stages, decided) }),
    };
    let (next, authority, identity) = match &route.route {
        Route::Tunnel(tunnel) | Route::ViaWaypoint { tunnel, .. } => {
            (tunnel.next_hop.ip(), Some(tunnel.authority.clone()), source.identity().ok())
        }
        Route::Passthrough { target, .. } | Route::Deliver { target, .. } => {
            (target.ip(), None, None)
        }
    };
    let Some(local) = route.peer.clone() else {
        let outcome = "the destination is outside the mesh; nothing more decides";
        return Ok(Answer { warnings, ..done(stages, outcome) });
    };
    match Capture::of(picture, &local) {
        Capture::Captured => {}
        Capture::Unconfirmed(why) => warnings.push(why),
        Capture::Not(why) if authority.is_some() => {
            let stage = Stage {
                side: Side::Destination,
                workload: local.uid.to_string(),
                resolve: Vec::new(),
                authorize: None,
                outcome: format!("{why}: nobody answers the tunnel"),
            };
            let decided = Box::new((stage, CloseReason::TunnelConnectFailed));
            return Ok(Answer { warnings, ..refused(stages, decided) });
        }
        Capture::Not(why) => {
            let outcome = format!("{why}: it is reached in plaintext and nothing more decides");
            return Ok(Answer { warnings, ..done(stages, &outcome) });
        }
    }
    let port = authority.as_ref().map_or_else(|| route.route.next_hop().port(), Authority::port);
    let direction =
        if authority.is_some() { Direction::InboundTunnel } else { Direction::InboundPlaintext };
    let inbound = flow(direction, client, SocketAddr::new(next, port), &local);
    let answer = inbound_stage(
        picture,
        settings,
        stages,
        &inbound,
        &local,
        authority.as_ref(),
        identity.as_ref(),
    );
    Ok(Answer { warnings, ..answer })
}

/// Whether a workload's connections are the mesh's.
enum Capture {
    /// Its node's agent says so.
    Captured,
    /// The mesh holds it to be; its node's agent has not said.
    Unconfirmed(String),
    /// It is not.
    Not(String),
}

impl Capture {
    fn of(picture: &Picture, workload: &Workload) -> Self {
        let Workload { namespace, name, node, .. } = workload;
        if workload.network_mode != NetworkMode::Standard {
            return Self::Not(format!("{namespace}/{name} is in its node's network"));
        }
        if workload.tunnel_protocol != TunnelProtocol::Hbone {
            return Self::Not(format!(
                "{namespace}/{name} is not in the mesh, or its node's agent has yet to capture it"
            ));
        }
        match picture.captured.reported(node, namespace, name) {
            Some(true) => Self::Captured,
            Some(false) => Self::Not(format!(
                "{namespace}/{name} is in the mesh, but the agent of node {node} does not capture it"
            )),
            // Nobody's pod: a gateway of another network.
            None if node.is_empty() => Self::Captured,
            None => Self::Unconfirmed(format!(
                "the agent of node {node} has not reported here; {namespace}/{name} is taken as captured"
            )),
        }
    }
}

/// A client that is not captured dials the destination itself, in plaintext.
fn plain_source(
    picture: &Picture,
    settings: &ResolveSettings,
    source: &Arc<Workload>,
    why: &str,
    flow: impl Fn(Direction, SocketAddr, SocketAddr, &Workload) -> Flow,
    client: SocketAddr,
    target: SocketAddr,
) -> Answer {
    let stage = |outcome: String| Stage {
        side: Side::Source,
        workload: source.uid.to_string(),
        resolve: Vec::new(),
        authorize: None,
        outcome,
    };
    let on_its_own = || {
        let outcome = format!("{why}: its own network decides where this goes");
        done(vec![stage(outcome.clone())], &outcome)
    };
    let Some(local) = picture.index.workload_by_ip(&source.network, target.ip()) else {
        return on_its_own();
    };
    let mut warnings = Vec::new();
    match Capture::of(picture, local) {
        Capture::Captured => {}
        Capture::Unconfirmed(why) => warnings.push(why),
        Capture::Not(_) => return on_its_own(),
    }
    let stages = vec![stage(format!("{why}: it dials in plaintext"))];
    let inbound = flow(Direction::InboundPlaintext, client, target, local);
    let answer = inbound_stage(picture, settings, stages, &inbound, local, None, None);
    Answer { warnings, ..answer }
}

type Refused = (Stage, CloseReason);

fn outbound_stage(
    picture: &Picture,
    settings: &ResolveSettings,
    flow: &Flow,
    source: &Arc<Workload>,
) -> Result<(Stage, ResolvedFlow), Box<Refused>> {
    let mut trace = Trace::on();
    let resolved = resolve_traced(&picture.index, settings, flow, source, 0, &mut trace);
    let mut stage = Stage {
        side: Side::Source,
        workload: source.uid.to_string(),
        resolve: trace.into_steps(),
        authorize: None,
        outcome: String::new(),
    };
    let resolved = match resolved {
        Ok(resolved) => resolved,
        Err(Unroutable::NeedsDns(pending)) => {
            stage.outcome =
                format!("{} is looked up in DNS by the agent, then dialled", pending.hostname());
            return Err(Box::new((stage, CloseReason::Complete)));
        }
        Err(unroutable) => {
            stage.outcome = unroutable.to_string();
            return Err(Box::new((stage, unroutable.close_reason())));
        }
    };
    let explanation = explain_egress(&picture.policies, &resolved);
    let denial = denial(&explanation);
    stage.authorize = Some(explanation);
    if let Some(denial) = denial {
        stage.outcome = denial.to_string();
        return Err(Box::new((stage, denial.reason)));
    }
    stage.outcome = match &resolved.route {
        Route::Tunnel(tunnel) => {
            format!("through the tunnel to {} ({})", tunnel.next_hop, tunnel.target_uid)
        }
        Route::ViaWaypoint { tunnel, waypoint } => {
            format!("through the waypoint {waypoint} at {}", tunnel.next_hop)
        }
        Route::Passthrough { target, known: true } => {
            format!("in plaintext to {target}, which the mesh knows")
        }
        Route::Passthrough { target, known: false } => {
            format!("in plaintext to {target}, which the mesh does not know")
        }
        Route::Deliver { target, .. } => format!("delivered at {target}"),
    };
    Ok((stage, resolved))
}

fn inbound_stage(
    picture: &Picture,
    settings: &ResolveSettings,
    mut stages: Vec<Stage>,
    flow: &Flow,
    local: &Arc<Workload>,
    authority: Option<&Authority>,
    identity: Option<&SpiffeId>,
) -> Answer {
    let mut trace = Trace::on();
    let resolved =
        resolve_inbound_traced(&picture.index, settings, flow, local, authority, &mut trace);
    let mut stage = Stage {
        side: Side::Destination,
        workload: local.uid.to_string(),
        resolve: trace.into_steps(),
        authorize: None,
        outcome: String::new(),
    };
    let resolved = match resolved {
        Ok(resolved) => resolved,
        Err(unroutable) => {
            stage.outcome = unroutable.to_string();
            return refused(stages, Box::new((stage, unroutable.close_reason())));
        }
    };
    let explanation = explain(&picture.policies, &resolved, identity);
    let denial = denial(&explanation);
    stage.authorize = Some(explanation);
    if let Some(denial) = denial {
        stage.outcome = denial.to_string();
        return refused(stages, Box::new((stage, denial.reason)));
    }
    stage.outcome = format!("delivered to {}", resolved.route.next_hop());
    let summary = stage.outcome.clone();
    stages.push(stage);
    done(stages, &summary)
}

fn refused(mut stages: Vec<Stage>, refused: Box<Refused>) -> Answer {
    let (stage, reason) = *refused;
    let summary = stage.outcome.clone();
    stages.push(stage);
    if reason == CloseReason::Complete {
        return done(stages, &summary);
    }
    Answer { allowed: false, reason: Some(reason), summary, stages, warnings: Vec::new() }
}

fn done(stages: Vec<Stage>, summary: &str) -> Answer {
    let summary = summary.to_owned();
    Answer { allowed: true, reason: None, summary, stages, warnings: Vec::new() }
}

fn denial(explanation: &Explanation) -> Option<Denial> {
    match &explanation.outcome {
        Outcome::Allowed { .. } => None,
        Outcome::Denied(denial) => Some(denial.clone()),
    }
}

fn find_workload(index: &WorkloadIndex, name: &str) -> Option<Arc<Workload>> {
    if let Some(found) = index.workload(&mesh_model::WorkloadUid::new(name)) {
        return Some(Arc::clone(found));
    }
    if let Ok(ip) = name.parse::<IpAddr>() {
        return index
            .workloads()
            .find(|workload| workload.addresses.contains(&ip.to_canonical()))
            .cloned();
    }
    let (namespace, name) = name.split_once('/')?;
    index.workload_by_name(namespace, name).cloned()
}

/// The address that a client of the source's namespace would dial for a name.
fn find_address(index: &WorkloadIndex, source: &Workload, name: &str) -> Option<IpAddr> {
    if let Ok(ip) = name.parse::<IpAddr>() {
        return Some(ip.to_canonical());
    }
    if let Some((namespace, pod)) = name.split_once('/') {
        if let Some(found) = index.workload_by_name(namespace, pod) {
            return found.addresses.first().copied();
        }
        return service_address(index, source, pod, namespace);
    }
    service_address(index, source, name, &source.namespace)
}

/// As the search domains of a pod in `namespace` would find it.
fn service_address(
    index: &WorkloadIndex,
    source: &Workload,
    name: &str,
    namespace: &str,
) -> Option<IpAddr> {
    let full = index.services().find(|service| {
        let host = &*service.key.hostname;
        let labels: Vec<&str> = host.split('.').collect();
        let is_kubernetes = labels.get(2) == Some(&"svc");
        host == name
            || (is_kubernetes
                && host
                    .strip_prefix(name)
                    .is_some_and(|rest| rest.starts_with('.') && name.contains('.')))
            || (is_kubernetes
                && labels.first() == Some(&name)
                && *service.key.namespace == *namespace)
    })?;
    let own = index.find_service_by_hostname(&full.key.hostname, &source.namespace)?;
    own.vips.first().map(|vip| vip.ip).or_else(|| {
        let mut endpoints = index.endpoints(&own.key);
        endpoints.find_map(|endpoint| endpoint.addresses.first().copied())
    })
}
