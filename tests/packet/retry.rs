//! Second tries: a SYN that comes again unanswered goes to another endpoint, and so does what an endpoint refuses (L5).

use dataplane_common::checksum::Sum;
use dataplane_common::drop::Reason;
use dataplane_tests::packet::build::{
    LINK_FROM, LINK_TO, Packet, Transport, icmp_error_quoting, ip, tcp, tcp_packet, udp_packet,
};
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

/// Where a client is, and its endpoints are: where its packets are met, and where the endpoint's.
#[derive(Clone, Copy, Debug)]
struct Road {
    name: &'static str,
    client: Hook,
    endpoint: Hook,
    /// The client is a pod, the node, or neither.
    from: From,
    /// The endpoints are on this node.
    here: bool,
    masquerades: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum From {
    Outside,
    Pod,
    Node,
}

const ROADS: [Road; 8] = {
    const fn road(name: &'static str, client: Hook, endpoint: Hook, from: From, here: bool) -> Road {
        Road { name, client, endpoint, from, here, masquerades: false }
    }
    let here = road("outside to here", Hook::UplinkIn, Hook::UplinkOut, From::Outside, true);
    [
        here,
        Road { name: "outside to here, masqueraded", masquerades: true, ..here },
        road("outside to here by XDP", Hook::Xdp, Hook::UplinkOut, From::Outside, true),
        road("outside to elsewhere", Hook::UplinkIn, Hook::UplinkIn, From::Outside, false),
        road("outside to elsewhere by XDP", Hook::Xdp, Hook::UplinkIn, From::Outside, false),
        road("a pod to here", Hook::PodIn, Hook::PodOut, From::Pod, true),
        road("a pod to elsewhere", Hook::PodIn, Hook::PodOut, From::Pod, false),
        road("the node to elsewhere", Hook::UplinkOut, Hook::UplinkIn, From::Node, false),
    ]
};

/// How many endpoints there are: more than are tried.
const ENDPOINTS: u32 = 6;

/// Runs a test on each road, in both families.
fn on_all_roads(test: impl Fn(&Family, &World, Road) + Send + Sync + Clone + 'static) {
    for_both(move |family| {
        // The programs are loaded once for each place of the endpoints.
        for here in [true, false] {
            let mut roads = ROADS.into_iter().filter(|road| road.here == here).peekable();
            let mut world = roads.peek().expect("there are some").world(family);
            for road in roads {
                println!("{}", road.name);
                road.set_up(&mut world);
                test(family, &world, road);
            }
        }
    });
}

impl Road {
    /// A world of this road alone.
    fn world(&self, family: &Family) -> World {
        let far = (0..ENDPOINTS).map(|n| (family.nth_remote(n).to_string(), "there")).collect();
        let endpoints = if self.here { pods(family, ENDPOINTS) } else { far };
        let mut world = World::new(&yaml(family, None, "", &endpoints)).unwrap();
        self.set_up(&mut world);
        world
    }

    fn set_up(&self, world: &mut World) {
        world.set_masquerade_mark(if self.masquerades { 0x4000 } else { 0 }).unwrap();
        world.forget_flows().unwrap();
    }

    fn source(&self, family: &Family) -> &'static str {
        match self.from {
            From::Outside => family.client,
            From::Pod => family.other_pod,
            From::Node => family.node,
        }
    }

    fn frontend(&self, family: &Family) -> &'static str {
        if self.from == From::Outside { family.lb_ip } else { family.cluster_ip }
    }

    fn syn(&self, family: &Family, port: u16) -> Packet {
        tcp_packet((self.source(family), port), (self.frontend(family), 80), tcp::SYN)
    }

    fn question(&self, family: &Family, port: u16, data: &[u8]) -> Packet {
        udp_packet((self.source(family), port), (self.frontend(family), 80), data)
    }

    /// Sends what the client sends; what came of it.
    #[track_caller]
    fn call(&self, world: &World, bytes: &[u8]) -> (Vec<u8>, BTreeSet<String>) {
        let outcome = world.send_bytes(self.client, bytes).unwrap();
        let outcome = if outcome.packet == bytes && self.client == Hook::Xdp {
            // Left to tc.
            world.send_bytes(Hook::UplinkIn, bytes).unwrap()
        } else {
            outcome
        };
        let sent = matches!(outcome.verdict, Verdict::Pass | Verdict::Redirect | Verdict::Tx);
        assert!(sent && outcome.packet != bytes, "{}: {:?}", self.name, outcome.moved);
        (outcome.packet, reasons(&outcome.moved))
    }
}

