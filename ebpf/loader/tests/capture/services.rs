//! The direct path by a service's virtual address: straight to one of its endpoints, as far as each has its pair's verdict.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use mesh_ebpf::{DirectFlow, DirectPair, DirectVip, VIP_ENDPOINTS, monotonic_now};
use socket2::{Domain, Protocol, Socket, Type};

use crate::direct::{PORT, Pair};
use crate::lab::{
    OUTSIDE_V4, OUTSIDE_V6, PATIENCE, POD_V4, POD_V6, at, canonical, greet, ip, listener, read_line,
};
use crate::outbound::disconnect;

/// Nobody has them, and there is no route to them.
const VIP_V4: &str = "198.18.0.10";
const VIP_V6: &str = "fd96::10";
const VIP_PORT: u16 = 80;
/// The second endpoint is another port of the same pod.
const OTHER_PORT: u16 = PORT + 1;
/// Enough that one of two endpoints is never picked once in 2^63 runs.
const DIALS: usize = 64;

/// Two captured pods, one of which serves a service at two ports, with verdicts for both of these.
struct Scene {
    pair: Pair,
    _applications: [Socket; 2],
}

impl Scene {
    fn new() -> Self {
        let pair = Pair::new();
        let applications = [PORT, OTHER_PORT].map(|port| {
            let application = pair.lab.pod.inside(|| listener(port));
            greet(&application, move |_, client| format!("{port} {}", canonical(client)));
            application
        });
        for verdict in other_verdicts(&pair) {
            pair.capture.permit_direct(&verdict, 7).unwrap();
        }
        let scene = Self { pair, _applications: applications };
        for (vip, endpoints) in services() {
            scene.spread(vip, &endpoints);
        }
        scene
    }

    fn vip(&self, vip: SocketAddr) -> DirectVip {
        DirectVip { client: self.pair.client.cookie, vip }
    }

    fn spread(&self, vip: SocketAddr, endpoints: &[SocketAddr]) {
        self.pair.capture.spread_direct(&self.vip(vip), endpoints).unwrap();
    }

    /// Who answered how often: `8080`, `8081`, or `outbound` for the agent.
    fn dial(&self, target: SocketAddr) -> BTreeMap<String, usize> {
        let mut answers = BTreeMap::new();
        for _ in 0..DIALS {
            let line = self.pair.dial(target);
            let who = line.split_whitespace().next().unwrap();
            *answers.entry(who.to_owned()).or_default() += 1;
        }
        answers
    }
}

fn other_verdicts(pair: &Pair) -> [DirectPair; 2] {
    pair.verdicts(pair.server.cookie).map(|verdict| {
        let target = SocketAddr::new(verdict.target.ip(), OTHER_PORT);
        DirectPair { target, ..verdict }
    })
}

/// The virtual addresses and the endpoints of each.
fn services() -> [(SocketAddr, [SocketAddr; 2]); 2] {
    [(VIP_V4, POD_V4), (VIP_V6, POD_V6)]
        .map(|(vip, pod)| (at(vip, VIP_PORT), [PORT, OTHER_PORT].map(|port| at(pod, port))))
}

fn agent_alone() -> BTreeMap<String, usize> {
    BTreeMap::from([("outbound".to_owned(), DIALS)])
}

fn assert_both_alone(answers: &BTreeMap<String, usize>) {
    let who: Vec<&str> = answers.keys().map(String::as_str).collect();
    assert_eq!(who, ["8080", "8081"], "{answers:?}");
}

#[test]
fn a_services_address_leads_straight_to_its_endpoints() {
    let scene = Scene::new();
    let [(v4, _), (v6, _)] = services();
    // What nobody keeps in force says nothing.
    assert_eq!(scene.dial(v4), agent_alone());
    scene.pair.in_force();
    let mapped = Ipv4Addr::to_ipv6_mapped(&VIP_V4.parse().unwrap());
    let capture = &scene.pair.capture;
    for target in [v4, v6, SocketAddr::new(mapped.into(), VIP_PORT)] {
        assert_both_alone(&scene.dial(target));
        scene.pair.lab.outside.inside(|| {
            let stream = TcpStream::connect(target).unwrap();
            // The client sees whom it dialled, the server sees the client.
            assert_eq!(stream.peer_addr().unwrap(), target);
            let own = canonical(stream.local_addr().unwrap());
            let client = if target == v6 { OUTSIDE_V6 } else { OUTSIDE_V4 };
            assert_eq!(own.ip(), ip(client));
            let line = read_line(&stream).unwrap();
            let (port, seen) = line.split_once(' ').unwrap();
            assert_eq!(seen, own.to_string());
            let server = if target == v6 { POD_V6 } else { POD_V4 };
            let flow = DirectFlow { client: own, target: at(server, port.parse().unwrap()) };
            assert_eq!(capture.dialled(&flow).unwrap(), Some(canonical(target)));
        });
    }
    let direct = u64::try_from(3 * (DIALS + 1)).unwrap();
    for counter in ["direct_dialled", "direct_service_dialled", "direct_admitted"] {
        assert_eq!(scene.pair.counter(counter), direct, "{counter}");
    }
    // By its own address too, and then no service is noted.
    let (own, target) = scene.pair.lab.outside.inside(|| {
        let stream = TcpStream::connect(at(POD_V4, PORT)).unwrap();
        (stream.local_addr().unwrap(), stream.peer_addr().unwrap())
    });
    assert_eq!(target, at(POD_V4, PORT));
    assert_eq!(capture.dialled(&DirectFlow { client: own, target }).unwrap(), None);
    assert_eq!(scene.pair.counter("direct_service_dialled"), direct);
    for counter in ["guard_dropped_no_flow", "inbound_not_admitted", "direct_service_lost"] {
        assert_eq!(scene.pair.counter(counter), 0, "{counter}");
    }
}

