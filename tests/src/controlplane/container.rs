//! Containers on a node itself: what the lab's kubelet makes of the pods with `hostNetwork`, run by `bwrap` from OCI images.
//!
//! A container has the node's network and cgroup, and of its file system what its pod mounts. Image, capabilities, the token of
//! the service account and variables are as its pod asks for them. There is no seccomp filter, no limit, and no liveness probe.
//! What `bwrap` cannot make is a privileged container whose mounts come through to its node: see [`privileged`].

use super::objects::insist;
use super::privileged;
use crate::lab::{self, Node, Process};
use anyhow::{Context, Result, bail, ensure};
use k8s_openapi::api::authentication::v1::{TokenRequest, TokenRequestSpec};
use k8s_openapi::api::core::v1::{ConfigMap, Container, EnvVar, Pod, Service, ServiceAccount, Volume};
use kube::api::PostParams;
use kube::{Api, Client, ResourceExt};
use serde::Deserialize;
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};
use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, Read as _};
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::symlink;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

/// Where a pod finds the token of its service account.
const ACCOUNT: &str = "/var/run/secrets/kubernetes.io/serviceaccount";
/// Where the containers of pods are, by the uids of these, in the control plane's folder.
pub(super) const PODS: &str = "pods";

/// Prints the end of what each container wrote to standard error.
pub(super) fn tell_logs(folder: &Path) {
    for pod in fs::read_dir(folder.join(PODS)).into_iter().flatten().flatten() {
        let logs = fs::read_dir(pod.path()).into_iter().flatten().flatten().map(|file| file.path());
        for log in logs.filter(|path| path.extension().is_some_and(|extension| extension == "log")) {
            let text = fs::read_to_string(&log).unwrap_or_default();
            lab::complain(&format!("--- {}\n{}", log.display(), lab::last_lines(&text, 40)));
        }
    }
}

/// An image that was unpacked: what its configuration says, beside the folder `rootfs`.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(super) struct Image {
    pub(super) entrypoint: Vec<String>,
    pub(super) env: Vec<String>,
    /// Folders of this machine that it needs.
    #[serde(default)]
    machine: Vec<PathBuf>,
}

/// Folders without which the programs of this machine do not run.
const MACHINE: [&str; 4] = ["/etc/alternatives", "/usr/bin", "/usr/lib", "/usr/sbin"];
/// Where else these are found.
const ALIASES: [(&str, &str); 4] =
    [("bin", "usr/bin"), ("lib", "usr/lib"), ("lib64", "usr/lib64"), ("sbin", "usr/sbin")];

/// Makes an image of a program of this machine.
pub(super) fn make(folder: &Path, program: &Path, at: &str) -> Result<()> {
    let root = folder.join("rootfs");
    let place = root.join(at.trim_start_matches('/'));
    fs::create_dir_all(place.parent().context("a program without a folder")?)?;
    fs::copy(program, &place).with_context(|| program.display().to_string())?;
    for (name, target) in ALIASES {
        symlink(target, root.join(name))?;
    }
    let machine = MACHINE.into_iter().chain(["/usr/lib64"]).filter(|folder| Path::new(folder).is_dir());
    let image = json!({
        "Entrypoint": [at], "Env": ["PATH=/usr/sbin:/usr/bin"], "Machine": machine.collect::<Vec<_>>(),
    });
    Ok(fs::write(folder.join("image.json"), image.to_string())?)
}

/// Unpacks the image of an archive with an OCI layout below `images`, by the name that it has there.
pub(super) fn load(archive: &Path, images: &Path) -> Result<String> {
    let mut files = BTreeMap::new();
    let file =
        File::open(archive).with_context(|| format!("{}: run `cargo xtask image`", archive.display()))?;
    for entry in tar::Archive::new(file).entries()? {
        let mut entry = entry?;
        let (path, mut content) = (entry.path()?.to_string_lossy().into_owned(), Vec::new());
        entry.read_to_end(&mut content)?;
        files.insert(path, content);
    }
    let blob = |descriptor: &Value| -> Result<&Vec<u8>> {
        let digest = descriptor["digest"].as_str().context("a descriptor without a digest")?;
        let content = files.get(&format!("blobs/{}", digest.replace(':', "/"))).context(digest.to_owned())?;
        let found: String = Sha256::digest(content).iter().map(|byte| format!("{byte:02x}")).collect();
        ensure!(
            digest == format!("sha256:{found}") && descriptor["size"] == content.len(),
            "{digest} is not it"
        );
        Ok(content)
    };
    let index: Value = serde_json::from_slice(files.get("index.json").context("no index.json")?)?;
    let named = &index["manifests"][0];
    let name =
        named["annotations"]["io.containerd.image.name"].as_str().context("an image without a name")?;
    let manifest: Value = serde_json::from_slice(blob(named)?)?;
    let config: Value = serde_json::from_slice(blob(&manifest["config"])?)?;
    let folder = images.join(name);
    for layer in manifest["layers"].as_array().context("no layers")? {
        unpack(blob(layer)?, &folder)?;
    }
    fs::write(folder.join("image.json"), config["config"].to_string())?;
    Ok(name.to_owned())
}

