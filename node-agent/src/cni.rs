//! The chained plugin on the node: installed behind whatever network is there, kept there, and removed without a trace.
//!
//! The first configuration list of the folder is the one runtimes use. What it was before is kept, so that removal gives
//! it back byte for byte. Whoever rewrites it is followed: the new text is what is kept then.

use std::ffi::OsStr;
use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use mesh_enroll::cni::conflist::{self, InvalidList, PLUGIN};
use mesh_runtime::Pending;
use notify::{RecursiveMode, Watcher as _};
use serde_json::{Map, Value, json};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::error::error_chain;

/// Where the plugin goes.
#[derive(Clone, Debug)]
pub(crate) struct CniFolders {
    /// Configuration lists, `/etc/cni/net.d` as a rule.
    pub(crate) configurations: PathBuf,
    /// Programs, `/opt/cni/bin` as a rule.
    pub(crate) programs: PathBuf,
    /// What the configuration lists were.
    pub(crate) kept: PathBuf,
}

/// The plugin as it is to be on the node.
#[derive(Clone, Debug)]
pub(crate) struct CniPlugin {
    folders: CniFolders,
    program: PathBuf,
    settings: Map<String, Value>,
}

/// The plugin cannot be installed or removed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CniPluginError {
    /// There is nothing to chain to yet.
    #[error("no network is configured in {}", .0.display())]
    NoNetwork(PathBuf),
    /// A file cannot be read or written.
    #[error("cannot use {}", path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The network's configuration is none that can be chained to.
    #[error("cannot chain to {}", path.display())]
    List {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: InvalidList,
    },
}

/// A look at everything, whatever the kernel tells.
const LOOK_INTERVAL: Duration = Duration::from_secs(5);
/// While something is wrong.
const RETRY_INTERVAL: Duration = Duration::from_secs(1);
/// How long after a change the folder is looked at.
const SETTLE_INTERVAL: Duration = Duration::from_millis(200);

impl CniPlugin {
    /// A copy of `program` that asks the agent at `socket`; pods of `excluded` namespaces never wait for it.
    pub(crate) fn new(
        folders: CniFolders,
        program: PathBuf,
        socket: &Path,
        excluded: &[String],
    ) -> Self {
        let settings = Map::from_iter([
            ("agentSocket".to_owned(), json!(socket)),
            ("excludeNamespaces".to_owned(), json!(excluded)),
        ]);
        Self { folders, program, settings }
    }

    /// Installs the plugin and keeps it installed until `stop`. `pending` is done once it is.
    pub(crate) async fn keep(self, pending: Pending, stop: CancellationToken) {
        let (wake, mut woken) = mpsc::channel(1);
        // Looking reads the folder, which is told as well: only what changed something counts. A full queue means that a look is due anyway.
        let watcher = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
            if event.map_or(true, |event| !event.kind.is_access()) {
                wake.try_send(()).unwrap_or(());
            }
        });
        let watching = watcher.and_then(|mut watcher| {
            watcher.watch(&self.folders.configurations, RecursiveMode::NonRecursive)?;
            Ok(watcher)
        });
        let _watcher = watching.inspect_err(|error| {
            tracing::warn!(%error, "changes of the node's network are noticed within seconds only");
        });
        let mut pending = Some(pending);
        loop {
            let plugin = self.clone();
            let settled = tokio::task::spawn_blocking(move || plugin.settle()).await;
            let pause = match settled {
                Ok(Ok(changed)) => {
                    if changed {
                        tracing::info!("the CNI plugin is in place");
                    }
                    if let Some(pending) = pending.take() {
                        pending.done();
                    }
                    LOOK_INTERVAL
                }
                Ok(Err(error)) => {
                    tracing::warn!(error = %error_chain(&error), "the CNI plugin is not in place; new pods of the mesh are captured late");
                    RETRY_INTERVAL
                }
                Err(error) => {
                    tracing::error!(%error, "installing the CNI plugin ended early");
                    RETRY_INTERVAL
                }
            };
            tokio::select! {
                // Not at once: a tool that writes its own list whenever it is changed gets no war.
                _ = woken.recv() => tokio::time::sleep(SETTLE_INTERVAL).await,
                () = tokio::time::sleep(pause) => {}
                () = stop.cancelled() => return,
            }
        }
    }

    /// Puts everything in place; whether anything was not.
    fn settle(&self) -> Result<bool, CniPluginError> {
        let copied = self.copy_program()?;
        let Some(path) = lists(&self.folders.configurations)?.into_iter().next() else {
            return Err(CniPluginError::NoNetwork(self.folders.configurations.clone()));
        };
        let text = read(&path)?;
        let listed = |source| CniPluginError::List { path: path.clone(), source };
        let Some(chained) = conflist::chain(&text, &self.settings).map_err(listed)? else {
            return Ok(copied);
        };
        // A list that has the plugin with other settings is an earlier version's; what it was is kept already.
        if conflist::unchain(&text).map_err(listed)?.is_none() {
            let kept = self.folders.kept.join(path.file_name().unwrap_or_default());
            fs::create_dir_all(&self.folders.kept)
                .map_err(file(&self.folders.kept))
                .and_then(|()| replace(&kept, &text, 0o600))?;
        }
        replace(&path, &chained, mode(&path)?)?;
        Ok(true)
    }

    fn copy_program(&self) -> Result<bool, CniPluginError> {
        let wanted = read(&self.program)?;
        let installed = self.folders.programs.join(PLUGIN);
        let same = fs::read(&installed).is_ok_and(|present| present == wanted);
        if !same {
            replace(&installed, &wanted, 0o755)?;
        }
        Ok(!same)
    }
}

