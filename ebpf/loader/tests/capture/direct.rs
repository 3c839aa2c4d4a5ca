//! The direct path: two pods of a node talk without the agent where a verdict says so, and only then.

use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpStream};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use mesh_ebpf::{
    Capture, DirectClose, DirectEvent, DirectFlow, DirectOutcome, DirectPair, NetnsCookie,
    PodCapture, PodSettings, Selection, monotonic_now,
};
use socket2::{Domain, Protocol, Socket, Type};

use crate::lab::{
    Agent, Lab, OUTSIDE_V4, OUTSIDE_V6, PATIENCE, POD_V4, POD_V6, at, canonical, dial, greet, ip,
    listener, read_line, scaled,
};

pub(crate) const PORT: u16 = 8080;
const LONG: Duration = Duration::from_secs(3600);

/// Two captured pods, an application in the first on [`PORT`], and a verdict for both families.
pub(crate) struct Pair {
    pub(crate) lab: Lab,
    pub(crate) capture: Arc<Capture>,
    pub(crate) server: Agent,
    pub(crate) client: Agent,
}

impl Pair {
    pub(crate) fn new() -> Self {
        Self::with(PodSettings::default(), PodSettings::default())
    }

    fn with(client: PodSettings, server: PodSettings) -> Self {
        let lab = Lab::new();
        let capture = lab.capture();
        let server = lab.enroll(&capture, server);
        let client = lab.enroll_outside(&capture, client);
        let pair = Self { lab, capture, server, client };
        for verdict in pair.verdicts(pair.server.cookie) {
            pair.capture.permit_direct(&verdict, 7).unwrap();
        }
        pair
    }

    pub(crate) fn verdicts(&self, server: NetnsCookie) -> [DirectPair; 2] {
        [(OUTSIDE_V4, POD_V4), (OUTSIDE_V6, POD_V6)].map(|(from, to)| DirectPair {
            client: self.client.cookie,
            server,
            client_address: ip(from),
            target: at(to, PORT),
        })
    }

    pub(crate) fn in_force(&self) {
        self.capture.keep_direct_until(monotonic_now() + LONG).unwrap();
    }

    /// An application that says whom it sees.
    fn application(&self) -> Socket {
        let application = self.lab.pod.inside(|| listener(PORT));
        greet(&application, |_, client| format!("application {}", canonical(client)));
        application
    }

    pub(crate) fn dial(&self, target: SocketAddr) -> String {
        self.lab.outside.inside(|| dial(target)).unwrap()
    }

    pub(crate) fn counter(&self, name: &str) -> u64 {
        self.capture.counters().unwrap()[name]
    }

    /// Waits for as many events.
    fn events(&self, count: usize) -> Vec<DirectEvent> {
        let deadline = Instant::now() + PATIENCE;
        let mut events = Vec::new();
        while events.len() < count {
            assert!(Instant::now() < deadline, "{events:?}");
            events.extend(self.capture.direct_events(64).unwrap());
            std::thread::yield_now();
        }
        events
    }
}

/// How both sides of the only connection among `events` closed: client, server.
fn closes(events: &[DirectEvent]) -> (DirectClose, DirectClose) {
    let find = |wanted: fn(&DirectOutcome) -> Option<DirectClose>| {
        events.iter().find_map(|event| wanted(&event.outcome)).unwrap()
    };
    let client = find(|outcome| match outcome {
        DirectOutcome::ClientClosed(close) => Some(*close),
        DirectOutcome::Opened | DirectOutcome::ServerClosed(_) => None,
    });
    let server = find(|outcome| match outcome {
        DirectOutcome::ServerClosed(close) => Some(*close),
        DirectOutcome::Opened | DirectOutcome::ClientClosed(_) => None,
    });
    (client, server)
}

