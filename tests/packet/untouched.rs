//! What is left alone, and what is dropped because it cannot be translated whole.

use crate::objects::{CLUSTER_IP, LOCAL, web};
use crate::{expect_drop, expect_untouched, hex};
use dataplane_common::drop::Reason;
use dataplane_tests::packet::build::{Packet, Transport, packet, tcp, tcp_packet, udp_packet};
use dataplane_tests::packet::{CLIENT, Hook, NODE, POD, Verdict, World, in_namespace};

const HOOKS: [Hook; 5] = [Hook::Xdp, Hook::UplinkIn, Hook::UplinkOut, Hook::PodIn, Hook::PodOut];

/// Z4: ordinary traffic between strangers, pods and the node.
#[test]
fn a_packet_to_no_service_leaves_byte_for_byte_as_it_came() {
    in_namespace(|| {
        let world = World::new(&web("", &[LOCAL])).unwrap();
        let ping = Transport::Other { proto: 1, bytes: vec![8, 0, 0, 0, 0, 1, 0, 1, 1, 2, 3] };
        let packets = [
            tcp_packet((CLIENT, 40_000), (NODE, 22), tcp::SYN),
            tcp_packet((CLIENT, 40_000), (POD, 8080), tcp::SYN),
            udp_packet((POD, 40_000), ("192.0.2.53", 53), b"question"),
            packet((CLIENT, 0), (NODE, 0), ping.clone()),
            packet((POD, 0), ("10.244.2.9", 0), ping),
            packet((CLIENT, 0), (NODE, 0), Transport::Other { proto: 47, bytes: vec![0; 40] }),
        ];
        for hook in HOOKS {
            packets.iter().for_each(|sent| expect_untouched(&world, hook, sent));
        }
    });
}

/// Z4: whatever it holds. Random bytes behind random headers, 400 at each hook, by a fixed seed.
#[test]
fn garbage_leaves_byte_for_byte_as_it_came() {
    in_namespace(|| {
        let world = World::new(&web("", &[LOCAL])).unwrap();
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        let mut random = move || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state
        };
        for hook in HOOKS {
            for _ in 0..400 {
                let length = 34 + (random() % 120) as usize;
                let mut bytes: Vec<u8> = (0..length).map(|_| random() as u8).collect();
                if random() % 2 == 0 {
                    bytes[12..14].copy_from_slice(&[8, 0]);
                    if random() % 4 != 0 {
                        bytes[14] = 0x45;
                        // Neither an address of a Service or of the node, nor loopback.
                        (bytes[26], bytes[30]) = (11, 12);
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
    in_namespace(|| {
        let world = World::new(&web("", &[LOCAL])).unwrap();
        for hook in [Hook::Xdp, Hook::UplinkIn] {
            for (src, dst) in [("127.0.0.1", NODE), (CLIENT, "127.0.0.1"), ("127.3.2.1", "203.0.113.9")] {
                expect_drop(&world, hook, &tcp_packet((src, 1), (dst, 30_080), tcp::SYN), Reason::Loopback);
            }
        }
    });
}

/// Z3: for packets to a Service.
#[test]
fn a_source_that_no_client_can_have_is_dropped() {
    in_namespace(|| {
        let world = World::new(&web("", &[LOCAL])).unwrap();
        for src in ["224.0.0.1", "255.255.255.255", "0.0.0.0", NODE] {
            expect_drop(
                &world,
                Hook::UplinkIn,
                &udp_packet((src, 1), (NODE, 30_080), b"x"),
                Reason::BadSource,
            );
            let elsewhere = udp_packet((src, 1), ("203.0.113.9", 30_080), b"x");
            expect_untouched(&world, Hook::UplinkIn, &elsewhere);
        }
    });
}

fn fragment(mut packet: Packet, field: u16) -> Packet {
    packet.fragment = field;
    packet
}

/// P20, P21 as far as they go: never half translated, counted only if it was ours.
#[test]
fn fragments_and_options_to_a_service_are_counted_drops() {
    in_namespace(|| {
        let world = World::new(&web("", &[LOCAL])).unwrap();
        let ours = || udp_packet((CLIENT, 40_000), (CLUSTER_IP, 80), b"question");
        let first = fragment(ours(), 0x2000);
        let later = fragment(
            packet((CLIENT, 0), (CLUSTER_IP, 0), Transport::Other { proto: 17, bytes: vec![1; 24] }),
            1,
        );
        let mut options = ours();
        options.options = vec![1, 1, 1, 1];
        for hook in [Hook::UplinkIn, Hook::Xdp] {
            expect_drop(&world, hook, &first, Reason::Fragment);
            expect_drop(&world, hook, &later, Reason::Fragment);
            expect_drop(&world, hook, &options, Reason::IpOptions);
        }
        let not_ours = |packet: Packet| packet.to("203.0.113.9", 80);
        for packet in [first, later, options] {
            expect_untouched(&world, Hook::UplinkIn, &not_ours(packet));
        }
    });
}

/// A packet cut short or with a length that lies: a counted drop if it is ours, else untouched.
#[test]
fn lengths_that_lie_are_counted_drops() {
    in_namespace(|| {
        let world = World::new(&web("", &[LOCAL])).unwrap();
        let ours = udp_packet((CLIENT, 40_000), (CLUSTER_IP, 80), b"question").bytes();
        let theirs = udp_packet((CLIENT, 40_000), ("203.0.113.9", 80), b"question").bytes();
        type Damage = (&'static str, fn(&mut Vec<u8>));
        let damages: [Damage; 4] = [
            ("IP length past the end", |bytes| bytes[17] += 1),
            ("UDP length past the end", |bytes| bytes[39] += 1),
            ("UDP length under eight", |bytes| bytes[39] = 7),
            ("cut in the transport header", |bytes| bytes.truncate(38)),
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
                    assert_eq!(outcome.moved, dataplane_tests::packet::reason(Reason::Malformed), "{what}");
                }
            }
        }
    });
}
