//! When to ask the CA for which certificate.
//!
//! ```text
//!            want            a slot is free            issued
//! (unknown) ─────► Due ───────────────────► InFlight ─────────► Held ──┐
//!                   ▲                          │ failed                │ half its life is over
//!                   └───── backoff is over ────┴───────────────────────┘
//! ```
//! One request per identity at a time, [`MAX_IN_FLIGHT`] in all, the most urgent first. A certificate in use is never
//! given up for a failed renewal. Deadlines are monotonic: a wall clock set back postpones none of them. One that ran
//! ahead (set forward, or the machine slept while its monotonic clock stood) renews what is due by it, once: an answer
//! that looks old already is not asked for again at once.

use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant, SystemTime};

use mesh_model::{SpiffeId, splitmix};

/// Most requests under way. Source: ztunnel asks for 8 at once.
pub const MAX_IN_FLIGHT: usize = 8;
/// First wait after a failure.
const FIRST_BACKOFF: Duration = Duration::from_secs(1);
/// Longest wait after a failure. Source: ztunnel's cap.
const MAX_BACKOFF: Duration = Duration::from_secs(150);
/// Shortest time between an answer and the next request for the same identity, whatever the clocks say.
const MIN_RENEWAL: Duration = Duration::from_secs(30);
/// Renewals of certificates that peers refuse are spread over so long: a revoked issuer has signed those of many nodes.
const REJECTED_SPREAD: Duration = Duration::from_secs(1);
/// Longest time between two looks at the wall clock while certificates are held.
const LONGEST_UNWATCHED: Duration = Duration::from_secs(60);

/// How urgent a certificate is; least first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Urgency {
    /// There is a valid one still.
    Renewal,
    /// A pod of that identity is here, nobody waits; or peers refuse the one there is.
    Prefetch,
    /// A connection waits.
    Waiting,
}

/// What happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RotationInput {
    /// A certificate is needed, or more urgently than before.
    Want {
        /// Whose.
        id: SpiffeId,
        /// How urgently.
        urgency: Urgency,
    },
    /// The last pod of that identity has left.
    Forget {
        /// Whose.
        id: SpiffeId,
    },
    /// The request was answered with a certificate that was found in order.
    Issued {
        /// Whose.
        id: SpiffeId,
        /// Its first moment.
        not_before: SystemTime,
        /// Its last moment.
        not_after: SystemTime,
    },
    /// The request failed, or its answer was refused. Each request ends in this or in `Issued`, within the time limit
    /// that the shell sets.
    Failed {
        /// Whose.
        id: SpiffeId,
    },
    /// Peers refuse the certificate in use, which was revoked or whose issuer was; another is due at once.
    Rejected {
        /// Whose.
        id: SpiffeId,
    },
    /// What signed the certificates in use is no longer good; all are renewed, as slots allow.
    RenewAll,
    /// The time that [`RotationCore::poll_timeout`] named has come.
    Tick,
}

/// What the shell must do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RotationCommand {
    /// Make a key and ask the CA.
    Request {
        /// For whom.
        id: SpiffeId,
    },
    /// Use the certificate that was just issued from now on.
    Install {
        /// Whose.
        id: SpiffeId,
    },
    /// Wipe certificate and key; also one just issued that nobody wants any more.
    Discard {
        /// Whose.
        id: SpiffeId,
    },
}

/// The time by both clocks.
#[derive(Clone, Copy, Debug)]
pub struct Now {
    /// Wall clock; may jump.
    pub wall: SystemTime,
    /// Monotonic clock.
    pub monotonic: Instant,
}

/// Decides when to ask for which certificate; see the module's picture.
#[derive(Debug)]
pub struct RotationCore {
    entries: BTreeMap<SpiffeId, Entry>,
    commands: VecDeque<RotationCommand>,
    in_flight: usize,
    jitter: SplitMix,
    /// When the wall clock was last compared with what is due by it.
    looked_at: Option<Instant>,
}

#[derive(Debug)]
struct Entry {
    phase: Phase,
    urgency: Urgency,
    /// False once forgotten, while its request is still under way.
    wanted: bool,
    failures: u32,
    held: Option<HeldCertificate>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// To be asked for at this moment or later.
    Due(Instant),
    InFlight,
}

#[derive(Clone, Copy, Debug)]
struct HeldCertificate {
    not_after: SystemTime,
    /// When it is to be renewed, by the wall clock as it was at its issue.
    renew_at: SystemTime,
    /// Not before this, whatever the wall clock says.
    soonest: Instant,
}

impl RotationCore {
    /// A core with nothing to do. `seed` spreads renewals and retries; take it from a random source.
    #[must_use]
    pub const fn new(seed: u64) -> Self {
        Self {
            entries: BTreeMap::new(),
            commands: VecDeque::new(),
            in_flight: 0,
            jitter: SplitMix(seed),
            looked_at: None,
        }
    }

