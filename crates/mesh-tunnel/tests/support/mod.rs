//! What the tests share: a random number generator, a network in memory, sessions and keys.
#![allow(dead_code, reason = "each test binary uses its own part")]
#![allow(clippy::unwrap_used, reason = "a test's own values are valid")]
#![allow(unreachable_pub, missing_docs, missing_debug_implementations, reason = "test support")]

pub mod net;
pub mod peer;
pub mod permit;
pub mod stock;
pub mod tap;

use std::time::Instant;

use mesh_model::{PodUid, SpiffeId, WorkloadUid, splitmix};
use mesh_tunnel::{ConnectHead, Suite, TlsSession, TrafficSecret, TunnelKey};

/// SplitMix64: small, and good enough to scatter tests.
#[derive(Clone)]
pub struct Rng(pub u64);

impl Rng {
    pub fn next(&mut self) -> u64 {
        splitmix::next(&mut self.0)
    }

    /// In `0..bound`.
    pub fn below(&mut self, bound: usize) -> usize {
        let bound = u64::try_from(bound.max(1)).expect("64 bits at most");
        usize::try_from(self.next() % bound).expect("below a usize")
    }

    pub fn chance(&mut self, percent: usize) -> bool {
        self.below(100) < percent
    }
}

#[expect(clippy::disallowed_methods, reason = "virtual time needs some instant to start from")]
pub fn epoch() -> Instant {
    Instant::now()
}

#[expect(clippy::disallowed_methods, reason = "the number of seeds is chosen from outside")]
pub fn seeds(default: u64) -> std::ops::Range<u64> {
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse().ok());
    let first = number("CULVERT_SIM_FIRST").unwrap_or(0);
    first..first + number("CULVERT_SIM_SEEDS").unwrap_or(default)
}

/// Both ends of a finished handshake.
pub fn sessions(suite: Suite, rng: &mut Rng) -> (TlsSession, TlsSession) {
    let mut secret = || {
        let bytes: Vec<u8> = (0..suite.secret_len()).map(|_| rng.next().to_be_bytes()[0]).collect();
        TrafficSecret::new(suite, &bytes).unwrap()
    };
    let (up, down) = (secret(), secret());
    let session = |tx: &TrafficSecret, rx: &TrafficSecret| TlsSession {
        suite,
        tx: tx.clone(),
        rx: rx.clone(),
        tx_seq: 0,
        rx_seq: 0,
        leftover: Vec::new(),
    };
    (session(&up, &down), session(&down, &up))
}

pub fn key(target: &str) -> TunnelKey {
    TunnelKey {
        pod: PodUid::new("client-pod"),
        source: SpiffeId::new("cluster.local", "shop", "client").unwrap(),
        source_ip: [10, 0, 0, 1].into(),
        next_hop: ([10, 0, 0, 2], 15008).into(),
        target_uid: WorkloadUid::new(target),
        expected: vec![SpiffeId::new("cluster.local", "shop", "server").unwrap()],
    }
}

pub fn head(authority: &str) -> ConnectHead {
    ConnectHead {
        authority: authority.to_owned(),
        baggage: Some("k8s.namespace.name=shop".into()),
        ..ConnectHead::default()
    }
}

/// The byte at a place of a stream; depends on the place, so that lost, doubled and swapped bytes show.
pub fn pattern(stream: u64, at: u64) -> u8 {
    let mixed = (at ^ stream.wrapping_mul(0x9e37_79b9)).wrapping_mul(0x2545_f491_4f6c_dd1d);
    mixed.to_be_bytes()[0]
}
