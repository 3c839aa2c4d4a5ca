//! The Go toolchain: the machine's, or one fetched from the module proxy where that is missing or too old.

use std::fs::{self, File, Permissions};
use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};

use crate::command::{command, output_of, quietly};
use crate::oci::sha256;

/// The newest language version that a module in `tests/cluster` asks for.
const MINOR_VERSION: u32 = 25;
/// What is fetched: a toolchain as a module, as Go itself does. Source: go.dev/doc/toolchain.
const FETCHED: &str = "v0.0.1-go1.25.9.linux-amd64";
const FETCHED_SHA256: &str = "cc7f941933e0f371df37bfecd977b7e3aa474b2f3c2719806d9fe5f291a1c647";
const PROXY: &str = "https://proxy.golang.org";

/// The `go` program to build with; fetched toolchains are kept in `folder`.
pub(super) fn program(folder: &Path) -> anyhow::Result<PathBuf> {
    let asked = output_of(command("go", &["env", "GOVERSION"]).env("GOTOOLCHAIN", "local"));
    if asked.is_ok_and(|version| is_new_enough(version.trim())) {
        return Ok("go".into());
    }
    if std::env::consts::ARCH != "x86_64" {
        bail!(
            "the test cluster is built with Go: install Go 1.{MINOR_VERSION} or newer, put it on PATH"
        );
    }
    fetch(folder)
}

fn is_new_enough(version: &str) -> bool {
    let minor =
        version.strip_prefix("go1.").and_then(|rest| rest.split(['.', 'r', 'b', ' ']).next());
    minor.and_then(|minor| minor.parse::<u32>().ok()).is_some_and(|minor| minor >= MINOR_VERSION)
}

fn fetch(folder: &Path) -> anyhow::Result<PathBuf> {
    let finished = folder.join(FETCHED);
    let go = finished.join(format!("golang.org/toolchain@{FETCHED}/bin/go"));
    fs::create_dir_all(folder)?;
    let lock = File::create(folder.join("go.lock"))?;
    lock.lock().context("cannot wait for another fetch of Go")?;
    if go.exists() {
        return Ok(go);
    }
    let proxies = std::env::var("GOPROXY").unwrap_or_default();
    let proxy = proxies.split([',', '|']).find(|one| one.starts_with("http")).unwrap_or(PROXY);
    let url = format!("{}/golang.org/toolchain/@v/{FETCHED}.zip", proxy.trim_end_matches('/'));
    println!("fetching Go 1.{MINOR_VERSION}, once: {url}");
    let archive = folder.join("go.zip");
    quietly(command("curl", &["-sSfL", "--retry", "3", "-o"]).arg(&archive).arg(&url))?;
    let digest = sha256(&fs::read(&archive)?);
    if digest != FETCHED_SHA256 {
        bail!("{url} is not what was expected: sha256 {digest}");
    }
    let staging = finished.with_extension("staging");
    if staging.exists() {
        fs::remove_dir_all(&staging)?;
    }
    quietly(command("python3", &["-m", "zipfile", "-e"]).arg(&archive).arg(&staging))?;
    // A module's archive holds no modes.
    let unpacked = staging.join(format!("golang.org/toolchain@{FETCHED}"));
    make_executable(&unpacked.join("bin"))?;
    make_executable(&unpacked.join("pkg/tool"))?;
    fs::rename(&staging, &finished)?;
    fs::remove_file(&archive)?;
    Ok(go)
}

fn make_executable(folder: &Path) -> io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        if path.is_dir() {
            make_executable(&path)?;
        } else {
            fs::set_permissions(&path, Permissions::from_mode(0o755))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_compared_by_number() {
        for good in ["go1.25", "go1.25.0", "go1.26rc1", "go1.100.2"] {
            assert!(is_new_enough(good), "{good}");
        }
        for bad in ["go1.19.8", "go1.3", "devel", ""] {
            assert!(!is_new_enough(bad), "{bad}");
        }
    }
}
