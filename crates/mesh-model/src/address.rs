//! Addresses with their meaning: original destinations, clients, networks, prefixes.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::str::FromStr;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

/// Turns an IPv4-mapped IPv6 address into IPv4; every address of the mesh is compared in this form.
#[must_use]
pub fn canonical_ip(ip: IpAddr) -> IpAddr {
    ip.to_canonical()
}

/// Where an application meant to connect, before capture rewrote it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct OrigDst(SocketAddr);

impl OrigDst {
    /// Wraps `address`, canonicalised (see [`canonical_ip`]).
    #[must_use]
    pub fn new(address: SocketAddr) -> Self {
        Self(SocketAddr::new(canonical_ip(address.ip()), address.port()))
    }

    /// The address and port dialled.
    #[must_use]
    pub const fn addr(self) -> SocketAddr {
        self.0
    }

    /// The address dialled.
    #[must_use]
    pub const fn ip(self) -> IpAddr {
        self.0.ip()
    }

    /// The port dialled.
    #[must_use]
    pub const fn port(self) -> u16 {
        self.0.port()
    }
}

impl fmt::Display for OrigDst {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// The address a connection came from, as the destination's application would have seen it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct ClientAddr(SocketAddr);

impl ClientAddr {
    /// Wraps `address`, canonicalised (see [`canonical_ip`]).
    #[must_use]
    pub fn new(address: SocketAddr) -> Self {
        Self(SocketAddr::new(canonical_ip(address.ip()), address.port()))
    }

    /// The client's address and port.
    #[must_use]
    pub const fn addr(self) -> SocketAddr {
        self.0
    }

    /// The client's address.
    #[must_use]
    pub const fn ip(self) -> IpAddr {
        self.0.ip()
    }
}

impl fmt::Display for ClientAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A network in which pod addresses are routable and unique; the empty name is the default network.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct NetworkId(Arc<str>);

impl NetworkId {
    /// A network by name.
    #[must_use]
    pub fn new(name: &str) -> Self {
        Self(name.into())
    }

    /// The name; empty for the default network.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for NetworkId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// An address within a network.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct NetworkAddress {
    /// The network the address belongs to.
    pub network: NetworkId,
    /// The address, canonical.
    pub ip: IpAddr,
}

impl NetworkAddress {
    /// An address of `network`, canonicalised.
    #[must_use]
    pub fn new(network: NetworkId, ip: IpAddr) -> Self {
        Self { network, ip: canonical_ip(ip) }
    }
}

impl fmt::Display for NetworkAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.network, self.ip)
    }
}

/// An IP prefix with its host bits cleared; a bare address is its own full-length prefix.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct IpPrefix(ipnet::IpNet);

/// Bits in front of the IPv4 address in a mapped one. Source: RFC 4291 §2.5.5.2.
const MAPPED_BITS: u8 = 96;

/// Text or bytes that are no IP prefix.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not an IP address or CIDR: {text:?}")]
pub struct InvalidPrefix {
    /// What was given.
    pub text: String,
}

impl IpPrefix {
    /// The prefix of `length` bits around `ip`. A prefix of IPv4-mapped addresses is one of IPv4, its length less the 96 bits
    /// in front: no canonical address would ever lie in it otherwise.
    ///
    /// # Errors
    /// When `length` exceeds the address family's bits.
    pub fn new(ip: IpAddr, length: u8) -> Result<Self, InvalidPrefix> {
        let canonical = canonical_ip(ip);
        let (ip, bits) = match length.checked_sub(MAPPED_BITS) {
            Some(bits) if canonical != ip => (canonical, bits),
            Some(_) | None => (ip, length),
        };
        ipnet::IpNet::new(ip, bits)
            .map(|net| Self(net.trunc()))
            .map_err(|_source| InvalidPrefix { text: format!("{ip}/{length}") })
    }

