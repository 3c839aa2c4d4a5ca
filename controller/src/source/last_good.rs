//! The last good version of every object, on disk: what is used after a restart for a file that is there and refused.
//!
//! One record per manifest file, named after its path: a line of JSON that says what follows and its checksum, then one
//! object per line. A record that is torn, of another version or of another file says nothing. Records take as much room
//! as the manifests do; when they cannot be written the controller goes on and says so.

use std::collections::BTreeSet;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use tracing::{info, warn};

use crate::state_dir::StateDir;

/// Format of the records.
const VERSION: u32 = 1;
/// Folder in the state directory.
const FOLDER: &str = "last-good";
/// Longest first line of a record.
const MAX_HEADER_BYTES: u64 = 16 << 10;
/// Largest record: JSON of the largest manifest file.
const MAX_RECORD_BYTES: u64 = 512 << 20;

/// Remembers the objects of each file across restarts.
pub trait LastGood {
    /// The objects that `file` held when they were last good, as JSON; empty when nothing is known.
    fn read(&mut self, file: &Path) -> Vec<String>;
    /// Replaces what is remembered of `file`; nothing of it is remembered when there are no objects.
    fn write(&mut self, file: &Path, objects: &[&str]);
}

#[derive(Debug, Serialize, Deserialize)]
struct Header {
    version: u32,
    file: PathBuf,
    objects: usize,
    checksum: String,
}

/// [`LastGood`] in a folder of the state directory.
#[derive(Debug)]
pub struct Records {
    folder: PathBuf,
    unsynced: bool,
    problem: Option<String>,
}

impl Records {
    /// Opens the folder, making it when it is missing.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn open(state: &StateDir) -> io::Result<Self> {
        let folder = state.path(FOLDER);
        DirBuilder::new().recursive(true).mode(0o700).create(&folder)?;
        Ok(Self { folder, unsynced: false, problem: None })
    }

    /// Why records could not be written or removed lately.
    #[must_use]
    pub fn problem(&self) -> Option<&str> {
        self.problem.as_deref()
    }

    /// The files below `root` of which something is remembered.
    #[must_use]
    pub fn files(&self, root: &Path) -> BTreeSet<PathBuf> {
        let names = self.names().unwrap_or_default();
        let headers = names.iter().filter_map(|name| {
            let file = File::open(self.folder.join(name)).ok()?;
            header(&mut BufReader::new(file)).ok()
        });
        headers.map(|header| header.file).filter(|file| file.starts_with(root)).collect()
    }

    /// Forgets all files but these.
    pub fn retain<'p>(&mut self, files: impl Iterator<Item = &'p Path>) {
        let wanted: BTreeSet<String> = files.map(record_name).collect();
        let outcome = self.names().and_then(|names| {
            for name in names.iter().filter(|name| !wanted.contains(*name)) {
                fs::remove_file(self.folder.join(name))?;
                self.unsynced = true;
            }
            Ok(())
        });
        self.note(outcome);
    }

    /// Makes sure that what was written survives a power failure.
    pub fn sync(&mut self) {
        if std::mem::take(&mut self.unsynced) {
            let outcome =
                File::open(&self.folder).and_then(|folder| Ok(nix::unistd::syncfs(folder)?));
            self.note(outcome);
        }
    }

    fn names(&self) -> io::Result<Vec<String>> {
        let entries = fs::read_dir(&self.folder)?;
        entries.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned())).collect()
    }

    fn note(&mut self, outcome: io::Result<()>) {
        let problem = outcome.err().map(|error| error.to_string());
        match (&problem, &self.problem) {
            (Some(problem), None) => {
                warn!(folder = %self.folder.display(), problem, "last good versions cannot be kept for a restart");
            }
            (None, Some(_)) => info!("last good versions are kept for a restart again"),
            (Some(_), Some(_)) | (None, None) => {}
        }
        self.problem = problem;
    }

    fn replace(&mut self, file: &Path, objects: &[&str]) -> io::Result<()> {
        let name = record_name(file);
        let path = self.folder.join(&name);
        if objects.is_empty() {
            return match fs::remove_file(path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
                Err(_) | Ok(()) => Ok(()),
            };
        }
        let mut checksum = Checksum::new();
        objects.iter().for_each(|object| checksum.line(object));
        let new = Header {
            version: VERSION,
            file: file.to_path_buf(),
            objects: objects.len(),
            checksum: checksum.text(),
        };
        let is_there = File::open(&path).and_then(|old| header(&mut BufReader::new(old)));
        if is_there.is_ok_and(|old| old.checksum == new.checksum && old.file == new.file) {
            return Ok(());
        }
        let temporary = self.folder.join(format!(".{name}"));
        let opened =
            OpenOptions::new().create(true).truncate(true).write(true).mode(0o600).open(&temporary);
        let mut out = io::BufWriter::new(opened?);
        serde_json::to_writer(&mut out, &new)?;
        out.write_all(b"\n")?;
        for object in objects {
            out.write_all(object.as_bytes())?;
            out.write_all(b"\n")?;
        }
        out.into_inner().map_err(io::IntoInnerError::into_error)?;
        self.unsynced = true;
        fs::rename(temporary, path)
    }
}

