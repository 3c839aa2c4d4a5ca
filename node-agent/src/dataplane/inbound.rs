//! Connections to a pod: accept, resolve, authorize, deliver, telemetry; through the tunnel and in plaintext.

use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::{Instant, SystemTime};

use mesh_authorize::{Decision, Permit, authorize};
use mesh_identity::PeerRejection;
use mesh_model::{CloseReason, Direction, Flow, SpiffeId, ports};
use mesh_net::driver::ops::{Answering, Ends, Incoming, ListenerTag, Ops};
use mesh_net::socket::{self, AppSource};
use mesh_resolve::{Authority, ResolvedFlow, Route, resolve_inbound};
use mesh_telemetry::EarlyDenial;
use mesh_tunnel::{ConnectHead, RequestId, Retire, SockId, TunnelId};
use mio::net::TcpStream;

use crate::dataplane::flows::{Held, LiveFlow};
use crate::dataplane::outbound::connect_failure;
use crate::dataplane::pods::{Pod, PodKey, Port};
use crate::dataplane::proxy_header::proxy_header;
use crate::dataplane::shared::OriginalSource;
use crate::dataplane::stats::TunnelRole;
use crate::dataplane::telemetry::{PeerHead, Story, response_head};
use crate::dataplane::tls::CertificateStamp;
use crate::dataplane::tunnels::ServerTunnel;
use crate::dataplane::waiting::WaitFor;
use crate::dataplane::worker::{CapturedConn, MEMORY_IS_SHORT, NodeWorker, Refusal, Waiting};
use crate::error::detail;

/// A CONNECT that has not been answered.
#[derive(Debug)]
pub(super) struct Request {
    pub(super) id: RequestId,
    pub(super) tunnel: TunnelId,
    pub(super) pod: Arc<Pod>,
    flow: Flow,
    peer: SpiffeId,
    authority: Option<Authority>,
    head: PeerHead,
    held: Option<Held>,
    deadline: Instant,
}

impl NodeWorker {
    // ---- the tunnel port -------------------------------------------------------------------------------------------

    /// Somebody dials the pod's tunnel port: answer the handshake as the pod.
    pub(super) fn tunnel_accepted(
        &mut self,
        ops: &mut Ops,
        pod: &Arc<Pod>,
        sock: SockId,
        ends: Ends,
    ) {
        let deadline = ops.now() + self.config.limits.certificate_patience;
        self.answer_handshake(ops, pod, sock, ends, deadline);
    }

    /// Begins the handshake, or lets it wait until `deadline` for the pod's workload and certificate.
    pub(super) fn answer_handshake(
        &mut self,
        ops: &mut Ops,
        pod: &Arc<Pod>,
        sock: SockId,
        ends: Ends,
        deadline: Instant,
    ) {
        let snapshot = self.snapshot();
        let identity = pod.workload(&snapshot).and_then(|workload| workload.identity().ok());
        let wait_for = match identity {
            // A handshake cannot be written down.
            _ if self.holds_handshakes => WaitFor::HandOver,
            None => WaitFor::Workload,
            Some(identity) => match self.tls.server(&snapshot, &identity) {
                Ok((config, CertificateStamp(stamp))) => {
                    let (tag, pod) = (pod.key.tag(Port::Hbone), pod.sockets.uid.clone());
                    let answering = Answering { tag, pod, stamp, config };
                    return ops.accept_tunnel(sock, ends.peer, answering);
                }
                Err(missing) => {
                    tracing::debug!(%identity, error = %missing, "no certificate to answer with");
                    self.shared.identities.want(&identity);
                    WaitFor::Certificate
                }
            },
        };
        let waiting = Waiting::Handshake { pod: Arc::clone(pod), sock, ends, deadline };
        if self.park_other(waiting, wait_for, deadline).is_some() {
            ops.abort(sock);
            self.stats.handshake_failed(TunnelRole::Server, CloseReason::Overloaded);
        }
    }

    /// The peer did not prove itself, or left before it had: there is nobody to count a flow for, but it is told.
    pub(super) fn tunnel_refused(
        &self,
        tag: ListenerTag,
        peer: SocketAddr,
        reason: CloseReason,
        error: &dyn std::error::Error,
    ) {
        let (key, _port) = PodKey::of(tag);
        let own = self.pod(key).and_then(|pod| pod.address_like(peer));
        self.flows.denied(EarlyDenial {
            source: peer,
            // The pod may have left meanwhile.
            destination: SocketAddr::new(
                own.unwrap_or(IpAddr::V4(Ipv4Addr::UNSPECIFIED)),
                ports::HBONE,
            ),
            direction: Direction::InboundTunnel,
            reason,
            detail: Some(detail(error)),
        });
    }

