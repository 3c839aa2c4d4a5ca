//! A pod's connections: capture, resolve, authorize, tunnel or passthrough, telemetry.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use mesh_authorize::{Decision, Permit, authorize_egress};
use mesh_identity::PeerCertificate;
use mesh_model::{CloseReason, Direction, SpiffeId};
use mesh_net::driver::ops::{Ends, Ops};
use mesh_net::socket::{self, ConnectOptions, Far};
use mesh_resolve::{PendingDns, ResolvedFlow, Route, TunnelRoute, Unroutable, resolve};
use mesh_telemetry::TraceParent;
use mesh_tunnel::{DialId, Retire, SockId, TunnelId, TunnelKey};

use crate::dataplane::crossing::{self, Crossing};
use crate::dataplane::flows::{Held, LiveFlow};
use crate::dataplane::pods::Pod;
use crate::dataplane::shared::Snapshot;
use crate::dataplane::stats::TunnelRole;
use crate::dataplane::telemetry::{Story, connect_head};
use crate::dataplane::waiting::{WaitFor, WaitId};
use crate::dataplane::worker::{CapturedConn, Command, NodeWorker, Refusal, Waiting};

impl NodeWorker {
    /// Stage one, capture: where was it going?
    pub(super) fn outbound_accepted(
        &mut self,
        ops: &mut Ops,
        pod: Arc<Pod>,
        sock: SockId,
        ends: Ends,
    ) {
        let orig_dst = self.capture.orig_dst(pod.sockets.cookie, ends.peer);
        let target = orig_dst.as_ref().ok().copied().flatten().unwrap_or(ends.local);
        let flow = self.flow(ops, &pod, Direction::Outbound, ends.peer, target);
        let Some(slot) = pod.admit(self.most_flows(ops)) else {
            ops.abort(sock);
            let story = Story::outbound(flow, None, None);
            return self.flows.refused(story, CloseReason::Overloaded.into(), ops.now());
        };
        let held = Held { slot, client_port: None };
        let conn = CapturedConn { flow, sock, pod, held, patience: None };
        match orig_dst {
            Ok(Some(_)) => self.outbound(ops, conn),
            // Dialled the agent's own port, or came past capture.
            Ok(None) => {
                self.stats.no_orig_dst();
                self.refuse(ops, conn, None, CloseReason::LoopRefused.into());
            }
            Err(error) => {
                self.stats.no_orig_dst();
                self.refuse(ops, conn, None, Refusal::new(CloseReason::Internal, &error));
            }
        }
    }

    /// Stage two, resolve. Begins anew when something it waited for has come.
    pub(super) fn outbound(&mut self, ops: &mut Ops, conn: CapturedConn) {
        let snapshot = self.snapshot();
        if !snapshot.synced {
            return self.park(ops, conn, WaitFor::Policies);
        }
        let Some(source) = conn.pod.workload(&snapshot) else {
            return self.park(ops, conn, WaitFor::Workload);
        };
        let entropy = self.entropy();
        match resolve(&snapshot.index, &snapshot.settings, &conn.flow, &source, entropy) {
            Ok(resolved) => self.outbound_resolved(ops, &snapshot, conn, resolved),
            Err(Unroutable::NeedsDns(pending)) => self.look_up(ops, conn, *pending),
            Err(unroutable) => self.refuse(ops, conn, None, (&unroutable).into()),
        }
    }

    /// Stage three, authorize; and on to stage four.
    fn outbound_resolved(
        &mut self,
        ops: &mut Ops,
        snapshot: &Snapshot,
        conn: CapturedConn,
        resolved: ResolvedFlow,
    ) {
        let verdict = authorize_egress(&snapshot.policies, &resolved);
        self.flows.note(&conn.flow, verdict.notes);
        // A pod of this node is not outside the mesh, even where the controller names no networks.
        if let Route::Passthrough { target, known: false } = resolved.route
            && self.serves(target.ip())
        {
            return self.park(ops, conn, WaitFor::Destination);
        }
        let permit = match verdict.decision {
            // It may have begun to exist a moment ago.
            Decision::Deny(denial) if denial.reason == CloseReason::UnknownDestination => {
                return self.park(ops, conn, WaitFor::Destination);
            }
            Decision::Deny(denial) => {
                return self.refuse(ops, conn, Some(resolved), denial.into());
            }
            Decision::Allow(permit) => permit,
        };
        match resolved.route.clone() {
            Route::Tunnel(tunnel) | Route::ViaWaypoint { tunnel, .. } => {
                self.open_tunnel(ops, snapshot, conn, resolved, tunnel, permit);
            }
            Route::Passthrough { target, .. } => {
                self.pass_through(ops, conn, resolved, target, permit);
            }
            // Only inbound flows are delivered.
            Route::Deliver { .. } => {
                self.refuse(ops, conn, Some(resolved), CloseReason::Internal.into());
            }
        }
    }

