//! What `compile` says the kernel should hold, before ids and slots are given out: that is `sync`'s part.

use crate::model::ObjectName;
use dataplane_common::frontend::{FrontendKey, FrontendKind};
use dataplane_common::node::{Node, NodeAddress};
use dataplane_common::range::SourceRangeKey;
use dataplane_common::service::{Algorithm, Policy};
use dataplane_common::{Addr, Port};
use ipnet::IpNet;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::Arc;

/// Namespace, name and port name of a service port in one family (F4, F5).
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ServicePortName {
    /// The Service.
    pub service: ObjectName,
    /// Name of the port; empty if it has none.
    pub port: Arc<str>,
    /// The protocol's number (F7).
    pub proto: u8,
    /// Whether it is the IPv6 half of a dual-stack Service: the families are programmed independently (F4).
    pub ipv6: bool,
}

impl fmt::Display for ServicePortName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.service)?;
        if !self.port.is_empty() {
            write!(f, ":{}", self.port)?;
        }
        Ok(())
    }
}

/// Address and port of an endpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Endpoint {
    /// Its address.
    pub addr: Addr,
    /// The port it listens on.
    pub port: Port,
}

/// The tables of one service port.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PortTables {
    /// How the sets are used, and the affinity timeout.
    pub policy: Policy,
    /// Every endpoint that flows may have: all that are serving, in a set or not (C1, C2), with the flags of
    /// [`dataplane_common::backend::BackendStatus`].
    pub backends: BTreeMap<Endpoint, u32>,
    /// The weights of those whose weight is not 1 (L3).
    pub weights: BTreeMap<Endpoint, u16>,
    /// How one of a set is chosen (L2).
    pub algorithm: Algorithm,
    /// What the hashes of that begin with: the same on all nodes.
    pub seed: u64,
    /// What its turns begin with: this node's own.
    pub order: u64,
    /// The cluster set; each is a key of `backends`. Empty where T4 does not ask for it.
    pub cluster: BTreeSet<Endpoint>,
    /// The local set; each is a key of `backends`. Empty where T4 does not ask for it.
    pub local: BTreeSet<Endpoint>,
    /// Who may call its restricted addresses, where the policy restricts them (S2).
    pub ranges: BTreeSet<IpNet>,
    /// The addresses that lead here.
    pub frontends: BTreeMap<FrontendKey, FrontendKind>,
}

/// The tables of one Service.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ServiceTables {
    /// Its ports.
    pub ports: BTreeMap<ServicePortName, PortTables>,
    /// Its ClusterIPs, to be refused on all other ports (P13).
    pub closed: BTreeSet<Addr>,
}

/// The tables of the node itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeTables {
    /// The settings.
    pub node: Node,
    /// The node's addresses.
    pub addresses: BTreeMap<Addr, NodeAddress>,
    /// Who may call from outside (S2).
    pub ranges: BTreeSet<SourceRangeKey>,
}
