//! ICMP errors about translated packets: both directions, every kind, and those that concern nobody.

use crate::{expect, expect_drop, expect_untouched, hex};
use dataplane_common::drop::Reason;
use dataplane_tests::packet::build::{
    Packet, Transport, icmp_error_quoting, packet, tcp, tcp_packet, udp_packet,
};
use dataplane_tests::packet::family::{Family, V4, V6, for_both};
use dataplane_tests::packet::{Hook, Verdict, World, counted_in, counted_out, in_namespace};
use std::collections::BTreeMap;

/// Hooks at the uplink where a packet comes in.
const FROM_NETWORK: [Hook; 2] = [Hook::UplinkIn, Hook::Xdp];

/// A kind of error: type and code, second word.
type Kind = ([u8; 2], u32);

/// Every kind of error. ICMP (RFC 792, RFC 1122, RFC 1812): all codes of "unreachable", with an MTU where fragmentation is
/// needed; time exceeded in transit and in reassembly; parameter problem with its pointer. ICMPv6 (RFC 4443) likewise.
fn kinds(f: &Family) -> Vec<Kind> {
    if f == &V4 {
        let unreachable = (0..16).map(|code| ([3, code], if code == 4 { 1_400 } else { 0 }));
        return unreachable.chain([([11, 0], 0), ([11, 1], 0), ([12, 0], 20 << 24), ([12, 1], 0)]).collect();
    }
    let unreachable = (0..7).map(|code| ([1, code], 0));
    unreachable.chain([([2, 0], 1_280), ([3, 0], 0), ([3, 1], 0), ([4, 0], 40), ([4, 1], 6)]).collect()
}

/// Packets of every shape, and how much of them is quoted behind the network header: eight bytes, up to and with the TCP
/// checksum, all of the packet.
fn shapes(src: (&str, u16), dst: (&str, u16)) -> Vec<(Packet, usize)> {
    let mut unsummed = udp_packet(src, dst, b"data");
    unsummed.transport = Transport::Udp { data: b"data".to_vec(), checksum: false };
    let segment = tcp_packet(src, dst, tcp::ACK);
    let datagram = udp_packet(src, dst, b"some data");
    [(&segment, 8), (&segment, 20), (&segment, 18), (&datagram, 8), (&datagram, 99), (&unsummed, 8)]
        .map(|(packet, quoted)| (packet.clone().ttl(61), quoted))
        .into()
}

/// A transport protocol's first packet from a client to the Service.
fn opening(like: &Packet, src: (&str, u16), dst: (&str, u16)) -> Packet {
    match like.proto() {
        6 => tcp_packet(src, dst, tcp::SYN),
        _ => udp_packet(src, dst, b"hello"),
    }
}

fn length(packet: &Packet) -> u64 {
    packet.network_bytes().len() as u64
}

/// A router between the node and the client, or between the node and the endpoint.
fn router(f: &Family) -> &'static str {
    f.other_node
}

/// P19: only the destination was translated, from a pod: the error about what the client sent meets the client as if about
/// what it sent. A router speaks in its own name, the endpoint in the Service's.
#[test]
fn an_error_on_the_way_to_the_endpoint_reaches_the_pod_that_called() {
    for_both(|f| {
        let world = World::new(&f.web("", &[f.remote_endpoint()])).unwrap();
        for (about, quoted) in shapes((f.pod, 40_000), (f.remote, 8080)) {
            let original = about.clone().to(f.cluster_ip, 80);
            world.send(Hook::PodIn, &opening(&about, (f.pod, 40_000), (f.cluster_ip, 80))).unwrap();
            let flows = world.flow_counts().unwrap();
            for (kind, word) in kinds(f) {
                for (from, known_as) in [(router(f), router(f)), (f.remote, f.cluster_ip)] {
                    let sent = icmp_error_quoting(from, &about, kind, word, quoted);
                    let out = icmp_error_quoting(known_as, &original, kind, word, quoted);
                    let counted = counted_out(length(&sent));
                    FROM_NETWORK.iter().for_each(|hook| expect_untouched(&world, *hook, &sent));
                    expect(&world, Hook::PodOut, &sent, Verdict::Pass, &out, &counted);
                }
            }
            assert_eq!(world.flow_counts().unwrap(), flows, "an error begins no flow");
        }
    });
}

