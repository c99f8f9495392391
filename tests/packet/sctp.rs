//! SCTP by packets with a right CRC32c: there and back, its life, and its refusals (S6, P1, P3, P13, F7).

use crate::{expect, expect_drop, expect_untouched};
use dataplane_common::drop::Reason;
use dataplane_tests::packet::build::{Packet, icmp_error, sctp_packet, tcp, tcp_packet};
use dataplane_tests::packet::family::{Family, for_both};
use dataplane_tests::packet::{Hook, Verdict, World, reason};

const INIT: u8 = 1;
const INIT_ACK: u8 = 2;
const ABORT: u8 = 6;
const SHUTDOWN: u8 = 7;
const SHUTDOWN_ACK: u8 = 8;
const COOKIE_ECHO: u8 = 10;
const DATA: u8 = 0;
const SHUTDOWN_COMPLETE: u8 = 14;

const CLIENT_TAG: u32 = 0x1111_2222;
const ENDPOINT_TAG: u32 = 0xaaaa_bbbb;

/// The Service with an SCTP port 80 in the place of the UDP one.
fn sctp_web(f: &Family, spec: &str, endpoints: &[(&str, &str, &str)]) -> String {
    f.web(spec, endpoints).replace("protocol: UDP", "protocol: SCTP")
}

/// Initiate tag, window, streams out and in, first number.
fn init(tag: u32) -> Vec<u8> {
    [&tag.to_be_bytes()[..], &[0, 1, 0, 0, 0, 10, 0, 10, 0, 0, 0, 1]].concat()
}

fn call(f: &Family) -> Packet {
    sctp_packet((f.pod, 40_000), (f.cluster_ip, 80), 0, INIT, &init(CLIENT_TAG))
}

fn from_client(f: &Family, tag: u32, chunk: u8, value: &[u8]) -> Packet {
    sctp_packet((f.pod, 40_000), (f.cluster_ip, 80), tag, chunk, value)
}

fn from_endpoint(f: &Family, chunk: u8, value: &[u8]) -> Packet {
    sctp_packet((f.remote, 8080), (f.pod, 40_000), CLIENT_TAG, chunk, value)
}

fn establish(f: &Family, world: &World) {
    world.send(Hook::PodIn, &call(f)).unwrap();
    world.send(Hook::PodOut, &from_endpoint(f, INIT_ACK, &init(ENDPOINT_TAG))).unwrap();
    world.send(Hook::PodIn, &from_client(f, ENDPOINT_TAG, COOKIE_ECHO, &[7; 32])).unwrap();
    assert_eq!(world.flow_counts().unwrap(), [0, 2, 0]);
}

/// S6, P9: only the ports change behind the addresses, and the CRC32c with them; packets of many lengths.
#[test]
fn an_sctp_packet_is_translated_and_restored_with_a_right_crc() {
    for_both(|f| {
        let world = World::new(&sctp_web(f, "", &[f.remote_endpoint()])).unwrap();
        let out = call(f).to(f.remote, 8080);
        expect(&world, Hook::PodIn, &call(f), Verdict::Pass, &out, &f.counted_in(32, true));
        let reply = from_endpoint(f, INIT_ACK, &init(ENDPOINT_TAG));
        let restored = reply.clone().from(f.cluster_ip, 80);
        expect(&world, Hook::PodOut, &reply, Verdict::Pass, &restored, &f.counted_out(32));
        for length in [0, 4, 8, 240, 244, 256, 1_000, 1_400] {
            let sent = from_client(f, ENDPOINT_TAG, DATA, &vec![0x5a; length]);
            let out = sent.clone().to(f.remote, 8080);
            let bytes = 16 + length as u64;
            expect(&world, Hook::PodIn, &sent, Verdict::Pass, &out, &f.counted_in(bytes, false));
        }
    });
}

