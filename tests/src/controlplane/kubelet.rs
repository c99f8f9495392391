//! The lab's kubelet for all nodes: makes a namespace and a server of each pod that is bound to a node, reports it ready, and
//! ends it as its grace period says. It pulls no images: a pod whose image is a program of the lab's folder of images runs that,
//! and every other pod is the lab's pod server on the pod's container ports.

use super::Nodes;
use super::container::{self, HostPod, Running};
use super::dns::{ADDRESS, DOMAIN};
use super::objects::insist;
use crate::lab::{self, Addresses, Node, Place, PodOptions};
use anyhow::{Context, Result, bail};
use futures::StreamExt;
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use kube::api::{DeleteParams, Patch, PatchParams, Preconditions};
use kube::runtime::watcher::{self, Event, watcher};
use kube::{Api, Client, ResourceExt};
use serde_json::json;
use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// Annotation: seconds that the server goes on serving after SIGTERM.
pub(crate) const DRAIN: &str = "lab.portolan.dev/drain-seconds";

/// Where images are, in the control plane's folder.
pub(super) const IMAGES: &str = "images";

/// How often a readiness probe is made.
const PROBE_PERIOD: Duration = Duration::from_millis(200);
/// The grace period of a pod that has none.
const GRACE: i64 = 30;

/// What has become of a pod, by uid.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Starting,
    Running,
    Ending,
}

#[derive(Clone)]
struct Kubelet {
    client: Client,
    nodes: Arc<Nodes>,
    /// The control plane's.
    folder: PathBuf,
    stages: Arc<Mutex<BTreeMap<String, Stage>>>,
    /// The containers of pods with `hostNetwork`, by uid.
    on_hosts: Arc<Mutex<BTreeMap<String, Arc<Vec<Running>>>>>,
}

/// Runs for ever.
pub(crate) async fn run(client: Client, nodes: Nodes, folder: PathBuf) {
    let kubelet = Kubelet {
        client: client.clone(),
        nodes: Arc::new(nodes),
        folder,
        stages: Arc::default(),
        on_hosts: Arc::default(),
    };
    let mut events = std::pin::pin!(watcher(Api::<Pod>::all(client), watcher::Config::default()));
    while let Some(event) = events.next().await {
        match event {
            Ok(Event::Apply(pod) | Event::InitApply(pod)) => kubelet.changed(pod, false),
            Ok(Event::Delete(pod)) => kubelet.changed(pod, true),
            Ok(Event::Init | Event::InitDone) => {}
            // The watcher begins anew; the API server may be restarting.
            Err(_) => tokio::time::sleep(Duration::from_millis(200)).await,
        }
    }
}

impl Kubelet {
    fn node(&self, pod: &Pod) -> Option<Arc<Node>> {
        let name = pod.spec.as_ref()?.node_name.as_ref()?;
        self.nodes.iter().find(|node| node.name() == name).cloned()
    }

    /// Decides what is to be done about a pod, at most once for each stage, and has it done by a task.
    fn changed(&self, pod: Pod, gone: bool) {
        let Some(node) = self.node(&pod) else { return };
        let Some(uid) = pod.uid() else { return };
        let ending = gone || pod.metadata.deletion_timestamp.is_some();
        let mut stages = self.stages.lock().unwrap_or_else(PoisonError::into_inner);
        if gone && stages.get(&uid) == Some(&Stage::Ending) {
            // Forced: nobody waits for the grace period any more.
            let pod = node.pod(&local_name(&pod));
            tokio::task::spawn_blocking(move || pod.and_then(|pod| pod.server()).map(|server| server.kill()));
        }
        let next = match (stages.get(&uid), ending) {
            (None, false) => Stage::Starting,
            (None | Some(Stage::Running), true) => Stage::Ending,
            // A pod that is deleted while it starts is seen again when its status is written.
            (Some(Stage::Starting | Stage::Ending), _) | (Some(Stage::Running), false) => return,
        };
        stages.insert(uid.clone(), next);
        drop(stages);
        let kubelet = self.clone();
        tokio::spawn(async move {
            let result = match next {
                Stage::Starting => kubelet.start(&node, &pod, &uid).await,
                Stage::Ending | Stage::Running => kubelet.end(&node, &pod, &uid, gone).await,
            };
            if let Err(error) = result {
                eprintln!("lab kubelet: pod {}: {error:#}", pod.name_any());
            }
        });
    }

    fn set_stage(&self, uid: &str, stage: Option<Stage>) {
        let mut stages = self.stages.lock().unwrap_or_else(PoisonError::into_inner);
        match stage {
            Some(stage) => stages.insert(uid.into(), stage),
            None => stages.remove(uid),
        };
    }

    fn api(&self, pod: &Pod) -> Api<Pod> {
        Api::namespaced(self.client.clone(), &pod.namespace().unwrap_or_default())
    }

