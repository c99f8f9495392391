//! Section 1 of the contract: from objects to service ports and the addresses that lead to them.

use super::address::{Range, is_nobodys};
use super::choice::{Algorithm, Weights};
use super::endpoints::{Sets, candidates, sets};
use super::{Cluster, NodePortAddresses, ThisNode};
use k8s_openapi::api::core::v1::Service;
use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};

/// The label of F2.
const PROXY_NAME: &str = "service.kubernetes.io/service-proxy-name";
/// The label of T1.
const ZONE: &str = "topology.kubernetes.io/zone";

/// A service port in one family (F4, F5, F7).
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PortId {
    /// Namespace of the Service.
    pub namespace: String,
    /// Name of the Service.
    pub service: String,
    /// Name of the port; empty if it has none.
    pub port: String,
    /// IP protocol number.
    pub proto: u8,
    /// The family.
    pub v6: bool,
}

/// What kind of address a client called.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// `spec.clusterIPs`.
    ClusterIp,
    /// `status.loadBalancer.ingress[].ip`.
    LoadBalancerIp,
    /// `spec.externalIPs`.
    ExternalIp,
    /// `spec.ports[].nodePort`.
    NodePort,
}

/// What the contract makes of a service port.
#[derive(Clone, Debug)]
pub struct ServicePort {
    /// Which.
    pub id: PortId,
    /// `internalTrafficPolicy: Local`.
    pub internal_local: bool,
    /// `externalTrafficPolicy: Local`.
    pub external_local: bool,
    /// `sessionAffinity: ClientIP` (S1).
    pub affinity: bool,
    /// What decides which endpoint a flow gets (L1, L2).
    pub algorithm: Algorithm,
    /// Who may call where `loadBalancerSourceRanges` hold, if they restrict anything in this family (S2).
    pub source_ranges: Option<Vec<Range>>,
    /// The endpoint sets of section 2.
    pub sets: Sets,
}

/// What a cluster's objects mean on this node.
#[derive(Clone, Debug)]
pub struct State {
    /// All service ports.
    pub ports: Vec<ServicePort>,
    /// Address, port and protocol to service port.
    pub frontends: BTreeMap<(IpAddr, u16, u8), (usize, Kind)>,
    /// Family, node port and protocol to service port.
    pub node_ports: BTreeMap<(bool, u16, u8), usize>,
    /// All ClusterIPs.
    pub cluster_ips: BTreeSet<IpAddr>,
    /// All LB IPs of the Services above.
    pub load_balancer_ips: BTreeSet<IpAddr>,
    /// The addresses that the Node object gives itself.
    pub node_named: BTreeSet<IpAddr>,
}

/// The number of a protocol, by the word that Kubernetes has for it; TCP where none is written.
pub(super) fn protocol(word: Option<&str>) -> u8 {
    match word {
        Some("UDP") => 17,
        Some("SCTP") => 132,
        Some(_) | None => 6,
    }
}

impl State {
    /// Applies sections 1 and 2 to a cluster.
    pub(super) fn of(cluster: &Cluster, node: &ThisNode) -> Self {
        let own = cluster.nodes.iter().find(|object| object.metadata.name.as_deref() == Some(&node.name));
        let zone = own.and_then(|own| own.metadata.labels.as_ref()?.get(ZONE)).map(String::as_str);
        let named = own.and_then(|own| own.status.as_ref()?.addresses.as_ref()).into_iter().flatten();
        let mut state = Self {
            ports: Vec::new(),
            frontends: BTreeMap::new(),
            node_ports: BTreeMap::new(),
            cluster_ips: BTreeSet::new(),
            load_balancer_ips: BTreeSet::new(),
            node_named: named.filter_map(|address| address.address.parse().ok()).collect(),
        };
        // Z1: who is older comes first, and has what both claim.
        let mut services: Vec<&Service> = cluster.services.iter().filter(|s| counts(s, node)).collect();
        services.sort_by_key(|s| (s.metadata.creation_timestamp.clone(), name_of(s)));
        let mut claims: Vec<(&Service, usize, i32)> = Vec::new();
        for service in &services {
            for v6 in [false, true] {
                // F4: a family without a ClusterIP is not programmed.
                if !cluster_ips(service).iter().any(|ip| ip.is_ipv6() == v6) {
                    continue;
                }
                for port in service.spec.iter().flat_map(|spec| spec.ports.iter().flatten()) {
                    claims.push((service, state.ports.len(), port.port));
                    state.ports.push(service_port(cluster, service, port, v6, node, zone));
                }
            }
        }
        state.claim_cluster_ips(&claims, node);
        state.claim_outside(&claims, node);
        state.claim_node_ports(&services);
        state
    }

