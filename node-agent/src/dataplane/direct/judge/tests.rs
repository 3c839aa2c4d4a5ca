use std::time::Duration;

use mesh_authorize::{
    Action, Clause, Match, Policy, PolicyKind, PolicyName, PolicyOrigin, PolicyScope, PolicySet,
    Rule, StringMatch,
};
use mesh_identity::{CaConfig, CaCore, IssuedAnswer, csr};
use mesh_model::{
    ApplicationTunnel, ApplicationTunnelProtocol, GatewayAddress, GatewayDestination,
    NamespacedHostname, NetworkId, TunnelProtocol,
};
use mesh_net::Netns;
use mesh_resolve::{IndexDelta, ResolveSettings, WorkloadIndex};

use super::*;

const CLIENT: &str = "10.0.0.1";
const SERVER: &str = "10.0.0.2";

/// Two pods of one node, both captured, with certificates, in a mesh without policies.
pub(in crate::dataplane::direct) struct Scene {
    same_node: SameNode,
    pub(in crate::dataplane::direct) snapshot: Snapshot,
    client: Workload,
    server: Workload,
    pods: [LocalPod; 2],
    wall: SystemTime,
}

fn id(account: &str) -> SpiffeId {
    SpiffeId::new("cluster.local", "shop", account).unwrap()
}

fn svid(ca: &CaCore, account: &str) -> Arc<Svid> {
    const DAY: Duration = Duration::from_secs(86_400);
    let (key, request) = csr(&id(account)).unwrap();
    let now = SystemTime::now();
    let chain = ca.sign(&request, &id(account), DAY, now).unwrap();
    Arc::new(IssuedAnswer::check(&chain, &id(account), key, now).unwrap().svid)
}

pub(in crate::dataplane::direct) fn workload(name: &str, address: &str) -> Workload {
    let mut workload = Workload::named(&format!("Kubernetes//Pod/shop/{name}"), "shop", name);
    workload.service_account = name.into();
    workload.addresses = vec![address.parse().unwrap()];
    workload.tunnel_protocol = TunnelProtocol::Hbone;
    workload
}

pub(in crate::dataplane::direct) fn local(name: &str, address: &str, cookie: u64) -> LocalPod {
    LocalPod {
        sockets: PodSockets {
            uid: PodUid::new(name),
            namespace: "shop".into(),
            name: name.into(),
            service_account: name.into(),
            netns: Arc::new(Netns::current().unwrap()),
            cookie,
            addresses: vec![address.parse().unwrap()],
            capture_inbound: true,
        },
        settings: Some(PodSettings::default()),
        leaves_at: None,
    }
}

impl Scene {
    pub(in crate::dataplane::direct) fn new() -> Self {
        let now = SystemTime::now();
        let ca = CaCore::create("cluster.local", CaConfig::default(), now).unwrap();
        let trust = TrustBundle::from_pem("cluster.local", &ca.root_bundle_pem(), "").unwrap();
        let svids = ["client", "server"].map(|name| (id(name), svid(&ca, name)));
        Self {
            same_node: SameNode::Direct,
            snapshot: Snapshot {
                index: WorkloadIndex::default(),
                policies: PolicySet::default(),
                synced: true,
                settings: ResolveSettings::default(),
                trust: Arc::new(trust),
                svids: svids.into_iter().collect(),
            },
            client: workload("client", CLIENT),
            server: workload("server", SERVER),
            pods: [local("client", CLIENT, 1), local("server", SERVER, 2)],
            wall: now,
        }
    }

    fn judge(self) -> Judged {
        let mut snapshot = self.snapshot;
        snapshot.index.apply(IndexDelta {
            workloads: vec![self.client, self.server],
            ..IndexDelta::default()
        });
        let mut pods = LocalPods::default();
        for pod in self.pods {
            pods.insert(pod);
        }
        let mut ground = Ground {
            same_node: self.same_node,
            snapshot: &snapshot,
            pods: &pods,
            certificates: &mut Certificates::default(),
            wall: self.wall,
        };
        let pair = Pair {
            client: Pod(1),
            client_address: CLIENT.parse().unwrap(),
            server: Pod(2),
            target: SocketAddr::new(SERVER.parse().unwrap(), 80),
        };
        judge(&mut ground, &pair)
    }
}

pub(in crate::dataplane::direct) fn policy(
    action: Action,
    dry_run: bool,
    principal: &str,
) -> Policy {
    let principals = vec![StringMatch::Exact(principal.into())];
    let one = Match { principals, ..Match::default() };
    Policy {
        name: PolicyName::new("shop", "p"),
        origin: PolicyOrigin::new(PolicyKind::AuthorizationPolicy, "shop", "p"),
        scope: PolicyScope::Namespace,
        action,
        dry_run,
        rules: vec![Rule { clauses: vec![Clause { matches: vec![one] }] }],
    }
}

pub(in crate::dataplane::direct) const THE_CLIENT: &str = "cluster.local/ns/shop/sa/client";

