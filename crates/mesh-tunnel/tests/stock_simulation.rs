//! The engine against stock peers on a network in memory, from a seed: tokio-rustls and h2 at the other end, in both roles.
//!
//! The wire is cut anywhere, applications and peers read slowly, half-close, reset and refuse; peers say GOAWAY and update
//! their keys; wires break. `CULVERT_SIM_SEEDS` is how many seeds are run, `CULVERT_SIM_FIRST` where they begin. Odd seeds are
//! hostile: in even ones nothing may be lost.
#![expect(clippy::unwrap_used, reason = "a test's own values are valid")]

mod support;

use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use bytes::Bytes;
use mesh_model::{CloseReason, PodUid};
use mesh_tunnel::{
    DialId, Engine, EngineConfig, EngineEvent, EngineStats, Io as _, Readiness, ResponseHead,
    Retire, SockId,
};
use rustls::pki_types::ServerName;
use support::net::Net;
use support::permit::permit;
use support::stock::{SUITES, Secrets, configs, shake_hands};
use support::{Rng, epoch, head, key, pattern};
use tokio::io::{AsyncRead, AsyncWrite, DuplexStream, ReadBuf};
use tokio::task::yield_now;

/// Turns without anything moving after which time jumps.
const QUIET: u32 = 60;
/// Jumps after which a seed is held to hang.
const JUMPS: u32 = 200;

/// Small windows make small frames, and slow readers let them lie, which h2 takes for a flood unless it is told.
const UNBOUNDED: usize = 1 << 30;

/// What one direction of a flow is to carry, and what came of it.
#[derive(Debug, Default)]
struct Half {
    to_send: u64,
    received: u64,
    ended: bool,
}

/// One flow: an application at the engine, a stream of the stock peer.
#[derive(Debug, Default)]
struct Flow {
    app: Half,
    peer: Half,
    /// Nothing happened to it that may cost bytes.
    clean: bool,
    /// What the peer does with its stream.
    manners: Manners,
}

#[derive(Clone, Copy, Debug, Default)]
struct Manners {
    /// Answers with this instead of 200.
    refuses: Option<u16>,
    /// Resets its stream after so many bytes sent.
    resets_after: Option<u64>,
    /// Turns it lets pass between two reads.
    slowness: usize,
}

type Flows = Arc<Mutex<Vec<Flow>>>;

fn with<R>(flows: &Flows, number: usize, change: impl FnOnce(&mut Flow) -> R) -> R {
    change(&mut flows.lock().unwrap_or_else(PoisonError::into_inner)[number])
}

/// The bytes of one direction; `direction` is 0 from the engine's application.
fn bytes(flow: usize, direction: u64, from: u64, count: u64) -> Bytes {
    let stream = flow as u64 * 2 + direction;
    (from..from + count).map(|at| pattern(stream, at)).collect::<Vec<u8>>().into()
}

/// An application at one of the engine's sockets.
struct App {
    sock: SockId,
    flow: usize,
    sent: u64,
    fin_sent: bool,
    closed: bool,
    reset_after: Option<u64>,
    /// Percent of its turns in which it reads.
    diligence: usize,
}

/// A tunnel: the far end of the engine's socket, and the pipe to the peer.
struct Link {
    wire: SockId,
    pipe: DuplexStream,
    /// From the engine, not yet with the peer.
    up: Vec<u8>,
    /// From the peer, not yet with the engine.
    down: Vec<u8>,
    engine_ended: bool,
    peer_ended: bool,
    gone: bool,
    broken: bool,
}

impl Link {
    fn new(wire: SockId, pipe: DuplexStream) -> Self {
        Self {
            wire,
            pipe,
            up: Vec::new(),
            down: Vec::new(),
            engine_ended: false,
            peer_ended: false,
            gone: false,
            broken: false,
        }
    }

