//! What a translated packet looks like, in both directions.

use crate::objects::{CLUSTER_IP, LOCAL, REMOTE, web};
use crate::{expect, expect_drop, expect_untouched};
use dataplane_common::drop::Reason;
use dataplane_common::node::Node;
use dataplane_common::{Addr, Port};
use dataplane_tests::packet::build::{LINK_FROM, Packet, Transport, icmp_error, tcp, tcp_packet, udp_packet};
use dataplane_tests::packet::{
    CLIENT, GATEWAY_MAC, Hook, NODE, POD, Verdict, World, counted_in, counted_out, in_namespace, reason,
};

/// The translated source port that a packet out has.
fn source_port(bytes: &[u8]) -> u16 {
    u16::from_be_bytes([bytes[34], bytes[35]])
}

/// P9: there and back, TCP: translated where the pod's packet comes in, restored where the reply goes to the pod.
#[test]
fn a_cluster_ip_is_translated_from_a_pod_and_restored_to_it() {
    in_namespace(|| {
        let world = World::new(&web("", &[REMOTE])).unwrap();
        let sent = tcp_packet((POD, 40_000), (CLUSTER_IP, 80), tcp::SYN);
        let out = sent.clone().to("10.244.2.9", 8080);
        expect(&world, Hook::PodIn, &sent, Verdict::Pass, &out, &counted_in(40, true));
        expect_untouched(&world, Hook::UplinkOut, &out);
        let reply = tcp_packet(("10.244.2.9", 8080), (POD, 40_000), tcp::SYN | tcp::ACK);
        expect_untouched(&world, Hook::UplinkIn, &reply);
        let restored = reply.clone().from(CLUSTER_IP, 80);
        expect(&world, Hook::PodOut, &reply, Verdict::Pass, &restored, &counted_out(40));
    });
}

/// P9: the same over UDP; a checksum of zero stays zero (RFC 768).
#[test]
fn a_datagram_without_a_checksum_stays_without() {
    in_namespace(|| {
        let world = World::new(&web("", &[REMOTE])).unwrap();
        for checksum in [true, false] {
            let port = 40_000 + u16::from(checksum);
            let mut sent = udp_packet((POD, port), (CLUSTER_IP, 80), b"odd");
            sent.transport = Transport::Udp { data: b"odd".to_vec(), checksum };
            let out = sent.clone().to("10.244.2.9", 8080);
            expect(&world, Hook::PodIn, &sent, Verdict::Pass, &out, &counted_in(31, true));
        }
    });
}

/// P4: a node port with an endpoint on this node keeps the client's address; the reply is restored where it leaves. The
/// same in XDP.
#[test]
fn a_node_port_with_a_local_endpoint_keeps_the_source() {
    in_namespace(|| {
        for hook in [Hook::UplinkIn, Hook::Xdp] {
            let world = World::new(&web("", &[LOCAL])).unwrap();
            let sent = tcp_packet((CLIENT, 40_000), (NODE, 30_080), tcp::SYN);
            let out = sent.clone().to(POD, 8080);
            expect(&world, hook, &sent, Verdict::Pass, &out, &counted_in(40, true));
            let reply = tcp_packet((POD, 8080), (CLIENT, 40_000), tcp::SYN | tcp::ACK);
            expect_untouched(&world, Hook::PodIn, &reply);
            expect(
                &world,
                Hook::UplinkOut,
                &reply,
                Verdict::Pass,
                &reply.clone().from(NODE, 30_080),
                &counted_out(40),
            );
        }
    });
}