#[test]
fn two_captured_pods_talk_directly_and_both_are_named() {
    let judged = Scene::new().judge();
    assert_eq!(judged.judgement, Judgement::Grant, "{}", judged.because);
    let sides = &judged.sides;
    for facts in [&sides.source, &sides.destination] {
        assert_eq!(facts.source_principal, Some(id("client")));
        assert_eq!(facts.destination_principal, Some(id("server")));
        assert!(!facts.mutual_tls);
    }
    let mut scene = Scene::new();
    scene.snapshot.policies.upsert(policy(Action::Allow, false, THE_CLIENT));
    let judged = scene.judge();
    assert_eq!(judged.judgement, Judgement::Grant, "{}", judged.because);
    assert_eq!(judged.rule.unwrap().to_string(), "AuthorizationPolicy shop/p rule 0");
}

type Change = fn(&mut Scene);

#[test]
fn what_denies_ends_open_connections() {
    let check = |name: &str, change: Change, reason: CloseReason| {
        let mut scene = Scene::new();
        change(&mut scene);
        let judged = scene.judge();
        let found = (judged.judgement, judged.reason);
        assert_eq!(found, (Judgement::Deny, reason), "{name}: {}", judged.because);
    };
    check("setting", |scene| scene.same_node = SameNode::Tunnel, CloseReason::PolicyChanged);
    for number in [0, 1] {
        let mut scene = Scene::new();
        scene.pods[number].settings.as_mut().unwrap().tunnel_same_node = true;
        let judged = scene.judge();
        assert_eq!(judged.judgement, Judgement::Deny, "{number}: {}", judged.because);
    }
    check(
        "denying policy",
        |scene| {
            scene.snapshot.policies.upsert(policy(Action::Deny, false, THE_CLIENT));
        },
        CloseReason::PolicyDenied,
    );
    check(
        "allowing somebody else",
        |scene| {
            scene.snapshot.policies.upsert(policy(Action::Allow, false, "a/ns/b/sa/c"));
        },
        CloseReason::PolicyDenied,
    );
    check(
        "waypoint",
        |scene| {
            let host = NamespacedHostname::new("shop", "wp.shop.svc.cluster.local");
            let destination = GatewayDestination::Hostname(host);
            scene.server.waypoint = Some(GatewayAddress { destination, hbone_port: 15008 });
        },
        CloseReason::WaypointUnavailable,
    );
    check(
        "another root",
        |scene| {
            let ca = CaCore::create("cluster.local", CaConfig::default(), scene.wall).unwrap();
            let trust = TrustBundle::from_pem("cluster.local", &ca.root_bundle_pem(), "").unwrap();
            scene.snapshot.trust = Arc::new(trust);
        },
        CloseReason::TlsFailure,
    );
    check("gone", |scene| scene.pods[1].sockets.cookie = 3, CloseReason::Drained);
    check(
        "another address",
        |scene| scene.pods[0].sockets.addresses = vec!["10.0.0.9".parse().unwrap()],
        CloseReason::WrongDestination,
    );
}

#[test]
fn what_is_held_keeps_only_new_connections_with_the_agent() {
    let check = |name: &str, change: Change| {
        let mut scene = Scene::new();
        change(&mut scene);
        let judged = scene.judge();
        assert_eq!(judged.judgement, Judgement::Hold, "{name}: {}", judged.because);
    };
    check("not synced", |scene| scene.snapshot.synced = false);
    check("no certificate", |scene| drop(scene.snapshot.svids.remove(&id("server"))));
    check("certificate over", |scene| scene.wall += Duration::from_secs(40 * 86_400));
    check("not ready", |scene| scene.server.status = HealthStatus::Unhealthy);
    check("no tunnel", |scene| scene.server.tunnel_protocol = TunnelProtocol::None);
    check("host network", |scene| scene.server.network_mode = NetworkMode::HostNetwork);
    check("another network", |scene| scene.server.network = NetworkId::new("far"));
    check("unknown workload", |scene| scene.server.service_account = "other".into());
    check("leaving", |scene| scene.pods[1].leaves_at = Some(Instant::now()));
    check("being taken over", |scene| scene.pods[0].settings = None);
    check("audit", |scene| {
        scene.snapshot.policies.upsert(policy(Action::Audit, false, THE_CLIENT));
    });
    check("dry run", |scene| {
        scene.snapshot.policies.upsert(policy(Action::Deny, true, THE_CLIENT));
    });
    check("application tunnel", |scene| {
        let protocol = ApplicationTunnelProtocol::Proxy;
        scene.server.application_tunnel = Some(ApplicationTunnel { protocol, port: Some(81) });
    });
    check("excluded at the client", |scene| {
        let settings = scene.pods[0].settings.as_mut().unwrap();
        settings.outbound.exclude_ports.insert(80);
    });
    check("excluded at the server", |scene| {
        let settings = scene.pods[1].settings.as_mut().unwrap();
        settings.inbound.exclude_networks.push("10.0.0.0/8".parse().unwrap());
    });
    check("inbound bypassed", |scene| {
        scene.pods[1].settings.as_mut().unwrap().capture_inbound = false;
    });
}
