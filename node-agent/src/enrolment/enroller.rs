//! The pods of a node: the list, in memory and on disk, and what others ask of it.
//!
//! A record is written before the first change is made to a namespace and again when the pod is captured, so that a crash
//! at any point can be finished or undone. [`Phases`] does the steps of one pod, `reconcile` decides on them unasked.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use mesh_ebpf::PodSettings;
use mesh_enroll::{
    ContainerId, Enroll, EnrollReply, EnrolledPod, PodName, PodPhase, PodSelector, Refusal,
};
use mesh_model::PodUid;
use mesh_net::Netns;
use mesh_telemetry::metric;

use super::attachment::PodAttachments;
use super::error::EnrollError;
use super::namespace::{self, PodNamespace};
use super::phases::{Entry, Phases};
use super::record::{Record, RecordFile};
use crate::dataplane::Drain;
use crate::error::error_chain;
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
    /// Namespaces that the node leaves alone: pods of theirs that run already are not looked for.
    pub(crate) excluded: BTreeSet<String>,
}

/// What the controller wants of a pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct WantedPod {
    /// Whether it is the mesh's.
    pub(crate) captured: bool,
    /// Kubernetes' uid of it; empty when unknown.
    pub(crate) uid: String,
    /// Its service account; empty when unknown.
    pub(crate) service_account: String,
    /// What is captured of it.
    pub(crate) settings: PodSettings,
    /// What is said of its addresses, where it was asked for.
    pub(crate) said: SaidAddresses,
}

/// What the controller says of addresses.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct SaidAddresses {
    /// The pod's; none: nothing is said.
    pub(crate) own: BTreeSet<IpAddr>,
    /// Those of the request that are another's.
    pub(crate) of_others: BTreeMap<IpAddr, PodName>,
}

impl WantedPod {
    /// Whether it is about the pod with this uid and sandbox. Where one of them does not know the uid the name decides:
    /// manifests need not have one, and runtimes that give none have the sandbox's id stand in.
    pub(crate) fn is_about(&self, uid: &PodUid, container_id: &ContainerId) -> bool {
        let asked = uid.as_str();
        self.uid.is_empty() || self.uid == asked || asked == container_id.as_str()
    }

    /// Whether it is about the pod of a record of the same name.
    pub(super) fn is_about_record(&self, record: &Record) -> bool {
        self.is_about(&record.pod.uid, &record.container_id)
    }
}

/// The pods of this node. All methods block on the kernel and the disk, one at a time.
pub(crate) struct Enroller {
    config: EnrollerConfig,
    pub(super) phases: Phases,
    pods: Mutex<BTreeMap<PodUid, Entry>>,
    /// See [`close`](Self::close).
    pub(super) closed: Mutex<Vec<Entry>>,
    /// Counts the writes of the list.
    revision: AtomicU64,
}