    async fn start(&self, node: &Arc<Node>, pod: &Pod, uid: &str) -> Result<()> {
        if is_on_host(pod) {
            return self.start_on_host(node, pod, uid).await;
        }
        let (name, options) = (local_name(pod), options(pod, &self.folder.join(IMAGES)));
        let made = {
            let node = node.clone();
            tokio::task::spawn_blocking(move || {
                // The last pod of that name may be on its way out.
                while node.pod(&name).is_some() {
                    std::thread::sleep(Duration::from_millis(20));
                }
                node.add_pod(&name, &options)
            })
            .await?
        };
        let made = match made {
            Ok(made) => made,
            Err(error) => {
                self.set_stage(uid, None);
                return Err(error);
            }
        };
        if let Some(probe) = readiness_probe(pod) {
            let made = made.clone();
            tokio::task::spawn_blocking(move || {
                let ended =
                    || made.server().map_or_else(|| Some("no program".into()), |server| server.epitaph());
                wait_until_ready(made.place(), made.address(), &probe, ended)
            })
            .await??;
        }
        self.set_stage(uid, Some(Stage::Running));
        self.report(node, pod, made.addresses()).await
    }

    /// A pod with the node's own network is no namespace, but containers.
    async fn start_on_host(&self, node: &Arc<Node>, pod: &Pod, uid: &str) -> Result<()> {
        let started = self.start_containers(node, pod, uid).await;
        // Whatever came of it, it can be deleted now.
        self.set_stage(uid, Some(Stage::Running));
        started?;
        self.report(node, pod, node.addresses()).await?;
        self.report_the_end(pod, uid).await
    }

    /// Succeeded or Failed, when the containers of a pod that is not started again have ended.
    async fn report_the_end(&self, pod: &Pod, uid: &str) -> Result<()> {
        if pod.spec.as_ref().and_then(|spec| spec.restart_policy.as_deref()) != Some("Never") {
            return Ok(());
        }
        let well = loop {
            let running = self.on_hosts.lock().unwrap_or_else(PoisonError::into_inner).get(uid).cloned();
            // It was deleted meanwhile.
            let Some(running) = running else { return Ok(()) };
            let ends: Option<Vec<_>> = running.iter().map(Running::succeeded).collect();
            if let Some(ends) = ends {
                break ends.into_iter().all(|well| well);
            }
            tokio::time::sleep(PROBE_PERIOD).await;
        };
        let status = json!({ "status": { "phase": if well { "Succeeded" } else { "Failed" } } });
        let (name, parameters, status) = (pod.name_any(), PatchParams::default(), Patch::Merge(&status));
        let api = self.api(pod);
        insist(|| api.patch_status(&name, &parameters, &status)).await?;
        Ok(())
    }

    async fn start_containers(&self, node: &Arc<Node>, pod: &Pod, uid: &str) -> Result<()> {
        let pod_on_host = HostPod {
            client: &self.client,
            node,
            pod,
            folder: self.folder.join(container::PODS).join(uid),
            images: &self.folder.join(IMAGES),
            certificate: &self.folder.join("certs/apiserver.crt"),
        };
        pod_on_host.initialize().await?;
        let running = Arc::new(pod_on_host.start().await?);
        self.on_hosts.lock().unwrap_or_else(PoisonError::into_inner).insert(uid.into(), running.clone());
        if let Some(probe) = readiness_probe(pod) {
            let node = node.clone();
            tokio::task::spawn_blocking(move || {
                let ended = || running.iter().find_map(Running::ended);
                wait_until_ready(node.place(), node.address(), &probe, ended)
            })
            .await??;
        }
        Ok(())
    }

    /// Running and Ready. The event that follows tells us if the pod was deleted in the meantime.
    async fn report(&self, node: &Node, pod: &Pod, addresses: Addresses) -> Result<()> {
        let ips = |addresses: Addresses| addresses.both().map(|ip| json!({ "ip": ip }));
        let now = k8s_openapi::jiff::Timestamp::now().to_string();
        let conditions: Vec<_> = ["PodScheduled", "Initialized", "ContainersReady", "Ready"]
            .iter()
            .map(|kind| json!({ "type": kind, "status": "True", "lastTransitionTime": now }))
            .collect();
        let containers = pod.spec.iter().flat_map(|spec| &spec.containers);
        let containers: Vec<_> = containers
            .map(|container| {
                json!({
                    "name": container.name, "ready": true, "restartCount": 0, "imageID": "", "started": true,
                    "image": container.image.clone().unwrap_or_default(),
                    "state": { "running": { "startedAt": now } },
                })
            })
            .collect();
        let status = json!({ "status": {
            "phase": "Running", "hostIP": node.address(), "hostIPs": ips(node.addresses()),
            "podIP": addresses.v4, "podIPs": ips(addresses), "startTime": now,
            "conditions": conditions, "containerStatuses": containers,
        } });
        let name = pod.name_any();
        let (api, parameters, status) = (self.api(pod), PatchParams::default(), Patch::Strategic(&status));
        insist(|| api.patch_status(&name, &parameters, &status)).await?;
        Ok(())
    }

