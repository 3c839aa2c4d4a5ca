//! What policies say of a request: those of what was dialled, and those of the service that a route sends it to.

use std::sync::Arc;

use http::StatusCode;
use mesh_authorize::{Decision, Request, authorize_request};
use mesh_model::{RequestPath, Service};
use mesh_resolve::is_fronted;
use mesh_route::ServiceRef;
use mesh_telemetry::metric;

use super::authenticate::headers_for;
use super::outline::Outline;
use crate::picture::Snapshot;
use crate::refusal::Refusal;
use crate::stream::Dialled;

/// Judges a request by `policies`, those of what was dialled.
pub(super) fn dialled(
    dialled: &Dialled,
    snapshot: &Snapshot,
    policies: &[Arc<str>],
    request: &Request<'_>,
) -> Result<(), Refusal> {
    let connection = match dialled.service() {
        Some(service) => dialled.connection(snapshot, service, dialled.authority.port()),
        None => dialled.to_workload(),
    };
    let verdict = authorize_request(&snapshot.policies, policies, &connection, request);
    for note in &verdict.notes {
        let rule = note.rule.rule_index.map(|rule| rule.to_string()).unwrap_or_default();
        metrics::counter!(
            metric::POLICY_NOTES.name,
            "note" => note.kind.as_str(), "policy" => note.policy.to_string(), "rule" => rule
        )
        .increment(1);
    }
    match verdict.decision {
        Decision::Allow(_permit) => Ok(()),
        Decision::Deny(denial) => Err(Refusal::denied(&denial)),
    }
}

/// The service that a route sends a request to. Where it is behind this waypoint as well, its own policies judge the request as it
/// is sent: a route to it is no way around them. Those of the Gateway have judged it already.
pub(super) fn backend<'s>(
    dialled: &Dialled,
    snapshot: &'s Snapshot,
    backend: &ServiceRef,
    outline: &Outline,
) -> Result<&'s Arc<Service>, Refusal> {
    let service = snapshot.backend(backend).ok_or_else(|| {
        let detail = format!("there is no Service {}/{}", backend.namespace, backend.name);
        Refusal::new("invalid_reference", StatusCode::INTERNAL_SERVER_ERROR, "NC", detail)
    })?;
    let is_dialled = dialled.service().is_some_and(|dialled| dialled.key == service.key);
    if is_dialled || !is_fronted(&snapshot.index, &dialled.own, service) {
        return Ok(service);
    }
    let served = snapshot.served(&service.key).ok_or_else(|| {
        let detail = format!("{} is not served by this waypoint", service.key);
        Refusal::unavailable("unknown_frontend", detail)
    })?;
    let policies = &served.config.policies;
    if policies.is_empty() {
        return Ok(service);
    }
    let paths = dialled.worker.common.settings.paths();
    let path = RequestPath::parse(&outline.target, paths)
        .map_err(|error| Refusal::bad_request("bad_path", format!("as it is sent: {error}")))?;
    let headers = headers_for(snapshot, &service.key, outline);
    let request = Request::new(&outline.authority, &outline.method, &path, &headers)
        .with_claims(outline.authenticated.at(&served.authentications));
    let connection = dialled.connection(snapshot, service, backend.port);
    match authorize_request(&snapshot.policies, policies, &connection, &request).decision {
        Decision::Allow(_permit) => Ok(service),
        Decision::Deny(denial) => Err(Refusal::denied(&denial)),
    }
}
