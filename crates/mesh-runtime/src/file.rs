//! Files that hold state: written whole or not at all, read within bounds.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::process;
use std::sync::atomic::{AtomicU64, Ordering};

/// A file that cannot be written or read.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// The path has no folder or no name.
    #[error("not a path of a file: {path:?}")]
    NoName {
        /// The path.
        path: PathBuf,
    },
    /// The file cannot be written.
    #[error("cannot write {path:?}")]
    Write {
        /// The path.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The file cannot be read.
    #[error("cannot read {path:?}")]
    Read {
        /// The path.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The file is longer than it may be.
    #[error("{path:?} has more than {limit_bytes} bytes")]
    TooLong {
        /// The path.
        path: PathBuf,
        /// The limit.
        limit_bytes: u64,
    },
}

/// Distinguishes the temporary files of one process.
static SERIAL: AtomicU64 = AtomicU64::new(0);

/// Writes `bytes` to `path`, readable by its owner alone, such that a reader or a crash sees the old content or the
/// new one and nothing between. The folder must exist.
///
/// # Errors
/// [`FileError::NoName`], [`FileError::Write`]; the old content is in place then.
pub fn write_atomic(path: &Path, bytes: &[u8]) -> Result<(), FileError> {
    let (Some(folder), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(FileError::NoName { path: path.to_owned() });
    };
    let folder = if folder.as_os_str().is_empty() { Path::new(".") } else { folder };
    let serial = SERIAL.fetch_add(1, Ordering::Relaxed);
    let temporary = folder.join(format!(".{}.{}.{serial}", name.display(), process::id()));
    let written = write_new(&temporary, bytes)
        .and_then(|()| fs::rename(&temporary, path))
        .and_then(|()| File::open(folder)?.sync_all());
    written.map_err(|source| {
        if let Err(error) = fs::remove_file(&temporary)
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::warn!(path = %temporary.display(), %error, "cannot remove a temporary file");
        }
        FileError::Write { path: path.to_owned(), source }
    })
}

fn write_new(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
    file.write_all(bytes)?;
    file.sync_all()
}

/// The content of `path`; `None` when there is no such file.
///
/// # Errors
/// [`FileError::TooLong`] beyond `limit_bytes`, [`FileError::Read`].
pub fn read_bounded(path: &Path, limit_bytes: u64) -> Result<Option<Vec<u8>>, FileError> {
    let failed = |source| FileError::Read { path: path.to_owned(), source };
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(failed(error)),
    };
    let mut bytes = Vec::new();
    file.take(limit_bytes.saturating_add(1)).read_to_end(&mut bytes).map_err(failed)?;
    if u64::try_from(bytes.len()).unwrap_or(u64::MAX) > limit_bytes {
        return Err(FileError::TooLong { path: path.to_owned(), limit_bytes });
    }
    Ok(Some(bytes))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn a_file_is_replaced_whole_and_for_its_owner_alone() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("state.json");
        assert_eq!(read_bounded(&path, 10).unwrap(), None);
        write_atomic(&path, b"one").unwrap();
        write_atomic(&path, b"two").unwrap();
        assert_eq!(read_bounded(&path, 3).unwrap().as_deref(), Some(&b"two"[..]));
        assert!(matches!(read_bounded(&path, 2), Err(FileError::TooLong { .. })));
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        let names: Vec<_> =
            fs::read_dir(&folder).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(names, ["state.json"], "no temporary file stays");
    }

    #[test]
    fn a_failed_write_leaves_the_old_content() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("occupied");
        fs::create_dir(&path).unwrap();
        fs::write(path.join("inside"), "x").unwrap();
        assert!(matches!(write_atomic(&path, b"new"), Err(FileError::Write { .. })));
        assert!(path.join("inside").exists());
        assert_eq!(fs::read_dir(&folder).unwrap().count(), 1);
        assert!(matches!(write_atomic(Path::new("/"), b""), Err(FileError::NoName { .. })));
        let missing = folder.path().join("missing/state");
        assert!(matches!(write_atomic(&missing, b""), Err(FileError::Write { .. })));
    }
}
