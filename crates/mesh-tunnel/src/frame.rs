//! HTTP/2 frames: headers, codes, and the few frames we send. Source: RFC 9113 §4, §6, §7.

/// Bytes of a frame header.
pub(crate) const FRAME_HEADER: usize = 9;
/// What a client sends first. Source: RFC 9113 §3.4.
pub(crate) const PREFACE: &[u8; 24] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// Frame size every peer accepts. Source: RFC 9113 §6.5.2.
pub(crate) const DEFAULT_FRAME_SIZE: u32 = 16_384;
/// Window every stream and connection starts with. Source: RFC 9113 §6.9.2.
pub(crate) const DEFAULT_WINDOW: u32 = 65_535;
/// Largest window. Source: RFC 9113 §6.9.1.
pub(crate) const MAX_WINDOW: u32 = (1 << 31) - 1;
/// The last stream id there can be.
pub(crate) const MAX_STREAM_ID: u32 = (1 << 31) - 1;

/// DATA, HEADERS: the stream ends here.
pub(crate) const END_STREAM: u8 = 0x1;
/// SETTINGS, PING: this is the answer.
pub(crate) const ACK: u8 = 0x1;
/// HEADERS, CONTINUATION: the block ends here.
pub(crate) const END_HEADERS: u8 = 0x4;
/// DATA, HEADERS: padded.
pub(crate) const PADDED: u8 = 0x8;
/// HEADERS: with the deprecated priority fields.
pub(crate) const PRIORITY: u8 = 0x20;

/// A frame's type. Source: RFC 9113 §6.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FrameKind {
    /// Bytes of a stream.
    Data,
    /// Opens a stream, or answers it.
    Headers,
    /// Deprecated; checked and ignored.
    Priority,
    /// Ends a stream at once.
    RstStream,
    /// Settings, or their acknowledgement.
    Settings,
    /// Never allowed here.
    PushPromise,
    /// A sign of life.
    Ping,
    /// No more streams.
    Goaway,
    /// Credit.
    WindowUpdate,
    /// More of a header block.
    Continuation,
    /// An extension; ignored.
    Unknown,
}

impl FrameKind {
    const fn parse(byte: u8) -> Self {
        match byte {
            0 => Self::Data,
            1 => Self::Headers,
            2 => Self::Priority,
            3 => Self::RstStream,
            4 => Self::Settings,
            5 => Self::PushPromise,
            6 => Self::Ping,
            7 => Self::Goaway,
            8 => Self::WindowUpdate,
            9 => Self::Continuation,
            _ => Self::Unknown,
        }
    }

    const fn byte(self) -> u8 {
        match self {
            Self::Data => 0,
            Self::Headers => 1,
            Self::Priority => 2,
            Self::RstStream => 3,
            Self::Settings => 4,
            Self::PushPromise => 5,
            Self::Ping => 6,
            Self::Goaway => 7,
            Self::WindowUpdate => 8,
            Self::Continuation => 9,
            Self::Unknown => 0xff,
        }
    }
}

/// Why a stream or connection ends. Source: RFC 9113 §7.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ErrorCode(pub u32);

#[allow(missing_docs, reason = "the names are the RFC's")]
impl ErrorCode {
    pub const NO_ERROR: Self = Self(0x0);
    pub const PROTOCOL_ERROR: Self = Self(0x1);
    pub const INTERNAL_ERROR: Self = Self(0x2);
    pub const FLOW_CONTROL_ERROR: Self = Self(0x3);
    pub const SETTINGS_TIMEOUT: Self = Self(0x4);
    pub const STREAM_CLOSED: Self = Self(0x5);
    pub const FRAME_SIZE_ERROR: Self = Self(0x6);
    pub const REFUSED_STREAM: Self = Self(0x7);
    pub const CANCEL: Self = Self(0x8);
    pub const COMPRESSION_ERROR: Self = Self(0x9);
    pub const CONNECT_ERROR: Self = Self(0xa);
    pub const ENHANCE_YOUR_CALM: Self = Self(0xb);
}

/// A frame header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FrameHeader {
    /// Length of the payload. Bytes, below 2^24.
    pub length: u32,
    /// The type.
    pub kind: FrameKind,
    /// The flags, as they are.
    pub flags: u8,
    /// The stream, or 0 for the connection.
    pub stream: u32,
}

impl FrameHeader {
    pub(crate) const fn has(self, flag: u8) -> bool {
        self.flags & flag != 0
    }

    /// Reads a header; the reserved bit is ignored.
    #[must_use]
    pub const fn parse(bytes: &[u8; FRAME_HEADER]) -> Self {
        Self {
            length: u32::from_be_bytes([0, bytes[0], bytes[1], bytes[2]]),
            kind: FrameKind::parse(bytes[3]),
            flags: bytes[4],
            stream: u32::from_be_bytes([bytes[5], bytes[6], bytes[7], bytes[8]]) & MAX_STREAM_ID,
        }
    }

    /// Writes the header.
    #[must_use]
    pub const fn bytes(self) -> [u8; FRAME_HEADER] {
        let [_, a, b, c] = self.length.to_be_bytes();
        let [d, e, f, g] = self.stream.to_be_bytes();
        [a, b, c, self.kind.byte(), self.flags, d, e, f, g]
    }

