//! Connections to one place that many streams share: as many as they need, each opened once for all who wait for it.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use tokio::sync::watch;

use crate::refusal::Refusal;

/// Streams at once on one connection before another one is opened. A peer that allows fewer makes them wait.
/// Source: RFC 9113 §6.5.2 advises to allow no fewer.
const MAX_STREAMS: usize = 100;
/// Connections to one place; beyond, streams are shared out among them and wait for their turn.
const MAX_CONNECTIONS: usize = 64;

/// What streams are opened by.
pub(super) trait Sender: Clone + Send + 'static {
    /// Nothing can be sent any more.
    fn is_closed(&self) -> bool;
}

/// A connection that was opened.
pub(super) struct Opened<S> {
    pub(super) sender: S,
    /// When what the peer proved itself by ends: from then on it gets no new streams.
    pub(super) until: Option<SystemTime>,
}

/// The connections to one place.
pub(super) struct Bundle<S>(Mutex<Inner<S>>);

struct Inner<S> {
    open: Vec<Shared<S>>,
    /// The outcome of the one that is being opened.
    opening: Option<watch::Receiver<Option<Result<(), Refusal>>>>,
}

struct Shared<S> {
    sender: S,
    until: Option<SystemTime>,
    /// The identity it was opened under; grows.
    stamp: u64,
    usage: Arc<Usage>,
}

/// How much a connection is used.
struct Usage(Mutex<Used>);

struct Used {
    streams: usize,
    /// When the last stream began or ended.
    since: Instant,
    /// It was lent at least once.
    lent: bool,
}

/// A stream's place on a connection, given back when it is dropped.
pub(crate) struct Place(Arc<Usage>);

/// A connection that is lent for one stream.
pub(super) struct Lent<S> {
    pub(super) sender: S,
    pub(super) place: Place,
    /// Nobody used it before.
    pub(super) fresh: bool,
}

impl<S> Default for Bundle<S> {
    fn default() -> Self {
        Self(Mutex::new(Inner { open: Vec::new(), opening: None }))
    }
}

impl<S: Sender> Bundle<S> {
    /// Lends a connection under an identity not older than `stamp`; `open` opens one. All who wait for one that is being
    /// opened share its failure.
    pub(super) async fn lend<F, O>(
        self: &Arc<Self>,
        stamp: u64,
        open: F,
    ) -> Result<Lent<S>, Refusal>
    where
        F: Fn() -> O,
        O: Future<Output = Result<Opened<S>, Refusal>> + Send + 'static,
    {
        for _ in 0..MAX_CONNECTIONS {
            let mut opening = {
                let mut inner = self.lock();
                inner.open.retain(|one| one.is_usable(stamp));
                if let Some(lent) = inner.lend(MAX_STREAMS) {
                    return Ok(lent);
                }
                match &inner.opening {
                    Some(opening) => opening.clone(),
                    None => {
                        let (told, opening) = watch::channel(None);
                        inner.opening = Some(opening.clone());
                        // A task of its own: whoever asked first may go away, and others wait as well.
                        tokio::spawn(Self::opened(Arc::clone(self), stamp, open(), told));
                        opening
                    }
                }
            };
            let outcome = match opening.wait_for(Option::is_some).await {
                Ok(outcome) => outcome.clone(),
                Err(_closed) => None,
            };
            match outcome {
                Some(Ok(())) => {}
                Some(Err(refusal)) => {
                    // Those that are full are better than none.
                    return self.lock().lend(usize::MAX).ok_or(refusal);
                }
                None => return Err(Refusal::unavailable("internal", "nobody opens a connection")),
            }
        }
        self.lock().lend(usize::MAX).ok_or_else(closed)
    }

    async fn opened(
        bundle: Arc<Self>,
        stamp: u64,
        open: impl Future<Output = Result<Opened<S>, Refusal>>,
        told: watch::Sender<Option<Result<(), Refusal>>>,
    ) {
        let outcome = open.await;
        let mut inner = bundle.lock();
        inner.opening = None;
        let outcome = outcome.and_then(|Opened { sender, until }| {
            let used = Used { streams: 0, since: Instant::now(), lent: false };
            let usage = Arc::new(Usage(Mutex::new(used)));
            let one = Shared { sender, until, stamp, usage };
            if !one.is_usable(stamp) {
                return Err(closed());
            }
            inner.open.push(one);
            Ok(())
        });
        drop(inner);
        told.send_replace(Some(outcome));
    }

    /// Lends the connection of `place` to nobody any more.
    pub(super) fn retire(&self, place: &Place) {
        self.lock().open.retain(|one| !Arc::ptr_eq(&one.usage, &place.0));
    }

    /// Lets go of what is closed, and of what nobody has used for `idle`. False when nothing is left.
    pub(super) fn sweep(&self, idle: Duration) -> bool {
        let mut inner = self.lock();
        inner.open.retain(|one| {
            let used = one.usage.lock();
            !one.sender.is_closed() && (used.streams > 0 || used.since.elapsed() < idle)
        });
        !inner.open.is_empty() || inner.opening.is_some()
    }

    /// Number of connections.
    pub(super) fn len(&self) -> usize {
        self.lock().open.len()
    }

    fn lock(&self) -> MutexGuard<'_, Inner<S>> {
        // Each change leaves it whole.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn closed() -> Refusal {
    Refusal::unavailable("tunnel_closed", "the connection is closed again and again")
}

