//! A node of the lab and its pods.

use super::agent::{Agent, AgentOptions};
use super::leftovers::{Traces, end_processes, remove_cgroups, remove_namespace};
use super::mounts;
use super::network::{self, Addresses, Family, PodNetwork};
use super::place::{NAMESPACES, Place};
use super::process::{Process, program};
use super::server::READY;
use super::tunnel::{self, Peer, Tunnel};
use super::{Client, Endpoint, Options, at, make_place};
use anyhow::{Context, Result, ensure};
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::net::{IpAddr, Ipv4Addr};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// How long a program of the lab may take to listen.
const START_TIME: Duration = Duration::from_secs(60);

/// Where an agent, as kube-proxy does, tells its metrics.
pub const METRICS: u16 = 10_249;

/// A node: a namespace with an uplink `eth0`, a cgroup, a pin folder and room for an agent.
#[derive(Debug)]
pub struct Node {
    number: u8,
    /// For what runs on the node itself: its cgroup is a child of the node's.
    place: Place,
    cgroup: PathBuf,
    zone: Option<String>,
    options: Options,
    traces: Traces,
    agent: Mutex<Option<Arc<Agent>>>,
    pods: Mutex<Pods>,
    servers: Mutex<Vec<Process>>,
}

#[derive(Debug, Default)]
struct Pods {
    by_name: BTreeMap<String, Arc<Pod>>,
    addresses: BTreeSet<u8>,
    /// Addresses are given out in a circle, so that one that was freed is not used again soon.
    last: u8,
}

impl Node {
    pub(crate) fn new(traces: &Traces, options: &Options, number: u8, place: Place) -> Result<Self> {
        let cgroup = place.cgroup().to_path_buf();
        let host = Place::new(place.name(), place.namespace(), &cgroup.join("host"));
        fs::create_dir_all(host.cgroup())?;
        fs::create_dir_all(cgroup.join("agent"))?;
        super::process::record(&traces.folder, &host)?;
        let node = Self {
            number,
            place: host,
            cgroup,
            zone: options.zones.get(usize::from(number) - 1).cloned(),
            options: options.clone(),
            traces: traces.clone(),
            agent: Mutex::default(),
            pods: Mutex::default(),
            servers: Mutex::default(),
        };
        node.place.sysctls(&network::FORWARDING)?;
        if options.pods == PodNetwork::Bridge {
            node.place.ip(&network::pod_bridge(node.gateways()))?;
        }
        fs::create_dir_all(node.bpffs())?;
        if !options.bpffs {
            mounts::mount_bare(&node.bpffs())?;
        }
        fs::create_dir_all(node.state_folder())?;
        Ok(node)
    }

    /// Its name: `node-1` and so on.
    pub fn name(&self) -> &str {
        self.place.name()
    }

    /// Its IPv4 address on the nodes' network.
    pub fn address(&self) -> Ipv4Addr {
        self.addresses().v4
    }

    /// Its addresses on the nodes' network.
    pub fn addresses(&self) -> Addresses {
        super::node_addresses(&self.options, self.number)
    }

    /// Its address of a family on the nodes' network.
    pub fn ip(&self, family: Family) -> IpAddr {
        self.addresses().of(family)
    }

    /// The IPv4 range of its pods.
    pub fn pod_range(&self) -> String {
        network::pod_range(self.number, Family::V4)
    }

    /// The ranges of its pods.
    pub fn pod_ranges(&self) -> [String; 2] {
        Family::BOTH.map(|family| network::pod_range(self.number, family))
    }

    /// The routes by which others on the nodes' network reach its pods.
    pub(crate) fn routes_to_pods(&self) -> Vec<String> {
        let routes = self.pod_ranges().into_iter().zip(self.addresses().both());
        routes.map(|(range, address)| format!("route add {range} via {address}")).collect()
    }

    /// What pods of other nodes see when the node itself calls them: the address of its tunnel, if there is one.
    pub fn sources(&self) -> Addresses {
        self.options.pods.tunnel().map_or(self.addresses(), |_| network::tunnel_end(self.number))
    }

