//! HTTP/2 frames and header blocks.

use fluke_hpack::decoder::DecoderError;
use mesh_tunnel::wire::{
    Decoder, Encoder, ErrorCode, FrameEvent, FrameHeader, FrameKind, FrameReader, StaticName,
};

use crate::input::{Input, long};

/// Largest frame and header block the readers under test take, bytes.
const MAX_FRAME: u32 = 20_000;
const MAX_BLOCK: usize = 8 << 10;

pub(crate) const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// What a byte stream was read as, however it was cut.
#[derive(Debug, PartialEq, Eq)]
enum Seen {
    Data { header: FrameHeader, bytes: Vec<u8>, padding: u32 },
    Headers { stream: u32, end_stream: bool, block: Vec<u8> },
    Control { header: FrameHeader, body: Vec<u8> },
    Error(ErrorCode),
}

/// The reader says the same wherever the stream is cut, takes every byte, and keeps no more than it may.
pub fn frame(data: &[u8]) {
    let mut input = Input::new(data);
    let preface = input.byte() & 1 == 1;
    let step = usize::from(input.byte());
    let bytes = input.rest();
    let whole = read(preface, bytes, usize::MAX);
    assert_eq!(whole, read(preface, bytes, 1), "cut everywhere");
    assert_eq!(whole, read(preface, bytes, step.max(1)), "cut every {step} bytes");
    if let Some(first) = bytes.first_chunk::<9>() {
        let header = FrameHeader::parse(first);
        if header.kind != FrameKind::Unknown {
            let mut canonical = *first;
            canonical[5] &= 0x7f;
            assert_eq!(header.bytes(), canonical);
        }
    }
}

fn read(preface: bool, bytes: &[u8], step: usize) -> Vec<Seen> {
    let mut reader = FrameReader::new(preface, MAX_FRAME, MAX_BLOCK);
    let mut seen = Vec::new();
    let mut open: Option<(FrameHeader, Vec<u8>)> = None;
    for chunk in bytes.chunks(step.min(bytes.len()).max(1)) {
        let mut rest = chunk;
        loop {
            let (taken, event) = match reader.advance(rest) {
                Ok(advanced) => advanced,
                Err(code) => {
                    seen.push(Seen::Error(code));
                    return seen;
                }
            };
            assert!(taken <= rest.len());
            assert!(
                reader.body().len() <= MAX_BLOCK.max(6 * 64),
                "{} bytes kept",
                reader.body().len()
            );
            match event {
                None => {
                    assert_eq!(taken, rest.len(), "bytes left without a word");
                    break;
                }
                Some(FrameEvent::DataStart(header)) => open = Some((header, Vec::new())),
                Some(FrameEvent::Data { stream, range }) => {
                    let (header, bytes) = open.as_mut().expect("DATA was begun");
                    assert_eq!(header.stream, stream);
                    assert!(range.end <= taken);
                    bytes.extend(&rest[range]);
                }
                Some(FrameEvent::DataEnd { header, padding }) => {
                    let (begun, bytes) = open.take().expect("DATA was begun");
                    assert_eq!(begun, header);
                    assert_eq!(header.length as usize, bytes.len() + padding as usize);
                    seen.push(Seen::Data { header, bytes, padding });
                }
                Some(FrameEvent::Headers { stream, end_stream }) => {
                    let block = reader.body().to_vec();
                    seen.push(Seen::Headers { stream, end_stream, block });
                }
                Some(FrameEvent::Control(header)) => {
                    seen.push(Seen::Control { header, body: reader.body().to_vec() });
                }
            }
            rest = &rest[taken..];
        }
    }
    seen
}

/// A frame's bytes.
pub(crate) fn frame_bytes(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap_or(u32::MAX).to_be_bytes();
    let mut frame = vec![length[1], length[2], length[3], kind, flags];
    frame.extend(stream.to_be_bytes());
    frame.extend(payload);
    frame
}

/// A CONNECT's header block.
pub(crate) fn connect_block() -> Vec<u8> {
    let mut encoder = Encoder::default();
    encoder
        .static_name(StaticName::Method, b"CONNECT")
        .static_name(StaticName::Authority, b"10.0.0.2:80")
        .literal(b"baggage", b"k8s.namespace.name=shop");
    encoder.into_block()
}