    /// The peer is proved: from here on it may ask for connections.
    pub(super) fn tunnel_proved(&mut self, ops: &mut Ops, incoming: Incoming) {
        let Incoming { tunnel, tag, stamp, peer, ends } = incoming;
        let (key, _port) = PodKey::of(tag);
        let Some(pod) = self.pod(key).map(Arc::clone) else {
            // The pod left meanwhile; requests will find no tunnel and be refused.
            return ops.engine.retire(Retire::Tunnel(tunnel), ops.now());
        };
        let own = CertificateStamp(stamp);
        self.tunnels.accepted(tunnel, ServerTunnel { pod, own, peer, ends });
        self.stats.tunnel_opened(TunnelRole::Server);
        self.retire_ended(ops);
        if let Some(rejection) = self.judge_proved(ops, (TunnelRole::Server, tunnel)) {
            return self.tunnel_refused(tag, ends.peer, rejection.close_reason(), &rejection);
        }
        // Replaced during the handshake: the peer is told, and dials again for its next stream.
        if !self.tls.is_in_force(&self.snapshot(), own) {
            ops.engine.retire(Retire::Tunnel(tunnel), ops.now());
        }
    }

    /// Stage one: a peer asks for a connection. Whose is it, and to where?
    pub(super) fn request_came(
        &mut self,
        ops: &mut Ops,
        request: RequestId,
        tunnel: TunnelId,
        head: &ConnectHead,
    ) {
        let Some(through) = self.tunnels.server(tunnel) else {
            return ops.engine.refuse(request, 503, CloseReason::Drained, ops.now());
        };
        let has_ended = through.end() <= SystemTime::now();
        let ServerTunnel { pod, peer, ends, .. } = through.clone();
        let authority = head.authority.parse::<Authority>();
        let port = authority.as_ref().map_or(0, Authority::port);
        let dialled = SocketAddr::new(ends.local.ip(), port);
        let flow = self.flow(ops, &pod, Direction::InboundTunnel, ends.peer, dialled);
        let held = pod
            .admit(self.most_flows(ops))
            .filter(|_| ops.has_room(1))
            .map(|slot| Held { slot, client_port: None });
        let refusal = match (&authority, &held) {
            (Err(error), _) => Some(Refusal::new(CloseReason::WrongDestination, error)),
            (Ok(_), None) if ops.memory_is_short() => Some(Refusal {
                detail: Some(MEMORY_IS_SHORT.into()),
                ..Refusal::from(CloseReason::Overloaded)
            }),
            (Ok(_), None) => Some(CloseReason::Overloaded.into()),
            (Ok(_), Some(_)) if has_ended => {
                ops.engine.retire(Retire::Tunnel(tunnel), ops.now());
                let ended = PeerRejection::Expired;
                Some(Refusal::new(ended.close_reason(), &ended))
            }
            (Ok(_), Some(_)) => None,
        };
        let request = Request {
            id: request,
            tunnel,
            pod,
            flow,
            peer: peer.id().clone(),
            authority: authority.ok(),
            head: PeerHead::read(head),
            held,
            deadline: ops.now() + self.request_patience(),
        };
        match refusal {
            None => self.inbound_request(ops, request),
            Some(refusal) => self.refuse_request(ops, request, None, refusal),
        }
    }

    /// Stages two to four of a CONNECT. Begins anew when the pod's workload has come.
    pub(super) fn inbound_request(&mut self, ops: &mut Ops, request: Request) {
        let snapshot = self.snapshot();
        let workload = request.pod.workload(&snapshot).filter(|_| snapshot.synced);
        let Some(local) = workload else {
            let deadline = request.deadline;
            let wait_for = if snapshot.synced { WaitFor::Workload } else { WaitFor::Policies };
            let parked = self.park_other(Waiting::Request(request), wait_for, deadline);
            if let Some(Waiting::Request(request)) = parked {
                self.refuse_request(ops, request, None, CloseReason::Overloaded.into());
            }
            return;
        };
        let mut resolved = match resolve_inbound(
            &snapshot.index,
            &snapshot.settings,
            &request.flow,
            &local,
            request.authority.as_ref(),
        ) {
            Ok(resolved) => resolved,
            Err(unroutable) => {
                return self.refuse_request(ops, request, None, (&unroutable).into());
            }
        };
        if request.head.came_through_gateway(&local.network) {
            resolved.peer = None;
        }
        let verdict = authorize(&snapshot.policies, &resolved, Some(&request.peer));
        self.flows.note(&request.flow, verdict.notes);
        match verdict.decision {
            Decision::Deny(denial) => {
                self.refuse_request(ops, request, Some(resolved), denial.into());
            }
            Decision::Allow(permit) => self.deliver_request(ops, request, resolved, permit),
        }
    }

