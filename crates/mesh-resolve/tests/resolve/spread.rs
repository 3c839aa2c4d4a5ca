//! All endpoints of a service at once.

use std::collections::BTreeSet;

use mesh_model::{Direction, HealthStatus, LoadBalancingMode, NetworkId, Scope, Service, Workload};
use mesh_resolve::{NotSpread, ResolveSettings, WorkloadIndex, resolve, resolve_spread};

use crate::support::{flow, gateway, hbone, index, local, of, pod, service, show};

const VIP: &str = "10.9.0.1:80";

/// Three endpoints of one service, of which one is farther away.
fn mesh(change: impl FnOnce(&mut [Workload], &mut Service)) -> WorkloadIndex {
    let mut pods = ["a", "b", "c"].map(|name| {
        let address = format!("10.0.0.1{}", name.as_bytes()[0] - b'a');
        hbone(of(pod(name, &address), "cart", &[]))
    });
    pods[2].node = "node-b".into();
    let mut cart = service("cart", "10.9.0.1", &[(80, 8080)]);
    change(&mut pods, &mut cart);
    let pods = pods.into_iter().chain([hbone(pod("client", "10.0.0.1"))]);
    index(pods.collect(), vec![cart])
}

fn spread(index: &WorkloadIndex, destination: &str) -> Result<BTreeSet<String>, NotSpread> {
    let flow = flow(Direction::Outbound, destination);
    let client = local(index, "client");
    let settings = ResolveSettings::default();
    let spread = resolve_spread(index, &settings, &flow, &client)?;
    let listed: BTreeSet<String> =
        spread.endpoints.iter().map(|one| show(&Ok(one.clone()))).collect();
    assert_eq!(listed.len(), spread.endpoints.len(), "one is listed twice");
    // What is drawn for single connections is all of that and nothing else.
    let mut drawn = BTreeSet::new();
    for entropy in 0..500 {
        let one = resolve(index, &settings, &flow, &client, entropy);
        assert!(spread.endpoints.contains(one.as_ref().unwrap()), "{one:?}");
        drawn.insert(show(&one));
    }
    assert_eq!(drawn, listed);
    Ok(listed)
}

#[test]
fn all_that_may_be_drawn_is_listed() {
    let check = |name: &str, expected: &[&str], change: fn(&mut [Workload], &mut Service)| {
        let to = |ip: &&str| format!("tunnel {ip}:15008 {ip}:8080");
        let expected: BTreeSet<String> = expected.iter().map(to).collect();
        assert_eq!(spread(&mesh(change), VIP), Ok(expected), "{name}");
    };
    check("all", &["10.0.0.10", "10.0.0.11", "10.0.0.12"], |_, _| {});
    check("the ready ones", &["10.0.0.11", "10.0.0.12"], |pods, _| {
        pods[0].status = HealthStatus::Unhealthy;
    });
    check("the near ones", &["10.0.0.10", "10.0.0.11"], |_, cart| {
        cart.load_balancing.mode = LoadBalancingMode::Failover;
        cart.load_balancing.routing_preference = vec![Scope::Node];
    });
    check("the far one, where there is no near one", &["10.0.0.12"], |pods, cart| {
        cart.load_balancing.mode = LoadBalancingMode::Failover;
        cart.load_balancing.routing_preference = vec![Scope::Node];
        for pod in &mut pods[..2] {
            pod.status = HealthStatus::Unhealthy;
        }
    });
    check("heavy ones alike", &["10.0.0.10", "10.0.0.11", "10.0.0.12"], |pods, _| {
        pods.iter_mut().for_each(|pod| pod.capacity = 7);
    });
    check("none without capacity", &["10.0.0.10", "10.0.0.12"], |pods, _| pods[1].capacity = 0);
}

#[test]
fn what_has_to_be_drawn_each_time_is_not_listed() {
    let check = |expected: NotSpread, change: fn(&mut [Workload], &mut Service)| {
        assert_eq!(spread(&mesh(change), VIP), Err(expected));
    };
    check(NotSpread::NoEqualEndpoints, |pods, _| pods[0].capacity = 2);
    check(NotSpread::NoEqualEndpoints, |pods, _| {
        pods.iter_mut().for_each(|pod| pod.status = HealthStatus::Unhealthy);
    });
    check(NotSpread::Waypoint, |_, cart| cart.waypoint = Some(gateway("w")));
    check(NotSpread::KeepsDestination, |_, cart| {
        cart.load_balancing.mode = LoadBalancingMode::Passthrough;
    });
    check(NotSpread::OtherNetwork, |pods, _| {
        pods[1].network = NetworkId::new("west");
        pods[1].network_gateway = Some(gateway("ew"));
    });
    check(NotSpread::NoService, |_, cart| cart.vips.clear());
    let index = mesh(|_, _| {});
    for destination in ["10.0.0.10:8080", "10.0.0.1:80", "127.0.0.1:80", "0.0.0.0:80"] {
        assert_eq!(spread(&index, destination), Err(NotSpread::NoService), "{destination}");
    }
    assert_eq!(spread(&index, "10.9.0.1:81"), Err(NotSpread::NoEqualEndpoints));
    let unnamed = mesh(|pods, _| {
        pods[0].addresses.clear();
        pods[0].hostname = "example.com".into();
    });
    assert!(matches!(spread(&unnamed, VIP), Err(NotSpread::Unroutable(_))));
}
