//! Every metric that is declared is counted somewhere, and every one that is counted is declared.
//!
//! Read off the sources: a metric without its `# HELP`, or one that stays 0 for ever, is found by nobody at run time.
#![expect(clippy::unwrap_used, reason = "a test's own values are valid")]
#![expect(clippy::disallowed_methods, reason = "it reads sources, which are files")]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use mesh_telemetry::metric::ALL;

/// What counts.
const SOURCES: [&str; 5] = [
    "crates/mesh-runtime/src",
    "node-agent/src",
    "node-agent/cni/src",
    "controller/src",
    "waypoint/src",
];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

/// All Rust files under `folder` with what they do outside their tests.
fn sources(folder: &Path, into: &mut Vec<(PathBuf, String)>) {
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            sources(&path, into);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            let text = std::fs::read_to_string(&path).unwrap();
            let counting = text.split("#[cfg(test)]").next().unwrap_or_default().to_owned();
            into.push((path, counting));
        }
    }
}

fn counting() -> Vec<(PathBuf, String)> {
    let mut found = Vec::new();
    for folder in SOURCES {
        sources(&root().join(folder), &mut found);
    }
    assert!(found.len() > 50, "the sources are elsewhere: {found:?}");
    found
}

/// Constants by the name they stand for.
fn constants() -> BTreeMap<String, String> {
    let text = std::fs::read_to_string(root().join("crates/mesh-telemetry/src/metric.rs")).unwrap();
    let declared = text.lines().filter_map(|line| line.trim().split_once(" = \""));
    let declared = declared.filter_map(|(constant, rest)| {
        let name = rest.split_once('"')?.0;
        Some((name.to_owned(), constant.to_owned()))
    });
    let declared: BTreeMap<_, _> = declared.collect();
    for metric in ALL {
        assert!(declared.contains_key(metric.name), "no constant found for {}", metric.name);
    }
    declared
}

#[test]
fn every_declared_metric_is_counted() {
    let (sources, constants) = (counting(), constants());
    let is_used = |constant: &str| {
        let usage = format!("metric::{constant}");
        sources.iter().any(|(_, text)| {
            text.match_indices(&usage).any(|(at, _)| {
                let next = text[at + usage.len()..].chars().next();
                next.is_none_or(|next| !next.is_ascii_alphanumeric() && next != '_')
            })
        })
    };
    let idle: Vec<_> = ALL
        .iter()
        .map(|metric| &*constants[metric.name])
        .filter(|constant| !is_used(constant))
        .collect();
    assert!(idle.is_empty(), "declared and never counted: {idle:?}");
}

#[test]
fn every_counted_metric_is_declared() {
    let mut bare = Vec::new();
    for (path, text) in counting() {
        for call in ["counter!(", "gauge!(", "histogram!(", "gauge("] {
            for (at, _) in text.match_indices(call) {
                if text[at + call.len()..].trim_start().starts_with('"') {
                    let line = text[..at].lines().count();
                    bare.push(format!("{}:{line}", path.display()));
                }
            }
        }
    }
    assert!(bare.is_empty(), "counted by a name of its own, not by a constant: {bare:#?}");
}
