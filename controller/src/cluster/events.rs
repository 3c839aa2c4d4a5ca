//! Events: what an operator should do something about, at the object it is about.

use jiff::Timestamp;
use k8s_openapi::api::core::v1::ObjectReference;
use k8s_openapi::api::events::v1::Event;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use kube::api::PostParams;
use kube::core::ObjectMeta;
use kube::{Api, Client};

/// Who tells.
const CONTROLLER: &str = "culvert.dev/controller";
/// Longest note. Source: validation of `events.k8s.io`.
const MAX_NOTE: usize = 1_024;

/// What is told.
#[derive(Clone, Debug)]
pub(super) struct Warning {
    /// The object it is about.
    pub(super) regarding: ObjectReference,
    /// One word.
    pub(super) reason: &'static str,
    /// What is being done, one word.
    pub(super) action: &'static str,
    /// The sentence for people.
    pub(super) note: String,
}

/// Makes Events.
#[derive(Clone)]
pub(super) struct Events {
    client: Client,
    identity: String,
}

impl Events {
    /// Events by the controller named `identity`.
    pub(super) const fn new(client: Client, identity: String) -> Self {
        Self { client, identity }
    }

    /// Makes an Event in the namespace of its object.
    pub(super) async fn tell(&self, warning: Warning) -> kube::Result<()> {
        let now = Timestamp::now();
        let namespace = warning.regarding.namespace.clone().unwrap_or_default();
        // A name has at most 253 characters.
        let about: String =
            warning.regarding.name.iter().flat_map(|name| name.chars().take(200)).collect();
        let event = Event {
            metadata: ObjectMeta {
                name: Some(format!("{about}.{:x}", now.as_nanosecond())),
                ..ObjectMeta::default()
            },
            action: Some(warning.action.to_owned()),
            event_time: Some(MicroTime(now)),
            note: Some(shortened(&warning.note)),
            reason: Some(warning.reason.to_owned()),
            regarding: Some(warning.regarding),
            reporting_controller: Some(CONTROLLER.to_owned()),
            reporting_instance: Some(self.identity.clone()),
            type_: Some("Warning".to_owned()),
            ..Event::default()
        };
        let events: Api<Event> = Api::namespaced(self.client.clone(), &namespace);
        events.create(&PostParams::default(), &event).await?;
        metrics::counter!(mesh_telemetry::metric::CONTROLLER_EVENTS.name, "reason" => warning.reason)
            .increment(1);
        Ok(())
    }
}

fn shortened(note: &str) -> String {
    if note.len() <= MAX_NOTE {
        return note.to_owned();
    }
    let end = (0..=MAX_NOTE - 3).rev().find(|at| note.is_char_boundary(*at)).unwrap_or(0);
    format!("{}...", &note[..end])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn notes_fit() {
        assert_eq!(shortened("short"), "short");
        let long = shortened(&"ü".repeat(2_000));
        assert!(long.len() <= MAX_NOTE && long.ends_with("ü..."), "{}", long.len());
    }
}
