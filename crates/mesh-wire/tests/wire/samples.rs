//! Valid resources of every kind from a seed.

use std::net::IpAddr;
use std::sync::Arc;

use mesh_authorize::{
    Action, ClaimMatch, Clause, HeaderMatch, Match, PathMatch, Policy, PolicyKind, PolicyName,
    PolicyOrigin, PolicyScope, RequestMatch, Rule, ServiceAccountMatch, StringMatch, UnknownEgress,
};
use mesh_model::{
    ApplicationTunnel, ApplicationTunnelProtocol, GatewayAddress, GatewayDestination, HealthPolicy,
    HealthStatus, IpFamilies, IpPrefix, LoadBalancing, LoadBalancingMode, Locality,
    NamespacedHostname, NetworkAddress, NetworkId, NetworkMode, Scope, Service, ServicePort,
    TunnelProtocol, Visibility, WeightedWaypoint, Workload, WorkloadKind, WorkloadUid, splitmix,
};
use mesh_wire::{MeshConfig, PodConfig, PodMode, Resource, TrafficFilter};

/// A source of choices. Source: SplitMix64 (Steele, Lea, Flood 2014).
pub(crate) struct Dice(pub(crate) u64);

impl Dice {
    fn next(&mut self) -> u64 {
        splitmix::next(&mut self.0)
    }

    pub(crate) fn below(&mut self, bound: usize) -> usize {
        usize::try_from(self.next() % u64::try_from(bound).unwrap()).unwrap()
    }

    pub(crate) fn byte(&mut self) -> u8 {
        self.next().to_le_bytes()[0]
    }

    fn coin(&mut self) -> bool {
        self.below(2) == 0
    }

    fn pick<T: Clone>(&mut self, choices: &[T]) -> T {
        choices[self.below(choices.len())].clone()
    }

    fn list<T>(&mut self, mut make: impl FnMut(&mut Self) -> T) -> Vec<T> {
        (0..self.below(3)).map(|_| make(self)).collect()
    }

    fn maybe<T>(&mut self, make: impl FnOnce(&mut Self) -> T) -> Option<T> {
        self.coin().then(|| make(self))
    }

    fn text(&mut self) -> Arc<str> {
        self.pick(&["", "a", "shop/cart", "ümläut \u{0}", "x.y.svc.cluster.local"]).into()
    }

    /// Never empty, without a slash, and good for an identity.
    fn name(&mut self) -> Arc<str> {
        self.pick(&["shop", "cart", "a-b.c", "default", "n0"]).into()
    }

    fn port(&mut self) -> u16 {
        self.pick(&[1, 80, 8080, u16::MAX])
    }

    fn number(&mut self) -> u32 {
        self.pick(&[0, 1, 2, u32::MAX])
    }

    fn ip(&mut self) -> IpAddr {
        self.pick(&["10.0.0.1", "0.0.0.0", "fd00::1", "2001:db8::ffff", "::"]).parse().unwrap()
    }

    fn prefix(&mut self) -> IpPrefix {
        self.pick(&["10.0.0.0/8", "0.0.0.0/0", "10.1.2.3/32", "fd00::/8", "::/0", "fd00::1/128"])
            .parse()
            .unwrap()
    }

    fn hostname(&mut self) -> NamespacedHostname {
        NamespacedHostname::new(&self.name(), &self.name())
    }

    fn network(&mut self) -> NetworkId {
        NetworkId::new(self.pick(&["", "west"]))
    }

    fn gateway(&mut self) -> GatewayAddress {
        let destination = if self.coin() {
            GatewayDestination::Hostname(self.hostname())
        } else {
            GatewayDestination::Address(NetworkAddress::new(self.network(), self.ip()))
        };
        GatewayAddress { destination, hbone_port: self.port() }
    }

    fn service_port(&mut self) -> ServicePort {
        let target_port = self.pick(&[0, 1, 80, u16::MAX]);
        ServicePort { service_port: self.port(), target_port }
    }

    fn string_match(&mut self) -> StringMatch {
        let text = self.text();
        match self.below(4) {
            0 => StringMatch::Exact(text),
            1 => StringMatch::Prefix(text),
            2 => StringMatch::Suffix(text),
            _ => StringMatch::Presence,
        }
    }

