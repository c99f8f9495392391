//! Which endpoints a client gets, by policy and place.

use crate::{expect, expect_drop, expect_untouched};
use dataplane_common::drop::Reason;
use dataplane_common::node::Node;
use dataplane_tests::packet::build::{tcp, tcp_packet};
use dataplane_tests::packet::family::for_both;
use dataplane_tests::packet::{Hook, Verdict, World};

const EXTERNAL_LOCAL: &str = "externalTrafficPolicy: Local";
const INTERNAL_LOCAL: &str = "internalTrafficPolicy: Local";

/// P2.
#[test]
fn internal_policy_local_without_a_local_endpoint_is_silence() {
    for_both(|f| {
        let world = World::new(&f.web(INTERNAL_LOCAL, &[f.remote_endpoint()])).unwrap();
        let sent = tcp_packet((f.other_pod, 40_000), (f.cluster_ip, 80), tcp::SYN);
        expect_drop(&world, Hook::PodIn, &sent, Reason::NoLocalEndpoints);
    });
}

/// P3, in XDP and in tc.
#[test]
fn external_policy_local_without_a_local_endpoint_is_silence() {
    for_both(|f| {
        let world = World::new(&f.web(EXTERNAL_LOCAL, &[f.remote_endpoint()])).unwrap();
        let sent = tcp_packet((f.client, 40_000), (f.node, 30_080), tcp::SYN);
        expect_drop(&world, Hook::UplinkIn, &sent, Reason::NoLocalEndpoints);
        expect_drop(&world, Hook::Xdp, &sent, Reason::NoLocalEndpoints);
    });
}

/// P5: a pod of this node is spared the policy; its source is kept.
#[test]
fn a_pod_reaches_remote_endpoints_through_its_own_node_despite_policy_local() {
    for_both(|f| {
        let world = World::new(&f.web(EXTERNAL_LOCAL, &[f.remote_endpoint()])).unwrap();
        let sent = tcp_packet((f.pod, 40_000), (f.node, 30_080), tcp::SYN);
        let out = sent.clone().to(f.remote, 8080);
        expect(&world, Hook::PodIn, &sent, Verdict::Pass, &out, &f.counted_in(20, true));
    });
}

/// P7: anybody else gets local endpoints only, and keeps its address.
#[test]
fn policy_local_keeps_the_client_and_chooses_local_endpoints() {
    for_both(|f| {
        let world = World::new(&f.web(EXTERNAL_LOCAL, &[f.remote_endpoint(), f.local_endpoint()])).unwrap();
        for port in 40_000..40_016 {
            let sent = tcp_packet((f.client, port), (f.node, 30_080), tcp::SYN);
            let out = sent.clone().to(f.pod, 8080);
            expect(&world, Hook::UplinkIn, &sent, Verdict::Pass, &out, &f.counted_in(20, true));
        }
    });
}

/// P8: another node's node port is nothing of ours.
#[test]
fn another_nodes_node_port_is_left_alone() {
    for_both(|f| {
        let world = World::new(&f.web(EXTERNAL_LOCAL, &[f.local_endpoint()])).unwrap();
        expect_untouched(&world, Hook::PodIn, &tcp_packet((f.pod, 40_000), (f.other_node, 30_080), tcp::SYN));
    });
}

/// P18: a pod that forges a packet to loopback reaches no node port of the node.
#[test]
fn a_node_port_on_loopback_is_no_pods() {
    for_both(|f| {
        let world = World::new(&f.web("", &[f.local_endpoint()])).unwrap();
        expect_untouched(&world, Hook::PodIn, &tcp_packet((f.pod, 40_000), (f.localhost, 30_080), tcp::SYN));
    });
}

/// P9: iTP Local chooses local endpoints for pods.
#[test]
fn internal_policy_local_chooses_local_endpoints() {
    for_both(|f| {
        let world = World::new(&f.web(INTERNAL_LOCAL, &[f.remote_endpoint(), f.local_endpoint()])).unwrap();
        for port in 40_000..40_016 {
            let sent = tcp_packet((f.other_pod, port), (f.cluster_ip, 80), tcp::SYN);
            let out = sent.clone().to(f.pod, 8080);
            expect(&world, Hook::PodIn, &sent, Verdict::Pass, &out, &f.counted_in(20, true));
        }
    });
}

