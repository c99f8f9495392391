//! Packets with more or fewer headers than most: options, extension headers, VLAN tags (P21), and no link-layer header.

use crate::{expect, expect_untouched, hex};
use dataplane_common::drop::Reason;
use dataplane_tests::packet::build::{LINK_FROM, Packet, icmp_error, tcp, tcp_packet, udp_packet};
use dataplane_tests::packet::family::{Family, V4, V6, for_both};
use dataplane_tests::packet::{Hook, Verdict, World, counted_in, in_namespace, reason};

/// The same packet with all the headers that are followed: options of a whole header, or four extension headers.
fn with_headers(mut packet: Packet) -> Packet {
    if packet.src.0.is_ipv4() {
        packet.options = [vec![1; 39], vec![0]].concat();
    } else {
        let padding = vec![0, 1, 4, 0, 0, 0, 0];
        let long = [vec![11, 1, 92], vec![0; 92]].concat();
        packet.extensions =
            vec![(0, padding.clone()), (60, long), (43, vec![0, 4, 0, 0, 0, 0, 0]), (60, padding)];
    }
    packet
}

/// P21: translated behind options and extension headers, which stay as they are; the reply is restored; both in XDP and tc.
#[test]
fn a_packet_with_options_or_extension_headers_is_translated() {
    for_both(|f| {
        for hook in [Hook::UplinkIn, Hook::Xdp] {
            let world = World::new(&f.web("", &[f.local_endpoint()])).unwrap();
            for sent in [
                tcp_packet((f.client, 40_000), (f.node, 30_080), tcp::SYN),
                udp_packet((f.client, 40_001), (f.node, 30_080), b"question"),
            ] {
                let sent = with_headers(sent);
                let out = sent.clone().to(f.pod, 8080);
                let length = sent.network_bytes().len() as u64;
                expect(&world, hook, &sent, Verdict::Pass, &out, &counted_in(length, true));
            }
            let reply = with_headers(udp_packet((f.pod, 8080), (f.client, 40_001), b"answer"));
            let restored = world.send(Hook::UplinkOut, &reply).unwrap();
            assert_eq!(hex(&restored.packet), hex(&reply.from(f.node, 30_080).bytes()));
        }
    });
}

/// P21, P4: the same where both ends are translated and the time to live falls.
#[test]
fn a_packet_with_options_or_extension_headers_is_sent_on() {
    for_both(|f| {
        let world = World::new(&f.web("", &[f.remote_endpoint()])).unwrap();
        let sent = with_headers(udp_packet((f.client, 40_000), (f.node, 30_080), b"question"));
        let outcome = world.send(Hook::UplinkIn, &sent).unwrap();
        let at = 14 + sent.header_length();
        let port = u16::from_be_bytes([outcome.packet[at], outcome.packet[at + 1]]);
        let out = sent.clone().from(f.node, port).to(f.remote, 8080).ttl(63);
        assert_eq!((outcome.verdict, hex(&outcome.packet)), (Verdict::Redirect, hex(&out.bytes())));
    });
}

/// P21, P1: refused by a packet without such headers.
#[test]
fn a_connection_with_options_or_extension_headers_is_reset() {
    for_both(|f| {
        let world = World::new(&f.web("", &[])).unwrap();
        let sent = tcp_packet((f.client, 40_000), (f.node, 30_080), tcp::SYN);
        let answer = f.reset(&sent, 0, 1_001, tcp::RST | tcp::ACK);
        let sent = with_headers(sent);
        expect(&world, Hook::UplinkIn, &sent, Verdict::Redirect, &answer, &reason(Reason::NoEndpoints));
    });
}

/// One VLAN tag, and two.
const TAGS: [&[[u8; 4]]; 2] = [&[[0x81, 0, 0x20, 100]], &[[0x88, 0xa8, 0, 7], [0x81, 0, 0, 100]]];

fn tagged(mut packet: Packet, tags: &[[u8; 4]]) -> Packet {
    packet.tags = tags.to_vec();
    packet
}

/// P21: XDP translates behind VLAN tags what goes on to the stack, and leaves to tc what must be sent elsewhere, where the tag
/// may be another.
#[test]
fn xdp_translates_behind_vlan_tags() {
    for_both(|f| {
        for tags in TAGS {
            let world = World::new(&f.web("", &[f.local_endpoint()])).unwrap();
            let sent = tagged(udp_packet((f.client, 40_000), (f.node, 30_080), b"question"), tags);
            let out = sent.clone().to(f.pod, 8080);
            expect(&world, Hook::Xdp, &sent, Verdict::Pass, &out, &f.counted_in(16, true));
            let world = World::new(&f.web("", &[f.remote_endpoint()])).unwrap();
            expect(&world, Hook::Xdp, &sent, Verdict::Pass, &sent, &reason(Reason::XdpLeftToTc));
            assert_eq!(world.flow_counts().unwrap(), [0, 0, 0]);
            expect_untouched(&world, Hook::Xdp, &sent.to(f.elsewhere, 80));
            // Z3.
            let forged = tagged(udp_packet((f.loopback, 1), (f.node, 30_080), b"x"), tags);
            crate::expect_drop(&world, Hook::Xdp, &forged, Reason::Loopback);
        }
    });
}

