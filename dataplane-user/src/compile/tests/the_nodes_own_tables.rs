//! P12, P13, P16, P17 as far as the node's tables show them.

use super::addr;
use crate::compile::{NodePortAddresses, NodeSettings, NodeTables, OwnAddresses, Sources, node};
use crate::model::Node;
use crate::model::samples::ip;
use dataplane_common::node::{NodeAddress, SERVICE_RANGES};
use std::collections::BTreeSet;

fn settings(node_port_addresses: NodePortAddresses) -> NodeSettings {
    NodeSettings {
        service_ranges: vec!["10.96.0.0/16".parse().unwrap(), "fd00:96::/108".parse().unwrap()],
        node_port_addresses,
        snat_ports: vec![1_024..=29_999, 61_000..=65_535],
        flags: 0,
        masquerade_mark: 0,
        connection_mark: 0,
        sources: Sources::default(),
        netns_cookie: 7,
        secret: 11,
    }
}

fn interfaces() -> OwnAddresses {
    ["127.0.0.1", "::1", "fe80::1", "198.51.100.1", "192.0.2.1", "2001:db8::1"].map(ip).to_vec().into()
}

fn own_node() -> Node {
    Node { name: "here".into(), addresses: vec![ip("203.0.113.9"), ip("192.0.2.1")], ..Node::default() }
}

fn node_ports(tables: &NodeTables) -> Vec<String> {
    let answering = tables.addresses.iter().filter(|(_, value)| value.has(NodeAddress::NODE_PORTS));
    answering.map(|(addr, _)| addr.to_string()).collect()
}

/// P17
#[test]
fn node_ports_answer_on_all_own_addresses_by_default() {
    let (tables, _) =
        node(&settings(NodePortAddresses::All), Some(&own_node()), &interfaces(), &BTreeSet::new());
    assert_eq!(tables.addresses.len(), interfaces().own.len());
    assert_eq!(node_ports(&tables).len(), interfaces().own.len());
}

/// P17
#[test]
fn node_ports_answer_on_own_addresses_within_the_ranges_given() {
    let within = NodePortAddresses::Within(vec!["192.0.2.0/24".parse().unwrap(), "::/0".parse().unwrap()]);
    let (tables, _) = node(&settings(within), Some(&own_node()), &interfaces(), &BTreeSet::new());
    assert_eq!(node_ports(&tables), ["::1", "192.0.2.1", "2001:db8::1", "fe80::1"]);
    assert_eq!(tables.addresses.len(), interfaces().own.len(), "the others stay known as the node's own");
}

/// P17
#[test]
fn node_ports_answer_on_the_primary_addresses_only_if_told_so() {
    let (tables, _) =
        node(&settings(NodePortAddresses::Primary), Some(&own_node()), &interfaces(), &BTreeSet::new());
    assert_eq!(node_ports(&tables), ["192.0.2.1", "2001:db8::1"]);
}

#[test]
fn the_primary_address_is_the_nodes_first_that_is_on_an_interface() {
    let all = settings(NodePortAddresses::All);
    let (named, _) = node(&all, Some(&own_node()), &interfaces(), &BTreeSet::new());
    assert_eq!(named.node.primary_v4, addr("192.0.2.1"), "203.0.113.9 is on none");
    assert_eq!(named.node.primary_v6, addr("2001:db8::1"), "not named, but the only one others can know");
    let (unknown, _) = node(&all, None, &interfaces(), &BTreeSet::new());
    assert_eq!(unknown.node.primary_v4, addr("198.51.100.1"), "the first on an interface");
    let (alone, _) = node(&all, None, &vec![ip("127.0.0.1")].into(), &BTreeSet::new());
    assert!(alone.node.primary_v4.is_unspecified() && alone.node.primary_v6.is_unspecified());
}

/// P13, P16
#[test]
fn what_another_proxy_left_behind_is_known_answers_no_node_port_and_is_not_primary() {
    let left_over = OwnAddresses { own: vec![ip("127.0.0.1")], left_over: vec![ip("10.96.0.10")] };
    let (tables, _) = node(&settings(NodePortAddresses::All), None, &left_over, &BTreeSet::new());
    assert_eq!(tables.addresses.len(), 2);
    assert_eq!(node_ports(&tables), ["127.0.0.1"]);
    assert!(tables.node.primary_v4.is_unspecified());
}

