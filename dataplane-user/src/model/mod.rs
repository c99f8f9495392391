//! The Kubernetes objects as far as the contract reads them. Everything after `watch` sees these types only.
//!
//! Pure data: no client, no clock, no I/O. Objects are written as they are into the snapshot on disk, so a new field or
//! another meaning needs a new version there.

use dataplane_common::hash::mix_bytes;
use ipnet::IpNet;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;
use thin_vec::ThinVec;

#[cfg(test)]
pub(crate) mod samples;
pub mod store;

pub use dataplane_common::Protocol;
pub use store::{Dirty, Shared, Store};

/// Namespace and name of an object.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ObjectName {
    /// The namespace; empty for objects that have none.
    pub namespace: Arc<str>,
    /// The name.
    pub name: Arc<str>,
}

impl ObjectName {
    /// The object `namespace/name`.
    pub fn new(namespace: impl Into<Arc<str>>, name: impl Into<Arc<str>>) -> Self {
        Self { namespace: namespace.into(), name: name.into() }
    }
}

impl fmt::Display for ObjectName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.namespace.is_empty() {
            return f.write_str(&self.name);
        }
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

/// `spec.type` of a Service.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum ServiceType {
    /// Also when the field is missing.
    #[default]
    ClusterIp,
    /// `NodePort`.
    NodePort,
    /// `LoadBalancer`.
    LoadBalancer,
    /// `ExternalName`: no dataplane (F1).
    ExternalName,
}

/// One entry of `status.loadBalancer.ingress` that has an IP.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LoadBalancerIngress {
    /// The address.
    pub ip: IpAddr,
    /// `ipMode: Proxy`: not programmed (P14).
    pub proxy: bool,
}

/// One entry of `spec.ports` of a Service.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ServicePort {
    /// Its name; empty if it has none.
    pub name: Arc<str>,
    /// Its protocol.
    #[serde(with = "protocol")]
    pub protocol: Protocol,
    /// The port of ClusterIP, LB IP and external IPs.
    pub port: u16,
    /// The node port, if one was given.
    pub node_port: Option<u16>,
}

/// A Service, as far as the contract reads it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Service {
    /// Namespace and name.
    pub name: ObjectName,
    /// `metadata.uid`, for Events; empty from manifests that carry none.
    pub uid: Arc<str>,
    /// `metadata.creationTimestamp` in seconds since 1970: the older of two Services keeps an address both claim (Z1).
    pub created: i64,
    /// Value of the label `service.kubernetes.io/service-proxy-name` (F2).
    pub proxy_name: Option<Arc<str>>,
    /// `spec.type`.
    pub service_type: ServiceType,
    /// `spec.clusterIPs`, else `spec.clusterIP`; empty for a headless Service (F1).
    pub cluster_ips: Vec<IpAddr>,
    /// `spec.externalIPs`.
    pub external_ips: ThinVec<IpAddr>,
    /// `status.loadBalancer.ingress`.
    pub ingress: ThinVec<LoadBalancerIngress>,
    /// `spec.ports`.
    pub ports: Vec<ServicePort>,
    /// `internalTrafficPolicy: Local`.
    pub internal_local: bool,
    /// `externalTrafficPolicy: Local`.
    pub external_local: bool,
    /// Timeout of `sessionAffinity: ClientIP` in seconds; `None` without affinity (S1).
    pub affinity_seconds: Option<u32>,
    /// `spec.loadBalancerSourceRanges`, trimmed (S2).
    pub source_ranges: ThinVec<IpNet>,
    /// `spec.healthCheckNodePort` (S4).
    pub health_check_node_port: Option<u16>,
    /// What its annotations ask of the choice of an endpoint (L1); `None` if nothing.
    pub choice: Option<Box<ChoiceAnnotations>>,
}

/// What the names of the project's own annotations begin with.
pub const ANNOTATION_PREFIX: &str = "service.portolan.dev/";

/// Annotations that say how a Service's endpoints are chosen (L1), as they are written: what they mean, and what is wrong with them,
/// compiling finds out.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ChoiceAnnotations {
    /// The algorithm, and the annotation that asks for it.
    pub algorithm: Option<(Arc<str>, Arc<str>)>,
    /// The weights.
    pub weights: Option<Arc<str>>,
    /// How many second tries.
    pub retry: Option<Arc<str>>,
}

/// A name, by which weights are found (L3): its hash, for a cluster has many endpoints and few of them have a weight of their own.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct NameHash(u64);

impl NameHash {
    /// No name.
    pub const NONE: Self = Self(0);

    /// The hash of a name.
    pub const fn of(name: &str) -> Self {
        // Never that of no name.
        Self(mix_bytes(name.as_bytes(), 0) | 1)
    }
}

/// `addressType` of an EndpointSlice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum AddressType {
    /// `IPv4`.
    Ipv4,
    /// `IPv6`.
    Ipv6,
    /// `FQDN`: ignored (F4).
    Fqdn,
}

/// One entry of `ports` of an EndpointSlice that has a number (F5).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SlicePort {
    /// Its name; empty if it has none.
    pub name: Arc<str>,
    /// Its protocol.
    #[serde(with = "protocol")]
    pub protocol: Protocol,
    /// Its number.
    pub port: u16,
}

