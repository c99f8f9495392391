//! The way of docs/take-over.md in a real cluster, by the commands that stand there, while somebody connects: kube-proxy as kubeadm
//! installs it, one node over and back, then all for good, and kube-proxy's rules taken away.

use super::cluster::{Cluster, wait};
use super::install::{INSTALLED, agents, portolan, remains, uninstall};
use super::objects::{NODE_PORT, SHELL};
use super::steps::{Asking, Place, Tour};
use crate::deploy::objects_of;
use crate::lab::documents;
use crate::recipes::commands;
use crate::tour::Narration;
use anyhow::{Context as _, Result};
use serde_json::{Value, json};
use std::sync::atomic::Ordering;

const PAGE: &str = "take-over.md";
/// The exit code of verbs that are not content, where Services are served.
const WARNING: u8 = 3;
/// What kubeadm calls it.
const KUBE_PROXY: &str = "kube-proxy";
/// How it is to work. A node of kind may not raise the limit of its machine's conntrack.
const CONFIGURATION: &str = "---\napiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\nmode: iptables\n\
                             conntrack: {maxPerCore: 0}\n";

impl Tour {
    pub(super) fn take_over(&self, say: &mut Narration) -> Result<()> {
        let nodes = self.cluster.nodes()?;
        let node = self.pods(SHELL)?.first().context("there is no pod `shell`")?.1.clone();
        install_kube_proxy(&self.cluster)?;
        self.wait_until_nodes_answer()?;
        say.check(true, "kube-proxy serves the node port of every node");

        let asking = Asking::begin(self)?;
        INSTALLED.store(true, Ordering::Relaxed);
        self.recipe(say, "## One node first", &node)?;
        say.check(self.agents_on()? == [node.clone()], &format!("Portolan is on {node} alone"));
        wait("kube-proxy has left it", || Ok(!kube_proxies(&self.cluster)?.contains(&node)))?;
        self.wait_until_nodes_answer()?;
        say.check(true, "every node serves, whoever does it there");
        self.recipe(say, "Back:", &node)?;
        wait("kube-proxy is everywhere", || Ok(kube_proxies(&self.cluster)? == nodes))?;
        self.wait_until_nodes_answer()?;
        let left = remains(&self.cluster, &node)?;
        say.check(left.is_empty(), &format!("kube-proxy serves again, and nothing is left on {node} {left}"));

        self.recipe(say, "## All nodes, so that it can be taken back", &node)?;
        wait("kube-proxy is nowhere", || Ok(kube_proxies(&self.cluster)?.is_empty()))?;
        say.check(self.agents_on()? == nodes, "Portolan is on every node");
        let version = version(&self.cluster)?;
        self.recipe(say, "## For good", &node)?;
        clean_after_kube_proxy(&self.cluster, &version)?;
        self.wait_until_nodes_answer()?;
        for node in &nodes {
            let rules = self.cluster.on_node(node, &["iptables-save", "--table", "nat"], "")?;
            say.check(!rules.contains("KUBE-SERVICES"), &format!("{node}: no rule of kube-proxy is left"));
        }
        let tally = asking.end()?;
        say.seen(&format!("{} connections meanwhile", tally.answers.len() + tally.failures.len()), &tally);
        say.check(tally.answers.len() > 100 && tally.failures.is_empty(), "no connection failed (C3, C5)");
        for (node, pod) in agents(&self.cluster)? {
            let status = portolan(&self.cluster, &pod, &["status"])?;
            let well = status.contains("all is well");
            if !well {
                say.quote(&status);
            }
            say.check(well, &format!("{node}: all is well"));
        }
        uninstall(&self.cluster)
    }

    /// Runs the commands below a heading, with a node's name in place of `NODE`.
    fn recipe(&self, say: &Narration, below: &str, node: &str) -> Result<()> {
        let mut script = commands(PAGE, below).replace("NODE", node);
        let cgroup = self.cluster.cgroup()?;
        if cgroup != "/sys/fs/cgroup" {
            script = script.replace(" --wait", &format!(" --set cgroup={cgroup} --wait"));
        }
        script.lines().for_each(|line| say.tell(line));
        // `portolan check` ends with 3 where there is something to look at: the rules that kube-proxy left.
        let may_warn = |line: &str| match line.starts_with("kubectl exec") {
            true => format!("{line} || test $? = {WARNING}\n"),
            false => format!("{line}\n"),
        };
        self.cluster.shell(&script.lines().map(may_warn).collect::<String>()).map(drop)
    }

