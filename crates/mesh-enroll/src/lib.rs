//! The enrolment protocol: how the CNI plugin and the command line ask the node's agent to take a pod in or let it go.
//!
//! One request and one reply per connection on a Unix stream socket; each is a frame: length, four bytes big-endian, then
//! that many bytes of JSON. Nothing here opens a socket: [`read_request`], [`write_reply`] and [`call`] work on whatever
//! reads and writes, so deadlines belong to the caller's stream.
//!
//! A request names the pod's network namespace by path; the agent opens it itself and proves that it is what it claims to be.

#![forbid(unsafe_code)]

pub mod cni;
pub mod frame;
pub mod names;
pub mod reply;
pub mod request;

pub use frame::{
    FrameError, MAX_FRAME_BYTES, call, decode_reply, decode_request, encode, read_frame,
    read_reply, read_request, write_frame, write_reply, write_request,
};
pub use names::{ContainerId, InvalidName, NetnsPath, PodName};
pub use reply::{EnrollReply, EnrolledPod, PodPhase, Refusal};
pub use request::{Enroll, EnrollRequest, InvalidEnroll, PodRef, PodSelector};

/// Where the agent listens unless told otherwise.
pub const DEFAULT_SOCKET: &str = "/run/culvert/agent.sock";
