//! Deploys waypoints: a Gateway of our class gets pods that serve it, and its status says how that stands.
//!
//! What is made belongs to the Gateway and goes with it. It is applied by the server, so that fields of others stay, and
//! again whenever the Gateway changes or a while has passed. An object of the same name that is not the Gateway's is left
//! alone: who has set a waypoint up by hand keeps it.

mod objects;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use kube::api::{Patch, PatchParams, PostParams};
use kube::core::{ApiResource, DynamicObject};
use kube::{Api, Client};
use serde_json::{Value, json};
use tokio::time::Instant;
use tracing::{info, warn};

use super::conditions::{Condition, merged, now};
use super::lease::Leadership;
use super::refusal;
use crate::ca::authority::Authority;
use crate::index::Key;
use crate::manifest::Kind;
use crate::manifest::gateway::{GATEWAY_GROUP, WAYPOINT_CLASS};
use crate::mesh::SharedMesh;
use crate::source::kubernetes::resource;
pub(super) use objects::GATEWAY_NAME;
use objects::{Unacceptable, Wanted, is_hbone, listeners};

/// By which GatewayClasses name this controller.
pub const CONTROLLER_NAME: &str = "culvert.dev/waypoint-controller";
/// Who applies, for the API server's records.
const FIELD_MANAGER: &str = "culvert-waypoints";
/// Between looks.
const INTERVAL: Duration = Duration::from_secs(2);
/// What stands is looked at again after this long, and put right.
const AGAIN_AFTER: Duration = Duration::from_secs(30);
/// Most Gateways that are looked at in one look; the others come next.
const MAX_LOOKS: usize = 50;
/// Longest message. Source: `metav1.Condition`.
const MAX_MESSAGE: usize = 32_768;

/// How waypoints are deployed.
#[derive(Clone, Debug)]
pub struct WaypointSettings {
    /// Their image.
    pub image: String,
    /// When it is pulled.
    pub pull_policy: String,
    /// Names of Secrets, in the Gateway's namespace, with credentials of its registry.
    pub pull_secrets: Vec<String>,
    /// Pods of a Gateway that does not say how many.
    pub replicas: u32,
    /// Their resources, as a container has them.
    pub resources: Value,
    /// Where they reach the controller.
    pub controller: String,
    /// For whom their tokens are made.
    pub audience: String,
    /// Domain of services.
    pub cluster_domain: String,
    /// Whether they go on without other waypoints, as agents do.
    pub prefer_waypoints: bool,
    /// Filter of their log.
    pub log: String,
}

/// Deploys waypoints while it leads.
pub(crate) struct Waypoints {
    client: Client,
    mesh: SharedMesh,
    authority: Arc<Authority>,
    settings: WaypointSettings,
    known: BTreeMap<Key, Known>,
    class_seen: Option<Instant>,
}

/// What a Gateway was when it was looked at last.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Known {
    version: (Arc<str>, i64),
    root_pem: String,
    at: Instant,
    /// Nothing is to be done until it is time, or something changes.
    settled: bool,
}

/// How a waypoint stands.
struct Standing {
    accepted: Result<(), Unacceptable>,
    programmed: Result<(), Unacceptable>,
    addresses: Vec<Value>,
}

impl Waypoints {
    pub(crate) fn new(
        client: &Client,
        mesh: SharedMesh,
        authority: Arc<Authority>,
        settings: WaypointSettings,
    ) -> Self {
        let (client, known) = (client.clone(), BTreeMap::new());
        Self { client, mesh, authority, settings, known, class_seen: None }
    }

