//! One agent process hands its work to another: docs/handover.md has the protocol and what a crash means at each step.
//!
//! [`predecessor`] is the side that runs, [`successor`] the side that has just started; [`protocol`] is what they say.

pub(crate) mod doors;
pub(crate) mod predecessor;
mod protocol;
pub(crate) mod successor;

use std::io;
use std::path::PathBuf;

use crate::dataplane::HandOverRefused;

/// What must be the same for two processes to be the same agent.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub(crate) struct Place {
    /// The node's name.
    pub(crate) node: String,
    /// The folder of what survives a restart.
    pub(crate) state_dir: PathBuf,
    /// The folder of the pins.
    pub(crate) bpffs: PathBuf,
}

/// A hand-over that did not come about.
#[derive(Debug, thiserror::Error)]
pub(crate) enum HandOverFailure {
    /// The other process is gone, or does not answer in time.
    #[error("the other agent is gone or does not answer")]
    Gone(#[source] io::Error),
    /// The other process is somebody else's.
    #[error("the other end is run by uid {0}, not by this agent's user")]
    Foreign(u32),
    /// The other process said why not.
    #[error("the running agent refuses: {0}")]
    Refused(String),
    /// The other process said something else than the protocol has.
    #[error("the other agent said {0}, which does not belong here")]
    Unexpected(u8),
    /// What it said does not parse.
    #[error("the other agent's words do not parse")]
    Malformed(#[source] serde_json::Error),
    /// Certificates do not parse.
    #[error("the predecessor's certificates do not parse")]
    Keys(#[source] prost::DecodeError),
    /// A certificate cannot be used.
    #[error("a certificate of the predecessor cannot be used")]
    Certificate(#[source] mesh_identity::InvalidAnswer),
    /// The data plane was not handed over.
    #[error("the data plane cannot be handed over")]
    DataPlane(#[source] HandOverRefused),
    /// The list of pods is not on disk, from where the successor reads it.
    #[error("the list of enrolled pods cannot be written")]
    List(#[source] io::Error),
}

impl HandOverFailure {
    /// True when the other process has ended or closed the line, rather than being slow.
    fn is_end(&self) -> bool {
        matches!(self, Self::Gone(error) if matches!(
            error.kind(),
            io::ErrorKind::UnexpectedEof | io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset
        ))
    }
}

impl From<HandOverRefused> for HandOverFailure {
    fn from(refused: HandOverRefused) -> Self {
        Self::DataPlane(refused)
    }
}
