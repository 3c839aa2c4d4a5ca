//! A WebSocket echo, and its client.

use std::net::{SocketAddr, TcpListener};

use anyhow::{Context as _, bail};
use futures_util::{SinkExt as _, StreamExt as _};
use tokio_tungstenite::tungstenite::Message;

/// Serves the echo for ever.
///
/// # Errors
/// When the listener cannot be used.
pub async fn serve(listener: TcpListener) -> anyhow::Result<()> {
    listener.set_nonblocking(true)?;
    let listener = tokio::net::TcpListener::from_std(listener)?;
    loop {
        let (stream, peer) = listener.accept().await?;
        tokio::spawn(async move {
            if let Err(error) = echo(stream).await {
                eprintln!("websocket from {peer}: {error:#}");
            }
        });
    }
}

async fn echo(stream: tokio::net::TcpStream) -> anyhow::Result<()> {
    let mut socket = tokio_tungstenite::accept_async(stream).await?;
    while let Some(message) = socket.next().await {
        let message = message?;
        if message.is_close() {
            break;
        }
        if message.is_text() || message.is_binary() {
            socket.send(message).await?;
        }
    }
    Ok(())
}

/// Upgrades, sends `count` messages of growing size, and checks every echo.
///
/// # Errors
/// When the upgrade fails or an echo is wrong.
pub async fn check(target: SocketAddr, count: usize) -> anyhow::Result<()> {
    let (mut socket, _response) = tokio_tungstenite::connect_async(format!("ws://{target}/echo"))
        .await
        .context("upgrading")?;
    for number in 0..count {
        let sent = Message::text(format!("{number}:").repeat(1 + number * 40));
        socket.send(sent.clone()).await?;
        let echo = socket.next().await.context("the server ended")??;
        if echo != sent {
            bail!("wrong echo of message {number}");
        }
    }
    socket.close(None).await?;
    Ok(())
}
