//! Errors as one line of text.

use std::error::Error;
use std::sync::Arc;

pub(crate) use mesh_model::error_chain;

/// Longest text of an error in a line of the access log, bytes. A peer's identity alone may have 2,048.
const MAX_DETAIL_BYTES: usize = 512;

/// An error as a line of the access log tells it: whole, but for what is too long.
pub(crate) fn detail(error: &dyn Error) -> Arc<str> {
    let mut text = error_chain(error);
    if text.len() > MAX_DETAIL_BYTES {
        text.truncate(text.floor_char_boundary(MAX_DETAIL_BYTES));
        text.push('…');
    }
    text.into()
}

#[cfg(test)]
mod tests {
    use mesh_identity::PeerRejection;
    use mesh_model::SpiffeId;
    use mesh_net::handshake::HandshakeError;

    use super::*;

    #[test]
    fn each_refused_certificate_has_its_own_text_of_bounded_length() {
        let presented = SpiffeId::new("elsewhere.example", "mesh", "standin").unwrap();
        let rejections = [
            PeerRejection::NoCertificate,
            PeerRejection::SelfSigned,
            PeerRejection::UnknownIssuer,
            PeerRejection::Expired,
            PeerRejection::NotYetValid,
            PeerRejection::Revoked { depth: 0 },
            PeerRejection::Revoked { depth: 1 },
            PeerRejection::NoSpiffeId,
            PeerRejection::SeveralUriNames,
            PeerRejection::WrongTrustDomain { presented: presented.clone() },
            PeerRejection::WrongIdentity { presented },
        ];
        let mut texts: Vec<_> = rejections
            .into_iter()
            .map(|rejection| {
                let own = rejection.to_string();
                let text = detail(&HandshakeError::Rejected(rejection));
                assert!(text.ends_with(&own), "{text}");
                text
            })
            .collect();
        let all = texts.len();
        texts.sort();
        texts.dedup();
        assert_eq!(texts.len(), all);

        let long = SpiffeId::new(&"a".repeat(200), "mesh", &"b".repeat(1000)).unwrap();
        let text = detail(&PeerRejection::WrongIdentity { presented: long });
        assert!(text.starts_with("peer is spiffe://aaa") && text.ends_with('…'), "{text}");
        assert!(text.len() <= MAX_DETAIL_BYTES + '…'.len_utf8());
    }
}
