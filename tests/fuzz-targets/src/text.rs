//! Parsers of single values: authorities, telemetry headers, identities, prefixes, names.

use culvert_waypoint::detect::spoken as spoken_by;
use culvert_waypoint::strict::Follower;
use mesh_authorize::{PathTemplate, PolicyName};
use mesh_identity::NodeName;
use mesh_model::{IpPrefix, SpiffeId, path_text};
use mesh_resolve::Authority;
use mesh_telemetry::baggage::{MAX_BYTES, MAX_VALUE_BYTES};
use mesh_telemetry::{Baggage, Forwarded, TraceParent};

use crate::input::texts;

/// What parses is canonical: it is written and read back as itself, and its port can be dialled.
pub fn authority(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let Ok(authority) = text.parse::<Authority>() else { return };
    assert_ne!(authority.port(), 0);
    assert_eq!(authority.to_string().parse(), Ok(authority.clone()));
    match &authority {
        Authority::Address(address) => assert_eq!(address.ip().to_canonical(), address.ip()),
        Authority::Hostname { host, .. } => {
            assert!(!host.is_empty() && host.len() <= 253);
            assert!(host.parse::<std::net::IpAddr>().is_err(), "{host} is an address");
            assert!(!host.bytes().any(|byte| byte.is_ascii_uppercase()));
        }
    }
}

pub(crate) fn authority_seeds() -> Vec<Vec<u8>> {
    texts(&[
        "10.0.0.1:8080",
        "[fd00::1]:443",
        "[::ffff:10.0.0.1]:80",
        "Cart.shop.svc.cluster.local.:80",
        "a_b.c-d:1",
        "1.2.3:80",
    ])
}

/// Every value fits its bound, and what is sent on is read back as the same.
pub fn baggage(data: &[u8]) {
    let baggage = Baggage::parse(data.split(|byte| *byte == 0));
    let values = [
        &baggage.cluster,
        &baggage.namespace,
        &baggage.workload,
        &baggage.service,
        &baggage.revision,
        &baggage.region,
        &baggage.zone,
    ];
    for value in values {
        assert!(value.len() <= MAX_VALUE_BYTES);
        assert!(!value.chars().any(char::is_control), "{value:?} would break a log line");
    }
    let text = baggage.to_string();
    assert!(text.len() <= MAX_BYTES && text.is_ascii());
    let again = Baggage::parse([text.as_bytes()]);
    assert_eq!(again.to_string(), text);
}

pub(crate) fn baggage_seeds() -> Vec<Vec<u8>> {
    texts(&[
        "k8s.cluster.name=Kubernetes,k8s.namespace.name=shop,k8s.deployment.name=cart,service.name=cart,\
         service.version=v1,cloud.region=eu,cloud.availability_zone=eu-1a",
        "k8s.job.name=a\0service.name=b , k8s.pod.name=c;p=1",
        "unknown=1,service.name=a=b",
    ])
}

/// What parses is written and read back as itself.
pub fn forwarded(data: &[u8]) {
    let forwarded = Forwarded::parse(data);
    assert_eq!(Forwarded::parse(forwarded.to_string().as_bytes()), forwarded);
    assert!(forwarded.host.is_none_or(|host| host.len() <= 255 && host.is_ascii()));
}

pub(crate) fn forwarded_seeds() -> Vec<Vec<u8>> {
    texts(&[
        "for=\"10.0.0.1:4711\";host=cart.shop.svc.cluster.local",
        "host=\"*.example.com\" ; For=\"[fd00::1%1]:80\"",
        "for=1.2.3.4:5;for=\"[fe80::1]:6\"",
    ])
}

/// What parses is written as it was, and a child keeps its trace.
pub fn traceparent(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let Ok(parent) = text.parse::<TraceParent>() else { return };
    assert_eq!(parent.to_string().parse(), Ok(parent));
    assert!(parent.trace_id() != 0 && parent.span_id() != 0);
    let child = parent.child(0);
    assert_eq!((child.trace_id(), child.sampled()), (parent.trace_id(), parent.sampled()));
    assert_eq!(child.to_string().parse(), Ok(child));
}

pub(crate) fn traceparent_seeds() -> Vec<Vec<u8>> {
    texts(&[
        "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
        "00-00000000000000000000000000000001-0000000000000001-00",
    ])
}

/// An identity is its parts and nothing else; policy names and node names are read as written.
pub fn spiffe_id(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    if let Ok(id) = text.parse::<SpiffeId>() {
        assert_eq!(id.as_str(), text);
        assert_eq!(
            SpiffeId::new(id.trust_domain(), id.namespace(), id.service_account()),
            Ok(id.clone())
        );
        let parts =
            format!("{}/ns/{}/sa/{}", id.trust_domain(), id.namespace(), id.service_account());
        assert_eq!(id.principal(), parts);
        for part in [id.trust_domain(), id.namespace(), id.service_account()] {
            assert!(!part.is_empty() && !part.contains('/'));
        }
    }
    if let Ok(name) = text.parse::<PolicyName>() {
        assert_eq!(name.to_string(), text);
    }
    if let Ok(name) = text.parse::<NodeName>() {
        assert_eq!(name.as_str(), text);
        assert!(!text.contains([' ', '/']) && text.len() <= 253);
    }
}

