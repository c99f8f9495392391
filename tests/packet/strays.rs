//! What belongs to no flow and opens no connection (P22): it is of somebody else's, or was picked up in its middle.

use crate::fragments::PIECE;
use crate::{expect, expect_drop, expect_untouched};
use dataplane_common::drop::Reason;
use dataplane_tests::packet::build::{Packet, icmp_error, ip, sctp_packet, tcp, tcp_packet, udp_packet};
use dataplane_tests::packet::family::{Family, for_both};
use dataplane_tests::packet::{Hook, Verdict, World};
use std::net::{SocketAddr, TcpListener};
use std::process::Command;

/// Where a client outside is met.
const FROM_NETWORK: [Hook; 2] = [Hook::UplinkIn, Hook::Xdp];

/// P22: of a connection whose other end answers there, whether the Service has endpoints or not.
#[test]
fn a_syn_ack_or_a_reset_begins_no_flow_and_passes_to_the_nodes_stack() {
    for_both(|f| {
        for endpoints in [&[f.local_endpoint()][..], &[]] {
            let world = World::new(&f.web("", endpoints)).unwrap();
            let calls =
                FROM_NETWORK.map(|hook| (hook, f.client)).into_iter().chain([(Hook::PodIn, f.other_pod)]);
            for (hook, from) in calls {
                for flags in [tcp::SYN | tcp::ACK, tcp::RST, tcp::RST | tcp::ACK] {
                    expect_untouched(&world, hook, &tcp_packet((from, 9_999), (f.node, 30_080), flags));
                }
            }
            assert_eq!(world.flow_counts().unwrap(), [0, 0, 0]);
        }
    });
}

/// P22, P1: at an address that only Services have nobody else has a connection.
#[test]
fn a_syn_ack_or_a_reset_to_a_services_own_address_is_dropped() {
    for_both(|f| {
        for endpoints in [&[f.local_endpoint()][..], &[]] {
            let world = World::new(&f.load_balancer("", endpoints)).unwrap();
            let calls = [
                (Hook::PodIn, f.other_pod, f.cluster_ip),
                (Hook::UplinkIn, f.client, f.cluster_ip),
                (Hook::UplinkIn, f.client, f.lb_ip),
                (Hook::Xdp, f.client, f.external_ip),
                (Hook::UplinkOut, f.node, f.cluster_ip),
            ];
            for (hook, from, to) in calls {
                let sent = |flags| tcp_packet((from, 9_999), (to, 80), flags);
                expect_drop(&world, hook, &sent(tcp::RST), Reason::StrayReset);
                expect_drop(&world, hook, &sent(tcp::SYN | tcp::ACK), Reason::StrayAnswer);
            }
            assert_eq!(world.flow_counts().unwrap(), [0, 0, 0]);
        }
    });
}

/// P22, S6: of SCTP only an INIT begins a flow.
#[test]
fn of_sctp_only_what_opens_an_association_begins_a_flow() {
    for_both(|f| {
        let yaml = f.load_balancer("", &[f.local_endpoint()]).replace("UDP", "SCTP");
        let world = World::new(&yaml).unwrap();
        /// Chunks: DATA, INIT ACK, ABORT, SHUTDOWN, COOKIE ECHO, SHUTDOWN COMPLETE.
        const CHUNKS: [u8; 6] = [0, 2, ABORT, 7, 10, 14];
        const ABORT: u8 = 6;
        const INIT: u8 = 1;
        for chunk in CHUNKS {
            let packet = |to| sctp_packet((f.client, 9_999), to, 7, chunk, &[0; 16]);
            for hook in FROM_NETWORK {
                expect_untouched(&world, hook, &packet((f.node, 30_080)));
                let why = if chunk == ABORT { Reason::StrayReset } else { Reason::StrayAnswer };
                expect_drop(&world, hook, &packet((f.lb_ip, 80)), why);
            }
        }
        assert_eq!(world.flow_counts().unwrap(), [0, 0, 0]);
        let opens = sctp_packet((f.client, 9_999), (f.node, 30_080), 0, INIT, &[1; 16]);
        let out = world.send(Hook::UplinkIn, &opens).unwrap();
        assert_eq!(out.packet, opens.to(f.pod, 8080).bytes());
    });
}

