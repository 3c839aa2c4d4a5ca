//! What a waypoint makes of a connection or a request: its own policies and route table, then the endpoint's agent.

use std::net::SocketAddr;
use std::str::FromStr as _;
use std::sync::Arc;
use std::time::Instant;

use http::{HeaderMap, HeaderName, HeaderValue, Method};
use mesh_authorize::{Connection, Request, explain_connection, explain_request};
use mesh_model::{
    ClientAddr, CloseReason, Direction, Flow, FlowId, OrigDst, PathNormalization, PodUid,
    RequestPath, Service, Workload,
};
use mesh_resolve::{
    Addressed, Authority, ResolveSettings, ResolvedFlow, Route, Trace, resolve_fronted,
    resolve_traced,
};
use mesh_route::{
    AnswerCause, FrontendKind, FrontendName, Plan, RedirectScheme, RequestHead, Selection,
    ServiceRef,
};
use serde::{Deserialize, Serialize};

use super::{Answer, Side, Stage, denial, done, inbound_stage, refused};
use crate::index::Frontend;
use crate::mesh::Picture;

/// A request that is asked about.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AskedRequest {
    /// Its method.
    pub method: String,
    /// Its path and query, as a client would send them.
    pub path: String,
    /// Its headers.
    pub headers: Vec<(String, String)>,
}

/// What stands where in the mesh.
pub(super) struct At<'a> {
    pub(super) picture: &'a Picture,
    pub(super) settings: &'a ResolveSettings,
    pub(super) source: &'a Arc<Workload>,
    pub(super) client: SocketAddr,
    pub(super) dialled: SocketAddr,
    /// The host as it was asked for.
    pub(super) host: &'a str,
    pub(super) now: Instant,
}

/// Goes on at the waypoint that `route` leads to.
pub(super) fn through(
    at: &At<'_>,
    mut stages: Vec<Stage>,
    route: &ResolvedFlow,
    request: Option<&AskedRequest>,
) -> Answer {
    let Some(waypoint) = route.peer.clone() else {
        return done(stages, "the waypoint is outside the mesh; nothing more is known");
    };
    let mut stage = Stage {
        side: Side::Waypoint,
        workload: waypoint.uid.to_string(),
        resolve: Vec::new(),
        authorize: None,
        outcome: String::new(),
    };
    let authority = Authority::address(at.dialled);
    let addressed = match resolve_fronted(&at.picture.index, &waypoint, &authority) {
        Ok(addressed) => addressed,
        Err(unroutable) => {
            stage.outcome = unroutable.to_string();
            return refused(stages, Box::new((stage, unroutable.close_reason())));
        }
    };
    let service = match &addressed {
        Addressed::Service(service) => Some(service),
        Addressed::Workload(_) => None,
    };
    let frontend = service.and_then(|service| frontend_of(at.picture, service));
    if service.is_some() && frontend.is_none() {
        stage.outcome = "the waypoint has not been told of this service".to_owned();
        return refused(stages, Box::new((stage, CloseReason::NotSynced)));
    }
    let policies = attached(at.picture, &waypoint, frontend);
    let port = at.dialled.port();
    let target_port =
        service.and_then(|service| at.picture.index.target_port(service, port)).unwrap_or(port);
    let identity = at.source.identity().ok();
    let connection = Connection {
        identity: identity.as_ref(),
        source_ip: at.client.ip(),
        destination: SocketAddr::new(at.dialled.ip(), target_port),
    };
    let decided = match request {
        None => {
            let explanation = explain_connection(&at.picture.policies, &policies, &connection);
            let refusal = denial(&explanation);
            stage.authorize = Some(explanation);
            match refusal {
                None => Ok((None, "passed on".to_owned())),
                Some(denial) => Err((denial.reason, denial.to_string())),
            }
        }
        Some(request) => judged(at, &mut stage, frontend, &policies, &connection, request),
    };
    let (backend, outcome) = match decided {
        Ok(decided) => decided,
        Err((reason, text)) => {
            stage.outcome = text;
            return refused(stages, Box::new((stage, reason)));
        }
    };
    stage.outcome = outcome;
    if backend == Some(None) {
        let summary = stage.outcome.clone();
        stages.push(stage);
        return done(stages, &summary);
    }
    let destination = match backend.flatten() {
        None => Some(at.dialled),
        Some(backend) => backend_address(at.picture, &backend),
    };
    let Some(destination) = destination else {
        stage.outcome.push_str("; it has no address to go on to");
        return refused(stages, Box::new((stage, CloseReason::NoHealthyUpstream)));
    };
    onwards(at, stages, stage, &waypoint, destination)
}