impl LastGood for Records {
    fn read(&mut self, file: &Path) -> Vec<String> {
        match read_record(&self.folder.join(record_name(file)), file) {
            Ok(objects) => objects,
            Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
            Err(error) => {
                warn!(file = %file.display(), %error, "the last good version cannot be used");
                Vec::new()
            }
        }
    }

    fn write(&mut self, file: &Path, objects: &[&str]) {
        let outcome = self.replace(file, objects);
        // One that succeeds does not undo the failure of another.
        if outcome.is_err() || self.problem.is_some() {
            self.note(outcome);
        }
    }
}

fn header(record: &mut impl BufRead) -> io::Result<Header> {
    let mut line = String::new();
    record.take(MAX_HEADER_BYTES).read_line(&mut line)?;
    let header: Header = serde_json::from_str(&line)?;
    if header.version != VERSION {
        let text = format!("its format is {}, not {VERSION}", header.version);
        return Err(io::Error::new(io::ErrorKind::InvalidData, text));
    }
    Ok(header)
}

fn read_record(path: &Path, file: &Path) -> io::Result<Vec<String>> {
    let mut record = BufReader::new(File::open(path)?);
    let header = header(&mut record)?;
    let damaged = || io::Error::new(io::ErrorKind::InvalidData, "its record is damaged");
    let mut body = String::new();
    record.take(MAX_RECORD_BYTES).read_to_string(&mut body)?;
    let objects: Vec<String> = body.lines().map(str::to_owned).collect();
    let mut checksum = Checksum::new();
    objects.iter().for_each(|object| checksum.line(object));
    if header.file != file || header.objects != objects.len() || header.checksum != checksum.text()
    {
        return Err(damaged());
    }
    Ok(objects)
}

fn record_name(file: &Path) -> String {
    let mut checksum = Checksum::new();
    checksum.bytes(file.as_os_str().as_bytes());
    checksum.text()
}

/// FNV-1a with 128 bits: against accidents, in a folder that only the controller can write.
struct Checksum(u128);

impl Checksum {
    const fn new() -> Self {
        Self(0x6c62_272e_07bb_0142_62b8_2175_6295_c58d)
    }

    fn bytes(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.0 ^= u128::from(*byte);
            self.0 = self.0.wrapping_mul(0x0000_0000_0100_0000_0000_0000_0000_013b);
        }
    }

    fn line(&mut self, line: &str) {
        self.bytes(line.as_bytes());
        self.bytes(b"\n");
    }

    fn text(&self) -> String {
        format!("{:032x}", self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn records() -> (tempfile::TempDir, Records) {
        let directory = tempfile::tempdir().unwrap();
        let state = StateDir::open(&directory.path().join("state")).unwrap();
        let records = Records::open(&state).unwrap();
        (directory, records)
    }

    #[test]
    fn a_record_is_whole_or_says_nothing() {
        let (_directory, mut records) = records();
        let (a, b) = (Path::new("/m/a.yaml"), Path::new("/m/b.yaml"));
        assert!(records.read(a).is_empty());
        records.write(a, &["{\"x\":1}", "{\"y\":2}"]);
        records.write(b, &["{}"]);
        records.sync();
        assert_eq!(records.read(a), ["{\"x\":1}", "{\"y\":2}"]);
        assert_eq!(records.files(Path::new("/m")).len(), 2);
        assert!(records.files(Path::new("/other")).is_empty(), "another source's");
        let path = records.folder.join(record_name(a));
        let text = fs::read_to_string(&path).unwrap();
        for torn in [&text[..text.len() - 5], &text[..20], "", &text.replace("\"x\"", "\"z\"")] {
            fs::write(&path, torn).unwrap();
            assert!(records.read(a).is_empty(), "{torn}");
        }
        fs::write(&path, text.replace("\"version\":1", "\"version\":2")).unwrap();
        assert!(records.read(a).is_empty(), "of a later version");
        records.retain([a].into_iter());
        assert!(records.read(b).is_empty(), "forgotten");
        records.write(a, &[]);
        assert!(records.files(Path::new("/")).is_empty());
        assert_eq!(records.problem(), None);
    }

    #[test]
    fn a_folder_that_cannot_be_written_is_told_and_survived() {
        let (_directory, mut records) = records();
        fs::remove_dir_all(&records.folder).unwrap();
        records.write(Path::new("/m/a.yaml"), &["{}"]);
        assert!(records.problem().is_some());
        DirBuilder::new().create(&records.folder).unwrap();
        records.write(Path::new("/m/a.yaml"), &["{}"]);
        assert_eq!(records.problem(), None);
    }
}
