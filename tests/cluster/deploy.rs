//! What a cluster needs, as `deploy/` has it: applied by `kubectl` to a real API server, made into pods by the DaemonSet controller,
//! run by `bwrap` from the image, with what the pods ask for and no more.

use crate::shared::{Cluster, PORT};
use crate::world::{eventually, metric};
use dataplane_common::node::Node as Settings;
use dataplane_common::tables::Nodes;
use dataplane_tests::controlplane::{API_SERVER, target_folder};
use dataplane_tests::lab::{Node, Process, at, portolan};
use dataplane_user::kernel::maps::Map;
use dataplane_user::kernel::pins::Pins;
use std::sync::Arc;
use std::time::Duration;

const LABEL: &str = "app.kubernetes.io/name=portolan";

fn file(name: &str) -> String {
    format!("{}/../deploy/{name}", env!("CARGO_MANIFEST_DIR"))
}

/// A cluster whose kubelet knows the image that `cargo xtask image` wrote.
fn raise() -> Cluster {
    let cluster = Cluster::without_agents();
    let archive = target_folder().unwrap().join("image/portolan.tar");
    cluster.plane.load_image(&archive).unwrap();
    cluster
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

/// Whether the programs of a node leave connections to another proxy.
fn takes_over(node: &Node) -> bool {
    let nodes = Map::<Nodes>::open(&Pins::new(&node.bpffs().join("portolan")).maps()).unwrap();
    nodes.get(&0).unwrap().unwrap().has(Settings::TAKES_OVER)
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
    let cluster = raise();
    install(&cluster);

    cluster.web("installed", 2, 30_111);
    let to = [at(cluster.cluster_ip("installed"), PORT), at(cluster.lab.node(0).address(), 30_111)];
    cluster.wait_until_served(to);
    for node in cluster.lab.nodes() {
        eventually("every node has the Service", || services(node).contains("installed"));
    }

    let before = cluster.pod_uids(LABEL);
    assert_eq!(before.len(), 3);
    let made = cluster.under_new_connections(to, || {
        kubectl(&cluster, &["rollout", "restart", "daemonset", "portolan"]);
        wait_for(&cluster, "portolan");
    });
    assert!(made > 20, "{made} connections say nothing");
    let after = cluster.pod_uids(LABEL);
    assert!(after.len() == 3 && before.is_disjoint(&after), "all pods were replaced: {before:?}, {after:?}");

    let made = cluster.under_new_connections(to, || {
        kubectl(&cluster, &["delete", "-f", &file("portolan.yaml")]);
        eventually("the agents are gone", || cluster.pod_uids(LABEL) == [String::new()].into());
        std::thread::sleep(Duration::from_secs(1));
    });
    assert!(made > 20, "{made} connections say nothing");

    kubectl(&cluster, &["apply", "-f", &file("cleanup.yaml")]);
    wait_for(&cluster, "portolan-cleanup");
    // The kernel lets go of a program a moment after its pin.
    eventually("nobody serves", || {
        cluster.shell().tcp(to[0]).is_err() && cluster.outside().tcp(to[1]).is_err()
    });
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

/// C5: the rules that kube-proxy leaves behind serve until the programs come before them, and go on with the connections that
/// they have. Then they are not missed.
#[test]
fn a_cluster_goes_over_from_kube_proxy_and_no_connection_fails() {
    let cluster = raise();
    let on_every_node = |arguments: &[&str]| {
        let start = |node: &Arc<Node>| {
            let mut command = cluster.plane.kube_proxy(node, "nftables").unwrap();
            command.args(arguments);
            Process::start(&cluster.lab.logs(), &format!("kube-proxy-{}", node.name()), command).unwrap()
        };
        cluster.lab.nodes().iter().map(start).collect::<Vec<_>>()
    };
    for node in cluster.lab.nodes() {
        node.place().sysctl("net/netfilter/nf_conntrack_tcp_timeout_time_wait", "1").unwrap();
    }
    let proxies = on_every_node(&[]);
    cluster.web("moved", 2, 30_112);
    let to = [at(cluster.cluster_ip("moved"), PORT), at(cluster.lab.node(0).address(), 30_112)];
    cluster.wait_until_served(to);
    let clients = [cluster.shell(), cluster.outside()].map(|client| client.timeout(Duration::from_secs(20)));
    let calls = clients.iter().zip(to);
    let mut old: Vec<_> = calls.flat_map(|(client, to)| client.connect_many(to, 10).unwrap()).collect();
    let mut answers = || -> Vec<_> { old.iter_mut().map(|stream| stream.ask().unwrap().pod).collect() };
    let before = answers();
    let made = cluster.under_new_connections(to, || {
        for proxy in &proxies {
            proxy.terminate(Duration::from_secs(20)).unwrap();
        }
        install(&cluster);
        for node in cluster.lab.nodes() {
            eventually("every node has the Service", || services(node).contains("moved"));
        }
        for _ in 0..5 {
            assert_eq!(answers(), before);
            std::thread::sleep(Duration::from_secs(1));
        }
    });
    assert!(made > 20, "{made} connections say nothing");
    for node in [cluster.lab.node(0), cluster.lab.node(2)] {
        assert!(takes_over(node), "connections are left to the rules");
        assert_eq!(metric(node, "portolan_taking_over "), Some(1.0));
    }

    drop(old);
    let made = cluster.under_new_connections(to, || {
        for node in cluster.lab.nodes() {
            eventually("the last of the rules' connections has ended", || {
                metric(node, "portolan_taking_over ") == Some(0.0)
            });
            assert!(!takes_over(node));
        }
        for cleanup in on_every_node(&["--cleanup"]) {
            let status = cleanup.wait(Duration::from_secs(20)).unwrap();
            assert!(status.success(), "{status}\n{}", cleanup.log());
        }
        for node in cluster.lab.nodes() {
            assert_eq!(node.place().run("nft", &["list", "tables"]).unwrap(), "", "{}", node.name());
        }
        std::thread::sleep(Duration::from_millis(500));
    });
    assert!(made > 20, "{made} connections say nothing");
}
