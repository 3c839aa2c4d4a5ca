//! The transaction that takes a pod in, its reverse, and what keeps both true over restarts.
//!
//! ```text
//!              exclude                 configure (mode AMBIENT), enroll
//!   (unknown) ────────► Excluded ───────────────┐
//!       │                  ▲                     ▼       attach, write
//!       └──── enroll ──────┼──────────────► Pending ───────────────► Enrolled
//!                          │ drained            ▲  retry                 │ unenroll, configure (mode NONE)
//!                      Draining ◄───────────────┴────────────────────────┘
//! ```
//! Every phase is left for nothing when the sandbox goes. A record is written before the first change is made to a
//! namespace and again when the pod is captured, so that a crash at any point can be finished or undone.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use mesh_ebpf::PodSettings;
use mesh_enroll::{
    ContainerId, Enroll, EnrollReply, EnrolledPod, PodName, PodPhase, PodSelector, Refusal,
};
use mesh_model::PodUid;
use mesh_net::Netns;

use super::attachment::{AttachError, AttachedPod, PodAttachments};
use super::namespace::{self, NamespaceError, PodNamespace};
use super::record::{Record, RecordFile};
use super::search;
use crate::state_file;

/// Settings of enrolment.
#[derive(Clone, Debug)]
pub(crate) struct EnrollerConfig {
    /// The list of pods, `enrolled.json`.
    pub(crate) file: PathBuf,
    /// This boot of the machine.
    pub(crate) boot_id: String,
    /// The node's own network namespace.
    pub(crate) host_cookie: u64,
    /// How long connections of a pod that leaves the mesh may go on. Seconds; default 30.
    pub(crate) drain: Duration,
}

/// What the controller wants of a pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct WantedPod {
    /// Whether it is the mesh's.
    pub(crate) captured: bool,
    /// Its service account; empty when unknown.
    pub(crate) service_account: String,
    /// What is captured of it.
    pub(crate) settings: PodSettings,
}

/// The pods of this node. All methods block on the kernel and the disk, one at a time.
pub(crate) struct Enroller {
    config: EnrollerConfig,
    attachments: Arc<dyn PodAttachments>,
    pods: Mutex<BTreeMap<PodUid, Entry>>,
    /// Counts the writes of the list.
    revision: AtomicU64,
}

/// One pod, with what does not outlive the process.
#[derive(Debug)]
struct Entry {
    record: Record,
    netns: Option<Arc<Netns>>,
    settings: PodSettings,
    /// Why it is not enrolled.
    detail: String,
    /// When something is due, and how often it failed before.
    due: Option<Instant>,
    failures: u32,
}

/// Pods of one node; Kubernetes recommends at most 110, people run 1,000.
const MAX_PODS: usize = 4096;
/// First pause before a failed enrolment is tried again; doubles up to [`MAX_RETRY`].
const FIRST_RETRY: Duration = Duration::from_millis(500);
const MAX_RETRY: Duration = Duration::from_secs(30);
/// Largest list read; a record takes about 800 bytes.
const MAX_FILE_BYTES: u64 = 16 * 1024 * 1024;

/// What [`Enroller::adopt`] found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Adopted {
    /// Pods that are captured again.
    pub(crate) enrolled: usize,
    /// Pods that are tried again later.
    pub(crate) pending: usize,
    /// Pods whose sandbox is gone.
    pub(crate) gone: usize,
    /// Namespaces that the kernel captures and nobody remembers; they stay closed.
    pub(crate) orphans: usize,
}

impl std::fmt::Debug for Enroller {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Enroller").field("config", &self.config).finish_non_exhaustive()
    }
}

