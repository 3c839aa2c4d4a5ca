//! Sockets in pod namespaces: listeners, connections of the pod, connections to its application.
//!
//! Each is made while the calling thread is inside the pod's namespace, is non-blocking and close-on-exec, has
//! `TCP_NODELAY` set, and is labelled before it connects so that capture lets it pass.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use mesh_model::splitmix;
use mio::net::{TcpListener, TcpStream};
use nix::sys::socket::{SetSockOpt as _, sockopt};
use socket2::{Domain, Protocol, Socket, TcpKeepalive, Type};

use crate::netns::Netns;

/// Marks a socket as the agent's own, so that capture and the guard let it pass.
///
/// Unforgeable: the agent implements it over eBPF socket storage, which needs the map's descriptor.
pub trait SocketLabel: Send + Sync {
    /// Labels `fd`. Called inside the pod's namespace, before `connect`.
    ///
    /// # Errors
    /// What the kernel says; the socket is not used then.
    fn label(&self, fd: BorrowedFd<'_>) -> io::Result<()>;
}

/// When a silent peer is given up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Keepalive {
    /// Silence before the first probe. Default 180 s.
    pub idle: Duration,
    /// Pause between probes. Default 60 s.
    pub interval: Duration,
    /// Unanswered probes before the connection is reset. Default 5.
    pub probes: u32,
}

impl Default for Keepalive {
    fn default() -> Self {
        Self { idle: Duration::from_secs(180), interval: Duration::from_secs(60), probes: 5 }
    }
}

impl Keepalive {
    /// The longest silence that is survived; the `TCP_USER_TIMEOUT` of a tunnel.
    ///
    /// Only tunnels get one: the kernel counts zero-window time into it, and an application may stop reading for as
    /// long as it likes. Source: `tcp_probe_timer`, Linux 5.11.
    #[must_use]
    pub fn user_timeout(&self) -> Duration {
        self.idle + self.interval * self.probes
    }

    fn apply(&self, socket: &Socket) -> io::Result<()> {
        let parameters = TcpKeepalive::new()
            .with_time(self.idle)
            .with_interval(self.interval)
            .with_retries(self.probes);
        socket.set_tcp_keepalive(&parameters)
    }
}

/// Queue of connections that are established but not accepted. Source: DESIGN; `net.core.somaxconn` is 4096.
pub(crate) const BACKLOG: i32 = 4096;

/// The mark that makes replies of an original-source connection come back to the agent over `lo`.
///
/// Source: the pod's rule `fwmark 0x539 lookup 133`, set up at enrolment.
pub const ORIGINAL_SOURCE_MARK: u32 = 0x539;

/// How often another source port is tried before the connection is given up.
const SOURCE_PORT_ATTEMPTS: u32 = 16;

/// Who is at the other end of a connection, which decides what that end sees when this process dies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Far {
    /// An application, or what it wants to reach. A stream that breaks off must not look like one that is over, so a socket
    /// that nobody closes ([`end_on_close`]) is reset by the kernel.
    App,
    /// Another agent. Without close_notify it knows that the tunnel broke, and may need the alert that was sent last.
    Agent,
}

/// Opens a listener on `port` in `netns`, for both address families where the namespace has IPv6.
///
/// `SO_REUSEPORT` is set: each worker opens its own, and a successor process may open its own beside them.
/// Accepted sockets inherit `TCP_NODELAY`, the keepalive, and what happens to those of `far` when the process dies.
///
/// # Errors
/// When the port is taken by somebody who did not set `SO_REUSEPORT`, or for want of descriptors.
pub fn listen(
    netns: &Netns,
    port: u16,
    label: &dyn SocketLabel,
    options: ListenOptions,
) -> io::Result<TcpListener> {
    netns.enter(|| match listen_on((Ipv6Addr::UNSPECIFIED, port).into(), label, options) {
        Err(error) if no_ipv6(&error) => {
            listen_on((Ipv4Addr::UNSPECIFIED, port).into(), label, options)
        }
        done => done,
    })?
}

