//! What a translated packet looks like, in both directions.

use crate::{expect, expect_untouched};
use dataplane_common::drop::Reason;
use dataplane_common::node::Node;
use dataplane_common::{Addr, Port};
use dataplane_tests::packet::build::{LINK_FROM, Transport, icmp_error, tcp, tcp_packet, udp_packet};
use dataplane_tests::packet::family::{NARROW, for_both};
use dataplane_tests::packet::{GATEWAY_MAC, Hook, Verdict, World, reason};
use std::net::IpAddr;

/// P9: there and back, TCP: translated where the pod's packet comes in, restored where the reply goes to the pod.
#[test]
fn a_cluster_ip_is_translated_from_a_pod_and_restored_to_it() {
    for_both(|f| {
        let world = World::new(&f.web("", &[f.remote_endpoint()])).unwrap();
        let sent = tcp_packet((f.pod, 40_000), (f.cluster_ip, 80), tcp::SYN);
        let out = sent.clone().to(f.remote, 8080);
        expect(&world, Hook::PodIn, &sent, Verdict::Pass, &out, &f.counted_in(20, true));
        expect_untouched(&world, Hook::UplinkOut, &out);
        let reply = tcp_packet((f.remote, 8080), (f.pod, 40_000), tcp::SYN | tcp::ACK);
        expect_untouched(&world, Hook::UplinkIn, &reply);
        let restored = reply.clone().from(f.cluster_ip, 80);
        expect(&world, Hook::PodOut, &reply, Verdict::Pass, &restored, &f.counted_out(20));
    });
}

/// P9: the same over UDP; a checksum of zero stays zero (RFC 768).
#[test]
fn a_datagram_without_a_checksum_stays_without() {
    for_both(|f| {
        let world = World::new(&f.web("", &[f.remote_endpoint()])).unwrap();
        for checksum in [true, false] {
            let port = 40_000 + u16::from(checksum);
            let mut sent = udp_packet((f.pod, port), (f.cluster_ip, 80), b"odd");
            sent.transport = Transport::Udp { data: b"odd".to_vec(), checksum };
            let out = sent.clone().to(f.remote, 8080);
            expect(&world, Hook::PodIn, &sent, Verdict::Pass, &out, &f.counted_in(11, true));
        }
    });
}

/// P4: a node port with an endpoint on this node keeps the client's address; the reply is restored where it leaves. The
/// same in XDP.
#[test]
fn a_node_port_with_a_local_endpoint_keeps_the_source() {
    for_both(|f| {
        for hook in [Hook::UplinkIn, Hook::Xdp] {
            let world = World::new(&f.web("", &[f.local_endpoint()])).unwrap();
            let sent = tcp_packet((f.client, 40_000), (f.node, 30_080), tcp::SYN);
            let out = sent.clone().to(f.pod, 8080);
            expect(&world, hook, &sent, Verdict::Pass, &out, &f.counted_in(20, true));
            let reply = tcp_packet((f.pod, 8080), (f.client, 40_000), tcp::SYN | tcp::ACK);
            expect_untouched(&world, Hook::PodIn, &reply);
            expect(
                &world,
                Hook::UplinkOut,
                &reply,
                Verdict::Pass,
                &reply.clone().from(f.node, 30_080),
                &f.counted_out(20),
            );
        }
    });
}

/// P4: with an endpoint on another node both ends are translated, in both directions, and the packet leaves at once with
/// its time to live lowered; P12: by a port of the range.
#[test]
fn a_node_port_with_a_remote_endpoint_translates_both_ends() {
    for_both(|f| {
        let world = World::new(&f.web("", &[f.remote_endpoint()])).unwrap();
        let sent = tcp_packet((f.client, 40_000), (f.node, 30_080), tcp::SYN);
        let outcome = world.send(Hook::UplinkIn, &sent).unwrap();
        let port = f.source_port(&outcome.packet);
        assert!((61_000..=61_007).contains(&port), "{port}");
        let out = sent.clone().from(f.node, port).to(f.remote, 8080).ttl(63);
        assert_eq!((outcome.verdict, outcome.packet), (Verdict::Redirect, out.bytes()));
        assert_eq!(outcome.moved, f.counted_in(20, true));
        expect_untouched(&world, Hook::UplinkOut, &out);
        let reply = tcp_packet((f.remote, 8080), (f.node, port), tcp::SYN | tcp::ACK);
        let restored = reply.clone().from(f.node, 30_080).to(f.client, 40_000).ttl(63);
        expect(&world, Hook::UplinkIn, &reply, Verdict::Redirect, &restored, &f.counted_out(20));
    });
}

