//! What a tunnel has to send: sealed records, and one record still open.
//!
//! ```text
//!  0        head               record        fill
//!  ├─ sent ──┼── sealed records ─┼─ open record ─┼─ free …
//! ```
//! Small frames share the open record until it is closed; bulk bytes are read by the kernel straight into the places that the
//! records to come will have. What is sealed is sent in order and never sealed again.

use std::io::IoSliceMut;

use crate::frame::{FRAME_HEADER, FrameHeader, FrameKind};
use crate::handover::{HandOverError, OutboxState, check};
use crate::post_handshake::key_update;
use crate::record::{Alert, ContentType, HEADER, MAX_PLAINTEXT, RecordKey, TAIL};

/// Bytes of a full record.
const STRIDE: usize = HEADER + MAX_PLAINTEXT + TAIL;
/// Control bytes a tunnel may have waiting beyond its share for data. A peer that lets this fill up without reading is
/// flooding: what we answer is bounded by what it sends.
const CONTROL_ROOM: usize = 256 << 10;
/// Below this, bytes that the peer does not take are moved to memory of their own, so that the large buffer is free again.
const SMALL_BACKLOG: usize = 64 << 10;
/// Sealed bytes that a predecessor may have had waiting on one tunnel.
const MAX_TAKEN_OVER: usize = 64 << 20;
/// Large buffers an engine keeps for the next tunnel.
const SPARE_BUFFERS: usize = 4;

/// Places for records that one call may offer.
pub(crate) const MAX_PLACES: usize = 16;

/// The control room is full.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct OutboxFull;

/// Send buffers of an engine, lent to tunnels that have something to send.
#[derive(Debug)]
pub(crate) struct BufferPool {
    size: usize,
    spare: Vec<Vec<u8>>,
}

impl BufferPool {
    pub(crate) fn new(send_buffer: usize) -> Self {
        Self { size: send_buffer + 2 * STRIDE, spare: Vec::new() }
    }

    fn take(&mut self) -> Vec<u8> {
        self.spare.pop().unwrap_or_else(|| vec![0; self.size])
    }

    fn give(&mut self, buffer: Vec<u8>) {
        if buffer.len() == self.size && self.spare.len() < SPARE_BUFFERS {
            self.spare.push(buffer);
        }
    }

    /// Gives memory back to the system; for an engine that has nothing to do.
    pub(crate) fn shrink(&mut self) {
        self.spare.truncate(1);
    }
}

/// One tunnel's sealing key and what is to be sent.
#[derive(Debug)]
pub(crate) struct Outbox {
    key: RecordKey,
    key_update_after: u64,
    buffer: Vec<u8>,
    head: usize,
    record: usize,
    fill: usize,
    /// Where data stops; control frames may go on by `CONTROL_ROOM`.
    data_limit: usize,
    finished: bool,
}

impl Outbox {
    pub(crate) fn new(key: RecordKey, key_update_after: u64, send_buffer: usize) -> Self {
        Self {
            key,
            key_update_after,
            buffer: Vec::new(),
            head: 0,
            record: 0,
            fill: HEADER,
            data_limit: send_buffer,
            finished: false,
        }
    }

    /// What waits, written down; the open record is sealed first.
    pub(crate) fn state(&mut self) -> OutboxState {
        self.close_record();
        OutboxState {
            key: Some(self.key.state()),
            sealed: self.sealed().to_vec(),
            finished: self.finished,
        }
    }

    pub(crate) fn from_state(
        state: &OutboxState,
        key_update_after: u64,
        send_buffer: usize,
    ) -> Result<Self, HandOverError> {
        let key =
            state.key.as_ref().ok_or(HandOverError::Inconsistent("an outbox without a key"))?;
        // The predecessor's buffers may have been larger than ours.
        check(state.sealed.len() <= MAX_TAKEN_OVER, "more sealed bytes than any engine holds")?;
        let mut outbox = Self::new(RecordKey::from_state(key)?, key_update_after, send_buffer);
        outbox.buffer.clone_from(&state.sealed);
        outbox.record = outbox.buffer.len();
        outbox.fill = outbox.record + HEADER;
        outbox.finished = state.finished;
        Ok(outbox)
    }

    /// Sealed bytes that wait for the socket.
    pub(crate) fn sealed(&self) -> &[u8] {
        &self.buffer[self.head..self.record]
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.head == self.record && self.fill == self.record + HEADER
    }

