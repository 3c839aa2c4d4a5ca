//! Whose identities a caller may have.

use std::collections::BTreeMap;

use mesh_model::SpiffeId;
use mesh_wire::waypoint_of_node;

use super::Index;
use super::objects::in_namespace;

/// The label of a Gateway's pods, by the Gateway API.
const GATEWAY_NAME_LABEL: &str = "gateway.networking.k8s.io/gateway-name";

impl Index {
    /// True when a pod or WorkloadEntry of that identity is bound to `node`, whether it has an address yet or not, and
    /// has not ended.
    #[must_use]
    pub fn runs_on(&self, node: &str, identity: &SpiffeId) -> bool {
        let is_it = |namespace: &str, account: &str| {
            *namespace == *identity.namespace() && *account == *identity.service_account()
        };
        if *identity.trust_domain() != *self.settings.trust_domain || node.is_empty() {
            return false;
        }
        if let Some((namespace, name)) = waypoint_of_node(node) {
            // A waypoint proves to be a Gateway: it gets the identity of that Gateway's pods, and no other.
            let is_of = |labels: &BTreeMap<String, String>| {
                labels.get(GATEWAY_NAME_LABEL).is_some_and(|of| of == name)
            };
            return in_namespace(&self.objects.pods, namespace).any(|(key, pod)| {
                !pod.terminal
                    && is_of(&pod.meta.labels)
                    && is_it(&key.namespace, &pod.service_account)
            }) || in_namespace(&self.objects.workload_entries, namespace).any(
                |(key, entry)| {
                    is_of(&entry.endpoint.labels)
                        && is_it(&key.namespace, &entry.endpoint.service_account)
                },
            );
        }
        let pods = self.objects.pods_by_node.get(node).into_iter().flatten();
        pods.filter_map(|key| self.objects.pods.get(key)).any(|pod| {
            !pod.terminal && !pod.host_network && is_it(&pod.meta.namespace, &pod.service_account)
        }) || in_namespace(&self.objects.workload_entries, identity.namespace()).any(
            |(_, entry)| {
                *entry.node == *node
                    && is_it(&entry.meta.namespace, &entry.endpoint.service_account)
            },
        )
    }
}