/// P4 in XDP: the packet leaves with the neighbour's link-layer address, by the same walk.
#[test]
fn xdp_sends_a_packet_to_a_remote_endpoint_on_by_itself() {
    for_both(|f| {
        let world = World::new(&f.web("", &[f.remote_endpoint()])).unwrap();
        let sent = udp_packet((f.client, 40_000), (f.node, 30_080), b"question");
        let outcome = world.send(Hook::Xdp, &sent).unwrap();
        let port = f.source_port(&outcome.packet);
        let uplink: [u8; 6] = outcome.packet[6..12].try_into().unwrap();
        assert_ne!(uplink, LINK_FROM, "the uplink's own address");
        let out = sent.clone().from(f.node, port).to(f.remote, 8080).ttl(63).link(GATEWAY_MAC, uplink);
        assert_eq!((outcome.verdict, outcome.packet), (Verdict::Tx, out.bytes()));
        assert_eq!(outcome.moved, f.counted_in(16, true));
    });
}

/// The mark of what netfilter masquerades.
const MARK: u32 = 1 << 14;

/// P4, P10: what comes from outside to an endpoint of this node is marked for netfilter, packet by packet, and left to the stack; what
/// comes back has met netfilter, and is restored as ever.
#[test]
fn clients_from_outside_are_marked_for_netfilter_where_the_endpoint_is_here() {
    for_both(|f| {
        for (called, port) in [(f.node, 30_080), (f.cluster_ip, 80)] {
            let mut world = World::new(&f.web("", &[f.local_endpoint()])).unwrap();
            world.set_masquerade_mark(MARK).unwrap();
            for (flags, new) in [(tcp::SYN, true), (tcp::ACK, false)] {
                let sent = tcp_packet((f.client, 40_000), (called, port), flags);
                let out = sent.clone().to(f.pod, 8080);
                let left = dataplane_tests::packet::reason(Reason::XdpLeftToTc);
                expect(&world, Hook::Xdp, &sent, Verdict::Pass, &sent, &left);
                let counted = f.counted_in(20, new);
                crate::expect_marked(&world, Hook::UplinkIn, &sent, Verdict::Pass, (&out, MARK), &counted);
                let reply = tcp_packet((f.pod, 8080), (f.client, 40_000), tcp::SYN | tcp::ACK);
                let restored = reply.clone().from(called, port);
                expect(&world, Hook::UplinkOut, &reply, Verdict::Pass, &restored, &f.counted_out(20));
            }
            let sent = udp_packet((f.client, 40_000), (called, port), b"question");
            let out = sent.clone().to(f.pod, 8080);
            let counted = f.counted_in(16, true);
            crate::expect_marked(&world, Hook::UplinkIn, &sent, Verdict::Pass, (&out, MARK), &counted);
        }
    });
}

/// P4, P5, P7: nobody else is marked.
#[test]
fn only_clients_from_outside_are_marked_for_netfilter_and_not_with_a_local_policy() {
    for_both(|f| {
        let mut world = World::new(&f.web("", &[f.local_endpoint()])).unwrap();
        world.set_masquerade_mark(MARK).unwrap();
        for (from, to) in [(40_000, (f.node, 30_080)), (40_002, (f.cluster_ip, 80))] {
            let sent = tcp_packet((f.other_pod, from), to, tcp::SYN);
            let out = sent.clone().to(f.pod, 8080);
            expect(&world, Hook::PodIn, &sent, Verdict::Pass, &out, &f.counted_in(20, true));
        }
        world.apply(&f.web("externalTrafficPolicy: Local", &[f.local_endpoint()])).unwrap();
        let sent = tcp_packet((f.client, 40_001), (f.node, 30_080), tcp::SYN);
        let out = sent.clone().to(f.pod, 8080);
        expect(&world, Hook::UplinkIn, &sent, Verdict::Pass, &out, &f.counted_in(20, true));
    });
}

/// P9: with the flag, what pods send to a ClusterIP is marked wherever the endpoint is, and goes through the stack.
#[test]
fn with_the_flag_pods_are_marked_for_netfilter_at_cluster_ips() {
    for_both(|f| {
        for endpoint in [f.local_endpoint(), f.remote_endpoint()] {
            let to = endpoint.0;
            let mut world = World::with(&f.web("", &[endpoint]), Node::MASQUERADE_ALL, &[]).unwrap();
            world.set_masquerade_mark(MARK).unwrap();
            let sent = tcp_packet((f.other_pod, 40_000), (f.cluster_ip, 80), tcp::SYN);
            let (out, counted) = (sent.clone().to(to, 8080), f.counted_in(20, true));
            crate::expect_marked(&world, Hook::PodIn, &sent, Verdict::Pass, (&out, MARK), &counted);
        }
    });
}