    pub(crate) fn as_peer(&self) -> Peer {
        Peer { number: self.number, uplink: self.addresses() }
    }

    /// Makes the tunnel to the others of these nodes.
    pub(crate) fn raise_tunnel(&self, tunnel: Tunnel, all: &[Peer]) -> Result<()> {
        let own = self.as_peer();
        let others: Vec<_> = all.iter().filter(|peer| peer.number != own.number).cloned().collect();
        let lab = self.place.command(program("portolan-lab", "PORTOLAN_LAB_PROGRAM")?)?;
        if let Some(command) = tunnel.program(lab, &own, &others) {
            let carrier = Process::start(&self.logs(), &format!("tunnel-{}", self.name()), command)?;
            carrier.wait_for_line(START_TIME, |line| line == tunnel::READY)?;
            self.servers.lock().unwrap_or_else(PoisonError::into_inner).push(carrier);
        }
        tunnel.raise(&self.place, &own, &others)?;
        if !self.options.tx_checksums {
            self.place.enter(|| network::set_tx_checksums(tunnel.device(), false))??;
        }
        Ok(())
    }

    /// Its IPv4 address towards its pods.
    pub fn gateway(&self) -> Ipv4Addr {
        self.gateways().v4
    }

    /// Its addresses towards its pods.
    pub fn gateways(&self) -> Addresses {
        network::pod(self.number, 1)
    }

    /// The zone that its label says.
    pub fn zone(&self) -> Option<&str> {
        self.zone.as_deref()
    }

    /// The labels of its Node object.
    pub fn labels(&self) -> BTreeMap<String, String> {
        let mut labels = BTreeMap::from([
            ("kubernetes.io/hostname".into(), self.name().to_owned()),
            ("kubernetes.io/os".into(), "linux".into()),
        ]);
        if let Some(zone) = &self.zone {
            labels.insert("topology.kubernetes.io/zone".into(), zone.clone());
        }
        labels
    }

    /// The place of the node's own programs.
    pub fn place(&self) -> &Place {
        &self.place
    }

    /// The place of the node's agent.
    pub(crate) fn agent_place(&self) -> Place {
        Place::new(self.name(), self.place.namespace(), &self.cgroup.join("agent"))
    }

    /// The cgroup above the node's own programs, its agent and its pods: the agent's `--cgroup`.
    pub fn cgroup(&self) -> &Path {
        &self.cgroup
    }

    /// Its pin folder: the agent's `--bpffs`, and `/sys/fs/bpf` of containers.
    pub fn bpffs(&self) -> PathBuf {
        if self.options.bpffs {
            self.traces.pins.join(self.name())
        } else {
            self.traces.folder.join("bpffs").join(self.name())
        }
    }

    /// Takes away the BPF file system that somebody mounted on a node that had none, as a restart does.
    pub fn unmount_bpffs(&self) -> Result<()> {
        ensure!(!self.options.bpffs, "{} shares the machine's BPF file system", self.name());
        mounts::unmount(&self.bpffs())
    }

    /// The agent's `--state-dir`.
    pub fn state_folder(&self) -> PathBuf {
        self.traces.folder.join("state").join(self.name())
    }

    /// What its containers have as a folder of `/etc`.
    pub fn etc(&self, name: &str) -> PathBuf {
        self.traces.folder.join("etc").join(self.name()).join(name)
    }

    /// What agents in containers have as `/run/portolan`.
    pub fn run_folder(&self) -> PathBuf {
        self.traces.folder.join("run").join(self.name())
    }

    /// The folder of the manifests that the agents of this lab watch.
    pub fn manifests_folder(&self) -> PathBuf {
        self.traces.folder.join("manifests")
    }

    fn logs(&self) -> PathBuf {
        self.traces.folder.join("log")
    }

