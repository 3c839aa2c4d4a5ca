//! The guard's table of permitted TCP and UDP flows, and the keys of original destinations.

use crate::packet::TcpFlags;
use crate::{Address, Port};

/// A flow as the pod sees it.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FlowKey {
    /// The pod's address.
    pub local: Address,
    /// The other side's address.
    pub remote: Address,
    /// The pod's port.
    pub local_port: Port,
    /// The other side's port.
    pub remote_port: Port,
    /// TCP or UDP, see [`protocol`](crate::protocol).
    pub protocol: u32,
}

const _: () = assert!(size_of::<FlowKey>() == 40);

impl FlowKey {
    /// From its parts.
    #[inline(always)]
    pub const fn new(
        protocol: u8,
        (local, local_port): (Address, Port),
        (remote, remote_port): (Address, Port),
    ) -> Self {
        Self { local, remote, local_port, remote_port, protocol: protocol as u32 }
    }
}

/// Why a flow is permitted.
#[repr(u8)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FlowOrigin {
    /// A labelled socket of the agent.
    Agent = 1,
    /// A connection that the pod's settings exclude from capture.
    Excluded = 2,
    /// An accepted connection.
    Inbound = 3,
    /// A connection that existed when the pod was enrolled.
    Seeded = 4,
    /// The agent's connection to the application under its client's address. It lives inside the
    /// pod; the guard never sees it, `sk_lookup` tells it by this entry from one made by others.
    Delivery = 5,
    /// A connection that went straight to another pod of the node by a verdict, at its client.
    Direct = 6,
    /// The same at its server.
    DirectAccepted = 7,
}

/// A permitted flow with an open socket.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FlowState {
    /// The pod's network namespace.
    pub netns_cookie: u64,
    /// When it was registered. Nanoseconds of the monotonic clock.
    pub registered_ns: u64,
    /// A [`FlowOrigin`].
    pub origin: u32,
    padding: u32,
}

const _: () = assert!(size_of::<FlowState>() == 24);

impl FlowState {
    /// From its parts.
    #[inline(always)]
    pub const fn new(netns_cookie: u64, registered_ns: u64, origin: FlowOrigin) -> Self {
        Self { netns_cookie, registered_ns, origin: origin as u32, padding: 0 }
    }
}

/// What may pass on a tuple that has no open socket: out of the pod, segments without payload only.
///
/// Kept in an LRU map, so that a flood of SYNs evicts other floods and closed connections, never an
/// open one.
#[repr(u8)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Remains {
    /// A SYN arrived from outside: the kernel may answer SYN-ACK or RST. Nothing may be sent in on
    /// it before it is [`Admitted`](Self::Admitted).
    Arrived = 1,
    /// The socket closed: last acknowledgements (TIME_WAIT, RFC 9293 §3.6) and resets may leave.
    Closed = 2,
    /// A segment arrived for which there was no SYN, a predecessor's on a reused address: RST.
    Stray = 3,
    /// A connection that arrived and went where it should: to the agent, or past it because the
    /// pod's settings say so. Once it is accepted it may be answered.
    Admitted = 4,
    /// One that arrived from another pod of the node, by a verdict, and went to the application.
    Direct = 5,
}

impl Remains {
    /// Whether such a connection went where it should. `remains` is a [`Remains`] as stored.
    #[inline(always)]
    pub const fn is_admitted(remains: u8) -> bool {
        remains == Self::Admitted as u8 || remains == Self::Direct as u8
    }
}

/// Whether a segment may leave on a tuple without open socket. `remains` is a [`Remains`] as stored.
#[inline(always)]
pub const fn permits_after_close(remains: u8, flags: TcpFlags, empty: bool) -> bool {
    if !empty {
        return false;
    }
    if flags.has(TcpFlags::RST) {
        return true;
    }
    if remains == Remains::Closed as u8 {
        return !flags.has(TcpFlags::SYN);
    }
    (remains == Remains::Arrived as u8 || Remains::is_admitted(remains))
        && flags.has(TcpFlags::SYN)
        && flags.has(TcpFlags::ACK)
}

/// Whether payload may enter the pod on a tuple without open socket; to strays and to closed
/// connections the kernel then answers with RST. `remains` is a [`Remains`] as stored.
#[inline(always)]
pub const fn admits_payload(remains: u8) -> bool {
    remains != Remains::Arrived as u8
}

/// Who asked: a client socket inside a pod, by its source address.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ClientKey {
    /// The pod's network namespace.
    pub netns_cookie: u64,
    /// The client's source address.
    pub address: Address,
    /// The client's source port.
    pub port: Port,
    /// The agent's port that it was sent to: one source address may lead to several.
    pub listener: Port,
    padding: u32,
}

const _: () = assert!(size_of::<ClientKey>() == 32);

impl ClientKey {
    /// From its parts.
    #[inline(always)]
    pub const fn new(netns_cookie: u64, (address, port): (Address, Port), listener: Port) -> Self {
        Self { netns_cookie, address, port, listener, padding: 0 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_an_open_socket_only_empty_answers_leave() {
        let check = |remains: Remains, flags: u8, empty: bool, expected: bool| {
            assert_eq!(
                permits_after_close(remains as u8, TcpFlags(flags), empty),
                expected,
                "{remains:?} {flags:#x} {empty}"
            );
        };
        const SYN: u8 = TcpFlags::SYN;
        const ACK: u8 = TcpFlags::ACK;
        const RST: u8 = TcpFlags::RST;
        const FIN: u8 = TcpFlags::FIN;
        check(Remains::Arrived, SYN | ACK, true, true);
        check(Remains::Arrived, RST, true, true);
        check(Remains::Arrived, RST | ACK, true, true);
        check(Remains::Arrived, ACK, true, false);
        check(Remains::Arrived, SYN, true, false);
        check(Remains::Arrived, SYN | ACK, false, false);
        check(Remains::Closed, ACK, true, true);
        check(Remains::Closed, FIN | ACK, true, true);
        check(Remains::Closed, RST, true, true);
        check(Remains::Closed, SYN, true, false);
        check(Remains::Closed, ACK, false, false);
        check(Remains::Closed, RST, false, false);
        check(Remains::Stray, RST | ACK, true, true);
        check(Remains::Stray, SYN | ACK, true, false);
        check(Remains::Stray, ACK, true, false);
        check(Remains::Admitted, SYN | ACK, true, true);
        check(Remains::Admitted, SYN | ACK, false, false);
        check(Remains::Admitted, ACK, true, false);
        check(Remains::Direct, SYN | ACK, true, true);
        check(Remains::Direct, ACK, true, false);
    }

    #[test]
    fn payload_enters_only_behind_an_admitted_syn() {
        let check = |remains: Remains, expected: bool| {
            assert_eq!(admits_payload(remains as u8), expected, "{remains:?}");
        };
        check(Remains::Arrived, false);
        check(Remains::Admitted, true);
        check(Remains::Direct, true);
        check(Remains::Closed, true);
        check(Remains::Stray, true);
    }
}
