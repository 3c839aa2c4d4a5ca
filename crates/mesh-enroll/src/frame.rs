//! Frames: a big-endian length and JSON.

use std::io::{self, Read, Write};

use serde::Serialize;

use crate::reply::EnrollReply;
use crate::request::EnrollRequest;

/// Largest JSON of one frame, bytes. One listed pod takes about 300 and one sandbox of a collection 70, so that a node
/// of 1,000 pods fits three times; what does not fit is an error.
pub const MAX_FRAME_BYTES: usize = 1024 * 1024;

const LENGTH_BYTES: usize = 4;

/// A conversation that failed.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    /// The other end closed before a whole frame had come.
    #[error("connection closed in the middle of a message")]
    Truncated,
    /// A length beyond [`MAX_FRAME_BYTES`].
    #[error("message of {bytes} bytes, at most {MAX_FRAME_BYTES} are allowed")]
    TooLong {
        /// The length announced or needed.
        bytes: usize,
    },
    /// JSON that is no message of this protocol.
    #[error("message is not valid")]
    Malformed(#[source] serde_json::Error),
    /// No answer before the deadline that was set on the stream.
    #[error("no answer in time")]
    Late,
    /// The stream failed.
    #[error("cannot talk to the other end")]
    Io(#[source] io::Error),
}

impl FrameError {
    /// True when the far end sent nonsense, false when it was out of reach.
    #[must_use]
    pub const fn is_protocol(&self) -> bool {
        match self {
            Self::TooLong { .. } | Self::Malformed(_) => true,
            Self::Truncated | Self::Late | Self::Io(_) => false,
        }
    }
}

/// The frame of `message`.
///
/// # Errors
/// [`FrameError::TooLong`] when it does not fit.
pub fn encode<M: Serialize>(message: &M) -> Result<Vec<u8>, FrameError> {
    let json = serde_json::to_vec(message).map_err(FrameError::Malformed)?;
    let too_long = || FrameError::TooLong { bytes: json.len() };
    if json.len() > MAX_FRAME_BYTES {
        return Err(too_long());
    }
    let length = u32::try_from(json.len()).map_err(|_beyond_u32| too_long())?;
    let mut frame = Vec::with_capacity(LENGTH_BYTES + json.len());
    frame.extend_from_slice(&length.to_be_bytes());
    frame.extend_from_slice(&json);
    Ok(frame)
}

/// The request in a frame's JSON.
///
/// # Errors
/// [`FrameError::Malformed`] naming the field, [`FrameError::TooLong`].
pub fn decode_request(json: &[u8]) -> Result<EnrollRequest, FrameError> {
    decode(json)
}

/// The reply in a frame's JSON.
///
/// # Errors
/// As [`decode_request`].
pub fn decode_reply(json: &[u8]) -> Result<EnrollReply, FrameError> {
    decode(json)
}

fn decode<M: serde::de::DeserializeOwned>(json: &[u8]) -> Result<M, FrameError> {
    if json.len() > MAX_FRAME_BYTES {
        return Err(FrameError::TooLong { bytes: json.len() });
    }
    serde_json::from_slice(json).map_err(FrameError::Malformed)
}

/// Reads one frame's JSON.
///
/// # Errors
/// [`FrameError::Truncated`], [`FrameError::TooLong`] before anything is allocated, [`FrameError::Io`].
pub fn read_frame(stream: &mut impl Read) -> Result<Vec<u8>, FrameError> {
    let mut length = [0; LENGTH_BYTES];
    stream.read_exact(&mut length).map_err(read_error)?;
    let bytes = usize::try_from(u32::from_be_bytes(length)).unwrap_or(usize::MAX);
    if bytes > MAX_FRAME_BYTES {
        return Err(FrameError::TooLong { bytes });
    }
    let mut json = vec![0; bytes];
    stream.read_exact(&mut json).map_err(read_error)?;
    Ok(json)
}

fn read_error(error: io::Error) -> FrameError {
    let kind = error.kind();
    if kind == io::ErrorKind::UnexpectedEof {
        FrameError::Truncated
    } else if matches!(kind, io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) {
        // What a deadline looks like depends on the platform.
        FrameError::Late
    } else {
        FrameError::Io(error)
    }
}

/// Writes `message` as one frame and flushes.
///
/// # Errors
/// [`FrameError::TooLong`], [`FrameError::Io`].
pub fn write_frame<M: Serialize>(stream: &mut impl Write, message: &M) -> Result<(), FrameError> {
    let frame = encode(message)?;
    stream.write_all(&frame).and_then(|()| stream.flush()).map_err(FrameError::Io)
}

/// Reads a request.
///
/// # Errors
/// Those of [`read_frame`] and [`decode_request`].
pub fn read_request(stream: &mut impl Read) -> Result<EnrollRequest, FrameError> {
    decode_request(&read_frame(stream)?)
}

/// Reads a reply.
///
/// # Errors
/// Those of [`read_frame`] and [`decode_reply`].
pub fn read_reply(stream: &mut impl Read) -> Result<EnrollReply, FrameError> {
    decode_reply(&read_frame(stream)?)
}

/// Writes a request.
///
/// # Errors
/// Those of [`write_frame`].
pub fn write_request(stream: &mut impl Write, request: &EnrollRequest) -> Result<(), FrameError> {
    write_frame(stream, request)
}

/// Writes a reply.
///
/// # Errors
/// Those of [`write_frame`].
pub fn write_reply(stream: &mut impl Write, reply: &EnrollReply) -> Result<(), FrameError> {
    write_frame(stream, reply)
}

/// Asks and waits for the answer, on a stream just connected to the agent.
///
/// # Errors
/// Those of [`write_request`] and [`read_reply`]; a deadline set on the stream shows as [`FrameError::Late`].
pub fn call(
    stream: &mut (impl Read + Write),
    request: &EnrollRequest,
) -> Result<EnrollReply, FrameError> {
    write_request(stream, request)?;
    read_reply(stream)
}
