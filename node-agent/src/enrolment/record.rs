//! What the agent remembers of its pods across restarts.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use mesh_enroll::{ContainerId, Enroll, EnrolledPod, NetnsPath, PodPhase, PodRef, PodSelector};
use mesh_model::PodUid;
use serde::{Deserialize, Serialize};

use super::sysctl::Originals;

/// One pod of the node, written down before anything is done to it and again afterwards.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Record {
    /// Its names.
    pub(crate) pod: PodRef,
    /// Its network namespace.
    pub(crate) netns: NetnsPath,
    /// The namespace's cookie: valid within one boot of the machine.
    pub(crate) cookie: u64,
    /// Its addresses.
    pub(crate) ips: BTreeSet<IpAddr>,
    /// Its sandbox.
    pub(crate) container_id: ContainerId,
    /// Its nameservers; empty: the node's.
    pub(crate) nameservers: BTreeSet<IpAddr>,
    /// True when an operator asked, so that the runtime's garbage collection does not know it.
    pub(crate) live: bool,
    /// True when an operator took it out: its label does not bring it back.
    #[serde(default)]
    pub(crate) held_out: bool,
    /// Kernel settings of its namespace as they were before enrolment.
    pub(crate) originals: Originals,
    /// How far it has come.
    pub(crate) phase: PodPhase,
}

impl Record {
    /// A pod that nothing has been done to.
    pub(crate) fn new(request: &Enroll, cookie: u64, ips: BTreeSet<IpAddr>) -> Self {
        Self {
            pod: request.pod.clone(),
            netns: request.netns.clone(),
            cookie,
            ips,
            container_id: request.container_id.clone(),
            nameservers: request.nameservers.clone(),
            live: request.live,
            held_out: false,
            originals: Originals::new(),
            phase: PodPhase::Pending,
        }
    }

    /// Whether `selector` names it.
    pub(crate) fn is_selected(&self, selector: &PodSelector) -> bool {
        match selector {
            PodSelector::Container(id) => self.container_id == *id,
            PodSelector::Uid(uid) => self.pod.uid == *uid,
            PodSelector::Name(name) => self.pod.name == *name,
        }
    }

    /// As shown to people.
    pub(crate) fn listed(&self, detail: &str) -> EnrolledPod {
        EnrolledPod {
            pod: self.pod.clone(),
            netns: self.netns.clone(),
            ips: self.ips.clone(),
            container_id: self.container_id.clone(),
            phase: self.phase,
            detail: detail.to_owned(),
        }
    }
}

/// The file `enrolled.json`.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct RecordFile {
    /// Layout of the file.
    version: u32,
    /// The boot the cookies belong to. Source: `/proc/sys/kernel/random/boot_id`.
    pub(crate) boot_id: String,
    /// The pods, by uid.
    pub(crate) pods: Vec<Record>,
    /// Earlier sandboxes that are captured still.
    #[serde(default)]
    pub(crate) closed: Vec<Record>,
}

/// Layout written and read.
const VERSION: u32 = 1;

/// A file that cannot be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum UnusableRecords {
    /// It is not what was written.
    #[error("not a list of enrolled pods")]
    Malformed(#[source] serde_json::Error),
    /// It was written by another version.
    #[error("layout {0} is unknown to this version")]
    Version(u32),
}

impl RecordFile {
    /// What to write.
    pub(crate) fn new(
        boot_id: &str,
        pods: impl Iterator<Item = Record>,
        closed: impl Iterator<Item = Record>,
    ) -> Self {
        let (pods, closed) = (pods.collect(), closed.collect());
        Self { version: VERSION, boot_id: boot_id.to_owned(), pods, closed }
    }

    /// The file's bytes.
    pub(crate) fn encode(&self) -> Result<Vec<u8>, serde_json::Error> {
        serde_json::to_vec_pretty(self)
    }

    /// Reads a file back.
    pub(crate) fn decode(bytes: &[u8]) -> Result<Self, UnusableRecords> {
        let file: Self = serde_json::from_slice(bytes).map_err(UnusableRecords::Malformed)?;
        if file.version == VERSION { Ok(file) } else { Err(UnusableRecords::Version(file.version)) }
    }

    /// The pods by uid.
    pub(crate) fn by_uid(self) -> BTreeMap<PodUid, Record> {
        self.pods.into_iter().map(|record| (record.pod.uid.clone(), record)).collect()
    }
}
