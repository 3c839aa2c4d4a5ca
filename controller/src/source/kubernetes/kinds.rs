//! How the API server calls the kinds.

use kube::core::ApiResource;

use crate::manifest::Kind;

/// The resource of a kind in a version.
pub(crate) fn resource(kind: Kind, version: &str) -> ApiResource {
    let group = kind.group();
    ApiResource {
        group: group.to_owned(),
        version: version.to_owned(),
        api_version: match group {
            "" => version.to_owned(),
            group => format!("{group}/{version}"),
        },
        kind: kind.as_str().to_owned(),
        plural: plural(kind).to_owned(),
    }
}

/// True for kinds of which only the metadata is read, so that only the metadata is asked for.
pub(super) const fn only_metadata(kind: Kind) -> bool {
    matches!(kind, Kind::Namespace | Kind::Node | Kind::ServiceAccount)
}

/// True for kinds that every cluster has.
pub(super) const fn built_in(kind: Kind) -> bool {
    match kind {
        Kind::Namespace
        | Kind::Node
        | Kind::Pod
        | Kind::ServiceAccount
        | Kind::Service
        | Kind::EndpointSlice => true,
        Kind::WorkloadEntry
        | Kind::ServiceEntry
        | Kind::AuthorizationPolicy
        | Kind::PeerAuthentication
        | Kind::RequestAuthentication
        | Kind::Gateway
        | Kind::HttpRoute
        | Kind::GrpcRoute
        | Kind::ReferenceGrant => false,
    }
}

/// The resource's name in paths and roles.
pub(super) const fn plural(kind: Kind) -> &'static str {
    match kind {
        Kind::Namespace => "namespaces",
        Kind::Node => "nodes",
        Kind::Pod => "pods",
        Kind::ServiceAccount => "serviceaccounts",
        Kind::Service => "services",
        Kind::EndpointSlice => "endpointslices",
        Kind::WorkloadEntry => "workloadentries",
        Kind::ServiceEntry => "serviceentries",
        Kind::AuthorizationPolicy => "authorizationpolicies",
        Kind::PeerAuthentication => "peerauthentications",
        Kind::RequestAuthentication => "requestauthentications",
        Kind::Gateway => "gateways",
        Kind::HttpRoute => "httproutes",
        Kind::GrpcRoute => "grpcroutes",
        Kind::ReferenceGrant => "referencegrants",
    }
}
