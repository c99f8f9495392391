//! What the programs must know of the node they run on.

use crate::Addr;
use crate::flow::{Flow, TICK_MASK, ticks_between};
use bytemuck::{Pod, Zeroable};

/// How many service ranges a node may have: two families, each with a second one while ranges are migrated (KEP-1880).
pub const SERVICE_RANGES: usize = 8;

/// A range of addresses. 24 bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct Prefix {
    /// The address with all host bits zero.
    pub addr: Addr,
    /// The same, one bit for each bit that counts; all zero marks an unused entry.
    pub mask: PrefixMask,
}

/// The mask of a [`Prefix`], in network order.
pub type PrefixMask = Addr;

impl Prefix {
    /// The range of `bits` leading bits of the 128 (an IPv4 range's length plus 96).
    pub fn new(addr: Addr, bits: u32) -> Self {
        let mask = if bits == 0 { 0 } else { u128::MAX << (128 - bits.min(128)) };
        let addr = u128::from_be_bytes(*addr.bytes()) & mask;
        Self { addr: Addr::from_bytes(addr.to_be_bytes()), mask: Addr::from_bytes(mask.to_be_bytes()) }
    }

    /// Whether the entry is in use and `addr` lies in the range.
    #[inline(always)]
    pub fn contains(&self, addr: &Addr) -> bool {
        let ([a, b], [m, n], [x, y]) = (self.addr.words(), self.mask.words(), addr.words());
        (m | n) != 0 && x & m == a && y & n == b
    }
}

/// What becomes of the source of a flow's packets, by where its endpoint is: flags of the flow. [`Flow::SOURCE_TRANSLATED`]: the
/// programs translate it; [`Flow::MASQUERADED`]: netfilter does; [`Flow::NOTED`]: netfilter notes a mark. One word.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
#[repr(C, align(8))]
pub struct SourceRule {
    at_node: u16,
    in_pod: [u16; 2],
    _zero: u16,
}

/// Whose flows a [`SourceRule`] is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum SourceCase {
    /// Of pods of this node (P4, P5).
    Pod = 0,
    /// Of pods of this node, to ClusterIPs (P9).
    PodToClusterIp = 1,
    /// Of the node itself (P6, P9).
    Node = 2,
    /// Of others, to ClusterIPs (P10).
    OutsideToClusterIp = 3,
    /// Of others, where the traffic policy keeps their source (P7).
    OutsideLocal = 4,
    /// Of others (P4).
    Outside = 5,
}

/// How many cases there are.
pub const SOURCE_CASES: usize = 6;

impl SourceRule {
    /// The rules of a node, by [`SourceCase`].
    pub fn all(masquerades: bool, masquerades_pods: bool, notes: bool) -> [Self; SOURCE_CASES] {
        let rule = |at_node, here, elsewhere| Self { at_node, in_pod: [elsewhere, here], _zero: 0 };
        let translated = Flow::SOURCE_TRANSLATED;
        let by_netfilter = if masquerades { Flow::MASQUERADED } else { 0 };
        let noted = if notes { Flow::NOTED } else { 0 };
        let of_pods = if masquerades_pods { by_netfilter } else { 0 };
        let cluster_ip = if masquerades { by_netfilter | noted } else { translated };
        let mut rules = [Self::default(); SOURCE_CASES];
        rules[SourceCase::PodToClusterIp as usize] = rule(0, of_pods, of_pods);
        // The node as a client of an endpoint in its own network: also a hairpin, whatever address it sends from.
        rules[SourceCase::Node as usize] = rule(translated, 0, 0);
        rules[SourceCase::OutsideToClusterIp as usize] = rule(translated, cluster_ip, translated);
        rules[SourceCase::OutsideLocal as usize] = rule(noted, noted, noted);
        // An endpoint in the node's own network would meet a martian.
        rules[SourceCase::Outside as usize] = rule(noted, by_netfilter | noted, translated);
        rules
    }

