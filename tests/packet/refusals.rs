//! What is refused, and how the refusal looks on the wire.

use crate::objects::{CLUSTER_IP, LOCAL, web};
use crate::{expect, expect_drop};
use dataplane_common::drop::Reason;
use dataplane_tests::packet::build::{LINK_FROM, LINK_TO, Packet, icmp_error, tcp, tcp_packet, udp_packet};
use dataplane_tests::packet::{CLIENT, Hook, NODE, Verdict, World, in_namespace, reason};

/// The RST that answers `about`, with these numbers and flags.
fn reset(about: &Packet, seq: u32, ack: u32, flags: u8) -> Packet {
    let (src, dst) = (about.dst.0.to_string(), about.src.0.to_string());
    let mut answer = tcp_packet((&src, about.dst.1), (&dst, about.src.1), flags).numbers(seq, ack);
    if let dataplane_tests::packet::build::Transport::Tcp { window, .. } = &mut answer.transport {
        *window = 0;
    }
    answer.id = 0;
    answer.link(LINK_FROM, LINK_TO)
}

/// P1: ClusterIP and NodePort alike, TCP.
#[test]
fn a_connection_to_a_service_without_endpoints_is_reset() {
    in_namespace(|| {
        let world = World::new(&web("", &[])).unwrap();
        let from_pod = tcp_packet(("10.244.1.9", 40_000), (CLUSTER_IP, 80), tcp::SYN);
        let from_outside = tcp_packet((CLIENT, 40_000), (NODE, 30_080), tcp::SYN);
        for (hook, sent) in [(Hook::PodIn, from_pod), (Hook::UplinkIn, from_outside)] {
            let answer = reset(&sent, 0, 1_001, tcp::RST | tcp::ACK);
            expect(&world, hook, &sent, Verdict::Redirect, &answer, &reason(Reason::NoEndpoints));
        }
    });
}

/// P1: a segment in the middle of a connection gets a RST with its own number.
#[test]
fn a_segment_of_no_connection_is_reset_by_its_own_number() {
    in_namespace(|| {
        let world = World::new(&web("", &[])).unwrap();
        let sent = tcp_packet((CLIENT, 40_000), (NODE, 30_080), tcp::ACK);
        let answer = reset(&sent, 2_000, 0, tcp::RST);
        expect(&world, Hook::UplinkIn, &sent, Verdict::Redirect, &answer, &reason(Reason::NoEndpoints));
    });
}

/// P1: UDP.
#[test]
fn a_datagram_to_a_service_without_endpoints_meets_port_unreachable() {
    in_namespace(|| {
        let world = World::new(&web("", &[])).unwrap();
        for (hook, sent) in [
            (Hook::PodIn, udp_packet(("10.244.1.9", 40_000), (CLUSTER_IP, 80), b"hello")),
            (Hook::UplinkIn, udp_packet((CLIENT, 40_000), (NODE, 30_080), b"")),
            (
                Hook::UplinkOut,
                udp_packet((NODE, 40_000), (CLUSTER_IP, 80), b"a longer question than the quote"),
            ),
        ] {
            let answer = icmp_error(&sent.dst.0.to_string(), &sent, 3, 3, 0);
            expect(&world, hook, &sent, Verdict::Redirect, &answer, &reason(Reason::NoEndpoints));
        }
    });
}

/// P1: XDP leaves refusals to tc, unwritten.
#[test]
fn xdp_leaves_a_refusal_to_tc() {
    in_namespace(|| {
        let world = World::new(&web("", &[])).unwrap();
        let sent = tcp_packet((CLIENT, 40_000), (NODE, 30_080), tcp::SYN);
        expect(&world, Hook::Xdp, &sent, Verdict::Pass, &sent, &reason(Reason::XdpLeftToTc));
    });
}

/// P13: a ClusterIP on a port that no Service has.
#[test]
fn a_cluster_ip_on_another_port_is_refused() {
    in_namespace(|| {
        let world = World::new(&web("", &[LOCAL])).unwrap();
        let sent = tcp_packet(("10.244.1.8", 40_000), (CLUSTER_IP, 81), tcp::SYN);
        let answer = reset(&sent, 0, 1_001, tcp::RST | tcp::ACK);
        expect(&world, Hook::PodIn, &sent, Verdict::Redirect, &answer, &reason(Reason::ClosedPort));
        let sent = udp_packet((NODE, 40_000), (CLUSTER_IP, 81), b"x");
        let answer = icmp_error(CLUSTER_IP, &sent, 3, 3, 0);
        expect(&world, Hook::UplinkOut, &sent, Verdict::Redirect, &answer, &reason(Reason::ClosedPort));
    });
}

/// P13: an address of the service range that no Service has is dropped where it would leave the node, and only there.
#[test]
fn an_unknown_service_address_does_not_leave_the_node() {
    in_namespace(|| {
        let world = World::new(&web("", &[LOCAL])).unwrap();
        let sent = tcp_packet(("10.244.1.8", 40_000), ("10.96.7.7", 80), tcp::SYN);
        crate::expect_untouched(&world, Hook::PodIn, &sent);
        expect_drop(&world, Hook::UplinkOut, &sent, Reason::UnknownService);
    });
}

/// P1: a RST is never answered by another.
#[test]
fn a_stray_reset_is_dropped() {
    in_namespace(|| {
        let world = World::new(&web("", &[LOCAL])).unwrap();
        let sent = tcp_packet((CLIENT, 40_000), (NODE, 30_080), tcp::RST);
        expect_drop(&world, Hook::UplinkIn, &sent, Reason::StrayReset);
        assert_eq!(world.flow_counts().unwrap(), [0, 0, 0], "no insert on RST");
    });
}
