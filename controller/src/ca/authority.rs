//! The certificate authority with its file: `ca.json` in the state directory.
//!
//! The running controller and `culvert-controller ca …` both change the file under the directory's lock; the running one
//! looks at it every second. A root rotation takes the time it is given between its two steps, so that every connected
//! agent believes the new root before anything is signed under it.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use mesh_identity::{CaConfig, CaCore, CaError, CaState, MountedFiles, SignError};
use mesh_model::SpiffeId;
use rustls::sign::CertifiedKey;
use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

use crate::state_dir::StateDir;

/// The authority's file in the state directory.
pub const FILE: &str = "ca.json";
/// Lists are signed again this often. They are fresh for a day.
const LIST_REFRESH: Duration = Duration::from_secs(6 * 3600);

/// An authority that cannot be opened or changed.
#[derive(Debug, thiserror::Error)]
pub enum AuthorityError {
    /// The state directory cannot be used.
    #[error("the state directory cannot be used")]
    Files(#[from] std::io::Error),
    /// The file is not what this program wrote.
    #[error(
        "{FILE} cannot be read; restore it from a backup, or remove it to make a new authority"
    )]
    Format(#[source] serde_json::Error),
    /// The authority refuses.
    #[error(transparent)]
    Ca(#[from] CaError),
    /// The file is of another mesh.
    #[error(
        "{FILE} is of trust domain {found}, not {wanted}; use its --trust-domain or another --state-dir"
    )]
    TrustDomain {
        /// In the file.
        found: String,
        /// By the settings.
        wanted: String,
    },
    /// A file of somebody else's authority.
    #[error("{} cannot be read", path.display())]
    Mounted {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// There is no authority yet.
    #[error("there is no {FILE}; start the controller once, or give the right --state-dir")]
    Missing,
    /// Text that is no serial number.
    #[error(
        "{text:?} is no serial number; write it in hexadecimal, as openssl x509 -serial shows it"
    )]
    Serial {
        /// What was given.
        text: String,
    },
}

/// What an operator has an authority do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Order {
    /// Begin a root rotation whose new root signs after the overlap.
    RotateRoot {
        /// Time for agents to learn the new root.
        overlap: Duration,
    },
    /// Revoke a certificate: an intermediate's with all it signed, otherwise a leaf's.
    Revoke {
        /// Its serial number, hexadecimal.
        serial: String,
    },
}

/// What an order did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Done {
    /// What was ordered.
    AsOrdered,
    /// The serial is on the revocation lists; no certificate was ever issued under it by this authority.
    NeverIssued,
}

/// The text of an authority's file after an order, and what that did; for authorities that are kept elsewhere than in a state directory.
///
/// # Errors
/// When the text is no authority, or it refuses.
pub fn carry_out(
    text: &str,
    order: &Order,
    now: SystemTime,
) -> Result<(Zeroizing<String>, Done), AuthorityError> {
    let stored: Stored = serde_json::from_str(text).map_err(AuthorityError::Format)?;
    let mut core = CaCore::load(&stored.ca, CaConfig::default())?;
    let mut activate_root_at = stored.activate_root_at;
    let done = order.apply(&mut core, &mut activate_root_at, now)?;
    Ok((written(&core, activate_root_at)?, done))
}

impl Order {
    fn apply(
        &self,
        core: &mut CaCore,
        activate_root_at: &mut Option<SystemTime>,
        now: SystemTime,
    ) -> Result<Done, AuthorityError> {
        match self {
            Self::RotateRoot { overlap } => {
                core.begin_root_rotation(now)?;
                *activate_root_at = Some(now + *overlap);
            }
            Self::Revoke { serial } => {
                let bytes = parse_serial(serial)?;
                match core.revoke_intermediate(&bytes, now) {
                    Err(CaError::UnknownAuthority) => {
                        if !core.revoke_leaf(&bytes, now) {
                            return Ok(Done::NeverIssued);
                        }
                    }
                    outcome => outcome?,
                }
            }
        }
        Ok(Done::AsOrdered)
    }
}

#[derive(Debug, Serialize, Deserialize)]
struct Stored {
    ca: CaState,
    /// When the coming root is to sign.
    activate_root_at: Option<SystemTime>,
}

#[derive(Debug)]
struct Loaded {
    core: CaCore,
    activate_root_at: Option<SystemTime>,
    stamp: Option<(u64, SystemTime)>,
    lists: Arc<str>,
    lists_made: SystemTime,
}

/// The authority.
#[derive(Debug)]
pub struct Authority {
    place: Place,
    config: CaConfig,
    loaded: Mutex<Loaded>,
}

