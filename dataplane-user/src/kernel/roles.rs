//! What each interface is to the dataplane, found from what it does: the addresses that it has, the routes that lead by it, and
//! what is behind it. Its kind matters only where two kinds that look alike do different things. Pure.
//!
//! Whatever has an address of the node or a route to others leads to the network. What is a port of another interface is served
//! there. One end of a pair with nothing but single addresses behind it leads to a pod.

use super::links::{Interface, Interfaces};
use super::service_route::{DEVICE, PEER};
use crate::pattern::Pattern;
use ipnet::IpNet;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::IpAddr;

/// Interfaces that other proxies leave behind, with ClusterIPs: that of kube-proxy's mode `ipvs`, and kube-router's.
pub const LEFT_OVER: [&str; 2] = ["kube-ipvs0", "kube-dummy-if"];

/// What an interface is to the dataplane.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Role {
    /// It leads to the network.
    Uplink,
    /// It leads to a pod.
    Pod,
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Uplink => "uplink",
            Self::Pod => "pod interface",
        })
    }
}

/// How the operator chose the interfaces; an empty list leaves the choice to the rules.
#[derive(Clone, Debug, Default)]
pub struct Choice {
    /// `--uplink`.
    pub uplinks: Vec<Pattern>,
    /// `--pod-interface`.
    pub pods: Vec<Pattern>,
}

/// What an interface does for others, as far as its kind says it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A device, or a tunnel: anything that is not below.
    Device,
    /// One end of a pair, whose other end may be a pod's (veth, netkit).
    Pair,
    /// What may be a guest's (TAP, macvlan, ipvlan): of a guest if all that is behind it are single addresses.
    Guest,
    /// A bridge.
    Bridge,
    /// Another kind of switch (Open vSwitch), or the node's own port of it.
    Switch,
    /// It takes packets and throws them away (dummy).
    Dummy,
    /// A routing table with an interface: its ports have addresses and routes of their own.
    Vrf,
}

/// What is in front of the packets of an interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LinkLayer {
    /// The node's loopback.
    Loopback,
    /// An Ethernet header.
    Ethernet,
    /// Nothing, as at many tunnels.
    None,
    /// Something that the programs do not know, as at InfiniBand.
    Unknown,
}

/// What routes lead by an interface, local ones and those that its own addresses make left out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Routes {
    /// A default route of the main table.
    pub default: bool,
    /// One to a single address that is right behind it.
    pub host: bool,
    /// Any other, of any table.
    pub other: bool,
}

impl Routes {
    /// Takes up what another route does.
    pub fn add(&mut self, more: Self) {
        self.default |= more.default;
        self.host |= more.host;
        self.other |= more.other;
    }
}

/// Why an interface has the role that it has, or none.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reason {
    /// The node's own route to Services leads there.
    ServiceRoute,
    /// A flag names it.
    Named,
    /// A default route leads by it.
    DefaultRoute,
    /// The node has this address there.
    Address(IpNet),
    /// Routes lead by it.
    Routes,
    /// It is a port of this interface, and guests are behind such ports.
    GuestPort(String),
    /// Routes to single addresses lead by it, and the node has no network there.
    SingleAddresses,
    /// It is one end of a pair without a network of the node's.
    Pair,
    /// It is the loopback.
    Loopback,
    /// The programs do not know what is in front of its packets.
    LinkLayer,
    /// A flag names others.
    NotNamed,
    /// It is a port of this interface, which is served in its place.
    Port(String),
    /// This interface is made on it, and served in its place.
    Carries(String),
    /// Its ports are served in its place.
    Ports,
    /// It has addresses, and nothing is behind it.
    NothingBehind,
    /// It has neither an address of the node nor a route.
    Unused,
    /// Another proxy left it behind.
    LeftOver,
}