/// What accepted sockets inherit.
#[derive(Clone, Copy, Debug)]
pub struct ListenOptions {
    /// Keepalive probes.
    pub keepalive: Keepalive,
    /// Who connects.
    pub far: Far,
}

fn no_ipv6(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EAFNOSUPPORT | libc::EADDRNOTAVAIL))
}

fn listen_on(
    address: SocketAddr,
    label: &dyn SocketLabel,
    options: ListenOptions,
) -> io::Result<TcpListener> {
    let domain = Domain::for_address(address);
    let socket = Socket::new(domain, Type::STREAM.nonblocking(), Some(Protocol::TCP))?;
    // In an enrolled pod only labelled sockets may bind the agent's ports.
    label.label(socket.as_fd())?;
    if domain == Domain::IPV6 {
        socket.set_only_v6(false)?;
    }
    socket.set_reuse_address(true)?;
    socket.set_reuse_port(true)?;
    socket.set_tcp_nodelay(true)?;
    options.keepalive.apply(&socket)?;
    if options.far == Far::App {
        suit_apps(&socket)?;
    }
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    Ok(TcpListener::from_std(socket.into()))
}

/// Starts a connection as the pod itself: to another pod's tunnel port, or outside the mesh.
///
/// The result may still be connecting; its outcome comes with writability.
///
/// # Errors
/// What socket, label or connect say at once: no descriptors, no route, no free port.
pub fn connect_from_pod(
    netns: &Netns,
    target: SocketAddr,
    label: &dyn SocketLabel,
    options: ConnectOptions,
) -> io::Result<TcpStream> {
    netns.enter(|| {
        let socket = prepare(target, label, options.far)?;
        options.keepalive.apply(&socket)?;
        if let Some(timeout) = options.user_timeout {
            socket.set_tcp_user_timeout(Some(timeout))?;
        }
        start_connect(socket, target)
    })?
}

/// Two ends connected to each other inside this process, in no network: what one writes the other reads. Both are streams as
/// TCP's are, bounded by the kernel's buffers, except that an end closed by force looks like one closed in good order.
///
/// # Errors
/// For want of descriptors or memory.
pub fn pair() -> io::Result<(TcpStream, TcpStream)> {
    let (near, far) = Socket::pair(Domain::UNIX, Type::STREAM.nonblocking(), None)?;
    Ok((TcpStream::from_std(near.into()), TcpStream::from_std(far.into())))
}

/// How a connection is watched.
#[derive(Clone, Copy, Debug)]
pub struct ConnectOptions {
    /// Who is connected to.
    pub far: Far,
    /// Keepalive probes.
    pub keepalive: Keepalive,
    /// Longest time sent data may stay unacknowledged; tunnels only, see [`Keepalive::user_timeout`].
    pub user_timeout: Option<Duration>,
}

/// Where a connection to the application seems to come from.
#[derive(Clone, Copy)]
pub enum AppSource<'a> {
    /// From the original client's address, on a port for which `taken` is false.
    ///
    /// `taken` must be true for the port of every captured plaintext connection of that client which lives in this
    /// namespace: the same four-tuple would hang. Without such connections leave it out: the kernel then chooses the port
    /// when it connects, by the whole four-tuple, which stays cheap when thousands of ports rest in TIME_WAIT.
    Original {
        /// The client's address.
        client: IpAddr,
        /// Ports of that client which are in use here.
        taken: Option<&'a dyn Fn(u16) -> bool>,
    },
    /// From the original client's address, on a port that the client's own kernel does not choose: where its connections
    /// reach the application without the agent too, the same four-tuple would hang.
    Apart {
        /// The client's address.
        client: IpAddr,
        /// Another for each connection: which of those ports are tried.
        number: u64,
    },
    /// From the pod's own address.
    Pod,
}

impl std::fmt::Debug for AppSource<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Original { client, .. } => write!(f, "Original({client})"),
            Self::Apart { client, .. } => write!(f, "Apart({client})"),
            Self::Pod => f.write_str("Pod"),
        }
    }
}