/// Where it is.
#[derive(Debug)]
enum Place {
    /// Ours, in the state directory.
    Ours(StateDir),
    /// Somebody else's, in a folder that is mounted.
    Mounted { folder: PathBuf, trust_domain: Arc<str> },
}

impl Place {
    fn stamp(&self) -> Result<Option<(u64, SystemTime)>, AuthorityError> {
        match self {
            Self::Ours(files) => Ok(files.stamp(FILE)?),
            // Kubelet swaps all files of a Secret at once.
            Self::Mounted { folder, .. } => mounted_stamp(folder).map(Some),
        }
    }

    fn load(&self, config: &CaConfig, now: SystemTime) -> Result<Loaded, AuthorityError> {
        match self {
            Self::Ours(files) => load(files, config, now),
            Self::Mounted { folder, trust_domain } => {
                load_mounted(folder, trust_domain, config, now)
            }
        }
    }
}

impl Authority {
    /// Opens an authority that somebody else makes and renews: `tls.crt`, `tls.key` and `ca.crt` in a folder, as
    /// cert-manager has them in a Secret.
    ///
    /// # Errors
    /// When they cannot be used.
    pub fn open_mounted(
        folder: &Path,
        trust_domain: &str,
        now: SystemTime,
    ) -> Result<Self, AuthorityError> {
        let place =
            Place::Mounted { folder: folder.to_path_buf(), trust_domain: trust_domain.into() };
        let config = CaConfig::default();
        let loaded = Mutex::new(place.load(&config, now)?);
        Ok(Self { place, config, loaded })
    }

    /// Opens the authority of a trust domain, making it when there is none.
    ///
    /// # Errors
    /// When its file cannot be used.
    pub fn open(
        files: StateDir,
        trust_domain: &str,
        now: SystemTime,
    ) -> Result<Self, AuthorityError> {
        let _lock = files.lock()?;
        let config = CaConfig::default();
        let loaded = match load(&files, &config, now) {
            Ok(loaded) => loaded,
            Err(AuthorityError::Missing) => {
                let core = CaCore::create(trust_domain, config.clone(), now)?;
                store(&files, &core, None)?;
                load(&files, &config, now)?
            }
            Err(error) => return Err(error),
        };
        if loaded.core.trust_domain() != trust_domain {
            return Err(AuthorityError::TrustDomain {
                found: loaded.core.trust_domain().to_owned(),
                wanted: trust_domain.to_owned(),
            });
        }
        Ok(Self { place: Place::Ours(files), config, loaded: Mutex::new(loaded) })
    }

    /// Lets requests ask for lives of leaves of up to `longest`, instead of a day.
    ///
    /// # Errors
    /// When its file cannot be used.
    pub fn with_longest_life(
        mut self,
        longest: Duration,
        now: SystemTime,
    ) -> Result<Self, AuthorityError> {
        self.config.max_ttl = longest;
        *self.lock() = self.place.load(&self.config, now)?;
        Ok(self)
    }

    /// Opens the authority that is there.
    ///
    /// # Errors
    /// When there is none, or its file cannot be used.
    pub fn open_existing(files: StateDir, now: SystemTime) -> Result<Self, AuthorityError> {
        let config = CaConfig::default();
        let loaded = load(&files, &config, now)?;
        Ok(Self { place: Place::Ours(files), config, loaded: Mutex::new(loaded) })
    }

    /// Certifies a key; see [`CaCore::sign`].
    ///
    /// # Errors
    /// Why it is not signed.
    pub fn sign(
        &self,
        csr_pem: &str,
        identity: &SpiffeId,
        ttl: Duration,
        now: SystemTime,
    ) -> Result<Vec<String>, SignError> {
        self.lock().core.sign(csr_pem, identity, ttl, now)
    }

    /// A certificate for the controller's own listener.
    ///
    /// # Errors
    /// When a name cannot be certified.
    pub fn issue_server(
        &self,
        names: &[String],
        ttl: Duration,
        now: SystemTime,
    ) -> Result<CertifiedKey, CaError> {
        self.lock().core.issue_server(names, ttl, now)
    }

    /// Roots that agents should believe, PEM.
    #[must_use]
    pub fn root_bundle_pem(&self) -> String {
        self.lock().core.root_bundle_pem()
    }

    /// Revocation lists, PEM; empty while nothing is revoked.
    #[must_use]
    pub fn crl_pem(&self) -> Arc<str> {
        Arc::clone(&self.lock().lists)
    }