/// Unpacks a layer into `rootfs` of a folder, by a process of its own, as [`lab::install`] copies a program.
fn unpack(layer: &[u8], folder: &Path) -> Result<()> {
    let (archive, root) = (folder.join("layer.tar"), folder.join("rootfs"));
    fs::create_dir_all(&root)?;
    fs::write(&archive, layer)?;
    let mut tar = Command::new("tar");
    let status = tar.arg("--extract").arg("--file").arg(&archive).arg("--directory").arg(&root).status()?;
    ensure!(status.success(), "tar, for {}: {status}", folder.display());
    Ok(fs::remove_file(archive)?)
}

/// What is common to the containers of a pod.
pub(super) struct HostPod<'a> {
    pub(super) client: &'a Client,
    pub(super) node: &'a Node,
    pub(super) pod: &'a Pod,
    /// Of the pod alone.
    pub(super) folder: PathBuf,
    pub(super) images: &'a Path,
    /// The API server's.
    pub(super) certificate: &'a Path,
}

/// A container that runs.
#[derive(Debug)]
pub(super) struct Running {
    process: Process,
    /// Where `bwrap` wrote what it started.
    about: PathBuf,
}

impl Running {
    /// SIGTERM to the container's first process, then the grace period, then SIGKILL.
    pub(super) fn end(&self, grace: Duration) -> Result<()> {
        if self.process.exit_status().is_none() {
            self.signal(libc::SIGTERM)?;
            if self.process.wait(grace).is_err() {
                self.signal(libc::SIGKILL)?;
                self.process.wait(grace)?;
            }
        }
        Ok(())
    }

    fn signal(&self, signal: i32) -> Result<()> {
        let about: Value = serde_json::from_slice(&fs::read(&self.about)?)?;
        let first = about["child-pid"].as_i64().context("bwrap says no pid")?.try_into()?;
        // SAFETY: a system call; the process is waited for by `bwrap`, which lives.
        unsafe { libc::kill(first, signal) };
        Ok(())
    }

    /// Whether it ended well, if it ended.
    pub(super) fn succeeded(&self) -> Option<bool> {
        self.process.exit_status().map(|status| status.success())
    }

    /// How it ended, if it did.
    pub(super) fn ended(&self) -> Option<String> {
        self.process.epitaph()
    }
}