/// P22, C3: what goes on where no flow is known was picked up in its middle, as conntrack does it: after a boot, or an idle day.
#[test]
fn a_connection_of_nobody_is_picked_up_in_its_middle() {
    for_both(|f| {
        let yaml = f.load_balancer("", &[f.local_endpoint()]);
        for (hook, from, to) in [
            (Hook::PodIn, f.other_pod, (f.cluster_ip, 80)),
            (Hook::UplinkIn, f.client, (f.lb_ip, 80)),
            (Hook::Xdp, f.client, (f.external_ip, 80)),
            (Hook::UplinkIn, f.client, (f.node, 30_080)),
            (Hook::Xdp, f.client, (f.node, 30_080)),
        ] {
            let world = World::new(&yaml).unwrap();
            let sent = tcp_packet((from, 40_000), to, tcp::ACK);
            let out = sent.clone().to(f.pod, 8080);
            expect(&world, hook, &sent, Verdict::Pass, &out, &f.counted_in(20, true));
        }
    });
}

/// A connection's packets there and back: what leaves the node's port 30080, and what answers that.
fn exchange(f: &Family, far: &str, udp: bool) -> (Packet, Vec<Packet>) {
    let (own, far) = ((f.node, 30_080), (far, 9_999));
    if udp {
        return (udp_packet(own, far, b"question"), vec![udp_packet(far, own, b"answer")]);
    }
    let answers = [tcp::SYN | tcp::ACK, tcp::ACK, tcp::FIN | tcp::ACK, tcp::RST | tcp::ACK];
    (tcp_packet(own, far, tcp::SYN), answers.map(|flags| tcp_packet(far, own, flags)).to_vec())
}

/// P22, Z4: a pod's connection that is masqueraded to the number of a node port, or one of the node's own from there. All others
/// that call the node port are served.
#[test]
fn what_answers_a_connection_of_others_from_a_node_port_passes() {
    for_both(|f| {
        let yaml = f.web("", &[f.local_endpoint()]);
        for (out, backs, far) in
            [(Hook::UplinkOut, &FROM_NETWORK[..], f.client), (Hook::PodOut, &[Hook::PodIn][..], f.other_pod)]
        {
            for (udp, payload) in [(false, 20), (true, 14)] {
                for back in backs {
                    let world = World::new(&yaml).unwrap();
                    let (sent, answers) = exchange(f, far, udp);
                    expect_untouched(&world, out, &sent);
                    answers.iter().for_each(|answer| expect_untouched(&world, *back, answer));
                    let error = icmp_error(far, &sent, f.port_unreachable, 0);
                    expect_untouched(&world, *back, &error);
                    assert_eq!(world.flow_counts().unwrap(), [0, 0, 0]);
                    let others = answers[usize::from(!udp)].clone().from(far, 10_000);
                    let to_endpoint = others.clone().to(f.pod, 8080);
                    expect(&world, *back, &others, Verdict::Pass, &to_endpoint, &f.counted_in(payload, true));
                }
            }
        }
    });
}

/// P22, P20: an answer in fragments.
#[test]
fn a_fragmented_answer_to_others_passes() {
    for_both(|f| {
        for hook in FROM_NETWORK {
            let world = World::new(&f.web("", &[f.local_endpoint()])).unwrap();
            expect_untouched(&world, Hook::UplinkOut, &exchange(f, f.client, true).0);
            let answer = udp_packet((f.client, 9_999), (f.node, 30_080), &[0x5a; 100]);
            answer.fragments(PIECE).iter().for_each(|fragment| expect_untouched(&world, hook, fragment));
        }
    });
}

