//! The guard's view of a packet: an allow-list of what may leave a pod, read byte by byte.
//!
//! Everything that is not understood is refused. The link layer is what the kernel made of it: the
//! EtherType and whether there was a VLAN tag (`skb->protocol`, `vlan_present`; a tag is taken off
//! before the hook runs, a second tag then shows as EtherType).

use crate::{Address, Port, protocol};

/// Bytes of a packet, from the start of its network header.
pub trait Fetch {
    /// `N` bytes at `offset`; `None` past the end.
    fn fetch<const N: usize>(&self, offset: u32) -> Option<[u8; N]>;
}

/// A packet that the guard knows. One flat value without absent parts: the verifier lets no
/// uninitialised word be copied, which an enum with fields would have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Packet {
    /// What it carries.
    pub transport: Transport,
    /// Its source. Not set for ARP.
    pub source: Address,
    /// Its target. Not set for ARP.
    pub target: Address,
    /// Its source port, of TCP and UDP.
    pub source_port: Port,
    /// Its target port, of TCP and UDP.
    pub target_port: Port,
    /// Its flags, of TCP.
    pub flags: TcpFlags,
    /// It carries no payload, of TCP.
    pub empty: bool,
    /// Its type, of ICMP.
    pub icmp_type: u8,
    /// Its code, of ICMP.
    pub icmp_code: u8,
}

/// What a packet carries.
#[repr(u8)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    /// It is no IP packet, but ARP.
    Arp,
    /// An unfragmented TCP segment, directly behind the IP header.
    Tcp,
    /// UDP, first or only fragment.
    Udp,
    /// ICMP for IPv4, first or only fragment.
    Icmp,
    /// ICMP for IPv6, first or only fragment.
    IcmpV6,
    /// A later fragment of UDP or ICMP.
    Fragment,
}

impl Packet {
    /// ARP, and the value to parse into.
    pub const ARP: Self = Self {
        transport: Transport::Arp,
        source: Address::NONE,
        target: Address::NONE,
        source_port: Port::from_octets([0, 0]),
        target_port: Port::from_octets([0, 0]),
        flags: TcpFlags(0),
        empty: false,
        icmp_type: 0,
        icmp_code: 0,
    };

    /// Whether it is ICMP without which no IP network works: neighbour discovery (RFC 4861), MLD
    /// (RFC 2710, 3810) and path MTU discovery (RFC 1191, 8201).
    #[inline(always)]
    pub const fn is_essential_icmp(&self) -> bool {
        match self.transport {
            Transport::IcmpV6 => matches!(self.icmp_type, 2 | 130..=137 | 143),
            Transport::Icmp => self.icmp_type == 3 && self.icmp_code == 4,
            Transport::Arp | Transport::Tcp | Transport::Udp | Transport::Fragment => false,
        }
    }
}

/// Flags of a TCP segment (RFC 9293 §3.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TcpFlags(pub u8);

impl TcpFlags {
    /// No more data from sender.
    pub const FIN: u8 = 0x01;
    /// Synchronise sequence numbers.
    pub const SYN: u8 = 0x02;
    /// Reset the connection.
    pub const RST: u8 = 0x04;
    /// Acknowledgement field is significant.
    pub const ACK: u8 = 0x10;

    /// Whether a flag is set.
    #[inline(always)]
    pub const fn has(self, flag: u8) -> bool {
        self.0 & flag != 0
    }
}

/// Why a packet is not known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// It is tagged.
    Vlan,
    /// Neither ARP, IPv4 nor IPv6.
    EtherType,
    /// Truncated, or a header contradicts itself.
    Malformed,
    /// Neither TCP, UDP nor ICMP: IP-in-IP, GRE, ESP, SCTP …
    Protocol,
    /// TCP in fragments.
    Fragment,
    /// TCP behind extension headers, or a chain that is not allowed.
    Extension,
}

const ETHERTYPE_IPV4: u16 = 0x0800;
const ETHERTYPE_ARP: u16 = 0x0806;
const ETHERTYPE_IPV6: u16 = 0x86dd;

