//! Why a peer's certificate was refused.

use mesh_model::{CloseReason, SpiffeId};
use rustls::{CertificateError, OtherError};

use crate::certificate::MAX_CHAIN;

/// Why a peer's certificate was refused; the peer's fault throughout, and not worth a retry with the same certificate.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PeerRejection {
    /// The peer showed none.
    #[error("peer showed no certificate")]
    NoCertificate,
    /// Not a certificate, or with fields that cannot be read.
    #[error("certificate cannot be parsed")]
    Malformed,
    /// More certificates than any mesh needs.
    #[error("chain of more than {MAX_CHAIN} certificates")]
    ChainTooLong,
    /// Signed by itself, and not a trusted root.
    #[error("certificate is self-signed")]
    SelfSigned,
    /// The chain leads to no root of the peer's trust domain.
    #[error("certificate chains to no trusted root")]
    UnknownIssuer,
    /// A signature in the chain, or of the handshake, is wrong.
    #[error("signature does not verify")]
    BadSignature,
    /// Past its last moment; the leaf or a certificate above it.
    #[error("certificate has expired")]
    Expired,
    /// Before its first moment; the leaf or a certificate above it.
    #[error("certificate is not valid yet")]
    NotYetValid,
    /// On the issuer's revocation list.
    #[error("certificate {} revoked", if *.depth == 0 { "is" } else { "of an issuer is" })]
    Revoked {
        /// 0 for the leaf, 1 for its issuer, and so on.
        depth: usize,
    },
    /// Not meant for this side of TLS.
    #[error("certificate is not meant for this use")]
    WrongUsage,
    /// No URI name, or one that is no identity of a mesh.
    #[error("certificate names no workload identity")]
    NoSpiffeId,
    /// More than one URI name: which one is meant?
    #[error("certificate has several URI names")]
    SeveralUriNames,
    /// An identity of a trust domain that is not accepted here.
    #[error("peer is of another trust domain: {presented}")]
    WrongTrustDomain {
        /// Who the peer claims to be.
        presented: SpiffeId,
    },
    /// Another identity than was expected.
    #[error("peer is {presented}, which was not expected")]
    WrongIdentity {
        /// Who the peer is.
        presented: SpiffeId,
    },
    /// An algorithm, critical extension or constraint that is not understood or not met.
    #[error("certificate breaks a constraint or uses an unsupported algorithm")]
    Unsupported,
}

impl PeerRejection {
    /// The outcome of the flows that waited for this peer.
    #[must_use]
    pub const fn close_reason(&self) -> CloseReason {
        match self {
            Self::Revoked { .. } => CloseReason::CertRevoked,
            Self::NoSpiffeId
            | Self::SeveralUriNames
            | Self::WrongTrustDomain { .. }
            | Self::WrongIdentity { .. } => CloseReason::WrongIdentity,
            Self::NoCertificate
            | Self::Malformed
            | Self::ChainTooLong
            | Self::SelfSigned
            | Self::UnknownIssuer
            | Self::BadSignature
            | Self::Expired
            | Self::NotYetValid
            | Self::WrongUsage
            | Self::Unsupported => CloseReason::TlsFailure,
        }
    }

    /// The word in logs and metrics.
    #[must_use]
    pub const fn as_str(&self) -> &'static str {
        match self {
            Self::NoCertificate => "no_certificate",
            Self::Malformed => "malformed",
            Self::ChainTooLong => "chain_too_long",
            Self::SelfSigned => "self_signed",
            Self::UnknownIssuer => "unknown_issuer",
            Self::BadSignature => "bad_signature",
            Self::Expired => "expired",
            Self::NotYetValid => "not_yet_valid",
            Self::Revoked { .. } => "revoked",
            Self::WrongUsage => "wrong_usage",
            Self::NoSpiffeId => "no_spiffe_id",
            Self::SeveralUriNames => "several_uri_names",
            Self::WrongTrustDomain { .. } => "wrong_trust_domain",
            Self::WrongIdentity { .. } => "wrong_identity",
            Self::Unsupported => "unsupported",
        }
    }

    /// The rejection inside a failed handshake's error; none when the handshake failed for another reason.
    #[must_use]
    #[expect(clippy::wildcard_enum_match_arm, reason = "another crate's enum, which grows")]
    pub fn from_rustls(error: &rustls::Error) -> Option<Self> {
        match error {
            rustls::Error::NoCertificatesPresented => Some(Self::NoCertificate),
            rustls::Error::InvalidCertificate(CertificateError::Other(OtherError(cause))) => {
                cause.downcast_ref::<Self>().cloned()
            }
            rustls::Error::InvalidCertificate(CertificateError::BadSignature) => {
                Some(Self::BadSignature)
            }
            rustls::Error::InvalidCertificate(CertificateError::BadEncoding) => {
                Some(Self::Malformed)
            }
            _ => None,
        }
    }

    #[expect(clippy::wildcard_enum_match_arm, reason = "another crate's enum, which grows")]
    pub(crate) fn from_webpki(error: &webpki::Error) -> Self {
        use webpki::Error;
        match error {
            Error::CertExpired { .. } => Self::Expired,
            Error::CertNotValidYet { .. } => Self::NotYetValid,
            Error::UnknownIssuer => Self::UnknownIssuer,
            Error::InvalidSignatureForPublicKey => Self::BadSignature,
            Error::RequiredEkuNotFoundContext(_) | Error::EmptyEkuExtension => Self::WrongUsage,
            Error::BadDer
            | Error::BadDerTime
            | Error::InvalidCertValidity
            | Error::InvalidSerialNumber
            | Error::MalformedExtensions
            | Error::TrailingData(_)
            | Error::UnsupportedCertVersion => Self::Malformed,
            // What is left, and what later versions add: constraints, algorithms, path limits.
            _ => Self::Unsupported,
        }
    }
}

impl From<PeerRejection> for rustls::Error {
    fn from(rejection: PeerRejection) -> Self {
        Self::InvalidCertificate(CertificateError::Other(OtherError(std::sync::Arc::new(
            rejection,
        ))))
    }
}
