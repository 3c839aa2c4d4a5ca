//! One query, one decision.

use std::net::IpAddr;

use hickory_proto::op::{Edns, Message, MessageType, OpCode, Query, ResponseCode};
use hickory_proto::rr::rdata::{A, AAAA, CNAME, PTR, SOA, SRV};
use hickory_proto::rr::{DNSClass, Name, RData, Record, RecordType};
use hickory_proto::serialize::binary::{BinDecodable as _, BinDecoder};
use mesh_model::canonical_ip;
use mesh_resolve::WorkloadIndex;

use crate::owner::{DnsClient, Owner};
use crate::wire::{HEADER_BYTES, Header, MIN_UDP_BYTES};

/// How long answers may be kept, seconds. Source: ztunnel's DNS proxy.
pub const TTL_SECONDS: u32 = 30;

/// The largest UDP answer, bytes, however much the client says it takes: it stays within the pod, where nothing is
/// fragmented.
const MAX_UDP_BYTES: usize = 4096;
/// What is announced to the client as our own limit. Source: the DNS flag day 2020's recommendation.
const ANNOUNCED_UDP_BYTES: u16 = 1232;
/// Addresses in one answer.
const MAX_ANSWERS: usize = 1000;
/// The largest message, bytes. Source: RFC 1035 §4.2.2.
const MAX_TCP_BYTES: usize = 65_535;

/// How a query came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    /// In a datagram; the answer's size is limited.
    Udp,
    /// On a stream, behind its length.
    Tcp,
}

/// What is done with a query.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DnsDecision {
    /// The mesh owns the name: this is the answer.
    Reply(Vec<u8>),
    /// It is not the mesh's: to the pod's resolvers, byte for byte.
    Forward,
    /// It is no query; where an answer is possible at all, this is it.
    Refuse(Refusal, Option<Vec<u8>>),
}

/// Why a message is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// Shorter than a DNS header.
    #[error("shorter than a dns header")]
    TooShort,
    /// A response where queries are expected.
    #[error("a response, not a query")]
    NotAQuery,
    /// The question cannot be read.
    #[error("malformed question")]
    MalformedQuestion,
    /// The question is for an owned name, and what follows it cannot be read.
    #[error("malformed query for a name of the mesh")]
    MalformedQuery,
}

/// Decides about one message of `client`.
#[must_use]
pub fn answer(
    message: &[u8],
    client: &DnsClient,
    index: &WorkloadIndex,
    transport: Transport,
) -> DnsDecision {
    let Some(header) = Header::read(message) else {
        return DnsDecision::Refuse(Refusal::TooShort, None);
    };
    if header.is_response() {
        return DnsDecision::Refuse(Refusal::NotAQuery, None);
    }
    if !header.is_standard_query() || header.questions != 1 {
        return DnsDecision::Forward;
    }
    let question = message
        .get(HEADER_BYTES..)
        .and_then(|_| Query::read(&mut BinDecoder::new(message).clone(HEADER_BYTES_U16)).ok());
    let Some(question) = question else {
        return refuse(message, Refusal::MalformedQuestion);
    };
    if !matches!(question.query_class(), DNSClass::IN | DNSClass::ANY) {
        return DnsDecision::Forward;
    }
    let Some(found) = look_up(&question, client, index) else {
        return DnsDecision::Forward;
    };
    let Ok(query) = Message::from_vec(message) else {
        return refuse(message, Refusal::MalformedQuery);
    };
    DnsDecision::Reply(reply(&query, found, client, transport))
}

#[expect(clippy::cast_possible_truncation, reason = "twelve")]
const HEADER_BYTES_U16: u16 = HEADER_BYTES as u16;

/// The records about an owned name.
struct Found {
    answers: Vec<Record>,
    additionals: Vec<Record>,
    /// True when the cluster's domain, and so its SOA, is ours.
    authoritative_zone: bool,
}

