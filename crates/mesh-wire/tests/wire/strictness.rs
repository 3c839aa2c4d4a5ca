//! What does not convert is refused, with its field and its problem.

use mesh_authorize::{Action, Clause, Match, Rule};
use mesh_model::{Service, Workload};
use mesh_wire::pb::{discovery, mesh, security, workload as pb};
use mesh_wire::{InvalidResource, MESH_CONFIG_NAME, Problem, Published, Resource, ResourceKind};
use prost::Message;
use prost_types::Any;

use crate::samples::Dice;

fn refusal(kind: ResourceKind, name: &str, content: &impl Message) -> InvalidResource {
    let resource =
        Some(Any { type_url: kind.type_url().to_owned(), value: content.encode_to_vec() });
    let wire = discovery::Resource { name: name.to_owned(), resource, ..Default::default() };
    Resource::decode(kind, &wire).expect_err("refused")
}

/// The field that is refused, what makes it bad, and what is said about it.
type Case<M> = (&'static str, fn(&mut M), Problem);

/// Applies each change to a copy of `good` and expects its refusal.
fn check<M: Message + Clone>(
    kind: ResourceKind,
    name: &str,
    good: &M,
    wrap: impl Fn(M) -> pb::Address,
    table: &[Case<M>],
) {
    for (field, change, problem) in table {
        let mut bad = good.clone();
        change(&mut bad);
        let error = match kind {
            ResourceKind::Address => refusal(kind, name, &wrap(bad)),
            ResourceKind::Mesh
            | ResourceKind::Pod
            | ResourceKind::Authorization
            | ResourceKind::Frontend
            | ResourceKind::Route
            | ResourceKind::Authentication => refusal(kind, name, &bad),
        };
        assert_eq!((error.field.as_str(), &error.problem), (*field, problem));
        assert!(error.to_string().contains(problem.remedy()), "{error}");
    }
}

fn not_an_address<M>(_: M) -> pb::Address {
    unreachable!("another kind")
}

const UNKNOWN: i32 = 99;

fn unknown() -> Problem {
    Problem::UnknownValue { value: UNKNOWN }
}

fn port(value: u32) -> Problem {
    Problem::Port { value }
}

fn name(text: &str) -> Problem {
    Problem::Name { text: text.to_owned() }
}

fn prefix(text: &str) -> Problem {
    Problem::Prefix { text: text.to_owned() }
}

fn by_address(bytes: &[u8]) -> pb::GatewayAddress {
    let address = pb::NetworkAddress { address: bytes.to_vec(), ..Default::default() };
    pb::GatewayAddress {
        destination: Some(pb::gateway_address::Destination::Address(address)),
        hbone_mtls_port: 0,
    }
}

fn listed(key: &str, service_port: u32, target_port: u32) -> (String, pb::PortList) {
    let ports = vec![pb::Port { service_port, target_port, app_protocol: 0 }];
    (key.to_owned(), pb::PortList { ports })
}

#[test]
fn workloads() {
    let good = pb::Workload::from(&Workload::named("u", "shop", "p"));
    let wrap = |workload| pb::Address { r#type: Some(pb::address::Type::Workload(workload)) };
    check(
        ResourceKind::Address,
        "u",
        &good,
        wrap,
        &[
            ("uid", |w| w.uid.clear(), Problem::Missing),
            (
                "addresses[1]",
                |w| w.addresses = vec![vec![1; 4], vec![1; 5]],
                Problem::AddressLength { bytes: 5 },
            ),
            ("addresses[0]", |w| w.addresses = vec![vec![]], Problem::AddressLength { bytes: 0 }),
            ("tunnel_protocol", |w| w.tunnel_protocol = UNKNOWN, unknown()),
            (
                "tunnel_protocol",
                |w| w.tunnel_protocol = 2,
                Problem::Unsupported { value: "LEGACY_ISTIO_MTLS" },
            ),
            ("network_mode", |w| w.network_mode = UNKNOWN, unknown()),
            ("workload_type", |w| w.workload_type = UNKNOWN, unknown()),
            ("status", |w| w.status = UNKNOWN, unknown()),
            (
                "waypoint.destination",
                |w| w.waypoint = Some(pb::GatewayAddress::default()),
                Problem::Missing,
            ),
            (
                "waypoint.address.address",
                |w| w.waypoint = Some(by_address(&[1; 17])),
                Problem::AddressLength { bytes: 17 },
            ),
            (
                "network_gateway.hbone_mtls_port",
                |w| {
                    w.network_gateway =
                        Some(pb::GatewayAddress { hbone_mtls_port: 65_536, ..by_address(&[1; 4]) });
                },
                port(65_536),
            ),
            (
                "application_tunnel.protocol",
                |w| {
                    w.application_tunnel =
                        Some(pb::ApplicationTunnel { protocol: UNKNOWN, port: 0 })
                },
                unknown(),
            ),
            (
                "application_tunnel.port",
                |w| {
                    w.application_tunnel = Some(pb::ApplicationTunnel { protocol: 0, port: 70_000 })
                },
                port(70_000),
            ),
            ("services", |w| w.services = [listed("cart", 80, 80)].into(), name("cart")),
            ("services", |w| w.services = [listed("shop/", 80, 80)].into(), name("shop/")),
            ("services", |w| w.services = [listed("shop/a/b", 80, 80)].into(), name("shop/a/b")),
            (
                "services[a/b].ports[0].service_port",
                |w| w.services = [listed("a/b", 0, 80)].into(),
                port(0),
            ),
            (
                "services[a/b].ports[0].target_port",
                |w| w.services = [listed("a/b", 80, u32::MAX)].into(),
                port(u32::MAX),
            ),
            (
                "authorization_policies[0]",
                |w| w.authorization_policies = vec!["x".into()],
                name("x"),
            ),
            (
                "authorization_policies[0]",
                |w| w.authorization_policies = vec!["/x".into()],
                name("/x"),
            ),
            (
                "service_account",
                |w| {
                    w.tunnel_protocol = pb::TunnelProtocol::Hbone.into();
                    w.service_account = "a/b".into();
                },
                Problem::Identity,
            ),
        ],
    );
}

#[test]
fn services() {
    let good = pb::Service::from(&Service::named("shop", "cart.shop.svc", "cart"));
    let wrap = |service| pb::Address { r#type: Some(pb::address::Type::Service(service)) };
    fn vip(bytes: &[u8], length: Option<u32>) -> Vec<pb::NetworkAddress> {
        vec![pb::NetworkAddress { network: String::new(), address: bytes.to_vec(), length }]
    }
    fn balancing(change: impl FnOnce(&mut pb::LoadBalancing)) -> Option<pb::LoadBalancing> {
        let mut balancing = pb::LoadBalancing::default();
        change(&mut balancing);
        Some(balancing)
    }
    check(
        ResourceKind::Address,
        "shop/cart.shop.svc",
        &good,
        wrap,
        &[
            ("namespace", |s| s.namespace.clear(), Problem::Missing),
            ("hostname", |s| s.hostname.clear(), Problem::Missing),
            ("hostname", |s| s.hostname = "a/b".into(), name("shop/a/b")),
            (
                "addresses[0].address",
                |s| s.addresses = vip(&[1; 3], None),
                Problem::AddressLength { bytes: 3 },
            ),
            (
                "addresses[0].address",
                |s| s.addresses = vip(&[10, 0, 0, 0], Some(33)),
                prefix("10.0.0.0/33"),
            ),
            ("addresses[0].address", |s| s.addresses = vip(&[0; 16], Some(129)), prefix("::/129")),
            (
                "addresses[0].address",
                |s| s.addresses = vip(&[0; 16], Some(u32::MAX)),
                prefix("::/4294967295"),
            ),
            // A mapped address counts its bits from the IPv6 address's start: 24 would be a range of everything.
            (
                "addresses[0].address",
                |s| {
                    s.addresses =
                        vip(&[0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 255, 255, 10, 0, 0, 0], Some(24))
                },
                prefix("10.0.0.0/24"),
            ),
            (
                "ports[0].app_protocol",
                |s| {
                    s.ports =
                        vec![pb::Port { service_port: 80, target_port: 80, app_protocol: UNKNOWN }]
                },
                unknown(),
            ),
            ("ports[0].service_port", |s| s.ports = vec![pb::Port::default()], port(0)),
            (
                "waypoint.destination",
                |s| s.waypoint = Some(pb::GatewayAddress::default()),
                Problem::Missing,
            ),
            (
                "weighted_waypoints[0].destination",
                |s| s.weighted_waypoints = vec![pb::WeightedWaypoint::default()],
                Problem::Missing,
            ),
            (
                "load_balancing.mode",
                |s| s.load_balancing = balancing(|b| b.mode = UNKNOWN),
                unknown(),
            ),
            (
                "load_balancing.health_policy",
                |s| s.load_balancing = balancing(|b| b.health_policy = UNKNOWN),
                unknown(),
            ),
            (
                "load_balancing.routing_preference[1]",
                |s| s.load_balancing = balancing(|b| b.routing_preference = vec![1, 0]),
                Problem::Missing,
            ),
            (
                "load_balancing.routing_preference[0]",
                |s| s.load_balancing = balancing(|b| b.routing_preference = vec![UNKNOWN]),
                unknown(),
            ),
            ("ip_families", |s| s.ip_families = UNKNOWN, unknown()),
            ("visibility", |s| s.visibility = UNKNOWN, unknown()),
        ],
    );
}

fn first_match(policy: &mut security::Authorization) -> &mut security::Match {
    &mut policy.rules[0].clauses[0].matches[0]
}

fn block(bytes: &[u8], length: u32) -> Vec<security::Address> {
    vec![security::Address { address: bytes.to_vec(), length }]
}

fn extension(name: &str, type_url: &str, value: &[u8]) -> pb::Extension {
    let config = Some(Any { type_url: type_url.to_owned(), value: value.to_vec() });
    pb::Extension { name: name.to_owned(), config }
}

fn template(text: &str) -> mesh::PathMatch {
    mesh::PathMatch { r#match: Some(mesh::path_match::Match::Template(text.to_owned())) }
}

/// Gives the first match conditions on the request.
fn on_request(policy: &mut security::Authorization, set: impl FnOnce(&mut mesh::RequestMatch)) {
    let mut request = mesh::RequestMatch::default();
    set(&mut request);
    let exact = mesh::MatchExtension { request: Some(request), ..Default::default() };
    let url = "type.googleapis.com/culvert.mesh.v1.MatchExtension";
    let value = exact.encode_to_vec();
    first_match(policy).extensions = vec![extension("culvert.dev/match", url, &value)];
}

#[test]
fn policies() {
    const AT: &str = "rules[0].clauses[0].matches[0]";
    let mut policy = Dice(1).policy();
    policy.name = "shop/p".parse().unwrap();
    policy.action = Action::Deny;
    policy.rules = vec![Rule { clauses: vec![Clause { matches: vec![Match::default()] }] }];
    let good = security::Authorization::from(&policy);
    let at = |field: &str| -> &'static str { Box::leak(format!("{AT}.{field}").into_boxed_str()) };
    check(
        ResourceKind::Authorization,
        "shop/p",
        &good,
        not_an_address,
        &[
            ("namespace", |p| p.namespace.clear(), Problem::Missing),
            ("name", |p| p.name.clear(), Problem::Missing),
            ("name", |p| p.name = "a/b".into(), name("shop/a/b")),
            (
                "name",
                |p| p.name = "other".into(),
                Problem::OtherName { content: "shop/other".into() },
            ),
            ("scope", |p| p.scope = UNKNOWN, unknown()),
            ("action", |p| p.action = UNKNOWN, unknown()),
            // ztunnel drops these one by one, and what is left restricts nobody.
            (
                at("source_ips[0].address"),
                |p| first_match(p).source_ips = block(&[1; 2], 8),
                Problem::AddressLength { bytes: 2 },
            ),
            (
                at("not_destination_ips[0].address"),
                |p| first_match(p).not_destination_ips = block(&[10, 0, 0, 0], 40),
                prefix("10.0.0.0/40"),
            ),
            (
                at("destination_ports[1]"),
                |p| first_match(p).destination_ports = vec![80, 65_536],
                port(65_536),
            ),
            (
                at("not_destination_ports[0]"),
                |p| first_match(p).not_destination_ports = vec![0],
                port(0),
            ),
            (
                at("principals[0].match_type"),
                |p| first_match(p).principals = vec![security::StringMatch::default()],
                Problem::Missing,
            ),
            (
                at("service_accounts[0].namespace"),
                |p| {
                    first_match(p).service_accounts = vec![security::ServiceAccountMatch::default()]
                },
                Problem::Missing,
            ),
            (
                at("extensions"),
                |p| first_match(p).extensions = vec![extension("example.org/narrower", "", &[])],
                Problem::UnknownExtension { name: "example.org/narrower".into() },
            ),
            (
                at("extensions"),
                |p| first_match(p).extensions = vec![extension("culvert.dev/match", "x", &[])],
                Problem::OtherType { type_url: "x".into() },
            ),
            (
                at("extensions"),
                |p| {
                    let url = "type.googleapis.com/culvert.mesh.v1.MatchExtension";
                    first_match(p).extensions = vec![extension("culvert.dev/match", url, &[0xff])];
                },
                Problem::Undecodable,
            ),
            (
                at("request.paths[0].template"),
                |p| on_request(p, |request| request.paths = vec![template("/{**}/{*}")]),
                Problem::Undecodable,
            ),
            (
                at("request.not_paths[0].match"),
                |p| on_request(p, |request| request.not_paths = vec![mesh::PathMatch::default()]),
                Problem::Missing,
            ),
            (
                at("request.headers[0].values"),
                |p| {
                    on_request(p, |request| {
                        request.headers =
                            vec![mesh::HeaderMatch { name: "x".into(), ..Default::default() }];
                    });
                },
                Problem::Missing,
            ),
            ("extensions", |p| p.extensions[0].config = None, Problem::Missing),
            (
                "extensions.kind",
                |p| {
                    let url = "type.googleapis.com/culvert.mesh.v1.PolicyExtension";
                    p.extensions = vec![extension("culvert.dev/policy", url, &[])];
                },
                Problem::Missing,
            ),
        ],
    );
}

#[test]
fn settings() {
    let good = mesh::MeshConfig::from(&Dice(1).mesh());
    check(
        ResourceKind::Mesh,
        MESH_CONFIG_NAME,
        &good,
        not_an_address,
        &[
            ("trust_domain", |m| m.trust_domain.clear(), Problem::Missing),
            ("root_pem", |m| m.root_pem.clear(), Problem::Missing),
            (
                "unknown_egress",
                |m| m.unknown_egress = [(String::new(), 0)].into(),
                Problem::Missing,
            ),
            (
                "unknown_egress[shop]",
                |m| m.unknown_egress = [("shop".into(), UNKNOWN)].into(),
                unknown(),
            ),
            ("default_unknown_egress", |m| m.default_unknown_egress = UNKNOWN, unknown()),
        ],
    );
    let pod = Dice(1).pod();
    let good = mesh::PodConfig::from(&pod);
    fn filter(change: impl FnOnce(&mut mesh::TrafficFilter)) -> Option<mesh::TrafficFilter> {
        let mut filter = mesh::TrafficFilter::default();
        change(&mut filter);
        Some(filter)
    }
    check(
        ResourceKind::Pod,
        pod.uid.as_str(),
        &good,
        not_an_address,
        &[
            ("uid", |p| p.uid.clear(), Problem::Missing),
            ("namespace", |p| p.namespace.clear(), Problem::Missing),
            ("name", |p| p.name.clear(), Problem::Missing),
            ("service_account", |p| p.service_account.clear(), Problem::Missing),
            ("mode", |p| p.mode = UNKNOWN, unknown()),
            ("probe_ports[0]", |p| p.probe_ports = vec![0], port(0)),
            (
                "outbound.exclude_ports[0]",
                |p| p.outbound = filter(|f| f.exclude_ports = vec![65_536]),
                port(65_536),
            ),
            (
                "inbound.include_cidrs[0]",
                |p| p.inbound = filter(|f| f.include_cidrs = vec!["10.0.0.0/33".into()]),
                prefix("10.0.0.0/33"),
            ),
            (
                "inbound.exclude_cidrs[0]",
                |p| p.inbound = filter(|f| f.exclude_cidrs = vec![String::new()]),
                prefix(""),
            ),
        ],
    );
}

#[test]
fn envelopes() {
    let good = Published::new(&Resource::Workload(Workload::named("u", "shop", "p"))).to_wire();
    let table: [Case<discovery::Resource>; 5] = [
        ("resource", |r| r.resource = None, Problem::Missing),
        ("name", |r| r.name = "v".into(), Problem::OtherName { content: "u".into() }),
        (
            "resource",
            |r| r.resource.as_mut().unwrap().type_url = "x".into(),
            Problem::OtherType { type_url: "x".into() },
        ),
        ("resource", |r| r.resource.as_mut().unwrap().value = vec![0xff], Problem::Undecodable),
        ("type", |r| r.resource.as_mut().unwrap().value.clear(), Problem::Missing),
    ];
    for (field, change, problem) in table {
        let mut bad = good.clone();
        change(&mut bad);
        let error = Resource::decode(ResourceKind::Address, &bad).expect_err("refused");
        assert_eq!((error.field.as_str(), error.problem), (field, problem));
    }
}
