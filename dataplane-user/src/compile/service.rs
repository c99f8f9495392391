//! One Service and its slices to its tables. Pure: the same objects in any order give the same tables.

use super::complaint::{Complaint, ComplaintReason};
use super::endpoints::{self, Candidate, Needs};
use super::node::{OwnAddresses, primary_addresses};
use super::selection::{self, Defaults, Selection};
use super::tables::{Endpoint, PortTables, ServicePortName, ServiceTables};
use crate::model::{EndpointSlice, Kind, ObjectName, Reference, Service, ServicePort, ServiceType, Store};
use dataplane_common::backend::BackendStatus;
use dataplane_common::frontend::{FrontendKey, FrontendKind};
use dataplane_common::service::Policy;
use dataplane_common::{Addr, Port};
use ipnet::IpNet;
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

/// Bounds of an affinity timeout in seconds (S1).
const AFFINITY_SECONDS: std::ops::RangeInclusive<u32> = 1..=86_400;

/// What compiling a Service must know of the node.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Context {
    /// This node's name.
    pub node_name: Arc<str>,
    /// This node's zone (T1).
    pub zone: Option<Arc<str>>,
    /// The name this agent was configured with: Services labelled for another proxy are skipped (F2).
    pub proxy_name: Option<Arc<str>>,
    /// The node's own addresses.
    pub node_addresses: BTreeSet<Addr>,
    /// The node's primary address of each family (S2).
    pub primary: [Option<IpAddr>; 2],
    /// The cluster's pod ranges: no external IP may lie in one (Z1).
    pub pod_ranges: Vec<IpNet>,
    /// Which external IPs are programmed (Z1).
    pub external_ips: ExternalIps,
    /// How endpoints are chosen where a Service asks for nothing (L1).
    pub defaults: Defaults,
}

/// Which `externalIPs` are programmed (Z1): whoever may write a Service can claim any address by them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ExternalIps {
    /// All that Z1 allows.
    #[default]
    All,
    /// None that is an address of this node.
    NotOfNode,
    /// None at all.
    None,
}

impl Context {
    /// What the store says of the node, together with what only the agent knows: its proxy name, the pod ranges given by
    /// flag, and the addresses on the node's interfaces.
    pub fn new(
        store: &Store,
        proxy_name: Option<Arc<str>>,
        cluster_cidrs: &[IpNet],
        on_interfaces: &OwnAddresses,
    ) -> Self {
        let mut pod_ranges = store.pod_ranges();
        pod_ranges.extend(cluster_cidrs);
        Self {
            node_name: store.node_name().clone(),
            zone: store.own_node().and_then(|node| node.zone.clone()),
            proxy_name,
            node_addresses: on_interfaces.addrs(),
            primary: primary_addresses(store.own_node(), &on_interfaces.own),
            pod_ranges,
            external_ips: ExternalIps::default(),
            defaults: Defaults::default(),
        }
    }

    /// Why an external IP is not programmed by choice.
    fn refuses_external(&self, ip: IpAddr) -> Option<&'static str> {
        match self.external_ips {
            ExternalIps::All => None,
            ExternalIps::NotOfNode if !self.node_addresses.contains(&Addr::from(ip)) => None,
            ExternalIps::NotOfNode => {
                Some("an address of this node, which --external-ips=not-of-node refuses")
            }
            ExternalIps::None => Some("an external IP, which --external-ips=none refuses"),
        }
    }
}

/// Compiles a Service and its slices. What breaks a rule is left out and complained about; the rest stands (Z5).
pub fn service(
    service: &Service,
    slices: &[EndpointSlice],
    context: &Context,
) -> (ServiceTables, Vec<Complaint>) {
    let mut job = Job {
        service,
        slices,
        context,
        selection: Selection::default(),
        tables: ServiceTables::default(),
        complaints: Vec::new(),
    };
    if has_dataplane(service, context) {
        job.compile();
    }
    job.complaints.sort();
    job.complaints.dedup();
    (job.tables, job.complaints)
}