/// P21: past the bound nobody can tell whose it is.
#[test]
fn three_vlan_tags_are_left_alone() {
    for_both(|f| {
        let world = World::new(&f.web("", &[f.local_endpoint()])).unwrap();
        let sent = udp_packet((f.client, 40_000), (f.node, 30_080), b"question");
        expect_untouched(&world, Hook::Xdp, &tagged(sent, &[[0x81, 0, 0, 1]; 3]));
    });
}

/// What a device without Ethernet headers meets: sends it, and compares the bytes out.
#[track_caller]
fn expect_bare(world: &World, sent: &Packet, verdict: Verdict, link: &[u8], out: &Packet) {
    let outcome = world.send_bytes(Hook::BareIn, &sent.network_bytes()).unwrap();
    let expected = [link, &out.network_bytes()].concat();
    assert_eq!((outcome.verdict, hex(&outcome.packet)), (verdict, hex(&expected)), "{:?}", outcome.moved);
}

/// The EtherType of a family.
fn ethertype(f: &Family) -> [u8; 2] {
    if f == &V4 { [0x08, 0x00] } else { [0x86, 0xdd] }
}

/// P4: a tunnel device without Ethernet headers is an uplink like others.
#[test]
fn a_packet_without_a_link_layer_header_is_translated() {
    for_both(|f| {
        let world = World::new(&f.web("", &[f.local_endpoint()])).unwrap();
        let sent = tcp_packet((f.bare, 40_000), (f.node, 30_080), tcp::SYN);
        expect_bare(&world, &sent, Verdict::Pass, &[], &sent.clone().to(f.pod, 8080));
        let stranger = tcp_packet((f.bare, 40_000), (f.elsewhere, 30_080), tcp::SYN);
        expect_bare(&world, &stranger, Verdict::Pass, &[], &stranger);
    });
}

/// P4: it gets room for an Ethernet header before it leaves by a device that has one.
#[test]
fn a_packet_without_a_link_layer_header_is_sent_on_with_one() {
    for_both(|f| {
        let world = World::new(&f.web("", &[f.remote_endpoint()])).unwrap();
        let sent = tcp_packet((f.bare, 40_000), (f.node, 30_080), tcp::SYN);
        let outcome = world.send_bytes(Hook::BareIn, &sent.network_bytes()).unwrap();
        let port = f.source_port(&outcome.packet);
        let out = sent.clone().from(f.node, port).to(f.remote, 8080).ttl(63);
        let expected = [&[0; 14][..], &out.network_bytes()].concat();
        assert_eq!((outcome.verdict, hex(&outcome.packet)), (Verdict::Redirect, hex(&expected)));
    });
}

/// P1: the answer goes the kernel's way to who is refused, which here is a device with Ethernet headers.
#[test]
fn a_packet_without_a_link_layer_header_is_refused_by_the_way_to_its_sender() {
    for_both(|f| {
        let world = World::new(&f.web("", &[])).unwrap();
        let sent = tcp_packet((f.bare, 40_000), (f.node, 30_080), tcp::SYN);
        let answer = f.reset(&sent, 0, 1_001, tcp::RST | tcp::ACK);
        expect_bare(&world, &sent, Verdict::Redirect, &[0; 14], &answer);
        let sent = udp_packet((f.bare, 40_000), (f.node, 30_080), b"question");
        let answer = icmp_error(f.node, &sent, f.port_unreachable, 0);
        expect_bare(&world, &sent, Verdict::Redirect, &[0; 14], &answer);
    });
}

/// P9: the reply to the node's own packet, which left by an uplink with Ethernet headers, is handed up there.
#[test]
fn a_reply_without_a_link_layer_header_is_handed_up_with_one() {
    for_both(|f| {
        let world = World::new(&f.web("", &[(f.bare, "there", "ready: true")])).unwrap();
        let sent = udp_packet((f.node, 40_000), (f.cluster_ip, 80), b"question");
        let out = sent.clone().to(f.bare, 8080);
        expect(&world, Hook::UplinkOut, &sent, Verdict::Redirect, &out, &f.counted_in(16, true));
        let reply = udp_packet((f.bare, 8080), (f.node, 40_000), b"answer");
        let link = [&LINK_FROM[..], &[0; 6], &ethertype(f)].concat();
        expect_bare(&world, &reply, Verdict::Redirect, &link, &reply.clone().from(f.cluster_ip, 80));
    });
}

/// P21: past the bound nobody can read the port. Dropped, and counted, where the address is a Service's alone; what may be
/// anybody's passes (Z4).
#[test]
fn too_many_extension_headers_to_a_services_own_address_are_dropped() {
    in_namespace(|| {
        let f = &V6;
        let world = World::new(&f.load_balancer("", &[f.local_endpoint()])).unwrap();
        let too_many = |to: &str| {
            let mut packet = udp_packet((f.client, 40_000), (to, 80), b"question");
            packet.extensions = vec![(60, vec![0, 1, 4, 0, 0, 0, 0]); 5];
            packet
        };
        for hook in [Hook::Xdp, Hook::UplinkIn, Hook::PodIn] {
            for to in [f.cluster_ip, f.lb_ip, f.external_ip] {
                crate::expect_drop(&world, hook, &too_many(to), Reason::Extensions);
            }
            for to in [f.node, f.pod, f.elsewhere] {
                expect_untouched(&world, hook, &too_many(to));
            }
        }
    });
}
