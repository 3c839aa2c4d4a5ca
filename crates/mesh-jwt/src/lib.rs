//! Who sent a request, by the token in it.
//!
//! ```text
//! RequestAuthentication ──► Rules ─┐
//! headers, cookies, query ─────────┴► find ──► Found ─┐
//! KeySet (inline, or read by the shell) ──────────────┴► verify ──► RequestClaims ──► what goes on to the server
//! ```
//! [`find()`] looks for tokens where the rules say, [`verify`] judges one by one rule and one set of keys, [`Changes`] says what
//! of them the server sees. Whoever has no token passes, unauthenticated; one that is there and not good refuses the request.
//! A key decides by which algorithms it verifies; a token's header only chooses among them. Nothing here reads a clock or a
//! socket: keys from elsewhere come as text, and [`Refresh`] says when to read them again.

#![forbid(unsafe_code)]

mod authentication;
mod changes;
mod find;
mod key;
#[cfg(any(test, feature = "mint"))]
pub mod mint;
mod refresh;
mod rejection;
#[cfg(test)]
mod tests;
mod token;
mod verify;

pub use authentication::{
    HeaderLocation, InvalidRule, JwtRule, KeyPlace, KeySource, OutputClaim, RequestAuthentication,
    Rule, Rules,
};
pub use changes::Changes;
pub use find::{Found, Place, find, redacted};
pub use key::{Algorithm, InvalidKeySet, KeySet, MAX_KEY_SET_BYTES};
pub use refresh::{Refresh, Wanted};
pub use rejection::Rejection;
pub use token::{MAX_TOKEN_BYTES, Token};
pub use verify::{LEEWAY, Verified, assume_signed, verify};
