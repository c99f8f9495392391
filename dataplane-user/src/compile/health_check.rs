//! What a Service's health check port tells (S4). Pure: the servers are elsewhere.

use super::endpoints;
use super::selection::Weights;
use super::service::{Context, has_dataplane};
use crate::model::{EndpointSlice, Service, ServiceType};
use std::collections::BTreeSet;
use std::sync::Arc;

/// What a Service's health check port tells.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HealthCheck {
    /// `metadata.uid` of the Service, for Events.
    pub uid: Arc<str>,
    /// `spec.healthCheckNodePort`.
    pub port: u16,
    /// The distinct addresses of local READY endpoints, IPv4 and IPv6; `None` for a family the Service does not have.
    pub endpoints: [Option<usize>; 2],
}

/// S4: the health check of a Service of type LoadBalancer with `externalTrafficPolicy: Local`. Endpoints count that are on
/// this node, READY and not terminating, an address with several ports once. As with kube-proxy, the families are
/// counted apart: each is told at addresses of its own (F4).
pub fn health_check(service: &Service, slices: &[EndpointSlice], context: &Context) -> Option<HealthCheck> {
    let balanced = service.service_type == ServiceType::LoadBalancer && service.external_local;
    let port = service.health_check_node_port.filter(|port| *port != 0)?;
    if !balanced || !has_dataplane(service, context) {
        return None;
    }
    let endpoints = [false, true].map(|ipv6| {
        let has_family = service.cluster_ips.iter().any(|ip| ip.is_ipv6() == ipv6);
        has_family.then(|| count(service, slices, context, ipv6))
    });
    endpoints.iter().any(Option::is_some).then(|| HealthCheck { uid: service.uid.clone(), port, endpoints })
}

fn count(service: &Service, slices: &[EndpointSlice], context: &Context, ipv6: bool) -> usize {
    let mut addresses = BTreeSet::new();
    for port in &service.ports {
        for (key, endpoint) in endpoints::candidates(slices, port, ipv6, &Weights::default()) {
            if endpoint.ready && !endpoint.terminating && endpoints::is_local(&endpoint, context) {
                addresses.insert(key.addr);
            }
        }
    }
    addresses.len()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::samples::{draining, endpoint, ip, service, service_port, slice};
    use crate::model::{AddressType, Endpoint, ServicePort, SlicePort};
    use dataplane_common::Protocol;

    fn balanced() -> Service {
        Service {
            service_type: ServiceType::LoadBalancer,
            external_local: true,
            health_check_node_port: Some(30_000),
            ..service("web")
        }
    }

    fn context() -> Context {
        Context { node_name: "here".into(), ..Context::default() }
    }

    fn counts(service: &Service, slices: &[EndpointSlice]) -> Option<[Option<usize>; 2]> {
        health_check(service, slices, &context()).map(|check| check.endpoints)
    }

    /// S4
    #[test]
    fn only_load_balancers_with_the_local_policy_have_a_health_check() {
        assert_eq!(counts(&balanced(), &[]), Some([Some(0), None]));
        assert_eq!(counts(&Service { external_local: false, ..balanced() }, &[]), None);
        assert_eq!(counts(&Service { service_type: ServiceType::NodePort, ..balanced() }, &[]), None);
        assert_eq!(counts(&Service { health_check_node_port: None, ..balanced() }, &[]), None);
        // F1, F2
        assert_eq!(counts(&Service { cluster_ips: Vec::new(), ..balanced() }, &[]), None);
        assert_eq!(counts(&Service { proxy_name: Some("other".into()), ..balanced() }, &[]), None);
    }

    /// S4
    #[test]
    fn ready_endpoints_of_this_node_count_and_no_others() {
        let unready = Endpoint { ready: false, serving: false, ..endpoint("10.0.0.5", "here") };
        let leaving = Endpoint { terminating: true, ..endpoint("10.0.0.6", "here") };
        let endpoints = vec![
            endpoint("10.0.0.1", "here"),
            endpoint("10.0.0.2", "there"),
            endpoint("10.0.0.3", ""),
            draining("10.0.0.4", "here"),
            unready,
            leaving,
        ];
        assert_eq!(counts(&balanced(), &[slice("web-1", "web", endpoints)]), Some([Some(1), None]));
    }

    /// S4
    #[test]
    fn with_only_terminating_endpoints_there_are_none() {
        let slices = [slice("web-1", "web", vec![draining("10.0.0.4", "here")])];
        assert_eq!(counts(&balanced(), &slices), Some([Some(0), None]));
    }

    /// S4
    #[test]
    fn an_address_counts_once_whatever_its_ports_and_slices() {
        let port = |name: &str, port| SlicePort { name: name.into(), protocol: Protocol::Tcp, port };
        let named = |name: &str, port| ServicePort { name: name.into(), port, ..service_port() };
        let web = Service { ports: vec![named("a", 80), named("b", 81)], ..balanced() };
        let of = |name| EndpointSlice {
            ports: vec![port("a", 8080), port("b", 8081)],
            ..slice(name, "web", vec![endpoint("10.0.0.1", "here")])
        };
        assert_eq!(counts(&web, &[of("web-1"), of("web-2")]), Some([Some(1), None]));
    }

    /// S4, F4
    #[test]
    fn the_families_are_counted_apart() {
        let web = Service { cluster_ips: vec![ip("10.96.0.10"), ip("fd00::10")], ..balanced() };
        let v6 = vec![endpoint("fd01::1", "here"), endpoint("fd01::2", "here")];
        let v6 = EndpointSlice { address_type: AddressType::Ipv6, ..slice("web-6", "web", v6) };
        let v4 = slice("web-4", "web", vec![endpoint("10.0.0.1", "here")]);
        assert_eq!(counts(&web, &[v4, v6]), Some([Some(1), Some(2)]));
    }
}
