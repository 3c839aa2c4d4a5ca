//! Watches a directory tree of manifests.
//!
//! Every `*.yaml`, `*.yml` and `*.json` below the root counts, symbolic links included; names that start with a dot
//! (editors' temporary files, the `..data` of a mounted ConfigMap) or end like a backup do not. inotify makes changes
//! quick, a look at regular intervals makes them certain.
//!
//! A root that holds no manifest any more is more likely a volume that is not mounted, or a copy under way, than the wish to
//! delete everything: what it held stays in use until an operator confirms (see [`accept_empty`]). The same goes for a
//! folder on a volume of its own that is now empty, and for whatever is still named and cannot be read: a link whose target
//! is gone, a pipe in a manifest's place, a folder that became a file.

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

use super::last_good::Records;
use super::scan::{FileContent, Scan};
use super::{SourceEvent, SourceStatus};
use crate::state_dir::StateDir;

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
/// How long after the last file of a root that was gone came back the others are waited for.
const RETURN_GRACE: Duration = Duration::from_secs(60);

/// File in the state directory by which an operator confirms that the root is meant to be empty.
const ACCEPT_EMPTY: &str = "accept-empty-source";

/// Confirms that the root is meant to hold no manifests. The controller takes it back at its next look, or at its start,
/// whether the root is empty then or not.
///
/// # Errors
/// When the state directory cannot be written.
pub fn accept_empty(state: &StateDir) -> io::Result<()> {
    state.write(ACCEPT_EMPTY, "")
}

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
/// What files held when they were last good is kept in `state`. A root that cannot be read is none to start with, unless
/// something of it is kept.
///
/// # Errors
/// When the root is no readable directory, the state directory cannot be used, or the thread cannot be started.
pub fn watch(
    settings: DirectorySettings,
    state: StateDir,
    events: Sender<SourceEvent>,
) -> io::Result<()> {
    let records = Records::open(&state)?;
    if let Err(error) = fs::read_dir(&settings.root)
        && records.files(&settings.root).is_empty()
    {
        return Err(error);
    }
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
        let mut tree = Tree::new(settings.root, state, records);
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
    state: StateDir,
    records: Records,
    scan: Scan,
    seen: BTreeMap<PathBuf, Stamp>,
    emptied: BTreeMap<PathBuf, Instant>,
    /// Folders that hold manifests, with the device they are on.
    devices: BTreeMap<PathBuf, u64>,
    /// Files that are in use though they went with the whole root.
    missing: BTreeSet<PathBuf>,
    /// Files of the look before.
    remembered: BTreeSet<PathBuf>,
    /// When one of the missing came back last.
    returned: Option<Instant>,
    /// A file is expected to change soon.
    unsettled: bool,
    last_status: Option<SourceStatus>,
}

impl Tree {
    fn new(root: PathBuf, state: StateDir, records: Records) -> Self {
        Self {
            root,
            state,
            records,
            scan: Scan::default(),
            seen: BTreeMap::new(),
            emptied: BTreeMap::new(),
            devices: BTreeMap::new(),
            missing: BTreeSet::new(),
            remembered: BTreeSet::new(),
            returned: None,
            unsettled: false,
            last_status: None,
        }
    }

