//! Pods that ran before anybody told the agent of them: found by what the kernel shows of them.
//!
//! A pod's processes are those whose cgroup names its uid. All of them are in one network namespace, which the runtime
//! has mounted by name, and which holds the addresses that the controller knows of the pod. Where any of this does not
//! agree the pod is left alone and looked at again.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::net::IpAddr;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use mesh_enroll::{ContainerId, Enroll, EnrollReply, NetnsPath, PodName, PodRef};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::enroller::WantedPod;
use super::search;
use super::server::Enrolment;
use crate::control::pods::WantedPods;
use crate::picture::Picture;

/// Between looks while pods are missing: their sandboxes may not be made yet.
const LOOK_INTERVAL: Duration = Duration::from_secs(2);

/// Looks for missing pods until `stop`.
pub(crate) async fn run(
    enrolment: Enrolment,
    picture: Arc<Picture>,
    mut wanted: watch::Receiver<Arc<WantedPods>>,
    stop: CancellationToken,
) {
    let mut tick = tokio::time::interval(LOOK_INTERVAL);
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            changed = wanted.changed() => if changed.is_err() { return },
            _ = tick.tick() => {}
            () = stop.cancelled() => return,
        }
        let list = Arc::clone(&wanted.borrow_and_update());
        let snapshot = picture.snapshot();
        let enrolment = enrolment.clone();
        let looked = tokio::task::spawn_blocking(move || {
            let missing = enrolment.missing(&list);
            let mut blocked = BTreeMap::new();
            if missing.is_empty() {
                enrolment.set_blocked(blocked);
                return;
            }
            let addresses = |name: &PodName| -> BTreeSet<IpAddr> {
                let workload = snapshot.index.workload_by_name(name.namespace(), name.name());
                workload.into_iter().flat_map(|one| one.addresses.iter().copied()).collect()
            };
            for (name, found) in found(&missing, addresses) {
                let (request, wanted) = match found {
                    Ok(found) => found,
                    Err(reason) => {
                        tracing::warn!(pod = %name, reason, "a running pod is not taken in");
                        blocked.insert(name, reason.to_owned());
                        continue;
                    }
                };
                match enrolment.enroll_found(&request, &wanted) {
                    EnrollReply::Refused(refusal) => {
                        tracing::warn!(pod = %name, reason = refusal.reason, "a running pod cannot be taken in; trying again");
                        blocked.insert(name, format!("{}; {}", refusal.reason, refusal.remedy));
                    }
                    EnrollReply::Ok | EnrollReply::Excluded { .. } | EnrollReply::Pods { .. } => {
                        tracing::info!(pod = %name, "a running pod enters the mesh");
                    }
                }
            }
            enrolment.set_blocked(blocked);
        })
        .await;
        if let Err(error) = looked {
            tracing::error!(%error, "looking for running pods ended early");
        }
    }
}

/// A process of a pod.
struct Process {
    started: u64,
    netns: (u64, u64),
    container: String,
}

/// What is needed to take a running pod in, or why it cannot be.
type Found = Result<(Enroll, WantedPod), &'static str>;

/// Those of `missing` that are running.
fn found(
    missing: &BTreeMap<PodName, WantedPod>,
    addresses: impl Fn(&PodName) -> BTreeSet<IpAddr>,
) -> Vec<(PodName, Found)> {
    let mut processes: BTreeMap<&PodName, Vec<Process>> = BTreeMap::new();
    for path in search::processes() {
        // A process may end while it is looked at.
        let Ok(cgroups) = fs::read_to_string(path.join("cgroup")) else { continue };
        let owner = missing.iter().find_map(|(name, pod)| {
            container_of(&cgroups, &pod.uid).map(|container| (name, container.to_owned()))
        });
        let Some((name, container)) = owner else { continue };
        if let (Ok(netns), Some(started)) = (fs::metadata(path.join("ns/net")), started(&path)) {
            let netns = (netns.dev(), netns.ino());
            processes.entry(name).or_default().push(Process { started, netns, container });
        }
    }
    let mounted = search::mounted();
    let request = |(name, mut processes): (&PodName, Vec<Process>)| {
        let wanted = missing.get(name)?.clone();
        // A namespace that a process of the pod made for itself is nowhere in the node's folders; it must not keep the pod out.
        processes.retain(|process| mounted.contains_key(&process.netns));
        // The sandbox's own process is the first.
        let first = processes.iter().min_by_key(|process| process.started)?;
        let path = mounted.get(&first.netns)?;
        let ips = addresses(name);
        if processes.iter().any(|process| process.netns != first.netns) {
            let reason = "its processes are in several of the node's network namespaces";
            return Some((name.clone(), Err(reason)));
        }
        if ips.is_empty() {
            tracing::debug!(pod = %name, "a running pod has no known address yet");
            return None;
        }
        let pod = PodRef::new(&wanted.uid, name.namespace(), name.name(), &wanted.service_account)
            .ok()?;
        let request = Enroll {
            pod,
            netns: NetnsPath::new(path.to_str()?).ok()?,
            ips,
            container_id: ContainerId::new(&first.container).ok()?,
            nameservers: BTreeSet::new(),
            live: true,
            patience_ms: None,
        };
        Some((name.clone(), Ok((request, wanted))))
    };
    processes.into_iter().filter_map(request).collect()
}

