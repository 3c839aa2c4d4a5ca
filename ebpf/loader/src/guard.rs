//! The guard on a pod's host-side interface: tcx links where the kernel has them, clsact filters
//! elsewhere.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use aya::programs::tc::{
    NlOptions, SchedClassifierLink, TcAttachOptions, TcAttachType, TcError, TcHandle,
    qdisc_add_clsact,
};
use aya::programs::{ProgramError, SchedClassifier};

use crate::object::{Programs, TCX_EGRESS, TCX_INGRESS};
use crate::sys::{LinkOrder, LinkTarget};
use crate::{CaptureError, GuardAttachment, GuardPreference, netns, pins, sys};

/// One of the two directions.
#[derive(Clone, Copy, Debug)]
struct Side {
    program: &'static str,
    tcx: u32,
    clsact: TcAttachType,
    handle: TcHandle,
}

/// Handles of clsact filters are ours by number: the filters of others at the same priority have
/// small ones.
const SIDES: [Side; 2] = [
    Side {
        program: "guard_to_pod",
        tcx: TCX_EGRESS,
        clsact: TcAttachType::Egress,
        handle: TcHandle::new(0, 0xc102),
    },
    Side {
        program: "guard_from_pod",
        tcx: TCX_INGRESS,
        clsact: TcAttachType::Ingress,
        handle: TcHandle::new(0, 0xc101),
    },
];
/// Before the filters of others.
const PRIORITY: u16 = 1;

/// Attaches and checks guards. Interfaces are those of the node's namespace.
#[derive(Debug)]
pub(crate) struct Guards {
    node: OwnedFd,
    attachment: GuardAttachment,
    from_pod: OwnedFd,
    to_pod: OwnedFd,
    /// Pins of the two programs, through which aya attaches filters.
    programs: PathBuf,
}

impl Guards {
    /// Finds out what the kernel has, by attaching in a namespace that nobody uses.
    pub(crate) fn new(
        node: OwnedFd,
        preference: GuardPreference,
        programs: &Programs,
        directory: PathBuf,
    ) -> Result<Self, CaptureError> {
        let duplicate = |fd: &OwnedFd| {
            fd.try_clone().map_err(CaptureError::kernel("duplicating a program's descriptor"))
        };
        let attachment = match preference {
            GuardPreference::Clsact => GuardAttachment::Clsact,
            GuardPreference::Auto => probe(&programs.guard_from_pod)?,
        };
        let guards = Self {
            node,
            attachment,
            from_pod: duplicate(&programs.guard_from_pod)?,
            to_pod: duplicate(&programs.guard_to_pod)?,
            programs: directory,
        };
        for side in SIDES {
            let path = guards.programs.join(side.program);
            pins::remove(&path)
                .and_then(|()| sys::pin(guards.program(side).as_fd(), &path))
                .map_err(CaptureError::kernel("pinning a guard program"))?;
        }
        match attachment {
            // Was attached to find out.
            GuardAttachment::Tcx => {}
            GuardAttachment::Clsact => guards.try_filters()?,
        }
        Ok(guards)
    }

    /// Attaches both filters in namespaces that nobody uses: what the kernel lacks for them is found out before there is a
    /// pod to guard.
    fn try_filters(&self) -> Result<(), CaptureError> {
        try_clsact()?;
        for side in SIDES {
            let path = self.programs.join(side.program);
            netns::inside_new(|| add_filter(&mut SchedClassifier::from_pin(&path)?, "lo", side))
                .map_err(CaptureError::kernel("making a namespace to try clsact"))?
                .map_err(|source| CaptureError::Program { program: side.program, source })?;
        }
        Ok(())
    }

    pub(crate) fn attachment(&self) -> GuardAttachment {
        self.attachment
    }

    fn program(&self, side: Side) -> &OwnedFd {
        if side.tcx == TCX_INGRESS { &self.from_pod } else { &self.to_pod }
    }

    /// Makes sure that both sides of an interface run this build's programs; whether anything was
    /// missing. `pod` is the pod's pin directory.
    pub(crate) fn ensure(&self, pod: &Path, interface: u32) -> Result<bool, CaptureError> {
        let mut missing = false;
        for side in SIDES {
            missing |= match self.attachment {
                GuardAttachment::Tcx => self.ensure_tcx(pod, interface, side)?,
                GuardAttachment::Clsact => self.ensure_clsact(interface, side)?,
            };
        }
        Ok(missing)
    }

    fn ensure_tcx(&self, pod: &Path, interface: u32, side: Side) -> Result<bool, CaptureError> {
        let failed = CaptureError::kernel("attaching the guard");
        let path = link_path(pod, side, interface);
        let program = self.program(side).as_fd();
        self.on_node(|| {
            if let Some(link) = sys::open_pin(&path)? {
                if sys::link_is_attached(link.as_fd())? {
                    sys::link_update(link.as_fd(), program)?;
                    return Ok(false);
                }
                pins::remove(&path)?;
            }
            let target = LinkTarget::Interface(interface);
            // Before the programs of others: one that redirects would end the chain.
            let link =
                patiently(|| sys::link_create(program, target, side.tcx, LinkOrder::Before))?;
            sys::pin(link.as_fd(), &path)?;
            Ok(true)
        })
        .map_err(failed)
    }