/// S6, P4, P12: with an endpoint on another node, in tc and XDP.
#[test]
fn an_sctp_node_port_with_a_remote_endpoint_translates_both_ends() {
    for_both(|f| {
        for hook in [Hook::UplinkIn, Hook::Xdp] {
            let world = World::new(&sctp_web(f, "", &[f.remote_endpoint()])).unwrap();
            let sent = sctp_packet((f.client, 40_000), (f.node, 30_080), 0, INIT, &init(CLIENT_TAG));
            let outcome = world.send(hook, &sent).unwrap();
            assert_eq!(outcome.verdict, hook.sent_on());
            let port = f.source_port(&outcome.packet);
            let out = sent.clone().from(f.node, port).to(f.remote, 8080).ttl(63);
            assert_eq!(outcome.packet[14..], out.bytes()[14..]);
            let reply =
                sctp_packet((f.remote, 8080), (f.node, port), CLIENT_TAG, INIT_ACK, &init(ENDPOINT_TAG));
            let restored = reply.clone().from(f.node, 30_080).to(f.client, 40_000).ttl(63);
            let outcome = world.send(hook, &reply).unwrap();
            assert_eq!(outcome.verdict, hook.sent_on());
            assert_eq!(outcome.packet[14..], restored.bytes()[14..]);
        }
    });
}

/// S6, P4: with an endpoint on this node the client is kept.
#[test]
fn an_sctp_node_port_with_a_local_endpoint_keeps_the_source() {
    for_both(|f| {
        let world = World::new(&sctp_web(f, "", &[f.local_endpoint()])).unwrap();
        let sent = sctp_packet((f.client, 40_000), (f.node, 30_080), 0, INIT, &init(CLIENT_TAG));
        let out = sent.clone().to(f.pod, 8080);
        expect(&world, Hook::Xdp, &sent, Verdict::Pass, &out, &f.counted_in(32, true));
        let reply = sctp_packet((f.pod, 8080), (f.client, 40_000), CLIENT_TAG, INIT_ACK, &init(ENDPOINT_TAG));
        let restored = reply.clone().from(f.node, 30_080);
        expect(&world, Hook::UplinkOut, &reply, Verdict::Pass, &restored, &f.counted_out(32));
    });
}

/// C4, S6: the client's proof is the tag that the INIT ACK asked for.
#[test]
fn an_association_is_established_by_the_endpoints_tag_alone() {
    for_both(|f| {
        let world = World::new(&sctp_web(f, "", &[f.remote_endpoint()])).unwrap();
        world.send(Hook::PodIn, &call(f)).unwrap();
        world.send(Hook::PodIn, &from_client(f, ENDPOINT_TAG, COOKIE_ECHO, &[7; 32])).unwrap();
        assert_eq!(world.flow_counts().unwrap(), [2, 0, 0], "nothing was answered yet");
        world.send(Hook::PodOut, &from_endpoint(f, INIT_ACK, &init(ENDPOINT_TAG))).unwrap();
        world.send(Hook::PodIn, &from_client(f, 0x1234_5678, COOKIE_ECHO, &[7; 32])).unwrap();
        assert_eq!(world.flow_counts().unwrap(), [2, 0, 0], "a guessed tag proves nothing");
        world.send(Hook::PodIn, &from_client(f, ENDPOINT_TAG, COOKIE_ECHO, &[7; 32])).unwrap();
        assert_eq!(world.flow_counts().unwrap(), [0, 2, 0]);
    });
}

/// S6: the endpoint accepts an association that the client asked itself for, from the ports of one to the Service that was aborted.
#[test]
fn a_port_that_is_used_again_without_the_service_is_left_alone() {
    for_both(|f| {
        let world = World::new(&sctp_web(f, "", &[f.remote_endpoint()])).unwrap();
        establish(f, &world);
        world.send(Hook::PodOut, &from_endpoint(f, ABORT, &[])).unwrap();
        expect_untouched(&world, Hook::PodOut, &from_endpoint(f, INIT_ACK, &init(ENDPOINT_TAG)));
        assert_eq!(world.flow_counts().unwrap(), [0, 0, 0]);
    });
}

