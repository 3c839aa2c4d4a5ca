//! Where dialled connections go.

use std::collections::BTreeMap;

use mesh_model::{
    CloseReason, HealthPolicy, HealthStatus, IpFamilies, LoadBalancingMode, NetworkId, NetworkMode,
    Scope, Service, Visibility, WeightedWaypoint, Workload,
};
use mesh_resolve::{
    ResolveSettings, Route, Step, Trace, Unroutable, WaypointEnforcement, WorkloadIndex,
    resolve_traced,
};

use crate::support::{
    dial, dial_as, flow, gateway, hbone, index, key, local, of, pod, service, show,
};

/// A client, a plain and a tunnelled pod, and services of all kinds.
fn mesh() -> WorkloadIndex {
    let mut host = hbone(of(pod("host", "192.168.0.1"), "hosted", &[]));
    host.network_mode = NetworkMode::HostNetwork;
    let mut external = of(pod("external", ""), "dns", &[]);
    external.hostname = "example.com".into();
    let mut none = service("none", "10.9.0.7", &[(80, 80)]);
    none.load_balancing.mode = LoadBalancingMode::Passthrough;
    none.cidr_vips = vec![(NetworkId::default(), "10.8.0.0/16".parse().unwrap())];
    let mut remote = hbone(of(pod("remote", "10.0.0.2"), "far", &[]));
    remote.network = NetworkId::new("west");
    remote.network_gateway = Some(gateway("ew"));
    let mut v4 = service("v4", "fd00:9::8", &[(80, 8080)]);
    v4.ip_families = IpFamilies::Ipv4Only;
    index(
        vec![
            hbone(pod("client", "10.0.0.1,fd00::1")),
            hbone(of(of(pod("cart", "10.0.0.2,fd00::2"), "cart", &[(81, 9090)]), "v4", &[])),
            of(pod("plain", "10.0.0.3"), "legacy", &[]),
            host,
            external,
            remote,
            hbone(of(pod("self", "10.0.0.1"), "unused", &[])),
        ],
        vec![
            service("cart", "10.9.0.1,fd00:9::1", &[(80, 8080), (81, 0), (82, 0), (83, 15008)]),
            service("legacy", "10.9.0.2", &[(80, 8080)]),
            service("empty", "10.9.0.3", &[(80, 8080)]),
            service("hosted", "10.9.0.4", &[(80, 8080)]),
            service("dns", "10.9.0.5", &[(80, 8080)]),
            service("far", "10.9.0.6", &[(80, 8080)]),
            none,
            v4,
        ],
    )
}

#[test]
fn destinations_go_where_they_should() {
    let index = mesh();
    for (destination, expected) in [
        ("10.0.0.2:8080", "tunnel 10.0.0.2:15008 10.0.0.2:8080"),
        ("[fd00::2]:8080", "tunnel [fd00::2]:15008 [fd00::2]:8080"),
        ("[::ffff:10.0.0.2]:8080", "tunnel 10.0.0.2:15008 10.0.0.2:8080"),
        ("10.0.0.3:8080", "known 10.0.0.3:8080"),
        ("1.1.1.1:443", "unknown 1.1.1.1:443"),
        ("192.168.0.1:22", "unknown 192.168.0.1:22"),
        // Services: target ports, named ports, families.
        ("10.9.0.1:80", "tunnel 10.0.0.2:15008 10.0.0.2:8080"),
        ("10.9.0.1:81", "tunnel 10.0.0.2:15008 10.0.0.2:9090"),
        ("[fd00:9::1]:80", "tunnel [fd00::2]:15008 [fd00::2]:8080"),
        ("[fd00:9::8]:80", "tunnel 10.0.0.2:15008 10.0.0.2:8080"),
        ("10.9.0.2:80", "known 10.0.0.3:8080"),
        ("10.9.0.4:80", "known 192.168.0.1:8080"),
        // Refusals.
        ("10.9.0.1:82", "no_healthy_upstream"),
        ("10.9.0.1:99", "no_such_port"),
        ("10.9.0.3:80", "no_healthy_upstream"),
        ("10.9.0.5:80", "connect_failed"),
        ("10.9.0.6:80", "gateway_unavailable"),
        ("[fe80::1]:80", "connect_failed"),
        ("[febf::1]:80", "connect_failed"),
        ("[fec0::1]:80", "unknown [fec0::1]:80"),
        ("169.254.169.254:80", "unknown 169.254.169.254:80"),
        // Agent ports, of itself and of others.
        ("10.9.0.1:83", "loop_refused"),
        ("10.0.0.2:15008", "loop_refused"),
        ("10.0.0.2:15006", "loop_refused"),
        ("10.0.0.1:15001", "loop_refused"),
        ("127.0.0.1:15008", "loop_refused"),
        ("127.0.0.1:80", "known 127.0.0.1:80"),
        ("0.0.0.0:80", "known 0.0.0.0:80"),
        ("1.1.1.1:15008", "unknown 1.1.1.1:15008"),
        // Resolution NONE keeps the destination, and does not hide pods.
        ("10.9.0.7:80", "known 10.9.0.7:80"),
        ("10.8.1.1:80", "known 10.8.1.1:80"),
        ("10.8.1.1:81", "unknown 10.8.1.1:81"),
    ] {
        assert_eq!(dial(&index, destination), expected, "{destination}");
    }
}

