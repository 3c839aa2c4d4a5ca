//! The guard's packet parser against a slow, obvious reading of the same bytes.
#![expect(clippy::unwrap_used, reason = "a generator's own lengths are small")]

use std::cell::RefCell;
use std::collections::BTreeMap;

use mesh_ebpf_abi::{Address, Fetch, Packet, Port, TcpFlags, Transport, parse_packet};
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};

const IPV4: u16 = 0x0800;
const ARP: u16 = 0x0806;
const IPV6: u16 = 0x86dd;

struct Slice<'a>(&'a [u8]);

impl Fetch for Slice<'_> {
    fn fetch<const N: usize>(&self, offset: u32) -> Option<[u8; N]> {
        self.0.get(offset as usize..)?.first_chunk().copied()
    }
}

/// What may leave, if it may: everything that this function does not name may not.
fn allowed(ethertype: u16, tagged: bool, bytes: &[u8]) -> Option<Packet> {
    match ethertype {
        _ if tagged => None,
        ARP => Some(Packet::ARP),
        IPV4 => allowed_v4(bytes),
        IPV6 => allowed_v6(bytes),
        _ => None,
    }
}

fn be16(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes([*bytes.get(at)?, *bytes.get(at + 1)?]))
}

fn allowed_v4(bytes: &[u8]) -> Option<Packet> {
    let header = bytes.first_chunk::<20>()?;
    let version = header[0] / 16;
    let header_octets = usize::from(header[0] % 16) * 4;
    if version != 4 || header_octets < 20 {
        return None;
    }
    let total = be16(header, 2)?;
    let more_fragments = header[6] & 0x20 != 0;
    let fragment_offset = be16(header, 6)? % 0x2000;
    let between = Packet {
        source: Address::v4([header[12], header[13], header[14], header[15]]),
        target: Address::v4([header[16], header[17], header[18], header[19]]),
        ..Packet::ARP
    };
    let payload = || bytes.get(header_octets..);
    match header[9] {
        6 if more_fragments || fragment_offset > 0 => None,
        6 => {
            let payload_octets = match usize::from(total) {
                0 => usize::from(u16::MAX),
                total => total.checked_sub(header_octets)?,
            };
            tcp(between, payload()?, payload_octets)
        }
        17 | 1 if fragment_offset > 0 => Some(Packet { transport: Transport::Fragment, ..between }),
        17 => udp(between, payload()?),
        1 => icmp(between, Transport::Icmp, payload()?),
        _ => None,
    }
}

fn allowed_v6(bytes: &[u8]) -> Option<Packet> {
    let header = bytes.first_chunk::<40>()?;
    if header[0] / 16 != 6 {
        return None;
    }
    let between = Packet {
        source: Address::v6(*header[8..].first_chunk()?),
        target: Address::v6(*header[24..].first_chunk()?),
        ..Packet::ARP
    };
    let payload = &bytes[40..];
    match (header[6], be16(header, 4)?) {
        (6, 0) => tcp(between, payload, usize::from(u16::MAX)),
        (6, octets) => tcp(between, payload, usize::from(octets)),
        // A jumbogram of the kernel's own making: the jumbo option alone, then TCP.
        (0, 0) => {
            payload.starts_with(&[6, 0, 0xc2, 4]).then_some(())?;
            tcp(between, payload.get(8..)?, usize::from(u16::MAX))
        }
        (next, _) => behind_extensions(between, next, payload, 5),
    }
}

/// `budget` is how many headers may still be looked at, the transport's included.
fn behind_extensions(between: Packet, next: u8, bytes: &[u8], budget: u8) -> Option<Packet> {
    match next {
        _ if budget == 0 => None,
        17 => udp(between, bytes),
        58 => icmp(between, Transport::IcmpV6, bytes),
        0 | 60 => {
            let following = *bytes.first()?;
            let octets = (usize::from(*bytes.get(1)?) + 1) * 8;
            behind_extensions(between, following, bytes.get(octets..)?, budget - 1)
        }
        44 => {
            let following = *bytes.first()?;
            if be16(bytes, 2)? / 8 == 0 {
                behind_extensions(between, following, bytes.get(8..)?, budget - 1)
            } else if following == 17 || following == 58 {
                Some(Packet { transport: Transport::Fragment, ..between })
            } else {
                None
            }
        }
        _ => None,
    }
}