/// The endpoint, and what its agent says.
fn onwards(
    at: &At<'_>,
    mut stages: Vec<Stage>,
    mut stage: Stage,
    waypoint: &Arc<Workload>,
    destination: SocketAddr,
) -> Answer {
    let own = waypoint.addresses.iter().find(|ip| ip.is_ipv4() == destination.is_ipv4());
    let own = SocketAddr::new(own.copied().unwrap_or_else(|| destination.ip()), 0);
    let flow = |direction, target, pod: &Workload| Flow {
        id: FlowId(0),
        direction,
        client: ClientAddr::new(own),
        orig_dst: OrigDst::new(target),
        pod: PodUid::new(pod.uid.as_str()),
        accepted_at: at.now,
    };
    let mut trace = Trace::on();
    let outbound = flow(Direction::Outbound, destination, waypoint);
    let index = &at.picture.index;
    let resolved = resolve_traced(index, at.settings, &outbound, waypoint, 0, &mut trace);
    stage.resolve = trace.into_steps();
    let resolved = match resolved {
        Ok(resolved) => resolved,
        Err(unroutable) => {
            stage.outcome.push_str(&format!("; {unroutable}"));
            return refused(stages, Box::new((stage, unroutable.close_reason())));
        }
    };
    stages.push(stage);
    let (Some(local), Some(tunnel)) = (resolved.peer.clone(), resolved.route.tunnel()) else {
        return done(stages, "the endpoint is reached in plaintext; nothing more decides");
    };
    if matches!(resolved.route, Route::ViaWaypoint { .. }) {
        return done(stages, "it goes on through another waypoint");
    }
    let target = SocketAddr::new(tunnel.next_hop.ip(), tunnel.authority.port());
    let inbound = flow(Direction::InboundTunnel, target, &local);
    let identity = waypoint.identity().ok();
    let authority = Some(&tunnel.authority);
    inbound_stage(at.picture, at.settings, stages, &inbound, &local, authority, identity.as_ref())
}

/// Where a request goes: to what was dialled (none), to a backend, or nowhere (an answer of the waypoint's own).
type Decided = (Option<Option<ServiceRef>>, String);

