//! The conversions, rule by rule.

use super::*;
use crate::model::{
    AddressType, Endpoint, EndpointSlice, LoadBalancerIngress, Node, Service, ServicePort, ServiceType,
    SlicePort,
};
use serde_json::{Value, json};

fn converted<W: Written>(object: Value) -> Result<Object, ObjectError> {
    serde_json::from_value::<W>(object).unwrap().convert(&mut Names::default())
}

fn service(spec: Value) -> Service {
    try_service(spec).unwrap()
}

fn try_service(spec: Value) -> Result<Service, ObjectError> {
    let object = json!({"metadata": {"name": "web", "namespace": "shop"}, "spec": spec});
    match converted::<WrittenService>(object)? {
        Object::Service(service) => Ok(service),
        Object::EndpointSlice(_) | Object::Node(_) | Object::ServiceCidr { .. } => unreachable!(),
    }
}

fn slice(fields: Value) -> EndpointSlice {
    try_slice(fields).unwrap()
}

fn try_slice(mut fields: Value) -> Result<EndpointSlice, ObjectError> {
    fields["metadata"] = json!({
        "name": "web-abc", "namespace": "shop", "labels": {"kubernetes.io/service-name": "web"},
        "annotations": {"endpoints.kubernetes.io/last-change-trigger-time": "2026-01-01T00:00:00Z"},
    });
    match converted::<WrittenEndpointSlice>(fields)? {
        Object::EndpointSlice(slice) => Ok(slice),
        Object::Service(_) | Object::Node(_) | Object::ServiceCidr { .. } => unreachable!(),
    }
}

fn ips(texts: &[&str]) -> Vec<IpAddr> {
    texts.iter().map(|text| text.parse().unwrap()).collect()
}

fn nets(texts: &[&str]) -> Vec<IpNet> {
    texts.iter().map(|text| text.parse().unwrap()).collect()
}

#[test]
fn a_service_keeps_every_field_the_contract_reads() {
    let object = json!({
        "metadata": {
            "name": "web", "namespace": "shop", "uid": "u-1", "creationTimestamp": "1970-01-02T00:00:00Z",
            "labels": {"app": "web", "service.kubernetes.io/service-proxy-name": "other"},
            "managedFields": [{"manager": "kubectl"}],
        },
        "spec": {
            "type": "LoadBalancer", "clusterIP": "10.96.0.1", "clusterIPs": ["10.96.0.1", "fd00::1"],
            "externalIPs": ["192.0.2.1"], "internalTrafficPolicy": "Local", "externalTrafficPolicy": "Local",
            "sessionAffinity": "ClientIP", "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 5}},
            "loadBalancerSourceRanges": ["10.0.0.0/8"], "healthCheckNodePort": 32000, "ipFamilies": ["IPv4"],
            "ports": [{"name": "dns", "protocol": "UDP", "port": 53, "targetPort": "dns", "nodePort": 30053}],
        },
        "status": {"loadBalancer": {"ingress": [{"ip": "192.0.2.2", "ipMode": "VIP", "ports": []}]}},
    });
    let expected = Service {
        name: ObjectName::new("shop", "web"),
        uid: "u-1".into(),
        created: 86_400,
        proxy_name: Some("other".into()),
        service_type: ServiceType::LoadBalancer,
        cluster_ips: ips(&["10.96.0.1", "fd00::1"]),
        external_ips: ips(&["192.0.2.1"]).into(),
        ingress: [LoadBalancerIngress { ip: ips(&["192.0.2.2"])[0], proxy: false }].into(),
        ports: vec![ServicePort {
            name: "dns".into(),
            protocol: Protocol::Udp,
            port: 53,
            node_port: Some(30053),
        }],
        internal_local: true,
        external_local: true,
        affinity_seconds: Some(5),
        source_ranges: nets(&["10.0.0.0/8"]).into(),
        health_check_node_port: Some(32000),
        choice: None,
    };
    assert_eq!(converted::<WrittenService>(object).unwrap(), Object::Service(expected));
}

#[test]
fn what_a_service_does_not_say_has_its_default() {
    let service = service(
        json!({"ports": [{"port": 80, "nodePort": 0}], "clusterIP": "10.96.0.1", "sessionAffinity": "None"}),
    );
    let port = ServicePort { name: "".into(), protocol: Protocol::Tcp, port: 80, node_port: None };
    assert_eq!(service.ports, [port]);
    assert_eq!(service.service_type, ServiceType::ClusterIp);
    assert_eq!(service.cluster_ips, ips(&["10.96.0.1"]));
    assert_eq!((service.affinity_seconds, service.health_check_node_port, service.created), (None, None, 0));
    assert!(!service.internal_local && !service.external_local);
}

/// F1
#[test]
fn a_headless_service_has_no_cluster_ip() {
    assert_eq!(service(json!({"clusterIP": "None", "clusterIPs": ["None"]})).cluster_ips, ips(&[]));
    assert_eq!(service(json!({"clusterIP": ""})).cluster_ips, ips(&[]));
    assert_eq!(service(json!({"type": "ExternalName"})).service_type, ServiceType::ExternalName);
}

