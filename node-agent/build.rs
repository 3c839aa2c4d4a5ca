//! How `culvert-agent` is linked.

use std::env;
use std::process::Command;

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    // A program that may be loaded anywhere has a table of addresses to put right at its start: 24 octets for each, all of
    // them read, so all of them resident. Packed, it is a fiftieth of that. glibc reads the packed form since 2.36.
    let variable = |name: &str| env::var(name).unwrap_or_default();
    let is_x86_glibc = variable("CARGO_CFG_TARGET_ARCH") == "x86_64"
        && variable("CARGO_CFG_TARGET_OS") == "linux"
        && variable("CARGO_CFG_TARGET_ENV") == "gnu";
    if is_x86_glibc && variable("HOST") == variable("TARGET") && glibc_minor() >= Some(36) {
        println!("cargo:rustc-link-arg-bins=-Wl,-z,pack-relative-relocs");
    }
}

/// The `y` of glibc 2.y on this machine; none when it cannot be told.
fn glibc_minor() -> Option<u32> {
    let output = Command::new("getconf").arg("GNU_LIBC_VERSION").output().ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    text.trim().strip_prefix("glibc 2.")?.split('.').next()?.parse().ok()
}
