use std::collections::BTreeMap;

use mesh_authorize::{Action, PolicyScope};
use mesh_model::{
    HealthPolicy, HealthStatus, LoadBalancingMode, NetworkMode, SpiffeId, TunnelProtocol,
    Visibility,
};
use proptest::prelude::*;

use super::*;
use crate::manifest::{Format, Parsed, documents, objects as read_objects};

/// The changes that `manifests` stand for; every one must be valid.
fn upserts(manifests: &str) -> Vec<Change> {
    documents(manifests, Format::Yaml)
        .into_iter()
        .flat_map(|document| read_objects(&document.expect("valid YAML").value))
        .map(|(_, parsed)| match &parsed {
            Parsed::Object(object) => Change::Upsert(Arc::clone(object)),
            Parsed::Ignored { .. } | Parsed::Refused { .. } => panic!("{parsed:?}"),
        })
        .collect()
}

fn index_of(manifests: &str) -> Index {
    let mut index = Index::new(IndexSettings::default());
    index.apply(upserts(manifests));
    index
}

fn workload(index: &Index, uid: &str) -> Arc<Workload> {
    let all: Vec<_> = index.workloads().map(|workload| workload.uid.to_string()).collect();
    index
        .workloads
        .get(&WorkloadUid::new(uid))
        .unwrap_or_else(|| panic!("{uid} not in {all:?}"))
        .clone()
}

fn service(index: &Index, namespace: &str, host: &str) -> Arc<Service> {
    index
        .services()
        .find(|service| service.key == NamespacedHostname::new(namespace, host))
        .unwrap_or_else(|| panic!("{namespace}/{host}"))
        .clone()
}

fn policy(index: &Index, name: &str) -> Arc<Policy> {
    let all: Vec<_> = index.policies().map(|policy| policy.name.to_string()).collect();
    index
        .policies()
        .find(|policy| policy.name.to_string() == name)
        .unwrap_or_else(|| panic!("{name} not in {all:?}"))
        .clone()
}

fn listed(index: &Index, uid: &str) -> Vec<String> {
    workload(index, uid).authorization_policies.iter().map(ToString::to_string).collect()
}

mod notes;
mod waypoints;

const SHOP: &str = r#"
apiVersion: v1
kind: Namespace
metadata: {name: shop, labels: {culvert.dev/dataplane-mode: ambient}}
---
apiVersion: v1
kind: Node
metadata: {name: n1, labels: {topology.kubernetes.io/region: eu, topology.kubernetes.io/zone: eu-1}}
---
apiVersion: v1
kind: Service
metadata: {name: cart, namespace: shop}
spec:
  clusterIP: 10.96.0.10
  clusterIPs: [10.96.0.10, "fd00:96::10"]
  selector: {app: cart}
  ports: [{name: http, port: 80, targetPort: web}, {name: dns, port: 53, protocol: UDP}]
---
apiVersion: v1
kind: Pod
metadata:
  name: cart-abc-1
  namespace: shop
  labels: {app: cart, pod-template-hash: abc}
  ownerReferences: [{kind: ReplicaSet, name: cart-abc, controller: true}]
spec:
  nodeName: n1
  serviceAccountName: cart
  containers:
  - ports: [{name: web, containerPort: 8080}]
    readinessProbe: {httpGet: {port: web}}
    livenessProbe: {tcpSocket: {port: 9000}}
    startupProbe: {grpc: {port: 9001}}
status: {phase: Running, podIP: 10.0.1.5, podIPs: [{ip: 10.0.1.5}, {ip: "fd00:1::5"}], conditions: [{type: Ready, status: "True"}]}
"#;
const CART: &str = "Kubernetes//Pod/shop/cart-abc-1";

#[test]
fn a_pod_has_the_name_that_it_gives_itself() {
    let pod = |spec: &str| {
        let index = index_of(&format!(
            "apiVersion: v1\nkind: Pod\nmetadata: {{name: db-7f, namespace: shop}}\n\
             spec: {{nodeName: n1{spec}}}\nstatus: {{podIP: 10.1.0.9}}"
        ));
        workload(&index, "Kubernetes//Pod/shop/db-7f").hostname.to_string()
    };
    assert_eq!(pod(", hostname: first, subdomain: db"), "first.db.shop.svc.cluster.local");
    // Without a service to be named under it has none.
    assert_eq!(pod(", hostname: first"), "");
    assert_eq!(pod(", subdomain: db"), "");
}

#[test]
fn a_pod_becomes_a_workload() {
    let index = index_of(SHOP);
    let cart = workload(&index, CART);
    assert_eq!(cart.identity().unwrap().as_str(), "spiffe://cluster.local/ns/shop/sa/cart");
    assert_eq!(cart.tunnel_protocol, TunnelProtocol::Hbone);
    assert_eq!(
        (&*cart.workload_name, &*cart.canonical_name, &*cart.canonical_revision),
        ("cart", "cart", "latest")
    );
    assert_eq!((&*cart.locality.region, &*cart.locality.zone), ("eu", "eu-1"));
    assert_eq!(cart.addresses.len(), 2);
    let key = NamespacedHostname::new("shop", "cart.shop.svc.cluster.local");
    assert_eq!(
        cart.services[&key],
        [mesh_model::ServicePort { service_port: 80, target_port: 8080 }]
    );
    let found = service(&index, "shop", "cart.shop.svc.cluster.local");
    assert!(found.canonical && found.vips.len() == 2);
    assert_eq!(found.ports, [mesh_model::ServicePort { service_port: 80, target_port: 0 }]);
    let pod = index.pods().next().unwrap();
    assert_eq!(
        (pod.mode, pod.probe_ports.iter().copied().collect::<Vec<_>>()),
        (PodMode::Ambient, vec![8080, 9000, 9001])
    );
    assert!(index.runs_on("n1", &cart.identity().unwrap()));
    assert!(!index.runs_on("n2", &cart.identity().unwrap()));
    assert!(!index.runs_on("n1", &SpiffeId::new("other", "shop", "cart").unwrap()));
}

