//! Numbers that scatter well, for what no secret hangs on: jitter, load balancing, trace ids, and the seeds of tests.
//!
//! Source: SplitMix64; Steele, Lea, Flood, "Fast Splittable Pseudorandom Number Generators", 2014.

const GAMMA: u64 = 0x9e37_79b9_7f4a_7c15;

/// The next number of a generator whose whole state is `state`. Any state is good, also 0.
pub const fn next(state: &mut u64) -> u64 {
    *state = state.wrapping_add(GAMMA);
    mixed(*state)
}

/// The `n`th number of the generator that begins at `seed`, counted from 1: as [`next`] gives it.
#[must_use]
pub const fn nth(seed: u64, n: u64) -> u64 {
    mixed(seed.wrapping_add(GAMMA.wrapping_mul(n)))
}

/// Every bit of the result hangs on every bit of `z`.
const fn mixed(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Source: the first numbers of the reference implementation, `splitmix64.c` by Sebastiano Vigna, from state 1234567.
    #[test]
    fn numbers_are_those_of_the_reference() {
        let mut state = 1_234_567;
        let numbers: Vec<u64> = (0..3).map(|_| next(&mut state)).collect();
        assert_eq!(
            numbers,
            [6_457_827_717_110_365_317, 3_203_168_211_198_807_973, 9_817_491_932_198_370_423]
        );
        assert_eq!((1..=3).map(|n| nth(1_234_567, n)).collect::<Vec<_>>(), numbers);
    }
}
