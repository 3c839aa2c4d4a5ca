//! The interfaces of a pod and their other ends on the node, by route netlink (rtnetlink(7)).

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read, Write};

use crate::sys;

/// An interface as `RTM_GETLINK` shows it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Interface {
    /// Its index.
    pub(crate) index: u32,
    /// Its name.
    pub(crate) name: String,
    /// Its kind (`veth`, `macvlan` …); none for hardware and loopback.
    pub(crate) kind: Option<String>,
    /// Index of its other end or of what it stands on.
    pub(crate) link: Option<u32>,
    /// That one is in another namespace.
    pub(crate) link_is_elsewhere: bool,
    /// `lo`.
    pub(crate) is_loopback: bool,
}

/// How a pod is connected.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Uplinks {
    /// Indices of the host-side ends, at least one.
    Guardable(Vec<u32>),
    /// None at all.
    None,
    /// This interface leads out of the pod, but its other end is not a veth on this node.
    Unguardable(Interface),
}

/// The interfaces that lead out of a pod.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct WaysOut {
    /// Indices of host-side ends that a guard can stand on.
    pub(crate) guardable: Vec<u32>,
    /// Those whose other end is not a veth on this node.
    pub(crate) unguardable: Vec<Interface>,
}

/// Finds the ways out of a pod. What lives wholly inside the pod (dummies, bridges, tunnels over its veth) needs no
/// guard; what leads out otherwise than by a veth to this node cannot have one.
pub(crate) fn ways_out(pod: &[Interface], node: &[Interface]) -> WaysOut {
    let on_node: BTreeMap<u32, &Interface> =
        node.iter().map(|interface| (interface.index, interface)).collect();
    let mut found = WaysOut::default();
    for interface in pod.iter().filter(|interface| !interface.is_loopback) {
        let leads_out = interface.kind.is_none() || interface.link_is_elsewhere;
        if !leads_out {
            continue;
        }
        let other_end = interface.link.and_then(|link| on_node.get(&link)).filter(|other| {
            interface.kind.as_deref() == Some("veth")
                && other.kind.as_deref() == Some("veth")
                && other.link == Some(interface.index)
        });
        match other_end {
            Some(other) => found.guardable.push(other.index),
            None => found.unguardable.push(interface.clone()),
        }
    }
    found
}

/// The host-side ends of a pod that is to be enrolled, all of which must be guardable.
pub(crate) fn uplinks(pod: &[Interface], node: &[Interface]) -> Uplinks {
    let WaysOut { guardable, mut unguardable } = ways_out(pod, node);
    if !unguardable.is_empty() {
        Uplinks::Unguardable(unguardable.swap_remove(0))
    } else if guardable.is_empty() {
        Uplinks::None
    } else {
        Uplinks::Guardable(guardable)
    }
}

const RTM_NEWLINK: u16 = 16;
const RTM_GETLINK: u16 = 18;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
/// `NLM_F_REQUEST | NLM_F_DUMP`
const REQUEST_DUMP: u16 = 0x301;
const MESSAGE_HEADER_OCTETS: usize = 16;
/// `struct ifinfomsg`
const LINK_HEADER_OCTETS: usize = 16;
const ARPHRD_LOOPBACK: u16 = 772;
const IFLA_IFNAME: u16 = 3;
const IFLA_LINK: u16 = 5;
const IFLA_LINKINFO: u16 = 18;
const IFLA_LINK_NETNSID: u16 = 37;
const IFLA_INFO_KIND: u16 = 1;
/// The kernel fills at most 32 KiB per read of a dump.
const RECEIVE_OCTETS: usize = 64 * 1024;

/// All interfaces of the calling thread's network namespace.
pub(crate) fn list() -> io::Result<Vec<Interface>> {
    let mut socket = File::from(sys::route_socket()?);
    let mut request = Vec::with_capacity(MESSAGE_HEADER_OCTETS + LINK_HEADER_OCTETS);
    request.extend(32_u32.to_ne_bytes());
    request.extend(RTM_GETLINK.to_ne_bytes());
    request.extend(REQUEST_DUMP.to_ne_bytes());
    request.extend([0; 8]);
    request.extend([0; LINK_HEADER_OCTETS]);
    socket.write_all(&request)?;

    let mut interfaces = Vec::new();
    let mut buffer = vec![0; RECEIVE_OCTETS];
    loop {
        let length = socket.read(&mut buffer)?;
        if length == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        if parse_messages(&buffer[..length], &mut interfaces)? {
            return Ok(interfaces);
        }
    }
}

