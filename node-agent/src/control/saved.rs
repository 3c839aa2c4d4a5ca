//! The controller's words on the node's disk, so that a restart does not need the controller.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use mesh_telemetry::metric;
use mesh_wire::pb::mesh::SavedState;
use prost::Message as _;

use crate::state_file::{self, BrokenSeal};

/// The file `mesh-state`.
#[derive(Clone, Debug)]
pub(crate) struct SavedWorld {
    path: PathBuf,
}

/// A saved state that cannot be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum UnusableState {
    /// It cannot be read.
    #[error("cannot be read")]
    Read(#[source] io::Error),
    /// It was damaged.
    #[error(transparent)]
    Seal(#[from] BrokenSeal),
    /// Its content does not decode.
    #[error("its content cannot be decoded")]
    Decode(#[source] prost::DecodeError),
}

/// How long changes are gathered before they are written. A burst of a thousand pods is one write then.
pub(crate) const GATHER: Duration = Duration::from_secs(2);
/// Largest state read; 50,000 workloads take about 20 MiB.
const MAX_BYTES: u64 = 512 * 1024 * 1024;

impl SavedWorld {
    /// The file in the state folder.
    pub(crate) fn new(state_dir: &Path) -> Self {
        Self { path: state_dir.join("mesh-state") }
    }

    /// What an earlier life heard. A file that cannot be used is refused whole, put aside and counted.
    pub(crate) fn load(&self) -> Option<SavedState> {
        match self.read() {
            Ok(state) => state,
            Err(error) => {
                metrics::counter!(metric::STATE_FILES_REFUSED.name, "file" => "mesh-state")
                    .increment(1);
                let aside = state_file::set_aside(&self.path);
                tracing::error!(
                    error = %crate::error::error_chain(&error), path = %self.path.display(), set_aside = aside.is_ok(),
                    "the saved state of the mesh cannot be used; waiting for the controller"
                );
                None
            }
        }
    }

    /// Writes what is in force. Blocks on the disk.
    pub(crate) fn store(&self, state: &SavedState) -> io::Result<()> {
        state_file::replace(&self.path, &state_file::seal(&state.encode_to_vec()))
    }

    fn read(&self) -> Result<Option<SavedState>, UnusableState> {
        let sealed = state_file::read(&self.path, MAX_BYTES).map_err(UnusableState::Read)?;
        let Some(sealed) = sealed else { return Ok(None) };
        let content = state_file::unseal(&sealed)?;
        SavedState::decode(content).map(Some).map_err(UnusableState::Decode)
    }
}

#[cfg(test)]
mod tests {
    use mesh_wire::pb::discovery::DeltaDiscoveryResponse;

    use super::*;

    #[test]
    fn a_damaged_state_is_refused_and_put_aside() {
        let folder = tempfile::tempdir().unwrap();
        let saved = SavedWorld::new(folder.path());
        assert!(saved.load().is_none());
        let response = DeltaDiscoveryResponse { type_url: "t".to_owned(), ..Default::default() };
        let state = SavedState { responses: vec![response] };
        saved.store(&state).unwrap();
        assert_eq!(saved.load(), Some(state));
        let mut bytes = std::fs::read(&saved.path).unwrap();
        let last = bytes.len() - 1;
        bytes[last] ^= 1;
        std::fs::write(&saved.path, &bytes).unwrap();
        assert!(saved.load().is_none());
        assert!(!saved.path.exists() && folder.path().join("mesh-state.unusable").exists());
    }
}
