//! The life of flows: half-open, established, closing; and what becomes of them when their endpoint goes.

use crate::{expect, expect_drop, expect_untouched};
use dataplane_common::counter::Traffic;
use dataplane_common::drop::Reason;
use dataplane_common::node::Node;
use dataplane_tests::packet::build::{Packet, Transport, tcp, tcp_packet, udp_packet};
use dataplane_tests::packet::family::{Family, V4, for_both};
use dataplane_tests::packet::{Hook, Outcome, Verdict, World, in_namespace, reason};
use std::collections::BTreeMap;
use std::time::Duration;

fn syn(f: &Family) -> Packet {
    tcp_packet((f.pod, 40_000), (f.cluster_ip, 80), tcp::SYN)
}

fn syn_ack(f: &Family) -> Packet {
    tcp_packet((f.remote, 8080), (f.pod, 40_000), tcp::SYN | tcp::ACK).numbers(5_000, 1_001)
}

/// The client's segment that acknowledges `ack`.
fn ack(f: &Family, ack: u32) -> Packet {
    tcp_packet((f.pod, 40_000), (f.cluster_ip, 80), tcp::ACK).numbers(1_001, ack)
}

/// The same segment with so many bytes of data.
fn with_data(segment: &Packet, bytes: usize) -> Packet {
    let mut segment = segment.clone();
    if let Transport::Tcp { data, .. } = &mut segment.transport {
        *data = vec![0; bytes];
    }
    segment
}

fn establish(f: &Family, world: &World) {
    world.send(Hook::PodIn, &syn(f)).unwrap();
    world.send(Hook::PodOut, &syn_ack(f)).unwrap();
    world.send(Hook::PodIn, &ack(f, 5_001)).unwrap();
    assert_eq!(world.flow_counts().unwrap(), [0, 2, 0]);
}

/// C4: only the client's proof that it saw the SYN-ACK makes a flow established.
#[test]
fn a_connection_is_established_by_the_clients_proof_alone() {
    for_both(|f| {
        let world = World::new(&f.web("", &[f.remote_endpoint()])).unwrap();
        world.send(Hook::PodIn, &syn(f)).unwrap();
        world.send(Hook::PodIn, &ack(f, 5_001)).unwrap();
        assert_eq!(world.flow_counts().unwrap(), [2, 0, 0], "nothing was answered yet");
        world.send(Hook::PodOut, &syn_ack(f)).unwrap();
        world.send(Hook::PodIn, &ack(f, 777_000_000)).unwrap();
        assert_eq!(world.flow_counts().unwrap(), [2, 0, 0], "a guessed number proves nothing");
        let out = ack(f, 5_001).to(f.remote, 8080);
        expect(&world, Hook::PodIn, &ack(f, 5_001), Verdict::Pass, &out, &f.counted_in(20, false));
        assert_eq!(world.flow_counts().unwrap(), [0, 2, 0]);
    });
}

/// C4: a connection that was picked up in its middle, after a reboot, is established by traffic in both directions.
#[test]
fn a_connection_picked_up_in_its_middle_is_established_when_both_ends_go_on() {
    for_both(|f| {
        let world = World::new(&f.web("", &[f.remote_endpoint()])).unwrap();
        let from_client = |ack| tcp_packet((f.pod, 40_000), (f.cluster_ip, 80), tcp::ACK).numbers(9_000, ack);
        let from_endpoint = with_data(&tcp_packet((f.remote, 8080), (f.pod, 40_000), tcp::ACK), 100);
        world.send(Hook::PodIn, &from_client(70_000)).unwrap();
        world.send(Hook::PodIn, &from_client(70_000)).unwrap();
        assert_eq!(world.flow_counts().unwrap(), [2, 0, 0], "nobody has answered");
        world.send(Hook::PodOut, &from_endpoint.clone().numbers(70_000, 9_000)).unwrap();
        world.send(Hook::PodIn, &from_client(69_000)).unwrap();
        assert_eq!(world.flow_counts().unwrap(), [2, 0, 0], "the answer was not seen");
        world.send(Hook::PodIn, &from_client(70_100)).unwrap();
        assert_eq!(world.flow_counts().unwrap(), [0, 2, 0]);
        // Where a SYN began it, only a SYN-ACK answers.
        world.forget_flows().unwrap();
        world.send(Hook::PodIn, &syn(f)).unwrap();
        world.send(Hook::PodOut, &from_endpoint.numbers(70_000, 1_001)).unwrap();
        world.send(Hook::PodIn, &ack(f, 70_100)).unwrap();
        assert_eq!(world.flow_counts().unwrap(), [2, 0, 0]);
    });
}

/// C4: a UDP flow is established by a further datagram after a reply.
#[test]
fn a_udp_flow_is_established_when_both_ends_have_spoken() {
    for_both(|f| {
        let world = World::new(&f.web("", &[f.remote_endpoint()])).unwrap();
        let question = udp_packet((f.pod, 40_000), (f.cluster_ip, 80), b"q");
        world.send(Hook::PodIn, &question).unwrap();
        world.send(Hook::PodIn, &question).unwrap();
        assert_eq!(world.flow_counts().unwrap(), [2, 0, 0]);
        world.send(Hook::PodOut, &udp_packet((f.remote, 8080), (f.pod, 40_000), b"a")).unwrap();
        world.send(Hook::PodIn, &question).unwrap();
        assert_eq!(world.flow_counts().unwrap(), [0, 2, 0]);
    });
}

