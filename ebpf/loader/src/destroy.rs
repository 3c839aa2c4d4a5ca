//! Ending sockets of pods from outside, by sock_diag netlink (sock_diag(7), `SOCK_DESTROY`).

use std::fs::File;
use std::io::{self, Read, Write};

use mesh_ebpf_abi::FlowKey;

use crate::sys;

const SOCK_DIAG_BY_FAMILY: u16 = 20;
const SOCK_DESTROY: u16 = 21;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
/// Where the cookie is in `struct inet_diag_msg`: behind four octets of state, the ports, the addresses and the interface.
const COOKIE_AT: usize = 4 + 4 + 32 + 4;
/// `INET_DIAG_NOCOOKIE`
const NO_COOKIE: [u8; 8] = [0xff; 8];
const TCP_LISTEN: u8 = 10;
/// `NLM_F_REQUEST`
const REQUEST: u16 = 0x1;
/// `NLM_F_REQUEST | NLM_F_ACK`
const REQUEST_ACK: u16 = 0x5;
/// `NLM_F_REQUEST | NLM_F_DUMP`
const REQUEST_DUMP: u16 = 0x301;
const HEADER_OCTETS: usize = 16;
/// `struct inet_diag_req_v2`
const REQUEST_OCTETS: usize = 56;
const AF_INET: u8 = 2;
const AF_INET6: u8 = 10;
const IPPROTO_TCP: u8 = 6;
const RECEIVE_OCTETS: usize = 64 * 1024;

/// Ends the socket of `flow` in the calling thread's network namespace: its owner sees
/// `ECONNABORTED`, its peer a reset. Whether there was one.
///
/// Fails with `ENOENT` of the dump that [`probe`] makes when the kernel lacks `tcp_diag`, and with
/// `EOPNOTSUPP` when it lacks `CONFIG_INET_DIAG_DESTROY`.
///
/// The kernel takes a listener for the flow's socket where there is none, also one that a program steers to: the agent's
/// own. So it is asked first, and what it found is ended by its cookie.
pub(crate) fn destroy(flow: &FlowKey) -> io::Result<bool> {
    let gone =
        |error: &io::Error| matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ESTALE));
    let asked = request(SOCK_DIAG_BY_FAMILY, REQUEST, Some(flow), NO_COOKIE);
    let found = match exchange(&asked) {
        Ok(found) => found.ok_or(io::ErrorKind::InvalidData)?,
        Err(error) if gone(&error) => return Ok(false),
        Err(error) => return Err(error),
    };
    if found.state == TCP_LISTEN {
        return Ok(false);
    }
    match exchange(&request(SOCK_DESTROY, REQUEST_ACK, Some(flow), found.cookie)) {
        Ok(_) => Ok(true),
        Err(error) if gone(&error) => Ok(false),
        Err(error) => Err(error),
    }
}

/// What the kernel says of a socket, of `struct inet_diag_msg`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Found {
    state: u8,
    cookie: [u8; 8],
}

impl Found {
    fn read(message: &[u8]) -> Option<Self> {
        Some(Self { state: *message.get(1)?, cookie: *message.get(COOKIE_AT..)?.first_chunk()? })
    }
}

/// Whether sockets can be ended; the error says what the kernel lacks. Called in an empty namespace.
pub(crate) fn probe() -> io::Result<()> {
    // A missing module and a missing socket are one error to SOCK_DESTROY, not to a dump.
    exchange(&request(SOCK_DIAG_BY_FAMILY, REQUEST_DUMP, None, NO_COOKIE))?;
    let nobody = mesh_ebpf_abi::Address::v4([192, 0, 2, 1]);
    let port = mesh_ebpf_abi::Port::new(9);
    let flow = FlowKey::new(IPPROTO_TCP, (nobody, port), (nobody, port));
    match exchange(&request(SOCK_DESTROY, REQUEST_ACK, Some(&flow), NO_COOKIE)) {
        Err(error) if error.raw_os_error() != Some(libc::ENOENT) => Err(error),
        Ok(_) | Err(_) => Ok(()),
    }
}

/// Sends `request`, and returns the socket in the answer, if it is one.
fn exchange(request: &[u8]) -> io::Result<Option<Found>> {
    let mut socket = File::from(sys::diag_socket()?);
    socket.write_all(request)?;
    let mut buffer = vec![0; RECEIVE_OCTETS];
    loop {
        let length = socket.read(&mut buffer)?;
        if length == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        if let Some(outcome) = outcome(&buffer[..length])? {
            return outcome;
        }
    }
}

