//! Watches a directory tree of manifests.
//!
//! Every `*.yaml`, `*.yml` and `*.json` below the root counts, symbolic links included; names that start with a dot
//! (editors' temporary files, the `..data` of a mounted ConfigMap) or end like a backup do not. inotify makes changes
//! quick, a look at regular intervals makes them certain.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, Metadata};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use notify::{RecursiveMode, Watcher};
use tokio::sync::mpsc::Sender;
use tracing::{info, warn};

use super::scan::{FileContent, Scan};
use super::{SourceEvent, SourceStatus};

/// Largest file read. A dump of 20,000 pods is about 60 MB.
const MAX_FILE_BYTES: u64 = 128 << 20;
/// Most files below the root.
const MAX_FILES: usize = 100_000;
/// Deepest directory.
const MAX_DEPTH: usize = 16;
/// A file modified this recently may change again within the same timestamp, so it is read again at the next look.
const RACY: Duration = Duration::from_secs(2);
/// How long a file that became empty is taken to be in the middle of being written.
const EMPTY_GRACE: Duration = Duration::from_secs(1);

/// How a directory is watched.
#[derive(Clone, Debug)]
pub struct DirectorySettings {
    /// The root.
    pub root: PathBuf,
    /// Longest time between two looks at the tree; default 5 s.
    pub rescan_interval: Duration,
    /// How long the tree must be quiet before it is read; default 50 ms.
    pub quiet: Duration,
}

impl DirectorySettings {
    /// Defaults for `root`.
    #[must_use]
    pub const fn new(root: PathBuf) -> Self {
        Self { root, rescan_interval: Duration::from_secs(5), quiet: Duration::from_millis(50) }
    }
}

/// Starts watching on a thread of its own, which ends when `events` is closed.
///
/// # Errors
/// When the root is no readable directory, or the thread cannot be started.
pub fn watch(settings: DirectorySettings, events: Sender<SourceEvent>) -> io::Result<()> {
    fs::read_dir(&settings.root)?;
    let (wake, woken) = mpsc::channel();
    let mut watcher = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
        // Reading a file is an event too; only what may have changed something wakes the scan.
        let relevant = event.as_ref().map_or(true, |event| !event.kind.is_access());
        if relevant && wake.send(()).is_err() {
            // The scan has ended and nobody needs to be woken.
        }
    })
    .map_err(io::Error::other)?;
    if let Err(error) = watcher.watch(&settings.root, RecursiveMode::Recursive) {
        warn!(%error, "changes are found by looking at intervals only");
    }
    thread::Builder::new().name("source".into()).spawn(move || {
        let _watcher = watcher;
        let mut tree = Tree::new(settings.root);
        let mut synced = false;
        loop {
            if !tree.look(&events, !synced) {
                return;
            }
            synced = true;
            let pause = if tree.unsettled { EMPTY_GRACE / 4 } else { settings.rescan_interval };
            if events.is_closed() || !wait_for_quiet(&woken, pause, settings.quiet) {
                return;
            }
        }
    })?;
    Ok(())
}

/// Waits for a change and then for quiet, at most ten times `quiet`. False when the watcher is gone.
fn wait_for_quiet(woken: &mpsc::Receiver<()>, pause: Duration, quiet: Duration) -> bool {
    match woken.recv_timeout(pause) {
        Ok(()) => {}
        Err(RecvTimeoutError::Timeout) => return true,
        Err(RecvTimeoutError::Disconnected) => return false,
    }
    let deadline = Instant::now() + quiet * 10;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        match woken.recv_timeout(quiet.min(left)) {
            Ok(()) if !left.is_zero() => {}
            Ok(()) | Err(RecvTimeoutError::Timeout) => return true,
            Err(RecvTimeoutError::Disconnected) => return false,
        }
    }
}

/// What identifies one version of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Stamp {
    device: u64,
    inode: u64,
    size: u64,
    modified: Option<SystemTime>,
}

impl Stamp {
    fn of(metadata: &Metadata) -> Self {
        Self {
            device: metadata.dev(),
            inode: metadata.ino(),
            size: metadata.size(),
            modified: metadata.modified().ok(),
        }
    }

    fn is_racy(&self) -> bool {
        self.modified
            .and_then(|modified| SystemTime::now().duration_since(modified).ok())
            .is_none_or(|age| age < RACY)
    }
}

struct Tree {
    root: PathBuf,
    scan: Scan,
    seen: BTreeMap<PathBuf, Stamp>,
    emptied: BTreeMap<PathBuf, Instant>,
    /// A file is expected to change soon.
    unsettled: bool,
    last_status: Option<SourceStatus>,
}

impl Tree {
    fn new(root: PathBuf) -> Self {
        Self {
            root,
            scan: Scan::default(),
            seen: BTreeMap::new(),
            emptied: BTreeMap::new(),
            unsettled: false,
            last_status: None,
        }
    }

