//! Records in the kernel's memory that outlive the process and not the machine.
//!
//! An array map that no program uses, pinned as `<bpffs>/kept-v1` with mode 0600. The kernel swaps its maps out to no
//! disk, and an element of an array is overwritten in its place, so that what is wiped is gone. What the records mean is
//! the caller's business; its layout is in the name, for another version would read it.

use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use mesh_ebpf_abi::{MapKind, MapSpec};

use crate::{CaptureError, maps, pins, sys};

/// Records of `N` bytes, by number from 0.
#[derive(Debug)]
pub struct KeptRecords<const N: usize> {
    map: OwnedFd,
    count: u32,
}

/// What the pins' names begin with; the number is the layout's.
const PREFIX: &str = "kept-v";
/// Layout of the records.
const LAYOUT: u32 = 1;

impl<const N: usize> KeptRecords<N> {
    /// Opens what an earlier process kept on this bpffs, or makes room for `count` records, all zero. Takes `count * N`
    /// bytes of the kernel's memory. A pin of another shape or layout is removed.
    ///
    /// # Errors
    /// When the directory is on no bpffs, or the kernel refuses.
    pub fn open(bpffs: &Path, count: u32) -> Result<Self, CaptureError> {
        let shape = shape::<N>(count);
        let path = bpffs.join(format!("{PREFIX}{LAYOUT}"));
        for other in pinned(bpffs)?.into_iter().filter(|pin| *pin != path) {
            wipe(&other)?;
        }
        let found = sys::open_pin(&path).map_err(CaptureError::kernel("opening what was kept"))?;
        if let Some(map) = found {
            if maps::check_shape(map.as_fd(), shape).is_ok() {
                return Ok(Self { map, count });
            }
            wipe(&path)?;
        }
        let map = sys::map_create(&shape).map_err(CaptureError::kernel("making a map"))?;
        let private = std::fs::Permissions::from_mode(0o600);
        sys::pin(map.as_fd(), &path)
            .and_then(|()| std::fs::set_permissions(&path, private))
            .map_err(CaptureError::kernel("pinning a map"))?;
        Ok(Self { map, count })
    }

    /// How many records there is room for.
    #[must_use]
    pub const fn count(&self) -> u32 {
        self.count
    }

    /// Copies a record out.
    ///
    /// # Errors
    /// When there is none of this number, or the kernel refuses.
    pub fn read(&self, number: u32, record: &mut [u8; N]) -> Result<(), CaptureError> {
        sys::array_read(self.map.as_fd(), number, record)
            .map_err(CaptureError::kernel("reading a kept record"))
    }

    /// Overwrites a record.
    ///
    /// # Errors
    /// When there is none of this number, or the kernel refuses.
    pub fn write(&self, number: u32, record: &[u8; N]) -> Result<(), CaptureError> {
        sys::array_write(self.map.as_fd(), number, record)
            .map_err(CaptureError::kernel("writing a kept record"))
    }

    /// Wipes and unpins what any version kept. Ok when there is nothing.
    ///
    /// # Errors
    /// When something cannot be removed.
    pub fn remove(bpffs: &Path) -> Result<(), CaptureError> {
        pinned(bpffs)?.iter().try_for_each(|path| wipe(path))
    }
}

#[expect(clippy::cast_possible_truncation, reason = "asserted")]
const fn shape<const N: usize>(count: u32) -> MapSpec {
    const { assert!(N <= 32 * 1024, "the kernel bounds the size of an element") };
    MapSpec {
        name: "culvert_kept",
        kind: MapKind::Array,
        key_size: 4,
        value_size: N as u32,
        max_entries: count,
    }
}

fn pinned(bpffs: &Path) -> Result<Vec<PathBuf>, CaptureError> {
    let entries = match std::fs::read_dir(bpffs) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.map_err(CaptureError::kernel("listing pins"))?,
    };
    let mut found = Vec::new();
    for entry in entries {
        let entry = entry.map_err(CaptureError::kernel("listing pins"))?;
        if entry.file_name().to_str().is_some_and(|name| name.starts_with(PREFIX)) {
            found.push(entry.path());
        }
    }
    Ok(found)
}

/// Overwrites all records and removes the pin.
fn wipe(path: &Path) -> Result<(), CaptureError> {
    let map = sys::open_pin(path).map_err(CaptureError::kernel("opening what was kept"))?;
    if let Some(map) = map {
        let [kind, key_size, value_size, count] =
            sys::map_info(map.as_fd()).map_err(CaptureError::kernel("reading a map's shape"))?;
        // Of another kind it is not ours: a name that somebody else pinned.
        if kind == MapKind::Array as u32 && key_size == 4 {
            // The kernel rounds elements up to 8 bytes and copies the stated size.
            let zeros = vec![0; value_size as usize];
            for number in 0..count {
                sys::array_write(map.as_fd(), number, &zeros)
                    .map_err(CaptureError::kernel("wiping a kept record"))?;
            }
        }
    }
    pins::remove(path).map_err(CaptureError::kernel("removing a pin"))
}