const TCP_HEADER_OCTETS: u16 = 20;
const IPV6_HEADER_OCTETS: u32 = 40;
const HOP_BY_HOP: u8 = 0;

/// Longest chain of headers behind IPv6's own that is followed, the transport's included. What hosts
/// send has one or two before it (hop-by-hop for MLD, fragment for large UDP).
const MAX_HEADERS: usize = 5;

/// Judges a packet, and fills `into`, which starts as [`Packet::ARP`]. `ethertype` in host byte
/// order.
#[inline(always)]
pub fn parse_packet(
    bytes: &impl Fetch,
    ethertype: u16,
    tagged: bool,
    into: &mut Packet,
) -> Result<(), Refusal> {
    if tagged {
        return Err(Refusal::Vlan);
    }
    match ethertype {
        ETHERTYPE_ARP => Ok(()),
        ETHERTYPE_IPV4 => parse_ipv4(bytes, into),
        ETHERTYPE_IPV6 => parse_ipv6(bytes, into),
        _ => Err(Refusal::EtherType),
    }
}

#[inline(always)]
fn parse_ipv4(bytes: &impl Fetch, into: &mut Packet) -> Result<(), Refusal> {
    let Some(header) = bytes.fetch::<20>(0) else { return Err(Refusal::Malformed) };
    let header_octets = u16::from(header[0] & 0x0f) * 4;
    if header[0] >> 4 != 4 || header_octets < 20 {
        return Err(Refusal::Malformed);
    }
    into.source = Address::v4([header[12], header[13], header[14], header[15]]);
    into.target = Address::v4([header[16], header[17], header[18], header[19]]);
    let total_octets = u16::from_be_bytes([header[2], header[3]]);
    let fragment = u16::from_be_bytes([header[6], header[7]]);
    let (more, offset) = (fragment & 0x2000 != 0, fragment & 0x1fff);
    let at = u32::from(header_octets);
    match header[9] {
        protocol::TCP if more || offset != 0 => Err(Refusal::Fragment),
        // A total length of 0 is a GSO packet above 64 KiB (BIG TCP): full of payload.
        protocol::TCP if total_octets == 0 => parse_tcp(bytes, at, u16::MAX, into),
        protocol::TCP if total_octets < header_octets => Err(Refusal::Malformed),
        protocol::TCP => parse_tcp(bytes, at, total_octets - header_octets, into),
        protocol::UDP | protocol::ICMP if offset != 0 => {
            into.transport = Transport::Fragment;
            Ok(())
        }
        protocol::UDP => parse_udp(bytes, at, into),
        protocol::ICMP => parse_icmp(bytes, at, Transport::Icmp, into),
        _ => Err(Refusal::Protocol),
    }
}

#[inline(always)]
fn parse_ipv6(bytes: &impl Fetch, into: &mut Packet) -> Result<(), Refusal> {
    let Some(header) = bytes.fetch::<8>(0) else { return Err(Refusal::Malformed) };
    let Some(source) = bytes.fetch(8) else { return Err(Refusal::Malformed) };
    let Some(target) = bytes.fetch(24) else { return Err(Refusal::Malformed) };
    if header[0] >> 4 != 6 {
        return Err(Refusal::Malformed);
    }
    into.source = Address::v6(source);
    into.target = Address::v6(target);
    let payload_octets = u16::from_be_bytes([header[4], header[5]]);
    match header[6] {
        // As in IPv4, 0 is a packet above 64 KiB, with or without its jumbo option.
        protocol::TCP if payload_octets == 0 => {
            parse_tcp(bytes, IPV6_HEADER_OCTETS, u16::MAX, into)
        }
        protocol::TCP => parse_tcp(bytes, IPV6_HEADER_OCTETS, payload_octets, into),
        HOP_BY_HOP if payload_octets == 0 => parse_jumbo(bytes, into),
        next => parse_extensions(bytes, next, into),
    }
}

