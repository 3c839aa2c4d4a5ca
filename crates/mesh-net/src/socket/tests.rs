//! Sockets in real namespaces; root is needed.

use std::io::{Read, Write};
use std::time::Instant;

use super::*;
use crate::testing::Lab;

struct Unlabelled;

impl SocketLabel for Unlabelled {
    fn label(&self, _fd: BorrowedFd<'_>) -> io::Result<()> {
        Ok(())
    }
}

const APPS: ListenOptions = ListenOptions {
    keepalive: Keepalive {
        idle: Duration::from_secs(180),
        interval: Duration::from_secs(60),
        probes: 5,
    },
    far: Far::App,
};

struct Refusing;

impl SocketLabel for Refusing {
    fn label(&self, _fd: BorrowedFd<'_>) -> io::Result<()> {
        Err(io::ErrorKind::PermissionDenied.into())
    }
}

/// Two pods on one wire, the first prepared for original sources.
fn pods() -> (Lab, Lab) {
    let (pod, client) = (Lab::new("pod"), Lab::new("client"));
    pod.connect(&client, &["10.9.0.1/24", "fd09::1/64"], &["10.9.0.2/24", "fd09::2/64"]);
    for setting in
        ["net.ipv4.tcp_fwmark_accept=1", "net.ipv4.fwmark_reflect=1", "net.ipv6.fwmark_reflect=1"]
    {
        pod.sysctl(setting);
    }
    for family in ["-4", "-6"] {
        pod.ip(&format!("{family} rule add fwmark 0x539 lookup 133 pref 50"));
        pod.ip(&format!("{family} route add local default dev lo table 133"));
    }
    (pod, client)
}

fn finished(stream: TcpStream) -> io::Result<std::net::TcpStream> {
    let stream = std::net::TcpStream::from(stream);
    let begun = Instant::now();
    loop {
        if let Some(error) = stream.take_error()? {
            return Err(error);
        }
        if stream.peer_addr().is_ok() {
            stream.set_nonblocking(false)?;
            return Ok(stream);
        }
        assert!(begun.elapsed() < Duration::from_secs(5), "neither connected nor refused");
        std::thread::yield_now();
    }
}

#[test]
fn one_listener_serves_both_families_and_workers_share_a_port() {
    let (pod, client) = pods();
    let first = listen(pod.netns(), 15001, &Unlabelled, APPS).unwrap();
    let _second = listen(pod.netns(), 15001, &Unlabelled, APPS).unwrap();
    drop(first);
    for target in ["10.9.0.1:15001", "[fd09::1]:15001"] {
        let target: SocketAddr = target.parse().unwrap();
        client.netns().enter(|| std::net::TcpStream::connect(target)).unwrap().unwrap();
    }
}

#[test]
fn the_application_sees_the_clients_address_in_both_families() {
    let (pod, _client) = pods();
    for (target, client) in [("10.9.0.1:80", "10.9.0.2"), ("[fd09::1]:80", "fd09::2")] {
        let (target, client): (SocketAddr, IpAddr) =
            (target.parse().unwrap(), client.parse().unwrap());
        let app = pod.netns().enter(|| std::net::TcpListener::bind(target)).unwrap().unwrap();
        // Both ways of choosing the port.
        for taken in [None, Some(&(|_| false) as &dyn Fn(u16) -> bool)] {
            let source = AppSource::Original { client, taken };
            let stream = connect_to_app(pod.netns(), source, target, &Unlabelled).unwrap();
            let mut stream = finished(stream).unwrap();
            let (mut accepted, peer) = app.accept().unwrap();
            assert_eq!(peer.ip(), client);
            stream.write_all(b"ping").unwrap();
            accepted.read_exact(&mut [0; 4]).unwrap();
            accepted.write_all(b"pong").unwrap();
            stream.read_exact(&mut [0; 4]).unwrap();
        }
    }
}

