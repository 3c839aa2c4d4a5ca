//! A tunnel's client made by hand, on the host outside the mesh, with any certificate one likes.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use anyhow::{Context as _, ensure};
use mesh_identity::{PeerVerifier, TrustBundle};
use mesh_model::SpiffeId;
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, ExtendedKeyUsagePurpose, IsCa, Issuer,
    KeyPair, SanType,
};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, ServerName};
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use rustls::{ClientConfig, ClientConnection, ServerConfig, StreamOwned};
use serde_json::Value;

use crate::mesh::{Mesh, inside};

/// A certificate chain and its key.
#[derive(Clone)]
pub(crate) struct Credentials {
    chain: Vec<CertificateDer<'static>>,
    key: Vec<u8>,
}

impl Credentials {
    /// A key without a certificate.
    pub(crate) fn none() -> anyhow::Result<Self> {
        Ok(Self { chain: Vec::new(), key: KeyPair::generate()?.serialize_der() })
    }
}

/// What a hand-made certificate says.
pub(crate) struct Wanted {
    /// URI names.
    pub(crate) uris: Vec<String>,
    /// DNS names.
    pub(crate) names: Vec<String>,
    /// First and last year.
    pub(crate) years: (i32, i32),
    /// The last moment, instead of the last year's.
    pub(crate) end: Option<SystemTime>,
    /// The serial number, where it matters.
    pub(crate) serial: Option<u64>,
    /// What it may be used for.
    pub(crate) usages: Vec<ExtendedKeyUsagePurpose>,
}

impl Wanted {
    /// An ordinary certificate of an identity.
    pub(crate) fn of(identity: &str) -> Self {
        Self {
            uris: vec![identity.to_owned()],
            names: Vec::new(),
            years: (2020, 2100),
            end: None,
            serial: None,
            usages: vec![ExtendedKeyUsagePurpose::ClientAuth, ExtendedKeyUsagePurpose::ServerAuth],
        }
    }

    fn params(&self) -> anyhow::Result<CertificateParams> {
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        for uri in &self.uris {
            params.subject_alt_names.push(SanType::URI(uri.as_str().try_into()?));
        }
        for name in &self.names {
            params.subject_alt_names.push(SanType::DnsName(name.as_str().try_into()?));
        }
        params.not_before = rcgen::date_time_ymd(self.years.0, 1, 1);
        params.not_after = match self.end {
            Some(end) => end.into(),
            None => rcgen::date_time_ymd(self.years.1, 1, 1),
        };
        params.serial_number = self.serial.map(Into::into);
        params.extended_key_usages.clone_from(&self.usages);
        params.use_authority_key_identifier_extension = true;
        Ok(params)
    }

    /// Signed by its own key.
    pub(crate) fn self_signed(&self) -> anyhow::Result<Credentials> {
        let key = KeyPair::generate()?;
        let leaf = self.params()?.self_signed(&key)?;
        Ok(Credentials { chain: vec![leaf.der().clone()], key: key.serialize_der() })
    }

    /// Signed by an authority that nobody here knows.
    pub(crate) fn signed_elsewhere(&self) -> anyhow::Result<Credentials> {
        let root_key = KeyPair::generate()?;
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let root = params.self_signed(&root_key)?;
        self.signed_by(&Issuer::new(params, root_key), root.der().clone())
    }

    /// Signed by the mesh's own authority, whose key is in the controller's state directory.
    pub(crate) fn signed_by_the_mesh(&self, mesh: &Mesh) -> anyhow::Result<Credentials> {
        let state = std::fs::read_to_string(mesh.lab.folder().join("controller/ca.json"))?;
        let state: Value = serde_json::from_str(&state)?;
        let intermediate = &state["ca"]["intermediates"][0];
        let cert = intermediate["cert_pem"].as_str().context("no intermediate")?;
        let key = intermediate["key_pem"].as_str().context("no key of the intermediate")?;
        let issuer = Issuer::from_ca_cert_pem(cert, KeyPair::from_pem(key)?)?;
        self.signed_by(&issuer, CertificateDer::from_pem_slice(cert.as_bytes())?)
    }