/// P4: with an endpoint on another node both ends are translated, in both directions, and the packet leaves at once with
/// its time to live lowered; P12: by a port of the range.
#[test]
fn a_node_port_with_a_remote_endpoint_translates_both_ends() {
    in_namespace(|| {
        let world = World::new(&web("", &[REMOTE])).unwrap();
        let sent = tcp_packet((CLIENT, 40_000), (NODE, 30_080), tcp::SYN);
        let outcome = world.send(Hook::UplinkIn, &sent).unwrap();
        let port = source_port(&outcome.packet);
        assert!((61_000..=61_007).contains(&port), "{port}");
        let out = sent.clone().from(NODE, port).to("10.244.2.9", 8080).ttl(63);
        assert_eq!((outcome.verdict, outcome.packet), (Verdict::Redirect, out.bytes()));
        assert_eq!(outcome.moved, counted_in(40, true));
        expect_untouched(&world, Hook::UplinkOut, &out);
        let reply = tcp_packet(("10.244.2.9", 8080), (NODE, port), tcp::SYN | tcp::ACK);
        let restored = reply.clone().from(NODE, 30_080).to(CLIENT, 40_000).ttl(63);
        expect(&world, Hook::UplinkIn, &reply, Verdict::Redirect, &restored, &counted_out(40));
    });
}

/// P4 in XDP: the packet leaves with the neighbour's link-layer address, by the same walk.
#[test]
fn xdp_sends_a_packet_to_a_remote_endpoint_on_by_itself() {
    in_namespace(|| {
        let world = World::new(&web("", &[REMOTE])).unwrap();
        let sent = udp_packet((CLIENT, 40_000), (NODE, 30_080), b"question");
        let outcome = world.send(Hook::Xdp, &sent).unwrap();
        let port = source_port(&outcome.packet);
        let uplink: [u8; 6] = outcome.packet[6..12].try_into().unwrap();
        assert_ne!(uplink, LINK_FROM, "the uplink's own address");
        let out = sent.clone().from(NODE, port).to("10.244.2.9", 8080).ttl(63).link(GATEWAY_MAC, uplink);
        assert_eq!((outcome.verdict, outcome.packet), (Verdict::Redirect, out.bytes()));
        assert_eq!(outcome.moved, counted_in(36, true));
    });
}

/// P4: the flag that brings kube-proxy's way back.
#[test]
fn masquerade_all_translates_the_source_of_local_endpoints_too() {
    in_namespace(|| {
        let world = World::with(&web("", &[LOCAL]), Node::MASQUERADE_ALL, &[]).unwrap();
        let sent = tcp_packet((CLIENT, 40_000), (NODE, 30_080), tcp::SYN);
        let outcome = world.send(Hook::UplinkIn, &sent).unwrap();
        let out = sent.clone().from(NODE, source_port(&outcome.packet)).to(POD, 8080).ttl(63);
        assert_eq!((outcome.verdict, outcome.packet), (Verdict::Redirect, out.bytes()));
    });
}

/// P10: a ClusterIP called from outside is served, with an address of the node as its source.
#[test]
fn a_cluster_ip_from_outside_is_served_with_a_translated_source() {
    in_namespace(|| {
        let world = World::new(&web("", &[LOCAL])).unwrap();
        let sent = tcp_packet((CLIENT, 40_000), (CLUSTER_IP, 80), tcp::SYN);
        let outcome = world.send(Hook::UplinkIn, &sent).unwrap();
        let port = source_port(&outcome.packet);
        let out = sent.clone().from(NODE, port).to(POD, 8080).ttl(63);
        assert_eq!((outcome.verdict, outcome.packet), (Verdict::Redirect, out.bytes()));
        let reply = tcp_packet((POD, 8080), (NODE, port), tcp::SYN | tcp::ACK);
        let restored = reply.clone().from(CLUSTER_IP, 80).to(CLIENT, 40_000).ttl(63);
        expect(&world, Hook::PodIn, &reply, Verdict::Redirect, &restored, &counted_out(40));
    });
}

