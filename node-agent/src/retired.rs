//! After a hand-over, where a supervisor would start the old agent again: the process becomes one that stays, does
//! nothing, holds nothing, and looks whether its successor is there. In a DaemonSet's surge the old pod is deleted once the new one is ready; until then a container that
//! ended would be restarted, and take everything back.

use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use mesh_runtime::Drain;

use crate::config::Settings;

/// Between looks.
const INTERVAL: Duration = Duration::from_secs(1);
/// So many looks in vain, and the successor is gone. A third agent that takes over leaves the socket alone for a moment.
const MAX_MISSED: u32 = 10;

/// Becomes such a process. Nothing of the agent is left in it: a descriptor that it kept would keep a listener open that its
/// successor closes.
///
/// # Errors
/// When the program cannot be started.
pub fn become_one(settings: &Settings) -> anyhow::Error {
    let mut program = Command::new("/proc/self/exe");
    let error = program.arg("retired").arg("--run-dir").arg(&settings.run_dir).exec();
    anyhow::Error::from(error).context("staying after the hand-over")
}

/// Stays until told to end.
///
/// # Errors
/// When no agent serves the node any more: this one has to be started again.
pub async fn stay(successors: &Path, drain: &Drain) -> anyhow::Result<()> {
    tracing::info!("this agent has handed over, and stays until it is told to end");
    stay_looking(successors, drain, INTERVAL).await
}

async fn stay_looking(successors: &Path, drain: &Drain, interval: Duration) -> anyhow::Result<()> {
    let mut missed = 0;
    while missed < MAX_MISSED {
        tokio::select! {
            () = tokio::time::sleep(interval) => {}
            () = drain.begun() => return Ok(()),
        }
        missed = if is_there(successors) { 0 } else { missed + 1 };
    }
    anyhow::bail!("the successor is gone");
}

/// Waits for an agent to be there, or until told to end.
pub(crate) async fn until_succeeded(successors: &Path, drain: &Drain) {
    while !is_there(successors) {
        tokio::select! {
            () = tokio::time::sleep(INTERVAL) => {}
            () = drain.begun() => return,
        }
    }
}

/// Whoever only connects asks nothing of the agent there.
fn is_there(successors: &Path) -> bool {
    UnixStream::connect(successors).is_ok()
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    #[tokio::test]
    async fn it_stays_while_a_successor_is_there() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("handover.sock");
        let listener = UnixListener::bind(&path).unwrap();
        let (trigger, drain) = Drain::new();
        let interval = Duration::from_millis(5);
        let looked = interval * MAX_MISSED * 4;
        let staying = stay_looking(&path, &drain, interval);
        assert!(tokio::time::timeout(looked, staying).await.is_err(), "it stays");
        drop(listener);
        assert!(stay_looking(&path, &drain, interval).await.is_err(), "the successor is gone");
        trigger.begin();
        stay(&path, &drain).await.expect("it was told to end");
    }
}
