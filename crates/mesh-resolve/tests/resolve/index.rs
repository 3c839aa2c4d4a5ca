//! The index: any order of changes leads to the same picture, and nothing stays behind.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use mesh_model::{
    NamespacedHostname, NetworkId, NetworkMode, Service, TunnelProtocol, Workload, WorkloadUid,
    splitmix,
};
use mesh_resolve::{IndexDelta, ResolveSettings, WorkloadIndex};

use crate::support::{dial_as, hbone, index, key, of, pod, service};

struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        splitmix::next(&mut self.0) % bound
    }
}

fn some_workload(random: &mut Random) -> Workload {
    let number = random.below(12);
    // Addresses are the pod's own, so that no rule about overlaps depends on history.
    let mut workload = pod(&format!("p{number}"), &format!("10.0.{}.{number}", random.below(2)));
    for name in ["s0", "s1", "s2"] {
        if random.below(2) == 0 {
            workload = of(workload, name, &[(80, 8080)]);
        }
    }
    workload.node = ["", "node-a", "node-b"][usize::try_from(random.below(3)).unwrap()].into();
    workload.hostname = ["", "h.example"][usize::try_from(random.below(2)).unwrap()].into();
    if random.below(4) == 0 {
        workload.network_mode = NetworkMode::HostNetwork;
    }
    workload
}

fn some_service(random: &mut Random) -> Service {
    let number = random.below(3);
    let vip = format!("10.9.0.{}", random.below(4));
    let mut service = service(&format!("s{number}"), &vip, &[(80, 8080)]);
    let prefix = format!("10.{}.0.0/{}", random.below(3), 14 + random.below(4));
    service.cidr_vips = vec![(NetworkId::default(), prefix.parse().unwrap())];
    service
}

/// All that can be looked up.
fn picture(index: &WorkloadIndex) -> Vec<String> {
    let network = NetworkId::default();
    let mut picture: Vec<String> = Vec::new();
    let uid = |workload: &Arc<Workload>| workload.uid.to_string();
    picture.extend(index.workloads().map(|workload| format!("{workload:?}")));
    picture.extend(index.services().map(|service| format!("{service:?}")));
    for node in ["node-a", "node-b"] {
        picture.extend(index.workloads_on_node(&node.into()).map(uid));
    }
    for third in 0..2 {
        for last in 0..12 {
            let ip: IpAddr = format!("10.0.{third}.{last}").parse().unwrap();
            picture.extend(index.workload_by_ip(&network, ip).map(uid));
            picture.extend(
                index.services_by_cidr(&network, ip).map(|(len, s)| format!("{len} {}", s.key)),
            );
            let vip: IpAddr = format!("10.9.0.{last}").parse().unwrap();
            picture.extend(index.services_by_vip(&network, vip).map(|s| s.key.to_string()));
            picture.extend(index.workload_by_name("shop", &format!("p{last}")).map(uid));
        }
    }
    for name in ["s0", "s1", "s2"] {
        picture.extend(index.endpoints(&key(name)).map(uid));
        picture.extend(index.services_by_hostname(&key(name).hostname).map(|s| s.key.to_string()));
    }
    picture
}

#[test]
fn incremental_index_equals_one_built_from_scratch() {
    for seed in 0..60 {
        let mut random = Random(seed);
        let mut index = WorkloadIndex::default();
        let mut workloads: BTreeMap<WorkloadUid, Workload> = BTreeMap::new();
        let mut services: BTreeMap<NamespacedHostname, Service> = BTreeMap::new();
        let mut revision = index.revision();
        for step in 0..40 {
            let mut delta = IndexDelta::default();
            for _ in 0..random.below(3) {
                delta.workloads.push(some_workload(&mut random));
                delta.services.push(some_service(&mut random));
            }
            delta.removed_workloads.push(some_workload(&mut random).uid);
            delta.removed_services.push(some_service(&mut random).key);
            for uid in &delta.removed_workloads {
                workloads.remove(uid);
            }
            for key in &delta.removed_services {
                services.remove(key);
            }
            workloads.extend(delta.workloads.iter().map(|one| (one.uid.clone(), one.clone())));
            services.extend(delta.services.iter().map(|one| (one.key.clone(), one.clone())));
            let before = index.clone();
            let old = picture(&before);
            let next = index.apply(delta);
            assert!(next >= revision);
            revision = next;
            assert_eq!(picture(&before), old, "a snapshot changed: seed {seed} step {step}");
            let scratch = self::index(
                workloads.values().cloned().collect(),
                services.values().cloned().collect(),
            );
            // The host name is shared by several pods, and then the newest has it: not compared.
            assert_eq!(picture(&index), picture(&scratch), "seed {seed} step {step}");
        }
        index.apply(IndexDelta {
            removed_workloads: workloads.into_keys().collect(),
            removed_services: services.into_keys().collect(),
            ..IndexDelta::default()
        });
        let empty = format!("{:?}", WorkloadIndex::default());
        let stamp = |index: &WorkloadIndex| format!("Revision({})", index.revision().0);
        let left = format!("{index:?}").replace(&stamp(&index), "Revision(0)");
        assert_eq!(left, empty, "something stayed behind: seed {seed}");
    }
}

