//! A bill of materials in CycloneDX 1.5, from what cargo resolved.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context as _, bail};
use serde_json::{Value, json};

use crate::command::{command, output_of};

/// Every crate that ends up in programs of `packages`; build scripts' and tests' own dependencies do not.
pub(super) fn cyclonedx(packages: &[&str]) -> anyhow::Result<String> {
    let printed =
        output_of(&mut command("cargo", &["metadata", "--format-version", "1", "--locked"]))?;
    let metadata: Value =
        serde_json::from_str(&printed).context("cargo metadata printed no JSON")?;
    let all: BTreeMap<&str, &Value> = by_id(&metadata["packages"]);
    let nodes: BTreeMap<&str, &Value> = by_id(&metadata["resolve"]["nodes"]);
    let mut open: Vec<&str> = Vec::new();
    for name in packages {
        match all.iter().find(|(_, package)| package["name"] == **name) {
            Some((id, _)) => open.push(id),
            None => bail!("no package {name}"),
        }
    }
    let mut held = BTreeSet::new();
    while let Some(id) = open.pop() {
        if !held.insert(id) {
            continue;
        }
        let Some(node) = nodes.get(id) else { bail!("cargo resolved nothing for {id}") };
        let linked = node["deps"].as_array().into_iter().flatten().filter(|dependency| {
            let kinds = dependency["dep_kinds"].as_array();
            kinds.is_some_and(|kinds| kinds.iter().any(|kind| kind["kind"].is_null()))
        });
        open.extend(linked.filter_map(|dependency| dependency["pkg"].as_str()));
    }
    let components: Vec<Value> = held.iter().filter_map(|id| all.get(id)).map(component).collect();
    let bill = json!({
        "bomFormat": "CycloneDX",
        "specVersion": "1.5",
        "version": 1,
        "metadata": {"component": {"type": "application", "name": packages[0]}},
        "components": components,
    });
    Ok(format!("{bill:#}\n"))
}

fn by_id(list: &Value) -> BTreeMap<&str, &Value> {
    let entries = list.as_array().into_iter().flatten();
    entries.filter_map(|entry| Some((entry["id"].as_str()?, entry))).collect()
}

fn component(package: &&Value) -> Value {
    let text = |key: &str| package[key].as_str().unwrap_or_default();
    let (name, version) = (text("name"), text("version"));
    json!({
        "type": "library",
        "name": name,
        "version": version,
        "purl": format!("pkg:cargo/{name}@{version}"),
        "licenses": [{"expression": text("license")}],
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_linked_is_listed_and_what_only_builds_is_not() {
        let bill: Value = serde_json::from_str(&cyclonedx(&["culvert-agent"]).unwrap()).unwrap();
        let names: BTreeSet<&str> = bill["components"]
            .as_array()
            .unwrap()
            .iter()
            .filter_map(|one| one["name"].as_str())
            .collect();
        assert!(names.contains("rustls") && names.contains("mesh-tunnel"), "{names:?}");
        assert!(!names.contains("tempfile") && !names.contains("protox"), "{names:?}");
        assert!(cyclonedx(&["no-such-package"]).is_err());
    }
}
