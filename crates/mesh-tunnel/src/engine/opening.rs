//! From an open to a stream: pool, dial, CONNECT, and once more if the peer did not process it.

use mesh_model::CloseReason;

use super::{Doom, Ending, Engine, Owner};
use crate::event::{DialId, EngineEvent, RelayBytes, RelayId, Retire, TunnelId, TunnelKey};
use crate::frame::{MAX_STREAM_ID, headers};
use crate::head::ConnectHead;
use crate::io::SockId;
use crate::pool::{Granted, Placement};
use crate::queue::ByteQueue;
use crate::session::TlsSession;
use crate::stream::{Flags, Opening, Phase, Setup, Side, Stream};
use crate::timer::TimerKey;
use crate::tunnel::{Role, Tunnel};
use crate::window::{ReceiveWindow, SendWindow};

/// CONNECTs sent for one open before it fails.
const MAX_ATTEMPTS: u8 = 5;
/// A tunnel whose stream ids are nearly used up takes no more.
const LAST_STREAM: u32 = MAX_STREAM_ID - 1_000;

impl Engine {
    pub(super) fn relays(&self) -> usize {
        self.streams.len() + self.splices.len()
    }

    pub(super) fn open_stream(
        &mut self,
        key: TunnelKey,
        head: ConnectHead,
        app: SockId,
    ) -> RelayId {
        let sendable = head.is_sendable();
        let opening = Opening {
            key: self.pool.intern(key),
            head,
            attempts: 0,
            early: Vec::new(),
            early_sent: 0,
            answered: false,
        };
        let full = self.relays() >= self.config.max_relays;
        let stream = self.streams.insert(Stream {
            side: Side::Client,
            phase: Phase::Waiting,
            app: Some(app),
            tunnel: 0,
            id: 0,
            send_window: SendWindow::new(0),
            receive_window: ReceiveWindow::new(self.config.stream_window),
            queue: ByteQueue::default(),
            withheld: 0,
            bytes: RelayBytes::default(),
            setup: Setup::Opening(Box::new(opening)),
            deadline: None,
            flags: Flags { readable: true, writable: true, ..Flags::default() },
        });
        self.socks.insert(app, Owner::Stream(stream));
        if full {
            self.end_stream(stream, CloseReason::Overloaded, Doom::Abort);
        } else if !sendable {
            self.end_stream(stream, CloseReason::Internal, Doom::Abort);
        } else {
            self.place(stream);
        }
        RelayId(stream)
    }

    /// Finds a tunnel for a waiting stream.
    pub(super) fn place(&mut self, stream: u64) {
        let Some(key) = self.streams.get(stream).and_then(Stream::opening).map(|o| o.key.clone())
        else {
            return;
        };
        match self.pool.place(&key, stream) {
            Placement::On(tunnel) => self.start_stream(stream, tunnel),
            Placement::Waiting => {}
            Placement::Dial(dial) => self.start_dial(dial),
            Placement::Full => self.end_stream(stream, CloseReason::Overloaded, Doom::Abort),
        }
    }

    /// Starts what a change in the pool has set free.
    pub(super) fn granted(&mut self, granted: Granted) {
        for (stream, tunnel) in granted.placed {
            self.start_stream(stream, tunnel);
        }
        if let Some(dial) = granted.dial {
            self.start_dial(dial);
        }
        for open in granted.crowded_out {
            self.end_stream(open, CloseReason::Overloaded, Doom::Abort);
        }
    }

    fn start_dial(&mut self, dial: DialId) {
        let Some(key) = self.pool.dial_key(dial).cloned() else { return };
        if self.tunnels.len() >= self.config.max_tunnels {
            self.fail_dial(dial, CloseReason::Overloaded);
            return;
        }
        if let Some(at) = self.now.checked_add(self.config.dial_timeout) {
            self.timers.insert(at, TimerKey::Dial(dial.0));
            self.dial_deadlines.insert(dial, at);
        }
        self.events.push_back(EngineEvent::Dial { dial, key });
    }

    /// Fails the opens that wait for a dial, and says which.
    pub(super) fn fail_dial(&mut self, dial: DialId, reason: CloseReason) -> Vec<RelayId> {
        self.forget_dial(dial);
        let failed = self.pool.dial_failed(dial);
        for open in &failed {
            self.end_stream(*open, reason, Doom::Abort);
        }
        failed.into_iter().map(RelayId).collect()
    }

