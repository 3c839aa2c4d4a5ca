//! The stock relay: the same tunnel from stock parts (tokio, tokio-rustls, h2), as most of the field builds it.
//!
//! It is the yardstick that needs nothing from outside: a task pair per stream, HTTP/2 CONNECT streams over one
//! mutually authenticated TLS 1.3 connection, windows and copy buffers of common size.

use std::future::poll_fn;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;

use anyhow::Context as _;
use bytes::{Bytes, BytesMut};
use clap::ValueEnum;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::server::WebPkiClientVerifier;
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};

const STREAM_WINDOW: u32 = 4 << 20;
const CONNECTION_WINDOW: u32 = 16 << 20;
const FRAME: u32 = 1 << 20;
const BUFFER: usize = 64 * 1024;

/// Which end of the tunnel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Side {
    /// Takes TCP, opens the tunnel.
    Client,
    /// Takes the tunnel, opens TCP.
    Server,
}

/// Writes a root, a leaf for both ends and its key into `folder`.
pub(crate) fn make_certificates(folder: &Path) -> anyhow::Result<()> {
    std::fs::create_dir_all(folder)?;
    let mut root = rcgen::CertificateParams::new(Vec::new())?;
    root.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    let root_key = rcgen::KeyPair::generate()?;
    let certificate = root.self_signed(&root_key)?;
    std::fs::write(folder.join("root.der"), certificate.der())?;
    let issuer = rcgen::Issuer::new(root, root_key);
    let key = rcgen::KeyPair::generate()?;
    let leaf = rcgen::CertificateParams::new(vec!["stock".to_owned()])?.signed_by(&key, &issuer)?;
    std::fs::write(folder.join("leaf.der"), leaf.der())?;
    std::fs::write(folder.join("key.der"), key.serialize_der())?;
    Ok(())
}

struct Material {
    roots: Arc<RootCertStore>,
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
    provider: Arc<rustls::crypto::CryptoProvider>,
}

fn material(folder: &Path) -> anyhow::Result<Material> {
    let read = |name: &str| std::fs::read(folder.join(name)).with_context(|| name.to_owned());
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from(read("root.der")?))?;
    let mut provider = rustls::crypto::aws_lc_rs::default_provider();
    // The same suite as the mesh prefers, so that ratios compare engines and not ciphers.
    provider.cipher_suites =
        vec![rustls::crypto::aws_lc_rs::cipher_suite::TLS13_AES_128_GCM_SHA256];
    Ok(Material {
        roots: Arc::new(roots),
        chain: vec![CertificateDer::from(read("leaf.der")?)],
        key: PrivateKeyDer::Pkcs8(read("key.der")?.into()),
        provider: Arc::new(provider),
    })
}

/// Relays for ever.
pub(crate) fn relay(
    side: Side,
    listen: SocketAddr,
    next: SocketAddr,
    certificates: &Path,
) -> anyhow::Result<()> {
    let material = material(certificates)?;
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?.block_on(
        async {
            match side {
                Side::Client => client(listen, next, material).await,
                Side::Server => server(listen, next, material).await,
            }
        },
    )
}

async fn client(listen: SocketAddr, next: SocketAddr, material: Material) -> anyhow::Result<()> {
    let mut config = ClientConfig::builder_with_provider(material.provider)
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_root_certificates(material.roots)
        .with_client_auth_cert(material.chain, material.key)?;
    config.alpn_protocols = vec![b"h2".to_vec()];
    let listener = TcpListener::bind(listen).await?;
    let socket = loop {
        match TcpStream::connect(next).await {
            Ok(socket) => break socket,
            Err(_not_yet) => tokio::time::sleep(std::time::Duration::from_millis(20)).await,
        }
    };
    socket.set_nodelay(true)?;
    let connector = tokio_rustls::TlsConnector::from(Arc::new(config));
    let tls = connector.connect(ServerName::try_from("stock")?, socket).await?;
    let (sender, connection) = h2::client::Builder::new()
        .initial_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_frame_size(FRAME)
        .enable_push(false)
        .handshake::<_, Bytes>(tls)
        .await?;
    tokio::spawn(async move {
        if let Err(error) = connection.await {
            eprintln!("tunnel: {error}");
        }
    });
    println!("serving");
    loop {
        let (near, _peer) = listener.accept().await?;
        let sender = sender.clone();
        tokio::spawn(async move {
            if let Err(error) = open(near, sender).await {
                eprintln!("stream: {error:#}");
            }
        });
    }
}

