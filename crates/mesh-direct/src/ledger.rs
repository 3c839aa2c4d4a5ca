//! The ledger.
//!
//! ```text
//!                 offered, Grant                 changed: Hold or Deny
//!    (unknown) ───────────────────► Permitted ───────────────────────► Revoking ──► (unknown, or
//!        ▲         Permit              │   ▲                            Revoke       watched for its
//!        └── Full ◄────────────────────┘   └──── changed: Grant, Permit              open flows)
//! ```
//! A virtual address goes with the pairs of its endpoints: [`Spread`](Command::Spread) once all of them have a verdict, and
//! [`Gather`](Command::Gather) with the first one that has none any more.

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

/// A virtual address and port of a service, as a client dials it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Vip {
    /// Who dials.
    pub client: Pod,
    /// The virtual address and port.
    pub address: SocketAddr,
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

/// Decides on the current picture.
pub trait Judge {
    /// What the full policy says of a pair.
    fn pair(&mut self, pair: &Pair) -> Judgement;

    /// The pairs of all endpoints among which a client's connections to a virtual address are spread, each as likely as the
    /// others, in an order that depends on them alone. None when they are not all on this node, or the agent has to choose.
    fn vip(&mut self, vip: &Vip) -> Option<Vec<Pair>>;
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
    /// The agent has carried a connection to this virtual address.
    OfferedVip(Vip),
    /// The kernel spreads connections to a virtual address over the endpoints of these pairs, since an earlier process said so.
    /// After [`Adopted`](Self::Adopted) of all pairs.
    AdoptedVip(Vip, Vec<Pair>),
    /// The kernel says that a connection is open.
    Opened(Pair, Flow),
    /// The kernel says that it closed.
    Closed(Pair, Flow),
    /// Time has come for another try; see [`Ledger::next_try`].
    Tick,
}

/// What the shell does in the kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Command {
    /// Writes the verdict.
    Permit(Pair),
    /// Takes it back. One that is not there is no failure.
    Revoke(Pair),
    /// Ends a connection. One that is not there is no failure.
    Cut(Pair, Flow),
    /// Spreads connections to the virtual address over the endpoints of these pairs, instead of what was said of it before.
    Spread(Vip, Vec<Pair>),
    /// Leaves the virtual address to the agent again. One that is not there is no failure.
    Gather(Vip),
}

/// A command that the kernel refused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refused(pub Command);

/// Bounds of a ledger.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    /// Verdicts; beyond it pairs stay with the agent. Default 65,536, as the kernel's map.
    pub verdicts: usize,
    /// Virtual addresses; beyond it they stay with the agent. Default 16,384, as the kernel's map.
    pub vips: usize,
    /// Endpoints of a virtual address; one with more stays with the agent. Default 8, as the kernel's map.
    pub endpoints: usize,
    /// Between tries of what the kernel refused. Default 100 ms.
    pub retry: Duration,
    /// How long verdicts stay in force after the ledger's last word. Default 2 s.
    pub lease: Duration,
}

impl Default for Bounds {
    fn default() -> Self {
        Self {
            verdicts: 65_536,
            vips: 16_384,
            endpoints: 8,
            retry: Duration::from_millis(100),
            lease: Duration::from_secs(2),
        }
    }
}

#[derive(Debug, Default)]
struct Entry {
    /// The kernel holds a verdict, as far as is known.
    permitted: bool,
    open: BTreeSet<Flow>,
    /// The virtual addresses that lead to it.
    vips: BTreeSet<Vip>,
}

