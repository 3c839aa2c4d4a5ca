//! What an operator may want to know of objects that are read and do something else than their author may think.

use std::collections::BTreeMap;
use std::net::IpAddr;

use mesh_model::{NetworkId, NetworkMode, Workload, WorkloadUid};

use super::Index;
use super::objects::{Key, in_namespace};
use super::services::kubernetes_hostname;
use super::workloads::WorkloadSource;

/// One that has an address.
struct Claimant<'i> {
    name: String,
    is_pod: bool,
    workload: &'i Workload,
}

impl Index {
    /// What an operator may want to know of other objects: missing service accounts, visibility that cannot be expressed,
    /// addresses that several have. `holder` says who has an address.
    #[must_use]
    pub fn notes(
        &self,
        holder: impl Fn(&NetworkId, IpAddr) -> Option<WorkloadUid>,
    ) -> Vec<(String, String)> {
        let mut notes = Vec::new();
        for (key, pod) in &self.objects.pods {
            let account =
                Key { namespace: key.namespace.clone(), name: pod.service_account.clone() };
            let any_known =
                in_namespace(&self.objects.service_accounts, &key.namespace).next().is_some();
            if any_known
                && *pod.service_account != *"default"
                && !self.objects.service_accounts.contains_key(&account)
            {
                notes.push((
                    format!("Pod {key}"),
                    format!("service account {} does not exist", account.name),
                ));
            }
        }
        for (key, entry) in &self.objects.service_entries {
            if entry.visibility_narrowed {
                let text = "exportTo names other namespaces, which agents cannot tell apart: visible in its own only";
                notes.push((format!("ServiceEntry {key}"), text.into()));
            }
        }
        for (key, slice) in &self.objects.slices {
            if slice.service.is_empty() {
                notes.push((
                    format!("EndpointSlice {key}"),
                    "no label kubernetes.io/service-name: not used".into(),
                ));
            }
        }
        self.note_shared_addresses(holder, &mut notes);
        notes
    }

    fn note_shared_addresses(
        &self,
        holder: impl Fn(&NetworkId, IpAddr) -> Option<WorkloadUid>,
        notes: &mut Vec<(String, String)>,
    ) {
        let claimed = self.claimed_addresses();
        for ((network, ip), claimants) in &claimed {
            // Several WorkloadEntries of one machine are how its ports become parts of several services.
            if claimants.len() < 2 || !claimants.iter().any(|one| one.is_pod) {
                continue;
            }
            let held = holder(network, *ip);
            let Some(winner) =
                claimants.iter().find(|one| Some(&one.workload.uid) == held.as_ref())
            else {
                continue;
            };
            for loser in claimants.iter().filter(|one| one.workload.uid != winner.workload.uid) {
                let text = format!(
                    "has the address {ip}, which {} has too: connections to it are meant for {}, and plaintext from it \
                     counts as that one's; delete one of them, or correct its address",
                    winner.name, winner.name,
                );
                notes.push((loser.name.clone(), text));
            }
        }
        let network = NetworkId::new(&self.settings.network);
        let mut services: BTreeMap<IpAddr, Vec<&Key>> = BTreeMap::new();
        for (key, service) in &self.objects.services {
            for ip in &service.cluster_ips {
                services.entry(*ip).or_default().push(key);
            }
        }
        for (key, entry) in &self.objects.service_entries {
            for ip in &entry.addresses {
                for owner in claimed.get(&(network.clone(), *ip)).into_iter().flatten() {
                    let text = format!(
                        "the address {ip} is that of {}, which has it: nobody reaches this entry's hosts by it; give the \
                         entry another address",
                        owner.name,
                    );
                    notes.push((format!("ServiceEntry {key}"), text));
                }
                for owner in services.get(ip).into_iter().flatten() {
                    // An entry may say more of a Service's own host.
                    let host = kubernetes_hostname(owner, &self.settings).hostname;
                    if entry.hosts.contains(&host) {
                        continue;
                    }
                    let text = format!(
                        "the address {ip} is that of Service {owner} too: a client gets the one of its own namespace, \
                         else either; give the entry another address",
                    );
                    notes.push((format!("ServiceEntry {key}"), text));
                }
            }
        }
    }

    /// Pods and WorkloadEntries by address. A pod that has ended or is being deleted gives its address away in a moment, and
    /// one of the host's network shares it by design.
    fn claimed_addresses(&self) -> BTreeMap<(NetworkId, IpAddr), Vec<Claimant<'_>>> {
        let mut claimed: BTreeMap<_, Vec<Claimant<'_>>> = BTreeMap::new();
        for (source, uids) in &self.workloads_of {
            let (name, is_pod) = match source {
                WorkloadSource::Pod(key) => {
                    if self
                        .objects
                        .pods
                        .get(key)
                        .is_none_or(|pod| pod.terminal || pod.meta.deleting)
                    {
                        continue;
                    }
                    (format!("Pod {key}"), true)
                }
                WorkloadSource::WorkloadEntry(key) => (format!("WorkloadEntry {key}"), false),
                WorkloadSource::Slice(_) | WorkloadSource::ServiceEntry(_) => continue,
            };
            for workload in uids.iter().filter_map(|uid| self.workloads.get(uid)) {
                if workload.network_mode == NetworkMode::HostNetwork {
                    continue;
                }
                for ip in &workload.addresses {
                    let claimant = Claimant { name: name.clone(), is_pod, workload };
                    claimed.entry((workload.network.clone(), *ip)).or_default().push(claimant);
                }
            }
        }
        claimed
    }
}