impl Enroller {
    /// Reads the list of an earlier life. A list that cannot be used is put aside: what it captured stays captured.
    pub(crate) fn open(
        config: EnrollerConfig,
        attachments: Arc<dyn PodAttachments>,
    ) -> io::Result<Self> {
        let file = match state_file::read(&config.file, MAX_FILE_BYTES)? {
            None => None,
            Some(bytes) => match RecordFile::decode(&bytes) {
                Ok(file) => Some(file),
                Err(error) => {
                    let aside = state_file::set_aside(&config.file)?;
                    metrics::counter!("culvert_state_files_refused_total", "file" => "enrolled")
                        .increment(1);
                    tracing::error!(
                        error = %error_chain(&error), aside = %aside.display(),
                        "the list of enrolled pods cannot be used; its pods stay refused until they are enrolled again"
                    );
                    None
                }
            },
        };
        let same_boot = file.as_ref().is_some_and(|file| file.boot_id == config.boot_id);
        let mut pods = BTreeMap::new();
        for (uid, mut record) in file.map(RecordFile::by_uid).unwrap_or_default() {
            if !same_boot {
                // Cookies and settings were those of namespaces that a reboot has taken away.
                record.cookie = 0;
                record.originals.clear();
            }
            pods.insert(uid, Entry::new(record));
        }
        Ok(Self { config, attachments, pods: Mutex::new(pods), revision: AtomicU64::new(0) })
    }

    /// Takes up what an earlier process left: captures its pods again, forgets the gone, finishes what it was at.
    pub(crate) fn adopt(&self, wanted: &BTreeMap<PodName, WantedPod>, now: Instant) -> Adopted {
        let mut pods = self.lock();
        let mut adopted = Adopted::default();
        for uid in pods.keys().cloned().collect::<Vec<_>>() {
            let Some(mut entry) = pods.remove(&uid) else { continue };
            let wanted = wanted.get(&entry.record.pod.name);
            if let Some(wanted) = wanted {
                entry.settings = wanted.settings.clone();
            }
            if !self.still_there(&mut entry) {
                adopted.gone += 1;
                self.detach_gone(&entry);
                continue;
            }
            match entry.record.phase {
                PodPhase::Excluded => {}
                PodPhase::Draining => entry.due = Some(now),
                PodPhase::Pending | PodPhase::Enrolled => match self.capture(&mut entry) {
                    Ok(()) => adopted.enrolled += 1,
                    Err(error) => {
                        adopted.pending += 1;
                        entry.failed(&error, now);
                    }
                },
            }
            pods.insert(uid, entry);
        }
        adopted.orphans = self.sweep_orphans(&pods);
        self.write_or_warn(&pods);
        adopted
    }

    /// Takes a pod in. Doing it again for the same sandbox repairs what is missing and changes nothing else.
    pub(crate) fn enroll(&self, request: &Enroll, wanted: &WantedPod) -> EnrollReply {
        let mut pods = self.lock();
        match self.enroll_locked(&mut pods, request, wanted) {
            Ok(()) => EnrollReply::Ok,
            Err(error) => error.refusal().into(),
        }
    }

    /// Remembers a pod that is not the mesh's, so that it can be taken in when its label says so later.
    pub(crate) fn exclude(&self, request: &Enroll, reason: &str) -> EnrollReply {
        let mut pods = self.lock();
        let uid = &request.pod.uid;
        let stale = pods.get(uid).is_some_and(|entry| {
            entry.record.container_id != request.container_id || entry.record.netns != request.netns
        });
        if stale && let Err(error) = self.remove(&mut pods, uid) {
            return error.refusal().into();
        }
        let cookie = match Netns::open(Path::new(request.netns.as_str())) {
            Ok(netns) => netns.cookie(),
            // Nothing can be remembered of it, and nothing is to be done to it.
            Err(_gone) => return EnrollReply::Excluded { reason: reason.to_owned() },
        };
        if !pods.contains_key(uid) && pods.len() < MAX_PODS && cookie != self.config.host_cookie {
            let mut record = Record::new(request, cookie, request.ips.clone());
            record.phase = PodPhase::Excluded;
            let mut entry = Entry::new(record);
            reason.clone_into(&mut entry.detail);
            pods.insert(uid.clone(), entry);
            self.write_or_warn(&pods);
        }
        EnrollReply::Excluded { reason: reason.to_owned() }
    }

