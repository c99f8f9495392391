//! The world that random cases are drawn from: one node's network, and the addresses that mean something in it. Small on
//! purpose, so that things meet.

use crate::random::Random;
use dataplane_common::node::Node as NodeFlags;
use dataplane_tests::oracle::{self, Range, ThisNode, Way};
use dataplane_tests::packet::NodeFacts;
use dataplane_tests::packet::family::NARROW as NARROW_MTU;
use dataplane_user::compile::{NodePortAddresses, NodeSettings};
use std::net::IpAddr;
use std::process::Command;

/// The node.
pub(crate) const HERE: &str = "here";
/// Addresses on its uplink.
pub(crate) const NODE: [&str; 2] = ["192.0.2.1", "203.0.113.5"];
/// Pods of this node.
pub(crate) const PODS: [&str; 4] = ["10.244.1.9", "10.244.1.10", "10.244.1.11", "10.244.1.12"];
/// Pods of other nodes.
pub(crate) const FAR: [&str; 5] = ["10.244.2.9", "10.244.2.10", "10.244.2.11", "10.244.2.12", "10.244.2.13"];
/// A pod behind a narrow way.
pub(crate) const NARROW: &str = "10.244.3.9";
/// An endpoint that no route leads to.
pub(crate) const LOST: &str = "10.244.9.9";
/// A server outside the cluster.
pub(crate) const SERVER: &str = "198.51.100.200";
/// Clients outside the cluster, and other nodes.
pub(crate) const OUTSIDE: [&str; 4] = ["198.51.100.7", "198.51.100.8", "192.0.2.2", "10.244.2.9"];
/// Addresses that no host has.
pub(crate) const NOBODY: [&str; 5] = ["127.0.0.2", "169.254.1.1", "224.0.0.5", "255.255.255.255", "0.0.0.0"];
/// LB IPs and external IPs.
pub(crate) const OUTER: [&str; 6] =
    ["203.0.113.100", "203.0.113.101", "203.0.113.102", "198.18.0.1", "203.0.113.5", "192.0.2.1"];
/// The service range, and an address in it that no Service has.
pub(crate) const SERVICE_RANGE: &str = "10.96.0.0/16";
/// Such an address.
pub(crate) const UNKNOWN: &str = "10.96.77.77";
/// Numbers of service ports.
pub(crate) const PORTS: [u16; 4] = [80, 443, 53, 8080];
/// Numbers of node ports.
pub(crate) const NODE_PORTS: [u16; 6] = [30_080, 30_081, 30_082, 30_053, 31_000, 31_001];
/// Source ports of translated flows.
const SOURCE_PORTS: std::ops::RangeInclusive<u16> = 61_000..=61_999;

/// The ClusterIP of a Service by its number.
pub(crate) fn cluster_ip(number: usize) -> String {
    format!("10.96.0.{}", number + 1)
}

/// Adds to the runner's namespace what it does not have.
pub(crate) fn set_up() {
    let mut commands = vec!["addr add 203.0.113.5/32 dev up0".to_owned()];
    for (number, pod) in PODS.iter().enumerate().skip(1) {
        commands.push(format!("route add {pod}/32 dev pod0"));
        commands.push(format!("neigh add {pod} lladdr 02:00:00:00:01:0{number} nud permanent dev pod0"));
    }
    for command in commands {
        let status = Command::new("ip").args(command.split_whitespace()).status();
        assert!(status.is_ok_and(|status| status.success()), "ip {command}");
    }
}

/// Ways through this network.
fn routes() -> Vec<(Range, Way)> {
    let out = |mtu, to_pod| Way::Out { mtu, to_pod };
    let routes = [
        ("0.0.0.0/0", out(1_500, false)),
        ("10.244.1.8/29", out(1_500, true)),
        ("10.244.3.0/24", out(NARROW_MTU as usize, false)),
        ("10.244.9.0/24", Way::None),
        ("127.0.0.0/8", Way::Here),
    ];
    routes.map(|(range, way)| (range.parse().unwrap(), way)).to_vec()
}

/// Whether an address is that of a pod of this node.
pub(crate) fn is_pod(ip: IpAddr) -> bool {
    PODS.iter().any(|pod| pod.parse() == Ok(ip))
}

/// How the agent was started: a choice of flags.
#[derive(Clone, Debug)]
pub(crate) struct Flags {
    pub(crate) masquerade_all: bool,
    pub(crate) inside_only: bool,
    pub(crate) fib_source: bool,
    pub(crate) node_ports: usize,
    pub(crate) proxy_name: bool,
}

impl Flags {
    pub(crate) fn random(random: &mut Random) -> Self {
        Self {
            masquerade_all: random.chance(15),
            inside_only: random.chance(15),
            fib_source: random.chance(50),
            node_ports: if random.chance(60) { 0 } else { random.below(4) },
            proxy_name: random.chance(10),
        }
    }

    /// For the agent.
    pub(crate) fn facts(&self) -> NodeFacts {
        let flags = [
            (self.masquerade_all, NodeFlags::MASQUERADE_ALL),
            (self.inside_only, NodeFlags::CLUSTER_IP_INSIDE_ONLY),
            (self.fib_source, NodeFlags::FIB_SOURCE),
        ];
        let node_port_addresses = match self.within() {
            _ if self.node_ports == 0 => NodePortAddresses::All,
            None => NodePortAddresses::Primary,
            Some(range) => NodePortAddresses::Within(vec![range.parse().unwrap()]),
        };
        NodeFacts {
            settings: NodeSettings {
                service_ranges: vec![SERVICE_RANGE.parse().unwrap()],
                node_port_addresses,
                snat_ports: SOURCE_PORTS,
                flags: flags.iter().filter(|(set, _)| *set).fold(0, |all, (_, flag)| all | flag),
                netns_cookie: 1,
            },
            interfaces: addresses(),
            cluster_cidrs: vec!["10.244.0.0/16".parse().unwrap()],
            proxy_name: self.proxy_name.then(|| "ours".to_owned()),
        }
    }

    /// For the oracle.
    pub(crate) fn node(&self) -> ThisNode {
        let node_ports = match self.within() {
            _ if self.node_ports == 0 => oracle::NodePortAddresses::All,
            None => oracle::NodePortAddresses::Primary,
            Some(range) => oracle::NodePortAddresses::Within(vec![range.parse().unwrap()]),
        };
        ThisNode {
            name: HERE.to_owned(),
            proxy_name: self.proxy_name.then(|| "ours".to_owned()),
            addresses: addresses(),
            primary: [NODE[0].parse().ok(), None],
            node_ports,
            source_ports: SOURCE_PORTS,
            masquerade_all: self.masquerade_all,
            cluster_ip_inside_only: self.inside_only,
            pod_ranges: vec!["10.244.0.0/16".parse().unwrap()],
            service_ranges: vec![SERVICE_RANGE.parse().unwrap()],
            routes: routes(),
        }
    }

    /// The range of `--nodeport-addresses`; `None` stands for `primary`.
    fn within(&self) -> Option<&'static str> {
        [None, None, Some("203.0.113.0/24"), Some("192.0.2.0/24")][self.node_ports]
    }
}

fn addresses() -> Vec<IpAddr> {
    ["127.0.0.1"].iter().chain(&NODE).filter_map(|text| text.parse().ok()).collect()
}
