//! Keys leave nothing behind. The only test of its program: others would move its memory about.
#![expect(clippy::unwrap_used, reason = "a test's own values are valid")]
#![expect(
    clippy::disallowed_methods,
    reason = "it reads its own memory, which is a file, at the time it is"
)]

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::time::{Duration, SystemTime};

use mesh_identity::{CaConfig, CaCore, CsrKey, IssuedAnswer, Svid, csr};
use mesh_model::SpiffeId;
use zeroize::Zeroizing;

/// How often `needle` is in this process's heap, `needle` itself included.
fn copies(needle: &[u8]) -> usize {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let memory = File::open("/proc/self/mem").unwrap();
    // Room for the largest, taken before anything is counted, so that reading moves nothing.
    let mut found = 0;
    let mut buffer = vec![0; 1 << 16];
    for line in maps.lines() {
        let mut fields = line.split_whitespace();
        let (range, mode) = (fields.next().unwrap(), fields.next().unwrap());
        let is_heap = line.ends_with("[heap]") || fields.count() == 3;
        if !mode.starts_with("rw") || !is_heap {
            continue;
        }
        let (start, end) = range.split_once('-').unwrap();
        let [start, end] = [start, end].map(|text| u64::from_str_radix(text, 16).unwrap());
        let own = buffer.as_ptr().addr() as u64;
        let mut at = start;
        while at < end {
            let length = buffer.len().min(usize::try_from(end - at).unwrap());
            if memory.read_exact_at(&mut buffer[..length], at).is_err() {
                break;
            }
            // What was read into the buffer is a copy of our own making.
            let places = buffer[..length].windows(needle.len()).enumerate();
            found += places
                .filter(|(place, window)| {
                    let address = at + *place as u64;
                    *window == needle && !(own..own + (1 << 16)).contains(&address)
                })
                .count();
            at += length as u64;
            if at < end {
                at -= needle.len() as u64 - 1;
            }
        }
    }
    buffer.fill(0);
    found
}

#[test]
fn a_certificate_that_is_gone_leaves_no_key_behind() {
    let now = SystemTime::now();
    let id: SpiffeId = "spiffe://cluster.local/ns/shop/sa/cart".parse().unwrap();
    let ca = CaCore::create("cluster.local", CaConfig::default(), now).unwrap();
    let (key, request) = csr(&id).unwrap();
    let answer = ca.sign(&request, &id, Duration::ZERO, now).unwrap();
    let first = IssuedAnswer::check(&answer, &id, key, now).unwrap().svid;
    let (chain, pkcs8) = (first.chain().to_vec(), first.key().to_pkcs8());
    drop(first);
    // The scalar: an OCTET STRING of 32 bytes behind version 1. Source: RFC 5915 §3.
    let marker = [2, 1, 1, 4, 32];
    let at = pkcs8.windows(5).position(|window| window == marker).unwrap() + 5;
    let scalar = pkcs8[at..at + 32].to_vec();
    let before = copies(&scalar);
    assert!(before >= 2, "the test does not see {before} copies of its own");
    for _ in 0..16 {
        let key = CsrKey::from_pkcs8(Zeroizing::new(pkcs8.to_vec()));
        let svid = Svid::handed_over(chain.clone(), key).unwrap();
        drop(svid);
    }
    assert_eq!(copies(&scalar), before);
}
