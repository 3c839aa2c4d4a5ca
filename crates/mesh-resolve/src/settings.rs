//! What an operator may choose about routing.

/// What happens to traffic that does not pass the waypoint bound to its destination.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum WaypointEnforcement {
    /// It is refused: at the source when the waypoint is unavailable, at the destination when it was bypassed.
    #[default]
    Required,
    /// It goes on without the waypoint, as with ztunnel.
    Preferred,
}

/// Settings of [`resolve`](crate::resolve) and [`resolve_inbound`](crate::resolve_inbound). The default is the strict one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ResolveSettings {
    /// Whether a bound waypoint is required.
    pub waypoints: WaypointEnforcement,
    /// Deliver to a workload with an application tunnel on loopback. Default true.
    ///
    /// Source: ztunnel's `LOCALHOST_APP_TUNNEL`.
    pub localhost_application_tunnel: bool,
    /// `compat`: accept any CONNECT authority for a workload with an application tunnel and any known host name, as
    /// ztunnel does. Default false: only what is this workload's own, or what it is the waypoint of.
    pub accept_foreign_authority: bool,
}

impl Default for ResolveSettings {
    fn default() -> Self {
        Self {
            waypoints: WaypointEnforcement::Required,
            localhost_application_tunnel: true,
            accept_foreign_authority: false,
        }
    }
}
