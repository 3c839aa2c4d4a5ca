//! The kinds of resources.

/// A kind of resource, one xDS type URL each.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum ResourceKind {
    /// [`MeshConfig`](crate::MeshConfig); Culvert's own.
    Mesh,
    /// [`PodConfig`](crate::PodConfig) of the asking node's pods; Culvert's own.
    Pod,
    /// Policies.
    Authorization,
    /// What tokens count at the asking waypoint; Culvert's own.
    Authentication,
    /// Workloads and services.
    Address,
    /// [`FrontendConfig`](crate::FrontendConfig) of the asking waypoint; Culvert's own.
    Frontend,
    /// Routes of the asking waypoint; Culvert's own.
    Route,
}

impl ResourceKind {
    /// Every kind, in the order in which changes are sent: what others depend on comes first.
    pub const ALL: [Self; 7] = [
        Self::Mesh,
        Self::Pod,
        Self::Authorization,
        Self::Authentication,
        Self::Address,
        Self::Frontend,
        Self::Route,
    ];

    /// The kinds that an agent asks for.
    pub const AGENT: [Self; 4] = [Self::Mesh, Self::Pod, Self::Authorization, Self::Address];

    /// The kinds that a waypoint asks for.
    pub const WAYPOINT: [Self; 6] = [
        Self::Mesh,
        Self::Authorization,
        Self::Authentication,
        Self::Address,
        Self::Frontend,
        Self::Route,
    ];

    /// The kinds that every ambient control plane serves.
    pub const ISTIO: [Self; 2] = [Self::Authorization, Self::Address];

    /// The type URL of its messages.
    #[must_use]
    pub const fn type_url(self) -> &'static str {
        match self {
            Self::Mesh => "type.googleapis.com/culvert.mesh.v1.MeshConfig",
            Self::Pod => "type.googleapis.com/culvert.mesh.v1.PodConfig",
            Self::Authorization => "type.googleapis.com/istio.security.Authorization",
            Self::Address => "type.googleapis.com/istio.workload.Address",
            Self::Frontend => "type.googleapis.com/culvert.mesh.v1.Frontend",
            Self::Route => "type.googleapis.com/culvert.mesh.v1.Route",
            Self::Authentication => "type.googleapis.com/culvert.mesh.v1.Authentication",
        }
    }

    /// The kind of a type URL.
    #[must_use]
    pub fn from_type_url(type_url: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.type_url() == type_url)
    }
}