/// TCP of a GSO packet above 64 KiB, to which the kernel adds a hop-by-hop header with nothing but
/// the jumbo payload option (RFC 2675 §2) for its way through the host.
#[inline(always)]
fn parse_jumbo(bytes: &impl Fetch, into: &mut Packet) -> Result<(), Refusal> {
    let Some(header) = bytes.fetch::<4>(IPV6_HEADER_OCTETS) else {
        return Err(Refusal::Malformed);
    };
    if header != [protocol::TCP, 0, 0xc2, 4] {
        return Err(Refusal::Extension);
    }
    parse_tcp(bytes, IPV6_HEADER_OCTETS + 8, u16::MAX, into)
}

/// Follows a chain of extension headers (RFC 8200 §4) to UDP or ICMPv6; TCP behind any is refused.
#[inline(always)]
fn parse_extensions(bytes: &impl Fetch, mut next: u8, into: &mut Packet) -> Result<(), Refusal> {
    const FRAGMENT: u8 = 44;
    const DESTINATION_OPTIONS: u8 = 60;
    const ROUTING: u8 = 43;
    const AUTHENTICATION: u8 = 51;

    let mut at = IPV6_HEADER_OCTETS;
    for _ in 0..MAX_HEADERS {
        match next {
            protocol::UDP => return parse_udp(bytes, at, into),
            protocol::ICMPV6 => return parse_icmp(bytes, at, Transport::IcmpV6, into),
            HOP_BY_HOP | DESTINATION_OPTIONS => {
                let Some([following, length]) = bytes.fetch(at) else {
                    return Err(Refusal::Malformed);
                };
                next = following;
                at += (u32::from(length) + 1) * 8;
            }
            FRAGMENT => {
                let Some([following, _, high, low]) = bytes.fetch(at) else {
                    return Err(Refusal::Malformed);
                };
                // What a later fragment says follows is ignored by the receiver: only the first
                // one's word counts (RFC 8200 §4.5), and that one is read here like a whole packet.
                if u16::from_be_bytes([high, low]) & 0xfff8 != 0 {
                    if following != protocol::UDP && following != protocol::ICMPV6 {
                        return Err(Refusal::Fragment);
                    }
                    into.transport = Transport::Fragment;
                    return Ok(());
                }
                next = following;
                at += 8;
            }
            protocol::TCP | ROUTING | AUTHENTICATION => return Err(Refusal::Extension),
            _ => return Err(Refusal::Protocol),
        }
    }
    Err(Refusal::Extension)
}

/// `octets` is what the IP header says follows it.
#[inline(always)]
fn parse_tcp(bytes: &impl Fetch, at: u32, octets: u16, into: &mut Packet) -> Result<(), Refusal> {
    let Some(header) = bytes.fetch::<14>(at) else { return Err(Refusal::Malformed) };
    let header_octets = u16::from(header[12] >> 4) * 4;
    if header_octets < TCP_HEADER_OCTETS || octets < header_octets {
        return Err(Refusal::Malformed);
    }
    into.transport = Transport::Tcp;
    into.source_port = Port::from_octets([header[0], header[1]]);
    into.target_port = Port::from_octets([header[2], header[3]]);
    into.flags = TcpFlags(header[13]);
    into.empty = octets == header_octets;
    Ok(())
}

#[inline(always)]
fn parse_udp(bytes: &impl Fetch, at: u32, into: &mut Packet) -> Result<(), Refusal> {
    let Some([a, b, c, d]) = bytes.fetch(at) else { return Err(Refusal::Malformed) };
    into.transport = Transport::Udp;
    into.source_port = Port::from_octets([a, b]);
    into.target_port = Port::from_octets([c, d]);
    Ok(())
}