/// The reasons among counters that moved.
fn reasons(moved: &std::collections::BTreeMap<String, u64>) -> BTreeSet<String> {
    let labels = Reason::ALL.iter().map(|reason| reason.label());
    labels.filter(|label| moved.contains_key(*label)).map(str::to_owned).collect()
}

/// Source and destination of a packet as it left: address and port.
fn ends(family: &Family, frame: &[u8]) -> [(String, u16); 2] {
    let (l3, size) = (14, if *family == V4 { 4 } else { 16 });
    let addresses = l3 + if *family == V4 { 12 } else { 8 };
    let ports = l3 + family.header;
    [0, 1].map(|n| {
        let octets = &frame[addresses + n * size..][..size];
        let addr: IpAddr = match <[u8; 4]>::try_from(octets) {
            Ok(octets) => octets.into(),
            Err(_) => <[u8; 16]>::try_from(octets).unwrap().into(),
        };
        (addr.to_string(), u16::from_be_bytes([frame[ports + 2 * n], frame[ports + 2 * n + 1]]))
    })
}

/// What the endpoint of a packet sends back.
fn back(family: &Family, frame: &[u8], flags: u8, seq: u32, ack: u32) -> Packet {
    let [(src, src_port), (dst, dst_port)] = ends(family, frame);
    tcp_packet((&dst, dst_port), (&src, src_port), flags).numbers(seq, ack)
}

/// A frame of a TCP segment with options, a class of traffic and a time to live of its own.
fn dressed(family: &Family, plain: &Packet, options: &[u8]) -> Vec<u8> {
    let mut plain = plain.clone().ttl(61).link(LINK_TO, LINK_FROM);
    plain.id = 0x1234;
    if let Transport::Tcp { window, .. } = &mut plain.transport {
        *window = 29_200;
    }
    let mut bytes = plain.bytes();
    let l4 = 14 + family.header;
    bytes.extend(options);
    bytes[l4 + 12] = (5 + options.len() as u8 / 4) << 4;
    let length = (bytes.len() - l4) as u16;
    if *family == V4 {
        bytes[15] = 0xb8;
        bytes[16..18].copy_from_slice(&(length + 20).to_be_bytes());
        bytes[24..26].fill(0);
        let sum = Sum::default().plus(&bytes[14..34]).checksum();
        bytes[24..26].copy_from_slice(&sum);
    } else {
        bytes[14..16].copy_from_slice(&[0x6b, 0x80]);
        bytes[18..20].copy_from_slice(&length.to_be_bytes());
    }
    bytes[l4 + 16..l4 + 18].fill(0);
    let addresses = if *family == V4 { 26..34 } else { 22..54 };
    let pseudo = Sum::default().plus(&bytes[addresses]).plus(&[0, 6]).plus(&length.to_be_bytes());
    let sum = pseudo.plus(&bytes[l4..]).checksum();
    bytes[l4 + 16..l4 + 18].copy_from_slice(&sum);
    bytes
}

/// A maximum segment size, permission for SACK, time stamps, a window scale: what Linux sends.
const LINUX: [u8; 20] = [2, 4, 5, 0xb4, 4, 2, 8, 10, 1, 2, 3, 4, 0, 0, 0, 0, 1, 3, 3, 7];

