//! The oracle: a plain model of `docs/contract.md`, written from its text. Cluster state, node and packet in; out come
//! all outcomes that the contract allows, each with the whole packet.
//!
//! It shares no code with the dataplane, so that a mistake has to be made twice to go unseen; of Kubernetes it knows the
//! API's own types. It is slow and simple on purpose: no tables, no ids, no checksums by difference where the whole sum
//! can be taken.
//!
//! Choice is random in the dataplane, so the oracle gives *alternatives*. Whoever saw what really happened says which one
//! it was ([`Model::accept`]); that is how the oracle learns which endpoint and which port a flow got.

pub mod address;
mod affinity;
mod again;
mod begin;
mod choice;
mod cluster;
mod endpoints;
mod flows;
mod follow;
pub mod outcome;
mod packets;
pub mod wire;

pub use address::Range;
pub use again::{Refusal, Tried};
pub use choice::{Algorithm, Question};
pub use cluster::{Kind, PortId, ServicePort, State};
pub use endpoints::Sets;
pub use flows::{Flow, Phase, Sender, Tuple};
pub use outcome::{Alternative, Answer, Outcome, Then, Why};

use k8s_openapi::api::core::v1::{Node, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::ops::RangeInclusive;

/// Everything the API server holds that the contract reads.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Cluster {
    /// All Services.
    pub services: Vec<Service>,
    /// All EndpointSlices.
    pub slices: Vec<EndpointSlice>,
    /// All Nodes.
    pub nodes: Vec<Node>,
}

/// Where node ports answer (P17).
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NodePortAddresses {
    /// On all of the node's own addresses.
    All,
    /// On the node's primary address of each family.
    Primary,
    /// On those of the node's own addresses that lie in one of these ranges.
    Within(Vec<Range>),
}

/// The way to a destination, as the node's routing table has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// It is the node itself.
    Here,
    /// By an interface, for packets up to this many bytes.
    Out {
        /// Bytes, network header included.
        mtu: usize,
        /// Whether the interface is a pod's.
        to_pod: bool,
    },
    /// There is none.
    None,
}

/// The node whose dataplane is asked: what flags and kernel say.
#[derive(Clone, Debug)]
pub struct ThisNode {
    /// Name of its Node object.
    pub name: String,
    /// The name by which Services are told to use this agent (F2).
    pub proxy_name: Option<String>,
    /// Addresses on its interfaces, loopback included.
    pub addresses: Vec<IpAddr>,
    /// The address of each family (IPv4, IPv6) that translated flows come from.
    pub primary: [Option<IpAddr>; 2],
    /// Where node ports answer (P17).
    pub node_ports: NodePortAddresses,
    /// Source ports of translated flows (P12).
    pub source_ports: RangeInclusive<u16>,
    /// Netfilter translates the source of what is marked (P4).
    pub masquerades: bool,
    /// The flag of P9.
    pub masquerade_all: bool,
    /// The switch of P10.
    pub cluster_ip_inside_only: bool,
    /// The switch of S2: source ranges hold for node ports and external IPs too.
    pub source_ranges_everywhere: bool,
    /// Connections that another proxy translates may still run (C5).
    pub takes_over: bool,
    /// The cluster's pod ranges (Z1).
    pub pod_ranges: Vec<Range>,
    /// The cluster's service ranges (P13).
    pub service_ranges: Vec<Range>,
    /// The routing table: the longest range that holds an address counts.
    pub routes: Vec<(Range, Way)>,
}

impl ThisNode {
    /// Whether an address is on one of the node's interfaces.
    pub fn has(&self, ip: IpAddr) -> bool {
        self.addresses.contains(&ip)
    }

    /// The way to an address.
    pub fn way(&self, ip: IpAddr) -> Way {
        if self.has(ip) {
            return Way::Here;
        }
        let holding = self.routes.iter().filter(|(range, _)| range.contains(ip));
        holding.max_by_key(|(range, _)| range.length()).map_or(Way::None, |(_, way)| *way)
    }

    /// The node's address that a translated flow of this family comes from.
    pub fn source(&self, v6: bool) -> Option<IpAddr> {
        self.primary[usize::from(v6)]
    }
}

/// Where a packet meets the dataplane.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Place {
    /// From the network, before a socket buffer exists (XDP).
    Early,
    /// From the network.
    FromNetwork,
    /// To the network.
    ToNetwork,
    /// From a pod.
    FromPod,
    /// To a pod.
    ToPod,
}

impl Place {
    /// Whether packets come in here.
    pub const fn is_way_in(self) -> bool {
        matches!(self, Self::Early | Self::FromNetwork | Self::FromPod)
    }

    /// Whether packets come in here from the network.
    pub const fn is_from_network(self) -> bool {
        matches!(self, Self::Early | Self::FromNetwork)
    }
}

/// The oracle.
#[derive(Clone, Debug)]
pub struct Model {
    node: ThisNode,
    state: State,
    flows: flows::Flows,
    affinities: affinity::Affinities,
    answers: choice::Answers,
    fragments: follow::Fragments,
    /// The flows of UDP that got another endpoint, as they were before, by their replies.
    moved: BTreeMap<Tuple, Flow>,
    /// What answers a packet that left from a port of the node and is of no flow (P22); true if that certainly was noted.
    outgoing: BTreeMap<Tuple, bool>,
    /// Addresses that flows were called by when the cluster last changed.
    lately: BTreeSet<IpAddr>,
}

impl Model {
    /// A node that was told this cluster, and has seen no packet.
    pub fn new(node: ThisNode, cluster: &Cluster) -> Self {
        let state = State::of(cluster, &node);
        Self {
            node,
            state,
            flows: flows::Flows::default(),
            affinities: affinity::Affinities::default(),
            answers: choice::Answers::default(),
            fragments: follow::Fragments::default(),
            moved: BTreeMap::new(),
            outgoing: BTreeMap::new(),
            lately: BTreeSet::new(),
        }
    }

    /// The cluster is another now; flows go on, or do not (C1, C2).
    pub fn change(&mut self, cluster: &Cluster) {
        self.state = State::of(cluster, &self.node);
        self.flows.endpoints_changed(&self.state);
        self.affinities.endpoints_changed(&self.state);
        self.lately = self.flows.iter().map(|flow| flow.client.dst.ip()).collect();
    }

    /// What sections 1 and 2 make of the cluster.
    pub fn state(&self) -> &State {
        &self.state
    }

    /// The node.
    pub fn node(&self) -> &ThisNode {
        &self.node
    }

    /// The flows that live.
    pub fn flows(&self) -> impl Iterator<Item = &Flow> {
        self.flows.iter()
    }
}