#[test]
fn host_names_are_resolved_by_the_shell_and_gone_on_from() {
    let index = mesh();
    let outcome = dial_as(&index, &ResolveSettings::default(), "10.9.0.5:80", 3);
    let Err(Unroutable::NeedsDns(pending)) = outcome else { panic!("{outcome:?}") };
    assert_eq!(&**pending.hostname(), "example.com");
    let answers = ["2001:db8::1".parse().unwrap(), "203.0.113.1".parse().unwrap()];
    assert_eq!(show(&pending.clone().complete(&answers)), "known 203.0.113.1:8080");
    assert_eq!(show(&pending.clone().complete(&answers[..1])), "known [2001:db8::1]:8080");
    assert_eq!(show(&pending.complete(&[])), "connect_failed");
}

#[test]
fn expected_identities_are_the_endpoints_and_the_services() {
    let mut cart = service("cart", "10.9.0.1", &[(80, 8080)]);
    cart.subject_alt_names = vec!["spiffe://td/ns/x/sa/y".into(), "https://no".into()];
    let index = index(
        vec![pod("client", "10.0.0.1"), hbone(of(pod("cart", "10.0.0.2"), "cart", &[]))],
        vec![cart],
    );
    let resolved = dial_as(&index, &ResolveSettings::default(), "10.9.0.1:80", 0).unwrap();
    let tunnel = resolved.route.tunnel().unwrap();
    let expected: Vec<_> = tunnel.expected.iter().map(|id| id.as_str()).collect();
    assert_eq!(expected, ["spiffe://cluster.local/ns/shop/sa/cart", "spiffe://td/ns/x/sa/y"]);
    assert_eq!(tunnel.target_uid.as_str(), "K//Pod/shop/cart");
}

fn with_waypoint(change: impl FnOnce(&mut Vec<Workload>, &mut Vec<Service>)) -> WorkloadIndex {
    let mut cart = service("cart", "10.9.0.1", &[(80, 8080)]);
    cart.waypoint = Some(gateway("wp"));
    let mut lone = hbone(of(pod("lone", "10.0.0.4"), "direct", &[]));
    lone.waypoint = Some(gateway("wp"));
    let mut workloads = vec![
        hbone(pod("client", "10.0.0.1")),
        hbone(of(pod("cart", "10.0.0.2"), "cart", &[])),
        hbone(of(pod("wp", "10.0.0.5"), "wp", &[])),
        lone,
    ];
    let mut services = vec![
        cart,
        service("wp", "10.9.0.9", &[(15008, 15008)]),
        service("direct", "10.9.0.2", &[(80, 8080)]),
    ];
    change(&mut workloads, &mut services);
    index(workloads, services)
}

