//! Nodes and ServiceCIDRs as they are written.

use super::{Metadata, ObjectError, Written, address, ranges};
use crate::model::{Kind, Node, Object};
use crate::watch::names::Names;
use serde::Deserialize;
use std::net::IpAddr;

/// `v1/Node`.
#[derive(Clone, Debug, Deserialize)]
pub struct WrittenNode {
    #[serde(default)]
    metadata: Metadata,
    #[serde(default)]
    spec: Option<NodeSpec>,
    #[serde(default)]
    status: Option<NodeStatus>,
}

#[derive(Clone, Debug, Default, Deserialize)]
struct NodeSpec {
    #[serde(rename = "podCIDR")]
    pod_cidr: Option<String>,
    #[serde(rename = "podCIDRs")]
    pod_cidrs: Option<Vec<String>>,
    taints: Option<Vec<Taint>>,
}

#[derive(Clone, Debug, Deserialize)]
struct Taint {
    key: String,
}

#[derive(Clone, Debug, Default, Deserialize)]
struct NodeStatus {
    addresses: Option<Vec<NodeAddress>>,
}

#[derive(Clone, Debug, Deserialize)]
struct NodeAddress {
    #[serde(rename = "type")]
    address_type: String,
    address: String,
}

impl Written for WrittenNode {
    const KIND: Kind = Kind::Node;
    const GROUP: &'static str = "";
    const PLURAL: &'static str = "nodes";
    const NAMESPACED: bool = false;

    fn metadata(&self) -> &Metadata {
        &self.metadata
    }

    fn convert(self, names: &mut Names) -> Result<Object, ObjectError> {
        let metadata = &self.metadata;
        let name = metadata.object_name(false, names)?.name;
        let spec = self.spec.unwrap_or_default();
        let written = self.status.and_then(|status| status.addresses).unwrap_or_default();
        let pod_cidrs = spec.pod_cidrs.filter(|list| !list.is_empty());
        Ok(Object::Node(Node {
            name: names.get(&name),
            zone: metadata
                .labels
                .as_ref()
                .and_then(|labels| labels.zone.as_deref())
                .map(|zone| names.get(zone)),
            addresses: node_addresses(&written)?,
            pod_cidrs: ranges("spec.podCIDRs", pod_cidrs.or_else(|| spec.pod_cidr.map(|cidr| vec![cidr])))?,
            deleting: metadata.deletion_timestamp.is_some(),
            taints: spec.taints.unwrap_or_default().iter().map(|taint| names.get(&taint.key)).collect(),
        }))
    }
}

/// The internal addresses, then the external ones; host names do not count.
fn node_addresses(written: &[NodeAddress]) -> Result<Vec<IpAddr>, ObjectError> {
    let mut addresses = Vec::new();
    for kind in ["InternalIP", "ExternalIP"] {
        for (index, entry) in written.iter().enumerate().filter(|(_, entry)| entry.address_type == kind) {
            addresses.push(address(&format!("status.addresses[{index}].address"), &entry.address)?);
        }
    }
    Ok(addresses)
}

/// `networking.k8s.io/v1/ServiceCIDR`.
#[derive(Clone, Debug, Deserialize)]
pub struct WrittenServiceCidr {
    #[serde(default)]
    metadata: Metadata,
    #[serde(default)]
    spec: Option<ServiceCidrSpec>,
}

#[derive(Clone, Debug, Default, Deserialize)]
struct ServiceCidrSpec {
    cidrs: Option<Vec<String>>,
}

impl Written for WrittenServiceCidr {
    const KIND: Kind = Kind::ServiceCidr;
    const GROUP: &'static str = "networking.k8s.io";
    const PLURAL: &'static str = "servicecidrs";
    const NAMESPACED: bool = false;

    fn metadata(&self) -> &Metadata {
        &self.metadata
    }

    fn convert(self, names: &mut Names) -> Result<Object, ObjectError> {
        Ok(Object::ServiceCidr {
            name: self.metadata.object_name(false, names)?.name,
            cidrs: ranges("spec.cidrs", self.spec.and_then(|spec| spec.cidrs))?,
        })
    }
}
