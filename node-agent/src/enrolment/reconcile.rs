//! What keeps the list of pods true: over restarts, with the controller's wishes, with what happens in the pods.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use mesh_enroll::{PodName, PodPhase};
use mesh_model::PodUid;
use mesh_net::Netns;

use super::attachment::Remains;
use super::enroller::{Enroller, WantedPod};
use super::error::EnrollError;
use super::phases::Entry;
use super::search;
use crate::dataplane::Drain;
use crate::error::error_chain;

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

impl Enroller {
    /// Takes up what an earlier process left: captures its pods again, forgets the gone, finishes what it was at.
    pub(crate) fn adopt(&self, wanted: &BTreeMap<PodName, WantedPod>, now: Instant) -> Adopted {
        let mut pods = self.lock();
        let mut adopted = Adopted::default();
        for uid in pods.keys().cloned().collect::<Vec<_>>() {
            let Some(mut entry) = pods.remove(&uid) else { continue };
            let wanted = wanted.get(&entry.record.pod.name);
            if let Some(wanted) = wanted.filter(|wanted| wanted.is_about_record(&entry.record)) {
                entry.settings = wanted.settings.clone();
            }
            match self.find_again(&mut entry) {
                Ok(true) => {}
                Ok(false) => {
                    adopted.gone += 1;
                    continue;
                }
                Err(error) => {
                    // It stays captured, and is looked at again.
                    tracing::warn!(pod = %entry.record.pod.name, error = %error_chain(&error), "a pod that is gone cannot be forgotten yet");
                    pods.insert(uid, entry);
                    continue;
                }
            }
            match entry.record.phase {
                PodPhase::Excluded | PodPhase::Closed => {}
                PodPhase::Draining => self.phases.resume_draining(&mut entry, now),
                PodPhase::Pending | PodPhase::Enrolled => match self.phases.capture(&mut entry) {
                    Ok(()) => adopted.enrolled += 1,
                    Err(error) => {
                        adopted.pending += 1;
                        entry.failed(&error, now);
                    }
                },
            }
            pods.insert(uid, entry);
        }
        self.sweep_closed(now);
        adopted.orphans = self.sweep_orphans(&pods);
        self.write_or_warn(&pods);
        adopted
    }

    /// Whether the namespace of a record is where it was. An operator's pod may have got a new one at the same path; a
    /// runtime's has not, since a new sandbox would have been announced. The old one stays captured while it lives.
    fn find_again(&self, entry: &mut Entry) -> Result<bool, EnrollError> {
        if !entry.is_where_it_was() {
            entry.is_found_elsewhere();
        }
        let netns = Netns::open(Path::new(entry.record.netns.as_str())).ok();
        if netns.as_ref().is_none_or(|netns| netns.cookie() != entry.record.cookie) {
            match entry.record.phase {
                PodPhase::Excluded | PodPhase::Draining => self.phases.detach_gone(entry),
                PodPhase::Pending | PodPhase::Enrolled | PodPhase::Closed => {
                    self.keep_closed(entry.record.clone())?;
                }
            }
        }
        let Some(netns) = netns else { return Ok(false) };
        if netns.cookie() != entry.record.cookie {
            if !entry.record.live {
                return Ok(false);
            }
            entry.record.cookie = netns.cookie();
            entry.record.originals.clear();
        }
        entry.netns = Some(Arc::new(netns));
        Ok(true)
    }

