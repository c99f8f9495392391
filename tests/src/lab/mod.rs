//! The laboratory: a small cluster on one machine, made of network namespaces.
//!
//! A bridge in a namespace of its own joins the nodes and an outside client. A node is a namespace with a cgroup, a pin
//! folder and an agent; a pod is a namespace with a veth to its node and a server in a cgroup below the node's.
//!
//! ```text
//!                 net: br0 192.168.100.1/24, fd00:100::1/64
//!      ┌──────────────┬───────┴──────┬───────────────┐
//!   node-1 .11     node-2 .12     node-3 .13     client .200
//!   10.244.1.0/24  10.244.2.0/24  10.244.3.0/24      fd00:10:244:1::/64 and so on
//!    │    │            │
//!  web-0 web-1       web-2
//! ```
//!
//! Behind a router instead, each node has a network of its own (`192.168.101.0/24`, `fd00:100:1::/64` and so on), and the
//! client stays on `br0`.
//!
//! A lab has no route to the machine's own network and leaves no trace: all that it made is removed when it is dropped,
//! when a signal ends the process, and by the next lab if the process was killed. Labs can run side by side.

mod agent;
pub mod client;
mod connecting;
pub mod layout;
mod leftovers;
pub mod manifests;
mod mounts;
mod network;
mod node;
mod place;
mod process;
mod roots;
pub mod server;
mod settings;
pub mod tunnel;
pub(crate) mod xdp;

pub use agent::{Agent, AgentOptions, Source, portolan};
pub use client::{Answer, Asked, Client, Failure, Stream, ask_datagram, at, next_source};
pub use connecting::under_new_connections;
pub use leftovers::{labs, on_signal_exit_with, sweep, wait_for_signal};
pub use manifests::{Endpoint, Manifests, Service, documents};
pub use network::{Addresses, Family, PodNetwork};
pub use node::{METRICS, Node, Pod, PodOptions};
pub use place::Place;
pub(crate) use process::last_lines;
pub use process::{Process, install, program};
pub use roots::LABS;

use anyhow::{Context, Result, bail};
use leftovers::Traces;
use std::collections::BTreeMap;
use std::fs;
use std::io::Write as _;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::sync::Arc;

/// The ranges of the pods of all nodes.
pub const POD_RANGES: &str = "10.244.0.0/16,fd00:10:244::/48";
/// The ranges of ClusterIPs.
pub const SERVICE_RANGES: &str = "10.96.0.0/16,fd00:10:96::/108";
/// The node ports that Kubernetes gives out.
pub const NODE_PORTS: std::ops::RangeInclusive<u16> = 30_000..=32_767;

/// What a lab is to be.
#[derive(Clone, Debug)]
pub struct Options {
    nodes: u8,
    pods: PodNetwork,
    routed: bool,
    strict_rp_filter: bool,
    tx_checksums: bool,
    xdp: bool,
    bpffs: bool,
    zones: Vec<String>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            nodes: 3,
            pods: PodNetwork::HostRoutes,
            routed: false,
            strict_rp_filter: false,
            tx_checksums: true,
            xdp: false,
            bpffs: true,
            zones: Vec::new(),
        }
    }
}

impl Options {
    /// How many nodes (3 unless told): `node-1`, `node-2` and so on.
    #[must_use]
    pub fn nodes(mut self, nodes: u8) -> Self {
        self.nodes = nodes;
        self
    }

    /// How pods are joined to their node.
    #[must_use]
    pub fn pods(mut self, network: PodNetwork) -> Self {
        self.pods = network;
        self
    }

    /// Each node on a subnet of its own, behind a router that knows where the pods are, in place of one network.
    #[must_use]
    pub fn routed(mut self, routed: bool) -> Self {
        self.routed = routed;
        self
    }

    /// `rp_filter = 1` on every interface of the nodes.
    #[must_use]
    pub fn strict_rp_filter(mut self, strict: bool) -> Self {
        self.strict_rp_filter = strict;
        self
    }

    /// Whether senders leave checksums to their veth (the default), so that a packet between veths has none.
    #[must_use]
    pub fn tx_checksums(mut self, on: bool) -> Self {
        self.tx_checksums = on;
        self
    }

    /// Whether the nodes have a BPF file system where it is by custom (the default). A node without one has an empty folder there
    /// in which nothing can be made, as sysfs is where no init system mounted one.
    #[must_use]
    pub fn bpffs(mut self, mounted: bool) -> Self {
        self.bpffs = mounted;
        self
    }

