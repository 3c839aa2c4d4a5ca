//! A node's kernel, its pods, a policy that changes, pods that join and leave, an agent that comes and
//! goes and hands over, a queue of events that overflows, and faults, from a seed. After every step: no
//! verdict in force that the policy of now does not grant, no virtual address of a service that leads
//! elsewhere than to all of its endpoints of now, and no connection of a denied pair lives longer than a second.
#![expect(clippy::cast_possible_truncation, reason = "numbers of pods and connections, all small")]

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::time::Duration;

use mesh_direct::{
    Bounds, Command, Flow, Input, Judge, Judgement, Ledger, Pair, Pod, Refused, Vip,
};

const SEEDS: u64 = 100_000;
const STEPS: usize = 60;
const PODS: u64 = 3;
const STEP: Duration = Duration::from_millis(100);
/// What the mesh promises of a policy that denies.
const CUT_WITHIN: Duration = Duration::from_secs(1);

/// SplitMix64 (Steele, Lea, Flood 2014).
struct Dice(u64);

impl Dice {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }

    fn one_in(&mut self, bound: u64) -> bool {
        self.below(bound) == 0
    }
}

/// What the kernel holds; it knows no policy.
#[derive(Default)]
struct Kernel {
    verdicts: BTreeSet<Pair>,
    vips: BTreeMap<Vip, Vec<Pair>>,
    lease: Duration,
    open: BTreeSet<(Pair, Flow)>,
    /// What the agent has not read yet.
    events: Vec<Input>,
    /// Events that found no room.
    lost: u64,
}

impl Kernel {
    fn tell(&mut self, event: Input, is_full: bool) {
        if is_full {
            self.lost += 1;
        } else {
            self.events.push(event);
        }
    }
}

/// How a pod stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Membership {
    Captured,
    /// Captured no more; its connections go on.
    Leaving,
    /// Captured no more, and all of its connections are over or cut.
    Outside,
}

/// What is true: who is enrolled, who has which address, what the policy says.
struct World {
    judgements: BTreeMap<(u64, u64), Judgement>,
    /// The pod at each address; a successor is another pod.
    at: Vec<Pod>,
    next_pod: u64,
    membership: Vec<Membership>,
    /// Which pods are endpoints of the service, and whether some pod of another node is.
    endpoints: Vec<bool>,
    elsewhere: bool,
    /// When the pair was denied or its pod replaced, for the second it may take.
    denied_since: BTreeMap<Pair, Duration>,
}

impl World {
    fn judge(&self, pair: &Pair) -> Judgement {
        let place = |pod: Pod| self.at.iter().position(|at| *at == pod);
        let (Some(client), Some(server)) = (place(pair.client), place(pair.server)) else {
            return Judgement::Deny;
        };
        let key = (client as u64, server as u64);
        let by_policy = self.judgements.get(&key).copied().unwrap_or(Judgement::Deny);
        let membership = [self.membership[client], self.membership[server]];
        if by_policy == Judgement::Deny || membership.contains(&Membership::Outside) {
            Judgement::Deny
        } else if membership.contains(&Membership::Leaving) {
            Judgement::Hold
        } else {
            by_policy
        }
    }

    /// All endpoints of the service for one client, which is none itself.
    fn spread(&self, vip: &Vip) -> Option<Vec<Pair>> {
        let client = self.at.iter().position(|at| *at == vip.client)?;
        let is_meant = |place: &u64| self.endpoints[*place as usize] && *place != client as u64;
        let places = (0..PODS).filter(is_meant);
        let pairs = places.map(|server| self.pair(client as u64, server)).collect();
        (!self.elsewhere).then_some(pairs)
    }

    fn vip(&self, client: u64) -> Vip {
        Vip { client: self.at[client as usize], address: SocketAddr::from(([10, 96, 0, 1], 80)) }
    }

    /// The kernel's own look: both are captured, and have the addresses.
    fn are_captured(&self, pair: &Pair) -> bool {
        [pair.client, pair.server].iter().all(|pod| {
            let place = self.at.iter().position(|at| at == pod);
            place.is_some_and(|place| self.membership[place] == Membership::Captured)
        })
    }

    fn pair(&self, client: u64, server: u64) -> Pair {
        let address = |place: u64| std::net::IpAddr::from([10, 0, 0, place as u8]);
        Pair {
            client: self.at[client as usize],
            client_address: address(client),
            server: self.at[server as usize],
            target: SocketAddr::new(address(server), 80),
        }
    }
}

