//! What the tests of this tier share: laboratories by kind, each made once and removed when the program ends, and a
//! [`World`] per test with names, addresses and ports of its own. When a test fails, its World tells what the nodes knew.
//!
//! Each laboratory has three nodes. `web-1` and `shell-1` are pods of `node-1`, `web-3` and `shell-2` of `node-2`, `shell-3` is
//! the only pod of `node-3`. `db-1`, of `node-1` too, serves as they do, but a policy of netfilter's FORWARD drops what `shell-1`
//! sends to it. The agent of `node-2` keeps clients' sources (`--keep-client-source`), the others have netfilter translate them. The `web` pods serve TCP and UDP on [`TARGET`], and each node itself serves on [`HOST_TARGET`].

use dataplane_common::frontend::FrontendKey;
use dataplane_common::{Port, Protocol, tables};
use dataplane_tests::lab::{
    Addresses, AgentOptions, Answer, Asked, Client, Endpoint, Failure, Family, Lab, Node, Options, Pod,
    PodNetwork, PodOptions, Service, at,
};
use dataplane_user::kernel::maps::Map;
use dataplane_user::kernel::pins::Pins;
use serde_json::json;
use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::atomic::{AtomicU16, Ordering};
use std::sync::{Arc, Mutex, Once, OnceLock, PoisonError};
use std::time::{Duration, Instant};

/// The port of `web` pods.
pub(crate) const TARGET: u16 = 8080;
/// The port of servers in the nodes' own networks.
pub(crate) const HOST_TARGET: u16 = 9000;
/// The port of every Service.
pub(crate) const PORT: u16 = 80;
/// How long silence must last to count as a drop.
pub(crate) const SILENCE: Duration = Duration::from_millis(400);
/// What is refused at once is refused within this time: less than the second after which a SYN is sent again.
pub(crate) const AT_ONCE: Duration = Duration::from_millis(800);
/// How often a machine may be too busy for that.
const TRIES: usize = 3;
/// How long a client waits for an answer that must come.
pub(crate) const PATIENCE: Duration = Duration::from_secs(10);
/// How long a change may take to arrive in every kernel.
const ARRIVAL: Duration = Duration::from_secs(60);
/// Requests from which the spread over two endpoints is told: one is missed once in 2^23 runs.
pub(crate) const MANY: usize = 24;

/// A kind of laboratory. Tests with the same kind share one.
///
/// Together they have every pod network, every value of `--socket-lb` and `--xdp`, strict `rp_filter` or not and tx checksumming
/// on and off, and the pairs of these that meet in one program or at one interface; not each with each.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Kind {
    /// Host routes, socket hooks for all.
    Plain,
    /// Host routes, no tx checksumming, strict `rp_filter`, no socket hooks.
    PacketPath,
    /// Pods on a bridge, no tx checksumming, everything by default: socket hooks for the node only.
    BridgeHostSockets,
    /// Pods on a bridge, tx checksumming, strict `rp_filter`, no socket hooks.
    BridgePacketPath,
    /// Host routes, native XDP on uplinks, strict `rp_filter`, socket hooks for all.
    Xdp,
    /// Host routes between nodes behind a router, generic XDP on uplinks, no socket hooks.
    RoutedGenericXdp,
    /// A VXLAN overlay, tx checksumming, strict `rp_filter`, no socket hooks.
    Vxlan,
    /// A VXLAN overlay between nodes behind a router, native XDP on their own uplinks, socket hooks for the node only.
    RoutedVxlanXdp,
    /// Tunnels without Ethernet headers, strict `rp_filter`, native XDP on the nodes' own uplinks, no socket hooks.
    TunXdp,
    /// Tunnels without Ethernet headers between nodes behind a router, tx checksumming, socket hooks for all.
    RoutedTun,
}

