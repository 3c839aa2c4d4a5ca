//! DNS: queries reach the agent's resolver, which learns whom they were for; the application sees
//! the answer come from there.

use std::net::{SocketAddr, UdpSocket};
use std::os::fd::AsFd as _;
use std::sync::Arc;

use mesh_ebpf::{Capture, NetnsCookie, PodSettings};
use socket2::{Domain, Protocol, Socket, Type};

use crate::lab::{
    Agent, Lab, OUTSIDE_V4, OUTSIDE_V6, PATIENCE, POD_V4, at, canonical, dial, greet, ip,
};

/// Answers each datagram with whom it was for; "stop" ends it.
fn resolver(lab: &Lab, capture: &Arc<Capture>, pod: NetnsCookie) {
    let socket = lab.pod.inside(|| {
        let socket = Socket::new(Domain::IPV6, Type::DGRAM, Some(Protocol::UDP)).unwrap();
        socket.set_only_v6(false).unwrap();
        capture.label(socket.as_fd()).unwrap();
        socket.bind(&at("::", 15053).into()).unwrap();
        UdpSocket::from(socket)
    });
    let capture = Arc::clone(capture);
    std::thread::spawn(move || {
        let mut query = [0; 64];
        while let Ok((length, client)) = socket.recv_from(&mut query) {
            if &query[..length] == b"stop" {
                return;
            }
            let answer = match capture.orig_resolver(pod, client).unwrap() {
                Some(target) => target.to_string(),
                None => "unknown".to_owned(),
            };
            socket.send_to(answer.as_bytes(), client).unwrap();
        }
    });
}

fn stop_resolver(lab: &Lab) {
    lab.pod.inside(|| {
        UdpSocket::bind("127.0.0.1:0").unwrap().send_to(b"stop", "127.0.0.1:15053").unwrap();
    });
}

fn socket(bind: &str) -> UdpSocket {
    let socket = UdpSocket::bind(bind).unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    socket
}

fn check_unconnected(bind: &str, target: SocketAddr) {
    let socket = socket(bind);
    socket.send_to(b"query", target).unwrap();
    let mut answer = [0; 64];
    let (length, from) = socket.recv_from(&mut answer).unwrap();
    assert_eq!(from, target, "source of the answer");
    let expected = canonical(target).to_string();
    assert_eq!(std::str::from_utf8(&answer[..length]).unwrap(), expected);
}

fn check_connected(bind: Option<&str>, target: SocketAddr) {
    let socket = match bind {
        Some(bind) => socket(bind),
        None => {
            let domain = Domain::for_address(target);
            let socket = Socket::new(domain, Type::DGRAM, None).unwrap();
            socket.set_read_timeout(Some(PATIENCE)).unwrap();
            socket.into()
        }
    };
    socket.connect(target).unwrap();
    assert_eq!(socket.peer_addr().unwrap(), target);
    socket.send(b"query").unwrap();
    let mut answer = [0; 64];
    let length = socket.recv(&mut answer).unwrap();
    let expected = canonical(target).to_string();
    assert_eq!(std::str::from_utf8(&answer[..length]).unwrap(), expected);
}

fn enroll(lab: &Lab, capture: &Arc<Capture>, settings: PodSettings) -> Agent {
    let agent = lab.enroll(capture, settings);
    resolver(lab, capture, agent.cookie);
    agent
}

#[test]
fn queries_of_every_kind_of_socket_reach_the_resolver() {
    let lab = Lab::new();
    let capture = lab.capture();
    let _agent = enroll(&lab, &capture, PodSettings::default());
    let tcp = lab.agent_listener(&capture, 15053);
    greet(&tcp, |_, _| "dns over tcp".to_owned());
    let mapped = |address: &str| {
        let std::net::IpAddr::V4(address) = ip(address) else { panic!("an IPv4 address") };
        SocketAddr::new(address.to_ipv6_mapped().into(), 53)
    };
    lab.pod.inside(|| {
        for _ in 0..20 {
            check_unconnected("0.0.0.0:0", at(OUTSIDE_V4, 53));
            check_unconnected("[::]:0", at(OUTSIDE_V6, 53));
            check_unconnected("[::]:0", mapped(OUTSIDE_V4));
            for bind in [None, Some("[::]:0")] {
                check_connected(bind, at(OUTSIDE_V6, 53));
                check_connected(bind, mapped(OUTSIDE_V4));
            }
            check_connected(None, at(OUTSIDE_V4, 53));
            check_connected(Some("0.0.0.0:0"), at(OUTSIDE_V4, 53));
        }
        assert_eq!(dial(at(OUTSIDE_V4, 53)).unwrap(), "dns over tcp");
        assert_eq!(dial(at(OUTSIDE_V6, 53)).unwrap(), "dns over tcp");
    });
    tcp.shutdown(std::net::Shutdown::Both).unwrap();
    stop_resolver(&lab);
    assert_eq!(capture.counters().unwrap()["orig_dst_lost"], 0);
}

#[test]
fn with_dns_capture_off_udp_passes_and_tcp_is_captured() {
    let lab = Lab::new();
    let capture = lab.capture();
    let settings = PodSettings { dns_capture: false, ..PodSettings::default() };
    let _agent = lab.enroll(&capture, settings);
    let server = lab.outside.inside(|| socket(&format!("{OUTSIDE_V4}:53")));
    lab.pod.inside(|| {
        let client = socket("0.0.0.0:0");
        client.send_to(b"query", at(OUTSIDE_V4, 53)).unwrap();
        assert_eq!(dial(at(OUTSIDE_V4, 53)).unwrap(), format!("outbound {OUTSIDE_V4}:53"));
    });
    let mut query = [0; 16];
    let (length, from) = server.recv_from(&mut query).unwrap();
    assert_eq!((&query[..length], from.ip()), (&b"query"[..], ip(POD_V4)));
}