/// F4
#[test]
fn source_ranges_are_trimmed() {
    let ranges = json!({"loadBalancerSourceRanges": [" 10.1.2.3/8", "fd00::/8\t"]});
    assert_eq!(service(ranges).source_ranges, nets(&["10.0.0.0/8", "fd00::/8"]));
}

/// F4
#[test]
fn slices_of_names_have_no_endpoints() {
    let slice = slice(json!({"addressType": "FQDN", "endpoints": [{"addresses": ["example.com"]}]}));
    assert_eq!((slice.address_type, slice.endpoints), (AddressType::Fqdn, vec![]));
}

/// F4
#[test]
fn an_endpoint_of_the_other_family_is_ignored() {
    let slice = slice(json!({
        "addressType": "IPv6", "endpoints": [{"addresses": ["10.0.0.1"]}, {"addresses": ["fd00::1"]}]
    }));
    assert_eq!(
        slice.endpoints.iter().map(|endpoint| endpoint.address).collect::<Vec<_>>(),
        ips(&["fd00::1"])
    );
}

/// F5
#[test]
fn only_the_first_address_of_an_endpoint_counts() {
    let slice = slice(json!({
        "addressType": "IPv4", "endpoints": [{"addresses": ["10.0.0.1", "10.0.0.2"]}, {"addresses": []}, {}]
    }));
    assert_eq!(
        slice.endpoints.iter().map(|endpoint| endpoint.address).collect::<Vec<_>>(),
        ips(&["10.0.0.1"])
    );
}

/// F5
#[test]
fn slice_ports_without_a_number_are_ignored() {
    let slice = slice(json!({
        "addressType": "IPv4",
        "ports": [{"name": "all", "port": null}, {"name": null, "protocol": "SCTP", "port": 9}, {}]
    }));
    assert_eq!(slice.ports, [SlicePort { name: "".into(), protocol: Protocol::Sctp, port: 9 }]);
}

/// F6
#[test]
fn missing_conditions_mean_ready_serving_and_not_terminating() {
    let slice = slice(json!({"addressType": "IPv4", "ports": null, "endpoints": [
        {"addresses": ["10.0.0.1"]},
        {"addresses": ["10.0.0.2"], "conditions": {"ready": null}},
        {"addresses": ["10.0.0.3"], "conditions": {"ready": false, "serving": false, "terminating": true}},
    ]}));
    let conditions = |endpoint: &Endpoint| (endpoint.ready, endpoint.serving, endpoint.terminating);
    let all: Vec<_> = slice.endpoints.iter().map(conditions).collect();
    assert_eq!(all, [(true, true, false), (true, true, false), (false, false, true)]);
}

#[test]
fn an_endpoint_keeps_its_node_and_its_hints() {
    let slice = slice(json!({"addressType": "IPv4", "endpoints": [{
        "addresses": ["10.0.0.1"], "nodeName": "n1", "zone": "z1", "targetRef": {"kind": "Pod"},
        "hints": {"forZones": [{"name": "z1"}, {"name": "z2"}], "forNodes": [{"name": "n1"}]}
    }]}));
    assert_eq!(slice.service, ObjectName::new("shop", "web"));
    assert_eq!(slice.trigger_time.as_deref(), Some("2026-01-01T00:00:00Z"));
    let endpoint = &slice.endpoints[0];
    assert_eq!(endpoint.node.as_deref(), Some("n1"));
    assert_eq!(endpoint.for_nodes, ["n1".into()]);
    assert_eq!(endpoint.for_zones, ["z1".into(), "z2".into()]);
}

#[test]
fn a_slice_without_the_label_belongs_to_no_service() {
    let object = json!({"metadata": {"name": "s", "namespace": "shop"}, "addressType": "IPv4"});
    let Object::EndpointSlice(slice) = converted::<WrittenEndpointSlice>(object).unwrap() else { panic!() };
    assert_eq!(slice.service, ObjectName::new("shop", ""));
}

/// P14
#[test]
fn an_ingress_with_a_host_name_only_is_left_out_and_one_of_a_proxy_is_marked() {
    let object = json!({"metadata": {"name": "web"}, "status": {"loadBalancer": {"ingress": [
        {"hostname": "lb.example.com"}, {"ip": "192.0.2.1", "ipMode": "Proxy"}, {"ip": "192.0.2.2"}
    ]}}});
    let Object::Service(service) = converted::<WrittenService>(object).unwrap() else { panic!() };
    let expected = [("192.0.2.1", true), ("192.0.2.2", false)];
    assert_eq!(
        service.ingress,
        expected.map(|(ip, proxy)| LoadBalancerIngress { ip: ip.parse().unwrap(), proxy })
    );
}

