//! Handing everything over to a successor in another process, and taking it over.

use std::collections::BTreeMap;
use std::time::Instant;

use prost::Message as _;
use zeroize::Zeroizing;

use super::{Doom, Engine, Owner};
use crate::config::EngineConfig;
use crate::event::{TunnelId, TunnelKey};
use crate::frame::ErrorCode;
use crate::handover::{EngineState, FORMAT, HandOverError, StreamState, TunnelState, check};
use crate::io::{Io, SockId};
use crate::slab::Slab;
use crate::splice::{End, Splice};
use crate::stream::{Phase, Side};
use crate::timer::TimerKey;
use crate::tunnel::{Role, TunnelPhase};

impl Engine {
    /// Writes everything down for a successor.
    ///
    /// From here on this engine must not have a turn, unless it is certain that the successor never will: both would seal
    /// different bytes with one nonce. Sockets are named as this engine names them and must be handed over with the state;
    /// relays and tunnels keep their names. Requests that nobody has answered are refused as not processed, so that the peer
    /// asks again: events are to be drained afterwards. Dials are not handed over: the successor asks for them anew.
    ///
    /// The result holds the traffic secrets of live tunnels.
    pub fn hand_over(&mut self, io: &mut impl Io, now: Instant) -> Zeroizing<Vec<u8>> {
        self.now = now;
        let unanswered: Vec<u64> = self
            .streams
            .keys()
            .filter(|key| self.streams.get(*key).is_some_and(|s| s.phase == Phase::Requested))
            .collect();
        for key in unanswered {
            let reason = mesh_model::CloseReason::Drained;
            self.reset_stream(key, ErrorCode::REFUSED_STREAM, reason);
        }
        for (sock, doom) in self.doomed.drain(..) {
            match doom {
                Doom::Close => io.close(sock),
                Doom::Abort => io.abort(sock),
            }
        }
        let mut state = EngineState {
            format: FORMAT,
            needs: FORMAT,
            tunnels: Vec::with_capacity(self.tunnels.len()),
            streams: Vec::with_capacity(self.streams.len()),
            splices: Vec::with_capacity(self.splices.len()),
            tunnel_generation: self.tunnels.newest_generation(),
            stream_generation: self.streams.newest_generation(),
            splice_generation: self.splices.newest_generation(),
            next_dial: self.pool.next_dial(),
        };
        for name in self.tunnels.keys().collect::<Vec<_>>() {
            let Some(tunnel) = self.tunnels.get_mut(name) else { continue };
            let limit = match &tunnel.role {
                Role::Client(key) => self.pool.limit(key, TunnelId(name)),
                Role::Server => None,
            };
            state.tunnels.push(TunnelState::of(name, tunnel, limit, now));
        }
        for name in self.streams.keys() {
            let written = self.streams.get(name).and_then(|s| StreamState::of(name, s, now));
            state.streams.extend(written);
        }
        for name in self.splices.keys() {
            state.splices.extend(self.splices.get(name).map(|splice| splice.state(name, now)));
        }
        let bytes = Zeroizing::new(state.encode_to_vec());
        for tunnel in &mut state.tunnels {
            tunnel.forget_secrets();
        }
        bytes
    }

    /// Goes on where a predecessor has stopped. `rename` says what a socket of the predecessor is called here.
    ///
    /// Nothing is sealed, read or sent before the first [`turn`](Self::turn). Limits and times are those of `config`; what was
    /// promised to peers (windows) stays.
    ///
    /// # Errors
    /// When the state was written by an engine too new, or by none. Nothing has happened then.
    pub fn take_over(
        config: EngineConfig,
        state: &[u8],
        now: Instant,
        mut rename: impl FnMut(SockId) -> Option<SockId>,
    ) -> Result<Self, HandOverError> {
        let mut state = EngineState::decode(state)?;
        check(state.format > 0, "no format")?;
        if state.needs > FORMAT {
            return Err(HandOverError::Format { needs: state.needs });
        }
        let mut sock = |name: u64| {
            let name = SockId(name);
            rename(name).ok_or(HandOverError::MissingSocket(name))
        };
        let mut engine = Self::new(config, now);
        engine.pool.number_dials_from(state.next_dial);
        let mut tunnels = Vec::with_capacity(state.tunnels.len());
        let mut limits = BTreeMap::new();
        for written in &mut state.tunnels {
            let tunnel = written.tunnel(sock(written.sock)?, &engine.config, now)?;
            written.forget_secrets();
            limits.extend(written.stream_limit.map(|limit| (written.name, limit)));
            tunnels.push((written.name, tunnel));
        }
        let mut streams = Vec::with_capacity(state.streams.len());
        for written in state.streams {
            let (name, app) = (written.name, sock(written.app)?);
            streams.push((name, written.stream(app, now)?));
        }
        let mut splices = Vec::with_capacity(state.splices.len());
        for written in state.splices {
            let (name, app, upstream) = (written.name, sock(written.app)?, sock(written.upstream)?);
            splices.push((name, Splice::from_state(written, app, upstream, now)?));
        }
        const NAMES: HandOverError = HandOverError::Inconsistent("names given twice");
        engine.tunnels = Slab::restore(tunnels, state.tunnel_generation).ok_or(NAMES)?;
        engine.streams = Slab::restore(streams, state.stream_generation).ok_or(NAMES)?;
        engine.splices = Slab::restore(splices, state.splice_generation).ok_or(NAMES)?;
        engine.reconnect(&limits)?;
        Ok(engine)
    }