    /// Prepared for native XDP on the nodes' uplinks: the peer of each runs a program that passes all, and no sender
    /// leaves checksums to its veth.
    #[must_use]
    pub fn xdp(mut self, xdp: bool) -> Self {
        self.xdp = xdp;
        self.tx_checksums &= !xdp;
        self
    }

    /// The zone label of each node in turn; none by default.
    #[must_use]
    pub fn zones(mut self, zones: &[&str]) -> Self {
        self.zones = zones.iter().map(|&zone| zone.to_owned()).collect();
        self
    }

    /// Makes the lab, after removing what killed labs left.
    pub fn create(self) -> Result<Lab> {
        Lab::create(self)
    }
}

/// A running lab. Dropping it removes it.
#[derive(Debug)]
pub struct Lab {
    options: Options,
    nodes: Vec<Arc<Node>>,
    client: Place,
    net: Place,
    manifests: Manifests,
    traces: Traces,
    /// Holds the attachments of the programs on the peers of uplinks.
    _peers: Vec<std::os::fd::OwnedFd>,
}

/// The host number of the outside client in the uplink network.
const CLIENT_HOST: u8 = 200;
/// The host number of the first node.
const FIRST_NODE_HOST: u8 = 11;

/// The host number of a node (counted from 1).
const fn node_host(number: u8) -> u8 {
    FIRST_NODE_HOST + number - 1
}

/// The addresses of a node (counted from 1).
fn node_addresses(options: &Options, number: u8) -> Addresses {
    if options.routed {
        network::uplink_of(number, node_host(number))
    } else {
        network::uplink(node_host(number))
    }
}

impl Lab {
    fn create(options: Options) -> Result<Self> {
        process::open_many_files();
        sweep()?;
        let traces = Traces::claim()?;
        // From here on, dropping what is there takes away what was made.
        let guard = Guard(Some(traces.clone()));
        for folder in ["places", "log"] {
            fs::create_dir_all(traces.folder.join(folder))?;
        }
        let manifests = Manifests::new(&traces.folder.join("manifests"))?;
        let node_names: Vec<_> = (1..=options.nodes).map(|number| format!("node-{number}")).collect();
        let names: Vec<&str> =
            ["net", "client"].into_iter().chain(node_names.iter().map(String::as_str)).collect();
        let mut places = names
            .iter()
            .map(|name| make_place(&traces, name, Path::new(name)))
            .collect::<Result<Vec<_>>>()?;
        let node_places = places.split_off(2);
        let (Some(client), Some(net)) = (places.pop(), places.pop()) else { bail!("no places") };
        let mut lab = Self { options, nodes: Vec::new(), client, net, manifests, traces, _peers: Vec::new() };
        std::mem::forget(guard);
        lab.make_uplinks(&node_places)?;
        for (number, place) in (1..).zip(node_places) {
            lab.nodes.push(Arc::new(Node::new(&lab.traces, &lab.options, number, place)?));
        }
        lab.make_routes()?;
        lab.write_nodes()?;
        if lab.options.xdp {
            lab._peers = lab.net.enter(|| xdp::pass_all(&node_names))??;
        }
        Ok(lab)
    }

    /// The bridge with the client, and for each node a veth whose one end is on the bridge or belongs to the router.
    fn make_uplinks(&self, nodes: &[Place]) -> Result<()> {
        self.net.ip(&network::uplink_bridge())?;
        self.join_bridge(&self.client, CLIENT_HOST)?;
        if self.options.routed {
            self.net.sysctls(&network::FORWARDING)?;
        }
        for (number, place) in (1..).zip(nodes) {
            if self.options.routed {
                self.join_router(place, number)?;
            } else {
                self.join_bridge(place, node_host(number))?;
            }
            if self.options.strict_rp_filter {
                let strict = ["all", "default", "eth0"].map(|name| format!("net/ipv4/conf/{name}/rp_filter"));
                place.sysctls(&strict.each_ref().map(|key| (key.as_str(), "1")))?;
            }
        }
        Ok(())
    }

    fn join_bridge(&self, place: &Place, host: u8) -> Result<()> {
        let line = format!("link set {} master br0 up", place.name());
        self.join(place, vec![line], network::uplink(host), network::uplink(1))
    }

    fn join_router(&self, place: &Place, number: u8) -> Result<()> {
        let router = network::uplink_of(number, 1);
        let own = node_addresses(&self.options, number);
        self.join(place, network::router_side(place.name(), router), own, router)
    }