/// C4: answers that go on establish a flow whose client is silent, such as that of a stream; one late answer does not.
#[test]
fn a_udp_flow_is_established_by_answers_that_go_on() {
    for_both(|f| {
        let world = World::new(&f.web("", &[f.remote_endpoint()])).unwrap();
        let answer = udp_packet((f.remote, 8080), (f.pod, 40_000), b"a");
        world.send(Hook::PodIn, &udp_packet((f.pod, 40_000), (f.cluster_ip, 80), b"q")).unwrap();
        world.age_flows(LINGER).unwrap();
        for _ in 0..3 {
            world.send(Hook::PodOut, &answer).unwrap();
            assert_eq!(world.flow_counts().unwrap(), [2, 0, 0]);
        }
        world.age_flows(LINGER).unwrap();
        let restored = answer.clone().from(f.cluster_ip, 80);
        expect(&world, Hook::PodOut, &answer, Verdict::Pass, &restored, &f.counted_out(9));
        assert_eq!(world.flow_counts().unwrap(), [0, 2, 0]);
    });
}

/// C4: both directions close together, after the FINs of both ends; packets go on through the closing flow.
#[test]
fn a_connection_closes_when_both_ends_have_finished() {
    for_both(|f| {
        let world = World::new(&f.web("", &[f.remote_endpoint()])).unwrap();
        establish(f, &world);
        let fin = tcp_packet((f.pod, 40_000), (f.cluster_ip, 80), tcp::FIN | tcp::ACK).numbers(1_001, 5_001);
        world.send(Hook::PodIn, &fin).unwrap();
        assert_eq!(world.flow_counts().unwrap(), [0, 2, 0], "half-closed is not closed");
        let fin = tcp_packet((f.remote, 8080), (f.pod, 40_000), tcp::FIN | tcp::ACK).numbers(5_001, 1_002);
        expect(
            &world,
            Hook::PodOut,
            &fin,
            Verdict::Pass,
            &fin.clone().from(f.cluster_ip, 80),
            &f.counted_out(20),
        );
        assert_eq!(world.flow_counts().unwrap(), [0, 0, 2]);
        let last = ack(f, 5_002);
        expect(
            &world,
            Hook::PodIn,
            &last,
            Verdict::Pass,
            &last.clone().to(f.remote, 8080),
            &f.counted_in(20, false),
        );
    });
}

/// C4: a RST of either end closes the flow at once.
#[test]
fn a_reset_closes_a_connection() {
    for_both(|f| {
        let world = World::new(&f.web("", &[f.remote_endpoint()])).unwrap();
        establish(f, &world);
        let rst = tcp_packet((f.remote, 8080), (f.pod, 40_000), tcp::RST).numbers(5_001, 0);
        expect(
            &world,
            Hook::PodOut,
            &rst,
            Verdict::Pass,
            &rst.clone().from(f.cluster_ip, 80),
            &f.counted_out(20),
        );
        assert_eq!(world.flow_counts().unwrap(), [0, 0, 2]);
    });
}

/// C4: a RST or FIN with a number that somebody has guessed ends nothing, of neither end, neither before a connection is accepted nor
/// after; the right one does.
#[test]
fn a_guessed_number_ends_no_connection() {
    for_both(|f| {
        let world = World::new(&f.web("", &[f.remote_endpoint()])).unwrap();
        let client = |flags| tcp_packet((f.pod, 40_000), (f.cluster_ip, 80), flags);
        let endpoint = |flags| tcp_packet((f.remote, 8080), (f.pod, 40_000), flags);
        let guess = |counts: [usize; 3]| {
            for number in [0, 1, 1_000, 5_000, 5_002, 3_000_000, 0xdead_beef] {
                world.send(Hook::PodIn, &client(tcp::RST).numbers(number + 7, 0)).unwrap();
                world.send(Hook::PodOut, &endpoint(tcp::RST).numbers(number + 7, 0)).unwrap();
                world.send(Hook::PodOut, &endpoint(tcp::RST | tcp::ACK).numbers(0, number + 7)).unwrap();
                let far = number + 10_000_000;
                world.send(Hook::PodIn, &client(tcp::FIN | tcp::ACK).numbers(far, 5_001)).unwrap();
                world.send(Hook::PodOut, &endpoint(tcp::FIN | tcp::ACK).numbers(far, 1_001)).unwrap();
                assert_eq!(world.flow_counts().unwrap(), counts, "{number}");
            }
        };
        world.send(Hook::PodIn, &syn(f)).unwrap();
        for number in [0, 1_000, 1_002, 0xdead_beef] {
            world.send(Hook::PodOut, &endpoint(tcp::RST | tcp::ACK).numbers(0, number)).unwrap();
            world.send(Hook::PodIn, &client(tcp::RST).numbers(number, 0)).unwrap();
        }
        assert_eq!(world.flow_counts().unwrap(), [2, 0, 0]);
        world.send(Hook::PodOut, &syn_ack(f)).unwrap();
        world.send(Hook::PodIn, &ack(f, 5_001)).unwrap();
        guess([0, 2, 0]);
        // Data in flight: the number after it, and what the client has acknowledged.
        let data = with_data(&endpoint(tcp::ACK).numbers(5_001, 1_001), 100);
        world.send(Hook::PodOut, &data).unwrap();
        guess([0, 2, 0]);
        let restored = endpoint(tcp::RST).numbers(5_101, 0).from(f.cluster_ip, 80);
        let right = endpoint(tcp::RST).numbers(5_101, 0);
        expect(&world, Hook::PodOut, &right, Verdict::Pass, &restored, &f.counted_out(20));
        assert_eq!(world.flow_counts().unwrap(), [0, 0, 2]);
    });
}