    /// Reads what changed and sends it. False when nobody listens.
    fn look(&mut self, events: &Sender<SourceEvent>, first: bool) -> bool {
        let mut walk = Walk::default();
        walk.directory(&self.root, 0);
        self.unsettled = false;
        let mut files = BTreeMap::new();
        for (path, metadata) in walk.files {
            let content = self.content(&path, &metadata);
            files.insert(path, content);
        }
        for (directory, problem) in walk.unreadable {
            for path in self.seen.keys().filter(|path| path.starts_with(&directory)) {
                files
                    .entry(path.clone())
                    .or_insert_with(|| FileContent::Unreadable(problem.clone()));
            }
            files.entry(directory).or_insert(FileContent::Unreadable(problem));
        }
        self.seen.retain(|path, _| files.contains_key(path));
        self.emptied.retain(|path, _| files.contains_key(path));
        let changes = self.scan.update(files);
        let mut alive = true;
        if !changes.is_empty() {
            info!(changes = changes.len(), "manifests changed");
            alive &= events.blocking_send(SourceEvent::Changes(changes)).is_ok();
        }
        if self.last_status.as_ref() != Some(self.scan.status()) {
            let status = self.scan.status().clone();
            for refusal in &status.refused {
                let known =
                    self.last_status.as_ref().is_some_and(|last| last.refused.contains(refusal));
                if !known {
                    warn!(
                        file = refusal.file,
                        line = refusal.line,
                        object = refusal.object,
                        field = refusal.field,
                        problem = refusal.problem,
                        remedy = refusal.remedy,
                        "manifest refused"
                    );
                }
            }
            self.last_status = Some(status.clone());
            alive &= events.blocking_send(SourceEvent::Status(status)).is_ok();
        }
        if first {
            alive &= events.blocking_send(SourceEvent::Synced).is_ok();
        }
        alive
    }

    fn content(&mut self, path: &Path, metadata: &Metadata) -> FileContent {
        let stamp = Stamp::of(metadata);
        let known = self.seen.get(path);
        if known == Some(&stamp) && !stamp.is_racy() && !self.emptied.contains_key(path) {
            return FileContent::Unchanged;
        }
        if stamp.size > MAX_FILE_BYTES {
            return FileContent::Unreadable(format!("it has more than {MAX_FILE_BYTES} bytes"));
        }
        // An editor that truncates and then writes shows an empty file in between: its objects stay for a moment.
        if stamp.size == 0
            && known.is_some_and(|known| known.size > 0 || self.emptied.contains_key(path))
        {
            let since = *self.emptied.entry(path.to_path_buf()).or_insert_with(Instant::now);
            if since.elapsed() < EMPTY_GRACE {
                self.unsettled = true;
                return FileContent::Unchanged;
            }
        }
        self.emptied.remove(path);
        match fs::read_to_string(path) {
            Ok(text) => {
                self.seen.insert(path.to_path_buf(), stamp);
                FileContent::Text(text)
            }
            Err(error) => FileContent::Unreadable(error.to_string()),
        }
    }
}

#[derive(Default)]
struct Walk {
    files: Vec<(PathBuf, Metadata)>,
    unreadable: Vec<(PathBuf, String)>,
    visited: BTreeSet<(u64, u64)>,
}

impl Walk {
    fn directory(&mut self, path: &Path, depth: usize) {
        if depth > MAX_DEPTH {
            self.unreadable.push((
                path.to_path_buf(),
                format!("it is more than {MAX_DEPTH} directories deep"),
            ));
            return;
        }
        let entries = fs::metadata(path).and_then(|metadata| {
            let first = self.visited.insert((metadata.dev(), metadata.ino()));
            if first { fs::read_dir(path).map(Some) } else { Ok(None) }
        });
        let entries = match entries {
            Ok(Some(entries)) => entries,
            // A symbolic link led here a second time.
            Ok(None) => return,
            Err(error) => {
                self.unreadable.push((path.to_path_buf(), error.to_string()));
                return;
            }
        };
        let mut paths = Vec::new();
        for entry in entries {
            match entry {
                Ok(entry) => paths.push(entry.path()),
                Err(error) => self.unreadable.push((path.to_path_buf(), error.to_string())),
            }
        }
        paths.sort();
        for path in paths.into_iter().filter(|path| is_visible(path)) {
            match fs::metadata(&path) {
                Ok(metadata) if metadata.is_dir() => self.directory(&path, depth + 1),
                Ok(metadata) if metadata.is_file() && is_manifest(&path) => {
                    if self.files.len() >= MAX_FILES {
                        self.unreadable
                            .push((path, format!("there are more than {MAX_FILES} files")));
                        return;
                    }
                    self.files.push((path, metadata));
                }
                Ok(_) => {}
                // Between listing and looking: the next look sees what it became.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) if is_manifest(&path) => self.unreadable.push((path, error.to_string())),
                Err(_) => {}
            }
        }
    }
}

fn is_visible(path: &Path) -> bool {
    path.file_name()
        .and_then(|name| name.to_str())
        .is_some_and(|name| !name.starts_with(['.', '#']) && !name.ends_with('~'))
}

fn is_manifest(path: &Path) -> bool {
    path.extension()
        .and_then(|extension| extension.to_str())
        .is_some_and(|extension| matches!(extension, "yaml" | "yml" | "json"))
}
