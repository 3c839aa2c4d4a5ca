//! Seeded mutation for the smoke test; libFuzzer brings its own.

use mesh_model::splitmix;

/// SplitMix64.
#[derive(Clone, Debug)]
pub struct Random(pub u64);

impl Random {
    /// The next number.
    pub const fn next(&mut self) -> u64 {
        splitmix::next(&mut self.0)
    }

    /// In `0..bound`; 0 for an empty range.
    pub fn below(&mut self, bound: usize) -> usize {
        let bound = u64::try_from(bound.max(1)).unwrap_or(u64::MAX);
        usize::try_from(self.next() % bound).unwrap_or(0)
    }

    /// Any byte.
    pub const fn byte(&mut self) -> u8 {
        self.next().to_le_bytes()[0]
    }
}

/// Bytes that parsers stumble over.
const ODD: [u8; 12] = [0, 1, 0x7f, 0x80, 0xff, b'\n', b'"', b'/', b':', b'%', b'-', b'9'];
/// Longest input made.
const MAX_LENGTH: usize = 4096;

/// An input near one of `corpus`, which must not be empty; one in sixteen is all noise.
#[must_use]
pub fn mutate(corpus: &[Vec<u8>], random: &mut Random) -> Vec<u8> {
    if random.below(16) == 0 {
        return (0..random.below(128)).map(|_| random.byte()).collect();
    }
    let mut input = corpus[random.below(corpus.len())].clone();
    for _ in 0..=random.below(5) {
        let at = random.below(input.len());
        let to = (at + 1 + random.below(16)).min(input.len());
        match random.below(9) {
            0 if !input.is_empty() => input[at] ^= 1 << random.below(8),
            1 if !input.is_empty() => input[at] = ODD[random.below(ODD.len())],
            2 if !input.is_empty() => {
                input[at] = input[at].wrapping_add(random.byte() % 9).wrapping_sub(4)
            }
            3 => input.insert(at, random.byte()),
            4 => drop(input.drain(at..to)),
            5 => input.truncate(at),
            6 => {
                let again = input[at..to].to_vec();
                input.splice(at..at, again);
            }
            7 => {
                let other = &corpus[random.below(corpus.len())];
                let from = random.below(other.len());
                let until = (from + random.below(64)).min(other.len());
                input.splice(at..to, other[from..until].iter().copied());
            }
            _ => {
                let noise: Vec<u8> = (0..random.below(8)).map(|_| random.byte()).collect();
                input.splice(at..to, noise);
            }
        }
    }
    input.truncate(MAX_LENGTH);
    input
}