/// A new connection on the ports of one that is closing is a new flow.
#[test]
fn a_port_that_is_used_again_begins_a_new_flow() {
    for_both(|f| {
        let world = World::new(&f.web("", &[f.remote_endpoint()])).unwrap();
        establish(f, &world);
        world
            .send(Hook::PodOut, &tcp_packet((f.remote, 8080), (f.pod, 40_000), tcp::RST).numbers(5_001, 0))
            .unwrap();
        let out = syn(f).to(f.remote, 8080);
        expect(&world, Hook::PodIn, &syn(f), Verdict::Pass, &out, &f.counted_in(20, true));
        assert_eq!(world.flow_counts().unwrap(), [2, 0, 0]);
    });
}

/// A client that calls the endpoint itself, from the ports of a connection to the Service that is closing, is answered by the endpoint.
#[test]
fn a_port_that_is_used_again_without_the_service_is_left_alone() {
    for_both(|f| {
        let world = World::new(&f.web("", &[f.remote_endpoint()])).unwrap();
        establish(f, &world);
        let restored = syn_ack(f).from(f.cluster_ip, 80);
        expect(&world, Hook::PodOut, &syn_ack(f), Verdict::Pass, &restored, &f.counted_out(20));
        world
            .send(Hook::PodOut, &tcp_packet((f.remote, 8080), (f.pod, 40_000), tcp::RST).numbers(5_001, 0))
            .unwrap();
        let direct = tcp_packet((f.pod, 40_000), (f.remote, 8080), tcp::SYN);
        expect_untouched(&world, Hook::PodIn, &direct);
        expect_untouched(&world, Hook::PodOut, &syn_ack(f));
        assert_eq!(world.flow_counts().unwrap(), [0, 0, 0]);
    });
}

/// A connection that the endpoint refuses leaves nothing behind.
#[test]
fn a_refused_connection_leaves_no_flow() {
    for_both(|f| {
        let world = World::new(&f.web("", &[f.remote_endpoint()])).unwrap();
        world.send(Hook::PodIn, &syn(f)).unwrap();
        world
            .send(
                Hook::PodOut,
                &tcp_packet((f.remote, 8080), (f.pod, 40_000), tcp::RST | tcp::ACK).numbers(0, 1_001),
            )
            .unwrap();
        assert_eq!(world.flow_counts().unwrap(), [0, 0, 0]);
    });
}

/// Ticks for which a flow that could give its port away keeps it.
const LINGER: u32 = 2;

/// Longer than the step of the clock by which flows that ended are told apart.
const JIFFY: Duration = Duration::from_millis(20);

/// The client's packets and the endpoint's of one connection, by the client's port.
struct Connection<'a> {
    f: &'a Family,
    world: &'a World,
    port: u16,
}

impl Connection<'_> {
    fn to_service(&self, flags: u8) -> Packet {
        tcp_packet((self.f.pod, self.port), (self.f.cluster_ip, 80), flags)
    }

    /// Its first packet.
    fn begin(&self) -> Outcome {
        self.world.send(Hook::PodIn, &self.to_service(tcp::SYN)).unwrap()
    }

    fn establish(&self) {
        self.begin();
        let answer = tcp_packet((self.f.remote, 8080), (self.f.pod, self.port), tcp::SYN | tcp::ACK);
        self.world.send(Hook::PodOut, &answer.numbers(5_000, 1_001)).unwrap();
        self.world.send(Hook::PodIn, &self.to_service(tcp::ACK).numbers(1_001, 5_001)).unwrap();
    }

    fn reset(&self) {
        self.world.send(Hook::PodIn, &self.to_service(tcp::RST).numbers(1_001, 0)).unwrap();
    }

    /// Whether the endpoint's packets are restored.
    fn lives(&self) -> bool {
        let sent = tcp_packet((self.f.remote, 8080), (self.f.pod, self.port), tcp::ACK);
        self.world.send(Hook::PodOut, &sent).unwrap().packet == sent.from(self.f.cluster_ip, 80).bytes()
    }
}

/// C4: under pressure closing flows go first, then half-open ones, after the first packet that found no room; an established flow
/// is never broken by new ones, which are dropped and counted if there is no other.
#[test]
fn a_full_table_breaks_no_established_flow() {
    for_both(|f| {
        let world = World::with(&f.web("", &[f.remote_endpoint()]), 0, &[("flows", 4)]).unwrap();
        let [first, second, third, fourth, fifth] =
            [1, 2, 3, 4, 5].map(|port| Connection { f, world: &world, port });
        first.establish();
        second.establish();
        second.reset();
        assert_eq!(world.flow_counts().unwrap(), [0, 2, 2]);
        assert_eq!(third.begin().moved, reason(Reason::FlowsFull));
        assert_eq!(third.begin().verdict, Verdict::Pass, "the closing flow has made room");
        assert_eq!(world.flow_counts().unwrap(), [2, 2, 0]);
        assert_eq!(fourth.begin().moved, reason(Reason::FlowsFull));
        fourth.establish();
        assert_eq!(world.flow_counts().unwrap(), [0, 4, 0], "the half-open flow made room");
        let refused = fifth.begin();
        assert_eq!((refused.verdict, refused.moved), (Verdict::Drop, reason(Reason::FlowsFull)));
        assert!(first.lives() && fourth.lives());
        assert_eq!(world.flow_counts().unwrap(), [0, 4, 0]);
    });
}