    /// When nothing is signed any more, unless the authority is renewed before.
    #[must_use]
    pub fn ends_at(&self) -> SystemTime {
        self.lock().core.intermediate_not_after()
    }

    /// Takes in what others wrote, and does what is due: activates a coming root, replaces an ageing intermediate, drops
    /// what is over, renews lists. True when anything changed.
    ///
    /// # Errors
    /// When the file cannot be used; what was loaded stays in use.
    pub fn tick(&self, now: SystemTime) -> Result<bool, AuthorityError> {
        let mut changed = false;
        if self.place.stamp()? != self.lock().stamp {
            let loaded = self.place.load(&self.config, now)?;
            *self.lock() = loaded;
            changed = true;
        }
        let due = self.lock().activate_root_at.is_some_and(|at| at <= now);
        if due {
            self.change(now, |core, activate_root_at| {
                core.activate_root(now)?;
                *activate_root_at = None;
                Ok(())
            })?;
            changed = true;
        }
        if let Place::Mounted { .. } = self.place {
            return Ok(changed);
        }
        // Looked at on a copy first, so that the file is only written when there is something to write.
        let mut trial = CaCore::load(&self.lock().core.state(), self.config.clone())?;
        if trial.maintain(now)? {
            self.change(now, |core, _| Ok(core.maintain(now).map(drop)?))?;
            changed = true;
        }
        let mut loaded = self.lock();
        let age = now.duration_since(loaded.lists_made).unwrap_or_default();
        if age > LIST_REFRESH && !loaded.lists.is_empty() {
            loaded.lists = loaded.core.crl_pem(now)?.into();
            loaded.lists_made = now;
            changed = true;
        }
        Ok(changed)
    }

    /// Begins a root rotation whose new root signs after `overlap`.
    ///
    /// # Errors
    /// When one is under way, or the file cannot be used.
    pub fn rotate_root(&self, overlap: Duration, now: SystemTime) -> Result<(), AuthorityError> {
        self.order(&Order::RotateRoot { overlap }, now).map(drop)
    }

    /// Revokes a certificate by serial: an intermediate's with all it signed, otherwise a leaf's.
    ///
    /// # Errors
    /// When the text is no serial, or the file cannot be used.
    pub fn revoke(&self, serial: &str, now: SystemTime) -> Result<Done, AuthorityError> {
        self.order(&Order::Revoke { serial: serial.to_owned() }, now)
    }

    /// Does what an operator orders.
    ///
    /// # Errors
    /// When it cannot be done, or the file cannot be used.
    pub fn order(&self, order: &Order, now: SystemTime) -> Result<Done, AuthorityError> {
        self.change(now, |core, activate_root_at| order.apply(core, activate_root_at, now))
    }

    /// Changes the authority on disk, then in memory; nothing changes when one of them fails.
    fn change<T>(
        &self,
        now: SystemTime,
        change: impl FnOnce(&mut CaCore, &mut Option<SystemTime>) -> Result<T, AuthorityError>,
    ) -> Result<T, AuthorityError> {
        let Place::Ours(files) = &self.place else {
            return Err(AuthorityError::Ca(CaError::NotOurs));
        };
        let _lock = files.lock()?;
        let mut loaded = load(files, &self.config, now)?;
        let done = change(&mut loaded.core, &mut loaded.activate_root_at)?;
        store(files, &loaded.core, loaded.activate_root_at)?;
        *self.lock() = load(files, &self.config, now)?;
        Ok(done)
    }

