//! Many quiet connections.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener};

use anyhow::{Context as _, bail};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

/// Accepts for ever; each connection is quiet until the client speaks, then echoes one byte.
///
/// # Errors
/// When the listener cannot be used.
pub async fn serve(listener: TcpListener) -> anyhow::Result<()> {
    listener.set_nonblocking(true)?;
    let listener = tokio::net::TcpListener::from_std(listener)?;
    loop {
        let (mut stream, _peer) = listener.accept().await?;
        tokio::spawn(async move {
            let mut byte = [0];
            while stream.read_exact(&mut byte).await.is_ok() {
                if stream.write_all(&byte).await.is_err() {
                    break;
                }
            }
        });
    }
}

/// Opens `count` connections, says so, holds them until a line arrives at standard input, then uses each once.
///
/// # Errors
/// When one cannot be opened, was lost, or does not answer.
pub async fn check(target: SocketAddr, count: usize, hold: bool) -> anyhow::Result<()> {
    let mut streams = Vec::with_capacity(count);
    for number in 0..count {
        streams.push(
            TcpStream::connect(target).await.with_context(|| format!("connection {number}"))?,
        );
    }
    println!("open {count}");
    std::io::stdout().flush()?;
    if hold {
        std::io::stdin().read_exact(&mut [0])?;
    }
    for (number, stream) in streams.iter_mut().enumerate() {
        stream.write_all(b"!").await.with_context(|| format!("using connection {number}"))?;
        let mut echo = [0];
        stream
            .read_exact(&mut echo)
            .await
            .with_context(|| format!("echo of connection {number}"))?;
        if echo != *b"!" {
            bail!("connection {number} echoed {echo:?}");
        }
    }
    Ok(())
}
