//! The life of flows: half-open, established, closing; and what becomes of them when their endpoint goes.

use crate::expect;
use crate::objects::{CLUSTER_IP, LOCAL, REMOTE, web};
use dataplane_common::drop::Reason;
use dataplane_tests::packet::build::{Packet, tcp, tcp_packet, udp_packet};
use dataplane_tests::packet::{
    CLIENT, Hook, POD, Verdict, World, counted_in, counted_out, in_namespace, reason,
};

const ENDPOINT: &str = "10.244.2.9";

fn syn() -> Packet {
    tcp_packet((POD, 40_000), (CLUSTER_IP, 80), tcp::SYN)
}

fn syn_ack() -> Packet {
    tcp_packet((ENDPOINT, 8080), (POD, 40_000), tcp::SYN | tcp::ACK).numbers(5_000, 1_001)
}

/// The client's segment that acknowledges `ack`.
fn ack(ack: u32) -> Packet {
    tcp_packet((POD, 40_000), (CLUSTER_IP, 80), tcp::ACK).numbers(1_001, ack)
}

fn establish(world: &World) {
    world.send(Hook::PodIn, &syn()).unwrap();
    world.send(Hook::PodOut, &syn_ack()).unwrap();
    world.send(Hook::PodIn, &ack(5_001)).unwrap();
    assert_eq!(world.flow_counts().unwrap(), [0, 2, 0]);
}

/// C4: only the client's proof that it saw the SYN-ACK makes a flow established.
#[test]
fn a_connection_is_established_by_the_clients_proof_alone() {
    in_namespace(|| {
        let world = World::new(&web("", &[REMOTE])).unwrap();
        world.send(Hook::PodIn, &syn()).unwrap();
        world.send(Hook::PodIn, &ack(5_001)).unwrap();
        assert_eq!(world.flow_counts().unwrap(), [2, 0, 0], "nothing was answered yet");
        world.send(Hook::PodOut, &syn_ack()).unwrap();
        world.send(Hook::PodIn, &ack(777_000_000)).unwrap();
        assert_eq!(world.flow_counts().unwrap(), [2, 0, 0], "a guessed number proves nothing");
        let out = ack(5_001).to(ENDPOINT, 8080);
        expect(&world, Hook::PodIn, &ack(5_001), Verdict::Pass, &out, &counted_in(40, false));
        assert_eq!(world.flow_counts().unwrap(), [0, 2, 0]);
    });
}

/// C4: a UDP flow is established by a further datagram after a reply.
#[test]
fn a_udp_flow_is_established_when_both_ends_have_spoken() {
    in_namespace(|| {
        let world = World::new(&web("", &[REMOTE])).unwrap();
        let question = udp_packet((POD, 40_000), (CLUSTER_IP, 80), b"q");
        world.send(Hook::PodIn, &question).unwrap();
        world.send(Hook::PodIn, &question).unwrap();
        assert_eq!(world.flow_counts().unwrap(), [2, 0, 0]);
        world.send(Hook::PodOut, &udp_packet((ENDPOINT, 8080), (POD, 40_000), b"a")).unwrap();
        world.send(Hook::PodIn, &question).unwrap();
        assert_eq!(world.flow_counts().unwrap(), [0, 2, 0]);
    });
}

/// C4: both directions close together, after the FINs of both ends; packets go on through the closing flow.
#[test]
fn a_connection_closes_when_both_ends_have_finished() {
    in_namespace(|| {
        let world = World::new(&web("", &[REMOTE])).unwrap();
        establish(&world);
        let fin = tcp_packet((POD, 40_000), (CLUSTER_IP, 80), tcp::FIN | tcp::ACK).numbers(1_001, 5_001);
        world.send(Hook::PodIn, &fin).unwrap();
        assert_eq!(world.flow_counts().unwrap(), [0, 2, 0], "half-closed is not closed");
        let fin = tcp_packet((ENDPOINT, 8080), (POD, 40_000), tcp::FIN | tcp::ACK).numbers(5_001, 1_002);
        expect(
            &world,
            Hook::PodOut,
            &fin,
            Verdict::Pass,
            &fin.clone().from(CLUSTER_IP, 80),
            &counted_out(40),
        );
        assert_eq!(world.flow_counts().unwrap(), [0, 0, 2]);
        let last = ack(5_002);
        expect(
            &world,
            Hook::PodIn,
            &last,
            Verdict::Pass,
            &last.clone().to(ENDPOINT, 8080),
            &counted_in(40, false),
        );
    });
}

