//! Certificates with their keys in the kernel's memory, for an agent that starts while the controller is away.
//!
//! What is kept is what the picture holds: a renewed certificate overwrites the old one, one that no pod needs any more, has
//! ended or was revoked is wiped. Where the kernel refuses, the agent works on; only its next start needs the controller.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::time::SystemTime;

use mesh_ebpf::KeptRecords;
use mesh_identity::{KEPT_BYTES, KeptRecord, Svid, TrustBundle};
use mesh_model::SpiffeId;
use mesh_telemetry::metric;

use crate::error::error_chain;

/// Identities of one node whose keys are kept; those beyond have to wait for the controller after a restart. Their records
/// take 1 MiB of the kernel's memory.
const MAX_KEPT: u32 = 256;

type Records = KeptRecords<KEPT_BYTES>;

/// The keys that are kept.
#[derive(Debug)]
pub(crate) struct KeptKeys {
    /// None: nothing is kept.
    records: Option<Records>,
    places: BTreeMap<SpiffeId, u32>,
    free: BTreeSet<u32>,
}

impl KeptKeys {
    /// Keeps nothing, and wipes what an earlier process kept.
    pub(crate) fn none(bpffs: &Path) -> Self {
        if let Err(error) = Records::remove(bpffs) {
            failed("kernel");
            tracing::error!(error = %error_chain(&error), "keys that were kept cannot be wiped");
        }
        Self { records: None, places: BTreeMap::new(), free: BTreeSet::new() }
    }

    /// Opens what an earlier process kept. Gives the certificates that are good still, for identities of `here`; the others
    /// are wiped, each with its reason.
    pub(crate) fn open(
        bpffs: &Path,
        here: &BTreeSet<SpiffeId>,
        trust: &TrustBundle,
        now: SystemTime,
    ) -> (Self, Vec<Svid>) {
        let mut keys = Self { records: None, places: BTreeMap::new(), free: BTreeSet::new() };
        let records = match Records::open(bpffs, MAX_KEPT) {
            Ok(records) => records,
            Err(error) => {
                failed("kernel");
                tracing::error!(
                    error = %error_chain(&error),
                    "keys cannot be kept in the kernel: an agent that starts while the controller is away will have none"
                );
                return (keys, Vec::new());
            }
        };
        let mut good: BTreeMap<SpiffeId, (u32, Svid)> = BTreeMap::new();
        let mut record = KeptRecord::empty();
        for place in 0..records.count() {
            if let Err(error) = records.read(place, record.bytes_mut()) {
                failed("kernel");
                tracing::error!(place, error = %error_chain(&error), "a kept key cannot be read");
                continue;
            }
            let judged = match record.read() {
                Ok(None) => continue,
                Ok(Some(svid)) => judge(svid, here, trust, now),
                Err(error) => Err(("damaged", error_chain(&error))),
            };
            match judged {
                Ok(svid) => {
                    // Twice only if two agents wrote at once, in a hand-over: the later end counts.
                    let known = good.get(svid.id()).map(|(_, known)| known.not_after());
                    if known.is_some_and(|known| known >= svid.not_after()) {
                        wipe(&records, place);
                    } else if let Some((other, _)) = good.insert(svid.id().clone(), (place, svid)) {
                        wipe(&records, other);
                    }
                }
                Err((reason, error)) => {
                    metrics::counter!(metric::KEPT_KEYS_IGNORED.name, "reason" => reason)
                        .increment(1);
                    tracing::warn!(place, reason, error, "a kept key is not used, and wiped");
                    wipe(&records, place);
                }
            }
        }
        keys.places = good.iter().map(|(id, (place, _))| (id.clone(), *place)).collect();
        let taken: BTreeSet<u32> = keys.places.values().copied().collect();
        keys.free = (0..records.count()).filter(|place| !taken.contains(place)).collect();
        keys.records = Some(records);
        keys.count();
        (keys, good.into_values().map(|(_, svid)| svid).collect())
    }

