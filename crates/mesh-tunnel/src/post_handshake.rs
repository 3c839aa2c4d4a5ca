//! TLS handshake messages behind the handshake: KeyUpdate, and tickets that nobody uses. Source: RFC 8446 §4.6.

use crate::handover::{HandOverError, check};
use crate::record::Alert;

/// A message the record layer must act on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PostHandshakeMessage {
    /// The peer seals with its next key from here on.
    KeyUpdate {
        /// It wants the same of us.
        requested: bool,
    },
    /// A session ticket; nothing to do.
    Ticket,
}

/// Longest message that is taken. Tickets are below 64 KiB + some; nobody sends ones above a few KiB.
const MAX_MESSAGE: usize = 16 << 10;
const NEW_SESSION_TICKET: u8 = 4;
const KEY_UPDATE: u8 = 24;

/// Puts messages together that span records.
#[derive(Clone, Debug, Default)]
pub struct PostHandshake {
    partial: Vec<u8>,
}

impl PostHandshake {
    /// True while a message is incomplete; no record of another type may come then (RFC 8446 §5.1).
    #[must_use]
    pub fn is_partial(&self) -> bool {
        !self.partial.is_empty()
    }

    pub(crate) fn partial(&self) -> &[u8] {
        &self.partial
    }

    pub(crate) fn with_partial(partial: &[u8]) -> Result<Self, HandOverError> {
        check(partial.len() < 4 + MAX_MESSAGE, "a handshake message longer than any")?;
        Ok(Self { partial: partial.to_vec() })
    }

    /// Takes the content of one handshake record. `from_server` allows session tickets.
    ///
    /// At most one KeyUpdate can be in a record, at its end, as the key changes there: so one call gives at most one.
    ///
    /// # Errors
    /// The fatal alert to answer with.
    pub fn receive(
        &mut self,
        content: &[u8],
        from_server: bool,
    ) -> Result<Option<PostHandshakeMessage>, Alert> {
        // An empty handshake record is not allowed (RFC 8446 §5.1).
        if content.is_empty() {
            return Err(Alert::UnexpectedMessage);
        }
        self.partial.extend_from_slice(content);
        let mut at = 0;
        let mut seen = None;
        while let Some(header) = self.partial[at..].first_chunk::<4>() {
            let length = u32::from_be_bytes([0, header[1], header[2], header[3]]) as usize;
            let kind = header[0];
            match kind {
                NEW_SESSION_TICKET if from_server => {}
                KEY_UPDATE if length == 1 => {}
                KEY_UPDATE => return Err(Alert::DecodeError),
                _ => return Err(Alert::UnexpectedMessage),
            }
            if length > MAX_MESSAGE {
                return Err(Alert::DecodeError);
            }
            let Some(body) = self.partial[at + 4..].get(..length) else { break };
            at += 4 + length;
            if kind == NEW_SESSION_TICKET {
                seen = Some(PostHandshakeMessage::Ticket);
                continue;
            }
            let requested = match body {
                [0] => false,
                [1] => true,
                _ => return Err(Alert::IllegalParameter),
            };
            if at != self.partial.len() {
                return Err(Alert::UnexpectedMessage);
            }
            self.partial = Vec::new();
            return Ok(Some(PostHandshakeMessage::KeyUpdate { requested }));
        }
        self.partial.drain(..at);
        if self.partial.is_empty() {
            self.partial = Vec::new();
        }
        Ok(seen)
    }
}

/// Our KeyUpdate. Source: RFC 8446 §4.6.3.
pub(crate) const fn key_update(request: bool) -> [u8; 5] {
    [KEY_UPDATE, 0, 0, 1, request as u8]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_may_span_records() {
        let ticket = [&[4, 0, 0, 3][..], b"abc"].concat();
        let mut reader = PostHandshake::default();
        for byte in &ticket[..6] {
            assert_eq!(reader.receive(&[*byte], true), Ok(None));
            assert!(reader.is_partial());
        }
        assert_eq!(reader.receive(&ticket[6..], true), Ok(Some(PostHandshakeMessage::Ticket)));
        assert!(!reader.is_partial());
        let both = [&ticket[..], &key_update(true)].concat();
        let expected = Some(PostHandshakeMessage::KeyUpdate { requested: true });
        assert_eq!(reader.receive(&both, true), Ok(expected));
    }

    #[test]
    fn other_messages_are_refused() {
        for (content, alert) in [
            (&[][..], Alert::UnexpectedMessage),
            (&[4, 0, 0, 0], Alert::UnexpectedMessage),
            (&[1, 0, 0, 0], Alert::UnexpectedMessage),
            (&[13, 0, 0, 0], Alert::UnexpectedMessage),
            (&[24, 0, 0, 2, 0, 0], Alert::DecodeError),
            (&[24, 0, 0, 1, 2], Alert::IllegalParameter),
            (&[24, 0, 0, 1, 0, 24, 0, 0, 1, 0], Alert::UnexpectedMessage),
        ] {
            assert_eq!(PostHandshake::default().receive(content, false), Err(alert), "{content:?}");
        }
        assert_eq!(
            PostHandshake::default().receive(&[4, 0, 0x50, 0], true),
            Err(Alert::DecodeError)
        );
    }
}
