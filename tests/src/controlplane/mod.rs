//! A real control plane for a lab: etcd, `kube-apiserver` and `kube-controller-manager` in a namespace of their own on the
//! nodes' network, with a thin kubelet and a scheduler inside this process.
//!
//! Nodes reach the API server at its address in the lab. This process, and a person's `kubectl`, reach it through a
//! forwarder that listens on loopback: there is no route.

mod binaries;
mod container;
pub mod dns;
mod etcd;
mod forward;
mod kubelet;
mod objects;
mod privileged;
mod scheduler;

pub use binaries::{Binaries, FOLDER_VARIABLE, target_folder};
pub(crate) use binaries::{COREDNS, Extra, HELM, go, version};
pub(crate) use etcd::Stored;

use crate::lab::{Lab, Node, Place, Process, at};
use anyhow::{Context, Result, ensure};
use kube::Client;
use serde_json::{Value, json};
use std::fs;
use std::future::Future;
use std::net::{Ipv4Addr, SocketAddr};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// The last byte of the control plane's address on the nodes' network.
const HOST: u8 = 2;
/// The API server's address and port in the lab.
pub const API_SERVER: (Ipv4Addr, u16) = (Ipv4Addr::new(192, 168, 100, 2), 6443);
/// etcd's port for clients, on loopback of the control plane's namespace.
const ETCD_PORT: u16 = 2379;
/// How long each program may take to be ready.
const START_TIME: Duration = Duration::from_secs(90);
/// Who may do what: token, user, uid, groups. Portolan is `system:kube-proxy`: the cluster's own role for it.
const TOKENS: &str = "admin-token,admin,uid-admin,\"system:masters\"\n\
    proxy-token,system:kube-proxy,uid-proxy\n\
    controllers-token,system:kube-controller-manager,uid-controllers,\"system:masters\"\n\
    kubelet-token,lab:kubelet,uid-kubelet,\"system:masters\"\n";

/// A running control plane. Dropping it ends it.
pub struct ControlPlane {
    place: Place,
    folder: PathBuf,
    logs: PathBuf,
    binaries: Binaries,
    etcd: Process,
    api_server: Mutex<Option<Process>>,
    controllers: Mutex<Option<Process>>,
    client: Client,
    /// Last: the kubelet's and the forwarder's tasks end with it.
    runtime: Option<tokio::runtime::Runtime>,
}

impl ControlPlane {
    /// Starts it and makes the lab's nodes Nodes. The kubelet and the scheduler run from then on.
    pub fn start(lab: &Lab) -> Result<Self> {
        Self::start_telling(lab, &|_| {})
    }

    /// The same, telling each step.
    pub fn start_telling(lab: &Lab, tell: &dyn Fn(&str)) -> Result<Self> {
        let binaries = Binaries::find_or_build()?;
        let place = lab.add_outside("control-plane", HOST)?;
        lab.route_to_pods(&place)?;
        let folder = lab.folder().join("control-plane");
        let logs = lab.logs();
        fs::create_dir_all(&folder)?;
        fs::write(folder.join("tokens.csv"), TOKENS)?;
        objects::write_account_keys(&folder)?;
        tell("starting etcd");
        let etcd = start_etcd(&binaries, &place, &folder, &logs)?;
        tell("starting kube-apiserver");
        let api_server = start_api_server(&binaries, &place, &folder, &logs)?;
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
        let forwarder = runtime.block_on(forward::listen(place.clone(), at(API_SERVER.0, API_SERVER.1)))?;
        write_kubeconfigs(&folder, forwarder)?;
        for node in lab.nodes() {
            write_kubelet_kubeconfig(node)?;
        }
        let client = runtime.block_on(client(&folder.join("kubelet.kubeconfig")))?;
        let plane = Self {
            place,
            folder,
            logs,
            binaries,
            etcd,
            api_server: Mutex::new(Some(api_server)),
            controllers: Mutex::new(None),
            client,
            runtime: Some(runtime),
        };
        plane.wait_for_api_server()?;
        tell("starting kube-controller-manager");
        plane.start_controllers()?;
        plane.block_on(objects::create_nodes(&plane.client, lab.nodes()))?;
        plane.spawn(scheduler::run(plane.client.clone(), names(lab)));
        plane.spawn(kubelet::run(plane.client.clone(), lab.nodes().to_vec(), plane.folder.clone()));
        Ok(plane)
    }

    fn runtime(&self) -> &tokio::runtime::Runtime {
        self.runtime.as_ref().expect("the runtime is taken only by drop")
    }