#[inline(always)]
fn parse_icmp(
    bytes: &impl Fetch,
    at: u32,
    transport: Transport,
    into: &mut Packet,
) -> Result<(), Refusal> {
    let Some([kind, code]) = bytes.fetch(at) else { return Err(Refusal::Malformed) };
    into.transport = transport;
    into.icmp_type = kind;
    into.icmp_code = code;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    struct Slice<'a>(&'a [u8]);

    impl Fetch for Slice<'_> {
        fn fetch<const N: usize>(&self, offset: u32) -> Option<[u8; N]> {
            self.0.get(offset as usize..)?.first_chunk().copied()
        }
    }

    fn parse(ethertype: u16, packet: &[u8]) -> Result<Packet, Refusal> {
        let mut into = Packet::ARP;
        parse_packet(&Slice(packet), ethertype, false, &mut into).map(|()| into)
    }

    fn ipv4(ihl: u8, fragment: u16, protocol: u8, payload: &[u8]) -> Vec<u8> {
        let header_octets = usize::from(ihl) * 4;
        let mut packet = vec![0; header_octets.max(20)];
        packet[0] = 0x40 | ihl;
        let total = u16::try_from(header_octets + payload.len()).unwrap();
        packet[2..4].copy_from_slice(&total.to_be_bytes());
        packet[6..8].copy_from_slice(&fragment.to_be_bytes());
        packet[9] = protocol;
        packet[12..16].copy_from_slice(&[10, 0, 0, 1]);
        packet[16..20].copy_from_slice(&[10, 0, 0, 2]);
        packet.extend(payload);
        packet
    }

    fn ipv6(next: u8, payload: &[u8]) -> Vec<u8> {
        let mut packet = vec![0; 40];
        packet[0] = 0x60;
        packet[4..6].copy_from_slice(&u16::try_from(payload.len()).unwrap().to_be_bytes());
        packet[6] = next;
        packet.extend(payload);
        packet
    }

    fn tcp(flags: u8, payload: usize) -> Vec<u8> {
        let mut segment = vec![0x9c, 0x40, 0, 80, 0, 0, 0, 0, 0, 0, 0, 0, 0x50, flags];
        segment.resize(20 + payload, 0);
        segment
    }

    #[test]
    fn ipv4_is_judged_by_an_allow_list() {
        let check = |packet: &[u8], expected: Result<Transport, Refusal>| {
            assert_eq!(parse(0x0800, packet).map(|packet| packet.transport), expected);
        };
        check(&ipv4(5, 0, 6, &tcp(2, 0)), Ok(Transport::Tcp));
        check(&ipv4(15, 0, 6, &tcp(2, 0)), Ok(Transport::Tcp));
        check(&ipv4(5, 0x4000, 6, &tcp(2, 0)), Ok(Transport::Tcp));
        check(&ipv4(5, 0x2000, 6, &tcp(2, 0)), Err(Refusal::Fragment));
        check(&ipv4(5, 1, 6, &tcp(2, 0)), Err(Refusal::Fragment));
        check(&ipv4(4, 0, 6, &tcp(2, 0)), Err(Refusal::Malformed));
        check(&ipv4(5, 0, 6, &tcp(2, 0)[..13]), Err(Refusal::Malformed));
        check(&ipv4(5, 0, 17, &[0; 8]), Ok(Transport::Udp));
        check(&ipv4(5, 0x2000, 17, &[0; 8]), Ok(Transport::Udp));
        check(&ipv4(5, 7, 17, &[0; 8]), Ok(Transport::Fragment));
        check(&ipv4(5, 0, 1, &[8, 0]), Ok(Transport::Icmp));
        for other in [0, 2, 4, 41, 47, 50, 51, 58, 132, 255] {
            check(&ipv4(5, 0, other, &tcp(2, 0)), Err(Refusal::Protocol));
        }
        check(&ipv6(6, &tcp(2, 0)), Err(Refusal::Malformed));
        check(&[], Err(Refusal::Malformed));
    }

    #[test]
    fn ipv6_lets_no_tcp_behind_an_extension_header() {
        let check = |packet: &[u8], expected: Result<Transport, Refusal>| {
            assert_eq!(parse(0x86dd, packet).map(|packet| packet.transport), expected);
        };
        let with = |headers: &[u8], last: &[u8]| [headers, last].concat();
        check(&ipv6(6, &tcp(2, 0)), Ok(Transport::Tcp));
        check(&ipv6(17, &[0; 8]), Ok(Transport::Udp));
        check(&ipv6(58, &[135, 0]), Ok(Transport::IcmpV6));
        // MLD has a router alert in a hop-by-hop header.
        check(&ipv6(0, &with(&[58, 0, 5, 2, 0, 0, 1, 0], &[143, 0])), Ok(Transport::IcmpV6));
        for next in [0, 43, 44, 60] {
            let packet = ipv6(next, &with(&[6, 0, 0, 0, 0, 0, 0, 0], &tcp(2, 0)));
            check(&packet, Err(Refusal::Extension));
        }
        check(&ipv6(44, &with(&[17, 0, 0, 1, 0, 0, 0, 9], &[0; 8])), Ok(Transport::Udp));
        check(&ipv6(44, &with(&[17, 0, 0, 8, 0, 0, 0, 9], &[0; 8])), Ok(Transport::Fragment));
        check(&ipv6(44, &with(&[6, 0, 0, 8, 0, 0, 0, 9], &tcp(2, 0))), Err(Refusal::Fragment));
        let chain = [60, 0, 0, 0, 0, 0, 0, 0].repeat(5);
        check(&ipv6(0, &chain), Err(Refusal::Extension));
        for other in [4, 41, 47, 50, 59, 132] {
            check(&ipv6(other, &tcp(2, 0)), Err(Refusal::Protocol));
        }
        check(&ipv6(51, &tcp(2, 0)), Err(Refusal::Extension));
        let mut jumbo = ipv6(0, &with(&[6, 0, 0xc2, 4, 0, 1, 0, 0], &tcp(0x10, 100)));
        jumbo[4..6].fill(0);
        check(&jumbo, Ok(Transport::Tcp));
        assert!(!parse(0x86dd, &jumbo).unwrap().empty);
    }

    #[test]
    fn link_layers_other_than_plain_ethernet_are_refused() {
        for ethertype in [0x8100, 0x88a8, 0x8847, 0x8864, 4, 0x0801] {
            assert_eq!(parse(ethertype, &ipv4(5, 0, 17, &[0; 8])), Err(Refusal::EtherType));
        }
        let mut into = Packet::ARP;
        let tagged = parse_packet(&Slice(&[]), 0x0806, true, &mut into);
        assert_eq!(tagged, Err(Refusal::Vlan));
        assert_eq!(parse(0x0806, &[]), Ok(Packet::ARP));
    }

    proptest! {
        #[test]
        fn any_bytes_are_judged_without_panic(
            ethertype in prop_oneof![Just(0x0800_u16), Just(0x86dd), any::<u16>()],
            first in prop_oneof![0x40_u8..0x50, Just(0x60), any::<u8>()],
            mut packet in prop::collection::vec(any::<u8>(), 0..128),
        ) {
            if let Some(octet) = packet.first_mut() {
                *octet = first;
            }
            // What is accepted as TCP has its ports where a receiver would read them.
            if let Ok(found) = parse(ethertype, &packet)
                && found.transport == Transport::Tcp
            {
                let at = match ethertype {
                    0x0800 => usize::from(packet[0] & 0x0f) * 4,
                    _ if packet[6] == 6 => 40,
                    _ => 48,
                };
                let port = u16::from_be_bytes([packet[at], packet[at + 1]]);
                prop_assert_eq!(found.source_port.get(), port);
            }
        }

        #[test]
        fn a_segment_is_empty_exactly_when_it_has_no_payload(payload in 0_usize..64) {
            let v4 = parse(0x0800, &ipv4(5, 0, 6, &tcp(0x10, payload))).unwrap();
            let v6 = parse(0x86dd, &ipv6(6, &tcp(0x10, payload))).unwrap();
            prop_assert_eq!((v4.empty, v6.empty), (payload == 0, payload == 0));
            prop_assert_eq!(v4.source.ip().to_string(), "10.0.0.1");
            prop_assert_eq!(v4.target_port.get(), 80);
        }
    }
}
