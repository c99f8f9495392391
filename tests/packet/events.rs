//! What whoever watches is told: one record for each transition of a flow, and none where nobody watches.

use dataplane_common::drop::Reason;
use dataplane_common::event::{EVENTS, Ended, Event, EventKind, Place, Watch};
use dataplane_common::flow::Flow;
use dataplane_common::node::Prefix;
use dataplane_common::{Addr, Port};
use dataplane_tests::packet::build::{Packet, tcp, tcp_packet, udp_packet};
use dataplane_tests::packet::family::{Family, V4, for_both};
use dataplane_tests::packet::{Hook, World, in_namespace};
use dataplane_user::kernel::events::{EventRing, LEASE, Reader, Told};
use std::net::IpAddr;
use std::time::Duration;

const TCP: u8 = 6;
/// Where most of it happens.
const HOOKS: [Hook; 2] = [Hook::PodIn, Hook::PodOut];
const UPLINK: [Hook; 2] = [Hook::Xdp, Hook::UplinkIn];
/// Longer than an endpoint may be silent (L5).
const LATER: Duration = Duration::from_millis(900);

/// What a reader is told, in words: kind, place, reason, end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Said(EventKind, Place, Option<Reason>, Option<Ended>);

fn said(event: &Event) -> Said {
    let what = event.what;
    Said(what.kind().unwrap(), what.place().unwrap(), what.reason(), what.end())
}

fn told(reader: &mut Reader) -> Vec<Event> {
    let mut events = Vec::new();
    reader.read(|told| match told {
        Told::Event(event) => events.push(event),
        Told::Lost(lost) => panic!("{lost} were lost"),
    });
    events
}

fn addr(text: &str) -> Addr {
    Addr::from(text.parse::<IpAddr>().unwrap())
}

fn syn(f: &Family) -> Packet {
    tcp_packet((f.pod, 40_000), (f.cluster_ip, 80), tcp::SYN)
}

/// A TCP segment of the client's, and one of the endpoint's.
fn from_client(f: &Family, flags: u8, seq: u32, ack: u32) -> Packet {
    tcp_packet((f.pod, 40_000), (f.cluster_ip, 80), flags).numbers(seq, ack)
}

fn from_endpoint(f: &Family, flags: u8, seq: u32, ack: u32) -> Packet {
    tcp_packet((f.remote, 8080), (f.pod, 40_000), flags).numbers(seq, ack)
}

fn connect(f: &Family, world: &World) {
    world.send(Hook::PodIn, &syn(f)).unwrap();
    world.send(Hook::PodOut, &from_endpoint(f, tcp::SYN | tcp::ACK, 5_000, 1_001)).unwrap();
    world.send(Hook::PodIn, &from_client(f, tcp::ACK, 1_001, 5_001)).unwrap();
}

/// H7, C4: a connection is told when it begins, when it is established and when it has ended, with all that passed; its other packets are not.
#[test]
fn the_life_of_a_connection_is_told_at_its_transitions() {
    for_both(|f| {
        let world = World::new(&f.web("", &[f.remote_endpoint()])).unwrap();
        let mut reader = world.watch(&HOOKS).unwrap();
        connect(f, &world);
        for seq in 0..5 {
            world.send(Hook::PodIn, &from_client(f, tcp::ACK, 1_001 + seq, 5_001)).unwrap();
        }
        world.send(Hook::PodIn, &from_client(f, tcp::FIN | tcp::ACK, 1_001, 5_001)).unwrap();
        world.send(Hook::PodOut, &from_endpoint(f, tcp::FIN | tcp::ACK, 5_001, 1_002)).unwrap();
        world.send(Hook::PodIn, &from_client(f, tcp::ACK, 1_002, 5_002)).unwrap();
        let events = told(&mut reader);
        let all: Vec<_> = events.iter().map(said).collect();
        assert_eq!(
            all,
            [
                Said(EventKind::Begun, Place::PodIn, None, None),
                Said(EventKind::Established, Place::PodIn, None, None),
                Said(EventKind::Ended, Place::PodOut, None, Some(Ended::Closed)),
            ]
        );
        let [begun, established, ended] = events[..] else { panic!("three") };
        for event in [begun, established] {
            assert_eq!((event.key.src, event.key.dst), (addr(f.pod), addr(f.cluster_ip)));
            assert_eq!((event.dst, event.dst_port), (addr(f.remote), Port::new(8080)));
            assert_ne!((event.service, event.backend, event.interface), (0, 0, 0));
        }
        assert!(begun.time < established.time && established.time < ended.time);
        assert_eq!((begun.transport_flags, begun.sequence), (u16::from(tcp::SYN), 1_000));
        // The endpoint's FIN came last: it is told as it came.
        assert!(ended.is_reply());
        assert_eq!((ended.key.src, ended.src, ended.dst), (addr(f.remote), addr(f.cluster_ip), addr(f.pod)));
        let header = u64::from(begun.length);
        assert_eq!((ended.packets_in, ended.packets_out), (8, 2));
        assert_eq!((ended.bytes_in, ended.bytes_out), (8 * header, 2 * header));
    });
}

