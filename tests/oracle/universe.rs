//! The world that random cases are drawn from: one node's network in both families, and the addresses that mean something in
//! it. Small on purpose, so that things meet.

use crate::random::Random;
use dataplane_common::node::Node as NodeFlags;
use dataplane_tests::oracle::{self, Range, ThisNode, Way};
use dataplane_tests::packet::NodeFacts;
use dataplane_tests::packet::family::NARROW as NARROW_MTU;
use dataplane_user::compile::{NodePortAddresses, NodeSettings, Sources};
use std::net::IpAddr;
use std::process::Command;

/// The node.
pub(crate) const HERE: &str = "here";
/// Numbers of service ports.
pub(crate) const PORTS: [u16; 4] = [80, 443, 53, 8080];
/// Numbers of node ports.
pub(crate) const NODE_PORTS: [u16; 6] = [30_080, 30_081, 30_082, 30_053, 31_000, 31_001];
/// The mark of what netfilter masquerades.
pub(crate) const MARK: u32 = 1 << 14;
/// Source ports of translated flows.
const SOURCE_PORTS: std::ops::RangeInclusive<u16> = 61_000..=61_999;

/// The addresses of one family.
pub(crate) struct Places {
    /// On the node's uplink, and another of its own.
    pub(crate) node: [&'static str; 2],
    /// Pods of this node.
    pub(crate) pods: [&'static str; 4],
    /// Pods of other nodes.
    pub(crate) far: [&'static str; 5],
    /// A pod behind a narrow way.
    pub(crate) narrow: &'static str,
    /// An endpoint that no route leads to.
    pub(crate) lost: &'static str,
    /// A server outside the cluster.
    pub(crate) server: &'static str,
    /// Clients outside the cluster, and other nodes.
    pub(crate) outside: [&'static str; 5],
    /// Addresses that no host has; a link-local one, which hosts may have, is the last.
    pub(crate) nobody: [&'static str; 5],
    /// LB IPs and external IPs.
    pub(crate) outer: [&'static str; 6],
    /// An address of the service range that no Service has.
    pub(crate) unknown: &'static str,
    /// The node's loopback.
    pub(crate) loopback: &'static str,
    /// Ranges of clients, some as people write them; the last is everybody.
    pub(crate) ranges: [&'static str; 6],
    /// `addressType` of slices.
    pub(crate) name: &'static str,
    pods_range: &'static str,
    narrow_range: &'static str,
    lost_range: &'static str,
    service_range: &'static str,
    cluster_range: &'static str,
    node_ranges: [&'static str; 2],
}

/// IPv4.
pub(crate) const V4: Places = Places {
    node: ["192.0.2.1", "203.0.113.5"],
    pods: ["10.244.1.9", "10.244.1.10", "10.244.1.11", "10.244.1.12"],
    far: ["10.244.2.9", "10.244.2.10", "10.244.2.11", "10.244.2.12", "10.244.2.13"],
    narrow: "10.244.3.9",
    lost: "10.244.9.9",
    server: "198.51.100.200",
    outside: ["198.51.100.7", "198.51.100.8", "192.0.2.2", "10.244.2.9", "169.254.7.7"],
    nobody: ["127.0.0.2", "224.0.0.5", "255.255.255.255", "0.0.0.0", "169.254.1.1"],
    outer: ["203.0.113.100", "203.0.113.101", "203.0.113.102", "198.18.0.1", "203.0.113.5", "192.0.2.1"],
    unknown: "10.96.77.77",
    loopback: "127.0.0.1",
    ranges: [
        "198.51.100.0/24",
        " 192.0.2.0/24",
        "10.244.1.9/16",
        "198.51.100.7/32",
        "10.244.1.8/30",
        "0.0.0.0/0",
    ],
    name: "IPv4",
    pods_range: "10.244.1.8/29",
    narrow_range: "10.244.3.0/24",
    lost_range: "10.244.9.0/24",
    service_range: "10.96.0.0/16",
    cluster_range: "10.244.0.0/16",
    node_ranges: ["203.0.113.0/24", "192.0.2.0/24"],
};

/// IPv6.
pub(crate) const V6: Places = Places {
    node: ["2001:db8::1", "2001:db8:a::5"],
    pods: ["fd00:10:244:1::9", "fd00:10:244:1::a", "fd00:10:244:1::b", "fd00:10:244:1::c"],
    far: ["fd00:10:244:2::9", "fd00:10:244:2::a", "fd00:10:244:2::b", "fd00:10:244:2::c", "fd00:10:244:2::d"],
    narrow: "fd00:10:244:3::9",
    lost: "fd00:10:244:9::9",
    server: "2001:db8:c::200",
    outside: ["2001:db8:c::7", "2001:db8:c::8", "2001:db8::2", "fd00:10:244:2::9", "fe80::7"],
    nobody: ["::1", "ff02::5", "ff0e::1", "::", "fe80::99"],
    outer: [
        "2001:db8:b::100",
        "2001:db8:b::101",
        "2001:db8:b::102",
        "2001:db8:f::1",
        "2001:db8:a::5",
        "2001:db8::1",
    ],
    unknown: "fd00:10:96::4d4d",
    loopback: "::1",
    ranges: [
        "2001:db8:c::/64",
        " 2001:db8::/64",
        "fd00:10:244:1::9/48",
        "2001:db8:c::7/128",
        "fd00:10:244:1::8/126",
        "::/0",
    ],
    name: "IPv6",
    pods_range: "fd00:10:244:1::8/125",
    narrow_range: "fd00:10:244:3::/64",
    lost_range: "fd00:10:244:9::/64",
    service_range: "fd00:10:96::/108",
    cluster_range: "fd00:10:244::/48",
    node_ranges: ["2001:db8:a::/64", "2001:db8::/64"],
};

/// Both.
pub(crate) const FAMILIES: [&Places; 2] = [&V4, &V6];

impl Places {
    /// Those of a family.
    pub(crate) const fn of(v6: bool) -> &'static Self {
        FAMILIES[v6 as usize]
    }

    /// The ClusterIP of a Service by its number.
    pub(crate) fn cluster_ip(&self, number: usize) -> String {
        let range = self.service_range;
        if self.name == V4.name {
            return format!("10.96.0.{}", number + 1);
        }
        format!("{}{:x}", range.split('/').next().unwrap_or(range), number + 1)
    }

    /// Whether it is one of the node's.
    pub(crate) fn has_node(&self, address: &str) -> bool {
        self.node.contains(&address)
    }
}

/// Adds to the runner's namespace what it does not have.
pub(crate) fn set_up() {
    let mut commands = vec![
        "-4 addr add 203.0.113.5/32 dev up0".to_owned(),
        // Deprecated: which of two addresses the kernel sends from would be its own affair.
        "-6 addr add 2001:db8:a::5/128 dev lo preferred_lft 0".to_owned(),
    ];
    for (family, length, places) in [(4, 32, &V4), (6, 128, &V6)] {
        for (number, pod) in places.pods.iter().enumerate().skip(1) {
            commands.push(format!("-{family} route add {pod}/{length} dev pod0"));
            let neighbour = format!("{pod} lladdr 02:00:00:00:01:0{number} nud permanent dev pod0");
            commands.push(format!("-{family} neigh add {neighbour}"));
        }
    }
    for command in commands {
        let status = Command::new("ip").args(command.split_whitespace()).status();
        assert!(status.is_ok_and(|status| status.success()), "ip {command}");
    }
}

/// Ways through this network.
fn routes() -> Vec<(Range, Way)> {
    let out = |mtu, to_pod| Way::Out { mtu, to_pod };
    let mut routes = vec![("0.0.0.0/0", out(1_500, false)), ("::/0", out(1_500, false))];
    routes.push(("127.0.0.0/8", Way::Here));
    for places in FAMILIES {
        routes.push((places.pods_range, out(1_500, true)));
        routes.push((places.narrow_range, out(NARROW_MTU as usize, false)));
        routes.push((places.lost_range, Way::None));
    }
    routes.into_iter().map(|(range, way)| (range.parse().unwrap(), way)).collect()
}

/// Whether an address is that of a pod of this node.
pub(crate) fn is_pod(ip: IpAddr) -> bool {
    Places::of(ip.is_ipv6()).pods.iter().any(|pod| pod.parse() == Ok(ip))
}

/// How the agent was started: a choice of flags.
#[derive(Clone, Debug)]
pub(crate) struct Flags {
    pub(crate) masquerades: bool,
    pub(crate) masquerade_all: bool,
    pub(crate) inside_only: bool,
    pub(crate) ranges_everywhere: bool,
    pub(crate) fib_source: bool,
    pub(crate) node_ports: usize,
    pub(crate) proxy_name: bool,
    pub(crate) takes_over: bool,
}

impl Flags {
    pub(crate) fn random(random: &mut Random) -> Self {
        Self {
            masquerades: random.chance(60),
            masquerade_all: random.chance(15),
            inside_only: random.chance(15),
            ranges_everywhere: random.chance(25),
            fib_source: random.chance(50),
            node_ports: if random.chance(60) { 0 } else { random.below(4) },
            proxy_name: random.chance(10),
            takes_over: random.chance(10),
        }
    }

    /// For the agent.
    pub(crate) fn facts(&self) -> NodeFacts {
        let flags = [
            (self.masquerade_all, NodeFlags::MASQUERADE_ALL),
            (self.inside_only, NodeFlags::CLUSTER_IP_INSIDE_ONLY),
            (self.ranges_everywhere, NodeFlags::SOURCE_RANGES_EVERYWHERE),
            (self.fib_source, NodeFlags::FIB_SOURCE),
            (self.takes_over, NodeFlags::TAKES_OVER),
        ];
        let node_port_addresses = match self.within() {
            _ if self.node_ports == 0 => NodePortAddresses::All,
            None => NodePortAddresses::Primary,
            Some(ranges) => {
                NodePortAddresses::Within(ranges.iter().map(|range| range.parse().unwrap()).collect())
            }
        };
        NodeFacts {
            settings: NodeSettings {
                service_ranges: FAMILIES.map(|places| places.service_range.parse().unwrap()).to_vec(),
                node_port_addresses,
                snat_ports: vec![SOURCE_PORTS],
                flags: flags.iter().filter(|(set, _)| *set).fold(0, |all, (_, flag)| all | flag),
                masquerade_mark: if self.masquerades { MARK } else { 0 },
                connection_mark: 0,
                sources: Sources::default(),
                netns_cookie: 1,
                secret: 1,
            },
            interfaces: addresses(),
            cluster_cidrs: FAMILIES.map(|places| places.cluster_range.parse().unwrap()).to_vec(),
            proxy_name: self.proxy_name.then(|| "ours".to_owned()),
        }
    }

    /// For the oracle.
    pub(crate) fn node(&self) -> ThisNode {
        let node_ports = match self.within() {
            _ if self.node_ports == 0 => oracle::NodePortAddresses::All,
            None => oracle::NodePortAddresses::Primary,
            Some(ranges) => {
                oracle::NodePortAddresses::Within(ranges.iter().map(|range| range.parse().unwrap()).collect())
            }
        };
        ThisNode {
            name: HERE.to_owned(),
            proxy_name: self.proxy_name.then(|| "ours".to_owned()),
            addresses: addresses(),
            primary: FAMILIES.map(|places| places.node[0].parse().ok()),
            node_ports,
            source_ports: SOURCE_PORTS,
            masquerades: self.masquerades,
            masquerade_all: self.masquerade_all,
            cluster_ip_inside_only: self.inside_only,
            source_ranges_everywhere: self.ranges_everywhere,
            takes_over: self.takes_over,
            pod_ranges: FAMILIES.map(|places| places.cluster_range.parse().unwrap()).to_vec(),
            service_ranges: FAMILIES.map(|places| places.service_range.parse().unwrap()).to_vec(),
            routes: routes(),
        }
    }

    /// The ranges of `--nodeport-addresses`; `None` stands for `primary`. One of one family, or of both.
    fn within(&self) -> Option<Vec<&'static str>> {
        match self.node_ports {
            2 => Some(vec![V4.node_ranges[0], V6.node_ranges[1]]),
            3 => Some(vec![V4.node_ranges[1]]),
            _ => None,
        }
    }
}

fn addresses() -> Vec<IpAddr> {
    FAMILIES
        .iter()
        .flat_map(|places| [places.loopback, places.node[0], places.node[1]])
        .filter_map(|text| text.parse().ok())
        .collect()
}
