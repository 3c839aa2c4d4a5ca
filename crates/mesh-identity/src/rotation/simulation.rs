//! A day of a node's certificates from a seed: a CA with outages, short and long, a wall clock that jumps, and
//! revocations.
//!
//! The oracle knows when the CA worked. A certificate may be renewed late, or even expire, only if the CA never worked
//! for long enough since the renewal was due; what "long enough" is follows from the longest backoff and the queue.

use std::collections::BTreeMap;
use std::time::Duration;

use super::tests::{at, id, origin};
use super::*;

const IDENTITIES: usize = 20;
const SECOND: u64 = 1000;
const DAY: u64 = 24 * 3600 * SECOND;
const LIFE: u64 = 3600 * SECOND;
/// How long before its issue a certificate is valid.
const BACKDATE: u64 = 120 * SECOND;
/// Longest time an answer takes.
const ANSWER: u64 = 5 * SECOND;
/// After this long since its issue, a certificate is due for renewal whatever the clocks say: half of its whole life.
const DUE: u64 = (LIFE + BACKDATE) / 2;
/// In a span of this length in which the CA works, everybody is served: the longest backoff, then three rounds of eight
/// requests, and one that was under way.
const ENOUGH: u64 = 150 * SECOND + 4 * ANSWER;
/// How far the wall clock may be off, seconds.
const SKEWS: [i64; 3] = [-600, 0, 600];
/// The soonest that a renewal follows another without a jump: the earliest due time, seen by the clock that is ahead.
const SOONEST: u64 = (LIFE + BACKDATE) * 4 / 10 - BACKDATE - 600 * SECOND;

struct Simulation {
    seed: u64,
    dice: SplitMix,
    core: RotationCore,
    start: Instant,
    /// Milliseconds since the start.
    time: u64,
    skew: i64,
    /// Requests and when they are answered.
    under_way: Vec<(SpiffeId, u64)>,
    /// Issued at.
    held: BTreeMap<SpiffeId, u64>,
    /// Spans in which the CA failed, in order, apart from each other.
    outages: Vec<(u64, u64)>,
    issued: usize,
    failed: usize,
    jumps: usize,
    rejected: usize,
}

impl Simulation {
    fn new(seed: u64) -> Self {
        let mut dice = SplitMix(seed);
        let core = RotationCore::new(dice.next());
        let mut outages: Vec<(u64, u64)> = Vec::new();
        let mut start = 0;
        loop {
            start += dice.next() % (4 * LIFE);
            // Mostly such as no certificate dies of; sometimes hours. They may follow each other closely.
            let longest = if dice.next().is_multiple_of(6) { 3 * LIFE } else { LIFE / 3 };
            let end = start + dice.next() % longest;
            if start >= DAY {
                break;
            }
            outages.push((start, end));
            start = end + 1;
        }
        Self {
            seed,
            dice,
            core,
            start: origin(),
            time: 0,
            skew: 0,
            under_way: Vec::new(),
            held: BTreeMap::new(),
            outages,
            issued: 0,
            failed: 0,
            jumps: 0,
            rejected: 0,
        }
    }

    fn now(&self) -> Now {
        let skew = Duration::from_secs(self.skew.unsigned_abs());
        let true_time = self.true_time();
        Now {
            wall: if self.skew < 0 { true_time - skew } else { true_time + skew },
            monotonic: self.start + Duration::from_millis(self.time),
        }
    }

    /// The CA's clock, which is right.
    fn true_time(&self) -> SystemTime {
        at(self.start, 0).wall + Duration::from_millis(self.time)
    }

    fn works(&self, time: u64) -> bool {
        !self.outages.iter().any(|(start, end)| (*start..*end).contains(&time))
    }

    /// The longest span between the two times in which the CA worked.
    fn longest_working(&self, from: u64, until: u64) -> u64 {
        let mut longest = 0;
        let mut up_since = from;
        for &(start, end) in self.outages.iter().filter(|(_, end)| *end > from) {
            longest = longest.max(start.min(until).saturating_sub(up_since));
            up_since = end;
        }
        longest.max(until.saturating_sub(up_since))
    }