/// An IPv4 address stands for sockets of both families: the kernel keeps mapped ones with the others.
fn request(kind: u16, flags: u16, flow: Option<&FlowKey>, cookie: [u8; 8]) -> Vec<u8> {
    let mut message = Vec::with_capacity(HEADER_OCTETS + REQUEST_OCTETS);
    message.extend(72_u32.to_ne_bytes());
    message.extend(kind.to_ne_bytes());
    message.extend(flags.to_ne_bytes());
    message.extend([0; 8]);
    let is_v4 = flow.is_none_or(|flow| flow.local.is_v4());
    message.extend([if is_v4 { AF_INET } else { AF_INET6 }, IPPROTO_TCP, 0, 0]);
    // All states, of a dump none.
    message.extend(if flow.is_some() { u32::MAX } else { 0 }.to_ne_bytes());
    let (mut ports, mut addresses) = ([0; 4], [0; 32]);
    if let Some(flow) = flow {
        ports[..2].copy_from_slice(&flow.local_port.get().to_be_bytes());
        ports[2..].copy_from_slice(&flow.remote_port.get().to_be_bytes());
        for (address, into) in [flow.local, flow.remote].iter().zip(addresses.chunks_exact_mut(16))
        {
            if is_v4 {
                into[..4].copy_from_slice(&address.octets()[12..]);
            } else {
                into.copy_from_slice(&address.octets());
            }
        }
    }
    message.extend(ports);
    message.extend(addresses);
    message.extend(0_u32.to_ne_bytes());
    message.extend(cookie);
    message
}

/// What the kernel says at last; none while a dump goes on.
fn outcome(mut rest: &[u8]) -> io::Result<Option<io::Result<Option<Found>>>> {
    while let Some((&header, body)) = rest.split_first_chunk::<HEADER_OCTETS>() {
        let length = u32::from_ne_bytes([header[0], header[1], header[2], header[3]]) as usize;
        let kind = u16::from_ne_bytes([header[4], header[5]]);
        if length < HEADER_OCTETS {
            return Err(io::ErrorKind::InvalidData.into());
        }
        match kind {
            NLMSG_DONE => return Ok(Some(Ok(None))),
            NLMSG_ERROR => {
                let code: &[u8; 4] = body.first_chunk().ok_or(io::ErrorKind::InvalidData)?;
                let code = i32::from_ne_bytes(*code).saturating_neg();
                let outcome =
                    if code == 0 { Ok(None) } else { Err(io::Error::from_raw_os_error(code)) };
                return Ok(Some(outcome));
            }
            // Alone, not one of a dump (`NLM_F_MULTI`).
            SOCK_DIAG_BY_FAMILY if header[6] & 2 == 0 => return Ok(Some(Ok(Found::read(body)))),
            _ => {}
        }
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;
    use mesh_ebpf_abi::{Address, Port};

    #[test]
    fn a_request_has_the_kernels_shape() {
        let local = (Address::v4([10, 0, 0, 1]), Port::new(4000));
        let remote = (Address::v4([10, 0, 0, 2]), Port::new(80));
        let message =
            request(SOCK_DESTROY, REQUEST_ACK, Some(&FlowKey::new(6, local, remote)), NO_COOKIE);
        assert_eq!(message.len(), HEADER_OCTETS + REQUEST_OCTETS);
        assert_eq!(message[16..18], [AF_INET, IPPROTO_TCP]);
        assert_eq!(message[24..28], [0x0f, 0xa0, 0, 80]);
        assert_eq!(message[28..32], [10, 0, 0, 1]);
        assert_eq!(message[44..48], [10, 0, 0, 2]);
    }

    #[test]
    fn damaged_answers_are_refused_not_read() {
        assert!(outcome(&[0; 16]).is_err());
        assert!(outcome(&[16, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]).is_err());
        assert!(outcome(&[]).unwrap().is_none());
        assert!(matches!(
            outcome(&[16, 0, 0, 0, 3, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]),
            Ok(Some(Ok(None)))
        ));
        let answer = |octets: usize| {
            let mut answer = vec![0; HEADER_OCTETS + octets];
            let length = u32::try_from(HEADER_OCTETS + octets).unwrap();
            answer[..4].copy_from_slice(&length.to_ne_bytes());
            answer[4] = 20;
            answer[17] = TCP_LISTEN;
            answer
        };
        assert!(matches!(outcome(&answer(50)), Ok(Some(Ok(None)))));
        let found = Found { state: TCP_LISTEN, cookie: [0; 8] };
        assert_eq!(outcome(&answer(72)).unwrap().unwrap().unwrap(), Some(found));
    }
}
