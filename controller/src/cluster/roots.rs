//! The roots in a ConfigMap, which agents mount to judge the controller by.

use k8s_openapi::api::core::v1::ConfigMap;
use kube::api::{Patch, PatchParams};
use kube::{Api, Client};
use serde_json::json;

use super::ObjectName;

/// The key in the ConfigMap.
pub const KEY: &str = "root.pem";

/// Who wrote the ConfigMap, for the API server's records.
const FIELD_MANAGER: &str = "culvert-controller";

/// Keeps a ConfigMap at the roots.
#[derive(Clone, Debug)]
pub struct RootConfigMap {
    maps: Api<ConfigMap>,
    name: String,
}

impl RootConfigMap {
    /// The ConfigMap `name`.
    #[must_use]
    pub fn new(client: &Client, name: &ObjectName) -> Self {
        Self { maps: Api::namespaced(client.clone(), &name.namespace), name: name.name.clone() }
    }

    /// Writes the roots unless they are there.
    ///
    /// # Errors
    /// When the API server is away or refuses.
    pub async fn write(&self, root_pem: &str) -> kube::Result<()> {
        let found = self.maps.get_opt(&self.name).await?;
        let present = found.and_then(|map| map.data?.remove(KEY));
        if present.as_deref() == Some(root_pem) {
            return Ok(());
        }
        let map = json!({
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": {"name": self.name},
            "data": {KEY: root_pem},
        });
        let params = PatchParams::apply(FIELD_MANAGER).force();
        self.maps.patch(&self.name, &params, &Patch::Apply(&map)).await.map(drop)
    }
}
