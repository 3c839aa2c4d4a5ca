//! Files that survive a crash whole: the old content or the new, never half of either.

use std::io;
use std::path::{Path, PathBuf};

use aws_lc_rs::digest::{SHA256, digest};
use mesh_runtime::{read_bounded, write_atomic};

/// Replaces the content of `path`; readable by its owner only.
///
/// # Errors
/// When the folder cannot be written, is full, or the content does not reach the disk. The old content stays then.
pub fn replace(path: &Path, content: &[u8]) -> io::Result<()> {
    write_atomic(path, content).map_err(io::Error::other)
}

/// Reads a file of at most `limit` bytes; `None` when there is none.
///
/// # Errors
/// When it cannot be read or is larger.
pub fn read(path: &Path, limit: u64) -> io::Result<Option<Vec<u8>>> {
    read_bounded(path, limit).map_err(io::Error::other)
}

/// Puts a file that cannot be used aside, where a person can look at it.
///
/// # Errors
/// When it cannot be renamed.
pub fn set_aside(path: &Path) -> io::Result<PathBuf> {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(".unusable");
    let aside = path.with_file_name(name);
    std::fs::rename(path, &aside)?;
    Ok(aside)
}

/// Content with its checksum in front.
pub fn seal(content: &[u8]) -> Vec<u8> {
    let mut sealed = MAGIC.to_vec();
    sealed.extend(digest(&SHA256, content).as_ref());
    sealed.extend(content);
    sealed
}

/// Content whose checksum did not fit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BrokenSeal {
    /// It does not start as a sealed file does.
    #[error("not a file of this agent")]
    Foreign,
    /// It is not what was written.
    #[error("its checksum does not match: damaged or cut off")]
    Damaged,
}

/// The content of a sealed file.
pub fn unseal(sealed: &[u8]) -> Result<&[u8], BrokenSeal> {
    let rest = sealed.strip_prefix(MAGIC.as_slice()).ok_or(BrokenSeal::Foreign)?;
    let (sum, content) = rest.split_at_checked(SUM_BYTES).ok_or(BrokenSeal::Damaged)?;
    if digest(&SHA256, content).as_ref() == sum { Ok(content) } else { Err(BrokenSeal::Damaged) }
}

/// Names the format and its version.
const MAGIC: [u8; 16] = *b"culvert-state-1\n";
const SUM_BYTES: usize = 32;

#[cfg(test)]
mod tests {
    use super::*;

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
