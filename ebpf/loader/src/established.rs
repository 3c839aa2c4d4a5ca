//! The TCP sockets that a pod has when it is enrolled, from `/proc/net/tcp` and `tcp6`.
//!
//! Chosen over `sock_diag`, whose module need not be there (`tcp_diag` on Debian's 6.1).

use std::fs::File;
use std::io::{self, BufRead, BufReader};

use mesh_ebpf_abi::{Address, FlowKey, Port, protocol};

/// A TCP socket with a peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Connection {
    /// Its addresses.
    pub(crate) flow: FlowKey,
    /// Only the kernel holds it, for last acknowledgements.
    pub(crate) in_time_wait: bool,
}

/// All connections of the calling thread's network namespace.
pub(crate) fn list() -> io::Result<Vec<Connection>> {
    let mut connections = Vec::new();
    for name in ["/proc/thread-self/net/tcp", "/proc/thread-self/net/tcp6"] {
        let file = match File::open(name) {
            Ok(file) => file,
            // A kernel without IPv6 has no tcp6.
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(error),
        };
        for line in BufReader::with_capacity(64 * 1024, file).lines() {
            connections.extend(parse_line(&line?));
        }
    }
    Ok(connections)
}

const TIME_WAIT: u8 = 0x06;
const CLOSE: u8 = 0x07;
const LISTEN: u8 = 0x0a;

/// Reads `  sl: LOCAL:PORT REMOTE:PORT STATE …`; none for the title, for listeners and for what is
/// not understood.
fn parse_line(line: &str) -> Option<Connection> {
    let mut fields = line.split_ascii_whitespace().skip(1);
    let local = parse_endpoint(fields.next()?)?;
    let remote = parse_endpoint(fields.next()?)?;
    let state = u8::from_str_radix(fields.next()?, 16).ok()?;
    if matches!(state, CLOSE | LISTEN) {
        return None;
    }
    Some(Connection {
        flow: FlowKey::new(protocol::TCP, local, remote),
        in_time_wait: state == TIME_WAIT,
    })
}

/// Addresses are printed as 32-bit numbers of the machine's byte order, ports in network order.
fn parse_endpoint(text: &str) -> Option<(Address, Port)> {
    let (address, port) = text.split_once(':')?;
    let port = Port::new(u16::from_str_radix(port, 16).ok()?);
    let word = |at: usize| u32::from_str_radix(address.get(at * 8..at * 8 + 8)?, 16).ok();
    let address = match address.len() {
        8 => Address::from_word(word(0)?),
        32 => Address::from_words([word(0)?, word(1)?, word(2)?, word(3)?]),
        _ => return None,
    };
    Some((address, port))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_both_families_are_read() {
        let check = |line: &str, expected: Option<(&str, &str, bool)>| {
            let found = parse_line(line).map(|connection| {
                let show = |address: Address, port: Port| {
                    std::net::SocketAddr::new(address.ip(), port.get()).to_string()
                };
                let flow = connection.flow;
                (
                    show(flow.local, flow.local_port),
                    show(flow.remote, flow.remote_port),
                    connection.in_time_wait,
                )
            });
            let expected =
                expected.map(|(local, remote, waits)| (local.to_owned(), remote.to_owned(), waits));
            assert_eq!(found, expected, "{line}");
        };
        check("  sl  local_address rem_address   st tx_queue", None);
        check("   0: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:0", None);
        check(
            "   1: 0B015B0A:D2F0 09025B0A:0050 01 00000000:00000000",
            Some(("10.91.1.11:54000", "10.91.2.9:80", false)),
        );
        check(
            "   2: 0B015B0A:D2F0 09025B0A:0050 06 0",
            Some(("10.91.1.11:54000", "10.91.2.9:80", true)),
        );
        check(
            "   0: 0000000000000000FFFF00000B015B0A:D2F0 0000000000000000FFFF000009025B0A:0050 01 0",
            Some(("10.91.1.11:54000", "10.91.2.9:80", false)),
        );
        check(
            "   0: 000000FD000000000000000001000000:0016 000000FD000000000000000002000000:C000 08 0",
            Some(("[fd00::1]:22", "[fd00::2]:49152", false)),
        );
        for broken in ["", "0:", "0: 1:2", "0: 0B015B0A:D2F0 zz:0050 01", "0: é:é é:é 01"] {
            check(broken, None);
        }
    }
}
