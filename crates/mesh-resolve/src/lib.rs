//! Stage two of a connection: what the mesh looks like, and where a flow goes in it.
//!
//! [`WorkloadIndex`] is the picture, changed by [`IndexDelta`] and stamped with a revision; a clone is a snapshot.
//! [`resolve`] and [`resolve_inbound`] turn a captured [`Flow`](mesh_model::Flow) into a [`ResolvedFlow`] or say why
//! there is no way ([`Unroutable`]). Both are pure: equal index, settings, flow and entropy give an equal answer.
//! [`Trace`] collects the steps of a decision for people.

#![forbid(unsafe_code)]

pub mod authority;
mod balance;
mod fronted;
mod gateway;
mod grouped;
pub mod inbound;
pub mod index;
mod lookup;
pub mod outbound;
pub mod pending;
pub mod route;
pub mod settings;
mod spread;
pub mod trace;
pub mod unroutable;
mod waypoint;

pub use authority::{Authority, InvalidAuthority};
pub use balance::endpoints_at;
pub use fronted::{is_fronted, resolve_fronted};
pub use inbound::{resolve_inbound, resolve_inbound_traced};
pub use index::{IndexDelta, WorkloadIndex};
pub use lookup::Addressed;
pub use outbound::{resolve, resolve_traced};
pub use pending::PendingDns;
pub use route::{RequiredWaypoint, ResolvedFlow, Route, TunnelRoute};
pub use settings::{ResolveSettings, WaypointEnforcement};
pub use spread::{NotSpread, Spread, resolve_spread};
pub use trace::{Step, Trace};
pub use unroutable::Unroutable;
