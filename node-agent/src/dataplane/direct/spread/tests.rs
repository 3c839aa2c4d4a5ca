use std::time::Instant;

use mesh_authorize::Action;
use mesh_direct::Pod;
use mesh_model::{
    GatewayAddress, GatewayDestination, HealthStatus, LoadBalancingMode, NamespacedHostname,
    NetworkAddress, NetworkId, NetworkMode, Scope, Service, ServicePort, TunnelProtocol,
};
use mesh_resolve::IndexDelta;

use super::super::judge::tests::{Scene, THE_CLIENT, local, policy, workload};
use super::super::judge::{Certificates, LocalPods, SameNode, judge};
use super::*;

const HOST: &str = "stock.shop.svc.cluster.local";

/// A client and two endpoints of a service on one node, and a third one elsewhere that is not ready.
struct Mesh {
    scene: Scene,
    workloads: Vec<Workload>,
    service: Service,
    pods: Vec<LocalPod>,
    dialled: SocketAddr,
}

fn endpoint(name: &str, address: &str) -> Workload {
    let mut one = workload(name, address);
    one.services.insert(NamespacedHostname::new("shop", HOST), Vec::new());
    one.node = "here".into();
    one
}

impl Mesh {
    fn new() -> Self {
        let mut service = Service::named("shop", HOST, "stock");
        let vip = |ip: &str| NetworkAddress::new(NetworkId::default(), ip.parse().unwrap());
        service.vips = vec![vip("10.96.0.1"), vip("fd96::1")];
        service.ports = vec![ServicePort { service_port: 80, target_port: 8080 }];
        let mut elsewhere = endpoint("far", "10.0.9.9");
        elsewhere.node = "there".into();
        elsewhere.status = HealthStatus::Unhealthy;
        let mut client = workload("client", "10.0.0.1");
        client.node = "here".into();
        Self {
            scene: Scene::new(),
            workloads: vec![
                client,
                endpoint("one", "10.0.0.2"),
                endpoint("two", "10.0.0.3"),
                elsewhere,
            ],
            service,
            pods: vec![
                local("client", "10.0.0.1", 1),
                local("one", "10.0.0.2", 2),
                local("two", "10.0.0.3", 3),
            ],
            dialled: "10.96.0.1:80".parse().unwrap(),
        }
    }