    /// For an endpoint in the node's own network, whatever its slice says of its node.
    #[inline(always)]
    pub const fn at_node(&self) -> u16 {
        self.at_node
    }

    /// For an endpoint in a pod: of another node (0), of this node (1).
    #[inline(always)]
    pub const fn in_pod(&self, local: bool) -> u16 {
        self.in_pod[local as usize]
    }
}

/// In [`Node::held_back_until`]: the lower half is a tick.
const IS_TICK: u64 = 1 << 32;

/// How many ticks connections of no flow are held back at most, unless that is said again.
const HELD_BACK: u32 = 16;

/// Settings of the node: the only element of the `node` array.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct Node {
    /// Cookie of the node's own network namespace (`SO_NETNS_COOKIE`): sockets elsewhere belong to pods.
    pub netns_cookie: u64,
    /// A random number of this boot, mixed into all choices that a client could else foresee from its own address and port.
    pub secret: u64,
    /// Source address for translated IPv4 flows where the route names none.
    pub primary_v4: Addr,
    /// Source address for translated IPv6 flows where the route names none.
    pub primary_v6: Addr,
    /// The service ranges (P13).
    pub service_ranges: [Prefix; SERVICE_RANGES],
    /// The translated source ports (P12); entries of number 0 are unused, and behind all others.
    pub ports: [Ports; PORT_RANGES],
    /// How many ports that are.
    pub port_count: u32,
    /// The flags below.
    pub flags: u32,
    /// The bit of a packet's mark by which netfilter translates its source where it leaves for an endpoint (P4); 0: nobody does.
    pub masquerade_mark: u32,
    /// The bits of the mark that netfilter notes of a connection from outside, for rules of routing to find the way of its answers by;
    /// 0: none.
    pub connection_mark: u32,
    /// The tick up to which other programs, with maps of their own, may begin flows at some hooks still: what may be of one of theirs is
    /// held back ([`Node::holds_back`]); 0: there are none.
    pub held_back_until: u64,
    /// What becomes of sources, by [`SourceCase`].
    pub source_rules: [SourceRule; SOURCE_CASES],
}

/// How many ranges the translated source ports may be made of: what is in use lies between them.
pub const PORT_RANGES: usize = 8;

/// A range of ports. 4 bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct Ports {
    /// The first, host order.
    pub first: u16,
    /// How many; 65,535 at most, for nobody has port 0.
    pub number: u16,
}

impl Node {
    /// The kernel's route lookup names the source address (`BPF_FIB_LOOKUP_SRC`, Linux 6.7).
    pub const FIB_SOURCE: u32 = 1 << 0;
    /// Sockets of pods are translated at connect time, not those of the node alone.
    pub const SOCKET_LB_PODS: u32 = 1 << 1;
    /// A ClusterIP called from outside the cluster is refused (P10).
    pub const CLUSTER_IP_INSIDE_ONLY: u32 = 1 << 2;
    /// Translate the source of all that pods send to ClusterIPs (P9): the rules of sources say it to the programs.
    pub const MASQUERADE_ALL: u32 = 1 << 3;
    /// Source ranges hold for node ports and external IPs too (S2).
    pub const SOURCE_RANGES_EVERYWHERE: u32 = 1 << 4;
    /// TCP connections that another proxy translates may still run: what belongs to no flow is left to it (C5).
    pub const TAKES_OVER: u32 = 1 << 5;
    /// Bridges hand packets to netfilter before they reach tc (`br_netfilter`): what was translated enters the stack anew.
    pub const BRIDGE_NETFILTER: u32 = 1 << 6;
    /// Only some may call node ports from outside over IPv4 (S2).
    pub const NODE_PORT_SOURCES_V4: u32 = 1 << 7;
    /// The same over IPv6.
    pub const NODE_PORT_SOURCES_V6: u32 = 1 << 8;
    /// Some may call no Service from outside (S2).
    pub const DENIED_SOURCES: u32 = 1 << 9;

