//! An engine written down for its successor in another process, and read again.
//!
//! The form is protocol buffers, so that a successor one version older or newer reads it: what is new in a version is a field
//! that others skip. A change that others must not skip raises [`FORMAT`], and [`EngineState::needs`] with it.
//!
//! It holds the traffic secrets of live tunnels. It goes from process to process through memory only.

mod places;
mod relay;
mod tunnel;

use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use mesh_model::{PodUid, SpiffeId, WorkloadUid};

use crate::event::TunnelKey;
use crate::io::SockId;

pub(crate) use places::{
    DecoderState, EntryState, FrameReaderState, OutboxState, RecordKeyState, WindowState,
};
pub(crate) use relay::{LaneState, SpliceState, StreamState};
pub(crate) use tunnel::TunnelState;

/// The version of the form that this engine writes.
pub const FORMAT: u32 = 1;

/// Why a state cannot be taken over. Nothing has been sealed or read then: the predecessor may go on.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HandOverError {
    /// It does not parse.
    #[error("the predecessor's state does not parse: {0}")]
    Malformed(String),
    /// It needs a newer engine.
    #[error(
        "the predecessor's state needs format {needs}, this engine knows up to {FORMAT}: \
         hand over to a newer version, or restart without a hand-over"
    )]
    Format {
        /// The lowest format that suffices.
        needs: u32,
    },
    /// A value that no engine has.
    #[error("the predecessor's state is inconsistent: {0}")]
    Inconsistent(&'static str),
    /// A socket it speaks of did not come with it.
    #[error("socket {0:?} of the predecessor's state did not come with it")]
    MissingSocket(SockId),
}

impl From<prost::DecodeError> for HandOverError {
    fn from(error: prost::DecodeError) -> Self {
        Self::Malformed(error.to_string())
    }
}

/// Everything that one engine owns.
#[derive(Clone, PartialEq, prost::Message)]
#[prost(skip_debug)]
pub(crate) struct EngineState {
    /// The version it is written in.
    #[prost(uint32, tag = "1")]
    pub(crate) format: u32,
    /// The lowest version that can go on with it.
    #[prost(uint32, tag = "2")]
    pub(crate) needs: u32,
    #[prost(message, repeated, tag = "3")]
    pub(crate) tunnels: Vec<TunnelState>,
    #[prost(message, repeated, tag = "4")]
    pub(crate) streams: Vec<StreamState>,
    #[prost(message, repeated, tag = "5")]
    pub(crate) splices: Vec<SpliceState>,
    /// Above the generations of all keys that were given, so that no name comes back.
    #[prost(uint32, tag = "6")]
    pub(crate) tunnel_generation: u32,
    #[prost(uint32, tag = "7")]
    pub(crate) stream_generation: u32,
    #[prost(uint32, tag = "8")]
    pub(crate) splice_generation: u32,
    #[prost(uint64, tag = "9")]
    pub(crate) next_dial: u64,
}

/// A [`TunnelKey`].
#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct KeyState {
    #[prost(string, tag = "1")]
    pod: String,
    #[prost(string, tag = "2")]
    source: String,
    #[prost(string, tag = "3")]
    source_ip: String,
    #[prost(string, tag = "4")]
    next_hop: String,
    #[prost(string, tag = "5")]
    target_uid: String,
    #[prost(string, repeated, tag = "6")]
    expected: Vec<String>,
}

impl From<&TunnelKey> for KeyState {
    fn from(key: &TunnelKey) -> Self {
        Self {
            pod: key.pod.as_str().to_owned(),
            source: key.source.to_string(),
            source_ip: key.source_ip.to_string(),
            next_hop: key.next_hop.to_string(),
            target_uid: key.target_uid.as_str().to_owned(),
            expected: key.expected.iter().map(ToString::to_string).collect(),
        }
    }
}

impl TryFrom<&KeyState> for TunnelKey {
    type Error = HandOverError;

    fn try_from(state: &KeyState) -> Result<Self, HandOverError> {
        let id = |text: &String| {
            text.parse::<SpiffeId>().map_err(|_invalid| HandOverError::Inconsistent("a SPIFFE id"))
        };
        Ok(Self {
            pod: PodUid::new(&state.pod),
            source: id(&state.source)?,
            source_ip: state
                .source_ip
                .parse::<IpAddr>()
                .map_err(|_invalid| HandOverError::Inconsistent("a source address"))?,
            next_hop: state
                .next_hop
                .parse::<SocketAddr>()
                .map_err(|_invalid| HandOverError::Inconsistent("a next hop"))?,
            target_uid: WorkloadUid::new(&state.target_uid),
            expected: state.expected.iter().map(id).collect::<Result<_, _>>()?,
        })
    }
}

/// Header names and values that are ours.
#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct FieldState {
    #[prost(string, tag = "1")]
    pub(crate) name: String,
    #[prost(string, tag = "2")]
    pub(crate) value: String,
}

impl FieldState {
    pub(crate) fn all(fields: &[(String, String)]) -> Vec<Self> {
        fields
            .iter()
            .map(|(name, value)| Self { name: name.clone(), value: value.clone() })
            .collect()
    }

    pub(crate) fn pairs(fields: Vec<Self>) -> Vec<(String, String)> {
        fields.into_iter().map(|field| (field.name, field.value)).collect()
    }
}

/// Microseconds since `at`; clocks of two processes share no origin.
pub(crate) fn age(at: Instant, now: Instant) -> u64 {
    u64::try_from(now.saturating_duration_since(at).as_micros()).unwrap_or(u64::MAX)
}

/// The instant that is `age` microseconds ago.
pub(crate) fn ago(age: u64, now: Instant) -> Instant {
    now.checked_sub(Duration::from_micros(age)).unwrap_or(now)
}

/// Microseconds until `at`; 0 if it has passed.
pub(crate) fn ahead(at: Instant, now: Instant) -> u64 {
    u64::try_from(at.saturating_duration_since(now).as_micros()).unwrap_or(u64::MAX)
}

/// The instant in so many microseconds; nothing here is set further ahead than an hour.
pub(crate) fn later(ahead: u64, now: Instant) -> Option<Instant> {
    now.checked_add(Duration::from_micros(ahead.min(3_600_000_000)))
}

pub(crate) fn check(holds: bool, what: &'static str) -> Result<(), HandOverError> {
    if holds { Ok(()) } else { Err(HandOverError::Inconsistent(what)) }
}
