//! The guard against a pod that sends packets by hand.
#![expect(unsafe_code, reason = "raw and packet sockets, which std and socket2 do not offer whole")]

use std::collections::BTreeMap;
use std::net::{IpAddr, UdpSocket};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use mesh_ebpf::{Capture, CaptureConfig, GuardPreference, PodSettings};
use socket2::{Domain, Protocol, Socket, Type};

use crate::lab::{
    Lab, Namespace, OUTSIDE_V4, OUTSIDE_V6, PATIENCE, POD_V4, POD_V6, at, ip, scaled,
};

/// Found again in whatever arrives.
const MARKER: &[u8] = b"culvert-guard-test";

fn packet_socket(index: u32) -> OwnedFd {
    let all = libc::ETH_P_ALL.to_be_bytes();
    let protocol = u16::from_ne_bytes([all[2], all[3]]);
    // SAFETY: plain system calls; the address is a whole `sockaddr_ll`.
    unsafe {
        let fd = libc::socket(libc::AF_PACKET, libc::SOCK_RAW, i32::from(protocol));
        assert!(fd >= 0);
        let socket = OwnedFd::from_raw_fd(fd);
        let mut address: libc::sockaddr_ll = std::mem::zeroed();
        address.sll_family = 17;
        address.sll_protocol = protocol;
        address.sll_ifindex = i32::try_from(index).unwrap();
        let length = u32::try_from(size_of::<libc::sockaddr_ll>()).unwrap();
        assert_eq!(libc::bind(fd, (&raw const address).cast(), length), 0);
        socket
    }
}

fn interface_index(name: &str) -> u32 {
    let name = std::ffi::CString::new(name).unwrap();
    // SAFETY: a terminated name.
    let index = unsafe { libc::if_nametoindex(name.as_ptr()) };
    assert_ne!(index, 0);
    index
}

/// How a pod gets bytes onto its interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    /// A whole frame through a packet socket.
    Frame,
    /// The same, past the queueing discipline (`PACKET_QDISC_BYPASS`).
    FramePastQueue,
    /// A whole IP packet through a raw socket of protocol `IPPROTO_RAW`.
    Packet,
    /// A TCP segment through a raw socket of protocol `IPPROTO_TCP`, to this address.
    Segment(&'static str),
}

/// Something a pod should not be able to send.
#[derive(Clone, Debug)]
struct Hostile {
    name: &'static str,
    way: Way,
    bytes: Vec<u8>,
}

impl Hostile {
    fn send(&self, pod: &Namespace) {
        pod.inside(|| match self.way {
            Way::Frame => self.send_frame(false),
            Way::FramePastQueue => self.send_frame(true),
            Way::Packet if self.bytes[0] >> 4 == 4 => self.send_raw(OUTSIDE_V4, libc::IPPROTO_RAW),
            Way::Packet => self.send_raw(OUTSIDE_V6, libc::IPPROTO_RAW),
            Way::Segment(target) => self.send_raw(target, libc::IPPROTO_TCP),
        });
    }

    fn send_frame(&self, past_queue: bool) {
        let socket = packet_socket(interface_index("eth0"));
        if past_queue {
            let on: libc::c_int = 1;
            let length = u32::try_from(size_of_val(&on)).unwrap();
            // SAFETY: pointer and length of a live integer.
            let set = unsafe {
                libc::setsockopt(
                    socket.as_raw_fd(),
                    libc::SOL_PACKET,
                    libc::PACKET_QDISC_BYPASS,
                    (&raw const on).cast(),
                    length,
                )
            };
            assert_eq!(set, 0);
        }
        // SAFETY: pointer and length of a live slice.
        let sent = unsafe {
            libc::send(socket.as_raw_fd(), self.bytes.as_ptr().cast(), self.bytes.len(), 0)
        };
        assert_eq!(usize::try_from(sent).unwrap(), self.bytes.len());
    }

    fn send_raw(&self, target: &str, protocol: i32) {
        let target = at(target, 0);
        let domain = Domain::for_address(target);
        let socket = Socket::new(domain, Type::RAW, Some(Protocol::from(protocol))).unwrap();
        assert_eq!(socket.send_to(&self.bytes, &target.into()).unwrap(), self.bytes.len());
    }
}

/// What comes in at the outside's interface with the marker in it.
struct Sniffer(OwnedFd);

impl Sniffer {
    fn new(lab: &Lab) -> Self {
        Self(lab.outside.inside(|| packet_socket(interface_index("eth0"))))
    }

