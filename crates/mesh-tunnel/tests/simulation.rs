//! Two engines against each other on a network in memory, from a seed.
//!
//! `CULVERT_SIM_SEEDS` is how many seeds are run, `CULVERT_SIM_FIRST` where they begin. A failure names its seed.
//!
//! The last digits of a seed say what is simulated ([`Kind`]), so that each kind is a test of its own and they run side by side.
//! Most seeds move little, over sockets that cut it to pieces; some move much.
#![expect(clippy::unwrap_used, reason = "a test's own values are valid")]

mod support;

use std::collections::BTreeMap;
use std::time::Instant;

use mesh_model::{CloseReason, PodUid, WorkloadUid};
use mesh_tunnel::{
    ConnectHead, DialId, Engine, EngineConfig, EngineEvent, EngineStats, HandOverError, RelayId,
    ResponseHead, Retire, SockId, Suite, TunnelId,
};
use support::net::{Connect, Net};
use support::permit::permit;
use support::tap::Tap;
use support::{Rng, epoch, head, key, pattern, sessions};

/// What kind of world a seed makes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Kind {
    /// Resets, refusals, failed dials and broken wires happen; otherwise nothing may be lost.
    hostile: bool,
    /// Much is moved.
    bulk: bool,
}

impl Kind {
    const fn of(seed: u64) -> Self {
        Self { hostile: !seed.is_multiple_of(2), bulk: seed % 50 < 2 }
    }
}

/// What one application does with its socket.
#[derive(Clone, Debug)]
struct App {
    sock: SockId,
    flow: u64,
    /// Mixed into the pattern, so that the directions differ.
    direction: u64,
    to_send: u64,
    sent: u64,
    received: u64,
    fin_sent: bool,
    fin_seen: bool,
    failed: bool,
    closed: bool,
    /// Resets its socket after so many bytes sent.
    reset_after: Option<u64>,
    /// Percent of its turns in which it reads.
    diligence: usize,
    /// Speaks only after so many bytes were received.
    speaks_after: u64,
}

#[derive(Debug, Default)]
struct Flow {
    relay: Option<RelayId>,
    closed: Option<CloseReason>,
    accepted: Option<RelayId>,
    accepted_closed: Option<CloseReason>,
    clean: bool,
}

struct World {
    net: Net,
    rng: Rng,
    now: Instant,
    engines: [Engine; 2],
    configs: [EngineConfig; 2],
    owner: BTreeMap<SockId, usize>,
    apps: Vec<App>,
    flows: Vec<Flow>,
    by_relay: [BTreeMap<RelayId, usize>; 2],
    dials: Vec<(DialId, u32)>,
    tunnels: [BTreeMap<TunnelId, ()>; 2],
    key_update_after: [u64; 2],
    scarce: bool,
    wire_broken: bool,
    hostile: bool,
    scale: u64,
    suite: Suite,
}

fn config(rng: &mut Rng, bulk: bool) -> EngineConfig {
    fn pick<T: Copy>(rng: &mut Rng, choices: &[T]) -> T {
        choices[rng.below(choices.len())]
    }
    EngineConfig {
        stream_window: pick(rng, &[65_535, 100_000, 4 << 20]),
        connection_window: pick(rng, &[65_535, 200_000, 16 << 20]),
        max_frame_size: pick(rng, &[16_384, 1 << 20]),
        max_concurrent_streams: pick(rng, &[1, 3, 200]),
        streams_per_tunnel: pick(rng, &[1, 4, 100]),
        quantum: pick(rng, &[1_000, 20_000, 128 << 10]),
        send_buffer: pick(rng, &[32 << 10, 100_000, 512 << 10]),
        receive_buffer: if bulk { pick(rng, &[5_000, 256 << 10]) } else { pick(rng, RECEIVES) },
        early_data: pick(rng, &[0, 1, 48 << 10]),
        key_update_after: pick(rng, if bulk { &[50, 1 << 23] } else { &[2, 50, 1 << 23] }),
        queue_budget: pick(rng, &[100_000, 512 << 20]),
        ..EngineConfig::default()
    }
}

/// Sizes of one read of a tunnel, with few bytes under way.
const RECEIVES: &[usize] = &[1, 7, 100, 20_000, 256 << 10];

