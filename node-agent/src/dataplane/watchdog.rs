//! Notices an engine that does not turn: its connections would hang, and nobody would say so.
//!
//! Every engine is woken once per interval; one that has not turned by the next look is stuck. Looks are counted, not
//! time: a process that was stopped as a whole, or a machine that slept, has missed one look only.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::{JoinHandle, Thread};
use std::time::Duration;

use mesh_net::driver::WorkerHandle;

use crate::dataplane::worker::Command;

/// When an engine counts as stuck, and when the process gives up on it.
#[derive(Clone, Copy, Debug)]
pub struct WatchdogConfig {
    /// Between two looks; default 5 s.
    pub interval: Duration,
    /// Looks in a row without a turn after which an engine counts as stuck; default 2.
    pub stuck_after: u32,
    /// Looks in a row without a turn after which the process aborts, so that its supervisor starts another and capture
    /// refuses new connections meanwhile instead of letting them hang; default 12, a minute. 0: never.
    pub abort_after: u32,
}

impl Default for WatchdogConfig {
    fn default() -> Self {
        Self { interval: Duration::from_secs(5), stuck_after: 2, abort_after: 12 }
    }
}

/// How often in a row each engine was seen without a turn.
#[derive(Debug, Default)]
struct Looks(Vec<Look>);

#[derive(Clone, Copy, Debug, Default)]
struct Look {
    turns: u64,
    missed: u32,
}

impl Looks {
    /// Takes the engines' counts of turns, of which each was woken after the last look. Gives the looks each has missed.
    fn look(&mut self, turns: impl Iterator<Item = u64>) -> impl Iterator<Item = u32> {
        for (index, turns) in turns.enumerate() {
            match self.0.get_mut(index) {
                Some(look) if look.turns == turns => look.missed += 1,
                Some(look) => *look = Look { turns, missed: 0 },
                None => self.0.push(Look { turns, missed: 0 }),
            }
        }
        self.0.iter().map(|look| look.missed)
    }
}

/// The watching thread. Ends when dropped.
#[derive(Debug)]
pub(super) struct Watchdog {
    stuck: Arc<AtomicUsize>,
    stop: Arc<AtomicBool>,
    paused: Arc<AtomicBool>,
    thread: Thread,
}

impl Watchdog {
    /// Starts it.
    pub(super) fn start(
        config: WatchdogConfig,
        workers: Vec<Arc<WorkerHandle<Command>>>,
    ) -> std::io::Result<Self> {
        let (stuck, stop) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicBool::new(false)));
        let paused = Arc::new(AtomicBool::new(false));
        let (told, stopped, resting) = (Arc::clone(&stuck), Arc::clone(&stop), Arc::clone(&paused));
        let watching: JoinHandle<()> =
            std::thread::Builder::new().name("culvert-watchdog".to_owned()).spawn(move || {
                let mut looks = Looks::default();
                while !stopped.load(Ordering::Acquire) {
                    if resting.load(Ordering::Acquire) {
                        looks = Looks::default();
                    } else {
                        let missed: Vec<u32> =
                            looks.look(workers.iter().map(|worker| worker.turns())).collect();
                        judge(config, &missed, &told);
                    }
                    for worker in &workers {
                        worker.nudge();
                    }
                    std::thread::park_timeout(config.interval);
                }
            })?;
        Ok(Self { stuck, stop, paused, thread: watching.thread().clone() })
    }

    /// Judges nobody while engines stand still on purpose, as in a hand-over, or again.
    pub(super) fn pause(&self, paused: bool) {
        self.paused.store(paused, Ordering::Release);
        if paused {
            self.stuck.store(0, Ordering::Relaxed);
        }
    }

    /// Engines that are stuck.
    pub(super) fn stuck(&self) -> usize {
        self.stuck.load(Ordering::Relaxed)
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        self.thread.unpark();
    }
}

fn judge(config: WatchdogConfig, missed: &[u32], told: &AtomicUsize) {
    let stuck = missed.iter().filter(|missed| **missed >= config.stuck_after).count();
    let before = told.swap(stuck, Ordering::Relaxed);
    if stuck > before {
        tracing::error!(
            stuck,
            "an engine does not turn: its connections hang, new ones are not served"
        );
    } else if stuck == 0 && before > 0 {
        tracing::warn!("all engines turn again");
    }
    if is_hopeless(config, missed) {
        tracing::error!(
            "an engine did not turn for too long; the process ends, capture keeps refusing"
        );
        std::process::abort();
    }
}

fn is_hopeless(config: WatchdogConfig, missed: &[u32]) -> bool {
    config.abort_after > 0 && missed.iter().any(|missed| *missed >= config.abort_after)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_engine_is_stuck_after_looks_without_a_turn_and_recovers_with_one() {
        let config = WatchdogConfig { stuck_after: 2, abort_after: 3, ..WatchdogConfig::default() };
        let (mut looks, told) = (Looks::default(), AtomicUsize::new(0));
        for (turns, stuck, hopeless) in [
            ([1, 1], 0, false),
            ([2, 1], 0, false),
            ([3, 1], 1, false),
            ([4, 2], 0, false),
            ([4, 2], 0, false),
            ([4, 3], 1, false),
            ([4, 4], 1, true),
        ] {
            let missed: Vec<u32> = looks.look(turns.into_iter()).collect();
            assert_eq!(is_hopeless(config, &missed), hopeless, "{turns:?}");
            if !hopeless {
                judge(config, &missed, &told);
                assert_eq!(told.load(Ordering::Relaxed), stuck, "{turns:?}");
            }
        }
        let never = WatchdogConfig { abort_after: 0, ..config };
        assert!(!is_hopeless(never, &[1_000]));
    }
}