#[test]
fn pods_join_by_label_only() {
    let cases = [
        ("", "ambient", false, true),
        ("culvert.dev/dataplane-mode: none", "ambient", false, false),
        ("culvert.dev/dataplane-mode: ambient", "", false, true),
        ("istio.io/dataplane-mode: ambient", "", false, false),
        ("istio.io/dataplane-mode: ambient", "", true, true),
        ("culvert.dev/dataplane-mode: typo", "ambient", false, true),
        ("", "", true, false),
    ];
    for (label, namespace, istio_labels, expected) in cases {
        let mut index = Index::new(IndexSettings { istio_labels, ..IndexSettings::default() });
        let namespace = if namespace.is_empty() {
            String::new()
        } else {
            format!("culvert.dev/dataplane-mode: {namespace}")
        };
        index.apply(upserts(&format!(
            "apiVersion: v1\nkind: Namespace\nmetadata: {{name: a, labels: {{{namespace}}}}}\n---\napiVersion: v1\nkind: Pod\nmetadata: {{name: p, namespace: a, labels: {{{label}}}}}\nspec: {{nodeName: n}}\nstatus: {{podIP: 10.0.0.1}}\n"
        )));
        let hbone =
            workload(&index, "Kubernetes//Pod/a/p").tunnel_protocol == TunnelProtocol::Hbone;
        assert_eq!(hbone, expected, "{label} {namespace} {istio_labels}");
    }
}

/// A static pod's mirror has a uid of its own in the API; on its node the pod has its kubelet's.
#[test]
fn a_static_pod_is_named_as_its_node_names_it() {
    let pod_uid = |annotations: &str| {
        let index = index_of(&format!(
            "{{apiVersion: v1, kind: Pod, metadata: {{name: p, namespace: shop, uid: of-the-api, annotations: {{{annotations}}}}}, spec: {{nodeName: n}}, status: {{podIP: 10.0.0.1}}}}"
        ));
        index.pods().next().unwrap().pod_uid.to_string()
    };
    assert_eq!(pod_uid(""), "of-the-api");
    assert_eq!(pod_uid("kubernetes.io/config.mirror: of-the-kubelet"), "of-the-kubelet");
}

/// What the mesh itself needs to start is held out by all of its programs, or by none.
#[test]
fn the_default_exclusions_are_everybodys() {
    let excluded = IndexSettings::default().excluded_namespaces;
    assert!(mesh_model::EXCLUDED_NAMESPACES.iter().all(|name| excluded.contains(*name)));
    assert_eq!(excluded.len(), mesh_model::EXCLUDED_NAMESPACES.len());
}

#[test]
fn a_pods_word_about_its_node_counts_more_than_its_namespaces() {
    for (of_namespace, of_pod, tunnels) in [
        ("", "", false),
        ("culvert.dev/same-node: tunnel", "", true),
        ("culvert.dev/same-node: tunnel", "culvert.dev/same-node: direct", false),
        ("culvert.dev/same-node: direct", "culvert.dev/same-node: tunnel", true),
        ("", "culvert.dev/same-node: tunnel", true),
    ] {
        let pod = format!(
            "apiVersion: v1\nkind: Pod\nmetadata: {{name: p, namespace: a, annotations: {{{of_pod}}}}}\nspec: {{nodeName: n}}\n"
        );
        let namespace = |labels: &str| {
            format!(
                "apiVersion: v1\nkind: Namespace\nmetadata: {{name: a, labels: {{{labels}}}}}\n"
            )
        };
        let found = |index: &Index| index.pods().next().unwrap().tunnel_same_node;
        let index = index_of(&format!("{pod}---\n{}", namespace(of_namespace)));
        assert_eq!(found(&index), tunnels, "{of_namespace} {of_pod}");
        // Said later.
        let mut index = index_of(&pod);
        index.apply(upserts(&namespace(of_namespace)));
        assert_eq!(found(&index), tunnels, "{of_namespace} {of_pod}, later");
    }
}

#[test]
fn some_pods_are_never_captured() {
    for (spec, status, workload_exists, settings_exist) in [
        ("hostNetwork: true, nodeName: n", "podIP: 10.0.0.1", true, false),
        ("nodeName: n", "podIP: 10.0.0.1, phase: Succeeded", false, true),
        ("nodeName: n", "phase: Pending", false, true),
    ] {
        let index = index_of(&format!(
            "apiVersion: v1\nkind: Pod\nmetadata: {{name: p, namespace: a, labels: {{culvert.dev/dataplane-mode: ambient}}}}\nspec: {{{spec}}}\nstatus: {{{status}}}\n"
        ));
        assert_eq!(index.workloads().count() == 1, workload_exists, "{spec} {status}");
        assert_eq!(index.pods().count() == 1, settings_exist, "{spec} {status}");
        if let Some(workload) = index.workloads().next() {
            assert_eq!(workload.tunnel_protocol, TunnelProtocol::None);
            assert_eq!(workload.network_mode, NetworkMode::HostNetwork);
        }
    }
}

#[test]
fn a_running_pod_that_joins_is_announced_when_its_agent_reports_it() {
    let plain = "apiVersion: v1\nkind: Pod\nmetadata: {name: p, namespace: a}\nspec: {nodeName: n}\nstatus: {podIP: 10.0.0.1}\n";
    let joined = plain
        .replace("namespace: a}", "namespace: a, labels: {culvert.dev/dataplane-mode: ambient}}");
    let uid = "Kubernetes//Pod/a/p";
    let hbone = |index: &Index| workload(index, uid).tunnel_protocol == TunnelProtocol::Hbone;
    let mut index = index_of(plain);
    index.report("n", NodeReport::Connected);
    index.apply(upserts(&joined));
    assert!(!hbone(&index), "nobody would answer the tunnel yet");
    assert_eq!(
        index.pods().next().unwrap().mode,
        PodMode::Ambient,
        "the agent is asked to capture it"
    );
    assert!(
        index.report("m", NodeReport::Enrolled([Key::new("a", "p")].into())).is_empty(),
        "another node's word"
    );
    assert!(!index.report("n", NodeReport::Enrolled([Key::new("a", "p")].into())).is_empty());
    assert!(hbone(&index));
    index.report("n", NodeReport::Enrolled(BTreeSet::new()));
    index.report("n", NodeReport::Disconnected);
    index.apply(upserts(&joined.replace("10.0.0.1", "10.0.0.2")));
    assert!(hbone(&index), "a missing report takes nothing back");
    index.apply(upserts(plain));
    assert!(!hbone(&index));
    index.apply(upserts(&joined));
    assert!(hbone(&index), "no agent, nothing to wait for");
}

