//! The server over real sockets.

use std::path::Path;
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpStream, UnixStream};

use super::*;
use crate::drain::DrainTrigger;

fn routes() -> Routes {
    Routes::new()
        .get("/hello", async |request: Request| {
            Reply::text(format!("hello {}", request.query("name").unwrap_or("nobody")))
        })
        .get("/long", async |_| Reply::text("metric 1\n".repeat(1000)))
        .get("/never", async |_| std::future::pending::<Reply>().await)
        .get("/level", async |_| Reply::json(&["info"]))
        .post("/level", async |request: Request| Reply::text(request.body))
}

fn server() -> AdminServer {
    let limits =
        AdminLimits { connections: 4, body_bytes: 10, request: Duration::from_millis(200) };
    AdminServer::new(routes(), limits)
}

fn block_on(test: impl Future<Output = ()>) {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(test);
}

async fn ask(mut stream: impl AsyncRead + AsyncWrite + Unpin, request: &str) -> String {
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    timeout(Duration::from_secs(5), stream.read_to_string(&mut answer)).await.unwrap().unwrap();
    answer
}

async fn start_tcp(server: AdminServer) -> (std::net::SocketAddr, DrainTrigger) {
    let listener = AdminListener::tcp("127.0.0.1:0".parse().unwrap()).await.unwrap();
    let address = listener.local_addr().unwrap();
    let (trigger, drain) = Drain::new();
    tokio::spawn(server.serve(listener, drain));
    (address, trigger)
}

fn start_unix(server: AdminServer, path: &Path) -> DrainTrigger {
    let listener = AdminListener::unix(path).unwrap();
    let (trigger, drain) = Drain::new();
    tokio::spawn(server.serve(listener, drain));
    trigger
}

#[test]
fn what_is_long_is_compressed_for_whoever_accepts_it() {
    block_on(async {
        let (address, _trigger) = start_tcp(server()).await;
        let get = async |path: &str, accepts: &str| {
            let mut stream = TcpStream::connect(address).await.unwrap();
            let request = format!(
                "GET {path} HTTP/1.1\r\nhost: localhost\r\n{accepts}connection: close\r\n\r\n"
            );
            stream.write_all(request.as_bytes()).await.unwrap();
            let mut answer = Vec::new();
            stream.read_to_end(&mut answer).await.unwrap();
            let head = answer.windows(4).position(|window| window == b"\r\n\r\n").unwrap() + 4;
            let body = answer.split_off(head);
            (String::from_utf8(answer).unwrap(), body)
        };
        let (head, body) = get("/long", "accept-encoding: gzip\r\n").await;
        assert!(head.contains("content-encoding: gzip"), "{head}");
        assert!(head.contains("content-type: text/plain"), "{head}");
        assert!(body.len() < 500, "{} bytes", body.len());
        let mut text = String::new();
        let mut decoder = flate2::read::GzDecoder::new(&*body);
        io::Read::read_to_string(&mut decoder, &mut text).unwrap();
        assert_eq!(text, "metric 1\n".repeat(1000));
        for (path, accepts) in [("/long", ""), ("/hello", "accept-encoding: gzip\r\n")] {
            let (head, body) = get(path, accepts).await;
            assert!(!head.contains("content-encoding"), "{head}");
            assert!(body.starts_with(b"metric 1") || body.starts_with(b"hello"));
        }
    });
}