/// C4: a RST of either end closes the flow at once.
#[test]
fn a_reset_closes_a_connection() {
    in_namespace(|| {
        let world = World::new(&web("", &[REMOTE])).unwrap();
        establish(&world);
        let rst = tcp_packet((ENDPOINT, 8080), (POD, 40_000), tcp::RST);
        expect(
            &world,
            Hook::PodOut,
            &rst,
            Verdict::Pass,
            &rst.clone().from(CLUSTER_IP, 80),
            &counted_out(40),
        );
        assert_eq!(world.flow_counts().unwrap(), [0, 0, 2]);
    });
}

/// A new connection on the ports of one that is closing is a new flow.
#[test]
fn a_port_that_is_used_again_begins_a_new_flow() {
    in_namespace(|| {
        let world = World::new(&web("", &[REMOTE])).unwrap();
        establish(&world);
        world.send(Hook::PodOut, &tcp_packet((ENDPOINT, 8080), (POD, 40_000), tcp::RST)).unwrap();
        let out = syn().to(ENDPOINT, 8080);
        expect(&world, Hook::PodIn, &syn(), Verdict::Pass, &out, &counted_in(40, true));
        assert_eq!(world.flow_counts().unwrap(), [2, 0, 0]);
    });
}

/// A connection that the endpoint refuses leaves nothing behind.
#[test]
fn a_refused_connection_leaves_no_flow() {
    in_namespace(|| {
        let world = World::new(&web("", &[REMOTE])).unwrap();
        world.send(Hook::PodIn, &syn()).unwrap();
        world.send(Hook::PodOut, &tcp_packet((ENDPOINT, 8080), (POD, 40_000), tcp::RST | tcp::ACK)).unwrap();
        assert_eq!(world.flow_counts().unwrap(), [0, 0, 0]);
    });
}

/// C4: a full table costs nobody a connection: the flow stays half-open, and it is counted.
#[test]
fn a_full_established_table_leaves_the_flow_half_open() {
    in_namespace(|| {
        let world = World::with(&web("", &[REMOTE]), 0, &[("established", 2)]).unwrap();
        establish(&world);
        let other = |packet: Packet| packet.from(POD, 40_001);
        world.send(Hook::PodIn, &other(syn())).unwrap();
        let reply = tcp_packet((ENDPOINT, 8080), (POD, 40_001), tcp::SYN | tcp::ACK).numbers(5_000, 1_001);
        world.send(Hook::PodOut, &reply).unwrap();
        let sent = other(ack(5_001));
        let mut moved = counted_in(40, false);
        moved.extend(reason(Reason::EstablishedFull));
        expect(&world, Hook::PodIn, &sent, Verdict::Pass, &sent.clone().to(ENDPOINT, 8080), &moved);
        assert_eq!(world.flow_counts().unwrap(), [2, 2, 0]);
    });
}

/// C2: an established connection goes on when its endpoint left; T5. A new connection does not go there.
#[test]
fn an_established_connection_stays_with_an_endpoint_that_left() {
    in_namespace(|| {
        let mut world = World::new(&web("", &[REMOTE])).unwrap();
        establish(&world);
        world.apply(&web("", &[LOCAL])).unwrap();
        let outcome = world.send(Hook::PodIn, &ack(5_001)).unwrap();
        assert_eq!(outcome.packet, ack(5_001).to(ENDPOINT, 8080).bytes());
        let reply = tcp_packet((ENDPOINT, 8080), (POD, 40_000), tcp::ACK);
        let outcome = world.send(Hook::PodOut, &reply).unwrap();
        assert_eq!(outcome.packet, reply.clone().from(CLUSTER_IP, 80).bytes());
        let new = tcp_packet(("10.244.1.8", 41_000), (CLUSTER_IP, 80), tcp::SYN);
        assert_eq!(world.send(Hook::PodIn, &new).unwrap().packet, new.to(POD, 8080).bytes());
    });
}