    fn account(&mut self) -> ServiceAccountMatch {
        ServiceAccountMatch { namespace: self.name(), service_account: self.name() }
    }

    fn one_match(&mut self) -> Match {
        Match {
            namespaces: self.list(Self::string_match),
            not_namespaces: self.list(Self::string_match),
            principals: self.list(Self::string_match),
            not_principals: self.list(Self::string_match),
            service_accounts: self.list(Self::account),
            not_service_accounts: self.list(Self::account),
            trust_domains: self.list(Self::string_match),
            not_trust_domains: self.list(Self::string_match),
            source_ips: self.list(Self::prefix),
            not_source_ips: self.list(Self::prefix),
            destination_ips: self.list(Self::prefix),
            not_destination_ips: self.list(Self::prefix),
            destination_ports: self.list(Self::port),
            not_destination_ports: self.list(Self::port),
            request: if self.coin() { self.request_match() } else { RequestMatch::default() },
        }
    }

    fn request_match(&mut self) -> RequestMatch {
        RequestMatch {
            hosts: self.list(Self::string_match),
            not_hosts: self.list(Self::string_match),
            methods: self.list(Self::string_match),
            not_methods: self.list(Self::string_match),
            paths: self.list(Self::path_match),
            not_paths: self.list(Self::path_match),
            headers: self.list(|dice| HeaderMatch {
                name: dice.name(),
                values: dice.list(Self::string_match),
                not_values: vec![dice.string_match()],
            }),
            principals: self.list(Self::string_match),
            not_principals: self.list(Self::string_match),
            claims: self.list(|dice| ClaimMatch {
                path: [dice.name(), dice.name()].into(),
                values: dice.list(Self::string_match),
                not_values: vec![dice.string_match()],
            }),
        }
    }

    fn path_match(&mut self) -> PathMatch {
        if self.coin() {
            PathMatch::Text(self.string_match())
        } else {
            PathMatch::Template(self.pick(&["/a/{*}", "/{**}", "/a/{**}/z"]).parse().unwrap())
        }
    }

    fn filter(&mut self) -> TrafficFilter {
        TrafficFilter {
            include_ports: self.list(Self::port).into_iter().collect(),
            exclude_ports: self.list(Self::port).into_iter().collect(),
            include_cidrs: self.list(Self::prefix),
            exclude_cidrs: self.list(Self::prefix),
        }
    }

    fn egress(&mut self) -> UnknownEgress {
        self.pick(&[UnknownEgress::Allow, UnknownEgress::Deny])
    }

    pub(crate) fn workload(&mut self) -> Workload {
        let tunnel_protocol = self.pick(&[TunnelProtocol::None, TunnelProtocol::Hbone]);
        let namespace =
            if tunnel_protocol == TunnelProtocol::Hbone { self.name() } else { self.text() };
        Workload {
            uid: WorkloadUid::new(&format!("c//Pod/{}/{}", self.name(), self.name())),
            name: self.text(),
            namespace,
            trust_domain: self.pick(&["cluster.local", "other.org"]).into(),
            service_account: self.name(),
            addresses: self.list(Self::ip),
            hostname: self.text(),
            network: self.network(),
            tunnel_protocol,
            network_mode: self.pick(&[NetworkMode::Standard, NetworkMode::HostNetwork]),
            network_gateway: self.maybe(Self::gateway),
            waypoint: self.maybe(Self::gateway),
            node: self.text(),
            canonical_name: self.text(),
            canonical_revision: self.text(),
            kind: self.pick(&[
                WorkloadKind::Deployment,
                WorkloadKind::CronJob,
                WorkloadKind::Pod,
                WorkloadKind::Job,
            ]),
            workload_name: self.text(),
            native_tunnel: self.coin(),
            application_tunnel: self.maybe(|dice| ApplicationTunnel {
                protocol: dice
                    .pick(&[ApplicationTunnelProtocol::None, ApplicationTunnelProtocol::Proxy]),
                port: dice.maybe(Self::port),
            }),
            services: self
                .list(|dice| (dice.hostname(), dice.list(Self::service_port)))
                .into_iter()
                .collect(),
            authorization_policies: self
                .list(|dice| format!("{}/{}", dice.name(), dice.name()).into()),
            status: self.pick(&[HealthStatus::Healthy, HealthStatus::Unhealthy]),
            cluster_id: self.name(),
            locality: Locality { region: self.text(), zone: self.text(), subzone: self.text() },
            capacity: self.number(),
        }
    }