/// H7, C4: a reset, by an established connection's end and by an endpoint that refuses.
#[test]
fn a_reset_is_told_as_the_end_that_it_is() {
    for_both(|f| {
        let world = World::new(&f.web("", &[f.remote_endpoint()])).unwrap();
        connect(f, &world);
        let mut reader = world.watch(&HOOKS).unwrap();
        world.send(Hook::PodIn, &from_client(f, tcp::RST, 1_001, 0)).unwrap();
        let again = tcp_packet((f.pod, 40_001), (f.cluster_ip, 80), tcp::SYN);
        world.send(Hook::PodIn, &again).unwrap();
        let refusal = tcp_packet((f.remote, 8080), (f.pod, 40_001), tcp::RST | tcp::ACK).numbers(0, 1_001);
        world.send(Hook::PodOut, &refusal).unwrap();
        let all: Vec<_> = told(&mut reader).iter().map(said).collect();
        assert_eq!(
            all,
            [
                Said(EventKind::Ended, Place::PodIn, None, Some(Ended::Reset)),
                Said(EventKind::Begun, Place::PodIn, None, None),
                Said(EventKind::Ended, Place::PodOut, None, Some(Ended::Refused)),
            ]
        );
        assert_eq!(world.flow_counts().unwrap(), [0, 0, 2], "the refused one left nothing behind");
    });
}

/// H7, C4: where there is no room for another flow that is not established, one goes, and is told.
#[test]
fn a_flow_that_gives_its_room_away_is_told() {
    in_namespace(|| {
        let f = &V4;
        let yaml = f.web("", &[f.remote_endpoint()]);
        let world = World::with(&yaml, 0, &[("half_open", 8)]).unwrap();
        let mut reader = world.watch(&HOOKS).unwrap();
        for port in 40_000..40_009 {
            world.send(Hook::PodIn, &tcp_packet((f.pod, port), (f.cluster_ip, 80), tcp::SYN)).unwrap();
        }
        let events = told(&mut reader);
        let gone: Vec<_> = events.iter().filter(|event| said(event).0 == EventKind::Ended).collect();
        assert_eq!((events.len(), gone.len()), (10, 1));
        assert_eq!(said(gone[0]), Said(EventKind::Ended, Place::Room, None, Some(Ended::Displaced)));
        assert_eq!((gone[0].key.dst, gone[0].packets_in), (addr(f.cluster_ip), 1));
        assert_eq!(world.flow_counts().unwrap(), [16, 0, 0]);
    });
}

/// H7, P1, P2, P13: what is refused or dropped, where and why.
#[test]
fn what_is_refused_or_dropped_is_told_with_its_reason() {
    for_both(|f| {
        let world = World::new(&f.web("internalTrafficPolicy: Local", &[f.remote_endpoint()])).unwrap();
        let mut reader = world.watch(&[Hook::PodIn, Hook::UplinkIn]).unwrap();
        world.send(Hook::PodIn, &syn(f)).unwrap();
        world.send(Hook::PodIn, &tcp_packet((f.pod, 40_000), (f.cluster_ip, 81), tcp::SYN)).unwrap();
        world.send(Hook::UplinkIn, &udp_packet((f.client, 40_000), (f.node, 30_080), b"q")).unwrap();
        let events = told(&mut reader);
        let all: Vec<_> = events.iter().map(said).collect();
        assert_eq!(all[0], Said(EventKind::Dropped, Place::PodIn, Some(Reason::NoLocalEndpoints), None));
        assert_eq!(all[1], Said(EventKind::Refused, Place::PodIn, Some(Reason::ClosedPort), None));
        assert_eq!((events[1].key.dst_port, events[1].key.proto()), (Port::new(81), TCP));
        assert_eq!(all[2], Said(EventKind::Begun, Place::UplinkIn, None, None));
        assert_eq!(all.len(), 3);
    });
}