    /// Stage four, in the mesh: spends the permit on a stream of a tunnel.
    fn open_tunnel(
        &mut self,
        ops: &mut Ops,
        snapshot: &Snapshot,
        conn: CapturedConn,
        resolved: ResolvedFlow,
        route: TunnelRoute,
        permit: Permit,
    ) {
        let source = match resolved.local.identity() {
            Ok(source) => source,
            Err(error) => {
                let refusal = Refusal::new(CloseReason::NoCertificate, &error);
                return self.refuse(ops, conn, Some(resolved), refusal);
            }
        };
        if let Err(missing) = self.tls.check(snapshot, &source) {
            tracing::debug!(identity = %source, error = %missing, "a flow waits for its certificate");
            self.shared.identities.want(&source);
            return self.park(ops, conn, WaitFor::Certificate);
        }
        let trace_bits = u128::from(self.entropy()) << 64 | u128::from(self.entropy());
        let trace = TraceParent::new(trace_bits, self.entropy());
        let head = connect_head(&resolved, &route, trace);
        let to_gateway = route.gateway.as_deref().map(|outer| Crossing {
            key: tunnel_key(&conn, &source, outer.clone()),
            head: connect_head(&resolved, outer, trace),
            target: route.target_uid.clone(),
            resolved: resolved.clone(),
        });
        let mut key = tunnel_key(&conn, &source, route);
        if to_gateway.is_some() {
            key.target_uid = crossing::lane(&key.target_uid, conn.flow.id);
        }
        let lane = key.target_uid.clone();
        let rule = permit.rule().cloned();
        let relay = ops.engine.open(permit, key, head, conn.sock, ops.now());
        ops.engage(conn.sock);
        if let Some(to_gateway) = to_gateway {
            self.crossings.begin(relay, lane, to_gateway);
        }
        let story = Story::outbound(conn.flow, Some(resolved), Some(trace));
        self.flows.opened(relay, LiveFlow::new(story, conn.pod, None, rule, conn.held));
    }

    /// Stage four, out of the mesh: spends the permit on a plain connection.
    fn pass_through(
        &mut self,
        ops: &mut Ops,
        conn: CapturedConn,
        resolved: ResolvedFlow,
        target: SocketAddr,
        permit: Permit,
    ) {
        let options =
            ConnectOptions { far: Far::App, keepalive: self.config.keepalive, user_timeout: None };
        let upstream =
            socket::connect_from_pod(&conn.pod.sockets.netns, target, &self.label, options)
                .and_then(|stream| ops.add(stream));
        let upstream = match upstream {
            Ok(upstream) => upstream,
            Err(error) => {
                let refusal = Refusal::new(connect_failure(&error), &error);
                return self.refuse(ops, conn, Some(resolved), refusal);
            }
        };
        let rule = permit.rule().cloned();
        let relay = ops.engine.splice(permit, conn.sock, upstream, ops.now());
        ops.engage(conn.sock);
        ops.engage(upstream);
        let story = Story::outbound(conn.flow, Some(resolved), None);
        self.flows.opened(relay, LiveFlow::new(story, conn.pod, None, rule, conn.held));
    }

    // ---- names -----------------------------------------------------------------------------------------------------

    /// Lets the flow wait for the addresses of its endpoint's host name.
    fn look_up(&mut self, ops: &mut Ops, conn: CapturedConn, pending: PendingDns) {
        let (pod, hostname) = (conn.flow.pod.clone(), Arc::clone(pending.hostname()));
        let wait = self.next_wait();
        let deadline = ops.now() + self.patience(WaitFor::Name);
        let waiting = Waiting::Name { conn, pending: Box::new(pending) };
        if let Some(waiting) = self.park_other(waiting, WaitFor::Name, deadline) {
            return self.give_up(ops, waiting, CloseReason::Overloaded);
        }
        let to_self = Arc::clone(&self.to_self);
        let answer = Box::new(move |answer| to_self(Command::Resolved { wait, answer }));
        self.shared.resolver.resolve(&pod, &hostname, answer);
    }

