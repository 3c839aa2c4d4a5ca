//! What a waypoint consists of in a cluster, as objects to be applied.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use super::WaypointSettings;
use crate::cluster::roots;
use crate::manifest::gateway::WAYPOINT_CLASS;

/// Labels of a Gateway's pods, by the Gateway API.
pub(crate) const GATEWAY_NAME: &str = "gateway.networking.k8s.io/gateway-name";
const GATEWAY_CLASS: &str = "gateway.networking.k8s.io/gateway-class-name";
/// How many pods, on the Gateway.
pub(super) const REPLICAS: &str = "culvert.dev/replicas";
/// Port and protocol of a waypoint's listener.
pub(super) const HBONE_PORT: i64 = 15008;
pub(super) const HBONE: &str = "HBONE";
/// Most pods that a Gateway may ask for.
const MAX_REPLICAS: u32 = 100;
/// How long a waypoint's streams may go on when its pod ends, seconds.
const DRAIN_SECONDS: u32 = 30;
/// Whom a container runs as.
const USER: u32 = 65_532;

/// A Gateway as the API server holds it, as far as its waypoint depends on it.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Wanted {
    pub(super) namespace: String,
    pub(super) name: String,
    uid: String,
    api_version: String,
    replicas: u32,
    labels: BTreeMap<String, String>,
    annotations: BTreeMap<String, String>,
}

/// Why a Gateway gets no waypoint: a reason of the Gateway API and a sentence.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Unacceptable {
    pub(super) reason: &'static str,
    pub(super) message: String,
}

impl Wanted {
    /// Reads a Gateway.
    ///
    /// # Errors
    /// What of it a waypoint cannot be made of.
    pub(super) fn of(gateway: &Value, settings: &WaypointSettings) -> Result<Self, Unacceptable> {
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let meta = &gateway["metadata"];
        if !listeners(gateway).any(is_hbone) {
            return Err(Unacceptable {
                reason: "ListenersNotValid",
                message: format!(
                    "a waypoint needs a listener with port {HBONE_PORT} and protocol {HBONE}"
                ),
            });
        }
        if !gateway["spec"]["infrastructure"]["parametersRef"].is_null() {
            return Err(Unacceptable {
                reason: "InvalidParameters",
                message: "spec.infrastructure.parametersRef: there are no parameters".to_owned(),
            });
        }
        let replicas = match meta["annotations"][REPLICAS].as_str() {
            None => settings.replicas,
            Some(asked) => asked
                .parse()
                .ok()
                .filter(|number| (1..=MAX_REPLICAS).contains(number))
                .ok_or_else(|| Unacceptable {
                    reason: "InvalidParameters",
                    message: format!(
                        "annotation {REPLICAS} is {asked:?}, not a number from 1 to {MAX_REPLICAS}"
                    ),
                })?,
        };
        let infrastructure = &gateway["spec"]["infrastructure"];
        Ok(Self {
            namespace: text(&meta["namespace"]),
            name: text(&meta["name"]),
            uid: text(&meta["uid"]),
            api_version: text(&gateway["apiVersion"]),
            replicas,
            labels: strings(&infrastructure["labels"]),
            annotations: strings(&infrastructure["annotations"]),
        })
    }

    /// The name of the ConfigMap with the roots.
    pub(super) fn roots_name(&self) -> String {
        format!("{}-culvert-root", self.name)
    }

