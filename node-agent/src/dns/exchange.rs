//! Asks a resolver from within the pod's network namespace.

use std::io;
use std::net::SocketAddr;
use std::os::fd::AsFd as _;
use std::time::Duration;

use socket2::{Domain, Protocol, Socket, Type};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::time::timeout;

use super::{DnsDesk, PodDns};

/// How long a resolver may take. Source: the resolver libraries' own default, `timeout:5` of resolv.conf(5).
pub(super) const PATIENCE: Duration = Duration::from_secs(5);
/// Largest datagram taken from a resolver; EDNS allows as much as UDP does.
const MAX_DATAGRAM_BYTES: usize = 65_535;

/// Sends `query` as it is and gives the first answer to it.
pub(super) async fn over_udp(
    desk: &DnsDesk,
    pod: &PodDns,
    resolver: SocketAddr,
    query: &[u8],
) -> io::Result<Vec<u8>> {
    let source = pod.source_for(resolver).ok_or(io::ErrorKind::AddrNotAvailable)?;
    // A socket, and so a source port, of its own for each query: what an attacker has to guess.
    let socket = desk.udp_socket(pod, SocketAddr::new(source, 0))?;
    socket.connect(resolver).await?;
    socket.send(query).await?;
    let answered = async {
        let mut answer = vec![0; MAX_DATAGRAM_BYTES];
        loop {
            let length = socket.recv(&mut answer).await?;
            if answers(query, &answer[..length]) {
                answer.truncate(length);
                answer.shrink_to_fit();
                return Ok(answer);
            }
        }
    };
    timeout(PATIENCE, answered).await?
}

/// Connects to a resolver.
pub(super) async fn connect(
    desk: &DnsDesk,
    pod: &PodDns,
    resolver: SocketAddr,
) -> io::Result<TcpStream> {
    let socket = pod.netns.enter(|| {
        let kind = Type::STREAM.nonblocking();
        let socket = Socket::new(Domain::for_address(resolver), kind, Some(Protocol::TCP))?;
        desk.gate.capture().label(socket.as_fd())?;
        match socket.connect(&resolver.into()) {
            Err(error) if error.raw_os_error() == Some(libc::EINPROGRESS) => Ok(socket),
            Err(error) => Err(error),
            Ok(()) => Ok(socket),
        }
    })??;
    let stream = TcpStream::from_std(socket.into())?;
    timeout(PATIENCE, stream.writable()).await??;
    match stream.take_error()? {
        Some(error) => Err(error),
        None => Ok(stream),
    }
}

/// Asks over a connection of its own, for an answer that did not fit a datagram.
pub(super) async fn over_tcp(
    desk: &DnsDesk,
    pod: &PodDns,
    resolver: SocketAddr,
    query: &[u8],
) -> io::Result<Vec<u8>> {
    let mut stream = connect(desk, pod, resolver).await?;
    let asked = async {
        write_message(&mut stream, query).await?;
        read_message(&mut stream).await
    };
    timeout(PATIENCE, asked).await?
}

/// Reads one message with its length in front. Source: RFC 1035 §4.2.2.
pub(super) async fn read_message(
    stream: &mut (impl tokio::io::AsyncRead + Unpin),
) -> io::Result<Vec<u8>> {
    let length = stream.read_u16().await?;
    let mut message = vec![0; usize::from(length)];
    stream.read_exact(&mut message).await?;
    Ok(message)
}

/// Writes one message with its length in front.
pub(super) async fn write_message(
    stream: &mut (impl tokio::io::AsyncWrite + Unpin),
    message: &[u8],
) -> io::Result<()> {
    let length = u16::try_from(message.len()).map_err(io::Error::other)?;
    let mut framed = Vec::with_capacity(2 + message.len());
    framed.extend(length.to_be_bytes());
    framed.extend(message);
    stream.write_all(&framed).await
}

/// Whether a datagram is a response with the query's id. Source: RFC 1035 §4.1.1.
fn answers(query: &[u8], answer: &[u8]) -> bool {
    answer.len() >= 12 && answer.get(..2) == query.get(..2) && answer[2] & 0x80 != 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_responses_with_the_querys_id_answer_it() {
        let query = [0x12, 0x34, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
        let mut answer = query;
        assert!(!answers(&query, &answer), "a query is no response");
        answer[2] |= 0x80;
        assert!(answers(&query, &answer));
        assert!(!answers(&query, &answer[..11]));
        answer[0] = 0;
        assert!(!answers(&query, &answer));
        assert!(!answers(&[], &answer));
    }
}