#[test]
fn a_permitted_pair_talks_without_the_agent() {
    let pair = Pair::new();
    let _application = pair.application();
    let captured = |target: SocketAddr| format!("outbound {target}");
    let (v4, v6) = (at(POD_V4, PORT), at(POD_V6, PORT));
    // A verdict that nobody keeps in force says nothing.
    assert_eq!(pair.dial(v4), captured(v4));
    pair.in_force();
    let mapped = Ipv4Addr::to_ipv6_mapped(&POD_V4.parse().unwrap());
    for target in [v4, v6, SocketAddr::new(mapped.into(), PORT)] {
        pair.lab.outside.inside(|| {
            let stream = TcpStream::connect(target).unwrap();
            let own = canonical(stream.local_addr().unwrap());
            assert_eq!(stream.peer_addr().unwrap(), target);
            assert_eq!(read_line(&stream).unwrap(), format!("application {own}"));
        });
    }
    assert_eq!((pair.counter("direct_dialled"), pair.counter("direct_admitted")), (3, 3));
    // Another port, and the other direction, are no part of the verdict.
    let other = at(POD_V4, PORT + 1);
    assert_eq!(pair.dial(other), captured(other));
    let back = at(OUTSIDE_V4, PORT);
    assert_eq!(pair.lab.pod.inside(|| dial(back)).unwrap(), captured(back));
    // An application that does not listen refuses as it would without a mesh.
    drop(_application);
    let closed = DirectPair { target: at(POD_V4, 9), ..pair.verdicts(pair.server.cookie)[0] };
    pair.capture.permit_direct(&closed, 7).unwrap();
    let refused = pair.lab.outside.inside(|| TcpStream::connect(closed.target)).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::ConnectionRefused);
    assert_eq!(pair.counter("guard_dropped_no_flow"), 0);
    assert_eq!(pair.counter("inbound_not_admitted"), 0);
}

#[test]
fn octets_are_exact_however_a_connection_ends() {
    /// More than every buffer on the way holds.
    const UP: usize = 3_000_001;
    const DOWN: usize = 1_700_003;
    let pair = Pair::new();
    pair.in_force();
    let application: std::net::TcpListener = pair.lab.pod.inside(|| listener(PORT)).into();
    // Moves the octets both ways, then ends as `end` says, which gets client and server.
    let check = |name: &str, orderly: bool, end: fn(TcpStream, TcpStream)| {
        let mut client = pair.lab.outside.inside(|| TcpStream::connect(at(POD_V4, PORT)).unwrap());
        let (mut server, _) = application.accept().unwrap();
        let own = client.local_addr().unwrap();
        std::thread::scope(|scope| {
            scope.spawn(|| (&client).write_all(&vec![1; UP]).unwrap());
            scope.spawn(|| (&server).write_all(&vec![2; DOWN]).unwrap());
            scope.spawn(|| (&server).read_exact(&mut vec![0; UP]).unwrap());
            scope.spawn(|| (&client).read_exact(&mut vec![0; DOWN]).unwrap());
        });
        let flow = DirectFlow { client: own, target: at(POD_V4, PORT) };
        assert!(
            pair.capture.direct_flows().unwrap().contains(&(flow, pair.client.cookie)),
            "{name}"
        );
        client.flush().unwrap();
        server.flush().unwrap();
        end(client, server);
        let events = pair.events(3);
        assert!(matches!(events[0].outcome, DirectOutcome::Opened), "{name}: {events:?}");
        for event in &events {
            assert_eq!(event.flow, flow, "{name}");
            let ends = (event.client, event.server);
            assert_eq!(ends, (Some(pair.client.cookie), Some(pair.server.cookie)), "{name}");
        }
        let (of_client, of_server) = closes(&events);
        assert_eq!(of_client.sent_octets, UP as u64, "{name}: {events:?}");
        assert_eq!(of_server.sent_octets, DOWN as u64, "{name}: {events:?}");
        assert_eq!(of_client.orderly && of_server.orderly, orderly, "{name}: {events:?}");
        assert_eq!(pair.capture.direct_flows().unwrap(), [], "{name}");
    };
    check("client first", true, |client, mut server| {
        drop(client);
        assert_eq!(server.read(&mut [0]).unwrap(), 0);
    });
    check("server first", true, |mut client, server| {
        drop(server);
        assert_eq!(client.read(&mut [0]).unwrap(), 0);
    });
    check("half-close", true, |mut client, mut server| {
        client.shutdown(Shutdown::Write).unwrap();
        assert_eq!(server.read(&mut [0]).unwrap(), 0);
        drop(server);
        assert_eq!(client.read(&mut [0]).unwrap(), 0);
    });
    check("reset", false, |client, mut server| {
        let client = Socket::from(client);
        client.set_linger(Some(Duration::ZERO)).unwrap();
        drop(client);
        assert_eq!(server.read(&mut [0]).unwrap_err().kind(), ErrorKind::ConnectionReset);
    });
    assert_eq!(pair.counter("direct_events_lost"), 0);
}

