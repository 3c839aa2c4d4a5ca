//! Another version takes over because somebody asks: `culvert agent upgrade`. The running agent starts the new program, which
//! finds it and succeeds it as any agent that is started beside another one does (docs/handover.md).

use std::io;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};

use serde::Serialize;

/// Why no successor was started.
#[derive(Debug, thiserror::Error)]
pub(crate) enum UpgradeRefused {
    /// A container ends with its first process.
    #[error(
        "this agent is the first process of its container, which would end with it: upgrade the DaemonSet"
    )]
    Container,
    /// One is on its way.
    #[error("a successor was started already, process {0}")]
    UnderWay(u32),
    /// The path is of no use.
    #[error("{} {why}", path.display())]
    Program {
        /// What was asked for.
        path: PathBuf,
        /// What is wrong with it.
        why: &'static str,
    },
    /// The kernel did not start it.
    #[error("{} cannot be started", path.display())]
    Start {
        /// What was asked for.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// A successor that was started.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Started {
    /// Its process.
    pub(crate) pid: u32,
    /// Its program.
    pub(crate) program: PathBuf,
    /// How it ended, if it did: then there was no hand-over.
    pub(crate) ended: Option<String>,
}

/// Starts successors, one at a time. Cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct Upgrade {
    last: Arc<Mutex<Option<Started>>>,
    /// This process may end, because it is not what a container lives by.
    may_end: bool,
}

impl Upgrade {
    /// `may_end`: no container ends with this process.
    pub(crate) fn new(may_end: bool) -> Self {
        Self { last: Arc::default(), may_end: may_end && std::process::id() != 1 }
    }

    /// Starts `program`, or what this process runs when it is empty, with this process's own arguments.
    ///
    /// # Errors
    /// Nothing was started.
    pub(crate) fn start(&self, program: &str) -> Result<Started, UpgradeRefused> {
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(Started { pid, ended: None, .. }) = &*last {
            return Err(UpgradeRefused::UnderWay(*pid));
        }
        if !self.may_end {
            return Err(UpgradeRefused::Container);
        }
        let path = if program.is_empty() { own_program()? } else { PathBuf::from(program) };
        check(&path)?;
        let start = |source| UpgradeRefused::Start { path: path.clone(), source };
        let child = Command::new(&path)
            .args(std::env::args_os().skip(1))
            .stdin(Stdio::null())
            .spawn()
            .map_err(start)?;
        let started = Started { pid: child.id(), program: path.clone(), ended: None };
        tracing::info!(pid = started.pid, program = %path.display(), "a successor was started");
        let watched = self.clone();
        // One that succeeds outlives this process, and the thread with it.
        let watching = std::thread::Builder::new()
            .name("culvert-upgrade".to_owned())
            .spawn(move || watched.watch(child));
        *last = Some(started.clone());
        drop(last);
        if let Err(error) = watching {
            tracing::warn!(%error, "how the successor ends will not be known");
        }
        Ok(started)
    }

    /// The last that was started.
    pub(crate) fn last(&self) -> Option<Started> {
        self.last.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn watch(&self, mut child: Child) {
        let ended = match child.wait() {
            Ok(status) => status.to_string(),
            Err(error) => error.to_string(),
        };
        tracing::warn!(pid = child.id(), ended, "the successor has ended, this agent goes on");
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(last) = last.as_mut() {
            last.ended = Some(ended);
        }
    }
}

/// The file this process was started from, also when another one has taken its place since.
fn own_program() -> Result<PathBuf, UpgradeRefused> {
    let path = std::env::current_exe()
        .map_err(|source| UpgradeRefused::Start { path: "/proc/self/exe".into(), source })?;
    Ok(without_deleted(&path))
}

/// What the kernel says of the program of a process whose file was replaced ends with ` (deleted)` (proc_pid_exe(5)).
fn without_deleted(path: &Path) -> PathBuf {
    let text = path.to_string_lossy();
    text.strip_suffix(" (deleted)").map_or_else(|| path.to_owned(), PathBuf::from)
}

/// It will run as root: nobody else may be able to change it.
fn check(path: &Path) -> Result<(), UpgradeRefused> {
    let refuse = |why| UpgradeRefused::Program { path: path.to_owned(), why };
    if !path.is_absolute() {
        return Err(refuse("is not an absolute path"));
    }
    let start = |source| UpgradeRefused::Start { path: path.to_owned(), source };
    let file = std::fs::metadata(path).map_err(start)?;
    let mode = file.permissions().mode();
    if !file.is_file() || mode & 0o111 == 0 {
        return Err(refuse("is no program"));
    }
    let own = nix::unistd::geteuid().as_raw();
    if file.uid() != own && file.uid() != 0 {
        return Err(refuse("belongs to another user"));
    }
    if mode & 0o022 != 0 {
        return Err(refuse("can be written by others than its owner"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_programs_of_ones_own_are_started() {
        let folder = tempfile::tempdir().unwrap();
        let program = folder.path().join("program");
        std::fs::write(&program, "#!/bin/sh\nexit 3\n").unwrap();
        let mode = |mode| {
            std::fs::set_permissions(&program, std::fs::Permissions::from_mode(mode)).unwrap();
            check(&program).map_err(|refused| refused.to_string())
        };
        assert!(mode(0o644).unwrap_err().contains("no program"));
        assert!(mode(0o777).unwrap_err().contains("written by others"));
        assert_eq!(mode(0o755), Ok(()));
        assert!(matches!(check(Path::new("bin/true")), Err(UpgradeRefused::Program { .. })));
        assert!(matches!(check(&folder.path().join("no")), Err(UpgradeRefused::Start { .. })));
        assert!(matches!(check(folder.path()), Err(UpgradeRefused::Program { .. })));
    }

    #[test]
    fn a_replaced_program_is_found_by_its_place() {
        assert_eq!(without_deleted(Path::new("/bin/agent (deleted)")), Path::new("/bin/agent"));
        assert_eq!(without_deleted(Path::new("/bin/agent")), Path::new("/bin/agent"));
    }
}