/// F1: ExternalName Services have no dataplane; nor have headless ones, which have no ClusterIP of either family. F2: nor
/// have those of another proxy.
pub(super) fn has_dataplane(service: &Service, context: &Context) -> bool {
    let named = match service.service_type {
        ServiceType::ClusterIp | ServiceType::NodePort | ServiceType::LoadBalancer => false,
        ServiceType::ExternalName => true,
    };
    let ours = service.proxy_name.is_none() || service.proxy_name == context.proxy_name;
    !named && ours
}

/// Why an address is none that a host can be reached at from elsewhere (Z1, Z2).
pub(super) fn refused(ip: IpAddr) -> Option<&'static str> {
    let addr = Addr::from(ip);
    let link_local = match addr.to_ip() {
        IpAddr::V4(v4) => v4.is_link_local(),
        IpAddr::V6(v6) => v6.is_unicast_link_local(),
    };
    if addr.is_unspecified() {
        Some("unspecified")
    } else if addr.is_loopback() {
        Some("loopback")
    } else if link_local {
        Some("link-local")
    } else if addr.is_multicast_or_broadcast() {
        Some("multicast or broadcast")
    } else if ip.is_ipv6() && addr.is_v4() {
        Some("an IPv4 address in IPv6 form")
    } else {
        None
    }
}

/// A complaint about the Service.
pub(super) fn complaint(service: &ObjectName, reason: ComplaintReason, text: String) -> Complaint {
    Complaint { object: Reference { kind: Kind::Service, name: service.clone() }, reason, text }
}

struct Job<'a> {
    service: &'a Service,
    slices: &'a [EndpointSlice],
    context: &'a Context,
    selection: Selection,
    tables: ServiceTables,
    complaints: Vec<Complaint>,
}

