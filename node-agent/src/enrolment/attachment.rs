//! What a captured pod needs besides its namespace's settings: sockets, programs, a resolver.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;

use mesh_ebpf::PodSettings;
use mesh_enroll::PodRef;
use mesh_model::PodUid;
use mesh_net::Netns;

use crate::dataplane::Drain;

/// A pod that is about to be captured, or is.
#[derive(Clone, Debug)]
pub(crate) struct AttachedPod {
    /// Its names.
    pub(crate) pod: PodRef,
    /// Where its namespace is.
    pub(crate) path: PathBuf,
    /// Its namespace, open.
    pub(crate) netns: Arc<Netns>,
    /// Its addresses.
    pub(crate) addresses: BTreeSet<IpAddr>,
    /// Its nameservers; empty: the node's.
    pub(crate) nameservers: BTreeSet<IpAddr>,
    /// What is captured of it.
    pub(crate) settings: PodSettings,
}

/// Makes and removes what captures a pod. Calls may block; they come one at a time.
pub(crate) trait PodAttachments: Send + Sync {
    /// Sockets first, programs next, the map entry that switches capture on last. On an error nothing is left behind.
    /// Attaching an attached pod applies changed settings and repairs what is missing.
    fn attach(&self, pod: &AttachedPod) -> Result<(), AttachError>;
    /// Switches capture off; established connections may go on as `drain` says, and forever refused are new ones over the
    /// mesh. Detaching what is not attached succeeds, and a second call replaces the drain of the first.
    fn detach(&self, uid: &PodUid, cookie: u64, drain: Drain) -> Result<(), AttachError>;
    /// Closes all sockets in a pod, whose capture stays: everything that is new is refused, what was open ends.
    fn close(&self, uid: &PodUid, cookie: u64) -> Result<(), AttachError>;
    /// What the kernel has of a namespace.
    fn remains(&self, cookie: u64) -> Result<Remains, AttachError>;
    /// A pod that an earlier process began to let go: its connections may go on here.
    fn left(&self, pod: &AttachedPod);
    /// Whether connections of a detached pod still go on.
    fn lingers(&self, uid: &PodUid, cookie: u64) -> bool;
    /// The cookies of the namespaces that the kernel captures: ours, left behind, or captured by another version.
    fn captured(&self) -> Result<BTreeSet<u64>, AttachError>;
    /// Those of them whose capture is as [`attach`](Self::attach) left it.
    fn whole(&self) -> Result<BTreeSet<u64>, AttachError>;
    /// Whether one of them is.
    fn is_whole(&self, cookie: u64) -> Result<bool, AttachError>;
}

/// What the kernel has of a namespace that may be gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Remains {
    /// It is not captured.
    Nothing,
    /// It is captured; whether it exists cannot be told by that.
    OfUnknown,
    /// It is captured, and what is attached to it is still attached: it exists.
    OfLiving,
}

/// A pod could not be attached or detached.
#[derive(Debug, thiserror::Error)]
#[error("{what}")]
pub(crate) struct AttachError {
    /// What failed.
    pub(crate) what: &'static str,
    /// What to do about it; may be empty.
    pub(crate) remedy: &'static str,
    /// True when trying again may help.
    pub(crate) retryable: bool,
    /// Why.
    #[source]
    pub(crate) source: Box<dyn std::error::Error + Send + Sync>,
}