impl Judge for &World {
    fn pair(&mut self, pair: &Pair) -> Judgement {
        self.judge(pair)
    }

    fn vip(&mut self, vip: &Vip) -> Option<Vec<Pair>> {
        self.spread(vip)
    }
}

fn new_ledger() -> Ledger {
    Ledger::new(Bounds { verdicts: 4, vips: 2, endpoints: 2, ..Bounds::default() })
}

struct Node {
    dice: Dice,
    now: Duration,
    world: World,
    kernel: Kernel,
    agent: Option<Ledger>,
    /// The agent stands still for a successor: what it knew of open connections.
    frozen: Option<(Ledger, Vec<(Pair, Flow)>)>,
    /// Events that had found no room when the agent looked last.
    lost_known: u64,
    faulty: bool,
    /// The queue has no room.
    full: bool,
    next_port: u16,
    /// Since when the agent has been there and nothing was refused.
    well_since: Duration,
}

impl Node {
    fn new(seed: u64) -> Self {
        let world = World {
            judgements: BTreeMap::new(),
            at: (0..PODS).map(Pod).collect(),
            next_pod: PODS,
            membership: vec![Membership::Captured; PODS as usize],
            endpoints: vec![true; PODS as usize],
            elsewhere: false,
            denied_since: BTreeMap::new(),
        };
        Self {
            dice: Dice(seed),
            now: Duration::from_secs(100),
            world,
            kernel: Kernel::default(),
            agent: Some(new_ledger()),
            frozen: None,
            lost_known: 0,
            faulty: false,
            full: false,
            next_port: 1024,
            well_since: Duration::ZERO,
        }
    }

    fn tell(&mut self, input: Input) {
        let Some(ledger) = &mut self.agent else { return };
        ledger.handle(input, self.now, &self.world);
        while let Some(command) = ledger.poll_command() {
            if self.faulty && self.dice.one_in(2) {
                ledger.refused(Refused(command), self.now);
                continue;
            }
            match command {
                Command::Permit(pair) => {
                    self.kernel.verdicts.insert(pair);
                }
                Command::Revoke(pair) => {
                    self.kernel.verdicts.remove(&pair);
                }
                Command::Spread(vip, pairs) => {
                    self.kernel.vips.insert(vip, pairs);
                }
                Command::Gather(vip) => {
                    self.kernel.vips.remove(&vip);
                }
                Command::Cut(pair, flow) => {
                    if self.kernel.open.remove(&(pair, flow)) {
                        self.kernel.tell(Input::Closed(pair, flow), self.full);
                    }
                }
            }
        }
    }

    /// Something has changed: what the kernel tells is heard first.
    fn changed(&mut self) {
        if self.agent.is_none() {
            return;
        }
        self.read_events();
        self.tell(Input::Changed);
    }

    fn find_untold(&mut self) {
        let Some(ledger) = &self.agent else { return };
        let known: BTreeSet<(Pair, Flow)> =
            ledger.open().map(|(pair, flow)| (*pair, flow)).collect();
        for (pair, flow) in self.kernel.open.clone() {
            if !known.contains(&(pair, flow)) {
                self.tell(Input::Opened(pair, flow));
            }
        }
    }

    /// The kernel's table has nothing of them any more.
    fn compare(&mut self) {
        let Some(ledger) = &self.agent else { return };
        let known: Vec<(Pair, Flow)> = ledger.open().map(|(pair, flow)| (*pair, flow)).collect();
        for (pair, flow) in known {
            if !self.kernel.open.contains(&(pair, flow)) {
                self.tell(Input::Closed(pair, flow));
            }
        }
    }

    /// A pod joins, leaves, or has left: what it had open is over by then, or is cut.
    fn move_pod(&mut self, place: usize) {
        self.world.membership[place] = match self.world.membership[place] {
            Membership::Captured => Membership::Leaving,
            Membership::Leaving if self.dice.one_in(2) => Membership::Outside,
            Membership::Leaving | Membership::Outside => Membership::Captured,
        };
        self.changed();
    }

    /// The agent stops for a successor, which takes its place or fails.
    fn hand_over(&mut self) {
        match self.frozen.take() {
            None => {
                self.read_events();
                self.frozen = self.agent.take().map(|ledger| {
                    let open = ledger.open().map(|(pair, flow)| (*pair, flow)).collect();
                    (ledger, open)
                });
            }
            Some((predecessor, _)) if self.dice.one_in(3) => {
                self.agent = Some(predecessor);
                self.changed();
            }
            Some((_, written)) => {
                self.agent = Some(new_ledger());
                for (pair, flow) in written {
                    self.tell(Input::Opened(pair, flow));
                }
                self.settle();
            }
        }
    }