fn tcp(between: Packet, bytes: &[u8], octets: usize) -> Option<Packet> {
    let flags = *bytes.get(13)?;
    let header_octets = usize::from(bytes[12] / 16) * 4;
    (header_octets >= 20 && octets >= header_octets).then_some(Packet {
        transport: Transport::Tcp,
        source_port: Port::new(be16(bytes, 0)?),
        target_port: Port::new(be16(bytes, 2)?),
        flags: TcpFlags(flags),
        empty: octets == header_octets,
        ..between
    })
}

fn udp(between: Packet, bytes: &[u8]) -> Option<Packet> {
    Some(Packet {
        transport: Transport::Udp,
        source_port: Port::new(be16(bytes, 0)?),
        target_port: Port::new(be16(bytes, 2)?),
        ..between
    })
}

fn icmp(between: Packet, transport: Transport, bytes: &[u8]) -> Option<Packet> {
    let [icmp_type, icmp_code] = *bytes.first_chunk()?;
    Some(Packet { transport, icmp_type, icmp_code, ..between })
}

fn protocol() -> impl Strategy<Value = u8> {
    prop_oneof![
        4 => Just(6_u8), 2 => Just(17), 2 => Just(1), 2 => Just(58),
        2 => prop::sample::select(vec![0_u8, 4, 41, 43, 44, 47, 50, 51, 60, 132]),
        1 => any::<u8>(),
    ]
}

fn octets(range: std::ops::Range<usize>) -> impl Strategy<Value = Vec<u8>> {
    prop::collection::vec(any::<u8>(), range)
}

/// A payload that is often TCP of a plausible shape.
fn payload() -> impl Strategy<Value = Vec<u8>> {
    (
        octets(0..48),
        prop_oneof![3 => Just(Some(5_u8)), 1 => Just(None), 1 => (0..16_u8).prop_map(Some)],
    )
        .prop_map(|(mut bytes, data_offset)| {
            if let (Some(offset), Some(octet)) = (data_offset, bytes.get_mut(12)) {
                *octet = offset << 4;
            }
            bytes
        })
}

/// A length field: mostly the truth, sometimes 0, the bare headers or anything.
fn length() -> impl Strategy<Value = Option<u16>> {
    prop_oneof![6 => Just(None), 1 => Just(Some(0)), 1 => (0..96_u16).prop_map(Some), 1 => any::<u16>().prop_map(Some)]
}

fn ipv4() -> impl Strategy<Value = Vec<u8>> {
    let fragment =
        prop_oneof![4 => Just(0_u16), 2 => Just(0x4000), 1 => Just(0x2000), 2 => any::<u16>()];
    let ihl = prop_oneof![6 => Just(5_u8), 3 => 5..16_u8, 1 => 0..5_u8];
    (octets(60..61), ihl, length(), fragment, protocol(), payload()).prop_map(
        |(mut packet, ihl, length, fragment, protocol, payload)| {
            packet.truncate(usize::from(ihl) * 4);
            packet.resize(packet.len().max(20), 0);
            packet[0] = 0x40 | ihl;
            let truth = u16::try_from(usize::from(ihl) * 4 + payload.len()).unwrap();
            packet[2..4].copy_from_slice(&length.unwrap_or(truth).to_be_bytes());
            packet[6..8].copy_from_slice(&fragment.to_be_bytes());
            packet[9] = protocol;
            packet.extend(payload);
            packet
        },
    )
}