#[test]
fn every_kind_of_socket_sees_the_service_that_it_dialled() {
    let scene = Scene::new();
    scene.pair.in_force();
    let [(v4, _), (v6, _)] = services();
    scene.pair.lab.outside.inside(|| {
        for (target, domain) in [(v4, Domain::IPV4), (v6, Domain::IPV6)] {
            for protocol in [Protocol::TCP, Protocol::MPTCP] {
                let socket = Socket::new(domain, Type::STREAM, Some(protocol)).unwrap();
                socket.connect_timeout(&target.into(), PATIENCE).unwrap();
                let stream = TcpStream::from(socket);
                assert_eq!(stream.peer_addr().unwrap(), target, "{protocol:?}");
                let line = read_line(&stream).unwrap();
                assert!(line.starts_with("808"), "{protocol:?} {target}: {line}");
                assert_eq!(stream.peer_addr().unwrap(), target, "{protocol:?}");
            }
        }
    });
    // A socket that is used again, outside the mesh by then, names nobody from before.
    let socket = scene.pair.lab.outside.inside(|| {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, Some(Protocol::TCP)).unwrap();
        socket.connect(&v4.into()).unwrap();
        disconnect(&socket);
        socket
    });
    scene.pair.capture.unenroll(scene.pair.client.cookie).unwrap();
    let plain = at(POD_V4, PORT);
    socket.connect(&plain.into()).unwrap();
    assert_eq!(socket.peer_addr().unwrap().as_socket(), Some(plain));
}

#[test]
fn an_endpoint_without_verdict_is_never_reached_by_the_service() {
    let scene = Scene::new();
    scene.pair.in_force();
    let [(v4, endpoints), (v6, _)] = services();
    let capture = &scene.pair.capture;
    let [other, _] = other_verdicts(&scene.pair);
    assert!(capture.revoke_direct(&other).unwrap());
    let answers = scene.dial(v4);
    let who: Vec<&str> = answers.keys().map(String::as_str).collect();
    assert_eq!(who, ["8080", "outbound"], "{answers:?}");
    // Without any of them, and of another family.
    scene.spread(v4, &[other.target]);
    assert_eq!(scene.dial(v4), agent_alone());
    scene.spread(v4, &[at(POD_V6, PORT)]);
    assert_eq!(scene.dial(v4), agent_alone());
    // One that is listed alone takes all.
    scene.spread(v4, &endpoints[..1]);
    assert_eq!(scene.dial(v4), BTreeMap::from([("8080".to_owned(), DIALS)]));
    // Another port, and another client, are no part of it.
    let port = SocketAddr::new(v4.ip(), VIP_PORT + 1);
    assert_eq!(scene.dial(port), agent_alone());
    let listed = capture.direct_vips().unwrap();
    assert_eq!(listed.len(), 2);
    assert!(listed.contains(&(scene.vip(v4), endpoints[..1].to_vec())), "{listed:?}");
    assert!(capture.gather_direct(&scene.vip(v6)).unwrap());
    assert!(!capture.gather_direct(&scene.vip(v6)).unwrap());
    assert_eq!(scene.dial(v6), agent_alone());
    let of_another = DirectVip { client: scene.pair.server.cookie, vip: v6 };
    capture.spread_direct(&of_another, &[at(POD_V6, PORT)]).unwrap();
    assert_eq!(scene.dial(v6), agent_alone());
    // With none, and with more than there is room for.
    for count in [0, VIP_ENDPOINTS + 1] {
        let endpoints = vec![at(POD_V4, PORT); count];
        assert!(capture.spread_direct(&scene.vip(v4), &endpoints).is_err(), "{count}");
    }
}

#[test]
fn what_was_dialled_is_kept_until_the_agent_forgets_it() {
    let scene = Scene::new();
    scene.pair.in_force();
    let [(v4, endpoints), _] = services();
    scene.spread(v4, &endpoints[..1]);
    let capture = &scene.pair.capture;
    let before = monotonic_now();
    let client = scene.pair.lab.outside.inside(|| {
        let stream = TcpStream::connect(v4).unwrap();
        let own = stream.local_addr().unwrap();
        assert!(read_line(&stream).unwrap().starts_with("8080"));
        own
    });
    let flow = DirectFlow { client, target: endpoints[0] };
    let deadline = Instant::now() + PATIENCE;
    while !capture.direct_flows().unwrap().is_empty() {
        assert!(Instant::now() < deadline);
        std::thread::sleep(Duration::from_millis(1));
    }
    assert_eq!(capture.all_dialled().unwrap(), [flow]);
    // The end of an earlier connection by the same ports says nothing of this one.
    capture.forget_dialled(&flow, before).unwrap();
    assert_eq!(capture.dialled(&flow).unwrap(), Some(v4));
    capture.forget_dialled(&flow, monotonic_now()).unwrap();
    assert_eq!(capture.dialled(&flow).unwrap(), None);
    assert_eq!(capture.all_dialled().unwrap(), []);
}
