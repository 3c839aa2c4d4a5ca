//! The cache against hand-made messages and a slow obvious model.

use std::net::Ipv4Addr;

use hickory_proto::op::{Edns, Message, MessageType, OpCode, Query, ResponseCode};
use hickory_proto::rr::rdata::{A, SOA};
use hickory_proto::rr::{Name, RData, Record as DnsRecord, RecordType};
use proptest::prelude::*;

use super::*;

fn name(text: &str) -> Name {
    Name::from_ascii(text).unwrap()
}

fn query(id: u16, host: &str, edns: Option<u16>) -> Vec<u8> {
    let mut query = Message::new(id, MessageType::Query, OpCode::Query);
    query.metadata.recursion_desired = true;
    query.add_query(Query::query(name(host), RecordType::A));
    if let Some(payload) = edns {
        let mut edns = Edns::new();
        edns.set_max_payload(payload);
        query.set_edns(edns);
    }
    query.to_vec().unwrap()
}

fn response(query: &[u8], change: impl FnOnce(&mut Message)) -> Vec<u8> {
    let query = Message::from_vec(query).unwrap();
    let mut response = Message::response(query.id, OpCode::Query);
    response.metadata.recursion_desired = true;
    response.add_queries(query.queries.iter().cloned());
    change(&mut response);
    response.to_vec().unwrap()
}

fn address(host: &str, ttl: u32) -> DnsRecord {
    DnsRecord::from_rdata(name(host), ttl, RData::A(A(Ipv4Addr::new(192, 0, 2, 1))))
}

fn soa(ttl: u32, minimum: u32) -> DnsRecord {
    let data = SOA::new(name("ns.example."), name("h.example."), 1, 1, 1, 1, minimum);
    DnsRecord::from_rdata(name("example."), ttl, RData::SOA(data))
}

fn scope() -> ResolverScope {
    "192.0.2.53".into()
}

