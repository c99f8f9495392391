//! One control plane with agents on three nodes, shared by the tests that run at the same time and removed with the last.
//!
//! Tests share no object: each makes its own by a name of its own.

use dataplane_tests::controlplane::ControlPlane;
use dataplane_tests::lab::{AgentOptions, Client, Lab, Options, PodOptions, Source};
use serde_json::{Value, json};
use std::net::Ipv4Addr;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

/// The port of Services, and that of their pods.
pub(crate) const PORT: u16 = 80;
pub(crate) const POD_PORT: u16 = 8080;
/// How long controllers, kubelet and agents may take together.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// The cluster. The control plane ends before the lab.
pub(crate) struct Cluster {
    pub(crate) plane: ControlPlane,
    pub(crate) lab: Lab,
}

impl Cluster {
    /// The running one, or a new one.
    pub(crate) fn shared() -> Arc<Self> {
        static SHARED: Mutex<Weak<Cluster>> = Mutex::new(Weak::new());
        let mut shared = SHARED.lock().unwrap_or_else(PoisonError::into_inner);
        shared.upgrade().unwrap_or_else(|| {
            let cluster = Arc::new(Self::raise());
            *shared = Arc::downgrade(&cluster);
            cluster
        })
    }

    /// A new one.
    pub(crate) fn raise() -> Self {
        let lab = Options::default().create().unwrap();
        let plane = ControlPlane::start(&lab).unwrap();
        let source = Source::Kubeconfig(plane.agent_kubeconfig());
        lab.start_agents(&AgentOptions::default().source(source)).unwrap();
        lab.add_pod("shell", 2, &PodOptions::client()).unwrap();
        Self { plane, lab }
    }

    /// A client in a pod of the third node that belongs to no Service.
    pub(crate) fn shell(&self) -> Client {
        Client::at(self.lab.pod("shell").unwrap().place())
    }

    /// A StatefulSet and a Service of that name on the node port, with all replicas ready.
    pub(crate) fn web(&self, name: &str, replicas: usize, node_port: u16) {
        self.plane.apply(&[service(name, node_port), stateful_set(name, replicas)]).unwrap();
        self.plane.wait_for_endpoints(name, replicas, PATIENCE).unwrap();
    }

    /// The ClusterIP that the API server gave to a Service.
    pub(crate) fn cluster_ip(&self, name: &str) -> Ipv4Addr {
        self.plane
            .kubectl(&["get", "service", name, "-o", "jsonpath={.spec.clusterIP}"], "")
            .unwrap()
            .parse()
            .unwrap()
    }
}

fn service(name: &str, node_port: u16) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Service", "metadata": { "name": name },
        "spec": { "selector": { "app": name }, "type": "NodePort",
                  "ports": [{ "name": "http", "port": PORT, "targetPort": POD_PORT, "nodePort": node_port, "protocol": "TCP" }] },
    })
}

/// Pods that serve on for two seconds after SIGTERM.
fn stateful_set(name: &str, replicas: usize) -> Value {
    json!({
        "apiVersion": "apps/v1", "kind": "StatefulSet", "metadata": { "name": name },
        "spec": {
            "replicas": replicas, "serviceName": name, "podManagementPolicy": "Parallel",
            "selector": { "matchLabels": { "app": name } },
            "template": {
                "metadata": { "labels": { "app": name }, "annotations": { "lab.portolan.dev/drain-seconds": "2" } },
                "spec": { "containers": [{ "name": "web", "image": "lab", "ports": [{ "containerPort": POD_PORT }] }] },
            },
        },
    })
}
