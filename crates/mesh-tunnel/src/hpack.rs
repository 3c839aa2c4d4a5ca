//! HPACK: a strict decoder with its dynamic table, and an encoder that needs no table of its own. Source: RFC 7541.

use std::collections::VecDeque;

use crate::handover::{DecoderState, EntryState, HandOverError, check};
use crate::huffman;

/// Why a header block cannot be decoded; the connection ends with `COMPRESSION_ERROR`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HpackError {
    /// The block ends inside a field.
    #[error("header block ends inside a field")]
    Truncated,
    /// An integer above 2^28, or written longer than needed for that.
    #[error("integer too large")]
    Integer,
    /// An index into neither table.
    #[error("index outside of both tables")]
    Index,
    /// A Huffman-coded string that is none.
    #[error("invalid huffman code")]
    Huffman,
    /// A list that decodes to more than any limit on header lists would let through.
    #[error("header list longer than 1 MiB")]
    ListTooLong,
    /// A table size above what we allow, or a size update behind a field.
    #[error("dynamic table size update not allowed here")]
    TableSize,
}

/// Bytes an entry counts beyond its name and value. Source: RFC 7541 §4.1.
const ENTRY_OVERHEAD: usize = 32;
/// The table size both sides start with, and the one we keep. Source: RFC 9113 §6.5.2.
const TABLE_SIZE: usize = 4096;

/// Longest list one block may decode to, counted as RFC 9113 §6.5.2 does. A few bytes can name a long entry, or even have it
/// copied; this bounds the work that one block is.
const MAX_LIST: usize = 1 << 20;

/// One entry of the dynamic table: name and value in one allocation.
#[derive(Clone, Debug)]
struct Entry {
    bytes: Box<[u8]>,
    name_len: usize,
}

/// The decoding side of one connection.
#[derive(Clone, Debug)]
pub struct Decoder {
    entries: VecDeque<Entry>,
    size: usize,
    max_size: usize,
    scratch: Vec<u8>,
}

impl Default for Decoder {
    fn default() -> Self {
        Self { entries: VecDeque::new(), size: 0, max_size: TABLE_SIZE, scratch: Vec::new() }
    }
}

/// Where a decoded string lies.
enum Text<'a> {
    Plain(&'a [u8]),
    Scratch(usize, usize),
}

impl Decoder {
    /// Decodes one whole header block, field by field. The table is right afterwards even if `field` ignores what it gets.
    ///
    /// # Errors
    /// When the block breaks RFC 7541. The decoder is of no use then.
    pub fn decode(
        &mut self,
        mut block: &[u8],
        mut field: impl FnMut(&[u8], &[u8]),
    ) -> Result<(), HpackError> {
        let mut updates_allowed = 2;
        let mut list = 0;
        let mut field = |name: &[u8], value: &[u8]| {
            list += name.len() + value.len() + ENTRY_OVERHEAD;
            field(name, value);
            if list > MAX_LIST { Err(HpackError::ListTooLong) } else { Ok(()) }
        };
        while let Some(first) = block.first().copied() {
            if first & 0xe0 == 0x20 {
                // Updates come before the first field, at most two (RFC 7541 §4.2).
                if updates_allowed == 0 {
                    return Err(HpackError::TableSize);
                }
                updates_allowed -= 1;
                let size = take_integer(&mut block, 5)?;
                if size > TABLE_SIZE {
                    return Err(HpackError::TableSize);
                }
                self.max_size = size;
                self.evict(0);
                continue;
            }
            updates_allowed = 0;
            if first & 0x80 != 0 {
                let index = take_integer(&mut block, 7)?;
                let (name, value) = self.entry(index)?;
                field(name, value)?;
                continue;
            }
            let indexing = first & 0x40 != 0;
            let index = take_integer(&mut block, if indexing { 6 } else { 4 })?;
            let mut scratch = std::mem::take(&mut self.scratch);
            scratch.clear();
            let done = self.literal(&mut block, index, indexing, &mut scratch, &mut field);
            scratch.shrink_to(TABLE_SIZE);
            self.scratch = scratch;
            done?;
        }
        Ok(())
    }

