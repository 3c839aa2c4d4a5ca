//! Long streams whose every byte depends on its position.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};

use anyhow::{Context as _, bail};

const CHUNK: usize = 256 * 1024;
const UPLOAD: u8 = 1;
const DOWNLOAD: u8 = 2;

/// Fills `buffer` with the bytes that stand at `position` and after it in the stream of `seed`.
fn fill(seed: u64, position: u64, buffer: &mut [u8]) {
    debug_assert!(position.is_multiple_of(8), "whole words only");
    for (index, word) in (0u64..).zip(buffer.chunks_mut(8)) {
        let bytes = mix(seed ^ (position / 8 + index)).to_le_bytes();
        word.copy_from_slice(&bytes[..word.len()]);
    }
}

/// SplitMix64's finalizer: every output bit depends on every input bit.
fn mix(mut value: u64) -> u64 {
    value = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
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
        other => bail!("no such mode: {other}"),
    }
    Ok(())
}

/// Sends `bytes` to the server and gets `bytes` from it, one after the other; every byte is checked.
///
/// # Errors
/// When a byte is wrong, missing or too many.
pub fn check(target: SocketAddr, seed: u64, bytes: u64) -> anyhow::Result<()> {
    let mut up = open(target, UPLOAD, seed, bytes)?;
    send(&mut up, seed, bytes).context("upload")?;
    let mut answer = [0; 5];
    up.read_exact(&mut answer).context("the server found the upload wrong")?;
    at_end(&mut up)?;
    let mut down = open(target, DOWNLOAD, !seed, bytes)?;
    expect(&mut down, !seed, bytes).context("download")?;
    at_end(&mut down)
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