    /// Deploys while `leadership` is held.
    pub(crate) async fn run(mut self, leadership: Leadership) {
        self.mesh.synced().await;
        let mut ticks = tokio::time::interval(INTERVAL);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            self.look(&leadership).await;
        }
    }

    async fn look(&mut self, leadership: &Leadership) {
        if !leadership.is_held() {
            self.known.clear();
            self.class_seen = None;
            return;
        }
        if self.class_seen.is_none_or(|seen| seen.elapsed() >= AGAIN_AFTER) {
            match self.accept_class().await {
                Ok(()) => self.class_seen = Some(Instant::now()),
                Err(error) => warn!(%error, "the GatewayClass's status is not written"),
            }
        }
        let gateways = self.mesh.with_index(|index| index.gateways_of_class(WAYPOINT_CLASS));
        self.known.retain(|key, _| gateways.contains_key(key));
        let root_pem = self.authority.root_bundle_pem();
        let due = gateways.into_iter().filter(|(key, version)| {
            self.known.get(key).is_none_or(|known| {
                known.version != *version
                    || known.root_pem != root_pem
                    || !known.settled
                    || known.at.elapsed() >= AGAIN_AFTER
            })
        });
        // Who waited longest comes first.
        let mut due: Vec<_> = due.collect();
        due.sort_by_key(|(key, _)| self.known.get(key).map(|known| known.at));
        for (key, version) in due.into_iter().take(MAX_LOOKS) {
            if !leadership.is_held() {
                return;
            }
            let settled = self.settle(&key, &root_pem).await.unwrap_or_else(|error| {
                warn!(gateway = %key, %error, "a waypoint is not deployed; trying again");
                false
            });
            let known = Known { version, root_pem: root_pem.clone(), at: Instant::now(), settled };
            self.known.insert(key, known);
        }
    }

    /// Brings a Gateway's waypoint about and says so. True when nothing is left to wait for.
    async fn settle(&self, key: &Key, root_pem: &str) -> kube::Result<bool> {
        let Some((api, gateway)) = self.gateway(key).await? else { return Ok(true) };
        let value = serde_json::to_value(&gateway).map_err(kube::Error::SerdeError)?;
        // The index may be behind.
        if value["spec"]["gatewayClassName"] != WAYPOINT_CLASS
            || gateway.metadata.deletion_timestamp.is_some()
        {
            return Ok(true);
        }
        let standing = match Wanted::of(&value, &self.settings) {
            Err(refused) => Standing {
                programmed: Err(Unacceptable {
                    reason: "Invalid",
                    message: "it is not accepted".to_owned(),
                }),
                accepted: Err(refused),
                addresses: Vec::new(),
            },
            Ok(wanted) => {
                let programmed = self.deploy(&wanted, root_pem).await?;
                let addresses = match programmed {
                    Ok(()) => self.addresses(&wanted).await?,
                    Err(_) => Vec::new(),
                };
                Standing { accepted: Ok(()), programmed, addresses }
            }
        };
        let settled = standing.accepted.is_err() || standing.programmed.is_ok();
        let told = self.tell(&api, gateway, &value, &standing).await?;
        Ok(settled && told)
    }

    /// Applies the objects of a waypoint. The inner error is what the Gateway's status says.
    async fn deploy(
        &self,
        wanted: &Wanted,
        root_pem: &str,
    ) -> kube::Result<Result<(), Unacceptable>> {
        let refused = |object: &Value, error: kube::Error| match refusal(&error) {
            // It is busy, or somebody was faster: no word about the Gateway.
            Some(408 | 409 | 429) => Err(error),
            // What the API server thinks of it will not change by asking again, but rights and quotas may.
            Some(400..=499) => Ok(Err(Unacceptable {
                reason: "Invalid",
                message: format!("the API server refuses {}: {error}", object["kind"]),
            })),
            Some(_) | None => Err(error),
        };
        for object in wanted.objects(&self.settings, root_pem) {
            let api = self.api(&object);
            let name = object["metadata"]["name"].as_str().unwrap_or_default();
            match api.get_opt(name).await {
                Ok(Some(present)) if !belongs(&present, &wanted.name) => {
                    let message = format!(
                        "{} {name} exists and is not this Gateway's; remove it, or run the waypoint yourself",
                        object["kind"].as_str().unwrap_or_default()
                    );
                    return Ok(Err(Unacceptable { reason: "Conflict", message }));
                }
                Ok(_) => {}
                Err(error) => return refused(&object, error),
            }
            let params = PatchParams::apply(FIELD_MANAGER).force();
            if let Err(error) = api.patch(name, &params, &Patch::Apply(&object)).await {
                return refused(&object, error);
            }
        }
        let deployments = dynamic("apps", "v1", "Deployment", "deployments");
        let api: Api<DynamicObject> =
            Api::namespaced_with(self.client.clone(), &wanted.namespace, &deployments);
        let status = api.get_opt(&wanted.name).await?.map(|found| found.data["status"].clone());
        let ready = status.and_then(|status| status["readyReplicas"].as_u64()).unwrap_or(0);
        if ready == 0 {
            let message = format!("no pod of Deployment {} is ready", wanted.name);
            return Ok(Err(Unacceptable { reason: "Pending", message }));
        }
        Ok(Ok(()))
    }

    /// Where the waypoint is: its Service's name, and the addresses of it.
    async fn addresses(&self, wanted: &Wanted) -> kube::Result<Vec<Value>> {
        let services = dynamic("", "v1", "Service", "services");
        let api: Api<DynamicObject> =
            Api::namespaced_with(self.client.clone(), &wanted.namespace, &services);
        let service = api.get_opt(&wanted.name).await?;
        let ips = service.map(|service| service.data["spec"]["clusterIPs"].clone());
        let ips = ips.unwrap_or_default();
        let (name, namespace) = (&wanted.name, &wanted.namespace);
        let host = format!("{name}.{namespace}.svc.{}", self.settings.cluster_domain);
        let mut addresses = vec![json!({"type": "Hostname", "value": host})];
        let ips = ips.as_array().into_iter().flatten().filter(|ip| **ip != "None");
        addresses.extend(ips.map(|ip| json!({"type": "IPAddress", "value": ip})));
        Ok(addresses)
    }

    /// Writes the Gateway's status, when it says something else. False when somebody else changed the Gateway meanwhile.
    async fn tell(
        &self,
        api: &Api<DynamicObject>,
        mut gateway: DynamicObject,
        value: &Value,
        standing: &Standing,
    ) -> kube::Result<bool> {
        let generation = gateway.metadata.generation.unwrap_or(0);
        let now = now();
        let before = &value["status"];
        let ours = [
            condition("Accepted", &standing.accepted, "Accepted", generation),
            condition("Programmed", &standing.programmed, "Programmed", generation),
        ];
        let mut status = if before.is_object() { before.clone() } else { json!({}) };
        if let Some(conditions) = merged(&before["conditions"], &ours, &now) {
            status["conditions"] = json!(conditions);
        }
        status["addresses"] = json!(standing.addresses);
        let listeners = listeners(value).map(|listener| {
            let known = before["listeners"].as_array().into_iter().flatten();
            let before = known.into_iter().find(|one| one["name"] == listener["name"]);
            listener_status(listener, before, standing, generation, &now)
        });
        status["listeners"] = json!(listeners.collect::<Vec<_>>());
        if status == *before {
            return Ok(true);
        }
        let name = gateway.metadata.name.clone().unwrap_or_default();
        if let Err(refused) = &standing.programmed
            && refused.reason != "Pending"
        {
            warn!(gateway = name, reason = refused.reason, "no waypoint: {}", refused.message);
        } else if standing.programmed.is_ok() {
            info!(gateway = name, "the waypoint serves");
        }
        gateway.data["status"] = status;
        match api.replace_status(&name, &PostParams::default(), &gateway).await {
            Ok(_written) => Ok(true),
            Err(error) if matches!(refusal(&error), Some(404 | 409)) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Says that our class is looked after. There may be none: Gateways name it all the same.
    async fn accept_class(&self) -> kube::Result<()> {
        let classes = dynamic(GATEWAY_GROUP, "v1", "GatewayClass", "gatewayclasses");
        let api: Api<DynamicObject> = Api::all_with(self.client.clone(), &classes);
        let mut class = match api.get(WAYPOINT_CLASS).await {
            Ok(class) => class,
            // There is none, or the kind is not installed.
            Err(error) if refusal(&error) == Some(404) => return Ok(()),
            Err(error) => return Err(error),
        };
        if class.data["spec"]["controllerName"] != CONTROLLER_NAME {
            return Ok(());
        }
        let generation = class.metadata.generation.unwrap_or(0);
        let ours = [condition("Accepted", &Ok(()), "Accepted", generation)];
        let Some(conditions) = merged(&class.data["status"]["conditions"], &ours, &now()) else {
            return Ok(());
        };
        if !class.data["status"].is_object() {
            class.data["status"] = json!({});
        }
        class.data["status"]["conditions"] = json!(conditions);
        api.replace_status(WAYPOINT_CLASS, &PostParams::default(), &class).await.map(drop)
    }

    async fn gateway(
        &self,
        key: &Key,
    ) -> kube::Result<Option<(Api<DynamicObject>, DynamicObject)>> {
        for version in Kind::Gateway.versions() {
            let resource = resource(Kind::Gateway, version);
            let api = Api::namespaced_with(self.client.clone(), &key.namespace, &resource);
            if let Some(object) = api.get_opt(&key.name).await? {
                return Ok(Some((api, object)));
            }
        }
        Ok(None)
    }

    fn api(&self, object: &Value) -> Api<DynamicObject> {
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let (api_version, kind) = (text(&object["apiVersion"]), text(&object["kind"]));
        let (group, version) = api_version.split_once('/').unwrap_or(("", &api_version));
        let resource = dynamic(group, version, &kind, &format!("{}s", kind.to_lowercase()));
        let namespace = text(&object["metadata"]["namespace"]);
        Api::namespaced_with(self.client.clone(), &namespace, &resource)
    }
}

fn dynamic(group: &str, version: &str, kind: &str, plural: &str) -> ApiResource {
    ApiResource {
        group: group.to_owned(),
        version: version.to_owned(),
        api_version: if group.is_empty() {
            version.to_owned()
        } else {
            format!("{group}/{version}")
        },
        kind: kind.to_owned(),
        plural: plural.to_owned(),
    }
}

/// True when an object was made for the Gateway of that name, or an earlier one of it.
fn belongs(object: &DynamicObject, gateway: &str) -> bool {
    object.metadata.owner_references.iter().flatten().any(|owner| {
        owner.kind == "Gateway" && owner.name == gateway && owner.controller == Some(true)
    })
}

fn condition(
    kind: &'static str,
    outcome: &Result<(), Unacceptable>,
    good: &'static str,
    generation: i64,
) -> Condition {
    let (reason, message) = match outcome {
        Ok(()) => (good, String::new()),
        Err(refused) => (refused.reason, refused.message.chars().take(MAX_MESSAGE).collect()),
    };
    Condition { kind, is_true: outcome.is_ok(), reason, message, generation }
}

fn listener_status(
    listener: &Value,
    before: Option<&Value>,
    standing: &Standing,
    generation: i64,
    now: &str,
) -> Value {
    let accepted = if is_hbone(listener) {
        Ok(())
    } else {
        let message = "a waypoint serves port 15008 with protocol HBONE alone".to_owned();
        Err(Unacceptable { reason: "UnsupportedProtocol", message })
    };
    let programmed = match (&accepted, &standing.programmed) {
        (Ok(()), Ok(())) => Ok(()),
        (Ok(()), Err(refused)) => {
            Err(Unacceptable { reason: "Pending", message: refused.message.clone() })
        }
        (Err(refused), _) => {
            Err(Unacceptable { reason: "Invalid", message: refused.message.clone() })
        }
    };
    let ours = [
        condition("Accepted", &accepted, "Accepted", generation),
        condition("Programmed", &programmed, "Programmed", generation),
        condition("ResolvedRefs", &Ok(()), "ResolvedRefs", generation),
    ];
    let present = before.map_or(Value::Null, |before| before["conditions"].clone());
    let conditions = merged(&present, &ours, now).map_or(present, |conditions| json!(conditions));
    // Routes of a mesh are attached to services.
    json!({"name": listener["name"], "attachedRoutes": 0, "supportedKinds": [], "conditions": conditions})
}

#[cfg(test)]
mod tests {
    use super::super::fake_api::FakeApi;
    use super::super::lease::Election;
    use super::*;
    use crate::index::IndexSettings;
    use crate::manifest::{Parsed, object};
    use crate::mesh::Mesh;
    use crate::source::{Change, SourceEvent};
    use crate::state_dir::StateDir;

    const GATEWAY: &str = "/apis/gateway.networking.k8s.io/v1/namespaces/shop/gateways/wp";
    const DEPLOYMENT: &str = "/apis/apps/v1/namespaces/shop/deployments/wp";
    const SERVICE: &str = "/api/v1/namespaces/shop/services/wp";

    fn gateway(generation: i64, port: i64) -> Value {
        json!({
            "apiVersion": "gateway.networking.k8s.io/v1", "kind": "Gateway",
            "metadata": {"name": "wp", "namespace": "shop", "uid": "g1", "generation": generation},
            "spec": {
                "gatewayClassName": WAYPOINT_CLASS,
                "infrastructure": {"labels": {"team": "shop"}},
                "listeners": [{"name": "mesh", "port": port, "protocol": "HBONE"}],
            },
        })
    }

    fn settings() -> WaypointSettings {
        WaypointSettings {
            image: "culvert.dev/culvert-waypoint:1".into(),
            pull_policy: "IfNotPresent".into(),
            pull_secrets: vec!["registry".into()],
            replicas: 2,
            resources: json!({}),
            controller: "https://culvert-controller.culvert-system.svc:15012".into(),
            audience: "culvert".into(),
            cluster_domain: "cluster.local".into(),
            prefer_waypoints: false,
            log: "info".into(),
        }
    }

    struct Stage {
        api: FakeApi,
        mesh: SharedMesh,
        waypoints: Waypoints,
        _folder: tempfile::TempDir,
    }

    impl Stage {
        fn new() -> Self {
            let (api, folder) = (FakeApi::default(), tempfile::tempdir().unwrap());
            let mesh = Arc::new(Mesh::new(IndexSettings::default()));
            let files = StateDir::open(&folder.path().join("state")).unwrap();
            let authority =
                Authority::open(files, "cluster.local", std::time::SystemTime::now()).unwrap();
            let waypoints =
                Waypoints::new(&api.client(), Arc::clone(&mesh), Arc::new(authority), settings());
            Self { api, mesh, waypoints, _folder: folder }
        }

        fn learn(&self, value: Value) {
            let Parsed::Object(object) = object(&value) else { panic!("{value}") };
            self.mesh.source_event(SourceEvent::Changes(vec![Change::Upsert(object)]));
            self.api.put(GATEWAY, Some(value));
        }

        fn condition(&self, kind: &str) -> Value {
            let status = self.api.get(GATEWAY).unwrap()["status"].clone();
            let conditions = status["conditions"].as_array().cloned().unwrap_or_default();
            conditions.into_iter().find(|one| one["type"] == kind).unwrap_or_default()
        }

        fn reason(&self, kind: &str) -> String {
            let condition = self.condition(kind);
            format!("{} {}", condition["status"], condition["reason"]).replace('"', "")
        }
    }

    #[tokio::test]
    async fn a_gateway_gets_its_waypoint_and_its_status_says_so() {
        let mut stage = Stage::new();
        let (_trigger, drain) = mesh_runtime::Drain::new();
        let name = "mesh/controller".parse().unwrap();
        let (election, leadership) = Election::new(&stage.api.client(), &name, "one".into());
        stage.learn(gateway(1, 15008));
        stage.waypoints.look(&leadership).await;
        assert_eq!(stage.api.get(DEPLOYMENT), None, "it does not lead");
        tokio::spawn(election.run(drain));
        while !leadership.is_held() {
            tokio::task::yield_now().await;
        }
        stage.waypoints.look(&leadership).await;
        let deployment = stage.api.get(DEPLOYMENT).unwrap();
        assert_eq!(deployment["metadata"]["ownerReferences"][0]["uid"], "g1");
        assert_eq!(deployment["spec"]["replicas"], 2);
        let labels = &deployment["spec"]["template"]["metadata"]["labels"];
        assert_eq!(labels[GATEWAY_NAME], "wp");
        assert_eq!(labels["team"], "shop");
        assert_eq!(labels["culvert.dev/dataplane-mode"], "none");
        assert_eq!(stage.reason("Accepted"), "True Accepted");
        assert_eq!(stage.reason("Programmed"), "False Pending");
        assert_eq!(stage.api.get(GATEWAY).unwrap()["status"]["addresses"], json!([]));

        // A pod is ready.
        let mut ready = deployment;
        ready["status"] = json!({"readyReplicas": 1});
        stage.api.put(DEPLOYMENT, Some(ready));
        let mut service = stage.api.get(SERVICE).unwrap();
        service["spec"]["clusterIPs"] = json!(["10.96.0.7"]);
        stage.api.put(SERVICE, Some(service));
        stage.waypoints.look(&leadership).await;
        assert_eq!(stage.reason("Programmed"), "True Programmed");
        let status = stage.api.get(GATEWAY).unwrap()["status"].clone();
        assert_eq!(status["addresses"][0]["value"], "wp.shop.svc.cluster.local");
        assert_eq!(status["addresses"][1]["value"], "10.96.0.7");
        assert_eq!(status["listeners"][0]["conditions"][1]["status"], "True");

        // Somebody breaks it; it is put right when it is time, and nothing is done before.
        let written = stage.api.get(GATEWAY);
        stage.api.put(SERVICE, None);
        stage.waypoints.look(&leadership).await;
        assert_eq!(stage.api.get(SERVICE), None, "it is not time yet");
        for known in stage.waypoints.known.values_mut() {
            known.settled = false;
        }
        stage.waypoints.look(&leadership).await;
        assert!(stage.api.get(SERVICE).is_some());
        assert_ne!(written, None);

        // One that no waypoint can be made of.
        stage.learn(gateway(2, 80));
        stage.waypoints.look(&leadership).await;
        assert_eq!(stage.reason("Accepted"), "False ListenersNotValid");
        assert_eq!(stage.reason("Programmed"), "False Invalid");
    }

    #[tokio::test]
    async fn what_is_not_its_own_is_left_alone() {
        let mut stage = Stage::new();
        let (_trigger, drain) = mesh_runtime::Drain::new();
        let name = "mesh/controller".parse().unwrap();
        let (election, leadership) = Election::new(&stage.api.client(), &name, "one".into());
        tokio::spawn(election.run(drain));
        while !leadership.is_held() {
            tokio::task::yield_now().await;
        }
        let theirs = json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "wp", "namespace": "shop"}});
        stage.api.put(SERVICE, Some(theirs));
        let before = stage.api.get(SERVICE);
        stage.learn(gateway(1, 15008));
        stage.waypoints.look(&leadership).await;
        assert_eq!(stage.reason("Programmed"), "False Conflict");
        assert!(stage.condition("Programmed")["message"].as_str().unwrap().contains("Service wp"));
        assert_eq!(stage.api.get(SERVICE), before);
        assert_eq!(stage.api.get(DEPLOYMENT), None);
    }

    #[test]
    fn the_number_of_pods_may_be_asked_for() {
        let check = |asked: &str, expected: Result<u64, &str>| {
            let mut gateway = gateway(1, 15008);
            gateway["metadata"]["annotations"] = json!({objects::REPLICAS: asked});
            let replicas = Wanted::of(&gateway, &settings())
                .map(|wanted| wanted.objects(&settings(), "")[3]["spec"]["replicas"].as_u64());
            assert_eq!(replicas.map_err(|refused| refused.reason), expected.map(Some), "{asked}");
        };
        check("3", Ok(3));
        for wrong in ["0", "101", "-1", "many", ""] {
            check(wrong, Err("InvalidParameters"));
        }
    }
}