    /// Feeds one event. Drain [`poll_command`](Self::poll_command) to `None` before the next one.
    pub fn handle(&mut self, input: RotationInput, now: Now) {
        match input {
            RotationInput::Want { id, urgency } => self.want(id, urgency, now),
            RotationInput::Forget { id } => self.forget(&id),
            RotationInput::Issued { id, not_before, not_after } => {
                self.issued(id, not_before, not_after, now);
            }
            RotationInput::Failed { id } => self.failed(&id, now),
            RotationInput::Rejected { id } => self.rejected(&id, now),
            RotationInput::RenewAll => self.renew_all(now),
            RotationInput::Tick => {}
        }
        self.catch_up(now);
        self.dispatch(now);
    }

    /// What the shell must do next.
    pub fn poll_command(&mut self) -> Option<RotationCommand> {
        self.commands.pop_front()
    }

    /// When to feed [`RotationInput::Tick`], if nothing else happens.
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Instant> {
        // With all slots taken, the next thing to happen is an answer.
        if self.in_flight >= MAX_IN_FLIGHT {
            return None;
        }
        let due = self.entries.values().filter_map(Entry::due).min()?;
        let look = self.looked_at.map(|looked_at| looked_at + LONGEST_UNWATCHED);
        let holds_any = self.entries.values().any(|entry| entry.held.is_some());
        Some(look.filter(|_| holds_any).map_or(due, |look| due.min(look)))
    }

    /// True when `id` has a certificate that is valid by the wall clock.
    #[must_use]
    pub fn is_valid(&self, id: &SpiffeId, now: SystemTime) -> bool {
        self.entries.get(id).and_then(|entry| entry.held).is_some_and(|held| now < held.not_after)
    }

    /// Identities that are wanted, in order.
    pub fn wanted(&self) -> impl Iterator<Item = &SpiffeId> {
        self.entries.iter().filter(|(_, entry)| entry.wanted).map(|(id, _)| id)
    }

    /// Requests under way.
    #[must_use]
    pub const fn in_flight(&self) -> usize {
        self.in_flight
    }

    fn want(&mut self, id: SpiffeId, urgency: Urgency, now: Now) {
        let entry = self.entries.entry(id).or_insert_with(|| Entry {
            phase: Phase::Due(now.monotonic),
            urgency,
            wanted: true,
            failures: 0,
            held: None,
        });
        entry.wanted = true;
        // A certificate in hand serves whoever waits, and a retry comes no sooner for being wanted more.
        let valid = entry.held.is_some_and(|held| now.wall < held.not_after);
        if !valid {
            entry.urgency = entry.urgency.max(urgency);
        }
    }

    fn forget(&mut self, id: &SpiffeId) {
        let Some(entry) = self.entries.get_mut(id) else { return };
        if entry.wanted && entry.held.take().is_some() {
            self.commands.push_back(RotationCommand::Discard { id: id.clone() });
        }
        entry.wanted = false;
        if entry.phase != Phase::InFlight {
            self.entries.remove(id);
        }
    }

    fn issued(&mut self, id: SpiffeId, not_before: SystemTime, not_after: SystemTime, now: Now) {
        let Some(entry) = self.entries.get_mut(&id).filter(|entry| entry.phase == Phase::InFlight)
        else {
            self.commands.push_back(RotationCommand::Discard { id });
            return;
        };
        self.in_flight -= 1;
        if !entry.wanted {
            self.entries.remove(&id);
            self.commands.push_back(RotationCommand::Discard { id });
            return;
        }
        let lifetime = not_after.duration_since(not_before).unwrap_or_default();
        let age = now.wall.duration_since(not_before).unwrap_or_default();
        // Up to a tenth of the life early, so that a node's certificates do not all renew at once.
        let half = lifetime / 2 - self.jitter.part_of(lifetime / 10);
        let soonest = MIN_RENEWAL.min(half).max(Duration::from_secs(1));
        let wait = half.saturating_sub(age).max(soonest);
        entry.phase = Phase::Due(now.monotonic + wait);
        entry.urgency = Urgency::Renewal;
        entry.failures = 0;
        entry.held = Some(HeldCertificate {
            not_after,
            renew_at: now.wall + wait,
            soonest: now.monotonic + soonest,
        });
        self.commands.push_back(RotationCommand::Install { id });
    }