    /// A veth between a place and the namespace of bridge and router.
    fn join(&self, place: &Place, outer: Vec<String>, own: Addresses, gateway: Addresses) -> Result<()> {
        let name = place.name();
        let mut lines = vec![format!("link add {name} type veth peer name eth0 netns {}", place.namespace())];
        lines.extend(outer);
        self.net.ip(&lines)?;
        place.ip(&network::uplink_side(own, gateway))?;
        self.set_checksums(place, "eth0")?;
        self.set_checksums(&self.net, name)
    }

    fn set_checksums(&self, place: &Place, interface: &str) -> Result<()> {
        if self.options.tx_checksums {
            return Ok(());
        }
        place.enter(|| network::set_tx_checksums(interface, false))?
    }

    /// From each node to the pods of the others: through a tunnel, by the router, or straight to the other node.
    fn make_routes(&self) -> Result<()> {
        let routes = |nodes: &mut dyn Iterator<Item = &Arc<Node>>| -> Vec<_> {
            nodes.flat_map(|node| node.routes_to_pods()).collect()
        };
        if let Some(tunnel) = self.options.pods.tunnel() {
            let peers: Vec<_> = self.nodes.iter().map(|node| node.as_peer()).collect();
            return self.nodes.iter().try_for_each(|node| node.raise_tunnel(tunnel, &peers));
        }
        if self.options.routed {
            return self.net.ip(&routes(&mut self.nodes.iter()));
        }
        for node in &self.nodes {
            node.place().ip(&routes(&mut self.nodes.iter().filter(|other| other.name() != node.name())))?;
        }
        Ok(())
    }

    /// Has the client outside send to a range (`ADDRESS/LENGTH`) by way of a node (index from 0).
    pub fn route_from_outside(&self, range: &str, node: usize) -> Result<()> {
        let family = if range.contains(':') { Family::V6 } else { Family::V4 };
        let by_node = format!("route replace {range} via {}", self.node(node).ip(family));
        if self.options.routed { self.net.ip(&[by_node]) } else { self.client.ip(&[by_node]) }
    }

    /// The Node objects, in `nodes.yaml`.
    fn write_nodes(&self) -> Result<()> {
        let nodes: Vec<_> = self.nodes.iter().map(|node| manifests::node(node)).collect();
        self.manifests.write("nodes.yaml", &manifests::documents(&nodes))
    }

    /// The lab's id: the first part of the names of its namespaces.
    pub fn id(&self) -> &str {
        &self.traces.id
    }

    /// What it was made as.
    pub fn options(&self) -> &Options {
        &self.options
    }

    /// A node by its index, from 0: `node-1` is `node(0)`.
    pub fn node(&self, index: usize) -> &Node {
        &self.nodes[index]
    }

    /// All nodes.
    pub fn nodes(&self) -> &[Arc<Node>] {
        &self.nodes
    }

    /// The outside client's place: on the nodes' network, not a node. Its only route is to that network.
    pub fn client(&self) -> &Place {
        &self.client
    }

    /// The outside client's IPv4 address.
    pub fn client_address(&self) -> Ipv4Addr {
        self.client_addresses().v4
    }

    /// The outside client's addresses.
    pub fn client_addresses(&self) -> Addresses {
        network::uplink(CLIENT_HOST)
    }

    /// The addresses of what [`Lab::add_outside`] adds with that host number.
    pub fn outside_addresses(&self, host: u8) -> Addresses {
        network::uplink(host)
    }

    /// The place of the bridge: what a router outside would see.
    pub fn net(&self) -> &Place {
        &self.net
    }

    /// The manifests that the agents watch.
    pub fn manifests(&self) -> &Manifests {
        &self.manifests
    }

    /// The lab's own folder, removed with it.
    pub fn folder(&self) -> &Path {
        &self.traces.folder
    }

    /// The folder of the outputs of all programs of the lab.
    pub fn logs(&self) -> PathBuf {
        self.traces.folder.join("log")
    }

    /// One more place, on no network yet.
    pub fn add_alone(&self, name: &str) -> Result<Place> {
        let place = make_place(&self.traces, name, Path::new(name))?;
        place.ip(&["link set lo up".into()])?;
        Ok(place)
    }

    /// One more place on the nodes' network: another outside client, or the control plane. `host` is the last byte of its
    /// IPv4 address (2 to 9, 100 to 254 are free, but for the client's 200).
    pub fn add_outside(&self, name: &str, host: u8) -> Result<Place> {
        let place = make_place(&self.traces, name, Path::new(name))?;
        self.join_bridge(&place, host)?;
        Ok(place)
    }

