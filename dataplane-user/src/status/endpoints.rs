//! What the agent knows of a Service's endpoints and the kernel does not: which there are besides those that take part, and why
//! those do not.

use serde::{Deserialize, Serialize};

/// The path of the page of a Service: this, its namespace, `/` and its name.
pub const PATH: &str = "/endpoints/";

/// A Service's endpoints, as this node sees them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ServiceEndpoints {
    /// This node's zone.
    pub zone: Option<String>,
    /// By port and IP family.
    pub ports: Vec<PortEndpoints>,
}

/// Those of one port, in one family.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct PortEndpoints {
    /// The port's name; empty if it has none.
    pub port: String,
    /// `TCP`, `UDP` or `SCTP`.
    pub protocol: String,
    /// The family.
    pub ipv6: bool,
    /// The endpoints.
    pub endpoints: Vec<EndpointFacts>,
}

/// One endpoint.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct EndpointFacts {
    /// Its address.
    pub address: String,
    /// The port it listens on.
    pub port: u16,
    /// Its node.
    pub node: Option<String>,
    /// Its conditions.
    pub ready: bool,
    /// See [`Self::ready`].
    pub serving: bool,
    /// See [`Self::ready`].
    pub terminating: bool,
    /// The zones that its hint names.
    pub zones: Vec<String>,
    /// Why it is not in the set of the whole cluster; none: it is.
    pub not_in_cluster_set: Option<String>,
    /// Why it is not in the set of this node; none: it is.
    pub not_in_local_set: Option<String>,
}
