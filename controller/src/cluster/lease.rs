//! Which of several controllers writes: the one that holds a Lease.
//!
//! A holder renews it every two seconds and stops believing in itself ten seconds after the last renewal that succeeded;
//! others take it when it has not changed for fifteen, by their own clocks. So two never write at once, whatever the clocks
//! of their nodes say; writes carry a resource version all the same. Times as in Kubernetes' own components (client-go).

use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use kube::api::PostParams;
use kube::{Api, Client};
use mesh_runtime::Drain;
use tokio::sync::watch;
use tokio::time::Instant;
use tracing::{info, warn};

use super::{ObjectName, refusal};

/// How long others leave the Lease alone after they have seen it change, seconds.
const LEASE_SECONDS: i32 = 15;
/// How long a holder believes in itself after its last renewal.
const BELIEVED_FOR: Duration = Duration::from_secs(10);
/// Between tries.
const INTERVAL: Duration = Duration::from_secs(2);
/// Longest try.
const PATIENCE: Duration = Duration::from_secs(5);

/// Whether this controller writes.
#[derive(Clone, Debug)]
pub struct Leadership(watch::Receiver<Option<Instant>>);

impl Leadership {
    /// True while it does.
    #[must_use]
    pub fn is_held(&self) -> bool {
        self.is_held_at(Instant::now())
    }

    fn is_held_at(&self, now: Instant) -> bool {
        self.0.borrow().is_some_and(|until| now < until)
    }
}

/// A candidate for the Lease.
#[derive(Debug)]
pub struct Election {
    leases: Api<Lease>,
    name: String,
    identity: String,
    /// What the Lease said last, and since when.
    seen: Option<(Said, Instant)>,
    until: watch::Sender<Option<Instant>>,
}

/// What shows that a holder is alive.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Said {
    holder: Option<String>,
    renewed: Option<MicroTime>,
}

#[derive(Debug, PartialEq, Eq)]
enum Step {
    Create,
    Renew,
    Take,
    Wait,
}

impl Election {
    /// A candidate named `identity`, which must be no other's.
    #[must_use]
    pub fn new(client: &Client, name: &ObjectName, identity: String) -> (Self, Leadership) {
        let (until, told) = watch::channel(None);
        let leases = Api::namespaced(client.clone(), &name.namespace);
        let election = Self { leases, name: name.name.clone(), identity, seen: None, until };
        (election, Leadership(told))
    }

    /// Stands for election until `drain` begins, and then leaves the Lease to others at once.
    pub async fn run(mut self, drain: Drain) {
        let mut ticks = tokio::time::interval(INTERVAL);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut held = false;
        loop {
            tokio::select! {
                _ = ticks.tick() => {}
                () = drain.begun() => break,
            }
            // A renewal counts from its beginning: that is the latest time at which it may have been written.
            self.attempt(Instant::now()).await;
            let holds = self.until.borrow().is_some_and(|until| Instant::now() < until);
            if holds != held {
                info!(lease = self.name, leader = holds, "leadership changed");
                metrics::gauge!(mesh_telemetry::metric::CONTROLLER_LEADER.name).set(if holds {
                    1.0
                } else {
                    0.0
                });
                held = holds;
            }
        }
        if held && let Err(error) = self.resign().await {
            warn!(lease = self.name, %error, "the Lease is not given back; others wait until it is over");
        }
    }

    async fn attempt(&mut self, began: Instant) {
        match tokio::time::timeout(PATIENCE, self.stand(began)).await {
            Ok(Ok(true)) => {
                self.until.send_replace(Some(began + BELIEVED_FOR));
            }
            Ok(Ok(false)) => {
                self.until.send_replace(None);
            }
            Ok(Err(error)) => {
                warn!(lease = self.name, %error, "the Lease cannot be read or written")
            }
            Err(_elapsed) => {
                warn!(lease = self.name, "the API server does not answer about the Lease")
            }
        }
    }

