//! What an agent's stream costs the controller's process: ten thousand pods, agents over TLS as real ones connect.

#![allow(clippy::print_stdout, reason = "what was measured is to be read")]
#![allow(clippy::unwrap_used, reason = "tests; the helpers too")]

use std::collections::HashMap;
use std::fmt::Write as _;
use std::net::TcpListener;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant, SystemTime};

use mesh_controller::ca::authority::Authority;
use mesh_controller::ca::tokens::Tokens;
use mesh_controller::state_dir::StateDir;
use mesh_wire::ResourceKind;
use mesh_wire::pb::discovery::DeltaDiscoveryRequest;
use mesh_wire::pb::discovery::aggregated_discovery_service_client::AggregatedDiscoveryServiceClient;
use mesh_wire::pb::mesh::JoinRequest;
use mesh_wire::pb::mesh::enrolment_client::EnrolmentClient;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Request;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint};

const PODS: usize = 10_000;
const PODS_PER_FILE: usize = 100;
/// Streams that are not counted: what the first ones leave is not theirs, such as code that ran for the first time.
const FIRST: usize = 8;
/// Streams that are counted.
const COUNTED: usize = 32;
/// Most that a stream may hold at rest, of resident memory. Runs differ by some 120 KiB, by which pages the allocator still holds
/// (docs/performance.md); a buffer that is kept, or names of a stream's own, cost megabytes.
const MOST_KIB: usize = 400;
const PATIENCE: Duration = Duration::from_secs(120);
/// The allocator gives back within a second what is free; this is a few of those.
const REST: Duration = Duration::from_secs(4);

/// A controller that ends with the value.
struct Controller {
    process: Child,
    address: String,
    root_pem: String,
    token: String,
}

impl Drop for Controller {
    fn drop(&mut self) {
        if self.process.kill().is_ok() {
            self.process.wait().unwrap();
        }
    }
}

fn free_address() -> String {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string()
}

fn write_pods(folder: &Path) {
    std::fs::create_dir(folder).unwrap();
    let namespace = "apiVersion: v1\nkind: Namespace\nmetadata: {name: shop, labels: \
                     {culvert.dev/dataplane-mode: ambient}}\n";
    std::fs::write(folder.join("namespace.yaml"), namespace).unwrap();
    for file in 0..PODS / PODS_PER_FILE {
        let mut text = String::new();
        for pod in 0..PODS_PER_FILE {
            let node = file * 2 + pod % 2;
            writeln!(
                text,
                "---\napiVersion: v1\nkind: Pod\nmetadata: {{name: pod-{file}-{pod}, namespace: shop, \
                 uid: u-{file}-{pod}, labels: {{app: cart}}}}\nspec: {{nodeName: node-{node}, \
                 serviceAccountName: cart}}\nstatus: {{podIP: 10.1.{file}.{pod}, phase: Running}}",
            )
            .unwrap();
        }
        std::fs::write(folder.join(format!("pods-{file}.yaml")), text).unwrap();
    }
}