/// P4: rules of routing find the way of answers by what netfilter notes of the connection.
#[test]
fn what_comes_from_outside_has_the_mark_of_its_connection() {
    const CONNECTION: u32 = 1 << 7;
    for_both(|f| {
        for (mark, policy) in [(MARK, ""), (0, "externalTrafficPolicy: Local")] {
            let mut world = World::new(&f.web(policy, &[f.local_endpoint()])).unwrap();
            world.set_masquerade_mark(MARK).unwrap();
            world.set_connection_mark(CONNECTION).unwrap();
            let sent = tcp_packet((f.client, 40_000), (f.node, 30_080), tcp::SYN);
            let left = dataplane_tests::packet::reason(Reason::XdpLeftToTc);
            expect(&world, Hook::Xdp, &sent, Verdict::Pass, &sent, &left);
            let (out, counted) = ((&sent.clone().to(f.pod, 8080), mark | CONNECTION), f.counted_in(20, true));
            crate::expect_marked(&world, Hook::UplinkIn, &sent, Verdict::Pass, out, &counted);
            let reply = tcp_packet((f.pod, 8080), (f.client, 40_000), tcp::SYN | tcp::ACK);
            let restored = reply.clone().from(f.node, 30_080);
            expect(&world, Hook::UplinkOut, &reply, Verdict::Pass, &restored, &f.counted_out(20));
        }
    });
}

/// P4: a bridge has handed the packet to netfilter by its old addresses, so it comes in anew, and is then nobody's.
#[test]
fn behind_a_bridge_that_asks_netfilter_first_a_translated_packet_comes_in_anew() {
    for_both(|f| {
        let mut world = World::with(&f.web("", &[f.local_endpoint()]), Node::BRIDGE_NETFILTER, &[]).unwrap();
        world.set_masquerade_mark(MARK).unwrap();
        for new in [true, false] {
            let sent =
                tcp_packet((f.client, 40_000), (f.node, 30_080), if new { tcp::SYN } else { tcp::ACK });
            let (out, counted) = (sent.clone().to(f.pod, 8080), f.counted_in(20, new));
            crate::expect_marked(&world, Hook::UplinkIn, &sent, Verdict::Redirect, (&out, MARK), &counted);
            expect_untouched(&world, Hook::UplinkIn, &out);
        }
    });
}

/// P10: a ClusterIP called from outside is served, with an address of the node as its source.
#[test]
fn a_cluster_ip_from_outside_is_served_with_a_translated_source() {
    for_both(|f| {
        let world = World::new(&f.web("", &[f.local_endpoint()])).unwrap();
        let sent = tcp_packet((f.client, 40_000), (f.cluster_ip, 80), tcp::SYN);
        let outcome = world.send(Hook::UplinkIn, &sent).unwrap();
        let port = f.source_port(&outcome.packet);
        let out = sent.clone().from(f.node, port).to(f.pod, 8080).ttl(63);
        assert_eq!((outcome.verdict, outcome.packet), (Verdict::Redirect, out.bytes()));
        let reply = tcp_packet((f.pod, 8080), (f.node, port), tcp::SYN | tcp::ACK);
        let restored = reply.clone().from(f.cluster_ip, 80).to(f.client, 40_000).ttl(63);
        expect(&world, Hook::PodIn, &reply, Verdict::Redirect, &restored, &f.counted_out(20));
    });
}

/// P11: a pod that reaches itself sees an address of the node.
#[test]
fn a_pod_that_reaches_itself_sees_the_node() {
    for_both(|f| {
        let world = World::new(&f.web("", &[f.local_endpoint()])).unwrap();
        let sent = tcp_packet((f.pod, 40_000), (f.cluster_ip, 80), tcp::SYN);
        let outcome = world.send(Hook::PodIn, &sent).unwrap();
        let port = f.source_port(&outcome.packet);
        let out = sent.clone().from(f.node, port).to(f.pod, 8080).ttl(63);
        assert_eq!((outcome.verdict, outcome.packet), (Verdict::Redirect, out.bytes()));
        let reply = tcp_packet((f.pod, 8080), (f.node, port), tcp::SYN | tcp::ACK);
        let restored = reply.clone().from(f.cluster_ip, 80).to(f.pod, 40_000).ttl(63);
        expect(&world, Hook::PodIn, &reply, Verdict::Redirect, &restored, &f.counted_out(20));
    });
}

/// P9: the node itself, by packet: translated where its packet leaves, restored where the reply comes in.
#[test]
fn the_node_reaches_a_cluster_ip_by_packet() {
    for_both(|f| {
        let world = World::new(&f.web("", &[f.remote_endpoint()])).unwrap();
        let sent = udp_packet((f.node, 40_000), (f.cluster_ip, 80), b"question");
        let out = sent.clone().to(f.remote, 8080);
        expect(&world, Hook::UplinkOut, &sent, Verdict::Redirect, &out, &f.counted_in(16, true));
        let reply = udp_packet((f.remote, 8080), (f.node, 40_000), b"answer");
        let restored = reply.clone().from(f.cluster_ip, 80);
        expect(&world, Hook::UplinkIn, &reply, Verdict::Pass, &restored, &f.counted_out(14));
    });
}

