//! A pod that changes its own network to lead inbound connections past the agent, or to have its
//! guard take a made-up connection for one that came in.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::fd::AsFd;
use std::time::Duration;

use mesh_ebpf::{DELIVERY_MARK, PodSettings, Selection};
use socket2::{Domain, Protocol, Socket, Type};

use crate::lab::{
    Lab, OUTSIDE_V4, OUTSIDE_V6, POD_V4, POD_V6, agent_listener, at, dial, greet, ip, listener,
    read_line, refused, run, scaled,
};

/// Routes that bring connections under a foreign address back over loopback, as enrolment sets them.
const DELIVERY_ROUTES: &str = "sysctl -qw net.ipv4.tcp_fwmark_accept=1 net.ipv4.fwmark_reflect=1 \
        net.ipv6.fwmark_reflect=1
    for family in -4 -6; do
        ip $family rule add fwmark 0x539 lookup 133 pref 50
        ip $family rule add fwmark 7 lookup 133 pref 51
        ip $family route add local default dev lo table 133
    done";

/// Moves the TCP that arrives at the pod's interface to its loopback. The classifier compares the
/// protocol's byte in the frame.
const REDIRECT: &str = "tc qdisc add dev eth0 ingress
    while read protocol at; do
        tc filter add dev eth0 parent ffff: protocol $protocol \
            bpf bytecode \"4,48 0 0 $at,21 0 1 6,6 0 0 262144,6 0 0 0\" \
            action mirred ingress redirect dev lo
    done <<END
ip 23
ipv6 20
END";

/// Makes what arrives seem to come from the pod itself.
fn disguise() -> String {
    format!(
        "nft 'add table inet hide; add chain inet hide in {{ type nat hook input priority 100; }}
            add rule inet hide in tcp dport 8080 ip saddr {OUTSIDE_V4} snat ip to {POD_V4}
            add rule inet hide in tcp dport 8080 ip6 saddr {OUTSIDE_V6} snat ip6 to {POD_V6}'"
    )
}

/// A socket under somebody else's address, not connected yet.
fn under(client: SocketAddr, mark: u32) -> Socket {
    let domain = Domain::for_address(client);
    let socket = Socket::new(domain, Type::STREAM, Some(Protocol::TCP)).unwrap();
    if client.is_ipv4() {
        socket.set_ip_transparent_v4(true).unwrap();
    } else {
        socket.set_ip_transparent_v6(true).unwrap();
    }
    socket.set_mark(mark).unwrap();
    socket.bind_device(Some(b"lo")).unwrap();
    socket.set_reuse_address(true).unwrap();
    socket.bind(&client.into()).unwrap();
    socket
}

#[test]
fn what_is_redirected_to_loopback_is_steered_all_the_same() {
    let lab = Lab::new();
    let capture = lab.capture();
    let application = lab.pod.inside(|| listener(8080));
    greet(&application, |_, _| "application".to_owned());
    let _agent = lab.enroll(&capture, PodSettings::default());
    lab.pod.inside(|| run(REDIRECT));
    lab.outside.inside(|| {
        for address in [POD_V4, POD_V6] {
            let target = at(address, 8080);
            assert_eq!(dial(target).unwrap(), format!("inbound {target}"));
        }
    });
    lab.pod.inside(|| {
        for address in [POD_V4, POD_V6, "127.0.0.1", "127.9.9.9", "::1"] {
            assert_eq!(dial(at(address, 8080)).unwrap(), "application", "{address}");
        }
    });
}

#[test]
fn no_payload_passes_on_a_connection_in_disguise() {
    let lab = Lab::new();
    let capture = lab.capture();
    let application = lab.pod.inside(|| listener(8080));
    let (heard, ears) = std::sync::mpsc::channel();
    let server: std::net::TcpListener = application.try_clone().unwrap().into();
    std::thread::spawn(move || {
        while let Ok((mut stream, _)) = server.accept() {
            stream.set_read_timeout(Some(scaled(Duration::from_secs(1)))).unwrap();
            stream.write_all(b"application\n").ok();
            let mut first = [0; 16];
            heard.send(stream.read(&mut first).is_ok_and(|length| length > 0)).unwrap();
        }
    });
    let _agent = lab.enroll(&capture, PodSettings::default());
    lab.pod.inside(|| run(&disguise()));
    for address in [POD_V4, POD_V6] {
        lab.outside.inside(|| {
            let mut stream = TcpStream::connect(at(address, 8080)).unwrap();
            stream.write_all(b"plaintext").unwrap();
            stream.set_read_timeout(Some(scaled(Duration::from_secs(1)))).unwrap();
            // Whatever comes, it is not an answer.
            assert!(!stream.read(&mut [0; 16]).is_ok_and(|length| length > 0), "{address}");
        });
        assert!(!ears.recv().unwrap(), "the application heard plaintext ({address})");
    }
    let counters = capture.counters().unwrap();
    assert!(counters["guard_dropped_unadmitted"] >= 2, "{counters:?}");
    application.shutdown(std::net::Shutdown::Both).unwrap();
}

