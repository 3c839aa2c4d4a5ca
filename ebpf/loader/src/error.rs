//! What goes wrong between user space and the kernel side of capture.

use std::io;
use std::path::PathBuf;

/// Why capture could not be loaded, or a pod not be enrolled.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CaptureError {
    /// No cgroup2 hierarchy whose root this process can see.
    #[error("no cgroup2 root found among {tried:?}: mount the host's /sys/fs/cgroup, or name it")]
    NoCgroupRoot {
        /// What was looked at.
        tried: Vec<PathBuf>,
    },
    /// The directory is cgroup2, but not the machine's root: attached there, capture would cover
    /// this container only.
    #[error(
        "{path:?} is not the machine's cgroup root (inode {inode}, not 1), nor seen to hold all of a node's processes"
    )]
    NotCgroupRoot {
        /// The directory.
        path: PathBuf,
        /// Its inode.
        inode: u64,
    },
    /// The directory for pins is not on a bpffs mount.
    #[error("{path:?} is not on a bpffs mount: mount -t bpf bpf /sys/fs/bpf")]
    NotBpffs {
        /// The directory.
        path: PathBuf,
    },
    /// A pinned map has another shape than this build expects under the same layout number.
    #[error("pinned map {map} has another shape than layout {layout} of this build")]
    IncompatiblePin {
        /// Its name.
        map: &'static str,
        /// The layout number of this build.
        layout: u32,
    },
    /// The kernel refused a program.
    #[error("the kernel refused the program {program}")]
    Program {
        /// Its name.
        program: &'static str,
        /// Why, with the verifier's log.
        #[source]
        source: aya::programs::ProgramError,
    },
    /// The embedded object could not be loaded.
    #[error("the embedded eBPF object could not be loaded")]
    Object(#[source] aya::EbpfError),
    /// A program or map is not in the embedded object: a build of mixed versions.
    #[error("{name} is missing in the embedded eBPF object")]
    Missing {
        /// Its name.
        name: &'static str,
    },
    /// The pod's network namespace cannot be opened or is not one.
    #[error("cannot open the network namespace {path:?}")]
    Netns {
        /// Its path.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The namespace is the node's own: a hostNetwork pod cannot be enrolled.
    #[error("{path:?} is the node's own network namespace")]
    HostNetwork {
        /// Its path.
        path: PathBuf,
    },
    /// The pod has no address, or one that no pod can have (loopback, unspecified, multicast).
    #[error("a pod needs 1 to 8 unicast addresses, got {0:?}")]
    Addresses(Vec<std::net::IpAddr>),
    /// No interface of the pod is a veth whose other end is in the node's namespace.
    #[error("no interface of the pod in {netns:?} is a veth with its other end on this node")]
    NoHostInterface {
        /// The namespace.
        netns: PathBuf,
    },
    /// A way out of the pod cannot be guarded.
    #[error("interface {interface} of the pod is a {kind}, which cannot be guarded")]
    Unguardable {
        /// Its name in the pod.
        interface: String,
        /// Its kind, as in `ip -d link`.
        kind: String,
    },
    /// A list of the pod's settings is longer than its bound.
    #[error("{count} entries in {list}, at most {bound}")]
    TooMany {
        /// Which list.
        list: &'static str,
        /// Its length.
        count: usize,
        /// Its bound.
        bound: usize,
    },
    /// A map is full; nothing was changed.
    #[error("map {map} is full")]
    Full {
        /// Its name.
        map: &'static str,
    },
    /// A system call failed.
    #[error("{what} failed")]
    Kernel {
        /// What was tried.
        what: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
}

impl CaptureError {
    pub(crate) fn kernel(what: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Kernel { what, source }
    }
}
