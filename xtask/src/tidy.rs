//! What neither compiler nor lints check: crate edges, names of other places, file sizes.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use anyhow::{Context as _, bail};

use crate::command::{command, root};

/// Which of our crates may know which: the walls of ARCHITECTURE.md. Dev-dependencies are free.
const EDGES: &[(&str, &[&str])] = &[
    ("mesh-model", &[]),
    ("mesh-resolve", &["mesh-model"]),
    ("mesh-route", &["mesh-model"]),
    ("mesh-authorize", &["mesh-model", "mesh-resolve"]),
    ("mesh-jwt", &["mesh-authorize"]),
    ("mesh-tunnel", &["mesh-model", "mesh-authorize"]),
    ("mesh-identity", &["mesh-model"]),
    ("mesh-telemetry", &["mesh-model"]),
    ("mesh-wire", &["mesh-model", "mesh-resolve", "mesh-authorize", "mesh-jwt", "mesh-route"]),
    ("mesh-dns", &["mesh-model", "mesh-resolve"]),
    ("mesh-direct", &[]),
    ("mesh-enroll", &["mesh-model"]),
    ("mesh-net", &["mesh-model", "mesh-authorize", "mesh-tunnel", "mesh-identity"]),
    ("mesh-runtime", &["mesh-telemetry"]),
    ("mesh-control", &["mesh-wire", "mesh-runtime"]),
    (
        "culvert-waypoint",
        &[
            "mesh-model",
            "mesh-resolve",
            "mesh-route",
            "mesh-authorize",
            "mesh-jwt",
            "mesh-identity",
            "mesh-telemetry",
            "mesh-wire",
            "mesh-runtime",
            "mesh-control",
        ],
    ),
    ("culvert-cni", &["mesh-enroll"]),
    ("mesh-ebpf-abi", &[]),
    ("mesh-ebpf", &["mesh-ebpf-abi"]),
    (
        "culvert-agent",
        &[
            "mesh-model",
            "mesh-resolve",
            "mesh-authorize",
            "mesh-tunnel",
            "mesh-identity",
            "mesh-telemetry",
            "mesh-wire",
            "mesh-dns",
            "mesh-direct",
            "mesh-enroll",
            "mesh-net",
            "mesh-runtime",
            "mesh-control",
            "mesh-ebpf",
        ],
    ),
    (
        "mesh-controller",
        &[
            "mesh-model",
            "mesh-resolve",
            "mesh-authorize",
            "mesh-jwt",
            "mesh-route",
            "mesh-identity",
            "mesh-wire",
            "mesh-telemetry",
            "mesh-runtime",
        ],
    ),
    (
        "culvert",
        &["mesh-model", "mesh-resolve", "mesh-authorize", "mesh-wire", "mesh-enroll", "mesh-ebpf"],
    ),
];

/// Third-party crates that only the named crate of ours may use.
const WALLS: &[(&str, &[&str])] = &[
    ("aya", &["mesh-ebpf"]),
    ("kube", &["mesh-controller"]),
    ("k8s-openapi", &["mesh-controller"]),
];

/// A file longer than this many lines does two things.
const MAX_LINES: usize = 1000;

pub(crate) fn run() -> anyhow::Result<()> {
    let mut faults = edges()?;
    faults.extend(files()?);
    if faults.is_empty() {
        println!("tidy: crate edges and files are as they should be");
        return Ok(());
    }
    for fault in &faults {
        eprintln!("tidy: {fault}");
    }
    bail!("{} things are untidy", faults.len());
}

fn edges() -> anyhow::Result<Vec<String>> {
    let output = command("cargo", &["metadata", "--format-version", "1", "--no-deps"]).output()?;
    let metadata: serde_json::Value =
        serde_json::from_slice(&output.stdout).context("cargo metadata printed no JSON")?;
    let table: BTreeMap<&str, BTreeSet<&str>> =
        EDGES.iter().map(|(name, edges)| (*name, edges.iter().copied().collect())).collect();
    let mut faults = Vec::new();
    for package in metadata["packages"].as_array().into_iter().flatten() {
        let name = package["name"].as_str().unwrap_or_default();
        for dependency in package["dependencies"].as_array().into_iter().flatten() {
            let target = dependency["name"].as_str().unwrap_or_default();
            if dependency["kind"].as_str() == Some("dev") {
                continue;
            }
            for (wall, users) in WALLS {
                if target == *wall && !users.contains(&name) {
                    faults.push(format!("{name} uses {target}, which only {users:?} may"));
                }
            }
            if let Some(allowed) = table.get(name)
                && table.contains_key(target)
                && !allowed.contains(target)
            {
                faults.push(format!("{name} -> {target} is no allowed edge (xtask/src/tidy.rs)"));
            }
        }
    }
    Ok(faults)
}

fn files() -> anyhow::Result<Vec<String>> {
    let output = command("git", &["ls-files"]).output().context("cannot run git ls-files")?;
    let mut faults = Vec::new();
    for name in String::from_utf8_lossy(&output.stdout).lines() {
        let path = root().join(name);
        if !is_text(&path) {
            continue;
        }
        let Ok(text) = std::fs::read_to_string(&path) else { continue };
        if name.ends_with(".rs") && text.lines().count() > MAX_LINES {
            faults.push(format!("{name} has {} lines: split it", text.lines().count()));
        }
        for pattern in ["/home/", "/work/"] {
            if name != "xtask/src/tidy.rs" && text.contains(pattern) {
                faults.push(format!("{name} names a path of one machine ({pattern})"));
            }
        }
        for open in ["todo!(", "unimplemented!(", "#[ignore"] {
            if name.ends_with(".rs") && name != "xtask/src/tidy.rs" && text.contains(open) {
                faults.push(format!("{name} leaves something open: {open}"));
            }
        }
    }
    Ok(faults)
}

fn is_text(path: &Path) -> bool {
    path.extension().and_then(|extension| extension.to_str()).is_some_and(|extension| {
        ["rs", "toml", "md", "yaml", "yml", "json", "proto", "sh"].contains(&extension)
    })
}