/// L5: a RST that answers a SYN is turned into it, byte for byte as its client sent it, and that goes to an endpoint that was not tried: so
/// often as the Service has tries. The last refusal reaches the client.
#[test]
fn a_refused_connection_goes_to_endpoints_that_were_not_tried_and_the_last_refusal_to_the_client() {
    on_all_roads(|family, world, road| {
        for options in [&[][..], &LINUX, &[1; 40]] {
            world.forget_flows().unwrap();
            let syn = dressed(family, &road.syn(family, 40_000), options);
            let (mut out, _) = road.call(world, &syn);
            let mut tried = vec![ends(family, &out)[1].0.clone()];
            for _ in 0..3 {
                let reset = back(family, &out, tcp::RST | tcp::ACK, 0, 1_001);
                let turned = world.send(road.endpoint, &reset).unwrap();
                assert_eq!(turned.verdict, Verdict::Redirect, "{}: {:?}", road.name, turned.moved);
                assert_eq!(crate::hex(&turned.packet), crate::hex(&syn), "{}", road.name);
                let (again, why) = road.call(world, &turned.packet);
                assert!(why.contains(Reason::MovedRefused.label()), "{}: {why:?}", road.name);
                let to = ends(family, &again)[1].0.clone();
                assert!(!tried.contains(&to), "{}: {tried:?} {to}", road.name);
                tried.push(to);
                assert_eq!(world.flow_counts().unwrap(), [2, 0, 0], "what it was before is gone");
                // But for addresses, ports and checksums it is the client's.
                let l4 = 14 + family.header;
                assert_eq!(again[l4 + 4..l4 + 16], syn[l4 + 4..l4 + 16], "{}", road.name);
                assert_eq!(again[l4 + 18..], syn[l4 + 18..], "{}", road.name);
                assert_eq!(again[15], syn[15], "class of traffic");
                // What the endpoint that it had says now is nobody's.
                let late = back(family, &out, tcp::SYN | tcp::ACK, 9_000, 1_001);
                crate::expect_untouched(world, road.endpoint, &late);
                out = again;
            }
            let reset = back(family, &out, tcp::RST | tcp::ACK, 0, 1_001);
            let passed = world.send(road.endpoint, &reset).unwrap();
            let to = [road.frontend(family).to_owned(), road.source(family).to_owned()];
            assert_eq!(ends(family, &passed.packet).map(|(addr, _)| addr), to, "{}", road.name);
            assert_eq!(passed.packet[14 + family.header + 13], tcp::RST | tcp::ACK);
            assert_eq!(world.flow_counts().unwrap(), [0, 0, 0], "{}", road.name);
        }
    });
}

/// L5: XDP leaves a refusal to tc, unwritten.
#[test]
fn xdp_leaves_a_refusal_to_tc() {
    for_both(|family| {
        let road = ROADS[4];
        let world = road.world(family);
        let (out, _) = road.call(&world, &road.syn(family, 40_000).bytes());
        let reset = back(family, &out, tcp::RST | tcp::ACK, 0, 1_001);
        let left = world.send(Hook::Xdp, &reset).unwrap();
        assert_eq!((left.verdict, left.packet == reset.bytes()), (Verdict::Pass, true), "{:?}", left.moved);
        assert_eq!(reasons(&left.moved), BTreeSet::from([Reason::XdpLeftToTc.label().to_owned()]));
        assert_eq!(world.send(Hook::UplinkIn, &reset).unwrap().verdict, Verdict::Redirect);
    });
}

/// L5: ICMP's host and net unreachable (ICMPv6: no route, address unreachable) about a SYN move it, whoever says so; if it has the SYN's
/// number.
#[test]
fn an_unreachable_endpoint_is_another_ones_turn() {
    on_all_roads(|family, world, road| {
        for kind in if *family == V4 { [[3, 0], [3, 1]] } else { [[1, 0], [1, 3]] } {
            world.forget_flows().unwrap();
            let syn = dressed(family, &road.syn(family, 40_000), &LINUX);
            let (out, _) = road.call(world, &syn);
            let [(src, src_port), (dst, dst_port)] = ends(family, &out);
            let about = tcp_packet((&src, src_port), (&dst, dst_port), tcp::SYN);
            let other = icmp_error_quoting(family.other_node, &about.clone().numbers(999, 0), kind, 0, 20);
            let passed = world.send(road.endpoint, &other).unwrap();
            assert_eq!(passed.packet.len(), other.bytes().len(), "{}: another number", road.name);
            for quoted in [8, 20] {
                let error = icmp_error_quoting(family.other_node, &about, kind, 0, quoted);
                let turned = world.send(road.endpoint, &error).unwrap();
                assert_eq!(turned.verdict, Verdict::Redirect, "{} {kind:?}: {:?}", road.name, turned.moved);
                assert_eq!(crate::hex(&turned.packet), crate::hex(&syn), "{} {kind:?}", road.name);
            }
            let (again, why) = road.call(world, &syn);
            assert!(why.contains(Reason::MovedUnreachable.label()), "{}: {why:?}", road.name);
            assert_ne!(ends(family, &again)[1].0, dst);
        }
    });
}

