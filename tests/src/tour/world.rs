//! The tour's Services and pods, made either of manifests or by a real control plane. The steps cannot tell which.

use crate::controlplane::ControlPlane;
use crate::lab::{AgentOptions, Lab, Pod, PodOptions, Service, Source};
use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use std::net::Ipv4Addr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// ClusterIP of the Service `web`.
pub(crate) const WEB: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 80);
/// ClusterIP of `web-nodeport` (externalTrafficPolicy Cluster) and its node port.
pub(crate) const NODE_PORT_IP: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 81);
pub(crate) const NODE_PORT: u16 = 30002;
/// ClusterIP of `web-local` (externalTrafficPolicy Local) and its node port.
pub(crate) const LOCAL_IP: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 82);
pub(crate) const LOCAL_PORT: u16 = 30003;
/// ClusterIPs of `chance` and `least`, which have the algorithms random and least-connections, and the port of their pods, of which one
/// takes its time.
pub(crate) const CHANCE: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 83);
pub(crate) const LEAST: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 84);
pub(crate) const SERIAL_PORT: u16 = 8090;
/// ClusterIP of `tries`, its node port, and the port at which one of its pods serves, one refuses and one is silent.
pub(crate) const TRIES: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 85);
pub(crate) const TRIES_NODE_PORT: u16 = 30_004;
pub(crate) const TRIES_PORT: u16 = 8091;
/// The port of the Services, and the port on which pods serve TCP and UDP.
pub(crate) const PORT: u16 = 80;
pub(crate) const POD_PORT: u16 = 8080;
/// The replicas of the web server.
pub(crate) const PODS: [&str; 3] = ["web-0", "web-1", "web-2"];
/// The pod that goes away: a StatefulSet that is scaled down loses its last.
pub(crate) const LEAVING: &str = "web-2";
/// The pod that asks. It runs on the node without a web server.
pub(crate) const SHELL: &str = "shell";
/// The node (from 0) that gets no web server, so that externalTrafficPolicy makes a difference.
pub(crate) const BARE_NODE: usize = 2;
/// The annotation that names a Service's algorithm.
const ALGORITHM: &str = "service.portolan.dev/lb-algorithm";
/// The one that says how often a connection is given to another endpoint. A Service that has it goes by packet, whatever the agent's flags.
const RETRY: &str = "service.portolan.dev/retry";
/// How long the control plane may take.
const PATIENCE: Duration = Duration::from_secs(60);

/// Where the objects come from.
pub(crate) enum World {
    Manifests(Mutex<Vec<Service>>),
    Cluster(Box<ControlPlane>),
}

fn services() -> [Service; 6] {
    [
        Service::new("web", WEB).tcp(PORT, POD_PORT).udp(PORT, POD_PORT),
        Service::new("web-nodeport", NODE_PORT_IP)
            .tcp_node_port(PORT, POD_PORT, NODE_PORT)
            .udp_node_port(PORT, POD_PORT, NODE_PORT),
        Service::new("web-local", LOCAL_IP)
            .tcp_node_port(PORT, POD_PORT, LOCAL_PORT)
            .udp_node_port(PORT, POD_PORT, LOCAL_PORT)
            .external_local(),
        Service::new("chance", CHANCE).tcp(PORT, SERIAL_PORT).annotation(ALGORITHM, "random"),
        Service::new("least", LEAST).tcp(PORT, SERIAL_PORT).annotation(ALGORITHM, "least-connections"),
        Service::new("tries", TRIES).tcp_node_port(PORT, TRIES_PORT, TRIES_NODE_PORT).annotation(RETRY, "3"),
    ]
}

/// The same as a user of Kubernetes would write it.
fn stateful_set(drain: u8) -> Value {
    let ports = json!([
        { "name": "tcp", "containerPort": POD_PORT, "protocol": "TCP" },
        { "name": "udp", "containerPort": POD_PORT, "protocol": "UDP" },
    ]);
    json!({
        "apiVersion": "apps/v1", "kind": "StatefulSet", "metadata": { "name": "web" },
        "spec": {
            "replicas": PODS.len(), "serviceName": "nginx", "podManagementPolicy": "Parallel",
            "selector": { "matchLabels": { "app": "web" } },
            "template": {
                "metadata": {
                    "labels": { "app": "web" },
                    "annotations": { "lab.portolan.dev/drain-seconds": drain.to_string() },
                },
                "spec": { "containers": [{ "name": "web", "image": "lab/web", "ports": ports }] },
            },
        },
    })
}

/// The headless Service that gives the StatefulSet's pods their names.
fn headless() -> Value {
    json!({
        "apiVersion": "v1", "kind": "Service", "metadata": { "name": "nginx" },
        "spec": { "clusterIP": "None", "selector": { "app": "web" }, "ports": [{ "name": "http", "port": POD_PORT }] },
    })
}

fn external_name() -> Value {
    json!({
        "apiVersion": "v1", "kind": "Service", "metadata": { "name": "elsewhere" },
        "spec": { "type": "ExternalName", "externalName": crate::controlplane::dns::OUTSIDE_NAME },
    })
}

fn shell(node: &str) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Pod", "metadata": { "name": SHELL },
        "spec": { "nodeName": node, "containers": [{ "name": "shell", "image": "lab/shell" }] },
    })
}

