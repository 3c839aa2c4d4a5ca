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

/// Longest chain of IPv6 extension headers that is followed. What hosts send has one or two
/// (hop-by-hop for MLD, fragment for large UDP).
const MAX_EXTENSIONS: usize = 4;

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
fn parse_extensions(
    bytes: &impl Fetch,
    mut next: u8,
    into: &mut Packet,
) -> Result<(), Refusal> {
    const FRAGMENT: u8 = 44;
    const DESTINATION_OPTIONS: u8 = 60;
    const ROUTING: u8 = 43;
    const AUTHENTICATION: u8 = 51;

    let mut at = IPV6_HEADER_OCTETS;
    for _ in 0..MAX_EXTENSIONS {
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
fn parse_tcp(
    bytes: &impl Fetch,
    at: u32,
    octets: u16,
    into: &mut Packet,
) -> Result<(), Refusal> {
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
