//! Session affinity (S1).

use dataplane_tests::packet::build::{Packet, ip, tcp, tcp_packet, udp_packet};
use dataplane_tests::packet::family::V4;
use dataplane_tests::packet::{Hook, Verdict, World, in_namespace};
use std::collections::BTreeSet;
use std::net::IpAddr;
use std::time::Duration;

const POD_CLIENT: &str = V4.other_pod;
const MANY: u16 = 24;

/// Endpoints in pods of this node, which keep every client's source.
fn endpoints(last_bytes: &[u8]) -> Vec<(String, &'static str, &'static str)> {
    last_bytes.iter().map(|last| (format!("10.244.1.{last}"), "here", "ready: true")).collect()
}

fn yaml(spec: &str, endpoints: &[(String, &str, &str)]) -> String {
    let endpoints: Vec<_> = endpoints.iter().map(|(addr, node, is)| (addr.as_str(), *node, *is)).collect();
    V4.load_balancer(spec, &endpoints)
}

fn affine(seconds: u32, last_bytes: &[u8]) -> String {
    let config = format!("sessionAffinityConfig: {{clientIP: {{timeoutSeconds: {seconds}}}}}");
    yaml(&format!("sessionAffinity: ClientIP\n  {config}"), &endpoints(last_bytes))
}

const SIX: &[u8] = &[101, 102, 103, 104, 105, 106];

/// Who gets a packet.
#[track_caller]
fn endpoint(world: &World, hook: Hook, sent: &Packet) -> IpAddr {
    let outcome = world.send(hook, sent).unwrap();
    assert!(matches!(outcome.verdict, Verdict::Pass | Verdict::Redirect), "{:?}", outcome.moved);
    V4.destination(&outcome.packet)
}

/// Who get new connections from a client, by its ports from `first` on.
#[track_caller]
fn spread(world: &World, hook: Hook, client: &str, to: (&str, u16), first: u16) -> BTreeSet<IpAddr> {
    let new = |port| tcp_packet((client, port), to, tcp::SYN);
    (first..first + MANY).map(|port| endpoint(world, hook, &new(port))).collect()
}

/// S1: one endpoint for all addresses of the port and all connections of a client, each client its own.
#[test]
fn a_client_comes_back_to_its_endpoint_by_every_address() {
    in_namespace(|| {
        let world = World::new(&affine(100, SIX)).unwrap();
        let mine = spread(&world, Hook::UplinkIn, V4.client, (V4.node, 30_080), 40_000);
        assert_eq!(mine.len(), 1);
        assert_eq!(spread(&world, Hook::Xdp, V4.client, (V4.lb_ip, 80), 41_000), mine);
        assert_eq!(spread(&world, Hook::UplinkIn, V4.client, (V4.external_ip, 80), 42_000), mine);
        let all: BTreeSet<_> = (1..40)
            .flat_map(|last| {
                spread(&world, Hook::UplinkIn, &format!("203.0.113.{last}"), (V4.node, 30_080), 40_000)
            })
            .collect();
        assert_eq!(all.len(), SIX.len());
        assert_eq!(spread(&world, Hook::PodIn, POD_CLIENT, (V4.cluster_ip, 80), 40_000).len(), 1);
    });
}

/// S1: not across ports.
#[test]
fn another_port_of_the_service_has_its_own_choice() {
    in_namespace(|| {
        let world = World::new(&affine(100, SIX)).unwrap();
        let differs = (1..20).any(|last| {
            let client = format!("203.0.113.{last}");
            let by_tcp = tcp_packet((&client, 40_000), (V4.node, 30_080), tcp::SYN);
            let by_udp = udp_packet((&client, 40_000), (V4.node, 30_080), b"q");
            endpoint(&world, Hook::UplinkIn, &by_tcp) != endpoint(&world, Hook::UplinkIn, &by_udp)
        });
        assert!(differs);
    });
}

/// S1: with P4 the client's own address counts, although the endpoint sees the node's; P12: each connection by its own port.
#[test]
fn a_client_whose_source_is_translated_comes_back_too() {
    in_namespace(|| {
        let far: Vec<_> = (1..=6).map(|n| (format!("10.244.2.{n}"), "there", "ready: true")).collect();
        let world = World::new(&yaml("sessionAffinity: ClientIP", &far)).unwrap();
        let new = |port| tcp_packet((V4.client, port), (V4.node, 30_080), tcp::SYN);
        let owners: BTreeSet<_> =
            (40_000..40_008).map(|port| endpoint(&world, Hook::UplinkIn, &new(port))).collect();
        assert_eq!(owners.len(), 1);
    });
}