    /// P13: what the node has itself leads nowhere else.
    fn claim_cluster_ips(&mut self, claims: &[(&Service, usize, i32)], node: &ThisNode) {
        for &(service, index, number) in claims {
            let id = &self.ports[index].id;
            for ip in cluster_ips(service).into_iter().filter(|ip| ip.is_ipv6() == id.v6) {
                self.cluster_ips.insert(ip);
                if !node.has(ip) {
                    self.frontends.entry((ip, number as u16, id.proto)).or_insert((index, Kind::ClusterIp));
                }
            }
        }
    }

    /// LB IPs (P14, S3, S5) and external IPs, as far as Z1 allows.
    fn claim_outside(&mut self, claims: &[(&Service, usize, i32)], node: &ThisNode) {
        for &(service, index, number) in claims {
            let id = self.ports[index].id.clone();
            let own = cluster_ips(service);
            let outside = load_balancer_ips(service).into_iter().map(|ip| (ip, Kind::LoadBalancerIp));
            let outside = outside.chain(external_ips(service).into_iter().map(|ip| (ip, Kind::ExternalIp)));
            for (ip, kind) in outside.filter(|(ip, _)| ip.is_ipv6() == id.v6) {
                let of_another = self.cluster_ips.contains(&ip) && !own.contains(&ip);
                if is_refused(ip, node) || of_another {
                    continue;
                }
                self.frontends.entry((ip, number as u16, id.proto)).or_insert((index, kind));
            }
        }
        let lb = self.frontends.iter().filter(|(_, (_, kind))| *kind == Kind::LoadBalancerIp);
        self.load_balancer_ips = lb.map(|((ip, ..), _)| *ip).collect();
    }

    fn claim_node_ports(&mut self, services: &[&Service]) {
        for service in services {
            for port in service.spec.iter().flat_map(|spec| spec.ports.iter().flatten()) {
                let Some(number) = port.node_port.filter(|number| *number != 0) else { continue };
                let proto = protocol(port.protocol.as_deref());
                let name = port.name.clone().unwrap_or_default();
                for v6 in [false, true] {
                    let is_it = |other: &ServicePort| {
                        (&other.id.namespace, &other.id.service) == (&name_of(service).0, &name_of(service).1)
                            && (&other.id.port, other.id.proto, other.id.v6) == (&name, proto, v6)
                    };
                    if let Some(index) = self.ports.iter().position(is_it) {
                        self.node_ports.entry((v6, number as u16, proto)).or_insert(index);
                    }
                }
            }
        }
    }

    /// The service port that a destination leads to (P16, P17).
    pub(super) fn frontend(
        &self,
        to: SocketAddr,
        proto: u8,
        node: &ThisNode,
    ) -> Option<(&ServicePort, Kind)> {
        if let Some((index, kind)) = self.frontends.get(&(to.ip(), to.port(), proto)) {
            return Some((&self.ports[*index], *kind));
        }
        if !self.node_ports_answer_at(to.ip(), node) {
            return None;
        }
        let index = self.node_ports.get(&(to.is_ipv6(), to.port(), proto))?;
        Some((&self.ports[*index], Kind::NodePort))
    }

    /// Whether an address and port are a node port that answers.
    pub(super) fn is_node_port(&self, at: SocketAddr, proto: u8, node: &ThisNode) -> bool {
        self.node_ports_answer_at(at.ip(), node)
            && self.node_ports.contains_key(&(at.is_ipv6(), at.port(), proto))
    }

    /// Whether an address is a Service's.
    pub(super) fn is_services(&self, ip: IpAddr) -> bool {
        self.cluster_ips.contains(&ip) || self.frontends.keys().any(|(frontend, ..)| *frontend == ip)
    }

    /// Whether an address is a ClusterIP whose other ports are refused (P13).
    pub(super) fn is_closed(&self, ip: IpAddr, node: &ThisNode) -> bool {
        self.cluster_ips.contains(&ip) && !node.has(ip)
    }

    /// P16, P17.
    fn node_ports_answer_at(&self, ip: IpAddr, node: &ThisNode) -> bool {
        let chosen = match &node.node_ports {
            NodePortAddresses::All => true,
            NodePortAddresses::Primary => node.primary.contains(&Some(ip)),
            NodePortAddresses::Within(ranges) => ranges.iter().any(|range| range.contains(ip)),
        };
        let lb_ip = self.load_balancer_ips.contains(&ip) && !self.node_named.contains(&ip);
        node.has(ip) && chosen && !lb_ip
    }
}

