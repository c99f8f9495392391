//! Second tries: a SYN that comes again unanswered goes to another endpoint (L5).

use dataplane_common::drop::Reason;
use dataplane_tests::packet::build::{Packet, ip, tcp, tcp_packet};
use dataplane_tests::packet::family::{Family, V4, for_both};
use dataplane_tests::packet::{Hook, Verdict, World};
use std::collections::BTreeSet;
use std::net::IpAddr;
use std::time::Duration;

/// Longer than an endpoint may be silent.
const LATER: Duration = Duration::from_millis(900);

fn yaml(family: &Family, retry: Option<&str>, spec: &str, endpoints: &[(String, &str)]) -> String {
    let endpoints: Vec<_> = endpoints.iter().map(|(at, node)| (at.as_str(), *node, "ready: true")).collect();
    let annotation =
        retry.map_or(String::new(), |n| format!(", annotations: {{service.portolan.dev/retry: '{n}'}}"));
    let with = format!("namespace: default{annotation}}}");
    family.load_balancer(spec, &endpoints).replacen("namespace: default}", &with, 1)
}

fn pods(family: &Family, count: u32) -> Vec<(String, &'static str)> {
    let range = family.pod.rsplit_once(['.', ':']).map_or("", |(range, _)| range);
    let dot = if *family == V4 { "." } else { ":" };
    (1..=count).map(|n| (format!("{range}{dot}{}", 100 + n), "here")).collect()
}

fn syn(family: &Family, port: u16) -> Packet {
    tcp_packet((family.client, port), (family.lb_ip, 80), tcp::SYN)
}

/// Where a packet goes, and whether it was moved there.
#[track_caller]
fn sent(world: &World, family: &Family, hook: Hook, packet: &Packet) -> (IpAddr, bool) {
    let outcome = world.send(hook, packet).unwrap();
    assert!(matches!(outcome.verdict, Verdict::Pass | Verdict::Redirect), "{:?}", outcome.moved);
    (family.destination(&outcome.packet), outcome.moved.contains_key(Reason::MovedSilent.label()))
}

/// L5: each of three second tries is at an endpoint that was not tried, and the connection stays with the last; a SYN that is doubled moves
/// nothing.
#[test]
fn a_syn_that_comes_again_goes_to_an_endpoint_that_was_not_tried() {
    for_both(|family| {
        let world = World::new(&yaml(family, None, "", &pods(family, 5))).unwrap();
        let first = syn(family, 40_000);
        let mut tried = vec![sent(&world, family, Hook::UplinkIn, &first).0];
        assert_eq!(
            sent(&world, family, Hook::UplinkIn, &first),
            (tried[0], false),
            "a network doubles packets"
        );
        for _ in 0..3 {
            std::thread::sleep(LATER);
            let (to, moved) = sent(&world, family, Hook::UplinkIn, &first);
            assert!(moved && !tried.contains(&to), "{tried:?} {to}");
            tried.push(to);
            assert_eq!(world.flow_counts().unwrap(), [2, 0, 0], "what it was before is gone");
        }
        std::thread::sleep(LATER);
        assert_eq!(sent(&world, family, Hook::UplinkIn, &first), (tried[3], false), "enough");
    });
}

/// L5: nothing is moved of which anything was heard, that has other numbers or data, or for which there is no other endpoint; nor where
/// the Service says so.
#[test]
fn what_was_answered_or_cannot_be_moved_stays() {
    for_both(|family| {
        let endpoints = pods(family, 2);
        let mut world = World::new(&yaml(family, None, "", &endpoints)).unwrap();
        let (answered, other) = (syn(family, 40_001), syn(family, 40_002));
        let to = [&answered, &other].map(|first| sent(&world, family, Hook::UplinkIn, first).0);
        let accept = tcp_packet((&to[0].to_string(), 8080), (family.client, 40_001), tcp::SYN | tcp::ACK);
        world.send(Hook::UplinkOut, &accept.numbers(7_000, 1_001)).unwrap();
        std::thread::sleep(LATER);
        assert_eq!(sent(&world, family, Hook::UplinkIn, &answered), (to[0], false), "it was answered");
        let renumbered = other.numbers(50_000, 0);
        assert_eq!(sent(&world, family, Hook::UplinkIn, &renumbered), (to[1], false), "another connection");
        world.apply(&yaml(family, None, "", &[endpoints[0].clone()])).unwrap();
        let alone = syn(family, 41_000);
        sent(&world, family, Hook::UplinkIn, &alone);
        std::thread::sleep(LATER);
        let only = ip(&endpoints[0].0);
        assert_eq!(sent(&world, family, Hook::UplinkIn, &alone), (only, false), "there is no other");
        world.apply(&yaml(family, Some("0"), "", &endpoints)).unwrap();
        let first = syn(family, 42_000);
        let (to, _) = sent(&world, family, Hook::UplinkIn, &first);
        std::thread::sleep(LATER);
        assert_eq!(sent(&world, family, Hook::UplinkIn, &first), (to, false), "the Service says so");
    });
}

/// L5: XDP leaves it to tc; a source that was translated is so again.
#[test]
fn a_second_try_is_made_where_the_endpoint_is_elsewhere() {
    for_both(|family| {
        let far: Vec<_> = (0..4).map(|n| (family.nth_remote(n).to_string(), "there")).collect();
        let world = World::new(&yaml(family, None, "", &far)).unwrap();
        let first = syn(family, 40_000);
        let begun = world.send(Hook::Xdp, &first).unwrap();
        assert_eq!(begun.verdict, Verdict::Tx);
        std::thread::sleep(LATER);
        let left = world.send(Hook::Xdp, &first).unwrap();
        assert_eq!((left.verdict, left.packet == first.bytes()), (Verdict::Pass, true), "{:?}", left.moved);
        let (to, moved) = sent(&world, family, Hook::UplinkIn, &first);
        assert!(moved && to != family.destination(&begun.packet));
        assert_eq!(world.flow_counts().unwrap(), [2, 0, 0]);
    });
}

/// L5, S1: the client's affinity goes with it.
#[test]
fn affinity_goes_with_a_connection_that_was_moved() {
    for_both(|family| {
        let world = World::new(&yaml(family, None, "sessionAffinity: ClientIP", &pods(family, 5))).unwrap();
        let (dead, _) = sent(&world, family, Hook::UplinkIn, &syn(family, 40_000));
        std::thread::sleep(LATER);
        let (to, moved) = sent(&world, family, Hook::UplinkIn, &syn(family, 40_000));
        assert!(moved && to != dead);
        let next: BTreeSet<_> =
            (41_000..41_008).map(|port| sent(&world, family, Hook::UplinkIn, &syn(family, port)).0).collect();
        assert_eq!(next, BTreeSet::from([to]));
    });
}
