//! The kernel settings an enrolled pod's namespace needs, and what they were before.
//!
//! `/proc/sys/net` shows the namespace of the thread that looks, so all of this runs inside the pod's.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};

/// Original values by setting, e.g. `net/ipv4/tcp_tw_reuse` → `2`.
pub(crate) type Originals = BTreeMap<String, String>;

/// One setting.
#[derive(Clone, Copy, Debug)]
struct Setting {
    name: &'static str,
    value: &'static str,
    /// True when capture works without it on kernels or in namespaces that lack it.
    optional: bool,
}

/// What capture needs. Source: reference/ebpf.md C, G and H, each shown by running.
const SETTINGS: [Setting; 5] = [
    // Replies to a connection made with the client's own address find the way back to the agent,
    Setting { name: "net/ipv4/tcp_fwmark_accept", value: "1", optional: false },
    // and so do the resets of a port where nothing listens.
    Setting { name: "net/ipv4/fwmark_reflect", value: "1", optional: false },
    Setting { name: "net/ipv6/fwmark_reflect", value: "1", optional: true },
    // All captured connections go to one address and port, which would run out of source ports.
    Setting { name: "net/ipv4/tcp_tw_reuse", value: "1", optional: false },
    // Connections queued at a listener that closes move to the listeners that remain.
    Setting { name: "net/ipv4/tcp_migrate_req", value: "1", optional: true },
];

/// Notes the present value of everything [`apply`] changes. `known` are originals from an earlier enrolment of the same
/// namespace; they win, because the present values are ours then.
pub(crate) fn originals(known: &Originals) -> io::Result<Originals> {
    let mut originals = known.clone();
    for setting in SETTINGS {
        if originals.contains_key(setting.name) {
            continue;
        }
        match std::fs::read_to_string(path(setting.name)) {
            Ok(value) => {
                originals.insert(setting.name.to_owned(), value.trim().to_owned());
            }
            Err(error) if setting.optional && missing(&error) => {}
            Err(error) => return Err(named(setting.name, &error)),
        }
    }
    Ok(originals)
}

/// Sets everything that is not as it should be.
pub(crate) fn apply() -> io::Result<()> {
    for setting in SETTINGS {
        match write(setting.name, setting.value) {
            Err(error) if setting.optional && missing(&error) => {}
            done => done.map_err(|error| named(setting.name, &error))?,
        }
    }
    Ok(())
}

/// The first setting that is not as [`apply`] leaves it.
pub(crate) fn drifted() -> Option<&'static str> {
    let differs = |setting: &Setting| match std::fs::read_to_string(path(setting.name)) {
        Ok(value) => value.trim() != setting.value,
        Err(error) => !(setting.optional && missing(&error)),
    };
    SETTINGS.iter().find(|setting| differs(setting)).map(|setting| setting.name)
}

/// Puts back what was there. A setting that somebody has changed since stays as it is.
pub(crate) fn restore(originals: &Originals) -> io::Result<()> {
    for setting in SETTINGS {
        let Some(original) = originals.get(setting.name) else { continue };
        let ours = std::fs::read_to_string(path(setting.name))
            .is_ok_and(|value| value.trim() == setting.value);
        if ours {
            write(setting.name, original).map_err(|error| named(setting.name, &error))?;
        }
    }
    Ok(())
}

/// Whether the namespace routes IPv6 over its loopback interface.
pub(crate) fn has_ipv6() -> bool {
    std::fs::read_to_string(path("net/ipv6/conf/lo/disable_ipv6"))
        .is_ok_and(|value| value.trim() == "0")
}

fn write(name: &str, value: &str) -> io::Result<()> {
    let path = path(name);
    if std::fs::read_to_string(&path)?.trim() == value {
        return Ok(());
    }
    std::fs::write(&path, value)
}

fn path(name: &str) -> PathBuf {
    Path::new("/proc/sys").join(name)
}

fn missing(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound
}

fn named(name: &str, error: &io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("{name}: {error}"))
}
