//! The commands of the documentation, run as they stand there, against a real API server.

use crate::deploy::{LABEL, raise};
use crate::shared::{Cluster, PORT};
use crate::world::eventually;
use dataplane_tests::lab::at;
use dataplane_tests::recipes;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::Command;

/// The commands below a heading, but those that run something in a container that is there, which the lab's kubelet cannot.
fn commands(page: &str, below: &str) -> String {
    let lines = recipes::commands(page, below);
    lines.lines().filter(|line| !line.starts_with("kubectl exec")).map(|line| format!("{line}\n")).collect()
}

/// Runs them in a shell, where `kubectl` and `helm` are the cluster's.
fn run(cluster: &Cluster, script: &str) {
    let folder = cluster.lab.folder().join("recipes");
    if fs::create_dir(&folder).is_ok() {
        symlink(cluster.plane.kubectl_program(), folder.join("kubectl")).unwrap();
        symlink(cluster.plane.helm_program().unwrap(), folder.join("helm")).unwrap();
    }
    let path = format!("{}:{}", folder.display(), std::env::var("PATH").unwrap());
    let output = Command::new("bash")
        .args(["-exc", script])
        .current_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join(".."))
        .env("PATH", path)
        .env("KUBECONFIG", cluster.plane.admin_kubeconfig())
        .env("HELM_CACHE_HOME", folder.join("cache"))
        .env("HELM_CONFIG_HOME", folder.join("config"))
        .env("HELM_DATA_HOME", folder.join("data"))
        .output()
        .unwrap();
    let [out, err] = [output.stdout, output.stderr].map(|text| String::from_utf8_lossy(&text).into_owned());
    assert!(output.status.success(), "{script}\n{out}{err}");
}

/// The nodes that have a pod with a label.
fn nodes_with(cluster: &Cluster, label: &str) -> Vec<String> {
    let path = "jsonpath={.items[*].spec.nodeName}";
    let text = cluster.plane.kubectl(&["get", "pods", "-A", "-l", label, "-o", path], "").unwrap();
    let mut nodes: Vec<_> = text.split_whitespace().map(str::to_owned).collect();
    nodes.sort();
    nodes
}

/// A DaemonSet as kubeadm has it, whose pods do nothing here.
const KUBE_PROXY: &str = r#"{"apiVersion":"apps/v1","kind":"DaemonSet","metadata":{"name":"kube-proxy","namespace":"kube-system"},
    "spec":{"selector":{"matchLabels":{"k8s-app":"kube-proxy"}},"template":{"metadata":{"labels":{"k8s-app":"kube-proxy"}},
    "spec":{"hostNetwork":true,"tolerations":[{"operator":"Exists"}],"terminationGracePeriodSeconds":0,"containers":[{"name":
    "kube-proxy","image":"nothing"}]}}}}"#;

/// C3, C5: one node goes over and comes back, then all go over for good, and all is taken away.
#[test]
fn one_node_goes_over_first_and_back_as_the_documentation_says() {
    let cluster = raise();
    cluster.plane.kubectl(&["apply", "-f", "-"], KUBE_PROXY).unwrap();
    let proxies = || nodes_with(&cluster, "k8s-app=kube-proxy");
    let agents = || nodes_with(&cluster, LABEL);
    eventually("kube-proxy is everywhere", || proxies() == ["node-1", "node-2", "node-3"]);

    let one = commands("take-over.md", "## One node first").replace("NODE", "node-1");
    run(&cluster, &one);
    eventually("kube-proxy left the node", || proxies() == ["node-2", "node-3"]);
    assert_eq!(agents(), ["node-1"]);
    cluster.web("recipe", 2, 30_118);
    let node_port = at(cluster.lab.node(0).address(), 30_118);
    eventually("the node serves", || cluster.outside().tcp(node_port).is_ok());

    run(&cluster, &commands("take-over.md", "Back:").replace("NODE", "node-1"));
    eventually("kube-proxy is back", || proxies() == ["node-1", "node-2", "node-3"]);
    assert!(agents().is_empty());
    eventually("the node serves no more", || cluster.outside().tcp(node_port).is_err());

    run(&cluster, &commands("take-over.md", "## All nodes, so that it can be taken back"));
    eventually("kube-proxy is nowhere", || proxies().is_empty());
    assert_eq!(agents(), ["node-1", "node-2", "node-3"]);
    cluster.wait_until_served([at(cluster.cluster_ip("recipe"), PORT), node_port]);
    let config_map = ["create", "configmap", "kube-proxy", "--namespace=kube-system"];
    cluster.plane.kubectl(&config_map, "").unwrap();
    run(&cluster, &commands("take-over.md", "## For good"));

    run(&cluster, &commands("upgrade.md", "# Upgrade").replace("NEW", env!("CARGO_PKG_VERSION")));
    run(&cluster, "helm uninstall portolan --namespace kube-system --wait");
    run(&cluster, &recipes::commands_from("uninstall.md", "kubectl apply -f deploy/cleanup.yaml"));
    eventually("nobody serves", || cluster.outside().tcp(node_port).is_err());
    for node in cluster.lab.nodes() {
        for folder in [node.bpffs(), node.run_folder(), node.state_folder()] {
            assert_eq!(fs::read_dir(&folder).unwrap().count(), 0, "{} has something left", folder.display());
        }
    }
}
