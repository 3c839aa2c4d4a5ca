//! Which version of a policy object is in force.

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
            (None, _) => None,
        };
        meta.map(|meta| meta.generation)
    }
}
