//! The ledger.
//!
//! ```text
//!                 offered, Grant                 changed: Hold or Deny
//!    (unknown) ───────────────────► Permitted ───────────────────────► Revoking ──► (unknown, or
//!        ▲         Permit              │   ▲                            Revoke       watched for its
//!        └── Full ◄────────────────────┘   └──── changed: Grant, Permit              open flows)
//! ```

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::SocketAddr;
use std::time::Duration;

/// A pod, by a number that the machine gives once: the cookie of its network namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Pod(pub u64);

/// A client and a port of a server on the same node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Pair {
    /// Who connects.
    pub client: Pod,
    /// Its address.
    pub client_address: std::net::IpAddr,
    /// To whom.
    pub server: Pod,
    /// The server's address and port.
    pub target: SocketAddr,
}

/// A connection of a pair, by its client's address and port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Flow(pub SocketAddr);

/// What the full policy says of a pair on the current picture.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Judgement {
    /// New connections may go direct.
    Grant,
    /// New ones go through the agent, open ones go on: a policy in audit mode wants to see each
    /// connection, a certificate is missing.
    Hold,
    /// Denied, or in the agent's hands by a waypoint: open ones end too.
    Deny,
}

/// What happens to a ledger.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Input {
    /// The agent has carried a connection of this pair, so that a verdict is of use.
    Offered(Pair),
    /// Something that verdicts rest on has changed: policy, identity, workload, trust, waypoint, a
    /// pod's enrolment or settings.
    Changed,
    /// A pair of which the kernel holds a verdict, taken by an earlier process.
    Adopted(Pair),
    /// The kernel says that a connection is open.
    Opened(Pair, Flow),
    /// The kernel says that it closed.
    Closed(Pair, Flow),
    /// Time has come for another try; see [`Ledger::next_try`].
    Tick,
}

/// What the shell does in the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// Writes the verdict.
    Permit(Pair),
    /// Takes it back. One that is not there is no failure.
    Revoke(Pair),
    /// Ends a connection. One that is not there is no failure.
    Cut(Pair, Flow),
}

/// A command that the kernel refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refused(pub Command);

/// Bounds of a ledger.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    /// Verdicts; beyond it pairs stay with the agent. Default 65,536, as the kernel's map.
    pub verdicts: usize,
    /// Between tries of what the kernel refused. Default 100 ms.
    pub retry: Duration,
    /// How long verdicts stay in force after the ledger's last word. Default 2 s.
    pub lease: Duration,
}

impl Default for Bounds {
    fn default() -> Self {
        Self { verdicts: 65_536, retry: Duration::from_millis(100), lease: Duration::from_secs(2) }
    }
}

#[derive(Debug, Default)]
struct Entry {
    /// The kernel holds a verdict, as far as is known.
    permitted: bool,
    open: BTreeSet<Flow>,
}

/// Pairs, their verdicts and their open connections. Times are of one monotonic clock.
#[derive(Debug, Default)]
pub struct Ledger {
    bounds: Bounds,
    pairs: BTreeMap<Pair, Entry>,
    permitted: usize,
    commands: VecDeque<Command>,
    /// What the kernel refused to take back or to end. In order, revocations and all.
    failed: Vec<Command>,
    next_try: Option<Duration>,
}

impl Ledger {
    /// An empty ledger.
    #[must_use]
    pub fn new(bounds: Bounds) -> Self {
        Self { bounds, ..Self::default() }
    }

    /// Takes one input. `judge` decides on the current picture. Afterwards carry out
    /// [`poll_command`](Self::poll_command) until it has none.
    pub fn handle(
        &mut self,
        input: Input,
        now: Duration,
        mut judge: impl FnMut(&Pair) -> Judgement,
    ) {
        match input {
            Input::Offered(pair) => self.offered(pair, judge(&pair)),
            Input::Adopted(pair) => {
                let entry = self.pairs.entry(pair).or_default();
                if !entry.permitted {
                    entry.permitted = true;
                    self.permitted += 1;
                }
                self.judged(pair, judge(&pair));
            }
            Input::Changed => {
                let pairs: Vec<Pair> = self.pairs.keys().copied().collect();
                for pair in pairs {
                    self.judged(pair, judge(&pair));
                }
                // No new connection first, then the end of those that are open.
                self.commands
                    .make_contiguous()
                    .sort_by_key(|command| matches!(command, Command::Cut(..)));
            }
            Input::Opened(pair, flow) => {
                self.pairs.entry(pair).or_default().open.insert(flow);
                self.judged(pair, judge(&pair));
            }
            Input::Closed(pair, flow) => self.closed(pair, flow),
            Input::Tick => {
                if self.next_try.is_some_and(|due| due <= now) {
                    self.next_try = None;
                    self.commands.extend(self.failed.drain(..));
                }
            }
        }
    }

