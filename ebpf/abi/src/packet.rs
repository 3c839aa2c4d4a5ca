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

/// A packet that the guard knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Packet {
    /// ARP.
    Arp,
    /// IPv4 or IPv6.
    Ip {
        /// Its source.
        source: Address,
        /// Its target.
        target: Address,
        /// What it carries.
        transport: Transport,
    },
}

/// What an IP packet carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    /// An unfragmented TCP segment, directly behind the IP header.
    Tcp(TcpSegment),
    /// UDP, first or only fragment.
    Udp {
        /// Its source port.
        source_port: Port,
        /// Its target port.
        target_port: Port,
    },
    /// ICMP or ICMPv6, first or only fragment.
    Icmp(IcmpMessage),
    /// A later fragment of UDP or ICMP.
    Fragment,
}

/// The head of a TCP segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TcpSegment {
    /// Its source port.
    pub source_port: Port,
    /// Its target port.
    pub target_port: Port,
    /// Its flags.
    pub flags: TcpFlags,
    /// It carries no payload.
    pub empty: bool,
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

/// Type of an ICMP or ICMPv6 message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IcmpMessage {
    /// ICMPv6.
    pub v6: bool,
    /// Its type.
    pub kind: u8,
    /// Its code.
    pub code: u8,
}

