//! What a rule does with a request.

use std::borrow::Cow;
use std::sync::Arc;

use http::header::LOCATION;
use http::{HeaderMap, HeaderValue, StatusCode};

use crate::compile::PathTest;
use crate::cors::Cors;
use crate::filter::{HeaderModifier, Mirror, PathModifier, Redirect, RedirectScheme, scaled};
use crate::request::RequestHead;
use crate::route::{Backend, BackendTarget, Retry, ServiceRef, Timeouts};
use crate::table::Selected;

/// What becomes of a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Plan<'t> {
    /// It is answered here.
    Answer(Answer),
    /// It goes on.
    Forward(Forward<'t>),
}

/// An answer without body.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// Its status.
    pub status: StatusCode,
    /// Its headers.
    pub headers: HeaderMap,
    /// What gave it.
    pub cause: AnswerCause,
}

/// What gave an answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AnswerCause {
    /// A redirect.
    Redirect,
    /// CORS.
    Preflight,
    /// A filter or the chosen backend refers to something that is not there: 500, with the reason for people.
    InvalidReference {
        /// Why.
        reason: Arc<str>,
    },
    /// The rule has no backend, or none with a weight: 500.
    NoBackend,
}

impl AnswerCause {
    /// The word in logs.
    #[must_use]
    pub const fn as_str(&self) -> &'static str {
        match self {
            Self::Redirect => "redirect",
            Self::Preflight => "cors_preflight",
            Self::InvalidReference { .. } => "invalid_reference",
            Self::NoBackend => "no_backend",
        }
    }
}

