//! Where things are pinned.
//!
//! ```text
//! <bpffs>/v<LAYOUT>/maps/<NAME>
//!                  /links/<program>                 on the root cgroup
//!                  /programs/guard_from_pod, guard_to_pod
//!                  /pods/<netns cookie>/steer_inbound
//!                                      /guard_from_pod_<interface>, guard_to_pod_<interface>
//! ```

use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use crate::capture::NetnsCookie;
use crate::{CaptureError, sys};

/// The pins of one layout.
#[derive(Debug)]
pub(crate) struct Pins {
    base: PathBuf,
    layout: u32,
}

impl Pins {
    /// Makes the directories.
    pub(crate) fn prepare(base: &Path, layout: u32) -> Result<Self, CaptureError> {
        let pins = Self { base: base.to_owned(), layout };
        std::fs::create_dir_all(base).map_err(CaptureError::kernel("making the pin directory"))?;
        if !sys::is_bpffs(base).map_err(CaptureError::kernel("looking at the pin directory"))? {
            return Err(CaptureError::NotBpffs { path: base.to_owned() });
        }
        for directory in [pins.maps(), pins.links(), pins.programs(), pins.pods()] {
            std::fs::create_dir_all(directory)
                .map_err(CaptureError::kernel("making the pin directories"))?;
        }
        Ok(pins)
    }

    /// Those of another layout, which another build made.
    pub(crate) fn of_layout(&self, layout: u32) -> Self {
        Self { base: self.base.clone(), layout }
    }

    pub(crate) const fn layout(&self) -> u32 {
        self.layout
    }

    fn root(&self) -> PathBuf {
        self.base.join(format!("v{}", self.layout))
    }

    pub(crate) fn maps(&self) -> PathBuf {
        self.root().join("maps")
    }

    pub(crate) fn links(&self) -> PathBuf {
        self.root().join("links")
    }

    pub(crate) fn programs(&self) -> PathBuf {
        self.root().join("programs")
    }

    fn pods(&self) -> PathBuf {
        self.root().join("pods")
    }

    pub(crate) fn pod(&self, pod: NetnsCookie) -> PathBuf {
        self.pods().join(pod.0.to_string())
    }

    /// Pods that have a directory.
    pub(crate) fn listed_pods(&self) -> io::Result<Vec<NetnsCookie>> {
        let mut pods = Vec::new();
        for entry in std::fs::read_dir(self.pods())? {
            pods.extend(entry?.file_name().to_string_lossy().parse().map(NetnsCookie));
        }
        Ok(pods)
    }

    /// Layouts of other builds.
    pub(crate) fn foreign_layouts(&self) -> io::Result<Vec<u32>> {
        let mut layouts = Vec::new();
        for entry in std::fs::read_dir(&self.base)? {
            let name = entry?.file_name();
            let layout: Option<u32> =
                name.to_str().and_then(|name| name.strip_prefix('v')?.parse().ok());
            layouts.extend(layout.filter(|layout| *layout != self.layout));
        }
        layouts.sort_unstable();
        Ok(layouts)
    }

    /// Detaches all of it.
    pub(crate) fn remove_layout(&self) -> io::Result<()> {
        remove_tree(&self.root())
    }
}

/// Detaches the link of a pin and removes the pin, if it is there.
pub(crate) fn detach(path: &Path) -> io::Result<()> {
    if let Some(link) = sys::open_pin(path)? {
        match sys::link_detach(link.as_fd()) {
            // Its target is gone.
            Err(error) if error.raw_os_error() == Some(libc::ENOLINK) => {}
            detached => detached?,
        }
    }
    remove(path)
}

/// Removes a directory of pins; what was attached by them alone is detached.
pub(crate) fn remove_tree(directory: &Path) -> io::Result<()> {
    match std::fs::remove_dir_all(directory) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Removes a pin, if it is there.
pub(crate) fn remove(path: &Path) -> io::Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}
