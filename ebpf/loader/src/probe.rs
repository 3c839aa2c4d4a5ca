//! What the kernel has, found out by trying each thing in a place that nobody uses. Changes nothing that stays.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use crate::object::{self, CGROUP_HOOKS, Programs, SK_LOOKUP};
use crate::sys::{self, LinkOrder, LinkTarget};
use crate::{Capture, CaptureError, CgroupOrder, GuardAttachment, capture, cgroup, guard, netns};

/// What came of each trial; an error says what the kernel lacks.
#[derive(Debug)]
pub struct Probes {
    /// Network namespaces have cookies (`SO_NETNS_COOKIE`). Nothing works without.
    pub netns_cookie: Result<(), CaptureError>,
    /// Sockets of pods can be ended (`SOCK_DESTROY`); only the direct path needs it.
    pub sock_destroy: Result<(), CaptureError>,
    /// What comes of the programs, where the kernel takes all of them.
    pub programs: Result<Attachments, CaptureError>,
}

/// How the programs can be attached.
#[derive(Debug)]
pub struct Attachments {
    /// How guards are attached.
    pub guard: Result<GuardAttachment, CaptureError>,
    /// Where our cgroup programs would stand among those of other tools.
    pub cgroup_order: Result<CgroupOrder, CaptureError>,
    /// Inbound connections can be steered (`sk_lookup`). Nothing works without.
    pub sk_lookup: Result<(), CaptureError>,
}

/// Tries everything that [`Capture::load_or_adopt`] relies on, with programs and maps that go away afterwards. Needs root;
/// `cgroup_root` as in [`CaptureConfig`](crate::CaptureConfig).
pub fn probe(cgroup_root: Option<&Path>) -> Probes {
    Probes {
        netns_cookie: sys::network_namespace_cookie()
            .map(drop)
            .map_err(CaptureError::kernel("reading a network namespace's cookie")),
        sock_destroy: Capture::check_direct(),
        programs: object::load_unpinned().map(|programs| attachments(&programs, cgroup_root)),
    }
}

fn attachments(programs: &Programs, cgroup_root: Option<&Path>) -> Attachments {
    Attachments {
        guard: guard::probe(&programs.guard_from_pod).and_then(|found| {
            match found {
                GuardAttachment::Tcx => {}
                GuardAttachment::Clsact => guard::try_clsact()?,
            }
            Ok(found)
        }),
        cgroup_order: cgroup::find_root(cgroup_root).and_then(|root| cgroup_order(programs, &root)),
        sk_lookup: sk_lookup(programs),
    }
}

/// Attaches the first of the programs for which order matters to a group without processes.
fn cgroup_order(programs: &Programs, root: &Path) -> Result<CgroupOrder, CaptureError> {
    let group = EmptyGroup::new(root).map_err(CaptureError::kernel("making a cgroup to probe"))?;
    let opened = File::open(&group.0).map_err(CaptureError::kernel("opening a cgroup"))?;
    let mut hooks = CGROUP_HOOKS.iter().zip(&programs.cgroup);
    let (hook, program) = hooks
        .find(|(hook, _)| hook.ordered)
        .ok_or(CaptureError::Missing { name: "a program for which order matters" })?;
    let (link, order) = capture::attach_first(program.as_fd(), opened.as_fd(), hook)?;
    sys::link_detach(link.as_fd()).map_err(CaptureError::kernel("detaching from a cgroup"))?;
    Ok(order)
}

fn sk_lookup(programs: &Programs) -> Result<(), CaptureError> {
    netns::inside_new(|| {
        let own = File::open("/proc/thread-self/ns/net")?;
        let target = LinkTarget::Fd(own.as_fd());
        sys::link_create(programs.steer_inbound.as_fd(), target, SK_LOOKUP, LinkOrder::Last)
            .map(drop)
    })
    .and_then(|attached| attached)
    .map_err(CaptureError::kernel("attaching sk_lookup to a network namespace"))
}

/// A cgroup that is removed with the value.
struct EmptyGroup(PathBuf);

impl EmptyGroup {
    fn new(root: &Path) -> io::Result<Self> {
        let path = root.join(format!("culvert-probe-{}", std::process::id()));
        std::fs::create_dir(&path)?;
        Ok(Self(path))
    }
}

impl Drop for EmptyGroup {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_dir(&self.0) {
            tracing::warn!(group = %self.0.display(), %error, "a cgroup made for a probe stays");
        }
    }
}
