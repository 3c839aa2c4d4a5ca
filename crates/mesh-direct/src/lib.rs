//! The direct path's bookkeeping: which pairs of pods on a node have a verdict in the kernel, which
//! connections were made by it, and what has to go when what a verdict rests on changes.
//!
//! [`Ledger`] is a core without I/O. Its shell carries out each [`Command`] before the next input and
//! says when the kernel refused.
//!
//! **Invariants.** A pair has a verdict only when it was judged to [`Judgement::Grant`] on the picture
//! that is current, the ledger's own; nobody else's answer is taken. A change judges every pair again.
//! While a verdict that has to go cannot be taken back, the lease that keeps verdicts in force is not
//! renewed, so that it lapses by itself. A virtual address of a service leads straight to endpoints only
//! while they are all that the agent would choose among and each of them has its pair's verdict.
#![forbid(unsafe_code)]

mod ledger;

pub use ledger::{Bounds, Command, Flow, Input, Judge, Judgement, Ledger, Pair, Pod, Refused, Vip};
