//! The load: one server for every kind, clients that print one JSON line.

use std::io::{Read, Write};
use std::net::{Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use clap::ValueEnum;
use serde_json::{Value, json};

/// What a client does; the first byte it sends says it to the server.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Kind {
    /// Send as fast as it goes.
    Bulk,
    /// 64 bytes there and back, one at a time.
    Ping,
    /// Connect, 64 bytes there and back, close.
    Connect,
    /// 128 bytes there, 1024 back, on kept connections.
    Request,
}

const BULK_CHUNK: usize = 256 * 1024;
const PING: usize = 64;
const REQUEST: usize = 128;
const RESPONSE: usize = 1024;

impl Kind {
    const fn mark(self) -> u8 {
        match self {
            Self::Bulk => b'B',
            Self::Ping => b'P',
            Self::Connect => b'C',
            Self::Request => b'R',
        }
    }
}

/// Serves every kind, IPv4 and IPv6, for ever.
pub(crate) fn serve(port: u16) -> anyhow::Result<()> {
    let listener = TcpListener::bind((Ipv6Addr::UNSPECIFIED, port))?;
    println!("serving");
    loop {
        let (stream, _peer) = listener.accept()?;
        // A client that goes away ends its thread; the load it made is counted at the client.
        std::thread::spawn(move || answer(stream));
    }
}

fn answer(mut stream: TcpStream) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    let mut mark = [0; 1];
    stream.read_exact(&mut mark)?;
    match mark[0] {
        b'B' => {
            let mut buffer = vec![0; BULK_CHUNK];
            let mut total = 0u64;
            loop {
                let length = stream.read(&mut buffer)?;
                if length == 0 {
                    return stream.write_all(&total.to_le_bytes());
                }
                total += length as u64;
            }
        }
        b'R' => exchange(&mut stream, REQUEST, RESPONSE),
        _ => exchange(&mut stream, PING, PING),
    }
}

fn exchange(stream: &mut TcpStream, request: usize, response: usize) -> std::io::Result<()> {
    let (mut question, answer) = (vec![0; request], vec![1; response]);
    loop {
        stream.read_exact(&mut question)?;
        stream.write_all(&answer)?;
    }
}

/// Makes the load for `duration_ms` and gives what came of it.
pub(crate) fn measure(
    kind: Kind,
    target: SocketAddr,
    concurrency: usize,
    duration_ms: u64,
) -> anyhow::Result<Value> {
    let stop = Arc::new(AtomicBool::new(false));
    let (bytes, operations) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
    let started = Instant::now();
    let workers: Vec<_> = (0..concurrency)
        .map(|_| {
            let (stop, bytes, operations) =
                (Arc::clone(&stop), Arc::clone(&bytes), Arc::clone(&operations));
            std::thread::spawn(move || work(kind, target, &stop, &bytes, &operations))
        })
        .collect();
    std::thread::sleep(Duration::from_millis(duration_ms));
    stop.store(true, Ordering::Relaxed);
    let mut latencies = Vec::new();
    for worker in workers {
        latencies.extend(worker.join().map_err(|_panic| anyhow::anyhow!("a worker panicked"))??);
    }
    let seconds = started.elapsed().as_secs_f64();
    latencies.sort_unstable();
    let (bytes, operations) = (bytes.load(Ordering::Relaxed), operations.load(Ordering::Relaxed));
    Ok(json!({
        "seconds": seconds,
        "bytes": bytes,
        "operations": operations,
        "p50_us": percentile(&latencies, 500),
        "p99_us": percentile(&latencies, 990),
        "p999_us": percentile(&latencies, 999),
    }))
}

fn percentile(sorted: &[u64], per_mille: usize) -> f64 {
    let Some(last) = sorted.len().checked_sub(1) else { return f64::NAN };
    #[expect(clippy::cast_precision_loss, reason = "latencies in ns are far below 2^53")]
    let nanoseconds = sorted[(sorted.len() * per_mille / 1000).min(last)] as f64;
    nanoseconds / 1000.0
}

/// One connection's work; gives its latencies in nanoseconds.
fn work(
    kind: Kind,
    target: SocketAddr,
    stop: &AtomicBool,
    bytes: &AtomicU64,
    operations: &AtomicU64,
) -> anyhow::Result<Vec<u64>> {
    match kind {
        Kind::Bulk => {
            let mut stream = open(kind, target)?;
            let chunk = vec![7; BULK_CHUNK];
            while !stop.load(Ordering::Relaxed) {
                stream.write_all(&chunk)?;
            }
            stream.shutdown(std::net::Shutdown::Write)?;
            let mut received = [0; 8];
            stream.read_exact(&mut received).context("the server's count")?;
            bytes.fetch_add(u64::from_le_bytes(received), Ordering::Relaxed);
            Ok(Vec::new())
        }
        Kind::Ping => {
            let stream = open(kind, target)?;
            repeat(stream, PING, PING, stop, operations)
        }
        Kind::Request => {
            let stream = open(kind, target)?;
            repeat(stream, REQUEST, RESPONSE, stop, operations)
        }
        Kind::Connect => {
            let mut latencies = Vec::new();
            let mut answer = [0; PING];
            while !stop.load(Ordering::Relaxed) {
                let started = Instant::now();
                let mut stream = open(kind, target)?;
                stream.write_all(&[1; PING])?;
                stream.read_exact(&mut answer)?;
                drop(stream);
                latencies.push(nanoseconds(started));
                operations.fetch_add(1, Ordering::Relaxed);
            }
            Ok(latencies)
        }
    }
}

fn repeat(
    mut stream: TcpStream,
    request: usize,
    response: usize,
    stop: &AtomicBool,
    operations: &AtomicU64,
) -> anyhow::Result<Vec<u64>> {
    let (question, mut answer) = (vec![1; request], vec![0; response]);
    let mut latencies = Vec::with_capacity(100_000);
    while !stop.load(Ordering::Relaxed) {
        let started = Instant::now();
        stream.write_all(&question)?;
        stream.read_exact(&mut answer)?;
        latencies.push(nanoseconds(started));
        operations.fetch_add(1, Ordering::Relaxed);
    }
    Ok(latencies)
}

fn nanoseconds(started: Instant) -> u64 {
    u64::try_from(started.elapsed().as_nanos()).unwrap_or(u64::MAX)
}

fn open(kind: Kind, target: SocketAddr) -> anyhow::Result<TcpStream> {
    let mut stream =
        TcpStream::connect(target).with_context(|| format!("connecting to {target}"))?;
    stream.set_nodelay(true)?;
    stream.write_all(&[kind.mark()])?;
    Ok(stream)
}