/// `None`: nobody of ours, or a type that others know better.
#[expect(
    clippy::wildcard_enum_match_arm,
    reason = "record types are the protocol's, hundreds of them"
)]
fn look_up(question: &Query, client: &DnsClient, index: &WorkloadIndex) -> Option<Found> {
    let kind = question.query_type();
    if kind == RecordType::PTR {
        return look_up_address(question, client, index);
    }
    let name = question.name();
    let owner = client.owner(index, &plain_text(name))?;
    let mut found = Found {
        answers: Vec::new(),
        additionals: Vec::new(),
        authoritative_zone: owner.authoritative,
    };
    let owner_name = match &owner.alias_of {
        None => name.clone(),
        Some(text) => {
            let target = stripped(name, text)?;
            found.answers.push(record(name, RData::CNAME(CNAME(target.clone()))));
            target
        }
    };
    let wanted = |ip: &IpAddr| match kind {
        RecordType::A => ip.is_ipv4(),
        RecordType::AAAA => ip.is_ipv6(),
        _ => true,
    };
    match kind {
        RecordType::A | RecordType::AAAA | RecordType::ANY => {
            let addresses = client.addresses(index, &owner.owned);
            let records = addresses.iter().filter(|ip| wanted(ip)).take(MAX_ANSWERS);
            found.answers.extend(records.map(|ip| address_record(&owner_name, *ip)));
        }
        RecordType::SRV if owner.authoritative => {
            service_records(&mut found, &owner_name, client, index, &owner);
        }
        RecordType::CNAME => {}
        // Hints in these records would lead clients past the addresses answered here.
        RecordType::HTTPS | RecordType::SVCB => {}
        // Nobody else knows these names. A resolver's NXDOMAIN would hide their addresses as well.
        _ if owner.authoritative => {}
        // TXT, MX and the like of a ServiceEntry's host are the real host's.
        _ => return None,
    }
    Some(found)
}

fn look_up_address(question: &Query, client: &DnsClient, index: &WorkloadIndex) -> Option<Found> {
    let net = question.name().parse_arpa_name().ok()?;
    if net.prefix_len() != net.max_prefix_len() {
        return None;
    }
    let service = client.owner_of_address(index, canonical_ip(net.addr()))?;
    let target = Name::from_ascii(format!("{}.", service.key.hostname)).ok()?;
    let pointer = record(question.name(), RData::PTR(PTR(target)));
    Some(Found { answers: vec![pointer], additionals: Vec::new(), authoritative_zone: false })
}

/// Source: Kubernetes DNS specification 1.1.0 §2.3.2, §2.4.2. Names of ports do not reach the index, so that
/// `_port._proto` in front of a name is not known here and is forwarded.
fn service_records(
    found: &mut Found,
    name: &Name,
    client: &DnsClient,
    index: &WorkloadIndex,
    owner: &Owner,
) {
    for target in client.targets(index, &owner.owned) {
        let target_name = match &target.label {
            None => Ok(name.clone()),
            Some(label) => name.prepend_label(label.as_str()),
        };
        // A name that would be too long has no record.
        let Ok(target_name) = target_name else { continue };
        for port in target.ports {
            let srv = SRV::new(0, 100, port, target_name.clone());
            found.answers.push(record(name, RData::SRV(srv)));
        }
        let addresses = target.addresses.iter().map(|ip| address_record(&target_name, *ip));
        found.additionals.extend(addresses);
    }
    found.answers.truncate(MAX_ANSWERS);
    found.additionals.truncate(MAX_ANSWERS);
}

fn record(name: &Name, data: RData) -> Record {
    Record::from_rdata(name.clone(), TTL_SECONDS, data)
}

fn address_record(name: &Name, ip: IpAddr) -> Record {
    let data = match ip {
        IpAddr::V4(ip) => RData::A(A(ip)),
        IpAddr::V6(ip) => RData::AAAA(AAAA(ip)),
    };
    record(name, data)
}

/// The name as the index writes it: lower case, no trailing dot. Bytes that no host name has come out escaped and match
/// nothing.
fn plain_text(name: &Name) -> String {
    let mut text = name.to_ascii();
    text.make_ascii_lowercase();
    if text.ends_with('.') {
        text.pop();
    }
    text
}

/// The first labels of `name`, in the client's own spelling, that make up `text`.
fn stripped(name: &Name, text: &str) -> Option<Name> {
    let labels = text.split('.').count();
    let mut stripped = Name::from_labels(name.iter().take(labels)).ok()?;
    stripped.set_fqdn(true);
    Some(stripped)
}