/// P6, P9: a reply from a pod of this node is handed up as if it had come in on the uplink.
#[test]
fn a_local_pods_reply_to_the_node_is_handed_up_on_the_uplink() {
    for_both(|f| {
        let world = World::new(&f.web("", &[f.local_endpoint()])).unwrap();
        let sent = udp_packet((f.node, 40_000), (f.cluster_ip, 80), b"question");
        let out = sent.clone().to(f.pod, 8080);
        expect(&world, Hook::UplinkOut, &sent, Verdict::Redirect, &out, &f.counted_in(16, true));
        let reply = udp_packet((f.pod, 8080), (f.node, 40_000), b"answer");
        // The link-layer destination becomes the uplink's, which the node's own packet carried as its source.
        let restored = reply.clone().from(f.cluster_ip, 80).link(LINK_FROM, LINK_FROM);
        expect(&world, Hook::PodIn, &reply, Verdict::Redirect, &restored, &f.counted_out(14));
    });
}

/// P12: nine of ten ports of the range are had without a failure and without a collision. Beyond, failures are counted, and
/// ports that are free again are found.
#[test]
fn nine_of_ten_ports_are_had_without_a_failure() {
    for_both(|f| {
        let mut world = World::new(&f.web("", &[f.remote_endpoint()])).unwrap();
        world.set_snat_ports(61_000..=65_535).unwrap();
        let syn = |number: u16| tcp_packet((f.client, 20_000 + number), (f.node, 30_080), tcp::SYN);
        // Without a look at all counters, which takes longer than one that stays half-open keeps its port.
        let send = |world: &World, number| {
            let (verdict, sent, _) = world.send_uncounted(Hook::UplinkIn, &syn(number).bytes()).unwrap();
            (verdict, sent)
        };
        let mut owners = std::collections::BTreeMap::new();
        for number in 0..4_536 * 9 / 10 {
            let (verdict, sent) = send(&world, number);
            assert_eq!(verdict, Verdict::Redirect, "flow {number}");
            // One that stays half-open gives its port away.
            if number % 20 == 0 {
                world.establish_flows().unwrap();
            }
            assert_eq!(owners.insert(f.source_port(&sent), number), None, "taken twice");
        }
        let served =
            |world: &World| world.traffic().unwrap().map(|total| (total.packets_in, total.new_flows));
        let before = served(&world);
        let mut failed = 0;
        for number in 5_000..5_600 {
            if number % 20 == 0 {
                world.establish_flows().unwrap();
            }
            let reasons = world.reasons().unwrap();
            let (verdict, sent) = send(&world, number);
            if verdict == Verdict::Drop {
                let after = world.reasons().unwrap();
                let moved = after.into_iter().zip(reasons).filter(|(after, before)| after != before);
                let moved: Vec<_> = moved.map(|((of, after), (_, before))| (of, after - before)).collect();
                assert_eq!(moved, [(Reason::PortsExhausted, 1)]);
                failed += 1;
            } else {
                assert_eq!(owners.insert(f.source_port(&sent), number), None, "taken twice");
            }
        }
        let more = before.map(|(packets, flows)| (packets + 600 - failed, flows + 600 - failed));
        assert_eq!(served(&world), more, "nothing is counted of those that are dropped");
        assert!((600 - 454..600).contains(&failed), "{failed}");
        world.establish_flows().unwrap();
        // Connections that are reset give their ports back.
        for port in owners.keys().take(500) {
            let refusal = tcp_packet((f.remote, 8080), (f.node, *port), tcp::RST | tcp::ACK);
            assert_eq!(world.send(Hook::UplinkIn, &refusal).unwrap().verdict, Verdict::Redirect);
        }
        for number in 6_000..6_100 {
            assert_eq!(world.send(Hook::UplinkIn, &syn(number)).unwrap().verdict, Verdict::Redirect);
        }
    });
}

/// P12: no two flows to one endpoint share a port; when all are taken, the next is dropped and counted.
#[test]
fn translated_ports_never_collide_and_their_end_is_counted() {
    for_both(|f| {
        let world = World::new(&f.web("", &[f.remote_endpoint()])).unwrap();
        let mut ports = std::collections::BTreeSet::new();
        let mut refused = 0;
        for client in 40_000..40_020 {
            let outcome = world
                .send(Hook::UplinkIn, &tcp_packet((f.client, client), (f.node, 30_080), tcp::SYN))
                .unwrap();
            match outcome.verdict {
                Verdict::Redirect => assert!(ports.insert(f.source_port(&outcome.packet)), "taken twice"),
                Verdict::Drop => {
                    assert_eq!(outcome.moved, reason(Reason::PortsExhausted));
                    refused += 1;
                }
                Verdict::Pass | Verdict::Tx => panic!("{outcome:?}"),
            }
        }
        assert_eq!((ports.len(), refused), (8, 12), "the range has eight ports");
    });
}