impl World {
    fn new(seed: u64, kind: Kind) -> Self {
        let mut rng = Rng(seed);
        let now = epoch();
        let configs = [config(&mut rng, kind.bulk), config(&mut rng, kind.bulk)];
        let suites = [Suite::Aes128Gcm, Suite::Aes256Gcm, Suite::Chacha20Poly1305];
        let fickle = rng.chance(70);
        let scale = if kind.bulk {
            [20_000, 200_000][rng.below(2)]
        } else {
            [10, 300, 3_000][rng.below(3)]
        };
        Self {
            net: Net::new(rng.next(), fickle),
            now,
            engines: configs.clone().map(|config| Engine::new(config, now)),
            scarce: configs.iter().any(|config| config.queue_budget < 1 << 20),
            key_update_after: configs.clone().map(|config| config.key_update_after),
            configs,
            owner: BTreeMap::new(),
            apps: Vec::new(),
            flows: Vec::new(),
            by_relay: [BTreeMap::new(), BTreeMap::new()],
            dials: Vec::new(),
            tunnels: [BTreeMap::new(), BTreeMap::new()],
            wire_broken: false,
            hostile: kind.hostile,
            scale,
            suite: suites[rng.below(3)],
            rng,
        }
    }

    fn app(&mut self, sock: SockId, flow: usize, direction: u64) -> App {
        let to_send = if self.rng.chance(15) { 0 } else { self.rng.next() % self.scale };
        let reset_after =
            (self.hostile && self.rng.chance(15)).then(|| self.rng.next() % self.scale);
        if reset_after.is_some() {
            self.flows[flow].clean = false;
        }
        App {
            sock,
            flow: flow as u64,
            direction,
            to_send,
            sent: 0,
            received: 0,
            fin_sent: false,
            fin_seen: false,
            failed: false,
            closed: false,
            reset_after,
            diligence: [5, 50, 100][self.rng.below(3)],
            speaks_after: 0,
        }
    }

    fn capacity(&mut self) -> usize {
        [1, 100, 5_000, 300_000][self.rng.below(4)].max(usize::try_from(self.scale / 20).unwrap())
    }

    fn open(&mut self) {
        let flow = self.flows.len();
        // A server's end may know of a break before the client's does.
        self.flows.push(Flow { clean: !self.wire_broken, ..Flow::default() });
        let capacity = self.capacity();
        let (near, far) = self.net.pair(capacity);
        self.owner.insert(near, 0);
        let app = self.app(far, flow, 0);
        self.apps.push(app);
        let relay = if self.rng.chance(20) {
            // A plain relay; the server's application is at its other end.
            let (upstream, server) = self.net.pair(capacity);
            self.owner.insert(upstream, 0);
            self.net.socks[Net::index(upstream)].connect = self.connect(flow);
            let app = self.app(server, flow, 1);
            self.apps.push(app);
            self.engines[0].splice(permit(), near, upstream, self.now)
        } else {
            let target = format!("workload-{}", self.rng.below(2));
            let head = ConnectHead { traceparent: Some("t".into()), ..head(&format!("f:{flow}")) };
            self.engines[0].open(permit(), key(&target), head, near, self.now)
        };
        self.flows[flow].relay = Some(relay);
        self.by_relay[0].insert(relay, flow);
    }

    fn connect(&mut self, flow: usize) -> Connect {
        match self.rng.below(10) {
            0 if self.hostile => {
                self.flows[flow].clean = false;
                Connect::Refused
            }
            1 if self.hostile => {
                self.flows[flow].clean = false;
                Connect::Never
            }
            2..5 => Connect::Later(u32::try_from(self.rng.below(4)).unwrap()),
            _ => Connect::Done,
        }
    }

    fn events(&mut self) {
        for side in 0..2 {
            while let Some(event) = self.engines[side].poll_event() {
                self.event(side, event);
            }
        }
    }