#[test]
fn waypoints_are_used_required_and_never_of_themselves() {
    let ready = with_waypoint(|_, _| {});
    assert_eq!(dial(&ready, "10.9.0.1:80"), "waypoint 10.0.0.5:15008 10.9.0.1:80");
    assert_eq!(dial(&ready, "10.0.0.4:70"), "waypoint 10.0.0.5:15008 10.0.0.4:70");
    // A service's waypoint is not the pod's, and a workload's not the service's.
    assert_eq!(dial(&ready, "10.0.0.2:80"), "tunnel 10.0.0.2:15008 10.0.0.2:80");
    assert_eq!(dial(&ready, "10.9.0.2:80"), "tunnel 10.0.0.4:15008 10.0.0.4:8080");

    let unready = with_waypoint(|workloads, _| workloads[2].status = HealthStatus::Unhealthy);
    let gone = with_waypoint(|_, services| services.retain(|service| service.key != key("wp")));
    let preferred =
        ResolveSettings { waypoints: WaypointEnforcement::Preferred, ..ResolveSettings::default() };
    for index in [unready, gone] {
        assert_eq!(dial(&index, "10.9.0.1:80"), "waypoint_unavailable");
        assert_eq!(dial(&index, "10.0.0.4:80"), "waypoint_unavailable");
        let outcome = dial_as(&index, &preferred, "10.9.0.1:80", 0);
        assert_eq!(show(&outcome), "tunnel 10.0.0.2:15008 10.0.0.2:8080");
    }

    let client_is_waypoint = with_waypoint(|workloads, _| {
        workloads[0] = of(workloads[0].clone(), "wp", &[]);
    });
    let direct = "tunnel 10.0.0.2:15008 10.0.0.2:8080";
    assert_eq!(dial(&client_is_waypoint, "10.9.0.1:80"), direct);
}

#[test]
fn weighted_waypoints_share_and_replace_each_other() {
    let weighted = |name: &str, weight| WeightedWaypoint { destination: gateway(name), weight };
    let share = |canary: bool, weights: [u32; 2]| {
        let index = with_waypoint(|workloads, services| {
            services[0].weighted_waypoints =
                vec![weighted("wp", weights[0]), weighted("wp2", weights[1])];
            if canary {
                workloads.push(hbone(of(pod("wp2", "10.0.0.6"), "wp2", &[])));
            }
            services.push(service("wp2", "10.9.0.10", &[(15008, 15008)]));
        });
        let settings = ResolveSettings::default();
        let dialled = (0..1000).map(|entropy| dial_as(&index, &settings, "10.9.0.1:80", entropy));
        dialled.filter(|outcome| show(outcome).starts_with("waypoint 10.0.0.6:15008")).count()
    };
    assert_eq!(share(true, [1, 0]), 0);
    assert_eq!(share(true, [0, 1]), 1000);
    assert_eq!(share(true, [0, 0]), 0);
    assert!((400..600).contains(&share(true, [50, 50])));
    assert_eq!(share(false, [50, 50]), 0);
}

fn shares(index: &WorkloadIndex, destination: &str) -> BTreeMap<String, u32> {
    let mut shares = BTreeMap::new();
    for entropy in 0..2000 {
        let outcome = dial_as(index, &ResolveSettings::default(), destination, entropy);
        let name = match &outcome {
            Ok(resolved) => resolved.peer.as_ref().unwrap().name.to_string(),
            Err(unroutable) => unroutable.close_reason().to_string(),
        };
        *shares.entry(name).or_default() += 1;
    }
    shares
}

#[test]
fn load_is_spread_by_capacity_over_ready_endpoints() {
    let mut workloads = vec![pod("client", "10.0.0.1")];
    for (name, ip, capacity, status) in [
        ("a", "10.0.0.2", 1, HealthStatus::Healthy),
        ("b", "10.0.0.3", 3, HealthStatus::Healthy),
        ("c", "10.0.0.4", 0, HealthStatus::Healthy),
        ("d", "10.0.0.5", 4, HealthStatus::Unhealthy),
    ] {
        let base = hbone(of(of(pod(name, ip), "s", &[]), "all", &[]));
        workloads.push(Workload { capacity, status, ..base });
    }
    let mut all = service("all", "10.9.0.2", &[(80, 80)]);
    all.load_balancing.health_policy = HealthPolicy::AllowAll;
    let index = index(workloads, vec![service("s", "10.9.0.1", &[(80, 80)]), all]);
    let healthy = shares(&index, "10.9.0.1:80");
    assert!((400..600).contains(&healthy["a"]) && healthy["a"] + healthy["b"] == 2000);
    // The service that publishes endpoints that are not ready does not leak them to the other one.
    let every = shares(&index, "10.9.0.2:80");
    assert!((900..1100).contains(&every["d"]) && !every.contains_key("c"), "{every:?}");
}

