//! TLS records and the messages behind the handshake.

use mesh_tunnel::wire::{
    Alert, ContentType, HEADER, MAX_PLAINTEXT, MAX_RECORD, PostHandshake, PostHandshakeMessage,
    RecordError, RecordKey, TAIL, record_len,
};
use mesh_tunnel::{Suite, TrafficSecret};

use crate::input::{Input, long, short};

const SUITES: [Suite; 3] = [Suite::Aes128Gcm, Suite::Aes256Gcm, Suite::Chacha20Poly1305];

fn key(suite: Suite) -> RecordKey {
    key_of(suite, [7; 48])
}

fn key_of(suite: Suite, secret: [u8; 48]) -> RecordKey {
    let secret = TrafficSecret::new(suite, &secret[..suite.secret_len()]);
    RecordKey::new(suite, secret.expect("the length is the suite's"), 0)
}

/// Records as they come from the wire: lengths are bounded, nothing opens that was not sealed, and what was opens once.
pub fn record(data: &[u8]) {
    let mut input = Input::new(data);
    let suite = SUITES[usize::from(input.byte()) % SUITES.len()];
    let content_type = [ContentType::ApplicationData, ContentType::Handshake, ContentType::Alert]
        [usize::from(input.byte()) % 3];
    let (place, bit) = (usize::from(input.u16()), input.byte() % 8);
    let bytes = input.rest();
    if let Ok(Some(length)) = record_len(bytes) {
        assert!((HEADER..=MAX_RECORD).contains(&length));
        let mut garbage = bytes[..length.min(bytes.len())].to_vec();
        assert!(key_of(suite, [8; 48]).open(&mut garbage).is_err(), "a record nobody sealed");
    }
    let content = &bytes[..bytes.len().min(MAX_PLAINTEXT)];
    let mut sealed = vec![0; HEADER + content.len() + TAIL];
    sealed[HEADER..HEADER + content.len()].copy_from_slice(content);
    let (mut sealer, mut opener) = (key(suite), key(suite));
    sealer.seal(&mut sealed, content_type);
    assert_eq!(record_len(&sealed), Ok(Some(sealed.len())));
    let mut opened = sealed.clone();
    assert_eq!(opener.open(&mut opened), Ok((content_type, content.len())));
    assert_eq!(&opened[HEADER..HEADER + content.len()], content);
    assert_eq!(opener.open(&mut sealed.clone()), Err(RecordError::BadMac), "a replay");
    let at = place % sealed.len();
    sealed[at] ^= 1 << bit;
    assert_eq!(key(suite).open(&mut sealed), Err(RecordError::BadMac), "an altered record");
}

pub(crate) fn record_seeds() -> Vec<Vec<u8>> {
    let sealed = |suite: u8| {
        let mut record = vec![0; HEADER + 5 + TAIL];
        key(SUITES[usize::from(suite)]).seal(&mut record, ContentType::ApplicationData);
        [&[suite, 0, 0, 9, 3][..], &record].concat()
    };
    vec![
        sealed(0),
        sealed(1),
        sealed(2),
        vec![0, 1, 0, 0, 0],
        b"\0\0\0\0\0\x17\x03\x03\x40\x00x".to_vec(),
    ]
}

/// Handshake messages of a finished handshake, cut anywhere.
pub fn post_handshake(data: &[u8]) {
    let mut input = Input::new(data);
    let from_server = input.byte() & 1 == 1;
    let mut messages = PostHandshake::default();
    let mut pending = 0;
    while !input.is_empty() {
        let content = input.long();
        let was_partial = messages.is_partial();
        match messages.receive(content, from_server) {
            Ok(Some(PostHandshakeMessage::KeyUpdate { .. })) => {
                assert!(!messages.is_partial(), "the key changes at the end of a record");
                pending = 0;
            }
            Ok(Some(PostHandshakeMessage::Ticket)) => assert!(from_server),
            Ok(None) => {
                assert!(messages.is_partial() || was_partial);
                pending += content.len();
                assert!(
                    pending <= (16 << 10) + 4 + usize::from(u16::MAX),
                    "what is kept has a bound"
                );
            }
            Err(alert) => {
                assert!(matches!(
                    alert,
                    Alert::UnexpectedMessage | Alert::DecodeError | Alert::IllegalParameter
                ));
                return;
            }
        }
        if !messages.is_partial() {
            pending = 0;
        }
    }
}

pub(crate) fn post_handshake_seeds() -> Vec<Vec<u8>> {
    let update = [24, 0, 0, 1, 1];
    let ticket = [&[4, 0, 0, 9][..], &[1; 9]].concat();
    vec![
        [vec![0], long(&update)].concat(),
        [vec![1], long(&update[..3]), long(&update[3..])].concat(),
        [vec![1], long(&ticket), long(&[24, 0, 0, 1, 0])].concat(),
        [vec![1], long(&ticket[..6]), long(&ticket[6..])].concat(),
        short(&[24, 0, 0, 2, 0, 0]),
    ]
}