#[test]
fn unchanged_objects_leave_the_stamp() {
    let mut index = index(vec![pod("a", "10.0.0.1")], vec![service("s", "10.9.0.1", &[])]);
    let before = index.revision();
    let same = IndexDelta {
        workloads: vec![pod("a", "10.0.0.1")],
        services: vec![service("s", "10.9.0.1", &[])],
        removed_workloads: vec![WorkloadUid::new("absent")],
        ..IndexDelta::default()
    };
    assert_eq!(index.apply(same), before);
    let changed = IndexDelta { workloads: vec![pod("a", "10.0.0.2")], ..IndexDelta::default() };
    assert_eq!(index.apply(changed), before.next());
}

#[test]
fn overlapping_addresses_prefer_pods_then_tunnels_then_the_newest() {
    let network = NetworkId::default();
    let ip: IpAddr = "10.0.0.1".parse().unwrap();
    let entry = |uid: &str, protocol| {
        let mut workload = Workload::named(uid, "shop", "x");
        workload.addresses = vec![ip];
        workload.tunnel_protocol = protocol;
        workload
    };
    let mut index = WorkloadIndex::default();
    let mut add = |workload: Workload| {
        index.apply(IndexDelta { workloads: vec![workload], ..IndexDelta::default() });
        index.workload_by_ip(&network, ip).unwrap().uid.to_string()
    };
    let (plain, tunnel) = (TunnelProtocol::None, TunnelProtocol::Hbone);
    assert_eq!(
        add(entry("K/networking.istio.io/WorkloadEntry/shop/e", plain)).rsplit('/').next(),
        Some("e")
    );
    assert_eq!(
        add(entry("K/discovery.k8s.io/EndpointSlice/shop/t", tunnel)).rsplit('/').next(),
        Some("t")
    );
    assert_eq!(add(entry("K//Pod/shop/a", plain)).rsplit('/').next(), Some("a"));
    assert_eq!(add(entry("K//Pod/shop/b", tunnel)).rsplit('/').next(), Some("b"));
    // Also when it sorts first, and an update of the elder one does not win the address back.
    assert_eq!(add(entry("K//Pod/shop/0", tunnel)).rsplit('/').next(), Some("0"));
    let mut elder = entry("K//Pod/shop/b", tunnel);
    elder.canonical_name = "changed".into();
    assert_eq!(add(elder).rsplit('/').next(), Some("0"));
}

#[test]
fn endpoints_are_known_whichever_of_workload_and_service_comes_first() {
    let mut index = index(vec![pod("client", "10.0.0.9")], vec![]);
    let backend = || hbone(of(pod("b", "10.0.0.2"), "s", &[]));
    index.apply(IndexDelta { workloads: vec![backend()], ..IndexDelta::default() });
    index.apply(IndexDelta {
        services: vec![service("s", "10.9.0.1", &[(80, 80)])],
        ..IndexDelta::default()
    });
    let settings = ResolveSettings::default();
    assert!(dial_as(&index, &settings, "10.9.0.1:80", 0).is_ok());
    let removed = IndexDelta { removed_services: vec![key("s")], ..IndexDelta::default() };
    index.apply(removed);
    assert_eq!(index.endpoints(&key("s")).count(), 1);
    index.apply(IndexDelta { removed_workloads: vec![backend().uid], ..IndexDelta::default() });
    assert_eq!(index.endpoints(&key("s")).count(), 0);
}

/// 2,000 pods come and go over 100 addresses; the successor may be announced before its predecessor is gone.
#[test]
fn reused_addresses_never_lead_to_the_wrong_identity() {
    let mut index =
        index(vec![pod("client", "10.0.0.1")], vec![service("s", "10.9.0.1", &[(80, 80)])]);
    let mut holders: BTreeMap<u64, WorkloadUid> = BTreeMap::new();
    let mut random = Random(5);
    let settings = ResolveSettings::default();
    for number in 0..2000 {
        let last = 2 + random.below(100);
        let ip = format!("10.1.0.{last}");
        let next = hbone(of(pod(&format!("pod-{number}"), &ip), "s", &[]));
        let (uid, identity) = (next.uid.clone(), next.identity().unwrap());
        let old = holders.insert(last, uid.clone());
        let removed: Vec<_> = old.into_iter().collect();
        let add = IndexDelta { workloads: vec![next], ..IndexDelta::default() };
        let remove = IndexDelta { removed_workloads: removed.clone(), ..IndexDelta::default() };
        match random.below(3) {
            0 => {
                index.apply(add);
                assert_reached(&index, &ip, &uid, identity.as_str());
                index.apply(remove);
            }
            1 => {
                index.apply(remove);
                index.apply(add);
            }
            _ => {
                index.apply(IndexDelta { removed_workloads: removed, ..add });
            }
        }
        assert_reached(&index, &ip, &uid, identity.as_str());
        let resolved = dial_as(&index, &settings, "10.9.0.1:80", number).unwrap();
        let tunnel = resolved.route.tunnel().unwrap();
        let peer = resolved.peer.as_ref().unwrap();
        assert!(holders.values().any(|uid| *uid == tunnel.target_uid));
        assert_eq!(tunnel.next_hop.ip(), peer.addresses[0]);
        assert_eq!(tunnel.expected, [peer.identity().unwrap()]);
    }
    assert_eq!(index.workloads().len(), holders.len() + 1);
}

fn assert_reached(index: &WorkloadIndex, ip: &str, uid: &WorkloadUid, identity: &str) {
    let resolved = dial_as(index, &ResolveSettings::default(), &format!("{ip}:80"), 0).unwrap();
    let tunnel = resolved.route.tunnel().unwrap();
    assert_eq!(tunnel.target_uid, *uid);
    assert_eq!(tunnel.expected.len(), 1);
    assert_eq!(tunnel.expected[0].as_str(), identity);
}