/// C4: half-open flows push out only their own kind, whole flows, and none that was confirmed since.
#[test]
fn half_open_flows_have_their_own_room() {
    for_both(|f| {
        let world = World::with(&f.web("", &[f.remote_endpoint()]), 0, &[("half_open", 4)]).unwrap();
        let connections: Vec<_> = (1..=20).map(|port| Connection { f, world: &world, port }).collect();
        connections[0].establish();
        connections[1].establish();
        connections[2..].iter().for_each(|connection| assert_eq!(connection.begin().verdict, Verdict::Pass));
        assert_eq!(world.flow_counts().unwrap(), [8, 4, 0]);
        let [half_open, ..] = world.flows().unwrap();
        let has = |key| half_open.iter().any(|(other, _)| *other == key);
        assert!(half_open.iter().all(|(key, flow)| has(flow.partner(key.proto()))), "both directions went");
        assert!(connections[0].lives() && connections[1].lives());
    });
}

/// The names of flows that were confirmed make way for those that are half-open, however many come and go.
#[test]
fn a_half_open_flow_is_not_pushed_out_by_connections_that_are_confirmed() {
    for_both(|f| {
        let world = World::with(&f.web("", &[f.remote_endpoint()]), 0, &[("half_open", 4)]).unwrap();
        let waits = Connection { f, world: &world, port: 1 };
        waits.begin();
        for port in 2..=40 {
            Connection { f, world: &world, port }.establish();
        }
        assert_eq!(world.flow_counts().unwrap(), [2, 78, 0]);
        assert!(waits.lives());
    });
}

/// C4: a question by UDP that was answered makes way, at once, before one that waits for its answer.
#[test]
fn an_answered_question_makes_way_before_one_that_waits() {
    for_both(|f| {
        let world = World::with(&f.web("", &[f.remote_endpoint()]), 0, &[("half_open", 4)]).unwrap();
        let ask =
            |port| world.send(Hook::PodIn, &udp_packet((f.pod, port), (f.cluster_ip, 80), b"q")).unwrap();
        let answer = |port| {
            let sent = udp_packet((f.remote, 8080), (f.pod, port), b"a");
            world.send(Hook::PodOut, &sent).unwrap().packet == sent.from(f.cluster_ip, 80).bytes()
        };
        ask(1);
        for port in 2..=20 {
            ask(port);
            assert!(answer(port));
        }
        assert_eq!(world.flow_counts().unwrap(), [8, 0, 0]);
        assert!(answer(1));
    });
}

/// C4: closing flows push out their oldest, and none that began, or ended, anew on the same ports.
#[test]
fn closing_flows_have_their_own_room() {
    for_both(|f| {
        let world = World::with(&f.web("", &[f.remote_endpoint()]), 0, &[("closing", 2)]).unwrap();
        let [first, second, third, fourth] = [1, 2, 3, 4].map(|port| Connection { f, world: &world, port });
        for connection in [&first, &second, &third] {
            connection.establish();
            connection.reset();
        }
        assert_eq!(world.flow_counts().unwrap(), [0, 0, 4]);
        assert!(!first.lives() && second.lives() && third.lives());
        second.establish();
        fourth.establish();
        fourth.reset();
        assert_eq!(world.flow_counts().unwrap(), [0, 2, 4], "second has begun anew");
        assert!(second.lives() && third.lives() && fourth.lives());
        let world = World::with(&f.web("", &[f.remote_endpoint()]), 0, &[("closing", 2)]).unwrap();
        let [first, second] = [1, 2].map(|port| Connection { f, world: &world, port });
        for connection in [&first, &first, &second] {
            connection.establish();
            connection.reset();
            std::thread::sleep(JIFFY);
        }
        assert!(first.lives() && second.lives(), "what first was before is what went");
    });
}

/// C2: an established connection goes on when its endpoint left; T5. A new connection does not go there.
#[test]
fn an_established_connection_stays_with_an_endpoint_that_left() {
    for_both(|f| {
        let mut world = World::new(&f.web("", &[f.remote_endpoint()])).unwrap();
        establish(f, &world);
        world.apply(&f.web("", &[f.local_endpoint()])).unwrap();
        let outcome = world.send(Hook::PodIn, &ack(f, 5_001)).unwrap();
        assert_eq!(outcome.packet, ack(f, 5_001).to(f.remote, 8080).bytes());
        let reply = tcp_packet((f.remote, 8080), (f.pod, 40_000), tcp::ACK);
        let outcome = world.send(Hook::PodOut, &reply).unwrap();
        assert_eq!(outcome.packet, reply.clone().from(f.cluster_ip, 80).bytes());
        let new = tcp_packet((f.other_pod, 41_000), (f.cluster_ip, 80), tcp::SYN);
        assert_eq!(world.send(Hook::PodIn, &new).unwrap().packet, new.to(f.pod, 8080).bytes());
    });
}