/// H7, L5, C1: a flow that is given to another endpoint.
#[test]
fn a_flow_that_moves_is_told_with_its_reason_and_its_new_endpoint() {
    for_both(|f| {
        let remotes: Vec<_> = (0..4).map(|n| f.nth_remote(n).to_string()).collect();
        let endpoints: Vec<_> = remotes.iter().map(|at| (at.as_str(), "there", "ready: true")).collect();
        let mut world = World::new(&f.web("", &endpoints)).unwrap();
        let question = udp_packet((f.pod, 40_000), (f.cluster_ip, 80), b"q");
        world.send(Hook::PodIn, &question).unwrap();
        world.send(Hook::PodIn, &syn(f)).unwrap();
        let mut reader = world.watch(&HOOKS).unwrap();
        std::thread::sleep(LATER);
        world.send(Hook::PodIn, &syn(f)).unwrap();
        let events = told(&mut reader);
        let all: Vec<_> = events.iter().map(said).collect();
        assert_eq!(all, [Said(EventKind::Moved, Place::PodIn, Some(Reason::MovedSilent), None)]);
        world
            .apply(&f.web("", &[f.remote_endpoint()].map(|_| (f.other_pod, "here", "ready: true"))))
            .unwrap();
        world.send(Hook::PodIn, &question).unwrap();
        let events = told(&mut reader);
        let all: Vec<_> = events.iter().map(said).collect();
        assert_eq!(all, [Said(EventKind::Moved, Place::PodIn, Some(Reason::Rebalanced), None)]);
        assert_eq!(events[0].dst, addr(f.other_pod));
    });
}

/// H7: XDP tells what it sends on, and leaves it to tc to tell of the rest.
#[test]
fn what_xdp_leaves_to_tc_is_told_once() {
    for_both(|f| {
        let world = World::new(&f.web("", &[f.remote_endpoint()])).unwrap();
        let mut reader = world.watch(&UPLINK).unwrap();
        let call = tcp_packet((f.client, 40_000), (f.node, 30_080), tcp::SYN);
        world.send(Hook::Xdp, &call).unwrap();
        let all: Vec<_> = told(&mut reader).iter().map(said).collect();
        assert_eq!(all, [Said(EventKind::Begun, Place::Xdp, None, None)]);
        let world = World::new(&f.web("", &[])).unwrap();
        let mut reader = world.watch(&UPLINK).unwrap();
        for hook in [Hook::Xdp, Hook::UplinkIn] {
            world.send(hook, &call).unwrap();
        }
        let all: Vec<_> = told(&mut reader).iter().map(said).collect();
        assert_eq!(all, [Said(EventKind::Refused, Place::UplinkIn, Some(Reason::NoEndpoints), None)]);
    });
}

/// H7: a reader that is gone, however it ended, tells nobody so: its lease ends, and with the last of them the word is 0 again.
#[test]
fn programs_tell_nothing_once_the_last_reader_is_gone() {
    in_namespace(|| {
        let f = &V4;
        let world = World::new(&f.web("", &[f.remote_endpoint()])).unwrap();
        let call = |port| world.send(Hook::PodIn, &tcp_packet((f.pod, port), (f.cluster_ip, 80), tcp::SYN));
        call(40_000).unwrap();
        assert_eq!(world.watch_state().unwrap().head, 0, "nobody watches");
        let [mut one, mut other] = [world.watch(&HOOKS).unwrap(), world.watch(&HOOKS).unwrap()];
        call(40_001).unwrap();
        assert_eq!((told(&mut one).len(), told(&mut other).len()), (1, 1), "each reads all");
        drop(one);
        std::thread::sleep(LEASE / 2);
        other.renew().unwrap();
        std::thread::sleep(LEASE / 2 + Duration::from_millis(200));
        call(40_002).unwrap();
        assert_eq!(told(&mut other).len(), 1, "one of them lives still");
        drop(other);
        std::thread::sleep(LEASE + Duration::from_millis(200));
        let Watch { head, until, .. } = world.watch_state().unwrap();
        assert!(until != 0 && head == 2);
        call(40_003).unwrap();
        let Watch { head, until, .. } = world.watch_state().unwrap();
        assert_eq!((until, head), (0, 2), "the first that finds it so notes it");
    });
}

/// H7: what comes faster than it is read is lost, and the reader knows how much.
#[test]
fn what_is_lost_is_counted() {
    in_namespace(|| {
        let f = &V4;
        let world = World::new(&f.web("", &[])).unwrap();
        let mut reader = world.watch(&HOOKS).unwrap();
        let more = 100;
        let refused = syn(f);
        for n in 0..EVENTS + more {
            if n % 500 == 0 {
                reader.renew().unwrap();
            }
            world.run_once(Hook::PodIn, &refused).unwrap();
        }
        let (mut lost, mut events) = (0, Vec::new());
        reader.read(|told| match told {
            Told::Event(event) => events.push(event),
            Told::Lost(count) => lost += count,
        });
        assert_eq!((lost, events.len()), (more as u64, EVENTS));
        assert!(events.windows(2).all(|pair| pair[0].turn + 1 == pair[1].turn));
        world.send(Hook::PodIn, &refused).unwrap();
        assert_eq!(told(&mut reader).len(), 1);
    });
}

