//! Places in byte streams: keys and counts, windows, half-read frames, sealed bytes.

use zeroize::Zeroize;

use super::HandOverError;
use crate::session::{Suite, TrafficSecret};

/// One direction's key.
#[derive(Clone, PartialEq, prost::Message)]
#[prost(skip_debug)]
pub(crate) struct RecordKeyState {
    /// 1 AES-128-GCM, 2 AES-256-GCM, 3 ChaCha20-Poly1305.
    #[prost(uint32, tag = "1")]
    suite: u32,
    #[prost(bytes = "vec", tag = "2")]
    secret: Vec<u8>,
    /// Records sealed or opened with it.
    #[prost(uint64, tag = "3")]
    pub(crate) seq: u64,
    #[prost(uint64, tag = "4")]
    pub(crate) generation: u64,
}

impl RecordKeyState {
    pub(crate) fn new(suite: Suite, secret: &TrafficSecret, seq: u64, generation: u64) -> Self {
        let suite = match suite {
            Suite::Aes128Gcm => 1,
            Suite::Aes256Gcm => 2,
            Suite::Chacha20Poly1305 => 3,
        };
        Self { suite, secret: secret.as_bytes().to_vec(), seq, generation }
    }

    pub(crate) fn key(&self) -> Result<(Suite, TrafficSecret), HandOverError> {
        let suite = match self.suite {
            1 => Suite::Aes128Gcm,
            2 => Suite::Aes256Gcm,
            3 => Suite::Chacha20Poly1305,
            _ => return Err(HandOverError::Inconsistent("a cipher suite")),
        };
        let secret = TrafficSecret::new(suite, &self.secret)
            .map_err(|_invalid| HandOverError::Inconsistent("a traffic secret"))?;
        Ok((suite, secret))
    }

    pub(crate) fn forget_secret(&mut self) {
        self.secret.zeroize();
    }
}

/// What is sealed and not yet taken by the socket. Nothing is open when it is written down.
#[derive(Clone, PartialEq, prost::Message)]
#[prost(skip_debug)]
pub(crate) struct OutboxState {
    #[prost(message, optional, tag = "1")]
    pub(crate) key: Option<RecordKeyState>,
    #[prost(bytes = "vec", tag = "2")]
    pub(crate) sealed: Vec<u8>,
    #[prost(bool, tag = "3")]
    pub(crate) finished: bool,
}

/// A receive window, and what is owed of it.
#[derive(Clone, Copy, PartialEq, prost::Message)]
pub(crate) struct WindowState {
    #[prost(uint32, tag = "1")]
    pub(crate) size: u32,
    #[prost(uint32, tag = "2")]
    pub(crate) left: u32,
    #[prost(uint32, tag = "3")]
    pub(crate) credit: u32,
}

/// A half-read frame.
#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct FrameReaderState {
    #[prost(uint32, tag = "1")]
    pub(crate) preface_left: u32,
    /// What has been read of the current frame's header, 0 to 9 bytes.
    #[prost(bytes = "vec", tag = "2")]
    pub(crate) header: Vec<u8>,
    #[prost(uint32, tag = "3")]
    pub(crate) left: u32,
    #[prost(uint32, tag = "4")]
    pub(crate) padding: u32,
    #[prost(bool, tag = "5")]
    pub(crate) pad_length_due: bool,
    #[prost(uint32, tag = "6")]
    pub(crate) overhead: u32,
    #[prost(uint32, tag = "7")]
    pub(crate) lead_left: u32,
    /// The header of the HEADERS frame whose block is open, 0 or 9 bytes.
    #[prost(bytes = "vec", tag = "8")]
    pub(crate) block: Vec<u8>,
    #[prost(uint32, tag = "9")]
    pub(crate) continuations: u32,
    #[prost(bytes = "vec", tag = "10")]
    pub(crate) body: Vec<u8>,
    #[prost(bool, tag = "11")]
    pub(crate) first_frame: bool,
}

/// The HPACK decoder's table, newest first.
#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct DecoderState {
    #[prost(uint32, tag = "1")]
    pub(crate) max_size: u32,
    #[prost(message, repeated, tag = "2")]
    pub(crate) entries: Vec<EntryState>,
}

/// One entry of it.
#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct EntryState {
    #[prost(bytes = "vec", tag = "1")]
    pub(crate) name: Vec<u8>,
    #[prost(bytes = "vec", tag = "2")]
    pub(crate) value: Vec<u8>,
}