/// Starts a connection to the pod's application. No keepalive: both ends are in one kernel, where neither goes silently.
///
/// Needs the pod's rule and route for [`ORIGINAL_SOURCE_MARK`] when the original source is kept: without
/// `SO_BINDTODEVICE lo` the connection would be captured again.
///
/// # Errors
/// As [`connect_from_pod`]; [`io::ErrorKind::AddrInUse`] when no free port of the client's address was found.
pub fn connect_to_app(
    netns: &Netns,
    source: AppSource<'_>,
    target: SocketAddr,
    label: &dyn SocketLabel,
) -> io::Result<TcpStream> {
    netns.enter(|| match source {
        AppSource::Original { client, taken: None } if client != target.ip() => {
            let socket = prepare(target, label, Far::App)?;
            become_client(&socket, client)?;
            sockopt::IpBindAddressNoPort.set(&socket, &true)?;
            socket.bind(&SocketAddr::new(client, 0).into())?;
            start_connect(socket, target)
        }
        AppSource::Original { client, taken: Some(taken) } if client != target.ip() => {
            for _attempt in 0..SOURCE_PORT_ATTEMPTS {
                let socket = prepare(target, label, Far::App)?;
                let port = bind_as_client(&socket, client)?;
                if taken(port) {
                    continue;
                }
                match start_connect(socket, target) {
                    // Another socket has this very four-tuple.
                    Err(error) if error.kind() == io::ErrorKind::AddrNotAvailable => {}
                    done => return done,
                }
            }
            Err(io::ErrorKind::AddrInUse.into())
        }
        AppSource::Apart { client, number } if client != target.ip() => {
            for port in ports_apart(number) {
                let socket = prepare(target, label, Far::App)?;
                become_client(&socket, client)?;
                socket.set_reuse_address(true)?;
                let bound = socket.bind(&SocketAddr::new(client, port).into());
                match bound.and_then(|()| start_connect(socket, target)) {
                    Err(error) if is_taken(&error) => {}
                    done => return done,
                }
            }
            Err(io::ErrorKind::AddrInUse.into())
        }
        AppSource::Original { .. } | AppSource::Apart { .. } | AppSource::Pod => {
            start_connect(prepare(target, label, Far::App)?, target)
        }
    })?
}

fn prepare(target: SocketAddr, label: &dyn SocketLabel, far: Far) -> io::Result<Socket> {
    let socket =
        Socket::new(Domain::for_address(target), Type::STREAM.nonblocking(), Some(Protocol::TCP))?;
    label.label(socket.as_fd())?;
    socket.set_tcp_nodelay(true)?;
    if far == Far::App {
        suit_apps(&socket)?;
    }
    Ok(socket)
}

/// What sockets towards applications have. When the process dies the kernel resets them, so that nobody takes a stump for the
/// whole; urgent data stays in its place among the other, or it would be lost (RFC 6093 §3.4).
fn suit_apps(socket: &Socket) -> io::Result<()> {
    socket.set_linger(Some(Duration::ZERO))?;
    socket.set_out_of_band_inline(true)
}

/// Behind the ports that Linux chooses by itself (`ip_local_port_range`, 32768 to 60999 unless set).
const PORTS_BEHIND: std::ops::RangeInclusive<u16> = 61_000..=65_535;
/// Among those ports, of which Linux gives a connection an odd one only when all even ones are in use to its destination
/// (`__inet_hash_connect`).
const PORTS_BETWEEN: std::ops::RangeInclusive<u16> = 32_768..=60_999;