impl World {
    /// Makes pods and Services from manifests. A pod serves for `drain` seconds after SIGTERM.
    pub(crate) fn from_manifests(lab: &Lab, drain: u8) -> Result<Self> {
        let options = PodOptions::default().drain(Duration::from_secs(drain.into()));
        lab.add_pod(SHELL, BARE_NODE, &PodOptions::client())?;
        let pods = PODS.iter().enumerate();
        let pods = pods.map(|(number, name)| lab.add_pod(name, number % BARE_NODE, &options));
        let pods = pods.collect::<Result<Vec<_>>>()?;
        let services =
            services().map(|service| service.endpoints(pods.iter().map(|pod| pod.endpoint()))).to_vec();
        services.iter().try_for_each(|service| lab.manifests().apply(service))?;
        Ok(Self::Manifests(Mutex::new(services)))
    }

    /// Starts a control plane and has it make pods and Services.
    pub(crate) fn from_cluster(lab: &Lab, drain: u8, tell: &dyn Fn(&str)) -> Result<Self> {
        let plane = ControlPlane::start_telling(lab, tell)?;
        let bare = lab.node(BARE_NODE).name();
        tell(&format!("kubectl cordon {bare}: so that one node has no web server"));
        plane.kubectl(&["cordon", bare], "")?;
        tell("kubectl apply: a StatefulSet `web` of 3 replicas, eight Services, a pod `shell`");
        let mut objects = vec![stateful_set(drain), shell(bare), headless(), external_name()];
        for service in services() {
            let mut service = service.service();
            service["spec"]["selector"] = json!({ "app": "web" });
            objects.push(service);
        }
        plane.kubectl(&["apply", "-f", "-"], &crate::lab::manifests::documents(&objects))?;
        for service in services() {
            plane.wait_for_endpoints(service.name(), PODS.len(), PATIENCE)?;
        }
        wait(|| lab.pod(SHELL).is_some(), "the pod `shell` is there")?;
        Ok(Self::Cluster(Box::new(plane)))
    }

    /// How agents are started.
    pub(crate) fn agents(&self) -> AgentOptions {
        match self {
            Self::Manifests(_) => AgentOptions::default(),
            Self::Cluster(plane) => {
                AgentOptions::default().source(Source::Kubeconfig(plane.agent_kubeconfig()))
            }
        }
    }

    /// A pod begins to drain: its endpoint is terminating and still serving. Says how that was done.
    pub(crate) fn begin_leaving(&self, lab: &Lab) -> Result<String> {
        match self {
            Self::Manifests(services) => {
                let mut services = services.lock().unwrap_or_else(PoisonError::into_inner);
                for service in services.iter_mut() {
                    service.change(LEAVING, |endpoint| endpoint.set_terminating(true));
                    lab.manifests().apply(service)?;
                }
                pod(lab, LEAVING)?.terminate();
                Ok(format!("{LEAVING} gets SIGTERM and its endpoints become `terminating`"))
            }
            Self::Cluster(plane) => {
                let replicas = format!("--replicas={}", PODS.len() - 1);
                plane.kubectl(&["scale", "statefulset", "web", &replicas], "")?;
                Ok(format!("kubectl scale statefulset web {replicas}: {LEAVING} is to go"))
            }
        }
    }

    /// Waits until the pod is gone with its endpoints.
    pub(crate) fn finish_leaving(&self, lab: &Lab) -> Result<()> {
        match self {
            Self::Manifests(services) => {
                if let Some(server) = pod(lab, LEAVING)?.server() {
                    server.wait(PATIENCE)?;
                }
                let mut services = services.lock().unwrap_or_else(PoisonError::into_inner);
                for service in services.iter_mut() {
                    service.endpoints_mut().retain(|endpoint| endpoint.pod != LEAVING);
                    lab.manifests().apply(service)?;
                }
                let node = lab.nodes().iter().find(|node| node.pod(LEAVING).is_some());
                node.context("no node has it")?.remove_pod(LEAVING)
            }
            Self::Cluster(_) => wait(|| lab.pod(LEAVING).is_none(), &format!("{LEAVING} is gone")),
        }
    }

    /// What a person may want to know about where the objects are.
    pub(crate) fn hints(&self, lab: &Lab) -> Vec<String> {
        match self {
            Self::Manifests(_) => {
                vec![format!("the Services are YAML, watched live: {}", lab.manifests().folder().display())]
            }
            Self::Cluster(plane) => vec![
                format!("export KUBECONFIG={}", plane.admin_kubeconfig().display()),
                format!("{} get pods,services,endpointslices -o wide", plane.kubectl_program().display()),
            ],
        }
    }
}

/// A pod that must be there.
pub(crate) fn pod(lab: &Lab, name: &str) -> Result<Arc<Pod>> {
    lab.pod(name).with_context(|| format!("there is no pod {name}"))
}

/// Waits for a condition.
pub(crate) fn wait(condition: impl Fn() -> bool, what: &str) -> Result<()> {
    let end = Instant::now() + PATIENCE;
    while !condition() {
        ensure!(Instant::now() < end, "after {PATIENCE:?} it is not so that {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}