impl HostPod<'_> {
    fn namespace(&self) -> String {
        self.pod.namespace().unwrap_or_else(|| "default".into())
    }

    /// Runs the pod's init containers to their ends, one after the other.
    pub(super) async fn initialize(&self) -> Result<()> {
        for container in self.pod.spec.iter().flat_map(|spec| spec.init_containers.iter().flatten()) {
            let running = self.run(container).await?.context("an init container needs an image")?;
            while running.process.exit_status().is_none() {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            let well = running.process.exit_status().is_some_and(|status| status.success());
            ensure!(well, "{}: {}", container.name, running.ended().unwrap_or_default());
        }
        Ok(())
    }

    /// Starts the pod's containers. One whose image is not there does nothing.
    pub(super) async fn start(&self) -> Result<Vec<Running>> {
        let mut started = Vec::new();
        for container in self.pod.spec.iter().flat_map(|spec| &spec.containers) {
            started.extend(self.run(container).await?);
        }
        Ok(started)
    }

    async fn run(&self, container: &Container) -> Result<Option<Running>> {
        let image = self.images.join(container.image.as_ref().context("no image")?);
        let Ok(config) = fs::read(image.join("image.json")) else { return Ok(None) };
        let config: Image = serde_json::from_slice(&config)?;
        let mounts = self.mounts(container, &config).await?;
        let program = container.command.as_ref().unwrap_or(&config.entrypoint).iter();
        let program: Vec<_> = program.chain(container.args.iter().flatten()).cloned().collect();
        let of_image = config.env.iter().filter_map(|variable| variable.split_once('='));
        let of_image = of_image.map(|(name, value)| (name.to_owned(), value.to_owned()));
        let variables: BTreeMap<_, _> = of_image.chain(self.variables(container).await?).collect();
        fs::create_dir_all(&self.folder)?;
        let about = self.folder.join(format!("{}.json", container.name));
        let (place, root) = (self.node.agent_place(), image.join("rootfs"));
        let command = if is_privileged(container) {
            privileged::command(&place, &root, &mounts, &program, &variables)?
        } else {
            let mut command = place.command("bwrap")?;
            command.args(sandbox(&root, &mounts));
            command.args(security(container)?);
            command.arg("--clearenv");
            for (name, value) in &variables {
                command.args(["--setenv", name, value]);
            }
            let descriptor = inherited(&mut command, File::create(&about)?);
            command.args(["--info-fd", &descriptor, "--"]).args(&program);
            command
        };
        let process = Process::start(&self.folder, &container.name, command)?;
        if is_privileged(container) {
            fs::write(&about, json!({ "child-pid": process.pid() }).to_string())?;
        }
        Ok(Some(Running { process, about }))
    }

    /// Where the API server's own Service is, then the variables of `envFrom`, then those of `env`, which win.
    async fn variables(&self, container: &Container) -> Result<BTreeMap<String, String>> {
        let services = Api::<Service>::namespaced(self.client.clone(), "default");
        let own = insist(|| services.get("kubernetes")).await?.spec.and_then(|spec| spec.cluster_ip);
        let own = own.context("the API server has no Service")?;
        let mut variables = BTreeMap::from([
            ("KUBERNETES_SERVICE_HOST".to_owned(), own),
            ("KUBERNETES_SERVICE_PORT".to_owned(), "443".to_owned()),
        ]);
        for source in container.env_from.iter().flatten() {
            let map = source.config_map_ref.as_ref().context("envFrom knows ConfigMaps only")?;
            let api = Api::<ConfigMap>::namespaced(self.client.clone(), &self.namespace());
            if let Some(found) = insist(|| api.get_opt(&map.name)).await? {
                variables.extend(found.data.unwrap_or_default());
            } else {
                ensure!(map.optional == Some(true), "there is no ConfigMap {}", map.name);
            }
        }
        for variable in container.env.iter().flatten() {
            variables.insert(variable.name.clone(), self.value(variable)?);
        }
        Ok(variables)
    }

    fn value(&self, variable: &EnvVar) -> Result<String> {
        let Some(source) = &variable.value_from else {
            return Ok(variable.value.clone().unwrap_or_default());
        };
        match source.field_ref.as_ref().map(|field| field.field_path.as_str()) {
            Some("spec.nodeName") => Ok(self.node.name().to_owned()),
            _ => bail!("{}: only spec.nodeName is known", variable.name),
        }
    }

    /// What its image needs of the machine, the pod's volumes where the container mounts them, and the token of its account.
    async fn mounts(&self, container: &Container, image: &Image) -> Result<Vec<Mount>> {
        let volumes = || self.pod.spec.iter().flat_map(|spec| spec.volumes.iter().flatten());
        let of_machine = image.machine.iter().map(|folder| Mount {
            source: folder.clone(),
            path: folder.display().to_string(),
            read_only: true,
            comes_through: false,
        });
        let mut mounts: Vec<_> = of_machine.collect();
        for mount in container.volume_mounts.iter().flatten() {
            let volume = volumes().find(|volume| volume.name == mount.name);
            let source = self.folder_of(volume.with_context(|| format!("no volume {}", mount.name))?)?;
            let comes_through = mount.mount_propagation.as_deref() == Some("Bidirectional");
            ensure!(
                !comes_through || is_privileged(container),
                "{}: such a propagation asks for a privileged container",
                mount.name
            );
            let read_only = mount.read_only.unwrap_or_default();
            mounts.push(Mount { source, path: mount.mount_path.clone(), read_only, comes_through });
        }
        mounts.extend(self.account().await?);
        // A folder of one may be what another is mounted on.
        mounts.sort_by(|a, b| a.path.cmp(&b.path));
        Ok(mounts)
    }

    /// An empty folder, or what a node of the lab has at a path of the machine's own. A path of no type is made if it is not there, as containerd
    /// does it.
    fn folder_of(&self, volume: &Volume) -> Result<PathBuf> {
        if volume.empty_dir.is_some() {
            let folder = self.folder.join("empty").join(&volume.name);
            fs::create_dir_all(&folder)?;
            return Ok(folder);
        }
        let host = volume.host_path.as_ref().context("the lab's volumes are of their node, or empty")?;
        let path = match host.path.as_str() {
            "/etc/kubernetes" => self.node.etc("kubernetes"),
            "/etc/portolan" => self.node.etc("portolan"),
            "/run/portolan" => self.node.run_folder(),
            "/sys/fs/bpf" => self.node.bpffs(),
            "/sys/fs/bpf/portolan" => self.node.bpffs().join("portolan"),
            "/run/xtables.lock" => self.node.state_folder().with_extension("xtables.lock"),
            "/sys/fs/cgroup" => self.node.cgroup().to_owned(),
            "/var/lib/portolan" => self.node.state_folder(),
            other => bail!("a node of the lab has no {other}"),
        };
        match host.type_.as_deref() {
            None | Some("" | "DirectoryOrCreate") => {
                fs::create_dir_all(&path).with_context(|| format!("the node's {}", host.path))?;
            }
            Some("FileOrCreate") => drop(File::options().create(true).append(true).open(&path)?),
            Some("Directory") => ensure!(path.is_dir(), "the node's {} is no folder", host.path),
            Some(other) => bail!("the lab's nodes have no {other}"),
        }
        Ok(path)
    }

    /// The token of the pod's service account, for an hour.
    async fn account(&self) -> Result<Option<Mount>> {
        let Some(spec) = &self.pod.spec else { return Ok(None) };
        if spec.automount_service_account_token == Some(false) {
            return Ok(None);
        }
        let name = spec.service_account_name.as_deref().unwrap_or("default");
        let api = Api::<ServiceAccount>::namespaced(self.client.clone(), &self.namespace());
        let wanted = TokenRequestSpec { expiration_seconds: Some(3_600), ..TokenRequestSpec::default() };
        let request = TokenRequest { spec: Some(wanted), ..TokenRequest::default() };
        let parameters = PostParams::default();
        let given = insist(|| api.create_token_request(name, &parameters, &request)).await?;
        let folder = self.folder.join("account");
        fs::create_dir_all(&folder)?;
        fs::write(folder.join("token"), given.status.and_then(|status| status.token).context("no token")?)?;
        fs::write(folder.join("namespace"), self.namespace())?;
        fs::copy(self.certificate, folder.join("ca.crt"))?;
        Ok(Some(Mount { source: folder, path: ACCOUNT.into(), read_only: true, comes_through: false }))
    }
}

