//! Judging a request, at a waypoint.

use std::borrow::Cow;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use http::{HeaderMap, Method};
use mesh_model::{RequestPath, SpiffeId};

use crate::claims::RequestClaims;
use crate::compile::Subject;
use crate::evaluate::decide;
use crate::explain::{Explanation, Steps, explanation};
use crate::set::{Judged, PolicySet};
use crate::verdict::Verdict;

/// The connection that a request came on.
#[derive(Clone, Copy, Debug)]
pub struct Connection<'c> {
    /// What its client proved to be.
    pub identity: Option<&'c SpiffeId>,
    /// The address it comes from.
    pub source_ip: IpAddr,
    /// Where it goes.
    pub destination: SocketAddr,
}

/// A request as policies see it.
#[derive(Clone, Debug)]
pub struct Request<'r> {
    /// Host and port, in lower case, the host without a dot at its end.
    authority: String,
    /// Length of the host in it.
    host_bytes: usize,
    method: &'r Method,
    path: &'r RequestPath<'r>,
    headers: &'r HeaderMap,
    claims: Option<&'r RequestClaims>,
}

impl<'r> Request<'r> {
    /// `authority` is `:authority` or the Host header.
    #[must_use]
    pub fn new(
        authority: &str,
        method: &'r Method,
        path: &'r RequestPath<'r>,
        headers: &'r HeaderMap,
    ) -> Self {
        let colon = authority
            .rfind(':')
            .filter(|colon| authority[colon + 1..].bytes().all(|byte| byte.is_ascii_digit()));
        let (host, port) = authority.split_at(colon.unwrap_or(authority.len()));
        let mut authority = host.strip_suffix('.').unwrap_or(host).to_ascii_lowercase();
        let host_bytes = authority.len();
        authority.push_str(port);
        Self { authority, host_bytes, method, path, headers, claims: None }
    }

    /// The same request with the claims of its verified token.
    #[must_use]
    pub const fn with_claims(mut self, claims: Option<&'r RequestClaims>) -> Self {
        self.claims = claims;
        self
    }

    pub(crate) const fn claims(&self) -> Option<&RequestClaims> {
        self.claims
    }

    pub(crate) fn authority(&self) -> &str {
        &self.authority
    }

    pub(crate) fn host(&self) -> &str {
        &self.authority[..self.host_bytes]
    }

    pub(crate) fn method(&self) -> &str {
        self.method.as_str()
    }

    pub(crate) fn path(&self) -> &str {
        self.path.path()
    }

    /// A header's value. Bytes that are no UTF-8 stand as U+FFFD, which no condition's text equals by chance.
    pub(crate) fn header(&self, name: &str) -> Option<Cow<'_, str>> {
        let mut values = self.headers.get_all(name).iter();
        let first = String::from_utf8_lossy(values.next()?.as_bytes());
        let Some(second) = values.next() else { return Some(first) };
        let mut joined = first.into_owned();
        for value in std::iter::once(second).chain(values) {
            joined.push(',');
            joined.push_str(&String::from_utf8_lossy(value.as_bytes()));
        }
        Some(Cow::Owned(joined))
    }
}

/// Whether a request may go on. `attached` names the policies of what was dialled, as `namespace/name`; one that is not
/// known refuses. Policies by scope are the agents'.
///
/// Judge every request, with the current policies. The L4 conditions mean what they mean at the agents.
pub fn authorize_request(
    policies: &PolicySet,
    attached: &[Arc<str>],
    connection: &Connection<'_>,
    request: &Request<'_>,
) -> Verdict {
    let subject = subject(connection, Some(request));
    decide(policies, Judged::attached(attached), &subject, &mut ())
}

/// Whether a connection may go on whose bytes a waypoint passes on without reading requests. Conditions on requests do not
/// narrow a DENY rule and are never met in an ALLOW rule, as at the agents.
pub fn authorize_connection(
    policies: &PolicySet,
    attached: &[Arc<str>],
    connection: &Connection<'_>,
) -> Verdict {
    let subject = subject(connection, None);
    decide(policies, Judged::attached(attached), &subject, &mut ())
}

/// As [`authorize_request`], with every step.
#[must_use]
pub fn explain_request(
    policies: &PolicySet,
    attached: &[Arc<str>],
    connection: &Connection<'_>,
    request: &Request<'_>,
) -> Explanation {
    let mut steps = Steps::default();
    let subject = subject(connection, Some(request));
    let verdict = decide(policies, Judged::attached(attached), &subject, &mut steps);
    explanation(policies, verdict, steps)
}

/// As [`authorize_connection`], with every step.
#[must_use]
pub fn explain_connection(
    policies: &PolicySet,
    attached: &[Arc<str>],
    connection: &Connection<'_>,
) -> Explanation {
    let mut steps = Steps::default();
    let subject = subject(connection, None);
    let verdict = decide(policies, Judged::attached(attached), &subject, &mut steps);
    explanation(policies, verdict, steps)
}

const fn subject<'s>(connection: &Connection<'s>, request: Option<&'s Request<'s>>) -> Subject<'s> {
    Subject {
        identity: connection.identity,
        source_ip: connection.source_ip,
        destination: connection.destination,
        request,
    }
}
