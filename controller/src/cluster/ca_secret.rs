//! The certificate authority in a Secret: what is in the state directory and in the Secret is kept the same.
//!
//! Of two controllers that start at once, the API server takes the Secret of one; the other throws its new authority away
//! before it has signed anything. Later changes go from the state directory to the Secret under its resource version, and
//! from the Secret to the state directory; where both changed, the Secret wins. That loses nothing but what a running
//! controller does by itself and then does again. What an operator orders goes to the Secret first, see [`CaSecret::order`].

use std::collections::BTreeMap;
use std::time::SystemTime;

use k8s_openapi::ByteString;
use k8s_openapi::api::core::v1::Secret;
use kube::api::PostParams;
use kube::core::ObjectMeta;
use kube::{Api, Client};
use tracing::{info, warn};
use zeroize::Zeroizing;

use super::{ObjectName, refusal};
use crate::ca::authority::{AuthorityError, Done, FILE, Order, carry_out};
use crate::state_dir::StateDir;

/// The Secret and the file cannot be kept the same.
#[derive(Debug, thiserror::Error)]
pub enum CaSecretError {
    /// The API server is away, or refuses.
    #[error("the Secret of the authority cannot be read or written")]
    Cluster(#[source] Box<kube::Error>),
    /// The state directory cannot be used.
    #[error("the state directory cannot be used")]
    Files(#[from] std::io::Error),
    /// The Secret exists and does not hold the authority.
    #[error(
        "the Secret has no key {FILE}, or what it holds is no text; restore it, or delete it to make a new authority"
    )]
    Damaged,
    /// There is no Secret yet.
    #[error("there is no Secret {name} yet; a controller makes it within seconds of its start")]
    Missing {
        /// Its name.
        name: String,
    },
    /// The authority refuses.
    #[error(transparent)]
    Authority(#[from] AuthorityError),
    /// Others change the Secret all the time.
    #[error("others changed the Secret {MAX_TRIES} times meanwhile; nothing is done, try again")]
    Contended,
}

/// How often an order is tried again because somebody else changed the Secret meanwhile.
const MAX_TRIES: usize = 16;

impl From<kube::Error> for CaSecretError {
    fn from(error: kube::Error) -> Self {
        Self::Cluster(Box::new(error))
    }
}

/// Keeps Secret and file the same.
pub struct CaSecret {
    secrets: Api<Secret>,
    name: String,
    files: StateDir,
    /// What both held last.
    agreed: Option<Zeroizing<String>>,
}

impl std::fmt::Debug for CaSecret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CaSecret").field("name", &self.name).finish_non_exhaustive()
    }
}

/// What is to be done.
#[derive(Debug, PartialEq, Eq)]
enum Step {
    Nothing,
    Create,
    TakeTheirs,
    Replace,
}

impl CaSecret {
    /// The Secret `name` beside `files`.
    #[must_use]
    pub fn new(client: &Client, name: &ObjectName, files: StateDir) -> Self {
        let secrets = Api::namespaced(client.clone(), &name.namespace);
        Self { secrets, name: name.name.clone(), files, agreed: None }
    }