    /// SIGTERM, the grace period, then the end of namespace and object.
    async fn end(&self, node: &Arc<Node>, pod: &Pod, uid: &str, gone: bool) -> Result<()> {
        let seconds = pod.metadata.deletion_grace_period_seconds.unwrap_or(GRACE);
        let grace = Duration::from_secs(if gone { 0 } else { seconds.try_into().unwrap_or_default() });
        let (local, name) = (node.clone(), local_name(pod));
        let on_host = self.on_hosts.lock().unwrap_or_else(PoisonError::into_inner).remove(uid);
        tokio::task::spawn_blocking(move || -> Result<()> {
            for container in on_host.iter().flat_map(|containers| containers.iter()) {
                container.end(grace)?;
            }
            let Some(pod) = local.pod(&name) else { return Ok(()) };
            pod.terminate();
            if let Some(server) = pod.server() {
                // Whoever has not ended by then is killed with its namespace.
                let _ = server.wait(grace);
            }
            local.remove_pod(&name)
        })
        .await?
        .context("ending it")?;
        if !gone {
            let parameters = DeleteParams {
                grace_period_seconds: Some(0),
                preconditions: Some(Preconditions { uid: Some(uid.into()), resource_version: None }),
                ..DeleteParams::default()
            };
            let (api, name) = (self.api(pod), pod.name_any());
            match insist(|| api.delete(&name, &parameters)).await {
                Ok(_) => {}
                Err(kube::Error::Api(status)) if matches!(status.code, 404 | 409) => {}
                Err(error) => return Err(error.into()),
            }
        }
        self.set_stage(uid, None);
        Ok(())
    }
}

/// The pod's name in the lab: with its namespace, unless that is `default`.
fn local_name(pod: &Pod) -> String {
    match pod.namespace().as_deref() {
        None | Some("default") => pod.name_any(),
        Some(namespace) => format!("{namespace}.{}", pod.name_any()),
    }
}

/// The `httpGet` of the first readiness probe. Other kinds are not known here: such a pod is ready at once.
fn readiness_probe(pod: &Pod) -> Option<(u16, String)> {
    let containers = pod.spec.iter().flat_map(|spec| &spec.containers);
    let probe =
        containers.filter_map(|container| container.readiness_probe.as_ref()?.http_get.as_ref()).next()?;
    let IntOrString::Int(port) = probe.port else { return None };
    Some((port.try_into().ok()?, probe.path.clone().unwrap_or_else(|| "/".into())))
}

/// Whether the pod has the node's own network.
fn is_on_host(pod: &Pod) -> bool {
    pod.spec.as_ref().and_then(|spec| spec.host_network) == Some(true)
}

/// Asks until the answer is 200, for as long as `ended` has nothing to say of the program.
fn wait_until_ready(
    place: &Place,
    address: Ipv4Addr,
    (port, path): &(u16, String),
    ended: impl Fn() -> Option<String>,
) -> Result<()> {
    let client = lab::Client::at(place);
    let ready = || {
        let mut stream = client.connect(lab::at(address, *port)).ok()?;
        stream.get(path).ok().filter(|(status, _)| *status == 200)
    };
    while ready().is_none() {
        if let Some(epitaph) = ended() {
            bail!("its program has ended: {epitaph}");
        }
        std::thread::sleep(PROBE_PERIOD);
    }
    Ok(())
}

/// What a pod of the cluster knows of names: `dnsPolicy: ClusterFirst`.
fn resolver(pod: &Pod) -> String {
    let namespace = pod.namespace().unwrap_or_else(|| "default".into());
    format!("nameserver {ADDRESS}\nsearch {namespace}.svc.{DOMAIN} svc.{DOMAIN} {DOMAIN}\noptions ndots:5\n",)
}

/// Runs the image that is there, or serves on the ports of all containers.
fn options(pod: &Pod, images: &Path) -> PodOptions {
    let first = pod.spec.iter().flat_map(|spec| &spec.containers).next();
    let image = first.and_then(|container| Some(images.join(container.image.as_ref()?)));
    if let Some(program) = image.filter(|program| program.is_file()) {
        let arguments = first.and_then(|container| container.args.clone()).unwrap_or_default();
        return PodOptions::client().program(&program, &arguments);
    }
    let ports = |wanted: &str| -> Vec<u16> {
        let containers = pod.spec.iter().flat_map(|spec| &spec.containers);
        containers
            .flat_map(|container| container.ports.iter().flatten())
            .filter(|port| port.protocol.as_deref().unwrap_or("TCP") == wanted)
            .filter_map(|port| port.container_port.try_into().ok())
            .collect()
    };
    let drain = pod.annotations().get(DRAIN).and_then(|text| text.parse().ok()).unwrap_or(0.0);
    PodOptions::default()
        .tcp(&ports("TCP"))
        .udp(&ports("UDP"))
        .drain(Duration::from_secs_f64(drain))
        .resolver(&resolver(pod))
}