    /// What is to be done next; each is carried out before the next input.
    pub fn poll_command(&mut self) -> Option<Command> {
        self.commands.pop_front()
    }

    /// A command could not be carried out. A verdict that could not be written leaves its pair with the
    /// agent; the others are tried again.
    pub fn refused(&mut self, Refused(command): Refused, now: Duration) {
        match command {
            Command::Permit(pair) => {
                if let Some(entry) = self.pairs.get_mut(&pair)
                    && entry.permitted
                {
                    entry.permitted = false;
                    self.permitted -= 1;
                    self.forget_idle(&pair);
                }
            }
            Command::Revoke(_) | Command::Cut(..) => {
                self.failed.push(command);
                let due = now.saturating_add(self.bounds.retry);
                self.next_try.get_or_insert(due);
            }
        }
    }

    /// When a [`Input::Tick`] is due.
    #[must_use]
    pub const fn next_try(&self) -> Option<Duration> {
        self.next_try
    }

    /// Until when verdicts may be in force; none while one that has to go is still there.
    #[must_use]
    pub fn lease(&self, now: Duration) -> Option<Duration> {
        let stuck = self.failed.iter().chain(&self.commands);
        let stuck = stuck.into_iter().any(|command| matches!(command, Command::Revoke(_)));
        (!stuck).then(|| now.saturating_add(self.bounds.lease))
    }

    /// How many pairs have a verdict.
    #[must_use]
    pub const fn verdicts(&self) -> usize {
        self.permitted
    }

    /// True when the pair has a verdict.
    #[must_use]
    pub fn is_permitted(&self, pair: &Pair) -> bool {
        self.pairs.get(pair).is_some_and(|entry| entry.permitted)
    }

    /// The pairs that have a verdict.
    pub fn permitted(&self) -> impl Iterator<Item = &Pair> {
        self.pairs.iter().filter(|(_, entry)| entry.permitted).map(|(pair, _)| pair)
    }

    /// The connections that are open.
    pub fn open(&self) -> impl Iterator<Item = (&Pair, Flow)> {
        self.pairs.iter().flat_map(|(pair, entry)| entry.open.iter().map(move |flow| (pair, *flow)))
    }

    fn offered(&mut self, pair: Pair, judgement: Judgement) {
        let known = self.pairs.get(&pair).is_some_and(|entry| entry.permitted)
            // It would be taken back by the revocation that is tried again.
            || self.failed.contains(&Command::Revoke(pair));
        if known || judgement != Judgement::Grant || self.permitted >= self.bounds.verdicts {
            return;
        }
        self.pairs.entry(pair).or_default().permitted = true;
        self.permitted += 1;
        self.commands.push_back(Command::Permit(pair));
    }

    fn judged(&mut self, pair: Pair, judgement: Judgement) {
        if judgement == Judgement::Grant {
            return;
        }
        let Some(entry) = self.pairs.get_mut(&pair) else { return };
        if entry.permitted {
            entry.permitted = false;
            self.permitted -= 1;
            self.commands.push_back(Command::Revoke(pair));
        }
        if judgement == Judgement::Deny {
            let open = entry.open.iter().map(|flow| Command::Cut(pair, *flow));
            self.commands.extend(open);
        }
        self.forget_idle(&pair);
    }

    fn closed(&mut self, pair: Pair, flow: Flow) {
        if let Some(entry) = self.pairs.get_mut(&pair) {
            entry.open.remove(&flow);
            self.forget_idle(&pair);
        }
        self.failed.retain(|command| *command != Command::Cut(pair, flow));
        if self.failed.is_empty() {
            self.next_try = None;
        }
    }