    pub(crate) fn state(&self) -> DecoderState {
        let entry = |entry: &Entry| {
            let (name, value) = entry.bytes.split_at(entry.name_len);
            EntryState { name: name.to_vec(), value: value.to_vec() }
        };
        DecoderState {
            max_size: u32::try_from(self.max_size).unwrap_or(u32::MAX),
            entries: self.entries.iter().map(entry).collect(),
        }
    }

    pub(crate) fn from_state(state: &DecoderState) -> Result<Self, HandOverError> {
        let mut decoder = Self { max_size: state.max_size as usize, ..Self::default() };
        check(decoder.max_size <= TABLE_SIZE, "a header table's size")?;
        for EntryState { name, value } in state.entries.iter().rev() {
            let bytes = [&name[..], value].concat().into();
            decoder.insert(Entry { bytes, name_len: name.len() });
        }
        check(decoder.entries.len() == state.entries.len(), "a header table")?;
        Ok(decoder)
    }

    /// Forgets what is only kept for speed.
    pub(crate) fn shrink(&mut self) {
        self.scratch = Vec::new();
    }

    fn literal(
        &mut self,
        block: &mut &[u8],
        index: usize,
        indexing: bool,
        scratch: &mut Vec<u8>,
        field: &mut impl FnMut(&[u8], &[u8]) -> Result<(), HpackError>,
    ) -> Result<(), HpackError> {
        let name = if index == 0 { Some(take_string(block, scratch)?) } else { None };
        let value = take_string(block, scratch)?;
        let name = match &name {
            Some(text) => text.bytes(scratch),
            None => self.entry(index)?.0,
        };
        let value = value.bytes(scratch);
        field(name, value)?;
        if indexing {
            let entry = Entry { bytes: [name, value].concat().into(), name_len: name.len() };
            self.insert(entry);
        }
        Ok(())
    }

    fn entry(&self, index: usize) -> Result<(&[u8], &[u8]), HpackError> {
        let place = index.checked_sub(1).ok_or(HpackError::Index)?;
        if let Some((name, value)) = STATIC_TABLE.get(place) {
            return Ok((name.as_bytes(), value.as_bytes()));
        }
        let entry = self.entries.get(place - STATIC_TABLE.len()).ok_or(HpackError::Index)?;
        Ok(entry.bytes.split_at(entry.name_len))
    }

    fn insert(&mut self, entry: Entry) {
        let size = entry.bytes.len() + ENTRY_OVERHEAD;
        self.evict(size);
        // An entry larger than the table empties it and is not kept (RFC 7541 §4.4).
        if size <= self.max_size {
            self.size += size;
            self.entries.push_front(entry);
        }
    }

    fn evict(&mut self, room: usize) {
        while self.size + room > self.max_size {
            let Some(oldest) = self.entries.pop_back() else { break };
            self.size -= oldest.bytes.len() + ENTRY_OVERHEAD;
        }
    }
}

impl Text<'_> {
    fn bytes<'b>(&'b self, scratch: &'b [u8]) -> &'b [u8] {
        match self {
            Text::Plain(bytes) => bytes,
            Text::Scratch(start, end) => &scratch[*start..*end],
        }
    }
}

/// Source: RFC 7541 §5.1. Values are bounded by 2^28, far above any length here.
fn take_integer(block: &mut &[u8], prefix_bits: u32) -> Result<usize, HpackError> {
    let (first, mut rest) = block.split_first().ok_or(HpackError::Truncated)?;
    let mask = (1usize << prefix_bits) - 1;
    let mut value = usize::from(*first) & mask;
    if value == mask {
        let mut shift = 0;
        loop {
            let (byte, after) = rest.split_first().ok_or(HpackError::Truncated)?;
            rest = after;
            if shift > 21 {
                return Err(HpackError::Integer);
            }
            value += usize::from(byte & 0x7f) << shift;
            shift += 7;
            if byte & 0x80 == 0 {
                break;
            }
        }
    }
    *block = rest;
    Ok(value)
}

