//! EndpointSlices as they are written.

use super::{Metadata, ObjectError, Written, address, all, port, protocol};
use crate::model::{AddressType, Endpoint, EndpointSlice, Kind, NameHash, Object, ObjectName, SlicePort};
use crate::watch::names::Names;
use serde::Deserialize;
use std::sync::Arc;
use thin_vec::ThinVec;

/// The controllers that make slices, by the label `endpointslice.kubernetes.io/managed-by`.
const CONTROLLERS: [&str; 2] =
    ["endpointslice-controller.k8s.io", "endpointslicemirroring-controller.k8s.io"];

/// `discovery.k8s.io/v1/EndpointSlice`.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct WrittenEndpointSlice {
    #[serde(default)]
    metadata: Metadata,
    address_type: Option<String>,
    ports: Option<Vec<WrittenSlicePort>>,
    endpoints: Option<Vec<WrittenEndpoint>>,
}

#[derive(Clone, Debug, Deserialize)]
struct WrittenSlicePort {
    name: Option<String>,
    protocol: Option<String>,
    port: Option<i64>,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct WrittenEndpoint {
    addresses: Option<FirstAddress>,
    conditions: Option<Conditions>,
    node_name: Option<String>,
    zone: Option<String>,
    target_ref: Option<TargetRef>,
    hints: Option<Hints>,
}

#[derive(Clone, Debug, Deserialize)]
struct TargetRef {
    kind: Option<String>,
    name: Option<String>,
}

#[derive(Clone, Debug, Default, Deserialize)]
struct Conditions {
    ready: Option<bool>,
    serving: Option<bool>,
    terminating: Option<bool>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Hints {
    for_nodes: Option<Vec<Hint>>,
    for_zones: Option<Vec<Hint>>,
}

#[derive(Clone, Debug, Deserialize)]
struct Hint {
    name: String,
}

/// The first of a list of addresses; the others do not count (F5).
#[derive(Clone, Debug)]
struct FirstAddress(Option<String>);

impl<'de> Deserialize<'de> for FirstAddress {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let all = Vec::<String>::deserialize(deserializer)?;
        Ok(Self(all.into_iter().next()))
    }
}

impl Written for WrittenEndpointSlice {
    const KIND: Kind = Kind::EndpointSlice;
    const GROUP: &'static str = "discovery.k8s.io";
    const PLURAL: &'static str = "endpointslices";
    const NAMESPACED: bool = true;

    fn metadata(&self) -> &Metadata {
        &self.metadata
    }

    fn convert(self, names: &mut Names) -> Result<Object, ObjectError> {
        let metadata = &self.metadata;
        let name = metadata.object_name(true, names)?;
        let labels = metadata.labels.as_ref();
        // A slice without the label belongs to no Service: no Service has an empty name.
        let service = labels.and_then(|labels| labels.service_name.as_deref()).unwrap_or_default();
        let annotations = metadata.annotations.as_ref();
        let trigger_time = annotations.and_then(|annotations| annotations.trigger_time.as_deref());
        let address_type = address_type(self.address_type.as_deref())?;
        Ok(Object::EndpointSlice(EndpointSlice {
            service: ObjectName::new(name.namespace.clone(), names.get(service)),
            name,
            address_type,
            ports: all("ports", self.ports, |field, port| slice_port(field, &port, names))?,
            endpoints: match address_type {
                AddressType::Fqdn => Vec::new(),
                AddressType::Ipv4 | AddressType::Ipv6 => {
                    all("endpoints", self.endpoints, |field, written| {
                        endpoint(field, written, address_type, names)
                    })?
                }
            },
            trigger_time: trigger_time.map(Arc::from),
            weight: annotations.and_then(|annotations| annotations.slice_weight.as_deref()).map(Arc::from),
            by_controller: labels
                .and_then(|labels| labels.managed_by.as_deref())
                .is_some_and(|by| CONTROLLERS.contains(&by)),
        }))
    }
}

fn address_type(word: Option<&str>) -> Result<AddressType, ObjectError> {
    match word {
        Some("IPv4") => Ok(AddressType::Ipv4),
        Some("IPv6") => Ok(AddressType::Ipv6),
        Some("FQDN") => Ok(AddressType::Fqdn),
        None => Err(ObjectError::Missing { field: "addressType".to_owned() }),
        Some(other) => Err(ObjectError::Word {
            field: "addressType".to_owned(),
            value: other.to_owned(),
            allowed: "IPv4, IPv6, FQDN",
        }),
    }
}

/// A port without a number means all ports, which a Service cannot use (F5).
fn slice_port(
    field: &str,
    written: &WrittenSlicePort,
    names: &mut Names,
) -> Result<Option<SlicePort>, ObjectError> {
    let Some(number) = written.port else { return Ok(None) };
    Ok(Some(SlicePort {
        name: names.get(written.name.as_deref().unwrap_or_default()),
        protocol: protocol(field, written.protocol.as_deref())?,
        port: port(&format!("{field}.port"), number)?,
    }))
}

/// The first address counts (F5); one of the other family is ignored (F4); missing conditions are completed (F6).
fn endpoint(
    field: &str,
    written: WrittenEndpoint,
    address_type: AddressType,
    names: &mut Names,
) -> Result<Option<Endpoint>, ObjectError> {
    let Some(first) = written.addresses.and_then(|addresses| addresses.0) else { return Ok(None) };
    let address = address(&format!("{field}.addresses[0]"), &first)?;
    if address.is_ipv6() != (address_type == AddressType::Ipv6) {
        return Ok(None);
    }
    let conditions = written.conditions.unwrap_or_default();
    let hints = written.hints.unwrap_or_default();
    Ok(Some(Endpoint {
        address,
        node: written.node_name.map(|node| names.get(&node)),
        ready: conditions.ready.unwrap_or(true),
        serving: conditions.serving.unwrap_or(true),
        terminating: conditions.terminating.unwrap_or(false),
        for_nodes: hint_names(hints.for_nodes, names),
        for_zones: hint_names(hints.for_zones, names),
        pod: pod_name(written.target_ref.as_ref()),
        zone: written.zone.as_deref().map_or(NameHash::NONE, NameHash::of),
    }))
}

fn pod_name(target: Option<&TargetRef>) -> NameHash {
    let pod = target.filter(|target| target.kind.as_deref() == Some("Pod"));
    pod.and_then(|pod| pod.name.as_deref()).map_or(NameHash::NONE, NameHash::of)
}

fn hint_names(hints: Option<Vec<Hint>>, names: &mut Names) -> ThinVec<Arc<str>> {
    hints.unwrap_or_default().iter().map(|hint| names.get(&hint.name)).collect()
}