impl Reason {
    /// A word for metrics.
    pub const fn label(&self) -> &'static str {
        match self {
            Self::ServiceRoute => "service-route",
            Self::Named => "named",
            Self::DefaultRoute => "default-route",
            Self::Address(_) => "address",
            Self::Routes => "routes",
            Self::GuestPort(_) => "guest-port",
            Self::SingleAddresses => "single-addresses",
            Self::Pair => "pair",
            Self::Loopback => "loopback",
            Self::LinkLayer => "link-layer",
            Self::NotNamed => "not-named",
            Self::Port(_) => "port",
            Self::Carries(_) => "carries",
            Self::Ports => "ports",
            Self::NothingBehind => "nothing-behind",
            Self::Unused => "unused",
            Self::LeftOver => "left-over",
        }
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::ServiceRoute => f.write_str("the node's own route to Services"),
            Self::Named => f.write_str("a flag names it"),
            Self::DefaultRoute => f.write_str("default route"),
            Self::Address(address) => write!(f, "address {address}"),
            Self::Routes => f.write_str("routes"),
            Self::GuestPort(master) => write!(f, "port of {master}"),
            Self::SingleAddresses => f.write_str("routes to single addresses"),
            Self::Pair => f.write_str("one end of a pair"),
            Self::Loopback => f.write_str("loopback"),
            Self::LinkLayer => f.write_str("its link layer is not known"),
            Self::NotNamed => f.write_str("a flag names others"),
            Self::Port(master) => write!(f, "port of {master}, which is served in its place"),
            Self::Carries(upper) => write!(f, "it carries {upper}, which is served in its place"),
            Self::Ports => f.write_str("its ports are served in its place"),
            Self::NothingBehind => f.write_str("nothing is behind it"),
            Self::Unused => f.write_str("it has neither an address of the node nor a route"),
            Self::LeftOver => f.write_str("another proxy left it behind"),
        }
    }
}

/// An interface's role, if it has one, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// The role.
    pub role: Option<Role>,
    /// Why.
    pub reason: Reason,
}

const fn uplink(reason: Reason) -> Finding {
    Finding { role: Some(Role::Uplink), reason }
}

const fn pod(reason: Reason) -> Finding {
    Finding { role: Some(Role::Pod), reason }
}

const fn none(reason: Reason) -> Finding {
    Finding { role: None, reason }
}

impl Interfaces {
    /// The role of each interface that has one.
    pub fn roles(&self, choice: &Choice) -> BTreeMap<u32, Role> {
        let roles = self.links.iter().map(|(index, link)| (*index, self.find(*index, link, choice).role));
        roles.filter_map(|(index, role)| Some((index, role?))).collect()
    }

    /// What each interface is, and why.
    pub fn findings(&self, choice: &Choice) -> BTreeMap<u32, Finding> {
        self.links.iter().map(|(index, link)| (*index, self.find(*index, link, choice))).collect()
    }

    /// The MTU of the uplink that takes the shortest packets; 0 if there is none.
    pub fn uplink_mtu(&self, choice: &Choice) -> u32 {
        let uplinks = self.links.iter().filter(|(index, link)| {
            link.name != DEVICE
                && link.mtu != 0
                && self.find(**index, link, choice).role == Some(Role::Uplink)
        });
        uplinks.map(|(_, link)| link.mtu).min().unwrap_or_default()
    }

    /// Flags narrow what the rules find: where one names interfaces, only those have its role.
    fn find(&self, index: u32, link: &Interface, choice: &Choice) -> Finding {
        match link.name.as_str() {
            DEVICE => return uplink(Reason::ServiceRoute),
            PEER => return none(Reason::ServiceRoute),
            _ => {}
        }
        let named = |patterns: &[Pattern]| patterns.iter().any(|pattern| pattern.matches(&link.name));
        match link.layer {
            LinkLayer::Loopback => return none(Reason::Loopback),
            LinkLayer::Unknown => return none(Reason::LinkLayer),
            LinkLayer::Ethernet | LinkLayer::None => {}
        }
        if named(&choice.uplinks) {
            return uplink(Reason::Named);
        }
        if named(&choice.pods) {
            return pod(Reason::Named);
        }
        let found = self.find_by_rules(index, link);
        let narrowed = match found.role {
            Some(Role::Uplink) => !choice.uplinks.is_empty(),
            Some(Role::Pod) => !choice.pods.is_empty(),
            None => false,
        };
        if narrowed { none(Reason::NotNamed) } else { found }
    }

