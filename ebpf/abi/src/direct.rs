//! The direct path between two pods of one node: verdicts that the agent has taken, and what is told
//! of the connections that were made by them.

use crate::{Address, Endpoint, FlowKey, Port};

/// A pair of pods that may talk without the agent, at one port.
///
/// Pods are named by the cookies of their network namespaces, which a machine gives once between
/// two boots: a pod that gets the address of another one never finds that one's verdict.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DirectKey {
    /// The client's network namespace.
    pub client_cookie: u64,
    /// The server's network namespace.
    pub server_cookie: u64,
    /// The client's address.
    pub client: Address,
    /// The server's address.
    pub server: Address,
    /// The server's port.
    pub port: Port,
    padding: u16,
    more_padding: u32,
}

const _: () = assert!(size_of::<DirectKey>() == 56);

impl DirectKey {
    /// From its parts.
    #[inline(always)]
    pub const fn new(
        (client_cookie, client): (u64, Address),
        (server_cookie, server): (u64, Address),
        port: Port,
    ) -> Self {
        Self { client_cookie, server_cookie, client, server, port, padding: 0, more_padding: 0 }
    }
}

/// A virtual address and port of a service, as one client dials it.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct VipKey {
    /// The client's network namespace.
    pub client_cookie: u64,
    /// The virtual address.
    pub vip: Endpoint,
}

const _: () = assert!(size_of::<VipKey>() == 32);

impl VipKey {
    /// From its parts.
    #[inline(always)]
    pub const fn new(client_cookie: u64, vip: Endpoint) -> Self {
        Self { client_cookie, vip }
    }

    /// Equality that compiles to word compares.
    #[inline(always)]
    pub const fn same(&self, other: &Self) -> bool {
        self.client_cookie == other.client_cookie && self.vip.same(&other.vip)
    }
}

/// Endpoints of a virtual address at most; with more of them the agent chooses.
pub const VIP_ENDPOINTS: usize = 8;

/// The endpoints of a service among which the kernel's side may choose, each with the same chance. Each
/// still needs its pair's own verdict.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VipEndpoints {
    /// Whose they are. The kernel may reuse an element while a program reads it: who compares this after
    /// everything else has read one and the same element.
    pub key: VipKey,
    /// How many there are.
    pub count: u32,
    padding: u32,
    endpoints: [Endpoint; VIP_ENDPOINTS],
}

const _: () = assert!(size_of::<VipEndpoints>() == 232);

impl VipEndpoints {
    /// Of these endpoints; none when there are none or too many.
    #[must_use]
    pub fn new(key: VipKey, endpoints: &[Endpoint]) -> Option<Self> {
        let mut all = [Endpoint::default(); VIP_ENDPOINTS];
        all.get_mut(..endpoints.len())?.copy_from_slice(endpoints);
        let count = u32::try_from(endpoints.len()).ok().filter(|count| *count > 0)?;
        Some(Self { key, count, padding: 0, endpoints: all })
    }

    /// The endpoints.
    pub fn endpoints(&self) -> &[Endpoint] {
        let count = usize::try_from(self.count).unwrap_or(VIP_ENDPOINTS);
        self.endpoints.get(..count).unwrap_or(&self.endpoints)
    }

    /// The one that a random number picks, evenly.
    #[inline(always)]
    pub const fn pick(&self, random: u32) -> &Endpoint {
        let nth = ((random as u64 * self.count as u64) >> 32) as usize;
        // Masked by the array's length, so that the verifier sees the bound whatever `count` says.
        &self.endpoints[nth & (VIP_ENDPOINTS - 1)]
    }
}

const _: () = assert!(VIP_ENDPOINTS.is_power_of_two());

/// By which virtual address a direct connection was dialled.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DialledVip {
    /// The virtual address.
    pub vip: Endpoint,
    /// When its SYN left. Nanoseconds of the monotonic clock.
    pub since_ns: u64,
}

const _: () = assert!(size_of::<DialledVip>() == 32);

/// What happened to a direct connection.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DirectEventKind {
    /// The client's handshake is done.
    Opened = 1,
    /// The client's socket closed; without [`Opened`](Self::Opened) before it the server refused.
    ClientClosed = 2,
    /// The server's socket closed.
    ServerClosed = 3,
}

