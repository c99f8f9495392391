//! Least-connections, and the counts of what is open (L2): those of the flows that there are, however they end.

use dataplane_tests::packet::build::{Packet, tcp, tcp_packet, udp_packet};
use dataplane_tests::packet::family::{Family, V4, for_both};
use dataplane_tests::packet::{Hook, Verdict, World, in_namespace};
use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::Duration;

/// Longer than an endpoint may be silent.
const LATER: Duration = Duration::from_millis(900);

fn service(family: &Family, algorithm: &str, weights: &str, endpoints: &[(String, &str)]) -> String {
    let endpoints: Vec<_> = endpoints.iter().map(|(at, node)| (at.as_str(), *node, "ready: true")).collect();
    let prefix = "service.portolan.dev/";
    let with = format!(
        "namespace: default, annotations: {{{prefix}lb-algorithm: {algorithm}, {prefix}weights: '{weights}'}}}}"
    );
    family.load_balancer("", &endpoints).replacen("namespace: default}", &with, 1)
}

fn pods(family: &Family, count: u32) -> Vec<(String, &'static str)> {
    let range = family.pod.rsplit_once(['.', ':']).map_or("", |(range, _)| range);
    let dot = if *family == V4 { "." } else { ":" };
    (1..=count).map(|n| (format!("{range}{dot}{}", 100 + n), "here")).collect()
}

/// A client's segment to the Service.
fn segment(family: &Family, port: u16, flags: u8) -> Packet {
    tcp_packet((family.client, port), (family.lb_ip, 80), flags)
}

/// Begins a connection, and gives its endpoint.
#[track_caller]
fn open(world: &World, family: &Family, hook: Hook, port: u16) -> IpAddr {
    let outcome = world.send(hook, &segment(family, port, tcp::SYN)).unwrap();
    assert!(
        matches!(outcome.verdict, Verdict::Pass | Verdict::Redirect | Verdict::Tx),
        "{:?}",
        outcome.moved
    );
    family.destination(&outcome.packet)
}

/// The endpoint's segment.
fn answer(family: &Family, from: IpAddr, port: u16, flags: u8) -> Packet {
    tcp_packet((&from.to_string(), 8080), (family.client, port), flags)
}

/// Begins a connection to an endpoint of this node, which both ends confirm.
#[track_caller]
fn establish(world: &World, family: &Family, port: u16) -> IpAddr {
    let to = open(world, family, Hook::UplinkIn, port);
    world.send(Hook::PodIn, &answer(family, to, port, tcp::SYN | tcp::ACK).numbers(5_000, 1_001)).unwrap();
    let out = answer(family, to, port, tcp::SYN | tcp::ACK).numbers(5_000, 1_001);
    world.send(Hook::UplinkOut, &out).unwrap();
    world.send(Hook::UplinkIn, &segment(family, port, tcp::ACK).numbers(1_001, 5_001)).unwrap();
    to
}

/// Asserts that the counts are those of the flows that live, so many.
#[track_caller]
fn expect_open(world: &World, expected: u32) {
    let (counted, live) = (world.open().unwrap(), world.live().unwrap());
    assert_eq!(counted, live);
    assert_eq!(counted.values().sum::<u32>(), expected, "{counted:?}");
}

