//! Policies as the controller describes them.
//!
//! Source: `istio.security.Authorization` (WDS), whose semantics they keep. AUDIT, trust domains and the origin are ours.

use std::borrow::Cow;
use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use mesh_model::IpPrefix;
use serde::{Deserialize, Serialize};

pub use crate::template::{InvalidTemplate, PathTemplate};

/// A policy's key; written `namespace/name`, as workloads list it.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct PolicyName {
    /// Namespace.
    pub namespace: Arc<str>,
    /// Name within it.
    pub name: Arc<str>,
}

/// Text that is not `namespace/name`.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not of the form namespace/name: {text:?}")]
pub struct InvalidPolicyName {
    /// What was given, cut to 256 characters.
    pub text: String,
}

impl PolicyName {
    /// A name from its parts.
    #[must_use]
    pub fn new(namespace: &str, name: &str) -> Self {
        Self { namespace: namespace.into(), name: name.into() }
    }
}

impl FromStr for PolicyName {
    type Err = InvalidPolicyName;

    fn from_str(text: &str) -> Result<Self, InvalidPolicyName> {
        match text.split_once('/') {
            Some((namespace, name))
                if !namespace.is_empty() && !name.is_empty() && !name.contains('/') =>
            {
                Ok(Self::new(namespace, name))
            }
            Some(_) | None => Err(InvalidPolicyName { text: text.chars().take(256).collect() }),
        }
    }
}

impl fmt::Display for PolicyName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

/// What kind of object a policy comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum PolicyKind {
    /// A `security.istio.io` AuthorizationPolicy.
    AuthorizationPolicy,
    /// A `security.istio.io` PeerAuthentication.
    PeerAuthentication,
    /// Made by the mesh itself: a required waypoint, `unknownEgress`.
    Synthetic,
}

impl PolicyKind {
    /// The word in logs and explanations.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::AuthorizationPolicy => "AuthorizationPolicy",
            Self::PeerAuthentication => "PeerAuthentication",
            Self::Synthetic => "Synthetic",
        }
    }
}

impl fmt::Display for PolicyKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// The object an operator wrote, which verdicts name.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct PolicyOrigin {
    /// Its kind.
    pub kind: PolicyKind,
    /// Its namespace.
    pub namespace: Arc<str>,
    /// Its name.
    pub name: Arc<str>,
    /// Why the object could not be read; the policy then refuses whatever the object may have refused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unreadable: Option<Arc<str>>,
}

impl PolicyOrigin {
    /// An object that was read.
    #[must_use]
    pub fn new(kind: PolicyKind, namespace: &str, name: &str) -> Self {
        Self { kind, namespace: namespace.into(), name: name.into(), unreadable: None }
    }
}

impl fmt::Display for PolicyOrigin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}/{}", self.kind, self.namespace, self.name)?;
        match &self.unreadable {
            Some(reason) => write!(f, " (unreadable: {reason})"),
            None => Ok(()),
        }
    }
}

/// Which workloads a policy applies to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum PolicyScope {
    /// All.
    Global,
    /// Those of the policy's namespace.
    Namespace,
    /// Those that list it.
    Workload,
}

/// What a match means.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Action {
    /// The flow may go on; and what no ALLOW policy matches may not.
    Allow,
    /// The flow may not go on.
    Deny,
    /// The match is noted.
    Audit,
}

impl Action {
    /// The word of `AuthorizationPolicy.action`.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Allow => "ALLOW",
            Self::Deny => "DENY",
            Self::Audit => "AUDIT",
        }
    }
}

/// A policy: matches when one of its rules does. Without rules it never matches.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Policy {
    /// Its key.
    pub name: PolicyName,
    /// The object it was made of.
    pub origin: PolicyOrigin,
    /// Which workloads it applies to.
    pub scope: PolicyScope,
    /// What a match means.
    pub action: Action,
    /// True: matched and noted, never enforced.
    pub dry_run: bool,
    /// Rules, of which one must match.
    pub rules: Vec<Rule>,
}

/// Matches when all of its clauses do. Without clauses it matches everything.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Rule {
    /// Clauses, all of which must match.
    pub clauses: Vec<Clause>,
}

/// Matches when one of its matches does. Without matches it matches everything.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Clause {
    /// Matches, of which one must hold.
    pub matches: Vec<Match>,
}

