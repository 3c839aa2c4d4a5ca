//! Routing decisions and the index behind them.

#![expect(clippy::unwrap_used, reason = "a test's own values are valid")]

mod inbound;
mod index;
mod outbound;
mod spread;
mod support;
