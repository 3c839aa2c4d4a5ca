//! The directory source's core: file contents in, object changes out. No I/O.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::{Change, Refusal, SourceStatus};
use crate::manifest::{Document, Format, Object, ObjectKey, Parsed, documents, line_of, objects};

/// What a file held when it was looked at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FileContent {
    /// As at the look before.
    Unchanged,
    /// This text.
    Text(String),
    /// It could not be read; what it gave before stays.
    Unreadable(String),
}

/// Most refusals that are kept and shown.
const MAX_REFUSALS: usize = 1_000;

/// The objects of a set of files, with the last good version of each.
#[derive(Debug, Default)]
pub struct Scan {
    files: BTreeMap<PathBuf, ParsedFile>,
    accepted: BTreeMap<ObjectKey, Accepted>,
    status: SourceStatus,
}

#[derive(Debug, Default)]
struct ParsedFile {
    good: Vec<(ObjectKey, usize, Arc<Object>)>,
    bad: Vec<(Option<ObjectKey>, Refusal)>,
    ignored: BTreeMap<String, usize>,
    unreadable: Option<String>,
}

impl ParsedFile {
    /// True when it is not known which objects the file means to hold.
    fn is_unsure(&self) -> bool {
        self.unreadable.is_some() || self.bad.iter().any(|(key, _)| key.is_none())
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
    pub fn update(&mut self, files: BTreeMap<PathBuf, FileContent>) -> Vec<Change> {
        self.files.retain(|path, _| files.contains_key(path));
        for (path, content) in files {
            match content {
                FileContent::Unchanged => {}
                FileContent::Text(text) => {
                    let parsed = parse_file(&path, &text);
                    self.files.insert(path, parsed);
                }
                FileContent::Unreadable(problem) => {
                    self.files.entry(path).or_default().unreadable = Some(problem);
                }
            }
        }
        self.settle()
    }

    /// What is refused and ignored.
    #[must_use]
    pub const fn status(&self) -> &SourceStatus {
        &self.status
    }

    fn settle(&mut self) -> Vec<Change> {
        let mut candidates: BTreeMap<&ObjectKey, Vec<Candidate<'_>>> = BTreeMap::new();
        let mut mentioned: BTreeSet<&ObjectKey> = BTreeSet::new();
        let mut refused = Vec::new();
        let mut ignored: BTreeMap<&str, usize> = BTreeMap::new();
        for (path, file) in &self.files {
            for (key, line, object) in &file.good {
                candidates.entry(key).or_default().push((path, *line, object));
            }
            for (key, refusal) in &file.bad {
                mentioned.extend(key);
                let mut refusal = refusal.clone();
                refusal.last_good_in_use =
                    key.as_ref().is_some_and(|key| self.accepted.contains_key(key));
                refused.push(refusal);
            }
            for (kind, count) in &file.ignored {
                *ignored.entry(kind).or_default() += count;
            }
            if let Some(problem) = &file.unreadable {
                refused.push(unreadable(path, problem, !file.good.is_empty()));
            }
        }
        let mut changes = Vec::new();
        let mut gone = Vec::new();
        for (key, accepted) in &self.accepted {
            let unsure = self.files.get(&accepted.file).is_some_and(ParsedFile::is_unsure);
            if !candidates.contains_key(key) && !mentioned.contains(key) && !unsure {
                gone.push(key.clone());
            }
        }
        for key in gone {
            self.accepted.remove(&key);
            changes.push(Change::Delete(key));
        }
        for (key, found) in candidates {
            let owner = self.accepted.get(key).map(|accepted| accepted.file.as_path());
            let chosen =
                found.iter().find(|(path, ..)| Some(*path) == owner).or_else(|| found.first());
            let Some((path, line, object)) = chosen else { continue };
            for (other, at, _) in found.iter().filter(|entry| (entry.0, entry.1) != (*path, *line))
            {
                refused.push(duplicate(key, (other, *at), (path, *line)));
            }
            if self.accepted.get(key).is_none_or(|accepted| accepted.object != **object) {
                changes.push(Change::Upsert(Arc::clone(object)));
            }
            let accepted = Accepted { object: Arc::clone(object), file: path.to_path_buf() };
            self.accepted.insert(key.clone(), accepted);
        }
        refused.sort();
        refused.truncate(MAX_REFUSALS);
        let ignored = ignored.into_iter().map(|(kind, count)| (kind.to_owned(), count)).collect();
        self.status = SourceStatus { objects: self.accepted.len(), refused, ignored };
        changes
    }
}

fn unreadable(path: &Path, problem: &str, last_good_in_use: bool) -> Refusal {
    Refusal {
        file: path.display().to_string(),
        line: 0,
        object: None,
        field: String::new(),
        problem: format!("cannot be read: {problem}"),
        remedy: "make it readable to the controller, or remove it".into(),
        last_good_in_use,
    }
}

fn duplicate(key: &ObjectKey, refused: (&Path, usize), kept: (&Path, usize)) -> Refusal {
    Refusal {
        file: refused.0.display().to_string(),
        line: refused.1,
        object: Some(key.to_string()),
        field: String::new(),
        problem: format!("also defined in {}:{}, which stays in use", kept.0.display(), kept.1),
        remedy: "remove one of the two".into(),
        last_good_in_use: true,
    }
}

fn parse_file(path: &Path, text: &str) -> ParsedFile {
    let format = match path.extension().and_then(|extension| extension.to_str()) {
        Some("json") => Format::Json,
        Some(_) | None => Format::Yaml,
    };
    let mut file = ParsedFile::default();
    let blank = Refusal {
        file: path.display().to_string(),
        line: 0,
        object: None,
        field: String::new(),
        problem: String::new(),
        remedy: String::new(),
        last_good_in_use: false,
    };
    for document in documents(text, format) {
        match document {
            Err(error) => file.bad.push((
                None,
                Refusal {
                    line: error.line,
                    problem: error.problem,
                    remedy: "correct the syntax; the file's other documents are in use".into(),
                    ..blank.clone()
                },
            )),
            Ok(document) => parse_document(&document, &blank, &mut file),
        }
    }
    file
}

fn parse_document(document: &Document<'_>, blank: &Refusal, file: &mut ParsedFile) {
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
                file.good.push((object.key(), line, object));
            }
            Parsed::Ignored { kind } => *file.ignored.entry(kind).or_default() += 1,
            Parsed::Refused { key, reason } => {
                let field = reason.field();
                let path: Vec<_> = root.into_iter().chain(reason.path).collect();
                file.bad.push((
                    key.clone(),
                    Refusal {
                        line: line_of(document, &path),
                        object: key.map(|key| key.to_string()),
                        field,
                        problem: reason.problem,
                        remedy: reason.remedy,
                        ..blank.clone()
                    },
                ));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(text: &str) -> FileContent {
        FileContent::Text(text.to_owned())
    }

    fn files<const N: usize>(files: [(&str, FileContent); N]) -> BTreeMap<PathBuf, FileContent> {
        files.into_iter().map(|(path, content)| (path.into(), content)).collect()
    }

    fn names(changes: &[Change]) -> Vec<String> {
        changes
            .iter()
            .map(|change| match change {
                Change::Upsert(object) => format!("+{}", object.key()),
                Change::Delete(key) => format!("-{key}"),
            })
            .collect()
    }

    const NS: &str = "apiVersion: v1\nkind: Namespace\nmetadata: {name: a}\n";

    #[test]
    fn the_last_good_version_stays_while_a_file_is_broken() {
        let mut scan = Scan::default();
        let first = scan.update(files([("a.yaml", text(NS))]));
        assert_eq!(names(&first), ["+Namespace a"]);
        for broken in [
            "apiVersion: [",
            "kind: Namespace\nmetadata: {name: a}",
            "apiVersion: v1\nkind: Namespace\nmetadata: {name: a, labels: [x]}",
        ] {
            assert_eq!(names(&scan.update(files([("a.yaml", text(broken))]))), [""; 0], "{broken}");
            assert_eq!(scan.status().refused.len(), 1, "{broken}");
        }
        let unreadable = FileContent::Unreadable("EACCES".into());
        assert!(scan.update(files([("a.yaml", unreadable)])).is_empty());
        assert!(
            scan.update(files([("a.yaml", text(NS))])).is_empty(),
            "the same object is no change"
        );
        assert!(scan.status().refused.is_empty());
        assert_eq!(names(&scan.update(files([]))), ["-Namespace a"]);
    }

    #[test]
    fn duplicates_are_refused_and_name_both_files() {
        let mut scan = Scan::default();
        scan.update(files([("b.yaml", text(NS))]));
        let other = format!("# later\n{}", NS.replace("{name: a}", "{name: a, labels: {x: y}}"));
        let both =
            scan.update(files([("a.yaml", text(&other)), ("b.yaml", FileContent::Unchanged)]));
        assert!(both.is_empty(), "the owner stays");
        let refusal = &scan.status().refused[0];
        assert_eq!((refusal.file.as_str(), refusal.line), ("a.yaml", 2));
        assert!(refusal.problem.contains("b.yaml:1"), "{refusal:?}");
        let moved = scan.update(files([("a.yaml", FileContent::Unchanged)]));
        assert_eq!(names(&moved), ["+Namespace a"], "the other definition takes over");
    }

    #[test]
    fn a_moved_object_is_no_change() {
        let mut scan = Scan::default();
        scan.update(files([("a.yaml", text(NS))]));
        assert!(scan.update(files([("z/b.yml", text(NS))])).is_empty());
    }

    #[test]
    fn a_refusal_names_line_field_and_remedy() {
        let policy = "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: p}\nspec:\n";
        let cases = [
            (format!("{policy}  action: DENY\n"), 4, "spec.rules"),
            (format!("{policy}  rules:\n  - from:\n    - source:\n        fooBars: [x]\n"), 8, "spec.rules[0].from[0].source.fooBars"),
            (format!("{policy}  rules:\n  - to:\n    - operation:\n        ports: [http]\n"), 7, "spec.rules[0].to[0].operation"),
            (format!("{policy}  action: MAYBE\n"), 5, "spec.action"),
            ("kind: Pod".to_owned(), 1, ""),
            ("apiVersion: v1\nkind: Pod\nmetadata:\n  name: Bad_Name\n".to_owned(), 4, "metadata.name"),
            ("apiVersion: v1\nkind: Service\nmetadata: {name: s}\nspec:\n  ports:\n  - port: 70000\n".to_owned(), 6, "spec.ports[0].port"),
        ];
        for (manifest, line, field) in cases {
            let mut scan = Scan::default();
            scan.update(files([("a.yaml", text(&manifest))]));
            let refusal = &scan.status().refused[0];
            assert_eq!(
                (refusal.line, refusal.field.as_str()),
                (line, field),
                "{manifest}{refusal:?}"
            );
            assert!(!refusal.remedy.is_empty());
        }
    }
}