impl<S: Sender> Inner<S> {
    /// The one with fewest streams, if that is fewer than `most`, or if there may be no further one.
    fn lend(&self, most: usize) -> Option<Lent<S>> {
        let is_last = self.open.len() >= MAX_CONNECTIONS;
        let (streams, one) =
            self.open.iter().map(|one| (one.usage.lock().streams, one)).min_by_key(|(n, _)| *n)?;
        (streams < most || is_last).then(|| {
            let mut used = one.usage.lock();
            used.streams += 1;
            let fresh = !std::mem::replace(&mut used.lent, true);
            let place = Place(Arc::clone(&one.usage));
            Lent { sender: one.sender.clone(), place, fresh }
        })
    }
}

impl<S: Sender> Shared<S> {
    fn is_usable(&self, stamp: u64) -> bool {
        self.stamp >= stamp
            && !self.sender.is_closed()
            && self.until.is_none_or(|until| SystemTime::now() < until)
    }
}

impl Usage {
    fn lock(&self) -> MutexGuard<'_, Used> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut used = self.0.lock();
        used.streams -= 1;
        used.since = Instant::now();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

    use super::*;

    #[derive(Clone, Default)]
    struct Fake(Arc<AtomicBool>);

    impl Sender for Fake {
        fn is_closed(&self) -> bool {
            self.0.load(Ordering::Relaxed)
        }
    }

    struct Spot {
        bundle: Arc<Bundle<Fake>>,
        opened: Arc<AtomicUsize>,
    }

    impl Spot {
        fn new() -> Self {
            Self { bundle: Arc::default(), opened: Arc::default() }
        }

        async fn lend(
            &self,
            stamp: u64,
            outcome: Result<Option<SystemTime>, Refusal>,
        ) -> Result<Lent<Fake>, Refusal> {
            let open = || {
                let (opened, outcome) = (Arc::clone(&self.opened), outcome.clone());
                async move {
                    tokio::task::yield_now().await;
                    opened.fetch_add(1, Ordering::Relaxed);
                    outcome.map(|until| Opened { sender: Fake::default(), until })
                }
            };
            self.bundle.lend(stamp, open).await
        }

        fn opened(&self) -> usize {
            self.opened.load(Ordering::Relaxed)
        }
    }

    #[tokio::test]
    async fn another_connection_is_opened_where_streams_fill_one() {
        let spot = Spot::new();
        let mut lent = Vec::new();
        for number in 1..=2 * MAX_STREAMS + 1 {
            lent.push(spot.lend(1, Ok(None)).await.unwrap());
            assert_eq!(spot.opened(), number.div_ceil(MAX_STREAMS));
        }
        lent.clear();
        drop(spot.lend(1, Ok(None)).await.unwrap());
        assert_eq!(spot.opened(), 3);
        assert!(spot.bundle.sweep(Duration::from_secs(60)) && spot.bundle.len() == 3);
        let kept = spot.lend(1, Ok(None)).await.unwrap();
        assert!(spot.bundle.sweep(Duration::ZERO) && spot.bundle.len() == 1, "one is in use");
        drop(kept);
        assert!(!spot.bundle.sweep(Duration::ZERO));
    }

    #[tokio::test]
    async fn who_waits_for_one_connection_shares_its_failure() {
        let spot = Spot::new();
        let refusal = Refusal::unavailable("connect_failed", "");
        let one = || spot.lend(1, Err(refusal.clone()));
        let (a, b, c) = tokio::join!(one(), one(), one());
        assert!([a, b, c].iter().all(|one| one.as_ref().err() == Some(&refusal)));
        assert_eq!(spot.opened(), 1);
        assert!(one().await.is_err());
        assert_eq!(spot.opened(), 2, "the next one tries anew");
    }

    #[tokio::test]
    async fn closed_outdated_and_expired_connections_are_lent_to_nobody() {
        let spot = Spot::new();
        let first = spot.lend(1, Ok(None)).await.unwrap();
        assert!(first.fresh);
        first.sender.0.store(true, Ordering::Relaxed);
        drop(spot.lend(1, Ok(None)).await.unwrap());
        assert_eq!(spot.opened(), 2);
        drop(spot.lend(2, Ok(None)).await.unwrap());
        assert_eq!(spot.opened(), 3, "of an identity that is older");
        drop(spot.lend(1, Ok(None)).await.unwrap());
        assert_eq!(spot.opened(), 3, "a newer one does");
        let past = SystemTime::now() - Duration::from_secs(1);
        let short = Spot::new();
        let soon = SystemTime::now() + Duration::from_millis(50);
        drop(short.lend(1, Ok(Some(soon))).await.unwrap());
        std::thread::sleep(Duration::from_millis(60));
        drop(short.lend(1, Ok(None)).await.unwrap());
        assert_eq!(short.opened(), 2, "a certificate that has ended");
        let retired = short.lend(1, Ok(None)).await.unwrap();
        short.bundle.retire(&retired.place);
        assert_eq!(short.bundle.len(), 0);
        // One that has ended before it was opened is no reason to open it for ever.
        let ended = Spot::new();
        assert!(ended.lend(1, Ok(Some(past))).await.is_err());
        assert_eq!(ended.opened(), 1);
    }
}