    fn agent_slot(&self) -> MutexGuard<'_, Option<Arc<Agent>>> {
        self.agent.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Starts an agent, unless one runs, and does not wait for it.
    pub fn launch_agent(&self, options: &AgentOptions) -> Result<()> {
        let mut slot = self.agent_slot();
        if slot.as_ref().is_none_or(|agent| agent.process().exit_status().is_some()) {
            *slot = Some(Arc::new(Agent::launch(self, &self.agent_place(), &self.logs(), options)?));
        }
        Ok(())
    }

    /// Waits until its agent is ready.
    pub fn wait_for_agent(&self) -> Result<()> {
        self.agent().with_context(|| format!("{} has no agent", self.name()))?.wait_until_ready()
    }

    /// Starts an agent and waits until it is ready.
    pub fn start_agent(&self, options: &AgentOptions) -> Result<Arc<Agent>> {
        self.launch_agent(options)?;
        self.wait_for_agent()?;
        self.agent().context("the agent is gone")
    }

    /// Its agent, running or not.
    pub fn agent(&self) -> Option<Arc<Agent>> {
        self.agent_slot().clone()
    }

    pub(crate) fn tell_agent_log(&self) {
        if let Some(agent) = self.agent() {
            let log = super::process::last_lines(&agent.process().log(), 40);
            super::complain(&format!("--- log of the agent of {}\n{log}", self.name()));
        }
    }

    /// Runs a verb of `portolan` that takes `--bpffs`, such as `backends`, and returns what it prints.
    pub fn portolan(&self, arguments: &[&str]) -> Result<String> {
        let portolan = super::agent::portolan()?;
        let bpffs = self.bpffs();
        let mut all = arguments.to_vec();
        all.extend(["--bpffs", bpffs.to_str().context("path")?]);
        self.place.run(portolan.to_str().context("path")?, &all)
    }

    /// The same, with its exit code whatever that is; and what it wrote to stderr.
    pub fn portolan_verdict(&self, arguments: &[&str]) -> Result<(i32, String, String)> {
        let mut command = self.place.command(super::agent::portolan()?)?;
        let output = command.args(arguments).arg("--bpffs").arg(self.bpffs()).output()?;
        let code = output.status.code().context("it was killed")?;
        let [out, err] =
            [output.stdout, output.stderr].map(|text| String::from_utf8_lossy(&text).into_owned());
        Ok((code, out, err))
    }

    /// The value of a line of the metrics of its agent that begins so.
    pub fn metric(&self, line: &str) -> Option<f64> {
        let mut stream = Client::at(&self.place).connect(at(Ipv4Addr::LOCALHOST, METRICS)).ok()?;
        let (_, text) = stream.get("/metrics").ok()?;
        text.lines().find_map(|other| other.strip_prefix(line)?.trim().parse().ok())
    }

    fn pods(&self) -> MutexGuard<'_, Pods> {
        self.pods.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A pod by its name.
    pub fn pod(&self, name: &str) -> Option<Arc<Pod>> {
        self.pods().by_name.get(name).cloned()
    }

    /// All its pods, by name.
    pub fn pods_by_name(&self) -> Vec<Arc<Pod>> {
        self.pods().by_name.values().cloned().collect()
    }

    /// Makes a pod and waits until its server listens. The name is unique in the lab.
    pub fn add_pod(&self, name: &str, options: &PodOptions) -> Result<Arc<Pod>> {
        let host = self.reserve_address()?;
        let addresses = network::pod(self.number, host);
        let cgroup = self.cgroup.strip_prefix(&self.traces.cgroup)?.join("pods").join(name);
        let mut place = make_place(&self.traces, name, &cgroup)?;
        if let Some(text) = &options.resolver {
            let file = self.traces.folder.join("resolvers").join(name);
            fs::create_dir_all(file.parent().context("folder")?)?;
            fs::write(&file, text)?;
            place = place.with_resolver(&file);
            super::process::record(&self.traces.folder, &place)?;
        }
        let pod = Pod {
            name: name.into(),
            node: self.name().into(),
            node_place: self.place.clone(),
            addresses,
            place,
            server: Mutex::default(),
            logs: self.logs(),
            record: self.traces.folder.join("places").join(name),
        };
        self.join_pod(&pod)?;
        if options.serves() {
            pod.start_server(options)?;
        }
        let pod = Arc::new(pod);
        self.pods().by_name.insert(name.into(), pod.clone());
        Ok(pod)
    }