    /// Runs a future to its end.
    pub fn block_on<T>(&self, future: impl Future<Output = T>) -> T {
        self.runtime().block_on(future)
    }

    /// Lets a future run beside.
    pub(crate) fn spawn(&self, future: impl Future<Output = ()> + Send + 'static) {
        self.runtime().spawn(future);
    }

    /// A client with all rights, to be used within [`ControlPlane::block_on`].
    pub fn client(&self) -> &Client {
        &self.client
    }

    /// For agents: `system:kube-proxy`, and the API server's address in the lab.
    pub fn agent_kubeconfig(&self) -> PathBuf {
        self.folder.join("proxy.kubeconfig")
    }

    /// For a person at this machine: all rights, by way of the forwarder.
    pub fn admin_kubeconfig(&self) -> PathBuf {
        self.folder.join("admin.kubeconfig")
    }

    /// Where the lab's kubelet finds programs by the name of their image.
    fn images(&self) -> PathBuf {
        self.folder.join(kubelet::IMAGES)
    }

    /// Has the lab's kubelet know the image of an OCI archive, and says by which name.
    pub fn load_image(&self, archive: &Path) -> Result<String> {
        container::load(archive, &self.images())
    }

    /// Has it know an image that holds one program of this machine, and the folders of this machine by which that works.
    pub fn make_image(&self, name: &str, program: &Path, at: &str) -> Result<()> {
        container::make(&self.images().join(name), program, at)
    }

    /// Where `kubectl` is.
    pub fn kubectl_program(&self) -> PathBuf {
        self.binaries.path("kubectl")
    }

    /// Where `kube-proxy` is: beside the control plane's programs, or in PATH as they are.
    pub fn kube_proxy_program(&self) -> PathBuf {
        self.binaries.path("kube-proxy")
    }

    /// The command that starts kube-proxy on a node, in the mode `nftables` or `iptables`.
    pub fn kube_proxy(&self, node: &Node, mode: &str) -> Result<Command> {
        kube_proxy(&self.binaries, node, mode, &self.agent_kubeconfig())
    }

    /// The place where the programs run.
    pub fn place(&self) -> &Place {
        &self.place
    }

    /// Runs `kubectl`, with a text on its standard input, and returns what it printed.
    pub fn kubectl(&self, arguments: &[&str], input: &str) -> Result<String> {
        let mut child = Command::new(self.kubectl_program())
            .arg("--kubeconfig")
            .arg(self.admin_kubeconfig())
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .context("kubectl")?;
        if let Some(mut stdin) = child.stdin.take() {
            std::io::Write::write_all(&mut stdin, input.as_bytes())?;
        }
        let output = child.wait_with_output()?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        ensure!(
            output.status.success(),
            "kubectl {}: {text}{}",
            arguments.join(" "),
            String::from_utf8_lossy(&output.stderr)
        );
        Ok(text)
    }

    /// Where `helm` is.
    pub fn helm_program(&self) -> Result<PathBuf> {
        self.binaries.find_or_build_extra(HELM)
    }

