//! Portolan in a cluster: brought in, looked at, installed by its chart, and taken away as if it had never been there.

use super::cluster::{Cluster, wait};
use super::{AGENT_IMAGE, LAB_IMAGE, objects};
use crate::deploy::file;
use crate::tour::Narration;
use anyhow::{Context as _, Result};
use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

/// The release, and its namespace.
const RELEASE: [&str; 2] = ["portolan", "--namespace=kube-system"];
/// Settings of a node's kernel that the chart's init container raises.
const SETTINGS: [&str; 3] = [
    "net.netfilter.nf_conntrack_max",
    "net.netfilter.nf_conntrack_tcp_timeout_established",
    "net.netfilter.nf_conntrack_tcp_timeout_close_wait",
];
/// What Portolan keeps on a node's disk, and the folders that stay.
const FOLDERS: [&str; 2] = ["/var/lib/portolan", "/run/portolan"];

/// Whether there is something to uninstall.
pub(super) static INSTALLED: AtomicBool = AtomicBool::new(false);

/// How a node was before.
#[derive(Clone, Debug)]
pub(super) struct Before {
    node: String,
    settings: Vec<String>,
    has_bpffs: bool,
}

/// Looks how the nodes are.
pub(super) fn before(cluster: &Cluster) -> Result<Vec<Before>> {
    let nodes = cluster.nodes()?.into_iter();
    nodes
        .map(|node| {
            let read = |name: &&str| cluster.on_node(&node, &["sysctl", "--values", name], "");
            let settings = SETTINGS.iter().map(|name| read(name).map(|text| text.trim().to_owned()));
            Ok(Before {
                settings: settings.collect::<Result<_>>()?,
                has_bpffs: has_bpffs(cluster, &node)?,
                node,
            })
        })
        .collect()
}

fn has_bpffs(cluster: &Cluster, node: &str) -> Result<bool> {
    Ok(cluster.on_node(node, &["cat", "/proc/mounts"], "")?.contains(" /sys/fs/bpf bpf "))
}

/// Brings the images to the nodes, and that of the client outside to Docker.
pub(super) fn bring_images(cluster: &Cluster, folder: &Path) -> Result<()> {
    for name in ["portolan.tar", "portolan-lab.tar"] {
        let archive = folder.join(name);
        cluster.load(&archive).with_context(|| archive.display().to_string())?;
    }
    let archive = folder.join("portolan-lab.tar");
    let had = cluster.docker.has_image(LAB_IMAGE)?;
    cluster.docker.docker(&["load", "--input", archive.to_str().context("path")?])?;
    if !had {
        let docker = cluster.docker.clone();
        super::undo::later(format!("removing the image {LAB_IMAGE} from Docker"), move || {
            docker.docker(&["rmi", LAB_IMAGE]).map(drop)
        });
    }
    Ok(())
}

/// `portolan check` on each node before anything is installed, as docs/install.md says.
pub(super) fn check_before(cluster: &Cluster, say: &mut Narration) -> Result<()> {
    let image = format!("--image={AGENT_IMAGE}");
    for (number, node) in cluster.nodes()?.iter().enumerate() {
        let target = format!("node/{node}");
        let command = ["debug", &target, "--profile=sysadmin", &image, "--", "portolan", "check"];
        if number == 0 {
            say.tell(&format!("kubectl {}", command.join(" ")));
        }
        cluster.kubectl(&command, "")?;
        let text = words_of_debugger(cluster, node)?;
        let well = text.contains('✓') && !text.contains('✗');
        if number == 0 || !well {
            say.quote(&text);
        }
        say.check(well, &format!("{node} has what Portolan needs"));
    }
    Ok(())
}

/// What the pod of `kubectl debug` on a node said, when it has ended; it is deleted then.
fn words_of_debugger(cluster: &Cluster, node: &str) -> Result<String> {
    const NAMESPACE: &str = "default";
    let find = || -> Result<Option<(String, bool)>> {
        let pods = cluster.list("pods", NAMESPACE)?;
        let of_node = pods.iter().find(|pod| {
            let name = pod["metadata"]["name"].as_str().unwrap_or_default();
            name.starts_with("node-debugger-") && pod["spec"]["nodeName"] == node
        });
        Ok(of_node.map(|pod| {
            let phase = pod["status"]["phase"].as_str().unwrap_or_default();
            let name = pod["metadata"]["name"].as_str().unwrap_or_default();
            (name.to_owned(), ["Succeeded", "Failed"].contains(&phase))
        }))
    };
    wait("the check has ended", || Ok(find()?.is_some_and(|(_, ended)| ended)))?;
    let (name, _) = find()?.context("no pod of kubectl debug")?;
    let text = cluster.kubectl(&["logs", &name, "--namespace", NAMESPACE], "")?;
    cluster.kubectl(&["delete", "pod", &name, "--namespace", NAMESPACE], "")?;
    Ok(text)
}

