//! TLS 1.3 record protection in place. Source: RFC 8446 §5.
//!
//! A sealed record lies in its buffer as `header (5) | plaintext | content type (1) | tag (16)`.

use aws_lc_rs::aead::{
    AES_128_GCM, AES_256_GCM, Aad, CHACHA20_POLY1305, LessSafeKey, Nonce, UnboundKey,
};
use zeroize::Zeroize;

use crate::handover::{HandOverError, RecordKeyState};
use crate::session::{Suite, TrafficSecret};

/// Bytes in front of a record's plaintext.
pub const HEADER: usize = 5;
/// Bytes behind a record's plaintext: content type and tag.
pub const TAIL: usize = 17;
/// Longest plaintext of a record. Source: RFC 8446 §5.1.
pub const MAX_PLAINTEXT: usize = 1 << 14;
/// Longest protected body of a record. Source: RFC 8446 §5.2.
pub const MAX_CIPHERTEXT: usize = MAX_PLAINTEXT + 256;
/// Longest record with its header.
pub const MAX_RECORD: usize = HEADER + MAX_CIPHERTEXT;

/// What a record carries. Source: RFC 8446 §5.1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ContentType {
    /// Alerts.
    Alert,
    /// Post-handshake messages.
    Handshake,
    /// Bytes of HTTP/2.
    ApplicationData,
}

impl ContentType {
    const fn byte(self) -> u8 {
        match self {
            Self::Alert => 21,
            Self::Handshake => 22,
            Self::ApplicationData => 23,
        }
    }

    const fn parse(byte: u8) -> Option<Self> {
        match byte {
            21 => Some(Self::Alert),
            22 => Some(Self::Handshake),
            23 => Some(Self::ApplicationData),
            _ => None,
        }
    }
}

/// A fatal alert's description, as we send it. Source: RFC 8446 §6.2.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Alert {
    /// Not an error: the sender will write no more.
    CloseNotify = 0,
    /// A message where it is not allowed.
    UnexpectedMessage = 10,
    /// A record that does not authenticate.
    BadRecordMac = 20,
    /// A record that is too long.
    RecordOverflow = 22,
    /// A field with a value that is not allowed.
    IllegalParameter = 47,
    /// A message that does not parse.
    DecodeError = 50,
    /// A fault of our own.
    InternalError = 80,
}

/// Why a record is refused; the alert to send is part of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RecordError {
    /// Longer than TLS allows.
    #[error("record longer than 2^14 + 256 bytes")]
    Overflow,
    /// The tag is wrong, or the body is too short to have one.
    #[error("record does not authenticate")]
    BadMac,
    /// Not protected, without a content type, or of a type that has no place after the handshake.
    #[error("record of unexpected type")]
    UnexpectedType,
}

impl RecordError {
    /// The alert that answers it.
    #[must_use]
    pub const fn alert(self) -> Alert {
        match self {
            Self::Overflow => Alert::RecordOverflow,
            Self::BadMac => Alert::BadRecordMac,
            Self::UnexpectedType => Alert::UnexpectedMessage,
        }
    }
}

/// The length of the record that starts at `bytes`, header included; `None` while that cannot be told.
///
/// # Errors
/// When the header is not that of a protected record, or announces one that is too long.
pub fn record_len(bytes: &[u8]) -> Result<Option<usize>, RecordError> {
    let Some(header) = bytes.first_chunk::<HEADER>() else { return Ok(None) };
    // The version field is to be ignored (RFC 8446 §5.1).
    if header[0] != ContentType::ApplicationData.byte() {
        return Err(RecordError::UnexpectedType);
    }
    let body = usize::from(u16::from_be_bytes([header[3], header[4]]));
    if body > MAX_CIPHERTEXT {
        return Err(RecordError::Overflow);
    }
    Ok(Some(HEADER + body))
}

/// One direction's key, its place in the key schedule, and the count of records.
///
/// Debug output and logs never show key material.
pub struct RecordKey {
    suite: Suite,
    secret: TrafficSecret,
    key: LessSafeKey,
    iv: [u8; 12],
    seq: u64,
    generation: u64,
}

impl std::fmt::Debug for RecordKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RecordKey")
            .field("suite", &self.suite)
            .field("seq", &self.seq)
            .field("generation", &self.generation)
            .finish_non_exhaustive()
    }
}

