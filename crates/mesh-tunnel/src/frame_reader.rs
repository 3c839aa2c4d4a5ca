//! Cuts a byte stream into frames; it may stop anywhere.
//!
//! DATA is never collected: its payload is reported where it lies. Other payloads are collected up to a bound, header blocks
//! across their CONTINUATION frames, and what has no meaning is skipped without being stored.
//!
//! ```text
//!  Preface ──► Header ──► Payload ──┐      with a block open only CONTINUATION of its stream may follow
//!                ▲──────────────────┘
//! ```

use std::ops::Range;

use crate::frame::{
    DEFAULT_FRAME_SIZE, END_HEADERS, END_STREAM, ErrorCode, FRAME_HEADER, FrameHeader, FrameKind,
    PADDED, PREFACE, PRIORITY,
};
use crate::handover::{FrameReaderState, HandOverError, check};

/// What the next bytes were.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FrameEvent {
    /// A DATA frame begins; all of its length counts against the windows.
    DataStart(FrameHeader),
    /// A part of its payload, without padding, as a range of the input of this call.
    Data {
        /// The stream.
        stream: u32,
        /// Where it lies.
        range: Range<usize>,
    },
    /// The DATA frame is complete. `padding` is what of its length was no payload.
    DataEnd {
        /// The frame's header.
        header: FrameHeader,
        /// Bytes of padding and pad length.
        padding: u32,
    },
    /// A whole header block; it is in [`FrameReader::body`].
    Headers {
        /// The stream.
        stream: u32,
        /// The stream ends with it.
        end_stream: bool,
    },
    /// Another whole frame; its payload is in [`FrameReader::body`], of GOAWAY the first 8 bytes.
    Control(FrameHeader),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Payload {
    /// Reported as it comes.
    Data,
    /// Collected into `body`.
    Collect,
    /// Not kept.
    Skip,
}

impl Payload {
    const fn of(kind: FrameKind) -> Self {
        match kind {
            FrameKind::Data => Self::Data,
            FrameKind::Headers
            | FrameKind::Continuation
            | FrameKind::Settings
            | FrameKind::RstStream
            | FrameKind::Ping
            | FrameKind::Goaway
            | FrameKind::WindowUpdate => Self::Collect,
            FrameKind::Priority | FrameKind::PushPromise | FrameKind::Unknown => Self::Skip,
        }
    }
}

/// Longest SETTINGS payload that is looked at; nobody has more than some ten settings.
const MAX_SETTINGS_BYTES: u32 = 6 * 64;
/// CONTINUATION frames of one block. Source: the flood of CVE-2024-27316 and its kin.
const MAX_CONTINUATIONS: u32 = 32;

/// The cutter's place in the stream, as data.
#[derive(Clone, Debug)]
pub struct FrameReader {
    max_frame_size: u32,
    max_block: usize,
    preface_left: usize,
    header: [u8; FRAME_HEADER],
    header_have: usize,
    current: FrameHeader,
    payload: Payload,
    /// Payload bytes still to come, padding included.
    left: u32,
    /// Padding bytes at the end of the payload, once known.
    padding: u32,
    pad_length_due: bool,
    /// Padding and pad length field of the current frame, bytes.
    overhead: u32,
    /// Bytes of a HEADERS frame in front of its block.
    lead_left: u32,
    /// The open header block's HEADERS frame.
    block: Option<FrameHeader>,
    continuations: u32,
    body: Vec<u8>,
    first_frame: bool,
}

impl FrameReader {
    /// A reader at the start of a connection. A server first wants the client's preface. `max_block` bounds a compressed
    /// header block, bytes.
    #[must_use]
    pub const fn new(preface: bool, max_frame_size: u32, max_block: usize) -> Self {
        Self {
            max_frame_size,
            max_block,
            preface_left: if preface { PREFACE.len() } else { 0 },
            header: [0; FRAME_HEADER],
            header_have: 0,
            current: FrameHeader { length: 0, kind: FrameKind::Unknown, flags: 0, stream: 0 },
            payload: Payload::Skip,
            left: 0,
            padding: 0,
            pad_length_due: false,
            overhead: 0,
            lead_left: 0,
            block: None,
            continuations: 0,
            body: Vec::new(),
            first_frame: true,
        }
    }

    pub(crate) fn state(&self) -> FrameReaderState {
        let within = self.header_have == FRAME_HEADER;
        FrameReaderState {
            preface_left: u32::try_from(self.preface_left).unwrap_or(0),
            header: self.header[..self.header_have].to_vec(),
            left: if within { self.left } else { 0 },
            padding: if within { self.padding } else { 0 },
            pad_length_due: within && self.pad_length_due,
            overhead: self.overhead,
            lead_left: self.lead_left,
            block: self.block.map_or_else(Vec::new, |block| block.bytes().to_vec()),
            continuations: self.continuations,
            body: if self.at_boundary() { Vec::new() } else { self.body.clone() },
            first_frame: self.first_frame,
        }
    }