    /// Makes both the same. Call it before the authority is opened, after it was made, and then again and again.
    ///
    /// # Errors
    /// When one of them cannot be used; what was there stays.
    pub async fn sync(&mut self) -> Result<(), CaSecretError> {
        let found = self.secrets.get_opt(&self.name).await?;
        let ours = self.files.read(FILE)?.map(Zeroizing::new);
        let theirs = found.as_ref().map(content).transpose()?;
        match step(ours.as_ref(), theirs.as_ref(), self.agreed.as_ref()) {
            Step::Nothing => self.agreed = theirs,
            Step::TakeTheirs => {
                let Some(theirs) = theirs else { return Ok(()) };
                {
                    let _lock = self.files.lock()?;
                    self.files.write(FILE, &theirs)?;
                }
                info!(secret = self.name, "the authority is the Secret's");
                self.agreed = Some(theirs);
            }
            Step::Create => {
                let Some(ours) = ours else { return Ok(()) };
                let mut secret = Secret::default();
                secret.metadata.name = Some(self.name.clone());
                fill(&mut secret, &ours);
                match self.secrets.create(&PostParams::default(), &secret).await {
                    Ok(_created) => {
                        info!(secret = self.name, "the authority is written to its Secret");
                        self.agreed = Some(ours);
                    }
                    // Another controller was first: its authority is taken in the next round, and by the caller before
                    // anything is signed.
                    Err(error) if refusal(&error) == Some(409) => {
                        self.agreed = None;
                        return Box::pin(self.sync()).await;
                    }
                    Err(error) => return Err(error.into()),
                }
            }
            Step::Replace => {
                let (Some(ours), Some(mut secret)) = (ours, found) else { return Ok(()) };
                fill(&mut secret, &ours);
                match self.secrets.replace(&self.name, &PostParams::default(), &secret).await {
                    Ok(_replaced) => self.agreed = Some(ours),
                    Err(error) if refusal(&error) == Some(409) => {
                        warn!(
                            secret = self.name,
                            "another controller changed the authority too; its change wins"
                        );
                    }
                    Err(error) => return Err(error.into()),
                }
            }
        }
        Ok(())
    }