/// L5: a RST with another number, or without one, and a firewall's word move nothing and are passed on; the flow can be moved after it.
#[test]
fn what_anybody_could_send_and_what_a_firewall_says_moves_nothing() {
    on_all_roads(|family, world, road| {
        let syn = road.syn(family, 40_000).bytes();
        let (out, _) = road.call(world, &syn);
        let [(src, src_port), (dst, dst_port)] = ends(family, &out);
        let about = tcp_packet((&src, src_port), (&dst, dst_port), tcp::SYN);
        let resets = [(tcp::RST | tcp::ACK, 0, 1_000), (tcp::RST | tcp::ACK, 0, 1_002), (tcp::RST, 7, 1_001)];
        let forged = resets.map(|(flags, seq, ack)| back(family, &out, flags, seq, ack));
        let kinds: &[[u8; 2]] = if *family == V4 {
            &[[3, 2], [3, 3], [3, 9], [3, 10], [3, 13], [11, 0]]
        } else {
            &[[1, 1], [1, 4], [1, 5], [1, 6], [3, 0]]
        };
        let told = kinds.iter().map(|kind| icmp_error_quoting(&dst, &about, *kind, 0, 20));
        for packet in forged.into_iter().chain(told) {
            let passed = world.send(road.endpoint, &packet).unwrap();
            assert_eq!(passed.packet.len(), packet.bytes().len(), "{}: {packet:?}", road.name);
            assert_ne!(passed.verdict, Verdict::Drop, "{}: {:?}", road.name, passed.moved);
            assert_eq!(reasons(&passed.moved), BTreeSet::new(), "{}: {packet:?}", road.name);
            assert_eq!(world.flow_counts().unwrap(), [2, 0, 0], "{}: {packet:?}", road.name);
        }
        let reset = back(family, &out, tcp::RST | tcp::ACK, 0, 1_001);
        assert_eq!(crate::hex(&world.send(road.endpoint, &reset).unwrap().packet), crate::hex(&syn));
    });
}

/// L5: a refusal reaches the client where there is no other endpoint (policy Local with one on this node is such a case, for SYNs that are
/// repeated as well), where the Service has no tries, and where the SYN carries data or IP options.
#[test]
fn what_cannot_be_moved_is_refused_at_once() {
    for_both(|family| {
        let refused = |world: &World, name: &str, port: u16, bytes: &[u8]| {
            let road = ROADS[0];
            let (out, _) = road.call(world, bytes);
            std::thread::sleep(LATER);
            let (again, why) = road.call(world, bytes);
            assert_eq!((ends(family, &again), why), (ends(family, &out), BTreeSet::new()), "{name}: silent");
            let ack = if name == "data" { 1_005 } else { 1_001 };
            let reset = back(family, &out, tcp::RST | tcp::ACK, 0, ack);
            let passed = world.send(Hook::UplinkOut, &reset).unwrap();
            assert_eq!(passed.packet.len(), reset.bytes().len(), "{name}");
            assert_eq!(ends(family, &passed.packet)[1], (family.client.to_owned(), port), "{name}");
            assert_eq!(world.flow_counts().unwrap(), [0, 0, 0], "{name}");
        };
        let plain = |port| syn(family, port).bytes();
        let mut endpoints = pods(family, 1);
        refused(&World::new(&yaml(family, None, "", &endpoints)).unwrap(), "alone", 1, &plain(1));
        endpoints.extend((0..3).map(|n| (family.nth_remote(n).to_string(), "there")));
        let local = yaml(family, None, "externalTrafficPolicy: Local", &endpoints);
        refused(&World::new(&local).unwrap(), "the only one here", 2, &plain(2));
        let maglev = yaml(family, None, "", &endpoints[..1]).replacen(
            "namespace: default",
            "namespace: default, annotations: {service.portolan.dev/lb-algorithm: maglev}",
            1,
        );
        refused(&World::new(&maglev).unwrap(), "alone in many slots", 3, &plain(3));
        let world = World::new(&yaml(family, Some("0"), "", &pods(family, 3))).unwrap();
        refused(&world, "no tries", 4, &plain(4));
        let world = World::new(&yaml(family, None, "", &pods(family, 3))).unwrap();
        let mut data = syn(family, 5);
        if let Transport::Tcp { data, .. } = &mut data.transport {
            data.extend(b"data");
        }
        refused(&world, "data", 5, &data.bytes());
        let mut options = syn(family, 6);
        if *family == V4 {
            options.options = vec![1; 4];
        } else {
            options.extensions = vec![(60, vec![0, 1, 4, 0, 0, 0, 0])];
        }
        let l4 = 14 + options.header_length();
        let bytes = options.bytes();
        let out = world.send(Hook::UplinkIn, &options).unwrap();
        let port = u16::from_be_bytes([bytes[l4], bytes[l4 + 1]]);
        let to = family_destination(family, &out.packet);
        let reset = tcp_packet((&to, 8080), (family.client, port), tcp::RST | tcp::ACK).numbers(0, 1_001);
        let passed = world.send(Hook::UplinkOut, &reset).unwrap();
        assert_eq!(ends(family, &passed.packet)[1], (family.client.to_owned(), port), "options of IP");
    });
}