fn take_string<'a>(block: &mut &'a [u8], scratch: &mut Vec<u8>) -> Result<Text<'a>, HpackError> {
    let huffman = block.first().ok_or(HpackError::Truncated)? & 0x80 != 0;
    let length = take_integer(block, 7)?;
    let (text, rest) = block.split_at_checked(length).ok_or(HpackError::Truncated)?;
    *block = rest;
    if !huffman {
        return Ok(Text::Plain(text));
    }
    let start = scratch.len();
    // No code is shorter than 5 bits.
    huffman::decode(text, length * 8 / 5, scratch)
        .map_err(|huffman::InvalidHuffman| HpackError::Huffman)?;
    Ok(Text::Scratch(start, scratch.len()))
}

/// Names of the static table that we send, with their index. Source: RFC 7541 appendix A.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum StaticName {
    /// `:authority`
    Authority = 1,
    /// `:method`
    Method = 2,
    /// `:status`
    Status = 8,
}

/// Writes header blocks of literals that no table remembers.
#[derive(Debug, Default)]
pub struct Encoder {
    block: Vec<u8>,
}

impl Encoder {
    /// The block so far.
    #[must_use]
    pub fn into_block(self) -> Vec<u8> {
        self.block
    }

    /// A field of the static table, name and value. `index` must be 1..=61.
    pub fn indexed(&mut self, index: u8) -> &mut Self {
        self.block.push(0x80 | index);
        self
    }

    /// A field whose name is in the static table.
    pub fn static_name(&mut self, name: StaticName, value: &[u8]) -> &mut Self {
        self.block.push(name as u8);
        self.string(value)
    }

    /// A field of its own name, which must be lower case.
    pub fn literal(&mut self, name: &[u8], value: &[u8]) -> &mut Self {
        self.block.push(0);
        self.string(name).string(value)
    }

    fn string(&mut self, text: &[u8]) -> &mut Self {
        match u8::try_from(text.len()) {
            Ok(length) if length < 0x7f => self.block.push(length),
            Ok(_) | Err(_) => {
                self.block.push(0x7f);
                let mut rest = text.len() - 0x7f;
                while rest >= 0x80 {
                    self.block.push(rest.to_le_bytes()[0] | 0x80);
                    rest >>= 7;
                }
                self.block.push(rest.to_le_bytes()[0]);
            }
        }
        self.block.extend_from_slice(text);
        self
    }
}