    /// True while another full record of data fits.
    pub(crate) fn takes_data(&self) -> bool {
        !self.finished && self.record + STRIDE <= self.data_limit
    }

    /// The socket took the first `count` sealed bytes.
    pub(crate) fn sent(&mut self, count: usize, pool: &mut BufferPool) {
        self.head += count;
        if self.is_empty() {
            pool.give(std::mem::take(&mut self.buffer));
            (self.head, self.record, self.fill) = (0, 0, HEADER);
        }
    }

    /// The socket takes no more for now: a small rest must not hold a large buffer.
    pub(crate) fn blocked(&mut self, pool: &mut BufferPool) {
        let rest = self.fill - self.head;
        if rest <= SMALL_BACKLOG && self.buffer.len() > 2 * SMALL_BACKLOG {
            // `fill` counts the next record's header, which may have no place yet.
            let end = self.fill.min(self.buffer.len());
            let small = self.buffer[self.head..end].to_vec();
            self.replace(small, pool);
        }
    }

    /// Seals the open record, if it holds anything.
    pub(crate) fn close_record(&mut self) {
        self.seal(ContentType::ApplicationData);
    }

    /// Adds frames to the stream. Whole frames only, as data may follow.
    pub(crate) fn control(
        &mut self,
        bytes: &[u8],
        pool: &mut BufferPool,
    ) -> Result<(), OutboxFull> {
        if self.finished {
            return Ok(());
        }
        self.renew_if_due(pool)?;
        let mut bytes = bytes;
        loop {
            if self.room() == 0 {
                self.close_record();
            }
            let take = self.room().min(bytes.len());
            self.reserve(self.fill + take + TAIL, pool)?;
            self.buffer[self.fill..self.fill + take].copy_from_slice(&bytes[..take]);
            self.fill += take;
            bytes = &bytes[take..];
            if bytes.is_empty() {
                return Ok(());
            }
        }
    }

    /// An alert in a record of its own. After it nothing is sealed any more.
    pub(crate) fn alert(&mut self, alert: Alert, pool: &mut BufferPool) -> Result<(), OutboxFull> {
        if self.finished {
            return Ok(());
        }
        // Source: RFC 8446 §6: level warning for close_notify, fatal for the rest.
        let level = if alert == Alert::CloseNotify { 1 } else { 2 };
        self.message(ContentType::Alert, &[level, alert as u8], pool)?;
        self.finished = true;
        Ok(())
    }

    /// Goes on to the next key, and says so; `request` asks the peer to do the same.
    pub(crate) fn renew(&mut self, request: bool, pool: &mut BufferPool) -> Result<(), OutboxFull> {
        if !self.finished {
            self.message(ContentType::Handshake, &key_update(request), pool)?;
            self.key.renew();
        }
        Ok(())
    }

    fn renew_if_due(&mut self, pool: &mut BufferPool) -> Result<(), OutboxFull> {
        if self.key.seq() >= self.key_update_after { self.renew(false, pool) } else { Ok(()) }
    }

    /// Places for up to `max` bytes of payload of one stream's DATA frames, in `places`; returns how many are used and how
    /// many bytes they have. [`commit`](Self::commit) must follow before anything else is added.
    pub(crate) fn places<'a>(
        &'a mut self,
        max: usize,
        places: &mut [IoSliceMut<'a>; MAX_PLACES],
        pool: &mut BufferPool,
    ) -> Result<(usize, usize), OutboxFull> {
        self.renew_if_due(pool)?;
        // A record with little room left is better closed than filled by a small frame.
        if self.room() < FRAME_HEADER + 256 {
            self.close_record();
        }
        self.reserve(self.data_limit + 2 * STRIDE, pool)?;
        let mut free = &mut self.buffer[self.fill..];
        let (mut record, mut room) =
            (self.record, self.record + HEADER + MAX_PLAINTEXT - self.fill);
        let (mut count, mut total) = (0, 0);
        while total < max && count < MAX_PLACES {
            let take = (room - FRAME_HEADER).min(max - total);
            let (_, rest) = std::mem::take(&mut free).split_at_mut(FRAME_HEADER);
            let (place, rest) = rest.split_at_mut(take);
            places[count] = IoSliceMut::new(place);
            count += 1;
            total += take;
            record += STRIDE;
            room = MAX_PLAINTEXT;
            if record + STRIDE > self.data_limit || rest.len() < TAIL + HEADER + STRIDE {
                break;
            }
            free = &mut rest[TAIL + HEADER..];
        }
        Ok((count, total))
    }

