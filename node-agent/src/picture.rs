//! The one place that swaps the data plane's picture.

use std::sync::{Arc, Mutex, PoisonError};

use mesh_identity::{InvalidBundle, Svid, TrustBundle};
use mesh_model::SpiffeId;

use crate::control::world::World;
use crate::dataplane::{Changed, DataPlane, Shared, Snapshot};
use crate::error::error_chain;

/// Writes the snapshot that the workers read. Its two sources, the controller and the CA, take turns.
pub(crate) struct Picture {
    shared: Arc<Shared>,
    data_plane: Arc<DataPlane>,
    sources: Mutex<Sources>,
}

/// What the trust bundle is made of.
#[derive(Debug, Default)]
struct Sources {
    /// True once the controller's settings say whom to trust; the CA's answers do not count then, for a root that the
    /// controller has dropped must not live on in an old answer.
    told: bool,
}

impl std::fmt::Debug for Picture {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Picture").finish_non_exhaustive()
    }
}

impl Picture {
    /// A picture over what the data plane shares.
    pub(crate) fn new(shared: Arc<Shared>, data_plane: Arc<DataPlane>) -> Self {
        Self { shared, data_plane, sources: Mutex::default() }
    }

    /// The picture as it is.
    pub(crate) fn snapshot(&self) -> Arc<Snapshot> {
        self.shared.snapshot.load_full()
    }

    /// Takes over what the controller has said.
    ///
    /// Once `synced`, always synced: what the controller has said last stays in force.
    pub(crate) fn controller_spoke(&self, world: &World, changed: Changed, synced: bool) {
        self.swap(changed, |snapshot, sources| {
            snapshot.index = world.index.clone();
            snapshot.policies = world.policies.clone();
            snapshot.synced |= synced;
            if let Some(trust) = &world.trust {
                sources.told = true;
                snapshot.trust = Arc::clone(trust);
            }
        });
    }

    /// Takes over a certificate, and its roots where nobody else names any.
    pub(crate) fn certified(&self, svid: Svid, root_pem: &str) {
        let id = svid.id().clone();
        let svid = Arc::new(svid);
        let mut failure: Option<InvalidBundle> = None;
        self.swap(Changed::IDENTITIES.and(Changed::TRUST), |snapshot, sources| {
            if !sources.told {
                match TrustBundle::from_pem(id.trust_domain(), root_pem, "") {
                    Ok(trust) => snapshot.trust = Arc::new(trust),
                    Err(error) => failure = Some(error),
                }
            }
            snapshot.svids.insert(id, svid);
        });
        if let Some(error) = failure {
            tracing::error!(error = %error_chain(&error), "the roots in the CA's answer cannot be used");
        }
    }

    /// Takes over certificates that an earlier process was given, where there are none yet.
    pub(crate) fn restored(&self, svids: Vec<Svid>) {
        self.swap(Changed::IDENTITIES, |snapshot, _sources| {
            for svid in svids {
                snapshot.svids.entry(svid.id().clone()).or_insert_with(|| Arc::new(svid));
            }
        });
    }

    /// Forgets a certificate that no pod needs any more, or that has expired.
    pub(crate) fn uncertified(&self, id: &SpiffeId) {
        self.swap(Changed::IDENTITIES, |snapshot, _sources| {
            snapshot.svids.remove(id);
        });
    }

    fn swap(&self, changed: Changed, change: impl FnOnce(&mut Snapshot, &mut Sources)) {
        {
            // A panic while changing a copy leaves the picture as it was.
            let mut sources = self.sources.lock().unwrap_or_else(PoisonError::into_inner);
            let mut snapshot = Snapshot::clone(&self.shared.snapshot.load());
            change(&mut snapshot, &mut sources);
            self.shared.snapshot.store(Arc::new(snapshot));
        }
        self.data_plane.snapshot_changed(changed);
    }
}