/// Source: RFC 7541 appendix A.
#[rustfmt::skip]
const STATIC_TABLE: [(&str, &str); 61] = [
    (":authority", ""), (":method", "GET"), (":method", "POST"), (":path", "/"), (":path", "/index.html"),
    (":scheme", "http"), (":scheme", "https"), (":status", "200"), (":status", "204"), (":status", "206"),
    (":status", "304"), (":status", "400"), (":status", "404"), (":status", "500"), ("accept-charset", ""),
    ("accept-encoding", "gzip, deflate"), ("accept-language", ""), ("accept-ranges", ""), ("accept", ""),
    ("access-control-allow-origin", ""), ("age", ""), ("allow", ""), ("authorization", ""),
    ("cache-control", ""), ("content-disposition", ""), ("content-encoding", ""), ("content-language", ""),
    ("content-length", ""), ("content-location", ""), ("content-range", ""), ("content-type", ""),
    ("cookie", ""), ("date", ""), ("etag", ""), ("expect", ""), ("expires", ""), ("from", ""), ("host", ""),
    ("if-match", ""), ("if-modified-since", ""), ("if-none-match", ""), ("if-range", ""),
    ("if-unmodified-since", ""), ("last-modified", ""), ("link", ""), ("location", ""), ("max-forwards", ""),
    ("proxy-authenticate", ""), ("proxy-authorization", ""), ("range", ""), ("referer", ""), ("refresh", ""),
    ("retry-after", ""), ("server", ""), ("set-cookie", ""), ("strict-transport-security", ""),
    ("transfer-encoding", ""), ("user-agent", ""), ("vary", ""), ("via", ""), ("www-authenticate", ""),
];

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(hex: &str) -> Vec<u8> {
        let hex: String = hex.split_whitespace().collect();
        (0..hex.len()).step_by(2).map(|i| u8::from_str_radix(&hex[i..i + 2], 16).unwrap()).collect()
    }

    fn decode(decoder: &mut Decoder, block: &[u8]) -> Result<Vec<String>, HpackError> {
        let mut fields = Vec::new();
        decoder.decode(block, |name, value| {
            let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
            fields.push(format!("{}: {}", text(name), text(value)));
        })?;
        Ok(fields)
    }

    #[test]
    fn the_rfc_request_examples_decode() {
        // RFC 7541 C.3 and C.4: the same three requests, plain and Huffman-coded.
        for blocks in [
            [
                "8286 8441 0f77 7777 2e65 7861 6d70 6c65 2e63 6f6d",
                "8286 84be 5808 6e6f 2d63 6163 6865",
                "8287 85bf 400a 6375 7374 6f6d 2d6b 6579 0c63 7573 746f 6d2d 7661 6c75 65",
            ],
            [
                "8286 8441 8cf1 e3c2 e5f2 3a6b a0ab 90f4 ff",
                "8286 84be 5886 a8eb 1064 9cbf",
                "8287 85bf 4088 25a8 49e9 5ba9 7d7f 8925 a849 e95b b8e8 b4bf",
            ],
        ] {
            let mut decoder = Decoder::default();
            let lists = blocks.map(|block| decode(&mut decoder, &bytes(block)).unwrap().join("; "));
            assert_eq!(
                lists,
                [
                    ":method: GET; :scheme: http; :path: /; :authority: www.example.com",
                    ":method: GET; :scheme: http; :path: /; :authority: www.example.com; cache-control: no-cache",
                    ":method: GET; :scheme: https; :path: /index.html; :authority: www.example.com; custom-key: custom-value",
                ]
            );
            assert_eq!(decoder.size, 164);
        }
    }

    #[test]
    fn entries_are_evicted_by_size() {
        let mut decoder = Decoder::default();
        let mut encoder = Encoder::default();
        encoder.literal(b"name", &[b'v'; 1000]);
        let mut block = encoder.into_block();
        block[0] = 0x40;
        for _ in 0..5 {
            decode(&mut decoder, &block).unwrap();
        }
        assert_eq!((decoder.entries.len(), decoder.size), (3, 3 * 1036));
        assert_eq!(decode(&mut decoder, &[0x3f, 0xe1, 0x07, 0x82]).unwrap().len(), 1);
        assert_eq!((decoder.entries.len(), decoder.size), (0, 0));
    }

    #[test]
    fn broken_blocks_are_refused() {
        for (block, error) in [
            ("80", HpackError::Index),
            ("be", HpackError::Index),
            ("ffff", HpackError::Truncated),
            ("ff", HpackError::Truncated),
            ("40", HpackError::Truncated),
            ("4001", HpackError::Truncated),
            ("400161", HpackError::Truncated),
            ("ffff ffff ffff 01", HpackError::Integer),
            ("ff80 8080 8000", HpackError::Integer),
            ("0081 00 00", HpackError::Huffman),
            ("3fe2 1f", HpackError::TableSize),
            ("82 20", HpackError::TableSize),
            ("20 20 20", HpackError::TableSize),
        ] {
            let result = decode(&mut Decoder::default(), &bytes(block));
            assert_eq!(result, Err(error), "{block}");
        }
    }

    #[test]
    fn what_is_encoded_is_decoded() {
        for length in [0, 1, 126, 127, 128, 254, 255, 20_000] {
            let mut encoder = Encoder::default();
            encoder
                .static_name(StaticName::Method, b"CONNECT")
                .literal(b"x", &vec![b'y'; length])
                .indexed(8);
            let fields = decode(&mut Decoder::default(), &encoder.into_block()).unwrap();
            assert_eq!(fields[0], ":method: CONNECT");
            assert_eq!(fields[1].len(), 3 + length);
            assert_eq!(fields[2], ":status: 200");
        }
    }
}