    fn feed(&mut self, input: RotationInput) {
        self.core.handle(input, self.now());
        while let Some(command) = self.core.poll_command() {
            match command {
                RotationCommand::Request { id } => {
                    let answer = self.time + self.dice.next() % ANSWER;
                    self.under_way.push((id, answer));
                }
                RotationCommand::Install { id } => self.installed(id),
                RotationCommand::Discard { id } => panic!("{id} was discarded while wanted"),
            }
        }
        let seed = self.seed;
        assert!(self.under_way.len() <= MAX_IN_FLIGHT, "seed {seed}");
        assert_eq!(self.under_way.len(), self.core.in_flight(), "seed {seed}");
        let mut ids: Vec<_> = self.under_way.iter().map(|(id, _)| id).collect();
        ids.sort();
        ids.dedup();
        assert_eq!(ids.len(), self.under_way.len(), "seed {seed}: two requests for one identity");
    }

    fn installed(&mut self, id: SpiffeId) {
        self.issued += 1;
        let due = self.held.insert(id.clone(), self.time).map_or(0, |issued| issued + DUE);
        self.check_delay(&id, due);
    }

    fn check_delay(&self, id: &SpiffeId, due: u64) {
        let (seed, time) = (self.seed, self.time);
        let working = self.longest_working(due, time);
        assert!(
            working <= ENOUGH,
            "seed {seed}: {id} due at {due} ms was not renewed at {time} ms, though the CA worked for {working} ms"
        );
    }

    /// Answers what is due, one after the other.
    fn answer(&mut self) {
        while let Some(index) = self.under_way.iter().position(|(_, due)| *due <= self.time) {
            let (id, _) = self.under_way.remove(index);
            if self.works(self.time) {
                let issued = self.true_time();
                let not_before = issued - Duration::from_millis(BACKDATE);
                let not_after = issued + Duration::from_millis(LIFE);
                self.feed(RotationInput::Issued { id, not_before, not_after });
            } else {
                self.failed += 1;
                self.feed(RotationInput::Failed { id });
            }
        }
    }

    fn run(mut self) {
        for n in 0..IDENTITIES {
            self.feed(RotationInput::Want { id: id(n), urgency: Urgency::Prefetch });
        }
        let mut next_jump = self.dice.next() % (4 * LIFE);
        while self.time < DAY {
            let tick = self.core.poll_timeout().map_or(DAY, |due| {
                u64::try_from(due.saturating_duration_since(self.start).as_millis()).unwrap() + 1
            });
            let answer = self.under_way.iter().map(|(_, due)| *due).min().unwrap_or(DAY);
            self.time = self.time.max(tick.min(answer).min(next_jump));
            if self.time >= next_jump {
                self.skew = SKEWS[usize::try_from(self.dice.next() % 3).unwrap()];
                self.jumps += 1;
                for n in 0..if self.skew > 0 { IDENTITIES } else { 0 } {
                    self.feed(RotationInput::Rejected { id: id(n) });
                    self.rejected += 1;
                }
                next_jump = self.time + 1 + self.dice.next() % (4 * LIFE);
            }
            self.answer();
            self.feed(RotationInput::Tick);
        }
        for n in 0..IDENTITIES {
            let due = self.held.get(&id(n)).map_or(0, |issued| issued + DUE);
            self.check_delay(&id(n), due);
        }
        self.check_load();
    }

    /// Neither jumps nor outages make more requests than they must.
    fn check_load(&self) {
        let seed = self.seed;
        let renewals = usize::try_from(DAY / SOONEST).unwrap() + 1 + self.jumps;
        assert!(
            self.issued <= IDENTITIES * renewals + self.rejected,
            "seed {seed}: {} issued",
            self.issued
        );
        let down: u64 = self.outages.iter().map(|(start, end)| end - start).sum();
        // Nine doublings up to the cap, of which a fifth may be missing.
        let retries = usize::try_from(down / (120 * SECOND)).unwrap() + 9 * self.outages.len();
        assert!(self.failed <= IDENTITIES * retries, "seed {seed}: {} failed", self.failed);
    }
}

#[test]
fn outages_and_clock_jumps_neither_delay_a_certificate_nor_make_a_storm() {
    for seed in 0..20 {
        Simulation::new(seed).run();
    }
}
