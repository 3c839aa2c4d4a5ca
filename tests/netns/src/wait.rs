//! Waiting for conditions, never for time.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use anyhow::bail;

static INTERRUPTED: OnceLock<Arc<AtomicBool>> = OnceLock::new();

/// A flag that ends every wait of this program once it is set; a signal handler can set it.
pub fn interruption() -> Arc<AtomicBool> {
    Arc::clone(INTERRUPTED.get_or_init(Arc::default))
}

/// True once the flag is set.
#[must_use]
pub fn is_interrupted() -> bool {
    INTERRUPTED.get().is_some_and(|flag| flag.load(Ordering::Relaxed))
}

/// How long most things of the lab may take before they count as broken: far longer than they take on a slow and busy
/// machine. Costs nothing but when something is broken.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Calls `condition` until it gives `Some`, at most `limit` long.
///
/// # Errors
/// When the time is up, or [`interruption`] is set; `what` names what was waited for, and the last error is part of the message.
pub fn until<T>(
    what: &str,
    limit: Duration,
    mut condition: impl FnMut() -> anyhow::Result<Option<T>>,
) -> anyhow::Result<T> {
    let started = Instant::now();
    let mut pause = Duration::from_millis(5);
    loop {
        if is_interrupted() {
            bail!("interrupted while waiting for {what}");
        }
        let outcome = condition();
        if let Ok(Some(value)) = outcome {
            return Ok(value);
        }
        if started.elapsed() >= limit {
            match outcome {
                Ok(_) => bail!("not within {limit:?}: {what}"),
                Err(error) => bail!("not within {limit:?}: {what}: {error:#}"),
            }
        }
        std::thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(100));
    }
}
