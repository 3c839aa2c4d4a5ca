//! Where a request goes: the routes of the Gateway API, compiled.
//!
//! [`RouteTable`] holds HTTPRoutes and GRPCRoutes and the frontends they attach to. [`RouteTable::select`] finds the rule for a
//! request, [`Selected::plan`] what that rule does with it: an answer of its own, or a backend and what to change on the way.
//! Everything is a pure function of (table, request, entropy).
//!
//! ```text
//! which routes count, at the service and port that was dialled
//!  1. those of the client's namespace, if there are any (consumer routes); else those of the service's own
//!  2. GRPCRoutes, if there are any; else HTTPRoutes
//!  3. none: the request goes to the service itself
//! which rule, of those
//!  4. the first that matches in the order of the specification (see `precedence`); none: not found
//! ```
//! Source: Gateway API `HTTPRouteRule.matches`, `GRPCRouteRule.matches`; GEP-1294 and GEP-1426 for services as parents.
//!
//! Rules are found by path segments and then by header or query value, so that what one request costs does not grow with the
//! number of routes; see `index`.

#![forbid(unsafe_code)]

mod compile;
pub mod cors;
pub mod duration;
pub mod filter;
mod index;
mod pattern;
pub mod plan;
mod precedence;
pub mod request;
pub mod route;
pub mod table;
mod text;

pub use cors::{Cors, CorsOrigin, WordList};
pub use duration::{InvalidDuration, parse_duration};
pub use filter::{
    Filters, Fraction, HeaderModifier, Mirror, PathModifier, Redirect, RedirectScheme, Rewrite,
};
pub use pattern::InvalidPattern;
pub use plan::{Answer, AnswerCause, Forward, Plan};
pub use request::RequestHead;
pub use route::{
    Backend, BackendTarget, FrontendKind, FrontendName, GrpcMatch, HeaderMatch, Hostname,
    HttpMatch, InvalidHostname, Parent, PathMatch, QueryMatch, Retry, Route, RouteKind, RouteMatch,
    RouteName, Rule, ServiceRef, TextMatch, Timeouts,
};
pub use table::{
    Frontend, FrontendPort, InvalidRoute, RouteChange, RouteProblem, RouteTable, Selected,
    Selection,
};
