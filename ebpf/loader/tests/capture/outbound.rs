//! Outbound: every way to connect reaches the agent, which learns where the connection was going,
//! while the application sees the peer it asked for.

use std::io::Read;
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use mesh_ebpf::{PodSettings, Selection, port};
use socket2::{Domain, Protocol, SockAddr, Socket, Type};

use crate::lab::{
    Lab, NOBODY_V4, OUTSIDE_V4, OUTSIDE_V6, PATIENCE, POD_V4, POD_V6, at, canonical, dial,
    expect_refusals_at_once, greet, ip, listener, read_line,
};

const ROUNDS: usize = 25;

fn socket(target: SocketAddr, protocol: Protocol) -> Socket {
    let socket = Socket::new(Domain::for_address(target), Type::STREAM, Some(protocol)).unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    socket
}

fn blocking(target: SocketAddr) -> Socket {
    let socket = socket(target, Protocol::TCP);
    socket.connect(&target.into()).unwrap();
    socket
}

fn nonblocking(target: SocketAddr) -> Socket {
    let socket = socket(target, Protocol::TCP);
    socket.connect_timeout(&target.into(), PATIENCE).unwrap();
    socket
}

fn multipath(target: SocketAddr) -> Socket {
    let socket = socket(target, Protocol::MPTCP);
    socket.connect(&target.into()).unwrap();
    socket
}

fn bound_to_device(target: SocketAddr) -> Socket {
    let socket = socket(target, Protocol::TCP);
    socket.bind_device(Some(b"eth0")).unwrap();
    socket.connect(&target.into()).unwrap();
    socket
}

fn fast_open(target: SocketAddr) -> Socket {
    let socket = socket(target, Protocol::TCP);
    // Without a cookie the data follows the handshake; the hooks run inside the call either way.
    let sent = socket.send_to_with_flags(b"early", &target.into(), libc::MSG_FASTOPEN).unwrap();
    assert_eq!(sent, 5);
    socket
}

fn mapped(target: SocketAddr) -> Socket {
    let socket = Socket::new(Domain::IPV6, Type::STREAM, Some(Protocol::TCP)).unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    let SocketAddr::V4(target) = target else { panic!("an IPv4 target") };
    let target = SocketAddr::new(target.ip().to_ipv6_mapped().into(), target.port());
    socket.connect(&target.into()).unwrap();
    socket
}

fn check(name: &str, connect: fn(SocketAddr) -> Socket, target: SocketAddr) {
    for round in 0..ROUNDS {
        let stream = TcpStream::from(connect(target));
        let peer = stream.peer_addr().unwrap();
        assert_eq!(canonical(peer), target, "{name} round {round}: getpeername");
        let line = read_line(&stream).unwrap();
        assert_eq!(line, format!("outbound {target}"), "{name} round {round}");
        // Still so after the agent asked, and after data.
        assert_eq!(canonical(stream.peer_addr().unwrap()), target, "{name} round {round}");
    }
}

#[test]
fn every_way_to_connect_is_captured_with_its_destination() {
    let lab = Lab::new();
    let capture = lab.capture();
    let _agent = lab.enroll(&capture, PodSettings::default());
    lab.pod.inside(|| {
        for target in [at(OUTSIDE_V4, 80), at(OUTSIDE_V6, 443), at(NOBODY_V4, 9)] {
            check("blocking", blocking, target);
            check("non-blocking", nonblocking, target);
            check("MPTCP", multipath, target);
            check("SO_BINDTODEVICE", bound_to_device, target);
            check("TCP fast open", fast_open, target);
        }
        check("mapped", mapped, at(OUTSIDE_V4, 80));
    });
    assert!(capture.counters().unwrap()["outbound_captured"] >= 400);
}

#[test]
fn what_stays_inside_the_pod_is_not_captured() {
    let lab = Lab::new();
    let capture = lab.capture();
    let _agent = lab.enroll(&capture, PodSettings::default());
    lab.pod.inside(|| {
        let application = listener(8080);
        greet(&application, |_, _| "application".to_owned());
        for target in ["127.0.0.1", "::1", POD_V4, POD_V6, "0.0.0.0", "::"] {
            assert_eq!(dial(at(target, 8080)).unwrap(), "application", "{target}");
        }
        // Nobody can pass for a captured connection by calling the listener itself.
        assert_eq!(dial(at(POD_V4, 15001)).unwrap(), "unknown");
        application.shutdown(std::net::Shutdown::Both).unwrap();
    });
}

#[test]
fn a_socket_that_connects_again_leaves_no_trace_of_its_first_target() {
    let lab = Lab::new();
    let capture = lab.capture();
    let agent = lab.enroll(&capture, PodSettings::default());
    lab.pod.inside(|| {
        let target = at(OUTSIDE_V4, 80);
        let socket = socket(target, Protocol::TCP);
        socket.set_reuse_address(true).unwrap();
        socket.bind(&at(POD_V4, 40_000).into()).unwrap();
        socket.connect(&target.into()).unwrap();
        assert_eq!(
            capture.orig_dst(agent.cookie, port::OUTBOUND, at(POD_V4, 40_000)).unwrap(),
            Some(target)
        );
        let stream = TcpStream::from(socket.try_clone().unwrap());
        assert_eq!(read_line(&stream).unwrap(), format!("outbound {target}"));
        socket.set_linger(Some(Duration::ZERO)).unwrap();
        disconnect(&socket);
        assert_eq!(
            capture.orig_dst(agent.cookie, port::OUTBOUND, at(POD_V4, 40_000)).unwrap(),
            None
        );
        socket.connect(&at(POD_V4, 15001).into()).unwrap();
        assert_eq!(read_line(&stream).unwrap(), "unknown");
    });
}