fn seconds(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

/// How long an answer is served, whole seconds.
fn kept_for(response: &[u8], query: &[u8]) -> u64 {
    let start = Instant::now();
    let mut cache = Cache::new(CacheConfig::default());
    cache.store(&scope(), query, response, start);
    (0..1000)
        .find(|after| {
            cache.find(&scope(), query, Transport::Tcp, start + seconds(*after)).is_none()
        })
        .unwrap()
}

#[test]
fn answers_are_kept_as_long_as_they_allow() {
    let ask = query(1, "a.example.", None);
    let check = |expected: u64, what: &str, change: &dyn Fn(&mut Message)| {
        assert_eq!(kept_for(&response(&ask, |message| change(message)), &ask), expected, "{what}");
    };
    check(60, "ttl", &|m| {
        m.add_answer(address("a.example.", 60));
    });
    check(5, "the shortest ttl", &|m| {
        m.add_answer(address("a.example.", 60));
        m.add_answer(address("a.example.", 5));
    });
    check(300, "the longest ttl", &|m| {
        m.add_answer(address("a.example.", 86_400));
    });
    check(0, "ttl zero", &|m| {
        m.add_answer(address("a.example.", 0));
    });
    check(0, "nothing without soa", &|_| ());
    check(7, "nothing with soa", &|m| {
        m.add_authority(soa(20, 7));
    });
    check(30, "no such name", &|m| {
        m.metadata.response_code = ResponseCode::NXDomain;
        m.add_authority(soa(3600, 3600));
    });
    check(0, "no such name without soa", &|m| {
        m.metadata.response_code = ResponseCode::NXDomain;
    });
    check(0, "failure", &|m| {
        m.metadata.response_code = ResponseCode::ServFail;
        m.add_answer(address("a.example.", 60));
    });
    check(0, "truncated", &|m| {
        m.metadata.truncation = true;
        m.add_answer(address("a.example.", 60));
    });
    check(0, "another question's answer", &|m| {
        m.queries.clear();
        m.add_query(Query::query(name("b.example."), RecordType::A));
        m.add_answer(address("a.example.", 60));
    });
    check(0, "a query", &|m| {
        m.metadata.message_type = MessageType::Query;
        m.add_answer(address("a.example.", 60));
    });
}

#[test]
fn an_answer_fits_its_new_query() {
    let start = Instant::now();
    let mut cache = Cache::new(CacheConfig::default());
    let first = query(1, "a.example.", None);
    let stored = response(&first, |m| {
        m.add_answer(address("a.example.", 60));
    });
    cache.store(&scope(), &first, &stored, start);
    let second = query(0xbeef, "A.eXample.", None);
    let found = cache.find(&scope(), &second, Transport::Udp, start + seconds(10)).unwrap();
    let found = Message::from_vec(&found).unwrap();
    assert_eq!(found.id, 0xbeef);
    assert!(found.queries[0].name().eq_case(&name("A.eXample.")));
    assert_eq!(found.answers[0].ttl, 50);
    // Another resolver, another flag, with EDNS: other answers.
    assert!(cache.find(&"other".into(), &second, Transport::Udp, start).is_none());
    let with_edns = query(1, "a.example.", Some(1232));
    assert!(cache.find(&scope(), &with_edns, Transport::Udp, start).is_none());
}

#[test]
fn an_answer_that_does_not_fit_a_datagram_is_not_cut() {
    let start = Instant::now();
    let mut cache = Cache::new(CacheConfig::default());
    let small = query(1, "a.example.", Some(600));
    let stored = response(&small, |m| {
        for _ in 0..60 {
            m.add_answer(address("a.example.", 60));
        }
    });
    cache.store(&scope(), &small, &stored, start);
    assert!(cache.find(&scope(), &small, Transport::Udp, start).is_none());
    assert!(cache.find(&scope(), &small, Transport::Tcp, start).is_some());
    let large = query(1, "a.example.", Some(4000));
    assert!(cache.find(&scope(), &large, Transport::Udp, start).is_some());
}

#[test]
fn the_cache_stays_within_its_bounds() {
    let start = Instant::now();
    let config = CacheConfig { max_entries: 10, max_bytes: 400, ..CacheConfig::default() };
    let mut cache = Cache::new(config);
    for number in 0..1000_u32 {
        let host = format!("h{number}.example.");
        let ask = query(1, &host, None);
        let stored = response(&ask, |m| {
            m.add_answer(address(&host, 1 + number % 100));
        });
        cache.store(&scope(), &ask, &stored, start + seconds(u64::from(number / 10)));
        assert!(cache.entries.len() <= 10 && cache.bytes <= 400);
        assert_eq!(cache.entries.len(), cache.by_expiry.len());
        let bytes: usize = cache.entries.values().map(|entry| entry.response.len()).sum();
        assert_eq!(bytes, cache.bytes);
    }
    let ask = query(1, "big.example.", None);
    let big = response(&ask, |m| {
        for _ in 0..60 {
            m.add_answer(address("big.example.", 60));
        }
    });
    let before = cache.len();
    cache.store(&scope(), &ask, &big, start + seconds(100));
    assert_eq!(cache.len(), before, "an answer larger than the cache throws nothing out");
}

proptest! {
    #[test]
    fn no_bytes_panic(query: Vec<u8>, response: Vec<u8>) {
        let mut cache = Cache::new(CacheConfig::default());
        let now = Instant::now();
        cache.store(&scope(), &query, &response, now);
        prop_assert!(cache.find(&scope(), &query, Transport::Tcp, now).is_none() || !cache.is_empty());
    }

    #[test]
    fn no_damaged_answer_panics(position in 0_usize..60, value: u8, cut in 0_usize..80) {
        let mut cache = Cache::new(CacheConfig::default());
        let now = Instant::now();
        let ask = query(1, "a.example.", None);
        let mut stored = response(&ask, |m| {
            m.add_answer(address("a.example.", 60));
            m.add_authority(soa(20, 7));
        });
        if let Some(byte) = stored.get_mut(position) {
            *byte = value;
        }
        stored.truncate(cut);
        cache.store(&scope(), &ask, &stored, now);
        if let Some(found) = cache.find(&scope(), &ask, Transport::Tcp, now) {
            prop_assert_eq!(found.len(), stored.len());
        }
    }
}
