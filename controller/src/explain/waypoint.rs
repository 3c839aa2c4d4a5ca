//! What a waypoint makes of a connection or a request: its own policies and route table, then the endpoint's agent.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::str::FromStr as _;
use std::sync::Arc;
use std::time::{Instant, SystemTime};

use http::{HeaderMap, HeaderName, HeaderValue, Method};
use mesh_authorize::{Connection, Request, explain_connection, explain_request};
use mesh_model::{
    ClientAddr, CloseReason, Direction, Flow, FlowId, OrigDst, PathNormalization, PodUid,
    RequestPath, Service, Workload,
};
use mesh_resolve::{
    Addressed, Authority, ResolveSettings, ResolvedFlow, Route, Trace, is_fronted, resolve_fronted,
    resolve_traced,
};
use mesh_route::{
    AnswerCause, Forward, FrontendKind, FrontendName, Plan, RedirectScheme, RequestHead, Selection,
    ServiceRef,
};
use mesh_wire::AppProtocol;
use serde::{Deserialize, Serialize};

use super::tokens::{Authenticated, authenticate};
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
    /// The time by which tokens are judged.
    pub(super) wall: SystemTime,
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
    let Some(policies) = attached(at.picture, &waypoint, frontend) else {
        stage.outcome = "the waypoint knows nothing of its Gateway".to_owned();
        return refused(stages, Box::new((stage, CloseReason::NotSynced)));
    };
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
        None if frontend.is_none_or(|one| is_detected(one, port))
            && (at.picture.policies.asks_for_requests(&policies)
                || frontend.is_some_and(|one| {
                    at.picture.routes.is_routed(&one.config.frontend, port)
                })) =>
        {
            let text = "routes or policies on requests wait there, and the port does not declare what it speaks: what is \
                        no HTTP is refused; ask with a method and path";
            Err((CloseReason::ProtocolError, text.to_owned()))
        }
        None => {
            let explanation = explain_connection(&at.picture.policies, &policies, &connection);
            let refusal = denial(&explanation);
            stage.authorize = Some(explanation);
            match refusal {
                None => Ok((None, "passed on".to_owned())),
                Some(denial) => Err((denial.reason, denial.to_string())),
            }
        }
        Some(request) => {
            let of_workload = match &addressed {
                Addressed::Workload(workload) => Some(&**workload),
                Addressed::Service(_) => None,
            };
            let authentications = authentications(at.picture, &waypoint, frontend, of_workload);
            let here = Here { waypoint: &waypoint, frontend, policies: &policies, authentications };
            judged(at, &mut stage, &here, &connection, request)
        }
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

/// The waypoint, and what of it was dialled.
struct Here<'a> {
    waypoint: &'a Workload,
    frontend: Option<&'a Frontend>,
    policies: &'a [Arc<str>],
    authentications: BTreeSet<Arc<str>>,
}

