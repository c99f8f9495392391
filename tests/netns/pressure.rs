//! What happens when a table or the range of source ports is full: P11, P12, C4.

use crate::world::{SILENCE, World};
use dataplane_tests::lab::{Client, Stream};
use dataplane_tests::load;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

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
const HALF_OPEN: usize = 4_096;

/// For how long it is flooded, at least, before and after what is meant.
const FLOOD: Duration = Duration::from_secs(1);

/// SYNs that nobody means, as one of `parts` senders. How many were sent.
fn flood(world: &World, to: SocketAddr, part: usize, parts: usize, end: &AtomicBool) -> usize {
    let place = world.lab().client();
    let raw = place.socket(world.family().domain(), libc::SOCK_RAW, libc::IPPROTO_RAW).unwrap();
    let mut sent = 0;
    load::flood(&raw, to, (part, parts), end, |bytes| {
        bytes.unwrap();
        sent += 1;
    });
    sent
}

/// Does this while all CPUs flood, from before its begin until a while after its end. How many SYNs were sent.
fn while_flooded(world: &World, to: SocketAddr, work: impl FnOnce()) -> usize {
    /// Ends the flood, also where the work panics.
    struct Ending<'a>(&'a AtomicBool);
    impl Drop for Ending<'_> {
        fn drop(&mut self) {
            self.0.store(true, Ordering::Relaxed);
        }
    }
    let end = AtomicBool::new(false);
    let cpus = std::thread::available_parallelism().map_or(2, usize::from).max(2);
    std::thread::scope(|scope| {
        let ending = Ending(&end);
        let floods: Vec<_> = (0..cpus)
            .map(|part| {
                let end = &end;
                scope.spawn(move || flood(world, to, part, cpus, end))
            })
            .collect();
        std::thread::sleep(FLOOD);
        work();
        std::thread::sleep(FLOOD);
        drop(ending);
        floods.into_iter().map(|flood| flood.join().unwrap()).sum()
    })
}

/// C4: a flood from all CPUs, of many times the room, breaks no established flow, neither of pods nor of clients outside; who means it is
/// served meanwhile; and there are never more half-open flows than there is room for.
#[test]
fn a_flood_of_syns_from_all_cpus_hurts_its_own_kind_alone() {
    const STREAMS: usize = 500;
    let sizes = [
        "--socket-lb=off".to_owned(),
        format!("--max-flows={ESTABLISHED}"),
        format!("--map-size=half_open={HALF_OPEN}"),
    ];
    for world in World::own_of_both(&sizes.each_ref().map(String::as_str)) {
        world.apply(&world.node_port_service(0).endpoints(world.webs()));
        let target = world.node_frontend(1, 0);
        let mut streams = open(&world.in_pod("shell-1"), world.frontend(0), STREAMS);
        streams.extend(open(&world.outside(), target, STREAMS));
        let known = |state: &str| {
            let flows = world.node(1).portolan(&["flows"]).unwrap();
            flows.lines().filter(|line| line.contains(state)).count()
        };
        let established = known("established");
        assert!(established >= 2 * STREAMS, "{established} established flows");
        let mut sent = 0;
        for _ in 0..3 {
            sent += while_flooded(&world, target, || {
                // Who means it is served.
                world.outside().tcp(target).unwrap();
                world.in_pod("shell-1").tcp(world.frontend(0)).unwrap();
            });
            // Not before: what is counted must not come and go meanwhile. Those of the last packets are on their way to the endpoints.
            let half_open = known("half-open");
            assert!(half_open <= HALF_OPEN, "{half_open} half-open flows");
        }
        assert!(sent > 4 * HALF_OPEN, "{sent} SYNs are no flood");
        for (number, stream) in streams.iter_mut().enumerate() {
            stream.ask().unwrap_or_else(|failure| panic!("stream {number}: {failure}"));
        }
        assert!(known("established") >= 2 * STREAMS);
    }
}
