//! A controller in this process, and agents that speak to it over TLS as real ones do.

#![allow(clippy::unwrap_used, reason = "tests; the helpers too")]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use clap::Parser;
use mesh_controller::ca::authority::Authority;
use mesh_controller::ca::tokens::Tokens;
use mesh_controller::cli::{Cli, Command, RunArgs};
use mesh_controller::explain::{Answer, InvalidQuestion, Question, answer};
use mesh_controller::index::{Key, NodeReport};
use mesh_controller::mesh::SharedMesh;
use mesh_controller::run::Controller;
use mesh_controller::state_dir::StateDir;
use mesh_identity::{IssuedAnswer, csr};
use mesh_model::{CloseReason, SpiffeId, TunnelProtocol};
use mesh_resolve::ResolveSettings;
use mesh_runtime::{Drain, DrainTrigger};
use mesh_wire::pb::auth::istio_certificate_service_client::IstioCertificateServiceClient;
use mesh_wire::pb::discovery::aggregated_discovery_service_client::AggregatedDiscoveryServiceClient;
use mesh_wire::pb::discovery::{DeltaDiscoveryRequest, DeltaDiscoveryResponse};
use mesh_wire::pb::mesh::enrolment_client::EnrolmentClient;
use mesh_wire::pb::mesh::{EnrolledPod, JoinRequest, RenewRequest, ReportPodsRequest};
use mesh_wire::{Resource, ResourceKind, certificate_request};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint};
use tonic::{Code, Request, Streaming};

const MANIFESTS: &str = r#"
apiVersion: v1
kind: Namespace
metadata: {name: shop, labels: {culvert.dev/dataplane-mode: ambient}}
---
apiVersion: v1
kind: Pod
metadata: {name: cart, namespace: shop, uid: u-1, labels: {app: cart}}
spec: {nodeName: node-a, serviceAccountName: cart}
status: {podIP: 10.0.1.5, phase: Running}
---
apiVersion: v1
kind: Pod
metadata: {name: web, namespace: shop, labels: {app: web}}
spec: {nodeName: node-b, serviceAccountName: web}
status: {podIP: 10.0.2.5, phase: Running}
---
apiVersion: v1
kind: Service
metadata: {name: cart, namespace: shop}
spec: {clusterIP: 10.96.0.1, selector: {app: cart}, ports: [{port: 80, targetPort: 8080}]}
"#;

const POLICY: &str = r#"
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: only-x, namespace: shop}
spec: {selector: {matchLabels: {app: cart}}, rules: [{from: [{source: {namespaces: [x]}}]}]}
"#;

struct Lab {
    directory: tempfile::TempDir,
    mesh: SharedMesh,
    address: std::net::SocketAddr,
    root_pem: String,
    drain: DrainTrigger,
    served: tokio::task::JoinHandle<anyhow::Result<()>>,
}

impl Lab {
    /// How a connection would go.
    fn explain(&self, from: &str, to: &str, port: u16) -> Result<Answer, InvalidQuestion> {
        let question = Question { from: from.into(), to: to.into(), port, request: None };
        let (picture, settings) = (self.mesh.picture(), ResolveSettings::default());
        answer(&picture, &settings, &question, Instant::now(), SystemTime::now())
    }

    async fn start() -> Self {
        let directory = tempfile::tempdir().unwrap();
        std::fs::create_dir(directory.path().join("manifests")).unwrap();
        write(&directory.path().join("manifests/shop.yaml"), MANIFESTS);
        Self::start_in(directory).await
    }

    async fn start_in(directory: tempfile::TempDir) -> Self {
        let args = args(directory.path());
        let (trigger, drain) = Drain::new();
        let state = args.state_dir.clone();
        let controller = Controller::start(args, &drain).await.unwrap();
        let (mesh, address) = (Arc::clone(controller.mesh()), controller.local_addr().unwrap());
        let files = StateDir::open(&state).unwrap();
        let root_pem =
            Authority::open_existing(files, SystemTime::now()).unwrap().root_bundle_pem();
        let served = tokio::spawn(controller.serve(drain));
        Self { directory, mesh, address, root_pem, drain: trigger, served }
    }