/// L2: whatever ends a flow counts it off once.
#[test]
fn a_flow_is_open_until_it_ends() {
    for_both(|f| {
        let endpoints = pods(f, 3);
        let mut world = World::new(&service(f, "least-connections", "{}", &endpoints)).unwrap();
        expect_open(&world, 0);
        // The last FIN.
        let to = establish(&world, f, 40_000);
        expect_open(&world, 1);
        let fin = tcp::FIN | tcp::ACK;
        world.send(Hook::UplinkIn, &segment(f, 40_000, fin).numbers(1_001, 5_001)).unwrap();
        expect_open(&world, 1);
        world.send(Hook::UplinkOut, &answer(f, to, 40_000, fin).numbers(5_001, 1_002)).unwrap();
        expect_open(&world, 0);
        world.send(Hook::UplinkIn, &segment(f, 40_000, tcp::ACK).numbers(1_002, 5_002)).unwrap();
        expect_open(&world, 0);
        // A RST of either end.
        let to = establish(&world, f, 40_001);
        world.send(Hook::UplinkOut, &answer(f, to, 40_001, tcp::RST).numbers(5_001, 0)).unwrap();
        expect_open(&world, 0);
        establish(&world, f, 40_002);
        world.send(Hook::UplinkIn, &segment(f, 40_002, tcp::RST).numbers(1_001, 0)).unwrap();
        expect_open(&world, 0);
        // A connection that is refused.
        let mut to = open(&world, f, Hook::UplinkIn, 40_003);
        expect_open(&world, 1);
        for tries in (0..=3).rev() {
            let reset = answer(f, to, 40_003, tcp::RST | tcp::ACK).numbers(0, 1_001);
            let refused = world.send(Hook::UplinkOut, &reset).unwrap();
            if tries != 0 {
                // The next is asked (L5).
                let again = world.send_bytes(Hook::UplinkIn, &refused.packet).unwrap();
                to = f.destination(&again.packet);
            }
            expect_open(&world, u32::from(tries != 0));
        }
        // The client begins anew on the port of a connection that is over.
        establish(&world, f, 40_001);
        expect_open(&world, 1);
        // Idle, with others that are not: by TCP and by UDP.
        world.send(Hook::UplinkIn, &udp_packet((f.client, 40_000), (f.lb_ip, 80), b"q")).unwrap();
        expect_open(&world, 2);
        world.sweep_all().unwrap();
        assert_eq!(world.flow_counts().unwrap(), [0; 3]);
        expect_open(&world, 0);
        // An endpoint that silently goes: TCP stays with it, UDP has another.
        establish(&world, f, 40_004);
        let question = udp_packet((f.client, 40_001), (f.lb_ip, 80), b"q");
        for _ in 0..3 {
            let outcome = world.send(Hook::UplinkIn, &question).unwrap();
            let had = f.destination(&outcome.packet).to_string();
            let left: Vec<_> = endpoints.iter().filter(|(at, _)| *at != had).cloned().collect();
            world.apply(&service(f, "least-connections", "{}", &left)).unwrap();
            let outcome = world.send(Hook::UplinkIn, &question).unwrap();
            assert_ne!(f.destination(&outcome.packet).to_string(), had);
            world.apply(&service(f, "least-connections", "{}", &endpoints)).unwrap();
            assert_eq!(world.open().unwrap(), world.live().unwrap());
        }
        world.sweep_all().unwrap();
        expect_open(&world, 0);
    });
}

/// L2, L5: a connection that is given to another endpoint is the other's.
#[test]
fn a_connection_that_is_moved_is_counted_where_it_goes() {
    for_both(|f| {
        let world = World::new(&service(f, "least-connections", "{}", &pods(f, 4))).unwrap();
        let mut before = open(&world, f, Hook::UplinkIn, 40_000);
        for _ in 0..3 {
            std::thread::sleep(LATER);
            let to = open(&world, f, Hook::UplinkIn, 40_000);
            assert_ne!(to, before);
            before = to;
            expect_open(&world, 1);
            assert_eq!(world.open().unwrap(), BTreeMap::from([(to, 1)]));
        }
    });
}

/// L2, C4: flows that go because there is no room for them, whichever it is, are open no more.
#[test]
fn flows_that_are_displaced_are_counted_off() {
    for_both(|f| {
        let yaml = service(f, "least-connections", "{}", &pods(f, 3));
        for room in [("half_open", 8), ("flows", 16), ("closing", 4)] {
            let world = World::with(&yaml, 0, &[room]).unwrap();
            for port in 40_000..40_100 {
                let to = open_or_full(&world, f, port);
                if let (true, Some(to)) = (port % 3 == 0, to) {
                    let reset = answer(f, to, port, tcp::RST | tcp::ACK).numbers(0, 1_001);
                    world.send(Hook::UplinkOut, &reset).unwrap();
                }
                assert_eq!(world.open().unwrap(), world.live().unwrap(), "{room:?} {port}");
            }
            assert!(world.live().unwrap().values().sum::<u32>() > 0, "{room:?}");
        }
    });
}

/// Begins a connection, if there is room for it.
fn open_or_full(world: &World, family: &Family, port: u16) -> Option<IpAddr> {
    let outcome = world.send(Hook::UplinkIn, &segment(family, port, tcp::SYN)).unwrap();
    (outcome.verdict != Verdict::Drop).then(|| family.destination(&outcome.packet))
}

/// L2: an algorithm is changed as often as one likes: what is open stays known. An id that another endpoint gets counts from zero.
#[test]
fn counts_outlive_the_algorithm_and_not_the_endpoint() {
    for_both(|f| {
        let endpoints = pods(f, 2);
        let with = |algorithm: &str, endpoints: &[_]| service(f, algorithm, "{}", endpoints);
        let mut world = World::new(&with("random", &endpoints)).unwrap();
        let mut port = 40_000;
        for _ in 0..5 {
            for algorithm in ["maglev", "round-robin", "source-hash", "random", "least-connections"] {
                world.apply(&with(algorithm, &endpoints)).unwrap();
                for _ in 0..4 {
                    establish(&world, f, port);
                    port += 1;
                }
                expect_open(&world, u32::from(port - 40_000));
            }
        }
        let of_first = world.open().unwrap()[&endpoints[0].0.parse::<IpAddr>().unwrap()];
        let gone = world.open().unwrap().values().sum::<u32>() - of_first;
        world.apply(&with("least-connections", &endpoints[..1])).unwrap();
        assert_eq!(world.live().unwrap().values().sum::<u32>(), of_first, "those of nobody are nobody's");
        assert!(gone > 0);
        world.rest();
        let other = pods(f, 3)[2].clone();
        world.apply(&with("least-connections", &[endpoints[0].clone(), other.clone()])).unwrap();
        expect_open(&world, of_first);
        // The flows of the one that went end.
        world.sweep_all().unwrap();
        expect_open(&world, 0);
    });
}

