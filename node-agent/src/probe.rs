//! `culvert-agent ready`: asks whether this very agent is ready. Of two agents on a node that hand over, both see the
//! same port; who answers there is told by the instance.

use std::io::{self, BufRead as _, BufReader, Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream};
use std::time::Duration;

use anyhow::{Context as _, bail};

use crate::config::Settings;

/// How long each step may take.
const PATIENCE: Duration = Duration::from_secs(2);
/// Longest answer that is read, bytes.
const MAX_ANSWER: u64 = 16 * 1024;

/// Succeeds when the agent of this instance serves the node and is ready.
///
/// # Errors
/// When it is not; the error holds its own words.
pub fn ready(settings: &Settings) -> anyhow::Result<()> {
    let address =
        settings.ready_address.0.context("--ready-address is none: nobody can be asked")?;
    let path = match &settings.instance {
        Some(instance) => format!("/healthz/ready?instance={instance}"),
        None => "/healthz/ready".to_owned(),
    };
    let (status, body) =
        ask(reachable(address), &path).with_context(|| format!("no agent answers at {address}"))?;
    if status != 200 {
        bail!("not ready: {}", body.trim());
    }
    Ok(())
}

/// Where somebody on this machine reaches what listens there.
fn reachable(address: SocketAddr) -> SocketAddr {
    match address.ip() {
        // What listens on every IPv6 address listens on every IPv4 one as well.
        ip if ip.is_unspecified() => {
            SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), address.port())
        }
        _specific => address,
    }
}

fn ask(address: SocketAddr, path: &str) -> io::Result<(u16, String)> {
    let mut stream = TcpStream::connect_timeout(&address, PATIENCE)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    write!(stream, "GET {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")?;
    let mut answer = BufReader::new(stream.take(MAX_ANSWER));
    let mut line = String::new();
    answer.read_line(&mut line)?;
    let status = line.split(' ').nth(1).and_then(|status| status.parse().ok());
    let status = status.ok_or(io::ErrorKind::InvalidData)?;
    let mut rest = String::new();
    answer.read_to_string(&mut rest)?;
    let body = rest.split_once("\r\n\r\n").map_or(rest.as_str(), |(_, body)| body);
    Ok((status, body.to_owned()))
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;
    use std::thread;

    use super::*;

    #[test]
    fn the_answer_is_read_whole() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let server = thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut asked = String::new();
            BufReader::new(&stream).read_line(&mut asked).unwrap();
            let answer = "HTTP/1.1 503 Service Unavailable\r\ncontent-length: 4\r\n\r\nnope";
            stream.write_all(answer.as_bytes()).unwrap();
            asked
        });
        assert_eq!(ask(address, "/healthz/ready?instance=a").unwrap(), (503, "nope".to_owned()));
        assert_eq!(server.join().unwrap(), "GET /healthz/ready?instance=a HTTP/1.1\r\n");
        assert!(ask(address, "/").is_err(), "nobody is there");
    }

    #[test]
    fn what_listens_everywhere_is_asked_on_loopback() {
        assert_eq!(reachable("[::]:15021".parse().unwrap()), "127.0.0.1:15021".parse().unwrap());
        let own: SocketAddr = "10.0.0.1:15021".parse().unwrap();
        assert_eq!(reachable(own), own);
    }
}
