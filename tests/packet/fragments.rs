//! Fragments: those after the first follow it, early ones are dropped, strangers' pass.

use crate::{expect, expect_drop, expect_untouched};
use dataplane_common::drop::Reason;
use dataplane_tests::packet::build::{Packet, Transport, icmp_error, packet, udp_packet};
use dataplane_tests::packet::family::for_both;
use dataplane_tests::packet::{Hook, Verdict, World, reason};

/// Bytes of transport in each fragment but the last.
pub(crate) const PIECE: usize = 40;
/// Bytes of an IPv6 fragment header.
const FRAGMENT_HEADER: usize = 8;

/// Bytes behind the network header of each of a datagram's three fragments.
fn lengths(whole: &Packet) -> [u64; 3] {
    let header = if whole.src.0.is_ipv4() { 0 } else { FRAGMENT_HEADER };
    [PIECE, PIECE, 28].map(|piece| (header + piece) as u64)
}

/// A datagram of 108 bytes, in three fragments.
fn datagram(src: (&str, u16), dst: (&str, u16)) -> Packet {
    udp_packet(src, dst, &[0x5a; 100])
}

/// P20: requests and replies through a ClusterIP, later fragments in any order.
#[test]
fn later_fragments_follow_the_first_through_a_cluster_ip() {
    for_both(|f| {
        let world = World::new(&f.web("", &[f.remote_endpoint()])).unwrap();
        let whole = datagram((f.pod, 40_000), (f.cluster_ip, 80));
        let (sent, out) = (whole.fragments(PIECE), whole.clone().to(f.remote, 8080).fragments(PIECE));
        for at in [0, 2, 1] {
            let counted = f.counted_in(lengths(&whole)[at], at == 0);
            expect(&world, Hook::PodIn, &sent[at], Verdict::Pass, &out[at], &counted);
            expect_untouched(&world, Hook::UplinkOut, &out[at]);
        }
        let whole = datagram((f.remote, 8080), (f.pod, 40_000));
        let (sent, out) = (whole.fragments(PIECE), whole.clone().from(f.cluster_ip, 80).fragments(PIECE));
        for at in [0, 2, 1] {
            expect_untouched(&world, Hook::UplinkIn, &sent[at]);
            expect_untouched(&world, Hook::Xdp, &sent[at]);
            expect(
                &world,
                Hook::PodOut,
                &sent[at],
                Verdict::Pass,
                &out[at],
                &f.counted_out(lengths(&whole)[at]),
            );
        }
    });
}

/// P20: the same through a node port whose endpoint is on another node, in tc and in XDP: both ends change, the time to live
/// falls.
#[test]
fn later_fragments_follow_the_first_where_the_source_is_translated() {
    for_both(|f| {
        for hook in [Hook::UplinkIn, Hook::Xdp] {
            let world = World::new(&f.web("", &[f.remote_endpoint()])).unwrap();
            let whole = datagram((f.client, 40_000), (f.node, 30_080));
            let sent = whole.fragments(PIECE);
            let first = world.send(hook, &sent[0]).unwrap();
            assert_eq!(
                (first.verdict, first.moved),
                (hook.sent_on(), f.counted_in(lengths(&whole)[0], true))
            );
            let port =
                f.source_port(&first.packet[if whole.src.0.is_ipv4() { 0 } else { FRAGMENT_HEADER }..]);
            let there = whole.clone().from(f.node, port).to(f.remote, 8080).ttl(63).fragments(PIECE);
            let l3 = |bytes: &[u8]| crate::hex(&bytes[12..]);
            assert_eq!(l3(&first.packet), l3(&there[0].bytes()));
            for at in [2, 1] {
                let outcome = world.send(hook, &sent[at]).unwrap();
                assert_eq!(outcome.verdict, hook.sent_on(), "{:?}", outcome.moved);
                assert_eq!(l3(&outcome.packet), l3(&there[at].bytes()));
            }
            let whole = datagram((f.remote, 8080), (f.node, port));
            let back = whole.clone().from(f.node, 30_080).to(f.client, 40_000).ttl(63).fragments(PIECE);
            for (sent, back) in whole.fragments(PIECE).iter().zip(&back) {
                let outcome = world.send(hook, sent).unwrap();
                assert_eq!(outcome.verdict, hook.sent_on(), "{:?}", outcome.moved);
                assert_eq!(l3(&outcome.packet), l3(&back.bytes()));
            }
        }
    });
}

