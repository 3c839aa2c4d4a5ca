//! When an issuer's keys are read again.

use std::time::{Duration, Instant};

/// Between two readings that succeed, before jitter.
const INTERVAL: Duration = Duration::from_secs(300);
/// After the first reading that fails; doubled with each further one.
const FIRST_RETRY: Duration = Duration::from_secs(1);
/// Longest wait after one that fails.
const LAST_RETRY: Duration = Duration::from_secs(60);
/// Shortest time between readings that tokens with unknown keys ask for.
const BETWEEN_ASKED: Duration = Duration::from_secs(5);

/// The times at which keys are read: every five minutes, sooner after a failure, and when a token names a key that is not known,
/// but then not more than once in five seconds.
#[derive(Clone, Debug)]
pub struct Refresh {
    due: Instant,
    underway: bool,
    failures: u32,
    begun: Option<Instant>,
}

/// What comes of asking for newer keys.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wanted {
    /// They are due now.
    Now,
    /// They are being read already.
    Underway,
    /// They were read a moment ago.
    TooSoon,
}

impl Refresh {
    /// Keys that were never read; they are due at once.
    #[must_use]
    pub const fn new(now: Instant) -> Self {
        Self { due: now, underway: false, failures: 0, begun: None }
    }

    /// True when they are to be read now; [`finished`](Self::finished) is called afterwards.
    pub fn begin(&mut self, now: Instant) -> bool {
        if self.underway || now < self.due {
            return false;
        }
        self.underway = true;
        self.begun = Some(now);
        true
    }

    /// They were read, or not. `entropy` is any random number.
    pub fn finished(&mut self, succeeded: bool, now: Instant, entropy: u32) {
        self.underway = false;
        self.failures = if succeeded { 0 } else { self.failures.saturating_add(1) };
        let wait = match self.failures {
            0 => INTERVAL,
            failures => FIRST_RETRY.saturating_mul(1 << (failures - 1).min(6)).min(LAST_RETRY),
        };
        // Between nine and eleven tenths, so that waypoints do not ask all at once.
        let jitter = wait.mul_f64(0.9 + 0.2 * f64::from(entropy) / f64::from(u32::MAX));
        self.due = now + jitter;
    }

    /// Somebody needs keys that are not there.
    pub fn want(&mut self, now: Instant) -> Wanted {
        if self.underway {
            return Wanted::Underway;
        }
        let recent = |begun| now.saturating_duration_since(begun) < BETWEEN_ASKED;
        if self.begun.is_some_and(recent) {
            return Wanted::TooSoon;
        }
        self.due = self.due.min(now);
        Wanted::Now
    }

    /// When to ask [`begin`](Self::begin) next; none while they are being read.
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Instant> {
        (!self.underway).then_some(self.due)
    }
}