    fn forget_idle(&mut self, pair: &Pair) {
        if self.pairs.get(pair).is_some_and(|entry| !entry.permitted && entry.open.is_empty()) {
            self.pairs.remove(pair);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAIR: Pair = Pair {
        client: Pod(1),
        client_address: std::net::IpAddr::V4(std::net::Ipv4Addr::new(10, 0, 0, 1)),
        server: Pod(2),
        target: SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::new(10, 0, 0, 2)), 80),
    };
    const NOW: Duration = Duration::from_secs(1);

    fn flow() -> Flow {
        Flow(SocketAddr::new(PAIR.client_address, 4000))
    }

    fn drain(ledger: &mut Ledger) -> Vec<Command> {
        std::iter::from_fn(|| ledger.poll_command()).collect()
    }

    fn permitted() -> Ledger {
        let mut ledger = Ledger::new(Bounds::default());
        ledger.handle(Input::Offered(PAIR), NOW, |_| Judgement::Grant);
        assert_eq!(drain(&mut ledger), [Command::Permit(PAIR)]);
        ledger.handle(Input::Offered(PAIR), NOW, |_| Judgement::Grant);
        assert_eq!(drain(&mut ledger), []);
        ledger
    }

    #[test]
    fn only_a_granted_pair_gets_a_verdict() {
        for judgement in [Judgement::Hold, Judgement::Deny] {
            let mut ledger = Ledger::new(Bounds::default());
            ledger.handle(Input::Offered(PAIR), NOW, |_| judgement);
            assert_eq!(drain(&mut ledger), []);
        }
        assert_eq!(permitted().permitted().collect::<Vec<_>>(), [&PAIR]);
    }

    #[test]
    fn a_denial_takes_the_verdict_and_then_the_connections() {
        let mut ledger = permitted();
        ledger.handle(Input::Opened(PAIR, flow()), NOW, |_| Judgement::Grant);
        ledger.handle(Input::Changed, NOW, |_| Judgement::Deny);
        assert_eq!(drain(&mut ledger), [Command::Revoke(PAIR), Command::Cut(PAIR, flow())]);
        ledger.handle(Input::Closed(PAIR, flow()), NOW, |_| Judgement::Deny);
        assert_eq!(ledger.open().count() + ledger.pairs.len(), 0);
    }

    #[test]
    fn what_is_held_keeps_its_connections_until_it_is_denied() {
        let mut ledger = permitted();
        ledger.handle(Input::Opened(PAIR, flow()), NOW, |_| Judgement::Grant);
        ledger.handle(Input::Changed, NOW, |_| Judgement::Hold);
        assert_eq!(drain(&mut ledger), [Command::Revoke(PAIR)]);
        ledger.handle(Input::Changed, NOW, |_| Judgement::Deny);
        assert_eq!(drain(&mut ledger), [Command::Cut(PAIR, flow())]);
    }

    #[test]
    fn a_connection_that_slipped_in_is_cut_when_it_is_heard_of() {
        let mut ledger = permitted();
        ledger.handle(Input::Changed, NOW, |_| Judgement::Deny);
        assert_eq!(drain(&mut ledger), [Command::Revoke(PAIR)]);
        ledger.handle(Input::Opened(PAIR, flow()), NOW, |_| Judgement::Deny);
        assert_eq!(drain(&mut ledger), [Command::Cut(PAIR, flow())]);
    }

    #[test]
    fn the_lease_lapses_while_a_verdict_cannot_be_taken_back() {
        let mut ledger = permitted();
        assert!(ledger.lease(NOW).is_some());
        ledger.handle(Input::Changed, NOW, |_| Judgement::Deny);
        let command = ledger.poll_command().unwrap();
        ledger.refused(Refused(command), NOW);
        assert_eq!(ledger.lease(NOW), None);
        let due = ledger.next_try().unwrap();
        ledger.handle(Input::Tick, due, |_| Judgement::Deny);
        assert_eq!(drain(&mut ledger), [Command::Revoke(PAIR)]);
        assert!(ledger.lease(due).is_some());
    }

    #[test]
    fn a_full_map_leaves_the_pair_with_the_agent() {
        let mut ledger = permitted();
        ledger.refused(Refused(Command::Permit(PAIR)), NOW);
        assert_eq!(ledger.permitted().count(), 0);
        let mut ledger = Ledger::new(Bounds { verdicts: 0, ..Bounds::default() });
        ledger.handle(Input::Offered(PAIR), NOW, |_| Judgement::Grant);
        assert_eq!(drain(&mut ledger), []);
    }
}