    fn agents_on(&self) -> Result<Vec<String>> {
        Ok(agents(&self.cluster)?.into_iter().map(|(node, _)| node).collect())
    }

    fn wait_until_nodes_answer(&self) -> Result<()> {
        for node in self.cluster.nodes()? {
            for to in self.at_node(&node, NODE_PORT)? {
                wait(&format!("{to} answers"), || {
                    Ok(self.once(Place::Outside, &to.to_string(), &[])?.is_ok())
                })?;
            }
        }
        Ok(())
    }
}

/// By kubeadm, from kind's own configuration of the cluster.
fn install_kube_proxy(cluster: &Cluster) -> Result<()> {
    let nodes = cluster.nodes()?;
    let control_plane =
        nodes.iter().find(|node| node.contains("control-plane")).context("a control plane")?;
    let script = "cat /kind/kubeadm.conf - >/run/kube-proxy.conf && \
                  kubeadm init phase addon kube-proxy --config /run/kube-proxy.conf && rm /run/kube-proxy.conf";
    cluster.on_node(control_plane, &["sh", "-c", script], CONFIGURATION)?;
    if cluster.docker.is_own() {
        let mut objects = cluster.list("daemonsets", "kube-system")?;
        objects.retain(|object| object["metadata"]["name"] == KUBE_PROXY);
        for object in &mut objects {
            lend_programs(&mut object["spec"]["template"]["spec"], "containers");
            object["metadata"] = json!({ "name": KUBE_PROXY, "namespace": "kube-system", "labels": object["metadata"]["labels"] });
        }
        cluster.kubectl(&["apply", "-f", "-"], &documents(&objects))?;
    }
    let status = ["rollout", "status", "--namespace=kube-system", "daemonset", KUBE_PROXY, "--timeout=240s"];
    cluster.kubectl(&status, "").map(drop)
}

/// The image of kube-proxy that is made here holds that program alone: the others it calls are the node's.
fn lend_programs(spec: &mut Value, containers: &str) {
    for (name, on_node, at) in [
        ("sbin", "/usr/sbin", "/usr/sbin"),
        ("usr-lib", "/usr/lib", "/usr/lib"),
        ("lib", "/usr/lib", "/lib"),
        ("lib64", "/usr/lib64", "/lib64"),
        ("alternatives", "/etc/alternatives", "/etc/alternatives"),
    ] {
        let volumes = spec["volumes"].as_array_mut().into_iter();
        volumes.for_each(|all| all.push(json!({ "name": name, "hostPath": { "path": on_node } })));
        let mounts = spec[containers][0]["volumeMounts"].as_array_mut().into_iter();
        mounts.for_each(|all| all.push(json!({ "name": name, "mountPath": at })));
    }
}

/// The nodes on which it runs.
fn kube_proxies(cluster: &Cluster) -> Result<Vec<String>> {
    let pods = cluster.list("pods", "kube-system")?;
    let own = pods.iter().filter(|pod| pod["metadata"]["labels"]["k8s-app"] == KUBE_PROXY);
    let mut nodes: Vec<_> =
        own.map(|pod| pod["spec"]["nodeName"].as_str().unwrap_or_default().to_owned()).collect();
    nodes.sort();
    Ok(nodes)
}

/// The version of its image.
fn version(cluster: &Cluster) -> Result<String> {
    let path = "--output=jsonpath={.spec.template.spec.containers[0].image}";
    let image = cluster.kubectl(&["get", "daemonset", KUBE_PROXY, "--namespace=kube-system", path], "")?;
    let (_, version) = image.rsplit_once(':').with_context(|| format!("{image} has no version"))?;
    Ok(version.to_owned())
}

/// As the head of the manifest says.
fn clean_after_kube_proxy(cluster: &Cluster, version: &str) -> Result<()> {
    let mut objects = objects_of("kube-proxy-cleanup.yaml")?;
    for object in &mut objects {
        let spec = &mut object["spec"]["template"]["spec"];
        let image = spec["initContainers"][0]["image"].as_str().context("an image")?;
        spec["initContainers"][0]["image"] = image.replace("KUBE_PROXY_VERSION", version).into();
        if cluster.docker.is_own() {
            lend_programs(spec, "initContainers");
        }
    }
    cluster.kubectl(&["apply", "-f", "-"], &documents(&objects))?;
    let name = "kube-proxy-cleanup";
    let status = ["rollout", "status", "--namespace=kube-system", "daemonset", name, "--timeout=180s"];
    cluster.kubectl(&status, "")?;
    cluster.kubectl(&["delete", "daemonset", name, "--namespace=kube-system", "--wait"], "").map(drop)
}