    fn step(&mut self) {
        let (client, server) = (self.dice.below(PODS), self.dice.below(PODS));
        let pair = self.world.pair(client, server);
        match self.dice.below(16) {
            0 | 1 => {
                let judgement = match self.dice.below(4) {
                    0 => Judgement::Deny,
                    1 => Judgement::Hold,
                    _ => Judgement::Grant,
                };
                self.world.judgements.insert((client, server), judgement);
                if self.dice.one_in(3) {
                    // One word about all that the client dials.
                    let all = (0..PODS).map(|server| ((client, server), judgement));
                    self.world.judgements.extend(all);
                }
                self.changed();
                if self.dice.one_in(2) {
                    self.connect(pair);
                }
            }
            // A pod goes, and its address is another one's at once.
            2 => {
                self.world.at[client as usize] = Pod(self.world.next_pod);
                self.world.next_pod += 1;
                self.world.membership[client as usize] = Membership::Captured;
                self.changed();
            }
            3 | 4 => self.connect(pair),
            5 => self.connect(self.world.pair(server, client)),
            6 => {
                let nth = self.dice.below(self.kernel.open.len().max(1) as u64) as usize;
                if let Some((pair, flow)) = self.kernel.open.iter().nth(nth).copied() {
                    self.kernel.open.remove(&(pair, flow));
                    self.kernel.tell(Input::Closed(pair, flow), self.full);
                }
            }
            10 => self.move_pod(client as usize),
            11 => self.hand_over(),
            12 if self.dice.one_in(2) => self.full = !self.full,
            12 => self.compare(),
            13 | 14 => self.connect_to_service(client),
            // An endpoint comes or goes, here or elsewhere.
            15 => {
                let place = server as usize;
                match self.dice.below(4) {
                    0 => self.world.elsewhere = !self.world.elsewhere,
                    _ => self.world.endpoints[place] = !self.world.endpoints[place],
                }
                self.changed();
            }
            7 => self.read_events(),
            8 if self.dice.one_in(3) && self.frozen.is_none() => self.restart(),
            8 => self.faulty = !self.faulty && self.dice.one_in(2),
            _ => self.now += STEP * 5,
        }
        self.now += STEP;
        // The shell's own turn.
        if self.dice.one_in(4) || !self.faulty {
            self.read_events();
            self.tell(Input::Tick);
        }
        if let Some(lease) = self.agent.as_ref().and_then(|ledger| ledger.lease(self.now)) {
            self.kernel.lease = lease;
        }
        if self.faulty || self.agent.is_none() {
            self.well_since = self.now;
        }
        self.check();
    }

    /// The kernel's rule: by a verdict in force, between those who have the addresses now.
    fn connect(&mut self, pair: Pair) {
        // One that the agent took before there was a verdict is offered late.
        let late = self.dice.one_in(4);
        let captured = self.world.are_captured(&pair);
        let in_force = self.kernel.verdicts.contains(&pair) && self.now < self.kernel.lease;
        if !late && captured && in_force {
            let flow = Flow(SocketAddr::new(pair.client_address, self.next_port));
            self.next_port += 1;
            self.kernel.open.insert((pair, flow));
            self.kernel.tell(Input::Opened(pair, flow), self.full);
        } else if self.agent.is_some() && self.world.judge(&pair) != Judgement::Deny {
            self.tell(Input::Offered(pair));
        }
    }

    /// The kernel picks among the endpoints that it knows; else the agent chooses among all.
    fn connect_to_service(&mut self, client: u64) {
        let vip = self.world.vip(client);
        let in_force = self.now < self.kernel.lease;
        let picked = self
            .kernel
            .vips
            .get(&vip)
            .filter(|_| in_force)
            .map(|pairs| pairs[self.dice.below(pairs.len() as u64) as usize]);
        if let Some(pair) = picked
            && self.kernel.verdicts.contains(&pair)
        {
            self.connect(pair);
        } else {
            if let Some(pairs) = self.world.spread(&vip)
                && let Some(pair) = pairs.first()
            {
                self.connect(*pair);
            }
            self.tell(Input::OfferedVip(vip));
        }
    }