    /// Lets a pod go. `gone`: its sandbox is being removed, nothing in it needs restoring; otherwise an operator asks, and
    /// the pod stays out until one takes it in again.
    pub(crate) fn unenroll(&self, selector: &PodSelector, gone: bool, now: Instant) -> EnrollReply {
        let mut pods = self.lock();
        for uid in selected(&pods, selector) {
            let done = if gone {
                self.remove(&mut pods, &uid)
            } else {
                if let Some(entry) = pods.get_mut(&uid) {
                    entry.record.held_out = true;
                }
                self.start_draining(&mut pods, &uid, now)
            };
            if let Err(error) = done {
                return error.refusal().into();
            }
        }
        self.write_or_warn(&pods);
        EnrollReply::Ok
    }

    /// Is the pod as [`enroll`](Self::enroll) left it?
    pub(crate) fn check(&self, selector: &PodSelector) -> EnrollReply {
        let pods = self.lock();
        let Some(uid) = selected(&pods, selector).into_iter().next() else {
            return not_as_expected("the agent does not know this pod".to_owned());
        };
        let Some(entry) = pods.get(&uid) else {
            return not_as_expected("the agent does not know this pod".to_owned());
        };
        match entry.record.phase {
            PodPhase::Excluded => EnrollReply::Excluded { reason: entry.detail.clone() },
            PodPhase::Pending | PodPhase::Draining => not_as_expected(format!(
                "the pod is {}: {}",
                entry.record.phase.as_str(),
                entry.detail
            )),
            PodPhase::Enrolled => match self.defect(entry) {
                Ok(None) => EnrollReply::Ok,
                Ok(Some(what)) => not_as_expected(what),
                Err(error) => error.refusal().into(),
            },
        }
    }

    /// Lets go every sandbox of the container runtime that is not in `valid`.
    pub(crate) fn collect(&self, valid: &BTreeSet<ContainerId>) -> EnrollReply {
        let mut pods = self.lock();
        let gone: Vec<PodUid> = pods
            .iter()
            .filter(|(_, entry)| !entry.record.live && !valid.contains(&entry.record.container_id))
            .map(|(uid, _)| uid.clone())
            .collect();
        let mut outcome = EnrollReply::Ok;
        for uid in gone {
            if let Err(error) = self.remove(&mut pods, &uid) {
                outcome = error.refusal().into();
            }
        }
        self.write_or_warn(&pods);
        outcome
    }

    /// Every pod that is known, by namespace and name.
    pub(crate) fn list(&self) -> Vec<EnrolledPod> {
        let pods = self.lock();
        let mut listed: Vec<EnrolledPod> =
            pods.values().map(|entry| entry.record.listed(&entry.detail)).collect();
        listed.sort_by(|a, b| a.pod.name.cmp(&b.pod.name));
        listed
    }

