//! Many kinds of connections at once, watched to the byte until told to end: what a restart of the mesh must not disturb.

use std::io::{BufRead as _, BufReader, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};

use super::{bulk, ports};

/// A connection that answers nothing for so long is lost.
const LIMIT: Duration = Duration::from_secs(20);
/// Connections that are only used at the end.
const IDLE: usize = 40;
/// Bytes of one transfer, each way.
const TRANSFER: u64 = 24 << 20;
/// Between two pings.
const PING: Duration = Duration::from_millis(1);

/// What was seen, by all threads.
#[derive(Debug, Default)]
struct Seen {
    stop: AtomicBool,
    pings: AtomicU64,
    longest_ping_us: AtomicU64,
    transfers: AtomicU64,
    connections: AtomicU64,
    requests: AtomicU64,
}

impl Seen {
    fn goes_on(&self) -> bool {
        !self.stop.load(Ordering::Relaxed)
    }
}

/// Keeps connections of every kind to each of `servers` (HTTP on `http`) until standard input ends, then prints
/// `pings transfers connections requests longest-ping-µs`. `rest` goes between two transfers and between two new connections.
///
/// # Errors
/// The first connection that was refused, reset, ended early, or carried a wrong byte.
pub fn check(servers: &[IpAddr], http: u16, rest: Duration) -> anyhow::Result<()> {
    let seen = Arc::new(Seen::default());
    let (mut idle, mut threads) = (Vec::new(), Vec::new());
    for &server in servers {
        let at = move |port: u16| SocketAddr::new(server, port);
        for number in 0..IDLE {
            let opened = connect(at(ports::IDLE));
            idle.push(opened.with_context(|| format!("idle connection {number}"))?);
        }
        threads.extend([
            start("ping-pong", &seen, move |seen| ping(at(ports::IDLE), seen)),
            start("transfer", &seen, move |seen| transfer(at(ports::BULK), rest, seen)),
            start("half-closed", &seen, move |seen| {
                half_closed(at(ports::SERVER_HALF_CLOSE), seen)
            }),
            start("new connections", &seen, move |seen| {
                again_and_again(at(ports::WHO), rest, seen)
            }),
            start("HTTP keep-alive", &seen, move |seen| keep_alive(at(http), seen)),
        ]);
    }
    println!("live");
    std::io::stdout().flush()?;
    std::io::stdin().read_to_end(&mut Vec::new())?;
    seen.stop.store(true, Ordering::Relaxed);
    let mut failures = Vec::new();
    for thread in threads {
        match thread.join() {
            Ok(Ok(())) => {}
            Ok(Err(error)) => failures.push(format!("{error:#}")),
            Err(_panic) => failures.push("a thread panicked".to_owned()),
        }
    }
    for (number, stream) in idle.iter_mut().enumerate() {
        if let Err(error) = round(stream, 0x5a) {
            failures.push(format!("idle connection {number}: {error:#}"));
        }
    }
    ensure!(failures.is_empty(), "{}", failures.join("; "));
    let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
    println!(
        "{} {} {} {} {}",
        count(&seen.pings),
        count(&seen.transfers),
        count(&seen.connections),
        count(&seen.requests),
        count(&seen.longest_ping_us)
    );
    Ok(())
}

fn start(
    name: &'static str,
    seen: &Arc<Seen>,
    work: impl FnOnce(&Seen) -> anyhow::Result<()> + Send + 'static,
) -> JoinHandle<anyhow::Result<()>> {
    let seen = Arc::clone(seen);
    let begun = Instant::now();
    std::thread::spawn(move || {
        work(&seen).with_context(|| format!("{name}, {:?} after the beginning", begun.elapsed()))
    })
}

fn connect(target: SocketAddr) -> anyhow::Result<TcpStream> {
    let stream = TcpStream::connect(target).context("connecting")?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(LIMIT))?;
    stream.set_write_timeout(Some(LIMIT))?;
    Ok(stream)
}