    pub(crate) fn from_state(
        state: &FrameReaderState,
        max_frame_size: u32,
        max_block: usize,
    ) -> Result<Self, HandOverError> {
        let mut reader = Self::new(false, max_frame_size, max_block);
        reader.preface_left = state.preface_left as usize;
        check(reader.preface_left <= PREFACE.len(), "a preface")?;
        reader.header_have = state.header.len();
        check(reader.header_have <= FRAME_HEADER, "a frame header")?;
        reader.header[..reader.header_have].copy_from_slice(&state.header);
        if reader.header_have == FRAME_HEADER {
            reader.current = FrameHeader::parse(&reader.header);
            reader.payload = Payload::of(reader.current.kind);
        }
        check(state.left <= reader.current.length, "a frame's rest")?;
        check(state.padding <= state.left, "a frame's padding")?;
        check(!state.pad_length_due || state.left > 0, "a frame's padding")?;
        check(state.overhead <= 256 && state.lead_left <= 5, "a frame's overhead")?;
        reader.left = state.left;
        reader.padding = state.padding;
        reader.pad_length_due = state.pad_length_due;
        reader.overhead = state.overhead;
        reader.lead_left = state.lead_left;
        reader.block = match state.block.as_slice() {
            [] => None,
            bytes => Some(FrameHeader::parse(
                bytes
                    .try_into()
                    .map_err(|_length| HandOverError::Inconsistent("a header block"))?,
            )),
        };
        let mid_block = matches!(reader.current.kind, FrameKind::Headers | FrameKind::Continuation);
        check(
            reader.header_have < FRAME_HEADER || !mid_block || reader.block.is_some(),
            "a header block",
        )?;
        // The predecessor's limit may have been another.
        check(state.body.len() <= max_block.max(DEFAULT_FRAME_SIZE as usize), "a header block")?;
        reader.continuations = state.continuations.min(MAX_CONTINUATIONS);
        reader.body.clone_from(&state.body);
        reader.first_frame = state.first_frame;
        Ok(reader)
    }

    /// The payload that the last event spoke of.
    #[must_use]
    pub fn body(&self) -> &[u8] {
        &self.body
    }

    /// True where a frame may begin.
    #[must_use]
    pub const fn at_boundary(&self) -> bool {
        self.header_have == 0 && self.block.is_none()
    }

    /// Gives back memory that is not needed between frames.
    pub(crate) fn shrink(&mut self) {
        if self.at_boundary() {
            self.body = Vec::new();
        }
    }

    /// Takes bytes from `input` until there is something to say. Returns how many were taken, and the event, if any;
    /// without an event all of `input` was taken.
    ///
    /// # Errors
    /// The connection error to answer with.
    pub fn advance(&mut self, input: &[u8]) -> Result<(usize, Option<FrameEvent>), ErrorCode> {
        let mut at = 0;
        loop {
            if self.preface_left > 0 {
                at += self.take_preface(&input[at..])?;
                if self.preface_left > 0 {
                    return Ok((at, None));
                }
            }
            if self.header_have < FRAME_HEADER {
                let take = (FRAME_HEADER - self.header_have).min(input.len() - at);
                self.header[self.header_have..self.header_have + take]
                    .copy_from_slice(&input[at..at + take]);
                self.header_have += take;
                at += take;
                if self.header_have < FRAME_HEADER {
                    return Ok((at, None));
                }
                self.start()?;
                if self.payload == Payload::Data {
                    return Ok((at, Some(FrameEvent::DataStart(self.current))));
                }
            }
            if self.pad_length_due && self.left > 0 {
                let Some(byte) = input.get(at) else { return Ok((at, None)) };
                at += 1;
                self.take_pad_length(*byte)?;
            }
            let payload_left = self.left - self.padding;
            let (take, taken) = at_most(payload_left, input.len() - at);
            if take > 0 {
                let range = at..at + take;
                at += take;
                self.left -= taken;
                match self.payload {
                    Payload::Data => {
                        let stream = self.current.stream;
                        return Ok((at, Some(FrameEvent::Data { stream, range })));
                    }
                    Payload::Collect => self.collect(&input[range])?,
                    Payload::Skip => {}
                }
            }
            if self.left > 0 {
                let (take, taken) = at_most(self.left, input.len() - at);
                if self.left == self.padding {
                    // Padding is taken, not stored.
                    at += take;
                    self.left -= taken;
                    self.padding -= taken;
                }
                if self.left > 0 {
                    return Ok((at, None));
                }
            }
            self.header_have = 0;
            if let Some(event) = self.finish() {
                return Ok((at, Some(event)));
            }
            if at == input.len() {
                return Ok((at, None));
            }
        }
    }

    fn take_preface(&mut self, input: &[u8]) -> Result<usize, ErrorCode> {
        let done = PREFACE.len() - self.preface_left;
        let take = self.preface_left.min(input.len());
        if input[..take] != PREFACE[done..done + take] {
            return Err(ErrorCode::PROTOCOL_ERROR);
        }
        self.preface_left -= take;
        Ok(take)
    }

