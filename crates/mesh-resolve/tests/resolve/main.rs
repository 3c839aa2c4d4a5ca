//! Routing decisions and the index behind them.

mod inbound;
mod index;
mod outbound;
mod support;