/// Z5
#[test]
fn the_addresses_of_the_node_object_have_room_first_then_the_first_on_interfaces() {
    let (all, none) = interfaces().within(6, Some(&own_node()));
    assert_eq!((all, none), (interfaces(), None));
    let many = OwnAddresses { left_over: vec![ip("10.96.0.10")], ..interfaces() };
    let (some, complaint) = many.within(3, Some(&own_node()));
    assert_eq!(some, vec![ip("192.0.2.1"), ip("127.0.0.1"), ip("::1")].into());
    assert!(complaint.unwrap().text.starts_with("7 addresses"));
    assert_eq!(many.within(7, None), (many.clone(), None));
}

/// P16
#[test]
fn node_ports_do_not_answer_on_an_lb_ip_unless_the_node_is_known_by_it() {
    let lb_ips = [addr("198.51.100.1"), addr("192.0.2.1")].into();
    let (tables, _) = node(&settings(NodePortAddresses::All), Some(&own_node()), &interfaces(), &lb_ips);
    let answering = node_ports(&tables);
    assert!(!answering.contains(&"198.51.100.1".into()) && answering.contains(&"192.0.2.1".into()));
}

/// P12, P13
#[test]
fn ranges_and_ports_are_passed_on() {
    let (tables, complaints) = node(&settings(NodePortAddresses::All), None, &interfaces(), &BTreeSet::new());
    assert_eq!(complaints, []);
    assert_eq!(
        (tables.node.port(0), tables.node.port(28_976), tables.node.port(28_975)),
        (1_024, 61_000, 29_999)
    );
    assert_eq!((tables.node.port_count, tables.node.port(33_511)), (33_512, 65_535));
    assert_eq!((tables.node.netns_cookie, tables.node.secret), (7, 11));
    let inside = |text: &str| tables.node.service_ranges.iter().any(|range| range.contains(&addr(text)));
    assert!(inside("10.96.255.255") && inside("fd00:96::f:ffff"));
    assert!(!inside("10.97.0.0") && !inside("fd00:96::10:0"));
}

/// P13, Z5
#[test]
fn more_service_ranges_than_fit_are_complained_about_and_the_first_used() {
    let ranges = (0..=SERVICE_RANGES).map(|n| format!("10.{n}.0.0/16").parse().unwrap()).collect();
    let many = NodeSettings { service_ranges: ranges, ..settings(NodePortAddresses::All) };
    let (tables, complaints) = node(&many, Some(&own_node()), &interfaces(), &BTreeSet::new());
    assert_eq!(complaints.len(), 1);
    let inside = |text: &str| tables.node.service_ranges.iter().any(|range| range.contains(&addr(text)));
    assert!(inside("10.7.0.1") && !inside("10.8.0.1"));
}

/// S2: a family of which nothing is said, or all, is open.
#[test]
fn who_may_call_node_ports_is_told_by_family() {
    use dataplane_common::node::Node as Flags;
    let ranges = |texts: &[&str]| texts.iter().map(|text| text.parse().unwrap()).collect();
    for (node_ports, denied, flags, keys) in [
        (vec!["10.0.0.0/8"], vec![], Flags::NODE_PORT_SOURCES_V4, 1),
        (vec!["10.0.0.0/8", "::/0"], vec![], Flags::NODE_PORT_SOURCES_V4, 1),
        (vec!["0.0.0.0/0", "10.0.0.0/8", "fd00::/8"], vec![], Flags::NODE_PORT_SOURCES_V6, 1),
        (vec![], vec!["203.0.113.0/24", "2001:db8::/64"], Flags::DENIED_SOURCES, 2),
    ] {
        let sources = Sources { node_ports: ranges(&node_ports), denied: ranges(&denied) };
        let settings = NodeSettings { sources, ..settings(NodePortAddresses::All) };
        let (tables, _) = node(&settings, None, &interfaces(), &BTreeSet::new());
        assert_eq!((tables.node.flags, tables.ranges.len()), (flags, keys), "{node_ports:?} {denied:?}");
    }
}
