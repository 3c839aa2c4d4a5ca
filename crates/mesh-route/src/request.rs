//! What routes look at.

use std::borrow::Cow;

use http::{HeaderMap, HeaderName, Method};
use mesh_model::RequestPath;

/// A request as routes see it.
#[derive(Clone, Copy, Debug)]
pub struct RequestHead<'r> {
    /// Its method.
    pub method: &'r Method,
    /// `:authority`, or the Host header.
    pub authority: &'r str,
    /// Its path and query.
    pub path: &'r RequestPath<'r>,
    /// Its headers.
    pub headers: &'r HeaderMap,
}

impl RequestHead<'_> {
    /// The host without port, brackets kept. Case as it came.
    #[must_use]
    pub fn host(&self) -> &str {
        let colon = self.authority.rfind(':');
        match colon {
            Some(at) if self.authority[at + 1..].bytes().all(|byte| byte.is_ascii_digit()) => {
                &self.authority[..at]
            }
            Some(_) | None => self.authority,
        }
    }

    /// A header's value; those of a repeated header with commas between (RFC 9110 §5.3).
    #[must_use]
    pub fn header(&self, name: &HeaderName) -> Option<Cow<'_, [u8]>> {
        let mut values = self.headers.get_all(name).iter();
        let first = values.next()?;
        let Some(second) = values.next() else { return Some(Cow::Borrowed(first.as_bytes())) };
        let mut joined = first.as_bytes().to_vec();
        for value in std::iter::once(second).chain(values) {
            joined.push(b',');
            joined.extend_from_slice(value.as_bytes());
        }
        Some(Cow::Owned(joined))
    }

    /// The first value of a parameter of the query, decoded.
    #[must_use]
    pub fn query(&self, name: &str) -> Option<Cow<'_, [u8]>> {
        self.path.query()?.split('&').find_map(|pair| {
            let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
            (*decoded(key) == *name.as_bytes()).then(|| decoded(value))
        })
    }
}

/// Decodes `application/x-www-form-urlencoded`; what is no escape stays as it is.
fn decoded(text: &str) -> Cow<'_, [u8]> {
    if !text.contains(['%', '+']) {
        return Cow::Borrowed(text.as_bytes());
    }
    let bytes = text.as_bytes();
    let mut decoded = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while let Some(byte) = bytes.get(at) {
        let escape = text
            .get(at + 1..at + 3)
            .filter(|digits| *byte == b'%' && digits.bytes().all(|digit| digit.is_ascii_hexdigit()))
            .and_then(|digits| u8::from_str_radix(digits, 16).ok());
        match (escape, byte) {
            (Some(escaped), _) => {
                decoded.push(escaped);
                at += 2;
            }
            (None, b'+') => decoded.push(b' '),
            (None, other) => decoded.push(*other),
        }
        at += 1;
    }
    Cow::Owned(decoded)
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;
    use mesh_model::PathNormalization;

    use super::*;

    #[test]
    fn facts_of_a_request() {
        let path = "/p?a=1&a=2&b=x+y%21&%63=%zz&d&e=%";
        let path = RequestPath::parse(path, PathNormalization::default()).unwrap();
        let mut headers = HeaderMap::new();
        headers.append("x-a", HeaderValue::from_static("1"));
        headers.append("x-a", HeaderValue::from_static("2"));
        let mut head = RequestHead {
            method: &Method::GET,
            authority: "[::1]:80",
            path: &path,
            headers: &headers,
        };
        for (name, value) in [("a", "1"), ("b", "x y!"), ("c", "%zz"), ("d", ""), ("e", "%")] {
            assert_eq!(head.query(name).as_deref(), Some(value.as_bytes()), "{name}");
        }
        assert_eq!(head.query("f"), None);
        assert_eq!(head.header(&HeaderName::from_static("x-a")).as_deref(), Some(&b"1,2"[..]));
        for (authority, host) in
            [("[::1]:80", "[::1]"), ("a.b:1", "a.b"), ("a.b", "a.b"), ("[::1]", "[::1]"), ("", "")]
        {
            head.authority = authority;
            assert_eq!(head.host(), host, "{authority}");
        }
    }
}