/// One event of a direct connection, in a queue for the agent.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DirectEvent {
    /// The connection as the client sees it.
    pub flow: FlowKey,
    /// The client's network namespace; 0 when its address is nobody's any more.
    pub client_cookie: u64,
    /// The server's network namespace; 0 when its address is nobody's any more.
    pub server_cookie: u64,
    /// When. Nanoseconds of the monotonic clock.
    pub at_ns: u64,
    /// Octets of payload that this side sent and the other one acknowledged; at a close only.
    pub sent_octets: u64,
    /// A [`DirectEventKind`].
    pub kind: u32,
    /// 1 when both directions had been ended in order; at a close only.
    pub orderly: u32,
}

const _: () = assert!(size_of::<DirectEvent>() == 80);

/// States of a TCP socket (`include/net/tcp_states.h`).
pub mod tcp_state {
    /// The handshake is done.
    pub const ESTABLISHED: u32 = 1;
    /// The client's SYN is out.
    pub const SYN_SENT: u32 = 2;
    /// This side has ended, and the other one has acknowledged it.
    pub const FIN_WAIT2: u32 = 5;
    /// Closed.
    pub const CLOSE: u32 = 7;
    /// The other side has ended, then this one.
    pub const LAST_ACK: u32 = 9;
    /// Both have ended at once.
    pub const CLOSING: u32 = 11;
}

/// Octets of payload among those that a closing socket counts as acknowledged, which hold its SYN and
/// FIN too (`tcp_snd_una_update`), and whether it ended in order. `last_state` is the one before
/// [`CLOSE`](tcp_state::CLOSE), `all_acknowledged` that nothing sent is open.
#[inline(always)]
pub const fn payload_acknowledged(
    is_client: bool,
    last_state: u32,
    all_acknowledged: bool,
    acknowledged: u64,
) -> (u64, bool) {
    let both_ended = last_state == tcp_state::LAST_ACK || last_state == tcp_state::CLOSING;
    let own_end = last_state == tcp_state::FIN_WAIT2 || (both_ended && all_acknowledged);
    let sequence_only = is_client as u64 + own_end as u64;
    (acknowledged.saturating_sub(sequence_only), own_end)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_endpoint_is_picked_as_often_as_the_others() {
        let key = VipKey::new(1, Endpoint::default());
        let endpoint =
            |port: usize| Endpoint::new(Address::NONE, Port::new(u16::try_from(port).unwrap()));
        assert_eq!(VipEndpoints::new(key, &[]), None);
        assert_eq!(VipEndpoints::new(key, &[endpoint(1); VIP_ENDPOINTS + 1]), None);
        for count in 1..=VIP_ENDPOINTS {
            let all: Vec<_> = (0..count).map(endpoint).collect();
            let vip = VipEndpoints::new(key, &all).unwrap();
            assert_eq!(vip.endpoints(), all);
            let mut picked = vec![0; count];
            const ROUNDS: u32 = 1 << 16;
            for round in 0..ROUNDS {
                picked[usize::from(vip.pick(round << 16).port.get())] += 1;
            }
            let (least, most) = (picked.iter().min().unwrap(), picked.iter().max().unwrap());
            assert!(most - least <= 1, "{picked:?}");
        }
    }

    #[test]
    fn sequence_numbers_of_syn_and_fin_are_no_payload() {
        let check = |client: bool, state: u32, all: bool, counted: u64, expected: (u64, bool)| {
            assert_eq!(payload_acknowledged(client, state, all, counted), expected, "{state}");
        };
        check(true, tcp_state::FIN_WAIT2, true, 102, (100, true));
        check(false, tcp_state::LAST_ACK, true, 101, (100, true));
        check(false, tcp_state::CLOSING, true, 101, (100, true));
        // Reset before its FIN was acknowledged, while open, and before it was open at all.
        check(true, tcp_state::LAST_ACK, false, 101, (100, false));
        check(true, tcp_state::ESTABLISHED, true, 101, (100, false));
        check(true, tcp_state::SYN_SENT, true, 0, (0, false));
    }
}