/// P12: a flow that is closing keeps its port only as long as others are free.
#[test]
fn the_port_of_a_closing_flow_is_used_again_when_no_other_is_free() {
    for_both(|f| {
        let world = World::new(&f.web("", &[f.remote_endpoint()])).unwrap();
        let begin = |client: u16| {
            let sent = tcp_packet((f.client, client), (f.node, 30_080), tcp::SYN);
            let outcome = world.send(Hook::UplinkIn, &sent).unwrap();
            (outcome.verdict, f.source_port(&outcome.packet))
        };
        let mut taken = std::collections::BTreeSet::new();
        for client in 40_000..40_008 {
            let (_, port) = begin(client);
            taken.insert(port);
            let answer =
                tcp_packet((f.remote, 8080), (f.node, port), tcp::SYN | tcp::ACK).numbers(5_000, 1_001);
            world.send(Hook::UplinkIn, &answer).unwrap();
            for flags in [tcp::ACK, tcp::RST] {
                let sent = tcp_packet((f.client, client), (f.node, 30_080), flags).numbers(1_001, 5_001);
                world.send(Hook::UplinkIn, &sent).unwrap();
            }
        }
        assert_eq!(world.flow_counts().unwrap(), [0, 0, 16]);
        let mut again = std::collections::BTreeSet::new();
        for client in 50_000..50_008 {
            let (verdict, port) = begin(client);
            assert_eq!(verdict, Verdict::Redirect);
            again.insert(port);
        }
        assert_eq!(taken, again, "each of the eight ports once");
        assert_eq!(begin(50_008).0, Verdict::Drop, "the port of a flow that begins is nobody else's");
    });
}

/// P19's other half: what a router must not forward is not forwarded; the time to live ends here.
#[test]
fn a_packet_whose_time_ends_here_is_answered() {
    for_both(|f| {
        let world = World::new(&f.web("", &[f.remote_endpoint()])).unwrap();
        let sent = udp_packet((f.client, 40_000), (f.node, 30_080), b"question").ttl(1);
        let answer = icmp_error(f.node, &sent, f.time_exceeded, 0);
        expect(&world, Hook::UplinkIn, &sent, Verdict::Redirect, &answer, &reason(Reason::TtlExceeded));
        assert_eq!(world.flow_counts().unwrap(), [0, 0, 0]);
    });
}

/// The way to the endpoint takes 1,300 bytes: the client is told (RFC 1191, RFC 4443).
#[test]
fn a_packet_too_long_for_the_way_is_answered_with_its_mtu() {
    for_both(|f| {
        let far = (f.narrow, "there", "ready: true");
        let world = World::new(&f.web("", &[far])).unwrap();
        let sent = udp_packet((f.client, 40_000), (f.node, 30_080), &[7; 1_400]);
        let answer = icmp_error(f.node, &sent, f.too_big, NARROW);
        expect(&world, Hook::UplinkIn, &sent, Verdict::Redirect, &answer, &reason(Reason::TooBig));
    });
}

/// P19: the node is told in the name of whom it called: an error from itself would be a martian.
#[test]
fn a_packet_of_the_node_too_long_for_the_way_is_answered_with_its_mtu() {
    for_both(|f| {
        let far = (f.narrow, "there", "ready: true");
        let world = World::new(&f.web("", &[far])).unwrap();
        let sent = udp_packet((f.node, 40_000), (f.cluster_ip, 80), &[7; 1_400]);
        let answer = icmp_error(f.cluster_ip, &sent, f.too_big, NARROW);
        expect(&world, Hook::UplinkOut, &sent, Verdict::Redirect, &answer, &reason(Reason::TooBig));
    });
}

/// What will be cut into segments, or was merged of them, is as long on the wire as one of them, with its own headers.
#[test]
fn a_train_of_segments_that_fit_the_way_is_not_too_long() {
    for_both(|f| {
        let far = (f.narrow, "there", "ready: true");
        let world = World::new(&f.web("", &[far])).unwrap();
        let room = NARROW - f.header as u32;
        let mut tcp = tcp_packet((f.client, 40_000), (f.node, 30_080), tcp::SYN);
        if let Transport::Tcp { data, .. } = &mut tcp.transport {
            *data = vec![7; 2_400];
        }
        let udp = udp_packet((f.client, 40_000), (f.node, 30_080), &[7; 2_400]);
        for (train, header) in [(&tcp, 20), (&udp, 8)] {
            let sent = world.send_train(Hook::UplinkIn, train, room - header).unwrap();
            assert!(sent.moved.contains_key("service in"), "{:?}", sent.moved);
            let long = world.send_train(Hook::UplinkIn, train, room - header + 1).unwrap();
            assert_eq!(long.moved, reason(Reason::TooBig));
        }
    });
}