/// One entry of `endpoints` of an EndpointSlice, conditions completed as F6 says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Endpoint {
    /// The first address (F5).
    pub address: IpAddr,
    /// `nodeName`.
    pub node: Option<Arc<str>>,
    /// `conditions.ready`, true if missing.
    pub ready: bool,
    /// `conditions.serving`, true if missing.
    pub serving: bool,
    /// `conditions.terminating`, false if missing.
    pub terminating: bool,
    /// `hints.forNodes`; empty without.
    pub for_nodes: ThinVec<Arc<str>>,
    /// `hints.forZones`; empty without.
    pub for_zones: ThinVec<Arc<str>>,
    /// Name of the pod that `targetRef` names (L3).
    pub pod: NameHash,
    /// `zone` (L3).
    pub zone: NameHash,
}

/// An EndpointSlice, as far as the contract reads it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EndpointSlice {
    /// Namespace and name.
    pub name: ObjectName,
    /// The Service it belongs to: the label `kubernetes.io/service-name`, in the slice's namespace.
    pub service: ObjectName,
    /// `addressType`.
    pub address_type: AddressType,
    /// `ports`.
    pub ports: Vec<SlicePort>,
    /// `endpoints`.
    pub endpoints: Vec<Endpoint>,
    /// Annotation `endpoints.kubernetes.io/last-change-trigger-time`, for the latency metric; as written. Of the change, not of the
    /// object: the store does not keep it.
    pub trigger_time: Option<Arc<str>>,
    /// Annotation `service.cilium.io/weight`, as written (L3).
    pub weight: Option<Arc<str>>,
    /// A controller of Kubernetes made it, and moves endpoints from slice to slice.
    pub by_controller: bool,
}

/// A Node, as far as the contract reads it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Node {
    /// Its name.
    pub name: Arc<str>,
    /// The label `topology.kubernetes.io/zone` (T1).
    pub zone: Option<Arc<str>>,
    /// `status.addresses` of type `InternalIP`, then `ExternalIP`.
    pub addresses: Vec<IpAddr>,
    /// `spec.podCIDRs`.
    pub pod_cidrs: Vec<IpNet>,
    /// Whether `metadata.deletionTimestamp` is set (H1).
    pub deleting: bool,
    /// Keys of `spec.taints`.
    pub taints: Vec<Arc<str>>,
}

/// A kind of watched object.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Kind {
    /// `v1/Service`.
    Service,
    /// `discovery.k8s.io/v1/EndpointSlice`.
    EndpointSlice,
    /// `v1/Node`.
    Node,
    /// `networking.k8s.io/v1/ServiceCIDR`.
    ServiceCidr,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Service => "Service",
            Self::EndpointSlice => "EndpointSlice",
            Self::Node => "Node",
            Self::ServiceCidr => "ServiceCIDR",
        })
    }
}

/// An object as it is now.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Object {
    /// A Service.
    Service(Service),
    /// An EndpointSlice.
    EndpointSlice(EndpointSlice),
    /// A Node.
    Node(Node),
    /// The ranges of one ServiceCIDR object.
    ServiceCidr {
        /// Its name.
        name: Arc<str>,
        /// `spec.cidrs`.
        cidrs: Vec<IpNet>,
    },
}

impl Object {
    /// Kind and name.
    pub fn reference(&self) -> Reference {
        let (kind, name) = match self {
            Self::Service(service) => (Kind::Service, service.name.clone()),
            Self::EndpointSlice(slice) => (Kind::EndpointSlice, slice.name.clone()),
            Self::Node(node) => (Kind::Node, ObjectName::new("", node.name.clone())),
            Self::ServiceCidr { name, .. } => (Kind::ServiceCidr, ObjectName::new("", name.clone())),
        };
        Reference { kind, name }
    }
}

/// Kind and name of an object.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Reference {
    /// Its kind.
    pub kind: Kind,
    /// Its name.
    pub name: ObjectName,
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.kind, self.name)
    }
}

/// What a watch tells, whatever its source.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// An object is new or changed. Sources may repeat themselves.
    Applied(Object),
    /// An object is gone. It may never have been told.
    Deleted(Reference),
    /// All objects of this kind that exist now: whatever else was known is gone. Sent after a (re)list.
    Replaced {
        /// The kind.
        kind: Kind,
        /// Those that could be read.
        objects: Vec<Object>,
        /// Those that could not: they exist, so what was known of them stays (Z5).
        unreadable: Vec<Reference>,
    },
    /// An object could not be read: what was known of it stays (Z5). For the log, the metric and the Event.
    Unreadable {
        /// Which.
        object: Reference,
        /// Why, and what to check.
        error: String,
    },
}

impl Change {
    /// A list of which every object could be read.
    pub fn replaced(kind: Kind, objects: Vec<Object>) -> Self {
        Self::Replaced { kind, objects, unreadable: Vec::new() }
    }
}

/// A [`Protocol`] on disk is its number.
mod protocol {
    use super::Protocol;
    use serde::de::{Error as _, Unexpected};
    use serde::{Deserialize as _, Deserializer, Serialize as _, Serializer};

    #[expect(clippy::trivially_copy_pass_by_ref, reason = "serde asks for a reference")]
    pub(super) fn serialize<S: Serializer>(protocol: &Protocol, serializer: S) -> Result<S::Ok, S::Error> {
        protocol.number().serialize(serializer)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Protocol, D::Error> {
        let number = u8::deserialize(deserializer)?;
        let unknown = |_| D::Error::invalid_value(Unexpected::Unsigned(number.into()), &"TCP, UDP or SCTP");
        Protocol::try_from(number).map_err(unknown)
    }
}
