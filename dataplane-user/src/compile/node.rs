//! The node's own tables: its addresses, the service ranges and the settings that programs read.

use super::complaint::{Complaint, ComplaintReason};
use super::tables::NodeTables;
use crate::model::{Kind, Node, ObjectName, Reference};
use bytemuck::Zeroable as _;
use dataplane_common::Addr;
use dataplane_common::node::{self, NodeAddress, PORT_RANGES, Ports, Prefix, SERVICE_RANGES, SourceRule};
use dataplane_common::range::SourceRangeKey;
use dataplane_common::tables::{self, Table as _};
use ipnet::IpNet;
use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr};
use std::ops::RangeInclusive;

/// Bits of an IPv4-mapped address before the IPv4 part.
const MAPPED_BITS: u32 = 96;

/// The addresses node ports answer on (P17).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum NodePortAddresses {
    /// All of the node's own addresses, loopback included.
    #[default]
    All,
    /// The node's primary address of each family.
    Primary,
    /// Those of the node's own addresses that lie in one of these ranges.
    Within(Vec<IpNet>),
}

/// The addresses on the node's interfaces.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct OwnAddresses {
    /// The node's own, in the order that decides which is primary.
    pub own: Vec<IpAddr>,
    /// ClusterIPs that another proxy's interface carries still: the kernel takes what is sent to them for the node's, and nobody
    /// means the node by them (P13, P16).
    pub left_over: Vec<IpAddr>,
}

impl From<Vec<IpAddr>> for OwnAddresses {
    fn from(own: Vec<IpAddr>) -> Self {
        Self { own, left_over: Vec::new() }
    }
}

impl OwnAddresses {
    /// The node's own.
    pub fn addrs(&self) -> BTreeSet<Addr> {
        self.own.iter().map(|ip| Addr::from(*ip)).collect()
    }

    /// As many of them as there is room for, and a complaint if others are left out (Z5). Those of the Node object come first, then
    /// those that are first in the order.
    pub fn within(&self, room: usize, node: Option<&Node>) -> (Self, Option<Complaint>) {
        let all = self.own.len() + self.left_over.len();
        if all <= room {
            return (self.clone(), None);
        }
        let named: &[IpAddr] = node.map_or(&[], |node| &node.addresses);
        let mut own = self.own.clone();
        own.sort_by_key(|ip| !named.contains(ip));
        own.truncate(room);
        let left_over = self.left_over.iter().take(room - own.len()).copied().collect();
        let text = format!(
            "{all} addresses on the interfaces, of which the first {room} are used: at the others no node port answers; \
             --map-size {}={all} makes room",
            tables::NodeAddrs::NAME
        );
        (Self { own, left_over }, Some(complaint(node, ComplaintReason::TooManyNodeAddresses, text)))
    }
}

/// What the agent's flags and the kernel say about the node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeSettings {
    /// The service ranges: those given by flag, else those of the ServiceCIDR objects (P13).
    pub service_ranges: Vec<IpNet>,
    /// Where node ports answer (P17).
    pub node_port_addresses: NodePortAddresses,
    /// Translated source ports (P12), in ranges that have nothing in common.
    pub snat_ports: Vec<RangeInclusive<u16>>,
    /// Flags of [`dataplane_common::node::Node`].
    pub flags: u32,
    /// The mark by which netfilter translates sources; 0: it does not (P4).
    pub masquerade_mark: u32,
    /// The mark that netfilter notes of connections from outside; 0: none.
    pub connection_mark: u32,
    /// Who may call from outside (S2).
    pub sources: Sources,
    /// Cookie of the node's own network namespace.
    pub netns_cookie: u64,
    /// A random number, mixed into the programs' choices.
    pub secret: u64,
}

/// Who may call Services from outside (S2): the operator's own rules, in place of those in netfilter's `prerouting`, which the programs
/// come before.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Sources {
    /// Who may call node ports; a family without ranges is open.
    pub node_ports: BTreeSet<IpNet>,
    /// Who may call nothing.
    pub denied: BTreeSet<IpNet>,
}

impl Sources {
    /// Whether only some may call node ports in this family.
    fn restricts(&self, ipv6: bool) -> bool {
        let mut of_family = self.node_ports.iter().filter(|range| range.addr().is_ipv6() == ipv6).peekable();
        of_family.peek().is_some() && of_family.all(|range| range.prefix_len() != 0)
    }

    fn flags(&self) -> u32 {
        let flag = |set: bool, flag| if set { flag } else { 0 };
        flag(self.restricts(false), node::Node::NODE_PORT_SOURCES_V4)
            | flag(self.restricts(true), node::Node::NODE_PORT_SOURCES_V6)
            | flag(!self.denied.is_empty(), node::Node::DENIED_SOURCES)
    }

    fn keys(&self) -> BTreeSet<SourceRangeKey> {
        let node_ports = self.node_ports.iter().filter(|range| self.restricts(range.addr().is_ipv6()));
        let node_ports = node_ports.map(|range| range_key(SourceRangeKey::NODE_PORTS, range));
        node_ports.chain(self.denied.iter().map(|range| range_key(SourceRangeKey::DENIED, range))).collect()
    }

