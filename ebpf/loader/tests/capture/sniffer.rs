//! What a host beside the node sees of a captured pod: nothing but what the agent sends.

use std::io::Read as _;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use mesh_ebpf::PodSettings;
use socket2::{Domain, Protocol, Socket, Type};

use crate::lab::{
    Lab, Namespace, OUTSIDE_V4, OUTSIDE_V6, POD_V4, POD_V6, at, dial, greet, ip, listener, refused,
};

/// A packet socket that has seen every frame of a namespace since it was made.
struct Sniffer(Socket);

/// `ETH_P_ALL` of packet(7).
const EVERY_KIND: u16 = 3;

impl Sniffer {
    fn of(namespace: &Namespace) -> Self {
        let protocol = Protocol::from(i32::from(EVERY_KIND.to_be()));
        let socket = namespace.inside(|| Socket::new(Domain::PACKET, Type::RAW, Some(protocol)));
        let socket = socket.unwrap();
        socket.set_nonblocking(true).unwrap();
        socket.set_recv_buffer_size(8 << 20).unwrap();
        Self(socket)
    }

    /// How many TCP segments between the pod and a server's port there were since the last call.
    fn segments(&mut self, port: u16) -> usize {
        let mut frame = [0; 65_536];
        let mut segments = 0;
        while let Ok(length) = self.0.read(&mut frame) {
            segments += usize::from(is_segment_of_pod(&frame[..length], port));
        }
        segments
    }
}

fn is_segment_of_pod(frame: &[u8], port: u16) -> bool {
    const TCP: u8 = 6;
    let v4 = |at: usize| IpAddr::from(Ipv4Addr::from(*frame[at..].first_chunk::<4>().unwrap()));
    let v6 = |at: usize| IpAddr::from(Ipv6Addr::from(*frame[at..].first_chunk::<16>().unwrap()));
    let (of_pod, tcp) = match frame.get(12..14) {
        Some([0x08, 0x00]) if frame.len() >= 34 && frame[23] == TCP => {
            ([v4(26), v4(30)].contains(&ip(POD_V4)), 14 + usize::from(frame[14] & 0x0f) * 4)
        }
        Some([0x86, 0xdd]) if frame.len() >= 54 && frame[20] == TCP => {
            ([v6(22), v6(38)].contains(&ip(POD_V6)), 54)
        }
        _ => return false,
    };
    let ports = frame.get(tcp..tcp + 4).unwrap();
    of_pod && [&ports[..2], &ports[2..]].contains(&port.to_be_bytes().as_slice())
}

#[test]
fn nothing_of_a_captured_pod_leaves_with_and_without_an_agent() {
    // The first port is for what may be seen, whose last segments come when they like.
    const PLAIN: u16 = 80;
    const CAPTURED: u16 = 81;
    let lab = Lab::new();
    let servers = lab.outside.inside(|| [PLAIN, CAPTURED].map(listener));
    for server in &servers {
        greet(server, |_, _| "plain".to_owned());
    }
    let mut sniffer = Sniffer::of(&lab.outside);
    let dial_all = |port: u16, expected: &dyn Fn(&std::io::Result<String>) -> bool| {
        for round in 0..25 {
            for target in [OUTSIDE_V4, OUTSIDE_V6] {
                let said = lab.pod.inside(|| dial(at(target, port)));
                assert!(expected(&said), "{target} in round {round}: {said:?}");
            }
        }
    };
    let plain = |said: &std::io::Result<String>| said.as_ref().is_ok_and(|said| said == "plain");
    dial_all(PLAIN, &plain);
    assert!(sniffer.segments(PLAIN) >= 50 * 3, "the sniffer is blind");

    let capture = lab.capture();
    let agent = lab.enroll(&capture, PodSettings::default());
    dial_all(CAPTURED, &|said| said.as_ref().is_ok_and(|said| said.starts_with("outbound ")));
    assert_eq!(sniffer.segments(CAPTURED), 0, "seen beside an agent");
    drop(agent);
    dial_all(CAPTURED, &refused);
    assert_eq!(sniffer.segments(CAPTURED), 0, "seen without an agent");
    capture.detach_all().unwrap();
    dial_all(CAPTURED, &plain);
    assert!(sniffer.segments(CAPTURED) >= 50 * 3, "it was blind in between");
}