#[test]
fn what_is_revoked_opens_no_more_and_what_is_cut_ends_at_once() {
    Capture::check_direct().unwrap();
    let pair = Pair::new();
    pair.in_force();
    let _application = pair.application();
    let dialled: Vec<TcpStream> = pair.lab.outside.inside(|| {
        [at(POD_V4, PORT), at(POD_V6, PORT)]
            .map(|target| {
                let stream = TcpStream::connect(target).unwrap();
                assert!(read_line(&stream).unwrap().starts_with("application"));
                stream
            })
            .into()
    });
    for verdict in pair.verdicts(pair.server.cookie) {
        assert!(pair.capture.revoke_direct(&verdict).unwrap());
        assert!(!pair.capture.revoke_direct(&verdict).unwrap());
        let target = verdict.target;
        assert_eq!(pair.dial(target), format!("outbound {target}"));
    }
    assert_eq!(pair.capture.direct_pairs().unwrap(), []);
    // What is open goes on until it is cut.
    for mut stream in &dialled {
        stream.write_all(b"echo\n").unwrap();
        assert_eq!(read_line(stream).unwrap(), "echo");
    }
    let start = Instant::now();
    let client = File::open(&pair.lab.outside.path).unwrap();
    let server = File::open(&pair.lab.pod.path).unwrap();
    let flows = pair.capture.direct_flows().unwrap();
    assert_eq!(flows.len(), dialled.len());
    // The second time there is no socket left. A listener that the kernel finds in its place stays.
    for (flow, _) in flows.iter().chain(&flows) {
        pair.capture.cut_direct(flow, Some(client.as_fd()), Some(server.as_fd())).unwrap();
    }
    for listener in [&pair.server.inbound, &pair.client.inbound, &pair.client.outbound] {
        assert!(listener.is_listener().unwrap());
    }
    for mut stream in dialled {
        let error = stream.read(&mut [0]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ConnectionAborted);
        assert!(stream.write_all(b"more").is_err());
    }
    assert!(start.elapsed() < scaled(Duration::from_secs(1)));
    assert_eq!(pair.capture.direct_flows().unwrap(), []);
    // Opened twice, closed twice at each side.
    assert_eq!(pair.events(6).len(), 6);
}

#[test]
fn without_an_agent_open_connections_live_and_verdicts_lapse() {
    let pair = Pair::new();
    pair.in_force();
    let _application = pair.application();
    let target = at(POD_V4, PORT);
    let mut open = pair.lab.outside.inside(|| TcpStream::connect(target).unwrap());
    let greeting = read_line(&open).unwrap();
    assert!(greeting.starts_with("application"));
    let read = greeting.len() + "\nstill\n".len();
    let Pair { lab, capture, server, client } = pair;
    for agent in [server, client] {
        for socket in [&agent.inbound, &agent.outbound] {
            socket.shutdown(Shutdown::Both).unwrap();
        }
        drop(agent);
    }
    capture.keep_direct_until(monotonic_now()).unwrap();
    let refused = lab.outside.inside(|| TcpStream::connect(target)).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::ConnectionRefused);
    open.write_all(b"still\n").unwrap();
    assert_eq!(read_line(&open).unwrap(), "still");
    // A successor finds it.
    drop(capture);
    let capture = lab.capture();
    assert_eq!(capture.direct_flows().unwrap().len(), 1);
    assert_eq!(capture.direct_pairs().unwrap().len(), 2);
    drop(open);
    let deadline = Instant::now() + PATIENCE;
    while !capture.direct_flows().unwrap().is_empty() {
        assert!(Instant::now() < deadline);
        std::thread::yield_now();
    }
    // Opened before, and closed at both sides meanwhile.
    let mut events = Vec::new();
    while events.len() < 3 {
        assert!(Instant::now() < deadline, "{events:?}");
        events.extend(capture.direct_events(64).unwrap());
    }
    assert!(matches!(events[0].outcome, DirectOutcome::Opened));
    assert_eq!(closes(&events).1.sent_octets, read.try_into().unwrap());
}

