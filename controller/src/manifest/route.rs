//! HTTPRoute and GRPCRoute of the Gateway API.
//!
//! What a match says is never ignored: a field of it that is not known refuses the route, since the rule would hold for
//! requests that it was not written for. A filter that is not known is kept as one that cannot be applied.

mod filter;
mod matches;

use std::sync::Arc;

use mesh_route::{
    Backend, BackendTarget, Hostname, InvalidRoute, Retry, Route, RouteChange, RouteKind,
    RouteName, RouteTable, Rule, ServiceRef, Timeouts, parse_duration,
};
use serde::Deserialize;

use self::filter::{RawFilter, filters};
use self::matches::{RawGrpcMatch, RawHttpMatch};
use super::gateway::GATEWAY_GROUP;
use super::metadata::{InvalidField, Metadata, port};

/// Most rules of a route, matches of a rule, and backends of a rule. Source: the API's own bounds are 16, 64 and 16.
const MAX_LISTED: usize = 64;

/// An HTTPRoute or GRPCRoute, valid in itself; its references are looked at when it is used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RouteObject {
    /// Metadata.
    pub meta: Metadata,
    /// Which of the two it is.
    pub kind: RouteKind,
    /// What it wants to attach to.
    pub parents: Vec<ParentRef>,
    /// `spec.hostnames`.
    pub hostnames: Vec<Hostname>,
    /// Its rules. References to services stand as written.
    pub rules: Vec<Rule>,
    /// What of it is not applied, for people.
    pub notes: Vec<String>,
}

/// A `parentRef`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ParentRef {
    /// The kind it refers to.
    pub kind: ParentKind,
    /// Namespace.
    pub namespace: Arc<str>,
    /// Name.
    pub name: Arc<str>,
    /// `sectionName`.
    pub section: Option<Arc<str>>,
    /// `port`.
    pub port: Option<u16>,
}

/// What a route may name as its parent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ParentKind {
    /// A Service.
    Service,
    /// A ServiceEntry.
    ServiceEntry,
    /// A Gateway.
    Gateway,
    /// Something else, by group and kind.
    Other(Arc<str>),
}

impl ParentKind {
    /// Its word.
    #[must_use]
    pub fn as_str(&self) -> &str {
        match self {
            Self::Service => "Service",
            Self::ServiceEntry => "ServiceEntry",
            Self::Gateway => "Gateway",
            Self::Other(kind) => kind,
        }
    }
}

impl RouteObject {
    /// Its name in route tables.
    #[must_use]
    pub fn name(&self) -> RouteName {
        RouteName::new(self.kind, &self.meta.namespace, &self.meta.name)
    }

    /// The route with these parents and rules.
    #[must_use]
    pub fn with(&self, parents: Vec<mesh_route::Parent>, rules: Vec<Rule>) -> Route {
        Route {
            name: self.name(),
            created_at_s: u64::try_from(self.meta.created)
                .ok()
                .filter(|_| self.meta.created != i64::MAX),
            parents,
            hostnames: self.hostnames.clone(),
            rules,
        }
    }

    /// The services that its backends and mirrors name.
    pub fn services(&self) -> impl Iterator<Item = &ServiceRef> {
        self.rules.iter().flat_map(|rule| {
            let own = rule.filters.mirrors.iter().map(|mirror| &mirror.target);
            let backends = rule.backends.iter().flat_map(|backend| {
                let mirrors = backend.filters.mirrors.iter().map(|mirror| &mirror.target);
                mirrors.chain([&backend.target])
            });
            own.chain(backends).filter_map(|target| match target {
                BackendTarget::Service(service) => Some(service),
                BackendTarget::Invalid { .. } => None,
            })
        })
    }
}

#[derive(Debug, Deserialize)]
pub(super) struct RawHttpRoute {
    #[serde(default)]
    spec: RawSpec<RawHttpMatch>,
}