#[test]
fn slices_replace_the_selector() {
    let mut index = index_of(SHOP);
    let slice = r#"
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: cart-1, namespace: shop, labels: {kubernetes.io/service-name: cart}}
addressType: IPv4
ports: [{name: http, port: 8081}]
endpoints:
- {addresses: [10.0.1.5], conditions: {ready: READY}, targetRef: {kind: Pod, name: cart-abc-1}}
- {addresses: [192.0.2.7], nodeName: n1}
"#;
    let key = NamespacedHostname::new("shop", "cart.shop.svc.cluster.local");
    let port =
        |index: &Index| workload(index, CART).services.get(&key).map(|ports| ports[0].target_port);
    index.apply(upserts(&slice.replace("READY", "true")));
    assert_eq!(port(&index), Some(8081));
    let outside =
        workload(&index, "Kubernetes/discovery.k8s.io/EndpointSlice/shop/cart-1/192.0.2.7");
    assert_eq!(outside.network_mode, NetworkMode::HostNetwork);
    index.apply(upserts(&slice.replace("READY", "false")));
    assert_eq!(port(&index), None);
    let key = upserts(&slice.replace("READY", "true")).into_iter().map(|change| match change {
        Change::Upsert(object) => Change::Delete(object.key()),
        Change::Delete(_) => unreachable!(),
    });
    let delta = index.apply(key);
    assert_eq!(delta.removed_workloads.len(), 1);
    assert_eq!(port(&index), Some(8080), "the selector counts again");
}

#[test]
fn services_of_every_shape() {
    let base = "apiVersion: v1\nkind: Service\nmetadata: {name: s, namespace: a}\nspec: ";
    let of = |spec: &str| index_of(&format!("{base}{{ports: [{{port: 80}}], {spec}}}"));
    let one = |spec: &str| service(&of(spec), "a", "s.a.svc.cluster.local");
    assert_eq!(of("type: ExternalName, externalName: example.com").services().count(), 0);
    assert!(one("clusterIP: None").vips.is_empty());
    assert_eq!(one("internalTrafficPolicy: Local").load_balancing.mode, LoadBalancingMode::Strict);
    assert_eq!(one("trafficDistribution: PreferClose").load_balancing.routing_preference.len(), 3);
    assert_eq!(
        one("trafficDistribution: PreferSameNode").load_balancing.routing_preference.len(),
        5
    );
    assert_eq!(
        one("publishNotReadyAddresses: true").load_balancing.health_policy,
        HealthPolicy::AllowAll
    );
    assert_eq!(one("ipFamilies: [IPv6]").ip_families, mesh_model::IpFamilies::Ipv6Only);
}

#[test]
fn service_entries_of_every_resolution() {
    let entry = |spec: &str| {
        index_of(&format!(
            "apiVersion: networking.istio.io/v1\nkind: ServiceEntry\nmetadata: {{name: e, namespace: a}}\nspec: {{hosts: [x.example.com], ports: [{{number: 443, name: tls, protocol: TLS, targetPort: 8443}}], {spec}}}"
        ))
    };
    let none = service(
        &entry("addresses: [192.0.2.0/24, 198.51.100.1], resolution: NONE"),
        "a",
        "x.example.com",
    );
    assert_eq!(none.load_balancing.mode, LoadBalancingMode::Passthrough);
    assert_eq!((none.vips.len(), none.cidr_vips.len()), (1, 1));
    let fixed = entry(
        "resolution: STATIC, exportTo: ['.'], endpoints: [{address: 10.1.1.1, ports: {tls: 9443}, weight: 3}, {address: 10.1.1.1}]",
    );
    assert_eq!(service(&fixed, "a", "x.example.com").visibility, Visibility::Namespace);
    assert_eq!(service(&fixed, "a", "x.example.com").vips.len(), 2, "both families are assigned");
    let first = workload(&fixed, "Kubernetes/networking.istio.io/ServiceEntry/a/e/10.1.1.1");
    assert_eq!(first.services.values().next().unwrap()[0].target_port, 9443);
    assert_eq!(first.capacity, 3);
    let second = workload(&fixed, "Kubernetes/networking.istio.io/ServiceEntry/a/e/10.1.1.1/1");
    assert_eq!(second.services.values().next().unwrap()[0].target_port, 8443);
    let dns = entry("resolution: DNS");
    let implied = workload(&dns, "Kubernetes/networking.istio.io/ServiceEntry/a/e/x.example.com");
    assert_eq!((&*implied.hostname, implied.addresses.len()), ("x.example.com", 0));
    assert_eq!(
        service(&dns, "a", "x.example.com").vips,
        service(&entry("resolution: DNS"), "a", "x.example.com").vips
    );
    let selecting = index_of(&format!(
        "{}\n---\n{}",
        SHOP,
        "apiVersion: networking.istio.io/v1beta1\nkind: ServiceEntry\nmetadata: {name: e, namespace: shop}\nspec: {hosts: [c.example], resolution: STATIC, ports: [{number: 70, name: web}], workloadSelector: {labels: {app: cart}}}\n---\napiVersion: networking.istio.io/v1\nkind: WorkloadEntry\nmetadata: {name: vm, namespace: shop, annotations: {culvert.dev/node: n1}}\nspec: {address: 10.7.0.1, labels: {app: cart}, serviceAccount: vm, ports: {web: 7070}}"
    ));
    let key = NamespacedHostname::new("shop", "c.example");
    assert_eq!(
        workload(&selecting, CART).services[&key][0].target_port,
        8080,
        "the pod's port of that name"
    );
    let vm = workload(&selecting, "Kubernetes/networking.istio.io/WorkloadEntry/shop/vm");
    assert_eq!(vm.services[&key][0].target_port, 7070);
    assert_eq!((vm.tunnel_protocol, vm.status), (TunnelProtocol::Hbone, HealthStatus::Healthy));
    assert!(selecting.runs_on("n1", &vm.identity().unwrap()));
}