/// P11: a pod that reaches itself sees an address of the node.
#[test]
fn a_pod_that_reaches_itself_sees_the_node() {
    in_namespace(|| {
        let world = World::new(&web("", &[LOCAL])).unwrap();
        let sent = tcp_packet((POD, 40_000), (CLUSTER_IP, 80), tcp::SYN);
        let outcome = world.send(Hook::PodIn, &sent).unwrap();
        let port = source_port(&outcome.packet);
        let out = sent.clone().from(NODE, port).to(POD, 8080).ttl(63);
        assert_eq!((outcome.verdict, outcome.packet), (Verdict::Redirect, out.bytes()));
        let reply = tcp_packet((POD, 8080), (NODE, port), tcp::SYN | tcp::ACK);
        let restored = reply.clone().from(CLUSTER_IP, 80).to(POD, 40_000).ttl(63);
        expect(&world, Hook::PodIn, &reply, Verdict::Redirect, &restored, &counted_out(40));
    });
}

/// P9: the node itself, by packet: translated where its packet leaves, restored where the reply comes in.
#[test]
fn the_node_reaches_a_cluster_ip_by_packet() {
    in_namespace(|| {
        let world = World::new(&web("", &[REMOTE])).unwrap();
        let sent = udp_packet((NODE, 40_000), (CLUSTER_IP, 80), b"question");
        let out = sent.clone().to("10.244.2.9", 8080);
        expect(&world, Hook::UplinkOut, &sent, Verdict::Redirect, &out, &counted_in(36, true));
        let reply = udp_packet(("10.244.2.9", 8080), (NODE, 40_000), b"answer");
        let restored = reply.clone().from(CLUSTER_IP, 80);
        expect(&world, Hook::UplinkIn, &reply, Verdict::Pass, &restored, &counted_out(34));
    });
}

/// P6, P9: a reply from a pod of this node is handed up as if it had come in on the uplink.
#[test]
fn a_local_pods_reply_to_the_node_is_handed_up_on_the_uplink() {
    in_namespace(|| {
        let world = World::new(&web("", &[LOCAL])).unwrap();
        let sent = udp_packet((NODE, 40_000), (CLUSTER_IP, 80), b"question");
        let out = sent.clone().to(POD, 8080);
        expect(&world, Hook::UplinkOut, &sent, Verdict::Redirect, &out, &counted_in(36, true));
        let reply = udp_packet((POD, 8080), (NODE, 40_000), b"answer");
        // The link-layer destination becomes the uplink's, which the node's own packet carried as its source.
        let restored = reply.clone().from(CLUSTER_IP, 80).link(LINK_FROM, LINK_FROM);
        expect(&world, Hook::PodIn, &reply, Verdict::Redirect, &restored, &counted_out(34));
    });
}

