//! The certificate authority in a Secret: what is in the state directory and in the Secret is kept the same.
//!
//! Of two controllers that start at once, the API server takes the Secret of one; the other throws its new authority away
//! before it has signed anything. Later changes go from the state directory to the Secret under its resource version, and
//! from the Secret to the state directory; where both changed, the Secret wins.

use std::collections::BTreeMap;

use k8s_openapi::ByteString;
use k8s_openapi::api::core::v1::Secret;
use kube::api::PostParams;
use kube::core::ObjectMeta;
use kube::{Api, Client};
use tracing::{info, warn};
use zeroize::Zeroizing;

use super::{ObjectName, refusal};
use crate::ca::authority::FILE;
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
}

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
    use super::*;

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
