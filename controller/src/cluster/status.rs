//! Writes how policies stand into their status, and Events about those that do not do what they say. One controller does:
//! the leader.

use std::collections::BTreeMap;
use std::time::Duration;

use k8s_openapi::api::core::v1::ObjectReference;
use kube::api::PostParams;
use kube::core::DynamicObject;
use kube::{Api, Client, ResourceExt as _};
use serde_json::json;
use tracing::{debug, warn};

use super::conditions::{Condition, PolicyReport, conditions, merged, now};
use super::events::{Events, Warning};
use super::lease::Leadership;
use super::refusal;
use crate::manifest::ObjectKey;
use crate::mesh::SharedMesh;
use crate::source::kubernetes::resource;

/// Between looks at what has changed.
const INTERVAL: Duration = Duration::from_secs(2);
/// Most objects written in one look; the others come next.
const MAX_WRITES: usize = 100;

/// Keeps the status of policies.
pub(crate) struct StatusWriter {
    client: Client,
    mesh: SharedMesh,
    events: Events,
    /// What was judged last, and what of it is written.
    judged: Option<u64>,
    reports: BTreeMap<ObjectKey, PolicyReport>,
    written: BTreeMap<ObjectKey, PolicyReport>,
}

/// What became of one object.
#[derive(Debug, PartialEq, Eq)]
enum Outcome {
    /// Its status says it.
    Done,
    /// Its newest version is not judged yet, or somebody else changed it meanwhile.
    Later,
}

impl StatusWriter {
    pub(crate) fn new(client: &Client, mesh: SharedMesh, identity: String) -> Self {
        Self {
            client: client.clone(),
            mesh,
            events: Events::new(client.clone(), identity),
            judged: None,
            reports: BTreeMap::new(),
            written: BTreeMap::new(),
        }
    }

    /// Writes while `leadership` is held.
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
            // What another leader writes meanwhile is not known here.
            self.judged = None;
            self.written.clear();
            return;
        }
        let revision = self.mesh.revision();
        if self.judged != Some(revision) {
            self.reports = self.mesh.policy_reports();
            self.judged = Some(revision);
            let reports = &self.reports;
            self.written.retain(|key, _| reports.contains_key(key));
        }
        let unwritten: Vec<_> = self
            .reports
            .iter()
            .filter(|(key, report)| self.written.get(*key) != Some(*report))
            .take(MAX_WRITES)
            .map(|(key, report)| (key.clone(), report.clone()))
            .collect();
        for (key, report) in unwritten {
            if !leadership.is_held() {
                return;
            }
            match self.write(&key, &report).await {
                Ok(Outcome::Done) => drop(self.written.insert(key, report)),
                Ok(Outcome::Later) => {}
                Err(error) => warn!(object = %key, %error, "a status is not written; trying again"),
            }
        }
    }

    async fn write(&self, key: &ObjectKey, report: &PolicyReport) -> kube::Result<Outcome> {
        let Some((api, mut object)) = self.find(key).await? else { return Ok(Outcome::Done) };
        let generation = object.metadata.generation.unwrap_or(0);
        let Some(ours) = conditions(report, generation) else { return Ok(Outcome::Later) };
        let now = now();
        let Some(conditions) = merged(&object.data["status"]["conditions"], &ours, &now) else {
            return Ok(Outcome::Done);
        };
        if object.data["status"].is_object() {
            object.data["status"]["conditions"] = json!(conditions);
        } else {
            object.data["status"] = json!({"conditions": conditions});
        }
        let warnings = warnings(&object, key, &ours);
        match api.replace_status(&object.name_any(), &PostParams::default(), &object).await {
            Ok(_written) => {}
            Err(error) => match refusal(&error) {
                Some(409) => return Ok(Outcome::Later),
                // It is gone, or its definition has no status: Events are all there is.
                Some(404) => debug!(object = %key, "it has no status"),
                Some(_) | None => return Err(error),
            },
        }
        for warning in warnings {
            self.events.tell(warning).await?;
        }
        Ok(Outcome::Done)
    }

    /// The object as it is, in the newest version that is served.
    async fn find(
        &self,
        key: &ObjectKey,
    ) -> kube::Result<Option<(Api<DynamicObject>, DynamicObject)>> {
        for version in key.kind.versions() {
            let resource = resource(key.kind, version);
            let api = Api::namespaced_with(self.client.clone(), &key.namespace, &resource);
            if let Some(object) = api.get_opt(&key.name).await? {
                return Ok(Some((api, object)));
            }
        }
        Ok(None)
    }
}

