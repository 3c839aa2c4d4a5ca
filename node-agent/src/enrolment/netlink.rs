//! The few routing requests that enrolment needs, spoken to the kernel directly.
//!
//! A netlink socket belongs to the namespace it was made in, so [`Netlink::open`] is called on a thread that is inside the
//! pod's; afterwards any thread may use it. Source: `rtnetlink(7)`, Linux `uapi/linux/{rtnetlink,fib_rules}.h`.

use std::io;
use std::net::Ipv6Addr;
use std::os::fd::{AsRawFd, OwnedFd};

use nix::sys::socket::sockopt::ReceiveTimeout;
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, send,
    setsockopt, socket,
};
use nix::sys::time::TimeVal;

/// An address family that has routes of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

/// Add or take away.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Change {
    /// Add; what is there already is fine.
    Add,
    /// Remove; what is not there is fine.
    Remove,
}

/// One routing socket.
#[derive(Debug)]
pub(crate) struct Netlink {
    socket: OwnedFd,
    sequence: u32,
}

/// The kernel answers at once or not at all.
const ANSWER_SECONDS: i64 = 5;
/// The loopback interface is the first of every namespace. Source: Linux `loopback_net_init`.
const LOOPBACK_INDEX: u32 = 1;

impl Netlink {
    /// A socket in the calling thread's namespace.
    pub(crate) fn open() -> io::Result<Self> {
        let socket = socket(
            AddressFamily::Netlink,
            SockType::Raw,
            SockFlag::SOCK_CLOEXEC,
            SockProtocol::NetlinkRoute,
        )?;
        setsockopt(&socket, ReceiveTimeout, &TimeVal::new(ANSWER_SECONDS, 0))?;
        bind(socket.as_raw_fd(), &NetlinkAddr::new(0, 0))?;
        Ok(Self { socket, sequence: 0 })
    }

    /// `ip link set lo up`.
    pub(crate) fn loopback_up(&mut self) -> io::Result<()> {
        let up = u32::try_from(libc::IFF_UP).unwrap_or(1);
        let mut body = vec![0; 4]; // family, padding, device type
        body.extend(LOOPBACK_INDEX.to_ne_bytes());
        body.extend(up.to_ne_bytes());
        body.extend(up.to_ne_bytes());
        self.request(libc::RTM_NEWLINK, 0, &body)
    }

    /// `ip route add local default dev lo table TABLE`.
    pub(crate) fn local_default(
        &mut self,
        change: Change,
        family: Family,
        table: u8,
    ) -> io::Result<()> {
        let mut body = vec![
            family.number(),
            0, // destination: any
            0, // source: any
            0, // type of service: any
            table,
            libc::RTPROT_STATIC,
            libc::RT_SCOPE_HOST,
            libc::RTN_LOCAL,
        ];
        body.extend([0; 4]); // flags
        attribute(&mut body, libc::RTA_OIF, LOOPBACK_INDEX);
        attribute(&mut body, libc::RTA_TABLE, u32::from(table));
        self.change(change, (libc::RTM_NEWROUTE, libc::RTM_DELROUTE), &body)
    }

    /// `ip rule add fwmark MARK lookup TABLE pref PRIORITY`.
    pub(crate) fn mark_rule(
        &mut self,
        change: Change,
        family: Family,
        rule: MarkRule,
    ) -> io::Result<()> {
        let mut body = vec![
            family.number(),
            0, // destination: any
            0, // source: any
            0, // type of service: any
            rule.table,
            0,
            0,
            FR_ACT_TO_TBL,
        ];
        body.extend([0; 4]); // flags
        attribute(&mut body, FRA_PRIORITY, rule.priority);
        attribute(&mut body, FRA_FWMARK, rule.mark);
        attribute(&mut body, FRA_FWMASK, u32::MAX);
        attribute(&mut body, FRA_TABLE, u32::from(rule.table));
        self.change(change, (libc::RTM_NEWRULE, libc::RTM_DELRULE), &body)
    }

