//! Tables that fill up: told before it hurts, and when it does what was there stays; and Services that are large.

use crate::world::eventually;
use dataplane_tests::lab::{AgentOptions, Client, Endpoint, Lab, Node, Options, PodOptions, Service, at};
use serde_json::{Value, json};
use std::net::Ipv4Addr;
use std::time::Duration;

const PORT: u16 = 80;
const TARGET: u16 = 8080;

/// A node with two pods, one of which is a client; no agent yet.
fn lab() -> Lab {
    let lab = Options::default().nodes(1).create().unwrap();
    lab.add_pod("web", 0, &PodOptions::default()).unwrap();
    lab.add_pod("shell", 0, &PodOptions::client()).unwrap();
    lab
}

fn shell(lab: &Lab) -> Client {
    Client::at(lab.pod("shell").unwrap().place())
}

fn log(node: &Node) -> String {
    node.agent().unwrap().process().log()
}

fn cluster_ip(number: u8) -> Ipv4Addr {
    Ipv4Addr::new(10, 96, 10, number)
}

fn service(lab: &Lab, number: u8) -> Service {
    let web = lab.pod("web").unwrap().endpoint();
    Service::new(&format!("s{number}"), cluster_ip(number)).tcp(PORT, TARGET).endpoints([web])
}

/// What is nearly full after eighteen Services, and has no room for four more.
const SMALL: [(&str, u32); 4] = [("frontends", 40), ("services", 20), ("backends", 20), ("slots", 20)];

/// H2, H3, Z5: a warning and a metric before a table is full; when it is, its name and how to enlarge it; what was served goes on,
/// and who waits comes in when there is room.
#[test]
fn a_table_that_fills_up_is_told_of_before_and_costs_nobody_who_is_in() {
    let lab = lab();
    let node = lab.node(0);
    let serves = |number: u8| shell(&lab).tcp(at(cluster_ip(number), PORT)).is_ok();
    for (table, room) in SMALL {
        let before = node.agent().map_or(0, |_| log(node).len());
        let said = || log(node)[before..].to_owned();
        for number in 1..=18 {
            lab.manifests().apply(&service(&lab, number)).unwrap();
        }
        let size = format!("--map-size={table}={room}");
        node.start_agent(&AgentOptions::default().arguments(&[&size, "--healthy-within=1s"])).unwrap();
        let nearly_full = format!("portolan_table_nearly_full{{table=\"{table}\"}} ");
        eventually("a metric tells that it is nearly full", || node.metric(&nearly_full) == Some(1.0));
        assert!(said().contains(&format!("the table {table} is 9")), "{}", said());
        assert!(said().contains(&format!("make room with --map-size {table}=N")), "{}", said());
        assert!(!said().contains("waits"), "it is not full yet: {}", said());

        let some_wait = || node.metric("portolan_waiting_services ").is_some_and(|count| count >= 1.0);
        (19..=22).for_each(|number| lab.manifests().apply(&service(&lab, number)).unwrap());
        eventually("some wait", some_wait);
        let full = format!("map `{table}` is full with {room} entries: enlarge it with --map-size {table}=N");
        assert!(said().contains(&full), "{}", said());
        assert!((1..=18).all(serves), "what was served goes on");
        std::thread::sleep(Duration::from_millis(1_500));
        assert_eq!(
            node.metric("portolan_healthy "),
            Some(1.0),
            "packets are served, so load balancers may come"
        );
        (1..=6).for_each(|number| lab.manifests().delete(&service(&lab, number)).unwrap());
        eventually("who waited is served", || (7..=22).all(serves));

        (1..=6).for_each(|number| lab.manifests().apply(&service(&lab, number)).unwrap());
        eventually("some wait again", some_wait);
        node.agent().unwrap().stop().unwrap();
        let larger = format!("--map-size={table}={}", 4 * room);
        node.start_agent(&AgentOptions::default().arguments(&[&larger])).unwrap();
        assert!((1..=22).all(serves), "all have room now");
        assert_eq!(node.metric("portolan_waiting_services "), Some(0.0));
        node.agent().unwrap().stop().unwrap();
        node.portolan(&["cleanup", "--keep-state"]).unwrap();
        (19..=22).for_each(|number| lab.manifests().delete(&service(&lab, number)).unwrap());
    }
}