fn family_destination(family: &Family, frame: &[u8]) -> String {
    ends(family, frame)[1].0.clone()
}

/// L5: of a connection that was answered a refusal is passed on.
#[test]
fn a_connection_that_was_answered_is_not_moved_by_a_reset() {
    on_all_roads(|family, world, road| {
        let (out, _) = road.call(world, &road.syn(family, 40_000).bytes());
        world.send(road.endpoint, &back(family, &out, tcp::SYN | tcp::ACK, 7_000, 1_001)).unwrap();
        let reset = back(family, &out, tcp::RST | tcp::ACK, 7_001, 1_001);
        let passed = world.send(road.endpoint, &reset).unwrap();
        assert_eq!(passed.packet[14 + family.header + 13], tcp::RST | tcp::ACK, "{}", road.name);
        assert_eq!(world.flow_counts().unwrap(), [0, 0, 0], "{}", road.name);
    });
}

/// L5: a connection that was moved and is answered is counted as rescued.
#[test]
fn a_connection_that_a_second_try_has_helped_is_counted() {
    on_all_roads(|family, world, road| {
        let before = world.tries().unwrap();
        let syn = road.syn(family, 40_000).bytes();
        let (out, _) = road.call(world, &syn);
        world.send(road.endpoint, &back(family, &out, tcp::RST | tcp::ACK, 0, 1_001)).unwrap();
        let (out, _) = road.call(world, &syn);
        let accept = back(family, &out, tcp::SYN | tcp::ACK, 7_000, 1_001);
        let first = world.send(road.endpoint, &accept).unwrap();
        let second = world.send(road.endpoint, &accept).unwrap();
        let rescued = BTreeSet::from([Reason::Rescued.label().to_owned()]);
        assert_eq!(
            [reasons(&first.moved), reasons(&second.moved)],
            [rescued, BTreeSet::new()],
            "{}",
            road.name
        );
        let tries = world.tries().unwrap();
        let counted =
            (tries.refused - before.refused, tries.rescued - before.rescued, tries.moved() - before.moved());
        assert_eq!(counted, (1, 1, 1), "{}", road.name);
    });
}

/// L5: a datagram that is refused, and quoted whole, is sent to another endpoint, byte for byte as its client sent it, with a right checksum
/// whatever the one that is quoted.
#[test]
fn a_refused_datagram_goes_to_another_endpoint() {
    on_all_roads(|family, world, road| {
        let (unreachable, port): ([u8; 2], [u8; 2]) =
            if *family == V4 { ([3, 1], [3, 3]) } else { ([1, 3], [1, 4]) };
        for (length, kind) in [(1, port), (33, unreachable), (64, port), (65, port), (128, port), (500, port)]
        {
            world.forget_flows().unwrap();
            let data: Vec<_> = (0..length).map(|n| n as u8 ^ 0x5a).collect();
            let question = road.question(family, 40_000, &data).ttl(61).bytes();
            let (mut out, _) = road.call(world, &question);
            let mut tried = vec![ends(family, &out)[1].0.clone()];
            for at in 0..3 {
                let [(src, src_port), (dst, dst_port)] = ends(family, &out);
                let mut about = udp_packet((&src, src_port), (&dst, dst_port), &data).ttl(60);
                if at == 1 {
                    // As a device that is to sum it would have found it.
                    about.transport = halved(family, &about, &data);
                }
                let from = if kind == port { dst.as_str() } else { family.other_node };
                let error = icmp_error_quoting(from, &about, kind, 0, 8 + length);
                let cut = icmp_error_quoting(from, &about, kind, 0, 7 + length);
                let passed = world.send(road.endpoint, &cut).unwrap();
                assert_eq!(passed.packet.len(), cut.bytes().len(), "{}: not all of it", road.name);
                let turned = world.send(road.endpoint, &error).unwrap();
                assert_eq!(turned.verdict, Verdict::Redirect, "{} {length}: {:?}", road.name, turned.moved);
                assert_eq!(crate::hex(&turned.packet), crate::hex(&question), "{} {length}", road.name);
                let (again, why) = road.call(world, &turned.packet);
                assert!(why.contains(Reason::MovedUdp.label()), "{}: {why:?}", road.name);
                let to = ends(family, &again)[1].0.clone();
                assert!(!tried.contains(&to), "{}: {tried:?} {to}", road.name);
                tried.push(to);
                out = again;
            }
        }
    });
}