    /// The first `count` bytes of the places just offered hold payload of `stream`.
    pub(crate) fn commit(&mut self, stream: u32, mut count: usize) {
        while count > 0 {
            let length = (self.room() - FRAME_HEADER).min(count);
            let header = FrameHeader {
                length: u32::try_from(length).expect("at most a record"),
                kind: FrameKind::Data,
                flags: 0,
                stream,
            };
            self.buffer[self.fill..self.fill + FRAME_HEADER].copy_from_slice(&header.bytes());
            self.fill += FRAME_HEADER + length;
            count -= length;
            if count > 0 || self.room() == 0 {
                self.close_record();
            }
        }
    }

    /// Bytes that still fit into the open record.
    fn room(&self) -> usize {
        self.record + HEADER + MAX_PLAINTEXT - self.fill
    }

    fn message(
        &mut self,
        content_type: ContentType,
        bytes: &[u8],
        pool: &mut BufferPool,
    ) -> Result<(), OutboxFull> {
        self.close_record();
        self.reserve(self.fill + bytes.len() + TAIL, pool)?;
        self.buffer[self.fill..self.fill + bytes.len()].copy_from_slice(bytes);
        self.fill += bytes.len();
        self.seal(content_type);
        Ok(())
    }

    fn seal(&mut self, content_type: ContentType) {
        if self.fill > self.record + HEADER {
            let end = self.fill + TAIL;
            self.key.seal(&mut self.buffer[self.record..end], content_type);
            self.record = end;
            self.fill = end + HEADER;
        }
    }

    /// Makes the buffer at least `length` long.
    fn reserve(&mut self, length: usize, pool: &mut BufferPool) -> Result<(), OutboxFull> {
        if length <= self.buffer.len() {
            return Ok(());
        }
        if length > self.data_limit + 2 * STRIDE + CONTROL_ROOM {
            return Err(OutboxFull);
        }
        if self.buffer.len() < pool.size {
            self.replace_with_large(pool);
        }
        // `replace_with_large` moves the bytes to the front, which only makes the need smaller.
        if length > self.buffer.len() {
            self.buffer.resize(length + SMALL_BACKLOG, 0);
        }
        Ok(())
    }

    fn replace_with_large(&mut self, pool: &mut BufferPool) {
        let mut large = pool.take();
        let held = self.fill.min(self.buffer.len()).saturating_sub(self.head);
        large[..held].copy_from_slice(&self.buffer[self.head..self.head + held]);
        self.replace(large, pool);
    }