    /// Runs `helm`, which has no folder of its own on this machine, and returns what it printed.
    pub fn helm(&self, arguments: &[&str]) -> Result<String> {
        let home = self.folder.join("helm");
        let folders =
            [("HELM_CACHE_HOME", "cache"), ("HELM_CONFIG_HOME", "config"), ("HELM_DATA_HOME", "data")];
        let output = Command::new(self.helm_program()?)
            .arg("--kubeconfig")
            .arg(self.admin_kubeconfig())
            .args(arguments)
            .envs(folders.map(|(variable, folder)| (variable, home.join(folder))))
            .output()
            .context("helm")?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let error = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "helm {}: {text}{error}", arguments.join(" "));
        Ok(text)
    }

    /// Makes or changes objects by server-side apply.
    pub fn apply(&self, objects: &[Value]) -> Result<()> {
        self.block_on(objects::apply(&self.client, objects))
    }

    /// Deletes objects, named by their manifests.
    pub fn delete(&self, objects: &[Value]) -> Result<()> {
        self.block_on(objects::delete(&self.client, objects))
    }

    /// Waits until so many endpoints of a Service in `default` are ready.
    pub fn wait_for_endpoints(&self, service: &str, count: usize, timeout: Duration) -> Result<()> {
        let end = Instant::now() + timeout;
        loop {
            let ready = self.block_on(objects::ready_endpoints(&self.client, service))?;
            if ready == count {
                return Ok(());
            }
            ensure!(
                Instant::now() < end,
                "the Service {service} has {ready} ready endpoints after {timeout:?}, not {count}"
            );
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    fn wait_for_api_server(&self) -> Result<()> {
        let end = Instant::now() + START_TIME;
        while let Err(error) = self.block_on(objects::is_ready(&self.client)) {
            let api_server = self.api_server.lock().unwrap_or_else(PoisonError::into_inner);
            let running = api_server.as_ref().is_some_and(|process| process.exit_status().is_none());
            let log = || api_server.as_ref().map(Process::log).unwrap_or_default();
            ensure!(
                running && Instant::now() < end,
                "the API server is not ready: {error:#}\n{}",
                crate::lab::last_lines(&log(), 20)
            );
            drop(api_server);
            std::thread::sleep(Duration::from_millis(100));
        }
        Ok(())
    }

    /// Ends the API server.
    pub fn stop_api_server(&self) {
        self.api_server.lock().unwrap_or_else(PoisonError::into_inner).take();
    }

    /// Starts it again and waits until it is ready.
    pub fn start_api_server(&self) -> Result<()> {
        let process = start_api_server(&self.binaries, &self.place, &self.folder, &self.logs)?;
        *self.api_server.lock().unwrap_or_else(PoisonError::into_inner) = Some(process);
        self.wait_for_api_server()
    }

    /// Whether etcd runs.
    pub fn etcd_runs(&self) -> bool {
        self.etcd.exit_status().is_none()
    }

    fn start_controllers(&self) -> Result<()> {
        let mut command = self.place.command(self.binaries.path("kube-controller-manager"))?;
        command.arg("--kubeconfig").arg(self.folder.join("controllers.kubeconfig"));
        command.arg("--cert-dir").arg(self.folder.join("controllers-certs"));
        command.args(["--leader-elect=false", "--bind-address=127.0.0.1", "--secure-port=10257"]);
        command.arg(
            "--controllers=endpointslice-controller,endpointslice-mirroring-controller,statefulset-controller,\
             daemonset-controller,deployment-controller,replicaset-controller,garbage-collector-controller,\
             namespace-controller,service-cidr-controller",
        );
        let process = Process::start(&self.logs, "kube-controller-manager", command)?;
        *self.controllers.lock().unwrap_or_else(PoisonError::into_inner) = Some(process);
        Ok(())
    }
}

/// The command that starts kube-proxy on a node, in the mode `nftables` or `iptables`, against any API server.
pub fn kube_proxy(binaries: &Binaries, node: &Node, mode: &str, kubeconfig: &Path) -> Result<Command> {
    let mut command = node.place().command(binaries.path("kube-proxy"))?;
    command.arg("--kubeconfig").arg(kubeconfig);
    command.arg(format!("--hostname-override={}", node.name()));
    command.arg(format!("--proxy-mode={mode}"));
    command.arg(format!("--cluster-cidr={}", crate::lab::POD_RANGES));
    command.args([
        "--conntrack-max-per-core=0",
        "--conntrack-tcp-timeout-established=0",
        "--conntrack-tcp-timeout-close-wait=0",
        "--healthz-bind-address=127.0.0.1:10256",
        "--metrics-bind-address=127.0.0.1:10249",
    ]);
    Ok(command)
}

impl Drop for ControlPlane {
    fn drop(&mut self) {
        if std::thread::panicking() {
            container::tell_logs(&self.folder);
        }
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_timeout(Duration::from_secs(2));
        }
    }
}

fn names(lab: &Lab) -> Vec<String> {
    lab.nodes().iter().map(|node| node.name().to_owned()).collect()
}

fn start_etcd(binaries: &Binaries, place: &Place, folder: &Path, logs: &Path) -> Result<Process> {
    let mut command = place.command(binaries.path("etcd"))?;
    command.args(["--name", "lab", "--log-level", "warn", "--unsafe-no-fsync"]);
    command.arg("--data-dir").arg(folder.join("etcd"));
    let clients = format!("http://127.0.0.1:{ETCD_PORT}");
    let peers = format!("http://127.0.0.1:{}", ETCD_PORT + 1);
    for flag in ["--listen-client-urls", "--advertise-client-urls"] {
        command.args([flag, &clients]);
    }
    for flag in ["--listen-peer-urls", "--initial-advertise-peer-urls"] {
        command.args([flag, &peers]);
    }
    command.args(["--initial-cluster", &format!("lab={peers}")]);
    let etcd = Process::start(logs, "etcd", command)?;
    let end = Instant::now() + START_TIME;
    let client = crate::lab::Client::at(place);
    while client.connect(at(Ipv4Addr::LOCALHOST, ETCD_PORT)).is_err() {
        ensure!(
            etcd.exit_status().is_none() && Instant::now() < end,
            "etcd is not ready\n{}",
            crate::lab::last_lines(&etcd.log(), 20)
        );
        std::thread::sleep(Duration::from_millis(50));
    }
    Ok(etcd)
}

