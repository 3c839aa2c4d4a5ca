//! The directory source's core: file contents in, object changes out. No I/O.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::Value;

use super::last_good::LastGood;
use super::{Change, Refusal, SourceStatus};
use crate::manifest::{
    Document, Format, Kind, Object, ObjectKey, Parsed, UnreadablePolicy, documents, line_of,
    object, objects,
};

/// What a file held when it was looked at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FileContent {
    /// As at the look before.
    Unchanged,
    /// This text.
    Text(String),
    /// It could not be read; what it gave before stays.
    Unreadable(String),
    /// The folder it was in could not be looked at; what it gave before stays.
    OutOfSight,
}

/// Most refusals that are kept and shown.
const MAX_REFUSALS: usize = 1_000;
/// Most objects that are named as kept.
const MAX_NAMED: usize = 100;

/// The objects of a set of files, with the last good version of each.
#[derive(Debug, Default)]
pub struct Scan {
    files: BTreeMap<PathBuf, ParsedFile>,
    accepted: BTreeMap<ObjectKey, Accepted>,
    /// Policies that are refused and have no good version.
    denied: BTreeMap<ObjectKey, Arc<UnreadablePolicy>>,
    status: SourceStatus,
}

#[derive(Debug, Default)]
struct ParsedFile {
    good: Vec<(ObjectKey, usize, Arc<Object>)>,
    bad: Vec<Bad>,
    ignored: BTreeMap<String, usize>,
    /// Why it cannot be read now.
    unreadable: Option<String>,
    /// What stands here is of an earlier look.
    stale: bool,
    /// What it held when it was last good, before this program started.
    restored: Vec<Arc<Object>>,
}

/// A refused object.
#[derive(Debug)]
struct Bad {
    key: Option<ObjectKey>,
    refusal: Refusal,
    /// What can be read of it, when it is a security policy.
    policy: Option<Arc<UnreadablePolicy>>,
}

impl ParsedFile {
    /// True when it is not known which objects the file means to hold.
    fn is_unsure(&self) -> bool {
        self.stale || self.bad.iter().any(|bad| bad.key.is_none())
    }

    /// True when an object that the file does not show may be one that it means to hold.
    fn may_mean(&self, key: &ObjectKey) -> bool {
        self.is_unsure() || self.bad.iter().any(|bad| bad.key.as_ref() == Some(key))
    }
}

/// A definition of an object: file, line and what it says.
type Candidate<'f> = (&'f Path, usize, &'f Arc<Object>);

#[derive(Debug)]
struct Accepted {
    object: Arc<Object>,
    file: PathBuf,
}

impl Scan {
    /// Feeds all files that exist; returns what changed. Files that are missing from `files` are gone.
    ///
    /// `last_good` is told what each file holds, and asked for what a file held that this scan has never seen whole.
    pub fn update(
        &mut self,
        files: BTreeMap<PathBuf, FileContent>,
        last_good: &mut dyn LastGood,
    ) -> Vec<Change> {
        self.files.retain(|path, _| files.contains_key(path));
        for (path, content) in files {
            match content {
                FileContent::Unchanged => {
                    if let Some(file) = self.files.get_mut(&path) {
                        file.stale = false;
                        file.unreadable = None;
                    }
                }
                FileContent::Text(text) => self.read(path, &text, last_good),
                FileContent::Unreadable(problem) => {
                    self.lose_sight(path, last_good).unreadable = Some(problem);
                }
                FileContent::OutOfSight => self.lose_sight(path, last_good).unreadable = None,
            }
        }
        self.settle()
    }

    /// What is refused and ignored.
    #[must_use]
    pub const fn status(&self) -> &SourceStatus {
        &self.status
    }

