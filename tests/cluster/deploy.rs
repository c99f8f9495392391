//! What a cluster needs, as `deploy/` has it: applied by `kubectl` to a real API server, made into pods by the DaemonSet controller,
//! run by `crun` from the image, with what the pods ask for and no more.

use crate::shared::{Cluster, PORT};
use crate::world::eventually;
use dataplane_tests::controlplane::API_SERVER;
use dataplane_tests::lab::{Node, at, portolan};
use std::path::PathBuf;

const LABEL: &str = "app.kubernetes.io/name=portolan";

fn file(name: &str) -> String {
    format!("{}/../deploy/{name}", env!("CARGO_MANIFEST_DIR"))
}

/// Where `cargo xtask image` writes: below the target folder that this program lies in.
fn archive() -> PathBuf {
    let running = std::env::current_exe().unwrap();
    let target = running.ancestors().find(|folder| folder.join("CACHEDIR.TAG").is_file()).unwrap();
    target.join("image/portolan.tar")
}

fn kubectl(cluster: &Cluster, arguments: &[&str]) -> String {
    cluster.plane.kubectl(&[&["--namespace=kube-system"], arguments].concat(), "").unwrap()
}

/// Waits until each node has a pod of the DaemonSet that is ready.
fn wait_for(cluster: &Cluster, daemon_set: &str) {
    kubectl(cluster, &["rollout", "status", "daemonset", daemon_set, "--timeout=90s"]);
}

/// What `portolan services` says on a node, where it is as in its pods.
fn services(node: &Node) -> String {
    let [pins, run, program] = [node.bpffs(), node.run_folder(), portolan().unwrap()];
    let [pins, run, program] = [&pins, &run, &program].map(|path| path.to_str().unwrap());
    let node_sees = [
        "--dev-bind",
        "/",
        "/",
        "--bind",
        pins,
        "/sys/fs/bpf",
        "--tmpfs",
        "/run",
        "--bind",
        run,
        "/run/portolan",
    ];
    node.place().run("bwrap", &[node_sees.as_slice(), &[program, "services"]].concat()).unwrap()
}

/// Follows the head of `deploy/portolan.yaml`.
fn install(cluster: &Cluster) {
    let (host, port) = API_SERVER;
    let [host, port] = [
        format!("--from-literal=KUBERNETES_SERVICE_HOST={host}"),
        format!("--from-literal=KUBERNETES_SERVICE_PORT={port}"),
    ];
    kubectl(cluster, &["create", "configmap", "portolan", &host, &port]);
    kubectl(cluster, &["apply", "-f", &file("portolan.yaml")]);
    wait_for(cluster, "portolan");
}

/// C3: installed, updated, deleted: none of that costs a connection. Then nothing is left.
#[test]
fn a_daemon_set_serves_a_cluster_until_it_is_cleaned_up() {
    let cluster = Cluster::without_agents();
    cluster.plane.load_image(&archive()).unwrap();
    install(&cluster);

    cluster.web("installed", 2, 30_111);
    let to = [at(cluster.cluster_ip("installed"), PORT), at(cluster.lab.node(0).address(), 30_111)];
    eventually("the ClusterIP answers", || cluster.shell().tcp(to[0]).is_ok());
    eventually("the node port answers", || cluster.outside().tcp(to[1]).is_ok());
    for node in cluster.lab.nodes() {
        eventually("every node has the Service", || services(node).contains("installed"));
    }

    let before = cluster.pod_uids(LABEL);
    assert_eq!(before.len(), 3);
    let made = cluster.under_new_connections(to, || {
        kubectl(&cluster, &["rollout", "restart", "daemonset", "portolan"]);
        wait_for(&cluster, "portolan");
    });
    assert!(made > 100, "{made} connections say nothing");
    let after = cluster.pod_uids(LABEL);
    assert!(after.len() == 3 && before.is_disjoint(&after), "all pods were replaced: {before:?}, {after:?}");

    let made = cluster.under_new_connections(to, || {
        kubectl(&cluster, &["delete", "-f", &file("portolan.yaml")]);
        eventually("the agents are gone", || cluster.pod_uids(LABEL) == [String::new()].into());
    });
    assert!(made > 100, "{made} connections say nothing");

    kubectl(&cluster, &["apply", "-f", &file("cleanup.yaml")]);
    wait_for(&cluster, "portolan-cleanup");
    assert!(cluster.shell().tcp(to[0]).is_err() && cluster.outside().tcp(to[1]).is_err(), "nobody serves");
    for node in cluster.lab.nodes() {
        for folder in [node.bpffs(), node.run_folder()] {
            assert_eq!(
                std::fs::read_dir(&folder).unwrap().count(),
                0,
                "{} has something left",
                folder.display()
            );
        }
    }
}