/// Pairs, their verdicts and their open connections. Times are of one monotonic clock.
#[derive(Debug, Default)]
pub struct Ledger {
    bounds: Bounds,
    pairs: BTreeMap<Pair, Entry>,
    permitted: usize,
    /// The pairs of each virtual address, all permitted.
    vips: BTreeMap<Vip, Vec<Pair>>,
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
    pub fn handle(&mut self, input: Input, now: Duration, mut judge: impl Judge) {
        match input {
            Input::Offered(pair) => self.offered(pair, judge.pair(&pair)),
            Input::Adopted(pair) => {
                let entry = self.pairs.entry(pair).or_default();
                if !entry.permitted {
                    entry.permitted = true;
                    self.permitted += 1;
                }
                self.judged(pair, judge.pair(&pair));
            }
            Input::OfferedVip(vip) => {
                // It would be taken back by the command that is tried again.
                let is_stuck = self.failed.contains(&Command::Gather(vip));
                if !is_stuck && !self.vips.contains_key(&vip) && self.vips.len() < self.bounds.vips
                {
                    self.judge_vip(vip, None, &mut judge);
                }
            }
            Input::AdoptedVip(vip, pairs) => self.judge_vip(vip, Some(pairs), &mut judge),
            Input::Changed => {
                let pairs: Vec<Pair> = self.pairs.keys().copied().collect();
                for pair in pairs {
                    self.judged(pair, judge.pair(&pair));
                }
                let vips: Vec<Vip> = self.vips.keys().copied().collect();
                for vip in vips {
                    let held = self.unlink(&vip);
                    self.judge_vip(vip, held, &mut judge);
                }
                // No new connection first, then the end of those that are open.
                self.commands
                    .make_contiguous()
                    .sort_by_key(|command| matches!(command, Command::Cut(..)));
            }
            Input::Opened(pair, flow) => {
                self.pairs.entry(pair).or_default().open.insert(flow);
                self.judged(pair, judge.pair(&pair));
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
    /// agent, and so does a virtual address; the others are tried again.
    pub fn refused(&mut self, Refused(command): Refused, now: Duration) {
        match command {
            Command::Permit(pair) => {
                self.withdraw(&pair);
                self.forget_idle(&pair);
            }
            // What was said of it before may still be there.
            Command::Spread(vip, _) => self.gather(vip),
            Command::Revoke(_) | Command::Cut(..) | Command::Gather(_) => {
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

    /// Until when verdicts may be in force; none while one that has to go, or a virtual address, is still there.
    #[must_use]
    pub fn lease(&self, now: Duration) -> Option<Duration> {
        let stuck = self.failed.iter().chain(&self.commands);
        let stuck = stuck
            .into_iter()
            .any(|command| matches!(command, Command::Revoke(_) | Command::Gather(_)));
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

    /// The virtual addresses that lead straight to endpoints, with the pairs of all of them.
    pub fn vips(&self) -> impl ExactSizeIterator<Item = (&Vip, &[Pair])> {
        self.vips.iter().map(|(vip, pairs)| (vip, pairs.as_slice()))
    }

    /// The pairs of a virtual address's endpoints, when it leads straight to them.
    #[must_use]
    pub fn endpoints(&self, vip: &Vip) -> Option<&[Pair]> {
        self.vips.get(vip).map(Vec::as_slice)
    }

    /// The connections that are open.
    pub fn open(&self) -> impl Iterator<Item = (&Pair, Flow)> {
        self.pairs.iter().flat_map(|(pair, entry)| entry.open.iter().map(move |flow| (pair, *flow)))
    }

    fn offered(&mut self, pair: Pair, judgement: Judgement) {
        let is_granted = judgement == Judgement::Grant && !self.is_stuck(&pair);
        if is_granted && !self.is_permitted(&pair) && self.permitted < self.bounds.verdicts {
            self.permit(pair);
        }
    }

    /// It would be taken back by the revocation that is tried again.
    fn is_stuck(&self, pair: &Pair) -> bool {
        self.failed.contains(&Command::Revoke(*pair))
    }

    fn permit(&mut self, pair: Pair) {
        self.pairs.entry(pair).or_default().permitted = true;
        self.permitted += 1;
        self.commands.push_back(Command::Permit(pair));
    }

    /// The pair has no verdict any more: the virtual addresses that lead to it go back to the agent. Whether it had one.
    fn withdraw(&mut self, pair: &Pair) -> bool {
        let Some(entry) = self.pairs.get_mut(pair).filter(|entry| entry.permitted) else {
            return false;
        };
        entry.permitted = false;
        self.permitted -= 1;
        for vip in std::mem::take(&mut entry.vips) {
            self.gather(vip);
        }
        true
    }

    /// Judges a virtual address. `held` is what the kernel has of it; it is not linked to its pairs.
    fn judge_vip(&mut self, vip: Vip, held: Option<Vec<Pair>>, judge: &mut impl Judge) {
        let endpoints = judge.vip(&vip).filter(|pairs| self.may_spread(pairs, judge));
        match endpoints {
            Some(pairs) => {
                let new: BTreeSet<Pair> = pairs.iter().copied().collect();
                for pair in new {
                    if !self.is_permitted(&pair) {
                        self.permit(pair);
                    }
                    self.pairs.entry(pair).or_default().vips.insert(vip);
                }
                if held.as_ref() != Some(&pairs) {
                    self.commands.push_back(Command::Spread(vip, pairs.clone()));
                }
                self.vips.insert(vip, pairs);
            }
            None if held.is_some() => self.gather(vip),
            None => {}
        }
    }

    /// Every pair may have a verdict, and there is room for them.
    fn may_spread(&self, pairs: &[Pair], judge: &mut impl Judge) -> bool {
        let missing = pairs.iter().filter(|pair| !self.is_permitted(pair)).count();
        (1..=self.bounds.endpoints).contains(&pairs.len())
            && missing <= self.bounds.verdicts.saturating_sub(self.permitted)
            && pairs.iter().all(|pair| judge.pair(pair) == Judgement::Grant && !self.is_stuck(pair))
    }

    /// Leaves a virtual address to the agent.
    fn gather(&mut self, vip: Vip) {
        self.unlink(&vip);
        let is_its =
            |command: &Command| matches!(command, Command::Spread(other, _) if *other == vip);
        self.commands.retain(|command| !is_its(command));
        self.commands.push_back(Command::Gather(vip));
    }

    /// Forgets what a virtual address leads to.
    fn unlink(&mut self, vip: &Vip) -> Option<Vec<Pair>> {
        let pairs = self.vips.remove(vip)?;
        for pair in &pairs {
            if let Some(entry) = self.pairs.get_mut(pair) {
                entry.vips.remove(vip);
            }
        }
        Some(pairs)
    }

    fn judged(&mut self, pair: Pair, judgement: Judgement) {
        if judgement == Judgement::Grant {
            return;
        }
        if self.withdraw(&pair) {
            self.commands.push_back(Command::Revoke(pair));
        }
        if judgement == Judgement::Deny
            && let Some(entry) = self.pairs.get(&pair)
        {
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

    /// Of every pair, in a mesh without services.
    impl Judge for Judgement {
        fn pair(&mut self, _pair: &Pair) -> Judgement {
            *self
        }

        fn vip(&mut self, _vip: &Vip) -> Option<Vec<Pair>> {
            None
        }
    }

    const VIP: Vip = Vip {
        client: PAIR.client,
        address: SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::new(10, 96, 0, 1)), 80),
    };
    const OTHER: Pair = Pair {
        server: Pod(3),
        target: SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::new(10, 0, 0, 3)), 80),
        ..PAIR
    };

    /// A service with these endpoints, one of which may be denied.
    #[derive(Clone)]
    struct Service {
        endpoints: Vec<Pair>,
        denied: Option<Pair>,
    }

    impl Judge for Service {
        fn pair(&mut self, pair: &Pair) -> Judgement {
            if self.denied == Some(*pair) { Judgement::Deny } else { Judgement::Grant }
        }

        fn vip(&mut self, _vip: &Vip) -> Option<Vec<Pair>> {
            Some(self.endpoints.clone())
        }
    }

    fn service(endpoints: &[Pair]) -> Service {
        Service { endpoints: endpoints.to_vec(), denied: None }
    }

    fn spread() -> Ledger {
        let mut ledger = Ledger::new(Bounds::default());
        ledger.handle(Input::OfferedVip(VIP), NOW, service(&[PAIR, OTHER]));
        let spread = Command::Spread(VIP, vec![PAIR, OTHER]);
        assert_eq!(drain(&mut ledger), [Command::Permit(PAIR), Command::Permit(OTHER), spread]);
        ledger
    }

    fn flow() -> Flow {
        Flow(SocketAddr::new(PAIR.client_address, 4000))
    }

    fn drain(ledger: &mut Ledger) -> Vec<Command> {
        std::iter::from_fn(|| ledger.poll_command()).collect()
    }

    fn permitted() -> Ledger {
        let mut ledger = Ledger::new(Bounds::default());
        ledger.handle(Input::Offered(PAIR), NOW, Judgement::Grant);
        assert_eq!(drain(&mut ledger), [Command::Permit(PAIR)]);
        ledger.handle(Input::Offered(PAIR), NOW, Judgement::Grant);
        assert_eq!(drain(&mut ledger), []);
        ledger
    }

    #[test]
    fn only_a_granted_pair_gets_a_verdict() {
        for judgement in [Judgement::Hold, Judgement::Deny] {
            let mut ledger = Ledger::new(Bounds::default());
            ledger.handle(Input::Offered(PAIR), NOW, judgement);
            assert_eq!(drain(&mut ledger), []);
        }
        assert_eq!(permitted().permitted().collect::<Vec<_>>(), [&PAIR]);
    }

    #[test]
    fn a_denial_takes_the_verdict_and_then_the_connections() {
        let mut ledger = permitted();
        ledger.handle(Input::Opened(PAIR, flow()), NOW, Judgement::Grant);
        ledger.handle(Input::Changed, NOW, Judgement::Deny);
        assert_eq!(drain(&mut ledger), [Command::Revoke(PAIR), Command::Cut(PAIR, flow())]);
        ledger.handle(Input::Closed(PAIR, flow()), NOW, Judgement::Deny);
        assert_eq!(ledger.open().count() + ledger.pairs.len(), 0);
    }

    #[test]
    fn what_is_held_keeps_its_connections_until_it_is_denied() {
        let mut ledger = permitted();
        ledger.handle(Input::Opened(PAIR, flow()), NOW, Judgement::Grant);
        ledger.handle(Input::Changed, NOW, Judgement::Hold);
        assert_eq!(drain(&mut ledger), [Command::Revoke(PAIR)]);
        ledger.handle(Input::Changed, NOW, Judgement::Deny);
        assert_eq!(drain(&mut ledger), [Command::Cut(PAIR, flow())]);
    }

    #[test]
    fn a_connection_that_slipped_in_is_cut_when_it_is_heard_of() {
        let mut ledger = permitted();
        ledger.handle(Input::Changed, NOW, Judgement::Deny);
        assert_eq!(drain(&mut ledger), [Command::Revoke(PAIR)]);
        ledger.handle(Input::Opened(PAIR, flow()), NOW, Judgement::Deny);
        assert_eq!(drain(&mut ledger), [Command::Cut(PAIR, flow())]);
    }

    #[test]
    fn the_lease_lapses_while_a_verdict_cannot_be_taken_back() {
        let mut ledger = permitted();
        assert!(ledger.lease(NOW).is_some());
        ledger.handle(Input::Changed, NOW, Judgement::Deny);
        let command = ledger.poll_command().unwrap();
        ledger.refused(Refused(command), NOW);
        assert_eq!(ledger.lease(NOW), None);
        let due = ledger.next_try().unwrap();
        ledger.handle(Input::Tick, due, Judgement::Deny);
        assert_eq!(drain(&mut ledger), [Command::Revoke(PAIR)]);
        assert!(ledger.lease(due).is_some());
    }

    #[test]
    fn a_full_map_leaves_the_pair_with_the_agent() {
        let mut ledger = permitted();
        ledger.refused(Refused(Command::Permit(PAIR)), NOW);
        assert_eq!(ledger.permitted().count(), 0);
        let mut ledger = Ledger::new(Bounds { verdicts: 0, ..Bounds::default() });
        ledger.handle(Input::Offered(PAIR), NOW, Judgement::Grant);
        assert_eq!(drain(&mut ledger), []);
    }

    #[test]
    fn a_virtual_address_leads_to_all_of_its_endpoints_or_stays_with_the_agent() {
        let check = |name: &str, bounds: Bounds, judge: Service| {
            let mut ledger = Ledger::new(bounds);
            ledger.handle(Input::OfferedVip(VIP), NOW, judge);
            assert_eq!((drain(&mut ledger), ledger.vips().len()), (vec![], 0), "{name}");
        };
        let both = service(&[PAIR, OTHER]);
        let bounds = Bounds::default();
        check("no endpoint", bounds, service(&[]));
        check("a denied one", bounds, Service { denied: Some(OTHER), ..both.clone() });
        check("too many", Bounds { endpoints: 1, ..bounds }, both.clone());
        check("no room for the pairs", Bounds { verdicts: 1, ..bounds }, both.clone());
        check("no room", Bounds { vips: 0, ..bounds }, both.clone());
        let mut ledger = spread();
        assert_eq!(ledger.endpoints(&VIP), Some([PAIR, OTHER].as_slice()));
        ledger.handle(Input::OfferedVip(VIP), NOW, both.clone());
        ledger.handle(Input::Changed, NOW, both);
        assert_eq!(drain(&mut ledger), []);
    }

    #[test]
    fn a_virtual_address_follows_its_endpoints() {
        let mut ledger = spread();
        ledger.handle(Input::Changed, NOW, service(&[OTHER]));
        assert_eq!(drain(&mut ledger), [Command::Spread(VIP, vec![OTHER])]);
        // One that left is still reached by its own address, and its connections go on.
        assert!(ledger.is_permitted(&PAIR));
        ledger.handle(Input::Changed, NOW, service(&[OTHER, PAIR]));
        assert_eq!(drain(&mut ledger), [Command::Spread(VIP, vec![OTHER, PAIR])]);
        ledger.handle(Input::Changed, NOW, service(&[]));
        assert_eq!(drain(&mut ledger), [Command::Gather(VIP)]);
        assert_eq!((ledger.verdicts(), ledger.vips().len()), (2, 0));
    }

    #[test]
    fn a_virtual_address_goes_with_the_first_of_its_verdicts() {
        let mut ledger = spread();
        let denying = Service { denied: Some(OTHER), ..service(&[PAIR, OTHER]) };
        ledger.handle(Input::Opened(OTHER, flow()), NOW, denying);
        let expected = [Command::Gather(VIP), Command::Revoke(OTHER), Command::Cut(OTHER, flow())];
        assert_eq!(drain(&mut ledger), expected);
        assert!(ledger.is_permitted(&PAIR));

        // The kernel has no room for the second verdict.
        let mut ledger = Ledger::new(Bounds::default());
        ledger.handle(Input::OfferedVip(VIP), NOW, service(&[PAIR, OTHER]));
        assert_eq!(ledger.poll_command(), Some(Command::Permit(PAIR)));
        let second = ledger.poll_command().unwrap();
        ledger.refused(Refused(second), NOW);
        assert_eq!(drain(&mut ledger), [Command::Gather(VIP)]);
    }

    #[test]
    fn a_virtual_address_that_the_kernel_keeps_stops_the_lease() {
        let mut ledger = spread();
        ledger.handle(Input::Changed, NOW, service(&[PAIR]));
        // What was said before is still there.
        let command = ledger.poll_command().unwrap();
        ledger.refused(Refused(command), NOW);
        let command = ledger.poll_command().unwrap();
        assert_eq!(command, Command::Gather(VIP));
        ledger.refused(Refused(command), NOW);
        assert_eq!(ledger.lease(NOW), None);
        // It is not written anew while it may still be taken back.
        ledger.handle(Input::OfferedVip(VIP), NOW, service(&[PAIR]));
        assert_eq!(drain(&mut ledger), []);
        ledger.handle(Input::Tick, ledger.next_try().unwrap(), service(&[PAIR]));
        assert_eq!(drain(&mut ledger), [Command::Gather(VIP)]);
        assert!(ledger.lease(NOW).is_some());
    }

    #[test]
    fn what_an_earlier_process_spread_is_judged() {
        let adopt = |held: &[Pair], judge: Service| {
            let mut ledger = Ledger::new(Bounds::default());
            for pair in [PAIR, OTHER] {
                ledger.handle(Input::Adopted(pair), NOW, judge.clone());
            }
            drain(&mut ledger);
            ledger.handle(Input::AdoptedVip(VIP, held.to_vec()), NOW, judge);
            drain(&mut ledger)
        };
        let both = [PAIR, OTHER];
        assert_eq!(adopt(&both, service(&both)), []);
        assert_eq!(adopt(&both, service(&[PAIR])), [Command::Spread(VIP, vec![PAIR])]);
        let denying = Service { denied: Some(OTHER), ..service(&both) };
        assert_eq!(adopt(&both, denying), [Command::Gather(VIP)]);
    }
}
