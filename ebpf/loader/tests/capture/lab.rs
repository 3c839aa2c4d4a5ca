//! A node with pods, out of network namespaces: `outside` (10.91.2.2, fd91:2::2) and the pod
//! (10.91.1.2, fd91:1::2) hang on the node by a veth each, and the node routes between them.
#![expect(unsafe_code, reason = "setns and unshare, which std does not offer")]

use std::fs::File;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use mesh_ebpf::{
    Capture, CaptureConfig, GuardPreference, NetnsCookie, PodCapture, PodSettings, port,
};
use socket2::{Domain, Protocol, Socket, Type};

pub(crate) const POD_V4: &str = "10.91.1.2";
pub(crate) const POD_V6: &str = "fd91:1::2";
pub(crate) const OUTSIDE_V4: &str = "10.91.2.2";
pub(crate) const OUTSIDE_V6: &str = "fd91:2::2";
pub(crate) const NODE_V4: &str = "10.91.1.1";
/// Nobody has it; the node has no route either.
pub(crate) const NOBODY_V4: &str = "198.51.100.7";

/// How long to wait for what has to come. Costs nothing but when it does not.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

/// Connections to `target` are refused, each of them, and at once: a lost packet and its retry would take a second.
/// The middle one of several counts, so that a machine that is busy for a moment proves nothing.
pub(crate) fn expect_refusals_at_once(target: SocketAddr) {
    let mut took: Vec<Duration> = (0..9)
        .map(|_| {
            let start = Instant::now();
            let result = dial(target);
            assert!(refused(&result), "{target}: {result:?}");
            start.elapsed()
        })
        .collect();
    took.sort();
    assert!(took[took.len() / 2] < scaled(Duration::from_millis(100)), "{target}: {took:?}");
}

/// A limit of time on a usual machine, on this one: an emulated machine is told by
/// `CULVERT_SLOW_MACHINE` how many times slower it is.
pub(crate) fn scaled(limit: Duration) -> Duration {
    limit * std::env::var("CULVERT_SLOW_MACHINE").map_or(1, |times| times.parse().unwrap())
}

/// Runs `command` in the calling thread's namespace.
pub(crate) fn run(command: &str) {
    let output = Command::new("sh").args(["-c", command]).output().unwrap();
    assert!(output.status.success(), "{command}: {}", String::from_utf8_lossy(&output.stderr));
}

/// A namespace with a path, as a CNI makes them.
#[derive(Clone, Debug)]
pub(crate) struct Namespace {
    pub(crate) path: PathBuf,
}

impl Namespace {
    pub(crate) fn inside<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        std::thread::scope(|scope| {
            scope
                .spawn(|| {
                    let file = File::open(&self.path).unwrap();
                    // SAFETY: no pointers; the thread ends with `work`.
                    assert_eq!(unsafe { libc::setns(file.as_raw_fd(), libc::CLONE_NEWNET) }, 0);
                    work()
                })
                .join()
                .unwrap()
        })
    }
}

pub(crate) struct Lab {
    pub(crate) pod: Namespace,
    pub(crate) outside: Namespace,
    pub(crate) bpffs: PathBuf,
    name: String,
}

