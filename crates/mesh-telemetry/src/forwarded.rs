//! The `forwarded` header of a CONNECT.

use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;

/// Who dialled originally, and which service was meant.
///
/// The far side uses it for telemetry alone, never for policy and never as the source address.
/// Source: RFC 7239; HBONE sends one element with `for` and, for a service, `host`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Forwarded {
    /// Address of the original client.
    pub client: Option<SocketAddr>,
    /// Host name of the service that was dialled.
    pub host: Option<Arc<str>>,
}

/// Longest header that is read, bytes; a longer one says nothing.
pub const MAX_BYTES: usize = 1024;
/// Longest host name. Source: RFC 1035 §2.3.4.
const MAX_HOST_BYTES: usize = 255;

impl Forwarded {
    /// Reads a header's value. What is malformed, too long or no text is absent from the result.
    #[must_use]
    pub fn parse(value: &[u8]) -> Self {
        let mut forwarded = Self::default();
        let Ok(text) = std::str::from_utf8(value) else { return forwarded };
        if text.len() > MAX_BYTES || !text.is_ascii() {
            return forwarded;
        }
        for pair in text.split(';') {
            let Some((name, value)) = pair.split_once('=') else { continue };
            let value = unquote(value.trim());
            match name.trim() {
                name if name.eq_ignore_ascii_case("for") => forwarded.client = value.parse().ok(),
                name if name.eq_ignore_ascii_case("host") => forwarded.host = host(value),
                _ => {}
            }
        }
        forwarded
    }
}

fn unquote(text: &str) -> &str {
    text.strip_prefix('"').and_then(|text| text.strip_suffix('"')).unwrap_or(text)
}

fn host(text: &str) -> Option<Arc<str>> {
    let plain = (1..=MAX_HOST_BYTES).contains(&text.len())
        && text
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-' | b'_' | b'*'));
    plain.then(|| text.into())
}

impl fmt::Display for Forwarded {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.client, &self.host) {
            (Some(client), Some(host)) => write!(f, "for=\"{client}\";host={host}"),
            (Some(client), None) => write!(f, "for=\"{client}\""),
            (None, Some(host)) => write!(f, "host={host}"),
            (None, None) => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[track_caller]
    fn check(header: &str, client: Option<&str>, host: Option<&str>) {
        let forwarded = Forwarded::parse(header.as_bytes());
        let client = client.map(|client| client.parse().unwrap());
        assert_eq!(forwarded, Forwarded { client, host: host.map(Into::into) }, "{header}");
    }

    #[test]
    fn clients_and_hosts_are_read() {
        check(r#"for="10.0.0.1:4711""#, Some("10.0.0.1:4711"), None);
        check(
            r#"for="[fd00::1]:80";host=cart.shop.svc.cluster.local"#,
            Some("[fd00::1]:80"),
            Some("cart.shop.svc.cluster.local"),
        );
        check(r#"host="cart.shop" ; For=10.0.0.1:1"#, Some("10.0.0.1:1"), Some("cart.shop"));
        check("for=nonsense;host=ok", None, Some("ok"));
    }

    #[test]
    fn what_is_no_host_is_absent() {
        check("host=", None, None);
        check("host=a b", None, None);
        check("host=käse", None, None);
        check(&format!("host={}", "a".repeat(256)), None, None);
        check(&format!("host=a;{}", "x".repeat(2000)), None, None);
    }

    proptest! {
        #[test]
        fn no_bytes_panic(value: Vec<u8>) {
            let forwarded = Forwarded::parse(&value);
            prop_assert!(forwarded.host.is_none_or(|host| host.len() <= MAX_HOST_BYTES));
        }

        #[test]
        fn formatting_and_parsing_agree(ip: [u8; 4], port: u16, host in proptest::option::of("[a-z0-9.-]{1,60}")) {
            let forwarded = Forwarded {
                client: Some(SocketAddr::from((ip, port))),
                host: host.map(Into::into),
            };
            prop_assert_eq!(Forwarded::parse(forwarded.to_string().as_bytes()), forwarded);
        }
    }
}