    /// Whether a packet with the rule's mark to some far address is led to `lo` by the rule's table, which needs
    /// [`mark_rule`](Self::mark_rule), [`local_default`](Self::local_default) and [`loopback_up`](Self::loopback_up):
    /// `ip route get ADDRESS mark MARK fibmatch`.
    pub(crate) fn leads_to_loopback(&mut self, family: Family, rule: MarkRule) -> io::Result<bool> {
        let far = family.far_address();
        let bits = u8::try_from(far.len() * 8).unwrap_or(u8::MAX);
        let mut body = vec![family.number(), bits, 0, 0, 0, 0, 0, 0];
        body.extend(RTM_F_LOOKUP_TABLE.to_ne_bytes());
        let length = u16::try_from(4 + far.len()).unwrap_or(u16::MAX);
        body.extend(length.to_ne_bytes());
        body.extend(libc::RTA_DST.to_ne_bytes());
        body.extend(far);
        attribute(&mut body, RTA_MARK, rule.mark);
        self.send(libc::RTM_GETROUTE, 0, &body)?;
        let mut answer = [0; 4096];
        let length = recv(self.socket.as_raw_fd(), &mut answer, MsgFlags::empty())?;
        let answer = &answer[..length];
        if let Some(Err(error)) = acknowledgement(answer, self.sequence) {
            let nowhere = [libc::ENETUNREACH, libc::EHOSTUNREACH, libc::EINVAL, libc::EACCES];
            return match error.raw_os_error() {
                Some(code) if nowhere.contains(&code) => Ok(false),
                _ => Err(error),
            };
        }
        Ok(route_of(answer) == Some((rule.table, libc::RTN_LOCAL)))
    }

    fn change(&mut self, change: Change, (add, remove): (u16, u16), body: &[u8]) -> io::Result<()> {
        let (kind, flags, harmless): (u16, libc::c_int, &[i32]) = match change {
            Change::Add => (add, libc::NLM_F_CREATE | libc::NLM_F_EXCL, &[libc::EEXIST]),
            Change::Remove => (remove, 0, &[libc::ENOENT, libc::ESRCH, libc::EAFNOSUPPORT]),
        };
        match self.request(kind, flags, body) {
            Err(error) if error.raw_os_error().is_some_and(|code| harmless.contains(&code)) => {
                Ok(())
            }
            done => done,
        }
    }

    /// Sends one request and waits for its acknowledgement.
    fn request(&mut self, kind: u16, flags: libc::c_int, body: &[u8]) -> io::Result<()> {
        self.send(kind, libc::NLM_F_ACK | flags, body)?;
        loop {
            let mut answer = [0; 4096];
            let length = recv(self.socket.as_raw_fd(), &mut answer, MsgFlags::empty())?;
            if let Some(done) = acknowledgement(&answer[..length], self.sequence) {
                return done;
            }
        }
    }

    fn send(&mut self, kind: u16, flags: libc::c_int, body: &[u8]) -> io::Result<()> {
        self.sequence += 1;
        let flags = u16::try_from(libc::NLM_F_REQUEST | flags)
            .map_err(|_too_wide| io::Error::from(io::ErrorKind::InvalidInput))?;
        let length = u32::try_from(HEADER_BYTES + body.len())
            .map_err(|_too_long| io::Error::from(io::ErrorKind::InvalidInput))?;
        let mut message = Vec::with_capacity(HEADER_BYTES + body.len());
        message.extend(length.to_ne_bytes());
        message.extend(kind.to_ne_bytes());
        message.extend(flags.to_ne_bytes());
        message.extend(self.sequence.to_ne_bytes());
        message.extend(0_u32.to_ne_bytes()); // port: the kernel's choice
        message.extend(body);
        send(self.socket.as_raw_fd(), &message, MsgFlags::empty())?;
        Ok(())
    }
}

/// A rule that sends marked packets to a table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct MarkRule {
    /// The mark, compared in full.
    pub(crate) mark: u32,
    /// The table.
    pub(crate) table: u8,
    /// Its place; lower is earlier.
    pub(crate) priority: u32,
}

