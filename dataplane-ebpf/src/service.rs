//! From a destination to a service port, and from a service port to the set of endpoints that a client may have.

use crate::global::global;
use crate::maps::{FRONTENDS, NODE, NODE_ADDRS, SERVICES, SOURCE_RANGES};
use aya_ebpf::btf_maps::lpm_trie::Key;
use dataplane_common::backend::BackendStatus;
use dataplane_common::drop::Reason;
use dataplane_common::frontend::{Frontend, FrontendKey, FrontendKind};
use dataplane_common::node::{Node, NodeAddress};
use dataplane_common::range::SourceRangeKey;
use dataplane_common::service::{EndpointSet, Policy};
use dataplane_common::{Addr, Port, read_word};

/// Where a client is, as far as policies ask.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// A pod of this node.
    Pod,
    /// This node itself.
    Node,
    /// Anywhere else.
    Outside,
}

/// What a destination leads to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Destination {
    /// Id of the service port.
    pub service: u32,
    /// The kind of address that was called.
    pub kind: FrontendKind,
}

/// The node's settings; `None` only before the agent wrote them.
#[inline(always)]
pub fn node() -> Option<&'static Node> {
    NODE.get(0)
}

/// What the node's address `addr` is for; `None` if it is no address of the node.
#[inline(always)]
pub fn node_address(addr: &Addr) -> Option<NodeAddress> {
    // SAFETY: an element of a map, valid until the program ends.
    NODE_ADDRS.get_ptr(addr).map(|address| unsafe { read_word(address) })
}

/// The service port that a destination leads to.
///
/// # Errors
/// [`Reason::CorruptTable`] if the entry is none that this program understands.
#[inline(always)]
pub fn lookup(addr: &Addr, port: Port, proto: u8) -> Result<Option<Destination>, Reason> {
    if let Some(frontend) = exact(&FrontendKey::new(*addr, port, proto)) {
        return destination(frontend).map(Some);
    }
    // P16, P17: node ports answer on the node's chosen addresses only.
    if !node_address(addr).is_some_and(|address| address.has(NodeAddress::NODE_PORTS)) {
        return Ok(None);
    }
    let any = if addr.is_v4() { Addr::from_v4([0; 4]) } else { Addr::UNSPECIFIED };
    exact(&FrontendKey::new(any, port, proto)).map(destination).transpose()
}

/// Whether `addr` is a ClusterIP whose other ports are refused (P13).
#[inline(always)]
pub fn is_closed(addr: &Addr) -> bool {
    exact(&FrontendKey::any_port(*addr)).is_some()
}

/// Whether `addr` lies in a service range (P13).
#[inline(always)]
pub fn in_service_range(addr: &Addr) -> bool {
    let Some(node) = node() else { return false };
    let mut found = false;
    for range in &node.service_ranges {
        found |= range.contains(addr);
    }
    found
}

/// The policies of a service port.
///
/// # Errors
/// [`Reason::CorruptTable`] if there is no such id.
#[inline(always)]
pub fn policy(service: u32) -> Result<Policy, Reason> {
    let service = SERVICES.get_ptr(service).ok_or(Reason::CorruptTable)?;
    // SAFETY: array elements stay.
    Ok(unsafe { read_word(&raw const (*service).policy) })
}

/// How often a flow of a service port may be given to another endpoint (L5).
#[inline(always)]
pub fn tries(service: u32) -> u32 {
    policy(service).map_or(0, Policy::tries)
}

/// Whether only some sources may call this address (S2).
#[inline(always)]
pub fn restricts(destination: Destination, policy: Policy) -> bool {
    policy.has(Policy::SOURCE_RANGES)
        && match destination.kind {
            FrontendKind::LoadBalancerIp => true,
            FrontendKind::ExternalIp | FrontendKind::NodePort => {
                node().is_some_and(|node| node.has(Node::SOURCE_RANGES_EVERYWHERE))
            }
            FrontendKind::ClusterIp | FrontendKind::ClosedPort => false,
        }
}