#[derive(Debug, Deserialize)]
pub(super) struct RawGrpcRoute {
    #[serde(default)]
    spec: RawSpec<RawGrpcMatch>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", bound(deserialize = "M: Deserialize<'de>"))]
struct RawSpec<M> {
    parent_refs: Option<Vec<RawParentRef>>,
    hostnames: Option<Vec<String>>,
    rules: Option<Vec<RawRule<M>>>,
}

impl<M> Default for RawSpec<M> {
    fn default() -> Self {
        Self { parent_refs: None, hostnames: None, rules: None }
    }
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawParentRef {
    group: Option<String>,
    kind: Option<String>,
    namespace: Option<String>,
    name: String,
    section_name: Option<String>,
    port: Option<i64>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, bound(deserialize = "M: Deserialize<'de>"))]
struct RawRule<M> {
    name: Option<String>,
    matches: Option<Vec<M>>,
    filters: Option<Vec<RawFilter>>,
    backend_refs: Option<Vec<RawBackendRef>>,
    timeouts: Option<RawTimeouts>,
    retry: Option<RawRetry>,
    session_persistence: Option<serde::de::IgnoredAny>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct RawBackendRef {
    group: Option<String>,
    kind: Option<String>,
    namespace: Option<String>,
    name: String,
    port: Option<i64>,
    weight: Option<i64>,
    filters: Option<Vec<RawFilter>>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct RawTimeouts {
    request: Option<String>,
    backend_request: Option<String>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawRetry {
    codes: Option<Vec<u16>>,
    attempts: Option<u32>,
    backoff: Option<String>,
}

/// One match of either kind of route.
trait Matching {
    fn parse(self, path: &str) -> Result<mesh_route::RouteMatch, InvalidField>;
}

impl RawHttpRoute {
    pub(super) fn parse(self, meta: Metadata) -> Result<RouteObject, InvalidField> {
        self.spec.parse(meta, RouteKind::Http)
    }
}

impl RawGrpcRoute {
    pub(super) fn parse(self, meta: Metadata) -> Result<RouteObject, InvalidField> {
        self.spec.parse(meta, RouteKind::Grpc)
    }
}

impl<M: Matching> RawSpec<M> {
    fn parse(self, meta: Metadata, kind: RouteKind) -> Result<RouteObject, InvalidField> {
        let parents = self.parent_refs.unwrap_or_default();
        let parents = indexed("spec.parentRefs", parents, |path, raw| parent(raw, path, &meta))?;
        let hostnames =
            indexed("spec.hostnames", self.hostnames.unwrap_or_default(), |path, text| {
                text.parse().map_err(|error: mesh_route::InvalidHostname| {
                    InvalidField::new(path, error.to_string(), "write example.org or *.example.org")
                })
            })?;
        let mut notes = Vec::new();
        let rules = indexed("spec.rules", self.rules.unwrap_or_default(), |path, raw| {
            raw.parse(path, &meta, &mut notes)
        })?;
        let object = RouteObject { meta, kind, parents, hostnames, rules, notes };
        // What the table would refuse is refused here, where the author can be told the line.
        let whole = object.with(Vec::new(), object.rules.clone());
        match RouteTable::default().apply([RouteChange::Upsert(whole)]).into_iter().next() {
            None => Ok(object),
            Some(InvalidRoute { rule, problem, .. }) => Err(InvalidField::new(
                &format!("spec.rules[{rule}]"),
                format!("{:#}", anyhow::Error::from(problem)),
                "change the rule; the version before it stays in force",
            )),
        }
    }
}

impl<M: Matching> RawRule<M> {
    fn parse(
        self,
        path: &str,
        meta: &Metadata,
        notes: &mut Vec<String>,
    ) -> Result<Rule, InvalidField> {
        if self.session_persistence.is_some() {
            notes.push(format!("{path}.sessionPersistence is not supported yet and not applied"));
        }
        let matches = self.matches.unwrap_or_default();
        let backends = self.backend_refs.unwrap_or_default();
        let timeouts = match self.timeouts {
            None => Timeouts::default(),
            Some(raw) => Timeouts {
                request: duration(raw.request, &format!("{path}.timeouts.request"))?,
                backend_request: duration(
                    raw.backend_request,
                    &format!("{path}.timeouts.backendRequest"),
                )?,
            },
        };
        let retry = match self.retry {
            None => None,
            Some(raw) => Some(Retry {
                codes: raw.codes.unwrap_or_default(),
                // Source: GEP-1731 leaves the default to implementations.
                attempts: raw.attempts.unwrap_or(1).min(16),
                backoff: duration(raw.backoff, &format!("{path}.retry.backoff"))?,
            }),
        };
        Ok(Rule {
            name: self.name.map(Into::into),
            matches: indexed(&format!("{path}.matches"), matches, |path, raw| raw.parse(path))?,
            filters: filters(self.filters, &format!("{path}.filters"), meta)?,
            backends: indexed(&format!("{path}.backendRefs"), backends, |path, raw| {
                backend(raw, path, meta)
            })?,
            timeouts,
            retry,
        })
    }
}

/// Reads the elements of a list, each with its path.
fn indexed<T, U>(
    path: &str,
    list: Vec<T>,
    mut read: impl FnMut(&str, T) -> Result<U, InvalidField>,
) -> Result<Vec<U>, InvalidField> {
    if list.len() > MAX_LISTED {
        let problem = format!("{} entries", list.len());
        return Err(InvalidField::new(path, problem, format!("use at most {MAX_LISTED}")));
    }
    list.into_iter()
        .enumerate()
        .map(|(index, one)| read(&format!("{path}[{index}]"), one))
        .collect()
}

fn duration(text: Option<String>, path: &str) -> Result<Option<std::time::Duration>, InvalidField> {
    text.map(|text| {
        parse_duration(&text).map_err(|error| {
            InvalidField::new(path, error.to_string(), "write it as 1h30m, 10s or 250ms")
        })
    })
    .transpose()
}

fn parent(raw: RawParentRef, path: &str, meta: &Metadata) -> Result<ParentRef, InvalidField> {
    let group = raw.group.unwrap_or_else(|| GATEWAY_GROUP.to_owned());
    let kind = raw.kind.unwrap_or_else(|| "Gateway".to_owned());
    Ok(ParentRef {
        kind: match (group.as_str(), kind.as_str()) {
            ("" | "core", "Service") => ParentKind::Service,
            ("networking.istio.io", "ServiceEntry") => ParentKind::ServiceEntry,
            (GATEWAY_GROUP, "Gateway") => ParentKind::Gateway,
            (group, kind) => ParentKind::Other(format!("{group}/{kind}").into()),
        },
        namespace: raw.namespace.map_or_else(|| meta.namespace.clone(), Into::into),
        name: raw.name.into(),
        section: raw.section_name.map(Into::into),
        port: raw.port.map(|number| port(&format!("{path}.port"), number)).transpose()?,
    })
}

fn backend(raw: RawBackendRef, path: &str, meta: &Metadata) -> Result<Backend, InvalidField> {
    let weight = match raw.weight {
        None => 1,
        Some(weight) => {
            u32::try_from(weight).ok().filter(|weight| *weight <= 1_000_000).ok_or_else(|| {
                InvalidField::new(
                    &format!("{path}.weight"),
                    format!("{weight} is no weight"),
                    "use a number from 0 to 1000000",
                )
            })?
        }
    };
    let backend_filters = raw.filters;
    let target = target(
        raw.group.as_deref(),
        raw.kind.as_deref(),
        raw.namespace.as_deref(),
        &raw.name,
        raw.port,
        path,
        meta,
    )?;
    let filters = filters(backend_filters, &format!("{path}.filters"), meta)?;
    Ok(Backend { target, weight, filters })
}

fn target(
    group: Option<&str>,
    kind: Option<&str>,
    namespace: Option<&str>,
    name: &str,
    number: Option<i64>,
    path: &str,
    meta: &Metadata,
) -> Result<BackendTarget, InvalidField> {
    let invalid = |reason: String| BackendTarget::Invalid { reason: reason.into() };
    Ok(match (group.unwrap_or_default(), kind.unwrap_or("Service"), number) {
        ("" | "core", "Service", Some(number)) => BackendTarget::Service(ServiceRef {
            namespace: namespace.unwrap_or(&meta.namespace).into(),
            name: name.into(),
            port: port(&format!("{path}.port"), number)?,
        }),
        ("" | "core", "Service", None) => {
            invalid(format!("{path} names Service {name} without a port"))
        }
        (group, kind, _) => invalid(format!(
            "{path} refers to kind {kind} of group {group:?}, which is not supported"
        )),
    })
}

#[cfg(test)]
mod tests;