    fn event(&mut self, side: usize, event: EngineEvent) {
        match event {
            EngineEvent::Dial { dial, key } => {
                assert_eq!(side, 0);
                assert_eq!(key.pod, PodUid::new("client-pod"));
                let delay = u32::try_from(self.rng.below(20)).unwrap();
                self.dials.push((dial, delay));
            }
            EngineEvent::Request { request, head, tunnel } => {
                assert_eq!(side, 1);
                assert!(self.tunnels[1].contains_key(&tunnel));
                let flow: usize = head.authority.strip_prefix("f:").unwrap().parse().unwrap();
                if self.hostile && self.rng.chance(5) {
                    self.flows[flow].clean = false;
                    let status = [401, 503, 400][self.rng.below(3)];
                    let reason = CloseReason::PolicyDenied;
                    self.engines[1].refuse(request, status, reason, self.now);
                    return;
                }
                let capacity = self.capacity();
                let (near, far) = self.net.pair(capacity);
                self.owner.insert(near, 1);
                self.net.socks[Net::index(near)].connect = self.connect(flow);
                let app = self.app(far, flow, 1);
                self.apps.push(app);
                let response =
                    ResponseHead { baggage: Some("b".into()), ..ResponseHead::default() };
                let relay = self.engines[1].accept(permit(), request, near, response, self.now);
                assert_eq!(self.flows[flow].accepted, None, "a CONNECT was processed twice");
                self.flows[flow].accepted = Some(relay);
                self.by_relay[1].insert(relay, flow);
            }
            EngineEvent::Closed { relay, reason, .. } => {
                let flow = self.by_relay[side][&relay];
                let slot = if side == 0 {
                    &mut self.flows[flow].closed
                } else {
                    &mut self.flows[flow].accepted_closed
                };
                assert_eq!(*slot, None, "closed twice");
                *slot = Some(reason);
                // Where there is little memory, that may happen to anybody; otherwise to nobody.
                self.flows[flow].clean &= !(self.scarce && reason == CloseReason::Overloaded);
            }
            EngineEvent::TunnelClosed { tunnel, .. } => {
                assert_eq!(self.tunnels[side].remove(&tunnel), Some(()), "tunnel closed twice");
            }
            EngineEvent::Established { relay, .. } => {
                assert!(self.by_relay[side].contains_key(&relay));
            }
            EngineEvent::RequestGone { .. } => {}
            other => panic!("unknown event {other:?}"),
        }
    }

    fn answer_dials(&mut self) {
        for (dial, delay) in std::mem::take(&mut self.dials) {
            if delay > 0 {
                self.dials.push((dial, delay - 1));
                continue;
            }
            if self.hostile && self.rng.chance(10) {
                // Whoever waits for it fails.
                for flow in &mut self.flows {
                    flow.clean &= flow.accepted.is_some();
                }
                let reason = CloseReason::TunnelConnectFailed;
                self.engines[0].dial_failed(dial, reason, self.now);
                continue;
            }
            let capacity = self.capacity().max(100);
            let (near, far) = self.net.pair(capacity);
            self.owner.insert(near, 0);
            self.owner.insert(far, 1);
            let (client, server) = sessions(self.suite, &mut self.rng);
            for (sock, session, after) in [
                (near, &client, self.key_update_after[0]),
                (far, &server, self.key_update_after[1]),
            ] {
                let tap = Tap::new(self.suite, &session.tx, after);
                self.net.socks[Net::index(sock)].tap = Some(Box::new(tap));
            }
            let pod = PodUid::new("server-pod");
            let id = self.engines[1].add_server_tunnel(pod, server, far, self.now);
            self.tunnels[1].insert(id, ());
            if let Some(id) = self.engines[0].dial_succeeded(dial, client, near, self.now) {
                self.tunnels[0].insert(id, ());
            }
        }
    }