#[test]
fn an_address_that_changed_hands_finds_no_verdict() {
    let pair = Pair::new();
    pair.in_force();
    let _application = pair.application();
    let target = at(POD_V4, PORT);
    for verdict in pair.verdicts(pair.server.cookie) {
        pair.capture.revoke_direct(&verdict).unwrap();
    }
    // That of an earlier pod with the same address.
    for verdict in pair.verdicts(NetnsCookie(u64::MAX)) {
        pair.capture.permit_direct(&verdict, 7).unwrap();
    }
    assert_eq!(pair.dial(target), format!("outbound {target}"));
    assert_eq!(pair.counter("direct_dialled"), 0);
}

#[test]
fn a_pod_that_left_or_is_excluded_takes_no_part() {
    let pair = Pair::new();
    pair.in_force();
    let _application = pair.application();
    let target = at(POD_V4, PORT);
    assert!(pair.dial(target).starts_with("application"));
    pair.capture.unenroll(pair.server.cookie).unwrap();
    assert_eq!(pair.dial(target), format!("outbound {target}"));
    assert_eq!(pair.counter("direct_dialled"), 1);
    drop(pair);

    // What settings exclude from capture passes as before, and is not told of.
    let exclude = Selection { exclude_ports: [PORT].into(), ..Selection::default() };
    let outbound = PodSettings { outbound: exclude.clone(), ..PodSettings::default() };
    let pair = Pair::with(outbound, PodSettings::default());
    pair.in_force();
    assert_eq!(pair.dial(target), format!("inbound {target}"));
    assert_eq!(pair.counter("direct_dialled"), 0);
    drop(pair);
    let server = PodSettings { capture_inbound: false, ..PodSettings::default() };
    let pair = Pair::with(PodSettings::default(), server);
    pair.in_force();
    assert_eq!(pair.dial(target), format!("outbound {target}"));
}

#[test]
fn a_forged_source_does_not_enter_by_another_pods_verdict() {
    let pair = Pair::new();
    pair.in_force();
    let _application = pair.application();
    // The node, which no guard holds, says it were the client.
    let socket = Socket::new(Domain::IPV4, Type::STREAM, Some(Protocol::TCP)).unwrap();
    socket.set_ip_transparent_v4(true).unwrap();
    socket.bind(&at(OUTSIDE_V4, 40_000).into()).unwrap();
    socket.set_nonblocking(true).unwrap();
    let started = socket.connect(&at(POD_V4, PORT).into()).unwrap_err();
    assert_eq!(started.raw_os_error(), Some(libc::EINPROGRESS));
    let deadline = Instant::now() + PATIENCE;
    while pair.counter("inbound_captured") == 0 {
        assert!(Instant::now() < deadline);
        std::thread::yield_now();
    }
    assert_eq!(pair.counter("direct_admitted"), 0);
    // From another of its own addresses the client itself goes through the agent.
    let client = PodCapture {
        netns: pair.lab.outside.path.clone(),
        addresses: vec![ip(OUTSIDE_V4), ip(OUTSIDE_V6), ip("10.91.2.9")],
        settings: PodSettings::default(),
    };
    pair.capture.enroll(&client, 1).unwrap();
    pair.lab.outside.inside(|| {
        crate::lab::run("ip address add 10.91.2.9/24 dev eth0");
        let socket = Socket::new(Domain::IPV4, Type::STREAM, Some(Protocol::TCP)).unwrap();
        socket.bind(&at("10.91.2.9", 0).into()).unwrap();
        socket.connect(&at(POD_V4, PORT).into()).unwrap();
        let stream = TcpStream::from(socket);
        assert_eq!(read_line(&stream).unwrap(), format!("outbound {POD_V4}:{PORT}"));
    });
    assert_eq!(pair.counter("direct_dialled"), 0);
}