impl RecordKey {
    /// Derives key and IV from a traffic secret. Source: RFC 8446 §7.3.
    #[must_use]
    pub fn new(suite: Suite, secret: TrafficSecret, seq: u64) -> Self {
        let mut key_bytes = [0; 32];
        let key_bytes = &mut key_bytes[..suite.key_len()];
        secret.expand_label(suite, "key", key_bytes);
        let mut iv = [0; 12];
        secret.expand_label(suite, "iv", &mut iv);
        let algorithm = match suite {
            Suite::Aes128Gcm => &AES_128_GCM,
            Suite::Aes256Gcm => &AES_256_GCM,
            Suite::Chacha20Poly1305 => &CHACHA20_POLY1305,
        };
        let key = UnboundKey::new(algorithm, key_bytes).expect("the key has the suite's length");
        key_bytes.zeroize();
        Self { suite, secret, key: LessSafeKey::new(key), iv, seq, generation: 0 }
    }

    /// The key written down for a successor. Who has done that must not seal with it again, unless the successor never will.
    pub(crate) fn state(&self) -> RecordKeyState {
        RecordKeyState::new(self.suite, &self.secret, self.seq, self.generation)
    }

    pub(crate) fn from_state(state: &RecordKeyState) -> Result<Self, HandOverError> {
        let (suite, secret) = state.key()?;
        Ok(Self { generation: state.generation, ..Self::new(suite, secret, state.seq) })
    }

    /// Records sealed or opened with this key.
    #[must_use]
    pub const fn seq(&self) -> u64 {
        self.seq
    }

    /// How often the key was renewed.
    #[must_use]
    pub const fn generation(&self) -> u64 {
        self.generation
    }

    /// Goes on to the next generation's key; the count starts again. Source: RFC 8446 §7.2.
    pub fn renew(&mut self) {
        let generation = self.generation + 1;
        *self = Self::new(self.suite, self.secret.next(self.suite), 0);
        self.generation = generation;
    }

    /// The nonce of the next record; it is given once. Source: RFC 8446 §5.3.
    fn nonce(&mut self) -> Nonce {
        let mut nonce = self.iv;
        for (byte, count) in nonce[4..].iter_mut().zip(self.seq.to_be_bytes()) {
            *byte ^= count;
        }
        self.seq = self.seq.checked_add(1).expect("keys are renewed long before 2^64 records");
        Nonce::assume_unique_for_key(nonce)
    }

    /// Seals `record` in place: its plaintext is at `HEADER..record.len() - TAIL`, the rest is written here.
    ///
    /// # Panics
    /// When `record` is shorter than `HEADER + TAIL` or longer than TLS allows: a bug of the caller.
    pub fn seal(&mut self, record: &mut [u8], content_type: ContentType) {
        let body_len = record.len() - HEADER;
        assert!(
            (TAIL..=MAX_PLAINTEXT + TAIL).contains(&body_len),
            "a record of {body_len} bytes has no legal length"
        );
        let (header, body) = record.split_at_mut(HEADER);
        let [.., high, low] = body_len.to_be_bytes();
        header.copy_from_slice(&[23, 3, 3, high, low]);
        let (text, tag_place) = body.split_at_mut(body_len - 16);
        text[body_len - TAIL] = content_type.byte();
        let nonce = self.nonce();
        let tag = self
            .key
            .seal_in_place_separate_tag(nonce, Aad::from(&*header), text)
            .expect("sealing fails only on lengths no record has");
        tag_place.copy_from_slice(tag.as_ref());
    }

    /// Opens one whole record in place. The plaintext then is at `HEADER..HEADER + len`.
    ///
    /// # Errors
    /// When it does not authenticate, is too long, or has no known content type. The tunnel cannot go on then.
    pub fn open(&mut self, record: &mut [u8]) -> Result<(ContentType, usize), RecordError> {
        if record.len() < HEADER + TAIL {
            return Err(RecordError::BadMac);
        }
        if record.len() > MAX_RECORD {
            return Err(RecordError::Overflow);
        }
        let nonce = self.nonce();
        let (header, body) = record.split_at_mut(HEADER);
        // The cause is one of a kind and says nothing: "unspecified".
        let Ok(text) = self.key.open_in_place(nonce, Aad::from(&*header), body) else {
            return Err(RecordError::BadMac);
        };
        // Padding is zeros behind the content type (RFC 8446 §5.4).
        let Some(end) = text.iter().rposition(|byte| *byte != 0) else {
            return Err(RecordError::UnexpectedType);
        };
        if end > MAX_PLAINTEXT {
            return Err(RecordError::Overflow);
        }
        let content_type = ContentType::parse(text[end]).ok_or(RecordError::UnexpectedType)?;
        Ok((content_type, end))
    }
}
