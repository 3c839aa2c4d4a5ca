//! Two engines against each other on a network in memory, from a seed.
//!
//! `CULVERT_SIM_SEEDS` is how many seeds are run, `CULVERT_SIM_FIRST` where they begin. A failure names its seed.

mod support;

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use mesh_model::{CloseReason, PodUid, WorkloadUid};
use mesh_tunnel::{
    ConnectHead, DialId, Engine, EngineConfig, EngineEvent, EngineStats, RelayId, ResponseHead,
    Retire, SockId, Suite, TunnelId,
};
use support::net::{Connect, Net};
use support::permit::permit;
use support::{Rng, epoch, head, key, pattern, sessions};

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
    owner: BTreeMap<SockId, usize>,
    apps: Vec<App>,
    flows: Vec<Flow>,
    by_relay: [BTreeMap<RelayId, usize>; 2],
    dials: Vec<(DialId, u32)>,
    tunnels: [BTreeMap<TunnelId, ()>; 2],
    hostile: bool,
    scale: u64,
    suite: Suite,
}

fn config(rng: &mut Rng) -> EngineConfig {
    let pick = |rng: &mut Rng, choices: &[usize]| choices[rng.below(choices.len())];
    EngineConfig {
        stream_window: pick(rng, &[65_535, 100_000, 4 << 20]) as u32,
        connection_window: pick(rng, &[65_535, 200_000, 16 << 20]) as u32,
        max_frame_size: pick(rng, &[16_384, 1 << 20]) as u32,
        max_concurrent_streams: pick(rng, &[1, 3, 200]) as u32,
        streams_per_tunnel: pick(rng, &[1, 4, 100]) as u32,
        quantum: pick(rng, &[1_000, 20_000, 128 << 10]),
        send_buffer: pick(rng, &[32 << 10, 100_000, 512 << 10]),
        receive_buffer: pick(rng, &[1, 100, 20_000, 256 << 10]),
        early_data: pick(rng, &[0, 1, 48 << 10]),
        key_update_after: pick(rng, &[2, 50, 1 << 23]) as u64,
        ..EngineConfig::default()
    }
}

impl World {
    fn new(seed: u64) -> Self {
        let mut rng = Rng(seed);
        let now = epoch();
        let engines = [Engine::new(config(&mut rng), now), Engine::new(config(&mut rng), now)];
        let suites = [Suite::Aes128Gcm, Suite::Aes256Gcm, Suite::Chacha20Poly1305];
        let fickle = rng.chance(70);
        Self {
            net: Net::new(rng.next(), fickle),
            now,
            engines,
            owner: BTreeMap::new(),
            apps: Vec::new(),
            flows: Vec::new(),
            by_relay: [BTreeMap::new(), BTreeMap::new()],
            dials: Vec::new(),
            tunnels: [BTreeMap::new(), BTreeMap::new()],
            hostile: rng.chance(50),
            scale: [10, 300, 5_000, 80_000][rng.below(4)],
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
        [1, 100, 5_000, 300_000][self.rng.below(4)].max((self.scale / 100) as usize)
    }

    fn open(&mut self) {
        let flow = self.flows.len();
        self.flows.push(Flow { clean: true, ..Flow::default() });
        let capacity = self.capacity();
        let (near, far) = self.net.pair(capacity);
        self.owner.insert(near, 0);
        let app = self.app(far, flow, 0);
        self.apps.push(app);
        let relay = if self.rng.chance(20) {
            // A plain relay; the server's application is at its other end.
            let (upstream, server) = self.net.pair(capacity);
            self.owner.insert(upstream, 0);
            self.net.socks[upstream.0 as usize].connect = self.connect(flow);
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
            2..5 => Connect::Later(self.rng.below(4) as u32),
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
                let delay = self.rng.below(20) as u32;
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
                self.net.socks[near.0 as usize].connect = self.connect(flow);
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
            let pod = PodUid::new("server-pod");
            let id = self.engines[1].add_server_tunnel(pod, server, far, self.now);
            self.tunnels[1].insert(id, ());
            if let Some(id) = self.engines[0].dial_succeeded(dial, client, near, self.now) {
                self.tunnels[0].insert(id, ());
            }
        }
    }

    fn run_app(&mut self, index: usize) -> bool {
        let mut app = self.apps[index].clone();
        if app.closed {
            return false;
        }
        // A lazy reader is no reason to think that nothing moves.
        let mut busy = self.net.readable(app.sock);
        if self.rng.chance(app.diligence) {
            let limit = 1 + self.rng.below(50_000);
            match self.net.read(app.sock, limit) {
                Ok(bytes) if bytes.is_empty() => app.fin_seen = true,
                Ok(bytes) => {
                    busy = true;
                    for byte in bytes {
                        let expected = pattern(app.flow * 2 + (1 - app.direction), app.received);
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
                let take = (1 + self.rng.below(30_000)).min(left as usize) as u64;
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
                let sock = wires[self.rng.below(wires.len())];
                let ready = mesh_tunnel::Readiness { error: true, ..Default::default() };
                self.engines[self.owner[&sock]].on_event(sock, ready);
            }
            3 if self.hostile && self.rng.chance(20) => {
                for flow in &mut self.flows {
                    flow.clean = false;
                }
                let uid = WorkloadUid::new("workload-0");
                self.engines[0].retire(Retire::Target(uid), self.now);
            }
            _ => {}
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

    fn settle(&mut self, seed: u64) {
        let (mut steps, mut quiet) = (0, 0);
        while quiet < 60 {
            steps += 1;
            assert!(steps < 3_000_000, "seed {seed} does not settle");
            if self.step() {
                quiet = 0;
            } else {
                quiet += 1;
            }
        }
    }

    fn all_closed(&self) -> bool {
        self.flows.iter().all(|flow| {
            flow.closed.is_some() && flow.accepted.is_some() == flow.accepted_closed.is_some()
        })
    }
}

fn run(seed: u64) {
    let mut world = World::new(seed);
    let flows = 1 + world.rng.below(12);
    for _ in 0..400 {
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
    world.settle(seed);
    for _ in 0..40 {
        if world.all_closed() {
            break;
        }
        world.now += Duration::from_secs(5);
        world.settle(seed);
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
    for engine in &mut world.engines {
        engine.retire(Retire::All, world.now);
    }
    world.settle(seed);
    for _ in 0..10 {
        world.now += Duration::from_secs(5);
        world.settle(seed);
    }
    for engine in &world.engines {
        assert_eq!(engine.stats(), EngineStats::default());
    }
    for (sock, side) in &world.owner {
        assert!(world.net.socks[sock.0 as usize].closed, "engine {side} leaks socket {sock:?}");
    }
}

#[test]
fn every_stream_keeps_its_bytes_and_every_bound_holds() {
    for seed in support::seeds(60) {
        let result = std::panic::catch_unwind(|| run(seed));
        if let Err(panic) = result {
            eprintln!("seed {seed} failed: CULVERT_SIM_FIRST={seed} CULVERT_SIM_SEEDS=1");
            std::panic::resume_unwind(panic);
        }
    }
}
