//! The listeners in a pod's network namespace: opened, counted as the worker's, opened again when somebody inside ends them.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use mesh_model::ports;
use mesh_net::driver::Handler as _;
use mesh_net::driver::ops::{ListenerId, ListenerTag, Ops};
use mesh_net::socket::{self, Far, ListenOptions};

use crate::dataplane::pods::{Pod, PodKey, Port};
use crate::dataplane::worker::{NodeWorker, ServedPod};

/// A listener of a pod, and its place in the kernel's table.
#[derive(Clone, Copy, Debug)]
pub(super) struct ServedListener {
    pub(super) id: ListenerId,
    pub(super) port: Port,
    pub(super) slot: u16,
}

/// Until a listener that was ended from inside its pod is opened again: whoever ends them in a loop costs next to nothing.
const REOPEN_PAUSE: Duration = Duration::from_millis(200);

impl NodeWorker {
    /// A listener that is this worker's from here on.
    pub(super) fn serve_listener(&mut self, key: PodKey, id: ListenerId, slot: u16, port: Port) {
        if let Some(served) = self.pods.get_mut(&key) {
            served.listeners.push(ServedListener { id, port, slot });
        }
    }

    /// Opens the ports of a pod that was taken over, beside the listeners that came with it.
    pub(super) fn open_handed(&mut self, ops: &mut Ops, key: PodKey) -> io::Result<()> {
        let Some(pod) = self.pod(key).map(Arc::clone) else { return Ok(()) };
        let mut served = ServedPod { pod, listeners: Vec::new() };
        let opened = self.open_ports(ops, &mut served);
        for ServedListener { id, port, slot } in served.listeners {
            self.serve_listener(key, id, slot, port);
        }
        opened
    }

    /// The listeners, and what they are for.
    pub(super) fn listener_ids(&self) -> Vec<(ListenerId, Port)> {
        let all = self.pods.values().flat_map(|served| &served.listeners);
        all.map(|listener| (listener.id, listener.port)).collect()
    }

    /// A listener's place in the kernel's table.
    pub(super) fn slot_of(&self, id: ListenerId) -> Option<u16> {
        let mut all = self.pods.values().flat_map(|served| &served.listeners);
        all.find(|listener| listener.id == id).map(|listener| listener.slot)
    }

    pub(super) fn open_ports(&self, ops: &mut Ops, served: &mut ServedPod) -> io::Result<()> {
        for port in [Port::Outbound, Port::Plaintext, Port::Hbone] {
            self.open_port(ops, served, port, self.slot)?;
        }
        Ok(())
    }

    fn open_port(
        &self,
        ops: &mut Ops,
        served: &mut ServedPod,
        port: Port,
        slot: u16,
    ) -> io::Result<()> {
        let (number, far) = match port {
            Port::Outbound => (ports::OUTBOUND, Far::App),
            Port::Plaintext => (ports::INBOUND_PLAINTEXT, Far::App),
            Port::Hbone => (ports::HBONE, Far::Agent),
        };
        let options = ListenOptions { keepalive: self.config.keepalive, far };
        let listener = socket::listen(&served.pod.sockets.netns, number, &self.label, options)?;
        let id = ops.add_listener(served.pod.key.tag(port), listener)?;
        served.listeners.push(ServedListener { id, port, slot });
        let listener = ops.listener_fd(id).ok_or(io::ErrorKind::NotFound)?;
        self.capture.add_listener(&served.pod.sockets, number, slot, listener)
    }

    /// Opens again what was ended from inside its pod. What fails is tried again.
    pub(super) fn reopen_listeners(&mut self, ops: &mut Ops) {
        self.reopen_at = None;
        for (key, port, slot) in std::mem::take(&mut self.ended_listeners) {
            let Some(mut served) = self.pods.remove(&key) else { continue };
            let before = served.listeners.len();
            if let Err(error) = self.open_port(ops, &mut served, port, slot) {
                tracing::debug!(pod = %served.pod.sockets.name, ?port, %error, "a listener cannot be opened again yet");
                served.listeners.drain(before..).for_each(|opened| ops.remove_listener(opened.id));
                self.ended_listeners.insert((key, port, slot));
                self.reopen_at = Some(ops.now() + REOPEN_PAUSE);
            }
            self.pods.insert(key, served);
        }
    }

    /// Notes that somebody ended a listener from inside its pod, to open it again.
    pub(super) fn note_ended_listener(&mut self, ops: &Ops, id: ListenerId, tag: ListenerTag) {
        let (key, port) = PodKey::of(tag);
        let Some(served) = self.pods.get_mut(&key) else { return };
        let Some(place) = served.listeners.iter().position(|listener| listener.id == id) else {
            return;
        };
        let ended = served.listeners.swap_remove(place);
        if self.ended_listeners.insert((key, port, ended.slot)) {
            let Pod { sockets, .. } = &*served.pod;
            tracing::warn!(
                namespace = %sockets.namespace, pod = %sockets.name, ?port,
                "a listener of this agent was ended from inside its pod; it is opened again"
            );
        }
        self.stats.listener_ended();
        self.reopen_at.get_or_insert_with(|| ops.now() + REOPEN_PAUSE);
    }

    /// Takes in what was captured before capture ended and lies in the queues of a pod's listeners: for its client it is open.
    pub(super) fn accept_the_last(&mut self, ops: &mut Ops, key: PodKey) {
        let Some(served) = self.pods.get(&key) else { return };
        let listeners: Vec<_> = served.listeners.iter().map(|one| (one.port, one.id)).collect();
        for (port, id) in listeners {
            for (sock, ends) in ops.take_queued(id) {
                self.accepted(ops, key.tag(port), sock, ends);
            }
        }
    }
}
