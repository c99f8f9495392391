//! A kind cluster: made, or one that is there; and the commands that work with it.

use super::docker::{Docker, NETWORK};
use super::programs::{KIND, KUBECTL};
use super::{node_image, undo};
use crate::controlplane::HELM;
use crate::lab::portolan;
use anyhow::{Context as _, Result, bail, ensure};
use serde_json::{Value, json};
use std::fs;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

/// What a cluster that is made is called.
pub(super) const NAME: &str = "portolan";
/// How long a node, a pod or a rollout may take.
pub(super) const PATIENCE: Duration = Duration::from_secs(300);
/// The label of kind's containers.
const LABEL: &str = "io.x-k8s.kind.cluster";

/// A cluster, and the programs that work with it.
#[derive(Clone, Debug)]
pub(super) struct Cluster {
    pub(super) docker: Docker,
    pub(super) name: String,
    pub(super) kubeconfig: PathBuf,
    /// What is kept while the run lasts.
    folder: PathBuf,
    kind: PathBuf,
    kubectl: PathBuf,
    helm: PathBuf,
}

impl Cluster {
    /// Makes one of a control plane and two workers, without kube-proxy.
    pub(super) fn create(
        docker: Docker,
        image: Option<&str>,
        dual_stack: bool,
        folder: &Path,
    ) -> Result<Self> {
        let own_image = docker.is_own() && image.is_none();
        let image = match image {
            Some(image) => Some(image.to_owned()),
            None if own_image => Some(node_image::find_or_make(&docker, &super::docker::own_folder()?)?),
            None => None,
        };
        let cluster = Self::of(docker, NAME, folder)?;
        ensure!(
            cluster.nodes()?.is_empty(),
            "there is a kind cluster `{NAME}` already: --existing {NAME} takes it, `kind delete cluster --name {NAME}` removes it"
        );
        let had_network = cluster.docker.has_network()?;
        let doomed = cluster.clone();
        undo::later(format!("deleting the cluster {NAME}"), move || doomed.delete(had_network));
        let file = folder.join("cluster.yaml");
        fs::write(&file, configuration(own_image, dual_stack).to_string())?;
        let mut create = cluster.docker.command(&cluster.kind);
        create.args(["create", "cluster", "--name", NAME, "--config"]).arg(&file);
        create.arg("--kubeconfig").arg(&cluster.kubeconfig);
        if let Some(image) = image {
            println!("  of the node image {image}");
            create.args(["--image", &image]);
        }
        undo::run(&mut create).context(
            "kind cannot make the cluster; where it cannot pull a node image, --isolated makes one",
        )?;
        if own_image {
            super::network::raise(&cluster)?;
        }
        Ok(cluster)
    }

    /// One that is there.
    pub(super) fn existing(docker: Docker, name: &str, folder: &Path) -> Result<Self> {
        let cluster = Self::of(docker, name, folder)?;
        ensure!(
            !cluster.nodes()?.is_empty(),
            "there is no kind cluster `{name}`: `kind get clusters` lists them"
        );
        let mut get = cluster.docker.command(&cluster.kind);
        let text = undo::output(get.args(["get", "kubeconfig", "--name", name]), "")?;
        fs::write(&cluster.kubeconfig, text)?;
        for node in cluster.nodes()? {
            let status = cluster.on_node(&node, &["cat", "/proc/1/status"], "")?;
            ensure!(has_cap_bpf(&status), "the node {node} has no CAP_BPF: its Docker must be 23 or later");
        }
        let daemon_sets = cluster.list("daemonsets", "kube-system")?;
        for daemon_set in daemon_sets {
            let name = daemon_set["metadata"]["name"].as_str().unwrap_or_default();
            let wanted = daemon_set["status"]["desiredNumberScheduled"].as_u64().unwrap_or_default();
            match name {
                "kube-proxy" if wanted > 0 => bail!(
                    "kube-proxy serves this cluster: docs/take-over.md says how Portolan takes its place"
                ),
                "portolan" => bail!("Portolan is installed in this cluster"),
                _ => {}
            }
        }
        Ok(cluster)
    }

    fn of(docker: Docker, name: &str, folder: &Path) -> Result<Self> {
        Ok(Self {
            docker,
            name: name.into(),
            kubeconfig: folder.join("kubeconfig"),
            folder: folder.into(),
            kind: KIND.find_or_build()?,
            kubectl: KUBECTL.find_or_build()?,
            helm: HELM.find_or_build()?,
        })
    }

