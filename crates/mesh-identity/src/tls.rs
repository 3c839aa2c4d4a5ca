//! rustls settings: TLS 1.3 only, HTTP/2 only, no server names, nothing resumed.
//!
//! Returned by value, so that the caller may hook the key log or the extraction of secrets before sharing them.

use std::sync::{Arc, OnceLock};

use rustls::client::{Resumption, WebPkiServerVerifier};
use rustls::crypto::CryptoProvider;
use rustls::crypto::aws_lc_rs::{cipher_suite, default_provider, kx_group};
use rustls::server::NoServerSessionStorage;
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use rustls::{ClientConfig, ConfigBuilder, ConfigSide, RootCertStore, ServerConfig, WantsVerifier};
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;

use mesh_model::SpiffeId;

use crate::{PeerVerifier, Svid, TrustBundle};

/// The only application protocol: HTTP/2, which carries HBONE, xDS and the CA.
pub const ALPN: &[u8] = b"h2";

/// The algorithms of every connection: AES-128-GCM before AES-256-GCM, post-quantum key exchange before the others.
///
/// Source: HBONE peers speak AES-GCM only; AES-128 is the faster one.
#[must_use]
pub fn provider() -> Arc<CryptoProvider> {
    static PROVIDER: OnceLock<Arc<CryptoProvider>> = OnceLock::new();
    Arc::clone(PROVIDER.get_or_init(|| {
        let mut provider = default_provider();
        provider.cipher_suites =
            vec![cipher_suite::TLS13_AES_128_GCM_SHA256, cipher_suite::TLS13_AES_256_GCM_SHA384];
        provider.kx_groups = vec![
            kx_group::X25519MLKEM768,
            kx_group::X25519,
            kx_group::SECP256R1,
            kx_group::SECP384R1,
        ];
        Arc::new(provider)
    }))
}

/// Another TLS provider is installed in this process already; a mistake of the program's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("another TLS provider was installed before")]
pub struct AnotherProvider;

/// Makes [`provider`] the process's, for libraries that ask for none by name. Once, before anything speaks TLS.
///
/// # Errors
/// [`AnotherProvider`] on a second call, or after a library installed its own.
pub fn install() -> Result<(), AnotherProvider> {
    CryptoProvider::clone(&provider()).install_default().map_err(|_installed| AnotherProvider)
}

fn tls13<S: ConfigSide>(
    builder: ConfigBuilder<S, rustls::WantsVersions>,
) -> ConfigBuilder<S, WantsVerifier> {
    builder
        .with_protocol_versions(&[&rustls::version::TLS13])
        .expect("the provider has TLS 1.3 suites and key exchanges")
}

/// Dials a tunnel as `svid` to one of `expected`.
///
/// rustls demands a server name; give it any: it is neither sent nor compared.
#[must_use]
pub fn client(svid: &Svid, bundle: Arc<TrustBundle>, expected: Vec<SpiffeId>) -> ClientConfig {
    let mut config = tls13(ClientConfig::builder_with_provider(provider()))
        .dangerous()
        .with_custom_certificate_verifier(PeerVerifier::of_server(bundle, expected))
        .with_client_cert_resolver(Arc::new(SingleCertAndKey::from(svid.certified_key())));
    config.alpn_protocols = vec![ALPN.to_vec()];
    config.resumption = Resumption::disabled();
    config.enable_sni = false;
    config
}

/// Answers tunnels as `svid`; the peer must show a certificate of `svid`'s trust domain.
#[must_use]
pub fn server(svid: &Svid, bundle: Arc<TrustBundle>) -> ServerConfig {
    let verifier = PeerVerifier::of_clients(bundle, svid.id().trust_domain());
    let config = tls13(ServerConfig::builder_with_provider(provider()))
        .with_client_cert_verifier(verifier)
        .with_cert_resolver(Arc::new(SingleCertAndKey::from(svid.certified_key())));
    without_resumption(config)
}

/// Roots of the control plane that cannot be used; an operator's mistake.
#[derive(Debug, thiserror::Error)]
pub enum InvalidControlRoots {
    /// The text is not PEM.
    #[error("the control plane's roots are not PEM")]
    NotPem(#[source] rustls_pki_types::pem::Error),
    /// A certificate in it cannot be a root.
    #[error("a root of the control plane cannot be used")]
    Unusable(#[source] rustls::Error),
    /// There is no certificate in it.
    #[error("no root certificate for the control plane")]
    Empty(#[source] rustls::client::VerifierBuilderError),
}

/// Dials the control plane: its certificate must chain to `root_pem` and bear the server name dialled.
///
/// # Errors
/// When `root_pem` holds no usable root.
pub fn control_client(root_pem: &str) -> Result<ClientConfig, InvalidControlRoots> {
    let mut roots = RootCertStore::empty();
    for root in CertificateDer::pem_slice_iter(root_pem.as_bytes()) {
        let root = root.map_err(InvalidControlRoots::NotPem)?;
        roots.add(root).map_err(InvalidControlRoots::Unusable)?;
    }
    let verifier = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), provider())
        .build()
        .map_err(InvalidControlRoots::Empty)?;
    let mut config = tls13(ClientConfig::builder_with_provider(provider()))
        .with_webpki_verifier(verifier)
        .with_no_client_auth();
    config.alpn_protocols = vec![ALPN.to_vec()];
    config.resumption = Resumption::disabled();
    Ok(config)
}

/// Answers as the control plane with `identity`; clients prove themselves by tokens.
#[must_use]
pub fn control_server(identity: Arc<CertifiedKey>) -> ServerConfig {
    let config = tls13(ServerConfig::builder_with_provider(provider()))
        .with_no_client_auth()
        .with_cert_resolver(Arc::new(SingleCertAndKey::from(identity)));
    without_resumption(config)
}

fn without_resumption(mut config: ServerConfig) -> ServerConfig {
    config.alpn_protocols = vec![ALPN.to_vec()];
    config.send_tls13_tickets = 0;
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.ignore_client_order = true;
    config
}