/// C1: the next datagram of the same five-tuple goes elsewhere when the endpoint no longer serves.
#[test]
fn a_udp_flow_leaves_an_endpoint_that_is_gone() {
    for_both(|f| {
        let mut world = World::new(&f.web("", &[f.remote_endpoint()])).unwrap();
        let sent = udp_packet((f.other_pod, 40_000), (f.cluster_ip, 80), b"q");
        expect(
            &world,
            Hook::PodIn,
            &sent,
            Verdict::Pass,
            &sent.clone().to(f.remote, 8080),
            &f.counted_in(9, true),
        );
        world.apply(&f.web("", &[f.local_endpoint()])).unwrap();
        let mut moved = f.counted_in(9, true);
        moved.extend(reason(Reason::Rebalanced));
        expect(&world, Hook::PodIn, &sent, Verdict::Pass, &sent.clone().to(f.pod, 8080), &moved);
        assert_eq!(world.flow_counts().unwrap(), [2, 0, 0], "the old flow is gone with both directions");
    });
}

/// C1: also when all endpoints had gone in between, and when the flow began before there were any.
#[test]
fn a_udp_flow_follows_endpoints_that_go_and_come() {
    for_both(|f| {
        let mut world = World::new(&f.web("", &[])).unwrap();
        let sent = udp_packet((f.other_pod, 40_000), (f.cluster_ip, 80), b"q");
        assert_eq!(world.send(Hook::PodIn, &sent).unwrap().moved, reason(Reason::NoEndpoints));
        world.apply(&f.web("", &[f.remote_endpoint()])).unwrap();
        assert_eq!(world.send(Hook::PodIn, &sent).unwrap().packet, sent.clone().to(f.remote, 8080).bytes());
        world.apply(&f.web("", &[])).unwrap();
        assert_eq!(world.send(Hook::PodIn, &sent).unwrap().verdict, Verdict::Redirect, "refused");
        world.rest();
        // The id that the old endpoint had may now be another's, under a new generation.
        world.apply(&f.web("", &[f.local_endpoint()])).unwrap();
        assert_eq!(world.send(Hook::PodIn, &sent).unwrap().packet, sent.clone().to(f.pod, 8080).bytes());
    });
}

/// C1: an endpoint that drains but still serves keeps its UDP flows.
#[test]
fn a_udp_flow_stays_with_an_endpoint_that_still_serves() {
    for_both(|f| {
        let mut world = World::new(&f.web("", &[f.remote_endpoint()])).unwrap();
        let sent = udp_packet((f.other_pod, 40_000), (f.cluster_ip, 80), b"q");
        world.send(Hook::PodIn, &sent).unwrap();
        let draining = (f.remote, "there", "ready: false, serving: true, terminating: true");
        world.apply(&f.web("", &[f.local_endpoint(), draining])).unwrap();
        expect(
            &world,
            Hook::PodIn,
            &sent,
            Verdict::Pass,
            &sent.clone().to(f.remote, 8080),
            &f.counted_in(9, false),
        );
    });
}

/// C4: a half whose partner is gone counts as absent.
#[test]
fn half_a_flow_is_no_flow() {
    for_both(|f| {
        let world = World::new(&f.web("", &[f.remote_endpoint()])).unwrap();
        let stranger = tcp_packet((f.remote, 8080), (f.client, 40_000), tcp::ACK);
        expect_untouched(&world, Hook::UplinkOut, &stranger);
        expect_untouched(&world, Hook::PodOut, &stranger);
    });
}

/// P9: a client's port that serves again, to another address of the same endpoint, keeps the client's address although the
/// old connection is closing still.
#[test]
fn a_closing_flow_does_not_cost_the_next_one_its_source() {
    for_both(|f| {
        let world = World::new(&f.web("", &[f.remote_endpoint()])).unwrap();
        establish(f, &world);
        world
            .send(Hook::PodOut, &tcp_packet((f.remote, 8080), (f.pod, 40_000), tcp::RST).numbers(5_001, 0))
            .unwrap();
        assert_eq!(world.flow_counts().unwrap(), [0, 0, 2]);
        let sent = tcp_packet((f.pod, 40_000), (f.node, 30_080), tcp::SYN);
        let out = sent.clone().to(f.remote, 8080);
        expect(&world, Hook::PodIn, &sent, Verdict::Pass, &out, &f.counted_in(20, true));
    });
}

/// P12, C4: a translated source port is not used again while something of its connection is still to come: the new client would
/// get it.
#[test]
fn a_source_port_is_not_used_again_before_its_connection_is_over() {
    for_both(|f| {
        let world = World::with_ports(&f.web("", &[f.remote_endpoint()]), 0, &[], 61_000..=61_000).unwrap();
        let from_client = |port, flags| tcp_packet((f.client, port), (f.node, 30_080), flags);
        let from_endpoint = |flags| tcp_packet((f.remote, 8080), (f.node, 61_000), flags);
        let send = |packet: Packet| world.send(Hook::UplinkIn, &packet).unwrap();
        send(from_client(40_000, tcp::SYN));
        send(from_endpoint(tcp::SYN | tcp::ACK).numbers(5_000, 1_001));
        send(from_client(40_000, tcp::ACK).numbers(1_001, 5_001));
        send(from_endpoint(tcp::FIN | tcp::ACK).numbers(5_001, 1_001));
        send(from_client(40_000, tcp::FIN | tcp::ACK).numbers(1_001, 5_002));
        assert_eq!(world.flow_counts().unwrap(), [0, 0, 2]);
        let outcome = send(from_client(40_001, tcp::SYN));
        assert_eq!((outcome.verdict, outcome.moved), (Verdict::Drop, reason(Reason::PortsExhausted)));
        send(from_endpoint(tcp::ACK).numbers(5_002, 1_002));
        assert_eq!(send(from_client(40_001, tcp::SYN)).verdict, Verdict::Redirect);
    });
}

