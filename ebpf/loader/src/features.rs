//! What the kernel was found to have, by trying it.

use std::fmt;
use std::path::PathBuf;

/// What the kernel was found to have, by trying it; version numbers are not looked at, because
/// distribution kernels carry features of later versions.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FeatureReport {
    /// Where our cgroup programs stand among those of other tools.
    pub cgroup_order: CgroupOrder,
    /// How guards are attached.
    pub guard: GuardAttachment,
    /// The cgroup2 root in use.
    pub cgroup_root: PathBuf,
    /// Whether programs and maps of an earlier process were taken over.
    pub adopted: bool,
}

/// Where our cgroup programs stand among those of other tools (a socket load balancer that rewrites
/// a service's address must run after us, or we never see it).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CgroupOrder {
    /// Before all others (`BPF_F_PREORDER`).
    PreOrder,
    /// Before those that were there at attachment (`BPF_F_BEFORE`).
    Before,
    /// In the order of attachment: the agent has to start before other tools that use connect hooks.
    AttachOrder,
    /// Taken over from an earlier process, which chose it.
    Adopted,
}

/// How guards are attached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GuardAttachment {
    /// tcx links, pinned.
    Tcx,
    /// clsact filters: any tool with `CAP_NET_ADMIN` on the node may remove them, so
    /// [`Capture::verify_guards`](crate::Capture::verify_guards) has to be called now and then.
    Clsact,
}

impl fmt::Display for CgroupOrder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::PreOrder => "before all others (preorder)",
            Self::Before => "before those present (before)",
            Self::AttachOrder => "in order of attachment (fallback)",
            Self::Adopted => "as found (adopted)",
        })
    }
}

impl fmt::Display for GuardAttachment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tcx => "tcx",
            Self::Clsact => "clsact (fallback)",
        })
    }
}
