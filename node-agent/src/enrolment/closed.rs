//! Sandboxes that were replaced or removed, and in which something may live: captured still, and refused everything.
//!
//! That a path is gone, or that somebody names another namespace for a pod, says nothing of the processes in the old one.
//! So the kernel goes on capturing it, with no socket of the agent in it, until it is gone for certain.

use std::cell::LazyCell;
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{MutexGuard, PoisonError};
use std::time::Instant;

use mesh_enroll::{EnrolledPod, PodPhase, PodSelector};
use mesh_model::PodUid;
use mesh_net::Netns;

use super::attachment::Remains;
use super::enroller::{Enroller, MAX_PODS};
use super::error::EnrollError;
use super::namespace;
use super::phases::Entry;
use super::record::Record;
use super::search;
use crate::dataplane::Drain;
use crate::error::error_chain;

/// Said of them in lists.
const DETAIL: &str =
    "its sandbox was replaced or removed and may live on: everything is refused there";

impl Entry {
    /// Of a sandbox that is closed.
    pub(super) fn closed(record: Record) -> Self {
        let mut entry = Self::new(record);
        DETAIL.clone_into(&mut entry.detail);
        entry
    }
}

impl Enroller {
    /// Forgets a pod. When its namespace was captured it stays so, refused everything, until it is gone.
    pub(super) fn close(
        &self,
        pods: &mut BTreeMap<PodUid, Entry>,
        uid: &PodUid,
    ) -> Result<(), EnrollError> {
        let Some(entry) = pods.get(uid) else { return Ok(()) };
        match entry.record.phase {
            PodPhase::Excluded | PodPhase::Draining => self.remove(pods, uid),
            PodPhase::Pending | PodPhase::Enrolled | PodPhase::Closed => {
                self.keep_closed(entry.record.clone())?;
                pods.remove(uid);
                Ok(())
            }
        }
    }

    /// Closes the agent's sockets in the namespace of a record, and remembers it for as long as the kernel captures it.
    pub(super) fn keep_closed(&self, mut record: Record) -> Result<(), EnrollError> {
        let (uid, cookie) = (record.pod.uid.clone(), record.cookie);
        match self.phases.attachments.remains(cookie)? {
            Remains::Nothing => self.phases.attachments.detach(&uid, cookie, Drain::Now)?,
            Remains::OfUnknown | Remains::OfLiving => {
                let mut closed = self.closed();
                closed.retain(|other| other.record.cookie != cookie);
                if closed.len() >= MAX_PODS {
                    return Err(EnrollError::TooManyPods);
                }
                self.phases.attachments.close(&uid, cookie)?;
                let Record { pod, netns, .. } = &record;
                tracing::warn!(pod = %pod.name, %uid, %netns, "a captured sandbox is closed: {DETAIL}");
                record.phase = PodPhase::Closed;
                closed.push(Entry::closed(record));
            }
        }
        Ok(())
    }

    /// Takes a namespace back that is to be a pod's again; captured as it is.
    pub(super) fn reopened(&self, cookie: u64) -> Option<Entry> {
        let mut closed = self.closed();
        let index = closed.iter().position(|entry| entry.record.cookie == cookie)?;
        let mut entry = closed.swap_remove(index);
        entry.record.phase = PodPhase::Enrolled;
        entry.detail.clear();
        entry.due = None;
        Some(entry)
    }

    /// Lets those go of which nothing is left; whether there was one. Looks at a machine's processes when one seems gone.
    pub(super) fn sweep_closed(&self, now: Instant) -> bool {
        let mut closed = self.closed();
        if closed.iter().all(|entry| entry.due.is_some_and(|due| due > now)) {
            return false;
        }
        // Asked when the kernel does not say of one that it lives, and once.
        let alive = LazyCell::new(search::cookies_on_this_machine);
        let before = closed.len();
        closed.retain_mut(|entry| {
            let cookie = entry.record.cookie;
            let lives = match self.phases.attachments.remains(cookie) {
                Ok(Remains::Nothing | Remains::OfUnknown) => alive.contains(&cookie),
                Ok(Remains::OfLiving) => true,
                Err(error) => {
                    tracing::warn!(error = %error_chain(&error), "a captured namespace cannot be looked at");
                    true
                }
            };
            if lives || !self.forget(entry) {
                entry.due = Some(now + entry.next_pause());
                return true;
            }
            tracing::info!(pod = %entry.record.pod.name, netns = %entry.record.netns, "a closed sandbox is gone");
            false
        });
        closed.len() != before
    }

    /// Takes the kernel's hand from what is gone; whether that was done. By no uid: the pod may have another sandbox, whose sockets are its.
    fn forget(&self, entry: &Entry) -> bool {
        let nobody = PodUid::new("");
        match self.phases.attachments.detach(&nobody, entry.record.cookie, Drain::Now) {
            Ok(()) => true,
            Err(error) => {
                tracing::warn!(pod = %entry.record.pod.name, error = %error_chain(&error), "a gone pod leaves traces");
                false
            }
        }
    }

    /// A runtime says that the sandboxes which `selector` names are being removed: they are looked at by the next tick.
    /// They go when they are gone, since whoever holds a namespace, by a mount or a descriptor, may still enter it.
    pub(super) fn expect_end_of_closed(&self, selector: &PodSelector) {
        for entry in self.closed().iter_mut().filter(|entry| entry.record.is_selected(selector)) {
            entry.due = None;
            entry.failures = 0;
        }
    }

    /// Lets those go that `selector` names, because an operator asks, and restores them.
    pub(super) fn release_closed(&self, selector: &PodSelector) -> Result<(), EnrollError> {
        let mut closed = self.closed();
        let mut outcome = Ok(());
        closed.retain(|entry| {
            if !entry.record.is_selected(selector) {
                return true;
            }
            let nobody = PodUid::new("");
            let detached = self.phases.attachments.detach(&nobody, entry.record.cookie, Drain::Now);
            let done = detached.map_err(EnrollError::from).and_then(|()| {
                match Netns::open(Path::new(entry.record.netns.as_str())) {
                    Ok(netns) if netns.cookie() == entry.record.cookie => {
                        Ok(namespace::restore(&netns, &entry.record.originals)?)
                    }
                    Ok(_) | Err(_) => Ok(()),
                }
            });
            let failed = done.is_err();
            if failed {
                outcome = done;
            }
            failed
        });
        outcome
    }

    /// Every pod that is known, and behind them every closed sandbox.
    pub(crate) fn list_all(&self) -> Vec<EnrolledPod> {
        let mut listed = self.list();
        listed.extend(self.closed().iter().map(|entry| entry.record.listed(&entry.detail)));
        listed
    }

    /// Locked after the pods, never before.
    pub(super) fn closed(&self) -> MutexGuard<'_, Vec<Entry>> {
        self.closed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the namespace of a record exists: by its path, by a process, or by what the kernel has attached to it.
    pub(super) fn exists(&self, record: &Record) -> Result<bool, EnrollError> {
        let by_path = Netns::open(Path::new(record.netns.as_str()));
        if by_path.is_ok_and(|netns| netns.cookie() == record.cookie) {
            return Ok(true);
        }
        Ok(self.phases.attachments.remains(record.cookie)? == Remains::OfLiving
            || search::cookies_on_this_machine().contains(&record.cookie))
    }
}
