//! The head of a CONNECT and of its answer, as fields and as header blocks.

use crate::hpack::{Encoder, StaticName};

/// What a client asks for, and what it says about itself. Source: wire.md §1.3.
///
/// Nothing in it is trusted: the peer's identity comes from its certificate.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ConnectHead {
    /// `ip:port`, `[ip6]:port` or `hostname:port`; not empty, otherwise as the peer wrote it.
    pub authority: String,
    /// The source workload's attributes, for telemetry only; repeated headers joined by `,`.
    pub baggage: Option<String>,
    /// The original client and host, for telemetry only.
    pub forwarded: Option<String>,
    /// W3C trace context.
    pub traceparent: Option<String>,
    /// `x-forwarded-network`: the client's network, on the inner CONNECT of a double tunnel.
    pub forwarded_network: Option<String>,
    /// `x-istio-source`: the kind of an Envoy-based peer.
    pub istio_source: Option<String>,
    /// Headers named `culvert-…`: extensions that other implementations ignore.
    pub extensions: Vec<(String, String)>,
}

/// What goes with a 200. Source: wire.md §1.5.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ResponseHead {
    /// The destination workload's attributes.
    pub baggage: Option<String>,
    /// Headers named `culvert-…`.
    pub extensions: Vec<(String, String)>,
}

/// Prefix of the header names that are ours.
const EXTENSION_PREFIX: &str = "culvert-";

/// What a request's header block came to.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Request {
    /// A CONNECT as it should be.
    Connect(Box<ConnectHead>),
    /// Well-formed, but nothing we do: the status to answer with.
    Refuse(u16),
    /// Against RFC 9113 §8: a stream error.
    Malformed,
}

/// What a response's header block came to.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Response {
    /// 1xx: another one follows.
    Interim,
    /// 2xx: the tunnel's stream is open.
    Connected(ResponseHead),
    /// Another status.
    Refused(u16),
    /// Against RFC 9113 §8: a stream error.
    Malformed,
}

/// Collects the fields of one header list.
#[derive(Debug, Default)]
pub(crate) struct Fields {
    limit: usize,
    size: usize,
    malformed: bool,
    regular_seen: bool,
    method: Option<Vec<u8>>,
    authority: Option<Vec<u8>>,
    status: Option<Vec<u8>>,
    /// `:scheme` or `:path`, which no CONNECT has.
    target_seen: bool,
    head: ConnectHead,
}

impl Fields {
    pub(crate) fn new(limit: u32) -> Self {
        Self { limit: limit as usize, ..Self::default() }
    }

    /// Takes one field. Beyond the limit nothing is kept.
    pub(crate) fn push(&mut self, name: &[u8], value: &[u8]) {
        // Source: RFC 9113 §6.5.2 for how a list's size is counted.
        self.size = self.size.saturating_add(name.len() + value.len() + 32);
        if self.size > self.limit {
            return;
        }
        if !is_field_value(value) {
            self.malformed = true;
            return;
        }
        if let Some(pseudo) = name.strip_prefix(b":") {
            self.pseudo(pseudo, value);
            return;
        }
        self.regular_seen = true;
        if !is_field_name(name) || is_connection_specific(name, value) {
            self.malformed = true;
            return;
        }
        // A value that is no text is as good as none: these headers only describe.
        let Ok(text) = std::str::from_utf8(value) else { return };
        let head = &mut self.head;
        match name {
            b"baggage" => match &mut head.baggage {
                Some(baggage) => {
                    baggage.push(',');
                    baggage.push_str(text);
                }
                None => head.baggage = Some(text.to_owned()),
            },
            b"forwarded" => head.forwarded = Some(text.to_owned()),
            b"traceparent" => head.traceparent = Some(text.to_owned()),
            b"x-forwarded-network" => head.forwarded_network = Some(text.to_owned()),
            b"x-istio-source" => head.istio_source = Some(text.to_owned()),
            _ => {
                if let Ok(name) = std::str::from_utf8(name)
                    && name.starts_with(EXTENSION_PREFIX)
                {
                    head.extensions.push((name.to_owned(), text.to_owned()));
                }
            }
        }
    }