    fn ensure_clsact(&self, interface: u32, side: Side) -> Result<bool, CaptureError> {
        let refused = |source| CaptureError::Program { program: side.program, source };
        let path = self.programs.join(side.program);
        self.on_node(|| {
            let name = sys::interface_name(interface)?;
            Ok((|| {
                let mut program = SchedClassifier::from_pin(&path)?;
                if let Ok(link) =
                    SchedClassifierLink::attached(&name, side.clsact, PRIORITY, side.handle, None)
                    && let Ok(id) = program.attach_to_link(link)
                {
                    // The filter lives on the interface; dropping the link would remove it.
                    std::mem::forget(program.take_link(id)?);
                    return Ok(false);
                }
                add_filter(&mut program, &name, side)?;
                Ok(true)
            })())
        })
        .map_err(CaptureError::kernel("attaching the guard"))?
        .map_err(refused)
    }

    /// Whether the interface exists and, as far as can be told without changing it, is guarded. A
    /// clsact filter is taken to be there; [`ensure`](Self::ensure) finds out.
    pub(crate) fn is_attached(&self, pod: &Path, interface: u32) -> Result<bool, CaptureError> {
        match self.attachment {
            GuardAttachment::Tcx => SIDES
                .into_iter()
                .try_fold(true, |all, side| {
                    let link = sys::open_pin(&link_path(pod, side, interface))?;
                    let attached =
                        link.map_or(Ok(false), |link| sys::link_is_attached(link.as_fd()))?;
                    Ok(all && attached)
                })
                .map_err(CaptureError::kernel("looking at the guard's links")),
            GuardAttachment::Clsact => self.exists(interface),
        }
    }

    /// Whether the interface exists.
    pub(crate) fn exists(&self, interface: u32) -> Result<bool, CaptureError> {
        self.on_node(|| Ok(sys::interface_name(interface).is_ok()))
            .map_err(CaptureError::kernel("looking at an interface"))
    }

    /// Detaches both sides. Ok also when the interface is gone.
    pub(crate) fn detach(&self, pod: &Path, interface: u32) -> Result<(), CaptureError> {
        self.on_node(|| {
            for side in SIDES {
                pins::detach(&link_path(pod, side, interface))?;
                // Also with tcx: the agent may have run with the other attachment before. Dropping
                // the link detaches it, in the namespace of this thread.
                if let Ok(name) = sys::interface_name(interface) {
                    drop(SchedClassifierLink::attached(
                        &name,
                        side.clsact,
                        PRIORITY,
                        side.handle,
                        None,
                    ));
                }
            }
            Ok(())
        })
        .map_err(CaptureError::kernel("detaching the guard"))
    }

    /// Runs `work` in the node's network namespace.
    pub(crate) fn on_node<T: Send>(
        &self,
        work: impl FnOnce() -> io::Result<T> + Send,
    ) -> io::Result<T> {
        netns::inside(self.node.as_fd(), work)?
    }
}

/// Tries again while a link that lost its pin still holds the place: the kernel takes it away from
/// a work queue.
fn patiently<T>(mut attach: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    const PAUSE: Duration = Duration::from_millis(10);
    const ATTEMPTS: usize = 200;
    for _ in 1..ATTEMPTS {
        match attach() {
            Err(error) if error.raw_os_error() == Some(libc::EEXIST) => std::thread::sleep(PAUSE),
            attached => return attached,
        }
    }
    attach()
}

/// Adds a side's filter, which stays, to an interface of the namespace that the thread is in.
fn add_filter(program: &mut SchedClassifier, name: &str, side: Side) -> Result<(), ProgramError> {
    match qdisc_add_clsact(name) {
        Err(TcError::NetlinkError(error)) if is_present(&error) => {}
        added => added?,
    }
    let options = TcAttachOptions::Netlink(NlOptions {
        priority: PRIORITY,
        handle: side.handle,
        ..NlOptions::default()
    });
    let id = program.attach_with_options(name, side.clsact, options)?;
    std::mem::forget(program.take_link(id)?);
    Ok(())
}

fn link_path(pod: &Path, side: Side, interface: u32) -> PathBuf {
    pod.join(format!("{}_{interface}", side.program))
}

fn is_present(error: &impl std::error::Error) -> bool {
    let mut source: Option<&dyn std::error::Error> = error.source();
    while let Some(error) = source {
        if let Some(error) = error.downcast_ref::<io::Error>() {
            return error.raw_os_error() == Some(libc::EEXIST);
        }
        source = error.source();
    }
    false
}

/// Whether a queueing discipline of clsact can be made, tried in a namespace that nobody uses.
pub(crate) fn try_clsact() -> Result<(), CaptureError> {
    netns::inside_new(|| qdisc_add_clsact("lo"))
        .map_err(CaptureError::kernel("making a namespace to probe clsact"))?
        .map_err(|source| CaptureError::Kernel {
            what: "adding clsact (kernel module sch_ingress)",
            source: io::Error::other(source),
        })
}

/// A kernel without tcx says `EINVAL`.
pub(crate) fn probe(program: &OwnedFd) -> Result<GuardAttachment, CaptureError> {
    const LOOPBACK: u32 = 1;
    let attempt = netns::inside_new(|| {
        let target = LinkTarget::Interface(LOOPBACK);
        sys::link_create(program.as_fd(), target, TCX_INGRESS, LinkOrder::Before).map(drop)
    })
    .map_err(CaptureError::kernel("making a namespace to probe tcx"))?;
    match attempt {
        Ok(()) => Ok(GuardAttachment::Tcx),
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => Ok(GuardAttachment::Clsact),
        Err(source) => Err(CaptureError::Kernel { what: "probing tcx", source }),
    }
}

/// The network namespace that the calling thread is in, which has to be the node's.
pub(crate) fn node_namespace() -> Result<OwnedFd, CaptureError> {
    File::open("/proc/thread-self/ns/net")
        .map(OwnedFd::from)
        .map_err(CaptureError::kernel("opening the node's network namespace"))
}
