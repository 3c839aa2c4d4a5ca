//! The direct path between two pods of one node: verdicts that the agent has taken, and what is told
//! of the connections that were made by them.

use crate::{Address, FlowKey, Port};

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