    fn replace(&mut self, buffer: Vec<u8>, pool: &mut BufferPool) {
        pool.give(std::mem::replace(&mut self.buffer, buffer));
        self.record -= self.head;
        self.fill -= self.head;
        self.head = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::record_len;
    use crate::session::{Suite, TrafficSecret};

    fn key() -> RecordKey {
        let secret = TrafficSecret::new(Suite::Aes128Gcm, &[9; 32]).unwrap();
        RecordKey::new(Suite::Aes128Gcm, secret, 0)
    }

    /// The socket's side: what it was given, opened.
    struct Reader {
        key: RecordKey,
        wire: Vec<u8>,
        text: Vec<u8>,
    }

    impl Reader {
        fn take(&mut self, bytes: &[u8]) {
            self.wire.extend_from_slice(bytes);
            let mut at = 0;
            while let Some(length) = record_len(&self.wire[at..]).unwrap()
                && at + length <= self.wire.len()
            {
                let record = &mut self.wire[at..at + length];
                let (content_type, size) = self.key.open(record).unwrap();
                if content_type == ContentType::Handshake {
                    self.key.renew();
                } else {
                    self.text.extend_from_slice(&record[HEADER..HEADER + size]);
                }
                at += length;
            }
            self.wire.drain(..at);
        }
    }

    fn random(state: &mut u64, bound: usize) -> usize {
        *state ^= *state << 13;
        *state ^= *state >> 7;
        *state ^= *state << 17;
        usize::try_from(*state).unwrap_or(0) % bound.max(1)
    }

    /// Any mix of frames, data, renewals and partial writes comes out in order, sealed once; and an empty outbox holds nothing.
    #[test]
    fn what_goes_in_comes_out_in_order() {
        for seed in 1..300u64 {
            let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
            let limit = [32 << 10, 100_000, 512 << 10][random(&mut state, 3)];
            let mut pool = BufferPool::new(limit);
            let mut outbox = Outbox::new(key(), [2, 30, 1 << 23][random(&mut state, 3)], limit);
            let mut reader = Reader { key: key(), wire: Vec::new(), text: Vec::new() };
            let mut expected = Vec::new();
            let mut byte = 0u8;
            for _ in 0..200 {
                match random(&mut state, 6) {
                    0 => {
                        byte = byte.wrapping_add(1);
                        let longest = [9, 40_000][random(&mut state, 2)];
                        let length = random(&mut state, longest);
                        let mut frame = header(FrameKind::Unknown, length).to_vec();
                        frame.resize(FRAME_HEADER + length, byte);
                        if outbox.control(&frame, &mut pool).is_err() {
                            break;
                        }
                        expected.extend_from_slice(&frame[FRAME_HEADER..]);
                    }
                    1 | 2 if outbox.takes_data() => {
                        byte = byte.wrapping_add(1);
                        let most = [50, 200_000][random(&mut state, 2)];
                        let max = 1 + random(&mut state, most);
                        let mut places = std::array::from_fn(|_| IoSliceMut::new(&mut []));
                        let (count, offered) = outbox.places(max, &mut places, &mut pool).unwrap();
                        assert!(offered > 0 && offered <= max);
                        let given = 1 + random(&mut state, offered);
                        let mut left = given;
                        for place in &mut places[..count] {
                            let part = left.min(place.len());
                            place[..part].fill(byte);
                            left -= part;
                        }
                        outbox.commit(7, given);
                        expected.resize(expected.len() + given, byte);
                    }
                    3 => drop(outbox.renew(false, &mut pool)),
                    _ => {
                        outbox.close_record();
                        let whole = outbox.sealed().len();
                        let all = random(&mut state, 3) == 0;
                        let count = if all { whole } else { random(&mut state, whole + 1) };
                        reader.take(&outbox.sealed()[..count]);
                        outbox.sent(count, &mut pool);
                        if count < whole {
                            outbox.blocked(&mut pool);
                        }
                    }
                }
            }
            outbox.close_record();
            let rest = outbox.sealed().len();
            reader.take(outbox.sealed());
            outbox.sent(rest, &mut pool);
            assert!(outbox.is_empty() && outbox.buffer.is_empty());
            assert!(payloads(&reader.text) == expected, "seed {seed}");
        }
    }

    fn header(kind: FrameKind, length: usize) -> [u8; FRAME_HEADER] {
        let length = u32::try_from(length).unwrap();
        FrameHeader { length, kind, flags: 0, stream: 7 }.bytes()
    }

    /// The payloads of a row of frames.
    fn payloads(mut text: &[u8]) -> Vec<u8> {
        let mut payloads = Vec::new();
        while let Some((head, rest)) = text.split_first_chunk::<FRAME_HEADER>() {
            let (payload, rest) = rest.split_at(FrameHeader::parse(head).length as usize);
            payloads.extend_from_slice(payload);
            text = rest;
        }
        payloads
    }

    /// A peer that reads nothing while the buffer fills to its very end by control frames, and then some.
    #[test]
    fn a_buffer_filled_to_its_end_survives_partial_writes() {
        for length in 1..400 {
            let mut pool = BufferPool::new(128 << 10);
            let mut outbox = Outbox::new(key(), u64::MAX, 128 << 10);
            let mut reader = Reader { key: key(), wire: Vec::new(), text: Vec::new() };
            let mut total = 0;
            while outbox.control(&vec![1; length * 41], &mut pool).is_ok() {
                total += length * 41;
                outbox.close_record();
                let exact = outbox.buffer.len().saturating_sub(outbox.fill + TAIL);
                if exact > 0 && exact <= MAX_PLAINTEXT {
                    outbox.control(&vec![1; exact], &mut pool).unwrap();
                    total += exact;
                    outbox.close_record();
                    break;
                }
            }
            let keep = 1_000.min(outbox.sealed().len());
            let count = outbox.sealed().len() - keep;
            reader.take(&outbox.sealed()[..count]);
            outbox.sent(count, &mut pool);
            outbox.blocked(&mut pool);
            outbox.control(&[1; 9], &mut pool).unwrap();
            outbox.close_record();
            reader.take(outbox.sealed());
            assert_eq!(reader.text.len(), total + 9);
        }
    }
}
