//! What a TLS 1.3 handshake leaves behind: everything the record layer needs, as data.

use std::fmt;

use aws_lc_rs::hkdf::{self, KeyType, Prk};
use zeroize::{Zeroize, ZeroizeOnDrop};

/// The cipher suites of TLS 1.3 that the record layer speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Suite {
    /// `TLS_AES_128_GCM_SHA256`.
    Aes128Gcm,
    /// `TLS_AES_256_GCM_SHA384`.
    Aes256Gcm,
    /// `TLS_CHACHA20_POLY1305_SHA256`.
    Chacha20Poly1305,
}

impl Suite {
    /// Length of a traffic secret: the hash's output. Bytes.
    #[must_use]
    pub const fn secret_len(self) -> usize {
        match self {
            Self::Aes128Gcm | Self::Chacha20Poly1305 => 32,
            Self::Aes256Gcm => 48,
        }
    }

    /// Length of a key. Bytes.
    #[must_use]
    pub const fn key_len(self) -> usize {
        match self {
            Self::Aes128Gcm => 16,
            Self::Aes256Gcm | Self::Chacha20Poly1305 => 32,
        }
    }

    fn hkdf(self) -> hkdf::Algorithm {
        match self {
            Self::Aes128Gcm | Self::Chacha20Poly1305 => hkdf::HKDF_SHA256,
            Self::Aes256Gcm => hkdf::HKDF_SHA384,
        }
    }
}

/// Longest traffic secret, bytes: SHA-384.
const MAX_SECRET: usize = 48;

/// One direction's application traffic secret. Overwritten when dropped; never printed.
#[derive(Clone, Zeroize, ZeroizeOnDrop)]
pub struct TrafficSecret {
    bytes: [u8; MAX_SECRET],
    len: usize,
}

/// A secret of a length that no suite of TLS 1.3 has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a traffic secret has {expected} bytes in this suite, not {given}")]
pub struct InvalidSecret {
    /// The suite's length.
    pub expected: usize,
    /// The given length.
    pub given: usize,
}

impl TrafficSecret {
    /// A secret as rustls' `KeyLog` gives it (`CLIENT_TRAFFIC_SECRET_0`, `SERVER_TRAFFIC_SECRET_0`).
    ///
    /// # Errors
    /// When the length is not that of the suite's hash.
    pub fn new(suite: Suite, secret: &[u8]) -> Result<Self, InvalidSecret> {
        let len = suite.secret_len();
        if secret.len() != len {
            return Err(InvalidSecret { expected: len, given: secret.len() });
        }
        let mut bytes = [0; MAX_SECRET];
        bytes[..len].copy_from_slice(secret);
        Ok(Self { bytes, len })
    }

    /// The secret's bytes, for the hand-over to a successor process.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes[..self.len]
    }

    /// HKDF-Expand-Label with an empty context. Source: RFC 8446 §7.1.
    pub(crate) fn expand_label(&self, suite: Suite, label: &str, out: &mut [u8]) {
        struct Length(usize);
        impl KeyType for Length {
            fn len(&self) -> usize {
                self.0
            }
        }
        let [.., high, low] = out.len().to_be_bytes();
        let label_len = [u8::try_from(6 + label.len()).expect("labels here are short")];
        let info: [&[u8]; 5] = [&[high, low], &label_len, b"tls13 ", label.as_bytes(), &[0]];
        let prk = Prk::new_less_safe(suite.hkdf(), self.as_bytes());
        prk.expand(&info, Length(out.len()))
            .and_then(|okm| okm.fill(out))
            .expect("every length asked for is at most one hash output");
    }

    /// The next generation's secret. Source: RFC 8446 §7.2.
    pub(crate) fn next(&self, suite: Suite) -> Self {
        let mut next = Self { bytes: [0; MAX_SECRET], len: self.len };
        self.expand_label(suite, "traffic upd", &mut next.bytes[..self.len]);
        next
    }
}

impl fmt::Debug for TrafficSecret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TrafficSecret").field("len", &self.len).finish_non_exhaustive()
    }
}

/// A finished handshake, ready for the record layer.
#[derive(Debug)]
pub struct TlsSession {
    /// The negotiated suite.
    pub suite: Suite,
    /// What we seal with.
    pub tx: TrafficSecret,
    /// What the peer seals with.
    pub rx: TrafficSecret,
    /// Records sealed with `tx` so far.
    pub tx_seq: u64,
    /// Records opened with `rx` so far.
    pub rx_seq: u64,
    /// Ciphertext read behind the handshake, not yet opened.
    pub leftover: Vec<u8>,
}
