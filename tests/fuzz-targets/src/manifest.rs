//! Manifests, from text to what agents receive.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use mesh_controller::index::{Index, IndexSettings};
use mesh_controller::manifest::{Format, documents};
use mesh_controller::publish::Store;
use mesh_controller::source::{FileContent, LastGood, Scan};
use mesh_wire::{Resource, ResourceKind};

use crate::input::texts;
use crate::xds;

/// YAML files.
pub fn yaml(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    check(text, Format::Yaml, "a.yaml");
}

/// JSON files.
pub fn json(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    check(text, Format::Json, "a.json");
}

/// What a state directory would remember.
#[derive(Default)]
struct Memory(BTreeMap<PathBuf, Vec<String>>);

impl LastGood for Memory {
    fn read(&mut self, file: &Path) -> Vec<String> {
        self.0.get(file).cloned().unwrap_or_default()
    }

    fn write(&mut self, file: &Path, objects: &[&str]) {
        let objects = objects.iter().map(|object| (*object).to_owned()).collect();
        self.0.insert(file.to_owned(), objects);
    }
}

/// What is refused names its line; what is accepted reaches agents whole; what is taken away leaves nothing behind.
fn check(text: &str, format: Format, file: &str) {
    // YAML ends a line at a carriage return as well.
    let lines = text.matches(['\n', '\r']).count() + 1;
    for document in documents(text, format) {
        match document {
            Ok(document) => assert!((1..=lines).contains(&document.first_line)),
            Err(error) => assert!(!error.problem.is_empty() && error.line <= lines, "{error}"),
        }
    }
    let mut scan = Scan::default();
    let mut memory = Memory::default();
    let files = BTreeMap::from([(PathBuf::from(file), FileContent::Text(text.to_owned()))]);
    let changes = scan.update(files, &mut memory);
    for refusal in &scan.status().refused {
        assert!(!refusal.remedy.is_empty() && refusal.line <= lines, "{refusal:?}");
    }
    let settings = IndexSettings { istio_labels: true, ..IndexSettings::default() };
    let mut index = Index::new(settings);
    let delta = index.apply(changes);
    for workload in &delta.workloads {
        xds::check(&Resource::Workload(workload.as_ref().clone()));
    }
    for service in &delta.services {
        xds::check(&Resource::Service(service.as_ref().clone()));
    }
    for policy in &delta.policies {
        xds::check(&Resource::Policy(policy.as_ref().clone()));
    }
    let holder = |_network: &_, ip| {
        let found = index.workloads().find(|workload| workload.addresses.contains(&ip))?;
        Some(found.uid.clone())
    };
    drop((index.policy_status(), index.notes(holder)));
    let store = Store::default();
    store.apply(&delta);
    let changes = scan.update(BTreeMap::new(), &mut memory);
    let gone = index.apply(changes);
    assert_eq!((index.workloads().count(), index.services().count()), (0, 0), "of {delta:?}");
    assert_eq!((index.policies().count(), index.pods().count()), (0, 0), "of {delta:?}");
    store.apply(&gone);
    let counts = store.counts();
    let left: usize = ResourceKind::ALL.iter().filter_map(|kind| counts.get(kind)).sum();
    assert_eq!(left, 0, "published and never taken back: {counts:?}");
}

const POD: &str = r#"apiVersion: v1
kind: Namespace
metadata: {name: shop, labels: {culvert.dev/dataplane-mode: ambient}, annotations: {culvert.dev/unknown-egress: deny}}
---
apiVersion: v1
kind: Pod
metadata: {name: cart, namespace: shop, uid: u-1, labels: {app: cart}}
spec:
  nodeName: node-a
  serviceAccountName: cart
  containers:
  - name: c
    ports: [{name: http, containerPort: 8080}]
    readinessProbe: {httpGet: {port: http}}
status: {podIP: 10.0.1.5, podIPs: [{ip: 10.0.1.5}, {ip: "fd00::5"}], phase: Running, conditions: [{type: Ready, status: "True"}]}
---
apiVersion: v1
kind: Service
metadata: {name: cart, namespace: shop}
spec: {clusterIP: 10.96.0.1, selector: {app: cart}, ports: [{name: http, port: 80, targetPort: http}]}
"#;

const POLICY: &str = r#"apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: p, namespace: shop, annotations: {istio.io/dry-run: "true"}}
spec:
  selector: {matchLabels: {app: cart}}
  action: DENY
  rules:
  - from:
    - source: {principals: ["*/ns/a/sa/b"], notNamespaces: [x*], ipBlocks: [10.0.0.0/8]}
    to:
    - operation: {ports: ["80"], notPorts: ["81"]}
    when:
    - {key: source.namespace, values: [y]}
    - {key: destination.ip, notValues: ["fd00::/8"]}
---
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {name: q, namespace: shop}
spec: {selector: {matchLabels: {app: cart}}, mtls: {mode: STRICT}, portLevelMtls: {8080: {mode: PERMISSIVE}}}
"#;

const ENTRIES: &str = r#"apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {name: outside, namespace: shop}
spec:
  hosts: ["*.example.com", api.example.org]
  addresses: [192.0.2.0/24]
  ports: [{number: 443, name: tls, protocol: TLS, targetPort: 8443}]
  resolution: STATIC
  location: MESH_EXTERNAL
  endpoints: [{address: 192.0.2.1, ports: {tls: 9443}, weight: 3, locality: a/b/c}]
---
apiVersion: networking.istio.io/v1
kind: WorkloadEntry
metadata: {name: vm, namespace: shop, labels: {app: vm}}
spec: {address: 10.0.9.9, serviceAccount: vm, network: n2}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: cart-1, namespace: shop, labels: {kubernetes.io/service-name: cart}}
addressType: IPv4
ports: [{name: http, port: 8080}]
endpoints:
- {addresses: [10.0.1.5], conditions: {ready: true}, targetRef: {kind: Pod, name: cart}}
"#;

pub(crate) fn yaml_seeds() -> Vec<Vec<u8>> {
    texts(&[
        POD,
        POLICY,
        ENTRIES,
        "a: &a [1, 2]\nb: [*a, *a]\n---\n# nothing\n--- {apiVersion: v1, kind: Node, metadata: {name: n}}\n...\n",
        "apiVersion: v1\nkind: List\nitems:\n- {apiVersion: v1, kind: ServiceAccount, metadata: {name: s}}\n- 3\n",
    ])
}

pub(crate) fn json_seeds() -> Vec<Vec<u8>> {
    let mut seeds = Vec::new();
    for text in [POD, POLICY, ENTRIES] {
        let documents = documents(text, Format::Yaml).into_iter().flatten();
        let json: Vec<String> = documents.map(|document| document.value.to_string()).collect();
        seeds.push(json.join("\n").into_bytes());
    }
    seeds.extend(texts(&[
        r#"{"apiVersion":"v1","kind":"PodList","items":[{"apiVersion":"v1","kind":"Pod"}]} [1] x"#,
    ]));
    seeds
}