fn reply(query: &Message, found: Found, client: &DnsClient, transport: Transport) -> Vec<u8> {
    let mut reply = Message::new(query.id, MessageType::Response, OpCode::Query);
    reply.metadata.recursion_desired = query.recursion_desired;
    reply.metadata.checking_disabled = query.checking_disabled;
    reply.metadata.authoritative = true;
    reply.metadata.recursion_available = true;
    reply.add_queries(query.queries.iter().cloned());
    let limit = match (transport, &query.edns) {
        (Transport::Tcp, _) => MAX_TCP_BYTES,
        (Transport::Udp, None) => MIN_UDP_BYTES,
        (Transport::Udp, Some(edns)) => {
            usize::from(edns.max_payload()).clamp(MIN_UDP_BYTES, MAX_UDP_BYTES)
        }
    };
    if let Some(edns) = &query.edns {
        let mut own = Edns::new();
        own.set_max_payload(ANNOUNCED_UDP_BYTES).set_dnssec_ok(edns.flags().dnssec_ok);
        reply.set_edns(own);
        if edns.version() != 0 {
            reply.metadata.response_code = ResponseCode::BADVERS;
            return encode(&reply, limit);
        }
    }
    let Found { mut answers, additionals, authoritative_zone } = found;
    if answers.is_empty() && authoritative_zone {
        reply.authorities.extend(start_of_authority(client));
    }
    rotate_addresses(&mut answers, query.id);
    reply.answers = answers;
    reply.additionals = additionals;
    encode(&reply, limit)
}

/// Clients take the first address; a different one each time spreads them. An alias stays in front.
fn rotate_addresses(answers: &mut [Record], entropy: u16) {
    let aliases = answers.iter().take_while(|record| record.record_type() == RecordType::CNAME);
    let aliases = aliases.count();
    if let Some(addresses) = answers.get_mut(aliases..)
        && !addresses.is_empty()
    {
        let by = usize::from(entropy) % addresses.len();
        addresses.rotate_left(by);
    }
}

/// What lets "no such record" be cached, for no longer than an answer. Source: RFC 2308 §3.
fn start_of_authority(client: &DnsClient) -> Option<Record> {
    let zone = Name::from_ascii(format!("{}.", client.cluster_domain)).ok()?;
    let mname = Name::from_ascii("ns.dns").ok()?.append_domain(&zone).ok()?;
    let rname = Name::from_ascii("hostmaster").ok()?.append_domain(&zone).ok()?;
    let soa = SOA::new(mname, rname, 1, 7200, 1800, 86_400, TTL_SECONDS);
    Some(record(&zone, RData::SOA(soa)))
}

/// The reply in `limit` bytes: whole, else without additional records, else with nothing but the flag that says so.
fn encode(reply: &Message, limit: usize) -> Vec<u8> {
    let fits = |bytes: &Vec<u8>| bytes.len() <= limit;
    if let Some(bytes) = reply.to_vec().ok().filter(fits) {
        return bytes;
    }
    let mut smaller = reply.clone();
    smaller.additionals.clear();
    if let Some(bytes) = smaller.to_vec().ok().filter(fits) {
        return bytes;
    }
    let mut truncated = reply.truncate();
    truncated.metadata.message_type = MessageType::Response;
    truncated.to_vec().unwrap_or_default()
}

fn refuse(message: &[u8], refusal: Refusal) -> DnsDecision {
    DnsDecision::Refuse(refusal, error_reply(message, FORMAT_ERROR))
}

const FORMAT_ERROR: u8 = 1;
const SERVER_FAILURE: u8 = 2;

/// The answer to a query that cannot be served now: an unknown client, no resolver that answers. `None` when `query` is
/// no query.
#[must_use]
pub fn server_failure(query: &[u8]) -> Option<Vec<u8>> {
    let header = Header::read(query)?;
    if header.is_response() {
        return None;
    }
    error_reply(query, SERVER_FAILURE)
}

/// A bare header: the only answer to a message whose rest may be anything.
fn error_reply(message: &[u8], code: u8) -> Option<Vec<u8>> {
    let mut reply = vec![0; HEADER_BYTES];
    reply.get_mut(..4)?.copy_from_slice(message.get(..4)?);
    let flags = reply.get_mut(2..4)?;
    // QR set; opcode, RD kept; AA, TC cleared; RA set; the rest is the code.
    flags[0] = 0x80 | (flags[0] & 0x79);
    flags[1] = 0x80 | code;
    Some(reply)
}

#[cfg(test)]
#[expect(clippy::wildcard_enum_match_arm, reason = "any other outcome fails the test")]
mod tests;