/// S1: the time runs from the last new connection, not from packets, and acts live when it changes.
#[test]
fn affinity_ends_when_no_connection_was_made_for_its_time() {
    in_namespace(|| {
        let mut moved = BTreeSet::new();
        let mut world = World::new(&affine(1, SIX)).unwrap();
        let first = tcp_packet((V4.client, 39_000), (V4.node, 30_080), tcp::SYN);
        let refreshed = endpoint(&world, Hook::UplinkIn, &first);
        for port in 39_001..39_005 {
            std::thread::sleep(Duration::from_millis(400));
            let sent = tcp_packet((V4.client, port), (V4.node, 30_080), tcp::SYN);
            assert_eq!(endpoint(&world, Hook::UplinkIn, &sent), refreshed, "a new connection refreshes");
        }
        for round in 0..6 {
            let to = spread(&world, Hook::UplinkIn, V4.client, (V4.node, 30_080), 40_000 + round * MANY);
            assert_eq!(to.len(), 1, "round {round}");
            moved.extend(to);
            for _ in 0..3 {
                std::thread::sleep(Duration::from_millis(400));
                // The flow's own packets refresh nothing.
                endpoint(
                    &world,
                    Hook::UplinkIn,
                    &tcp_packet((V4.client, 39_000), (V4.node, 30_080), tcp::ACK),
                );
            }
        }
        assert!(moved.len() > 1, "each round was free to choose anew: {moved:?}");
        world.apply(&affine(100, SIX)).unwrap();
        let again = spread(&world, Hook::UplinkIn, V4.client, (V4.node, 30_080), 50_000);
        std::thread::sleep(Duration::from_millis(1_300));
        assert_eq!(
            spread(&world, Hook::UplinkIn, V4.client, (V4.node, 30_080), 51_000),
            again,
            "a longer time acts live"
        );
    });
}

/// S1, C4: whoever has had a connection is remembered, however many others are said to have called. Anybody can say it.
#[test]
fn forged_calls_make_no_client_forget_its_endpoint() {
    /// More than there is room for of either kind, several times.
    const FORGED: u32 = 12_000;
    const ROOM: u32 = 1_024;
    in_namespace(|| {
        let sizes = [("affinity", ROOM), ("affinity_new", ROOM)];
        let world = World::with(&affine(1_000, SIX), 0, &sizes).unwrap();
        let client = |n: u32| format!("203.0.113.{}", n + 1);
        let (to, lb) = ((V4.cluster_ip, 80), (V4.lb_ip, 80));
        let syn = |from: &str, port| tcp_packet((from, port), to, tcp::SYN).numbers(1_000, 0);
        let mut had = Vec::new();
        for n in 0..40 {
            let (from, by_udp) = (client(n), client(100 + n));
            let own = endpoint(&world, Hook::PodIn, &syn(&from, 40_000));
            let answer = tcp_packet((&own.to_string(), 8080), (&from, 40_000), tcp::SYN | tcp::ACK);
            world.send(Hook::PodOut, &answer.numbers(5_000, 1_001)).unwrap();
            let proof = tcp_packet((&from, 40_000), to, tcp::ACK).numbers(1_001, 5_001);
            assert_eq!(endpoint(&world, Hook::PodIn, &proof), own);
            let asks = udp_packet((&by_udp, 40_000), lb, b"?");
            let other = endpoint(&world, Hook::PodIn, &asks);
            let answer = udp_packet((&other.to_string(), 8080), (&by_udp, 40_000), b"!");
            world.send(Hook::PodOut, &answer).unwrap();
            world.send(Hook::PodIn, &asks).unwrap();
            had.push((own, other));
        }
        for n in 0..FORGED {
            let from = format!("198.18.{}.{}", n >> 8, n & 0xff);
            world.time(Hook::PodIn, &syn(&from, 40_000).bytes()).unwrap();
        }
        let again: Vec<_> = (0..40)
            .map(|n| {
                let asks = udp_packet((&client(100 + n), 41_000), lb, b"?");
                (
                    endpoint(&world, Hook::PodIn, &syn(&client(n), 41_000)),
                    endpoint(&world, Hook::PodIn, &asks),
                )
            })
            .collect();
        assert_eq!(again, had);
    });
}

