//! Services as they are written.

use super::{Metadata, ObjectError, Written, address, all, optional_port, port, protocol, ranges};
use crate::model::{Kind, LoadBalancerIngress, Object, Service, ServicePort, ServiceType};
use crate::watch::names::Names;
use serde::Deserialize;
use std::net::IpAddr;

/// Timeout of `sessionAffinity: ClientIP` where none is given (S1).
const DEFAULT_AFFINITY_SECONDS: u32 = 10_800;
/// The longest timeout of `sessionAffinity: ClientIP` (S1).
const MAX_AFFINITY_SECONDS: i64 = 86_400;

/// `v1/Service`.
#[derive(Clone, Debug, Deserialize)]
pub struct WrittenService {
    #[serde(default)]
    metadata: Metadata,
    #[serde(default)]
    spec: Option<ServiceSpec>,
    #[serde(default)]
    status: Option<ServiceStatus>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
struct ServiceSpec {
    #[serde(rename = "type")]
    service_type: Option<String>,
    #[serde(rename = "clusterIP")]
    cluster_ip: Option<String>,
    #[serde(rename = "clusterIPs")]
    cluster_ips: Option<Vec<String>>,
    #[serde(rename = "externalIPs")]
    external_ips: Option<Vec<String>>,
    ports: Option<Vec<WrittenServicePort>>,
    internal_traffic_policy: Option<String>,
    external_traffic_policy: Option<String>,
    session_affinity: Option<String>,
    session_affinity_config: Option<SessionAffinityConfig>,
    load_balancer_source_ranges: Option<Vec<String>>,
    health_check_node_port: Option<i64>,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct WrittenServicePort {
    name: Option<String>,
    protocol: Option<String>,
    port: Option<i64>,
    node_port: Option<i64>,
}

#[derive(Clone, Debug, Deserialize)]
struct SessionAffinityConfig {
    #[serde(rename = "clientIP")]
    client_ip: Option<ClientIpConfig>,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct ClientIpConfig {
    timeout_seconds: Option<i64>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
struct ServiceStatus {
    load_balancer: Option<LoadBalancerStatus>,
}

#[derive(Clone, Debug, Default, Deserialize)]
struct LoadBalancerStatus {
    ingress: Option<Vec<WrittenIngress>>,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct WrittenIngress {
    ip: Option<String>,
    ip_mode: Option<String>,
}

impl Written for WrittenService {
    const KIND: Kind = Kind::Service;
    const GROUP: &'static str = "";
    const PLURAL: &'static str = "services";
    const NAMESPACED: bool = true;

    fn metadata(&self) -> &Metadata {
        &self.metadata
    }

    fn convert(self, names: &mut Names) -> Result<Object, ObjectError> {
        let metadata = &self.metadata;
        let spec = self.spec.unwrap_or_default();
        let ingress = self.status.and_then(|status| status.load_balancer).and_then(|lb| lb.ingress);
        Ok(Object::Service(Service {
            name: metadata.object_name(true, names)?,
            uid: metadata.uid.as_deref().unwrap_or_default().into(),
            created: metadata.created(),
            proxy_name: metadata.proxy_name().map(|name| names.get(name)),
            service_type: service_type(spec.service_type.as_deref())?,
            cluster_ips: cluster_ips(spec.cluster_ip, spec.cluster_ips)?,
            external_ips: all("spec.externalIPs", spec.external_ips, |field, ip: String| {
                address(field, &ip).map(Some)
            })?
            .into(),
            ingress: all("status.loadBalancer.ingress", ingress, load_balancer_ingress)?.into(),
            ports: all("spec.ports", spec.ports, |field, port| service_port(field, &port, names).map(Some))?,
            internal_local: spec.internal_traffic_policy.as_deref() == Some("Local"),
            external_local: spec.external_traffic_policy.as_deref() == Some("Local"),
            affinity_seconds: affinity(spec.session_affinity.as_deref(), spec.session_affinity_config)?,
            source_ranges: ranges("spec.loadBalancerSourceRanges", spec.load_balancer_source_ranges)?.into(),
            health_check_node_port: optional_port("spec.healthCheckNodePort", spec.health_check_node_port)?,
            choice: metadata.choice(),
        }))
    }
}

fn service_type(word: Option<&str>) -> Result<ServiceType, ObjectError> {
    match word {
        None | Some("" | "ClusterIP") => Ok(ServiceType::ClusterIp),
        Some("NodePort") => Ok(ServiceType::NodePort),
        Some("LoadBalancer") => Ok(ServiceType::LoadBalancer),
        Some("ExternalName") => Ok(ServiceType::ExternalName),
        Some(other) => Err(ObjectError::Word {
            field: "spec.type".to_owned(),
            value: other.to_owned(),
            allowed: "ClusterIP, NodePort, LoadBalancer, ExternalName",
        }),
    }
}

/// `clusterIPs`, else `clusterIP`; empty if either says that the Service is headless (F1).
fn cluster_ips(single: Option<String>, list: Option<Vec<String>>) -> Result<Vec<IpAddr>, ObjectError> {
    let written = list.filter(|list| !list.is_empty()).or_else(|| single.map(|ip| vec![ip]));
    all("spec.clusterIPs", written, |field, ip: String| match ip.as_str() {
        "" | "None" => Ok(None),
        ip => address(field, ip).map(Some),
    })
}

/// An ingress without an IP has only a host name, which is not for the dataplane (P14).
fn load_balancer_ingress(
    field: &str,
    ingress: WrittenIngress,
) -> Result<Option<LoadBalancerIngress>, ObjectError> {
    let Some(ip) = ingress.ip.as_deref().filter(|ip| !ip.is_empty()) else { return Ok(None) };
    let proxy = ingress.ip_mode.as_deref() == Some("Proxy");
    Ok(Some(LoadBalancerIngress { ip: address(&format!("{field}.ip"), ip)?, proxy }))
}

fn service_port(
    field: &str,
    written: &WrittenServicePort,
    names: &mut Names,
) -> Result<ServicePort, ObjectError> {
    let port_field = format!("{field}.port");
    let number = written.port.ok_or_else(|| ObjectError::Missing { field: port_field.clone() })?;
    Ok(ServicePort {
        name: names.get(written.name.as_deref().unwrap_or_default()),
        protocol: protocol(field, written.protocol.as_deref())?,
        port: port(&port_field, number)?,
        node_port: optional_port(&format!("{field}.nodePort"), written.node_port)?,
    })
}

fn affinity(kind: Option<&str>, config: Option<SessionAffinityConfig>) -> Result<Option<u32>, ObjectError> {
    match kind {
        None | Some("" | "None") => Ok(None),
        Some("ClientIP") => {
            match config.and_then(|config| config.client_ip).and_then(|client| client.timeout_seconds) {
                None => Ok(Some(DEFAULT_AFFINITY_SECONDS)),
                Some(value) => u32::try_from(value)
                    .ok()
                    .filter(|_| (1..=MAX_AFFINITY_SECONDS).contains(&value))
                    .map(Some)
                    .ok_or(ObjectError::AffinityTimeout { value }),
            }
        }
        Some(other) => Err(ObjectError::Word {
            field: "spec.sessionAffinity".to_owned(),
            value: other.to_owned(),
            allowed: "None, ClientIP",
        }),
    }
}