    fn reserve_address(&self) -> Result<u8> {
        let mut pods = self.pods();
        let first = *network::POD_ADDRESSES.start();
        let start = pods.last.max(first - 1) + 1;
        let host = (start..=*network::POD_ADDRESSES.end())
            .chain(first..start)
            .find(|host| !pods.addresses.contains(host))
            .with_context(|| format!("{} has no address left for a pod", self.name()))?;
        pods.addresses.insert(host);
        pods.last = host;
        Ok(host)
    }

    fn join_pod(&self, pod: &Pod) -> Result<()> {
        let (network, gateways) = (self.options.pods, self.gateways());
        let namespace = pod.place.namespace();
        self.place.ip(&network::node_side(network, &pod.name, namespace, gateways, pod.addresses))?;
        pod.place.ip(&network::pod_side(network, gateways, pod.addresses))?;
        if !self.options.tx_checksums {
            let interface = pod.node_interface();
            self.place.enter(|| network::set_tx_checksums(&interface, false))??;
            pod.place.enter(|| network::set_tx_checksums("eth0", false))??;
        }
        Ok(())
    }

    /// Takes a pod away at once, as the end of its grace period does.
    pub fn remove_pod(&self, name: &str) -> Result<()> {
        let pod = {
            let mut pods = self.pods();
            let pod = pods.by_name.remove(name).with_context(|| format!("no pod {name}"))?;
            pods.addresses.remove(&pod.address().octets()[3]);
            pod
        };
        pod.remove()
    }

    /// A server of the node's own network (a pod with `hostNetwork`).
    pub fn serve(&self, name: &str, options: &PodOptions) -> Result<()> {
        let server = options.start(&self.place, &self.logs(), name, self.name())?;
        self.servers.lock().unwrap_or_else(PoisonError::into_inner).push(server);
        Ok(())
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        end_processes(&self.cgroup);
    }
}

/// What a pod serves.
#[derive(Clone, Debug)]
pub struct PodOptions {
    tcp: Vec<u16>,
    udp: Vec<u16>,
    /// Where it listens; empty: everywhere.
    addresses: Vec<IpAddr>,
    drain: Duration,
    /// What the pod's programs see as `/etc/resolv.conf`.
    resolver: Option<String>,
    /// A program in place of the pod server, with its arguments.
    program: Option<(PathBuf, Vec<String>)>,
}

impl Default for PodOptions {
    fn default() -> Self {
        Self { tcp: vec![8080], udp: vec![8080], ..Self::client() }
    }
}

impl PodOptions {
    /// A pod without a server: a client.
    pub fn client() -> Self {
        Self {
            tcp: Vec::new(),
            udp: Vec::new(),
            addresses: Vec::new(),
            drain: Duration::ZERO,
            resolver: None,
            program: None,
        }
    }

    /// Serves HTTP on these ports (8080 unless told).
    #[must_use]
    pub fn tcp(mut self, ports: &[u16]) -> Self {
        self.tcp = ports.to_vec();
        self
    }

    /// Serves datagrams on these ports (8080 unless told).
    #[must_use]
    pub fn udp(mut self, ports: &[u16]) -> Self {
        self.udp = ports.to_vec();
        self
    }

    /// Serves at these addresses (everywhere unless told).
    #[must_use]
    pub fn at(mut self, addresses: &[IpAddr]) -> Self {
        self.addresses = addresses.to_vec();
        self
    }

    /// Goes on serving for this time after SIGTERM.
    #[must_use]
    pub fn drain(mut self, time: Duration) -> Self {
        self.drain = time;
        self
    }