fn round(stream: &mut TcpStream, byte: u8) -> anyhow::Result<()> {
    stream.write_all(&[byte])?;
    let mut echo = [0];
    stream.read_exact(&mut echo)?;
    ensure!(echo == [byte], "{byte} came back as {echo:?}");
    Ok(())
}

/// One connection for all the time, a byte there and back every millisecond.
fn ping(target: SocketAddr, seen: &Seen) -> anyhow::Result<()> {
    let mut stream = connect(target)?;
    let mut byte = 0_u8;
    while seen.goes_on() {
        let begun = Instant::now();
        round(&mut stream, byte)
            .with_context(|| format!("after {} pings", seen.pings.load(Ordering::Relaxed)))?;
        let took = u64::try_from(begun.elapsed().as_micros())?;
        seen.longest_ping_us.fetch_max(took, Ordering::Relaxed);
        seen.pings.fetch_add(1, Ordering::Relaxed);
        byte = byte.wrapping_add(1);
        std::thread::sleep(PING);
    }
    Ok(())
}

/// Checksummed transfers, one after the other.
fn transfer(target: SocketAddr, rest: Duration, seen: &Seen) -> anyhow::Result<()> {
    while seen.goes_on() {
        let number = seen.transfers.fetch_add(1, Ordering::Relaxed);
        bulk::check(target, number << 8, TRANSFER).with_context(|| format!("transfer {number}"))?;
        std::thread::sleep(rest);
    }
    Ok(())
}

/// A connection whose server has ended its direction; the other one goes on.
fn half_closed(target: SocketAddr, seen: &Seen) -> anyhow::Result<()> {
    let mut stream = connect(target)?;
    let mut said = Vec::new();
    stream.read_to_end(&mut said)?;
    ensure!(said == b"goodbye", "the server said {said:?}");
    while seen.goes_on() {
        stream.write_all(b"still here")?;
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

/// New connections all the time, each answered whole.
fn again_and_again(target: SocketAddr, rest: Duration, seen: &Seen) -> anyhow::Result<()> {
    while seen.goes_on() {
        let number = seen.connections.fetch_add(1, Ordering::Relaxed);
        let mut stream = connect(target).with_context(|| format!("connection {number}"))?;
        let client = stream.local_addr()?.to_string();
        let mut said = String::new();
        stream.read_to_string(&mut said).with_context(|| format!("connection {number}"))?;
        let dialled: Option<SocketAddr> = said.split(' ').nth(1).and_then(|text| text.parse().ok());
        let dialled = dialled.map(|at| SocketAddr::new(at.ip().to_canonical(), at.port()));
        ensure!(dialled == Some(target), "connection {number} of {client} got {said:?}");
        std::thread::sleep(rest);
    }
    Ok(())
}

/// Requests on one connection.
fn keep_alive(target: SocketAddr, seen: &Seen) -> anyhow::Result<()> {
    let mut reader = BufReader::new(connect(target)?);
    let mut first = None;
    while seen.goes_on() {
        let number = seen.requests.fetch_add(1, Ordering::Relaxed);
        reader.get_mut().write_all(b"GET / HTTP/1.1\r\nHost: server\r\n\r\n")?;
        let body = response(&mut reader).with_context(|| format!("request {number}"))?;
        let expected = first.get_or_insert_with(|| body.clone());
        ensure!(*expected == body, "request {number} was answered differently");
        // nginx ends a connection after 1,000 requests.
        if number % 900 == 899 {
            reader = BufReader::new(connect(target)?);
        }
    }
    Ok(())
}

fn response(reader: &mut BufReader<TcpStream>) -> anyhow::Result<Vec<u8>> {
    let mut line = String::new();
    reader.read_line(&mut line)?;
    ensure!(line.starts_with("HTTP/1.1 200"), "the answer began with {line:?}");
    let mut length = 0;
    loop {
        line.clear();
        ensure!(reader.read_line(&mut line)? > 0, "the answer ended in its head");
        if line.trim().is_empty() {
            break;
        }
        if let Some((name, value)) = line.split_once(':')
            && name.eq_ignore_ascii_case("content-length")
        {
            length = value.trim().parse()?;
        }
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body)?;
    Ok(body)
}
