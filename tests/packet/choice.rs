//! Which endpoint a flow gets: algorithms and weights (L1 to L4).

use dataplane_common::drop::Reason;
use dataplane_tests::packet::build::{Packet, ip, tcp, tcp_packet, udp_packet};
use dataplane_tests::packet::family::{Family, V4, V6, for_both};
use dataplane_tests::packet::{Hook, Verdict, World, in_namespace, reason};
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

/// Choices of each test of shares.
const CHOICES: u32 = 1_000_000;

/// A world whose Service has these annotations below the project's prefix.
fn annotated(
    family: &Family,
    annotations: &[(&str, &str)],
    spec: &str,
    endpoints: &[(String, &str)],
) -> String {
    let endpoints: Vec<_> =
        endpoints.iter().map(|(address, node)| (address.as_str(), *node, "ready: true")).collect();
    let lines: Vec<_> =
        annotations.iter().map(|(name, value)| format!("service.portolan.dev/{name}: '{value}'")).collect();
    let with = format!("namespace: default, annotations: {{{}}}}}", lines.join(", "));
    family.load_balancer(spec, &endpoints).replacen("namespace: default}", &with, 1)
}

/// The first pods of this node.
fn pods(family: &Family, count: u32) -> Vec<(String, &'static str)> {
    let range = family.pod.rsplit_once(['.', ':']).map_or("", |(range, _)| range);
    let dot = if *family == V4 { "." } else { ":" };
    (1..=count).map(|n| (format!("{range}{dot}{}", 100 + n), "here")).collect()
}

/// Where a packet goes that is sent on or handed to the stack.
#[track_caller]
fn endpoint(world: &World, family: &Family, hook: Hook, sent: &Packet) -> IpAddr {
    let outcome = world.send(hook, sent).unwrap();
    assert!(
        matches!(outcome.verdict, Verdict::Pass | Verdict::Redirect | Verdict::Tx),
        "{:?}",
        outcome.moved
    );
    family.destination(&outcome.packet)
}

/// A client's question from a port, to the Service's address for all.
fn question(family: &Family, client: &str, port: u16) -> Packet {
    tcp_packet((client, port), (family.lb_ip, 80), tcp::SYN)
}

/// How often each endpoint is chosen for questions by UDP that differ in the client's port and, where asked, in its address.
fn count(world: &World, family: &Family, choices: u32, by_address: bool) -> BTreeMap<IpAddr, u32> {
    let mut frame = udp_packet((family.client, 1), (family.lb_ip, 80), b"q").bytes();
    let (ports, address) = (14 + family.header, if *family == V4 { 14 + 12 } else { 14 + 8 });
    let last = address + if *family == V4 { 4 } else { 16 };
    let mut counts = BTreeMap::new();
    for n in 0..choices {
        // Whether a checksum is right is not asked.
        let [_, high, middle, low] = n.to_be_bytes();
        if by_address {
            frame[last - 3..last].copy_from_slice(&[high, middle, low]);
        } else {
            frame[last - 1] = high;
            frame[ports..ports + 2].copy_from_slice(&[middle, low]);
        }
        let (_, out, _) = world.send_uncounted(Hook::PodIn, &frame).unwrap();
        *counts.entry(family.destination(&out)).or_default() += 1;
    }
    counts
}

/// Pearson's sum of squares, of what was counted against shares.
fn chi_square(counts: &BTreeMap<IpAddr, u32>, shares: &BTreeMap<IpAddr, f64>) -> f64 {
    assert!(counts.keys().all(|at| shares.contains_key(at)), "{counts:?}");
    let (all, asked) = (counts.values().sum::<u32>(), shares.values().sum::<f64>());
    let term = |(at, share): (&IpAddr, &f64)| {
        let expected = f64::from(all) * share / asked;
        (f64::from(counts.get(at).copied().unwrap_or(0)) - expected).powi(2) / expected
    };
    shares.iter().map(term).sum()
}

/// What it exceeds once in a million times with four degrees of freedom.
const UNLIKELY: f64 = 33.4;

const WEIGHTS: [u16; 5] = [5, 1, 3, 1, 2];

fn weighted(family: &Family, algorithm: &str) -> (World, BTreeMap<IpAddr, f64>) {
    let endpoints = pods(family, 5);
    let words: Vec<_> = endpoints
        .iter()
        .zip(WEIGHTS)
        .map(|((address, _), weight)| format!("\"{address}\": {weight}"))
        .collect();
    let weights = format!("{{{}}}", words.join(", "));
    let yaml = annotated(family, &[("lb-algorithm", algorithm), ("weights", &weights)], "", &endpoints);
    let shares = endpoints.iter().zip(WEIGHTS).map(|((address, _), weight)| (ip(address), f64::from(weight)));
    (World::new(&yaml).unwrap(), shares.collect())
}