fn warnings(object: &DynamicObject, key: &ObjectKey, ours: &[Condition]) -> Vec<Warning> {
    let regarding = ObjectReference {
        api_version: object.types.as_ref().map(|types| types.api_version.clone()),
        kind: Some(key.kind.as_str().to_owned()),
        namespace: Some(key.namespace.to_string()),
        name: Some(key.name.to_string()),
        uid: object.metadata.uid.clone(),
        ..ObjectReference::default()
    };
    let told = ours.iter().filter(|condition| !condition.is_true).map(|condition| Warning {
        regarding: regarding.clone(),
        reason: condition.reason,
        action: "Enforce",
        note: condition.message.clone(),
    });
    told.collect()
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use serde_json::Value;

    use super::super::fake_api::FakeApi;
    use super::super::lease::Election;
    use super::*;
    use crate::index::IndexSettings;
    use crate::manifest::{Parsed, object};
    use crate::mesh::Mesh;
    use crate::source::{Change, SourceEvent};

    const POLICIES: &str = "/apis/security.istio.io/v1/namespaces/shop/authorizationpolicies";
    const EVENTS: &str = "/apis/events.k8s.io/v1/namespaces/shop/events/";

    fn policy(generation: i64, spec: &Value) -> Value {
        json!({
            "apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy",
            "metadata": {"name": "web", "namespace": "shop", "uid": "u1", "generation": generation},
            "spec": spec,
        })
    }

    fn learn(mesh: &Mesh, value: Value) {
        match object(&value) {
            Parsed::Object(object) => {
                mesh.source_event(SourceEvent::Changes(vec![Change::Upsert(object)]));
            }
            other @ (Parsed::Ignored { .. } | Parsed::Refused { .. }) => panic!("{other:?}"),
        }
    }

    fn condition(api: &FakeApi, kind: &str) -> Value {
        let object = api.get(&format!("{POLICIES}/web")).unwrap();
        let conditions = object["status"]["conditions"].as_array().cloned().unwrap_or_default();
        conditions.into_iter().find(|one| one["type"] == kind).unwrap_or_default()
    }

    #[tokio::test]
    async fn the_leader_writes_what_it_has_judged_and_warns_once() {
        let api = FakeApi::default();
        let mesh = Arc::new(Mesh::new(IndexSettings::default()));
        let allow = json!({"rules": [{"from": [{"source": {"namespaces": ["shop"]}}]}]});
        api.put(&format!("{POLICIES}/web"), Some(policy(1, &allow)));
        learn(&mesh, policy(1, &allow));
        let mut writer = StatusWriter::new(&api.client(), Arc::clone(&mesh), "one".into());
        let name = "mesh/controller".parse().unwrap();
        let (election, leadership) = Election::new(&api.client(), &name, "one".into());
        writer.look(&leadership).await;
        assert_eq!(condition(&api, "culvert.dev/Accepted"), Value::Null, "it does not lead");
        let (trigger, drain) = mesh_runtime::Drain::new();
        let electing = tokio::spawn(election.run(drain));
        while !leadership.is_held() {
            tokio::task::yield_now().await;
        }
        writer.look(&leadership).await;
        assert_eq!(condition(&api, "culvert.dev/Accepted")["status"], "True");
        let enforced = condition(&api, "culvert.dev/Enforced");
        assert_eq!(enforced["status"], "True");
        assert_eq!(enforced["message"], "at every workload of namespace shop");
        assert_eq!(enforced["observedGeneration"], 1);
        assert!(api.below(EVENTS).is_empty());

        // A version that is not judged yet is not vouched for.
        let by_path = json!({"rules": [{"to": [{"operation": {"paths": ["/x"]}}]}]});
        let mut next = api.get(&format!("{POLICIES}/web")).unwrap();
        next["metadata"]["generation"] = json!(2);
        next["spec"] = by_path.clone();
        api.put(&format!("{POLICIES}/web"), Some(next));
        writer.written.clear();
        writer.look(&leadership).await;
        assert_eq!(condition(&api, "culvert.dev/Enforced"), enforced);
        learn(&mesh, policy(2, &by_path));
        writer.look(&leadership).await;
        let partly = condition(&api, "culvert.dev/Enforced");
        assert_eq!(
            (&partly["status"], &partly["reason"]),
            (&json!("False"), &json!("NotAsWritten"))
        );
        assert_eq!(partly["observedGeneration"], 2);
        let told = api.below(EVENTS);
        assert_eq!(told.len(), 1, "{told:?}");
        assert_eq!(told[0]["regarding"]["name"], "web");
        assert_eq!(told[0]["reason"], "NotAsWritten");

        // A new leader finds it written: nothing more is told.
        let mut other = StatusWriter::new(&api.client(), Arc::clone(&mesh), "two".into());
        other.look(&leadership).await;
        assert_eq!(api.below(EVENTS).len(), 1);
        trigger.begin();
        electing.await.unwrap();
        assert!(!leadership.is_held());
    }
}