    /// How many came in since the last call, until a datagram sent now has arrived there.
    fn arrivals(&self, lab: &Lab) -> usize {
        // UDP passes, and bridge and veth keep the order: what was before it has arrived when it
        // has. One of each family, since a packet may wait for its neighbour to be resolved.
        for (any, target) in [("0.0.0.0:0", OUTSIDE_V4), ("[::]:0", OUTSIDE_V6)] {
            // A port of its own: a program that is just being started holds the last one a moment longer.
            let fence = lab.outside.inside(|| UdpSocket::bind(at(target, 0)).unwrap());
            let target = fence.local_addr().unwrap();
            fence.set_read_timeout(Some(PATIENCE)).unwrap();
            lab.pod.inside(|| UdpSocket::bind(any).unwrap().send_to(b"fence", target).unwrap());
            fence.recv(&mut [0; 8]).unwrap();
        }
        let mut found = 0;
        let mut frame = [0_u8; 4096];
        while let Some(incoming) = self.next(&mut frame) {
            let marked = incoming.windows(MARKER.len()).any(|part| part == MARKER);
            found += usize::from(marked);
        }
        found
    }

    /// The next frame that came in; frames that the outside itself sends are skipped (its errors
    /// quote what they are about).
    fn next<'a>(&self, frame: &'a mut [u8]) -> Option<&'a [u8]> {
        loop {
            // SAFETY: a zeroed `sockaddr_ll` is one.
            let mut from: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
            let mut from_length = u32::try_from(size_of_val(&from)).unwrap();
            // SAFETY: pointers and lengths of a live buffer and address.
            let length = unsafe {
                libc::recvfrom(
                    self.0.as_raw_fd(),
                    frame.as_mut_ptr().cast(),
                    frame.len(),
                    libc::MSG_DONTWAIT,
                    (&raw mut from).cast(),
                    &raw mut from_length,
                )
            };
            let length = usize::try_from(length).ok()?;
            if from.sll_pkttype != libc::PACKET_OUTGOING {
                return Some(&frame[..length]);
            }
        }
    }
}

fn mac(namespace: &Namespace) -> Vec<u8> {
    let name = namespace.path.file_name().unwrap().to_string_lossy().into_owned();
    let arguments = ["-n", &name, "-br", "link", "show", "eth0"];
    let output = std::process::Command::new("ip").args(arguments).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let mac = text.split_ascii_whitespace().nth(2).unwrap();
    mac.split(':').map(|octet| u8::from_str_radix(octet, 16).unwrap()).collect()
}

fn octets(address: &str) -> Vec<u8> {
    match ip(address) {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    }
}

fn checksum(octets: &[u8]) -> u16 {
    let sum: u32 = octets
        .chunks(2)
        .map(|pair| u32::from(u16::from_be_bytes([pair[0], pair.get(1).copied().unwrap_or(0)])))
        .sum();
    let sum = (sum & 0xffff) + (sum >> 16);
    !u16::try_from((sum & 0xffff) + (sum >> 16)).unwrap()
}

fn tcp(source_port: u16, target_port: u16, flags: u8) -> Vec<u8> {
    let mut segment = Vec::new();
    segment.extend(source_port.to_be_bytes());
    segment.extend(target_port.to_be_bytes());
    segment.extend([0; 8]);
    segment.extend([0x50, flags, 0xff, 0xff, 0, 0, 0, 0]);
    segment.extend(MARKER);
    segment
}

fn ipv4(source: &str, protocol: u8, fragment: u16, options: &[u8], payload: &[u8]) -> Vec<u8> {
    let header_octets = 20 + options.len();
    let mut packet = vec![0x40 | u8::try_from(header_octets / 4).unwrap(), 0];
    packet.extend(u16::try_from(header_octets + payload.len()).unwrap().to_be_bytes());
    packet.extend([0x12, 0x34]);
    packet.extend(fragment.to_be_bytes());
    packet.extend([64, protocol, 0, 0]);
    packet.extend(octets(source));
    packet.extend(octets(OUTSIDE_V4));
    packet.extend(options);
    let sum = checksum(&packet).to_be_bytes();
    packet[10..12].copy_from_slice(&sum);
    packet.extend(payload);
    packet
}

fn ipv6(source: &str, next: u8, payload: &[u8]) -> Vec<u8> {
    let mut packet = vec![0x60, 0, 0, 0];
    packet.extend(u16::try_from(payload.len()).unwrap().to_be_bytes());
    packet.extend([next, 64]);
    packet.extend(octets(source));
    packet.extend(octets(OUTSIDE_V6));
    packet.extend(payload);
    packet
}