/// Pods of one node; Kubernetes recommends at most 110, people run 1,000.
pub(super) const MAX_PODS: usize = 4096;
/// Largest list read; a record takes about 800 bytes.
const MAX_FILE_BYTES: u64 = 16 * 1024 * 1024;

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
                    metrics::counter!(metric::STATE_FILES_REFUSED.name, "file" => "enrolled")
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
        let closed = file.iter().filter(|_| same_boot).flat_map(|file| file.closed.iter().cloned());
        let closed = Mutex::new(closed.map(Entry::closed).collect());
        for (uid, mut record) in file.map(RecordFile::by_uid).unwrap_or_default() {
            if !same_boot {
                // Cookies and settings were those of namespaces that a reboot has taken away.
                record.cookie = 0;
                record.originals.clear();
            }
            pods.insert(uid, Entry::new(record));
        }
        let phases = Phases { attachments, host_cookie: config.host_cookie };
        Ok(Self { config, phases, pods: Mutex::new(pods), closed, revision: AtomicU64::new(0) })
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
        let cookie = match Netns::open(Path::new(request.netns.as_str())) {
            Ok(netns) => netns.cookie(),
            // Nothing can be remembered of it, and nothing is to be done to it.
            Err(_gone) => return EnrollReply::Excluded { reason: reason.to_owned() },
        };
        // What is captured leaves the mesh when the controller's word on it is applied, not by this.
        match pods.get_mut(uid) {
            Some(entry) if entry.record.cookie == cookie => {
                entry.record.container_id.clone_from(&request.container_id);
                entry.is_also_at(&request.netns);
            }
            Some(_another) if request.live => {}
            Some(_another) => {
                if let Err(error) = self.close(&mut pods, uid) {
                    return error.refusal().into();
                }
            }
            None => {}
        }
        if !pods.contains_key(uid) && pods.len() < MAX_PODS && cookie != self.phases.host_cookie {
            let mut record = Record::new(request, cookie, request.ips.clone());
            record.phase = PodPhase::Excluded;
            let mut entry = Entry::new(record);
            reason.clone_into(&mut entry.detail);
            pods.insert(uid.clone(), entry);
            self.write_or_warn(&pods);
        }
        EnrollReply::Excluded { reason: reason.to_owned() }
    }

    /// Lets a pod go. `gone`: its sandbox is being removed, nothing in it needs restoring, and until its namespace is gone
    /// everything is refused there; otherwise an operator asks, and the pod stays out until one takes it in again.
    pub(crate) fn unenroll(&self, selector: &PodSelector, gone: bool, now: Instant) -> EnrollReply {
        let mut pods = self.lock();
        let mut selected = selected(&pods, selector);
        if let (PodSelector::Name(_), false, [_, _, ..]) = (selector, gone, &*selected) {
            // Whose namespace is gone is nobody's to take out; it goes by itself.
            let lives = |uid: &PodUid| pods.get(uid).is_some_and(Entry::is_where_it_was);
            selected.retain(lives);
        }
        if let (PodSelector::Name(name), false, [_, _, ..]) = (selector, gone, &*selected) {
            let uids = selected.iter().map(|uid| uid.as_str().to_owned()).collect();
            return EnrollError::Ambiguous { name: name.clone(), uids }.refusal().into();
        }
        if gone {
            self.expect_end_of_closed(selector);
        } else if selected.is_empty()
            && let Err(error) = self.release_closed(selector)
        {
            return error.refusal().into();
        }
        for uid in selected {
            let done = if gone {
                // Some runtimes take the network away before they end the processes, and a namespace without any can be
                // entered by whoever holds it.
                self.close(&mut pods, &uid)
            } else {
                let Some(entry) = pods.get_mut(&uid) else { continue };
                entry.record.held_out = true;
                let started = self.phases.start_draining(entry, now);
                started.and_then(|started| if started { self.write(&pods) } else { Ok(()) })
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
            PodPhase::Pending | PodPhase::Draining | PodPhase::Closed => not_as_expected(format!(
                "the pod is {}: {}",
                entry.record.phase.as_str(),
                entry.detail
            )),
            PodPhase::Enrolled => match self
                .phases
                .attachments
                .is_whole(entry.record.cookie)
                .map_err(EnrollError::from)
                .and_then(|whole| self.phases.defect(entry, whole))
            {
                Ok(None) => EnrollReply::Ok,
                Ok(Some(what)) => not_as_expected(what),
                Err(error) => error.refusal().into(),
            },
        }
    }

    /// Lets go sandboxes of the container runtime that are not in `valid` and whose namespace is gone.
    ///
    /// A list names the attachments of one network, and a runtime may have several, so that a sandbox which is not in it may
    /// well live: one with a namespace stays captured.
    pub(crate) fn collect(&self, valid: &BTreeSet<ContainerId>) -> EnrollReply {
        let mut pods = self.lock();
        let gone: Vec<PodUid> = pods
            .iter()
            .filter(|(_, entry)| !entry.record.live && !valid.contains(&entry.record.container_id))
            .filter(|(_, entry)| entry.has_vanished())
            .map(|(uid, _)| uid.clone())
            .collect();
        let mut outcome = EnrollReply::Ok;
        for uid in gone {
            if let Err(error) = self.close(&mut pods, &uid) {
                outcome = error.refusal().into();
            }
        }
        self.sweep_closed(Instant::now());
        self.write_or_warn(&pods);
        outcome
    }

    /// Those that are to be captured and of which nothing is known.
    pub(crate) fn missing(
        &self,
        wanted: &BTreeMap<PodName, WantedPod>,
    ) -> BTreeMap<PodName, WantedPod> {
        let pods = self.lock();
        let mut known: BTreeMap<&PodName, Vec<&Record>> = BTreeMap::new();
        for entry in pods.values() {
            known.entry(&entry.record.pod.name).or_default().push(&entry.record);
        }
        let is_missing = |(name, pod): &(&PodName, &WantedPod)| {
            pod.captured
                && !pod.uid.is_empty()
                // Another of this name may be known, which has not ended yet.
                && !known.get(name).is_some_and(|known| known.iter().any(|one| pod.is_about_record(one)))
                && !self.config.excluded.contains(name.namespace())
        };
        let missing = wanted.iter().filter(is_missing);
        missing.map(|(name, pod)| (name.clone(), pod.clone())).collect()
    }

    /// Every pod that is known, by namespace and name.
    pub(crate) fn list(&self) -> Vec<EnrolledPod> {
        let pods = self.lock();
        let mut listed: Vec<EnrolledPod> =
            pods.values().map(|entry| entry.record.listed(&entry.detail)).collect();
        listed.sort_by(|a, b| a.pod.name.cmp(&b.pod.name));
        listed
    }

    /// Takes every pod out and restores its namespace: for uninstalling. Gives what could not be undone; such pods stay on the list, to
    /// be tried again.
    pub(crate) fn remove_all(&self) -> Vec<String> {
        let mut pods = self.lock();
        let mut left = Vec::new();
        let closed = std::mem::take(&mut *self.closed());
        let closed = closed.into_iter().map(|entry| (entry.record.pod.uid.clone(), entry));
        for (uid, entry) in std::mem::take(&mut *pods).into_iter().chain(closed) {
            let undone = left.len();
            let detached = self.phases.attachments.detach(&uid, entry.record.cookie, Drain::Now);
            if let Err(error) = detached {
                left.push(format!("{}: {}", entry.record.pod.name, error_chain(&error)));
            }
            if entry.record.phase != PodPhase::Excluded {
                match Netns::open(Path::new(entry.record.netns.as_str())) {
                    Ok(netns) if netns.cookie() == entry.record.cookie => {
                        if let Err(error) = namespace::restore(&netns, &entry.record.originals) {
                            left.push(format!(
                                "{}: {}",
                                entry.record.pod.name,
                                error_chain(&error)
                            ));
                        }
                    }
                    Ok(_another) => {}
                    Err(_gone) => {}
                }
            }
            if left.len() > undone {
                if entry.record.phase == PodPhase::Closed {
                    self.closed().push(entry);
                } else {
                    pods.insert(uid, entry);
                }
            }
        }
        self.write_or_warn(&pods);
        left
    }

    /// How many pods should be captured and cannot be yet; the list says why.
    pub(crate) fn pending(&self) -> usize {
        let pods = self.lock();
        pods.values().filter(|entry| entry.record.phase == PodPhase::Pending).count()
    }

    fn enroll_locked(
        &self,
        pods: &mut BTreeMap<PodUid, Entry>,
        request: &Enroll,
        wanted: &WantedPod,
    ) -> Result<(), EnrollError> {
        let uid = &request.pod.uid;
        let path = Path::new(request.netns.as_str());
        let namespace = PodNamespace::open(path, &request.ips, self.phases.host_cookie)?;
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
        if let Some(known) = pods.get(uid).map(|entry| &entry.record)
            && known.cookie != cookie
        {
            let captured = match known.phase {
                PodPhase::Pending | PodPhase::Enrolled | PodPhase::Closed => true,
                PodPhase::Excluded | PodPhase::Draining => false,
            };
            // A runtime makes a pod's sandbox anew whether or not the old one has ended; an operator may have mistaken the pod.
            if captured && request.live && self.exists(known)? {
                let (uid, netns) = (uid.clone(), known.netns.clone());
                return Err(EnrollError::StillLives { uid, netns });
            }
        }
        judge_addresses(pods, request, &namespace, &wanted.said)?;
        if pods.get(uid).is_some_and(|known| known.record.cookie != cookie) {
            self.close(pods, uid)?;
        }
        if pods.len() >= MAX_PODS && !pods.contains_key(uid) {
            return Err(EnrollError::TooManyPods);
        }
        if let Some(mut entry) = self.reopened(cookie) {
            entry.record.pod = request.pod.clone();
            pods.insert(uid.clone(), entry);
        }
        let fresh = Entry::new(Record::new(request, cookie, namespace.addresses.clone()));
        let before = pods.get(uid).map(|entry| entry.record.clone());
        let captured_before = self.phases.is_captured(cookie);
        let entry = pods.entry(uid.clone()).or_insert(fresh);
        if entry.record.phase != PodPhase::Enrolled {
            entry.record.phase = PodPhase::Pending;
        }
        // The sandbox may have another name by now; nothing of its capture depends on that.
        entry.record.container_id.clone_from(&request.container_id);
        entry.is_also_at(&request.netns);
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
                Some(record) if captured_before || record.phase != PodPhase::Pending => {
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

    /// [`Phases::capture`] with the record on disk before and after.
    fn capture_journaled(
        &self,
        pods: &mut BTreeMap<PodUid, Entry>,
        uid: &PodUid,
    ) -> Result<(), EnrollError> {
        let Some(entry) = pods.get_mut(uid) else { return Ok(()) };
        let namespace = self.phases.reopen(entry)?;
        entry.record.originals = namespace.originals(&entry.record.originals)?;
        self.write(pods)?;
        let Some(entry) = pods.get_mut(uid) else { return Ok(()) };
        let captured_before = self.phases.is_captured(entry.record.cookie);
        self.phases.capture(entry)?;
        let written = self.write(pods);
        // A pod that was captured stays so, whatever its record says: never open for want of a disk.
        if written.is_err()
            && !captured_before
            && let Some(entry) = pods.get_mut(uid)
        {
            self.phases.undo(entry);
        }
        written
    }

    /// Forgets a pod whose sandbox goes.
    pub(super) fn remove(
        &self,
        pods: &mut BTreeMap<PodUid, Entry>,
        uid: &PodUid,
    ) -> Result<(), EnrollError> {
        if let Some(entry) = pods.get(uid) {
            if entry.record.phase != PodPhase::Excluded {
                self.phases.attachments.detach(uid, entry.record.cookie, Drain::Now)?;
            }
            pods.remove(uid);
        }
        Ok(())
    }

    /// Writes the list, for a successor to read.
    pub(crate) fn write_now(&self) -> io::Result<()> {
        self.write(&self.lock()).map_err(io::Error::other)
    }

    /// Rises when the list of pods has changed.
    pub(crate) fn revision(&self) -> u64 {
        self.revision.load(Ordering::Relaxed)
    }

    fn write(&self, pods: &BTreeMap<PodUid, Entry>) -> Result<(), EnrollError> {
        self.revision.fetch_add(1, Ordering::Relaxed);
        let records = pods.values().map(|entry| entry.record.clone());
        let closed: Vec<Record> = self.closed().iter().map(|entry| entry.record.clone()).collect();
        let bytes = RecordFile::new(&self.config.boot_id, records, closed.into_iter())
            .encode()
            .map_err(|error| EnrollError::Write(error.into()))?;
        state_file::replace(&self.config.file, &bytes).map_err(EnrollError::Write)
    }

    /// Writes a list that is right in memory already: the next write makes up for a failure.
    pub(super) fn write_or_warn(&self, pods: &BTreeMap<PodUid, Entry>) {
        if let Err(error) = self.write(pods) {
            tracing::warn!(error = %error_chain(&error), "the list of enrolled pods is not written");
        }
    }

    /// A panic in a method leaves entries that are each whole, so the lock's poison says nothing.
    pub(super) fn lock(&self) -> MutexGuard<'_, BTreeMap<PodUid, Entry>> {
        self.pods.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn selected(pods: &BTreeMap<PodUid, Entry>, selector: &PodSelector) -> Vec<PodUid> {
    pods.iter()
        .filter(|(_, entry)| entry.record.is_selected(selector))
        .map(|(uid, _)| uid.clone())
        .collect()
}

/// Refuses a namespace that is another pod's by what the controller says of addresses.
///
/// Of a sandbox that a runtime makes anew the controller knows the old addresses only, so that is no reason to refuse it.
fn judge_addresses(
    pods: &BTreeMap<PodUid, Entry>,
    request: &Enroll,
    namespace: &PodNamespace,
    said: &SaidAddresses,
) -> Result<(), EnrollError> {
    if request.live && !said.own.is_subset(&namespace.addresses) {
        return Err(EnrollError::OtherAddresses {
            uid: request.pod.uid.clone(),
            said: said.own.clone(),
            present: namespace.addresses.clone(),
        });
    }
    for (ip, owner) in &said.of_others {
        let holder = pods.values().find(|entry| {
            entry.record.pod.name == *owner
                && entry.record.phase != PodPhase::Excluded
                && entry.record.cookie != namespace.netns.cookie()
                && entry.record.ips.contains(ip)
                && !entry.has_vanished()
        });
        if let Some(holder) = holder {
            let (ip, owner, netns) = (*ip, owner.clone(), holder.record.netns.clone());
            return Err(EnrollError::AddressTaken { ip, owner, netns });
        }
    }
    Ok(())
}

fn not_as_expected(reason: String) -> EnrollReply {
    let remedy = "delete the pod so that it is created anew".to_owned();
    Refusal { reason, remedy, retryable: false }.into()
}
