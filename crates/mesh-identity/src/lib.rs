//! Who a workload is and how it proves it: certificates, trust, rotation, the authority, and the judgement of peers.
//!
//! No clock, socket or file: every decision takes `now`. The only outside source is the cryptographic library's
//! random generator, which keys and serial numbers need.
//!
//! ```text
//! csr() ─► CaCore::sign ─► IssuedAnswer::check ─► Svid ─┐
//!                                                        ├─► tls::client / tls::server ─► PeerCertificate
//! roots and revocations ─► TrustBundle ─► PeerVerifier ─┘
//! ```

#![forbid(unsafe_code)]

mod ca;
mod certificate;
mod csr;
mod kept;
mod peer;
mod rejection;
mod revocation;
mod rotation;
mod svid;
pub mod tls;
mod token;
mod trust;

pub use ca::{
    AuthorityState, CaConfig, CaCore, CaError, CaState, MountedFiles, RevocationState, SignError,
};
pub use csr::{CsrError, CsrKey, csr};
pub use kept::{InvalidRecord, KEPT_BYTES, KeptRecord, TooLargeToKeep};
pub use peer::{Expected, PeerCertificate, PeerVerifier, Side};
pub use rejection::PeerRejection;
pub use revocation::InvalidRevocationList;
pub use rotation::{MAX_IN_FLIGHT, Now, RotationCommand, RotationCore, RotationInput, Urgency};
pub use svid::{InvalidAnswer, IssuedAnswer, Svid};
pub use token::{
    InvalidNodeName, JoinTokens, NodeName, SessionTokens, TokenError, TokenId, TokenKey,
    TokenRejection,
};
pub use trust::{InvalidBundle, TrustBundle};
