//! Two pods as network namespaces, joined by a veth pair, prepared as enrolment prepares them.

use std::io;
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::process::Command;
use std::sync::Arc;
use std::sync::mpsc::{Sender, channel};
use std::time::{Duration, Instant};

use mesh_net::Netns;
use socket2::{Domain, Socket, Type};

/// A network namespace of its own; gone when dropped.
#[derive(Debug)]
pub(crate) struct PodNet {
    pub(crate) netns: Arc<Netns>,
    pub(crate) addresses: Vec<IpAddr>,
    thread_id: u32,
    _alive: Sender<()>,
}

impl PodNet {
    fn new(addresses: &[&str]) -> Self {
        let (report, netns) = channel();
        let (alive, parked) = channel::<()>();
        std::thread::spawn(move || {
            nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET)
                .expect("these tests make network namespaces: run them as root");
            ip("link set lo up");
            let id = u32::try_from(nix::unistd::gettid().as_raw()).unwrap();
            report.send((Netns::current().unwrap(), id)).unwrap();
            assert!(parked.recv().is_err());
        });
        let (netns, thread_id) = netns.recv().expect("the namespace's thread failed");
        let addresses = addresses.iter().map(|text| text.parse().unwrap()).collect();
        let pod = Self { netns: Arc::new(netns), addresses, thread_id, _alive: alive };
        pod.enter(|| {
            for setting in [
                "net.ipv4.tcp_fwmark_accept=1",
                "net.ipv4.fwmark_reflect=1",
                "net.ipv6.fwmark_reflect=1",
                "net.ipv4.tcp_tw_reuse=1",
            ] {
                run("sysctl", &["-qw", setting]);
            }
            for family in ["-4", "-6"] {
                ip(&format!("{family} rule add fwmark 0x539 lookup 133 pref 50"));
                ip(&format!("{family} route add local default dev lo table 133"));
            }
        });
        pod
    }

    /// Two pods on one wire.
    pub(crate) fn pair() -> (Self, Self) {
        let one = Self::new(&["10.77.0.1", "fd77::1"]);
        let two = Self::new(&["10.77.0.2", "fd77::2"]);
        one.enter(|| {
            ip("link add eth0 type veth peer name peer0");
            ip(&format!("link set peer0 netns {}", two.thread_id));
        });
        two.enter(|| ip("link set peer0 name eth0"));
        for pod in [&one, &two] {
            pod.enter(|| {
                ip(&format!("address add {}/24 dev eth0", pod.addresses[0]));
                ip(&format!("address add {}/64 dev eth0 nodad", pod.addresses[1]));
                ip("link set eth0 up");
            });
        }
        one.wait_for(&two);
        (one, two)
    }

    /// Waits until the wire carries packets. The kernel lets a link that has just come up drop them until it has dealt with
    /// the event, at most one a second for the whole machine. Source: net/core/link_watch.c, Linux 6.18.
    fn wait_for(&self, far: &Self) {
        let begun = Instant::now();
        for address in [far.v4(9), far.v6(9)] {
            // Nobody listens there, and the answer to that is the proof.
            while self
                .enter(|| TcpStream::connect_timeout(&address, Duration::from_millis(50)))
                .is_err_and(|error| error.kind() != io::ErrorKind::ConnectionRefused)
            {
                assert!(begun.elapsed() < Duration::from_secs(10), "no way to {address}");
            }
        }
    }

    pub(crate) fn enter<R>(&self, work: impl FnOnce() -> R) -> R {
        self.netns.enter(work).unwrap()
    }

    pub(crate) fn v4(&self, port: u16) -> SocketAddr {
        SocketAddr::new(self.addresses[0], port)
    }

    pub(crate) fn v6(&self, port: u16) -> SocketAddr {
        SocketAddr::new(self.addresses[1], port)
    }

    /// A server's listener inside.
    pub(crate) fn listen(&self, address: SocketAddr) -> TcpListener {
        let begun = Instant::now();
        loop {
            match self.enter(|| TcpListener::bind(address)) {
                // A program that another test starts at this moment may hold a copy of a closed listener until it runs.
                Err(error)
                    if error.kind() == io::ErrorKind::AddrInUse
                        && begun.elapsed() < Duration::from_secs(5) =>
                {
                    std::thread::yield_now();
                }
                bound => return bound.unwrap(),
            }
        }
    }

    /// A client's socket, bound to the pod's address of `target`'s family, not yet connected.
    pub(crate) fn client_socket(&self, target: SocketAddr) -> Socket {
        let own = if target.is_ipv4() { self.v4(0) } else { self.v6(0) };
        self.enter(|| {
            let socket = Socket::new(Domain::for_address(target), Type::STREAM, None).unwrap();
            socket.bind(&own.into()).unwrap();
            socket
        })
    }

    /// Steers plaintext connections to `port` that come over the wire to port 15006, as capture would.
    pub(crate) fn steer_plaintext(&self, port: u16) {
        self.enter(|| {
            for (family, rule) in [("ip", "-4"), ("ip6", "-6")] {
                let to = "tproxy to :15006 accept";
                run("nft", &["add", "table", family, "steer"]);
                let chain = "{ type filter hook prerouting priority mangle; }";
                run("nft", &["add", "chain", family, "steer", "pre", chain]);
                let rule_text = format!("iifname eth0 tcp dport {port} {to}");
                let mut arguments = vec!["add", "rule", family, "steer", "pre"];
                arguments.extend(rule_text.split_whitespace());
                run("nft", &arguments);
                // By interface: a mark would be taken over by the accepted socket, and its answers would stay here.
                ip(&format!("{rule} rule add iif eth0 lookup 100"));
                ip(&format!("{rule} route add local default dev lo table 100"));
            }
        });
    }

    /// Connects without capture.
    pub(crate) fn connect_plain(&self, target: SocketAddr) -> io::Result<TcpStream> {
        self.enter(|| TcpStream::connect(target))
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
