//! What resolvers answered, kept no longer than they allow.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::answer::Transport;
use crate::wire::{Edns, HEADER_BYTES, Header, MIN_UDP_BYTES, Question, Record, u32_at};

/// Bounds of a cache.
#[derive(Clone, Copy, Debug)]
pub struct CacheConfig {
    /// Most answers kept. Default 4096.
    pub max_entries: usize,
    /// Most bytes of answers kept. Default 2 MiB.
    pub max_bytes: usize,
    /// Longest time an answer is kept, whatever its TTL. Default 5 minutes.
    pub max_ttl: Duration,
    /// Longest time "no such name" is kept. Default 30 s: somebody may be waiting for the name to appear.
    pub max_negative_ttl: Duration,
}

impl Default for CacheConfig {
    fn default() -> Self {
        Self {
            max_entries: 4096,
            max_bytes: 2 * 1024 * 1024,
            max_ttl: Duration::from_secs(300),
            max_negative_ttl: Duration::from_secs(30),
        }
    }
}

/// Whose answers they are: pods share an answer when they ask the same resolvers. The text is the caller's choice.
pub type ResolverScope = Arc<str>;

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Key {
    scope: ResolverScope,
    /// On the wire, in lower case.
    name: Box<[u8]>,
    kind: u16,
    class: u16,
    query_flags: u16,
    /// Whether the query had an OPT record, and its DO bit: the answer differs.
    edns: Option<bool>,
}

#[derive(Debug)]
struct Entry {
    response: Box<[u8]>,
    /// Where its TTLs are.
    ttls_at: Box<[usize]>,
    stored: Instant,
    expires: Instant,
    serial: u64,
}

/// Keeps forwarded answers; a shell's lock goes around it.
///
/// An answer comes out as it went in but for its id, the spelling of the name, and TTLs that have grown shorter.
/// Queries with EDNS options (client subnet, cookies) are neither answered nor kept. At its bounds the answer that
/// expires first goes.
#[derive(Debug)]
pub struct Cache {
    config: CacheConfig,
    entries: HashMap<Key, Entry>,
    by_expiry: BTreeMap<(Instant, u64), Key>,
    bytes: usize,
    serial: u64,
}

/// A query that may be answered from the cache.
struct Cacheable {
    key: Key,
    question: Question,
    udp_limit: usize,
}

impl Cache {
    /// An empty cache.
    #[must_use]
    pub fn new(config: CacheConfig) -> Self {
        Self { config, entries: HashMap::new(), by_expiry: BTreeMap::new(), bytes: 0, serial: 0 }
    }

    /// Answers kept, expired ones included.
    #[must_use]
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// True when nothing is kept.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// The answer to `query`, if one is kept that is still valid at `now` and fits the transport.
    #[must_use]
    pub fn find(
        &self,
        scope: &ResolverScope,
        query: &[u8],
        transport: Transport,
        now: Instant,
    ) -> Option<Vec<u8>> {
        let cacheable = Cacheable::read(scope, query)?;
        let entry = self.entries.get(&cacheable.key)?;
        let fits = transport == Transport::Tcp || entry.response.len() <= cacheable.udp_limit;
        if entry.expires <= now || !fits {
            return None;
        }
        // A part of a second counts as a whole one, so that nobody is told more than is left.
        let elapsed = now.saturating_duration_since(entry.stored);
        let age = elapsed.as_secs() + u64::from(elapsed.subsec_nanos() > 0);
        let age = u32::try_from(age).unwrap_or(u32::MAX);
        let mut response = entry.response.to_vec();
        for at in &entry.ttls_at {
            let ttl = u32_at(&response, *at)?.saturating_sub(age);
            response.get_mut(*at..at + 4)?.copy_from_slice(&ttl.to_be_bytes());
        }
        response.get_mut(..2)?.copy_from_slice(query.get(..2)?);
        let name_end = cacheable.question.name_end;
        response.get_mut(HEADER_BYTES..name_end)?.copy_from_slice(cacheable.question.name(query));
        Some(response)
    }

    /// Keeps `response` to `query`, if it is the kind of answer that may be kept.
    pub fn store(&mut self, scope: &ResolverScope, query: &[u8], response: &[u8], now: Instant) {
        let Some(cacheable) = Cacheable::read(scope, query) else { return };
        let Some((ttl, ttls_at)) = self.lifetime(&cacheable, response) else { return };
        if response.len() > self.config.max_bytes || self.config.max_entries == 0 {
            return;
        }
        let Some(expires) = now.checked_add(ttl) else { return };
        self.remove(&cacheable.key);
        self.make_room(response.len(), now);
        self.serial += 1;
        let entry =
            Entry { response: response.into(), ttls_at, stored: now, expires, serial: self.serial };
        self.bytes += entry.response.len();
        self.by_expiry.insert((expires, self.serial), cacheable.key.clone());
        self.entries.insert(cacheable.key, entry);
    }

