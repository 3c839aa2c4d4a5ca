//! An object as it comes from the API server, without what nobody here reads.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::Resource;
use kube::core::{ApiResource, DynamicResourceScope};
use serde::de::{Deserialize, Deserializer, Error};
use serde_json::Value;
use std::borrow::Cow;

/// Annotation in which kubectl keeps a copy of the whole object.
const LAST_APPLIED: &str = "kubectl.kubernetes.io/last-applied-configuration";

/// One object, decoded; its metadata holds no more than a watch needs.
#[derive(Clone, Debug)]
pub(super) struct Trimmed {
    meta: ObjectMeta,
    /// All of it, but for what is large and never read.
    pub(super) value: Value,
}

impl<'de> Deserialize<'de> for Trimmed {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let mut value = Value::deserialize(deserializer)?;
        let Some(metadata) = value.get_mut("metadata").and_then(Value::as_object_mut) else {
            return Err(D::Error::custom("an object without metadata"));
        };
        metadata.remove("managedFields");
        if let Some(annotations) = metadata.get_mut("annotations").and_then(Value::as_object_mut) {
            annotations.remove(LAST_APPLIED);
        }
        let text = |name: &str| metadata.get(name).and_then(Value::as_str).map(str::to_owned);
        let meta = ObjectMeta {
            name: text("name"),
            namespace: text("namespace"),
            resource_version: text("resourceVersion"),
            ..ObjectMeta::default()
        };
        Ok(Self { meta, value })
    }
}

impl Resource for Trimmed {
    type DynamicType = ApiResource;
    type Scope = DynamicResourceScope;

    fn kind(resource: &ApiResource) -> Cow<'_, str> {
        resource.kind.as_str().into()
    }

    fn group(resource: &ApiResource) -> Cow<'_, str> {
        resource.group.as_str().into()
    }

    fn version(resource: &ApiResource) -> Cow<'_, str> {
        resource.version.as_str().into()
    }

    fn plural(resource: &ApiResource) -> Cow<'_, str> {
        resource.plural.as_str().into()
    }

    fn meta(&self) -> &ObjectMeta {
        &self.meta
    }

    fn meta_mut(&mut self) -> &mut ObjectMeta {
        &mut self.meta
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_nobody_reads_is_not_kept() {
        let object = json!({
            "metadata": {
                "name": "a", "namespace": "b", "resourceVersion": "7",
                "managedFields": [{"manager": "kubectl"}],
                "annotations": {(LAST_APPLIED): "{}", "culvert.dev/dns-capture": "true"},
            },
            "spec": {"nodeName": "n"},
        });
        let trimmed: Trimmed = serde_json::from_value(object).unwrap();
        assert_eq!(trimmed.meta().resource_version.as_deref(), Some("7"));
        assert_eq!(
            trimmed.value["metadata"],
            json!({
                "name": "a", "namespace": "b", "resourceVersion": "7",
                "annotations": {"culvert.dev/dns-capture": "true"},
            })
        );
        assert_eq!(trimmed.value["spec"]["nodeName"], "n");
        assert!(serde_json::from_value::<Trimmed>(json!({"kind": "Status"})).is_err());
    }
}
