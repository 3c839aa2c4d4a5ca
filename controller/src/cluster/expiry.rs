//! An alert before the outage: the authority's certificate ends and nothing replaces it by itself.
//!
//! Intermediates are replaced long before their end, so this is about the root above them, or about an authority that
//! somebody else renews.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use jiff::Timestamp;
use k8s_openapi::api::core::v1::ObjectReference;
use kube::Client;
use tokio::time::Instant;
use tracing::warn;

use super::ObjectName;
use super::events::{Events, Warning};
use super::lease::Leadership;
use crate::ca::authority::Authority;

/// It is told again this long after the last time.
const REPEATED_AFTER: Duration = Duration::from_secs(24 * 3600);
/// Between looks.
const INTERVAL: Duration = Duration::from_secs(10);

/// Tells at the Secret of the authority while `leadership` is held, from `ahead` before the end on.
pub(crate) async fn tell(
    client: Client,
    identity: String,
    authority: Arc<Authority>,
    (secret, ahead): (ObjectName, Duration),
    leadership: Leadership,
) {
    let events = Events::new(client, identity);
    let mut told: Option<Instant> = None;
    let mut ticks = tokio::time::interval(INTERVAL);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let again = told.is_none_or(|told| told.elapsed() >= REPEATED_AFTER);
        let Some(note) = note(authority.ends_at(), ahead, SystemTime::now()) else { continue };
        if !again || !leadership.is_held() {
            continue;
        }
        let regarding = ObjectReference {
            api_version: Some("v1".to_owned()),
            kind: Some("Secret".to_owned()),
            namespace: Some(secret.namespace.clone()),
            name: Some(secret.name.clone()),
            ..ObjectReference::default()
        };
        let warning = Warning { regarding, reason: "AuthorityEnds", action: "Sign", note };
        match events.tell(warning).await {
            Ok(()) => told = Some(Instant::now()),
            Err(error) => warn!(%error, "the authority ends soon: the Event is not made"),
        }
    }
}

/// What is to be told at a moment; none while there is time.
fn note(ends_at: SystemTime, ahead: Duration, now: SystemTime) -> Option<String> {
    if ends_at > now + ahead {
        return None;
    }
    let end = Timestamp::try_from(ends_at).ok()?;
    let seconds = Timestamp::from_second(end.as_second()).unwrap_or(end);
    Some(format!(
        "the authority's certificate ends at {seconds}, and no certificate outlives it: rotate its root (culvert-controller ca rotate-root) or renew what is mounted"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_told_ahead() {
        const AHEAD: Duration = Duration::from_secs(30 * 24 * 3600);
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000);
        assert_eq!(note(now + AHEAD * 2, AHEAD, now), None);
        let told = note(now + AHEAD / 2, AHEAD, now).unwrap();
        assert!(told.contains("2027-01-30T08:00:00Z"), "{told}");
        assert!(note(now - AHEAD, AHEAD, now).is_some());
    }
}
