//! The load's server: one for every kind.

use std::net::{Ipv6Addr, SocketAddr};

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};

use crate::cpu::monotonic_ns;
use crate::load::{BULK_CHUNK, Kind, PING, REQUEST, response};

/// Serves every kind, IPv4 and IPv6, for ever.
///
/// One thread takes all connections, so that a storm of them costs what an event loop costs; bulk and ping connections
/// get a thread of their own, for a blocking call is the shortest way there.
pub(crate) fn serve(port: u16) -> anyhow::Result<()> {
    tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(async {
        let listener = TcpListener::bind(SocketAddr::from((Ipv6Addr::UNSPECIFIED, port))).await?;
        println!("serving");
        loop {
            let (stream, _peer) = listener.accept().await?;
            // A client that goes away ends its task; the load it made is counted at the client.
            tokio::spawn(answer(stream));
        }
    })
}

async fn answer(mut stream: TcpStream) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    match Kind::of_mark(stream.read_u8().await?) {
        Some(Kind::Bulk) => on_a_thread(stream, bulk),
        Some(Kind::Ping) => on_a_thread(stream, ping),
        Some(Kind::Request) => exchange(stream, REQUEST, response()).await,
        Some(Kind::Connect) => exchange(stream, PING, vec![1; PING]).await,
        Some(Kind::Idle) => hold(stream).await,
        None => Err(std::io::ErrorKind::InvalidData.into()),
    }
}

fn on_a_thread(
    stream: TcpStream,
    work: fn(std::net::TcpStream) -> std::io::Result<()>,
) -> std::io::Result<()> {
    let stream = stream.into_std()?;
    stream.set_nonblocking(false)?;
    std::thread::spawn(move || work(stream));
    Ok(())
}

/// Counts what comes and says it when the client has ended.
fn bulk(mut stream: std::net::TcpStream) -> std::io::Result<()> {
    use std::io::{Read as _, Write as _};
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

/// Each message begins with the time it was sent; the answer, with how long it took.
fn ping(mut stream: std::net::TcpStream) -> std::io::Result<()> {
    use std::io::{Read as _, Write as _};
    let mut message = [0; PING];
    loop {
        stream.read_exact(&mut message)?;
        let now = monotonic_ns();
        let (time, _padding) = message.split_at_mut(8);
        let mut sent = [0; 8];
        sent.copy_from_slice(time);
        time.copy_from_slice(&now.saturating_sub(u64::from_le_bytes(sent)).to_le_bytes());
        stream.write_all(&message)?;
    }
}

async fn exchange(mut stream: TcpStream, request: usize, answer: Vec<u8>) -> std::io::Result<()> {
    let mut question = vec![0; request];
    loop {
        stream.read_exact(&mut question).await?;
        stream.write_all(&answer).await?;
    }
}

/// Answers the one byte that says that the connection is wanted, then keeps quiet.
async fn hold(mut stream: TcpStream) -> std::io::Result<()> {
    stream.write_u8(1).await?;
    while stream.read_u8().await.is_ok() {}
    Ok(())
}
