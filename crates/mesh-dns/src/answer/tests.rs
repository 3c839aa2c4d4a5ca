//! Decisions about queries, on a small mesh.

use std::sync::Arc;

use hickory_proto::op::Edns;
use hickory_proto::rr::RecordType;
use mesh_model::{
    HealthPolicy, HealthStatus, NamespacedHostname, NetworkAddress, NetworkId, Service,
    ServicePort, Visibility, Workload,
};
use mesh_resolve::IndexDelta;
use proptest::prelude::*;

use super::*;

fn service(namespace: &str, hostname: &str, vips: &[&str]) -> Service {
    let name = hostname.split('.').next().unwrap();
    let mut service = Service::named(namespace, hostname, name);
    let vip = |ip: &&str| NetworkAddress::new(NetworkId::default(), ip.parse().unwrap());
    service.vips = vips.iter().map(vip).collect();
    service.ports = vec![ServicePort { service_port: 80, target_port: 8080 }];
    service
}

fn endpoint(namespace: &str, name: &str, host: &str, ips: &[&str]) -> Workload {
    let mut workload = Workload::named(&format!("uid/{name}"), namespace, name);
    workload.addresses = ips.iter().map(|ip| ip.parse().unwrap()).collect();
    workload.services.insert(NamespacedHostname::new(namespace, host), Vec::new());
    workload
}

const HEADLESS: &str = "db.shop.svc.cluster.local";

fn mesh() -> WorkloadIndex {
    let mut private = service("other", "private.example.com", &["240.240.0.9"]);
    private.visibility = Visibility::Namespace;
    let mut remote = service("shop", "remote.shop.svc.cluster.local", &[]);
    remote.vips = vec![NetworkAddress::new(NetworkId::new("far"), "10.9.0.1".parse().unwrap())];
    let mut unready = endpoint("shop", "db-2", HEADLESS, &["10.1.0.4"]);
    unready.status = HealthStatus::Unhealthy;
    let mut given = endpoint("shop", "db-1", HEADLESS, &["10.1.0.3"]);
    given.hostname = format!("second.{HEADLESS}").into();
    let mut far = endpoint("shop", "db-3", HEADLESS, &["10.1.0.5"]);
    far.network = NetworkId::new("far");
    let mut index = WorkloadIndex::default();
    index.apply(IndexDelta {
        services: vec![
            service("shop", "cart.shop.svc.cluster.local", &["10.0.0.1", "fd00::1"]),
            service("shop", "v4.shop.svc.cluster.local", &["10.0.0.2"]),
            service("shop", HEADLESS, &[]),
            service("shop", "empty.shop.svc.cluster.local", &[]),
            service("shop", "api.example.com", &["240.240.0.1", "2001:2::1"]),
            service("shop", "*.wild.example.com", &["240.240.0.2"]),
            service("shop", "*.novip.example.com", &[]),
            service("shop", "novip.example.org", &[]),
            service("shop", "static.example.com", &["198.51.100.7"]),
            private,
            remote,
        ],
        workloads: vec![
            endpoint("shop", "db-0", HEADLESS, &["10.1.0.2", "fd00:1::2"]),
            given,
            unready,
            far,
        ],
        ..IndexDelta::default()
    });
    index
}

fn client() -> DnsClient {
    DnsClient {
        namespace: "shop".into(),
        network: NetworkId::default(),
        search: ["shop.svc.cluster.local", "svc.cluster.local", "cluster.local", "corp.example"]
            .map(Arc::from)
            .to_vec(),
        cluster_domain: "cluster.local".into(),
    }
}

fn query(name: &str, kind: RecordType) -> Message {
    let mut query = Message::new(7, MessageType::Query, OpCode::Query);
    query.metadata.recursion_desired = true;
    query.add_query(Query::query(Name::from_ascii(name).unwrap(), kind));
    query
}

fn decide(query: &Message, transport: Transport) -> DnsDecision {
    answer(&query.to_vec().unwrap(), &client(), &mesh(), transport)
}

#[track_caller]
fn ask(name: &str, kind: RecordType) -> Option<Message> {
    match decide(&query(name, kind), Transport::Tcp) {
        DnsDecision::Reply(bytes) => {
            let reply = Message::from_vec(&bytes).unwrap();
            assert_eq!(reply.response_code, ResponseCode::NoError, "{name}");
            assert!(reply.authoritative && reply.recursion_available && reply.recursion_desired);
            Some(reply)
        }
        DnsDecision::Forward => None,
        DnsDecision::Refuse(refusal, _) => panic!("{name}: {refusal}"),
    }
}

