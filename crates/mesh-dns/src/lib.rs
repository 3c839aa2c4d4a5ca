//! DNS for enrolled pods: names the mesh knows are answered from the index, everything else is the pod's own
//! resolvers' business and goes to them byte for byte.
//!
//! [`answer`] decides about one query, [`Cache`] keeps what resolvers answered. Both are pure: bytes in, bytes out.
//!
//! **Invariants.** What is not owned is never altered, whatever its name, type, class or opcode. An owned name never
//! gets NXDOMAIN. No bytes from outside panic, and every answer fits its transport.

#![forbid(unsafe_code)]

mod answer;
mod cache;
mod owner;
mod wire;

pub use answer::{DnsDecision, Refusal, TTL_SECONDS, Transport, answer, server_failure};
pub use cache::{Cache, CacheConfig, ResolverScope};
pub use owner::{DnsClient, MAX_SEARCH_DOMAINS};
pub use wire::query_type_label;