/// P20: a node port whose endpoint is on this node.
#[test]
fn later_fragments_follow_the_first_to_a_local_endpoint_and_back() {
    for_both(|f| {
        for hook in [Hook::UplinkIn, Hook::Xdp] {
            let world = World::new(&f.web("", &[f.local_endpoint()])).unwrap();
            let whole = datagram((f.client, 40_000), (f.node, 30_080));
            for (sent, out) in
                whole.fragments(PIECE).iter().zip(&whole.clone().to(f.pod, 8080).fragments(PIECE))
            {
                let outcome = world.send(hook, sent).unwrap();
                assert_eq!((outcome.verdict, outcome.packet), (Verdict::Pass, out.bytes()));
            }
            let whole = datagram((f.pod, 8080), (f.client, 40_000));
            for (sent, out) in
                whole.fragments(PIECE).iter().zip(&whole.clone().from(f.node, 30_080).fragments(PIECE))
            {
                expect_untouched(&world, Hook::PodIn, sent);
                let outcome = world.send(Hook::UplinkOut, sent).unwrap();
                assert_eq!((outcome.verdict, outcome.packet), (Verdict::Pass, out.bytes()));
            }
        }
    });
}

/// P20: a fragment that arrives before its first is dropped and counted, and does not spoil the datagrams after it.
#[test]
fn a_fragment_before_its_first_is_dropped() {
    for_both(|f| {
        for hook in [Hook::PodIn, Hook::UplinkIn, Hook::Xdp] {
            let world = World::new(&f.web("", &[f.local_endpoint()])).unwrap();
            let client = if hook == Hook::PodIn { f.other_pod } else { f.client };
            let mut whole = datagram((client, 40_000), (f.cluster_ip, 80));
            expect_drop(&world, hook, &whole.fragments(PIECE)[1], Reason::EarlyFragment);
            assert_eq!(world.flow_counts().unwrap(), [0, 0, 0]);
            let first = world.send(Hook::PodIn, &whole.fragments(PIECE)[0]).unwrap();
            assert_eq!(first.verdict, Verdict::Pass);
            whole.id += 1;
            expect_drop(&world, hook, &whole.fragments(PIECE)[2], Reason::EarlyFragment);
        }
    });
}

/// P20, P1: the first fragment alone is answered where the datagram must be refused.
#[test]
fn a_refused_datagram_is_answered_once() {
    for_both(|f| {
        let world = World::new(&f.web("", &[])).unwrap();
        let whole = datagram((f.pod, 40_000), (f.cluster_ip, 80));
        let sent = whole.fragments(PIECE);
        let outcome = world.send(Hook::PodIn, &sent[0]).unwrap();
        assert_eq!((outcome.verdict, outcome.moved), (Verdict::Redirect, reason(Reason::NoEndpoints)));
        // It quotes the ports behind IPv6's fragment header, without which no stack finds the socket.
        let answer = icmp_error(f.cluster_ip, &sent[0], f.port_unreachable, 0);
        assert_eq!(crate::hex(&outcome.packet), crate::hex(&answer.bytes()));
        expect_drop(&world, Hook::PodIn, &sent[1], Reason::OrphanFragment);
        expect_drop(&world, Hook::PodIn, &sent[2], Reason::OrphanFragment);
    });
}

