//! Agents that read a real API server: what its controllers do reaches packets, and its absence does not.

use crate::shared::{Cluster, PATIENCE, PORT};
use crate::world::eventually;
use dataplane_tests::lab::{Failure, at};
use std::time::Duration;

/// C2, T5: a rollout replaces every pod, one after the other, and no connection fails.
#[test]
fn a_rollout_fails_no_connection() {
    let cluster = Cluster::shared();
    cluster.web("rolled", 3, 30_101);
    let to = [at(cluster.cluster_ip("rolled"), PORT), at(cluster.lab.node(0).address(), 30_101)];
    cluster.wait_until_served(to);
    let uids = || cluster.pod_uids("app=rolled");
    let before = uids();
    let made = cluster.under_new_connections(to, || {
        cluster.plane.kubectl(&["rollout", "restart", "statefulset", "rolled"], "").unwrap();
        let arguments = ["rollout", "status", "statefulset", "rolled", "--timeout=300s"];
        cluster.plane.kubectl(&arguments, "").unwrap();
    });
    assert!(made > 100, "{made} connections say nothing");
    assert!(before.is_disjoint(&uids()), "all pods were replaced");
}

/// C3: while the API server is away all goes on; when it is back, what changes arrives again.
#[test]
fn an_api_server_that_goes_and_comes_is_not_noticed() {
    // Of its own: others must not be without an API server.
    let cluster = Cluster::raise();
    cluster.web("steady", 2, 30_102);
    let to = [at(cluster.cluster_ip("steady"), PORT), at(cluster.lab.node(1).address(), 30_102)];
    cluster.wait_until_served(to);
    let made = cluster.under_new_connections(to, || {
        cluster.plane.stop_api_server();
        std::thread::sleep(Duration::from_secs(3));
        cluster.plane.start_api_server().unwrap();
    });
    assert!(made > 100, "{made} connections say nothing");
    cluster.plane.kubectl(&["scale", "statefulset", "steady", "--replicas=3"], "").unwrap();
    cluster.plane.wait_for_endpoints("steady", 3, PATIENCE).unwrap();
    eventually("the third pod answers", || {
        cluster.shell().tcp(to[0]).is_ok_and(|answer| answer.pod == "steady-2")
    });
}

/// F1, F2: a Service becomes headless and comes back, and another proxy's label comes and goes.
#[test]
fn a_service_that_is_not_ours_any_more_is_left_alone() {
    let cluster = Cluster::shared();
    cluster.web("changing", 1, 30_103);
    let node_port = at(cluster.lab.node(0).address(), 30_103);
    let kubectl = |arguments: &[&str]| cluster.plane.kubectl(arguments, "").unwrap();
    eventually("the node port answers", || cluster.outside().tcp(node_port).is_ok());
    kubectl(&["label", "service", "changing", "service.kubernetes.io/service-proxy-name=other"]);
    eventually("the node port is refused by the node itself", || {
        cluster.outside().tcp(node_port) == Err(Failure::Refused)
    });
    kubectl(&["label", "service", "changing", "service.kubernetes.io/service-proxy-name-"]);
    eventually("the node port answers again", || cluster.outside().tcp(node_port).is_ok());
    let external = r#"{"spec":{"type":"ExternalName","externalName":"example.org","selector":null,"clusterIP":null,"clusterIPs":null,"ports":null}}"#;
    kubectl(&["patch", "service", "changing", "--type=merge", "-p", external]);
    eventually("an ExternalName has no node port", || {
        cluster.outside().tcp(node_port) == Err(Failure::Refused)
    });
    let kinds = cluster.lab.node(0).portolan(&["services"]).unwrap();
    assert!(!kinds.contains("changing"), "{kinds}");
}