    fn find_by_rules(&self, index: u32, link: &Interface) -> Finding {
        if LEFT_OVER.contains(&link.name.as_str()) {
            return none(Reason::LeftOver);
        }
        // The node's own port of a switch is no way for others into it.
        let master = link.master.and_then(|master| Some((master, self.links.get(&master)?)));
        if let Some((at, master)) = master
            && master.kind != Kind::Vrf
            && !(master.kind == Kind::Switch && link.kind == Kind::Switch)
        {
            return self.find_port(link, at, master);
        }
        match link.kind {
            Kind::Pair => self.find_pair(index),
            Kind::Bridge => self.find_bridge(index),
            Kind::Guest if link.layer == LinkLayer::Ethernet && self.has_single_addresses_only(index) => {
                pod(Reason::SingleAddresses)
            }
            Kind::Dummy if !self.leads_on(index) => none(self.nothing_behind(index)),
            Kind::Device | Kind::Guest | Kind::Switch | Kind::Dummy | Kind::Vrf => self.find_device(index),
        }
    }

    /// A port. The node's own traffic comes by its master; guests are behind those ports of a bridge that can be a guest's.
    fn find_port(&self, link: &Interface, at: u32, master: &Interface) -> Finding {
        let of_guests = match master.kind {
            Kind::Bridge => self.is_guest_s(link) && (self.leads_out(at) || !self.is_way_out(at)),
            Kind::Switch => self.is_guest_s(link),
            Kind::Device | Kind::Pair | Kind::Guest | Kind::Dummy | Kind::Vrf => false,
        };
        let name = master.name.clone();
        if of_guests { pod(Reason::GuestPort(name)) } else { none(Reason::Port(name)) }
    }

    /// One end of a pair leads to a pod, unless the node has a network of its own there, or on an interface that is made on it: then
    /// the node itself is a container, or a whole network is in one.
    fn find_pair(&self, index: u32) -> Finding {
        if self.routes(index).default {
            return uplink(Reason::DefaultRoute);
        }
        let network = |net: &&IpNet| net.prefix_len() < net.max_prefix_len() && !is_link_local(net.addr());
        if let Some(network) = self.addresses_of(index).iter().find(network) {
            return uplink(Reason::Address(*network));
        }
        let upper = self.links.values().find(|link| link.lower == Some(index));
        match upper {
            Some(upper) => none(Reason::Carries(upper.name.clone())),
            None if self.routes(index).host => pod(Reason::SingleAddresses),
            None => pod(Reason::Pair),
        }
    }

    /// A bridge is served itself where it leads to more than guests; else each of its guests is served at its port.
    fn find_bridge(&self, index: u32) -> Finding {
        if self.leads_out(index) || self.is_way_out(index) {
            return self.find_device(index);
        }
        if self.ports(index).next().is_some() {
            return none(Reason::Ports);
        }
        if self.leads_on(index) { self.find_device(index) } else { none(self.nothing_behind(index)) }
    }

    fn find_device(&self, index: u32) -> Finding {
        if self.routes(index).default {
            return uplink(Reason::DefaultRoute);
        }
        // An address of IPv6 that every interface makes for itself is none that others know.
        let known = |net: &&IpNet| net.addr().is_ipv4() || !is_link_local(net.addr());
        match self.addresses_of(index).iter().find(known) {
            Some(address) => uplink(Reason::Address(*address)),
            None if self.leads_on(index) || self.routes(index).host => uplink(Reason::Routes),
            None => none(Reason::Unused),
        }
    }