fn judged(
    at: &At<'_>,
    stage: &mut Stage,
    frontend: Option<&Frontend>,
    policies: &[Arc<str>],
    connection: &Connection<'_>,
    asked: &AskedRequest,
) -> Result<Decided, (CloseReason, String)> {
    let bad = |text: String| (CloseReason::ProtocolError, format!("refused with 400: {text}"));
    let method = Method::from_str(&asked.method)
        .map_err(|_source| bad(format!("{:?} is no method", asked.method)))?;
    let path = RequestPath::parse(&asked.path, PathNormalization::default())
        .map_err(|error| bad(error.to_string()))?;
    let mut headers = HeaderMap::new();
    let mut authority = format!("{}:{}", at.host, at.dialled.port());
    for (name, value) in &asked.headers {
        if name.eq_ignore_ascii_case("host") {
            value.clone_into(&mut authority);
        }
        let name =
            HeaderName::from_str(name).map_err(|_source| bad(format!("{name:?} is no header")))?;
        let value = HeaderValue::from_str(value)
            .map_err(|_source| bad(format!("{value:?} is no header's value")))?;
        headers.append(name, value);
    }
    let seen = Request::new(&authority, &method, &path, &headers);
    let explanation = explain_request(&at.picture.policies, policies, connection, &seen);
    let refusal = denial(&explanation);
    stage.authorize = Some(explanation);
    if let Some(denial) = refusal {
        return Err((denial.reason, format!("refused with 403: {denial}")));
    }
    let normal = match path.target() {
        target if *target == *asked.path => String::new(),
        target => format!("as {target}, "),
    };
    let Some(frontend) = frontend else {
        return Ok((None, format!("{normal}passed on to the workload")));
    };
    let head =
        RequestHead { method: &method, authority: &authority, path: &path, headers: &headers };
    let name = &frontend.config.frontend;
    let namespace = Some(&*at.source.namespace);
    match at.picture.routes.select(name, at.dialled.port(), namespace, &head) {
        Selection::Unrouted => Ok((None, format!("{normal}no route: passed on to the service"))),
        Selection::NotFound => {
            Err((CloseReason::NoSuchPort, format!("{normal}answered with 404: no rule matches")))
        }
        Selection::Selected(selected) => {
            let rule = format!("{} rule {}", selected.route().name, selected.rule_index());
            match selected.plan(&head, RedirectScheme::Http, &mut || 0) {
                Plan::Forward(forward) => {
                    let to = forward.backend;
                    let share =
                        selected.rule().backends.iter().filter(|one| one.weight > 0).count();
                    let others = match share {
                        0 | 1 => String::new(),
                        _ => format!(" (one of {share} by weight)"),
                    };
                    let text = format!(
                        "{normal}{rule}: to Service {}/{}:{}{others}",
                        to.namespace, to.name, to.port
                    );
                    Ok((Some(Some(to.clone())), text))
                }
                Plan::Answer(answer) => match answer.cause {
                    AnswerCause::Redirect | AnswerCause::Preflight => {
                        let text =
                            format!("{normal}{rule}: answered with {}", answer.status.as_u16());
                        Ok((Some(None), text))
                    }
                    AnswerCause::InvalidReference { reason } => Err((
                        CloseReason::NoHealthyUpstream,
                        format!(
                            "{normal}{rule}: answered with {}: {reason}",
                            answer.status.as_u16()
                        ),
                    )),
                    AnswerCause::NoBackend => Err((
                        CloseReason::NoHealthyUpstream,
                        format!(
                            "{normal}{rule}: answered with {}: no backend",
                            answer.status.as_u16()
                        ),
                    )),
                },
            }
        }
    }
}

fn frontend_of<'p>(picture: &'p Picture, service: &Service) -> Option<&'p Frontend> {
    let key = &service.key;
    picture.frontends.values().map(|frontend| &**frontend).find(|frontend| {
        frontend.config.frontend.namespace == key.namespace
            && frontend.config.hosts.contains(&key.hostname)
    })
}

/// The policies of a frontend and of the waypoint's Gateway.
fn attached(picture: &Picture, waypoint: &Workload, frontend: Option<&Frontend>) -> Vec<Arc<str>> {
    let gateways = waypoint.services.keys().filter_map(|key| {
        let name = FrontendName {
            kind: FrontendKind::Gateway,
            namespace: key.namespace.clone(),
            name: key.hostname.split('.').next().unwrap_or_default().into(),
        };
        picture.frontends.get(&name)
    });
    let of_gateways = gateways.flat_map(|gateway| gateway.config.policies.iter());
    let own = frontend.iter().flat_map(|frontend| frontend.config.policies.iter());
    own.chain(of_gateways).cloned().collect()
}

fn backend_address(picture: &Picture, backend: &ServiceRef) -> Option<SocketAddr> {
    let service = picture.index.services().find(|service| {
        service.key.namespace == backend.namespace && *service.name == *backend.name
    })?;
    Some(SocketAddr::new(service.vips.first()?.ip, backend.port))
}