/// P19: the error about what the endpoint answered, as the pod that called meets it, reaches the endpoint.
#[test]
fn an_error_on_the_way_back_to_a_pod_reaches_the_endpoint() {
    for_both(|f| {
        let world = World::new(&f.web("", &[f.remote_endpoint()])).unwrap();
        for (about, quoted) in shapes((f.cluster_ip, 80), (f.pod, 40_000)) {
            let original = about.clone().from(f.remote, 8080);
            world.send(Hook::PodIn, &opening(&about, (f.pod, 40_000), (f.cluster_ip, 80))).unwrap();
            for (kind, word) in kinds(f) {
                let sent = icmp_error_quoting(f.pod, &about, kind, word, quoted);
                let out = icmp_error_quoting(f.pod, &original, kind, word, quoted);
                expect(&world, Hook::PodIn, &sent, Verdict::Pass, &out, &counted_in(length(&sent), false));
                expect_untouched(&world, Hook::UplinkOut, &out);
            }
        }
    });
}

/// P19: a node port whose endpoint is on this node: the source is kept, so both directions cross the host's stack.
#[test]
fn errors_of_a_node_port_with_a_local_endpoint_reach_both_ends() {
    for_both(|f| {
        for hook in FROM_NETWORK {
            let world = World::new(&f.web("", &[f.local_endpoint()])).unwrap();
            for (about, quoted) in shapes((f.client, 40_000), (f.pod, 8080)) {
                let opening = opening(&about, (f.client, 40_000), (f.node, 30_080));
                world.send(hook, &opening).unwrap();
                let original = about.clone().to(f.node, 30_080);
                for (kind, word) in kinds(f) {
                    let sent = icmp_error_quoting(f.pod, &about, kind, word, quoted);
                    let out = icmp_error_quoting(f.node, &original, kind, word, quoted);
                    expect_untouched(&world, Hook::PodIn, &sent);
                    let counted = counted_out(length(&sent));
                    expect(&world, Hook::UplinkOut, &sent, Verdict::Pass, &out, &counted);
                }
            }
            for (about, quoted) in shapes((f.node, 30_080), (f.client, 40_000)) {
                let original = about.clone().from(f.pod, 8080);
                for (from, (kind, word)) in
                    [router(f), f.client].into_iter().zip(kinds(f).into_iter().skip(3))
                {
                    let sent = icmp_error_quoting(from, &about, kind, word, quoted);
                    let out = icmp_error_quoting(from, &original, kind, word, quoted);
                    expect(&world, hook, &sent, Verdict::Pass, &out, &counted_in(length(&sent), false));
                    expect_untouched(&world, Hook::PodOut, &out);
                }
            }
        }
    });
}

/// P19: a node port whose endpoint is on another node: both ends were translated, and so the error is, by both programs, in
/// both directions. It leaves at once in the node's own name, with its time to live lowered.
#[test]
fn errors_of_a_node_port_with_a_remote_endpoint_reach_both_ends() {
    for_both(|f| {
        for hook in FROM_NETWORK {
            let world = World::new(&f.web("", &[f.remote_endpoint()])).unwrap();
            for (about, quoted) in shapes((f.client, 40_000), (f.node, 30_080)) {
                let first = world.send(hook, &opening(&about, (f.client, 40_000), (f.node, 30_080))).unwrap();
                let port = f.source_port(&first.packet);
                let there = about.clone().from(f.node, port).to(f.remote, 8080);
                let back = about.clone().from(f.node, 30_080).to(f.client, 40_000);
                let answer = about.clone().from(f.remote, 8080).to(f.node, port);
                for (kind, word) in kinds(f) {
                    for from in [router(f), f.remote] {
                        let sent = icmp_error_quoting(from, &there, kind, word, quoted);
                        let out = icmp_error_quoting(f.node, &about, kind, word, quoted);
                        expect_sent_on(&world, hook, &sent, &out.ttl(63), &counted_out(length(&sent)));
                    }
                    for from in [router(f), f.client] {
                        let sent = icmp_error_quoting(from, &back, kind, word, quoted);
                        let out = icmp_error_quoting(f.node, &answer, kind, word, quoted);
                        let counted = counted_in(length(&sent), false);
                        expect_sent_on(&world, hook, &sent, &out.ttl(63), &counted);
                    }
                }
            }
        }
    });
}

