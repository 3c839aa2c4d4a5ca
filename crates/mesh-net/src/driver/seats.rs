//! Who holds the handshakes in flight: a bound, and a fair share of it for every pod and every address.
//!
//! Below the bound everybody is admitted. At the bound somebody leaves or the newcomer is refused, so that whoever has
//! taken most pays: the pod with most handshakes, in it the address with most, of that the oldest one whose peer has
//! not said a word. A peer that talks is put out only for a newcomer with a smaller share than its own, so that a flood
//! of legitimate peers finishes what it has begun instead of starting over and over.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use mesh_model::PodUid;
use mesh_tunnel::SockId;

/// Whom a handshake counts against: the pod that dials or is dialled, and the address at the far end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Holder {
    pub(super) pod: PodUid,
    pub(super) address: IpAddr,
}

/// What becomes of a newcomer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Admission {
    /// There is room.
    Free,
    /// There is room once this one has left.
    Instead(SockId),
    /// There is none.
    Refused,
}

/// One kind of handshakes, dialled or accepted.
#[derive(Debug)]
pub(super) struct Seats {
    limit: usize,
    pods: BTreeMap<PodUid, Pod>,
    by_sock: BTreeMap<SockId, Seat>,
    next: u64,
}

#[derive(Debug, Default)]
struct Pod {
    taken: usize,
    addresses: BTreeMap<IpAddr, Address>,
}

/// Seats in the order they were taken.
#[derive(Debug, Default)]
struct Address {
    silent: BTreeSet<(u64, SockId)>,
    talking: BTreeSet<(u64, SockId)>,
}

#[derive(Debug)]
struct Seat {
    holder: Holder,
    number: u64,
}

impl Address {
    fn taken(&self) -> usize {
        self.silent.len() + self.talking.len()
    }
}

impl Pod {
    /// The oldest silent seat of the address with most seats among those with silent ones.
    fn oldest_silent(&self) -> Option<SockId> {
        self.addresses
            .values()
            .filter_map(|address| Some((address.taken(), address.silent.first()?)))
            // Of equal shares, the oldest.
            .max_by_key(|(taken, (number, _))| (*taken, u64::MAX - number))
            .map(|(_, (_, sock))| *sock)
    }

    fn heaviest(&self) -> Option<&Address> {
        self.addresses.values().max_by_key(|address| address.taken())
    }

    fn share_of(&self, address: IpAddr) -> usize {
        self.addresses.get(&address).map_or(0, Address::taken)
    }
}

impl Seats {
    pub(super) const fn new(limit: usize) -> Self {
        Self { limit, pods: BTreeMap::new(), by_sock: BTreeMap::new(), next: 0 }
    }

    /// Seats taken.
    pub(super) fn len(&self) -> usize {
        self.by_sock.len()
    }

    /// What would become of `newcomer`.
    pub(super) fn admit(&self, newcomer: &Holder) -> Admission {
        if self.by_sock.len() < self.limit {
            return Admission::Free;
        }
        let Some((heaviest, pod)) = self.pods.iter().max_by_key(|(_, pod)| pod.taken) else {
            return Admission::Refused;
        };
        if let Some(silent) = pod.oldest_silent() {
            return Admission::Instead(silent);
        }
        let own = self.pods.get(&newcomer.pod);
        let Some(address) = pod.heaviest() else { return Admission::Refused };
        let smaller = if *heaviest == newcomer.pod {
            pod.share_of(newcomer.address) + 1 < address.taken()
        } else {
            own.map_or(0, |own| own.taken) + 1 < pod.taken
        };
        match address.talking.first() {
            Some((_, sock)) if smaller => Admission::Instead(*sock),
            Some(_) | None => Admission::Refused,
        }
    }