/// The answers' data in text, sorted; `None` when it is forwarded.
#[track_caller]
fn check(name: &str, kind: RecordType, expected: Option<&[&str]>) {
    let found = ask(name, kind).map(|reply| {
        let mut data: Vec<_> = reply.answers.iter().map(|record| record.data.to_string()).collect();
        data.sort();
        data
    });
    let expected = expected.map(|data| data.iter().map(ToString::to_string).collect::<Vec<_>>());
    assert_eq!(found, expected, "{name} {kind}");
}

#[test]
fn services_are_answered_in_every_spelling() {
    use RecordType::{A, AAAA, ANY};
    let cart = "cart.shop.svc.cluster.local.";
    check(cart, A, Some(&["10.0.0.1"]));
    check(cart, AAAA, Some(&["fd00::1"]));
    check(cart, ANY, Some(&["10.0.0.1", "fd00::1"]));
    check("CART.Shop.svc.cluster.LOCAL.", A, Some(&["10.0.0.1"]));
    for short in ["cart.", "cart.shop.", "cart.shop.svc.", "cart.shop.svc.cluster."] {
        check(short, A, Some(&["10.0.0.1"]));
    }
    check("cart.other.", A, None);
    check("cart.shop.svc.clutter.", A, None);
    check("nothing.shop.svc.cluster.local.", A, None);
    check("x.cart.shop.svc.cluster.local.", A, None);
}

#[test]
fn other_types_of_names_nobody_else_knows_are_empty() {
    for kind in [RecordType::AAAA, RecordType::TXT, RecordType::MX, RecordType::HTTPS] {
        let reply = ask("v4.shop.svc.cluster.local.", kind).unwrap();
        assert!(reply.answers.is_empty(), "{kind}");
        assert_eq!(reply.authorities[0].record_type(), RecordType::SOA);
    }
    check("remote.shop.svc.cluster.local.", RecordType::A, Some(&[]));
}

#[test]
fn hosts_of_service_entries_are_only_borrowed() {
    use RecordType::{A, AAAA, HTTPS, MX, SRV, TXT};
    check("api.example.com.", A, Some(&["240.240.0.1"]));
    check("api.example.com.", AAAA, Some(&["2001:2::1"]));
    check("api.example.com.", HTTPS, Some(&[]));
    for kind in [TXT, MX, SRV] {
        check("api.example.com.", kind, None);
    }
    check("novip.example.org.", A, None);
    check("private.example.com.", A, None);
    check("example.com.", A, None);
}

#[test]
fn wildcards_stand_for_one_label_or_more() {
    check("a.wild.example.com.", RecordType::A, Some(&["240.240.0.2"]));
    check("a.b.wild.example.com.", RecordType::A, Some(&["240.240.0.2"]));
    check("wild.example.com.", RecordType::A, None);
    check("a.novip.example.com.", RecordType::A, None);
}

#[test]
fn a_search_domain_is_taken_off_and_shown_as_an_alias() {
    let reply = ask("API.example.com.shop.svc.cluster.local.", RecordType::A).unwrap();
    let [alias, address] = reply.answers.as_slice() else { panic!("{reply}") };
    assert_eq!(alias.data.to_string(), "API.example.com.");
    assert!(
        alias.name.eq_case(&Name::from_ascii("API.example.com.shop.svc.cluster.local.").unwrap())
    );
    assert_eq!(address.data.to_string(), "240.240.0.1");
    assert_eq!(address.name.to_ascii(), "API.example.com.");
    check("cart.shop.corp.example.", RecordType::A, Some(&["10.0.0.1", "cart.shop."]));
    check("cart.corp.example.", RecordType::A, None);
}

#[test]
fn headless_services_are_their_ready_endpoints() {
    use RecordType::{A, AAAA};
    check("db.shop.svc.cluster.local.", A, Some(&["10.1.0.2", "10.1.0.3"]));
    check("db.shop.svc.cluster.local.", AAAA, Some(&["fd00:1::2"]));
    check("db-0.db.shop.svc.cluster.local.", A, Some(&["10.1.0.2"]));
    check("db-0.db.", A, None);
    check("10-1-0-3.db.shop.svc.cluster.local.", A, Some(&["10.1.0.3"]));
    check("second.db.shop.svc.cluster.local.", A, Some(&["10.1.0.3"]));
    check("second.db.", A, None);
    check("second.cart.shop.svc.cluster.local.", A, None);
    check("db-2.db.shop.svc.cluster.local.", A, None);
    check("db-0.cart.shop.svc.cluster.local.", A, None);
    check("empty.shop.svc.cluster.local.", A, Some(&[]));
}

