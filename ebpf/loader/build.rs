//! Builds `ebpf/programs` for the bpf target and leaves the object in `OUT_DIR`.
//!
//! Two compilers will do: Debian's `rustc-web` with `libstd-rust-web-dev-bpf` (a prebuilt `core` for
//! the target), or a nightly toolchain with `rust-src`. Both need `bpf-linker`.

use std::env;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;

const TARGET: &str = "bpfel-unknown-none";
const DEBIAN_RUSTC: &str = "/usr/bin/rustc";
const REMEDY: &str =
    "run `cargo xtask setup`, which installs what building the eBPF programs needs";

fn main() {
    let manifest_dir = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").expect("set by cargo"));
    let out_dir = PathBuf::from(env::var_os("OUT_DIR").expect("set by cargo"));
    let programs = manifest_dir.join("../programs");
    for watched in ["../programs/src", "../programs/Cargo.toml", "../programs/Cargo.lock", "../abi"]
    {
        println!("cargo:rerun-if-changed={}", manifest_dir.join(watched).display());
    }
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-env-changed=PATH");

    if let Err(problem) = build(&programs, &out_dir) {
        panic!("{problem}; {REMEDY}");
    }
}

/// Which compiler builds for the bpf target.
enum Toolchain {
    /// Debian's, with a prebuilt `core`.
    Debian,
    /// rustup's nightly, which builds `core` itself.
    Nightly,
}

fn build(programs: &Path, out_dir: &Path) -> Result<(), String> {
    let linker = find_linker().ok_or("bpf-linker is not installed")?;
    let toolchain = find_toolchain()
        .ok_or("no compiler for the bpf target: neither rustc-web nor a nightly with rust-src")?;
    // Not the workspace's target directory: its lock is held by the cargo that runs this script.
    let target_dir = out_dir.join("programs");
    let mut cargo = match toolchain {
        Toolchain::Debian => {
            let mut cargo = Command::new(env::var_os("CARGO").expect("set by cargo"));
            cargo.env("RUSTC_BOOTSTRAP", "1").env("RUSTC", DEBIAN_RUSTC);
            cargo
        }
        Toolchain::Nightly => {
            let mut cargo = Command::new("rustup");
            cargo.args(["run", "nightly", "cargo"]);
            cargo
        }
    };
    clean_environment(&mut cargo, &toolchain);
    let architecture = env::var("CARGO_CFG_TARGET_ARCH").expect("set by cargo");
    let mut flags = OsString::from(format!(
        "--cfg=bpf_target_arch=\"{architecture}\"\x1f-Cdebuginfo=2\x1f-Clink-arg=--btf\x1f-Clinker="
    ));
    flags.push(&linker);
    cargo
        .env("CARGO_ENCODED_RUSTFLAGS", flags)
        .current_dir(programs)
        .args(["build", "--locked", "--release", "--target", TARGET, "--target-dir"])
        .arg(&target_dir);
    if matches!(toolchain, Toolchain::Nightly) {
        cargo.args(["-Z", "build-std=core"]);
    }
    let output = cargo.output().map_err(|error| format!("cargo does not start: {error}"))?;
    if !output.status.success() {
        return Err(format!(
            "building the eBPF programs failed:\n{}",
            String::from_utf8_lossy(&output.stderr)
        ));
    }
    let object = target_dir.join(TARGET).join("release").join("mesh-ebpf-programs");
    std::fs::copy(&object, out_dir.join("programs.o"))
        .map_err(|error| format!("cannot copy {}: {error}", object.display()))?;
    Ok(())
}

/// What the outer cargo and its wrappers set must not reach the inner one.
fn clean_environment(cargo: &mut Command, toolchain: &Toolchain) {
    const KEPT: [&str; 4] = ["CARGO_HOME", "CARGO_NET_", "CARGO_HTTP_", "CARGO_REGISTR"];
    for (name, _) in env::vars_os() {
        let Some(name) = name.to_str() else { continue };
        let of_cargo = name.starts_with("CARGO") && !KEPT.iter().any(|kept| name.starts_with(kept));
        let of_rustc = matches!(
            name,
            "RUSTFLAGS" | "RUSTDOCFLAGS" | "RUSTC_WRAPPER" | "RUSTC_WORKSPACE_WRAPPER" | "RUSTDOC"
        );
        let of_nightly =
            matches!(toolchain, Toolchain::Nightly) && matches!(name, "RUSTC" | "RUSTUP_TOOLCHAIN");
        if of_cargo || of_rustc || of_nightly {
            cargo.env_remove(name);
        }
    }
}

fn find_toolchain() -> Option<Toolchain> {
    let prints = |command: &mut Command| {
        let output = command.env_remove("RUSTUP_TOOLCHAIN").output().ok()?;
        output
            .status
            .success()
            .then(|| PathBuf::from(String::from_utf8_lossy(&output.stdout).trim().to_owned()))
    };
    let has_core = |directory: PathBuf| {
        directory.read_dir().is_ok_and(|mut entries| {
            entries.any(|entry| {
                entry.is_ok_and(|entry| entry.file_name().to_string_lossy().starts_with("libcore-"))
            })
        })
    };
    let mut debian = Command::new(DEBIAN_RUSTC);
    debian.args(["--print", "target-libdir", "--target", TARGET]);
    if prints(&mut debian).is_some_and(has_core) {
        return Some(Toolchain::Debian);
    }
    let mut nightly = Command::new("rustup");
    nightly.args(["run", "nightly", "rustc", "--print", "sysroot"]);
    prints(&mut nightly)
        .is_some_and(|sysroot| sysroot.join("lib/rustlib/src/rust/library/core").is_dir())
        .then_some(Toolchain::Nightly)
}

fn find_linker() -> Option<PathBuf> {
    let path = env::var_os("PATH")?;
    let cargo_home = env::var_os("CARGO_HOME")
        .map(PathBuf::from)
        .or_else(|| env::var_os("HOME").map(|home| PathBuf::from(home).join(".cargo")));
    env::split_paths(&path)
        .chain(cargo_home.map(|home| home.join("bin")))
        .map(|directory| directory.join("bpf-linker"))
        .find(|candidate| candidate.is_file())
}