/// P22: what the programs translate leaves from node ports as well, and is no connection of others.
#[test]
fn what_leaves_a_node_port_for_the_client_of_a_flow_is_not_of_others() {
    for_both(|f| {
        let world = World::new(&f.web("", &[f.remote_endpoint()])).unwrap();
        let sent = udp_packet((f.client, 40_000), (f.node, 30_080), b"question");
        let port = f.source_port(&world.send(Hook::UplinkIn, &sent).unwrap().packet);
        let reply = udp_packet((f.remote, 8080), (f.node, port), b"answer");
        let restored = reply.clone().from(f.node, 30_080).to(f.client, 40_000).ttl(63);
        expect(&world, Hook::UplinkIn, &reply, Verdict::Redirect, &restored, &f.counted_out(14));
        expect_untouched(&world, Hook::UplinkOut, &restored);
        // Nor is the answer to what could not be served.
        expect_untouched(
            &world,
            Hook::UplinkOut,
            &tcp_packet((f.node, 30_080), (f.client, 40_000), tcp::RST),
        );
        assert_eq!(world.outgoing().unwrap(), 0);
    });
}

/// P22: a connection of a socket of the node, of which nothing was seen to leave; a socket that only listens has none.
#[test]
fn a_connection_that_a_socket_of_the_node_has_is_left_to_it() {
    for_both(|f| {
        let world = World::new(&f.web("", &[f.local_endpoint()])).unwrap();
        // The far end is in this namespace, as the test runs in one alone.
        let address = if f.header == 20 {
            format!("addr add {}/32 dev lo", f.client)
        } else {
            format!("addr add {}/128 dev lo nodad", f.client)
        };
        let added = Command::new("ip").args(address.split_whitespace()).status().unwrap();
        assert!(added.success());
        let listener = TcpListener::bind((ip(f.node), 30_080)).unwrap();
        let far = SocketAddr::from((ip(f.client), 9_999));
        let client = socket2::Socket::new(socket2::Domain::for_address(far), socket2::Type::STREAM, None);
        let client = client.unwrap();
        client.bind(&far.into()).unwrap();
        client.connect(&listener.local_addr().unwrap().into()).unwrap();
        let (_connection, peer) = listener.accept().unwrap();
        assert_eq!(peer, far);
        for hook in FROM_NETWORK {
            let goes_on = tcp_packet((f.client, far.port()), (f.node, 30_080), tcp::ACK);
            expect_untouched(&world, hook, &goes_on);
            let sent = tcp_packet((f.client, 10_000 + hook as u16), (f.node, 30_080), tcp::ACK);
            let out = sent.clone().to(f.pod, 8080);
            expect(&world, hook, &sent, Verdict::Pass, &out, &f.counted_in(20, true));
        }
    });
}

/// C4, P12: an endpoint's SYN-ACK to a translated port whose flow is closing answers somebody else, who is masqueraded to that
/// port; so does a client's to the node port.
#[test]
fn a_closing_flow_with_a_translated_source_ends_when_another_connection_is_accepted() {
    for_both(|f| {
        for hook in FROM_NETWORK {
            for from_endpoint in [true, false] {
                let world = World::new(&f.web("", &[f.remote_endpoint()])).unwrap();
                let client = |flags| tcp_packet((f.client, 40_000), (f.node, 30_080), flags);
                let port = f.source_port(&world.send(hook, &client(tcp::SYN)).unwrap().packet);
                let endpoint = |flags| tcp_packet((f.remote, 8080), (f.node, port), flags);
                world.send(hook, &endpoint(tcp::SYN | tcp::ACK).numbers(5_000, 1_001)).unwrap();
                world.send(hook, &client(tcp::ACK).numbers(1_001, 5_001)).unwrap();
                world.send(hook, &client(tcp::RST).numbers(1_001, 5_001)).unwrap();
                assert_eq!(world.flow_counts().unwrap(), [0, 0, 2]);
                let accepts = tcp::SYN | tcp::ACK;
                let another = if from_endpoint { endpoint(accepts) } else { client(accepts) };
                expect_untouched(&world, hook, &another);
                assert_eq!(world.flow_counts().unwrap(), [0, 0, 0]);
            }
        }
    });
}
