//! What the tour has in the cluster: a web server behind Services, and pods that ask.

use super::LAB_IMAGE;
use serde_json::{Value, json};

/// The namespace of all of it.
pub(super) const NAMESPACE: &str = "portolan-tour";
/// The pods of the Services.
pub(super) const PODS: [&str; 3] = ["web-0", "web-1", "web-2"];
/// The port of the Services.
pub(super) const PORT: u16 = 80;
/// The port of the pods.
const POD_PORT: u16 = 8080;
/// The node ports of the Service `web`, and of `web-local` with externalTrafficPolicy Local.
pub(super) const NODE_PORT: u16 = 30_002;
pub(super) const LOCAL_PORT: u16 = 30_003;
/// The pod that asks, on the control plane, where no web server runs.
pub(super) const SHELL: &str = "shell";
/// The DaemonSet of pods in the network of their node, which ask as a node does.
pub(super) const NODES: &str = "nodes";

/// All objects, in the order in which they are made.
pub(super) fn all(control_plane: &str) -> Vec<Value> {
    vec![
        json!({ "apiVersion": "v1", "kind": "Namespace", "metadata": { "name": NAMESPACE } }),
        stateful_set(),
        service("web", NODE_PORT, "Cluster"),
        service("web-local", LOCAL_PORT, "Local"),
        shell(control_plane),
        on_nodes(),
    ]
}

fn field(path: &str) -> Value {
    json!({ "fieldRef": { "fieldPath": path } })
}

fn stateful_set() -> Value {
    let container = json!({
        "name": "web", "image": LAB_IMAGE, "imagePullPolicy": "Never",
        "args": ["serve", "--pod=$(POD)", "--node=$(NODE)", format!("--tcp={POD_PORT}"), format!("--udp={POD_PORT}"), "--drain=5"],
        "env": [{ "name": "POD", "valueFrom": field("metadata.name") }, { "name": "NODE", "valueFrom": field("spec.nodeName") }],
        "readinessProbe": { "httpGet": { "path": "/", "port": POD_PORT }, "periodSeconds": 1 },
    });
    // They are not all on one node, and a control plane that takes no pods has none.
    let spread = json!([{
        "maxSkew": 1, "nodeTaintsPolicy": "Honor", "topologyKey": "kubernetes.io/hostname", "whenUnsatisfiable": "DoNotSchedule",
        "labelSelector": { "matchLabels": { "app": "web" } },
    }]);
    json!({
        "apiVersion": "apps/v1", "kind": "StatefulSet", "metadata": { "name": "web", "namespace": NAMESPACE },
        "spec": {
            "replicas": PODS.len(), "serviceName": "web-pods", "podManagementPolicy": "Parallel",
            "selector": { "matchLabels": { "app": "web" } },
            "template": {
                "metadata": { "labels": { "app": "web" } },
                "spec": { "containers": [container], "topologySpreadConstraints": spread, "terminationGracePeriodSeconds": 15 },
            },
        },
    })
}

fn service(name: &str, node_port: u16, policy: &str) -> Value {
    let port = |protocol: &str| json!({ "name": protocol.to_lowercase(), "protocol": protocol, "port": PORT, "targetPort": POD_PORT, "nodePort": node_port });
    json!({
        "apiVersion": "v1", "kind": "Service", "metadata": { "name": name, "namespace": NAMESPACE },
        "spec": {
            "type": "NodePort", "ipFamilyPolicy": "PreferDualStack", "externalTrafficPolicy": policy, "selector": { "app": "web" },
            "ports": [port("TCP"), port("UDP")],
        },
    })
}

/// It serves nothing, and is there to be asked from.
fn idle() -> Value {
    json!({ "name": "idle", "image": LAB_IMAGE, "imagePullPolicy": "Never", "args": ["serve", "--pod=idle", "--node=any"] })
}

fn shell(node: &str) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": { "name": SHELL, "namespace": NAMESPACE, "labels": { "app": SHELL } },
        "spec": {
            "nodeName": node, "containers": [idle()], "tolerations": [{ "operator": "Exists" }],
            "terminationGracePeriodSeconds": 2,
        },
    })
}

fn on_nodes() -> Value {
    json!({
        "apiVersion": "apps/v1", "kind": "DaemonSet", "metadata": { "name": NODES, "namespace": NAMESPACE },
        "spec": {
            "selector": { "matchLabels": { "app": NODES } },
            "template": {
                "metadata": { "labels": { "app": NODES } },
                "spec": {
                    "hostNetwork": true, "dnsPolicy": "ClusterFirstWithHostNet", "containers": [idle()],
                    "tolerations": [{ "operator": "Exists" }], "terminationGracePeriodSeconds": 2,
                },
            },
        },
    })
}
