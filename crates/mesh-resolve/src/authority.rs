//! The `:authority` of an HBONE CONNECT.

use std::fmt;
use std::net::{SocketAddr, SocketAddrV6};
use std::str::FromStr;
use std::sync::Arc;

use mesh_model::canonical_ip;
use serde::{Deserialize, Serialize};

/// What a CONNECT asks for: an address within one network, or a service's host name across networks.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub enum Authority {
    /// `10.0.0.1:8080` or `[fd00::1]:8080`, canonical.
    Address(SocketAddr),
    /// `cart.shop.svc.cluster.local:80`; the port is the service's.
    Hostname {
        /// Host name in lower case, without a final dot.
        host: Arc<str>,
        /// Port of the service, never 0.
        port: u16,
    },
}

/// Text that is no authority of HBONE.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not an address:port or hostname:port: {text:?}")]
pub struct InvalidAuthority {
    /// What was given, cut to 256 characters.
    pub text: String,
}

impl Authority {
    /// The authority of `address`, canonicalised.
    #[must_use]
    pub fn address(address: SocketAddr) -> Self {
        Self::Address(SocketAddr::new(canonical_ip(address.ip()), address.port()))
    }

    /// The port asked for.
    #[must_use]
    pub const fn port(&self) -> u16 {
        match self {
            Self::Address(address) => address.port(),
            Self::Hostname { port, .. } => *port,
        }
    }
}

/// Longest host name, bytes. Source: RFC 1035 §2.3.4.
const MAX_HOSTNAME_BYTES: usize = 253;
/// Longest label, bytes. Source: RFC 1035 §2.3.4.
const MAX_LABEL_BYTES: usize = 63;

fn is_hostname(text: &str) -> bool {
    let is_label = |label: &str| {
        (1..=MAX_LABEL_BYTES).contains(&label.len())
            && label.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_'))
    };
    // A name that ends in digits is a mistyped address. Source: WHATWG URL, "ends in a number".
    let is_numeric = |label: &str| label.bytes().all(|b| b.is_ascii_digit());
    text.len() <= MAX_HOSTNAME_BYTES
        && text.split('.').all(is_label)
        && !text.rsplit('.').next().is_none_or(is_numeric)
}

fn parse_port(text: &str) -> Option<u16> {
    let digits = (1..=5).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_digit());
    if digits { text.parse().ok().filter(|port| *port != 0) } else { None }
}

fn parse(text: &str) -> Option<Authority> {
    let (host, port) = text.rsplit_once(':')?;
    let port = parse_port(port)?;
    if let Some(inside) = host.strip_prefix('[') {
        let ip = inside.strip_suffix(']')?.parse().ok()?;
        return Some(Authority::address(SocketAddrV6::new(ip, port, 0, 0).into()));
    }
    if let Ok(ip) = host.parse::<std::net::Ipv4Addr>() {
        return Some(Authority::Address(SocketAddr::new(ip.into(), port)));
    }
    let host = host.strip_suffix('.').unwrap_or(host);
    is_hostname(host).then(|| Authority::Hostname { host: host.to_ascii_lowercase().into(), port })
}

impl FromStr for Authority {
    type Err = InvalidAuthority;

    fn from_str(text: &str) -> Result<Self, InvalidAuthority> {
        parse(text).ok_or_else(|| InvalidAuthority { text: text.chars().take(256).collect() })
    }
}

impl fmt::Display for Authority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Address(address) => address.fmt(f),
            Self::Hostname { host, port } => write!(f, "{host}:{port}"),
        }
    }
}

impl From<Authority> for String {
    fn from(authority: Authority) -> Self {
        authority.to_string()
    }
}

impl TryFrom<String> for Authority {
    type Error = InvalidAuthority;

    fn try_from(text: String) -> Result<Self, InvalidAuthority> {
        text.parse()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn authorities_are_read_and_written_alike() {
        for text in ["10.0.0.1:8080", "[fd00::1]:8080", "cart.shop.svc.cluster.local:80", "a_b:1"] {
            assert_eq!(text.parse::<Authority>().unwrap().to_string(), text);
        }
        let same = [
            ("[::ffff:10.0.0.1]:80", "10.0.0.1:80"),
            ("Cart.Shop:80", "cart.shop:80"),
            ("cart.shop.:80", "cart.shop:80"),
            ("10.0.0.1:0080", "10.0.0.1:80"),
        ];
        for (text, canonical) in same {
            assert_eq!(text.parse::<Authority>().unwrap().to_string(), canonical, "{text}");
        }
    }

    #[test]
    fn other_texts_are_refused() {
        let long_label = format!("{}:80", "a".repeat(64));
        let long_name = format!("{}a:80", "abcdefg.".repeat(32));
        for text in [
            "",
            ":",
            ":80",
            "10.0.0.1",
            "10.0.0.1:",
            "10.0.0.1:0",
            "10.0.0.1:65536",
            "10.0.0.1:+80",
            "10.0.0.1:-1",
            "fd00::1:80",
            "[fd00::1]",
            "[fd00::1]80",
            "[fd00::1:80",
            "[fe80::1%1]:80",
            "[10.0.0.1]:80",
            "10.0.0.256:80",
            "10.1:80",
            "host..name:80",
            ".host:80",
            "ho st:80",
            "user@host:80",
            "http://host:80",
            "host:80/path",
            "*.host:80",
            "hôst:80",
            "host:8 0",
            "..:80",
            "host\0:80",
            long_label.as_str(),
            long_name.as_str(),
        ] {
            assert!(text.parse::<Authority>().is_err(), "{text:?}");
        }
    }
}
