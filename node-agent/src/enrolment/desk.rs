//! Enrolment as a whole, which pauses while the agent hands over to another process.

use std::io;
use std::os::unix::net::UnixListener;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::runtime::Handle;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::discover;
use super::enroller::Enroller;
use super::server::Enrolment;
use crate::control::pods::WantedPods;
use crate::picture::Picture;
use crate::vital::Vital;

/// The tasks of enrolment. Requests that come while they pause wait in the socket's queue.
pub(crate) struct EnrolmentDesk {
    enrolment: Enrolment,
    enroller: Arc<Enroller>,
    /// What pods that run already are found by.
    known: (Arc<Picture>, watch::Receiver<Arc<WantedPods>>),
    listener: UnixListener,
    runtime: Handle,
    vital: Vital,
    running: Mutex<Option<Running>>,
}

#[derive(Debug)]
struct Running {
    stop: CancellationToken,
    tasks: JoinSet<()>,
}

impl std::fmt::Debug for EnrolmentDesk {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("EnrolmentDesk").finish_non_exhaustive()
    }
}

impl EnrolmentDesk {
    /// Enrolment behind `listener`; it begins with [`resume`](Self::resume).
    pub(crate) fn new(
        enrolment: Enrolment,
        enroller: Arc<Enroller>,
        known: (Arc<Picture>, watch::Receiver<Arc<WantedPods>>),
        listener: UnixListener,
        (runtime, vital): (Handle, Vital),
    ) -> io::Result<Self> {
        listener.set_nonblocking(true)?;
        let running = Mutex::default();
        Ok(Self { enrolment, enroller, known, listener, runtime, vital, running })
    }

    /// Serves requests and looks after the pods.
    pub(crate) fn resume(&self) {
        let listener = self.listener.try_clone().and_then(|listener| {
            let _runtime = self.runtime.enter();
            tokio::net::UnixListener::from_std(listener)
        });
        let stop = CancellationToken::new();
        let mut tasks = JoinSet::new();
        match listener {
            Ok(listener) => {
                let serving = self.enrolment.clone().serve(listener, stop.clone());
                let serving = self.vital.until(&stop, "enrolment requests", serving);
                tasks.spawn_on(serving, &self.runtime);
            }
            Err(error) => tracing::error!(%error, "enrolment cannot be served"),
        }
        let maintaining = self.enrolment.clone().maintain(stop.clone());
        let maintaining = self.vital.until(&stop, "enrolled pods", maintaining);
        tasks.spawn_on(maintaining, &self.runtime);
        let (picture, wanted) = self.known.clone();
        let looking = discover::run(self.enrolment.clone(), picture, wanted, stop.clone());
        tasks.spawn_on(self.vital.until(&stop, "running pods", looking), &self.runtime);
        *self.running.lock().unwrap_or_else(PoisonError::into_inner) =
            Some(Running { stop, tasks });
    }

    /// Finishes what is being enrolled, then stops, with the list of pods on disk.
    ///
    /// # Errors
    /// When the list cannot be written.
    pub(crate) async fn pause(&self) -> io::Result<()> {
        let running = self.running.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(Running { stop, mut tasks }) = running {
            stop.cancel();
            while let Some(ended) = tasks.join_next().await {
                ended.map_err(io::Error::other)?;
            }
        }
        let enroller = Arc::clone(&self.enroller);
        tokio::task::spawn_blocking(move || enroller.write_now()).await.map_err(io::Error::other)?
    }
}