    /// Spends the permit on a connection to the application; the 200 follows when it stands.
    fn deliver_request(
        &mut self,
        ops: &mut Ops,
        request: Request,
        resolved: ResolvedFlow,
        permit: Permit,
    ) {
        let app = match self.connect_app(ops, &request.pod, &resolved, Some(&request.peer)) {
            Ok(app) => app,
            Err(refusal) => return self.refuse_request(ops, request, Some(resolved), refusal),
        };
        let Some(held) = request.held else {
            ops.abort(app);
            return ops.engine.refuse(request.id, 503, CloseReason::Overloaded, ops.now());
        };
        let response = response_head(&resolved.local);
        let rule = permit.rule().cloned();
        let relay = ops.engine.accept(permit, request.id, app, response, ops.now());
        ops.engage(app);
        let Request { flow, peer, authority, head, pod, .. } = request;
        let snapshot = self.snapshot();
        let story =
            Story::request(flow, Some(resolved), &peer, authority.as_ref(), &head, &snapshot);
        let live = LiveFlow::new(story, pod, Some(peer), rule, held).asked_as(authority);
        self.flows.opened(relay, live);
    }

    /// Answers a CONNECT with a failure and records it.
    pub(super) fn refuse_request(
        &self,
        ops: &mut Ops,
        request: Request,
        resolved: Option<ResolvedFlow>,
        refusal: Refusal,
    ) {
        ops.engine.refuse(request.id, status(refusal.reason), refusal.reason, ops.now());
        self.record_request(ops, request, resolved, refusal);
    }

    /// Records a CONNECT that came to nothing.
    pub(super) fn record_request(
        &self,
        ops: &Ops,
        request: Request,
        resolved: Option<ResolvedFlow>,
        refusal: Refusal,
    ) {
        let Request { flow, peer, authority, head, .. } = request;
        let snapshot = self.snapshot();
        let story = Story::request(flow, resolved, &peer, authority.as_ref(), &head, &snapshot);
        self.flows.refused(story, refusal, ops.now());
    }

    // ---- captured plaintext ----------------------------------------------------------------------------------------

    /// Stage one: somebody dialled the pod in plaintext; the socket's own address is what was dialled.
    pub(super) fn plaintext_accepted(
        &mut self,
        ops: &mut Ops,
        pod: Arc<Pod>,
        sock: SockId,
        ends: Ends,
    ) {
        let flow = self.flow(ops, &pod, Direction::InboundPlaintext, ends.peer, ends.local);
        let Some(slot) = pod.admit(self.most_flows(ops)) else {
            ops.abort(sock);
            let story = Story::plaintext(flow, None);
            return self.flows.refused(story, CloseReason::Overloaded.into(), ops.now());
        };
        let held = Held { slot, client_port: Some(pod.plaintext_client(ends.peer)) };
        let ours = pod.owns(ends.local.ip());
        let conn = CapturedConn { flow, sock, pod, held, patience: None };
        if !ours {
            self.refuse(ops, conn, None, CloseReason::WrongDestination.into());
        } else if ports::is_agent_port(ends.local.port()) {
            self.refuse(ops, conn, None, CloseReason::LoopRefused.into());
        } else {
            self.inbound_plaintext(ops, conn);
        }
    }

    /// Stages two to four. Nobody is proved here: policies see no identity.
    pub(super) fn inbound_plaintext(&mut self, ops: &mut Ops, conn: CapturedConn) {
        let snapshot = self.snapshot();
        if !snapshot.synced {
            return self.park(ops, conn, WaitFor::Policies);
        }
        let Some(local) = conn.pod.workload(&snapshot) else {
            return self.park(ops, conn, WaitFor::Workload);
        };
        let resolved =
            match resolve_inbound(&snapshot.index, &snapshot.settings, &conn.flow, &local, None) {
                Ok(resolved) => resolved,
                Err(unroutable) => {
                    return self.refuse(ops, conn, None, (&unroutable).into());
                }
            };
        let verdict = authorize(&snapshot.policies, &resolved, None);
        self.flows.note(&conn.flow, verdict.notes);
        match verdict.decision {
            Decision::Deny(denial) => self.refuse(ops, conn, Some(resolved), denial.into()),
            Decision::Allow(permit) => self.deliver_plaintext(ops, conn, resolved, permit),
        }
    }

