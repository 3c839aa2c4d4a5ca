//! The shape of DNS messages, as far as bytes are looked at without taking them apart.

/// Bytes of a header. Source: RFC 1035 §4.1.1.
pub(crate) const HEADER_BYTES: usize = 12;
/// Smallest size every client takes over UDP. Source: RFC 1035 §4.2.1.
pub(crate) const MIN_UDP_BYTES: usize = 512;

const TYPE_SOA: u16 = 6;
const TYPE_OPT: u16 = 41;
/// Longest name on the wire.
const MAX_NAME_BYTES: usize = 255;
/// The DO bit of an OPT record's flags.
const DNSSEC_OK: u32 = 0x8000;

pub(crate) fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    bytes.get(at..at + 2)?.try_into().ok().map(u16::from_be_bytes)
}

pub(crate) fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..at + 4)?.try_into().ok().map(u32::from_be_bytes)
}

/// The fields of a header that decide what is done with a message.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Header {
    flags: u16,
    pub(crate) questions: u16,
    pub(crate) answers: u16,
    pub(crate) authorities: u16,
    pub(crate) additionals: u16,
}

impl Header {
    pub(crate) fn read(message: &[u8]) -> Option<Self> {
        Some(Self {
            flags: u16_at(message, 2)?,
            questions: u16_at(message, 4)?,
            answers: u16_at(message, 6)?,
            authorities: u16_at(message, 8)?,
            additionals: u16_at(message, 10)?,
        })
    }

    pub(crate) const fn is_response(self) -> bool {
        self.flags & 0x8000 != 0
    }

    /// QUERY, the only opcode that is looked into.
    pub(crate) const fn is_standard_query(self) -> bool {
        self.flags & 0x7800 == 0
    }

    pub(crate) const fn is_truncated(self) -> bool {
        self.flags & 0x0200 != 0
    }

    pub(crate) const fn response_code(self) -> u16 {
        self.flags & 0x000f
    }

    /// RD and CD: what a query asks of the resolver.
    pub(crate) const fn query_flags(self) -> u16 {
        self.flags & 0x0110
    }
}

/// Where the one question of a message is.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Question {
    /// End of the question's name.
    pub(crate) name_end: usize,
    pub(crate) kind: u16,
    pub(crate) class: u16,
}

impl Question {
    /// The end of the question, where records begin.
    pub(crate) const fn end(self) -> usize {
        self.name_end + 4
    }

    /// Reads the first question. Its name has no pointers: there is nothing before it to point at.
    pub(crate) fn read(message: &[u8]) -> Option<Self> {
        let name_end = skip_name(message, HEADER_BYTES, false)?;
        Some(Self {
            name_end,
            kind: u16_at(message, name_end)?,
            class: u16_at(message, name_end + 2)?,
        })
    }

    /// The name's bytes.
    pub(crate) fn name(self, message: &[u8]) -> &[u8] {
        message.get(HEADER_BYTES..self.name_end).unwrap_or_default()
    }
}

/// One record's fixed part.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Record {
    pub(crate) kind: u16,
    pub(crate) class: u16,
    /// Where the TTL's four bytes are.
    pub(crate) ttl_at: usize,
    pub(crate) ttl: u32,
    pub(crate) data_at: usize,
    pub(crate) data_end: usize,
}

impl Record {
    pub(crate) fn read(message: &[u8], at: usize) -> Option<Self> {
        let fixed = skip_name(message, at, true)?;
        let data_at = fixed + 10;
        let data_end = data_at + usize::from(u16_at(message, fixed + 8)?);
        (data_end <= message.len()).then_some(())?;
        Some(Self {
            kind: u16_at(message, fixed)?,
            class: u16_at(message, fixed + 2)?,
            ttl_at: fixed + 4,
            ttl: u32_at(message, fixed + 4)?,
            data_at,
            data_end,
        })
    }

    pub(crate) const fn is_opt(self) -> bool {
        self.kind == TYPE_OPT
    }

    pub(crate) const fn is_soa(self) -> bool {
        self.kind == TYPE_SOA
    }

    /// What an OPT record says.
    pub(crate) const fn edns(self) -> Edns {
        Edns {
            udp_payload: self.class,
            dnssec_ok: self.ttl & DNSSEC_OK != 0,
            has_options: self.data_end > self.data_at,
        }
    }
}

/// What an OPT record says. Source: RFC 6891 §6.1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Edns {
    pub(crate) udp_payload: u16,
    pub(crate) dnssec_ok: bool,
    pub(crate) has_options: bool,
}

/// The end of a name that starts at `at`. A pointer ends it; where it leads is not looked at.
fn skip_name(message: &[u8], mut at: usize, pointers: bool) -> Option<usize> {
    let start = at;
    loop {
        let length = *message.get(at)?;
        match length {
            0 => return Some(at + 1),
            1..=63 => at += 1 + usize::from(length),
            192.. if pointers => return message.get(at + 1).map(|_| at + 2),
            _ => return None,
        }
        if at - start >= MAX_NAME_BYTES {
            return None;
        }
    }
}

/// The type of a query's question as a metric label: a bounded set of words.
#[must_use]
pub fn query_type_label(query: &[u8]) -> &'static str {
    match Question::read(query).map(|question| question.kind) {
        Some(1) => "A",
        Some(2) => "NS",
        Some(5) => "CNAME",
        Some(6) => "SOA",
        Some(12) => "PTR",
        Some(15) => "MX",
        Some(16) => "TXT",
        Some(28) => "AAAA",
        Some(33) => "SRV",
        Some(64) => "SVCB",
        Some(65) => "HTTPS",
        Some(255) => "ANY",
        _ => "other",
    }
}