/// L2, L3: a million flows are shared out as the weights ask.
#[test]
fn random_gives_each_its_share() {
    in_namespace(|| {
        let (world, shares) = weighted(&V4, "random");
        let counts = count(&world, &V4, CHOICES, false);
        let sum = chi_square(&counts, &shares);
        assert!(sum < UNLIKELY, "{sum}: {counts:?}");
    });
}

/// L2, L3: what hashes lead to is what the slots of the set say, for a million clients; and the slots are shared out as the weights ask.
#[test]
fn hashes_give_each_its_share() {
    for (family, algorithm, choices) in [
        (&V4, "maglev", CHOICES),
        (&V4, "source-hash", CHOICES),
        (&V6, "maglev", 200_000),
        (&V6, "source-hash", 200_000),
    ] {
        in_namespace(move || {
            let (world, asked) = weighted(family, algorithm);
            let slots = world.slots_of("default/web:udp").unwrap();
            let mut shares = BTreeMap::new();
            slots.iter().for_each(|at| *shares.entry(*at).or_insert(0.0) += 1.0);
            let total: f64 = asked.values().sum();
            for (at, weight) in &asked {
                let error = shares[at] / slots.len() as f64 * total / weight - 1.0;
                assert!(error.abs() <= 0.01, "{at}: {error}");
            }
            let counts = count(&world, family, choices, algorithm == "source-hash");
            let sum = chi_square(&counts, &shares);
            assert!(sum < UNLIKELY, "{algorithm}: {sum}: {counts:?}");
        });
    }
}

/// L2, L3: in every round each has as many turns as its weight says; a million turns are shared out to the last.
#[test]
fn round_robin_gives_each_its_turns() {
    in_namespace(|| {
        let (world, shares) = weighted(&V4, "round-robin");
        let round: u32 = WEIGHTS.iter().map(|weight| u32::from(*weight)).sum();
        let rounds = CHOICES / round;
        let counts = count(&world, &V4, rounds * round, false);
        for (at, share) in shares {
            assert_eq!(f64::from(counts[&at]), share * f64::from(rounds), "{at}");
        }
    });
}

/// L2: a turn that XDP leaves to tc is taken once.
#[test]
fn turns_go_on_over_xdp_and_tc() {
    for_both(|family| {
        let mut endpoints = pods(family, 2);
        endpoints.push((family.nth_remote(0).to_string(), "there"));
        let mut world =
            World::new(&annotated(family, &[("lb-algorithm", "round-robin")], "", &endpoints)).unwrap();
        // What is masqueraded XDP leaves to tc.
        world.set_masquerade_mark(1 << 14).unwrap();
        let mut seen = Vec::new();
        for port in 40_000..40_021 {
            let sent = question(family, family.client, port);
            let outcome = world.send(Hook::Xdp, &sent).unwrap();
            let gone = outcome.verdict == Verdict::Tx;
            seen.push(if gone {
                family.destination(&outcome.packet)
            } else {
                endpoint(&world, family, Hook::UplinkIn, &sent)
            });
        }
        let first: BTreeSet<_> = seen[..3].iter().copied().collect();
        assert_eq!(first.len(), 3, "{seen:?}");
        assert!(seen.chunks(3).all(|round| *round == seen[..3]), "{seen:?}");
    });
}

/// L2: a five-tuple leads to one endpoint at each hook, on nodes that know nothing of each other, and again when the flow is forgotten.
#[test]
fn maglev_leads_a_tuple_to_one_endpoint_on_every_node() {
    for_both(|family| {
        let endpoints = pods(family, 7);
        let yaml = annotated(family, &[("lb-algorithm", "maglev")], "", &endpoints);
        let here = World::new(&yaml).unwrap();
        let mut there = World::new(&annotated(family, &[], "", &endpoints[3..])).unwrap();
        there.set_secret(99).unwrap();
        there.apply(&yaml).unwrap();
        let mut found = BTreeSet::new();
        for port in 40_000..40_040 {
            let sent = question(family, family.client, port);
            let at = endpoint(&here, family, Hook::UplinkIn, &sent);
            assert_eq!(endpoint(&there, family, Hook::Xdp, &sent), at);
            here.forget_flows().unwrap();
            assert_eq!(endpoint(&here, family, Hook::Xdp, &sent), at);
            found.insert(at);
        }
        assert!(found.len() > 4, "{found:?}");
    });
}

