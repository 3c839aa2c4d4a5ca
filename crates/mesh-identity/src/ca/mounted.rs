//! An authority that somebody else made and renews, such as cert-manager: what signs, what is above it, and what is believed.

use std::sync::Arc;

use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;
use zeroize::Zeroizing;

use super::authority::Authority;
use super::{AuthorityState, CaConfig, CaCore, CaError};
use crate::certificate::parse;

/// Most certificates in a file.
const MAX_CERTIFICATES: usize = 64;
const END: &str = "-----END CERTIFICATE-----";

/// The three files of an authority, as cert-manager writes them into a Secret.
#[derive(Clone, PartialEq, Eq)]
pub struct MountedFiles {
    /// `tls.crt`: what signs, then what is above it, PEM.
    pub chain_pem: String,
    /// `tls.key`: the key of what signs, PEM.
    pub key_pem: Zeroizing<String>,
    /// `ca.crt`: the roots that are believed, PEM.
    pub roots_pem: String,
}

impl std::fmt::Debug for MountedFiles {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("MountedFiles")
            .field("chain_pem", &self.chain_pem)
            .field("roots_pem", &self.roots_pem)
            .finish_non_exhaustive()
    }
}

/// What an authority of somebody else's has above it.
#[derive(Clone, Debug)]
pub(super) struct Above {
    /// Between what signs and the roots, nearest first; each with its PEM.
    pub(super) between: Vec<(String, CertificateDer<'static>)>,
    /// What is believed.
    pub(super) roots_pem: String,
}

impl CaCore {
    /// The authority of `files`. It signs, and nothing of it is ever changed here: it has no root to renew it with.
    ///
    /// # Errors
    /// When a file cannot be used, or what signs does not come from a root.
    pub fn mounted(
        trust_domain: &str,
        files: &MountedFiles,
        config: CaConfig,
    ) -> Result<Self, CaError> {
        let roots = certificates(&files.roots_pem)?;
        let mut chain = certificates(&files.chain_pem)?.into_iter();
        let (cert_pem, der) = chain.next().ok_or(CaError::Empty)?;
        let issuer = Authority::load(&AuthorityState {
            cert_pem,
            key_pem: files.key_pem.clone(),
            over_at: None,
            revoked: Vec::new(),
        })?;
        let is_root = |der: &CertificateDer<'_>| roots.iter().any(|(_, root)| root == der);
        // A root that is sent along proves nothing.
        let between: Vec<_> = chain.filter(|(_, der)| !is_root(der)).collect();
        let mut child = der;
        for (_, parent) in &between {
            if !signed(parent, &child) {
                return Err(CaError::Unrooted);
            }
            child = parent.clone();
        }
        if !is_root(&child) && !roots.iter().any(|(_, root)| signed(root, &child)) {
            return Err(CaError::Unrooted);
        }
        let roots_pem = roots.into_iter().map(|(pem, _)| pem).collect();
        Ok(Self {
            trust_domain: Arc::from(trust_domain),
            config,
            roots: Vec::new(),
            root_is_coming: false,
            intermediates: vec![issuer],
            above: Some(Above { between, roots_pem }),
        })
    }
}

/// Every certificate of `pem`, each with its own text.
fn certificates(pem: &str) -> Result<Vec<(String, CertificateDer<'static>)>, CaError> {
    let malformed = || CaError::State(rcgen::Error::CouldNotParseCertificate);
    let mut found = Vec::new();
    for text in pem.split_inclusive(END).filter(|text| text.contains(END)) {
        let begin = text.find("-----BEGIN CERTIFICATE-----").ok_or_else(malformed)?;
        let text = format!("{}\n", &text[begin..]);
        let der =
            CertificateDer::from_pem_slice(text.as_bytes()).map_err(|_malformed| malformed())?;
        parse(&der).map_err(|_malformed| malformed())?;
        found.push((text, der));
    }
    if found.is_empty() || found.len() > MAX_CERTIFICATES {
        return Err(CaError::Empty);
    }
    Ok(found)
}

/// True when `parent` has signed `child`.
fn signed(parent: &CertificateDer<'_>, child: &CertificateDer<'_>) -> bool {
    let (Ok(parent), Ok(child)) = (parse(parent), parse(child)) else { return false };
    parent.is_ca()
        && parent.subject() == child.issuer()
        && child.verify_signature(Some(parent.public_key())).is_ok()
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, SystemTime};

    use super::*;

    /// The files of an authority made here, as if somebody else had.
    fn files(core: &CaCore) -> MountedFiles {
        let state = core.state();
        MountedFiles {
            chain_pem: format!("{}{}", state.intermediates[0].cert_pem, state.roots[0].cert_pem),
            key_pem: state.intermediates[0].key_pem.clone(),
            roots_pem: state.roots[0].cert_pem.clone(),
        }
    }

    #[expect(
        clippy::disallowed_methods,
        reason = "certificates are judged by the clock of their test"
    )]
    fn now() -> SystemTime {
        SystemTime::now()
    }

    #[test]
    fn it_signs_and_changes_nothing() {
        let now = now();
        let theirs = CaCore::create("td", CaConfig::default(), now).unwrap();
        let files = files(&theirs);
        let mut ours = CaCore::mounted("td", &files, CaConfig::default()).unwrap();
        assert_eq!(ours.root_bundle_pem().trim(), files.roots_pem.trim());
        ours.issue_server(&["localhost".into()], Duration::from_secs(60), now).unwrap();
        let late = ours.intermediate_not_after() - Duration::from_secs(60);
        assert!(!ours.maintain(late).unwrap());
        assert!(matches!(ours.rotate_intermediate(now), Err(CaError::NotOurs)));
        assert!(matches!(ours.begin_root_rotation(now), Err(CaError::NotOurs)));
        assert!(matches!(ours.revoke_intermediate(&[1], now), Err(CaError::NotOurs)));
        // A root that signs itself, without anything in between.
        let root = MountedFiles {
            chain_pem: files.roots_pem.clone(),
            key_pem: theirs.state().roots[0].key_pem.clone(),
            ..files.clone()
        };
        CaCore::mounted("td", &root, CaConfig::default()).unwrap();
    }

    #[test]
    fn what_does_not_belong_together_is_refused() {
        let now = now();
        let one = files(&CaCore::create("td", CaConfig::default(), now).unwrap());
        let other = files(&CaCore::create("td", CaConfig::default(), now).unwrap());
        let refused = |files: MountedFiles| {
            CaCore::mounted("td", &files, CaConfig::default()).expect_err("it is refused");
        };
        refused(MountedFiles { key_pem: other.key_pem.clone(), ..one.clone() });
        refused(MountedFiles { roots_pem: other.roots_pem.clone(), ..one.clone() });
        refused(MountedFiles { chain_pem: String::new(), ..one.clone() });
        refused(MountedFiles { roots_pem: "no certificate".into(), ..one.clone() });
        refused(MountedFiles { chain_pem: format!("x{END}"), ..one.clone() });
        // What is in between must be of the chain.
        let stranger = other.chain_pem.replace(&other.roots_pem, "");
        refused(MountedFiles { chain_pem: format!("{}{stranger}", one.chain_pem), ..one });
    }
}