/// L2: of two endpoints the one with fewer open connections gets the next, at every hook; and with weights, the one with fewer for its
/// weight.
#[test]
fn the_endpoint_with_fewer_open_connections_is_chosen() {
    for_both(|f| {
        let endpoints = pods(f, 2);
        let heavy: IpAddr = endpoints[0].0.parse().unwrap();
        let light: IpAddr = endpoints[1].0.parse().unwrap();
        for (weights, weight) in [("{}".to_owned(), 1), (format!("{{\"{heavy}\": 3}}"), 3)] {
            let world = World::new(&service(f, "least-connections", &weights, &endpoints)).unwrap();
            let mut counts = BTreeMap::from([(heavy, 0), (light, 0)]);
            for port in 40_000..40_200 {
                let hook = if port % 2 == 0 { Hook::UplinkIn } else { Hook::Xdp };
                let to = open(&world, f, hook, port);
                // Two slots are drawn; with the weight 3 both may be of the heavy one.
                if weight == 1 {
                    let other = if to == heavy { light } else { heavy };
                    assert!(counts[&to] <= counts[&other], "{counts:?} {to}");
                }
                *counts.entry(to).or_default() += 1;
                assert_eq!(world.open().unwrap().get(&to), counts.get(&to));
            }
            let (heavy, light): (u32, u32) = (counts[&heavy], counts[&light] * weight);
            assert!(heavy.abs_diff(light) <= 2 * weight, "{heavy} and {light}");
        }
    });
}

/// L2, L3: connections that stay are shared out by weight, closer than chance would.
#[test]
fn connections_that_stay_are_as_many_as_the_weights_ask() {
    in_namespace(|| {
        let endpoints = pods(&V4, 5);
        let asked = [5, 1, 3, 1, 2];
        let weights: Vec<_> =
            endpoints.iter().zip(asked).map(|((at, _), weight)| format!("\"{at}\": {weight}")).collect();
        let weights = format!("{{{}}}", weights.join(", "));
        let world = World::new(&service(&V4, "least-connections", &weights, &endpoints)).unwrap();
        for port in 1..=24_000 {
            world.send_uncounted(Hook::UplinkIn, &segment(&V4, port, tcp::SYN).bytes()).unwrap();
        }
        let open = world.open().unwrap();
        for ((at, _), weight) in endpoints.iter().zip(asked) {
            let count = open[&at.parse::<IpAddr>().unwrap()];
            assert!(count.abs_diff(2_000 * weight) <= 20 * weight, "{at}: {open:?}");
        }
        assert_eq!(open, world.live().unwrap());
    });
}

/// L2, L3: where nothing is open, each gets its share of what comes.
#[test]
fn where_nothing_is_open_each_gets_its_share() {
    const CHOICES: u32 = 50_000;
    /// What Pearson's sum exceeds once in a million times with four degrees of freedom.
    const UNLIKELY: f64 = 33.4;
    in_namespace(|| {
        let endpoints = pods(&V4, 5);
        let asked = [5.0, 1.0, 3.0, 1.0, 2.0];
        let weights: Vec<_> =
            endpoints.iter().zip(asked).map(|((at, _), weight)| format!("\"{at}\": {weight}")).collect();
        let weights = format!("{{{}}}", weights.join(", "));
        let world = World::new(&service(&V4, "least-connections", &weights, &endpoints)).unwrap();
        let mut counts: BTreeMap<IpAddr, f64> = BTreeMap::new();
        for n in 0..CHOICES {
            let client = format!("198.51.{}.7", n >> 16);
            let sent = udp_packet((&client, n as u16), (V4.lb_ip, 80), b"q");
            let (_, out, _) = world.send_uncounted(Hook::UplinkIn, &sent.bytes()).unwrap();
            *counts.entry(V4.destination(&out)).or_default() += 1.0;
            world.forget_open().unwrap();
        }
        let all: f64 = asked.iter().sum();
        let sum: f64 = endpoints
            .iter()
            .zip(asked)
            .map(|((at, _), weight)| {
                let expected = f64::from(CHOICES) * weight / all;
                (counts[&at.parse::<IpAddr>().unwrap()] - expected).powi(2) / expected
            })
            .sum();
        assert!(sum < UNLIKELY, "{sum}: {counts:?}");
    });
}