    fn run_app(&mut self, index: usize) -> bool {
        if self.apps[index].closed {
            return false;
        }
        let mut app = self.apps[index].clone();
        let (waiting, ends) = (self.net.waiting(app.sock), self.net.ends(app.sock));
        // A lazy reader is no reason to think that nothing moves.
        let mut busy = waiting > 0 || (ends && !app.fin_seen);
        if busy && self.rng.chance(app.diligence) {
            let limit = 1 + self.rng.below(50_000);
            match self.net.read(app.sock, limit) {
                Ok(bytes) if bytes.is_empty() => app.fin_seen = true,
                Ok(bytes) => {
                    let stream = app.flow * 2 + (1 - app.direction);
                    for byte in bytes {
                        let expected = pattern(stream, app.received);
                        assert_eq!(byte, expected, "flow {} at {}", app.flow, app.received);
                        app.received += 1;
                    }
                }
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
                Err(_) => app.failed = true,
            }
        }
        let speaks = app.received >= app.speaks_after;
        if !app.failed && !app.fin_sent && speaks {
            let left = app.to_send - app.sent;
            if left > 0 {
                let take = (1 + self.rng.next() % 30_000).min(left);
                let stream = app.flow * 2 + app.direction;
                let bytes: Vec<u8> =
                    (app.sent..app.sent + take).map(|at| pattern(stream, at)).collect();
                match self.net.write(app.sock, &bytes) {
                    Ok(count) => {
                        busy = true;
                        app.sent += count as u64;
                    }
                    Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
                    Err(_) => app.failed = true,
                }
            } else {
                busy = true;
                app.fin_sent = true;
                use mesh_tunnel::Io;
                app.failed = self.net.shutdown_write(app.sock).is_err();
            }
        }
        use mesh_tunnel::Io;
        if app.reset_after.is_some_and(|after| app.sent >= after) {
            self.net.abort(app.sock);
            app.closed = true;
        } else if app.failed || (app.fin_sent && app.fin_seen) {
            self.net.close(app.sock);
            app.closed = true;
        }
        busy |= app.closed;
        self.apps[index] = app;
        busy
    }

    fn mischief(&mut self) {
        match self.rng.below(60) {
            0 => {
                let side = self.rng.below(2);
                if let Some(tunnel) = self.tunnels[side].keys().next().copied() {
                    // A retired tunnel loses nothing: its streams finish, new ones go elsewhere.
                    self.engines[side].retire(Retire::Tunnel(tunnel), self.now);
                }
            }
            1 if self.hostile => {
                let side = self.rng.below(2);
                let count = self.by_relay[side].len();
                let place = self.rng.below(count);
                if let Some((relay, flow)) = self.by_relay[side].iter().nth(place) {
                    self.flows[*flow].clean = false;
                    let relay = *relay;
                    self.engines[side].cut(relay, CloseReason::PolicyChanged, self.now);
                }
            }
            2 if self.hostile && self.rng.chance(20) => {
                // A tunnel's wire breaks: everything on it may fail.
                for flow in &mut self.flows {
                    flow.clean = false;
                }
                let wires: Vec<SockId> = self.owner.keys().copied().collect();
                if !wires.is_empty() {
                    self.wire_broken = true;
                    let sock = wires[self.rng.below(wires.len())];
                    let ready = mesh_tunnel::Readiness { error: true, ..Default::default() };
                    self.engines[self.owner[&sock]].on_event(sock, ready);
                }
            }
            3 if self.hostile && self.rng.chance(20) => {
                for flow in &mut self.flows {
                    flow.clean = false;
                }
                let uid = WorkloadUid::new("workload-0");
                self.engines[0].retire(Retire::Target(uid), self.now);
            }
            4..8 => {
                let side = self.rng.below(2);
                self.hand_over(side);
            }
            _ => {}
        }
    }

    /// An engine's process ends, and another goes on; or the other fails and the first goes on. Nobody notices.
    fn hand_over(&mut self, side: usize) {
        let state = self.engines[side].hand_over(&mut self.net, self.now);
        self.events();
        let mut config = self.configs[side].clone();
        let fails = self.rng.chance(30);
        if self.rng.chance(30) {
            // The successor may be set up differently.
            config.quantum = 5_000;
            config.send_buffer = 64 << 10;
        }
        let mut missing = fails;
        let successor = Engine::take_over(config, &state, self.now, |sock| {
            (!std::mem::take(&mut missing)).then_some(sock)
        });
        match successor {
            Ok(successor) if !fails => {
                let (before, after) = (self.engines[side].stats(), successor.stats());
                assert_eq!(after.tunnels, before.tunnels);
                assert_eq!(after.streams, before.streams);
                assert_eq!(after.splices, before.splices);
                assert_eq!(after.sockets, before.sockets);
                assert_eq!(after.queued_bytes, before.queued_bytes);
                let again = Engine::take_over(self.configs[side].clone(), &state, self.now, Some);
                assert!(again.is_ok());
                self.engines[side] = successor;
            }
            Ok(successor) => assert_eq!(successor.stats().sockets, 0),
            Err(error) => assert!(matches!(error, HandOverError::MissingSocket(_)), "{error}"),
        }
    }

