//! What is left alone, and what is dropped because it cannot be translated whole.

use crate::{expect, expect_drop, expect_untouched, hex};
use dataplane_common::drop::Reason;
use dataplane_tests::packet::build::{LINK_FROM, Packet, Transport, packet, tcp, tcp_packet, udp_packet};
use dataplane_tests::packet::family::{V4, V6, for_both};
use dataplane_tests::packet::{Hook, Verdict, World, in_namespace, reason};

const HOOKS: [Hook; 5] = [Hook::Xdp, Hook::UplinkIn, Hook::UplinkOut, Hook::PodIn, Hook::PodOut];

/// Z4: ordinary traffic between strangers, pods and the node.
#[test]
fn a_packet_to_no_service_leaves_byte_for_byte_as_it_came() {
    for_both(|f| {
        let world = World::new(&f.web("", &[f.local_endpoint()])).unwrap();
        let bytes = vec![f.echo_request, 0, 0, 0, 0, 1, 0, 1, 1, 2, 3];
        let ping = Transport::Other { proto: f.icmp, bytes };
        let packets = [
            tcp_packet((f.client, 40_000), (f.node, 22), tcp::SYN),
            tcp_packet((f.client, 40_000), (f.pod, 8080), tcp::SYN),
            udp_packet((f.pod, 40_000), (f.elsewhere, 53), b"question"),
            packet((f.client, 0), (f.node, 0), ping.clone()),
            packet((f.pod, 0), (f.remote, 0), ping),
            packet((f.client, 0), (f.node, 0), Transport::Other { proto: 47, bytes: vec![0; 40] }),
        ];
        for hook in HOOKS {
            packets.iter().for_each(|sent| expect_untouched(&world, hook, sent));
        }
    });
}

/// Z4: neighbour discovery, router advertisements and multicast listener reports, which ask for addresses of the node and of
/// Services.
#[test]
fn neighbour_discovery_is_left_alone() {
    in_namespace(|| {
        let f = &V6;
        let world = World::new(&f.web("", &[f.local_endpoint()])).unwrap();
        let about = |kind: u8, target: &str| {
            let mut bytes = vec![kind, 0, 0, 0, 0, 0, 0, 0];
            bytes.extend(target.parse::<std::net::Ipv6Addr>().unwrap().octets());
            bytes.extend([1, 1, 2, 0, 0, 0, 0, 9]);
            Transport::Other { proto: f.icmp, bytes }
        };
        let mut packets: Vec<Packet> = Vec::new();
        for target in [f.node, f.pod, f.cluster_ip] {
            // Solicitation: to all that share the last bytes, and to the address itself; advertisement; from no address yet.
            packets.push(packet(("fe80::1", 0), ("ff02::1:ff00:1", 0), about(135, target)));
            packets.push(packet(("fe80::1", 0), (f.node, 0), about(135, target)));
            packets.push(packet((f.node, 0), ("fe80::1", 0), about(136, target)));
            packets.push(packet(("::", 0), ("ff02::1:ff00:1", 0), about(135, target)));
        }
        packets.push(packet(("fe80::1", 0), ("ff02::1", 0), about(134, "fe80::1")));
        let mut report = packet(("fe80::1", 0), ("ff02::16", 0), about(143, "ff02::1:ff00:1"));
        report.extensions = vec![(0, vec![0, 5, 2, 0, 0, 1, 0])];
        packets.push(report);
        for hook in HOOKS {
            packets.iter().for_each(|sent| expect_untouched(&world, hook, &sent.clone().ttl(255)));
        }
    });
}

/// Z4: an IPv6 packet whose addresses are IPv4-mapped is no IPv4 packet.
#[test]
fn mapped_addresses_on_the_wire_are_nobodys() {
    in_namespace(|| {
        let world = World::new(&V4.web("", &[V4.local_endpoint()])).unwrap();
        let mapped = format!("::ffff:{}", V4.cluster_ip);
        for hook in HOOKS {
            expect_untouched(&world, hook, &tcp_packet((V6.client, 40_000), (&mapped, 80), tcp::SYN));
            let from = format!("::ffff:{}", V4.pod);
            expect_untouched(&world, hook, &tcp_packet((&from, 8080), (V6.client, 40_000), tcp::ACK));
        }
    });
}