    fn forget_dial(&mut self, dial: DialId) {
        if let Some(at) = self.dial_deadlines.remove(&dial) {
            self.timers.remove(at, TimerKey::Dial(dial.0));
        }
    }

    /// Fails the opens that wait for the tunnels meant; a dial for them is no longer wanted.
    pub(super) fn give_up_waiting(&mut self, which: &Retire, reason: CloseReason) {
        let given_up = self.pool.give_up(which);
        let dials: Vec<_> = self.dial_deadlines.keys().copied().collect();
        for dial in dials {
            if self.pool.dial_key(dial).is_none() {
                self.forget_dial(dial);
            }
        }
        for open in given_up {
            self.end_stream(open, reason, Doom::Abort);
        }
    }

    pub(super) fn add_client_tunnel(
        &mut self,
        dial: DialId,
        session: TlsSession,
        sock: SockId,
    ) -> Option<TunnelId> {
        let Some(key) = self.pool.dial_key(dial).cloned() else {
            self.doomed.push((sock, Doom::Close));
            return None;
        };
        self.forget_dial(dial);
        let pod = key.pod.clone();
        let role = Role::Client(key);
        let tunnel = Tunnel::new(session, sock, pod, role, &self.config, self.now);
        let id = TunnelId(self.insert_tunnel(tunnel));
        let granted = self.pool.dialled(dial, id, self.config.streams_per_tunnel);
        self.granted(granted);
        Some(id)
    }

    /// Sends the CONNECT of a placed stream.
    fn start_stream(&mut self, key: u64, tunnel_id: TunnelId) {
        let Some(stream) = self.streams.get_mut(key) else {
            return self.release_place(tunnel_id);
        };
        let Some(tunnel) = self.tunnels.get_mut(tunnel_id.0) else { return };
        let id = tunnel.next_stream;
        tunnel.next_stream += 2;
        stream.phase = Phase::Asked;
        stream.tunnel = tunnel_id.0;
        stream.id = id;
        stream.send_window = SendWindow::new(tunnel.peer_initial_window);
        stream.receive_window = ReceiveWindow::new(self.config.stream_window);
        let Some(opening) = stream.opening_mut() else { return };
        opening.attempts += 1;
        let frames = headers(id, false, &opening.head.encode(), tunnel.peer_frame_size);
        stream.deadline = self.now.checked_add(self.config.answer_timeout);
        if let Some(at) = stream.deadline {
            self.timers.insert(at, TimerKey::Stream(key));
        }
        tunnel.streams.insert(id, key);
        tunnel.idle_since = None;
        if tunnel.out.control(&frames, &mut self.buffers).is_err() {
            tunnel.overflowed = true;
        }
        if tunnel.next_stream >= LAST_STREAM {
            self.drain_tunnel(tunnel_id.0);
        }
        self.schedule_tunnel(tunnel_id.0);
        self.enter_round(key);
    }

    fn release_place(&mut self, tunnel_id: TunnelId) {
        if let Some(Tunnel { role: Role::Client(key), .. }) = self.tunnels.get(tunnel_id.0) {
            let granted = self.pool.release(&key.clone(), tunnel_id);
            self.granted(granted);
        }
    }

    /// The peer has not processed a CONNECT: it is sent again, elsewhere, with what the application said so far.
    pub(super) fn retry(&mut self, key: u64, reason: CloseReason) {
        self.leave_tunnel(key, true);
        self.clear_deadline(key);
        let Some(stream) = self.streams.get_mut(key) else { return };
        stream.phase = Phase::Waiting;
        stream.tunnel = 0;
        stream.flags.end_sent = false;
        stream.flags.in_round = false;
        let attempts = stream.opening_mut().map(|opening| {
            opening.early_sent = 0;
            opening.attempts
        });
        if attempts.is_some_and(|attempts| attempts < MAX_ATTEMPTS) {
            self.place(key);
        } else {
            self.end_stream(key, reason, Doom::Abort);
        }
    }

    /// An overflowing tunnel ends here.
    pub(super) fn overflow_ending() -> Ending {
        crate::outbox::OutboxFull.into()
    }
}