/// P12, C4: a question by UDP that was answered gives its translated port away soon, but not as long as another answer may come.
#[test]
fn an_answered_question_gives_its_source_port_away() {
    for_both(|f| {
        let world = World::with_ports(&f.web("", &[f.remote_endpoint()]), 0, &[], 61_000..=61_001).unwrap();
        let ask =
            |port| world.send(Hook::UplinkIn, &udp_packet((f.client, port), (f.node, 30_080), b"q")).unwrap();
        let answer =
            |port| world.send(Hook::UplinkIn, &udp_packet((f.remote, 8080), (f.node, port), b"a")).unwrap();
        let exhausted = (Verdict::Drop, reason(Reason::PortsExhausted));
        let refused = |outcome: Outcome| (outcome.verdict, outcome.moved) == exhausted;
        let unanswered = f.source_port(&ask(40_000).packet);
        let answered = f.source_port(&ask(40_001).packet);
        assert!(refused(ask(40_002)), "both are half-open, and new");
        answer(answered);
        assert!(refused(ask(40_002)), "it was answered a moment ago");
        world.age_flows(LINGER).unwrap();
        let third = ask(40_002);
        assert_eq!((third.verdict, f.source_port(&third.packet)), (Verdict::Redirect, answered));
        let restored = udp_packet((f.node, 30_080), (f.client, 40_000), b"a").ttl(63);
        assert_eq!(answer(unanswered).packet, restored.bytes(), "its answer can still come");
    });
}

/// P12, C4: where no other port is to be had, half-open flows of which nothing was seen for a while give theirs away: a flood of
/// openings does not keep them. Established ones keep theirs.
#[test]
fn a_flood_does_not_keep_the_source_ports() {
    for_both(|f| {
        let world = World::with_ports(&f.web("", &[f.remote_endpoint()]), 0, &[], 61_000..=61_001).unwrap();
        let send = |packet: Packet| world.send(Hook::UplinkIn, &packet).unwrap();
        let from_client = |port, flags| tcp_packet((f.client, port), (f.node, 30_080), flags);
        let kept = f.source_port(&send(from_client(1, tcp::SYN)).packet);
        let answer = tcp_packet((f.remote, 8080), (f.node, kept), tcp::SYN | tcp::ACK);
        send(answer.numbers(5_000, 1_001));
        send(from_client(1, tcp::ACK).numbers(1_001, 5_001));
        send(from_client(2, tcp::SYN));
        assert_eq!(send(from_client(3, tcp::SYN)).moved, reason(Reason::PortsExhausted));
        for port in 3..=20 {
            world.age_flows(LINGER).unwrap();
            let outcome = send(from_client(port, tcp::SYN));
            assert_eq!(outcome.verdict, Verdict::Redirect);
            assert_ne!(f.source_port(&outcome.packet), kept);
        }
        assert_eq!(world.flow_counts().unwrap(), [2, 2, 0]);
    });
}

/// C3: the filter of replies lets those of a flow through as long as the flow is there, and nobody else's.
#[test]
fn replies_are_looked_for_as_long_as_their_flow_is_there() {
    for_both(|f| {
        let world = World::new(&f.web("", &[f.remote_endpoint()])).unwrap();
        let answer = tcp_packet((f.remote, 8080), (f.pod, 40_000), tcp::ACK);
        let restored = answer.clone().from(f.cluster_ip, 80);
        for _ in 0..2 {
            establish(f, &world);
            assert_eq!(world.sweep_callers().unwrap(), 1, "the client's");
            expect(&world, Hook::PodOut, &answer, Verdict::Pass, &restored, &f.counted_out(20));
            let marks = world.swap_callers(&[]).unwrap();
            expect_untouched(&world, Hook::PodOut, &answer);
            world.swap_callers(&marks).unwrap();
            expect(&world, Hook::PodOut, &answer, Verdict::Pass, &restored, &f.counted_out(20));
            world.forget_flows().unwrap();
            assert_eq!(world.sweep_callers().unwrap(), 0);
            expect_untouched(&world, Hook::PodOut, &answer);
        }
        // Where the source is translated, replies go to the node.
        world.send(Hook::UplinkIn, &tcp_packet((f.client, 40_000), (f.node, 30_080), tcp::SYN)).unwrap();
        assert_eq!(world.sweep_callers().unwrap(), 1, "the node's");
    });
}

