//! Ending in order: a signal asks everybody to finish, a second one does not wait.

use std::io;

use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

/// Tells parts of the process that it is to end; cheap to clone.
#[derive(Clone, Debug)]
pub struct Drain(watch::Receiver<bool>);

/// Begins the drain.
#[derive(Clone, Debug)]
pub struct DrainTrigger(watch::Sender<bool>);

impl Drain {
    /// A drain and what begins it.
    #[must_use]
    pub fn new() -> (DrainTrigger, Self) {
        let (trigger, drain) = watch::channel(false);
        (DrainTrigger(trigger), Self(drain))
    }

    /// Waits until the process is to end. Also when every trigger is gone, for then nobody is left to say so.
    pub async fn begun(&self) {
        let mut drain = self.0.clone();
        // An error means that the triggers are gone.
        if drain.wait_for(|begun| *begun).await.is_err() {
            tracing::debug!("drain begins, its triggers are gone");
        }
    }

    /// True once the process is to end.
    #[must_use]
    pub fn has_begun(&self) -> bool {
        *self.0.borrow()
    }
}

impl DrainTrigger {
    /// Begins the drain; again changes nothing.
    pub fn begin(&self) {
        self.0.send_replace(true);
    }

    /// Begins the drain at the first SIGTERM or SIGINT, and returns at the second: then the process should end at once.
    ///
    /// # Errors
    /// When the signals cannot be taken over.
    pub async fn begin_on_signals(&self) -> io::Result<()> {
        let mut terminate = signal(SignalKind::terminate())?;
        let mut interrupt = signal(SignalKind::interrupt())?;
        for _ in 0..2 {
            let name = tokio::select! {
                _ = terminate.recv() => "SIGTERM",
                _ = interrupt.recv() => "SIGINT",
            };
            tracing::info!(signal = name, again = self.has_begun(), "asked to end");
            self.begin();
        }
        Ok(())
    }

    fn has_begun(&self) -> bool {
        *self.0.borrow()
    }
}

#[cfg(test)]
mod tests {
    use nix::sys::signal::{Signal, raise};

    use super::*;

    fn runtime() -> tokio::runtime::Runtime {
        tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap()
    }

    #[test]
    fn everybody_hears_of_the_drain() {
        runtime().block_on(async {
            let (trigger, drain) = Drain::new();
            let other = drain.clone();
            assert!(!drain.has_begun());
            trigger.begin();
            drain.begun().await;
            other.begun().await;
            assert!(drain.has_begun());
        });
    }

    #[test]
    fn nobody_waits_for_a_trigger_that_is_gone() {
        runtime().block_on(async {
            let (trigger, drain) = Drain::new();
            drop(trigger);
            drain.begun().await;
        });
    }

    #[test]
    fn the_first_signal_drains_and_the_second_ends() {
        runtime().block_on(async {
            let (trigger, drain) = Drain::new();
            let signals = trigger.begin_on_signals();
            tokio::pin!(signals);
            // Polled once, so that the handlers are in place.
            tokio::select! {
                biased;
                result = &mut signals => panic!("ended without a signal: {result:?}"),
                () = std::future::ready(()) => {}
            }
            raise(Signal::SIGTERM).unwrap();
            tokio::select! {
                result = &mut signals => panic!("ended at the first signal: {result:?}"),
                () = drain.begun() => {}
            }
            raise(Signal::SIGTERM).unwrap();
            signals.await.unwrap();
        });
    }
}
