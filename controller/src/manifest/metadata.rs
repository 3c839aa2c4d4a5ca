//! What every object carries: names, labels, annotations, owner, age.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use serde::Deserialize;

use super::document::Segment;

/// A field that says something it may not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InvalidField {
    /// Where, from the object's root.
    pub path: Vec<Segment>,
    /// What is wrong.
    pub problem: String,
    /// What to do about it.
    pub remedy: String,
}

impl InvalidField {
    /// A complaint about the field at `path` (dotted, `[n]` for indices).
    #[must_use]
    pub fn new(path: &str, problem: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { path: parse_path(path), problem: problem.into(), remedy: remedy.into() }
    }

    /// The path as people write it: `spec.rules[0].from`.
    #[must_use]
    pub fn field(&self) -> String {
        display_path(&self.path)
    }
}

fn parse_path(path: &str) -> Vec<Segment> {
    path.split(['.', '['])
        .filter(|part| !part.is_empty())
        .map(|part| match part.strip_suffix(']').map(str::parse) {
            Some(Ok(index)) => Segment::Index(index),
            Some(Err(_)) | None => Segment::Key(part.to_owned()),
        })
        .collect()
}

/// Writes a path as people do.
#[must_use]
pub fn display_path(path: &[Segment]) -> String {
    let mut text = String::new();
    for segment in path {
        match segment {
            Segment::Key(key) if text.is_empty() => text.push_str(key),
            Segment::Key(key) => {
                text.push('.');
                text.push_str(key);
            }
            Segment::Index(index) => text.push_str(&format!("[{index}]")),
        }
    }
    text
}

/// The object that made this one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Owner {
    /// Its kind, e.g. `ReplicaSet`.
    pub kind: Arc<str>,
    /// Its name.
    pub name: Arc<str>,
}

/// An object's metadata, trimmed to what the mesh reads.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Metadata {
    /// Name.
    pub name: Arc<str>,
    /// Namespace; empty for kinds that have none.
    pub namespace: Arc<str>,
    /// Uid; empty in manifests written by hand.
    pub uid: Arc<str>,
    /// Labels.
    pub labels: BTreeMap<String, String>,
    /// Annotations.
    pub annotations: BTreeMap<String, String>,
    /// Creation, seconds since the epoch; [`i64::MAX`] when unknown, so that a known age counts as older.
    pub created: i64,
    /// Counts the changes of what is asked for; 0 in manifests written by hand.
    pub generation: i64,
    /// True once deletion was asked for.
    pub deleting: bool,
    /// The controlling owner, or the first one.
    pub owner: Option<Owner>,
}

impl Metadata {
    /// A label's value.
    #[must_use]
    pub fn label(&self, key: &str) -> Option<&str> {
        self.labels.get(key).map(String::as_str)
    }

    /// An annotation's value.
    #[must_use]
    pub fn annotation(&self, key: &str) -> Option<&str> {
        self.annotations.get(key).map(String::as_str)
    }

    /// A setting that may be written as annotation or as label; the annotation wins.
    #[must_use]
    pub fn setting(&self, key: &str) -> Option<&str> {
        self.annotation(key).or_else(|| self.label(key))
    }

    /// Sort key by which "the oldest" is chosen; names break ties.
    #[must_use]
    pub fn age(&self) -> (i64, Arc<str>, Arc<str>) {
        (self.created, self.namespace.clone(), self.name.clone())
    }
}

/// Labels that an object must carry; the empty selector selects everything.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Selector(pub BTreeMap<String, String>);

impl Selector {
    /// True when `labels` carry every wanted one.
    #[must_use]
    pub fn matches(&self, labels: &BTreeMap<String, String>) -> bool {
        self.0.iter().all(|(key, value)| labels.get(key) == Some(value))
    }
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct RawMetadata {
    name: Option<String>,
    namespace: Option<String>,
    uid: Option<String>,
    labels: Option<BTreeMap<String, String>>,
    annotations: Option<BTreeMap<String, Option<String>>>,
    creation_timestamp: Option<String>,
    generation: Option<i64>,
    deletion_timestamp: Option<String>,
    owner_references: Option<Vec<RawOwner>>,
}

#[derive(Debug, Deserialize)]
struct RawOwner {
    kind: String,
    name: String,
    controller: Option<bool>,
}

impl RawMetadata {
    pub(super) fn name(&self) -> Option<&str> {
        self.name.as_deref()
    }