fn start_api_server(binaries: &Binaries, place: &Place, folder: &Path, logs: &Path) -> Result<Process> {
    let mut command = place.command(binaries.path("kube-apiserver"))?;
    command.arg(format!("--etcd-servers=http://127.0.0.1:{ETCD_PORT}"));
    command.args(["--bind-address=0.0.0.0", &format!("--secure-port={}", API_SERVER.1)]);
    command.arg(format!("--advertise-address={}", API_SERVER.0));
    for (flag, file) in [
        ("--cert-dir", "certs"),
        ("--token-auth-file", "tokens.csv"),
        ("--service-account-key-file", "accounts.pub"),
        ("--service-account-signing-key-file", "accounts.key"),
    ] {
        command.arg(flag).arg(folder.join(file));
    }
    command.args([
        // As kubeadm starts it: kube-proxy's own pods are privileged.
        "--allow-privileged=true",
        "--authorization-mode=RBAC",
        "--service-account-issuer=https://kubernetes.default.svc",
        "--disable-admission-plugins=ServiceAccount,DefaultTolerationSeconds",
    ]);
    command.arg(format!("--service-cluster-ip-range={}", crate::lab::SERVICE_RANGES));
    Process::start(logs, "kube-apiserver", command)
}

/// What kubeadm writes for the kubelet of a node, without its credentials: the lab's kubelet is none of the node's programs.
fn write_kubelet_kubeconfig(node: &Node) -> Result<()> {
    let server = format!("https://{}:{}", API_SERVER.0, API_SERVER.1);
    let config = json!({
        "apiVersion": "v1", "kind": "Config", "clusters": [{ "name": "lab", "cluster": { "server": server } }],
    });
    fs::create_dir_all(node.etc("kubernetes"))?;
    let file = node.etc("kubernetes").join("kubelet.conf");
    fs::write(&file, config.to_string())?;
    Ok(fs::set_permissions(file, fs::Permissions::from_mode(0o600))?)
}

/// A kubeconfig for each user: for agents and controllers with the address in the lab, for others the forwarder's.
fn write_kubeconfigs(folder: &Path, forwarder: SocketAddr) -> Result<()> {
    let inside = format!("https://{}:{}", API_SERVER.0, API_SERVER.1);
    let outside = format!("https://{forwarder}");
    let certificate = folder.join("certs/apiserver.crt");
    for (user, server) in
        [("proxy", &inside), ("controllers", &inside), ("kubelet", &outside), ("admin", &outside)]
    {
        // The certificate is made out to `localhost` and to the address in the lab.
        let name = if server == &outside { "localhost".into() } else { API_SERVER.0.to_string() };
        let text = format!(
            "apiVersion: v1\nkind: Config\ncurrent-context: lab\n\
             clusters: [{{name: lab, cluster: {{server: \"{server}\", tls-server-name: \"{name}\", \
             certificate-authority: {}}}}}]\n\
             users: [{{name: lab, user: {{token: {user}-token}}}}]\n\
             contexts: [{{name: lab, context: {{cluster: lab, user: lab}}}}]\n",
            certificate.display()
        );
        fs::write(folder.join(format!("{user}.kubeconfig")), text)?;
    }
    Ok(())
}

/// A client from a kubeconfig, once the API server has written its certificate.
async fn client(kubeconfig: &Path) -> Result<Client> {
    let certificate = kubeconfig.with_file_name("certs").join("apiserver.crt");
    let end = Instant::now() + START_TIME;
    while !certificate.is_file() {
        ensure!(Instant::now() < end, "the API server has not written {}", certificate.display());
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let config = kube::config::Kubeconfig::read_from(kubeconfig)?;
    let config =
        kube::Config::from_custom_kubeconfig(config, &kube::config::KubeConfigOptions::default()).await?;
    Ok(Client::try_from(config)?)
}

/// What the kubelet and the scheduler share: nodes by name.
type Nodes = Vec<Arc<crate::lab::Node>>;