    fn read(&mut self, path: PathBuf, text: &str, last_good: &mut dyn LastGood) {
        let (mut parsed, mut written) = parse_file(&path, text);
        if !parsed.bad.is_empty() {
            let before: Vec<_> = last_good
                .read(&path)
                .into_iter()
                .filter_map(|text| restore(&text).map(|object| (object, text)))
                .filter(|(object, _)| {
                    let key = object.key();
                    parsed.may_mean(&key) && parsed.good.iter().all(|(good, ..)| *good != key)
                })
                .collect();
            written.extend(before.iter().map(|(_, text)| text.clone()));
            parsed.restored = before.into_iter().map(|(object, _)| object).collect();
        }
        let written: Vec<&str> = written.iter().map(String::as_str).collect();
        last_good.write(&path, &written);
        self.files.insert(path, parsed);
    }

    fn lose_sight(&mut self, path: PathBuf, last_good: &mut dyn LastGood) -> &mut ParsedFile {
        let file = self.files.entry(path).or_insert_with_key(|path| ParsedFile {
            restored: last_good.read(path).iter().filter_map(|text| restore(text)).collect(),
            ..ParsedFile::default()
        });
        file.stale = true;
        file
    }

    fn settle(&mut self) -> Vec<Change> {
        let mut candidates: BTreeMap<&ObjectKey, Vec<Candidate<'_>>> = BTreeMap::new();
        let mut mentioned: BTreeSet<&ObjectKey> = BTreeSet::new();
        for (path, file) in &self.files {
            for (key, line, object) in &file.good {
                candidates.entry(key).or_default().push((path, *line, object));
            }
            mentioned.extend(file.bad.iter().filter_map(|bad| bad.key.as_ref()));
        }
        let mut changes = Vec::new();
        self.accepted.retain(|key, accepted| {
            let unsure = self.files.get(&accepted.file).is_some_and(ParsedFile::is_unsure);
            let stays = candidates.contains_key(key) || mentioned.contains(key) || unsure;
            if !stays {
                changes.push(Change::Delete(key.clone()));
            }
            stays
        });
        for (path, file) in &self.files {
            for object in &file.restored {
                let key = object.key();
                if !self.accepted.contains_key(&key) && !candidates.contains_key(&key) {
                    changes.push(Change::Upsert(Arc::clone(object)));
                    let accepted = Accepted { object: Arc::clone(object), file: path.clone() };
                    self.accepted.insert(key, accepted);
                }
            }
        }
        let mut status = SourceStatus::default();
        let is_fresh = |path: &Path| self.files.get(path).is_some_and(|file| !file.stale);
        for (key, found) in &candidates {
            let owner = self.accepted.get(*key).map(|accepted| accepted.file.as_path());
            let chosen =
                found.iter().find(|(path, ..)| Some(*path) == owner).or_else(|| found.first());
            let Some((path, line, object)) = chosen else { continue };
            for (other, at, _) in found.iter().filter(|entry| (entry.0, entry.1) != (*path, *line))
            {
                status.refused.push(duplicate(key, (other, *at), (path, *line)));
            }
            if self.accepted.get(*key).is_none_or(|accepted| accepted.object != **object) {
                changes.push(Change::Upsert(Arc::clone(object)));
            }
            let accepted = Accepted { object: Arc::clone(object), file: path.to_path_buf() };
            self.accepted.insert((*key).clone(), accepted);
        }
        for (key, accepted) in &self.accepted {
            if !candidates.contains_key(key) || !is_fresh(&accepted.file) {
                status.kept += 1;
                if status.kept_objects.len() < MAX_NAMED {
                    status.kept_objects.push(key.to_string());
                }
            }
        }
        let denied = self.refusals(&candidates, &mut status);
        deny(&mut self.denied, denied, &self.accepted, &mut changes);
        for file in self.files.values_mut() {
            file.restored = Vec::new();
            for (kind, count) in &file.ignored {
                match status.ignored.iter_mut().find(|(known, _)| known == kind) {
                    Some((_, sum)) => *sum += count,
                    None => status.ignored.push((kind.clone(), *count)),
                }
            }
        }
        status.ignored.sort();
        status.refused.sort();
        status.more_refused = status.refused.len().saturating_sub(MAX_REFUSALS);
        status.refused.truncate(MAX_REFUSALS);
        status.objects = self.accepted.len();
        self.status = status;
        changes
    }