/// Z4: whatever it holds. Random bytes behind random headers, 400 at each hook, by a fixed seed.
#[test]
fn garbage_leaves_byte_for_byte_as_it_came() {
    for_both(|f| {
        let world = World::new(&f.web("", &[f.local_endpoint()])).unwrap();
        let v4 = f == &V4;
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        let mut random = move || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state
        };
        for hook in HOOKS {
            for _ in 0..400 {
                // The kernel runs no program on less than a network header.
                let length = 14 + f.header + (random() % 120) as usize;
                let mut bytes: Vec<u8> = (0..length).map(|_| random() as u8).collect();
                if random() % 2 == 0 {
                    bytes[12..14].copy_from_slice(if v4 { &[8, 0] } else { &[0x86, 0xdd] });
                    if random() % 4 != 0 {
                        bytes[14] = if v4 { 0x45 } else { 0x60 };
                        // Neither an address of a Service or of the node, nor loopback.
                        (bytes[26], bytes[30]) = (11, 12);
                        if !v4 && random() % 2 == 0 {
                            // Extension headers of all kinds, and what comes behind them.
                            bytes[20] = [0, 43, 44, 60, 6, 17, 58][(random() % 7) as usize];
                        }
                    }
                }
                let outcome = world.send_bytes(hook, &bytes).unwrap();
                assert_eq!(outcome.verdict, Verdict::Pass, "{hook:?}\n{}", hex(&bytes));
                assert_eq!(hex(&outcome.packet), hex(&bytes), "{hook:?}");
                assert!(outcome.moved.is_empty(), "{hook:?} {:?}", outcome.moved);
            }
        }
    });
}

/// Z3: from the network, whatever the destination.
#[test]
fn loopback_addresses_from_the_network_are_dropped_first() {
    for_both(|f| {
        let world = World::new(&f.web("", &[f.local_endpoint()])).unwrap();
        for hook in [Hook::Xdp, Hook::UplinkIn] {
            for (src, dst) in [(f.loopback, f.node), (f.client, f.loopback), (f.loopback, f.elsewhere)] {
                expect_drop(&world, hook, &tcp_packet((src, 1), (dst, 30_080), tcp::SYN), Reason::Loopback);
            }
        }
    });
}

/// Z3: for packets to a Service.
#[test]
fn a_source_that_no_client_can_have_is_dropped() {
    for_both(|f| {
        let world = World::new(&f.web("", &[f.local_endpoint()])).unwrap();
        for &src in f.no_clients.iter().chain([&f.node]) {
            expect_drop(
                &world,
                Hook::UplinkIn,
                &udp_packet((src, 1), (f.node, 30_080), b"x"),
                Reason::BadSource,
            );
            let elsewhere = udp_packet((src, 1), (f.elsewhere, 30_080), b"x");
            expect_untouched(&world, Hook::UplinkIn, &elsewhere);
        }
        // From the network it is dropped before. No answer could come back to it from a pod, by whichever interface it leaves.
        for hook in [Hook::PodIn, Hook::UplinkOut] {
            let sent = udp_packet((f.localhost, 1), (f.cluster_ip, 80), b"x");
            expect_drop(&world, hook, &sent, Reason::BadSource);
        }
    });
}

/// P21: past the bound, only if the destination is ours.
#[test]
fn more_extension_headers_than_are_followed_are_a_counted_drop() {
    in_namespace(|| {
        let f = &V6;
        let world = World::new(&f.web("", &[f.local_endpoint()])).unwrap();
        let options = (60, vec![0, 1, 4, 0, 0, 0, 0]);
        let long = (60, [vec![16], vec![0; 134]].concat());
        let source_route = (43, vec![0, 0, 1, 0, 0, 0, 0]);
        for extensions in [vec![options; 5], vec![long], vec![source_route]] {
            let mut sent = udp_packet((f.client, 40_000), (f.cluster_ip, 80), b"question");
            sent.extensions = extensions;
            for hook in [Hook::UplinkIn, Hook::Xdp] {
                expect_drop(&world, hook, &sent, Reason::Extensions);
            }
            for hook in HOOKS {
                expect_untouched(&world, hook, &sent.clone().to(f.elsewhere, 80));
            }
        }
    });
}