/// P10: the switch that refuses it.
#[test]
fn a_cluster_ip_from_outside_can_be_refused() {
    for_both(|f| {
        let yaml = f.web("", &[f.local_endpoint()]);
        let world = World::with(&yaml, Node::CLUSTER_IP_INSIDE_ONLY, &[]).unwrap();
        let sent = tcp_packet((f.client, 40_000), (f.cluster_ip, 80), tcp::SYN);
        expect_drop(&world, Hook::UplinkIn, &sent, Reason::ClusterIpFromOutside);
    });
}

/// P16, P17: a node port answers on the node's own addresses only.
#[test]
fn a_node_port_answers_on_no_other_address() {
    for_both(|f| {
        let world = World::new(&f.web("", &[f.local_endpoint()])).unwrap();
        for address in [f.other_node, f.elsewhere, f.pod] {
            expect_untouched(
                &world,
                Hook::UplinkIn,
                &tcp_packet((f.client, 40_000), (address, 30_080), tcp::SYN),
            );
        }
        // P13: on a ClusterIP it is a port that no Service has.
        let sent = tcp_packet((f.other_pod, 40_000), (f.cluster_ip, 30_080), tcp::SYN);
        assert_eq!(world.send(Hook::PodIn, &sent).unwrap().verdict, Verdict::Redirect);
    });
}

/// F7: TCP and UDP on one number are two ports; the one that goes stops alone.
#[test]
fn removing_the_udp_port_leaves_the_tcp_port() {
    for_both(|f| {
        let yaml = f.web("", &[f.local_endpoint()]);
        let mut world = World::new(&yaml).unwrap();
        let udp_lines = ["  - {name: udp, protocol: UDP, port: 80, targetPort: 8080, nodePort: 30080}\n"];
        let without = udp_lines.iter().fold(yaml, |yaml, line| yaml.replace(line, ""));
        world.apply(&without).unwrap();
        let sent = tcp_packet((f.client, 40_000), (f.node, 30_080), tcp::SYN);
        expect(
            &world,
            Hook::UplinkIn,
            &sent,
            Verdict::Pass,
            &sent.clone().to(f.pod, 8080),
            &f.counted_in(20, true),
        );
        let udp = dataplane_tests::packet::build::udp_packet((f.client, 40_000), (f.node, 30_080), b"x");
        expect_untouched(&world, Hook::UplinkIn, &udp);
    });
}

/// F1: a Service that becomes headless leaves nothing.
#[test]
fn a_service_that_becomes_headless_is_no_longer_ours() {
    for_both(|f| {
        let yaml = f.web("", &[f.local_endpoint()]);
        let mut world = World::new(&yaml).unwrap();
        let headless = yaml
            .replace("type: NodePort", "type: ClusterIP")
            .replace(&format!("clusterIP: \"{}\"", f.cluster_ip), "clusterIP: None")
            .replace(&format!("clusterIPs: [\"{}\"]", f.cluster_ip), "clusterIPs: [None]")
            .replace(", nodePort: 30080", "");
        world.apply(&headless).unwrap();
        expect_untouched(&world, Hook::PodIn, &tcp_packet((f.pod, 40_000), (f.cluster_ip, 80), tcp::SYN));
        expect_untouched(&world, Hook::UplinkIn, &tcp_packet((f.client, 40_000), (f.node, 30_080), tcp::SYN));
    });
}

/// T5: an endpoint that is terminating and does not serve is never used.
#[test]
fn an_endpoint_that_does_not_serve_gets_no_new_connection() {
    for_both(|f| {
        let draining = (f.remote, "there", "ready: false, serving: false, terminating: true");
        let world = World::new(&f.web("", &[f.local_endpoint(), draining])).unwrap();
        for port in 40_000..40_016 {
            let sent = tcp_packet((f.other_pod, port), (f.cluster_ip, 80), tcp::SYN);
            expect(
                &world,
                Hook::PodIn,
                &sent,
                Verdict::Pass,
                &sent.clone().to(f.pod, 8080),
                &f.counted_in(20, true),
            );
        }
    });
}