/// A folder or file of the node, of the pod or of the machine, that a container sees.
pub(super) struct Mount {
    pub(super) source: PathBuf,
    pub(super) path: String,
    pub(super) read_only: bool,
    /// What the container mounts there, its node sees as well.
    pub(super) comes_through: bool,
}

fn is_privileged(container: &Container) -> bool {
    container.security_context.as_ref().and_then(|context| context.privileged) == Some(true)
}

/// What `bwrap` is told of a container's root and its mounts. The image is made read-only last, by [`security`]: what is mounted
/// needs a folder.
fn sandbox(root: &Path, mounts: &[Mount]) -> Vec<OsString> {
    let namespaces = ["--die-with-parent", "--unshare-pid", "--unshare-ipc", "--unshare-uts", "--as-pid-1"];
    let mut arguments: Vec<OsString> = namespaces.map(Into::into).into();
    arguments.extend(["--bind".into(), root.into(), "/".into()]);
    arguments.extend(["--proc", "/proc", "--dev", "/dev", "--ro-bind", "/sys", "/sys"].map(Into::into));
    for mount in mounts {
        let bind = if mount.read_only { "--ro-bind" } else { "--bind" };
        arguments.extend([bind.into(), mount.source.clone().into(), (&mount.path).into()]);
    }
    arguments
}

/// The capabilities of a container that wants none of those that a runtime gives by itself, and its read-only root.
fn security(container: &Container) -> Result<Vec<String>> {
    let context = container.security_context.clone().unwrap_or_default();
    let capabilities =
        context.capabilities.context("the lab's containers say which capabilities they want")?;
    ensure!(capabilities.drop.as_deref() == Some(&["ALL".to_owned()]), "the lab's containers drop ALL first");
    let no_escalation = context.allow_privilege_escalation == Some(false);
    ensure!(no_escalation, "the lab's containers allow no escalation of privileges");
    let mut arguments = vec!["--cap-drop".to_owned(), "ALL".to_owned()];
    for name in capabilities.add.iter().flatten() {
        arguments.extend(["--cap-add".to_owned(), format!("CAP_{name}")]);
    }
    if context.read_only_root_filesystem == Some(true) {
        arguments.extend(["--remount-ro".to_owned(), "/".to_owned()]);
    }
    Ok(arguments)
}

/// Has a command inherit an open file, and gives the descriptor's number.
fn inherited(command: &mut Command, file: File) -> String {
    let descriptor = file.as_raw_fd();
    // SAFETY: the closure makes one system call on a descriptor that it owns, and allocates nothing.
    unsafe {
        command.pre_exec(move || match libc::fcntl(file.as_raw_fd(), libc::F_SETFD, 0) {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        });
    }
    descriptor.to_string()
}