#[test]
fn tcp_reads_and_does_not_write() {
    block_on(async {
        let (address, _trigger) = start_tcp(server()).await;
        for (request, expected) in [
            (
                "GET /hello?name=a%20b HTTP/1.1\r\nhost: localhost:1\r\nconnection: close\r\n\r\n",
                "hello a b",
            ),
            ("GET /hello HTTP/1.1\r\nhost: [::1]:1\r\nconnection: close\r\n\r\n", "hello nobody"),
            (
                "GET /level HTTP/1.1\r\nhost: 127.0.0.1\r\nconnection: close\r\n\r\n",
                "application/json",
            ),
            ("HEAD /level HTTP/1.1\r\nhost: 127.0.0.1\r\nconnection: close\r\n\r\n", "200 OK"),
            ("GET /other HTTP/1.1\r\nhost: 127.0.0.1\r\nconnection: close\r\n\r\n", "404 "),
            ("GET /hello HTTP/1.1\r\nhost: evil.example\r\nconnection: close\r\n\r\n", "403 "),
            (
                "POST /level HTTP/1.1\r\nhost: localhost\r\ncontent-length: 1\r\nconnection: close\r\n\r\nx",
                "403 ",
            ),
            ("PUT /level HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n", "403 "),
            ("nonsense\r\n\r\n", "400 "),
        ] {
            let answer = ask(TcpStream::connect(address).await.unwrap(), request).await;
            assert!(answer.contains(expected), "{request:?} got {answer:?}");
        }
    });
}

#[test]
fn the_owner_writes_over_the_unix_socket() {
    block_on(async {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("admin.sock");
        let trigger = start_unix(server(), &path);
        for (request, expected) in [
            (
                "POST /level HTTP/1.1\r\ncontent-length: 5\r\nconnection: close\r\n\r\ndebug",
                "\r\n\r\ndebug",
            ),
            (
                "POST /level HTTP/1.1\r\ncontent-length: 11\r\nconnection: close\r\n\r\n0123456789a",
                "413 ",
            ),
            ("POST /hello HTTP/1.1\r\ncontent-length: 0\r\nconnection: close\r\n\r\n", "405 "),
        ] {
            let answer = ask(UnixStream::connect(&path).await.unwrap(), request).await;
            assert!(answer.contains(expected), "{request:?} got {answer:?}");
        }
        // A successor takes the path over.
        drop(trigger);
        let _trigger = start_unix(server(), &path);
        let get = "GET /hello HTTP/1.1\r\nconnection: close\r\n\r\n";
        assert!(ask(UnixStream::connect(&path).await.unwrap(), get).await.contains("200 OK"));
        let file = folder.path().join("file");
        std::fs::write(&file, "").unwrap();
        assert!(matches!(AdminListener::unix(&file), Err(BindError::Occupied { .. })));
    });
}

#[test]
fn a_peer_that_is_not_trusted_is_refused() {
    let refused = admit(Peer::Untrusted, &Method::GET, &HeaderMap::new()).unwrap_err();
    assert_eq!(refused.status, StatusCode::FORBIDDEN);
    assert!(admit(Peer::Network, &Method::GET, &HeaderMap::new()).is_ok());
    assert!(admit(Peer::Network, &Method::POST, &HeaderMap::new()).is_err());
}

#[test]
fn nobody_holds_a_connection_for_ever() {
    block_on(async {
        let (address, _trigger) = start_tcp(server()).await;
        let never = "GET /never HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n";
        let answer = ask(TcpStream::connect(address).await.unwrap(), never).await;
        assert!(answer.contains("504 "), "{answer:?}");
        // As many silent connections as there are slots, and then one that asks.
        let mut silent = Vec::new();
        for _ in 0..4 {
            silent.push(TcpStream::connect(address).await.unwrap());
        }
        let get = "GET /hello HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n";
        let answer = ask(TcpStream::connect(address).await.unwrap(), get).await;
        assert!(answer.contains("200 OK"), "{answer:?}");
    });
}

#[test]
fn a_drain_ends_the_server() {
    block_on(async {
        let listener = AdminListener::tcp("127.0.0.1:0".parse().unwrap()).await.unwrap();
        let (trigger, drain) = Drain::new();
        let serving = tokio::spawn(server().serve(listener, drain));
        trigger.begin();
        timeout(Duration::from_secs(5), serving).await.unwrap().unwrap();
    });
}