/// `connect` to `AF_UNSPEC` dissolves a connection.
pub(crate) fn disconnect(socket: &Socket) {
    // SAFETY: a zeroed `sockaddr_storage` is one of family `AF_UNSPEC`, which is 0.
    #[expect(unsafe_code, reason = "no safe constructor for AF_UNSPEC")]
    let ((), unspecified) = unsafe {
        SockAddr::try_init(|_, length| {
            *length = 16;
            Ok(())
        })
    }
    .unwrap();
    socket.connect(&unspecified).unwrap();
}

#[test]
fn without_an_agent_connections_are_refused_at_once() {
    let lab = Lab::new();
    let capture = lab.capture();
    let agent = lab.enroll(&capture, PodSettings::default());
    drop(agent);
    drop(capture);
    lab.pod.inside(|| {
        for target in [at(OUTSIDE_V4, 80), at(OUTSIDE_V6, 80)] {
            expect_refusals_at_once(target);
        }
    });
}

#[test]
fn excluded_and_not_included_destinations_pass_the_guard_directly() {
    let lab = Lab::new();
    let capture = lab.capture();
    let servers = lab.outside.inside(|| [80, 81, 82].map(listener));
    for server in &servers {
        greet(server, |_, client| format!("direct {}", client.ip().to_canonical()));
    }
    let direct =
        |address: &str| format!("direct {}", if address == OUTSIDE_V4 { POD_V4 } else { POD_V6 });
    let captured = |address: &str, port| format!("outbound {}", at(address, port));
    let expect = |selection: Selection, expected: &[(&str, u16, bool)]| {
        let settings = PodSettings { outbound: selection.clone(), ..PodSettings::default() };
        let _agent = lab.enroll(&capture, settings);
        lab.pod.inside(|| {
            for &(address, port, passes) in expected {
                let wanted = if passes { direct(address) } else { captured(address, port) };
                let found = dial(at(address, port)).unwrap();
                assert_eq!(found, wanted, "{address} {port} {selection:?}");
            }
        });
    };
    let network = |text: &str| vec![text.parse().unwrap()];
    expect(
        Selection { exclude_ports: [81].into(), ..Selection::default() },
        &[(OUTSIDE_V4, 80, false), (OUTSIDE_V4, 81, true), (OUTSIDE_V6, 81, true)],
    );
    expect(
        Selection { exclude_networks: network("10.91.2.0/24"), ..Selection::default() },
        &[(OUTSIDE_V4, 80, true), (OUTSIDE_V6, 80, false)],
    );
    expect(
        Selection { include_networks: network("fd91:2::/64"), ..Selection::default() },
        &[(OUTSIDE_V4, 80, true), (OUTSIDE_V6, 80, false)],
    );
    expect(
        Selection {
            include_networks: network("fd91:2::/64"),
            include_ports: [80].into(),
            exclude_ports: [82].into(),
            ..Selection::default()
        },
        &[
            (OUTSIDE_V4, 80, false),
            (OUTSIDE_V4, 81, true),
            (OUTSIDE_V6, 81, false),
            (OUTSIDE_V6, 82, true),
        ],
    );
    expect(Selection::default(), &[(OUTSIDE_V4, 81, false), (OUTSIDE_V6, 82, false)]);
    let counters = capture.counters().unwrap();
    assert_eq!(counters["outbound_excluded"], 6);
    assert_eq!(counters["guard_dropped_no_flow"], 0);
}

#[test]
fn a_pod_without_ipv6_sees_the_family_as_unreachable() {
    let lab = Lab::new();
    let capture = lab.capture();
    let _agent = lab.agent(&capture);
    let mut pod = lab.pod_capture(PodSettings::default());
    pod.addresses = vec![ip(POD_V4)];
    capture.enroll(&pod, 1).unwrap();
    lab.pod.inside(|| {
        let error = dial(at(OUTSIDE_V6, 80)).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ENETUNREACH));
        assert_eq!(dial(at(OUTSIDE_V4, 80)).unwrap(), format!("outbound {OUTSIDE_V4}:80"));
    });
}

#[test]
fn the_agents_own_sockets_go_out() {
    let lab = Lab::new();
    let capture = lab.capture();
    let _agent = lab.enroll(&capture, PodSettings::default());
    let server = lab.outside.inside(|| listener(15008));
    greet(&server, |_, _| "peer".to_owned());
    lab.pod.inside(|| {
        for target in [at(OUTSIDE_V4, 15008), at(OUTSIDE_V6, 15008)] {
            let socket = socket(target, Protocol::TCP);
            capture.label(crate::lab::borrow(&socket)).unwrap();
            socket.connect(&target.into()).unwrap();
            let mut stream = TcpStream::from(socket);
            assert_eq!(read_line(&stream).unwrap(), "peer");
            std::io::Write::write_all(&mut stream, b"12345").unwrap();
            let mut echo = [0; 5];
            stream.read_exact(&mut echo).unwrap();
        }
    });
    assert_eq!(capture.counters().unwrap()["guard_dropped_no_flow"], 0);
}
