//! Would a connection happen, and what decides: the agents' own resolve and authorize, run on the whole mesh.
//!
//! The answer is JSON, shared with the command line: [`Question`] in, [`Answer`] out, of `GET /explain?from=…&to=…`.

mod capture;
mod names;
mod plain;
mod tokens;
mod waypoint;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Instant, SystemTime};

use mesh_authorize::{Denial, Explanation, Outcome, explain, explain_egress};
use mesh_model::{
    ClientAddr, CloseReason, Direction, Flow, FlowId, OrigDst, PodUid, SpiffeId, Workload,
};
use mesh_resolve::{
    Authority, ResolveSettings, ResolvedFlow, Route, Step, Trace, Unroutable,
    resolve_inbound_traced, resolve_traced,
};
use serde::{Deserialize, Serialize};

use self::capture::Capture;
use self::names::{find_address, find_workload};
use self::plain::PlainDial;
use crate::mesh::Picture;

pub use self::waypoint::AskedRequest;

/// What is asked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Question {
    /// Who dials: `namespace/name` of a pod or WorkloadEntry, a workload uid, or an address.
    pub from: String,
    /// What is dialled: an address, a host name, `service.namespace`, a service's short name, or `namespace/pod`.
    pub to: String,
    /// The port that is dialled.
    pub port: u16,
    /// The request that is sent there, for waypoints to judge; none to ask about the connection alone.
    #[serde(default)]
    pub request: Option<AskedRequest>,
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
    /// `source`, `waypoint` or `destination`: whose agent, or which waypoint.
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

/// Who decides.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Side {
    /// The client's.
    Source,
    /// The waypoint, in between.
    Waypoint,
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

/// Answers a question. `now` only stamps the flow; `wall` is the time by which tokens are judged.
///
/// # Errors
/// When source or destination cannot be found.
pub fn answer(
    picture: &Picture,
    settings: &ResolveSettings,
    question: &Question,
    now: Instant,
    wall: SystemTime,
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
    let mut stages = Vec::new();
    let mut warnings = Vec::new();
    match Capture::outbound(picture, &source, target) {
        Capture::Captured => {}
        Capture::Unconfirmed(why) => warnings.push(why),
        Capture::Not(why) => {
            let dial = PlainDial { picture, settings, source: &source, client, target, now };
            return Ok(dial.answer(&why));
        }
        Capture::Inside(why) => return Ok(at_source(&source, &why)),
    }
    let outbound = flow(now, Direction::Outbound, client, target, &source);
    let route = match outbound_stage(picture, settings, &outbound, &source) {
        Ok((stage, resolved)) => {
            stages.push(stage);
            resolved
        }
        Err(decided) => return Ok(Answer { warnings, ..refused(stages, decided) }),
    };
    if matches!(route.route, Route::ViaWaypoint { .. }) {
        let at = waypoint::At {
            picture,
            settings,
            source: &source,
            client,
            dialled: target,
            host: &question.to,
            now,
            wall,
        };
        let answer = waypoint::through(&at, stages, &route, question.request.as_ref());
        return Ok(Answer { warnings, ..answer });
    }
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
    let captured = match &authority {
        Some(_) => Capture::of(picture, &local),
        None => {
            Capture::inbound(picture, &local, &source, client.ip(), route.route.next_hop().port())
        }
    };
    match captured {
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
        Capture::Not(why) | Capture::Inside(why) => {
            let outcome = format!("{why}: it is reached in plaintext and nothing more decides");
            return Ok(Answer { warnings, ..done(stages, &outcome) });
        }
    }
    let port = authority.as_ref().map_or_else(|| route.route.next_hop().port(), Authority::port);
    let direction =
        if authority.is_some() { Direction::InboundTunnel } else { Direction::InboundPlaintext };
    let inbound = flow(now, direction, client, SocketAddr::new(next, port), &local);
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

fn flow(
    now: Instant,
    direction: Direction,
    client: SocketAddr,
    target: SocketAddr,
    pod: &Workload,
) -> Flow {
    Flow {
        id: FlowId(0),
        direction,
        client: ClientAddr::new(client),
        orig_dst: OrigDst::new(target),
        pod: PodUid::new(pod.uid.as_str()),
        accepted_at: now,
    }
}

/// A connection that ends where it begins.
fn at_source(source: &Workload, outcome: &str) -> Answer {
    let stage = Stage {
        side: Side::Source,
        workload: source.uid.to_string(),
        resolve: Vec::new(),
        authorize: None,
        outcome: outcome.to_owned(),
    };
    done(vec![stage], outcome)
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