    pub(crate) fn service(&mut self) -> Service {
        Service {
            name: self.text(),
            key: self.hostname(),
            vips: self.list(|dice| NetworkAddress::new(dice.network(), dice.ip())),
            cidr_vips: self.list(|dice| (dice.network(), dice.prefix())),
            ports: self.list(Self::service_port),
            subject_alt_names: self.list(Self::text),
            waypoint: self.maybe(Self::gateway),
            weighted_waypoints: self.list(|dice| WeightedWaypoint {
                destination: dice.gateway(),
                weight: dice.number(),
            }),
            load_balancing: LoadBalancing {
                routing_preference: self.list(|dice| {
                    dice.pick(&[
                        Scope::Network,
                        Scope::Region,
                        Scope::Zone,
                        Scope::Subzone,
                        Scope::Node,
                        Scope::Cluster,
                    ])
                }),
                mode: self.pick(&[
                    LoadBalancingMode::Standard,
                    LoadBalancingMode::Strict,
                    LoadBalancingMode::Failover,
                    LoadBalancingMode::Passthrough,
                ]),
                health_policy: self.pick(&[HealthPolicy::OnlyHealthy, HealthPolicy::AllowAll]),
            },
            ip_families: self.pick(&[
                IpFamilies::Automatic,
                IpFamilies::Ipv4Only,
                IpFamilies::Ipv6Only,
                IpFamilies::Dual,
            ]),
            canonical: self.coin(),
            visibility: self.pick(&[Visibility::Public, Visibility::Namespace]),
        }
    }

    pub(crate) fn policy(&mut self) -> Policy {
        Policy {
            name: PolicyName::new(&self.name(), &self.name()),
            origin: PolicyOrigin {
                kind: self.pick(&[
                    PolicyKind::AuthorizationPolicy,
                    PolicyKind::PeerAuthentication,
                    PolicyKind::Synthetic,
                ]),
                namespace: self.text(),
                name: self.text(),
                unreadable: self.coin().then(|| self.name()),
            },
            scope: self.pick(&[PolicyScope::Global, PolicyScope::Namespace, PolicyScope::Workload]),
            action: self.pick(&[Action::Allow, Action::Deny, Action::Audit]),
            dry_run: self.coin(),
            rules: self.list(|dice| Rule {
                clauses: dice.list(|dice| Clause { matches: dice.list(Self::one_match) }),
            }),
        }
    }

    pub(crate) fn mesh(&mut self) -> MeshConfig {
        MeshConfig {
            trust_domain: self.name(),
            root_pem: self.name(),
            crl_pem: self.text(),
            unknown_egress: self.list(|dice| (dice.name(), dice.egress())).into_iter().collect(),
            default_unknown_egress: self.egress(),
            cluster_domain: self.name(),
            pod_networks: self.filter().include_cidrs,
        }
    }

    pub(crate) fn pod(&mut self) -> PodConfig {
        PodConfig {
            uid: WorkloadUid::new(&format!("c//Pod/{}/{}", self.name(), self.name())),
            namespace: self.name(),
            name: self.name(),
            service_account: self.name(),
            pod_uid: self.text(),
            mode: self.pick(&[PodMode::None, PodMode::Ambient]),
            probe_ports: self.list(Self::port).into_iter().collect(),
            dns_capture: self.coin(),
            outbound: self.filter(),
            inbound: self.filter(),
            bypass_inbound: self.coin(),
            tunnel_same_node: self.coin(),
        }
    }

    pub(crate) fn resource(&mut self) -> Resource {
        match self.below(5) {
            0 => Resource::Mesh(self.mesh()),
            1 => Resource::Pod(self.pod()),
            2 => Resource::Policy(self.policy()),
            3 => Resource::Workload(self.workload()),
            _ => Resource::Service(self.service()),
        }
    }
}
