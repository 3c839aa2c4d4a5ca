//! One 16-byte address form for both families, ports, and pairs of them.

use core::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

/// An IP address in network byte order; IPv4 as `::ffff:a.b.c.d` (RFC 4291 §2.5.5.2).
///
/// Held as the kernel's four words, each in network order in memory, so that the programs move and
/// compare whole words.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Address([u32; 4]);

const _: () = assert!(size_of::<Address>() == 16);

/// The third word of a mapped address.
const MAPPED: u32 = u32::from_ne_bytes([0, 0, 0xff, 0xff]);

impl Address {
    /// `::`, which no pod has: "no address of this family".
    pub const NONE: Self = Self([0; 4]);

    /// From an IPv4 address in network byte order.
    #[inline(always)]
    pub const fn v4(octets: [u8; 4]) -> Self {
        Self::from_word(u32::from_ne_bytes(octets))
    }

    /// From an IPv6 address in network byte order, IPv4-mapped ones included.
    #[inline(always)]
    pub const fn v6(octets: [u8; 16]) -> Self {
        let [a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p] = octets;
        Self([
            u32::from_ne_bytes([a, b, c, d]),
            u32::from_ne_bytes([e, f, g, h]),
            u32::from_ne_bytes([i, j, k, l]),
            u32::from_ne_bytes([m, n, o, p]),
        ])
    }

    /// From the kernel's 32-bit form of an IPv4 address (`user_ip4`, `local_ip4`): network order in
    /// memory.
    #[inline(always)]
    pub const fn from_word(word: u32) -> Self {
        Self([0, 0, MAPPED, word])
    }

    /// From the kernel's 4 × 32-bit form of an IPv6 address (`user_ip6`, `local_ip6`).
    #[inline(always)]
    pub const fn from_words(words: [u32; 4]) -> Self {
        Self(words)
    }

    /// The kernel's 4 × 32-bit form.
    #[inline(always)]
    pub const fn words(&self) -> [u32; 4] {
        self.0
    }

    /// The kernel's 32-bit form of an IPv4 address; of an IPv6 address its last four octets.
    #[inline(always)]
    pub const fn word(&self) -> u32 {
        self.0[3]
    }

    /// The octets, IPv4 in its mapped form.
    #[inline(always)]
    pub const fn octets(&self) -> [u8; 16] {
        let [[a, b, c, d], [e, f, g, h], [i, j, k, l], [m, n, o, p]] = [
            self.0[0].to_ne_bytes(),
            self.0[1].to_ne_bytes(),
            self.0[2].to_ne_bytes(),
            self.0[3].to_ne_bytes(),
        ];
        [a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p]
    }

    /// Equality that compiles to four word compares (there is no `memcmp` in an eBPF program).
    #[inline(always)]
    pub const fn same(&self, other: &Self) -> bool {
        let (a, b) = (self.words(), other.words());
        (a[0] ^ b[0]) | (a[1] ^ b[1]) | (a[2] ^ b[2]) | (a[3] ^ b[3]) == 0
    }

    /// Whether this is an IPv4 address.
    #[inline(always)]
    pub const fn is_v4(&self) -> bool {
        let words = self.words();
        words[0] | words[1] == 0 && words[2] == MAPPED
    }

    /// `::` or `0.0.0.0`; connecting there means connecting to oneself.
    #[inline(always)]
    pub const fn is_unspecified(&self) -> bool {
        let words = self.words();
        words[3] == 0 && (words[0] | words[1] | words[2] == 0 || self.is_v4())
    }

    /// `127.0.0.0/8` (mapped too) or `::1`.
    #[inline(always)]
    pub const fn is_loopback(&self) -> bool {
        let words = self.words();
        (self.is_v4() && words[3].to_ne_bytes()[0] == 127)
            || (words[0] | words[1] | words[2] == 0 && words[3] == u32::from_ne_bytes([0, 0, 0, 1]))
    }

    /// IPv6 link-local unicast, `fe80::/10`.
    #[inline(always)]
    pub const fn is_link_local_v6(&self) -> bool {
        let [first, second, ..] = self.0[0].to_ne_bytes();
        first == 0xfe && second & 0xc0 == 0x80
    }

    /// The address for people and sockets; mapped ones as IPv4.
    pub const fn ip(&self) -> IpAddr {
        Ipv6Addr::from_octets(self.octets()).to_canonical()
    }
}

impl From<IpAddr> for Address {
    fn from(ip: IpAddr) -> Self {
        match ip {
            IpAddr::V4(ip) => Self::from(ip),
            IpAddr::V6(ip) => Self::v6(ip.octets()),
        }
    }
}

