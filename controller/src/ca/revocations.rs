//! The operator's revocation lists (`--crl-file`). A file that cannot be read, or is no list, changes nothing: the last
//! good one stays in use, also after a restart.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use mesh_identity::TrustBundle;
use mesh_telemetry::metric;
use serde::Serialize;
use tracing::{info, warn};

use crate::state_dir::StateDir;

/// The last good lists, in the state directory.
const KEPT_FILE: &str = "crl-file.pem";
/// Largest file.
const MAX_BYTES: u64 = 16 << 20;

/// Lists that cannot be used at the start, with none kept from before.
#[derive(Debug, thiserror::Error)]
pub enum RevocationsError {
    /// The file is no good.
    #[error("{}: {problem}; write a list in PEM, which may be without entries, or leave --crl-file out", path.display())]
    Unusable {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        problem: String,
    },
    /// The state directory cannot be used.
    #[error("the state directory cannot be used")]
    Files(#[from] io::Error),
}

/// How the operator's lists stand.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct RevocationStatus {
    /// The file.
    pub file: PathBuf,
    /// Why it is not used as it is now, when it is not; the last good version is in use then.
    pub problem: Option<String>,
}

/// The operator's revocation lists.
#[derive(Debug)]
pub struct Revocations {
    file: Option<PathBuf>,
    state: StateDir,
    held: Mutex<Held>,
}

#[derive(Debug, Default)]
struct Held {
    pem: String,
    problem: Option<String>,
}

impl Revocations {
    /// Reads the lists; none without a file.
    ///
    /// # Errors
    /// When the file is no good and none is kept from before: who is revoked is not known then.
    pub fn open(file: Option<PathBuf>, state: StateDir) -> Result<Self, RevocationsError> {
        let Some(path) = &file else {
            return Ok(Self { file, state, held: Mutex::default() });
        };
        let kept = state.read(KEPT_FILE)?.filter(|pem| checked(pem).is_ok());
        let has_kept = kept.is_some();
        let path = path.clone();
        let held = Held { pem: kept.unwrap_or_default(), problem: None };
        let opened = Self { file, state, held: Mutex::new(held) };
        opened.look();
        match opened.status().and_then(|status| status.problem) {
            Some(problem) if !has_kept => Err(RevocationsError::Unusable { path, problem }),
            Some(_) | None => Ok(opened),
        }
    }

    /// Looks at the file again; the lists in use, PEM.
    pub fn look(&self) -> String {
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(path) = &self.file else { return String::new() };
        let problem = match read(path, !held.pem.trim().is_empty()) {
            Ok(pem) if pem == held.pem => None,
            Ok(pem) => {
                let kept = self.state.write(KEPT_FILE, &pem).err();
                info!(file = %path.display(), "revocation lists read");
                held.pem = pem;
                kept.map(|error| format!("in use, but it cannot be kept for a restart: {error}"))
            }
            Err(problem) => Some(problem),
        };
        if problem != held.problem {
            match &problem {
                Some(problem) => {
                    warn!(file = %path.display(), problem, "revocation lists: the last good version stays in use");
                }
                None => info!(file = %path.display(), "revocation lists are good again"),
            }
            metrics::gauge!(metric::CONTROLLER_REVOCATIONS_KEPT.name).set(if problem.is_some() {
                1.0
            } else {
                0.0
            });
            held.problem = problem;
        }
        held.pem.clone()
    }

    /// How they stand; none without a file.
    #[must_use]
    pub fn status(&self) -> Option<RevocationStatus> {
        let held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        let file = self.file.clone()?;
        Some(RevocationStatus { file, problem: held.problem.clone() })
    }
}

fn read(path: &Path, had_some: bool) -> Result<String, String> {
    let length = fs::metadata(path).map_err(|error| error.to_string())?.len();
    if length > MAX_BYTES {
        return Err(format!("it has more than {MAX_BYTES} bytes"));
    }
    let pem = fs::read_to_string(path).map_err(|error| error.to_string())?;
    // A file that is being written is empty for a moment.
    if had_some && pem.trim().is_empty() {
        return Err("it is empty; to revoke nothing write a list without entries".to_owned());
    }
    checked(&pem)?;
    Ok(pem)
}

/// Holds text to be lists as agents read them; blank text is none.
fn checked(pem: &str) -> Result<(), String> {
    if pem.trim().is_empty() {
        return Ok(());
    }
    if !pem.contains("-----BEGIN X509 CRL-----") {
        return Err("it holds no revocation list in PEM".to_owned());
    }
    TrustBundle::default().with_revocations(pem).map(drop).map_err(|error| {
        let source = std::error::Error::source(&error);
        let because = source.map(|source| format!(": {source}")).unwrap_or_default();
        format!("{error}{because}")
    })
}

#[cfg(test)]
mod tests {
    use std::time::SystemTime;

    use super::*;
    use crate::ca::authority::Authority;

    /// A list that revokes `serial`.
    fn list(serial: &str) -> String {
        let directory = tempfile::tempdir().unwrap();
        let state = StateDir::open(&directory.path().join("ca")).unwrap();
        let now = SystemTime::now();
        let authority = Authority::open(state, "td", now).unwrap();
        authority.revoke(serial, now).unwrap();
        authority.crl_pem().to_string()
    }

    #[test]
    fn the_last_good_list_stays_also_across_restarts() {
        let directory = tempfile::tempdir().unwrap();
        let state = StateDir::open(&directory.path().join("state")).unwrap();
        let path = directory.path().join("crl.pem");
        let open = || Revocations::open(Some(path.clone()), state.clone());
        assert!(open().is_err(), "who is revoked is not known");
        let (one, two) = (list("0a"), list("0b"));
        fs::write(&path, &one).unwrap();
        let revocations = open().unwrap();
        assert_eq!(revocations.look(), one);
        for broken in [
            "",
            " \n",
            "no list",
            &one[..one.len() - 40],
            "-----BEGIN X509 CRL-----\nAAAA\n-----END X509 CRL-----\n",
        ] {
            fs::write(&path, broken).unwrap();
            assert_eq!(revocations.look(), one, "{broken:?}");
            assert!(revocations.status().unwrap().problem.is_some(), "{broken:?}");
            let restarted = open().unwrap();
            assert_eq!(restarted.look(), one, "after a restart, {broken:?}");
            assert!(restarted.status().unwrap().problem.is_some(), "after a restart, {broken:?}");
        }
        fs::remove_file(&path).unwrap();
        assert_eq!(revocations.look(), one);
        fs::write(&path, &two).unwrap();
        assert_eq!(revocations.look(), two);
        assert_eq!(revocations.status().unwrap().problem, None);
    }
}