/// Each of these ports has rested in TIME_WAIT for less than a second when the next connection wants one.
#[test]
fn connections_that_come_and_go_find_a_port() {
    let (pod, _client) = pods();
    pod.sysctl("net.ipv4.ip_local_port_range=40000 40063");
    let client = "10.9.0.2".parse().unwrap();
    for target in ["10.9.0.1:81", "10.9.0.1:82", "10.9.0.1:83"] {
        let target: SocketAddr = target.parse().unwrap();
        let app = pod.netns().enter(|| std::net::TcpListener::bind(target)).unwrap().unwrap();
        for _ in 0..48 {
            let source = AppSource::Original { client, taken: None };
            let stream = connect_to_app(pod.netns(), source, target, &Unlabelled).unwrap();
            let stream = finished(stream).unwrap();
            let (mut accepted, _peer) = app.accept().unwrap();
            end_on_close(&TcpStream::from_std(stream)).unwrap();
            assert_eq!(accepted.read(&mut [0; 1]).unwrap(), 0);
        }
    }
}

#[test]
fn a_closed_application_port_refuses_at_once() {
    let (pod, _client) = pods();
    let source = AppSource::Original { client: "10.9.0.2".parse().unwrap(), taken: None };
    let target = "10.9.0.1:9".parse().unwrap();
    let begun = Instant::now();
    let error =
        connect_to_app(pod.netns(), source, target, &Unlabelled).and_then(finished).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused);
    assert!(begun.elapsed() < Duration::from_secs(1));
}

#[test]
fn ports_that_are_taken_are_not_used() {
    let (pod, _client) = pods();
    let client = "10.9.0.2".parse().unwrap();
    let target = "10.9.0.1:80".parse().unwrap();
    let asked = std::cell::Cell::new(0);
    // The first three choices are in use; the fourth is taken.
    let taken = |_port| asked.replace(asked.get() + 1) < 3;
    let source = AppSource::Original { client, taken: Some(&taken) };
    connect_to_app(pod.netns(), source, target, &Unlabelled).unwrap();
    assert_eq!(asked.get(), 4);
    let source = AppSource::Original { client, taken: Some(&|_| true) };
    let error = connect_to_app(pod.netns(), source, target, &Unlabelled).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::AddrInUse);
}

#[test]
fn a_socket_without_its_label_is_not_used() {
    let (pod, _client) = pods();
    let target = "10.9.0.2:80".parse().unwrap();
    let options =
        ConnectOptions { far: Far::Agent, keepalive: Keepalive::default(), user_timeout: None };
    let error = connect_from_pod(pod.netns(), target, &Refusing, options).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::PermissionDenied);
}

/// A process that dies closes nothing in order; the kernel closes for it.
#[test]
fn what_nobody_closes_is_reset_and_what_is_closed_ends() {
    let (pod, client) = pods();
    let dial = |port: u16| {
        let target = SocketAddr::from(([10, 9, 0, 1], port));
        client.netns().enter(|| std::net::TcpStream::connect(target)).unwrap().unwrap()
    };
    for (far, orderly) in [(Far::App, false), (Far::App, true), (Far::Agent, false)] {
        let options = ListenOptions { far, ..APPS };
        let listener = listen(pod.netns(), 15001, &Unlabelled, options).unwrap();
        let mut theirs = dial(15001);
        let ours = loop {
            match listener.accept() {
                Ok((stream, _peer)) => break stream,
                Err(error) => assert_eq!(error.kind(), io::ErrorKind::WouldBlock),
            }
        };
        let ours = std::net::TcpStream::from(ours);
        (&ours).write_all(b"half a sto").unwrap();
        theirs.read_exact(&mut [0; 10]).unwrap();
        if orderly {
            end_on_close(&TcpStream::from_std(ours)).unwrap();
        } else {
            drop(ours);
        }
        let end = theirs.read(&mut [0; 1]);
        if far == Far::App && !orderly {
            assert_eq!(end.unwrap_err().kind(), io::ErrorKind::ConnectionReset);
        } else {
            assert_eq!(end.unwrap(), 0);
        }
    }
}

/// Long rows of ports are taken, as connections leave them that were opened one after another and last.
#[test]
fn a_port_apart_is_found_beside_rows_of_taken_ones() {
    let taken = |port: u16| (61_000..65_000).contains(&port);
    for number in 0..10_000 {
        let tried: Vec<u16> = ports_apart(number).collect();
        assert!(tried.iter().any(|port| !taken(*port)), "{number}: all of {tried:?} are taken");
        for port in tried {
            assert!(port >= 61_000 || (port >= 32_768 && port % 2 == 1), "the kernel gives {port}");
        }
    }
}