    /// Moves some bytes each way; true when anything moved.
    fn pump(&mut self, net: &mut Net) -> bool {
        if self.gone {
            return false;
        }
        let mut busy = false;
        let mut context = Context::from_waker(Waker::noop());
        let limit = [1, 100, 20_000, 300_000][net.rng.below(4)];
        if !self.engine_ended && self.up.len() < 1 << 20 {
            match net.read(self.wire, limit) {
                Ok(bytes) => {
                    busy = true;
                    self.engine_ended = bytes.is_empty();
                    self.up.extend(bytes);
                }
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
                Err(_) => return self.break_off(net),
            }
        }
        while !self.up.is_empty() {
            match Pin::new(&mut self.pipe).poll_write(&mut context, &self.up) {
                Poll::Ready(Ok(count)) if count > 0 => {
                    busy = true;
                    self.up.drain(..count);
                }
                // The peer has gone; what it said last still arrives.
                Poll::Ready(_) => {
                    self.engine_ended = true;
                    self.up.clear();
                }
                Poll::Pending => break,
            }
        }
        if self.engine_ended && self.up.is_empty() {
            // The pipe's end follows the bytes.
            busy |=
                Pin::new(&mut self.pipe).poll_shutdown(&mut context).is_ready() && !self.peer_ended;
        }
        let mut buffer = vec![0; limit];
        let mut read = ReadBuf::new(&mut buffer);
        if !self.peer_ended && self.down.len() < 1 << 20 {
            match Pin::new(&mut self.pipe).poll_read(&mut context, &mut read) {
                Poll::Ready(Ok(())) => {
                    busy = true;
                    self.peer_ended = read.filled().is_empty();
                    self.down.extend(read.filled());
                }
                Poll::Ready(Err(_)) => return self.break_off(net),
                Poll::Pending => {}
            }
        }
        if !self.down.is_empty() {
            match net.write(self.wire, &self.down) {
                Ok(count) => {
                    busy = true;
                    self.down.drain(..count);
                }
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
                Err(_) => return self.break_off(net),
            }
        }
        if self.peer_ended && self.down.is_empty() {
            net.close(self.wire);
            self.gone = true;
        }
        busy
    }

    fn break_off(&mut self, net: &mut Net) -> bool {
        net.abort(self.wire);
        // The peer sees the end of its pipe.
        self.pipe = tokio::io::duplex(1).0;
        self.gone = true;
        true
    }
}

struct World {
    rng: Rng,
    net: Net,
    now: Instant,
    engine: Engine,
    near: Vec<SockId>,
    apps: Vec<App>,
    flows: Flows,
    links: Vec<Link>,
    dials: Vec<DialId>,
    hostile: bool,
    tunnels_closed: Vec<CloseReason>,
    secrets: Arc<Secrets>,
    client: Arc<rustls::ClientConfig>,
    server: Arc<rustls::ServerConfig>,
    peers: tokio::task::JoinSet<()>,
}

impl std::fmt::Debug for World {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        writeln!(f, "{:?}, {} peers", self.engine.stats(), self.peers.len())?;
        writeln!(f, "tunnels closed: {:?}", self.tunnels_closed)?;
        for link in &self.links {
            let Link { up, down, engine_ended, peer_ended, gone, .. } = link;
            let (up, down) = (up.len(), down.len());
            writeln!(f, "link: {up} {down} {engine_ended} {peer_ended} {gone}")?;
        }
        for (number, flow) in self.flows.lock().unwrap().iter().enumerate() {
            let app = self.apps.iter().find(|app| app.flow == number);
            writeln!(f, "{number}: {flow:?} app {:?}", app.map(|app| (app.sent, app.closed)))?;
        }
        Ok(())
    }
}

fn config(rng: &mut Rng) -> EngineConfig {
    fn pick<T: Copy>(rng: &mut Rng, choices: &[T]) -> T {
        choices[rng.below(choices.len())]
    }
    EngineConfig {
        stream_window: pick(rng, &[65_535, 4 << 20]),
        max_frame_size: pick(rng, &[16_384, 1 << 20]),
        max_concurrent_streams: pick(rng, &[3, 200]),
        streams_per_tunnel: pick(rng, &[1, 4, 100]),
        quantum: pick(rng, &[1_000, 128 << 10]),
        send_buffer: pick(rng, &[32 << 10, 512 << 10]),
        receive_buffer: pick(rng, &[7, 20_000, 256 << 10]),
        early_data: pick(rng, &[0, 48 << 10]),
        key_update_after: pick(rng, &[3, 50, 1 << 23]),
        ..EngineConfig::default()
    }
}

impl World {
    fn new(seed: u64) -> Self {
        let mut rng = Rng(seed);
        let (now, hostile) = (epoch(), !seed.is_multiple_of(2));
        let secrets = Arc::new(Secrets::default());
        let suite = SUITES[rng.below(SUITES.len())];
        let (client, mut server) = configs(&secrets, &[suite]);
        server.send_tls13_tickets = rng.below(3);
        let engine = Engine::new(config(&mut rng), now);
        Self {
            net: Net::new(rng.next(), rng.chance(70)),
            now,
            engine,
            near: Vec::new(),
            apps: Vec::new(),
            flows: Arc::default(),
            links: Vec::new(),
            dials: Vec::new(),
            hostile,
            tunnels_closed: Vec::new(),
            secrets,
            client: Arc::new(client),
            server: Arc::new(server),
            peers: tokio::task::JoinSet::new(),
            rng,
        }
    }