    /// Judges a header that has just become complete, and says what happens to its payload.
    fn start(&mut self) -> Result<(), ErrorCode> {
        let header = FrameHeader::parse(&self.header);
        // The preface ends with a SETTINGS frame (RFC 9113 §3.4).
        if self.first_frame && (header.kind != FrameKind::Settings || header.has(crate::frame::ACK))
        {
            return Err(ErrorCode::PROTOCOL_ERROR);
        }
        self.first_frame = false;
        header.check(self.max_frame_size)?;
        let continues = header.kind == FrameKind::Continuation;
        if self.block.map(|block| block.stream) != continues.then_some(header.stream) {
            return Err(ErrorCode::PROTOCOL_ERROR);
        }
        self.current = header;
        self.left = header.length;
        self.padding = 0;
        self.overhead = 0;
        self.pad_length_due = false;
        self.lead_left = 0;
        if !continues {
            self.body.clear();
        }
        self.payload = Payload::of(header.kind);
        match header.kind {
            FrameKind::Data => self.pad_length_due = header.has(PADDED),
            FrameKind::Headers => {
                self.block = Some(header);
                self.continuations = 0;
                self.pad_length_due = header.has(PADDED);
                self.lead_left = if header.has(PRIORITY) { 5 } else { 0 };
                let lead = self.lead_left + u32::from(self.pad_length_due);
                if header.length < lead {
                    return Err(ErrorCode::FRAME_SIZE_ERROR);
                }
            }
            FrameKind::Continuation => {
                self.continuations += 1;
                if self.continuations > MAX_CONTINUATIONS {
                    return Err(ErrorCode::ENHANCE_YOUR_CALM);
                }
            }
            FrameKind::Settings if header.length > MAX_SETTINGS_BYTES => {
                return Err(ErrorCode::ENHANCE_YOUR_CALM);
            }
            FrameKind::Settings
            | FrameKind::RstStream
            | FrameKind::Ping
            | FrameKind::Goaway
            | FrameKind::WindowUpdate
            | FrameKind::Priority
            | FrameKind::PushPromise
            | FrameKind::Unknown => {}
        }
        // A padded frame without the pad length field.
        if self.pad_length_due && header.length == 0 {
            return Err(ErrorCode::FRAME_SIZE_ERROR);
        }
        Ok(())
    }

    fn take_pad_length(&mut self, pad_length: u8) -> Result<(), ErrorCode> {
        self.pad_length_due = false;
        self.left -= 1;
        self.padding = u32::from(pad_length);
        self.overhead = self.padding + 1;
        // Padding as long as what is left of the frame is allowed, longer is not (RFC 9113 §6.1).
        if self.padding + self.lead_left > self.left {
            return Err(ErrorCode::PROTOCOL_ERROR);
        }
        Ok(())
    }

    fn collect(&mut self, mut bytes: &[u8]) -> Result<(), ErrorCode> {
        if self.lead_left > 0 {
            let (skip, skipped) = at_most(self.lead_left, bytes.len());
            bytes = &bytes[skip..];
            self.lead_left -= skipped;
        }
        let limit = match self.current.kind {
            FrameKind::Headers | FrameKind::Continuation => {
                if self.body.len() + bytes.len() > self.max_block {
                    return Err(ErrorCode::ENHANCE_YOUR_CALM);
                }
                self.max_block
            }
            FrameKind::Goaway => 8,
            FrameKind::Data
            | FrameKind::Priority
            | FrameKind::RstStream
            | FrameKind::Settings
            | FrameKind::PushPromise
            | FrameKind::Ping
            | FrameKind::WindowUpdate
            | FrameKind::Unknown => DEFAULT_FRAME_SIZE as usize,
        };
        let keep = limit.saturating_sub(self.body.len()).min(bytes.len());
        self.body.extend_from_slice(&bytes[..keep]);
        Ok(())
    }

    fn finish(&mut self) -> Option<FrameEvent> {
        let header = self.current;
        match header.kind {
            FrameKind::Data => Some(FrameEvent::DataEnd { header, padding: self.overhead }),
            FrameKind::Headers | FrameKind::Continuation => {
                if !header.has(END_HEADERS) {
                    return None;
                }
                let opened = self.block.take()?;
                let end_stream = opened.has(END_STREAM);
                Some(FrameEvent::Headers { stream: opened.stream, end_stream })
            }
            FrameKind::Priority
            | FrameKind::RstStream
            | FrameKind::Settings
            | FrameKind::PushPromise
            | FrameKind::Ping
            | FrameKind::Goaway
            | FrameKind::WindowUpdate
            | FrameKind::Unknown => Some(FrameEvent::Control(header)),
        }
    }
}

/// The smaller of a count left and the bytes at hand, in both types.
fn at_most(left: u32, have: usize) -> (usize, u32) {
    let taken = left.min(u32::try_from(have).unwrap_or(u32::MAX));
    (taken as usize, taken)
}
