//! Issuers' keys, read from where rules say, kept, and read again in time.
//!
//! The waypoint reads them itself: it alone sees that a token names a key that it does not have, and who may write rules for a
//! namespace makes that namespace's waypoint ask, never the controller. What was read last stays in use while an issuer does not
//! answer; before anything was read, tokens of that issuer are refused.

mod fetch;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use arc_swap::ArcSwapOption;
use mesh_jwt::{KeyPlace, KeySet, Refresh, Wanted};
use mesh_telemetry::metric;
use serde_json::{Value, json};
use tokio::sync::{Notify, watch};
use tokio::task::JoinSet;

use self::fetch::Fetcher;
use crate::control::random;

pub(crate) use self::fetch::InvalidRoots;

/// Places that are read from at once; the others wait.
const MAX_READING: usize = 16;
/// Requests that wait for the same keys at once; the others are refused.
const MAX_WAITING: usize = 1_024;
/// With nothing to read.
const IDLE: Duration = Duration::from_secs(3_600);

/// The keys of one place.
pub(crate) struct RemoteKeys {
    place: KeyPlace,
    refresh: Mutex<Refresh>,
    keys: ArcSwapOption<KeySet>,
    /// Readings that have ended.
    read: watch::Sender<u64>,
    waiting: AtomicUsize,
    problem: Mutex<Option<String>>,
    wake: Arc<Notify>,
}

impl RemoteKeys {
    /// The keys that were read last; none before there are any.
    pub(crate) fn current(&self) -> Option<Arc<KeySet>> {
        self.keys.load_full()
    }

    /// Waits until the keys have been read once more, for the sake of a token that they do not judge. False when that is too soon
    /// after the last time, takes too long, or too many wait.
    pub(crate) async fn newer(&self) -> bool {
        let mut read = self.read.subscribe();
        match lock(&self.refresh).want(Instant::now()) {
            Wanted::TooSoon => return false,
            Wanted::Now => self.wake.notify_one(),
            Wanted::Underway => {}
        }
        let waiting = Waiting::new(&self.waiting);
        if waiting.before >= MAX_WAITING {
            return false;
        }
        let patience = self.place.timeout() + Duration::from_millis(500);
        matches!(tokio::time::timeout(patience, read.changed()).await, Ok(Ok(())))
    }

    fn dump(&self) -> Value {
        json!({
            "uri": self.place.uri(),
            "keys": self.current().map(|keys| keys.len()),
            "skipped": self.current().map(|keys| keys.skipped()),
            "problem": lock(&self.problem).clone(),
        })
    }
}

/// Counts one that waits.
struct Waiting<'w> {
    count: &'w AtomicUsize,
    before: usize,
}

impl<'w> Waiting<'w> {
    fn new(count: &'w AtomicUsize) -> Self {
        Self { count, before: count.fetch_add(1, Ordering::Relaxed) }
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.count.fetch_sub(1, Ordering::Relaxed);
    }
}

/// All places that rules name.
pub(crate) struct KeyStore {
    places: Mutex<BTreeMap<KeyPlace, Weak<RemoteKeys>>>,
    wake: Arc<Notify>,
    fetcher: Fetcher,
}

impl KeyStore {
    /// A store that trusts the web's authorities, and those of `roots_pem`.
    ///
    /// # Errors
    /// When `roots_pem` holds something else than certificates.
    pub(crate) fn new(roots_pem: Option<&str>) -> Result<Self, InvalidRoots> {
        let fetcher = Fetcher::new(roots_pem)?;
        Ok(Self { places: Mutex::default(), wake: Arc::default(), fetcher })
    }

    /// The keys of a place, which are read for as long as somebody holds them.
    pub(crate) fn at(&self, place: KeyPlace) -> Arc<RemoteKeys> {
        let mut places = lock(&self.places);
        if let Some(known) = places.get(&place).and_then(Weak::upgrade) {
            return known;
        }
        let new = Arc::new(RemoteKeys {
            place: place.clone(),
            refresh: Mutex::new(Refresh::new(Instant::now())),
            keys: ArcSwapOption::empty(),
            read: watch::Sender::new(0),
            waiting: AtomicUsize::new(0),
            problem: Mutex::default(),
            wake: Arc::clone(&self.wake),
        });
        places.insert(place, Arc::downgrade(&new));
        self.wake.notify_one();
        new
    }

    /// What is known of each place.
    pub(crate) fn dump(&self) -> Vec<Value> {
        lock(&self.places).values().filter_map(Weak::upgrade).map(|keys| keys.dump()).collect()
    }

    /// Reads keys for ever.
    pub(crate) async fn run(self: Arc<Self>) {
        let mut reading = JoinSet::new();
        loop {
            let (due, next) = self.due(Instant::now(), MAX_READING - reading.len());
            for keys in due {
                let store = Arc::clone(&self);
                reading.spawn(async move { store.read(&keys).await });
            }
            tokio::select! {
                () = self.wake.notified() => {}
                _ended = reading.join_next(), if !reading.is_empty() => {}
                () = tokio::time::sleep_until(next.into()) => {}
            }
        }
    }

    /// What is to be read now, up to `room`, and when to look again.
    fn due(&self, now: Instant, room: usize) -> (Vec<Arc<RemoteKeys>>, Instant) {
        let mut places = lock(&self.places);
        places.retain(|_, keys| keys.strong_count() > 0);
        let (mut due, mut next) = (Vec::new(), now + IDLE);
        for keys in places.values().filter_map(Weak::upgrade) {
            let mut refresh = lock(&keys.refresh);
            // With all places taken the next one that ends wakes this up.
            if due.len() < room && refresh.begin(now) {
                drop(refresh);
                due.push(keys);
            } else if let Some(at) = refresh.poll_timeout().filter(|at| *at > now) {
                next = next.min(at);
            }
        }
        (due, next)
    }

    async fn read(&self, keys: &RemoteKeys) {
        let place = &keys.place;
        let found = match tokio::time::timeout(place.timeout(), self.fetcher.read(place)).await {
            Ok(found) => found,
            Err(_elapsed) => Err(anyhow::anyhow!("no answer in {:?}", place.timeout())),
        };
        let problem = match found {
            Ok(set) => {
                tracing::debug!(
                    uri = place.uri(),
                    keys = set.len(),
                    skipped = set.skipped(),
                    "keys are read"
                );
                keys.keys.store(Some(Arc::new(set)));
                None
            }
            Err(error) => Some(format!("{error:#}")),
        };
        let outcome = if problem.is_none() { "read" } else { "failed" };
        metrics::counter!(metric::WAYPOINT_KEY_READS.name, "outcome" => outcome).increment(1);
        let before = std::mem::replace(&mut *lock(&keys.problem), problem.clone());
        match (&problem, before) {
            (Some(error), before) if before.as_ref() != Some(error) => {
                let kept = keys.current().is_some();
                tracing::warn!(
                    uri = place.uri(),
                    error,
                    kept,
                    "an issuer's keys cannot be read; trying again"
                );
            }
            (None, Some(_)) => tracing::info!(uri = place.uri(), "an issuer's keys are read again"),
            (Some(_) | None, _) => {}
        }
        #[expect(clippy::cast_possible_truncation, reason = "any part of a random number")]
        lock(&keys.refresh).finished(problem.is_none(), Instant::now(), random() as u32);
        keys.read.send_modify(|count| *count += 1);
    }
}

/// What is locked is whole whatever panics: each change is one assignment.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
