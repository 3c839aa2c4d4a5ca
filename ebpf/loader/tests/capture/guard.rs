//! The guard against a pod that sends packets by hand.
#![expect(unsafe_code, reason = "raw and packet sockets, which std and socket2 do not offer whole")]

use std::net::{IpAddr, UdpSocket};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use mesh_ebpf::{Capture, CaptureConfig, GuardPreference, PodSettings};

use crate::lab::{Lab, Namespace, OUTSIDE_V4, OUTSIDE_V6, PATIENCE, POD_V4, POD_V6, at, ip};

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

/// Sends frames as they are from the pod's interface.
fn send_frames(pod: &Namespace, frames: &[Vec<u8>]) {
    pod.inside(|| {
        let socket = packet_socket(interface_index("eth0"));
        for frame in frames {
            // SAFETY: pointer and length of a live slice.
            let sent =
                unsafe { libc::send(socket.as_raw_fd(), frame.as_ptr().cast(), frame.len(), 0) };
            assert_eq!(usize::try_from(sent).unwrap(), frame.len());
        }
    });
}

/// Frames with the marker that leave the guarded interface's node towards the outside, until a
/// datagram sent last has arrived there.
fn arrivals(lab: &Lab, send: impl FnOnce()) -> usize {
    let socket = lab.outside.inside(|| packet_socket(interface_index("eth0")));
    send();
    // UDP passes, and the veth keeps the order: what was before it has arrived when it has.
    let fence = lab.outside.inside(|| UdpSocket::bind(format!("{OUTSIDE_V4}:9")).unwrap());
    fence.set_read_timeout(Some(PATIENCE)).unwrap();
    lab.pod.inside(|| {
        UdpSocket::bind("0.0.0.0:0").unwrap().send_to(b"fence", at(OUTSIDE_V4, 9)).unwrap();
    });
    fence.recv(&mut [0; 8]).unwrap();
    let mut found = 0;
    let mut frame = [0_u8; 4096];
    loop {
        // SAFETY: pointer and length of a live buffer.
        let length = unsafe {
            libc::recv(
                socket.as_raw_fd(),
                frame.as_mut_ptr().cast(),
                frame.len(),
                libc::MSG_DONTWAIT,
            )
        };
        let Ok(length) = usize::try_from(length) else { return found };
        found += usize::from(frame[..length].windows(MARKER.len()).any(|part| part == MARKER));
    }
}

fn mac(namespace: &Namespace, interface: &str) -> Vec<u8> {
    let name = namespace.path.file_name().unwrap().to_string_lossy().into_owned();
    mac_from(&format!("ip -n {name} -br link show {interface}"))
}

fn mac_from(command: &str) -> Vec<u8> {
    let output = std::process::Command::new("sh").args(["-c", command]).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let mac = text.split_ascii_whitespace().nth(2).unwrap().to_owned();
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

/// Every packet a pod should not be able to send, with its name.
fn hostile_frames(lab: &Lab) -> Vec<(&'static str, Vec<u8>)> {
    let mut link = mac_from("ip -br link show vpod");
    link.extend(mac(&lab.pod, "eth0"));
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

fn guarded_by(lab: &Lab, guard: GuardPreference) -> Arc<Capture> {
    let config = CaptureConfig { guard, ..lab.config() };
    Arc::new(Capture::load_or_adopt(&config).unwrap())
}

#[test]
fn nothing_sent_by_hand_leaves_the_pod() {
    let lab = Lab::new();
    // Neighbours are known, so that the node forwards at once.
    lab.outside.inside(|| {
        assert!((0..5).any(|_| ping(POD_V4)), "v4");
        assert!((0..5).any(|_| ping(POD_V6)), "v6");
    });
    let frames = hostile_frames(&lab);
    let only_frames: Vec<_> = frames.iter().map(|(_, frame)| frame.clone()).collect();
    let without = arrivals(&lab, || send_frames(&lab.pod, &only_frames));
    println!("without guard {without} of {} arrive", frames.len());
    assert!(without >= 8, "without guard only {without} arrive: the test proves nothing");
    for guard in [GuardPreference::Auto, GuardPreference::Clsact] {
        let capture = guarded_by(&lab, guard);
        let agent = lab.enroll(&capture, PodSettings::default());
        let before = capture.counters().unwrap();
        for (name, frame) in &frames {
            let arrived = arrivals(&lab, || send_frames(&lab.pod, std::slice::from_ref(frame)));
            assert_eq!(arrived, 0, "{name} ({guard:?})");
        }
        let after = capture.counters().unwrap();
        let dropped: u64 = after
            .iter()
            .filter(|(name, _)| name.starts_with("guard_dropped"))
            .map(|(name, count)| count - before[name])
            .sum();
        assert!(dropped >= frames.len() as u64, "{dropped} of {}: {after:?}", frames.len());
        for reason in [
            "vlan",
            "ethertype",
            "protocol",
            "fragment",
            "extension_header",
            "spoofed_source",
            "no_flow",
        ] {
            let name = format!("guard_dropped_{reason}");
            assert!(after[name.as_str()] > before[name.as_str()], "{name}: {after:?}");
        }
        drop(agent);
        capture.detach_all().unwrap();
    }
}

/// Whether an echo request is answered.
fn ping(address: &str) -> bool {
    use socket2::{Domain, Protocol, Socket, Type};
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
    let deadline = Instant::now() + Duration::from_millis(700);
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

fn udp_arrives(lab: &Lab, bind: &str, capture: Option<&Capture>) -> bool {
    let server = lab.outside.inside(|| UdpSocket::bind(format!("{OUTSIDE_V4}:7000")).unwrap());
    server.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
    lab.pod.inside(|| {
        let client = UdpSocket::bind(bind).unwrap();
        if let Some(capture) = capture {
            capture.label(std::os::fd::AsFd::as_fd(&client)).unwrap();
        }
        client.connect(at(OUTSIDE_V4, 7000)).unwrap();
        client.send(b"datagram").ok();
        client.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
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
    assert!(udp_arrives(&lab, "0.0.0.0:0", None));
    lab.pod.inside(|| {
        assert!((0..5).any(|_| ping(OUTSIDE_V4)), "v4");
        assert!((0..5).any(|_| ping(OUTSIDE_V6)), "v6");
    });
    drop(agent);
    let settings = PodSettings { deny_udp: true, deny_icmp: true, ..PodSettings::default() };
    let _agent = lab.enroll(&capture, settings);
    assert!(!udp_arrives(&lab, "0.0.0.0:0", None));
    assert!(udp_arrives(&lab, &format!("{POD_V4}:0"), Some(&capture)), "the agent's own");
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
