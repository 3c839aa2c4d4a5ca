//! The load's clients: each prints one JSON line.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use clap::ValueEnum;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use crate::cpu::monotonic_ns;

/// What a client does; the first byte it sends says it to the server.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Kind {
    /// Send as fast as it goes.
    Bulk,
    /// 64 bytes there and back, one at a time.
    Ping,
    /// Connect, 64 bytes there and back, close.
    Connect,
    /// HTTP/1.1 requests of 128 bytes, responses of 1 KiB, on kept connections.
    Request,
    /// Connect, one byte back, keep quiet.
    Idle,
}

pub(crate) const BULK_CHUNK: usize = 256 * 1024;
pub(crate) const PING: usize = 64;
pub(crate) const REQUEST: usize = 128;
const RESPONSE: usize = 1024;

impl Kind {
    const fn mark(self) -> u8 {
        match self {
            Self::Bulk => b'B',
            Self::Ping => b'P',
            Self::Connect => b'C',
            Self::Request => b'R',
            Self::Idle => b'I',
        }
    }

    /// The kind a client's first byte says.
    pub(crate) fn of_mark(mark: u8) -> Option<Self> {
        [Self::Bulk, Self::Ping, Self::Connect, Self::Request, Self::Idle]
            .into_iter()
            .find(|kind| kind.mark() == mark)
    }
}

/// A request of exactly [`REQUEST`] bytes.
fn request() -> Vec<u8> {
    padded("GET / HTTP/1.1\r\nHost: bench\r\n", REQUEST, b"")
}

/// A response of exactly [`RESPONSE`] bytes, its body included.
pub(crate) fn response() -> Vec<u8> {
    padded("HTTP/1.1 200 OK\r\nContent-Length: 900\r\n", RESPONSE, &[b'.'; 900])
}

/// `head`, a header that fills it up, and `body`: `length` bytes together.
fn padded(head: &str, length: usize, body: &[u8]) -> Vec<u8> {
    const END: &str = "\r\n\r\n";
    const FILLER: &str = "X-Fill: ";
    let fill = length - head.len() - FILLER.len() - END.len() - body.len();
    let mut message = format!("{head}{FILLER}{}{END}", "x".repeat(fill)).into_bytes();
    message.extend_from_slice(body);
    message
}

/// What one client saw.
#[derive(Default)]
struct Seen {
    bytes: u64,
    latencies: Vec<u64>,
    one_way: Vec<u64>,
}

/// Makes the load for `duration_ms` and gives what came of it.
pub(crate) fn measure(
    kind: Kind,
    target: SocketAddr,
    concurrency: usize,
    duration_ms: u64,
) -> anyhow::Result<Value> {
    let duration = Duration::from_millis(duration_ms);
    let started = Instant::now();
    let mut all = if kind == Kind::Request {
        requests(target, concurrency, duration)?
    } else {
        on_threads(kind, target, concurrency, duration)?
    };
    let seconds = started.elapsed().as_secs_f64();
    all.latencies.sort_unstable();
    all.one_way.sort_unstable();
    Ok(json!({
        "seconds": seconds,
        "bytes": all.bytes,
        "operations": all.latencies.len(),
        "p50_us": percentile(&all.latencies, 500),
        "p99_us": percentile(&all.latencies, 990),
        "p999_us": percentile(&all.latencies, 999),
        "one_way_p50_us": percentile(&all.one_way, 500),
        "one_way_p99_us": percentile(&all.one_way, 990),
        "one_way_p999_us": percentile(&all.one_way, 999),
    }))
}

fn percentile(sorted: &[u64], per_mille: usize) -> f64 {
    let Some(last) = sorted.len().checked_sub(1) else { return f64::NAN };
    #[expect(clippy::cast_precision_loss, reason = "latencies in ns are far below 2^53")]
    let nanoseconds = sorted[(sorted.len() * per_mille / 1000).min(last)] as f64;
    nanoseconds / 1000.0
}

fn on_threads(
    kind: Kind,
    target: SocketAddr,
    concurrency: usize,
    duration: Duration,
) -> anyhow::Result<Seen> {
    let stop = Arc::new(AtomicBool::new(false));
    let workers: Vec<_> = (0..concurrency)
        .map(|_| {
            let stop = Arc::clone(&stop);
            std::thread::spawn(move || work(kind, target, &stop))
        })
        .collect();
    std::thread::sleep(duration);
    stop.store(true, Ordering::Relaxed);
    let mut all = Seen::default();
    for worker in workers {
        let seen = worker.join().map_err(|_panic| anyhow::anyhow!("a worker panicked"))??;
        all.bytes += seen.bytes;
        all.latencies.extend(seen.latencies);
        all.one_way.extend(seen.one_way);
    }
    Ok(all)
}

fn work(kind: Kind, target: SocketAddr, stop: &AtomicBool) -> anyhow::Result<Seen> {
    match kind {
        Kind::Bulk => bulk(target, stop),
        Kind::Ping => ping(target, stop),
        Kind::Connect => connect(target, stop),
        // These have an event loop of their own.
        Kind::Request | Kind::Idle => Ok(Seen::default()),
    }
}

