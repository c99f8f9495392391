//! What the agent is made of, as a bill of materials (CycloneDX 1.6, JSON): every crate that is compiled into it, with version,
//! licence and where it came from. Build scripts and macros that run when it is built are not in it.

use crate::command::CommandLine;
use anyhow::{Context as _, Result};
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};

/// The packages that make up the agent: its own, and that of the programs that it carries.
const ROOTS: [&str; 2] = ["dataplane-user", "dataplane-ebpf"];

/// The bill of an agent for this target. It says no time and no number of its own: the same lock file makes the same text.
pub(crate) fn sbom(target: &str, version: &str) -> Result<Vec<u8>> {
    let command =
        CommandLine::new("cargo metadata --format-version 1 --locked --filter-platform").arg(target);
    let output = command.command().output().with_context(|| format!("cannot run `{command}`"))?;
    anyhow::ensure!(output.status.success(), "`{command}`: {}", String::from_utf8_lossy(&output.stderr));
    let bill = bill(&serde_json::from_slice(&output.stdout)?, version)?;
    Ok(serde_json::to_vec_pretty(&bill)?)
}

fn bill(metadata: &Value, version: &str) -> Result<Value> {
    let packages = by_id(&metadata["packages"])?;
    let nodes = by_id(&metadata["resolve"]["nodes"])?;
    let name_of = |id: &str| packages.get(id).and_then(|package| package["name"].as_str());
    let mut open: Vec<&str> =
        packages.keys().copied().filter(|id| name_of(id).is_some_and(|name| ROOTS.contains(&name))).collect();
    let mut seen = BTreeSet::new();
    while let Some(id) = open.pop() {
        if seen.insert(id) {
            let dependencies = nodes.get(id).and_then(|node| node["deps"].as_array()).into_iter().flatten();
            open.extend(dependencies.filter(|it| is_compiled_in(it)).filter_map(|it| it["pkg"].as_str()));
        }
    }
    let packages = seen.iter().filter_map(|id| packages.get(id)).filter(|package| !is_macro(package));
    let mut components: Vec<_> = packages.map(|package| component(package)).collect();
    components.sort_by_key(|component| component["bom-ref"].to_string());
    Ok(json!({
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": { "component": { "type": "application", "name": "portolan", "version": version } },
        "components": components,
    }))
}

/// The objects of a list by their `id`.
fn by_id(list: &Value) -> Result<BTreeMap<&str, &Value>> {
    let list = list.as_array().context("cargo metadata has no such list")?;
    Ok(list.iter().filter_map(|object| Some((object["id"].as_str()?, object))).collect())
}

/// Whether it is a dependency of the program itself, not of its tests or of its build script.
fn is_compiled_in(dependency: &Value) -> bool {
    dependency["dep_kinds"].as_array().is_some_and(|kinds| kinds.iter().any(|kind| kind["kind"].is_null()))
}

fn is_macro(package: &Value) -> bool {
    let targets = package["targets"].as_array().into_iter().flatten();
    targets
        .flat_map(|target| target["kind"].as_array().into_iter().flatten())
        .any(|kind| kind == "proc-macro")
}

fn component(package: &Value) -> Value {
    let text = |field: &str| package[field].as_str().unwrap_or_default();
    let purl = format!("pkg:cargo/{}@{}", text("name"), text("version"));
    json!({
        "type": "library",
        "bom-ref": purl,
        "name": text("name"),
        "version": text("version"),
        "purl": purl,
        "licenses": [{ "expression": text("license").replace('/', " OR ") }],
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_compiled_in_is_listed_and_what_only_builds_or_tests_is_not() {
        let package = |name: &str, kind: &str| json!({ "id": name, "name": name, "version": "1.0.0", "license": "MIT/Apache-2.0", "targets": [{ "kind": [kind] }] });
        let dependency = |name: &str, kind: Value| json!({ "pkg": name, "dep_kinds": [{ "kind": kind }] });
        let metadata = json!({
            "packages": [
                package("dataplane-user", "lib"), package("used", "lib"), package("derive", "proc-macro"),
                package("builds", "lib"), package("tests", "lib"), package("stranger", "lib"),
            ],
            "resolve": { "nodes": [
                { "id": "dataplane-user", "deps": [
                    dependency("used", Value::Null), dependency("derive", Value::Null),
                    dependency("builds", "build".into()), dependency("tests", "dev".into()),
                ] },
                { "id": "stranger", "deps": [] },
            ] },
        });
        let bill = bill(&metadata, "0.1.0").unwrap();
        let names: Vec<_> =
            bill["components"].as_array().unwrap().iter().map(|it| it["purl"].clone()).collect();
        assert_eq!(names, ["pkg:cargo/dataplane-user@1.0.0", "pkg:cargo/used@1.0.0"]);
        assert_eq!(bill["components"][1]["licenses"][0]["expression"], "MIT OR Apache-2.0");
    }

    #[test]
    fn the_agents_own_bill_names_what_it_is_known_to_hold() {
        let target = format!("{}-unknown-linux-gnu", std::env::consts::ARCH);
        let text = String::from_utf8(sbom(&target, "0.1.0").unwrap()).unwrap();
        for name in
            ["pkg:cargo/kube@", "pkg:cargo/aya@", "pkg:cargo/aya-ebpf@", "pkg:cargo/dataplane-common@"]
        {
            assert!(text.contains(name), "{name}");
        }
        for name in ["pkg:cargo/cc@", "pkg:cargo/libtest-mimic@", "pkg:cargo/xtask@"] {
            assert!(!text.contains(name), "{name}");
        }
    }
}
