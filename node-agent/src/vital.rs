//! Tasks without which the agent is deaf: when one of them ends early, so does the agent.
//!
//! Capture stays in the kernel and refuses new connections, and a supervisor starts another agent. That is better than
//! one that says it is ready and hears nothing.

use std::future::Future;

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

/// A task ended while the agent was to run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "the agent's part {name:?} has ended, which it must not; what the log says before this is why"
)]
pub(crate) struct EndedEarly {
    /// Which.
    pub(crate) name: &'static str,
}

/// Makes futures tell when they end early; cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct Vital(watch::Sender<Option<EndedEarly>>);

/// Hears of it.
#[derive(Debug)]
pub(crate) struct FirstEnd(watch::Receiver<Option<EndedEarly>>);

impl Vital {
    /// Something to wrap tasks with, and what hears of the first one that ends early.
    pub(crate) fn new() -> (Self, FirstEnd) {
        let (tell, hear) = watch::channel(None);
        (Self(tell), FirstEnd(hear))
    }

    /// `work`, which may end only after `stop`.
    pub(crate) fn until<F: Future<Output = ()>>(
        &self,
        stop: &CancellationToken,
        name: &'static str,
        work: F,
    ) -> impl Future<Output = ()> + use<F> {
        // Made here and not in the task: one that is dropped before it began ends early as well.
        let watch = Watch { tell: self.0.clone(), name, may_end: Some(stop.clone()) };
        async move {
            let _watch = watch;
            work.await;
        }
    }

    /// `work`, which may be done at any time but not panic.
    pub(crate) fn once<F: Future<Output = ()>>(
        &self,
        name: &'static str,
        work: F,
    ) -> impl Future<Output = ()> + use<F> {
        let watch = Watch { tell: self.0.clone(), name, may_end: None };
        async move {
            let _watch = watch;
            work.await;
        }
    }
}

impl FirstEnd {
    /// Waits for the first task that ends early.
    pub(crate) async fn told(&mut self) -> EndedEarly {
        match self.0.wait_for(Option::is_some).await.map(|ended| *ended) {
            Ok(Some(ended)) => ended,
            // Nobody is left to tell.
            Ok(None) | Err(_) => std::future::pending().await,
        }
    }
}

/// Tells when it is dropped: at the task's end, at its panic, or when it is thrown away.
struct Watch {
    tell: watch::Sender<Option<EndedEarly>>,
    name: &'static str,
    /// None: at any time.
    may_end: Option<CancellationToken>,
}

impl Drop for Watch {
    fn drop(&mut self) {
        let is_early = self.may_end.as_ref().is_some_and(|stop| !stop.is_cancelled());
        if !is_early && !std::thread::panicking() {
            return;
        }
        let name = self.name;
        self.tell.send_if_modified(|first| {
            let is_first = first.is_none();
            first.get_or_insert(EndedEarly { name });
            is_first
        });
    }
}

#[cfg(test)]
mod tests {
    use std::future::pending;

    use futures_util::FutureExt as _;
    use tokio::task::JoinSet;

    use super::*;

    #[tokio::test]
    async fn a_task_that_panics_is_told_by_name() {
        let (vital, mut first) = Vital::new();
        let stop = CancellationToken::new();
        let mut tasks = JoinSet::new();
        tasks.spawn(vital.until(&stop, "deaf", async { panic!("on purpose") }));
        tasks.spawn(vital.until(&stop, "well", pending()));
        assert_eq!(first.told().await, EndedEarly { name: "deaf" });
    }

    #[tokio::test]
    async fn a_task_that_merely_ends_is_told_and_only_the_first() {
        let (vital, mut first) = Vital::new();
        let stop = CancellationToken::new();
        vital.until(&stop, "one", async {}).await;
        vital.until(&stop, "two", async {}).await;
        assert_eq!(first.told().await, EndedEarly { name: "one" });
    }

    #[tokio::test]
    async fn who_is_told_to_stop_and_who_is_done_may_end() {
        let (vital, mut first) = Vital::new();
        let stop = CancellationToken::new();
        let mut tasks = JoinSet::new();
        tasks.spawn(vital.until(&stop, "stops", stop.clone().cancelled_owned()));
        tasks.spawn(vital.until(&stop, "is aborted", pending()));
        tasks.spawn(vital.once("is done", async {}));
        stop.cancel();
        tasks.shutdown().await;
        assert_eq!(first.told().now_or_never(), None);
        tasks.spawn(vital.once("is not", async { panic!("on purpose") }));
        assert_eq!(first.told().await, EndedEarly { name: "is not" });
    }
}