/// The agent's own connection to the application has a foreign source too, and comes over loopback.
#[test]
fn only_the_agent_reaches_the_application_under_a_foreign_address() {
    let lab = Lab::new();
    let capture = lab.capture();
    let application = lab.pod.inside(|| listener(8080));
    greet(&application, |_, client| format!("application {}", crate::lab::canonical(client)));
    let _agent = lab.enroll(&capture, PodSettings::default());
    lab.pod.inside(|| run(DELIVERY_ROUTES));
    lab.pod.inside(|| {
        for (client, pod) in [(OUTSIDE_V4, POD_V4), (OUTSIDE_V6, POD_V6)] {
            let (target, client) = (at(pod, 8080), at(client, 40_000));
            for round in 0..3 {
                let forged = under(client, DELIVERY_MARK);
                forged.connect(&target.into()).unwrap();
                let stream = TcpStream::from(forged);
                assert_eq!(read_line(&stream).unwrap(), format!("inbound {target}"), "{round}");
                drop(reset(stream));
                let ours = under(client, DELIVERY_MARK);
                capture.label(ours.as_fd()).unwrap();
                ours.connect(&target.into()).unwrap();
                let stream = TcpStream::from(ours);
                assert_eq!(read_line(&stream).unwrap(), format!("application {client}"));
                drop(reset(stream));
            }
            // A port where nothing listens still answers the agent at once.
            let ours = under(client, DELIVERY_MARK);
            capture.label(ours.as_fd()).unwrap();
            let error = ours.connect(&at(pod, 8081).into()).unwrap_err();
            assert_eq!(error.kind(), std::io::ErrorKind::ConnectionRefused);
        }
    });
    // Deliveries are known as long as their sockets live.
    assert_eq!(capture.sweep_flows(Duration::ZERO).unwrap().live, 0);
}

/// Closed with a reset, the address is free at once.
fn reset(stream: TcpStream) -> TcpStream {
    socket2::SockRef::from(&stream).set_linger(Some(Duration::ZERO)).unwrap();
    stream
}

/// A pod that connects to itself under a foreign address must not get that address permitted: it
/// could send plaintext there by hand.
#[test]
fn a_made_up_connection_permits_nothing() {
    let lab = Lab::new();
    let capture = lab.capture();
    let excluded = Selection { exclude_ports: [8081].into(), ..Selection::default() };
    let settings = PodSettings { inbound: excluded, ..PodSettings::default() };
    let _agent = lab.enroll(&capture, settings);
    let application = lab.pod.inside(|| listener(8081));
    greet(&application, |_, _| "application".to_owned());
    lab.pod.inside(|| {
        run(DELIVERY_ROUTES);
        for (outside, pod) in [(OUTSIDE_V4, POD_V4), (OUTSIDE_V6, POD_V6)] {
            // Steered to the agent, and past it.
            for (port, expected) in
                [(8080, format!("inbound {}", at(pod, 8080))), (8081, "application".to_owned())]
            {
                let forged = under(at(outside, 80), 7);
                forged.connect(&at(pod, port).into()).unwrap();
                let stream = TcpStream::from(forged);
                assert_eq!(read_line(&stream).unwrap(), expected);
                assert_eq!(capture.sweep_flows(Duration::ZERO).unwrap().live, 0, "{pod} {port}");
                drop(reset(stream));
            }
        }
    });
    assert_eq!(capture.counters().unwrap()["inbound_not_admitted"], 4);
    // One that did come in may be answered.
    lab.outside.inside(|| {
        assert_eq!(dial(at(POD_V4, 8081)).unwrap(), "application");
        assert_eq!(dial(at(POD_V6, 8080)).unwrap(), format!("inbound [{POD_V6}]:8080"));
    });
}