const HEADER_BYTES: usize = 16;
const FR_ACT_TO_TBL: u8 = 1;
const FRA_PRIORITY: u16 = 6;
const FRA_FWMARK: u16 = 10;
const FRA_TABLE: u16 = 15;
const FRA_FWMASK: u16 = 16;
const RTA_MARK: u16 = 16;
/// The answer names the table that was found.
const RTM_F_LOOKUP_TABLE: u32 = 0x1000;

impl Family {
    fn number(self) -> u8 {
        let number = match self {
            Self::V4 => libc::AF_INET,
            Self::V6 => libc::AF_INET6,
        };
        u8::try_from(number).unwrap_or_default()
    }

    /// An address for documentation, which no pod has. Source: RFC 5737, RFC 3849.
    fn far_address(self) -> Vec<u8> {
        match self {
            Self::V4 => [198, 51, 100, 1].to_vec(),
            Self::V6 => Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1).octets().to_vec(),
        }
    }
}

/// A 32-bit attribute; its 8 bytes need no padding.
fn attribute(body: &mut Vec<u8>, kind: u16, value: u32) {
    body.extend(8_u16.to_ne_bytes());
    body.extend(kind.to_ne_bytes());
    body.extend(value.to_ne_bytes());
}

/// Table and type of a route in an answer to `RTM_GETROUTE`.
fn route_of(answer: &[u8]) -> Option<(u8, u8)> {
    let kind = u16::from_ne_bytes([*answer.get(4)?, *answer.get(5)?]);
    let route = answer.get(HEADER_BYTES..HEADER_BYTES + 8)?;
    (kind == libc::RTM_NEWROUTE).then(|| (route[4], route[7]))
}

/// The result in a datagram of answers, if it holds that of request `sequence`.
fn acknowledgement(mut answers: &[u8], sequence: u32) -> Option<io::Result<()>> {
    let word = |bytes: &[u8], at: usize| {
        bytes.get(at..at + 4).and_then(|four| four.try_into().ok()).map(u32::from_ne_bytes)
    };
    while let Some(length) = word(answers, 0) {
        let length = usize::try_from(length).ok()?;
        let message = answers.get(..length).filter(|message| message.len() >= HEADER_BYTES)?;
        let kind = u16::from_ne_bytes([message[4], message[5]]);
        let is_error = i32::from(kind) == libc::NLMSG_ERROR;
        if is_error && word(message, 8) == Some(sequence) {
            let code = i32::from_ne_bytes(word(message, HEADER_BYTES)?.to_ne_bytes());
            return Some(match code {
                0 => Ok(()),
                negative => Err(io::Error::from_raw_os_error(-negative)),
            });
        }
        answers = answers.get(length.next_multiple_of(4)..)?;
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(sequence: u32, code: i32) -> Vec<u8> {
        let kind = u16::try_from(libc::NLMSG_ERROR).unwrap();
        let mut message = Vec::new();
        message.extend(20_u32.to_ne_bytes());
        message.extend(kind.to_ne_bytes());
        message.extend(0_u16.to_ne_bytes());
        message.extend(sequence.to_ne_bytes());
        message.extend(0_u32.to_ne_bytes());
        message.extend(code.to_ne_bytes());
        message
    }

    #[test]
    fn the_answer_to_another_request_is_skipped() {
        let both = [answer(1, -17), answer(2, 0)].concat();
        assert!(acknowledgement(&both, 2).unwrap().is_ok());
        let error = acknowledgement(&both, 1).unwrap().unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EEXIST));
        assert!(acknowledgement(&both, 3).is_none());
    }

    #[test]
    fn broken_answers_are_no_answers() {
        let good = answer(1, 0);
        for length in 0..good.len() {
            assert!(acknowledgement(&good[..length], 1).is_none(), "{length}");
        }
        for length in 0..24 {
            assert_eq!(route_of(&vec![0; length]), None);
        }
        let mut endless = good.clone();
        endless[0] = 0;
        assert!(acknowledgement(&endless, 1).is_none());
    }
}