/// S1: switching acts live, both ways.
#[test]
fn affinity_is_switched_on_and_off_live() {
    in_namespace(|| {
        let mut world = World::new(&yaml("sessionAffinity: None", &endpoints(SIX))).unwrap();
        assert!(spread(&world, Hook::UplinkIn, V4.client, (V4.node, 30_080), 40_000).len() > 1);
        world.apply(&affine(100, SIX)).unwrap();
        assert_eq!(spread(&world, Hook::UplinkIn, V4.client, (V4.node, 30_080), 41_000).len(), 1);
        world.apply(&yaml("sessionAffinity: None", &endpoints(SIX))).unwrap();
        assert!(spread(&world, Hook::UplinkIn, V4.client, (V4.node, 30_080), 42_000).len() > 1);
    });
}

/// S1: the endpoint left the set, whether it is gone or drains: another is the client's from then on. T5, C1.
#[test]
fn a_client_whose_endpoint_left_the_set_gets_another_and_keeps_it() {
    in_namespace(|| {
        let mut world = World::new(&affine(100, SIX)).unwrap();
        for (gone, client) in [(true, V4.client), (false, "203.0.113.7")] {
            let old =
                endpoint(&world, Hook::UplinkIn, &tcp_packet((client, 40_000), (V4.node, 30_080), tcp::SYN));
            let spec = "sessionAffinity: ClientIP";
            let mut left = endpoints(SIX);
            if gone {
                left.retain(|(addr, ..)| ip(addr) != old);
            } else {
                let drains = left.iter_mut().find(|(addr, ..)| ip(addr) == old).unwrap();
                drains.2 = "ready: false, serving: true, terminating: true";
            }
            world.apply(&yaml(spec, &left)).unwrap();
            let new = spread(&world, Hook::UplinkIn, client, (V4.node, 30_080), 41_000);
            assert_eq!(new.len(), 1);
            assert!(!new.contains(&old));
            world.apply(&yaml(spec, &endpoints(SIX))).unwrap();
            assert_eq!(
                spread(&world, Hook::UplinkIn, client, (V4.node, 30_080), 42_000),
                new,
                "it has moved for good"
            );
        }
    });
}

/// S1, C1: a UDP flow that is re-balanced takes the client with it.
#[test]
fn a_rebalanced_datagram_moves_the_client() {
    in_namespace(|| {
        let mut world = World::new(&affine(100, SIX)).unwrap();
        let question = |port| udp_packet((V4.client, port), (V4.node, 30_080), b"q");
        let old = endpoint(&world, Hook::UplinkIn, &question(40_000));
        let left: Vec<_> =
            SIX.iter().copied().filter(|last| old != ip(&format!("10.244.1.{last}"))).collect();
        world.apply(&affine(100, &left)).unwrap();
        let new = endpoint(&world, Hook::UplinkIn, &question(40_000));
        assert_ne!(new, old);
        for port in 40_001..40_012 {
            assert_eq!(endpoint(&world, Hook::UplinkIn, &question(port)), new);
        }
    });
}

/// S1: policies filter first: an endpoint elsewhere is nobody's where the policy asks for local ones.
#[test]
fn a_policy_goes_before_affinity() {
    in_namespace(|| {
        let mut mixed = endpoints(&[101]);
        mixed.push(("10.244.2.9".into(), "there", "ready: true"));
        let spec = "externalTrafficPolicy: Local\n  sessionAffinity: ClientIP";
        let world = World::new(&yaml(spec, &mixed)).unwrap();
        for client in 1..=6 {
            let client = format!("203.0.113.{client}");
            // From outside by ClusterIP any endpoint may be had (P10), by node port the local one only (P7).
            endpoint(&world, Hook::UplinkIn, &tcp_packet((&client, 40_000), (V4.cluster_ip, 80), tcp::SYN));
            let to =
                endpoint(&world, Hook::UplinkIn, &tcp_packet((&client, 40_001), (V4.node, 30_080), tcp::SYN));
            assert_eq!(to, ip("10.244.1.101"));
        }
    });
}