#[test]
fn a_kubernetes_service_wins_over_an_entry_of_the_same_host() {
    let entry = "apiVersion: networking.istio.io/v1\nkind: ServiceEntry\nmetadata: {name: NAME, namespace: NS, creationTimestamp: \"TIME\"}\nspec: {hosts: [cart.shop.svc.cluster.local], ports: [{number: 1}], resolution: STATIC}\n";
    let of = |name: &str, namespace: &str, time: &str| {
        entry.replace("NAME", name).replace("NS", namespace).replace("TIME", time)
    };
    let both = format!(
        "{SHOP}\n---\n{}---\n{}",
        of("a", "shop", "2020-01-01T00:00:00Z"),
        of("b", "other", "2021-01-01T00:00:00Z")
    );
    let index = index_of(&both);
    assert_eq!(&*service(&index, "shop", "cart.shop.svc.cluster.local").name, "cart");
    assert!(!service(&index, "other", "cart.shop.svc.cluster.local").canonical);
    let entries = index_of(&format!(
        "{}---\n{}",
        of("young", "shop", "2022-01-01T00:00:00Z"),
        of("old", "other", "2021-01-01T00:00:00Z")
    ));
    assert!(service(&entries, "other", "cart.shop.svc.cluster.local").canonical);
    assert!(!service(&entries, "shop", "cart.shop.svc.cluster.local").canonical);
}

fn authorization(metadata: &str, spec: &str) -> String {
    format!(
        "---\napiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {{{metadata}}}\nspec: {{{spec}}}\n"
    )
}

#[test]
fn policies_get_their_scope() {
    let rules = "rules: [{from: [{source: {principals: [\"cluster.local/ns/a/*\"]}}]}]";
    let index = index_of(
        &[
            SHOP,
            &authorization("name: mesh, namespace: istio-system", rules),
            &authorization("name: all, namespace: shop", rules),
            &authorization(
                "name: cart, namespace: shop",
                &format!("selector: {{matchLabels: {{app: cart}}}}, {rules}"),
            ),
            &authorization(
                "name: other, namespace: shop",
                &format!("selector: {{matchLabels: {{app: other}}}}, {rules}"),
            ),
            &authorization(
                "name: everywhere, namespace: istio-system",
                &format!("selector: {{matchLabels: {{app: cart}}}}, {rules}"),
            ),
            &authorization(
                "name: dry, namespace: shop, annotations: {istio.io/dry-run: \"true\"}",
                "action: AUDIT, rules: [{}]",
            ),
        ]
        .concat(),
    );
    assert_eq!(policy(&index, "istio-system/mesh").scope, PolicyScope::Global);
    assert_eq!(policy(&index, "shop/all").scope, PolicyScope::Namespace);
    assert_eq!(listed(&index, CART), ["istio-system/everywhere", "shop/cart"]);
    let dry = policy(&index, "shop/dry");
    assert!(dry.dry_run && dry.action == Action::Audit && dry.rules[0].clauses.is_empty());
}

#[test]
fn layer_7_content_fails_closed_and_says_so() {
    let of = |spec: &str| {
        let index = index_of(&[SHOP, &authorization("name: p, namespace: shop", spec)].concat());
        let status = index.policy_status().into_values().next().unwrap();
        (policy(&index, "shop/p"), status)
    };
    let (allow, status) = of(
        "rules: [{to: [{operation: {methods: [GET]}}]}, {to: [{operation: {ports: [\"80\"]}}]}]",
    );
    assert_eq!(allow.rules.len(), 1, "the rule that cannot be judged allows nothing");
    assert!(!status.enforced_as_written && status.notes[0].contains("methods"), "{status:?}");
    let (deny, _) = of(
        "action: DENY, rules: [{from: [{source: {namespaces: [x]}}], to: [{operation: {methods: [GET], ports: [\"80\"]}}]}]",
    );
    assert_eq!(deny.rules[0].clauses.len(), 2);
    assert_eq!(deny.rules[0].clauses[0].matches[0].destination_ports, [80]);
    let (wider, _) = of(
        "action: DENY, rules: [{from: [{source: {namespaces: [x]}}], to: [{operation: {methods: [GET]}}]}]",
    );
    assert_eq!(wider.rules[0].clauses.len(), 1, "only `from` is left");
    let (everything, status) = of(
        "action: DENY, rules: [{to: [{operation: {paths: [/admin]}}], when: [{key: \"request.headers[x]\", values: [y]}]}]",
    );
    assert!(everything.rules[0].clauses.is_empty());
    assert!(status.notes[0].contains("denies everything it selects"), "{status:?}");
}

/// The stand-in of a policy that cannot be read.
fn unreadable(manifest: &str) -> Change {
    let document = documents(manifest, Format::Yaml).remove(0).expect("valid YAML");
    match read_objects(&document.value).remove(0).1 {
        Parsed::Refused { unreadable: Some(policy), .. } => {
            Change::Upsert(Arc::new(Object::Unreadable(Arc::new(*policy))))
        }
        other @ (Parsed::Object(_) | Parsed::Ignored { .. } | Parsed::Refused { .. }) => {
            panic!("{other:?}")
        }
    }
}