/// S1
#[test]
fn affinity_has_a_default_timeout_and_bounds() {
    let with = |seconds: Value| {
        let config = json!({"clientIP": {"timeoutSeconds": seconds}});
        try_service(json!({"sessionAffinity": "ClientIP", "sessionAffinityConfig": config}))
            .map(|service| service.affinity_seconds)
    };
    assert_eq!(service(json!({"sessionAffinity": "ClientIP"})).affinity_seconds, Some(10_800));
    assert_eq!(with(json!(null)), Ok(Some(10_800)));
    assert_eq!(with(json!(86_400)), Ok(Some(86_400)));
    assert_eq!(with(json!(0)), Err(ObjectError::AffinityTimeout { value: 0 }));
    assert_eq!(with(json!(86_401)), Err(ObjectError::AffinityTimeout { value: 86_401 }));
}

/// T1, H1
#[test]
fn a_node_keeps_its_zone_addresses_ranges_taints_and_deletion() {
    let object = json!({
        "metadata": {
            "name": "n1", "labels": {"topology.kubernetes.io/zone": "z1"}, "deletionTimestamp": "2026-01-01T00:00:00Z"
        },
        "spec": {
            "podCIDR": "10.0.1.0/24", "podCIDRs": ["10.0.1.0/24", "fd00:1::/64"],
            "taints": [{"key": "ToBeDeletedByClusterAutoscaler", "effect": "NoSchedule"}]
        },
        "status": {"addresses": [
            {"type": "Hostname", "address": "n1"}, {"type": "ExternalIP", "address": "192.0.2.1"},
            {"type": "InternalIP", "address": "172.30.0.11"}, {"type": "InternalIP", "address": "fd00:30::11"}
        ]}
    });
    let expected = Node {
        name: "n1".into(),
        zone: Some("z1".into()),
        addresses: ips(&["172.30.0.11", "fd00:30::11", "192.0.2.1"]),
        pod_cidrs: nets(&["10.0.1.0/24", "fd00:1::/64"]),
        deleting: true,
        taints: vec!["ToBeDeletedByClusterAutoscaler".into()],
    };
    assert_eq!(converted::<WrittenNode>(object).unwrap(), Object::Node(expected));
}

#[test]
fn a_service_cidr_keeps_its_ranges() {
    let object =
        json!({"metadata": {"name": "kubernetes"}, "spec": {"cidrs": ["10.96.0.0/16", "fd00:10:96::/108"]}});
    let expected =
        Object::ServiceCidr { name: "kubernetes".into(), cidrs: nets(&["10.96.0.0/16", "fd00:10:96::/108"]) };
    assert_eq!(converted::<WrittenServiceCidr>(object).unwrap(), expected);
}

/// Z5
#[test]
fn an_error_names_the_field_and_what_it_holds() {
    let of = |result: Result<Service, ObjectError>| result.unwrap_err().to_string();
    assert_eq!(
        of(try_service(json!({"ports": [{"port": 80}, {"port": 0}]}))),
        "spec.ports[1].port is 0, which is not a port (1 to 65535)"
    );
    assert_eq!(of(try_service(json!({"ports": [{"name": "a"}]}))), "spec.ports[0].port is missing");
    assert_eq!(
        of(try_service(json!({"ports": [{"port": 80, "nodePort": -1}]}))),
        "spec.ports[0].nodePort is -1, which is not a port (1 to 65535)"
    );
    assert_eq!(
        of(try_service(json!({"clusterIPs": ["10.96.0.256"]}))),
        "spec.clusterIPs[0] is \"10.96.0.256\", which is not an IP address"
    );
    assert_eq!(
        of(try_service(json!({"ports": [{"port": 80, "protocol": "tcp"}]}))),
        "spec.ports[0].protocol is \"tcp\", which is none of TCP, UDP, SCTP"
    );
    let slice = try_slice(json!({"addressType": "IPv4", "endpoints": [{"addresses": ["pod-1"]}]}));
    assert_eq!(
        slice.unwrap_err().to_string(),
        "endpoints[0].addresses[0] is \"pod-1\", which is not an IP address"
    );
    assert_eq!(converted::<WrittenService>(json!({"metadata": {}})), Err(ObjectError::NoName));
}

#[test]
fn addresses_are_read_as_kubernetes_reads_them() {
    assert_eq!(parse_ip("010.000.0.08"), Some(ips(&["10.0.0.8"])[0]));
    assert_eq!(parse_ip("::ffff:10.0.0.8"), Some(ips(&["10.0.0.8"])[0]));
    for text in ["", "10.0.0", "10.0.0.1.2", "10.0.0.+1", "10.0.0.1 ", "fe80::1%eth0", "10..0.1"] {
        assert_eq!(parse_ip(text), None, "{text}");
    }
    assert_eq!(parse_range("010.0.0.1/8"), Some(nets(&["10.0.0.0/8"])[0]));
    for text in ["10.0.0.0", "10.0.0.0/33", "10.0.0.0/-1", "10.0.0.0/+8", "/8", "fd00::/129"] {
        assert_eq!(parse_range(text), None, "{text}");
    }
}
