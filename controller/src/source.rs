//! Where objects come from. A source sends [`SourceEvent`]s; a Kubernetes source stands beside [`directory`] behind the
//! same three.

pub mod directory;
mod scan;

use std::sync::Arc;

use serde::Serialize;

use crate::manifest::{Object, ObjectKey};

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
    /// Objects, documents and files that were refused.
    pub refused: Vec<Refusal>,
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
}