    /// A flow that nobody knows of yet.
    fn flow(&mut self) -> usize {
        let scale = [10, 3_000, 60_000][self.rng.below(3)];
        let rng = &mut self.rng;
        let mut size = || if rng.chance(15) { 0 } else { rng.next() % scale };
        let (app, peer) = (size(), size());
        let hostile = self.hostile;
        let manners = Manners {
            refuses: (hostile && self.rng.chance(10)).then_some(503),
            resets_after: (hostile && self.rng.chance(10)).then(|| self.rng.next() % scale),
            slowness: [0, 0, 5][self.rng.below(3)],
        };
        // What is opened on a broken wire before the engine knows of it is lost as well.
        let broken = self.links.iter().any(|link| link.broken);
        let clean = !broken && manners.refuses.is_none() && manners.resets_after.is_none();
        let half = |to_send| Half { to_send, ..Half::default() };
        let mut flows = self.flows.lock().unwrap();
        flows.push(Flow { app: half(app), peer: half(peer), clean, manners });
        flows.len() - 1
    }

    fn app(&mut self, sock: SockId, flow: usize) {
        let to_send = with(&self.flows, flow, |flow| flow.app.to_send);
        let reset_after =
            (self.hostile && self.rng.chance(10)).then(|| self.rng.next() % (to_send + 1));
        if reset_after.is_some() {
            with(&self.flows, flow, |flow| flow.clean = false);
        }
        let diligence = [10, 100][self.rng.below(2)];
        self.apps.push(App {
            sock,
            flow,
            sent: 0,
            fin_sent: false,
            closed: false,
            reset_after,
            diligence,
        });
    }

    fn pair(&mut self) -> (SockId, SockId) {
        let capacity = [100, 5_000, 300_000][self.rng.below(3)];
        let (near, far) = self.net.pair(capacity);
        self.near.push(near);
        (near, far)
    }

    /// The engine's client opens a flow.
    fn open(&mut self) {
        let flow = self.flow();
        let (near, far) = self.pair();
        self.app(far, flow);
        let head = head(&format!("10.0.0.2:{}", flow + 1));
        self.engine.open(permit(), key("w"), head, near, self.now);
    }

    fn events(&mut self) {
        while let Some(event) = self.engine.poll_event() {
            match event {
                EngineEvent::Dial { dial, .. } => self.dials.push(dial),
                EngineEvent::Request { request, head, .. } => {
                    let flow = flow_of(&head.authority);
                    if self.hostile && self.rng.chance(10) {
                        with(&self.flows, flow, |flow| flow.clean = false);
                        let reason = CloseReason::PolicyDenied;
                        self.engine.refuse(request, 401, reason, self.now);
                        continue;
                    }
                    let (near, far) = self.pair();
                    self.app(far, flow);
                    let response = ResponseHead::default();
                    self.engine.accept(permit(), request, near, response, self.now);
                }
                EngineEvent::TunnelClosed { reason, .. } => self.tunnels_closed.push(reason),
                EngineEvent::Established { .. }
                | EngineEvent::Closed { .. }
                | EngineEvent::RequestGone { .. } => {}
                other => panic!("unknown event {other:?}"),
            }
        }
    }

    /// Answers what the engine dials with stock servers.
    async fn dial(&mut self) {
        for dial in std::mem::take(&mut self.dials) {
            let (mut pipe, far) = tokio::io::duplex([1_000, 256 << 10][self.rng.below(2)]);
            let (flows, server) = (Arc::clone(&self.flows), Arc::clone(&self.server));
            let rng = Rng(self.rng.next());
            self.peers.spawn(serve(far, server, flows, rng));
            let name = ServerName::try_from("mesh").unwrap();
            let tls = rustls::ClientConnection::new(Arc::clone(&self.client), name).unwrap();
            let session = shake_hands(tls.into(), &mut pipe, &self.secrets, true).await;
            let (near, wire) = self.pair();
            self.engine.dial_succeeded(dial, session, near, self.now);
            self.links.push(Link::new(wire, pipe));
        }
    }