/// P20: XDP leaves a datagram to tc with all its fragments: those that follow may be there before tc has seen the first.
#[test]
fn xdp_leaves_all_fragments_of_a_new_flow_to_tc() {
    for_both(|f| {
        let world = World::new(&f.web("", &[(f.pod, "there", "ready: true")])).unwrap();
        let whole = datagram((f.client, 40_000), (f.node, 30_080));
        let sent = whole.fragments(PIECE);
        for fragment in &sent {
            expect(&world, Hook::Xdp, fragment, Verdict::Pass, fragment, &reason(Reason::XdpLeftToTc));
        }
        let first = world.send(Hook::UplinkIn, &sent[0]).unwrap();
        let port = f.source_port(&first.packet);
        let there = whole.clone().from(f.node, port).to(f.pod, 8080).ttl(63).fragments(PIECE);
        for at in [1, 2] {
            let counted = f.counted_in(lengths(&whole)[at], false);
            expect(&world, Hook::UplinkIn, &sent[at], Verdict::Redirect, &there[at], &counted);
        }
    });
}

/// Z4: a datagram is not taken for an earlier one that had the same identification.
#[test]
fn an_identification_that_comes_again_means_nothing() {
    for_both(|f| {
        let world = World::new(&f.web("", &[f.local_endpoint()])).unwrap();
        let ours = datagram((f.client, 40_000), (f.node, 30_080));
        let theirs = datagram((f.client, 40_000), (f.node, 53));
        for hook in [Hook::UplinkIn, Hook::Xdp] {
            for fragment in ours.fragments(PIECE) {
                assert_eq!(world.send(hook, &fragment).unwrap().packet.len(), fragment.bytes().len());
            }
            theirs.fragments(PIECE).iter().for_each(|sent| expect_untouched(&world, hook, sent));
        }
    });
}

/// Z4: no Service speaks ICMP: its fragments pass, as what is not in fragments does.
#[test]
fn fragments_of_a_protocol_that_no_service_has_pass() {
    for_both(|f| {
        let world = World::new(&f.load_balancer("", &[f.local_endpoint()])).unwrap();
        let echo = Transport::Other { proto: f.icmp, bytes: vec![f.echo_request; 108] };
        for (hook, client) in [(Hook::PodIn, f.pod), (Hook::UplinkIn, f.client), (Hook::Xdp, f.client)] {
            let whole = packet((client, 0), (f.lb_ip, 0), echo.clone());
            whole.fragments(PIECE).iter().for_each(|sent| expect_untouched(&world, hook, sent));
        }
    });
}

/// P20: so is a first fragment that is too long for the way or whose time ends here; those after it are not.
#[test]
fn a_later_fragment_is_never_answered() {
    for_both(|f| {
        let world = World::new(&f.web("", &[f.remote_endpoint()])).unwrap();
        let whole = datagram((f.client, 40_000), (f.node, 30_080));
        let sent = whole.fragments(PIECE);
        for hook in [Hook::UplinkIn, Hook::Xdp] {
            assert_eq!(world.send(hook, &sent[0]).unwrap().verdict, hook.sent_on());
            expect_drop(&world, hook, &sent[1].clone().ttl(1), Reason::Unanswerable);
        }
        let world = World::new(&f.web("", &[(f.narrow, "there", "ready: true")])).unwrap();
        assert_eq!(world.send(Hook::UplinkIn, &sent[0]).unwrap().verdict, Verdict::Redirect);
        let mut long = sent[1].clone();
        long.transport = Transport::Other { proto: 17, bytes: vec![0; 1_304] };
        expect_drop(&world, Hook::UplinkIn, &long, Reason::Unanswerable);
    });
}

