//! LB IPs and external IPs: by policy, and for whom (P3 to P8, P14, P15, S2, S3, S5, Z4).

use crate::{expect, expect_drop, expect_untouched};
use dataplane_common::drop::Reason;
use dataplane_common::node::Node;
use dataplane_tests::packet::build::{Packet, tcp, tcp_packet, udp_packet};
use dataplane_tests::packet::family::{V4, for_both};
use dataplane_tests::packet::{Hook, Verdict, World, in_namespace};

const EXTERNAL_LOCAL: &str = "externalTrafficPolicy: Local";

/// P4, P15, S5: neither address is on an interface; there and back, in tc and in XDP.
#[test]
fn an_lb_ip_and_an_external_ip_serve_as_a_node_port_does() {
    for_both(|f| {
        for (hook, address) in [Hook::UplinkIn, Hook::Xdp]
            .iter()
            .flat_map(|hook| [f.lb_ip, f.external_ip].map(|address| (*hook, address)))
        {
            let world = World::new(&f.load_balancer("", &[f.local_endpoint()])).unwrap();
            let sent = tcp_packet((f.client, 40_000), (address, 80), tcp::SYN);
            expect(
                &world,
                hook,
                &sent,
                Verdict::Pass,
                &sent.clone().to(f.pod, 8080),
                &f.counted_in(20, true),
            );
            let reply = tcp_packet((f.pod, 8080), (f.client, 40_000), tcp::SYN | tcp::ACK);
            let restored = reply.clone().from(address, 80);
            expect(&world, Hook::UplinkOut, &reply, Verdict::Pass, &restored, &f.counted_out(20));

            let world = World::new(&f.load_balancer("", &[f.remote_endpoint()])).unwrap();
            let outcome = world.send(Hook::UplinkIn, &sent).unwrap();
            let port = f.source_port(&outcome.packet);
            let out = sent.clone().from(f.node, port).to(f.remote, 8080).ttl(63);
            assert_eq!((outcome.verdict, outcome.packet), (Verdict::Redirect, out.bytes()));
            let reply = tcp_packet((f.remote, 8080), (f.node, port), tcp::SYN | tcp::ACK);
            let restored = reply.clone().from(address, 80).to(f.client, 40_000).ttl(63);
            expect(&world, Hook::UplinkIn, &reply, Verdict::Redirect, &restored, &f.counted_out(20));
        }
    });
}

/// P3, P5, P6, P7.
#[test]
fn external_policy_local_holds_for_lb_and_external_ips() {
    for_both(|f| {
        let far = World::new(&f.load_balancer(EXTERNAL_LOCAL, &[f.remote_endpoint()])).unwrap();
        let both =
            World::new(&f.load_balancer(EXTERNAL_LOCAL, &[f.remote_endpoint(), f.local_endpoint()])).unwrap();
        for (own, address) in [(40_000, f.lb_ip), (41_000, f.external_ip)] {
            let sent = tcp_packet((f.client, own), (address, 80), tcp::SYN);
            expect_drop(&far, Hook::UplinkIn, &sent, Reason::NoLocalEndpoints);
            expect_drop(&far, Hook::Xdp, &sent, Reason::NoLocalEndpoints);
            for port in own..own + 12 {
                let sent = tcp_packet((f.client, port), (address, 80), tcp::SYN);
                let out = sent.clone().to(f.pod, 8080);
                expect(&both, Hook::UplinkIn, &sent, Verdict::Pass, &out, &f.counted_in(20, true));
            }
            let sent = tcp_packet((f.other_pod, own), (address, 80), tcp::SYN);
            let out = sent.clone().to(f.remote, 8080);
            expect(&far, Hook::PodIn, &sent, Verdict::Pass, &out, &f.counted_in(20, true));
            let sent = udp_packet((f.node, own), (address, 80), b"q");
            let out = sent.clone().to(f.remote, 8080);
            expect(&far, Hook::UplinkOut, &sent, Verdict::Redirect, &out, &f.counted_in(9, true));
        }
    });
}

/// P13, P16, Z4: other ports of these addresses are not ours, the node port among them.
#[test]
fn other_ports_of_an_lb_ip_are_left_alone() {
    for_both(|f| {
        let world = World::new(&f.load_balancer("", &[f.local_endpoint()])).unwrap();
        for (address, port) in
            [f.lb_ip, f.external_ip].iter().flat_map(|address| [(*address, 81), (*address, 30_080)])
        {
            for hook in [Hook::UplinkIn, Hook::Xdp, Hook::PodIn, Hook::UplinkOut] {
                expect_untouched(&world, hook, &tcp_packet((f.client, 40_000), (address, port), tcp::SYN));
            }
        }
    });
}

