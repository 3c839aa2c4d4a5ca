//! Finding the root of the machine's cgroup2 hierarchy.

use std::collections::BTreeSet;
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
        if inode != ROOT_INODE && !holds_the_node(path) {
            return Err(CaptureError::NotCgroupRoot { path: path.clone(), inode });
        }
        return Ok(path.clone());
    }
    Err(CaptureError::NoCgroupRoot { tried: candidates })
}

/// Whether a node's processes are all below `root`, though it is not the machine's own root: a node in a cgroup namespace.
///
/// Asked from a container of such a node: process 1 is then the node's, in another mount namespace than this process.
/// Below the root must be this process, process 1, and every process of another network namespace, which pods are.
fn holds_the_node(root: &Path) -> bool {
    let [own, first] = ["/proc/self/ns/mnt", "/proc/1/ns/mnt"].map(inode_of);
    if own.is_none() || first.is_none() || own == first {
        return false;
    }
    // A process that moves between groups while they are read would be missed.
    (0..LOOKS).any(|_| {
        let wanted = processes_to_hold();
        let mut held = BTreeSet::new();
        collect(root, &mut held);
        wanted.iter().all(|pid| held.contains(pid) || !exists(*pid))
    })
}

/// Tries before a process that seems to be outside is believed to be.
const LOOKS: usize = 5;

fn processes_to_hold() -> BTreeSet<u32> {
    let node = inode_of("/proc/1/ns/net");
    let mut wanted = BTreeSet::from([1, std::process::id()]);
    let entries = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    wanted.extend(pids.filter(|pid| {
        // One that cannot be looked at has ended.
        let netns = inode_of(format!("/proc/{pid}/ns/net"));
        netns.is_some() && netns != node
    }));
    wanted
}

fn exists(pid: u32) -> bool {
    inode_of(format!("/proc/{pid}/ns/net")).is_some()
}

fn collect(group: &Path, held: &mut BTreeSet<u32>) {
    let members = std::fs::read_to_string(group.join("cgroup.procs")).unwrap_or_default();
    held.extend(members.lines().filter_map(|line| line.parse::<u32>().ok()));
    for entry in std::fs::read_dir(group).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            collect(&entry.path(), held);
        }
    }
}

fn inode_of(path: impl AsRef<Path>) -> Option<u64> {
    std::fs::metadata(path).ok().map(|found| found.ino())
}
