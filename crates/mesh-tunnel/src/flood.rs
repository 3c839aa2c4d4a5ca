//! Bounds on what costs us work and the peer nothing.

use std::time::Instant;

/// A token bucket. Frames that carry no payload cost tokens; they come back with time and with payload.
///
/// Source: the denial of service considerations of RFC 9113 §10.5.
#[derive(Clone, Debug)]
pub(crate) struct FloodMeter {
    tokens: u32,
    burst: u32,
    per_second: u32,
    refilled_at: Instant,
}

/// The bucket is empty.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Flood;

impl FloodMeter {
    pub(crate) const fn new(burst: u32, per_second: u32, now: Instant) -> Self {
        Self { tokens: burst, burst, per_second, refilled_at: now }
    }

    pub(crate) fn take(&mut self, now: Instant) -> Result<(), Flood> {
        if self.tokens == 0 {
            self.refill(now);
        }
        self.tokens = self.tokens.checked_sub(1).ok_or(Flood)?;
        Ok(())
    }

    /// Useful work was done: one token back.
    pub(crate) fn give(&mut self) {
        self.tokens = (self.tokens + 1).min(self.burst);
    }

    fn refill(&mut self, now: Instant) {
        let elapsed = now.saturating_duration_since(self.refilled_at).as_millis();
        let tokens = elapsed.saturating_mul(u128::from(self.per_second)) / 1000;
        if tokens > 0 {
            self.refilled_at = now;
            self.tokens = u32::try_from(tokens).unwrap_or(u32::MAX).min(self.burst);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[expect(clippy::disallowed_methods, reason = "a test needs some instant to start from")]
    fn start() -> Instant {
        Instant::now()
    }

    #[test]
    fn a_bucket_empties_and_refills() {
        let now = start();
        let mut meter = FloodMeter::new(3, 10, now);
        assert!((0..3).all(|_| meter.take(now).is_ok()));
        assert_eq!(meter.take(now), Err(Flood));
        assert_eq!(meter.take(now + Duration::from_millis(99)), Err(Flood));
        let later = now + Duration::from_millis(200);
        assert_eq!((meter.take(later), meter.take(later)), (Ok(()), Ok(())));
        assert_eq!(meter.take(later), Err(Flood));
        meter.give();
        assert_eq!(meter.take(later), Ok(()));
    }
}