#[test]
fn pods_are_known_by_their_addresses() {
    use RecordType::{A, AAAA, SRV};
    check("10-1-0-2.shop.pod.cluster.local.", A, Some(&["10.1.0.2"]));
    check("10-1-0-2.shop.pod.cluster.local.", AAAA, Some(&[]));
    check("10-1-0-2.shop.pod.cluster.local.", SRV, Some(&[]));
    check("fd00-1--2.shop.pod.cluster.local.", AAAA, Some(&["fd00:1::2"]));
    check("10-1-0-2.shop.pod.", A, Some(&["10.1.0.2"]));
    // Nobody's, of another namespace, of another network; and what spells no address.
    check("10-1-0-9.shop.pod.cluster.local.", A, None);
    check("10-1-0-2.other.pod.cluster.local.", A, None);
    check("10-1-0-5.shop.pod.cluster.local.", A, None);
    check("db-0.shop.pod.cluster.local.", A, None);
    check("x.10-1-0-2.shop.pod.cluster.local.", A, None);
}

#[test]
fn unready_endpoints_take_part_where_the_service_says_so() {
    let mut index = mesh();
    let mut db = service("shop", HEADLESS, &[]);
    db.load_balancing.health_policy = HealthPolicy::AllowAll;
    index.apply(IndexDelta { services: vec![db], ..IndexDelta::default() });
    let ask = query("db.shop.svc.cluster.local.", RecordType::A).to_vec().unwrap();
    let DnsDecision::Reply(bytes) = answer(&ask, &client(), &index, Transport::Tcp) else {
        panic!("not answered")
    };
    assert_eq!(Message::from_vec(&bytes).unwrap().answers.len(), 3);
}

#[test]
fn srv_leads_to_names_that_are_answered_too() {
    use RecordType::SRV;
    check("cart.shop.svc.cluster.local.", SRV, Some(&["0 100 80 cart.shop.svc.cluster.local."]));
    let reply = ask("db.shop.svc.cluster.local.", SRV).unwrap();
    let data: Vec<_> = reply.answers.iter().map(|record| record.data.to_string()).collect();
    assert!(data.contains(&"0 100 8080 db-0.db.shop.svc.cluster.local.".to_owned()), "{data:?}");
    assert!(data.contains(&"0 100 8080 second.db.shop.svc.cluster.local.".to_owned()), "{data:?}");
    assert_eq!(reply.additionals.len(), 3);
    check("_http._tcp.db.shop.svc.cluster.local.", SRV, None);
}

#[test]
fn addresses_of_the_mesh_have_names() {
    use RecordType::PTR;
    check("1.0.0.10.in-addr.arpa.", PTR, Some(&["cart.shop.svc.cluster.local."]));
    check("1.0.240.240.in-addr.arpa.", PTR, Some(&["api.example.com."]));
    check("2.0.240.240.in-addr.arpa.", PTR, None);
    check("7.100.51.198.in-addr.arpa.", PTR, None);
    check("9.9.9.9.in-addr.arpa.", PTR, None);
    check("0.10.in-addr.arpa.", PTR, None);
    let cart = Name::from("fd00::1".parse::<std::net::Ipv6Addr>().unwrap());
    check(&cart.to_ascii(), PTR, Some(&["cart.shop.svc.cluster.local."]));
}

#[test]
fn opcodes_classes_and_odd_questions_are_forwarded() {
    let cart = || query("cart.shop.svc.cluster.local.", RecordType::A);
    for op_code in [OpCode::Update, OpCode::Notify, OpCode::Status] {
        let mut odd = cart();
        odd.metadata.op_code = op_code;
        let bytes = odd.to_vec().unwrap();
        let decision = answer(&bytes, &client(), &mesh(), Transport::Udp);
        assert_eq!(decision, DnsDecision::Forward, "{op_code:?}");
    }
    let mut chaos = cart();
    chaos.queries[0].set_query_class(DNSClass::CH);
    assert_eq!(decide(&chaos, Transport::Udp), DnsDecision::Forward);
    let mut two = cart();
    two.add_query(two.queries[0].clone());
    assert_eq!(decide(&two, Transport::Udp), DnsDecision::Forward);
}

#[test]
fn what_is_no_query_is_refused() {
    let refusal = |bytes: &[u8]| match answer(bytes, &client(), &mesh(), Transport::Udp) {
        DnsDecision::Refuse(refusal, reply) => (refusal, reply.is_some()),
        other => panic!("{other:?}"),
    };
    let cart = query("cart.shop.svc.cluster.local.", RecordType::A).to_vec().unwrap();
    assert_eq!(refusal(b""), (Refusal::TooShort, false));
    assert_eq!(refusal(&cart[..11]), (Refusal::TooShort, false));
    let mut response = cart.clone();
    response[2] |= 0x80;
    assert_eq!(refusal(&response), (Refusal::NotAQuery, false));
    assert_eq!(refusal(&cart[..20]), (Refusal::MalformedQuestion, true));
    let mut tail = cart.clone();
    tail[11] = 1;
    assert_eq!(refusal(&tail), (Refusal::MalformedQuery, true));
    // The same tail behind a name of somebody else's is somebody else's business.
    let mut foreign = query("example.net.", RecordType::A).to_vec().unwrap();
    foreign[11] = 1;
    let decision = answer(&foreign, &client(), &mesh(), Transport::Udp);
    assert_eq!(decision, DnsDecision::Forward);
}