/// P14: a load balancer that is a proxy is really called.
#[test]
fn an_lb_ip_of_mode_proxy_is_left_alone() {
    for_both(|f| {
        let yaml = f
            .load_balancer("", &[f.local_endpoint()])
            .replace("ingress: [{ip", "ingress: [{ipMode: Proxy, ip");
        let mut world = World::new(&yaml).unwrap();
        let sent = tcp_packet((f.other_pod, 40_000), (f.lb_ip, 80), tcp::SYN);
        expect_untouched(&world, Hook::PodIn, &sent);
        expect_untouched(&world, Hook::UplinkOut, &sent);
        world.apply(&yaml.replace("Proxy", "VIP")).unwrap();
        expect(
            &world,
            Hook::PodIn,
            &sent,
            Verdict::Pass,
            &sent.clone().to(f.pod, 8080),
            &f.counted_in(20, true),
        );
    });
}

/// S3
#[test]
fn without_a_node_port_the_lb_ip_still_serves() {
    for_both(|f| {
        let yaml = f
            .load_balancer("allocateLoadBalancerNodePorts: false", &[f.local_endpoint()])
            .replace(", nodePort: 30080", "");
        let world = World::new(&yaml).unwrap();
        let sent = tcp_packet((f.client, 40_000), (f.lb_ip, 80), tcp::SYN);
        expect(
            &world,
            Hook::UplinkIn,
            &sent,
            Verdict::Pass,
            &sent.clone().to(f.pod, 8080),
            &f.counted_in(20, true),
        );
        expect_untouched(&world, Hook::UplinkIn, &tcp_packet((f.client, 40_000), (f.node, 30_080), tcp::SYN));
    });
}

fn restricted(ranges: &str, endpoints: &[(&str, &str, &str)]) -> String {
    V4.load_balancer(&format!("loadBalancerSourceRanges: [{ranges}]"), endpoints)
}

/// S2: from outside, in tc and XDP; no other address of the Service is restricted.
#[test]
fn an_lb_ip_with_source_ranges_drops_what_comes_from_elsewhere() {
    in_namespace(|| {
        let f = &V4;
        let world =
            World::new(&restricted("\" 198.51.100.0/25 \", 10.9.0.0/16", &[f.local_endpoint()])).unwrap();
        for (number, (source, allowed)) in (0..).zip([
            ("198.51.100.127", true),
            ("198.51.100.128", false),
            ("10.9.255.1", true),
            ("10.8.1.1", false),
        ]) {
            for (hook, port) in [(Hook::UplinkIn, 40_000 + number), (Hook::Xdp, 41_000 + number)] {
                let sent = tcp_packet((source, port), (f.lb_ip, 80), tcp::SYN);
                if allowed {
                    let out = sent.clone().to(f.pod, 8080);
                    expect(&world, hook, &sent, Verdict::Pass, &out, &f.counted_in(20, true));
                } else {
                    expect_drop(&world, hook, &sent, Reason::SourceNotAllowed);
                }
            }
            for (own, address, port) in [(42_000, f.external_ip, 80), (43_000, f.node, 30_080)] {
                let sent = tcp_packet((source, own), (address, port), tcp::SYN);
                let out = sent.clone().to(f.pod, 8080);
                expect(&world, Hook::UplinkIn, &sent, Verdict::Pass, &out, &f.counted_in(20, true));
            }
        }
    });
}

/// S2: pods and the node are asked as everybody.
#[test]
fn source_ranges_hold_for_pods_and_the_node() {
    in_namespace(|| {
        let f = &V4;
        let mut world = World::new(&restricted("198.51.100.0/24", &[f.remote_endpoint()])).unwrap();
        let pod = tcp_packet((f.other_pod, 40_000), (f.lb_ip, 80), tcp::SYN);
        let node = tcp_packet((f.node, 40_000), (f.lb_ip, 80), tcp::SYN);
        expect_drop(&world, Hook::PodIn, &pod, Reason::SourceNotAllowed);
        expect_drop(&world, Hook::UplinkOut, &node, Reason::SourceNotAllowed);
        let to_cluster_ip = tcp_packet((f.other_pod, 40_001), (f.cluster_ip, 80), tcp::SYN);
        let out = to_cluster_ip.clone().to(f.remote, 8080);
        expect(&world, Hook::PodIn, &to_cluster_ip, Verdict::Pass, &out, &f.counted_in(20, true));
        world.apply(&restricted("10.244.1.8/32, 192.0.2.0/24", &[f.remote_endpoint()])).unwrap();
        let out = pod.clone().to(f.remote, 8080);
        expect(&world, Hook::PodIn, &pod, Verdict::Pass, &out, &f.counted_in(20, true));
        let out = node.clone().to(f.remote, 8080);
        expect(&world, Hook::UplinkOut, &node, Verdict::Redirect, &out, &f.counted_in(20, true));
    });
}