    /// Takes a seat. `sock` has none yet.
    pub(super) fn take(&mut self, sock: SockId, holder: Holder) {
        let number = self.next;
        self.next += 1;
        let pod = self.pods.entry(holder.pod.clone()).or_default();
        pod.taken += 1;
        pod.addresses.entry(holder.address).or_default().silent.insert((number, sock));
        self.by_sock.insert(sock, Seat { holder, number });
    }

    /// The peer of `sock` has said something that makes sense so far.
    pub(super) fn heard(&mut self, sock: SockId) {
        let Some(Seat { holder, number }) = self.by_sock.get(&sock) else { return };
        let address =
            self.pods.get_mut(&holder.pod).and_then(|pod| pod.addresses.get_mut(&holder.address));
        if let Some(address) = address
            && address.silent.remove(&(*number, sock))
        {
            address.talking.insert((*number, sock));
        }
    }

    /// Gives the seat of `sock` back, if it has one.
    pub(super) fn leave(&mut self, sock: SockId) {
        let Some(Seat { holder, number }) = self.by_sock.remove(&sock) else { return };
        let Some(pod) = self.pods.get_mut(&holder.pod) else { return };
        pod.taken -= 1;
        if let Some(address) = pod.addresses.get_mut(&holder.address) {
            address.silent.remove(&(number, sock));
            address.talking.remove(&(number, sock));
            if address.taken() == 0 {
                pod.addresses.remove(&holder.address);
            }
        }
        if pod.taken == 0 {
            self.pods.remove(&holder.pod);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn holder(pod: &str, host: u8) -> Holder {
        Holder { pod: PodUid::new(pod), address: IpAddr::from([10, 0, 0, host]) }
    }

    /// Admits as the driver does; the seat that had to leave, or why none was given.
    fn arrive(seats: &mut Seats, sock: u64, holder: Holder) -> Admission {
        let admission = seats.admit(&holder);
        match admission {
            Admission::Free => {}
            Admission::Instead(out) => seats.leave(out),
            Admission::Refused => return admission,
        }
        seats.take(SockId(sock), holder);
        admission
    }

    #[test]
    fn a_silent_flood_pays_for_every_newcomer_itself() {
        let mut seats = Seats::new(8);
        for sock in 0..100 {
            let admission = arrive(&mut seats, sock, holder("victim", 66));
            let expected =
                if sock < 8 { Admission::Free } else { Admission::Instead(SockId(sock - 8)) };
            assert_eq!(admission, expected);
        }
        // A real peer of the same pod, and one of another.
        for (sock, pod) in [(200, "victim"), (201, "other")] {
            assert!(matches!(arrive(&mut seats, sock, holder(pod, 1)), Admission::Instead(_)));
        }
        for sock in 300..400 {
            arrive(&mut seats, sock, holder("victim", 66));
        }
        assert!(
            seats.by_sock.contains_key(&SockId(200)) && seats.by_sock.contains_key(&SockId(201))
        );
        assert_eq!(seats.by_sock.len(), 8);
    }

    #[test]
    fn those_who_talk_leave_only_for_a_smaller_share() {
        let mut seats = Seats::new(4);
        for sock in 0..4 {
            arrive(&mut seats, sock, holder("victim", 66));
            seats.heard(SockId(sock));
        }
        assert_eq!(seats.admit(&holder("victim", 66)), Admission::Refused);
        assert_eq!(arrive(&mut seats, 10, holder("victim", 1)), Admission::Instead(SockId(0)));
        assert_eq!(arrive(&mut seats, 11, holder("other", 2)), Admission::Instead(SockId(10)));
    }

    #[test]
    fn nothing_is_kept_of_those_who_left() {
        let mut seats = Seats::new(4);
        for sock in 0..4 {
            arrive(&mut seats, sock, holder("pod", u8::try_from(sock).unwrap()));
            if sock % 2 == 0 {
                seats.heard(SockId(sock));
            }
        }
        for sock in 0..6 {
            seats.leave(SockId(sock));
        }
        assert!(seats.pods.is_empty() && seats.by_sock.is_empty());
    }
}
