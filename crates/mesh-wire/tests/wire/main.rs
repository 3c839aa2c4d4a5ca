//! Resources and the delta conversation, from outside.

#![expect(clippy::unwrap_used, reason = "a test's own values are valid")]

mod delta;
mod garbage;
mod round_trip;
mod samples;
mod strictness;