/// H7: a turn that was taken and never written, as by a program whose slot another one had, holds readers up for a moment only.
#[test]
fn a_record_that_is_never_written_is_counted_as_lost() {
    in_namespace(|| {
        let f = &V4;
        let world = World::new(&f.web("", &[])).unwrap();
        let mut reader = world.watch(&HOOKS).unwrap();
        world.skip_turn().unwrap();
        world.send(Hook::PodIn, &syn(f)).unwrap();
        let read = |reader: &mut Reader| {
            let mut all = Vec::new();
            reader.read(|told| all.push(matches!(told, Told::Lost(1))));
            all
        };
        assert!(read(&mut reader).is_empty(), "it may be written in this moment");
        std::thread::sleep(Duration::from_millis(150));
        assert_eq!(read(&mut reader), [true, false]);
    });
}

/// H7: the packets of flows that somebody asks for are told at each hook, of no other flow, up to a number; and of none once nobody asks.
#[test]
fn the_packets_of_marked_flows_are_told_at_each_hook() {
    for_both(|f| {
        let world = World::new(&f.web("", &[f.remote_endpoint()])).unwrap();
        let mut reader = world.watch(&[Hook::PodIn, Hook::PodOut, Hook::UplinkIn]).unwrap();
        let bits = 128;
        reader.want_packets(Prefix::new(addr(f.pod), bits), 0).unwrap();
        connect(f, &world);
        for _ in 0..3 {
            world.send(Hook::PodIn, &from_client(f, tcp::ACK, 1_001, 5_001)).unwrap();
        }
        let other = |flags| tcp_packet((f.client, 40_000), (f.node, 30_080), flags);
        world.send(Hook::UplinkIn, &other(tcp::SYN)).unwrap();
        world.send(Hook::UplinkIn, &other(tcp::ACK)).unwrap();
        let events = told(&mut reader);
        let kinds: Vec<_> = events.iter().map(|event| said(event).0).collect();
        let packet = EventKind::Packet;
        assert_eq!(
            kinds,
            [EventKind::Begun, packet, EventKind::Established, packet, packet, packet, EventKind::Begun]
        );
        assert_eq!(said(&events[1]).1, Place::PodOut);
        assert!(events[1].is_reply() && events[1].transport_flags == u16::from(tcp::SYN | tcp::ACK));
        for _ in 0..1_100 {
            world.run_once(Hook::PodIn, &from_client(f, tcp::ACK, 1_001, 5_001)).unwrap();
        }
        assert_eq!(told(&mut reader).len() as u64, 1_000 - 4, "no more than that between two renewals");
        assert_eq!(reader.missed_packets(), 1_100 - (1_000 - 4));
        drop(reader);
        std::thread::sleep(LEASE + Duration::from_millis(200));
        let marked =
            || world.flows().unwrap().concat().iter().filter(|(_, it)| it.has(Flow::WATCHED)).count();
        assert_eq!(marked(), 2);
        world.send(Hook::PodIn, &from_client(f, tcp::ACK, 1_001, 5_001)).unwrap();
        assert_eq!(marked(), 1, "the half of the next packet costs nothing more");
    });
}

/// H7: there is room for four readers who want packets; one that is gone leaves its own.
#[test]
fn marks_are_shared_by_as_many_readers_as_there_is_room_for() {
    in_namespace(|| {
        let world = World::new(&V4.web("", &[])).unwrap();
        let wants = |n: u32| {
            let mut reader = world.watch(&HOOKS).unwrap();
            reader.want_packets(Prefix::new(addr(V4.pod), 128), n).map(|()| reader)
        };
        let readers: Vec<_> = (1..=4).map(|n| wants(n).unwrap()).collect();
        assert!(wants(5).is_err());
        drop(readers);
        std::thread::sleep(LEASE + Duration::from_millis(100));
        assert!(wants(6).is_ok());
    });
}

/// H7: the agent's sweep writes to the ring as well.
#[test]
fn the_agent_writes_to_the_same_ring() {
    in_namespace(|| {
        let world = World::new(&V4.web("", &[])).unwrap();
        let mut reader = world.watch(&HOOKS).unwrap();
        let ring = EventRing::open(world.maps()).unwrap();
        assert!(ring.is_on());
        let what = dataplane_common::event::What::ended(Ended::Idle).at(Place::Sweep);
        ring.write(&Event { what, bytes_in: 7, ..dataplane_user::kernel::events::record() });
        world.send(Hook::PodIn, &syn(&V4)).unwrap();
        let events = told(&mut reader);
        let all: Vec<_> = events.iter().map(said).collect();
        assert_eq!(all[0], Said(EventKind::Ended, Place::Sweep, None, Some(Ended::Idle)));
        assert_eq!((all.len(), all[1].0, events[0].bytes_in), (2, EventKind::Refused, 7));
    });
}