    /// Keeps a certificate in place of the one of the same identity.
    pub(crate) fn keep(&mut self, svid: &Svid) {
        let Some(records) = &self.records else { return };
        let id = svid.id();
        let mut record = KeptRecord::empty();
        if let Err(error) = record.write(svid) {
            failed("too_large");
            tracing::warn!(%id, %error, "a key is not kept over a restart");
            self.forget(id);
            return;
        }
        let Some(place) = self.places.get(id).copied().or_else(|| self.free.first().copied())
        else {
            failed("full");
            tracing::warn!(%id, limit = MAX_KEPT, "a key is not kept over a restart: there are too many");
            return;
        };
        match records.write(place, record.bytes()) {
            Ok(()) => {
                self.free.remove(&place);
                self.places.insert(id.clone(), place);
            }
            Err(error) => {
                failed("kernel");
                tracing::warn!(%id, error = %error_chain(&error), "a key is not kept over a restart");
            }
        }
        self.count();
    }

    /// Wipes the certificate of an identity.
    pub(crate) fn forget(&mut self, id: &SpiffeId) {
        let Some(records) = &self.records else { return };
        if let Some(place) = self.places.remove(id) {
            wipe(records, place);
            self.free.insert(place);
        }
        self.count();
    }

    fn count(&self) {
        let kept = u32::try_from(self.places.len()).unwrap_or(MAX_KEPT);
        metrics::gauge!(metric::KEPT_KEYS.name).set(f64::from(kept));
    }
}

/// Wipes and unpins what was kept.
///
/// # Errors
/// When something cannot be removed.
pub(crate) fn remove(bpffs: &Path) -> Result<(), mesh_ebpf::CaptureError> {
    Records::remove(bpffs)
}

fn judge(
    svid: Svid,
    here: &BTreeSet<SpiffeId>,
    trust: &TrustBundle,
    now: SystemTime,
) -> Result<Svid, (&'static str, String)> {
    if !here.contains(svid.id()) {
        return Err(("no_pod", format!("no pod of {} is here", svid.id())));
    }
    match svid.is_accepted(trust, now) {
        Ok(()) => Ok(svid),
        Err(rejection) => {
            Err((rejection.as_str(), format!("{}: {}", svid.id(), error_chain(&rejection))))
        }
    }
}

fn wipe(records: &Records, place: u32) {
    if let Err(error) = records.write(place, KeptRecord::empty().bytes()) {
        failed("kernel");
        tracing::error!(place, error = %error_chain(&error), "a kept key cannot be wiped");
    }
}