#[test]
fn unreadable_policies_deny_where_they_may_belong() {
    let selects = "selector: {matchLabels: {app: cart}}, action: MAYBE";
    let cart = "Kubernetes//Pod/shop/cart-1";
    let pod = "apiVersion: v1\nkind: Pod\nmetadata: {name: cart-1, namespace: shop, labels: {app: cart}}\nspec: {nodeName: n}\nstatus: {podIP: 10.0.0.1}\n---\napiVersion: v1\nkind: Service\nmetadata: {name: cart, namespace: shop}\nspec: {selector: {app: cart}, ports: [{port: 80, targetPort: 8080}]}\n";
    for (metadata, spec, name, scope, lists) in [
        (
            "{name: p, namespace: shop}",
            selects,
            "shop/unreadable_AuthorizationPolicy_p",
            PolicyScope::Workload,
            true,
        ),
        (
            "{name: p, namespace: istio-system}",
            selects,
            "istio-system/unreadable_AuthorizationPolicy_p",
            PolicyScope::Workload,
            true,
        ),
        (
            "{name: p, namespace: bank}",
            selects,
            "bank/unreadable_AuthorizationPolicy_p",
            PolicyScope::Workload,
            false,
        ),
        (
            "{name: p, namespace: shop}",
            "action: MAYBE",
            "shop/unreadable_AuthorizationPolicy_p",
            PolicyScope::Namespace,
            false,
        ),
        (
            "{name: p}",
            "action: MAYBE",
            "default/unreadable_AuthorizationPolicy_p",
            PolicyScope::Namespace,
            false,
        ),
        (
            "{name: p, namespace: istio-system}",
            "action: MAYBE",
            "istio-system/unreadable_AuthorizationPolicy_p",
            PolicyScope::Global,
            false,
        ),
        (
            "{name: p, namespace: [x]}",
            selects,
            "istio-system/unreadable_AuthorizationPolicy_p",
            PolicyScope::Global,
            false,
        ),
        (
            "{name: p, namespace: shop}",
            "targetRefs: [{kind: Service, name: cart}], action: MAYBE",
            "shop/unreadable_AuthorizationPolicy_p_service_cart",
            PolicyScope::Workload,
            true,
        ),
    ] {
        let manifest = format!(
            "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {metadata}\nspec: {{{spec}}}\n"
        );
        let mut index = index_of(pod);
        let before = listed(&index, cart);
        let change = unreadable(&manifest);
        index.apply([change.clone()]);
        let made = policy(&index, name);
        assert_eq!(
            (made.scope, made.action, made.rules.len()),
            (scope, Action::Deny, 1),
            "{manifest}"
        );
        assert!(made.origin.to_string().contains("/p (unreadable: "), "{}", made.origin);
        assert_eq!(listed(&index, cart).contains(&name.to_owned()), lists, "{manifest}");
        assert!(index.policy_status().values().all(|status| status.denying), "{manifest}");
        // In whatever order they come.
        let mut other = Index::new(IndexSettings::default());
        other.apply([change]);
        other.apply(upserts(pod));
        assert_eq!(other.policies().collect::<Vec<_>>(), index.policies().collect::<Vec<_>>());
        assert_eq!(listed(&other, cart), listed(&index, cart));
        // A good version takes its place; a deletion ends it.
        let key = index.policy_status().into_keys().next().unwrap();
        let mut removed = index;
        removed.apply([Change::Delete(key)]);
        assert_eq!((removed.policies().count(), listed(&removed, cart)), (0, before), "{manifest}");
    }
    let peer = "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {name: p, namespace: shop}\nspec: {mtls: {mode: MAYBE}}\n";
    let mut index = index_of(pod);
    index.apply([unreadable(peer)]);
    let made = policy(&index, "shop/unreadable_PeerAuthentication_p");
    assert_eq!(made.rules[0].clauses.len(), 1, "it can only refuse what proves no identity");
    index.apply(upserts(&peer.replace("MAYBE", "PERMISSIVE")));
    assert_eq!(index.policies().count(), 0, "a good version has taken its place");
}

#[test]
fn target_policies_are_enforced_at_the_endpoints() {
    let target = "targetRefs: [{kind: Service, name: cart}]";
    let index = index_of(
        &[
            SHOP,
            &authorization(
                "name: one, namespace: shop",
                &format!("{target}, rules: [{{from: [{{source: {{namespaces: [a]}}}}]}}]"),
            ),
            &authorization(
                "name: two, namespace: shop",
                &format!("{target}, rules: [{{from: [{{source: {{namespaces: [b]}}}}]}}]"),
            ),
            &authorization(
                "name: no, namespace: shop",
                &format!("{target}, action: DENY, rules: [{{}}]"),
            ),
        ]
        .concat(),
    );
    assert_eq!(listed(&index, CART), ["shop/allow_service_cart", "shop/no_service_cart"]);
    let allow = policy(&index, "shop/allow_service_cart");
    assert_eq!((allow.action, allow.rules.len()), (Action::Deny, 1));
    let clauses = &allow.rules[0].clauses;
    assert_eq!(clauses[0].matches[0].destination_ports, [8080]);
    assert_eq!(clauses.len(), 3, "neither from a nor from b");
    assert_eq!(&*allow.origin.name, "one+two");
    let mut bound = index;
    let label = SHOP.replace(
        "name: cart, namespace: shop}",
        "name: cart, namespace: shop, labels: {culvert.dev/use-waypoint: wp}}",
    );
    bound.apply(upserts(&label));
    assert!(listed(&bound, CART).is_empty(), "the waypoint enforces them");
    let names: Vec<_> = bound.policies().map(|policy| policy.name.to_string()).collect();
    assert_eq!(names, ["shop/no", "shop/one", "shop/two"], "as they are written, for the waypoint");
    assert!(service(&bound, "shop", "cart.shop.svc.cluster.local").waypoint.is_some());
}

fn peer(metadata: &str, spec: &str) -> String {
    format!(
        "---\napiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {{{metadata}}}\nspec: {{{spec}}}\n"
    )
}

#[test]
fn the_closest_peer_authentication_counts() {
    let mesh = peer("name: mesh, namespace: istio-system", "mtls: {mode: STRICT}");
    let selector = "selector: {matchLabels: {app: cart}}";
    let own = |spec: &str| peer("name: own, namespace: shop", &format!("{selector}, {spec}"));
    let namespace =
        |mode: &str| peer("name: ns, namespace: shop", &format!("mtls: {{mode: {mode}}}"));
    let converted = |name: &str| {
        vec![format!(
            "{}/converted_peer_authentication_{name}",
            if name == "mesh" { "istio-system" } else { "shop" }
        )]
    };
    let cases = [
        (vec![], vec![]),
        (vec![mesh.clone()], converted("mesh")),
        (vec![mesh.clone(), namespace("PERMISSIVE")], vec![]),
        (vec![mesh.clone(), namespace("UNSET")], converted("mesh")),
        (vec![namespace("STRICT")], converted("ns")),
        (vec![mesh.clone(), own("mtls: {mode: DISABLE}")], vec![]),
        (vec![mesh.clone(), own("mtls: {mode: UNSET}")], converted("mesh")),
        (vec![own("mtls: {mode: STRICT}")], converted("own")),
        (vec![own("portLevelMtls: {8080: {mode: STRICT}}")], converted("own")),
        (vec![mesh.clone(), own("portLevelMtls: {8080: {mode: STRICT}}")], converted("mesh")),
        (vec![mesh, own("portLevelMtls: {8080: {mode: PERMISSIVE}}")], converted("own")),
        (
            vec![peer(
                "name: mesh, namespace: istio-system",
                &format!("{selector}, mtls: {{mode: STRICT}}"),
            )],
            vec![],
        ),
    ];
    for (objects, expected) in cases {
        let index = index_of(&format!("{SHOP}{}", objects.concat()));
        assert_eq!(listed(&index, CART), expected, "{objects:?}");
        for name in expected {
            policy(&index, &name);
        }
    }
}