    async fn stop(self) -> tempfile::TempDir {
        self.drain.begin();
        tokio::time::timeout(Duration::from_secs(10), self.served).await.unwrap().unwrap().unwrap();
        self.directory
    }

    fn manifest(&self, name: &str) -> PathBuf {
        self.directory.path().join("manifests").join(name)
    }

    fn files(&self) -> StateDir {
        StateDir::open(&self.directory.path().join("state")).unwrap()
    }

    async fn channel(&self) -> Channel {
        let tls = ClientTlsConfig::new()
            .ca_certificate(Certificate::from_pem(&self.root_pem))
            .domain_name("localhost");
        Endpoint::new(format!("https://{}", self.address))
            .unwrap()
            .tls_config(tls)
            .unwrap()
            .connect()
            .await
            .unwrap()
    }

    fn join_token(&self, node: &str) -> String {
        let tokens = Tokens::open(self.files()).unwrap();
        tokens.create(node, Duration::from_secs(60), SystemTime::now()).unwrap().to_string()
    }

    async fn join(&self, node: &str) -> String {
        let request = JoinRequest { join_token: self.join_token(node), node: node.into() };
        EnrolmentClient::new(self.channel().await).join(request).await.unwrap().into_inner().token
    }

    async fn stream(&self, token: &str) -> Agent {
        let (send, receive) = mpsc::channel(16);
        let mut client = AggregatedDiscoveryServiceClient::new(self.channel().await);
        let request = with_token(ReceiverStream::new(receive), token);
        let responses = client.delta_aggregated_resources(request).await.unwrap().into_inner();
        Agent { send, responses }
    }
}

fn args(directory: &Path) -> RunArgs {
    let source = format!("directory:{}", directory.join("manifests").display());
    let state = directory.join("state").display().to_string();
    let line = [
        "culvert-controller",
        "run",
        "--source",
        &source,
        "--state-dir",
        &state,
        "--listen",
        "127.0.0.1:0",
        "--san",
        "localhost,127.0.0.1",
        "--rescan",
        "200ms",
    ];
    match Cli::try_parse_from(line).unwrap().command {
        Command::Run(args) => *args,
        other @ (Command::Token(_)
        | Command::Source(_)
        | Command::Ca(_)
        | Command::Leave { .. }) => panic!("{other:?}"),
    }
}

/// Replaces a file as an editor does.
fn write(path: &Path, text: &str) {
    let temporary = path.with_extension("tmp");
    std::fs::write(&temporary, text).unwrap();
    std::fs::rename(temporary, path).unwrap();
}

fn with_token<T>(message: T, token: &str) -> Request<T> {
    let mut request = Request::new(message);
    request.metadata_mut().insert("authorization", format!("Bearer {token}").parse().unwrap());
    request
}

struct Agent {
    send: mpsc::Sender<DeltaDiscoveryRequest>,
    responses: Streaming<DeltaDiscoveryResponse>,
}

impl Agent {
    async fn subscribe(&self, kind: ResourceKind, held: &BTreeMap<String, String>) {
        let request = DeltaDiscoveryRequest {
            type_url: kind.type_url().into(),
            initial_resource_versions: held.clone().into_iter().collect(),
            ..Default::default()
        };
        self.send.send(request).await.unwrap();
    }

    /// The next response, acknowledged.
    async fn next(&mut self) -> DeltaDiscoveryResponse {
        let next = tokio::time::timeout(Duration::from_secs(10), self.responses.message());
        let response = next.await.expect("a response in time").unwrap().expect("a response");
        let ack = DeltaDiscoveryRequest {
            type_url: response.type_url.clone(),
            response_nonce: response.nonce.clone(),
            ..Default::default()
        };
        self.send.send(ack).await.unwrap();
        response
    }
}

fn resources(response: &DeltaDiscoveryResponse) -> Vec<Resource> {
    let kind = ResourceKind::from_type_url(&response.type_url).unwrap();
    response.resources.iter().map(|wire| Resource::decode(kind, wire).unwrap()).collect()
}

