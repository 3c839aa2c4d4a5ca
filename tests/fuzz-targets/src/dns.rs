//! DNS messages from pods and from resolvers.

use std::sync::Arc;
use std::time::{Duration, Instant};

use hickory_proto::op::{Message, MessageType, Query};
use hickory_proto::rr::rdata::A;
use hickory_proto::rr::{Name, RData, Record, RecordType};
use mesh_dns::{
    Cache, CacheConfig, DnsClient, DnsDecision, Refusal, ResolverScope, Transport, answer,
    query_type_label, server_failure,
};
use mesh_model::{NamespacedHostname, NetworkAddress, NetworkId, Service, Workload};
use mesh_resolve::{IndexDelta, WorkloadIndex};

use crate::input::{Input, long};

fn index() -> WorkloadIndex {
    let host = |name: &str| format!("{name}.shop.svc.cluster.local");
    let vip = |ip: [u8; 4]| NetworkAddress::new(NetworkId::default(), ip.into());
    let mut cart = Service::named("shop", &host("cart"), "cart");
    cart.vips = vec![vip([10, 96, 0, 1])];
    let headless = Service::named("shop", &host("db"), "db");
    let mut wildcard = Service::named("shop", "*.example.com", "outside");
    wildcard.vips = vec![vip([240, 240, 0, 1])];
    let workloads = (0..40).map(|number: u8| {
        let mut pod =
            Workload::named(&format!("K//Pod/shop/db-{number}"), "shop", &format!("db-{number}"));
        pod.addresses =
            vec![[10, 0, 0, number].into(), [0xfd00, 0, 0, 0, 0, 0, 0, number.into()].into()];
        pod.services.insert(NamespacedHostname::new("shop", &host("db")), Vec::new());
        pod
    });
    let mut index = WorkloadIndex::default();
    index.apply(IndexDelta {
        workloads: workloads.collect(),
        services: vec![cart, headless, wildcard],
        ..IndexDelta::default()
    });
    index
}

fn pod() -> DnsClient {
    DnsClient {
        namespace: "shop".into(),
        network: NetworkId::default(),
        search: ["shop.svc.cluster.local", "svc.cluster.local", "cluster.local"]
            .map(Arc::from)
            .to_vec(),
        cluster_domain: "cluster.local".into(),
    }
}

/// A message from a pod: an answer is a message of the asked id and question, within the size the transport takes.
pub fn query(data: &[u8]) {
    thread_local! {
        static WORLD: (WorkloadIndex, DnsClient) = (index(), pod());
    }
    let mut input = Input::new(data);
    let transport = if input.byte() & 1 == 0 { Transport::Udp } else { Transport::Tcp };
    let message = input.rest();
    assert!(!query_type_label(message).is_empty());
    if let Some(failure) = server_failure(message) {
        check_header(message, &failure);
    }
    let decision = WORLD.with(|(index, client)| answer(message, client, index, transport));
    match decision {
        DnsDecision::Forward => {}
        DnsDecision::Refuse(Refusal::TooShort | Refusal::NotAQuery, reply) => {
            assert_eq!(reply, None)
        }
        DnsDecision::Refuse(Refusal::MalformedQuestion | Refusal::MalformedQuery, reply) => {
            check_header(message, &reply.expect("a query can be answered"));
        }
        DnsDecision::Reply(reply) => {
            check_header(message, &reply);
            let limit = if transport == Transport::Udp { 4096 } else { 65_535 };
            assert!(reply.len() <= limit, "{} bytes", reply.len());
            let asked = Message::from_vec(message).expect("it was understood");
            let reply = Message::from_vec(&reply).expect("what we answer can be read");
            assert_eq!(reply.queries, asked.queries);
        }
    }
}

fn check_header(query: &[u8], reply: &[u8]) {
    assert!(reply.len() >= 12);
    assert_eq!(reply[..2], query[..2], "another id");
    assert_eq!(reply[2] & 0x80, 0x80, "not a response");
}