/// Every frame a pod should not be able to send, with its name.
fn hostile_frames(lab: &Lab) -> Vec<(&'static str, Vec<u8>)> {
    let link = [mac(&lab.outside), mac(&lab.pod)].concat();
    let frame = |tags: &[u8], ethertype: u16, packet: Vec<u8>| {
        let mut frame = link.clone();
        frame.extend(tags);
        frame.extend(ethertype.to_be_bytes());
        frame.extend(packet);
        frame
    };
    const SYN: u8 = 0x02;
    const PUSH_ACK: u8 = 0x18;
    const MORE: u16 = 0x2000;
    let v4 = |packet| frame(&[], 0x0800, packet);
    let v6 = |packet| frame(&[], 0x86dd, packet);
    let behind = |extension: &[u8]| {
        let mut payload = extension.to_vec();
        payload.extend(tcp(40_000, 80, SYN));
        payload
    };
    let inner = ipv4(POD_V4, 6, 0, &[], &tcp(40_000, 80, SYN));
    let inner6 = ipv6(POD_V6, 6, &tcp(40_000, 80, SYN));
    let syn = || ipv4(POD_V4, 6, 0, &[], &tcp(40_000, 80, SYN));
    vec![
        ("TCP", v4(syn())),
        ("TCP data", v4(ipv4(POD_V4, 6, 0, &[], &tcp(40_000, 80, PUSH_ACK)))),
        ("source port of tunnels", v4(ipv4(POD_V4, 6, 0, &[], &tcp(15008, 80, PUSH_ACK)))),
        ("target port of tunnels", v4(ipv4(POD_V4, 6, 0, &[], &tcp(40_000, 15008, SYN)))),
        ("IP options", v4(ipv4(POD_V4, 6, 0, &[1, 1, 1, 0], &tcp(40_000, 80, SYN)))),
        ("first fragment", v4(ipv4(POD_V4, 6, MORE, &[], &tcp(40_000, 80, SYN)))),
        ("later fragment", v4(ipv4(POD_V4, 6, 3, &[], &tcp(40_000, 80, SYN)))),
        ("IP in IP", v4(ipv4(POD_V4, 4, 0, &[], &inner))),
        ("IPv6 in IP", v4(ipv4(POD_V4, 41, 0, &[], &inner6))),
        ("GRE", v4(ipv4(POD_V4, 47, 0, &[], &[&[0, 0, 8, 0], &inner[..]].concat()))),
        ("SCTP", v4(ipv4(POD_V4, 132, 0, &[], MARKER))),
        (
            "forged source",
            v4(ipv4("10.91.1.77", 17, 0, &[], &[&[0x10, 0, 0, 9, 0, 26, 0, 0], MARKER].concat())),
        ),
        ("VLAN", frame(&[0x81, 0, 0, 7], 0x0800, syn())),
        ("priority tag", frame(&[0x81, 0, 0, 0], 0x0800, syn())),
        ("QinQ", frame(&[0x88, 0xa8, 0, 5, 0x81, 0, 0, 7], 0x0800, syn())),
        ("MPLS", frame(&[], 0x8847, [&[0, 0, 1, 64][..], &syn()].concat())),
        ("IPv6 TCP", v6(ipv6(POD_V6, 6, &tcp(40_000, 80, SYN)))),
        ("hop-by-hop", v6(ipv6(POD_V6, 0, &behind(&[6, 0, 1, 4, 0, 0, 0, 0])))),
        ("destination options", v6(ipv6(POD_V6, 60, &behind(&[6, 0, 1, 4, 0, 0, 0, 0])))),
        ("routing header", v6(ipv6(POD_V6, 43, &behind(&[6, 0, 4, 0, 0, 0, 0, 0])))),
        ("atomic fragment", v6(ipv6(POD_V6, 44, &behind(&[6, 0, 0, 0, 0, 0, 0, 1])))),
        ("IPv6 later fragment", v6(ipv6(POD_V6, 44, &behind(&[6, 0, 0, 8, 0, 0, 0, 1])))),
        (
            "two extensions",
            v6(ipv6(POD_V6, 0, &behind(&[60, 0, 1, 4, 0, 0, 0, 0, 6, 0, 1, 4, 0, 0, 0, 0]))),
        ),
        ("IPv6 in IPv6", v6(ipv6(POD_V6, 41, &inner6))),
        ("IPv6 forged source", v6(ipv6("fd91:1::77", 6, &tcp(40_000, 80, SYN)))),
        ("link-local source", v6(ipv6("fe80::77", 6, &tcp(40_000, 80, SYN)))),
    ]
}