    /// The prefix that holds `ip` alone.
    #[must_use]
    pub fn host(ip: IpAddr) -> Self {
        Self(ipnet::IpNet::from(canonical_ip(ip)))
    }

    /// The fewest prefixes that hold the same addresses, in order.
    #[must_use]
    pub fn aggregate(prefixes: impl IntoIterator<Item = Self>) -> Vec<Self> {
        let nets: Vec<ipnet::IpNet> = prefixes.into_iter().map(|prefix| prefix.0).collect();
        ipnet::IpNet::aggregate(&nets).into_iter().map(Self).collect()
    }

    /// True when `ip`, canonicalised, lies inside. Families never match each other.
    #[must_use]
    pub fn contains(&self, ip: IpAddr) -> bool {
        self.0.contains(&canonical_ip(ip))
    }

    /// Bits that are fixed, 0..=32 or 0..=128.
    #[must_use]
    pub fn length(&self) -> u8 {
        self.0.prefix_len()
    }

    /// The lowest address.
    #[must_use]
    pub fn network(&self) -> IpAddr {
        self.0.network()
    }
}

impl FromStr for IpPrefix {
    type Err = InvalidPrefix;

    fn from_str(text: &str) -> Result<Self, InvalidPrefix> {
        if let Ok(ip) = text.parse::<IpAddr>() {
            return Ok(Self::host(ip));
        }
        let invalid = || InvalidPrefix { text: text.chars().take(256).collect() };
        let net: ipnet::IpNet = text.parse().map_err(|_source| invalid())?;
        Self::new(net.addr(), net.prefix_len())
    }
}

impl From<IpPrefix> for String {
    fn from(prefix: IpPrefix) -> Self {
        prefix.to_string()
    }
}

impl TryFrom<String> for IpPrefix {
    type Error = InvalidPrefix;

    fn try_from(text: String) -> Result<Self, InvalidPrefix> {
        text.parse()
    }
}

impl fmt::Display for IpPrefix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_become_one_prefix() {
        let prefixes = ["10.1.1.0/24", "10.1.0.0/24", "fd00:1::/64", "10.1.1.7"];
        let joined = IpPrefix::aggregate(prefixes.map(|text| text.parse::<IpPrefix>().unwrap()));
        let texts: Vec<String> = joined.iter().map(ToString::to_string).collect();
        assert_eq!(texts, ["10.1.0.0/23", "fd00:1::/64"]);
    }

    #[test]
    fn mapped_addresses_compare_equal_to_ipv4() {
        let mapped: SocketAddr = "[::ffff:10.0.0.1]:80".parse().unwrap();
        let plain: SocketAddr = "10.0.0.1:80".parse().unwrap();
        assert_eq!(OrigDst::new(mapped), OrigDst::new(plain));
        assert_eq!(ClientAddr::new(mapped), ClientAddr::new(plain));
    }

    #[test]
    fn prefixes_parse_truncate_and_contain() {
        let prefix: IpPrefix = "10.1.2.3/8".parse().unwrap();
        assert_eq!(prefix.to_string(), "10.0.0.0/8");
        assert!(prefix.contains("10.255.0.1".parse().unwrap()));
        assert!(prefix.contains("::ffff:10.255.0.1".parse().unwrap()));
        assert!(!prefix.contains("11.0.0.1".parse().unwrap()));
        assert_eq!("::ffff:10.1.0.0/104".parse(), "10.0.0.0/8".parse::<IpPrefix>());
        assert_eq!(IpPrefix::new("::ffff:10.1.0.0".parse().unwrap(), 104), "10.0.0.0/8".parse());
        assert_eq!("::ffff:10.1.0.0/0".parse(), "::/0".parse::<IpPrefix>());
        assert!("10.0.0.0/33".parse::<IpPrefix>().is_err());
        assert!("ten".parse::<IpPrefix>().is_err());
        assert_eq!("fd00::1".parse::<IpPrefix>().unwrap().length(), 128);
    }
}
