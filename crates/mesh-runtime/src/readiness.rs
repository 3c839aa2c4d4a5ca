//! What the process still waits for before it is ready.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// The tasks that are not done; cheap to clone.
///
/// A process is ready when no task is pending, and not ready again when one is added.
#[derive(Clone, Debug, Default)]
pub struct Readiness {
    tasks: Arc<Mutex<BTreeMap<&'static str, usize>>>,
}

/// One thing that must happen before the process is ready. Dropping it without [`done`](Self::done) leaves the process
/// not ready: what has died is not what has succeeded.
#[derive(Debug)]
#[must_use = "the process is not ready until `done` is called"]
pub struct Pending {
    readiness: Readiness,
    task: &'static str,
}

impl Readiness {
    /// No tasks: ready.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a task. The same name may be pending several times; it is shown once.
    pub fn pending(&self, task: &'static str) -> Pending {
        *self.lock().entry(task).or_default() += 1;
        Pending { readiness: self.clone(), task }
    }

    /// The tasks that are pending, by name; empty when ready.
    #[must_use]
    pub fn waiting_for(&self) -> Vec<&'static str> {
        self.lock().keys().copied().collect()
    }

    /// True when nothing is pending.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        self.lock().is_empty()
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<&'static str, usize>> {
        self.tasks.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Pending {
    /// The task is done.
    pub fn done(self) {
        let mut tasks = self.readiness.lock();
        if let Some(count) = tasks.get_mut(self.task) {
            *count -= 1;
            if *count == 0 {
                tasks.remove(self.task);
            }
        }
    }
}

impl fmt::Display for Readiness {
    /// `ready`, or `not ready, pending: a, b`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let waiting = self.waiting_for();
        if waiting.is_empty() {
            f.write_str("ready")
        } else {
            write!(f, "not ready, pending: {}", waiting.join(", "))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_ready_when_every_task_is_done() {
        let readiness = Readiness::new();
        assert_eq!(readiness.to_string(), "ready");
        let second = readiness.pending("xds");
        let first = readiness.pending("capture");
        assert_eq!(readiness.to_string(), "not ready, pending: capture, xds");
        first.done();
        assert!(!readiness.is_ready());
        second.done();
        assert!(readiness.is_ready());
    }

    #[test]
    fn a_task_that_died_stays_pending() {
        let readiness = Readiness::new();
        let one = readiness.pending("xds");
        drop(readiness.pending("xds"));
        one.done();
        assert_eq!(readiness.waiting_for(), ["xds"]);
    }
}
