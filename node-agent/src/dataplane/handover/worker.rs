//! One worker's part of a hand-over, on its own thread: the only place where a worker waits.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::mpsc::Receiver;

use mesh_identity::PeerCertificate;
use mesh_model::Direction;
use mesh_net::driver::handover::{WrittenSocket, WrittenWorker};
use mesh_net::driver::ops::{ListenerTag, Ops};
use mesh_tunnel::SockId;
use tokio::sync::oneshot;
use zeroize::Zeroizing;

use super::state::{
    BareFlow, ListenerState, Parts, RoleState, SocketState, WaitingState, WorkerState,
};
use super::{HandOverRefused, Verdict};
use crate::dataplane::flows::{Held, LiveFlow};
use crate::dataplane::pods::{Pod, PodKey, Port};
use crate::dataplane::shared::Changed;
use crate::dataplane::waiting::WaitFor;
use crate::dataplane::worker::{CapturedConn, NodeWorker, Waiting, answer};

/// One worker, on its way.
#[derive(Debug)]
pub(in crate::dataplane) struct HandedWorker {
    pub(super) state: WorkerState,
    pub(super) engine: Zeroizing<Vec<u8>>,
    pub(super) sockets: Vec<OwnedFd>,
    pub(super) listeners: Vec<OwnedFd>,
}

impl HandedWorker {
    /// True when it has nothing that would be missed.
    pub(super) const fn is_empty(&self) -> bool {
        self.sockets.is_empty()
            && self.listeners.is_empty()
            && self.state.flows.is_empty()
            && self.state.waiting.is_empty()
    }
}

/// Who waits for a worker to be written down, and where its verdict comes from.
#[derive(Debug)]
pub(in crate::dataplane) struct Writing {
    pub(super) reply: oneshot::Sender<io::Result<HandedWorker>>,
    pub(super) verdict: Receiver<Verdict>,
}

/// What a worker takes over.
#[derive(Debug)]
pub(in crate::dataplane) struct Taking {
    /// None: only pods and listeners.
    pub(super) worker: Option<HandedWorker>,
    pub(super) pods: Vec<Arc<Pod>>,
    pub(super) listeners: Vec<(ListenerState, OwnedFd)>,
    /// Pods for which it opens listeners of its own.
    pub(super) open: Vec<PodKey>,
    pub(super) reply: oneshot::Sender<Result<(), HandOverRefused>>,
    pub(super) verdict: Receiver<Verdict>,
}

impl NodeWorker {
    /// Everything, for a worker of another process.
    fn write_worker(&self, ops: &Ops, written: WrittenWorker) -> HandedWorker {
        let now = ops.now();
        let mut parts = Parts::default();
        let mut state = WorkerState {
            flows: self.flows.written(&mut parts, now),
            tunnels: self.tunnels.written(),
            certificates: self.tls.written(),
            next_stamp: self.tls.next_stamp(),
            waiting: self.waiting().filter_map(|waiting| written_waiting(waiting, now)).collect(),
            ..WorkerState::default()
        };
        state.shared = parts.into_shared();
        let mut sockets = Vec::with_capacity(written.sockets.len());
        for WrittenSocket { name, of_engine, prefix, fd } in written.sockets {
            state.sockets.push(SocketState { name: name.0, of_engine, prefix });
            sockets.push(fd);
        }
        let mut listeners = Vec::with_capacity(written.listeners.len());
        for (id, ListenerTag(tag), fd) in written.listeners {
            let Some(slot) = self.slot_of(id) else { continue };
            state.listeners.push(ListenerState { tag, slot });
            listeners.push(fd);
        }
        HandedWorker { state, engine: written.engine, sockets, listeners }
    }

    /// Hands the written worker on and waits for the verdict.
    pub(in crate::dataplane) fn hand_on(
        &mut self,
        ops: &mut Ops,
        written: io::Result<WrittenWorker>,
    ) {
        let Some(Writing { reply, verdict }) = self.writing.take() else { return };
        let handed = written.map(|written| self.write_worker(ops, written));
        answer(reply, handed);
        match verdict.recv() {
            Ok(Verdict::GoOn) => {}
            Ok(Verdict::LetGo) => {
                self.forget_flows();
                ops.abandon();
            }
            // Whoever decides is gone, so that it is not known who goes on with what was written: nobody.
            Ok(Verdict::Reset) | Err(_) => {
                self.forget_flows();
                ops.reset_all();
            }
        }
    }

    /// Takes over, and waits for the verdict before the first byte is moved.
    pub(in crate::dataplane) fn take(&mut self, ops: &mut Ops, taking: Taking) {
        let Taking { worker, pods, listeners, open, reply, verdict } = taking;
        let taken = self.take_all(ops, worker, pods, listeners, &open);
        let is_taken = taken.is_ok();
        answer(reply, taken.map(|_unused| ()));
        match verdict.recv() {
            Ok(Verdict::GoOn) if is_taken => {}
            Ok(Verdict::GoOn | Verdict::LetGo | Verdict::Reset) | Err(_) => {
                self.forget_flows();
                return ops.abandon();
            }
        }
        self.flows.announce();
        for waiting in std::mem::take(&mut self.handed_waiting) {
            self.resume(ops, waiting);
        }
        // What the predecessor knew may be older or newer than what is known here.
        let everything = Changed::INDEX.and(Changed::POLICIES).and(Changed::TRUST);
        self.begin_rejudging(ops, everything.and(Changed::IDENTITIES));
        self.retire_ended(ops);
    }