    /// Applies what the controller wants now: pods enter and leave the mesh, settings change.
    pub(crate) fn configure(&self, wanted: &BTreeMap<PodName, WantedPod>, now: Instant) {
        let mut pods = self.lock();
        let mut changed = false;
        for uid in pods.keys().cloned().collect::<Vec<_>>() {
            let Some(entry) = pods.get_mut(&uid) else { continue };
            let Some(wanted) = wanted.get(&entry.record.pod.name) else { continue };
            match entry.record.phase {
                PodPhase::Enrolled if !wanted.captured => {
                    tracing::info!(pod = %entry.record.pod.name, "the pod leaves the mesh");
                    changed = true;
                    if let Err(error) = self.start_draining(&mut pods, &uid, now) {
                        tracing::warn!(error = %error_chain(&error), "a pod cannot be let go");
                    }
                }
                PodPhase::Excluded | PodPhase::Draining
                    if wanted.captured && !entry.record.held_out =>
                {
                    tracing::info!(pod = %entry.record.pod.name, "the pod enters the mesh");
                    changed = true;
                    let settings = wanted.settings.clone();
                    entry.enter(settings, &wanted.service_account, now);
                }
                PodPhase::Pending if !wanted.captured => {
                    changed = true;
                    if let Err(error) = self.start_draining(&mut pods, &uid, now) {
                        tracing::warn!(error = %error_chain(&error), "a pod cannot be let go");
                    }
                }
                PodPhase::Enrolled
                    if entry.settings != wanted.settings
                        || entry.record.pod.service_account != wanted.service_account =>
                {
                    let settings = wanted.settings.clone();
                    entry.settings = settings;
                    wanted.service_account.clone_into(&mut entry.record.pod.service_account);
                    changed = true;
                    if let Err(error) = self.capture(entry) {
                        tracing::warn!(error = %error_chain(&error), "settings of a pod not applied");
                        entry.failed(&error, now);
                    }
                }
                PodPhase::Excluded
                | PodPhase::Draining
                | PodPhase::Pending
                | PodPhase::Enrolled => {}
            }
        }
        if changed {
            self.write_or_warn(&pods);
        }
        drop(pods);
        self.tick(now);
    }

    /// Does what is due: tries again, finishes drains, forgets pods whose sandbox is gone. Gives the time of the next one.
    pub(crate) fn tick(&self, now: Instant) -> Option<Instant> {
        let mut pods = self.lock();
        let mut changed = false;
        for uid in pods.keys().cloned().collect::<Vec<_>>() {
            let Some(entry) = pods.get_mut(&uid) else { continue };
            if entry.has_vanished() {
                tracing::info!(pod = %entry.record.pod.name, "the pod's network namespace is gone");
                changed = true;
                if let Err(error) = self.remove(&mut pods, &uid) {
                    tracing::warn!(error = %error_chain(&error), "a gone pod cannot be forgotten yet");
                }
                continue;
            }
            if entry.due.is_none_or(|due| due > now) {
                continue;
            }
            match entry.record.phase {
                PodPhase::Pending => {
                    changed = true;
                    if let Err(error) = self.capture(entry) {
                        tracing::warn!(
                            pod = %entry.record.pod.name, error = %error_chain(&error), tries = entry.failures,
                            "the pod cannot be captured; trying again"
                        );
                        entry.failed(&error, now);
                    }
                }
                PodPhase::Draining => {
                    changed = true;
                    self.finish_draining(&mut pods, &uid, now);
                }
                PodPhase::Excluded | PodPhase::Enrolled => entry.due = None,
            }
        }
        if changed {
            self.write_or_warn(&pods);
        }
        pods.values().filter_map(|entry| entry.due).min()
    }

    /// Puts back routes, rules and settings that somebody in a pod has changed. Gives how many pods needed it.
    pub(crate) fn repair(&self) -> usize {
        let mut pods = self.lock();
        let mut repaired = 0;
        for entry in pods.values_mut() {
            if entry.record.phase != PodPhase::Enrolled {
                continue;
            }
            match self.defect(entry) {
                Ok(None) => {}
                Ok(Some(what)) => {
                    tracing::warn!(pod = %entry.record.pod.name, what, "capture of the pod was disturbed; repairing");
                    repaired += 1;
                    if let Err(error) = self.capture(entry) {
                        tracing::warn!(error = %error_chain(&error), "the pod cannot be repaired");
                        entry.failed(&error, Instant::now());
                    }
                }
                Err(error) => {
                    tracing::warn!(error = %error_chain(&error), "the pod cannot be checked");
                }
            }
        }
        repaired
    }

