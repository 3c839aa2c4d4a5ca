//! Follows one kind: finds out in which version it is served, lists it, watches it, and begins again when it must.

use std::pin::pin;
use std::time::Duration;

use futures_util::{Stream, StreamExt};
use kube::core::{ApiResource, PartialObjectMeta, Status};
use kube::runtime::watcher::{self, Event};
use kube::runtime::{WatchStreamExt, watcher as watch_kind};
use kube::{Api, Client, Resource};
use mesh_telemetry::metric;
use serde_json::{Value, json};
use tokio::sync::mpsc::Sender;
use tokio::time::sleep;
use tracing::{debug, info, warn};

use super::kinds::{built_in, only_metadata, plural, resource};
use super::ledger::Told;
use super::trimmed::Trimmed;
use crate::manifest::{Kind, ObjectKey, object};

/// Pause before a list is begun anew because the API server no longer knows where the last watch ended.
const RELIST_PAUSE: Duration = Duration::from_secs(1);

/// Nobody listens any more.
struct Closed;

/// Follows one kind for ever.
pub(super) struct Follower {
    client: Client,
    kind: Kind,
    recheck_interval: Duration,
}

/// Why a watch ended.
enum End {
    /// It has to be listed from the beginning.
    Stale,
    /// The API server does not know the kind, or not in this version.
    Unknown,
}

/// What the API server knows of a kind.
enum Definition {
    /// It serves this version, which is read here.
    Serves(String),
    /// It is installed, but no version that is read here is served.
    Unreadable,
    /// It is not installed.
    Missing,
}

impl Follower {
    pub(super) const fn new(client: Client, kind: Kind, recheck_interval: Duration) -> Self {
        Self { client, kind, recheck_interval }
    }

    /// Ends when nobody listens.
    pub(super) async fn run(self, tell: Sender<Told>) {
        if self.follow(&tell).await.is_err() {
            debug!(kind = self.kind.as_str(), "nobody listens any more");
        }
    }

    async fn follow(&self, tell: &Sender<Told>) -> Result<(), Closed> {
        let mut waiting = false;
        while !tell.is_closed() {
            match self.definition().await {
                Ok(Definition::Serves(version)) => {
                    if waiting {
                        info!(kind = self.kind.as_str(), version, "the kind is installed");
                    }
                    waiting = false;
                    while let End::Stale = self.watch(&version, tell).await? {
                        sleep(RELIST_PAUSE).await;
                    }
                }
                Ok(Definition::Missing) => {
                    if !waiting {
                        info!(
                            kind = self.kind.as_str(),
                            "the kind is not installed; waiting for it"
                        );
                        send(tell, Told::Absent(self.kind)).await?;
                    }
                    waiting = true;
                }
                Ok(Definition::Unreadable) => warn!(
                    kind = self.kind.as_str(),
                    remedy = format!("serve one of {}", self.kind.versions().join(", ")),
                    "no version of the kind that is read here is served; what it told before stays in force"
                ),
                Err(error) => self.complain(&error, "cannot read the kind's definition"),
            }
            sleep(self.recheck_interval).await;
        }
        Err(Closed)
    }

    /// Asks for the definition itself: unlike the list of served kinds, which an API server that is
    /// just starting fills little by little, its absence is a fact.
    async fn definition(&self) -> kube::Result<Definition> {
        let versions = self.kind.versions();
        if built_in(self.kind) {
            let newest = versions.first().map(|version| (*version).to_owned());
            return Ok(newest.map_or(Definition::Unreadable, Definition::Serves));
        }
        let name = definition_name(self.kind);
        let request = http::Request::get(format!("{DEFINITIONS}/{name}"))
            .body(Vec::new())
            .map_err(kube::Error::HttpError)?;
        let definition: Value = match self.client.request(request).await {
            Ok(definition) => definition,
            Err(kube::Error::Api(status)) if is_missing(&status, &name) => {
                return Ok(Definition::Missing);
            }
            Err(error) => return Err(error),
        };
        Ok(newest_served(&definition, versions).map_or(Definition::Unreadable, Definition::Serves))
    }

    async fn watch(&self, version: &str, tell: &Sender<Told>) -> Result<End, Closed> {
        let resource = resource(self.kind, version);
        let client = self.client.clone();
        let config = watcher::Config::default();
        if only_metadata(self.kind) {
            let api: Api<PartialObjectMeta<Trimmed>> = Api::all_with(client, &resource);
            let events = watch_kind(api, config).default_backoff();
            self.pass_on(events, &resource, tell, metadata_only).await
        } else {
            let api: Api<Trimmed> = Api::all_with(client, &resource);
            let events = watch_kind(api, config).default_backoff();
            self.pass_on(events, &resource, tell, |object: Trimmed| object.value).await
        }
    }

