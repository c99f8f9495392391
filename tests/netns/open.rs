//! Least-connections and the counts of what is open (L2), by packet and by socket.

use crate::world::{
    PATIENCE, PORT, TARGET, Tcp, Transport, Udp, World, eventually, on_all_paths, on_both_paths,
};
use dataplane_common::counter::Open;
use dataplane_common::flow::Flow;
use dataplane_common::tables::{Flows, OpenCounts};
use dataplane_tests::bench_counts::{CountsArgs, measure};
use dataplane_tests::lab::{AgentOptions, Client, Service, Stream, ask_datagram, at};
use dataplane_tests::serial;
use dataplane_user::kernel::maps::Map;
use dataplane_user::kernel::pins::Pins;
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::{Duration, Instant};

const DRIFT: &str = "portolan_open_connections_drift_total ";

/// How long a look after the counts may be in coming, and the one that puts them right after it.
const TWO_SWEEPS: Duration = Duration::from_secs(120);

fn least(service: Service) -> Service {
    service.annotation("service.portolan.dev/lb-algorithm", "least-connections")
}

/// How many connections of each endpoint of a Service a node counts as open, and the ids of their backends.
#[track_caller]
fn open_of(world: &World, node: usize, service: &Service, transport: Transport) -> BTreeMap<u32, u64> {
    let text = world.node(node).portolan(&["backends", "-o", "json"]).unwrap();
    let rows: serde_json::Value = serde_json::from_str(&text).unwrap();
    let name = format!("default/{}:", service.name());
    let protocol = if transport == Tcp { "TCP" } else { "UDP" };
    let of_service = rows.as_array().unwrap().iter().filter(|row| {
        let v6 = row["address"].as_str().unwrap().contains(':');
        row["service"].as_str().unwrap().starts_with(&name)
            && row["protocol"] == protocol
            && v6 == world.loopback().is_ipv6()
    });
    of_service.map(|row| (row["id"].as_u64().unwrap() as u32, row["open"].as_u64().unwrap())).collect()
}