    /// The resolver has answered.
    pub(super) fn name_resolved(
        &mut self,
        ops: &mut Ops,
        wait: WaitId,
        answer: io::Result<Vec<IpAddr>>,
    ) {
        let Some(waiting) = self.take_waiting(wait) else { return };
        let Waiting::Name { conn, pending } = waiting else { return self.resume(ops, waiting) };
        let snapshot = self.snapshot();
        let completed = match answer {
            Ok(addresses) => pending.complete(&addresses).map_err(|error| Refusal::from(&error)),
            Err(error) => Err(Refusal::new(CloseReason::ConnectFailed, &error)),
        };
        match completed {
            Ok(resolved) => self.outbound_resolved(ops, &snapshot, conn, resolved),
            Err(refusal) => self.refuse(ops, conn, None, refusal),
        }
    }

    // ---- dials -----------------------------------------------------------------------------------------------------

    /// The engine's pool wants a tunnel.
    pub(super) fn dial_tunnel(&mut self, ops: &mut Ops, dial: DialId, key: &Arc<TunnelKey>) {
        let snapshot = self.snapshot();
        let Some(pod) = self.pod_by_uid(&key.pod).map(Arc::clone) else {
            return self.fail_dial(ops, dial, CloseReason::Drained.into());
        };
        let (config, own) = match self.tls.client(&snapshot, &key.source, &key.expected) {
            Ok(found) => found,
            Err(missing) => {
                self.shared.identities.want(&key.source);
                tracing::debug!(identity = %key.source, error = %missing, "nothing to dial with");
                let refusal = Refusal::new(CloseReason::NoCertificate, &missing);
                return self.fail_dial(ops, dial, refusal);
            }
        };
        let stream = match self.carry(ops, &snapshot, dial, key) {
            Some(Ok(far)) => Ok(far),
            Some(Err(refusal)) => return self.fail_dial(ops, dial, refusal),
            // Its crossing stayed with a predecessor. To dial the gateway as if it were the far end would be wrong.
            None if crossing::is_lane(&key.target_uid) => {
                return self.fail_dial(ops, dial, CloseReason::Drained.into());
            }
            None => {
                let keepalive = self.config.keepalive;
                let user_timeout = Some(keepalive.user_timeout());
                let options = ConnectOptions { far: Far::Agent, keepalive, user_timeout };
                let netns = &pod.sockets.netns;
                socket::connect_from_pod(netns, key.next_hop, &self.label, options)
            }
        };
        self.tunnels.dialling(dial, key, own);
        ops.dial(dial, (key.pod.clone(), key.next_hop), stream, config);
    }

    /// A dialled tunnel is up, unless nobody wanted it any more.
    pub(super) fn tunnel_dialled(
        &mut self,
        ops: &mut Ops,
        dial: DialId,
        tunnel: Option<TunnelId>,
        peer: PeerCertificate,
    ) {
        let own = self.tunnels.dialled(dial, tunnel, peer);
        let (Some(own), Some(tunnel)) = (own, tunnel) else { return };
        self.stats.tunnel_opened(TunnelRole::Client);
        self.retire_ended(ops);
        // What waited for the tunnel is on it by now, and is cut.
        if self.judge_proved(ops, (TunnelRole::Client, tunnel)).is_some() {
            return;
        }
        // The certificate may have been replaced during the handshake. What waited for the tunnel is on it by now.
        if !self.tls.is_in_force(&self.snapshot(), own.stamp) {
            ops.engine.retire(Retire::Tunnel(tunnel), ops.now());
        }
    }
}

/// What the flow's tunnel by `route` is shared by.
fn tunnel_key(conn: &CapturedConn, source: &SpiffeId, route: TunnelRoute) -> TunnelKey {
    let own = conn.pod.address_like(route.next_hop);
    TunnelKey {
        pod: conn.flow.pod.clone(),
        source: source.clone(),
        source_ip: own.unwrap_or_else(|| conn.flow.client.ip()),
        next_hop: route.next_hop,
        target_uid: route.target_uid,
        expected: route.expected,
    }
}

/// What a failed connect means for the flow that wanted it.
pub(super) fn connect_failure(error: &io::Error) -> CloseReason {
    let exhausted = [libc::EMFILE, libc::ENFILE, libc::ENOBUFS, libc::ENOMEM];
    if error.kind() == io::ErrorKind::ConnectionRefused {
        CloseReason::ConnectRefused
    } else if error.kind() == io::ErrorKind::TimedOut {
        CloseReason::ConnectTimeout
    } else if error.raw_os_error().is_some_and(|code| exhausted.contains(&code)) {
        CloseReason::Overloaded
    } else {
        CloseReason::ConnectFailed
    }
}
