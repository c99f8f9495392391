//! The control plane by itself, without any agent.

use dataplane_tests::controlplane::ControlPlane;
use dataplane_tests::lab::{Client, Options, at};
use serde_json::{Value, json};
use std::time::{Duration, Instant};

/// How long pods serve on after SIGTERM: longer than a busy machine takes to ask what their slice says of them.
const DRAIN: Duration = Duration::from_secs(8);
/// How long controllers and kubelet may take.
const PATIENCE: Duration = Duration::from_secs(180);

fn web(replicas: u32) -> [Value; 2] {
    [
        json!({
            "apiVersion": "v1", "kind": "Service", "metadata": { "name": "web" },
            "spec": { "selector": { "app": "web" }, "type": "NodePort",
                      "ports": [{ "name": "http", "port": 80, "targetPort": 8080, "nodePort": 30002, "protocol": "TCP" }] },
        }),
        json!({
            "apiVersion": "apps/v1", "kind": "StatefulSet", "metadata": { "name": "web" },
            "spec": {
                "replicas": replicas, "serviceName": "web", "podManagementPolicy": "Parallel",
                "selector": { "matchLabels": { "app": "web" } },
                "template": {
                    "metadata": { "labels": { "app": "web" }, "annotations": { "lab.portolan.dev/drain-seconds": DRAIN.as_secs().to_string() } },
                    "spec": { "containers": [{ "name": "web", "image": "lab", "ports": [{ "containerPort": 8080 }] }] },
                },
            },
        }),
    ]
}

/// Pods are spread, run, report, drain and go; the slices say so; a node's token reads what an agent needs and no more.
#[test]
fn a_stateful_set_lives_and_drains() {
    let lab = Options::default().create().unwrap();
    let cluster = ControlPlane::start_telling(&lab, &|step| println!("{step}")).unwrap();
    cluster.apply(&web(3)).unwrap();
    cluster.wait_for_endpoints("web", 3, PATIENCE).unwrap();
    for number in 0..3 {
        let pod = lab.pod(&format!("web-{number}")).unwrap();
        let answer = Client::at(lab.node(0).place()).tcp(at(pod.address(), 8080)).unwrap();
        assert_eq!(answer.pod, pod.name());
    }
    assert!(lab.nodes().iter().all(|node| (0..3).any(|n| node.pod(&format!("web-{n}")).is_some())));

    let kubectl = cluster.kubectl(&["get", "pods", "-o", "wide"], "").unwrap();
    assert_eq!(kubectl.matches("Running").count(), 3, "{kubectl}");
    let begun = Instant::now();
    cluster.kubectl(&["scale", "statefulset", "web", "--replicas=2"], "").unwrap();
    cluster.wait_for_endpoints("web", 2, PATIENCE).unwrap();
    let slices = cluster.kubectl(&["get", "endpointslices", "-o", "json"], "").unwrap();
    assert!(
        slices.replace(['\n', ' '], "").contains("\"ready\":false,\"serving\":true,\"terminating\":true"),
        "{slices}"
    );
    while lab.pod("web-2").is_some() {
        assert!(begun.elapsed() < PATIENCE);
        std::thread::sleep(Duration::from_millis(50));
    }
    assert!(begun.elapsed() > DRAIN, "it drained");

    cluster.stop_api_server();
    assert!(cluster.kubectl(&["get", "pods"], "").is_err());
    cluster.start_api_server().unwrap();
    cluster.kubectl(&["scale", "statefulset", "web", "--replicas=3"], "").unwrap();
    cluster.wait_for_endpoints("web", 3, PATIENCE).unwrap();

    let may = |verb: &str, resource: &str| {
        let kubectl = lab
            .node(1)
            .place()
            .command(cluster.kubectl_program())
            .unwrap()
            .args(["--kubeconfig"])
            .arg(cluster.agent_kubeconfig())
            .args(["auth", "can-i", verb, resource, "-A"])
            .output()
            .unwrap();
        String::from_utf8_lossy(&kubectl.stdout).trim() == "yes"
    };
    for resource in ["services", "endpointslices.discovery.k8s.io", "nodes", "servicecidrs.networking.k8s.io"]
    {
        assert!(may("watch", resource), "{resource}");
    }
    assert!(!may("list", "pods"));
}
