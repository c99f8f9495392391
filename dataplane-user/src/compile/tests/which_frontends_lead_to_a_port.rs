//! P13, P14, F8, S1, S3, S5 as far as tables show them, and ports that are wrong.

use super::{addr, context, frontends, only_port, tables, texts};
use crate::compile::{Context, ServiceTables};
use crate::model::samples::{ip, service, service_port};
use crate::model::{LoadBalancerIngress, Service, ServicePort, ServiceType};
use dataplane_common::Protocol;
use dataplane_common::frontend::FrontendKind::{ClusterIp, ExternalIp, LoadBalancerIp, NodePort};
use dataplane_common::service::Policy;
use std::collections::BTreeSet;

const TCP: u8 = 6;

fn balanced() -> Service {
    Service {
        service_type: ServiceType::LoadBalancer,
        ingress: [LoadBalancerIngress { ip: ip("203.0.113.1"), proxy: false }].into(),
        ports: vec![ServicePort { node_port: Some(30_001), ..service_port() }],
        ..service("web")
    }
}

#[test]
fn every_kind_of_address_leads_to_the_port() {
    let all = Service { external_ips: [ip("203.0.113.2")].into(), ..balanced() };
    assert_eq!(
        frontends(only_port(&tables(&all, &[]))),
        [
            ("0.0.0.0".into(), 30_001, TCP, NodePort),
            ("10.96.0.10".into(), 80, TCP, ClusterIp),
            ("203.0.113.1".into(), 80, TCP, LoadBalancerIp),
            ("203.0.113.2".into(), 80, TCP, ExternalIp),
        ]
    );
}

#[test]
fn a_node_port_of_ipv6_has_the_unspecified_address_of_its_family() {
    let v6 = Service {
        cluster_ips: vec![ip("fd00:96::1")],
        ports: vec![ServicePort { node_port: Some(30_001), ..service_port() }],
        ..service("web")
    };
    assert_eq!(frontends(only_port(&tables(&v6, &[])))[0], ("::".into(), 30_001, TCP, NodePort));
}

/// P14
#[test]
fn an_lb_ip_in_proxy_mode_is_not_programmed() {
    let proxied = Service {
        ingress: [LoadBalancerIngress { ip: ip("203.0.113.1"), proxy: true }].into(),
        ..balanced()
    };
    let tables = tables(&proxied, &[]);
    assert!(frontends(only_port(&tables)).iter().all(|(.., kind)| *kind != LoadBalancerIp));
}

/// S3
#[test]
fn an_lb_service_without_a_node_port_still_has_its_lb_ip() {
    let tables = tables(&Service { ports: vec![service_port()], ..balanced() }, &[]);
    let kinds: Vec<_> = frontends(only_port(&tables)).into_iter().map(|(.., kind)| kind).collect();
    assert_eq!(kinds, [ClusterIp, LoadBalancerIp]);
}

/// P13
#[test]
fn a_cluster_ip_is_closed_on_all_other_ports() {
    assert_eq!(tables(&balanced(), &[]).closed, [addr("10.96.0.10")].into(), "and only the ClusterIP is");
}

/// P13
#[test]
fn a_cluster_ip_on_an_interface_of_this_node_belongs_to_the_node() {
    let held = Context { node_addresses: [addr("10.96.0.10")].into(), ..context() };
    let (tables, _) = crate::compile::service(&balanced(), &[], &held);
    assert_eq!(tables.closed, BTreeSet::new());
    let kinds: Vec<_> = frontends(only_port(&tables)).into_iter().map(|(.., kind)| kind).collect();
    assert!(!kinds.contains(&ClusterIp) && kinds.contains(&LoadBalancerIp), "{kinds:?}");
}

/// P13
#[test]
fn a_service_that_does_not_count_closes_nothing() {
    let headless = Service { cluster_ips: Vec::new(), ..service("web") };
    assert_eq!(tables(&headless, &[]), ServiceTables::default());
}

/// S1
#[test]
fn the_affinity_timeout_is_brought_into_its_bounds_with_a_complaint() {
    let sticky = |seconds| Service { affinity_seconds: Some(seconds), ..service("web") };
    let seconds = |service| {
        let (tables, complaints) = crate::compile::service(&service, &[], &context());
        (only_port(&tables).policy.affinity_seconds(), complaints.len())
    };
    assert_eq!(seconds(service("web")), (0, 0));
    assert_eq!(seconds(sticky(10_800)), (10_800, 0));
    assert_eq!(seconds(sticky(0)), (1, 1));
    assert_eq!(seconds(sticky(86_401)), (86_400, 1));
}

#[test]
fn traffic_policies_are_passed_on() {
    let policy = |internal_local, external_local| {
        let service = Service { internal_local, external_local, ..balanced() };
        only_port(&tables(&service, &[])).policy.with_tries(0)
    };
    assert_eq!(policy(false, false), Policy::new(0, 0));
    assert_eq!(policy(true, false), Policy::new(Policy::INTERNAL_LOCAL, 0));
    assert_eq!(policy(false, true), Policy::new(Policy::EXTERNAL_LOCAL, 0));
}

/// Z5
#[test]
fn a_port_that_is_wrong_costs_that_port_only() {
    let named =
        |name: &str, port, node_port| ServicePort { name: name.into(), port, node_port, ..service_port() };
    let broken = Service {
        ports: vec![
            named("a", 80, None),
            named("a", 81, None),
            named("b", 80, Some(30_001)),
            named("c", 0, None),
            ServicePort { protocol: Protocol::Udp, ..named("d", 80, None) },
        ],
        ..service("web")
    };
    let (tables, complaints) = crate::compile::service(&broken, &[], &context());
    assert_eq!(
        texts(&complaints),
        [
            "Service default/web: BadPort: 80/TCP is given to two ports: the first has it",
            "Service default/web: BadPort: port \"a\" TCP is given twice: the first counts",
            "Service default/web: BadPort: port \"c\" has the number 0: it is not programmed",
        ]
    );
    let ports: Vec<_> = tables.ports.iter().map(|(name, port)| (&*name.port, frontends(port))).collect();
    assert_eq!(
        ports,
        [
            ("a", vec![("10.96.0.10".into(), 80, TCP, ClusterIp)]),
            ("b", vec![("0.0.0.0".into(), 30_001, TCP, NodePort)]),
            ("c", vec![]),
            ("d", vec![("10.96.0.10".into(), 80, 17, ClusterIp)]),
        ]
    );
}
