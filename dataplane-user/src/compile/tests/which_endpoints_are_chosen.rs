//! F5, F6 (its results) and T1 to T5.

use super::{context, only_port, set, tables};
use crate::compile::{Context, PortTables};
use crate::model::samples::{draining, endpoint, service, service_port, slice};
use crate::model::{Endpoint, EndpointSlice, Service, ServicePort, ServiceType, SlicePort};
use dataplane_common::Protocol;
use dataplane_common::backend::BackendStatus;
use dataplane_common::service::Policy;
use std::sync::Arc;

fn compiled(service: &Service, endpoints: Vec<Endpoint>) -> PortTables {
    only_port(&tables(service, &[slice("web-1", "web", endpoints)])).clone()
}

fn for_zone(zone: &str, endpoint: Endpoint) -> Endpoint {
    Endpoint { for_zones: [zone.into()].into(), ..endpoint }
}

fn for_node(node: &str, endpoint: Endpoint) -> Endpoint {
    Endpoint { for_nodes: [node.into()].into(), ..endpoint }
}

/// Reachable by a node port.
fn outside() -> Service {
    let port = ServicePort { node_port: Some(30_001), ..service_port() };
    Service { service_type: ServiceType::NodePort, ports: vec![port], ..service("web") }
}

/// T, cluster set
#[test]
fn ready_endpoints_of_all_nodes_are_the_cluster_set() {
    let port = compiled(&service("web"), vec![endpoint("10.1.0.1", "here"), endpoint("10.2.0.1", "there")]);
    assert_eq!(port.cluster, set(&["10.1.0.1:8080", "10.2.0.1:8080"]));
    assert!(port.policy.has(Policy::HAS_ENDPOINTS));
}

/// T, cluster set
#[test]
fn terminating_endpoint_serves_when_no_other_is_ready() {
    let port = compiled(&service("web"), vec![draining("10.1.0.1", "here"), draining("10.2.0.1", "there")]);
    assert_eq!(port.cluster, set(&["10.1.0.1:8080", "10.2.0.1:8080"]));
    assert!(port.policy.has(Policy::HAS_ENDPOINTS));
}

/// T, cluster set
#[test]
fn terminating_endpoint_gets_nothing_new_while_another_is_ready() {
    let port = compiled(&service("web"), vec![draining("10.1.0.1", "here"), endpoint("10.2.0.1", "there")]);
    assert_eq!(port.cluster, set(&["10.2.0.1:8080"]));
}

/// T: FALLBACK is serving *and* terminating
#[test]
fn an_endpoint_that_serves_but_is_neither_ready_nor_terminating_is_no_fallback() {
    let unready = Endpoint { ready: false, ..endpoint("10.1.0.1", "here") };
    let both = Service { internal_local: true, ..outside() };
    let port = compiled(&both, vec![unready]);
    assert!(port.cluster.is_empty() && port.local.is_empty());
    assert!(!port.policy.has(Policy::HAS_ENDPOINTS));
    assert_eq!(port.backends.len(), 1, "a flow that it has goes on");
}

/// T, cluster set
#[test]
fn fallback_ignores_hints() {
    let endpoints = vec![
        for_zone("a", draining("10.1.0.1", "here")),
        for_zone("b", draining("10.2.0.1", "there")),
        for_node("there", draining("10.2.0.2", "there")),
    ];
    assert_eq!(compiled(&service("web"), endpoints).cluster.len(), 3);
}

/// T, local set
#[test]
fn the_local_set_prefers_terminating_endpoints_here_to_ready_ones_elsewhere() {
    let local = Service { internal_local: true, ..service("web") };
    let port = compiled(&local, vec![draining("10.1.0.1", "here"), endpoint("10.2.0.1", "there")]);
    assert_eq!(port.local, set(&["10.1.0.1:8080"]));
}

/// T, local set
#[test]
fn the_local_set_holds_ready_endpoints_of_this_node_only() {
    let local = Service { internal_local: true, ..service("web") };
    let endpoints = vec![
        endpoint("10.1.0.1", "here"),
        draining("10.1.0.2", "here"),
        endpoint("10.2.0.1", "there"),
        endpoint("10.3.0.1", ""),
    ];
    assert_eq!(compiled(&local, endpoints).local, set(&["10.1.0.1:8080"]));
}