fn judged(
    at: &At<'_>,
    stage: &mut Stage,
    here: &Here<'_>,
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
    let target = path.target().into_owned();
    let names = &here.authentications;
    let token = authenticate(at.picture, names, &mut headers, &target, at.wall)?;
    let path = RequestPath::parse(&token.target, PathNormalization::default())
        .map_err(|error| bad(error.to_string()))?;
    let seen = Request::new(&authority, &method, &path, &headers).with_claims(token.at(names));
    let explanation = explain_request(&at.picture.policies, here.policies, connection, &seen);
    let refusal = denial(&explanation);
    stage.authorize = Some(explanation);
    if let Some(denial) = refusal {
        return Err((denial.reason, format!("refused with 403: {denial}")));
    }
    let normal = match path.target() {
        target if *target == *asked.path => token.said.clone(),
        target => format!("{}as {target}, ", token.said),
    };
    let Some(frontend) = here.frontend else {
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
                    let refusal = at_backend(at, here, connection, &forward, &head, &token);
                    if let Some((reason, text)) = refusal {
                        return Err((reason, format!("{normal}{rule}: {text}")));
                    }
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

/// Why the policies of the service that a route leads to refuse, where that is behind the same waypoint.
fn at_backend(
    at: &At<'_>,
    here: &Here<'_>,
    connection: &Connection<'_>,
    forward: &Forward<'_>,
    head: &RequestHead<'_>,
    token: &Authenticated,
) -> Option<(CloseReason, String)> {
    let service = backend_service(at.picture, forward.backend)
        .filter(|service| is_fronted(&at.picture.index, here.waypoint, service))?;
    let frontend = frontend_of(at.picture, service)?;
    let is_dialled =
        here.frontend.is_some_and(|one| one.config.frontend == frontend.config.frontend);
    if is_dialled || frontend.config.policies.is_empty() {
        return None;
    }
    let mut headers = head.headers.clone();
    for modifier in forward.request_headers {
        modifier.apply(&mut headers);
    }
    let target = match (&forward.path, head.path.query()) {
        (None, _) => head.path.target().into_owned(),
        (Some(path), None) => path.clone(),
        (Some(path), Some(query)) => format!("{path}?{query}"),
    };
    let path = match RequestPath::parse(&target, PathNormalization::default()) {
        Ok(path) => path,
        Err(error) => return Some((CloseReason::ProtocolError, format!("as it is sent: {error}"))),
    };
    let names = authentications(at.picture, here.waypoint, Some(frontend), None);
    let seen = Request::new(forward.host.unwrap_or(head.authority), head.method, &path, &headers)
        .with_claims(token.at(&names));
    let port = forward.backend.port;
    let ip = service.vips.first().map_or_else(|| connection.destination.ip(), |vip| vip.ip);
    let port = at.picture.index.target_port(service, port).unwrap_or(port);
    let connection = Connection { destination: SocketAddr::new(ip, port), ..*connection };
    let policies = &frontend.config.policies;
    let denial = denial(&explain_request(&at.picture.policies, policies, &connection, &seen))?;
    Some((denial.reason, format!("refused with 403 by the policies of {}: {denial}", service.key)))
}

/// True when nothing says what is spoken at a port.
fn is_detected(frontend: &Frontend, port: u16) -> bool {
    let mut ports = frontend.config.ports.iter();
    ports.find(|one| one.port == port).is_none_or(|one| one.protocol == AppProtocol::Detect)
}

fn frontend_of<'p>(picture: &'p Picture, service: &Service) -> Option<&'p Frontend> {
    let key = &service.key;
    picture.frontends.values().map(|frontend| &**frontend).find(|frontend| {
        frontend.config.frontend.namespace == key.namespace
            && frontend.config.hosts.contains(&key.hostname)
    })
}

/// The policies of a frontend and of the waypoint's Gateway; none when nothing is known of that.
fn attached(
    picture: &Picture,
    waypoint: &Workload,
    frontend: Option<&Frontend>,
) -> Option<Vec<Arc<str>>> {
    let gateways = gateways(picture, waypoint);
    let of_gateways: Vec<_> = gateways.map(|gateway| &gateway.config.policies).collect();
    let own = frontend.iter().flat_map(|frontend| frontend.config.policies.iter());
    let of_all = own.chain(of_gateways.iter().copied().flatten());
    (!of_gateways.is_empty()).then(|| of_all.cloned().collect())
}

/// The RequestAuthentications of a frontend, of the waypoint's Gateway, and of its namespace where a workload is dialled itself.
fn authentications(
    picture: &Picture,
    waypoint: &Workload,
    frontend: Option<&Frontend>,
    dialled: Option<&Workload>,
) -> BTreeSet<Arc<str>> {
    let own = frontend.iter().flat_map(|frontend| &frontend.config.authentications);
    let of_gateways = gateways(picture, waypoint).flat_map(|gateway| {
        let config = &gateway.config;
        let is_own = dialled.is_some_and(|one| one.namespace == config.frontend.namespace);
        let of_workloads = config.workload_authentications.iter().filter(move |_| is_own);
        config.authentications.iter().chain(of_workloads)
    });
    own.chain(of_gateways).cloned().collect()
}

/// The Gateways that a workload stands for.
fn gateways<'p>(
    picture: &'p Picture,
    waypoint: &'p Workload,
) -> impl Iterator<Item = &'p Arc<Frontend>> {
    waypoint.services.keys().filter_map(|key| {
        let name = FrontendName {
            kind: FrontendKind::Gateway,
            namespace: key.namespace.clone(),
            name: key.hostname.split('.').next().unwrap_or_default().into(),
        };
        picture.frontends.get(&name)
    })
}

fn backend_service<'p>(picture: &'p Picture, backend: &ServiceRef) -> Option<&'p Arc<Service>> {
    picture.index.services().find(|service| {
        service.key.namespace == backend.namespace && *service.name == *backend.name
    })
}

fn backend_address(picture: &Picture, backend: &ServiceRef) -> Option<SocketAddr> {
    let service = backend_service(picture, backend)?;
    Some(SocketAddr::new(service.vips.first()?.ip, backend.port))
}
