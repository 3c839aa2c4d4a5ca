//! Who may have a token reviewed, and how often.
//!
//! The API server is asked about every token that is not known, so whoever reaches the controller could keep it busy with
//! false ones. Tokens that were found good before come first; all others take turns by the address they come from, and an
//! address whose tokens are refused waits. What was refused a moment ago is refused again without asking.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use aws_lc_rs::digest::{SHA256, digest as hash};
use tokio::sync::Semaphore;

use crate::ca::authenticate::Unauthenticated;

/// How long a token that was good once is preferred. Kubelet replaces an agent's before an hour is over.
const KNOWN_FOR: Duration = Duration::from_secs(3600);
/// How long a refused token is refused without asking. A pod that was just bound may be unknown for a moment.
const REFUSED_FOR: Duration = Duration::from_secs(10);
/// Refused tokens in a row that cost an address no wait.
const BURST: u32 = 10;
/// After this long an address may have one more token refused.
const REFILL: Duration = Duration::from_secs(2);
/// Questions of one address at once.
const TURNS: usize = 2;
/// Callers of one address that wait for their turn; a node that starts asks several things at once.
const MAX_WAITING: usize = 64;
/// Addresses and tokens remembered at most, each. Addresses beyond it share one place; tokens are forgotten.
const MAX_REMEMBERED: usize = 4_096;

/// Stands for a token, so that none is kept.
pub(super) type TokenDigest = [u8; 32];

/// The digest of a token.
pub(super) fn digest(token: &str) -> TokenDigest {
    let mut digest = TokenDigest::default();
    digest.copy_from_slice(hash(&SHA256, token.as_bytes()).as_ref());
    digest
}

/// Where a caller comes from: an IPv4 address, or the network of an IPv6 address, since whoever has one has all of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Origin(Option<IpAddr>);

impl Origin {
    pub(super) fn of(source: Option<IpAddr>) -> Self {
        Self(source.map(|address| match address.to_canonical() {
            IpAddr::V4(address) => IpAddr::V4(address),
            IpAddr::V6(address) => {
                IpAddr::V6(Ipv6Addr::from(u128::from(address) & (u128::MAX << 64)))
            }
        }))
    }
}

/// Tokens and addresses as they were seen.
#[derive(Debug, Default)]
pub(super) struct Gate {
    known: BTreeMap<TokenDigest, Instant>,
    refused: BTreeMap<TokenDigest, (Instant, Unauthenticated)>,
    addresses: BTreeMap<Origin, Address>,
}

#[derive(Debug)]
struct Address {
    turns: Arc<Semaphore>,
    waiting: usize,
    /// Refusals that cost no wait, as of `counted`.
    left: u32,
    counted: Instant,
}

impl Address {
    fn new(now: Instant) -> Self {
        Self { turns: Arc::new(Semaphore::new(TURNS)), waiting: 0, left: BURST, counted: now }
    }

    fn refill(&mut self, now: Instant) {
        while self.left < BURST && now.duration_since(self.counted) >= REFILL {
            self.left += 1;
            self.counted += REFILL;
        }
        if self.left == BURST {
            self.counted = now;
        }
    }
}

impl Gate {
    /// True for a token that was good within the last hour.
    pub(super) fn knows(&self, token: &TokenDigest, now: Instant) -> bool {
        self.known.get(token).is_some_and(|until| now < *until)
    }

    /// Why the token is refused without asking.
    pub(super) fn refused(&self, token: &TokenDigest, now: Instant) -> Option<Unauthenticated> {
        self.refused.get(token).filter(|(until, _)| now < *until).map(|(_, why)| why.clone())
    }

    /// Puts a caller into its address's queue, whose turns are returned. [`leave`](Self::leave) must follow.
    ///
    /// # Errors
    /// Too many wait there.
    pub(super) fn queue(
        &mut self,
        origin: Origin,
        now: Instant,
    ) -> Result<Arc<Semaphore>, Unauthenticated> {
        let address = self.address(origin, now);
        if address.waiting >= MAX_WAITING {
            return Err(Unauthenticated::Throttled);
        }
        address.waiting += 1;
        Ok(Arc::clone(&address.turns))
    }

    /// The caller does not wait any more.
    pub(super) fn leave(&mut self, origin: Origin, now: Instant) {
        let address = self.address(origin, now);
        address.waiting = address.waiting.saturating_sub(1);
    }

    /// Takes one refusal from what an address has left, for the time of the question.
    ///
    /// # Errors
    /// Nothing is left.
    pub(super) fn spend(&mut self, origin: Origin, now: Instant) -> Result<(), Unauthenticated> {
        let address = self.address(origin, now);
        address.left = address.left.checked_sub(1).ok_or(Unauthenticated::Throttled)?;
        Ok(())
    }

    /// Takes in the answer to a question; `payer` is who paid for it with [`spend`](Self::spend), none for a known token.
    pub(super) fn answered(
        &mut self,
        payer: Option<Origin>,
        token: TokenDigest,
        refusal: Option<&Unauthenticated>,
        now: Instant,
    ) {
        match refusal {
            None => {
                self.give_back(payer, now);
                make_room(&mut self.known, |until| now < *until);
                self.known.insert(token, now + KNOWN_FOR);
            }
            Some(Unauthenticated::Refused { .. }) => {
                self.known.remove(&token);
                make_room(&mut self.refused, |(until, _)| now < *until);
                if let Some(why) = refusal {
                    self.refused.insert(token, (now + REFUSED_FOR, why.clone()));
                }
            }
            // It says nothing of the token.
            Some(
                Unauthenticated::Missing
                | Unauthenticated::NotBearer
                | Unauthenticated::Throttled
                | Unauthenticated::Unavailable { .. },
            ) => self.give_back(payer, now),
        }
    }