impl Controller {
    async fn start(folder: &Path) -> Self {
        let (manifests, state) = (folder.join("manifests"), folder.join("state"));
        write_pods(&manifests);
        let address = free_address();
        let process = Command::new(env!("CARGO_BIN_EXE_culvert-controller"))
            .args(["run", "--listen", &address, "--admin", &free_address(), "--log", "warn"])
            .args(["--san", "localhost,127.0.0.1", "--source"])
            .arg(format!("directory:{}", manifests.display()))
            .arg("--state-dir")
            .arg(&state)
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        let mut controller =
            Self { process, address, root_pem: String::new(), token: String::new() };
        let deadline = Instant::now() + PATIENCE;
        while std::net::TcpStream::connect(&controller.address).is_err() {
            assert!(Instant::now() < deadline, "the controller does not listen");
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        let files = || StateDir::open(&state).unwrap();
        controller.root_pem =
            Authority::open_existing(files(), SystemTime::now()).unwrap().root_bundle_pem();
        let tokens = Tokens::open(files()).unwrap();
        let token = tokens.create("node-0", PATIENCE, SystemTime::now()).unwrap();
        let request = JoinRequest { join_token: token.to_string(), node: "node-0".into() };
        let mut enrolment = EnrolmentClient::new(controller.channel().await);
        controller.token = enrolment.join(request).await.unwrap().into_inner().token;
        controller
    }

    async fn channel(&self) -> Channel {
        let tls = ClientTlsConfig::new()
            .ca_certificate(Certificate::from_pem(&self.root_pem))
            .domain_name("localhost");
        let endpoint = Endpoint::new(format!("https://{}", self.address)).unwrap();
        endpoint.tls_config(tls).unwrap().connect().await.unwrap()
    }

    /// An agent that holds `held`, has been told the rest and has acknowledged it; what it was told. The stream lasts as
    /// long as the first value.
    async fn agent(
        &self,
        held: &HashMap<String, String>,
    ) -> (impl Sized + use<>, HashMap<String, String>) {
        let (send, receive) = mpsc::channel(16);
        let mut client = AggregatedDiscoveryServiceClient::new(self.channel().await)
            .max_decoding_message_size(usize::MAX);
        let mut request = Request::new(ReceiverStream::new(receive));
        let bearer = format!("Bearer {}", self.token).parse().unwrap();
        request.metadata_mut().insert("authorization", bearer);
        let mut responses = client.delta_aggregated_resources(request).await.unwrap().into_inner();
        for kind in ResourceKind::AGENT {
            let held = if kind == ResourceKind::Address { held.clone() } else { HashMap::new() };
            let request = DeltaDiscoveryRequest {
                type_url: kind.type_url().into(),
                initial_resource_versions: held.into_iter().collect(),
                ..Default::default()
            };
            send.send(request).await.unwrap();
        }
        let mut told = HashMap::new();
        for _ in ResourceKind::AGENT {
            let next = tokio::time::timeout(PATIENCE, responses.message());
            let response = next.await.expect("a response in time").unwrap().expect("a response");
            let ack = DeltaDiscoveryRequest {
                type_url: response.type_url.clone(),
                response_nonce: response.nonce,
                ..Default::default()
            };
            send.send(ack).await.unwrap();
            if response.type_url == ResourceKind::Address.type_url() {
                told.extend(response.resources.into_iter().map(|one| (one.name, one.version)));
            }
        }
        ((send, responses, client), told)
    }

    async fn rss_kib(&self) -> usize {
        tokio::time::sleep(REST).await;
        let status =
            std::fs::read_to_string(format!("/proc/{}/status", self.process.id())).unwrap();
        let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
        line.split_whitespace().nth(1).unwrap().parse().unwrap()
    }

    /// Resident memory of each of [`COUNTED`] streams of agents that hold `held` when they come, KiB.
    async fn of_each(&self, held: &HashMap<String, String>, new: usize) -> usize {
        let mut open = Vec::new();
        for _ in 0..FIRST {
            open.push(self.agent(held).await.0);
        }
        let before = self.rss_kib().await;
        for _ in 0..COUNTED {
            let (agent, told) = self.agent(held).await;
            assert_eq!(told.len(), new);
            open.push(agent);
        }
        let after = self.rss_kib().await;
        println!("{} held: {before} KiB, then {after} KiB", held.len());
        after.saturating_sub(before) / COUNTED
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_costs_little_once_its_agent_knows_everything() {
    let folder = tempfile::tempdir().unwrap();
    let controller = Controller::start(folder.path()).await;
    let (first, everything) = controller.agent(&HashMap::new()).await;
    assert_eq!(everything.len(), PODS);
    drop(first);
    let told = controller.of_each(&HashMap::new(), PODS).await;
    // Those streams have ended; agents come back with what they hold.
    let resumed = controller.of_each(&everything, 0).await;
    println!("{told} KiB for each stream told everything, {resumed} KiB for each resumed");
    assert!(told.max(resumed) <= MOST_KIB, "told {told} KiB, resumed {resumed} KiB");
}