/// `helm install`, and what it says of itself then.
pub(super) fn install(cluster: &Cluster, arguments: &[String], say: &mut Narration) -> Result<()> {
    let chart = file("helm/portolan").canonicalize()?.display().to_string();
    let mut command = vec!["install".to_owned(), RELEASE[0].into(), chart, RELEASE[1].into()];
    let cgroup = cluster.cgroup()?;
    if cgroup != "/sys/fs/cgroup" {
        command.push(format!("--set=cgroup={cgroup}"));
    }
    if !arguments.is_empty() {
        command.push(format!("--set-json=extraArgs={}", serde_json::json!(arguments)));
    }
    command.extend(["--wait".to_owned(), "--timeout=300s".into()]);
    let words: Vec<&str> = command.iter().map(String::as_str).collect();
    say.tell(&format!("helm {}", words.join(" ")));
    INSTALLED.store(true, Ordering::Relaxed);
    cluster.helm(&words)?;
    let rolled = cluster.kubectl(
        &["rollout", "status", "--namespace=kube-system", "daemonset", "portolan", "--timeout=60s"],
        "",
    )?;
    say.quote(&rolled);
    say.check(rolled.contains("successfully rolled out"), "every node's agent is ready");
    cluster.kubectl(
        &["rollout", "status", "--namespace=kube-system", "deployment", "coredns", "--timeout=180s"],
        "",
    )?;
    say.check(true, "CoreDNS is ready: it reaches the API server by a Service");
    Ok(())
}

/// Makes what the tour looks at.
pub(super) fn make_objects(cluster: &Cluster) -> Result<()> {
    let control_plane = cluster.nodes()?.into_iter().find(|node| node.contains("control-plane"));
    let control_plane = control_plane.context("a cluster without a control plane")?;
    let objects = objects::all(&control_plane);
    cluster.kubectl(&["apply", "-f", "-"], &crate::lab::documents(&objects))?;
    for object in ["statefulset/web", "daemonset/nodes"] {
        let namespace = format!("--namespace={}", objects::NAMESPACE);
        cluster.kubectl(&["rollout", "status", &namespace, object, "--timeout=180s"], "")?;
    }
    wait("the pod `shell` runs", || {
        let pods = cluster.list("pods", objects::NAMESPACE)?;
        Ok(pods
            .iter()
            .any(|pod| pod["metadata"]["name"] == objects::SHELL && pod["status"]["phase"] == "Running"))
    })
}

/// The agents' pods with the nodes they run on.
pub(super) fn agents(cluster: &Cluster) -> Result<Vec<(String, String)>> {
    let pods = cluster.list("pods", "kube-system")?;
    let own = pods.iter().filter(|pod| pod["metadata"]["labels"]["app.kubernetes.io/name"] == "portolan");
    let text = |value: &serde_json::Value| value.as_str().unwrap_or_default().to_owned();
    let mut agents: Vec<_> =
        own.map(|pod| (text(&pod["spec"]["nodeName"]), text(&pod["metadata"]["name"]))).collect();
    agents.sort();
    Ok(agents)
}

/// Runs `portolan` in the agent's pod of a node.
pub(super) fn portolan(cluster: &Cluster, pod: &str, arguments: &[&str]) -> Result<String> {
    let exec = ["exec", "--namespace=kube-system", pod, "--container=portolan", "--", "portolan"];
    cluster.kubectl(&[&exec, arguments].concat(), "")
}

/// As docs/uninstall.md says.
pub(super) fn uninstall(cluster: &Cluster) -> Result<()> {
    if !INSTALLED.swap(false, Ordering::Relaxed) {
        return Ok(());
    }
    cluster.helm(&["uninstall", RELEASE[0], RELEASE[1], "--ignore-not-found", "--wait"])?;
    let text = fs::read_to_string(file("cleanup.yaml"))?;
    cluster.kubectl(&["apply", "-f", "-"], &text)?;
    let status =
        ["rollout", "status", "--namespace=kube-system", "daemonset", "portolan-cleanup", "--timeout=180s"];
    cluster.kubectl(&status, "")?;
    cluster.kubectl(&["delete", "-f", "-", "--wait"], &text)?;
    Ok(())
}

/// What of Portolan is on a node: pins, files, its device, its table of netfilter, its routes.
pub(super) fn remains(cluster: &Cluster, node: &str) -> Result<String> {
    let script = "ls -d /sys/fs/bpf/portolan 2>/dev/null; ls -A /var/lib/portolan /run/portolan 2>/dev/null | grep -v ':$' | grep .; \
                  ip -brief link show portolan0 2>/dev/null; nft list tables | grep portolan; ip route show proto 86";
    let text = cluster.on_node(node, &["sh", "-c", &format!("{script}; true")], "")?;
    Ok(text.trim().to_owned())
}

/// Takes everything away that the run brought, so that a cluster that was there is as it was.
pub(super) fn restore(cluster: &Cluster, before: &[Before]) -> Result<()> {
    cluster.kubectl(&["delete", "namespace", objects::NAMESPACE, "--ignore-not-found", "--wait"], "")?;
    uninstall(cluster)?;
    for Before { node, settings, has_bpffs: had } in before {
        for (name, value) in SETTINGS.iter().zip(settings) {
            cluster.on_node(node, &["sysctl", "--quiet", "--write", &format!("{name}={value}")], "")?;
        }
        for folder in FOLDERS {
            cluster.on_node(node, &["rm", "-d", "-f", folder], "")?;
        }
        if !had && has_bpffs(cluster, node)? {
            cluster.on_node(node, &["umount", "/sys/fs/bpf"], "")?;
        }
        cluster.on_node(node, &["crictl", "rmi", AGENT_IMAGE, LAB_IMAGE], "")?;
    }
    Ok(())
}
