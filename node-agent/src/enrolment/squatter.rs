//! Who holds one of the agent's ports in a pod that is about to be captured.
//!
//! Such a process gets no connection (the kernel's side hands them to the agent's own sockets alone), but it would take
//! the pod's DNS queries, and whoever put it there should know. After enrolment the ports cannot be bound any more.

use std::collections::BTreeSet;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use mesh_model::ports;
use mesh_net::Netns;

/// A socket of somebody else on one of the agent's ports.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("port {port} ({transport}) is taken by {}", holder(.process.as_ref()))]
pub(crate) struct Squatter {
    /// The port.
    pub(crate) port: u16,
    /// `TCP` or `UDP`.
    pub(crate) transport: &'static str,
    /// Whose it is, as far as this process can see.
    pub(crate) process: Option<Process>,
}

/// A process that has the socket open; the first of several.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Process {
    /// Its id, where the agent sees it.
    pub(crate) pid: u32,
    /// Its name, at most 15 characters.
    pub(crate) name: String,
}

fn holder(process: Option<&Process>) -> String {
    match process {
        Some(Process { pid, name }) => format!("{name} (process {pid})"),
        None => "a process that the agent cannot see".to_owned(),
    }
}

/// A socket as the kernel lists it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Listed {
    port: u16,
    transport: &'static str,
    inode: u64,
}

/// The tables of a namespace, and what they are of.
const TABLES: [(&str, &str); 4] =
    [("tcp", "TCP"), ("tcp6", "TCP"), ("udp", "UDP"), ("udp6", "UDP")];
/// `TCP_LISTEN`, as the tables print it.
const LISTENING: &str = "0A";

/// Looks for one, by the namespace's socket tables. Reads all of `/proc` when there is one, and the tables else.
///
/// # Errors
/// When the namespace cannot be entered or its tables not be read.
pub(crate) fn find(netns: &Netns) -> io::Result<Option<Squatter>> {
    let own = sockets_of(Path::new("/proc/self"));
    find_besides(netns, &own)
}

fn find_besides(netns: &Netns, own: &BTreeSet<u64>) -> io::Result<Option<Squatter>> {
    let listed = netns.enter(list)??;
    let Some(found) = listed.into_iter().find(|socket| !own.contains(&socket.inode)) else {
        return Ok(None);
    };
    let Listed { port, transport, inode } = found;
    Ok(Some(Squatter { port, transport, process: process_with(inode) }))
}

/// Sockets on the agent's ports in the calling thread's namespace.
fn list() -> io::Result<Vec<Listed>> {
    let mut listed = Vec::new();
    for (table, transport) in TABLES {
        match std::fs::read_to_string(format!("/proc/thread-self/net/{table}")) {
            Ok(text) => {
                listed.extend(text.lines().skip(1).filter_map(|line| parse(line, transport)));
            }
            // A kernel without IPv6 has no tables of it.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    Ok(listed)
}

/// Reads `sl: LOCAL:PORT REMOTE:PORT STATE QUEUES TIMER RETRANSMITS UID TIMEOUT INODE …`.
fn parse(line: &str, transport: &'static str) -> Option<Listed> {
    let mut fields = line.split_ascii_whitespace();
    let (_, port) = fields.nth(1)?.split_once(':')?;
    let port = u16::from_str_radix(port, 16).ok()?;
    let state = fields.nth(1)?;
    let inode = fields.nth(5)?.parse().ok()?;
    let holds = transport == "UDP" || state == LISTENING;
    (ports::is_agent_port(port) && holds).then_some(Listed { port, transport, inode })
}

/// The sockets that a process has open. One that cannot be looked at has none.
fn sockets_of(process: &Path) -> BTreeSet<u64> {
    let Ok(descriptors) = std::fs::read_dir(process.join("fd")) else { return BTreeSet::new() };
    descriptors
        .flatten()
        .filter(|descriptor| {
            std::fs::read_link(descriptor.path())
                .is_ok_and(|target| target.to_string_lossy().starts_with("socket:"))
        })
        .filter_map(|descriptor| Some(std::fs::metadata(descriptor.path()).ok()?.ino()))
        .collect()
}

fn process_with(inode: u64) -> Option<Process> {
    let processes = std::fs::read_dir("/proc").ok()?.flatten();
    processes
        .filter_map(|entry| Some((entry.path(), entry.file_name().to_str()?.parse().ok()?)))
        .find(|(path, _)| sockets_of(path).contains(&inode))
        .map(|(path, pid)| {
            // It may have ended since.
            let name = std::fs::read_to_string(path.join("comm")).unwrap_or_default();
            Process { pid, name: name.trim_end().to_owned() }
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn listeners_and_datagram_sockets_on_the_agents_ports_are_read() {
        let check = |line: &str, transport, expected: Option<(u16, u64)>| {
            let found = parse(line, transport).map(|socket| (socket.port, socket.inode));
            assert_eq!(found, expected, "{line}");
        };
        let tcp = |port: &str, state: &str| {
            format!(
                "   0: 00000000:{port} 00000000:0000 {state} 00000000:00000000 00:00000000 00000000     0        0 1234 1 0 100 0 0 10 0"
            )
        };
        check(&tcp("3AA0", "0A"), "TCP", Some((15008, 1234)));
        check(&tcp("3AA0", "01"), "TCP", None);
        check(&tcp("1F90", "0A"), "TCP", None);
        let udp = "  12: 0B015B0A:3ACD 00000000:0000 07 00000000:00000000 00:00000000 00000000  1000        0 77 2 0 0";
        check(udp, "UDP", Some((15053, 77)));
        for broken in ["", "0:", "0: x:y", "0: 0:3AA0 0:0 0A 0:0"] {
            check(broken, "TCP", None);
        }
    }

    #[test]
    fn a_process_on_an_agents_port_is_named() {
        let space = crate::enrolment::tests::TestNetns::with_addresses("squat");
        let netns = Netns::open(&space.path()).unwrap();
        assert_eq!(find(&netns).unwrap(), None);
        let socket = netns.enter(|| std::net::TcpListener::bind("0.0.0.0:15006")).unwrap().unwrap();
        // The agent's own are no squatters.
        assert_eq!(find(&netns).unwrap(), None);
        let squatter = find_besides(&netns, &BTreeSet::new()).unwrap().unwrap();
        assert_eq!((squatter.port, squatter.transport), (15006, "TCP"));
        let process = squatter.process.clone().unwrap();
        assert_eq!(process.pid, std::process::id());
        assert_eq!(
            squatter.to_string(),
            format!("port 15006 (TCP) is taken by {} (process {})", process.name, process.pid)
        );
        drop(socket);
        assert_eq!(find_besides(&netns, &BTreeSet::new()).unwrap(), None);
    }
}