/// The container of a process, when its control groups are those of the pod `uid`.
///
/// Groups are named `…/pod<uid>/<container>`, by systemd's driver `…-pod<uid with _>.slice/<runtime>-<container>.scope`.
/// Only the first such name counts: those below it are of the pod's own making, and may name another one.
fn container_of<'a>(cgroups: &'a str, uid: &str) -> Option<&'a str> {
    if uid.is_empty() {
        return None;
    }
    let slice = uid.replace('-', "_");
    cgroups.lines().find_map(|line| {
        let mut parts = line.splitn(3, ':').nth(2)?.split('/');
        let named = parts.find_map(pod_uid)?;
        let container = parts.next().filter(|_| named == uid || named == slice)?;
        let container = container.strip_suffix(".scope").unwrap_or(container);
        Some(container.rsplit_once('-').map_or(container, |(_, id)| id))
    })
}

/// The uid in the name of a pod's group, as it is written there; none of any other group.
fn pod_uid(group: &str) -> Option<&str> {
    let uid = match group.strip_suffix(".slice") {
        Some(slice) => slice.rsplit_once("-pod").map(|(_, uid)| uid),
        None => group.strip_prefix("pod"),
    }?;
    let is_uid = |byte: u8| byte.is_ascii_hexdigit() || byte == b'-' || byte == b'_';
    ((32..=36).contains(&uid.len()) && uid.bytes().all(is_uid)).then_some(uid)
}

/// When a process began, in clock ticks. Source: proc(5), field 22 of `stat`; the name before may hold anything.
fn started(process: &Path) -> Option<u64> {
    let stat = fs::read_to_string(process.join("stat")).ok()?;
    let (_, rest) = stat.rsplit_once(')')?;
    rest.split_ascii_whitespace().nth(19)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_container_is_read_from_both_drivers_names() {
        let uid = "0b1cf5a2-6f2c-4c0e-9d0a-0e8c2b0d6f11";
        let check = |cgroups: &str, expected: Option<&str>| {
            assert_eq!(container_of(cgroups, uid), expected, "{cgroups}");
        };
        check(&format!("0::/kubepods/burstable/pod{uid}/c0ffee\n"), Some("c0ffee"));
        check(&format!("1:cpu:/x\n0::/../../besteffort/pod{uid}/c0ffee"), Some("c0ffee"));
        let slice = uid.replace('-', "_");
        let scope = format!(
            "0::/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod{slice}.slice/cri-containerd-c0ffee.scope"
        );
        check(&scope, Some("c0ffee"));
        check(&format!("0::/kubepods/pod{uid}"), None);
        check(&format!("0::/kubepods/notpod{uid}/c0ffee"), None);
        check("0::/system.slice/x.service", None);
        check(&format!("0::/podman-1/kubepods/pod{uid}/c0ffee"), Some("c0ffee"));
        assert_eq!(container_of("0::/kubepods/pod/c0ffee", ""), None);
    }

    #[test]
    fn a_pod_cannot_name_its_groups_after_another() {
        let (own, other) =
            ("0b1cf5a2-6f2c-4c0e-9d0a-0e8c2b0d6f11", "7d6a1e6e-3f63-4f6e-8ad0-5f1b3c0a9e77");
        let slice = |uid: &str| format!("kubepods-pod{}.slice", uid.replace('-', "_"));
        for below in [format!("pod{other}/x"), format!("{}/x", slice(other))] {
            for above in [format!("pod{own}"), format!("kubepods.slice/{}", slice(own))] {
                let cgroups = format!("0::/kubepods/{above}/c0ffee/{below}");
                assert_eq!(container_of(&cgroups, other), None, "{cgroups}");
                assert_eq!(container_of(&cgroups, own), Some("c0ffee"), "{cgroups}");
            }
        }
    }

    #[test]
    fn this_process_has_a_beginning() {
        assert!(started(Path::new("/proc/self")).unwrap() > 0);
    }
}