#[test]
fn a_large_answer_is_truncated_to_what_the_client_takes() {
    let mut index = mesh();
    let endpoints = (0..100_u8).map(|n| {
        endpoint(
            "shop",
            &format!("many-{n}"),
            "many.shop.svc.cluster.local",
            &[&format!("10.2.0.{n}")],
        )
    });
    index.apply(IndexDelta {
        services: vec![service("shop", "many.shop.svc.cluster.local", &[])],
        workloads: endpoints.collect(),
        ..IndexDelta::default()
    });
    let size = |transport, payload: Option<u16>| {
        let mut ask = query("many.shop.svc.cluster.local.", RecordType::A);
        if let Some(payload) = payload {
            let mut edns = Edns::new();
            edns.set_max_payload(payload);
            ask.set_edns(edns);
        }
        match answer(&ask.to_vec().unwrap(), &client(), &index, transport) {
            DnsDecision::Reply(bytes) => {
                let reply = Message::from_vec(&bytes).unwrap();
                assert_eq!(reply.edns.is_some(), payload.is_some());
                assert_eq!(reply.message_type, MessageType::Response);
                assert_eq!(reply.truncation, reply.answers.is_empty());
                (bytes.len(), reply.answers.len())
            }
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(size(Transport::Tcp, None).1, 100);
    assert_eq!(size(Transport::Udp, None).1, 0);
    assert_eq!(size(Transport::Udp, Some(1232)).1, 0);
    assert_eq!(size(Transport::Udp, Some(4096)).1, 100);
    assert!(size(Transport::Udp, Some(100)).0 <= 512);
}

#[test]
fn an_unknown_version_of_edns_is_said_so() {
    let mut ask = query("cart.shop.svc.cluster.local.", RecordType::A);
    let mut edns = Edns::new();
    edns.set_version(1);
    ask.set_edns(edns);
    let DnsDecision::Reply(bytes) = decide(&ask, Transport::Udp) else { panic!("not answered") };
    let reply = Message::from_vec(&bytes).unwrap();
    // BADVERS and BADSIG are one number; the parser has to choose a name.
    assert_eq!((u16::from(reply.response_code), reply.answers.len()), (16, 0));
}

#[test]
fn a_failure_keeps_the_id() {
    let ask = query("cart.", RecordType::A).to_vec().unwrap();
    let reply = Message::from_vec(&server_failure(&ask).unwrap()).unwrap();
    assert_eq!((reply.id, reply.response_code), (7, ResponseCode::ServFail));
    assert!(server_failure(b"short").is_none());
    assert!(server_failure(&server_failure(&ask).unwrap()).is_none(), "no answer to an answer");
}

proptest! {
    #[test]
    fn no_bytes_panic(message: Vec<u8>) {
        let decision = answer(&message, &client(), &WorkloadIndex::default(), Transport::Udp);
        prop_assert!(!matches!(decision, DnsDecision::Reply(_)), "nothing is owned");
    }

    #[test]
    fn no_damaged_query_panics_and_every_reply_fits(
        name in "(cart|db|db-0\\.db|a\\.wild)(\\.shop(\\.svc(\\.cluster\\.local)?)?)?\\.",
        kind in prop_oneof![Just(1_u16), Just(28), Just(33), Just(255), any::<u16>()],
        position in 0_usize..60,
        value: u8,
        cut in 10_usize..90,
    ) {
        let mut ask = query(&name, RecordType::from(kind));
        ask.set_edns(Edns::new());
        let mut bytes = ask.to_vec().unwrap();
        if let Some(byte) = bytes.get_mut(position) {
            *byte = value;
        }
        bytes.truncate(cut);
        if let DnsDecision::Reply(reply) = answer(&bytes, &client(), &mesh(), Transport::Udp) {
            prop_assert!(reply.len() <= MAX_UDP_BYTES);
            let reply = Message::from_vec(&reply).unwrap();
            prop_assert_eq!(reply.id, u16::from_be_bytes([bytes[0], bytes[1]]));
            prop_assert_ne!(reply.response_code, ResponseCode::NXDomain);
        }
    }
}