/// C1: the next datagram of the same five-tuple goes elsewhere when the endpoint no longer serves.
#[test]
fn a_udp_flow_leaves_an_endpoint_that_is_gone() {
    in_namespace(|| {
        let mut world = World::new(&web("", &[REMOTE])).unwrap();
        let sent = udp_packet(("10.244.1.8", 40_000), (CLUSTER_IP, 80), b"q");
        expect(
            &world,
            Hook::PodIn,
            &sent,
            Verdict::Pass,
            &sent.clone().to(ENDPOINT, 8080),
            &counted_in(29, true),
        );
        world.apply(&web("", &[LOCAL])).unwrap();
        let mut moved = counted_in(29, true);
        moved.extend(reason(Reason::Rebalanced));
        expect(&world, Hook::PodIn, &sent, Verdict::Pass, &sent.clone().to(POD, 8080), &moved);
        assert_eq!(world.flow_counts().unwrap(), [2, 0, 0], "the old flow is gone with both directions");
    });
}

/// C1: also when all endpoints had gone in between, and when the flow began before there were any.
#[test]
fn a_udp_flow_follows_endpoints_that_go_and_come() {
    in_namespace(|| {
        let mut world = World::new(&web("", &[])).unwrap();
        let sent = udp_packet(("10.244.1.8", 40_000), (CLUSTER_IP, 80), b"q");
        assert_eq!(world.send(Hook::PodIn, &sent).unwrap().moved, reason(Reason::NoEndpoints));
        world.apply(&web("", &[REMOTE])).unwrap();
        assert_eq!(world.send(Hook::PodIn, &sent).unwrap().packet, sent.clone().to(ENDPOINT, 8080).bytes());
        world.apply(&web("", &[])).unwrap();
        assert_eq!(world.send(Hook::PodIn, &sent).unwrap().verdict, Verdict::Redirect, "refused");
        world.rest();
        // The id that the old endpoint had may now be another's, under a new generation.
        world.apply(&web("", &[LOCAL])).unwrap();
        assert_eq!(world.send(Hook::PodIn, &sent).unwrap().packet, sent.clone().to(POD, 8080).bytes());
    });
}

/// C1: an endpoint that drains but still serves keeps its UDP flows.
#[test]
fn a_udp_flow_stays_with_an_endpoint_that_still_serves() {
    in_namespace(|| {
        let mut world = World::new(&web("", &[REMOTE])).unwrap();
        let sent = udp_packet(("10.244.1.8", 40_000), (CLUSTER_IP, 80), b"q");
        world.send(Hook::PodIn, &sent).unwrap();
        let draining = (ENDPOINT, "there", "ready: false, serving: true, terminating: true");
        world.apply(&web("", &[LOCAL, draining])).unwrap();
        expect(
            &world,
            Hook::PodIn,
            &sent,
            Verdict::Pass,
            &sent.clone().to(ENDPOINT, 8080),
            &counted_in(29, false),
        );
    });
}

/// C4: a half whose partner is gone counts as absent.
#[test]
fn half_a_flow_is_no_flow() {
    in_namespace(|| {
        let world = World::new(&web("", &[REMOTE])).unwrap();
        let stranger = tcp_packet((ENDPOINT, 8080), (CLIENT, 40_000), tcp::ACK);
        crate::expect_untouched(&world, Hook::UplinkOut, &stranger);
        crate::expect_untouched(&world, Hook::PodOut, &stranger);
    });
}

/// P9: a client's port that serves again, to another address of the same endpoint, keeps the client's address although the
/// old connection is closing still.
#[test]
fn a_closing_flow_does_not_cost_the_next_one_its_source() {
    in_namespace(|| {
        let world = World::new(&web("", &[REMOTE])).unwrap();
        establish(&world);
        world.send(Hook::PodOut, &tcp_packet((ENDPOINT, 8080), (POD, 40_000), tcp::RST)).unwrap();
        assert_eq!(world.flow_counts().unwrap(), [0, 0, 2]);
        let sent = tcp_packet((POD, 40_000), (dataplane_tests::packet::NODE, 30_080), tcp::SYN);
        let out = sent.clone().to(ENDPOINT, 8080);
        expect(&world, Hook::PodIn, &sent, Verdict::Pass, &out, &counted_in(40, true));
    });
}