/// As `expect` with a redirect; XDP has written link-layer addresses, tc leaves that to the kernel.
#[track_caller]
fn expect_sent_on(world: &World, hook: Hook, sent: &Packet, out: &Packet, moved: &BTreeMap<String, u64>) {
    let outcome = world.send(hook, sent).unwrap();
    assert_eq!((outcome.verdict, &outcome.moved), (hook.sent_on(), moved), "{sent:?}");
    let link = if hook == Hook::Xdp { 12 } else { 0 };
    assert_eq!(hex(&outcome.packet[link..]), hex(&out.bytes()[link..]), "the packet out");
}

/// P19: the node itself as the client of a pod elsewhere: translated where its packets leave, restored where they come in.
#[test]
fn errors_of_the_nodes_own_flows_reach_both_ends() {
    for_both(|f| {
        let world = World::new(&f.web("", &[f.remote_endpoint()])).unwrap();
        for (about, quoted) in shapes((f.node, 40_000), (f.cluster_ip, 80)) {
            world.send(Hook::UplinkOut, &opening(&about, (f.node, 40_000), (f.cluster_ip, 80))).unwrap();
            let there = about.clone().to(f.remote, 8080);
            let back = about.clone().from(f.cluster_ip, 80).to(f.node, 40_000);
            let answer = about.clone().from(f.remote, 8080).to(f.node, 40_000);
            for (kind, word) in kinds(f) {
                let sent = icmp_error_quoting(router(f), &there, kind, word, quoted);
                let out = icmp_error_quoting(router(f), &about, kind, word, quoted);
                expect(&world, Hook::UplinkIn, &sent, Verdict::Pass, &out, &counted_out(length(&sent)));
                let sent = icmp_error_quoting(f.node, &back, kind, word, quoted);
                let out = icmp_error_quoting(f.node, &answer, kind, word, quoted);
                let counted = counted_in(length(&sent), false);
                expect(&world, Hook::UplinkOut, &sent, Verdict::Redirect, &out, &counted);
            }
        }
    });
}

/// P19: a router's own address is no reason to hand an error up anywhere but where it came in.
#[test]
fn an_error_by_another_uplink_stays_there() {
    for_both(|f| {
        let mut world = World::new(&f.web("", &[f.remote_endpoint()])).unwrap();
        let about = udp_packet((f.node, 40_000), (f.cluster_ip, 80), b"question");
        world.set_uplink("up1").unwrap();
        world.send(Hook::UplinkOut, &about).unwrap();
        world.set_uplink("up0").unwrap();
        let there = about.clone().to(f.remote, 8080);
        let sent = icmp_error_quoting(router(f), &there, f.time_exceeded, 0, 8);
        let out = icmp_error_quoting(router(f), &about, f.time_exceeded, 0, 8);
        expect(&world, Hook::UplinkIn, &sent, Verdict::Pass, &out, &counted_out(length(&sent)));
    });
}

/// P19: the quoted packet may have IP options or extension headers of its own.
#[test]
fn a_quoted_header_that_is_longer_than_usual_is_translated() {
    for_both(|f| {
        let world = World::new(&f.web("", &[f.remote_endpoint()])).unwrap();
        world.send(Hook::PodIn, &udp_packet((f.pod, 40_000), (f.cluster_ip, 80), b"hello")).unwrap();
        let mut about = udp_packet((f.pod, 40_000), (f.remote, 8080), b"0123456789");
        about.options = vec![7, 7, 4, 0, 0, 0, 0, 0];
        about.extensions = vec![(60, vec![0, 1, 4, 0, 0, 0, 0]), (44, vec![0, 0, 1, 0, 0, 0, 9])];
        let (kind, word) = (f.too_big, 1_300);
        for quoted in [8, 99] {
            let sent = icmp_error_quoting(router(f), &about, kind, word, quoted);
            let out = icmp_error_quoting(router(f), &about.clone().to(f.cluster_ip, 80), kind, word, quoted);
            expect(&world, Hook::PodOut, &sent, Verdict::Pass, &out, &counted_out(length(&sent)));
        }
    });
}

