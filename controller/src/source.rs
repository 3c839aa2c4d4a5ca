//! Where objects come from: a [`directory`] of manifests or a [`kubernetes`] API server. Both send [`SourceEvent`]s, and
//! nothing behind them knows which it was.

pub mod directory;
pub mod kubernetes;
mod last_good;
mod scan;

use std::path::Path;
use std::sync::Arc;

use serde::Serialize;

use crate::manifest::{Kind, Object, ObjectKey};

pub use last_good::{LastGood, Records};
pub use scan::{FileContent, Scan};

/// A change of one object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// It is new or different.
    Upsert(Arc<Object>),
    /// It is gone.
    Delete(ObjectKey),
}

/// What a source tells.
#[derive(Clone, Debug)]
pub enum SourceEvent {
    /// Objects that changed, to be applied together.
    Changes(Vec<Change>),
    /// Everything that existed at the start has been sent.
    Synced,
    /// What was refused or ignored, as of now.
    Status(SourceStatus),
}

/// What a source could not use.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct SourceStatus {
    /// Objects in use.
    pub objects: usize,
    /// Objects, documents and files that were refused, the first 1,000.
    pub refused: Vec<Refusal>,
    /// How many more were.
    pub more_refused: usize,
    /// Objects in use in an earlier version: what the source holds of them now is refused or cannot be seen.
    pub kept: usize,
    /// Their names, the first 100.
    pub kept_objects: Vec<String>,
    /// Why the source as a whole is not believed, when it is not: everything stays as it was then.
    pub missing: Option<String>,
    /// Why last good versions are not written down for a restart, when they are not.
    pub not_remembered: Option<String>,
    /// Kinds that are not read, with the number of their objects.
    pub ignored: Vec<(String, usize)>,
}

/// One refused object, document or file.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Refusal {
    /// File.
    pub file: String,
    /// Line, from 1; 0 for the file as a whole.
    pub line: usize,
    /// Its kind, as far as it can be read.
    pub kind: Option<&'static str>,
    /// The object, as far as it can be read.
    pub object: Option<String>,
    /// Field path; empty for the object as a whole.
    pub field: String,
    /// What is wrong.
    pub problem: String,
    /// What to do.
    pub remedy: String,
    /// True when an earlier good version of it is still in use.
    pub last_good_in_use: bool,
    /// True when whatever it may have refused is refused in its place.
    pub denied: bool,
}

impl Refusal {
    /// True when nothing stands in for it, and it may have been a policy that refuses.
    #[must_use]
    pub fn is_not_enforced(&self) -> bool {
        !self.last_good_in_use
            && !self.denied
            && self.kind.is_none_or(|kind| Kind::POLICIES.iter().any(|one| one.as_str() == kind))
    }

    /// The policy object that it is about, when it is about one.
    pub(crate) fn policy(&self) -> Option<ObjectKey> {
        let kind = Kind::POLICIES.into_iter().find(|kind| Some(kind.as_str()) == self.kind)?;
        let (_, name) = self.object.as_deref()?.split_once(' ')?;
        let (namespace, name) = name.split_once('/')?;
        Some(ObjectKey { kind, namespace: namespace.into(), name: name.into() })
    }

    /// A refusal of nothing in particular in a file.
    fn of_file(file: &Path) -> Self {
        Self {
            file: file.display().to_string(),
            line: 0,
            kind: None,
            object: None,
            field: String::new(),
            problem: String::new(),
            remedy: String::new(),
            last_good_in_use: false,
            denied: false,
        }
    }
}