    /// Spends the permit on a plain connection to the application.
    fn deliver_plaintext(
        &mut self,
        ops: &mut Ops,
        conn: CapturedConn,
        resolved: ResolvedFlow,
        permit: Permit,
    ) {
        let app = match self.connect_app(ops, &conn.pod, &resolved, None) {
            Ok(app) => app,
            Err(refusal) => return self.refuse(ops, conn, Some(resolved), refusal),
        };
        let rule = permit.rule().cloned();
        let relay = ops.engine.splice(permit, conn.sock, app, ops.now());
        ops.engage(conn.sock);
        ops.engage(app);
        let story = Story::plaintext(conn.flow, Some(resolved));
        self.flows.opened(relay, LiveFlow::new(story, conn.pod, None, rule, conn.held));
    }

    // ---- the application -------------------------------------------------------------------------------------------

    /// Begins the connection to the application: in the pod itself, and never to a port of the agent.
    fn connect_app(
        &self,
        ops: &mut Ops,
        pod: &Pod,
        resolved: &ResolvedFlow,
        peer: Option<&SpiffeId>,
    ) -> Result<SockId, Refusal> {
        let Route::Deliver { target, dial, proxy_header: wanted, .. } = &resolved.route else {
            return Err(CloseReason::Internal.into());
        };
        if !pod.owns(target.ip()) || !(pod.owns(dial.ip()) || dial.ip().is_loopback()) {
            return Err(CloseReason::WrongDestination.into());
        }
        if ports::is_agent_port(target.port()) || ports::is_agent_port(dial.port()) {
            return Err(CloseReason::LoopRefused.into());
        }
        let prefix = wanted
            .map(|destination| proxy_header(resolved.flow.client.addr(), destination, peer))
            .unwrap_or_default();
        self.dial_app(pod, &resolved.flow, *dial)
            .and_then(|stream| ops.add_with_prefix(stream, prefix))
            .map_err(|error| Refusal::new(connect_failure(&error), &error))
    }

    /// Connects with the client's address as the setting wants it; a fallback is never silent.
    fn dial_app(&self, pod: &Pod, flow: &Flow, target: SocketAddr) -> io::Result<TcpStream> {
        let connect = |source: AppSource<'_>| {
            socket::connect_to_app(&pod.sockets.netns, source, target, &self.label)
        };
        let client = flow.client.ip();
        if self.config.original_source == OriginalSource::Off || target.ip().is_loopback() {
            return connect(AppSource::Pod);
        }
        if self.direct.is_active() && self.serves(client) {
            match connect(AppSource::Apart { client, number: flow.id.0 }) {
                // Some 15,000 of this client are open: rather a small chance of a port that a direct connection gets.
                Err(error) if error.kind() == io::ErrorKind::AddrInUse => {}
                done => return done,
            }
        }
        let is_taken = |port: u16| pod.is_port_taken(client, port);
        let taken: Option<&dyn Fn(u16) -> bool> =
            if pod.has_plaintext_client(client) { Some(&is_taken) } else { None };
        match connect(AppSource::Original { client, taken }) {
            Err(error)
                if self.config.original_source == OriginalSource::Preferred
                    && error.kind() != io::ErrorKind::ConnectionRefused =>
            {
                self.stats.source_fallback();
                tracing::warn!(%error, pod = %pod.sockets.uid, "the application will not see its client's address");
                connect(AppSource::Pod)
            }
            done => done,
        }
    }
}

/// The answer to a CONNECT that is refused for `reason`. Source: wire.md §1.5, and 401 is Istio's.
const fn status(reason: CloseReason) -> u16 {
    match reason {
        CloseReason::WrongDestination | CloseReason::ProtocolError => 400,
        CloseReason::PolicyDenied
        | CloseReason::PolicyChanged
        | CloseReason::PolicyMissing
        | CloseReason::EgressDenied
        | CloseReason::PeerDenied => 401,
        CloseReason::Complete
        | CloseReason::ClientReset
        | CloseReason::ServerReset
        | CloseReason::LoopRefused
        | CloseReason::NoHealthyUpstream
        | CloseReason::NoSuchPort
        | CloseReason::WaypointUnavailable
        | CloseReason::GatewayUnavailable
        | CloseReason::UnknownWorkload
        | CloseReason::NotSynced
        | CloseReason::UnknownDestination
        | CloseReason::ConnectRefused
        | CloseReason::ConnectTimeout
        | CloseReason::TunnelConnectFailed
        | CloseReason::ConnectFailed
        | CloseReason::TlsFailure
        | CloseReason::WrongIdentity
        | CloseReason::CertRevoked
        | CloseReason::NoCertificate
        | CloseReason::TunnelClosed
        | CloseReason::PeerRefused
        | CloseReason::Overloaded
        | CloseReason::Drained
        | CloseReason::TimedOut
        | CloseReason::Internal => 503,
    }
}