global! {
    /// Whether a client at `addr` may call a restricted address (S2).
    pub fn allows as service_allows(destination: const Destination, addr: const Addr) -> bool {
        // The ranges of a service port that was just opened to all may be gone already: its policy tells.
        is_in_range(destination.service, addr)
            || policy(destination.service).is_ok_and(|policy| !policy.has(Policy::SOURCE_RANGES))
    }
}

/// Whether a range of the service port, or of the node, holds `addr`.
#[inline(always)]
fn is_in_range(service: u32, addr: &Addr) -> bool {
    let key = SourceRangeKey::one(service, *addr);
    // SAFETY: the trie's key is the same bytes, number of bits first.
    let key =
        unsafe { &*(&raw const key).cast::<Key<[u8; size_of::<SourceRangeKey>() - size_of::<u32>()]>>() };
    SOURCE_RANGES.get(key).is_some()
}

global! {
    /// Whether this node lets nobody at `addr` call anything from outside (S2).
    pub fn denies as service_denies(addr: const Addr) -> bool {
        is_in_range(SourceRangeKey::DENIED, addr)
    }
}

global! {
    /// Whether a client at `addr` may call node ports from outside (S2).
    pub fn allows_node_ports as service_allows_node_ports(addr: const Addr) -> bool {
        is_in_range(SourceRangeKey::NODE_PORTS, addr)
    }
}

/// The endpoints that a client may have, and how it gets one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Endpoints {
    /// The set; not empty.
    pub set: EndpointSet,
    /// The flag of the backends that it holds.
    pub member: u32,
    /// What hashes begin with (L2).
    pub seed: u64,
}

/// The endpoints a client at `source` may have (P2 to P9).
///
/// # Errors
/// Why there are none.
#[inline(always)]
pub fn endpoints(destination: Destination, source: Source, policy: Policy) -> Result<Endpoints, Reason> {
    let service = SERVICES.get_ptr(destination.service).ok_or(Reason::CorruptTable)?;
    let external = destination.kind != FrontendKind::ClusterIp;
    let local = if external {
        // P5, P6: the node and its pods are spared the detour; P7: anybody else gets local endpoints only.
        policy.has(Policy::EXTERNAL_LOCAL) && source == Source::Outside
    } else {
        policy.has(Policy::INTERNAL_LOCAL)
    };
    // SAFETY: array elements stay; each word is read whole.
    let (set, seed): (EndpointSet, u64) = unsafe {
        let set = if local { &raw const (*service).local } else { &raw const (*service).cluster };
        (read_word(set), read_word(&raw const (*service).seed))
    };
    if set.count() == 0 {
        // P1 against P2 and P3.
        return Err(if policy.has(Policy::HAS_ENDPOINTS) {
            Reason::NoLocalEndpoints
        } else {
            Reason::NoEndpoints
        });
    }
    let member = if local { BackendStatus::IN_LOCAL } else { BackendStatus::IN_CLUSTER };
    Ok(Endpoints { set, member, seed })
}

/// Whether P7 or iTP Local chose among local endpoints, so that the source must be kept.
#[inline(always)]
pub fn keeps_source(destination: Destination, source: Source, policy: Policy) -> bool {
    destination.kind != FrontendKind::ClusterIp
        && policy.has(Policy::EXTERNAL_LOCAL)
        && source == Source::Outside
}

#[inline(always)]
fn exact(key: &FrontendKey) -> Option<Frontend> {
    // SAFETY: an element of a map, valid until the program ends.
    FRONTENDS.get_ptr(key).map(|frontend| unsafe { read_word(frontend) })
}

#[inline(always)]
fn destination(frontend: Frontend) -> Result<Destination, Reason> {
    let kind = frontend.kind().map_err(|_| Reason::CorruptTable)?;
    Ok(Destination { service: frontend.service(), kind })
}
