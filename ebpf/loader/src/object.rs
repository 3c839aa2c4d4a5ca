//! Loading the embedded object, and its programs as descriptors.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use aya::programs::{CgroupSockAddr, Program, ProgramError, SchedClassifier, SkLookup, SockOps};
use aya::{Ebpf, EbpfLoader};
use mesh_ebpf_abi::maps;

use crate::CaptureError;

static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/programs.o"));

/// A program on the root cgroup.
#[derive(Debug)]
pub(crate) struct CgroupHook {
    /// Its name, in the object and as a pin.
    pub(crate) name: &'static str,
    /// `enum bpf_attach_type`
    pub(crate) attach_type: u32,
    /// Whether it matters who runs first.
    pub(crate) ordered: bool,
}

/// The programs on the root cgroup, in the order in which they are attached: what undoes a rewrite
/// is there before what does it.
pub(crate) const CGROUP_HOOKS: [CgroupHook; 11] = [
    CgroupHook { name: "track_sockets", attach_type: 3, ordered: false },
    CgroupHook { name: "bind4", attach_type: 8, ordered: false },
    CgroupHook { name: "bind6", attach_type: 9, ordered: false },
    CgroupHook { name: "recvmsg4", attach_type: 19, ordered: true },
    CgroupHook { name: "recvmsg6", attach_type: 20, ordered: true },
    CgroupHook { name: "getpeername4", attach_type: 29, ordered: true },
    CgroupHook { name: "getpeername6", attach_type: 30, ordered: true },
    CgroupHook { name: "sendmsg4", attach_type: 14, ordered: true },
    CgroupHook { name: "sendmsg6", attach_type: 15, ordered: true },
    CgroupHook { name: "connect4", attach_type: 10, ordered: true },
    CgroupHook { name: "connect6", attach_type: 11, ordered: true },
];

/// `BPF_SK_LOOKUP`
pub(crate) const SK_LOOKUP: u32 = 36;
/// `BPF_TCX_INGRESS`
pub(crate) const TCX_INGRESS: u32 = 46;
/// `BPF_TCX_EGRESS`
pub(crate) const TCX_EGRESS: u32 = 47;

/// Verified programs.
#[derive(Debug)]
pub(crate) struct Programs {
    /// In the order of [`CGROUP_HOOKS`].
    pub(crate) cgroup: Vec<OwnedFd>,
    pub(crate) steer_inbound: OwnedFd,
    pub(crate) guard_from_pod: OwnedFd,
    pub(crate) guard_to_pod: OwnedFd,
}

/// Loads the object: maps are made and pinned in `map_directory`, or taken from there; programs
/// are new.
pub(crate) fn load(map_directory: &Path) -> Result<Programs, CaptureError> {
    let paths: Vec<_> =
        maps::ALL.iter().map(|spec| (spec.name, map_directory.join(spec.name))).collect();
    let mut loader = EbpfLoader::new();
    for (name, path) in &paths {
        loader.map_pin_path(name, path.as_path());
    }
    load_by(&mut loader)
}

/// Loads the object with maps of its own that nobody else sees; for probes.
pub(crate) fn load_unpinned() -> Result<Programs, CaptureError> {
    load_by(&mut EbpfLoader::new())
}

fn load_by(loader: &mut EbpfLoader<'_>) -> Result<Programs, CaptureError> {
    let mut object = loader.load(OBJECT).map_err(CaptureError::Object)?;
    let mut cgroup = Vec::with_capacity(CGROUP_HOOKS.len());
    for hook in &CGROUP_HOOKS {
        cgroup.push(verified(&mut object, hook.name)?);
    }
    Ok(Programs {
        cgroup,
        steer_inbound: verified(&mut object, "steer_inbound")?,
        guard_from_pod: verified(&mut object, "guard_from_pod")?,
        guard_to_pod: verified(&mut object, "guard_to_pod")?,
    })
}

/// Passes a program through the verifier.
fn verified(object: &mut Ebpf, name: &'static str) -> Result<OwnedFd, CaptureError> {
    let refused = |source| CaptureError::Program { program: name, source };
    let program = object.program_mut(name).ok_or(CaptureError::Missing { name })?;
    #[expect(clippy::wildcard_enum_match_arm, reason = "aya's enum has every kind there is")]
    let fd: BorrowedFd<'_> = match program {
        Program::CgroupSockAddr(program) => load_sock_addr(program).map_err(refused)?,
        Program::SockOps(program) => load_sock_ops(program).map_err(refused)?,
        Program::SkLookup(program) => load_sk_lookup(program).map_err(refused)?,
        Program::SchedClassifier(program) => load_classifier(program).map_err(refused)?,
        _ => return Err(CaptureError::Missing { name }),
    };
    fd.try_clone_to_owned().map_err(CaptureError::kernel("duplicating a program's descriptor"))
}

fn load_sock_addr(program: &mut CgroupSockAddr) -> Result<BorrowedFd<'_>, ProgramError> {
    program.load()?;
    Ok(program.fd()?.as_fd())
}

fn load_sock_ops(program: &mut SockOps) -> Result<BorrowedFd<'_>, ProgramError> {
    program.load()?;
    Ok(program.fd()?.as_fd())
}

fn load_sk_lookup(program: &mut SkLookup) -> Result<BorrowedFd<'_>, ProgramError> {
    program.load()?;
    Ok(program.fd()?.as_fd())
}

fn load_classifier(program: &mut SchedClassifier) -> Result<BorrowedFd<'_>, ProgramError> {
    program.load()?;
    Ok(program.fd()?.as_fd())
}