    fn make_room(&mut self, bytes: usize, now: Instant) {
        while let Some(((expires, _), key)) = self.by_expiry.first_key_value() {
            let full = self.entries.len() >= self.config.max_entries
                || self.bytes + bytes > self.config.max_bytes;
            if *expires > now && !full {
                return;
            }
            let key = key.clone();
            self.remove(&key);
        }
    }

    fn remove(&mut self, key: &Key) {
        if let Some(entry) = self.entries.remove(key) {
            self.bytes -= entry.response.len();
            self.by_expiry.remove(&(entry.expires, entry.serial));
        }
    }

    /// How long `response` may be kept, and where its TTLs are.
    fn lifetime(&self, query: &Cacheable, response: &[u8]) -> Option<(Duration, Box<[usize]>)> {
        let header = Header::read(response)?;
        let question = Question::read(response)?;
        let same_name = question.name(response).eq_ignore_ascii_case(&query.key.name);
        let usable = header.is_response()
            && header.is_standard_query()
            && !header.is_truncated()
            && header.questions == 1
            && matches!(header.response_code(), NO_ERROR | NO_SUCH_NAME)
            && same_name
            && (question.kind, question.class) == (query.key.kind, query.key.class);
        if !usable {
            return None;
        }
        let counts = [header.answers, header.authorities, header.additionals];
        let records = counts.into_iter().map(usize::from).sum();
        if records > MAX_RECORDS {
            return None;
        }
        let mut at = question.end();
        let mut ttls_at = Vec::with_capacity(records);
        let mut least = u32::MAX;
        let mut negative = None;
        for position in 0..records {
            let record = Record::read(response, at)?;
            at = record.data_end;
            if record.is_opt() {
                // The upper bits of an extended response code: an error after all.
                if record.ttl >> 24 != 0 {
                    return None;
                }
                continue;
            }
            ttls_at.push(record.ttl_at);
            least = least.min(record.ttl);
            let in_authority = position >= usize::from(header.answers);
            if record.is_soa() && in_authority {
                // The last field of its data. Source: RFC 2308 §5.
                let minimum = u32_at(response, record.data_end.checked_sub(4)?)?;
                negative = Some(minimum.min(record.ttl));
            }
        }
        let mut ttl = Duration::from_secs(u64::from(least)).min(self.config.max_ttl);
        let is_negative = header.response_code() == NO_SUCH_NAME || header.answers == 0;
        match negative {
            Some(seconds) => {
                let allowed = Duration::from_secs(u64::from(seconds));
                ttl = ttl.min(allowed).min(self.config.max_negative_ttl);
            }
            None if is_negative => return None,
            None => {}
        }
        (!ttl.is_zero()).then(|| (ttl, ttls_at.into()))
    }
}

const NO_ERROR: u16 = 0;
const NO_SUCH_NAME: u16 = 3;
/// Records of one answer; a message of 64 KiB holds about 4,000 addresses.
const MAX_RECORDS: usize = 4096;

impl Cacheable {
    fn read(scope: &ResolverScope, query: &[u8]) -> Option<Self> {
        let header = Header::read(query)?;
        let plain = !header.is_response()
            && header.is_standard_query()
            && header.questions == 1
            && header.answers == 0
            && header.authorities == 0
            && header.additionals <= 1;
        if !plain {
            return None;
        }
        let question = Question::read(query)?;
        let edns = if header.additionals == 1 {
            let record = Record::read(query, question.end())?;
            Some(record).filter(|record| record.is_opt()).map(Record::edns).map(Some)?
        } else {
            None
        };
        if edns.is_some_and(|edns| edns.has_options) {
            return None;
        }
        let udp_limit = edns.map_or(MIN_UDP_BYTES, |Edns { udp_payload, .. }| {
            usize::from(udp_payload).max(MIN_UDP_BYTES)
        });
        let key = Key {
            scope: Arc::clone(scope),
            name: question.name(query).to_ascii_lowercase().into(),
            kind: question.kind,
            class: question.class,
            query_flags: header.query_flags(),
            edns: edns.map(|edns| edns.dnssec_ok),
        };
        Some(Self { key, question, udp_limit })
    }
}

#[cfg(test)]
#[expect(clippy::disallowed_methods, reason = "a time to count from; sums do not see hash order")]
mod tests;
