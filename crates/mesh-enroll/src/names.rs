//! Names a request carries, checked where they enter.

use std::fmt;

use mesh_model::PodUid;
use serde::{Deserialize, Serialize};

/// Text that is no name of the expected kind.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not a valid {kind}: {text:?}")]
pub struct InvalidName {
    /// What was expected, in words.
    pub kind: &'static str,
    /// What was given, cut at [`SHOWN_CHARS`] characters.
    pub text: String,
}

/// How much of a refused text an error repeats, characters.
pub const SHOWN_CHARS: usize = 128;

impl InvalidName {
    fn new(kind: &'static str, text: &str) -> Self {
        Self { kind, text: text.chars().take(SHOWN_CHARS).collect() }
    }
}

/// A pod's namespace and name.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "RawPodName")]
pub struct PodName {
    namespace: String,
    name: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawPodName {
    namespace: String,
    name: String,
}

impl TryFrom<RawPodName> for PodName {
    type Error = InvalidName;

    fn try_from(raw: RawPodName) -> Result<Self, InvalidName> {
        Self::new(&raw.namespace, &raw.name)
    }
}

impl PodName {
    /// A pod by name.
    ///
    /// # Errors
    /// When `namespace` is no DNS label or `name` no DNS subdomain. Source: RFC 1123 as Kubernetes applies it.
    pub fn new(namespace: &str, name: &str) -> Result<Self, InvalidName> {
        if !is_dns_label(namespace) {
            return Err(InvalidName::new("namespace", namespace));
        }
        if !is_dns_subdomain(name) {
            return Err(InvalidName::new("pod name", name));
        }
        Ok(Self { namespace: namespace.to_owned(), name: name.to_owned() })
    }

    /// The namespace.
    #[must_use]
    pub fn namespace(&self) -> &str {
        &self.namespace
    }

    /// The pod's name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }
}

impl fmt::Display for PodName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

/// A sandbox as the container runtime names it.
///
/// Source: CNI specification 1.1.0, `CNI_CONTAINERID`: an alphanumeric, then alphanumerics, `.`, `_` or `-`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ContainerId(String);

/// Longest container id, bytes; runtimes use 64 hexadecimal digits.
const MAX_CONTAINER_ID_BYTES: usize = 256;

impl ContainerId {
    /// A container id.
    ///
    /// # Errors
    /// When `text` is empty, too long, or holds a character the specification excludes.
    pub fn new(text: &str) -> Result<Self, InvalidName> {
        let mut bytes = text.bytes();
        let starts_well = bytes.next().is_some_and(|byte| byte.is_ascii_alphanumeric());
        let goes_on_well =
            bytes.all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-'));
        if starts_well && goes_on_well && text.len() <= MAX_CONTAINER_ID_BYTES {
            Ok(Self(text.to_owned()))
        } else {
            Err(InvalidName::new("container id", text))
        }
    }

    /// The text of it.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for ContainerId {
    type Error = InvalidName;

    fn try_from(text: String) -> Result<Self, InvalidName> {
        Self::new(&text)
    }
}

impl From<ContainerId> for String {
    fn from(id: ContainerId) -> Self {
        id.0
    }
}

impl fmt::Display for ContainerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The path of a network namespace file, such as `/run/netns/cni-…` or `/proc/123/ns/net`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct NetnsPath(String);

/// Longest path the kernel takes, bytes (`PATH_MAX` without its terminator).
const MAX_PATH_BYTES: usize = 4095;

impl NetnsPath {
    /// A path.
    ///
    /// # Errors
    /// When `text` is not absolute, holds a NUL or is too long.
    pub fn new(text: &str) -> Result<Self, InvalidName> {
        if text.starts_with('/') && !text.contains('\0') && text.len() <= MAX_PATH_BYTES {
            Ok(Self(text.to_owned()))
        } else {
            Err(InvalidName::new("network namespace path", text))
        }
    }

    /// The text of it.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for NetnsPath {
    type Error = InvalidName;

    fn try_from(text: String) -> Result<Self, InvalidName> {
        Self::new(&text)
    }
}

impl From<NetnsPath> for String {
    fn from(path: NetnsPath) -> Self {
        path.0
    }
}

impl fmt::Display for NetnsPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Longest pod uid, bytes; Kubernetes' have 36, static pods' 32.
const MAX_UID_BYTES: usize = 128;

/// Checks a pod's uid: it becomes part of log fields and file names.
///
/// # Errors
/// When it is empty, too long, starts with no alphanumeric or holds more than alphanumerics, `.`, `_` and `-`.
pub fn pod_uid(text: &str) -> Result<PodUid, InvalidName> {
    if text.len() > MAX_UID_BYTES || ContainerId::new(text).is_err() {
        return Err(InvalidName::new("pod uid", text));
    }
    Ok(PodUid::new(text))
}

/// Checks a service account's name; empty means unknown.
pub(crate) fn service_account(text: &str) -> Result<String, InvalidName> {
    if text.is_empty() || is_dns_subdomain(text) {
        Ok(text.to_owned())
    } else {
        Err(InvalidName::new("service account", text))
    }
}

fn is_dns_label(text: &str) -> bool {
    (1..=63).contains(&text.len())
        && !text.starts_with('-')
        && !text.ends_with('-')
        && text
            .bytes()
            .all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-')
}

/// Labels of a subdomain may be as long as the whole. Source: `IsDNS1123Subdomain` of apimachinery.
fn is_dns_subdomain(text: &str) -> bool {
    text.len() <= 253
        && text.split('.').all(|label| {
            !label.is_empty()
                && !label.starts_with('-')
                && !label.ends_with('-')
                && label
                    .bytes()
                    .all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-')
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pod_names_follow_kubernetes() {
        let check = |namespace: &str, name: &str, expected: bool| {
            assert_eq!(PodName::new(namespace, name).is_ok(), expected, "{namespace:?}/{name:?}");
        };
        check("shop", "cart-0", true);
        check("shop", "cart.v1-0", true);
        check("shop", &"a".repeat(253), true);
        check("shop", &"a".repeat(254), false);
        check(&"n".repeat(64), "a", false);
        for bad in ["", "-a", "a-", "A", "a_b", "a/b", "..", "a..b", "a b", "ä", "a\0"] {
            check("shop", bad, false);
            check(bad, "cart", false);
        }
        check("a.b", "cart", false);
    }

    #[test]
    fn container_ids_follow_the_cni_specification() {
        for good in ["a", "0", "cni-1", "a_b.c-d", &"f".repeat(64)] {
            assert!(ContainerId::new(good).is_ok(), "{good}");
        }
        for bad in ["", ".", "-a", "_a", "a/b", "a b", "a\n", &"f".repeat(257)] {
            assert!(ContainerId::new(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn uids_cannot_walk_through_directories() {
        for bad in ["", "..", "../x", "a/b", ".hidden", &"u".repeat(129)] {
            assert!(pod_uid(bad).is_err(), "{bad:?}");
        }
        assert!(pod_uid("0b1cf5a2-6f2c-4c0e-9d0a-0e8c2b0d6f11").is_ok());
    }

    #[test]
    fn namespace_paths_are_absolute() {
        for bad in ["", "run/netns/a", "/a\0b", &format!("/{}", "a".repeat(5000))] {
            assert!(NetnsPath::new(bad).is_err());
        }
        assert!(NetnsPath::new("/proc/12/ns/net").is_ok());
    }

    #[test]
    fn errors_repeat_only_the_start_of_a_long_text() {
        let error = ContainerId::new(&"/".repeat(100_000)).unwrap_err();
        assert_eq!(error.text.len(), SHOWN_CHARS);
    }
}
