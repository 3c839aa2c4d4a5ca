//! Why a pod was not taken in or let go, and how the asker is told.

use std::collections::BTreeSet;
use std::io;
use std::net::IpAddr;

use mesh_enroll::{NetnsPath, PodName, Refusal};
use mesh_model::PodUid;

use super::attachment::AttachError;
use super::enroller::MAX_PODS;
use super::namespace::NamespaceError;
use crate::error::error_chain;

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
    /// The pod is captured elsewhere.
    #[error("uid {uid} is enrolled in netns {netns}, which still lives")]
    StillLives {
        /// The pod.
        uid: PodUid,
        /// Where.
        netns: NetnsPath,
    },
    /// The namespace is another pod's, by its addresses.
    #[error(
        "the controller says that uid {uid} has {said:?}; the network namespace has {present:?}"
    )]
    OtherAddresses {
        /// The pod.
        uid: PodUid,
        /// The controller's word.
        said: BTreeSet<IpAddr>,
        /// What is there.
        present: BTreeSet<IpAddr>,
    },
    /// An address is another captured pod's.
    #[error("{ip} is the address of {owner}, which is enrolled in netns {netns}")]
    AddressTaken {
        /// The address.
        ip: IpAddr,
        /// Whose it is.
        owner: PodName,
        /// Where that is.
        netns: NetnsPath,
    },
    /// A name that several pods have.
    #[error("several pods are called {name}: {}", .uids.join(", "))]
    Ambiguous {
        /// The name.
        name: PodName,
        /// Their uids.
        uids: Vec<String>,
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
            Self::StillLives { .. } => (
                "end what runs there and remove the network namespace, or let it go in the clear: culvert pod unenroll --uid UID",
                false,
            ),
            Self::OtherAddresses { .. } => {
                ("name the pod's own network namespace, or mend what the controller reads", false)
            }
            Self::AddressTaken { .. } => ("remove that pod's sandbox first", true),
            Self::Ambiguous { .. } => ("name the uid: culvert pod unenroll --uid UID", false),
            Self::TooManyPods => ("unenroll pods that are gone: culvert pod list", true),
            Self::Write(_) => ("see that the agent's state folder is writable and has space", true),
        };
        Refusal { reason: error_chain(self), remedy: remedy.to_owned(), retryable }
    }
}