pub(crate) fn frame_seeds() -> Vec<Vec<u8>> {
    let block = connect_block();
    let talk = [
        PREFACE.to_vec(),
        frame_bytes(4, 0, 0, &[0, 4, 0, 1, 0, 0]),
        frame_bytes(4, 1, 0, &[]),
        frame_bytes(1, 4, 1, &block),
        frame_bytes(0, 0, 1, b"hello"),
        frame_bytes(0, 9, 1, &[&[3][..], b"bye", &[0; 3]].concat()),
        frame_bytes(8, 0, 0, &1024_u32.to_be_bytes()),
        frame_bytes(6, 0, 0, &[1; 8]),
        frame_bytes(3, 0, 1, &8_u32.to_be_bytes()),
        frame_bytes(7, 0, 0, &[&[0; 8][..], b"why"].concat()),
    ]
    .concat();
    let split = [
        frame_bytes(4, 0, 0, &[]),
        frame_bytes(1, 0x29, 3, &[&[2, 0, 0, 0, 1, 16][..], &block[..5], &[0, 0]].concat()),
        frame_bytes(9, 0, 3, &block[5..9]),
        frame_bytes(9, 4, 3, &block[9..]),
        frame_bytes(2, 0, 3, &[0; 5]),
        frame_bytes(0xfa, 7, 9, b"unknown"),
        frame_bytes(5, 4, 1, &[0; 4]),
    ]
    .concat();
    vec![[&[1, 7][..], &talk].concat(), [&[0, 3][..], &split].concat()]
}

/// Header blocks: what the decoder takes, another implementation reads alike.
pub fn hpack(data: &[u8]) {
    let mut input = Input::new(data);
    let mut ours = Decoder::default();
    let mut theirs = fluke_hpack::Decoder::new();
    for _ in 0..16 {
        if input.is_empty() {
            break;
        }
        let block = input.long();
        let mut fields = Vec::new();
        let decoded =
            ours.decode(block, |name, value| fields.push((name.to_vec(), value.to_vec())));
        if decoded.is_err() {
            return;
        }
        match theirs.decode(block) {
            Ok(expected) => assert_eq!(fields, expected, "of {block:02x?}"),
            // RFC 7541 §4.2 has nothing against a block of size updates alone.
            Err(DecoderError::SizeUpdateAtEnd) => return,
            Err(error) => panic!("{error:?}, and we read {fields:?}, of {block:02x?}"),
        }
        let mut encoder = Encoder::default();
        for (name, value) in &fields {
            encoder.literal(name, value);
        }
        let mut again = Vec::new();
        Decoder::default()
            .decode(&encoder.into_block(), |name, value| {
                again.push((name.to_vec(), value.to_vec()))
            })
            .expect("what we write can be read");
        assert_eq!(again, fields);
    }
}

pub(crate) fn hpack_seeds() -> Vec<Vec<u8>> {
    // RFC 7541 C.4: Huffman-coded requests on one table; then an eviction by a table of 64 bytes.
    let first: [&[u8]; 4] = [
        &[
            0x82, 0x86, 0x84, 0x41, 0x8c, 0xf1, 0xe3, 0xc2, 0xe5, 0xf2, 0x3a, 0x6b, 0xa0, 0xab,
            0x90, 0xf4, 0xff,
        ],
        &[0x82, 0x86, 0x84, 0xbe, 0x58, 0x86, 0xa8, 0xeb, 0x10, 0x64, 0x9c, 0xbf],
        &[
            0x82, 0x87, 0x85, 0xbf, 0x40, 0x88, 0x25, 0xa8, 0x49, 0xe9, 0x5b, 0xa9, 0x7d, 0x7f,
            0x89, 0x25, 0xa8, 0x49, 0xe9, 0x5b, 0xb8, 0xe8, 0xb4, 0xbf,
        ],
        &[0x3f, 0x21, 0x40, 1, b'a', 1, b'b', 0xbe],
    ];
    vec![
        first.iter().flat_map(|block| long(block)).collect(),
        long(&connect_block()),
        long(&[0x20, 0x3f, 0xe1, 0x1f, 0x10, 1, b'x', 0x81, 0x1f]),
    ]
}