    /// Prepares the uplink of one node for native XDP, as [`Options::xdp`] does for all of them.
    pub fn prepare_for_xdp(&mut self, node: usize) -> Result<()> {
        let node = &self.nodes[node];
        let port = node.name().to_owned();
        node.place().enter(|| network::set_tx_checksums("eth0", false))??;
        let peers = self.net.enter(|| {
            network::set_tx_checksums(&port, false)?;
            xdp::pass_all(&[port])
        });
        self._peers.extend(peers??);
        Ok(())
    }

    /// Routes from an outside place to the pods, each by way of its node: pods call it with their own addresses. A router knows
    /// them already, unless they are behind tunnels.
    pub fn route_to_pods(&self, outside: &Place) -> Result<()> {
        let routes: Vec<_> = self.nodes.iter().flat_map(|node| node.routes_to_pods()).collect();
        match (self.options.routed, self.options.pods.tunnel()) {
            (false, _) => outside.ip(&routes),
            (true, Some(_)) => self.net.ip(&routes),
            (true, None) => Ok(()),
        }
    }

    /// A pod with its server on a node (index from 0).
    pub fn add_pod(&self, name: &str, node: usize, options: &PodOptions) -> Result<Arc<Pod>> {
        self.node(node).add_pod(name, options)
    }

    /// A pod by its name, on whichever node it is.
    pub fn pod(&self, name: &str) -> Option<Arc<Pod>> {
        self.nodes.iter().find_map(|node| node.pod(name))
    }

    /// Prints the end of each agent's log to standard error.
    pub fn tell_agent_logs(&self) {
        self.nodes.iter().for_each(|node| node.tell_agent_log());
    }

    /// Starts an agent on each node that has none and waits until each is ready.
    pub fn start_agents(&self, options: &AgentOptions) -> Result<()> {
        self.nodes.iter().try_for_each(|node| node.launch_agent(options))?;
        self.nodes.iter().try_for_each(|node| node.wait_for_agent())
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.tell_agent_logs();
        }
        self.nodes.clear();
        if let Err(error) = self.traces.remove() {
            complain(&format!("{error:#}"));
        }
    }
}

/// Prints to standard error, also where nobody reads it any more: a panic here would leave the lab behind.
pub(crate) fn complain(text: &str) {
    let _ = writeln!(std::io::stderr(), "{text}");
}

/// Removes a lab whose making failed before there was a [`Lab`].
struct Guard(Option<Traces>);

impl Drop for Guard {
    fn drop(&mut self) {
        if let Some(traces) = self.0.take() {
            let _ = traces.remove();
        }
    }
}

/// A namespace and a cgroup, known to [`exec`] by name.
fn make_place(traces: &Traces, name: &str, cgroup: &Path) -> Result<Place> {
    let place = Place::new(name, &traces.namespace(name), &traces.cgroup.join(cgroup));
    fs::create_dir_all(place.cgroup()).with_context(|| place.cgroup().display().to_string())?;
    network::ip_batch(None, &[format!("netns add {}", place.namespace())])?;
    place.sysctls(&settings::of_a_new_namespace())?;
    process::record(&traces.folder, &place)?;
    Ok(place)
}

/// The places of a lab by name.
pub fn places(id: &str) -> BTreeMap<String, Place> {
    let folder = Path::new(LABS).join(id).join("places");
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries
        .filter_map(|entry| {
            let name = entry.file_name().to_string_lossy().into_owned();
            let text = fs::read_to_string(entry.path()).ok()?;
            let mut lines = text.lines();
            let place = Place::new(&name, lines.next()?, Path::new(lines.next()?));
            let place = match lines.next() {
                Some(resolver) => place.with_resolver(Path::new(resolver)),
                None => place,
            };
            Some((name, place))
        })
        .collect()
}

/// Runs a command in a place of a running lab, with the caller's terminal: of the only lab unless `id` says which.
pub fn exec(id: Option<&str>, place: &str, command: &[String]) -> Result<ExitStatus> {
    let running: Vec<_> = labs().into_iter().filter(|(_, lives)| *lives).map(|(id, _)| id).collect();
    let id = match (id, running.as_slice()) {
        (Some(id), _) => id,
        (None, [id]) => id,
        (None, []) => bail!("no lab runs: start one with `cargo xtask run`"),
        (None, several) => bail!("several labs run, name one with --lab: {}", several.join(" ")),
    };
    let places = places(id);
    let known = || places.keys().cloned().collect::<Vec<_>>().join(" ");
    let place = places
        .get(place)
        .with_context(|| format!("no place {place} in the lab {id}; there are {}", known()))?;
    let (program, arguments) = command.split_first().context("no command")?;
    let status = place.foreground_command(program)?.args(arguments).status();
    status.with_context(|| program.clone())
}