    /// Whether all bits of `flag` are set.
    #[inline(always)]
    pub const fn has(&self, flag: u32) -> bool {
        self.flags & flag == flag
    }

    /// Whether a connection of no flow may be one of other programs' at this tick. It ends by itself, for whoever began it may have died.
    #[inline(always)]
    pub const fn holds_back(&self, now: u32) -> bool {
        self.held_back_until != 0 && ticks_between(now, self.held_back_until as u32) < HELD_BACK
    }

    /// From this tick on, as long as it may last.
    pub fn hold_back(&mut self, now: u32) {
        self.held_back_until = IS_TICK | u64::from(now.wrapping_add(HELD_BACK - 1) & TICK_MASK);
    }

    /// The translated source port of this number, of all from 0 to [`Node::port_count`]; 0 if there is none.
    #[inline(always)]
    pub fn port(&self, number: u32) -> u16 {
        let (mut left, mut at) = (number, 0);
        while at < PORT_RANGES {
            let Ports { first, number } = self.ports[at];
            if left < number as u32 {
                return first + left as u16;
            }
            left -= number as u32;
            at += 1;
        }
        0
    }
}

/// What an address of this node is for: value of the `node_addrs` table. One word.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
#[repr(C, align(8))]
pub struct NodeAddress {
    flags: u32,
    _zero: u32,
}

impl NodeAddress {
    /// Node ports answer on this address (P17).
    pub const NODE_PORTS: u32 = 1 << 0;

    /// From the flags above.
    pub const fn new(flags: u32) -> Self {
        Self { flags, _zero: 0 }
    }

    /// Whether all bits of `flag` are set.
    #[inline(always)]
    pub const fn has(self, flag: u32) -> bool {
        self.flags & flag == flag
    }

    /// The flags.
    pub const fn flags(self) -> u32 {
        self.flags
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use core::net::IpAddr;

    #[test]
    fn each_port_of_each_range_has_its_number() {
        let mut node = Node::zeroed();
        for (at, (first, number)) in [(1_024, 3), (40_000, 1), (65_000, 536)].into_iter().enumerate() {
            node.ports[at] = Ports { first, number };
        }
        let ports: std::vec::Vec<_> = (0..540).map(|number| node.port(number)).collect();
        let wanted: std::vec::Vec<_> = (1_024..1_027).chain([40_000]).chain(65_000..=65_535).collect();
        assert_eq!(ports, wanted);
        assert_eq!(node.port(540), 0);
    }

    #[test]
    fn what_is_held_back_is_so_for_some_ticks_and_no_longer() {
        let mut node = Node::zeroed();
        assert!(!node.holds_back(0) && !node.holds_back(TICK_MASK));
        for now in [0, 1, 5, TICK_MASK - 15, TICK_MASK - 14, TICK_MASK] {
            let after = |ticks: u32| now.wrapping_add(ticks) & TICK_MASK;
            node.hold_back(now);
            assert!(node.holds_back(now) && node.holds_back(after(HELD_BACK - 1)), "{now}");
            assert!(
                !node.holds_back(after(HELD_BACK + 1)) && !node.holds_back(after(TICK_MASK / 2)),
                "{now}"
            );
        }
    }

    #[test]
    fn a_prefix_holds_its_own_addresses_only() {
        let addr = |s: &str| Addr::from(s.parse::<IpAddr>().unwrap());
        let range = Prefix::new(addr("10.96.0.0"), 96 + 16);
        assert!(range.contains(&addr("10.96.255.1")));
        assert!(!range.contains(&addr("10.97.0.1")));
        assert!(!range.contains(&addr("fd00::a60:1")));
        assert!(!Prefix::zeroed().contains(&addr("10.96.0.1")), "an unused entry holds nothing");
        assert!(Prefix::new(addr("fd00:10:96::"), 108).contains(&addr("fd00:10:96::1")));
    }
}
