//! libFuzzer in front of the targets of `mesh-fuzz`. One program for all of them, so that one link is enough;
//! `CULVERT_FUZZ_TARGET` says which one is run.

#![no_main]

use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use mesh_fuzz::TARGETS;

static RUN: LazyLock<fn(&[u8])> = LazyLock::new(|| {
    let wanted = std::env::var("CULVERT_FUZZ_TARGET").unwrap_or_default();
    let found = TARGETS.iter().find(|target| target.name == wanted);
    found.unwrap_or_else(|| panic!("CULVERT_FUZZ_TARGET={wanted} is no target")).run
});

fuzz_target!(|data: &[u8]| RUN(data));
