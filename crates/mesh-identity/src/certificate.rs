//! Reading X.509 certificates: the few fields the mesh goes by.

use std::time::{Duration, SystemTime};

use mesh_model::SpiffeId;
use rustls_pki_types::UnixTime;
use x509_parser::certificate::X509Certificate;
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::FromDer;

use crate::PeerRejection;

/// Most certificates a peer's chain may hold. A mesh chain has two or three; each costs a signature check.
pub(crate) const MAX_CHAIN: usize = 8;

/// Parses one certificate that must fill `der` to its end.
pub(crate) fn parse(der: &[u8]) -> Result<X509Certificate<'_>, PeerRejection> {
    match X509Certificate::from_der(der) {
        Ok(([], certificate)) => Ok(certificate),
        Ok(_) | Err(_) => Err(PeerRejection::Malformed),
    }
}

/// The one identity of a leaf: exactly one URI name, and that one of the mesh's shape.
///
/// Source: SPIFFE X.509-SVID §2: exactly one URI SAN; other kinds of names may be there and mean nothing.
pub(crate) fn spiffe_id(certificate: &X509Certificate<'_>) -> Result<SpiffeId, PeerRejection> {
    let names = certificate
        .subject_alternative_name()
        .map_err(|_malformed| PeerRejection::Malformed)?
        .ok_or(PeerRejection::NoSpiffeId)?;
    let mut uris = names
        .value
        .general_names
        .iter()
        .filter_map(|name| if let GeneralName::URI(uri) = name { Some(*uri) } else { None });
    let Some(uri) = uris.next() else { return Err(PeerRejection::NoSpiffeId) };
    if uris.next().is_some() {
        return Err(PeerRejection::SeveralUriNames);
    }
    uri.parse().map_err(|_invalid| PeerRejection::NoSpiffeId)
}

/// The span in which a certificate is valid; a date before 1970 reads as 1970.
pub(crate) fn validity(certificate: &X509Certificate<'_>) -> (SystemTime, SystemTime) {
    let validity = certificate.validity();
    (from_unix(validity.not_before.timestamp()), from_unix(validity.not_after.timestamp()))
}

fn from_unix(seconds: i64) -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(u64::try_from(seconds).unwrap_or(0))
}

/// `time` for rustls and webpki; a time before 1970 reads as 1970, when no certificate was valid.
pub(crate) fn unix_time(time: SystemTime) -> UnixTime {
    UnixTime::since_unix_epoch(time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default())
}

/// The way back from [`unix_time`].
pub(crate) fn system_time(time: UnixTime) -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(time.as_secs())
}