/// A packet cut short or with a length that lies: a counted drop if it is ours, else untouched.
#[test]
fn lengths_that_lie_are_counted_drops() {
    for_both(|f| {
        let world = World::new(&f.web("", &[f.local_endpoint()])).unwrap();
        let ours = udp_packet((f.client, 40_000), (f.cluster_ip, 80), b"question").bytes();
        let theirs = udp_packet((f.client, 40_000), (f.elsewhere, 80), b"question").bytes();
        type Damage<'a> = (&'static str, &'a dyn Fn(&mut Vec<u8>));
        let (length, l4) = (if f == &V4 { 17 } else { 19 }, 14 + f.header);
        let damages: [Damage<'_>; 4] = [
            ("IP length past the end", &|bytes| bytes[length] += 1),
            ("UDP length past the end", &|bytes| bytes[l4 + 5] += 1),
            ("UDP length under eight", &|bytes| bytes[l4 + 5] = 7),
            ("cut in the transport header", &|bytes| bytes.truncate(l4 + 4)),
        ];
        for (what, damage) in damages {
            for (bytes, verdict) in [(&ours, Verdict::Drop), (&theirs, Verdict::Pass)] {
                let mut bytes = bytes.clone();
                damage(&mut bytes);
                let outcome = world.send_bytes(Hook::UplinkIn, &bytes).unwrap();
                assert_eq!(outcome.verdict, verdict, "{what}: {:?}", outcome.moved);
                if verdict == Verdict::Pass {
                    assert_eq!(hex(&outcome.packet), hex(&bytes), "{what}");
                    assert!(outcome.moved.is_empty());
                } else {
                    assert_eq!(outcome.moved, reason(Reason::Malformed), "{what}");
                }
            }
        }
    });
}

/// Z4: a frame for another host, which an interface that listens to all takes in, is neither served nor answered. XDP does not know
/// yet whom it is for: what it would send on it leaves to tc, where the kernel knows.
#[test]
fn a_frame_for_another_host_is_left_to_it() {
    for_both(|f| {
        let others = [2, 0, 0, 0, 0, 0x77];
        for endpoints in [&[f.local_endpoint()][..], &[f.remote_endpoint()], &[]] {
            let world = World::new(&f.load_balancer("", endpoints)).unwrap();
            for to in [(f.node, 30_080), (f.lb_ip, 80), (f.cluster_ip, 80), (f.cluster_ip, 81)] {
                for sent in
                    [tcp_packet((f.client, 40_000), to, tcp::SYN), udp_packet((f.client, 40_000), to, b"?")]
                {
                    let sent = sent.link(others, LINK_FROM);
                    expect_untouched(&world, Hook::UplinkIn, &sent);
                    assert_eq!(world.flow_counts().unwrap(), [0, 0, 0]);
                }
            }
            // Behind a bridge of pods no frame is for the interface.
            let from_pod =
                udp_packet((f.other_pod, 40_000), (f.cluster_ip, 80), b"?").link(others, LINK_FROM);
            assert!(!world.send(Hook::PodIn, &from_pod).unwrap().moved.is_empty());
        }
        let world = World::new(&f.web("", &[f.remote_endpoint()])).unwrap();
        let sent = udp_packet((f.client, 40_000), (f.node, 30_080), b"?").link(others, LINK_FROM);
        expect(&world, Hook::Xdp, &sent, Verdict::Pass, &sent, &reason(Reason::XdpLeftToTc));
        assert_eq!(world.flow_counts().unwrap(), [0, 0, 0]);
    });
}