    fn lock(&self) -> MutexGuard<'_, Loaded> {
        // It is only ever replaced whole.
        self.loaded.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn load(files: &StateDir, config: &CaConfig, now: SystemTime) -> Result<Loaded, AuthorityError> {
    let stamp = files.stamp(FILE)?;
    let text = Zeroizing::new(files.read(FILE)?.ok_or(AuthorityError::Missing)?);
    let stored: Stored = serde_json::from_str(&text).map_err(AuthorityError::Format)?;
    let core = CaCore::load(&stored.ca, config.clone())?;
    let lists = core.crl_pem(now)?.into();
    Ok(Loaded { core, activate_root_at: stored.activate_root_at, stamp, lists, lists_made: now })
}

fn load_mounted(
    folder: &Path,
    trust_domain: &str,
    config: &CaConfig,
    now: SystemTime,
) -> Result<Loaded, AuthorityError> {
    let stamp = mounted_stamp(folder)?;
    let read = |name: &str| {
        let path = folder.join(name);
        fs::read_to_string(&path).map_err(|source| AuthorityError::Mounted { path, source })
    };
    let files = MountedFiles {
        chain_pem: read("tls.crt")?,
        key_pem: Zeroizing::new(read("tls.key")?),
        roots_pem: read("ca.crt")?,
    };
    let core = CaCore::mounted(trust_domain, &files, config.clone())?;
    let lists = "".into();
    Ok(Loaded { core, activate_root_at: None, stamp: Some(stamp), lists, lists_made: now })
}

fn mounted_stamp(folder: &Path) -> Result<(u64, SystemTime), AuthorityError> {
    let path = folder.join("tls.crt");
    let found = fs::metadata(&path).and_then(|found| Ok((found.ino(), found.modified()?)));
    found.map_err(|source| AuthorityError::Mounted { path, source })
}

fn store(
    files: &StateDir,
    core: &CaCore,
    activate_root_at: Option<SystemTime>,
) -> Result<(), AuthorityError> {
    Ok(files.write(FILE, &written(core, activate_root_at)?)?)
}

fn written(
    core: &CaCore,
    activate_root_at: Option<SystemTime>,
) -> Result<Zeroizing<String>, AuthorityError> {
    let stored = Stored { ca: core.state(), activate_root_at };
    serde_json::to_string(&stored).map(Zeroizing::new).map_err(AuthorityError::Format)
}

/// Hexadecimal, with or without colons and `0x`, leading zeros or not.
fn parse_serial(text: &str) -> Result<Vec<u8>, AuthorityError> {
    let invalid = || AuthorityError::Serial { text: text.chars().take(80).collect() };
    let digits: String =
        text.trim().trim_start_matches("0x").chars().filter(|c| *c != ':').collect();
    let digits = digits.trim_start_matches('0');
    let digits =
        if digits.len().is_multiple_of(2) { digits.to_owned() } else { format!("0{digits}") };
    if digits.is_empty() || digits.len() > 40 || !digits.is_ascii() {
        return Err(invalid());
    }
    (0..digits.len())
        .step_by(2)
        .map(|at| u8::from_str_radix(&digits[at..at + 2], 16).map_err(|_source| invalid()))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn files() -> (tempfile::TempDir, StateDir) {
        let directory = tempfile::tempdir().unwrap();
        let files = StateDir::open(&directory.path().join("state")).unwrap();
        (directory, files)
    }

    #[test]
    fn the_authority_survives_restarts_and_rotations() {
        let (_directory, files) = files();
        let now = SystemTime::now();
        let first = Authority::open(files.clone(), "td", now).unwrap();
        let old = first.root_bundle_pem();
        let again = Authority::open(files.clone(), "td", now).unwrap();
        assert_eq!(again.root_bundle_pem(), old);
        assert!(Authority::open(files.clone(), "other", now).is_err());
        // Another process rotates; the running one picks it up, then activates when due.
        again.rotate_root(Duration::from_secs(60), now).unwrap();
        assert!(first.tick(now).unwrap());
        let both = first.root_bundle_pem();
        assert!(both.starts_with(&old) && both.len() > old.len());
        assert!(!first.tick(now).unwrap());
        assert!(first.tick(now + Duration::from_secs(61)).unwrap());
        assert!(!first.root_bundle_pem().starts_with(&old), "the new root signs");
        assert!(first.root_bundle_pem().contains(&old), "and the old one is still believed");
    }

    #[test]
    fn lives_beyond_a_day_are_given_only_where_that_is_allowed() {
        let (_directory, files) = files();
        let (now, day) = (SystemTime::now(), Duration::from_secs(86_400));
        let id = SpiffeId::new("td", "shop", "cart").unwrap();
        let life = |authority: &Authority| {
            let (key, request) = mesh_identity::csr(&id).unwrap();
            let chain = authority.sign(&request, &id, 30 * day, now).unwrap();
            let answer = mesh_identity::IssuedAnswer::check(&chain, &id, key, now).unwrap();
            answer.svid.not_after().duration_since(now).unwrap()
        };
        let authority = Authority::open(files, "td", now).unwrap();
        assert!(life(&authority) <= day);
        let authority = authority.with_longest_life(7 * day, now).unwrap();
        assert!(life(&authority) > 6 * day && life(&authority) <= 7 * day);
        // Also after it was read again.
        authority.revoke("01", now).unwrap();
        assert!(life(&authority) > 6 * day);
    }

    #[test]
    fn a_revocation_reaches_the_list() {
        let (_directory, files) = files();
        let now = SystemTime::now();
        let authority = Authority::open(files, "td", now).unwrap();
        assert!(authority.crl_pem().is_empty());
        assert_eq!(authority.revoke("00:AB:cd", now).unwrap(), Done::NeverIssued);
        let list = authority.crl_pem();
        assert!(list.contains("X509 CRL"));
        assert!(!authority.tick(now).unwrap());
        assert_eq!(authority.crl_pem(), list, "a list is not signed anew for nothing");
        for wrong in ["", "xyz", "0x", &"1".repeat(41)] {
            assert!(authority.revoke(wrong, now).is_err(), "{wrong}");
        }
    }

    /// It tells its own certificates from what it never issued, also those of an issuer that was replaced, and after a restart.
    #[test]
    fn a_serial_that_was_never_issued_is_told() {
        let (_directory, files) = files();
        let now = SystemTime::now();
        let authority = Authority::open(files.clone(), "td", now).unwrap();
        let id = SpiffeId::new("td", "shop", "cart").unwrap();
        let hex =
            |serial: &[u8]| serial.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
        let leaf = |authority: &Authority| {
            let (key, request) = mesh_identity::csr(&id).unwrap();
            let chain = authority.sign(&request, &id, Duration::from_secs(60), now).unwrap();
            hex(mesh_identity::IssuedAnswer::check(&chain, &id, key, now).unwrap().svid.serial())
        };
        let first = leaf(&authority);
        let issuer = hex(authority.lock().core.intermediate_serial());
        assert_eq!(authority.revoke(&issuer, now).unwrap(), Done::AsOrdered);
        let second = leaf(&authority);
        let authority = Authority::open(files, "td", now).unwrap();
        for known in [&first, &second] {
            assert_eq!(authority.revoke(known, now).unwrap(), Done::AsOrdered, "{known}");
            let digit = if known.ends_with('0') { "1" } else { "0" };
            let near = format!("{}{digit}", &known[..known.len() - 1]);
            assert_eq!(authority.revoke(&near, now).unwrap(), Done::NeverIssued, "{near}");
        }
        let (_other, others) = self::files();
        let stranger = leaf(&Authority::open(others, "td", now).unwrap());
        assert_eq!(authority.revoke(&stranger, now).unwrap(), Done::NeverIssued);
    }

    /// The files of an authority made here, as if cert-manager had written them.
    fn mount(folder: &Path, trust_domain: &str) {
        let core = CaCore::create(trust_domain, CaConfig::default(), SystemTime::now()).unwrap();
        let state = core.state();
        for (name, text) in [
            ("tls.key", state.intermediates[0].key_pem.as_str()),
            ("ca.crt", &state.roots[0].cert_pem),
            ("tls.crt", &state.intermediates[0].cert_pem),
        ] {
            let fresh = folder.join(format!(".{name}"));
            fs::write(&fresh, text).unwrap();
            fs::rename(fresh, folder.join(name)).unwrap();
        }
    }

    #[test]
    fn a_mounted_authority_is_used_as_it_is_and_taken_anew() {
        let directory = tempfile::tempdir().unwrap();
        let folder = directory.path();
        let now = SystemTime::now();
        let missing = Authority::open_mounted(folder, "td", now).unwrap_err();
        assert!(missing.to_string().contains("tls.crt"), "{missing}");
        mount(folder, "td");
        let authority = Authority::open_mounted(folder, "td", now).unwrap();
        let first = authority.root_bundle_pem();
        authority.issue_server(&["localhost".into()], Duration::from_secs(60), now).unwrap();
        assert!(!authority.tick(now).unwrap());
        let refused = authority.rotate_root(Duration::from_secs(60), now).unwrap_err();
        assert!(refused.to_string().contains("somebody else"), "{refused}");
        assert!(authority.revoke("0a", now).is_err());
        // Renewed.
        mount(folder, "td");
        assert!(authority.tick(now).unwrap());
        assert_ne!(authority.root_bundle_pem(), first);
        // Something that is none: the last one stays.
        let second = authority.root_bundle_pem();
        fs::write(folder.join(".x"), "nothing").unwrap();
        fs::rename(folder.join(".x"), folder.join("tls.crt")).unwrap();
        assert!(authority.tick(now).is_err());
        assert_eq!(authority.root_bundle_pem(), second);
    }

    #[test]
    fn a_damaged_file_is_named() {
        let (_directory, files) = files();
        files.write(FILE, "{}").unwrap();
        let error = Authority::open(files, "td", SystemTime::now()).unwrap_err();
        assert!(error.to_string().contains(FILE), "{error}");
    }
}