    fn run_app(&mut self, index: usize) -> bool {
        let app = &mut self.apps[index];
        if app.closed {
            return false;
        }
        let (mut busy, mut failed) = (false, false);
        let (to_send, ended) =
            with(&self.flows, app.flow, |flow| (flow.app.to_send, flow.app.ended));
        if !ended && (self.net.waiting(app.sock) > 0 || self.net.ends(app.sock)) {
            // A lazy reader is no reason to think that nothing moves.
            busy = true;
            if self.rng.chance(app.diligence) {
                match self.net.read(app.sock, 1 + self.rng.below(50_000)) {
                    Ok(read) => with(&self.flows, app.flow, |flow| {
                        let half = &mut flow.app;
                        half.ended = read.is_empty();
                        let expected = bytes(app.flow, 1, half.received, read.len() as u64);
                        assert!(read == expected, "flow {} to the app", app.flow);
                        half.received += read.len() as u64;
                    }),
                    Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
                    Err(_) => failed = true,
                }
            }
        }
        if !failed && !app.fin_sent {
            let take = (1 + self.rng.next() % 30_000).min(to_send - app.sent);
            if take == 0 {
                busy = true;
                app.fin_sent = true;
                failed = self.net.shutdown_write(app.sock).is_err();
            } else {
                match self.net.write(app.sock, &bytes(app.flow, 0, app.sent, take)) {
                    Ok(count) => {
                        busy = true;
                        app.sent += count as u64;
                    }
                    Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
                    Err(_) => failed = true,
                }
            }
        }
        let ended = with(&self.flows, app.flow, |flow| flow.app.ended);
        if app.reset_after.is_some_and(|after| app.sent >= after) {
            self.net.abort(app.sock);
            app.closed = true;
        } else if failed || (app.fin_sent && ended) {
            self.net.close(app.sock);
            app.closed = true;
        }
        busy | app.closed
    }

    fn mischief(&mut self) {
        if self.links.is_empty() {
            return;
        }
        let index = self.rng.below(self.links.len());
        if self.hostile && self.rng.chance(2) && !self.links[index].gone {
            // Everything on it may be lost, and it may carry everything.
            self.flows.lock().unwrap().iter_mut().for_each(|flow| flow.clean = false);
            self.links[index].broken = true;
            self.links[index].break_off(&mut self.net);
        }
    }

    async fn step(&mut self) -> bool {
        let mut busy = false;
        // Bounds on floods count by time.
        self.now += Duration::from_micros(50);
        for (sock, ready) in self.net.take_edges() {
            if self.near.contains(&sock) {
                busy |= ready != Readiness::default();
                self.engine.on_event(sock, ready);
            }
        }
        busy |= self.engine.turn(&mut self.net, self.now);
        self.events();
        busy |= !self.dials.is_empty();
        self.dial().await;
        for app in 0..self.apps.len() {
            busy |= self.run_app(app);
        }
        for link in &mut self.links {
            busy |= link.pump(&mut self.net);
        }
        while let Some(done) = self.peers.try_join_next() {
            busy = true;
            done.expect("the peer found nothing wrong");
        }
        yield_now().await;
        busy || !self.net.edges.is_empty()
    }

    /// Until nothing moves any more, and then until time moves it.
    async fn settle(&mut self, done: impl Fn(&Self) -> bool) {
        let (mut quiet, mut jumps) = (0, 0);
        while !done(self) {
            quiet = if self.step().await { 0 } else { quiet + 1 };
            if quiet > QUIET {
                jumps += 1;
                assert!(jumps < JUMPS, "it hangs: {self:?}");
                quiet = 0;
                if let Some(next) = self.engine.poll_timeout() {
                    self.now = self.now.max(next);
                }
            }
        }
    }

    /// Everything that is to come has come.
    fn is_over(&self) -> bool {
        let whole = |flow: &Flow| !flow.clean || (flow.app.ended && flow.peer.ended);
        self.apps.iter().all(|app| app.closed)
            && self.engine.stats().streams == 0
            && self.flows.lock().unwrap().iter().all(whole)
    }

    fn judge(&self) {
        for (number, flow) in self.flows.lock().unwrap().iter().enumerate() {
            let (app, peer) = (&flow.app, &flow.peer);
            assert!(app.received <= peer.to_send && peer.received <= app.to_send);
            // Whatever has ended in good order is whole.
            assert!(!app.ended || app.received == peer.to_send || !flow.clean, "flow {number}");
            if flow.clean {
                assert!(app.ended && peer.ended, "flow {number}: {flow:?}");
                assert_eq!(app.received, peer.to_send, "flow {number}");
                assert_eq!(peer.received, app.to_send, "flow {number}");
            }
        }
    }