/// C4, S6
#[test]
fn an_association_closes_by_shutdown_or_abort() {
    for_both(|f| {
        let world = World::new(&sctp_web(f, "", &[f.remote_endpoint()])).unwrap();
        establish(f, &world);
        world.send(Hook::PodIn, &from_client(f, ENDPOINT_TAG, SHUTDOWN, &[0; 4])).unwrap();
        assert_eq!(world.flow_counts().unwrap(), [0, 2, 0], "half-closed is not closed");
        world.send(Hook::PodOut, &from_endpoint(f, SHUTDOWN_ACK, &[])).unwrap();
        assert_eq!(world.flow_counts().unwrap(), [0, 0, 2]);
        let last = from_client(f, ENDPOINT_TAG, SHUTDOWN_COMPLETE, &[]);
        let out = last.clone().to(f.remote, 8080);
        expect(&world, Hook::PodIn, &last, Verdict::Pass, &out, &f.counted_in(16, false));
        establish(f, &world);
        let abort = from_endpoint(f, ABORT, &[]);
        let restored = abort.clone().from(f.cluster_ip, 80);
        expect(&world, Hook::PodOut, &abort, Verdict::Pass, &restored, &f.counted_out(16));
        assert_eq!(world.flow_counts().unwrap(), [0, 0, 2]);
        // Its half-open flow leaves nothing behind when the endpoint refuses.
        world.send(Hook::PodIn, &call(f)).unwrap();
        world.send(Hook::PodOut, &from_endpoint(f, ABORT, &[])).unwrap();
        assert_eq!(world.flow_counts().unwrap(), [0, 0, 0]);
    });
}

/// C2, S6: an established association is left to an endpoint that is gone; a new one is not.
#[test]
fn an_association_stays_with_its_endpoint() {
    for_both(|f| {
        let mut world = World::new(&sctp_web(f, "", &[f.remote_endpoint()])).unwrap();
        establish(f, &world);
        world.apply(&sctp_web(f, "", &[(f.lost, "there", "ready: true")])).unwrap();
        let sent = from_client(f, ENDPOINT_TAG, DATA, &[1; 16]);
        let outcome = world.send(Hook::PodIn, &sent).unwrap();
        assert_eq!(outcome.packet, sent.to(f.remote, 8080).bytes());
        let outcome = world.send(Hook::PodIn, &call(f)).unwrap();
        assert_eq!(outcome.packet, call(f).to(f.lost, 8080).bytes());
    });
}

/// P1, P13: port unreachable, for each kind of address.
#[test]
fn sctp_to_nobody_meets_port_unreachable() {
    for_both(|f| {
        let world = World::new(&sctp_web(f, "", &[])).unwrap();
        let to_port = |dst, hook, src| (hook, sctp_packet(src, dst, 0, INIT, &init(CLIENT_TAG)));
        for (why, (hook, sent)) in [
            (Reason::NoEndpoints, to_port((f.cluster_ip, 80), Hook::PodIn, (f.pod, 40_000))),
            (Reason::NoEndpoints, to_port((f.node, 30_080), Hook::UplinkIn, (f.client, 40_000))),
            (Reason::NoEndpoints, to_port((f.cluster_ip, 80), Hook::UplinkOut, (f.node, 40_000))),
            (Reason::ClosedPort, to_port((f.cluster_ip, 81), Hook::PodIn, (f.pod, 40_000))),
        ] {
            let answer = icmp_error(&sent.dst.0.to_string(), &sent, f.port_unreachable, 0);
            expect(&world, hook, &sent, Verdict::Redirect, &answer, &reason(why));
        }
        let abort = from_client(f, ENDPOINT_TAG, ABORT, &[]);
        expect_drop(&world, Hook::PodIn, &abort, Reason::StrayReset);
        // F7: TCP on the same number is another port, and UDP is none.
        let tcp = tcp_packet((f.pod, 40_000), (f.cluster_ip, 80), tcp::SYN);
        assert_eq!(world.send(Hook::PodIn, &tcp).unwrap().verdict, Verdict::Redirect);
    });
}

/// P21, S6: what is cut short is dropped, and only where it is ours.
#[test]
fn sctp_cut_short_is_dropped_where_it_is_ours() {
    for_both(|f| {
        let world = World::new(&sctp_web(f, "", &[f.remote_endpoint()])).unwrap();
        let short = |dst| {
            let mut packet = sctp_packet((f.pod, 40_000), dst, 0, INIT, &[]);
            if let dataplane_tests::packet::build::Transport::Sctp { chunks, .. } = &mut packet.transport {
                chunks.truncate(2);
            }
            packet
        };
        expect_drop(&world, Hook::PodIn, &short((f.cluster_ip, 80)), Reason::Malformed);
        expect_untouched(&world, Hook::PodIn, &short((f.elsewhere, 80)));
    });
}