    fn give_back(&mut self, payer: Option<Origin>, now: Instant) {
        let Some(origin) = payer else { return };
        let address = self.address(origin, now);
        address.left = BURST.min(address.left + 1);
    }

    /// The place of an address; a full table has one for all further ones.
    fn address(&mut self, origin: Origin, now: Instant) -> &mut Address {
        let mut origin = origin;
        if !self.addresses.contains_key(&origin) && self.addresses.len() >= MAX_REMEMBERED {
            self.addresses.retain(|_, address| {
                address.refill(now);
                address.waiting > 0 || address.left < BURST
            });
            if self.addresses.len() >= MAX_REMEMBERED {
                origin = Origin(None);
            }
        }
        let address = self.addresses.entry(origin).or_insert_with(|| Address::new(now));
        address.refill(now);
        address
    }
}

/// Forgets what is over; everything, when that is not enough.
fn make_room<T>(entries: &mut BTreeMap<TokenDigest, T>, is_current: impl Fn(&T) -> bool) {
    if entries.len() >= MAX_REMEMBERED {
        entries.retain(|_, entry| is_current(entry));
    }
    if entries.len() >= MAX_REMEMBERED {
        entries.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal() -> Unauthenticated {
        Unauthenticated::Refused { word: "not_accepted", detail: "no".into() }
    }

    fn from(last: u32) -> Origin {
        Origin::of(Some(IpAddr::from(last.to_be_bytes())))
    }

    #[test]
    fn an_address_whose_tokens_are_refused_waits_and_others_do_not() {
        let mut gate = Gate::default();
        let start = Instant::now();
        for number in 0..BURST {
            gate.spend(from(1), start).unwrap();
            gate.answered(Some(from(1)), digest(&number.to_string()), Some(&refusal()), start);
        }
        assert_eq!(gate.spend(from(1), start), Err(Unauthenticated::Throttled));
        gate.spend(from(2), start).unwrap();
        assert_eq!(gate.spend(from(1), start + REFILL / 2), Err(Unauthenticated::Throttled));
        gate.spend(from(1), start + REFILL).unwrap();
        assert_eq!(gate.spend(from(1), start + REFILL), Err(Unauthenticated::Throttled));
        for later in 0..BURST {
            gate.spend(from(1), start + REFILL * 1000).unwrap_or_else(|_| panic!("{later}"));
        }
        assert!(gate.spend(from(1), start + REFILL * 1000).is_err(), "no more than the burst");
    }

    #[test]
    fn good_tokens_cost_nothing_and_are_preferred() {
        let mut gate = Gate::default();
        let now = Instant::now();
        for _ in 0..100 {
            gate.spend(from(1), now).unwrap();
            gate.answered(Some(from(1)), digest("good"), None, now);
        }
        assert!(gate.knows(&digest("good"), now));
        assert!(!gate.knows(&digest("good"), now + KNOWN_FOR));
        gate.answered(Some(from(1)), digest("good"), Some(&refusal()), now);
        assert!(!gate.knows(&digest("good"), now), "it was taken back");
        assert_eq!(gate.refused(&digest("good"), now), Some(refusal()));
        assert_eq!(gate.refused(&digest("good"), now + REFUSED_FOR), None);
    }

    #[test]
    fn an_api_server_that_is_away_is_nobodys_fault() {
        let mut gate = Gate::default();
        let now = Instant::now();
        let away = Unauthenticated::Unavailable { detail: "away".into() };
        for _ in 0..100 {
            gate.spend(from(1), now).unwrap();
            gate.answered(Some(from(1)), digest("good"), Some(&away), now);
        }
        assert_eq!(gate.refused(&digest("good"), now), None);
    }

    #[test]
    fn everything_is_bounded() {
        let mut gate = Gate::default();
        let now = Instant::now();
        for number in 0..20_000 {
            if gate.spend(from(number), now).is_ok() {
                gate.answered(
                    Some(from(number)),
                    digest(&number.to_string()),
                    Some(&refusal()),
                    now,
                );
            }
            gate.answered(None, digest(&format!("good{number}")), None, now);
        }
        assert!(gate.addresses.len() <= MAX_REMEMBERED + 1);
        assert!(gate.refused.len() <= MAX_REMEMBERED && gate.known.len() <= MAX_REMEMBERED);
        assert!(gate.spend(from(30_000), now).is_err(), "addresses beyond the table share a place");
        gate.spend(from(30_000), now + REFILL * BURST).expect("places are free again");
        for _ in 0..MAX_WAITING {
            gate.queue(from(7), now).unwrap();
        }
        assert!(gate.queue(from(7), now).is_err());
        gate.leave(from(7), now);
        gate.queue(from(7), now).expect("one has left");
    }

    #[test]
    fn an_ipv6_network_is_one_caller() {
        let of = |text: &str| Origin::of(Some(text.parse().unwrap()));
        assert_eq!(of("fd00::1"), of("fd00::ffff:2"));
        assert_ne!(of("fd00::1"), of("fd00:0:0:1::1"));
        assert_eq!(of("::ffff:10.0.0.1"), of("10.0.0.1"));
        assert_ne!(of("10.0.0.1"), of("10.0.0.2"));
    }
}
