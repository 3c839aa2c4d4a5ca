//! Long streams whose every byte depends on its position.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};

use anyhow::{Context as _, anyhow, bail, ensure};
use mesh_model::splitmix;

const CHUNK: usize = 256 * 1024;
const UPLOAD: u8 = 1;
const DOWNLOAD: u8 = 2;
const BOTH: u8 = 3;

/// Fills `buffer` with the bytes that stand at `position` and after it in the stream of `seed`.
fn fill(seed: u64, position: u64, buffer: &mut [u8]) {
    debug_assert!(position.is_multiple_of(8), "whole words only");
    for (index, word) in (0u64..).zip(buffer.chunks_mut(8)) {
        let bytes = splitmix::nth(seed ^ (position / 8 + index), 1).to_le_bytes();
        word.copy_from_slice(&bytes[..word.len()]);
    }
}

fn send(stream: &mut TcpStream, seed: u64, bytes: u64) -> anyhow::Result<()> {
    let mut buffer = vec![0; CHUNK];
    let mut position = 0;
    while position < bytes {
        let length = usize::try_from((bytes - position).min(CHUNK as u64))?;
        fill(seed, position, &mut buffer[..length]);
        stream
            .write_all(&buffer[..length])
            .with_context(|| format!("sending at byte {position}"))?;
        position += length as u64;
    }
    Ok(())
}

fn expect(stream: &mut TcpStream, seed: u64, bytes: u64) -> anyhow::Result<()> {
    let (mut buffer, mut wanted) = (vec![0; CHUNK], vec![0; CHUNK]);
    let mut position = 0;
    while position < bytes {
        let length = usize::try_from((bytes - position).min(CHUNK as u64))?;
        stream
            .read_exact(&mut buffer[..length])
            .with_context(|| format!("receiving at byte {position}"))?;
        fill(seed, position, &mut wanted[..length]);
        if buffer[..length] != wanted[..length] {
            let at = buffer.iter().zip(&wanted).position(|(got, want)| got != want);
            bail!("wrong byte at {}", position + at.unwrap_or_default() as u64);
        }
        position += length as u64;
    }
    Ok(())
}

/// Serves uploads and downloads for ever.
///
/// # Errors
/// When accepting fails.
pub fn serve(listener: &TcpListener) -> anyhow::Result<()> {
    loop {
        let (mut stream, peer) = listener.accept()?;
        std::thread::spawn(move || {
            if let Err(error) = answer(&mut stream) {
                eprintln!("bulk from {peer}: {error:#}");
            }
        });
    }
}

fn answer(stream: &mut TcpStream) -> anyhow::Result<()> {
    let mut head = [0; 17];
    stream.read_exact(&mut head)?;
    let seed = u64::from_le_bytes(head[1..9].try_into()?);
    let bytes = u64::from_le_bytes(head[9..17].try_into()?);
    match head[0] {
        UPLOAD => {
            expect(stream, seed, bytes)?;
            stream.write_all(b"exact")?;
        }
        DOWNLOAD => send(stream, seed, bytes)?,
        BOTH => {
            exchange(stream, !seed, seed, bytes)?;
            stream.write_all(b"exact")?;
        }
        other => bail!("no such mode: {other}"),
    }
    Ok(())
}

/// Sends and receives `bytes`, both at the same time.
fn exchange(stream: &mut TcpStream, own: u64, others: u64, bytes: u64) -> anyhow::Result<()> {
    let mut receiver = stream.try_clone()?;
    std::thread::scope(|scope| {
        let received = scope.spawn(move || expect(&mut receiver, others, bytes));
        let sent = send(stream, own, bytes).context("while receiving");
        let received = received.join().map_err(|_panic| anyhow!("the receiver panicked"))?;
        received.context("while sending").and(sent)
    })
}

/// Exchanges `bytes` each way with the server: at once on one connection, then a quarter as many up alone and down alone,
/// which a way that only goes on while the other one moves would not pass. Every byte is checked.
///
/// # Errors
/// When a byte is wrong, missing or too many.
pub fn check(target: SocketAddr, seed: u64, bytes: u64) -> anyhow::Result<()> {
    let mut both = open(target, BOTH, seed, bytes)?;
    exchange(&mut both, seed, !seed, bytes).context("both ways")?;
    found_exact(&mut both).context("both ways")?;
    let bytes = bytes / 4;
    let mut up = open(target, UPLOAD, seed, bytes)?;
    send(&mut up, seed, bytes).context("upload")?;
    found_exact(&mut up).context("upload")?;
    let mut down = open(target, DOWNLOAD, !seed, bytes)?;
    expect(&mut down, !seed, bytes).context("download")?;
    at_end(&mut down)
}

fn found_exact(stream: &mut TcpStream) -> anyhow::Result<()> {
    let mut answer = [0; 5];
    stream.read_exact(&mut answer).context("the server found what it got wrong")?;
    ensure!(&answer == b"exact", "the server said {answer:?}");
    at_end(stream)
}

fn open(target: SocketAddr, mode: u8, seed: u64, bytes: u64) -> anyhow::Result<TcpStream> {
    let mut stream = TcpStream::connect(target).context("connecting")?;
    let mut head = [0; 17];
    head[0] = mode;
    head[1..9].copy_from_slice(&seed.to_le_bytes());
    head[9..17].copy_from_slice(&bytes.to_le_bytes());
    stream.write_all(&head)?;
    Ok(stream)
}

fn at_end(stream: &mut TcpStream) -> anyhow::Result<()> {
    let mut more = [0; 1];
    if stream.read(&mut more).context("reading the end")? != 0 {
        bail!("bytes after the end");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Write as _};
    use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};

    use super::{check, serve};

    /// A relay to a server, which changes the byte at `wrong` of what it carries down, or up.
    fn relay(server: SocketAddr, wrong: Option<(bool, usize)>) -> SocketAddr {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a port");
        let own = listener.local_addr().expect("an address");
        std::thread::spawn(move || {
            for client in listener.incoming().flatten() {
                let server = TcpStream::connect(server).expect("the server");
                for down in [false, true] {
                    let (from, to) = if down { (&server, &client) } else { (&client, &server) };
                    let ends =
                        (from.try_clone().expect("a clone"), to.try_clone().expect("a clone"));
                    let wrong = wrong.and_then(|(is_down, at)| (is_down == down).then_some(at));
                    std::thread::spawn(move || carry(ends, wrong));
                }
            }
        });
        own
    }

    fn carry((mut from, mut to): (TcpStream, TcpStream), wrong: Option<usize>) {
        let (mut buffer, mut position) = (vec![0; 65536], 0);
        while let Ok(length @ 1..) = from.read(&mut buffer) {
            if let Some(at) =
                wrong.and_then(|at| at.checked_sub(position)).filter(|at| *at < length)
            {
                buffer[at] ^= 1;
            }
            position += length;
            if to.write_all(&buffer[..length]).is_err() {
                break;
            }
        }
        // The other side may have gone already.
        to.shutdown(Shutdown::Write).ok();
    }

    #[test]
    fn one_wrong_byte_of_either_direction_is_found() {
        const BYTES: u64 = 1 << 20;
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a port");
        let server = listener.local_addr().expect("an address");
        std::thread::spawn(move || serve(&listener));
        check(relay(server, None), 7, BYTES).expect("nothing is wrong");
        for wrong in [(true, 700_001), (false, 700_018)] {
            let found = check(relay(server, Some(wrong)), 7, BYTES);
            assert!(found.is_err(), "a byte was changed at {wrong:?}");
        }
    }
}