/// P1 and P2: has any is about all nodes
#[test]
fn a_service_with_endpoints_elsewhere_only_has_endpoints_but_an_empty_local_set() {
    let local = Service { internal_local: true, ..service("web") };
    let elsewhere = compiled(&local, vec![endpoint("10.2.0.1", "there")]);
    assert!(elsewhere.local.is_empty() && elsewhere.policy.has(Policy::HAS_ENDPOINTS));
    assert!(!compiled(&local, Vec::new()).policy.has(Policy::HAS_ENDPOINTS));
}

/// T1
#[test]
fn zone_hints_keep_traffic_in_this_nodes_zone() {
    let endpoints = vec![
        for_zone("a", endpoint("10.1.0.1", "there")),
        for_zone("b", endpoint("10.2.0.1", "here")),
        Endpoint { for_zones: ["b".into(), "a".into()].into(), ..endpoint("10.3.0.1", "there") },
    ];
    assert_eq!(compiled(&service("web"), endpoints).cluster, set(&["10.1.0.1:8080", "10.3.0.1:8080"]));
}

/// T1
#[test]
fn node_hints_go_before_zone_hints() {
    let both = |node: &str, zone: &str, endpoint| for_node(node, for_zone(zone, endpoint));
    let endpoints = vec![
        both("here", "b", endpoint("10.1.0.1", "here")),
        both("there", "a", endpoint("10.2.0.1", "there")),
    ];
    assert_eq!(compiled(&service("web"), endpoints).cluster, set(&["10.1.0.1:8080"]));
}

/// T1
#[test]
fn zone_hints_apply_when_no_node_hint_names_this_node() {
    let both = |node: &str, zone: &str, endpoint| for_node(node, for_zone(zone, endpoint));
    let endpoints = vec![
        both("there", "a", endpoint("10.1.0.1", "there")),
        both("there", "b", endpoint("10.2.0.1", "there")),
    ];
    assert_eq!(compiled(&service("web"), endpoints).cluster, set(&["10.1.0.1:8080"]));
}

/// T1
#[test]
fn one_ready_endpoint_without_a_hint_switches_that_kind_of_hint_off() {
    let zones = vec![for_zone("a", endpoint("10.1.0.1", "here")), endpoint("10.2.0.1", "there")];
    assert_eq!(compiled(&service("web"), zones).cluster.len(), 2);

    let node_off = vec![
        for_node("here", for_zone("b", endpoint("10.1.0.1", "here"))),
        for_zone("a", endpoint("10.2.0.1", "there")),
    ];
    assert_eq!(
        compiled(&service("web"), node_off).cluster,
        set(&["10.2.0.1:8080"]),
        "zone hints still count"
    );
}

/// T1
#[test]
fn only_ready_endpoints_have_a_say_about_hints() {
    let endpoints = vec![
        for_zone("a", endpoint("10.1.0.1", "here")),
        for_zone("b", endpoint("10.2.0.1", "there")),
        draining("10.3.0.1", "there"),
        Endpoint { ready: false, serving: false, ..endpoint("10.4.0.1", "there") },
    ];
    assert_eq!(compiled(&service("web"), endpoints).cluster, set(&["10.1.0.1:8080"]));
}

/// T1
#[test]
fn hints_that_name_this_nodes_zone_nowhere_are_ignored() {
    let endpoints =
        vec![for_zone("b", endpoint("10.1.0.1", "here")), for_zone("c", endpoint("10.2.0.1", "there"))];
    assert_eq!(compiled(&service("web"), endpoints).cluster.len(), 2);
}

/// T1
#[test]
fn zone_hints_are_ignored_on_a_node_without_a_zone() {
    let endpoints =
        vec![for_zone("a", endpoint("10.1.0.1", "here")), for_zone("", endpoint("10.2.0.1", "here"))];
    let nowhere = Context { zone: None, ..context() };
    let (tables, _) = crate::compile::service(&service("web"), &[slice("web-1", "web", endpoints)], &nowhere);
    assert_eq!(only_port(&tables).cluster.len(), 2);
}

