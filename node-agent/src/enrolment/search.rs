//! Finds out which network namespaces still exist on the machine.

use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use mesh_enroll::NetnsPath;
use mesh_net::Netns;

/// Folders in which namespaces are mounted by name.
const MOUNTED: [&str; 2] = ["/run/netns", "/var/run/netns"];

/// The cookies of all namespaces that have a name or a process. Reads `/proc` once; for start-up only.
pub(crate) fn cookies_on_this_machine() -> BTreeSet<u64> {
    let mounted = MOUNTED.iter().flat_map(|folder| entries(Path::new(folder)));
    let of_processes = processes().map(|process| process.join("ns/net"));
    let mut inodes = BTreeSet::new();
    mounted
        .chain(of_processes)
        // A process may end while it is looked at, and one namespace has many: each is entered once.
        .filter(|path| {
            std::fs::metadata(path).is_ok_and(|found| inodes.insert((found.dev(), found.ino())))
        })
        .filter_map(|path| Netns::open(&path).ok())
        .map(|netns| netns.cookie())
        .collect()
}

/// A path to the namespace with this cookie: its name, or a process in it.
pub(super) fn path_of(cookie: u64) -> Option<NetnsPath> {
    let named = MOUNTED.iter().flat_map(|folder| entries(Path::new(folder)));
    named
        .chain(processes().map(|process| process.join("ns/net")))
        .find(|path| Netns::open(path).is_ok_and(|netns| netns.cookie() == cookie))
        .and_then(|path| NetnsPath::new(path.to_str()?).ok())
}

/// The folder of every process.
pub(super) fn processes() -> impl Iterator<Item = PathBuf> {
    entries(Path::new("/proc")).into_iter().filter(|path| {
        path.file_name()
            .and_then(|name| name.to_str())
            .is_some_and(|name| name.bytes().all(|byte| byte.is_ascii_digit()))
    })
}

/// Where namespaces are mounted, by device and inode.
pub(super) fn mounted() -> BTreeMap<(u64, u64), PathBuf> {
    let paths = MOUNTED.iter().flat_map(|folder| entries(Path::new(folder)));
    paths
        .filter_map(|path| {
            let found = std::fs::metadata(&path).ok()?;
            Some(((found.dev(), found.ino()), path))
        })
        .collect()
}

fn entries(folder: &Path) -> Vec<PathBuf> {
    match std::fs::read_dir(folder) {
        Ok(entries) => entries.flatten().map(|entry| entry.path()).collect(),
        // A machine without named namespaces has no such folder.
        Err(_absent) => Vec::new(),
    }
}