/// P12: no two flows to one endpoint share a port; when all are taken, the next is dropped and counted.
#[test]
fn translated_ports_never_collide_and_their_end_is_counted() {
    in_namespace(|| {
        let world = World::new(&web("", &[REMOTE])).unwrap();
        let mut ports = std::collections::BTreeSet::new();
        let mut refused = 0;
        for client in 40_000..40_020 {
            let outcome =
                world.send(Hook::UplinkIn, &tcp_packet((CLIENT, client), (NODE, 30_080), tcp::SYN)).unwrap();
            match outcome.verdict {
                Verdict::Redirect => assert!(ports.insert(source_port(&outcome.packet)), "taken twice"),
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

/// P19's other half: what a router must not forward is not forwarded; the time to live ends here.
#[test]
fn a_packet_whose_time_ends_here_is_answered() {
    in_namespace(|| {
        let world = World::new(&web("", &[REMOTE])).unwrap();
        let sent = udp_packet((CLIENT, 40_000), (NODE, 30_080), b"question").ttl(1);
        let answer = icmp_error(NODE, &sent, 11, 0, 0);
        expect(&world, Hook::UplinkIn, &sent, Verdict::Redirect, &answer, &reason(Reason::TtlExceeded));
        assert_eq!(world.flow_counts().unwrap(), [0, 0, 0]);
    });
}

/// The way to the endpoint takes 1,000 bytes: the client is told (RFC 1191).
#[test]
fn a_packet_too_long_for_the_way_is_answered_with_its_mtu() {
    in_namespace(|| {
        let far = ("10.244.3.9", "there", "ready: true");
        let world = World::new(&web("", &[far])).unwrap();
        let sent = udp_packet((CLIENT, 40_000), (NODE, 30_080), &[7; 1_200]);
        let answer = icmp_error(NODE, &sent, 3, 4, 1_000);
        expect(&world, Hook::UplinkIn, &sent, Verdict::Redirect, &answer, &reason(Reason::TooBig));
    });
}

#[test]
fn an_endpoint_without_a_route_is_a_counted_drop() {
    in_namespace(|| {
        let lost = ("10.244.9.9", "there", "ready: true");
        let world = World::new(&web("", &[lost])).unwrap();
        expect_drop(
            &world,
            Hook::UplinkIn,
            &tcp_packet((CLIENT, 1), (NODE, 30_080), tcp::SYN),
            Reason::NoRoute,
        );
    });
}

/// A flow that changes only its destination may not share its reply with another: the second gets a translated source.
#[test]
fn two_flows_with_one_reply_are_kept_apart() {
    in_namespace(|| {
        let world = World::new(&web("", &[REMOTE])).unwrap();
        let through_cluster_ip = tcp_packet((POD, 40_000), (CLUSTER_IP, 80), tcp::SYN);
        let out = through_cluster_ip.clone().to("10.244.2.9", 8080);
        expect(&world, Hook::PodIn, &through_cluster_ip, Verdict::Pass, &out, &counted_in(40, true));
        let through_node_port = tcp_packet((POD, 40_000), (NODE, 30_080), tcp::SYN);
        let outcome = world.send(Hook::PodIn, &through_node_port).unwrap();
        assert_eq!(outcome.verdict, Verdict::Redirect);
        assert_eq!(outcome.moved.get(Reason::ReplyCollision.label()), Some(&1));
        let translated: Packet =
            through_node_port.clone().from(NODE, source_port(&outcome.packet)).to("10.244.2.9", 8080).ttl(63);
        assert_eq!(outcome.packet, translated.bytes());
    });
}

/// Both directions of a flow find each other by their own tuples.
#[test]
fn a_new_flow_has_both_directions() {
    in_namespace(|| {
        let world = World::new(&web("", &[REMOTE])).unwrap();
        world.send(Hook::PodIn, &tcp_packet((POD, 40_000), (CLUSTER_IP, 80), tcp::SYN)).unwrap();
        let [half_open, ..] = world.flows().unwrap();
        assert_eq!(half_open.len(), 2);
        for (key, flow) in &half_open {
            let partner = flow.partner(key.proto());
            assert!(half_open.iter().any(|(other, _)| *other == partner));
        }
        let client = (Addr::from("10.244.1.9".parse::<std::net::IpAddr>().unwrap()), Port::new(40_000));
        assert!(half_open.iter().any(|(key, _)| (key.src, key.src_port) == client));
    });
}

/// P11: the node as a client of a server in its own network, by packet: both see the Service's address, and both packets are
/// handed up on the uplink.
#[test]
fn the_node_reaches_its_own_server_by_packet() {
    in_namespace(|| {
        let world = World::new(&web("", &[(NODE, "here", "ready: true")])).unwrap();
        let sent = udp_packet((NODE, 40_000), (CLUSTER_IP, 80), b"question");
        let outcome = world.send(Hook::UplinkOut, &sent).unwrap();
        let port = source_port(&outcome.packet);
        let out = sent.clone().from(CLUSTER_IP, port).to(NODE, 8080).link(LINK_FROM, LINK_FROM);
        assert_eq!((outcome.verdict, outcome.moved), (Verdict::Redirect, counted_in(36, true)));
        assert_eq!(crate::hex(&outcome.packet), crate::hex(&out.bytes()));
        expect_untouched(&world, Hook::UplinkIn, &out);
        let reply = udp_packet((NODE, 8080), (CLUSTER_IP, port), b"answer");
        let restored = reply.clone().from(CLUSTER_IP, 80).to(NODE, 40_000).link(LINK_FROM, LINK_FROM);
        expect(&world, Hook::UplinkOut, &reply, Verdict::Redirect, &restored, &counted_out(34));
    });
}