/// Where a request goes and what is changed on the way.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Forward<'t> {
    /// The chosen backend.
    pub backend: &'t ServiceRef,
    /// The path it is sent with; none when that is the request's.
    pub path: Option<String>,
    /// The host it is sent with; none when that is the request's.
    pub host: Option<&'t str>,
    /// Changes of its headers, to be applied in this order: the rule's, the backend's.
    pub request_headers: [&'t HeaderModifier; 2],
    /// Changes of its answer's headers, to be applied in this order: the backend's, the rule's.
    pub response_headers: [&'t HeaderModifier; 2],
    /// To be set on its answer, in place of the server's.
    pub cors_headers: HeaderMap,
    /// Where copies go.
    pub mirrors: Vec<&'t ServiceRef>,
    /// How long it may take.
    pub timeouts: Timeouts,
    /// When it is tried again.
    pub retry: Option<&'t Retry>,
}

impl<'t> Selected<'t> {
    /// What the rule does with the request that it was selected for. `scheme` is what the client spoke; `entropy` is asked
    /// for evenly distributed numbers, to choose a backend and what is mirrored.
    #[must_use]
    pub fn plan(
        &self,
        request: &RequestHead<'_>,
        scheme: RedirectScheme,
        entropy: &mut dyn FnMut() -> u64,
    ) -> Plan<'t> {
        let rule = self.rule();
        let filters = &rule.filters;
        if let Some(reason) = &filters.unresolved {
            return Plan::invalid(reason);
        }
        if let Some(cors) = filters.cors.as_ref().filter(|_| Cors::is_preflight(request)) {
            let headers = cors.preflight_headers(request);
            let cause = AnswerCause::Preflight;
            return Plan::Answer(Answer { status: StatusCode::NO_CONTENT, headers, cause });
        }
        if let Some(redirect) = &filters.redirect {
            let location = self.location(redirect, request, scheme);
            // Host and path are of characters that headers may hold; the request's were read from one.
            let Ok(location) = HeaderValue::try_from(location) else {
                return Plan::invalid(&"the redirect leads to no URL".into());
            };
            let mut headers = HeaderMap::new();
            headers.insert(LOCATION, location);
            filters.response_headers.apply(&mut headers);
            let cause = AnswerCause::Redirect;
            return Plan::Answer(Answer { status: redirect.status, headers, cause });
        }
        let Some(backend) = choose(&rule.backends, entropy()) else {
            let (headers, cause) = (HeaderMap::new(), AnswerCause::NoBackend);
            let status = StatusCode::INTERNAL_SERVER_ERROR;
            return Plan::Answer(Answer { status, headers, cause });
        };
        if let Some(reason) = &backend.filters.unresolved {
            return Plan::invalid(reason);
        }
        let service = match &backend.target {
            BackendTarget::Service(service) => service,
            BackendTarget::Invalid { reason } => return Plan::invalid(reason),
        };
        let rewrites = [&backend.filters.rewrite, &filters.rewrite];
        let path = rewrites.iter().find_map(|rewrite| rewrite.as_ref()?.path.as_ref());
        let host = rewrites.iter().find_map(|rewrite| rewrite.as_ref()?.host.as_deref());
        let mirrors = filters.mirrors.iter().chain(&backend.filters.mirrors);
        Plan::Forward(Forward {
            backend: service,
            path: path.map(|modifier| modifier.apply(request.path.path(), self.matched_prefix())),
            host,
            request_headers: [&filters.request_headers, &backend.filters.request_headers],
            response_headers: [&backend.filters.response_headers, &filters.response_headers],
            cors_headers: filters
                .cors
                .as_ref()
                .map(|cors| cors.response_headers(request))
                .unwrap_or_default(),
            mirrors: mirrors.filter_map(|mirror| taken(mirror, entropy)).collect(),
            timeouts: rule.timeouts,
            retry: rule.retry.as_ref(),
        })
    }

    /// The prefix that matched, without a slash at its end; empty when the match was by no prefix.
    fn matched_prefix(&self) -> &'t str {
        match &self.entry.compiled().path {
            PathTest::Prefix(prefix) => prefix,
            PathTest::Exact(_) | PathTest::Regex(_) | PathTest::Grpc { .. } => "",
        }
    }

    fn location(
        &self,
        redirect: &Redirect,
        request: &RequestHead<'_>,
        scheme: RedirectScheme,
    ) -> String {
        let port = match (redirect.port, redirect.scheme) {
            (Some(port), _) => port,
            (None, Some(scheme)) => scheme.default_port(),
            (None, None) => self.port,
        };
        let scheme = redirect.scheme.unwrap_or(scheme);
        let host = redirect.host.as_deref().unwrap_or_else(|| request.host());
        let path: Cow<'_, str> = match &redirect.path {
            Some(PathModifier::Prefix(_)) | None if request.path.path() == "*" => "/".into(),
            Some(modifier) => modifier.apply(request.path.path(), self.matched_prefix()).into(),
            None => request.path.path().into(),
        };
        let mut location = format!("{}://{host}", scheme.as_str());
        if port != scheme.default_port() {
            location.push_str(&format!(":{port}"));
        }
        location.push_str(&path);
        if let Some(query) = request.path.query() {
            location.push('?');
            location.push_str(query);
        }
        location
    }
}

impl Plan<'_> {
    fn invalid(reason: &Arc<str>) -> Self {
        Self::Answer(Answer {
            status: StatusCode::INTERNAL_SERVER_ERROR,
            headers: HeaderMap::new(),
            cause: AnswerCause::InvalidReference { reason: Arc::clone(reason) },
        })
    }
}

/// One of them, in proportion to their weights.
fn choose(backends: &[Backend], entropy: u64) -> Option<&Backend> {
    let total: u64 = backends.iter().map(|backend| u64::from(backend.weight)).sum();
    let mut point = scaled(entropy, total);
    backends.iter().find(|backend| {
        let weight = u64::from(backend.weight);
        let within = point < weight;
        point = point.saturating_sub(weight);
        within
    })
}

fn taken<'t>(mirror: &'t Mirror, entropy: &mut dyn FnMut() -> u64) -> Option<&'t ServiceRef> {
    match &mirror.target {
        BackendTarget::Service(service) => mirror.share.holds(entropy()).then_some(service),
        BackendTarget::Invalid { .. } => None,
    }
}

#[cfg(test)]
mod tests;