/// Adds the links of a datagram of messages; whether the dump is complete.
fn parse_messages(mut rest: &[u8], interfaces: &mut Vec<Interface>) -> io::Result<bool> {
    while let Some((&header, body)) = rest.split_first_chunk::<MESSAGE_HEADER_OCTETS>() {
        let length = u32::from_ne_bytes([header[0], header[1], header[2], header[3]]) as usize;
        let kind = u16::from_ne_bytes([header[4], header[5]]);
        let payload = length
            .checked_sub(MESSAGE_HEADER_OCTETS)
            .and_then(|octets| body.get(..octets))
            .ok_or(io::ErrorKind::InvalidData)?;
        match kind {
            NLMSG_DONE => return Ok(true),
            NLMSG_ERROR => {
                let code = payload
                    .first_chunk()
                    .map_or(0, |code: &[u8; 4]| i32::from_ne_bytes(*code).saturating_neg());
                return Err(io::Error::from_raw_os_error(code));
            }
            RTM_NEWLINK => interfaces.extend(parse_link(payload)),
            _ => {}
        }
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    Ok(false)
}

fn parse_link(payload: &[u8]) -> Option<Interface> {
    let (header, attributes) = payload.split_first_chunk::<LINK_HEADER_OCTETS>()?;
    let mut interface = Interface {
        index: u32::from_ne_bytes([header[4], header[5], header[6], header[7]]),
        is_loopback: u16::from_ne_bytes([header[2], header[3]]) == ARPHRD_LOOPBACK,
        ..Interface::default()
    };
    for (kind, value) in Attributes(attributes) {
        match kind {
            IFLA_IFNAME => interface.name = text(value),
            IFLA_LINK => {
                interface.link = value.first_chunk().map(|index| u32::from_ne_bytes(*index));
            }
            IFLA_LINK_NETNSID => interface.link_is_elsewhere = true,
            IFLA_LINKINFO => {
                interface.kind = Attributes(value)
                    .find(|(kind, _)| *kind == IFLA_INFO_KIND)
                    .map(|(_, value)| text(value));
            }
            _ => {}
        }
    }
    Some(interface)
}

fn text(value: &[u8]) -> String {
    String::from_utf8_lossy(value).trim_end_matches('\0').to_owned()
}

/// Attributes of a netlink message: length, type, value, padded to four octets.
struct Attributes<'a>(&'a [u8]);

impl<'a> Iterator for Attributes<'a> {
    type Item = (u16, &'a [u8]);

    fn next(&mut self) -> Option<Self::Item> {
        const FLAGS: u16 = 0xc000;
        let (&[a, b, c, d], _) = self.0.split_first_chunk::<4>()?;
        let length = usize::from(u16::from_ne_bytes([a, b]));
        let value = self.0.get(4..length)?;
        self.0 = self.0.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((u16::from_ne_bytes([c, d]) & !FLAGS, value))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn veth(index: u32, link: u32) -> Interface {
        Interface {
            index,
            name: format!("v{index}"),
            kind: Some("veth".to_owned()),
            link: Some(link),
            link_is_elsewhere: true,
            is_loopback: false,
        }
    }

    #[test]
    fn only_a_veth_to_this_node_can_be_guarded() {
        let check = |pod: &[Interface], expected: Uplinks| {
            let node = [veth(7, 2), veth(9, 2), veth(11, 3)];
            assert_eq!(uplinks(pod, &node), expected);
        };
        let lo = Interface { index: 1, is_loopback: true, ..Interface::default() };
        let dummy = Interface { index: 5, kind: Some("dummy".to_owned()), ..Interface::default() };
        let inner = Interface { link_is_elsewhere: false, ..veth(6, 8) };
        let macvlan = Interface { kind: Some("macvlan".to_owned()), ..veth(2, 7) };
        let hardware = Interface { index: 4, ..Interface::default() };
        check(&[lo.clone(), veth(2, 7)], Uplinks::Guardable(vec![7]));
        check(&[veth(2, 9), veth(3, 11), dummy.clone(), inner], Uplinks::Guardable(vec![9, 11]));
        check(&[lo, dummy], Uplinks::None);
        check(std::slice::from_ref(&macvlan), Uplinks::Unguardable(macvlan.clone()));
        check(&[veth(2, 7), hardware.clone()], Uplinks::Unguardable(hardware));
        check(&[veth(3, 7)], Uplinks::Unguardable(veth(3, 7)));
    }

    #[test]
    fn truncated_messages_are_refused_not_read() {
        let mut interfaces = Vec::new();
        assert!(
            parse_messages(&[200, 0, 0, 0, 16, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0], &mut interfaces)
                .is_err()
        );
        assert!(
            parse_messages(&[3, 0, 0, 0, 16, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0], &mut interfaces)
                .is_err()
        );
        assert!(!parse_messages(&[], &mut interfaces).unwrap());
        assert!(parse_link(&[0; 20]).is_some());
        assert!(parse_link(&[0; 3]).is_none());
        assert!(interfaces.is_empty());
    }
}