    async fn pass_on<T: Resource>(
        &self,
        events: impl Stream<Item = watcher::Result<Event<T>>>,
        resource: &ApiResource,
        tell: &Sender<Told>,
        value: impl Fn(T) -> Value,
    ) -> Result<End, Closed> {
        let kind = self.kind;
        let read = |item: T| {
            let key = key(kind, &item)?;
            let mut value = value(item);
            // The items of a list do not say what they are.
            value["apiVersion"] = json!(resource.api_version);
            value["kind"] = json!(resource.kind);
            Some((key, object(&value)))
        };
        let mut events = pin!(events);
        while let Some(event) = events.next().await {
            let told = match event {
                Ok(Event::Init) => Some(Told::Listing(kind)),
                Ok(Event::InitApply(item)) => read(item).map(|(key, item)| Told::Listed(key, item)),
                Ok(Event::InitDone) => Some(Told::ListDone(kind)),
                Ok(Event::Apply(item)) => read(item).map(|(key, item)| Told::Applied(key, item)),
                Ok(Event::Delete(item)) => key(kind, &item).map(Told::Deleted),
                Err(error) => {
                    match code(&error) {
                        Some(404) => return Ok(End::Unknown),
                        // A watch that cannot start from where the last one ended would try the same again.
                        Some(410) => return Ok(End::Stale),
                        Some(_) | None => self.complain(&error, "cannot list or watch the kind"),
                    }
                    None
                }
            };
            // Nothing that an API server gives is without a name.
            if let Some(told) = told {
                send(tell, told).await?;
            }
        }
        // The stream never ends by itself.
        Ok(End::Stale)
    }

    fn complain(&self, error: &dyn std::error::Error, problem: &str) {
        let kind = self.kind;
        metrics::counter!(metric::CONTROLLER_SOURCE_ERRORS.name, "kind" => kind.as_str())
            .increment(1);
        warn!(
            kind = kind.as_str(),
            error = chain(error),
            remedy = format!(
                "nothing is lost: it is tried again. The API server must be reachable, and the controller's account \
                 needs list and watch on {} of group {:?}",
                plural(kind),
                kind.group()
            ),
            "{problem}"
        );
    }
}

/// Where definitions of kinds are.
const DEFINITIONS: &str = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions";

fn definition_name(kind: Kind) -> String {
    format!("{}.{}", plural(kind), kind.group())
}

/// True when the API server says that this definition does not exist; a 404 for any other reason,
/// such as an API that is not served yet, says nothing of it.
fn is_missing(status: &Status, name: &str) -> bool {
    let details = status.details.as_ref();
    status.code == 404
        && status.reason == "NotFound"
        && details.is_some_and(|details| details.name == name)
}

fn newest_served(definition: &Value, versions: &[&str]) -> Option<String> {
    let served = definition["spec"]["versions"].as_array()?;
    let is_served = |version: &&&str| {
        served.iter().any(|entry| entry["name"] == **version && entry["served"] == true)
    };
    versions.iter().find(is_served).map(|version| (*version).to_owned())
}

async fn send(tell: &Sender<Told>, told: Told) -> Result<(), Closed> {
    tell.send(told).await.map_err(|_closed| Closed)
}

fn metadata_only(item: PartialObjectMeta<Trimmed>) -> Value {
    let meta = item.metadata;
    json!({
        "metadata": {
            "name": meta.name,
            "namespace": meta.namespace,
            "uid": meta.uid,
            "labels": meta.labels,
            "annotations": meta.annotations,
            "creationTimestamp": meta.creation_timestamp,
            "deletionTimestamp": meta.deletion_timestamp,
        },
    })
}

fn key<T: Resource>(kind: Kind, item: &T) -> Option<ObjectKey> {
    let meta = item.meta();
    let namespace = meta.namespace.as_deref().unwrap_or_default();
    Some(ObjectKey { kind, namespace: namespace.into(), name: meta.name.as_deref()?.into() })
}

/// The HTTP status of an API server's answer.
fn code(error: &watcher::Error) -> Option<u16> {
    match error {
        watcher::Error::InitialListFailed(kube::Error::Api(status))
        | watcher::Error::WatchStartFailed(kube::Error::Api(status))
        | watcher::Error::WatchFailed(kube::Error::Api(status))
        | watcher::Error::WatchError(status) => Some(status.code),
        watcher::Error::InitialListFailed(_)
        | watcher::Error::WatchStartFailed(_)
        | watcher::Error::WatchFailed(_)
        | watcher::Error::NoResourceVersion => None,
    }
}

/// An error with its causes, in one line.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let part = error.to_string();
        if !text.contains(&part) {
            text.push_str(": ");
            text.push_str(&part);
        }
        cause = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_served_version_that_is_read_is_chosen() {
        let version = |name: &str, served: bool| json!({"name": name, "served": served});
        let definition = json!({"spec": {"versions": [
            version("v1alpha3", true), version("v1beta1", true), version("v1", false),
        ]}});
        let versions = Kind::ServiceEntry.versions();
        assert_eq!(newest_served(&definition, versions).as_deref(), Some("v1beta1"));
        let newer = json!({"spec": {"versions": [version("v9", true)]}});
        assert_eq!(newest_served(&newer, versions), None);
        assert_eq!(newest_served(&json!({}), versions), None);
    }

    #[test]
    fn only_the_api_servers_own_word_makes_a_kind_missing() {
        let name = definition_name(Kind::AuthorizationPolicy);
        assert_eq!(name, "authorizationpolicies.security.istio.io");
        let status = |text: Value| serde_json::from_value::<Status>(text).unwrap();
        let missing = status(json!({
            "status": "Failure", "code": 404, "reason": "NotFound",
            "details": {"name": name, "group": "apiextensions.k8s.io"},
        }));
        assert!(is_missing(&missing, &name));
        let not_served = status(json!({"status": "Failure", "code": 404, "reason": "NotFound"}));
        assert!(!is_missing(&not_served, &name));
    }
}
