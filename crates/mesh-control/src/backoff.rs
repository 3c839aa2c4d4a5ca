//! How long to wait before the controller is tried again.

use std::time::Duration;

/// Doubles from 10 ms to 15 s, with a fifth of jitter. Source: ztunnel's xDS client; the jitter keeps a fleet of agents from
/// returning to a restarted controller in one moment.
#[derive(Debug, Default)]
pub struct Backoff {
    failures: u32,
}

const FIRST: Duration = Duration::from_millis(10);
const LONGEST: Duration = Duration::from_secs(15);

impl Backoff {
    /// The pause after one more failure; `entropy` is any random number.
    pub fn next(&mut self, entropy: u32) -> Duration {
        let base = FIRST.saturating_mul(1 << self.failures.min(11)).min(LONGEST);
        self.failures = self.failures.saturating_add(1);
        let jitter = base / 5 * (entropy % 1000) / 1000;
        base - jitter
    }

    /// Starts over after a success.
    pub fn reset(&mut self) {
        self.failures = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_to_their_bound_and_start_over() {
        let mut backoff = Backoff::default();
        let pauses: Vec<Duration> = (0..20).map(|_| backoff.next(0)).collect();
        assert_eq!(pauses[0], FIRST);
        assert_eq!(pauses[3], Duration::from_millis(80));
        assert_eq!(pauses[19], LONGEST);
        backoff.reset();
        assert_eq!(backoff.next(0), FIRST);
    }

    #[test]
    fn jitter_only_shortens_and_by_a_fifth_at_most() {
        for entropy in [0, 1, 500, 999, u32::MAX] {
            let mut backoff = Backoff { failures: 30 };
            let pause = backoff.next(entropy);
            assert!(pause <= LONGEST && pause >= LONGEST * 4 / 5, "{pause:?}");
        }
    }
}
