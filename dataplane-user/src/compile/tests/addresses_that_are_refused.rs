//! Z1 (without rivals) and Z2.

use super::{addr, context, frontends, only_port, set, tables, texts};
use crate::compile::{Context, ExternalIps};
use crate::model::samples::{endpoint, ip, service, slice};
use crate::model::{AddressType, EndpointSlice, LoadBalancerIngress, Service};
use dataplane_common::frontend::FrontendKind;

/// Z2
#[test]
fn an_endpoint_address_that_no_pod_has_is_ignored_with_one_complaint_for_each_slice() {
    let bad = ["127.0.0.1", "169.254.1.1", "224.0.0.1", "255.255.255.255", "0.0.0.0"];
    let mut endpoints: Vec<_> = bad.iter().map(|address| endpoint(address, "here")).collect();
    endpoints.push(endpoint("10.1.0.1", "here"));
    let slices =
        [slice("web-1", "web", endpoints), slice("web-2", "web", vec![endpoint("10.1.0.2", "here")])];
    let (tables, complaints) = crate::compile::service(&service("web"), &slices, &context());
    let port = only_port(&tables);
    assert_eq!(port.cluster, set(&["10.1.0.1:8080", "10.1.0.2:8080"]));
    assert_eq!(port.backends.len(), 2);
    assert_eq!(
        texts(&complaints),
        [
            "Service default/web: BadEndpointAddress: EndpointSlice default/web-1: 5 of its endpoints ignored; the first is \
         127.0.0.1, which is loopback"
        ]
    );
}

/// Z2
#[test]
fn ipv6_endpoint_addresses_are_checked_alike() {
    let bad = ["::1", "fe80::1", "ff02::1", "::", "::ffff:10.1.0.1", "10.1.0.1"];
    for address in bad {
        let slices = [EndpointSlice {
            address_type: AddressType::Ipv6,
            ..slice("web-1", "web", vec![endpoint(address, "here"), endpoint("fd00:1::1", "here")])
        }];
        let v6 = Service { cluster_ips: vec![ip("fd00:96::1")], ..service("web") };
        let (tables, complaints) = crate::compile::service(&v6, &slices, &context());
        assert_eq!(only_port(&tables).cluster, set(&["[fd00:1::1]:8080"]), "{address}");
        assert_eq!(complaints.len(), 1, "{address}");
    }
}

/// Z2 is about endpoints in use: a family the Service does not have is not looked at (F4)
#[test]
fn a_slice_of_a_family_the_service_does_not_have_is_not_complained_about() {
    let slices = [EndpointSlice {
        address_type: AddressType::Ipv6,
        ..slice("web-1", "web", vec![endpoint("::1", "here")])
    }];
    tables(&service("web"), &slices);
}

/// Z1
#[test]
fn external_and_lb_ips_that_no_host_may_have_are_not_programmed() {
    for address in ["127.0.0.1", "169.254.1.1", "224.0.0.1", "255.255.255.255", "0.0.0.0", "10.1.0.1"] {
        let in_pod_range = Context { pod_ranges: vec!["10.1.0.0/16".parse().unwrap()], ..context() };
        let bad = Service {
            external_ips: [ip(address), ip("203.0.113.1")].into(),
            ingress: [LoadBalancerIngress { ip: ip(address), proxy: false }].into(),
            ..service("web")
        };
        let (tables, complaints) = crate::compile::service(&bad, &[], &in_pod_range);
        let addresses: Vec<_> = frontends(only_port(&tables)).into_iter().map(|(addr, ..)| addr).collect();
        assert_eq!(addresses, ["10.96.0.10", "203.0.113.1"], "{address}");
        assert_eq!(complaints.len(), 1, "{address}: {complaints:?}");
    }
}

/// Z1
#[test]
fn a_nodes_own_address_is_programmed() {
    let own = Service { external_ips: [ip("192.0.2.1")].into(), ..service("web") };
    let tables = tables(&own, &[]);
    assert!(frontends(only_port(&tables)).contains(&("192.0.2.1".into(), 80, 6, FrontendKind::ExternalIp)));
}

/// Z1
#[test]
fn a_flag_refuses_external_ips_of_the_node_or_all_of_them_and_no_other_kind_of_address() {
    let service = Service {
        external_ips: [ip("192.0.2.1"), ip("203.0.113.1")].into(),
        ingress: [LoadBalancerIngress { ip: ip("192.0.2.1"), proxy: false }].into(),
        ..service("web")
    };
    for (external_ips, kept, refused) in
        [(ExternalIps::All, 1, 0), (ExternalIps::NotOfNode, 1, 1), (ExternalIps::None, 0, 2)]
    {
        let context = Context { external_ips, ..context() };
        let (tables, complaints) = crate::compile::service(&service, &[], &context);
        let frontends = frontends(only_port(&tables));
        let of = |kind: FrontendKind| frontends.iter().filter(|(.., other)| *other == kind).count();
        assert_eq!((of(FrontendKind::LoadBalancerIp), of(FrontendKind::ClusterIp)), (1, 1));
        assert_eq!((of(FrontendKind::ExternalIp), complaints.len()), (kept, refused), "{external_ips:?}");
    }
}

/// An unspecified ClusterIP would be the key of node ports.
#[test]
fn a_cluster_ip_that_cannot_be_one_is_not_programmed() {
    let bad = Service { cluster_ips: vec![ip("0.0.0.0"), ip("10.96.0.10")], ..service("web") };
    let (tables, complaints) = crate::compile::service(&bad, &[], &context());
    assert_eq!(frontends(only_port(&tables)).len(), 1);
    assert_eq!(tables.closed, [addr("10.96.0.10")].into());
    assert_eq!(
        texts(&complaints),
        ["Service default/web: RefusedAddress: 0.0.0.0 is not programmed: it is unspecified"]
    );
}