    /// Lists what is refused, and finds the policies of which no good version is in use.
    fn refusals(
        &self,
        candidates: &BTreeMap<&ObjectKey, Vec<Candidate<'_>>>,
        status: &mut SourceStatus,
    ) -> BTreeMap<ObjectKey, Arc<UnreadablePolicy>> {
        let mut denied: BTreeMap<ObjectKey, Arc<UnreadablePolicy>> = BTreeMap::new();
        for (path, file) in &self.files {
            // Objects of this file in use whose text is not to be found in it: one of the refused may be theirs.
            let is_nameless = |bad: &Bad| bad.key.is_none() && bad.policy.is_some();
            let mut orphans: BTreeSet<&ObjectKey> = BTreeSet::new();
            if file.bad.iter().any(is_nameless) {
                let own = self.accepted.iter().filter(|(_, accepted)| accepted.file == *path);
                orphans.extend(own.map(|(key, _)| key).filter(|key| {
                    !candidates.contains_key(key)
                        && file.bad.iter().all(|bad| bad.key.as_ref() != Some(*key))
                }));
            }
            for bad in &file.bad {
                let mut refusal = bad.refusal.clone();
                let own = bad.key.clone().or_else(|| bad.policy.as_ref().map(|one| one.key()));
                let mut kept = own.as_ref().is_some_and(|key| self.accepted.contains_key(key));
                if !kept && let Some(policy) = bad.policy.as_ref().filter(|_| bad.key.is_none()) {
                    let orphan = orphans.iter().copied().find(|key| is_perhaps(policy, key));
                    kept = orphan.is_some_and(|key| orphans.remove(key));
                }
                refusal.last_good_in_use = kept;
                if let Some(policy) = bad.policy.as_ref().filter(|_| !kept) {
                    refusal.denied = true;
                    denied
                        .entry(policy.key())
                        .and_modify(|one| {
                            *one = Arc::new(UnreadablePolicy::clone(one).joined(policy));
                        })
                        .or_insert_with(|| Arc::clone(policy));
                }
                status.refused.push(refusal);
            }
            if let Some(problem) = &file.unreadable {
                status.refused.push(unreadable(path, problem, !file.good.is_empty()));
            }
        }
        denied
    }
}

/// True when a policy without a legible key may be a new version of the object called `key`.
fn is_perhaps(policy: &UnreadablePolicy, key: &ObjectKey) -> bool {
    let fits = |legible: &str, known: &str| {
        legible.is_empty() || legible.starts_with("unnamed_") || *legible == *known
    };
    policy.kind == key.kind
        && fits(&policy.meta.name, &key.name)
        && fits(&policy.meta.namespace, &key.namespace)
}

/// Replaces the policies that refuse in the place of unreadable objects.
fn deny(
    current: &mut BTreeMap<ObjectKey, Arc<UnreadablePolicy>>,
    wanted: BTreeMap<ObjectKey, Arc<UnreadablePolicy>>,
    accepted: &BTreeMap<ObjectKey, Accepted>,
    changes: &mut Vec<Change>,
) {
    for key in current.keys() {
        // One that is accepted now has taken its place already.
        if !wanted.contains_key(key) && !accepted.contains_key(key) {
            changes.push(Change::Delete(key.clone()));
        }
    }
    for (key, policy) in &wanted {
        if current.get(key) != Some(policy) {
            let object = Object::Unreadable(Arc::clone(policy));
            changes.push(Change::Upsert(Arc::new(object)));
        }
    }
    *current = wanted;
}

fn unreadable(path: &Path, problem: &str, last_good_in_use: bool) -> Refusal {
    Refusal {
        problem: format!("cannot be read: {problem}"),
        remedy: "make it readable to the controller, or remove it".into(),
        last_good_in_use,
        ..Refusal::of_file(path)
    }
}

