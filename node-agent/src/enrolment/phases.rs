//! One pod on its way into the mesh and out of it: what is done to its namespace and to the kernel.
//!
//! ```text
//!              exclude                 configure (mode AMBIENT), enroll
//!   (unknown) ────────► Excluded ───────────────┐
//!       │                  ▲                     ▼       attach, write
//!       └──── enroll ──────┼──────────────► Pending ───────────────► Enrolled
//!                          │ last flow ended    ▲  retry                 │ unenroll, configure (mode NONE)
//!                      Draining ◄───────────────┴────────────────────────┘
//! ```
//! Every phase is left when the sandbox goes: for nothing, or for Closed while something may live in it (`closed`).

use std::collections::BTreeSet;
use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use mesh_ebpf::PodSettings;
use mesh_enroll::{NetnsPath, PodPhase};
use mesh_net::Netns;

use super::attachment::{AttachedPod, PodAttachments, Remains};
use super::error::EnrollError;
use super::namespace::{self, NamespaceError, PodNamespace};
use super::record::Record;
use super::search;
use crate::dataplane::Drain;
use crate::error::error_chain;

/// One pod, with what does not outlive the process.
#[derive(Debug)]
pub(super) struct Entry {
    pub(super) record: Record,
    pub(super) netns: Option<Arc<Netns>>,
    pub(super) settings: PodSettings,
    /// Why it is not enrolled.
    pub(super) detail: String,
    /// When something is due, and how often it failed before.
    pub(super) due: Option<Instant>,
    pub(super) failures: u32,
}

/// First pause before a failed enrolment is tried again; doubles up to [`MAX_RETRY`].
const FIRST_RETRY: Duration = Duration::from_millis(500);
const MAX_RETRY: Duration = Duration::from_secs(30);

/// The steps between the phases of one pod.
pub(super) struct Phases {
    pub(super) attachments: Arc<dyn PodAttachments>,
    /// The node's own network namespace.
    pub(super) host_cookie: u64,
}

/// Between looks at whether the last connection of a pod that left has ended.
const DRAIN_LOOK: Duration = Duration::from_secs(1);

impl Phases {
    /// The steps of enrolment, in order; what was done is undone when a later one fails.
    pub(super) fn capture(&self, entry: &mut Entry) -> Result<(), EnrollError> {
        let namespace = self.reopen(entry)?;
        entry.record.originals = namespace.originals(&entry.record.originals)?;
        entry.record.ips = namespace.addresses.clone();
        // Not by its phase: a pod whose repair failed waits for the next try, and is captured meanwhile.
        let captured_before = self.is_captured(entry.record.cookie);
        let left_out = namespace.about_left_out();
        let attached = namespace.prepare().map_err(EnrollError::from).and_then(|()| {
            let netns = Arc::new(namespace.netns);
            entry.netns = Some(Arc::clone(&netns));
            let pod = attached(entry, namespace.path.clone(), netns, namespace.addresses.clone());
            self.attachments.attach(&pod).map_err(EnrollError::from)
        });
        if let Err(error) = attached {
            // A pod that was captured stays closed; only what never was captured goes back to what it was.
            if !captured_before {
                self.undo(entry);
            }
            return Err(error);
        }
        entry.record.phase = PodPhase::Enrolled;
        if !left_out.is_empty() && entry.detail != left_out {
            tracing::warn!(pod = %entry.record.pod.name, "addresses of the pod are {left_out}");
        }
        entry.detail = left_out;
        entry.due = None;
        entry.failures = 0;
        Ok(())
    }

    /// Whether the kernel captures a namespace; so it is held to when that cannot be told.
    pub(super) fn is_captured(&self, cookie: u64) -> bool {
        !matches!(self.attachments.remains(cookie), Ok(Remains::Nothing))
    }