/// P23: an endpoint to which the routing table knows no way: by a route that says so, or because there is none.
#[test]
fn an_endpoint_without_a_route_is_told_to_the_client() {
    for_both(|f| {
        for (endpoint, default_route) in [(f.lost, true), (f.elsewhere, false)] {
            let world = World::new(&f.web("", &[(endpoint, "there", "ready: true")])).unwrap();
            if !default_route {
                let family = if f.header == 20 { "-4" } else { "-6" };
                let deleted =
                    std::process::Command::new("ip").args([family, "route", "del", "default"]).status();
                assert!(deleted.unwrap().success());
            }
            let calls =
                [(Hook::UplinkIn, f.client, f.node, 30_080), (Hook::UplinkOut, f.node, f.cluster_ip, 80)];
            for (hook, from, to, port) in calls {
                for sent in
                    [tcp_packet((from, 1), (to, port), tcp::SYN), udp_packet((from, 1), (to, port), b"?")]
                {
                    // To the node itself its own address would be a martian.
                    let teller = if from == f.node { to } else { f.node };
                    let answer = icmp_error(teller, &sent, f.no_route, 0);
                    expect(&world, hook, &sent, Verdict::Redirect, &answer, &reason(Reason::Unreachable));
                }
            }
            let sent = tcp_packet((f.client, 1), (f.node, 30_080), tcp::SYN);
            expect(&world, Hook::Xdp, &sent, Verdict::Pass, &sent, &reason(Reason::XdpLeftToTc));
            assert_eq!(world.flow_counts().unwrap(), [0, 0, 0]);
        }
    });
}

/// P12: a flow that changes only its destination may not share its reply with another. The second gets another source port, keeps
/// its client's address (P9) and goes through the stack, as the first did. Its reply is restored where that one's is.
#[test]
fn two_flows_with_one_reply_are_kept_apart_by_their_port() {
    for_both(|f| {
        let world = World::new(&f.load_balancer("", &[f.remote_endpoint()])).unwrap();
        let ack = tcp::SYN | tcp::ACK;
        let udp = |from, to, _| udp_packet(from, to, b"datagram");
        for (packet, payload) in [(tcp_packet as fn(_, _, _) -> _, 20), (udp, 16)] {
            let first = packet((f.pod, 40_000), (f.cluster_ip, 80), tcp::SYN);
            let out = first.clone().to(f.remote, 8080);
            expect(&world, Hook::PodIn, &first, Verdict::Pass, &out, &f.counted_in(payload, true));
            let mut ports = std::collections::BTreeSet::from([40_000]);
            for called in [(f.node, 30_080), (f.lb_ip, 80)] {
                let sent = packet((f.pod, 40_000), called, tcp::SYN);
                let outcome = world.send(Hook::PodIn, &sent).unwrap();
                let port = f.source_port(&outcome.packet);
                assert!((61_000..=61_007).contains(&port) && ports.insert(port), "{port}");
                let out = sent.clone().from(f.pod, port).to(f.remote, 8080);
                assert_eq!((outcome.verdict, outcome.packet), (Verdict::Pass, out.bytes()));
                let mut moved = f.counted_in(payload, true);
                moved.extend(reason(Reason::ReplyCollision));
                assert_eq!(outcome.moved, moved);
                expect_untouched(&world, Hook::UplinkOut, &out);
                // What follows goes the same way.
                expect(&world, Hook::PodIn, &sent, Verdict::Pass, &out, &f.counted_in(payload, false));
                let reply = packet((f.remote, 8080), (f.pod, port), ack);
                expect_untouched(&world, Hook::UplinkIn, &reply);
                let restored = reply.clone().from(called.0, called.1).to(f.pod, 40_000);
                expect(&world, Hook::PodOut, &reply, Verdict::Pass, &restored, &f.counted_out(payload));
            }
            let reply = packet((f.remote, 8080), (f.pod, 40_000), ack);
            let restored = reply.clone().from(f.cluster_ip, 80);
            expect(&world, Hook::PodOut, &reply, Verdict::Pass, &restored, &f.counted_out(payload));
        }
    });
}

/// P7, P12: the same of a client outside that calls a local endpoint through two addresses; in XDP as well.
#[test]
fn two_flows_from_outside_with_one_reply_keep_their_source() {
    for_both(|f| {
        for hook in [Hook::UplinkIn, Hook::Xdp] {
            let spec = "externalTrafficPolicy: Local";
            let world = World::new(&f.load_balancer(spec, &[f.local_endpoint()])).unwrap();
            let to = |called| udp_packet((f.client, 40_000), called, b"question");
            let first = to((f.lb_ip, 80));
            let out = first.clone().to(f.pod, 8080);
            expect(&world, hook, &first, Verdict::Pass, &out, &f.counted_in(16, true));
            let second = to((f.node, 30_080));
            let outcome = world.send(hook, &second).unwrap();
            let port = f.source_port(&outcome.packet);
            let out = second.clone().from(f.client, port).to(f.pod, 8080);
            assert_eq!((outcome.verdict, outcome.packet), (Verdict::Pass, out.bytes()));
            let reply = udp_packet((f.pod, 8080), (f.client, port), b"answer");
            expect_untouched(&world, Hook::PodIn, &reply);
            let restored = reply.clone().from(f.node, 30_080).to(f.client, 40_000);
            expect(&world, Hook::UplinkOut, &reply, Verdict::Pass, &restored, &f.counted_out(14));
        }
    });
}