/// A datagram whose checksum is the sum of its pseudo header alone.
fn halved(family: &Family, about: &Packet, data: &[u8]) -> Transport {
    let whole = about.network_bytes();
    let mut bytes = whole[family.header..].to_vec();
    let addresses = if *family == V4 { 12..20 } else { 8..40 };
    let length = (8 + data.len() as u16).to_be_bytes();
    let sum = Sum::default().plus(&whole[addresses]).plus(&[0, 17]).plus(&length).fold();
    bytes[6..8].copy_from_slice(&sum.to_ne_bytes());
    Transport::Other { proto: 17, bytes }
}

/// L5: two questions of one client are on their way to an endpoint that refuses both: the second follows the first.
#[test]
fn a_second_question_follows_the_first_to_the_next_endpoint() {
    on_all_roads(|family, world, road| {
        let port: [u8; 2] = if *family == V4 { [3, 3] } else { [1, 4] };
        let questions = [b"what is A", b"or AAAA ?"];
        let sent = questions.map(|data| road.question(family, 40_000, data).bytes());
        let out = sent.clone().map(|bytes| road.call(world, &bytes).0);
        let errors = [0, 1].map(|n| {
            let [(src, src_port), (dst, dst_port)] = ends(family, &out[n]);
            let about = udp_packet((&src, src_port), (&dst, dst_port), questions[n]);
            icmp_error_quoting(&dst, &about, port, 0, 99)
        });
        assert_eq!(world.send(road.endpoint, &errors[0]).unwrap().packet, sent[0], "{}", road.name);
        let (first, _) = road.call(world, &sent[0]);
        assert_ne!(ends(family, &first)[1], ends(family, &out[0])[1]);
        let second = world.send(road.endpoint, &errors[1]).unwrap();
        assert_eq!(crate::hex(&second.packet), crate::hex(&sent[1]), "{}", road.name);
        let (second, why) = road.call(world, &sent[1]);
        assert_eq!((ends(family, &second), why), (ends(family, &first), BTreeSet::new()), "{}", road.name);
    });
}

/// L5: a datagram without a checksum has none when it is sent again (RFC 768).
#[test]
fn a_datagram_without_a_checksum_is_sent_again_without_one() {
    on_all_roads(|family, world, road| {
        if *family == V4 {
            let unsummed = |packet: Packet| {
                let transport = Transport::Udp { data: b"question".to_vec(), checksum: false };
                Packet { transport, ..packet }
            };
            let question = unsummed(road.question(&V4, 40_000, b"")).bytes();
            let (out, _) = road.call(world, &question);
            let [(src, src_port), (dst, dst_port)] = ends(&V4, &out);
            let about = unsummed(udp_packet((&src, src_port), (&dst, dst_port), b""));
            let error = icmp_error_quoting(&dst, &about, [3, 3], 0, 99);
            assert_eq!(crate::hex(&world.send(road.endpoint, &error).unwrap().packet), crate::hex(&question));
        }
    });
}

/// L5: of a Service all of whose endpoints refuse, not more than some refusals are turned round within a second. The others reach clients.
#[test]
fn refusals_are_turned_round_so_often_and_no_more() {
    for_both(|family| {
        let road = ROADS[0];
        let world = road.world(family);
        let (out, _) = road.call(&world, &road.syn(family, 40_000).bytes());
        // The program is loaded before, which may take a second.
        world.send(Hook::UplinkOut, &back(family, &out, tcp::RST | tcp::ACK, 0, 999)).unwrap();
        world.exhaust_tries().unwrap();
        let passed = world.send(Hook::UplinkOut, &back(family, &out, tcp::RST | tcp::ACK, 0, 1_001)).unwrap();
        assert_eq!(reasons(&passed.moved), BTreeSet::from([Reason::TriesLimited.label().to_owned()]));
        assert_eq!(passed.packet[14 + family.header + 13], tcp::RST | tcp::ACK);
        std::thread::sleep(3 * LATER);
        let (out, _) = road.call(&world, &road.syn(family, 40_001).bytes());
        let turned = world.send(Hook::UplinkOut, &back(family, &out, tcp::RST | tcp::ACK, 0, 1_001)).unwrap();
        assert_eq!((turned.verdict, reasons(&turned.moved)), (Verdict::Redirect, BTreeSet::new()));
    });
}