    /// Why a range cannot be told from others: the tables hold IPv4 as a part of IPv6.
    ///
    /// # Errors
    /// That it holds addresses of IPv4.
    pub fn check(range: &IpNet) -> Result<(), String> {
        let mapped = Ipv4Addr::UNSPECIFIED.to_ipv6_mapped();
        match range {
            IpNet::V6(v6) if v6.contains(&mapped) => Err(format!(
                "{range} holds addresses of IPv4 as well: give narrower ranges, such as 2000::/3"
            )),
            IpNet::V4(_) | IpNet::V6(_) => Ok(()),
        }
    }
}

/// The key of a range of sources of the service port with this id.
pub fn range_key(service: u32, range: &IpNet) -> SourceRangeKey {
    let mapped = if range.addr().is_ipv4() { MAPPED_BITS } else { 0 };
    SourceRangeKey::new(service, range.network().into(), mapped + u32::from(range.prefix_len()))
}

/// Compiles the node's tables from the own Node (as soon as it is known), the addresses on the node's interfaces, and those of
/// them that are LB IPs of Services.
pub fn node(
    settings: &NodeSettings,
    node: Option<&Node>,
    on_interfaces: &OwnAddresses,
    load_balancer_ips: &BTreeSet<Addr>,
) -> (NodeTables, Vec<Complaint>) {
    let named: &[IpAddr] = node.map_or(&[], |node| &node.addresses);
    let primary = primary_addresses(node, &on_interfaces.own);
    let answers = |ip: IpAddr| {
        let wanted = match &settings.node_port_addresses {
            NodePortAddresses::All => true,
            NodePortAddresses::Primary => primary.contains(&Some(ip)),
            NodePortAddresses::Within(ranges) => ranges.iter().any(|range| range.contains(&ip)),
        };
        // P16: never on an LB IP, unless that is the address the Node itself is known by.
        wanted && (named.contains(&ip) || !load_balancer_ips.contains(&ip.into()))
    };
    let flags = |ip: IpAddr| if answers(ip) { NodeAddress::NODE_PORTS } else { 0 };
    let own = on_interfaces.own.iter().map(|ip| (Addr::from(*ip), NodeAddress::new(flags(*ip))));
    let left_over = on_interfaces.left_over.iter().map(|ip| (Addr::from(*ip), NodeAddress::new(0)));
    let addresses = left_over.chain(own).collect();
    let (service_ranges, complaints) = service_ranges(settings, node);
    let mut ports = [Ports::zeroed(); PORT_RANGES];
    for (entry, range) in ports.iter_mut().zip(&settings.snat_ports) {
        *entry = Ports { first: *range.start(), number: range.len() as u16 };
    }
    let [primary_v4, primary_v6] = primary.map(|ip| ip.map_or(Addr::UNSPECIFIED, Addr::from));
    let node = node::Node {
        netns_cookie: settings.netns_cookie,
        secret: settings.secret,
        primary_v4,
        primary_v6,
        service_ranges,
        ports,
        port_count: ports.iter().map(|ports| u32::from(ports.number)).sum(),
        flags: settings.flags | settings.sources.flags(),
        masquerade_mark: settings.masquerade_mark,
        connection_mark: settings.connection_mark,
        held_back_until: 0,
        source_rules: SourceRule::all(
            settings.masquerade_mark != 0,
            settings.flags & node::Node::MASQUERADE_ALL != 0,
            settings.connection_mark != 0,
        ),
    };
    (NodeTables { node, addresses, ranges: settings.sources.keys() }, complaints)
}

/// The node's primary address of each family, IPv4 first.
pub(super) fn primary_addresses(node: Option<&Node>, interface_addresses: &[IpAddr]) -> [Option<IpAddr>; 2] {
    let named: &[IpAddr] = node.map_or(&[], |node| &node.addresses);
    [false, true].map(|ipv6| primary(named, interface_addresses, ipv6))
}

/// The first address of the Node object that is on an interface; else the first on an interface that other hosts may
/// know; of one family.
fn primary(named: &[IpAddr], interface_addresses: &[IpAddr], ipv6: bool) -> Option<IpAddr> {
    let of_family = |ip: &&IpAddr| ip.is_ipv6() == ipv6;
    let named = named.iter().filter(of_family).find(|ip| interface_addresses.contains(ip));
    let global = |ip: &&IpAddr| super::service::refused(**ip).is_none();
    named.or_else(|| interface_addresses.iter().filter(of_family).find(global)).copied()
}

fn complaint(node: Option<&Node>, reason: ComplaintReason, text: String) -> Complaint {
    let name = node.map(|node| node.name.clone()).unwrap_or_default();
    Complaint { object: Reference { kind: Kind::Node, name: ObjectName::new("", name) }, reason, text }
}

fn service_ranges(
    settings: &NodeSettings,
    node: Option<&Node>,
) -> ([Prefix; SERVICE_RANGES], Vec<Complaint>) {
    let mut table = [Prefix::zeroed(); SERVICE_RANGES];
    let ranges: BTreeSet<IpNet> = settings.service_ranges.iter().map(IpNet::trunc).collect();
    for (entry, range) in table.iter_mut().zip(&ranges) {
        let mapped = if range.addr().is_ipv4() { MAPPED_BITS } else { 0 };
        *entry = Prefix::new(range.addr().into(), mapped + u32::from(range.prefix_len()));
    }
    let mut complaints = Vec::new();
    if ranges.len() > SERVICE_RANGES {
        let text = format!(
            "{} service ranges, of which the first {SERVICE_RANGES} are used: check the ServiceCIDR objects",
            ranges.len()
        );
        complaints.push(complaint(node, ComplaintReason::TooManyServiceRanges, text));
    }
    (table, complaints)
}