/// Whole packets for raw sockets of protocol `IPPROTO_RAW`, with their names.
fn hostile_packets() -> Vec<(&'static str, Vec<u8>)> {
    const SYN: u8 = 0x02;
    const MORE: u16 = 0x2000;
    let segment = || tcp(40_001, 80, SYN);
    let inner = ipv4(POD_V4, 6, 0, &[], &segment());
    vec![
        ("raw TCP", inner.clone()),
        ("raw forged source", ipv4("10.91.1.77", 6, 0, &[], &segment())),
        ("raw fragment", ipv4(POD_V4, 6, MORE, &[], &segment())),
        ("raw IP in IP", ipv4(POD_V4, 4, 0, &[], &inner)),
        ("raw IPv6 TCP", ipv6(POD_V6, 6, &segment())),
        ("raw IPv6 IP in IP", ipv6(POD_V6, 4, &inner)),
        (
            "raw IPv6 behind destination options",
            ipv6(POD_V6, 60, &[&[6, 0, 1, 4, 0, 0, 0, 0], &segment()[..]].concat()),
        ),
    ]
}

fn everything_hostile(lab: &Lab) -> Vec<Hostile> {
    let mut all = Vec::new();
    for (name, bytes) in hostile_frames(lab) {
        all.push(Hostile { name, way: Way::Frame, bytes: bytes.clone() });
        all.push(Hostile { name, way: Way::FramePastQueue, bytes });
    }
    for (name, bytes) in hostile_packets() {
        all.push(Hostile { name, way: Way::Packet, bytes });
    }
    for (name, target) in [("raw segment", OUTSIDE_V4), ("raw IPv6 segment", OUTSIDE_V6)] {
        all.push(Hostile { name, way: Way::Segment(target), bytes: tcp(40_002, 80, 0x18) });
    }
    all
}

fn guarded_by(lab: &Lab, guard: GuardPreference) -> Arc<Capture> {
    let config = CaptureConfig { guard, ..lab.config() };
    Arc::new(Capture::load_or_adopt(&config).unwrap())
}

/// What the guard dropped, by reason, without the prefix of the names.
fn dropped(capture: &Capture) -> BTreeMap<&'static str, u64> {
    let counters = capture.counters().unwrap();
    counters
        .into_iter()
        .filter_map(|(name, count)| Some((name.strip_prefix("guard_dropped_")?, count)))
        .collect()
}

#[test]
fn nothing_sent_by_hand_leaves_the_pod() {
    const REASONS: [&str; 7] = [
        "vlan",
        "ethertype",
        "protocol",
        "fragment",
        "extension_header",
        "spoofed_source",
        "no_flow",
    ];
    let lab = Lab::new();
    lab.bridge();
    let sniffer = Sniffer::new(&lab);
    let hostile = everything_hostile(&lab);
    for guard in [GuardPreference::Auto, GuardPreference::Clsact] {
        // Without a guard each one arrives, once; else the rest would prove nothing. In the second
        // round that shows too that the first guard went.
        for sent in &hostile {
            sent.send(&lab.pod);
            assert_eq!(sniffer.arrivals(&lab), 1, "{} by {:?}", sent.name, sent.way);
        }
        let capture = guarded_by(&lab, guard);
        let agent = lab.enroll(&capture, PodSettings::default());
        let before = dropped(&capture);
        let none_arrives = |when: &str| {
            for sent in &hostile {
                sent.send(&lab.pod);
                let arrived = sniffer.arrivals(&lab);
                assert_eq!(arrived, 0, "{} by {:?} ({guard:?}, {when})", sent.name, sent.way);
            }
        };
        none_arrives("enrolled");
        let after = dropped(&capture);
        let since = |reason: &str| after[reason] - before[reason];
        let all: u64 = after.keys().map(|reason| since(reason)).sum();
        assert!(all >= hostile.len() as u64, "{all} of {}: {after:?}", hostile.len());
        for reason in REASONS {
            assert!(since(reason) > 0, "{reason}: {after:?}");
        }
        drop(agent);
        drop(capture);
        none_arrives("nobody there");
        let adopting = AtomicBool::new(true);
        let capture = std::thread::scope(|scope| {
            let attack = scope.spawn(|| {
                let mut rounds = 0;
                while adopting.load(Ordering::Relaxed) || rounds < 2 {
                    hostile.iter().for_each(|sent| sent.send(&lab.pod));
                    rounds += 1;
                }
            });
            let capture = guarded_by(&lab, guard);
            adopting.store(false, Ordering::Relaxed);
            attack.join().unwrap();
            capture
        });
        assert_eq!(sniffer.arrivals(&lab), 0, "while the pins were adopted ({guard:?})");
        none_arrives("adopted");
        capture.detach_all().unwrap();
    }
}