    fn failed(&mut self, id: &SpiffeId, now: Now) {
        let Some(entry) = self.entries.get_mut(id).filter(|entry| entry.phase == Phase::InFlight)
        else {
            return;
        };
        self.in_flight -= 1;
        if !entry.wanted {
            self.entries.remove(id);
            return;
        }
        let doubled = FIRST_BACKOFF * 2u32.saturating_pow(entry.failures.min(16));
        let backoff = doubled.min(MAX_BACKOFF);
        entry.failures = entry.failures.saturating_add(1);
        let mut wait = backoff - self.jitter.part_of(backoff / 5);
        // Try once more right before the present one ends.
        if let Some(held) = entry.held
            && let Ok(left) = held.not_after.duration_since(now.wall)
            && left > FIRST_BACKOFF
        {
            wait = wait.min(left);
        }
        entry.phase = Phase::Due(now.monotonic + wait);
    }

    fn rejected(&mut self, id: &SpiffeId, now: Now) {
        let Some(entry) = self.entries.get_mut(id).filter(|entry| entry.held.is_some()) else {
            return;
        };
        // One request is enough, and what failed waits for its backoff.
        if let Phase::Due(due) = entry.phase
            && entry.failures == 0
        {
            let soon = now.monotonic + self.jitter.part_of(REJECTED_SPREAD);
            entry.phase = Phase::Due(due.min(soon));
            entry.urgency = entry.urgency.max(Urgency::Prefetch);
        }
    }

    fn renew_all(&mut self, now: Now) {
        for entry in self.entries.values_mut().filter(|entry| entry.held.is_some()) {
            if entry.phase != Phase::InFlight && entry.failures == 0 {
                entry.phase = Phase::Due(now.monotonic);
            }
        }
    }

    /// Makes due what is due by the wall clock only: it ran ahead of the monotonic one since the issue. What failed
    /// waits for its backoff.
    fn catch_up(&mut self, now: Now) {
        self.looked_at = Some(now.monotonic);
        for entry in self.entries.values_mut().filter(|entry| entry.failures == 0) {
            if let (Phase::Due(due), Some(held)) = (entry.phase, entry.held)
                && due > now.monotonic
                && held.renew_at <= now.wall
            {
                entry.phase = Phase::Due(due.min(held.soonest.max(now.monotonic)));
            }
        }
    }

    /// Fills free slots with what is due, the most urgent and longest due first.
    fn dispatch(&mut self, now: Now) {
        while self.in_flight < MAX_IN_FLIGHT {
            let next = self
                .entries
                .iter()
                .filter_map(|(id, entry)| {
                    let due = entry.due().filter(|due| *due <= now.monotonic)?;
                    Some((std::cmp::Reverse(entry.urgency), due, id))
                })
                .min()
                .map(|(_, _, id)| id.clone());
            let Some(id) = next else { return };
            let Some(entry) = self.entries.get_mut(&id) else { return };
            entry.phase = Phase::InFlight;
            self.in_flight += 1;
            self.commands.push_back(RotationCommand::Request { id });
        }
    }
}

impl Entry {
    const fn due(&self) -> Option<Instant> {
        match self.phase {
            Phase::Due(due) => Some(due),
            Phase::InFlight => None,
        }
    }
}

/// A small generator for jitter.
#[derive(Debug)]
struct SplitMix(u64);

impl SplitMix {
    fn next(&mut self) -> u64 {
        splitmix::next(&mut self.0)
    }

    /// Between nothing and all of `span`.
    fn part_of(&mut self, span: Duration) -> Duration {
        let part = u32::try_from(self.next() >> 32).unwrap_or(u32::MAX);
        span.mul_f64(f64::from(part) / f64::from(u32::MAX))
    }
}

#[cfg(test)]
mod simulation;
#[cfg(test)]
mod tests {
    use super::*;

    const TTL: Duration = Duration::from_secs(3600);

    pub(super) fn id(n: usize) -> SpiffeId {
        SpiffeId::new("cluster.local", "shop", &format!("sa-{n}")).unwrap()
    }