    /// Applies what the controller wants now: pods enter and leave the mesh, settings change.
    pub(crate) fn configure(&self, wanted: &BTreeMap<PodName, WantedPod>, now: Instant) {
        let mut pods = self.lock();
        let mut changed = false;
        for uid in pods.keys().cloned().collect::<Vec<_>>() {
            let Some(entry) = pods.get_mut(&uid) else { continue };
            let Some(wanted) = wanted.get(&entry.record.pod.name) else { continue };
            // A word about the next pod of this name lets nobody go that lives.
            if !wanted.is_about_record(&entry.record) {
                continue;
            }
            match entry.record.phase {
                PodPhase::Enrolled if !wanted.captured => {
                    tracing::info!(pod = %entry.record.pod.name, "the pod leaves the mesh");
                    changed = true;
                    if let Err(error) = self.phases.start_draining(entry, now) {
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
                    if let Err(error) = self.phases.start_draining(entry, now) {
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
                    if let Err(error) = self.phases.capture(entry) {
                        tracing::warn!(error = %error_chain(&error), "settings of a pod not applied");
                        entry.failed(&error, now);
                    }
                }
                PodPhase::Excluded
                | PodPhase::Draining
                | PodPhase::Pending
                | PodPhase::Enrolled
                | PodPhase::Closed => {}
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
                changed = true;
                if !entry.is_found_elsewhere() {
                    tracing::info!(pod = %entry.record.pod.name, "the pod's network namespace is gone");
                    if let Err(error) = self.close(&mut pods, &uid) {
                        tracing::warn!(error = %error_chain(&error), "a gone pod cannot be forgotten yet");
                    }
                    continue;
                }
            }
            if entry.due.is_none_or(|due| due > now) {
                continue;
            }
            match entry.record.phase {
                PodPhase::Pending => {
                    changed = true;
                    if let Err(error) = self.phases.capture(entry) {
                        tracing::warn!(
                            pod = %entry.record.pod.name, error = %error_chain(&error), tries = entry.failures,
                            "the pod cannot be captured; trying again"
                        );
                        entry.failed(&error, now);
                    }
                }
                PodPhase::Draining => {
                    changed |= self.phases.finish_draining(entry, now);
                }
                PodPhase::Excluded | PodPhase::Enrolled | PodPhase::Closed => entry.due = None,
            }
        }
        changed |= self.sweep_closed(now);
        if changed {
            self.write_or_warn(&pods);
        }
        pods.values().filter_map(|entry| entry.due).min()
    }

    /// Puts back routes, rules and settings that somebody in a pod has changed. Gives how many pods needed it.
    pub(crate) fn repair(&self) -> usize {
        let mut pods = self.lock();
        let mut repaired = 0;
        // Asked once for all: it walks the kernel's tables, and enrolment waits meanwhile.
        let whole = match self.phases.attachments.whole() {
            Ok(whole) => whole,
            Err(error) => {
                tracing::warn!(error = %error_chain(&error), "captured namespaces cannot be listed");
                return 0;
            }
        };
        for entry in pods.values_mut() {
            if entry.record.phase != PodPhase::Enrolled {
                continue;
            }
            match self.phases.defect(entry, whole.contains(&entry.record.cookie)) {
                Ok(None) => {}
                Ok(Some(what)) => {
                    tracing::warn!(pod = %entry.record.pod.name, what, "capture of the pod was disturbed; repairing");
                    repaired += 1;
                    if let Err(error) = self.phases.capture(entry) {
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

    /// Cleans up what the kernel captures for namespaces that nobody remembers and that no longer exist. Those that do
    /// exist stay captured, refusing everything: better closed than forgotten and open.
    fn sweep_orphans(&self, pods: &BTreeMap<PodUid, Entry>) -> usize {
        let captured = match self.phases.attachments.captured() {
            Ok(captured) => captured,
            Err(error) => {
                tracing::warn!(error = %error_chain(&error), "captured namespaces cannot be listed");
                return 0;
            }
        };
        let closed = self.closed();
        let known: BTreeSet<u64> =
            pods.values().chain(closed.iter()).map(|entry| entry.record.cookie).collect();
        drop(closed);
        let unknown: BTreeSet<u64> = captured.difference(&known).copied().collect();
        if unknown.is_empty() {
            return 0;
        }
        let alive = search::cookies_on_this_machine();
        let mut orphans = 0;
        for cookie in unknown {
            let attached = self.phases.attachments.remains(cookie);
            // By a process or a name, or by what is attached to it: a socket keeps a namespace, too.
            if alive.contains(&cookie)
                || !matches!(attached, Ok(Remains::Nothing | Remains::OfUnknown))
            {
                orphans += 1;
                tracing::error!(
                    cookie,
                    "a namespace is captured, but no pod is known for it; its connections are refused until it is enrolled again"
                );
            } else if let Err(error) =
                self.phases.attachments.detach(&PodUid::new(""), cookie, Drain::Now)
            {
                tracing::warn!(cookie, error = %error_chain(&error), "traces of a gone pod remain");
            }
        }
        orphans
    }
}
