//! What two agents say to each other, as parcels over a Unix socket.

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use mesh_identity::{CsrKey, Svid};
use mesh_net::parcel::{self, Parcel};
use mesh_runtime::WrittenMetrics;
use prost::Message as _;
use rustls_pki_types::CertificateDer;
use serde::{Deserialize, Serialize};
use zeroize::{Zeroize as _, Zeroizing};

use super::{HandOverFailure, Place};

/// The version of this conversation. Raised when an older end must not go on; what may be skipped is added as a field.
pub(super) const PROTOCOL: u32 = 1;

/// What a parcel is.
pub(super) mod kind {
    /// Successor: who I am. JSON [`Hello`](super::Hello).
    pub(in crate::handover) const HELLO: u8 = 1;
    /// Predecessor: come in, nothing is enrolled meanwhile. JSON [`Welcome`](super::Welcome).
    pub(in crate::handover) const WELCOME: u8 = 2;
    /// Predecessor: no, and why; text.
    pub(in crate::handover) const REFUSED: u8 = 3;
    /// Predecessor: certificates with their keys.
    pub(in crate::handover) const CERTIFICATES: u8 = 4;
    /// Successor: I can begin.
    pub(in crate::handover) const READY: u8 = 5;
    /// Predecessor: a part of the data plane.
    pub(in crate::handover) const PART: u8 = 6;
    /// Predecessor: that was all; whoever reads the byte of this pipe goes on. JSON, names of the agent's own listeners, which
    /// come behind the pipe: the successor holds them from the moment on at which it owns everything.
    pub(in crate::handover) const TOKEN: u8 = 7;
    /// Predecessor: sockets of the pods' resolvers. JSON, how many of each pod.
    pub(in crate::handover) const RESOLVERS: u8 = 11;
    /// Successor: the engines run here.
    pub(in crate::handover) const RUNNING: u8 = 8;
    /// Successor: every pod is served here.
    pub(in crate::handover) const SERVING: u8 = 9;
    /// Predecessor: the agent's own listeners and its counters. JSON [`Farewell`](super::Farewell).
    pub(in crate::handover) const FAREWELL: u8 = 10;
}

/// The successor introduces itself.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Hello {
    pub(super) protocol: u32,
    pub(super) version: String,
    /// The newest form of an engine that it reads.
    pub(super) engine_format: u32,
    /// The layout of what it pins; older versions do not say it.
    #[serde(default = "oldest_layout")]
    pub(super) layout: u32,
    pub(super) place: Place,
}

/// The layout of the agents that did not say theirs.
const fn oldest_layout() -> u32 {
    3
}

/// The predecessor lets it in.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Welcome {
    pub(super) version: String,
    /// Engines that hold something.
    pub(super) engines: usize,
}

/// The last words.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Farewell {
    /// Names of the listeners that come with it, in order.
    pub(super) doors: Vec<String>,
    pub(super) metrics: WrittenMetrics,
}

/// Certificates with their keys. Not JSON, which would leave copies of keys behind.
#[derive(Clone, PartialEq, prost::Message)]
#[prost(skip_debug)]
struct Certificates {
    #[prost(message, repeated, tag = "1")]
    all: Vec<Certificate>,
}

#[derive(Clone, PartialEq, prost::Message)]
#[prost(skip_debug)]
struct Certificate {
    #[prost(bytes = "vec", repeated, tag = "1")]
    chain: Vec<Vec<u8>>,
    #[prost(bytes = "vec", tag = "2")]
    key: Vec<u8>,
}

/// Writes certificates down.
pub(super) fn certificates<'a>(svids: impl Iterator<Item = &'a Svid>) -> Zeroizing<Vec<u8>> {
    let mut all: Vec<Certificate> = svids
        .map(|svid| Certificate {
            chain: svid.chain().iter().map(|der| der.to_vec()).collect(),
            key: svid.key().to_pkcs8().to_vec(),
        })
        .collect();
    let message = Certificates { all: std::mem::take(&mut all) };
    let bytes = Zeroizing::new(message.encode_to_vec());
    for mut certificate in message.all {
        certificate.key.zeroize();
    }
    bytes
}