    /// Holds the Lease afterwards?
    async fn stand(&mut self, now: Instant) -> kube::Result<bool> {
        let found = self.leases.get_opt(&self.name).await?;
        let spec = found.as_ref().and_then(|lease| lease.spec.clone()).unwrap_or_default();
        let said = Said { holder: spec.holder_identity.clone(), renewed: spec.renew_time.clone() };
        if self.seen.as_ref().is_none_or(|(last, _)| *last != said) {
            self.seen = Some((said, now));
        }
        let still_for = self.seen.as_ref().map(|(_, since)| now.duration_since(*since));
        let step = match &found {
            None => Step::Create,
            Some(_) => step(&spec, &self.identity, still_for.unwrap_or_default()),
        };
        let moment = MicroTime(Timestamp::now());
        let mut lease = found.unwrap_or_default();
        lease.metadata.name = Some(self.name.clone());
        let changes = spec.lease_transitions.unwrap_or(0);
        lease.spec = Some(LeaseSpec {
            holder_identity: Some(self.identity.clone()),
            lease_duration_seconds: Some(LEASE_SECONDS),
            renew_time: Some(moment.clone()),
            acquire_time: match step {
                Step::Renew => spec.acquire_time.clone(),
                Step::Create | Step::Take | Step::Wait => Some(moment),
            },
            lease_transitions: Some(if step == Step::Take { changes + 1 } else { changes }),
            ..spec
        });
        let params = PostParams::default();
        let written = match step {
            Step::Wait => return Ok(false),
            Step::Create => self.leases.create(&params, &lease).await,
            Step::Renew | Step::Take => self.leases.replace(&self.name, &params, &lease).await,
        };
        match written {
            Ok(_written) => Ok(true),
            // Another was first.
            Err(error) if refusal(&error) == Some(409) => Ok(false),
            Err(error) => Err(error),
        }
    }

    async fn resign(&self) -> kube::Result<()> {
        self.until.send_replace(None);
        let Some(mut lease) = self.leases.get_opt(&self.name).await? else { return Ok(()) };
        if let Some(spec) = &mut lease.spec
            && spec.holder_identity.as_deref() == Some(&self.identity)
        {
            spec.holder_identity = None;
            self.leases.replace(&self.name, &PostParams::default(), &lease).await?;
        }
        Ok(())
    }
}

/// What to do about a Lease that has been as it is for so long.
fn step(spec: &LeaseSpec, identity: &str, still_for: Duration) -> Step {
    let seconds = u64::try_from(spec.lease_duration_seconds.unwrap_or(LEASE_SECONDS)).unwrap_or(0);
    match spec.holder_identity.as_deref() {
        Some(holder) if holder == identity => Step::Renew,
        None | Some("") => Step::Take,
        Some(_) if still_for > Duration::from_secs(seconds) => Step::Take,
        Some(_) => Step::Wait,
    }
}

#[cfg(test)]
mod tests {
    use super::super::fake_api::FakeApi;
    use super::*;

    const PATH: &str = "/apis/coordination.k8s.io/v1/namespaces/mesh/leases/controller";

    fn candidate(api: &FakeApi, identity: &str) -> (Election, Leadership) {
        Election::new(&api.client(), &"mesh/controller".parse().unwrap(), identity.to_owned())
    }

    fn holder(api: &FakeApi) -> Option<String> {
        api.get(PATH)?["spec"]["holderIdentity"].as_str().map(str::to_owned)
    }

    #[tokio::test]
    async fn one_leads_until_it_is_silent_for_long_enough() {
        let api = FakeApi::default();
        let ((mut one, first), (mut two, second)) =
            (candidate(&api, "one"), candidate(&api, "two"));
        let mut now = Instant::now();
        for _ in 0..30 {
            one.attempt(now).await;
            two.attempt(now).await;
            now += INTERVAL;
            assert!(first.is_held_at(now) && !second.is_held_at(now), "who renews keeps it");
        }
        // It falls silent: at no time do both lead.
        let mut unled = 0;
        for _ in 0..10 {
            two.attempt(now).await;
            let (one, two) = (first.is_held_at(now), second.is_held_at(now));
            assert!(!(one && two));
            unled += u32::from(!one && !two);
            now += INTERVAL;
        }
        assert!(second.is_held_at(now) && unled > 0);
        assert_eq!(holder(&api).as_deref(), Some("two"));
        one.attempt(now).await;
        assert!(!first.is_held_at(now), "it finds the other one there");
        two.resign().await.unwrap();
        assert!(!second.is_held_at(now));
        one.attempt(now).await;
        assert!(first.is_held_at(now), "a Lease that was given back is taken at once");
        assert_eq!(api.get(PATH).unwrap()["spec"]["leaseTransitions"], 2);
    }

    #[tokio::test]
    async fn of_two_that_take_it_at_once_one_gets_it() {
        let api = FakeApi::default();
        let (mut one, first) = candidate(&api, "one");
        let other = serde_json::json!({
            "apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": {"name": "controller"},
            "spec": {"holderIdentity": "two", "leaseDurationSeconds": 15},
        });
        api.meddle(PATH, other);
        one.attempt(Instant::now()).await;
        assert!(!first.is_held());
        assert_eq!(holder(&api).as_deref(), Some("two"));
    }
}