    fn pseudo(&mut self, name: &[u8], value: &[u8]) {
        let place = match name {
            b"method" => &mut self.method,
            b"authority" => &mut self.authority,
            b"status" => &mut self.status,
            b"scheme" | b"path" => {
                self.target_seen = true;
                self.malformed |= self.regular_seen;
                return;
            }
            // `:protocol` included: extended CONNECT is not offered.
            _ => {
                self.malformed = true;
                return;
            }
        };
        self.malformed |= self.regular_seen || place.is_some();
        *place = Some(value.to_vec());
    }

    /// Source: RFC 9113 §8.3.1, §8.5.
    pub(crate) fn into_request(mut self) -> Request {
        if self.malformed || self.status.is_some() {
            return Request::Malformed;
        }
        if self.size > self.limit {
            return Request::Refuse(431);
        }
        let Some(method) = self.method else { return Request::Malformed };
        if method != b"CONNECT" {
            return if self.target_seen { Request::Refuse(400) } else { Request::Malformed };
        }
        if self.target_seen {
            return Request::Malformed;
        }
        match self.authority.map(String::from_utf8) {
            Some(Ok(authority)) if !authority.is_empty() => {
                self.head.authority = authority;
                Request::Connect(Box::new(self.head))
            }
            Some(_) | None => Request::Refuse(400),
        }
    }

    /// Source: RFC 9113 §8.3.2.
    pub(crate) fn into_response(self) -> Response {
        let request_fields = self.method.is_some() || self.authority.is_some() || self.target_seen;
        if self.malformed || request_fields || self.size > self.limit {
            return Response::Malformed;
        }
        let Some(&[hundreds @ b'1'..=b'9', tens @ b'0'..=b'9', ones @ b'0'..=b'9']) =
            self.status.as_deref()
        else {
            return Response::Malformed;
        };
        let digit = |byte: u8| u16::from(byte - b'0');
        match digit(hundreds) * 100 + digit(tens) * 10 + digit(ones) {
            100..=199 => Response::Interim,
            200..=299 => {
                let ConnectHead { baggage, extensions, .. } = self.head;
                Response::Connected(ResponseHead { baggage, extensions })
            }
            status => Response::Refused(status),
        }
    }
}

/// Source: RFC 9113 §8.2.1.
fn is_field_name(name: &[u8]) -> bool {
    !name.is_empty()
        && name.iter().all(|b| (0x21..=0x7e).contains(b) && !b.is_ascii_uppercase() && *b != b':')
}

/// Source: RFC 9113 §8.2.1.
fn is_field_value(value: &[u8]) -> bool {
    let space = |byte: Option<&u8>| matches!(byte, Some(b' ' | b'\t'));
    !value.iter().any(|b| matches!(b, 0 | b'\r' | b'\n'))
        && !space(value.first())
        && !space(value.last())
}

/// Source: RFC 9113 §8.2.2.
fn is_connection_specific(name: &[u8], value: &[u8]) -> bool {
    match name {
        b"connection" | b"proxy-connection" | b"keep-alive" | b"transfer-encoding" | b"upgrade" => {
            true
        }
        b"te" => value != b"trailers",
        _ => false,
    }
}

fn extensions(encoder: &mut Encoder, extensions: &[(String, String)]) {
    for (name, value) in extensions {
        optional(encoder, name, Some(value));
    }
}

/// A header that only describes is left out if it cannot be written down legally.
fn optional(encoder: &mut Encoder, name: &str, value: Option<&String>) {
    if let Some(value) = value
        && is_field_value(value.as_bytes())
        && is_field_name(name.as_bytes())
    {
        encoder.literal(name.as_bytes(), value.as_bytes());
    }
}

impl ConnectHead {
    /// The header block of the request.
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut encoder = Encoder::default();
        encoder
            .static_name(StaticName::Method, b"CONNECT")
            .static_name(StaticName::Authority, self.authority.as_bytes());
        optional(&mut encoder, "baggage", self.baggage.as_ref());
        optional(&mut encoder, "forwarded", self.forwarded.as_ref());
        optional(&mut encoder, "traceparent", self.traceparent.as_ref());
        optional(&mut encoder, "x-forwarded-network", self.forwarded_network.as_ref());
        optional(&mut encoder, "x-istio-source", self.istio_source.as_ref());
        extensions(&mut encoder, &self.extensions);
        encoder.into_block()
    }

    /// True when the authority can be sent at all.
    pub(crate) fn is_sendable(&self) -> bool {
        !self.authority.is_empty() && self.authority.bytes().all(|b| (0x21..=0x7e).contains(&b))
    }
}