pub(crate) fn spiffe_id_seeds() -> Vec<Vec<u8>> {
    texts(&["spiffe://cluster.local/ns/shop/sa/cart", "shop/cart", "node-a.example.com"])
}

/// A prefix holds its own network and is read back as itself.
pub fn ip_prefix(data: &[u8]) {
    if let Ok(text) = std::str::from_utf8(data)
        && let Ok(prefix) = text.parse::<IpPrefix>()
    {
        check(prefix);
    }
    if let Some((octets, [length])) = data.split_last_chunk::<1>() {
        if let Ok(octets) = <[u8; 4]>::try_from(octets)
            && let Ok(prefix) = IpPrefix::new(octets.into(), *length)
        {
            check(prefix);
        }
        if let Ok(octets) = <[u8; 16]>::try_from(octets)
            && let Ok(prefix) = IpPrefix::new(octets.into(), *length)
        {
            check(prefix);
        }
    }
}

fn check(prefix: IpPrefix) {
    assert!(prefix.contains(prefix.network()), "{prefix} does not hold its own network");
    assert_eq!(prefix.to_string().parse(), Ok(prefix));
    assert_eq!(IpPrefix::new(prefix.network(), prefix.length()), Ok(prefix));
}

pub(crate) fn ip_prefix_seeds() -> Vec<Vec<u8>> {
    let mut seeds = texts(&["10.1.2.3/8", "fd00::/64", "192.0.2.1", "::ffff:10.0.0.0/104", "::/0"]);
    seeds.push(vec![10, 0, 0, 1, 24]);
    seeds.push([&[0xfd; 16][..], &[64]].concat());
    seeds.push([&[0; 10][..], &[0xff, 0xff, 10, 0, 0, 1, 120]].concat());
    seeds
}

/// A template is written as it was read, and agrees with trying every length of its `{**}`, its literal segments brought to the
/// one spelling in which paths are judged. Template and path stand with a zero byte between.
pub fn path_template(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let (template, path) = text.split_once('\0').unwrap_or((text, "/"));
    let Ok(parsed) = template.parse::<PathTemplate>() else { return };
    assert_eq!(parsed.to_string(), template);
    let segments = |text: &'_ str| text.split('/').map(str::to_owned).collect::<Vec<_>>();
    let fits = path.starts_with('/') && fits(&segments(template), &segments(path));
    assert_eq!(parsed.matches(path), fits, "{template} {path}");
}

fn fits(template: &[String], path: &[String]) -> bool {
    let Some((wanted, template)) = template.split_first() else { return path.is_empty() };
    match wanted.as_str() {
        "{**}" => (1..=path.len()).any(|taken| fits(template, &path[taken..])),
        "{*}" => {
            path.split_first().is_some_and(|(one, path)| !one.is_empty() && fits(template, path))
        }
        literal => path
            .split_first()
            .is_some_and(|(one, path)| *one == path_text(literal) && fits(template, path)),
    }
}

pub(crate) fn path_template_seeds() -> Vec<Vec<u8>> {
    texts(&["/a/{*}/{**}/z\0/a/b/c/z", "/{**}\0/", "/a\0/a/", "/{*}\0/a"])
}

/// What more bytes add to a beginning that was told never changes what was told.
pub fn spoken(data: &[u8]) {
    let mut found = None;
    for length in 0..=data.len().min(64) {
        let now = spoken_by(&data[..length]);
        assert!(found.is_none() || now == found, "{found:?} became {now:?}");
        found = now.or(found);
    }
    assert!(data.len() < 40 || found.is_some(), "40 bytes tell nothing");
}

pub(crate) fn spoken_seeds() -> Vec<Vec<u8>> {
    texts(&[
        "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        "\r\nGET / HTTP/1.1\r\nHost: a\r\n\r\n",
        "VERSION-CONTROL /x HTTP/1.1\r\n",
        "CONNECT a:80 HTTP/1.1\r\n",
        "\u{16}\u{3}\u{1}\u{2}",
    ])
}

/// In whatever pieces the bytes of a connection come, they are judged alike; and what is fine stays fine when it is repeated.
pub fn http1_strict(data: &[u8]) {
    let mut whole = Follower::default();
    let outcome = whole.feed(data);
    let mut pieces = Follower::default();
    let mut slowly = Ok(());
    for piece in data.chunks(3) {
        slowly = pieces.feed(piece);
        if slowly.is_err() {
            break;
        }
    }
    assert_eq!(slowly, outcome);
    if outcome.is_ok() && whole.is_idle() {
        assert_eq!(whole.feed(data), Ok(()), "not the same the second time");
    }
}

pub(crate) fn http1_strict_seeds() -> Vec<Vec<u8>> {
    texts(&[
        "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nhello",
        "POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n3;a=b\r\nabc\r\n0\r\nT: 1\r\n\r\n",
        "GET / HTTP/1.1\r\nA: 1\n b\r\n\r\n",
        "POST / HTTP/1.1\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n",
    ])
}