/// Extension headers by number, each with a body.
fn extensions() -> impl Strategy<Value = Vec<(u8, Vec<u8>)>> {
    let header = prop_oneof![
        4 => (Just(60_u8), (0..3_u8, octets(22..23)).prop_map(|(length, mut body)| {
            body.truncate(usize::from(length) * 8 + 6);
            body.insert(0, length);
            body
        })),
        2 => (Just(0_u8), Just(vec![0, 5, 2, 0, 0, 1, 0])),
        1 => (Just(0_u8), Just(vec![0, 0xc2, 4, 0, 1, 0, 0])),
        2 => (Just(44_u8), Just(vec![0, 0, 1, 0, 0, 0, 9])),
        1 => (Just(44_u8), octets(7..8)),
        1 => (Just(43_u8), Just(vec![0, 4, 0, 0, 0, 0, 0])),
    ];
    prop_oneof![2 => Just(Vec::new()), 3 => prop::collection::vec(header, 1..7)]
}

fn ipv6() -> impl Strategy<Value = Vec<u8>> {
    (octets(40..41), length(), extensions(), protocol(), payload()).prop_map(
        |(mut packet, length, extensions, last, payload)| {
            let mut following: Vec<u8> = extensions.iter().map(|(number, _)| *number).collect();
            following.push(last);
            packet[0] = 0x60 | packet[0] >> 4;
            packet[6] = following[0];
            for ((_, body), next) in extensions.iter().zip(&following[1..]) {
                packet.push(*next);
                packet.extend(body);
            }
            packet.extend(payload);
            let truth = u16::try_from(packet.len() - 40).unwrap();
            packet[4..6].copy_from_slice(&length.unwrap_or(truth).to_be_bytes());
            packet
        },
    )
}

/// A frame: EtherType, whether it was tagged, and the bytes from the network header on.
fn frame() -> impl Strategy<Value = (u16, bool, Vec<u8>)> {
    let plausible = prop_oneof![
        4 => (Just(IPV4), ipv4()),
        6 => (Just(IPV6), ipv6()),
        1 => (prop::sample::select(vec![IPV4, IPV6, ARP]), octets(0..80)),
        1 => (any::<u16>(), prop_oneof![ipv4(), ipv6(), octets(0..80)]),
    ];
    let cut = prop_oneof![4 => Just(usize::MAX), 1 => 0..100_usize];
    let flips = prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..3);
    let tagged = prop_oneof![19 => Just(false), 1 => Just(true)];
    (plausible, cut, flips, tagged).prop_map(|((ethertype, mut bytes), cut, flips, tagged)| {
        bytes.truncate(cut);
        for (index, value) in flips {
            if !bytes.is_empty() {
                let at = index.index(bytes.len());
                bytes[at] = value;
            }
        }
        (ethertype, tagged, bytes)
    })
}

#[test]
fn the_parser_allows_what_the_oracle_allows_and_reads_the_same_from_it() {
    const CASES: u32 = 30_000;
    let seen = RefCell::new(BTreeMap::<String, u32>::new());
    let config = Config { cases: CASES, failure_persistence: None, ..Config::default() };
    let outcome = TestRunner::new(config).run(&frame(), |(ethertype, tagged, bytes)| {
        let mut found = Packet::ARP;
        let judged = parse_packet(&Slice(&bytes), ethertype, tagged, &mut found);
        prop_assert_eq!(judged.ok().map(|()| found), allowed(ethertype, tagged, &bytes));
        let kind = match judged {
            Ok(()) => format!("{:?}", found.transport),
            Err(reason) => format!("refused: {reason:?}"),
        };
        *seen.borrow_mut().entry(kind).or_default() += 1;
        Ok(())
    });
    outcome.unwrap();
    // The generator reaches every verdict often, so the agreement means something.
    let seen = seen.into_inner();
    let verdicts = [
        "Arp",
        "Tcp",
        "Udp",
        "Icmp",
        "IcmpV6",
        "Fragment",
        "refused: Vlan",
        "refused: EtherType",
        "refused: Malformed",
        "refused: Protocol",
        "refused: Fragment",
        "refused: Extension",
    ];
    for verdict in verdicts {
        assert!(
            seen.get(verdict).is_some_and(|times| *times >= CASES / 300),
            "{verdict}: {seen:?}"
        );
    }
}
