//! A gRPC service with a bidirectional stream, and its client.

use std::net::{SocketAddr, TcpListener};
use std::pin::Pin;

use anyhow::{Context as _, bail};
use tokio_stream::{Stream, StreamExt as _};
use tonic::{Request, Response, Status, Streaming};

#[allow(
    missing_docs,
    unreachable_pub,
    unused_qualifications,
    clippy::allow_attributes_without_reason,
    reason = "generated"
)]
mod pb {
    tonic::include_proto!("lab.echo.v1");
}

use pb::Line;
use pb::echo_client::EchoClient;
use pb::echo_server::{Echo, EchoServer};

#[derive(Debug, Default)]
struct EchoService;

#[tonic::async_trait]
impl Echo for EchoService {
    type ChatStream = Pin<Box<dyn Stream<Item = Result<Line, Status>> + Send>>;

    async fn chat(
        &self,
        request: Request<Streaming<Line>>,
    ) -> Result<Response<Self::ChatStream>, Status> {
        Ok(Response::new(Box::pin(request.into_inner())))
    }
}

/// Serves the echo for ever.
///
/// # Errors
/// When the listener cannot be used.
pub async fn serve(listener: TcpListener) -> anyhow::Result<()> {
    listener.set_nonblocking(true)?;
    let listener = tokio::net::TcpListener::from_std(listener)?;
    tonic::transport::Server::builder()
        .add_service(EchoServer::new(EchoService))
        .serve_with_incoming(tokio_stream::wrappers::TcpListenerStream::new(listener))
        .await?;
    Ok(())
}

/// Sends `count` lines, each only after the echo of the one before, and checks every one.
///
/// # Errors
/// When the call fails or an echo is wrong.
pub async fn check(target: SocketAddr, count: u32) -> anyhow::Result<()> {
    let mut client = EchoClient::connect(format!("http://{target}")).await.context("connecting")?;
    let (sender, receiver) = tokio::sync::mpsc::channel(1);
    let lines = tokio_stream::wrappers::ReceiverStream::new(receiver);
    sender.send(line(0)).await?;
    let mut echoes = client.chat(lines).await.context("calling")?.into_inner();
    for number in 0..count {
        let echo = echoes.next().await.context("the stream ended")?.context("the stream failed")?;
        if echo != line(number) {
            bail!("wrong echo of line {number}");
        }
        if number + 1 < count {
            sender.send(line(number + 1)).await?;
        }
    }
    drop(sender);
    if echoes.next().await.is_some() {
        bail!("an echo too many");
    }
    Ok(())
}

fn line(number: u32) -> Line {
    let length = usize::try_from(number % 7).unwrap_or_default() * 1000;
    Line { number, payload: number.to_le_bytes().repeat(length) }
}