/// F1, F2.
fn counts(service: &Service, node: &ThisNode) -> bool {
    let Some(spec) = &service.spec else { return false };
    let label = service.metadata.labels.as_ref().and_then(|labels| labels.get(PROXY_NAME));
    let ours = match (label, &node.proxy_name) {
        (None, _) => true,
        (Some(label), Some(name)) => label == name,
        (Some(_), None) => false,
    };
    ours && spec.type_.as_deref() != Some("ExternalName")
}

/// Namespace and name.
pub(super) fn name_of(service: &Service) -> (String, String) {
    let metadata = &service.metadata;
    (metadata.namespace.clone().unwrap_or("default".to_owned()), metadata.name.clone().unwrap_or_default())
}

/// F1: a headless Service has none.
fn cluster_ips(service: &Service) -> Vec<IpAddr> {
    let Some(spec) = &service.spec else { return Vec::new() };
    let list = spec.cluster_ips.clone().filter(|list| !list.is_empty());
    let list = list.unwrap_or_else(|| spec.cluster_ip.clone().into_iter().collect());
    list.iter().filter_map(|text| text.parse().ok()).collect()
}

/// P14: those of a proxy are not programmed, and a host name is no address.
fn load_balancer_ips(service: &Service) -> Vec<IpAddr> {
    let status = service.status.as_ref().and_then(|status| status.load_balancer.as_ref());
    let ingress = status.and_then(|status| status.ingress.as_ref()).into_iter().flatten();
    let real = ingress.filter(|ingress| ingress.ip_mode.as_deref() != Some("Proxy"));
    real.filter_map(|ingress| ingress.ip.as_ref()?.parse().ok()).collect()
}

fn external_ips(service: &Service) -> Vec<IpAddr> {
    let list = service.spec.as_ref().and_then(|spec| spec.external_ips.as_ref());
    list.into_iter().flatten().filter_map(|text| text.parse().ok()).collect()
}

/// Z1: whether an address outside the cluster cannot be one.
fn is_refused(ip: IpAddr, node: &ThisNode) -> bool {
    is_nobodys(ip) || node.pod_ranges.iter().any(|range| range.contains(ip))
}

/// S2: the ranges of one family, if they restrict anything. A family without ranges, or with all addresses, is open. Where
/// this node may call, so may the LB IPs.
fn source_ranges(service: &Service, v6: bool, node: &ThisNode) -> Option<Vec<Range>> {
    let list = service.spec.as_ref().and_then(|spec| spec.load_balancer_source_ranges.as_ref());
    let ranges: Vec<Range> = list.into_iter().flatten().filter_map(|text| text.parse().ok()).collect();
    let mut ranges: Vec<Range> = ranges.into_iter().filter(|range| range.is_v6() == v6).collect();
    if ranges.is_empty() || ranges.iter().any(|range| range.length() == 0) {
        return None;
    }
    if node.source(v6).is_some_and(|primary| ranges.iter().any(|range| range.contains(primary))) {
        let stand = load_balancer_ips(service).into_iter().filter(|ip| !is_refused(*ip, node));
        ranges.extend(stand.map(Range::one));
    }
    Some(ranges)
}

fn service_port(
    cluster: &Cluster,
    service: &Service,
    port: &k8s_openapi::api::core::v1::ServicePort,
    v6: bool,
    node: &ThisNode,
    zone: Option<&str>,
) -> ServicePort {
    let (namespace, name) = name_of(service);
    let id = PortId {
        namespace,
        service: name,
        port: port.name.clone().unwrap_or_default(),
        proto: protocol(port.protocol.as_deref()),
        v6,
    };
    let spec = service.spec.clone().unwrap_or_default();
    let is_local = |policy: Option<String>| policy.as_deref() == Some("Local");
    let candidates = candidates(cluster, &id, &node.name, &Weights::of_service(service));
    ServicePort {
        internal_local: is_local(spec.internal_traffic_policy),
        external_local: is_local(spec.external_traffic_policy),
        affinity: spec.session_affinity.as_deref() == Some("ClientIP"),
        algorithm: Algorithm::of(service),
        source_ranges: source_ranges(service, v6, node),
        sets: sets(&candidates, &node.name, zone),
        id,
    }
}