fn names(response: &DeltaDiscoveryResponse) -> Vec<&str> {
    response.resources.iter().map(|resource| resource.name.as_str()).collect()
}

const CART: &str = "Kubernetes//Pod/shop/cart";
const SERVICE: &str = "shop/cart.shop.svc.cluster.local";

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_joins_and_is_told_what_concerns_its_node() {
    let lab = Lab::start().await;
    let token = lab.join("node-a").await;
    let mut agent = lab.stream(&token).await;
    for kind in ResourceKind::AGENT {
        agent.subscribe(kind, &BTreeMap::new()).await;
    }
    let mut first = BTreeMap::new();
    for _ in 0..4 {
        let response = agent.next().await;
        first.insert(response.type_url.clone(), response);
    }
    let of = |kind: ResourceKind| &first[kind.type_url()];
    assert_eq!(names(of(ResourceKind::Mesh)), ["mesh"]);
    assert_eq!(names(of(ResourceKind::Pod)), [CART], "not the pods of other nodes");
    assert!(names(of(ResourceKind::Authorization)).is_empty(), "answered, though empty");
    assert_eq!(names(of(ResourceKind::Address)), [CART, "Kubernetes//Pod/shop/web", SERVICE]);
    let [Resource::Mesh(mesh)] = &resources(of(ResourceKind::Mesh))[..] else {
        panic!("no settings")
    };
    assert_eq!(*mesh.root_pem, *lab.root_pem);
    // The policy is listed by a workload of this node: it comes, and before the workload.
    write(&lab.manifest("policy.yaml"), POLICY);
    let policy = agent.next().await;
    assert_eq!(names(&policy), ["shop/only-x"]);
    let workload = agent.next().await;
    let [Resource::Workload(workload)] = &resources(&workload)[..] else { panic!("no workload") };
    assert_eq!(workload.authorization_policies.len(), 1);
    // Another node's agent does not see it.
    let other = lab.join("node-b").await;
    let mut other = lab.stream(&other).await;
    other.subscribe(ResourceKind::Authorization, &BTreeMap::new()).await;
    assert!(names(&other.next().await).is_empty());
    // It leaves after the workload has stopped listing it.
    std::fs::remove_file(lab.manifest("policy.yaml")).unwrap();
    assert_eq!(names(&agent.next().await), [CART]);
    assert_eq!(agent.next().await.removed_resources, ["shop/only-x"]);
    drop((agent, other));
    lab.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restart_of_the_controller_costs_an_agent_nothing() {
    let lab = Lab::start().await;
    let token = lab.join("node-a").await;
    let mut agent = lab.stream(&token).await;
    agent.subscribe(ResourceKind::Address, &BTreeMap::new()).await;
    let first = agent.next().await;
    let mut held: BTreeMap<String, String> =
        first.resources.iter().map(|one| (one.name.clone(), one.version.clone())).collect();
    drop(agent);
    let directory = lab.stop().await;
    let lab = Lab::start_in(directory).await;
    held.insert("Kubernetes//Pod/shop/gone".into(), "1".into());
    held.insert(CART.into(), "another".into());
    let mut agent = lab.stream(&token).await;
    agent.subscribe(ResourceKind::Address, &held).await;
    let resumed = agent.next().await;
    assert_eq!(names(&resumed), [CART], "only what is different");
    assert_eq!(resumed.removed_resources, ["Kubernetes//Pod/shop/gone"]);
    drop(agent);
    lab.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn certificates_are_given_for_pods_of_the_asking_node_only() {
    let lab = Lab::start().await;
    let token = lab.join("node-a").await;
    let mut ca = IstioCertificateServiceClient::new(lab.channel().await);
    let id = |domain: &str, account: &str| SpiffeId::new(domain, "shop", account).unwrap();
    let day = Duration::from_secs(86_400);
    let cart = id("cluster.local", "cart");
    let (key, request) = csr(&cart).unwrap();
    let body = certificate_request(request.clone(), &cart, day);
    let answer = ca.create_certificate(with_token(body, &token)).await.unwrap().into_inner();
    assert_eq!(answer.cert_chain.len(), 3, "leaf, intermediate, roots");
    let checked = IssuedAnswer::check(&answer.cert_chain, &cart, key, SystemTime::now());
    assert!(checked.is_ok(), "{:?}", checked.err());
    // Whoever asks for more gets a day.
    let (key, long) = csr(&cart).unwrap();
    let body = certificate_request(long, &cart, 200 * day);
    let answer = ca.create_certificate(with_token(body, &token)).await.unwrap().into_inner();
    let long = IssuedAnswer::check(&answer.cert_chain, &cart, key, SystemTime::now()).unwrap();
    assert!(long.svid.not_after() <= SystemTime::now() + day, "{:?}", long.svid);
    let cases = [
        (
            certificate_request(request.clone(), &id("cluster.local", "web"), day),
            &*token,
            Code::PermissionDenied,
            "node-a",
        ),
        (
            certificate_request(request.clone(), &id("other", "cart"), day),
            &*token,
            Code::PermissionDenied,
            "trust domain",
        ),
        (
            certificate_request("no csr".into(), &cart, day),
            &*token,
            Code::InvalidArgument,
            "signing request",
        ),
        (
            certificate_request(request.clone(), &cart, day),
            "culvert1.x.y",
            Code::Unauthenticated,
            "refused",
        ),
    ];
    for (body, token, code, word) in cases {
        let status = ca.create_certificate(with_token(body, token)).await.unwrap_err();
        assert_eq!(status.code(), code, "{status}");
        assert!(status.message().contains(word), "{word}: {status}");
    }
    let bare = certificate_request(request, &cart, day);
    let status = ca.create_certificate(bare).await.unwrap_err();
    assert_eq!(status.code(), Code::Unauthenticated);
    lab.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn tokens_are_refused_each_for_its_own_reason() {
    let lab = Lab::start().await;
    let mut enrolment = EnrolmentClient::new(lab.channel().await);
    let token = lab.join_token("node-a");
    let join =
        |token: &str, node: &str| JoinRequest { join_token: token.into(), node: node.into() };
    let mut refusal = async |token: &str, node: &str| {
        enrolment.join(join(token, node)).await.unwrap_err().message().to_owned()
    };
    assert!(refusal("nonsense", "node-a").await.contains("malformed"));
    assert!(refusal(&token, "node-b").await.contains("another node"));
    let mut enrolment = EnrolmentClient::new(lab.channel().await);
    let session = enrolment.join(join(&token, "node-a")).await.unwrap().into_inner();
    assert_eq!(session.node, "node-a");
    let again = enrolment.join(join(&token, "node-a")).await.unwrap_err();
    assert!(again.message().contains("used already"), "{again}");
    let renewed =
        enrolment.renew(with_token(RenewRequest {}, &session.token)).await.unwrap().into_inner();
    assert!(renewed.expires_at >= session.expires_at);
    let status = enrolment.renew(with_token(RenewRequest {}, &token)).await.unwrap_err();
    assert!(status.message().contains("wrong_audience"), "{status}");
    lab.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_that_joins_while_it_runs_is_announced_when_it_is_captured() {
    let lab = Lab::start().await;
    let plain = MANIFESTS.replace("culvert.dev/dataplane-mode: ambient", "");
    write(&lab.manifest("shop.yaml"), &plain);
    let token = lab.join("node-a").await;
    let mut agent = lab.stream(&token).await;
    let cart = |lab: &Lab| {
        lab.mesh.picture().index.workload_by_name("shop", "cart").unwrap().tunnel_protocol
    };
    wait(|| cart(&lab) == TunnelProtocol::None).await;
    agent.subscribe(ResourceKind::Pod, &BTreeMap::new()).await;
    agent.next().await;
    write(&lab.manifest("shop.yaml"), MANIFESTS);
    assert_eq!(names(&agent.next().await), [CART], "the agent is asked to capture it");
    assert_eq!(cart(&lab), TunnelProtocol::None, "peers are not told yet");
    let pods =
        vec![EnrolledPod { namespace: "shop".into(), name: "cart".into(), ..Default::default() }];
    let report = with_token(ReportPodsRequest { pods, uncaptured: Vec::new() }, &token);
    EnrolmentClient::new(lab.channel().await).report_pods(report).await.unwrap();
    assert_eq!(cart(&lab), TunnelProtocol::Hbone);
    drop(agent);
    lab.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn revocations_and_a_new_root_reach_agents() {
    let lab = Lab::start().await;
    let token = lab.join("node-a").await;
    let mut agent = lab.stream(&token).await;
    agent.subscribe(ResourceKind::Mesh, &BTreeMap::new()).await;
    agent.next().await;
    let authority = Authority::open_existing(lab.files(), SystemTime::now()).unwrap();
    authority.revoke("0badcafe", SystemTime::now()).unwrap();
    let [Resource::Mesh(mesh)] = &resources(&agent.next().await)[..] else { panic!("no settings") };
    assert!(mesh.crl_pem.contains("X509 CRL"));
    authority.rotate_root(Duration::from_secs(1), SystemTime::now()).unwrap();
    let [Resource::Mesh(mesh)] = &resources(&agent.next().await)[..] else { panic!("no settings") };
    assert_eq!(mesh.root_pem.matches("BEGIN CERTIFICATE").count(), 2);
    // The new root signs the listener's certificate as well: who knows only the old bundle must learn the new one.
    let [Resource::Mesh(mesh)] = &resources(&agent.next().await)[..] else { panic!("no settings") };
    assert!(!mesh.root_pem.starts_with(&lab.root_pem));
    drop(agent);
    lab.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn explain_names_the_rule_that_decides() {
    let lab = Lab::start().await;
    lab.mesh.synced().await;
    let ask = |to: &str, port| lab.explain("shop/web", to, port).unwrap();
    for to in ["cart", "cart.shop", "cart.shop.svc.cluster.local", "10.96.0.1"] {
        let answer = ask(to, 80);
        assert!(answer.allowed, "{to}: {answer:?}");
        assert_eq!(answer.stages.len(), 2);
        assert_eq!(answer.warnings.len(), 2, "no agent has said that it captures either");
    }
    let report = |node: &str, pods: &[&str]| {
        let pods = pods.iter().map(|name| Key::new("shop", name)).collect();
        lab.mesh.report(node, NodeReport::Enrolled(pods));
    };
    report("node-b", &[]);
    let plain = ask("cart", 80);
    let text = "shop/web is in the mesh, but the agent of node node-b does not capture it: it dials in plaintext";
    assert_eq!(
        plain.stages[0].outcome,
        "shop/web is in the mesh, but the agent of node node-b does not capture it: its own network decides which endpoint of shop/cart.shop.svc.cluster.local it reaches"
    );
    assert!(plain.allowed && plain.stages.len() == 2, "{plain:?}");
    let to_pod = ask("10.0.1.5", 8080);
    assert_eq!((to_pod.stages[0].outcome.as_str(), to_pod.stages.len()), (text, 2));
    report("node-b", &["web"]);
    report("node-a", &[]);
    let nobody = ask("cart", 80);
    assert_eq!(nobody.reason, Some(CloseReason::TunnelConnectFailed), "{nobody:?}");
    assert!(nobody.summary.contains("does not capture it"), "{}", nobody.summary);
    report("node-a", &["cart"]);
    assert_eq!(ask("cart", 80).warnings, [""; 0]);
    assert_eq!(ask("cart", 81).reason, Some(CloseReason::NoSuchPort));
    write(&lab.manifest("policy.yaml"), POLICY);
    wait(|| !ask("cart", 80).allowed).await;
    let denied = ask("cart", 80);
    assert_eq!(denied.reason, Some(CloseReason::PolicyDenied));
    assert!(denied.summary.contains("AuthorizationPolicy shop/only-x"), "{}", denied.summary);
    lab.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_policy_that_cannot_be_read_denies_and_a_good_one_outlives_the_controller() {
    let lab = Lab::start().await;
    lab.mesh.synced().await;
    let ask = |lab: &Lab| lab.explain("shop/web", "cart", 80).unwrap();
    let broken = POLICY.replace("rules:", "ruels:");
    write(&lab.manifest("policy.yaml"), &broken);
    wait(|| !ask(&lab).allowed).await;
    let denied = ask(&lab);
    assert_eq!(denied.reason, Some(CloseReason::PolicyMissing));
    assert!(
        denied.summary.contains("AuthorizationPolicy shop/only-x (unreadable: spec.ruels: "),
        "{}",
        denied.summary
    );
    assert!(lab.mesh.status().source.refused[0].denied);
    // Once good it is what it says; broken again over a restart it stays that.
    write(&lab.manifest("policy.yaml"), POLICY);
    wait(|| ask(&lab).reason == Some(CloseReason::PolicyDenied)).await;
    let directory = lab.stop().await;
    write(&directory.path().join("manifests/policy.yaml"), &broken);
    let lab = Lab::start_in(directory).await;
    lab.mesh.synced().await;
    assert_eq!(ask(&lab).reason, Some(CloseReason::PolicyDenied));
    assert_eq!(lab.mesh.status().source.kept, 1);
    assert!(lab.mesh.warnings()[0].contains("AuthorizationPolicy shop/only-x"));
    // An unmounted folder, over a restart, is no deletion.
    let directory = lab.stop().await;
    std::fs::remove_dir_all(directory.path().join("manifests")).unwrap();
    let lab = Lab::start_in(directory).await;
    lab.mesh.synced().await;
    assert_eq!(ask(&lab).reason, Some(CloseReason::PolicyDenied));
    assert!(lab.mesh.status().source.missing.is_some());
    lab.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_of_another_node_does_not_widen_the_view() {
    let lab = Lab::start().await;
    let token = lab.join("node-a").await;
    let mut agent = lab.stream(&token).await;
    let identity = mesh_wire::NodeIdentity {
        ip: "127.0.0.1".parse().unwrap(),
        pod_name: "agent".into(),
        pod_namespace: "culvert".into(),
        node_name: "node-b".into(),
        cluster_id: "Kubernetes".into(),
        cluster_domain: "cluster.local".into(),
        version: String::new(),
    };
    let request = DeltaDiscoveryRequest {
        node: Some((&identity).into()),
        type_url: ResourceKind::Pod.type_url().into(),
        ..Default::default()
    };
    agent.send.send(request).await.unwrap();
    let status = agent.responses.message().await.unwrap_err();
    assert_eq!(status.code(), Code::PermissionDenied);
    lab.stop().await;
}

const EXPLAINED: &str = r#"
apiVersion: v1
kind: Pod
metadata: {name: cart-2, namespace: shop, labels: {app: cart}}
spec: {nodeName: node-a, serviceAccountName: cart}
status: {podIP: 10.0.1.6, phase: Running}
---
apiVersion: v1
kind: Pod
metadata:
  name: picky
  namespace: shop
  labels: {app: picky}
  annotations:
    culvert.dev/exclude-outbound-ports: "5432"
    culvert.dev/exclude-outbound-cidrs: 10.0.1.6/32
    culvert.dev/exclude-inbound-ports: "9000"
    culvert.dev/exclude-inbound-cidrs: 10.0.3.0/24
spec:
  nodeName: node-b
  serviceAccountName: picky
  containers: [{livenessProbe: {httpGet: {port: 8086}}}]
status: {podIP: 10.0.2.6, phase: Running}
---
apiVersion: v1
kind: Pod
metadata: {name: only, namespace: shop, annotations: {culvert.dev/include-outbound-ports: "80"}}
spec: {nodeName: node-b, serviceAccountName: only}
status: {podIP: 10.0.2.7, phase: Running}
---
apiVersion: v1
kind: Pod
metadata: {name: open, namespace: shop, annotations: {culvert.dev/bypass-inbound-capture: "true"}}
spec: {nodeName: node-b, serviceAccountName: open}
status: {podIP: 10.0.2.8, phase: Running}
---
apiVersion: v1
kind: Pod
metadata: {name: outsider, namespace: plain}
spec: {nodeName: node-a}
status: {podIP: 10.0.3.9, phase: Running}
---
apiVersion: v1
kind: Pod
metadata: {name: kubelet, namespace: plain}
spec: {nodeName: node-b, hostNetwork: true}
status: {podIP: 192.0.2.2, phase: Running}
---
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {name: all, namespace: shop}
spec: {mtls: {mode: STRICT}}
---
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {name: wild, namespace: shop}
spec:
  hosts: ["*.example.com"]
  addresses: [10.97.0.1]
  ports: [{number: 443, name: tls, protocol: TLS}]
  resolution: STATIC
  endpoints: [{address: 198.51.100.7}]
"#;

#[tokio::test(flavor = "multi_thread")]
async fn explain_knows_what_pods_leave_out_and_where_plain_clients_end() {
    let lab = Lab::start().await;
    lab.mesh.synced().await;
    write(&lab.manifest("explained.yaml"), EXPLAINED);
    let ask = |from: &str, to: &str, port| lab.explain(from, to, port);
    wait(|| ask("shop/web", "a.example.com", 443).is_ok()).await;
    let pods = |names: &[&str]| names.iter().map(|name| Key::new("shop", name)).collect();
    lab.mesh.report("node-a", NodeReport::Enrolled(pods(&["cart", "cart-2"])));
    lab.mesh.report("node-b", NodeReport::Enrolled(pods(&["web", "picky", "only", "open"])));
    let ask = |from: &str, to: &str, port| ask(from, to, port).unwrap();
    // Outbound: the dialled port and address decide, exclusions first.
    for (from, to, port, setting) in [
        ("shop/picky", "198.51.100.1", 5432, "exclude-outbound-ports"),
        ("shop/picky", "shop/cart-2", 8080, "exclude-outbound-cidrs"),
        ("shop/only", "198.51.100.1", 81, "include-outbound-ports"),
    ] {
        let left = ask(from, to, port);
        assert!(left.stages[0].outcome.contains(setting), "{from} {to}:{port}: {left:?}");
        assert!(left.stages[0].resolve.is_empty(), "{left:?}");
    }
    assert_eq!(ask("shop/picky", "shop/cart-2", 8080).reason, Some(CloseReason::PolicyDenied));
    for (from, to, port) in [("shop/picky", "shop/cart", 8080), ("shop/only", "cart", 80)] {
        assert!(ask(from, to, port).stages[0].outcome.starts_with("through the tunnel"));
    }
    assert!(ask("shop/web", "10.0.2.5", 80).summary.contains("dials itself"));
    assert!(ask("shop/web", "10.0.1.5", 53).summary.contains("DNS proxy"));
    // Inbound plaintext: STRICT refuses it, unless it is left out.
    assert_eq!(ask("plain/outsider", "shop/cart", 8080).reason, Some(CloseReason::PolicyDenied));
    for (from, to, port) in [
        ("plain/outsider", "shop/picky", 9000),
        ("plain/outsider", "shop/picky", 1),
        ("plain/outsider", "shop/open", 1),
        ("plain/kubelet", "shop/picky", 8086),
    ] {
        let left = ask(from, to, port);
        assert!(
            left.allowed
                && left.summary.contains("out of its capture") != left.summary.contains("probe"),
            "{left:?}"
        );
    }
    assert!(!ask("plain/kubelet", "shop/picky", 8087).allowed, "no probe's port");
    // A service: its endpoints are judged, whichever the client's network chooses.
    let refused = ask("plain/outsider", "cart.shop", 80);
    assert_eq!(refused.reason, Some(CloseReason::PolicyDenied), "{refused:?}");
    let labelled = EXPLAINED.replacen("labels: {app: cart}", "labels: {app: cart, open: yes1}", 1);
    write(&lab.manifest("explained.yaml"), &labelled);
    write(&lab.manifest("permissive.yaml"), PERMISSIVE);
    wait(|| ask("plain/outsider", "cart.shop", 80).allowed).await;
    let mixed = ask("plain/outsider", "cart.shop", 80);
    assert!(
        mixed.summary.contains(
            "depends on the endpoint: 1 of 2 refuse it, such as Kubernetes//Pod/shop/cart "
        ),
        "{mixed:?}"
    );
    assert_eq!(mixed.stages.len(), 3);
    // As the DNS proxy answers a wildcard host.
    let wild = ask("shop/web", "A.b.example.com.", 443);
    assert!(wild.allowed && format!("{wild:?}").contains("10.97.0.1:443"), "{wild:?}");
    lab.stop().await;
}

const PERMISSIVE: &str = r#"
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {name: open, namespace: shop}
spec: {selector: {matchLabels: {open: yes1}}, mtls: {mode: PERMISSIVE}}
"#;

/// Two thousand connections that say nothing hold more than all places of the door, and an agent still joins at once.
#[tokio::test(flavor = "multi_thread")]
async fn silent_connections_keep_no_agent_out() {
    use tokio::io::AsyncReadExt as _;
    let resource = nix::sys::resource::Resource::RLIMIT_NOFILE;
    let (_, hard) = nix::sys::resource::getrlimit(resource).unwrap();
    nix::sys::resource::setrlimit(resource, 1_000.min(hard), hard).unwrap();
    let lab = Lab::start().await;
    assert_eq!(nix::sys::resource::getrlimit(resource).unwrap().0, hard, "the limit is raised");
    let mut silent = Vec::new();
    for _ in 0..2_000 {
        silent.push(tokio::net::TcpStream::connect(lab.address).await.unwrap());
    }
    let opened = Instant::now();
    lab.join("node-a").await;
    assert!(opened.elapsed() < Duration::from_secs(3), "joined after {:?}", opened.elapsed());
    // The last one is shown out for its silence, long before a handshake's time is up.
    let last = silent.last_mut().unwrap();
    let ended = tokio::time::timeout(Duration::from_secs(6), last.read(&mut [0])).await;
    assert!(!matches!(ended.expect("it is ended"), Ok(1..)));
    lab.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn automatic_addresses_of_a_folder_do_not_move_over_changes_and_restarts() {
    let entry = |name: &str| {
        format!(
            "apiVersion: networking.istio.io/v1\nkind: ServiceEntry\nmetadata: {{name: {name}, namespace: shop}}\n\
             spec: {{hosts: [{name}.example.com], ports: [{{number: 80, name: t, protocol: TCP}}], resolution: DNS}}\n"
        )
    };
    let lab = Lab::start().await;
    lab.mesh.synced().await;
    let vips = |lab: &Lab, name: &str| {
        let host = format!("{name}.example.com");
        lab.mesh.with_index(|index| {
            let found = index.services().find(|service| *service.key.hostname == *host);
            found.map(|service| service.vips.clone())
        })
    };
    for name in ["b", "a"] {
        write(&lab.manifest(&format!("{name}.yaml")), &entry(name));
        wait(|| vips(&lab, name).is_some()).await;
    }
    let before = (vips(&lab, "a"), vips(&lab, "b"));
    std::fs::remove_file(lab.manifest("a.yaml")).unwrap();
    wait(|| vips(&lab, "a").is_none()).await;
    let file = lab.files().path("service-entry-addresses");
    let kept = || std::fs::read_to_string(&file).unwrap_or_default();
    wait(|| kept().lines().count() == 2).await;
    let directory = lab.stop().await;
    // Whatever the file says is held to: here that each has the other's.
    let swapped: String = kept()
        .lines()
        .map(|line| line.replace("/a.", "/X.").replace("/b.", "/a.").replace("/X.", "/b.") + "\n")
        .collect();
    std::fs::write(&file, swapped).unwrap();
    write(&directory.path().join("manifests/a.yaml"), &entry("a"));
    let lab = Lab::start_in(directory).await;
    lab.mesh.synced().await;
    assert_eq!((vips(&lab, "b"), vips(&lab, "a")), before);
    lab.stop().await;
}

/// Waits for a state that a watched file leads to.
async fn wait(mut reached: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while !reached() {
        assert!(Instant::now() < deadline, "not reached");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}