    /// Reads what changed and sends it. False when nobody listens.
    fn look(&mut self, events: &Sender<SourceEvent>, first: bool) -> bool {
        let mut walk = Walk::default();
        walk.directory(&self.root, 0);
        let known = self.files_before(first);
        walk.find_replaced(&known);
        walk.find_unmounted(&mut self.devices);
        self.unsettled = false;
        let missing = self.missing(&walk, first);
        let mut files: BTreeMap<PathBuf, FileContent> =
            self.missing.iter().map(|path| (path.clone(), FileContent::OutOfSight)).collect();
        for (path, metadata) in walk.files {
            let content = self.content(&path, &metadata);
            files.insert(path, content);
        }
        for (directory, _) in &walk.unreadable {
            for path in known.iter().filter(|path| path.starts_with(directory)) {
                files.entry(path.clone()).or_insert(FileContent::OutOfSight);
            }
        }
        self.remembered = files.keys().cloned().collect();
        let fewer = known.iter().any(|path| !files.contains_key(path));
        for (directory, problem) in walk.unreadable {
            files.insert(directory, FileContent::Unreadable(problem));
        }
        self.seen.retain(|path, _| files.contains_key(path));
        self.emptied.retain(|path, _| files.contains_key(path));
        if first || fewer {
            self.records.retain(files.keys().map(PathBuf::as_path));
        }
        let changes = self.scan.update(files, &mut self.records);
        let mut status = self.scan.status().clone();
        status.missing = missing;
        status.not_remembered = self.records.problem().map(str::to_owned);
        let mut alive = true;
        if !changes.is_empty() {
            info!(changes = changes.len(), "manifests changed");
            alive &= events.blocking_send(SourceEvent::Changes(changes)).is_ok();
        }
        if self.last_status.as_ref() != Some(&status) {
            let before = self.last_status.as_ref().and_then(|last| last.missing.as_ref());
            match (&status.missing, before) {
                (Some(problem), None) => warn!(
                    root = %self.root.display(),
                    problem,
                    remedy = REMEDY,
                    objects = status.objects,
                    "the manifests are gone; everything stays as it was"
                ),
                (None, Some(_)) => info!(root = %self.root.display(), "the manifests are back"),
                (Some(_), Some(_)) | (None, None) => {}
            }
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
                        last_good_in_use = refusal.last_good_in_use,
                        denied = refusal.denied,
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
        self.records.sync();
        alive
    }

    /// Files of the look before; of an earlier run only the records know.
    fn files_before(&self, first: bool) -> BTreeSet<PathBuf> {
        let mut files = self.remembered.clone();
        if first {
            files.append(&mut self.records.files(&self.root));
        }
        files
    }

    /// Why the root is not believed, when it is not: there were manifests and now there is none, or not all are back.
    fn missing(&mut self, walk: &Walk, first: bool) -> Option<String> {
        if walk.files.is_empty() {
            self.returned = None;
            self.missing.extend(self.remembered.iter().cloned());
            if first {
                self.missing.append(&mut self.records.files(&self.root));
            }
        } else if !self.missing.is_empty() {
            let before = self.missing.len();
            for (path, _) in &walk.files {
                self.missing.remove(path);
            }
            if self.missing.len() < before || self.returned.is_none() {
                self.returned = Some(Instant::now());
            }
            if self.returned.is_some_and(|at| at.elapsed() > RETURN_GRACE) {
                warn!(files = self.missing.len(), "files did not come back: they are deleted");
                self.missing.clear();
            }
        }
        let accepted = self.state.take(ACCEPT_EMPTY).unwrap_or_else(|error| {
            warn!(%error, "whether the root is meant to be empty cannot be looked up");
            false
        });
        match (accepted, self.missing.len()) {
            (false, 0) => None,
            (true, 0) => {
                info!(
                    "the root is not missing: the confirmation that it is meant to be empty is ignored"
                );
                None
            }
            (true, files) => {
                warn!(root = %self.root.display(), files, "the operator says that they are meant to be gone");
                self.missing.clear();
                None
            }
            (false, files) if self.returned.is_some() => {
                Some(format!("{}: {files} of its files are not back yet", self.root.display()))
            }
            (false, _) => {
                let of_root = walk.unreadable.iter().find(|(path, _)| *path == self.root);
                let why = of_root.map_or("it holds no manifest", |(_, problem)| problem.as_str());
                Some(format!("{}: {why}", self.root.display()))
            }
        }
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

/// What to do about a root that is not believed.
pub(crate) const REMEDY: &str = "mount or fill the folder again; if it is meant to be empty, run culvert-controller source accept-empty";

#[derive(Default)]
struct Walk {
    files: Vec<(PathBuf, Metadata)>,
    unreadable: Vec<(PathBuf, String)>,
    /// What is named and neither a folder nor a manifest's file, and what it is.
    odd: Vec<(PathBuf, String)>,
    visited: BTreeSet<(u64, u64)>,
    /// The folders, with their devices.
    devices: BTreeMap<PathBuf, u64>,
}

impl Walk {
    /// Holds a folder that lost both its files and its device for unreadable: its volume is not mounted.
    fn find_unmounted(&mut self, known: &mut BTreeMap<PathBuf, u64>) {
        let hidden = |path: &Path| self.unreadable.iter().any(|(above, _)| path.starts_with(above));
        known.retain(|path, _| self.devices.contains_key(path) || hidden(path));
        let mut holders: BTreeSet<&Path> = BTreeSet::new();
        for (file, _) in &self.files {
            let folders = file.ancestors().skip(1).take(MAX_DEPTH + 1);
            folders.take_while(|folder| holders.insert(folder)).for_each(drop);
        }
        for (path, device) in &self.devices {
            if holders.contains(path.as_path()) {
                known.insert(path.clone(), *device);
            } else if known.get(path).is_some_and(|before| before != device) {
                let problem = "its volume is not mounted any more";
                self.unreadable.push((path.clone(), problem.to_owned()));
            }
        }
    }

    /// What is still named is not deleted: a manifest that became something else cannot be read, and neither can what held
    /// manifests before.
    fn find_replaced(&mut self, known: &BTreeSet<PathBuf>) {
        for (path, problem) in std::mem::take(&mut self.odd) {
            let was_ours = known.iter().any(|file| file.starts_with(&path));
            if was_ours || is_manifest(&path) {
                self.unreadable.push((path, problem));
            }
        }
        for folder in
            self.devices.keys().filter(|folder| is_manifest(folder) && known.contains(*folder))
        {
            self.unreadable.push((folder.clone(), "it is a folder now".to_owned()));
        }
    }

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
            if first {
                self.devices.insert(path.to_path_buf(), metadata.dev());
            }
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
                Ok(metadata) => self.odd.push((path, format!("it is {} now", kind_of(&metadata)))),
                Err(error) => match fs::symlink_metadata(&path) {
                    // Between listing and looking: the next look sees what it became.
                    Err(gone) if gone.kind() == io::ErrorKind::NotFound => {}
                    // It may lead to a folder of manifests, whatever its name.
                    Ok(link) if link.is_symlink() => {
                        self.unreadable
                            .push((path, format!("the link cannot be followed: {error}")));
                    }
                    Ok(_) | Err(_) => self.unreadable.push((path, error.to_string())),
                },
            }
        }
    }
}

fn kind_of(metadata: &Metadata) -> &'static str {
    if metadata.is_file() { "a file that is no manifest" } else { "a pipe, a socket or a device" }
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

#[cfg(test)]
mod tests;