#[test]
fn port_exemptions_are_carved_out_of_strict() {
    let index = index_of(&[
        SHOP,
        &peer("name: own, namespace: shop", "selector: {matchLabels: {app: cart}}, mtls: {mode: STRICT}, portLevelMtls: {8080: {mode: PERMISSIVE}, 8081: {mode: DISABLE}, 8082: {mode: STRICT}}"),
    ].concat());
    let own = policy(&index, "shop/converted_peer_authentication_own");
    assert_eq!(own.rules.len(), 1);
    assert_eq!(own.rules[0].clauses.len(), 3);
    assert_eq!(own.rules[0].clauses[2].matches[0].not_destination_ports, [8081]);
    assert_eq!(&*own.origin.name, "own");
}

#[test]
fn egress_follows_the_namespace() {
    let mut index = index_of(SHOP);
    assert!(index.egress().is_empty());
    let deny = "apiVersion: v1\nkind: Namespace\nmetadata: {name: shop, annotations: {culvert.dev/unknown-egress: deny}}";
    let delta = index.apply(upserts(deny));
    assert_eq!(delta.egress, [("shop".into(), Some(UnknownEgress::Deny))]);
    assert_eq!(index.apply(upserts(SHOP)).egress, [("shop".into(), None)]);
}

#[test]
fn a_small_change_has_a_small_delta() {
    let mut manifests = String::from(SHOP);
    for n in 0..100 {
        manifests.push_str(&format!(
            "---\napiVersion: v1\nkind: Pod\nmetadata: {{name: p{n}, namespace: shop, labels: {{app: cart}}}}\nspec: {{nodeName: n1}}\nstatus: {{podIP: 10.1.0.{n}, phase: Running}}\n"
        ));
    }
    let mut index = index_of(&manifests);
    assert!(index.apply(upserts(&manifests)).is_empty(), "the same again is no change");
    let one = "apiVersion: v1\nkind: Pod\nmetadata: {name: p7, namespace: shop, labels: {app: cart}}\nspec: {nodeName: n1}\nstatus: {podIP: 10.1.0.7, phase: Running, conditions: [{type: Ready, status: \"False\"}]}";
    let delta = index.apply(upserts(one));
    assert_eq!(delta.workloads.len(), 1);
    assert_eq!(delta, Delta { workloads: delta.workloads.clone(), ..Delta::default() });
}

/// What agents would hold after applying every delta.
#[derive(Debug, Default, PartialEq)]
struct Mirror {
    workloads: BTreeMap<String, Arc<Workload>>,
    services: BTreeMap<String, Arc<Service>>,
    policies: BTreeMap<String, Arc<Policy>>,
    pods: BTreeMap<String, Arc<PodSettings>>,
    egress: BTreeMap<Arc<str>, UnknownEgress>,
    frontends: BTreeMap<FrontendName, Arc<Frontend>>,
    routes: BTreeMap<RouteName, Arc<PublishedRoute>>,
}

impl Mirror {
    fn of(index: &Index) -> Self {
        Self {
            workloads: index.workloads().map(|one| (one.uid.to_string(), one.clone())).collect(),
            services: index.services().map(|one| (one.key.to_string(), one.clone())).collect(),
            policies: index.policies().map(|one| (one.name.to_string(), one.clone())).collect(),
            pods: index.pods().map(|one| (one.uid.to_string(), one.clone())).collect(),
            egress: index.egress().clone(),
            frontends: index
                .frontends()
                .map(|one| (one.config.frontend.clone(), one.clone()))
                .collect(),
            routes: index.routes().map(|one| (one.route.name.clone(), one.clone())).collect(),
        }
    }

    fn apply(&mut self, delta: Delta) {
        for uid in delta.removed_workloads {
            self.workloads.remove(uid.as_str()).expect("removed once");
        }
        for key in delta.removed_services {
            self.services.remove(&key.to_string()).expect("removed once");
        }
        for name in delta.removed_policies {
            self.policies.remove(&name.to_string()).expect("removed once");
        }
        for uid in delta.removed_pods {
            self.pods.remove(uid.as_str()).expect("removed once");
        }
        for name in delta.removed_frontends {
            self.frontends.remove(&name).expect("removed once");
        }
        for name in delta.removed_routes {
            self.routes.remove(&name).expect("removed once");
        }
        let frontends = delta.frontends.into_iter();
        self.frontends.extend(frontends.map(|one| (one.config.frontend.clone(), one)));
        self.routes.extend(delta.routes.into_iter().map(|one| (one.route.name.clone(), one)));
        self.workloads.extend(delta.workloads.into_iter().map(|one| (one.uid.to_string(), one)));
        self.services.extend(delta.services.into_iter().map(|one| (one.key.to_string(), one)));
        self.policies.extend(delta.policies.into_iter().map(|one| (one.name.to_string(), one)));
        self.pods.extend(delta.pods.into_iter().map(|one| (one.uid.to_string(), one)));
        for (namespace, egress) in delta.egress {
            match egress {
                Some(egress) => self.egress.insert(namespace, egress),
                None => self.egress.remove(&namespace),
            };
        }
    }
}

fn label() -> impl Strategy<Value = &'static str> {
    prop_oneof![
        Just(""),
        Just("app: a"),
        Just("app: b"),
        Just("app: a, culvert.dev/dataplane-mode: ambient"),
        Just("app: b, culvert.dev/use-waypoint: s0")
    ]
}

fn selector() -> impl Strategy<Value = &'static str> {
    prop_oneof![Just(""), Just("app: a"), Just("app: b")]
}

fn namespace() -> impl Strategy<Value = &'static str> {
    prop_oneof![Just("n0"), Just("n1"), Just("istio-system")]
}

