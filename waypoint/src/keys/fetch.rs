//! Reading a key set over HTTP: one GET, or two when the issuer has to be asked where it is.

use std::net::IpAddr;
use std::sync::Arc;

use anyhow::{Context as _, bail, ensure};
use bytes::Bytes;
use http::header::{ACCEPT, HOST};
use http::uri::Scheme;
use http::{HeaderValue, Request, StatusCode, Uri};
use http_body_util::{BodyExt as _, Empty, Limited};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use mesh_jwt::{KeyPlace, KeySet, MAX_KEY_SET_BYTES};
use rustls::crypto::aws_lc_rs::default_provider;
use rustls::{ClientConfig, RootCertStore};
use rustls_pki_types::pem::PemObject as _;
use rustls_pki_types::{CertificateDer, ServerName};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

/// Addresses of a host that are tried.
const MAX_ADDRESSES: usize = 4;

/// Authorities that cannot be used; an operator's mistake.
#[derive(Debug, thiserror::Error)]
pub(crate) enum InvalidRoots {
    /// The text is no PEM.
    #[error("it is no PEM")]
    NotPem(#[source] rustls_pki_types::pem::Error),
    /// A certificate in it cannot be a root, or TLS cannot be spoken at all.
    #[error("it cannot be used")]
    Unusable(#[from] rustls::Error),
}

/// Reads key sets.
pub(super) struct Fetcher {
    tls: TlsConnector,
}

impl Fetcher {
    pub(super) fn new(roots_pem: Option<&str>) -> Result<Self, InvalidRoots> {
        let mut roots = RootCertStore { roots: webpki_roots::TLS_SERVER_ROOTS.to_vec() };
        for root in CertificateDer::pem_slice_iter(roots_pem.unwrap_or_default().as_bytes()) {
            roots.add(root.map_err(InvalidRoots::NotPem)?)?;
        }
        let config = ClientConfig::builder_with_provider(Arc::new(default_provider()))
            .with_safe_default_protocol_versions()?
            .with_root_certificates(roots)
            .with_no_client_auth();
        Ok(Self { tls: TlsConnector::from(Arc::new(config)) })
    }

    pub(super) async fn read(&self, place: &KeyPlace) -> anyhow::Result<KeySet> {
        let uri: Uri = place.uri().parse().context("no address")?;
        let text = match place {
            KeyPlace::Keys { .. } => self.get(&uri).await?,
            KeyPlace::Issuer { issuer, .. } => {
                let text = self.get(&uri).await?;
                self.get(&keys_of(issuer, &uri, &text)?).await?
            }
        };
        Ok(KeySet::parse(&text)?)
    }

    /// The body of an answer 200. Redirections are not followed: they would lead where nobody said.
    async fn get(&self, uri: &Uri) -> anyhow::Result<Bytes> {
        let host = uri.host().context("an address without host")?;
        let bare = host.trim_start_matches('[').trim_end_matches(']');
        let is_tls = uri.scheme() == Some(&Scheme::HTTPS);
        let port = uri.port_u16().unwrap_or(if is_tls { 443 } else { 80 });
        let socket =
            dial(bare, port).await.with_context(|| format!("cannot reach {host}:{port}"))?;
        let mut request = Request::new(Empty::<Bytes>::new());
        let path = uri.path_and_query().map_or("/", |path| path.as_str());
        *request.uri_mut() = path.parse()?;
        let authority = uri.authority().context("an address without host")?.as_str();
        request.headers_mut().insert(HOST, HeaderValue::from_str(authority)?);
        request.headers_mut().insert(ACCEPT, HeaderValue::from_static("application/json"));
        if !is_tls {
            return ask(socket, request).await;
        }
        let name = ServerName::try_from(bare.to_owned())?;
        let stream = self.tls.connect(name, socket).await.context("no TLS")?;
        ask(stream, request).await
    }
}

/// Where an issuer says that its keys are. Source: OpenID Connect Discovery 1.0 §4.3.
fn keys_of(issuer: &str, asked: &Uri, text: &[u8]) -> anyhow::Result<Uri> {
    let said: serde_json::Value =
        serde_json::from_slice(text).context("the issuer's answer is no JSON")?;
    ensure!(said["issuer"] == *issuer, "the issuer calls itself {}", said["issuer"]);
    let uri: Uri =
        said["jwks_uri"].as_str().context("no jwks_uri in the issuer's answer")?.parse()?;
    match (asked.scheme_str(), uri.scheme_str()) {
        (_, Some("https")) | (Some("http"), Some("http")) => Ok(uri),
        (_, scheme) => {
            bail!("the issuer's keys are at {scheme:?}, which proves less than the issuer")
        }
    }
}

async fn dial(host: &str, port: u16) -> anyhow::Result<TcpStream> {
    let found: Vec<_> = tokio::net::lookup_host((host, port)).await?.take(MAX_ADDRESSES).collect();
    let mut last = anyhow::anyhow!("it has no address");
    for address in found {
        if is_own(address.ip()) {
            last = anyhow::anyhow!("{} is this machine's own, or its link's", address.ip());
            continue;
        }
        match TcpStream::connect(address).await {
            Ok(socket) => return Ok(socket),
            Err(error) => last = error.into(),
        }
    }
    Err(last)
}

/// Addresses that only the waypoint's own machine has: rules are no way to ask what listens there.
const fn is_own(ip: IpAddr) -> bool {
    match ip.to_canonical() {
        IpAddr::V4(ip) => ip.is_loopback() || ip.is_link_local() || ip.is_unspecified(),
        IpAddr::V6(ip) => ip.is_loopback() || ip.is_unicast_link_local() || ip.is_unspecified(),
    }
}

async fn ask<S>(stream: S, request: Request<Empty<Bytes>>) -> anyhow::Result<Bytes>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
    let exchange = async {
        let response = sender.send_request(request).await?;
        let status = response.status();
        ensure!(status == StatusCode::OK, "it answers {status}");
        let body = Limited::new(response.into_body(), MAX_KEY_SET_BYTES).collect().await;
        let body = body.map_err(|error| anyhow::anyhow!("its answer: {error}"))?;
        Ok(body.to_bytes())
    };
    tokio::pin!(exchange);
    tokio::select! {
        answer = &mut exchange => answer,
        ended = connection => {
            // What came before the end is there.
            ended?;
            exchange.await
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_issuer_speaks_for_itself_and_does_not_lead_out_of_tls() {
        let asked: Uri = "https://i/.well-known/openid-configuration".parse().unwrap();
        let of = |issuer: &str, uri: &str| {
            let text = serde_json::json!({"issuer": issuer, "jwks_uri": uri}).to_string();
            keys_of("https://i", &asked, text.as_bytes()).map(|uri| uri.to_string())
        };
        assert_eq!(of("https://i", "https://k/keys").unwrap(), "https://k/keys");
        assert!(of("https://j", "https://k/keys").is_err());
        assert!(of("https://i", "http://k/keys").is_err());
        assert!(of("https://i", "file:///keys").is_err());
        assert!(keys_of("https://i", &asked, b"<html>").is_err());
        let plain: Uri = "http://i/".parse().unwrap();
        let text = br#"{"issuer": "http://i", "jwks_uri": "http://i/keys"}"#;
        assert!(keys_of("http://i", &plain, text).is_ok());
    }

    #[test]
    fn nothing_of_the_waypoint_itself_is_asked() {
        for text in
            ["127.0.0.1", "::1", "::ffff:127.0.0.1", "169.254.169.254", "fe80::1", "0.0.0.0"]
        {
            assert!(is_own(text.parse().unwrap()), "{text}");
        }
        for text in ["10.0.0.1", "fd00::1", "192.0.2.1"] {
            assert!(!is_own(text.parse().unwrap()), "{text}");
        }
    }
}
