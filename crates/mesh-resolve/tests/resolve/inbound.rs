//! What a pod accepts.

use mesh_model::{
    ApplicationTunnel, ApplicationTunnelProtocol, Direction, Service, WeightedWaypoint, Workload,
};
use mesh_resolve::{ResolveSettings, Route, WaypointEnforcement, WorkloadIndex, resolve_inbound};

use crate::support::{flow, gateway, hbone, index, local, of, pod, service, show};

fn ask(index: &WorkloadIndex, settings: &ResolveSettings, authority: &str) -> String {
    let flow = flow(Direction::InboundTunnel, "10.0.0.2:15008");
    let authority = authority.parse().unwrap();
    let local = local(index, "cart");
    show(&resolve_inbound(index, settings, &flow, &local, Some(&authority)))
}

fn plain(index: &WorkloadIndex, destination: &str) -> String {
    let flow = flow(Direction::InboundPlaintext, destination);
    let local = local(index, "cart");
    show(&resolve_inbound(index, &ResolveSettings::default(), &flow, &local, None))
}

fn mesh(change: impl FnOnce(&mut Vec<Workload>, &mut Vec<Service>)) -> WorkloadIndex {
    let mut workloads = vec![
        hbone(of(pod("cart", "10.0.0.2,fd00::2"), "cart", &[(81, 9090)])),
        hbone(of(pod("other", "10.0.0.3"), "other", &[])),
        hbone(of(pod("wp", "10.0.0.5"), "wp", &[])),
        pod("client", "10.0.0.1"),
    ];
    let mut services = vec![
        service("cart", "10.9.0.1", &[(80, 8080), (81, 0), (82, 15008)]),
        service("other", "10.9.0.2", &[(80, 8080)]),
        service("wp", "10.9.0.9", &[(15008, 15008)]),
    ];
    change(&mut workloads, &mut services);
    index(workloads, services)
}

#[test]
fn only_own_addresses_and_services_are_accepted() {
    let index = mesh(|_, _| {});
    let settings = ResolveSettings::default();
    for (authority, expected) in [
        ("10.0.0.2:8080", "deliver 10.0.0.2:8080"),
        ("10.0.0.2:1", "deliver 10.0.0.2:1"),
        ("cart.shop.svc.cluster.local:80", "deliver 10.0.0.2:8080"),
        ("cart.shop.svc.cluster.local:81", "deliver 10.0.0.2:9090"),
        ("cart.shop.svc.cluster.local:99", "no_such_port"),
        ("cart.shop.svc.cluster.local:82", "loop_refused"),
        ("other.shop.svc.cluster.local:80", "wrong_destination"),
        ("absent.shop.svc.cluster.local:80", "wrong_destination"),
        ("10.0.0.3:8080", "wrong_destination"),
        ("10.9.0.1:80", "wrong_destination"),
        ("127.0.0.1:8080", "wrong_destination"),
        ("10.0.0.2:15001", "loop_refused"),
        ("10.0.0.2:15006", "loop_refused"),
        ("10.0.0.2:15008", "loop_refused"),
        ("10.0.0.2:15053", "loop_refused"),
    ] {
        assert_eq!(ask(&index, &settings, authority), expected, "{authority}");
    }
    assert_eq!(plain(&index, "10.0.0.2:8080"), "deliver 10.0.0.2:8080");
    assert_eq!(plain(&index, "10.0.0.2:15006"), "loop_refused");
}

#[test]
fn sandwiched_waypoints_get_what_they_front() {
    let index = mesh(|workloads, services| {
        workloads[0].application_tunnel = Some(ApplicationTunnel {
            protocol: ApplicationTunnelProtocol::Proxy,
            port: Some(15088),
        });
        services[1].weighted_waypoints =
            vec![WeightedWaypoint { destination: gateway("cart"), weight: 1 }];
    });
    let settings = ResolveSettings::default();
    let delivered =
        |destination| format!("deliver 10.0.0.2:15088 at 127.0.0.1:15088 as {destination}");
    assert_eq!(ask(&index, &settings, "10.9.0.2:80"), delivered("10.9.0.2:80"));
    let by_name = ask(&index, &settings, "cart.shop.svc.cluster.local:80");
    assert_eq!(by_name, delivered("10.9.0.1:80"));
    assert_eq!(ask(&index, &settings, "10.0.0.3:80"), "wrong_destination");
    let compat = ResolveSettings { accept_foreign_authority: true, ..settings };
    assert_eq!(ask(&index, &compat, "10.0.0.3:80"), delivered("10.0.0.3:80"));
    assert_eq!(ask(&index, &compat, "10.0.0.2:15008"), "loop_refused");
}

#[test]
fn bound_waypoint_is_required_where_no_other_way_exists() {
    let settings = ResolveSettings::default();
    let required = " via shop/wp.shop.svc.cluster.local";
    let of_service = mesh(|_, services| services[0].waypoint = Some(gateway("wp")));
    let fronted = format!("deliver 10.0.0.2:8080{required}");
    assert_eq!(ask(&of_service, &settings, "10.0.0.2:8080"), fronted);
    assert_eq!(plain(&of_service, "10.0.0.2:8080"), fronted);
    // No service leads there.
    assert_eq!(ask(&of_service, &settings, "10.0.0.2:7"), "deliver 10.0.0.2:7");
    let preferred = ResolveSettings { waypoints: WaypointEnforcement::Preferred, ..settings };
    assert_eq!(ask(&of_service, &preferred, "10.0.0.2:8080"), "deliver 10.0.0.2:8080");

    let of_workload = mesh(|workloads, _| workloads[0].waypoint = Some(gateway("wp")));
    assert_eq!(ask(&of_workload, &settings, "10.0.0.2:7"), format!("deliver 10.0.0.2:7{required}"));
    // Its service has none, and traffic to a service does not take the workload's.
    assert_eq!(ask(&of_workload, &settings, "10.0.0.2:8080"), "deliver 10.0.0.2:8080");

    let flow = flow(Direction::InboundTunnel, "10.0.0.2:15008");
    let authority = "10.0.0.2:8080".parse().unwrap();
    let cart = local(&of_service, "cart");
    let resolved = resolve_inbound(&of_service, &settings, &flow, &cart, Some(&authority)).unwrap();
    let Route::Deliver { waypoint: Some(waypoint), .. } = &resolved.route else { panic!() };
    let identities: Vec<_> = waypoint.identities.iter().map(|id| id.as_str()).collect();
    assert_eq!(identities, ["spiffe://cluster.local/ns/shop/sa/wp"]);
    assert_eq!(resolved.source().unwrap().name, "client".into());
    assert_eq!(&*resolved.service.unwrap().name, "cart");

    let unknown = mesh(|workloads, services| {
        services[0].waypoint = Some(gateway("gone"));
        workloads.truncate(1);
    });
    let resolved = resolve_inbound(&unknown, &settings, &flow, &cart, Some(&authority)).unwrap();
    let Route::Deliver { waypoint: Some(waypoint), .. } = &resolved.route else { panic!() };
    assert!(waypoint.identities.is_empty());

    // A service that is listed and not known may have a waypoint: nobody is let in for want of knowing.
    let unknown = mesh(|_, services| drop(services.remove(0)));
    let cart = local(&unknown, "cart");
    let resolved = resolve_inbound(&unknown, &settings, &flow, &cart, Some(&authority)).unwrap();
    let Route::Deliver { waypoint: Some(waypoint), .. } = &resolved.route else { panic!() };
    assert!(waypoint.identities.is_empty());
    assert!(waypoint.names[0].starts_with("that of service shop/cart"), "{:?}", waypoint.names);
}