async fn open(near: TcpStream, sender: h2::client::SendRequest<Bytes>) -> anyhow::Result<()> {
    near.set_nodelay(true)?;
    let request = http::Request::builder()
        .method(http::Method::CONNECT)
        .uri(http::Uri::builder().authority("10.0.0.1:8080").build()?)
        .body(())?;
    let (response, stream) = sender.ready().await?.send_request(request, false)?;
    let body = response.await?.into_body();
    carry(near, stream, body).await
}

async fn server(listen: SocketAddr, next: SocketAddr, material: Material) -> anyhow::Result<()> {
    let verifier = WebPkiClientVerifier::builder_with_provider(
        Arc::clone(&material.roots),
        Arc::clone(&material.provider),
    )
    .build()?;
    let mut config = ServerConfig::builder_with_provider(material.provider)
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_client_cert_verifier(verifier)
        .with_single_cert(material.chain, material.key)?;
    config.alpn_protocols = vec![b"h2".to_vec()];
    let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(config));
    let listener = TcpListener::bind(listen).await?;
    println!("serving");
    loop {
        let (socket, _peer) = listener.accept().await?;
        let acceptor = acceptor.clone();
        tokio::spawn(async move {
            if let Err(error) = tunnel(socket, acceptor, next).await {
                eprintln!("tunnel: {error:#}");
            }
        });
    }
}

async fn tunnel(
    socket: TcpStream,
    acceptor: tokio_rustls::TlsAcceptor,
    next: SocketAddr,
) -> anyhow::Result<()> {
    socket.set_nodelay(true)?;
    let tls = acceptor.accept(socket).await?;
    let mut connection = h2::server::Builder::new()
        .initial_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_frame_size(FRAME)
        .max_concurrent_streams(10_000)
        .handshake::<_, Bytes>(tls)
        .await?;
    while let Some(request) = connection.accept().await {
        let (request, mut respond) = request?;
        tokio::spawn(async move {
            let carried = async {
                let app = TcpStream::connect(next).await?;
                app.set_nodelay(true)?;
                let stream = respond.send_response(http::Response::new(()), false)?;
                carry(app, stream, request.into_body()).await
            };
            if let Err(error) = carried.await {
                eprintln!("stream: {error:#}");
            }
        });
    }
    Ok(())
}

async fn carry(
    socket: TcpStream,
    stream: h2::SendStream<Bytes>,
    body: h2::RecvStream,
) -> anyhow::Result<()> {
    let (read, write) = socket.into_split();
    let (there, back) = tokio::join!(to_tunnel(read, stream), from_tunnel(body, write));
    there.and(back)
}

async fn to_tunnel(
    mut socket: tokio::net::tcp::OwnedReadHalf,
    mut stream: h2::SendStream<Bytes>,
) -> anyhow::Result<()> {
    let mut buffer = BytesMut::with_capacity(BUFFER);
    loop {
        buffer.reserve(BUFFER);
        if socket.read_buf(&mut buffer).await? == 0 {
            stream.send_data(Bytes::new(), true)?;
            return Ok(());
        }
        let mut bytes = buffer.split().freeze();
        while !bytes.is_empty() {
            stream.reserve_capacity(bytes.len());
            let room = poll_fn(|context| stream.poll_capacity(context))
                .await
                .context("the tunnel ended")??;
            if room > 0 {
                stream.send_data(bytes.split_to(room.min(bytes.len())), false)?;
            }
        }
    }
}

async fn from_tunnel(
    mut body: h2::RecvStream,
    mut socket: tokio::net::tcp::OwnedWriteHalf,
) -> anyhow::Result<()> {
    while let Some(bytes) = body.data().await {
        let bytes = bytes?;
        socket.write_all(&bytes).await?;
        body.flow_control().release_capacity(bytes.len())?;
    }
    socket.shutdown().await?;
    Ok(())
}