impl Lab {
    /// Makes the calling thread the node.
    pub(crate) fn new() -> Self {
        static SERIAL: AtomicU32 = AtomicU32::new(0);
        // SAFETY: no arguments.
        let user = unsafe { libc::geteuid() };
        assert_eq!(user, 0, "these tests load eBPF programs: run them as root");
        let serial = SERIAL.fetch_add(1, Ordering::Relaxed);
        let name = format!("mebpf-{}-{serial}", std::process::id());
        // SAFETY: no pointers; the test's thread stays in the new namespace until it ends.
        assert_eq!(unsafe { libc::unshare(libc::CLONE_NEWNET) }, 0);
        let bpffs = std::env::temp_dir().join(&name);
        std::fs::create_dir(&bpffs).unwrap();
        run(&format!("mount -t bpf bpf {}", bpffs.display()));
        run("ip link set lo up; sysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1");
        // Link-local addresses are usable at once too.
        const NO_DAD: &str = "sysctl -qw net.ipv6.conf.default.accept_dad=0 \
            net.ipv6.conf.default.dad_transmits=0";
        run(NO_DAD);
        let member = |kind: &str, net: u8| {
            let namespace = format!("{name}-{kind}");
            run(&format!(
                "ip netns add {namespace}
                ip netns exec {namespace} {NO_DAD}
                ip link add v{kind} type veth peer name eth0 netns {namespace}
                ip address add 10.91.{net}.1/24 dev v{kind}
                ip address add fd91:{net}::1/64 dev v{kind} nodad
                ip link set v{kind} up
                ip -n {namespace} link set lo up
                ip -n {namespace} address add 10.91.{net}.2/24 dev eth0
                ip -n {namespace} address add fd91:{net}::2/64 dev eth0 nodad
                ip -n {namespace} link set eth0 up
                ip -n {namespace} route add default via 10.91.{net}.1
                ip -n {namespace} -6 route add default via fd91:{net}::1"
            ));
            Namespace { path: Path::new("/run/netns").join(namespace) }
        };
        let (pod, outside) = (member("pod", 1), member("out", 2));
        Self { pod, outside, bpffs, name }
    }