    /// The sockets it owns: those of tunnels, then of streams, then of plain relays.
    pub fn sockets(&self) -> impl Iterator<Item = SockId> + '_ {
        let tunnels = self.tunnels.keys().filter_map(|name| self.tunnels.get(name));
        let streams = self.streams.keys().filter_map(|name| self.streams.get(name)?.app);
        let splices = self.splices.keys().filter_map(|name| self.splices.get(name));
        let splices = splices.flat_map(|splice| [splice.app, splice.upstream]);
        tunnels.map(|tunnel| tunnel.sock).chain(streams).chain(splices)
    }

    /// Ties together what was taken over: streams to tunnels, tunnels to the pool, sockets to all, and sets the clocks.
    fn reconnect(&mut self, limits: &BTreeMap<u64, u32>) -> Result<(), HandOverError> {
        let mut waiting = Vec::new();
        for name in self.streams.keys().collect::<Vec<_>>() {
            self.reconnect_stream(name, &mut waiting)?;
        }
        for name in self.tunnels.keys().collect::<Vec<_>>() {
            self.reconnect_tunnel(name, limits.get(&name).copied())?;
        }
        for name in self.splices.keys().collect::<Vec<_>>() {
            let Some(splice) = self.splices.get(name) else { continue };
            let socks = [(splice.app, End::App), (splice.upstream, End::Upstream)];
            self.queued += splice.queued();
            if let Some(at) = splice.deadline {
                self.timers.insert(at, TimerKey::Splice(name));
            }
            for (sock, end) in socks {
                let before = self.socks.insert(sock, Owner::Splice(name, end));
                check(before.is_none(), "a socket used twice")?;
            }
            self.schedule_splice(name);
        }
        for name in self.streams.keys().collect::<Vec<_>>() {
            self.look_at(name);
            self.enter_round(name);
        }
        for name in waiting {
            self.place(name);
        }
        Ok(())
    }

    fn reconnect_stream(&mut self, name: u64, waiting: &mut Vec<u64>) -> Result<(), HandOverError> {
        let Some(stream) = self.streams.get_mut(name) else { return Ok(()) };
        self.queued += stream.queue.len();
        if let Some(at) = stream.deadline {
            self.timers.insert(at, TimerKey::Stream(name));
        }
        if let Some(app) = stream.app {
            let before = self.socks.insert(app, Owner::Stream(name));
            check(before.is_none(), "a socket used twice")?;
        }
        if stream.phase == Phase::Waiting {
            waiting.push(name);
            return Ok(());
        }
        if stream.flags.detached {
            return Ok(());
        }
        let (id, client) = (stream.id, stream.side == Side::Client);
        let tunnel = self.tunnels.get_mut(stream.tunnel);
        let tunnel = tunnel.ok_or(HandOverError::Inconsistent("a stream without a tunnel"))?;
        check(!tunnel.is_lingering(), "a stream of a closed tunnel")?;
        check(tunnel.is_server() != client, "a stream of the wrong side")?;
        check(!tunnel.is_idle_id(id), "a stream id that was never used")?;
        check(tunnel.streams.insert(id, name).is_none(), "a stream id used twice")
    }

    fn reconnect_tunnel(&mut self, name: u64, limit: Option<u32>) -> Result<(), HandOverError> {
        let Some(tunnel) = self.tunnels.get_mut(name) else { return Ok(()) };
        let before = self.socks.insert(tunnel.sock, Owner::Tunnel(name));
        check(before.is_none(), "a socket used twice")?;
        if let Some(target) = tunnel.data_target
            && tunnel.streams.values().all(|stream| *stream != target)
        {
            // It has ended meanwhile: the rest of the frame is dropped, as it would have been.
            tunnel.data_target = None;
        }
        if let Role::Client(key) = &mut tunnel.role
            && tunnel.phase == TunnelPhase::Up
        {
            *key = self.pool.intern(TunnelKey::clone(key));
            let streams = u32::try_from(tunnel.streams.len()).unwrap_or(u32::MAX);
            let limit = limit.unwrap_or(self.config.streams_per_tunnel);
            self.pool.adopt(key, TunnelId(name), streams, limit);
        }
        self.set_tunnel_timer(name);
        self.schedule_tunnel(name);
        Ok(())
    }
}