    fn delete(&self, had_network: bool) -> Result<()> {
        let mut delete = self.docker.command(&self.kind);
        delete.args(["delete", "cluster", "--name", &self.name, "--kubeconfig"]).arg(&self.kubeconfig);
        undo::output(&mut delete, "")?;
        if !had_network && self.docker.has_network()? {
            self.docker.docker(&["network", "rm", NETWORK])?;
        }
        Ok(())
    }

    /// The containers that are its nodes, in the order of their names.
    pub(super) fn nodes(&self) -> Result<Vec<String>> {
        let label = format!("label={LABEL}={}", self.name);
        let text = self.docker.docker(&["ps", "--all", "--filter", &label, "--format", "{{.Names}}"])?;
        let mut nodes: Vec<_> = text.lines().map(str::to_owned).collect();
        nodes.sort();
        // kind's own load balancer, where there are several control planes, is no node.
        nodes.retain(|name| !name.ends_with("-external-load-balancer"));
        Ok(nodes)
    }

    /// A node's addresses in Docker's network.
    pub(super) fn addresses(&self, node: &str) -> Result<Vec<IpAddr>> {
        let format = "{{range .NetworkSettings.Networks}}{{.IPAddress}} {{.GlobalIPv6Address}}{{end}}";
        let text = self.docker.docker(&["inspect", "--format", format, node])?;
        Ok(text.split_whitespace().map(str::parse).collect::<Result<_, _>>()?)
    }

    /// Runs a program on a node.
    pub(super) fn on_node(&self, node: &str, arguments: &[&str], input: &str) -> Result<String> {
        self.docker.docker_with(&[&["exec", "--interactive", node], arguments].concat(), input)
    }

    /// Where the node has its cgroup2.
    pub(super) fn cgroup(&self) -> Result<String> {
        let nodes = self.nodes()?;
        let node = nodes.first().context("a cluster without nodes")?;
        let mounts = self.on_node(node, &["cat", "/proc/mounts"], "")?;
        let mut cgroups = mounts.lines().map(|line| line.split(' ').collect::<Vec<_>>());
        let cgroup =
            cgroups.find(|words| words.get(2) == Some(&"cgroup2")).context("no cgroup2 on the nodes")?;
        Ok(cgroup[1].to_owned())
    }

    /// Brings the image of an archive to all nodes.
    pub(super) fn load(&self, archive: &Path) -> Result<()> {
        let mut load = self.docker.command(&self.kind);
        load.args(["load", "image-archive", "--name", &self.name]).arg(archive);
        undo::output(&mut load, "").map(drop)
    }

    /// The command `kubectl`.
    pub(super) fn kubectl_command(&self) -> Command {
        let mut command = self.docker.command(&self.kubectl);
        command.arg("--kubeconfig").arg(&self.kubeconfig);
        command
    }

    /// Runs `kubectl`, with a text on its standard input, and returns what it printed.
    pub(super) fn kubectl(&self, arguments: &[&str], input: &str) -> Result<String> {
        undo::output(self.kubectl_command().args(arguments), input)
    }

    /// `portolan` on a workstation of this cluster: with `kubectl`, and nothing else of the nodes.
    ///
    /// # Errors
    /// If it was not built.
    pub(super) fn portolan_command(&self, arguments: &[&str]) -> Result<Command> {
        let mut command = self.docker.command(portolan()?);
        command.args(arguments).env("KUBECONFIG", &self.kubeconfig);
        let own = self.kubectl.parent().context("kubectl lies nowhere")?.to_owned();
        let path = std::env::var_os("PATH").unwrap_or_default();
        command.env("PATH", std::env::join_paths([own].into_iter().chain(std::env::split_paths(&path)))?);
        Ok(command)
    }

    /// Objects of a kind.
    pub(super) fn list(&self, kind: &str, namespace: &str) -> Result<Vec<Value>> {
        let text = self.kubectl(&["get", kind, "--namespace", namespace, "--output", "json"], "")?;
        let list: Value = serde_json::from_str(&text)?;
        Ok(list["items"].as_array().cloned().unwrap_or_default())
    }

    /// Runs `helm`, which has no folder of its own on this machine.
    pub(super) fn helm(&self, arguments: &[&str]) -> Result<String> {
        let mut command = self.docker.command(&self.helm);
        command.arg("--kubeconfig").arg(&self.kubeconfig).args(arguments);
        self.give_helm_a_home(&mut command);
        undo::output(&mut command, "")
    }