fn failed(reason: &'static str) {
    metrics::counter!(metric::KEPT_KEYS_FAILED.name, "reason" => reason).increment(1);
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;
    use std::time::Duration;

    use mesh_identity::{CaConfig, CaCore, IssuedAnswer, csr};
    use nix::mount::{MntFlags, MsFlags, mount, umount2};

    use super::*;

    const HOUR: Duration = Duration::from_secs(3600);

    /// A bpf file system of the test's own. Needs root.
    struct Bpffs(tempfile::TempDir);

    impl Bpffs {
        fn new() -> Self {
            let folder = tempfile::tempdir().unwrap();
            let none = None::<&str>;
            mount(Some("bpf"), folder.path(), Some("bpf"), MsFlags::empty(), none).unwrap();
            Self(folder)
        }

        fn path(&self) -> PathBuf {
            self.0.path().to_owned()
        }
    }

    impl Drop for Bpffs {
        fn drop(&mut self) {
            umount2(self.0.path(), MntFlags::MNT_DETACH).unwrap();
        }
    }

    struct Authority {
        ca: CaCore,
        now: SystemTime,
    }

    impl Authority {
        fn new(now: SystemTime) -> Self {
            Self { ca: CaCore::create("cluster.local", CaConfig::default(), now).unwrap(), now }
        }

        fn issue(&self, account: &str, life: Duration) -> Svid {
            let id = id(account);
            let (key, request) = csr(&id).unwrap();
            let answer = self.ca.sign(&request, &id, life, self.now).unwrap();
            IssuedAnswer::check(&answer, &id, key, self.now).unwrap().svid
        }

        fn trust(&self) -> TrustBundle {
            let lists = self.ca.crl_pem(self.now).unwrap();
            TrustBundle::from_pem("cluster.local", &self.ca.root_bundle_pem(), &lists).unwrap()
        }
    }

    fn id(account: &str) -> SpiffeId {
        SpiffeId::new("cluster.local", "shop", account).unwrap()
    }

    fn here(accounts: &[&str]) -> BTreeSet<SpiffeId> {
        accounts.iter().map(|account| id(account)).collect()
    }

    fn names(svids: &[Svid]) -> Vec<String> {
        svids.iter().map(|svid| svid.id().to_string()).collect()
    }

    #[test]
    fn the_next_process_finds_what_is_good_and_wipes_the_rest() {
        let (bpffs, now) = (Bpffs::new(), SystemTime::now());
        let mut authority = Authority::new(now);
        let everybody = here(&["renewed", "short", "revoked", "gone", "damaged", "forgotten"]);
        let (mut keys, found) = KeptKeys::open(&bpffs.path(), &everybody, &authority.trust(), now);
        assert!(found.is_empty());
        keys.keep(&authority.issue("renewed", HOUR));
        let renewed = authority.issue("renewed", 2 * HOUR);
        keys.keep(&renewed);
        let revoked = authority.issue("revoked", 2 * HOUR);
        for svid in [&authority.issue("short", HOUR), &revoked, &authority.issue("gone", 2 * HOUR)]
        {
            keys.keep(svid);
        }
        keys.keep(&authority.issue("damaged", 2 * HOUR));
        keys.keep(&authority.issue("forgotten", 2 * HOUR));
        keys.forget(&id("forgotten"));
        // Of another authority.
        keys.keep(&Authority::new(now).issue("stranger", 2 * HOUR));
        let places = keys.places.clone();
        assert_eq!(places.len(), 6);
        drop(keys);

        let records = Records::open(&bpffs.path(), MAX_KEPT).unwrap();
        let mut record = KeptRecord::empty();
        let damaged = places[&id("damaged")];
        records.read(damaged, record.bytes_mut()).unwrap();
        record.bytes_mut()[100] ^= 1;
        records.write(damaged, record.bytes()).unwrap();
        authority.ca.revoke_leaf(revoked.serial(), now);
        let now_here = here(&["renewed", "short", "revoked", "damaged", "forgotten", "stranger"]);
        let later = now + HOUR + HOUR / 2;
        let (keys, found) = KeptKeys::open(&bpffs.path(), &now_here, &authority.trust(), later);
        assert_eq!(names(&found), [id("renewed").to_string()]);
        assert_eq!(found[0].serial(), renewed.serial());
        assert_eq!(keys.places.len(), 1);
        for place in 0..MAX_KEPT {
            records.read(place, record.bytes_mut()).unwrap();
            let used = record.bytes().iter().any(|byte| *byte != 0);
            assert_eq!(used, place == keys.places[&id("renewed")], "record {place}");
        }

        drop(KeptKeys::none(&bpffs.path()));
        records.read(keys.places[&id("renewed")], record.bytes_mut()).unwrap();
        assert!(record.bytes().iter().all(|byte| *byte == 0), "the key was left behind");
        // Beside what the kernel itself shows in a new bpffs.
        assert!(!bpffs.path().join("kept-v1").exists());
    }

    #[test]
    fn there_are_no_more_than_there_is_room_for() {
        let (bpffs, now) = (Bpffs::new(), SystemTime::now());
        let authority = Authority::new(now);
        let (mut keys, _) = KeptKeys::open(&bpffs.path(), &here(&[]), &authority.trust(), now);
        for number in 0..=MAX_KEPT {
            keys.keep(&authority.issue(&format!("a{number}"), HOUR));
        }
        assert_eq!((keys.places.len(), keys.free.len()), (256, 0));
        assert!(!keys.places.contains_key(&id("a256")));
        keys.forget(&id("a7"));
        keys.keep(&authority.issue("a256", HOUR));
        assert!(keys.places.contains_key(&id("a256")));
        KeptKeys::none(&bpffs.path());
    }
}