    /// Nothing is left of anything.
    async fn close(&mut self) {
        self.engine.retire(Retire::All, self.now);
        self.settle(|world| {
            world.engine.stats() == EngineStats::default() && world.peers.is_empty()
        })
        .await;
        for sock in &self.near {
            assert!(self.net.socks[Net::index(*sock)].closed, "the engine leaks {sock:?}");
        }
    }
}

/// The flow that an authority stands for: its port, from 1.
fn flow_of(authority: &str) -> usize {
    let (_host, port) = authority.rsplit_once(':').unwrap();
    port.parse::<usize>().unwrap() - 1
}

/// A stock server. Its end is told by nothing but its end.
async fn serve(far: DuplexStream, config: Arc<rustls::ServerConfig>, flows: Flows, mut rng: Rng) {
    let Ok(mut tls) = tokio_rustls::TlsAcceptor::from(config).accept(far).await else { return };
    if rng.chance(30) {
        tls.get_mut().1.refresh_traffic_keys().unwrap();
    }
    let mut builder = h2::server::Builder::new();
    builder
        .data_frame_budget(UNBOUNDED)
        .max_frame_size([16_384, 1 << 20][rng.below(2)])
        .initial_window_size([65_535, 100_000, 1 << 20][rng.below(3)])
        .max_concurrent_streams([1, 3, 100][rng.below(3)]);
    let Ok(mut connection) = builder.handshake::<_, Bytes>(tls).await else { return };
    let leaves_after = rng.chance(30).then(|| rng.below(4));
    let mut accepted = 0;
    let mut streams = tokio::task::JoinSet::new();
    loop {
        tokio::select! {
            next = connection.accept() => match next {
                Some(Ok((request, mut respond))) => {
                    accepted += 1;
                    if leaves_after.is_some_and(|after| accepted > after) {
                        connection.graceful_shutdown();
                    }
                    let number = flow_of(request.uri().authority().unwrap().as_str());
                    let manners = with(&flows, number, |flow| flow.manners);
                    let flows = Arc::clone(&flows);
                    streams.spawn(async move {
                        let response = http::Response::builder();
                        if let Some(status) = manners.refuses {
                            let refused = response.status(status).body(()).unwrap();
                            // It may have gone meanwhile.
                            drop(respond.send_response(refused, true));
                            return;
                        }
                        let Ok(stream) = respond.send_response(response.body(()).unwrap(), false)
                        else {
                            return;
                        };
                        carry(number, manners, request.into_body(), stream, &flows).await;
                    });
                }
                Some(Err(_)) | None => break,
            },
            Some(done) = streams.join_next() => done.expect("the stream is right"),
        }
    }
    while let Some(done) = streams.join_next().await {
        done.expect("the stream is right");
    }
}

/// A stock client that opens every flow on one tunnel.
async fn dial(far: DuplexStream, config: Arc<rustls::ClientConfig>, flows: Flows, mut rng: Rng) {
    let name = ServerName::try_from("mesh").unwrap();
    let connector = tokio_rustls::TlsConnector::from(config);
    let Ok(mut tls) = connector.connect(name, far).await else { return };
    if rng.chance(30) {
        tls.get_mut().1.refresh_traffic_keys().unwrap();
    }
    let mut builder = h2::client::Builder::new();
    builder
        .data_frame_budget(UNBOUNDED)
        .max_frame_size([16_384, 1 << 20][rng.below(2)])
        .initial_window_size([65_535, 100_000, 1 << 20][rng.below(3)]);
    let Ok((sender, connection)) = builder.handshake::<_, Bytes>(tls).await else { return };
    let mut streams = tokio::task::JoinSet::new();
    let count = flows.lock().unwrap().len();
    for number in 0..count {
        let (flows, sender) = (Arc::clone(&flows), sender.clone());
        let manners = with(&flows, number, |flow| flow.manners);
        streams.spawn(async move {
            let (response, stream) = loop {
                let Ok(mut ready) = sender.clone().ready().await else { return };
                let authority = format!("10.0.0.2:{}", number + 1);
                let request = http::Request::connect(authority).body(()).unwrap();
                let Ok((response, stream)) = ready.send_request(request, false) else { return };
                match response.await {
                    // Sent before the bound on streams was known.
                    Err(error) if error.reason() == Some(h2::Reason::REFUSED_STREAM) => {}
                    response => break (response, stream),
                }
            };
            drop(sender);
            let Ok(response) = response else { return };
            if response.status() != 200 {
                return;
            }
            carry(number, manners, response.into_body(), stream, &flows).await;
        });
    }
    drop(sender);
    let streams = async {
        while let Some(done) = streams.join_next().await {
            done.expect("the stream is right");
        }
    };
    // The connection ends when the last of its streams has, or breaks.
    let (_ended, ()) = tokio::join!(connection, streams);
}