impl ResponseHead {
    /// The header block of a 200.
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut encoder = Encoder::default();
        encoder.indexed(STATUS_200);
        optional(&mut encoder, "baggage", self.baggage.as_ref());
        extensions(&mut encoder, &self.extensions);
        encoder.into_block()
    }
}

/// The header block of an answer without anything but a status, 100..=999.
pub(crate) fn encode_status(status: u16) -> Vec<u8> {
    let mut encoder = Encoder::default();
    encoder.static_name(StaticName::Status, status.to_string().as_bytes());
    encoder.into_block()
}

/// `:status: 200` in HPACK's static table.
const STATUS_200: u8 = 8;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hpack::Decoder;

    fn fields(list: &[(&str, &str)]) -> Fields {
        let mut fields = Fields::new(1000);
        for (name, value) in list {
            fields.push(name.as_bytes(), value.as_bytes());
        }
        fields
    }

    #[test]
    fn heads_are_read_as_written() {
        let head = ConnectHead {
            authority: "[fd00::1]:80".into(),
            baggage: Some("k8s.namespace.name=shop".into()),
            forwarded: Some("for=\"10.0.0.1:4000\"".into()),
            traceparent: Some("00-1-2-00".into()),
            forwarded_network: Some("n1".into()),
            istio_source: Some("gateway".into()),
            extensions: vec![("culvert-a".into(), "b".into())],
        };
        let mut read = Fields::new(1000);
        Decoder::default().decode(&head.encode(), |n, v| read.push(n, v)).unwrap();
        assert_eq!(read.into_request(), Request::Connect(Box::new(head.clone())));
        let response = ResponseHead { baggage: head.baggage, extensions: head.extensions };
        let mut read = Fields::new(1000);
        Decoder::default().decode(&response.encode(), |n, v| read.push(n, v)).unwrap();
        assert_eq!(read.into_response(), Response::Connected(response));
    }

    #[test]
    fn requests_are_judged() {
        let connect = [(":method", "CONNECT"), (":authority", "a:1")];
        let with = |more: &[(&str, &str)]| fields(&[&connect[..], more].concat()).into_request();
        assert!(matches!(with(&[("te", "trailers"), ("unknown", "é")]), Request::Connect(_)));
        for more in [
            (":path", "/"),
            (":scheme", "https"),
            (":protocol", "websocket"),
            (":method", "CONNECT"),
            (":status", "200"),
            ("Upper", "x"),
            ("sp ace", "x"),
            ("", "x"),
            ("x", " x"),
            ("x", "a\nb"),
            ("connection", "close"),
            ("te", "gzip"),
            ("transfer-encoding", "chunked"),
        ] {
            assert_eq!(with(&[more]), Request::Malformed, "{more:?}");
        }
        let late = fields(&[(":method", "CONNECT"), ("x", "y"), (":authority", "a:1")]);
        assert_eq!(late.into_request(), Request::Malformed);
        assert_eq!(with(&[("long", &"x".repeat(1000))]), Request::Refuse(431));
        assert_eq!(fields(&[(":method", "CONNECT")]).into_request(), Request::Refuse(400));
        let get = [(":method", "GET"), (":path", "/"), (":scheme", "https")];
        assert_eq!(fields(&get).into_request(), Request::Refuse(400));
        assert_eq!(fields(&[]).into_request(), Request::Malformed);
    }

    #[test]
    fn responses_are_judged() {
        for (status, expected) in [
            ("200", Response::Connected(ResponseHead::default())),
            ("103", Response::Interim),
            ("503", Response::Refused(503)),
            ("2000", Response::Malformed),
            ("20x", Response::Malformed),
            ("", Response::Malformed),
        ] {
            assert_eq!(fields(&[(":status", status)]).into_response(), expected, "{status}");
        }
        assert_eq!(fields(&[]).into_response(), Response::Malformed);
        let both = fields(&[(":status", "200"), (":method", "GET")]);
        assert_eq!(both.into_response(), Response::Malformed);
    }
}