/// Z4: fragments to and from strangers, in order or not, also to the node itself and also if it has node ports.
#[test]
fn fragments_of_strangers_leave_as_they_came() {
    for_both(|f| {
        let world = World::new(&f.web("", &[f.local_endpoint()])).unwrap();
        for (src, dst) in [
            ((f.client, 40_000), (f.node, 53)),
            ((f.client, 40_000), (f.pod, 8080)),
            ((f.pod, 40_000), (f.elsewhere, 80)),
            ((f.pod, 8080), (f.client, 40_001)),
        ] {
            let sent = datagram(src, dst).fragments(PIECE);
            for hook in [Hook::Xdp, Hook::UplinkIn, Hook::UplinkOut, Hook::PodIn, Hook::PodOut] {
                [2, 0, 1].iter().for_each(|&at: &usize| expect_untouched(&world, hook, &sent[at]));
            }
        }
        let gre = packet((f.client, 0), (f.node, 0), Transport::Other { proto: 47, bytes: vec![0; 90] });
        gre.fragments(PIECE).iter().for_each(|sent| expect_untouched(&world, Hook::UplinkIn, sent));
    });
}

/// P20, P21: a first fragment that is too short for its ports is malformed.
#[test]
fn a_first_fragment_without_its_ports_is_malformed() {
    for_both(|f| {
        let world = World::new(&f.web("", &[f.local_endpoint()])).unwrap();
        let short = Transport::Other { proto: 17, bytes: vec![0x9c, 0x40] };
        let tiny = datagram((f.pod, 40_000), (f.cluster_ip, 80)).fragment(0, true, short);
        expect_drop(&world, Hook::PodIn, &tiny, Reason::Malformed);
    });
}

/// P20: what lies behind its end in the frame, such as padding, is no part of it.
#[test]
fn a_first_fragment_without_its_whole_header_is_malformed() {
    for_both(|f| {
        let world = World::new(&f.web("", &[f.local_endpoint()])).unwrap();
        let bytes = vec![0x9c, 0x40, 0, 80, 0, 116];
        let whole = datagram((f.pod, 40_000), (f.cluster_ip, 80));
        let tiny = whole.fragment(0, true, Transport::Other { proto: 17, bytes });
        let sent = [tiny.bytes(), vec![0xaa; 8]].concat();
        let outcome = world.send_bytes(Hook::PodIn, &sent).unwrap();
        assert_eq!((outcome.verdict, outcome.moved), (Verdict::Drop, reason(Reason::Malformed)));
    });
}

/// P18: loopback is the node's own, in fragments too.
#[test]
fn fragments_from_a_pod_to_loopback_are_nobodys() {
    for_both(|f| {
        let world = World::new(&f.web("", &[f.local_endpoint()])).unwrap();
        for sent in datagram((f.pod, 40_000), (f.localhost, 30_080)).fragments(PIECE) {
            expect_untouched(&world, Hook::PodIn, &sent);
        }
    });
}

/// P20, Z4: other ports of an external IP are nobody's, and so are the datagrams to them; but what comes too early is not let
/// out of the node under an address that only Services have.
#[test]
fn fragments_to_other_ports_of_an_external_ip_follow_theirs() {
    for_both(|f| {
        let external = f.elsewhere;
        let spec = format!("externalIPs: [\"{external}\"]");
        let world = World::new(&f.web(&spec, &[f.local_endpoint()])).unwrap();
        for hook in [Hook::UplinkIn, Hook::Xdp, Hook::PodIn] {
            let client = if hook == Hook::PodIn { f.other_pod } else { f.client };
            let mut whole = datagram((client, 40_000), (external, 81));
            whole.id = 20 + hook as u16;
            [0, 2, 1]
                .iter()
                .for_each(|&at: &usize| expect_untouched(&world, hook, &whole.fragments(PIECE)[at]));
            whole.id += 100;
            expect_drop(&world, hook, &whole.fragments(PIECE)[1], Reason::EarlyFragment);
        }
        let ours = datagram((f.client, 40_000), (external, 80));
        for (sent, out) in ours.fragments(PIECE).iter().zip(&ours.clone().to(f.pod, 8080).fragments(PIECE)) {
            let outcome = world.send(Hook::UplinkIn, sent).unwrap();
            assert_eq!((outcome.verdict, outcome.packet), (Verdict::Pass, out.bytes()));
        }
    });
}
