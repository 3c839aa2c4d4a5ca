//! Finding the root of the machine's cgroup2 hierarchy.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use crate::CaptureError;
use crate::sys;

/// Where the cgroup2 hierarchy is mounted: unified, and hybrid.
const USUAL: [&str; 2] = ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"];
/// Inode of the hierarchy's root. Inside a cgroup namespace the mount's root is the container's own
/// cgroup, with another inode, and a program attached there sees nobody else's sockets.
const ROOT_INODE: u64 = 1;

/// The root to attach to: `named`, or what is found.
pub(crate) fn find_root(named: Option<&Path>) -> Result<PathBuf, CaptureError> {
    let candidates: Vec<PathBuf> = match named {
        Some(path) => vec![path.to_owned()],
        None => USUAL.iter().map(PathBuf::from).collect(),
    };
    for path in &candidates {
        if !sys::is_cgroup2(path).unwrap_or(false) {
            continue;
        }
        let inode =
            std::fs::metadata(path).map_err(CaptureError::kernel("reading the cgroup root"))?.ino();
        if inode != ROOT_INODE {
            return Err(CaptureError::NotCgroupRoot { path: path.clone(), inode });
        }
        return Ok(path.clone());
    }
    Err(CaptureError::NoCgroupRoot { tried: candidates })
}