/// The peer's end of a flow: both directions at once.
async fn carry(
    number: usize,
    manners: Manners,
    mut receive: h2::RecvStream,
    mut send: h2::SendStream<Bytes>,
    flows: &Flows,
) {
    let to_send = with(flows, number, |flow| flow.peer.to_send);
    let sending = async {
        let mut sent = 0;
        while sent < to_send {
            if manners.resets_after.is_some_and(|after| sent >= after) {
                send.send_reset(h2::Reason::CANCEL);
                return;
            }
            let wanted = (to_send - sent).min(40_000);
            send.reserve_capacity(usize::try_from(wanted).unwrap());
            let room = std::future::poll_fn(|cx| send.poll_capacity(cx)).await;
            let Some(Ok(room)) = room else { return };
            let room = (room as u64).min(wanted);
            if send.send_data(bytes(number, 1, sent, room), false).is_err() {
                return;
            }
            sent += room;
        }
        drop(send.send_data(Bytes::new(), true));
    };
    let receiving = async {
        while let Some(data) = receive.data().await {
            let Ok(data) = data else { return };
            with(flows, number, |flow| {
                let half = &mut flow.peer;
                let expected = bytes(number, 0, half.received, data.len() as u64);
                assert!(data == expected, "flow {number} to the peer");
                half.received += data.len() as u64;
            });
            for _ in 0..manners.slowness {
                yield_now().await;
            }
            if receive.flow_control().release_capacity(data.len()).is_err() {
                return;
            }
        }
        with(flows, number, |flow| flow.peer.ended = true);
    };
    tokio::join!(sending, receiving);
}

async fn against_servers(seed: u64) {
    let mut world = World::new(seed);
    let flows = 1 + world.rng.below(20);
    for _ in 0..100 {
        if world.apps.len() < flows && world.rng.chance(40) {
            world.open();
        }
        world.mischief();
        world.step().await;
    }
    while world.apps.len() < flows {
        world.open();
    }
    world.settle(World::is_over).await;
    world.judge();
    world.close().await;
}

async fn against_a_client(seed: u64) {
    let mut world = World::new(seed);
    for _ in 0..=world.rng.below(20) {
        world.flow();
    }
    let (mut pipe, far) = tokio::io::duplex([1_000, 256 << 10][world.rng.below(2)]);
    let (flows, client) = (Arc::clone(&world.flows), Arc::clone(&world.client));
    let rng = Rng(world.rng.next());
    world.peers.spawn(dial(far, client, flows, rng));
    let mut server = rustls::ServerConfig::clone(&world.server);
    server.send_tls13_tickets = 0;
    let tls = rustls::ServerConnection::new(Arc::new(server)).unwrap();
    let session = shake_hands(tls.into(), &mut pipe, &world.secrets, false).await;
    let (near, wire) = world.pair();
    world.engine.add_server_tunnel(PodUid::new("pod"), session, near, world.now);
    world.links.push(Link::new(wire, pipe));
    for _ in 0..100 {
        world.mischief();
        world.step().await;
    }
    world.settle(|world| world.peers.is_empty() && world.is_over()).await;
    world.judge();
    world.close().await;
}

/// Runs one seed after the other, each in a runtime of its own, so that nothing of one is left in the next.
fn run_all<F: Future<Output = ()>>(run: impl Fn(u64) -> F) {
    for seed in support::seeds(500) {
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(run(seed));
        }));
        assert!(
            result.is_ok(),
            "seed {seed}; again by CULVERT_SIM_FIRST={seed} CULVERT_SIM_SEEDS=1"
        );
    }
}

#[test]
fn our_client_and_stock_servers() {
    run_all(against_servers);
}

#[test]
fn our_server_and_a_stock_client() {
    run_all(against_a_client);
}