/// One object of a small world in which most objects concern each other.
fn manifest() -> impl Strategy<Value = String> {
    let name = 0..3u8;
    prop_oneof![
        (namespace(), prop_oneof![Just(""), Just("culvert.dev/dataplane-mode: ambient"), Just("culvert.dev/use-waypoint: wp"), Just("culvert.dev/unknown-egress: deny")])
            .prop_map(|(ns, label)| format!("apiVersion: v1\nkind: Namespace\nmetadata: {{name: {ns}, labels: {{{label}}}}}")),
        (0..2u8, 0..2u8).prop_map(|(n, zone)| format!("apiVersion: v1\nkind: Node\nmetadata: {{name: node{n}, labels: {{topology.kubernetes.io/zone: z{zone}}}}}")),
        (namespace(), name.clone(), label(), 0..2u8, 0..3u8, 0..3u8).prop_map(|(ns, n, label, node, ip, port)| format!(
            "apiVersion: v1\nkind: Pod\nmetadata: {{name: p{n}, namespace: {ns}, labels: {{{label}}}}}\nspec: {{nodeName: node{node}, containers: [{{ports: [{{name: web, containerPort: 800{port}}}]}}]}}\nstatus: {{phase: Running, podIPs: {}}}",
            if ip == 0 { "[]".to_owned() } else { format!("[{{ip: 10.0.{n}.{ip}}}]") })),
        (namespace(), name.clone(), selector(), 0..3u8, label()).prop_map(|(ns, n, selector, shape, label)| format!(
            "apiVersion: v1\nkind: Service\nmetadata: {{name: s{n}, namespace: {ns}, labels: {{{label}}}}}\nspec: {{selector: {{{selector}}}, clusterIP: {}, ports: [{{name: http, port: 80, targetPort: {}}}], type: {}}}",
            if shape == 0 { "None".to_owned() } else { format!("10.96.{n}.1") }, if shape == 1 { "web" } else { "8080" }, if shape == 2 && n == 2 { "ExternalName" } else { "ClusterIP" })),
        (namespace(), name.clone(), name.clone(), name.clone(), any::<bool>()).prop_map(|(ns, n, service, pod, ready)| format!(
            "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {{name: x{n}, namespace: {ns}, labels: {{kubernetes.io/service-name: s{service}}}}}\nports: [{{name: http, port: 900{n}}}]\nendpoints: [{{addresses: [10.0.0.{pod}], conditions: {{ready: {ready}}}, targetRef: {{kind: Pod, name: p{pod}}}}}, {{addresses: [192.0.2.{n}], nodeName: node0}}]")),
        (namespace(), name.clone(), label(), 0..2u8).prop_map(|(ns, n, label, node)| format!(
            "apiVersion: networking.istio.io/v1\nkind: WorkloadEntry\nmetadata: {{name: w{n}, namespace: {ns}, labels: {{{label}}}{}}}\nspec: {{address: 10.9.0.{n}, ports: {{http: 77}}}}",
            if node == 0 { "" } else { ", annotations: {culvert.dev/node: node1}" })),
        (namespace(), name.clone(), selector(), 0..4u8, 0..3u8).prop_map(|(ns, n, selector, shape, host)| format!(
            "apiVersion: networking.istio.io/v1\nkind: ServiceEntry\nmetadata: {{name: e{n}, namespace: {ns}}}\nspec: {{hosts: [h{host}.example, s0.n0.svc.cluster.local], ports: [{{number: 80, name: http}}], {}}}",
            match shape {
                0 => "resolution: NONE, addresses: [240.240.0.0/16]".to_owned(),
                1 => "resolution: DNS".to_owned(),
                2 => format!("resolution: STATIC, workloadSelector: {{labels: {{{selector}}}}}"),
                _ => format!("resolution: STATIC, addresses: [240.240.{n}.{host}], endpoints: [{{address: 10.8.0.{n}}}]"),
            })),
        (namespace(), name.clone(), selector(), 0..6u8, name.clone()).prop_map(|(ns, n, selector, shape, target)| {
            let rules = "rules: [{from: [{source: {namespaces: [x]}}], to: [{operation: {ports: [\"1\"]}}]}]";
            let body = match shape {
                0 => rules.to_owned(),
                1 => format!("selector: {{matchLabels: {{{selector}}}}}, {rules}"),
                2 => format!("targetRefs: [{{kind: Service, name: s{target}}}], {rules}"),
                3 => format!("targetRefs: [{{kind: Service, name: s{target}}}, {{kind: Service, name: s0}}], action: DENY, {rules}"),
                4 => format!("targetRefs: [{{group: networking.istio.io, kind: ServiceEntry, name: e{target}}}], {rules}"),
                _ => format!("selector: {{matchLabels: {{{selector}}}}}, action: DENY, {rules}"),
            };
            format!("apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {{name: a{n}, namespace: {ns}}}\nspec: {{{body}}}")
        }),
        (namespace(), name.clone(), any::<bool>()).prop_map(|(ns, n, ours)| format!(
            "apiVersion: gateway.networking.k8s.io/v1\nkind: Gateway\nmetadata: {{name: {}, namespace: {ns}}}\nspec: {{gatewayClassName: {}}}",
            if n == 0 { "wp".to_owned() } else { format!("s{n}") }, if ours { "culvert-waypoint" } else { "other" })),
        (namespace(), namespace(), name.clone(), 0..4u8, any::<bool>()).prop_map(|(ns, other, n, shape, grpc)| format!(
            "apiVersion: gateway.networking.k8s.io/v1\nkind: {}\nmetadata: {{name: r{n}, namespace: {ns}}}\nspec: {{parentRefs: [{}], rules: [{{backendRefs: [{{name: s{n}, namespace: {other}, port: 80}}]}}]}}",
            if grpc { "GRPCRoute" } else { "HTTPRoute" },
            match shape {
                0 => "{name: wp}".to_owned(),
                1 => format!("{{group: networking.istio.io, kind: ServiceEntry, name: e{n}}}"),
                2 => format!("{{group: '', kind: Service, name: s{n}, port: 81}}"),
                _ => format!("{{group: '', kind: Service, name: s{n}, namespace: {other}}}"),
            })),
        (namespace(), namespace()).prop_map(|(ns, from)| format!(
            "apiVersion: gateway.networking.k8s.io/v1\nkind: ReferenceGrant\nmetadata: {{name: g, namespace: {ns}}}\nspec: {{from: [{{group: gateway.networking.k8s.io, kind: HTTPRoute, namespace: {from}}}], to: [{{group: '', kind: Service}}]}}")),
        (namespace(), name.clone()).prop_map(|(ns, n)| format!(
            "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {{name: g{n}, namespace: {ns}}}\nspec: {{targetRefs: [{{group: gateway.networking.k8s.io, kind: {}, name: {}}}], rules: [{{to: [{{operation: {{paths: [/x]}}}}]}}]}}",
            if n == 0 { "GatewayClass" } else { "Gateway" }, if n == 0 { "culvert-waypoint" } else { "wp" })),
        (namespace(), name, selector(), 0..3u8, 0..3u8).prop_map(|(ns, n, selector, mode, port)| {
            let modes = ["UNSET", "PERMISSIVE", "STRICT"];
            let ports = if selector.is_empty() { String::new() } else { format!(", selector: {{matchLabels: {{{selector}}}}}, portLevelMtls: {{8080: {{mode: {}}}}}", modes[usize::from(port)]) };
            format!("apiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {{name: m{n}, namespace: {ns}}}\nspec: {{mtls: {{mode: {}}}{ports}}}", modes[usize::from(mode)])
        }),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn incremental_equals_rebuilt(steps in prop::collection::vec((manifest(), prop::bool::weighted(0.3), any::<bool>()), 1..60)) {
        let mut index = Index::new(IndexSettings::default());
        let mut mirror = Mirror::default();
        let mut current: BTreeMap<ObjectKey, Arc<Object>> = BTreeMap::new();
        let mut batch = Vec::new();
        let count = steps.len();
        for (at, (manifest, delete, flush)) in steps.into_iter().enumerate() {
            for change in upserts(&manifest) {
                let Change::Upsert(object) = change else { unreachable!() };
                if delete {
                    current.remove(&object.key());
                    batch.push(Change::Delete(object.key()));
                } else {
                    current.insert(object.key(), object.clone());
                    batch.push(Change::Upsert(object));
                }
            }
            if flush || at + 1 == count {
                mirror.apply(index.apply(std::mem::take(&mut batch)));
            }
        }
        let mut rebuilt = Index::new(IndexSettings::default());
        rebuilt.apply(current.into_values().rev().map(Change::Upsert));
        prop_assert_eq!(&Mirror::of(&index), &Mirror::of(&rebuilt));
        prop_assert_eq!(&mirror, &Mirror::of(&rebuilt));
        for workload in index.workloads() {
            for name in &workload.authorization_policies {
                prop_assert!(index.policies().any(|policy| policy.name.to_string() == **name), "{} lists {}", workload.uid, name);
            }
        }
        for frontend in index.frontends() {
            for name in &frontend.config.policies {
                prop_assert!(index.policies().any(|policy| policy.name.to_string() == **name), "{:?} lists {}", frontend.config, name);
            }
        }
    }
}

#[test]
fn networks_of_pods_come_from_the_nodes_joined_and_follow_them() {
    let node = |name: &str, cidrs: &str| {
        upserts(&format!(
            "{{apiVersion: v1, kind: Node, metadata: {{name: {name}}}, spec: {{podCIDRs: [{cidrs}]}}}}"
        ))
    };
    let mut index = Index::new(IndexSettings::default());
    let mut told = |changes: Vec<Change>| {
        let texts = |networks: Vec<IpPrefix>| {
            networks.iter().map(ToString::to_string).collect::<Vec<_>>().join(" ")
        };
        index.apply(changes).pod_networks.map(texts)
    };
    assert_eq!(
        told(node("n1", "10.1.0.0/24, 'fd00:0:0:1::/64'")).unwrap(),
        "10.1.0.0/24 fd00:0:0:1::/64"
    );
    assert_eq!(told(node("n2", "10.1.1.0/24")).unwrap(), "10.1.0.0/23 fd00:0:0:1::/64");
    assert_eq!(told(node("n3", "10.1.1.128/25")), None);
    assert_eq!(told(node("n1", "")).unwrap(), "10.1.1.0/24");
    let bad = "{apiVersion: v1, kind: Node, metadata: {name: n}, spec: {podCIDRs: [10.1.0.0/33]}}";
    let document = documents(bad, Format::Yaml).into_iter().next().unwrap().unwrap();
    assert!(matches!(read_objects(&document.value)[0].1, Parsed::Refused { .. }));
}

#[test]
fn networks_of_pods_that_are_told_count_beside_those_of_nodes() {
    let settings = |cidrs: &[&str]| IndexSettings {
        pod_networks: cidrs.iter().map(|cidr| cidr.parse().unwrap()).collect(),
        ..IndexSettings::default()
    };
    let texts = |index: &Index| {
        index.pod_networks().iter().map(ToString::to_string).collect::<Vec<_>>().join(" ")
    };
    // Before any node is known.
    let mut index = Index::new(settings(&["10.2.0.0/24", "10.2.1.0/24", "fd00:2::/32"]));
    assert_eq!(texts(&index), "10.2.0.0/23 fd00:2::/32");
    let node = "{apiVersion: v1, kind: Node, metadata: {name: n}, spec: {podCIDRs: [10.1.0.0/24]}}";
    let changes = upserts(node);
    let Change::Upsert(object) = &changes[0] else { panic!("{changes:?}") };
    let key = object.key();
    assert!(index.apply(changes).pod_networks.is_some());
    assert_eq!(texts(&index), "10.1.0.0/24 10.2.0.0/23 fd00:2::/32");
    index.apply([Change::Delete(key)]);
    assert_eq!(texts(&index), "10.2.0.0/23 fd00:2::/32");
}

#[test]
fn workloads_name_the_gateway_of_their_network_while_there_is_one() {
    let pod = "{apiVersion: v1, kind: Pod, metadata: {name: p, namespace: n, uid: u, labels: {topology.istio.io/network: west}}, spec: {nodeName: x}, status: {phase: Running, podIP: 10.0.0.1}}";
    let gateway = |network: &str| {
        upserts(&format!(
            "{{apiVersion: v1, kind: Service, metadata: {{name: g, namespace: m, labels: {{topology.istio.io/network: {network}}}}}, spec: {{clusterIP: None, ports: [{{port: 15008}}]}}}}"
        ))
    };
    let mut index = index_of(pod);
    let named = |index: &Index| {
        let gateway = workload(index, "Kubernetes//Pod/n/p").network_gateway.clone();
        gateway.map(|gateway| format!("{:?} {}", gateway.destination, gateway.hbone_port))
    };
    assert_eq!(named(&index), None);
    index.apply(gateway("west"));
    let found = named(&index).expect("the gateway of its network");
    assert!(found.contains("g.m.svc.cluster.local") && found.ends_with("15008"), "{found}");
    index.apply(gateway("east"));
    assert_eq!(named(&index), None);
    index.apply(gateway("west"));
    let old = gateway("west").remove(0);
    let Change::Upsert(object) = old else { panic!("{old:?}") };
    index.apply([Change::Delete(object.key())]);
    assert_eq!(named(&index), None);
}
