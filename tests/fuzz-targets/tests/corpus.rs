//! The committed corpus holds every target's seeds. `CULVERT_FUZZ_WRITE=seeds` writes them anew, after a change of a
//! format; `CULVERT_FUZZ_WRITE=fixtures` makes new certificates first.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use mesh_fuzz::TARGETS;
use mesh_identity::{CaConfig, CaCore, IssuedAnswer, csr};
use mesh_model::SpiffeId;

fn corpus(target: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus").join(target)
}

fn wanted(what: &str) -> bool {
    std::env::var("CULVERT_FUZZ_WRITE").is_ok_and(|wanted| wanted == what)
}

#[test]
fn every_seed_is_committed() {
    for target in TARGETS {
        for (number, seed) in (target.seeds)().into_iter().enumerate() {
            let path = corpus(target.name).join(format!("seed-{number}"));
            if wanted("seeds") {
                fs::create_dir_all(corpus(target.name)).unwrap();
                fs::write(&path, &seed).unwrap();
            }
            let committed = fs::read(&path).unwrap_or_default();
            assert!(committed == seed, "{} is not the seed any more", path.display());
        }
    }
}

#[test]
fn every_corpus_has_a_target() {
    for folder in fs::read_dir(corpus("")).unwrap() {
        let name = folder.unwrap().file_name().into_string().unwrap();
        assert!(TARGETS.iter().any(|target| target.name == name), "{name} is nobody's corpus");
    }
}

#[test]
fn fixtures_are_made_on_demand() {
    if !wanted("fixtures") {
        return;
    }
    let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1_900_000_000);
    let id = SpiffeId::new("cluster.local", "shop", "cart").unwrap();
    let mut ca = CaCore::create("cluster.local", CaConfig::default(), now).unwrap();
    let (key, request) = csr(&id).unwrap();
    let answer = ca.sign(&request, &id, Duration::from_secs(24 * 3600), now).unwrap();
    let svid = IssuedAnswer::check(&answer, &id, key, now).unwrap().svid;
    ca.revoke_leaf(svid.serial(), now);
    let key = rcgen::KeyPair::try_from(svid.key().to_pkcs8().as_slice()).unwrap().serialize_pem();
    let files = [
        ("leaf.pem", answer[0].clone()),
        ("intermediate.pem", answer[1].clone()),
        ("roots.pem", answer[2].clone()),
        ("revoked.pem", ca.crl_pem(now).unwrap()),
        ("request.pem", request),
        ("key.pem", key),
    ];
    for (name, content) in files {
        fs::write(Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures").join(name), content)
            .unwrap();
    }
}