#[test]
fn locality_restricts_or_prefers() {
    let place = |name: &str, ip: &str, region: &str, zone: &str, node: &str| {
        let mut workload = hbone(of(pod(name, ip), "s", &[]));
        workload.locality.region = region.into();
        workload.locality.zone = zone.into();
        workload.node = node.into();
        workload
    };
    let with = |mode, scopes: &[Scope], workloads: &[Workload]| {
        let mut client = place("client", "10.0.0.1", "r1", "z1", "node-a");
        client.services.clear();
        let mut service = service("s", "10.9.0.1", &[(80, 80)]);
        service.load_balancing.mode = mode;
        service.load_balancing.routing_preference = scopes.to_vec();
        let workloads = std::iter::once(client).chain(workloads.iter().cloned()).collect();
        let shares = shares(&index(workloads, vec![service]), "10.9.0.1:80");
        shares.into_keys().collect::<Vec<_>>().join(" ")
    };
    let near = place("near", "10.0.0.2", "r1", "z1", "node-a");
    let zone = place("zone", "10.0.0.3", "r1", "z1", "node-b");
    let region = place("region", "10.0.0.4", "r1", "z2", "node-c");
    let far = place("far", "10.0.0.5", "r2", "z1", "node-d");
    let all = [near.clone(), zone.clone(), region.clone(), far.clone()];
    let scopes = [Scope::Network, Scope::Region, Scope::Zone, Scope::Subzone, Scope::Node];
    use LoadBalancingMode::{Failover, Standard, Strict};
    assert_eq!(with(Standard, &scopes, &all), "far near region zone");
    assert_eq!(with(Failover, &scopes, &all), "near");
    assert_eq!(with(Failover, &scopes, &all[1..]), "zone");
    assert_eq!(with(Failover, &scopes, &all[2..]), "region");
    assert_eq!(with(Failover, &scopes, &all[3..]), "far");
    assert_eq!(with(Strict, &[Scope::Node], &all), "near");
    assert_eq!(with(Strict, &[Scope::Node], &all[1..]), "no_healthy_upstream");
    assert_eq!(with(Strict, &[Scope::Region, Scope::Zone], &all), "near zone");
}

#[test]
fn visibility_and_namespace_choose_between_services_at_one_address() {
    let of_namespace = |namespace: &str, target, visibility, canonical| {
        let mut service = service("s", "10.9.0.1", &[(80, target)]);
        service.key.namespace = namespace.into();
        Service { visibility, canonical, ..service }
    };
    let chosen = |services: Vec<Service>| {
        let mut backend = hbone(pod("b", "10.0.0.2"));
        for service in &services {
            backend.services.insert(service.key.clone(), Vec::new());
        }
        dial(&index(vec![pod("client", "10.0.0.1"), backend], services), "10.9.0.1:80")
    };
    let public = Visibility::Public;
    let hidden = of_namespace("bank", 1, Visibility::Namespace, true);
    let first = of_namespace("aaa", 2, public, false);
    let canonical = of_namespace("zzz", 3, public, true);
    let own = of_namespace("shop", 4, Visibility::Namespace, false);
    let to = |port| format!("tunnel 10.0.0.2:15008 10.0.0.2:{port}");
    assert_eq!(chosen(vec![hidden.clone()]), "unknown 10.9.0.1:80");
    assert_eq!(chosen(vec![hidden.clone(), first.clone()]), to(2));
    assert_eq!(chosen(vec![hidden.clone(), first.clone(), canonical.clone()]), to(3));
    assert_eq!(chosen(vec![hidden, first, canonical, own]), to(4));
}

/// A ServiceEntry may name any address. In whose namespace the workload is, may say where its address leads.
#[test]
fn no_service_of_another_namespace_takes_a_workloads_address() {
    let at = |namespace: &str| {
        let mut service = service("s", "10.0.0.2", &[(80, 1)]);
        service.key.namespace = namespace.into();
        let mut elsewhere = hbone(pod("c", "10.0.0.3"));
        elsewhere.services.insert(service.key.clone(), Vec::new());
        let workloads = vec![pod("client", "10.0.0.1"), hbone(pod("b", "10.0.0.2")), elsewhere];
        dial(&index(workloads, vec![service]), "10.0.0.2:80")
    };
    assert_eq!(at("bank"), "tunnel 10.0.0.2:15008 10.0.0.2:80");
    assert_eq!(at("shop"), "tunnel 10.0.0.3:15008 10.0.0.3:1");
}