/// A process that shares the agent's ports since before the enrolment.
#[test]
fn a_squatter_on_the_agents_ports_gets_nothing() {
    let lab = Lab::new();
    let capture = lab.capture();
    let ports = [15001, 15006, 15008];
    let squatters: Vec<_> = lab.pod.inside(|| ports.map(listener)).into_iter().collect();
    for squatter in &squatters {
        greet(squatter, |_, _| "squatter".to_owned());
    }
    let agent = lab.enroll(&capture, PodSettings::default());
    lab.outside.inside(|| {
        // Nobody of the agent's is there.
        assert!(refused(&dial(at(POD_V4, 15008))));
        assert!(refused(&dial(at(POD_V6, 15008))));
    });
    let tunnels = lab.agent_listener(&capture, 15008);
    greet(&tunnels, |_, _| "tunnel".to_owned());
    for _ in 0..30 {
        lab.outside.inside(|| {
            assert_eq!(dial(at(POD_V4, 15008)).unwrap(), "tunnel");
            assert_eq!(dial(at(POD_V6, 8080)).unwrap(), format!("inbound [{POD_V6}]:8080"));
        });
        lab.pod.inside(|| {
            assert_eq!(dial(at(OUTSIDE_V4, 80)).unwrap(), format!("outbound {OUTSIDE_V4}:80"));
        });
    }
    drop(agent);
    lab.pod.inside(|| assert!(refused(&dial(at(OUTSIDE_V4, 80)))));
    lab.outside.inside(|| assert!(refused(&dial(at(POD_V4, 80)))));
}

#[test]
fn new_connections_are_spread_over_the_agents_listeners() {
    let lab = Lab::new();
    let capture = lab.capture();
    let cookie = mesh_ebpf::Capture::netns_cookie(&lab.pod.path).unwrap();
    let listeners: Vec<_> = (0..3_u16)
        .map(|slot| {
            let listener = lab.pod.inside(|| agent_listener(&capture, 15006));
            capture.set_listener(cookie, 15006, slot, listener.as_fd()).unwrap();
            greet(&listener, move |_, _| slot.to_string());
            listener
        })
        .collect();
    let mut pod = lab.pod_capture(PodSettings::default());
    pod.addresses = vec![ip(POD_V4), ip(POD_V6)];
    capture.enroll(&pod, 3).unwrap();
    let count = || {
        let mut found = [0_u32; 3];
        for _ in 0..120 {
            found[dial(at(POD_V4, 80)).unwrap().parse::<usize>().unwrap()] += 1;
        }
        found
    };
    let found = lab.outside.inside(count);
    assert!(found.iter().all(|share| *share >= 15), "{found:?}");
    // The share of one that closes goes to the first.
    listeners[2].shutdown(std::net::Shutdown::Both).unwrap();
    assert_eq!(lab.outside.inside(count)[2], 0);
    for listener in &listeners[..2] {
        listener.shutdown(std::net::Shutdown::Both).unwrap();
    }
}

#[test]
fn one_client_port_leads_to_several_listeners() {
    let lab = Lab::new();
    let capture = lab.capture();
    let agent = lab.enroll(&capture, PodSettings::default());
    let resolver = lab.agent_listener(&capture, 15053);
    greet(&resolver, |_, _| "resolver".to_owned());
    lab.pod.inside(|| {
        let connect = |target: SocketAddr| {
            let socket = Socket::new(Domain::IPV4, Type::STREAM, Some(Protocol::TCP)).unwrap();
            socket.set_reuse_address(true).unwrap();
            socket.bind(&at(POD_V4, 40_000).into()).unwrap();
            socket.connect(&target.into()).unwrap();
            TcpStream::from(socket)
        };
        let (web, dns) = (at(OUTSIDE_V4, 80), at(OUTSIDE_V4, 53));
        let (first, second) = (connect(web), connect(dns));
        assert_eq!(read_line(&first).unwrap(), format!("outbound {web}"));
        assert_eq!(read_line(&second).unwrap(), "resolver");
        let asked = |port| capture.orig_dst(agent.cookie, port, at(POD_V4, 40_000)).unwrap();
        assert_eq!((asked(15001), asked(15053)), (Some(web), Some(dns)));
        drop(reset(second));
        assert_eq!(asked(15001), Some(web));
    });
}