/// P12: when all ports are taken, a further flow of the client with the same reply is dropped and counted; its address is not
/// translated instead.
#[test]
fn a_flow_with_the_same_reply_and_no_port_left_is_dropped() {
    for_both(|f| {
        let mut world = World::new(&f.load_balancer("", &[f.remote_endpoint()])).unwrap();
        world.set_snat_ports(61_000..=61_000).unwrap();
        let to = |called| udp_packet((f.pod, 40_000), called, b"question");
        for called in [(f.cluster_ip, 80), (f.node, 30_080)] {
            assert_eq!(world.send(Hook::PodIn, &to(called)).unwrap().verdict, Verdict::Pass);
        }
        let outcome = world.send(Hook::PodIn, &to((f.lb_ip, 80))).unwrap();
        assert_eq!(outcome.verdict, Verdict::Drop);
        let mut moved = reason(Reason::ReplyCollision);
        moved.extend(reason(Reason::PortsExhausted));
        assert_eq!(outcome.moved, moved);
    });
}

/// P12, C5: a port whose replies would be those of a connection that netfilter translates is not given to a flow.
#[test]
fn a_port_of_somebody_elses_connection_to_the_endpoint_is_left_alone() {
    for_both(|f| {
        let mut world = World::new(&f.web("", &[f.remote_endpoint()])).unwrap();
        let opens = |port| tcp_packet((f.client, port), (f.node, 30_080), tcp::SYN);
        world.set_snat_ports(61_000..=61_001).unwrap();
        let [endpoint, node]: [IpAddr; 2] = [f.remote, f.node].map(|address| address.parse().unwrap());
        world.note_answers((endpoint, 8080).into(), (node, 61_000).into()).unwrap();
        let outcome = world.send(Hook::UplinkIn, &opens(40_000)).unwrap();
        assert_eq!((outcome.verdict, f.source_port(&outcome.packet)), (Verdict::Redirect, 61_001));
        world.set_snat_ports(61_000..=61_000).unwrap();
        let outcome = world.send(Hook::UplinkIn, &opens(40_001)).unwrap();
        assert_eq!((outcome.verdict, outcome.moved), (Verdict::Drop, reason(Reason::PortsExhausted)));
    });
}

/// P12: the same port where the connection left meanwhile, by the node itself or masqueraded.
#[test]
fn a_port_by_which_somebody_else_calls_the_endpoint_is_left_alone() {
    for_both(|f| {
        let mut world = World::new(&f.web("", &[f.remote_endpoint()])).unwrap();
        world.set_snat_ports(61_000..=61_001).unwrap();
        let others = |port| tcp_packet((f.node, port), (f.remote, 8080), tcp::SYN);
        expect_untouched(&world, Hook::UplinkOut, &others(61_000));
        let opens = |port| tcp_packet((f.client, port), (f.node, 30_080), tcp::SYN);
        let outcome = world.send(Hook::UplinkIn, &opens(40_000)).unwrap();
        assert_eq!((outcome.verdict, f.source_port(&outcome.packet)), (Verdict::Redirect, 61_001));
        // What a flow itself sends on is nobody else's.
        expect_untouched(&world, Hook::UplinkOut, &others(61_001));
        let outcome = world.send(Hook::UplinkIn, &opens(40_000)).unwrap();
        assert_eq!((outcome.verdict, f.source_port(&outcome.packet)), (Verdict::Redirect, 61_001));
        // To no endpoint it is no matter.
        assert_eq!(world.outgoing().unwrap(), 1);
        expect_untouched(&world, Hook::UplinkOut, &tcp_packet((f.node, 61_000), (f.client, 8080), tcp::SYN));
        assert_eq!(world.outgoing().unwrap(), 1);
    });
}

/// C4, P12: the same for the node's own flows: the second reply, too, comes back to it.
#[test]
fn two_flows_of_the_node_with_one_reply_are_kept_apart() {
    for_both(|f| {
        let world = World::new(&f.load_balancer("", &[f.remote_endpoint()])).unwrap();
        let to = |address| udp_packet((f.node, 40_000), (address, 80), b"question");
        world.send(Hook::UplinkOut, &to(f.cluster_ip)).unwrap();
        let outcome = world.send(Hook::UplinkOut, &to(f.lb_ip)).unwrap();
        let port = f.source_port(&outcome.packet);
        let out = to(f.lb_ip).from(f.node, port).to(f.remote, 8080);
        assert_eq!((outcome.verdict, outcome.packet), (Verdict::Redirect, out.bytes()));
        let reply = udp_packet((f.remote, 8080), (f.node, port), b"answer");
        let restored = reply.clone().from(f.lb_ip, 80).to(f.node, 40_000);
        expect(&world, Hook::UplinkIn, &reply, Verdict::Pass, &restored, &f.counted_out(14));
    });
}

