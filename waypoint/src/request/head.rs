//! The head of a request: what is refused before anybody looks at it, and what does not go on.

use http::header::{
    CONNECTION, CONTENT_LENGTH, COOKIE, HOST, HeaderName, TE, TRAILER, TRANSFER_ENCODING, UPGRADE,
};
use http::{HeaderMap, Method, Request, Version};

use crate::refusal::Refusal;

/// What a head says of itself.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Head {
    /// `:authority`, or the Host header.
    pub(super) authority: String,
    /// Its body comes in chunks.
    pub(super) chunked: bool,
}

/// Longest authority, bytes: a host name, brackets and a port.
const MAX_AUTHORITY: usize = 300;

/// Looks for what servers may read differently. Source: RFC 9112 §3.2, §6.1, §6.3; RFC 9113 §8.2.2, §8.3.1.
pub(super) fn check<B>(request: &Request<B>) -> Result<Head, Refusal> {
    let headers = request.headers();
    // TRACE would show a client what the waypoint says of it.
    if matches!(*request.method(), Method::CONNECT | Method::TRACE) {
        let detail = "CONNECT and TRACE are not passed on";
        return Err(Refusal::new(
            "protocol_error",
            http::StatusCode::METHOD_NOT_ALLOWED,
            "DPE",
            detail,
        ));
    }
    if request.uri().path() == "*" && *request.method() != Method::OPTIONS {
        return Err(Refusal::bad_request("bad_path", "* is asked about by OPTIONS only"));
    }
    let refused = |detail: &str| Refusal::bad_request("bad_framing", detail);
    let chunked = headers.contains_key(TRANSFER_ENCODING);
    if chunked && headers.contains_key(CONTENT_LENGTH) {
        return Err(refused("both Content-Length and Transfer-Encoding"));
    }
    if headers.get_all(CONTENT_LENGTH).iter().count() > 1 {
        return Err(refused("more than one Content-Length"));
    }
    if headers
        .get_all(TRANSFER_ENCODING)
        .iter()
        .any(|value| value.to_str().map_or(true, |text| !text.eq_ignore_ascii_case("chunked")))
        || headers.get_all(TRANSFER_ENCODING).iter().count() > 1
    {
        return Err(refused("a Transfer-Encoding other than chunked"));
    }
    if chunked && request.version() != Version::HTTP_11 {
        return Err(refused("Transfer-Encoding in another version than HTTP/1.1"));
    }
    let mut hosts = headers.get_all(HOST).iter();
    let host = hosts.next();
    if hosts.next().is_some() {
        return Err(Refusal::bad_request("bad_authority", "more than one Host"));
    }
    let host = match host.map(|value| value.to_str()) {
        None => None,
        Some(Ok(text)) => Some(text),
        Some(Err(_)) => {
            return Err(Refusal::bad_request("bad_authority", "a Host that is no text"));
        }
    };
    let named = request.uri().authority().map(http::uri::Authority::as_str);
    let authority = match (named, host) {
        // Two that differ are two answers to one question.
        (Some(named), Some(host)) if !named.eq_ignore_ascii_case(host) => {
            return Err(Refusal::bad_request(
                "bad_authority",
                "Host and the target's authority differ",
            ));
        }
        (Some(named), _) => named,
        (None, Some(host)) => host,
        (None, None) => return Err(Refusal::bad_request("bad_authority", "no Host")),
    };
    let is_plain = |byte: u8| {
        byte.is_ascii_alphanumeric()
            || matches!(byte, b'.' | b'-' | b'_' | b':' | b'[' | b']' | b'~')
    };
    if authority.is_empty() || authority.len() > MAX_AUTHORITY || !authority.bytes().all(is_plain) {
        return Err(Refusal::bad_request("bad_authority", "an authority that is none"));
    }
    Ok(Head { authority: authority.to_owned(), chunked })
}

const KEEP_ALIVE: HeaderName = HeaderName::from_static("keep-alive");
const PROXY_CONNECTION: HeaderName = HeaderName::from_static("proxy-connection");
const HTTP2_SETTINGS: HeaderName = HeaderName::from_static("http2-settings");

/// Who the client is, as proxies say it.
pub(super) const XFCC: &str = "x-forwarded-client-cert";

/// The waypoints that a request has gone through, for the next one.
pub(super) const HOPS: HeaderName = HeaderName::from_static("culvert-hops");

/// Most waypoints that a request goes through.
const MAX_HOPS: u8 = 8;

/// How many waypoints a request has gone through.
///
/// # Errors
/// When it goes round in circles: routes lead from waypoint to waypoint and back.
pub(super) fn hops(headers: &HeaderMap) -> Result<u8, Refusal> {
    let Some(value) = headers.get(HOPS) else { return Ok(0) };
    let hops = value.to_str().ok().and_then(|text| text.parse().ok());
    hops.filter(|hops| *hops < MAX_HOPS).ok_or_else(|| {
        let detail = format!("it has gone through {MAX_HOPS} waypoints");
        Refusal::new("loop_detected", http::StatusCode::LOOP_DETECTED, "-", detail)
    })
}

/// Takes out what servers do not get of a client's headers, and brings the rest into their form, so that what is judged and routed
/// is what they see.
pub(super) fn strip(headers: &mut HeaderMap) {
    hop_by_hop(headers);
    headers.remove(HOPS);
    headers.remove(XFCC);
    // Servers of the CGI kind read both as one header.
    headers.remove("x_forwarded_client_cert");
    join_cookies(headers);
}