/// Waits until a node counts so many as open of all endpoints of a Service.
#[track_caller]
fn expect_open(world: &World, node: usize, service: &Service, transport: Transport, expected: u64) {
    let mut seen = BTreeMap::new();
    let end = Instant::now() + TWO_SWEEPS;
    while Instant::now() < end {
        seen = open_of(world, node, service, transport);
        if seen.values().sum::<u64>() == expected {
            return;
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    panic!("{transport:?}: {expected} on node {node} are not counted, but {seen:?}");
}

/// Clients of each kind, the address that each calls and the node that counts them.
fn clients(world: &World) -> [(Client, SocketAddr, usize); 4] {
    [
        (world.in_pod("shell-3"), world.frontend(0), 3),
        (world.on_node(1), world.frontend(0), 1),
        (world.outside(), world.node_frontend(1, 0), 1),
        (world.outside(), world.node_frontend(3, 0), 3),
    ]
}

fn connect(client: &Client, to: SocketAddr, count: usize) -> Vec<Stream> {
    let mut streams = client.connect_many(to, count).unwrap();
    streams.iter_mut().for_each(|stream| drop(stream.ask().unwrap()));
    streams
}

on_all_paths! {
    /// L2: what is open is counted where it was begun, evenly over two endpoints, and counted off when it is closed; whoever calls.
    fn connections_are_counted_until_they_are_closed(world) {
        let service = least(world.node_port_service(0)).endpoints(world.webs());
        world.apply(&service);
        for (client, to, node) in clients(world) {
            let mut streams = connect(&client, to, 10);
            expect_open(world, node, &service, Tcp, 10);
            let counts = open_of(world, node, &service, Tcp);
            assert!(counts.values().all(|open| *open == 5), "{to}: {counts:?}");
            streams.truncate(4);
            expect_open(world, node, &service, Tcp, 4);
            let more = connect(&client, to, 6);
            expect_open(world, node, &service, Tcp, 10);
            let counts = open_of(world, node, &service, Tcp);
            assert!(counts.values().all(|open| *open == 5), "{to}: {counts:?}");
            // One end resets all of them.
            for stream in streams.iter().chain(&more) {
                socket2::SockRef::from(stream.get_ref()).set_linger(Some(Duration::ZERO)).unwrap();
            }
            drop((streams, more));
            expect_open(world, node, &service, Tcp, 0);
        }
    }
}

on_both_paths! {
    /// L2: a socket that was refused and connects elsewhere is open where it is connected.
    fn a_second_connection_of_a_socket_takes_the_place_of_the_first(world) {
        let closed = world.bare_service(1).tcp(PORT, 9).endpoints([world.pod("web-1").endpoint()]);
        let service = least(world.node_port_service(0)).endpoints(world.webs());
        world.apply(&closed);
        world.apply(&service);
        let pod = world.pod("shell-3");
        let socket = pod.place().tcp_socket(world.family()).unwrap();
        let connect = |to| Stream::connect(socket.try_clone().unwrap(), to, PATIENCE);
        assert!(connect(at(world.cluster_ip(1), PORT)).is_err());
        // The kernel tells the next call that the connection before it was aborted.
        let to = world.frontend(0);
        let mut stream = connect(to).or_else(|_| connect(to)).unwrap();
        stream.ask().unwrap();
        expect_open(world, 3, &closed, Tcp, 0);
        expect_open(world, 3, &service, Tcp, 1);
        drop((stream, socket));
        expect_open(world, 3, &service, Tcp, 0);
    }
}

on_all_paths! {
    /// L2: a flow of UDP is open from its first datagram on; a socket of the node's, whose endpoint the hooks choose, until it is closed.
    fn datagrams_are_counted_by_flow_and_by_socket(world) {
        let service = least(world.node_port_service(0)).endpoints(world.webs());
        world.apply(&service);
        for (client, to, node) in clients(world) {
            let before: u64 = open_of(world, node, &service, Udp).values().sum();
            for _ in 0..4 {
                client.udp(to).unwrap();
            }
            expect_open(world, node, &service, Udp, before + 4);
        }
        if !world.kind().serves_own_node_ports() {
            return;
        }
        let (own, node) = (at(world.loopback(), world.node_port(0)), world.node(2));
        let sockets: Vec<_> = (0..6)
            .map(|number| {
                let socket = node.place().udp_socket(Some(world.any_port())).unwrap();
                if number % 2 == 0 {
                    socket.connect(own).unwrap();
                }
                ask_datagram(&socket, (number % 2 != 0).then_some(own), PATIENCE).unwrap();
                socket
            })
            .collect();
        expect_open(world, 2, &service, Udp, 6);
        sockets[0].connect(own).unwrap();
        ask_datagram(&sockets[1], Some(own), PATIENCE).unwrap();
        expect_open(world, 2, &service, Udp, 6);
        drop(sockets);
        expect_open(world, 2, &service, Udp, 0);
    }
}

/// Streams that are there, some of which end as others begin.
fn churn(world: &World, streams: &mut Vec<Stream>) {
    let half = streams.len() / 2;
    streams.drain(..half);
    for (client, to, _) in clients(world) {
        streams.extend(connect(&client, to, 10));
    }
}

/// C3, L2: an agent that is killed again and again, and an algorithm that is changed as often: what is open stays counted, and a look
/// after it finds nothing. A count that is wrong is put right.
fn counts_outlive_the_agent(arguments: &[&str]) {
    let world = World::own(arguments);
    let service = least(world.node_port_service(0)).endpoints(world.webs());
    let random = world.node_port_service(0).endpoints(world.webs());
    world.apply(&service);
    let mut streams = Vec::new();
    for round in 0..4 {
        churn(&world, &mut streams);
        for node in [1, 3] {
            world.node(node).agent().unwrap().kill();
        }
        churn(&world, &mut streams);
        for node in [1, 3] {
            world.node(node).start_agent(&AgentOptions::default().arguments(arguments)).unwrap();
        }
        world.apply(if round % 2 == 0 { &random } else { &service });
    }
    let counted = |node| open_of(&world, node, &service, Tcp);
    let live = streams.len() as u64;
    eventually("all that is open is counted, and nothing else", || {
        [1, 3].into_iter().flat_map(|node| counted(node).into_values()).sum::<u64>() == live
    });
    for node in [1, 3] {
        let of_node: u64 = counted(node).values().sum();
        let to = format!(
            "portolan_service_open_connections{{namespace=\"default\",service=\"{}\",port=\"tcp-80\",\
                          protocol=\"TCP\",ip_family=\"IPv4\"}} ",
            service.name()
        );
        eventually("the metric tells it", || world.node(node).metric(&to) == Some(of_node as f64));
    }
    assert_eq!([1, 3].map(|node| world.node(node).metric(DRIFT).unwrap()), [0.0; 2]);
    if arguments.contains(&"--socket-lb=off") {
        wrong_counts_are_put_right(&world, &service);
    } else {
        wrong_counts_of_sockets_are_put_right_as_far_as_they_can_be_told(&world, &service);
    }
    drop(streams);
    for node in [1, 3] {
        expect_open(&world, node, &service, Tcp, 0);
    }
}

/// As if five connections that there are not were open, and three that there are were not.
#[track_caller]
fn wrong_counts_are_put_right(world: &World, service: &Service) {
    let node = world.node(1);
    let counted = || open_of(world, 1, service, Tcp);
    let drift = || node.metric(DRIFT).unwrap();
    let table = Map::<OpenCounts>::open(&Pins::new(&node.bpffs()).maps()).unwrap();
    let before = counted();
    let wrong = |id: u32, by: i64| {
        let word = table.get(&id).unwrap().unwrap().word().wrapping_add(by as u64);
        table.insert(&id, &Open::from_word(word), 0).unwrap();
    };
    assert_eq!(drift(), 0.0);
    for (id, by) in before.keys().zip([5, -3]) {
        wrong(*id, by);
    }
    assert_ne!(counted(), before);
    let end = Instant::now() + TWO_SWEEPS;
    while counted() != before {
        assert!(Instant::now() < end, "{:?} is not {before:?}, drift {}", counted(), drift());
        std::thread::sleep(Duration::from_millis(100));
    }
    assert_eq!(drift(), 8.0);
    assert_eq!(world.node(3).metric(DRIFT), Some(0.0), "two sweeps have looked there as well");
}

/// As if five connections that there are not were open, and some that there are were not: fewer than there are flows. A kernel that does not
/// let the agent walk through sockets leaves the first as it is, and of the others nothing tells but the flows.
#[track_caller]
fn wrong_counts_of_sockets_are_put_right_as_far_as_they_can_be_told(world: &World, service: &Service) {
    let node = world.node(1);
    let (pins, drift) = (Pins::new(&node.bpffs()).maps(), || node.metric(DRIFT).unwrap());
    let mut flows = BTreeMap::<u32, u64>::new();
    for (_, flow) in Map::<Flows>::open(&pins).unwrap().entries().unwrap() {
        if flow.has(Flow::COUNTED_OPEN) {
            *flows.entry(flow.backend).or_default() += 1;
        }
    }
    let before = open_of(world, 1, service, Tcp);
    let [high, low] = [0, 1].map(|at| *before.keys().nth(at).unwrap());
    assert!(flows[&low] > 2 && before[&low] > flows[&low], "{flows:?} {before:?}");
    let table = Map::<OpenCounts>::open(&pins).unwrap();
    let wrong = |id: u32, by: i64| {
        let word = table.get(&id).unwrap().unwrap().word().wrapping_add(by as u64);
        table.insert(&id, &Open::from_word(word), 0).unwrap();
    };
    let sockets = (before[&low] - flows[&low]) as i64;
    wrong(high, 5);
    wrong(low, -sockets - 2);
    let mut believed = before.clone();
    *believed.get_mut(&high).unwrap() += 5;
    believed.insert(low, flows[&low]);
    let said =
        || node.agent().unwrap().process().log().contains("does not let this process walk through them");
    let end = Instant::now() + TWO_SWEEPS;
    loop {
        let counted = open_of(world, 1, service, Tcp);
        if said() && counted == believed {
            assert_eq!(drift(), 2.0);
            wrong(high, -5);
            wrong(low, sockets);
            return;
        }
        if !said() && counted == before {
            assert_eq!(drift(), (5 + sockets + 2) as f64);
            return;
        }
        assert!(Instant::now() < end, "{counted:?}: before {before:?}, flows {flows:?}, drift {}", drift());
        std::thread::sleep(Duration::from_millis(100));
    }
}

/// C3, L2
#[test]
fn counts_outlive_the_agent_by_packet() {
    counts_outlive_the_agent(&["--socket-lb=off"]);
}

/// C3, L2
#[test]
fn counts_outlive_the_agent_by_socket() {
    counts_outlive_the_agent(&["--socket-lb=all"]);
}

on_both_paths! {
    /// L2: one of two endpoints takes ten times as long: of a hundred clients the last waits at most half as long as with random.
    fn a_slow_endpoint_holds_up_fewer_clients(world) {
        let pods = [world.pod("web-1"), world.pod("web-3")];
        let port = world.own_target();
        let places = [0, 1].map(|at| (pods[at].place(), world.pod_ip(pods[at].name()), pods[at].name()));
        let _servers = serial::unequal(places, port).unwrap();
        let service = world.bare_service(0).tcp(PORT, port).endpoints(world.webs());
        let client = world.pod("shell-3");
        let last_of = |service: &Service| {
            world.apply(service);
            let met = serial::clients(client.place(), world.frontend(0), 240, serial::RATE).unwrap();
            assert_eq!((met.failed, met.answered.len()), (0, 2), "{:?}", met.answered);
            println!("p50 {:?}, p99 {:?}: {:?}", met.quantile(500), met.quantile(990), met.answered);
            met.quantile(990)
        };
        let random = last_of(&service);
        let least = last_of(&least(service));
        assert!(least * 2 <= random, "{least:?} is not half of {random:?}");
    }
}

/// L2: the endpoint is told with what it has open, and the algorithm.
#[test]
fn what_is_open_can_be_asked_for() {
    let world = World::own(&["--socket-lb=off"]);
    let service = least(world.bare_service(0).tcp(PORT, TARGET)).endpoints([world.pod("web-1").endpoint()]);
    world.apply(&service);
    let _streams = connect(&world.in_pod("shell-1"), world.frontend(0), 3);
    let node = world.node(1);
    let (shell, name) = (world.pod_ip("shell-1").to_string(), format!("default/{}", service.name()));
    eventually("the names of Services are written", || {
        node.portolan(&["services"]).unwrap().contains(&format!("{name}:tcp-80"))
    });
    let told = node.portolan(&["explain", &shell, &name]).unwrap();
    assert!(told.contains("algorithm least-connections"), "{told}");
    assert!(told.contains(", 3 open"), "{told}");
    let services = node.portolan(&["services"]).unwrap();
    assert!(
        services.lines().any(|line| line.contains(&name) && line.contains("least-connections")),
        "{services}"
    );
    assert_eq!(open_of(&world, 1, &service, Tcp).into_values().collect::<Vec<_>>(), [3]);
}

/// C3, L2: ten thousand flows that end by FIN, by RST, refused, moved, idle or displaced, while agents are killed and the algorithm changes:
/// the counts are those of the flows and sockets that there are. `cargo xtask bench counts` does it with a million.
#[test]
fn counts_are_those_of_the_flows_after_every_kind_of_end() {
    let args = CountsArgs { flows: 10_000, kills: 2, changes: 5, rate: 1_000.0, records: PathBuf::new() };
    let measured = measure(&args, |line| println!("{line}")).unwrap();
    assert!(
        measured.flows >= args.flows && measured.moved > 1_000 && measured.by_socket > 50,
        "{measured:?}"
    );
    assert_eq!((measured.differences, measured.drift), (0, 0), "{measured:?}");
    assert_eq!((measured.refused, measured.silent, measured.other), (0, 0, 0), "{measured:?}");
}
