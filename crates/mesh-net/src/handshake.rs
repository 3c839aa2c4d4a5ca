//! TLS handshakes of tunnels: rustls proves the peer, then hands the traffic secrets to the engine.
//!
//! A [`Handshake`] is driven by readiness and never waits. Records are shown to rustls one at a time, so that it
//! never touches a byte behind the handshake: what follows the peer's last flight is ciphertext for the engine.
//!
//! ```text
//! Flush ──► Finished? ──► Established
//!   ▲          │ no
//!   │          ▼
//!   └── feed one record ◄── read
//! ```

use std::cell::RefCell;
use std::io::{self, Read, Write};
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use mesh_identity::tls::ALPN;
use mesh_identity::{PeerCertificate, PeerRejection, Side};
use mesh_model::CloseReason;
use mesh_tunnel::{Suite, TlsSession, TrafficSecret};
use rustls::pki_types::ServerName;
use rustls::{CipherSuite, ClientConfig, Connection, ServerConfig};
use zeroize::Zeroizing;

/// How long a handshake may take from the first packet to the last. Source: ztunnel's connect timeout, 10 s.
pub const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);

/// How long a peer that dialled may keep silent. Its first record follows the connection by one round trip; two lost
/// packets on the way (1 s each, RFC 6298 §2.1) still leave time.
pub const FIRST_WORD_TIMEOUT: Duration = Duration::from_secs(3);

/// TLS record header, bytes. Source: RFC 8446 §5.1.
const RECORD_HEADER_BYTES: usize = 5;
/// Largest record body, bytes. Source: RFC 8446 §5.2, `TLSCiphertext.length`.
const MAX_RECORD_BYTES: usize = 16_384 + 256;
/// Most bytes a peer may send within one handshake; a long chain with intermediates stays below 32 KiB.
const MAX_HANDSHAKE_BYTES: usize = 128 * 1024;

/// Settings of handshakes that this agent opens; `config` is `mesh_identity::tls::client`'s.
#[must_use]
pub fn client_config(mut config: ClientConfig) -> Arc<ClientConfig> {
    config.enable_secret_extraction = true;
    config.key_log = Arc::new(SecretLog);
    Arc::new(config)
}

/// Settings of handshakes that this agent answers; `config` is `mesh_identity::tls::server`'s.
#[must_use]
pub fn server_config(mut config: ServerConfig) -> Arc<ServerConfig> {
    config.enable_secret_extraction = true;
    config.key_log = Arc::new(SecretLog);
    Arc::new(config)
}

/// What a finished handshake yields.
#[derive(Debug)]
pub struct Established {
    /// Keys, sequence numbers and the ciphertext read past the handshake, for the engine.
    pub session: TlsSession,
    /// What the peer proved itself by.
    pub peer: PeerCertificate,
}

