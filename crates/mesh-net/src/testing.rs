//! Namespaces for tests. Root is needed; without it these tests fail rather than pass unseen.

use std::process::Command;
use std::sync::mpsc::{Sender, channel};

use crate::netns::Netns;

/// A network namespace of its own, with `lo` up; gone when dropped.
#[derive(Debug)]
pub(crate) struct Lab {
    netns: Netns,
    thread_id: u32,
    _alive: Sender<()>,
}

impl Lab {
    pub(crate) fn new(name: &str) -> Self {
        let (report, netns) = channel();
        let (alive, parked) = channel::<()>();
        std::thread::Builder::new()
            .name(name.to_owned())
            .spawn(move || {
                nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET)
                    .expect("these tests make network namespaces: run them as root");
                ip("link set lo up");
                let id = u32::try_from(nix::unistd::gettid().as_raw()).unwrap();
                report.send((Netns::current().unwrap(), id)).unwrap();
                // Parked until the lab is dropped: the namespace is reachable by this thread's id.
                assert!(parked.recv().is_err());
            })
            .unwrap();
        let (netns, thread_id) = netns.recv().expect("the namespace's thread failed");
        Self { netns, thread_id, _alive: alive }
    }

    pub(crate) fn netns(&self) -> &Netns {
        &self.netns
    }

    /// Runs `ip ARGUMENTS` inside.
    pub(crate) fn ip(&self, arguments: &str) {
        self.netns.enter(|| ip(arguments)).unwrap();
    }

    /// Runs `sysctl -w SETTING` inside.
    pub(crate) fn sysctl(&self, setting: &str) {
        self.netns.enter(|| run("sysctl", &["-qw", setting])).unwrap();
    }

    /// Joins this namespace with `other` by a veth pair, each with its addresses.
    pub(crate) fn connect(&self, other: &Self, own: &[&str], others: &[&str]) {
        self.ip("link add eth0 type veth peer name peer0");
        self.ip(&format!("link set peer0 netns {}", other.thread_id));
        other.ip("link set peer0 name eth0");
        for (lab, addresses) in [(self, own), (other, others)] {
            for address in addresses {
                lab.ip(&format!("address add {address} dev eth0 nodad"));
            }
            lab.ip("link set eth0 up");
        }
    }
}

fn ip(arguments: &str) {
    run("ip", &arguments.split_whitespace().collect::<Vec<_>>());
}

fn run(program: &str, arguments: &[&str]) {
    let output = Command::new(program).args(arguments).output().unwrap();
    assert!(
        output.status.success(),
        "{program} {arguments:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
}