    pub(super) fn at(start: Instant, seconds: u64) -> Now {
        let elapsed = Duration::from_secs(seconds);
        Now {
            wall: SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000) + elapsed,
            monotonic: start + elapsed,
        }
    }

    fn requests(core: &mut RotationCore) -> Vec<SpiffeId> {
        std::iter::from_fn(|| core.poll_command())
            .filter_map(|command| match command {
                RotationCommand::Request { id } => Some(id),
                RotationCommand::Install { .. } | RotationCommand::Discard { .. } => None,
            })
            .collect()
    }

    /// One origin for all; only differences matter.
    #[expect(clippy::disallowed_methods, reason = "an Instant has no other origin")]
    pub(super) fn origin() -> Instant {
        Instant::now()
    }

    #[test]
    fn the_urgent_come_first_and_eight_at_once() {
        let (start, mut core) = (origin(), RotationCore::new(1));
        for n in 0..10 {
            core.handle(
                RotationInput::Want { id: id(n), urgency: Urgency::Prefetch },
                at(start, 0),
            );
        }
        assert_eq!(requests(&mut core).len(), MAX_IN_FLIGHT);
        core.handle(RotationInput::Want { id: id(9), urgency: Urgency::Waiting }, at(start, 1));
        assert!(requests(&mut core).is_empty());
        core.handle(RotationInput::Failed { id: id(0) }, at(start, 1));
        assert_eq!(requests(&mut core), [id(9)]);
    }

    #[test]
    fn a_forgotten_identity_is_discarded_even_if_its_answer_is_late() {
        let (start, mut core) = (origin(), RotationCore::new(1));
        core.handle(RotationInput::Want { id: id(0), urgency: Urgency::Waiting }, at(start, 0));
        assert_eq!(requests(&mut core), [id(0)]);
        core.handle(RotationInput::Forget { id: id(0) }, at(start, 1));
        let now = at(start, 2);
        core.handle(
            RotationInput::Issued { id: id(0), not_before: now.wall, not_after: now.wall + TTL },
            now,
        );
        assert_eq!(core.poll_command(), Some(RotationCommand::Discard { id: id(0) }));
        assert_eq!((core.poll_command(), core.poll_timeout(), core.in_flight()), (None, None, 0));
    }

    #[test]
    fn a_rejected_certificate_is_renewed_within_a_second_by_one_request() {
        let (start, mut core) = (origin(), RotationCore::new(1));
        core.handle(RotationInput::Rejected { id: id(0) }, at(start, 0));
        assert!(core.poll_timeout().is_none(), "nobody holds it");
        for n in 0..2 {
            let want = RotationInput::Want { id: id(n), urgency: Urgency::Waiting };
            core.handle(want, at(start, 0));
        }
        assert_eq!(requests(&mut core).len(), 2);
        for n in 0..2 {
            let not_before = at(start, 0).wall;
            let issued =
                RotationInput::Issued { id: id(n), not_before, not_after: not_before + TTL };
            core.handle(issued, at(start, 0));
        }
        core.handle(RotationInput::Rejected { id: id(0) }, at(start, 1));
        assert!(core.poll_timeout().unwrap() <= start + Duration::from_secs(2));
        core.handle(RotationInput::Tick, at(start, 2));
        assert_eq!(requests(&mut core), [id(0)], "the other one is good");
        core.handle(RotationInput::Rejected { id: id(0) }, at(start, 2));
        core.handle(RotationInput::Tick, at(start, 4));
        assert!(requests(&mut core).is_empty(), "one is under way");
        // Being refused more often brings no retry forward.
        core.handle(RotationInput::Failed { id: id(0) }, at(start, 4));
        let retry = core.poll_timeout().unwrap();
        core.handle(RotationInput::Rejected { id: id(0) }, at(start, 4));
        assert_eq!(core.poll_timeout().unwrap(), retry);
    }

    /// A machine that slept: its monotonic clock stood still meanwhile.
    #[test]
    fn a_wall_clock_that_ran_ahead_renews_at_once_and_only_once() {
        let (start, mut core) = (origin(), RotationCore::new(1));
        core.handle(RotationInput::Want { id: id(0), urgency: Urgency::Waiting }, at(start, 0));
        assert_eq!(requests(&mut core), [id(0)]);
        let issue = |core: &mut RotationCore, now: Now, not_before: SystemTime| {
            let not_after = not_before + TTL;
            core.handle(RotationInput::Issued { id: id(0), not_before, not_after }, now);
        };
        let now = at(start, 0);
        issue(&mut core, now, now.wall);
        assert!(requests(&mut core).is_empty());
        // Two thirds of the certificate's life passed in a second. The core wants to be asked within a minute.
        let woken = Now { wall: now.wall + TTL * 2 / 3, monotonic: now.monotonic + MIN_RENEWAL };
        assert!(core.poll_timeout().unwrap() <= now.monotonic + LONGEST_UNWATCHED);
        core.handle(RotationInput::Tick, woken);
        assert_eq!(requests(&mut core), [id(0)]);
        // The clock was wrong, and the CA's answer looks old by it: no storm.
        issue(&mut core, woken, now.wall);
        for seconds in 0..30 {
            let later = Duration::from_secs(seconds);
            let now = Now { wall: woken.wall + later, monotonic: woken.monotonic + later };
            core.handle(RotationInput::Tick, now);
            assert!(requests(&mut core).is_empty(), "after {seconds} s");
        }
        // Back in time: nothing happens before the monotonic clock says so.
        core.handle(RotationInput::Tick, Now { wall: SystemTime::UNIX_EPOCH, ..woken });
        assert!(requests(&mut core).is_empty());
    }
}
