//! Which endpoints a client gets, by policy and place.

use crate::objects::{CLUSTER_IP, LOCAL, REMOTE, web};
use crate::{expect, expect_drop, expect_untouched};
use dataplane_common::drop::Reason;
use dataplane_common::node::Node;
use dataplane_tests::packet::build::{tcp, tcp_packet};
use dataplane_tests::packet::{CLIENT, Hook, NODE, POD, Verdict, World, counted_in, in_namespace};

const EXTERNAL_LOCAL: &str = "externalTrafficPolicy: Local";
const INTERNAL_LOCAL: &str = "internalTrafficPolicy: Local";

/// P2.
#[test]
fn internal_policy_local_without_a_local_endpoint_is_silence() {
    in_namespace(|| {
        let world = World::new(&web(INTERNAL_LOCAL, &[REMOTE])).unwrap();
        let sent = tcp_packet(("10.244.1.8", 40_000), (CLUSTER_IP, 80), tcp::SYN);
        expect_drop(&world, Hook::PodIn, &sent, Reason::NoLocalEndpoints);
    });
}

/// P3, in XDP and in tc.
#[test]
fn external_policy_local_without_a_local_endpoint_is_silence() {
    in_namespace(|| {
        let world = World::new(&web(EXTERNAL_LOCAL, &[REMOTE])).unwrap();
        let sent = tcp_packet((CLIENT, 40_000), (NODE, 30_080), tcp::SYN);
        expect_drop(&world, Hook::UplinkIn, &sent, Reason::NoLocalEndpoints);
        expect_drop(&world, Hook::Xdp, &sent, Reason::NoLocalEndpoints);
    });
}

/// P5: a pod of this node is spared the policy; its source is kept.
#[test]
fn a_pod_reaches_remote_endpoints_through_its_own_node_despite_policy_local() {
    in_namespace(|| {
        let world = World::new(&web(EXTERNAL_LOCAL, &[REMOTE])).unwrap();
        let sent = tcp_packet((POD, 40_000), (NODE, 30_080), tcp::SYN);
        let out = sent.clone().to("10.244.2.9", 8080);
        expect(&world, Hook::PodIn, &sent, Verdict::Pass, &out, &counted_in(40, true));
    });
}

/// P7: anybody else gets local endpoints only, and keeps its address.
#[test]
fn policy_local_keeps_the_client_and_chooses_local_endpoints() {
    in_namespace(|| {
        let world = World::new(&web(EXTERNAL_LOCAL, &[REMOTE, LOCAL])).unwrap();
        for port in 40_000..40_016 {
            let sent = tcp_packet((CLIENT, port), (NODE, 30_080), tcp::SYN);
            let out = sent.clone().to(POD, 8080);
            expect(&world, Hook::UplinkIn, &sent, Verdict::Pass, &out, &counted_in(40, true));
        }
    });
}

/// P8: another node's node port is nothing of ours.
#[test]
fn another_nodes_node_port_is_left_alone() {
    in_namespace(|| {
        let world = World::new(&web(EXTERNAL_LOCAL, &[LOCAL])).unwrap();
        expect_untouched(&world, Hook::PodIn, &tcp_packet((POD, 40_000), ("192.0.2.2", 30_080), tcp::SYN));
    });
}

/// P9: iTP Local chooses local endpoints for pods.
#[test]
fn internal_policy_local_chooses_local_endpoints() {
    in_namespace(|| {
        let world = World::new(&web(INTERNAL_LOCAL, &[REMOTE, LOCAL])).unwrap();
        for port in 40_000..40_016 {
            let sent = tcp_packet(("10.244.1.8", port), (CLUSTER_IP, 80), tcp::SYN);
            let out = sent.clone().to(POD, 8080);
            expect(&world, Hook::PodIn, &sent, Verdict::Pass, &out, &counted_in(40, true));
        }
    });
}

/// P10: the switch that refuses it.
#[test]
fn a_cluster_ip_from_outside_can_be_refused() {
    in_namespace(|| {
        let yaml = web("", &[LOCAL]);
        let world = World::with(&yaml, Node::CLUSTER_IP_INSIDE_ONLY, &[]).unwrap();
        let sent = tcp_packet((CLIENT, 40_000), (CLUSTER_IP, 80), tcp::SYN);
        expect_drop(&world, Hook::UplinkIn, &sent, Reason::ClusterIpFromOutside);
    });
}