    /// The rules of length and stream that each type has by itself.
    ///
    /// # Errors
    /// The connection error to answer with.
    pub fn check(self, max_frame_size: u32) -> Result<(), ErrorCode> {
        if self.length > max_frame_size {
            return Err(ErrorCode::FRAME_SIZE_ERROR);
        }
        let on_stream = self.stream != 0;
        let (stream_ok, length_ok) = match self.kind {
            FrameKind::Data => (on_stream, true),
            FrameKind::Headers | FrameKind::Continuation => (on_stream, true),
            FrameKind::Priority => (on_stream, self.length == 5),
            FrameKind::RstStream => (on_stream, self.length == 4),
            FrameKind::Settings if self.has(ACK) => (!on_stream, self.length == 0),
            FrameKind::Settings => (!on_stream, self.length.is_multiple_of(6)),
            FrameKind::PushPromise => (false, true),
            FrameKind::Ping => (!on_stream, self.length == 8),
            FrameKind::Goaway => (!on_stream, self.length >= 8),
            FrameKind::WindowUpdate => (true, self.length == 4),
            FrameKind::Unknown => (true, true),
        };
        if !stream_ok {
            return Err(ErrorCode::PROTOCOL_ERROR);
        }
        if !length_ok {
            return Err(ErrorCode::FRAME_SIZE_ERROR);
        }
        Ok(())
    }
}

/// Settings we know. Source: RFC 9113 §6.5.2.
pub(crate) mod setting {
    pub(crate) const ENABLE_PUSH: u16 = 0x2;
    pub(crate) const MAX_CONCURRENT_STREAMS: u16 = 0x3;
    pub(crate) const INITIAL_WINDOW_SIZE: u16 = 0x4;
    pub(crate) const MAX_FRAME_SIZE: u16 = 0x5;
    pub(crate) const MAX_HEADER_LIST_SIZE: u16 = 0x6;
}

/// A frame with a payload of up to 16 bytes, ready to send.
pub(crate) struct SmallFrame {
    bytes: [u8; FRAME_HEADER + 16],
    len: usize,
}

impl SmallFrame {
    fn new(kind: FrameKind, flags: u8, stream: u32, payload: &[u8]) -> Self {
        let mut bytes = [0; FRAME_HEADER + 16];
        let length = u32::try_from(payload.len()).expect("at most 16");
        let header = FrameHeader { length, kind, flags, stream };
        bytes[..FRAME_HEADER].copy_from_slice(&header.bytes());
        bytes[FRAME_HEADER..FRAME_HEADER + payload.len()].copy_from_slice(payload);
        Self { bytes, len: FRAME_HEADER + payload.len() }
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        &self.bytes[..self.len]
    }

    pub(crate) fn rst_stream(stream: u32, code: ErrorCode) -> Self {
        Self::new(FrameKind::RstStream, 0, stream, &code.0.to_be_bytes())
    }

    pub(crate) fn window_update(stream: u32, credit: u32) -> Self {
        Self::new(FrameKind::WindowUpdate, 0, stream, &credit.to_be_bytes())
    }

    pub(crate) fn settings_ack() -> Self {
        Self::new(FrameKind::Settings, ACK, 0, &[])
    }

    pub(crate) fn ping(flags: u8, payload: [u8; 8]) -> Self {
        Self::new(FrameKind::Ping, flags, 0, &payload)
    }

    pub(crate) fn goaway(last_stream: u32, code: ErrorCode) -> Self {
        let mut payload = [0; 8];
        payload[..4].copy_from_slice(&last_stream.to_be_bytes());
        payload[4..].copy_from_slice(&code.0.to_be_bytes());
        Self::new(FrameKind::Goaway, 0, 0, &payload)
    }

    pub(crate) fn end_stream(stream: u32) -> Self {
        Self::new(FrameKind::Data, END_STREAM, stream, &[])
    }
}

/// A SETTINGS frame.
pub(crate) fn settings(values: &[(u16, u32)]) -> Vec<u8> {
    let length = u32::try_from(values.len() * 6).expect("a handful of settings");
    let header = FrameHeader { length, kind: FrameKind::Settings, flags: 0, stream: 0 };
    let mut frame = header.bytes().to_vec();
    for (id, value) in values {
        frame.extend_from_slice(&id.to_be_bytes());
        frame.extend_from_slice(&value.to_be_bytes());
    }
    frame
}

/// A header block as HEADERS and as many CONTINUATION frames as the peer's frame size asks for.
pub(crate) fn headers(stream: u32, end_stream: bool, block: &[u8], frame_size: u32) -> Vec<u8> {
    let mut frames = Vec::with_capacity(block.len() + FRAME_HEADER);
    let mut chunks = block.chunks(frame_size as usize).peekable();
    let mut kind = FrameKind::Headers;
    let mut flags = if end_stream { END_STREAM } else { 0 };
    while let Some(chunk) = chunks.next() {
        if chunks.peek().is_none() {
            flags |= END_HEADERS;
        }
        let length = u32::try_from(chunk.len()).expect("below 2^24: the frame size");
        frames.extend_from_slice(&FrameHeader { length, kind, flags, stream }.bytes());
        frames.extend_from_slice(chunk);
        kind = FrameKind::Continuation;
        flags = 0;
    }
    frames
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_are_read_as_written() {
        for byte in 0..=10 {
            let kind = FrameKind::parse(byte);
            let header = FrameHeader { length: 0x01_02_03, kind, flags: 0x25, stream: 0x7fff_fffe };
            let mut bytes = header.bytes();
            assert_eq!(bytes[3], if byte == 10 { 0xff } else { byte });
            bytes[5] |= 0x80;
            assert_eq!(FrameHeader::parse(&bytes), header);
        }
    }

    #[test]
    fn a_long_block_is_continued() {
        let frames = headers(3, true, &[7; 25], 10);
        let first = FrameHeader::parse(frames.first_chunk().unwrap());
        assert_eq!((first.length, first.flags), (10, END_STREAM));
        let last = FrameHeader::parse(frames[38..].first_chunk().unwrap());
        assert_eq!((last.kind, last.length, last.flags), (FrameKind::Continuation, 5, END_HEADERS));
    }
}
