//! One control plane with agents on three nodes, shared by the tests that run at the same time and removed with the last.
//!
//! Tests share no object: each makes its own by a name of its own.

use crate::world::eventually;
use dataplane_tests::controlplane::ControlPlane;
use dataplane_tests::lab::{self, AgentOptions, Client, Lab, Options, PodOptions, Source};
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

/// The port of Services, and that of their pods.
pub(crate) const PORT: u16 = 80;
pub(crate) const POD_PORT: u16 = 8080;
/// How long controllers, kubelet and agents may take together.
pub(crate) const PATIENCE: Duration = Duration::from_secs(180);

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
        let cluster = Self::without_agents();
        let source = Source::Kubeconfig(cluster.plane.agent_kubeconfig());
        cluster.lab.start_agents(&AgentOptions::default().source(source)).unwrap();
        cluster
    }

    /// A new one whose nodes have no agents.
    pub(crate) fn without_agents() -> Self {
        Self::without_agents_on(&Options::default())
    }

    /// The same, in a lab of three nodes or more.
    pub(crate) fn without_agents_on(options: &Options) -> Self {
        let lab = options.clone().create().unwrap();
        let plane = ControlPlane::start(&lab).unwrap();
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

    /// The client outside.
    pub(crate) fn outside(&self) -> Client {
        Client::at(self.lab.client())
    }

    /// Waits until the agents have a Service: the shell's node its ClusterIP, another node its node port.
    pub(crate) fn wait_until_served(&self, [cluster_ip, node_port]: [SocketAddr; 2]) {
        eventually("the ClusterIP answers", || self.shell().tcp(cluster_ip).is_ok());
        eventually("the node port answers", || self.outside().tcp(node_port).is_ok());
    }

    /// Makes new connections, from the shell to a ClusterIP and from outside to a node port, while something is done. None may
    /// fail; says how many there were.
    pub(crate) fn under_new_connections(&self, to: [SocketAddr; 2], disturb: impl FnOnce()) -> usize {
        let calls = [(self.shell(), to[0]), (self.outside(), to[1])];
        lab::under_new_connections(&calls, disturb).unwrap()
    }

    /// The uids of the pods with a label, of all namespaces.
    pub(crate) fn pod_uids(&self, label: &str) -> BTreeSet<String> {
        let arguments = ["get", "pods", "-A", "-l", label, "-o", "jsonpath={.items[*].metadata.uid}"];
        self.plane.kubectl(&arguments, "").unwrap().split(' ').map(str::to_owned).collect()
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
