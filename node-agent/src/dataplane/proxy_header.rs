//! PROXY protocol version 2, for workloads that ask for it.

use std::net::{IpAddr, SocketAddr};

use mesh_model::SpiffeId;

/// Source: the PROXY protocol specification §2.2.
const SIGNATURE: [u8; 12] =
    [0x0d, 0x0a, 0x0d, 0x0a, 0x00, 0x0d, 0x0a, 0x51, 0x55, 0x49, 0x54, 0x0a];
/// Version 2, command PROXY.
const VERSION_AND_COMMAND: u8 = 0x21;
const TCP_OVER_IPV4: u8 = 0x11;
const TCP_OVER_IPV6: u8 = 0x21;
/// The client's SPIFFE URI. Source: wire.md §2.3, as Istio's proxies read it.
const TLV_IDENTITY: u8 = 0xd0;

/// The header for a connection from `client` to `destination`, whose client proved to be `peer`.
pub(super) fn proxy_header(
    client: SocketAddr,
    destination: SocketAddr,
    peer: Option<&SpiffeId>,
) -> Vec<u8> {
    let mut addresses = Vec::with_capacity(36);
    let family = match (client.ip(), destination.ip()) {
        (IpAddr::V4(from), IpAddr::V4(to)) => {
            addresses.extend(from.octets());
            addresses.extend(to.octets());
            TCP_OVER_IPV4
        }
        (from, to) => {
            addresses.extend(mapped(from));
            addresses.extend(mapped(to));
            TCP_OVER_IPV6
        }
    };
    addresses.extend(client.port().to_be_bytes());
    addresses.extend(destination.port().to_be_bytes());
    if let Some(peer) = peer {
        let uri = peer.as_str().as_bytes();
        // A SPIFFE URI has at most 2,048 bytes.
        if let Ok(length) = u16::try_from(uri.len()) {
            addresses.push(TLV_IDENTITY);
            addresses.extend(length.to_be_bytes());
            addresses.extend(uri);
        }
    }
    let mut header = Vec::with_capacity(16 + addresses.len());
    header.extend(SIGNATURE);
    header.extend([VERSION_AND_COMMAND, family]);
    header.extend(u16::try_from(addresses.len()).unwrap_or(u16::MAX).to_be_bytes());
    header.extend(addresses);
    header
}

const fn mapped(ip: IpAddr) -> [u8; 16] {
    match ip {
        IpAddr::V4(ip) => ip.to_ipv6_mapped().octets(),
        IpAddr::V6(ip) => ip.octets(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(client: &str, destination: &str, peer: Option<&str>) -> Vec<u8> {
        let peer = peer.map(|text| text.parse().unwrap());
        proxy_header(client.parse().unwrap(), destination.parse().unwrap(), peer.as_ref())
    }

    #[test]
    fn ipv4_has_twelve_bytes_of_addresses() {
        let header = header("10.0.0.1:258", "10.0.0.2:80", None);
        assert_eq!(&header[..12], &SIGNATURE);
        assert_eq!(&header[12..], &[0x21, 0x11, 0, 12, 10, 0, 0, 1, 10, 0, 0, 2, 1, 2, 0, 80]);
    }

    #[test]
    fn mixed_families_are_ipv6_and_the_identity_follows() {
        let peer = "spiffe://td/ns/a/sa/b";
        let header = header("10.0.0.1:1", "[fd00::1]:2", Some(peer));
        assert_eq!(&header[12..16], &[0x21, 0x21, 0, 36 + 3 + 21]);
        assert_eq!(&header[26..32], &[0xff, 0xff, 10, 0, 0, 1]);
        assert_eq!(&header[52..55], &[0xd0, 0, 21]);
        assert_eq!(&header[55..], peer.as_bytes());
    }
}