/// H3: what is counted in flows comes to the totals of Service and endpoint once, however the flow ends.
#[test]
fn packets_and_bytes_come_to_the_totals_once_whatever_becomes_of_the_flow() {
    for_both(|f| {
        let world = World::new(&f.web("", &[f.local_endpoint()])).unwrap();
        let call = |port, flags| tcp_packet((f.other_pod, port), (f.cluster_ip, 80), flags);
        let answer =
            |port, flags| tcp_packet((f.pod, 8080), (f.other_pod, port), flags).numbers(5_000, 1_001);
        let bytes = f.header as u64 + 20;
        let total = |packets_in, packets_out, new_flows| Traffic {
            packets_in,
            bytes_in: packets_in * bytes,
            packets_out,
            bytes_out: packets_out * bytes,
            new_flows,
        };
        for port in [40_000, 40_001] {
            world.send(Hook::PodIn, &call(port, tcp::SYN)).unwrap();
            for _ in 0..3 {
                world.send(Hook::PodOut, &answer(port, tcp::SYN | tcp::ACK)).unwrap();
            }
        }
        assert_eq!(world.totals().unwrap(), [total(0, 0, 2); 2], "it is in the flows");
        assert_eq!(world.traffic().unwrap(), [total(2, 6, 2); 2]);
        for _ in 0..2 {
            world.fold().unwrap();
            assert_eq!(world.totals().unwrap(), [total(2, 6, 2); 2]);
            assert_eq!(world.traffic().unwrap(), [total(2, 6, 2); 2]);
        }
        // One is refused, and the program removes it; the other begins anew.
        let refusal = answer(40_000, tcp::RST | tcp::ACK).numbers(5_001, 1_001);
        world.send(Hook::PodOut, &refusal).unwrap();
        assert_eq!(world.flow_counts().unwrap(), [2, 0, 0]);
        assert_eq!(world.totals().unwrap(), [total(2, 7, 2); 2]);
        // A half that can count no more goes to the totals by itself.
        let full = world.fill_counters().unwrap();
        world.send(Hook::PodOut, &answer(40_001, tcp::SYN | tcp::ACK)).unwrap();
        let [service, endpoint] = world.totals().unwrap();
        assert_eq!((service, service.packets_out), (endpoint, 7 + full.packets() + 1));
        let flows = world.flows().unwrap()[0].clone();
        let passed: u64 = flows.iter().map(|(_, flow)| flow.passed().0).sum();
        assert_eq!(passed, 1 + 3 + 2 * full.packets() + 1);
    });
}

/// C3: while an upgrade to other maps replaces the programs one by one, what goes on in a connection of no flow may be of one that
/// the others have begun: nobody takes it for somebody else's.
#[test]
fn what_may_be_of_the_programs_before_is_held_back_until_their_flows_are_here() {
    for_both(|f| {
        let world = World::new(&f.web("", &[f.local_endpoint()])).unwrap();
        let calls = [
            (Hook::PodIn, (f.other_pod, 40_000), (f.cluster_ip, 80)),
            (Hook::UplinkIn, (f.client, 40_000), (f.node, 30_080)),
            (Hook::Xdp, (f.client, 40_000), (f.node, 30_080)),
        ];
        // One that these have begun: its client may have other connections.
        let opens = tcp_packet((f.other_pod, 40_001), (f.cluster_ip, 80), tcp::SYN);
        world.send(Hook::PodIn, &opens).unwrap();
        let answer = |port, flags| tcp_packet((f.pod, 8080), (f.other_pod, port), flags);
        world.hold_back(true).unwrap();
        for flags in [tcp::ACK, tcp::ACK | tcp::FIN, tcp::RST, tcp::SYN | tcp::ACK] {
            for (hook, from, to) in calls {
                expect_drop(&world, hook, &tcp_packet(from, to, flags), Reason::Undecided);
            }
            expect_drop(&world, Hook::PodOut, &answer(40_000, flags), Reason::Undecided);
        }
        assert_eq!(world.flow_counts().unwrap(), [2, 0, 0]);
        // What is decided: a flow of these programs, what opens a connection, and what is of no endpoint.
        let goes_on = answer(40_001, tcp::SYN | tcp::ACK);
        let restored = goes_on.clone().from(f.cluster_ip, 80);
        expect(&world, Hook::PodOut, &goes_on, Verdict::Pass, &restored, &f.counted_out(20));
        expect_untouched(&world, Hook::PodOut, &answer(40_000, tcp::SYN));
        expect_untouched(&world, Hook::PodOut, &tcp_packet((f.pod, 9_090), (f.other_pod, 40_000), tcp::ACK));
        let opens = tcp_packet((f.other_pod, 40_002), (f.cluster_ip, 80), tcp::SYN);
        let out = opens.clone().to(f.pod, 8080);
        expect(&world, Hook::PodIn, &opens, Verdict::Pass, &out, &f.counted_in(20, true));
        // Nobody repeats a datagram.
        let datagram = udp_packet((f.pod, 8080), (f.other_pod, 40_000), b"?");
        expect_untouched(&world, Hook::PodOut, &datagram);
        world.hold_back(false).unwrap();
        let picked_up = tcp_packet((f.other_pod, 40_000), (f.cluster_ip, 80), tcp::ACK);
        let out = picked_up.clone().to(f.pod, 8080);
        expect(&world, Hook::PodIn, &picked_up, Verdict::Pass, &out, &f.counted_in(20, true));
        expect_untouched(&world, Hook::PodOut, &answer(40_000 + 9, tcp::ACK));
    });
}