    /// Puts pod and outside on one bridge, which hands each frame on whatever is in it; addresses and
    /// routes stay as they are.
    pub(crate) fn bridge(&self) {
        run("ip link add bridge0 type bridge mcast_snooping 0
            for member in vpod vout; do
                ip address flush dev $member scope global
                ip link set $member master bridge0
            done
            for net in 1 2; do
                ip address add 10.91.$net.1/24 dev bridge0
                ip address add fd91:$net::1/64 dev bridge0 nodad
            done
            ip link set bridge0 up
            for family in ip ip6 arp; do
                [ ! -d /proc/sys/net/bridge ] ||
                    echo 0 > /proc/sys/net/bridge/bridge-nf-call-${family}tables
            done");
    }

    pub(crate) fn config(&self) -> CaptureConfig {
        CaptureConfig {
            bpffs: self.bpffs.join("culvert"),
            cgroup_root: None,
            guard: GuardPreference::Auto,
        }
    }

    pub(crate) fn capture(&self) -> Arc<Capture> {
        Arc::new(Capture::load_or_adopt(&self.config()).unwrap())
    }

    pub(crate) fn pod_capture(&self, settings: PodSettings) -> PodCapture {
        PodCapture {
            netns: self.pod.path.clone(),
            addresses: vec![ip(POD_V4), ip(POD_V6)],
            settings,
        }
    }

    /// Enrols the pod with an agent in it.
    pub(crate) fn enroll(&self, capture: &Arc<Capture>, settings: PodSettings) -> Agent {
        let agent = self.agent(capture);
        assert_eq!(capture.enroll(&self.pod_capture(settings), 1).unwrap(), agent.cookie);
        agent
    }

    /// An agent in the pod: greets outbound connections with where they were going, inbound ones with
    /// the address they came to.
    pub(crate) fn agent(&self, capture: &Arc<Capture>) -> Agent {
        Self::agent_of(&self.pod, capture)
    }

    /// Makes a second pod of `outside`.
    pub(crate) fn enroll_outside(&self, capture: &Arc<Capture>, settings: PodSettings) -> Agent {
        let agent = Self::agent_of(&self.outside, capture);
        let pod = PodCapture {
            netns: self.outside.path.clone(),
            addresses: vec![ip(OUTSIDE_V4), ip(OUTSIDE_V6)],
            settings,
        };
        assert_eq!(capture.enroll(&pod, 1).unwrap(), agent.cookie);
        agent
    }

    fn agent_of(pod: &Namespace, capture: &Arc<Capture>) -> Agent {
        let cookie = Capture::netns_cookie(&pod.path).unwrap();
        let inbound = Self::agent_listener_of(pod, capture, port::INBOUND);
        let outbound = Self::agent_listener_of(pod, capture, port::OUTBOUND);
        greet(&inbound, |stream, _| format!("inbound {}", canonical(stream.local_addr().unwrap())));
        let capture = Arc::clone(capture);
        greet(&outbound, move |_, client| {
            match capture.orig_dst(cookie, port::OUTBOUND, client).unwrap() {
                Some(target) => format!("outbound {target}"),
                None => "unknown".to_owned(),
            }
        });
        Agent { cookie, inbound, outbound }
    }

    /// The only listener of the agent on this port.
    pub(crate) fn agent_listener(&self, capture: &Capture, port: u16) -> Socket {
        Self::agent_listener_of(&self.pod, capture, port)
    }

    fn agent_listener_of(pod: &Namespace, capture: &Capture, port: u16) -> Socket {
        let cookie = Capture::netns_cookie(&pod.path).unwrap();
        let listener = pod.inside(|| agent_listener(capture, port));
        capture.set_listener(cookie, port, 0, listener.as_fd()).unwrap();
        listener
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        for kind in ["pod", "out"] {
            run(&format!("ip netns delete {}-{kind}", self.name));
        }
        run(&format!("umount {0} && rmdir {0}", self.bpffs.display()));
    }
}

/// The listeners of an agent in a pod; they close with it.
pub(crate) struct Agent {
    pub(crate) cookie: NetnsCookie,
    pub(crate) inbound: Socket,
    pub(crate) outbound: Socket,
}

impl Drop for Agent {
    fn drop(&mut self) {
        for socket in [&self.inbound, &self.outbound] {
            // Ends the thread that accepts; it may have been shut down by the test already.
            socket.shutdown(std::net::Shutdown::Both).ok();
        }
    }
}

/// Accepts on a thread until the listener is shut down, and answers each connection with a line.
/// Then echoes.
pub(crate) fn greet(
    listener: &Socket,
    greeting: impl Fn(&std::net::TcpStream, SocketAddr) -> String + Send + 'static,
) {
    let listener: std::net::TcpListener = listener.try_clone().unwrap().into();
    std::thread::spawn(move || {
        while let Ok((mut stream, client)) = listener.accept() {
            let line = greeting(&stream, client);
            std::thread::spawn(move || {
                use std::io::Write;
                if stream.write_all(format!("{line}\n").as_bytes()).is_ok() {
                    let mut reader = stream.try_clone().unwrap();
                    // The client closes or resets, either is fine.
                    std::io::copy(&mut reader, &mut stream).ok();
                }
            });
        }
    });
}

pub(crate) fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

pub(crate) fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

pub(crate) fn at(address: &str, port: u16) -> SocketAddr {
    SocketAddr::new(ip(address), port)
}

/// A dual-stack listener.
pub(crate) fn listener(port: u16) -> Socket {
    listen(port, |_| ())
}

/// A dual-stack listener of the agent, which may take the agent's ports in an enrolled pod.
pub(crate) fn agent_listener(capture: &Capture, port: u16) -> Socket {
    listen(port, |socket| capture.label(socket.as_fd()).unwrap())
}

fn listen(port: u16, prepare: impl FnOnce(&Socket)) -> Socket {
    let socket = Socket::new(Domain::IPV6, Type::STREAM, Some(Protocol::TCP)).unwrap();
    prepare(&socket);
    socket.set_only_v6(false).unwrap();
    socket.set_reuse_address(true).unwrap();
    socket.set_reuse_port(true).unwrap();
    socket.bind(&at("::", port).into()).unwrap();
    socket.listen(1024).unwrap();
    socket
}

/// Connects and reads the greeting.
pub(crate) fn dial(target: SocketAddr) -> std::io::Result<String> {
    let stream = std::net::TcpStream::connect_timeout(&target, PATIENCE)?;
    read_line(&stream)
}

pub(crate) fn read_line(stream: &std::net::TcpStream) -> std::io::Result<String> {
    use std::io::BufRead;
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut line = String::new();
    // One byte at a time, so that nothing behind the line is lost.
    std::io::BufReader::with_capacity(1, stream).read_line(&mut line)?;
    Ok(line.trim_end().to_owned())
}

pub(crate) fn refused(result: &std::io::Result<String>) -> bool {
    matches!(result, Err(error) if error.kind() == std::io::ErrorKind::ConnectionRefused)
}

pub(crate) fn borrow(socket: &Socket) -> BorrowedFd<'_> {
    socket.as_fd()
}