/// Z4: errors about strangers; errors about known flows that are not addressed to the sender of what they quote; quotes that
/// end before the ports; what only looks like an error.
#[test]
fn an_error_that_concerns_nobody_leaves_as_it_came() {
    for_both(|f| {
        let world = World::new(&f.web("", &[f.remote_endpoint()])).unwrap();
        world.send(Hook::PodIn, &tcp_packet((f.pod, 40_000), (f.cluster_ip, 80), tcp::SYN)).unwrap();
        let about = tcp_packet((f.pod, 40_000), (f.remote, 8080), tcp::ACK);
        let error = |about: &Packet, quoted| icmp_error_quoting(router(f), about, f.too_big, 1_400, quoted);
        let mut later = about.clone();
        later.fragment = 0x0005;
        later.extensions = vec![(44, vec![0, 0, 40, 0, 0, 0, 9])];
        let ping =
            Transport::Other { proto: f.icmp, bytes: vec![f.echo_request, 0, 0, 0, 0, 1, 0, 1, 1, 2, 3] };
        let about_ping = packet((f.pod, 0), (f.remote, 0), ping);
        let mut cut_in_the_header = error(&about, 8);
        let mut echo = error(&about, 8);
        for (changed, kind) in [(&mut cut_in_the_header, None), (&mut echo, Some(f.echo_request))] {
            if let Transport::Other { bytes, .. } = &mut changed.transport {
                bytes[0] = kind.unwrap_or(bytes[0]);
                bytes.truncate(if kind.is_none() { 8 } else { 99 });
            }
        }
        let packets = [
            error(&about.clone().from(f.pod, 40_001), 8),
            error(&about.clone().to(f.lost, 8080), 8),
            error(&about, 8).to(f.other_pod, 0),
            error(&about, 3),
            error(&about, 0),
            error(&later, 8),
            error(&about_ping, 8),
            cut_in_the_header,
            echo,
        ];
        for sent in &packets {
            for hook in [Hook::Xdp, Hook::UplinkIn, Hook::UplinkOut, Hook::PodIn, Hook::PodOut] {
                expect_untouched(&world, hook, sent);
            }
        }
    });
}

/// Z4: ICMP has one number in each family, and means nothing in the other.
#[test]
fn an_error_of_the_other_family_is_none() {
    in_namespace(|| {
        for (f, proto) in [(&V4, V6.icmp), (&V6, V4.icmp)] {
            let world = World::new(&f.web("", &[f.remote_endpoint()])).unwrap();
            world.send(Hook::PodIn, &tcp_packet((f.pod, 40_000), (f.cluster_ip, 80), tcp::SYN)).unwrap();
            let about = tcp_packet((f.pod, 40_000), (f.remote, 8080), tcp::ACK);
            let mut sent = icmp_error_quoting(router(f), &about, [3, 0], 0, 8);
            if let Transport::Other { proto: number, .. } = &mut sent.transport {
                *number = proto;
            }
            expect_untouched(&world, Hook::PodOut, &sent);
        }
    });
}

/// P19: an error is never answered by another, neither where its time ends here nor where it is addressed to a ClusterIP.
#[test]
fn an_error_is_never_answered() {
    for_both(|f| {
        let world = World::new(&f.web("", &[f.remote_endpoint()])).unwrap();
        for hook in FROM_NETWORK {
            let first =
                world.send(hook, &tcp_packet((f.client, 40_000), (f.node, 30_080), tcp::SYN)).unwrap();
            let about = tcp_packet((f.node, f.source_port(&first.packet)), (f.remote, 8080), tcp::ACK);
            let error = icmp_error_quoting(router(f), &about, f.time_exceeded, 0, 8);
            expect_drop(&world, hook, &error.ttl(1), Reason::Unanswerable);
        }
        let about = tcp_packet((f.cluster_ip, 80), (f.pod, 7), tcp::ACK);
        let stray = icmp_error_quoting(f.pod, &about, f.port_unreachable, 0, 8);
        expect_drop(&world, Hook::PodIn, &stray, Reason::UnsupportedProtocol);
    });
}