impl Kind {
    fn options(self) -> Options {
        let options = Options::default().strict_rp_filter(self.is_strict());
        match self {
            Self::Plain => options,
            Self::PacketPath => options.tx_checksums(false),
            Self::BridgeHostSockets => options.pods(PodNetwork::Bridge).tx_checksums(false),
            Self::BridgePacketPath => options.pods(PodNetwork::Bridge),
            Self::Xdp => options.xdp(true),
            // XDP needs checksums that are there, in the stack as well.
            Self::RoutedGenericXdp => options.routed(true).tx_checksums(false),
            Self::Vxlan => options.pods(PodNetwork::Vxlan),
            Self::RoutedVxlanXdp => options.pods(PodNetwork::Vxlan).routed(true).xdp(true),
            Self::TunXdp => options.pods(PodNetwork::Tun).xdp(true),
            Self::RoutedTun => options.pods(PodNetwork::Tun).routed(true),
        }
    }

    fn arguments(self) -> &'static [&'static str] {
        match self {
            Self::Plain | Self::RoutedTun => &["--socket-lb=all"],
            Self::PacketPath | Self::BridgePacketPath | Self::Vxlan => &["--socket-lb=off"],
            Self::BridgeHostSockets => &[],
            Self::Xdp => &["--xdp=native", "--socket-lb=all"],
            Self::RoutedGenericXdp => &["--xdp=generic", "--socket-lb=off"],
            Self::RoutedVxlanXdp => &["--xdp=native"],
            Self::TunXdp => &["--xdp=native", "--socket-lb=off"],
        }
    }

    /// Whether the node itself reaches node ports on its own addresses: there is no packet path.
    pub(crate) fn serves_own_node_ports(self) -> bool {
        !self.arguments().contains(&"--socket-lb=off")
    }

    /// Whether the TCP connections of pods go by packet, and not by the socket hooks.
    pub(crate) fn pods_connect_by_packet(self) -> bool {
        !self.arguments().contains(&"--socket-lb=all")
    }

    /// Whether nodes reach the pods of others through a tunnel, and each other beside it.
    pub(crate) fn has_tunnel(self) -> bool {
        match self {
            Self::Plain | Self::PacketPath | Self::BridgeHostSockets | Self::BridgePacketPath => false,
            Self::Xdp | Self::RoutedGenericXdp => false,
            Self::Vxlan | Self::RoutedVxlanXdp | Self::TunXdp | Self::RoutedTun => true,
        }
    }

    /// Whether `rp_filter` is strict.
    fn is_strict(self) -> bool {
        match self {
            Self::PacketPath | Self::BridgePacketPath | Self::Xdp | Self::Vxlan | Self::TunXdp => true,
            Self::Plain | Self::BridgeHostSockets | Self::RoutedGenericXdp => false,
            Self::RoutedVxlanXdp | Self::RoutedTun => false,
        }
    }
}

/// Makes a test of a body for each kind of laboratory; it runs for each family.
macro_rules! everywhere {
    ($($body:tt)*) => {
        crate::world::in_kinds! {
            plain Plain
            packet_path_without_checksums_strict PacketPath
            bridge_without_checksums_sockets_of_hosts BridgeHostSockets
            bridge_packet_path_strict BridgePacketPath
            native_xdp_strict Xdp
            behind_a_router_generic_xdp_packet_path RoutedGenericXdp
            vxlan_packet_path_strict Vxlan
            vxlan_behind_a_router_native_xdp_sockets_of_hosts RoutedVxlanXdp
            tun_native_xdp_packet_path_strict TunXdp
            tun_behind_a_router RoutedTun;
            $($body)*
        }
    };
}
pub(crate) use everywhere;

/// The same where all nodes share one network, which pods are reached by as well.
macro_rules! on_one_network {
    ($($body:tt)*) => {
        crate::world::in_kinds! {
            plain Plain
            packet_path_without_checksums_strict PacketPath
            bridge_without_checksums_sockets_of_hosts BridgeHostSockets
            bridge_packet_path_strict BridgePacketPath
            native_xdp_strict Xdp;
            $($body)*
        }
    };
}
pub(crate) use on_one_network;

/// The same on each path by itself: sockets, tc, XDP.
macro_rules! on_all_paths {
    ($($body:tt)*) => {
        crate::world::in_kinds! {
            plain Plain
            bridge_packet_path_strict BridgePacketPath
            native_xdp_strict Xdp;
            $($body)*
        }
    };
}
pub(crate) use on_all_paths;