    fn read_events(&mut self) {
        if self.agent.is_none() {
            return;
        }
        // What is cut on the way closes, and is heard of in the second round.
        for _ in 0..2 {
            for event in std::mem::take(&mut self.kernel.events) {
                self.tell(event);
            }
        }
        if self.kernel.lost != self.lost_known {
            self.lost_known = self.kernel.lost;
            self.find_untold();
        }
    }

    fn restart(&mut self) {
        if self.agent.take().is_some() {
            return;
        }
        self.agent = Some(new_ledger());
        self.kernel.events.clear();
        self.settle();
    }

    /// Verdicts and connections are judged before anything else is heard.
    fn settle(&mut self) {
        self.lost_known = self.kernel.lost;
        self.find_untold();
        for pair in self.kernel.verdicts.clone() {
            self.tell(Input::Adopted(pair));
        }
        for (vip, pairs) in self.kernel.vips.clone() {
            self.tell(Input::AdoptedVip(vip, pairs));
        }
    }

    fn check(&mut self) {
        let stuck = self.agent.as_ref().is_some_and(|ledger| ledger.lease(self.now).is_none());
        for pair in &self.kernel.verdicts {
            let granted = self.world.judge(pair) == Judgement::Grant;
            // With no agent, or one that the kernel refuses, it ends with its lease.
            let lapses = self.agent.is_none() || stuck;
            assert!(granted || lapses, "a verdict that nobody grants: {pair:?}");
        }
        for (vip, pairs) in &self.kernel.vips {
            let granted = pairs.iter().all(|pair| self.world.judge(pair) == Judgement::Grant);
            let right = granted && self.world.spread(vip).as_ref() == Some(pairs);
            let lapses = self.agent.is_none() || stuck;
            assert!(right || lapses, "a virtual address that leads elsewhere: {vip:?} {pairs:?}");
        }
        if let Some(ledger) = self.agent.as_ref().filter(|ledger| ledger.next_try().is_none()) {
            let believed: BTreeMap<Vip, Vec<Pair>> =
                ledger.vips().map(|(vip, pairs)| (*vip, pairs.to_vec())).collect();
            assert_eq!(believed, self.kernel.vips, "ledger and kernel differ");
            let permitted = ledger.vips().flat_map(|(_, pairs)| pairs);
            assert!(permitted.into_iter().all(|pair| ledger.is_permitted(pair)), "without verdict");
            let believed: BTreeSet<Pair> = ledger.permitted().copied().collect();
            assert_eq!(believed, self.kernel.verdicts, "ledger and kernel differ");
        }
        let longest = self.now + Bounds::default().lease;
        assert!(self.kernel.lease <= longest, "the lease outlives its keeper");
        let denied = |pair: &Pair| self.world.judge(pair) == Judgement::Deny;
        let open: BTreeSet<Pair> = self.kernel.open.iter().map(|(pair, _)| *pair).collect();
        self.world.denied_since = open
            .into_iter()
            .filter(denied)
            .map(|pair| (pair, *self.world.denied_since.get(&pair).unwrap_or(&self.now)))
            .collect();
        for (pair, since) in &self.world.denied_since {
            let since = (*since).max(self.well_since);
            assert!(self.now - since <= CUT_WITHIN, "a denied connection lives: {pair:?}");
        }
    }
}

#[test]
fn no_seed_leaves_a_verdict_that_the_policy_does_not_grant() {
    for seed in 0..SEEDS {
        let outcome = std::panic::catch_unwind(|| {
            let mut node = Node::new(seed);
            for _ in 0..STEPS {
                node.step();
            }
            node.kernel.verdicts.len() + node.kernel.vips.len() + node.kernel.open.len()
        });
        assert!(outcome.is_ok(), "seed {seed}");
    }
}

#[test]
fn the_simulation_reaches_what_it_judges() {
    let (mut verdicts, mut vips, mut widest, mut open) = (0, 0, 0, 0);
    for seed in 0..1000 {
        let mut node = Node::new(seed);
        for _ in 0..STEPS {
            node.step();
            let Kernel { verdicts: held, vips: spread, open: alive, .. } = &node.kernel;
            verdicts = verdicts.max(held.len());
            vips = vips.max(spread.len());
            widest = widest.max(spread.values().map(Vec::len).max().unwrap_or(0));
            open = open.max(alive.len());
        }
    }
    assert!(
        verdicts >= 2 && vips >= 2 && widest >= 2 && open >= 2,
        "{verdicts} verdicts, {vips} virtual addresses of {widest} endpoints, {open} connections at most"
    );
}
