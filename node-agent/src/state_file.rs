//! Files that survive a crash whole: the old content or the new, never half of either.

use std::fs::{File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use aws_lc_rs::digest::{SHA256, digest};

/// Replaces the content of `path`; readable by its owner only.
///
/// # Errors
/// When the folder cannot be written, is full, or the content does not reach the disk. The old content stays then.
pub(crate) fn replace(path: &Path, content: &[u8]) -> io::Result<()> {
    let folder = path.parent().unwrap_or_else(|| Path::new("/"));
    let draft = draft(path);
    let write = || {
        let mut options = OpenOptions::new();
        let mut file = options.write(true).create(true).truncate(true).mode(0o600).open(&draft)?;
        file.write_all(content)?;
        file.sync_all()?;
        std::fs::rename(&draft, path)?;
        File::open(folder)?.sync_all()
    };
    write().inspect_err(|_why| {
        if let Err(error) = std::fs::remove_file(&draft)
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::debug!(%error, path = %draft.display(), "a draft stays behind");
        }
    })
}

/// Reads a file of at most `limit` bytes; `None` when there is none.
///
/// # Errors
/// When it cannot be read or is larger.
pub(crate) fn read(path: &Path, limit: u64) -> io::Result<Option<Vec<u8>>> {
    let file = match File::open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        opened => opened?,
    };
    let mut content = Vec::new();
    file.take(limit + 1).read_to_end(&mut content)?;
    if u64::try_from(content.len()).is_ok_and(|length| length <= limit) {
        Ok(Some(content))
    } else {
        Err(io::Error::new(io::ErrorKind::FileTooLarge, format!("larger than {limit} bytes")))
    }
}

/// Puts a file that cannot be used aside, where a person can look at it.
///
/// # Errors
/// When it cannot be renamed.
pub(crate) fn set_aside(path: &Path) -> io::Result<PathBuf> {
    let aside = beside(path, "unusable");
    std::fs::rename(path, &aside)?;
    Ok(aside)
}

/// Content with its checksum in front.
pub(crate) fn seal(content: &[u8]) -> Vec<u8> {
    let mut sealed = MAGIC.to_vec();
    sealed.extend(digest(&SHA256, content).as_ref());
    sealed.extend(content);
    sealed
}

/// Content whose checksum did not fit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum BrokenSeal {
    /// It does not start as a sealed file does.
    #[error("not a file of this agent")]
    Foreign,
    /// It is not what was written.
    #[error("its checksum does not match: damaged or cut off")]
    Damaged,
}

/// The content of a sealed file.
pub(crate) fn unseal(sealed: &[u8]) -> Result<&[u8], BrokenSeal> {
    let rest = sealed.strip_prefix(MAGIC.as_slice()).ok_or(BrokenSeal::Foreign)?;
    let (sum, content) = rest.split_at_checked(SUM_BYTES).ok_or(BrokenSeal::Damaged)?;
    if digest(&SHA256, content).as_ref() == sum { Ok(content) } else { Err(BrokenSeal::Damaged) }
}

/// Names the format and its version.
const MAGIC: [u8; 16] = *b"culvert-state-1\n";
const SUM_BYTES: usize = 32;

fn draft(path: &Path) -> PathBuf {
    beside(path, "draft")
}

fn beside(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(".");
    name.push(suffix);
    path.with_file_name(name)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn replacing_leaves_one_private_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("state");
        replace(&path, b"old").unwrap();
        replace(&path, b"new").unwrap();
        assert_eq!(read(&path, 3).unwrap().unwrap(), b"new");
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_failed_replacement_keeps_the_old_content() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("state");
        replace(&path, b"old").unwrap();
        std::fs::create_dir(draft(&path)).unwrap();
        assert!(replace(&path, b"new").is_err());
        assert_eq!(read(&path, 100).unwrap().unwrap(), b"old");
    }

    #[test]
    fn absent_and_oversized_files_are_told_apart() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("state");
        assert!(read(&path, 10).unwrap().is_none());
        replace(&path, b"four").unwrap();
        assert!(read(&path, 3).is_err());
    }

    #[test]
    fn seals_notice_every_damaged_byte_and_every_cut() {
        let sealed = seal(b"content");
        assert_eq!(unseal(&sealed).unwrap(), b"content");
        for at in 0..sealed.len() {
            let mut damaged = sealed.clone();
            damaged[at] ^= 1;
            assert!(unseal(&damaged).is_err(), "{at}");
            assert!(unseal(&sealed[..at]).is_err(), "{at}");
        }
    }
}
