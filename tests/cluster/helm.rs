//! The chart in `deploy/helm`, by the real Helm: linted, held against the plain manifest, installed, tested and uninstalled.

use crate::deploy::{LABEL, clean, raise};
use crate::shared::{Cluster, PORT};
use crate::world::eventually;
use dataplane_tests::deploy::{file, objects, objects_of};
use dataplane_tests::lab::at;
use serde_json::Value;

const RELEASE: [&str; 2] = ["portolan", "--namespace=kube-system"];

fn chart() -> String {
    file("helm/portolan").display().to_string()
}

fn template(cluster: &Cluster, values: &[&str]) -> anyhow::Result<Vec<Value>> {
    let chart = chart();
    let text = cluster.plane.helm(&[&["template"], &RELEASE[..], &[&chart], values].concat())?;
    // What `helm test` makes is no part of the release.
    let mut all = objects(&text)?;
    all.retain(|object| object.pointer("/metadata/annotations/helm.sh~1hook").is_none());
    all.sort_by_key(|object| object["kind"].to_string());
    Ok(all)
}

fn assert_the_chart_is_the_manifest(cluster: &Cluster) {
    cluster.plane.helm(&["lint", "--strict", &chart()]).unwrap();
    let mut manifest = objects_of("portolan.yaml").unwrap();
    manifest.sort_by_key(|object| object["kind"].to_string());
    assert_eq!(template(cluster, &[]).unwrap(), manifest);

    let values =
        ["--set=image.repository=r.example/p,image.tag=v2", "--set=apiServers={192.0.2.1,192.0.2.2:6443}"];
    let set = template(cluster, &[values[0], values[1], "--set=extraArgs={--masquerade-all}"]).unwrap();
    let spec = &set.iter().find(|object| object["kind"] == "DaemonSet").unwrap()["spec"]["template"]["spec"];
    assert_eq!(spec["containers"][0]["image"], "r.example/p:v2");
    let args = spec["containers"][0]["args"].as_array().unwrap();
    for arg in ["--api-server=192.0.2.1,192.0.2.2:6443", "--masquerade-all"] {
        assert!(args.contains(&arg.into()), "{args:?}");
    }
    for wrong in
        ["healthz.port=nine", "image.pullPolicy=Sometimes", "apiServer=192.0.2.1", "extraArgs={masquerade}"]
    {
        let error = template(cluster, &["--set", wrong]).unwrap_err().to_string();
        assert!(error.contains("values don't meet the specifications of the schema"), "{wrong}: {error}");
    }
}

/// C3: installed and tested by one command each; to uninstall it disturbs nobody, and the clean-up leaves nothing.
#[test]
fn the_chart_installs_and_tests_and_uninstalls() {
    let cluster = raise();
    assert_the_chart_is_the_manifest(&cluster);
    let chart = chart();
    let helm = |arguments: &[&str]| cluster.plane.helm(&[arguments, &RELEASE[1..]].concat()).unwrap();
    helm(&["install", RELEASE[0], &chart, "--wait", "--timeout=300s"]);
    cluster.web("charted", 2, 30_117);
    let to = [at(cluster.cluster_ip("charted"), PORT), at(cluster.lab.node(0).address(), 30_117)];
    cluster.wait_until_served(to);
    let tested = helm(&["test", RELEASE[0], "--timeout=120s"]);
    assert!(tested.contains("Succeeded"), "{tested}");

    let made = cluster.under_new_connections(to, || {
        helm(&["upgrade", RELEASE[0], &chart, "--set=podAnnotations.again=yes", "--wait", "--timeout=300s"]);
        helm(&["uninstall", RELEASE[0], "--wait"]);
        eventually("the agents are gone", || cluster.pod_uids(LABEL) == [String::new()].into());
    });
    assert!(made > 20, "{made} connections say nothing");
    let left =
        cluster.plane.kubectl(&["get", "all,serviceaccounts,clusterrolebindings", "-A", "-l", LABEL], "");
    assert_eq!(left.unwrap(), "");
    for node in cluster.lab.nodes() {
        clean(node);
    }
    eventually("nobody serves", || cluster.outside().tcp(to[1]).is_err());
}