    /// Does what an operator orders: in the Secret under its resource version, then in the state directory. When this
    /// returns, the Secret holds it, and whatever a running controller writes later is made from it.
    ///
    /// # Errors
    /// When nothing is changed; or, [`CaSecretError::Files`], when the Secret is and the state directory is not: the
    /// controller takes the Secret's then.
    pub async fn order(&self, order: &Order, now: SystemTime) -> Result<Done, CaSecretError> {
        // Of two orders at once the file must not keep the earlier one: it would go back to the Secret as a change of ours.
        let _orders = self.files.lock_orders()?;
        for _ in 0..MAX_TRIES {
            let found = self.secrets.get_opt(&self.name).await?;
            let Some(mut secret) = found else {
                return Err(CaSecretError::Missing { name: self.name.clone() });
            };
            let (changed, done) = carry_out(&content(&secret)?, order, now)?;
            fill(&mut secret, &changed);
            match self.secrets.replace(&self.name, &PostParams::default(), &secret).await {
                Ok(_replaced) => {
                    let _lock = self.files.lock()?;
                    self.files.write(FILE, &changed)?;
                    return Ok(done);
                }
                Err(error) if refusal(&error) == Some(409) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Err(CaSecretError::Contended)
    }
}

fn step<T: PartialEq>(ours: Option<&T>, theirs: Option<&T>, agreed: Option<&T>) -> Step {
    match (ours, theirs) {
        (None, None) => Step::Nothing,
        (Some(_), None) => Step::Create,
        (None, Some(_)) => Step::TakeTheirs,
        (Some(ours), Some(theirs)) if ours == theirs => Step::Nothing,
        (Some(_), Some(theirs)) if agreed == Some(theirs) => Step::Replace,
        (Some(_), Some(_)) => Step::TakeTheirs,
    }
}

fn content(secret: &Secret) -> Result<Zeroizing<String>, CaSecretError> {
    let data = secret.data.as_ref().and_then(|data| data.get(FILE));
    let ByteString(bytes) = data.ok_or(CaSecretError::Damaged)?;
    let text = std::str::from_utf8(bytes).map_err(|_not_text| CaSecretError::Damaged)?;
    Ok(Zeroizing::new(text.to_owned()))
}

fn fill(secret: &mut Secret, text: &str) {
    let ObjectMeta { name, resource_version, labels, annotations, .. } =
        std::mem::take(&mut secret.metadata);
    secret.metadata =
        ObjectMeta { name, resource_version, labels, annotations, ..ObjectMeta::default() };
    secret.data = Some(BTreeMap::from([(FILE.to_owned(), ByteString(text.as_bytes().to_vec()))]));
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use serde_json::json;

    use super::super::fake_api::FakeApi;
    use super::*;
    use crate::ca::authority::Authority;

    const PATH: &str = "/api/v1/namespaces/mesh/secrets/ca";

    fn name() -> ObjectName {
        "mesh/ca".parse().unwrap()
    }

    fn secret(text: &str) -> serde_json::Value {
        json!({
            "apiVersion": "v1", "kind": "Secret", "metadata": {"name": "ca"},
            "data": {FILE: ByteString(text.as_bytes().to_vec())},
        })
    }

    fn held(api: &FakeApi) -> Zeroizing<String> {
        content(&serde_json::from_value(api.get(PATH).unwrap()).unwrap()).unwrap()
    }

    #[tokio::test]
    async fn an_order_is_in_the_secret_when_it_returns_whoever_else_writes() {
        let directory = tempfile::tempdir().unwrap();
        let files = StateDir::open(&directory.path().join("state")).unwrap();
        let now = SystemTime::now();
        let api = FakeApi::default();
        let mut running = CaSecret::new(&api.client(), &name(), files.clone());
        let revoke = |serial: &str| Order::Revoke { serial: serial.to_owned() };
        let missing = running.order(&revoke("0a"), now).await.unwrap_err();
        assert!(matches!(missing, CaSecretError::Missing { .. }), "{missing}");
        Authority::open(files.clone(), "td", now).unwrap();
        running.sync().await.unwrap();

        // Another replica revokes at the same time: both revocations stay.
        let (theirs, _) = carry_out(&held(&api), &revoke("0b"), now).unwrap();
        api.meddle(PATH, secret(&theirs));
        let command = CaSecret::new(&api.client(), &name(), files.clone());
        command.order(&revoke("0a"), now).await.unwrap();
        let both = held(&api);
        assert_ne!(*both, *theirs);
        let (expected, _) = carry_out(&theirs, &revoke("0a"), now).unwrap();
        assert_eq!(*both, *expected, "one is made from the other");

        // What a running controller does by itself, made from before the order, gives way.
        let overlap = Duration::from_secs(60);
        files
            .write(FILE, &carry_out(&theirs, &Order::RotateRoot { overlap }, now).unwrap().0)
            .unwrap();
        running.sync().await.unwrap();
        assert_eq!(*held(&api), *both);
        assert_eq!(files.read(FILE).unwrap().as_deref(), Some(both.as_str()));

        // A command that ended before it wrote the file.
        let (later, _) = carry_out(&both, &revoke("0c"), now).unwrap();
        api.put(PATH, Some(secret(&later)));
        running.sync().await.unwrap();
        assert_eq!(files.read(FILE).unwrap().as_deref(), Some(later.as_str()));
        assert!(command.order(&revoke("xyz"), now).await.is_err());
        assert_eq!(*held(&api), *later, "an order that is refused changes nothing");
    }

    #[test]
    fn the_secret_wins_unless_only_the_file_changed() {
        assert_eq!(step::<i32>(None, None, None), Step::Nothing);
        assert_eq!(step(Some(&1), None, None), Step::Create, "a first start");
        assert_eq!(step(Some(&1), None, Some(&1)), Step::Create, "a Secret that was deleted");
        assert_eq!(step(None, Some(&1), None), Step::TakeTheirs, "a new pod");
        assert_eq!(step(Some(&1), Some(&1), None), Step::Nothing);
        assert_eq!(step(Some(&2), Some(&1), Some(&1)), Step::Replace, "a rotation here");
        assert_eq!(step(Some(&1), Some(&2), Some(&1)), Step::TakeTheirs, "a rotation elsewhere");
        assert_eq!(step(Some(&2), Some(&3), Some(&1)), Step::TakeTheirs, "on both sides");
        assert_eq!(step(Some(&2), Some(&3), None), Step::TakeTheirs, "two first starts");
    }
}