    fn nothing_behind(&self, index: u32) -> Reason {
        if self.addresses_of(index).is_empty() { Reason::Unused } else { Reason::NothingBehind }
    }

    fn routes(&self, index: u32) -> Routes {
        self.routes.get(&index).copied().unwrap_or_default()
    }

    fn addresses_of(&self, index: u32) -> &[IpNet] {
        self.addresses.get(&index).map_or(&[], Vec::as_slice)
    }

    fn ports(&self, bridge: u32) -> impl Iterator<Item = &Interface> {
        self.links.values().filter(move |link| link.master == Some(bridge))
    }

    /// Whether what is behind a port of a bridge may be a guest of this node.
    fn is_guest_s(&self, port: &Interface) -> bool {
        port.layer == LinkLayer::Ethernet
            && match port.kind {
                Kind::Pair | Kind::Guest => true,
                Kind::Device | Kind::Bridge | Kind::Switch | Kind::Dummy | Kind::Vrf => false,
            }
    }

    /// Whether a bridge has a port that no guest is behind.
    fn leads_out(&self, bridge: u32) -> bool {
        self.ports(bridge).any(|port| !self.is_guest_s(port))
    }

    /// Whether the node itself gets out by a bridge: where all ports look like guests', one of them is the node's own, and nobody
    /// knows which.
    fn is_way_out(&self, bridge: u32) -> bool {
        self.routes(bridge).default
    }

    /// Whether routes lead by an interface to more than its own networks and single addresses.
    fn leads_on(&self, index: u32) -> bool {
        let routes = self.routes(index);
        routes.default || routes.other
    }

    fn has_single_addresses_only(&self, index: u32) -> bool {
        let network = |net: &IpNet| net.prefix_len() < net.max_prefix_len() && !is_link_local(net.addr());
        self.routes(index).host && !self.leads_on(index) && !self.addresses_of(index).iter().any(network)
    }

    /// The node's own addresses, loopback included. Where nothing else says which is the node's primary address, it is the first:
    /// those of the default routes' interfaces come first, then those of the other uplinks. Addresses that mean nothing beyond a
    /// pod's interface are left out, and those of [`LEFT_OVER`].
    pub fn own_addresses(&self, roles: &BTreeMap<u32, Role>) -> Vec<IpAddr> {
        let rank = |index: u32| match (self.routes(index).default, roles.get(&index)) {
            (true, Some(Role::Uplink)) => 0,
            (false, Some(Role::Uplink)) => 1,
            (_, Some(Role::Pod) | None) => 2,
        };
        let mut by_rank: Vec<_> = self.addresses.iter().collect();
        by_rank.sort_by_key(|(index, _)| rank(**index));
        let mut seen = BTreeSet::new();
        by_rank
            .into_iter()
            .filter(|(index, _)| !self.is_left_over(**index))
            .flat_map(|(index, addresses)| addresses.iter().map(|net| (*index, net.addr())))
            .filter(|(index, ip)| roles.get(index) != Some(&Role::Pod) || !is_link_local(*ip))
            .map(|(_, ip)| ip)
            .filter(|ip| seen.insert(*ip))
            .collect()
    }

    /// The addresses that nothing but [`LEFT_OVER`] carries.
    pub fn left_over_addresses(&self) -> Vec<IpAddr> {
        let of = |left_over: bool| {
            let links =
                self.addresses.iter().filter(move |(index, _)| self.is_left_over(**index) == left_over);
            links.flat_map(|(_, addresses)| addresses).map(IpNet::addr)
        };
        let elsewhere: BTreeSet<IpAddr> = of(false).collect();
        of(true).filter(|ip| !elsewhere.contains(ip)).collect()
    }

    fn is_left_over(&self, index: u32) -> bool {
        self.links.get(&index).is_some_and(|link| LEFT_OVER.contains(&link.name.as_str()))
    }
}

fn is_link_local(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => ip.is_link_local(),
        IpAddr::V6(ip) => ip.is_unicast_link_local(),
    }
}

#[cfg(test)]
mod tests;
