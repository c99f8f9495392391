//! Small valid objects for unit tests, to be changed by struct update.

use super::{
    AddressType, Endpoint, EndpointSlice, NameHash, ObjectName, Service, ServicePort, ServiceType, SlicePort,
};
use dataplane_common::Protocol;
use std::net::IpAddr;

pub(crate) fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

pub(crate) fn name(text: &str) -> ObjectName {
    ObjectName::new("default", text)
}

/// ClusterIP 10.96.0.10, port 80 over TCP without a name.
pub(crate) fn service(text: &str) -> Service {
    Service {
        name: name(text),
        uid: "".into(),
        created: 0,
        proxy_name: None,
        service_type: ServiceType::ClusterIp,
        cluster_ips: vec![ip("10.96.0.10")],
        external_ips: [].into(),
        ingress: [].into(),
        ports: vec![service_port()],
        internal_local: false,
        external_local: false,
        affinity_seconds: None,
        source_ranges: [].into(),
        health_check_node_port: None,
        choice: None,
    }
}

pub(crate) fn service_port() -> ServicePort {
    ServicePort { name: "".into(), protocol: Protocol::Tcp, port: 80, node_port: None }
}

/// An IPv4 slice of port 8080 over TCP without a name.
pub(crate) fn slice(text: &str, service: &str, endpoints: Vec<Endpoint>) -> EndpointSlice {
    EndpointSlice {
        name: name(text),
        service: name(service),
        address_type: AddressType::Ipv4,
        ports: vec![SlicePort { name: "".into(), protocol: Protocol::Tcp, port: 8080 }],
        endpoints,
        trigger_time: None,
        weight: None,
        by_controller: false,
    }
}

/// Ready, on `node`; without a node if that is empty.
pub(crate) fn endpoint(address: &str, node: &str) -> Endpoint {
    Endpoint {
        address: ip(address),
        node: (!node.is_empty()).then(|| node.into()),
        ready: true,
        serving: true,
        terminating: false,
        for_nodes: [].into(),
        for_zones: [].into(),
        pod: NameHash::NONE,
        zone: NameHash::NONE,
    }
}

/// Terminating and still serving.
pub(crate) fn draining(address: &str, node: &str) -> Endpoint {
    Endpoint { ready: false, terminating: true, ..endpoint(address, node) }
}

/// A sequence of numbers that is the same in each run (splitmix64, Steele, Lea and Flood 2014).
#[derive(Debug)]
pub(crate) struct Seed(pub(crate) u64);

impl Seed {
    pub(crate) fn below(&mut self, bound: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        usize::try_from((z ^ (z >> 31)) % u64::try_from(bound).unwrap()).unwrap()
    }

    pub(crate) fn flip(&mut self) -> bool {
        self.below(2) == 0
    }

    pub(crate) fn shuffle<T>(&mut self, items: &mut [T]) {
        for at in (1..items.len()).rev() {
            items.swap(at, self.below(at + 1));
        }
    }
}