/// P4: what XDP leaves to tc does not weigh on the choice: the same endpoint is chosen there.
#[test]
fn xdp_and_tc_together_choose_evenly() {
    for_both(|f| {
        let endpoints = [(f.other_pod, "here", "ready: true"), (f.pod, "there", "ready: true")];
        let world = World::with_ports(&f.web("", &endpoints), 0, &[], 50_000..=59_999).unwrap();
        let to_stack = (0..400).filter(|number| {
            let sent = udp_packet((f.client, 40_000 + number), (f.node, 30_080), b"question");
            let outcome = world.send(Hook::Xdp, &sent).unwrap();
            let left = outcome.packet == sent.bytes();
            // Hardly ever: the choice is another one each second.
            !left || world.send(Hook::UplinkIn, &sent).unwrap().verdict == Verdict::Pass
        });
        // Ten are a standard deviation.
        let to_stack = to_stack.count();
        assert!((150..=250).contains(&to_stack), "{to_stack} of 400");
    });
}

/// P4: a client that knows its own port does not know to which endpoint that leads: a secret is part of the choice.
#[test]
fn nobody_foresees_the_endpoint_from_its_own_port() {
    for_both(|f| {
        let endpoints = [(f.other_pod, "here", "ready: true"), (f.remote, "there", "ready: true")];
        let mut world = World::new(&f.web("", &endpoints)).unwrap();
        let mut choices = |secret| {
            world.set_secret(secret).unwrap();
            world.forget_flows().unwrap();
            let choice = |port| {
                let sent = tcp_packet((f.pod, port), (f.cluster_ip, 80), tcp::SYN).bytes();
                f.destination(&world.send_uncounted(Hook::PodIn, &sent).unwrap().1)
            };
            (40_000..40_032).map(choice).collect::<Vec<_>>()
        };
        // The choice is another one each second as well: what is told is of one.
        let told = (0..100).find_map(|_| {
            let [first, other, again] = [1, 2, 1].map(&mut choices);
            (first == again).then(|| first == other)
        });
        assert_eq!(told, Some(false));
    });
}

/// Both directions of a flow find each other by their own tuples.
#[test]
fn a_new_flow_has_both_directions() {
    for_both(|f| {
        let world = World::new(&f.web("", &[f.remote_endpoint()])).unwrap();
        world.send(Hook::PodIn, &tcp_packet((f.pod, 40_000), (f.cluster_ip, 80), tcp::SYN)).unwrap();
        let [half_open, ..] = world.flows().unwrap();
        assert_eq!(half_open.len(), 2);
        for (key, flow) in &half_open {
            let partner = flow.partner(key.proto());
            assert!(half_open.iter().any(|(other, _)| *other == partner));
        }
        let client = (Addr::from(f.pod.parse::<std::net::IpAddr>().unwrap()), Port::new(40_000));
        assert!(half_open.iter().any(|(key, _)| (key.src, key.src_port) == client));
    });
}

/// P11: the node as a client of a server in its own network, by packet: both see the Service's address, and both packets are
/// handed up on the uplink.
#[test]
fn the_node_reaches_its_own_server_by_packet() {
    for_both(|f| {
        let world = World::new(&f.web("", &[(f.node, "here", "ready: true")])).unwrap();
        let sent = udp_packet((f.node, 40_000), (f.cluster_ip, 80), b"question");
        let outcome = world.send(Hook::UplinkOut, &sent).unwrap();
        let port = f.source_port(&outcome.packet);
        let out = sent.clone().from(f.cluster_ip, port).to(f.node, 8080).link(LINK_FROM, LINK_FROM);
        assert_eq!((outcome.verdict, outcome.moved), (Verdict::Redirect, f.counted_in(16, true)));
        assert_eq!(crate::hex(&outcome.packet), crate::hex(&out.bytes()));
        expect_untouched(&world, Hook::UplinkIn, &out);
        let reply = udp_packet((f.node, 8080), (f.cluster_ip, port), b"answer");
        let restored = reply.clone().from(f.cluster_ip, 80).to(f.node, 40_000).link(LINK_FROM, LINK_FROM);
        expect(&world, Hook::UplinkOut, &reply, Verdict::Redirect, &restored, &f.counted_out(14));
    });
}

/// P4: an endpoint at an address of this node keeps the client's address, whatever its slice says of its node, and whatever
/// netfilter does: the node's own address would be a martian there.
#[test]
fn a_server_in_the_nodes_own_network_sees_the_client() {
    for_both(|f| {
        for (mark, node) in [(0, "there"), (MARK, "here")] {
            for hook in [Hook::UplinkIn, Hook::Xdp] {
                let mut world = World::new(&f.web("", &[(f.node, node, "ready: true")])).unwrap();
                world.set_masquerade_mark(mark).unwrap();
                let sent = tcp_packet((f.client, 40_000), (f.node, 30_080), tcp::SYN);
                let out = sent.clone().to(f.node, 8080);
                expect(&world, hook, &sent, Verdict::Pass, &out, &f.counted_in(20, true));
                let reply = tcp_packet((f.node, 8080), (f.client, 40_000), tcp::SYN | tcp::ACK);
                let restored = reply.clone().from(f.node, 30_080);
                expect(&world, Hook::UplinkOut, &reply, Verdict::Pass, &restored, &f.counted_out(20));
            }
        }
    });
}