/// T1: over the whole service port, not slice by slice
#[test]
fn an_endpoint_without_a_hint_in_another_slice_switches_hints_off() {
    let slices = [
        slice("web-1", "web", vec![for_zone("a", endpoint("10.1.0.1", "here"))]),
        slice("web-2", "web", vec![endpoint("10.2.0.1", "there")]),
    ];
    assert_eq!(only_port(&tables(&service("web"), &slices)).cluster.len(), 2);
}

/// T3
#[test]
fn hints_never_touch_the_local_set() {
    let local = Service { external_local: true, ..outside() };
    let endpoints =
        vec![for_zone("b", endpoint("10.1.0.1", "here")), for_zone("a", endpoint("10.2.0.1", "there"))];
    let port = compiled(&local, endpoints);
    assert_eq!(port.local, set(&["10.1.0.1:8080"]));
    assert_eq!(port.cluster, set(&["10.2.0.1:8080"]), "and do apply to the cluster set of a node port");
}

/// T4
#[test]
fn internal_traffic_policy_local_alone_needs_the_local_set_only() {
    let local = Service { internal_local: true, ..service("web") };
    let port = compiled(&local, vec![endpoint("10.1.0.1", "here"), endpoint("10.2.0.1", "there")]);
    assert_eq!((port.cluster.len(), port.local.len()), (0, 1));
}

/// T4
#[test]
fn a_cluster_ip_with_policy_cluster_needs_the_cluster_set_only() {
    let endpoints = vec![endpoint("10.1.0.1", "here")];
    let port = compiled(&service("web"), endpoints.clone());
    assert_eq!((port.cluster.len(), port.local.len()), (1, 0));
    let unreachable = Service { external_local: true, ..service("web") };
    let port = compiled(&unreachable, endpoints);
    assert_eq!(
        (port.cluster.len(), port.local.len()),
        (1, 0),
        "eTP Local, but nothing leads in from outside"
    );
}

/// T4, for P5 and P6
#[test]
fn a_node_port_needs_the_cluster_set_even_if_both_policies_are_local() {
    let both = Service { internal_local: true, external_local: true, ..outside() };
    let port = compiled(&both, vec![endpoint("10.1.0.1", "here"), endpoint("10.2.0.1", "there")]);
    assert_eq!(port.cluster, set(&["10.1.0.1:8080", "10.2.0.1:8080"]));
    assert_eq!(port.local, set(&["10.1.0.1:8080"]));
    assert!(port.policy.has(Policy::INTERNAL_LOCAL | Policy::EXTERNAL_LOCAL));
}

/// T5
#[test]
fn an_endpoint_that_is_terminating_and_not_serving_is_never_used() {
    let gone = Endpoint { serving: false, ..draining("10.1.0.1", "here") };
    let port = compiled(&Service { internal_local: true, ..outside() }, vec![gone]);
    assert!(port.cluster.is_empty() && port.local.is_empty() && port.backends.is_empty());
    assert!(!port.policy.has(Policy::HAS_ENDPOINTS));
}

/// T5, C2
#[test]
fn an_endpoint_that_left_the_sets_stays_a_backend_while_it_serves() {
    let drains = draining("10.1.0.1", "here");
    let unready = Endpoint { ready: false, ..endpoint("10.1.0.2", "there") };
    let port = compiled(&service("web"), vec![drains, unready, endpoint("10.2.0.1", "there")]);
    assert_eq!(port.cluster, set(&["10.2.0.1:8080"]));
    let flags: Vec<u32> = port.backends.values().copied().collect();
    let serving = BackendStatus::SERVING;
    assert_eq!(flags, [serving | BackendStatus::LOCAL, serving, serving | BackendStatus::IN_CLUSTER]);
}

