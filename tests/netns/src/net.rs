//! Namespaces, links, addresses and routes, through iproute2.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::Context as _;

use crate::process::{in_namespace, run};

const LIMIT: Duration = Duration::from_secs(60);

/// Runs `ip <arguments>` in a namespace (`None`: where we are).
///
/// # Errors
/// When it fails; the error carries the command and what it wrote.
pub fn ip(namespace: Option<&str>, arguments: &str) -> anyhow::Result<String> {
    let mut command = in_namespace(namespace, "ip");
    command.args(arguments.split_whitespace());
    run(&mut command, LIMIT)?
        .output()
        .with_context(|| format!("ip {arguments} (in {})", namespace.unwrap_or("the host")))
}

/// Writes a sysctl in a namespace, e.g. `net.ipv4.ip_forward=1`.
///
/// # Errors
/// When the kernel refuses it.
pub fn sysctl(namespace: &str, setting: &str) -> anyhow::Result<()> {
    let mut command = in_namespace(Some(namespace), "sysctl");
    command.args(["-qw", setting]);
    run(&mut command, LIMIT)?
        .output()
        .with_context(|| format!("sysctl {setting} in {namespace}"))?;
    Ok(())
}

/// A network namespace that goes away with the value, with everything that runs in it.
#[derive(Debug)]
pub struct Namespace {
    name: String,
}

impl Namespace {
    /// Makes the namespace with its loopback up; one of the same name left by an earlier run is removed first.
    ///
    /// # Errors
    /// When the kernel or iproute2 refuses.
    pub fn create(name: &str) -> anyhow::Result<Self> {
        if Path::new("/run/netns").join(name).exists() {
            remove(name)?;
        }
        ip(None, &format!("netns add {name}"))?;
        let namespace = Self { name: name.to_owned() };
        ip(Some(name), "link set lo up")?;
        Ok(namespace)
    }

    /// Its name, as `ip netns` lists it.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        let there = Path::new("/run/netns").join(&self.name).exists();
        if there && let Err(error) = remove(&self.name) {
            eprintln!("removing namespace {}: {error:#}", self.name);
        }
    }
}

/// Kills what runs in the namespace `name` and removes it.
///
/// # Errors
/// When it cannot be removed.
pub fn remove(name: &str) -> anyhow::Result<()> {
    let pids = run(Command::new("ip").args(["netns", "pids", name]), LIMIT)?;
    for pid in pids.stdout.split_whitespace() {
        // Whoever ended between the listing and the signal needs no signal.
        run(Command::new("kill").args(["-9", pid]), LIMIT)?;
    }
    ip(None, &format!("netns delete {name}"))?;
    Ok(())
}