    /// Takes every pod out and restores its namespace: for uninstalling. Gives what could not be undone.
    pub(crate) fn remove_all(&self) -> Vec<String> {
        let mut pods = self.lock();
        let mut left = Vec::new();
        for (uid, entry) in std::mem::take(&mut *pods) {
            let detached = self.attachments.detach(&uid, entry.record.cookie, Duration::ZERO);
            if let Err(error) = detached {
                left.push(format!("{}: {}", entry.record.pod.name, error_chain(&error)));
            }
            if entry.record.phase == PodPhase::Excluded {
                continue;
            }
            match Netns::open(Path::new(entry.record.netns.as_str())) {
                Ok(netns) if netns.cookie() == entry.record.cookie => {
                    if let Err(error) = namespace::restore(&netns, &entry.record.originals) {
                        left.push(format!("{}: {}", entry.record.pod.name, error_chain(&error)));
                    }
                }
                Ok(_another) => {}
                Err(_gone) => {}
            }
        }
        self.write_or_warn(&pods);
        left
    }

    fn enroll_locked(
        &self,
        pods: &mut BTreeMap<PodUid, Entry>,
        request: &Enroll,
        wanted: &WantedPod,
    ) -> Result<(), EnrollError> {
        let uid = &request.pod.uid;
        let path = Path::new(request.netns.as_str());
        let namespace = PodNamespace::open(path, &request.ips, self.config.host_cookie)?;
        let cookie = namespace.netns.cookie();
        let owner = pods.iter().find(|(other, entry)| {
            *other != uid
                && entry.record.cookie == cookie
                && entry.record.phase != PodPhase::Excluded
        });
        if let Some((_, entry)) = owner {
            let owner = entry.record.pod.name.to_string();
            return Err(EnrollError::Taken { owner });
        }
        let known = pods.get(uid).map(|entry| &entry.record);
        if known.is_some_and(|known| {
            known.cookie != cookie || known.container_id != request.container_id
        }) {
            self.remove(pods, uid)?;
        }
        if pods.len() >= MAX_PODS && !pods.contains_key(uid) {
            return Err(EnrollError::TooManyPods);
        }
        let fresh = Entry::new(Record::new(request, cookie, namespace.addresses.clone()));
        let before = pods.get(uid).map(|entry| entry.record.clone());
        let entry = pods.entry(uid.clone()).or_insert(fresh);
        if entry.record.phase != PodPhase::Enrolled {
            entry.record.phase = PodPhase::Pending;
        }
        entry.record.ips = namespace.addresses.clone();
        entry.record.nameservers.clone_from(&request.nameservers);
        entry.record.live |= request.live;
        entry.record.held_out = false;
        wanted.service_account.clone_into(&mut entry.record.pod.service_account);
        entry.settings = wanted.settings.clone();
        entry.netns = Some(Arc::new(namespace.netns));
        let outcome = self.capture_journaled(pods, uid);
        if let Err(error) = outcome {
            // The runtime asks again; an operator too. A record of what never was would only be in the way.
            match before {
                Some(record) if record.phase != PodPhase::Pending => {
                    if let Some(entry) = pods.get_mut(uid) {
                        entry.record = record;
                    }
                }
                Some(_) | None => {
                    pods.remove(uid);
                }
            }
            self.write_or_warn(pods);
            return Err(error);
        }
        Ok(())
    }

    /// [`capture`](Self::capture) with the record on disk before and after.
    fn capture_journaled(
        &self,
        pods: &mut BTreeMap<PodUid, Entry>,
        uid: &PodUid,
    ) -> Result<(), EnrollError> {
        let Some(entry) = pods.get_mut(uid) else { return Ok(()) };
        let namespace = self.reopen(entry)?;
        entry.record.originals = namespace.originals(&entry.record.originals)?;
        self.write(pods)?;
        let Some(entry) = pods.get_mut(uid) else { return Ok(()) };
        self.capture(entry)?;
        let written = self.write(pods);
        if written.is_err()
            && let Some(entry) = pods.get_mut(uid)
        {
            self.undo(entry);
        }
        written
    }

