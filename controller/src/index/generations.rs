//! Which version of an object is in force.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::Index;
use super::objects::Key;
use crate::manifest::{Kind, ObjectKey};

impl Index {
    /// The generation of a policy object that is in force; none of one that is not there.
    #[must_use]
    pub fn policy_generation(&self, key: &ObjectKey) -> Option<i64> {
        let objects = &self.objects;
        let at = Key::from(key);
        let meta = match (objects.unreadable.get(key), key.kind) {
            (Some(policy), _) => Some(&policy.meta),
            (None, Kind::AuthorizationPolicy) => {
                objects.authorizations.get(&at).map(|policy| &policy.meta)
            }
            (None, Kind::PeerAuthentication) => objects.peers.get(&at).map(|policy| &policy.meta),
            (None, Kind::RequestAuthentication) => {
                objects.authentications.get(&at).map(|object| &object.meta)
            }
            (None, _) => None,
        };
        meta.map(|meta| meta.generation)
    }

    /// The Gateways of a class that are not being deleted, each with its uid and generation.
    #[must_use]
    pub fn gateways_of_class(&self, class: &str) -> BTreeMap<Key, (Arc<str>, i64)> {
        let all = self.objects.gateway_objects.iter();
        let of_class =
            all.filter(|(_, gateway)| *gateway.class == *class && !gateway.meta.deleting);
        of_class
            .map(|(key, gateway)| {
                (key.clone(), (Arc::clone(&gateway.meta.uid), gateway.meta.generation))
            })
            .collect()
    }
}
