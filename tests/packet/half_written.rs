//! Packets between any two writes of a change: the agent may die at each, and a packet may come at each.

use dataplane_tests::packet::build::{Packet, tcp, tcp_packet};
use dataplane_tests::packet::family::{Family, for_both};
use dataplane_tests::packet::{Hook, Verdict, World};
use std::collections::BTreeSet;

/// A client's first packet, each time from another port.
fn syn(f: &Family, number: u16) -> Packet {
    tcp_packet((f.pod, 30_000 + number), (f.cluster_ip, 80), tcp::SYN)
}

/// What became of a packet to the Service.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Fate {
    /// It went on as it came.
    Untouched,
    /// It went to an endpoint.
    Endpoint(String),
    /// Something else: it was refused or dropped.
    Else(String),
}

fn fate(f: &Family, world: &World, number: u16) -> Fate {
    let sent = syn(f, number);
    let outcome = world.send(Hook::PodIn, &sent).unwrap();
    if outcome.packet == sent.bytes() && outcome.verdict == Verdict::Pass {
        return Fate::Untouched;
    }
    for endpoint in [f.remote, f.other_pod] {
        if outcome.packet == syn(f, number).to(endpoint, 8080).bytes() {
            return Fate::Endpoint(endpoint.to_owned());
        }
    }
    Fate::Else(format!("{:?} {:?}", outcome.verdict, outcome.moved))
}

/// The fates of packets at every moment of the way from one set of manifests to another.
fn fates(f: &Family, from: &str, to: &str) -> Vec<Fate> {
    let mut world = World::new(from).unwrap();
    let (mut fates, mut number) = (Vec::new(), 0);
    world
        .apply_stepwise(to, |world| {
            number += 1;
            fates.push(fate(f, world, number));
        })
        .unwrap();
    assert!(fates.len() > 1, "a change of one write is no test");
    fates
}

fn endpoint(address: &str) -> Fate {
    Fate::Endpoint(address.to_owned())
}

const OTHER: &str = "there";

fn other(f: &Family) -> (&'static str, &'static str, &'static str) {
    (f.other_pod, OTHER, "ready: true")
}

/// P9: from nothing to a Service: until its address is known, packets go on; then they go to an endpoint.
#[test]
fn a_new_service_is_served_at_once_or_not_yet() {
    for_both(|f| {
        let fates = fates(f, "", &f.web("", &[f.remote_endpoint()]));
        let served = fates.iter().position(|fate| *fate != Fate::Untouched).expect("it is served in the end");
        assert!(served > 0 && fates[served..].iter().all(|fate| *fate == endpoint(f.remote)), "{fates:?}");
    });
}

/// P9: an endpoint that takes another's place.
#[test]
fn an_update_leads_to_the_old_endpoint_then_to_the_new_one() {
    for_both(|f| {
        let fates = fates(f, &f.web("", &[f.remote_endpoint()]), &f.web("", &[other(f)]));
        let new = fates.iter().position(|fate| *fate == endpoint(f.other_pod)).expect("the new one");
        assert!(new > 0 && fates[..new].iter().all(|fate| *fate == endpoint(f.remote)), "{fates:?}");
        assert!(fates[new..].iter().all(|fate| *fate == endpoint(f.other_pod)), "{fates:?}");
    });
}

/// P1: the last endpoint goes: the old one, then a refusal.
#[test]
fn the_last_endpoint_goes_without_a_moment_of_silence() {
    for_both(|f| {
        let fates = fates(f, &f.web("", &[f.remote_endpoint()]), &f.web("", &[]));
        let allowed = |fate: &Fate| match fate {
            Fate::Endpoint(_) => true,
            Fate::Else(text) => text.contains("no-endpoints"),
            Fate::Untouched => false,
        };
        assert!(fates.iter().all(allowed), "{fates:?}");
        assert!(matches!(fates.last(), Some(Fate::Else(_))), "{fates:?}");
    });
}

/// P13: the Service goes: its endpoint, then a refusal or nothing at all, and never its endpoint again.
#[test]
fn a_deleted_service_is_served_until_it_is_not() {
    for_both(|f| {
        let fates = fates(f, &f.web("", &[f.remote_endpoint()]), "");
        let kinds: Vec<_> = fates.iter().map(|fate| *fate == endpoint(f.remote)).collect();
        assert!(kinds.is_sorted_by(|a, b| a >= b), "{fates:?}");
        let allowed = |fate: &Fate| match fate {
            Fate::Endpoint(_) | Fate::Untouched => true,
            Fate::Else(text) => text.contains("unknown-port"),
        };
        assert!(fates.iter().all(allowed), "{fates:?}");
        let kinds: BTreeSet<_> = fates.into_iter().collect();
        assert!(kinds.contains(&Fate::Untouched), "{kinds:?}");
    });
}