    fn take_all(
        &mut self,
        ops: &mut Ops,
        worker: Option<HandedWorker>,
        pods: Vec<Arc<Pod>>,
        listeners: Vec<(ListenerState, OwnedFd)>,
        open: &[PodKey],
    ) -> Result<(), HandOverRefused> {
        for pod in pods {
            self.serve(pod);
        }
        for (ListenerState { tag, slot }, fd) in listeners {
            let tag = ListenerTag(tag);
            let id = ops.add_handed_listener(tag, fd).map_err(HandOverRefused::Listener)?;
            let (key, port) = PodKey::of(tag);
            self.serve_listener(key, id, slot, port);
        }
        for key in open {
            self.open_handed(ops, *key).map_err(HandOverRefused::Listener)?;
        }
        let Some(HandedWorker { state, engine, sockets, listeners: _ }) = worker else {
            return Ok(());
        };
        if state.sockets.len() != sockets.len() {
            return Err(HandOverRefused::Inconsistent("descriptors are missing"));
        }
        let sockets = state
            .sockets
            .into_iter()
            .zip(sockets)
            .map(|(SocketState { name, of_engine, prefix }, fd)| WrittenSocket {
                name: SockId(name),
                of_engine,
                prefix,
                fd,
            })
            .collect();
        let names = ops.take_over(&engine, sockets).map_err(HandOverRefused::Engine)?;
        let snapshot = self.snapshot();
        self.tls.take_over(&snapshot, state.certificates, state.next_stamp);
        for written in state.tunnels {
            let pod = match &written.role {
                RoleState::Accepted { pod, .. } => self.pod(PodKey(*pod)).map(Arc::clone),
                RoleState::Dialled { .. } => None,
            };
            let peer = PeerCertificate::try_from(&written.peer)?;
            if let Some(role) = self.tunnels.take_over(&written, peer, pod) {
                self.stats.tunnel_taken_over(role);
            }
        }
        let now = ops.now();
        for written in state.flows {
            let Some(pod) = self.pod(PodKey(written.pod)).map(Arc::clone) else {
                return Err(HandOverRefused::Inconsistent("a flow of a pod that is not there"));
            };
            let story = state.shared.story(written.story, now)?;
            let client = story.flow.client.addr();
            let held = held(&pod, story.flow.direction, client);
            let live = LiveFlow::new(story, pod, written.peer, written.rule, held)
                .asked_as(written.asked)
                .handed_over(
                    (written.established, written.established && written.announced),
                    written.reported,
                    written.cut_by,
                );
            self.flows.take_over(mesh_tunnel::RelayId::handed_over(written.relay), live);
        }
        self.take_waiting_over(ops, state.waiting, &names)
    }

    fn take_waiting_over(
        &mut self,
        ops: &mut Ops,
        waiting: Vec<WaitingState>,
        names: &BTreeMap<SockId, SockId>,
    ) -> Result<(), HandOverRefused> {
        for WaitingState { sock, pod, flow } in waiting {
            let sock = names.get(&SockId(sock)).copied();
            let (Some(sock), Some(pod)) = (sock, self.pod(PodKey(pod)).map(Arc::clone)) else {
                return Err(HandOverRefused::Inconsistent("a waiting connection"));
            };
            let handed = match flow {
                Some(flow) => {
                    let flow = flow.flow(ops.now());
                    let held = held(&pod, flow.direction, flow.client.addr());
                    Waiting::Conn(CapturedConn { flow, sock, pod, held, patience: None })
                }
                None => {
                    let Some(ends) = ops.ends(sock) else {
                        // It has ended meanwhile.
                        ops.abort(sock);
                        continue;
                    };
                    let deadline = ops.now() + self.config.limits.certificate_patience;
                    Waiting::Handshake { pod, sock, ends, deadline }
                }
            };
            self.handed_waiting.push(handed);
        }
        Ok(())
    }

    /// Holds the tunnel ports and begins no handshake, or goes on with both. Handshakes of peers that have said nothing yet
    /// begin anew afterwards, here or at a successor.
    pub(in crate::dataplane) fn hold_tunnel_ports(&mut self, ops: &mut Ops, held: bool) {
        self.holds_handshakes = held;
        for (id, port) in self.listener_ids() {
            if port == Port::Hbone {
                ops.hold_listener(id, held);
            }
        }
        if !held {
            for waiting in self.take_all_waiting(WaitFor::HandOver) {
                self.resume(ops, waiting);
            }
            return;
        }
        for (sock, tag, ends) in ops.take_untouched() {
            let (key, _port) = PodKey::of(tag);
            match self.pod(key).map(Arc::clone) {
                Some(pod) => self.tunnel_accepted(ops, &pod, sock, ends),
                None => ops.abort(sock),
            }
        }
    }
}

fn held(pod: &Arc<Pod>, direction: Direction, client: std::net::SocketAddr) -> Held {
    Held {
        slot: pod.admit_handed(),
        client_port: (direction == Direction::InboundPlaintext)
            .then(|| pod.plaintext_client(client)),
    }
}

/// A CONNECT that waits has been refused as not processed: its peer asks the successor.
fn written_waiting(waiting: &Waiting, now: std::time::Instant) -> Option<WaitingState> {
    match waiting {
        Waiting::Conn(conn) | Waiting::Name { conn, .. } => Some(WaitingState {
            sock: conn.sock.0,
            pod: conn.pod.key.0,
            flow: Some(BareFlow::of(&conn.flow, now)),
        }),
        Waiting::Handshake { pod, sock, .. } => {
            Some(WaitingState { sock: sock.0, pod: pod.key.0, flow: None })
        }
        Waiting::Request(_) => None,
    }
}