/// C5: while another proxy's connections may run, what belongs to no flow is left to it; what opens a connection is not.
#[test]
fn a_connection_that_another_proxy_translates_is_left_to_it() {
    for_both(|f| {
        let yaml = f.web("", &[f.local_endpoint()]);
        let world = World::with(&yaml, Node::TAKES_OVER, &[]).unwrap();
        let calls = [
            (Hook::PodIn, (f.other_pod, 40_000), (f.cluster_ip, 80)),
            (Hook::UplinkIn, (f.client, 40_000), (f.node, 30_080)),
            (Hook::Xdp, (f.client, 40_000), (f.node, 30_080)),
        ];
        for (hook, from, to) in calls {
            for flags in [tcp::ACK, tcp::ACK | tcp::FIN, tcp::RST, tcp::SYN | tcp::ACK] {
                expect_untouched(&world, hook, &tcp_packet(from, to, flags));
            }
        }
        let opens = tcp_packet((f.other_pod, 40_001), (f.cluster_ip, 80), tcp::SYN);
        expect(
            &world,
            Hook::PodIn,
            &opens,
            Verdict::Pass,
            &opens.clone().to(f.pod, 8080),
            &f.counted_in(20, true),
        );
        let goes_on = tcp_packet((f.other_pod, 40_001), (f.cluster_ip, 80), tcp::ACK);
        expect(
            &world,
            Hook::PodIn,
            &goes_on,
            Verdict::Pass,
            &goes_on.clone().to(f.pod, 8080),
            &f.counted_in(20, false),
        );
        // Datagrams open nothing.
        let datagram = udp_packet((f.other_pod, 40_002), (f.cluster_ip, 80), b"?");
        assert_ne!(world.send(Hook::PodIn, &datagram).unwrap().packet, datagram.bytes());
        let world = World::new(&yaml).unwrap();
        let goes_on = tcp_packet((f.other_pod, 40_000), (f.cluster_ip, 80), tcp::ACK);
        assert_ne!(
            world.send(Hook::PodIn, &goes_on).unwrap().packet,
            goes_on.bytes(),
            "the flag is what does it"
        );
    });
}

/// T4: an endpoint set is read as it was written, while the agent turns it to another: a packet sees the old set or the new one.
#[test]
fn an_endpoint_set_is_never_mixed_of_two() {
    const PACKETS: u32 = 2_000_000;
    let f = &V4;
    in_namespace(move || {
        // Nothing is begun and nothing written, so that each run chooses anew.
        let world = World::new(&f.web("", &[(f.lost, "there", "ready: true")])).unwrap();
        let sent = udp_packet((f.client, 40_000), (f.node, 30_080), b"question");
        let moved = world.run_while_sets_turn(Hook::Xdp, &sent.bytes(), PACKETS, 64).unwrap();
        // Of the run's end: what lies behind the one slot is nobody's.
        assert_eq!(moved, BTreeMap::from([(Reason::XdpLeftToTc, u64::from(PACKETS))]), "no route");
    });
}

/// P12, C4: 10,000 questions by UDP in a second, by node port to one endpoint on another node, each from a port of its own: with as many
/// source ports as a node has by default, each finds one.
#[test]
fn ten_thousand_questions_in_a_second_find_source_ports() {
    const IN_A_SECOND: u16 = 10_000;
    for_both(|f| {
        let world = World::with_ports(&f.web("", &[f.remote_endpoint()]), 0, &[], 30_000..=63_511).unwrap();
        for second in 0..4 {
            for number in 0..IN_A_SECOND {
                let client = 1_024 + second * IN_A_SECOND + number;
                let question = udp_packet((f.client, client), (f.node, 30_080), b"q").bytes();
                let (verdict, sent, _) = world.send_uncounted(Hook::UplinkIn, &question).unwrap();
                assert_eq!(verdict, Verdict::Redirect, "question {number} of second {second}");
                let answer = udp_packet((f.remote, 8080), (f.node, f.source_port(&sent)), b"a").bytes();
                let (verdict, restored, _) = world.send_uncounted(Hook::UplinkIn, &answer).unwrap();
                let wanted = udp_packet((f.node, 30_080), (f.client, client), b"a").ttl(63).bytes();
                assert_eq!((verdict, restored), (Verdict::Redirect, wanted));
            }
            world.age_flows(1).unwrap();
        }
    });
}

/// C4: 100,000 questions by UDP wait for their answers at once, for six seconds.
#[test]
fn a_hundred_thousand_questions_wait_for_their_answers() {
    for_both(|f| {
        let world = World::new(&f.web("", &[f.remote_endpoint()])).unwrap();
        let all =
            || [f.pod, f.other_pod].into_iter().flat_map(|pod| (10_000..60_000).map(move |port| (pod, port)));
        for (pod, port) in all() {
            let question = udp_packet((pod, port), (f.cluster_ip, 80), b"q").bytes();
            assert_eq!(world.send_uncounted(Hook::PodIn, &question).unwrap().0, Verdict::Pass);
        }
        assert_eq!(world.flow_counts().unwrap(), [200_000, 0, 0]);
        world.age_flows(6).unwrap();
        for (pod, port) in all() {
            let answer = udp_packet((f.remote, 8080), (pod, port), b"a");
            let restored = world.send_uncounted(Hook::PodOut, &answer.bytes()).unwrap().1;
            assert_eq!(restored, answer.from(f.cluster_ip, 80).bytes(), "{pod} {port}");
        }
    });
}
