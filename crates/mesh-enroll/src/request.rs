//! What is asked of the agent.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::time::Duration;

use mesh_model::{PodUid, canonical_ip};
use serde::{Deserialize, Serialize};

use crate::names::{self, ContainerId, InvalidName, NetnsPath, PodName};

/// One request.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "request", rename_all = "snake_case", deny_unknown_fields)]
pub enum EnrollRequest {
    /// Take a pod into the mesh, if it is to be. Asking again for the same sandbox changes nothing.
    Enroll(Enroll),
    /// Let a pod go. Letting go what is not there succeeds.
    Unenroll {
        /// Which pod.
        pod: PodSelector,
        /// True when the sandbox is being removed: nothing in it needs restoring.
        gone: bool,
    },
    /// Is the pod in the state that enrolling left it in?
    Check {
        /// Which pod.
        pod: PodSelector,
    },
    /// Can the agent take pods in?
    Status,
    /// Let go every sandbox that is not listed.
    Gc {
        /// The sandboxes that still exist, sorted and without repeats.
        valid: BTreeSet<ContainerId>,
    },
    /// Every pod the agent knows of.
    List,
}

/// A pod's names.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "RawPodRef")]
pub struct PodRef {
    /// Kubernetes' uid, or a name of the operator's choice.
    pub uid: PodUid,
    /// Namespace and name: what the pod is matched to its workload by.
    #[serde(flatten)]
    pub name: PodName,
    /// Service account; empty when the caller does not know it. Informative: identity comes from the controller.
    pub service_account: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawPodRef {
    uid: String,
    namespace: String,
    name: String,
    #[serde(default)]
    service_account: String,
}

impl TryFrom<RawPodRef> for PodRef {
    type Error = InvalidName;

    fn try_from(raw: RawPodRef) -> Result<Self, InvalidName> {
        Self::new(&raw.uid, &raw.namespace, &raw.name, &raw.service_account)
    }
}

impl PodRef {
    /// A pod by its names; `service_account` may be empty.
    ///
    /// # Errors
    /// When one of them is no valid name of its kind.
    pub fn new(
        uid: &str,
        namespace: &str,
        name: &str,
        service_account: &str,
    ) -> Result<Self, InvalidName> {
        Ok(Self {
            uid: names::pod_uid(uid)?,
            name: PodName::new(namespace, name)?,
            service_account: names::service_account(service_account)?,
        })
    }
}

/// Which pod a request is about.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PodSelector {
    /// By sandbox. A late request for a sandbox that was replaced never hits its successor.
    Container(ContainerId),
    /// By uid.
    Uid(PodUid),
    /// By namespace and name.
    Name(PodName),
}

/// Everything needed to take a pod in.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "RawEnroll")]
pub struct Enroll {
    /// The pod.
    pub pod: PodRef,
    /// Its network namespace.
    pub netns: NetnsPath,
    /// Its addresses, canonical, sorted, at most [`MAX_IPS`]; empty: those the namespace has.
    pub ips: BTreeSet<IpAddr>,
    /// Its sandbox.
    pub container_id: ContainerId,
    /// Nameservers of the pod, where the caller knows them; empty: the node's.
    pub nameservers: BTreeSet<IpAddr>,
    /// True when the pod runs already and an operator asks: its connections stay as they are, and the agent does not
    /// wait for the controller's word on it.
    pub live: bool,
    /// How long the asker waits for the answer, milliseconds, when that is less than [`USUAL_PATIENCE`]; the agent answers
    /// before that, with what it knows by then.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub patience_ms: Option<u64>,
}

/// Who waits that long need not say so: the agent makes nobody wait longer than half of it.
pub const USUAL_PATIENCE: Duration = Duration::from_secs(20);

/// What to put into [`Enroll::patience_ms`] of an asker that waits for `patience`.
#[must_use]
pub fn patience_ms(patience: Duration) -> Option<u64> {
    (patience < USUAL_PATIENCE).then(|| u64::try_from(patience.as_millis()).unwrap_or(u64::MAX))
}

/// Most addresses of one pod. Kubernetes has two; secondary networks add a few.
pub const MAX_IPS: usize = 16;

/// An enrolment that cannot be.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidEnroll {
    /// An address no pod can have.
    #[error("not an address of a pod: {ip}")]
    Address {
        /// The address.
        ip: IpAddr,
    },
    /// Too many addresses.
    #[error("{count} addresses, at most {MAX_IPS} are allowed")]
    TooManyAddresses {
        /// How many there were.
        count: usize,
    },
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawEnroll {
    pod: PodRef,
    netns: NetnsPath,
    #[serde(default)]
    ips: Vec<IpAddr>,
    container_id: ContainerId,
    #[serde(default)]
    nameservers: Vec<IpAddr>,
    #[serde(default)]
    live: bool,
    #[serde(default)]
    patience_ms: Option<u64>,
}

impl TryFrom<RawEnroll> for Enroll {
    type Error = InvalidEnroll;

    fn try_from(raw: RawEnroll) -> Result<Self, InvalidEnroll> {
        Ok(Self {
            pod: raw.pod,
            netns: raw.netns,
            ips: pod_addresses(raw.ips)?,
            container_id: raw.container_id,
            nameservers: nameservers(raw.nameservers)?,
            live: raw.live,
            patience_ms: raw.patience_ms,
        })
    }
}

/// Checks and canonicalises a pod's addresses.
///
/// # Errors
/// When there are too many, or one is unspecified, loopback, multicast or broadcast.
pub fn pod_addresses(
    ips: impl IntoIterator<Item = IpAddr>,
) -> Result<BTreeSet<IpAddr>, InvalidEnroll> {
    let ips: BTreeSet<IpAddr> = ips.into_iter().map(canonical_ip).collect();
    if ips.len() > MAX_IPS {
        return Err(InvalidEnroll::TooManyAddresses { count: ips.len() });
    }
    let broadcast = IpAddr::from([255, 255, 255, 255]);
    let odd = |ip: &&IpAddr| {
        ip.is_unspecified() || ip.is_loopback() || ip.is_multicast() || **ip == broadcast
    };
    match ips.iter().find(odd) {
        Some(ip) => Err(InvalidEnroll::Address { ip: *ip }),
        None => Ok(ips),
    }
}

/// A nameserver may be a loopback address (a resolver in the pod), else the rules of pod addresses hold.
fn nameservers(ips: Vec<IpAddr>) -> Result<BTreeSet<IpAddr>, InvalidEnroll> {
    let (mut local, other): (BTreeSet<IpAddr>, BTreeSet<IpAddr>) =
        ips.into_iter().map(canonical_ip).partition(IpAddr::is_loopback);
    local.extend(pod_addresses(other)?);
    if local.len() > MAX_IPS {
        return Err(InvalidEnroll::TooManyAddresses { count: local.len() });
    }
    Ok(local)
}