impl From<Ipv4Addr> for Address {
    fn from(ip: Ipv4Addr) -> Self {
        Self::v4(ip.octets())
    }
}

/// A port; network byte order in memory.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Port(u16);

const _: () = assert!(size_of::<Port>() == 2);

impl Port {
    /// From a number.
    #[inline(always)]
    pub const fn new(port: u16) -> Self {
        Self(port.to_be())
    }

    /// From the kernel's 32-bit field that holds a port in network order (`user_port`).
    #[inline(always)]
    #[expect(clippy::cast_possible_truncation, reason = "the upper half of the field is zero")]
    pub const fn from_network_word(word: u32) -> Self {
        Self(word as u16)
    }

    /// The kernel's 32-bit field that holds a port in network order (`user_port`).
    #[inline(always)]
    pub const fn network_word(self) -> u32 {
        self.0 as u32
    }

    /// From network order octets.
    #[inline(always)]
    pub const fn from_octets(octets: [u8; 2]) -> Self {
        Self(u16::from_ne_bytes(octets))
    }

    /// The number.
    #[inline(always)]
    pub const fn get(self) -> u16 {
        u16::from_be(self.0)
    }
}

/// An address and a port.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Endpoint {
    /// The address.
    pub address: Address,
    /// The port.
    pub port: Port,
    padding: u16,
    more_padding: u32,
}

const _: () = assert!(size_of::<Endpoint>() == 24);

impl Endpoint {
    /// From its parts.
    #[inline(always)]
    pub const fn new(address: Address, port: Port) -> Self {
        Self { address, port, padding: 0, more_padding: 0 }
    }

    /// Equality that compiles to word compares.
    #[inline(always)]
    pub const fn same(&self, other: &Self) -> bool {
        self.address.same(&other.address) && self.port.0 == other.port.0
    }

    /// As a socket address; mapped ones as IPv4.
    pub const fn socket_addr(&self) -> SocketAddr {
        SocketAddr::new(self.address.ip(), self.port.get())
    }
}

impl From<SocketAddr> for Endpoint {
    fn from(address: SocketAddr) -> Self {
        Self::new(address.ip().into(), Port::new(address.port()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn loopback_and_unspecified_are_recognised_in_every_form() {
        let check = |text: &str, loopback: bool, unspecified: bool| {
            let address = Address::from(text.parse::<IpAddr>().unwrap());
            assert_eq!(address.is_loopback(), loopback, "{text}");
            assert_eq!(address.is_unspecified(), unspecified, "{text}");
        };
        check("127.0.0.1", true, false);
        check("127.9.9.9", true, false);
        check("::1", true, false);
        check("::ffff:127.0.0.1", true, false);
        check("0.0.0.0", false, true);
        check("::", false, true);
        check("::ffff:0.0.0.0", false, true);
        check("::2", false, false);
        check("126.255.255.255", false, false);
        check("fd00::1", false, false);
    }

    proptest! {
        #[test]
        fn words_and_octets_are_the_same_address(octets: [u8; 16]) {
            let address = Address::v6(octets);
            prop_assert_eq!(Address::from_words(address.words()), address);
            prop_assert_eq!(address.octets(), octets);
        }

        #[test]
        fn mapped_and_plain_ipv4_are_one_key(octets: [u8; 4], port: u16) {
            let plain = IpAddr::from(octets);
            let mapped = IpAddr::V6(Ipv4Addr::from(octets).to_ipv6_mapped());
            prop_assert_eq!(Address::from(plain), Address::from(mapped));
            prop_assert_eq!(Address::from_word(u32::from_ne_bytes(octets)), Address::from(plain));
            prop_assert_eq!(Address::from(plain).word(), u32::from_ne_bytes(octets));
            prop_assert!(Address::from(plain).is_v4());
            let endpoint = Endpoint::from(SocketAddr::new(mapped, port));
            prop_assert_eq!(endpoint.socket_addr(), SocketAddr::new(plain, port));
        }

        #[test]
        fn same_is_equality(a: [u8; 16], at in 0_usize..16, change: u8) {
            let mut b = a;
            b[at] = change;
            prop_assert_eq!(Address::v6(a).same(&Address::v6(b)), a == b);
        }

        #[test]
        fn a_port_survives_the_kernels_word(port: u16) {
            let word = Port::new(port).network_word();
            prop_assert_eq!(Port::from_network_word(word).get(), port);
            prop_assert_eq!(word, u32::from(port.to_be()));
        }
    }
}