/// L2: a client's connections go to one endpoint, whatever its port and whichever port of the node; clients are spread.
#[test]
fn source_hash_leads_a_client_to_one_endpoint() {
    for_both(|family| {
        let world =
            World::new(&annotated(family, &[("lb-algorithm", "source-hash")], "", &pods(family, 7))).unwrap();
        let range = family.client.rsplit_once(['.', ':']).map_or("", |(range, _)| range);
        let dot = if *family == V4 { "." } else { ":" };
        let mut found = BTreeSet::new();
        for client in 1..40 {
            let client = format!("{range}{dot}{client}");
            let at = endpoint(&world, family, Hook::UplinkIn, &question(family, &client, 40_000));
            for port in 40_001..40_005 {
                assert_eq!(endpoint(&world, family, Hook::UplinkIn, &question(family, &client, port)), at);
            }
            let by_node_port = tcp_packet((&client, 41_000), (family.node, 30_080), tcp::SYN);
            assert_eq!(endpoint(&world, family, Hook::Xdp, &by_node_port), at);
            found.insert(at);
        }
        assert_eq!(found.len(), 7);
    });
}

/// L1: an annotation acts live; a word that means nothing is as none.
#[test]
fn the_algorithm_changes_live() {
    in_namespace(|| {
        let endpoints = pods(&V4, 5);
        let with = |word: &str| annotated(&V4, &[("lb-algorithm", word)], "", &endpoints);
        let mut world = World::new(&with("source-hash")).unwrap();
        let mut first = 40_000;
        let mut ask = |world: &World| {
            first += 20;
            let ports = first..first + 20;
            ports
                .map(|port| endpoint(world, &V4, Hook::UplinkIn, &question(&V4, V4.client, port)))
                .collect::<Vec<_>>()
        };
        let distinct = |seen: &[IpAddr]| seen.iter().collect::<BTreeSet<_>>().len();
        assert_eq!(distinct(&ask(&world)), 1);
        world.apply(&with("round-robin")).unwrap();
        let turns = ask(&world);
        assert!(turns.chunks(5).all(|round| distinct(round) == 5), "{turns:?}");
        world.apply(&with("whatever")).unwrap();
        let drawn = ask(&world);
        assert!(distinct(&drawn) > 1 && drawn.chunks(5).any(|round| distinct(round) < 5), "{drawn:?}");
        world.apply(&with("source-hash")).unwrap();
        assert_eq!(distinct(&ask(&world)), 1);
    });
}

/// L4: weight 0 takes no new flow and keeps those it has; with all of them 0 the port refuses, as without endpoints (P1).
#[test]
fn an_endpoint_without_weight_keeps_its_flows_and_gets_no_other() {
    for_both(|family| {
        let endpoints = pods(family, 2);
        let with = |weights: &str| annotated(family, &[("weights", weights)], "", &endpoints);
        let mut world = World::new(&with("{}")).unwrap();
        let flows: Vec<_> = (40_000..40_010)
            .map(|port| {
                (port, endpoint(&world, family, Hook::UplinkIn, &question(family, family.client, port)))
            })
            .collect();
        let left = ip(&endpoints[1].0);
        assert!(flows.iter().any(|(_, at)| *at != left));
        world.apply(&with(&format!("{{\"{}\": 0}}", endpoints[0].0))).unwrap();
        for (port, at) in &flows {
            let ack = tcp_packet((family.client, *port), (family.lb_ip, 80), tcp::ACK);
            assert_eq!(endpoint(&world, family, Hook::UplinkIn, &ack), *at, "it keeps its flows");
        }
        for port in 41_000..41_010 {
            let to = endpoint(&world, family, Hook::UplinkIn, &question(family, family.client, port));
            assert_eq!(to, left, "and gets no other");
        }
        world.apply(&with("{\"*\": 0}")).unwrap();
        let outcome = world.send(Hook::UplinkIn, &question(family, family.client, 42_000)).unwrap();
        assert_eq!((outcome.verdict, outcome.moved), (Verdict::Redirect, reason(Reason::NoEndpoints)));
    });
}

/// S1, L2: a client that comes back to its endpoint takes no turn of others, nor does its hash.
#[test]
fn affinity_goes_before_the_algorithm_and_takes_no_turn() {
    in_namespace(|| {
        let spec = "sessionAffinity: ClientIP";
        let yaml = annotated(&V4, &[("lb-algorithm", "round-robin")], spec, &pods(&V4, 2));
        let world = World::new(&yaml).unwrap();
        let own = endpoint(&world, &V4, Hook::UplinkIn, &question(&V4, V4.client, 40_000));
        let mut others = Vec::new();
        for n in 1..11 {
            let again = endpoint(&world, &V4, Hook::UplinkIn, &question(&V4, V4.client, 40_000 + n));
            assert_eq!(again, own);
            let other = format!("198.51.100.{}", 100 + n);
            others.push(endpoint(&world, &V4, Hook::UplinkIn, &question(&V4, &other, 40_000)));
        }
        assert!(others.windows(2).all(|pair| pair[0] != pair[1]), "{others:?}");
    });
}