/// P16, P17: a node port answers on the node's own addresses only.
#[test]
fn a_node_port_answers_on_no_other_address() {
    in_namespace(|| {
        let world = World::new(&web("", &[LOCAL])).unwrap();
        for address in ["192.0.2.77", "203.0.113.1", POD] {
            expect_untouched(
                &world,
                Hook::UplinkIn,
                &tcp_packet((CLIENT, 40_000), (address, 30_080), tcp::SYN),
            );
        }
        // P13: on a ClusterIP it is a port that no Service has.
        let sent = tcp_packet(("10.244.1.8", 40_000), (CLUSTER_IP, 30_080), tcp::SYN);
        assert_eq!(world.send(Hook::PodIn, &sent).unwrap().verdict, Verdict::Redirect);
    });
}

/// F7: TCP and UDP on one number are two ports; the one that goes stops alone.
#[test]
fn removing_the_udp_port_leaves_the_tcp_port() {
    in_namespace(|| {
        let yaml = web("", &[LOCAL]);
        let mut world = World::new(&yaml).unwrap();
        let udp_lines = ["  - {name: udp, protocol: UDP, port: 80, targetPort: 8080, nodePort: 30080}\n"];
        let without = udp_lines.iter().fold(yaml, |yaml, line| yaml.replace(line, ""));
        world.apply(&without).unwrap();
        let sent = tcp_packet((CLIENT, 40_000), (NODE, 30_080), tcp::SYN);
        expect(
            &world,
            Hook::UplinkIn,
            &sent,
            Verdict::Pass,
            &sent.clone().to(POD, 8080),
            &counted_in(40, true),
        );
        let udp = dataplane_tests::packet::build::udp_packet((CLIENT, 40_000), (NODE, 30_080), b"x");
        expect_untouched(&world, Hook::UplinkIn, &udp);
    });
}

/// F1: a Service that becomes headless leaves nothing.
#[test]
fn a_service_that_becomes_headless_is_no_longer_ours() {
    in_namespace(|| {
        let yaml = web("", &[LOCAL]);
        let mut world = World::new(&yaml).unwrap();
        let headless = yaml
            .replace("type: NodePort", "type: ClusterIP")
            .replace(&format!("clusterIP: {CLUSTER_IP}"), "clusterIP: None")
            .replace(&format!("clusterIPs: [{CLUSTER_IP}]"), "clusterIPs: [None]")
            .replace(", nodePort: 30080", "");
        world.apply(&headless).unwrap();
        expect_untouched(&world, Hook::PodIn, &tcp_packet((POD, 40_000), (CLUSTER_IP, 80), tcp::SYN));
        expect_untouched(&world, Hook::UplinkIn, &tcp_packet((CLIENT, 40_000), (NODE, 30_080), tcp::SYN));
    });
}

/// T5: an endpoint that is terminating and does not serve is never used.
#[test]
fn an_endpoint_that_does_not_serve_gets_no_new_connection() {
    in_namespace(|| {
        let draining = ("10.244.2.9", "there", "ready: false, serving: false, terminating: true");
        let world = World::new(&web("", &[LOCAL, draining])).unwrap();
        for port in 40_000..40_016 {
            let sent = tcp_packet(("10.244.1.8", port), (CLUSTER_IP, 80), tcp::SYN);
            expect(
                &world,
                Hook::PodIn,
                &sent,
                Verdict::Pass,
                &sent.clone().to(POD, 8080),
                &counted_in(40, true),
            );
        }
    });
}

/// F5: however many endpoints a Service has, all are served, each as likely as any other.
#[test]
fn a_service_of_five_thousand_endpoints_is_served() {
    in_namespace(|| {
        let addresses: Vec<_> =
            (0..5_000).map(|n| format!("10.244.{}.{}", 100 + n / 250, 1 + n % 250)).collect();
        let endpoints: Vec<_> =
            addresses.iter().map(|addr| (addr.as_str(), "there", "ready: true")).collect();
        let sizes = [("backends", 10_100), ("backend_traffic", 10_100)];
        let world = World::with(&web("", &endpoints), 0, &sizes).unwrap();
        let mut chosen = std::collections::BTreeSet::new();
        for port in 40_000..40_400 {
            let outcome =
                world.send(Hook::PodIn, &tcp_packet((POD, port), (CLUSTER_IP, 80), tcp::SYN)).unwrap();
            assert_eq!(outcome.verdict, Verdict::Pass);
            let [a, b, c, d] = outcome.packet[30..34] else { panic!("a short packet") };
            let address = format!("{a}.{b}.{c}.{d}");
            assert!(addresses.contains(&address), "{address}");
            chosen.insert(address);
        }
        // 400 draws from 5,000 give about 384 different ones.
        assert!(chosen.len() > 350, "{}", chosen.len());
    });
}