    /// Takes back what a failed [`capture`](Self::capture) did, as far as it goes.
    pub(super) fn undo(&self, entry: &Entry) {
        let uid = &entry.record.pod.uid;
        if let Err(error) = self.attachments.detach(uid, entry.record.cookie, Drain::Now) {
            tracing::warn!(pod = %entry.record.pod.name, error = %error_chain(&error), "enrolment not undone");
        }
        if let Some(netns) = &entry.netns
            && let Err(error) = namespace::restore(netns, &entry.record.originals)
        {
            tracing::warn!(pod = %entry.record.pod.name, error = %error_chain(&error), "enrolment not undone");
        }
    }

    /// Opens the pod's namespace again and checks that it is still the pod's.
    pub(super) fn reopen(&self, entry: &mut Entry) -> Result<PodNamespace, EnrollError> {
        let path = Path::new(entry.record.netns.as_str());
        let namespace = PodNamespace::open(path, &entry.record.ips, self.host_cookie)?;
        if entry.record.cookie != namespace.netns.cookie() {
            entry.record.cookie = namespace.netns.cookie();
            entry.record.originals.clear();
        }
        Ok(namespace)
    }

    /// Switches capture off; the pod's connections may go on until they end. Whether there was something to do.
    pub(super) fn start_draining(
        &self,
        entry: &mut Entry,
        now: Instant,
    ) -> Result<bool, EnrollError> {
        match entry.record.phase {
            PodPhase::Excluded | PodPhase::Draining | PodPhase::Closed => return Ok(false),
            PodPhase::Pending | PodPhase::Enrolled => {}
        }
        self.attachments.detach(&entry.record.pod.uid, entry.record.cookie, Drain::WhenOver)?;
        entry.record.phase = PodPhase::Draining;
        "its last connections finish".clone_into(&mut entry.detail);
        entry.due = Some(now + DRAIN_LOOK);
        Ok(true)
    }

    /// Goes on with a drain that another process began: its last connections may have been handed over.
    pub(super) fn resume_draining(&self, entry: &mut Entry, now: Instant) {
        match self.reopen(entry) {
            Ok(PodNamespace { path, netns, addresses, .. }) => {
                self.attachments.left(&attached(entry, path, Arc::new(netns), addresses))
            }
            Err(error) => {
                tracing::warn!(pod = %entry.record.pod.name, error = %error_chain(&error), "direct connections of a pod that leaves are not known");
            }
        }
        let uid = &entry.record.pod.uid;
        if let Err(error) = self.attachments.detach(uid, entry.record.cookie, Drain::WhenOver) {
            tracing::warn!(pod = %entry.record.pod.name, error = %error_chain(&error), "a pod cannot be let go yet");
        }
        entry.due = Some(now + DRAIN_LOOK);
    }

    /// Restores the namespace of a pod that has drained. It stays known, so that it can come back. Whether it has: its
    /// connections need the routes for as long as they go on.
    pub(super) fn finish_draining(&self, entry: &mut Entry, now: Instant) -> bool {
        if self.attachments.lingers(&entry.record.pod.uid, entry.record.cookie) {
            entry.due = Some(now + DRAIN_LOOK);
            return false;
        }
        let restored = self
            .attachments
            .detach(&entry.record.pod.uid, entry.record.cookie, Drain::Now)
            .map_err(EnrollError::from)
            .and_then(|()| {
                let path = PathBuf::from(entry.record.netns.as_str());
                let netns =
                    Netns::open(&path).map_err(|source| NamespaceError::Open { path, source })?;
                namespace::restore(&netns, &entry.record.originals).map_err(EnrollError::from)
            });
        match restored {
            Err(error) => {
                tracing::warn!(pod = %entry.record.pod.name, error = %error_chain(&error), "a pod cannot be restored yet");
                entry.due = Some(now + entry.next_pause());
            }
            Ok(()) => {
                entry.record.phase = PodPhase::Excluded;
                entry.record.originals.clear();
                "it was let go".clone_into(&mut entry.detail);
                entry.netns = None;
                entry.due = None;
                entry.failures = 0;
            }
        }
        true
    }