/// Whether an echo request is answered.
fn ping(address: &str) -> bool {
    let target = at(address, 0);
    let (protocol, request, reply) =
        if target.is_ipv4() { (Protocol::ICMPV4, 8, 0) } else { (Protocol::ICMPV6, 128, 129) };
    let socket = Socket::new(Domain::for_address(target), Type::RAW, Some(protocol)).unwrap();
    let socket = UdpSocket::from(socket);
    let mut message = [request, 0, 0, 0, 0x4d, 0x45, 0, 1];
    // The kernel fills in the checksum of ICMPv6.
    if target.is_ipv4() {
        let sum = checksum(&message).to_be_bytes();
        message[2..4].copy_from_slice(&sum);
    }
    socket.send_to(&message, target).unwrap();
    let deadline = Instant::now() + scaled(Duration::from_millis(700));
    let mut packet = [0; 256];
    while let Some(left) =
        deadline.checked_duration_since(Instant::now()).filter(|left| !left.is_zero())
    {
        socket.set_read_timeout(Some(left)).unwrap();
        let Ok(length) = socket.recv(&mut packet) else { break };
        // IPv4 raw sockets deliver the IP header too.
        let at = if target.is_ipv4() { usize::from(packet[0] & 0x0f) * 4 } else { 0 };
        if packet[..length].get(at) == Some(&reply) {
            return true;
        }
    }
    false
}

/// Whether a datagram arrives and its answer comes back, waited for as long as `moment`.
fn udp_arrives(lab: &Lab, bind: &str, capture: Option<&Capture>, moment: Duration) -> bool {
    let server = lab.outside.inside(|| UdpSocket::bind(format!("{OUTSIDE_V4}:7000")).unwrap());
    server.set_read_timeout(Some(moment)).unwrap();
    lab.pod.inside(|| {
        let client = UdpSocket::bind(bind).unwrap();
        if let Some(capture) = capture {
            capture.label(std::os::fd::AsFd::as_fd(&client)).unwrap();
        }
        client.connect(at(OUTSIDE_V4, 7000)).unwrap();
        client.send(b"datagram").ok();
        client.set_read_timeout(Some(moment)).unwrap();
        let Ok((_, from)) = server.recv_from(&mut [0; 16]) else { return false };
        server.send_to(b"answer", from).unwrap();
        client.recv(&mut [0; 16]).is_ok()
    })
}

#[test]
fn udp_and_icmp_are_denied_where_the_settings_say_so() {
    let lab = Lab::new();
    let capture = lab.capture();
    let agent = lab.enroll(&capture, PodSettings::default());
    assert!(udp_arrives(&lab, "0.0.0.0:0", None, PATIENCE));
    lab.pod.inside(|| {
        assert!((0..5).any(|_| ping(OUTSIDE_V4)), "v4");
        assert!((0..5).any(|_| ping(OUTSIDE_V6)), "v6");
    });
    drop(agent);
    let settings = PodSettings { deny_udp: true, deny_icmp: true, ..PodSettings::default() };
    let _agent = lab.enroll(&capture, settings);
    assert!(!udp_arrives(&lab, "0.0.0.0:0", None, scaled(Duration::from_millis(300))));
    let own = format!("{POD_V4}:0");
    assert!(udp_arrives(&lab, &own, Some(&capture), PATIENCE), "the agent's own");
    lab.pod.inside(|| {
        assert!(!ping(OUTSIDE_V4) && !ping(OUTSIDE_V6));
        let unconnected = UdpSocket::bind("0.0.0.0:0").unwrap();
        let error = unconnected.send_to(b"x", at(OUTSIDE_V4, 7000)).unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::PermissionDenied);
    });
    let counters = capture.counters().unwrap();
    assert!(counters["guard_dropped_udp"] > 0 && counters["guard_dropped_icmp"] > 0);
    // Flows of datagrams end by age.
    let later = mesh_ebpf::monotonic_now() + Duration::from_secs(3600);
    assert!(capture.sweep_flows(later).unwrap().removed >= 1);
}