fn ask(name: &str, kind: RecordType) -> Message {
    let mut message = Message::query();
    message.metadata.id = 0x1234;
    message.metadata.recursion_desired = true;
    message.add_query(Query::query(Name::from_ascii(name).expect("a name"), kind));
    message
}

fn bytes(message: &Message) -> Vec<u8> {
    message.to_vec().expect("a message that can be written")
}

pub(crate) fn query_seeds() -> Vec<Vec<u8>> {
    let names = [
        ("cart.shop.svc.cluster.local.", RecordType::A),
        ("cart.shop.", RecordType::AAAA),
        ("db.shop.svc.cluster.local.", RecordType::A),
        ("db-1.db.shop.svc.cluster.local.", RecordType::AAAA),
        ("a.b.example.com.shop.svc.cluster.local.", RecordType::A),
        ("_http._tcp.db.shop.svc.cluster.local.", RecordType::SRV),
        ("1.0.96.10.in-addr.arpa.", RecordType::PTR),
        ("nothing.example.", RecordType::MX),
    ];
    let seeds = names.into_iter().enumerate();
    seeds
        .map(|(number, (name, kind))| {
            [vec![u8::from(number % 3 == 0)], bytes(&ask(name, kind))].concat()
        })
        .collect()
}

/// A resolver's answer that is kept comes out for the same question alone, under the new id, and never lives longer.
pub fn cache(data: &[u8]) {
    thread_local! {
        static START: Instant = Instant::now();
    }
    let mut input = Input::new(data);
    let later = Duration::from_secs(u64::from(input.u16()));
    let (query, response, other) = (input.long(), input.long(), input.long());
    let now = START.with(|start| *start);
    let config = CacheConfig { max_entries: 2, ..CacheConfig::default() };
    let longest = config.max_ttl.max(config.max_negative_ttl);
    let mut cache = Cache::new(config);
    let scope: ResolverScope = "resolvers".into();
    cache.store(&scope, query, response, now);
    cache.store(&scope, other, response, now);
    assert!(cache.len() <= 2);
    for asked in [query, other] {
        if let Some(kept) = cache.find(&scope, asked, Transport::Tcp, now) {
            assert_eq!(kept[..2], asked[..2], "another id");
            assert_eq!(kept.len(), response.len());
            let asked_name = &asked[12..];
            assert!(
                kept[12..].iter().zip(asked_name).take_while(|(one, two)| one == two).count() > 0
            );
        }
        if cache.find(&scope, asked, Transport::Udp, now + later).is_some() {
            assert!(later < longest);
        }
        assert!(cache.find(&"other".into(), asked, Transport::Tcp, now).is_none());
    }
    for number in 0..4_u8 {
        let mut more = query.to_vec();
        if let Some(letter) = more.get_mut(13) {
            *letter = b'a' + number;
        }
        let mut fits = response.to_vec();
        if let Some(letter) = fits.get_mut(13) {
            *letter = b'a' + number;
        }
        cache.store(&scope, &more, &fits, now + later);
        assert!(cache.len() <= 2, "the bound does not hold");
    }
}

pub(crate) fn cache_seeds() -> Vec<Vec<u8>> {
    let asked = ask("www.example.org.", RecordType::A);
    let mut answered = asked.clone();
    answered.metadata.message_type = MessageType::Response;
    let name = Name::from_ascii("www.example.org.").expect("a name");
    answered.add_answer(Record::from_rdata(name, 60, RData::A(A::new(192, 0, 2, 1))));
    let seed = |later: [u8; 2], answer: &Message| {
        [later.to_vec(), long(&bytes(&asked)), long(&bytes(answer)), long(&bytes(&asked))].concat()
    };
    let mut missing = answered.clone();
    missing.answers.clear();
    missing.metadata.response_code = hickory_proto::op::ResponseCode::NXDomain;
    vec![seed([0, 30], &answered), seed([0, 61], &answered), seed([0, 1], &missing)]
}