    /// Runs lines of a shell in the checkout, where `kubectl` and `helm` are this cluster's.
    pub(super) fn shell(&self, script: &str) -> Result<String> {
        let mut command = self.docker.command("bash");
        command.args(["-ec", script]).current_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join(".."));
        let own = [&self.kubectl, &self.helm].into_iter().filter_map(|program| program.parent());
        let path = std::env::var_os("PATH").unwrap_or_default();
        let folders = own.map(Path::to_owned).chain(std::env::split_paths(&path));
        command.env("PATH", std::env::join_paths(folders)?).env("KUBECONFIG", &self.kubeconfig);
        self.give_helm_a_home(&mut command);
        undo::output(&mut command, "")
    }

    /// Where something of this run may be written.
    pub(super) fn folder(&self) -> &Path {
        &self.folder
    }

    fn give_helm_a_home(&self, command: &mut Command) {
        for (variable, folder) in
            [("HELM_CACHE_HOME", "cache"), ("HELM_CONFIG_HOME", "config"), ("HELM_DATA_HOME", "data")]
        {
            command.env(variable, self.folder.join("helm").join(folder));
        }
    }

    /// What a person types before a command that reaches this cluster.
    pub(super) fn prefix(&self) -> String {
        match &self.docker {
            Docker::Found => format!("export KUBECONFIG={}", self.kubeconfig.display()),
            Docker::Own { pid, socket } => format!(
                "export KUBECONFIG={} DOCKER_HOST=unix://{}; nsenter --net=/proc/{pid}/ns/net bash",
                self.kubeconfig.display(),
                socket.display()
            ),
        }
    }

    /// Where `kubectl` is.
    pub(super) fn kubectl_program(&self) -> &Path {
        &self.kubectl
    }
}

/// What kind is told. Where the node image is our own there is no pod network in it, and cgroups may be of the first version.
fn configuration(own_image: bool, dual_stack: bool) -> Value {
    let roles = ["control-plane", "worker", "worker"].map(|role| json!({ "role": role }));
    let mut config = json!({
        "kind": "Cluster",
        "apiVersion": "kind.x-k8s.io/v1alpha4",
        "networking": { "kubeProxyMode": "none", "ipFamily": if dual_stack { "dual" } else { "ipv4" } },
        "nodes": roles,
    });
    if own_image {
        config["networking"]["disableDefaultCNI"] = true.into();
        config["kubeadmConfigPatches"] = json!(["kind: KubeletConfiguration\nfailCgroupV1: false\n"]);
    }
    config
}

/// Whether a process may have `CAP_BPF` and `CAP_PERFMON`, by its `/proc/PID/status`.
fn has_cap_bpf(status: &str) -> bool {
    const BOTH: u64 = 1 << 38 | 1 << 39;
    let bits = status.lines().find_map(|line| line.strip_prefix("CapBnd:"));
    let bits = bits.and_then(|bits| u64::from_str_radix(bits.trim(), 16).ok());
    bits.is_some_and(|bits| bits & BOTH == BOTH)
}

/// Waits for a condition.
pub(super) fn wait(what: &str, condition: impl Fn() -> Result<bool>) -> Result<()> {
    let end = Instant::now() + PATIENCE;
    loop {
        let result = condition();
        if matches!(result, Ok(true)) {
            return Ok(());
        }
        if Instant::now() > end {
            result.with_context(|| what.to_owned())?;
            bail!("after {PATIENCE:?} it is not so that {what}");
        }
        std::thread::sleep(Duration::from_millis(250));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_of_an_old_docker_is_told_apart() {
        assert!(has_cap_bpf("Name:\tsystemd\nCapBnd:\t000001fffeffffff\n"));
        assert!(!has_cap_bpf("CapBnd:\t0000003fffffffff\n"));
    }

    #[test]
    fn kind_is_told_to_leave_kube_proxy_out() {
        for own_image in [false, true] {
            let configuration = configuration(own_image, false);
            assert_eq!(configuration["networking"]["kubeProxyMode"], "none");
            assert_eq!(configuration["networking"]["disableDefaultCNI"] == true, own_image);
        }
    }

    /// The control plane of a node image is that of the laboratory.
    #[test]
    fn the_modules_pin_one_release_of_kubernetes() {
        let laboratory = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("controlplane");
        let nodes = super::super::programs::KUBERNETES.module();
        let [laboratory, nodes] =
            [laboratory, nodes].map(|module| crate::controlplane::version(&module).unwrap());
        assert_eq!(laboratory, nodes);
    }
}
