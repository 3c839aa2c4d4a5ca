//! The controller's files: owner-only, replaced atomically, changed under a lock.

use std::fs::{self, DirBuilder, File, OpenOptions, TryLockError};
use std::io::{self, Read as _, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

/// A directory that nobody else can read.
#[derive(Clone, Debug)]
pub struct StateDir {
    root: PathBuf,
}

/// Held for the life of a running controller; the kernel lets it go with the process, however that ends.
#[derive(Debug)]
pub struct Occupancy {
    _file: File,
}

/// The file of [`StateDir::occupy`], with the holder's process id.
const OCCUPANT_FILE: &str = "controller.lock";

/// Held while files are changed; `run`, `token` and `ca` may do so at the same time.
#[derive(Debug)]
pub struct StateLock {
    _file: File,
}

impl StateDir {
    /// Opens the directory, making it with mode 0700 when it is missing.
    ///
    /// # Errors
    /// When it cannot be made, or others may write to it.
    pub fn open(root: &Path) -> io::Result<Self> {
        DirBuilder::new().recursive(true).mode(0o700).create(root)?;
        Self::open_existing(root)
    }

    /// Opens the directory that a controller made.
    ///
    /// # Errors
    /// When it is missing, or others may write to it.
    pub fn open_existing(root: &Path) -> io::Result<Self> {
        let mode = fs::metadata(root)?.permissions().mode();
        if mode & 0o022 != 0 {
            let text = format!(
                "{} is writable by others (mode {:o}); chmod 700 it",
                root.display(),
                mode & 0o777
            );
            return Err(io::Error::new(io::ErrorKind::PermissionDenied, text));
        }
        Ok(Self { root: root.to_path_buf() })
    }

    /// Makes the directory this running controller's own.
    ///
    /// # Errors
    /// When another one runs on it, named by its process id; or when the lock file cannot be made.
    pub fn occupy(&self) -> io::Result<Occupancy> {
        let path = self.path(OCCUPANT_FILE);
        let mut file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .read(true)
            .write(true)
            .mode(0o600)
            .open(&path)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::Error(error)) => return Err(error),
            Err(TryLockError::WouldBlock) => {
                // What is written there is a process id, or nothing yet.
                let mut pid = String::new();
                file.take(32).read_to_string(&mut pid)?;
                let pid = if pid.trim().is_empty() { "that is starting" } else { pid.trim() };
                let text = format!(
                    "{} is in use by the controller with process id {pid}; stop that one, or give this one another --state-dir",
                    self.root.display(),
                );
                return Err(io::Error::new(io::ErrorKind::ResourceBusy, text));
            }
        }
        file.set_len(0)?;
        file.write_all(format!("{}\n", std::process::id()).as_bytes())?;
        Ok(Occupancy { _file: file })
    }

    /// Waits for the lock.
    ///
    /// # Errors
    /// When the lock file cannot be made.
    pub fn lock(&self) -> io::Result<StateLock> {
        self.lock_on("lock")
    }

    /// Waits for what keeps operators' orders apart. A running controller never does: an order may wait for an API server.
    ///
    /// # Errors
    /// When the lock file cannot be made.
    pub fn lock_orders(&self) -> io::Result<StateLock> {
        self.lock_on("order.lock")
    }

    fn lock_on(&self, name: &str) -> io::Result<StateLock> {
        let file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .mode(0o600)
            .open(self.path(name))?;
        file.lock()?;
        Ok(StateLock { _file: file })
    }

    /// Reads a file; none when it is missing.
    ///
    /// # Errors
    /// When it cannot be read, or others can read it.
    pub fn read(&self, name: &str) -> io::Result<Option<String>> {
        let path = self.path(name);
        match fs::metadata(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
            Ok(metadata) if metadata.permissions().mode() & 0o077 != 0 => {
                let text = format!("{} is accessible to others; chmod 600 it", path.display());
                return Err(io::Error::new(io::ErrorKind::PermissionDenied, text));
            }
            Ok(_) => {}
        }
        fs::read_to_string(path).map(Some)
    }

    /// Replaces a file: after a crash it is the old one or the new one.
    ///
    /// # Errors
    /// When the disk is full or read-only.
    pub fn write(&self, name: &str, content: &str) -> io::Result<()> {
        let temporary = self.path(&format!(".{name}.new"));
        let mut file = OpenOptions::new()
            .create(true)
            .truncate(true)
            .write(true)
            .mode(0o600)
            .open(&temporary)?;
        file.write_all(content.as_bytes())?;
        file.sync_all()?;
        fs::rename(&temporary, self.path(name))?;
        File::open(&self.root)?.sync_all()
    }

    /// Removes a file; true when it was there.
    ///
    /// # Errors
    /// When it cannot be removed.
    pub fn take(&self, name: &str) -> io::Result<bool> {
        match fs::remove_file(self.path(name)) {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// When the file was replaced last; none when it is missing.
    ///
    /// # Errors
    /// When it cannot be looked at.
    pub fn stamp(&self, name: &str) -> io::Result<Option<(u64, std::time::SystemTime)>> {
        use std::os::unix::fs::MetadataExt;
        match fs::metadata(self.path(name)) {
            Ok(metadata) => Ok(Some((metadata.ino(), metadata.modified()?))),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Path of a file in it.
    #[must_use]
    pub fn path(&self, name: &str) -> PathBuf {
        self.root.join(name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_controller_at_a_time_has_the_directory() {
        let directory = tempfile::tempdir().unwrap();
        let state = StateDir::open(&directory.path().join("state")).unwrap();
        let first = state.occupy().unwrap();
        let refused = state.occupy().unwrap_err().to_string();
        let named = format!("process id {};", std::process::id());
        assert!(refused.contains(&named) && refused.contains("--state-dir"), "{refused}");
        drop(state.lock().unwrap());
        drop(first);
        state.occupy().unwrap();
        state.occupy().unwrap();
    }

    #[test]
    fn files_are_private_and_replaced_whole() {
        let directory = tempfile::tempdir().unwrap();
        let state = StateDir::open(&directory.path().join("a/b")).unwrap();
        let _lock = state.lock().unwrap();
        assert_eq!(state.read("key").unwrap(), None);
        state.write("key", "one").unwrap();
        let first = state.stamp("key").unwrap();
        state.write("key", "two").unwrap();
        assert_ne!(state.stamp("key").unwrap(), first);
        assert_eq!(state.read("key").unwrap().as_deref(), Some("two"));
        let mode = fs::metadata(state.path("key")).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        fs::set_permissions(state.path("key"), PermissionsExt::from_mode(0o644)).unwrap();
        assert!(state.read("key").is_err(), "a key that others can read is not used");
    }

    #[test]
    fn a_directory_that_is_not_there_is_not_made() {
        let directory = tempfile::tempdir().unwrap();
        let root = directory.path().join("typo");
        let error = StateDir::open_existing(&root).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
        assert!(!root.exists());
    }
}