    fn on_ground<T>(self, work: impl FnOnce(&mut Ground<'_>, SocketAddr) -> T) -> T {
        let mut snapshot = self.scene.snapshot;
        snapshot.index.apply(IndexDelta {
            workloads: self.workloads,
            services: vec![self.service],
            ..IndexDelta::default()
        });
        let mut pods = LocalPods::default();
        for pod in self.pods {
            pods.insert(pod);
        }
        let mut ground = Ground {
            same_node: SameNode::Direct,
            snapshot: &snapshot,
            pods: &pods,
            certificates: &mut Certificates::default(),
            wall: std::time::SystemTime::now(),
        };
        work(&mut ground, self.dialled)
    }

    fn spread(self) -> Spreading {
        self.on_ground(|ground, address| spread(ground, &Vip { client: Pod(1), address }))
    }
}

fn pair_to(server: u64, target: &str) -> Pair {
    Pair {
        client: Pod(1),
        client_address: "10.0.0.1".parse().unwrap(),
        server: Pod(server),
        target: target.parse().unwrap(),
    }
}

type Change = fn(&mut Mesh);

#[test]
fn all_endpoints_that_count_are_listed() {
    let check = |name: &str, expected: &[Pair], change: Change| {
        let mut mesh = Mesh::new();
        change(&mut mesh);
        assert_eq!(mesh.spread().as_deref(), Ok(expected), "{name}");
    };
    let both = [pair_to(2, "10.0.0.2:8080"), pair_to(3, "10.0.0.3:8080")];
    check("both", &both, |_| {});
    check("the ready one", &both[..1], |mesh| {
        mesh.workloads[2].status = HealthStatus::Unhealthy;
    });
    check("the near ones", &both, |mesh| {
        mesh.workloads[3].status = HealthStatus::Healthy;
        mesh.service.load_balancing.mode = LoadBalancingMode::Failover;
        mesh.service.load_balancing.routing_preference = vec![Scope::Node];
    });
    check("with a policy that allows", &both, |mesh| {
        mesh.scene.snapshot.policies.upsert(policy(Action::Allow, false, THE_CLIENT));
    });
}

#[test]
fn the_agent_chooses_where_an_endpoint_is_out_of_reach() {
    let check = |name: &str, change: Change| {
        let mut mesh = Mesh::new();
        change(&mut mesh);
        assert!(mesh.spread().is_err(), "{name}");
    };
    check("not synced", |mesh| mesh.scene.snapshot.synced = false);
    check("one elsewhere", |mesh| mesh.workloads[3].status = HealthStatus::Healthy);
    check("one not captured", |mesh| drop(mesh.pods.pop()));
    check("another pod at its address", |mesh| {
        mesh.pods[2] = local("three", "10.0.0.3", 3);
    });
    check("one without tunnel", |mesh| {
        mesh.workloads[2].tunnel_protocol = TunnelProtocol::None;
    });
    check("one of the host", |mesh| mesh.workloads[2].network_mode = NetworkMode::HostNetwork);
    check("one with more capacity", |mesh| mesh.workloads[2].capacity = 2);
    check("the client itself", |mesh| mesh.workloads[0] = endpoint("client", "10.0.0.1"));
    check("the other family only", |mesh| mesh.dialled = "[fd96::1]:80".parse().unwrap());
    check("another port", |mesh| mesh.dialled.set_port(81));
    check("nobody's address", |mesh| mesh.dialled = "10.96.0.2:80".parse().unwrap());
    check("a pod's address", |mesh| mesh.dialled = "10.0.0.2:8080".parse().unwrap());
    check("a waypoint", |mesh| {
        let host = NamespacedHostname::new("shop", "wp.shop.svc.cluster.local");
        let destination = GatewayDestination::Hostname(host);
        mesh.service.waypoint = Some(GatewayAddress { destination, hbone_port: 15008 });
    });
    check("no client", |mesh| drop(mesh.pods.remove(0)));
    check("a client that is being taken over", |mesh| mesh.pods[0].settings = None);
    check("excluded at the client", |mesh| {
        let settings = mesh.pods[0].settings.as_mut().unwrap();
        settings.outbound.exclude_networks.push("10.96.0.0/16".parse().unwrap());
    });
    check("more than the kernel has room for", |mesh| {
        for number in 0..7_u8 {
            let (name, address) = (format!("more-{number}"), format!("10.0.1.{number}"));
            mesh.workloads.push(endpoint(&name, &address));
            mesh.pods.push(local(&name, &address, 10 + u64::from(number)));
        }
    });
}

/// Listing says nothing of policy at the endpoints: that is each pair's own judgement, by the same picture.
#[test]
fn a_pair_of_an_endpoint_is_judged_by_itself() {
    let mut mesh = Mesh::new();
    mesh.pods[1].leaves_at = Some(Instant::now());
    mesh.on_ground(|ground, address| {
        let pairs = spread(ground, &Vip { client: Pod(1), address }).unwrap();
        let judged = judge(ground, &pairs[0]);
        assert_ne!(judged.judgement, mesh_direct::Judgement::Grant, "{}", judged.because);
    });
}

#[test]
fn a_service_without_endpoint_here_is_no_matter_of_this_node() {
    let check = |expected: bool, change: Change| {
        let mut mesh = Mesh::new();
        change(&mut mesh);
        mesh.on_ground(|ground, address| {
            assert_eq!(has_endpoint_here(ground, &Vip { client: Pod(1), address }), expected);
        });
    };
    check(true, |_| {});
    check(true, |mesh| drop(mesh.pods.pop()));
    check(false, |mesh| mesh.pods.truncate(1));
    check(false, |mesh| mesh.dialled = "10.96.0.2:80".parse().unwrap());
    check(false, |mesh| mesh.dialled = "10.0.9.9:8080".parse().unwrap());
}

#[test]
fn records_name_the_service() {
    Mesh::new().on_ground(|ground, dialled| {
        let pair = pair_to(2, "10.0.0.2:8080");
        let sides = judge(ground, &pair).sides;
        let named = by_service(ground, &pair, dialled, &sides);
        let host = |facts: &mesh_telemetry::FlowFacts| {
            facts.service.as_ref().map(|service| service.hostname.to_string())
        };
        assert_eq!(host(&named.source).as_deref(), Some(HOST));
        assert_eq!(host(&named.destination).as_deref(), Some(HOST));
        assert_eq!(named.source.source_principal, sides.source.source_principal);
        assert_eq!(named.source.destination, sides.source.destination);
        // An address that is no service's any more names none.
        let unknown = "10.96.0.2:80".parse().unwrap();
        assert_eq!(by_service(ground, &pair, unknown, &sides), sides);
    });
}