    /// Signed by the mesh's own authority, and then revoked; agents hear of it within seconds.
    pub(crate) fn revoked(identity: &str, mesh: &Mesh) -> anyhow::Result<Credentials> {
        const SERIAL: u64 = 0x5eed_0000_0000_0001;
        let wanted = Self { serial: Some(SERIAL), ..Self::of(identity) };
        let credentials = wanted.signed_by_the_mesh(mesh)?;
        // The authority did not make it itself, says so, and revokes it all the same.
        let told =
            mesh.lab.controller_command(&["ca", "revoke", "--serial", &format!("{SERIAL:x}")]);
        let told = told.err().map(|error| format!("{error:#}")).unwrap_or_default();
        ensure!(told.contains("never issued it"), "a serial of somebody else: {told:?}");
        Ok(credentials)
    }

    fn signed_by(
        &self,
        issuer: &Issuer<'_, KeyPair>,
        issuer_cert: CertificateDer<'static>,
    ) -> anyhow::Result<Credentials> {
        let key = KeyPair::generate()?;
        let leaf = self.params()?.signed_by(&key, issuer)?;
        let chain = vec![leaf.der().clone(), issuer_cert];
        Ok(Credentials { chain, key: key.serialize_der() })
    }
}

/// The TLS settings of a client that takes nobody but `server` for the server.
pub(crate) fn client(
    mesh: &Mesh,
    credentials: Option<Credentials>,
    server: &str,
) -> anyhow::Result<Arc<ClientConfig>> {
    let roots = mesh.lab.controller_command(&["ca", "root"])?;
    let bundle = Arc::new(TrustBundle::from_pem("cluster.local", &roots, "")?);
    let server: SpiffeId = server.parse()?;
    let builder = ClientConfig::builder_with_provider(mesh_identity::tls::provider())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(PeerVerifier::of_server(bundle, vec![server]));
    let mut config = match credentials {
        None => builder.with_no_client_auth(),
        Some(Credentials { chain, key }) => {
            let key = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(key));
            builder.with_client_auth_cert(chain, key)?
        }
    };
    config.alpn_protocols = vec![b"h2".to_vec()];
    Ok(Arc::new(config))
}

/// The TLS settings of a server that takes everybody of the mesh for its client.
pub(crate) fn server(
    mesh: &Mesh,
    Credentials { chain, key }: Credentials,
) -> anyhow::Result<Arc<ServerConfig>> {
    let roots = mesh.lab.controller_command(&["ca", "root"])?;
    let bundle = Arc::new(TrustBundle::from_pem("cluster.local", &roots, "")?);
    let provider = mesh_identity::tls::provider();
    let key = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(key));
    // Not by the builder, which takes no empty chain.
    let shown = CertifiedKey::new(chain, provider.key_provider.load_private_key(key)?);
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_client_cert_verifier(PeerVerifier::of_clients(bundle, "cluster.local"))
        .with_cert_resolver(Arc::new(SingleCertAndKey::from(shown)));
    config.alpn_protocols = vec![b"h2".to_vec()];
    Ok(Arc::new(config))
}

/// What became of a [`knock`].
#[derive(Debug)]
pub(crate) struct Knocked {
    /// Our own address, by which the agent's log names us.
    pub(crate) from: SocketAddr,
    /// The server's first bytes of HTTP/2, or why there are none.
    pub(crate) answer: Result<Vec<u8>, String>,
}

/// Dials a tunnel from the host outside the mesh and waits for its first bytes.
pub(crate) fn knock(
    mesh: &Mesh,
    target: SocketAddr,
    config: &Arc<ClientConfig>,
) -> anyhow::Result<Knocked> {
    inside(mesh.lab.outside(), || {
        let limit = Duration::from_secs(20);
        let tcp = TcpStream::connect_timeout(&target, limit).context("dialling the tunnel port")?;
        tcp.set_read_timeout(Some(limit))?;
        tcp.set_write_timeout(Some(limit))?;
        let from = tcp.local_addr()?;
        let name = ServerName::IpAddress(target.ip().into());
        let mut tls = StreamOwned::new(ClientConnection::new(Arc::clone(config), name)?, tcp);
        let mut talk = || -> std::io::Result<Vec<u8>> {
            // The preface and empty SETTINGS.
            tls.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0")?;
            let mut answer = vec![0; 1024];
            let length = tls.read(&mut answer)?;
            answer.truncate(length);
            Ok(answer)
        };
        let answer = match talk() {
            Ok(bytes) if bytes.is_empty() => Err("closed".to_owned()),
            Ok(bytes) => Ok(bytes),
            Err(error) => Err(error.to_string()),
        };
        Ok(Knocked { from, answer })
    })
}