/// Ports to try for a connection: some of [`PORTS_BEHIND`], then odd ones of [`PORTS_BETWEEN`].
///
/// They are scattered, not in a row: connections that last leave rows of taken ports behind them.
fn ports_apart(number: u64) -> impl Iterator<Item = u16> {
    let within = move |ports: &std::ops::RangeInclusive<u16>, attempt: u32| {
        let count = u64::from(ports.end() - ports.start()) + 1;
        // Below the count, so it fits.
        let offset = scattered(number, attempt).checked_rem(count).unwrap_or(0);
        ports.start() + u16::try_from(offset).unwrap_or(0)
    };
    let behind = (0..SOURCE_PORT_ATTEMPTS).map(move |attempt| within(&PORTS_BEHIND, attempt));
    let between = (SOURCE_PORT_ATTEMPTS..2 * SOURCE_PORT_ATTEMPTS)
        .map(move |attempt| within(&PORTS_BETWEEN, attempt) | 1);
    behind.chain(between)
}

fn scattered(number: u64, attempt: u32) -> u64 {
    let place = number.wrapping_mul(u64::from(2 * SOURCE_PORT_ATTEMPTS)) ^ u64::from(attempt);
    splitmix::nth(0, place)
}

/// Another socket has the port, or this very four-tuple.
fn is_taken(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::AddrInUse | io::ErrorKind::AddrNotAvailable)
}

/// Lets the socket have the client's address, which is not one of this namespace.
fn become_client(socket: &Socket, client: IpAddr) -> io::Result<()> {
    match client {
        IpAddr::V4(_) => socket.set_ip_transparent_v4(true)?,
        IpAddr::V6(_) => socket.set_ip_transparent_v6(true)?,
    }
    socket.set_mark(ORIGINAL_SOURCE_MARK)?;
    socket.bind_device(Some(b"lo"))
}

/// Binds to the client's address and returns the port chosen.
///
/// The port is chosen at once, without `IP_BIND_ADDRESS_NO_PORT`, so that it can be compared with the captured ones.
fn bind_as_client(socket: &Socket, client: IpAddr) -> io::Result<u16> {
    become_client(socket, client)?;
    socket.set_reuse_address(true)?;
    socket.bind(&SocketAddr::new(client, 0).into())?;
    Ok(socket.local_addr()?.as_socket().map_or(0, |address| address.port()))
}

fn start_connect(socket: Socket, target: SocketAddr) -> io::Result<TcpStream> {
    match socket.connect(&target.into()) {
        Ok(()) => {}
        Err(error) if error.raw_os_error() == Some(libc::EINPROGRESS) => {}
        Err(error) => return Err(error),
    }
    Ok(TcpStream::from_std(socket.into()))
}

/// Makes the next close of `stream` a reset instead of an orderly end.
///
/// # Errors
/// When the descriptor is no socket; it is closed all the same by whoever owns it.
pub fn reset_on_close(stream: &TcpStream) -> io::Result<()> {
    socket2::SockRef::from(stream).set_linger(Some(Duration::ZERO))
}

/// Makes the next close of `stream` an orderly end: what was written is delivered, then FIN.
///
/// # Errors
/// When the descriptor is no socket; it is closed all the same by whoever owns it.
pub fn end_on_close(stream: &TcpStream) -> io::Result<()> {
    socket2::SockRef::from(stream).set_linger(None)
}

/// The address that an accepted or connected socket has, canonical.
///
/// # Errors
/// When the socket is not connected any more.
pub fn local_addr(stream: &TcpStream) -> io::Result<SocketAddr> {
    stream.local_addr().map(canonical)
}

/// `address` with an IPv4-mapped IPv6 address turned into IPv4.
#[must_use]
pub fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

/// Descriptors this process may have open. Source: `RLIMIT_NOFILE`, soft.
///
/// # Errors
/// What the kernel says.
pub fn descriptor_limit() -> io::Result<u64> {
    let (soft, _hard) = nix::sys::resource::getrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE)?;
    Ok(soft)
}

/// Raises the soft limit of descriptors to the hard one and returns it.
///
/// # Errors
/// What the kernel says.
pub fn raise_descriptor_limit() -> io::Result<u64> {
    let resource = nix::sys::resource::Resource::RLIMIT_NOFILE;
    let (_soft, hard) = nix::sys::resource::getrlimit(resource)?;
    nix::sys::resource::setrlimit(resource, hard, hard)?;
    Ok(hard)
}

#[cfg(test)]
mod tests;
