//! What `deploy/` holds: its files, as the tests and the workshop read them, and what must be the same in several of them.

use anyhow::{Context as _, Result};
use serde_json::Value;
use std::fs;
use std::path::{Path, PathBuf};

/// A file below `deploy/`.
pub fn file(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy").join(name)
}

/// The objects of a text of YAML documents.
///
/// # Errors
/// If one does not parse.
pub fn objects(yaml: &str) -> Result<Vec<Value>> {
    let documents = yaml.split("\n---").map(str::trim);
    let written =
        documents.filter(|text| text.lines().any(|line| !line.is_empty() && !line.starts_with('#')));
    written.map(|text| serde_saphyr::from_str(text).with_context(|| text.to_owned())).collect()
}

/// The objects of a file below `deploy/`.
///
/// # Errors
/// If it cannot be read.
pub fn objects_of(name: &str) -> Result<Vec<Value>> {
    objects(&fs::read_to_string(file(name)).with_context(|| name.to_owned())?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn one(name: &str, kind: &str) -> Value {
        objects_of(name).unwrap().into_iter().find(|object| object["kind"] == kind).unwrap()
    }

    /// Takes away what the two may have of their own.
    fn without(mut container: Value, own: &[&str], mounts: &[&str]) -> Value {
        let fields = container.as_object_mut().unwrap();
        fields.retain(|name, _| !own.contains(&name.as_str()));
        let list = container["volumeMounts"].as_array_mut().unwrap();
        list.retain(|mount| !mounts.contains(&mount["name"].as_str().unwrap()));
        container
    }

    #[test]
    fn the_static_pod_runs_the_agent_as_the_daemon_set_does() {
        let pod = &one("static-pod.yaml", "Pod")["spec"];
        let daemon_set = &one("portolan.yaml", "DaemonSet")["spec"]["template"]["spec"];
        let own = ["args", "envFrom"];
        assert_eq!(
            without(pod["containers"][0].clone(), &own, &["kubeconfig"]),
            without(daemon_set["containers"][0].clone(), &own, &["kubernetes"]),
        );
        assert_eq!(pod["initContainers"][0], daemon_set["initContainers"][0]);
        let args = |spec: &Value| spec["containers"][0]["args"].as_array().unwrap().clone();
        let mut expected = args(daemon_set);
        expected.push("--kubeconfig=/etc/portolan/kubeconfig".into());
        assert_eq!(args(pod), expected);
        for field in
            ["hostNetwork", "dnsPolicy", "priorityClassName", "tolerations", "terminationGracePeriodSeconds"]
        {
            assert_eq!(pod[field], daemon_set[field], "{field}");
        }
        let volume = |spec: &Value, name: &Value| {
            spec["volumes"].as_array().unwrap().iter().find(|volume| volume["name"] == *name).cloned()
        };
        let mounted =
            pod["containers"][0]["volumeMounts"].as_array().unwrap().iter().map(|mount| &mount["name"]);
        for name in mounted.filter(|name| **name != "kubeconfig") {
            assert_eq!(volume(pod, name), volume(daemon_set, name), "{name}");
        }
    }

    #[test]
    fn every_file_has_the_version_of_the_packages() {
        let image = format!("localhost/portolan:{}", env!("CARGO_PKG_VERSION"));
        for name in ["portolan.yaml", "static-pod.yaml", "cleanup.yaml"] {
            let text = fs::read_to_string(file(name)).unwrap();
            let images = text.lines().filter_map(|line| line.trim().strip_prefix("image: "));
            let own: Vec<_> = images.filter(|image| image.starts_with("localhost/")).collect();
            assert!(!own.is_empty() && own.iter().all(|other| *other == image), "{name}: {own:?}");
        }
        let chart = fs::read_to_string(file("helm/portolan/Chart.yaml")).unwrap();
        for field in ["version", "appVersion"] {
            let line = format!("{field}: {}", env!("CARGO_PKG_VERSION"));
            assert!(chart.lines().any(|other| other == line), "Chart.yaml has no `{line}`");
        }
    }
}