    /// The steps of enrolment, in order; what was done is undone when a later one fails.
    fn capture(&self, entry: &mut Entry) -> Result<(), EnrollError> {
        let namespace = self.reopen(entry)?;
        entry.record.originals = namespace.originals(&entry.record.originals)?;
        entry.record.ips = namespace.addresses.clone();
        let captured_before = entry.record.phase == PodPhase::Enrolled;
        let attached = namespace.prepare().map_err(EnrollError::from).and_then(|()| {
            let netns = Arc::new(namespace.netns);
            entry.netns = Some(Arc::clone(&netns));
            let pod = AttachedPod {
                pod: entry.record.pod.clone(),
                path: namespace.path.clone(),
                netns,
                addresses: namespace.addresses.clone(),
                nameservers: entry.record.nameservers.clone(),
                settings: entry.settings.clone(),
            };
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
        entry.detail.clear();
        entry.due = None;
        entry.failures = 0;
        Ok(())
    }

    /// Takes back what a failed [`capture`](Self::capture) did, as far as it goes.
    fn undo(&self, entry: &Entry) {
        let uid = &entry.record.pod.uid;
        if let Err(error) = self.attachments.detach(uid, entry.record.cookie, Duration::ZERO) {
            tracing::warn!(pod = %entry.record.pod.name, error = %error_chain(&error), "enrolment not undone");
        }
        if let Some(netns) = &entry.netns
            && let Err(error) = namespace::restore(netns, &entry.record.originals)
        {
            tracing::warn!(pod = %entry.record.pod.name, error = %error_chain(&error), "enrolment not undone");
        }
    }

    fn reopen(&self, entry: &mut Entry) -> Result<PodNamespace, EnrollError> {
        let path = Path::new(entry.record.netns.as_str());
        let namespace = PodNamespace::open(path, &entry.record.ips, self.config.host_cookie)?;
        if entry.record.cookie != namespace.netns.cookie() {
            entry.record.cookie = namespace.netns.cookie();
            entry.record.originals.clear();
        }
        Ok(namespace)
    }

    fn start_draining(
        &self,
        pods: &mut BTreeMap<PodUid, Entry>,
        uid: &PodUid,
        now: Instant,
    ) -> Result<(), EnrollError> {
        let Some(entry) = pods.get_mut(uid) else { return Ok(()) };
        match entry.record.phase {
            PodPhase::Excluded | PodPhase::Draining => return Ok(()),
            PodPhase::Pending | PodPhase::Enrolled => {}
        }
        self.attachments.detach(uid, entry.record.cookie, self.config.drain)?;
        entry.record.phase = PodPhase::Draining;
        "its last connections finish".clone_into(&mut entry.detail);
        entry.due = Some(now + self.config.drain);
        self.write(pods)
    }

    /// Restores the namespace of a pod that has drained. It stays known, so that it can come back.
    fn finish_draining(&self, pods: &mut BTreeMap<PodUid, Entry>, uid: &PodUid, now: Instant) {
        let Some(entry) = pods.get_mut(uid) else { return };
        let restored = self
            .attachments
            .detach(uid, entry.record.cookie, Duration::ZERO)
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
    }

    /// Forgets a pod whose sandbox goes.
    fn remove(&self, pods: &mut BTreeMap<PodUid, Entry>, uid: &PodUid) -> Result<(), EnrollError> {
        if let Some(entry) = pods.get(uid) {
            if entry.record.phase != PodPhase::Excluded {
                self.attachments.detach(uid, entry.record.cookie, Duration::ZERO)?;
            }
            pods.remove(uid);
        }
        Ok(())
    }

    fn detach_gone(&self, entry: &Entry) {
        let uid = &entry.record.pod.uid;
        if let Err(error) = self.attachments.detach(uid, entry.record.cookie, Duration::ZERO) {
            tracing::warn!(pod = %entry.record.pod.name, error = %error_chain(&error), "a gone pod leaves traces");
        }
    }

    /// Whether the namespace a record speaks of exists. An operator's pod may have got a new one at the same path; a
    /// runtime's has not, since a new sandbox would have been announced.
    fn still_there(&self, entry: &mut Entry) -> bool {
        let Ok(netns) = Netns::open(Path::new(entry.record.netns.as_str())) else { return false };
        if netns.cookie() == entry.record.cookie {
            entry.netns = Some(Arc::new(netns));
            return true;
        }
        if !entry.record.live {
            return false;
        }
        self.detach_gone(entry);
        entry.record.cookie = netns.cookie();
        entry.record.originals.clear();
        entry.netns = Some(Arc::new(netns));
        true
    }

    /// Cleans up what the kernel captures for namespaces that nobody remembers and that no longer exist. Those that do
    /// exist stay captured, refusing everything: better closed than forgotten and open.
    fn sweep_orphans(&self, pods: &BTreeMap<PodUid, Entry>) -> usize {
        let captured = match self.attachments.captured() {
            Ok(captured) => captured,
            Err(error) => {
                tracing::warn!(error = %error_chain(&error), "captured namespaces cannot be listed");
                return 0;
            }
        };
        let known: BTreeSet<u64> = pods.values().map(|entry| entry.record.cookie).collect();
        let unknown: BTreeSet<u64> = captured.difference(&known).copied().collect();
        if unknown.is_empty() {
            return 0;
        }
        let alive = search::cookies_on_this_machine();
        let mut orphans = 0;
        for cookie in unknown {
            if alive.contains(&cookie) {
                orphans += 1;
                tracing::error!(
                    cookie,
                    "a namespace is captured, but no pod is known for it; its connections are refused until it is enrolled again"
                );
            } else if let Err(error) =
                self.attachments.detach(&PodUid::new(""), cookie, Duration::ZERO)
            {
                tracing::warn!(cookie, error = %error_chain(&error), "traces of a gone pod remain");
            }
        }
        orphans
    }

    /// What is not as enrolment left it.
    fn defect(&self, entry: &Entry) -> Result<Option<String>, EnrollError> {
        let path = Path::new(entry.record.netns.as_str());
        let namespace = PodNamespace::open(path, &entry.record.ips, self.config.host_cookie)?;
        if namespace.netns.cookie() != entry.record.cookie {
            return Ok(Some("its network namespace is another one".to_owned()));
        }
        if let Some(setting) = namespace.drifted()? {
            return Ok(Some(format!("{setting} was changed in the pod's network namespace")));
        }
        if !self.attachments.captured()?.contains(&entry.record.cookie) {
            return Ok(Some("the kernel does not capture it".to_owned()));
        }
        Ok(None)
    }

    /// Rises when the list of pods has changed.
    pub(crate) fn revision(&self) -> u64 {
        self.revision.load(Ordering::Relaxed)
    }

    fn write(&self, pods: &BTreeMap<PodUid, Entry>) -> Result<(), EnrollError> {
        self.revision.fetch_add(1, Ordering::Relaxed);
        let records = pods.values().map(|entry| entry.record.clone());
        let bytes = RecordFile::new(&self.config.boot_id, records)
            .encode()
            .map_err(|error| EnrollError::Write(error.into()))?;
        state_file::replace(&self.config.file, &bytes).map_err(EnrollError::Write)
    }

    /// Writes a list that is right in memory already: the next write makes up for a failure.
    fn write_or_warn(&self, pods: &BTreeMap<PodUid, Entry>) {
        if let Err(error) = self.write(pods) {
            tracing::warn!(error = %error_chain(&error), "the list of enrolled pods is not written");
        }
    }

    /// A panic in a method leaves entries that are each whole, so the lock's poison says nothing.
    fn lock(&self) -> MutexGuard<'_, BTreeMap<PodUid, Entry>> {
        self.pods.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Entry {
    fn new(record: Record) -> Self {
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
    fn enter(&mut self, settings: PodSettings, service_account: &str, now: Instant) {
        self.settings = settings;
        service_account.clone_into(&mut self.record.pod.service_account);
        self.record.phase = PodPhase::Pending;
        self.failures = 0;
        self.due = Some(now);
    }

    fn failed(&mut self, error: &EnrollError, now: Instant) {
        self.record.phase = PodPhase::Pending;
        self.detail = error_chain(error);
        self.due = Some(now + self.next_pause());
    }

    fn next_pause(&mut self) -> Duration {
        let pause = FIRST_RETRY.saturating_mul(1 << self.failures.min(10)).min(MAX_RETRY);
        self.failures = self.failures.saturating_add(1);
        pause
    }

    /// True when its path leads elsewhere or nowhere. A namespace that was never opened here is not judged.
    fn has_vanished(&self) -> bool {
        use std::os::unix::fs::MetadataExt as _;
        match std::fs::metadata(self.record.netns.as_str()) {
            Err(error) => error.kind() == io::ErrorKind::NotFound,
            Ok(found) => self.netns.as_ref().is_some_and(|netns| netns.inode() != found.ino()),
        }
    }
}

fn selected(pods: &BTreeMap<PodUid, Entry>, selector: &PodSelector) -> Vec<PodUid> {
    pods.iter()
        .filter(|(uid, entry)| match selector {
            PodSelector::Container(id) => entry.record.container_id == *id,
            PodSelector::Uid(wanted) => *uid == wanted,
            PodSelector::Name(name) => entry.record.pod.name == *name,
        })
        .map(|(uid, _)| uid.clone())
        .collect()
}

fn not_as_expected(reason: String) -> EnrollReply {
    let remedy = "delete the pod so that it is created anew".to_owned();
    Refusal { reason, remedy, retryable: false }.into()
}

/// A pod could not be taken in or let go.
#[derive(Debug, thiserror::Error)]
pub(crate) enum EnrollError {
    /// The namespace is not the pod's, or cannot be prepared.
    #[error(transparent)]
    Namespace(#[from] NamespaceError),
    /// Sockets, programs or resolver.
    #[error(transparent)]
    Attach(#[from] AttachError),
    /// Another pod has it.
    #[error("the network namespace is that of pod {owner}")]
    Taken {
        /// That pod.
        owner: String,
    },
    /// The list is full.
    #[error("{MAX_PODS} pods are known already")]
    TooManyPods,
    /// The list cannot be written.
    #[error("the list of enrolled pods cannot be written")]
    Write(#[source] io::Error),
}

impl EnrollError {
    /// As the asker is told.
    pub(crate) fn refusal(&self) -> Refusal {
        let (remedy, retryable) = match self {
            Self::Namespace(error) => match error {
                NamespaceError::Open { .. } => ("see that the pod's sandbox exists", true),
                NamespaceError::Host { .. } => ("leave hostNetwork pods out of the mesh", false),
                NamespaceError::NotThePods { .. } => {
                    ("give the addresses the pod has, or another network namespace", false)
                }
                NamespaceError::NoAddress { .. } => {
                    ("let the network plugin give the pod an address first", true)
                }
                NamespaceError::LoopbackWithoutIpv6 { .. } => (
                    "set net.ipv6.conf.lo.disable_ipv6=0 in the pod, or give it no IPv6 address",
                    false,
                ),
                NamespaceError::Kernel { .. } => ("see the agent's log and `culvert check`", true),
            },
            Self::Attach(error) => (error.remedy, error.retryable),
            Self::Taken { .. } => ("unenroll that pod first", false),
            Self::TooManyPods => ("unenroll pods that are gone: culvert pod list", true),
            Self::Write(_) => ("see that the agent's state folder is writable and has space", true),
        };
        Refusal { reason: error_chain(self), remedy: remedy.to_owned(), retryable }
    }
}

/// The text of an error and of everything behind it.
pub(crate) fn error_chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(behind) = source {
        text.push_str(": ");
        text.push_str(&behind.to_string());
        source = behind.source();
    }
    text
}