/// Reads them again.
pub(super) fn read_certificates(bytes: &[u8]) -> Result<Vec<Svid>, HandOverFailure> {
    let message = Certificates::decode(bytes).map_err(HandOverFailure::Keys)?;
    let read = |certificate: Certificate| {
        let key = CsrKey::from_pkcs8(Zeroizing::new(certificate.key));
        let chain = certificate.chain.into_iter().map(CertificateDer::from).collect();
        Svid::handed_over(chain, key).map_err(HandOverFailure::Certificate)
    };
    message.all.into_iter().map(read).collect()
}

/// One end of a conversation.
#[derive(Debug)]
pub(super) struct Line {
    stream: UnixStream,
}

/// Longest word but the data plane's parts.
const MAX_WORD_BYTES: usize = 64 << 20;

impl Line {
    /// A line to a process of this agent's user.
    ///
    /// # Errors
    /// When it is another user's, or gone.
    pub(super) fn new(stream: UnixStream) -> Result<Self, HandOverFailure> {
        let peer =
            nix::sys::socket::getsockopt(&stream, nix::sys::socket::sockopt::PeerCredentials)
                .map_err(|error| HandOverFailure::Gone(error.into()))?;
        if peer.uid() != nix::unistd::geteuid().as_raw() {
            return Err(HandOverFailure::Foreign(peer.uid()));
        }
        Ok(Self { stream })
    }

    /// How long a word may take from here on.
    pub(super) fn be_patient(&self, patience: Duration) -> Result<(), HandOverFailure> {
        let set = self.stream.set_read_timeout(Some(patience));
        set.and_then(|()| self.stream.set_write_timeout(Some(patience)))
            .map_err(HandOverFailure::Gone)
    }

    pub(super) fn say(
        &self,
        kind: u8,
        bytes: &[u8],
        fds: &[impl AsFd],
    ) -> Result<(), HandOverFailure> {
        parcel::send(&self.stream, kind, bytes, fds).map_err(HandOverFailure::Gone)
    }

    pub(super) fn say_json(
        &self,
        kind: u8,
        word: &impl Serialize,
        fds: &[OwnedFd],
    ) -> Result<(), HandOverFailure> {
        let bytes = serde_json::to_vec(word).map_err(HandOverFailure::Malformed)?;
        self.say(kind, &bytes, fds)
    }

    /// The next word, whatever it is.
    pub(super) fn hear_any(&self, max_bytes: usize) -> Result<Parcel, HandOverFailure> {
        let parcel = parcel::receive(&self.stream, max_bytes).map_err(HandOverFailure::Gone)?;
        if parcel.kind == kind::REFUSED {
            return Err(HandOverFailure::Refused(
                String::from_utf8_lossy(&parcel.bytes).into_owned(),
            ));
        }
        Ok(parcel)
    }

    /// The next word, which must be of `kind`.
    pub(super) fn hear(&self, kind: u8) -> Result<Parcel, HandOverFailure> {
        let parcel = self.hear_any(MAX_WORD_BYTES)?;
        if parcel.kind == kind { Ok(parcel) } else { Err(HandOverFailure::Unexpected(parcel.kind)) }
    }
}

/// Parses a word.
pub(super) fn parse<T: for<'de> Deserialize<'de>>(parcel: &Parcel) -> Result<T, HandOverFailure> {
    serde_json::from_slice(&parcel.bytes).map_err(HandOverFailure::Malformed)
}

/// No descriptors.
pub(super) const NONE: &[OwnedFd] = &[];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_word_that_does_not_belong_there_is_named_and_a_refusal_is_told() {
        let (near, far) = UnixStream::pair().unwrap();
        let (near, far) = (Line::new(near).unwrap(), Line::new(far).unwrap());
        near.say(kind::READY, b"", NONE).unwrap();
        assert!(matches!(far.hear(kind::HELLO), Err(HandOverFailure::Unexpected(kind::READY))));
        near.say(kind::REFUSED, b"not today", NONE).unwrap();
        let refused = far.hear(kind::WELCOME).unwrap_err();
        assert!(refused.to_string().contains("not today"), "{refused}");
        drop(near);
        assert!(matches!(far.hear(kind::WELCOME), Err(HandOverFailure::Gone(_))));
    }
}