    pub(super) fn namespace(&self) -> Option<&str> {
        self.namespace.as_deref().filter(|namespace| !namespace.is_empty())
    }

    pub(super) fn parse(self, namespaced: bool) -> Result<Metadata, InvalidField> {
        let name = self.name.unwrap_or_default();
        check_name("metadata.name", &name, NameRule::Subdomain)?;
        let namespace = match (namespaced, self.namespace) {
            (true, Some(namespace)) if !namespace.is_empty() => namespace,
            (true, _) => "default".to_owned(),
            (false, _) => String::new(),
        };
        if namespaced {
            check_name("metadata.namespace", &namespace, NameRule::Label)?;
        }
        let created = match self.creation_timestamp {
            None => i64::MAX,
            Some(text) => text.parse::<jiff::Timestamp>().map(jiff::Timestamp::as_second).map_err(
                |error| {
                    InvalidField::new(
                        "metadata.creationTimestamp",
                        format!("{text:?} is no time: {error}"),
                        "write it as 2026-01-31T12:00:00Z or leave it out",
                    )
                },
            )?,
        };
        let mut owners = self.owner_references.unwrap_or_default();
        owners.sort_by_key(|owner| owner.controller != Some(true));
        Ok(Metadata {
            name: name.into(),
            namespace: namespace.into(),
            uid: self.uid.unwrap_or_default().into(),
            labels: self.labels.unwrap_or_default(),
            annotations: self
                .annotations
                .unwrap_or_default()
                .into_iter()
                .map(|(key, value)| (key, value.unwrap_or_default()))
                .filter(|(key, _)| key != "kubectl.kubernetes.io/last-applied-configuration")
                .collect(),
            created,
            generation: self.generation.unwrap_or(0),
            deleting: self.deletion_timestamp.is_some(),
            owner: owners
                .into_iter()
                .next()
                .map(|owner| Owner { kind: owner.kind.into(), name: owner.name.into() }),
        })
    }
}

/// Which characters and length a name may have. Source: RFC 1123 as Kubernetes applies it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum NameRule {
    /// Labels joined by dots, at most 253 bytes.
    Subdomain,
    /// One label, at most 63 bytes.
    Label,
}

impl fmt::Display for NameRule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Subdomain => {
                "use lower-case letters, digits, '-' and '.', at most 253 characters"
            }
            Self::Label => "use lower-case letters, digits and '-', at most 63 characters",
        })
    }
}

pub(super) fn check_name(path: &str, name: &str, rule: NameRule) -> Result<(), InvalidField> {
    let is_label = |label: &str| {
        !label.is_empty()
            && label.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    let ok = match rule {
        NameRule::Subdomain => name.len() <= 253 && name.split('.').all(is_label),
        NameRule::Label => name.len() <= 63 && is_label(name),
    };
    if ok {
        Ok(())
    } else {
        let shown: String = name.chars().take(80).collect();
        Err(InvalidField::new(path, format!("{shown:?} is not a valid name"), rule.to_string()))
    }
}

/// A port number, 1..=65535.
pub(super) fn port(path: &str, value: i64) -> Result<u16, InvalidField> {
    u16::try_from(value).ok().filter(|port| *port != 0).ok_or_else(|| {
        InvalidField::new(path, format!("{value} is no port"), "use a number from 1 to 65535")
    })
}

/// An IP address.
pub(super) fn ip(path: &str, text: &str) -> Result<std::net::IpAddr, InvalidField> {
    text.parse().map(mesh_model::address::canonical_ip).map_err(|_source| {
        InvalidField::new(
            path,
            format!("{text:?} is no IP address"),
            "write an IPv4 or IPv6 address",
        )
    })
}