/// S2 goes before P1: silence, not a refusal.
#[test]
fn source_ranges_are_asked_before_endpoints() {
    in_namespace(|| {
        let f = &V4;
        let world = World::new(&restricted("10.9.0.0/16", &[])).unwrap();
        let sent = tcp_packet((f.client, 40_000), (f.lb_ip, 80), tcp::SYN);
        expect_drop(&world, Hook::UplinkIn, &sent, Reason::SourceNotAllowed);
        let allowed = tcp_packet(("10.9.0.1", 40_000), (f.lb_ip, 80), tcp::SYN);
        assert_eq!(world.send(Hook::UplinkIn, &allowed).unwrap().verdict, Verdict::Redirect, "P1");
    });
}

/// S2: ranges that come, change and go act on new flows alone; a /0 opens.
#[test]
fn source_ranges_change_live_and_spare_flows_that_are_there() {
    in_namespace(|| {
        let f = &V4;
        let mut world = World::new(&f.load_balancer("", &[f.local_endpoint()])).unwrap();
        let old = tcp_packet((f.client, 40_000), (f.lb_ip, 80), tcp::SYN);
        let new = |port| tcp_packet((f.client, port), (f.lb_ip, 80), tcp::SYN);
        let served = |world: &World, sent: &Packet, begins| {
            expect(
                world,
                Hook::UplinkIn,
                sent,
                Verdict::Pass,
                &sent.clone().to(f.pod, 8080),
                &f.counted_in(20, begins),
            );
        };
        served(&world, &old, true);
        world.apply(&restricted("10.9.0.0/16", &[f.local_endpoint()])).unwrap();
        expect_drop(&world, Hook::UplinkIn, &new(40_001), Reason::SourceNotAllowed);
        served(&world, &old, false);
        world.apply(&restricted("10.9.0.0/16, 198.51.100.7/32", &[f.local_endpoint()])).unwrap();
        served(&world, &new(40_002), true);
        world.apply(&restricted("10.9.0.0/16, 0.0.0.0/0", &[f.local_endpoint()])).unwrap();
        served(&world, &tcp_packet(("203.0.113.99", 40_000), (f.lb_ip, 80), tcp::SYN), true);
        world.apply(&restricted("198.51.100.0/29", &[f.local_endpoint()])).unwrap();
        served(&world, &new(40_003), true);
        world.apply(&restricted("2001:db8::/32", &[f.local_endpoint()])).unwrap();
        served(&world, &tcp_packet(("203.0.113.98", 40_000), (f.lb_ip, 80), tcp::SYN), true);
    });
}

/// S2: the flag that asks for it.
#[test]
fn source_ranges_can_hold_for_node_ports_and_external_ips() {
    in_namespace(|| {
        let f = &V4;
        let yaml = restricted("10.9.0.0/16", &[f.local_endpoint()]);
        let world = World::with(&yaml, Node::SOURCE_RANGES_EVERYWHERE, &[]).unwrap();
        for (own, address, port) in
            [(40_000, f.lb_ip, 80), (41_000, f.external_ip, 80), (42_000, f.node, 30_080)]
        {
            let sent = tcp_packet((f.client, own), (address, port), tcp::SYN);
            expect_drop(&world, Hook::UplinkIn, &sent, Reason::SourceNotAllowed);
            let sent = tcp_packet(("10.9.0.1", own), (address, port), tcp::SYN);
            let out = sent.clone().to(f.pod, 8080);
            expect(&world, Hook::UplinkIn, &sent, Verdict::Pass, &out, &f.counted_in(20, true));
        }
        let sent = tcp_packet((f.other_pod, 40_000), (f.cluster_ip, 80), tcp::SYN);
        expect(
            &world,
            Hook::PodIn,
            &sent,
            Verdict::Pass,
            &sent.clone().to(f.pod, 8080),
            &f.counted_in(20, true),
        );
    });
}
