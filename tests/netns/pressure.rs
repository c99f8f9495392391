//! What happens when a table or the range of source ports is full: P11, P12, C4.

use crate::fragments::send_raw;
use crate::world::{SILENCE, World};
use dataplane_tests::lab::{Client, Family, Stream};
use dataplane_tests::packet::build::{tcp, tcp_packet};
use std::net::{IpAddr, SocketAddr};

/// The range of source ports in which these tests live.
const PORTS: usize = 200;

/// Opens connections, each of which must answer.
#[track_caller]
fn open(client: &Client, to: SocketAddr, count: usize) -> Vec<Stream> {
    let mut streams = client.connect_many(to, count).unwrap_or_else(|failure| panic!("{to}: {failure}"));
    for (number, stream) in streams.iter_mut().enumerate() {
        stream.ask().unwrap_or_else(|failure| panic!("{to}, stream {number}: {failure}"));
    }
    streams
}

/// P12: nine tenths of the range without a failure; when there are more, those that find no port fail and are counted, the
/// others live; when some end, there is room again.
#[track_caller]
fn assert_range_can_be_used(world: &World, node: usize, client: &Client, to: SocketAddr) {
    let before = world.count(node, "ports-exhausted");
    let mut streams = open(client, to, PORTS * 9 / 10);
    assert_eq!(world.count(node, "ports-exhausted"), before, "{to}");
    let hasty = client.clone().timeout(SILENCE);
    let more: Vec<_> = (0..PORTS / 5).map(|_| hasty.connect(to)).collect();
    let failed = more.iter().filter(|outcome| outcome.is_err()).count();
    assert!(failed >= PORTS / 10, "{to}: {failed} failed");
    assert!(world.count(node, "ports-exhausted") >= before + failed as u64, "{to}");
    for (number, stream) in streams.iter_mut().enumerate() {
        stream.ask().unwrap_or_else(|failure| panic!("{to}, stream {number}: {failure}"));
    }
    drop((more, streams));
    drop(open(client, to, PORTS / 2));
}

/// P11, P12: through one node address to one endpoint port, from outside and from the endpoint itself.
#[test]
fn the_range_of_source_ports_is_used_up_to_nine_tenths_and_recovers() {
    for world in World::own_of_both(&["--socket-lb=off", "--snat-ports=61000-61199"]) {
        world.apply(&world.node_port_service(0).endpoints([world.pod("web-3").endpoint()]));
        assert_range_can_be_used(&world, 3, &world.outside(), world.node_frontend(3, 0));
        assert_range_can_be_used(&world, 2, &world.in_pod("web-3"), world.frontend(0));
    }
}

/// Room in the test of a flood, in flows of each stage.
const ESTABLISHED: usize = 2_048;
const HALF_OPEN: usize = 1_024;

/// SYNs that nobody means: as many as this, each from an address and port of its own.
fn flood(world: &World, to: SocketAddr, count: usize) {
    let place = world.lab().client();
    let raw = place.socket(world.family().domain(), libc::SOCK_RAW, libc::IPPROTO_RAW).unwrap();
    for number in 0..count {
        let source = format!("{}", nobody(world.family(), number));
        let port = 1_024 + (number % 50_000) as u16;
        let syn = tcp_packet((&source, port), (&to.ip().to_string(), to.port()), tcp::SYN);
        send_raw(&raw, &syn.network_bytes(), to);
    }
}

/// An address of the outside network at which nobody is.
fn nobody(family: Family, number: usize) -> IpAddr {
    let last = 210 + (number % 40) as u8;
    match family {
        Family::V4 => IpAddr::from([192, 168, 100, last]),
        Family::V6 => IpAddr::from([0xfd00, 0x100, 0, 0, 0, 0, 0xbad, u16::from(last)]),
    }
}

/// C4: a flood of ten times the room of the tables breaks no established flow, neither of pods nor of clients outside.
#[test]
fn a_flood_of_syns_breaks_no_established_flow() {
    const STREAMS: usize = 500;
    let sizes = [
        "--socket-lb=off".to_owned(),
        format!("--max-flows={ESTABLISHED}"),
        format!("--map-size=half_open={HALF_OPEN}"),
    ];
    for world in World::own_of_both(&sizes.each_ref().map(String::as_str)) {
        world.apply(&world.node_port_service(0).endpoints(world.webs()));
        let mut streams = open(&world.in_pod("shell-1"), world.frontend(0), STREAMS);
        streams.extend(open(&world.outside(), world.node_frontend(1, 0), STREAMS));
        let known = |state: &str| {
            let flows = world.node(1).portolan(&["flows"]).unwrap();
            flows.lines().filter(|line| line.contains(state)).count()
        };
        let established = known("established");
        assert!(established >= 2 * STREAMS, "{established} established flows");
        flood(&world, world.node_frontend(1, 0), 10 * ESTABLISHED);
        let half_open = known("half-open");
        assert!((HALF_OPEN / 4..=HALF_OPEN).contains(&half_open), "{half_open} half-open flows");
        for (number, stream) in streams.iter_mut().enumerate() {
            stream.ask().unwrap_or_else(|failure| panic!("stream {number}: {failure}"));
        }
        assert!(known("established") >= 2 * STREAMS);
        // Who means it is served.
        world.outside().tcp(world.node_frontend(1, 0)).unwrap();
    }
}