/// F5: however many endpoints a Service has, all are served, each as likely as any other.
#[test]
fn a_service_of_five_thousand_endpoints_is_served() {
    for_both(|f| {
        let addresses: Vec<_> = (0..5_000).map(|n| f.nth_remote(n).to_string()).collect();
        let endpoints: Vec<_> =
            addresses.iter().map(|addr| (addr.as_str(), "there", "ready: true")).collect();
        let sizes = [("backends", 10_100), ("backend_traffic", 10_100), ("open", 10_100)];
        let world = World::with(&f.web("", &endpoints), 0, &sizes).unwrap();
        let mut chosen = std::collections::BTreeSet::new();
        for port in 40_000..40_400 {
            let outcome =
                world.send(Hook::PodIn, &tcp_packet((f.pod, port), (f.cluster_ip, 80), tcp::SYN)).unwrap();
            assert_eq!(outcome.verdict, Verdict::Pass);
            let address = f.destination(&outcome.packet).to_string();
            assert!(addresses.contains(&address), "{address}");
            chosen.insert(address);
        }
        // 400 draws from 5,000 give about 384 different ones.
        assert!(chosen.len() > 350, "{}", chosen.len());
    });
}

/// S2: the operator's own rules for what comes from outside, in place of those of netfilter, which come too late.
#[test]
fn sources_that_the_operator_denies_or_does_not_allow_at_node_ports_are_dropped() {
    for_both(|f| {
        let mut world = World::new(&f.web("", &[f.local_endpoint()])).unwrap();
        let all = |address: &str| format!("{address}/{}", if address.contains(':') { 128 } else { 32 });
        let other_family = if f.client.contains(':') { "10.0.0.0/8" } else { "fd00::/8" };
        let call = |port: u16, to: &str, number: u16| tcp_packet((f.client, port), (to, number), tcp::SYN);
        world.set_sources(&[&all(f.remote)], &[]).unwrap();
        for hook in [Hook::Xdp, Hook::UplinkIn] {
            crate::expect_drop(&world, hook, &call(40_000, f.node, 30_080), Reason::NodePortSource);
        }
        let outcome = world.send(Hook::UplinkIn, &call(40_001, f.cluster_ip, 80)).unwrap();
        assert_ne!(outcome.verdict, Verdict::Drop, "no node port");
        let pod = tcp_packet((f.other_pod, 40_002), (f.node, 30_080), tcp::SYN);
        assert_eq!(world.send(Hook::PodIn, &pod).unwrap().verdict, Verdict::Pass, "not from outside");
        world.set_sources(&[other_family], &[]).unwrap();
        assert_eq!(world.send(Hook::UplinkIn, &call(40_003, f.node, 30_080)).unwrap().verdict, Verdict::Pass);
        world.set_sources(&[&all(f.client)], &[]).unwrap();
        assert_eq!(world.send(Hook::UplinkIn, &call(40_004, f.node, 30_080)).unwrap().verdict, Verdict::Pass);
        world.set_sources(&[&all(f.client)], &[&all(f.client)]).unwrap();
        for (to, number) in [(f.node, 30_080), (f.cluster_ip, 80)] {
            crate::expect_drop(&world, Hook::UplinkIn, &call(40_005, to, number), Reason::SourceDenied);
        }
        let known = tcp_packet((f.client, 40_004), (f.node, 30_080), tcp::ACK);
        assert_eq!(world.send(Hook::UplinkIn, &known).unwrap().verdict, Verdict::Pass, "a flow that lives");
        world.set_sources(&[], &[]).unwrap();
        assert_eq!(world.send(Hook::UplinkIn, &call(40_006, f.node, 30_080)).unwrap().verdict, Verdict::Pass);
    });
}