    /// The pod's `/etc/resolv.conf` (the machine's own unless told).
    #[must_use]
    pub fn resolver(mut self, text: &str) -> Self {
        self.resolver = Some(text.into());
        self
    }

    /// Runs a program in place of the pod server, and does not wait until it listens.
    #[must_use]
    pub fn program(mut self, program: &Path, arguments: &[String]) -> Self {
        self.program = Some((program.into(), arguments.to_vec()));
        self
    }

    fn serves(&self) -> bool {
        self.program.is_some() || !self.tcp.is_empty() || !self.udp.is_empty()
    }

    fn start(&self, place: &Place, logs: &Path, pod: &str, node: &str) -> Result<Process> {
        if let Some((program, arguments)) = &self.program {
            let mut command = place.command(program)?;
            command.args(arguments);
            return Process::start(logs, pod, command);
        }
        let mut command = place.command(program("portolan-lab", "PORTOLAN_LAB_PROGRAM")?)?;
        command.args(["serve", "--pod", pod, "--node", node]);
        command.arg("--drain").arg(self.drain.as_secs_f64().to_string());
        for (flag, ports) in [("--tcp", &self.tcp), ("--udp", &self.udp)] {
            for port in ports {
                command.arg(flag).arg(port.to_string());
            }
        }
        for address in &self.addresses {
            command.arg("--address").arg(address.to_string());
        }
        let server = Process::start(logs, pod, command)?;
        server.wait_for_line(START_TIME, |line| line == READY)?;
        Ok(server)
    }
}

/// A pod: a namespace with a veth to its node, and a server.
#[derive(Debug)]
pub struct Pod {
    name: String,
    node: String,
    node_place: Place,
    addresses: Addresses,
    place: Place,
    server: Mutex<Option<Arc<Process>>>,
    logs: PathBuf,
    record: PathBuf,
}

impl Pod {
    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The name of its node.
    pub fn node(&self) -> &str {
        &self.node
    }

    /// Its IPv4 address.
    pub fn address(&self) -> Ipv4Addr {
        self.addresses.v4
    }

    /// Its addresses.
    pub fn addresses(&self) -> Addresses {
        self.addresses
    }

    /// Its address of a family.
    pub fn ip(&self, family: Family) -> IpAddr {
        self.addresses.of(family)
    }

    /// Its namespace and cgroup.
    pub fn place(&self) -> &Place {
        &self.place
    }

    /// The node's interface to it.
    pub fn node_interface(&self) -> String {
        network::pod_interface(&self.name)
    }

    /// Itself as a ready endpoint.
    pub fn endpoint(&self) -> Endpoint {
        Endpoint::of(&self.name, self.addresses, &self.node)
    }

    fn slot(&self) -> MutexGuard<'_, Option<Arc<Process>>> {
        self.server.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Its server.
    pub fn server(&self) -> Option<Arc<Process>> {
        self.slot().clone()
    }

    /// Starts a server in it.
    pub fn start_server(&self, options: &PodOptions) -> Result<()> {
        ensure!(
            self.server().is_none_or(|server| server.exit_status().is_some()),
            "{} has a server already",
            self.name
        );
        *self.slot() = Some(Arc::new(options.start(&self.place, &self.logs, &self.name, &self.node)?));
        Ok(())
    }

    /// SIGTERM to its server, which then serves for its time to drain and ends.
    pub fn terminate(&self) {
        if let Some(server) = self.server() {
            server.signal(libc::SIGTERM);
        }
    }

    fn remove(&self) -> Result<()> {
        end_processes(self.place.cgroup());
        if let Some(server) = self.server() {
            server.kill();
        }
        // A namespace goes in the background; its veth must be gone now.
        self.node_place.ip(&[format!("link del {}", self.node_interface())])?;
        remove_namespace(&Path::new(NAMESPACES).join(self.place.namespace()));
        remove_cgroups(self.place.cgroup());
        let _ = fs::remove_file(&self.record);
        Ok(())
    }
}