fn bulk(target: SocketAddr, stop: &AtomicBool) -> anyhow::Result<Seen> {
    let mut stream = open(Kind::Bulk, target)?;
    let chunk = vec![7; BULK_CHUNK];
    while !stop.load(Ordering::Relaxed) {
        stream.write_all(&chunk)?;
    }
    stream.shutdown(std::net::Shutdown::Write)?;
    let mut received = [0; 8];
    stream.read_exact(&mut received).context("the server's count")?;
    Ok(Seen { bytes: u64::from_le_bytes(received), ..Seen::default() })
}

fn ping(target: SocketAddr, stop: &AtomicBool) -> anyhow::Result<Seen> {
    let mut stream = open(Kind::Ping, target)?;
    let mut seen = Seen::default();
    let mut message = [0; PING];
    while !stop.load(Ordering::Relaxed) {
        let sent = monotonic_ns();
        message[..8].copy_from_slice(&sent.to_le_bytes());
        stream.write_all(&message)?;
        stream.read_exact(&mut message)?;
        seen.latencies.push(monotonic_ns().saturating_sub(sent));
        let mut one_way = [0; 8];
        one_way.copy_from_slice(&message[..8]);
        seen.one_way.push(u64::from_le_bytes(one_way));
    }
    Ok(seen)
}

fn connect(target: SocketAddr, stop: &AtomicBool) -> anyhow::Result<Seen> {
    let mut seen = Seen::default();
    let mut answer = [0; PING];
    while !stop.load(Ordering::Relaxed) {
        let started = Instant::now();
        let mut stream = open(Kind::Connect, target)?;
        stream.write_all(&[1; PING])?;
        stream.read_exact(&mut answer)?;
        drop(stream);
        seen.latencies.push(nanoseconds(started));
    }
    Ok(seen)
}

fn open(kind: Kind, target: SocketAddr) -> anyhow::Result<TcpStream> {
    let mut stream =
        TcpStream::connect(target).with_context(|| format!("connecting to {target}"))?;
    stream.set_nodelay(true)?;
    stream.write_all(&[kind.mark()])?;
    Ok(stream)
}

fn nanoseconds(started: Instant) -> u64 {
    u64::try_from(started.elapsed().as_nanos()).unwrap_or(u64::MAX)
}

async fn open_async(kind: Kind, target: SocketAddr) -> anyhow::Result<tokio::net::TcpStream> {
    let mut stream = tokio::net::TcpStream::connect(target)
        .await
        .with_context(|| format!("connecting to {target}"))?;
    stream.set_nodelay(true)?;
    stream.write_u8(kind.mark()).await?;
    Ok(stream)
}

/// Requests on kept connections, all from one thread.
fn requests(target: SocketAddr, concurrency: usize, duration: Duration) -> anyhow::Result<Seen> {
    tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(async {
        let until = Instant::now() + duration;
        let mut clients = tokio::task::JoinSet::new();
        for _ in 0..concurrency {
            clients.spawn(async move {
                let mut stream = open_async(Kind::Request, target).await?;
                let (question, mut answer) = (request(), vec![0; RESPONSE]);
                let mut latencies = Vec::new();
                while Instant::now() < until {
                    let started = Instant::now();
                    stream.write_all(&question).await?;
                    stream.read_exact(&mut answer).await?;
                    latencies.push(nanoseconds(started));
                }
                anyhow::Ok(latencies)
            });
        }
        let mut all = Seen::default();
        while let Some(client) = clients.join_next().await {
            all.latencies.extend(client??);
        }
        Ok(all)
    })
}

/// Opens `count` quiet connections, says so, and holds them until it is killed.
pub(crate) fn hold(target: SocketAddr, count: usize) -> anyhow::Result<()> {
    tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(async {
        let mut streams = Vec::with_capacity(count);
        for number in 0..count {
            let mut stream = open_async(Kind::Idle, target).await?;
            stream.read_u8().await.with_context(|| format!("connection {number}"))?;
            streams.push(stream);
        }
        println!("holding {count}");
        std::future::pending::<()>().await;
        drop(streams);
        Ok(())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_have_their_length_and_are_http() {
        assert_eq!(request().len(), REQUEST);
        let response = String::from_utf8(response()).unwrap();
        assert_eq!(response.len(), RESPONSE);
        let (_head, body) = response.split_once("\r\n\r\n").unwrap();
        assert_eq!(body.len(), 900);
    }

    #[test]
    fn percentiles_are_of_the_sorted_values() {
        let sorted: Vec<u64> = (1..=1000).map(|value| value * 1000).collect();
        assert!((percentile(&sorted, 500) - 501.0).abs() < 0.01);
        assert!((percentile(&sorted, 999) - 1000.0).abs() < 0.01);
        assert!(percentile(&[], 500).is_nan());
    }
}