impl Job<'_> {
    fn compile(&mut self) {
        let service = self.service;
        let affinity = self.affinity_seconds();
        self.selection = self.select();
        for ipv6 in [false, true] {
            // F1, F4: the families are independent; one without a ClusterIP is not programmed.
            if !service.cluster_ips.iter().any(|ip| ip.is_ipv6() == ipv6) {
                continue;
            }
            let addresses = self.addresses(ipv6);
            let ranges = self.source_ranges(ipv6, &addresses);
            self.check_slices(ipv6);
            let mut taken = BTreeSet::new();
            for port in &service.ports {
                if let Some(tables) = self.port(port, ipv6, affinity, &addresses, &mut taken)
                    && !ranges.is_empty()
                    && tables.frontends.values().any(|kind| *kind != FrontendKind::ClusterIp)
                {
                    let flags = tables.policy.flags() | Policy::SOURCE_RANGES;
                    tables.policy = Policy::new(flags, affinity);
                    tables.ranges = ranges.clone();
                }
            }
            self.close(&addresses);
        }
    }

    fn complain(&mut self, reason: ComplaintReason, text: String) {
        self.complaints.push(complaint(&self.service.name, reason, text));
    }

    /// L1, L3: how endpoints are chosen.
    fn select(&mut self) -> Selection {
        let (name, complaints) = (&self.service.name, &mut self.complaints);
        let told = |reason, text| complaints.push(complaint(name, reason, text));
        Selection::of(self.service.choice.as_deref(), self.context.defaults, told)
    }

    /// S1: the timeout, brought into its bounds; 0 without affinity.
    fn affinity_seconds(&mut self) -> u32 {
        let Some(seconds) = self.service.affinity_seconds else { return 0 };
        let bounded = seconds.clamp(*AFFINITY_SECONDS.start(), *AFFINITY_SECONDS.end());
        if bounded != seconds {
            let text = format!("an affinity timeout of {seconds} s is out of range: {bounded} s is used");
            self.complain(ComplaintReason::BadAffinityTimeout, text);
        }
        bounded
    }

    /// The addresses of the Service in one family, without those that are refused (Z1, P14), and without a ClusterIP that the node
    /// has itself (P13).
    fn addresses(&mut self, ipv6: bool) -> Vec<(Addr, FrontendKind)> {
        let service = self.service;
        let cluster = service.cluster_ips.iter().map(|ip| (*ip, FrontendKind::ClusterIp));
        let ingress = service.ingress.iter().filter(|ingress| !ingress.proxy);
        let ingress = ingress.map(|ingress| (ingress.ip, FrontendKind::LoadBalancerIp));
        let external = service.external_ips.iter().map(|ip| (*ip, FrontendKind::ExternalIp));
        let mut addresses = Vec::new();
        for (ip, kind) in cluster.chain(ingress).chain(external).filter(|(ip, _)| ip.is_ipv6() == ipv6) {
            let pod = kind != FrontendKind::ClusterIp
                && self.context.pod_ranges.iter().any(|range| range.contains(&ip));
            let by_choice =
                || (kind == FrontendKind::ExternalIp).then(|| self.context.refuses_external(ip)).flatten();
            match refused(ip).or(pod.then_some("inside a pod range")).or_else(by_choice) {
                Some(why) => {
                    let text = format!("{ip} is not programmed: it is {why}");
                    self.complain(ComplaintReason::RefusedAddress, text);
                }
                None if kind == FrontendKind::ClusterIp
                    && self.context.node_addresses.contains(&Addr::from(ip)) => {}
                None => addresses.push((Addr::from(ip), kind)),
            }
        }
        addresses
    }

    /// S2: the ranges of a family, none of them if it is open. Where this node may call, so may its processes that send from
    /// the LB IP itself, because it is on an interface.
    fn source_ranges(&self, ipv6: bool, addresses: &[(Addr, FrontendKind)]) -> BTreeSet<IpNet> {
        let of_family = |range: &&IpNet| range.addr().is_ipv6() == ipv6;
        let mut ranges: BTreeSet<IpNet> =
            self.service.source_ranges.iter().filter(of_family).map(IpNet::trunc).collect();
        if ranges.iter().any(|range| range.prefix_len() == 0) {
            return BTreeSet::new();
        }
        let primary = self.context.primary[usize::from(ipv6)];
        if primary.is_some_and(|primary| ranges.iter().any(|range| range.contains(&primary))) {
            let own = addresses.iter().filter(|(_, kind)| *kind == FrontendKind::LoadBalancerIp);
            ranges.extend(own.map(|(addr, _)| IpNet::from(addr.to_ip())));
        }
        ranges
    }

    /// Z2: one complaint for each slice with endpoints that cannot be used.
    fn check_slices(&mut self, ipv6: bool) {
        for slice in self.slices.iter().filter(|slice| endpoints::is_of_family(slice, ipv6)) {
            let ignored = || slice.endpoints.iter().filter(|e| !endpoints::is_usable(e.address, ipv6));
            let Some(first) = ignored().next() else { continue };
            let why = refused(first.address).unwrap_or("of the other family");
            let text = format!(
                "EndpointSlice {}: {} of its endpoints ignored; the first is {}, which is {why}",
                slice.name,
                ignored().count(),
                first.address,
            );
            self.complain(ComplaintReason::BadEndpointAddress, text);
        }
        // L3.
        for slice in self.slices.iter().filter(|slice| endpoints::is_of_family(slice, ipv6)) {
            if let Err(why) = selection::slice_weight(slice) {
                self.complain(ComplaintReason::BadWeights, format!("EndpointSlice {}: {why}", slice.name));
            }
        }
    }

    fn port(
        &mut self,
        port: &ServicePort,
        ipv6: bool,
        affinity: u32,
        addresses: &[(Addr, FrontendKind)],
        taken: &mut BTreeSet<FrontendKey>,
    ) -> Option<&mut PortTables> {
        let name = ServicePortName {
            service: self.service.name.clone(),
            port: port.name.clone(),
            proto: port.protocol.number(),
            ipv6,
        };
        if self.tables.ports.contains_key(&name) {
            let text = format!("port {:?} {} is given twice: the first counts", &*port.name, port.protocol);
            self.complain(ComplaintReason::BadPort, text);
            return None;
        }
        let mut tables =
            PortTables { frontends: self.frontends(port, ipv6, addresses, taken), ..PortTables::default() };
        self.fill_endpoints(port, ipv6, affinity, &mut tables);
        Some(self.tables.ports.entry(name).or_insert(tables))
    }

    /// The addresses that lead to a port: those of the Service, and the node port (S3: if it has one). `taken` holds the
    /// frontends of the ports before it.
    fn frontends(
        &mut self,
        port: &ServicePort,
        ipv6: bool,
        addresses: &[(Addr, FrontendKind)],
        taken: &mut BTreeSet<FrontendKey>,
    ) -> BTreeMap<FrontendKey, FrontendKind> {
        let any = if ipv6 { Addr::UNSPECIFIED } else { Addr::from_v4([0; 4]) };
        let node_port = port.node_port.filter(|number| *number != 0);
        let node_port = node_port.map(|number| (any, number, FrontendKind::NodePort));
        let all = addresses.iter().map(|(addr, kind)| (*addr, port.port, *kind)).chain(node_port);
        let mut frontends = BTreeMap::new();
        for (addr, number, kind) in all {
            let key = FrontendKey::new(addr, Port::new(number), port.protocol.number());
            if number == 0 {
                let text = format!("port {:?} has the number 0: it is not programmed", &*port.name);
                self.complain(ComplaintReason::BadPort, text);
            } else if taken.contains(&key) {
                let text = format!("{number}/{} is given to two ports: the first has it", port.protocol);
                self.complain(ComplaintReason::BadPort, text);
            } else {
                // An address that is there twice, as external IP and as LB IP, keeps its first kind.
                frontends.entry(key).or_insert(kind);
            }
        }
        taken.extend(frontends.keys());
        frontends
    }

    fn fill_endpoints(&mut self, port: &ServicePort, ipv6: bool, affinity: u32, tables: &mut PortTables) {
        let outside = tables.frontends.values().any(|kind| *kind != FrontendKind::ClusterIp);
        let candidates = endpoints::candidates(self.slices, port, ipv6, &self.selection.weights);
        let sets = endpoints::select(&candidates, Needs::of(self.service, outside), self.context);
        let flag = |set: bool, flag: u32| if set { flag } else { 0 };
        let flags = flag(self.service.internal_local, Policy::INTERNAL_LOCAL)
            | flag(self.service.external_local, Policy::EXTERNAL_LOCAL)
            | flag(sets.any, Policy::HAS_ENDPOINTS);
        let flags = flags | flag(self.selection.by_packet, Policy::BY_PACKET);
        tables.policy = Policy::new(flags, affinity).with_tries(self.selection.tries);
        let flags_of = |key: &Endpoint, candidate: &Candidate<'_>| {
            let flags = endpoints::backend_flags(candidate, self.context)?;
            let member = flag(sets.cluster.contains(key), BackendStatus::IN_CLUSTER)
                | flag(sets.local.contains(key), BackendStatus::IN_LOCAL);
            Some((*key, flags | member))
        };
        tables.backends = candidates.iter().filter_map(|(key, candidate)| flags_of(key, candidate)).collect();
        let weighted =
            candidates.iter().filter(|(key, it)| it.weight != 1 && tables.backends.contains_key(key));
        tables.weights = weighted.map(|(key, candidate)| (*key, candidate.weight)).collect();
        tables.algorithm = self.selection.algorithm;
        tables.seed = selection::seed(self.service);
        tables.order = selection::order(tables.seed, &self.context.node_name);
        tables.cluster = sets.cluster;
        tables.local = sets.local;
        if sets.all_zero {
            let text = format!(
                "all endpoints of port {:?} have the weight 0: it is refused as if it had none",
                &*port.name
            );
            self.complain(ComplaintReason::AllWeightsZero, text);
        }
    }

    /// P13.
    fn close(&mut self, addresses: &[(Addr, FrontendKind)]) {
        let cluster_ips = addresses.iter().filter(|(_, kind)| *kind == FrontendKind::ClusterIp);
        self.tables.closed.extend(cluster_ips.map(|(addr, _)| *addr));
    }
}