/// What a pod could put together behind its guard's back, or has no address for, does not come in.
#[test]
fn what_a_pod_could_not_answer_does_not_come_in() {
    let lab = Lab::new();
    let capture = lab.capture();
    let excluded = Selection { exclude_ports: [8081].into(), ..Selection::default() };
    let settings = PodSettings { inbound: excluded, ..PodSettings::default() };
    let _agent = lab.enroll(&capture, settings);
    let send = |protocol: u8, fragment: u16, payload: &[u8]| {
        lab.outside.inside(|| {
            let raw = Socket::new(Domain::IPV4, Type::RAW, Some(Protocol::from(libc::IPPROTO_RAW)));
            let packet = from_outside(protocol, fragment, payload);
            raw.unwrap().send_to(&packet, &at(POD_V4, 0).into()).unwrap();
        });
    };
    let counted = |name: &str| capture.counters().unwrap()[name];
    let expect = |name: &str, more: u64, act: &dyn Fn()| {
        let before = counted(name);
        act();
        let deadline = std::time::Instant::now() + crate::lab::PATIENCE;
        while counted(name) < before + more {
            assert!(std::time::Instant::now() < deadline, "{name}");
        }
        assert_eq!(counted(name), before + more, "{name}");
    };
    const SYN: u8 = 2;
    let inner = from_outside(6, 0, &segment(80, SYN, b"in a tunnel"));
    expect("guard_dropped_inbound_unknown", 3, &|| {
        send(4, 0, &inner);
        send(6, 0x2000, &segment(8080, SYN, b""));
        send(132, 0, b"sctp and more than that");
    });
    // With payload in its first segment nobody could be judged before it is in.
    expect("guard_dropped_unadmitted", 1, &|| {
        send(6, 0, &segment(8080, SYN, b"fast open"));
        send(6, 0, &segment(8081, SYN, b"fast open"));
    });
    run("ip route add 10.91.7.7/32 via 10.91.1.2");
    expect("guard_dropped_foreign_target", 1, &|| {
        lab.outside.inside(|| {
            let target = at("10.91.7.7", 80);
            TcpStream::connect_timeout(&target, Duration::from_millis(300)).unwrap_err();
        });
    });
}

/// More SYNs than there is room for tuples without socket: what is open has its entry elsewhere.
#[test]
fn a_flood_of_syns_evicts_no_open_connection() {
    const SYNS: u16 = 35_000;
    let lab = Lab::new();
    let capture = lab.capture();
    let _agent = lab.enroll(&capture, PodSettings::default());
    let mut open = lab.outside.inside(|| TcpStream::connect(at(POD_V4, 8080)).unwrap());
    assert_eq!(read_line(&open).unwrap(), format!("inbound {POD_V4}:8080"));
    lab.outside.inside(|| {
        let raw = Socket::new(Domain::IPV4, Type::RAW, Some(Protocol::from(libc::IPPROTO_RAW)));
        let raw = raw.unwrap();
        for target in [80, 81] {
            for source in 0..SYNS {
                let mut syn = segment(target, 2, &[]);
                syn[..2].copy_from_slice(&source.to_be_bytes());
                let packet = from_outside(6, 0, &syn);
                while let Err(error) = raw.send_to(&packet, &at(POD_V4, 0).into()) {
                    assert_eq!(error.raw_os_error(), Some(libc::ENOBUFS));
                }
            }
        }
    });
    open.write_all(b"still here\n").unwrap();
    assert_eq!(read_line(&open).unwrap(), "still here");
    let counters = capture.counters().unwrap();
    assert_eq!((counters["flow_table_full"], counters["guard_dropped_no_flow"]), (0, 0));
}

/// An IPv4 packet from the outside to the pod.
fn from_outside(protocol: u8, fragment: u16, payload: &[u8]) -> Vec<u8> {
    let octets = |address: &str| match ip(address) {
        std::net::IpAddr::V4(address) => address.octets(),
        std::net::IpAddr::V6(_) => panic!("an IPv4 address"),
    };
    let length = u16::try_from(20 + payload.len()).unwrap();
    // The kernel fills in the checksum.
    let mut packet = vec![0x45, 0];
    packet.extend(length.to_be_bytes());
    packet.extend([0, 7]);
    packet.extend(fragment.to_be_bytes());
    packet.extend([64, protocol, 0, 0]);
    packet.extend(octets(OUTSIDE_V4));
    packet.extend(octets(POD_V4));
    packet.extend(payload);
    packet
}

/// A TCP segment without checksum, which the guard does not look at.
fn segment(port: u16, flags: u8, payload: &[u8]) -> Vec<u8> {
    let mut segment = vec![0x9c, 0x41];
    segment.extend(port.to_be_bytes());
    segment.extend([0; 8]);
    segment.extend([0x50, flags, 0xff, 0xff, 0, 0, 0, 0]);
    segment.extend(payload);
    segment
}