fn duplicate(key: &ObjectKey, refused: (&Path, usize), kept: (&Path, usize)) -> Refusal {
    Refusal {
        line: refused.1,
        kind: Some(key.kind.as_str()),
        object: Some(key.to_string()),
        problem: format!("also defined in {}:{}, which stays in use", kept.0.display(), kept.1),
        remedy: "remove one of the two".into(),
        last_good_in_use: true,
        ..Refusal::of_file(refused.0)
    }
}

/// An object that was good when it was written down.
fn restore(text: &str) -> Option<Arc<Object>> {
    match object(&serde_json::from_str(text).ok()?) {
        Parsed::Object(object) => Some(object),
        // A later version of this program may read less than the one before.
        Parsed::Ignored { .. } | Parsed::Refused { .. } => None,
    }
}

/// What a file holds, and its good objects as JSON.
fn parse_file(path: &Path, text: &str) -> (ParsedFile, Vec<String>) {
    let format = match path.extension().and_then(|extension| extension.to_str()) {
        Some("json") => Format::Json,
        Some(_) | None => Format::Yaml,
    };
    let mut file = ParsedFile::default();
    let mut written = Vec::new();
    for document in documents(text, format) {
        match document {
            Err(error) => {
                let policy = error
                    .whole_fields
                    .as_ref()
                    .and_then(|fields| UnreadablePolicy::new(fields, &error.problem));
                let refusal = Refusal {
                    line: error.line,
                    problem: error.problem,
                    remedy: "correct the syntax; the file's other documents are in use".into(),
                    ..Refusal::of_file(path)
                };
                file.refuse(None, refusal, policy);
            }
            Ok(document) => parse_document(&document, path, &mut file, &mut written),
        }
    }
    (file, written)
}

fn parse_document(
    document: &Document<'_>,
    path: &Path,
    file: &mut ParsedFile,
    written: &mut Vec<String>,
) {
    if document.value.is_null() {
        return;
    }
    let many = objects(&document.value);
    let single = many.len() == 1;
    for (root, parsed) in many {
        match parsed {
            Parsed::Object(object) => {
                // Finding a line costs a pass over the document, so only the document's own is remembered in a list.
                let line = if single { line_of(document, &root) } else { document.first_line };
                written.push(at(&document.value, &root).to_string());
                file.good.push((object.key(), line, object));
            }
            Parsed::Ignored { kind } => *file.ignored.entry(kind).or_default() += 1,
            Parsed::Refused { key, reason, unreadable } => {
                let field = reason.field();
                let place: Vec<_> = root.into_iter().chain(reason.path).collect();
                let refusal = Refusal {
                    line: line_of(document, &place),
                    object: key.as_ref().map(ToString::to_string),
                    field,
                    problem: reason.problem,
                    remedy: reason.remedy,
                    ..Refusal::of_file(path)
                };
                file.refuse(key, refusal, unreadable.map(|policy| *policy));
            }
        }
    }
}

impl ParsedFile {
    fn refuse(
        &mut self,
        key: Option<ObjectKey>,
        mut refusal: Refusal,
        mut policy: Option<UnreadablePolicy>,
    ) {
        if let Some(policy) = &mut policy {
            if policy.meta.name.is_empty() {
                // The underscore keeps it apart from every object's name, the place apart from its like.
                let place = format!("unnamed_{}:{}", refusal.file, refusal.line).replace('/', "_");
                policy.meta.name = place.into();
            } else if key.is_none() {
                refusal.object = Some(policy.key().to_string());
            }
        }
        let kind = key
            .as_ref()
            .map_or_else(|| policy.as_ref().map(|policy| policy.kind), |key| Some(key.kind));
        refusal.kind = kind.map(Kind::as_str);
        self.bad.push(Bad { key, refusal, policy: policy.map(Arc::new) });
    }
}

/// The part of a document that `path` leads to.
fn at<'v>(value: &'v Value, path: &[crate::manifest::Segment]) -> &'v Value {
    use crate::manifest::Segment;
    path.iter().fold(value, |value, segment| match segment {
        Segment::Key(key) => &value[key.as_str()],
        Segment::Index(index) => &value[*index],
    })
}

#[cfg(test)]
mod tests;
