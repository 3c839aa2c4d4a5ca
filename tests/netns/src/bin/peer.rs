//! `culvert-lab-peer`: both ends of the end-to-end suite's own protocols.
#![allow(clippy::print_stdout, reason = "clients print what they found")]

use std::net::{IpAddr, Ipv6Addr, SocketAddr, TcpListener};
use std::time::Duration;

use clap::{Parser, Subcommand};
use mesh_netns::peer::{bulk, grpc, idle, live, ports, shape, websocket};

#[derive(Debug, Parser)]
struct Arguments {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Serve every protocol on its port, IPv4 and IPv6.
    Serve,
    /// Send and receive this many bytes, at once and one after the other, checking each.
    Bulk { target: SocketAddr, bytes: u64 },
    /// The client half-closes first.
    ClientHalfClose { target: SocketAddr },
    /// The server half-closes first; it is asked at `endings` what came after that.
    ServerHalfClose { target: SocketAddr, endings: SocketAddr },
    /// The server speaks first.
    ServerFirst { target: SocketAddr },
    /// The server resets.
    ServerReset { target: SocketAddr },
    /// The client resets; the server is asked at `endings`.
    ClientReset { target: SocketAddr, endings: SocketAddr },
    /// Nobody listens there; prints how it ended, and after how many microseconds.
    Closed { target: SocketAddr, limit_ms: u64 },
    /// Which addresses the ends see.
    Who { target: SocketAddr },
    /// Keeps connections of every kind until standard input ends.
    Live {
        /// Where the servers are.
        server: IpAddr,
        /// The port that HTTP is served on.
        http: u16,
        /// Between two transfers, and between two new connections.
        #[arg(long, default_value_t = 0)]
        rest_ms: u64,
        /// Where there are more of them.
        others: Vec<IpAddr>,
    },
    /// Many quiet connections; with `--hold` until a byte arrives at standard input.
    Idle {
        target: SocketAddr,
        count: usize,
        #[arg(long)]
        hold: bool,
    },
    /// A bidirectional gRPC stream.
    Grpc { target: SocketAddr, lines: u32 },
    /// A WebSocket.
    Websocket { target: SocketAddr, messages: usize },
}

fn main() -> anyhow::Result<()> {
    match Arguments::parse().verb {
        Verb::Serve => serve(),
        Verb::Bulk { target, bytes } => bulk::check(target, 0x5eed, bytes),
        Verb::ClientHalfClose { target } => shape::check_client_half_close(target),
        Verb::ServerHalfClose { target, endings } => {
            shape::check_server_half_close(target, endings)
        }
        Verb::ServerFirst { target } => shape::check_server_first(target),
        Verb::ServerReset { target } => shape::check_server_reset(target),
        Verb::ClientReset { target, endings } => shape::check_client_reset(target, endings),
        Verb::Closed { target, limit_ms } => {
            let (how, took) = shape::check_closed(target, Duration::from_millis(limit_ms))?;
            println!("{how} {}", took.as_micros());
            Ok(())
        }
        Verb::Who { target } => {
            let (peer, client, server) = shape::who(target)?;
            println!("{peer} {client} {server}");
            Ok(())
        }
        Verb::Live { server, http, rest_ms, others } => {
            let servers = [vec![server], others].concat();
            live::check(&servers, http, Duration::from_millis(rest_ms))
        }
        Verb::Idle { target, count, hold } => runtime()?.block_on(idle::check(target, count, hold)),
        Verb::Grpc { target, lines } => runtime()?.block_on(grpc::check(target, lines)),
        Verb::Websocket { target, messages } => {
            runtime()?.block_on(websocket::check(target, messages))
        }
    }
}

fn runtime() -> anyhow::Result<tokio::runtime::Runtime> {
    Ok(tokio::runtime::Builder::new_current_thread().enable_all().build()?)
}

fn listen(port: u16) -> anyhow::Result<TcpListener> {
    use socket2::{Domain, Protocol, Socket, Type};
    let socket = Socket::new(Domain::IPV6, Type::STREAM, Some(Protocol::TCP))?;
    socket.set_only_v6(false)?;
    socket.set_reuse_address(true)?;
    socket.bind(&SocketAddr::from((Ipv6Addr::UNSPECIFIED, port)).into())?;
    socket.listen(4096)?;
    Ok(socket.into())
}

fn serve() -> anyhow::Result<()> {
    let bulk_listener = listen(ports::BULK)?;
    std::thread::spawn(move || bulk::serve(&bulk_listener));
    shape::serve(listen)?;
    let (idle_listener, grpc_listener, websocket_listener) =
        (listen(ports::IDLE)?, listen(ports::GRPC)?, listen(ports::WEBSOCKET)?);
    println!("serving");
    runtime()?.block_on(async {
        tokio::try_join!(
            idle::serve(idle_listener),
            grpc::serve(grpc_listener),
            websocket::serve(websocket_listener)
        )
    })?;
    Ok(())
}
