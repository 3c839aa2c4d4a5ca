//! What the controller does in a Kubernetes cluster beside watching it: it asks who an agent is, keeps its authority in a
//! Secret, tells agents the roots in a ConfigMap, writes the status of policies and Events and deploys waypoints while it
//! leads, and takes agents off the nodes before the chart is removed.

pub mod ca_secret;
pub(crate) mod conditions;
mod events;
pub(crate) mod expiry;
#[cfg(test)]
mod fake_api;
pub mod lease;
pub mod leave;
mod review_gate;
pub mod roots;
pub(crate) mod status;
pub mod token_review;
pub mod uncaptured;
pub mod waypoints;

use std::str::FromStr;

/// A namespaced object's name, written `NAMESPACE/NAME`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ObjectName {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
}

/// Text that is not of the form `NAMESPACE/NAME`.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is not of the form NAMESPACE/NAME")]
pub struct InvalidObjectName {
    /// What was given.
    pub text: String,
}

impl FromStr for ObjectName {
    type Err = InvalidObjectName;

    fn from_str(text: &str) -> Result<Self, InvalidObjectName> {
        match text.split_once('/') {
            Some((namespace, name))
                if !namespace.is_empty() && !name.is_empty() && !name.contains('/') =>
            {
                Ok(Self { namespace: namespace.to_owned(), name: name.to_owned() })
            }
            Some(_) | None => Err(InvalidObjectName { text: text.to_owned() }),
        }
    }
}

/// The HTTP status of an API server's refusal.
fn refusal(error: &kube::Error) -> Option<u16> {
    if let kube::Error::Api(status) = error { Some(status.code) } else { None }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_have_two_parts() {
        let name: ObjectName = "culvert-system/culvert-ca".parse().unwrap();
        assert_eq!((name.namespace.as_str(), name.name.as_str()), ("culvert-system", "culvert-ca"));
        for wrong in ["", "a", "a/", "/a", "a/b/c"] {
            assert!(wrong.parse::<ObjectName>().is_err(), "{wrong}");
        }
    }
}