/// The same where nothing but the socket hooks and the packet path could make a difference.
macro_rules! on_both_paths {
    ($($body:tt)*) => {
        crate::world::in_kinds! {
            plain Plain
            bridge_packet_path_strict BridgePacketPath;
            $($body)*
        }
    };
}
pub(crate) use on_both_paths;

/// The tests of one body, by the names of their kinds.
macro_rules! in_kinds {
    ($($test:ident $kind:ident)*; $(#[$doc:meta])* fn $name:ident($world:ident) $body:block) => {
        $(#[$doc])*
        mod $name {
            use super::*;

            fn body($world: &crate::world::World) $body

            fn run(kind: crate::world::Kind) {
                for family in dataplane_tests::lab::Family::BOTH {
                    println!("{family:?}");
                    body(&crate::world::World::shared(kind, family));
                }
            }

            $(
                #[test]
                fn $test() {
                    run(crate::world::Kind::$kind);
                }
            )*
        }
    };
}
pub(crate) use in_kinds;

/// TCP or UDP, for what holds for both.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Transport {
    Tcp,
    Udp,
}
pub(crate) use Transport::{Tcp, Udp};

/// Both.
pub(crate) const BOTH: [Transport; 2] = [Tcp, Udp];

/// One request on a new connection or from a new socket.
pub(crate) fn ask(client: &Client, transport: Transport, to: SocketAddr) -> Asked {
    match transport {
        Tcp => client.tcp(to),
        Udp => client.udp(to),
    }
}

/// Many requests, all of which must be answered.
#[track_caller]
pub(crate) fn ask_many(client: &Client, transport: Transport, to: SocketAddr) -> Vec<Answer> {
    (0..MANY)
        .map(|number| {
            ask(client, transport, to)
                .unwrap_or_else(|failure| panic!("{transport:?} {to}, request {number}: {failure}"))
        })
        .collect()
}

/// The names of who answered.
pub(crate) fn pods(answers: &[Answer]) -> BTreeSet<&str> {
    answers.iter().map(|answer| answer.pod.as_str()).collect()
}

/// Asserts that TCP and UDP are refused at once.
#[track_caller]
pub(crate) fn assert_refused(client: &Client, to: SocketAddr) {
    for transport in BOTH {
        assert_transport_refused(client, transport, to);
    }
}

/// Asserts that one of them is refused at once.
#[track_caller]
pub(crate) fn assert_transport_refused(client: &Client, transport: Transport, to: SocketAddr) {
    at_once(&format!("the refusal over {transport:?} by {to}"), || {
        assert_eq!(ask(client, transport, to), Err(Failure::Refused), "{transport:?} {to}");
    });
}

/// Does what must be done within [`AT_ONCE`]. Again if need be: a machine that is busy is slow now and then, and what waits for
/// another SYN is slow always.
#[track_caller]
pub(crate) fn at_once(what: &str, mut act: impl FnMut()) {
    let mut times = Vec::new();
    while times.len() < TRIES {
        let begun = Instant::now();
        act();
        match begun.elapsed() {
            time if time < AT_ONCE => return,
            time => times.push(time),
        }
    }
    panic!("{what} took {times:?}");
}

/// Asserts that nothing answers, neither TCP nor UDP.
#[track_caller]
pub(crate) fn assert_silent(client: &Client, to: SocketAddr) {
    let client = client.clone().timeout(SILENCE);
    for transport in BOTH {
        assert_eq!(ask(&client, transport, to), Err(Failure::TimedOut), "{transport:?} {to}");
    }
}

/// The status of a Service whose load balancer has an address.
pub(crate) fn ingress(address: IpAddr) -> serde_json::Value {
    json!({ "loadBalancer": { "ingress": [{ "ip": address, "ipMode": "VIP" }] } })
}

/// Waits until something is so.
#[track_caller]
pub(crate) fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let end = Instant::now() + ARRIVAL;
    while !condition() {
        assert!(Instant::now() < end, "after {ARRIVAL:?} it is not so that {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// A test's part of a laboratory, with addresses of one family.
pub(crate) struct World {
    kind: Kind,
    family: Family,
    lab: Arc<Lab>,
    number: u16,
    services: Mutex<BTreeMap<String, Service>>,
    changes: AtomicU16,
}

type Labs = Mutex<BTreeMap<Kind, Arc<OnceLock<Arc<Lab>>>>>;
static LABS: Labs = Mutex::new(BTreeMap::new());
/// The number of the next part. It is in its ClusterIPs, and the base of its node ports.
static NUMBER: AtomicU16 = AtomicU16::new(1);

impl World {
    /// A part of the one laboratory of this kind.
    pub(crate) fn shared(kind: Kind, family: Family) -> Self {
        let cell = {
            let mut labs = LABS.lock().unwrap_or_else(PoisonError::into_inner);
            labs.entry(kind).or_default().clone()
        };
        remove_labs_at_exit();
        let lab = cell.get_or_init(|| Arc::new(raise(kind.options(), kind.arguments()))).clone();
        Self::on(kind, family, lab)
    }

    /// A laboratory of its own, of IPv4: default options and these flags of the agents.
    pub(crate) fn own(arguments: &[&str]) -> Self {
        Self::on(Kind::Plain, Family::V4, Arc::new(raise(Options::default(), arguments)))
    }

    /// A laboratory of its own for both families, as [`World::own`] makes it.
    pub(crate) fn own_of_both(arguments: &[&str]) -> [Self; 2] {
        let lab = Arc::new(raise(Options::default(), arguments));
        Family::BOTH.map(|family| Self::on(Kind::Plain, family, lab.clone()))
    }

    fn on(kind: Kind, family: Family, lab: Arc<Lab>) -> Self {
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        Self { kind, family, lab, number, services: Mutex::default(), changes: AtomicU16::new(0) }
    }

    /// What kind of laboratory it is.
    pub(crate) fn kind(&self) -> Kind {
        self.kind
    }

    /// The family of the addresses.
    pub(crate) fn family(&self) -> Family {
        self.family
    }

    /// The laboratory.
    pub(crate) fn lab(&self) -> &Lab {
        &self.lab
    }

    /// A node by its number, from 1.
    pub(crate) fn node(&self, number: usize) -> &Node {
        self.lab.node(number - 1)
    }

    /// A pod by its name.
    pub(crate) fn pod(&self, name: &str) -> Arc<Pod> {
        self.lab.pod(name).unwrap_or_else(|| panic!("no pod {name}"))
    }

    /// A client in a pod.
    pub(crate) fn in_pod(&self, name: &str) -> Client {
        Client::at(self.pod(name).place()).timeout(PATIENCE)
    }

    /// A client on a node itself.
    pub(crate) fn on_node(&self, number: usize) -> Client {
        Client::at(self.node(number).place()).timeout(PATIENCE)
    }

    /// The client outside.
    pub(crate) fn outside(&self) -> Client {
        Client::at(self.lab.client()).timeout(PATIENCE)
    }

    /// The endpoints `web-1` (on `node-1`) and `web-3` (on `node-2`).
    pub(crate) fn webs(&self) -> [Endpoint; 2] {
        ["web-1", "web-3"].map(|name| self.pod(name).endpoint())
    }

    /// The server of a node's own network as an endpoint.
    pub(crate) fn host_endpoint(&self, number: usize) -> Endpoint {
        let node = self.node(number);
        Endpoint::of(&format!("host-{number}"), node.addresses(), node.name())
    }

    /// A ClusterIP of this test.
    pub(crate) fn cluster_ip(&self, index: u8) -> IpAddr {
        // Of 256 parts in a row no two are in use at once.
        let [_, low] = self.number.to_be_bytes();
        match self.family {
            Family::V4 => Ipv4Addr::new(10, 96, low, index + 1).into(),
            Family::V6 => {
                Ipv6Addr::new(0xfd00, 0x10, 0x96, 0, 0, 0, 0, u16::from_be_bytes([low, index + 1])).into()
            }
        }
    }

    /// A node port of this test.
    pub(crate) fn node_port(&self, index: u16) -> u16 {
        const EACH: u16 = 2;
        assert!(index < EACH);
        30_000 + self.number * EACH + index
    }

    /// The port of servers that this test starts in pods by itself.
    pub(crate) fn own_target(&self) -> u16 {
        20_000 + self.number
    }

    /// A Service of this test, by an index from 0, without ports.
    pub(crate) fn bare_service(&self, index: u8) -> Service {
        Service::new(&format!("t{}-{index}", self.number), self.cluster_ip(index))
    }

    /// A Service of this test, by an index from 0, that serves TCP and UDP on [`PORT`] of its ClusterIP.
    pub(crate) fn cluster_service(&self, index: u8) -> Service {
        self.bare_service(index).tcp(PORT, TARGET).udp(PORT, TARGET)
    }

    /// The same, on the node port of that index too.
    pub(crate) fn node_port_service(&self, index: u8) -> Service {
        let node_port = self.node_port(index.into());
        self.bare_service(index).tcp_node_port(PORT, TARGET, node_port).udp_node_port(PORT, TARGET, node_port)
    }

    /// The same, with an LB IP and an external IP too.
    pub(crate) fn balanced_service(&self, index: u8) -> Service {
        let service = self.node_port_service(index).spec("type", json!("LoadBalancer"));
        service.spec("externalIPs", json!([self.external_ip(index)])).status(ingress(self.lb_ip(index)))
    }

    /// A load balancer IP of this test.
    pub(crate) fn lb_ip(&self, index: u8) -> IpAddr {
        self.beyond(20, index)
    }

    /// An external IP of this test.
    pub(crate) fn external_ip(&self, index: u8) -> IpAddr {
        self.beyond(21, index)
    }

    /// An address that is nowhere in the laboratory: the nodes send what is for it to their gateway.
    fn beyond(&self, network: u8, index: u8) -> IpAddr {
        let [_, low] = self.number.to_be_bytes();
        self.of(Addresses {
            v4: Ipv4Addr::new(172, network, low, index + 1),
            v6: Ipv6Addr::new(0xfd00, 0x172, network.into(), 0, 0, 0, low.into(), u16::from(index) + 1),
        })
    }

    /// Has the client outside reach an address by way of a node.
    pub(crate) fn route_from_outside(&self, address: IpAddr, node: usize) {
        let bits = if address.is_ipv4() { 32 } else { 128 };
        self.lab.route_from_outside(&format!("{address}/{bits}"), node - 1).unwrap();
    }

    /// The ClusterIP and port of the Service of that index.
    pub(crate) fn frontend(&self, index: u8) -> SocketAddr {
        at(self.cluster_ip(index), PORT)
    }

    /// A node's node port of the Service of that index.
    pub(crate) fn node_frontend(&self, node: usize, index: u16) -> SocketAddr {
        at(self.node_ip(node), self.node_port(index))
    }

    /// Writes a Service with its endpoints and waits until every kernel has it.
    pub(crate) fn apply(&self, service: &Service) {
        self.apply_without_waiting(service);
        self.settle();
    }

    /// Writes a Service with its endpoints.
    pub(crate) fn apply_without_waiting(&self, service: &Service) {
        self.lab.manifests().apply(service).unwrap();
        let mut services = self.services.lock().unwrap_or_else(PoisonError::into_inner);
        services.insert(service.name().to_owned(), service.clone());
    }

    /// Deletes a Service with its endpoints and waits until no kernel has it.
    pub(crate) fn delete(&self, service: &Service) {
        self.lab.manifests().delete(service).unwrap();
        self.services.lock().unwrap_or_else(PoisonError::into_inner).remove(service.name());
        self.settle();
    }

    /// Waits until every kernel has what was written before, and has no more what was removed.
    pub(crate) fn settle(&self) {
        // A marker's frontend comes before the removals of the same update, and after those of the one before.
        self.mark();
        self.mark();
    }

    /// Writes a Service and waits until every kernel has it.
    fn mark(&self) {
        let port = self.changes.fetch_add(1, Ordering::Relaxed) + 1;
        let marker = Service::new(&format!("t{}-zz-marker", self.number), self.cluster_ip(200));
        self.lab.manifests().apply(&marker.tcp(port, TARGET)).unwrap();
        for node in self.lab.nodes() {
            let agent = node.agent().unwrap();
            if agent.process().exit_status().is_none() {
                let what = format!("the tables of {} have this test's changes", node.name());
                eventually(&what, || has_frontend(node, self.cluster_ip(200), port));
            }
        }
    }

    /// How often a reason was counted on a node.
    pub(crate) fn count(&self, node: usize, reason: &str) -> u64 {
        let text = self.node(node).portolan(&["drops", "-o", "json"]).unwrap();
        let rows: serde_json::Value = serde_json::from_str(&text).unwrap();
        let row = rows.as_array().unwrap().iter().find(|row| row["reason"] == reason);
        row.unwrap_or_else(|| panic!("no reason {reason}"))["count"].as_u64().unwrap()
    }

    /// The address of a node as others see it.
    pub(crate) fn node_ip(&self, number: usize) -> IpAddr {
        self.of(self.node(number).addresses())
    }

    /// The address that a node has for its pods.
    pub(crate) fn gateway(&self, number: usize) -> IpAddr {
        self.of(self.node(number).gateways())
    }

    /// The address of a node that pods of other nodes see.
    pub(crate) fn node_source(&self, number: usize) -> IpAddr {
        self.of(self.node(number).sources())
    }

    /// Whether pods reach other nodes at their own addresses, Services or not. Where a tunnel leads to pods they come beside it,
    /// which a strict `rp_filter` (of IPv4 alone) takes for forged unless somebody translates their source.
    pub(crate) fn pods_reach_other_nodes(&self) -> bool {
        let reach = !(self.kind.has_tunnel() && self.kind.is_strict() && self.family == Family::V4);
        let direct = self.in_pod("shell-3").timeout(SILENCE).tcp(at(self.node_ip(1), HOST_TARGET));
        assert!(reach || direct == Err(Failure::TimedOut), "{direct:?}");
        reach
    }

    /// Every address of a node that an endpoint may see when the node itself calls.
    pub(crate) fn node_sources(&self, number: usize) -> [IpAddr; 3] {
        [self.node_ip(number), self.node_source(number), self.gateway(number)]
    }

    /// The address of a pod.
    pub(crate) fn pod_ip(&self, name: &str) -> IpAddr {
        self.of(self.pod(name).addresses())
    }

    /// The address of loopback.
    pub(crate) fn loopback(&self) -> IpAddr {
        self.of(Addresses { v4: Ipv4Addr::LOCALHOST, v6: Ipv6Addr::LOCALHOST })
    }

    /// Any address and port, for a socket of this family to be bound to.
    pub(crate) fn any_port(&self) -> SocketAddr {
        at(self.of(Addresses { v4: Ipv4Addr::UNSPECIFIED, v6: Ipv6Addr::UNSPECIFIED }), 0)
    }

    fn of(&self, addresses: Addresses) -> IpAddr {
        addresses.of(self.family)
    }

    /// The address of the client outside.
    pub(crate) fn outside_ip(&self) -> IpAddr {
        self.of(self.lab.client_addresses())
    }

    fn tell(&self) {
        for node in self.lab.nodes() {
            eprintln!("--- {}", node.name());
            for (verb, filter) in
                [("drops", None), ("services", Some(())), ("backends", Some(())), ("flows", Some(()))]
            {
                let text = node.portolan(&[verb]).unwrap_or_else(|error| format!("{error:#}"));
                let own = format!("t{}-", self.number);
                let lines = text.lines().enumerate().filter(|(number, line)| {
                    *number == 0
                        || match filter {
                            Some(()) => line.contains(&own),
                            None => line.split_whitespace().nth(1) != Some("0"),
                        }
                });
                eprintln!("{verb}:");
                lines.take(30).for_each(|(_, line)| eprintln!("  {}", line.get(..170).unwrap_or(line)));
            }
            if let Some(agent) = node.agent() {
                let log = agent.process().log();
                let lines: Vec<_> = log.lines().collect();
                eprintln!("the agent's log:");
                lines[lines.len().saturating_sub(15)..].iter().for_each(|line| eprintln!("  {line}"));
            }
        }
    }
}

impl Drop for World {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.tell();
        }
        let services = self.services.lock().unwrap_or_else(PoisonError::into_inner);
        for service in services.values() {
            let _ = self.lab.manifests().delete(service);
        }
        let _ = self.lab.manifests().remove(&format!("default-t{}-zz-marker.yaml", self.number));
    }
}

/// Whether a node's kernel has a TCP frontend.
pub(crate) fn has_frontend(node: &Node, address: IpAddr, port: u16) -> bool {
    let Ok(map) = Map::<tables::Frontends>::open(&Pins::new(&node.bpffs()).maps()) else { return false };
    let key = FrontendKey::new(address.into(), Port::new(port), Protocol::Tcp as u8);
    map.get(&key).is_ok_and(|found| found.is_some())
}

/// A laboratory with agents and the pods that all tests know.
fn raise(options: Options, arguments: &[&str]) -> Lab {
    let lab = options.create().unwrap();
    for (number, node) in (1..).zip(lab.nodes()) {
        let keeps: &[&str] = if keeps_client_source(number) { &["--keep-client-source"] } else { &[] };
        node.launch_agent(&AgentOptions::default().arguments(arguments).arguments(keeps)).unwrap();
    }
    for (name, node, options) in [
        ("web-1", 0, PodOptions::default()),
        ("shell-1", 0, PodOptions::client()),
        ("web-3", 1, PodOptions::default()),
        ("shell-2", 1, PodOptions::client()),
        ("shell-3", 2, PodOptions::client()),
        ("db-1", 0, PodOptions::default()),
    ] {
        lab.add_pod(name, node, &options).unwrap();
    }
    forbid(&lab, "shell-1", "db-1");
    for (number, node) in (1..).zip(lab.nodes()) {
        let ports = PodOptions::default().tcp(&[HOST_TARGET]).udp(&[HOST_TARGET]);
        node.serve(&format!("host-{number}"), &ports).unwrap();
    }
    for node in lab.nodes() {
        node.wait_for_agent().unwrap();
        let log = node.agent().unwrap().process().log();
        assert!(!log.contains("cannot attach"), "{log}");
    }
    lab
}

/// Whether endpoints of this node (from 1) see clients outside as they are, also with externalTrafficPolicy Cluster.
pub(crate) const fn keeps_client_source(node: usize) -> bool {
    node == 2
}

/// A policy of the node of two pods, as CNIs make them: what the one sends to the other is dropped in FORWARD.
fn forbid(lab: &Lab, client: &str, server: &str) {
    let [client, server] = [client, server].map(|name| lab.pod(name).unwrap());
    let node = lab.nodes().iter().find(|node| node.name() == server.node()).unwrap();
    let rules = Family::BOTH.map(|family| {
        let protocol = if family == Family::V4 { "ip" } else { "ip6" };
        let (from, to) = (client.ip(family), server.ip(family));
        format!("{protocol} saddr {from} {protocol} daddr {to} counter drop")
    });
    let chain = format!("type filter hook forward priority filter; {};", rules.join("; "));
    node.place().run("nft", &[&format!("table inet policies {{ chain forward {{ {chain} }}; }}")]).unwrap();
}

/// Statics are never dropped: without this the laboratories would be the next run's leftovers.
fn remove_labs_at_exit() {
    extern "C" fn remove() {
        // A thread of its own: this one's thread-local values may be gone already.
        let removal = std::thread::spawn(|| {
            let labs = std::mem::take(&mut *LABS.lock().unwrap_or_else(PoisonError::into_inner));
            drop(labs);
        });
        let _ = removal.join();
    }
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        // SAFETY: the function may be called at any time after this and unwinds never: its thread takes a panic.
        unsafe { libc::atexit(remove) };
    });
}