/// Conditions on a flow or request, all of which must hold: one of each list that is not empty, none of each `not_` list.
///
/// With nothing in it, it never holds. A flow without identity meets no positive condition on principals, service accounts
/// and trust domains, and every negative one; its namespace is the empty text.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Match {
    /// The peer's namespace.
    pub namespaces: Vec<StringMatch>,
    /// Not these.
    pub not_namespaces: Vec<StringMatch>,
    /// The peer's identity without `spiffe://`: `cluster.local/ns/shop/sa/cart`.
    pub principals: Vec<StringMatch>,
    /// Not these.
    pub not_principals: Vec<StringMatch>,
    /// The peer's service account, whatever its trust domain.
    pub service_accounts: Vec<ServiceAccountMatch>,
    /// Not these.
    pub not_service_accounts: Vec<ServiceAccountMatch>,
    /// The peer's trust domain.
    pub trust_domains: Vec<StringMatch>,
    /// Not these.
    pub not_trust_domains: Vec<StringMatch>,
    /// The address the connection comes from.
    pub source_ips: Vec<IpPrefix>,
    /// Not these.
    pub not_source_ips: Vec<IpPrefix>,
    /// The pod's address.
    pub destination_ips: Vec<IpPrefix>,
    /// Not these.
    pub not_destination_ips: Vec<IpPrefix>,
    /// The application's port.
    pub destination_ports: Vec<u16>,
    /// Not these.
    pub not_destination_ports: Vec<u16>,
    /// The request, which only a waypoint sees. Where it is not seen, a match that asks for it holds in a DENY policy when
    /// the rest holds, and in no other: nothing is let through for want of looking.
    #[serde(default, skip_serializing_if = "RequestMatch::is_empty")]
    pub request: RequestMatch,
}

/// Conditions on an HTTP request, all of which must hold.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct RequestMatch {
    /// The host, with or without its port. Case does not count.
    pub hosts: Vec<StringMatch>,
    /// Not these.
    pub not_hosts: Vec<StringMatch>,
    /// The method.
    pub methods: Vec<StringMatch>,
    /// Not these.
    pub not_methods: Vec<StringMatch>,
    /// The path in normal form, without its query.
    pub paths: Vec<PathMatch>,
    /// Not these.
    pub not_paths: Vec<PathMatch>,
    /// Headers, each of which must meet its conditions.
    pub headers: Vec<HeaderMatch>,
    /// Who sent it, by its verified token: `issuer/subject`. A request without one meets no positive condition on tokens and
    /// every negative one.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub principals: Vec<StringMatch>,
    /// Not these.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub not_principals: Vec<StringMatch>,
    /// Claims of its token, each of which must meet its conditions.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub claims: Vec<ClaimMatch>,
}

impl RequestMatch {
    /// True when it asks for nothing.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// A condition on a path.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum PathMatch {
    /// On its text.
    Text(StringMatch),
    /// On its segments.
    Template(PathTemplate),
}

/// Conditions on a header's value; that of a repeated header is its values with commas between. A header that is not there
/// meets no positive condition and every negative one.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct HeaderMatch {
    /// The header, in lower case.
    pub name: Arc<str>,
    /// One of these; empty for any.
    pub values: Vec<StringMatch>,
    /// None of these.
    pub not_values: Vec<StringMatch>,
}

/// Conditions on a claim of a verified token: on its text, or on any of its list.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct ClaimMatch {
    /// Its name, and the names inside it.
    pub path: Arc<[Arc<str>]>,
    /// One of these; empty for any.
    pub values: Vec<StringMatch>,
    /// None of these.
    pub not_values: Vec<StringMatch>,
}

/// A condition on a text. Case counts.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum StringMatch {
    /// The whole text.
    Exact(Arc<str>),
    /// Its beginning.
    Prefix(Arc<str>),
    /// Its end.
    Suffix(Arc<str>),
    /// That it is not empty.
    Presence,
}

impl StringMatch {
    pub(crate) fn to_ascii_lowercase(&self) -> Self {
        self.map(|text| text.to_ascii_lowercase().into())
    }

    /// The same condition on another text.
    pub(crate) fn map(&self, change: impl Fn(&str) -> Cow<'_, str>) -> Self {
        match self {
            Self::Exact(text) => Self::Exact(change(text).into()),
            Self::Prefix(text) => Self::Prefix(change(text).into()),
            Self::Suffix(text) => Self::Suffix(change(text).into()),
            Self::Presence => Self::Presence,
        }
    }
}

/// A service account by namespace and name.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct ServiceAccountMatch {
    /// Its namespace.
    pub namespace: Arc<str>,
    /// Its name.
    pub service_account: Arc<str>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_two_parts() {
        assert_eq!("shop/cart".parse(), Ok(PolicyName::new("shop", "cart")));
        for text in ["", "/", "shop", "shop/", "/cart", "shop/cart/x"] {
            assert!(text.parse::<PolicyName>().is_err(), "{text:?}");
        }
    }
}
