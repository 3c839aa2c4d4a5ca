//! Connections that a pod makes one after the other while something else happens.

use std::fs::File;
use std::path::PathBuf;

use anyhow::{Context as _, ensure};

use crate::lab::Lab;
use crate::process::Process;
use crate::wait::{PATIENCE, until};

/// Connections made one after the other by a pod until the value is finished.
#[derive(Debug)]
pub struct Traffic {
    process: Process,
    stop: PathBuf,
}

/// What became of [`Traffic`].
#[derive(Debug)]
pub struct Counted {
    /// Connections that were answered.
    pub made: u64,
    /// Connections that were not.
    pub failed: u64,
    /// Every answer, and why there was none.
    pub log: String,
}

impl Traffic {
    /// Begins: asks each of `urls` (separated by spaces) in turn, on a connection of its own. `name` is not used twice.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start(lab: &impl AsRef<Lab>, pod: &str, name: &str, urls: &str) -> anyhow::Result<Self> {
        let pod = lab.as_ref().pod(pod);
        let stop = pod.folder().join(format!("{name}.stop"));
        let line = format!(
            "n=0; f=0; while [ ! -e {} ]; do for url in {urls}; do curl -sS -g -m 5 $url && n=$((n+1)) || f=$((f+1)); done; sleep 0.005; done; echo total $n $f",
            stop.display()
        );
        let process = pod.start(name, pod.command("sh").args(["-c", &line]))?;
        Ok(Self { process, stop })
    }

    /// Everything that was answered so far.
    #[must_use]
    pub fn log(&self) -> String {
        self.process.log()
    }

    /// Waits until `count` more lines with `part` in them were written than there are now.
    ///
    /// # Errors
    /// When they do not come in time.
    pub fn more(&self, count: usize, part: &str) -> anyhow::Result<()> {
        let lines = || self.log().lines().filter(|line| line.contains(part)).count();
        let before = lines();
        until(&format!("{count} more of {part:?} in the traffic"), PATIENCE, || {
            Ok((lines() >= before + count).then_some(()))
        })
    }

    /// Ends it after the present connection.
    ///
    /// # Errors
    /// When it does not end.
    pub fn finish(mut self) -> anyhow::Result<Counted> {
        File::create(&self.stop)?;
        until("the traffic's end", PATIENCE, || Ok((!self.process.running()).then_some(())))?;
        let log = self.process.log();
        let total = log.lines().rev().find_map(|line| line.strip_prefix("total "));
        let (made, failed) =
            total.and_then(|total| total.split_once(' ')).context("the traffic counted nothing")?;
        Ok(Counted { made: made.parse()?, failed: failed.trim().parse()?, log })
    }

    /// Ends it; nothing may have failed.
    ///
    /// # Errors
    /// When something has, or nothing was done.
    pub fn finish_whole(self) -> anyhow::Result<u64> {
        let counted = self.finish()?;
        ensure!(counted.failed == 0 && counted.made > 0, "traffic suffered: {counted:?}");
        Ok(counted.made)
    }
}