/// C1, C2: with policy Local no set holds the endpoints of other nodes, but flows to them may be alive
#[test]
fn serving_endpoints_that_no_set_asks_for_are_backends_too() {
    let local = Service { internal_local: true, ..service("web") };
    let port = compiled(&local, vec![endpoint("10.2.0.1", "there")]);
    assert!(port.cluster.is_empty() && port.local.is_empty());
    assert_eq!(port.backends.len(), 1);
}

/// S7: `publishNotReadyAddresses` makes endpoints ready that do not serve
#[test]
fn an_endpoint_that_is_ready_without_serving_is_used() {
    let published = Endpoint { serving: false, ..endpoint("10.1.0.1", "here") };
    let port = compiled(&service("web"), vec![published.clone()]);
    assert_eq!(port.cluster, set(&["10.1.0.1:8080"]));
    let flags: Vec<u32> = port.backends.values().copied().collect();
    let here = BackendStatus::SERVING | BackendStatus::LOCAL;
    assert_eq!(flags, [here | BackendStatus::IN_CLUSTER]);

    let leaving = Endpoint { terminating: true, ..published };
    assert_eq!(compiled(&service("web"), vec![leaving]).cluster, set(&["10.1.0.1:8080"]));
}

/// F5
#[test]
fn endpoints_come_from_all_slices_each_with_its_own_port_numbers() {
    let named = |number: u16| {
        vec![
            SlicePort { name: "http".into(), protocol: Protocol::Tcp, port: number },
            SlicePort { name: "http".into(), protocol: Protocol::Udp, port: 53 },
            SlicePort { name: "other".into(), protocol: Protocol::Tcp, port: 54 },
        ]
    };
    let slices = [
        EndpointSlice { ports: named(8080), ..slice("web-1", "web", vec![endpoint("10.1.0.1", "here")]) },
        EndpointSlice { ports: named(9090), ..slice("web-2", "web", vec![endpoint("10.1.0.2", "here")]) },
        EndpointSlice {
            ports: named(1)[1..].to_vec(),
            ..slice("web-3", "web", vec![endpoint("10.1.0.3", "here")])
        },
    ];
    let port = ServicePort { name: "http".into(), ..service_port() };
    let tables = tables(&Service { ports: vec![port], ..service("web") }, &slices);
    assert_eq!(only_port(&tables).cluster, set(&["10.1.0.1:8080", "10.1.0.2:9090"]));
}

/// F5
#[test]
fn of_two_descriptions_of_an_endpoint_one_that_is_not_terminating_wins() {
    let mut slices = vec![
        slice("web-1", "web", vec![draining("10.1.0.1", "here")]),
        slice("web-2", "web", vec![endpoint("10.1.0.1", "here")]),
        slice("web-3", "web", vec![endpoint("10.2.0.1", "there")]),
    ];
    for _ in 0..slices.len() {
        slices.rotate_left(1);
        let tables = tables(&service("web"), &slices);
        assert_eq!(only_port(&tables).cluster, set(&["10.1.0.1:8080", "10.2.0.1:8080"]));
    }
}

/// A Service of any size is served whole.
#[test]
fn five_thousand_endpoints_are_all_chosen() {
    let endpoints = |third: u16| {
        let all = (0..1000).map(move |n| endpoint(&format!("10.{third}.{}.{}", n / 250, n % 250), "there"));
        all.collect::<Vec<_>>()
    };
    let slices: Vec<_> = (0..5).map(|n| slice(&format!("web-{n}"), "web", endpoints(n))).collect();
    let tables = tables(&service("web"), &slices);
    assert_eq!(only_port(&tables).cluster.len(), 5_000);
}

/// F5: the port's name is matched as a whole, an empty one by an empty one only
#[test]
fn a_port_without_a_name_matches_a_slice_port_without_a_name() {
    let other = SlicePort { name: Arc::from("http"), protocol: Protocol::Tcp, port: 8080 };
    let slices =
        [EndpointSlice { ports: vec![other], ..slice("web-1", "web", vec![endpoint("10.1.0.1", "here")]) }];
    assert!(only_port(&tables(&service("web"), &slices)).backends.is_empty());
}
