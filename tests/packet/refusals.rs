//! What is refused, and how the refusal looks on the wire.

use crate::{expect, expect_drop};
use dataplane_common::drop::Reason;
use dataplane_tests::packet::build::{Packet, icmp_error, tcp, tcp_packet, udp_packet};
use dataplane_tests::packet::family::{V6, for_both};
use dataplane_tests::packet::{Hook, Verdict, World, in_namespace, reason};
use dataplane_user::kernel::bpf;

/// P1: ClusterIP and NodePort alike, TCP.
#[test]
fn a_connection_to_a_service_without_endpoints_is_reset() {
    for_both(|f| {
        let world = World::new(&f.web("", &[])).unwrap();
        let from_pod = tcp_packet((f.pod, 40_000), (f.cluster_ip, 80), tcp::SYN);
        let from_outside = tcp_packet((f.client, 40_000), (f.node, 30_080), tcp::SYN);
        for (hook, sent) in [(Hook::PodIn, from_pod), (Hook::UplinkIn, from_outside)] {
            let answer = f.reset(&sent, 0, 1_001, tcp::RST | tcp::ACK);
            expect(&world, hook, &sent, Verdict::Redirect, &answer, &reason(Reason::NoEndpoints));
        }
    });
}

/// P1: a segment in the middle of a connection gets a RST with its own number.
#[test]
fn a_segment_of_no_connection_is_reset_by_its_own_number() {
    for_both(|f| {
        let world = World::new(&f.web("", &[])).unwrap();
        let sent = tcp_packet((f.client, 40_000), (f.node, 30_080), tcp::ACK);
        let answer = f.reset(&sent, 2_000, 0, tcp::RST);
        expect(&world, Hook::UplinkIn, &sent, Verdict::Redirect, &answer, &reason(Reason::NoEndpoints));
    });
}

/// P1: UDP.
#[test]
fn a_datagram_to_a_service_without_endpoints_meets_port_unreachable() {
    for_both(|f| {
        let world = World::new(&f.web("", &[])).unwrap();
        for (hook, sent) in [
            (Hook::PodIn, udp_packet((f.pod, 40_000), (f.cluster_ip, 80), b"hello")),
            (Hook::UplinkIn, udp_packet((f.client, 40_000), (f.node, 30_080), b"")),
            (
                Hook::UplinkOut,
                udp_packet((f.node, 40_000), (f.cluster_ip, 80), b"a longer question than the quote"),
            ),
        ] {
            let answer = icmp_error(&sent.dst.0.to_string(), &sent, f.port_unreachable, 0);
            expect(&world, hook, &sent, Verdict::Redirect, &answer, &reason(Reason::NoEndpoints));
        }
    });
}

/// P1: XDP leaves refusals to tc, unwritten.
#[test]
fn xdp_leaves_a_refusal_to_tc() {
    for_both(|f| {
        let world = World::new(&f.web("", &[])).unwrap();
        let sent = tcp_packet((f.client, 40_000), (f.node, 30_080), tcp::SYN);
        expect(&world, Hook::Xdp, &sent, Verdict::Pass, &sent, &reason(Reason::XdpLeftToTc));
    });
}

/// P13: a ClusterIP on a port that no Service has.
#[test]
fn a_cluster_ip_on_another_port_is_refused() {
    for_both(|f| {
        let world = World::new(&f.web("", &[f.local_endpoint()])).unwrap();
        let sent = tcp_packet((f.other_pod, 40_000), (f.cluster_ip, 81), tcp::SYN);
        let answer = f.reset(&sent, 0, 1_001, tcp::RST | tcp::ACK);
        expect(&world, Hook::PodIn, &sent, Verdict::Redirect, &answer, &reason(Reason::ClosedPort));
        let sent = udp_packet((f.node, 40_000), (f.cluster_ip, 81), b"x");
        let answer = icmp_error(f.cluster_ip, &sent, f.port_unreachable, 0);
        expect(&world, Hook::UplinkOut, &sent, Verdict::Redirect, &answer, &reason(Reason::ClosedPort));
    });
}

/// P13: an address of the service range that no Service has is dropped where it would leave the node, and only there.
#[test]
fn an_unknown_service_address_does_not_leave_the_node() {
    for_both(|f| {
        let world = World::new(&f.web("", &[f.local_endpoint()])).unwrap();
        let sent = tcp_packet((f.other_pod, 40_000), (f.unknown_ip, 80), tcp::SYN);
        crate::expect_untouched(&world, Hook::PodIn, &sent);
        expect_drop(&world, Hook::UplinkOut, &sent, Reason::UnknownService);
    });
}

/// Z3: nothing is forwarded from a link-local address. What stays here keeps its source, and goes the stack's way.
#[test]
fn a_link_local_client_is_forwarded_nowhere() {
    in_namespace(|| {
        let f = &V6;
        let call = |to| udp_packet(("fe80::7", 40_000), to, b"question");
        for hook in [Hook::Xdp, Hook::UplinkIn] {
            let world = World::new(&f.web("", &[f.remote_endpoint()])).unwrap();
            expect_drop(&world, hook, &call((f.node, 30_080)), Reason::NoRoute);
            expect_drop(&world, hook, &call((f.cluster_ip, 80)), Reason::NoRoute);
            assert_eq!(world.flow_counts().unwrap(), [0, 0, 0], "nothing was begun");
            let world = World::new(&f.web("", &[f.local_endpoint()])).unwrap();
            let sent = call((f.node, 30_080));
            let out = sent.clone().to(f.pod, 8080);
            expect(&world, hook, &sent, Verdict::Pass, &out, &f.counted_in(8 + 8, true));
        }
    });
}

/// "Reject" of the contract: answers are limited, by source first, so that one that floods does not take them from all. What is not
/// answered is counted.
#[test]
fn a_flood_is_not_answered_one_for_one() {
    for_both(|f| {
        let world = World::new(&f.web("", &[])).unwrap();
        let ask = |client| udp_packet((client, 40_000), (f.cluster_ip, 80), b"q");
        let answered = |packet: &Packet, most: usize| {
            let bytes = packet.bytes();
            let refused = |_: &usize| world.time(Hook::PodIn, &bytes).unwrap().0 == Verdict::Redirect;
            (0..most).take_while(refused).count()
        };
        let cpus = bpf::possible_cpus().unwrap();
        let flood = answered(&ask(f.pod), 4_000 * cpus);
        assert!((500..4_000 * cpus).contains(&flood), "{flood}");
        let silent = world.send(Hook::PodIn, &ask(f.pod)).unwrap();
        if silent.verdict == Verdict::Drop {
            assert_eq!(silent.moved, reason(Reason::AnswerLimited));
        }
        assert!(answered(&ask(f.other_pod), 10) == 10, "another source is answered");
        // TCP has its own, larger number.
        let opens = tcp_packet((f.pod, 40_000), (f.cluster_ip, 80), tcp::SYN);
        assert_eq!(answered(&opens, 1_000), 1_000);
    });
}