    /// One step; false when nothing moves any more.
    fn step(&mut self) -> bool {
        let mut busy = false;
        for (sock, ready) in self.net.take_edges() {
            if let Some(side) = self.owner.get(&sock) {
                busy = true;
                self.engines[*side].on_event(sock, ready);
            }
        }
        for side in 0..2 {
            busy |= self.engines[side].turn(&mut self.net, self.now);
            self.events();
        }
        busy |= !self.dials.is_empty();
        self.answer_dials();
        for app in 0..self.apps.len() {
            busy |= self.run_app(app);
        }
        busy || !self.net.edges.is_empty()
    }

    fn settle(&mut self) {
        let (mut steps, mut quiet) = (0, 0);
        while quiet < 3 {
            steps += 1;
            assert!(steps < 3_000_000, "it does not settle");
            quiet = if self.step() { 0 } else { quiet + 1 };
        }
    }

    /// Time jumps to the next thing an engine waits for. False if there is none.
    fn jump(&mut self) -> bool {
        let next = self.engines.iter().filter_map(Engine::poll_timeout).min();
        if let Some(next) = next {
            self.now = self.now.max(next);
            self.settle();
        }
        next.is_some()
    }

    fn all_closed(&self) -> bool {
        self.flows.iter().all(|flow| {
            flow.closed.is_some() && flow.accepted.is_some() == flow.accepted_closed.is_some()
        })
    }
}

fn run(seed: u64) {
    let kind = Kind::of(seed);
    let mut world = World::new(seed, kind);
    let flows = 1 + world.rng.below(if kind.bulk { 12 } else { 8 });
    for _ in 0..200 {
        if world.flows.len() < flows && world.rng.chance(20) {
            world.open();
        }
        if world.rng.chance(30) {
            world.mischief();
        }
        world.step();
    }
    while world.flows.len() < flows {
        world.open();
    }
    // Time passes only when nothing moves, so that no timer fires on a healthy flow.
    world.settle();
    for _ in 0..100 {
        if world.all_closed() || !world.jump() {
            break;
        }
    }
    for (number, flow) in world.flows.iter().enumerate() {
        assert!(flow.closed.is_some(), "flow {number} hangs: {flow:?}");
        assert_eq!(flow.accepted.is_some(), flow.accepted_closed.is_some(), "flow {number}");
        if flow.clean {
            assert_eq!(flow.closed, Some(CloseReason::Complete), "flow {number}: {flow:?}");
            let apps: Vec<&App> =
                world.apps.iter().filter(|app| app.flow == number as u64).collect();
            assert_eq!(apps.len(), 2, "flow {number}");
            for (one, other) in [(0, 1), (1, 0)] {
                assert_eq!(apps[one].received, apps[other].to_send, "flow {number}");
                assert!(!apps[one].failed);
            }
        }
    }
    // Either the tunnels are told to go, or they go by themselves when they have idled long enough.
    if world.rng.chance(50) {
        for engine in &mut world.engines {
            engine.retire(Retire::All, world.now);
        }
    }
    world.settle();
    for _ in 0..1_000 {
        if !world.jump() {
            break;
        }
    }
    for engine in &world.engines {
        assert_eq!(engine.stats(), EngineStats::default());
    }
    for (sock, side) in &world.owner {
        assert!(world.net.socks[Net::index(*sock)].closed, "engine {side} leaks socket {sock:?}");
    }
}

fn run_all(kind: Kind) {
    for seed in support::seeds(20_000).filter(|seed| Kind::of(*seed) == kind) {
        let result = std::panic::catch_unwind(|| run(seed));
        if let Err(panic) = result {
            let cause = panic
                .downcast_ref::<String>()
                .map(String::as_str)
                .or_else(|| panic.downcast_ref::<&str>().copied())
                .unwrap_or("see above");
            panic!("seed {seed}: {cause}\nagain by CULVERT_SIM_FIRST={seed} CULVERT_SIM_SEEDS=1");
        }
    }
}

#[test]
fn on_a_calm_network_nothing_is_lost() {
    run_all(Kind { hostile: false, bulk: false });
}

#[test]
fn on_a_hostile_network_what_arrives_is_right() {
    run_all(Kind { hostile: true, bulk: false });
}

#[test]
fn much_is_carried_over_a_calm_network() {
    run_all(Kind { hostile: false, bulk: true });
}

#[test]
fn much_is_carried_over_a_hostile_network() {
    run_all(Kind { hostile: true, bulk: true });
}
