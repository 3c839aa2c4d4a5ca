//! Bytes that wait for a socket. Empty ones own no memory.

/// A queue of bytes, consumed from the front.
#[derive(Debug, Default)]
pub(crate) struct ByteQueue {
    bytes: Vec<u8>,
    start: usize,
}

/// Consumed bytes at the front that are worth moving the rest for.
const COMPACT_AT: usize = 256 << 10;

impl ByteQueue {
    pub(crate) fn len(&self) -> usize {
        self.bytes.len() - self.start
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.len() == 0
    }

    pub(crate) fn as_slice(&self) -> &[u8] {
        &self.bytes[self.start..]
    }

    pub(crate) fn push(&mut self, bytes: &[u8]) {
        if self.start >= COMPACT_AT && self.start >= self.len() {
            self.bytes.drain(..self.start);
            self.start = 0;
        }
        self.bytes.extend_from_slice(bytes);
    }

    pub(crate) fn consume(&mut self, count: usize) {
        self.start += count;
        if self.is_empty() {
            *self = Self::default();
        }
    }

    /// Takes everything out.
    pub(crate) fn clear(&mut self) -> usize {
        std::mem::take(self).len()
    }
}