/// HTTP/2 may send a cookie in pieces, HTTP/1.1 may not. Source: RFC 9113 §8.2.3.
fn join_cookies(headers: &mut HeaderMap) {
    if headers.get_all(COOKIE).iter().nth(1).is_none() {
        return;
    }
    let pieces: Vec<&[u8]> =
        headers.get_all(COOKIE).iter().map(http::HeaderValue::as_bytes).collect();
    // Pieces of values are a value.
    if let Ok(joined) = http::HeaderValue::from_bytes(&pieces.join(&b"; "[..])) {
        headers.insert(COOKIE, joined);
    }
}

/// Takes out what is about one connection only. Source: RFC 9110 §7.6.1.
pub(super) fn hop_by_hop(headers: &mut HeaderMap) {
    let named: Vec<HeaderName> = headers
        .get_all(CONNECTION)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|text| text.split(','))
        .filter_map(|name| name.trim().parse().ok())
        .collect();
    // What frames or addresses a message is not for a Connection header to take away.
    let kept = [HOST, CONTENT_LENGTH, TE, TRAILER];
    for name in named.iter().filter(|name| !kept.contains(name)) {
        headers.remove(name);
    }
    let trailers = headers.get(TE).is_some_and(|value| {
        value.to_str().is_ok_and(|text| {
            text.split(',').any(|word| word.trim().eq_ignore_ascii_case("trailers"))
        })
    });
    for name in
        [CONNECTION, KEEP_ALIVE, PROXY_CONNECTION, HTTP2_SETTINGS, TRANSFER_ENCODING, UPGRADE, TE]
    {
        headers.remove(name);
    }
    if trailers {
        headers.insert(TE, http::HeaderValue::from_static("trailers"));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(version: Version, uri: &str, headers: &[(&str, &str)]) -> Request<()> {
        let mut request = Request::builder().version(version).uri(uri);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        request.body(()).unwrap()
    }

    #[test]
    fn what_servers_may_read_differently_is_refused() {
        let one = Version::HTTP_11;
        for (uri, headers, reason) in [
            ("/", &[][..], "bad_authority"),
            ("/", &[("host", "a"), ("host", "a")], "bad_authority"),
            ("/", &[("host", "a b")], "bad_authority"),
            ("/", &[("host", "user@a")], "bad_authority"),
            ("/", &[("host", "a/b")], "bad_authority"),
            ("http://a/", &[("host", "b")], "bad_authority"),
            (
                "/",
                &[("host", "a"), ("content-length", "1"), ("transfer-encoding", "chunked")],
                "bad_framing",
            ),
            (
                "/",
                &[("host", "a"), ("content-length", "1"), ("content-length", "1")],
                "bad_framing",
            ),
            ("/", &[("host", "a"), ("transfer-encoding", "gzip, chunked")], "bad_framing"),
            (
                "/",
                &[
                    ("host", "a"),
                    ("transfer-encoding", "chunked"),
                    ("transfer-encoding", "chunked"),
                ],
                "bad_framing",
            ),
        ] {
            let found = check(&request(one, uri, headers)).unwrap_err();
            assert_eq!(found.reason, reason, "{uri} {headers:?}");
        }
        let star = request(one, "*", &[("host", "a")]);
        assert_eq!(check(&star).unwrap_err().reason, "bad_path");
        let old =
            request(Version::HTTP_10, "/", &[("host", "a"), ("transfer-encoding", "chunked")]);
        assert_eq!(check(&old).unwrap_err().reason, "bad_framing");
        let fine = request(one, "http://A:80/", &[("host", "a:80")]);
        assert_eq!(check(&fine).unwrap(), Head { authority: "A:80".to_owned(), chunked: false });
    }

    #[test]
    fn pieces_of_a_cookie_are_one_header() {
        let mut headers = HeaderMap::new();
        for piece in ["a=1", "b=2", "c=3"] {
            headers.append(COOKIE, piece.parse().unwrap());
        }
        strip(&mut headers);
        let cookies: Vec<_> = headers.get_all(COOKIE).iter().collect();
        assert_eq!(cookies, ["a=1; b=2; c=3"]);
    }

    #[test]
    fn who_goes_round_in_circles_is_stopped() {
        let hops_of = |text: &'static str| {
            let mut headers = HeaderMap::new();
            headers.insert(HOPS, http::HeaderValue::from_static(text));
            hops(&headers).map_err(|refusal| refusal.status.as_u16())
        };
        assert_eq!(hops(&HeaderMap::new()), Ok(0));
        assert_eq!(hops_of("7"), Ok(7));
        for text in ["8", "255", "256", "-1", "", "x"] {
            assert_eq!(hops_of(text), Err(508), "{text}");
        }
    }

    #[test]
    fn connection_headers_stay_here() {
        let mut headers: HeaderMap = [
            ("connection", "x-a, Content-Length, close"),
            ("x-a", "1"),
            ("content-length", "5"),
            ("te", "gzip, trailers"),
            ("upgrade", "h2c"),
            ("keep-alive", "1"),
            ("x-b", "2"),
        ]
        .map(|(name, value)| (name.parse().unwrap(), value.parse().unwrap()))
        .into_iter()
        .collect();
        hop_by_hop(&mut headers);
        let mut left: Vec<_> =
            headers.iter().map(|(n, v)| (n.as_str(), v.to_str().unwrap())).collect();
        left.sort_unstable();
        assert_eq!(left, [("content-length", "5"), ("te", "trailers"), ("x-b", "2")]);
    }
}