/// C3, C4: flows for which there is no room are dropped and counted, and break none of the others; nor does making room.
#[test]
fn a_full_table_of_flows_breaks_no_flow() {
    // Two entries for each flow: 2,304.
    const FLOWS: usize = 1_024 + 64 + 64;

    let lab = lab();
    let node = lab.node(0);
    lab.manifests().apply(&service(&lab, 1)).unwrap();
    let arguments = ["--socket-lb=off", "--max-flows=1024", "--map-size=half_open=64,closing=64"];
    node.start_agent(&AgentOptions::default().arguments(&arguments)).unwrap();
    let connect = |count| {
        let mut streams = shell(&lab).connect_many(at(cluster_ip(1), PORT), count).unwrap();
        streams.iter_mut().for_each(|stream| drop(stream.ask().unwrap()));
        streams
    };
    let mut streams = connect(FLOWS * 91 / 100);
    let nearly_full = "portolan_table_nearly_full{table=\"flows\"} ";
    eventually("a metric tells that it is nearly full", || node.metric(nearly_full) == Some(1.0));
    assert!(log(node).contains("the table flows is 9") && log(node).contains("--max-flows"), "{}", log(node));
    streams.extend(connect(FLOWS - streams.len()));
    let late = shell(&lab).timeout(Duration::from_millis(500));
    assert!(late.connect(at(cluster_ip(1), PORT)).is_err(), "there is no room");
    let full = "portolan_reasons_total{reason=\"flows-full\"} ";
    assert!(node.metric(full).is_some_and(|count| count > 0.0));
    for stream in &mut streams {
        stream.ask().unwrap();
    }
    streams.truncate(FLOWS / 2);
    shell(&lab).tcp(at(cluster_ip(1), PORT)).unwrap();

    node.agent().unwrap().stop().unwrap();
    let arguments = ["--socket-lb=off", "--max-flows=2048", "--map-size=half_open=128,closing=128"];
    node.start_agent(&AgentOptions::default().arguments(&arguments)).unwrap();
    for map in ["closing has room for 128 entries instead of 64; 64 were", "flows has room for 4608 entries"]
    {
        assert!(log(node).contains(map), "{}", log(node));
    }
    for stream in &mut streams {
        stream.ask().unwrap();
    }
}

/// Endpoints of one Service, all of which are addresses of one pod.
const MANY: u16 = 5_000;
/// How many of them a slice holds.
const SLICE: u16 = 1_000;

fn slice(number: u16) -> Value {
    let address = |at: u16| {
        let [high, low] = (at + 1).to_be_bytes();
        Ipv4Addr::new(10, 77, high, low)
    };
    let endpoints: Vec<_> = (number * SLICE..(number + 1) * SLICE)
        .map(|at| json!({ "addresses": [address(at)], "nodeName": "node-1" }))
        .collect();
    json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
        "metadata": {
            "name": format!("large-{number}"), "namespace": "default", "labels": { "kubernetes.io/service-name": "large" },
        },
        "ports": [{ "name": "tcp-80", "protocol": "TCP", "port": TARGET }],
        "endpoints": endpoints,
    })
}

/// F5
#[test]
fn five_thousand_endpoints_of_one_service_are_all_served() {
    let lab = Options::default().nodes(1).create().unwrap();
    let node = lab.node(0);
    let web = lab.add_pod("web", 0, &PodOptions::default()).unwrap();
    lab.add_pod("shell", 0, &PodOptions::client()).unwrap();
    let route = format!("route add 10.77.0.0/19 via {} dev {} onlink", web.address(), web.node_interface());
    node.place().ip(&[route]).unwrap();
    web.place().ip(&["route add local 10.77.0.0/19 dev lo".into()]).unwrap();

    node.start_agent(&AgentOptions::default()).unwrap();
    let nobody: [Endpoint; 0] = [];
    lab.manifests().apply(&Service::new("large", cluster_ip(1)).tcp(PORT, TARGET).endpoints(nobody)).unwrap();
    let slices: Vec<_> = (0..MANY / SLICE).map(slice).collect();
    lab.manifests().write("large-slices.yaml", &dataplane_tests::lab::documents(&slices)).unwrap();
    let shown =
        || -> Value { serde_json::from_str(&node.portolan(&["services", "-o", "json"]).unwrap()).unwrap() };
    eventually("all are in the set", || shown()[0]["cluster_endpoints"] == MANY);
    for number in 0..3_000 {
        shell(&lab).tcp(at(cluster_ip(1), PORT)).unwrap_or_else(|failure| panic!("{number}: {failure}"));
    }
    let backends: Value = serde_json::from_str(&node.portolan(&["backends", "-o", "json"]).unwrap()).unwrap();
    let backends = backends.as_array().unwrap();
    assert_eq!(backends.iter().filter(|backend| backend["in_use"] == true).count(), usize::from(MANY));
    let asked = backends.iter().filter(|backend| backend["traffic"]["new_flows"] != 0).count();
    // Of 5,000 that are equally likely, 3,000 draws meet 2,256 on average.
    assert!((2_050..2_450).contains(&asked), "{asked} endpoints had their part");
    lab.manifests().write("large-slices.yaml", &dataplane_tests::lab::documents(&slices[..1])).unwrap();
    eventually("a thousand are left", || shown()[0]["cluster_endpoints"] == SLICE);
    assert!(shell(&lab).tcp(at(cluster_ip(1), PORT)).is_ok());
}