    /// The objects, in the order in which they are needed.
    pub(super) fn objects(&self, settings: &WaypointSettings, root_pem: &str) -> [Value; 5] {
        let name = &self.name;
        let selector = json!({GATEWAY_NAME: name});
        let mut account = self.object("v1", "ServiceAccount", name);
        account["automountServiceAccountToken"] = json!(false);
        let mut map = self.object("v1", "ConfigMap", &self.roots_name());
        map["data"] = json!({roots::KEY: root_pem});
        let mut service = self.object("v1", "Service", name);
        service["spec"] = json!({
            "type": "ClusterIP",
            "ipFamilyPolicy": "PreferDualStack",
            "selector": selector,
            "ports": [{"name": "tcp-hbone", "port": HBONE_PORT, "targetPort": "hbone", "protocol": "TCP"}],
        });
        let mut deployment = self.object("apps/v1", "Deployment", name);
        deployment["spec"] = json!({
            "replicas": self.replicas,
            "selector": {"matchLabels": selector},
            "strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": 0, "maxSurge": 1}},
            "template": {
                "metadata": {"labels": self.pod_labels(), "annotations": self.annotations},
                "spec": self.pod(settings),
            },
        });
        let mut budget = self.object("policy/v1", "PodDisruptionBudget", name);
        budget["spec"] = json!({"maxUnavailable": 1, "selector": {"matchLabels": selector}});
        [account, map, service, deployment, budget]
    }

    fn object(&self, api_version: &str, kind: &str, name: &str) -> Value {
        json!({
            "apiVersion": api_version,
            "kind": kind,
            "metadata": {
                "name": name,
                "namespace": self.namespace,
                "labels": self.labels(),
                "annotations": self.annotations,
                // Blocking the Gateway's deletion would need the right to change its finalizers.
                "ownerReferences": [{
                    "apiVersion": self.api_version,
                    "kind": "Gateway",
                    "name": self.name,
                    "uid": self.uid,
                    "controller": true,
                    "blockOwnerDeletion": false,
                }],
            },
        })
    }

    fn labels(&self) -> BTreeMap<String, String> {
        let own = [
            (GATEWAY_NAME, self.name.as_str()),
            (GATEWAY_CLASS, WAYPOINT_CLASS),
            ("app.kubernetes.io/name", "culvert"),
            ("app.kubernetes.io/component", "waypoint"),
            ("app.kubernetes.io/managed-by", "culvert-controller"),
        ];
        let mut labels = self.labels.clone();
        labels.extend(own.map(|(key, value)| (key.to_owned(), value.to_owned())));
        labels
    }

    fn pod_labels(&self) -> BTreeMap<String, String> {
        let mut labels = self.labels();
        // It speaks the mesh's own protocol, and is not captured.
        labels.insert("culvert.dev/dataplane-mode".to_owned(), "none".to_owned());
        labels
    }

    fn pod(&self, settings: &WaypointSettings) -> Value {
        let env = |name: &str, value: &str| json!({"name": name, "value": value});
        let mut variables = vec![
            env("CULVERT_WAYPOINT", &format!("{}/{}", self.namespace, self.name)),
            env("CULVERT_CONTROLLER", &settings.controller),
            env("CULVERT_CONTROLLER_ROOT", "/etc/culvert/root/root.pem"),
            env("CULVERT_TOKEN_FILE", "/etc/culvert/token/token"),
            env("CULVERT_STATE_DIR", "/var/lib/culvert-waypoint"),
            env("CULVERT_DRAIN_SECONDS", &DRAIN_SECONDS.to_string()),
            env("CULVERT_LOG", &settings.log),
        ];
        if settings.prefer_waypoints {
            variables.push(env("CULVERT_PREFER_WAYPOINTS", "true"));
        }
        let secrets: Vec<_> =
            settings.pull_secrets.iter().map(|name| json!({"name": name})).collect();
        let container = json!({
            "name": "waypoint",
            "image": settings.image,
            "imagePullPolicy": settings.pull_policy,
            "env": variables,
            "ports": [
                {"name": "hbone", "containerPort": HBONE_PORT, "protocol": "TCP"},
                {"name": "metrics", "containerPort": 15020, "protocol": "TCP"},
                {"name": "status", "containerPort": 15021, "protocol": "TCP"},
            ],
            "readinessProbe": {"httpGet": {"path": "/ready", "port": "status"}, "periodSeconds": 2},
            "livenessProbe": {"tcpSocket": {"port": "status"}, "periodSeconds": 10},
            "resources": settings.resources,
            "securityContext": {
                "allowPrivilegeEscalation": false,
                "readOnlyRootFilesystem": true,
                "capabilities": {"drop": ["ALL"]},
            },
            "volumeMounts": [
                {"name": "root", "mountPath": "/etc/culvert/root", "readOnly": true},
                {"name": "token", "mountPath": "/etc/culvert/token", "readOnly": true},
                {"name": "state", "mountPath": "/var/lib/culvert-waypoint"},
            ],
        });
        json!({
            "serviceAccountName": self.name,
            "automountServiceAccountToken": false,
            "imagePullSecrets": secrets,
            "terminationGracePeriodSeconds": DRAIN_SECONDS + 10,
            "securityContext": {
                "runAsNonRoot": true, "runAsUser": USER, "runAsGroup": USER, "fsGroup": USER,
                "seccompProfile": {"type": "RuntimeDefault"},
            },
            "topologySpreadConstraints": [{
                "maxSkew": 1,
                "topologyKey": "kubernetes.io/hostname",
                "whenUnsatisfiable": "ScheduleAnyway",
                "labelSelector": {"matchLabels": {GATEWAY_NAME: self.name}},
            }],
            "containers": [container],
            "volumes": [
                {"name": "root", "configMap": {"name": self.roots_name()}},
                {"name": "state", "emptyDir": {}},
                {"name": "token", "projected": {"sources": [
                    {"serviceAccountToken": {"audience": settings.audience, "path": "token", "expirationSeconds": 3600}},
                ]}},
            ],
        })
    }
}

/// The Gateway's listeners.
pub(super) fn listeners(gateway: &Value) -> impl Iterator<Item = &Value> {
    gateway["spec"]["listeners"].as_array().into_iter().flatten()
}

/// True for the listener that a waypoint serves.
pub(super) fn is_hbone(listener: &Value) -> bool {
    listener["port"] == HBONE_PORT && listener["protocol"] == HBONE
}

fn strings(value: &Value) -> BTreeMap<String, String> {
    let pairs = value.as_object().into_iter().flatten();
    pairs.filter_map(|(key, value)| Some((key.clone(), value.as_str()?.to_owned()))).collect()
}