impl IcmpMessage {
    /// Without these, no IP network works: neighbour discovery (RFC 4861), MLD (RFC 2710, 3810) and
    /// path MTU discovery (RFC 1191, 8201).
    #[inline(always)]
    pub const fn is_essential(&self) -> bool {
        if self.v6 {
            matches!(self.kind, 2 | 130..=137 | 143)
        } else {
            self.kind == 3 && self.code == 4
        }
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

/// Judges a packet. `ethertype` in host byte order.
#[inline(always)]
pub fn parse_packet(
    packet: &impl Fetch,
    ethertype: u16,
    tagged: bool,
) -> Result<Packet, Refusal> {
    if tagged {
        return Err(Refusal::Vlan);
    }
    match ethertype {
        ETHERTYPE_ARP => Ok(Packet::Arp),
        ETHERTYPE_IPV4 => parse_ipv4(packet),
        ETHERTYPE_IPV6 => parse_ipv6(packet),
        _ => Err(Refusal::EtherType),
    }
}

#[inline(always)]
fn parse_ipv4(packet: &impl Fetch) -> Result<Packet, Refusal> {
    let header: [u8; 20] = packet.fetch(0).ok_or(Refusal::Malformed)?;
    let header_octets = u16::from(header[0] & 0x0f) * 4;
    if header[0] >> 4 != 4 || header_octets < 20 {
        return Err(Refusal::Malformed);
    }
    let total_octets = u16::from_be_bytes([header[2], header[3]]);
    let fragment = u16::from_be_bytes([header[6], header[7]]);
    let (more, offset) = (fragment & 0x2000 != 0, fragment & 0x1fff);
    let at = u32::from(header_octets);
    let transport = match header[9] {
        protocol::TCP if more || offset != 0 => return Err(Refusal::Fragment),
        // A total length of 0 is a GSO packet above 64 KiB (BIG TCP): full of payload.
        protocol::TCP => {
            parse_tcp(packet, at, total_octets.checked_sub(header_octets).unwrap_or(u16::MAX))?
        }
        protocol::UDP | protocol::ICMP if offset != 0 => Transport::Fragment,
        protocol::UDP => parse_udp(packet, at)?,
        protocol::ICMP => parse_icmp(packet, at, false)?,
        _ => return Err(Refusal::Protocol),
    };
    let source = Address::v4([header[12], header[13], header[14], header[15]]);
    let target = Address::v4([header[16], header[17], header[18], header[19]]);
    Ok(Packet::Ip { source, target, transport })
}

#[inline(always)]
fn parse_ipv6(packet: &impl Fetch) -> Result<Packet, Refusal> {
    let header: [u8; 8] = packet.fetch(0).ok_or(Refusal::Malformed)?;
    let source = Address::v6(packet.fetch(8).ok_or(Refusal::Malformed)?);
    let target = Address::v6(packet.fetch(24).ok_or(Refusal::Malformed)?);
    if header[0] >> 4 != 6 {
        return Err(Refusal::Malformed);
    }
    let payload_octets = u16::from_be_bytes([header[4], header[5]]);
    let transport = match header[6] {
        // As in IPv4, 0 is a packet above 64 KiB, with or without its jumbo option.
        protocol::TCP if payload_octets == 0 => parse_tcp(packet, IPV6_HEADER_OCTETS, u16::MAX)?,
        protocol::TCP => parse_tcp(packet, IPV6_HEADER_OCTETS, payload_octets)?,
        HOP_BY_HOP if payload_octets == 0 => parse_jumbo(packet)?,
        next => parse_extensions(packet, next)?,
    };
    Ok(Packet::Ip { source, target, transport })
}

/// TCP of a GSO packet above 64 KiB, to which the kernel adds a hop-by-hop header with nothing but
/// the jumbo payload option (RFC 2675 §2) for its way through the host.
#[inline(always)]
fn parse_jumbo(packet: &impl Fetch) -> Result<Transport, Refusal> {
    match packet.fetch(IPV6_HEADER_OCTETS).ok_or(Refusal::Malformed)? {
        [protocol::TCP, 0, 0xc2, 4] => parse_tcp(packet, IPV6_HEADER_OCTETS + 8, u16::MAX),
        _ => Err(Refusal::Extension),
    }
}

/// Follows a chain of extension headers (RFC 8200 §4) to UDP or ICMPv6; TCP behind any is refused.
#[inline(always)]
fn parse_extensions(packet: &impl Fetch, mut next: u8) -> Result<Transport, Refusal> {
    const FRAGMENT: u8 = 44;
    const DESTINATION_OPTIONS: u8 = 60;
    const ROUTING: u8 = 43;
    const AUTHENTICATION: u8 = 51;

    let mut at = IPV6_HEADER_OCTETS;
    for _ in 0..MAX_EXTENSIONS {
        match next {
            protocol::UDP => return parse_udp(packet, at),
            protocol::ICMPV6 => return parse_icmp(packet, at, true),
            HOP_BY_HOP | DESTINATION_OPTIONS => {
                let [following, length] = packet.fetch(at).ok_or(Refusal::Malformed)?;
                next = following;
                at += (u32::from(length) + 1) * 8;
            }
            FRAGMENT => {
                let [following, _, high, low] = packet.fetch(at).ok_or(Refusal::Malformed)?;
                // What a later fragment says follows is ignored by the receiver: only the first
                // one's word counts (RFC 8200 §4.5), and that one is read here like a whole packet.
                if u16::from_be_bytes([high, low]) & 0xfff8 != 0 {
                    return match following {
                        protocol::UDP | protocol::ICMPV6 => Ok(Transport::Fragment),
                        _ => Err(Refusal::Fragment),
                    };
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
fn parse_tcp(packet: &impl Fetch, at: u32, octets: u16) -> Result<Transport, Refusal> {
    let header: [u8; 14] = packet.fetch(at).ok_or(Refusal::Malformed)?;
    let header_octets = u16::from(header[12] >> 4) * 4;
    if header_octets < TCP_HEADER_OCTETS || octets < header_octets {
        return Err(Refusal::Malformed);
    }
    Ok(Transport::Tcp(TcpSegment {
        source_port: Port::from_octets([header[0], header[1]]),
        target_port: Port::from_octets([header[2], header[3]]),
        flags: TcpFlags(header[13]),
        empty: octets == header_octets,
    }))
}

#[inline(always)]
fn parse_udp(packet: &impl Fetch, at: u32) -> Result<Transport, Refusal> {
    let [a, b, c, d] = packet.fetch(at).ok_or(Refusal::Malformed)?;
    Ok(Transport::Udp {
        source_port: Port::from_octets([a, b]),
        target_port: Port::from_octets([c, d]),
    })
}

#[inline(always)]
fn parse_icmp(packet: &impl Fetch, at: u32, v6: bool) -> Result<Transport, Refusal> {
    let [kind, code] = packet.fetch(at).ok_or(Refusal::Malformed)?;
    Ok(Transport::Icmp(IcmpMessage { v6, kind, code }))
}