#[test]
fn every_step_is_recorded_only_when_asked_for() {
    let index = mesh();
    let source = local(&index, "client");
    let flow = flow(mesh_model::Direction::Outbound, "10.9.0.3:80");
    let settings = ResolveSettings::default();
    let mut trace = Trace::on();
    let outcome = resolve_traced(&index, &settings, &flow, &source, 0, &mut trace);
    assert_eq!(outcome.unwrap_err().close_reason(), CloseReason::NoHealthyUpstream);
    let steps = trace.into_steps();
    assert!(matches!(
        &steps[..],
        [Step::Dialled { .. }, Step::IsService { .. }, Step::Refused { .. }]
    ));
    let json = serde_json::to_string(&steps).unwrap();
    assert_eq!(serde_json::from_str::<Vec<Step>>(&json).unwrap(), steps);
    let mut off = Trace::off();
    let silent = resolve_traced(&index, &settings, &flow, &source, 0, &mut off);
    assert!(silent.is_err() && off.steps().is_empty());
}

#[test]
fn native_gateways_dial_tunnel_ports_themselves() {
    let mut client = hbone(pod("client", "10.0.0.1"));
    client.native_tunnel = true;
    let index = index(vec![client, hbone(pod("cart", "10.0.0.2"))], vec![]);
    assert_eq!(dial(&index, "10.0.0.2:15008"), "known 10.0.0.2:15008");
    assert_eq!(dial(&index, "10.0.0.2:15006"), "loop_refused");
    let resolved = dial_as(&index, &ResolveSettings::default(), "10.0.0.2:80", 0).unwrap();
    assert!(matches!(resolved.route, Route::Tunnel(_)));
}

/// A client on one network, a service with an endpoint on another, and the gateway between them.
fn two_networks() -> WorkloadIndex {
    let west = |mut workload: Workload| {
        workload.network = NetworkId::new("west");
        workload.network_gateway = Some(gateway("ew"));
        workload
    };
    let mut plain = west(of(pod("plain-there", "10.0.0.4"), "plain", &[]));
    plain.service_account = "plain-there".into();
    let mut split = west(hbone(of(pod("split", ""), "split", &[])));
    split.addresses.clear();
    let mut named = service("split", "10.9.0.3", &[(80, 8080)]);
    named.subject_alt_names = vec!["spiffe://cluster.local/ns/shop/sa/behind".into()];
    index(
        vec![
            hbone(pod("client", "10.0.0.1")),
            west(hbone(of(pod("there", "10.0.0.1"), "far", &[]))),
            west(of(pod("gate", "192.168.9.9"), "ew", &[])),
            plain,
            split.clone(),
            west(hbone(of(split, "unnamed", &[]))),
        ],
        vec![
            service("far", "10.9.0.1", &[(80, 8080)]),
            service("plain", "10.9.0.2", &[(80, 8080)]),
            named,
            service("unnamed", "10.9.0.4", &[(80, 8080)]),
            service("ew", "", &[(15008, 15443)]),
        ],
    )
}

#[test]
fn an_endpoint_on_another_network_is_reached_through_its_gateway() {
    let index = two_networks();
    let resolved = dial_as(&index, &ResolveSettings::default(), "10.9.0.1:80", 1).unwrap();
    let Route::Tunnel(inner) = &resolved.route else { panic!("{:?}", resolved.route) };
    let outer = inner.gateway.as_deref().expect("a gateway");
    let ids = |route: &mesh_resolve::TunnelRoute| {
        route.expected.iter().map(ToString::to_string).collect::<Vec<_>>().join(" ")
    };
    for route in [inner, outer] {
        assert_eq!(route.next_hop.to_string(), "192.168.9.9:15443");
        assert_eq!(route.authority.to_string(), "far.shop.svc.cluster.local:80");
    }
    assert!(ids(inner).ends_with("/sa/there"), "{}", ids(inner));
    assert!(ids(outer).ends_with("/sa/gate"), "{}", ids(outer));
    assert!(outer.gateway.is_none());
}

#[test]
fn identities_behind_a_gateway_are_those_that_are_known() {
    let index = two_networks();
    let resolved = dial_as(&index, &ResolveSettings::default(), "10.9.0.3:80", 1).unwrap();
    let expected = &resolved.route.tunnel().unwrap().expected;
    assert_eq!(expected.len(), 1, "the split horizon's own identity is nobody's");
    assert!(expected[0].as_str().ends_with("/sa/behind"));
    assert_eq!(dial(&index, "10.9.0.2:80"), "gateway_unavailable", "it speaks no HBONE");
}