    /// Forgets what the kernel has of a pod that is gone.
    pub(super) fn detach_gone(&self, entry: &Entry) {
        let uid = &entry.record.pod.uid;
        if let Err(error) = self.attachments.detach(uid, entry.record.cookie, Drain::Now) {
            tracing::warn!(pod = %entry.record.pod.name, error = %error_chain(&error), "a gone pod leaves traces");
        }
    }

    /// What is not as enrolment left it; `whole` is what the kernel says of its capture.
    pub(super) fn defect(&self, entry: &Entry, whole: bool) -> Result<Option<String>, EnrollError> {
        let path = Path::new(entry.record.netns.as_str());
        let namespace = PodNamespace::open(path, &entry.record.ips, self.host_cookie)?;
        if namespace.netns.cookie() != entry.record.cookie {
            return Ok(Some("its network namespace is another one".to_owned()));
        }
        if let Some(what) = namespace.drifted()? {
            return Ok(Some(format!("{what} was changed in the pod's network namespace")));
        }
        if !whole {
            return Ok(Some("the kernel does not capture all of it".to_owned()));
        }
        Ok(None)
    }
}

impl Entry {
    /// A pod that is only remembered yet.
    pub(super) fn new(record: Record) -> Self {
        Self {
            record,
            netns: None,
            settings: PodSettings::default(),
            detail: String::new(),
            due: None,
            failures: 0,
        }
    }

    /// Sees to it that the next tick captures it.
    pub(super) fn enter(&mut self, settings: PodSettings, service_account: &str, now: Instant) {
        self.settings = settings;
        service_account.clone_into(&mut self.record.pod.service_account);
        self.record.phase = PodPhase::Pending;
        self.failures = 0;
        self.due = Some(now);
    }

    /// Notes why it is not captured; it is tried again.
    pub(super) fn failed(&mut self, error: &EnrollError, now: Instant) {
        self.record.phase = PodPhase::Pending;
        self.detail = error_chain(error);
        self.due = Some(now + self.next_pause());
    }

    pub(super) fn next_pause(&mut self) -> Duration {
        let pause = FIRST_RETRY.saturating_mul(1 << self.failures.min(10)).min(MAX_RETRY);
        self.failures = self.failures.saturating_add(1);
        pause
    }

    /// Somebody names its namespace by this path. The one it is known by stays while it leads there: a process's path ends
    /// with that process.
    pub(super) fn is_also_at(&mut self, path: &NetnsPath) {
        if !self.is_where_it_was() {
            self.record.netns.clone_from(path);
        }
    }

    /// Looks for another path to a namespace that an operator named by a process: that may end while others live in it.
    pub(super) fn is_found_elsewhere(&mut self) -> bool {
        let path = self.record.live.then(|| search::path_of(self.record.cookie)).flatten();
        let Some(path) = path else { return false };
        tracing::info!(pod = %self.record.pod.name, %path, "the pod's network namespace is known by another path");
        self.record.netns = path;
        true
    }

    /// Whether its path leads to its namespace. Enters it: not for every tick.
    pub(super) fn is_where_it_was(&self) -> bool {
        let path = Path::new(self.record.netns.as_str());
        Netns::open(path).is_ok_and(|netns| netns.cookie() == self.record.cookie)
    }

    /// True when its path leads elsewhere or nowhere. A namespace that was never opened here is not judged.
    pub(super) fn has_vanished(&self) -> bool {
        use std::os::unix::fs::MetadataExt as _;
        match std::fs::metadata(self.record.netns.as_str()) {
            Err(error) => error.kind() == io::ErrorKind::NotFound,
            Ok(found) => self.netns.as_ref().is_some_and(|netns| netns.inode() != found.ino()),
        }
    }
}

fn attached(
    entry: &Entry,
    path: PathBuf,
    netns: Arc<Netns>,
    addresses: BTreeSet<IpAddr>,
) -> AttachedPod {
    AttachedPod {
        pod: entry.record.pod.clone(),
        path,
        netns,
        addresses,
        nameservers: entry.record.nameservers.clone(),
        settings: entry.settings.clone(),
    }
}
