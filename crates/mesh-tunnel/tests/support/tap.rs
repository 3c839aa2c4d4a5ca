//! A listener on one direction of a tunnel's wire who knows its secret.
//!
//! A record opens only under the sequence number it was sealed with. That the tap opens each record with the next number of
//! its own count, from 0 under each key, shows that no number was used twice under one key and none was left out.

use mesh_tunnel::wire::{ContentType, HEADER, RecordKey, record_len};
use mesh_tunnel::{Suite, TrafficSecret};

pub struct Tap {
    key: RecordKey,
    /// Records after which the sender must have renewed its key.
    key_update_after: u64,
    heard: Vec<u8>,
    /// Records opened under all keys.
    pub records: u64,
}

/// Records that one turn may seal beyond the limit before it gets to renewing.
const OVERRUN: u64 = 64;

impl Tap {
    pub fn new(suite: Suite, secret: &TrafficSecret, key_update_after: u64) -> Self {
        let key = RecordKey::new(suite, secret.clone(), 0);
        Self { key, key_update_after, heard: Vec::new(), records: 0 }
    }

    pub fn hear(&mut self, bytes: &[u8]) {
        self.heard.extend_from_slice(bytes);
        let mut at = 0;
        while let Some(length) = record_len(&self.heard[at..]).expect("only sealed records")
            && at + length <= self.heard.len()
        {
            let record = &mut self.heard[at..at + length];
            let seq = self.key.seq();
            let (kind, size) = self.key.open(record).unwrap_or_else(|error| {
                panic!("record {seq} of generation {}: {error}", self.key.generation())
            });
            assert!(seq <= self.key_update_after + OVERRUN, "{seq} records under one key");
            // A KeyUpdate is the only handshake message we send.
            if kind == ContentType::Handshake {
                assert_eq!((size, record[HEADER]), (5, 24));
                self.key.renew();
            }
            self.records += 1;
            at += length;
        }
        self.heard.drain(..at);
    }

    /// How often the sender renewed its key.
    pub fn generation(&self) -> u64 {
        self.key.generation()
    }
}