/// Why a handshake came to nothing.
#[derive(Debug, thiserror::Error)]
pub enum HandshakeError {
    /// The TCP connection to the tunnel port failed.
    #[error("cannot connect to the tunnel port")]
    Connect(#[source] io::Error),
    /// The connection failed during the handshake.
    #[error("connection failed during the handshake")]
    Io(#[source] io::Error),
    /// The peer closed before the handshake was done.
    #[error("peer closed during the handshake")]
    Closed,
    /// The peer, which was dialled, ended the connection before it had said anything: it is overloaded or draining, or
    /// no tunnel endpoint at all.
    #[error("peer ended the connection without an answer")]
    Refused(#[source] Option<io::Error>),
    /// Nothing came of it within [`HANDSHAKE_TIMEOUT`]; true when not even TCP was established.
    #[error("no handshake within the time limit")]
    TimedOut {
        /// True when the TCP connection was still missing.
        connecting: bool,
    },
    /// The peer, which dialled, did not send one whole record within the time limit for that.
    #[error("peer kept silent")]
    Silent,
    /// The peer's certificate was refused.
    #[error("peer's certificate refused")]
    Rejected(#[source] PeerRejection),
    /// The peer refused with an alert, a certificate it does not like, or something that is not TLS 1.3.
    #[error("TLS failed")]
    Tls(#[source] rustls::Error),
    /// The peer negotiated no HTTP/2.
    #[error("peer did not negotiate HTTP/2")]
    NoAlpn,
    /// The peer sent more than a handshake may hold.
    #[error("handshake longer than {MAX_HANDSHAKE_BYTES} bytes")]
    TooLong,
    /// Too many handshakes are in flight on this worker.
    #[error("too many handshakes in flight")]
    Overloaded,
    /// It made room for another one: too many are in flight, most of them with its pod or its peer.
    #[error("made room for another handshake")]
    Evicted,
}

impl HandshakeError {
    /// The outcome of the flows that waited for this handshake.
    #[must_use]
    pub fn close_reason(&self) -> CloseReason {
        match self {
            Self::Connect(_) | Self::TimedOut { connecting: true } => {
                CloseReason::TunnelConnectFailed
            }
            Self::Rejected(rejection) => rejection.close_reason(),
            Self::Overloaded | Self::Evicted => CloseReason::Overloaded,
            Self::Silent => CloseReason::TimedOut,
            Self::Refused(_) => CloseReason::PeerRefused,
            Self::Tls(error) if is_refusal(error) => CloseReason::PeerRefused,
            Self::Io(_)
            | Self::Closed
            | Self::TimedOut { connecting: false }
            | Self::Tls(_)
            | Self::NoAlpn
            | Self::TooLong => CloseReason::TlsFailure,
        }
    }

    fn from_rustls(error: rustls::Error) -> Self {
        match PeerRejection::from_rustls(&error) {
            Some(rejection) => Self::Rejected(rejection),
            None => Self::Tls(error),
        }
    }
}

/// One handshake in flight.
#[derive(Debug)]
pub struct Handshake {
    connection: Connection,
    secrets: Secrets,
    /// Bytes for the peer; `sent` of them are gone.
    output: Vec<u8>,
    sent: usize,
    /// Bytes of the peer that rustls has not seen.
    input: Vec<u8>,
    /// Bytes shown to rustls.
    consumed: usize,
}

impl Handshake {
    /// A handshake as the dialling side.
    ///
    /// # Errors
    /// [`HandshakeError::Tls`] when the settings cannot open one.
    pub fn client(config: Arc<ClientConfig>) -> Result<Self, HandshakeError> {
        // Never sent (SNI is off) and never compared: peers are judged by their SPIFFE identity.
        let name = ServerName::try_from("culvert.invalid").expect("a valid DNS name");
        let connection =
            rustls::ClientConnection::new(config, name).map_err(HandshakeError::Tls)?;
        Ok(Self::over(connection.into()))
    }

    /// A handshake as the accepting side.
    ///
    /// # Errors
    /// [`HandshakeError::Tls`] when the settings cannot answer one.
    pub fn server(config: Arc<ServerConfig>) -> Result<Self, HandshakeError> {
        let connection = rustls::ServerConnection::new(config).map_err(HandshakeError::Tls)?;
        Ok(Self::over(connection.into()))
    }

    const fn over(connection: Connection) -> Self {
        Self {
            connection,
            secrets: Secrets { client: None, server: None },
            output: Vec::new(),
            sent: 0,
            input: Vec::new(),
            consumed: 0,
        }
    }

    /// True once the peer has sent a whole record that rustls took.
    #[must_use]
    pub const fn has_heard(&self) -> bool {
        self.consumed > 0
    }

    /// True while no byte of the peer's was read: whoever has the socket can begin anew.
    #[must_use]
    pub fn is_untouched(&self) -> bool {
        self.consumed == 0 && self.input.is_empty()
    }

    /// Goes on as far as `stream` allows. After `Ready` or an error the handshake is spent.
    ///
    /// # Errors
    /// See [`HandshakeError`]. The alert that rustls made of it has been sent as far as the socket took it.
    pub fn advance(
        &mut self,
        stream: &mut (impl Read + Write),
    ) -> Result<Poll<Finished>, HandshakeError> {
        loop {
            if !self.flush(stream)? {
                return Ok(Poll::Pending);
            }
            if !self.connection.is_handshaking() {
                return Ok(Poll::Ready(Finished(())));
            }
            if let Some(length) = self.next_record()? {
                self.feed(length, stream)?;
                continue;
            }
            if !self.fill(stream)? {
                return Ok(Poll::Pending);
            }
        }
    }

    /// The keys and the peer of a handshake whose [`advance`](Self::advance) was `Ready`.
    ///
    /// # Errors
    /// When HTTP/2 was not negotiated, or the secrets are not to be had.
    pub fn establish(self, _proof: Finished) -> Result<Established, HandshakeError> {
        let Self { connection, secrets, input, .. } = self;
        let is_client = matches!(connection, Connection::Client(_));
        // A peer that offers no protocol at all may still speak HTTP/2 to a server; rustls refuses other offers.
        let alpn = connection.alpn_protocol();
        if alpn != Some(ALPN) && (is_client || alpn.is_some()) {
            return Err(HandshakeError::NoAlpn);
        }
        let presented_by = if is_client { Side::Server } else { Side::Client };
        let chain = connection.peer_certificates().unwrap_or_default();
        let peer = PeerCertificate::new(chain, presented_by).map_err(HandshakeError::Rejected)?;
        let suite = connection
            .negotiated_cipher_suite()
            .and_then(|suite| known_suite(suite.suite()))
            .ok_or_else(|| incomplete("no known cipher suite"))?;
        let extracted = connection.dangerous_extract_secrets().map_err(HandshakeError::Tls)?;
        let (Some(client), Some(server)) = (secrets.client, secrets.server) else {
            return Err(incomplete("traffic secrets were not logged"));
        };
        let (tx, rx) = if is_client { (client, server) } else { (server, client) };
        let secret = |bytes: &[u8]| {
            TrafficSecret::new(suite, bytes).map_err(|error| incomplete(&error.to_string()))
        };
        let session = TlsSession {
            suite,
            tx: secret(&tx)?,
            rx: secret(&rx)?,
            tx_seq: extracted.tx.0,
            rx_seq: extracted.rx.0,
            leftover: input,
        };
        Ok(Established { session, peer })
    }

    /// True when everything is sent.
    fn flush(&mut self, stream: &mut impl Write) -> Result<bool, HandshakeError> {
        while self.connection.wants_write() {
            self.connection.write_tls(&mut self.output).map_err(HandshakeError::Io)?;
        }
        while self.sent < self.output.len() {
            match stream.write(&self.output[self.sent..]) {
                Ok(0) => return Err(self.ended(None)),
                Ok(count) => self.sent += count,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(self.ended(Some(error))),
            }
        }
        self.output.clear();
        self.sent = 0;
        Ok(true)
    }

    /// Length of the record in front of the input, header included, when all of it is there.
    fn next_record(&self) -> Result<Option<usize>, HandshakeError> {
        let Some(header) = self.input.first_chunk::<RECORD_HEADER_BYTES>() else {
            return Ok(None);
        };
        // change_cipher_spec, alert, handshake, application_data.
        if !matches!(header[0], 20..=23) {
            return Err(HandshakeError::Tls(rustls::InvalidMessage::InvalidContentType.into()));
        }
        let body = usize::from(u16::from_be_bytes([header[3], header[4]]));
        if body > MAX_RECORD_BYTES {
            return Err(HandshakeError::Tls(rustls::InvalidMessage::MessageTooLarge.into()));
        }
        let length = RECORD_HEADER_BYTES + body;
        Ok((self.input.len() >= length).then_some(length))
    }

    fn feed(&mut self, length: usize, stream: &mut impl Write) -> Result<(), HandshakeError> {
        self.consumed += length;
        if self.consumed > MAX_HANDSHAKE_BYTES {
            return Err(HandshakeError::TooLong);
        }
        let mut record = &self.input[..length];
        while !record.is_empty() {
            if self.connection.read_tls(&mut record).map_err(HandshakeError::Io)? == 0 {
                return Err(HandshakeError::Closed);
            }
        }
        self.input.drain(..length);
        let processed = self.connection.process_new_packets();
        self.secrets.collect();
        match processed {
            Ok(_state) => Ok(()),
            Err(error) => {
                if let Err(unsent) = self.flush(stream) {
                    tracing::debug!(%unsent, "the alert could not be sent");
                }
                Err(HandshakeError::from_rustls(error))
            }
        }
    }

    /// Reads what is there; false when nothing is.
    fn fill(&mut self, stream: &mut impl Read) -> Result<bool, HandshakeError> {
        let mut chunk = [0_u8; 8 * 1024];
        loop {
            match stream.read(&mut chunk) {
                Ok(0) => return Err(self.ended(None)),
                Ok(count) => {
                    self.input.extend_from_slice(&chunk[..count]);
                    return Ok(true);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(self.ended(Some(error))),
            }
        }
    }

    /// The peer ended the connection; `error` tells how, unless it did so in good order.
    fn ended(&self, error: Option<io::Error>) -> HandshakeError {
        let unanswered = matches!(self.connection, Connection::Client(_)) && !self.has_heard();
        match error {
            error if unanswered => HandshakeError::Refused(error),
            Some(error) => HandshakeError::Io(error),
            None => HandshakeError::Closed,
        }
    }
}

/// True for an alert by which a peer that speaks TLS well says no: to us, to our certificate, or to everybody for now.
/// Source: RFC 8446 §6.2.
#[expect(clippy::wildcard_enum_match_arm, reason = "another crate's enums, which grow")]
const fn is_refusal(error: &rustls::Error) -> bool {
    use rustls::AlertDescription as Alert;
    match error {
        rustls::Error::AlertReceived(alert) => matches!(
            alert,
            Alert::AccessDenied
                | Alert::BadCertificate
                | Alert::CertificateExpired
                | Alert::CertificateRequired
                | Alert::CertificateRevoked
                | Alert::CertificateUnknown
                | Alert::InternalError
                | Alert::UnknownCA
                | Alert::UnsupportedCertificate
                | Alert::UserCanceled
        ),
        _ => false,
    }
}

fn known_suite(suite: CipherSuite) -> Option<Suite> {
    let known = [
        (CipherSuite::TLS13_AES_128_GCM_SHA256, Suite::Aes128Gcm),
        (CipherSuite::TLS13_AES_256_GCM_SHA384, Suite::Aes256Gcm),
    ];
    known.into_iter().find(|(theirs, _)| *theirs == suite).map(|(_, ours)| ours)
}

/// Proof that a [`Handshake`] is done.
#[derive(Debug)]
pub struct Finished(());

fn incomplete(what: &str) -> HandshakeError {
    HandshakeError::Tls(rustls::Error::General(what.to_owned()))
}

/// The two secrets the engine needs, as they become known.
#[derive(Default)]
struct Secrets {
    client: Option<Zeroizing<Vec<u8>>>,
    server: Option<Zeroizing<Vec<u8>>>,
}

impl std::fmt::Debug for Secrets {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Secrets(..)")
    }
}

thread_local! {
    /// What [`SecretLog`] heard during the call into rustls that is running on this thread.
    static HEARD: RefCell<Secrets> = const { RefCell::new(Secrets { client: None, server: None }) };
}

impl Secrets {
    /// Takes what the last call into rustls logged. Calls are not nested, so it is this handshake's.
    fn collect(&mut self) {
        let heard = HEARD.take();
        self.client = heard.client.or_else(|| self.client.take());
        self.server = heard.server.or_else(|| self.server.take());
    }
}

/// The only way to the traffic secrets, which a successor process and KeyUpdate need, is rustls' key log.
#[derive(Debug)]
struct SecretLog;

const CLIENT_SECRET: &str = "CLIENT_TRAFFIC_SECRET_0";
const SERVER_SECRET: &str = "SERVER_TRAFFIC_SECRET_0";

impl rustls::KeyLog for SecretLog {
    fn log(&self, label: &str, _client_random: &[u8], secret: &[u8]) {
        let secret = Zeroizing::new(secret.to_vec());
        HEARD.with_borrow_mut(|heard| match label {
            CLIENT_SECRET => heard.client = Some(secret),
            SERVER_SECRET => heard.server = Some(secret),
            _ => {}
        });
    }

    fn will_log(&self, label: &str) -> bool {
        matches!(label, CLIENT_SECRET | SERVER_SECRET)
    }
}

#[cfg(test)]
mod tests;
