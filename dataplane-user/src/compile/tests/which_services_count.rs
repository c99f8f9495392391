//! F1, F2, F4, F7.

use super::{addr, context, only_port, set, tables};
use crate::compile::ServiceTables;
use crate::model::samples::{endpoint, ip, service, service_port, slice};
use crate::model::{AddressType, EndpointSlice, Service, ServicePort, ServiceType, SlicePort};
use dataplane_common::Protocol;
use dataplane_common::service::Policy;

/// F1
#[test]
fn a_headless_service_has_no_tables() {
    let headless = Service { cluster_ips: Vec::new(), ..service("web") };
    assert_eq!(
        tables(&headless, &[slice("web-1", "web", vec![endpoint("10.1.0.1", "here")])]),
        ServiceTables::default()
    );
}

/// F1
#[test]
fn a_headless_service_has_no_tables_even_with_external_ips_and_node_ports() {
    let port = ServicePort { node_port: Some(30_001), ..service_port() };
    let headless = Service {
        cluster_ips: Vec::new(),
        external_ips: [ip("203.0.113.1")].into(),
        ports: vec![port],
        ..service("web")
    };
    assert_eq!(tables(&headless, &[]), ServiceTables::default());
}

/// F1
#[test]
fn an_external_name_has_no_tables_even_with_a_stale_cluster_ip() {
    let external = Service { service_type: ServiceType::ExternalName, ..service("web") };
    assert_eq!(tables(&external, &[]), ServiceTables::default());
}

/// F2
#[test]
fn a_service_of_another_proxy_is_skipped() {
    let labelled = Service { proxy_name: Some("other".into()), ..service("web") };
    assert_eq!(tables(&labelled, &[]), ServiceTables::default());

    let mut named = context();
    named.proxy_name = Some("ours".into());
    assert_eq!(crate::compile::service(&labelled, &[], &named).0, ServiceTables::default());
}

/// F2
#[test]
fn a_service_labelled_with_our_name_counts_as_one_without_label_does() {
    let mut named = context();
    named.proxy_name = Some("ours".into());
    let labelled = Service { proxy_name: Some("ours".into()), ..service("web") };
    assert_eq!(crate::compile::service(&labelled, &[], &named).0.ports.len(), 1);
    assert_eq!(crate::compile::service(&service("web"), &[], &named).0.ports.len(), 1);
}

/// F4
#[test]
fn the_families_are_compiled_from_their_own_addresses_and_slices() {
    let dual = Service { cluster_ips: vec![ip("10.96.0.10"), ip("fd00:96::10")], ..service("web") };
    let slices = [
        slice("web-4", "web", vec![endpoint("10.1.0.1", "here")]),
        EndpointSlice {
            address_type: AddressType::Ipv6,
            ..slice("web-6", "web", vec![endpoint("fd00:1::1", "here")])
        },
        EndpointSlice { address_type: AddressType::Fqdn, ..slice("web-f", "web", Vec::new()) },
    ];
    let tables = tables(&dual, &slices);
    let [v4, v6] = [false, true].map(|ipv6| {
        let mut ports = tables.ports.iter().filter(|(name, _)| name.ipv6 == ipv6);
        ports.next().unwrap().1
    });
    assert_eq!(v4.cluster, set(&["10.1.0.1:8080"]));
    assert_eq!(v6.cluster, set(&["[fd00:1::1]:8080"]));
    assert!(v4.frontends.keys().all(|key| key.addr().is_v4()));
    assert!(v6.frontends.keys().all(|key| !key.addr().is_v4()));
    assert_eq!(tables.closed, [addr("10.96.0.10"), addr("fd00:96::10")].into());
}

/// F4
#[test]
fn an_external_ip_of_a_family_the_service_does_not_have_is_ignored_without_complaint() {
    let mixed = Service { external_ips: [ip("2001:db8::1"), ip("203.0.113.1")].into(), ..service("web") };
    let tables = tables(&mixed, &[]);
    let port = only_port(&tables);
    assert_eq!(port.frontends.len(), 2);
    assert!(port.frontends.keys().all(|key| key.addr().is_v4()));
}

/// F7
#[test]
fn one_number_with_three_protocols_is_three_ports() {
    let protocols = [Protocol::Tcp, Protocol::Udp, Protocol::Sctp];
    let ports = protocols.map(|protocol| ServicePort {
        name: protocol.to_string().into(),
        protocol,
        ..service_port()
    });
    let slice_ports =
        protocols.map(|protocol| SlicePort { name: protocol.to_string().into(), protocol, port: 8080 });
    let all = Service { ports: ports.to_vec(), ..service("dns") };
    let slice = EndpointSlice {
        ports: slice_ports[..2].to_vec(),
        ..slice("dns-1", "dns", vec![endpoint("10.1.0.1", "here")])
    };
    let tables = tables(&all, &[slice]);
    let has = |tables: &ServiceTables, protocol: Protocol| {
        let mut ports = tables.ports.iter().filter(|(name, _)| name.proto == protocol.number());
        ports.next().map(|(_, port)| port.policy.has(Policy::HAS_ENDPOINTS))
    };
    assert_eq!(protocols.map(|protocol| has(&tables, protocol)), [Some(true), Some(true), Some(false)]);

    let without_udp = Service { ports: vec![ports[0].clone(), ports[2].clone()], ..service("dns") };
    let tables = crate::compile::service(&without_udp, &[], &context()).0;
    assert_eq!(protocols.map(|protocol| has(&tables, protocol)), [Some(false), None, Some(false)]);
}
