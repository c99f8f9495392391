//! S2, F4.

use super::{context, only_port, tables};
use crate::compile::Context;
use crate::model::samples::{ip, service, service_port};
use crate::model::{LoadBalancerIngress, Service, ServicePort};
use dataplane_common::service::Policy;

/// A Service with the LB IPs 203.0.113.1 and 2001:db8::1, for these sources.
fn restricted(ranges: &[&str]) -> Service {
    Service {
        cluster_ips: vec![ip("10.96.0.10"), ip("fd00:96::10")],
        ingress: ["203.0.113.1", "2001:db8::1"]
            .map(|address| LoadBalancerIngress { ip: ip(address), proxy: false })
            .into(),
        source_ranges: ranges.iter().map(|range| range.parse().unwrap()).collect(),
        ..service("web")
    }
}

/// The ranges of each family, IPv4 first; `None` where it is open.
fn ranges(service: &Service, context: &Context) -> [Option<Vec<String>>; 2] {
    let (tables, complaints) = crate::compile::service(service, &[], context);
    assert_eq!(complaints, []);
    [false, true].map(|ipv6| {
        let (_, port) = tables.ports.iter().find(|(name, _)| name.ipv6 == ipv6).unwrap();
        let restricted = port.policy.has(Policy::SOURCE_RANGES);
        assert!(restricted || port.ranges.is_empty());
        restricted.then(|| port.ranges.iter().map(ToString::to_string).collect())
    })
}

/// S2, F4
#[test]
fn each_family_has_its_own_ranges_and_is_open_without_any() {
    let (v4, v6) = (Some(vec!["10.0.0.0/8".to_owned()]), Some(vec!["fd00::/8".to_owned()]));
    assert_eq!(ranges(&restricted(&[]), &context()), [None, None]);
    assert_eq!(ranges(&restricted(&["10.0.0.0/8"]), &context()), [v4.clone(), None]);
    assert_eq!(ranges(&restricted(&["10.0.0.0/8", "fd00::/8"]), &context()), [v4, v6]);
}

/// S2
#[test]
fn a_range_that_holds_every_address_opens_its_family() {
    let both = restricted(&["10.0.0.0/8", "0.0.0.0/0", "fd00::/8"]);
    assert_eq!(ranges(&both, &context()), [None, Some(vec!["fd00::/8".to_owned()])]);
    let both = restricted(&["10.0.0.0/8", "::/0"]);
    assert_eq!(ranges(&both, &context()), [Some(vec!["10.0.0.0/8".to_owned()]), None]);
}

/// S2
#[test]
fn a_range_is_kept_by_its_first_address() {
    let ranges = ranges(&restricted(&["10.1.2.3/8", "10.0.0.0/8"]), &context());
    assert_eq!(ranges[0], Some(vec!["10.0.0.0/8".to_owned()]));
}

/// S2: the LB IPs are sources where they are on an interface of a node that may call.
#[test]
fn the_lb_ips_may_call_where_the_nodes_primary_address_may() {
    let node = Context { primary: [Some(ip("192.0.2.1")), Some(ip("fd00::1"))], ..context() };
    let service = restricted(&["192.0.2.0/24", "2001:db8:5::/48"]);
    let with = Some(vec!["192.0.2.0/24".to_owned(), "203.0.113.1/32".to_owned()]);
    let without = Some(vec!["2001:db8:5::/48".to_owned()]);
    assert_eq!(ranges(&service, &node), [with, without]);
}

/// S2: a Service that nobody calls from outside has nothing to restrict.
#[test]
fn a_port_without_outside_addresses_has_no_ranges() {
    let inside =
        Service { ingress: [].into(), cluster_ips: vec![ip("10.96.0.10")], ..restricted(&["10.0.0.0/8"]) };
    assert!(only_port(&tables(&inside, &[])).ranges.is_empty());
    let node_port =
        Service { ports: vec![ServicePort { node_port: Some(30_000), ..service_port() }], ..inside };
    assert_eq!(only_port(&tables(&node_port, &[])).ranges.len(), 1, "for those who ask for it by flag");
}