/// Takes the plugin out of every configuration list, then removes its program.
///
/// # Errors
/// The first thing that could not be undone; the rest is tried.
pub(crate) fn remove(folders: &CniFolders) -> Result<(), CniPluginError> {
    let mut outcome = Ok(());
    for path in lists(&folders.configurations)? {
        let removed = unchain(folders, &path);
        if outcome.is_ok() {
            outcome = removed;
        }
    }
    outcome?;
    remove_file(&folders.programs.join(PLUGIN))
}

fn unchain(folders: &CniFolders, path: &Path) -> Result<(), CniPluginError> {
    let text = read(path)?;
    // What never could be chained to was not changed.
    let Ok(Some(plain)) = conflist::unchain(&text) else { return Ok(()) };
    let kept = folders.kept.join(path.file_name().unwrap_or_default());
    let original = fs::read(&kept).ok().filter(|original| same_json(original, &plain));
    replace(path, &original.unwrap_or(plain), mode(path)?)?;
    remove_file(&kept)
}

fn same_json(one: &[u8], other: &[u8]) -> bool {
    let parse = |text: &[u8]| serde_json::from_slice::<Value>(text).ok();
    parse(one).is_some_and(|one| Some(one) == parse(other))
}

/// Configuration files in the order in which runtimes look at them. Source: libcni's `ConfFiles`.
fn lists(folder: &Path) -> Result<Vec<PathBuf>, CniPluginError> {
    let mut paths: Vec<PathBuf> = fs::read_dir(folder)
        .map_err(file(folder))?
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| {
            let extension = path.extension().and_then(OsStr::to_str);
            matches!(extension, Some("conf" | "conflist" | "json"))
        })
        .collect();
    paths.sort();
    Ok(paths)
}

fn read(path: &Path) -> Result<Vec<u8>, CniPluginError> {
    fs::read(path).map_err(file(path))
}

fn mode(path: &Path) -> Result<u32, CniPluginError> {
    fs::metadata(path).map(|found| found.permissions().mode() & 0o7777).map_err(file(path))
}

/// Replaces a file at once. The name in between is none that a runtime would read.
fn replace(path: &Path, content: &[u8], mode: u32) -> Result<(), CniPluginError> {
    let name = path.file_name().and_then(OsStr::to_str).unwrap_or_default();
    let temporary = path.with_file_name(format!(".{name}.culvert-new"));
    fs::write(&temporary, content)
        .and_then(|()| fs::set_permissions(&temporary, fs::Permissions::from_mode(mode)))
        .and_then(|()| fs::rename(&temporary, path))
        .map_err(file(path))
}

fn remove_file(path: &Path) -> Result<(), CniPluginError> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(file(path)(error)),
        _removed_or_absent => Ok(()),
    }
}

fn file(path: &Path) -> impl FnOnce(io::Error) -> CniPluginError + use<> {
    let path = path.to_owned();
    move |source| CniPluginError::File { path, source }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ORIGINAL: &[u8] =
        b"{ \"name\": \"n\",\n\t\"plugins\": [{\"type\": \"ptp\"}] , \"cniVersion\": \"1.0.0\"}";

    #[test]
    fn the_plugin_comes_stays_and_goes_byte_for_byte() {
        let node = tempfile::tempdir().unwrap();
        let folder = |name: &str| {
            let path = node.path().join(name);
            fs::create_dir_all(&path).unwrap();
            path
        };
        let folders = CniFolders {
            configurations: folder("net.d"),
            programs: folder("bin"),
            kept: node.path().join("kept"),
        };
        let program = node.path().join("program");
        fs::write(&program, "one").unwrap();
        let plugin = CniPlugin::new(folders.clone(), program.clone(), Path::new("/s"), &[]);
        assert!(matches!(plugin.settle(), Err(CniPluginError::NoNetwork(_))));
        let list = folders.configurations.join("10-a.conflist");
        fs::write(&list, ORIGINAL).unwrap();
        fs::set_permissions(&list, fs::Permissions::from_mode(0o640)).unwrap();
        fs::write(folders.configurations.join("20-b.conflist"), "not looked at").unwrap();
        assert!(plugin.settle().unwrap());
        assert!(!plugin.settle().unwrap(), "nothing left to do");
        assert!(fs::read_to_string(&list).unwrap().contains(PLUGIN));
        // Somebody writes the list anew, and the program is of a new version.
        let rewritten = [ORIGINAL, b"\n\n"].concat();
        fs::write(&list, &rewritten).unwrap();
        fs::write(&program, "two").unwrap();
        assert!(plugin.settle().unwrap());
        assert_eq!(fs::read(folders.programs.join(PLUGIN)).unwrap(), b"two");
        remove(&folders).unwrap();
        assert_eq!(fs::read(&list).unwrap(), rewritten);
        assert_eq!(mode(&list).unwrap(), 0o640);
        assert_eq!(fs::read_dir(&folders.programs).unwrap().count(), 0);
        assert_eq!(fs::read_dir(&folders.kept).unwrap().count(), 0);
        remove(&folders).unwrap();
    }
}
